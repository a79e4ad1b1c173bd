"""Names that a learner may give: those of `saes.rules`, and what TinyWorld alone has labels for.

    "at: the, each"    "after: of"    "near: chess & at: the"      as in `rules`
    "about: chess"                    the text is about one of these topics, or of this family
    "role: entity city"               the token is part of one of these
    "coming: number singular"         the next token is

`says(name, ground)` is where a name is true; `best_name` looks for one among all kinds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mi_helpers.course.answers import Wrong, describe
from mi_helpers.errors import Refused
from mi_helpers.lessons.lesson_09.experiments import Ground, Unit
from mi_helpers.lessons.lesson_09.truth import HIDDEN, Truth
from mi_helpers.saes.rules import f1, name_of, parse

CLAUSE = r'(?:"(?:[^"\\]|\\.)*"|[^"&])+'  # what stands between two & outside quotes
KINDS = {"here": "at"}  # TinyWorld's kinds as names have them


def says(name: object, ground: Ground, among: Ground | None = None) -> np.ndarray:
    """Where a name is true, (tokens,).

    Args:
        among: on whose text a topic, a role must occur; None means `ground`.

    Raises:
        Wrong: it is no name; the sentence says what one is.
    """
    if not isinstance(name, str) or not name.strip():
        raise Wrong(f'A name is a text such as "about: chess & at: the", not {describe(name)}.')
    parts = re.findall(CLAUSE, name)
    if not parts:
        raise Wrong(f"{describe(name)} is no name.")
    return np.logical_and.reduce([clause(part, ground, among or ground) for part in parts])


def clause(part: str, ground: Ground, among: Ground) -> np.ndarray:
    """Where a part of a name is true, (tokens,)."""
    kind, _, rest = part.partition(":")
    kind = kind.strip()
    if kind in HIDDEN:
        values = tuple(value.strip() for value in rest.split(",") if value.strip())
        known = among.truths.index[kind][0]
        strange = [value for value in values if value not in known]
        if strange or not values:
            which = describe(strange[0]) if strange else "nothing"
            raise Wrong(f"`{kind}:` cannot be {which}. Choose among: {', '.join(sorted(known))}.")
        return ground.truths.where(((kind, values),))
    try:
        return np.logical_and.reduce([ground.facts.holds(*each) for each in parse(part.strip())])
    except Refused as refused:
        kinds = ", ".join(f"`{each}:`" for each in HIDDEN)
        raise Wrong(f"{refused} Besides, there are {kinds}.") from None


def as_name(truth: Truth) -> str:
    """A description of TinyWorld's as a name: `says` gives the same mask for it.

    "after: nothing", the first token of a text, is "place: 1".
    """
    parts = []
    for kind, values in truth.parts:
        if kind in HIDDEN:
            parts.append(f"{kind}: {', '.join(values)}")
        else:
            words = [value for value in values if value]
            parts.append(name_of([(KINDS.get(kind, kind), words)]) if words else "place: 1")
    return " & ".join(parts)


def best_name(ground: Ground, unit: Unit, counted: str) -> tuple[str, float]:
    """The name that tells a unit's strong firings best on the text that is seen, the counted one or
    one of TinyWorld's descriptions, and how much more F1 it has than the counted one."""
    early = ~ground.held
    fires = unit.strong[early]
    first = f1(ground.facts.says(counted)[early], fires)
    found = [(0.0, counted)]
    found += [(f1(t.where[early], fires) - first, as_name(t)) for t in unit.truths]
    gain, name = max(found, key=lambda each: each[0])
    return name, gain


def hard_to_count(ground: Ground, units: Sequence[Unit], counted: Sequence[str], n: int) -> dict:
    """{number: (its counted name, the best name)} of the n units whose best name is furthest ahead
    of the counted one, on the text that is seen; in the order of their numbers."""
    found = []
    for unit, name in zip(units, counted, strict=True):
        best, gain = best_name(ground, unit, name)
        found.append((gain, unit.number, (name, best)))
    return {number: pair for _, number, pair in sorted(sorted(found)[-n:], key=lambda x: x[1])}
