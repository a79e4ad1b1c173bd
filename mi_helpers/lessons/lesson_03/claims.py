"""Lesson 03's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mi_helpers.ablation import Mean, ablate
from mi_helpers.lessons.lesson_03.experiments import (
    fact_pairs,
    gate_and,
    gate_effects,
    gate_or,
    rank_correlation,
    scaled_metric,
    swap_pairs,
    true_and_guess,
    writers_and_readers,
)
from mi_helpers.lessons.lesson_03.pronouns import (
    JOBS,
    carriers,
    damage,
    head_effects,
    mean_log_odds,
    pronoun_pairs,
    skew,
    skew_direction,
    without_direction,
)
from mi_helpers.lessons.shared import make_batch, shipped_model, token_pool
from mi_helpers.patching import activation_patch
from mi_helpers.paths import path_patch
from mi_helpers.tinyworld import lexicon


def whole_scale(seed: int) -> float:
    """The metric with the clean stream put in at all positions of a layer, mean over layers, less
    the metric of the corrupted prompts: 1 - 0."""
    model = shipped_model()
    pairs = fact_pairs(model, 16, seed)
    metric = pairs.metric(model)
    whole = activation_patch(
        model, pairs.clean, pairs.corrupted, "resid_pre", metric, over="layers"
    )
    with torch.no_grad():
        return float(whole.mean() - metric(model.forward(pairs.corrupted)[:, -1]))


def noising_less_denoising(gate: Callable[[Tensor], Tensor], seed: int) -> float:
    """The effect of one wire by noising less that by denoising; the seed draws size and wire."""
    rng = random.Random(seed)
    n = rng.randint(2, 6)
    effects = gate_effects(gate, n, rng.randrange(n))
    return effects["noise"] - effects["denoise"]


def and_contrast(seed: int) -> float:
    """AND of two to six wires: 1, as each wire is needed and none is enough."""
    return noising_less_denoising(gate_and, seed)


def or_contrast(seed: int) -> float:
    """OR of two to six wires: -1, as each wire is enough and none is needed."""
    return noising_less_denoising(gate_or, seed)


def same_city_effect(seed: int) -> float:
    """The control: the largest effect of any patch of the stream between two landmarks of one city,
    in units of the gap between two cities."""
    model = shipped_model()
    metric = fact_pairs(model, 16, seed).metric(model)
    alike = fact_pairs(model, 16, seed, same_city=True)
    ruler = scaled_metric(model, alike, metric.clean - metric.corrupted, alike.corrupted)
    effect = activation_patch(model, alike.clean, alike.corrupted, "resid_pre", ruler)
    return float(effect.abs().max())


def attribution_order(seed: int) -> float:
    """Median rank correlation of attribution patching with true patches of the stream, pronouns."""
    model = shipped_model()
    true, guess = true_and_guess(model, pronoun_pairs(model, 6, seed), "resid_pre")
    return float(np.median([rank_correlation(*each) for each in zip(true, guess, strict=True)]))


def attribution_share(seed: int) -> float:
    """The estimate of the patch at the name's first token, layer 0, as a share of its true effect,
    for landmarks, where the answer changes a lot; mean over pairs."""
    true, guess = true_and_guess(shipped_model(), fact_pairs(shipped_model(), 6, seed), "resid_pre")
    return float(guess[:, 0].mean() / true[:, 0].mean())


def learned_skew(seed: int) -> float:
    """The slope of the model's log-odds over the world's, 40 occupations, unseen phrasings."""
    return skew(mean_log_odds(shipped_model(), seeds=range(6 * seed, 6 * seed + 6)))


def learn_and_test() -> tuple[list[str], list[str]]:
    """Every second occupation by its skew, to find something with; the others, to test it on."""
    order = sorted(JOBS, key=lexicon.occupations().get)
    return order[::2], order[1::2]


def skew_without_direction(seed: int) -> float:
    """The slope that is left, on other occupations, without the direction of the middle layer."""
    model, (learn, test) = shipped_model(), learn_and_test()
    key = ("resid_post", model.n_layers // 2)
    cut = skew_direction(model, key, learn, seeds=range(4 * seed, 4 * seed + 4))
    hooks = without_direction(key, *cut)
    return skew(mean_log_odds(model, test, hooks, range(6 * seed, 6 * seed + 6)), test)


def worst_side_effect(seed: int) -> float:
    """The largest damage to any family but the pronouns without that direction, in nats."""
    model, (learn, _) = shipped_model(), learn_and_test()
    key = ("resid_post", model.n_layers // 2)
    hooks = without_direction(key, *skew_direction(model, key, learn))
    return _worst(damage(model, make_batch(model, answers=12, seed=40_000 + seed), hooks))


def carriers_side_effect(seed: int) -> float:
    """The same without the heads that carry more than a tenth of the skew."""
    model, (learn, _) = shipped_model(), learn_and_test()
    heads = carriers(head_effects(model, range(3), jobs=learn).mean(0))
    hooks = ablate(model, heads, Mean(token_pool(model, sites=["z"])))
    return _worst(damage(model, make_batch(model, answers=12, seed=40_000 + seed), hooks))


def _worst(found: Mapping[str, float]) -> float:
    return max(nats for family, nats in found.items() if family != "pronoun")


def path_effect(seed: int, site: str) -> float:
    """The loss of the metric by the paths from the previous-token heads to the keys or values of
    the layers with induction heads; all are found by patching."""
    model = shipped_model()
    pairs = swap_pairs(model, 12, seed)
    metric = pairs.metric(model)
    effect = activation_patch(
        model, pairs.clean, pairs.corrupted, "z", metric, over="heads x positions"
    )
    writers, layers = writers_and_readers(effect)
    receivers = [(site, layer, head) for layer in layers for head in range(model.n_kv_heads)]
    return 1 - float(path_patch(model, pairs.clean, pairs.corrupted, writers, receivers, metric))


def path_through_keys(seed: int) -> float:
    """That path's effect through the keys."""
    return path_effect(seed, "k")


def path_through_values(seed: int) -> float:
    """The control: the same path into the values."""
    return path_effect(seed, "v")
