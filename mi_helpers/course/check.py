"""What a notebook calls for its exercises: `check`, `hint`, `solution`, `confirm`.

The names that `exercises.py` of a lesson's room needs are here too, so that one import serves it.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable

from mi_helpers.course import exercise as cards
from mi_helpers.course import record, session
from mi_helpers.course.answers import (
    Draw,
    Wrong,
    agree,
    as_numbers,
    bare,
    clone,
    code,
    describe,
    draw,
    draws,
    expect,
    expect_close,
    expect_none_of,
    expect_shape,
    like,
    same,
    say_error,
)
from mi_helpers.course.exercise import (
    NOT_ATTEMPTED,
    NOT_JUDGED,
    RIGHT,
    WRONG,
    Exercise,
    Verdict,
    evaluate,
    exercise,
)
from mi_helpers.course.limits import TimeUp, within
from mi_helpers.course.mutants import edited, edits
from mi_helpers.course.session import Note, display

__all__ = [
    "Draw",
    "Exercise",
    "Note",
    "Wrong",
    "agree",
    "as_numbers",
    "check",
    "code",
    "confirm",
    "describe",
    "draw",
    "draws",
    "edited",
    "edits",
    "exercise",
    "expect",
    "expect_close",
    "expect_none_of",
    "expect_shape",
    "hint",
    "same",
    "solution",
]

ICONS = {RIGHT: "✅", WRONG: "❌", NOT_ATTEMPTED: "⬜", NOT_JUDGED: "⚠️"}
SEED = 0  # of a check's inputs where outputs are kept

session.say_name_errors(("check", "predict", "investigate"))


class Yours:
    """What a notebook goes on with: the learner's function where it is right, else the reference.

    Calls of the learner's function get copies of their inputs, a limit of time, and results in the
    make that the reference's have. One that fails is said in a sentence; from then on the reference
    answers.
    """

    def __init__(self, exercise: Exercise):
        self.exercise = exercise
        self.own: Callable | None = None
        self.make = None  # the reference's, where its own results are of another
        functools.update_wrapper(self, exercise.reference)

    @property
    def is_yours(self) -> bool:
        """Whether the learner's own function answers."""
        return self.own is not None

    def __call__(self, *args, **kwargs):
        if self.own is None:
            return self.exercise.reference(*args, **kwargs)
        given = (clone(args), clone(kwargs)) if self.exercise.copies else (args, kwargs)
        try:
            result = within(self.exercise.seconds, self.own, *given[0], **given[1])
        except TimeUp:
            self.give_up(f"had not finished after {self.exercise.seconds:g} seconds")
        except (Exception, SystemExit) as error:
            self.give_up(f"raised {say_error(error)} here")
        else:
            return result if self.make is None else like(result, self.make)
        return self.exercise.reference(*args, **kwargs)

    def give_up(self, what: str) -> None:
        """Say what the learner's function did, and go on with the reference."""
        self.own = None
        name = code(self.exercise.name)
        display(f"⚠️ Your {name} {what}: the notebook goes on with the reference.")

    def _ipython_display_(self) -> None:
        """Nothing: a cell that ends in `check(...)` shows its verdict alone."""

    def __repr__(self) -> str:
        owner = "your own" if self.is_yours else "the reference's"
        return f"<{owner} {self.exercise.name}, exercise {self.exercise.id}>"


def unknown(*_args, **_kwargs):
    """What `check` returns for an exercise that does not exist."""
    raise LookupError(
        "This came from a `check` of an exercise that does not exist: mend its number."
    )


def find(exercise_id: str) -> Exercise | None:
    """The exercise with this id; None, after one sentence, if there is none."""
    try:
        return cards.look_up(exercise_id, "exercise")
    except LookupError as error:
        display(f"⚠️ {error.args[0]}")
        return None


def check(exercise_id: str, answer: "Callable | str") -> Callable:
    """`mine = check("5.2", my_function)`: say whether it is right, and what is wrong if it is not.

    Returns the learner's function where it is right, else the reference, and the notebook goes on
    with that. A function may be given by its name in quotes, which need not be defined yet.
    """
    if (exercise := find(exercise_id)) is None:
        return unknown
    yours, kept = Yours(exercise), session.assigns("check", exercise.id)
    text = said(yours, answer, kept)
    if session.static():
        display(text)
    else:
        show_buttons(yours, name_of(answer) or exercise.name, text, kept)
    return yours


def name_of(answer) -> str:
    """The name that an answer can be looked up by in the notebook, or ""."""
    name = answer if isinstance(answer, str) else getattr(answer, "__name__", "")
    return name if isinstance(name, str) and name.isidentifier() else ""


def said(yours: Yours, answer, kept: bool) -> str:
    """The line on an answer; where it is right, `yours` becomes it and it is recorded.

    Args:
        kept: whether the notebook keeps the result, so that it matters whose it is
    """
    exercise = yours.exercise
    own = session.look_up(answer) if isinstance(answer, str) else answer
    own = own.own or exercise.stub_function() if isinstance(own, Yours) else own
    if own is None:
        verdict = Verdict(NOT_ATTEMPTED, undefined(answer))
    elif reason := session.stale(own):
        verdict = Verdict(NOT_JUDGED, reason)
    else:
        verdict = evaluate(exercise, own, SEED if session.static() else None)
    right = verdict.status == RIGHT
    yours.own, yours.make = (own, verdict.make) if right else (None, None)
    whose = "yours" if right else "the reference"
    parts = [
        f"{ICONS[verdict.status]} **{exercise.id} {exercise.title}: {verdict.status}.**",
        verdict.message,
        f"The notebook goes on with {whose}." if kept else "",
        *((following(exercise), record.add(exercise.id)) if right else ()),
    ]
    return " ".join(part for part in parts if part)


def undefined(answer) -> str:
    """What is said of a name that the notebook does not have."""
    if not isinstance(answer, str):
        return (
            "`check` was given `None`: write the name of your function without brackets after it."
        )
    return f"{code(answer)} is not defined yet: run the cell above that defines it, then this one."


def following(exercise: Exercise) -> str:
    """What comes after an exercise, in a sentence; "" where nothing does."""
    if exercise.after:
        return exercise.after
    lesson = int(exercise.id.split(".")[0])
    found = cards.declared(lesson, "exercise")
    ids = [each.id for each in found]
    for each in found[ids.index(exercise.id) + 1 :][:1]:
        return f"Next: {each.id} {each.title}."
    return f"That was the last exercise of lesson {lesson:02d}."


def show_buttons(yours: Yours, name: str, text: str, kept: bool) -> None:
    """The verdict, and under it buttons that check again, give a hint, and show the solution."""
    import ipywidgets

    exercise, id = yours.exercise, yours.exercise.id
    line, place = display(text), ipywidgets.Output()
    what = {
        f"Check {id}": lambda: line.update(Note(said(yours, name, kept))),
        f"Hint for {id}": lambda: session.put(place, next_hint(exercise)),
        f"Solution of {id}": lambda: session.put(place, source_of(exercise)),
    }
    texts = [f'check("{id}", {name})', f'hint("{id}")', f'solution("{id}")']
    buttons = [
        session.button(label, call, act)
        for (label, act), call in zip(what.items(), texts, strict=True)
    ]
    box = ipywidgets.VBox([ipywidgets.HBox(buttons), session.calls(*texts), place])
    session.show_live(box, " · ".join(map(code, texts)))


_hints_shown: dict[str, int] = {}


def next_hint(exercise: Exercise) -> str:
    """The next hint, in Markdown; after the last one it starts again."""
    count = len(exercise.hints)
    number = _hints_shown.get(exercise.id, 0) % count
    _hints_shown[exercise.id] = number + 1
    return f"💡 **{exercise.id}, hint {number + 1} of {count}.** {exercise.hints[number]}"


def source_of(exercise: Exercise) -> str:
    """The source of the reference, in Markdown."""
    source = textwrap.dedent(inspect.getsource(exercise.reference)).strip()
    return f"🔑 **{exercise.id} {exercise.title}, one solution:**\n\n```python\n{source}\n```"


def hint(exercise_id: str) -> None:
    """`hint("5.2")`: the next hint; after the last one it starts again."""
    if exercise := find(exercise_id):
        display(next_hint(exercise))


def solution(exercise_id: str) -> None:
    """`solution("5.2")`: the source of the reference answer."""
    if exercise := find(exercise_id):
        display(source_of(exercise))


class NotConfirmed(AssertionError):
    """What a lesson relies on does not hold here; its text is the sentence."""


def confirm(sentence: str, ok) -> None:
    """One quiet line that says what holds.

    Args:
        sentence: what is confirmed, such as "the parts sum to the stream"
        ok: a boolean, of Python, NumPy or torch

    Raises:
        NotConfirmed: it does not hold; its text is the sentence.
        ValueError: `ok` is not one boolean.
    """
    one = bare(ok)
    if one.dtype != bool or one.size != 1:
        raise ValueError(f"'{sentence}' needs True or False, not {describe(ok)}.")
    if not one.all():
        raise NotConfirmed(f"This does not hold: {sentence}.")
    display(f"✓ {sentence}")
