"""The figures of lesson 06; those of one latent are in `saes.figures`.

Numbers in, Figure out. Each names the published figure that it realises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mi_helpers.lessons.lesson_06.experiments import Plane, select
from mi_helpers.lessons.lesson_06.image_coding import as_squares
from mi_helpers.plots import DASHES, MARKERS, OKABE_ITO, Picture, as_array, figure, style

# ------------------------------------------------------------------------------------- images


def mosaic(filters, columns: int) -> np.ndarray:
    """Filters (n, size²) side by side, each scaled to its own largest weight, NaN between them."""
    squares = as_squares(filters)
    squares = squares / np.abs(squares).max((1, 2), keepdims=True).clip(min=1e-12)
    empty = -len(squares) % columns
    tiles = np.pad(squares, ((0, empty), (0, 1), (0, 1)), constant_values=np.nan)
    rows, size = len(tiles) // columns, tiles.shape[-1]
    tiles = tiles.reshape(rows, columns, size, size).swapaxes(1, 2)
    return tiles.reshape(rows * size, columns * size)[:-1, :-1]


@style()
def filter_panels(panels: Mapping[str, Sequence], columns: int = 12) -> Figure:
    """The filters {title: (n, pixels)} as grey tiles, from black for - to white for +.

    Source: Olshausen and Field 1996, figure 4a.
    """
    picture, axes = figure(4.2 * len(panels), 4.5, columns=len(panels), squeeze=False)
    for one, (title, filters) in zip(axes[0], panels.items(), strict=True):
        one.imshow(mosaic(filters, columns), cmap="gray", vmin=-1, vmax=1)
        one.set_axis_off()
        one.set_title(title)
    return picture


# --------------------------------------------------------------------------- sparsity and width


@style()
def curves(log: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> Figure:
    """Training curves: a panel for each of {column of the log: title}, over the steps."""
    picture, axes = figure(3.6 * len(names), 3.3, columns=len(names), squeeze=False)
    steps = [row["step"] for row in log]
    for one, (name, title) in zip(axes[0], names.items(), strict=True):
        one.plot(steps, [row[name] for row in log], marker="" if len(steps) > 40 else "o")
        one.set(title=title, xlabel="step")
        one.set_ylim(0, 1.08 * max(1e-9, *(row[name] for row in log)))
    return picture


def name_errors(axes) -> None:
    """Plain numbers on a logarithmic axis of errors, without minor ticks."""
    low, high = axes.get_ylim()
    shown = [e for e in (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5) if low <= e <= high]
    axes.set_yticks(shown, [f"{each:g}" for each in shown])
    axes.minorticks_off()


def check_choice(name: str, value, there: Sequence) -> None:
    """Check that the table has a value.

    Raises:
        ValueError: it has not; its values are listed.
    """
    if value not in there:
        raise ValueError(f"No run has {name} {value}: choose one of {', '.join(map(str, there))}.")


BARS = {
    "explained_variance": "explained variance",
    "loss_recovered": "loss recovered",
    "f1": "F1, six concepts",
    "dead": "dead latents",
}


@style()
def sparsity_explorer(rows: Sequence[dict], width: int, k: int) -> Figure:
    """Normalised MSE against L0, a line per width, the chosen run ringed; beside it its measures.

    Args:
        rows: of the shipped table, as `experiments.read_grid` gives them.
        width, k: of the chosen run.

    Raises:
        ValueError: there is no run of this width or k.

    Source: the frontier of sparsity and reconstruction, Gao and others 2024, figure 5;
    Rajamanoharan and others 2024, figure 1.
    """
    runs = select(rows, activation="topk", seed=0)
    widths, ks = (sorted({row[name] for row in runs}) for name in ("width", "k"))
    check_choice("width", width, widths)
    check_choice("k", k, ks)
    (chosen,) = select(runs, width=width, k=k)
    picture = Picture(figsize=(11, 4.6), layout="none")  # fixed margins take half the time
    picture.subplots_adjust(0.08, 0.15, 0.97, 0.9, wspace=0.5)
    left, right = picture.subplots(1, 2, width_ratios=[1.3, 1])
    for index, each in enumerate(widths):
        line = sorted(select(runs, width=each), key=lambda row: row["l0"])
        look = {"linewidth": 3.5 if each == width else 1.5, "color": OKABE_ITO[index % 7]}
        look |= {"marker": MARKERS[index % 7], "linestyle": DASHES[index % 7]}
        left.plot([r["l0"] for r in line], [r["nmse"] for r in line], label=str(each), **look)
    ring = {"marker": "o", "markersize": 18, "markerfacecolor": "none", "markeredgewidth": 2.5}
    left.plot(chosen["l0"], chosen["nmse"], color="black", linestyle="", **ring)
    left.set(xscale="log", yscale="log", xlabel="L0: latents per token", ylabel="normalised MSE")
    left.set_xticks(ks, [str(each) for each in ks])
    name_errors(left)
    left.set_title(f"nMSE {chosen['nmse']:.3f} at {width} latents, k = {k}")
    left.legend(title="latents", fontsize=11)
    values = [chosen[name] for name in BARS]
    drawn = right.barh(range(len(BARS)), values, 0.6, color=OKABE_ITO[0])
    right.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3)
    right.set_yticks(range(len(BARS)), BARS.values())
    right.invert_yaxis()
    right.set(xlim=(0, 1.2), title=f"{chosen['latents_per_topic']:.1f} latents per concept")
    return picture


@style()
def frontier(rows: Sequence[dict]) -> Figure:
    """TopK and ReLU with an L1 penalty at the same width: normalised MSE and length against L0.

    Source: Gao and others 2024, figure 2 (TopK against ReLU); Rajamanoharan and others 2024
    (shrinkage).
    """
    relu = sorted(select(rows, activation="relu"), key=lambda row: row["l0"])
    width = relu[0]["width"]
    topk = select(rows, activation="topk", width=width, seed=0)
    topk = sorted(topk, key=lambda row: row["l0"])
    picture, (left, right) = figure(10.5, 4.2, columns=2)
    for label, line in (("TopK", topk), ("ReLU with L1", relu)):
        l0 = [row["l0"] for row in line]
        left.plot(l0, [row["nmse"] for row in line], label=label)
        right.plot(l0, [row["shrinkage"] for row in line], label=label)
    left.set(xscale="log", yscale="log", ylabel="normalised MSE", title=f"{width} latents")
    right.axhline(1, color="black", linestyle="--", marker="", linewidth=1.5)
    right.set(xscale="log", ylabel="1: of the right length", title="length of the reconstruction")
    for one in (left, right):
        one.set_xlabel("L0: latents per token")
        one.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        one.minorticks_off()
    name_errors(left)
    left.legend()
    return picture


@style()
def splitting(rows: Sequence[dict], k: int) -> Figure:
    """The number of latents that belong to a concept, mean of 28 topics and Norwegian, by width.

    Source: Bricken and others 2023, feature splitting.
    """
    line = sorted(select(rows, activation="topk", k=k, seed=0), key=lambda row: row["width"])
    picture, axes = figure(8, 3.6)
    widths = [row["width"] for row in line]
    axes.plot(widths, [row["latents_per_topic"] for row in line])
    axes.set(xscale="log", xlabel="latents", ylabel="per concept", title=f"k = {k}, 29 concepts")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return picture


@style()
def scaling(rows: Sequence[dict], plane: Plane) -> Figure:
    """Normalised MSE over the width, a line per k, log-log; the fitted plane is dashed.

    Source: Gao and others 2024, figure 1, the scaling law of TopK autoencoders in width and k.
    """
    runs = select(rows, activation="topk", seed=0)
    picture, axes = figure(8.5, 4.6)
    widths = sorted({row["width"] for row in runs})
    for index, k in enumerate(sorted({row["k"] for row in runs})):
        line = sorted(select(runs, k=k), key=lambda row: row["width"])
        look = {"color": OKABE_ITO[index % 7], "marker": MARKERS[index % 7]}
        x = [row["width"] for row in line]
        axes.plot(x, [row["nmse"] for row in line], linestyle="", label=f"k = {k}", **look)
        axes.plot(x, plane(np.array(x), k), color=look["color"], linestyle="--", marker="")
    axes.set(xscale="log", yscale="log", xlabel="latents", ylabel="normalised MSE")
    axes.set_xticks(widths, [str(width) for width in widths])
    name_errors(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


# ---------------------------------------------------------------------------- seeds and controls


@style()
def histograms(
    sets: Mapping[str, Sequence[float]],
    title: str = "",
    *,
    xlabel: str = "",
    mark: float | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    bins: int = 40,
) -> Figure:
    """The distribution of each set of numbers: the share of its numbers per bin.

    Args:
        mark: where a vertical line is drawn.
        limits: of the bins; numbers beyond them count in the outermost bins.
    """
    picture, axes = figure(8.5, 4.2)
    edges = np.linspace(*limits, bins + 1)
    for index, (name, values) in enumerate(sets.items()):
        values = np.clip(as_array(values), *limits)
        heights = np.histogram(values, edges)[0] / max(len(values), 1)
        look = {"color": OKABE_ITO[index % 7], "linestyle": DASHES[index % 7]}
        axes.stairs(heights, edges, label=name, linewidth=2.5, fill=False, **look)
    if mark is not None:
        axes.axvline(mark, color="black", linestyle=":", marker="", linewidth=1.5)
    axes.set(title=title, xlabel=xlabel, ylabel="share", xlim=limits)
    axes.legend()
    return picture
