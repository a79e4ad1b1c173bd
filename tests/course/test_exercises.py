"""Every exercise stands in its notebook; the mechanism says what it should.

`make exercises`, a part of `make test`, proves each.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import form
import nbformat
import pytest
import torch

from mi_helpers.course import exercise as cards
from mi_helpers.course import hint, progress, prove, record, solution
from mi_helpers.course.exercise import NOT_ATTEMPTED, RIGHT, WRONG, Exercise, Verdict, evaluate

mechanism = importlib.import_module("mi_helpers.course.check")  # the name is the function's too
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = cards.lessons()
EXERCISES = [
    pytest.param(exercise, lesson, id=exercise.id)
    for lesson, exercises in LESSONS.items()
    for exercise in exercises
]


def cells_of(lesson: int, kind: str) -> list[str]:
    """The sources of the cells of a lesson's notebook that are "code", or "markdown"."""
    (path,) = NOTEBOOKS.glob(f"{lesson:02d}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == kind]


# -- the lessons -----------------------------------------------------------------------------


@pytest.mark.parametrize(("exercise", "lesson"), EXERCISES)
def test_an_answer_that_gets_the_model_cannot_leave_it_changed(exercise, lesson):
    if "model" in inspect.signature(exercise.reference).parameters:
        assert "on_model" in exercise.check.__code__.co_names
        assert prove.draws_anew(exercise)  # so right answers are tried on other inputs, too


@pytest.mark.parametrize(("exercise", "lesson"), EXERCISES)
def test_the_exercise_stands_in_its_notebook(exercise, lesson):
    cells = cells_of(lesson, "code")
    name = exercise.stub_function().__name__
    assert any(exercise.stub.strip() in cell for cell in cells), "its stub is not there as it is"
    assert any(f'check("{exercise.id}", {name})' in cell for cell in cells), "its check is missing"
    heading = (
        f"### {exercise.id} {exercise.title}\n\n"
        f"{'●' * exercise.difficulty} difficulty · {'★' * exercise.importance} importance · "
        f"up to {exercise.minutes} minutes"
    )
    assert any(text.startswith(heading) for text in cells_of(lesson, "markdown"))


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_minutes_add_up(lesson):
    main = [each for each in LESSONS[lesson] if "(going further)" not in each.title]
    total = sum(exercise.minutes for exercise in main)
    (time,) = (text for text in cells_of(lesson, "markdown") if "**Time:**" in text)
    read, exercises = form.TIME.search(time).groups()
    left = int(exercises) - total  # for the investigation, where the lesson's line says so
    assert 0 < left <= 15 if "and the investigation" in time else left == 0
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {lesson:02d} \| \[.*\| (.*) \|$", readme, re.MULTILINE)
    assert row == f"{read} · {exercises}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_ids_are_unique_and_the_notebook_asks_for_no_others(lesson):
    ids = [exercise.id for exercise in LESSONS[lesson]]
    asked = re.findall(r'\b(?:check|hint|solution)\("([^"]*)"', "\n".join(cells_of(lesson, "code")))
    assert len(set(ids)) == len(ids) > 0
    assert set(asked) == set(ids)


def test_every_notebook_has_exercises():
    assert {int(path.name[:2]) for path in NOTEBOOKS.glob("*.ipynb")} == set(LESSONS)


# -- the mechanism ---------------------------------------------------------------------------


def double(x):
    """Twice x."""
    return 2 * x


def check_double(answer):
    mechanism.expect(answer(0) == 0, "Zero doubled is zero.")
    mechanism.expect_close(answer(3), 6, "Three doubled is six.")


STUB = '''\
def double(x):
    """Twice x."""
    ...
'''

DOUBLE = Exercise(
    id="77.1",
    title="Doubling",
    difficulty=1,
    importance=1,
    minutes=1,
    stub=STUB,
    reference=double,
    check=check_double,
    hints=["Add.", "Multiply."],
    wrong=[
        (lambda x: x + 1, "Zero doubled"),
        (lambda x: x * x, "Three doubled"),
        (lambda x: [x, x] if x else x, "shape (2,)"),
    ],
)


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    """A lesson 77 of one exercise, and a progress file of its own."""
    monkeypatch.setenv("MI_PROGRESS", str(tmp_path / "state" / "progress.json"))
    monkeypatch.setattr(record, "_this_session", {})
    monkeypatch.setattr(mechanism, "_hints_shown", {})
    monkeypatch.setattr(cards, "lesson_numbers", lambda: [77])
    table = {"exercise": [DOUBLE]}
    monkeypatch.setattr(cards, "declared", lambda number, what: table.get(what, []))
    return tmp_path / "state" / "progress.json"


def test_the_small_exercise_is_itself_proved():
    assert prove.problems(DOUBLE, 77) == []


def test_the_stub_is_the_references_first_lines():
    assert cards.stub_of(double) == STUB
    declare = cards.exercise(
        "77.1", title="Doubling", difficulty=1, importance=1, minutes=1,
        reference=double, hints=["Add."], wrong=DOUBLE.wrong,
    )  # fmt: skip
    made = declare(lambda answer: check_double(answer)).exercise
    assert made.stub == STUB and prove.problems(made, 77) == []
    with pytest.raises(ValueError, match="check_double has no docstring"):
        cards.stub_of(check_double)


def test_a_right_answer_is_right():
    assert evaluate(DOUBLE, lambda x: x + x) == Verdict(RIGHT)


def raises(x):
    return 1 / x


def returns_dots(x):
    x = ...
    return x


def bare_not_implemented(x):
    x = x + 1
    raise NotImplementedError


def forgets_return(x):
    x = 2 * x


def other_docstring(x):
    """Twice x, in my words."""
    ...


def too_few():
    return 0


def test_a_decorated_answer_is_told_from_a_decorated_stub():
    decorated = "import torch\n\n@torch.no_grad()\n" + STUB
    exercise = Exercise(**(vars(DOUBLE) | {"stub": decorated}))
    assert evaluate(exercise, exercise.stub_function()).status == NOT_ATTEMPTED
    assert evaluate(exercise, torch.no_grad()(lambda x: x + x)).status == RIGHT
    assert "`return 1 / x`" in evaluate(exercise, torch.no_grad()(raises)).message


@pytest.mark.parametrize("answer", [returns_dots, bare_not_implemented, other_docstring])
def test_an_unfinished_answer_is_not_attempted(answer):
    assert evaluate(DOUBLE, answer) == Verdict(NOT_ATTEMPTED)


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (raises, "raised `ZeroDivisionError: division by zero`, in line"),
        (raises, "`return 1 / x`."),
        (forgets_return, "returns nothing"),
        (too_few, "takes 0 positional arguments but 1 was given`."),
        (42, "without brackets"),
        (lambda x: "ab" if x else 0, "Expected numbers of shape (), got str `'ab'`"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(answer, fragment):
    verdict = evaluate(DOUBLE, answer)
    assert verdict.status == WRONG and fragment in verdict.message


def test_an_answer_that_the_check_cannot_read_is_shown():
    def check_length(answer):
        len(answer(1))

    exercise = Exercise(**(vars(DOUBLE) | {"check": check_length, "reference": lambda x: [x]}))
    assert "returned int `2`, which is no answer here" in evaluate(exercise, double).message


def test_a_check_may_expect_an_exception():
    def check_refusal(answer):
        try:
            answer(-1)
        except ValueError:
            return
        raise mechanism.Wrong("Refuse negative numbers.")

    def refuses(x):
        raise ValueError("negative")

    exercise = Exercise(**(vars(DOUBLE) | {"check": check_refusal, "reference": refuses}))
    assert evaluate(exercise, refuses).status == RIGHT
    assert evaluate(exercise, double).message == "Refuse negative numbers."


def test_shapes_and_values_of_tensors():
    want = torch.zeros(2, 3)
    mechanism.expect_close(torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True), want, "")
    mechanism.expect_shape(want, (2, 3))
    with pytest.raises(mechanism.Wrong, match=r"shape \(3, 2\), expected \(2, 3\)"):
        mechanism.expect_close(torch.zeros(3, 2), want, "")
    with pytest.raises(mechanism.Wrong, match="off by one"):
        mechanism.expect_close(torch.ones(2, 3), want, "off by one")
    with pytest.raises(mechanism.Wrong, match=r"not int `1`"):
        mechanism.expect_shape(1, (2, 3))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"id": "78.1"}, "the id should be 77.NUMBER"),
        ({"hints": []}, "no hint"),
        ({"difficulty": 6}, "from 1 to 5"),
        ({"reference": lambda x: x}, "the reference is 'not judged'"),
        ({"wrong": DOUBLE.wrong[:2]}, "three are needed"),
        ({"wrong": [*DOUBLE.wrong, (double, "x")]}, "wrong answer 4 reads as 'right'"),
        ({"wrong": [*DOUBLE.wrong, DOUBLE.wrong[0]]}, "same message"),
        ({"wrong": [*DOUBLE.wrong[:2], (lambda x: -1, "Three")]}, "lacks 'Three'"),
        ({"stub": "def double(x):\n    return x\n"}, None),
        ({"stub": "def double(y):\n    ...\n"}, "the stub takes ['y']"),
        ({"stub": "x = 1"}, "must define one function, not 0"),
    ],
)
def test_the_proof_notices(change, fragment):
    found = prove.problems(Exercise(**(vars(DOUBLE) | change)), 77)
    assert (found == []) if fragment is None else any(fragment in each for each in found)


def test_check_says_and_records(lesson, capsys):
    mechanism.check("77.1", lambda x: x * x)
    assert "❌ 77.1 Doubling: wrong. Three doubled is six." in capsys.readouterr().out
    mechanism.check("77.1", DOUBLE.stub_function())
    assert "⬜ 77.1 Doubling: not attempted yet." in capsys.readouterr().out
    assert not lesson.exists()
    mechanism.check("77.1", double)
    said = capsys.readouterr().out
    assert "✅ 77.1 Doubling: right. That was the last exercise of lesson 77." in said
    assert json.loads(lesson.read_text())["passed"] == ["77.1"]
    progress()
    assert "| 77 | 1 of 1 | ■ |  |" in capsys.readouterr().out


def test_hints_come_one_at_a_time(lesson, capsys):
    for _ in range(3):
        hint("77.1")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(". ")[-1] for line in shown] == ["Add.", "Multiply.", "Add."]


def test_the_solution_is_source(lesson, capsys):
    solution("77.1")
    assert "```python\ndef double(x):" in capsys.readouterr().out


@pytest.mark.parametrize("wrong_id", ["77.2", "7.1", "abc", ""])
def test_an_unknown_id_gets_one_sentence(lesson, capsys, wrong_id):
    mechanism.check(wrong_id, double)
    assert "the nearest: 77.1." in capsys.readouterr().out


def test_an_id_without_quotes_gets_one_sentence(lesson, capsys):
    hint(77.1)
    assert 'in quotes: "77.1"' in capsys.readouterr().out


def test_the_record_lies_where_the_platform_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("MI_PROGRESS", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert record.path().parts[-2:] == ("mi-course", "progress.json")
    if sys.platform == "linux":
        assert record.path() == tmp_path / "mi-course" / "progress.json"


def test_code_survives_backticks():
    assert mechanism.code("a") == "`a`"
    assert mechanism.code("a `b`\nc") == "`` a `b` c ``"
