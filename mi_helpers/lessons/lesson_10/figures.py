"""Lesson 10's figures: the slider, dose and response, what each family pays."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from mi_helpers.lessons.lesson_10.experiments import Lab, marked
from mi_helpers.picture import Picture
from mi_helpers.plots import OKABE_ITO, figure, heatmap, name_series, style
from mi_helpers.steering import steered

PANELS = ("share of topical words\nthat are the topic's", "cost, nats per answer")
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Slider:
    """`figure(dose, how)`: what the model writes at a dose, above what it gets and what it pays.

    Args:
        ways: {name: dose -> steering}.
        curves: {name: (doses (n,), the response (n, 2))}, of the same ways; None draws the text
            alone.
        most: the highest dose.
    """

    def __init__(
        self,
        lab: Lab,
        site,
        topic: str,
        ways: Mapping[str, Callable],
        curves: Curves | None = None,
        most: float = 32.0,
        rows: int = 3,
    ):
        self.lab, self.site, self.topic, self.ways = lab, site, topic, ways
        self.curves, self.most, self.rows = curves, most, rows

    def figure(self, dose: float, how: str) -> Figure:
        """The figure at a dose of one way.

        Raises:
            ValueError: a way that is not there, or a dose that is out of range.
        """
        if how not in self.ways:
            raise ValueError(f"There is no {how!r}: choose {' or '.join(self.ways)}.")
        if not 0 <= dose <= self.most:
            raise ValueError(
                f"A dose of {dose:g} is out of range: it goes from 0 to {self.most:g}."
            )
        with steered(self.lab.model, self.site, self.ways[how](dose)):
            ids = self.lab.write(18, self.rows)
        tokenizer, length = self.lab.model.tokenizer, self.lab.starts.shape[1]
        begun = [tokenizer.decode(row[:length], skip_special_tokens=True) for row in ids]
        written = [marked(text, self.topic) for text in self.lab.texts(ids)]
        lines = [f"{start} |{text}" for start, text in zip(begun, written, strict=True)]
        return slider_figure(lines, dose, how, self.curves)


@style()
def slider_figure(lines: list[str], dose: float, how: str, curves: Curves | None) -> Figure:
    """Texts, and under them the two curves of each way, with a line at the dose.

    Args:
        lines: the texts, the topic's words in [[ ]].
        curves: as `Slider` takes them.
    """
    said = "\n".join(textwrap.fill(line, 92, subsequent_indent="    ") for line in lines)
    # The text's height is the same at every dose: a figure that jumps is hard to compare.
    high = 0.4 + 0.5 * len(lines)
    picture = Picture(figsize=(10, high + (3.4 if curves else 0)))
    grid = picture.add_gridspec(
        2 if curves else 1, 2, height_ratios=[high, 3.4][: 1 + bool(curves)]
    )
    top = picture.add_subplot(grid[0, :])
    top.axis("off")
    top.set_title(f"{how}, dose {dose:g}")
    top.text(0, 1, said, va="top", family="monospace", fontsize=11, transform=top.transAxes)
    if curves:
        panels = [picture.add_subplot(grid[1, column]) for column in range(2)]
        draw_curves(picture, panels, curves)
        for axes in panels:
            axes.axvline(dose, color="black", linestyle=":", marker="", linewidth=1.5)
    return picture.reads(f"The model writes: {' / '.join(lines)}")


def draw_curves(picture: Figure, panels, curves: Curves) -> None:
    """A line for each way in both panels, and one legend; a range of controls as a band."""
    for column, axes in enumerate(panels):
        for index, (name, (doses, response)) in enumerate(curves.items()):
            drawn = np.atleast_3d(np.asarray(response).T).T  # (repeats, doses, 2)
            values = drawn[:, :, column]
            colour = OKABE_ITO[index]
            axes.plot(doses, values.mean(0), label=name, color=colour)
            if len(values) > 1:
                low, high = values.min(0), values.max(0)
                axes.fill_between(doses, low, high, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="dose", ylabel=PANELS[column])
    panels[0].set_ylim(-0.03, 1.03)
    where = {"loc": "outside lower center", "ncols": 4}
    name_series(picture, panels[0].get_lines(), curves, **where)


@style()
def response_figure(curves: Curves) -> Figure:
    """What each dose does and what it costs, for each way; a band from the least to the most of
    repeats.

    Args:
        curves: {name: (doses (n,), response (n, 2) or (repeats, n, 2))}.

    Source: Templeton et al. 2024, "Scaling Monosemanticity", steering with one feature; the second
    panel is the cost that a demonstration leaves out.
    """
    picture, panels = figure(10, 4.2, columns=2)
    draw_curves(picture, panels, curves)
    return picture


def family_figure(costs: Mapping[str, Mapping[str, float]]) -> Figure:
    """What each family pays under each steering, nats per answer, dearest first.

    Args:
        costs: {steering: {family: nats}}.
    """
    first = next(iter(costs.values()))
    names = sorted(first, key=lambda name: -first[name])
    table = [[each[name] for name in names] for each in costs.values()]
    look = {"unit": "nats per answer", "width": 11, "height": 1.9 + 0.5 * len(table)}
    return heatmap(table, names, list(costs), centre_zero=True, form="z.1f", **look)


@style()
def fork_panels(panels: Mapping[str, Mapping], xlabel: str, ylabel: str) -> Figure:
    """One panel per title: {label: (doses, shares)}, with what an ideal reader has, if given, as
    two short lines at dose 0.

    Args:
        panels: {title: {label: (doses (n,), values (n,))}}; a label "ideal reader" is two numbers.
    """
    picture, axes = figure(10, 4.6, columns=len(panels), squeeze=False, sharey=True)
    for one, (title, series) in zip(axes[0], panels.items(), strict=True):
        lines = {name: each for name, each in series.items() if name != "ideal reader"}
        for name, (doses, values) in lines.items():
            one.plot(doses, values, label=name)
        for value in series.get("ideal reader", ()):
            one.plot([0], [value], marker="_", markersize=26, color="black", linestyle="")
        one.set(title=title, xlabel=xlabel, ylim=(-0.03, 1.03))
        one.axvline(0, color="grey", linestyle=":", marker="", linewidth=1)
    axes[0, 0].set_ylabel(ylabel)
    last = axes[0, -1].get_lines()
    name_series(picture, last, lines, loc="outside lower center", ncols=2)
    return picture
