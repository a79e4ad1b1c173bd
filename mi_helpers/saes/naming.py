"""Automatic interpretation: units are named, and the names scored on text that nobody has seen.

    texts = Texts.of(words)                               # of each text its tokens, as text
    for examples in collect(values, texts, [3, 17]):      # (tokens, units), or `Firings`
        explanation = Offline().explain(examples)
        scores = score(Offline(), explanation, examples)
        print(explanation, scores.simulation, scores.reliable)

Four steps, as in Bills et al. 2023 (Language models can explain neurons in language models) and
Paulo et al. 2024 (Automatically interpreting millions of features in large language models):
contexts are collected, a name is found, it is scored on contexts held out, names are put on a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from mi_helpers.saes.examples import Context, Examples, Texts, collect
from mi_helpers.saes.explainers import Explainer, Explanation, Offline
from mi_helpers.saes.scores import Fired

__all__ = [
    "Context",
    "Examples",
    "Explainer",
    "Explanation",
    "Fired",
    "NameScores",
    "Offline",
    "Score",
    "Texts",
    "collect",
    "score",
]

RELIABLE = 0.7  # simulation: from there on a name counts as reliable
RESAMPLES, CONFIDENCE = 999, 0.95


@dataclass(frozen=True)
class Score:
    """A score with its interval.

    Args:
        value: the score.
        low, high: its 95 % interval, from the percentiles of a bootstrap over contexts.
        n: how many contexts it is of.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class NameScores:
    """How well a name predicts what its unit does in contexts held out.

    Args:
        detection: (sensitivity + specificity) / 2 of 'it fires strongly somewhere in this context',
            on contexts that do and, as many, random ones and near-misses that do not. Chance: 0.5.
        fuzzing: the same of 'the marked tokens are those at which it fires', on contexts in which
            they are and others in which as many silent tokens are marked. Chance: 0.5.
        simulation: the correlation of what the name predicts with what the unit does, over all
            tokens of its highest contexts and random ones (Bills et al.'s top-and-random score).
            Chance: 0.
    """

    detection: Score
    fuzzing: Score
    simulation: Score

    @property
    def reliable(self) -> bool:
        """Whether the simulation's correlation is 0.7 or more."""
        return self.simulation.value >= RELIABLE


def score(
    judge: Explainer, explanation: Explanation, examples: Examples, seed: int = 0
) -> NameScores:
    """How well a name predicts its unit in the contexts held out, by who judges it.

    The judge gets the name and the tokens of the contexts, in an order that tells nothing.

    Args:
        seed: of the order, the marks and the bootstrap.
    """
    rng = np.random.default_rng([seed, examples.unit])
    return NameScores(
        detection(judge, explanation, examples, rng),
        fuzzing(judge, explanation, examples, rng),
        simulation(judge, explanation, examples, rng),
    )


# ------------------------------------------------------------------------------- the three scores


def detection(judge, explanation: Explanation, examples: Examples, rng) -> Score:
    """See `NameScores`."""
    held, level = examples.held, examples.level
    silent = [c for c in held.random if max(c.values) < level]
    some = len(held.spread) - min(len(held.spread) // 2, len(held.near))
    negative = [*silent[:some], *held.near[: len(held.spread) - len(silent[:some])]]
    groups = [list(held.spread), negative]
    blank = [[context.with_values() for context in group] for group in groups]
    yes, no = asked(judge.detect, explanation, blank, rng)
    return balanced(yes, no, rng)


def fuzzing(judge, explanation: Explanation, examples: Examples, rng) -> Score:
    """See `NameScores`."""
    held, level = examples.held, examples.level
    every = list(dict.fromkeys([*held.spread, *held.top]))
    right = [marks(c, [v >= level for v in c.values]) for c in every[::2]]
    wrong = [mismarked(c, level, rng) for c in every[1::2]]
    yes, no = asked(judge.fuzz, explanation, [right, [c for c in wrong if c]], rng)
    return balanced(yes, no, rng)


def marks(context: Context, on: Sequence[bool]) -> Context:
    """The context with the value 1 at marked tokens, else 0."""
    return context.with_values([float(each) for each in on])


def mismarked(context: Context, level: float, rng) -> Context | None:
    """The context with as many marks as it has strong firings, at tokens that do not fire so."""
    values = np.array(context.values)
    silent = np.flatnonzero(values < level)
    n = min(int((values >= level).sum()), len(silent))
    on = np.zeros(len(values), dtype=bool)
    on[rng.choice(silent, n, replace=False)] = True
    return marks(context, on.tolist()) if n else None


def simulation(judge, explanation: Explanation, examples: Examples, rng) -> Score:
    """See `NameScores`."""
    groups = [list(examples.held.top), list(examples.held.random)]
    blank = [[context.with_values() for context in group] for group in groups]
    said = asked(judge.simulate, explanation, blank, rng)
    sums = [
        np.array([moments(p, c.values) for p, c in zip(predicted, group, strict=True)])
        for predicted, group in zip(said, groups, strict=True)
    ]
    return with_interval(correlation, sums, rng)


def moments(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """[n, Σx, Σy, Σx², Σy², Σxy] of a context: those of several add up."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return [len(a), a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]


def correlation(*sums: np.ndarray) -> np.ndarray:
    """Pearson's r over all tokens from contexts' moments (…, n, 6); 0 where either is constant."""
    n, x, y, xx, yy, xy = np.moveaxis(sum(each.sum(-2) for each in sums), -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    small = 1e-12 * np.maximum(n * xx, 1e-300) * np.maximum(n * yy, 1e-300)
    with np.errstate(all="ignore"):
        return np.where(spread > small, (n * xy - x * y) / np.sqrt(spread), 0.0)


def asked(judge, explanation: Explanation, groups: Sequence[list[Context]], rng) -> list[list]:
    """What a judge says of contexts in groups, which it gets in a random order."""
    flat = [context for group in groups for context in group]
    order = rng.permutation(len(flat))
    said = judge(explanation, [flat[i] for i in order]) if flat else []
    back = [said[i] for i in np.argsort(order)]
    ends = np.cumsum([len(group) for group in groups])
    return [back[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]


def balanced(positive: Sequence[float], negative: Sequence[float], rng) -> Score:
    """(sensitivity + specificity) / 2 of answers, each yes from 0.5 on, with its interval."""
    right = [np.array(positive) >= 0.5, np.array(negative) < 0.5]
    return with_interval(
        lambda *parts: sum(part.mean(-2)[..., 0] for part in parts) / len(parts),
        [part[:, None].astype(float) for part in right],
        rng,
    )


def with_interval(statistic, groups: Sequence[np.ndarray], rng) -> Score:
    """A statistic of groups of contexts (n, numbers), each drawn anew by itself; NaN where a group
    has fewer than two."""
    n = sum(map(len, groups))
    if min(map(len, groups)) < 2:
        return Score(float("nan"), float("nan"), float("nan"), n)
    value = float(statistic(*groups))

    def of_rows(*rows, axis=-1) -> np.ndarray:
        return statistic(*(g[r.astype(int)] for g, r in zip(groups, rows, strict=True)))

    drawn = bootstrap(
        [np.arange(len(group)) for group in groups],
        of_rows,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=rng,
    ).confidence_interval
    return Score(value, float(drawn.low), float(drawn.high), n)
