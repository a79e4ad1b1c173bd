"""Attribution patching: the gradient's estimate of every patch, in a pass or a few.

    guess = attribution_patch(model, clean, corrupted, "z", metric)            # (layers, heads)
    closer = attribution_patch(model, clean, corrupted, "z", metric, steps=8)  # integrated

Prompts, metrics, modes and sweeps are those of `mi_helpers.patching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mi_helpers.ablation import Prompt
from mi_helpers.arguments import in_order, shown, whole
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.patching import Metric, check_metric
from mi_helpers.sweeps import HEAD_SITES, Group, Sweep, axes_of, groups_of, sides_of


def attribution_patch(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt,
    sites: str | Sequence[str],
    metric: Metric,
    mode: str = "denoise",
    over: str | Sweep | None = None,
    steps: int = 1,
) -> Tensor | dict[str, Tensor]:
    """An estimate of every patch of `activation_patch`, from gradients.

        metric(base) + Σ (activation(other) - activation(base)) · slope

    summed over the components of each patch. The slope is ∂ metric / ∂ activation in the base run;
    with `steps` it is that gradient's mean along the straight line of the activation from base to
    other, the rest of each layer's run being computed from it (integrated gradients). Summed over a
    whole layer that is the effect of patching it, up to the line's division into steps. Base and
    other are the corrupted and the clean run when denoising, the other way round when noising.

    Args:
        clean, corrupted: as for `activation_patch`, of any lengths.
        sites: one site, or several, which share the one backward pass.
        over: the axes besides the layers, or a `Sweep`, as in `activation_patch`.
        steps: 1 takes the gradient in the base run, in one backward pass for all; n takes n points
            on the line, in n passes for each site and layer.

    Returns:
        The axes and the scale of `activation_patch`; of several sites, {site: tensor}.

    Raises:
        ModelError: what `activation_patch` refuses; steps below 1; no site.

    Source: Nanda 2023, Attribution Patching; Sundararajan et al. 2017 for integrated gradients, on
    the line of the activation itself as Marks et al. 2024, Sparse Feature Circuits, take them.
    """
    names = [sites] if isinstance(sites, str) else sites
    if not isinstance(names, Sequence) or not names:
        raise ModelError(f"sites is {shown(sites)}: give at least one site.")
    if not callable(metric):
        raise ModelError(f"metric is {shown(metric)}: expected a function of logits.")
    sweep = over if isinstance(over, Sweep) else Sweep(over)
    axes = {site: axes_of(model, site, sweep.over) for site in names}
    whole("steps", steps, 1)
    base, other = sides_of(model, clean, corrupted, mode)
    groups = [groups_of(base, other, sweep, over) for over in axes.values()][0]
    lines = [_Line(model, group, names, sweep) for group in groups]
    order = [group.prompts for group in groups]
    value = _backward(model, lines, order, metric)
    if steps > 1:
        _integrate(model, lines, order, metric, steps)
    found = {}
    for site in names:
        each = [line.effect(site, axes[site]) for line in lines]
        effect = in_order(each, order, dim=-1)  # (layers, ..., batch)
        found[site] = value + (effect if value.ndim else effect.sum(-1))
    return found[sites] if isinstance(sites, str) else found


class _Line:
    """The activations of some prompts of one length, from base to other.

    Attributes:
        here, there: {(site, layer): activation} in the base run, and with what is put in.
        slopes: the metric's gradients, of the same shapes.
        streams: the base run's resid_pre of every layer, for `_integrate`.
    """

    def __init__(self, model: LanguageModel, group: Group, sites: Sequence[str], sweep: Sweep):
        self.model, self.group = model, group
        own = replace(sweep, positions=group.at, source=None)
        length = group.base.ids.shape[1]
        self.places = {site: own.places(model, site, length) for site in sites}
        self.keys = [(site, layer) for site in sites for layer in self.places[site][0]]
        stop = model.n_layers
        with torch.no_grad():
            _, cache = model.run_with_cache(group.source.ids, self.keys, stop_at_layer=stop)
        self.there = {key: group.line_up(cache[key], key[0]) for key in self.keys}
        self.here: dict[Key, Tensor] = {}
        self.slopes: dict[Key, Tensor] = {}

    def run(self) -> Tensor:
        """The base run's final stream at the last token, (prompts, d_model), with gradients."""

        def keep(key: Key):
            def hook(x: Tensor) -> Tensor:
                self.here[key] = x if x.requires_grad else x.requires_grad_()
                return self.here[key]

            return hook

        with self.model.hooks({key: keep(key) for key in self.keys}):
            _, cache = self.model.run_with_cache(
                self.group.base.ids, ["resid_pre", "resid_final"], self.model.n_layers
            )
        self.streams = [cache["resid_pre", i].detach() for i in range(self.model.n_layers)]
        return cache["resid_final"][:, -1]

    def chosen(self, site: str) -> tuple[list[int] | None, list[int]]:
        """The heads (None where there are none) and the positions of the sweep."""
        _, by_head, by_position, _ = self.places[site]
        heads = None if by_head == [None] else [h for some in by_head for h in some]
        return heads, [p for some in by_position for p in some]

    def point(self, key: Key, share: float) -> Tensor:
        """The activation so far along the way from base to other, where the sweep patches."""
        heads, positions = self.chosen(key[0])
        here, there = self.here[key], self.there[key]
        mask = torch.zeros(here.shape[1:], dtype=torch.bool, device=here.device)
        if heads is None:
            mask[positions] = True
        else:
            by_pos = mask if key[0] != "pattern" else mask.transpose(0, 1)  # (pos, heads, ...)
            by_pos[torch.tensor(positions)[:, None], torch.tensor(heads)] = True
        return (here + torch.where(mask, share * (there - here), 0.0)).requires_grad_()

    def run_on(self, key: tuple[str, int], x: Tensor) -> Tensor:
        """The final stream at the last token when the activation is x, (prompts, d_model)."""
        layer = key[1] or 0
        with self.model.hooks({key: lambda _: x}):
            final = self.model.run_from_layer(self.streams[layer], layer, self.model.n_layers)
        return final[:, -1]

    def effect(self, site: str, over: str) -> Tensor:
        """The estimated effects, (layers, [heads], [positions], prompts)."""
        heads, positions = self.chosen(site)
        keys = [key for key in self.keys if key[0] == site]
        products = [(self.there[key] - self.here[key]) * self.slopes[key] for key in keys]
        effect = torch.stack([x.float().sum(-1) for x in products])  # (layers, prompts, pos, ...)
        if site in HEAD_SITES and site != "pattern":
            effect = effect.transpose(2, 3)  # (layers, prompts, heads, pos)
        effect = effect[..., positions]
        if heads is not None:
            effect = effect[:, :, heads]
        effect = effect if "positions" in over else effect.sum(-1)
        effect = effect if heads is None or "heads" in over else effect.sum(2)
        return effect.movedim(1, -1)


def _backward(model: LanguageModel, lines: list[_Line], order, metric: Metric) -> Tensor:
    """The base run's metric, (,) or (batch,); its gradients are kept as each line's slopes."""
    with torch.enable_grad():
        final = in_order([line.run() for line in lines], order, dim=0)
        value = check_metric(metric, metric(model.unembed(final)))
        pairs = [(line, key) for line in lines for key in line.keys]
        slopes = torch.autograd.grad(value.sum(), [line.here[key] for line, key in pairs])
    for (line, key), slope in zip(pairs, slopes, strict=True):
        line.slopes[key], line.here[key] = slope, line.here[key].detach()
    return value.detach().float()


def _integrate(model: LanguageModel, lines: list[_Line], order, metric: Metric, steps: int) -> None:
    """The slopes' means at the middles of `steps` equal parts of each line."""
    for key in lines[0].keys:
        total = [torch.zeros_like(line.here[key]) for line in lines]
        for step in range(steps):
            with torch.enable_grad():
                points = [line.point(key, (step + 0.5) / steps) for line in lines]
                finals = [line.run_on(key, x) for line, x in zip(lines, points, strict=True)]
                value = metric(model.unembed(in_order(finals, order, dim=0))).sum()
                slopes = torch.autograd.grad(value, points)
            for sum_, slope in zip(total, slopes, strict=True):
                sum_ += slope / steps
        for line, mean in zip(lines, total, strict=True):
            line.slopes[key] = mean
