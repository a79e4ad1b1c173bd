"""Lesson 03's experiments: gates, enough and needed, parts of heads, estimates against patches.

    enough, needed = both_directions(model, pairs)     # (layers, heads) each

The engine is `mi_helpers.patching`; the prompts are in `pairs`, the pronouns in `pronouns`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mi_helpers.ablation import Gaussian
from mi_helpers.gradients import attribution_patch
from mi_helpers.lessons.lesson_03.pairs import (
    Pairs,
    ending_pairs,
    fact_pairs,
    giver_pairs,
    number_pairs,
    pronoun_pairs,
    swap_pairs,
)
from mi_helpers.loading import untrained
from mi_helpers.models import LanguageModel
from mi_helpers.patching import LogitDiff, activation_patch
from mi_helpers.sweeps import Sweep

TASKS: Mapping[str, Callable[[LanguageModel, int, int], Pairs]] = {
    "city": fact_pairs,
    "number": number_pairs,
    "pronoun": pronoun_pairs,
    "giver": giver_pairs,
    "swapped words": swap_pairs,
    "last word": ending_pairs,
}
PARTS = {"queries": "q", "keys": "k", "values": "v", "patterns": "pattern"}  # of a head

# -------------------------------------------------------------------------------------------- gates


def gate_and(wires: Tensor) -> Tensor:
    """ReLU(Σ wires - (n - 1)), (..., n) -> (...,): 1 where all n wires are 1, else 0."""
    return torch.relu(wires.sum(-1) - (wires.shape[-1] - 1))


def gate_or(wires: Tensor) -> Tensor:
    """ReLU(Σ wires) - ReLU(Σ wires - 1), (..., n) -> (...,): 1 where any wire is 1, else 0."""
    total = wires.sum(-1)
    return torch.relu(total) - torch.relu(total - 1)


def gate_shares(wires: Tensor) -> Tensor:
    """The mean of the wires, (..., n) -> (...,): each adds its share."""
    return wires.mean(-1)


def gate_effects(gate: Callable[[Tensor], Tensor], n: int = 2, wire: int = 0) -> dict[str, float]:
    """The effect of one wire of a gate in both directions; clean: all wires 1, corrupted: all 0.

    Args:
        gate: wires (n,) -> output.
        n: the number of wires.

    Returns:
        denoise: the output with this wire 1 and the others 0.
        noise: 1 - the output with this wire 0 and the others 1.

    Raises:
        ValueError: no such wire, or fewer than two.
    """
    if n < 2 or not 0 <= wire < n:
        raise ValueError(f"Wire {wire} of {n} is no choice: a gate has two wires or more, from 0.")
    one = torch.eye(n)[wire]
    return {"denoise": float(gate(one)), "noise": 1 - float(gate(1 - one))}


# ------------------------------------------------------------------------------------ heads, parts


def both_directions(
    model: LanguageModel, pairs: Pairs, noise: Gaussian | None = None
) -> tuple[Tensor, Tensor]:
    """How far each head alone is enough (denoising: the metric), and needed (noising: 1 less the
    metric), (layers, heads) each.

    Args:
        noise: on the clean prompts, in place of the corrupted ones.
    """
    metric, other = pairs.metric(model, noise), pairs.corrupted if noise is None else noise
    enough = activation_patch(model, pairs.clean, other, "z", metric)
    return enough, 1 - activation_patch(model, pairs.clean, other, "z", metric, "noise")


def together(model: LanguageModel, pairs: Pairs, heads: Sequence[tuple[int, int]], patch) -> tuple:
    """The same for several heads at once, at the last token, by a function that patches them.

    Args:
        patch: (model, base ids, other ids, heads) -> the patched base run's last logits.
    """
    metric = pairs.metric(model)
    with torch.no_grad():
        enough = float(metric(patch(model, pairs.corrupted, pairs.clean, heads)))
        return enough, 1 - float(metric(patch(model, pairs.clean, pairs.corrupted, heads)))


def strongest(effect, count: int) -> list[tuple[int, ...]]:
    """The indices of the `count` largest entries of an array, the largest first."""
    effect = np.asarray(effect)
    order = np.argsort(-effect, axis=None, kind="stable")[:count]
    return [tuple(map(int, np.unravel_index(i, effect.shape))) for i in order]


def part_effects(model: LanguageModel, pairs: Pairs) -> Tensor:
    """The metric when all queries, keys, values or patterns of a layer are taken from the clean
    run, at every position: (parts, layers), in the order of `PARTS`."""
    metric, sides = pairs.metric(model), (pairs.clean, pairs.corrupted)
    found = [
        activation_patch(model, *sides, site, metric, over="layers") for site in PARTS.values()
    ]
    return torch.stack(found)


# ---------------------------------------------------------------------------------------- controls


def scaled_metric(model: LanguageModel, pairs: Pairs, gap: float, base: Tensor) -> LogitDiff:
    """A metric for pairs with the same answer: 0 on the prompts `base`, and 1 where the logit
    difference is larger by `gap`, the difference between the two runs of ordinary pairs."""
    raw = LogitDiff(torch.tensor(pairs.answer), torch.tensor(pairs.wrong))
    with torch.no_grad():
        at = float(raw.raw(model.forward(base)[:, -1]))
    return replace(raw, clean=at + gap, corrupted=at)


def with_controls(model: LanguageModel, pairs: Pairs, alike: Pairs) -> tuple[dict, dict]:
    """Maps of the stream for pairs and for the two controls, each (layers, positions), and the gap
    in logits that each is divided by.

    Args:
        alike: pairs with the same answer, which are measured on the scale of the ordinary pairs.
    """
    blank, metric = untrained(model), pairs.metric(model)
    gap, empty = metric.clean - metric.corrupted, pairs.metric(blank)
    ruler = scaled_metric(model, alike, gap, alike.corrupted)
    maps = {
        "different cities": (model, pairs, metric),
        "the same city": (model, alike, ruler),
        "an untrained model": (blank, pairs, empty),
    }
    gaps = dict(zip(maps, (gap, gap, empty.clean - empty.corrupted), strict=True))
    return {
        name: activation_patch(each, some.clean, some.corrupted, "resid_pre", scale)
        for name, (each, some, scale) in maps.items()
    }, gaps


def arrival(model: LanguageModel, clean, corrupted, metric) -> Tensor:
    """The metric when the stream at the last token alone is taken from the clean run, for each
    layer that it enters, (layers,); the prompts may differ in length."""
    last = Sweep("layers", positions=-1)
    return activation_patch(model, clean, corrupted, "resid_pre", metric, over=last)


# --------------------------------------------------------------------------------------- estimates


def true_and_guess(
    model: LanguageModel, pairs: Pairs, site: str, steps: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Every patch's effect, by denoising, and its estimate by attribution patching.

    Args:
        steps: of the estimate, as in `attribution_patch`.

    Returns:
        (n, cells) each, pair by pair. Cells are layers × positions (for "z": × heads) from the
        first position that differs; before it both are 0.
    """
    over = "heads x positions" if site == "z" else "positions"
    where = Sweep(over, positions=range(pairs.subject[0], pairs.clean.shape[1]))
    each, sides = pairs.metric(model).each, (pairs.clean, pairs.corrupted)
    with torch.no_grad():
        before = each(model.forward(pairs.corrupted)[:, -1])  # (n,), about 0
    true = activation_patch(model, *sides, site, each, over=where)
    guess = attribution_patch(model, *sides, site, each, over=where, steps=steps)
    true, guess = ((x - before).flatten(0, -2).T.cpu().numpy() for x in (true, guess))
    return true, guess


@torch.no_grad()
def along_the_way(
    model: LanguageModel, pairs: Pairs, layer: int, position: int, shares: Sequence[float]
) -> np.ndarray:
    """The metric as one vector of the corrupted run is moved to the clean run's, (shares,):

    a = a_corrupted + share · (a_clean - a_corrupted)
    """
    key = ("resid_pre", layer)
    _, kept = model.run_with_cache(pairs.clean, key, stop_at_layer=layer + 1)
    target, metric, found = kept[key][:, position], pairs.metric(model), []
    for share in shares:

        def hook(x: Tensor, share=share) -> Tensor:
            x[:, position] += share * (target - x[:, position])
            return x

        with model.hooks({key: hook}):
            found.append(float(metric(model.forward(pairs.corrupted)[:, -1])))
    return np.array(found)


def rank_correlation(true, guess) -> float:
    """Spearman's rank correlation of two lists of effects."""
    return float(spearmanr(np.ravel(true), np.ravel(guess)).statistic)
