"""Lesson 03's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mi_helpers.ablation import Mean, ablate
from mi_helpers.course.ledger import claim
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


@claim(
    "patching-scale",
    "Normalised logit difference: a layer's whole clean stream put in, less that of no patch",
    source="Heimersheim and Nanda 2024, How to use and interpret activation patching; "
    "derived: 1 - 0",
    published="1",
    tolerance="± 1e-3",
)
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


@claim(
    "patching-and",
    "One wire of an AND gate: effect by noising less effect by denoising",
    source="Heimersheim and Nanda 2024, AND and OR circuits; derived: needed (1), not enough (0)",
    published="1",
    tolerance="± 1e-6",
)
def and_contrast(seed: int) -> float:
    """AND of two to six wires: 1, as each wire is needed and none is enough."""
    return noising_less_denoising(gate_and, seed)


@claim(
    "patching-or",
    "One wire of an OR gate: effect by noising less effect by denoising",
    source="Heimersheim and Nanda 2024, AND and OR circuits; derived: enough (1), not needed (0)",
    published="-1",
    tolerance="± 1e-6",
)
def or_contrast(seed: int) -> float:
    """OR of two to six wires: -1, as each wire is enough and none is needed."""
    return noising_less_denoising(gate_or, seed)


@claim(
    "patching-same-city",
    "Negative control: largest effect between two landmarks of one city, of an ordinary gap",
    source="derived: nothing that is asked for differs",
    published="0",
    tolerance="± 0.1",
)
def same_city_effect(seed: int) -> float:
    """The control: the largest effect of any patch of the stream between two landmarks of one city,
    in units of the gap between two cities."""
    model = shipped_model()
    metric = fact_pairs(model, 16, seed).metric(model)
    alike = fact_pairs(model, 16, seed, same_city=True)
    ruler = scaled_metric(model, alike, metric.clean - metric.corrupted, alike.corrupted)
    effect = activation_patch(model, alike.clean, alike.corrupted, "resid_pre", ruler)
    return float(effect.abs().max())


@claim(
    "attribution-order",
    "Attribution against true patches of the stream, pronouns: rank correlation, median pair",
    source="Nanda 2023, Attribution Patching; measured in the lesson",
    tolerance=">= 0.8",
)
def attribution_order(seed: int) -> float:
    """Median rank correlation of attribution patching with true patches of the stream, pronouns."""
    model = shipped_model()
    true, guess = true_and_guess(model, pronoun_pairs(model, 6, seed), "resid_pre")
    return float(np.median([rank_correlation(*each) for each in zip(true, guess, strict=True)]))


@claim(
    "attribution-share",
    "Attribution over the true effect at a landmark's name, layer 0: the answer tips over",
    source="Nanda 2023, Attribution Patching; measured in the lesson",
    tolerance="<= 0.75",
)
def attribution_share(seed: int) -> float:
    """The estimate of the patch at the name's first token, layer 0, as a share of its true effect,
    for landmarks, where the answer changes a lot; mean over pairs."""
    true, guess = true_and_guess(shipped_model(), fact_pairs(shipped_model(), 6, seed), "resid_pre")
    return float(guess[:, 0].mean() / true[:, 0].mean())


@claim(
    "skew-learned",
    "Slope of the model's log-odds of 'she' over the world's: 40 occupations, unseen phrasings",
    source="derived: 1 for a calibrated reader of this world",
    published="1",
    tolerance="± 0.15",
)
def learned_skew(seed: int) -> float:
    """The slope of the model's log-odds over the world's, 40 occupations, unseen phrasings."""
    return skew(mean_log_odds(shipped_model(), seeds=range(6 * seed, 6 * seed + 6)))


def learn_and_test() -> tuple[list[str], list[str]]:
    """Every second occupation by its skew, to find something with; the others, to test it on."""
    order = sorted(JOBS, key=lexicon.occupations().get)
    return order[::2], order[1::2]


@claim(
    "skew-removed",
    "The same slope for other occupations when one direction is taken out of the middle layer",
    source="measured in the lesson",
    tolerance="<= 0.5",
)
def skew_without_direction(seed: int) -> float:
    """The slope that is left, on other occupations, without the direction of the middle layer."""
    model, (learn, test) = shipped_model(), learn_and_test()
    key = ("resid_post", model.n_layers // 2)
    cut = skew_direction(model, key, learn, seeds=range(4 * seed, 4 * seed + 4))
    hooks = without_direction(key, *cut)
    return skew(mean_log_odds(model, test, hooks, range(6 * seed, 6 * seed + 6)), test)


def _worst(found: Mapping[str, float]) -> float:
    return max(nats for family, nats in found.items() if family != "pronoun")


@claim(
    "skew-side-effect",
    "Without that direction: largest gain in loss of any other family, nats per answer",
    source="measured in the lesson",
    tolerance="<= 0.5",
)
def worst_side_effect(seed: int) -> float:
    """The largest damage to any family but the pronouns without that direction, in nats."""
    model, (learn, _) = shipped_model(), learn_and_test()
    key = ("resid_post", model.n_layers // 2)
    hooks = without_direction(key, *skew_direction(model, key, learn))
    return _worst(damage(model, make_batch(model, answers=12, seed=40_000 + seed), hooks))


@claim(
    "skew-heads-side-effect",
    "The same without the heads that carry more than a tenth of the skew each",
    source="measured in the lesson",
    tolerance=">= 1",
    fast=False,
)
def carriers_side_effect(seed: int) -> float:
    """The same without the heads that carry more than a tenth of the skew."""
    model, (learn, _) = shipped_model(), learn_and_test()
    heads = carriers(head_effects(model, range(3), jobs=learn).mean(0))
    hooks = ablate(model, heads, Mean(token_pool(model, sites=["z"])))
    return _worst(damage(model, make_batch(model, answers=12, seed=40_000 + seed), hooks))


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


@claim(
    "path-keys",
    "Share of the answer lost by one path: previous-token heads to the induction heads' keys",
    source="Olsson et al. 2022, In-context Learning and Induction Heads; "
    "path as in Wang et al. 2022",
    tolerance=">= 0.6",
)
def path_through_keys(seed: int) -> float:
    """That path's effect through the keys."""
    return path_effect(seed, "k")


@claim(
    "path-values",
    "Control: the same path into the values",
    source="derived: what stands before a word is no content to be copied",
    published="0",
    tolerance="± 0.2",
)
def path_through_values(seed: int) -> float:
    """The control: the same path into the values."""
    return path_effect(seed, "v")
