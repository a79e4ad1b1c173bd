"""The figures of lesson 01: weights and measurements in, Figure out. None trains.

"The paper" is Elhage et al. 2022, Toy Models of Superposition.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from mi_helpers.lessons.lesson_01 import geometry, phases
from mi_helpers.plots import (
    AMOUNT,
    DASHES,
    EFFECT,
    MARKERS,
    OKABE_ITO,
    as_array,
    figure,
    style,
)


def colours(count: int) -> np.ndarray:
    """One colour per feature, (count, 4), dark for the first: the map for amounts, less its palest
    end."""
    return colormaps[AMOUNT](np.linspace(0, 0.85, max(count, 2)))[:count]


# -- directions ------------------------------------------------------------------------------


def draw_directions(axes, W: np.ndarray, reach: float = 1.35) -> None:
    """Draw a line from the origin to each row of W (n, 2), with the feature's number at the tip."""
    W = turned(W)
    axes.add_patch(Circle((0, 0), 1, fill=False, color="0.75", linewidth=1))
    tint = colours(len(W))
    segments = np.stack([np.zeros_like(W), W], axis=1)
    axes.add_collection(LineCollection(segments, colors=tint, linewidths=3))
    axes.scatter(W[:, 0], W[:, 1], c=tint, s=45, zorder=3)
    for name, tip in tip_names(W):
        x, y = tip * (1 + (0.15 + 0.05 * len(name)) / np.linalg.norm(tip))
        axes.text(x, y, name, ha="center", va="center", fontsize=13)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_axis_off()


def tip_names(tips: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(label, place) of each tip (n, 2) off the origin; tips at one place share a label."""
    far = [i for i in range(len(tips)) if np.linalg.norm(tips[i]) > 0.15]
    names = []
    while far:
        here = [i for i in far if np.linalg.norm(tips[i] - tips[far[0]]) < 0.12]
        names.append((", ".join(map(str, here)), tips[here].mean(0)))
        far = [i for i in far if i not in here]
    return names


@style()
def directions(W, titles: Sequence[str], title: str = "") -> Figure:
    """One panel per toy model: each feature's direction in the hidden plane; the circle is at 1.

    Args:
        W: (instances, n, 2); titles: of the instances.

    Raises:
        ValueError: W of another shape, or not one title per instance.

    Source: the paper's first figure, in its introduction.
    """
    W = as_array(W)
    if W.ndim != 3 or W.shape[-1] != 2 or len(W) != len(titles):
        raise ValueError(
            f"W has shape {W.shape} and there are {len(titles)} titles: "
            "W should be (instances, n, 2), with one title per instance."
        )
    count = len(W)
    picture, axes = figure(min(14, max(3.2, 2.7 * count)), 3.2, 1, count, squeeze=False)
    for each, weights, name in zip(axes[0], W, titles, strict=True):
        draw_directions(each, weights)
        each.set_title(name, loc="center", fontsize=13)
    picture.suptitle(title, x=0.01, ha="left")
    return picture


def turn_of(W: np.ndarray) -> np.ndarray:
    """The matrix (2, 2) that turns W (n, 2) so that feature 0 points right, and 1 upwards."""
    first = W[0] / max(np.linalg.norm(W[0]), 1e-6)
    turn = np.array([[first[0], -first[1]], [first[1], first[0]]])
    return turn * np.array([1, -1 if len(W) > 1 and (W @ turn)[1, 1] < 0 else 1])


def turned(W: np.ndarray) -> np.ndarray:
    """W (n, 2), turned and perhaps mirrored: nothing in the model depends on that."""
    return W @ turn_of(W)


def upright(W: np.ndarray) -> np.ndarray:
    """W (n, 3), turned so that its third axis is the axis of the shape, (n, 3).

    With six corners or more, the axis splits them into two halves at distances along it that are as
    equal as possible. With fewer, it goes through the first corner.
    """
    axis = W[0]
    if len(W) >= 6:
        halves = [list(half) for half in itertools.combinations(range(len(W)), len(W) // 2)]
        sums = [W[half].sum(0) for half in halves]
        axes = [each / np.linalg.norm(each) for each in sums if np.linalg.norm(each) > 0.5]
        axis = min(axes, key=lambda each: np.abs(W @ each).std())
    frame, _ = np.linalg.qr(np.stack([axis, W[1], W[2]], axis=1))
    return W @ frame[:, [1, 2, 0]] * np.sign(axis @ frame[:, 0])


def flat(W: np.ndarray) -> np.ndarray:
    """Rows of W (n, m) as points of a plane, (n, 2).

    Two dimensions are turned (see `turned`), three are seen from an angle at which no corner hides
    another, and of more the two main axes are kept.
    """
    if W.shape[1] == 1:
        return turned(np.concatenate([W, np.zeros_like(W)], axis=1))
    if W.shape[1] == 2:
        return turned(W)
    if W.shape[1] > 3:
        _, _, axes = np.linalg.svd(W, full_matrices=False)
        return W @ axes[:2].T
    x, y, z = upright(W).T
    turn, lift = 0.35, (1.5 if len(W) >= 6 else 0.3)  # radians: around the axis, above the horizon
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    towards = z * math.sin(lift) - y * math.cos(lift)  # what is near looks larger
    return np.stack([x, z * math.cos(lift) + y * math.sin(lift)], 1) * (1 + 0.3 * towards[:, None])


@style()
def geometries(shapes: Mapping[str, tuple], title: str = "") -> Figure:
    """One panel per shape: its corners, joined where they interfere.

    Nearest neighbours are joined if their |cos| is above 0.1.

    Args:
        shapes: {name: (W (n, m), text below the name)}.

    Source: the drawings beside the paper's figure of feature dimensionality.
    """
    picture, axes = figure(min(14, 2.7 * len(shapes)), 3.4, 1, len(shapes), squeeze=False)
    for each, (name, (W, text)) in zip(axes[0], shapes.items(), strict=True):
        W = as_array(W)
        W = W[np.linalg.norm(W, axis=1) > geometry.REPRESENTED]
        points = flat(W)
        lengths = np.linalg.norm(W, axis=1)
        cosine = W @ W.T / np.outer(lengths, lengths)
        gaps = np.linalg.norm(W[:, None] - W[None], axis=-1)
        near = (gaps < 1.3 * gaps[gaps > 0.01].min()) & (np.abs(cosine) > 0.1)
        edges = [points[[i, j]] for i in range(len(W)) for j in range(i) if near[i, j]]
        spokes = np.stack([np.zeros_like(points), points], axis=1)
        each.add_collection(LineCollection(spokes, colors="0.6", linewidths=2))
        each.add_collection(LineCollection(edges, colors=OKABE_ITO[0], linewidths=2))
        each.scatter(points[:, 0], points[:, 1], color=OKABE_ITO[1], s=60, zorder=3)
        each.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        each.set_axis_off()
        each.set_title(f"{name}\n{text}", loc="center", fontsize=13)
    picture.suptitle(title, x=0.01, ha="left")
    return picture


# -- sweeps over sparsity --------------------------------------------------------------------


@style()
def sticky(density, per_feature, D, bands: Mapping[str, float], title: str = "") -> Figure:
    """Left, D* = m/‖W‖²_F over 1/(1 - S); right, every feature's dimensionality, with the bands.

    Args:
        density, per_feature: 1 - S and D*, (instances,).
        D: (instances, n); features with D below 0.02 are not drawn.
        bands: {name: dimensionality}, horizontal lines.

    Source: the paper's two figures on feature dimensionality.
    """
    x, per_feature, D = 1 / as_array(density), as_array(per_feature), as_array(D)
    picture, (left, right) = figure(12, 4.8, 1, 2)
    for level, text in ((1, "1"), (0.5, "1/2")):
        left.axhline(level, color="0.6", linestyle="--", linewidth=1, marker="")
        left.text(1.01, level, text, va="center", transform=left.get_yaxis_transform())
    left.plot(x, per_feature, color=OKABE_ITO[0])
    left.set(
        xlabel="1/(1 − S): 1 is dense, right is sparser",
        ylabel="m / ‖W‖² (Frobenius)",
        title="The whole model",
        ylim=(0, 1.1),
        xscale="log",
    )
    for name, level in bands.items():
        right.axhline(level, color="0.6", linestyle="--", linewidth=1, marker="")
        place = {"va": "center", "fontsize": 12, "transform": right.get_yaxis_transform()}
        right.text(1.01, level, name, **place)
    jitter = np.linspace(-0.025, 0.025, D.shape[1])
    where = x[:, None] * np.exp(jitter)
    keep = D > 0.02
    right.scatter(where[keep], D[keep], s=14, alpha=0.6, color=OKABE_ITO[5], linewidths=0)
    right.set(
        xlabel="1/(1 − S)",
        ylabel="feature dimensionality Dᵢ",
        title="Each feature",
        ylim=(0, 1.1),
        xscale="log",
    )
    for each in (left, right):
        ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100) if tick <= x.max() * 1.01]
        each.set_xticks(ticks, [str(tick) for tick in ticks])
        each.set_xticks([], minor=True)
    picture.suptitle(title, x=0.01, ha="left")
    return picture


# -- the phase diagram -----------------------------------------------------------------------

PHASE_COLOURS = ("#56B4E9", "#F5F5F5", "#E69F00")  # first only, both, second only


@style()
def phase_maps(
    maps: Mapping[str, np.ndarray], densities, importances, boundary: tuple | None = None
) -> Figure:
    """One panel per map of solutions; each cell has a mark, so that colour is not needed.

    Args:
        maps: {title: kinds (densities, importances)}, each kind 0, 1 or 2, as in SOLUTIONS.
        densities, importances: of the rows and the columns.
        boundary: (importances, densities) of a line.

    Source: the paper's phase diagram, in "Superposition as a Phase Change".
    """
    q, r = as_array(densities), as_array(importances)
    picture, axes = figure(5.6 * len(maps), 5.2, 1, len(maps), squeeze=False, sharey=True)
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    for each, (title, kinds) in zip(axes[0], maps.items(), strict=True):
        kinds = as_array(kinds)
        each.pcolormesh(r, q, kinds, cmap=ListedColormap(PHASE_COLOURS), norm=norm)
        rows, columns = np.meshgrid(q, r, indexing="ij")
        for kind, mark in enumerate(("1", "x", "2")):
            cells = kinds == kind
            text = f"${mark}$" if mark != "x" else "x"
            each.scatter(columns[cells], rows[cells], marker=text, s=26, color="0.25", linewidths=1)
        if boundary is not None:
            each.plot(*boundary, color="black", linestyle="-", marker="")
        each.set(xscale="log", yscale="log", xlabel="importance of the second feature", title=title)
        each.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        each.set_yticks([1, 0.3, 0.1, 0.03, 0.01], ["1", "0.3", "0.1", "0.03", "0.01"])
        each.minorticks_off()
        each.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("density 1 − S (sparse below)")
    handles = [
        Line2D([], [], marker=mark, color="0.25", linestyle="", markersize=8, label=label)
        for mark, label in zip(("$1$", "x", "$2$"), phases.SOLUTIONS, strict=True)
    ]
    if boundary is not None:
        handles.append(Line2D([], [], color="black", marker="", label="closed-form boundary"))
    picture.legend(handles=handles, loc="outside lower center", ncols=4)
    return picture


# -- neurons ---------------------------------------------------------------------------------


@style()
def neurons(W, titles: Sequence[str], title: str = "") -> Figure:
    """One panel per toy model: what each hidden neuron responds to.

    Rows are features, columns neurons, and the number is the weight.

    Args:
        W: (instances, n, m); titles: of the instances.

    Source: the paper's figures of "Superposition in a Privileged Basis".
    """
    W = as_array(W)
    picture, axes = figure(min(14, 4.2 * len(W)), 4.8, 1, len(W), squeeze=False, sharey=True)
    for each, weights, name in zip(axes[0], W, titles, strict=True):
        image = each.imshow(weights, cmap=EFFECT, norm=Normalize(-1.2, 1.2), aspect="auto")
        for (row, column), value in np.ndenumerate(weights):
            if abs(value) >= 0.15:
                dark = abs(value) > 0.8
                each.text(
                    column,
                    row,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=10,
                    color="white" if dark else "black",
                )
        each.set(xlabel="neuron", title=name, xticks=range(weights.shape[1]))
        each.set_yticks(range(len(weights)))
        each.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("feature (0 is the most important)")
    picture.colorbar(image, ax=axes[0, -1], label="weight", extend="both")
    picture.suptitle(title, x=0.01, ha="left")
    return picture


# -- packing ---------------------------------------------------------------------------------


@style()
def packing(series: Mapping[str, tuple], title: str = "", mark: tuple | None = None) -> Figure:
    """How many directions fit, over the dimension; both axes are logarithmic.

    Args:
        series: {label: (dimensions, counts)}; up to 12 points are drawn with markers, more of them
            as a line; infinite counts are left out.
        mark: (dimension, text) of a vertical line.
    """
    picture, axes = figure(9, 5.4)
    for index, (label, (m, counts)) in enumerate(series.items()):
        m, counts = as_array(m), as_array(counts)
        keep = np.isfinite(counts)
        look = {"color": OKABE_ITO[index], "label": label, "linestyle": DASHES[index]}
        marker = MARKERS[index] if len(m) <= 12 else ""
        axes.plot(m[keep], counts[keep], marker=marker, **look)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="dimensions m",
        ylabel="directions with every |cos| ≤ 0.1",
        title=title,
        ylim=(5, 1e14),
    )
    if mark is not None:
        axes.axvline(mark[0], color="0.5", linestyle=":", marker="", zorder=0)
        axes.text(mark[0] * 1.04, 1e9, mark[1], rotation=90, ha="left", va="center", fontsize=12)
    axes.legend(loc="upper left")
    return picture
