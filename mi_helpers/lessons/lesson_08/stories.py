"""Lesson 08's stories: what a graph predicts of an intervention, and what the model does.

    steps = Steps(model, coders, read_sentences(model))
    story = steps.story(asked[0], "country")           # predicted, in numbers, from the graph alone
    outcomes = try_story(model, coders, story)         # observed, and whether it fits
    outcome_table(outcomes)                            # hits and misses

A story is about a set of features, chosen by a rule before anything is changed. Three interventions
test it: *suppress* (the features at zero), *swap* (the same, with the partner's features put in),
and *null* (as many other features at zero that the graph calls unimportant).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from mi_helpers.circuits.graphs import FEATURE, Graph
from mi_helpers.circuits.interventions import Intervention, intervene, predicted_effect
from mi_helpers.circuits.replacement import Coders, by_layer
from mi_helpers.files import literal
from mi_helpers.lessons.lesson_08.experiments import (
    Reading,
    activations,
    contributions,
    logit_gap,
    question_graph,
    read_sentences,
    shares,
)
from mi_helpers.lessons.lesson_08.prompts import Question
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.transcoders import coders_for

# ---------------------------------------------------------------------------------------- stories

SMALL = 0.1  # of the logit gap: less is no effect


@dataclass(frozen=True, eq=False)
class Story:
    """A set of features of a graph, and what the graph predicts of interventions on them.

    step              what the features are to stand for, in words
    nodes             the features
    into              {node: activation}: the partner's features that a swap puts in
    null              as many features with a small predicted effect
    gap               the model's logit of the answer less that of the rival
    suppress, swap    the predicted change of the gap
    """

    question: Question
    step: str
    nodes: tuple[str, ...]
    into: Mapping[str, float]
    null: tuple[str, ...]
    gap: float
    suppress: float
    swap: float

    @property
    def flips(self) -> bool:
        """Whether the swap is predicted to make the rival likelier than the answer."""
        return self.gap + self.swap < 0


def make_story(
    question: Question,
    step: str,
    graph: Graph,
    nodes: Sequence[str],
    other: Graph,
    theirs: Sequence[str],
) -> Story:
    """A story about `nodes` of the question's graph.

    Args:
        other: the partner's graph.
        theirs: the features of it that a swap puts in. What they add to the rival there is the
            second part of the swap's prediction.
    """
    suppress = logit_gap(graph, predicted_effect(graph, dict.fromkeys(nodes, 0.0)))
    lost = logit_gap(other, predicted_effect(other, dict.fromkeys(theirs, 0.0)))
    into = {name: other.value(name) for name in theirs}
    limit = float(contributions(graph)[graph.mask(FEATURE)].abs().median())
    null = tuple(matched_features(graph, nodes, limit))
    gap = logit_gap(graph)
    return Story(question, step, tuple(nodes), into, null, gap, suppress, suppress + lost)


def matched_features(graph: Graph, nodes: Sequence[str], limit: float = float("inf")) -> list[str]:
    """For each of these features another of its layer, at its position while any is left, with
    the nearest activation, so that it writes about as much; |contribution| at most `limit`."""
    own, taken = contributions(graph).abs(), set(nodes)
    free = [n for n in graph.nodes if n.kind == FEATURE and float(own[graph.index(n)]) <= limit]
    chosen: list[str] = []
    for name in nodes:
        node, value = graph.nodes[graph.index(name)], graph.value(name)
        near = [n for n in free if n.layer == node.layer and n.id not in taken]
        if near := [n for n in near if n.position == node.position] or near:
            chosen.append(min(near, key=lambda n: abs(graph.value(n) - value)).id)
            taken.add(chosen[-1])
    return chosen


# ------------------------------------------------------------------------------ steps of two hops

LIFT = 5.0  # times more at a concept's tokens than elsewhere: a latent that favours it
STEPS = ("country", "asked", "pair", "country or pair")


class Steps:
    """The latents of a question's steps, found in sentences that share nothing else with it.

    A latent favours a concept if its Σ activations falls on tokens of the concept `LIFT` times as
    often as such tokens occur. The steps are latents that favour

    "country"   the question's country, in sentences that name something else and ask for
                something else: a latent of the landmark, or of the answer, does not pass
    "asked"     what the question asks for, in sentences about other countries
    "pair"      the country in sentences that name something else and ask for the *same*, and that
                are not among the first: latents of this pair of country and question alone
    "country or pair"   the first and the third
    """

    def __init__(self, model: LanguageModel, coders: Coders, reading: Reading):
        self.model, self.coders, self.reading = model, coders, reading
        self.fired = {i: activations(model, c, i, reading) for i, c in by_layer(coders).items()}
        self._asks = np.array([each.asks for each in reading.asked])
        self._subject = np.array([each.subject for each in reading.asked])
        self._country = np.array([each.country for each in reading.asked])

    @lru_cache(maxsize=512)  # noqa: B019
    def latents(self, question: Question, step: str) -> frozenset[tuple[int, int]]:
        """The (layer, latent) of one of `STEPS`, for a question.

        Raises:
            ValueError: there is no such step; no sentence is about the country.
        """
        if step not in STEPS:
            raise ValueError(f"A step is one of {', '.join(STEPS)}, not {step!r}.")
        one = question.one
        elsewhere, same = self._subject != one.subject, self._asks == one.asks
        if step == "asked":
            return self.favouring(one.asks, self._country != one.country)
        country = self.favouring(one.country, elsewhere & ~same)
        if step == "country":
            return country
        pair = self.favouring(one.country, elsewhere & same) - country
        return pair if step == "pair" else country | pair

    @lru_cache(maxsize=32)  # noqa: B019
    def graph(self, question: Question) -> Graph:
        """The graph of a question, cached."""
        return question_graph(self.model, self.coders, question)

    def favouring(self, concept: str, rows: np.ndarray) -> frozenset[tuple[int, int]]:
        """The (layer, latent) that favour a concept, on the rows where `rows` (rows,) is True."""
        if concept not in self.reading.concepts:
            raise ValueError(f"No sentence that was read is about {concept!r}.")
        rows = torch.tensor(rows)
        about = torch.tensor(self.reading.concepts[concept])[rows].float()
        found = set()
        for layer, fired in self.fired.items():
            lift = shares(fired[rows], about[:, None])[:, 0] / about.mean().clamp(min=1e-9)
            found |= {(layer, j) for j in (lift >= LIFT).nonzero()[:, 0].tolist()}
        return frozenset(found)

    def nodes(self, graph: Graph, question: Question, step: str) -> tuple[str, ...]:
        """The features of a question's graph that belong to a step."""
        mine = self.latents(question, step)
        return tuple(n.id for n in graph.nodes if n.kind == FEATURE and (n.layer, n.index) in mine)

    def story(self, question: Question, step: str) -> Story:
        """The story of a step's features. The swap puts in those of the same step in the partner's
        graph."""
        turned = question.turned()
        graph, other = self.graph(question), self.graph(turned)
        one = question.one
        name = {"country": one.country, "asked": one.asks}.get(step, f"{step} of {one.country}")
        nodes = self.nodes(graph, question, step)
        return make_story(question, name, graph, nodes, other, self.nodes(other, turned, step))

    def supernodes(self, graph: Graph, question: Question) -> Graph:
        """The graph with three supernodes: features of the country, of what is asked for, and of
        both."""
        country = set(self.nodes(graph, question, "country"))
        asked = set(self.nodes(graph, question, "asked"))
        one = question.one
        groups = {
            one.country: country - asked,
            one.asks: asked - country,
            f"{one.country}, {one.asks.removeprefix('asks for ')}": country & asked,
        }
        order = [n.id for n in graph.nodes]
        named = {text: tuple(n for n in order if n in ids) for text, ids in groups.items() if ids}
        return replace(graph, supernodes=named)

    def share_map(self, graph: Graph, question: Question, step: str) -> np.ndarray:
        """(n_layers, pos): contributions of a step's features, as a share of the gap. (As features
        act through others, the shares sum to more than the effect of all at once.)"""
        own, total = contributions(graph), np.zeros((graph.n_layers, len(graph.tokens)))
        for name in self.nodes(graph, question, step):
            i = graph.index(name)
            total[graph.nodes[i].layer, graph.nodes[i].position] += float(own[i])
        return total / logit_gap(graph)


# --------------------------------------------------------------------------------------- outcomes

INTERVENTIONS = ("suppress", "swap", "null")


@dataclass(frozen=True)
class Outcome:
    """One intervention of a story.

    what        "suppress", "swap" or "null"
    predicted   the change of the gap, in logits
    observed    the same in the model, with attention patterns as they were
    recomputed  the same with attention patterns computed anew
    hit         suppress: the gap falls by at least `SMALL` of itself, as predicted;
                swap: it falls by as much again beyond the fall from suppressing, and the rival
                overtakes the answer exactly if that was predicted;
                null: it changes by less than `SMALL` of itself
    """

    story: Story
    what: str
    predicted: float
    observed: float
    recomputed: float
    hit: bool


def changes(story: Story, what: str, factor: float = 0.0) -> tuple[dict, dict]:
    """(factors, values) for `intervene`. In a swap, a feature that the partner has as well gets the
    partner's activation.

    Raises:
        ValueError: there is no such intervention.
    """
    if what not in INTERVENTIONS:
        raise ValueError(f"An intervention is one of {', '.join(INTERVENTIONS)}, not {what!r}.")
    nodes = story.null if what == "null" else story.nodes
    values = dict(story.into) if what == "swap" else {}
    return {name: factor for name in nodes if name not in values}, values


def gap_change(model: LanguageModel, question: Question, result: Intervention) -> float:
    """The change of the answer's logit less the rival's, before the soft-cap."""
    a, b = (model.to_single_token(word) for word in (question.answer, question.rival))
    before, after = result.uncapped_before, result.uncapped_after
    return float((after[a] - after[b]) - (before[a] - before[b]))


def swapped(model: LanguageModel, coders: Coders, story: Story) -> Intervention:
    """The story's swap in the model, with attention patterns as they were."""
    factors, values = changes(story, "swap")
    return intervene(model, coders, story.question.prompt, factors, values=values)


def observe(
    model: LanguageModel, coders: Coders, story: Story, what: str, attention: str = "frozen"
) -> float:
    """The change of the gap in the model."""
    factors, values = changes(story, what)
    result = intervene(
        model, coders, story.question.prompt, factors, values=values, attention=attention
    )
    return gap_change(model, story.question, result)


def share_of_gap(model: LanguageModel, coders: Coders, told: Sequence[Story], what: str) -> float:
    """Σ change of the gap over Σ gap, of all stories."""
    seen = sum(observe(model, coders, story, what) for story in told)
    return seen / sum(story.gap for story in told)


def is_hit(story: Story, what: str, observed: float, suppressed: float) -> bool:
    """Whether the prediction was right: see `Outcome`.

    Args:
        observed, suppressed: the observed change by `what`, and by "suppress".
    """
    least = SMALL * story.gap
    if what == "suppress":
        return observed < -least and story.suppress < 0
    if what == "swap":
        return observed < suppressed - least and (story.gap + observed < 0) == story.flips
    return abs(observed) < least


def try_story(model: LanguageModel, coders: Coders, story: Story) -> list[Outcome]:
    """The outcomes of all three interventions of a story."""
    predicted = {"suppress": story.suppress, "swap": story.swap, "null": 0.0}
    seen = {what: observe(model, coders, story, what) for what in INTERVENTIONS}
    follows = {what: observe(model, coders, story, what, "recomputed") for what in INTERVENTIONS}
    return [
        Outcome(
            story,
            what,
            predicted[what],
            seen[what],
            follows[what],
            is_hit(story, what, seen[what], seen["suppress"]),
        )
        for what in INTERVENTIONS
    ]


def asked(story: Story) -> str:
    """Cells of a Markdown table: the prompt, both answers, and whose features they are."""
    q, step = story.question, story.step
    return " | ".join(map(literal, (q.prompt + " …", f"{q.one.answer} / {q.other.answer}", step)))


def story_table(stories: Sequence[Story]) -> str:
    """The predictions as a Markdown table."""
    lines = [
        "| | prompt | answer / rival | features of | out | in | gap | without them | swapped |",
        "|--:|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for i, s in enumerate(stories, 1):
        lines.append(
            f"| {i} | {asked(s)} | {len(s.nodes)} | {len(s.into)} | {s.gap:.1f} | "
            f"{s.gap + s.suppress:.1f} | {s.gap + s.swap:.1f}{' (flips)' if s.flips else ''} |"
        )
    return "\n".join(lines)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """Predicted and observed changes of the gap as a Markdown table, with a row for each story."""
    rows: dict[int, list[Outcome]] = {}
    for each in outcomes:
        rows.setdefault(id(each.story), []).append(each)
    lines = [
        f"| | prompt | answer / rival | features of | {' | '.join(INTERVENTIONS)} |",
        "|--:|---|---|---|" + "---|" * len(INTERVENTIONS),
    ]
    for i, row in enumerate(rows.values(), 1):
        both = [f"{o.predicted:+.1f} → {o.observed:+.1f}" for o in row]
        cells = [f"{b} {'hit' if o.hit else '**miss**'}" for b, o in zip(both, row, strict=True)]
        lines.append(f"| {i} | {asked(row[0].story)} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the shipped model


@lru_cache(maxsize=1)
def shipped_steps() -> tuple[LanguageModel, dict, Steps]:
    """The course's model, its transcoders, and the steps: what the ledger and predictions use."""
    model = shipped_model()
    coders = coders_for(model, range(model.n_layers))
    return model, coders, Steps(model, coders, read_sentences(model))
