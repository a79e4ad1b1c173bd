"""Lesson 07's figures: losses with MLPs replaced, rules, virtual weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mi_helpers import plots
from mi_helpers.circuits.rules import ActivePairs, token_inputs, top_tokens
from mi_helpers.lessons.lesson_07.experiments import Faithful
from mi_helpers.saes.features import contexts
from mi_helpers.saes.figures import Page, centred, draw_bars

SHOWN = 6  # contexts in the figure of a rule


def replacement(runs: Mapping[tuple[str, str], Faithful], part: str, kind: str) -> Figure:
    """The loss of each family before and after MLPs are replaced.

    Args:
        runs: {(part, kind): losses}, such as ("layer 3", "skip"): what was replaced, and by what.

    Raises:
        ValueError: nothing was measured for this part and kind.
    """
    if (part, kind) not in runs:
        raise ValueError(f"Nothing was measured for {part!r} and {kind!r}.")
    run = runs[part, kind]
    longest = max(max(each.clean.values()) for each in runs.values())
    return plots.before_after(
        run.clean,
        run.spliced,
        f"{part}, {kind}: {run.recovered:.0%} of the loss recovered",
        xlabel="loss on the answers, nats",
        limits=(0, 1.6 * longest),
        labels=("the model", "MLP replaced"),
    )


@plots.style()
def equal_l0(
    l0: Mapping[str, Sequence[float]],
    explained: Mapping[str, Sequence[float]],
    added: Mapping[str, Sequence[float]],
) -> Figure:
    """Explained variance and added loss against the mean number of units that fire per token.

    Args:
        l0, explained, added: {kind: values}; a kind without values is left out of that panel.
    """
    picture, axes = plots.figure(12, 4.6, columns=2)
    panels = {"explained variance": explained, "nats added, this MLP replaced": added}
    ends = [value for each in l0.values() for value in each]
    ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if min(ends) / 2 < n < 2 * max(ends)]
    for one, (title, curves) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate(l0):
            look = {"color": plots.OKABE_ITO[index], "linestyle": plots.DASHES[index]}
            if name in curves:
                one.plot(l0[name], curves[name], label=name, **look)
        one.set(title=title, xlabel="L0: units that fire per token", xscale="log")
        one.set_xticks(ticks, [str(n) for n in ticks])
        one.minorticks_off()
    axes[0].margins(y=0.45)  # room for the legend, above the curves
    axes[0].legend(loc="upper left", ncols=2)
    return picture


@plots.style()
def rule(page: Page, layer: int, latent: int) -> Figure:
    """A latent as a rule: what fires it, what it writes, and where it fired.

    Left, its pre-activation on each token's embedding alone; right, the logits that its decoder row
    raises; below, its highest firings with the token in [[brackets]].

    Raises:
        ValueError: there is no such latent.

    Source: the feature dashboards of Dunefsky et al. 2024.
    """
    latent = page.features.check(latent)
    picture = plots.Picture(figsize=(12, 6.6), layout="none")
    picture.subplots_adjust(left=0.12, right=0.97, top=0.86, bottom=0.5, wspace=0.5)
    left, right = picture.subplots(1, 2)
    count, share = page.features.count[latent], page.features.frequency[latent]
    read = top_tokens(page.model, token_inputs(page.model, page.coder, layer, latent), SHOWN)
    draw_bars(left, read, "fires for (embedding → encoder)", "pre-activation, embedding alone")
    raised, _ = page.effects(latent, SHOWN)
    draw_bars(right, raised, "writes (decoder → unembedding)", "logit per unit of activation")
    picture.suptitle(
        f"layer {layer}, latent {latent}: fires {count:,} times, {share:.2%} of tokens"
    )
    found = contexts(page.held, page.features, latent, page.model.tokenizer, SHOWN)
    title = "where it fires most, one line per text" if found else "nowhere: dead on this text"
    picture.text(0.06, 0.36, title, fontsize="large")
    look = {"family": "monospace", "fontsize": 10.5, "va": "top", "linespacing": 2.2}
    picture.text(0.06, 0.335, "\n".join(f"{each.value:6.2f}" for each in found), **look)
    picture.text(0.13, 0.335, "\n".join(centred(each, 104) for each in found), **look)
    return picture


@plots.style()
def virtual(pairs: ActivePairs, most: int = 4_000) -> Figure:
    """Edges against virtual weights, of pairs at one position and at two; and at two, edges against
    those of even attention.

    Args:
        most: how many pairs to draw in a panel, about.

    Source: Dunefsky et al. 2024; Ameisen et al. 2025, "Global Weights".
    """
    picture, axes = plots.figure(12, 4.4, columns=3, sharey=True)
    panels = {
        "at the same position\nvirtual weight": (pairs.gap == 0, pairs.virtual),
        "between positions\nvirtual weight": (pairs.gap > 0, pairs.virtual),
        "between positions\neven attention": (pairs.gap > 0, pairs.even),
    }
    for one, (title, (chosen, promised)) in zip(axes, panels.items(), strict=True):
        x, y = promised[chosen], pairs.edge[chosen]
        step = max(1, len(x) // most)
        look = {"marker": "o", "linestyle": "", "markersize": 3, "alpha": 0.4}
        one.plot(x[::step], y[::step], **look)
        one.axhline(0, color="grey", linewidth=1, marker="", linestyle="-")
        one.set(title=f"{title}: r = {np.corrcoef(x, y)[0, 1]:.2f}", xlabel="promised")
    axes[0].set_ylabel("arrives (edge)")
    return picture
