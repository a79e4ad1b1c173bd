"""Lesson 08's stories: what a graph predicts of an intervention, and whether the model does it.

    steps = Steps(model, coders, read_sentences(model))
    story = steps.story(asked[0], "country")           # predicted, in numbers, from the graph alone
    outcomes = try_story(model, coders, story)         # what the model does, and whether it fits
    outcome_table(outcomes)                            # hits and misses

A story is about a set of features, chosen by a rule before anything is changed. Three interventions
test it: *suppress* (the features at zero), *swap* (and the partner's put in), *null* (as many
others that the graph calls unimportant).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mi_helpers.circuits.graphs import FEATURE, Graph, predicted_effect
from mi_helpers.circuits.interventions import Intervention, intervene
from mi_helpers.circuits.replacement import Coders
from mi_helpers.lessons.lesson_08.experiments import (
    Question,
    Reading,
    activations,
    by_label,
    by_layer,
    logit_gap,
    question_graph,
    shares,
    worth,
)
from mi_helpers.models import LanguageModel

# ---------------------------------------------------------------------------------------- stories

SMALL = 0.1  # of the logit gap: less is no effect


@dataclass(frozen=True, eq=False)
class Story:
    """A circuit told from a graph, and what it predicts, before anything is changed.

    step              what its features are said to stand for, in words
    nodes             the features
    into              {node: activation}: the partner's features that a swap puts in
    null              as many features that the graph says do little
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
    """A story about `nodes` of its graph, and, for the swap, `theirs` of the partner's graph.

    The swap's prediction adds what the partner's features are worth to the rival in *their* graph.
    """
    suppress = logit_gap(graph, predicted_effect(graph, dict.fromkeys(nodes, 0.0)))
    lost = logit_gap(other, predicted_effect(other, dict.fromkeys(theirs, 0.0)))
    into = {name: other.value(name) for name in theirs}
    limit = float(worth(graph)[graph.mask(FEATURE)].abs().median())
    null = tuple(like(graph, nodes, limit))
    gap = logit_gap(graph)
    return Story(question, step, tuple(nodes), into, null, gap, suppress, suppress + lost)


def like(graph: Graph, nodes: Sequence[str], limit: float = float("inf")) -> list[str]:
    """For each of these features another of its layer, of the nearest activation, whose worth is
    at most `limit` in amount: a change of the stream about as large."""
    own, taken = worth(graph).abs(), set(nodes)
    free = [n for n in graph.nodes if n.kind == FEATURE and float(own[graph.index(n)]) <= limit]
    chosen: list[str] = []
    for name in nodes:
        layer, value = graph.nodes[graph.index(name)].layer, graph.value(name)
        near = [n for n in free if n.layer == layer and n.id not in taken]
        if near:
            chosen.append(min(near, key=lambda n: abs(graph.value(n) - value)).id)
            taken.add(chosen[-1])
    return chosen


def tell(model: LanguageModel, coders: Coders, question: Question, labels: Mapping) -> Story:
    """The story of the largest label: of the supernode whose features, taken away, cost the answer
    most against the rival, as the graph sees it. The swap puts in the supernode that the same rule
    finds in the partner's graph."""
    graph = question_graph(model, coders, question, labels)
    other = question_graph(model, coders, question.turned(), labels)
    sums, theirs = by_label(graph), by_label(other)
    if not sums or not theirs:
        raise ValueError(f"No feature of the graphs of {question.prompt!r} has a label.")
    label, their = max(sums, key=sums.get), max(theirs, key=theirs.get)
    nodes, put_in = graph.supernodes[label], other.supernodes[their]
    return make_story(question, f"label {label}", graph, nodes, other, put_in)


# ------------------------------------------------------------------------------ steps of two hops

LIFT = 5.0  # times more at a concept's tokens than elsewhere: a latent that favours it
STEPS = ("country", "asked", "pair", "country or pair")


class Steps:
    """Which latents favour a country, and which one what is asked for: judged elsewhere.

    A latent favours a concept if its activation falls on tokens of that concept `LIFT` times as
    often as such tokens occur. Counted are only sentences that have nothing else in common with the
    question:

    "country"   the question's country, in sentences that name something else and ask for
                something else: a latent of the landmark, or of the answer, does not pass
    "asked"     what the question asks for, in sentences about other countries
    "pair"      the country where the *same* is asked, of something else, and not among the first:
                latents of this pair of country and question alone
    "country or pair"   the first and the third together
    """

    def __init__(self, model: LanguageModel, coders: Coders, reading: Reading):
        self.model, self.coders, self.reading = model, coders, reading
        self.fired = {i: activations(model, c, i, reading) for i, c in by_layer(coders).items()}
        self._asks = np.array([each.asks for each in reading.asked])
        self._subject = np.array([each.subject for each in reading.asked])
        self._country = np.array([each.country for each in reading.asked])

    @lru_cache(maxsize=512)  # noqa: B019
    def latents(self, question: Question, step: str) -> frozenset[tuple[int, int]]:
        """The (layer, latent) of one of `STEPS`, for a question."""
        if step not in STEPS:
            raise ValueError(f"A step is one of {', '.join(STEPS)}, not {step!r}.")
        one = question.one
        elsewhere, same = self._subject != one.subject, self._asks == one.asks
        if step == "asked":
            return self.favour(one.asks, self._country != one.country)
        country = self.favour(one.country, elsewhere & ~same)
        if step == "country":
            return country
        pair = self.favour(one.country, elsewhere & same) - country
        return pair if step == "pair" else country | pair

    @lru_cache(maxsize=32)  # noqa: B019
    def graph(self, question: Question) -> Graph:
        """The graph of a question, kept for a while."""
        return question_graph(self.model, self.coders, question)

    def favour(self, concept: str, rows: np.ndarray) -> frozenset[tuple[int, int]]:
        """The (layer, latent) that favour a concept on these rows (booleans)."""
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
        """The story that a question goes through this step. The swap puts in the same step of the
        partner's graph."""
        turned = question.turned()
        graph, other = self.graph(question), self.graph(turned)
        one = question.one
        name = {"country": one.country, "asked": one.asks}.get(step, f"{step} of {one.country}")
        nodes = self.nodes(graph, question, step)
        return make_story(question, name, graph, nodes, other, self.nodes(other, turned, step))

    def supernodes(self, graph: Graph, question: Question) -> Graph:
        """The graph with the country, what is asked for, and both at once as supernodes."""
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

    def where(self, graph: Graph, question: Question, step: str) -> np.ndarray:
        """(n_layers, pos): what a step's features add to the gap, as a share of it, at each place
        by itself (as one acts through another, the shares sum to more than they do together)."""
        own, total = worth(graph), np.zeros((graph.n_layers, len(graph.tokens)))
        for name in self.nodes(graph, question, step):
            i = graph.index(name)
            total[graph.nodes[i].layer, graph.nodes[i].position] += float(own[i])
        return total / logit_gap(graph)


# --------------------------------------------------------------------------------------- outcomes

INTERVENTIONS = ("suppress", "swap", "null")


@dataclass(frozen=True)
class Outcome:
    """One intervention of a story: the predicted and the observed change of the logit gap, and
    whether the prediction was right.

    what       "suppress", "swap" or "null"
    predicted, observed   in logits; observed with attention as it was; recomputed: with attention
               that follows
    hit        suppress: the gap falls by at least `SMALL` of itself, as predicted;
               swap: the gap falls by as much again beyond that of suppressing alone, and the rival
               overtakes the answer exactly if that was predicted;
               null: the gap changes by less than `SMALL` of itself
    """

    story: Story
    what: str
    predicted: float
    observed: float
    recomputed: float
    hit: bool


def changes(story: Story, what: str, factor: float = 0.0) -> tuple[dict, dict]:
    """(factors, values) for `intervene`. In a swap, a feature that the partner has, too, gets the
    partner's activation."""
    if what not in INTERVENTIONS:
        raise ValueError(f"An intervention is one of {', '.join(INTERVENTIONS)}, not {what!r}.")
    nodes = story.null if what == "null" else story.nodes
    values = dict(story.into) if what == "swap" else {}
    return {name: factor for name in nodes if name not in values}, values


def gap_change(model: LanguageModel, question: Question, result: Intervention) -> float:
    """By how much an intervention changed answer less rival, in logits before the soft-cap."""
    a, b = (model.to_single_token(word) for word in (question.answer, question.rival))
    before, after = result.uncapped_before, result.uncapped_after
    return float((after[a] - after[b]) - (before[a] - before[b]))


def observe(
    model: LanguageModel, coders: Coders, story: Story, what: str, attention: str = "frozen"
) -> float:
    """What the model does: the change of the gap."""
    factors, values = changes(story, what)
    result = intervene(
        model, coders, story.question.prompt, factors, values=values, attention=attention
    )
    return gap_change(model, story.question, result)


def share_of_gap(model: LanguageModel, coders: Coders, told: Sequence[Story], what: str) -> float:
    """The change of the gap over all stories together, as a share of their gaps."""
    seen = sum(observe(model, coders, story, what) for story in told)
    return seen / sum(story.gap for story in told)


def verdict(story: Story, what: str, observed: float, suppressed: float) -> bool:
    """Whether what was observed is what the story predicted: see `Outcome`; suppressed: the change
    that was observed without the story's features."""
    least = SMALL * story.gap
    if what == "suppress":
        return observed < -least and story.suppress < 0
    if what == "swap":
        return observed < suppressed - least and (story.gap + observed < 0) == story.flips
    return abs(observed) < least


def try_story(model: LanguageModel, coders: Coders, story: Story) -> list[Outcome]:
    """All three interventions of a story, with frozen and with recomputed attention."""
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
            verdict(story, what, seen[what], seen["suppress"]),
        )
        for what in INTERVENTIONS
    ]


def story_table(stories: Sequence[Story]) -> str:
    """The predictions as a Markdown table, written down before anything is changed."""
    lines = [
        "| | prompt | answer / rival | features of | out | in | gap | without them | swapped |",
        "|--:|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for i, s in enumerate(stories, 1):
        q = s.question
        lines.append(
            f"| {i} | {q.prompt} … | {q.one.answer} / {q.other.answer} | {s.step} | "
            f"{len(s.nodes)} | {len(s.into)} | {s.gap:.1f} | {s.gap + s.suppress:.1f} | "
            f"{s.gap + s.swap:.1f}{' (flips)' if s.flips else ''} |"
        )
    return "\n".join(lines)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, hits and misses: the predicted and the observed change of
    the gap, a row for each story, in their order."""
    rows: dict[int, list[Outcome]] = {}
    for each in outcomes:
        rows.setdefault(id(each.story), []).append(each)
    lines = [
        f"| | prompt | answer / rival | features of | {' | '.join(INTERVENTIONS)} |",
        "|--:|---|---|---|" + "---|" * len(INTERVENTIONS),
    ]
    for i, row in enumerate(rows.values(), 1):
        story, q = row[0].story, row[0].story.question
        cells = [
            f"{o.predicted:+.1f} → {o.observed:+.1f} {'hit' if o.hit else '**miss**'}" for o in row
        ]
        lines.append(
            f"| {i} | {q.prompt} … | {q.one.answer} / {q.other.answer} | {story.step} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)


def hits(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """{intervention: (hits, trials)}."""
    kinds = {what: [o.hit for o in outcomes if o.what == what] for what in INTERVENTIONS}
    return {what: (sum(each), len(each)) for what, each in kinds.items()}


def agreement(outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """Of the predicted and the observed changes by suppress and swap: their correlation, the same
    with attention recomputed, and the median ratio, observed over predicted."""
    rows = [(o.predicted, o.observed, o.recomputed) for o in outcomes if o.what != "null"]
    predicted, observed, recomputed = np.array(rows).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.nanmedian(observed / predicted))
    first, second = (float(np.corrcoef(predicted, y)[0, 1]) for y in (observed, recomputed))
    return first, second, ratio


def hit_table(sorts: Mapping[str, Sequence[Outcome]]) -> str:
    """Hits of several sorts of stories as a Markdown table, and how often the answer flipped."""
    lines = [
        f"| stories of | {' | '.join(INTERVENTIONS)} | flips predicted | flips seen | "
        "correlation | observed / predicted |",
        "|---|" + "---|" * len(INTERVENTIONS) + "--:|--:|--:|--:|",
    ]
    for name, some in sorts.items():
        cells = [f"{right} of {trials}" for right, trials in hits(some).values()]
        swaps = [o for o in some if o.what == "swap"]
        cells.append(str(sum(o.story.flips for o in swaps)))
        cells.append(str(sum(o.story.gap + o.observed < 0 for o in swaps)))
        correlation, _, ratio = agreement(some)
        cells += [f"{correlation:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- controls and limits


def random_share(model: LanguageModel, coders: Coders, told: Sequence[Story]) -> float:
    """A control: `share_of_gap` without as many other features of the same layers, of the nearest
    activation, whatever they are worth."""
    total = 0.0
    for story in told:
        graph = question_graph(model, coders, story.question)
        factors = dict.fromkeys(like(graph, story.nodes), 0.0)
        result = intervene(model, coders, story.question.prompt, factors)
        total += gap_change(model, story.question, result)
    return total / sum(story.gap for story in told)


def turned(result: Intervention) -> tuple[int, int]:
    """How many features an intervention turned on, and how many off, the changed ones included."""
    on = off = 0
    for layer, before in result.features_before.items():
        after = result.features_after[layer]
        on += int(((before == 0) & (after != 0)).sum())
        off += int(((before != 0) & (after == 0)).sum())
    return on, off


@dataclass(frozen=True)
class Singles:
    """Features taken out one at a time: the change of the gap, in logits, (features,) each.

    direct, paths       predicted: by the feature's own edges to the logits; over all paths
    held                observed with every MLP and norm held as it was ("direct")
    frozen, recomputed  observed with MLPs that answer, and attention as it was, or that follows
    """

    direct: np.ndarray
    paths: np.ndarray
    held: np.ndarray
    frozen: np.ndarray
    recomputed: np.ndarray

    def correlation(self) -> float:
        """Of the prediction over all paths with what is observed, attention frozen."""
        return float(np.corrcoef(self.paths, self.frozen)[0, 1])

    def right_sign(self, least: float = 0.5) -> float:
        """The share of predictions of `least` logits or more whose sign is right."""
        large = np.abs(self.paths) >= least
        return float((np.sign(self.paths) == np.sign(self.frozen))[large].mean())

    def ratio(self, least: float = 0.5) -> float:
        """Of predictions of `least` logits or more: the median of observed over predicted."""
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
    """Take out, one at a time, the `most` features that a question's graph calls the most important
    and as many random ones as `others` says."""
    rng, rows = random.Random(seed), []
    for question in asked:
        graph = question_graph(model, coders, question)
        own = worth(graph)
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
    """How the gap changes if all attention patterns are the partner's, as a share of the gap.

    No edge of a graph says anything of this: a graph takes its prompt's patterns as given.
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
