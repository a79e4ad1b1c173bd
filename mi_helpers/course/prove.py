"""The proof of every exercise: the reference passes, the stub is neutral, wrong answers fail.

Right answers written otherwise pass, and mutants of the reference die: 95 % of a lesson's, in a
lesson of the new form, and each that lives is listed with the reason why it is right.
"""

import inspect
import re
import time
from dataclasses import dataclass, replace

from mi_helpers.course.answers import Wrong, unnamed
from mi_helpers.course.exercise import (
    NOT_ATTEMPTED,
    RIGHT,
    WRONG,
    Exercise,
    declared,
    evaluate,
    lesson_numbers,
)
from mi_helpers.course.investigate import Investigation, scale
from mi_helpers.course.mutants import mutants
from mi_helpers.course.notebooks import find, form_of

SLOWEST = 10.0  # seconds that one check may take, even on a busy machine
KILLED = 0.95  # of a lesson's mutants
SEED = 0  # of the inputs that checks draw here
PATIENCE = 2.0  # seconds for a mutant beyond what the reference takes: some loop
SEEDS = (1, 2, 3)  # the reference, and right answers, pass with any


def problems(exercise: Exercise, lesson: int) -> list[str]:
    """What is wrong with one exercise, a sentence each; empty when it is proved."""
    try:
        found = about(exercise, lesson) + stub(exercise) + reference(exercise) + wrong(exercise)
        found += right(exercise)
    except Exception as error:
        found = [f"its proof stopped with {type(error).__name__}: {error}"]
    return [f"{exercise.id}: {problem}" for problem in found]


def about(exercise: Exercise, lesson: int) -> list[str]:
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
    if (status := evaluate(exercise, function, SEED).status) != NOT_ATTEMPTED:
        found.append(f"the untouched stub reads as '{status}'.")
    ours, theirs = (list(inspect.signature(f).parameters) for f in (function, exercise.reference))
    if ours != theirs:
        found.append(f"the stub takes {ours}, the reference takes {theirs}.")
    return found


def reference(exercise: Exercise) -> list[str]:
    """Problems of the reference: it is right, and its check is fast."""
    start = time.perf_counter()
    verdict = evaluate(exercise, exercise.reference, SEED)
    seconds = time.perf_counter() - start
    if verdict.status != RIGHT:
        return [f"the reference is '{verdict.status}': {verdict.message}"]
    return [f"its check takes {seconds:.0f} s."] if seconds > SLOWEST else []


def right(exercise: Exercise) -> list[str]:
    """Problems of right answers: the declared ones pass, and all pass whatever is drawn."""
    found = []
    for number, answer in enumerate(exercise.right, start=1):
        verdict = evaluate(exercise, answer, SEED)
        if verdict.status != RIGHT:
            found.append(f"right answer {number} is '{verdict.status}': {verdict.message}")
    if not draws_anew(exercise):
        return found
    for answer in (exercise.reference, *exercise.right):
        for seed in SEEDS:
            verdict = evaluate(exercise, answer, seed)
            if verdict.status != RIGHT:
                found.append(f"inputs {seed}: {answer.__name__} is wrong: {verdict.message}")
    return found


def draws_anew(exercise: Exercise) -> bool:
    """Whether a check draws its inputs, by `agree`, `on_model` or `draws`."""
    return bool({"agree", "on_model", "draws"} & set(exercise.check.__code__.co_names))


def wrong(exercise: Exercise) -> list[str]:
    """Problems of the wrong answers: three or more, each with its own message."""
    found, messages = [], []
    for number, (answer, fragment) in enumerate(exercise.wrong, start=1):
        verdict = evaluate(exercise, answer, SEED)
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


# -- mutants ---------------------------------------------------------------------------------


@dataclass
class Survey:
    """The mutants of an exercise's reference.

    killed      how many the check tells from the reference
    excused     {change: the exercise's reason why it is right} of those that live
    survivors   the changes of the others that live
    stale       declared survivors that are none
    """

    killed: int
    excused: dict[str, str]
    survivors: list[str]
    stale: list[str]

    @property
    def counted(self) -> int:
        """How many should die."""
        return self.killed + len(self.survivors)


def survey(exercise: Exercise) -> Survey:
    """Which mutants of the reference the check tells from it."""
    start = time.perf_counter()
    evaluate(exercise, exercise.reference, SEED)
    hurried = replace(exercise, seconds=PATIENCE + 3 * (time.perf_counter() - start))
    made = mutants(exercise.reference)
    with unnamed():
        lived = [m.change for m in made if evaluate(hurried, m.function, SEED).status == RIGHT]
    excuses = exercise.survivors
    return Survey(
        killed=len(made) - len(lived),
        excused={change: excuses[change] for change in lived if change in excuses},
        survivors=[change for change in lived if change not in excuses],
        stale=sorted(set(excuses) - set(lived)),
    )


def mutant_problems(lesson: int, surveys: dict[str, Survey]) -> list[str]:
    """What is wrong with a lesson's mutants, a sentence each."""
    found = [
        f"{id}: no mutant '{change}' survives: take it out of `survivors`."
        for id, each in surveys.items()
        for change in each.stale
    ]
    killed, counted = killed_of(surveys)
    if killed < KILLED * counted:
        found.append(
            f"Lesson {lesson:02d}: its checks kill {killed} of {counted} mutants, "
            f"{KILLED:.0%} are needed; let a check draw its inputs (`agree`), or say in "
            "`survivors` why a change is right."
        )
    return found


def killed_of(surveys: dict[str, Survey]) -> tuple[int, int]:
    """(mutants killed, mutants that should be) of a lesson."""
    each = surveys.values()
    return sum(one.killed for one in each), sum(one.counted for one in each)


# -- predictions and investigations ----------------------------------------------------------


def prediction_problems(lesson: int) -> list[str]:
    """What is wrong with a lesson's predictions: exactly one option of each has to be right."""
    found = []
    for each in declared(lesson, "prediction"):
        if len(set(each.options)) < max(2, len(each.options)):
            found.append(f"{each.id}: a prediction needs two options or more, all different.")
        count = sum(each.right(option) for option in each.options)
        if count != 1:
            found.append(f"{each.id}: {count} of its options are right, one should be.")
    return found


def investigation_problems(found: Investigation) -> list[str]:
    """What is wrong with an investigation: its scale, and what it says to foolish answers."""
    chance, best = scale(found)
    said = [] if best > chance else [f"the best known, {best:.3g}, is no better than chance."]
    if found.good is not None and not chance < found.score(found.good()) <= best:
        said.append("a good answer does not lie between chance and the best known.")
    if len(found.foolish) < 2:
        said.append("it needs two foolish answers, of the wrong type and out of range.")
    for answer in (None, [], object(), *found.foolish):
        try:
            found.score(answer)
            said.append(f"the foolish answer {answer!r} gets a score.")
        except Wrong as wrong:
            if "\n" in str(wrong) or not str(wrong).strip():
                said.append(f"the foolish answer {answer!r} does not get one sentence.")
    return [f"Investigation {found.id}: {each}" for each in said]


# -- the command -----------------------------------------------------------------------------


def main(lessons: tuple[int, ...] = (), survivors: bool = False, old: bool = False) -> int:
    """Prove every exercise: the reference passes, the stub is neutral, mistakes and mutants fail.

    The exit code is 1 when anything fails. The references of lessons in the new form are mutated.

    Args:
        lessons: their numbers; all without
        survivors: list the mutants that live
        old: mutate the references of lessons in the old form, too; nothing is demanded of them
    """
    print("lesson  exercises  wrong answers  mutants  killed  seconds")
    found, total = [], 0
    for lesson in lessons or lesson_numbers():
        start, exercises = time.perf_counter(), declared(lesson, "exercise")
        for exercise in exercises:
            found += problems(exercise, lesson)
        new = form_of(find([f"{lesson:02d}_"])[0]) >= 2
        surveys = {each.id: survey(each) for each in exercises} if new or old else {}
        if new:
            found += mutant_problems(lesson, surveys) + prediction_problems(lesson)
            for each in declared(lesson, "investigation"):
                found += investigation_problems(each)
        rejected, (killed, counted) = sum(len(e.wrong) for e in exercises), killed_of(surveys)
        share = f"{killed / counted:7.0%}" if counted else "      -"
        print(
            f"{lesson:02d}      {len(exercises):9}  {rejected:13}  {counted:7} {share}  "
            f"{time.perf_counter() - start:7.1f}",
            flush=True,
        )
        if survivors:
            print_survivors(surveys)
        total += len(exercises)
    print("\n".join(found) or f"All {total} exercises are proved.")
    return 1 if found else 0


def print_survivors(surveys: dict[str, Survey]) -> None:
    """Each exercise's count, its mutants that live, and those that may."""
    for id, each in surveys.items():
        print(f"    {id}: {each.killed} of {each.counted}", flush=True)
        for change in each.survivors:
            print(f"        {change}")
        for change, reason in each.excused.items():
            print(f"        {change} (right: {reason})")
