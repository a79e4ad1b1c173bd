"""Path patching: only the direct paths from some parts of a model to others are changed.

    direct = path_patch(model, clean, corrupted, [(2, 1)], [("q", 4, 3)], metric)
    by_head = path_patch_map(model, clean, corrupted, "logits", metric)       # (layers, heads)
    effect = composition_effect(model, [(4, 3)], prompts, "k")                # (layers, heads)

Prompts, metrics and modes are those of `mi_helpers.patching`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mi_helpers.ablation import Prompt
from mi_helpers.arguments import (
    by_length,
    checked_head,
    in_order,
    indices,
    one_of,
    shown,
    token_ids,
)
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.patching import Metric, last_logits, metric_of_streams
from mi_helpers.prefix import MOST_TOKENS, BaseRun, Edit, run_edits, run_mlp, write_heads
from mi_helpers.sweeps import MODES, pairs

Head = tuple[int, int]  # (layer, head)
Node = tuple[str, int, int | None]  # (kind, layer, head)


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

    1. The base run (noise: clean) and the other run (noise: corrupted).
    2. Every part is frozen to the base run, except that the senders write what they write in the
       other run (through their layer's post-norm, recomputed). What then enters the receivers,
       through their own norm, is kept.
    3. The base run, in which the receivers get what was kept and the rest is computed as usual.

    Args:
        senders: heads (layer, head), ("mlp", layer), ("attn_out", layer) or "embed".
        receivers: ("q", layer, head), ("k", layer, kv_head), ("v", layer, kv_head),
            ("mlp", layer), or "logits".
        through_mlps: recompute the MLPs between in step 2, as the paper does; otherwise they are
            frozen too, and only the stream itself connects a sender with a receiver.

    Returns:
        float32, a scalar, or (batch,) if the metric keeps the prompts apart.

    Raises:
        ModelError: no such sender or receiver, or none at all; prompts that do not line up.

    Source: Wang et al. 2022, Interpretability in the Wild, appendix B.
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
    """`path_patch` from each sender alone.

    Args:
        senders: "heads", "mlp" or "attn_out".

    Returns:
        float32 (layers, heads) or (layers,); where no path leads to a receiver, the base run's
        metric.
    """
    one_of("senders", senders, ("heads", "mlp", "attn_out"))
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
    one_of("mode", mode, MODES)
    if not callable(metric):
        raise ModelError(f"metric is {shown(metric)}: expected a function of logits.")
    bases, others = pairs(model, clean, corrupted)
    if mode == "denoise":
        bases, others = others, bases
    for i, (a, b) in enumerate(zip(bases, others, strict=True)):
        if len(a) != len(b):
            raise ModelError(
                f"Prompt {i} has {len(a)} tokens in one run and {len(b)} in the other, and a path "
                "is patched at every position: choose words of equally many tokens."
            )
    if receivers == "logits" or (
        isinstance(receivers, tuple | list) and receivers and receivers[0] in ("q", "k", "v", "mlp")
    ):
        receivers = [receivers]  # a single one
    for what, given in (("senders", sets[0] if sets else None), ("receivers", receivers)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ModelError(f"{what} is {shown(given)}: expected a list of them.")
    targets = [_receiver(model, r) for r in receivers]
    sets = [[_sender(model, s) for s in senders] for senders in sets]
    if not targets or not all(sets):
        raise ModelError("Path patching needs at least one sender and one receiver.")
    groups = by_length([len(row) for row in bases])
    streams = []
    for chosen in groups:
        base, other = (torch.stack([side[i] for i in chosen]) for side in (bases, others))
        streams.append(_streams(model, base, other, sets, targets, through_mlps))
    return metric_of_streams(model, in_order(streams, groups, dim=1), metric)


def _streams(model, base: Tensor, other: Tensor, sets, targets, through_mlps: bool) -> Tensor:
    """The final streams of prompts of one length, (sets, batch, d_model)."""
    run = BaseRun(model, base)
    sites = ["embed", "z", "attn_out", "mlp_out"]
    _, there = model.run_with_cache(other, sites, stop_at_layer=model.n_layers)
    changed = (base != other).any(0).nonzero()
    start = int(changed[0]) if len(changed) else base.shape[1] - 1
    step = max(1, MOST_TOKENS // base[:, start:].numel())
    return torch.cat(
        [
            _follow(run, there, sets[i : i + step], targets, start, through_mlps)
            for i in range(0, len(sets), step)
        ]
    )


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
                indices(second, model.n_heads, "head")[0],
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
        return (given[0], model.layer_index(given[0], given[1]), indices(given[2], n, "head")[0])
    raise ModelError(
        f"{given!r} is no receiver: give ('q', layer, head), ('k', layer, kv_head), "
        "('v', layer, kv_head), ('mlp', layer) or 'logits'."
    )


def _follow(run: BaseRun, there, sets, targets, start: int, through_mlps: bool) -> Tensor:
    """Steps 2 and 3 for several sets of senders: the final stream at the last position, (sets,
    batch, d_model)."""
    paths = _Paths(run, there, sets, targets, start)
    for layer in range(min(run.model.n_layers, 1 + max(layer for _, layer, _ in targets))):
        paths.follow(layer, through_mlps)
    final = run_edits(run, paths.edits)
    return (
        final + paths.change[:, :, -1] if ("logits", run.model.n_layers, None) in targets else final
    )


class _Paths:
    """Step 2: the paths of several sets of senders, from the first layer up.

    Attributes:
        change: what each set's paths have added to the base run's stream so far, (sets, batch,
            pos - start, d_model); `start` is the first position at which the prompts differ.
        reached: the sets that have added anything.
        edits: for each set, what its receivers get in step 3.
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

    def follow(self, layer: int, through_mlps: bool) -> None:
        """Receive and send in one layer. The MLP reads what attention has written, unless both are
        parallel."""
        self._into_heads(layer)
        before = (list(self.reached), self.change.clone()) if self.run.model.parallel else None
        for i, senders in enumerate(self.sets):
            if (written := _written(self.run, self.there, senders, layer)) is not None:
                self._add(i, written - self.run.cache["attn_out", layer])
        self._into_mlp(layer, *(before or (list(self.reached), self.change)), through_mlps)

    def _add(self, i: int, gain: Tensor) -> None:
        self.change[i] += gain[:, self.start :]
        self.reached += [i] if i not in self.reached else []

    def _receive(self, sets: list[int], site: str, layer: int, heads, values: Tensor) -> None:
        """Keep what the receivers of some sets get, values (sets, batch, pos - start, ...)."""
        at = tuple(range(self.start, self.run.length))
        for i, value in zip(sets, values, strict=True):
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

    def _into_mlp(self, layer: int, reached: list[int], change: Tensor, through: bool) -> None:
        model, cache, sender = self.run.model, self.run.cache, ("mlp", layer, None)
        if reached and (through or sender in self.targets):
            stream = cache["resid_pre", layer]
            middle = stream if model.parallel else stream + cache["attn_out", layer]
            values = run_mlp(model, layer, middle[:, self.start :] + change[reached])
            if sender in self.targets:
                self._receive(reached, "mlp_out", layer, None, values)
            gains = values - cache["mlp_out", layer][:, self.start :]
            for i, gain in zip(reached, gains, strict=True):
                if through and sender not in self.sets[i]:
                    self.change[i] += gain
        for i, senders in enumerate(self.sets):
            if sender in senders:
                self._add(i, self.there["mlp_out", layer] - cache["mlp_out", layer])


def _written(run: BaseRun, there, senders: list[Node], layer: int) -> Tensor | None:
    """What a layer's attention writes when its sender heads write as in the other run, (batch, pos,
    d_model), with the post-norm recomputed; None where none of them is a sender."""
    if ("attn_out", layer, None) in senders:
        return there["attn_out", layer]
    heads = [h for kind, at, h in senders if kind == "head" and at == layer]
    if not heads:
        return None
    z = run.cache["z", layer].clone()
    z[:, :, heads] = there["z", layer][:, :, heads]
    return write_heads(run.model, layer, z)


# -------------------------------------------------------------------------- composition, by effect


def receivers_of(model: LanguageModel, heads: Iterable[Head], site: str = "k") -> list[tuple]:
    """Receivers for `path_patch`: the heads' queries, keys or values, each key-value head once.

    Args:
        site: "q", "k" or "v".
    """
    one_of("site", site, ("q", "k", "v"))
    heads = [checked_head(model, head) for head in heads]
    group = 1 if site == "q" else model.n_heads // model.n_kv_heads
    return sorted({(site, layer, head // group) for layer, head in heads})


def answer_log_prob(answer: Tensor):
    """A metric: logits at the last position (..., batch, d_vocab) -> mean log p(answer), (...,).

    Args:
        answer: token ids (batch,), or one for all.
    """
    ids = token_ids("answer", answer, 2**62)

    def metric(logits: Tensor) -> Tensor:
        if len(ids) not in (1, logits.shape[-2]):
            raise ModelError(f"answer holds {len(ids)} ids for {logits.shape[-2]} prompts.")
        given = torch.tensor(token_ids("answer", ids, logits.shape[-1]), device=logits.device)
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, given.expand(logits.shape[:-1])[..., None])[..., 0].mean(-1)

    return metric


def composition_effect(
    model: LanguageModel,
    readers: Sequence[Head],
    prompts: tuple[Tensor, Tensor, Tensor],
    site: str = "k",
) -> Tensor:
    """How much of the answer each head's direct path into the readers' queries, keys or values
    carries: 1 where patching that path alone is as bad as the corrupted prompts.

        (clean - patched) / (clean - corrupted)

    in log p(answer), by path patching (noise).

    Args:
        prompts: clean, corrupted (n prompts each, as `path_patch` takes them), and the token (n,)
            that follows in clean.
        site: "q", "k" or "v".

    Returns:
        (n_layers, n_heads).
    """
    if not isinstance(prompts, tuple | list) or len(prompts) != 3:
        raise ModelError(f"prompts is {shown(prompts)}: expected (clean, corrupted, answer).")
    clean, corrupted, answer = prompts
    receivers, metric = receivers_of(model, readers, site), answer_log_prob(answer)
    top, bottom = (float(metric(last_logits(model, given))) for given in (clean, corrupted))
    patched = path_patch_map(model, clean, corrupted, receivers, metric)
    return (top - patched) / (top - bottom)
