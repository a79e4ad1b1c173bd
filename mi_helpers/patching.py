"""Activation patching: put an activation of one run into another, and see how the answer changes.

    metric = normalised_logit_diff(model, clean, corrupted, " Paris", " Rome")
    effect = activation_patch(model, clean, corrupted, "resid_pre", metric)   # (layers, positions)
    effect = activation_patch(model, clean, corrupted, "z", metric)           # (layers, heads)

Denoising puts activations of the clean run into the corrupted one, noising those of the corrupted
run into the clean one. Prompts of one batch may differ in length: each is run without padding, and
gives what it gives alone. Positions are then given for each prompt (`Sweep`), for where the
prompts' lengths differ, no position stands for the same place in all of them.
Path patching is in `mi_helpers.paths`, the gradients' estimate of every patch in
`mi_helpers.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mi_helpers.ablation import Gaussian, Mean, Prompt, Resample, Zero, recorded
from mi_helpers.arguments import by_length, in_order, one_of, prompt_rows, shown, token_ids
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.prefix import BaseRun, Edit, run_edits
from mi_helpers.sweeps import (
    MODES,
    Group,
    Prompts,
    Run,
    Sweep,
    axes_of,
    groups_of,
    sides_of,
    two_sides,
)

MOST_LOGITS = 2**26  # held at one time
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

    Raises:
        ModelError: logits of another shape, or ids that are not one for each prompt.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2 or 0 in logits.shape:
        raise ModelError(f"logits is {shown(logits)}: expected a tensor (..., batch, d_vocab).")
    n, d_vocab = logits.shape[-2:]

    def at(what: str, ids) -> Tensor:
        ids = torch.tensor(token_ids(what, ids, d_vocab), device=logits.device)
        if len(ids) not in (1, n):
            raise ModelError(f"{what} holds {len(ids)} ids for {n} prompts: give one, or {n}.")
        ids = ids.reshape(-1, 1)
        return logits.gather(-1, ids.expand(*logits.shape[:-1], 1)).squeeze(-1).float()

    return at("answer", answer) - at("wrong", wrong)


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
    if isinstance(answer, str):
        answer = [answer]
    if isinstance(answer, list | tuple):
        answer = [model.to_single_token(a) if isinstance(a, str) else a for a in answer]
    return torch.tensor(token_ids("The answer", answer, model.d_vocab), device=model.device)


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
    run, other = two_sides(model, clean, corrupted)
    batch = len(run.rows)
    for ids in (answer, wrong):
        if len(ids) not in (1, batch):
            raise ModelError(
                f"There are {len(ids)} answers for {batch} prompts: give one for each."
            )
    if (answer == wrong).any():
        raise ModelError("The answer and the wrong answer are the same token: choose two.")
    raw = LogitDiff(answer, wrong)
    at_clean, at_corrupted = (
        float(_value(raw, last_logits(model, each), each.repeats)) for each in (run, other)
    )
    if abs(at_clean - at_corrupted) < 1e-6:
        raise ModelError(
            f"The logit difference is {at_clean:.3f} on both prompts, so there is nothing to "
            "normalise by: choose prompts or answers that the model tells apart."
        )
    return replace(raw, clean=at_clean, corrupted=at_corrupted)


# ----------------------------------------------------------------------------- activation patching


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
        clean: text, texts, or token ids, as `prompt_rows` takes them: the prompts may differ in
            length, and be padded on either side.
        corrupted: as many prompts, each of as many tokens, unless `over` gives positions; or
            `Gaussian(subject)`, the clean prompt with noise, averaged over its seeds (causal
            tracing); None where it is not used: noise with Mean or Zero.
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
    if not callable(metric):
        raise ModelError(f"metric is {shown(metric)}: expected a function of logits.")
    sweep = over if isinstance(over, Sweep) else Sweep(over)
    axes = axes_of(model, site, sweep.over)
    base, source = _base_and_source(model, clean, corrupted, mode, ablation)
    if source is None and sweep.source is not None:
        raise ModelError("source is of the other prompt, and there is none: leave it out.")
    groups, finals, shape = groups_of(base, source, sweep, axes), [], []
    for group in groups:
        final, shape = _patched(model, group, site, sweep, ablation)
        finals.append(final)
    final = in_order(finals, [group.prompts for group in groups], dim=1)
    effect = metric_of_streams(model, final, metric, base.repeats)
    return effect.reshape(*shape, *effect.shape[1:])


def _patched(model: LanguageModel, group: Group, site: str, sweep: Sweep, ablation):
    """The final streams of a group of prompts under every patch, (patches, repeats * batch,
    d_model), and the shape of the sweep."""
    base, source = group.base, group.source
    here = replace(sweep, positions=group.at, source=None)
    layers, by_head, by_position, shape = here.places(model, site, base.ids.shape[1])
    values = _values(model, base, source, [(site, i) for i in layers], ablation)
    same = 0
    if isinstance(ablation, Resample):
        values = {key: group.line_up(x, site) for key, x in values.items()}
        same = _first_change(base, source) if group.at == group.taken else 0
    patches = [
        _edits((site, i), [p for p in positions if p >= same], heads, values[site, i])
        for i in layers
        for heads in by_head
        for positions in by_position
    ]
    return run_edits(BaseRun(model, base.rows, base.hooks()), patches), shape


def _edits(key: Key, positions: Sequence[int], heads, value: Tensor) -> list[Edit]:
    return [Edit(*key, tuple(positions), heads, value)] if positions else []


def _first_change(base: Run, source: Run) -> int:
    """The first position at which base and source can differ: before it, a patch changes nothing,
    as attention is causal."""
    noise = source.noise if base.noise is None else base.noise
    if noise is not None:
        changed = noise.any(-1).flatten(0, 1).any(0)
    else:
        both = min(base.ids.shape[1], source.ids.shape[1])
        changed = (base.ids[:, :both] != source.ids[:, :both]).any(0)
    found = changed.nonzero()
    return int(found[0]) if len(found) else len(changed)


def _base_and_source(
    model: LanguageModel, clean: Prompt, corrupted, mode: str, ablation
) -> tuple[Prompts, Prompts | None]:
    """The prompts that are patched, and those that the activations come from."""
    one_of("mode", mode, MODES)
    if not isinstance(ablation, Zero | Mean | Resample):
        raise ModelError(
            f"ablation is {ablation!r}: expected Resample(), Mean(reference) or Zero()."
        )
    if isinstance(ablation, Resample) and ablation.reference is not None:
        raise ModelError("A patch takes the other prompt's activation: leave the reference out.")
    if corrupted is None and mode == "noise" and not isinstance(ablation, Resample):
        return Prompts(prompt_rows(model, clean, "The clean prompts")), None
    return sides_of(model, clean, corrupted, mode)


def _values(
    model: LanguageModel, base: Run, source: Run | None, keys: list[Key], ablation
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


def _means(model: LanguageModel, base: Run, keys: list[Key], ablation: Mean) -> dict[Key, Tensor]:
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


def last_logits(model: LanguageModel, prompts: Prompt | Prompts) -> Tensor:
    """Logits at each prompt's own last token, (batch, d_vocab), whatever the prompts' lengths.

    Args:
        prompts: as `prompt_rows` takes them.

    Raises:
        ModelError: what `prompt_rows` refuses.
    """
    if not isinstance(prompts, Prompts):
        prompts = Prompts(prompt_rows(model, prompts))
    groups, found = by_length([len(row) for row in prompts.rows]), []
    for chosen in groups:
        run = prompts.some(chosen)
        with torch.no_grad(), model.hooks(run.hooks()):
            _, cache = model.run_with_cache(run.rows, "resid_final", model.n_layers, pos=-1)
        found.append(cache["resid_final"])
    return model.unembed(in_order(found, groups, dim=0))


def check_metric(metric: Metric, found) -> Tensor:
    """What a metric gave, a number for each run or for each prompt.

    Raises:
        ModelError: it is something else, or NaN.
    """
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ModelError(f"metric gave {shown(found)}: expected a tensor of numbers.")
    if found.isnan().any():
        raise ModelError("metric gave NaN: look at its logits, and at what it divides by.")
    return found


def metric_of_streams(
    model: LanguageModel, final: Tensor, metric: Metric, repeats: int = 1
) -> Tensor:
    """The metric of final streams (patches, repeats * batch, d_model), some patches at a time."""
    step = max(1, MOST_LOGITS // (final.shape[1] * model.d_vocab))
    return torch.cat([_value(metric, model.unembed(x), repeats) for x in final.split(step)])


def _value(metric: Metric, logits: Tensor, repeats: int) -> Tensor:
    """The metric of logits (..., repeats * batch, d_vocab), the mean over the repeats: (...,), or
    (..., batch) of a metric that keeps the prompts apart."""
    found = check_metric(metric, metric(logits.unflatten(-2, (repeats, -1))))
    if found.shape[: logits.ndim - 1] != (*logits.shape[:-2], repeats):
        raise ModelError(
            f"metric gave the shape {tuple(found.shape)} for logits (..., batch, d_vocab): "
            "expected (...,) or (..., batch)."
        )
    return found.float().mean(logits.ndim - 2)
