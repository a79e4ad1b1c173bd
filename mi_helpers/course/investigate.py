"""`investigate`: an answer measured on the model against the truth, between chance and best.

A lesson's `exercises.py` registers it above the function that scores an answer; the better, the
higher. Chance and the best known are answers too, and measured the same way:

    @investigation(
        "5",
        title="The smallest circuit",
        form="a set of heads, each (layer, head)",
        chance=lambda rng: rng.sample(HEADS, 6),
        best=search_greedily,
        foolish=[{(99, 0)}, "L2H1"],
    )
    def score_circuit(answer) -> float:
        heads = some_of(answer, HEADS, "heads")
        return faithfulness(shipped_model(), heads) - 0.02 * len(heads)
"""

import functools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from mi_helpers.course import exercise as cards
from mi_helpers.course import record
from mi_helpers.course.answers import Wrong, clone, code, describe, is_tensor, say_error
from mi_helpers.course.session import display


@dataclass(frozen=True, eq=False)
class Investigation:
    """One investigation.

    id          the lesson's number, "5", or "5.2" where it has several
    form        what an answer is, in words, such as "a set of heads, each (layer, head)"
    chance      from a `random.Random`, an answer drawn without looking
    best        the best answer known, found by a computation
    measure     the score of an answer, higher is better; `Wrong` says why one cannot be scored
    draws       how many answers by chance are measured
    good        an answer between the two, as a test of the scale
    foolish     answers that have to be refused, each in a sentence
    """

    id: str
    title: str
    form: str
    chance: Callable[[random.Random], object]
    best: Callable[[], object]
    measure: Callable[[object], float]
    draws: int = 10
    good: Callable[[], object] | None = None
    foolish: list = field(default_factory=list)

    def score(self, answer) -> float:
        """The score of an answer; Wrong with one sentence for what is no answer."""
        if is_nothing(answer):
            raise Wrong(f"There is nothing to measure in {describe(answer)}: give {self.form}.")
        try:
            with cards.undisturbed():
                value = float(self.measure(clone(answer)))
        except Wrong:
            raise
        except Exception as error:
            raise Wrong(
                f"{describe(answer)} cannot be measured ({say_error(error)}): give {self.form}."
            ) from error
        if not math.isfinite(value):
            raise Wrong(f"{describe(answer)} has no score: give {self.form}.")
        return value


def investigation(id: str, **fields) -> Callable[[Callable], Callable]:
    """Declare an investigation, above the function that scores an answer.

    Args:
        id: the lesson's number, "5", or "5.2" where it has several
        fields: the others of `Investigation` but `measure`
    """

    def declare(measure: Callable[[object], float]) -> Callable[[object], float]:
        measure.investigation = Investigation(id, measure=measure, **fields)
        return measure

    return declare


# -- what is an answer -----------------------------------------------------------------------


def is_nothing(answer) -> bool:
    """Whether an answer is none: None, `...`, an empty collection or text, NaN, a function."""
    if answer is None or answer is ... or callable(answer):
        return True
    if isinstance(answer, (str, list, tuple, set, dict)):
        return not answer
    return isinstance(answer, float) and math.isnan(answer)


def one_of(answer, options: Iterable, what: str = "options"):
    """An answer that has to be one of some options; `Wrong` where it is not."""
    options, found = list(options), plain(answer)
    if found not in options:
        raise Wrong(f"{describe(answer)} is none of the {what}: {listed(options)}.")
    return found


def some_of(answer, options: Iterable, what: str = "options") -> list:
    """The members of a collection, each once and in the order of the options.

    A single option counts as a collection of itself. `Wrong` where one is none of the options.
    """
    options, found = list(options), plain(answer)
    if found in options:
        return [found]
    if isinstance(found, (str, bytes, dict)) or not hasattr(found, "__iter__"):
        raise Wrong(f"Give a list or a set of {what}, not {describe(answer)}: {listed(options)}.")
    members = [plain(each) for each in found]
    for each in members:
        if each not in options:
            raise Wrong(f"{describe(each)} is none of the {what}: {listed(options)}.")
    if not members:
        raise Wrong(f"Give at least one of the {what}: {listed(options)}.")
    return [each for each in options if each in members]


def number_in(answer, low: float, high: float, what: str = "number") -> float:
    """An answer that has to be a number from `low` to `high`; `Wrong` where it is not."""
    found = plain(answer)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise Wrong(f"Give a {what} from {low:g} to {high:g}, not {describe(answer)}.")
    if not low <= found <= high:
        raise Wrong(f"{describe(answer)} is out of range: the {what} is from {low:g} to {high:g}.")
    return found


def plain(value):
    """A value in Python's own numbers; lists inside it as tuples, so that they compare."""
    value = (
        value.tolist() if is_tensor(value) or isinstance(value, (np.ndarray, np.generic)) else value
    )
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def listed(options: list) -> str:
    """Options in a few words: all of them, or the first and the last."""
    texts = [code(str(each)) for each in options]
    return ", ".join(texts) if len(texts) <= 8 else f"{texts[0]}, {texts[1]} … {texts[-1]}"


# -- what a notebook calls -------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def scale(found: Investigation) -> tuple[float, float]:
    """(chance, best known): measured once in a session."""
    rng = random.Random(0)
    scores = [found.score(found.chance(rng)) for _ in range(found.draws)]
    return sum(scores) / len(scores), found.score(found.best())


def investigate(id: str, answer=...) -> float | None:
    """Measure an answer, and say its score between chance and the best known.

    Returns the score, or None where there is nothing to score. `investigate("5", ...)` says what an
    answer looks like.
    """
    try:
        found = cards.look_up(id, "investigation")
    except LookupError as error:
        display(f"⚠️ {error.args[0]}")
        return None
    head = f"🔎 **Investigation {found.id}, {found.title}:**"
    if answer is ... or answer is None:
        display(f"{head} not attempted yet. Your answer is {found.form}.")
        return None
    try:
        score = found.score(answer)
    except Wrong as wrong:
        display(f"{head} not scored. {wrong}")
        return None
    chance, best = scale(found)
    problem = record.save({"investigations": {found.id: score}})
    display(" ".join(part for part in (head, said_of(score, chance, best), problem) if part))
    return score


def said_of(score: float, chance: float, best: float) -> str:
    """A score between chance and the best known, in a sentence or two."""
    line = f"**{score:.3g}**, where chance is {chance:.3g} and the best known {best:.3g}."
    if score > best:
        return f"{line} That is better than anything known so far."
    if score >= best - 1e-9 * max(1.0, abs(best)):
        return f"{line} That is as good as the best known."
    if score <= chance:
        return f"{line} That is no better than chance."
    return f"{line} That is {(score - chance) / (best - chance):.0%} of the way."
