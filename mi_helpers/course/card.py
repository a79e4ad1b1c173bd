"""Exercises as their lessons declare them, and how they are found.

`exercises.py` of a lesson's room has `@exercise("5.2", ...)` above each function that checks an
answer, `@prediction("5.3")` above a function that measures what was to be predicted, and
`@investigation("5", ...)` above one that scores an answer: that is how all of them are found.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from mi_helpers.course.values import code

SECONDS = 10.0  # that an answer may take, all its calls in one check together


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
        card: the other fields of `Exercise` but `check`.
    """

    def declare(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
        check.exercise = Exercise(id, check=check, **card)
        return check

    return declare


# -- finding what lessons declare ------------------------------------------------------------


def lesson_numbers() -> list[int]:
    """The number of every room `lesson_NN` there is, in order."""
    package = importlib.import_module("mi_helpers.lessons")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [int(found[1]) for name in names if (found := re.fullmatch(r"lesson_(\d\d)", name))]


def declared(lesson: int, what: str) -> list:
    """What functions of a lesson's `exercises.py` carry under a name, in order."""
    room = importlib.import_module(f"mi_helpers.lessons.lesson_{lesson:02d}.exercises")
    found = [vars(each).get(what) for each in vars(room).values() if inspect.isfunction(each)]
    return [each for each in found if each is not None]


def lessons() -> dict[int, list[Exercise]]:
    """Lesson number -> its exercises, of every lesson."""
    return {number: exercises_of(number) for number in lesson_numbers()}


def exercises_of(lesson: int) -> list[Exercise]:
    """The exercises of one lesson; ModuleNotFoundError where there is none."""
    return declared(lesson, "exercise")


def find(exercise_id: str) -> Exercise:
    """The exercise with this id; LookupError with one sentence, and the nearest ids, if none."""
    return look_up(exercise_id, exercises_of, "exercise")


def look_up(wanted: str, of_lesson: Callable[[int], list], what: str):
    """What a lesson declares under this id; LookupError with one sentence if nothing."""
    if not isinstance(wanted, str):
        raise LookupError(f'Write the number of the {what} in quotes: "{wanted}".')
    known = re.match(r"\d+", wanted)
    if known and int(known[0]) in lesson_numbers():
        for each in of_lesson(int(known[0])):
            if each.id == wanted:
                return each
    ids = [each.id for number in lesson_numbers() for each in of_lesson(number)]
    near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0) or ids[:3]
    advice = f"the nearest: {', '.join(near)}" if near else "no lesson has one yet"
    raise LookupError(f"There is no {what} {code(wanted)}; {advice}.")
