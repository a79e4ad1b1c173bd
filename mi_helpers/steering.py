"""Steering: a model is pushed along a direction while it reads and writes, and what that costs.

    with steered(model, ("resid_post", 3), Add(v, 4.0)):      # v: a difference of means, say
        model.generate("The Eiffel Tower is in", 20)
    with steered(model, ("resid_post", 3), Clamp(Latent(coder, 17), 60.0), slice(5, None)):
        ...                                                   # a latent, from position 5 on
    with steered(model, ("resid_post", 3), Erase(v)):         # the stream without that direction
        ...
    found = dose_response(model, site, partial(Add, v), [1, 2, 4, 8], concept, texts)
    found.concept, found.cost                                 # what was wanted, and what it costs

A vector is added in its own length: where a difference of means is added, a dose of 1 takes the
mean of one class to that of the other. `random_directions` of the same length are the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mi_helpers.arguments import (
    array,
    by_length,
    exact,
    in_order,
    indices,
    number,
    prompt_rows,
    shown,
    whole,
)
from mi_helpers.layouts import NORMALIZED, Key, ModelError
from mi_helpers.models import LanguageModel, site_reader, site_width
from mi_helpers.patching import MOST_LOGITS
from mi_helpers.sweeps import for_each

Positions = int | slice | Sequence[int] | Sequence[Sequence[int]] | Tensor | None
AFTER_FIRST = slice(1, None)

# --------------------------------------------------------------------------- along what, and how


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent of a coder: its direction is its decoder row, its coordinate its activation.

    Args:
        coder: an SAE or a transcoder, such as `saes.coder.SparseCoder`.
        number: of the latent.
        reads: the site that a transcoder reads, where it is not the one that is steered.

    Raises:
        ModelError: the coder has no such latent.
    """

    coder: Any
    number: int
    reads: Key | None = None

    def __post_init__(self):
        if not hasattr(self.coder, "encode_sparse"):
            raise ModelError(f"coder is {shown(self.coder)}: expected a sparse coder.")
        whole("The latent's number", self.number, 0, self.coder.d_latent - 1)
        if self.reads is not None and (not isinstance(self.reads, tuple) or len(self.reads) != 2):
            raise ModelError(f"reads is {shown(self.reads)}: expected (name, layer) of a site.")

    @property
    def direction(self) -> Tensor:
        """What one unit of the latent adds to what the coder predicts, (d_out,)."""
        return (self.coder.W_dec[self.number] / self.coder.scale_out).detach()

    def value(self, x: Tensor) -> Tensor:
        """The latent's activation on x (..., d_in), (...,)."""
        index, value = self.coder.encode_sparse(x.to(self.coder.device))
        return (value * (index == self.number)).sum(-1).to(x.device)

    def size(self, x: Tensor) -> Tensor | float:
        """How much of its direction one unit writes: σ (..., 1) where the coder normalises x."""
        return self.coder.statistics(x)[1]


Along = Latent | Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True, eq=False)
class Add:
    """x + dose · v, at every position that is steered.

    Args:
        along: v: a latent, or a vector (width,).
        dose: in units of v, so of the latent's activation.
    """

    along: Along
    dose: float = 1.0


@dataclass(frozen=True, eq=False)
class Clamp:
    """x + (value - c(x)) · v, with c(x) the latent's activation, or x · v / |v|² of a vector.

    Whatever the coder left unexplained stays. Along a vector the coordinate c has that value
    afterwards. A latent then *writes* that value, but a coder that reads the result may see
    another: it reads along its encoder, and other latents write there, too.

    Args:
        along: v: a latent, or a vector (width,).
        value: in units of v.

    Source: Templeton et al. 2024, Scaling Monosemanticity, "Methodological details" of steering.
    """

    along: Along
    value: float


@dataclass(frozen=True, eq=False)
class Erase:
    """x - ((x - centre) · v) v / |v|²: nothing along v can be told apart (`probes.project_out`).

    Args:
        along: v: a vector (width,), or a latent, whose decoder row is projected out. `Clamp(latent,
            0)` takes out what the latent itself wrote instead.
        centre: (width,), or one number for all: every position ends up level with it along v.
    """

    along: Along
    centre: Tensor | np.ndarray | float = 0.0


Steering = Add | Clamp | Erase


def random_directions(direction, n: int, seed: int = 0, like=None, free: bool = False) -> Tensor:
    """n random directions (n, width) of the length of `direction` (width,): steering's control.

    Args:
        like: rows of activations (rows, width): the directions then have their covariance, and so
            stay among those that the site itself uses, which is the harder control. None draws
            from all directions alike.
        free: without their part along `direction`. Where the rows vary mostly along it, as before
            a verdict, directions like them are no control otherwise: they are that direction.

    Raises:
        ModelError: a direction of no length, or rows of another width, or none that vary.
    """
    v = _vector("direction", direction)
    rng = torch.Generator().manual_seed(whole("seed", seed, -(2**63), 2**63 - 1))
    if like is None:
        drawn = torch.randn(whole("n", n, 1), len(v), generator=rng, dtype=torch.float64)
    else:
        rows = torch.from_numpy(array("like", like, "rows width", {"width": len(v)}))
        drawn = torch.randn(whole("n", n, 1), len(rows), generator=rng, dtype=torch.float64)
        drawn = drawn @ (rows - rows.mean(0))
    if not (before := drawn.norm(dim=1, keepdim=True)).all():
        raise ModelError("The rows of `like` are all the same: give activations at many tokens.")
    if free:
        drawn = drawn - (drawn @ v / (v @ v))[:, None] * v
    lengths = drawn.norm(dim=1, keepdim=True)
    if not (lengths > 1e-6 * before).all():  # what is left is rounding in float32
        raise ModelError("The rows of `like` vary along the direction alone: no other is left.")
    return (drawn / lengths * v.norm()).float()


# -------------------------------------------------------------------------------- while it lasts


@contextmanager
def steered(
    model: LanguageModel, site: Key, steering: Steering, positions: Positions = None
) -> Iterator[LanguageModel]:
    """While the context lasts, the model goes on with the steered activations of a site.

    It holds for whatever runs the model, `model.generate` too, in which the whole text is run again
    for each token. Contexts nest.

    Args:
        site: (name, layer) of a site with a vector per token; heads are side by side.
        steering: `Add`, `Clamp` or `Erase`.
        positions: one or several, the same in all prompts; (batch, k) for each prompt; a slice.
            Negative ones count from the end of each prompt, so that in `generate` -1 is always the
            newest token, and slice(n, None) of a prompt of n tokens is what is written. None means
            all but the first, as in `ablate`: that is BOS, whose activation is like no other.

    Raises:
        ModelError: no such site, a direction of another width or of no length, positions that are
            out of range in the run.
    """
    if not isinstance(steering, Add | Clamp | Erase):
        raise ModelError(f"steering is {shown(steering)}: expected Add, Clamp or Erase.")
    if not isinstance(site, tuple | list) or len(site) != 2 or site[0] == NORMALIZED:
        raise ModelError(
            f"site is {shown(site)}: expected (name, layer) of a site that the model passes on."
        )
    site = (site[0], site[1])
    _check_slice(positions)
    change = _change(steering, site_width(model, site), model.device)
    reads = getattr(steering.along, "reads", None)
    into, _ = site_reader(model, site)
    held: dict[str, Tensor] = {}

    def put(x: Tensor) -> Tensor:
        flat = x.flatten(2)
        if reads and "read" not in held:
            raise ModelError(f"{reads} is computed after {site}: a latent reads before it writes.")
        mask = _mask(model, held.pop("ids", None), flat.shape[:2], positions).to(x.device)
        full = flat.to(torch.promote_types(flat.dtype, torch.float32))
        new = change(full, held.pop("read", full)).to(flat.dtype)
        return torch.where(mask[..., None], new, flat).reshape(x.shape)

    hooks = {into: put}
    if reads:
        source, of = site_reader(model, reads)
        hooks = {source: lambda x: held.update(read=of(x).float())} | hooks
    seen = model.part("embed").register_forward_pre_hook(lambda _, args: held.update(ids=args[0]))
    try:
        named = {name if at is None else (name, at): hook for (name, at), hook in hooks.items()}
        with model.hooks(named):
            yield model
    finally:
        seen.remove()


def _change(steering: Steering, width: int, device) -> Callable[[Tensor, Tensor], Tensor]:
    """x (batch, pos, width) and what a latent reads → x steered."""
    along = steering.along
    v = _vector("The direction", getattr(along, "direction", along), width).to(device)
    name = {Add: "dose", Clamp: "value", Erase: "centre"}[type(steering)]
    given = getattr(steering, name)
    if isinstance(steering, Erase):
        axes = "width" if getattr(given, "ndim", 0) else "..."
        given = torch.from_numpy(array("centre", given, axes, {"width": width})).to(v)
        to = (given * v).sum() / (v @ v)
    else:
        to = number(name, given)

    def change(x: Tensor, read: Tensor) -> Tensor:
        unit = v.to(x.dtype)
        if isinstance(along, Latent) and not isinstance(steering, Erase):
            unit = unit * along.size(read)
        if isinstance(steering, Add):
            return x + to * unit
        if isinstance(steering, Clamp) and isinstance(along, Latent):
            now = along.value(read)
        else:
            now = x @ unit / (unit @ unit)
        return x + (to - now)[..., None].to(x) * unit

    return change


def _vector(what: str, given, width: int | None = None) -> Tensor:
    """A direction (width,), float64 on the CPU, of some length."""
    found = torch.from_numpy(array(what, given, "width", {"width": width} if width else None))
    if not found.norm() > 0:
        raise ModelError(f"{what} is zero: there is nothing to steer along.")
    if not 1e-15 < found.norm() < 1e15:  # its square is divided by, in float32
        raise ModelError(
            f"{what} has a length of {found.norm():.1e}: expected 1e-15 to 1e15, so scale it."
        )
    return found


def _check_slice(positions: Positions) -> None:
    """Refuse a slice that a tensor cannot be indexed with.

    Raises:
        ModelError: its ends are no whole numbers, or it goes backwards.
    """
    with suppress(TypeError, ValueError):
        if not isinstance(positions, slice) or positions.indices(1)[2] > 0:
            return
    raise ModelError(f"positions is {positions}: expected whole numbers, and a step above 0.")


def _mask(model: LanguageModel, ids: Tensor | None, shape, positions: Positions) -> Tensor:
    """Which positions of a batch are steered, (batch, pos); negative ones count from the end of
    each row's own text."""
    batch, length = shape
    each = for_each(AFTER_FIRST if positions is None else positions, batch, "positions")
    lengths = [length] * batch
    if batch > 1 and ids is not None and any(_from_end(at) for at in each):
        lengths = [len(row) for row in prompt_rows(model, ids)]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, at, n in zip(mask, each, lengths, strict=True):
        row[:n][at if isinstance(at, slice) else indices(at, n, "position")] = True
    return mask


def _from_end(at) -> bool:
    """Whether positions count from the end."""
    if isinstance(at, slice):
        return any(end is not None and end < 0 for end in (at.start, at.stop))
    return any(i < 0 for i in np.atleast_1d(at).flat if isinstance(i, int | np.integer))


# ------------------------------------------------------------------------------- dose and response


@dataclass(frozen=True, eq=False)
class Response:
    """What steering does, and what it costs, dose by dose.

    Args:
        doses: (n,).
        concept: (n, ...), what was measured at each dose; `concept_clean` (...) without steering.
        loss: (n, texts), nats per token of each of the other texts; `loss_clean` (texts,).
    """

    doses: Tensor
    concept: Tensor
    loss: Tensor
    concept_clean: Tensor
    loss_clean: Tensor

    @property
    def cost(self) -> Tensor:
        """How much steering adds to the mean loss on the other texts, nats per token, (n,)."""
        return (self.loss - self.loss_clean).mean(1)

    def breaks(self, by: float = 1.0) -> float | None:
        """The least dose, in absolute value, that costs more than `by` nats per token; None if none
        does."""
        number("by", by, least=0)
        broken = self.doses[self.cost > by]
        return float(broken[broken.abs().argmin()]) if len(broken) else None


@torch.no_grad()
def dose_response(
    model: LanguageModel,
    site: Key,
    steer: Callable[[float], Steering],
    doses: Sequence[float],
    concept: Callable[[LanguageModel], Any],
    texts,
    positions: Positions = None,
) -> Response:
    """The effect of each dose on a concept, and on the loss on everything else.

    Args:
        site, positions: as `steered` takes them; positions are the same for all prompts.
        steer: dose -> what is done, as partial(Add, v) or partial(Clamp, latent).
        doses: (n,), in units of the direction.
        concept: model -> numbers, called while the model is steered: probabilities at the end of
            prompts (`patching.last_logits`), or a count in what the model writes.
        texts: what is to stay as it was: texts or ids as `prompt_rows` takes them, of any lengths.

    Raises:
        ModelError: what `steered` refuses; no doses; a concept that is no finite numbers.
    """
    for what, fn in (("steer", steer), ("concept", concept)):
        if not callable(fn):
            raise ModelError(f"{what} is {shown(fn)}: expected a function.")
    listed = array("doses", doses, "n").tolist()
    rows = prompt_rows(model, texts, "The texts")

    def measure() -> tuple[Tensor, Tensor]:
        found = array("What concept gave", concept(model), "...")
        return torch.from_numpy(found).float(), text_losses(model, rows)

    clean = measure()
    parts = []
    for dose in listed:
        with steered(model, site, steer(dose), positions):
            parts.append(measure())
        if (was := clean[0].shape) != (now := parts[-1][0].shape):
            raise ModelError(
                f"concept gave numbers of shape {tuple(now)} at dose {dose:g}, and {tuple(was)} "
                "without steering: expected as many at every dose."
            )
    concepts, losses = (torch.stack(each) for each in zip(*parts, strict=True))
    return Response(torch.tensor(listed), concepts, losses, *clean)


@torch.no_grad()
def text_losses(model: LanguageModel, texts) -> Tensor:
    """Mean -log p(next token) of each text, nats per token, (texts,): the model as it now is.

    Args:
        texts: as `prompt_rows` takes them, of two tokens or more each; each is run without padding.

    Raises:
        ModelError: a text of one token, or what `prompt_rows` refuses.
    """
    rows = prompt_rows(model, texts, "The texts")
    groups, found = by_length([len(row) for row in rows]), []
    for chosen in groups:
        batch = torch.stack([rows[i] for i in chosen])
        step = max(1, MOST_LOGITS // (batch.shape[1] * model.d_vocab))
        found.append(torch.cat([exact(model.loss(some)).mean(1) for some in batch.split(step)]))
    return in_order(found, groups, dim=0).float().cpu()
