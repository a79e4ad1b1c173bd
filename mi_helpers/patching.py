"""Activation patching: put an activation of one run into another, and see how the answer changes.

    metric = normalised_logit_diff(model, clean, corrupted, " Paris", " Rome")
    effect = activation_patch(model, clean, corrupted, "resid_pre", metric)   # (layers, positions)
    effect = activation_patch(model, clean, corrupted, "z", metric)           # (layers, heads)
    guess = attribution_patch(model, clean, corrupted, "z", metric)           # the same axes

The two prompts have equally many tokens, so that positions line up. Denoising puts activations of
the clean run into the corrupted one, noising those of the corrupted run into the clean one.
Path patching is in `mi_helpers.paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mi_helpers.ablation import Gaussian, Mean, Prompt, Resample, Zero, indices, recorded
from mi_helpers.layouts import Key, ModelError, nearest
from mi_helpers.models import LanguageModel
from mi_helpers.prefix import BaseRun, Edit, run_edits

MOST_LOGITS = 2**26  # held at one time
STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("z", "q", "k", "v", "pattern")
OVER = ("positions", "heads", "heads x positions", "layers")
MODES = ("denoise", "noise")
OTHER_RUN = Resample()

Metric = Callable[[Tensor], Tensor]  # last logits (..., batch, d_vocab) -> (...,) or (..., batch)


# -------------------------------------------------------------------------------------- metrics


def logit_diffs(logits: Tensor, answer, wrong) -> Tensor:
    """logit(answer) - logit(wrong) of each prompt.

    Args:
        logits: at the last position, (..., batch, d_vocab).
        answer: token ids, one for all prompts or (batch,).
        wrong: likewise.

    Returns:
        (..., batch), float32.
    """

    def at(ids) -> Tensor:
        ids = torch.as_tensor(ids, device=logits.device).reshape(-1, 1)
        return logits.gather(-1, ids.expand(*logits.shape[:-1], 1)).squeeze(-1).float()

    return at(answer) - at(wrong)


def logit_diff(logits: Tensor, answer, wrong) -> Tensor:
    """The mean of `logit_diffs` over the batch, (..., batch, d_vocab) -> (...,)."""
    return logit_diffs(logits, answer, wrong).mean(-1)


@dataclass(frozen=True)
class LogitDiff:
    """A metric: the logit difference on a scale where `corrupted` is 0 and `clean` is 1.

        metric(logits) = (logit_diff(logits) - corrupted) / (clean - corrupted)

    Args:
        answer: token ids (batch,) or (1,).
        wrong: likewise.
        clean: the logit difference of the clean run.
        corrupted: that of the corrupted run.
    """

    answer: Tensor
    wrong: Tensor
    clean: float = 1.0
    corrupted: float = 0.0

    def raw(self, logits: Tensor) -> Tensor:
        """The logit difference itself, (..., batch, d_vocab) -> (...,)."""
        return logit_diff(logits, self.answer, self.wrong)

    def each(self, logits: Tensor) -> Tensor:
        """The metric of each prompt, (..., batch, d_vocab) -> (..., batch), to be used as a metric
        that keeps the prompts apart."""
        raw = logit_diffs(logits, self.answer, self.wrong)
        return (raw - self.corrupted) / (self.clean - self.corrupted)

    def __call__(self, logits: Tensor) -> Tensor:
        return self.each(logits).mean(-1)


def answer_ids(model: LanguageModel, answer: str | int | Sequence | Tensor) -> Tensor:
    """One token id for each answer, (n,), from text (one token each) or from ids.

    Raises:
        ModelError: an answer is several tokens, or not in the vocabulary.
    """
    if isinstance(answer, str | int):
        answer = [answer]
    ids = [model.to_single_token(a) if isinstance(a, str) else int(a) for a in answer]
    outside = [i for i in ids if not 0 <= i < model.d_vocab]
    if outside or not ids:
        raise ModelError(
            f"The answer ids are {ids}: expected at least one, from 0 to {model.d_vocab - 1}."
        )
    return torch.tensor(ids, device=model.device)


def normalised_logit_diff(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt | Gaussian,
    answer: str | int | Sequence,
    wrong: str | int | Sequence,
) -> LogitDiff:
    """The metric of a pair of prompts: 0 on the corrupted prompt, 1 on the clean one.

    Args:
        corrupted: the other prompt, or `Gaussian(subject)`: the clean prompt with noise.
        answer: the clean prompt's answer, one token (text or id), or one for each prompt.
        wrong: the corrupted prompt's answer, likewise.

    Raises:
        ModelError: an answer is several tokens; answer and wrong are equal; the prompts do not line
            up (`pair`); the two runs have the same logit difference.
    """
    answer, wrong = answer_ids(model, answer), answer_ids(model, wrong)  # pyright: ignore[reportAssignmentType]
    run, other = _two_runs(model, clean, corrupted)
    batch = run.ids.shape[0]
    for ids in (answer, wrong):
        if len(ids) not in (1, batch):
            raise ModelError(
                f"There are {len(ids)} answers for {batch} prompts: give one for each."
            )
    if (answer == wrong).any():
        raise ModelError("The answer and the wrong answer are the same token: choose two.")
    raw = LogitDiff(answer, wrong)
    at_clean, at_corrupted = (
        float(_value(raw, _last_logits(model, each), each.repeats)) for each in (run, other)
    )
    if abs(at_clean - at_corrupted) < 1e-6:
        raise ModelError(
            f"The logit difference is {at_clean:.3f} on both prompts, so there is nothing to "
            "normalise by: choose prompts or answers that the model tells apart."
        )
    return replace(raw, clean=at_clean, corrupted=at_corrupted)


# -------------------------------------------------------------------------------------- prompts


def pair(model: LanguageModel, clean: Prompt, corrupted: Prompt) -> tuple[Tensor, Tensor]:
    """Both prompts (or batches of them) as token ids of one shape, (batch, pos).

    Raises:
        ModelError: an empty prompt, one longer than the context, other counts of tokens or prompts
            on the two sides, or two prompts that are the same.
    """
    a, b = model.ids(clean), model.ids(corrupted)
    if a.shape[1] != b.shape[1]:
        raise ModelError(
            f"The clean prompt has {a.shape[1]} tokens and the corrupted one {b.shape[1]}: choose "
            "words of equally many tokens, so that positions line up."
        )
    if a.shape[0] != b.shape[0]:
        raise ModelError(f"There are {a.shape[0]} clean prompts and {b.shape[0]} corrupted ones.")
    if torch.equal(a, b):
        raise ModelError("The clean and the corrupted prompt are the same: change a word.")
    return a, b


@dataclass(frozen=True)
class _Run:
    """What a run starts from: ids (batch, pos), and noise on the embedding of each repeat."""

    ids: Tensor
    noise: Tensor | None = None  # (repeats, batch, pos, d_model)
    repeats: int = 1

    @property
    def rows(self) -> Tensor:
        """Token ids of all rows, (repeats * batch, pos): each repeat has all prompts."""
        return self.ids.repeat(self.repeats, 1)

    def hooks(self) -> dict:
        """The noise, as hooks."""
        return {} if self.noise is None else {"embed": lambda x: x + self.noise.flatten(0, 1)}


def _two_runs(model: LanguageModel, clean: Prompt, corrupted) -> tuple[_Run, _Run]:
    """The clean run and the corrupted one."""
    if corrupted is None:
        raise ModelError("There is no corrupted prompt: give one of as many tokens as the clean.")
    if isinstance(corrupted, Gaussian):
        ids, n = model.ids(clean), corrupted.seeds
        return _Run(ids, None, n), _Run(ids, corrupted.noise(model, ids), n)
    a, b = pair(model, clean, corrupted)
    return _Run(a), _Run(b)


def one_of(what: str, given, known: Sequence[str]) -> None:
    """ModelError, with the nearest known name, where `given` is not one of `known`."""
    if given not in known:
        raise ModelError(
            f"{what} is {given!r}: expected one of {', '.join(known)}.{nearest(given, known)}"
        )


# ----------------------------------------------------------------------------- activation patching


@dataclass(frozen=True)
class Sweep:
    """The patches of a sweep: its axes, and the places that it is restricted to.

    Args:
        over: "positions", "heads", "heads x positions", or "layers" (a whole layer at once); None
            means heads where the site has heads, else positions.
        layers: only these layers; None means all.
        heads: only these heads; without a heads axis, they are patched at once.
        positions: only these positions; without a positions axis, they are patched at once.
    """

    over: str | None = None
    layers: int | Sequence[int] | None = None
    heads: int | Sequence[int] | None = None
    positions: int | Sequence[int] | None = None

    def places(self, model: LanguageModel, site: str, length: int):
        """The layers, the sets of heads (None where there are none) and the sets of positions that
        are patched, and the shape of the result."""
        over = _axes(model, site, self.over)
        if self.heads is not None and site not in HEAD_SITES:
            raise ModelError(f"{site!r} has no heads: leave `heads` out.")
        n_heads = model.n_kv_heads if site in ("k", "v") else model.n_heads
        layers = indices(self.layers, model.n_layers, "layer")
        at = indices(self.positions, length, "position")
        by_position = [(p,) for p in at] if "positions" in over else [tuple(at)]
        by_head: list = [None]
        if site in HEAD_SITES:
            chosen = indices(self.heads, n_heads, "head")
            by_head = [(h,) for h in chosen] if "heads" in over else [tuple(chosen)]
        shape = [len(layers)]
        shape += [len(by_head)] if "heads" in over else []
        shape += [len(by_position)] if "positions" in over else []
        return layers, by_head, by_position, shape


@torch.no_grad()
def activation_patch(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt | Gaussian | None,
    site: str,
    metric: Metric,
    mode: str = "denoise",
    ablation: Zero | Mean | Resample = OTHER_RUN,
    over: str | Sweep | None = None,
) -> Tensor:
    """The metric after each patch of a sweep.

        denoise: the corrupted run, with the clean run's activation put in at one place
        noise:   the clean run, with the corrupted run's activation put in at one place

    Args:
        clean: text, or token ids (batch, pos).
        corrupted: as many tokens; or `Gaussian(subject)`, the clean prompt with noise, averaged
            over its seeds (causal tracing); None where it is not used: noise with Mean or Zero.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, or z, q, k, v, pattern, which
            have heads (k and v the key-value heads).
        metric: logits at the last position (..., batch, d_vocab) -> (...,) or (..., batch).
        mode: "denoise" or "noise".
        ablation: what is put in. `Resample()`: the other run's activation. `Zero()`.
            `Mean(reference)`: the mean over reference prompts, position by position.
        over: the axes besides the layers, or a `Sweep`, which can also restrict them.

    Returns:
        float32 (layers, positions), (layers, heads), (layers, heads, positions) or (layers,); with
        a last axis for the prompts where the metric keeps them apart, as `LogitDiff.each` does.

    Raises:
        ModelError: unknown site, mode, ablation or axes; prompts that do not line up (`pair`).
    """
    sweep = over if isinstance(over, Sweep) else Sweep(over)
    base, source = _base_and_source(model, clean, corrupted, mode, ablation)
    layers, by_head, by_position, shape = sweep.places(model, site, base.ids.shape[1])
    values = _values(model, base, source, [(site, i) for i in layers], ablation)
    same = _first_change(base, source) if isinstance(ablation, Resample) else 0
    patches = [
        _edits((site, i), [p for p in positions if p >= same], heads, values[site, i])
        for i in layers
        for heads in by_head
        for positions in by_position
    ]
    final = run_edits(BaseRun(model, base.rows, base.hooks()), patches)
    effect = metric_of_streams(model, final, metric, base.repeats)
    return effect.reshape(*shape, *effect.shape[1:])


def _edits(key: Key, positions: Sequence[int], heads, value: Tensor) -> list[Edit]:
    return [Edit(*key, tuple(positions), heads, value)] if positions else []


def _first_change(base: _Run, source: _Run) -> int:
    """The first position at which base and source can differ: before it, a patch changes nothing,
    as attention is causal."""
    noise = source.noise if base.noise is None else base.noise
    changed = (
        (base.ids != source.ids).any(0) if noise is None else noise.any(-1).flatten(0, 1).any(0)
    )
    return int(changed.nonzero()[0])


def _base_and_source(
    model: LanguageModel, clean: Prompt, corrupted, mode: str, ablation
) -> tuple[_Run, _Run | None]:
    """The run that is patched, and the run that the activations come from."""
    one_of("mode", mode, MODES)
    if not isinstance(ablation, Zero | Mean | Resample):
        raise ModelError(
            f"ablation is {ablation!r}: expected Resample(), Mean(reference) or Zero()."
        )
    if isinstance(ablation, Resample) and ablation.reference is not None:
        raise ModelError("A patch takes the other prompt's activation: leave the reference out.")
    if corrupted is None and mode == "noise" and not isinstance(ablation, Resample):
        return _Run(model.ids(clean)), None
    pure, other = _two_runs(model, clean, corrupted)
    return (other, pure) if mode == "denoise" else (pure, other)


def _values(
    model: LanguageModel, base: _Run, source: _Run | None, keys: list[Key], ablation
) -> Mapping[Key, Tensor]:
    """{(site, layer): what is put in, (rows of the base run, pos, ...)}."""
    if isinstance(ablation, Mean):
        return _means(model, base, keys, ablation)
    run = base if source is None else source
    with model.hooks(run.hooks()):
        stop = 1 + max(layer for _, layer in keys)
        _, cache = model.run_with_cache(run.rows, keys, stop_at_layer=stop)
    zero = isinstance(ablation, Zero)
    return {key: torch.zeros_like(x) if zero else x for key, x in cache.items()}


def _means(model: LanguageModel, base: _Run, keys: list[Key], ablation: Mean) -> dict[Key, Tensor]:
    """The same for the mean over reference prompts, position by position."""
    reference, length = ablation.reference, base.ids.shape[1]
    if reference is None:
        raise ModelError("Mean ablation needs `reference`: prompts of as many tokens.")
    reference = reference if isinstance(reference, Mapping) else model.ids(reference)
    found = {}
    for key, x in recorded(model, reference, keys).items():
        tokens = x.shape[-1] if key[0] == "pattern" else x.shape[1]
        if tokens != length or x.ndim < 3:
            raise ModelError(
                f"The reference prompts have {tokens} tokens, the patched ones {length}: choose "
                "prompts of as many tokens."
            )
        found[key] = x.mean(0, keepdim=True).expand(len(base.rows), *x.shape[1:])
    return found


def _last_logits(model: LanguageModel, run: _Run) -> Tensor:
    with torch.no_grad(), model.hooks(run.hooks()):
        _, cache = model.run_with_cache(run.rows, "resid_final", model.n_layers, pos=-1)
    return model.unembed(cache["resid_final"])


def metric_of_streams(
    model: LanguageModel, final: Tensor, metric: Metric, repeats: int = 1
) -> Tensor:
    """The metric of final streams (patches, repeats * batch, d_model), some patches at a time."""
    step = max(1, MOST_LOGITS // (final.shape[1] * model.d_vocab))
    return torch.cat([_value(metric, model.unembed(x), repeats) for x in final.split(step)])


def _value(metric: Metric, logits: Tensor, repeats: int) -> Tensor:
    """The metric of logits (..., repeats * batch, d_vocab), the mean over the repeats: (...,), or
    (..., batch) of a metric that keeps the prompts apart."""
    return metric(logits.unflatten(-2, (repeats, -1))).float().mean(logits.ndim - 2)


# ---------------------------------------------------------------------------- attribution patching


def attribution_patch(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt,
    sites: str | Sequence[str],
    metric: Metric,
    mode: str = "denoise",
    over: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """A first-order estimate of every patch of `activation_patch`, from one backward pass.

        metric(base) + Σ (activation(other) - activation(base)) · ∂ metric / ∂ activation(base)

    summed over the components of each patch. Base and other are the corrupted and the clean run
    when denoising, the other way round when noising.

    Args:
        sites: one site, or several, which share the one backward pass.
        over: the axes besides the layers, as in `activation_patch`.

    Returns:
        The axes and the scale of `activation_patch`; of several sites, {site: tensor}.

    Source: Nanda 2023, Attribution Patching.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    axes = {site: _axes(model, site, over) for site in names}
    one_of("mode", mode, MODES)
    base, other = pair(model, clean, corrupted)
    if mode == "denoise":
        base, other = other, base
    keys = [(site, layer) for site in names for layer in range(model.n_layers)]
    with torch.no_grad():
        _, there = model.run_with_cache(other, keys, stop_at_layer=model.n_layers)
    here, slopes, value = _gradients(model, base, keys, metric)
    found = {}
    for site in names:
        layers = [(site, layer) for layer in range(model.n_layers)]
        products = [(there[key] - here[key]) * slopes[key] for key in layers]
        effect = torch.stack([x.float().sum(-1) for x in products])  # (layers, batch, ...)
        found[site] = value + _summed(effect, site, axes[site], keep_prompts=value.ndim > 0)
    return found[sites] if isinstance(sites, str) else found


def _gradients(model: LanguageModel, ids: Tensor, keys: list[Key], metric: Metric):
    """Activations and the metric's gradients at some sites, {key: tensor}, and the metric."""
    here: dict[Key, Tensor] = {}

    def keep(key: Key):
        def hook(x: Tensor) -> Tensor:
            here[key] = x if x.requires_grad else x.requires_grad_()
            return here[key]

        return hook

    with torch.enable_grad(), model.hooks({key: keep(key) for key in keys}):
        _, cache = model.run_with_cache(ids, "resid_final", model.n_layers, pos=-1)
        value = metric(model.unembed(cache["resid_final"]))
        slopes = torch.autograd.grad(value.sum(), [here[key] for key in keys])  # prompts do not mix
    here = {key: x.detach() for key, x in here.items()}
    return here, dict(zip(keys, slopes, strict=True)), value.detach().float()


def _summed(effect: Tensor, site: str, over: str, keep_prompts: bool) -> Tensor:
    """Effects (layers, batch, pos), (layers, batch, pos, heads) or, of a pattern, (layers, batch,
    heads, pos), summed over what is no axis of the sweep."""
    if site in HEAD_SITES and site != "pattern":
        effect = effect.transpose(2, 3)  # (layers, batch, heads, pos)
    effect = effect.movedim(1, -1) if keep_prompts else effect.sum(1)
    n = effect.ndim - keep_prompts
    summed = {"heads": (2,), "layers": range(1, n), "positions": range(1, n - 1)}
    dims = tuple(summed.get(over, ()))
    return effect.sum(dims) if dims else effect


def _axes(model: LanguageModel, site: str, over: str | None) -> str:
    """The axes of a sweep over `site`, checked."""
    one_of("site", site, STREAM_SITES + HEAD_SITES)
    model.check_site(site)
    over = over or ("heads" if site in HEAD_SITES else "positions")
    one_of("over", over, OVER)
    if "heads" in over and site not in HEAD_SITES:
        raise ModelError(f"{site!r} has no heads: sweep it over positions, or over layers.")
    return over
