"""Names that say where a unit fires, so that they can be held against any text.

    at: the, each              at one of these tokens
    after: of                  at the token after one of these
    before: chess              at the token before one of these
    near: chess, board         where one of these is among the 12 tokens before
    begins: un   ends: ing     at tokens that begin, or end, with one of these letters
    looks: number              at a number, a sign, a blank, a Capital, CAPITALS or small letters
    place: 1, 5-8              at the first token of a text, or at the fifth to the eighth
    near: chess & at: the      where both are so

Tokens are written without the blanks around them, and in "quotes" where they are blank or hold one
of , & and ".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mi_helpers.errors import Refused
from mi_helpers.saes.examples import Texts
from mi_helpers.saes.scores import f1 as f1

WINDOW = 12  # tokens before, in which `near` looks
PIECES = (1, 2, 3)  # letters of a beginning or an ending
PLACES = (1, 2, 3, 4, 5, 9, 17, 33, 65)  # where the ranges of `place` begin, counted from 1
LOOKS = ("small", "Capital", "CAPITALS", "number", "sign", "blank")
WORDS = ("at", "after", "before", "near")  # kinds whose values are tokens
EXPECTED = 'expected such as "at: the, each", "after: of" or "near: chess & at: the"'

# ----------------------------------------------------------------------------- names as text


def bare(word: str) -> str:
    """A token as names have it: without the blanks around it, unless it is all blank."""
    return word.strip() or word


def looks_like(word: str) -> str:
    """Which of `LOOKS` a token is."""
    word = word.strip()
    if not word:
        return "blank"
    if any(c.isdigit() for c in word):
        return "number"
    if not any(c.isalpha() for c in word):
        return "sign"
    if word.isupper() and len(word) > 1:
        return "CAPITALS"
    return "Capital" if word[0].isupper() else "small"


def place_names() -> list[str]:
    """The ranges of `place`, such as "1", "5-8" and "65-"."""
    ends = [*(begin - 1 for begin in PLACES[1:]), ""]
    return [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(PLACES, ends, strict=True)]


def written(value: str) -> str:
    """A value as a name has it, in quotes where it needs them."""
    plain = value and value == value.strip() and not set(value) & set(',&"') and value.isprintable()
    return value if plain else json.dumps(value, ensure_ascii=False)


def parse(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """A name as [(kind, values)], all of which have to be so.

    Raises:
        Refused: it is no such name.
    """
    if not isinstance(name, str):
        raise Refused(f"A name is {name!r}: {EXPECTED}.")
    clauses = [_clause(part, name) for part in re.findall(r'(?:"(?:[^"\\]|\\.)*"|[^"&])+', name)]
    if not clauses or unparsed(name):
        raise Refused(f"{name!r} is no name of this kind: {EXPECTED}.")
    return clauses


def unparsed(name: str) -> bool:
    """Whether quotes or signs of a name do not match up."""
    without = re.sub(r'"(?:[^"\\]|\\.)*"', "x", name)
    return '"' in without or any(not part.strip() for part in without.split("&"))


def _clause(part: str, name: str) -> tuple[str, tuple[str, ...]]:
    kind, _, rest = part.partition(":")
    found = re.findall(r'"(?:[^"\\]|\\.)*"|[^,"]+', rest)
    try:
        values = [json.loads(v) if v.startswith('"') else v.strip() for v in found if v.strip()]
    except json.JSONDecodeError:
        values = []
    kind = kind.strip()
    if kind not in KINDS or not values:
        raise Refused(f"{name!r} is no name of this kind: {EXPECTED}.")
    known = {"looks": LOOKS, "place": place_names()}.get(kind)
    for value in values:
        if known and value not in known:
            raise Refused(f"{kind} is {value!r} in {name!r}: choose among {', '.join(known)}.")
    return kind, tuple(map(bare, values))


def name_of(clauses: Sequence[tuple[str, Sequence[str]]]) -> str:
    """[(kind, values)] as a name: `parse` gives them back."""
    return " & ".join(f"{kind}: {', '.join(map(written, values))}" for kind, values in clauses)


# ------------------------------------------------------------------------- where a name is true


@dataclass(frozen=True, eq=False)
class Facts:
    """What names may speak of, at each token of some texts."""

    texts: Texts

    @cached_property
    def words(self) -> dict[str, int]:
        """{token as names have it: its number}."""
        return {w: i for i, w in enumerate(sorted({bare(w) for w in self.texts.vocabulary}))}

    @cached_property
    def word(self) -> np.ndarray:
        """The number of each token as names have it, (tokens,)."""
        return np.array([self.words[bare(w)] for w in self.texts.vocabulary])[self.texts.ids]

    def shifted(self, of: np.ndarray, back: int, blank=False) -> np.ndarray:
        """of[i - back], (tokens,); `blank` where that is in another text."""
        text, out = self.texts.text, np.full(len(of), blank, of.dtype)
        if back > 0:
            out[back:] = np.where(text[back:] == text[:-back], of[:-back], blank)
        elif back < 0:
            out[:back] = np.where(text[:back] == text[-back:], of[-back:], blank)
        return out if back else of

    def recent(self, mask: np.ndarray) -> np.ndarray:
        """Whether any of the `WINDOW` tokens before each is in the mask, in the same text."""
        total = np.concatenate([[0], np.cumsum(mask)])
        here = np.arange(len(mask))
        low = np.maximum(here - WINDOW, self.texts.start[self.texts.text])
        return total[here] > total[low]

    def holds(self, kind: str, values: Sequence[str]) -> np.ndarray:
        """Where one of these values of a kind is so, (tokens,)."""
        if kind == "place":
            wanted = [place_names().index(value) for value in values]
            return np.isin(self.place, wanted)
        of_word = np.zeros(len(self.words), dtype=bool)
        for value in values:
            of_word[self.numbers(kind, value)] = True
        there = of_word[self.word]
        if kind == "near":
            return self.recent(there)
        return self.shifted(there, {"after": 1, "before": -1}.get(kind, 0))

    def numbers(self, kind: str, value: str) -> list[int]:
        """The numbers of the tokens of which this value of a kind is so."""
        if (test := PROPERTIES.get(kind)) is None:
            return [self.words[value]] if value in self.words else []
        if (kind, value) not in self._kept:
            found = [number for word, number in self.words.items() if test(word, value)]
            self._kept[kind, value] = found
        return self._kept[kind, value]

    @cached_property
    def _kept(self) -> dict[tuple[str, str], list[int]]:
        return {}

    @cached_property
    def place(self) -> np.ndarray:
        """The number of each token's range of `place`, (tokens,)."""
        return np.searchsorted(PLACES, self.texts.position + 1, side="right") - 1

    def says(self, name: str) -> np.ndarray:
        """Where a name says that its unit fires, (tokens,)."""
        return np.logical_and.reduce([self.holds(*clause) for clause in parse(name)])


PROPERTIES: dict[str, Callable[[str, str], bool]] = {
    "begins": str.startswith,
    "ends": str.endswith,
    "looks": lambda word, look: looks_like(word) == look,
}
KINDS = (*WORDS, *PROPERTIES, "place")
