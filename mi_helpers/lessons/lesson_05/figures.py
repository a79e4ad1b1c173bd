"""The figures of lesson 05: maps of heads, the training log, a circuit, its builder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from ipywidgets import Text
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from mi_helpers.heads import Head, head_name
from mi_helpers.lessons.lesson_05.circuit import JOBS, LOOKS, attention_by_role, senders
from mi_helpers.lessons.lesson_05.ioi import METRICS, ROLES, Node, Task, node_name, own_prompt
from mi_helpers.paths import receivers_of
from mi_helpers.picture import HIGHEST
from mi_helpers.plots import (
    AMOUNT,
    EFFECT,
    MOST_PRINTED,
    OKABE_ITO,
    as_array,
    clamp,
    colour_limits,
    figure,
    print_values,
    style,
)


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
            one.plot(as_array(steps), as_array(values), label=label.replace("_", " "))
        if window is not None:
            one.axvspan(*window, color=OKABE_ITO[1], alpha=0.2, linewidth=0)
        one.set(title=title, ylabel=[*ylabels, *[""] * len(panels)][row], xlim=(0, last))
        one.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1, 0].set_xlabel("training step")
    return picture


@style()
def circuit_drawing(
    task: Task, given: Mapping[Node, str], row: int = 0, title: str = "", least: float = 0.2
) -> Figure:
    """The circuit on the words of one text: a box for the heads that do one job at one word, and
    arrows from what they look at.

    An arrow begins at the word that is looked at, or, where heads of the circuit have written there
    before, at their box: then what they wrote is what is read. The grey columns are the stream.

    After Wang et al. 2022, Interpretability in the Wild, figure 2 (the circuit of GPT-2 small).

    Args:
        given: {node of the circuit: its job}.
        row: which of the task's texts is drawn; its attention is the width of an arrow.
        least: the attention from which on an arrow is drawn.
    """
    prompts, pattern = task.prompts, task.intact["pattern"][:, row]  # (layers, heads, q, k)
    words = [word.strip() or word for word in task.model.str_tokens(prompts.ids[row])]
    x = {role: int(prompts.at(role)[row]) for role in ROLES[:-1]}
    boxes: dict[tuple[int, str, str], list[Node]] = {}
    for node, job in sorted(given.items()):
        if node[2] in x:
            boxes.setdefault((node[0], node[2], job), []).append(node)
    levels = box_levels(boxes)
    picture, axes = figure(12, clamp(2.2 + 0.95 * (1 + max(levels.values(), default=0)), HIGHEST))
    for place, word in enumerate(words):
        named = prompts.role[row, place] < 3
        look = {"weight": "bold" if named else "normal", "fontsize": 12}
        axes.text(
            place, -0.45, word, rotation=45, ha="right", va="top", rotation_mode="anchor", **look
        )
    for key, nodes in boxes.items():
        layer, role, job = key
        at, colour = (x[role], levels[key]), OKABE_ITO[list(JOBS).index(job) % 6]
        axes.plot([at[0]] * 2, [-0.2, at[1]], color="0.85", lw=6, marker="", ls="-", zorder=0)
        look = pattern[layer, [head for _, head, _ in nodes], x[role]].amax(0)
        for place in (look >= least).nonzero()[:, 0].tolist():
            below = [y for (i, r, _), y in levels.items() if x.get(r) == place and i < layer]
            start = (place, max(below) + 0.3 if below else -0.2)
            if place != at[0] and place > 0:
                arrow_to(axes, start, at, colour, 1 + 4 * float(look[place]))
        name = f"{job}\nL{layer}: " + " ".join(f"H{head}" for _, head, _ in nodes)
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour, "lw": 2}
        axes.text(*at, name, ha="center", va="center", bbox=box, fontsize=11, zorder=4)
    axes.set(
        title=title, xlim=(-1, len(words) + 0.6), ylim=(-1.9, max(levels.values(), default=0) + 0.7)
    )
    axes.axis("off")
    return picture


def box_levels(boxes: Iterable[tuple[int, str, str]]) -> dict[tuple[int, str, str], float]:
    """The height of each box (layer, role, job): layers in order, boxes of one place stacked."""
    levels: dict[tuple[int, str, str], float] = {}
    top = 0.6
    for layer in sorted({layer for layer, *_ in boxes}):
        here, seen = [key for key in boxes if key[0] == layer], {}
        for key in here:
            seen[key[1]] = seen.get(key[1], -1) + 1
            levels[key] = top + seen[key[1]]
        top += max(seen.values()) + 1.1
    return levels


def arrow_to(axes, start: tuple[float, float], end: tuple[float, float], colour, width: float):
    """A curved arrow that ends at a box."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            linewidth=width,
            color=colour,
            alpha=0.55,
            shrinkB=16,
            connectionstyle="arc3,rad=-0.18",
        )
    )


@style()
def agreement_plot(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], *, xlabel: str = "", ylabel: str = ""
) -> Figure:
    """One panel per title: a point for each name at (x, y), and the diagonal on which both are
    equal; all points but those called "random …" carry their names.

    After Wang et al. 2022, figure on completeness: F(M without K) against F(C without K).
    """
    picture, axes = figure(6 * len(panels), 5, columns=len(panels), squeeze=False)
    for one, (title, pairs) in zip(axes[0], panels.items(), strict=True):
        values = as_array(list(pairs.values()))
        low, high = min(0.0, values.min()) - 0.08, max(1.0, values.max()) + 0.08
        one.plot([low, high], [low, high], color="grey", linestyle="--", marker="", linewidth=1.2)
        plain = np.array([name.startswith("random ") for name in pairs])
        for chosen, look, label in ((plain, "o", "random subsets"), (~plain, "s", "one job")):
            colour = OKABE_ITO[0 if look == "o" else 5]
            one.plot(*values[chosen].T, look, ls="", color=colour, label=label, markersize=8)
        below = -np.inf  # names of neighbours stand one above the other
        for y, x, name in sorted((y, x, name) for name, (x, y) in pairs.items()):
            if not name.startswith("random "):
                below = max(y, below + 0.06 * (high - low))
                one.annotate(name, (x, y), xytext=(x + 0.03, below), va="center", fontsize=11)
        one.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(low, high), ylim=(low, high))
        one.legend(loc="upper left")
    return picture


class CircuitBuilder:
    """Jobs of a circuit, switched on and off: both metrics, and the names on a text of one's own.

        explore(builder.figure, **builder.controls("There was Roger. …"))

    Args:
        task: what faithfulness is measured on.
        groups: {job: its nodes}; what is switched off is ablated, with all heads outside.
    """

    def __init__(self, task: Task, groups: Mapping[str, set[Node]]):
        self.task, inside = task, set().union(*groups.values())
        self.groups = {switch_name(job): nodes for job, nodes in groups.items()}
        self.groups["all_other_heads"] = task.nodes() - inside
        self._kept: dict[tuple, np.ndarray] = {}
        self._own: tuple[str, Task] | None = None

    def controls(self, text: str) -> dict:
        """A switch for each job, all on but the heads outside; a text box."""
        return {name: name != "all_other_heads" for name in self.groups} | {"text": Text(text)}

    def figure(self, text: str, **on: bool) -> Figure:
        """Left, faithfulness on both metrics; right, p of the likeliest names after the text."""
        circuit = set().union(*(self.groups[name] for name, yes in on.items() if yes))
        state = tuple(sorted(on.items()))
        if state not in self._kept:
            self._kept[state] = as_array(self.task.faithfulness(circuit))
        if self._own is None or self._own[0] != text:
            self._own = text, Task(self.task.model, own_prompt(self.task.model, text))
        names = self._own[1].prompts.names
        with torch.no_grad():
            logits = self.task.model.unembed(self._own[1].final(circuit))[0].float()
        p = logits.softmax(-1)[names]
        best = {
            self.task.model.token_text(int(names[i])).strip(): float(p[i]) for i in p.topk(5)[1]
        }
        shares = dict(zip(METRICS, self._kept[state], strict=True))
        said = [f"{name} {x:.2f}" for name, x in (shares | best).items()]
        return two_bars(shares, best).reads(", ".join(said) + ".")


def switch_name(job: str) -> str:
    """A job as the name of an argument."""
    return job.replace(" ", "_").replace("-", "_")


@style()
def two_bars(left: Mapping[str, float], right: Mapping[str, float]) -> Figure:
    """Faithfulness on the left, with 1 marked; the probabilities of names on the right."""
    picture, axes = figure(10, 3.2, columns=2)
    for one, values, label, limits in (
        (axes[0], left, "faithfulness: F(circuit) / F(model)", (-0.6, 1.6)),
        (axes[1], right, "probability of the name", (0, 1.2)),
    ):
        drawn = one.barh(
            range(len(values)), np.clip(list(values.values()), *limits), color=OKABE_ITO[0]
        )
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        one.bar_label(drawn, [f"{x:.2f}" for x in values.values()], padding=3, bbox=plain)
        one.set_yticks(range(len(values)), list(values))
        one.invert_yaxis()
        one.set(xlabel=label, xlim=limits)
    axes[0].axvline(1, color="black", linestyle="--", marker="", linewidth=1.2, zorder=0)
    axes[0].axvline(0, color="black", linestyle="-", marker="", linewidth=0.8)
    return picture


def jobs_table(task: Task, given: Mapping[Node, str], copies: Tensor) -> str:
    """A Markdown table: each node, where it looks, whether it copies names, and its job."""
    looks, rows = (
        attention_by_role(task),
        ["| head, at | looks at | copies | job |", "|---" * 4 + "|"],
    )
    for node, job in given.items():
        (layer, head, role), seen = node, LOOKS.get(node[2], ())
        there = {to: float(looks[role, to][layer, head]) for to in seen}
        best = sorted(((x, to) for to, x in there.items() if x >= 0.1), reverse=True)
        said = ", ".join(f"{to} {x:.2f}" for x, to in best) or "elsewhere"
        rows.append(f"| {node_name(node)} | {said} | {copies[layer, head]:+.1f} | {job} |")
    return "\n".join(rows)


def paths_table(task: Task, groups: Mapping[str, Iterable[Head]]) -> str:
    """A Markdown table: who tells the queries, keys and values of some heads, and the answer, who
    comes twice, with the MLPs between recomputed, and frozen.

    Of keys and values, those shared with a head of an earlier group are left out: what goes into
    one of the two goes into the other.
    """
    model, wires = task.model, {"q": "queries", "k": "keys", "v": "values"}
    rows = ["| into the | the words | strongest head | it, MLPs frozen |", "|---" * 4 + "|"]
    taken: set[tuple] = set()
    for name, some in groups.items():
        for site, wire in wires.items():
            left = set(receivers_of(model, some, site)) - taken
            label = f"{wire} of the {name} heads"
            rows.append(
                _path_row(task, label, sorted(left)) if left else f"| {label} | – | – | – |"
            )
            taken |= left
    return "\n".join([*rows, _path_row(task, "answer itself", "logits")])


def _path_row(task: Task, label: str, receivers: Sequence | str) -> str:
    """A row of `paths_table`: what the words and the strongest sender carry into some receivers."""
    (by_head, words), (frozen, _) = (senders(task, receivers, each) for each in (False, True))
    best = divmod(int(by_head.argmax()), by_head.shape[1])
    shares = f"{head_name(best)} {by_head[best]:.2f} | {frozen[best]:.2f}"
    return f"| {label} | {words:.2f} | {shares} |"


def faithfulness_table(kinds: Mapping[str, Sequence[Tensor]]) -> str:
    """A Markdown table: a row for each kind of circuit, the range of both metrics over its runs."""
    rows = ["| | " + " | ".join(METRICS) + " |", "|---" * 3 + "|"]
    for name, values in kinds.items():
        each = torch.stack(list(values)).T
        said = [
            f"{low:.2f} to {high:.2f}" for low, high in zip(each.amin(1), each.amax(1), strict=True)
        ]
        rows.append(f"| {name} ({len(values)}) | " + " | ".join(said) + " |")
    return "\n".join(rows)
