"""Lesson 08's experiments: sentences with TinyWorld's truth, graphs of questions, their scores.

    asked = questions(model, 14, seed=0)               # mi_helpers.lessons.lesson_08.prompts
    graph = question_graph(model, coders, asked[0])
    contributions(graph)                               # what each node adds to the logit gap
    score_table(model, coders, asked)                  # scores, and those of three controls

What a graph predicts of an intervention, and what the model does, is in
`mi_helpers.lessons.lesson_08.stories`; names of latents are in `naming`.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.graphs import FEATURE, LOGIT, Graph, Node, graph_scores, random_graph
from mi_helpers.circuits.replacement import Coders, by_layer
from mi_helpers.layouts import norm_gain
from mi_helpers.lessons.lesson_08.prompts import KINDS, Asked, Question, length_of, sentences
from mi_helpers.loading import untrained
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.transcoders import reads_of

# --------------------------------------------------------------------------- sentences with truth

SCORED = 14  # questions whose graphs are scored


@torch.no_grad()
def read_by(model: LanguageModel, coder, layer: int, mlp_in: Tensor) -> Tensor:
    """What a transcoder reads, (..., d_model), given the MLP's input."""
    if reads_of(coder) == "mlp_in":
        return mlp_in
    return mlp_in / norm_gain(model.part("ln2", layer))


@dataclass(frozen=True)
class Reading:
    """The model's MLP inputs at the tokens of some sentences, `<bos>` left out.

    mlp_in     {layer: (rows, d_model)}
    concepts   {name: mask (rows,)}: TinyWorld's truth at each token
    half       the number of rows of the first half of the sentences
    asked      (rows,): the token's sentence
    """

    mlp_in: dict[int, Tensor]
    concepts: dict[str, np.ndarray]
    half: int
    asked: Sequence[Asked]


@torch.no_grad()
def read_sentences(model: LanguageModel, most: int = 100, seed: int = 0) -> Reading:
    """At most `most` sentences of each kind, with TinyWorld's truth at each token:

    a country      from the last token of its name, or of its landmark's, to the sentence's end
    "asks for …"   at the last token, from which the answer is predicted
    a token        at the token itself, in quotes
    """
    rng = random.Random(seed)
    asked = [each for kind in KINDS for each in _some(list(sentences(kind)), most, rng)]
    rng.shuffle(asked)  # names are chosen on one half of the sentences, and tested on the other
    by_length = defaultdict(list)
    for i, each in enumerate(asked):
        by_length[length_of(model, each)].append(i)
    sites = [("mlp_in", layer) for layer in range(model.n_layers)]
    rows: dict[tuple, Tensor] = {}
    for group in by_length.values():
        _, kept = model.run_with_cache([asked[i].prompt for i in group], sites)
        for layer in range(model.n_layers):
            for i, x in zip(group, kept["mlp_in", layer][:, 1:].float(), strict=True):
                rows[layer, i] = x
    said = [_truth(model, each) for each in asked]
    half = sum(map(len, said[: len(said) // 2]))
    tokens = [here for sentence in said for here in sentence]
    names = sorted(set().union(*tokens[:half]) & set().union(*tokens[half:]))
    concepts = {name: np.array([name in here for here in tokens]) for name in names}
    order = range(len(asked))
    mlp_in = {layer: torch.cat([rows[layer, i] for i in order]) for layer in range(model.n_layers)}
    rows_of = [each for each, here in zip(asked, said, strict=True) for _ in here]
    return Reading(mlp_in, concepts, half, rows_of)


def _some(items: list, most: int, rng: random.Random) -> list:
    return items if len(items) <= most else rng.sample(items, most)


def _truth(model: LanguageModel, asked: Asked) -> list[set[str]]:
    """The concepts that are true at each token of a sentence, `<bos>` left out."""
    tokens = model.str_tokens(model.tokens(asked.prompt)[0, 1:])
    begin = asked.prompt.index(asked.subject) + len(asked.subject)
    said, end = [], 0
    for token in tokens:
        end += len(token)
        here = {f"'{token.strip()}'"} if token.strip() else set()
        said.append(here | ({asked.country} if end >= begin else set()))
    said[-1].add(asked.asks)
    return said


@torch.no_grad()
def activations(model: LanguageModel, coder, layer: int, reading: Reading) -> Tensor:
    """(rows, d_latent): activations of one layer's latents at every token of the sentences."""
    return coder.encode(read_by(model, coder, layer, reading.mlp_in[layer])).float().cpu()


def shares(f: Tensor, truth: Tensor) -> Tensor:
    """The share of each latent's Σ activations that falls on each concept, (latents, concepts).

    Args:
        f: activations (rows, latents).
        truth: (rows, concepts), 0 or 1.
    """
    return (f.T @ truth) / f.sum(0).clamp(min=1e-9)[:, None]


# ---------------------------------------------------------------------------------------- graphs


MOST_FEATURES = 5_000  # of one graph; tiny-gemma has some hundreds


def question_graph(model: LanguageModel, coders: Coders, question: Question) -> Graph:
    """The graph of a question, with its answer and the rival as logits."""
    targets = [question.answer, question.rival]
    return attribution_graph(model, coders, question.prompt, targets, max_features=MOST_FEATURES)


def strongest_hop(graph: Graph) -> tuple[Node, Node]:
    """The strongest edge from a feature to one of the next layer at a later token: (source,
    target). Only the next layer's attention is on its way."""
    layer = torch.tensor([n.layer if n.kind == FEATURE else -9 for n in graph.nodes])
    position = torch.tensor([n.position for n in graph.nodes])
    hop = (layer[:, None] == layer + 1) & (layer >= 0) & (position[:, None] > position)
    place = int(torch.where(hop, graph.adjacency.abs(), 0.0).argmax())
    target, source = divmod(place, len(graph))
    return graph.nodes[source], graph.nodes[target]


def logit_gap(graph: Graph, change: Tensor | None = None) -> float:
    """The answer's logit less the rival's, of the graph or of a change (n,) of its values."""
    values = graph.values if change is None else change
    first, second = graph.mask(LOGIT).nonzero()[:2, 0].tolist()
    return float(values[first] - values[second])


def to_one_target(graph: Graph) -> tuple[Tensor, Tensor]:
    """The graph's edges and values with one target, the gap, in place of its two logits: (edges
    (n, n), values (n,))."""
    gap = graph.adjacency[-2] - graph.adjacency[-1]
    edges = torch.cat([graph.adjacency[:-2], gap[None]])[:, :-1].clone()
    edges[:, -1] = 0.0
    return edges, torch.cat([graph.values[:-2], torch.tensor([logit_gap(graph)])])


def contributions(graph: Graph) -> Tensor:
    """What each node adds to the gap between the two logits, over all paths, (n,):

        c_s = Σ_t edge(s → t) · c_t / value_t

    where c_t / value_t is 1 at the answer and -1 at the rival: a feature passes on the share of its
    value that the node makes up. The graph predicts a change of the gap by -c_s when the node alone
    is removed.
    """
    edges, passes = graph.adjacency.double(), graph.mask(FEATURE)
    first, second = graph.mask(LOGIT).nonzero()[:2, 0].tolist()
    share = torch.where(passes, 1 / graph.values.double(), 0.0)
    direct = edges[first] - edges[second]
    total = torch.linalg.solve_triangular(
        -(edges * share[:, None]).T, direct[:, None], upper=True, unitriangular=True
    )
    return total[:, 0].float()


# ------------------------------------------------------------------------------ scores and controls


def shuffled(coders: Coders, seed: int) -> dict[int, SparseCoder]:
    """A control: latents fire as before, and each writes another one's decoder row."""
    rng, made = torch.Generator().manual_seed(seed), {}
    for layer, coder in by_layer(coders).items():
        other = made[layer] = copy.deepcopy(coder)
        with torch.no_grad():
            rows = coder.W_dec.detach()
            other.W_dec.copy_(rows[torch.randperm(len(rows), generator=rng).to(rows.device)])
    return made


CONDITIONS = ("the graph", "decoders exchanged", "untrained model", "edges dealt out anew")


def score_table(
    model: LanguageModel, coders: Coders, asked: Sequence[Question], seed: int = 0
) -> dict[str, np.ndarray]:
    """{condition: (questions, 2)}: replacement and completeness scores of whole graphs, and of
    three controls on their prompts (`CONDITIONS`)."""
    exchanged, blank = shuffled(coders, seed), untrained(model, seed)
    rows: dict[str, list] = {name: [] for name in CONDITIONS}
    for i, question in enumerate(asked):
        graph = attribution_graph(model, coders, question.prompt, max_features=MOST_FEATURES)
        made = (
            graph,
            attribution_graph(model, exchanged, graph.prompt, max_features=MOST_FEATURES),
            attribution_graph(blank, coders, graph.prompt, max_features=MOST_FEATURES),
            random_graph(graph, seed + i),
        )
        for name, each in zip(CONDITIONS, made, strict=True):
            rows[name].append(graph_scores(each))
    return {name: np.array(scores) for name, scores in rows.items()}
