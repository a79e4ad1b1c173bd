"""The figures of lesson 02: data in, Figure out. Nothing is computed here."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mi_helpers.plots import OKABE_ITO, Picture, as_array, bars, figure, name_series, style


def verb_reading(reader, text: str) -> Figure:
    """What a probe on each layer reads at the last token of a text, and what the model says next.

    Args:
        reader: a `VerbReader`, whose `read(text)` gives {layer: p(plural)} and the model's own.

    Raises:
        ValueError: a text that the model cannot read.
    """
    by_layer, verb = reader.read(text)
    rows = {"embedding" if n == "embed" else f"layer {n}": p for n, p in by_layer.items()}
    title = f"…{text[-40:]} …" if len(text) > 40 else f"{text} …"
    look = {"limits": (0, 1.15), "xlabel": "p(the subject is plural)"}
    drawn = bars(rows | {"the model's verb": verb}, title, **look)
    return drawn.reads(f"The model's own verb is plural with a probability of {verb:.2f}.")


@style()
def planes(panels: Mapping[str, tuple], y: Sequence[bool], names: tuple[str, str]) -> Figure:
    """Points in the plane of their two principal directions, and arrows for other directions.

    Args:
        panels: {title: (points (n, 2), {name: arrow (2,)})}; an arrow is the part in the plane of a
            unit vector: as long as the dotted circle's radius where it lies in the plane.
        y: which points are of the first class; names: of the two classes.
    """
    picture, axes = figure(4.3 * len(panels), 4.9, columns=len(panels), squeeze=False)
    y, turn, drawn = np.asarray(y, dtype=bool), np.linspace(0, 2 * np.pi, 200), []
    for one, (title, (points, arrows)) in zip(axes[0], panels.items(), strict=True):
        points, drawn = as_array(points), []
        for kind, colour, marker, size in ((y, OKABE_ITO[5], "^", 8), (~y, OKABE_ITO[0], "o", 3.5)):
            look = {"marker": marker, "linestyle": "", "alpha": 0.6, "markersize": size}
            look |= {"markerfacecolor": "none"} if marker == "^" else {}
            drawn += one.plot(*points[kind].T, color=colour, **look)
        reach = 0.75 * np.abs(points).max()
        circle = {"color": "0.5", "linestyle": ":", "marker": "", "linewidth": 1.2}
        one.plot(reach * np.cos(turn), reach * np.sin(turn), **circle)
        for place, arrow in enumerate(arrows.values()):
            colour, dash = (("black", "-"), (OKABE_ITO[2], "--"))[place % 2]
            end = reach * as_array(arrow)
            look = {"color": colour, "linestyle": dash, "marker": "", "linewidth": 3, "zorder": 3}
            drawn += one.plot([0, end[0]], [0, end[1]], **look)
            one.plot(*end, color=colour, marker="D", linestyle="", markersize=7, zorder=3)
        one.set(title=title, xlabel="first direction", aspect="equal", adjustable="datalim")
    axes[0, 0].set_ylabel("second direction")
    labels = [*names, *(name for _, arrows in panels.values() for name in arrows)]
    where = {"loc": "outside lower center", "ncols": 4}
    name_series(picture, drawn, list(dict.fromkeys(labels)), **where)
    return picture


@style()
def probe_explorer(
    names: Sequence[str],
    scans: Mapping[str, Mapping[str, Sequence[float]]],
    layer: str,
    property: str,
) -> Figure:
    """Left: the accuracy of every property's probe at one layer, beside its controls. Right: the
    same series of one property over all layers.

    Args:
        names: of the layers.
        scans: {property: {series: accuracies (layers,)}}, all with the same series.
        layer: its name; property: that of the right panel.

    Raises:
        ValueError: no such layer or property.
    """
    if layer not in names:
        raise ValueError(f"There is no layer {layer!r}: choose one of {', '.join(names)}.")
    if property not in scans:
        raise ValueError(f"There is no property {property!r}: choose one of {', '.join(scans)}.")
    at, height = list(names).index(layer), 1.7 + 0.7 * len(scans)
    picture = Picture(figsize=(11, height), layout="none")  # fixed margins take half the time
    picture.subplots_adjust(0.09, 1.1 / height, 0.985, 1 - 0.4 / height, wspace=0.12)
    left, right = picture.subplots(1, 2, width_ratios=[1.25, 1])
    series = list(scans[property])
    thick, rows = 0.86 / len(series), np.arange(len(scans))
    for i, label in enumerate(series):
        values = as_array([each[label][at] for each in scans.values()])
        places = rows + (i - (len(series) - 1) / 2) * thick
        hatch = ("", "//", "..", "xx")[i % 4]
        drawn = left.barh(places, values, thick, label=label, hatch=hatch, edgecolor="white")
        left.bar_label(drawn, [f"{v:.2f}" for v in values], padding=2, fontsize=9)
        right.plot(range(len(names)), as_array(scans[property][label]))
    left.set_yticks(rows, scans)
    left.invert_yaxis()
    left.set(
        xlim=(0, 1.12),
        xlabel="accuracy on held-out text",
        title="embedding" if layer == "embed" else f"layer {layer}",
    )
    right.axvline(at, color="grey", linestyle=":", marker="", linewidth=1.5)
    right.set_xticks(range(len(names)), names)
    right.set(ylim=(0, 1.05), xlabel="layer", title=property)
    picture.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=len(series))
    return picture


@style()
def on_a_circle(panels: Mapping[str, Sequence], names: Sequence[str]) -> Figure:
    """The predicted place of each class, and a dotted line to its true place on the unit circle.

    Args:
        panels: {title: points (n, 2)}; names: of the n classes, in their order on the circle.

    Raises:
        ValueError: points of another shape.
    """
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
    """The part of the plane that each probe calls 'above', in one panel per title, and the curve.

    Args:
        grid: (x values (w,), y values (h,)).
        sides: {title: booleans (h, w)}; curve: y of each x, (w,).

    Raises:
        ValueError: booleans of another shape.
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
