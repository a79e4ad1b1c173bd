"""Attribution graphs: nodes, edges, influence, pruning, scores, supernodes, and their JSON.

    graph = attribution_graph(model, coders, prompt)       # mi_helpers.circuits.replacement builds it
    graph.incoming(" Paris")                               # the strongest edges into a logit
    small = prune(graph)                                   # what carries 80 % of the influence
    replacement, completeness = graph_scores(graph)
    save_graph(small, "paris.json")                        # the format of the field's viewers

A node is named as those viewers name it: "E_812_3" an embedding (token 812 at position 3),
"2_57_3" a feature (layer 2, latent 57, position 3), "2_-1_3" the error of layer 2 at position 3,
"7_91_9" a logit (of a model with 6 layers: token 91, position 9).

Definitions follow Ameisen and others, "Circuit Tracing: Revealing Computational Graphs in Language
Models" (2025): sections "Constructing an Attribution Graph", "Attribution Graph Evaluation", and
the appendix on pruning, with its pseudocode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from mi_helpers.files import read_json, write_json

EMBEDDING, FEATURE, ERROR, LOGIT = KINDS = ("embedding", "feature", "error", "logit")
FILE_KINDS = {
    EMBEDDING: "embedding",
    FEATURE: "cross layer transcoder",
    ERROR: "mlp reconstruction error",
    LOGIT: "logit",
}

# ---------------------------------------------------------------------------------------- nodes


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    kind      "embedding", "feature", "error" or "logit"
    layer     -1 for embeddings, n_layers for logits
    position  of the token
    index     the latent of a feature, the token id of an embedding or a logit, -1 for an error
    """

    kind: str
    layer: int
    position: int
    index: int = -1

    @property
    def id(self) -> str:
        """The name that the field's viewers give it, "2_57_3"; see the module's docstring."""
        layer = {EMBEDDING: "E", LOGIT: self.layer + 1}.get(self.kind, self.layer)
        return f"{layer}_{self.index}_{self.position}"

    @classmethod
    def parse(cls, name: str, n_layers: int) -> Node:
        """The node of that name, in a model of n_layers.

        Raises:
            ValueError: it is no node's name.
        """
        parts = name.split("_") if isinstance(name, str) else ()
        try:
            first, index, position = parts
            layer, index, position = (-1 if first == "E" else int(first)), int(index), int(position)
        except ValueError:
            raise ValueError(
                f"{name!r} is no node's name: 'layer_latent_position' is one, such as '2_57_3', "
                "with -1 as the latent for an error, and E as the layer for an embedding."
            ) from None
        if not (first == "E" or 0 <= layer < n_layers or layer == n_layers + 1) or position < 0:
            raise ValueError(
                f"There is no node {name!r}: layers go from 0 to {n_layers - 1}, and positions "
                "from 0."
            )
        if first == "E":
            return cls(EMBEDDING, -1, position, index)
        if layer == n_layers + 1:
            return cls(LOGIT, n_layers, position, index)
        return cls(ERROR if index == -1 else FEATURE, layer, position, index)


@dataclass(frozen=True)
class EdgeError:
    """How far incoming edges + bias are from what they should sum to, at worst over all nodes.

    absolute  max |Σ edges + bias - value|
    relative  the same, each over the |value| of its node
    scaled    the same, each over the sum of |edges| and |bias|: what rounding is measured against
    """

    absolute: float
    relative: float
    scaled: float


# ---------------------------------------------------------------------------------------- graphs


@dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph of one prompt: who contributes how much to whom, linearly.

    nodes          n of them, in an order in which every edge goes from an earlier to a later one
    adjacency      (n, n); adjacency[target, source] is the edge: what the source adds to the
                   target's value
    bias           (n,): what biases add to it; value = Σ edges + bias in a whole graph
    values         (n,): a feature's pre-activation, which is its activation as it is active; a
                   logit less the mean of all logits, before any soft-cap; of embeddings and errors
                   the norm of the vector
    probabilities  (logits,): the model's own for its logit nodes, which come last
    influence      (n,): on the logits, over all paths of the whole graph (`node_influence`)
    cumulative     (n,): the share of influence of this node and of all that have more
    missing        (n,): Σ |edges| into the node that pruning took away; 0 in a whole graph
    edge_error     how exactly edges sum; None after pruning or loading
    labels         {node name: words}
    supernodes     {words: node names}
    settings       what it was made with
    """

    prompt: str
    tokens: tuple[str, ...]
    nodes: tuple[Node, ...]
    adjacency: Tensor
    bias: Tensor
    values: Tensor
    probabilities: Tensor
    n_layers: int
    influence: Tensor
    cumulative: Tensor
    missing: Tensor
    model: str = ""
    target_names: tuple[str, ...] = ()
    edge_error: EdgeError | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int(self.mask(kind).sum())} {kind}s" for kind in KINDS)
        return f"Graph({self.prompt!r}: {counts}, {int((self.adjacency != 0).sum())} edges)"

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def _place(self) -> dict[str, int]:
        """Where a node is: by its name, and a logit also by its token's text."""
        logits = self.nodes[len(self.nodes) - len(self.probabilities) :]
        texts = {text: node.id for text, node in zip(self.target_names, logits, strict=False)}
        places = {node.id: i for i, node in enumerate(self.nodes)}
        return {text: places[name] for text, name in texts.items()} | places

    @cached_property
    def _kinds(self) -> Tensor:
        return torch.tensor([KINDS.index(node.kind) for node in self.nodes], dtype=torch.int8)

    def index(self, node: Node | str | int) -> int:
        """Where a node stands in `nodes`: given itself, its name, a logit's text, or its place.

        Raises:
            ValueError: it is not in this graph.
        """
        if isinstance(node, int):
            if not -len(self.nodes) <= node < len(self.nodes):
                raise ValueError(f"There is no node {node}: the graph has {len(self.nodes)}.")
            return node % len(self.nodes)
        name = node.id if isinstance(node, Node) else node
        if name not in self._place:
            raise ValueError(
                f"There is no node {name!r} in the graph of {self.prompt!r}: a feature has to be "
                "active there, and pruning takes nodes away."
            )
        return self._place[name]

    def mask(self, kind: str) -> Tensor:
        """(n,), True at the nodes of that kind."""
        return self._kinds == KINDS.index(kind)

    def features(self) -> list[Node]:
        """The feature nodes, those with the most influence first."""
        order = self.influence.argsort(descending=True, stable=True).tolist()
        return [self.nodes[i] for i in order if self.nodes[i].kind == FEATURE]

    def value(self, node: Node | str | int) -> float:
        """A feature's activation, a logit's value; see `values`."""
        return float(self.values[self.index(node)])

    def edge(self, source: Node | str | int, target: Node | str | int) -> float:
        """What the source adds to the target's value, directly."""
        return float(self.adjacency[self.index(target), self.index(source)])

    def incoming(self, node: Node | str | int, k: int = 10) -> list[tuple[Node, float]]:
        """The k strongest edges into a node: (source, weight), by |weight|."""
        return self._strongest(self.adjacency[self.index(node)], k)

    def outgoing(self, node: Node | str | int, k: int = 10) -> list[tuple[Node, float]]:
        """The k strongest edges out of a node: (target, weight), by |weight|."""
        return self._strongest(self.adjacency[:, self.index(node)], k)

    def _strongest(self, weights: Tensor, k: int) -> list[tuple[Node, float]]:
        places = weights.abs().topk(min(k, len(weights))).indices.tolist()
        return [(self.nodes[i], float(weights[i])) for i in places if weights[i] != 0]

    def describe(self, node: Node | str | int) -> str:
        """A node in words: its label, or "Tower" at 3, "L2 latent 57 at 3", "output Paris"."""
        node = self.nodes[self.index(node)]
        if node.id in self.labels:
            return self.labels[node.id]
        if node.kind == EMBEDDING:
            return f"{self.tokens[node.position]!r} at {node.position}"
        if node.kind == FEATURE:
            return f"L{node.layer} latent {node.index} at {node.position}"
        if node.kind == ERROR:
            return f"L{node.layer} error at {node.position}"
        i = self.index(node) - (len(self.nodes) - len(self.probabilities))
        return f"output {self.target_names[i]!r}"

    def label(self, labels: Mapping) -> Graph:
        """The graph with words for some nodes: {node or node name: words}, or, for a latent at
        every position, {(layer, latent): words}. Names that are not in the graph are left out."""
        latents = {key: text for key, text in labels.items() if isinstance(key, tuple)}
        names = {
            (key.id if isinstance(key, Node) else key): text
            for key, text in labels.items()
            if not isinstance(key, tuple)
        }
        own = dict(self.labels)
        for node in self.nodes:
            text = names.get(node.id)
            if text is None and node.kind == FEATURE:
                text = latents.get((node.layer, node.index))
            if text is not None:
                own[node.id] = text
        return replace(self, labels=own)

    def subgraph(self, keep: Tensor, adjacency: Tensor | None = None) -> Graph:
        """The nodes where keep (n,) is True, with these edges (n, n) or all that there are.

        Influence stays that of the whole graph; what comes from edges and nodes that are gone is
        counted in `missing`.
        """
        adjacency = self.adjacency if adjacency is None else adjacency
        kept = adjacency[keep][:, keep]
        missing = self.missing[keep] + self.adjacency[keep].abs().sum(1) - kept.abs().sum(1)
        places = keep.nonzero()[:, 0].tolist()
        last = len(self.nodes) - len(self.probabilities)
        names = {self.nodes[i].id for i in places}
        groups = {
            text: tuple(n for n in ids if n in names) for text, ids in self.supernodes.items()
        }
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in places),
            adjacency=kept,
            **{f: getattr(self, f)[keep] for f in ("bias", "values", "influence", "cumulative")},
            missing=missing.clamp(min=0),
            probabilities=self.probabilities[keep[last:]],
            target_names=tuple(self.target_names[i - last] for i in places if i >= last),
            edge_error=None,
            labels={n: text for n, text in self.labels.items() if n in names},
            supernodes={text: ids for text, ids in groups.items() if ids},
        )


def make_graph(
    prompt: str,
    tokens: Sequence[str],
    nodes: Sequence[Node],
    adjacency: Tensor,
    bias: Tensor,
    values: Tensor,
    probabilities: Tensor,
    n_layers: int,
    **others,
) -> Graph:
    """A whole graph: checks the order of the nodes, measures edge errors and influence."""
    check_order(adjacency)
    targets = torch.tensor([node.kind in (FEATURE, LOGIT) for node in nodes], dtype=torch.bool)
    influence = node_influence(adjacency, probabilities)
    return Graph(
        prompt,
        tuple(tokens),
        tuple(nodes),
        adjacency,
        bias,
        values,
        probabilities,
        n_layers,
        influence,
        cumulative_influence(influence),
        torch.zeros_like(bias),
        edge_error=edge_error(adjacency, bias, values, targets),
        **others,
    )


def check_order(adjacency: Tensor) -> None:
    """ValueError unless every edge goes from an earlier node to a later one."""
    n = len(adjacency)
    if adjacency.shape != (n, n) or bool(adjacency.triu().any()):
        raise ValueError(
            f"The edges {tuple(adjacency.shape)} have to be a square matrix [target, source] with "
            "nothing on or above its diagonal: order the nodes so that sources come first."
        )


def edge_error(adjacency: Tensor, bias: Tensor, values: Tensor, targets: Tensor) -> EdgeError:
    """The error of value = Σ edges + bias over the nodes where `targets` is True."""
    if not targets.any():
        return EdgeError(0.0, 0.0, 0.0)
    values = values.double()[targets]
    sums = (adjacency.sum(1, dtype=torch.float64) + bias)[targets]
    size = (torch.linalg.vector_norm(adjacency, 1, dim=1).double() + bias.abs())[targets]
    gap = (sums - values).abs()
    return EdgeError(
        float(gap.max()),
        float((gap / values.abs().clamp(min=1e-12)).max()),
        float((gap / size.clamp(min=1e-12)).max()),
    )


# ------------------------------------------------------------------------------------- influence


def normalised(adjacency: Tensor, missing: Tensor | None = None) -> Tensor:
    """|edges| (n, n), the incoming ones of each node summing to 1, or to 0 where it has none.

    missing: (n,), |edges| that pruning took away: they count in the sum.
    """
    size = adjacency.abs()
    total = size.sum(1) if missing is None else size.sum(1) + missing
    return size.div_(torch.where(total > 0, total, 1.0)[:, None])


def _total(A: Tensor, weights: Tensor) -> Tensor:
    """weights (I - A)^-1, (n,), for A with nothing on or above its diagonal; A is overwritten."""
    # the solver takes the diagonal for 1 and does not look at it: -A stands for I - A
    solved = torch.linalg.solve_triangular(
        A.neg_().T, weights[:, None], upper=True, unitriangular=True
    )
    return solved[:, 0]


def logit_weights(n: int, probabilities: Tensor) -> Tensor:
    """(n,): the logit nodes' probabilities over their sum, 0 at the other nodes."""
    p = probabilities.double().clamp(min=1e-30)
    return F.pad((p / p.sum()).to(probabilities.dtype), (n - len(p), 0))


def node_influence(adjacency: Tensor, probabilities: Tensor, missing: Tensor | None = None):
    """How much of the logits comes through each node, over all paths, (n,):

        A[t, s] = |edge s → t| / Σ_s' |edge s' → t|
        influence = w B,  B = A + A² + ... = (I - A)^-1 - I

    w holds the logits' probabilities over their sum. A logit itself has influence 0.
    Source: Ameisen et al. 2025, "Attribution Graph Evaluation", the indirect influence matrix.
    """
    w = logit_weights(len(adjacency), probabilities)
    return _total(normalised(adjacency, missing), w) - w


def cumulative_influence(influence: Tensor) -> Tensor:
    """(n,): the share of all influence that a node has, with the nodes that have more of it."""
    order = influence.argsort(descending=True, stable=True)
    share = influence[order].double().cumsum(0) / influence.double().sum().clamp(min=1e-30)
    return torch.empty_like(influence).scatter(0, order, share.to(influence.dtype))


def graph_scores(graph: Graph, count_sources: bool = False) -> tuple[float, float]:
    """(replacement score, completeness score), each from 0 to 1.

    replacement   of all paths that end in the logits, weighted by strength, the share that starts
                  at an embedding instead of an error node: influence(embeddings) over
                  influence(embeddings and errors)
    completeness  of the incoming edges of all nodes that have some, each node weighted by its
                  influence (a logit by its probability), the share that does not come from error
                  nodes

    In a pruned graph, what was taken away counts as error.

    Args:
        count_sources: count embeddings and errors, which have no incoming edges, as completely
            explained, too. circuit-tracer does so; its completeness is higher for it.

    Source: Ameisen et al. 2025, "Attribution Graph Evaluation".
    """
    n = len(graph)
    A = normalised(graph.adjacency, graph.missing)
    total = graph.adjacency.abs().sum(1) + graph.missing
    lost = graph.missing / torch.where(total > 0, total, 1.0)  # (n,), of each node's inputs
    reach = node_influence(graph.adjacency, graph.probabilities, graph.missing)
    weight = reach + logit_weights(n, graph.probabilities)
    if not count_sources:
        weight = torch.where(total > 0, weight, 0.0)
    error, embedding = graph.mask(ERROR), graph.mask(EMBEDDING)
    from_tokens = float(reach[embedding].sum())
    from_errors = float(reach[error].sum() + (weight * lost).sum())
    unexplained = A[:, error].sum(1) + lost
    replacement = from_tokens / max(from_tokens + from_errors, 1e-30)
    return replacement, float((weight * (1 - unexplained)).sum() / weight.sum().clamp(min=1e-30))


def random_graph(graph: Graph, seed: int = 0) -> Graph:
    """A control: the same nodes, and every node's incoming edges dealt out anew among the nodes
    that could be its sources (all that come before it, in its layer or below and at its position
    or before)."""
    rng = torch.Generator().manual_seed(seed)
    layer = torch.tensor([node.layer for node in graph.nodes])
    position = torch.tensor([node.position for node in graph.nodes])
    source = ~graph.mask(LOGIT)
    adjacency = torch.zeros_like(graph.adjacency)
    for i, node in enumerate(graph.nodes):
        if node.kind in (FEATURE, LOGIT):
            allowed = (layer < node.layer) & (position <= node.position) & source
            places = allowed.nonzero()[:, 0]
            order = torch.randperm(len(places), generator=rng)
            adjacency[i, places] = graph.adjacency[i, places[order]]
    influence = node_influence(adjacency, graph.probabilities)
    return replace(
        graph,
        adjacency=adjacency,
        influence=influence,
        cumulative=cumulative_influence(influence),
    )


def predicted_effect(
    graph: Graph, factors: Mapping[Node | str, float], paths: bool = True
) -> Tensor:
    """What the graph says of an intervention: the change of every node's value, (n,).

    Each node of `factors` has its output multiplied by its factor. With paths=False only its own
    edges count. With paths=True, a feature whose value changes by a share of itself passes that
    share of its edges on, and so down to the logits: exact in the local replacement model while
    every active feature stays active, and no other becomes active.

    Raises:
        ValueError: a node is not in the graph, or is a logit.
    """
    share = torch.zeros(len(graph), dtype=torch.float64)  # of each node's output, how much is added
    fixed = {}
    for node, factor in factors.items():
        i = graph.index(node)
        if graph.nodes[i].kind == LOGIT:
            raise ValueError(f"{graph.nodes[i].id} is a logit: it writes to no other node.")
        fixed[i] = share[i] = factor - 1.0
    edges = graph.adjacency.double()
    if not paths:
        return (edges @ share).to(graph.values)
    change = torch.zeros_like(share)
    is_feature = graph.mask(FEATURE).tolist()
    for i, node in enumerate(graph.nodes):
        if node.kind in (FEATURE, LOGIT):
            change[i] = edges[i, :i] @ share[:i]
            if is_feature[i] and i not in fixed:
                share[i] = change[i] / graph.values[i].double()
    return change.to(graph.values)


# --------------------------------------------------------------------------------------- pruning


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Graph:
    """The part of the graph that carries most of the influence on the logits.

    1. Nodes: the fewest whose influence sums to `node_threshold` of all; embeddings and logits
       stay in any case.
    2. Edges between them: the fewest whose score sums to `edge_threshold`, where the score of an
       edge is its normalised weight times the influence of its target (a logit's probability).
    3. Features that have lost all incoming or all outgoing edges, and errors that have lost all
       outgoing ones, go too, until none is left.

    Raises:
        ValueError: a threshold is not from 0 to 1; nothing but embeddings, errors and logits
            would be left.

    Source: Ameisen et al. 2025, appendix on pruning; both thresholds are the paper's.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: choose a share from 0 to 1.")
    if not graph.mask(FEATURE).any():
        raise ValueError(
            "The graph has no feature nodes, so there is nothing to prune: are the transcoders "
            "those of this model?"
        )
    always = graph.mask(EMBEDDING) | graph.mask(LOGIT)
    small = graph.subgraph(_fewest(graph.influence, node_threshold) | always)
    score = edge_scores(small.adjacency, small.probabilities)
    strong = _fewest(score.flatten(), edge_threshold).view_as(score)
    edges = torch.where(strong, small.adjacency, 0.0)
    keep = _connected(small, edges)
    if not (keep & small.mask(FEATURE)).any():
        raise ValueError(
            f"With node_threshold={node_threshold:g} and edge_threshold={edge_threshold:g} no "
            "feature is left in the graph: raise them (0.8 and 0.98 are usual)."
        )
    small = small.subgraph(keep, edges)
    settings = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    return replace(small, settings={**graph.settings, **settings})


def edge_scores(adjacency: Tensor, probabilities: Tensor) -> Tensor:
    """(n, n): the normalised weight of each edge, times the influence of its target."""
    weight = node_influence(adjacency, probabilities)
    weight = weight + logit_weights(len(adjacency), probabilities)
    return normalised(adjacency) * weight[:, None]


def _fewest(scores: Tensor, threshold: float) -> Tensor:
    """True at the fewest entries (n,), largest first, that sum to `threshold` of the total."""
    if threshold <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    positive = scores > 0
    ordered = scores[positive].sort(descending=True).values
    share = ordered.double().cumsum(0) / ordered.double().sum().clamp(min=1e-30)
    enough = int((share < threshold - 1e-9).sum())
    return positive if enough >= len(ordered) else scores >= ordered[enough]


def _connected(graph: Graph, edges: Tensor) -> Tensor:
    """(n,), False at features and errors that hang loose; their edges are set to 0 in place."""
    is_feature, is_error = graph.mask(FEATURE), graph.mask(ERROR)
    keep = torch.ones_like(is_feature)
    while True:
        linked = edges != 0
        loose = (is_feature & ~(linked.any(0) & linked.any(1))) | (is_error & ~linked.any(0))
        if not (loose & keep).any():
            return keep
        keep = keep & ~loose
        edges[~keep], edges[:, ~keep] = 0.0, 0.0


# ------------------------------------------------------------------------------------ supernodes


def group_by_label(graph: Graph) -> Graph:
    """The graph with one supernode for each label that features carry (`Graph.label`)."""
    groups = defaultdict(list)
    for node in graph.nodes:
        if node.kind == FEATURE and node.id in graph.labels:
            groups[graph.labels[node.id]].append(node.id)
    return replace(graph, supernodes={text: tuple(names) for text, names in groups.items()})


def group_by_cosine(
    graph: Graph, coders, threshold: float = 0.7, across_positions: bool = False
) -> Graph:
    """The graph with one supernode for features that write alike.

    Two features are joined where the cosine of their decoder rows is at least `threshold`, and a
    supernode is what is joined, directly or through others. A feature that is like no other stays
    by itself. With across_positions=False only features at one position are joined.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold is a cosine above 0 and at most 1, not {threshold}.")
    features = [node for node in graph.nodes if node.kind == FEATURE]
    if not features:
        return replace(graph, supernodes={})
    rows = torch.stack([coders[node.layer].W_dec[node.index].detach().float() for node in features])
    rows = F.normalize(rows, dim=1)
    alike = (rows @ rows.T) >= threshold - 1e-6
    if not across_positions:
        position = torch.tensor([node.position for node in features])
        alike &= position[:, None] == position
    count, member = connected_components(alike.cpu().numpy(), directed=False)
    groups = [[n.id for n, m in zip(features, member, strict=True) if m == g] for g in range(count)]
    groups = [names for names in groups if len(names) > 1]
    return replace(graph, supernodes={graph.describe(names[0]) + f" and {len(names) - 1} more":
                                      tuple(names) for names in groups})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Merged:
    """A graph between supernodes.

    names      of m supernodes and single nodes
    members    the places of their nodes in the graph
    weights    (m, m): [target, source], the sum of the edges from members of one to members of the
               other; 0 on the diagonal
    influence  (m,), the sum over members
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    weights: Tensor
    influence: Tensor


def merge(graph: Graph, only_supernodes: bool = False) -> Merged:
    """Put the nodes of each supernode together; with only_supernodes=True leave out the features
    and errors that belong to none.

    Raises:
        ValueError: a node is in two supernodes.
    """
    names, members, taken = [], [], set()
    for text, ids in graph.supernodes.items():
        places = tuple(graph.index(name) for name in ids)
        if taken & set(places):
            raise ValueError(f"A node of the supernode {text!r} is in another supernode, too.")
        taken |= set(places)
        names.append(text)
        members.append(places)
    for i, node in enumerate(graph.nodes):
        if i not in taken and not (only_supernodes and node.kind in (FEATURE, ERROR)):
            names.append(graph.describe(i))
            members.append((i,))
    belongs = torch.zeros(len(members), len(graph))
    for m, places in enumerate(members):
        belongs[m, list(places)] = 1.0
    weights = belongs @ graph.adjacency @ belongs.T
    weights.fill_diagonal_(0.0)
    return Merged(tuple(names), tuple(members), weights, belongs @ graph.influence)


# ------------------------------------------------------------------------------------------ JSON


def pair_number(x: int, y: int) -> int:
    """Cantor's pairing: one number for (layer, latent), as the viewers number features."""
    return (x + y) * (x + y + 1) // 2 + y


def graph_json(graph: Graph, slug: str = "graph", scan: str | None = None) -> dict:
    """The graph as the field's viewers read it (circuit-tracer, Neuronpedia): metadata, qParams,
    nodes and links. `influence` is the cumulative one, which their threshold slider compares.

    Beyond their keys each node has `bias`, `value`, `own_influence` and `missing`, so that
    `load_graph` gives back what was saved.

    Args:
        slug: the graph's short name; scan: the model's name there, "gemma-2-2b".
    """
    first = len(graph) - len(graph.probabilities)
    nodes = [_node_json(graph, i, first) for i in range(len(graph))]
    targets, sources = graph.adjacency.nonzero(as_tuple=True)
    weights = graph.adjacency[targets, sources].tolist()
    names = [node.id for node in graph.nodes]
    links = [
        {"source": names[s], "target": names[t], "weight": w}
        for t, s, w in zip(targets.tolist(), sources.tolist(), weights, strict=True)
    ]
    metadata = {
        "slug": slug,
        "scan": scan or graph.model,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": graph.settings.get("node_threshold"),
        "schema_version": 1,
        "n_layers": graph.n_layers,
        "info": {"generator": {"name": "mi_helpers"}},
        "generation_settings": dict(graph.settings),
        "pruning_settings": {
            k: v for k, v in graph.settings.items() if k in ("node_threshold", "edge_threshold")
        },
    }
    if metadata["node_threshold"] is None:
        del metadata["node_threshold"]
    state = {
        "pinnedIds": [name for ids in graph.supernodes.values() for name in ids],
        "supernodes": [[text, *ids] for text, ids in graph.supernodes.items()],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    return {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links}


def _node_json(graph: Graph, i: int, first: int) -> dict:
    """One node's entry; logits stand from `first` on."""
    node = graph.nodes[i]
    logit = i - first if node.kind == LOGIT else None
    p = 0.0 if logit is None else float(graph.probabilities[logit])
    label = graph.labels.get(node.id, "")
    if logit is not None:
        label = label or f'Output "{graph.target_names[logit]}" (p={p:.3f})'
    number = {
        EMBEDDING: node.position,
        FEATURE: pair_number(node.layer, node.index),
        ERROR: -1,
        LOGIT: node.index,
    }[node.kind]
    stem = node.id.rsplit("_", 1)[0] if logit is None else f"L_{node.index}"
    last = 0 if node.kind == FEATURE else node.position
    return {
        "node_id": node.id,
        "feature": number,
        "layer": node.id.split("_")[0],
        "ctx_idx": node.position,
        "feature_type": FILE_KINDS[node.kind],
        "token_prob": p,
        "is_target_logit": logit == 0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{stem}-{last}",
        "clerp": label,
        "influence": None if logit is not None else float(graph.cumulative[i]),
        "activation": float(graph.values[i]) if node.kind == FEATURE else None,
        "bias": float(graph.bias[i]),
        "value": float(graph.values[i]),
        "own_influence": float(graph.influence[i]),
        "missing": float(graph.missing[i]),
    }


def save_graph(
    graph: Graph, path: str | Path, slug: str | None = None, scan: str | None = None
) -> Path:
    """Write `graph_json` to a file, whole or not at all. Prune first: a whole graph has a link for
    nearly every pair of nodes.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    write_json(path, graph_json(graph, slug or path.stem, scan))
    return path


def load_graph(path: str | Path) -> Graph:
    """A graph that `save_graph` or circuit-tracer wrote.

    Files of others hold no biases, and of influence only the cumulative one: the rest is computed
    from their links.

    Raises:
        RunError: the file is missing or no JSON.
        ValueError: it is no attribution graph.
    """
    data = read_json(Path(path))
    try:
        meta, entries, links = data["metadata"], data["nodes"], data["links"]
        kinds = {text: kind for kind, text in FILE_KINDS.items()}
        logits = [int(e["layer"]) for e in entries if e["feature_type"] == FILE_KINDS[LOGIT]]
        n_layers = int(meta.get("n_layers", logits[0] - 1))
        nodes = {}
        for entry in entries:
            node = Node.parse(entry["node_id"], n_layers)
            if node.kind != kinds[entry["feature_type"]]:
                raise ValueError(entry["node_id"])
            nodes[entry["node_id"]] = node, entry
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} is no attribution graph that can be read here ({error}): it needs metadata, "
            "nodes with node_id and feature_type, and links."
        ) from None
    order = sorted(nodes.values(), key=lambda pair: _rank(pair[0]))
    place = {node.id: i for i, (node, _) in enumerate(order)}
    adjacency = torch.zeros(len(order), len(order))
    for link in links:
        adjacency[place[link["target"]], place[link["source"]]] = link["weight"]
    check_order(adjacency)

    def column(name: str, other: Tensor | None = None) -> Tensor:
        values = [entry.get(name) for _, entry in order]
        if other is not None and any(value is None for value in values):
            return other
        return torch.tensor([0.0 if value is None else float(value) for value in values])

    p = torch.tensor([e["token_prob"] for n, e in order if n.kind == LOGIT])
    influence = column("own_influence", node_influence(adjacency, p))
    # the viewers' influence is cumulative; logits have none there, and stand last here
    cumulative = torch.where(column("influence") > 0, column("influence"), 1.0)
    texts = [e.get("clerp", "") for n, e in order if n.kind == LOGIT]
    state = data.get("qParams", {})
    return Graph(
        meta["prompt"],
        tuple(meta["prompt_tokens"]),
        tuple(node for node, _ in order),
        adjacency,
        column("bias"),
        column("value", column("activation")),
        p,
        n_layers,
        influence,
        cumulative,
        column("missing"),
        model=meta["scan"],
        target_names=tuple(t.split('"')[1] if '"' in t else t for t in texts),
        labels={n.id: e["clerp"] for n, e in order if e.get("clerp") and n.kind != LOGIT},
        supernodes={group[0]: tuple(group[1:]) for group in state.get("supernodes", ())},
        settings=meta.get("generation_settings", {}),
    )


def _rank(node: Node) -> tuple:
    """Where a node stands in a graph: by layer, features before errors, then by position."""
    return node.layer, node.kind == ERROR, node.position, 0 if node.kind == LOGIT else node.index
