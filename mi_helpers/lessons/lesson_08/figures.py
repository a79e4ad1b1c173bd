"""Lesson 08's figures: scores, predictions, interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mi_helpers.circuits.figures import ADDS, intervention_figure
from mi_helpers.circuits.interventions import intervene
from mi_helpers.circuits.queries import QKAttribution
from mi_helpers.circuits.replacement import Coders
from mi_helpers.lessons.lesson_08.controls import Singles
from mi_helpers.lessons.lesson_08.stories import Outcome, Story, changes, gap_change
from mi_helpers.models import LanguageModel
from mi_helpers.plots import OKABE_ITO, figure, heatmap, style

SCORES = ("replacement", "completeness")
MARKS = {"suppress": ("o", OKABE_ITO[0]), "swap": ("s", OKABE_ITO[1]), "null": ("D", "white")}


@style()
def score_figure(table: Mapping[str, np.ndarray]) -> Figure:
    """Both scores under each condition: a dot for each prompt, a bar and a number at the median.

    Args:
        table: `score_table`'s.

    Source: the comparison of graph scores in Ameisen et al. 2025, "Circuit Tracing".
    """
    picture, axes = figure(10, 1.4 + 0.5 * len(table), 1, 2, sharey=True)
    for column, (one, name) in enumerate(zip(axes, SCORES, strict=True)):
        for row, values in enumerate(table.values()):
            x = values[:, column]
            y = row + 0.25 * np.linspace(-1, 1, len(x))
            one.plot(x, y, linestyle="", marker="o", markersize=4, alpha=0.6, color=ADDS)
            one.plot(
                [np.median(x)] * 2, [row - 0.4, row + 0.4], color="black", marker="", linestyle="-"
            )
            one.text(1.02, row, f"{np.median(x):.2f}", va="center", fontsize=11)
        one.set(xlim=(0, 1.0), xlabel=f"{name} score", ylim=(len(table) - 0.5, -0.5))
    axes[0].set_yticks(range(len(table)), list(table))
    return picture


def qk_map(found: QKAttribution, texts: Sequence[str]) -> Figure:
    """A head's score as a map: products summed by the token at which each side was written. Rows
    are what the query read, columns what the key read; biases are left out.

    Source: Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions".
    """
    at = torch.tensor([node.position for node in found.nodes])
    belongs = torch.nn.functional.one_hot(at, len(texts)).float()
    table = belongs.T @ found.products[:-1, :-1] @ belongs
    names = [_visible(text) for text in texts]
    return heatmap(
        table,
        names,
        names,
        unit="added to the score",
        centre_zero=True,
        xlabel="written at …, read by the key",
        ylabel="written at …,\nread by the query",
    )


def _visible(text: str) -> str:
    return text.strip() or repr(text)


@style()
def prediction_figure(sorts: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Observed against predicted changes of the gap, with a panel for each sort of stories and a
    mark for each intervention; misses have a cross.

    Source: Ameisen et al. 2025, "Validating Attribution Graph Hypotheses with Interventions".
    """
    picture, axes = figure(12, 4.6, 1, len(sorts), sharex=True, sharey=True, squeeze=False)
    for one, (name, outcomes) in zip(axes[0], sorts.items(), strict=True):
        for what, (marker, face) in MARKS.items():
            these = [o for o in outcomes if o.what == what]
            x, y = [o.predicted for o in these], [o.observed for o in these]
            one.scatter(x, y, 60, marker=marker, facecolor=face, edgecolor="black", label=what)
        missed = [o for o in outcomes if not o.hit]
        one.scatter([o.predicted for o in missed], [o.observed for o in missed], 40,
                    marker="x", color="black", label="a miss", zorder=3)  # fmt: skip
        one.set(title=name, xlabel="predicted change of the gap")
        one.locator_params(axis="x", nbins=6)
    low = min(min(o.predicted, o.observed) for some in sorts.values() for o in some)
    for one in axes[0]:
        one.plot([low, 0], [low, 0], color="0.6", linestyle="--", marker="", zorder=0)
    axes[0, 0].set_ylabel("observed change")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


@style()
def singles_figure(data: Singles) -> Figure:
    """Features removed one at a time, a dot each: observed against predicted changes of the gap,
    with less of the model held constant from panel to panel."""
    panels = (
        ("all else held", "by its own edges", data.direct, data.held),
        ("MLPs answer", "over all paths", data.paths, data.frozen),
        ("attention answers, too", "over all paths", data.paths, data.recomputed),
    )
    picture, axes = figure(12, 4.4, 1, 3)
    for one, (title, by, x, y) in zip(axes, panels, strict=True):
        one.plot(x, y, linestyle="", marker="o", markersize=5, alpha=0.5, color=ADDS)
        _diagonal(one)
        one.set(title=title, xlabel=f"predicted change,\n{by}")
    axes[0].set_ylabel("observed change of the gap")
    return picture


def _diagonal(axes: Axes) -> None:
    """A dashed line where both coordinates are equal."""
    ends = [min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())]
    axes.plot(ends, ends, color="0.6", linestyle="--", marker="", zorder=0)


class InterventionExplorer:
    """`explorer(story, factor, swap, attention)`: a figure of the next token before and after.

    factor multiplies the story's features; with `swap` the partner's are put in, too.

    Args:
        stories: {name: story}.
    """

    def __init__(self, model: LanguageModel, coders: Coders, stories: Mapping[str, Story]):
        if not stories:
            raise ValueError("Give the explorer at least one story: {'a name': story}.")
        self.model, self.coders, self.stories = model, coders, dict(stories)

    def __call__(
        self, story: str, factor: float = 0.0, swap: bool = False, attention: str = "frozen"
    ) -> Figure:
        if story not in self.stories:
            raise ValueError(f"There is no story {story!r}: choose one of {list(self.stories)}.")
        told = self.stories[story]
        q = told.question
        factors, values = changes(told, "swap" if swap else "suppress", factor)
        result = intervene(
            self.model, self.coders, q.prompt, factors, values=values, attention=attention
        )
        change = gap_change(self.model, q, result)
        put_in = ", swapped" if swap else ""
        title = f"{told.step} × {factor:g}{put_in}: gap {told.gap:.1f} → {told.gap + change:.1f}"
        return intervention_figure(result, title)
