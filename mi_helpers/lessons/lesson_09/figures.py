"""The figures of lesson 09. Numbers in, Figure out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mi_helpers.lessons.lesson_09.experiments import (
    VERDICTS,
    Named,
    Unit,
    correlation,
    interval,
    predicted,
)
from mi_helpers.plots import AMOUNT, OKABE_ITO, Picture, figure, style
from mi_helpers.saes.examples import Context
from mi_helpers.saes.name_map import NameMap
from mi_helpers.views.tokens import ink

LINE = 88  # characters of a context
LINES = 7  # contexts in the game
SAID = 46  # characters of a name above the game
NAMES, WIDTH = 18, 66  # beside the map: how many, and how many characters of each


def fit(text: str, length: int) -> str:
    """A text in one line of so many characters at most; … says that there is more."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def cut(context: Context, length: int = LINE) -> tuple[list[str], range]:
    """The tokens of a context around the one that it is for, so that they fit on a line, and which
    they are; line ends and tabs as blanks."""
    tokens = [" ".join(f" {word} ".splitlines()).replace("\t", " ")[1:-1] for word in context.words]
    low, high = context.at, context.at + 1
    while True:
        size = sum(map(len, tokens[low:high]))
        left = low > 0 and size + len(tokens[low - 1]) <= length * 0.7
        right = high < len(tokens) and size + len(tokens[high]) <= length
        if left:
            low -= 1
        elif right:
            high += 1
        else:
            return tokens[low:high], range(low, high)


def draw_line(axes, y: float, context: Context, highest: float, says: Sequence[bool]) -> None:
    """A context as text: the stronger the unit fires, the brighter the ground; where the name says
    that it fires, the token is underlined."""
    tokens, places = cut(context)
    x = 0
    for token, place in zip(tokens, places, strict=True):
        value = context.values[place] / max(highest, 1e-9)
        width = len(token)
        if value > 0.05:
            colour = matplotlib.colors.to_hex(matplotlib.colormaps[AMOUNT](min(value, 1.0)))
            axes.barh(y, width, 0.72, left=x, color=colour, zorder=1)
        for offset, character in enumerate(token):
            look = {"family": "monospace", "ha": "center", "va": "center", "fontsize": 11}
            text = ink(colour) if value > 0.05 else "black"
            if character != " ":
                axes.text(x + offset + 0.5, y, character, color=text, zorder=3, **look)
        if says[place]:
            look = {"color": OKABE_ITO[5], "linewidth": 3, "linestyle": "-", "marker": ""}
            axes.plot([x + width - len(token.strip()), x + width], [y + 0.43] * 2, **look)
        x += width


@style()
def game(units: Mapping[int, Unit], latent: int, name: str) -> Figure:
    """The name game: contexts of a latent that are seen, where a name is true in them, and how well
    the name does on contexts held out.

    Raises:
        ValueError: the name is none.
    """
    unit = units[latent]
    seen, held = unit.examples.seen.top[:LINES], unit.examples.held
    says, _ = predicted(name, seen)
    score = correlation(*predicted(name, [*held.top, *held.random]))
    picture = Picture(figsize=(11.5, 0.6 + 0.52 * len(seen)), layout="none")
    axes = picture.add_axes((0.01, 0.02, 0.98, 0.84))
    axes.set(xlim=(0, LINE + 2), ylim=(len(seen) - 0.4, -0.7))
    axes.axis("off")
    for y, (context, true) in enumerate(zip(seen, says, strict=True)):
        draw_line(axes, y, context, unit.examples.highest, true)
    title = f"latent {latent}     score on text held out: {score:.2f}     “{fit(name, SAID)}”"
    picture.suptitle(title, x=0.01, ha="left")
    return picture


@style()
def verdicts(found: Mapping[str, Sequence[Named]]) -> Figure:
    """For each kind of unit and explainer, how many names are which: bars of three parts."""
    picture, axes = figure(10.5, 1.6 + 0.5 * len(found))
    places = np.arange(len(found))
    left = np.zeros(len(found))
    look = dict(
        zip(VERDICTS, (("", OKABE_ITO[2]), ("//", OKABE_ITO[5]), ("", "0.85")), strict=True)
    )
    for verdict, (hatch, colour) in look.items():
        counts = np.array([Counter(n.verdict for n in some)[verdict] for some in found.values()])
        share = counts / np.array([max(len(some), 1) for some in found.values()])
        drawn = axes.barh(
            places,
            share,
            0.7,
            left=left,
            label=verdict,
            color=colour,
            hatch=hatch,
            edgecolor="white",
        )
        axes.bar_label(drawn, [f"{s:.0%}" if s >= 0.03 else "" for s in share], label_type="center")
        left += share
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the units")
    picture.legend(loc="outside upper center", ncols=3)
    return picture


@style()
def right_by_score(found: Mapping[str, Sequence[Named]], edges: Sequence[float]) -> Figure:
    """How often a name is right, by its score, with 95 % intervals."""
    picture, axes = figure(9, 4.2)
    middles = np.arange(len(edges) - 1)
    for number, (kind, some) in enumerate(found.items()):
        x, y, low, high = [], [], [], []
        for index, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            there = [n.right for n in some if a <= n.score < b]
            if there:
                ends = interval(sum(there), len(there))
                x.append(middles[index] + 0.08 * (number - 1))
                y.append(np.mean(there))
                low.append(y[-1] - ends[0])
                high.append(ends[1] - y[-1])
        axes.errorbar(x, y, np.maximum([low, high], 0), label=kind, capsize=4)
    names_ = [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)]
    axes.set_xticks(middles, ["below " + f"{edges[1]:g}", *names_[1:-1], f"{edges[-2]:g} and more"])
    axes.set(ylim=(-0.02, 1.02), xlabel="score of the name", ylabel="share that is right")
    axes.legend()
    return picture


@style()
def name_map(chart: NameMap, names: Sequence[str], group: int) -> Figure:
    """The map of names: a dot for each unit, those of a group filled; beside it the group's names.

    Args:
        names: in the order of the map.
        group: the number of a cluster.

    Raises:
        ValueError: there is no such group.
    """
    if not 0 <= group < len(chart.titles):
        raise ValueError(f"There is no group {group}: there are 0 to {len(chart.titles) - 1}.")
    picture = Picture(figsize=(11.5, 5.6), layout="none")
    left = picture.add_axes((0.01, 0.02, 0.46, 0.88))
    mine = chart.cluster == group
    left.scatter(*chart.xy[~mine].T, s=22, facecolors="none", edgecolors="0.6")
    left.scatter(*chart.xy[mine].T, s=40, color=OKABE_ITO[0])
    for number, title in enumerate(chart.titles):
        middle = chart.xy[chart.cluster == number].mean(0)
        look = {"fontsize": 11, "weight": "bold"} if number == group else {"fontsize": 8}
        look |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}}
        left.text(*middle, title.split(",")[0], ha="center", va="center", **look)
    left.axis("off")
    right = picture.add_axes((0.49, 0.02, 0.5, 0.88))
    right.axis("off")
    some = np.flatnonzero(mine)
    for line, i in enumerate(some[:NAMES]):
        text = f"{chart.unit[i]}   {names[i]}"
        right.text(0, 1 - line / NAMES, fit(text, WIDTH), va="top", fontsize=11)
    more = f", {NAMES} of them" if len(some) > NAMES else ""
    title = f"“{chart.titles[group]}”: {len(some)} of {len(names)} names{more}"
    picture.suptitle(title, x=0.01, ha="left")
    return picture
