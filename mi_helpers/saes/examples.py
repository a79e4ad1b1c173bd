"""What a unit is named from, and what its name is scored on: contexts of two halves of the text.

    texts = Texts.of([["The", " cat", " sat"], …])         # half of them are held out, at random
    examples = collect(values, texts, units=[3, 17])        # values: (tokens, units), or firings
    examples[0].seen.top[0].words                           # for the explainer
    examples[0].held.near                                   # for the scorers

A unit is a latent, a neuron or a direction. What it does below 0 counts as 0. It fires *strongly*
at a quarter or more of its highest value in the first of the halves, as in `concepts`: a neuron is
above 0 at every other token, and its weakest values say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

import numpy as np

from mi_helpers.arguments import indices, whole
from mi_helpers.errors import Refused
from mi_helpers.saes.concepts import STRONG
from mi_helpers.saes.scores import Fired

WEAK = 0.05  # of the highest value: below, a unit counts as not firing
BEFORE, AFTER = 24, 7  # tokens of a context around the one that it is for
LEAST = 5  # texts with strong firings in each half: with fewer, there is nothing to name or score
ALIKE = 5  # tokens, and tokens before, by which near-misses may look like strong firings
TRIES = 400  # places that are looked at for contexts of a kind

# ---------------------------------------------------------------------------------------- texts


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts as tokens, half of which are held out.

    Args:
        vocabulary: the distinct tokens, as text.
        ids: (tokens,), each token's number in the vocabulary, of all texts one after another.
        start: (texts + 1,); text t is ids[start[t] : start[t + 1]].
        held: (texts,), whether a text is held out for scoring.
        begin: (texts,), the number of its first token in the text that it is a part of.
    """

    vocabulary: tuple[str, ...]
    ids: np.ndarray
    start: np.ndarray
    held: np.ndarray
    begin: np.ndarray

    @classmethod
    def of(
        cls,
        words: Sequence[Sequence[str]],
        seed: int = 0,
        same: Sequence[Hashable] | None = None,
        begin: Sequence[int] | None = None,
    ) -> Texts:
        """From the tokens of each text; half of the texts, drawn at random, are held out.

        Args:
            words: of each text its tokens, as text.
            seed: of the draw.
            same: a key for each text: those with the same key are in the same half, as are those
                that are equal word for word where there is none.
            begin: the number of each text's first token in the whole that it is a part of.

        Raises:
            Refused: there is no text, or one without tokens.
        """
        rows = [tuple(row) for row in words]
        if not rows or not all(rows):
            raise Refused("There is no text, or one without tokens: give each text's tokens.")
        number: dict[str, int] = {}
        ids = [number.setdefault(word, len(number)) for row in rows for word in row]
        return cls(
            tuple(number),
            np.array(ids, dtype=np.int32),
            np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
            cls.draw(rows if same is None else same, seed),
            np.zeros(len(rows), np.int64) if begin is None else np.asarray(begin),
        )

    @staticmethod
    def draw(same: Sequence[Hashable], seed: int = 0) -> np.ndarray:
        """(texts,), whether each is held out: half of the distinct keys, drawn at random."""
        order = {key: i for i, key in enumerate(dict.fromkeys(same))}
        drawn = np.random.default_rng(seed).permutation(len(order)) < len(order) // 2
        return np.array([drawn[order[key]] for key in same])

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return len(self.ids)

    @cached_property
    def text(self) -> np.ndarray:
        """The number of each token's text, (tokens,)."""
        return np.repeat(np.arange(len(self.held)), np.diff(self.start))

    @cached_property
    def position(self) -> np.ndarray:
        """The number of each token in its text, (tokens,)."""
        return np.arange(self.n) - self.start[self.text] + self.begin[self.text]

    @cached_property
    def half(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) whether each token is for the explainer, and whether it is held out."""
        held = self.held[self.text]
        return ~held, held

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(order, start): token v of the vocabulary is at order[start[v] : start[v + 1]]."""
        order = np.argsort(self.ids, kind="stable")
        return order, np.searchsorted(self.ids[order], np.arange(len(self.vocabulary) + 1))

    def where(self, token: int) -> np.ndarray:
        """The places of a token of the vocabulary, in order."""
        order, start = self.places
        return order[start[token] : start[token + 1]]


# ------------------------------------------------------------------------------------- contexts


@dataclass(frozen=True)
class Context:
    """Some tokens in a row, and what a unit does at them.

    Args:
        words: the tokens, as text.
        values: of the unit at each of them, 0 or more; () where they are not to be seen.
        at: the number among these tokens of the one that the context is for.
        begin: the number of its first token in its text.
    """

    words: tuple[str, ...]
    values: tuple[float, ...]
    at: int = 0
    begin: int = 0

    def with_values(self, values: Sequence[float] = ()) -> Context:
        """The same tokens with other values, or with none."""
        return Context(self.words, tuple(values), self.at, self.begin)

    def marked(self, level: float) -> str:
        """The text with the tokens of `level` or more in [[double brackets]], blanks outside."""
        return "".join(
            f"{word[: len(word) - len(word.lstrip())]}[[{word.lstrip()}]]" if on else word
            for word, on in zip(self.words, (v >= level > 0 for v in self.values), strict=True)
        )

    def __str__(self) -> str:
        return "".join(self.words)


@dataclass(frozen=True)
class Kinds:
    """Contexts of one half, at most one of each text in each kind.

    Args:
        top: where the unit is highest, the highest first.
        spread: at evenly spaced ranks of its strong firings, from high to low.
        random: anywhere, whatever the unit does there.
        near: near-misses: the token, or the one before, is one at which the unit often fires
            strongly, and it does not fire; nor strongly anywhere in the context.
    """

    top: tuple[Context, ...]
    spread: tuple[Context, ...]
    random: tuple[Context, ...]
    near: tuple[Context, ...]


@dataclass(frozen=True, eq=False)
class Examples:
    """What a unit is named from (`seen`), and what the name is scored on (`held`).

    Args:
        unit: its number.
        highest: its highest value in the half that is seen.
        seen, held: contexts of the two halves.
        texts: the whole text; token, value: (firings,), where the unit is above 0 in it.
        strong: (in the half that is seen, held out): how many texts have a strong firing.
    """

    unit: int
    highest: float
    seen: Kinds
    held: Kinds
    strong: tuple[int, int]
    texts: Texts = field(repr=False)
    token: np.ndarray = field(repr=False)
    value: np.ndarray = field(repr=False)

    @property
    def level(self) -> float:
        """From this value on, a firing is strong."""
        return STRONG * self.highest

    @property
    def enough(self) -> bool:
        """Whether the unit fires in enough texts of both halves to be named and scored."""
        return min(self.strong) >= LEAST

    def seen_firings(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of the unit's firings in the half that is seen."""
        mine = self.texts.half[0][self.token]
        return self.token[mine], self.value[mine]


def collect(
    values, texts: Texts, units: Sequence[int] | None = None, n: int = 10, seed: int = 0
) -> list[Examples]:
    """Contexts of units, for an explainer and for the scorers.

    Args:
        values: (tokens, units) of any sign, an array or a tensor on the CPU; or `Firings`, or
            `Fired`. Tokens in the order of `texts`.
        texts: what the units were read on.
        units: their numbers; None means all.
        n: contexts of each kind in each half, at most.
        seed: of the draws. What is drawn for a unit does not depend on which others are asked for.

    Raises:
        Refused: the values are of another number of tokens than the texts have.
        ModelError: there is no such unit.
    """
    return list(collecting(values, texts, units, n, seed))


def collecting(
    values, texts: Texts, units: Sequence[int] | None = None, n: int = 10, seed: int = 0
) -> Iterator[Examples]:
    """The same as `collect`, one unit after another."""
    fired = values if isinstance(values, Fired) else Fired.of(values)
    n = whole("n", n, 1)
    if fired.n != texts.n:
        raise Refused(
            f"The values are of {fired.n:,} tokens, and the texts have {texts.n:,}: give "
            "the values at each token of the texts, in their order."
        )
    for unit in indices(units, fired.n_units, "unit"):
        token, value = fired.at(unit)
        yield examples_of(unit, texts, token, value, n, seed)


def examples_of(
    unit: int, texts: Texts, token: np.ndarray, value: np.ndarray, n: int = 10, seed: int = 0
) -> Examples:
    """The examples of one unit from where it fires: token, value (firings,), in order."""
    rng = np.random.default_rng([seed, unit])
    seen = texts.half[0][token]
    highest = float(value[seen].max(initial=0.0))
    one, two = (_Draw(texts, half, token, value, highest, rng, n) for half in texts.half)
    seen, held = one.kinds(), two.kinds()
    strong = len(np.unique(texts.text[one.strong])), len(np.unique(texts.text[two.strong]))
    return Examples(unit, highest, seen, held, strong, texts, token, value)


@dataclass(frozen=True, eq=False)
class _Draw:
    """The contexts of one unit in one half of the text."""

    texts: Texts
    half: np.ndarray
    token: np.ndarray
    value: np.ndarray
    highest: float
    rng: np.random.Generator
    n: int

    @cached_property
    def strong(self) -> np.ndarray:
        """The places of the strong firings in this half, from high to low."""
        on = self.half[self.token] & (self.value >= STRONG * max(self.highest, 1e-30))
        return self.token[on][np.argsort(-self.value[on], kind="stable")]

    def kinds(self) -> Kinds:
        """The contexts of every kind."""
        once = self.one_a_text(self.strong)
        ranks = np.linspace(0, len(once) - 1, min(self.n, len(once))).round().astype(int)
        drawn = self.rng.choice(np.flatnonzero(self.half), TRIES) if self.half.any() else []
        chosen = once[: self.n], once[ranks], self.one_a_text(drawn), self.near_misses()
        return Kinds(*(tuple(map(self.context, places[: self.n])) for places in chosen))

    def one_a_text(self, places) -> np.ndarray:
        """The first of each text among some places, in their order."""
        places = np.asarray(places, dtype=np.int64)
        return places[np.sort(np.unique(self.texts.text[places], return_index=True)[1])]

    def near_misses(self) -> np.ndarray:
        """Places that look like strong firings and are none, in turns of each way to look so."""
        alike, tries = [], []
        for back in (0, 1):  # the token is the same, or the one before it
            there = self.strong - back
            there = there[(there >= 0) & (self.texts.text[there] == self.texts.text[self.strong])]
            counts = Counter(self.texts.ids[there].tolist()).most_common(ALIKE)
            alike += [(n, token, back) for token, n in counts if 2 * n >= counts[0][1]]
        for _, token, back in sorted(alike, reverse=True):
            places = self.texts.where(token) + back
            places = places[places < self.texts.n]
            places = places[self.texts.text[places] == self.texts.text[places - back]]
            places = self.rng.permutation(places[self.half[places]])[:TRIES]
            tries.append(places[self.are_silent(places)].tolist())
        turns = [p for each in zip_longest(*tries) for p in each if p is not None]
        return self.one_a_text(turns)

    def are_silent(self, places: np.ndarray) -> np.ndarray:
        """Whether the unit does not fire at each place, nor strongly anywhere around."""
        strong, (begin, end) = np.sort(self.strong), self.around(places)
        calm = np.searchsorted(strong, begin) == np.searchsorted(strong, end)
        loud = self.token[self.value >= WEAK * self.highest]
        return calm & ~np.isin(places, loud)

    def around(self, places) -> tuple[np.ndarray, np.ndarray]:
        """Where the contexts of places begin and end, within their texts."""
        text, width = self.texts.text[places], BEFORE + AFTER + 1
        first, last = self.texts.start[text], self.texts.start[text + 1]
        begin = np.maximum(first, np.minimum(places - BEFORE, last - width))
        return begin, np.minimum(last, begin + width)

    def context(self, place: int) -> Context:
        """The context of a place."""
        begin, end = map(int, self.around(place))
        low, high = np.searchsorted(self.token, [begin, end])
        values = np.zeros(end - begin)
        values[self.token[low:high] - begin] = self.value[low:high]
        words = tuple(self.texts.vocabulary[i] for i in self.texts.ids[begin:end])
        at, first = int(place) - begin, int(self.texts.position[begin])
        return Context(words, tuple(values.tolist()), at, first)
