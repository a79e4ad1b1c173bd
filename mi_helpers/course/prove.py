"""The proof of every exercise: the reference passes, the stub is neutral, wrong answers fail."""

import inspect
import re
import time

from mi_helpers.course.check import (
    NOT_ATTEMPTED,
    RIGHT,
    WRONG,
    Exercise,
    evaluate,
    lessons,
)

SLOWEST = 10.0  # seconds that one check may take, even on a busy machine


def problems(exercise: Exercise, lesson: int) -> list[str]:
    """What is wrong with one exercise, a sentence each; empty when it is proved."""
    try:
        found = form(exercise, lesson) + stub(exercise) + reference(exercise) + wrong(exercise)
    except Exception as error:
        found = [f"its proof stopped with {type(error).__name__}: {error}"]
    return [f"{exercise.id}: {problem}" for problem in found]


def form(exercise: Exercise, lesson: int) -> list[str]:
    """Problems of the id, the marks and the hints."""
    found = []
    if not re.fullmatch(rf"{lesson}\.[1-9]\d*", exercise.id):
        found.append(f"the id should be {lesson}.NUMBER.")
    if not (1 <= exercise.difficulty <= 5 and 1 <= exercise.importance <= 5):
        found.append("difficulty and importance go from 1 to 5.")
    if exercise.minutes <= 0 or not exercise.title:
        found.append("it needs a title and a number of minutes.")
    if not exercise.hints:
        found.append("it has no hint.")
    return found


def stub(exercise: Exercise) -> list[str]:
    """Problems of the stub: it reads as not attempted and has the reference's parameters."""
    function = exercise.stub_function()
    found = []
    if (status := evaluate(exercise, function).status) != NOT_ATTEMPTED:
        found.append(f"the untouched stub reads as '{status}'.")
    ours, theirs = (list(inspect.signature(f).parameters) for f in (function, exercise.reference))
    if ours != theirs:
        found.append(f"the stub takes {ours}, the reference takes {theirs}.")
    return found


def reference(exercise: Exercise) -> list[str]:
    """Problems of the reference: it is right, and its check is fast."""
    start = time.perf_counter()
    verdict = evaluate(exercise, exercise.reference)
    seconds = time.perf_counter() - start
    if verdict.status != RIGHT:
        return [f"the reference is '{verdict.status}': {verdict.message}"]
    return [f"its check takes {seconds:.0f} s."] if seconds > SLOWEST else []


def wrong(exercise: Exercise) -> list[str]:
    """Problems of the wrong answers: three or more, each with its own message."""
    found, messages = [], []
    for number, (answer, fragment) in enumerate(exercise.wrong, start=1):
        verdict = evaluate(exercise, answer)
        messages.append(verdict.message)
        if verdict.status != WRONG:
            found.append(f"wrong answer {number} reads as '{verdict.status}'.")
        elif not fragment or fragment not in verdict.message:
            found.append(f"wrong answer {number} lacks '{fragment}' in: {verdict.message}")
    if len(messages) < 3:
        found.append(f"it has {len(messages)} wrong answers, three are needed.")
    if len(set(messages)) < len(messages):
        found.append("two wrong answers get the same message.")
    return found


def main() -> int:
    """Prove every exercise: the reference passes, the stub is neutral, wrong answers fail.

    The exit code is 1 when anything fails.
    """
    print("lesson  exercises  wrong answers  seconds")
    found, total = [], 0
    for lesson, exercises in lessons().items():
        start = time.perf_counter()
        for exercise in exercises:
            found += problems(exercise, lesson)
        rejected = sum(len(exercise.wrong) for exercise in exercises)
        seconds = time.perf_counter() - start
        print(f"{lesson:02d}      {len(exercises):9}  {rejected:13}  {seconds:7.1f}")
        total += len(exercises)
    print("\n".join(found) or f"All {total} exercises are proved.")
    return 1 if found else 0
