"""Lesson 04's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import functools

import torch

from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.course.ledger import claim
from mi_helpers.lens import ranks, read_out, read_stream, train_tuned_lens
from mi_helpers.lessons.lesson_04 import causal
from mi_helpers.lessons.lesson_04.experiments import heads_off, make_prompts, world_stream
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.loading import untrained


@claim(
    "tuned-lens",
    "KL to the final output, logit lens less tuned lens: smallest over layers, held-out, nats",
    source="Belrose et al. 2023, Tuned Lens: closer than the logit lens at every layer",
    tolerance=">= 0",
)
def tuned_lens_gain(seed: int) -> float:
    """KL of the logit lens less KL of a tuned lens, nats: the smallest over the depths below the
    last, on held-out phrasings and entities.

    Source: Belrose et al. 2023, which finds the tuned lens closer to the final output than the
    logit lens at every layer.
    """
    model = shipped_model()
    lens, _ = train_tuned_lens(model, world_stream(model, 4_000, seed), steps=60, seed=seed)
    held = world_stream(model, 1_500, 1_000 + seed, ("templates", "entities"))
    plain, tuned = (read_out(model, held, lens=each).kl.mean(1) for each in (None, lens))
    return float((plain - tuned)[:-1].min())


@claim(
    "lens-directions",
    "Losing what the tuned lens leans on, half way: cost to the model, over random directions'",
    source="Belrose et al. 2023, Tuned Lens, causal basis; measured in the lesson",
    tolerance=">= 5",
    seeds=3,
    fast=False,
)
def directions_over_random(seed: int) -> float:
    """Eight directions of the lens's causal basis, and eight random ones; the ratio of the costs.

    Source: Belrose et al. 2023: the tuned lens uses similar features to the model itself.
    """
    on_model, by_chance, _ = _half_way(seed)
    return float(on_model.mean() / by_chance.mean())


@claim(
    "lens-leans-harder",
    "The same: what they cost the model, over what they cost the lens",
    source="measured in the lesson",
    tolerance="<= 0.6",
    seeds=3,
    fast=False,
)
def model_over_lens(seed: int) -> float:
    """Below 1 the lens leans on these directions harder than the model does."""
    on_model, _, on_lens = _half_way(seed)
    return float(on_model.mean() / on_lens.mean())


@functools.cache
def _half_way(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Costs in nats (8,): the lens's own directions to the model, random ones to the model, the
    lens's own to the lens."""
    model = shipped_model()
    lens, _ = train_tuned_lens(
        model, world_stream(model, 4_000, seed), steps=80, size=128, seed=seed
    )
    depth, texts = model.n_layers // 2, causal.sentences(model, seed=seed)
    read = causal.lens_reader(model, lens, depth)
    basis = causal.lens_basis(model, causal.some_tokens(texts, depth), depth, lens)
    on_lens, on_model = causal.influences(model, texts, depth, basis, read)
    drawn = causal.random_basis(basis, seed)
    return on_model, causal.influences(model, texts, depth, drawn, read)[1], on_lens


def _completeness(seed: int, unit: str) -> float:
    model, errors = shipped_model(), []
    for family in ("facts", "ioi", "agreement"):
        p = make_prompts(model, family, 40, seed)
        for wrong in (None, p.wrong):
            split = direct_logit_attribution(model, p.ids, p.answer, wrong, unit, p.last)
            errors.append(split.relative_error)
    return max(errors)


@claim(
    "attribution-components",
    "Direct logit attribution: sum of all components against the logit, over the largest logit",
    source="derived: logits are linear in the stream under a frozen final norm",
    published="0",
    tolerance="<= 1e-5",
)
def component_error(seed: int) -> float:
    """max |Σ terms - logit| / max |logit| on 120 prompts, answers alone and against wrong ones."""
    return _completeness(seed, "component")


@claim(
    "attribution-heads",
    "The same per head, each through the norm after attention",
    source="derived: that norm is linear, too, when its scale is frozen",
    published="0",
    tolerance="<= 1e-5",
)
def head_error(seed: int) -> float:
    """The same with each head a term of its own."""
    return _completeness(seed, "head")


@claim(
    "attribution-post-norm",
    "The heads' terms when that norm is left out: Σ |error| / Σ |term|, indirect objects",
    source="measured in the lesson",
    tolerance=">= 0.2",
)
def error_without_post_norm(seed: int) -> float:
    """`heads_off` on 100 IOI prompts, IO against S."""
    model = shipped_model()
    p = make_prompts(model, "ioi", 100, seed)
    both = [
        direct_logit_attribution(model, p.ids, p.answer, p.wrong, "head", p.last, norm)
        for norm in (True, False)
    ]
    return heads_off(*both)


@claim(
    "lens-untrained",
    "Negative control, untrained model: share of right answers at rank 1, best layer",
    source="derived: one over the vocabulary's size",
    published="0",
    tolerance="± 0.03",
)
def untrained_hits(seed: int) -> float:
    """Negative control: the lens on an untrained model, 100 facts and 100 IOI prompts; the share of
    right answers at rank 1, at the depth where it is highest."""
    model = untrained(shipped_model(), seed)
    hits = []
    for family in ("facts", "ioi"):
        p = make_prompts(model, family, 100, seed)
        hits.append(ranks(model, read_stream(model, p.ids, p.at), p.answer) == 1)
    return float(torch.cat(hits, 1).float().mean(1).max())


@claim(
    "lens-random-token",
    "Negative control: mean rank of a random token over d_vocab, layer furthest from 1/2",
    source="derived: every rank is equally likely",
    published="1/2",
    tolerance="± 0.05",
)
def random_token_rank(seed: int) -> float:
    """Negative control: the rank of a random token over the vocabulary's size, mean over 1000
    tokens of text, at the depth where it is furthest from 1/2."""
    model = shipped_model()
    stream = world_stream(model, 1_000, seed)
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(model.d_vocab, (1_000,), generator=rng)
    mean = ranks(model, stream, target).double().mean(1) / model.d_vocab
    return float(mean[(mean - 0.5).abs().argmax()])
