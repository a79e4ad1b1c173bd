"""Attention heads: what each attends to, and what its weights read and write.

    scores = head_scores(model, ids)                         # {"induction": (n_layers, n_heads), …}
    found = strongest(scores["induction"], above=0.4)        # [(layer, head), …]
    into_keys = composition(model, "K")                      # by weights

Composition by path patching is `mi_helpers.paths.composition_effect`. All scores are computed from
token ids and attention patterns, so they work for any model. A head's name describes what it does
on one kind of text; it does not say what the head is for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.arguments import (
    checked_head,
    ids_on,
    number,
    one_of,
    padding_token,
    shown,
    square,
    tensor,
    whole,
)
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.models import LanguageModel

Head = tuple[int, int]  # (layer, head)
WEAKEST = 0.4  # the score from which on a head is called by that name, unless told otherwise

# ---------------------------------------------------------------------------------------- scores

SCORES = ("induction", "previous token", "duplicate token", "first token", "current token")


def targets(ids: Tensor) -> dict[str, Tensor]:
    """The positions that a head of each kind attends to.

    From the token at position i, the key position j is a target of
        previous token    j = i - 1  (and j > 0: position 0 takes attention that has no target)
        duplicate token   j < i with the same token as i
        induction         j < i such that the token *before* j is the same as i's
        current token     j = i > 0
        first token       j = 0 < i

    Args:
        ids: (batch, pos).

    Returns:
        {name: booleans (batch, q_pos, k_pos)}.

    Source: Olsson et al. 2022 (prefix matching, previous token); Wang et al. 2022 (duplicate).
    """
    tensor("ids", ids, "batch pos", {}, kind="ids")
    if ids.shape[1] < 2:
        raise ModelError(f"ids has shape {tuple(ids.shape)}: expected (batch, pos), pos >= 2.")
    batch, length = ids.shape
    q = torch.arange(length, device=ids.device)[:, None]
    k = q.T
    same = (ids[:, :, None] == ids[:, None, :]) & (k < q)  # (batch, q_pos, k_pos)
    after = F.pad(same[:, :, :-1], (1, 0)) & (k < q)  # one place to the right
    fixed = {
        "previous token": (k == q - 1) & (k > 0),
        "current token": (k == q) & (k > 0),
        "first token": (k == 0) & (q > 0),
    }
    found = {name: mask.expand(batch, -1, -1) for name, mask in fixed.items()}
    found |= {"duplicate token": same, "induction": after}
    return {name: found[name] for name in SCORES}


def pattern_scores(pattern: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The share of its attention that a head gives to each kind of target.

        score = mean over the tokens i that have a target of Σ_{j in targets(i)} pattern[i, j]

    and, as "positional", how little the pattern depends on the tokens:

        1 - mean over sequences and i of ½ Σ_j |pattern[i, j] - mean over sequences|

    Args:
        pattern: (..., batch, n_heads, q_pos, k_pos).
        ids: (batch, pos).

    Returns:
        {name: (..., n_heads)}; a kind for which no token has a target scores NaN.
    """
    tensor("ids", ids, "batch pos", {}, kind="ids")
    tensor("pattern", pattern, "... batch n_heads pos pos", {})
    if (pattern.shape[-4], *pattern.shape[-2:]) != (*ids.shape, ids.shape[1]):
        raise ModelError(
            f"pattern has shape {tuple(pattern.shape)} and ids {tuple(ids.shape)}: expected "
            "(..., batch, n_heads, pos, pos) and (batch, pos)."
        )
    scores = {}
    for name, mask in targets(ids).items():
        tokens = mask.any(-1).sum()  # how many tokens have a target
        hit = torch.einsum("...bhqk,bqk->...h", pattern, mask.to(pattern.dtype))
        scores[name] = torch.where(tokens > 0, hit / tokens, torch.nan)
    away = (pattern - pattern.mean(-4, keepdim=True)).abs().sum(-1) / 2  # (..., batch, heads, q)
    scores["positional"] = 1 - away[..., 1:].mean((-3, -1))
    return scores


@torch.no_grad()
def head_scores(
    model: LanguageModel, ids: Tensor, score_as: Tensor | None = None
) -> dict[str, Tensor]:
    """`pattern_scores` of every head of a model, {name: (n_layers, n_heads)}.

    Args:
        ids: (batch, pos), what is run.
        score_as: token ids (batch, pos) from which the targets are taken; by default `ids`. With
            repeated tokens here and unrepeated ones run there is nothing to find: the negative
            control of the induction and duplicate-token scores.
    """
    ids = model.ids(ids)
    scored = ids if score_as is None else model.ids(score_as)
    pad = padding_token(model)
    if scored.shape != ids.shape or (pad is not None and (ids[:, [0, -1]] == pad).any()):
        raise ModelError(
            f"ids has shape {tuple(ids.shape)} and score_as {tuple(scored.shape)}: expected "
            "sequences of one length without padding, which would count as repeated tokens."
        )
    kept = []
    for layer in range(model.n_layers):  # patterns are large: one layer's at a time
        _, cache = model.run_with_cache(ids, ("pattern", layer), stop_at_layer=layer + 1)
        kept.append(pattern_scores(cache["pattern", layer], scored))
    return {name: torch.stack([each[name] for each in kept]) for name in kept[0]}


def by_distance(pattern: Tensor) -> Tensor:
    """Mean attention at each distance back, (..., batch, n_heads, pos, pos) -> (..., n_heads, pos).

    Distance 0 is the token itself. Key position 0, which takes attention that has no target, is
    left out.
    """
    tensor("pattern", pattern, "... batch n_heads pos pos", {})
    length = pattern.shape[-1]
    means = [
        pattern.diagonal(-d, -2, -1)[..., 1:].mean((-3, -1)) if d < length - 1 else None
        for d in range(length)
    ]
    return torch.stack([torch.zeros_like(means[0]) if x is None else x for x in means], -1)


def strongest(scores: Tensor, above: float = WEAKEST, most: int | None = None) -> list[Head]:
    """The heads (layer, head) whose score is at least `above`, the highest first."""
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise ModelError(f"scores is {shown(scores)}: expected a tensor (n_layers, n_heads).")
    number("above", above)
    most = None if most is None else whole("most", most, 0)
    order = scores.flatten().nan_to_num(-torch.inf).argsort(descending=True).tolist()
    found = [divmod(i, scores.shape[1]) for i in order if scores.flatten()[i] >= above]
    return found[:most]


def head_name(head: Head) -> str:
    """(3, 1) -> "L3H1"."""
    if not isinstance(head, tuple | list) or len(head) != 2:
        raise ModelError(f"A head is {shown(head)}: expected (layer, head).")
    return f"L{head[0]}H{head[1]}"


def head_names(heads: Iterable[Head]) -> str:
    """[(3, 1), (2, 0)] -> "L3H1, L2H0", or "none"."""
    return ", ".join(map(head_name, heads)) or "none"


def all_heads(model: LanguageModel) -> list[Head]:
    """Every (layer, head)."""
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def random_sets(
    heads: Sequence[Head], size: int, count: int, seed: int = 0, without: Iterable[Head] = ()
) -> list[list[Head]]:
    """`count` random sets of `size` different heads, none of them in `without`: the control of an
    ablation.

    Raises:
        ModelError: fewer than `size` heads are left.
    """
    left = [head for head in heads if head not in set(without)]
    whole("count", count, 0)
    if not 0 < whole("size", size) <= len(left):
        raise ModelError(f"A set of {size} heads cannot be drawn from {len(left)}.")
    rng = random.Random(seed)
    return [sorted(rng.sample(left, size)) for _ in range(count)]


# ------------------------------------------------------------------------- composition, by weights


def _centred(norm: nn.Module, W: Tensor, dim: int) -> Tensor:
    """W beside a LayerNorm, which subtracts the mean along `dim`; RMSNorm leaves W as it is."""
    return W - W.mean(dim, keepdim=True) if isinstance(norm, nn.LayerNorm) else W


def reading(model: LanguageModel, name: str, layer: int) -> Tensor:
    """W_Q, W_K or W_V with the gains of the norms around it:

        diag(gain of the norm before attention) W diag(gain of the q- or k-norm, where there is one)

    Left out are the norm's 1/rms, one number per token, and the rotation of queries and keys by
    their position.

    Returns:
        (n_heads, d_model, d_head), float32; key-value heads are repeated, one for each query head.
    """
    one_of("name", name, ("W_Q", "W_K", "W_V"))
    norm = model.part("ln1", layer)
    W = model.weight(name, layer).float() * norm_gain(norm).float()[:, None]
    W = _centred(norm, W, -2)
    inner = {"W_Q": "q_norm", "W_K": "k_norm"}.get(name)
    if inner and model.part(inner, layer) is not None:
        W = W * norm_gain(model.part(inner, layer)).float()
    return W.repeat_interleave(model.n_heads // len(W), 0)


def writing(model: LanguageModel, layer: int) -> Tensor:
    """W_O diag(gain of the norm after attention, where there is one).

    Left out is that norm's 1/rms, one number per token for all heads of the layer.

    Returns:
        (n_heads, d_head, d_model), float32.
    """
    W = model.weight("W_O", layer).float()
    post = model.part("ln1_post", layer)
    return W if post is None else W * norm_gain(post).float()


@torch.no_grad()
def composition(model: LanguageModel, kind: str) -> Tensor:
    """How much of what each head writes is read by each later head's queries, keys or values.

        K:  ‖W_OV W_QKᵀ‖ / (‖W_OV‖ ‖W_QK‖)    Q:  ‖W_OV W_QK‖ / …    V:  ‖W_OV W_OV'‖ / …

    with W_QK = W_Q W_Kᵀ, W_OV = W_V W_O (rows are inputs) and Frobenius norms. The gains of the
    norms are folded in (`reading`, `writing`). Rotary embeddings are left out: for Q and K this is
    the part of the score that does not depend on the distance. Matrices with random directions
    score `chance_of_composition(model)`.

    Args:
        kind: "Q", "K" or "V".

    Returns:
        (n_layers, n_heads, n_layers, n_heads): writer, then reader; NaN where the reader is not in
        a later layer.

    Source: Elhage et al. 2021, A Mathematical Framework, "Composition of attention heads".
    """
    if kind not in ("Q", "K", "V"):
        raise ModelError(f"There is no {kind!r}-composition, so kind has to be Q, K or V.")
    names_, n = ("W_Q", "W_K", "W_V"), model.n_layers
    read = [{name: reading(model, name, layer) for name in names_} for layer in range(n)]
    write = [writing(model, layer) for layer in range(n)]
    found = torch.full((n, model.n_heads, n, model.n_heads), torch.nan, device=model.device)
    for j in range(1, n):
        far = {"Q": ("W_Q", read[j]["W_K"]), "K": ("W_K", read[j]["W_Q"])}
        name, rest = far.get(kind, ("W_V", write[j].transpose(1, 2)))
        near = read[j][name]  # (heads, d_model, d_head), and rest the same shape
        reader_norm = _product_norm(near, rest)
        for i in range(j):
            middle = torch.einsum("wam,rmb->wrab", write[i], near)  # (writer, reader, d_head, ..)
            both = _sandwich_norm(read[i]["W_V"], middle, rest)
            alone = _product_norm(read[i]["W_V"], write[i].transpose(1, 2))
            found[i, :, j] = both / (alone[:, None] * reader_norm[None])
    return found


def _product_norm(A: Tensor, B: Tensor) -> Tensor:
    """‖A Bᵀ‖ of (heads, d_model, d_head) each, (heads,): by the small Gram matrices."""
    return (_gram(A) * _gram(B)).sum((-2, -1)).clamp(min=0).sqrt()


def _sandwich_norm(A: Tensor, M: Tensor, B: Tensor) -> Tensor:
    """‖A M Bᵀ‖, (writers, readers), of A (writers, d, h), M (writers, readers, h, h), B."""
    inner = torch.einsum("wab,wrbc,rcd->wrad", _gram(A), M, _gram(B))
    return (inner * M).sum((-2, -1)).clamp(min=0).sqrt()


def _gram(A: Tensor) -> Tensor:
    return A.transpose(-2, -1) @ A


def chance_of_composition(model: LanguageModel) -> float:
    """The composition score of two matrices with random directions, 1 / sqrt(d_model).

    E ‖A R B‖² over rotations R is ‖A‖² ‖B‖² / d_model.
    """
    return model.d_model**-0.5


# ------------------------------------------------------------------------------ OV and QK circuits


@torch.no_grad()
def effective_embedding(model: LanguageModel, ids: Tensor, depth: int = 1) -> Tensor:
    """The stream at each token alone (after `<bos>`) as it enters block `depth`, (tokens, d_model).

    At depth 1 the first block has turned the embedding into what later heads read.

    Source: Wang et al. 2022, section 3.1, where copying is measured after the first MLP.
    """
    ids = ids_on(model, "ids", ids)
    depth = whole("depth", depth, 0, model.n_layers - 1)
    bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
    rows = ids[:, None] if bos is None else torch.stack([torch.full_like(ids, bos), ids], 1)
    parts = [
        model.run_with_cache(some, ("resid_pre", depth), pos=-1, stop_at_layer=depth + 1)[1]
        for some in rows.split(512)
    ]
    return torch.cat([part["resid_pre", depth] for part in parts])


@torch.no_grad()
def ov_circuit(
    model: LanguageModel, head: Head, ids: Tensor, through: Sequence[Head] = ()
) -> Tensor:
    """What a head adds to the logit of token b when it attends to token a:

        normed stream of token a · W_V W_O · gains · W_U[:, b]

    up to one positive factor per row, with rows centred on 0, as a softmax ignores a constant. The
    stream is `effective_embedding` (the bare embedding for layer 0).

    Args:
        ids: (tokens,).
        through: earlier heads; the stream is then what they write when they attend to the token.

    Returns:
        (tokens, tokens): from a, to b.

    Raises:
        ModelError: none of the heads in `through` comes before this one.
    """
    layer, h = head = checked_head(model, head)
    ids = ids_on(model, "ids", ids)
    through = [checked_head(model, each, "One of `through`") for each in through]
    if through:
        before = [each for each in through if each[0] < layer]
        if not before:
            raise ModelError(
                f"{head_name(head)} reads nothing of {head_names(through)}: it is not after them."
            )
        stream = sum(_written(model, each, ids) for each in before)
    else:
        stream = effective_embedding(model, ids, min(layer, 1))
    written = _moved(model, head, stream)
    final = model.ln_final
    unembed = _centred(final, norm_gain(final).float()[:, None] * model.W_U[:, ids].float(), 0)
    logits = written @ unembed
    return logits - logits.mean(1, keepdim=True)


def _moved(model: LanguageModel, head: Head, stream: Tensor) -> Tensor:
    """What a head writes when it attends to each row of a stream (tokens, d_model)."""
    layer, h = head
    value = model.part("ln1", layer)(stream).float()
    value = value @ model.weight("W_V", layer)[h * model.n_kv_heads // model.n_heads].float()
    return value @ writing(model, layer)[h]


def _written(model: LanguageModel, head: Head, ids: Tensor) -> Tensor:
    """What a head writes when it attends to each token, (tokens, d_model)."""
    return _moved(model, head, effective_embedding(model, ids, min(head[0], 1)))


def copying(logits: Tensor) -> dict[str, float]:
    """How far an OV circuit copies the token that it attends to.

    Args:
        logits: (from, to), as `ov_circuit` gives them.

    Returns:
        first: share of tokens that raise their own logit the most.
        last: share of tokens that lower their own logit the most: the head suppresses them.
        own: mean of a token's own logit in standard deviations of its row; above 0 it copies.
        trace: Σ λ / Σ |λ| of the eigenvalues, from -1 (suppresses) to 1 (copies).

    Source: Elhage et al. 2021, "Copying / OV eigenvalues"; Wang et al. 2022, copy score.
    """
    square("logits", logits)
    eigenvalues = torch.linalg.eigvals(logits.detach().cpu().double())  # MPS has neither
    return {
        "first": matching(logits),
        "last": matching(-logits),
        "own": float((logits.diagonal() / logits.std(1)).mean()),
        "trace": float(eigenvalues.sum().real / eigenvalues.abs().sum()),
    }


@torch.no_grad()
def copying_map(
    model: LanguageModel, ids: Tensor, through: Sequence[Head] = ()
) -> dict[str, Tensor]:
    """`copying` of every head, {name: (n_layers, n_heads)}.

    Args:
        ids: (tokens,).
        through: as in `ov_circuit`; heads that are not after any of these get NaN.
    """
    through = [checked_head(model, each, "One of `through`") for each in through]
    nothing = dict.fromkeys(("first", "last", "own", "trace"), math.nan)
    first = min((layer for layer, _ in through), default=-1)
    each = [
        copying(ov_circuit(model, head, ids, through).cpu()) if head[0] > first else nothing
        for head in all_heads(model)
    ]
    shape = (model.n_layers, model.n_heads)
    return {name: torch.tensor([row[name] for row in each]).reshape(shape) for name in each[0]}


@torch.no_grad()
def qk_circuit(model: LanguageModel, reader: Head, ids: Tensor, writer: Head | None) -> Tensor:
    """The score with which a reader at token a attends to the position *after* token b.

    Queries come from `effective_embedding`, keys from what the writer moves to that position.
    Queries and keys are not rotated: this is the part of the score that depends on content.

    Args:
        ids: (tokens,).
        writer: an earlier head; None: the keys are those of the tokens themselves.

    Returns:
        (a, b), each a token of ids.

    Raises:
        ModelError: the writer is not in an earlier layer.
    """
    layer, h = reader = checked_head(model, reader, "reader")
    writer = None if writer is None else checked_head(model, writer, "writer")
    ids = ids_on(model, "ids", ids)
    stream = effective_embedding(model, ids, min(layer, 1))
    query = model.part("ln1", layer)(stream).float() @ _plain(model, "W_Q", layer)[h]
    if writer is None:
        key = model.part("ln1", layer)(stream).float() @ _plain(model, "W_K", layer)[h]
        return query @ key.T
    first, g = writer
    if first >= layer:
        raise ModelError(f"{head_name(writer)} writes after {head_name(reader)} has read.")
    source = effective_embedding(model, ids, min(first, 1))
    value = model.part("ln1", first)(source).float() @ _plain(model, "W_V", first)[g]
    return query @ (value @ writing(model, first)[g] @ reading(model, "W_K", layer)[h]).T


def _plain(model: LanguageModel, name: str, layer: int) -> Tensor:
    """A reading matrix behind the norm, one for each query head, float32."""
    W = model.weight(name, layer).float()
    return W.repeat_interleave(model.n_heads // len(W), 0)


def matching(scores: Tensor) -> float:
    """Share of the rows of a QK circuit with their maximum on the diagonal."""
    square("scores", scores)
    diagonal = torch.arange(len(scores), device=scores.device)
    return float((scores.argmax(1) == diagonal).float().mean())
