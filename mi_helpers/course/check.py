"""The mechanism of the exercises: an `Exercise`, the verdict on an answer, and what is displayed.

`exercises.py` of a lesson's room has `@exercise("5.2", ...)` above each function that checks an
answer, and that is how they are found; `prove.py` proves them.
"""

import difflib
import functools
import importlib
import inspect
import linecache
import pkgutil
import re
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mi_helpers.course import record

if TYPE_CHECKING:
    import torch

RIGHT, WRONG, NOT_ATTEMPTED = "right", "wrong", "not attempted yet"
ICONS = {RIGHT: "✅", WRONG: "❌", NOT_ATTEMPTED: "⬜"}


class Wrong(Exception):
    """Raised by a check: its message names the mistake, in Markdown."""


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    id          "LESSON.NUMBER", such as "5.2"
    difficulty  1 to 5, and so is importance; `minutes` is the most it should take
    stub        the text of the cell that the learner completes; it defines one function
    reference   a right answer; `solution(id)` shows its source
    hints       shown one at a time
    wrong       at least three pairs (plausible wrong answer, fragment of the message it must get)
    check       called with an answer; returns None when it is right, else raises `Wrong`
    """

    id: str
    title: str
    difficulty: int
    importance: int
    minutes: int
    stub: str
    reference: Callable
    hints: list[str]
    wrong: list[tuple[Callable, str]]
    check: Callable[[Callable], None]

    def stub_function(self) -> Callable:
        """The function that the stub defines, with the lesson module's names in reach."""
        names = dict(self.reference.__globals__)
        before = dict(names)
        exec(compile(self.stub, f"<stub of exercise {self.id}>", "exec"), names)
        made = [
            value
            for name, value in names.items()
            if inspect.isfunction(value) and before.get(name) is not value
        ]
        if len(made) != 1:
            raise ValueError(f"The stub of {self.id} must define one function, not {len(made)}.")
        return made[0]


def exercise(id: str, **card) -> Callable[[Callable], Callable]:
    """Declare an exercise, above the function that checks an answer to it.

    Args:
        id: "LESSON.NUMBER".
        card: the other fields of `Exercise` but `check`.
    """

    def declare(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
        check.exercise = Exercise(id, check=check, **card)
        return check

    return declare


@dataclass(frozen=True)
class Verdict:
    """What is said about an answer: a status, in words, and a message in Markdown."""

    status: str
    message: str = ""


# -- for checks ------------------------------------------------------------------------------


def expect(condition: bool, message: str) -> None:
    """Raise `Wrong(message)` unless the condition holds."""
    if not condition:
        raise Wrong(message)


def expect_shape(got, shape: tuple[int, ...], name: str = "The result") -> None:
    """Raise `Wrong` unless `got.shape == shape`."""
    if not hasattr(got, "shape"):
        raise Wrong(f"{name} should be a tensor of shape {shape}, not {describe(got)}.")
    expect(tuple(got.shape) == shape, f"{name} has shape {tuple(got.shape)}, expected {shape}.")


def expect_close(got, want, message: str, tolerance: float = 1e-5) -> None:
    """Raise `Wrong(message)` unless |got - want| <= tolerance everywhere; shapes must agree too."""
    want = as_numbers(want)
    try:
        numbers = as_numbers(got)
    except (TypeError, ValueError):
        raise Wrong(f"Expected numbers of shape {want.shape}, got {describe(got)}.") from None
    expect(
        numbers.shape == want.shape,
        f"The result has shape {numbers.shape}, expected {want.shape}.",
    )
    expect(bool(np.allclose(numbers, want, rtol=0, atol=tolerance)), message)


def same(got, other) -> bool:
    """Whether an answer equals a foreseen mistake, in shape and in numbers."""
    try:
        got, other = as_numbers(got), as_numbers(other)
    except (RuntimeError, TypeError, ValueError):
        return False
    return got.shape == other.shape and np.allclose(got, other, atol=1e-6, equal_nan=True)


def expect_none_of(got, *mistakes: tuple[object, str]) -> None:
    """Raise `Wrong(message)` for the first pair (mistake, message) that the answer equals."""
    for mistake, message in mistakes:
        expect(not same(got, mistake), message)


def draw(*shape: int, seed: int = 0) -> "torch.Tensor":
    """Standard normal numbers, the same for the same seed."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_numbers(value) -> np.ndarray:
    """A float64 array of a number, a list, an array or a tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu()
    return np.asarray(value, dtype=np.float64)


def describe(value) -> str:
    """A value in a few words: its type, and itself when that is short."""
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {code(text)}" if len(text) <= 40 and "\n" not in text else f"a {kind}"


# -- judging an answer -----------------------------------------------------------------------


class Watched:
    """An answer together with what its calls returned and raised."""

    def __init__(self, answer: Callable):
        self.answer = answer
        self.results: list = []
        self.error: Exception | None = None
        self.trace: types.TracebackType | None = None  # from the answer's own frame on

    def function(self) -> Callable:
        """The answer for a check to call: functions are watched, other callables stay as is."""
        if not inspect.isfunction(self.answer):
            return self.answer

        @functools.wraps(self.answer)
        def call(*args, **kwargs):
            try:
                result = self.answer(*args, **kwargs)
            except Exception as error:
                self.error, self.trace = error, error.__traceback__.tb_next
                raise
            self.results.append(result)
            return result

        return call

    def returned(self, *marks) -> bool:
        """Whether any call returned one of these very objects."""
        return any(result is mark for result in self.results for mark in marks)


def evaluate(exercise: Exercise, answer: Callable) -> Verdict:
    """The verdict on an answer, with no display and no record."""
    if not callable(answer):
        return Verdict(
            WRONG,
            f"`check` needs your function itself, and was given {describe(answer)}: "
            "write its name without brackets after it.",
        )
    if is_untouched(exercise, answer):
        return Verdict(NOT_ATTEMPTED)
    watched = Watched(answer)
    try:
        exercise.check(watched.function())
    except Exception as error:
        return verdict_on_failure(error, watched)
    return Verdict(RIGHT)


def verdict_on_failure(error: Exception, watched: Watched) -> Verdict:
    """What a check's failure means: not attempted, no return, an error in the answer, or wrong."""
    unfinished = isinstance(error, NotImplementedError) and not str(error)  # torch's have a text
    if unfinished or watched.returned(..., NotImplemented):
        return Verdict(NOT_ATTEMPTED)
    if watched.returned(None):
        return Verdict(WRONG, "Your function returns nothing (`None`): is a `return` missing?")
    if isinstance(error, Wrong):
        return Verdict(WRONG, str(error))
    text = code(f"{type(error).__name__}: {error}")
    if error is not watched.error and watched.results:
        last = describe(watched.results[-1])
        return Verdict(WRONG, f"Your function returned {last}, which is no answer here ({text}).")
    return Verdict(WRONG, f"Your function raised {text}{where(watched)}.")


def is_untouched(exercise: Exercise, answer: Callable) -> bool:
    """Whether an answer compiles to the same instructions as the stub, docstring aside."""
    return inspect.isfunction(answer) and fingerprint(answer) == fingerprint(
        exercise.stub_function()
    )


def fingerprint(function: types.FunctionType) -> tuple:
    """A function's names and instructions, without its docstring and its line numbers."""
    body = inspect.unwrap(function).__code__
    constants = body.co_consts[1:] if function.__doc__ else body.co_consts
    plain = [each.co_code if isinstance(each, types.CodeType) else repr(each) for each in constants]
    return body.co_code, body.co_names, body.co_varnames, tuple(plain)


def where(watched: Watched) -> str:
    """ ", in line 3: `text`" for the deepest line of the answer's own file, or ""."""
    line, number, step = "", None, watched.trace
    own = inspect.unwrap(watched.answer)
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if file == own.__code__.co_filename:
            line, number = linecache.getline(file, step.tb_lineno).strip(), step.tb_lineno
        step = step.tb_next
    return f", in line {number}: {code(line)}" if line else ""


# -- finding exercises -----------------------------------------------------------------------


def lesson_numbers() -> list[int]:
    """The number of every room `lesson_NN` there is, in order."""
    package = importlib.import_module("mi_helpers.lessons")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [int(found[1]) for name in names if (found := re.fullmatch(r"lesson_(\d\d)", name))]


def lessons() -> dict[int, list[Exercise]]:
    """Lesson number -> its exercises, of every lesson."""
    return {number: exercises_of(number) for number in lesson_numbers()}


def exercises_of(lesson: int) -> list[Exercise]:
    """The exercises of one lesson; ModuleNotFoundError where there is none."""
    room = importlib.import_module(f"mi_helpers.lessons.lesson_{lesson:02d}.exercises")
    found = [getattr(each, "exercise", None) for each in vars(room).values()]
    return [each for each in found if isinstance(each, Exercise)]


def find(exercise_id: str) -> Exercise:
    """The exercise with this id; LookupError with one sentence, and the nearest ids, if none."""
    if not isinstance(exercise_id, str):
        raise LookupError(f'Write the number of the exercise in quotes: "{exercise_id}".')
    known = re.fullmatch(r"(\d+)\.\d+", exercise_id)
    if known and int(known[1]) in lesson_numbers():
        for exercise in exercises_of(int(known[1])):
            if exercise.id == exercise_id:
                return exercise
    ids = [exercise.id for exercises in lessons().values() for exercise in exercises]
    near = difflib.get_close_matches(exercise_id, ids, n=3, cutoff=0) or ids[:3]
    raise LookupError(f"There is no exercise {code(exercise_id)}; the nearest: {', '.join(near)}.")


# -- what a notebook calls -------------------------------------------------------------------


class Note:
    """Markdown in a notebook, the same text elsewhere."""

    def __init__(self, text: str):
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        bold_or_code = re.compile(r"(`+).*?\1|\*\*", re.DOTALL)
        return bold_or_code.sub(lambda found: found[0] if found[1] else "", self.text)


def display(text: str) -> None:
    """Show Markdown where there is a notebook, the text elsewhere."""
    from IPython.display import display as show

    show(Note(text))


def code(text: str) -> str:
    """Markdown code of one line, whatever backticks the text holds."""
    text = re.sub(r"\s*[\n\r]\s*", " ", text.strip())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def with_exercise(show: Callable) -> Callable:
    """Let `show(exercise, ...)` be called with an id; an unknown id is answered in one sentence."""

    @functools.wraps(show)
    def by_id(exercise_id: str, *args) -> None:
        try:
            exercise = find(exercise_id)
        except LookupError as error:
            display(f"⚠️ {error.args[0]}")
            return
        display(show(exercise, *args))

    return by_id


@with_exercise
def check(exercise: Exercise, answer: Callable) -> str:
    """`check("5.2", my_function)`: say whether it is right, and what is wrong if it is not."""
    verdict = evaluate(exercise, answer)
    head = f"{ICONS[verdict.status]} **{exercise.id} {exercise.title}: {verdict.status}.**"
    note = record.add(exercise.id) if verdict.status == RIGHT else ""
    return " ".join(part for part in (head, verdict.message, note) if part)


_hints_shown: dict[str, int] = {}


@with_exercise
def hint(exercise: Exercise) -> str:
    """`hint("5.2")`: the next hint; after the last one it starts again."""
    count = len(exercise.hints)
    number = _hints_shown.get(exercise.id, 0) % count
    _hints_shown[exercise.id] = number + 1
    return f"💡 **{exercise.id}, hint {number + 1} of {count}.** {exercise.hints[number]}"


@with_exercise
def solution(exercise: Exercise) -> str:
    """`solution("5.2")`: the source of the reference answer."""
    source = textwrap.dedent(inspect.getsource(exercise.reference)).strip()
    return f"🔑 **{exercise.id} {exercise.title}, one solution:**\n\n```python\n{source}\n```"


def progress() -> None:
    """How many exercises of each lesson are passed."""
    done = record.passed()
    rows = ["| Lesson | Passed | |", "|---|---|---|"]
    for lesson, exercises in lessons().items():
        marks = [exercise.id in done for exercise in exercises]
        drawing = "".join("■" if mark else "□" for mark in marks)
        rows.append(f"| {lesson:02d} | {sum(marks)} of {len(marks)} | {drawing} |")
    display("\n".join(rows))
