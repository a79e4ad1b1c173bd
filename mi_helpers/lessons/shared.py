"""What several lessons need: the shipped model; TinyWorld's documents; labelled activations.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mi_helpers.layouts import Key
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel, activations_at
from mi_helpers.tinyworld import lexicon
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
KINDS: dict[str, Marker] = {
    "family": mark_family,
    "tense": mark_tense,
    "topic": mark_topic,
    "voice": mark_voice,
    "head": mark_head,
    "attractor": mark_attractor,
    "number": mark_number,
    "country": mark_country,
    "asked": mark_asked,
    "day": mark_day,
    "month": mark_month,
}
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
        return Readings(
            {key: x[index] for key, x in self.x.items()},
            self.y[index],
            self.words[index],
            self.groups[index],
            self.tokens[index],
            [self.documents[i] for i in index],
            [self.marks[i] for i in index],
        )


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
