"""Lesson 08's experiments: a toy, labels of latents by TinyWorld's truth, graphs of questions.

    asked = questions(model, 30, seed=0)               # mi_helpers.lessons.lesson_08.prompts
    labels = latent_labels(model, coders, read_sentences(model))
    graph = question_graph(model, coders, asked[0], labels)
    by_label(graph)                                    # what each label adds to the logit gap
    score_table(model, coders, [graph])                # its scores, and those of three controls

What a graph predicts of an intervention, and what the model does, is in
`mi_helpers.lessons.lesson_08.stories`.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    graph_scores,
    group_by_label,
    random_graph,
)
from mi_helpers.circuits.replacement import Coders, by_layer
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.lessons.lesson_08.prompts import KINDS, Asked, Question, length_of, sentences
from mi_helpers.loading import untrained
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import logit_effects
from mi_helpers.saes.transcoders import reads_of

# ------------------------------------------------------------------------------------- a toy model


def toy() -> tuple[LanguageModel, list[SparseCoder]]:
    """Two layers, two numbers wide, and a transcoder of one useful latent for each layer.

    Tokens 0 and 1 embed as (1, 1) and (1, 7). Layer 0's attention writes nothing; layer 1's looks
    at all tokens evenly and writes (2, -1) times their normalised mean. The MLP of both layers
    writes relu(x) · y of its normalised input (x, y) along the second axis, a product that no
    latent can write exactly: so there are errors.
    """
    config = AutoConfig.for_model(
        "llama",
        vocab_size=3,
        hidden_size=2,
        intermediate_size=1,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        hidden_act="relu",
        rms_norm_eps=0.0,
        max_position_embeddings=8,
        tie_word_embeddings=False,
    )
    hf = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        hf.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1], [1, 7], [0, 0]]))
        for block in hf.model.layers:
            block.mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0]]))
            block.mlp.up_proj.weight.copy_(torch.tensor([[0.0, 1]]))
            block.mlp.down_proj.weight.copy_(torch.tensor([[0.0], [1]]))
        hf.model.layers[1].self_attn.v_proj.weight.copy_(torch.eye(2))
        hf.model.layers[1].self_attn.o_proj.weight.copy_(torch.diag(torch.tensor([2.0, -1])))
        hf.lm_head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0.5]]))
    return LanguageModel(hf, None, "toy"), [
        _one_latent([1.0, 0.5], 0.0, [0.0, 0.5]),
        _one_latent([0.5, 1.0], 0.25, [0.0, 0.4]),
    ]


def _one_latent(encoder: list[float], b_enc: float, decoder: list[float]) -> SparseCoder:
    """A transcoder with one latent that can fire, and one that never does."""
    coder = SparseCoder(2, 2, 2, "relu")
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([encoder, [0.0, 0.0]]).T)
        coder.b_enc.copy_(torch.tensor([b_enc, -1.0]))
        coder.W_dec.copy_(torch.tensor([decoder, [0.0, 0.0]]))
        coder.b_dec.zero_()
    return coder


# ---------------------------------------------------------------------------------------- labels

LEAST_SHARE = 0.5  # of a latent's activation: a concept that accounts for as much names it
LEAST_RISE = 4.0  # standard deviations: an answer whose logit a latent raises as much names it


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
def latent_labels(
    model: LanguageModel, coders: Coders, reading: Reading | None = None
) -> dict[tuple[int, int], str]:
    """{(layer, latent): words}, for the latents that fire on TinyWorld's sentences.

    A latent's label is the *rarest* concept that accounts for `LEAST_SHARE` of its Σ activations in
    both halves of the sentences. Without one it is, after an arrow, the word among TinyWorld's
    answers whose logit the latent raises most, if that is `LEAST_RISE` standard deviations above
    the mean of the answers. Other latents have no label. (The share is a precision. Recall does not
    count: a latent may fire at one word of a sentence about France, and be about France alone.)
    """
    reading = reading or read_sentences(model)
    names = list(reading.concepts)
    truth = torch.tensor(np.stack(list(reading.concepts.values()), 1)).float()  # (rows, concepts)
    rarest = truth.mean(0).argsort()
    words = _answers(model)
    labels = {}
    for layer, coder in by_layer(coders).items():
        f = activations(model, coder, layer, reading)
        share = torch.minimum(
            shares(f[: reading.half], truth[: reading.half]),
            shares(f[reading.half :], truth[reading.half :]),
        )[:, rarest]  # (latents, concepts)
        enough = share >= LEAST_SHARE
        active = f.any(0).nonzero()[:, 0]
        raised = logit_effects(model, coder.W_dec[active].detach())[:, words].cpu()
        raised = (raised - raised.mean(-1, keepdim=True)) / raised.std(-1, keepdim=True)
        for j, (rise, word) in zip(active.tolist(), zip(*raised.max(-1), strict=True), strict=True):
            if enough[j].any():
                labels[layer, j] = names[rarest[enough[j].float().argmax()]]
            elif rise >= LEAST_RISE:
                labels[layer, j] = f"→ {model.tokenizer.decode([int(words[word])]).strip()}"
    return labels


def _answers(model: LanguageModel) -> Tensor:
    """The tokens that answer sentences of any kind, each once."""
    said = {each.answer for kind in KINDS for each in sentences(kind)}
    ids = set()
    for word in said:
        with suppress(ModelError):
            ids.add(model.to_single_token(f" {word}"))
    return torch.tensor(sorted(ids))


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


def question_graph(
    model: LanguageModel, coders: Coders, question: Question, labels: Mapping | None = None
) -> Graph:
    """The graph of a question, with its answer and the rival as logits.

    Args:
        labels: as `Graph.label` takes them; features with one label become a supernode.
    """
    targets = [question.answer, question.rival]
    graph = attribution_graph(model, coders, question.prompt, targets, max_features=MOST_FEATURES)
    return group_by_label(graph.label(labels)) if labels else graph


def logit_gap(graph: Graph, change: Tensor | None = None) -> float:
    """The answer's logit less the rival's, of the graph or of a change (n,) of its values."""
    values = graph.values if change is None else change
    first, second = graph.mask(LOGIT).nonzero()[:2, 0].tolist()
    return float(values[first] - values[second])


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


def by_label(graph: Graph) -> dict[str, float]:
    """{label: Σ contributions of its features to the gap}, the largest amount first."""
    own, sums = contributions(graph), {}
    for label, names in graph.supernodes.items():
        sums[label] = sum(float(own[graph.index(name)]) for name in names)
    return dict(sorted(sums.items(), key=lambda pair: -abs(pair[1])))


def shares_by_kind(graph: Graph) -> dict[str, float]:
    """{kind of node: Σ contributions over the gap}. Errors and embeddings act through features, and
    biases add to the gap, so the shares do not sum to 1."""
    own, gap = contributions(graph), logit_gap(graph)
    return {kind: float(own[graph.mask(kind)].sum()) / gap for kind in (EMBEDDING, FEATURE, ERROR)}


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
    model: LanguageModel, coders: Coders, whole: Sequence[Graph], seed: int = 0
) -> dict[str, np.ndarray]:
    """{condition: (graphs, 2)}: replacement and completeness scores of whole graphs, and of three
    controls on their prompts (`CONDITIONS`)."""
    exchanged, blank = shuffled(coders, seed), untrained(model, seed)
    rows: dict[str, list] = {name: [] for name in CONDITIONS}
    for i, graph in enumerate(whole):
        made = (
            graph,
            attribution_graph(model, exchanged, graph.prompt, max_features=MOST_FEATURES),
            attribution_graph(blank, coders, graph.prompt, max_features=MOST_FEATURES),
            random_graph(graph, seed + i),
        )
        for name, each in zip(CONDITIONS, made, strict=True):
            rows[name].append(graph_scores(each))
    return {name: np.array(scores) for name, scores in rows.items()}
