"""What TinyWorld knows of every token, and which of it a unit goes by: the truth behind a name.

    world = Truths(facts_of(held, tokenizer, texts), late)   # late: where truths are judged
    truths = world.of(strong)                                # what tells where a unit fires
    agreement(says, truths, late)                            # whether a name says the same

A description is some values of one kind of fact, "here: the, each" or "role: entity currency", or
of two, "about: chess & here: the". It is found on the texts that are seen, and it is true of a unit
as far as it tells the strong firings in those held out. No name and no score goes into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mi_helpers.saes.activations import Activations
from mi_helpers.saes.explainers import best_values
from mi_helpers.saes.labels import KNOWN, token_labels
from mi_helpers.saes.rules import Facts, f1
from mi_helpers.saes.sources import TinyWorldText
from mi_helpers.tinyworld.source import Document, Span
from mi_helpers.tinyworld.tokenizer import offsets, token_posterior

AGREES = 0.5  # F1 from which a description tells a unit, and a name says the same as a description
FIRST = 3  # kinds that a description of two may begin with
COST = 0.02  # of F1: what the second half of a description has to add
HIDDEN = ("about", "role", "coming")  # kinds that no explainer sees
# What a token can be part of, the most special first: a name is an entity, and may be an answer.
ROLES = ("verdict", "truth", "ioi", "pronoun", "agreement", "depth", "month", "day", "numeral")
ROLES += ("year", "variable", "repeat", "evaluation", "number", "entity", "register")
ALIKE = {"pronoun", "month", "day", "numeral", "year", "variable", "repeat"}  # whatever the value


# ------------------------------------------------------------------------ what is at each token


def role(spans: Sequence[Span], start: int, end: int) -> str:
    """What the characters start … end-1 of a document are part of, such as "entity city"."""
    here = [s for s in spans if s.kind in ROLES and s.start < end and start < s.end]
    if not here:
        return "nothing"
    span = min(here, key=lambda s: ROLES.index(s.kind))
    return span.kind if span.kind in ALIKE else f"{span.kind} {span.value}"


def about(tokenizer, source: TinyWorldText, document: Document, n: int) -> list[str]:
    """What the text is about at each of n tokens: the topic of prose, where a reader who knows the
    generator is 90 % sure of it, and otherwise the family."""
    if document.family != "prose":
        return [document.family] * n
    sure = token_posterior(tokenizer, source.world, document)[1:]  # without <bos>
    topics = source.world.topics
    return [topics[int(p.argmax())] if p.max() >= KNOWN else "prose" for p in sure]


def hidden(tokenizer, source: TinyWorldText, document: Document) -> list[tuple[str, str, str]]:
    """(about, role, coming) at each token: what the text is about, what the token is part of, and
    what the next one is, which a reader has to expect."""
    _, ranges = offsets(tokenizer, document.text)
    roles = [role(document.spans, int(start), int(end)) for start, end in ranges]
    subjects = about(tokenizer, source, document, len(roles))
    return list(zip(subjects, roles, [*roles[1:], "the end"], strict=True))


def facts_of(held: Activations, tokenizer, facts: Facts) -> dict[str, tuple[list, np.ndarray]]:
    """{kind: (its values, the number of each token's value)}, for the rows of a harvest.

    here, after   the token, and the one before it: these an explainer sees
    about, role, coming   see `hidden`
    """
    words, at = list(facts.words), facts.word
    before = facts.shifted(at + 1, 1, 0)  # 0: there is none
    found = {"here": (words, at), "after": (["", *words], before)}
    labels = token_labels(held, tokenizer, hidden)
    for kind, column in zip(HIDDEN, zip(*labels.names, strict=True), strict=True):
        values, number = np.unique(column, return_inverse=True)
        found[kind] = values.tolist(), number[labels.index]
    return found


# --------------------------------------------------------------------------- what a unit goes by

Parts = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, eq=False)
class Truth:
    """A description of a unit in TinyWorld's words.

    Args:
        parts: ((kind, values), …), all of which have to be so.
        where: (tokens,), where they are.
        f1: how well it tells the unit's strong firings in the late texts.
    """

    parts: Parts
    where: np.ndarray = field(repr=False)
    f1: float

    @property
    def known(self) -> bool:
        """Whether it tells the unit well enough to be called its truth."""
        return self.f1 >= AGREES

    @property
    def hidden(self) -> bool:
        """Whether it speaks of what an explainer does not see: the topic, a role, what comes."""
        return any(kind in HIDDEN for kind, _ in self.parts)

    def __str__(self) -> str:
        return " & ".join(f"{kind}: {', '.join(values)}" for kind, values in self.parts)


@dataclass(frozen=True, eq=False)
class Truths:
    """The search for what units go by.

    Args:
        index: {kind: (values, numbers)}, see `facts_of`.
        late: (tokens,), whether each token is in a text that is held out.
    """

    index: Mapping[str, tuple[list, np.ndarray]]
    late: np.ndarray

    def of(self, strong: np.ndarray) -> list[Truth]:
        """The best description of each kind and of two kinds, the best in the early texts first.

        Args:
            strong: (tokens,), where the unit fires strongly.
        """
        found = [(*self.best(kind, strong, ~self.late), kind) for kind in self.index]
        single = [(score, ((kind, values),)) for values, score, kind in found if values]
        single.sort(key=lambda each: -each[0])
        double = []
        for _, (first,) in single[:FIRST]:
            inside = ~self.late & self.where((first,))
            for kind in self.index:
                values, score = self.best(kind, strong, inside)
                if values and kind != first[0]:
                    double.append((score - COST, (first, (kind, values))))
        ranked = sorted([*single, *double], key=lambda each: -each[0])
        return [self.judged(parts, strong) for _, parts in ranked]

    def best(self, kind: str, strong: np.ndarray, rows: np.ndarray) -> tuple[tuple, float]:
        """The values of a kind that together tell the early firings best, and their F1."""
        values, index = self.index[kind]
        hits = np.bincount(index[rows & strong], minlength=len(values))
        said = np.bincount(index[rows], minlength=len(values))
        chosen, score = best_values(hits, said, int((strong & ~self.late).sum()))
        return tuple(values[i] for i in chosen), score

    def where(self, parts: Parts) -> np.ndarray:
        """Where a description is so, (tokens,).

        Raises:
            KeyError: no fact is of this kind.
        """
        masks = []
        for kind, wanted in parts:
            values, index = self.index[kind]
            masks.append(np.isin(values, list(wanted))[index])
        return np.logical_and.reduce(masks)

    def judged(self, parts: Parts, strong: np.ndarray) -> Truth:
        """A description with its F1 in the late texts."""
        where = self.where(parts)
        return Truth(parts, where, f1(where[self.late], strong[self.late]))


def agreement(says: np.ndarray, truths: Sequence[Truth], late: np.ndarray) -> float:
    """How well a name says what TinyWorld says of the unit: the highest F1 of the two in the late
    texts, over its truths that are known; 0 where none is."""
    return max((f1(says[late], each.where[late]) for each in truths if each.known), default=0.0)
