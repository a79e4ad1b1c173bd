"""Lesson 08's questions: prompts in pairs, labels of latents by TinyWorld's truth, and graphs.

    coders = coders_for(model, range(model.n_layers))
    asked = questions(model, 30, seed=0)
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

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
from mi_helpers.circuits.replacement import Coders, by_layer, reads_of
from mi_helpers.heads import repeated_tokens
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.loading import untrained
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import logit_effects
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.facts import TWO_HOP_HELD
from mi_helpers.tinyworld.held import is_held

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
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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


# ------------------------------------------------------------------------------------- questions

KINDS = {  # kind -> (what the sentence names, phrase, the country's property that answers)
    "city": ("landmark", "The {} is in the city of", "city"),
    "country": ("landmark", "The {} is in the country of", "name"),
    "capital": ("country", "The capital of {} is", "capital"),
    "language": ("country", "The language of {} is", "language"),
    "two-hop capital": ("landmark", "The capital of the country with the {} is", "capital"),
    "two-hop language": ("landmark", "The language of the country with the {} is", "language"),
    "two-hop currency": ("landmark", "People near the {} pay with the", "currency"),
}
TWO_HOP = tuple(kind for kind in KINDS if kind.startswith("two-hop"))
ALIKE = (("city", "country"), ("capital", "language"), ("two-hop capital", "two-hop language"))


@dataclass(frozen=True)
class Asked:
    """One sentence that asks for something.

    kind             one of `KINDS`
    subject          what the sentence names: a landmark or a country
    country          where that is
    prompt, answer   as texts
    """

    kind: str
    prompt: str
    subject: str
    country: str
    answer: str

    @property
    def asks(self) -> str:
        """What it asks for, such as "asks for capital"."""
        return f"asks for {self.kind.split()[-1]}"


@dataclass(frozen=True)
class Question:
    """A sentence and its partner, with as many tokens and another answer.

    Answers are one token each, with their space: " Paris".
    """

    one: Asked
    other: Asked

    @property
    def prompt(self) -> str:
        return self.one.prompt

    @property
    def answer(self) -> str:
        return f" {self.one.answer}"

    @property
    def rival(self) -> str:
        """The partner's answer."""
        return f" {self.other.answer}"

    def turned(self) -> Question:
        """The partner's question, whose partner is this one."""
        return Question(self.other, self.one)


def sentences(kind: str) -> Iterator[Asked]:
    """Every sentence of a kind; of "two-hop capital" only those where the second hop matters: the
    capital is not the landmark's own city."""
    named, phrase, wanted = KINDS[kind]
    if named == "country":
        for place in lexicon.countries().values():
            answer = getattr(place, wanted)
            yield Asked(kind, phrase.format(place.name), place.name, place.name, answer)
        return
    for mark in lexicon.landmarks():
        country = lexicon.countries()[mark.country]
        answer = mark.city if wanted == "city" else getattr(country, wanted)
        if kind != "two-hop capital" or answer != mark.city:
            yield Asked(kind, phrase.format(mark.name), mark.name, country.name, answer)


def unseen(asked: Asked) -> bool:
    """Whether this landmark and what is asked of it never stood together in training."""
    two_hop = asked.kind in TWO_HOP
    return two_hop and is_held(asked.subject, asked.kind.split()[-1], share=TWO_HOP_HELD)


@torch.no_grad()
def _right(model: LanguageModel, kind: str) -> tuple[list[Asked], list[Asked]]:
    """(right, all): the sentences of a kind whose answer is one token; right are those where it is
    the model's first choice."""
    asked = []
    for each in sentences(kind):
        try:
            model.to_single_token(f" {each.answer}")
        except ModelError:
            continue
        asked.append(each)
    by_length = defaultdict(list)
    for each in asked:
        by_length[_length(model, each)].append(each)
    right = set()
    for group in by_length.values():
        said = model.forward(model.tokens([each.prompt for each in group]))[:, -1].argmax(-1)
        wanted = [model.to_single_token(f" {each.answer}") for each in group]
        right |= {e for e, a, b in zip(group, said.tolist(), wanted, strict=True) if a == b}
    return [each for each in asked if each in right], asked


def _length(model: LanguageModel, asked: Asked) -> int:
    return model.tokens(asked.prompt).shape[1]


@lru_cache(maxsize=4)
def _known(model: LanguageModel) -> dict[str, tuple[list[Asked], list[Asked]]]:
    return {kind: _right(model, kind) for kind in KINDS}


def accuracy(model: LanguageModel, only_unseen: bool = False) -> dict[str, float]:
    """{kind: the share of its sentences that the model answers rightly}.

    Args:
        only_unseen: two-hop kinds alone, and of them the sentences that training never showed.
    """
    share = {}
    for kind in TWO_HOP if only_unseen else KINDS:
        right, asked = (
            [each for each in some if unseen(each) or not only_unseen]
            for some in _known(model)[kind]
        )
        share[kind] = len(right) / max(len(asked), 1)
    return share


def questions(
    model: LanguageModel, n: int, seed: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """n questions about two countries, of the kinds in turn, whose two sentences the model answers
    rightly.

    Raises:
        ValueError: an unknown kind; a kind of which the model rightly answers too few sentences
            with as many tokens.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"There is no kind {unknown}: choose from {', '.join(KINDS)}.")
    rng = random.Random(seed)
    pools = {kind: _partners(model, kind) for kind in kinds}
    return [Question(*rng.choice(pools[kinds[i % len(kinds)]])) for i in range(n)]


def _partners(model: LanguageModel, kind: str) -> list[tuple[Asked, Asked]]:
    """Ordered pairs of rightly answered sentences, with as many tokens and with different countries
    and answers."""
    right = _known(model)[kind][0]
    length = {each: _length(model, each) for each in right}
    pairs = [
        (a, b)
        for a in right
        for b in right
        if length[a] == length[b] and a.country != b.country and a.answer != b.answer
    ]
    if not pairs:
        raise ValueError(
            f"{model.name} answers too few sentences of the kind {kind!r} to make a pair."
        )
    return pairs


def unseen_hops(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """n two-hop questions that training never showed (`unseen`), each once."""
    asked = [q for q in questions(model, 40 * n, seed, TWO_HOP) if unseen(q.one)]
    return list({q.prompt: q for q in asked}.values())[:n]


def what_is_asked(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """n questions whose partner names the same and asks for something else, of the pairs of kinds
    in `ALIKE` in turn; the model answers both sentences rightly.

    Raises:
        ValueError: it answers too few.
    """
    rng, pools, made = random.Random(seed), [], []
    for pair in ALIKE:
        one, other = ({each.subject: each for each in _known(model)[kind][0]} for kind in pair)
        both = [(one[name], other[name]) for name in one if name in other]
        pools.append(
            [
                (a, b)
                for a, b in both
                if a.answer != b.answer and _length(model, a) == _length(model, b)
            ]
        )
        rng.shuffle(pools[-1])
    for i in range(n):
        pool = pools[i % len(pools)]
        if not pool:
            raise ValueError(
                f"{model.name} answers too few of {ALIKE[i % len(ALIKE)]} about the same subject."
            )
        question = Question(*pool.pop())
        made.append(question if rng.random() < 0.5 else question.turned())
    return made


def repeated(model: LanguageModel, n: int, seed: int, length: int = 8) -> list[Question]:
    """n questions or fewer of another sort: random words, then one of them again, whose answer is
    the word that came after it. The partner has the same words and repeats another one. The model
    answers both rightly."""
    ids = repeated_tokens(model, 10 * n, length, seed)[:, -length:].tolist()
    made = []
    for i, row in enumerate(ids):
        one, other = random.Random(f"{seed} {i}").sample(range(length - 1), 2)
        pair = [_repeating(model, row, place) for place in (one, other)]
        if None not in pair and pair[0].answer != pair[1].answer and len(made) < n:
            made.append(Question(*pair))
    return made


def _repeating(model: LanguageModel, row: list[int], place: int) -> Asked | None:
    """The words, with the one at `place` again; None if the text has other tokens, or the model
    gives another answer."""
    prompt, answer = model.tokenizer.decode([*row, row[place]]), model.str_tokens([row[place + 1]])
    ids = model.tokens(prompt)[0]
    same = ids[-len(row) - 1 :].tolist() == [*row, row[place]]
    right = same and int(model.forward(ids[None])[0, -1].argmax()) == row[place + 1]
    return Asked("repeated", prompt, "", "", answer[0].strip()) if right else None


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
        by_length[_length(model, each)].append(i)
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
