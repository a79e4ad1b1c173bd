"""Lesson 07's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import functools
import math
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mi_helpers.circuits.replacement import Replacement, without_latents
from mi_helpers.circuits.rules import ActivePairs, WriteEffects, active_pairs, write_effects
from mi_helpers.course.ledger import claim
from mi_helpers.layouts import NORMALIZED
from mi_helpers.lessons.lesson_07.currencies import (
    Strongest,
    strongest_writers,
    with_own_currency,
)
from mi_helpers.lessons.lesson_07.experiments import (
    ALL_LAYERS,
    Faithful,
    as_published,
    by_coders,
    by_neurons,
    compare,
    explained,
    explained_by,
    linear_explained,
    losses,
    make_pages,
    mean_loss,
    predicted_tokens,
    random_features,
    rivals,
)
from mi_helpers.lessons.shared import make_batch, shipped_model
from mi_helpers.saes.files import load_coder
from mi_helpers.saes.training import TrainConfig, fit
from mi_helpers.saes.transcoders import K, load_transcoders, of_mlp_in, read_mlps, text_ids


@dataclass(frozen=True)
class SmallFit:
    """Explained variance, on fresh text, of what the MLP of the middle layer writes: by a small
    transcoder, its control, three rivals, and itself in Gemma Scope's layout, read two ways."""

    transcoder: float
    shuffled: float
    affine: float
    random: float
    published: float
    turned_back: float


@functools.cache
def small_fit(seed: int) -> SmallFit:
    """Train and compare once; text and training from the seed."""
    model = shipped_model()
    layer = model.n_layers // 2
    x, y = read_mlps(model, 16_000, 500 + seed, [layer])[layer]
    test = read_mlps(model, 3_000, 600 + seed, [layer])[layer]
    bare = read_mlps(model, 3_000, 600 + seed, [layer], source=NORMALIZED)[layer][0]
    mixed = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    config = TrainConfig(4 * model.d_model, K, steps=150, batch=512, seed=seed)
    coder, control = (fit(x, config, each) for each in (y, mixed))
    with tempfile.TemporaryDirectory() as folder:
        place = as_published(model, coder, layer, x, Path(folder) / "transcoders")
        loaded = load_coder(place)
    return SmallFit(
        explained(coder, *test),
        explained(control, *test),
        linear_explained(x, y, *test),
        explained(random_features(x, y, coder.d_latent, K, seed), *test),
        explained(loaded, bare, test[1]),
        explained(of_mlp_in(model, loaded, layer), *test),
    )


@claim(
    "transcoder-small",
    "Small transcoder of the middle MLP, 4 d_model latents, k = 16: explained variance",
    source="measured in the lesson",
    tolerance=">= 0.75",
    seeds=3,
    fast=False,
)
def explained_small(seed: int) -> float:
    """Explained variance of a small transcoder."""
    return small_fit(seed).transcoder


@claim(
    "transcoder-shuffled",
    "Negative control: the same trained on shuffled outputs",
    source="derived: an output that has nothing to do with the input cannot be foretold",
    published="0",
    tolerance="± 0.05",
    seeds=3,
    fast=False,
)
def explained_shuffled(seed: int) -> float:
    """The control of `explained_small`: shuffled outputs."""
    return small_fit(seed).shuffled


@claim(
    "transcoder-affine",
    "Explained variance of the small transcoder, less that of the best affine map",
    source="derived: above 0 only where the MLP bends",
    tolerance=">= 0.05",
    seeds=3,
    fast=False,
)
def above_affine(seed: int) -> float:
    """Explained variance of a small transcoder, less that of the best affine map."""
    return small_fit(seed).transcoder - small_fit(seed).affine


@claim(
    "transcoder-random",
    "The same, less that of random features with their best decoder",
    source="measured in the lesson",
    tolerance=">= 0.05",
    seeds=3,
    fast=False,
)
def above_random(seed: int) -> float:
    """Explained variance of a small transcoder, less that of random features."""
    return small_fit(seed).transcoder - small_fit(seed).random


@claim(
    "transcoder-neurons",
    "Shipped transcoders, less the MLP's 16 strongest neurons: explained variance, worst layer",
    source="measured in the lesson",
    tolerance=">= 0",
    seeds=3,
    fast=False,
)
def above_neurons(seed: int) -> float:
    """Explained variance of the shipped transcoders, less that of as many of the MLP's own neurons,
    in the layer where it is least."""
    model = shipped_model()
    coders, rows = load_transcoders(), read_mlps(model, 3_000, 600 + seed)
    learn = read_mlps(model, 3_000, 500 + seed)
    return min(
        explained(coders[i], x, y) - explained_by(by_neurons(model, i, K, learn[i][0]), x, y)
        for i, (x, y) in rows.items()
    )


@functools.cache
def shipped(seed: int) -> dict[tuple[str, str], Faithful]:
    """`compare` of the shipped transcoders, on text of the seed."""
    model = shipped_model()
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    return compare(model, batch, {"transcoder": by_coders(load_transcoders())})


def one_by_one(seed: int) -> list[float]:
    """Nats that each transcoder adds alone."""
    return [each.added for (where, _), each in shipped(seed).items() if where != ALL_LAYERS]


@claim(
    "transcoders-single",
    "One MLP replaced by its transcoder: nats added per answer, worst layer",
    source="Dunefsky et al. 2024, faithfulness of transcoders",
    tolerance="<= 0.15",
    seeds=3,
    fast=False,
)
def most_added(seed: int) -> float:
    """Nats per answer that one transcoder adds, in the layer where it is most."""
    return max(one_by_one(seed))


@claim(
    "transcoders-all",
    "All MLPs replaced: share of the loss recovered, against zeros",
    source="Dunefsky et al. 2024, faithfulness of transcoders",
    tolerance=">= 0.95",
    seeds=3,
    fast=False,
)
def all_layers(seed: int) -> float:
    """Loss recovered with all MLPs replaced at once."""
    return shipped(seed)[ALL_LAYERS, "transcoder"].recovered


def replaced_by(seed: int, by: Mapping[int, Replacement]) -> Faithful:
    """All MLPs replaced in another way, on the text of `shipped`."""
    model, known = shipped_model(), shipped(seed)[ALL_LAYERS, "transcoder"]
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    return Faithful(known.clean, losses(model, batch, by), known.zero)


@claim(
    "transcoders-family",
    "The same, in the family of text that suffers most",
    source="measured in the lesson",
    tolerance=">= 0.85",
    seeds=3,
    fast=False,
)
def worst_family(seed: int) -> float:
    """Loss recovered with all MLPs replaced, in the family where it is least."""
    return min(shipped(seed)[ALL_LAYERS, "transcoder"].by_family().values())


@functools.cache
def rivals_added(seed: int) -> dict[str, dict[str, float]]:
    """`rivals` at 16 units per token, on forty answers of each family."""
    model, rows = shipped_model(), read_mlps(shipped_model(), 3_000, 500 + seed)
    batch = make_batch(model, answers=40, seed=40_000 + 1_000 * seed)
    return rivals(model, dict(enumerate(load_transcoders())), rows, batch, K)


@claim(
    "transcoders-rival",
    "All MLPs replaced, 16 units per token: |ln| of nats added by latents over those by neurons",
    source="measured in the lesson",
    tolerance="<= 0.7",
    seeds=3,
    fast=False,
)
def cost_against_neurons(seed: int) -> float:
    """0 where 16 latents per token cost, in every layer, what the 16 strongest neurons cost."""
    latents, neurons = (mean_loss(each) for each in rivals_added(seed).values())
    return abs(math.log(latents / neurons))


@claim(
    "transcoders-rival-skills",
    "The same: nats by which latents harm arithmetic more, or neurons repetition, the smaller",
    source="measured in the lesson",
    tolerance=">= 0.05",
    seeds=3,
    fast=False,
)
def different_skills(seed: int) -> float:
    """Latents and neurons cost the model much the same, and other skills."""
    latents, neurons = rivals_added(seed).values()
    more = {name: latents[name] - neurons[name] for name in latents}
    return min(more["arithmetic"], -more["repetition"])


@claim(
    "transcoders-skip",
    "All MLPs replaced by transcoders with a skip path: share of the loss recovered",
    source="Paulo et al. 2025, Transcoders Beat Sparse Autoencoders for Interpretability",
    tolerance=">= 0.95",
    seeds=3,
    fast=False,
)
def all_layers_skip(seed: int) -> float:
    """Loss recovered with all MLPs replaced by transcoders with a skip path."""
    return replaced_by(seed, by_coders(load_transcoders(skip=True))).recovered


@claim(
    "transcoders-biases",
    "Negative control: the same transcoders with no latent firing",
    source="measured in the lesson",
    tolerance="<= 0.5",
    seeds=3,
    fast=False,
)
def biases_alone(seed: int) -> float:
    """The control of `all_layers`: the same transcoders with no latent firing."""
    coders = load_transcoders()
    return replaced_by(
        seed, {i: without_latents(coder) for i, coder in enumerate(coders)}
    ).recovered


@claim(
    "transcoders-compound",
    "Nats added with all MLPs replaced, less the sum of the single replacements",
    source="measured in the lesson",
    tolerance=">= 0.01",
    seeds=3,
    fast=False,
)
def compounding(seed: int) -> float:
    """Nats added by all transcoders at once, less the sum of what each adds alone."""
    return shipped(seed)[ALL_LAYERS, "transcoder"].added - sum(one_by_one(seed))


@functools.cache
def rules_predicted(seed: int) -> list[tuple[float, float]]:
    """`predicted_tokens` of each shipped transcoder, (share, control), on text of the seed."""
    model = shipped_model()
    with tempfile.TemporaryDirectory() as folder:
        pages = make_pages(model, load_transcoders(), Path(folder), 8_000, seed=800 + seed)
        return [predicted_tokens(page, layer) for layer, page in pages.items()]


@claim(
    "rules-foretold",
    "Layer 0: share of latents whose word is among 10 that the embedding foretells",
    source="Dunefsky et al. 2024, de-embeddings",
    tolerance=">= 0.5",
    seeds=3,
    fast=False,
)
def words_predicted_first(seed: int) -> float:
    """The share of latents whose word the embedding predicts, first layer."""
    return rules_predicted(seed)[0][0]


@claim(
    "rules-foretold-last",
    "The same in the last layer: what a latent reads there is no word",
    source="measured in the lesson",
    tolerance="<= 0.25",
    seeds=3,
    fast=False,
)
def words_predicted_last(seed: int) -> float:
    """The same in the last layer."""
    return rules_predicted(seed)[-1][0]


@claim(
    "rules-exchanged",
    "Negative control of the first: predictions of other latents",
    source="measured in the lesson",
    tolerance="<= 0.15",
    seeds=3,
    fast=False,
)
def words_predicted_exchanged(seed: int) -> float:
    """The control of `words_predicted_first`: predictions of other latents."""
    return rules_predicted(seed)[0][1]


@functools.cache
def written_at(seed: int, layer: int) -> WriteEffects:
    """`write_effects` for 160 firings of a layer's shipped transcoder."""
    model = shipped_model()
    ids = [each for each in text_ids(model, 6_000, 900 + seed) if len(each) > 3][:160]
    return write_effects(model, load_transcoders()[layer], layer, ids, seed)


@claim(
    "rules-written",
    "Last layer: correlation of foretold and true change of the logits, median firing",
    source="derived: 1 but for the final norm and the rest of the stream",
    tolerance=">= 0.85",
    seeds=3,
    fast=False,
)
def written_last(seed: int) -> float:
    """Correlation of predicted and true change of the logits, last layer, median over firings."""
    return float(np.median(written_at(seed, shipped_model().n_layers - 1).own))


@claim(
    "rules-written-first",
    "The same in layer 0: later layers answer what was written",
    source="measured in the lesson",
    tolerance="<= 0.8",
    seeds=3,
    fast=False,
)
def written_first(seed: int) -> float:
    """The same in the first layer."""
    return float(np.median(written_at(seed, 0).own))


@claim(
    "rules-written-exchanged",
    "Negative control, last layer: predictions of other latents",
    source="derived: unrelated directions",
    published="0",
    tolerance="± 0.3",
    seeds=3,
    fast=False,
)
def written_exchanged(seed: int) -> float:
    """The control of `written_last`: predictions of other latents."""
    return float(np.median(written_at(seed, shipped_model().n_layers - 1).other))


@functools.cache
def currency_writers(seed: int) -> list[Strongest]:
    """`strongest_writers` of a dozen countries of the seed."""
    drawn = random.Random(seed).sample(with_own_currency(), 12)
    return strongest_writers(shipped_model(), dict(enumerate(load_transcoders())), drawn)


@claim(
    "rule-silenced",
    "The rule that writes a currency most, silenced: share of the currency's lead lost, median",
    source="measured in the lesson",
    tolerance=">= 0.06",
    seeds=3,
    fast=False,
)
def currency_lost(seed: int) -> float:
    """Median, over countries, of what silencing the strongest rule takes from the currency's logit
    above the others' mean."""
    return float(np.median([each.own for each in currency_writers(seed)]))


@claim(
    "rule-silenced-others",
    "Negative control: the same rules, what other countries' currencies lose, median",
    source="measured in the lesson",
    published="0",
    tolerance="± 0.03",
    seeds=3,
    fast=False,
)
def others_lost(seed: int) -> float:
    """The control of `currency_lost`: other countries' currencies."""
    return float(np.median([each.others for each in currency_writers(seed)]))


@claim(
    "rule-of-a-country",
    "The same rules: what the country's capital loses, over what its currency does, medians",
    source="measured in the lesson",
    tolerance=">= 0.5",
    seeds=3,
    fast=False,
)
def capital_over_currency(seed: int) -> float:
    """Near 1, the rules write the country and whatever is asked of it; near 0, its currency."""
    found = currency_writers(seed)
    return float(np.median([each.capital for each in found]) / currency_lost(seed))


@functools.cache
def shipped_pairs(seed: int) -> ActivePairs:
    """`active_pairs` of three prompts of the seed."""
    model = shipped_model()
    texts = [model.tokenizer.decode(ids[1:13]) for ids in text_ids(model, 400, 700 + seed)[:3]]
    return active_pairs(model, load_transcoders(), texts)


@claim(
    "virtual-same",
    "Correlation of virtual weight and true edge, features at one position",
    source="Dunefsky et al. 2024; Ameisen et al. 2025, Circuit Tracing, Global Weights",
    tolerance=">= 0.7",
    seeds=3,
)
def virtual_correlation(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at one position."""
    return shipped_pairs(seed).correlation()


@claim(
    "virtual-across",
    "The same between positions, where only attention leads",
    source="derived: no direct path between positions",
    published="0",
    tolerance="± 0.3",
    seeds=3,
)
def virtual_correlation_across(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at different positions."""
    return shipped_pairs(seed).correlation(same_position=False)


@claim(
    "virtual-even",
    "Between positions, all weights but with attention spread evenly: the pattern is missing",
    source="measured in the lesson",
    tolerance="<= 0.85",
    seeds=3,
)
def even_correlation_across(seed: int) -> float:
    """The same of all weights, the heads' too, with attention spread evenly."""
    return shipped_pairs(seed).correlation(same_position=False, of="even")


@claim(
    "gemma-scope-layout",
    "Gemma Scope's layout, without the gain: explained variance, less that turned back",
    source="derived: the gain has changed places, nothing else; Lieberum et al. 2024, Gemma Scope",
    published="0",
    tolerance="± 0.01",
    seeds=3,
    fast=False,
)
def layouts_differ(seed: int) -> float:
    """Explained variance of a transcoder in Gemma Scope's layout, reading the stream without the
    norm's gain, less that of the same one turned back to `mlp_in`."""
    return small_fit(seed).published - small_fit(seed).turned_back
