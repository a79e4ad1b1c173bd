"""Lesson 03's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_03.experiments import (
    both_directions,
    gate_and,
    gate_effects,
    gate_or,
    gate_shares,
    part_effects,
    rank_correlation,
    scaled_metric,
    strongest,
    together,
    true_and_guess,
)
from mi_helpers.lessons.lesson_03.pairs import (
    ending_pairs,
    fact_pairs,
    pronoun_pairs,
    swap_pairs,
    unequal_pairs,
)
from mi_helpers.lessons.lesson_03.predictions import side_effects
from mi_helpers.lessons.lesson_03.pronouns import (
    best_direction,
    learn_and_test,
    mean_log_odds,
    skew,
    without_direction,
)
from mi_helpers.lessons.lesson_03.tools import patch_heads
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.patching import activation_patch, logit_diffs, normalised_logit_diff
from mi_helpers.sweeps import Sweep


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
    tolerance="± 1e-4",
)
def and_contrast(seed: int) -> float:
    """AND of two to six wires: 1, as each wire is needed and none is enough."""
    return noising_less_denoising(gate_and, seed)


@claim(
    "patching-or",
    "One wire of an OR gate: effect by noising less effect by denoising",
    source="Heimersheim and Nanda 2024, AND and OR circuits; derived: enough (1), not needed (0)",
    published="-1",
    tolerance="± 1e-4",
)
def or_contrast(seed: int) -> float:
    """OR of two to six wires: -1, as each wire is enough and none is needed."""
    return noising_less_denoising(gate_or, seed)


@claim(
    "patching-shares",
    "One of n wires that add shares: effect by noising less effect by denoising",
    source="derived: 1/n both ways",
    published="0",
    tolerance="± 1e-4",
)
def share_contrast(seed: int) -> float:
    """The mean of two to six wires: 0, as each is as far needed as it is enough."""
    return noising_less_denoising(gate_shares, seed)


@claim(
    "patching-mirror",
    "Swapped names: needed less what is enough for the reversed pairs, largest over the heads",
    source="derived: noising a pair is denoising its reverse",
    published="0",
    tolerance="<= 1e-4",
)
def mirror_error(seed: int) -> float:
    """max |needed(pairs) - enough(reversed pairs)|, 8 pairs of landmarks."""
    pairs = fact_pairs(shipped_model(), 8, seed)
    _, needed = both_directions(shipped_model(), pairs)
    enough, _ = both_directions(shipped_model(), pairs.reversed())
    return float((needed - enough).abs().max())


@claim(
    "patching-spares",
    "Cities under noise: enough less needed, largest over the heads (an OR has 1)",
    source="measured in the lesson",
    tolerance=">= 0.2",
)
def spares_under_noise(seed: int) -> float:
    """The largest enough - needed of any head, 16 pairs of landmarks, four draws of noise."""
    pairs = fact_pairs(shipped_model(), 16, seed)
    enough, needed = both_directions(shipped_model(), pairs, pairs.noise())
    return float((enough - needed).max())


@claim(
    "patching-together",
    "Cities: the eight strongest heads at the last token together, enough or needed, the lesser",
    source="measured in the lesson",
    tolerance=">= 0.9",
)
def strongest_together(seed: int) -> float:
    """Chosen by single effects, patched in one run, 16 pairs of landmarks."""
    pairs = fact_pairs(shipped_model(), 16, seed)
    heads = strongest(torch.maximum(*both_directions(shipped_model(), pairs)), 8)
    return min(together(shipped_model(), pairs, heads, patch_heads))


@claim(
    "patching-values",
    "Cities: share won back by all values of one layer, the best layer",
    source="measured in the lesson: the heads find something else in the same place",
    tolerance=">= 0.25",
)
def city_values(seed: int) -> float:
    """The largest effect of a layer's values, by denoising."""
    return _largest(part_effects(shipped_model(), fact_pairs(shipped_model(), 12, seed)), 2)


@claim(
    "patching-queries",
    "Another last word: share won back by all queries of one layer, the best layer",
    source="measured in the lesson: the heads look elsewhere, as the question is another",
    tolerance=">= 0.4",
)
def last_word_queries(seed: int) -> float:
    """The largest effect of a layer's queries, by denoising."""
    return _largest(part_effects(shipped_model(), ending_pairs(shipped_model(), 12, seed)), 0)


@claim(
    "patching-keys",
    "Swapped words: share won back by all keys of one layer, the best layer",
    source="Olsson et al. 2022, In-context Learning and Induction Heads; measured in the lesson",
    tolerance=">= 0.4",
)
def swapped_words_keys(seed: int) -> float:
    """The largest effect of a layer's keys, by denoising."""
    return _largest(part_effects(shipped_model(), swap_pairs(shipped_model(), 12, seed)), 1)


def _largest(effect: Tensor, part: int) -> float:
    return float(effect[part].max())


@claim(
    "patching-unequal",
    "Prompts of unequal length in one call against one by one, largest difference of an effect",
    source="derived: each prompt is run without padding",
    published="0",
    tolerance="<= 1e-3",
)
def unequal_error(seed: int) -> float:
    """All heads at the last token: |together - alone| over pairs, heads and layers."""
    model, last = shipped_model(), Sweep("heads", positions=-1)
    clean, corrupted, answer, wrong = unequal_pairs(model, 8, seed)
    metric = normalised_logit_diff(model, clean, corrupted, answer, wrong)
    together = activation_patch(model, clean, corrupted, "z", metric.each, over=last)
    gap, error = metric.clean - metric.corrupted, 0.0
    for i, (a, b, right, other) in enumerate(
        zip(clean, corrupted, metric.answer, metric.wrong, strict=True)
    ):
        alone = activation_patch(
            model, a, b, "z", lambda x, r=right, w=other: logit_diffs(x, r, w), over=last
        )[..., 0]
        error = max(error, float(((alone - metric.corrupted) / gap - together[..., i]).abs().max()))
    return error


@claim(
    "patching-noise",
    "Causal tracing and swapped names: correlation of the maps of what attention adds",
    source="Meng et al. 2022, Locating and Editing Factual Associations; measured in the lesson",
    tolerance=">= 0.8",
)
def noise_agreement(seed: int) -> float:
    """Correlation over layers and positions, 12 pairs, four draws of noise of three deviations."""
    model, pairs = shipped_model(), fact_pairs(shipped_model(), 12, seed)
    noise = pairs.noise()
    maps = [
        activation_patch(model, pairs.clean, other, "attn_out", metric).flatten().numpy()
        for other, metric in (
            (noise, pairs.metric(model, noise)),
            (pairs.corrupted, pairs.metric(model)),
        )
    ]
    return float(np.corrcoef(*maps)[0, 1])


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
    alike = fact_pairs(model, 16, seed, alike=True)
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
    "attribution-integrated",
    "The same with the mean of four gradients on the way, over the true effect",
    source="Sundararajan et al. 2017, Axiomatic Attribution; derived: 1",
    published="1",
    tolerance="± 0.15",
)
def integrated_share(seed: int) -> float:
    """The estimate by four gradients at the name's first token, layer 0, over its true effect."""
    pairs = fact_pairs(shipped_model(), 6, seed)
    true, guess = true_and_guess(shipped_model(), pairs, "resid_pre", steps=4)
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


@claim(
    "skew-removed",
    "The same slope for other occupations when one direction is taken out of the stream",
    source="measured in the lesson",
    tolerance="<= 0.5",
)
def skew_without_direction(seed: int) -> float:
    """The slope that is left without the direction of the layer that is best on the first half."""
    model, (learn, test) = shipped_model(), learn_and_test()
    cut = without_direction(*best_direction(model, learn, range(3 * seed, 3 * seed + 3)))
    return skew(mean_log_odds(model, test, cut, range(6 * seed, 6 * seed + 6)), test)


@claim(
    "skew-side-effect",
    "Without that direction: largest gain in loss of any other family, nats per answer",
    source="measured in the lesson",
    tolerance="<= 0.5",
)
def worst_side_effect(seed: int) -> float:
    """The largest damage to any family but the pronouns without that direction, in nats."""
    return max(side_effects(seed)[1].values())


@claim(
    "skew-heads-side-effect",
    "The same without the heads that carry more than a tenth of the skew each",
    source="measured in the lesson",
    tolerance=">= 1",
    fast=False,
)
def carriers_side_effect(seed: int) -> float:
    """The same without the heads that carry more than a tenth of the skew."""
    return max(side_effects(seed)[0].values())
