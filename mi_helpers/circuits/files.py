"""Attribution graphs as JSON, in the format of the field's viewers (circuit-tracer, Neuronpedia).

    save_graph(prune(graph), "paris.json")
    graph = load_graph("paris.json")

A node's `influence` is the cumulative one there, which the viewers' threshold slider compares.
Beyond their keys each node has `bias`, `value`, `own_influence` and `missing`, so that `load_graph`
gives back what was saved.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    Node,
    check_order,
    node_influence,
)
from mi_helpers.errors import checked, reading
from mi_helpers.files import RunError, read_json, write_json

FILE_KINDS = {
    EMBEDDING: "embedding",
    FEATURE: "cross layer transcoder",
    ERROR: "mlp reconstruction error",
    LOGIT: "logit",
}
MOST = 32_768  # nodes: their edges are a matrix of 4 GiB
ENTRIES = {"metadata": dict, "qParams": dict, "nodes": list, "links": list}
METADATA = {
    "prompt": str,
    "prompt_tokens": list,
    "scan": str,
    "n_layers": int,
    "generation_settings": dict,
}
NUMBER = (int, float, None)
NODE = {
    "node_id": str,
    "layer": (str, int),
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": (int, float),
    "clerp": (str, None),
    "token": (str, None),
    "label": str,
    **dict.fromkeys(
        ("influence", "activation", "bias", "value", "own_influence", "missing"), NUMBER
    ),
}
LINK = {"source": str, "target": str, "weight": (int, float)}
THRESHOLDS = ("node_threshold", "edge_threshold")

# --------------------------------------------------------------------------------------- writing


def save_graph(
    graph: Graph, path: str | Path, slug: str | None = None, scan: str | None = None
) -> Path:
    """Write `graph_json` to a file, whole or not at all. Prune first: a whole graph has a link for
    nearly every pair of nodes.

    Args:
        slug: the graph's short name; without it, the file's name.
        scan: the viewer's name for the model, such as "gemma-2-2b"; without it, the model's name.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    write_json(path, graph_json(graph, slug or path.stem, scan))
    return path


def graph_json(graph: Graph, slug: str = "graph", scan: str | None = None) -> dict:
    """The graph as metadata, qParams, nodes and links."""
    targets, sources = graph.adjacency.nonzero(as_tuple=True)
    weights = graph.adjacency[targets, sources].tolist()
    names = [node.id for node in graph.nodes]
    links = [
        {"source": names[s], "target": names[t], "weight": w}
        for t, s, w in zip(targets.tolist(), sources.tolist(), weights, strict=True)
    ]
    pruning = {name: graph.settings[name] for name in THRESHOLDS if name in graph.settings}
    metadata = {
        "slug": slug,
        "scan": scan or graph.model,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "schema_version": 1,
        "n_layers": graph.n_layers,
        "info": {"generator": {"name": "mi_helpers"}},
        "generation_settings": dict(graph.settings),
        "pruning_settings": pruning,
    }
    if "node_threshold" in pruning:
        metadata["node_threshold"] = pruning["node_threshold"]
    state = {
        "pinnedIds": [name for ids in graph.supernodes.values() for name in ids],
        "supernodes": [[text, *ids] for text, ids in graph.supernodes.items()],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    nodes = [_node_json(graph, place) for place in range(len(graph))]
    return {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links}


def pair_number(x: int, y: int) -> int:
    """Cantor's pairing of (layer, latent): the viewers' number of a feature."""
    return (x + y) * (x + y + 1) // 2 + y


def _node_json(graph: Graph, place: int) -> dict:
    """The entry of the node at a place."""
    node = graph.nodes[place]
    logit = place - graph.first_logit if node.kind == LOGIT else None
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
    own = {}
    if logit is not None:
        own = {"token": graph.target_names[logit], "label": graph.labels.get(node.id, "")}
    return own | {
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
        "influence": None if logit is not None else float(graph.cumulative[place]),
        "activation": float(graph.values[place]) if node.kind == FEATURE else None,
        "bias": float(graph.bias[place]),
        "value": float(graph.values[place]),
        "own_influence": float(graph.influence[place]),
        "missing": float(graph.missing[place]),
    }


# --------------------------------------------------------------------------------------- reading


def load_graph(path: str | Path) -> Graph:
    """A graph that `save_graph` or circuit-tracer wrote.

    Files of others hold no biases, and of influence only the cumulative one: the rest is computed
    from their links.

    Raises:
        RunError: the file is missing, damaged or no attribution graph; a link's end is no node, or
            several; a number is not finite.
    """
    path = Path(path)
    needs = "An attribution graph has metadata, links, and nodes with node_id, layer and ctx_idx."
    data = read_json(path, **ENTRIES)
    with reading(path, RunError, needs):
        return _graph(data, path)


def _graph(data: dict, path: Path) -> Graph:
    """The graph of a file's content; RunError where its parts do not go together."""
    meta, entries = checked(data["metadata"], path, RunError, **METADATA), data["nodes"]
    entries = [checked(entry, path, RunError, **NODE) for entry in entries]
    logits = [int(e["layer"]) for e in entries if e["feature_type"] == FILE_KINDS[LOGIT]]
    if not logits:
        raise RunError(f"{path} has no logit among its {len(entries)} nodes: nothing is explained.")
    n_layers = meta.get("n_layers", logits[0] - 1)
    pairs = sorted(((_node(e, n_layers), e) for e in entries), key=lambda pair: _rank(pair[0]))
    nodes, entries = [node for node, _ in pairs], [entry for _, entry in pairs]
    links = [checked(link, path, RunError, **LINK) for link in data["links"]]
    links = [(link["target"], link["source"], float(link["weight"])) for link in links]
    p = torch.tensor([float(e["token_prob"]) for n, e in pairs if n.kind == LOGIT])
    tokens = tuple(meta["prompt_tokens"])
    if not all(isinstance(token, str) for token in tokens):
        raise RunError(f"prompt_tokens in {path} are not all texts.")
    if far := [node.id for node in nodes if node.position >= len(tokens)]:
        said = f"{path} has the node {far[0]!r}, and its prompt has {len(tokens)} tokens."
        raise RunError(said)
    adjacency = _adjacency(path, [entry["node_id"] for entry in entries], links)
    check_order(adjacency)
    names = {entry["node_id"]: node.id for node, entry in pairs}
    words = [(node, *_words(entry)) for node, entry in pairs]
    cumulative = _column(entries, "influence")  # the viewers' own; there logits have none
    state = checked(data.get("qParams", {}), path, RunError, supernodes=list)
    groups = [[str(each) for each in group] for group in state.get("supernodes", [])]
    return Graph(
        meta["prompt"],
        tokens,
        tuple(nodes),
        adjacency,
        _column(entries, "bias"),
        _column(entries, "value", _column(entries, "activation")),
        p,
        n_layers,
        _column(entries, "own_influence", node_influence(adjacency, p)),
        torch.where(cumulative > 0, cumulative, 1.0),
        _column(entries, "missing"),
        model=meta["scan"],
        target_names=tuple(token for node, _, token in words if node.kind == LOGIT),
        labels={node.id: label for node, label, _ in words if label},
        supernodes={text: tuple(names.get(n, n) for n in ids) for text, *ids in groups},
        settings=meta.get("generation_settings", {}),
    )


def _node(entry: dict, n_layers: int) -> Node:
    """The node of an entry: kind, layer and position from its own fields, the latent or the token
    from its name. (circuit-tracer 0.5.0 names errors "0_{layer}_{position}", as it does features of
    layer 0.)

    Raises:
        ValueError: the fields make no node.
    """
    kinds = {text: kind for kind, text in FILE_KINDS.items()}
    kind, name, position = kinds[entry["feature_type"]], entry["node_id"], int(entry["ctx_idx"])
    layer = n_layers + 1 if kind == LOGIT else entry["layer"]
    index = -1 if kind == ERROR else name.split("_")[1]
    node = Node.parse(f"{layer}_{index}_{position}", n_layers)
    if node.kind != kind:
        raise ValueError(name)
    return node


def _words(entry: dict) -> tuple[str, str]:
    """(label, a logit's token as text) of an entry; either may be empty."""
    text = entry.get("clerp") or ""
    if entry["feature_type"] != FILE_KINDS[LOGIT]:
        return text, ""
    if "label" in entry:  # as `_node_json` writes it
        return entry["label"], entry["token"]
    output = re.fullmatch(r'Output "(.*)" \(p=[^()]*\)', text, re.DOTALL)
    token = entry.get("token") or (output[1] if output else text)
    return "" if output or text == token else text, token


def _adjacency(path: Path, names: list[str], links: list[tuple[str, str, float]]) -> Tensor:
    """The edges (n, n) between nodes of these names, from links (target, source, weight)."""
    if len(names) > MOST:
        raise RunError(f"{path} has {len(names):,} nodes and at most {MOST:,} are read: prune it.")
    place = {name: i for i, name in enumerate(names)}
    ends = {name for target, source, _ in links for name in (target, source)}
    count = Counter(names)
    if absent := sorted(ends - set(place)):
        raise RunError(
            f"{path} links the node {absent[0]!r}, which it does not have: write it anew."
        )
    if twice := sorted(name for name in ends if count[name] > 1):
        raise RunError(
            f"{path} has several nodes of the name {twice[0]!r}, so its links cannot be told "
            "apart: write it anew with a later version of the program that wrote it."
        )
    adjacency = torch.zeros(len(names), len(names))
    for target, source, weight in links:
        adjacency[place[target], place[source]] = weight
    if not adjacency.isfinite().all():
        raise RunError(f"{path} has a weight among its links that is too large to be read.")
    return adjacency


def _column(entries: list[dict], key: str, default: Tensor | None = None) -> Tensor:
    """One number of each entry, (n,); where some entry has none, the default, or 0 for those."""
    values = [entry.get(key) for entry in entries]
    if default is not None and None in values:
        return default
    return torch.tensor([0.0 if value is None else float(value) for value in values])


def _rank(node: Node) -> tuple:
    """A node's place in a graph: by layer, features before errors, then by position; logits as the
    file has them."""
    return node.layer, node.kind == ERROR, node.position, 0 if node.kind == LOGIT else node.index
