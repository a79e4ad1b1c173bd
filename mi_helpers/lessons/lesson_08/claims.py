"""Lesson 08's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.graphs import Graph, graph_scores, prune, random_graph
from mi_helpers.circuits.names import Namer
from mi_helpers.circuits.queries import QKAttribution, qk_attribution, score_gradient
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_08 import naming
from mi_helpers.lessons.lesson_08.controls import DONORS, Donors, donors, random_share, singles
from mi_helpers.lessons.lesson_08.experiments import read_sentences, shuffled
from mi_helpers.lessons.lesson_08.looking import where_it_looks
from mi_helpers.lessons.lesson_08.prompts import questions, repeated, unseen_hops, what_is_asked
from mi_helpers.lessons.lesson_08.stories import Story, observe, share_of_gap, shipped_steps


@cache
def _graphs(seed: int) -> list[Graph]:
    """The graphs of fourteen questions."""
    model, coders, _ = shipped_steps()
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
    model, coders, _ = shipped_steps()
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
    model, _, steps = shipped_steps()
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
    return share_of_gap(*shipped_steps()[:2], _stories(seed, "country"), "swap")


@claim(
    "two-hop-pair",
    "The same with features of this country and question alone",
    source="measured in the lesson",
    tolerance=">= -0.7",
    fast=False,
)
def pair_swap(seed: int) -> float:
    """The same with the features of step "pair"."""
    return share_of_gap(*shipped_steps()[:2], _stories(seed, "pair"), "swap")


@claim(
    "two-hop-both",
    "The same with both; -2 would be all that differs",
    source="measured in the lesson",
    tolerance="<= -1",
    fast=False,
)
def both_swap(seed: int) -> float:
    """The same with the features of step "country or pair"."""
    return share_of_gap(*shipped_steps()[:2], _stories(seed, "country or pair"), "swap")


@claim(
    "two-hop-random",
    "Negative control: as many features, of the same layers and positions, as active, taken out",
    source="derived: nothing that is asked for changes",
    published="0",
    tolerance="± 0.1",
)
def country_random(seed: int) -> float:
    """The control of `country_swap`: `random_share`."""
    return random_share(*shipped_steps()[:2], _stories(seed, "country"))


@claim(
    "asked-swap",
    "Features of what is asked swapped: change of the logit gap, as a share",
    source="Ameisen et al. 2025, Circuit Tracing; circuit-tracer's demonstration, say a capital",
    tolerance="<= -1",
)
def asked_swap(seed: int) -> float:
    """The same with the features of step "asked"."""
    return share_of_gap(*shipped_steps()[:2], _stories(seed, "asked"), "swap")


@cache
def _tested(seed: int) -> np.ndarray:
    """(predicted, observed) of suppress and swap of twenty stories of steps."""
    model, coders, _ = shipped_steps()
    told = _stories(seed, "country") + _stories(seed, "asked")
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
    return float(np.corrcoef(_tested(seed))[0, 1])


@claim(
    "story-size",
    "The same stories: observed change over the predicted one",
    source="derived: 1 in the replacement model",
    published="1",
    tolerance="± 0.35",
)
def size_of_steps(seed: int) -> float:
    """Σ observed over Σ predicted change, stories of steps."""
    predicted, observed = _tested(seed).sum(1)
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
    model, coders, _ = shipped_steps()
    return singles(model, coders, questions(model, 4, seed), seed=seed).correlation()


# ------------------------------------------------------------------------------------- donors


@cache
def _donors(seed: int) -> Donors:
    """Swaps from donors that ask the same, and from donors that ask something else."""
    return donors(*shipped_steps(), DONORS, seed)


@claim(
    "donor-same",
    "The country swapped from a donor that asks the same: change of the gap, as a share",
    source="measured in the lesson",
    tolerance="<= -0.8",
    seeds=3,
    fast=False,
)
def donor_same(seed: int) -> float:
    """The mean change of the gap over the gap, donors that ask the same."""
    return float(_donors(seed).change[:, 0].mean())


@claim(
    "donor-other",
    "The same from a donor that asks something else",
    source="measured in the lesson",
    tolerance="<= -0.7",
    seeds=3,
    fast=False,
)
def donor_other(seed: int) -> float:
    """The same of donors that ask something else."""
    return float(_donors(seed).change[:, 1].mean())


# -------------------------------------------------------------------------------------- names


@cache
def _names(seed: int) -> tuple[Namer, list[Graph]]:
    """Names from other sentences and documents for each seed, and pruned graphs of questions."""
    model, coders, _ = shipped_steps()
    namer = naming.make_namer(model, coders, read_sentences(model, seed=seed), seed=seed)
    return namer, [prune(graph) for graph in _graphs(seed)]


@claim(
    "named-nodes",
    "Share of the features of pruned graphs that have a name with a score",
    source="measured in the lesson; every latent that fires in the text gets a name",
    tolerance=">= 0.8",
    seeds=3,
    fast=False,
)
def named(seed: int) -> float:
    """The mean share over fourteen graphs."""
    namer, kept = _names(seed)
    return float(np.mean([naming.named_share(namer, graph)[0] for graph in kept]))


@claim(
    "names-score",
    "Median F1 of those names, on tokens held out",
    source="measured in the lesson",
    tolerance=">= 0.4",
    seeds=3,
    fast=False,
)
def names_score(seed: int) -> float:
    """The median F1 on tokens held out."""
    return float(np.median(naming.scores(*_names(seed))))


@claim(
    "names-control",
    "Negative control: the same with the name of another latent of the layer",
    source="derived: another latent fires elsewhere",
    tolerance="<= 0.15",
    seeds=3,
    fast=False,
)
def names_of_others(seed: int) -> float:
    """The control: the median F1 of another latent's name."""
    return float(np.median(naming.scores(*_names(seed), other=True)))


# ------------------------------------------------------------------------------ QK attribution


@cache
def _looks(seed: int) -> list[tuple[QKAttribution, float, str]]:
    """In texts of random words, why the head that looks most at what came after the earlier copy
    looks there: (attribution, the largest difference from autograd, prompt)."""
    model, coders, _ = shipped_steps()
    found = []
    for question in repeated(model, 7, seed):
        layer, head, here, there = where_it_looks(model, question.prompt)
        local = LocalReplacement(model, coders, question.prompt)
        others = [place for place in range(1, here + 1) if place != there]
        where = local, layer, head, here, there, others
        why, gradient = qk_attribution(*where), score_gradient(*where)
        mine = dict(zip(why.nodes, why.gradient().tolist(), strict=True))
        off = max(abs(mine[node] - value) for node, value in gradient.items())
        found.append((why, off, question.prompt))
    return found


@claim(
    "qk-sum",
    "Largest |Σ products - score| of a head, 7 texts of random words",
    source="Kamath et al. 2025, Tracing Attention Computation; derived: 0 but for rounding",
    published="0",
    tolerance="<= 1e-3",
)
def products_off(seed: int) -> float:
    """The largest |Σ products - score|."""
    return max(abs(float(why.products.sum()) - why.score) for why, _, _ in _looks(seed))


@claim(
    "qk-gradient",
    "Largest |row + column - gradient of the score by autograd|, the same texts",
    source="derived: 0 but for rounding",
    published="0",
    tolerance="<= 1e-3",
)
def gradient_off(seed: int) -> float:
    """The largest difference between `QKAttribution.gradient` and autograd."""
    return max(off for _, off, _ in _looks(seed))


@claim(
    "qk-same-word",
    "Share of the score that is products of the copied word with itself, median of 7 texts",
    source="Elhage et al. 2021: induction heads match a token with its earlier copy",
    tolerance=">= 0.5",
)
def same_word(seed: int) -> float:
    """Σ products written at the last word and at its earlier copy, over the score."""
    model, shares = shipped_steps()[0], []
    for why, _, prompt in _looks(seed):
        ids = model.tokens(prompt)[0]
        copy = int((ids[:-1] == ids[-1]).nonzero()[-1])
        at = torch.tensor([node.position for node in why.nodes])
        pairs = why.products[:-1, :-1][at == len(ids) - 1][:, at == copy]
        shares.append(float(pairs.sum()) / why.score)
    return float(np.median(shares))
