"""Lesson 04's experiments: prompts with an answer, and what lens and attribution say about them.

p = make_prompts(model, "facts", 300, seed=7)
stream = read_stream(model, p.ids, p.at)                 # at the token before the answer
ranks(model, stream, p.answer)                           # (depths, n)
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.ablation import SITE, Mean, ablate
from mi_helpers.arguments import exact
from mi_helpers.attribution import Attribution, answer_logit, stream_direction, written_parts
from mi_helpers.lens import (
    Readout,
    TunedLens,
    ranks,
    read_stream,
    sample_stream,
    settled_depth,
)
from mi_helpers.lessons.shared import answer_positions, tokens_and_ranges, word_ids
from mi_helpers.models import At, LanguageModel
from mi_helpers.tiny_gemma.skills import is_own_city
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.facts import city_country
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

HELD = ("templates", "entities")  # phrasings and pairs that nothing was trained on
FAMILIES = {  # whose answers the lesson follows, with the choices of each
    "facts": {"count": 1},
    "two_hop": {"count": 1},
    "ioi": {},
    "agreement": {},
    "calendar": {},
    "arithmetic": {},
    "brackets": {},
    "repetition": {"length": 8, "times": 2},
}

# -- prompts with an answer ------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """n documents, each read at the token before its last answer.

    ids (n, length), padded on the right; last (n,) the position that is read; answer (n,) the
    first token of the document's answer; wrong (n,) the first token of another possible answer
    """

    documents: tuple[Document, ...]
    ids: Tensor
    last: Tensor
    answer: Tensor
    wrong: Tensor

    @property
    def at(self) -> At:
        """Rows and positions, for `read_stream`."""
        return torch.arange(len(self.ids), device=self.ids.device), self.last

    def text(self, i: int) -> str:
        """The text of prompt i up to its answer."""
        return self.documents[i].text[: self.documents[i].find("answer")[-1].start].rstrip()


def make_prompts(
    model: LanguageModel,
    family: str,
    n: int,
    seed: int = 0,
    held: Iterable[str] = (),
    keep: Callable[[Document], bool] = lambda document: True,
    **choices,
) -> Prompts:
    """n TinyWorld documents with an answer, for families such as "facts" and "ioi".

    The wrong answer is, in "ioi", the giver, and elsewhere the right answer of another document
    that asks for the same kind of thing. Documents longer than the context are left out.

    Args:
        held: what comes from the held-out part of the world; choices: of the family.
        keep: which documents to take.

    Raises:
        ValueError: an unknown family or choice, or one whose documents have no answer.
    """
    found, wanted = [], max(n, 20)  # the surplus documents lend their answers as wrong ones
    documents = World().documents(seed, family, frozenset(held), **choices)
    for document in itertools.islice(documents, 50 * wanted):
        ids, _ = tokens_and_ranges(model, document.text)
        places = answer_positions(model, document) if document.find("answer") else []
        if places and len(ids) <= model.n_ctx and keep(document):
            found.append((document, ids, places[-1]))
        if len(found) == wanted:
            break
    if len(found) < n:
        raise ValueError(f"Only {len(found)} of {n} prompts of {family!r} could be made.")
    documents = tuple(document for document, *_ in found)
    wrong = _wrong(model, documents, [ids[place] for _, ids, place in found], seed)
    found = found[:n]
    answer = torch.tensor([ids[place] for _, ids, place in found], device=model.device)
    last = torch.tensor([place - 1 for *_, place in found], device=model.device)
    ids = model.pad([ids[: place + 1] for _, ids, place in found])
    return Prompts(documents[:n], ids, last, answer, torch.tensor(wrong[:n], device=model.device))


def _wrong(model: LanguageModel, documents, answer: list[int], seed: int) -> list[int]:
    """A wrong answer for each document: see `make_prompts`."""
    if "S" in documents[0].latents:
        return [model.encode(" " + document.latents["S"])[0] for document in documents]
    kinds = [asked_kind(document) for document in documents]
    rng = random.Random(seed)
    wrong = []
    for kind, token in zip(kinds, answer, strict=True):
        others = sorted({a for k, a in zip(kinds, answer, strict=True) if k == kind} - {token})
        others = others or sorted(set(answer) - {token})
        wrong.append(rng.choice(others))
    return wrong


def asked_kind(document: Document) -> str:
    """The kind of thing that the last answer is: the label on the same characters."""
    answer = document.find("answer")[-1]
    same = [s for s in document.spans if (s.start, s.end) == (answer.start, answer.end)]
    return next((f"{s.kind} {s.value}" for s in same if s.kind == "entity"), same[0].kind)


def prompts_of(model: LanguageModel, family: str, n: int, seed: int = 0) -> Prompts:
    """n prompts of one of `FAMILIES`, with its choices."""
    return make_prompts(model, family, n, seed, **FAMILIES[family])


def settling(model: LanguageModel, family: str, n: int = 200, seed: int = 0) -> Tensor:
    """The first depth from which the model's own answer stays at rank 1, for n prompts, (n,)."""
    p = prompts_of(model, family, n, seed)
    stream = read_stream(model, p.ids, p.at)
    return settled_depth(ranks(model, stream, model.unembed(stream[-1]).argmax(-1)))


# -- lenses on TinyWorld ---------------------------------------------------------------------


def world_stream(model: LanguageModel, n: int, seed: int = 0, held: Iterable[str] = ()) -> Tensor:
    """The stream at n random tokens of TinyWorld's own mixture, (n_layers + 1, n, d_model).

    Args:
        held: what comes from the held-out part of the world, such as "templates".
    """
    documents = World().documents(seed, None, frozenset(held))
    return sample_stream(model, (document.text for document in documents), n, seed)


def uniform_cost(model: LanguageModel, found: Readout) -> float:
    """KL(final ‖ uniform), nats: what a lens would cost that finds all tokens equally likely."""
    return float(math.log(model.d_vocab) - found.entropy[-1].mean())


# -- two-hop facts: the bridge ---------------------------------------------------------------


def country_of(document: Document) -> str:
    """The country of the landmark that a document names.

    Raises:
        ValueError: it names none.
    """
    for span in document.find("entity"):
        name = document.text[span.start : span.end]
        for place in lexicon.landmarks():
            if span.value == "landmark" and place.name == name:
                return place.country
    raise ValueError(f"No landmark is named in {document.text!r}.")


BRIDGES = {  # relation -> (family, the words that could be its answer)
    "language": ("two_hop", lambda: [c.language for c in lexicon.countries().values()]),
    "currency": ("two_hop", lambda: [c.currency for c in lexicon.countries().values()]),
    "capital": ("two_hop", lambda: [c.capital for c in lexicon.countries().values()]),
    "landmark-city": ("facts", lambda: list(city_country())),
}


def bridge_scan(
    model: LanguageModel, relation: str, n: int = 200, seed: int = 0, lens: TunedLens | None = None
) -> dict[str, Tensor]:
    """At each depth, the share of n prompts where a landmark's country, or the answer, is first.

    Args:
        relation: what is asked. Of the landmark's *country*, in pairs that were never trained:
            "language", "currency", or "capital" (where it is not the landmark's own city). Of the
            landmark itself, as the control: "landmark-city".

    Returns:
        {what is first, and among which tokens: shares (depths,)}.

    Raises:
        ValueError: an unknown relation.
    """
    if relation not in BRIDGES:
        raise ValueError(f"There is no {relation!r} here; there are: {', '.join(BRIDGES)}.")
    family, words = BRIDGES[relation]
    p = make_prompts(
        model,
        family,
        n,
        seed,
        held=("entities",) if family == "two_hop" else (),
        keep=lambda document: relation != "capital" or not is_own_city(document),
        relation=relation,
        count=1,
    )
    stream = read_stream(model, p.ids, p.at)
    country = word_tokens(model, [country_of(document) for document in p.documents])
    countries = word_tokens(model, lexicon.countries())
    kind = torch.cat([word_tokens(model, words()), p.answer]).unique()
    asked = {
        "country (of countries)": (country, countries),
        "answer (of its kind)": (p.answer, kind),
        "answer (of all)": (p.answer, None),
        "country (of all)": (country, None),
    }
    return {
        name: (ranks(model, stream, target, lens, among) == 1).float().mean(1)
        for name, (target, among) in asked.items()
    }


def word_tokens(model: LanguageModel, words: Iterable[str]) -> Tensor:
    """The first token of each word, after a space, (n,)."""
    return torch.tensor([model.encode(f" {word}")[0] for word in words], device=model.device)


# -- attribution -----------------------------------------------------------------------------


@torch.no_grad()
def written_on(
    model: LanguageModel, p: Prompts, words: Tensor, unit: str = "component"
) -> tuple[tuple[str, ...], Tensor]:
    """What each part writes on the logit of each of some words, before the soft-cap.

    Args:
        words: token ids (words,).
        unit: "component" or "head", as in `direct_logit_attribution`.

    Returns:
        the parts' names, and terms (n, parts, words).
    """
    parts, final = written_parts(model, p.ids, p.at, unit)
    stacked = torch.stack(list(parts.values()), 1)  # (n, parts, d_model)
    by_word = [
        stream_direction(model, final, exact(model.W_U[:, word]).expand(final.shape))
        for word in words.tolist()
    ]
    terms = [torch.einsum("npd,nd->np", stacked, v) for v in by_word]
    return tuple(parts), torch.stack(terms, -1)


def names_of(model: LanguageModel) -> Tensor:
    """The first token of each name of TinyWorld, (names,), each once."""
    return word_tokens(model, lexicon.people()).unique()


def best_head_apart(
    model: LanguageModel, apart: Callable, n: int = 200, seed: int = 7
) -> tuple[str, float, float]:
    """The head that writes most on the receiver's name, less the giver's: its name, what it writes
    for the receiver, and for the giver, both as `apart(terms, answer, rival)` gives them."""
    p, names = make_prompts(model, "ioi", n, seed, form="pair"), names_of(model)
    parts, terms = written_on(model, p, names, "head")
    at = (place_in(names, tokens) for tokens in (p.answer, p.wrong))
    receiver, giver = apart(terms, *at)
    heads = [i for i, name in enumerate(parts) if " head " in name]
    best = max(heads, key=lambda i: float(receiver[i] - giver[i]))
    return parts[best], float(receiver[best]), float(giver[best])


def place_in(words: Tensor, tokens: Tensor) -> Tensor:
    """Where each of some tokens (n,) stands among `words` (words,), (n,).

    Raises:
        ValueError: one of the tokens is none of the words.
    """
    same = tokens[:, None] == words
    if not same.any(1).all():
        raise ValueError("Some of the tokens are none of the words: give all that can be answers.")
    return same.int().argmax(1)


@torch.no_grad()
def total_effects(model: LanguageModel, p: Prompts) -> dict[str, float]:
    """{component: by how much the answer's logit, less the wrong one's, falls without it}.

    What the component writes is replaced, at every token but the first, by its mean over the
    prompts, and the rest of the model runs on. So this counts all that later parts made of it,
    where direct logit attribution counts none. Logits before the soft-cap, mean over the prompts.
    """
    places = torch.arange(p.ids.shape[1], device=p.ids.device)
    inside = (places > 0) & (places <= p.last[:, None])
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_final"]
    _, cache = model.run_with_cache(p.ids, sites, stop_at_layer=model.n_layers)

    def difference(final: Tensor) -> Tensor:
        return answer_logit(model, final[p.at], p.answer, p.wrong)

    before, effects = difference(cache["resid_final"]), {}
    for layer in range(model.n_layers):
        for kind, name in (("attn", "attention"), ("mlp", "MLP")):
            site = (SITE[kind], layer)
            with model.hooks(ablate(model, [(kind, layer)], Mean({site: cache[site][inside]}))):
                resid = cache["resid_pre", layer]
                final = model.run_from_layer(resid, layer, stop_at_layer=model.n_layers)
            effects[f"L{layer} {name}"] = float((before - difference(final)).mean())
    return effects


def heads_off(with_norm: Attribution, without: Attribution) -> float:
    """Σ |term without the post-norm - term| / Σ |term|, over all heads and prompts."""
    right, wrong = with_norm.heads(), without.heads()
    return float((wrong - right).abs().sum() / right.abs().sum())


# -- one answer, two routes ------------------------------------------------------------------


@dataclass(frozen=True)
class Twins:
    """Prompts of two kinds with the same answers: ids (n, length), last and answer (n,) of each.

    fact  a landmark's city, asked for; copy  a list of random words begun again, before that city
    """

    fact: Prompts
    copy: Prompts


def twins(model: LanguageModel, n: int = 24, seed: int = 0) -> Twins:
    """n facts about the city of a landmark, and n lists of words that go on with the same city."""
    fact = make_prompts(model, "facts", n, seed, count=1, relation="landmark-city")
    rng = torch.Generator().manual_seed(seed)
    words, bos = word_ids(model), model.tokenizer.bos_token_id
    rows = []
    for city in fact.answer.tolist():
        others = words[torch.randperm(len(words), generator=rng)[:8]].tolist()
        listed = [word for word in others if word != city][:6]
        at = int(torch.randint(2, 6, (1,), generator=rng))
        again = [*listed[:at], city, *listed[at:], *listed[:at]]
        rows.append(again if bos is None else [bos, *again])
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    copy = Prompts((), model.pad(rows), last, fact.answer, fact.wrong)
    return Twins(fact, copy)


@torch.no_grad()
def harm(model: LanguageModel, p: Prompts, part: tuple, reference: dict) -> float:
    """By how many nats the loss on the answers grows under a part's mean lesion, at all tokens.

    Args:
        part: (layer, head), ("attn", layer) or ("mlp", layer).
        reference: activations whose mean is put there, as from `token_pool`.
    """
    rows, losses = p.at[0], []
    for hooks in ({}, ablate(model, [part], Mean(reference))):
        with model.hooks(hooks):
            _, cache = model.run_with_cache(p.ids, "resid_final", stop_at_layer=model.n_layers)
        scores = model.unembed(cache["resid_final"][p.at]).float().log_softmax(-1)
        losses.append(-scores[rows, p.answer].mean())
    return float(losses[1] - losses[0])
