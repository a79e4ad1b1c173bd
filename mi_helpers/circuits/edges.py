"""Edges of an attribution graph: what each source adds to each target, every part accounted for.

    graph = attribution_graph(model, coders, "the capital of the country of the Colosseum is")
    graph.edge_error.absolute                             # max |Σ edges + bias - value|

In the local replacement model (`mi_helpers.circuits.replacement`) a target is linear in what its
sources wrote, so an edge is a source's vector times the target's gradient there.
`edges_closed_form` takes the gradient through the transposed maps of the frozen model,
`edges_by_backward` by autograd through the model's own modules: slower, and an independent check.
A logit counts less the mean of all logits, which changes no probability.

Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models",
section "Constructing an Attribution Graph".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mi_helpers.circuits.graphs import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, Node
from mi_helpers.circuits.replacement import Coders, LocalReplacement, Prompt
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel

MASS, MOST_LOGITS = 0.95, 10  # logit nodes: the likeliest tokens up to this mass or this number
MOST_NODES = 20_000  # of one graph: its edges are then 1.6 GB, for a moment thrice that
MOST_NUMBERS = 2**24  # in the gradient of one chunk of targets: 64 MB, a few of which exist
CHUNKS = 6  # of a layer's features, at least: early ones need no gradient at later positions

# ----------------------------------------------------------------------------------------- edges


class Columns:
    """The place of each source among the sources: embeddings, then layer by layer the features and
    the errors."""

    def __init__(self, local: LocalReplacement):
        self.local, self.features, self.errors = local, {}, {}
        end = local.length
        for layer in range(local.model.n_layers):
            count = len(local.features.get(layer, ()))
            self.features[layer] = slice(end, end + count)
            end += count
            self.errors[layer] = slice(end, end + local.length - local.first)
            end = self.errors[layer].stop
        self.count = end
        self.at = {layer: active.at(local.length) for layer, active in local.features.items()}

    def embeddings(self, edges: Tensor, g: Tensor) -> None:
        """Edges from the embeddings, given g (batch, n, d_model) at the stream before block 0."""
        n = g.shape[1]
        edges[:, :n] = torch.einsum("bpd,pd->bp", g, self.local.embed[:n])

    def layer(self, edges: Tensor, g: Tensor, layer: int) -> None:
        """Edges from a layer's features and errors, given g at the stream after its block."""
        local, n = self.local, g.shape[1]
        start = self.features[layer].start
        for position, these in enumerate(self.at.get(layer, ())[:n]):
            if these.start < these.stop:
                columns = slice(start + these.start, start + these.stop)
                edges[:, columns] = g[:, position] @ local.features[layer].writes[these].T
        first, start = local.first, self.errors[layer].start
        if n > first:
            errors = local.errors[layer, first:n]
            edges[:, start : start + n - first] = torch.einsum("bpd,pd->bp", g[:, first:], errors)


@torch.no_grad()
def edges_closed_form(
    local: LocalReplacement, columns: Columns, layer: int, positions: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Edges into targets (batch, sources), and what biases add to them (batch,).

    Target j is vectors[j] · (what `layer`'s transcoder reads at positions[j]); with
    layer = n_layers, vectors[j] · (the final norm's output). Its gradient goes down block by block,
    and is multiplied by the sources' vectors on the way.
    """
    g, bias = local.target_gradients(layer, positions, vectors)
    edges = g.new_zeros(len(g), columns.count)
    if layer < local.model.n_layers and not local.model.parallel:
        g = local.through_attention(layer, g, bias)
    for below in reversed(range(layer)):
        columns.layer(edges, g, below)
        g = local.through_block(below, g, bias)
    columns.embeddings(edges, g)
    return edges, bias


def edges_by_backward(
    local: LocalReplacement, columns: Columns, layer: int, positions: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `edges_closed_form`, by autograd through Hugging Face's own modules.

    Hooks put in the frozen norms, patterns and MLP outputs, and the prompt is run once for every
    target.
    """
    run = FrozenRun(local, len(positions))
    with torch.enable_grad():
        run.up_to(min(layer + 1, local.model.n_layers))
        read = run.seen[layer][torch.arange(len(positions), device=positions.device), positions]
        values = (read * vectors).sum(-1)
        below = [-1, *range(layer)]
        leaves = [run.leaves[b] for b in below]
        grads = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    edges = values.new_zeros(len(positions), columns.count)
    for b, g in zip(below, grads, strict=True):
        if g is not None and b == -1:
            columns.embeddings(edges, g)
        elif g is not None:
            columns.layer(edges, g, b)
    return edges, (values - edges.sum(1)).detach()


class FrozenRun:
    """A run of a batch of copies of the prompt, frozen by hooks, with leaves for its gradients.

    leaves  {layer: what its MLP writes, its skip path aside; -1: the embeddings}
    seen    {layer: what its transcoder reads; n_layers: the final norm's output}
    Each is (batch, pos, d_model).
    """

    def __init__(self, local: LocalReplacement, batch: int):
        self.local, self.batch = local, batch
        self.leaves: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}

    def up_to(self, stop: int) -> None:
        """Run all blocks before `stop`."""
        local, model = self.local, self.local.model
        hooks: dict = {("resid_pre", 0): lambda _x: self._leaf(-1, local.embed)}
        for layer in range(model.n_layers):
            pattern = local.patterns[layer].expand(self.batch, -1, -1, -1)
            hooks["pattern", layer] = lambda _x, pattern=pattern: pattern
            hooks["mlp_out", layer] = lambda _x, layer=layer: self._write(layer)
        with ExitStack() as undo, model.hooks(hooks):
            for key, module in local.norm_modules():
                undo.callback(module.register_forward_hook(self._norm(key)).remove)
            model.run_with_cache(local.ids.expand(self.batch, -1), [], stop)

    def _leaf(self, key: int, x: Tensor) -> Tensor:
        self.leaves[key] = x.expand(self.batch, -1, -1).clone().requires_grad_()
        return self.leaves[key]

    def _write(self, layer: int) -> Tensor:
        local = self.local
        if layer not in local.coders:
            return self._leaf(layer, local.mlp_out[layer])
        skipped = local.skip(layer, local.inputs[layer])
        return self._leaf(layer, local.mlp_out[layer] - skipped) + local.skip(
            layer, self.seen[layer]
        )

    def _norm(self, key: tuple) -> Callable:
        part, layer = key
        local = self.local

        def hook(_module, args, _out) -> Tensor:
            out = local.norms[key](args[0])
            if part == "ln2" and layer in local.readers:
                self.seen[layer] = local.readers[layer](args[0])
            if part == "ln_final":
                self.seen[local.model.n_layers] = out
            return out.to(args[0].dtype)

        return hook


METHODS = {"closed form": edges_closed_form, "backward": edges_by_backward}


# ------------------------------------------------------------------------------------- the graph


@torch.no_grad()
def attribution_graph(
    model: LanguageModel,
    coders: Coders,
    prompt: Prompt,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    max_features: int | None = None,
    bos_is_bias: bool = True,
    method: str = "closed form",
) -> Graph:
    """The attribution graph of a prompt's next token.

    Nodes are embeddings, active features, errors and logits. For a feature or a logit, value =
    Σ incoming edges + bias, to about 1e-6 in float32 (load a bfloat16 model in float32).

    Args:
        coders: a transcoder for each layer: a list, {layer: transcoder} or `Transcoders`.
        targets: the tokens whose logits are nodes, texts or ids; see `pick_logits`.
        max_features: keep that many, those with the largest effect on the logits; what the others
            write becomes error (`LocalReplacement.fold`), so edges still sum.
        bos_is_bias: False makes nodes of a `<bos>`'s features and errors, too.
        method: one of `METHODS`.

    Raises:
        ModelError: transcoders, targets or prompt do not fit; there are too many nodes.
    """
    if method not in METHODS:
        raise ModelError(f"The method is one of {', '.join(METHODS)}, not {method!r}.")
    if max_features is not None and max_features < 1:
        raise ModelError(f"max_features is {max_features}: keep 1 feature or more.")
    local = LocalReplacement(model, coders, prompt, bos_is_bias)
    ids = pick_logits(model, local.logits, targets)
    p, value = torch.softmax(local.logits, -1)[ids], (local.uncapped - local.uncapped.mean())[ids]
    vectors, logit_bias = logit_vectors(model, ids)
    if max_features is not None:
        local.fold(max_features, vectors, p)
    adjacency, bias = _edges(local, vectors, logit_bias, METHODS[method])
    return Graph(
        _prompt_text(model, prompt, local.ids),
        tuple(_texts(model, local.ids)),
        tuple(nodes_of(local, ids)),
        adjacency,
        bias,
        _values(local, value),
        p.cpu(),
        model.n_layers,
        model=model.name,
        target_names=tuple(_texts(model, ids)),
        settings={"features": sum(map(len, local.features.values()))},
    )


def pick_logits(
    model: LanguageModel, logits: Tensor, targets: Sequence[str | int] | str | int | None = None
) -> Tensor:
    """The token ids that become logit nodes: the targets in their order, or without targets the
    likeliest tokens up to a probability of 0.95 in all, 10 at most, the likeliest first.

    Raises:
        ModelError: a target is several tokens, or not in the vocabulary, or named twice.
    """
    if targets is None:
        p, order = torch.softmax(logits, -1).topk(min(MOST_LOGITS, len(logits)))
        return order[: int((p.cumsum(0) < MASS).sum()) + 1]
    targets = [targets] if isinstance(targets, str | int) else list(targets)
    ids = [model.to_single_token(t) if isinstance(t, str) else int(t) for t in targets]
    outside = [i for i in ids if not 0 <= i < model.d_vocab]
    if outside or not ids or len(set(ids)) < len(ids):
        raise ModelError(
            f"The targets are the tokens {ids}: name at least one, each once, from 0 to "
            f"{model.d_vocab - 1}."
        )
    return torch.tensor(ids, device=logits.device)


def logit_vectors(model: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(targets, d_model), whose product with the final norm's output is the logits less the mean of
    all logits; and (targets,), what the unembedding's bias adds to that."""
    W, bias = model.lm_head.weight, getattr(model.lm_head, "bias", None)
    mean = sum(part.float().sum(0) for part in W.split(2**14)) / len(W)
    vectors = W[ids].float() - mean
    if bias is None:
        return vectors, torch.zeros(len(ids), device=W.device)
    return vectors, (bias[ids] - bias.mean()).float()


def _edges(
    local: LocalReplacement, vectors: Tensor, logit_bias: Tensor, edges_into: Callable
) -> tuple[Tensor, Tensor]:
    """Edges (n, n) between all nodes and biases (n,), on the CPU."""
    columns = Columns(local)
    n = columns.count + len(vectors)
    if n > MOST_NODES:
        raise ModelError(
            f"The graph would have {n} nodes and {n * n * 4 / 1e9:.0f} GB of edges: shorten the "
            f"prompt, or pass max_features={MOST_NODES // 3}."
        )
    adjacency, bias = torch.zeros(n, n), torch.zeros(n)
    for rows, *target in _targets(local, columns, vectors):
        edges, constant = edges_into(local, columns, *target)
        adjacency[rows, : columns.count] = edges.cpu()
        bias[rows] = constant.cpu()
    for layer, active in local.features.items():
        own = local.coders[layer].b_enc[active.latents]
        bias[columns.features[layer]] += own.detach().float().cpu()
    bias[columns.count :] += logit_bias.cpu()
    return adjacency, bias


def _targets(
    local: LocalReplacement, columns: Columns, vectors: Tensor
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """(rows of the adjacency, layer, positions, vectors) of all features and then the logits, in
    chunks whose gradients stay within `MOST_NUMBERS`. A layer's features are in the order of their
    positions, and a chunk's gradients end with its last."""
    model = local.model
    width = max(model.d_model, model.n_heads * model.d_head)
    size = max(1, MOST_NUMBERS // (local.length * width))
    for layer, active in local.features.items():
        start, coder = columns.features[layer].start, local.coders[layer]
        some = max(1, min(size, -(-len(active) // CHUNKS)))
        for low in range(0, len(active), some):
            high = min(low + some, len(active))
            rows = coder.W_enc[:, active.latents[low:high]].detach().float().T
            yield slice(start + low, start + high), layer, active.positions[low:high], rows
    last = torch.full((len(vectors),), local.length - 1, device=vectors.device)
    for low in range(0, len(vectors), size):
        high = min(low + size, len(vectors))
        rows = slice(columns.count + low, columns.count + high)
        yield rows, model.n_layers, last[low:high], vectors[low:high]


def nodes_of(local: LocalReplacement, ids: Tensor) -> list[Node]:
    """The nodes, in the order of the columns, and then the logits."""
    nodes = [Node(EMBEDDING, -1, i, token) for i, token in enumerate(local.ids.tolist())]
    for layer in range(local.model.n_layers):
        if layer in local.features:
            active = local.features[layer]
            places = zip(active.positions.tolist(), active.latents.tolist(), strict=True)
            nodes += [Node(FEATURE, layer, position, latent) for position, latent in places]
        nodes += [Node(ERROR, layer, position) for position in range(local.first, local.length)]
    last, L = local.length - 1, local.model.n_layers
    return nodes + [Node(LOGIT, L, last, token) for token in ids.tolist()]


def _values(local: LocalReplacement, logits: Tensor) -> Tensor:
    """Each node's value, in the order of the nodes."""
    values = [local.embed.norm(dim=-1)]
    for layer in range(local.model.n_layers):
        if layer in local.features:
            values.append(local.features[layer].values)
        values.append(local.errors[layer, local.first :].norm(dim=-1))
    return torch.cat([*values, logits]).cpu()


def _texts(model: LanguageModel, ids: Tensor) -> list[str]:
    """Each token as text, or its number where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(i) for i in ids.tolist()]
    return model.str_tokens(ids)


def _prompt_text(model: LanguageModel, prompt: Prompt, ids: Tensor) -> str:
    """The prompt as text."""
    if isinstance(prompt, str):
        return prompt
    start = 1 if model.tokenizer and int(ids[0]) == model.tokenizer.bos_token_id else 0
    return "".join(_texts(model, ids[start:] if len(ids) > start else ids))
