"""Lesson 06's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_06 import universality
from mi_helpers.lessons.lesson_06.experiments import (
    K,
    at_a_topics_words,
    at_equal_l0,
    experiment,
    fit_plane,
    in_control,
    middle,
    of_topics,
    random_direction,
    read_grid,
    select,
    starts,
    stream_rows,
    structure,
    told,
    topic_words,
    turned_up,
)
from mi_helpers.lessons.lesson_06.image_coding import (
    learn,
    localised_and_oriented,
    patches,
    photographs,
    principal_components,
    whiten,
)
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.saes.concepts import own_latents
from mi_helpers.saes.labels import labelled_tokens
from mi_helpers.saes.similarity import gaussian_like, random_like, share_found
from mi_helpers.saes.training import TrainConfig, fit


def filters_of(what: str, seed: int, n: int = 20_000) -> Tensor:
    """The filters learned from "photographs", those of their "components", or those learned from
    "gaussian" patches of equal covariance."""
    x = patches([whiten(image) for image in photographs()], n, seed=seed)
    if what == "components":
        return principal_components(x)
    return learn(gaussian_like(x, seed) if what == "gaussian" else x, seed=seed)


@claim(
    "image-filters",
    "Sparse coding of natural images: share of filters that are localised and oriented",
    source="Olshausen and Field 1996, Emergence of simple-cell receptive field properties, "
    "figure 4",
    tolerance=">= 0.35",
)
def learned_share(seed: int) -> float:
    """The share of learned filters that are localised and oriented."""
    return localised_and_oriented(filters_of("photographs", seed))


@claim(
    "image-components",
    "Negative control: the same share of the patches' principal components",
    source="Olshausen and Field 1996, figure 1",
    published="0",
    tolerance="± 0.05",
)
def component_share(seed: int) -> float:
    """The same of the principal components: a control."""
    return localised_and_oriented(filters_of("components", seed))


@claim(
    "image-gaussian",
    "Negative control: the same share learned from Gaussian patches of equal covariance",
    source="derived: nothing but pairwise statistics, so no direction is sparser than another",
    published="0",
    tolerance="± 0.05",
    fast=False,
)
def gaussian_share(seed: int) -> float:
    """The same of filters learned from Gaussian patches of equal covariance: a control."""
    return localised_and_oriented(filters_of("gaussian", seed))


@claim(
    "sae-explained",
    "SAE, 8 d_model latents, k = 8, middle layer: explained variance on held-out text",
    source="measured in the lesson; the reference run on Gemma 2 2B has 0.784 with k = 32",
    tolerance=">= 0.8",
    seeds=3,
    fast=False,
)
def explained(seed: int) -> float:
    """Explained variance on held-out text."""
    return experiment(seed).quality["explained_variance"]


@claim(
    "sae-recovered",
    "The same SAE spliced into the model: share of the loss recovered, against zeros",
    source="measured in the lesson",
    tolerance=">= 0.75",
    seeds=3,
    fast=False,
)
def loss_recovered(seed: int) -> float:
    """The share of the loss that comes back with the SAE spliced in, against zeros."""
    return experiment(seed).recovered


@claim(
    "sae-dead",
    "The same SAE: share of latents that never fire in 100,000 tokens",
    source="measured in the lesson; the reference run has 0.0036",
    tolerance="<= 0.1",
    seeds=3,
    fast=False,
)
def dead_share(seed: int) -> float:
    """The share of latents that never fire in 100,000 tokens."""
    return experiment(seed).dead


@claim(
    "concepts-latents",
    "Six concepts, text of all families: F1 of the best latent of the shipped SAE, median",
    source="Gao et al. 2024, Scaling and evaluating sparse autoencoders, probe loss",
    tolerance=">= 0.7",
    seeds=3,
    fast=False,
)
def median_f1(seed: int, unit: str = "SAE latent") -> float:
    """Median over the six concepts of the F1 of each concept's best unit, shipped SAE."""
    return told(seed).judged[unit].median


@claim(
    "concepts-over-neurons",
    "The same, less that of the best neuron of the block or any below it, either sign",
    source="Bricken et al. 2023, Towards Monosemanticity: features against neurons",
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def gain_over_neurons(seed: int) -> float:
    """`median_f1` of the best latents, less that of the best neurons."""
    return median_f1(seed) - median_f1(seed, "neuron of a block below")


@claim(
    "concepts-over-means",
    "The same, less that of a difference of means with labels",
    source="measured in the lesson",
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def gain_over_means(seed: int) -> float:
    """`median_f1` of the best latents, less that of directions from mean to mean."""
    return median_f1(seed) - median_f1(seed, "difference of means")


@claim(
    "concepts-over-probe",
    "The same, less that of a logistic probe with labels: latents come near it without any",
    source="measured in the lesson",
    published="0",
    tolerance="± 0.15",
    seeds=3,
    fast=False,
)
def gain_over_probe(seed: int) -> float:
    """`median_f1` of the best latents, less that of logistic probes."""
    return median_f1(seed) - median_f1(seed, "logistic probe")


@claim(
    "concepts-norwegian",
    "Norwegian: F1 of a logistic probe, less that of the best latent",
    source="measured in the lesson: the concept is split over many latents",
    tolerance=">= 0.2",
    seeds=3,
    fast=False,
)
def probe_over_latent_of_norwegian(seed: int) -> float:
    """How far the best latent of Norwegian stays behind a probe."""
    judged = told(seed).judged
    return judged["logistic probe"].f1["norwegian"] - judged["SAE latent"].f1["norwegian"]


@claim(
    "concepts-directions",
    "Control: F1 of the best of as many random directions",
    source="measured in the lesson",
    tolerance="<= 0.6",
    seeds=3,
    fast=False,
)
def median_f1_of_directions(seed: int) -> float:
    """The control of `median_f1`: best random directions."""
    return median_f1(seed, "random direction")


@claim(
    "concepts-always",
    "Control: F1 of firing at every token",
    source="derived: 2p / (1 + p) at a share of p",
    tolerance="<= 0.2",
    seeds=3,
    fast=False,
)
def median_f1_of_always(seed: int) -> float:
    """The control of `median_f1` that knows nothing."""
    return median_f1(seed, "always fires")


@claim(
    "concepts-untrained",
    "Control: the same with the best latent of a brief SAE of a model with random weights",
    source="Heap et al. 2025, Sparse Autoencoders Can Interpret Randomly Initialized Transformers",
    tolerance="<= 0.45",
    seeds=3,
    fast=False,
)
def median_f1_untrained(seed: int) -> float:
    """The control of `median_f1`: best latents of a brief SAE of a model with random weights."""
    return in_control("random weights", shipped_model(), seed)["F1"]


@claim(
    "latents-turned-up",
    "p(topic's nouns) with its latent at 1.5 times its highest value, over a random direction's",
    source="Templeton et al. 2024, Scaling Monosemanticity, feature steering",
    tolerance=">= 3",
    seeds=3,
    fast=False,
)
def turned_up_over_random(seed: int) -> float:
    """The probability of a topic's nouns, means over the topics, with the latent's direction added
    to the stream and with a random one of the same length: their ratio."""
    model, outcome = shipped_model(), told(seed)
    ids, site = starts(model, seed=seed), middle(model)
    found = {"latent": 0.0, "random": 0.0}
    for topic, latent in outcome.latents.items():
        if topic == "norwegian":
            continue
        nouns, strength = topic_words(model, topic), 1.5 * float(outcome.highest[latent])
        ways = {
            "latent": outcome.coder.W_dec[latent].detach(),
            "random": random_direction(outcome.coder, seed),
        }
        for name, direction in ways.items():
            p = turned_up(model, ids, site, direction, strength)
            found[name] += float(p[:, 1:, nouns].sum(-1).mean())
    return found["latent"] / found["random"]


@claim(
    "purity-of-words",
    "Token purity of SAE latents: model with its embedding alone trained, over tiny-gemma",
    source="Heap et al. 2025, Sparse Autoencoders Can Interpret Randomly Initialized Transformers",
    tolerance=">= 0.7",
    seeds=3,
    fast=False,
)
def purity_of_words_alone(seed: int) -> float:
    """Mean token purity of the latents of an SAE of a model that has only its embedding, over that
    of the trained model's: how clear the latents of a model look that computes nothing."""
    return experiment(seed, "trained embedding only").purity / experiment(seed).purity


@claim(
    "sae-gaussian",
    "Explained variance of a small SAE, less that on Gaussian rows of equal covariance",
    source="derived: above 0 only where activations are sparse in some directions",
    tolerance=">= 0.05",
    seeds=3,
    fast=False,
)
def gaussian_gap(seed: int) -> float:
    """Explained variance of a small SAE on real activations, less that of one on Gaussian rows of
    equal covariance: the sparse structure that the covariance does not have."""
    return structure(stream_rows(shipped_model(), 20_000, 300 + seed), seed=seed)["gap"]


@claim(
    "sae-seeds",
    "Two seeds: share of latents found again, less that of random directions like them",
    source="Paulo and Belrose 2025, SAEs Trained on the Same Data Learn Different Features",
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def shared_beyond_chance(seed: int) -> float:
    """Two SAEs that differ in seed and text: the share of shared latents, less that of random
    directions of the same covariance."""
    one, other = (experiment(s).coder.W_dec.detach() for s in (seed, (seed + 1) % 3))
    return share_found(one, other) - share_found(random_like(one, seed), other)


@functools.cache
def elsewhere(seed: int) -> dict[str, float]:
    """How many latents of a small SAE are found again elsewhere."""
    return universality.shares(shipped_model(), seed)


@claim(
    "twin-latents",
    "Latents that fire alike in the twin, share, less that in a model with its embedding alone",
    source="Olah et al. 2020, Zoom In, claim 3: universality",
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def shared_with_the_twin(seed: int) -> float:
    """Latents of a small SAE with a partner (correlation above 0.7 on the same text) in that of the
    twin: their share, less the share with one in a model that has words and computes nothing."""
    return elsewhere(seed)["the twin"] - elsewhere(seed)["trained embedding only"]


@claim(
    "twin-against-seeds",
    "Latents that fire alike in the twin, over those in another seed's dictionary of one model",
    source="measured in the lesson: two models differ more than two dictionaries of one",
    tolerance="<= 0.9",
    seeds=3,
    fast=False,
)
def twin_over_seeds(seed: int) -> float:
    """The share of latents with a partner in the twin, over that in another seed's dictionary."""
    return elsewhere(seed)["the twin"] / elsewhere(seed)["another seed"]


def grid_rows(**wanted) -> list[dict]:
    """Rows of the shipped table."""
    return select(read_grid(), **wanted)


@claim(
    "topk-against-l1",
    "nMSE of ReLU with L1 over that of TopK at equal L0 and width (shipped table)",
    source="Gao et al. 2024, figure 2; Rajamanoharan et al. 2024, Gated SAEs",
    tolerance=">= 1",
    seeds=1,
)
def gain_over_l1(seed: int) -> float:
    """nMSE of ReLU with L1 over that of TopK, at the L0 of k = 8 and equal width: from the shipped
    table, whatever the seed."""
    relu = {row["l0"]: row["nmse"] for row in grid_rows(activation="relu")}
    width = grid_rows(activation="relu")[0]["width"]
    topk = grid_rows(activation="topk", width=width, k=K, seed=0)[0]
    return at_equal_l0(topk["l0"], relu) / topk["nmse"]


@claim(
    "concepts-together",
    "Topics' best latents at the topic's words, one in 24 random words, over lists of them alone",
    source="measured in the lesson: such a latent says what the text is about, not which word",
    tolerance="<= 0.2",
    seeds=3,
    fast=False,
)
def value_alone(seed: int) -> float:
    """The latents that are best for a topic, at the topic's words in lists: their value where one
    word in 24 is the topic's and the rest are random, over that where all are. Means of topics."""
    model, outcome = shipped_model(), told(seed)
    found = {
        share: [
            at_a_topics_words(model, outcome.coder, latent, topic, share, n=100, seed=seed)
            for topic, latent in outcome.latents.items()
            if topic != "norwegian"
        ]
        for share in (1 / 24, 1.0)
    }
    return float(np.mean(found[1 / 24]) / np.mean(found[1.0]))


@functools.cache
def narrow_and_wide(seed: int) -> tuple[dict[str, int], dict[str, int]]:
    """`own_latents` of an SAE of 2 d_model and of one of 16 d_model, k = 8, on the same text."""
    model = shipped_model()
    x = stream_rows(model, 100_000, 400 + seed)
    tokens = labelled_tokens(model, middle(model), 16_000, 500 + seed)
    configs = (
        TrainConfig(width * model.d_model, K, steps=400, batch=1_024, seed=seed)
        for width in (2, 16)
    )
    narrow, wide = (own_latents(fit(x, config), tokens) for config in configs)
    return narrow, wide


@claim(
    "splitting",
    "Latents of Norwegian alone: an SAE of 16 d_model over one of 2 d_model, k = 8",
    source="Bricken et al. 2023, Towards Monosemanticity, feature splitting",
    tolerance=">= 1.5",
    seeds=3,
    fast=False,
)
def splitting(seed: int) -> float:
    """Latents of Norwegian alone in an SAE of 16 d_model, over those in one of 2 d_model."""
    narrow, wide = narrow_and_wide(seed)
    return wide["norwegian"] / max(narrow["norwegian"], 1)


@claim(
    "splitting-topics",
    "The other concepts there: latents of a topic alone at 16 d_model, mean of 28 topics",
    source="measured in the lesson: one direction or two say what there is to say",
    tolerance="<= 2",
    seeds=3,
    fast=False,
)
def latents_of_a_topic(seed: int) -> float:
    """Latents of a topic alone in an SAE of 16 d_model, mean of the topics."""
    return of_topics(narrow_and_wide(seed)[1])


@claim(
    "scaling-law",
    "R² of log nMSE as a plane over log width and log k (shipped table, 25 runs)",
    source="Gao et al. 2024, figure 1",
    tolerance=">= 0.9",
    seeds=1,
)
def scaling_fit(seed: int) -> float:
    """R² of log nMSE as a plane over log width and log k, in the shipped table."""
    rows = grid_rows(activation="topk", seed=0)
    return fit_plane(*([row[name] for row in rows] for name in ("width", "k", "nmse"))).r_squared
