"""Figures of attribution graphs and interventions.

Rows are layers, from the embeddings at the bottom to the logits at the top; columns are positions.
A node's area is its influence, an edge's width is its weight. Blue edges add, dashed red ones
subtract.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    merge,
)
from mi_helpers.circuits.interventions import Intervention
from mi_helpers.plots import OKABE_ITO, Picture, before_after, style

ADDS, SUBTRACTS = OKABE_ITO[0], OKABE_ITO[5]
LOOKS = {  # marker, face
    EMBEDDING: ("s", "#DDDDDD"),
    FEATURE: ("o", OKABE_ITO[4]),
    ERROR: ("D", "white"),
    LOGIT: ("^", OKABE_ITO[1]),
}
MOST_EDGES, MOST_LABELS = 300, 14
OF_ANSWER = 2  # edges into a logit that are always drawn
WIDEST = 9  # nodes side by side in one cell before they are pushed together


# ------------------------------------------------------------------------------------ the graph


@style()
def graph_figure(
    graph: Graph,
    title: str = "",
    *,
    most_edges: int = MOST_EDGES,
    most_labels: int = MOST_LABELS,
    focus: str | None = None,
    width: float = 11.0,
    row: float = 0.7,
) -> Figure:
    """A graph, which is best pruned first, with layers as rows and positions as columns.

    Args:
        most_edges: how many edges to draw, the strongest by |weight|.
        most_labels: how many features to name, those with the most influence, by their label or
            "layer/latent".
        focus: a node; only the edges into and out of it are drawn.

    Raises:
        ValueError: the focus is not in the graph.

    Source: the figures of Ameisen et al. 2025, "Circuit Tracing", section "Attribution Graphs".
    """
    x, y, borders = _places(graph)
    rows = graph.n_layers + 2
    picture = Picture(figsize=(width, 1.6 + row * rows), layout="none")
    high = picture.get_figheight()
    picture.subplots_adjust(0.085, 1.15 / high, 0.985, 1 - 0.45 / high)
    axes = picture.add_subplot()
    for left in borders[1:-1]:
        axes.axvline(left, color="0.9", linestyle="-", marker="", linewidth=1, zorder=0)
    _draw_edges(axes, graph, x, y, most_edges, None if focus is None else graph.index(focus))
    _draw_nodes(axes, graph, x, y)
    _draw_labels(axes, graph, x, y, most_labels)
    _name_axes(axes, graph, (borders[1:] + borders[:-1]) / 2, title)
    axes.tick_params(axis="x", length=0, labelsize=11)
    axes.set(xlim=(0, borders[-1]), ylim=(-0.6, rows - 0.25))
    _legend(picture)
    return picture


def _name_axes(axes, graph: Graph, x: Sequence[float], title: str) -> None:
    """Tokens under the columns at x, layers beside the rows."""
    axes.set_xticks(x, [_visible(token) for token in graph.tokens])
    axes.tick_params(axis="x", labelrotation=30 if len(graph.tokens) > 9 else 0)
    layers = ["tokens", *map(str, range(graph.n_layers)), "logits"]
    axes.set_yticks(range(graph.n_layers + 2), layers)
    axes.set(title=title, ylabel="layer")


def _places(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of every node, and the borders of the columns (positions + 1,)."""
    cells = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        cells[node.layer, node.position].append(i)
    wide = np.ones(len(graph.tokens)) * 1.4
    for (_, position), members in cells.items():
        wide[position] = max(wide[position], min(len(members), WIDEST))
    borders = np.concatenate([[0], wide.cumsum()])
    x, y = np.zeros(len(graph)), np.zeros(len(graph))
    for (layer, position), members in cells.items():
        step = wide[position] / len(members)
        for k, i in enumerate(members):
            x[i], y[i] = borders[position] + (k + 0.5) * step, layer + 1
    return x, y, borders


def _draw_edges(axes, graph: Graph, x, y, most: int, focus: int | None) -> None:
    """The `most` strongest edges, the widest on top; with a focus, only its own."""
    weights = graph.adjacency.numpy()
    targets, sources = weights.nonzero()
    if focus is not None:
        own = (targets == focus) | (sources == focus)
        targets, sources = targets[own], sources[own]
    size = np.abs(weights[targets, sources])
    order = np.argsort(size)[-most:] if most else []
    if not len(order):
        return
    targets, sources, share = targets[order], sources[order], size[order] / size.max()
    adds = weights[targets, sources] > 0
    starts, ends = np.stack([x[sources], y[sources]], 1), np.stack([x[targets], y[targets]], 1)
    lines = np.stack([starts, ends], 1)
    for drawn, colour, dash in ((adds, ADDS, "-"), (~adds, SUBTRACTS, (0, (4, 2)))):
        if drawn.any():
            look = {"colors": colour, "linestyles": [dash], "zorder": 1}
            widths, alpha = 0.4 + 3.6 * share[drawn], 0.15 + 0.7 * share[drawn]
            axes.add_collection(
                LineCollection(lines[drawn], linewidths=widths, alpha=alpha, **look)
            )


def _draw_nodes(axes, graph: Graph, x, y) -> None:
    """Every node, its area in proportion to its influence, a logit's to its probability."""
    size = graph.influence.numpy().copy()
    size[graph.first_logit :] = graph.probabilities.numpy()
    for kind, (marker, face) in LOOKS.items():
        these = graph.mask(kind).numpy()
        if these.any():
            area = 18 + 420 * size[these] / max(size[these].max(), 1e-9)
            look = {"marker": marker, "color": face, "edgecolor": "black", "linewidth": 0.8}
            axes.scatter(x[these], y[these], area, zorder=2, clip_on=False, **look)


def _draw_labels(axes, graph: Graph, x, y, most: int) -> None:
    """Words at the `most` features with the most influence, and at the logits."""
    per_letter = 0.0075 * x.max()  # about a letter's width, in the units of x
    taken: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for node in graph.features()[:most]:
        i = graph.index(node)
        text = graph.labels.get(node.id, f"{node.layer}/{node.index}")
        half = per_letter * (len(text) + 1) / 2
        for side, va in ((-0.2, "top"), (0.2, "bottom")):  # under the node, above it, or not at all
            row = taken[y[i] + side]
            if all(abs(x[i] - other) > half + width for other, width in row):
                row.append((x[i], half))
                _word(axes, x[i], y[i] + side, text, va=va)
                break
    logits = zip(graph.target_names, graph.probabilities.tolist(), strict=True)
    for i, (text, p) in enumerate(logits, graph.first_logit):
        if p >= 0.02 or len(graph.probabilities) <= 3:
            _word(axes, x[i], y[i] + 0.2, f"{_visible(text)}\n{p:.2f}", va="bottom")


def _word(axes, x: float, y: float, text: str, va: str) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}
    axes.text(x, y, text, ha="center", va=va, fontsize=9, bbox=box, zorder=4)


def _visible(token: str) -> str:
    return token.strip() or repr(token)


def _legend(picture: Picture) -> None:
    """A legend of the marks, under the graph."""
    marks = [
        Line2D([], [], marker=m, color="black", markerfacecolor=f, linestyle="", label=kind)
        for kind, (m, f) in LOOKS.items()
    ]
    marks += [
        Line2D([], [], color=ADDS, linestyle="-", marker="", label="adds"),
        Line2D([], [], color=SUBTRACTS, linestyle="--", marker="", label="subtracts"),
    ]
    picture.legend(handles=marks, loc="lower center", ncols=len(marks), fontsize=11)


# ------------------------------------------------------------------------------------ supernodes


@style()
def supernode_figure(
    graph: Graph, title: str = "", *, share: float = 0.05, width: float = 11.0, height: float = 6.0
) -> Figure:
    """Supernodes, tokens and logits as boxes, with arrows for the edges between them.

    A box is at the mean layer and position of its nodes; its frame is as thick as its influence.

    Args:
        share: draw the edges that are at least this share of the strongest, and the strongest into
            each logit, however weak.

    Raises:
        ValueError: the graph has no supernodes.

    Source: the supernode diagrams of Ameisen et al. 2025, "Circuit Tracing".
    """
    if not graph.supernodes:
        raise ValueError("The graph has no supernodes: make some with group_by_label.")
    merged = merge(graph)
    weights = merged.weights.numpy()
    linked = (np.abs(weights) >= share * max(np.abs(weights).max(), 1e-9)) & (weights != 0)
    answers = [i for i, (first, *_) in enumerate(merged.members) if first >= graph.first_logit]
    for i in answers:  # always drawn, with what speaks most for it and against it
        for strongest in np.abs(weights[i]).argsort()[-OF_ANSWER:]:
            linked[i, strongest] = weights[i, strongest] != 0
    names = [_short(graph, *each) for each in zip(merged.names, merged.members, strict=True)]
    spots = _spots(graph, merged.members, names, width)
    picture = Picture(figsize=(width, height))
    axes = picture.subplots()
    top = max(float(merged.influence.max()), 1e-9)
    for i, (name, spot) in enumerate(zip(names, spots, strict=True)):
        if i < len(graph.supernodes) or linked[i].any() or linked[:, i].any():
            thick = 0.8 + 2.5 * float(merged.influence[i]) / top
            fill = "#E8F3FA" if i < len(graph.supernodes) else "white"
            frame = {"boxstyle": "round,pad=0.4", "facecolor": fill, "linewidth": thick}
            axes.text(*spot, name, ha="center", va="center", fontsize=11, bbox=frame, zorder=3)
    strongest = np.abs(weights).max()
    for target, source in zip(*linked.nonzero(), strict=True):
        _arrow(axes, spots[source], spots[target], float(weights[target, source] / strongest))
    _name_axes(axes, graph, range(len(graph.tokens)), title)
    left = min(x for x, _ in spots)
    axes.set(xlim=(min(-0.7, left - 0.7), len(graph.tokens) - 0.3))
    axes.set(ylim=(-0.6, graph.n_layers + 1.6))
    return picture


def _arrow(axes, start, end, weight: float) -> None:
    """An arrow for an edge; weight is in units of the strongest."""
    look = (
        {"color": ADDS, "linestyle": "-"} if weight > 0 else {"color": SUBTRACTS, "linestyle": "--"}
    )
    look |= {"alpha": 0.35 + 0.6 * abs(weight), "linewidth": 0.8 + 4 * abs(weight)}
    look |= {"arrowstyle": "-|>", "shrinkA": 18, "shrinkB": 18}
    axes.annotate("", end, start, zorder=2, arrowprops=look)


def _short(graph: Graph, name: str, group: Sequence[int]) -> str:
    """A box's text: its name, or the token alone for an embedding and a logit."""
    node = graph.nodes[group[0]]
    if node.kind == EMBEDDING:
        return _visible(graph.tokens[node.position])
    if node.kind == LOGIT:
        return _visible(graph.target_names[group[0] - graph.first_logit])
    return name


def _spots(
    graph: Graph, members: Sequence[Sequence[int]], names: Sequence[str], width: float
) -> list[tuple[float, float]]:
    """The mean position and row of each group, moved left where boxes would overlap."""
    letter = 0.095 * len(graph.tokens) / (0.9 * width)  # in positions
    placed: list[tuple[float, float, float]] = []
    for group, name in zip(members, names, strict=True):
        x = float(np.mean([graph.nodes[i].position for i in group]))
        y = float(np.mean([graph.nodes[i].layer + 1 for i in group]))
        half = letter * (len(name) + 3) / 2
        near = sorted(((a, w) for a, b, w in placed if abs(b - y) < 0.7), reverse=True)
        for a, w in near:
            if abs(x - a) < half + w:
                x = a - half - w - letter
        placed.append((x, y, half))
    return [(x, y) for x, y, _ in placed]


# --------------------------------------------------------------------------------- interventions


def intervention_figure(result: Intervention, title: str = "", k: int = 6) -> Figure:
    """The probabilities of the likeliest next tokens before and after an intervention, where they
    are 0.005 or more."""
    top = [row for row in result.top(k) if max(row[1:]) >= 0.005] or result.top(1)
    before = {repr(text): p for text, p, _ in top}
    after = {repr(text): p for text, _, p in top}
    xlabel = "probability of the next token"
    return before_after(before, after, title, xlabel=xlabel, limits=(0.0, 1.0))
