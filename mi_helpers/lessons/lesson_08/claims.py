"""Lesson 08's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

from functools import cache

import numpy as np

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.graphs import Graph, graph_scores, random_graph
from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_08.experiments import (
    latent_labels,
    read_sentences,
    shuffled,
)
from mi_helpers.lessons.lesson_08.prompts import questions, unseen_hops, what_is_asked
from mi_helpers.lessons.lesson_08.stories import (
    Steps,
    Story,
    label_story,
    observe,
    random_share,
    share_of_gap,
    singles,
)
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.transcoders import coders_for


@cache
def _shipped() -> tuple[LanguageModel, dict, Steps]:
    """The shipped model, its transcoders, and the steps."""
    model = shipped_model()
    coders = coders_for(model, range(model.n_layers))
    return model, coders, Steps(model, coders, read_sentences(model))


@cache
def _graphs(seed: int) -> list[Graph]:
    """The graphs of fourteen questions."""
    model, coders, _ = _shipped()
    return [attribution_graph(model, coders, q.prompt) for q in questions(model, 14, seed)]


@claim(
    "circuit-edges",
    "Largest |Σ edges + bias - value| over features and demeaned logits, 14 graphs",
    source="Ameisen et al. 2025, Circuit Tracing, Constructing an Attribution Graph; derived: 0",
    published="0",
    tolerance="<= 1e-4",
)
def edges_off(seed: int) -> float:
    """The largest |Σ edges + bias - value| of a feature's pre-activation or a demeaned logit."""
    return max(graph.edge_error.absolute for graph in _graphs(seed))


@claim(
    "circuit-edges-scaled",
    "The same, each over the Σ |edges| + |bias| of its node",
    source="derived: 0 but for rounding",
    published="0",
    tolerance="<= 1e-4",
)
def edges_off_scaled(seed: int) -> float:
    """The same, each divided by the Σ |edges| + |bias| of its node."""
    return max(graph.edge_error.scaled for graph in _graphs(seed))


@claim(
    "circuit-replacement",
    "Median replacement score of whole graphs, 14 prompts",
    source="Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
    tolerance=">= 0.7",
)
def median_replacement(seed: int) -> float:
    """The median replacement score of whole graphs."""
    return float(np.median([graph_scores(graph)[0] for graph in _graphs(seed)]))


@claim(
    "circuit-completeness",
    "Median completeness score of the same graphs",
    source="Ameisen et al. 2025, Circuit Tracing, Attribution Graph Evaluation; measured here",
    tolerance=">= 0.85",
)
def median_completeness(seed: int) -> float:
    """The median completeness score of whole graphs."""
    return float(np.median([graph_scores(graph)[1] for graph in _graphs(seed)]))


@claim(
    "circuit-exchanged",
    "Negative control: replacement score, decoder rows exchanged among latents",
    source="measured in the lesson",
    tolerance="<= 0.55",
)
def exchanged_replacement(seed: int) -> float:
    """The control: the same replacement score with the latents' decoder rows exchanged."""
    model, coders, _ = _shipped()
    exchanged = shuffled(coders, seed)
    graphs = [attribution_graph(model, exchanged, q.prompt) for q in questions(model, 14, seed)]
    return float(np.median([graph_scores(graph)[0] for graph in graphs]))


@claim(
    "circuit-dealt",
    "What the score does not see: the same with all edges dealt out anew",
    source="derived: errors are few among the possible sources",
    tolerance=">= 0.7",
)
def dealt_replacement(seed: int) -> float:
    """What the score does not see: the same score of `random_graph`."""
    return float(np.median([graph_scores(random_graph(g, seed))[0] for g in _graphs(seed)]))


@cache
def _stories(seed: int, step: str) -> list[Story]:
    """Ten stories of one step, of two-hop questions that training never showed; for "asked", of
    questions whose partner asks for something else."""
    model, _, steps = _shipped()
    make = what_is_asked if step == "asked" else unseen_hops
    return [steps.story(q, step) for q in make(model, 10, seed)]


@claim(
    "two-hop-country",
    "Never-seen two hops, the country's features swapped: change of the logit gap, as a share",
    source="Lindsey et al. 2025, On the Biology of a Large Language Model, multi-step reasoning",
    tolerance="<= -0.6",
)
def country_swap(seed: int) -> float:
    """`share_of_gap` of ten two-hop questions when the country's features are swapped for those of
    the partner's country."""
    return share_of_gap(*_shipped()[:2], _stories(seed, "country"), "swap")


@claim(
    "two-hop-pair",
    "The same with features of this country and question alone",
    source="measured in the lesson",
    tolerance=">= -0.7",
    fast=False,
)
def pair_swap(seed: int) -> float:
    """The same with the features of step "pair"."""
    return share_of_gap(*_shipped()[:2], _stories(seed, "pair"), "swap")


@claim(
    "two-hop-both",
    "The same with both; -2 would be all that differs",
    source="measured in the lesson",
    tolerance="<= -1",
    fast=False,
)
def both_swap(seed: int) -> float:
    """The same with the features of step "country or pair"."""
    return share_of_gap(*_shipped()[:2], _stories(seed, "country or pair"), "swap")


@claim(
    "two-hop-random",
    "Negative control: as many features, of the same layers and positions, as active, taken out",
    source="derived: nothing that is asked for changes",
    published="0",
    tolerance="± 0.1",
)
def country_random(seed: int) -> float:
    """The control of `country_swap`: `random_share`."""
    return random_share(*_shipped()[:2], _stories(seed, "country"))


@claim(
    "asked-swap",
    "Features of what is asked swapped: change of the logit gap, as a share",
    source="Ameisen et al. 2025, Circuit Tracing; circuit-tracer's demonstration, say a capital",
    tolerance="<= -1",
)
def asked_swap(seed: int) -> float:
    """The same with the features of step "asked"."""
    return share_of_gap(*_shipped()[:2], _stories(seed, "asked"), "swap")


@cache
def _tested(seed: int, steps: bool) -> np.ndarray:
    """(predicted, observed) of suppress and swap: twenty stories of steps, or ten of labels."""
    model, coders, made = _shipped()
    if steps:
        told = _stories(seed, "country") + _stories(seed, "asked")
    else:
        labels = latent_labels(model, coders, made.reading)
        told = [label_story(model, coders, q, labels) for q in questions(model, 10, seed)]
    rows = [(s.suppress, observe(model, coders, s, "suppress")) for s in told]
    rows += [(s.swap, observe(model, coders, s, "swap")) for s in told]
    return np.array(rows).T


@claim(
    "story-correlation",
    "Correlation of predicted and observed change, suppress and swap, 20 stories of steps",
    source="Ameisen et al. 2025, Circuit Tracing, Validating with Interventions",
    tolerance=">= 0.7",
)
def predicted_steps(seed: int) -> float:
    """Correlation of the predicted with the observed change, stories of steps."""
    return float(np.corrcoef(_tested(seed, True))[0, 1])


@claim(
    "story-size",
    "The same stories: observed change over the predicted one",
    source="derived: 1 in the replacement model",
    published="1",
    tolerance="± 0.35",
)
def size_of_steps(seed: int) -> float:
    """Σ observed over Σ predicted change, stories of steps."""
    predicted, observed = _tested(seed, True).sum(1)
    return float(observed / predicted)


@claim(
    "story-size-labels",
    "The same for stories of the largest label",
    source="measured in the lesson",
    tolerance="<= 0.6",
    fast=False,
)
def size_of_labels(seed: int) -> float:
    """The same for stories of the largest label."""
    predicted, observed = _tested(seed, False).sum(1)
    return float(observed / predicted)


@claim(
    "single-correlation",
    "Correlation of predicted and observed change, single features, 4 prompts",
    source="measured in the lesson",
    tolerance=">= 0.15",
    fast=False,
)
def predicted_singles(seed: int) -> float:
    """Correlation of the predicted with the observed change, single features of four questions."""
    model, coders, _ = _shipped()
    return singles(model, coders, questions(model, 4, seed), seed=seed).correlation()
