"""Lesson 08's experiments: questions with a partner, labels from TinyWorld's truth, stories and how
they end.

    coders = list(load_transcoders())
    asked = questions(model, 30, seed=0)
    graph = question_graph(model, coders, asked[0], latent_labels(model, coders))
    story = tell(model, coders, asked[0], labels)      # what the graph predicts, in numbers
    outcomes = try_story(model, coders, story)         # what the model does, and whether it fits

The engine is `mi_helpers.circuits`, `graphs` and `interventions`. Here are the prompts, what is
measured over many of them, and the rows of the ledger.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mi_helpers.circuits import attribution_graph, reads_of
from mi_helpers.coders import SparseCoder
from mi_helpers.features import logit_effects
from mi_helpers.graph_figures import ADDS, intervention_figure
from mi_helpers.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    graph_scores,
    group_by_label,
    predicted_effect,
    random_graph,
)
from mi_helpers.interventions import Intervention, intervene
from mi_helpers.lesions import untrained
from mi_helpers.models import LanguageModel, ModelError, load_model, norm_gain
from mi_helpers.plots import OKABE_ITO, figure, style
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.circuits import TWO_HOP_HELD, is_held

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
    "two-hop language": ("landmark", "People near the {} speak", "language"),
    "two-hop currency": ("landmark", "People near the {} pay with the", "currency"),
}
TWO_HOP = tuple(kind for kind in KINDS if kind.startswith("two-hop"))


@dataclass(frozen=True)
class Question:
    """A prompt that the model answers rightly, and a partner of as many tokens, answered rightly
    too, with another answer.

    kind               one of `KINDS`
    subject            what the prompt names; of_partner: what the partner names
    country            the subject's; rival_country: the partner's
    answer, rival      the two right answers, one token each, with their space
    """

    kind: str
    prompt: str
    partner: str
    subject: str
    of_partner: str
    country: str
    rival_country: str
    answer: str
    rival: str

    def turned(self) -> Question:
        """The partner's question, whose partner is this one."""
        return Question(
            self.kind, self.partner, self.prompt, self.of_partner, self.subject,
            self.rival_country, self.country, self.rival, self.answer,
        )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """One sentence of a kind: its prompt, subject, country and answer."""

    prompt: str
    subject: str
    country: str
    answer: str


def _sentences(kind: str) -> Iterator[_Asked]:
    """Every sentence of a kind; of two hops, only those where the second hop matters: a capital
    that is not the landmark's own city."""
    named, phrase, wanted = KINDS[kind]
    if named == "country":
        for place in lexicon.countries().values():
            yield _Asked(phrase.format(place.name), place.name, place.name, getattr(place, wanted))
        return
    for mark in lexicon.landmarks():
        country = lexicon.countries()[mark.country]
        answer = mark.city if wanted == "city" else getattr(country, wanted)
        if kind != "two-hop capital" or answer != mark.city:
            yield _Asked(phrase.format(mark.name), mark.name, country.name, answer)


def unseen(kind: str, subject: str) -> bool:
    """Whether a landmark was never asked about in this way while the model was trained."""
    return kind in TWO_HOP and is_held(subject, kind.split()[-1], share=TWO_HOP_HELD)


@torch.no_grad()
def _right(model: LanguageModel, kind: str) -> tuple[list[_Asked], int]:
    """The sentences of a kind whose answer is one token and the model's first choice; and how many
    there are whose answer is one token."""
    asked = []
    for each in _sentences(kind):
        try:
            model.to_single_token(f" {each.answer}")
        except ModelError:
            continue
        asked.append(each)
    by_length = defaultdict(list)
    for each in asked:
        by_length[len(model._encode(each.prompt))].append(each)
    right = set()
    for group in by_length.values():
        said = model.forward(model.tokens([each.prompt for each in group]))[:, -1].argmax(-1)
        wanted = [model.to_single_token(f" {each.answer}") for each in group]
        right |= {e for e, a, b in zip(group, said.tolist(), wanted, strict=True) if a == b}
    return [each for each in asked if each in right], len(asked)


@lru_cache(maxsize=4)
def _known(model: LanguageModel) -> dict[str, tuple[list[_Asked], int]]:
    return {kind: _right(model, kind) for kind in KINDS}


def accuracy(model: LanguageModel) -> dict[str, float]:
    """{kind: share of its sentences that the model answers rightly}."""
    return {kind: len(right) / max(n, 1) for kind, (right, n) in _known(model).items()}


def questions(
    model: LanguageModel, n: int, seed: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """n questions with their partners, the kinds in turn.

    Raises:
        ValueError: an unknown kind; a kind of which the model answers too few sentences of one
            token count.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"There is no kind {unknown}: choose from {', '.join(KINDS)}.")
    rng, made = random.Random(seed), []
    pools = {kind: _partners(model, kind) for kind in kinds}
    for i in range(n):
        kind = kinds[i % len(kinds)]
        one, other = rng.choice(pools[kind])
        made.append(
            Question(
                kind,
                one.prompt,
                other.prompt,
                one.subject,
                other.subject,
                one.country,
                other.country,
                f" {one.answer}",
                f" {other.answer}",
            )  # fmt: skip
        )
    return made


def _partners(model: LanguageModel, kind: str) -> list[tuple[_Asked, _Asked]]:
    """Ordered pairs of rightly answered sentences of one token count, with different countries and
    answers."""
    right = _known(model)[kind][0]
    length = {each: len(model._encode(each.prompt)) for each in right}
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


# ---------------------------------------------------------------------------------------- labels

LEAST_SHARE = 0.5  # of what a latent fires: a concept that accounts for as much names it
LEAST_RISE = 4.0  # standard deviations by which the logit that a latent raises most stands out


@torch.no_grad()
def read_by(model: LanguageModel, coder, layer: int, mlp_in: Tensor) -> Tensor:
    """What a transcoder reads, from the MLP's input (..., d_model)."""
    if reads_of(coder) == "mlp_in":
        return mlp_in
    return mlp_in / norm_gain(model.part("ln2", layer))


@dataclass(frozen=True)
class Reading:
    """Sentences that the model has read, token by token, `<bos>` left out.

    mlp_in     {layer: (rows, d_model)}
    concepts   {name: mask (rows,)}: TinyWorld's truth at each token
    half       how many rows the first half of the sentences has
    subjects   (rows,): what the token's sentence names
    """

    mlp_in: dict[int, Tensor]
    concepts: dict[str, np.ndarray]
    half: int
    subjects: np.ndarray


@torch.no_grad()
def read_sentences(model: LanguageModel, most: int = 100, seed: int = 0) -> Reading:
    """At most `most` sentences of each kind, with what TinyWorld says of each token:

    a country      from the last token of what names it, or of its landmark, to the sentence's end
    "asks for …"   the last token, from which the answer is predicted
    a token        the token itself, in quotes
    """
    rng = random.Random(seed)
    asked = [(k, each) for k in KINDS for each in _some(list(_sentences(k)), most, rng)]
    rng.shuffle(asked)  # names are chosen on one half of the sentences, and tested on the other
    by_length = defaultdict(list)
    for i, (_, each) in enumerate(asked):
        by_length[len(model._encode(each.prompt))].append(i)
    sites = [("mlp_in", layer) for layer in range(model.n_layers)]
    rows: dict[tuple, Tensor] = {}
    for group in by_length.values():
        _, kept = model.run_with_cache([asked[i][1].prompt for i in group], sites)
        for layer in range(model.n_layers):
            for i, x in zip(group, kept["mlp_in", layer][:, 1:].float(), strict=True):
                rows[layer, i] = x
    said = [_truth(model, *each) for each in asked]
    half = sum(map(len, said[: len(said) // 2]))
    tokens = [here for sentence in said for here in sentence]
    names = sorted(set().union(*tokens[:half]) & set().union(*tokens[half:]))
    concepts = {name: np.array([name in here for here in tokens]) for name in names}
    order = range(len(asked))
    mlp_in = {layer: torch.cat([rows[layer, i] for i in order]) for layer in range(model.n_layers)}
    subjects = [each.subject for (_, each), here in zip(asked, said, strict=True) for _ in here]
    return Reading(mlp_in, concepts, half, np.array(subjects))


def _some(items: list, most: int, rng: random.Random) -> list:
    return items if len(items) <= most else rng.sample(items, most)


def _truth(model: LanguageModel, kind: str, asked: _Asked) -> list[set[str]]:
    """What is true at each token of a sentence, `<bos>` left out."""
    tokens = model.str_tokens(model._encode(asked.prompt))
    begin = asked.prompt.index(asked.subject) + len(asked.subject)
    said, end = [], 0
    for token in tokens:
        end += len(token)
        here = {f"'{token.strip()}'"} if token.strip() else set()
        said.append(here | ({asked.country} if end >= begin else set()))
    said[-1].add(f"asks for {kind.split()[-1]}")
    return said


@torch.no_grad()
def latent_labels(
    model: LanguageModel, coders: Mapping | Sequence, reading: Reading | None = None
) -> dict[tuple[int, int], str]:
    """{(layer, latent): words}, for the latents that fire on TinyWorld's sentences.

    The *rarest* concept that accounts for `LEAST_SHARE` of what the latent fires, Σ activations, in
    both halves of the sentences. If there is none, after an arrow, the word among TinyWorld's
    answers whose logit the latent raises most, if that stands out from those of the other answers
    by `LEAST_RISE` standard deviations. The others get no label, and none is typed in. (The share
    is a precision. Recall is not asked for: a latent may fire at one word of a sentence about
    France, and still be about France alone.)
    """
    reading = reading or read_sentences(model)
    names = list(reading.concepts)
    truth = torch.tensor(np.stack(list(reading.concepts.values()), 1)).float()  # (rows, concepts)
    rarest = truth.mean(0).argsort()
    words = _answers(model)
    held = coders if isinstance(coders, Mapping) else dict(enumerate(coders))
    labels = {}
    for layer, coder in held.items():
        f = activations(model, coder, layer, reading)
        share = torch.minimum(
            _shares(f[: reading.half], truth[: reading.half]),
            _shares(f[reading.half :], truth[reading.half :]),
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
    """The tokens that answer a sentence of any kind, each once."""
    said = {each.answer for kind in KINDS for each in _sentences(kind)}
    ids = [model._encode(f" {word}") for word in sorted(said)]
    return torch.tensor(sorted({each[0] for each in ids if len(each) == 1}))


@torch.no_grad()
def activations(model: LanguageModel, coder, layer: int, reading: Reading) -> Tensor:
    """(rows, d_latent), of one layer's latents at every token of the sentences."""
    return coder.encode(read_by(model, coder, layer, reading.mlp_in[layer])).float().cpu()


def _shares(f: Tensor, truth: Tensor) -> Tensor:
    """The share of each latent's activation that stands at each concept, (latents, concepts)."""
    return (f.T @ truth) / f.sum(0).clamp(min=1e-9)[:, None]


# ---------------------------------------------------------------------------------------- graphs


def question_graph(
    model: LanguageModel, coders, question: Question, labels: Mapping | None = None
) -> Graph:
    """The graph of a question, with its answer and its rival as logits; labelled, with one
    supernode for each label."""
    graph = attribution_graph(model, coders, question.prompt, [question.answer, question.rival])
    return group_by_label(graph.label(labels)) if labels else graph


def logit_gap(graph: Graph, change: Tensor | None = None) -> float:
    """The answer's logit less the rival's; or of a change (n,), as `predicted_effect` gives it."""
    values = graph.values if change is None else change
    first, second = graph.mask(LOGIT).nonzero()[:2, 0].tolist()
    return float(values[first] - values[second])


def worth(graph: Graph) -> Tensor:
    """What each node adds to the gap between the two logits, over all paths, (n,).

    Walks from the logits back: a feature passes on the share of its value that the node makes up.
    Taking the node away alone changes the gap by minus this much, as the graph sees it.
    """
    edges = graph.adjacency.double()
    first, second = graph.mask(LOGIT).nonzero()[:2, 0].tolist()
    weight, total = torch.zeros(len(graph)).double(), torch.zeros(len(graph)).double()
    weight[first], weight[second] = 1.0, -1.0
    feature = graph.mask(FEATURE).tolist()
    for i in reversed(range(first)):
        total[i] = edges[i + 1 :, i] @ weight[i + 1 :]
        if feature[i]:
            weight[i] = total[i] / graph.values[i].double()
    return total.float()


def by_label(graph: Graph) -> dict[str, float]:
    """{label: what its features together add to the gap}, the largest amount first."""
    own, sums = worth(graph), {}
    for label, names in graph.supernodes.items():
        sums[label] = sum(float(own[graph.index(name)]) for name in names)
    return dict(sorted(sums.items(), key=lambda pair: -abs(pair[1])))


# ------------------------------------------------------------------------------ scores and controls


def shuffled(coders: Sequence[SparseCoder], seed: int) -> list[SparseCoder]:
    """A control: latents fire as before, and each writes what another one of its layer wrote."""
    rng, made = torch.Generator().manual_seed(seed), []
    for coder in coders:
        other = copy.deepcopy(coder)
        with torch.no_grad():
            rows = coder.W_dec.detach()
            other.W_dec.copy_(rows[torch.randperm(len(rows), generator=rng).to(rows.device)])
        made.append(other)
    return made


SCORES = ("replacement", "completeness")
CONDITIONS = ("the graph", "edges dealt out anew", "decoders exchanged", "untrained model")


def score_table(
    model: LanguageModel, coders: Sequence[SparseCoder], prompts: Sequence[str], seed: int = 0
) -> dict[str, np.ndarray]:
    """{condition: (prompts, 2)}: replacement and completeness score of each prompt's whole graph,
    and of three controls (`CONDITIONS`)."""
    exchanged, blank = shuffled(coders, seed), untrained(model, seed)
    rows: dict[str, list] = {name: [] for name in CONDITIONS}
    for i, prompt in enumerate(prompts):
        graph = attribution_graph(model, coders, prompt)
        made = (
            graph,
            random_graph(graph, seed + i),
            attribution_graph(model, exchanged, prompt),
            attribution_graph(blank, coders, prompt),
        )
        for name, each in zip(CONDITIONS, made, strict=True):
            rows[name].append(graph_scores(each))
    return {name: np.array(scores) for name, scores in rows.items()}


@style()
def score_figure(table: Mapping[str, np.ndarray]) -> Figure:
    """One dot per prompt, and a bar at the median: both scores under each condition.

    Realises the comparison of graph scores in "Circuit Tracing" (Ameisen and others, 2025).
    """
    picture, axes = figure(9, 1.4 + 0.5 * len(table), 1, 2, sharey=True)
    for column, (one, name) in enumerate(zip(axes, SCORES, strict=True)):
        for row, values in enumerate(table.values()):
            x = values[:, column]
            y = row + 0.25 * np.linspace(-1, 1, len(x))
            one.plot(x, y, linestyle="", marker="o", markersize=4, alpha=0.6, color=ADDS)
            one.plot([np.median(x)] * 2, [row - 0.4, row + 0.4], color="black", marker="")
            one.text(1.02, row, f"{np.median(x):.2f}", va="center", fontsize=11)
        one.set(xlim=(0, 1.0), xlabel=f"{name} score", ylim=(len(table) - 0.5, -0.5))
    axes[0].set_yticks(range(len(table)), list(table))
    return picture


# ------------------------------------------------------------------------------ the country's step


LIFT = 5.0  # times more where a country is the subject than elsewhere: a latent that favours it


class Countries:
    """Which latents favour which country, in sentences that do *not* name a given landmark.

    `favour(country, subject)` gives the (layer, latent) whose activation falls on tokens of the
    country at least `LIFT` times as often as such tokens occur. Sentences with the subject do not
    count: so a latent of that landmark alone is none of its country.
    """

    def __init__(self, model: LanguageModel, coders: Sequence, reading: Reading):
        self.reading = reading
        self.fired = [activations(model, c, i, reading) for i, c in enumerate(coders)]

    @lru_cache(maxsize=256)  # noqa: B019: as many entries as there are landmarks, and one object
    def favour(self, country: str, subject: str) -> frozenset[tuple[int, int]]:
        if country not in self.reading.concepts:
            raise ValueError(f"No sentence that was read is about {country!r}.")
        others = torch.tensor(self.reading.subjects != subject)
        about = torch.tensor(self.reading.concepts[country])[others].float()
        found = set()
        for layer, fired in enumerate(self.fired):
            lift = _shares(fired[others], about[:, None])[:, 0] / about.mean().clamp(min=1e-9)
            found |= {(layer, j) for j in (lift >= LIFT).nonzero()[:, 0].tolist()}
        return frozenset(found)

    def nodes(self, graph: Graph, country: str, subject: str) -> tuple[str, ...]:
        """The features of a graph that favour the country."""
        favour = self.favour(country, subject)
        return tuple(
            n.id for n in graph.nodes if n.kind == FEATURE and (n.layer, n.index) in favour
        )


def country_story(model: LanguageModel, coders, question: Question, countries: Countries) -> Story:
    """The story that a question goes through its country: about the features that favour it. The
    swap puts in those that favour the partner's country, in the partner's graph."""
    graph = question_graph(model, coders, question)
    other = question_graph(model, coders, question.turned())
    nodes = countries.nodes(graph, question.country, question.subject)
    theirs = countries.nodes(other, question.rival_country, question.of_partner)
    return _story(question, f"favour {question.country}", graph, nodes, other, theirs)


def random_change(model: LanguageModel, coders, story: Story) -> float:
    """A control: the change of the gap without as many other features of the same layers, of the
    nearest activation, whatever they are worth."""
    graph = question_graph(model, coders, story.question)
    factors = dict.fromkeys(_like(graph, story.nodes), 0.0)
    result = intervene(model, coders, story.question.prompt, factors)
    return gap_change(model, story.question, result)


# --------------------------------------------------------------------------------------- stories

SMALL = 0.1  # of the logit gap: less is no effect


@dataclass(frozen=True, eq=False)
class Story:
    """A circuit told from a graph, and what it predicts, before anything is changed.

    label             of the supernode it is about; nodes: its features
    into              {node: activation}: the partner's features that a swap puts in
    null              as many features that the graph says do little
    gap               the model's logit of the answer less that of the rival
    suppress, swap    the predicted change of the gap
    """

    question: Question
    label: str
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


def tell(model: LanguageModel, coders, question: Question, labels: Mapping) -> Story:
    """A question's story, by one rule.

    The supernode whose features, taken away, cost the answer most against the rival, as the graph
    sees it. The swap also puts in the supernode that the same rule finds in the partner's graph.
    The null takes as many features that are worth little (`_like`).
    """
    graph = question_graph(model, coders, question, labels)
    other = question_graph(model, coders, question.turned(), labels)
    sums, theirs = by_label(graph), by_label(other)
    if not sums or not theirs:
        raise ValueError(f"No feature of the graphs of {question.prompt!r} has a label.")
    label, their = max(sums, key=sums.get), max(theirs, key=theirs.get)
    return _story(question, label, graph, graph.supernodes[label], other, other.supernodes[their])


def _story(
    question: Question,
    label: str,
    graph: Graph,
    nodes: Sequence[str],
    other: Graph,
    theirs: Sequence[str],
) -> Story:
    """A story about `nodes` of its graph, and, for the swap, `theirs` of the partner's graph."""
    suppress = logit_gap(graph, predicted_effect(graph, dict.fromkeys(nodes, 0.0)))
    lost = logit_gap(other, predicted_effect(other, dict.fromkeys(theirs, 0.0)))
    into = {name: other.value(name) for name in theirs if name not in nodes}
    limit = float(worth(graph)[graph.mask(FEATURE)].abs().median())
    return Story(
        question,
        label,
        tuple(nodes),
        into,
        tuple(_like(graph, nodes, limit)),
        logit_gap(graph),
        suppress,
        suppress + lost,  # the rival's gap, lost there, is what is put in here
    )


def _like(graph: Graph, nodes: Sequence[str], limit: float = float("inf")) -> list[str]:
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


INTERVENTIONS = ("suppress", "swap", "null")


def changes(story: Story, what: str, factor: float = 0.0) -> tuple[dict, dict]:
    """(factors, values) for `intervene`."""
    if what not in INTERVENTIONS:
        raise ValueError(f"An intervention is one of {', '.join(INTERVENTIONS)}, not {what!r}.")
    nodes = story.null if what == "null" else story.nodes
    return dict.fromkeys(nodes, factor), dict(story.into) if what == "swap" else {}


def gap_change(model: LanguageModel, question: Question, result: Intervention) -> float:
    """By how much an intervention changed answer less rival, in logits before the soft-cap."""
    a, b = (model.to_single_token(word) for word in (question.answer, question.rival))
    before, after = result.uncapped_before, result.uncapped_after
    return float((after[a] - after[b]) - (before[a] - before[b]))


def observe(
    model: LanguageModel, coders, story: Story, what: str, attention: str = "frozen"
) -> float:
    """What the model does: the change of the gap."""
    factors, values = changes(story, what)
    result = intervene(
        model, coders, story.question.prompt, factors, values=values, attention=attention
    )
    return gap_change(model, story.question, result)


def verdict(story: Story, what: str, observed: float, suppressed: float) -> bool:
    """Whether what was observed is what the story predicted: see `Outcome`; suppressed: the change
    that was observed without the story's features."""
    least = SMALL * story.gap
    if what == "suppress":
        return observed < -least and story.suppress < 0
    if what == "swap":
        return observed < suppressed - least and (story.gap + observed < 0) == story.flips
    return abs(observed) < least


def try_story(model: LanguageModel, coders, story: Story) -> list[Outcome]:
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


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, hits and misses, in the order of the stories."""
    lines = [
        "| prompt | answer / rival | supernode | features | intervention | predicted | observed "
        "| attention recomputed | verdict |",
        "|---|---|---|--:|---|--:|--:|--:|---|",
    ]
    for o in outcomes:
        q, story = o.story.question, o.story
        count = len(story.nodes) + (len(story.into) if o.what == "swap" else 0)
        first = o.what == INTERVENTIONS[0]
        cells = (
            f"{q.prompt} …" if first else "",
            f"{q.answer.strip()} / {q.rival.strip()}" if first else "",
            story.label if first else "",
            str(count),
            o.what,
            f"{o.predicted:+.1f}",
            f"{o.observed:+.1f}",
            f"{o.recomputed:+.1f}",
            "hit" if o.hit else "**miss**",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hits(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """{intervention: (hits, trials)}."""
    kinds = {what: [o.hit for o in outcomes if o.what == what] for what in INTERVENTIONS}
    return {what: (sum(each), len(each)) for what, each in kinds.items()}


MARKS = {"suppress": ("o", OKABE_ITO[0]), "swap": ("s", OKABE_ITO[1]), "null": ("D", "white")}


@style()
def prediction_figure(outcomes: Sequence[Outcome]) -> Figure:
    """What the graph predicted against what the model did, a mark per intervention, once with
    frozen and once with recomputed attention; misses have a cross.

    Realises the validation of graphs by perturbation in "Circuit Tracing" (Ameisen and others,
    2025), "Validating Attribution Graph Hypotheses with Interventions".
    """
    picture, axes = figure(10, 5, 1, 2, sharey=True)
    for one, kind in zip(axes, ("observed", "recomputed"), strict=True):
        for what, (marker, face) in MARKS.items():
            these = [o for o in outcomes if o.what == what]
            x, y = [o.predicted for o in these], [getattr(o, kind) for o in these]
            one.scatter(x, y, 60, marker=marker, facecolor=face, edgecolor="black", label=what)
        missed = [o for o in outcomes if not o.hit]
        one.scatter([o.predicted for o in missed], [getattr(o, kind) for o in missed], 40,
                    marker="x", color="black", label="a miss", zorder=3)  # fmt: skip
        ends = [min(*one.get_xlim(), *one.get_ylim()), max(*one.get_xlim(), *one.get_ylim())]
        one.plot(ends, ends, color="0.6", linestyle="--", marker="", zorder=0)
        one.set_xlabel("predicted change of the logit gap")
    axes[0].set(title="attention frozen", ylabel="observed change")
    axes[1].set(title="attention recomputed")
    axes[0].legend()
    return picture


class InterventionExplorer:
    """`explorer(story, factor, swap, attention)`: the next token before and after, as a Figure.

    stories: {name: Story}; factor multiplies the story's features, and with `swap` the partner's
    are put in, too.
    """

    def __init__(self, model: LanguageModel, coders, stories: Mapping[str, Story]):
        if not stories:
            raise ValueError("Give the explorer at least one story: {'a name': story}.")
        self.model, self.coders, self.stories = model, coders, dict(stories)

    def __call__(
        self, story: str, factor: float = 0.0, swap: bool = False, attention: str = "frozen"
    ) -> Figure:
        if story not in self.stories:
            raise ValueError(f"There is no story {story!r}: choose one of {list(self.stories)}.")
        told = self.stories[story]
        factors, values = changes(told, "swap" if swap else "suppress", factor)
        result = intervene(
            self.model, self.coders, told.question.prompt, factors, values=values,
            attention=attention,
        )  # fmt: skip
        change = gap_change(self.model, told.question, result)
        q = told.question
        title = (
            f"'{told.label}', {len(told.nodes)} features × {factor:g}: logit of {q.answer.strip()} "
            f"less {q.rival.strip()} {told.gap:.1f} → {told.gap + change:.1f}"
        )
        return intervention_figure(result, title)


# ---------------------------------------------------------------------------- what is left out


@torch.no_grad()
def attention_alone(model: LanguageModel, question: Question) -> float:
    """How the gap changes if all attention patterns are the partner's, as a share of the gap.

    No edge of a graph says anything of this: a graph takes its prompt's patterns as given.
    """
    _, theirs = model.run_with_cache(question.partner, "pattern")
    ids = model.tokens(question.prompt)
    a, b = (model.to_single_token(word) for word in (question.answer, question.rival))
    before = model.forward(ids)[0, -1]
    hooks = {
        ("pattern", layer): lambda x, layer=layer: theirs["pattern", layer].to(x)
        for layer in range(model.n_layers)
    }
    with model.hooks(hooks):
        after = model.forward(ids)[0, -1]
    gap = float(before[a] - before[b])
    return (float(after[a] - after[b]) - gap) / gap


def worth_by_kind(graph: Graph) -> dict[str, float]:
    """{kind of node: the share of the gap that such nodes add}; biases add the rest."""
    own, gap = worth(graph), logit_gap(graph)
    direct = {}
    for kind in (EMBEDDING, FEATURE, ERROR):
        direct[kind] = float(own[graph.mask(kind)].sum()) / gap
    return direct


# ----------------------------------------------------------------------------------- for the ledger


@cache
def _shipped() -> tuple[LanguageModel, list[SparseCoder], dict]:
    """The shipped model, its transcoders and their labels."""
    from mi_helpers.transcoders import load_transcoders

    model, coders = load_model("tiny-gemma"), list(load_transcoders())
    return model, coders, latent_labels(model, coders)


def worst_edge_sum(seed: int) -> float:
    """The largest |Σ edges + bias - value| over the |Σ| of a node's edges and bias, six prompts."""
    model, coders, _ = _shipped()
    asked = questions(model, 6, seed)
    graphs = [attribution_graph(model, coders, q.prompt) for q in asked]
    return max(graph.edge_error.scaled for graph in graphs)


def median_replacement(seed: int) -> float:
    """The median replacement score of whole graphs, fourteen prompts."""
    model, coders, _ = _shipped()
    graphs = [attribution_graph(model, coders, q.prompt) for q in questions(model, 14, seed)]
    return float(np.median([graph_scores(graph)[0] for graph in graphs]))


def exchanged_replacement(seed: int) -> float:
    """The control: the same with the latents' decoder rows exchanged."""
    model, coders, _ = _shipped()
    exchanged = shuffled(coders, seed)
    graphs = [attribution_graph(model, exchanged, q.prompt) for q in questions(model, 14, seed)]
    return float(np.median([graph_scores(graph)[0] for graph in graphs]))


@cache
def _country_stories(seed: int, n: int = 8) -> list[Story]:
    """Stories through the country, of two-hop questions whose landmark and relation never stood
    together in training."""
    model, coders, _ = _shipped()
    return [country_story(model, coders, q, _countries()) for q in unseen_hops(model, n, seed)]


@cache
def _countries() -> Countries:
    model, coders, _ = _shipped()
    return Countries(model, coders, read_sentences(model))


def unseen_hops(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """n two-hop questions that training never showed (`unseen`), each once."""
    asked = questions(model, 40 * n, seed, TWO_HOP)
    return list({q.prompt: q for q in asked if unseen(q.kind, q.subject)}.values())[:n]


def _mean_share(seed: int, what: str) -> float:
    model, coders, _ = _shipped()
    stories = _country_stories(seed)
    return float(np.mean([observe(model, coders, s, what) / s.gap for s in stories]))


def country_swap(seed: int) -> float:
    """Two hops: the change of the logit gap, as a share of it, when the features that favour the
    country are exchanged for those of the partner's; mean over eight questions."""
    return _mean_share(seed, "swap")


def country_random(seed: int) -> float:
    """The control: the same without as many other features of the same layers, about as active."""
    model, coders, _ = _shipped()
    stories = _country_stories(seed)
    return float(np.mean([random_change(model, coders, s) / s.gap for s in stories]))


def story_hits(seed: int) -> float:
    """The share of ten stories whose features, suppressed, cost the answer as predicted."""
    model, coders, labels = _shipped()
    stories = [tell(model, coders, q, labels) for q in questions(model, 10, seed)]
    seen = [observe(model, coders, s, "suppress") for s in stories]
    hit = [verdict(s, "suppress", x, x) for s, x in zip(stories, seen, strict=True)]
    return float(np.mean(hit))
