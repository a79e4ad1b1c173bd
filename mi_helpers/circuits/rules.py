"""A latent as a rule: what fires it, what it writes, and what it passes to latents of later layers.

    token_inputs(model, coder, 0, 17)                # (d_vocab,): what each token alone would give
    write_effects(model, coder, 5, ids)              # is the direct effect what the logits do?
    virtual_weights(model, coders[1], coders[4], 4)  # from latent to latent, whatever the text
    active_pairs(model, coders, prompts)             # and what is really added, on these prompts

Source: Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mi_helpers.circuits.edges import Columns, edges_closed_form
from mi_helpers.circuits.replacement import (
    Coders,
    LocalReplacement,
    Transcoders,
    by_layer,
)
from mi_helpers.layouts import norm_gain
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import extremes, logit_effects
from mi_helpers.saes.transcoders import reads_of

MOST_NUMBERS = 2**27  # of latents by tokens that are computed at once

# -------------------------------------------------------------------------- what fires a latent


@torch.no_grad()
def token_inputs(model: LanguageModel, coder: SparseCoder, layer: int, latent: int) -> Tensor:
    """A latent's pre-activation where the stream holds a token's embedding alone, (d_vocab,):

        norm(W_E) @ W_enc + b_enc

    with the norm before the layer's MLP: the direct path from the embedding to the encoder. (The
    norm cancels the embedding's scale.)

    Raises:
        ValueError: there is no such latent.
    """
    latent = int(coder.check_latents([latent]))
    x = model.part("ln2", layer)(model.W_E).float()
    return x @ coder.W_enc[:, latent] + coder.b_enc[latent]


@torch.no_grad()
def top_input_tokens(model: LanguageModel, coder: SparseCoder, layer: int, n: int = 10) -> Tensor:
    """The n tokens of text with the highest `token_inputs` of each latent, (latents, n), the
    highest first. (Some latents at a time: the whole table of a large model does not fit.)"""
    ids = model.in_text.nonzero()[:, 0]
    x = model.part("ln2", layer)(model.W_E[ids]).float()
    columns = coder.W_enc.split(max(1, MOST_NUMBERS // len(x)), dim=1)
    return torch.cat([ids[(x @ each).topk(n, dim=0).indices.T] for each in columns]).cpu()


def top_tokens(model: LanguageModel, values: Tensor, n: int = 8) -> list[tuple[str, float]]:
    """[(token, value)] of the n highest of values (d_vocab,), among the tokens in use."""
    top, _ = extremes(model, values, n)
    name = model.tokenizer.decode
    return [(name([int(i)]), float(v)) for v, i in zip(*top, strict=True)]


# -------------------------------------------------------------------------- what a latent writes


@dataclass(frozen=True)
class WriteEffects:
    """The change of the logits when a latent stops writing at one place: its correlation with a
    prediction, over the tokens in use, (firings,).

    own    the prediction is the direct effect of the latent's decoder row (`logit_effects`)
    other  a control: that of another latent's row, one that fired in another text
    """

    own: np.ndarray
    other: np.ndarray


@torch.no_grad()
def write_effects(
    model: LanguageModel,
    coder: SparseCoder,
    layer: int,
    ids: Sequence[Sequence[int]],
    seed: int = 0,
) -> WriteEffects:
    """Remove what one firing of each text writes, run the model on, and compare the change of the
    logits at that place with the direct effect of the decoder row.

    Args:
        ids: token ids of two texts or more, `<bos>` first. The place of the firing is drawn at
            random, and so is the latent, among those that fire there.
    """
    rng = np.random.default_rng(seed)
    predicted, observed = [], []
    for row in ids:
        tokens = torch.tensor([list(row)])
        sites = [("mlp_in", layer), ("resid_post", layer)]
        _, cache = model.run_with_cache(tokens, sites, stop_at_layer=layer + 1)
        place = int(rng.integers(1, len(row)))
        index, value = coder.encode_sparse(cache["mlp_in", layer][0, place : place + 1].float())
        on = np.flatnonzero(value[0].cpu().numpy() > 0)
        if not len(on):
            continue
        pick = int(rng.choice(on))
        push = value[0, pick] * coder.W_dec[index[0, pick]]  # (d_model,)
        stream = cache["resid_post", layer].repeat(2, 1, 1)
        stream[1, place] -= push.to(stream)
        final = model.run_from_layer(stream, layer + 1, stop_at_layer=model.n_layers)
        before, after = model.unembed(final[:, place], softcap=False).float()
        observed.append((before - after)[model.in_text].cpu())
        predicted.append(logit_effects(model, push[None])[0, model.in_text].cpu())
    others = predicted[1:] + predicted[:1]
    return WriteEffects(_correlations(predicted, observed), _correlations(others, observed))


def _correlations(some: Sequence[Tensor], others: Sequence[Tensor]) -> np.ndarray:
    """Pearson's, of each pair."""
    pairs = zip(some, others, strict=True)
    return np.array([float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs])


# ---------------------------------------------------------------------------- virtual weights


@torch.no_grad()
def virtual_weights(
    model: LanguageModel, below: SparseCoder, above: SparseCoder, layer_above: int
) -> Tensor:
    """What a latent's firing by 1 adds to a later latent's pre-activation at the same position,
    along the stream, but for the norm's denominator: (latents below, latents above),

        (W_dec · gain) @ W_enc

    with the gain of the norm before the later MLP; the text plays no part.
    Source: Dunefsky et al. 2024, the input-invariant part.
    """
    reads = reads_of(above)
    gain = norm_gain(model.part("ln2", layer_above)).float() if reads == "mlp_in" else 1.0
    return (below.W_dec * gain) @ above.W_enc


@torch.no_grad()
def share_firing_at_once(
    below: SparseCoder,
    above: SparseCoder,
    x_below: Tensor,
    x_above: Tensor,
    weights: Tensor,
    n: int = 1_000,
) -> float:
    """Of the n pairs of latents with the largest |virtual weight|, the share that ever fires at one
    token; the others are interference that no text shows.

    Args:
        x_below, x_above: the two transcoders' inputs at the same tokens, (rows, d_model).
        weights: (latents below, latents above).
    """
    fires = []
    for coder, x in ((below, x_below), (above, x_above)):
        index, value = coder.encode_sparse(x.float())
        table = torch.zeros(len(x), coder.d_latent)
        fires.append(table.scatter_(1, index, (value > 0).float()))
    at_once = fires[0].T @ fires[1]  # (latents below, latents above): at how many tokens
    top = weights.abs().flatten().topk(n).indices
    return float((at_once.flatten()[top] > 0).float().mean())


@dataclass(frozen=True)
class ActivePairs:
    """Pairs of features that fire on a text, the earlier layer first; all arrays (pairs,).

    virtual  the virtual weight times the earlier feature's activation
    edge     what the earlier one adds to the later one's pre-activation, through attention as well,
             with attention patterns and norms as they are on this text
    even     the same with `even_attention` in every head: its weights, but no pattern
    gap      positions from the earlier to the later one
    """

    virtual: np.ndarray
    edge: np.ndarray
    even: np.ndarray
    gap: np.ndarray

    def correlation(self, same_position: bool = True, of: str = "virtual") -> float:
        """Of `virtual` (or `even`) and `edge`, over the pairs at one position, or at two."""
        chosen = (self.gap == 0) == same_position
        return float(np.corrcoef(getattr(self, of)[chosen], self.edge[chosen])[0, 1])

    def share_across(self) -> float:
        """The share of Σ |edge| between different positions, which only attention can carry."""
        return float(np.abs(self.edge[self.gap > 0]).sum() / np.abs(self.edge).sum())


@torch.no_grad()
def active_pairs(model: LanguageModel, coders: Coders, prompts: Sequence[str]) -> ActivePairs:
    """Virtual weights and edges of all pairs of features that fire on these prompts."""
    found: list[list[np.ndarray]] = [[], [], [], []]
    layers = by_layer(coders)
    table = {
        (i, j): virtual_weights(model, layers[i], layers[j], j).numpy()
        for j in layers
        for i in layers
        if i < j
    }
    for prompt in prompts:
        local = LocalReplacement(model, Transcoders(layers, allow_missing=True), prompt)
        edge = feature_edges(local)
        local.patterns = [even_attention(pattern) for pattern in local.patterns]
        even = feature_edges(local)
        at = list(local.features.items())
        layer = np.concatenate([np.full(len(active), i) for i, active in at])
        place, latent, value = (
            torch.cat([getattr(active, name) for _, active in at]).cpu().numpy()
            for name in ("positions", "latents", "values")
        )
        for (below, above), weights in table.items():
            source, target = np.flatnonzero(layer == below), np.flatnonzero(layer == above)
            gap = place[target][:, None] - place[source]
            virtual = weights[latent[source]][:, latent[target]].T * value[source]
            here = np.ix_(target, source)
            for held, each in zip(found, (virtual, edge[here], even[here], gap), strict=True):
                held.append(each[gap >= 0])
    return ActivePairs(*(np.concatenate(each) for each in found))


@torch.no_grad()
def feature_edges(local: LocalReplacement) -> np.ndarray:
    """Edges between all features, (targets, sources)."""
    columns = Columns(local)
    features = torch.cat([torch.arange(s.start, s.stop) for s in columns.features.values()])
    rows = []
    for layer, active in local.features.items():
        if len(active):
            vectors = local.coders[layer].W_enc[:, active.latents].float().T
            edges, _ = edges_closed_form(local, columns, layer, active.positions, vectors)
            rows.append(edges.cpu()[:, features])
    return torch.cat(rows).numpy()


def even_attention(pattern: Tensor) -> Tensor:
    """Attention (heads, query, key) that is spread evenly over all tokens up to the query."""
    seen = torch.ones_like(pattern).tril()
    return seen / seen.sum(-1, keepdim=True)
