"""Interventions: change features of a prompt, and run the model on.

    predicted_effect(graph, {"2_57_3": 0})                              # what the graph predicts
    result = intervene(model, coders, prompt, {"2_57_3": 0})            # switch a feature off
    result = intervene(model, coders, prompt, {"2_57_3": -2, "3_9_3": -2})
    result = intervene(model, coders, prompt, {"2_57_3": -1}, values={"2_80_3": 12.0})   # a swap
    result.top(5)                                                       # [(token, before, after)]

A factor multiplies a feature's activation on this prompt: 0 removes the feature, -1 or -2 puts in
the opposite, 2 doubles it. Errors and embeddings can be multiplied, too. `values` sets a feature to
an activation, also a feature that is not active here (one of another prompt).

How far the change spreads:

    "direct"       every MLP writes what it wrote on the prompt, plus the change; norms are frozen.
                   The graph's edges then hold exactly: a check of the graph, not of the model.
    "constrained"  MLPs up to the last changed layer write what they wrote, plus the change; those
                   after it read the changed stream.
    "iterative"    every MLP reads the changed stream; a changed feature is held at its new
                   activation.

Only MLPs and norms of the model itself run: no effect is taken from the graph.

Source: Ameisen et al. 2025, "Validating Attribution Graph Hypotheses with Interventions", and the
appendix on iterative patching.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.arguments import exact, number, shown, whole
from mi_helpers.circuits.graphs import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, Node
from mi_helpers.circuits.replacement import Coders, LocalReplacement, Prompt
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel

ATTENTION = ("frozen", "recomputed")
EFFECTS = ("iterative", "constrained", "direct")

Changes = Mapping[Node | str, float]


def predicted_effect(graph: Graph, factors: Changes, paths: bool = True) -> Tensor:
    """The change of every node's value, (n,), that the graph predicts of an intervention.

    With paths=True, a feature whose value changes by a share of itself passes that share of its
    edges on, down to the logits: exact in the local replacement model while every active feature
    stays active, and no other becomes active.

    Args:
        factors: {node: factor of its output}.
        paths: False counts the nodes' own edges alone.

    Raises:
        ValueError: a node is not in the graph, or is a logit.
    """
    share = torch.zeros(len(graph), dtype=torch.float64)  # of each node's output, how much is added
    fixed = set()
    for node, factor in _given("factors", factors).items():
        i = graph.index(node)
        if graph.nodes[i].kind == LOGIT:
            raise ValueError(f"{graph.nodes[i].id} is a logit: it writes to no other node.")
        fixed.add(i)
        share[i] = _finite(graph.nodes[i], factor) - 1.0
    edges = exact(graph.adjacency)
    if not paths:
        return (edges @ share).to(graph.values)
    change = torch.zeros_like(share)
    for i, node in enumerate(graph.nodes):
        if node.kind in (FEATURE, LOGIT):
            change[i] = edges[i, :i] @ share[:i]
            if node.kind == FEATURE and i not in fixed:
                share[i] = change[i] / exact(graph.values[i])
    return change.to(graph.values)


@dataclass(frozen=True, eq=False)
class Intervention:
    """The effect of an intervention at the last position.

    logits_before, logits_after      (d_vocab,), the model's own
    uncapped_before, uncapped_after  (d_vocab,), before the final soft-cap, where there is one
    features_before, features_after  {layer: (pos, d_latent)}: the transcoders' activations; a
                                     changed feature has its new one
    """

    model: LanguageModel
    prompt: str | list | Tensor
    logits_before: Tensor
    logits_after: Tensor
    uncapped_before: Tensor
    uncapped_after: Tensor
    features_before: dict[int, Tensor]
    features_after: dict[int, Tensor]

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """(before, after), (d_vocab,) each."""
        return torch.softmax(self.logits_before, -1), torch.softmax(self.logits_after, -1)

    def top(self, k: int = 5) -> list[tuple[str, float, float]]:
        """(text, probability before, after) of the k likeliest tokens before and the k likeliest
        after, each once, the likeliest after first."""
        before, after = self.probabilities()
        k = whole("k", k, 1, len(before))
        ids = torch.cat([after.topk(k).indices, before.topk(k).indices]).unique()
        ids = ids[after[ids].argsort(descending=True)]
        texts = self.model.str_tokens(ids) if self.model.tokenizer else map(str, ids.tolist())
        return list(zip(texts, before[ids].tolist(), after[ids].tolist(), strict=True))

    def feature(self, node: Node | str) -> tuple[float, float]:
        """A feature's activation before and after; ModelError for what is no feature here."""
        if isinstance(node, str):
            node = Node.parse(node, self.model.n_layers)
        if not isinstance(node, Node) or node.kind != FEATURE:
            raise ModelError(f"{shown(getattr(node, 'id', node))} is no feature: name one.")
        shape = self.features_before[node.layer].shape if node.layer in self.features_before else ()
        if not shape or not (node.position < shape[0] and 0 <= node.index < shape[1]):
            raise ModelError(f"{node.id} is not among this prompt's features: {tuple(shape)}.")
        before, after = self.features_before[node.layer], self.features_after[node.layer]
        return float(before[node.position, node.index]), float(after[node.position, node.index])

    def kl(self) -> float:
        """KL(before ‖ after) of the next token, in nats."""
        before, after = (torch.log_softmax(x, -1) for x in (self.logits_before, self.logits_after))
        return float((before.exp() * (before - after)).sum())


@dataclass(frozen=True)
class _Change:
    """The changes in one layer: features {(position, latent): new activation}, and errors
    {position: vector that is added}."""

    features: dict[tuple[int, int], float]
    errors: dict[int, Tensor]


@torch.no_grad()
def intervene(
    model: LanguageModel,
    coders: Coders,
    prompt: Prompt,
    factors: Changes | None = None,
    *,
    values: Changes | None = None,
    attention: str = "frozen",
    effects: str = "iterative",
) -> Intervention:
    """Run the prompt with some features changed; see the module's docstring.

    Args:
        coders: as in `attribution_graph`.
        factors: {node or its name: factor}, for features, errors and embeddings.
        values: {feature or its name: activation}.
        attention: "frozen" keeps the prompt's attention patterns; "recomputed" computes them anew.
        effects: one of "iterative", "constrained", "direct".

    Raises:
        ModelError: an unknown choice; a node that this prompt does not have, or given twice; a
            factor for a feature that is not active.
    """
    if attention not in ATTENTION or effects not in EFFECTS:
        raise ModelError(
            f"Attention is {' or '.join(ATTENTION)}, effects are {', '.join(EFFECTS)}; not "
            f"{attention!r} and {effects!r}."
        )
    if effects == "direct" and attention != "frozen":
        raise ModelError("Direct effects are those of frozen attention: pass attention='frozen'.")
    local = LocalReplacement(model, coders, prompt, bos_is_bias=False)
    before = {layer: coder.encode(local.inputs[layer]) for layer, coder in local.coders.items()}
    given = _given("factors", factors or {}), _given("values", values or {})
    changes, embedding = _read_changes(local, before, *given)
    run = _ChangedRun(local, before, changes, embedding, attention, effects)
    logits, uncapped = run.run()
    return Intervention(
        model, prompt, local.logits, logits, local.uncapped, uncapped, before, run.after
    )


def _read_changes(
    local: LocalReplacement, f: Mapping[int, Tensor], factors: Changes, values: Changes
) -> tuple[dict[int, _Change], Tensor]:
    """({layer: change}, vectors that are added to the embeddings, (pos, d_model))."""
    changes: dict[int, _Change] = defaultdict(lambda: _Change({}, {}))
    embedding, seen = torch.zeros_like(local.embed), set()
    for is_factor, given in ((True, factors), (False, values)):
        for name, change in given.items():
            node = _checked(local, name)
            by = _finite(node, change)
            if node.kind != FEATURE and node.id in seen:
                raise ModelError(f"{node.id} is given twice: give it one factor.")
            seen.add(node.id)
            old = None
            if node.kind == FEATURE:
                old = float(f[node.layer][node.position, node.index])
            if not is_factor and node.kind != FEATURE:
                raise ModelError(f"{node.id} is no feature: it takes a factor, not a value.")
            if is_factor and old == 0:
                raise ModelError(
                    f"The feature {node.id} is not active on this prompt, so no factor changes it: "
                    "put it in with values={...: activation}."
                )
            if node.kind == EMBEDDING:
                embedding[node.position] += (by - 1) * local.embed[node.position]
            elif node.kind == ERROR:
                error = local.errors[node.layer, node.position]
                changes[node.layer].errors[node.position] = (by - 1) * error
            else:
                place, held = (node.position, node.index), changes[node.layer].features
                if place in held:
                    raise ModelError(f"The feature {node.id} has a factor and a value: give one.")
                held[place] = by * old if is_factor else by
    return dict(changes), embedding


def _checked(local: LocalReplacement, name: Node | str) -> Node:
    """The node of that name; ModelError when this prompt cannot have it."""
    model = local.model
    try:
        node = Node.parse(name, model.n_layers) if isinstance(name, str) else name
    except ValueError as error:
        raise ModelError(str(error)) from None
    if not isinstance(node, Node):
        raise ModelError(f"{shown(name)} is no node: give one, or its name such as '2_57_3'.")
    if node.kind not in (EMBEDDING, FEATURE, ERROR):
        raise ModelError(f"{node.id} is a logit: change what leads to it.")
    if node.position >= local.length:
        raise ModelError(
            f"{node.id} is at position {node.position}, and the prompt has {local.length} tokens."
        )
    if node.kind == EMBEDDING and node.index != int(local.ids[node.position]):
        raise ModelError(
            f"{node.id} is not the token at position {node.position}: that is "
            f"{int(local.ids[node.position])}."
        )
    if node.kind == FEATURE:
        if node.layer not in local.coders:
            raise ModelError(f"{node.id} is in layer {node.layer}, which has no transcoder.")
        count = local.coders[node.layer].W_dec.shape[0]
        if not 0 <= node.index < count:
            raise ModelError(f"{node.id} is latent {node.index}, and the transcoder has {count}.")
    return node


def _given(what: str, changes: Changes) -> Changes:
    """Changes, once they are {node: number}."""
    if not isinstance(changes, Mapping):
        raise ModelError(f"{what} is {shown(changes)}: expected {{node or its name: number}}.")
    return changes


def _finite(node: Node, by: float | Tensor) -> float:
    """What a node is multiplied by, or set to, once it is one number that float32 holds."""
    by = by.item() if isinstance(by, Tensor) and by.numel() == 1 else by
    most = torch.finfo(torch.float32).max
    return number(f"The change of {node.id}", by, -most, most)


class _ChangedRun:
    """A run of the model with changes, which hooks make."""

    def __init__(self, local, before, changes, embedding, attention, effects):
        self.local, self.before, self.changes, self.embedding = local, before, changes, embedding
        self.attention, self.effects = attention, effects
        last = max(changes, default=-1)
        layers = range(local.model.n_layers)
        # the layers whose MLP writes what it wrote, plus the change
        self.held = {"direct": layers, "constrained": range(last + 1), "iterative": ()}[effects]
        self.after: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}

    def run(self) -> tuple[Tensor, Tensor]:
        """(logits, logits before the soft-cap) at the last position, (d_vocab,) each."""
        local, model, head = self.local, self.local.model, []
        hooks: dict = {("resid_pre", 0): lambda x: x + self.embedding.to(x)}
        for layer in range(model.n_layers):
            hooks["mlp_out", layer] = self._write(layer)
            if self.attention == "frozen":
                hooks["pattern", layer] = lambda x, i=layer: local.patterns[i][None].to(x)
        with ExitStack() as undo, model.hooks(hooks):
            for key, module in local.norm_modules():
                undo.callback(module.register_forward_hook(self._norm(key)).remove)
            listen = model.lm_head.register_forward_hook(lambda _m, _a, out: head.append(out))
            undo.callback(listen.remove)
            logits = model.forward(local.ids[None])
        return logits[0, -1].float(), head[0][0, -1].float()

    def _norm(self, key: tuple) -> Callable:
        """A hook that keeps what the transcoder reads; with direct effects it freezes the norm."""
        part, layer = key
        local = self.local

        def hook(module, args, out: Tensor) -> Tensor | None:
            direct = self.effects == "direct"
            if part == "ln2" and layer in local.coders:
                norm = local.norms[key] if direct else type(local.norms[key]).of(module, args[0][0])
                norm = norm if local.reads[layer] == "mlp_in" else norm.without_gain()
                self.read[layer] = norm(args[0][0])
            return local.norms[key](args[0]).to(out) if direct else None

        return hook

    def _write(self, layer: int) -> Callable:
        """A hook that gives what the layer's MLP writes instead."""
        local = self.local
        change = self.changes.get(layer, _Change({}, {}))

        def hook(mlp_out: Tensor) -> Tensor:
            out = mlp_out[0].float()
            now = None
            if layer in local.coders:
                now = local.coders[layer].encode(self.read[layer])
            if layer in self.held:
                out = local.mlp_out[layer].clone()
                if layer in local.coders:  # the skip path is linear, and passes
                    out += local.skip(layer, self.read[layer] - local.inputs[layer])
            base = self.before.get(layer) if layer in self.held else now
            for (position, latent), value in change.features.items():
                row = local.coders[layer].W_dec[latent].float()
                out[position] += (value - base[position, latent].float()) * row
                now[position, latent] = value
            for position, added in change.errors.items():
                out[position] += added
            if now is not None:
                self.after[layer] = now
            return out[None].to(mlp_out)

        return hook
