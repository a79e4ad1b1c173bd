"""One training step of a sparse coder, in which only the encoder's product is dense.

    coder.initialise(x)                          # scales, and b_dec at the geometric median
    step = SparseStep(coder, lr=4e-3)
    for x in batches:
        step.lr = ...                            # a schedule, if one is wanted
        metrics = step(x)                        # an SAE; step(x, target) for a transcoder

A TopK coder's step knows its pairs (row, latent): the k latents of every row. Everything after the
encoder's product is a sum over them, and equals what autograd gets from dense matrices, to float32:

    error_b   = Σ_j f_bj W_dec[j] - target_b                 weighted_sums over the row's latents
    ∂f_bj     = 2/B error_b · W_dec[j]                       dots, of the pairs only
    ∂W_dec[j] = 2/B Σ_b f_bj error_b                         weighted_sums over the latent's rows
    ∂W_enc[j] = Σ_b ∂pre_bj u_b,  u = s_in x - b_dec         the same
    ∂b_dec    = 2/B Σ_b error_b - Σ_j ∂b_enc[j] W_enc[:, j]  no product with the rows of ∂pre

The two weight matrices are updated 512 latents at a time (gradient, projection, AdamW, unit norm)
while their numbers are in the processor's cache, so no gradient of a whole matrix ever exists. The
other activations get their gradients from autograd, and share the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from mi_helpers.saes.coder import SparseCoder, check_finite
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.products import (
    Products,
    TopK,
    by_latent,
    dots,
    float32_precision,
    weighted_sums,
)

_ROWS = 512  # latents that are updated together, and rows of x in AuxK's products


@dataclass
class Gradients:
    """What one batch says about the parameters.

    small    gradients of all but the two weight matrices, by name
    block    (first, last) -> rows first … last - 1 of ∂W_enc^T (·, d_in) and of ∂W_dec (·, d_out)
    fired    (d_latent,), bool: latents that fired on the batch
    metrics  sums over the batch, by name
    """

    small: dict[str, Tensor]
    block: Callable[[int, int], tuple[Tensor, Tensor]]
    fired: Tensor
    metrics: dict[str, Tensor]


class SparseStep:
    """A training step: `metrics = step(x)` for an SAE, `step(x, target)` for a transcoder.

    Loss, on inputs and targets scaled to unit mean squared norm, and averaged over the batch:

        ‖t - t̂‖²  + aux_coefficient · min(1, dead / aux_k) · ‖e - ê‖²     topk, batchtopk
        ‖t - t̂‖²  + sparsity_coefficient · Σ_j f_j                        relu
        ‖t - t̂‖²  + sparsity_coefficient · Σ_j 1[pre_j > threshold_j]     jumprelu

    e = t - t̂ is what is left unexplained, and ê what the aux_k largest *dead* latents make of it
    (AuxK, Gao and others 2024, A.2). A latent is dead when it has not fired for dead_after_tokens.
    JumpReLU's threshold learns through straight-through estimators of the given bandwidth, and as
    its logarithm (Rajamanoharan and others 2024, "Jumping Ahead", equations 11 and 12).
    Decoder rows keep unit norm: the part of the gradient along the row is removed, and the row is
    divided by its norm after AdamW's update.

    Args:
        coder: where it is, and in float32; it is changed in place. Move it to a device before.
        lr: AdamW's learning rate; may be set anew before any step.
        dead_after_tokens: over all processes. Half of a run is far too late: 0.5 to 1 million.
        dense: take gradients from autograd for topk too (slow; for comparison).
        products: how to multiply; None means `quickest`.
        processes: each calls the step with its share of the batch, and all end with equal weights.
            (BatchTopK chooses within each process's share.)

    Raises:
        ValueError: from the step: a shape that does not fit, NaN or infinity in the activations;
            the weights are as before then.
    """

    def __init__(
        self,
        coder: SparseCoder,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        aux_k: int = 256,
        aux_coefficient: float = 1 / 32,
        dead_after_tokens: int = 1_000_000,
        sparsity_coefficient: float = 0.0,
        bandwidth: float = 1e-3,
        dense: bool = False,
        products: Products | None = None,
        processes: Processes = ALONE,
    ):
        if coder.W_dec.dtype != torch.float32:
            raise ValueError(f"The coder is in {coder.W_dec.dtype}: train it in float32.")
        self.coder, self.lr, self.processes = coder, lr, processes
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.aux_k, self.aux_coefficient = aux_k, aux_coefficient
        self.dead_after_tokens = dead_after_tokens
        self.sparsity_coefficient, self.bandwidth = sparsity_coefficient, bandwidth
        self.dense = dense or coder.activation != "topk"
        self.steps = 0
        self.tokens_since_fired = torch.zeros(
            coder.d_latent, dtype=torch.int64, device=coder.device
        )
        coder.unit_rows_()
        self.weights = _weights(coder)
        self.mean = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.square = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.top_k = TopK(self.weights["W_enc"], products)

    # ---- the step

    @torch.no_grad()
    def __call__(self, x: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """Learn from one batch: x (rows, d_in), and target (rows, d_out) of a transcoder.

        Returns:
            of the batch before the update: loss; explained_variance = 1 - nmse; nmse =
            E‖t - t̂‖² / E‖t - E t‖²; l0, latents that fired per row; dead, the share of latents that
            are dead; aux_loss.
        """
        self._check(x, target)
        with float32_precision(self.top_k.products.float32):
            gradients = self._gradients(x, target)
            metrics = self._metrics(gradients, x, target)
            self._update(gradients)
        return metrics

    @torch.no_grad()
    def gradients(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """The whole gradients by the coder's parameters, before the projection; changes nothing."""
        self._check(x, target)
        with float32_precision(self.top_k.products.float32):
            gradients = self._gradients(x, target)
            W_enc, W_dec = gradients.block(0, self.coder.d_latent)
        return gradients.small | {"W_enc": W_enc.T, "W_dec": W_dec}

    def _check(self, x: Tensor, target: Tensor | None) -> None:
        coder = self.coder
        for name, t, d in (("input", x, coder.d_in), ("target", target, coder.d_out)):
            if t is not None and (t.ndim != 2 or t.shape[1] != d or not len(t)):
                raise ValueError(f"The {name} has shape {tuple(t.shape)}, expected (rows, {d}).")
        if target is None and coder.d_in != coder.d_out:
            raise ValueError(
                f"This coder reads {coder.d_in} numbers and predicts {coder.d_out}: give the step "
                "a target."
            )
        if target is not None and len(target) != len(x):
            raise ValueError(f"There are {len(x)} rows of input and {len(target)} of target.")

    def _gradients(self, x: Tensor, target: Tensor | None) -> Gradients:
        return (self._by_autograd if self.dense else self._by_pairs)(x, target)

    def _read(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """u = s_in x - b_dec (no b_dec for a transcoder) and r = s_out target - b_dec."""
        coder = self.coder
        u = coder.read(x)
        if target is None and coder.apply_b_dec_to_input:
            return u, u
        target = (x if target is None else target).to(u.dtype)
        return u, torch.addcmul(-coder.b_dec, target, coder.scale_out)

    # ---- gradients from pairs

    def _by_pairs(self, x: Tensor, target: Tensor | None) -> Gradients:
        """The gradients of a TopK coder as sums over pairs (row, latent)."""
        coder, rows = self.coder, self.weights["W_enc"]
        u, r = self._read(x, target)
        indices, pre = self.top_k(u, coder.b_enc, coder.k)
        values = F.relu(pre)  # (rows, k)
        error = weighted_sums(coder.W_dec.detach(), indices, values)  # (rows, d_out)
        if coder.skip:
            error += u @ coder.W_skip.T  # a skip path is a transcoder's, and there u = s_in x
        error -= r
        metrics = _sums(error, r, values)
        d_pre = dots(error, coder.W_dec.detach(), indices) * (pre > 0)
        u, error, indices, values, d_pre = (
            gathered(t, self.processes) for t in (u, error, indices, values, d_pre)
        )
        factor = 2 / len(u)
        fired = torch.zeros(coder.d_latent, dtype=torch.bool, device=u.device)
        fired[indices[values > 0]] = True

        order, offsets = by_latent(indices, coder.d_latent)
        row = order // coder.k  # (pairs,), by latent
        value, d_value = values.flatten()[order] * factor, d_pre.flatten()[order] * factor
        b_enc = weighted_sums(u.new_ones(len(u), 1), row, d_value, offsets).flatten()
        aux = self._aux(u, error)
        metrics["aux_loss"] = aux.loss
        b_enc[aux.dead] += aux.b_enc
        small = {"b_enc": b_enc, "b_dec": error.sum(0) * factor}
        if coder.apply_b_dec_to_input:
            small["b_dec"] -= b_enc @ rows
        if coder.skip:
            small["W_skip"] = error.T @ u * factor
        starts = offsets.tolist()

        def block(first: int, last: int) -> tuple[Tensor, Tensor]:
            pairs = slice(starts[first], starts[last])
            at = offsets[first : last + 1] - starts[first]
            W_enc = weighted_sums(u, row[pairs], d_value[pairs], at)
            W_dec = weighted_sums(error, row[pairs], value[pairs], at)
            aux.add_to(W_enc, W_dec, first, last)
            return W_enc, W_dec

        return Gradients(small, block, fired, metrics)

    # ---- gradients from autograd

    def _by_autograd(self, x: Tensor, target: Tensor | None) -> Gradients:
        """The gradients of any coder, with (rows, d_latent) matrices."""
        coder = self.coder
        n = int(self.processes.sum_(torch.tensor(len(x), device=x.device)))
        target = (x if target is None else target).to(coder.W_dec.dtype) * coder.scale_out
        with torch.enable_grad():
            given = {name: p for name, p in coder.named_parameters() if p.requires_grad}
            pre = coder.encode_pre_act(x)
            f, penalty = self._activate(pre)
            error = f @ coder.W_dec + coder.b_dec + coder._around(x) - target
            loss = (error.pow(2).sum() + penalty) / n
            found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
        small = {
            name: self.processes.sum_(torch.zeros_like(p) if g is None else g)
            for (name, p), g in zip(given.items(), found, strict=True)
        }
        u, f, error = coder.read(x), f.detach(), error.detach()
        metrics = _sums(error, target - coder.b_dec, f) | {"penalty": penalty.detach()}
        if coder.activation == "batchtopk":
            metrics["least"] = f[f > 0].min() if (f > 0).any() else coder.threshold[0].detach()
        u, error = (gathered(t, self.processes) for t in (u, error))
        aux = self._aux(u, error)
        metrics["aux_loss"] = aux.loss
        small["b_enc"][aux.dead] += aux.b_enc
        if coder.apply_b_dec_to_input and len(aux.dead):
            small["b_dec"] -= aux.b_enc @ self.weights["W_enc"][aux.dead]
        W_enc, W_dec = small.pop("W_enc").T, small.pop("W_dec")
        fired = self.processes.sum_((f > 0).any(0).long()) > 0

        def block(first: int, last: int) -> tuple[Tensor, Tensor]:
            parts = W_enc[first:last].clone(), W_dec[first:last].clone()
            aux.add_to(*parts, first, last)
            return parts

        return Gradients(small, block, fired, metrics)

    def _activate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """f (rows, d_latent) as it is in training, and the sum of the sparsity penalty."""
        coder, nothing = self.coder, pre.new_zeros(())
        if coder.activation == "topk":
            values, indices = pre.topk(coder.k, dim=1)
            return torch.zeros_like(pre).scatter(1, indices, F.relu(values)), nothing
        if coder.activation == "batchtopk":
            flat = F.relu(pre).flatten()
            values, indices = flat.topk(coder.k * len(pre), sorted=False)
            return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre), nothing
        if coder.activation == "relu":
            f = F.relu(pre)
            return f, self.sparsity_coefficient * f.sum()
        f = _Jump.apply(F.relu(pre), coder.threshold, self.bandwidth)
        fires = _Fires.apply(F.relu(pre), coder.threshold, self.bandwidth)
        return f, self.sparsity_coefficient * fires.sum()

    # ---- dead latents

    def _aux(self, u: Tensor, error: Tensor) -> Aux:
        """AuxK's gradients, on the dead columns only; `error` = t̂ - t of the whole batch."""
        coder = self.coder
        dead = (self.tokens_since_fired >= self.dead_after_tokens).nonzero().flatten()
        if not self.aux_k or not self.aux_coefficient or coder.activation in ("relu", "jumprelu"):
            dead = dead[:0]
        rows, W_dec, b_enc = self.weights["W_enc"][dead], coder.W_dec[dead], coder.b_enc[dead]
        aux = Aux(dead, *(torch.zeros_like(t) for t in (rows, W_dec, b_enc)), u.new_zeros(()))
        if not len(dead):
            return aux
        scale = self.aux_coefficient * min(1.0, len(dead) / self.aux_k) / len(u)
        mine = self.processes.share(len(u))
        parts = zip(u[mine].split(_ROWS), error[mine].split(_ROWS), strict=True)
        for part, left in parts:
            pre = torch.addmm(b_enc, part, rows.T)  # (chunk, dead)
            values, indices = pre.topk(min(self.aux_k, len(dead)), dim=1, sorted=False)
            f = torch.zeros_like(pre).scatter_(1, indices, F.relu(values))
            off = torch.addmm(left, f, W_dec)  # ê - e, as e = -error
            aux.loss += scale * off.pow(2).sum()
            off *= 2 * scale
            aux.W_dec.addmm_(f.T, off)
            d_pre = (off @ W_dec.T).mul_(f > 0)
            aux.W_enc.addmm_(d_pre.T, part)
            aux.b_enc += d_pre.sum(0)
        for t in (aux.W_enc, aux.W_dec, aux.b_enc, aux.loss):
            self.processes.sum_(t)
        return aux

    # ---- what was learned

    def _metrics(self, gradients: Gradients, x: Tensor, target: Tensor | None) -> dict[str, float]:
        """The batch's metrics, over all processes; ValueError where it has NaN or infinity."""
        own = gradients.metrics
        names = ("rows", "error", "power", "active")
        vector = torch.cat([torch.stack([own[n].double() for n in names]), own["total"].double()])
        rows, error, power, active, *_ = totals = self.processes.sum_(vector)
        aux = float(own["aux_loss"])
        penalty = float(self.processes.sum_(own["penalty"].double())) if "penalty" in own else 0.0
        if not torch.isfinite(totals).all():
            check_finite(x, "input")
            if target is not None:
                check_finite(target, "target")
            raise ValueError(
                "The loss is not finite, though the activations are: the weights have diverged; "
                "start again with a lower learning rate."
            )
        spread = power - totals[4:].pow(2).sum() / rows
        nmse = float(error / spread)
        gradients.metrics["rows"] = rows
        dead = self.tokens_since_fired >= self.dead_after_tokens
        return {
            "loss": (float(error) + penalty) / float(rows) + aux,
            "explained_variance": 1 - nmse,
            "nmse": nmse,
            "l0": float(active / rows),
            "dead": float(dead.float().mean()),
            "aux_loss": aux,
        }

    def _update(self, gradients: Gradients) -> None:
        """AdamW on every parameter, the weight matrices 512 latents at a time."""
        coder, weights = self.coder, self.weights
        self.steps += 1
        small = gradients.small
        if "threshold" in small:
            small["log_threshold"] = small.pop("threshold") * coder.threshold
        for name, gradient in small.items():
            if name in weights:
                self._adamw(name, gradient, slice(None), 0.0)
        for first in range(0, coder.d_latent, _ROWS):
            part = slice(first, min(first + _ROWS, coder.d_latent))
            W_enc, W_dec = gradients.block(part.start, part.stop)
            row = weights["W_dec"][part]
            W_dec.addcmul_((W_dec * row).sum(1, keepdim=True), row, value=-1)
            self._adamw("W_enc", W_enc, part, self.weight_decay)
            self._adamw("W_dec", W_dec, part, self.weight_decay)
            row /= row.norm(dim=1, keepdim=True).clamp_(min=1e-12)
            self.top_k.refresh(part)
        self._move_threshold(gradients)
        self.tokens_since_fired += int(gradients.metrics["rows"])
        self.tokens_since_fired[gradients.fired] = 0

    def _adamw(self, name: str, gradient: Tensor, part: slice, weight_decay: float) -> None:
        step = torch.tensor(float(self.steps - 1), device=gradient.device)
        held = (t[name][part] for t in (self.weights, self.mean, self.square))
        weight, mean, square = held
        adamw(
            [weight],
            [gradient.contiguous()],
            [mean],
            [square],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def _move_threshold(self, gradients: Gradients) -> None:
        """JumpReLU's from its logarithm; BatchTopK's towards the least value that just fired."""
        threshold = self.coder.threshold if hasattr(self.coder, "threshold") else None
        if self.coder.activation == "jumprelu":
            threshold.copy_(self.weights["log_threshold"].exp())
        elif self.coder.activation == "batchtopk":
            least = self.processes.sum_(gradients.metrics["least"]) / self.processes.size
            share = max(1 / self.steps, 0.05)
            threshold += share * (least - threshold)

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on, as tensors (not copies), but the learning rate.

        W_enc and its moments are stored by latent, (d_latent, d_in).
        """
        coder = self.coder
        state = {f"coder.{name}": t for name, t in coder.state_dict().items()}
        state["coder.W_enc"] = self.weights["W_enc"]
        if "log_threshold" in self.weights:
            state["log_threshold"] = self.weights["log_threshold"]
        state |= {f"mean.{name}": t for name, t in self.mean.items()}
        state |= {f"square.{name}": t for name, t in self.square.items()}
        state["tokens_since_fired"] = self.tokens_since_fired
        state["steps"] = torch.tensor(self.steps)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; the steps that follow are the same, bit for bit.

        Raises:
            ValueError: it is another coder's: a tensor is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        odd = sorted(own.keys() ^ state.keys())
        if odd:
            where = "lacks" if odd[0] in own else "has"
            raise ValueError(
                f"The state {where} {odd[0]!r}: it was saved with another kind of coder."
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)} in the state and "
                    f"{tuple(tensor.shape)} here: it was saved with a coder of another size."
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])


@dataclass
class Aux:
    """AuxK's gradients of the dead latents (dead,), in rising order."""

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


class _Jump(torch.autograd.Function):
    """z where z > θ, else 0; by θ the derivative of a step is a box of the given bandwidth."""

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


def _weights(coder: SparseCoder) -> dict[str, Tensor]:
    """The parameters by name, sharing memory with the coder's; W_enc by latent (d_latent, d_in)."""
    if not coder.W_enc.T.is_contiguous():
        coder.W_enc.data = coder.W_enc.data.T.contiguous().T
    weights = {name: p.detach() for name, p in coder.named_parameters() if name != "threshold"}
    weights["W_enc"] = coder.W_enc.detach().T
    if coder.activation == "jumprelu":
        weights["log_threshold"] = coder.threshold.detach().log()
    return weights
