"""QK attribution: why a head looks from one token at another, as products of two nodes.

    found = qk_attribution(local, layer=4, head=3, query=9, key=4)
    found.score                                # q · k / √d, before the soft-cap
    found.top(5)                               # [(query's node, key's node, product)]
    score_gradient(local, 4, 3, 9, 4)          # the same by autograd, through the model's modules

A query is linear in what was written to the stream at its position, a key in what was written at
its own, once attention below and the norms' denominators are held as they are on the prompt. So the
score is a sum over pairs of one node that wrote into the query and one that wrote into the key,
biases among them. As elsewhere, `<bos>`'s features and errors count as bias.

Source: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions" (the score
as a bilinear form of feature activations); Elhage et al. 2021 for queries and keys through weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.arguments import whole
from mi_helpers.circuits.edges import Columns, FrozenRun, nodes_of
from mi_helpers.circuits.graphs import Node
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.hooks import EAGER, replaced_attention
from mi_helpers.layouts import ModelError


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """A head's score between two positions, as a table of products; with `against`, less the mean
    of its scores at other keys.

    nodes     the sources, in the order of the table; after the last one stands the bias
    products  (n + 1, n + 1): [query's node, key's node]; their sum is the score
    score     the model's own q · k / √d, before any soft-cap
    """

    nodes: tuple[Node, ...]
    products: Tensor
    score: float

    def gradient(self) -> Tensor:
        """(n,): the change of the score for each node's output times 1 + ε, over ε: the sum of its
        row and of its column."""
        return (self.products.sum(0) + self.products.sum(1))[:-1]

    def top(self, k: int = 10) -> list[tuple[Node | None, Node | None, float]]:
        """The k largest products by amount: (query's node, key's node, product); None is bias."""
        named = [*self.nodes, None]
        flat = self.products.flatten()
        places = flat.abs().topk(min(k, len(flat))).indices.tolist()
        pairs = (divmod(i, len(named)) for i in places)
        return [(named[a], named[b], float(self.products[a, b])) for a, b in pairs]


def qk_attribution(
    local: LocalReplacement,
    layer: int,
    head: int,
    query: int,
    key: int,
    against: Sequence[int] = (),
) -> QKAttribution:
    """Why a head looks from `query` at `key`.

    Args:
        local: the prompt's local replacement model.
        head: a query head of the layer.
        query, key: positions; the key comes first, or is the same.
        against: other positions: the mean of what belongs to them is subtracted, so that what
            raises all scores alike, and changes no attention, falls out.

    Returns:
        score = Σ products; products[a, b] = (q of a) · (k of b) / √d, both rotated.

    Raises:
        ModelError: there is no such layer, head or position, the key comes later, or the model's
            attention has norms of queries and keys of its own.
    """
    model = local.model
    _check(local, layer, head, query, key, *against)
    group = head // (model.n_heads // model.n_kv_heads)
    with torch.no_grad():
        columns, turn = Columns(local), rotations(local, layer)
        q = _read(local, columns, layer, query, ("W_Q", "q", head)) @ turn[query]
        k = _read(local, columns, layer, key, ("W_K", "k", group)) @ turn[key]
        for other in against:
            theirs = _read(local, columns, layer, other, ("W_K", "k", group)) @ turn[other]
            k = k - theirs / len(against)
        seen = _Seen(local, layer)
        with seen.listening():
            model.run_with_cache(local.ids[None], [], layer + 1)
        products = (q @ k.T * seen.scaling).cpu()
    nodes = tuple(nodes_of(local, torch.empty(0, dtype=torch.long)))
    return QKAttribution(nodes, products, float(seen.score(head, query, key, against)))


def score_gradient(
    local: LocalReplacement,
    layer: int,
    head: int,
    query: int,
    key: int,
    against: Sequence[int] = (),
) -> dict[Node, float]:
    """The same as `QKAttribution.gradient`, by autograd through Hugging Face's own modules, with
    norms, patterns below and MLP outputs frozen by hooks: an independent check.

    Returns:
        {node: write · ∂score/∂write}, of the sources below the layer.
    """
    _check(local, layer, head, query, key, *against)
    run, seen, columns = FrozenRun(local, 1), _Seen(local, layer), Columns(local)
    with torch.enable_grad(), seen.listening():
        run.up_to(layer + 1)
        below = [-1, *range(layer)]
        score = seen.score(head, query, key, against)
        grads = torch.autograd.grad(score, [run.leaves[b] for b in below], allow_unused=True)
    edges = local.embed.new_zeros(1, columns.count)
    for b, g in zip(below, grads, strict=True):
        if g is not None:
            columns.embeddings(edges, g) if b == -1 else columns.layer(edges, g, b)
    nodes = nodes_of(local, torch.empty(0, dtype=torch.long))
    kept = zip(nodes, edges[0].tolist(), strict=True)
    return {node: value for node, value in kept if node.layer < layer}


def rotations(local: LocalReplacement, layer: int) -> Tensor:
    """How the layer's attention turns a query or key at each position, (pos, d_head, d_head):
    rotated = x @ rotations[position], read off the model itself; the identity without rotary."""
    model, seen = local.model, _Seen(local, layer)
    basis = torch.eye(model.d_head, device=model.device, dtype=model.dtype)
    stream = torch.zeros(len(basis), local.length, model.d_model).to(basis)
    put = lambda x: basis[:, None, None].expand_as(x)  # noqa: E731
    with torch.no_grad(), seen.listening(), model.hooks({("q", layer): put}):
        model.run_from_layer(stream, layer, stop_at_layer=layer + 1)
    return seen.query[:, 0].transpose(0, 1).float()


class _Seen:
    """What a layer's attention compares: rotated queries and keys, and the scaling."""

    def __init__(self, local: LocalReplacement, layer: int):
        self.model, self.layer = local.model, layer

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, a run leaves its queries and keys here."""
        module = self.model.part("attn", self.layer)

        def keep(eager, module, query, key, value, mask, **kwargs):
            self.query, self.key = query, key
            self.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            return eager(module, query, key, value, mask, **kwargs)

        before = self.model.use_attention(EAGER)
        replaced_attention[module] = keep
        try:
            yield
        finally:
            self.model.use_attention(before)
            replaced_attention.pop(module)

    def score(self, head: int, query: int, key: int, against: Sequence[int]) -> Tensor:
        """A query head's score, before the soft-cap, less the mean of those at other keys."""
        group = head // (self.model.n_heads // self.model.n_kv_heads)
        row = self.key[0, group].float() @ self.query[0, head, query].float() * self.scaling
        return row[key] - row[list(against)].mean() if against else row[key]


def _read(
    local: LocalReplacement, columns: Columns, layer: int, position: int, of: tuple[str, str, int]
) -> Tensor:
    """What each source adds to a head's query or key at a position, before rotary, (sources + 1,
    d_head); the last row is what biases add.

    Args:
        of: the weight's name, the part's, and the head: ("W_Q", "q", 3).
    """
    model, (weight, part, head) = local.model, of
    rows = model.weight(weight, layer)[head].float().T  # (d_head, d_model)
    norm = local.norms["ln1", layer]
    at = torch.full((len(rows),), position, device=rows.device)
    g = rows.new_zeros(len(rows), position + 1, rows.shape[1])
    g[:, position] = norm.backward(rows, at)
    bias = rows.new_zeros(len(rows)) if norm.shift is None else rows @ norm.shift
    if (own := getattr(model.part(part, layer), "bias", None)) is not None:
        bias = bias + model.split_heads(part, own.float())[head]
    edges = rows.new_zeros(len(rows), columns.count)
    for below in reversed(range(layer)):
        columns.layer(edges, g, below)
        g = local.through_block(below, g, bias)
    columns.embeddings(edges, g)
    return torch.cat([edges.T, bias[None]])


def _check(local: LocalReplacement, layer: int, head: int, query: int, *keys: int) -> None:
    """ModelError, in a sentence, where there is nothing to attribute."""
    model = local.model
    whole("layer", layer, 0, model.n_layers - 1)
    whole("head", head, 0, model.n_heads - 1)
    whole("query", query, 0, local.length - 1)
    for key in keys:
        whole("key", key, 0, query)
    if model.layout.q_norm:
        raise ModelError(
            f"{model.name} divides each query and key by its own size, which is not linear: QK "
            "attribution is for models without such norms (Gemma 2, Llama, GPT-2)."
        )
