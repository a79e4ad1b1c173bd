"""The figures of lesson 03: effects in, Figure out. Only `PatchingExplorer` patches.

Effects are normalised logit differences: 0 is the corrupted run, 1 the clean one.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from matplotlib.figure import Figure

from mi_helpers.models import LanguageModel
from mi_helpers.patching import activation_patch, normalised_logit_diff
from mi_helpers.plots import (
    EFFECT,
    MARKERS,
    OKABE_ITO,
    Picture,
    as_array,
    clamp,
    figure,
    name_ticks,
    print_values,
    style,
)
from mi_helpers.sweeps import pair

MOST_HEADS = 12  # rows of the map over heads and positions


def markdown_table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; numbers are shown with two decimals."""
    if wrong := [len(row) for row in rows if len(row) != len(head)]:
        raise ValueError(f"A row has {wrong[0]} cells and the head {len(head)}.")

    def cell(value) -> str:
        return value if isinstance(value, str) else f"{float(value):z.2f}"

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


# -- maps --------------------------------------------------------------------------------------


def token_names(model: LanguageModel, clean, corrupted=None) -> list[str]:
    """A label per position: "2 Eiffel", or "2 Eiffel/Trevi" where two prompts differ."""
    rows = [model.str_tokens(ids) for ids in (clean, corrupted) if ids is not None]
    names = []
    for i, words in enumerate(zip(*rows, strict=True)):
        names.append(
            f"{i} " + "/".join(dict.fromkeys(word.strip() or repr(word) for word in words))
        )
    return names


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


# -- the explorer ------------------------------------------------------------------------------


SITES = {  # what the explorer offers: the engine's site, and the axes besides the layers
    **{name: (name, "positions") for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out")},
    "heads": ("z", "heads"),
    "heads × positions": ("z", "heads x positions"),
    "queries": ("q", "heads"),
    "keys": ("k", "heads"),
    "values": ("v", "heads"),
    "patterns": ("pattern", "heads"),
}


class PatchingExplorer:
    """`explorer(clean, corrupted, answers, site, mode)`: the map of any two prompts, as a Figure.

    answers  the clean and the corrupted prompt's answer, as "is / are"; where empty, what the model
             itself says after each prompt
    Effects are kept for the prompts asked last, so that going back costs the drawing only.
    """

    def __init__(self, model: LanguageModel, most_heads: int = MOST_HEADS):
        self.model, self.most_heads = model, most_heads
        self.effects = lru_cache(maxsize=64)(self._effects)
        self.prompts = lru_cache(maxsize=32)(self._prompts)

    def _prompts(self, clean: str, corrupted: str, answers: str):
        """The two prompts' ids, the metric, and both answers as words."""
        ids = pair(self.model, clean, corrupted)
        said = self._given(answers) if answers.strip() else self._own(ids)
        names = [self.model.tokenizer.decode([each]).strip() for each in said]
        return ids, normalised_logit_diff(self.model, *ids, *said), names

    def _given(self, answers: str) -> list[int]:
        words = [word.strip() for word in answers.split("/")]
        if len(words) != 2 or not all(words):
            raise ValueError(
                f"The answers are '{answers}': write two words with a slash between them, such as "
                "'is / are', or nothing."
            )
        return [self.model.to_single_token(f" {word}") for word in words]

    @torch.no_grad()
    def _own(self, ids) -> list[int]:
        said = [int(self.model.forward(each)[0, -1].argmax()) for each in ids]
        if said[0] == said[1]:
            word = self.model.tokenizer.decode([said[0]]).strip()
            raise ValueError(
                f"Both prompts are completed with '{word}': choose prompts whose answers differ, "
                "or write two answers, such as 'is / are'."
            )
        return said

    def _effects(self, clean: str, corrupted: str, answers: str, site: str, mode: str):
        """(layers, positions), (layers, heads) or (layers, heads, positions)."""
        ids, metric, _ = self.prompts(clean, corrupted, answers)
        name, over = SITES[site]
        return as_array(activation_patch(self.model, *ids, name, metric, mode, over=over))

    def __call__(self, clean: str, corrupted: str, answers: str, site: str, mode: str) -> Figure:
        """Draw it; ValueError, with a sentence, for prompts that cannot be compared."""
        if site not in SITES:
            raise ValueError(f"There is no site {site!r}: choose one of {', '.join(SITES)}.")
        ids, metric, names = self.prompts(clean, corrupted, answers)
        values = self.effects(clean, corrupted, answers, site, mode)
        columns, xlabel = token_names(self.model, ids[0], ids[1]), "position"
        rows, ylabel = [str(layer) for layer in range(self.model.n_layers)], "layer"
        if SITES[site][1] == "heads":  # keys and values have fewer
            columns, xlabel = [str(head) for head in range(values.shape[1])], "head"
        if SITES[site][1] == "heads x positions":
            values, rows = self._strongest(values, mode)
            ylabel = "layer.head"
        into = "clean into corrupted" if mode == "denoise" else "corrupted into clean"
        title = (
            f"{site}, {into}.  {names[0]} over {names[1]}: "
            f"{metric.clean:.1f} after the clean prompt, {metric.corrupted:.1f} after the other"
        )
        return single_map(values, columns, rows, title, xlabel, ylabel, mode)

    def _strongest(self, values: np.ndarray, mode: str) -> tuple[np.ndarray, list[str]]:
        """The heads that do most, as rows in their order, (rows, positions)."""
        layers, heads, positions = values.shape
        flat = values.reshape(layers * heads, positions)
        effect = np.abs(flat - (0 if mode == "denoise" else 1)).max(1)
        kept = np.sort(np.argsort(-effect, kind="stable")[: self.most_heads])
        return flat[kept], [f"{i // heads}.{i % heads}" for i in kept]


@style()
def single_map(
    values, xlabels: Sequence, ylabels: Sequence, title: str, xlabel: str, ylabel: str, mode: str
) -> Figure:
    """One map with fixed margins, which take half the time of a layout that is solved for.

    The colour is the effect: for denoising the value, for noising 1 less the value; the printed
    number is the value itself.
    """
    values = as_array(values)
    rows, columns = values.shape
    high = 2.6 + 0.3 * max(rows, 8)
    picture = Picture(figsize=(11, high), layout="none")
    axes = picture.add_axes((0.07, 1.55 / high, 0.79, 1 - 2.15 / high))
    scale = picture.add_axes((0.885, 1.55 / high, 0.015, 1 - 2.15 / high))
    effect = values if mode == "denoise" else 1 - values
    image = axes.imshow(effect, aspect="auto", cmap=EFFECT, vmin=-1, vmax=1)
    name_ticks(axes.xaxis, xlabels, columns)
    name_ticks(axes.yaxis, ylabels, rows)
    axes.tick_params(axis="x", labelrotation=0 if xlabel == "head" else 60)
    axes.tick_params(axis="y", labelsize=13 if rows <= 12 else 9)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=12)
    for (row, column), value in np.ndenumerate(effect):
        if abs(value) >= 0.02:
            dark = abs(value) > 0.6
            axes.text(
                column, row, f"{values[row, column]:z.2f}", ha="center", va="center",
                color="white" if dark else "black", fontsize=10 if rows <= 12 else 8,
            )  # fmt: skip
    effect_name = "value" if mode == "denoise" else "1 − value"
    picture.colorbar(image, cax=scale, label=f"effect ({effect_name})")
    return picture


# -- curves and clouds -------------------------------------------------------------------------


@style()
def interpolation_curves(
    share: Sequence[float], panels: Mapping[str, tuple[Sequence[float], float]]
) -> Figure:
    """One panel per title: the metric as an activation is moved from its own value (share 0) to the
    other run's (share 1), and the straight line that attribution patching follows.

    panels  {title: (metric at each share, what attribution patching says at share 1)}
    """
    share = as_array(share)
    picture, axes = figure(4.6 * len(panels), 4.4, columns=len(panels), squeeze=False, sharey=True)
    for one, (title, (values, guess)) in zip(axes[0], panels.items(), strict=True):
        values = as_array(values)
        if values.shape != share.shape:
            raise ValueError(f"'{title}' has {values.size} values for {share.size} shares.")
        start = values[0]
        one.plot(share, values, label="true patch", marker="")
        one.plot(share, start + share * (guess - start), label="attribution", marker="")
        one.plot([1], [values[-1]], marker="o", color=OKABE_ITO[0], linestyle="")
        one.plot([1], [guess], marker="s", color=OKABE_ITO[1], linestyle="")
        for height in (values[-1], guess):
            one.text(1.05, height, f"{height:.2f}", va="center", fontsize=11)
        one.set(title=title, xlabel="share of the other run's activation", xlim=(-0.05, 1.25))
    axes[0, 0].set_ylabel("normalised logit difference")
    axes[0, 0].legend(loc="upper left")
    return picture


@style()
def true_against_guess(panels: Mapping[str, tuple[Sequence, Sequence]]) -> Figure:
    """One cloud per title {title: (true, guess)}, every patch a point, with the diagonal.

    Realises the comparison in "Attribution Patching: Activation Patching At Industrial Scale"
    (Nanda, 2023).
    """
    picture, axes = figure(3.6 * len(panels), 4, columns=len(panels), squeeze=False)
    for one, (title, (true, guess)) in zip(axes[0], panels.items(), strict=True):
        true, guess = as_array(true).ravel(), as_array(guess).ravel()
        low = min(true.min(), guess.min(), -0.05)
        high = max(true.max(), guess.max(), 0.05)
        one.plot([low, high], [low, high], color="grey", linestyle=":", marker="", linewidth=1.5)
        one.plot(true, guess, linestyle="", marker="o", markersize=3, alpha=0.5)
        one.set(title=title, xlabel="effect of the true patch")
    axes[0, 0].set_ylabel("attribution patching")
    return picture


@style()
def skew_clouds(truth: Sequence[float], panels: Mapping[str, Sequence[float]]) -> Figure:
    """One cloud per title: each occupation's log-odds of 'she' in the world (x) and in the model
    (y), with the diagonal on which a perfect reader of this world would be."""
    truth = as_array(truth)
    picture, axes = figure(4.2 * len(panels), 4.3, columns=len(panels), squeeze=False, sharey=True)
    reach = 1.1 * float(np.abs(truth).max())
    for i, (one, (title, found)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        found = as_array(found)
        if found.shape != truth.shape:
            raise ValueError(f"'{title}' has {found.size} values for {truth.size} occupations.")
        one.plot([-reach, reach], [-reach, reach], color="grey", linestyle=":", marker="", lw=1.5)
        one.plot(truth, found, linestyle="", marker=MARKERS[i % 7], color=OKABE_ITO[i % 7])
        one.set(title=title, xlabel="world: log-odds of 'she'")
    axes[0, 0].set_ylabel("model: log-odds of 'she'")
    return picture
