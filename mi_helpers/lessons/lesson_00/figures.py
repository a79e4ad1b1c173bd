"""Figures and tables of lesson 00."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mi_helpers.ablation import Zero, ablate, part_name
from mi_helpers.architecture import architecture
from mi_helpers.models import LanguageModel
from mi_helpers.picture import HIGHEST, OKABE_ITO, style
from mi_helpers.plots import as_array, bars, clamp, figure, heatmap, name_series

Estimate = tuple[float, float]  # a mean and its standard error
ALL_HEADS, MLP = "all heads", "MLP"


def part_names(model: LanguageModel) -> list[str]:
    """What can be silenced in one layer, in words."""
    return [*(f"head {i}" for i in range(model.n_heads)), ALL_HEADS, MLP]


def part_called(name: str, layer: int) -> tuple:
    """The part that one of `part_names` stands for, as `ablate` takes it."""
    if name.startswith("head "):
        return "head", layer, int(name.split()[1])
    return ("attn" if name == ALL_HEADS else "mlp"), layer, None


def parts_of_layer(model: LanguageModel, layer: int) -> list[tuple]:
    """The parts that `part_names` names, of one layer."""
    return [part_called(name, layer) for name in part_names(model)]


def next_tokens(model: LanguageModel, text: str, part: str, layer: int, k: int = 6) -> Figure:
    """The k likeliest next tokens with one part of the model silenced."""
    with model.hooks(ablate(model, [part_called(part, layer)], Zero())):
        p = model(text)[0, -1].float().softmax(-1)
    best = p.topk(k).indices.tolist()
    words = {
        f"{rank}. {model.str_tokens([i])[0].strip()}": float(p[i])
        for rank, i in enumerate(best, start=1)
    }
    title = f"With {part} of layer {layer} silenced"
    drawn = bars(words, title, xlabel="probability of the next token", limits=(0, 1.1))
    return drawn.reads(f"First comes {model.str_tokens([best[0]])[0].strip()}.")


def shape_table(model: LanguageModel, other: LanguageModel) -> str:
    """Every step of two models of one family with the shape of what it gives, in Markdown."""
    lines = ["| step | what it does | " + f"{model.name} | {other.name} |", "|---|---|---|---|"]
    kept = [
        [r for r in architecture(m) if not r.name.startswith("blocks") or ".0." in r.name]
        for m in (model, other)
    ]
    for one, two in zip(*kept, strict=True):
        shapes = [" × ".join(map(str, row.activation[2:])) for row in (one, two)]
        name = one.name.replace("blocks.0.", "· ")
        does = one.does.partition(" (last")[0].partition(", times")[0]
        lines.append(f"| {name} | {does} | {shapes[0]} | {shapes[1]} |")
    return "\n".join(lines)


@style()
def estimates(
    series: Mapping[str, Mapping[str, Estimate]],
    title: str = "",
    *,
    xlabel: str = "",
    reference: float = 0.0,
    limits: tuple[float, float] | None = None,
    width: float = 9,
) -> Figure:
    """Horizontal bars with a line of two standard errors each way, and the numbers beside them.

    Args:
        series: {series: {row: (mean, standard error)}}.
        reference: a dashed vertical line, such as a chance level.
        limits: the axis' ends, kept under sliders; what lies beyond is drawn at the end.
    """
    names = list(dict.fromkeys(name for each in series.values() for name in each))
    thick = 0.8 / len(series)
    picture, axes = figure(width, clamp(1.3 + 0.36 * len(names) * max(1, 0.8 * len(series))))
    drawn = []
    for index, each in enumerate(series.values()):
        places = np.arange(len(names)) + (index - (len(series) - 1) / 2) * thick
        means, errors = as_array([each.get(name, (np.nan, np.nan)) for name in names]).T
        low, high = limits or (-np.inf, np.inf)
        shown = np.clip(means, low, high)
        hatch = ("", "//", "..", "xx")[index % 4]
        drawn.append(axes.barh(places, shown, thick, hatch=hatch, edgecolor="white"))
        ends = np.clip(means - 2 * errors, low, high), np.clip(means + 2 * errors, low, high)
        axes.hlines(places, *ends, color="black", linewidth=1.5)
        for place, mean, error in zip(places, means, errors, strict=True):
            if np.isfinite(mean):
                text = f"{mean:z.2f} ± {2 * error:.2f}"
                axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(reference, color="black", linestyle="--", marker="", linewidth=1.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel, **({} if limits is None else {"xlim": limits}))
    if len(series) > 1:
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.02), "ncols": len(series)}
        name_series(axes, drawn, series, borderaxespad=0, **where)
        axes.set_title(title, pad=32)
    return picture


@style()
def silenced_in_order(
    series: Mapping[str, Sequence[Estimate]], title: str = "", ylabel: str = ""
) -> Figure:
    """One line per order of silencing: what is left after 0, 1, 2, … heads, ± two standard errors.

    Args:
        series: {order: [(mean, standard error) after 0, 1, 2, … heads]}.
    """
    picture, axes = figure(8, 4.2)
    lines = []
    for index, (label, values) in enumerate(series.items()):
        means, errors = as_array(values).T
        places = np.arange(len(means))
        look = {"color": OKABE_ITO[index], "marker": "os"[index % 2], "label": label}
        lines.append(axes.errorbar(places, means, 2 * errors, capsize=4, **look))
    axes.set(title=title, xlabel="heads silenced", ylabel=ylabel, ylim=(-0.05, 1.08))
    axes.set_xticks(places)
    name_series(axes, lines, series)
    return picture


def damage_table(damage, families: Sequence[str], parts: Sequence[tuple]) -> Figure:
    """Each part's damage to each family as a colour; the colours end at four nats.

    Args:
        damage: (parts, families), nats per answer.
    """
    names = [part_name(part) for part in parts]
    look = {"centre_zero": True, "form": "", "limit": 4, "width": 10, "height": HIGHEST}
    drawn = heatmap(damage, families, names, "Damage by a mean lesion", unit="nats", **look)
    return drawn.reads("A dark row is a part that all need, a lone dark cell a selective one.")
