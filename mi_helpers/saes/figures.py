"""Figures of latents: the dashboard of one, and which fire where in a text.

page = Page(held, coder, collect(held, coder), model)
explore(lambda latent: dashboard(page, latent), latent=(0, coder.d_latent - 1))
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from matplotlib.figure import Figure

from mi_helpers import plots
from mi_helpers.models import LanguageModel
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.features import Context, Features, bin_edges, contexts, extremes, logit_effects

LINE = 122  # characters of a context on a page
SHOWN = 8  # contexts on a page


@dataclass(frozen=True)
class Page:
    """What a dashboard is drawn from.

    Args:
        gain: whether logit effects go through the final norm's gain.
    """

    held: Activations
    coder: torch.nn.Module
    features: Features
    model: LanguageModel
    gain: bool = True

    @cached_property
    def directions(self) -> torch.Tensor:
        """The decoder rows at unit norm, (latents, d_out)."""
        with torch.no_grad():
            return torch.nn.functional.normalize(self.coder.W_dec.float(), dim=-1)

    def nearest(self, latent: int, n: int) -> tuple[list[int], list[float]]:
        """The n latents whose decoder rows are nearest, and their cosines."""
        cosines = self.directions @ self.directions[latent]
        cosines[latent] = -torch.inf
        top = cosines.topk(min(n, len(cosines) - 1))
        return top.indices.tolist(), top.values.tolist()

    @torch.no_grad()
    def effects(
        self, latent: int, n: int
    ) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """(token, effect) of the n tokens that the latent raises most, and that it lowers most."""
        row = logit_effects(self.model, self.coder.W_dec[latent : latent + 1], self.gain)[0]
        name = self.model.tokenizer.decode
        return tuple(
            [(name([int(i)]), float(v)) for v, i in zip(*end, strict=True)]
            for end in extremes(self.model, row, n)
        )


@plots.style()
def dashboard(page: Page, latent: int) -> Figure:
    """One latent: how strongly it fires, where most, what it writes, and which are like it.

    The firing token is in [[brackets]].

    Raises:
        ValueError: there is no such latent.

    Source: the dashboards of Bricken and others 2023, "Towards Monosemanticity".
    """
    features, latent = page.features, page.features.check(latent)
    picture = plots.Picture(figsize=(13, 7.4), layout="none")  # fixed margins take half the time
    picture.subplots_adjust(left=0.07, right=0.98, top=0.87, bottom=0.59, wspace=0.45)
    left, middle, right = picture.subplots(1, 3)
    picture.suptitle(
        f"latent {latent}: fires at {features.frequency[latent]:.3%} of {features.rows:,} tokens, "
        f"mean {features.mean[latent]:.2f} where it does",
        x=0.02,
        ha="left",
    )
    draw_histogram(left, features, latent)
    writes = page.coder.d_out == page.model.d_model
    effects = page.effects(latent, 4) if writes else ([], [])
    through = "through the final norm's gain" if page.gain else "without the final norm's gain"
    draw_bars(middle, effects[0] + effects[1][::-1], "direct effect on logits", through)
    near, cosine = page.nearest(latent, 6)
    pairs = [(str(number), value) for number, value in zip(near, cosine, strict=True)]
    draw_bars(right, pairs, "nearest latents", "cosine of the decoder rows")
    draw_contexts(picture, page, latent)
    return picture


def draw_histogram(axes, features: Features, latent: int) -> None:
    """Draw the number of firings by value, four bins per doubling."""
    counts, edges = features.histogram[latent], bin_edges()
    on = np.flatnonzero(counts)
    axes.set(title="firings by value", ylabel="tokens")
    if not len(on):
        axes.text(0.5, 0.5, "it never fires", ha="center", transform=axes.transAxes)
        return
    low, high = on[0], on[-1] + 1
    axes.stairs(counts[low:high], edges[low : high + 1], fill=True, color=plots.OKABE_ITO[0])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("value, in units of the activations")


def draw_bars(axes, pairs: list[tuple[str, float]], title: str, xlabel: str) -> None:
    """Draw named values as bars with their numbers, positive ones blue, negative ones orange."""
    axes.set(title=title, xlabel=xlabel)
    if not pairs:
        axes.text(
            0.5, 0.5, "it does not write to the stream", ha="center", transform=axes.transAxes
        )
        axes.set_axis_off()
        return
    values = [value for _, value in pairs]
    drawn = axes.barh(range(len(pairs)), values, 0.7, edgecolor="white")
    for bar, value in zip(drawn, values, strict=True):
        bar.set_color(plots.OKABE_ITO[0 if value >= 0 else 5])
    axes.bar_label(drawn, [f"{value:z.2f}" for value in values], padding=2, fontsize=10)
    names = [printable(name) for name, _ in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=11)
    axes.invert_yaxis()
    axes.margins(x=0.25)


def draw_contexts(picture: Figure, page: Page, latent: int) -> None:
    """Write the latent's highest firings as text, each with its value."""
    found = contexts(page.held, page.features, latent, page.model.tokenizer, SHOWN)
    title = (
        "where it fires most, one line per text" if found else "nowhere: it is dead on this text"
    )
    picture.text(0.07, 0.455, title, fontsize="large")
    columns = {
        0.07: [f"{each.value:6.2f}" for each in found],
        0.13: [centred(each) for each in found],
    }
    for x, lines in columns.items():
        look = {"family": "monospace", "fontsize": 10.5, "va": "top", "linespacing": 2.4}
        picture.text(x, 0.425, "\n".join(lines), **look)


def centred(context: Context, room: int = LINE) -> str:
    """A context on one line of at most `room` characters, cut so that its [[token]] stays in."""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in str(context))
    firing = text.index("[[", sum(map(len, context.tokens[: context.at])))  # not a bracket before
    begin = max(0, min(firing - room * 2 // 3, len(text) - room))
    cut = text[begin : begin + room]
    cut = "…" + cut[1:] if begin else cut
    return cut[:-1] + "…" if begin + room < len(text) else cut


def printable(token: str) -> str:
    """A token as a label: control characters would not be drawn."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in token) or "∅"
