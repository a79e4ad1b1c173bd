"""`check` in a session as learners have them: what it returns, survives, and leaves alone."""

import importlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from mi_helpers.course import answers, prove, record
from mi_helpers.course import exercise as cards
from mi_helpers.course.answers import agree, draws, like, seeded
from mi_helpers.course.check import NotConfirmed, confirm
from mi_helpers.course.exercise import (
    NOT_JUDGED,
    RIGHT,
    WRONG,
    Exercise,
    evaluate,
)
from mi_helpers.course.limits import TimeUp, within
from mi_helpers.course.mutants import mutants

mechanism = importlib.import_module("mi_helpers.course.check")


def project(x, v):
    """x without its part along v."""
    u = v / v.norm()
    return x - (x @ u)[:, None] * u


def not_normed(x, v):
    return x - (x @ v)[:, None] * v


def check_project(answer):
    agree(
        answer,
        project,
        lambda draw: (draw.normal("n", "d"), draw.normal("d")),
        mistakes=[(not_normed, "The direction has any length.")],
        otherwise="Another result.",
    )


def in_numpy(x, v):
    u = v.numpy() / np.linalg.norm(v.numpy())
    return x.numpy() - np.outer(x.numpy() @ u, u)


def in_double(x, v):
    return project(x.double(), v.double())


def as_list(x, v):
    return project(x, v).tolist()


def rows(x, v):
    return list(project(x, v))


def in_place(x, v):
    v /= v.norm()
    x -= (x @ v)[:, None] * v
    return x


def with_gradient(x, v):
    return project(x, v.requires_grad_())


STUB = "def project(x, v):\n    ...\n"
PROJECT = Exercise(
    id="77.1",
    title="Projecting",
    difficulty=1,
    importance=1,
    minutes=1,
    stub=STUB,
    reference=project,
    check=check_project,
    hints=["Norm v."],
    wrong=[
        (not_normed, "any length"),
        (lambda x, v: x.T, "shape"),
        (lambda x, v: x + 0 * v, "Another"),
    ],
    right=[in_numpy, in_double, as_list, rows, in_place, with_gradient],
    seconds=0.5,
)


def changed(**fields) -> Exercise:
    return Exercise(**(vars(PROJECT) | fields))


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    """A lesson 77 of one exercise, and a progress file of its own."""
    monkeypatch.setenv("MI_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.setattr(record, "_this_session", {})
    monkeypatch.setattr(cards, "lesson_numbers", lambda: [77])
    monkeypatch.setattr(cards, "declared", lambda number, what: [PROJECT])


def test_every_make_of_a_right_answer_passes_and_the_proof_holds():
    assert prove.problems(PROJECT, 77) == []


@pytest.mark.parametrize("seed", range(8))
def test_the_checks_inputs_differ_in_every_axis(seed):
    seen = []
    with seeded(seed):
        for case in draws():
            x, mask = case.normal("n", "d"), case.booleans("k")
            seen.append((*x.shape, len(mask), case.integer(0, 2), case.choice("ab")))
            assert len(set(seen[-1][:3])) == 3 and (x > 0).any() and (x < 0).any()
            assert mask.any() and not mask.all()
    for one, other in zip(seen, seen[1:], strict=False):
        assert all(a != b for a, b in zip(one, other, strict=True))


def test_what_is_drawn_is_new_each_time_and_the_same_for_a_seed():
    inputs = []

    def watch(answer):
        agree(lambda x: inputs.append(x) or x, lambda x: x, lambda d: (d.normal("n"),))

    exercise = changed(check=watch, reference=lambda x, v: x)
    for seed in (1, 1, 2):
        inputs.append("run")
        with seeded(seed):
            watch(None)
    first, second, third = [[x.tolist() for x in inputs[i : i + 4]] for i in (1, 6, 11)]
    assert first == second != third and exercise


def test_a_mistake_is_named_only_where_it_is_the_one():
    assert evaluate(PROJECT, not_normed).message == "The direction has any length."
    assert evaluate(PROJECT, lambda x, v: x * 1.001).message == "Another result."


# -- copies ----------------------------------------------------------------------------------


def test_an_answer_in_place_is_right_and_is_told():
    assert "in place" in evaluate(PROJECT, in_place).message


def test_what_the_notebook_holds_stays_as_it_was(lesson):
    yours = mechanism.check("77.1", in_place)
    x, v = torch.randn(3, 2), torch.randn(2)
    before = x.clone()
    got = yours(x, v)
    assert torch.equal(x, before) and not torch.equal(got, x) and yours.is_yours


@pytest.mark.parametrize("value", [[1, [2.0]], {"a": np.ones(2)}, (torch.ones(2),), {1, 2}, "x", 3])
def test_copies_equal_and_are_not_the_same(value):
    copy = answers.clone(value)
    assert answers.unchanged(value, copy) and type(copy) is type(value)


def test_a_leaf_that_gradients_are_collected_in_is_not_copied():
    leaf = torch.ones(2, requires_grad=True)
    assert answers.clone((leaf,))[0] is leaf


# -- kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ([1.0, 2.0], torch.ones(2)),
        (np.ones(2), torch.ones(2)),
        (torch.ones(2).double(), np.ones(2, np.float32)),
        ((torch.ones(()), 3), [1.0, 2.0]),
        (torch.ones(3, 2), (np.ones(2), np.ones(2), np.ones(2))),
        (torch.tensor(3), 2),
        (np.float64(3), 2.5),
        (np.bool_(True), False),
        ([True, False], np.array([True])),
    ],
)
def test_a_value_takes_the_make_of_another(value, other):
    made = like(value, other)
    assert type(made) is type(other) and np.allclose(answers.bare(made), answers.bare(value))
    if isinstance(other, (np.ndarray, torch.Tensor)):
        assert made.dtype == other.dtype


@pytest.mark.parametrize("make", [lambda x: x.double() * 2, lambda x: [2 * x[0], 2 * x[1]]])
def test_gradients_get_through_another_make(make):
    x = torch.ones(2, 3, requires_grad=True)
    made = like(make(x), torch.ones(2, 3))
    made.sum().backward()
    assert made.dtype == torch.float32 and torch.equal(x.grad, torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ([0, 1], np.array([True, False])),  # indices are no mask
        ("3", 3.0),
        (None, 3.0),
        (2.5, 3),
        (torch.ones(2).topk(1), [1, 2]),
        (torch.ones(1), 1.0),
        ("ab", ["a", "b"]),
        (torch.ones(2).double(), torch.ones(3).double()),
        ([1.0], [2.0, 3.0]),
    ],
)
def test_a_value_that_is_something_else_stays_what_it_is(value, other):
    assert like(value, other) is value


@pytest.mark.parametrize("value", ["3", None, [1, "2"], {1}, 1j, object()])
def test_what_is_no_number_is_none(value):
    with pytest.raises(TypeError):
        answers.as_numbers(value)


# -- what goes wrong -------------------------------------------------------------------------


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no")


class Evil(Exception):
    def __str__(self):
        raise RuntimeError("no")


def raises_evil(x, v):
    raise Evil


def exits(x, v):
    sys.exit()


def loops(x, v):
    while True:
        pass


def swallows(x, v):
    while True:
        try:
            x = x + 0
        except:  # noqa: E722
            continue


def forgets(x, v):
    x = x - v


def sleeps(x, v):
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("answer", "fragment"),
    [
        (loops, "not finished after 0.5 seconds"),
        (swallows, "not finished after 0.5 seconds"),
        (sleeps, "not finished after 0.5 seconds"),
        (exits, "raised `SystemExit`"),
        (raises_evil, "raised `Evil`"),
        (lambda x, v: Unshowable(), "a Unshowable that cannot be shown"),
        (lambda x, v: nowhere.zeros(3), "the notebook's first code cell"),  # noqa: F821
        (forgets, "returns nothing"),
    ],
)
def test_an_answer_that_misbehaves_gets_a_sentence(answer, fragment):
    start = time.monotonic()
    verdict = evaluate(PROJECT, answer)
    assert verdict.status == WRONG and fragment in verdict.message
    assert time.monotonic() - start < 20 and "\n" not in verdict.message


def test_none_is_no_missing_return_where_the_reference_returns_it():
    def first(x):
        return x[0] if x else None

    def check_first(answer):
        mechanism.expect(answer([]) is None, "Nothing in it: None.")
        mechanism.expect(answer([5]) == 5, "The first is 5.")

    exercise = changed(reference=first, check=check_first, stub="def first(x):\n    ...\n")
    assert evaluate(exercise, lambda x: None if len(x) < 1 else 4).message == "The first is 5."
    assert "returns nothing" in evaluate(exercise, lambda x: [].clear()).message


@pytest.mark.parametrize("function", [loops, swallows, sleeps])
def test_what_runs_too_long_is_interrupted_and_nothing_comes_afterwards(function):
    for _ in range(5):
        with pytest.raises(TimeUp):
            within(0.1, function, torch.ones(2), 2)
    time.sleep(0.2)
    assert threading.active_count() < 10


def test_no_interrupt_comes_after_a_call_that_ends_near_its_limit():
    ended = stopped = 0
    for n in range(150):
        try:
            within(0.002, lambda n=n: sum(i for i in range(8_000 * n)))
            ended += 1
        except TimeUp:
            stopped += 1
        sum(i for i in range(5000))  # an interrupt that comes late is raised here, and fails
    assert ended + stopped == 150 and ended and stopped


def test_a_call_that_a_debugger_holds_goes_on():
    def held():
        sys._getframe().f_trace = lambda *_: None
        time.sleep(0.3)
        return sum(range(1000))

    assert within(0.05, held) == 499500


def test_tracing_goes_on_after_a_call_that_was_watched():
    """Python 3.11 loops for ever where an exception from another thread was called back."""
    code = (
        "import sys; from mi_helpers.course.limits import within; within(5, int);"
        "sys.settrace(lambda *_: None); (lambda: print(7))()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n"


def test_limits_that_run_out_together_end_together():
    """Python 3.11 may raise in a thread that is being started, for which its starter then waits."""
    code = (
        "from mi_helpers.course.limits import TimeUp, within\n"
        "for _ in range(2000):\n"
        "    try: within(0.0011, within, 0.0012, lambda: sum(i for i in range(6000)))\n"
        "    except TimeUp: pass\n"
        "print('ended')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n"


def test_a_process_that_was_forked_has_the_limit_too():
    code = (
        "import os, time\n"
        "from mi_helpers.course.limits import TimeUp, within\n"
        "def loops():\n"
        "    while True: pass\n"
        "within(5, int)\n"
        "if os.fork() == 0:\n"
        "    try: within(0.1, loops)\n"
        "    except TimeUp: os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7\n"


def test_another_thread_has_the_limit_too():
    said = []

    def run():
        try:
            within(0.2, loops, 1, 2)
        except TimeUp:
            said.append("time is up")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert said == ["time is up"]


def test_limits_stand_inside_each_other():
    def outer():
        with pytest.raises(TimeUp):
            within(0.2, loops, 1, 2)
        loops(1, 2)

    with pytest.raises(TimeUp):
        within(1.0, outer)
    assert within(5, lambda: 3) == 3


def test_where_a_library_was_changed_nobody_is_blamed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "norm", None)
    verdict = evaluate(PROJECT, in_numpy)
    assert verdict.status == NOT_JUDGED and "restart the kernel" in verdict.message
    monkeypatch.undo()
    assert evaluate(PROJECT, in_numpy).status == RIGHT


def test_a_check_leaves_random_numbers_defaults_and_gradients_alone():
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert evaluate(PROJECT, with_gradient).status == RIGHT
            evaluate(PROJECT, lambda x, v: torch.randn(3))
        assert torch.get_default_dtype() == torch.float64
        got = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(got, torch.rand(1))
    finally:
        torch.set_default_dtype(torch.float32)


# -- what is returned ------------------------------------------------------------------------


def test_a_right_answer_goes_on_and_in_the_make_of_the_reference(lesson, capsys):
    yours = mechanism.check("77.1", as_list)
    assert yours.is_yours and isinstance(yours(torch.ones(2, 3), torch.ones(3)), torch.Tensor)
    assert mechanism.check("77.1", yours).is_yours
    assert "That was the last exercise" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [not_normed, PROJECT.stub_function(), 3, None, "not_there"])
def test_any_other_answer_is_replaced_by_the_reference(lesson, answer):
    yours = mechanism.check("77.1", answer)
    x, v = torch.randn(3, 2), torch.randn(2)
    assert not yours.is_yours and torch.equal(yours(x, v), project(x, v))


@pytest.mark.parametrize(
    ("turn", "fragment"),
    [
        (lambda: 1 / 0, "Your `project` raised `ZeroDivisionError: division by zero` here"),
        (lambda: loops(1, 2), "Your `project` had not finished after 0.5 seconds"),
        (sys.exit, "raised `SystemExit`"),
    ],
)
def test_one_that_fails_later_is_named_once_and_replaced(lesson, capsys, turn, fragment):
    def answer(x, v):
        x -= (x @ v)[:, None] * v / v.norm() ** 2
        if len(x) == 100:
            turn()
        return x

    yours = mechanism.check("77.1", answer)
    assert yours.is_yours
    capsys.readouterr()
    x, v = torch.randn(100, 2), torch.randn(2)
    for _ in range(2):
        assert torch.allclose(yours(x, v), project(x, v))
    said = capsys.readouterr().out
    assert said.count(fragment) == 1 and said.count("\n") == 1 and not yours.is_yours


def test_a_name_that_is_not_defined_is_said(lesson, capsys):
    mechanism.check("77.1", "not_there")
    assert "`not_there` is not defined yet: run the cell above" in capsys.readouterr().out


@pytest.mark.parametrize("ok", [True, np.True_, torch.tensor(True)])
def test_what_holds_is_confirmed_in_a_line(capsys, ok):
    confirm("the parts sum to the stream", ok)
    assert capsys.readouterr().out == "✓ the parts sum to the stream\n"


def test_what_does_not_hold_is_raised_with_its_sentence():
    with pytest.raises(NotConfirmed, match="the parts sum"):
        confirm("the parts sum to the stream", False)
    for ok in (torch.ones(2) > 0, None, 1, "yes"):
        with pytest.raises(ValueError, match="needs True or False"):
            confirm("all is well", ok)


# -- wrong answers that are edits ------------------------------------------------------------


def test_an_edit_is_a_wrong_answer_in_one_line():
    half = mechanism.edited(busy, "* 2", "* 4", "k > 2", "k > 0")
    assert half([3.0], 1, "abc") == -12 and busy([0, 0, 3.0], 3, "abc") == -6
    with pytest.raises(ValueError, match="busy has no 'k > 3' in its text"):
        mechanism.edited(busy, "k > 3", "k > 4")


def test_a_table_of_edits_is_a_list_of_wrong_answers():
    (half, first), (positive, second) = mechanism.edits(
        busy,
        """
        * 2 → * 4
            This is twice as much:
            halve it.
        k > 2 → k > 0
            Mind the bound.
        """,
    )
    assert first == "This is twice as much: halve it." and second == "Mind the bound."
    given = ([0, 0, 3.0], 3, "abc")
    assert half(*given) == 2 * busy(*given) and positive(*given) == busy(*given)
    ((gone, _),) = mechanism.edits(busy, "* 2 →\n    Nothing is doubled.")
    assert gone(*given) == busy(*given) / 2
    ((both, said),) = mechanism.edits(busy, "* 2 → * 4\n& k > 2 → k > 0\n    Two slips.")
    assert both([3.0], 1, "abc") == -12 and said == "Two slips."
    with pytest.raises(ValueError, match="no message"):
        mechanism.edits(busy, "* 2 → * 4\n* 2 → * 3\n    Three times.")
    with pytest.raises(ValueError, match="'x - y' is no change: write 'old → new'"):
        mechanism.edits(busy, "x - y\n    A message.")


# -- mutants ---------------------------------------------------------------------------------


def busy(x, k, names):
    """Many things in one."""
    if k > 2 and len(names) == 3:
        return -abs(x[k - 1]) * 2
    total = sum(x[i] for i in range(k)) / k
    return np.mean(np.clip(x, 0, 1), axis=0) + total**0.5


def test_mutants_are_of_every_sort():
    found = {each.change for each in mutants(busy)}
    for change in (
        "k > 2 → k >= 2",
        "k > 2 and len(names) == 3 → k > 2 or len(names) == 3",
        "-abs(x[k - 1]) → abs(x[k - 1])",
        "abs(x[k - 1]) → x[k - 1]",
        "x[k - 1] → x[k - 1 - 1]",
        "range(k) → range(1, k)",
        "np.clip(x, 0, 1) → x",
        "np.mean(np.clip(x, 0, 1), axis=0) → np.mean(np.clip(x, 0, 1), axis=1)",
        "2 → 3",
        "0.5 → 1.0",
        "names → its first value, always",
    ):
        assert change in found, change


def test_a_check_with_one_input_lets_mutants_live_and_agree_kills_them():
    def check_once(answer):
        x, v = torch.ones(2, 2), torch.tensor([1.0, 0.0])
        mechanism.expect_close(answer(x, v), project(x, v), "No.")

    lazy, good = prove.survey(changed(check=check_once)), prove.survey(PROJECT)
    assert "v / v.norm() → v * v.norm()" in lazy.survivors
    assert "x → its first value, always" in lazy.survivors
    assert good.survivors == [] and good.killed == good.counted >= 6
    assert prove.mutant_problems(77, {"77.1": good}) == []
    assert "95% are needed" in prove.mutant_problems(77, {"77.1": lazy})[0]


def test_a_survivor_needs_to_survive():
    named = prove.survey(changed(survivors={"a → b": "no reason"}))
    assert "no mutant 'a → b' survives" in prove.mutant_problems(77, {"77.1": named})[0]


def clipped(x, v):
    return x.clamp(0) if x.min() < 0 else x


def test_declared_survivors_are_not_counted():
    reason = {"x.min() < 0 → x.min() <= 0": "at 0 nothing is clipped"}
    exercise = changed(
        reference=clipped,
        check=lambda answer: agree(
            answer, clipped, lambda d: (d.normal("n") if d.choice([0, 1]) else d.positive("n"), 0)
        ),
        survivors=reason,
    )
    found = prove.survey(exercise)
    assert found.excused == reason and found.stale == []
