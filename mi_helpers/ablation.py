"""Ablation: what a part of a model computes is replaced, to see what depends on it.

    reference = record(model, other_texts)                 # {(site, layer): activations}
    with model.hooks(ablate(model, [(3, 1), ("mlp", 4)], Mean(reference))):
        ...

What is put in instead is an object: `Zero()`, `Mean(reference)` or `Resample(reference)`.
`Gaussian(subject)` is causal tracing's noise on the embedding. Patching and the ablations here take
the same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.arguments import indices, number, one_of, shown, tensor, whole
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel

SITE = {"head": "z", "attn": "attn_out", "mlp": "mlp_out"}  # the site at which a part is ablated
ABLATED = ("z", "attn_out", "mlp_out")
Part = tuple[str, int, int | None]  # kind, layer, head
Prompt = str | list | Tensor  # text, texts, or token ids (batch, pos)
Reference = Prompt | Mapping[Key, Tensor]


# ---------------------------------------------------------------------------- what is put in


@dataclass(frozen=True)
class Zero:
    """0."""


@dataclass(frozen=True)
class Mean:
    """The mean over reference texts.

    Args:
        reference: the texts (text or token ids), or what `record` kept of them: activations
            (texts, pos, ...), whose mean is taken position by position, or (tokens, ...), whose
            mean is put in at every position.
    """

    reference: Reference | None = None


@dataclass(frozen=True)
class Resample:
    """The activation of another run.

    Args:
        reference: as for `Mean`. Of (texts, pos, ...) one text is drawn for each text that is run,
            and read at the same position; of (tokens, ...) one token for each position. In a patch
            the other prompt is the reference, and none is given.
        seed: of the draw.
    """

    reference: Reference | None = None
    seed: int = 0


@dataclass(frozen=True)
class Gaussian:
    """Causal tracing's corruption: noise on the embeddings of the subject's tokens.

        N(0, (scale · σ)²)

    σ is the standard deviation of the embedding's entries, as they enter the stream, over the
    tokens that can stand in a text (`LanguageModel.in_text`).

    Args:
        subject: the positions that get noise; negative ones count from the end.
        scale: the noise in units of σ.
        seeds: how many draws are averaged over.

    Source: Meng et al. 2022, Locating and Editing Factual Associations in GPT.
    """

    subject: int | Sequence[int]
    scale: float = 3.0
    seeds: int = 10

    def noise(self, model: LanguageModel, ids: Tensor) -> Tensor:
        """The noise for token ids (batch, pos).

        Returns:
            (seeds, batch, pos, d_model), 0 outside the subject.

        Raises:
            ModelError: the subject is not in the prompt, or there are no seeds.
        """
        batch, length = model.ids(ids).shape
        at = indices(self.subject, length, "position")
        whole("seeds", self.seeds, 1)
        number("scale", self.scale, least=0)
        used = model.in_text.nonzero()[:, 0]
        some = used[:: -(-len(used) // 4096)]
        sigma = float(model.part("embed")(some).float().std())
        noise = torch.zeros(self.seeds, batch, length, model.d_model)
        for seed in range(self.seeds):
            rng = torch.Generator().manual_seed(seed)
            noise[seed][:, at] = torch.randn(batch, len(at), model.d_model, generator=rng)
        return (self.scale * sigma * noise).to(model.device, model.dtype)


# ------------------------------------------------------------------------------ the reference


@torch.no_grad()
def record(
    model: LanguageModel,
    texts: Prompt,
    sites: str | Key | Iterable[str | Key] = ABLATED,
) -> dict[Key, Tensor]:
    """{(site, layer): activations (texts, pos, ...)} of a run on some texts, for `Mean` and
    `Resample`: recorded once, they serve many ablations."""
    _, cache = model.run_with_cache(texts, sites, stop_at_layer=model.n_layers)
    return {key: cache[key] for key in cache}


def recorded(model: LanguageModel, reference: Reference, keys: Sequence[Key]) -> Mapping:
    """A reference's activations at some sites; texts are run for them."""
    if not isinstance(reference, Mapping):
        return record(model, reference, keys)
    missing = [key for key in keys if key not in reference]
    if missing:
        raise ModelError(f"The reference has no {missing[0]}: `record` every site that is needed.")
    for key in keys:
        tensor(f"The reference for {key}", reference[key], "... width", {})
    return reference


# ------------------------------------------------------------------------------------ ablation


def ablate(model: LanguageModel, parts: Iterable, ablation: Zero | Mean | Resample) -> dict:
    """Hooks, for `model.hooks`, that replace what some parts of the model compute.

    A head's z, an attention block's attn_out or an MLP's mlp_out is replaced at every position but
    the first. The first token is `<bos>` in all texts, so its mean and its resample would be
    itself; `Zero` leaves it alone, too, so that the three can be compared. The layer's post-norm,
    where there is one, is computed from the changed sum of heads.

    Args:
        parts: heads (layer, head) or ("head", layer, head), ("attn", layer), ("mlp", layer).

    Raises:
        ModelError: no such part or ablation; a reference that is missing, or of another shape.
    """
    if not isinstance(ablation, Zero | Mean | Resample):
        raise ModelError(
            f"{ablation!r} is no ablation: choose Zero(), Mean(reference) or Resample(reference)."
        )
    chosen: dict[Key, list[int] | None] = {}
    for kind, layer, head in (checked_part(model, part) for part in parts):
        key = (SITE[kind], layer)
        chosen[key] = None if head is None else [*chosen.get(key, ()), head]
    rows: Mapping = {}
    if chosen and not isinstance(ablation, Zero):
        rows = _checked_reference(model, ablation, list(chosen))
    return {key: _replace(ablation, rows.get(key), heads) for key, heads in chosen.items()}


def checked_part(model: LanguageModel, given: tuple) -> Part:
    """(kind, layer, head) of a part as `ablate` takes it; head is None where it is not a head.

    Raises:
        ModelError: the model has no such part.
    """
    fits = isinstance(given, tuple | list) and given
    triple = given if fits and isinstance(given[0], str) else ("head", *(given if fits else ()))
    if not fits or not 2 <= len(triple) <= 3:
        raise ModelError(
            f"A part is {shown(given)}: expected (layer, head), ('attn', layer) or ('mlp', layer)."
        )
    kind, layer, head = (*triple, None)[:3]
    if kind not in SITE:
        raise ModelError(f"There is no kind of part {kind!r}: choose one of {', '.join(SITE)}.")
    layer = _numbered(model, "layer", layer, model.n_layers)
    if kind == "head":
        return kind, layer, _numbered(model, "head", head, model.n_heads)
    if head is not None:
        raise ModelError(f"A part of kind {kind!r} takes no head, and was given head {head}.")
    return kind, layer, None


def _numbered(model: LanguageModel, what: str, given, count: int) -> int:
    """A layer or a head by its number; a negative one counts from the end."""
    try:
        return whole(what, given, -count, count - 1) % count
    except ModelError:
        raise ModelError(
            f"{model.name} has {what}s 0 to {count - 1}, not {shown(given)}."
        ) from None


def part_name(part: Part) -> str:
    """("head", 3, 1) -> "L3 head 1", ("mlp", 3, None) -> "L3 MLP"."""
    if not isinstance(part, tuple | list) or len(part) != 3:
        raise ModelError(f"A part is {shown(part)}: expected (kind, layer, head).")
    kind, layer, head = part
    one_of("The kind of part", kind, tuple(SITE))
    return f"L{layer} " + {"head": f"head {head}", "attn": "attention", "mlp": "MLP"}[kind]


def _checked_reference(model: LanguageModel, ablation: Mean | Resample, keys: list[Key]) -> Mapping:
    """The reference's activations at some sites, of one of the two shapes that are known."""
    if ablation.reference is None:
        name = type(ablation).__name__
        raise ModelError(f"{name}() needs a reference: other texts, or what `record` kept of them.")
    rows = recorded(model, ablation.reference, keys)
    for key in keys:
        width = (model.n_heads, model.d_head) if key[0] == "z" else (model.d_model,)
        shape = tuple(rows[key].shape)
        extra = len(shape) - len(width)
        if shape[extra:] != width or extra not in (1, 2) or 0 in shape:
            wanted = ", ".join(map(str, width))
            raise ModelError(
                f"The reference for {key[0]!r} has shape {shape}, expected (tokens, {wanted}) or "
                f"(texts, pos, {wanted})."
            )
    return rows


def _replace(ablation: Zero | Mean | Resample, rows: Tensor | None, heads: list[int] | None):
    """The hook of one site, for some heads or for all of it, after the first position."""
    at = slice(None) if heads is None else heads
    by_text = rows is not None and rows.ndim == (3 if heads is None else 4)
    if isinstance(ablation, Mean):
        mean = rows.float().mean(0, keepdim=True)
        mean = mean if by_text else mean[None]  # (1, pos or 1, ...)

    def instead(batch: int, length: int) -> Tensor:
        """(batch or 1, pos - 1 or 1, ...)"""
        if by_text and rows.shape[1] < length:
            raise ModelError(
                f"The reference texts have {rows.shape[1]} tokens and this one {length}: give "
                "longer ones."
            )
        if isinstance(ablation, Mean):
            new = mean
        else:
            rng = torch.Generator().manual_seed(ablation.seed)
            size = (batch,) if by_text else (batch, length - 1)
            new = rows[torch.randint(len(rows), size, generator=rng).to(rows.device)]
        return new[:, 1:length] if by_text else new

    def hook(x: Tensor) -> Tensor:
        if isinstance(ablation, Zero):
            x[:, 1:, at] = 0
        else:
            x[:, 1:, at] = instead(*x.shape[:2])[:, :, at].to(x)
        return x

    return hook
