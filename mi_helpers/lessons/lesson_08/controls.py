"""Lesson 08's controls and limits: donors, random features, single features, attention alone.

donors(model, coders, steps, 30, seed=0).first()   # the same question asked, and another
random_share(model, coders, told)                  # other features of the same places
singles(model, coders, asked)                      # features removed one at a time
attention_alone(model, question)                   # what no edge of a graph shows
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mi_helpers.circuits.graphs import FEATURE
from mi_helpers.circuits.interventions import intervene
from mi_helpers.circuits.replacement import Coders, LocalReplacement
from mi_helpers.lessons.lesson_08.experiments import contributions, question_graph
from mi_helpers.lessons.lesson_08.prompts import Question, other_question, paired
from mi_helpers.lessons.lesson_08.stories import (
    Steps,
    Story,
    gap_change,
    matched_features,
    swapped,
)
from mi_helpers.models import LanguageModel

# ------------------------------------------------------------------------------------ donors

DONORS = 30  # questions whose swaps are compared


@dataclass(frozen=True)
class Donors:
    """Swaps of the same country from two donors: a prompt that asks the same, and one that asks
    something else. Arrays (questions, 2), the same first.

    wins    whether the other country's answer to *this* question comes first afterwards
    change  of the gap, over the gap
    """

    wins: np.ndarray
    change: np.ndarray

    def first(self) -> tuple[float, float]:
        """The shares of swaps after which the other country's answer comes first."""
        same, other = self.wins.mean(0)
        return float(same), float(other)


def donors(model: LanguageModel, coders: Coders, steps: Steps, n: int, seed: int) -> Donors:
    """Swaps in at most n two-hop questions that training never showed, about a capital or a
    language; both sorts of donor name the partner's landmark, in as many tokens.

    Raises:
        ValueError: the model answers too few questions rightly.
    """
    wins, change = [], []
    for q in paired(model, n, seed):
        story, rival = steps.story(q, "country"), model.to_single_token(q.rival)
        row = []
        for donor in (q.other, other_question(model, q.other)):
            into = active_in_step(steps, Question(donor, q.one), "country")
            row.append(swapped(model, coders, replace(story, into=into)))
        wins.append([int(each.logits_after.argmax()) == rival for each in row])
        change.append([gap_change(model, q, each) / story.gap for each in row])
    if not wins:
        raise ValueError(f"{model.name} answers too few two-hop questions to compare donors.")
    return Donors(np.array(wins), np.array(change))


def active_in(model: LanguageModel, coders: Coders, prompt: str) -> dict[tuple, float]:
    """{(layer, latent, position): activation}, of a prompt's features."""
    found = {}
    for layer, active in LocalReplacement(model, coders, prompt).features.items():
        places = zip(active.latents.tolist(), active.positions.tolist(), strict=True)
        for (latent, position), value in zip(places, active.values.tolist(), strict=True):
            found[layer, latent, position] = value
    return found


def active_in_step(steps: Steps, question: Question, step: str) -> dict[str, float]:
    """{feature: activation}, of a step's features in a question's prompt."""
    mine = steps.latents(question, step)
    every = active_in(steps.model, steps.coders, question.prompt)
    return {f"{i}_{j}_{p}": value for (i, j, p), value in every.items() if (i, j) in mine}


# --------------------------------------------------------------------------- controls and limits


def random_share(model: LanguageModel, coders: Coders, told: Sequence[Story]) -> float:
    """A control: `share_of_gap` with `matched_features` removed instead of the stories' own."""
    total = 0.0
    for story in told:
        graph = question_graph(model, coders, story.question)
        factors = dict.fromkeys(matched_features(graph, story.nodes), 0.0)
        result = intervene(model, coders, story.question.prompt, factors)
        total += gap_change(model, story.question, result)
    return total / sum(story.gap for story in told)


@dataclass(frozen=True)
class Singles:
    """Features removed one at a time: the change of the gap, in logits, (features,) each.

    direct, paths       predicted: by the feature's own edges to the logits; over all paths
    held                observed with direct effects: every MLP and norm as it was
    frozen, recomputed  observed with iterative effects, and attention frozen or recomputed
    """

    direct: np.ndarray
    paths: np.ndarray
    held: np.ndarray
    frozen: np.ndarray
    recomputed: np.ndarray

    def correlation(self) -> float:
        """Of the prediction over all paths and the observation with attention frozen."""
        return float(np.corrcoef(self.paths, self.frozen)[0, 1])

    def right_sign(self, least: float = 0.5) -> float:
        """The share of predictions of `least` logits or more whose sign is right."""
        large = np.abs(self.paths) >= least
        return float((np.sign(self.paths) == np.sign(self.frozen))[large].mean())

    def ratio(self, least: float = 0.5) -> float:
        """The median of observed over predicted, of predictions of `least` logits or more."""
        large = np.abs(self.paths) >= least
        return float(np.median(self.frozen[large] / self.paths[large]))


def singles(
    model: LanguageModel,
    coders: Coders,
    asked: Sequence[Question],
    most: int = 8,
    others: int = 8,
    seed: int = 0,
) -> Singles:
    """Remove, one at a time, the `most` features of each question's graph with the largest
    contributions, and `others` random ones."""
    rng, rows = random.Random(seed), []
    for question in asked:
        graph = question_graph(model, coders, question)
        own = contributions(graph)
        edges = graph.adjacency[-2] - graph.adjacency[-1]  # to the answer, less those to the rival
        free = [n for n in graph.nodes if n.kind == FEATURE]
        free.sort(key=lambda n: -abs(float(own[graph.index(n)])))
        for node in free[:most] + rng.sample(free[most:], min(others, len(free) - most)):
            out, i = {node.id: 0.0}, graph.index(node)
            row = [-float(edges[i]), -float(own[i])]
            for how in ({"effects": "direct"}, {}, {"attention": "recomputed"}):
                result = intervene(model, coders, question.prompt, out, **how)
                row.append(gap_change(model, question, result))
            rows.append(row)
    return Singles(*np.array(rows).T)


@torch.no_grad()
def attention_alone(model: LanguageModel, question: Question) -> float:
    """The change of the gap, as a share of it, when all attention patterns are the partner's.

    No edge of a graph shows it: a graph takes its prompt's patterns as given.
    """
    _, theirs = model.run_with_cache(question.other.prompt, "pattern")
    ids = model.tokens(question.prompt)
    a, b = (model.to_single_token(word) for word in (question.answer, question.rival))
    hooks = {
        ("pattern", layer): lambda x, layer=layer: theirs["pattern", layer].to(x)
        for layer in range(model.n_layers)
    }

    def gap() -> float:
        logits: Tensor = model.forward(ids)[0, -1]
        return float(logits[a] - logits[b])

    before = gap()
    with model.hooks(hooks):
        return (gap() - before) / before
