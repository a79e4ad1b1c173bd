"""One training step of a sparse coder, in which only the encoder's product is dense.

    coder.initialise(x)                          # scales, and b_dec at the geometric median
    step = SparseStep(coder, lr=4e-3)
    for x in batches:
        step.lr = ...                            # a schedule, if one is wanted
        metrics = step(x)                        # an SAE; step(x, target) for a transcoder

The gradients are those of `gradients`. The two weight matrices are updated 512 latents at a time
(gradient, projection, AdamW, unit norm) while their numbers are in the processor's cache, so no
gradient of a whole matrix ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mi_helpers.arguments import exact
from mi_helpers.saes.coder import SparseCoder, check_finite
from mi_helpers.saes.gradients import Diverged, Gradients, StepConfig, by_autograd, by_pairs
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.products import Products, TopK, float32_precision

_ROWS = 512  # latents that are updated together


class SparseStep:
    """A training step: `metrics = step(x)` for an SAE, `step(x, target)` for a transcoder.

    Loss, on inputs and targets scaled to unit mean squared norm, and averaged over the batch:

        ‖t - t̂‖²  + aux_coefficient · min(1, dead / aux_k) · ‖e - ê‖²     topk, batchtopk
        Σ_m ‖t - t̂_m‖²  + the same                                        with nested prefixes
        ‖t - t̂‖²  + sparsity · Σ_j f_j                                    relu
        ‖t - t̂‖²  + sparsity · Σ_j 1[pre_j > threshold_j]                 jumprelu

    e = t - t̂ is what is left unexplained, and ê what the aux_k largest *dead* latents make of it
    (AuxK). A latent is dead when it has not fired for dead_after tokens. JumpReLU's threshold
    learns through straight-through estimators of the given bandwidth, and as its logarithm. Decoder
    rows keep unit norm: the part of the gradient in the row's direction is removed, and the row is
    divided by its norm after AdamW's update.

    Args:
        coder: in float32; it is changed in place. Move it to its device before.
        config: all settings but the learning rate.
        lr: AdamW's learning rate; it may be set before any step.
        dense: take gradients from autograd for topk too (slow; for comparison).
        products: how to multiply; None means `quickest`.
        processes: each calls the step with its share of the batch, and all end with equal weights.
            (BatchTopK chooses within each process's share.)

    Raises:
        ValueError: from the step: a shape that does not fit, NaN or infinity in the activations;
            the weights are as before then.

    Source: Gao and others 2024, "Scaling and evaluating sparse autoencoders", A.2 (AuxK);
    Rajamanoharan and others 2024, "Jumping Ahead", equations 11 and 12 (JumpReLU).
    """

    def __init__(
        self,
        coder: SparseCoder,
        config: StepConfig | None = None,
        *,
        lr: float = 1e-3,
        dense: bool = False,
        products: Products | None = None,
        processes: Processes = ALONE,
    ):
        if coder.W_dec.dtype != torch.float32:
            raise ValueError(f"The coder is in {coder.W_dec.dtype}: train it in float32.")
        if coder.layer_norm:
            raise ValueError("A coder with layer_norm is read and used, but not trained here.")
        self.coder, self.lr, self.processes = coder, lr, processes
        self.config = StepConfig() if config is None else config
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
        """Learn from one batch: x (rows, d_in), and for a transcoder target (rows, d_out).

        Returns:
            of the batch, before the update: loss; explained_variance = 1 - nmse; nmse =
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
        """The gradients of all parameters by name, before the projection; nothing is changed."""
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
        rest = x, target, self._revivable(), self.config, self.processes
        if self.dense:
            return by_autograd(self.coder, *rest)
        return by_pairs(self.coder, self.top_k, *rest)

    @property
    def dead(self) -> Tensor:
        """Whether each latent is dead, (d_latent,): silent for dead_after tokens."""
        return self.tokens_since_fired >= self.config.dead_after

    def _revivable(self) -> Tensor:
        """The numbers of the dead latents that AuxK acts on."""
        dead = self.dead.nonzero().flatten()
        off = not self.config.aux_k or not self.config.aux_coefficient
        return dead[:0] if off or self.coder.activation in ("relu", "jumprelu") else dead

    # ---- the update

    def _metrics(self, gradients: Gradients, x: Tensor, target: Tensor | None) -> dict[str, float]:
        """The batch's metrics, over all processes; ValueError where they are not finite."""
        own = gradients.metrics
        names = ("rows", "error", "power", "active")
        vector = torch.cat([torch.stack([exact(own[n]) for n in names]), exact(own["total"])])
        rows, error, power, active, *_ = totals = self.processes.sum_(vector)
        aux = float(own["aux_loss"])
        penalty = float(self.processes.sum_(exact(own["penalty"]))) if "penalty" in own else 0.0
        if not torch.isfinite(totals).all():
            check_finite(x, "input")
            if target is not None:
                check_finite(target, "target")
            raise Diverged(
                "The loss is not finite, though the activations are: the weights have diverged; "
                "start again with a lower learning rate."
            )
        spread = power - totals[4:].pow(2).sum() / rows
        nmse = float(error / spread)
        gradients.metrics["rows"] = rows
        return {
            "loss": (float(error) + penalty) / float(rows) + aux,
            "explained_variance": 1 - nmse,
            "nmse": nmse,
            "l0": float(active / rows),
            "dead": float(self.dead.float().mean()),
            "aux_loss": aux,
        }

    def _update(self, gradients: Gradients) -> None:
        """AdamW on every parameter, the weight matrices 512 latents at a time."""
        coder, weights, decay = self.coder, self.weights, self.config.weight_decay
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
            self._adamw("W_enc", W_enc, part, decay)
            self._adamw("W_dec", W_dec, part, decay)
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
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=self.lr,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )

    def _move_threshold(self, gradients: Gradients) -> None:
        """JumpReLU: set it from its logarithm; BatchTopK: move it to the least value that fired."""
        threshold = self.coder.threshold if hasattr(self.coder, "threshold") else None
        if self.coder.activation == "jumprelu":
            threshold.copy_(self.weights["log_threshold"].exp())
        elif self.coder.activation == "batchtopk":
            least = self.processes.sum_(gradients.metrics["least"]) / self.processes.size
            share = max(1 / self.steps, 0.05)
            threshold += share * (least - threshold)

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next steps depend on but the learning rate, as tensors, not copies.

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
        """Continue from where `state_dict` was taken; the next steps are the same, bit for bit.

        Raises:
            ValueError: the state is another coder's: a tensor is missing, unknown, or of another
                shape.
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


def _weights(coder: SparseCoder) -> dict[str, Tensor]:
    """The parameters by name, sharing memory with the coder's; W_enc by latent (d_latent, d_in)."""
    if not coder.W_enc.T.is_contiguous():
        coder.W_enc.data = coder.W_enc.data.T.contiguous().T
    weights = {name: p.detach() for name, p in coder.named_parameters() if name != "threshold"}
    weights["W_enc"] = coder.W_enc.detach().T
    if coder.activation == "jumprelu":
        weights["log_threshold"] = coder.threshold.detach().log()
    return weights
