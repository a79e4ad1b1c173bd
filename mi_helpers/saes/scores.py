"""How well a unit tells a concept: precision, recall, F1 and AUROC of every unit at once.

    scores = score_units(firings(coder, x), truth, names)      # every unit for every concept
    scores.best()                                              # each concept's best unit

A unit is a latent, a neuron or a direction. Its threshold is chosen on the first half of the
tokens, as is the best unit of each concept; all that is reported is measured on the second half.
Latents are given as their firings (`Firings`: all else is 0), other units as a dense array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mi_helpers.errors import Refused

BLOCK = 64  # dense units that are sorted together


@dataclass(frozen=True)
class Firings:
    """Positive activations: latent[i] has the value value[i] > 0 at row[i].

    Args:
        row, latent: (n,), integers.
        value: (n,), float32.
        n_rows, n_latents: the size of the whole table.
    """

    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    n_rows: int
    n_latents: int


@dataclass(frozen=True)
class Fired:
    """Where units fire, unit by unit.

    start  (units + 1,): unit j's firings are start[j] to start[j + 1] - 1 of the others
    token, value  (firings,): at which token, and how strongly; in the order of the tokens
    n      how many tokens there are
    """

    start: np.ndarray
    token: np.ndarray
    value: np.ndarray
    n: int

    @classmethod
    def of(cls, activations) -> Fired:
        """From activations (tokens, units), an array or a tensor on the CPU, or from firings.

        Raises:
            Refused: they are no table of finite numbers.
        """
        if isinstance(activations, Firings):
            found, width = activations, activations.n_latents
            token, unit, value, n = found.row, found.latent, found.value, found.n_rows
        else:
            table = np.asarray(activations)
            if table.ndim != 2 or not np.isfinite(table).all():
                raise Refused(
                    f"The activations have the shape {table.shape}: expected finite numbers, a row "
                    "for each token and a column for each unit."
                )
            token, unit = (table > 0).nonzero()
            value, (n, width) = table[token, unit], table.shape
        order = np.lexsort((token, unit))
        start = np.searchsorted(unit[order], np.arange(width + 1))
        return cls(start, token[order], value[order], n)

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return len(self.start) - 1

    def at(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of a unit's firings."""
        some = slice(self.start[unit], self.start[unit + 1])
        return self.token[some], self.value[some]

    def mask(self, unit: int) -> np.ndarray:
        """(n,): where a unit fires."""
        found = np.zeros(self.n, dtype=bool)
        found[self.at(unit)[0]] = True
        return found


@dataclass(frozen=True)
class Scores:
    """Every unit as a test for every concept: arrays of shape (concepts, units).

    Args:
        precision, recall, f1: of 'value ≥ threshold', on the second half.
        auroc: P(a token with the concept has the higher value), ties one half, on the second half.
        chosen: the F1 on the first half, at the threshold that is best there.
        threshold: that threshold; inf where the unit never fires in the first half.
    """

    names: tuple[str, ...]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    auroc: np.ndarray
    chosen: np.ndarray
    threshold: np.ndarray

    def best(self) -> list[Best]:
        """Each concept's best unit, chosen on the first half."""
        units = self.chosen.argmax(1)
        parts = (self.precision, self.recall, self.f1, self.auroc, self.threshold)
        return [
            Best(name, int(unit), *(float(part[c, unit]) for part in parts))
            for c, (name, unit) in enumerate(zip(self.names, units, strict=True))
        ]


@dataclass(frozen=True)
class Best:
    """One unit as a test for one concept."""

    concept: str
    unit: int
    precision: float
    recall: float
    f1: float
    auroc: float
    threshold: float


@dataclass(frozen=True)
class Sorted:
    """Entries of some units, sorted by unit and then by falling value.

    Args:
        unit, row, value: (n,).
        begin: (u,), where each of the units that have entries begins.
        last: (n,), whether an entry is the last of those with its unit and value.
    """

    unit: np.ndarray
    row: np.ndarray
    value: np.ndarray
    begin: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, unit: np.ndarray, row: np.ndarray, value: np.ndarray) -> Sorted:
        """From entries that are already sorted."""
        new = np.ones(len(unit), dtype=bool)
        new[1:] = unit[1:] != unit[:-1]
        last = np.ones(len(unit), dtype=bool)
        last[:-1] = new[1:] | (value[1:] != value[:-1])
        return cls(unit, row, value, np.flatnonzero(new), last)

    def within(self, counts: np.ndarray) -> np.ndarray:
        """Running sums of counts (n,) within each unit, the entry itself included."""
        total = np.cumsum(counts, dtype=np.int64)
        before = total[self.begin] - counts[self.begin]
        lengths = np.diff(np.append(self.begin, len(self.unit)))
        return total - np.repeat(before, lengths)


def score_units(
    units: Firings | np.ndarray, truth: np.ndarray, names: Sequence[str] | None = None
) -> Scores:
    """The scores of all units for all concepts.

    Args:
        units: firings of latents, or values (rows, units) of any sign.
        truth: (rows, concepts), whether each row has each concept; rows in the order of the text,
            so that the halves hold different texts.
        names: of the concepts; None means their numbers.

    Raises:
        ValueError: the shapes disagree, there is NaN, or all or none of a half's rows have a
            concept.
    """
    truth = np.asarray(truth, dtype=bool)
    n_rows, n_units = (units.n_rows, units.n_latents) if isinstance(units, Firings) else units.shape
    if truth.ndim != 2 or len(truth) != n_rows:
        raise ValueError(f"The units have {n_rows} rows, the truth has shape {truth.shape}.")
    names = tuple(names or map(str, range(truth.shape[1])))
    values = units.value if isinstance(units, Firings) else units
    if np.isnan(values).any():
        raise ValueError("The units hold NaN: nothing can be scored.")
    half = n_rows // 2
    for name, first, second in zip(names, truth[:half].mean(0), truth[half:].mean(0), strict=True):
        if not (0 < first < 1 and 0 < second < 1):
            raise ValueError(
                f"{name!r} is the case at {first:.1%} of the first half of the tokens and at "
                f"{second:.1%} of the second: a score needs both kinds in both."
            )
    shape = (truth.shape[1], n_units)
    out = {name: np.zeros(shape, np.float32) for name in ("precision", "recall", "f1", "chosen")}
    out["auroc"], out["threshold"] = np.full(shape, 0.5, np.float32), np.full(shape, np.inf)
    for offset, width, early, late in blocks(units, half):
        for concept in range(truth.shape[1]):
            here = {k: v[concept, offset : offset + width] for k, v in out.items()}
            choose(early, truth[:half, concept], here)
            test(late, truth[half:, concept], here)
    return Scores(names, **out)


def blocks(units: Firings | np.ndarray, half: int) -> Iterator[tuple[int, int, Sorted, Sorted]]:
    """(first unit, number of units, entries of the first half, entries of the second) by block."""
    if isinstance(units, Firings):
        order = np.lexsort((-units.value, units.latent))
        row, latent, value = units.row[order], units.latent[order], units.value[order]
        early = row < half
        yield (
            0,
            units.n_latents,
            Sorted.of(latent[early], row[early], value[early]),
            Sorted.of(latent[~early], row[~early] - half, value[~early]),
        )
        return
    for offset in range(0, units.shape[1], BLOCK):
        block = units[:, offset : offset + BLOCK]
        yield offset, block.shape[1], dense(block[:half]), dense(block[half:])


def dense(block: np.ndarray) -> Sorted:
    """All entries of (rows, units) values, sorted."""
    columns = np.ascontiguousarray(block.T)
    order = np.argsort(-columns, axis=1, kind="stable")
    value = np.take_along_axis(columns, order, 1)
    unit = np.repeat(np.arange(len(columns)), columns.shape[1])
    return Sorted.of(unit, order.ravel(), value.ravel())


def choose(entries: Sorted, truth: np.ndarray, out: dict[str, np.ndarray]) -> None:
    """Write to `out` each unit's highest F1 = 2 TP / (fired + P), and its threshold."""
    if not len(entries.unit):
        return
    hits = entries.within(truth[entries.row])
    fired = entries.within(np.ones(len(entries.unit), np.int64))
    f1 = np.where(entries.last, 2 * hits / (fired + truth.sum()), -1.0)
    best = np.maximum.reduceat(f1, entries.begin)
    lengths = np.diff(np.append(entries.begin, len(f1)))
    at = np.flatnonzero(f1 == np.repeat(best, lengths))
    which, first = np.unique(entries.unit[at], return_index=True)
    out["chosen"][which] = best
    out["threshold"][which] = entries.value[at[first]]


def test(entries: Sorted, truth: np.ndarray, out: dict[str, np.ndarray]) -> None:
    """Write to `out` precision, recall and F1 at the thresholds, and the AUROC."""
    n, n_units = truth.sum(), len(out["f1"])
    right = truth[entries.row]
    fires = entries.value >= out["threshold"][entries.unit]
    fired = np.bincount(entries.unit[fires], minlength=n_units)
    hits = np.bincount(entries.unit[fires & right], minlength=n_units)
    out["precision"][:] = hits / np.maximum(fired, 1)
    out["recall"][:] = hits / n
    out["f1"][:] = 2 * hits / (fired + n)
    if len(entries.unit):
        out["auroc"][:] = auroc(entries, right, n, len(truth) - n, n_units)


def auroc(entries: Sorted, right: np.ndarray, n: int, others: int, n_units: int) -> np.ndarray:
    """P(value of a positive > value of a negative) + P(equal) / 2 per unit, (n_units,).

    Rows without an entry are 0, below every entry. With h_g positives and m_g negatives in a group
    g of equal values, and M_g negatives above it: Σ_g h_g (others - M_g - m_g / 2) / (n · others).

    Args:
        right: whether each entry is at a positive row.
        n, others: the numbers of positive and negative rows.
    """
    ends = np.flatnonzero(entries.last)
    unit = entries.unit[ends]
    hits, misses = (entries.within(each)[ends] for each in (right, ~right))
    fresh = np.ones(len(ends), dtype=bool)
    fresh[1:] = unit[1:] != unit[:-1]
    above = np.where(fresh, 0, np.concatenate([[0], misses[:-1]]))
    group_hits = hits - np.where(fresh, 0, np.concatenate([[0], hits[:-1]]))
    wins = group_hits * (others - above - (misses - above) / 2)
    closing = np.append(fresh[1:], True)
    rest_hits, rest_misses = np.full(n_units, n), np.full(n_units, others)
    rest_hits[unit[closing]] -= hits[closing]
    rest_misses[unit[closing]] -= misses[closing]
    total = np.bincount(unit, wins, minlength=n_units) + rest_hits * rest_misses / 2
    return total / (n * others)


def f1(said: np.ndarray, true: np.ndarray) -> float:
    """2 TP / (said + true) of two masks, whichever is which; 0 where both are empty."""
    total = np.count_nonzero(said) + np.count_nonzero(true)
    return 2 * np.count_nonzero(said & true) / total if total else 0.0
