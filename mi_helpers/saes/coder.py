"""SparseCoder: a sparse autoencoder (SAE) or a transcoder, whatever its activation.

    coder = SparseCoder(d_in=144, d_latent=1152, k=16)      # an SAE: it predicts what it reads
    indices, values = coder.encode_sparse(x)                # the k latents that fire, per row
    x_hat = coder(x)

An SAE predicts its own input; a transcoder reads one site and predicts another. They differ by
`d_out` (and by the target they are trained on), and nothing that uses a coder has to ask which it
is. Its training is in `step`, its files are read and written by `files`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.arguments import exact
from mi_helpers.saes.products import CHUNK, Products, top_k, weighted_sums

ACTIVATIONS = ("topk", "batchtopk", "relu", "jumprelu")


class SparseCoder(nn.Module):
    """f = activation((s_in x - b_dec) W_enc + b_enc) and x̂ = (f W_dec + b_dec) / s_out.

        pre  = (s_in x - b_dec) @ W_enc + b_enc         (..., d_latent)
        f    = activation(pre)                          (..., d_latent), most of it 0
        x̂    = (f @ W_dec + b_dec) / s_out              (..., d_out)

        topk        f = relu(pre) where pre is one of the k largest of its row, else 0
        relu        f = relu(pre)
        jumprelu    f = relu(pre) where pre > threshold, else 0
        batchtopk   as jumprelu; while it is trained, the k · batch largest of the whole batch

    Parameters:
        W_enc      (d_in, d_latent); in memory one latent's numbers lie side by side
        b_enc      (d_latent,)
        W_dec      (d_latent, d_out); rows of unit norm while it is trained
        b_dec      (d_out,)
        threshold  (d_latent,), of jumprelu and batchtopk
        W_skip     (d_out, d_in), of a coder with skip=True: x̂ gets s_in x @ W_skip^T / s_out too

    A Matryoshka coder (`nested_`) is trained so that the first latents predict by themselves, too;
    what it computes is the same. With `layer_norm`, an SAE reads (x - μ) / (σ + 1e-5), and gives
    x̂ σ + μ, with the mean and the standard deviation of each x: as SAELens has it, and for reading
    such files alone, as it is not trained here.

    A transcoder (`d_out` given) leaves out the "- b_dec", as its input and output are different
    spaces; so do some published SAEs. The scales s_in and s_out are 1 but in training, which wants
    inputs and targets of unit mean squared norm; `folded` gives the same function without them.
    Files hold folded coders.

    Args:
        d_in, d_latent, d_out: sizes; without d_out it is an SAE, of d_out = d_in.
        activation: one of `ACTIVATIONS`.
        k: how many latents fire, for "topk" (per row) and "batchtopk" (on average).
        skip: add an affine path around a transcoder's latents.
        apply_b_dec_to_input: of an SAE: whether b_dec is subtracted from the input.
        seed: of the random decoder rows; W_enc begins as their transpose in an SAE. The numbers
            are the same on every device; `with torch.device(...)` chooses where they are made.

    Raises:
        ValueError: sizes, activation, k, skip or apply_b_dec_to_input that do not go together.

    Source: Gao and others 2024, "Scaling and evaluating sparse autoencoders", section 2.
    """

    def __init__(
        self,
        d_in: int,
        d_latent: int,
        d_out: int | None = None,
        activation: str = "topk",
        k: int | None = None,
        skip: bool = False,
        apply_b_dec_to_input: bool | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.transcoder = d_out is not None
        d_out = d_out if self.transcoder else d_in
        _check_shape(d_in, d_latent, d_out, activation, k)
        if self.transcoder and apply_b_dec_to_input:
            raise ValueError(
                "A transcoder's b_dec belongs to its output: leave the input as it is."
            )
        if skip and not self.transcoder:
            raise ValueError("A skip path would copy an SAE's input: it is for a coder with d_out.")
        self.d_in, self.d_latent, self.d_out = d_in, d_latent, d_out
        self.activation = activation
        self.k = k if activation in ("topk", "batchtopk") else None
        self.apply_b_dec_to_input = apply_b_dec_to_input is not False and not self.transcoder
        generator = torch.Generator().manual_seed(seed)
        W_dec = _unit_rows(d_latent, d_out, generator)
        W_enc = _unit_rows(d_latent, d_in, generator) if self.transcoder else W_dec.clone()
        self.W_enc = nn.Parameter(W_enc.T)
        self.b_enc = nn.Parameter(torch.zeros(d_latent))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if activation in ("jumprelu", "batchtopk"):
            first = 0.001 if activation == "jumprelu" else 0.0
            self.threshold = nn.Parameter(torch.full((d_latent,), first))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))
        self.prefixes: tuple[int, ...] = ()  # see `nested_`
        self.layer_norm = False
        self.metadata: dict = {}  # what a file says about the coder beyond its numbers

    @property
    def skip(self) -> bool:
        """Whether there is an affine path around the latents."""
        return hasattr(self, "W_skip")

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def extra_repr(self) -> str:
        k = f", k={self.k}" if self.k else ""
        skip = ", skip" if self.skip else ""
        skip += f", prefixes {self.prefixes}" if self.prefixes else ""
        skip += ", layer_norm" if self.layer_norm else ""
        return f"{self.d_in} → {self.d_latent} → {self.d_out}, {self.activation}{k}{skip}"

    def nested_(self, widths: Sequence[int]) -> SparseCoder:
        """Make it a Matryoshka coder: its training loss becomes the sum over nested prefixes.

            Σ_m ‖t - t̂_m‖²,    t̂_m = f_{0 … width_m - 1} @ W_dec[: width_m] + b_dec

        The k latents are chosen among all, as in any TopK coder; the first ones have to predict
        without those after them, and so are not split or absorbed by them.

        Args:
            widths: of the prefixes, rising; all latents are the last one, and may be left out.

        Raises:
            ValueError: widths that do not rise or fit, or an activation that fixes no number of
                latents.

        Source: Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse
        Autoencoders", equation 4.
        """
        widths = [*widths, *([self.d_latent] if list(widths)[-1:] != [self.d_latent] else [])]
        fits = all(type(w) is int for w in widths)
        if not fits or widths[0] < 1 or any(a >= b for a, b in itertools.pairwise(widths)):
            raise ValueError(
                f"The prefixes are {widths}: expected whole numbers that rise to "
                f"{self.d_latent}, the number of latents."
            )
        if self.activation not in ("topk", "batchtopk"):
            raise ValueError(f"Prefixes are for topk and batchtopk, not for {self.activation}.")
        self.prefixes = tuple(widths)
        return self

    # ---- from activations to latents

    def read(self, x: Tensor) -> Tensor:
        """What W_enc reads: s_in x - b_dec, or s_in x where b_dec is not subtracted, (..., d_in).

        Raises:
            ValueError: the last axis is not d_in.
        """
        if x.shape[-1:] != (self.d_in,):
            raise ValueError(
                f"The input has shape {tuple(x.shape)}, expected (..., {self.d_in}): this coder "
                f"reads {self.d_in} numbers per token."
            )
        x = x.to(self.W_dec.dtype)
        if self.layer_norm:
            mean, std = self.statistics(x)
            x = (x - mean) / (std + 1e-5)
        if not self.apply_b_dec_to_input:
            return x * self.scale_in
        return torch.addcmul(-self.b_dec, x, self.scale_in)

    def statistics(self, x: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """μ and σ (..., 1) of each x (..., d_in) where its input is normalised, else 0 and 1.

        Raises:
            ValueError: they are needed, and there is no x.
        """
        if not self.layer_norm:
            return 0.0, 1.0
        if x is None:
            raise ValueError("This coder normalises what it reads: give x, to go back to its size.")
        x = x.to(self.W_dec.dtype)
        return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)

    def encode_pre_act(self, x: Tensor, latents: Sequence[int] | Tensor | None = None) -> Tensor:
        """pre = (s_in x - b_dec) @ W_enc + b_enc (..., d_latent), or that of some latents only."""
        if latents is None:
            return self.read(x) @ self.W_enc + self.b_enc
        latents = self.check_latents(latents)
        return self.read(x) @ self.W_enc[:, latents] + self.b_enc[latents]

    def encode(self, x: Tensor) -> Tensor:
        """f = activation(pre) (..., d_latent), 0 where a latent does not fire."""
        pre = self.encode_pre_act(x)
        if self.activation == "topk":
            values, indices = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, indices, F.relu(values))
        if self.activation == "relu":
            return F.relu(pre)
        return F.relu(pre) * (pre > self.threshold)

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, values) of the latents that fire, the largest first: both (..., n).

        n is k for topk, else the largest number of latents that fire in a row; unused places have
        the value 0. The values are those of `encode`, but no (..., d_latent) tensor is made, and no
        gradients pass.
        """
        u = self.read(x).reshape(-1, self.d_in)  # (rows, d_in)
        if self.activation == "topk":
            few = Products(("float32",), "highest") if len(u) < 512 else None
            rows, bias = self.W_enc.T.float(), self.b_enc.float()
            indices, values = top_k(u.float(), rows, bias, self.k, few)
            values = F.relu(values)
        else:
            indices, values = self._firing(x.reshape(-1, self.d_in))
        return indices.view(*x.shape[:-1], -1), values.view(*x.shape[:-1], -1)

    def _firing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_sparse` where the number of firing latents differs from row to row."""
        chunks = []
        for part in x.split(CHUNK):
            f = self.encode(part)
            n = max(1, int((f > 0).sum(-1).max())) if len(part) else 1
            chunks.append(f.topk(n, dim=-1))
        n = max((values.shape[1] for values, _ in chunks), default=1)
        pad = [tuple(F.pad(t, (0, n - t.shape[1])) for t in chunk) for chunk in chunks]
        values, indices = (torch.cat(parts) for parts in zip(*pad, strict=True))
        return indices, values

    # ---- from latents to predictions

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """x̂ (..., d_out) from latents f (..., d_latent); a skip path and layer_norm need x, too."""
        return self._output(f @ self.W_dec, x)

    def decode_sparse(self, indices: Tensor, values: Tensor, x: Tensor | None = None) -> Tensor:
        """`decode` from the latents that fire: indices and values (..., n)."""
        self.check_latents(indices)
        flat = (t.reshape(-1, t.shape[-1]) for t in (indices, values))
        sums = weighted_sums(self.W_dec, *flat).view(*indices.shape[:-1], self.d_out)
        return self._output(sums, x)

    def _output(self, sums: Tensor, x: Tensor | None) -> Tensor:
        """x̂ from what the latents write."""
        mean, std = self.statistics(x)
        return (sums + self.b_dec + self.skip_path(x)) / self.scale_out * std + mean

    def skip_path(self, x: Tensor | None) -> Tensor | float:
        """s_in x @ W_skip^T (..., d_out); 0 without a skip path or without x."""
        if not self.skip or x is None:
            return 0.0
        return (x.to(self.W_dec.dtype) * self.scale_in) @ self.W_skip.T

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (..., d_out), what the coder predicts from x (..., d_in)."""
        return self.decode(self.encode(x), x)

    # ---- before and after training

    @torch.no_grad()
    def initialise(self, x: Tensor, target: Tensor | None = None) -> SparseCoder:
        """Set the scales and b_dec from a sample of inputs (rows, d_in) and targets (rows, d_out).

        The scales make the mean squared norms 1, and b_dec becomes the geometric median of the
        scaled targets.

        Raises:
            ValueError: the sample holds NaN or infinity.
        """
        target = x if target is None else target
        check_finite(x, "inputs"), check_finite(target, "targets")
        self.scale_in.fill_(_unit_scale(x))
        self.scale_out.fill_(_unit_scale(target))
        self.b_dec.copy_(geometric_median(target.to(self.b_dec) * self.scale_out))
        return self

    @torch.no_grad()
    def unit_rows_(self) -> SparseCoder:
        """Divide every decoder row by its norm, in place; a row of zeros stays."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self

    @torch.no_grad()
    def folded(self) -> SparseCoder:
        """A coder with the same predictions and scales of 1, its latents in units of the target.

            f' = f / s_out    W_enc' = W_enc s_in / s_out    b_enc', b_dec', threshold' = · / s_out

        as activations commute with a positive factor. The decoder's rows keep their norm. (Where
        s_in ≠ s_out and b_dec is subtracted from the input, b_enc' makes up for the difference.)
        """
        new = copy.deepcopy(self)
        s_out = self.scale_out
        ratio = self.scale_in / s_out
        if self.apply_b_dec_to_input:
            new.b_enc += (ratio - 1) * (self.b_dec @ self.W_enc)
        new.W_enc *= ratio
        new.b_enc /= s_out
        new.b_dec /= s_out
        if hasattr(self, "threshold"):
            new.threshold /= s_out
        if self.skip:
            new.W_skip *= ratio
        new.scale_in.fill_(1.0), new.scale_out.fill_(1.0)
        return new

    @torch.no_grad()
    def unfold_(self, folded: SparseCoder) -> SparseCoder:
        """Take over a folded coder's function at this one's scales: the inverse of `folded`."""
        s_out = self.scale_out
        ratio = self.scale_in / s_out
        for name, parameter in self.named_parameters():
            in_out = name in ("W_enc", "W_skip")
            by = 1 / ratio if in_out else 1.0 if name == "W_dec" else s_out
            parameter.copy_(folded.get_parameter(name) * by)
        if self.apply_b_dec_to_input:
            self.b_enc -= (ratio - 1) * (self.b_dec @ self.W_enc)
        return self

    def check_latents(self, latents: Sequence[int] | Tensor) -> Tensor:
        """Latent numbers as int64, on the coder's device.

        Raises:
            ValueError: one is out of range.
        """
        latents = torch.as_tensor(latents, dtype=torch.int64, device=self.device)
        if latents.numel():
            low, high = (int(i) for i in latents.aminmax())
            if low < 0 or high >= self.d_latent:
                raise ValueError(
                    f"There is no latent {low if low < 0 else high}: this coder has latents 0 to "
                    f"{self.d_latent - 1}."
                )
        return latents


# --------------------------------------------------------------------------------- measures


@torch.no_grad()
def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """1 - E‖x - x̂‖² / E‖x - x̄‖², over rows and dimensions together, for x, x̂ (..., d).

    Other definitions are in use and give other numbers for the same coder: the mean over dimensions
    of 1 - Var(x_i - x̂_i) / Var(x_i), or E‖x‖² as the denominator, which counts the mean as
    explained.
    """
    x, x_hat = (exact(t.detach().flatten(0, -2)) for t in (x, x_hat))
    return float(1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@torch.no_grad()
def quality(
    coder: SparseCoder, x: Tensor, target: Tensor | None = None, chunk: int = 2_048
) -> dict[str, float]:
    """How well a coder predicts t = target (rows, d_out) from x (rows, d_in).

    Args:
        target: None means x, as for an SAE.
        chunk: rows at a time.

    Returns:
        explained_variance: 1 - E‖t - t̂‖² / E‖t - E t‖², over rows and dimensions together.
        nmse: E‖t - t̂‖² / E‖t - E t‖².
        relative_error: E‖t - t̂‖² / E‖t‖².
        l0: mean number of latents that fire per row.
    """
    target = x if target is None else target
    mean = exact(target).mean(0).float()
    error = spread = power = active = 0.0
    for begin in range(0, len(x), chunk):
        t = target[begin : begin + chunk].to(coder.device)
        rows = x[begin : begin + chunk].to(coder.device)
        indices, values = coder.encode_sparse(rows)
        predicted = coder.decode_sparse(indices, values, rows)
        error += float((t - predicted).pow(2).sum())
        spread += float((t - mean.to(t.device)).pow(2).sum())
        power += float(t.pow(2).sum())
        active += float((values > 0).sum())
    return {
        "explained_variance": 1 - error / spread,
        "nmse": error / spread,
        "relative_error": error / power,
        "l0": active / len(x),
    }


def shrinkage(x: Tensor, x_hat: Tensor) -> float:
    """The length of x̂ relative to the best: Σ ‖x̂ - x̄‖² / Σ (x - x̄) · (x̂ - x̄), for rows (n, d).

    1 where no factor would make the reconstruction better; below 1 where it is too short, as an L1
    penalty makes it.

    Source: Rajamanoharan and others 2024, "Improving Dictionary Learning with Gated Sparse
    Autoencoders", relative reconstruction bias.
    """
    centre = x.mean(0)
    x, x_hat = x - centre, x_hat - centre
    return float((x_hat * x_hat).sum() / (x * x_hat).sum())


@torch.no_grad()
def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point (d,) whose summed distance to the rows of x (n, d) is least.

    Weiszfeld's iteration begins at the mean and repeats the mean of the rows weighted by
    1 / distance. A few outlying rows hardly move it.

    Args:
        steps: at most.
        tolerance: it stops when it moves by less than this, relative to its norm.

    Raises:
        ValueError: there are no rows, or x is no matrix.
    """
    if x.ndim != 2 or not len(x):
        raise ValueError(
            f"The rows have shape {tuple(x.shape)}, expected (n, d) with n of 1 or more."
        )
    point = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        moved = (weights @ x) / weights.sum()
        shift = (moved - point).norm()
        point = moved
        if shift <= tolerance * point.norm():
            break
    return point


def check_finite(x: Tensor, what: str = "activations") -> None:
    """Check that x (rows, d) has no NaN or infinity.

    Raises:
        ValueError: it has; the first such row is named.
    """
    if not torch.isfinite(x.sum()):  # one pass without a mask; a sum may overflow, so look again
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"The {what} hold NaN or infinity in {len(bad)} of {len(x)} rows, first in row "
                f"{int(bad[0])}: leave these rows out, and look for where they come from."
            )


# ---------------------------------------------------------------------------- small helpers


def _unit_scale(x: Tensor) -> Tensor:
    """The factor that makes the mean squared norm of x's rows 1; 1 where all rows are 0."""
    square = exact(x).pow(2).sum(-1).mean()
    return (square.rsqrt() if square > 0 else torch.ones_like(square)).float()


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    """n random directions (n, d) on the default device; nothing is drawn on "meta"."""
    device = torch.get_default_device()
    if device.type == "meta":
        return torch.empty(n, d)
    return F.normalize(torch.randn(n, d, generator=generator, device="cpu"), dim=1).to(device)


def _check_shape(d_in: int, d_latent: int, d_out: int, activation: str, k: int | None) -> None:
    for name, value in (("d_in", d_in), ("d_latent", d_latent), ("d_out", d_out)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it has to be 1 or more.")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"There is no activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}."
        )
    if activation in ("topk", "batchtopk"):
        if k is None:
            raise ValueError(f"{activation} needs k, the number of latents that fire: 32, say.")
        if not 1 <= k <= d_latent:
            raise ValueError(
                f"k is {k}, and the dictionary has {d_latent} latents: choose 1 to {d_latent}."
            )
