"""Data in, matplotlib Figure out: one look for the whole course. Nothing is computed here.

Amounts are cividis, effects around zero are PuOr, categories are Okabe and Ito's colours together
with markers and dashes, so that no figure depends on colour alone.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import matplotlib.rcsetup
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

AMOUNT, EFFECT = "cividis", "PuOr"
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
DPI = 100
MOST_PRINTED = 200  # a heatmap with more cells than this prints no values unless told to


@contextmanager
def style():
    """The course's rcParams, as a context or, `@style()`, as a decorator of a figure function."""
    look = {
        "axes.prop_cycle": matplotlib.rcsetup.cycler(
            color=OKABE_ITO, marker=MARKERS, linestyle=DASHES
        ),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
        "font.size": 13,
        "image.cmap": AMOUNT,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "svg.hashsalt": "mi-course",
    }
    with matplotlib.rc_context(look):
        yield


class Picture(Figure):
    """A Figure that no pyplot state knows, and that a notebook shows once, as a PNG."""

    def _repr_png_(self) -> bytes:
        return render(self)


def render(figure: Figure) -> bytes:
    """A figure's PNG bytes, the same for the same figure; a figure of pyplot's is closed."""
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)
    return stream.getvalue()


@style()
def figure(width: float = 8, height: float = 4.5, rows: int = 1, columns: int = 1, **kwargs):
    """A new Figure (inches) and its Axes: one, or an array of shape (rows, columns)."""
    picture = Picture(figsize=(width, height))
    axes = picture.subplots(rows, columns, **kwargs)
    return picture, axes


def as_array(values) -> np.ndarray:
    """Numbers as a float array: lists, arrays, and tensors of any dtype, device and gradient."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=float)


@style()
def heatmap(
    values,
    xlabels: Sequence | None = None,
    ylabels: Sequence | None = None,
    title: str = "",
    *,
    xlabel: str = "",
    ylabel: str = "",
    unit: str = "",
    centre_zero: bool = False,
    annotate: bool | None = None,
    form: str = "z.2f",
    limit: float | None = None,
    width: float | None = None,
    height: float | None = None,
) -> Figure:
    """Numbers of shape (rows, columns) as coloured cells, NaN left white.

    centre_zero  effects: a diverging map, symmetric around zero; otherwise amounts
    annotate     print each value; by default when there are at most 200 cells
    limit        the end of the colour scale, to keep it the same while a slider moves
    unit         the colour bar's label
    """
    values = as_array(values)
    if values.ndim != 2:
        raise ValueError(f"A heatmap needs numbers of shape (rows, columns), not {values.shape}.")
    rows, columns = values.shape
    annotate = values.size <= MOST_PRINTED if annotate is None else annotate
    picture, axes = figure(width or clamp(2 + 0.7 * columns), height or clamp(1.6 + 0.45 * rows))
    low, high = colour_limits(values, centre_zero, limit)
    image = axes.imshow(
        values, aspect="auto", cmap=EFFECT if centre_zero else AMOUNT, vmin=low, vmax=high
    )
    for axis, labels, count in ((axes.xaxis, xlabels, columns), (axes.yaxis, ylabels, rows)):
        name_ticks(axis, labels, count)
    if xlabels is not None and max(len(str(label)) for label in xlabels) > 3:
        axes.tick_params(axis="x", labelrotation=90 if columns > 12 else 45)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(False)
    picture.colorbar(image, ax=axes, label=unit)
    if annotate:
        print_values(axes, image, values, form)
    return picture


def clamp(inches: float) -> float:
    """A side that fits a page: 3 to 14 inches."""
    return min(max(inches, 3.0), 14.0)


def colour_limits(values: np.ndarray, centre_zero: bool, limit: float | None) -> tuple:
    """The two ends of a colour scale: (-limit, limit) around zero, else (smallest, limit)."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (-1.0, 1.0) if centre_zero else (0.0, 1.0)
    if centre_zero:
        reach = limit or float(np.abs(finite).max()) or 1.0
        return -reach, reach
    return float(finite.min()), float(finite.max()) if limit is None else limit


def name_ticks(axis, labels: Sequence | None, count: int) -> None:
    """One tick per cell where labels are given; ValueError when their number differs."""
    if labels is None:
        return
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels were given for {count} cells.")
    axis.set_ticks(range(count), [str(label) for label in labels])


def print_values(axes: Axes, image, values: np.ndarray, form: str) -> None:
    """Each finite value in its cell, in black or white, whichever contrasts with the cell."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if light else "white"
            axes.text(column, row, format(value, form), ha="center", va="center", color=colour)


@style()
def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    title: str = "",
    *,
    xlabel: str = "",
    form: str = "z.2f",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    width: float = 8,
) -> Figure:
    """Horizontal bars, each with its value: {name: value}, or {series: {name: value}}.

    reference  a dashed line, such as a chance level; limits: the axis' ends, kept under sliders
    """
    first = next(iter(values.values()), None)
    series = dict(values) if isinstance(first, Mapping) else {"": dict(values)}
    names = list(dict.fromkeys(name for each in series.values() for name in each))
    thick = 0.8 / len(series)
    picture, axes = figure(width, clamp(1.2 + 0.38 * len(names) * max(1, 0.7 * len(series))))
    for index, (label, each) in enumerate(series.items()):
        places = np.arange(len(names)) + (index - (len(series) - 1) / 2) * thick
        heights = as_array([each.get(name, np.nan) for name in names])
        hatch = ("", "//", "..", "xx")[index % 4]
        drawn = axes.barh(places, heights, thick, label=label, hatch=hatch, edgecolor="white")
        texts = [format(height, form) if np.isfinite(height) else "" for height in heights]
        axes.bar_label(drawn, texts, padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel)
    if limits is None:
        axes.margins(x=0.15)
    else:
        axes.set_xlim(limits)
    if reference is not None:
        axes.axvline(reference, color="black", linestyle="--", marker="", linewidth=1.5)
    if len(series) > 1:
        axes.legend()
    return picture


@style()
def lines(
    x,
    series: Mapping[str, Sequence],
    title: str = "",
    *,
    xlabel: str = "",
    ylabel: str = "",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    width: float = 8,
    height: float = 4.5,
) -> Figure:
    """One line per entry of {label: values}, each values as long as x, with markers where few."""
    x = as_array(x)
    picture, axes = figure(width, height)
    for label, values in series.items():
        values = as_array(values)
        if values.shape != x.shape:
            raise ValueError(f"'{label}' has {values.size} values for {x.size} places on x.")
        axes.plot(x, values, label=label, **({} if x.size <= 40 else {"marker": ""}))
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", marker="", linewidth=1.5)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set(**({} if limits is None else {"ylim": limits}))
    axes.set(**({"xscale": "log"} if log_x else {}), **({"yscale": "log"} if log_y else {}))
    if any(series):
        axes.legend()
    return picture


@style()
def before_after(
    before: Mapping[str, float],
    after: Mapping[str, float],
    title: str = "",
    *,
    xlabel: str = "",
    form: str = "z.2f",
    limits: tuple[float, float] | None = None,
    labels: tuple[str, str] = ("before", "after"),
    width: float = 9,
) -> Figure:
    """One row per name: a hollow circle before, a square after, and both numbers.

    limits  the axis' ends, to keep them under sliders; what lies beyond is drawn at the end
    """
    names, places = list(before), np.arange(len(before))
    first, second = (as_array([values[name] for name in names]) for values in (before, after))
    low, high = limits or (0.0, 1.05 * float(max(first.max(), second.max(), 1e-9)))
    left, right = np.clip(first, low, high), np.clip(second, low, high)
    picture, axes = figure(width, clamp(1.6 + 0.36 * len(names)))
    axes.hlines(places, left, right, color="0.6", linewidth=3)
    circle = {"marker": "o", "color": OKABE_ITO[0], "markerfacecolor": "white", "zorder": 4}
    square = {"marker": "s", "color": OKABE_ITO[5], "zorder": 3}
    for values, label, look in ((left, labels[0], circle), (right, labels[1], square)):
        look |= {"linestyle": "", "markersize": 9, "markeredgewidth": 2, "clip_on": False}
        axes.plot(values, places, label=label, **look)
    for place, old, new in zip(places, first, second, strict=True):
        weight = "bold" if abs(new - old) > 0.1 * (high - low) else "normal"
        text = f"{old:{form}} → {new:{form}}"
        axes.text(
            1.04, place, text, transform=axes.get_yaxis_transform(), va="center", weight=weight
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set(title=title, xlabel=xlabel, xlim=(low, high))
    axes.legend(loc="lower left", bbox_to_anchor=(1.0, 1.0), ncols=1, borderaxespad=0)
    return picture


@style()
def architecture_map(rows: Sequence, title: str = "", parallel: bool = False) -> Figure:
    """Every tensor's shape from token ids to logits, beside the stream that the blocks add to.

    rows      what `models.architecture` gives; block 0 is drawn, as the others repeat it
    parallel  attention and MLP read one and the same stream (GPT-NeoX)
    After the picture of the residual stream in A Mathematical Framework for Transformer Circuits
    (2021), section "High-Level Architecture".
    """
    branches = stream_branches(rows, parallel)
    lines = sum(len(steps) for _, steps, *_ in branches) + 1
    widest = max(per_token(row) for _, steps, *_ in branches[:-1] for row in steps)
    picture, axes = figure(11, 0.4 * lines + 1.5)
    axes.set(xlim=(0, 11), ylim=(lines - 0.4, -2.6))
    axes.axis("off")
    axes.text(0.2, -2.0, title, fontsize=15, weight="bold", va="center")
    for x, head in ((0.2, "stream"), (1.4, "step"), (3.0, "weights"), (5.9, "what it gives")):
        axes.text(x, -1.0, head, color="0.35", va="center")
    thin = {"color": "0.35", "linewidth": 1.5, "linestyle": "-", "marker": "", "zorder": 1}
    thick = thin | {"color": OKABE_ITO[0], "linewidth": 8}
    axes.plot([0.5, 0.5], [len(branches[0][1]) - 1, lines - len(branches[-1][1])], **thick)
    y, badge = 0, {"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": "0.35"}
    for number, (name, steps, reads, adds) in enumerate(branches):
        if number == len(branches) - 1:
            axes.text(1.4, y, repeats(rows), style="italic", va="center")
            y += 1
        end = y + len(steps) - 1
        axes.plot([1.1, 1.1], [y, end], **thin)
        axes.text(0.83, (y + end) / 2, name, color="0.35", rotation=90, ha="center", va="center")
        for place, drawn, sign in ((y, reads, "•"), (end, adds, "+")):
            if drawn:
                axes.plot([0.5, 1.1], [place, place], **thin)
                axes.text(0.5, place, sign, bbox=badge, ha="center", va="center")
        for row in steps:
            draw_step(axes, y, row, 2.6 / widest)
            y += 1
    return picture


def stream_branches(rows: Sequence, parallel: bool) -> list[tuple[str, list, bool, bool]]:
    """Steps that hang on the stream together: (name, steps, do they read it, are they added)."""
    block = [row for row in rows if row.name.startswith("blocks.0.")]
    first = rows.index(block[0])
    after = [row for row in rows[first:] if not row.name.startswith("blocks.")]
    mlp = [row.name for row in block].index("blocks.0.ln2")
    parts = [("attention", block[:mlp], True, True), ("MLP", block[mlp:], True, True)]
    if parallel:
        parts = [("attention, MLP", block, True, True)]
    return [("", list(rows[:first]), False, True), *parts, ("", after, True, False)]


def repeats(rows: Sequence) -> str:
    """The line for the blocks that are not drawn, and which of them see a window only."""
    said = [row.does.partition(" (")[2].rstrip(")") for row in rows if row.name.endswith(".attn")]
    some = [number for number, text in enumerate(said) if text]
    text = f"blocks 1 to {len(said) - 1}: the same shapes" if len(said) > 1 else "one block only"
    if not some:
        return text
    even = some == list(range(0, len(said), 2))
    which = "even blocks" if even else "blocks " + ", ".join(map(str, some))
    return f"{text}; attention in {which} sees the {said[some[0]]} only"


def per_token(row) -> int:
    """How many numbers a step gives per token."""
    return int(np.prod(row.activation[2:]))


def draw_step(axes: Axes, y: float, row, scale: float) -> None:
    """A step's name, its weights, and its output: a bar, one piece per head, and the shape."""
    weights = ", ".join(" × ".join(map(str, shape)) for shape in row.weights.values())
    weights = weights or ("embed's, tied" if "(tied)" in row.does else "–")
    axes.text(1.4, y, row.name.split(".")[-1], weight="bold", va="center")
    axes.text(3.0, y, weights, va="center")
    pieces = row.activation[2] if len(row.activation) > 3 else 1
    length = min(per_token(row) * scale, 2.9)  # the vocabulary does not fit
    each, colour = length / pieces, OKABE_ITO[4 if pieces == 1 else 1]
    left = [5.9 + i * each for i in range(pieces)]
    gap = {"edgecolor": "white", "linewidth": min(2, 18 * each)}
    axes.barh([y] * pieces, each, 0.55, left, color=colour, **gap)
    more = "…" if length < per_token(row) * scale else ""
    shape = " × ".join(map(str, row.activation))
    axes.text(5.95 + length, y, f"{more} {shape}", va="center")


# -- probing (lesson 02) -----------------------------------------------------------------------


@style()
def layer_panels(
    names: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence]],
    *,
    ylabels: Sequence[str] = (),
    xlabel: str = "layer",
    references: Sequence[float | None] = (),
    limits: Sequence[tuple[float, float] | None] = (),
    mark: int | None = None,
    width: float = 9.5,
    height: float = 4.2,
) -> Figure:
    """One panel per title, in each one line per label over the layers `names`, with one legend.

    panels      {title: {label: values}}; values (layers,), or (repeats, layers): then the line is
                their mean and the band goes from the smallest to the largest
    ylabels, references, limits  one entry per panel; a reference is a dashed horizontal line
    mark        a layer to point at with a vertical line
    """
    picture, axes = figure(width, height, columns=len(panels), squeeze=False)
    places, missing = np.arange(len(names)), [None] * len(panels)
    for index, (title, series) in enumerate(panels.items()):
        one = axes[0, index]
        for label, values in series.items():
            values = np.atleast_2d(as_array(values))
            if values.shape[1] != len(names):
                raise ValueError(f"'{label}' has {values.shape[1]} values for {len(names)} layers.")
            (line,) = one.plot(places, values.mean(0), label=label)
            if len(values) > 1:
                low, high = values.min(0), values.max(0)
                one.fill_between(places, low, high, color=line.get_color(), alpha=0.2, lw=0)
        if (reference := [*references, *missing][index]) is not None:
            one.axhline(reference, color="black", linestyle="--", marker="", linewidth=1.2)
        if mark is not None:
            one.axvline(mark, color="grey", linestyle=":", marker="", linewidth=1.5)
        one.set_xticks(places, names)
        one.set(title=title, xlabel=xlabel, ylim=[*limits, *missing][index])
        one.set_ylabel([*ylabels, *[""] * len(panels)][index])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        picture.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return picture


@style()
def probe_explorer(
    names: Sequence[str],
    scans: Mapping[str, Mapping[str, Sequence[float]]],
    layer: int,
    kind: str,
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Left: accuracy of every property's probe at one layer, its controls beside it. Right: the
    same series of one property over all layers.

    scans   {property: {series: accuracies (layers,)}}, all with the same series
    chance  {property: accuracy of always giving the commonest answer}, a small black bar
    """
    if not 0 <= layer < len(names):
        raise ValueError(f"There is no layer {layer}: choose 0 to {len(names) - 1}.")
    if kind not in scans:
        raise ValueError(f"There is no property {kind!r}: choose one of {', '.join(scans)}.")
    height = 1.7 + 0.7 * len(scans)
    picture = Picture(figsize=(11, height), layout="none")  # fixed margins take half the time
    picture.subplots_adjust(0.09, 1.1 / height, 0.985, 1 - 0.4 / height, wspace=0.12)
    left, right = picture.subplots(1, 2, width_ratios=[1.25, 1])
    series = list(scans[kind])
    thick, rows = 0.86 / len(series), np.arange(len(scans))
    for i, label in enumerate(series):
        values = as_array([each[label][layer] for each in scans.values()])
        places = rows + (i - (len(series) - 1) / 2) * thick
        hatch = ("", "//", "..", "xx")[i % 4]
        drawn = left.barh(places, values, thick, label=label, hatch=hatch, edgecolor="white")
        left.bar_label(drawn, [f"{v:.2f}" for v in values], padding=2, fontsize=9)
        right.plot(range(len(names)), as_array(scans[kind][label]))
    for row, each in enumerate(scans if chance else ()):
        left.plot([chance[each]] * 2, [row - 0.45, row + 0.45], "-k", marker="", linewidth=1.5)
    if chance:
        right.axhline(chance[kind], color="black", linestyle="-", marker="", linewidth=1.5)
    left.set_yticks(rows, scans)
    left.invert_yaxis()
    left.set(xlim=(0, 1.12), xlabel="accuracy on held-out text", title=f"layer {names[layer]}")
    right.axvline(layer, color="grey", linestyle=":", marker="", linewidth=1.5)
    right.set_xticks(range(len(names)), names)
    right.set(ylim=(0, 1.05), xlabel="layer", title=kind)
    picture.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=len(series))
    return picture


@style()
def on_a_circle(panels: Mapping[str, Sequence], names: Sequence[str]) -> Figure:
    """Where each class is put, points (n, 2), and a dotted line to its true place on the unit
    circle; one panel per title."""
    picture, axes = figure(4.6 * len(panels), 4.7, columns=len(panels), squeeze=False)
    turn = np.linspace(0, 2 * np.pi, 200)
    angles = 2 * np.pi * np.arange(len(names)) / len(names)
    places = np.stack([np.cos(angles), np.sin(angles)], 1)
    for one, (title, points) in zip(axes[0], panels.items(), strict=True):
        points = as_array(points)
        if points.shape != places.shape:
            raise ValueError(f"{len(names)} names need points of shape ({len(names)}, 2).")
        one.plot(np.cos(turn), np.sin(turn), color="lightgrey", linestyle="-", marker="")
        for true, got, name in zip(places, points, names, strict=True):
            one.plot(*np.stack([true, got], 1), color="grey", linestyle=":", marker="", lw=1.5)
            one.plot(*true, color="black", marker="|", linestyle="", markersize=8)
            one.plot(*got, color=OKABE_ITO[0], marker="o", linestyle="")
            one.text(*(1.2 * true), name, ha="center", va="center", fontsize=11)
        one.set(xlim=(-1.5, 1.5), ylim=(-1.4, 1.4), aspect="equal", title=title)
        one.set(xlabel="cosine", ylabel="sine")
    return picture


@style()
def sine_regions(grid, sides: Mapping[str, Sequence], curve, *, columns: int = 3) -> Figure:
    """Which part of the plane each probe calls 'above', in one panel per title, with the curve.

    grid   (x values (w,), y values (h,)); sides: {title: booleans (h, w)}; curve: y of each x
    """
    x, y = (as_array(each) for each in grid)
    rows = -(-len(sides) // columns)
    picture, axes = figure(3.4 * columns, 2.5 * rows, rows, columns, squeeze=False, sharey=True)
    for one, (title, above) in zip(axes.flat, sides.items(), strict=False):
        above = as_array(above)
        if above.shape != (len(y), len(x)):
            raise ValueError(f"'{title}' has shape {above.shape}, expected {(len(y), len(x))}.")
        one.contourf(x, y, above, levels=[-0.5, 0.5, 1.5], colors=["#DDDDDD", OKABE_ITO[4]])
        one.plot(x, as_array(curve), color="black", linestyle="-", marker="", linewidth=1.5)
        one.set(title=title)
    for one in axes.flat[len(sides) :]:
        one.set_axis_off()
    for one in axes[-1]:
        one.set_xlabel("x")
    for one in axes[:, 0]:
        one.set_ylabel("y")
    return picture
