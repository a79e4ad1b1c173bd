"""Lesson 08's names: what TinyWorld says of every token of some text, and who fires there.

    namer = make_namer(model, coders, reading)
    namer.name(4, 57)                      # Name("France", f1=0.81, …), from tokens held out
    named_share(namer, pruned)             # how many of a graph's features have a name, a good one

The text is the lesson's sentences (`read_sentences`) and documents of every family. What may be a
name: the token, the token before, the one that comes next and its sort, the family of the text, its
topic, what the sentence is about, and what it asks for.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import numpy as np
import torch

from mi_helpers.circuits.graphs import Graph
from mi_helpers.circuits.names import Labels, Namer
from mi_helpers.circuits.replacement import Coders, by_layer
from mi_helpers.lessons.lesson_08.experiments import Reading, activations
from mi_helpers.lessons.shared import documents, tokens_and_ranges
from mi_helpers.models import LanguageModel
from mi_helpers.saes.scores import Fired
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

EACH = 40  # documents of a family
BATCH = 32  # documents that are read at once, of about equal length


@functools.cache
def sorts() -> dict[str, str]:
    """{word: what sort of word it is}, for the first words of what the facts are about."""
    found = {}
    for place in lexicon.countries().values():
        found[place.currency] = "a currency"
        found[place.language] = "a language"
        found[place.capital] = "a capital"
    for mark in lexicon.landmarks():
        found.setdefault(mark.city, "a city")
    return found | {place: "a country" for place in lexicon.countries()}


def said_of(model: LanguageModel, texts: Sequence[str]) -> list[list[set[str]]]:
    """What any text's tokens say by themselves, `<bos>` left out: a set for each token of each."""
    made = []
    for text in texts:
        ids = tokens_and_ranges(model, text)[0][1:]
        words = [word.strip() or repr(word) for word in model.str_tokens(ids)]
        rows = [{f"'{word}'"} for word in words]
        for before, row in zip(words, rows[1:], strict=False):
            row.add(f"after '{before}'")
            if kind := sorts().get(before):
                row.add(f"after {kind}")
        for row, coming in zip(rows, words[1:], strict=False):
            row.add(f"before '{coming}'")
            if kind := sorts().get(coming):
                row.add(f"before {kind}")
        for word, row in zip(words, rows, strict=True):
            if kind := sorts().get(word):
                row.add(kind)
        made.append(rows)
    return made


def said_of_document(model: LanguageModel, document: Document) -> list[set[str]]:
    """`said_of`, and what TinyWorld knows of this document: its family, its topic, its spans."""
    (rows,) = said_of(model, [document.text])
    _, ranges = tokens_and_ranges(model, document.text)
    everywhere = {f"text: {document.family}"}
    if topic := document.latents.get("topic"):
        everywhere.add(f"topic: {topic}")
    for row, (start, end) in zip(rows, ranges[1:], strict=True):
        row |= everywhere
        for span in document.spans:
            if span.start < end and start < span.end and span.kind not in ("fact", "statement"):
                value = "" if span.kind == "answer" else f" {span.value}"
                row.add(f"{span.kind}{value}")
    return rows


def make_namer(
    model: LanguageModel, coders: Coders, reading: Reading, each: int = EACH, seed: int = 0
) -> Namer:
    """Names for all latents, from the lesson's sentences and `each` documents of every family."""
    texts = [d for family in World.families for d in documents(family, each, seed)]
    random.Random(seed).shuffle(texts)
    rows = [said_of_document(model, document)[: model.n_ctx - 1] for document in texts]
    read = read_texts(model, [document.text for document in texts])
    first, half = reading.half, sum(map(len, rows)) // 2
    fires = {}
    for layer, coder in by_layer(coders).items():
        asked = activations(model, coder, layer, reading)
        other = activations(model, coder, layer, Reading({layer: read[layer]}, {}, 0, ()))
        # each half of the tokens has half of the sentences and half of the documents
        fires[layer] = Fired.of(torch.cat(mixed(asked, first, other, half)))
    flat, ours = [token for row in rows for token in row], sentence_labels(model, reading)
    words = [w for d in texts for w in model.str_tokens(model.tokens(d.text)[0, 1 : model.n_ctx])]
    asked = list(dict.fromkeys(reading.asked))
    said = [w for s in asked for w in model.str_tokens(model.tokens(s.prompt)[0, 1:])]
    number = np.repeat(np.arange(len(texts)), [len(row) for row in rows])
    index = {each: -1 - i for i, each in enumerate(asked)}
    labels = Labels.of(sum(map(list, mixed(ours, first, flat, half)), []))
    return Namer(
        fires,
        labels,
        sum(map(list, mixed(said, first, words, half)), []),
        np.concatenate(mixed([index[each] for each in reading.asked], first, number, half)),
    )


def mixed(one: Sequence, first: int, other: Sequence, half: int) -> tuple:
    """The first part of each, then the rest of each."""
    return one[:first], other[:half], one[first:], other[half:]


def sentence_labels(model: LanguageModel, reading: Reading) -> list[set[str]]:
    """The labels of a reading's tokens: `said_of`, what the sentence is about, and what it asks."""
    asked = list(dict.fromkeys(reading.asked))
    texts = [f"{each.prompt} {each.answer}" for each in asked]
    rows = []
    for each, row in zip(asked, said_of(model, texts), strict=True):
        kept = row[: len(tokens_and_ranges(model, each.prompt)[0]) - 1]
        rows += [labels | {"text: question"} for labels in kept]
    for name, mask in reading.concepts.items():
        for i in np.flatnonzero(mask):
            rows[i].add(name)
    return rows


def read_texts(model: LanguageModel, texts: Sequence[str]) -> dict[int, torch.Tensor]:
    """{layer: MLP inputs (tokens, d_model)} of texts, `<bos>` left out."""
    ids = [tokens_and_ranges(model, text)[0][: model.n_ctx] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    sites = [("mlp_in", layer) for layer in range(model.n_layers)]
    found: dict[tuple[int, int], torch.Tensor] = {}
    for low in range(0, len(order), BATCH):
        some = order[low : low + BATCH]
        _, cache = model.run_with_cache(model.pad([ids[i] for i in some]), sites)
        for site, layer in sites:
            for i, x in zip(some, cache[site, layer].float(), strict=True):
                found[layer, i] = x[1 : len(ids[i])]
    return {layer: torch.cat([found[layer, i] for i in range(len(ids))]) for _, layer in sites}


def named_share(namer: Namer, graph: Graph) -> tuple[float, float]:
    """The shares of a graph's features that have a name with a score, and a good one."""
    names, every = namer.of(graph), len(graph.features())
    good = sum(name.good for name in names.values())
    return len(names) / max(every, 1), good / max(every, 1)


def scores(namer: Namer, some: Sequence[Graph], other: bool = False) -> list[float]:
    """The F1 of the name of each feature of some graphs, on tokens held out.

    Args:
        other: a control: each latent has the name of the next one of its layer that has one.
    """
    named = {node: name for graph in some for node, name in namer.of(graph).items()}
    latents = sorted({tuple(map(int, node.split("_")[:2])) for node in named})
    if not other:
        return [namer.name(*latent).f1 for latent in latents]
    found = []
    for (layer, one), (above, two) in zip(latents, latents[1:], strict=False):
        if layer == above:
            found.append(namer.score(layer, one, namer.name(layer, two)))
    return found
