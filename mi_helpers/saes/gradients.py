"""The gradients of a sparse coder on one batch, as sums over pairs or from autograd.

    gradients = by_pairs(coder, top_k, x, target, dead, config, processes)
    W_enc, W_dec = gradients.block(0, 512)      # of latents 0 … 511

A TopK coder's step knows its pairs (row, latent): the k latents of every row. Everything after the
encoder's product is a sum over them, and equals what autograd gets from dense matrices, in float32:

    error_b   = Σ_j f_bj W_dec[j] - target_b                 weighted_sums over the row's latents
    ∂f_bj     = 2/B error_b · W_dec[j]                       dots, of the pairs only
    ∂W_dec[j] = 2/B Σ_b f_bj error_b                         weighted_sums over the latent's rows
    ∂W_enc[j] = Σ_b ∂pre_bj u_b,  u = s_in x - b_dec         the same
    ∂b_dec    = 2/B Σ_b error_b - Σ_j ∂b_enc[j] W_enc[:, j]  no product with the rows of ∂pre

A Matryoshka coder has an error for each prefix; latent j gets the sum of those of the prefixes that
have it, in the place of error_b. The other activations get their gradients from autograd. The
gradients of the two weight matrices are given one block of latents at a time, so that none of a
whole matrix has to exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.processes import Processes
from mi_helpers.saes.products import TopK, by_latent, dots, weighted_sums

ROWS = 512  # rows of x in AuxK's products


class Diverged(ValueError):
    """The weights have become so large that the loss is not finite."""


@dataclass(frozen=True)
class StepConfig:
    """The settings of a training step.

    Args:
        betas, eps, weight_decay: AdamW's; the decay is of the two weight matrices.
        aux_k, aux_coefficient: how many dead latents AuxK uses per row, and its weight in the loss.
        dead_after: tokens without firing, over all processes, after which a latent is dead. Half of
            a run is far too late: 0.5 to 1 million.
        sparsity: coefficient of the penalty of relu and jumprelu.
        bandwidth: of the straight-through estimators of jumprelu.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    aux_k: int = 256
    aux_coefficient: float = 1 / 32
    dead_after: int = 1_000_000
    sparsity: float = 0.0
    bandwidth: float = 1e-3


@dataclass
class Gradients:
    """What one batch says about the parameters.

    Args:
        small: gradients of all but the two weight matrices, by name.
        block: (first, last) -> rows first … last - 1 of ∂W_enc^T (·, d_in) and ∂W_dec (·, d_out).
        fired: (d_latent,), bool: latents that fired on the batch.
        metrics: sums over the batch, by name.
    """

    small: dict[str, Tensor]
    block: Callable[[int, int], tuple[Tensor, Tensor]]
    fired: Tensor
    metrics: dict[str, Tensor]


def by_pairs(
    coder: SparseCoder,
    top_k: TopK,
    x: Tensor,
    target: Tensor | None,
    dead: Tensor,
    config: StepConfig,
    processes: Processes,
) -> Gradients:
    """The gradients of a TopK coder as sums over pairs (row, latent).

    Args:
        top_k: of the coder's encoder.
        x, target: this process's rows (rows, d_in) and (rows, d_out); None: the target is x.
        dead: numbers of the dead latents, rising; AuxK is left out where there are none.
    """
    u, r = _read(coder, x, target)
    indices, pre = top_k(u, coder.b_enc, coder.k)
    values = F.relu(pre)  # (rows, k)
    W_dec = coder.W_dec.detach()
    first = _first_prefix(coder, indices)  # (rows, k), of the prefixes that have the latent
    errors = _errors(coder, u, r, (indices, values, first))  # (prefixes, rows, d_out)
    metrics = _sums(errors[-1], r, values) | {"penalty": errors[:-1].square().sum()}
    # for the latents of each prefix that are in none before it, the errors of all that have them
    felt = errors.flip(0).cumsum(0).flip(0) if coder.prefixes else errors
    d_pre = dots(felt[-1], W_dec, indices)
    for m, error in enumerate(felt[:-1]):
        d_pre = torch.where(first == m, dots(error, W_dec, indices), d_pre)
    u, indices, values, d_pre, first = (
        gathered(t, processes) for t in (u, indices, values, d_pre * (pre > 0), first)
    )
    felt = torch.stack([gathered(e, processes) for e in felt]) if processes.size > 1 else felt
    factor = 2 / len(u)
    fired = torch.bincount(indices[values > 0], minlength=coder.d_latent) > 0

    order, offsets = by_latent(indices, coder.d_latent)
    row = order // coder.k  # (pairs,), by latent
    value, d_value = values.flatten()[order] * factor, d_pre.flatten()[order] * factor
    b_enc = weighted_sums(u.new_ones(len(u), 1), row, d_value, offsets).flatten()
    aux = aux_gradients(coder, u, felt[-1], dead, config, processes)
    metrics["aux_loss"] = aux.loss
    b_enc[aux.dead] += aux.b_enc
    small = {"b_enc": b_enc, "b_dec": felt[0].sum(0) * factor}
    if coder.apply_b_dec_to_input:
        small["b_dec"] -= b_enc @ top_k.rows
    if coder.skip:
        small["W_skip"] = felt[0].T @ u * factor
    felt_row = row + len(u) * first.flatten()[order] if coder.prefixes else row  # in felt, flat
    pairs = row, felt_row, value, d_value
    block = _blocks_of_pairs(u, felt.flatten(0, 1), pairs, offsets, aux)
    return Gradients(small, block, fired, metrics)


def _first_prefix(coder: SparseCoder, indices: Tensor) -> Tensor:
    """The number of the first prefix that has each latent; 0 in a coder without prefixes."""
    if not coder.prefixes:
        return torch.zeros_like(indices)
    bounds = torch.tensor(coder.prefixes, device=indices.device)
    return torch.bucketize(indices, bounds, right=True)


def _errors(coder: SparseCoder, u: Tensor, r: Tensor, pairs: tuple) -> Tensor:
    """t̂ - t of each prefix, (prefixes, rows, d_out); that of all latents is the last."""
    indices, values, first = pairs
    W_dec, n = coder.W_dec.detach(), len(coder.prefixes)
    if n:
        each = [weighted_sums(W_dec, indices, values * (first == m)) for m in range(n)]
        errors = torch.stack(each).cumsum(0)
    else:
        errors = weighted_sums(W_dec, indices, values)[None]
    if coder.skip:
        errors += u @ coder.W_skip.T  # a skip path is a transcoder's, and there u = s_in x
    return errors.sub_(r)


def _blocks_of_pairs(
    u: Tensor, felt: Tensor, pairs: tuple[Tensor, ...], offsets: Tensor, aux: Aux
) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """`Gradients.block` from pairs by latent: their rows in u and in `felt`, values and values'
    gradients (pairs,)."""
    row, felt_row, value, d_value = pairs
    starts = offsets.tolist()

    def block(first: int, last: int) -> tuple[Tensor, Tensor]:
        here = slice(starts[first], starts[last])
        at = offsets[first : last + 1] - starts[first]
        W_enc = weighted_sums(u, row[here], d_value[here], at)
        W_dec = weighted_sums(felt, felt_row[here], value[here], at)
        aux.add_to(W_enc, W_dec, first, last)
        return W_enc, W_dec

    return block


def by_autograd(
    coder: SparseCoder,
    x: Tensor,
    target: Tensor | None,
    dead: Tensor,
    config: StepConfig,
    processes: Processes,
) -> Gradients:
    """The gradients of any coder, from (rows, d_latent) matrices; arguments as for `by_pairs`."""
    n = int(processes.sum_(torch.tensor(len(x), device=x.device)))
    target = (x if target is None else target).to(coder.W_dec.dtype) * coder.scale_out
    with torch.enable_grad():
        given = {name: p for name, p in coder.named_parameters() if p.requires_grad}
        f, penalty = _activate(coder, coder.encode_pre_act(x), config)
        rest = coder.b_dec + coder.skip_path(x) - target
        error = f @ coder.W_dec + rest
        for width in coder.prefixes[:-1]:
            penalty = penalty + (f[:, :width] @ coder.W_dec[:width] + rest).pow(2).sum()
        loss = (error.pow(2).sum() + penalty) / n
        found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    small = {
        name: processes.sum_(torch.zeros_like(p) if g is None else g)
        for (name, p), g in zip(given.items(), found, strict=True)
    }
    u, f, error = coder.read(x), f.detach(), error.detach()
    metrics = _sums(error, target - coder.b_dec, f) | {"penalty": penalty.detach()}
    if coder.activation == "batchtopk":
        metrics["least"] = f[f > 0].min() if (f > 0).any() else coder.threshold[0].detach()
    u, error = (gathered(t, processes) for t in (u, error))
    aux = aux_gradients(coder, u, error, dead, config, processes)
    metrics["aux_loss"] = aux.loss
    small["b_enc"][aux.dead] += aux.b_enc
    if coder.apply_b_dec_to_input and len(aux.dead):
        small["b_dec"] -= aux.b_enc @ coder.W_enc.detach().T[aux.dead]
    W_enc, W_dec = small.pop("W_enc").T, small.pop("W_dec")
    fired = processes.sum_((f > 0).any(0).long()) > 0

    def block(first: int, last: int) -> tuple[Tensor, Tensor]:
        parts = W_enc[first:last].clone(), W_dec[first:last].clone()
        aux.add_to(*parts, first, last)
        return parts

    return Gradients(small, block, fired, metrics)


def _read(coder: SparseCoder, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """u = s_in x - b_dec (no b_dec for a transcoder) and r = s_out target - b_dec."""
    u = coder.read(x)
    if target is None and coder.apply_b_dec_to_input:
        return u, u
    target = (x if target is None else target).to(u.dtype)
    return u, torch.addcmul(-coder.b_dec, target, coder.scale_out)


def _activate(coder: SparseCoder, pre: Tensor, config: StepConfig) -> tuple[Tensor, Tensor]:
    """f (rows, d_latent) as it is in training, and the sum of the sparsity penalty."""
    nothing = pre.new_zeros(())
    if coder.activation == "topk":
        values, indices = pre.topk(coder.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, F.relu(values)), nothing
    if coder.activation == "batchtopk":
        flat = F.relu(pre).flatten()
        values, indices = flat.topk(coder.k * len(pre), sorted=False)
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre), nothing
    if coder.activation == "relu":
        f = F.relu(pre)
        return f, config.sparsity * f.sum()
    f = _Jump.apply(F.relu(pre), coder.threshold, config.bandwidth)
    fires = _Fires.apply(F.relu(pre), coder.threshold, config.bandwidth)
    return f, config.sparsity * fires.sum()


# -------------------------------------------------------------------------------- dead latents


@dataclass
class Aux:
    """AuxK's gradients of the dead latents `dead` (dead,), in rising order, and its loss."""

    dead: Tensor
    W_enc: Tensor  # (dead, d_in)
    W_dec: Tensor  # (dead, d_out)
    b_enc: Tensor  # (dead,)
    loss: Tensor

    def add_to(self, W_enc: Tensor, W_dec: Tensor, first: int, last: int) -> None:
        """Add to the gradients of latents first … last - 1."""
        bounds = torch.tensor([first, last], device=self.dead.device)
        part = slice(*torch.searchsorted(self.dead, bounds).tolist())
        W_enc[self.dead[part] - first] += self.W_enc[part]
        W_dec[self.dead[part] - first] += self.W_dec[part]


def aux_gradients(
    coder: SparseCoder,
    u: Tensor,
    error: Tensor,
    dead: Tensor,
    config: StepConfig,
    processes: Processes,
) -> Aux:
    """AuxK: the aux_k largest dead latents predict what is left unexplained, e = t - t̂.

        loss = aux_coefficient · min(1, dead / aux_k) · E‖e - ê‖²

    Only the dead columns are computed.

    Args:
        u, error: what the encoder reads, and t̂ - t, of the whole batch (rows, ·).

    Source: Gao and others 2024, "Scaling and evaluating sparse autoencoders", A.2.
    """
    rows, W_dec, b_enc = coder.W_enc.detach().T[dead], coder.W_dec[dead], coder.b_enc[dead]
    aux = Aux(dead, *(torch.zeros_like(t) for t in (rows, W_dec, b_enc)), u.new_zeros(()))
    if not len(dead):
        return aux
    scale = config.aux_coefficient * min(1.0, len(dead) / config.aux_k) / len(u)
    mine = processes.share(len(u))
    for part, left in zip(u[mine].split(ROWS), error[mine].split(ROWS), strict=True):
        pre = torch.addmm(b_enc, part, rows.T)  # (chunk, dead)
        values, indices = pre.topk(min(config.aux_k, len(dead)), dim=1, sorted=False)
        f = torch.zeros_like(pre).scatter_(1, indices, F.relu(values))
        off = torch.addmm(left, f, W_dec)  # ê - e, as e = -error
        aux.loss += scale * off.pow(2).sum()
        off *= 2 * scale
        aux.W_dec.addmm_(f.T, off)
        d_pre = (off @ W_dec.T).mul_(f > 0)
        aux.W_enc.addmm_(d_pre.T, part)
        aux.b_enc += d_pre.sum(0)
    for t in (aux.W_enc, aux.W_dec, aux.b_enc, aux.loss):
        processes.sum_(t)
    return aux


# ----------------------------------------------------------------------------- small helpers


class _Jump(torch.autograd.Function):
    """z where z > θ, else 0; its derivative by θ is a box of the given bandwidth around θ."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        by_threshold = -(threshold / ctx.bandwidth) * (near * gradient).sum(0)
        return gradient * (z > threshold), by_threshold, None


class _Fires(torch.autograd.Function):
    """1 where z > θ, else 0; differentiable by θ only, as `_Jump` is."""

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        return None, -(near * gradient).sum(0) / ctx.bandwidth, None


def gathered(t: Tensor, processes: Processes) -> Tensor:
    """The rows of all processes, one after another; t itself where there is one process."""
    if processes.size == 1:
        return t
    n = torch.zeros(processes.size, dtype=torch.int64, device=t.device)
    n[processes.rank] = len(t)
    ends = processes.sum_(n).cumsum(0).tolist()
    whole = t.new_zeros(ends[-1], *t.shape[1:])
    whole[ends[processes.rank] - len(t) : ends[processes.rank]] = t
    return processes.sum_(whole)


def _sums(error: Tensor, r: Tensor, f: Tensor) -> dict[str, Tensor]:
    """What the metrics are made of: sums over this process's rows."""
    return {
        "rows": torch.tensor(float(len(error)), device=error.device),
        "error": torch.linalg.vector_norm(error).square(),
        "power": torch.linalg.vector_norm(r).square(),
        "active": (f > 0).sum(),
        "total": r.sum(0),
    }
