"""Lesson 07's figures: rules silenced, MLPs replaced, rivals, a rule, virtual weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from mi_helpers import plots
from mi_helpers.circuits.replacement import Replacement, replaced
from mi_helpers.circuits.rules import ActivePairs, token_inputs, top_tokens
from mi_helpers.lessons.lesson_07.currencies import Coders, Strongest, without
from mi_helpers.lessons.lesson_07.experiments import ALL_LAYERS, Faithful, strongest_rules
from mi_helpers.models import LanguageModel
from mi_helpers.saes.features import contexts, logit_effects
from mi_helpers.saes.figures import Page, centred, draw_bars, printable

SHOWN = 6  # contexts in the figure of a rule, and tokens where one is silenced


@torch.no_grad()
@plots.style()
def silenced(model: LanguageModel, coders: Coders, prompt: str, silenced: int) -> Figure:
    """What a model says next without some of its rules, and what the last of these writes.

    Left, the tokens whose logits that rule raises most; right, the likeliest next tokens, before
    and after what the rules write is taken from their MLPs' outputs, everywhere but at the first
    position.

    Args:
        silenced: how many rules: those that write most for the model's answer at the last token.

    Raises:
        ValueError: no words (the model says so), or a number below 0.
    """
    ids = model.tokens(prompt)
    if silenced < 0:
        raise ValueError(f"{silenced} rules cannot be silenced: give 0 or more.")
    rules = strongest_rules(model, coders, ids)[: max(1, silenced)]
    gone = [rule[:2] for rule in rules[:silenced]]
    before, after = (
        next_token_probabilities(model, ids, without(coders, each)) for each in ([], gone)
    )
    picture, (left, right) = plots.figure(12, 4.2, columns=2)
    layer, latent, value = rules[-1]
    row = logit_effects(model, coders[layer].W_dec[latent][None])[0]
    title = f"rule {len(rules)} writes (layer {layer}, latent {latent})"
    draw_bars(left, top_tokens(model, row, SHOWN), title, "logit per unit of activation")
    shown = torch.maximum(before, after).topk(SHOWN).indices.tolist()
    places = np.arange(len(shown))
    for at, p, label in ((-0.2, before, "the model"), (0.2, after, f"{silenced} rules silenced")):
        drawn = right.barh(places + at, p[shown], 0.38, label=label, hatch=("", "//")[at > 0])
        right.bar_label(drawn, [f"{float(each):.2f}" for each in p[shown]], padding=3)
    right.set_yticks(places, [printable(model.token_text(i)) for i in shown])
    right.invert_yaxis()
    right.set(title="what comes next", xlabel="probability", xlim=(0, 1.15))
    right.legend(loc="lower right")
    return picture


@torch.no_grad()
def next_token_probabilities(
    model: LanguageModel, ids: torch.Tensor, by: Mapping[int, Replacement]
) -> torch.Tensor:
    """The model's probabilities after ids (1, pos), (d_vocab,), with MLPs replaced."""
    with replaced(model, by):
        return model(ids)[0, -1].float().softmax(-1)


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


def kinds_table(runs: Mapping[tuple[str, str], Faithful]) -> str:
    """Markdown: what replaces all MLPs, the loss that it recovers and adds, its worst family."""
    lines = ["| all MLPs replaced by | recovered | nats added | worst family |", "|---" * 4 + "|"]
    for (where, kind), run in runs.items():
        if where == ALL_LAYERS:
            family, share = min(run.by_family().items(), key=lambda pair: pair[1])
            cells = kind, f"{run.recovered:.1%}", f"{run.added:.2f}", f"{family}, {share:.0%}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@plots.style()
def rivals(
    explained: Mapping[str, Sequence[float]], added: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Latents and neurons, equally many per token: what they explain, and which skills they cost.

    Args:
        explained: {kind: explained variance of each layer's output}.
        added: {kind: {family: nats added with all MLPs replaced}}.
    """
    picture, (left, right) = plots.figure(12, 5.6, columns=2)
    for name, values in explained.items():
        left.plot(range(len(values)), values, label=name)
    left.set(title="each MLP's output", xlabel="layer", ylabel="explained variance")
    left.set_xticks(range(len(next(iter(explained.values())))))
    families = list(next(iter(added.values())))
    places = np.arange(len(families))
    for each in added.values():
        right.plot([each[name] for name in families], places, linestyle="", markersize=9)
    two = np.array([[each[name] for name in families] for each in added.values()])
    right.hlines(places, two.min(0), two.max(0), color="0.8", linewidth=3, zorder=0)
    right.axvline(0, color="grey", marker="", linewidth=1, linestyle="-")
    right.set_yticks(places, families)
    right.invert_yaxis()
    right.set(title="all MLPs replaced", xlabel="nats added to the answers' loss")
    where = {"loc": "outside lower center", "ncols": len(explained)}
    plots.name_series(picture, left.get_lines(), explained, **where)
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


@plots.style()
def by_country(found: Sequence[Strongest]) -> Figure:
    """What is lost of each country's currency and capital when its strongest rule is silenced.

    A circle for each country: its currency across, its capital up; a triangle: other currencies.
    """
    picture, axes = plots.figure(8.5, 4.8)
    own, capital = ([getattr(each, name) for each in found] for name in ("own", "capital"))
    look = {"linestyle": "", "markersize": 8}
    axes.plot(own, capital, marker="o", label="the country's capital", **look)
    axes.plot(own, [each.others for each in found], marker="^", label="other currencies", **look)
    end = 1.12 * max(*own, *capital)
    axes.plot([0, end], [0, end], color="grey", linestyle="--", marker="", linewidth=1)
    for each in found:
        if max(each.own, each.capital) > 0.5 * end:
            axes.annotate(
                f" {each.country}", (each.own, each.capital), va="bottom", fontsize="small"
            )
    axes.set(title="The rule that writes most, silenced", xlabel="of the currency's lead, lost")
    axes.set_ylabel("of the others' lead, lost")
    axes.legend(loc="upper left")
    return picture


def countries_table(found: Sequence[Strongest]) -> str:
    """Markdown: the shares of the lead that are lost: the median country, and the middle half."""
    names = {
        "own": "the currency",
        "capital": "the country's capital",
        "others": "other currencies",
        "neuron": "the currency, its strongest *neuron* silenced",
    }
    lines = ["| lead of | median lost | middle half |", "|---" * 3 + "|"]
    for name, text in names.items():
        values = [getattr(each, name) for each in found]
        low, middle, high = np.percentile(values, [25, 50, 75])
        lines.append(f"| {text} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)
