"""Exercises as their lessons declare them, how they are found, and the verdict on an answer.

`exercises.py` of a lesson's room has `@exercise("5.2", ...)` above each function that checks an
answer, `@prediction("5.3")` above a function that measures what was to be predicted, and
`@investigation("5", ...)` above one that scores an answer: that is how all of them are found.
"""

import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import linecache
import pkgutil
import random
import re
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mi_helpers.course.answers import (
    Wrong,
    clone,
    code,
    describe,
    like,
    say_error,
    seeded,
    unchanged,
)
from mi_helpers.course.limits import TimeUp, within

SECONDS = 10.0  # that an answer may take, all its calls in one check together
SLACK = 10.0  # seconds that the rest of a check may take
RIGHT, WRONG, NOT_ATTEMPTED, NOT_JUDGED = "right", "wrong", "not attempted yet", "not judged"


@dataclass(frozen=True, eq=False)
class Exercise:
    """One exercise.

    id          "LESSON.NUMBER", such as "5.2"
    difficulty  1 to 5, and so is importance; `minutes` is the most it should take
    stub        the text of the cell that the learner completes; it defines one function
    reference   a right answer; `solution(id)` shows its source
    hints       shown one at a time
    wrong       at least three pairs (plausible wrong answer, fragment of the message it must get)
    check       called with an answer; returns None when it is right, else raises `Wrong`
    right       other right answers, written otherwise, which the check has to accept
    survivors   {mutant of the reference that the check lets live: why it is right}
    seconds     that an answer may take in one check, and later in one call
    copies      whether an answer gets copies of its inputs: not where it is to change them
    after       what a right answer's note says comes next
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
    right: list[Callable] = field(default_factory=list)
    survivors: dict[str, str] = field(default_factory=dict)
    seconds: float = SECONDS
    copies: bool = True
    after: str = ""

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

    @property
    def name(self) -> str:
        """The name of the function that the stub defines."""
        return re.findall(r"^def (\w+)", self.stub, re.MULTILINE)[-1]


def exercise(id: str, **card) -> Callable[[Callable], Callable]:
    """Declare an exercise, above the function that checks an answer to it.

    Args:
        id: "LESSON.NUMBER".
        card: the other fields of `Exercise` but `check`. Without a `stub` it is the reference's
            first lines, docstring included.
    """

    def declare(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
        fields = card if "stub" in card else card | {"stub": stub_of(card["reference"])}
        check.exercise = Exercise(id, check=check, **fields)
        return check

    return declare


def stub_of(reference: Callable) -> str:
    """A function's text as far as its docstring goes, then `...`."""
    text = textwrap.dedent(inspect.getsource(reference))
    first = ast.parse(text).body[0].body[0]
    if not reference.__doc__:
        raise ValueError(f"{reference.__name__} has no docstring: it is what the stub says.")
    return "\n".join(text.splitlines()[: first.end_lineno]) + "\n    ...\n"


# -- finding what lessons declare ------------------------------------------------------------


def lesson_numbers() -> list[int]:
    """The number of every room `lesson_NN` there is, in order."""
    package = importlib.import_module("mi_helpers.lessons")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [int(found[1]) for name in names if (found := re.fullmatch(r"lesson_(\d\d)", name))]


def declared(lesson: int, what: str) -> list:
    """What functions of a lesson's `exercises.py` carry under a name, in order.

    A function that is kept by `functools.cache`, or is any other object that is called, counts.
    """
    room = importlib.import_module(f"mi_helpers.lessons.lesson_{lesson:02d}.exercises")
    called = [each for each in vars(room).values() if callable(each) and not inspect.isclass(each)]
    found = [getattr(each, "__dict__", {}).get(what) for each in called]
    return list({id(each): each for each in found if each is not None}.values())


def lessons() -> dict[int, list[Exercise]]:
    """Lesson number -> its exercises, of every lesson."""
    return {number: declared(number, "exercise") for number in lesson_numbers()}


def look_up(wanted: str, what: str):
    """The exercise, prediction or investigation with this id.

    Raises:
        LookupError: there is none; its one sentence names the nearest.
    """
    if not isinstance(wanted, str):
        raise LookupError(f'Write the number of the {what} in quotes: "{wanted}".')
    numbers, lesson = lesson_numbers(), re.match(r"\d+", wanted)
    for each in declared(int(lesson[0]), what) if lesson and int(lesson[0]) in numbers else []:
        if each.id == wanted:
            return each
    ids = [each.id for number in numbers for each in declared(number, what)]
    near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0)
    advice = f"the nearest: {', '.join(near)}" if near else "no lesson has one yet"
    raise LookupError(f"There is no {what} {code(wanted)}; {advice}.")


# -- the verdict, with no display and no record ----------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What is said about an answer: a status, in words, and a message in Markdown.

    make        what the reference returned first, where results have to be put into that make
    """

    status: str
    message: str = ""
    make: object = field(default=None, compare=False)


class Watched:
    """An answer together with what its calls returned and raised.

    Args:
        makes: what the reference's calls returned, in order: results are handed on in that make
    """

    def __init__(self, answer: Callable, exercise: Exercise, makes: tuple = ()):
        self.answer, self.makes, self.copies = answer, makes, exercise.copies
        self.left = exercise.seconds
        self.results: list = []
        self.error: BaseException | None = None
        self.in_place = self.remade = False

    def function(self) -> Callable:
        """The answer for a check to call; classes, and objects that are called, stay as is."""
        if not inspect.isroutine(self.answer):
            return self.answer

        @functools.wraps(self.answer)
        def call(*args, **kwargs):
            given = (clone(args), clone(kwargs)) if self.copies else (args, kwargs)
            result = self.timed(*given)
            self.in_place |= not unchanged((args, kwargs), given)
            place = len(self.results)
            self.results.append(result)
            made = like(result, self.makes[place]) if place < len(self.makes) else result
            self.remade |= made is not result
            return made

        return call

    def timed(self, args: tuple, kwargs: dict):
        """One call, out of the time that is left."""
        start = time.monotonic()
        try:
            return within(self.left, self.answer, *args, **kwargs)
        except (Exception, SystemExit, TimeUp) as error:
            self.error = error
            raise
        finally:
            self.left -= time.monotonic() - start

    def nothing(self) -> bool:
        """Whether a `return` seems to be missing: None, where the reference never returns it."""
        found = [result is None for result in self.results]
        none = [make is None for make in self.makes]
        return any(found) and (all(found) or not any(none)) and not (none and all(none))


def evaluate(exercise: Exercise, answer: Callable, seed: int | None = None) -> Verdict:
    """The verdict on an answer; the check's inputs are drawn from `seed`, or anew."""
    if not callable(answer):
        text = (
            f"`check` needs your function itself, and was given {describe(answer)}: "
            "write its name without brackets after it."
        )
        return Verdict(WRONG, text)
    if is_untouched(exercise, answer):
        return Verdict(NOT_ATTEMPTED)
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    makes, problem = references_results(exercise, seed)
    if problem:
        return Verdict(NOT_JUDGED, problem)
    watched = Watched(answer, exercise, makes if inspect.isroutine(answer) else ())
    with undisturbed(), seeded(seed):
        try:
            within(2 * exercise.seconds + SLACK, exercise.check, watched.function())
        except (Exception, SystemExit, TimeUp) as error:
            return verdict_on_failure(error, watched, exercise.seconds)
    said = (
        "It changes its inputs in place; here these are copies, elsewhere whoever calls it would "
        "find other numbers in them."
    )
    make = makes[0] if watched.remade else None
    return Verdict(RIGHT, said if watched.in_place else "", make)


@functools.lru_cache(maxsize=4)
def references_results(exercise: Exercise, seed: int) -> tuple[tuple, str]:
    """(what the reference's calls return in the check, in order, "" or why it is not right).

    Where a session has changed a library or the model, the reference notices: a learner's function
    is not blamed for it.
    """
    watched = Watched(exercise.reference, exercise)
    watched.left = float("inf")
    with undisturbed(), seeded(seed):
        try:
            exercise.check(watched.function())
        except Exception as error:
            return (), (
                f"In this session even the reference fails ({say_error(error)}), so something that "
                "it uses was changed, such as a function of torch: restart the kernel."
            )
    return tuple(watched.results), ""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Gradients on, float32, and torch's random numbers given back, for the time of a block."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)


def verdict_on_failure(error: BaseException, watched: Watched, seconds: float) -> Verdict:
    """What a check's failure means: not attempted, no return, an error in the answer, or wrong."""
    unfinished = isinstance(error, NotImplementedError) and not error.args  # torch's have a text
    if unfinished or any(each is ... or each is NotImplemented for each in watched.results):
        return Verdict(NOT_ATTEMPTED)
    if isinstance(error, TimeUp) or isinstance(watched.error, TimeUp):
        text = f"Your function had not finished after {seconds:g} seconds: does a loop never end?"
    elif watched.nothing():
        text = "Your function returns nothing (`None`): is a `return` missing?"
    elif isinstance(error, Wrong):
        text = str(error)
    elif error is not watched.error and watched.results:
        last = describe(watched.results[-1])
        text = f"Your function returned {last}, which is no answer here ({say_error(error)})."
    else:
        place, hint = where(error, watched.answer), say_unimported(error)
        text = f"Your function raised {say_error(error)}{place}.{hint}"
    return Verdict(WRONG, text)


def is_untouched(exercise: Exercise, answer: Callable) -> bool:
    """Whether an answer compiles to the same instructions as the stub, docstring aside."""
    return inspect.isfunction(answer) and fingerprint(answer) == fingerprint(
        exercise.stub_function()
    )


def fingerprint(function: types.FunctionType) -> tuple:
    """A function's names and instructions, without its docstring and its line numbers."""
    body = getattr(inspect.unwrap(function), "__code__", function.__code__)
    constants = body.co_consts[1:] if function.__doc__ else body.co_consts
    plain = [each.co_code if isinstance(each, types.CodeType) else repr(each) for each in constants]
    return body.co_code, body.co_names, body.co_varnames, tuple(plain)


def where(error: BaseException, answer: Callable) -> str:
    """ ", in line 3: `text`" for the deepest line of the answer's own file, or ""."""
    own = getattr(inspect.unwrap(answer), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    inside = max((i for i, each in enumerate(frames) if each.filename == __file__), default=-1) + 1
    theirs = [each for each in frames[inside:] if own and each.filename == own.co_filename]
    line = linecache.getline(own.co_filename, theirs[-1].lineno).strip() if theirs else ""
    return f", in line {theirs[-1].lineno}: {code(line)}" if line else ""


def say_unimported(error: BaseException) -> str:
    """A hint after a NameError in an answer: the imports were not run, or a name is misspelt."""
    name = getattr(error, "name", None) if isinstance(error, NameError) else None
    if not name or isinstance(error, UnboundLocalError):
        return ""
    return (
        f" If {code(name)} is one of the lesson's names, run the notebook's first code cell, which "
        "imports them, then the cell of your function, then this one."
    )
