"""The verdict on an answer, with no display and no record."""

import functools
import inspect
import linecache
import time
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from mi_helpers.course import session
from mi_helpers.course.card import Exercise
from mi_helpers.course.expecting import Wrong, seeded
from mi_helpers.course.limits import TimeUp, within
from mi_helpers.course.values import (
    as_kind,
    clone,
    code,
    describe,
    kind_of,
    say_error,
    unchanged,
)

SLACK = 10.0  # seconds that the rest of a check may take, and what an answer leaves for later
RIGHT, WRONG, NOT_ATTEMPTED = "right", "wrong", "not attempted yet"


@dataclass(frozen=True)
class Verdict:
    """What is said about an answer: a status, in words, and a message in Markdown."""

    status: str
    message: str = ""


class Watched:
    """An answer together with what its calls returned and raised.

    Args:
        kinds: what the reference's calls returned, in order: results are handed on in that make
        seconds: that all calls together may take
        copies: whether it gets copies of its inputs
    """

    def __init__(self, answer: Callable, kinds: tuple, seconds: float, copies: bool = True):
        self.answer, self.kinds, self.copies = answer, kinds, copies
        self.left = seconds
        self.results: list = []
        self.error: BaseException | None = None
        self.trace: types.TracebackType | None = None  # from the answer's own frame on
        self.in_place = False

    def function(self) -> Callable:
        """The answer for a check to call; classes, and objects that are called, stay as is."""
        if not inspect.isroutine(self.answer):
            return self.answer

        @functools.wraps(self.answer)
        def call(*args, **kwargs):
            given = (clone(args), clone(kwargs)) if self.copies else (args, kwargs)
            result = self.timed(*given)
            self.in_place |= self.copies and not unchanged((args, kwargs), given)
            place = len(self.results)
            self.results.append(result)
            return as_kind(result, self.kinds[place]) if place < len(self.kinds) else result

        return call

    def timed(self, args: tuple, kwargs: dict):
        """One call, out of the time that is left."""
        start = time.monotonic()
        try:
            return within(self.left, self.answer, *args, **kwargs)
        except (Exception, SystemExit, TimeUp) as error:
            self.error, self.trace = error, error.__traceback__
            raise
        finally:
            self.left -= time.monotonic() - start

    def returned(self, *marks) -> bool:
        """Whether any call returned one of these very objects."""
        return any(result is mark for result in self.results for mark in marks)

    def nothing(self) -> bool:
        """Whether a `return` seems to be missing: None, where the reference never returns it."""
        none = kind_of(None)
        found = [result is None for result in self.results]
        return any(found) and (all(found) or none not in self.kinds) and set(self.kinds) != {none}

    def other_kind(self) -> bool:
        """Whether any result is of another make than the reference's."""
        pairs = zip(self.results, self.kinds, strict=False)
        return any(kind_of(result) != kind for result, kind in pairs)


@functools.lru_cache(maxsize=256)
def kinds_of(check: Callable, reference: Callable, copies: bool) -> tuple:
    """What the calls of the reference in its check return, in order."""
    watched = Watched(reference, (), float("inf"), copies)
    with suppress(Exception), session.fresh(), seeded(0):  # a broken one is shown as not right
        check(watched.function())
    return tuple(kind_of(result) for result in watched.results)


def evaluate(exercise: Exercise, answer: Callable, seed: int | None = None) -> Verdict:
    """The verdict on an answer; the check's inputs are drawn from `seed`, or anew."""
    return judge(exercise, answer, seed)[0]


def judge(exercise: Exercise, answer: Callable, seed: int | None = None) -> tuple[Verdict, Watched]:
    """The verdict on an answer, and what its calls did."""
    watched = Watched(answer, (), exercise.seconds, exercise.copies)
    if not callable(answer):
        text = (
            f"`check` needs your function itself, and was given {describe(answer)}: "
            "write its name without brackets after it."
        )
        return Verdict(WRONG, text), watched
    if is_untouched(exercise, answer):
        return Verdict(NOT_ATTEMPTED), watched
    if inspect.isroutine(answer):
        watched.kinds = kinds_of(exercise.check, exercise.reference, exercise.copies)
    with session.fresh() as changed, seeded(seed):
        try:
            within(2 * exercise.seconds + SLACK, exercise.check, watched.function())
            verdict = Verdict(RIGHT, said_of_copies(watched))
        except (Exception, SystemExit, TimeUp) as error:
            verdict = verdict_on_failure(error, watched, exercise.seconds)
    if changed:
        verdict = replace(verdict, message=f"{verdict.message} {said_of(changed)}".strip())
    return verdict, watched


def said_of_copies(watched: Watched) -> str:
    """What is said of a right answer that changes its inputs."""
    if not watched.in_place:
        return ""
    return (
        "It changes its inputs in place; here these are copies, elsewhere whoever calls it would "
        "find other numbers in them."
    )


def said_of(changed: list[str]) -> str:
    """What is said of names of libraries that the session has replaced."""
    names = ", ".join(map(code, changed[:3])) + (" and others" if changed[3:] else "")
    return (
        f"In this session {names} {'is' if len(changed) == 1 else 'are'} no longer the library's: "
        "this check used the original. Restart the kernel to have it back."
    )


def verdict_on_failure(error: BaseException, watched: Watched, seconds: float) -> Verdict:
    """What a check's failure means: not attempted, no return, an error in the answer, or wrong."""
    unfinished = isinstance(error, NotImplementedError) and not error.args  # torch's have a text
    if unfinished or watched.returned(..., NotImplemented):
        return Verdict(NOT_ATTEMPTED)
    if isinstance(error, TimeUp) or isinstance(watched.error, TimeUp):
        text = f"Your function had not finished after {seconds:g} seconds: does a loop never end?"
        return Verdict(WRONG, text)
    if watched.nothing():
        return Verdict(WRONG, "Your function returns nothing (`None`): is a `return` missing?")
    if isinstance(error, Wrong):
        return Verdict(WRONG, str(error))
    if error is not watched.error and watched.results:
        last = describe(watched.results[-1])
        return Verdict(
            WRONG, f"Your function returned {last}, which is no answer here ({say_error(error)})."
        )
    hint = session.say_unimported(error)
    return Verdict(WRONG, f"Your function raised {say_error(error)}{where(watched)}.{hint}")


def is_untouched(exercise: Exercise, answer: Callable) -> bool:
    """Whether an answer compiles to the same instructions as the stub, docstring aside."""
    return inspect.isfunction(answer) and fingerprint(answer) == fingerprint(
        exercise.stub_function()
    )


def fingerprint(function: types.FunctionType) -> tuple:
    """A function's names and instructions, without its docstring and its line numbers."""
    body = getattr(inspect.unwrap(function), "__code__", None)
    if body is None:
        return (function,)
    constants = body.co_consts[1:] if function.__doc__ else body.co_consts
    plain = [each.co_code if isinstance(each, types.CodeType) else repr(each) for each in constants]
    return body.co_code, body.co_names, body.co_varnames, tuple(plain)


def where(watched: Watched) -> str:
    """ ", in line 3: `text`" for the deepest line of the answer's own file, or ""."""
    line, number, step = "", None, watched.trace
    own = getattr(inspect.unwrap(watched.answer), "__code__", None)
    while step is not None and own is not None:
        file = step.tb_frame.f_code.co_filename
        if file == own.co_filename:
            line, number = linecache.getline(file, step.tb_lineno).strip(), step.tb_lineno
        step = step.tb_next
    return f", in line {number}: {code(line)}" if line else ""
