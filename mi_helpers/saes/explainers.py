"""Who names units, and judges names: a small protocol, and statistics that need no model.

    offline = Offline()
    explanation = offline.explain(examples)          # Explanation(text="near: chess, board", …)
    offline.simulate(explanation, contexts)           # what the unit should do, from the name alone

`Offline` looks for the name of `rules` that predicts the strong firings of the half that is seen
best. No model is asked, and no label. Other explainers are in `endpoint` and `local`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from mi_helpers.errors import Refused
from mi_helpers.saes.examples import Context, Examples, Texts
from mi_helpers.saes.rules import LOOKS, PIECES, WINDOW, Facts, looks_like, name_of, parse
from mi_helpers.saes.rules import place_names as places
from mi_helpers.saes.scores import f1

SEEN = 3  # strong firings at a value before a name may have it
MOST = 8  # values in a clause
NEAR = 4  # of them for `near`, chosen among so many times as many
COST = 0.02  # of F1: what a second clause has to add
ELSE = ""  # the table's key for where the name is not true


@dataclass(frozen=True)
class Explanation:
    """A name for a unit.

    Args:
        unit: its number.
        text: the name.
        table: {value of the name's first clause: what the unit does there on average}, and "" for
            elsewhere, where statistics found it; {} where nobody did.
    """

    unit: int
    text: str
    table: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class Explainer(Protocol):
    """Who names units from what is seen, and judges any name on contexts without their values."""

    def explain(self, examples: Examples) -> Explanation:
        """A name, from the half that is seen."""
        ...

    def detect(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """How likely it is that the unit fires somewhere in each context, from 0 to 1."""
        ...

    def fuzz(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """How likely it is that the tokens whose value is 1 are those where the unit fires."""
        ...

    def simulate(self, explanation: Explanation, contexts: Sequence[Context]) -> list[list[float]]:
        """What the unit does at each token of each context, in any unit of measure."""
        ...


# ----------------------------------------------------------------------------- the statistics


@dataclass(frozen=True, eq=False)
class Counts:
    """What is at each token of the half that is seen, counted once for all units.

    Args:
        facts: of all texts.
        rows: (n,), the tokens that are counted.
    """

    facts: Facts
    rows: np.ndarray

    @classmethod
    def of(cls, texts: Texts) -> Counts:
        """Of the half that is seen."""
        return cls(Facts(texts), np.flatnonzero(texts.half[0]))

    @cached_property
    def kinds(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """{kind: (its values, the number of each row's value, or -1)}, exclusive values alone."""
        facts, words, at = self.facts, list(self.facts.words), self.facts.word
        found = {
            "at": (words, at),
            "after": (words, facts.shifted(at, 1, -1)),
            "before": (words, facts.shifted(at, -1, -1)),
            "place": (places(), facts.place),
        }
        looks = np.array([LOOKS.index(looks_like(word)) for word in words])
        found["looks"] = list(LOOKS), looks[at]
        for n in PIECES:
            for kind, piece in (("begins", slice(n)), ("ends", slice(-n, None))):
                longer = [w[piece] if len(w) > n and w.isalpha() else "" for w in words]
                values, index = np.unique(longer, return_inverse=True)
                index = np.where(values[index] == "", -1, index)
                found[f"{kind} {n}"] = values.tolist(), index[at]
        return {kind: (values, index[self.rows]) for kind, (values, index) in found.items()}

    @cached_property
    def totals(self) -> dict[str, np.ndarray]:
        """{kind: how many rows have each value}."""
        return {
            kind: np.bincount(index[index >= 0], minlength=len(values))
            for kind, (values, index) in self.kinds.items()
        }

    @cached_property
    def window(self) -> np.ndarray:
        """(n, WINDOW): the distinct tokens before each row, by number; -1: there are no more."""
        word = self.facts.word.astype(np.int32)
        before = [self.facts.shifted(word, back, -1)[self.rows] for back in range(1, WINDOW + 1)]
        found = np.sort(np.stack(before, 1), axis=1)
        found[:, 1:][found[:, 1:] == found[:, :-1]] = -1
        return found

    @cached_property
    def standing(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, start): token w is among those before the rows row[start[w] : start[w + 1]]."""
        flat = self.window.ravel()
        order = np.argsort(flat, kind="stable")
        start = np.searchsorted(flat[order], np.arange(len(self.facts.words) + 1))
        return (order // WINDOW).astype(np.int32), start


@dataclass(frozen=True)
class Clause:
    """A clause of a name, with the F1 that the name has with it and the rows where it is true."""

    score: float
    kind: str
    values: tuple[str, ...]
    rows: np.ndarray

    @property
    def said(self) -> tuple[str, tuple[str, ...]]:
        """(kind, values), as in `rules.parse`."""
        return self.kind.split()[0], self.values


def best_values(hits: np.ndarray, said: np.ndarray, total: int) -> tuple[np.ndarray, float]:
    """The values that together predict best where a unit fires, and their F1.

    Values exclude one another: F1 = 2 Σ hits / (Σ said + total) over the chosen ones, MOST at most,
    each with SEEN hits. At the best F1 they are those with the highest hits - F1 / 2 · said
    (Dinkelbach's iteration, which rises to it).

    Args:
        hits, said: of each value, the strong firings and the rows.
        total: of strong firings.
    """
    may = np.flatnonzero(hits >= SEEN)
    chosen, score = may[:0], 0.0
    for _ in range(20):
        gain = hits[may] - score / 2 * said[may]
        order = np.argsort(-gain, kind="stable")[:MOST]
        new = may[order[gain[order] > 0]]
        found = float(2 * hits[new].sum() / max(said[new].sum() + total, 1))
        if found <= score:
            break
        chosen, score = new, found
    return chosen, score


class _Search:
    """The search for one unit's name.

    Args:
        counts: of the texts.
        strong: (n,), whether each row of the counts has a strong firing.
    """

    def __init__(self, counts: Counts, strong: np.ndarray):
        self.counts, self.strong, self.total = counts, strong, int(strong.sum())
        self.fires = np.flatnonzero(strong)

    def clauses(self, within: np.ndarray | None = None) -> list[Clause]:
        """The best clause of each kind, within some rows (n,)."""
        found = [self.exclusive(kind, within) for kind in self.counts.kinds]
        return [clause for clause in (*found, self.near(within)) if clause.values]

    def exclusive(self, kind: str, within: np.ndarray | None) -> Clause:
        """The best clause of a kind whose values exclude one another."""
        values, index = self.counts.kinds[kind]
        fires = self.fires if within is None else self.fires[within[self.fires]]
        hits = np.bincount(index[fires] + 1, minlength=len(values) + 1)[1:]
        said = self.counts.totals[kind]
        if within is not None:
            said = np.bincount(index[within] + 1, minlength=len(values) + 1)[1:]
        chosen, score = best_values(hits, said, self.total)
        true = np.zeros(len(values) + 1, dtype=bool)
        true[chosen] = True
        rows = true[index] if within is None else true[index] & within
        return Clause(score, kind, tuple(values[i] for i in chosen), rows)

    def near(self, within: np.ndarray | None) -> Clause:
        """The best few tokens of which one stands before: one after another, while they help."""
        counts, values = self.counts, list(self.counts.facts.words)
        fires = self.fires if within is None else self.fires[within[self.fires]]
        size = len(values) + 1
        hits = np.bincount(counts.window[fires].ravel() + 1, minlength=size)[1:]
        said = np.diff(counts.standing[1])
        if within is not None:
            said = np.bincount(counts.window[within].ravel() + 1, minlength=size)[1:]
        alone = np.where(hits >= SEEN, 2 * hits / (said + self.total), 0)
        likely = np.argsort(-alone, kind="stable")[: NEAR * NEAR]
        masks = {i: self.stands_before(i, within) for i in likely[alone[likely] > 0].tolist()}
        chosen, score, rows = [], 0.0, np.zeros(len(self.strong), dtype=bool)
        while masks and len(chosen) < NEAR:
            scores = {i: f1(rows | mask, self.strong) for i, mask in masks.items()}
            best = max(scores, key=scores.__getitem__)
            if scores[best] < score + COST:
                break
            chosen.append(values[best])
            rows, score = rows | masks.pop(best), scores[best]
        return Clause(score, "near", tuple(chosen), rows)

    def stands_before(self, word: int, within: np.ndarray | None) -> np.ndarray:
        """The rows before which a token stands."""
        row, start = self.counts.standing
        found = np.zeros(len(self.strong), dtype=bool)
        found[row[start[word] : start[word + 1]]] = True
        return found if within is None else found & within

    def best(self) -> list[Clause]:
        """The clauses of the best name: one, or two where the second adds `COST`."""
        single = sorted(self.clauses(), key=lambda c: -c.score)
        names = [[clause] for clause in single[:1]]
        for first in single[:2]:
            for second in self.clauses(first.rows):
                if second.kind.split()[0] != first.kind.split()[0]:
                    names.append([first, second])
        return max(names, key=lambda n: n[-1].score - COST * (len(n) - 1), default=[self.looks()])

    def looks(self) -> Clause:
        """How the token looks at which most firings are: where no value has `SEEN` of them."""
        values, index = self.counts.kinds["looks"]
        most = int(np.bincount(index[self.fires]).argmax())
        return Clause(0.0, "looks", (values[most],), index == most)


class Offline:
    """Names by counting, and judges by the names of `rules` alone.

    A name that it found carries a table, which `simulate` reads: what the unit does on average
    where each value of the first clause is so, and elsewhere. Without a table, it is 1 where the
    name is true and 0 elsewhere.
    """

    def __init__(self):
        self._counts: weakref.WeakKeyDictionary[Texts, Counts] = weakref.WeakKeyDictionary()

    def counts(self, texts: Texts) -> Counts:
        """What is counted once for all units of some texts."""
        if texts not in self._counts:
            self._counts[texts] = Counts.of(texts)
        return self._counts[texts]

    def explain(self, examples: Examples) -> Explanation:
        """The name that has the highest F1 on the strong firings of the half that is seen.

        Raises:
            Refused: the unit fires in too few texts to have a name.
        """
        if not examples.enough:
            seen, held = examples.strong
            raise Refused(
                f"Unit {examples.unit} fires strongly in {seen} texts that are seen and {held} "
                "that are held out: that is too few to name it and to score the name."
            )
        counts = self.counts(examples.texts)
        token, value = examples.seen_firings()
        whole = np.zeros(examples.texts.n, dtype=bool)
        whole[token[value >= examples.level]] = True
        found = _Search(counts, whole[counts.rows]).best()
        return self.read(name_of([clause.said for clause in found]), examples)

    def read(self, name: str, examples: Examples) -> Explanation:
        """Any name of `rules`, of whomever, with its table from the half that is seen.

        Raises:
            Refused: it is no such name.
        """
        (kind, values), *others = parse(name)
        counts = self.counts(examples.texts)
        facts, all_values = counts.facts, np.zeros(examples.texts.n)
        token, value = examples.seen_firings()
        all_values[token] = value
        also = np.logical_and.reduce([facts.holds(*each) for each in others] or [True])
        table, said = {}, np.zeros(examples.texts.n, dtype=bool)
        for each in values:
            there = facts.holds(kind, [each]) & also
            said |= there
            seen = all_values[there & examples.texts.half[0]]
            table[each] = float(seen.mean()) if len(seen) else 0.0
        rest = all_values[~said & examples.texts.half[0]]
        table[ELSE] = float(rest.mean()) if len(rest) else 0.0
        return Explanation(examples.unit, name, table)

    def detect(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """1 where the name is true at any token of the context, else 0."""
        facts, split = _facts_of(contexts)
        return [float(part.any()) for part in np.split(facts.says(explanation.text), split)]

    def fuzz(self, explanation: Explanation, contexts: Sequence[Context]) -> list[float]:
        """The share of the marked tokens at which the name is true."""
        facts, split = _facts_of(contexts)
        marks = np.concatenate([context.values for context in contexts]) > 0
        parts = np.split(np.stack([facts.says(explanation.text), marks]), split, axis=1)
        return [float((said & on).sum() / max(on.sum(), 1)) for said, on in parts]

    def simulate(self, explanation: Explanation, contexts: Sequence[Context]) -> list[list[float]]:
        """What the table says; of several values that are so, the highest."""
        facts, split = _facts_of(contexts)
        (kind, values), *others = parse(explanation.text)
        also = np.logical_and.reduce([facts.holds(*each) for each in others] or [True])
        found = np.full(facts.texts.n, -np.inf)
        for value in values:
            there = facts.holds(kind, [value]) & also
            found[there] = np.maximum(found[there], explanation.table.get(value, 1.0))
        found[found == -np.inf] = explanation.table.get(ELSE, 0.0)
        return [part.tolist() for part in np.split(found, split)]


def _facts_of(contexts: Sequence[Context]) -> tuple[Facts, np.ndarray]:
    """The facts of contexts one after another, and where to split them into contexts again."""
    texts = Texts.of([c.words for c in contexts], begin=[c.begin for c in contexts])
    return Facts(texts), texts.start[1:-1]
