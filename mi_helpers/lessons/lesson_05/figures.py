"""The figures of lesson 05: maps of heads, patterns, the training log, a circuit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from mi_helpers.heads import SCORES, head_name, pattern_scores
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_05.ioi import ROLES, Node
from mi_helpers.models import LanguageModel
from mi_helpers.plots import (
    AMOUNT,
    EFFECT,
    MOST_PRINTED,
    OKABE_ITO,
    Picture,
    as_array,
    clamp,
    colour_limits,
    figure,
    print_values,
    style,
)

MOST_TOKENS = 48  # of a pattern that is drawn
ROLE_MEANS = {
    "IO": "receiver",
    "S1": "giver",
    "S2": "giver again",
    "END-2": "two before",
    "END": "the last word",
}


@style()
def head_maps(
    panels: Mapping[str, Sequence],
    *,
    unit: str = "",
    centre_zero: bool = False,
    limit: float | None = None,
    form: str = "z.2f",
    columns: int = 3,
) -> Figure:
    """One panel per title, each (n_layers, n_heads) numbers as cells, all on one colour scale.

    After Olsson et al. 2022, In-context Learning and Induction Heads, where each head is a point of
    such scores; the values are printed in models with up to 200 heads.
    """
    values = {title: as_array(each) for title, each in panels.items()}
    rows = -(-len(values) // columns)
    layers, heads = next(iter(values.values())).shape
    width = min(len(values), columns) * clamp(0.75 * heads + 0.4) + 0.9
    picture, axes = figure(
        min(width, 14), rows * clamp(0.42 * layers + 1.2), rows, columns, squeeze=False
    )
    low, high = colour_limits(np.stack(list(values.values())), centre_zero, limit)
    for one, (title, each) in zip(axes.flat, values.items(), strict=False):
        colours = EFFECT if centre_zero else AMOUNT
        image = one.imshow(each, aspect="auto", cmap=colours, vmin=low, vmax=high)
        one.set(title=title, xlabel="head")
        one.set_xticks(range(0, heads, -(-heads // 12)))
        one.set_yticks(range(0, layers, -(-layers // 13)))
        one.spines[:].set_visible(False)
        if each.size <= MOST_PRINTED:
            print_values(one, image, each, form)
    for one in list(axes.flat)[len(values) :]:
        one.set_axis_off()
    for one in axes[:, 0]:
        one.set_ylabel("layer")
    picture.colorbar(image, ax=axes, label=unit)
    return picture


@style()
def word_maps(
    panels: Mapping[str, Sequence], words: Sequence[str], *, axes_names=("", "")
) -> Figure:
    """One panel per title, a square of numbers with a row and a column for each word; each row is
    drawn from its smallest to its largest number, so that its peak can be seen."""
    picture, axes = figure(5.6 * len(panels), 5.0, columns=len(panels), squeeze=False)
    for one, (title, values) in zip(axes[0], panels.items(), strict=True):
        values = as_array(values)
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        one.imshow((values - low) / (high - low), cmap=AMOUNT, vmin=0, vmax=1)
        peaks = values.argmax(1)
        one.plot(peaks, range(len(words)), linestyle="", marker="x", color="black", markersize=8)
        one.set_xticks(range(len(words)), words, rotation=90)
        one.set_yticks(range(len(words)), words)
        one.set(title=title, ylabel=axes_names[0], xlabel=axes_names[1])
    return picture


class HeadViewer:
    """The attention pattern of any head on any text: `figure(layer, head, text)`, for a widget.

    The text is run when it changes; its patterns are kept.
    """

    def __init__(self, model: LanguageModel):
        self.model = model
        self._text: str | None = None

    def _read(self, text: str) -> None:
        if text == self._text:
            return
        ids = self.model.tokens(text)
        if not 2 <= ids.shape[1] <= MOST_TOKENS:
            raise ModelError(
                f"The text has {ids.shape[1]} tokens, and the viewer draws 2 to {MOST_TOKENS}: "
                "write a shorter or a longer one."
            )
        with torch.no_grad():
            _, cache = self.model.run_with_cache(ids, "pattern", stop_at_layer=self.model.n_layers)
        self.patterns = cache["pattern"]  # (n_layers, 1, n_heads, pos, pos)
        self.tokens = [token.strip() or repr(token) for token in self.model.str_tokens(text)]
        scores = pattern_scores(self.patterns, ids)
        self.scores = {name: scores[name] for name in SCORES}  # one text: not "positional"
        self._text = text

    @style()
    def figure(self, layer: int, head: int, text: str) -> Figure:
        """Left, the attention of each token; right, its share for each kind of target."""
        if not (0 <= layer < self.model.n_layers and 0 <= head < self.model.n_heads):
            raise ModelError(f"{self.model.name} has no head {head} in layer {layer}.")
        self._read(text)
        count = len(self.tokens)
        side = min(max(0.25 * count + 1.5, 4.0), 7.5)
        width = side + 4.2
        picture = Picture(figsize=(width, side), layout="none")  # fixed margins take half the time
        picture.subplots_adjust(1.35 / width, 1.1 / side, 1 - 0.1 / width, 1 - 0.4 / side, 0.62)
        left, right = picture.subplots(1, 2, width_ratios=[side - 1.5, 2.6])
        shown = as_array(self.patterns[layer, 0, head])
        shown = np.where(np.tri(count, dtype=bool), shown, np.nan)
        left.imshow(shown, cmap=AMOUNT, vmin=0, vmax=1, aspect="auto")
        left.set(xticks=[], yticks=[])  # texts instead: ticks are slow to make
        look = {"fontsize": 11 if count <= 26 else 8, "clip_on": False}
        for i, token in enumerate(self.tokens):
            left.text(i, count - 0.3, token, rotation=90, ha="center", va="top", **look)
            left.text(-0.7, i, token, ha="right", va="center", **look)
        left.set_title(f"{head_name((layer, head))}: rows look at columns, dark 0 to light 1")
        values = {name: float(each[layer, head]) for name, each in self.scores.items()}
        places = range(len(values))
        drawn = right.barh(places, np.nan_to_num(list(values.values())), color=OKABE_ITO[0])
        texts = [f"{x:.2f}" if np.isfinite(x) else "no target" for x in values.values()]
        right.bar_label(drawn, texts, padding=3)
        right.set_yticks(places, values)
        right.invert_yaxis()
        right.set(xlim=(0, 1.5), xticks=[0, 0.5, 1], xlabel="score on this text")
        return picture


@style()
def spread(
    groups: Mapping[str, Sequence[float]],
    title: str = "",
    *,
    xlabel: str = "",
    reference: float | None = None,
) -> Figure:
    """A row for each group: a mark for each value, and the median as a bar with its number."""
    picture, axes = figure(9, clamp(1.5 + 0.55 * len(groups)))
    for row, values in enumerate(groups.values()):
        values = as_array(values)
        shift = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
        look = {"marker": ("o", "s", "^", "D")[row % 4], "linestyle": "", "alpha": 0.75}
        axes.plot(values, row + np.asarray(shift), color=OKABE_ITO[row % 6], **look)
        middle = float(np.median(values))
        axes.plot([middle] * 2, [row - 0.33, row + 0.33], color="black", marker="", linewidth=2)
        axes.text(
            1.02, row, f"median {middle:.2f}", transform=axes.get_yaxis_transform(), va="center"
        )
    if reference is not None:
        axes.axvline(reference, color="grey", linestyle="--", marker="", linewidth=1.2)
    counts = [f"{name} ({len(values)})" for name, values in groups.items()]
    axes.set_yticks(range(len(groups)), counts)
    axes.set(title=title, xlabel=xlabel, ylim=(len(groups) - 0.5, -0.5))
    return picture


@style()
def formation(
    steps: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    ylabels: Sequence[str] = (),
    window: tuple[float, float] | None = None,
    last: float | None = None,
) -> Figure:
    """Curves over training steps, one panel per title, one above the other.

    After Olsson et al. 2022, In-context Learning and Induction Heads: the bump in the loss curve
    and the heads that form in it.

    Args:
        window: the steps (from, to) that are shaded.
        last: the step at which the axis ends.
    """
    picture, axes = figure(10, 2.9 * len(panels), len(panels), sharex=True, squeeze=False)
    for row, (title, series) in enumerate(panels.items()):
        one = axes[row, 0]
        for label, values in series.items():
            one.plot(as_array(steps), as_array(values), label=label)
        if window is not None:
            one.axvspan(*window, color=OKABE_ITO[1], alpha=0.2, linewidth=0)
        one.set(title=title, ylabel=[*ylabels, *[""] * len(panels)][row], xlim=(0, last))
        one.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1, 0].set_xlabel("training step")
    return picture


@style()
def circuit_drawing(
    circuit: Sequence[Node],
    given: Mapping[Node, str],
    looks: Mapping[tuple[str, str], Sequence],
    n_layers: int,
    title: str = "",
    least: float = 0.2,
) -> Figure:
    """The circuit: a box for each head at the role where it acts, and arrows from what it reads.

    After Wang et al. 2022, Interpretability in the Wild, figure 2 (the circuit of GPT-2 small).

    Args:
        given: {node: its job}.
        looks: mean attention from one role to another, as `circuit.attention_by_role` gives it; it
            is the width of an arrow.
        least: the attention from which on an arrow is drawn.
    """
    nodes = sorted(circuit)
    roles = [role for role in ROLES if role in {"IO", "S1", "S2", "END"} | {n[2] for n in nodes}]
    x = {role: 2.6 * i for i, role in enumerate(roles)}
    slots: dict[tuple[int, str], list[Node]] = {}  # nodes of one layer and role
    for node in nodes:
        slots.setdefault((node[0], node[2]), []).append(node)
    height = max(map(len, slots.values()), default=1)
    picture, axes = figure(11.5, 2.3 + 0.62 * height * max(1, len({k[0] for k in slots})))
    levels, top = {}, 1.0
    for layer in sorted({layer for layer, _ in slots}):
        levels[layer] = top
        top += 0.7 + 0.75 * max(len(v) for (i, _), v in slots.items() if i == layer)
    _role_columns(axes, x, top)
    colours = {job: OKABE_ITO[i % 6] for i, job in enumerate(dict.fromkeys(given.values()))}
    for (layer, role), each in slots.items():
        for i, node in enumerate(each):
            job = given.get(node, "no name")
            look = {to: float(as_array(v)[node[:2]]) for (q, to), v in looks.items() if q == role}
            starts = {x[to]: weight for to, weight in look.items() if to in x and weight >= least}
            place = (x[role], levels[layer] + 0.75 * i)
            _head_box(axes, head_name(node[:2]), job, colours.get(job, "0.4"), place, starts)
    later = f"MLPs of layers {max(levels, default=0)} to {n_layers - 1}, then the logits"
    axes.text(x["END"], top + 0.25, later, ha="center", va="center", style="italic")
    axes.set(title=title, xlim=(-1, x["END"] + 2.6), ylim=(-1.1, top + 0.7))
    axes.axis("off")
    return picture


def _role_columns(axes, x: Mapping[str, float], top: float) -> None:
    """A grey column for each role, with its name and its meaning below."""
    for role, at in x.items():
        axes.plot([at, at], [0.2, top], color="0.85", linewidth=6, marker="", ls="-", zorder=0)
        axes.text(at, -0.3, role, ha="center", va="center", weight="bold")
        meaning = ROLE_MEANS.get(role, "")
        axes.text(at, -0.75, meaning, ha="center", va="center", fontsize=11, color="0.35")


def _head_box(
    axes, name: str, job: str, colour, place: tuple[float, float], starts: Mapping[float, float]
) -> None:
    """A head's box with its job beside it, and an arrow from each of `starts` {x: attention}."""
    x, y = place
    for start, weight in starts.items():
        arrow = FancyArrowPatch(
            (start, 0.1),
            (x - 0.5, y),
            arrowstyle="-|>",
            mutation_scale=14,
            linewidth=1 + 4 * weight,
            color=colour,
            alpha=0.55,
            connectionstyle="arc3,rad=-0.12",
        )
        axes.add_patch(arrow)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
    axes.text(x, y, name, ha="center", va="center", bbox=box)
    axes.text(x + 0.62, y, job, ha="left", va="center", fontsize=12)


@style()
def agreement_plot(
    pairs: Mapping[str, tuple[float, float]], title: str = "", *, xlabel: str = "", ylabel: str = ""
) -> Figure:
    """A point for each name at (x, y), and the diagonal on which both are equal; all points but
    those called "random …" carry their names.

    After Wang et al. 2022, figure on completeness: F(M without K) against F(C without K).
    """
    picture, axes = figure(7.5, 5.5)
    values = as_array(list(pairs.values()))
    low, high = min(0.0, values.min()) - 0.08, max(1.0, values.max()) + 0.08
    axes.plot([low, high], [low, high], color="grey", linestyle="--", marker="", linewidth=1.2)
    plain = [name.startswith("random ") for name in pairs]
    for chosen, look in ((True, "o"), (False, "s")):
        points = values[[each == chosen for each in plain]]
        if len(points):
            label = "random subsets" if chosen else "all heads of one job"
            colour = OKABE_ITO[0 if chosen else 5]
            axes.plot(*points.T, look, linestyle="", color=colour, label=label, markersize=8)
    named = sorted((y, x, name) for name, (x, y) in pairs.items() if not name.startswith("random "))
    below = -np.inf
    for y, x, name in named:  # names of neighbours stand one above the other
        below = max(y, below + 0.06 * (high - low))
        axes.annotate(name, (x, y), xytext=(x + 0.03, below), va="center")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(low, high), ylim=(low, high))
    axes.legend(loc="upper left")
    return picture
