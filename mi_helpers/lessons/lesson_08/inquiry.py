"""Lesson 08's investigation: a story of a question that nobody traced, scored on interventions.

found = Inquiry(model, coders, untold(model))
found.score({"3_12_10", "4_57_10"})          # the least of three shares, less a little a feature
found.shares({"3_12_10", "4_57_10"})         # lost without them, turned by a swap, kept elsewhere
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cached_property

from mi_helpers.circuits.graphs import FEATURE, Graph
from mi_helpers.circuits.interventions import intervene
from mi_helpers.circuits.replacement import Coders
from mi_helpers.lessons.lesson_08.experiments import contributions, logit_gap, question_graph
from mi_helpers.lessons.lesson_08.prompts import Question, alike
from mi_helpers.lessons.lesson_08.stories import Steps, gap_change
from mi_helpers.models import LanguageModel

ELSEWHERE = 4  # questions about other countries, in which the features should not matter
PRICE = 1e-3  # of each feature in a story


class Inquiry:
    """A question, its partner, and questions about other countries, with as many tokens.

    here, there  {feature: activation}, of the question's own prompt and of the partner's
    every        all of these features, in order: what a story may name
    """

    def __init__(self, model: LanguageModel, coders: Coders, question: Question):
        self.model, self.coders, self.question = model, coders, question
        self.graph = question_graph(model, coders, question)
        self.other = question_graph(model, coders, question.turned())
        self.here, self.there = values_of(self.graph), values_of(self.other)
        self.every = sorted(self.here | self.there)
        self.gap, self.their_gap = logit_gap(self.graph), logit_gap(self.other)

    @cached_property
    def elsewhere(self) -> list[tuple[Question, float]]:
        """(a question about two other countries, its gap)."""
        found = alike(self.model, self.question, ELSEWHERE, seed=0)
        return [(q, logit_gap(question_graph(self.model, self.coders, q))) for q in found]

    def change(self, question: Question, values: dict[str, float]) -> float:
        """The change of a question's gap with features held at other activations."""
        result = intervene(self.model, self.coders, question.prompt, values=values)
        return gap_change(self.model, question, result)

    def shares(self, nodes: Iterable[str]) -> tuple[float, float, float]:
        """Each from 0 to 1: the gap that is lost without the features; the way to the partner's
        answer when each takes the partner's activation; the gap that is kept without them in
        questions about other countries."""
        nodes = list(nodes)
        off = dict.fromkeys(nodes, 0.0)
        lost = -self.change(self.question, off) / self.gap
        turned = -self.change(self.question, {name: self.there.get(name, 0.0) for name in nodes})
        kept = [1 - abs(self.change(q, off)) / gap for q, gap in self.elsewhere]
        shares = lost, turned / (self.gap + self.their_gap), sum(kept) / len(kept)
        return tuple(min(max(each, 0.0), 1.0) for each in shares)

    def score(self, nodes: Iterable[str]) -> float:
        """The least of the three shares, less `PRICE` for each feature."""
        nodes = list(nodes)
        return min(self.shares(nodes)) - PRICE * len(nodes)


def values_of(graph: Graph) -> dict[str, float]:
    """{feature: activation}."""
    return {n.id: graph.value(n) for n in graph.nodes if n.kind == FEATURE}


def random_story(found: Inquiry, rng: random.Random) -> set[str]:
    """As many features as the country's step has, drawn at random."""
    return set(rng.sample(found.every, 40))


def rule_story(found: Inquiry, steps: Steps) -> set[str]:
    """The features of the country's step, in both prompts."""
    one, turned = found.question, found.question.turned()
    ours = steps.nodes(found.graph, one, "country")
    return {*ours, *steps.nodes(found.other, turned, "country")}


def greedy_story(found: Inquiry, steps: Steps, most: int = 12) -> set[str]:
    """The country's step, and what of this pair's step and of the `most` features with the largest
    contributions makes the score higher, taken one after another."""
    own, story = contributions(found.graph), rule_story(found, steps)
    largest = sorted(found.here, key=lambda name: -float(own[found.graph.index(name)]))[:most]
    pair = {
        name
        for graph, q in ((found.graph, found.question), (found.other, found.question.turned()))
        for name in steps.nodes(graph, q, "pair")
    }
    best = found.score(story)
    for more in (pair, *({name} for name in largest)):
        if more - story and (score := found.score(story | more)) > best:
            story, best = story | more, score
    return story
