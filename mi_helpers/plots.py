"""Data in, matplotlib Figure out: one look for the whole course. Nothing is computed here.

Amounts are cividis, effects around zero are PuOr, categories are Okabe and Ito's colours together
with markers and dashes, so that no figure depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, Unpack

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mi_helpers.picture import AMOUNT, EFFECT, HIGHEST, OKABE_ITO, Picture, render, style
from mi_helpers.picture import DASHES as DASHES
from mi_helpers.picture import DPI as DPI
from mi_helpers.picture import MARKERS as MARKERS

__all__ = ["Picture", "render", "style"]  # that figures need besides those below

MOST_PRINTED = 200  # a heatmap with more cells than this prints no values unless told how


class Frame(TypedDict, total=False):
    """What several figures take besides: the axes' labels with units, the size in inches."""

    xlabel: str
    ylabel: str
    width: float
    height: float


@style()
def figure(width: float = 8, height: float = 4.5, rows: int = 1, columns: int = 1, **kwargs):
    """A new Figure (inches) and its Axes: one, or an array of shape (rows, columns)."""
    picture = Picture(figsize=(width, height))
    axes = picture.subplots(rows, columns, **kwargs)
    return picture, axes


def as_array(values) -> np.ndarray:
    """Numbers as a float array: lists, arrays, and tensors of any dtype, device and gradient."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


@style()
def heatmap(
    values,
    xlabels: Sequence | None = None,
    ylabels: Sequence | None = None,
    title: str = "",
    *,
    unit: str = "",
    centre_zero: bool = False,
    form: str | None = None,
    limit: float | None = None,
    **frame: Unpack[Frame],
) -> Figure:
    """Numbers as coloured cells, NaN left white.

    Args:
        values: (rows, columns).
        xlabels, ylabels: a name per column, and per row.
        unit: the colour bar's label.
        centre_zero: effects, on a diverging map symmetric around zero; otherwise amounts.
        form: how each value is printed, such as ".1f"; "" prints none. None means "z.2f" in up to
            200 cells, and nothing in more.
        limit: the end of the colour scale, to keep it the same while a slider moves.

    Raises:
        ValueError: numbers of another shape, or labels of another number than the cells.
    """
    values = as_array(values)
    if values.ndim != 2:
        raise ValueError(f"A heatmap needs numbers of shape (rows, columns), not {values.shape}.")
    rows, columns = values.shape
    if form is None:
        form = "z.2f" if values.size <= MOST_PRINTED else ""
    width = frame.pop("width", clamp(2 + 0.7 * columns))
    picture, axes = figure(width, frame.pop("height", clamp(1.6 + 0.45 * rows, HIGHEST)))
    low, high = colour_limits(values, centre_zero, limit)
    image = axes.imshow(
        values, aspect="auto", cmap=EFFECT if centre_zero else AMOUNT, vmin=low, vmax=high
    )
    for axis, labels, count in ((axes.xaxis, xlabels, columns), (axes.yaxis, ylabels, rows)):
        name_ticks(axis, labels, count)
    if xlabels is not None and max(len(str(label)) for label in xlabels) > 3:
        axes.tick_params(axis="x", labelrotation=90 if columns > 12 else 45)
    axes.set(title=title, **frame)
    axes.spines[:].set_visible(False)
    picture.colorbar(image, ax=axes, label=unit)
    if form:
        print_values(axes, image, values, form)
    return picture


@style()
def effect_maps(
    panels: Mapping[str, Sequence],
    xlabels: Sequence[str],
    ylabels: Sequence[str],
    title: str = "",
    *,
    xlabel: str = "position",
    ylabel: str = "layer",
    unit: str = "normalised logit difference",
    limit: float = 1.0,
) -> Figure:
    """One map (rows, columns) per title, side by side, on one scale around zero.

    Realises the maps of "Locating and Editing Factual Associations in GPT" (Meng and others, 2022),
    figure 1, and of "Interpretability in the Wild" (Wang and others, 2022).
    """
    rows, columns = len(ylabels), len(xlabels)
    each = 0.4 + (0.5 if rows * columns <= 120 else 0.38) * columns
    wide = clamp(1.4 + len(panels) * max(3.2, each))
    high = clamp(2.2 + 0.36 * rows)
    picture = Picture(figsize=(wide, high))
    axes = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for one, (name, values) in zip(axes, panels.items(), strict=True):
        values = as_array(values)
        if values.shape != (rows, columns):
            raise ValueError(f"'{name}' has shape {values.shape}, expected {(rows, columns)}.")
        image = one.imshow(values, aspect="auto", cmap=EFFECT, vmin=-limit, vmax=limit)
        name_ticks(one.xaxis, xlabels, columns)
        name_ticks(one.yaxis, ylabels, rows)
        if max(map(len, map(str, xlabels))) > 2:
            one.tick_params(axis="x", labelrotation=90)
        one.spines[:].set_visible(False)
        one.set(title=name, xlabel=xlabel)
        if values.size <= 120:
            small = np.where(np.abs(values) < 0.005, np.nan, values)  # zeros would only be clutter
            print_values(one, image, small, "z.2f")
            for text in one.texts:
                text.set_fontsize(9)
    axes[0].set_ylabel(ylabel)
    picture.colorbar(image, ax=list(axes), label=unit, fraction=0.03, pad=0.01)
    if title:
        picture.suptitle(title, x=0.01, ha="left")
    return picture


def clamp(inches: float, most: float = 14.0) -> float:
    """A side that fits a page: 3 to `most` inches."""
    return min(max(inches, 3.0), most)


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


def name_series(place: Axes | Figure, drawn: Iterable, names: Iterable[str], **look) -> None:
    """A legend of the first things drawn, one per name; matplotlib's own drops names with "_"."""
    named = [pair for pair in zip(drawn, names, strict=False) if pair[1]]
    if named:
        place.legend(*zip(*named, strict=True), **look)


def print_values(axes: Axes, image, values: np.ndarray, form: str) -> None:
    """Each finite value in its cell, in black or white, whichever contrasts with the cell."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            colour = "black" if light else "white"
            text = format(value, form)
            said = axes.text(column, row, text, ha="center", va="center", color=colour)
            said.set_in_layout(False)  # it is inside its cell, so the layout need not measure it


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
    """Horizontal bars, each with its value printed.

    Args:
        values: {name: value}, or {series: {name: value}}.
        form: how each value is printed.
        reference: a dashed vertical line, such as a chance level.
        limits: the axis' ends, kept under sliders.
    """
    first = next(iter(values.values()), None)
    series = dict(values) if isinstance(first, Mapping) else {"": dict(values)}
    names = list(dict.fromkeys(name for each in series.values() for name in each))  # pyright: ignore[reportGeneralTypeIssues]
    thick = 0.8 / len(series)
    picture, axes = figure(
        width, clamp(1.2 + 0.38 * len(names) * max(1, 0.7 * len(series)), HIGHEST)
    )
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
        name_series(axes, axes.containers, series)
    return picture


@style()
def lines(
    x,
    series: Mapping[str, Sequence],
    title: str = "",
    *,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    **frame: Unpack[Frame],
) -> Figure:
    """One line per series, with markers where there are at most 40 points.

    Args:
        x: (points,).
        series: {label: values (points,)}.
        reference: a dashed horizontal line, such as a chance level.
        limits: the ends of the y axis, kept under sliders.
        log_x, log_y: logarithmic axes.

    Raises:
        ValueError: a series that is not as long as x.
    """
    x = as_array(x)
    picture, axes = figure(frame.pop("width", 8), frame.pop("height", 4.5))
    for label, values in series.items():
        values = as_array(values)
        if values.shape != x.shape:
            raise ValueError(f"'{label}' has {values.size} values for {x.size} places on x.")
        axes.plot(x, values, label=label, **({} if x.size <= 40 else {"marker": ""}))
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", marker="", linewidth=1.5)
    axes.set(title=title, **frame)
    axes.set(**({} if limits is None else {"ylim": limits}))
    axes.set(**({"xscale": "log"} if log_x else {}), **({"yscale": "log"} if log_y else {}))
    name_series(axes, axes.get_lines(), series)
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

    Args:
        before, after: {name: value}, with the same names.
        form: how each value is printed.
        limits: the axis' ends, kept under sliders; what lies beyond is drawn at the end.
        labels: what the circle and the square stand for.
    """
    names, places = list(before), np.arange(len(before))
    first, second = (as_array([values[name] for name in names]) for values in (before, after))
    low, high = limits or (0.0, 1.05 * float(max(first.max(), second.max(), 1e-9)))
    left, right = np.clip(first, low, high), np.clip(second, low, high)
    picture, axes = figure(width, clamp(1.6 + 0.36 * len(names), HIGHEST))
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
    where = {"loc": "lower left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0}
    name_series(axes, axes.get_lines(), labels, **where)
    return picture


@style()
def architecture_map(rows: Sequence, title: str = "", parallel: bool = False) -> Figure:
    """Every tensor's shape from token ids to logits, beside the stream that the blocks add to.

    Args:
        rows: what `architecture` returns; block 0 is drawn, as the others repeat it.
        parallel: attention and MLP read the same stream (GPT-NeoX).

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "High-Level
    Architecture": the picture of the residual stream.
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
    """The steps between two visits to the stream: (name, steps, read it?, added to it?)."""
    block = [row for row in rows if row.name.startswith("blocks.0.")]
    first = rows.index(block[0])
    after = [row for row in rows[first:] if not row.name.startswith("blocks.")]
    mlp = [row.name for row in block].index("blocks.0.ln2")
    parts = [("attention", block[:mlp], True, True), ("MLP", block[mlp:], True, True)]
    if parallel:
        parts = [("attention, MLP", block, True, True)]
    return [("", list(rows[:first]), False, True), *parts, ("", after, True, False)]


def repeats(rows: Sequence) -> str:
    """The line that stands for the blocks not drawn, and says which of them see only a window."""
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


@style()
def layer_panels(
    names: Sequence[str],
    panels: Mapping[str, Mapping[str, Sequence]],
    *,
    ylabels: Sequence[str] = (),
    references: Sequence[float | None] = (),
    limits: Sequence[tuple[float, float] | None] = (),
    mark: int | None = None,
    **frame: Unpack[Frame],
) -> Figure:
    """One panel per title, and in each one line per label over the layers, with one legend.

    Args:
        names: what each layer is called on the x axis.
        panels: {title: {label: values}}; values (layers,), or (repeats, layers): then the line is
            their mean, and the band reaches from the smallest to the largest.
        ylabels: the y axis' label, one per panel.
        references: the height of a dashed line, or None, one per panel.
        limits: the ends of the y axis, or None, one per panel.
        mark: a layer to point at with a vertical line.

    Raises:
        ValueError: a series that has another number of values than there are layers.
    """
    width, height = frame.pop("width", 9.5), frame.pop("height", 4.2)
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
        one.set(title=title, ylim=[*limits, *missing][index], **{"xlabel": "layer"} | frame)
        one.set_ylabel([*ylabels, *[""] * len(panels)][index])
    labels = next(iter(panels.values()), ())
    if len(labels) > 1:
        where = {"loc": "outside lower center", "ncols": min(4, len(labels))}
        name_series(picture, axes[0, 0].get_lines(), labels, **where)
    return picture
