"""What several lessons need: TinyWorld's documents, losses by family, labelled activations.

    losses = family_losses(model, make_batch(model)) # {family: nats per scored token}
    ids = repeated_tokens(model, n=16, length=24)    # random words, then the same again
    texts = documents_for("number", 400, seed=1)
    train = collect(model, texts, "number")          # the stream at one token of each document
    train["resid_post", 3], train.y                  # (n, d_model), and n labels

A `Mark` says which token of a document is read, and the label of what is read there. `KINDS` marks
TinyWorld's documents.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.ablation import ABLATED, record
from mi_helpers.course.check import Wrong, agree
from mi_helpers.layouts import Key, ModelError
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel, activations_at
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.copying import vocabulary
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.tokenizer import offsets
from mi_helpers.tinyworld.world import World

STREAM = ("embed", "resid_post")  # what `collect` reads by default


def on_one_core(function: Callable) -> Callable:
    """A decorator: PyTorch uses one thread in `function`, and as many as before afterwards.

    With small matrices, sharing the work among cores costs more than it saves, and many times more
    when the other cores are busy.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return call


# -- the shipped model and its controls ------------------------------------------------------


@functools.cache
def shipped_model() -> LanguageModel:
    """tiny-gemma, loaded once: what the ledger's claims are measured on."""
    return load_model("tiny-gemma")


def on_model(answer, reference, make, mistakes, otherwise: str, cases: int = 3) -> None:
    """`agree` where an answer may change the course's model: afterwards it has to be as it was.

    If it is not, the answer is wrong, and what it changed is put back: tasks and caches hold the
    same model.
    """
    model = shipped_model().hf
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    hooks = [(each, each.copy()) for part in model.modules() for each in hooks_of(part)]
    try:
        agree(answer, reference, make, mistakes, otherwise, 1e-4, cases)
    finally:
        now = model.state_dict()
        changed = [each for each, before in hooks if each != before]
        changed += [name for name, before in weights.items() if not torch.equal(now[name], before)]
        model.load_state_dict(weights)
        for each, before in hooks:
            each.clear()
            each.update(before)
        if changed:
            raise Wrong("The model stays changed afterwards: set the hook in a `with`.")


def hooks_of(part: nn.Module) -> tuple[dict, dict]:
    """The functions that torch calls before and after a module."""
    return part._forward_pre_hooks, part._forward_hooks  # noqa: SLF001


def only_words(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same shape with random weights, but the trained embedding."""
    blank = untrained(model, seed)
    with torch.no_grad():
        blank.part("embed").weight.copy_(model.part("embed").weight)
    return blank


# A model and its controls: functions of (model, seed).
MODELS: dict[str, Callable[[LanguageModel, int], LanguageModel]] = {
    "trained": lambda model, seed: model,
    "random weights": untrained,
    "trained embedding only": only_words,
}


# -- documents and their tokens --------------------------------------------------------------


def documents(family: str, n: int, seed: int, held: Iterable[str] = (), **choices) -> list:
    """n documents of one family of TinyWorld.

    Args:
        held: what comes from the held-out part of the world, such as "templates" or "entities".
        choices: of the family, such as `order="ABB"`.
    """
    return list(itertools.islice(World().documents(seed, family, held, **choices), n))


def tokens_and_ranges(model: LanguageModel, text: str) -> tuple[list[int], np.ndarray]:
    """A text's token ids, BOS first if there is one, and the characters that each covers.

    Returns:
        ids, and (start, end) of each token without its leading space, (n, 2); BOS has (-1, 0).
    """
    ids, ranges = offsets(model.tokenizer, text)
    bos = model.tokenizer.bos_token_id
    if bos is None:
        return ids, ranges
    return [bos, *ids], np.concatenate([[[-1, 0]], ranges])


def token_at(model: LanguageModel, text: str, end: int) -> tuple[list[int], int]:
    """A text's token ids, BOS first, and the position of the token with character end - 1."""
    ids, ranges = tokens_and_ranges(model, text)
    return ids, int(np.searchsorted(ranges[:, 1], end))


def answer_positions(model: LanguageModel, document: Document) -> list[int]:
    """The position at which each answer (or pronoun) begins in `model.tokens(document.text)`."""
    spans = document.find("answer") or document.find("pronoun")
    _, ranges = tokens_and_ranges(model, document.text)
    return [int(np.searchsorted(ranges[:, 0], span.start)) for span in spans]


# -- scored tokens, by family, and random words ----------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Documents as one right-padded batch, ids (n, length), and the tokens that are scored.

    Scored token j is ids[rows[j], positions[j]], of the family names[family[j]].
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor
    positions: Tensor
    family: Tensor
    names: tuple[str, ...]

    def inside(self) -> Tensor:
        """(n, length), True at the tokens after the first and before the padding."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (places > 0) & (places < self.lengths[:, None])


def make_batch(
    model: LanguageModel,
    answers: int = 16,
    seed: int = 20_000,
    families: tuple[str, ...] | None = None,
    longest: int = 24,
) -> Batch:
    """TinyWorld documents of each family, until at least `answers` of its tokens are scored.

    The first tokens of answers are scored (of pronouns in "pronoun"). Families without answers
    (prose, Norwegian) are cut to `longest` tokens, and all their tokens are scored.

    Args:
        longest: longer documents are left out. There are at least `answers / 4` of each family.

    Raises:
        ValueError: an unknown family; a family whose documents are nearly all too long.
    """
    world, rows, scored = World(), [], []
    names = tuple(families or world.families)
    for index, name in enumerate(names):
        start, first = len(scored), len(rows)
        for document in itertools.islice(world.documents(seed, name), 100 * answers):
            ids, _ = tokens_and_ranges(model, document.text)  # of any length, as it is cut below
            places = answer_positions(model, document)
            if len(ids) > longest and places:
                continue
            ids = ids[:longest]
            scored += [(len(rows), place, index) for place in places or range(1, len(ids))]
            rows.append(ids)
            if len(scored) - start >= answers and 4 * (len(rows) - first) >= answers:
                break
        else:
            raise ValueError(f"Too few documents of {name!r} have {longest} tokens: allow more.")
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    return Batch(model.pad(rows), lengths, *torch.tensor(scored).T.to(model.device), names)


@torch.no_grad()
def family_losses(model: LanguageModel, batch: Batch, hooks: Mapping | None = None) -> dict:
    """{family: mean -log p(scored token | what stands before it)}, in nats, under `hooks`."""
    with model.hooks(hooks or {}):
        _, cache = model.run_with_cache(batch.ids, "resid_final", stop_at_layer=model.n_layers)
    return losses_of_stream(model, batch, cache["resid_final"])


def losses_of_stream(model: LanguageModel, batch: Batch, final: Tensor) -> dict[str, float]:
    """`family_losses` from the final stream (n, length, d_model)."""
    logits = model.unembed(final[batch.rows, batch.positions - 1]).float()
    losses = F.cross_entropy(logits, batch.ids[batch.rows, batch.positions], reduction="none")
    return {name: losses[batch.family == i].mean().item() for i, name in enumerate(batch.names)}


def token_pool(
    model: LanguageModel, batch: Batch | None = None, sites: Iterable[str] = ABLATED
) -> dict[Key, Tensor]:
    """A reference for `Mean` and `Resample`: activations at the tokens of a batch, without `<bos>`
    and padding, {(site, layer): (tokens, ...)}; by default of fresh documents of all families."""
    batch = make_batch(model, answers=8, seed=30_000) if batch is None else batch
    return {key: x[batch.inside()] for key, x in record(model, batch.ids, sites).items()}


def word_ids(model: LanguageModel) -> Tensor:
    """Ids to draw random tokens from, (n,): TinyWorld's words that are one token with their space.

    A model without a tokenizer has all of its ids but the special ones of its configuration.
    """
    if model.tokenizer is None:
        named = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
        special = {getattr(model.config, name, None) for name in named}
        return torch.tensor([i for i in range(model.d_vocab) if i not in special])
    rows = [model.encode(f" {word}") for word in vocabulary()]
    found = {row[0] for row in rows if len(row) == 1} - {model.tokenizer.unk_token_id}
    if len(found) < 2:
        raise ModelError(f"{model.name}'s tokenizer has none of TinyWorld's words as one token.")
    return torch.tensor(sorted(found))


def repeated_tokens(
    model: LanguageModel, n: int = 16, length: int = 24, seed: int = 0, times: int = 2
) -> Tensor:
    """n sequences of `length` different random words, each written `times` times in a row.

    Returns:
        ids (n, times * length), after BOS if there is one. With times=1 nothing is repeated: the
        negative control.

    Raises:
        ModelError: fewer than two tokens to repeat, or more than the context or the vocabulary has.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads.
    """
    words, bos = word_ids(model), getattr(model.tokenizer, "bos_token_id", None)
    first = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    if length < 2 or n < 1 or times < 1:
        raise ModelError(f"n={n}, length={length}, times={times}: give 1, 2 and 1 at least.")
    if len(first) + length * times > model.n_ctx or length > len(words):
        raise ModelError(
            f"{times} times {length} tokens do not fit: {model.name} has a context of "
            f"{model.n_ctx} and {len(words)} words to draw from."
        )
    rng = torch.Generator().manual_seed(seed)
    rows = [words[torch.randperm(len(words), generator=rng)[:length]] for _ in range(n)]
    return torch.cat([first.expand(n, -1), torch.stack(rows).repeat(1, times)], 1).to(model.device)


# -- marks: which token is read, and its label -----------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One question to a probe.

    end    the token with character end - 1 is read; the model sees nothing after it
    label  the right answer
    word   the word type, to which a control task gives a random label
    group  examples of one group stand in the training set or in the test set, never in both
    """

    end: int
    label: str | int
    word: str = ""
    group: str = ""


def mark_family(document: Document, rng: random.Random) -> Mark | None:
    """The document's family, at the end of the sixth word (or of the last one)."""
    words = list(re.finditer(r"\S+", document.text))[:6]
    return Mark(words[-1].end(), document.family, words[-1][0])


def mark_tense(document: Document, rng: random.Random) -> Mark | None:
    """Present or past, at the end of the first sentence with a verb that shows it."""
    shown = [end for latent, _, end in document.events if latent == "tense"]
    ends = [span.end for span in document.find("topic") if shown and span.end >= shown[0]]
    if not ends:
        return None
    return Mark(ends[0], document.latents["tense"], document.text[: shown[0]].split()[-1])


def mark_voice(document: Document, rng: random.Random) -> Mark | None:
    """Praise, neutral or blame, just before an evaluative word, after one to three of them."""
    spans = [span for span in document.find("evaluation") if span.start < 240][:4]
    if len(spans) < 2:
        return None
    before, here = spans[-2:]
    word = document.text[before.start : before.end]
    return Mark(here.start - 1, document.latents["voice"], word)


def mark_topic(document: Document, rng: random.Random) -> Mark | None:
    """The topic, at the end of one of the first six words (or phrases) that depend on it."""
    ends = [end for latent, _, end in document.events if latent == "topic"][:6]
    if not ends:
        return None
    end = rng.choice(ends)
    inside = [span.value for span in document.find("topic") if span.start < end <= span.end]
    return Mark(end, inside[0], document.text[:end].split()[-1])


def mark_noun(document: Document, index: int) -> Mark:
    """The number of an agreement sentence's noun, at that noun: 0 the subject, -1 the last."""
    span = document.find("number")[index]
    return Mark(span.end, span.value, document.text[span.start : span.end])


def mark_head(document: Document, rng: random.Random) -> Mark | None:
    """The number of an agreement sentence's subject, at the subject."""
    return mark_noun(document, 0)


def mark_attractor(document: Document, rng: random.Random) -> Mark | None:
    """The number of the last noun before the verb, at that noun: the last token that is read."""
    return mark_noun(document, -1)


def mark_number(document: Document, rng: random.Random) -> Mark | None:
    """The number of the subject, at the last token before the verb, which is another noun."""
    return replace(mark_noun(document, 0), end=document.find("answer")[0].start - 1)


def mark_country(document: Document, rng: random.Random) -> Mark | None:
    """The country of a landmark, at the end of its name; countries with three landmarks or more."""
    span = next((s for s in document.find("entity") if s.value == "landmark"), None)
    name = span and document.text[span.start : span.end].lower()
    country = next((p.country for p in lexicon.landmarks() if p.name.lower() == name), None)
    count = Counter(place.country for place in lexicon.landmarks())
    return Mark(span.end, country, name, name) if count[country] >= 3 else None


def mark_asked(document: Document, rng: random.Random) -> Mark | None:
    """The same country in a sentence that ends with it, at the token before it."""
    found = mark_country(document, rng)
    return found and replace(found, end=document.find("answer")[0].start - 1)


def _calendar(document: Document, unit: str) -> Mark | None:
    if document.latents["unit"] != unit:
        return None
    named = document.find(unit)
    answer = document.find("answer")[0]
    index = next(i for i, span in enumerate(named) if span.start == answer.start)
    word = document.text[named[index - 1].start : named[index - 1].end]
    return Mark(answer.start - 1, named[index].value, word)


def mark_day(document: Document, rng: random.Random) -> Mark | None:
    """The day of the week (0 to 6) that comes next in the text, at the token before it."""
    return _calendar(document, "day")


def mark_month(document: Document, rng: random.Random) -> Mark | None:
    """The month (0 to 11) that comes next in the text, at the token before it."""
    return _calendar(document, "month")


Marker = Callable[[Document, random.Random], Mark | None]
_MARKERS = (mark_family, mark_tense, mark_topic, mark_voice, mark_head, mark_attractor, mark_number)
_MARKERS += (mark_country, mark_asked, mark_day, mark_month)
KINDS: dict[str, Marker] = {each.__name__.removeprefix("mark_"): each for each in _MARKERS}
SOURCE: dict[str, tuple[str, dict]] = {  # kind -> family of the documents it is read in, choices
    **dict.fromkeys(("tense", "topic", "voice"), ("prose", {})),
    **dict.fromkeys(("head", "attractor", "number"), ("agreement", {})),
    "country": ("facts", {"relation": "landmark-city", "count": 1}),
    "asked": ("facts", {"relation": "landmark-country", "count": 1}),
}


def documents_for(kind: str, n: int, seed: int, held: bool = False) -> list[Document]:
    """n documents in which `kind` can be read.

    Args:
        held: True for phrasings (and, where there are such, pairs of words) that the model was
            never trained on.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are: {', '.join(KINDS)}.")
    apart = ("templates", "entities") if held else ()
    if kind == "family":
        each = [documents(family, n, seed, apart) for family in World.families]
        return [document for row in zip(*each, strict=True) for document in row][:n]
    if kind in ("day", "month"):
        stream = World().documents(seed, "calendar", apart)
        return list(itertools.islice((d for d in stream if d.latents["unit"] == kind), n))
    family, choices = SOURCE[kind]
    return documents(family, n, seed, apart, **choices)


# -- activations with labels -----------------------------------------------------------------


@dataclass(frozen=True)
class Readings:
    """A model's activations at n marked tokens; `readings["resid_post", 3]` is (n, d_model).

    x          {(site, layer): (n, d_model)}, float32; the layer of "embed" is None
    y          labels (n,)
    words      word types (n,), groups (n,)
    tokens     (n, 2): the id of the token before the one that is read, and its own
    documents  n documents; marks: n marks
    """

    x: dict[Key, np.ndarray]
    y: np.ndarray
    words: np.ndarray
    groups: np.ndarray
    tokens: np.ndarray
    documents: list[Document]
    marks: list[Mark]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: str | Key) -> np.ndarray:
        key = (key, None) if isinstance(key, str) else key
        if key not in self.x:
            held = ", ".join(map(_site_name, self.x))
            raise ValueError(f"{_site_name(key)} was not collected; there are: {held}.")
        return self.x[key]

    def where(self, chosen) -> Readings:
        """The readings that a mask (n,) of booleans, or a list of indices, chooses."""
        index = np.arange(len(self))[np.asarray(chosen)]
        x = {key: values[index] for key, values in self.x.items()}
        arrays = [each[index] for each in (self.y, self.words, self.groups, self.tokens)]
        lists = [[each[i] for i in index] for each in (self.documents, self.marks)]
        return Readings(x, *arrays, *lists)


def _site_name(key: Key) -> str:
    return key[0] if key[1] is None else f"{key[0]} {key[1]}"


def collect(
    model: LanguageModel,
    documents: Iterable[Document],
    kind: str | Marker,
    sites: Iterable[str | Key] = STREAM,
    seed: int = 0,
    rows: int = 64,
) -> Readings:
    """The model's activations at the token that `kind` marks in each document.

    Args:
        documents: those that `kind` cannot mark, and those longer than the context, are left out.
        kind: a name in `KINDS`, or a function (document, random.Random) -> Mark or None.
        sites: names and (name, layer) pairs, as in `run_with_cache`.
        rows: documents per batch, of about equal length.

    Raises:
        ValueError: an unknown kind; nothing to read; a site or a layer that the model has not.
    """
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are: {', '.join(KINDS)}.")
    mark, rng = KINDS[kind] if isinstance(kind, str) else kind, random.Random(seed)
    kept: list[tuple[Document, Mark, list[int]]] = []
    for document in documents:
        found = mark(document, rng)
        if found is not None:
            ids, position = token_at(model, document.text, found.end)
            if 1 <= position < model.n_ctx:
                kept.append((document, found, ids[: position + 1]))
    if not kept:
        raise ValueError(f"No document has anything to read for {kind!r}: give other documents.")
    read, marks, texts = zip(*kept, strict=True)
    at = torch.arange(len(texts)), torch.tensor([len(ids) - 1 for ids in texts])
    found = activations_at(model, model.pad(texts), at, sites, rows)
    return Readings(
        {key: x.float().cpu().numpy() for key, x in found.items()},
        np.array([mark.label for mark in marks]),
        np.array([mark.word for mark in marks]),
        np.array([mark.group for mark in marks]),
        np.array([ids[-2:] for ids in texts]),
        list(read),
        list(marks),
    )
