"""The figures of lesson 03: effects in, Figure out. Only the two explorers run the model.

Effects are normalised logit differences: 0 is the corrupted run, 1 the clean one.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from matplotlib.figure import Figure

from mi_helpers.lessons.lesson_03.experiments import PARTS, TASKS
from mi_helpers.lessons.lesson_03.pairs import CITY, sights
from mi_helpers.models import LanguageModel
from mi_helpers.patching import activation_patch, normalised_logit_diff
from mi_helpers.plots import (
    EFFECT,
    MARKERS,
    OKABE_ITO,
    Picture,
    as_array,
    bars,
    figure,
    name_series,
    name_ticks,
    style,
)
from mi_helpers.sweeps import pair

MOST_HEADS = 12  # rows of the map over heads and positions


def token_names(model: LanguageModel, clean, corrupted=None) -> list[str]:
    """A label per position: "2 Eiffel", or "2 Eiffel/Trevi" where two prompts differ."""
    rows = [model.str_tokens(ids) for ids in (clean, corrupted) if ids is not None]
    names = []
    for i, words in enumerate(zip(*rows, strict=True)):
        names.append(
            f"{i} " + "/".join(dict.fromkeys(word.strip() or repr(word) for word in words))
        )
    return names


# -- the opening -------------------------------------------------------------------------------


class SwapLab:
    """`lab(vector_of, layer, word)`: the next tokens when one vector comes from another prompt.

    The model reads about the second of `sights`; the vectors may come from the others.
    """

    def __init__(self, model: LanguageModel):
        first, base, *rest = sights(model)
        self.model, self.base = model, CITY.format(base.name)
        self.others = {place.name: CITY.format(place.name) for place in (first, *rest)}
        self.words = token_names(model, model.tokens(self.base)[0])

    def controls(self) -> dict:
        """What `explore` needs."""
        layers = (0, self.model.n_layers - 1, 1)
        words = self.words[1:]
        return {"vector_of": list(self.others), "layer": layers, "word": words}

    @torch.no_grad()
    def __call__(self, vector_of: str, layer: int, word: str) -> Figure:
        at, key, model = self.words.index(word), ("resid_pre", layer), self.model
        _, kept = model.run_with_cache(self.others[vector_of], key, stop_at_layer=layer + 1)

        def put_in(stream):
            stream[:, at] = kept[key][:, at]
            return stream

        with model.hooks({key: put_in}):
            p = model(self.base)[0, -1].float().softmax(-1)
        best = p.topk(6).indices.tolist()
        said = [model.str_tokens([i])[0].strip() for i in best]
        shown = {f"{rank + 1}. {said[rank]}": float(p[i]) for rank, i in enumerate(best)}
        title = f"“{self.base} …”\nstream entering layer {layer}, at “{word}”, from {vector_of}"
        drawn = bars(shown, title, xlabel="probability of the next token", limits=(0, 1.1))
        return drawn.reads(f"First comes {said[0]}.")


# -- the explorer ------------------------------------------------------------------------------


SITES = {  # what the explorer offers: the engine's site, and the axes besides the layers
    **{name: (name, "positions") for name in ("resid_pre", "attn_out", "mlp_out")},
    "heads": ("z", "heads"),
    "heads × positions": ("z", "heads x positions"),
    **{name: (site, "heads") for name, site in PARTS.items()},
}


class PatchingExplorer:
    """`explorer(pair, clean, corrupted, answers, site, mode)`: a map of patches, as a Figure.

    pair     one of `pairs`, which serves where the two prompts are left empty
    answers  the clean and the corrupted prompt's answer, as "is / are"; where empty, the pair's, or
             what the model itself says after each prompt
    Effects are kept for the prompts asked last, so that going back costs the drawing only.
    """

    def __init__(self, model: LanguageModel, most_heads: int = MOST_HEADS):
        self.model, self.most_heads = model, most_heads
        self.pairs = {}
        for name, make in TASKS.items():
            one = make(model, 1, 0)
            self.pairs[name] = (*one.texts[0], " / ".join(one.words(model)[0]))
        self.effects = lru_cache(maxsize=64)(self._effects)
        self.prompts = lru_cache(maxsize=32)(self._prompts)

    def controls(self) -> dict:
        """What `explore` needs."""
        texts = dict.fromkeys(("clean", "corrupted", "answers"), "")
        return {
            "pair": list(self.pairs),
            **texts,
            "site": list(SITES),
            "mode": ["denoise", "noise"],
        }

    def chosen(self, pair: str, clean: str, corrupted: str, answers: str) -> tuple[str, str, str]:
        """The two prompts and their answers: those of the pair, or those that were written."""
        if pair not in self.pairs:
            raise ValueError(f"There is no pair {pair!r}: choose one of {', '.join(self.pairs)}.")
        given = [text for text in (clean, corrupted) if text.strip()]
        if len(given) == 1:
            raise ValueError(
                "One prompt is empty: write both, or neither, and the pair above is shown."
            )
        if given:
            return clean.strip(), corrupted.strip(), answers
        *texts, known = self.pairs[pair]
        return texts[0], texts[1], answers if answers.strip() else known

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

    def __call__(
        self, pair: str, clean: str, corrupted: str, answers: str, site: str, mode: str
    ) -> Figure:
        """Draw it; ValueError, with a sentence, for prompts that cannot be compared."""
        if site not in SITES:
            raise ValueError(f"There is no site {site!r}: choose one of {', '.join(SITES)}.")
        asked = self.chosen(pair, clean, corrupted, answers)
        ids, metric, names = self.prompts(*asked)
        values = self.effects(*asked, site, mode)
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

    Colour and number are the effect: the metric for denoising, 1 less the metric for noising.
    """
    effect = as_array(values) if mode == "denoise" else 1 - as_array(values)
    rows, columns = effect.shape
    high = 2.6 + 0.3 * max(rows, 8)
    picture = Picture(figsize=(11, high), layout="none")
    axes = picture.add_axes((0.07, 1.55 / high, 0.79, 1 - 2.15 / high))
    scale = picture.add_axes((0.885, 1.55 / high, 0.015, 1 - 2.15 / high))
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
            colour, size = "white" if abs(value) > 0.6 else "black", 10 if rows <= 12 else 8
            axes.text(
                column, row, f"{value:z.2f}", ha="center", va="center", color=colour, fontsize=size
            )
    said = "enough: the metric" if mode == "denoise" else "needed: 1 − the metric"
    picture.colorbar(image, cax=scale, label=said)
    return picture


# -- enough and needed -------------------------------------------------------------------------


@style()
def enough_and_needed(panels: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]]) -> Figure:
    """A point for each head of each task: how far it is needed (x) and enough (y).

    Args:
        panels: {title: {task: (enough, needed)}}, of any shape.

    Source: Heimersheim and Nanda 2024, How to use and interpret activation patching: AND and OR.
    """
    picture, axes = figure(5.4 * len(panels), 5.6, columns=len(panels), squeeze=False, sharey=True)
    corners = {"one road": (0.95, 1.12), "AND": (1, -0.12), "OR": (-0.08, 1.02)}
    for one, (title, series) in zip(axes[0], panels.items(), strict=True):
        one.plot([0, 1], [0, 1], color="grey", linestyle=":", marker="", linewidth=1.5)
        one.text(0.5, 0.42, "shares", color="0.35", rotation=38, rotation_mode="anchor")
        for name, (x, y) in corners.items():
            one.text(x, y, name, color="0.35", ha="center", va="center", fontsize=15)
        drawn = []
        for index, (enough, needed) in enumerate(series.values()):
            look = {"marker": MARKERS[index % 7], "color": OKABE_ITO[index % 7], "alpha": 0.8}
            x, y = as_array(needed).ravel(), as_array(enough).ravel()
            drawn += one.plot(x, y, linestyle="", markersize=8, **look)
        one.set(xlabel="needed: lost by noising", xlim=(-0.25, 1.25), ylim=(-0.25, 1.25))
        one.set_title(title)
    axes[0, 0].set_ylabel("enough: won by denoising")
    name_series(picture, drawn, series, loc="outside lower center", ncols=min(6, len(series)))
    return picture


# -- curves and clouds -------------------------------------------------------------------------


@style()
def the_way(
    share: Sequence[float], panels: Mapping[str, tuple[Sequence[float], float, float]]
) -> Figure:
    """One panel per title: the metric as an activation is moved from its own value (share 0) to the
    other run's (share 1), the line of the slope at the start, and the estimate of several slopes.

    Args:
        panels: {title: (metric at each share, attribution's estimate, that of several gradients)}.
    """
    share = as_array(share)
    picture, axes = figure(4.6 * len(panels), 4.4, columns=len(panels), squeeze=False, sharey=True)
    for one, (title, (values, guess, closer)) in zip(axes[0], panels.items(), strict=True):
        values = as_array(values)
        if values.shape != share.shape:
            raise ValueError(f"'{title}' has {values.size} values for {share.size} shares.")
        start = values[0]
        one.plot(share, values, label="the true patch", marker="", color=OKABE_ITO[0])
        line = start + share * (guess - start)
        one.plot(share, line, label="the slope at the start", marker="", color=OKABE_ITO[1])
        one.plot(
            [1], [closer], label="mean of four slopes", linestyle="", marker="D", color="black"
        )
        for height, mark in ((values[-1], "o"), (guess, "s")):
            one.plot([1], [height], marker=mark, color=OKABE_ITO[mark == "s"], linestyle="")
        one.text(1.05, guess, f"{guess:.2f}", va="center", fontsize=11)
        one.set(title=title, xlabel="share of the clean run's vector", xlim=(-0.05, 1.25))
    axes[0, 0].set_ylabel("normalised logit difference")
    axes[0, -1].legend(loc="lower right")
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
