"""Attribution graphs: nodes, edges, influence, pruning, scores.

    graph = attribution_graph(model, coders, prompt)       # mi_helpers.circuits.edges makes it
    graph.incoming(" Paris")                               # the strongest edges into a logit
    small = prune(graph)                                   # what carries 80 % of the influence
    replacement, completeness = graph_scores(graph)

A node has the name that the field's viewers give it: "E_812_3" is an embedding (token 812 at
position 3), "2_57_3" a feature (layer 2, latent 57, position 3), "2_-1_3" the error of layer 2 at
position 3, "7_91_9" a logit (token 91 at position 9, in a model with 6 layers).

Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.arguments import exact

EMBEDDING, FEATURE, ERROR, LOGIT = KINDS = ("embedding", "feature", "error", "logit")


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    kind      "embedding", "feature", "error" or "logit"
    layer     -1 for an embedding, n_layers for a logit
    position  of the token
    index     the latent of a feature, the token id of an embedding or a logit, -1 for an error
    """

    kind: str
    layer: int
    position: int
    index: int = -1

    @property
    def id(self) -> str:
        """The node's name, such as "2_57_3"; see the module's docstring."""
        layer = {EMBEDDING: "E", LOGIT: self.layer + 1}.get(self.kind, self.layer)
        return f"{layer}_{self.index}_{self.position}"

    @classmethod
    def parse(cls, name: str, n_layers: int) -> Node:
        """The node with that name, in a model with `n_layers` layers.

        Raises:
            ValueError: no node has such a name.
        """
        try:
            first, *numbers = name.split("_")
            index, position = map(int, numbers)
            layer = -1 if first == "E" else int(first)
        except (AttributeError, ValueError):
            raise ValueError(
                f"{name!r} is no node's name: 'layer_latent_position' is one, such as '2_57_3', "
                "with -1 as the latent for an error, and E as the layer for an embedding."
            ) from None
        if first == "E" and position >= 0:
            return cls(EMBEDDING, -1, position, index)
        if layer == n_layers + 1 and position >= 0:
            return cls(LOGIT, n_layers, position, index)
        if 0 <= layer < n_layers and position >= 0:
            return cls(ERROR if index == -1 else FEATURE, layer, position, index)
        raise ValueError(
            f"There is no node {name!r}: layers go from 0 to {n_layers - 1}, and positions from 0."
        )


@dataclass(frozen=True)
class EdgeError:
    """How far Σ incoming edges + bias is from a node's value, at most, over all nodes.

    absolute  max |Σ edges + bias - value|
    relative  the same over |value|
    scaled    the same over Σ |edges| + |bias|, to which rounding is proportional
    """

    absolute: float
    relative: float
    scaled: float


# ---------------------------------------------------------------------------------------- graphs


@dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph of one prompt. Given without `influence` it is a whole graph: the order
    of its nodes is checked, and influence and edge error are computed.

    nodes          n of them, in an order in which every edge goes from an earlier to a later one
    adjacency      (n, n): adjacency[target, source] is the edge, what the source adds to the
                   target's value
    bias           (n,): what biases add to it; in a whole graph, value = Σ edges + bias
    values         (n,): a feature's pre-activation, which is its activation as it is active; a
                   logit less the mean of all logits, before any soft-cap; the norm of an
                   embedding's or an error's vector
    probabilities  (logits,): the model's own, of the logit nodes, which come last
    influence      (n,): on the logits, over all paths of the whole graph (`node_influence`)
    cumulative     (n,): the share of all influence that this node has, with all that have more
    missing        (n,): Σ |edges| into the node that pruning removed; 0 in a whole graph
    edge_error     how exactly edges sum; None after pruning or loading
    labels         {node name: words}
    supernodes     {words: node names}
    settings       what the graph was made with
    """

    prompt: str
    tokens: tuple[str, ...]
    nodes: tuple[Node, ...]
    adjacency: Tensor
    bias: Tensor
    values: Tensor
    probabilities: Tensor
    n_layers: int
    influence: Tensor | None = None
    cumulative: Tensor | None = None
    missing: Tensor | None = None
    model: str = ""
    target_names: tuple[str, ...] = ()
    edge_error: EdgeError | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.influence is not None:
            return
        check_order(self.adjacency)
        influence = node_influence(self.adjacency, self.probabilities)
        sums = self.mask(FEATURE) | self.mask(LOGIT)
        self.__dict__.update(  # the class is frozen for everybody else
            influence=influence,
            cumulative=cumulative_influence(influence),
            missing=torch.zeros_like(self.bias),
            edge_error=edge_error(self.adjacency, self.bias, self.values, sums),
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{int(self.mask(kind).sum())} {kind}s" for kind in KINDS)
        return f"Graph({self.prompt!r}: {counts}, {int((self.adjacency != 0).sum())} edges)"

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def first_logit(self) -> int:
        """The place of the first logit node: they come last."""
        return len(self.nodes) - len(self.probabilities)

    @cached_property
    def _places(self) -> dict[str, int]:
        """{node name, or a logit's text: its place in `nodes`}."""
        texts = zip(self.target_names, range(self.first_logit, len(self)), strict=False)
        return dict(texts) | {node.id: i for i, node in enumerate(self.nodes)}

    def index(self, node: Node | str | int) -> int:
        """The place of a node in `nodes`, given the node, its name, a logit's text, or its place.

        Raises:
            ValueError: it is not in this graph.
        """
        if isinstance(node, int):
            if not -len(self.nodes) <= node < len(self.nodes):
                raise ValueError(f"There is no node {node}: the graph has {len(self.nodes)}.")
            return node % len(self.nodes)
        name = node.id if isinstance(node, Node) else node
        if name not in self._places:
            raise ValueError(
                f"There is no node {name!r} in the graph of {self.prompt!r}: a feature has to be "
                "active there, and pruning takes nodes away."
            )
        return self._places[name]

    def mask(self, kind: str) -> Tensor:
        """(n,), True at the nodes of that kind."""
        return torch.tensor([node.kind == kind for node in self.nodes], dtype=torch.bool)

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
        """The k strongest edges into a node, by |weight|: (source, weight)."""
        weights = self.adjacency[self.index(node)]
        places = weights.abs().topk(min(k, len(weights))).indices.tolist()
        return [(self.nodes[i], float(weights[i])) for i in places if weights[i] != 0]

    def describe(self, node: Node | str | int) -> str:
        """A node in words: its label, or "'Tower' at 3", "L2 latent 57 at 3", "output ' Paris'"."""
        place = self.index(node)
        node = self.nodes[place]
        if node.id in self.labels:
            return self.labels[node.id]
        if node.kind == EMBEDDING:
            return f"{self.tokens[node.position]!r} at {node.position}"
        if node.kind == LOGIT:
            return f"output {self.target_names[place - self.first_logit]!r}"
        name = "error" if node.kind == ERROR else f"latent {node.index}"
        return f"L{node.layer} {name} at {node.position}"

    def label(self, labels: Mapping) -> Graph:
        """The graph with words for some nodes.

        Args:
            labels: {node or node name: words}, and {(layer, latent): words} for a latent at every
                position. Names that are not in the graph are left out.
        """
        given = {key.id if isinstance(key, Node) else key: text for key, text in labels.items()}
        own = dict(self.labels)
        for node in self.nodes:
            latent = (node.layer, node.index) if node.kind == FEATURE else None
            if (text := given.get(node.id, given.get(latent))) is not None:
                own[node.id] = text
        return replace(self, labels=own)

    def subgraph(self, keep: Tensor, adjacency: Tensor | None = None) -> Graph:
        """The nodes where keep (n,) is True, with these edges (n, n), or with all that there are.

        Influence stays that of the whole graph; the edges that are gone are counted in `missing`.
        """
        adjacency = self.adjacency if adjacency is None else adjacency
        kept = adjacency[keep][:, keep]
        missing = self.missing[keep] + self.adjacency[keep].abs().sum(1) - kept.abs().sum(1)
        places, last = keep.nonzero()[:, 0].tolist(), self.first_logit
        nodes = tuple(self.nodes[i] for i in places)
        names = {node.id for node in nodes}
        groups = {t: tuple(n for n in ids if n in names) for t, ids in self.supernodes.items()}
        return replace(
            self,
            nodes=nodes,
            adjacency=kept,
            **{f: getattr(self, f)[keep] for f in ("bias", "values", "influence", "cumulative")},
            missing=missing.clamp(min=0),
            probabilities=self.probabilities[keep[last:]],
            target_names=tuple(self.target_names[i - last] for i in places if i >= last),
            edge_error=None,
            labels={n: text for n, text in self.labels.items() if n in names},
            supernodes={text: ids for text, ids in groups.items() if ids},
        )


def check_order(adjacency: Tensor) -> None:
    """Raises ValueError unless every edge goes from an earlier node to a later one."""
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
    values = exact(values)[targets]
    sums = (exact(adjacency).sum(1) + bias)[targets]
    size = (exact(torch.linalg.vector_norm(adjacency, 1, dim=1)) + bias.abs())[targets]
    gap = (sums - values).abs()
    return EdgeError(
        float(gap.max()),
        float((gap / values.abs().clamp(min=1e-12)).max()),
        float((gap / size.clamp(min=1e-12)).max()),
    )


# -------------------------------------------------------------------------- influence and scores


def normalised(adjacency: Tensor, missing: Tensor | None = None) -> Tensor:
    """|edges| (n, n) over their sum into each node, to which `missing` (n,) is added."""
    size = adjacency.abs()
    total = size.sum(1) if missing is None else size.sum(1) + missing
    return size.div_(torch.where(total > 0, total, 1.0)[:, None])


def logit_weights(n: int, probabilities: Tensor) -> Tensor:
    """(n,): the logit nodes' probabilities over their sum, 0 at the other nodes."""
    p = exact(probabilities).clamp(min=1e-30)
    return F.pad((p / p.sum()).to(probabilities.dtype), (n - len(p), 0))


def node_influence(
    adjacency: Tensor, probabilities: Tensor, missing: Tensor | None = None
) -> Tensor:
    """How much of the logits comes through each node, over all paths, (n,):

        A[t, s] = |edge s → t| / Σ_s' |edge s' → t|
        influence = w B,  B = A + A² + ... = (I - A)^-1 - I

    w holds the logits' probabilities over their sum. A logit itself has influence 0.
    Source: Ameisen et al. 2025, "Attribution Graph Evaluation", the indirect influence matrix.
    """
    w = logit_weights(len(adjacency), probabilities)
    # the solver takes the diagonal for 1 and does not look at it: -A stands for I - A
    transposed = normalised(adjacency, missing).neg_().T
    solved = torch.linalg.solve_triangular(transposed, w[:, None], upper=True, unitriangular=True)
    return solved[:, 0] - w


def cumulative_influence(influence: Tensor) -> Tensor:
    """(n,): the share of all influence that a node has, with the nodes that have more of it."""
    order = influence.argsort(descending=True, stable=True)
    share = exact(influence[order]).cumsum(0) / exact(influence).sum().clamp(min=1e-30)
    return torch.empty_like(influence).scatter(0, order, share.to(influence.dtype))


def graph_scores(graph: Graph, count_sources: bool = False) -> tuple[float, float]:
    """(replacement score, completeness score), each from 0 to 1.

    replacement   influence of the embeddings over influence of embeddings and errors: of all paths
                  into the logits, weighted by strength, the share that starts at an embedding
    completeness  of the edges into each node, the share that does not come from errors: the mean
                  over nodes, weighted by their influence (a logit's weight is its probability)

    In a pruned graph, what was removed counts as error.

    Args:
        count_sources: count embeddings and errors, which have no incoming edges, as completely
            explained; circuit-tracer does so, and its completeness is higher for it.

    Source: Ameisen et al. 2025, "Attribution Graph Evaluation".
    """
    A = normalised(graph.adjacency, graph.missing)
    total = graph.adjacency.abs().sum(1) + graph.missing
    lost = graph.missing / torch.where(total > 0, total, 1.0)  # (n,), of each node's inputs
    reach = node_influence(graph.adjacency, graph.probabilities, graph.missing)
    weight = reach + logit_weights(len(graph), graph.probabilities)
    if not count_sources:
        weight = torch.where(total > 0, weight, 0.0)
    error, embedding = graph.mask(ERROR), graph.mask(EMBEDDING)
    from_tokens = float(reach[embedding].sum())
    from_errors = float(reach[error].sum() + (weight * lost).sum())
    unexplained = A[:, error].sum(1) + lost
    replacement = from_tokens / max(from_tokens + from_errors, 1e-30)
    return replacement, float((weight * (1 - unexplained)).sum() / weight.sum().clamp(min=1e-30))


def random_graph(graph: Graph, seed: int = 0) -> Graph:
    """A control: the same nodes, with the edges into each one dealt out at random among its
    possible sources (all nodes of lower layers, at its position or before)."""
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
    cumulative = cumulative_influence(influence)
    return replace(graph, adjacency=adjacency, influence=influence, cumulative=cumulative)


# --------------------------------------------------------------------------------------- pruning


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Graph:
    """The part of the graph that carries most of the influence on the logits.

    1. Nodes: the fewest whose influence sums to `node_threshold` of all; embeddings and logits
       always stay.
    2. Edges between them: the fewest whose `edge_scores` sum to `edge_threshold` of all.
    3. Features without incoming or without outgoing edges, and errors without outgoing ones, are
       removed until none is left.

    Raises:
        ValueError: a threshold is not from 0 to 1; no feature is left.

    Source: Ameisen et al. 2025, appendix on pruning; both thresholds are the paper's.
    """
    settings = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: choose a share from 0 to 1.")
    if not graph.mask(FEATURE).any():
        raise ValueError(
            "The graph has no feature nodes, so there is nothing to prune: are the transcoders "
            "those of this model?"
        )
    keep = _fewest(graph.influence, node_threshold) | graph.mask(EMBEDDING) | graph.mask(LOGIT)
    small = graph.subgraph(keep)
    score = edge_scores(small.adjacency, small.probabilities)
    strong = _fewest(score.flatten(), edge_threshold).view_as(score)
    edges = torch.where(strong, small.adjacency, 0.0)
    keep = _connected(small, edges)
    if not (keep & small.mask(FEATURE)).any():
        raise ValueError(
            f"With node_threshold={node_threshold:g} and edge_threshold={edge_threshold:g} no "
            "feature is left in the graph: raise them (0.8 and 0.98 are usual)."
        )
    return replace(small.subgraph(keep, edges), settings={**graph.settings, **settings})


def edge_scores(adjacency: Tensor, probabilities: Tensor) -> Tensor:
    """(n, n): the normalised weight of each edge, times the influence of its target (a logit's
    probability)."""
    weight = node_influence(adjacency, probabilities)
    weight = weight + logit_weights(len(adjacency), probabilities)
    return normalised(adjacency) * weight[:, None]


def _fewest(scores: Tensor, threshold: float) -> Tensor:
    """True at the fewest entries (n,), largest first, that sum to `threshold` of the total."""
    if threshold <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    positive = scores > 0
    ordered = scores[positive].sort(descending=True).values
    share = exact(ordered).cumsum(0) / exact(ordered).sum().clamp(min=1e-30)
    enough = int((share < threshold - 1e-9).sum())
    return positive if enough >= len(ordered) else scores >= ordered[enough]


def _connected(graph: Graph, edges: Tensor) -> Tensor:
    """(n,), False at loose features and errors; their edges are set to 0 in place."""
    is_feature, is_error = graph.mask(FEATURE), graph.mask(ERROR)
    keep = torch.ones_like(is_feature)
    while True:
        linked = edges != 0
        loose = (is_feature & ~(linked.any(0) & linked.any(1))) | (is_error & ~linked.any(0))
        if not (loose & keep).any():
            return keep
        keep = keep & ~loose
        edges[~keep], edges[:, ~keep] = 0.0, 0.0
