"""Attention heads: what each attends to, what its weights do, and what its removal costs.

    ids = repeated_tokens(model, n=16, length=24)            # random words, then the same again
    scores = head_scores(model, ids)                         # {"induction": (n_layers, n_heads), …}
    found = strongest(scores["induction"], above=0.4)        # [(layer, head), …]
    with model.hooks(ablation(model, found, mean_z(model, ids))):
        ...

All scores are computed from token ids and attention patterns, so that they hold for any model. A
head's name describes what it does on one kind of text; it is not what the head is for.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.files import DATA
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.patching import path_patch_map
from mi_helpers.tinyworld.copying import vocabulary

Head = tuple[int, int]  # (layer, head)
MODES = ("mean", "zero", "resample")
WEAKEST = 0.4  # a head is called by a score of at least this, unless told otherwise

# --------------------------------------------------------------------------------- random tokens


def word_ids(model: LanguageModel) -> Tensor:
    """Ids to draw random tokens from, (n,): TinyWorld's words that are one token with their space.

    A model without a tokenizer gets all of its ids but the special ones of its configuration.
    """
    if model.tokenizer is None:
        named = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
        special = {getattr(model.config, name, None) for name in named}
        return torch.tensor([i for i in range(model.d_vocab) if i not in special])
    encode = model.tokenizer.encode
    unknown = model.tokenizer.unk_token_id
    rows = [encode(f" {word}", add_special_tokens=False) for word in vocabulary()]
    found = [row[0] for row in rows if len(row) == 1 and row[0] != unknown]
    if len(found) < 2:
        raise ModelError(f"{model.name}'s tokenizer has none of TinyWorld's words as one token.")
    return torch.tensor(sorted(set(found)))


def repeated_tokens(
    model: LanguageModel, n: int = 16, length: int = 24, seed: int = 0, times: int = 2
) -> Tensor:
    """n sequences of `length` different random tokens, each written `times` times in a row.

    Returns:
        ids (n, first + times * length), where first is 1 with `<bos>`, else 0. With times=1 nothing
        is repeated: the negative control.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads.

    Raises:
        ModelError: fewer than two tokens to repeat, or more than the context or the vocabulary has.
    """
    words = word_ids(model)
    bos = [] if model.tokenizer is None else [model.tokenizer.bos_token_id]
    bos = [i for i in bos if i is not None]
    total = len(bos) + length * times
    if length < 2 or n < 1 or times < 1:
        raise ModelError(f"n={n}, length={length}, times={times}: give 1, 2 and 1 at least.")
    if total > model.n_ctx or length > len(words):
        raise ModelError(
            f"{times} times {length} tokens do not fit: {model.name} has a context of "
            f"{model.n_ctx} and {len(words)} words to draw from."
        )
    rng = torch.Generator().manual_seed(seed)
    rows = [words[torch.randperm(len(words), generator=rng)[:length]] for _ in range(n)]
    first = torch.tensor(bos, dtype=torch.int64).expand(n, -1)
    return torch.cat([first, torch.stack(rows).repeat(1, times)], 1).to(model.device)


# ---------------------------------------------------------------------------------------- scores

SCORES = ("induction", "previous token", "duplicate token", "first token", "current token")


def targets(ids: Tensor) -> dict[str, Tensor]:
    """Where a head of each kind attends from each position, {name: (batch, q_pos, k_pos) booleans}.

    From the token at position i, the key position j is the target of
        previous token    j = i - 1  (and j > 0, as position 0 attracts what has nowhere to go)
        duplicate token   j < i with the same token as i
        induction         j < i such that the token *before* j is the same as i's
        current token     j = i > 0
        first token       j = 0 < i
    Source: Olsson et al. 2022 (prefix matching, previous token); Wang et al. 2022 (duplicate).
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ModelError(f"Token ids of shape {tuple(ids.shape)}: expected (batch, pos), pos >= 2.")
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
    """How much of its attention a head gives to each kind of target, {name: (..., n_heads)}.

        score = mean over the tokens i that have a target of Σ_{j in targets(i)} pattern[i, j]

    and, as "positional", how little the pattern depends on the tokens:

        1 - mean over sequences and i of ½ Σ_j |pattern[i, j] - mean over sequences|

    Args:
        pattern: (..., batch, n_heads, q_pos, k_pos).
        ids: (batch, pos). A kind that no token has a target of scores NaN.
    """
    if pattern.shape[-4] != ids.shape[0] or pattern.shape[-1] != ids.shape[1]:
        raise ModelError(
            f"The pattern has shape {tuple(pattern.shape)} and the ids {tuple(ids.shape)}: "
            "expected (..., batch, n_heads, pos, pos) and (batch, pos)."
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
    """`pattern_scores` of every head of the model on ids, {name: (n_layers, n_heads)}.

    score_as  token ids (batch, pos) that say where the targets are, if not `ids` themselves. With
              the ids of repeated tokens here and unrepeated ones run, induction and duplicate-token
              scores have nothing to find: the negative control.
    """
    kept = []
    for layer in range(model.n_layers):  # one layer's patterns at a time: they are the large ones
        _, cache = model.run_with_cache(ids, ("pattern", layer), stop_at_layer=layer + 1)
        kept.append(pattern_scores(cache["pattern", layer], ids if score_as is None else score_as))
    return {name: torch.stack([each[name] for each in kept]) for name in kept[0]}


def by_distance(pattern: Tensor) -> Tensor:
    """Mean attention at each distance back, (..., batch, n_heads, pos, pos) -> (..., n_heads, pos):
    0 is the token itself. Without key position 0, which attracts what has nowhere to go."""
    length = pattern.shape[-1]
    means = [
        pattern.diagonal(-d, -2, -1)[..., 1:].mean((-3, -1)) if d < length - 1 else None
        for d in range(length)
    ]
    return torch.stack([torch.zeros_like(means[0]) if x is None else x for x in means], -1)


def strongest(scores: Tensor, above: float = WEAKEST, most: int | None = None) -> list[Head]:
    """The heads (layer, head) whose score is at least `above`, the highest first."""
    order = scores.flatten().nan_to_num(-torch.inf).argsort(descending=True).tolist()
    found = [divmod(i, scores.shape[1]) for i in order if scores.flatten()[i] >= above]
    return found[:most]


def head_name(head: Head) -> str:
    """(3, 1) -> "L3H1"."""
    return f"L{head[0]}H{head[1]}"


def names(heads: Iterable[Head]) -> str:
    """[(3, 1), (2, 0)] -> "L3H1, L2H0", or "none"."""
    return ", ".join(map(head_name, heads)) or "none"


def all_heads(model: LanguageModel) -> list[Head]:
    """Every (layer, head)."""
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


# --------------------------------------------------------------------------------------- ablation


@torch.no_grad()
def reference_z(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """{layer: what its heads give W_O on these texts, (batch, pos, n_heads, d_head)}."""
    _, cache = model.run_with_cache(ids, "z", stop_at_layer=model.n_layers)
    return {layer: cache["z", layer] for layer in range(model.n_layers)}


def ablation(
    model: LanguageModel,
    heads: Iterable[Head],
    reference: Mapping[int, Tensor] | None = None,
    mode: str = "mean",
    seed: int = 0,
) -> dict:
    """Hooks that silence a set of heads at once, for `model.hooks`.

    At every position but the first, a head's z becomes
        mean      the mean over the reference texts, at the same position
        resample  that of one reference text, drawn for each text, at the same position
        zero      0
    The layer's post-norm, where there is one, is then computed from the changed sum, as the model
    itself would do.

    Args:
        heads: (layer, head) pairs; an empty set silences nothing.
        reference: `reference_z` of texts that are at least as long as those that will be run.

    Raises:
        ModelError: no such head or mode; a reference that is missing or too short.
    """
    if mode not in MODES:
        raise ModelError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise ModelError(
                f"There is no head ({layer}, {head}): {model.name} has {model.n_layers} layers of "
                f"{model.n_heads} heads."
            )
        by_layer.setdefault(layer, []).append(head)
    if mode != "zero" and by_layer and (reference is None or not set(by_layer) <= set(reference)):
        raise ModelError(f"Mode {mode!r} needs `reference_z` of other texts, for every layer.")

    def silence(layer: int, at: list[int]):
        def hook(z: Tensor) -> Tensor:
            if mode == "zero":
                z[:, 1:, at] = 0
                return z
            rows, length = reference[layer], z.shape[1]
            if rows.shape[1] < length:
                raise ModelError(
                    f"The reference texts have {rows.shape[1]} tokens and this one {length}: give "
                    "longer ones."
                )
            if mode == "mean":
                new = rows.mean(0, keepdim=True)
            else:
                rng = torch.Generator().manual_seed(seed)
                new = rows[torch.randint(len(rows), (len(z),), generator=rng).to(rows.device)]
            z[:, 1:, at] = new[:, 1:length, at].to(z)
            return z

        return hook

    return {("z", layer): silence(layer, at) for layer, at in by_layer.items()}


def halves(losses: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Losses (batch, pos - 1) of a sequence of `length` tokens written twice, as (first, second).

    first   of the tokens of the first writing, without the very first
    second  of the second writing without its first token, which nothing foretells
    """
    if losses.shape[1] < 2 * length - 1:
        raise ModelError(f"{losses.shape[1]} losses are too few for {length} tokens written twice.")
    second = losses[:, -(length - 1) :]
    first = losses[:, -(2 * length - 1) : -length]
    return first, second


@torch.no_grad()
def repetition_gain(
    model: LanguageModel, ids: Tensor, length: int, hooks: Mapping | None = None
) -> float:
    """By how many nats per token the second writing is cheaper than the first, under `hooks`."""
    with model.hooks(hooks or {}):
        first, second = halves(model.loss(ids), length)
    return float(first.mean() - second.mean())


def random_sets(
    heads: Sequence[Head], size: int, count: int, seed: int = 0, without: Iterable[Head] = ()
) -> list[list[Head]]:
    """`count` sets of `size` different heads, none in `without`: the control of an ablation.

    Raises:
        ModelError: fewer than `size` heads are left.
    """
    left = [head for head in heads if head not in set(without)]
    if not 0 < size <= len(left):
        raise ModelError(f"A set of {size} heads cannot be drawn from {len(left)}.")
    rng = random.Random(seed)
    return [sorted(rng.sample(left, size)) for _ in range(count)]


def share_lost(model: LanguageModel, sets: Sequence[Iterable[Head]], length: int, seed: int = 0):
    """For each set of heads, the share of the gain from repetition that its removal takes away,
    (sets,): 1 - gain without the set / gain of the whole model.

    The heads are mean-ablated, with other random repeated tokens as reference.
    """
    count = 8 if model.n_parameters < 1e9 else 4
    ids = repeated_tokens(model, count, length, seed)
    reference = reference_z(model, repeated_tokens(model, 2 * count, length, seed + 10_000))
    whole = repetition_gain(model, ids, length)
    without = [repetition_gain(model, ids, length, ablation(model, s, reference)) for s in sets]
    return 1 - np.array(without) / whole


# ------------------------------------------------------------------------- composition, by weights


def _centred(norm: nn.Module, W: Tensor, dim: int) -> Tensor:
    """W behind (or before) a LayerNorm that takes the mean away; RMSNorm leaves W as it is."""
    return W - W.mean(dim, keepdim=True) if isinstance(norm, nn.LayerNorm) else W


def reading(model: LanguageModel, name: str, layer: int) -> Tensor:
    """W_Q, W_K or W_V with the gains around it, (n_heads, d_model, d_head), float32.

    diag(gain of the norm before attention) W diag(gain of the q- or k-norm, where there is one);
    key-value heads are repeated, so that there is one matrix for each query head. What is left out
    is one number per token (1/rms), and the rotation of queries and keys by their position.
    """
    norm = model.part("ln1", layer)
    W = model.weight(name, layer).float() * norm_gain(norm).float()[:, None]
    W = _centred(norm, W, -2)
    inner = {"W_Q": "q_norm", "W_K": "k_norm"}.get(name)
    if inner and model.part(inner, layer) is not None:
        W = W * norm_gain(model.part(inner, layer)).float()
    return W.repeat_interleave(model.n_heads // len(W), 0)


def writing(model: LanguageModel, layer: int) -> Tensor:
    """W_O diag(gain of the norm after attention, where there is one), (n_heads, d_head, d_model),
    float32. Left out: that norm's 1/rms, one number per token for all heads of the layer."""
    W = model.weight("W_O", layer).float()
    post = model.part("ln1_post", layer)
    return W if post is None else W * norm_gain(post).float()


@torch.no_grad()
def composition(model: LanguageModel, kind: str) -> Tensor:
    """How much of what each head writes is read by each later head, (n_layers, n_heads, n_layers,
    n_heads): writer, then reader; NaN where the reader is not in a later layer.

        K:  ‖W_OV W_QKᵀ‖ / (‖W_OV‖ ‖W_QK‖)    Q:  ‖W_OV W_QK‖ / …    V:  ‖W_OV W_OV'‖ / …

    with W_QK = W_Q W_Kᵀ, W_OV = W_V W_O (rows are inputs) and Frobenius norms. Matrices turned at
    random towards each other would score `chance_of_composition(model)`.

    Source: Elhage et al. 2021, A Mathematical Framework, "Composition of attention heads". The
    gains of the norms are folded in (`reading`, `writing`); rotary embeddings are left out, so for
    Q and K this is the part of the score that does not depend on the distance.
    """
    if kind not in ("Q", "K", "V"):
        raise ModelError(f"There is no {kind!r}-composition: choose Q, K or V.")
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
    """The composition score of two matrices that are turned at random towards each other.

    E ‖A R B‖² over rotations R is ‖A‖² ‖B‖² / d_model, so the score is 1 / sqrt(d_model).
    """
    return model.d_model**-0.5


# ------------------------------------------------------------------------------ OV and QK circuits


@torch.no_grad()
def effective_embedding(model: LanguageModel, ids: Tensor, depth: int = 1) -> Tensor:
    """The stream at a token that stands alone (after `<bos>`), as it enters block `depth`:
    (tokens, d_model). At depth 1 the first block has turned the embedding into what heads read.

    Source: Wang et al. 2022, section 3.1, where copying is measured after the first MLP.
    """
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
    """What a head adds to the logit of each token when it attends to each token, (from, to):

        normed stream of token a · W_V W_O · gains · W_U[:, b]

    up to one positive factor per row and, as a softmax does not see it, one number per row: rows
    are centred on 0. The stream is `effective_embedding` (the bare embedding for layer 0), or with
    `through` what those earlier heads write when they attend to the token: two links of a chain.

    Raises:
        ModelError: none of the heads in `through` comes before this one.
    """
    layer, h = head
    if through:
        before = [each for each in through if each[0] < layer]
        if not before:
            names = ", ".join(map(head_name, through))
            raise ModelError(f"{head_name(head)} reads nothing of {names}: it is not after them.")
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
    """What an OV circuit (from, to) does with the token it attends to.

    first  share of tokens that raise their own logit the most
    last   share of tokens that lower their own logit the most: the head suppresses what it reads
    own    mean of a token's own logit in standard deviations of its row: positive when it copies
    trace  Σ λ / Σ |λ| of its eigenvalues, from -1 (suppresses) to 1 (copies)

    Source: Elhage et al. 2021, "Copying / OV eigenvalues"; Wang et al. 2022, copy score.
    """
    own = logits.diagonal()
    eigenvalues = torch.linalg.eigvals(logits.double())
    return {
        "first": float((logits.argmax(1) == torch.arange(len(logits))).float().mean()),
        "last": float((logits.argmin(1) == torch.arange(len(logits))).float().mean()),
        "own": float((own / logits.std(1)).mean()),
        "trace": float(eigenvalues.sum().real / eigenvalues.abs().sum()),
    }


@torch.no_grad()
def copying_map(
    model: LanguageModel, ids: Tensor, through: Sequence[Head] = ()
) -> dict[str, Tensor]:
    """`copying` of every head, {name: (n_layers, n_heads)}, for the tokens ids (tokens,); with
    `through`, of what these heads write, and NaN for the heads that are not after any of them."""
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
    """How much the reader, at token a, wants the position *after* token b, (a, b): queries from
    `effective_embedding`, keys from what the writer's OV circuit moves there.

    Without a writer the keys are the tokens themselves. Queries and keys are not rotated: this is
    the part of the score that is about content, not about distance.
    """
    layer, h = reader
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
    """A reading matrix for what has gone through the norm, one for each query head, float32."""
    W = model.weight(name, layer).float()
    return W.repeat_interleave(model.n_heads // len(W), 0)


def matching(scores: Tensor) -> float:
    """Share of rows of a QK circuit whose highest score is on the diagonal."""
    return float(
        (scores.argmax(1) == torch.arange(len(scores), device=scores.device)).float().mean()
    )


# -------------------------------------------------------------------------- composition, by effect


def key_heads(model: LanguageModel, heads: Iterable[Head], site: str = "k") -> list[tuple]:
    """Receivers for `path_patch`: the heads' queries, keys or values, each key-value head once."""
    group = 1 if site == "q" else model.n_heads // model.n_kv_heads
    return sorted({(site, layer, head // group) for layer, head in heads})


def induction_pair(
    model: LanguageModel, n: int = 16, length: int = 12, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts whose next token only an induction head foretells, and prompts where none can.

    Returns:
        clean (n, pos): tokens, then the same without the last; corrupted (n, pos): the same, with
        other tokens in the first writing; answer (n,): the token that follows in clean.
    """
    ids = repeated_tokens(model, n, length, seed)
    other = ids.clone()
    other[:, -2 * length : -length] = repeated_tokens(model, n, length, seed + 1)[:, -length:]
    return ids[:, :-1], other[:, :-1], ids[:, -1]


def answer_log_prob(answer: Tensor):
    """A metric: logits at the last position (..., batch, d_vocab) -> mean log p(answer), (...,)."""

    def metric(logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, answer.expand(logits.shape[:-1])[..., None])[..., 0].mean(-1)

    return metric


def composition_effect(
    model: LanguageModel,
    readers: Sequence[Head],
    site: str = "k",
    seed: int = 0,
    n: int = 16,
    length: int = 12,
) -> Tensor:
    """What each head's direct path into the readers' queries, keys or values is worth, (n_layers,
    n_heads), as a share: 1 if patching it alone is as bad as having no first writing at all.

    Path patching (noise) on `induction_pair`, measured in log p(the token that follows).
    """
    clean, corrupted, answer = induction_pair(model, n, length, seed)
    metric = answer_log_prob(answer)
    with torch.no_grad():
        top, bottom = (float(metric(model.forward(ids)[:, -1])) for ids in (clean, corrupted))
    receivers = key_heads(model, readers, site)
    patched = path_patch_map(model, clean, corrupted, receivers, metric)
    return (top - patched) / (top - bottom)


# ----------------------------------------------------------------------------- when heads form

LOG = DATA / "tiny_gemma" / "training_log.csv"


def training_log(path: str | Path = LOG) -> dict[str, np.ndarray]:
    """{column: (checkpoints,)} of the log that training wrote, with "step" among the columns.

    Raises:
        ModelError: the file is not there, or is not such a log.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no {path.name} in {path.parent.name}: `make model` writes one.")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if len(rows) < 3 or "step" not in rows[0]:
        raise ModelError(f"{path.name} needs a column 'step' and three checkpoints or more.")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def reaches(steps: np.ndarray, values: np.ndarray, share: float = 0.5) -> float:
    """The step at which a curve has made `share` of its way from its first value to its highest,
    with straight lines between the checkpoints."""
    level = values[0] + share * (values.max() - values[0])
    i = int(np.argmax(values >= level))
    if i == 0:
        return float(steps[0])
    part = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def steepest(steps: np.ndarray, values: np.ndarray, width: float) -> tuple[float, float, float]:
    """The window of `width` steps in which a curve rises most: (from, to, the share of the whole
    rise, from its first value to its highest, that falls into it)."""
    rise = values.max() - values[0]
    if rise <= 0 or not 0 < width <= steps[-1] - steps[0]:
        raise ModelError("A window needs a curve that rises, and a width within its steps.")
    # a best window begins or ends at a checkpoint, as the curve is straight between them
    starts = np.unique(np.clip([*steps, *(steps - width)], steps[0], steps[-1] - width))
    gains = np.interp(starts + width, steps, values) - np.interp(starts, steps, values)
    best = int(gains.argmax())
    return float(starts[best]), float(starts[best] + width), float(gains[best] / rise)


def waits(steps: np.ndarray, values: np.ndarray, level: float, within: float):
    """The longest run of checkpoints at which a curve stays near a level: (from, to), or None."""
    best, start = None, None
    for i, near in enumerate([*(np.abs(values - level) <= within), False]):
        if near and start is None:
            start = i
        elif not near and start is not None:
            if best is None or steps[i - 1] - steps[start] > steps[best[1]] - steps[best[0]]:
                best = (start, i - 1)
            start = None
    return None if best is None else (float(steps[best[0]]), float(steps[best[1]]))


# ------------------------------------------------------------------------------- for the ledger

LENGTH = 24  # tokens that are repeated


@cache
def _shipped() -> LanguageModel:
    return load_model("tiny-gemma")


@cache
def _scores(seed: int) -> dict[str, Tensor]:
    model = _shipped()
    return head_scores(model, repeated_tokens(model, 8, LENGTH, seed))


def lost_without_induction(seed: int) -> float:
    """Share of the gain from repetition that goes when the induction heads are ablated."""
    return float(share_lost(_shipped(), [strongest(_scores(seed)["induction"])], LENGTH, seed)[0])


def lost_without_others(seed: int, count: int = 15) -> float:
    """The same for as many other heads drawn at random: the median of `count` sets."""
    model, induction = _shipped(), strongest(_scores(seed)["induction"])
    sets = random_sets(all_heads(model), len(induction), count, seed, induction)
    return float(np.median(share_lost(model, sets, LENGTH, seed)))


@cache
def _paths(seed: int, site: str) -> Tensor:
    return composition_effect(_shipped(), strongest(_scores(seed)["induction"]), site, seed, n=8)


def previous_token_through_keys(seed: int) -> float:
    """Share of the answer's log-probability that hangs on the path from the previous-token head to
    the induction heads' keys: the head with the highest score before the last induction head."""
    previous = _scores(seed)["previous token"].clone()
    last = max(layer for layer, _ in strongest(_scores(seed)["induction"]))
    previous[last:] = 0
    return float(_paths(seed, "k")[strongest(previous, above=0, most=1)[0]])


def through_queries_and_values(seed: int) -> float:
    """Negative control: the largest share of any head's path into their queries or their values."""
    return float(max(_paths(seed, site).abs().max() for site in "qv"))


def induction_without_repetition(seed: int) -> float:
    """Negative control: the highest induction score where nothing is repeated."""
    model = _shipped()
    ids = repeated_tokens(model, 8, LENGTH, seed)
    plain = repeated_tokens(model, 8, 2 * LENGTH, seed, times=1)
    return float(head_scores(model, plain, score_as=ids)["induction"].max())


def phase_change(seed: int) -> float:
    """Share of the induction score's rise that falls into the steepest tenth of training.

    The log's checkpoints are up to 7 % of the run apart, so that no shorter part can be told.
    """
    log = training_log()
    return steepest(log["step"], log["induction_head"], 0.1 * log["step"][-1])[2]
