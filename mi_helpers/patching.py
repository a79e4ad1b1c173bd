"""Activation patching: put an activation of one run into another, and see what the answer does.

    metric = normalised_logit_diff(model, clean, corrupted, " Paris", " Rome")
    effect = activation_patch(model, clean, corrupted, "resid_pre", metric)   # (layers, positions)
    effect = activation_patch(model, clean, corrupted, "z", metric)           # (layers, heads)
    guess = attribution_patch(model, clean, corrupted, "z", metric)           # the same axes
    direct = path_patch(model, clean, corrupted, [(2, 1)], [("q", 4, 3)], metric)

The two prompts have equally many tokens, so that positions line up. Denoising puts activations of
the clean run into the corrupted one, noising those of the corrupted run into the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mi_helpers.layouts import ModelError, nearest
from mi_helpers.models import LanguageModel
from mi_helpers.prefix import (
    MOST_TOKENS,
    BaseRun,
    Edit,
    run_edits,
    run_mlp,
    write_heads,
)

MOST_LOGITS = 2**26  # held at one time
STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("z", "q", "k", "v", "pattern")
OVER = ("positions", "heads", "heads x positions", "layers")
MODES = ("denoise", "noise")
ABLATIONS = ("resample", "mean", "zero", "gaussian")

Prompt = str | list | Tensor
Node = tuple[str, int, int | None]  # (kind, layer, head)
Metric = Callable[[Tensor], Tensor]  # last logits (..., batch, d_vocab) -> (...,) or (..., batch)


# -------------------------------------------------------------------------------------- metrics


def logit_diffs(logits: Tensor, answer, wrong) -> Tensor:
    """logit(answer) - logit(wrong) of each prompt.

    Args:
        logits: at the last position, (..., batch, d_vocab).
        answer, wrong: token ids, one for all prompts or (batch,).

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

    answer, wrong: token ids (batch,) or (1,); clean, corrupted: the two runs' logit differences.
    """

    answer: Tensor
    wrong: Tensor
    clean: float = 1.0
    corrupted: float = 0.0

    def raw(self, logits: Tensor) -> Tensor:
        """The logit difference itself, (..., batch, d_vocab) -> (...,)."""
        return logit_diff(logits, self.answer, self.wrong)

    def each(self, logits: Tensor) -> Tensor:
        """The metric of each prompt, on the same scale, (..., batch, d_vocab) -> (..., batch): a
        metric of its own, whose mean over the prompts is this one."""
        raw = logit_diffs(logits, self.answer, self.wrong)
        return (raw - self.corrupted) / (self.clean - self.corrupted)

    def __call__(self, logits: Tensor) -> Tensor:
        return self.each(logits).mean(-1)


def answer_ids(model: LanguageModel, answer: str | int | Sequence | Tensor) -> Tensor:
    """One token id for each answer, (n,): from text (one token each), or from ids.

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
    corrupted: Prompt | None,
    answer: str | int | Sequence,
    wrong: str | int | Sequence,
    *,
    subject: Sequence[int] | None = None,
    seeds: int = 10,
    scale: float = 3.0,
) -> LogitDiff:
    """The metric of a pair of prompts: 0 on the corrupted prompt, 1 on the clean one.

    Args:
        answer, wrong: the clean and the corrupted prompt's answers, one token each (text or id),
            or one for each prompt of a batch.
        corrupted: None means the clean prompt with noise on its `subject` (ROME), as
            `activation_patch(..., ablation="gaussian")` uses it, with the same `seeds` and `scale`.

    Raises:
        ModelError: an answer is several tokens; answer and wrong are equal; the prompts do not fit
            together (`pair`); the two runs have the same logit difference.
    """
    answer, wrong = answer_ids(model, answer), answer_ids(model, wrong)
    run, other = _two_runs(model, clean, corrupted, subject, seeds, scale)
    batch = run.ids.shape[0]
    for ids in (answer, wrong):
        if len(ids) not in (1, batch):
            raise ModelError(
                f"There are {len(ids)} answers for {batch} prompts: give one for each."
            )
    if (answer == wrong).any():
        raise ModelError("The answer and the wrong answer are the same token: choose two.")
    raw = LogitDiff(answer, wrong)
    at_clean, at_corrupted = (float(_value(raw, _last_logits(model, r), r)) for r in (run, other))
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
        ModelError: an empty prompt, one longer than the context, token counts that differ, as many
            prompts on neither side, or two prompts that are the same.
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
        return {} if self.noise is None else {"embed": lambda x: x + self.noise.flatten(0, 1)}


def _two_runs(model, clean, corrupted, subject, seeds, scale) -> tuple[_Run, _Run]:
    """The clean run and the corrupted one."""
    if corrupted is not None:
        a, b = pair(model, clean, corrupted)
        return _Run(a), _Run(b)
    if subject is None:
        raise ModelError(
            "Without a corrupted prompt, say which positions get the noise: subject=[3, 4]."
        )
    ids = model.ids(clean)
    noise = gaussian_noise(model, ids, subject, seeds, scale)
    return _Run(ids, None, seeds), _Run(ids, noise, seeds)


def gaussian_noise(
    model: LanguageModel, ids: Tensor, subject: Sequence[int], seeds: int = 10, scale: float = 3.0
) -> Tensor:
    """Causal tracing's corruption: N(0, (scale · σ)²) on the embeddings of the subject's tokens.

    σ is the standard deviation of the embedding's entries, as the stream gets them, over the tokens
    in use (`LanguageModel.in_use`; those never seen may be many times as long), and `scale` is 3.
    Source: Meng et al. 2022, Locating and Editing Factual Associations.

    Returns:
        (seeds, batch, pos, d_model), 0 outside the `subject` positions.
    """
    batch, length = ids.shape
    at = _chosen(subject, length, "position")
    if seeds < 1:
        raise ModelError(f"seeds is {seeds}: give at least 1.")
    used = model.in_use.nonzero()[:, 0]
    some = used[:: -(-len(used) // 4096)]
    sigma = float(model.part("embed")(some).float().std())
    noise = torch.zeros(seeds, batch, length, model.d_model)
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        noise[seed][:, at] = torch.randn(batch, len(at), model.d_model, generator=rng)
    return (scale * sigma * noise).to(model.device, model.dtype)


def _chosen(given, count: int, what: str) -> list[int]:
    """Indices (None: all), negative ones counted from the end."""
    given = range(count) if given is None else [given] if isinstance(given, int) else given
    given = [int(i) for i in given]
    wrong = [i for i in given if not -count <= i < count]
    if wrong or not given:
        raise ModelError(f"The {what}s are {given}: expected at least one, from 0 to {count - 1}.")
    return [i % count for i in given]


def _one_of(what: str, given, known: Sequence[str]) -> None:
    if given not in known:
        raise ModelError(
            f"{what} is {given!r}: expected one of {', '.join(known)}.{nearest(given, known)}"
        )


# ----------------------------------------------------------------------------- activation patching


@torch.no_grad()
def activation_patch(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt | None,
    site: str,
    metric: Metric,
    mode: str = "denoise",
    ablation: str = "resample",
    over: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    reference: Prompt | None = None,
    subject: Sequence[int] | None = None,
    seeds: int = 10,
    scale: float = 3.0,
) -> Tensor:
    """The metric after each patch of a sweep.

        denoise: the corrupted run, with the clean run's activation put in at one place
        noise:   the clean run, with the corrupted run's activation put in at one place

    Args:
        clean, corrupted: text, or token ids (batch, pos), as many tokens on both sides. corrupted
            may be None where it is not used (gaussian; noise with mean or zero).
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out (over positions), or
            z, q, k, v, pattern (over heads; k and v have the key-value heads).
        metric: logits at the last position (..., batch, d_vocab) -> (...,) or (..., batch).
        ablation: what is put in instead. resample: the other run's activation. zero. mean: the mean
            over the `reference` prompts, position by position. gaussian: as resample, where the
            corrupted run is the clean prompt with noise on the embeddings of its `subject`
            positions, averaged over `seeds` (causal tracing).
        over: "positions", "heads", "heads x positions", or "layers" (all positions at once).
        layers, heads, positions: only these. Without a positions axis, all of `positions` are
            patched at once.

    Returns:
        float32 (layers, positions), (layers, heads), (layers, heads, positions) or (layers,), and a
        last axis for the prompts if the metric keeps them apart, as `LogitDiff.each` does.

    Raises:
        ModelError: unknown site, mode or ablation; prompts that do not fit together (`pair`).
    """
    over = _axes(model, site, over)
    _one_of("mode", mode, MODES)
    _one_of("ablation", ablation, ABLATIONS)
    by_head = site in HEAD_SITES
    if heads is not None and not by_head:
        raise ModelError(f"{site!r} has no heads: leave `heads` out.")

    base, source = _base_and_source(model, clean, corrupted, mode, ablation, subject, seeds, scale)
    n_heads = model.n_kv_heads if site in ("k", "v") else model.n_heads
    layers = _chosen(layers, model.n_layers, "layer")
    at = _chosen(positions, base.ids.shape[1], "position")
    chosen = _chosen(heads, n_heads, "head") if by_head else [None]
    values = _values(model, base, source, site, layers, ablation, reference)

    head_axis = [[h] for h in chosen] if "heads" in over else [chosen]
    pos_axis = [[p] for p in at] if "positions" in over else [at]
    same = _first_change(base, source, ablation, subject)
    patches = [
        _edits(site, i, [p for p in ps if p >= same], hs if by_head else None, values[i])
        for i in layers
        for hs in head_axis
        for ps in pos_axis
    ]
    final = run_edits(BaseRun(model, base.rows, base.hooks()), patches)
    effect = _effects(model, final, metric, base)
    axes = [len(layers)]
    axes += [len(head_axis)] if "heads" in over else []
    axes += [len(pos_axis)] if "positions" in over else []
    return effect.reshape(*axes, *effect.shape[1:])


def _edits(site, layer, positions, heads, value) -> list[Edit]:
    heads = None if heads is None else tuple(heads)
    return [Edit(site, layer, tuple(positions), heads, value)] if positions else []


def _first_change(base: _Run, source: _Run | None, ablation: str, subject) -> int:
    """The first position at which base and source can differ: before it, a patch changes nothing,
    as attention is causal."""
    if ablation == "gaussian":
        return min(_chosen(subject, base.ids.shape[1], "position"))
    if ablation == "resample":
        return int((base.ids != source.ids).any(0).nonzero()[0])
    return 0


def _base_and_source(
    model, clean, corrupted, mode, ablation, subject, seeds, scale
) -> tuple[_Run, _Run | None]:
    """The run that is patched, and the run that the activations come from."""
    if ablation == "gaussian":
        if subject is None:
            raise ModelError("Gaussian noise needs the subject's positions: subject=[3, 4].")
        pure, other = _two_runs(model, clean, None, subject, seeds, scale)
    elif corrupted is None and mode == "noise" and ablation in ("mean", "zero"):
        pure, other = _Run(model.ids(clean)), None
    elif corrupted is None:
        raise ModelError("There is no corrupted prompt: give one of as many tokens as the clean.")
    else:
        pure, other = _two_runs(model, clean, corrupted, None, seeds, scale)
    return (other, pure) if mode == "denoise" else (pure, other)


def _values(model, base, source, site, layers, ablation, reference) -> dict[int, Tensor]:
    """{layer: what is put in, (rows of the base run, pos, ...)}."""
    keys = [(site, i) for i in layers]
    stop = max(layers) + 1
    if ablation == "zero":
        _, cache = model.run_with_cache(base.rows, keys, stop_at_layer=stop)
        return {i: torch.zeros_like(cache[site, i]) for i in layers}
    if ablation == "mean":
        if reference is None:
            raise ModelError("Mean ablation needs `reference`: prompts of as many tokens.")
        ids = model.ids(reference)
        if ids.shape[1] != base.ids.shape[1]:
            raise ModelError(
                f"The reference prompts have {ids.shape[1]} tokens, the patched ones "
                f"{base.ids.shape[1]}: choose prompts of as many tokens."
            )
        _, cache = model.run_with_cache(ids, keys, stop_at_layer=stop)
        means = {i: cache[site, i].mean(0, keepdim=True) for i in layers}
        return {i: x.expand(len(base.rows), *x.shape[1:]) for i, x in means.items()}
    with model.hooks(source.hooks()):
        _, cache = model.run_with_cache(source.rows, keys, stop_at_layer=stop)
    return {i: cache[site, i] for i in layers}


def _last_logits(model: LanguageModel, run: _Run) -> Tensor:
    with torch.no_grad(), model.hooks(run.hooks()):
        _, cache = model.run_with_cache(run.rows, "resid_final", model.n_layers, pos=-1)
    return model.unembed(cache["resid_final"])


def _effects(model: LanguageModel, final: Tensor, metric: Metric, run: _Run) -> Tensor:
    """The metric of final streams (patches, rows of the run, d_model), some patches at a time."""
    step = max(1, MOST_LOGITS // (final.shape[1] * model.d_vocab))
    return torch.cat([_value(metric, model.unembed(x), run) for x in final.split(step)])


def _value(metric: Metric, logits: Tensor, run: _Run) -> Tensor:
    """The metric of logits (..., repeats * batch, d_vocab), the mean over the repeats: (...,), or
    (..., batch) of a metric that keeps the prompts apart."""
    return metric(logits.unflatten(-2, (run.repeats, -1))).float().mean(logits.ndim - 2)


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
    when denoising, the other way round when noising. Source: Nanda 2023, Attribution Patching.

    Args:
        sites: one site, or several, which share the one backward pass.

    Returns:
        The axes and the scale of `activation_patch`; of several sites, {site: tensor}.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    axes = {site: _axes(model, site, over) for site in names}
    _one_of("mode", mode, MODES)
    base, other = pair(model, clean, corrupted)
    if mode == "denoise":
        base, other = other, base
    keys = [(site, layer) for site in names for layer in range(model.n_layers)]
    with torch.no_grad():
        _, there = model.run_with_cache(other, keys, stop_at_layer=model.n_layers)
    here: dict = {}

    def keep(key):
        def hook(x: Tensor) -> Tensor:
            here[key] = x if x.requires_grad else x.requires_grad_()
            return here[key]

        return hook

    with torch.enable_grad(), model.hooks({key: keep(key) for key in keys}):
        _, cache = model.run_with_cache(base, "resid_final", model.n_layers, pos=-1)
        value = metric(model.unembed(cache["resid_final"]))
        slopes = torch.autograd.grad(value.sum(), [here[key] for key in keys])  # prompts do not mix
    effects = {}
    for key, slope in zip(keys, slopes, strict=True):
        effect = ((there[key] - here[key].detach()) * slope).float().sum(-1)
        effects[key] = effect.movedim(0, -1) if value.ndim else effect.sum(0)
    found = {}
    for site in names:
        effect = torch.stack([effects[site, layer] for layer in range(model.n_layers)])
        if site in HEAD_SITES and site != "pattern":
            effect = effect.transpose(1, 2)  # (layers, heads, positions)
        n = effect.ndim - value.ndim
        summed = {"heads": (2,), "layers": range(1, n), "positions": range(1, n - 1)}
        dims = tuple(summed.get(axes[site], ()))
        found[site] = value.detach().float() + (effect.sum(dims) if dims else effect)
    return found[sites] if isinstance(sites, str) else found


def _axes(model: LanguageModel, site: str, over: str | None) -> str:
    """The axes of a sweep over `site`, checked."""
    _one_of("site", site, STREAM_SITES + HEAD_SITES)
    model.check_site(site)
    over = over or ("heads" if site in HEAD_SITES else "positions")
    _one_of("over", over, OVER)
    if "heads" in over and site not in HEAD_SITES:
        raise ModelError(f"{site!r} has no heads: sweep it over positions, or over layers.")
    return over


# ----------------------------------------------------------------------------------- path patching


def path_patch(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt,
    senders: Sequence,
    receivers: Sequence | str,
    metric: Metric,
    mode: str = "noise",
    through_mlps: bool = False,
) -> Tensor:
    """The metric when only the direct paths from the senders to the receivers are patched.

    Three runs, as Wang et al. 2022 (Interpretability in the Wild, appendix B):
    1. the base run (noise: clean) and the other run (noise: corrupted);
    2. every component is frozen to the base run, but the senders write what they write in the
       other run (through their layer's post-norm, recomputed); what then enters the receivers,
       through their own norm, is kept;
    3. the base run, in which the receivers are computed from what was kept and all that follows
       is computed as usual.
    With through_mlps, the MLPs between are recomputed in step 2 (as in that paper); without, they
    are frozen too, and only the stream itself connects a sender with a receiver.

    Args:
        senders: heads (layer, head), ("mlp", layer), ("attn_out", layer) or "embed".
        receivers: ("q", layer, head), ("k", layer, kv_head), ("v", layer, kv_head),
            ("mlp", layer), or "logits".

    Returns:
        float32, a scalar, or (batch,) if the metric keeps the prompts apart.
    """
    return _path_patch(model, clean, corrupted, [senders], receivers, metric, mode, through_mlps)[0]


def path_patch_map(
    model: LanguageModel,
    clean: Prompt,
    corrupted: Prompt,
    receivers: Sequence | str,
    metric: Metric,
    mode: str = "noise",
    through_mlps: bool = False,
    senders: str = "heads",
) -> Tensor:
    """`path_patch` from each head (senders="heads"), each MLP ("mlp") or each attention layer
    ("attn_out") alone.

    Returns:
        float32 (layers, heads) or (layers,): the base run's value where no path leads to one.
    """
    _one_of("senders", senders, ("heads", "mlp", "attn_out"))
    layers, heads = range(model.n_layers), range(model.n_heads)
    if senders == "heads":
        sets = [[(i, h)] for i in layers for h in heads]
        shape = (model.n_layers, model.n_heads)
    else:
        sets, shape = [[(senders, i)] for i in layers], (model.n_layers,)
    effect = _path_patch(model, clean, corrupted, sets, receivers, metric, mode, through_mlps)
    return effect.reshape(*shape, *effect.shape[1:])


@torch.no_grad()
def _path_patch(model, clean, corrupted, sets, receivers, metric, mode, through_mlps) -> Tensor:
    """The metric for each set of senders, (sets,)."""
    _one_of("mode", mode, MODES)
    base, other = pair(model, clean, corrupted)
    if mode == "denoise":
        base, other = other, base
    if receivers == "logits" or (receivers and receivers[0] in ("q", "k", "v", "mlp")):
        receivers = [receivers]  # a single one
    targets = [_receiver(model, r) for r in receivers]
    sets = [[_sender(model, s) for s in senders] for senders in sets]
    if not targets or not all(sets):
        raise ModelError("Path patching needs at least one sender and one receiver.")
    run = BaseRun(model, base)
    sites = ["embed", "z", "attn_out", "mlp_out"]
    _, there = model.run_with_cache(other, sites, stop_at_layer=model.n_layers)
    start = int((base != other).any(0).nonzero()[0])
    step = max(1, MOST_TOKENS // base[:, start:].numel())
    streams = [
        _follow(run, there, sets[i : i + step], targets, start, through_mlps)
        for i in range(0, len(sets), step)
    ]
    return _effects(model, torch.cat(streams), metric, _Run(base))


def _sender(model: LanguageModel, given) -> Node:
    """(kind, layer, head) of a sender; the embedding's layer is -1."""
    if given == "embed":
        return ("embed", -1, None)
    if isinstance(given, tuple | list) and len(given) == 2:
        first, second = given
        if first in ("mlp", "attn_out"):
            return (first, model.layer_index(first, second), None)
        if isinstance(first, int) and isinstance(second, int):
            return (
                "head",
                model.layer_index("z", first),
                _chosen(second, model.n_heads, "head")[0],
            )
    raise ModelError(
        f"{given!r} is no sender: give a head (layer, head), ('mlp', layer), ('attn_out', layer) "
        "or 'embed'."
    )


def _receiver(model: LanguageModel, given) -> Node:
    """(kind, layer, head) of a receiver; the logits' layer is the number of layers."""
    if given == "logits":
        return ("logits", model.n_layers, None)
    if isinstance(given, tuple | list) and len(given) == 2 and given[0] == "mlp":
        return ("mlp", model.layer_index("mlp_in", given[1]), None)
    if isinstance(given, tuple | list) and len(given) == 3 and given[0] in ("q", "k", "v"):
        n = model.n_heads if given[0] == "q" else model.n_kv_heads
        return (given[0], model.layer_index(given[0], given[1]), _chosen(given[2], n, "head")[0])
    raise ModelError(
        f"{given!r} is no receiver: give ('q', layer, head), ('k', layer, kv_head), "
        "('v', layer, kv_head), ('mlp', layer) or 'logits'."
    )


def _follow(run: BaseRun, there, sets, targets, start: int, through_mlps: bool) -> Tensor:
    """Steps 2 and 3 for several sets of senders: the final stream at the last position, (sets,
    batch, d_model)."""
    paths = _Paths(run, there, sets, targets, start)
    for layer in range(min(run.model.n_layers, 1 + max(layer for _, layer, _ in targets))):
        paths.through(layer, through_mlps)
    final = run_edits(run, paths.edits)
    return (
        final + paths.change[:, :, -1] if ("logits", run.model.n_layers, None) in targets else final
    )


class _Paths:
    """Step 2: the paths of several sets of senders, followed upwards through the layers.

    Attributes:
        change: what a set's paths have added to the base run's stream so far, (sets, batch,
            pos - start, d_model); `start` is the first position where the prompts differ.
        reached: the sets that have added anything.
        edits: for each set, what its receivers are computed from in step 3.
    """

    def __init__(self, run: BaseRun, there, sets, targets, start: int):
        self.run, self.there, self.sets, self.targets = run, there, sets, targets
        self.start, self.reached = start, []
        self.change = torch.zeros_like(run.cache["embed"][None, :, start:]).repeat(
            len(sets), 1, 1, 1
        )
        self.edits: list[list[Edit]] = [[] for _ in sets]
        for i, senders in enumerate(sets):
            if ("embed", -1, None) in senders:
                self._add(i, there["embed"] - run.cache["embed"])

    def through(self, layer: int, through_mlps: bool) -> None:
        """Receive and send in one layer; the MLP reads after attention has written, or, where both
        are parallel, before."""
        self._into_heads(layer)
        before = (list(self.reached), self.change.clone()) if self.run.model.parallel else None
        for i, senders in enumerate(self.sets):
            if (written := _written(self.run, self.there, senders, layer)) is not None:
                self._add(i, written - self.run.cache["attn_out", layer])
        self._through_mlp(layer, *(before or (list(self.reached), self.change)), through_mlps)

    def _add(self, i: int, gain: Tensor) -> None:
        self.change[i] += gain[:, self.start :]
        self.reached += [i] if i not in self.reached else []

    def _receive(self, which: list[int], site: str, layer: int, heads, values: Tensor) -> None:
        """`values` (which, batch, pos - start, ...) are what these sets' receivers get."""
        at = tuple(range(self.start, self.run.length))
        for i, value in zip(which, values, strict=True):
            whole = value.new_zeros(self.run.batch, self.run.length, *value.shape[2:])
            whole[:, self.start :] = value
            self.edits[i].append(Edit(site, layer, at, heads, whole))

    def _into_heads(self, layer: int) -> None:
        model, before = self.run.model, self.run.cache["resid_pre", layer][:, self.start :]
        for site in "qkv":
            heads = tuple(h for kind, at, h in self.targets if (kind, at) == (site, layer))
            if heads and self.reached:
                normed = model.part("ln1", layer)(before + self.change[self.reached])
                values = model.split_heads(site, model.part(site, layer)(normed))
                self._receive(self.reached, site, layer, heads, values)

    def _through_mlp(self, layer: int, which: list[int], change: Tensor, through: bool) -> None:
        model, cache, sender = self.run.model, self.run.cache, ("mlp", layer, None)
        if which and (through or sender in self.targets):
            stream = cache["resid_pre", layer]
            middle = stream if model.parallel else stream + cache["attn_out", layer]
            values = run_mlp(model, layer, middle[:, self.start :] + change[which])
            if sender in self.targets:
                self._receive(which, "mlp_out", layer, None, values)
            gains = values - cache["mlp_out", layer][:, self.start :]
            for i, gain in zip(which, gains, strict=True):
                if through and sender not in self.sets[i]:
                    self.change[i] += gain
        for i, senders in enumerate(self.sets):
            if sender in senders:
                self._add(i, self.there["mlp_out", layer] - cache["mlp_out", layer])


def _written(run: BaseRun, there, senders: list[Node], layer: int) -> Tensor | None:
    """What a layer's attention writes when its sender heads do as in the other run, (batch, pos,
    d_model): the post-norm is computed anew. None where nothing of it is a sender."""
    if ("attn_out", layer, None) in senders:
        return there["attn_out", layer]
    heads = [h for kind, at, h in senders if kind == "head" and at == layer]
    if not heads:
        return None
    z = run.cache["z", layer].clone()
    z[:, :, heads] = there["z", layer][:, :, heads]
    return write_heads(run.model, layer, z)
