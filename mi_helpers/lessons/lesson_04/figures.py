"""The figures of lesson 04: numbers in, Figure out."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mi_helpers.picture import MARKERS, OKABE_ITO, style
from mi_helpers.plots import as_array, figure, name_series


@style()
def lens_against_model(series: Mapping[str, tuple], title: str = "") -> Figure:
    """Each direction as a point: what losing it costs a lens, and what it costs the model.

    Args:
        series: {label: (cost to the lens (k,), cost to the model (k,))}, nats.

    Source: Belrose et al. 2023, Tuned Lens, causal basis extraction.
    """
    picture, axes = figure(8, 5)
    drawn = []
    for index, (lens, model) in enumerate(series.values()):
        x, y = (np.maximum(as_array(each), 1e-5) for each in (lens, model))
        look = {"color": OKABE_ITO[index], "marker": MARKERS[index], "linestyle": ""}
        drawn += axes.plot(x, y, **look, markersize=8)
    every = np.concatenate([as_array(each) for pair in series.values() for each in pair])
    ends = [max(every.min(), 1e-5) / 2, every.max()]
    axes.plot(ends, ends, color="black", linestyle="--", marker="", linewidth=1.2)
    place = {"textcoords": "offset points", "ha": "right"}
    axes.annotate("as much", (ends[1], ends[1]), (-14, -4), **place)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="cost to the lens (nats)", ylabel="cost to the model (nats)")
    name_series(axes, drawn, series)
    return picture


@style()
def two_written(
    names: Sequence[str], right, wrong, labels: tuple[str, str], title: str = "", most: int = 6
) -> Figure:
    """Each part as a point: what it writes for the answer, across, and for the rival, up.

    Args:
        names: of the parts; right, wrong: what each writes (parts,), logits.
        labels: what the two axes are about.
        most: how many parts are named: those with the largest difference, and over a tenth of it.
    """
    right, wrong = as_array(right), as_array(wrong)
    picture, axes = figure(8, 5.2)
    axes.plot(right, wrong, linestyle="", marker="o", color=OKABE_ITO[0])
    size = np.abs(right - wrong)
    named = [index for index in np.argsort(-size)[:most] if size[index] > size.max() / 10]
    for index in named:
        at = right[index], wrong[index]
        others = [i for i in named if i != index] or [index]
        near = min(others, key=lambda i: np.hypot(right[i] - at[0], wrong[i] - at[1]))
        offset = (8, 8 if at[1] > wrong[near] else -14)  # away from the next name
        axes.annotate(names[index], at, offset, textcoords="offset points", fontsize=11)
    ends = [min(right.min(), wrong.min()), max(right.max(), wrong.max())]
    axes.plot(ends, ends, color="black", linestyle="--", marker="", linewidth=1.2)
    for draw_line in (axes.axhline, axes.axvline):
        draw_line(0, color="grey", marker="", linewidth=1)
    axes.margins(x=0.15, y=0.12)
    axes.set(title=title, xlabel=f"{labels[0]} (logits)", ylabel=f"{labels[1]} (logits)")
    return picture
