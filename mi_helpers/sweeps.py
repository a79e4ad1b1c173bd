"""What a sweep of patches is over: pairs of prompts, of any lengths, and places in the model.

    Sweep("heads x positions", layers=[3, 4], positions=-1)
    Sweep("positions", positions=[[4, -1], [6, -1]])     # two positions for each of two prompts

Prompts of one length, patched at the same positions, run together (`Group`) and without padding,
so that each gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mi_helpers.ablation import Gaussian, Prompt
from mi_helpers.arguments import by_length, indices, one_of, prompt_rows
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel

STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = ("z", "q", "k", "v", "pattern")
OVER = ("positions", "heads", "heads x positions", "layers")
MODES = ("denoise", "noise")

# -------------------------------------------------------------------------------------- prompts


def pair(model: LanguageModel, clean: Prompt, corrupted: Prompt) -> tuple[Tensor, Tensor]:
    """Both prompts (or batches of them) as token ids of one shape, (batch, pos), without padding.

    Raises:
        ModelError: what `pairs` refuses, or prompts of several lengths.
    """
    a, b = pairs(model, clean, corrupted)
    longest, shortest = (f(len(row) for row in [*a, *b]) for f in (max, min))
    if longest != shortest:
        uneven = next(
            (x, y) for x, y in zip(a, b, strict=True) if (len(x), len(y)) != (longest,) * 2
        )
        raise ModelError(
            f"The clean prompt has {len(uneven[0])} tokens and the corrupted one {len(uneven[1])}: "
            "choose words of equally many tokens, so that positions line up."
            if len(uneven[0]) != len(uneven[1])
            else f"The prompts have {shortest} to {longest} tokens: choose prompts of one length."
        )
    return torch.stack(a), torch.stack(b)


def pairs(
    model: LanguageModel, clean: Prompt, corrupted: Prompt
) -> tuple[list[Tensor], list[Tensor]]:
    """The clean and the corrupted prompts' own token ids, without padding, as `prompt_rows` reads
    them.

    Raises:
        ModelError: an empty prompt, one longer than the context, other counts of prompts on the two
            sides, two prompts that are the same, or padding that cannot be told from text.
    """
    a = prompt_rows(model, clean, "The clean prompts")
    b = prompt_rows(model, corrupted, "The corrupted prompts")
    if len(a) != len(b):
        raise ModelError(f"There are {len(a)} clean prompts and {len(b)} corrupted ones.")
    if all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        raise ModelError("The clean and the corrupted prompt are the same: change a word.")
    return a, b


@dataclass(frozen=True)
class Run:
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


@dataclass(frozen=True)
class Prompts:
    """One side of a pair: each prompt's own ids, and the noise on them, if any."""

    rows: list[Tensor]
    noise: Tensor | None = None  # (repeats, batch, pos, d_model): the prompts are of one length
    repeats: int = 1

    def some(self, chosen: list[int]) -> Run:
        """The run of prompts of one length."""
        ids = torch.stack([self.rows[i] for i in chosen])
        return Run(ids, None if self.noise is None else self.noise[:, chosen], self.repeats)


def sides_of(model: LanguageModel, clean: Prompt, corrupted, mode: str) -> tuple[Prompts, Prompts]:
    """The side that is patched, and the one that the activations come from."""
    one_of("mode", mode, MODES)
    pure, other = two_sides(model, clean, corrupted)
    return (other, pure) if mode == "denoise" else (pure, other)


def two_sides(model: LanguageModel, clean: Prompt, corrupted) -> tuple[Prompts, Prompts]:
    """The clean side and the corrupted one."""
    if corrupted is None:
        raise ModelError("There is no corrupted prompt: give one beside the clean prompt.")
    if not isinstance(corrupted, Gaussian):
        a, b = pairs(model, clean, corrupted)
        return Prompts(a), Prompts(b)
    rows = prompt_rows(model, clean, "The clean prompts")
    if len({len(row) for row in rows}) > 1:
        raise ModelError(
            "The clean prompts have several lengths, and noise is drawn for prompts of one: give "
            "those of each length by themselves."
        )
    noise = corrupted.noise(model, torch.stack(rows))
    return Prompts(rows, None, corrupted.seeds), Prompts(rows, noise, corrupted.seeds)


# --------------------------------------------------------------------------------------- sweeps


def axes_of(model: LanguageModel, site: str, over: str | None) -> str:
    """The axes of a sweep over `site`, checked; by default heads where there are any, else
    positions."""
    one_of("site", site, STREAM_SITES + HEAD_SITES)
    model.check_site(site)
    over = over or ("heads" if site in HEAD_SITES else "positions")
    one_of("over", over, OVER)
    if "heads" in over and site not in HEAD_SITES:
        raise ModelError(f"{site!r} has no heads: sweep it over positions, or over layers.")
    return over


@dataclass(frozen=True)
class Sweep:
    """The patches of a sweep: its axes, and the places that it is restricted to.

    Args:
        over: "positions", "heads", "heads x positions", or "layers" (a whole layer at once); None
            means heads where the site has heads, else positions.
        layers: only these layers; None means all.
        heads: only these heads; without a heads axis, they are patched at once.
        positions: only these positions; without a positions axis, they are patched at once. One or
            more that are the same in all prompts, or (batch, k): k for each prompt. A negative one
            counts from the end of each prompt.
        source: the positions that the activations are taken from, likewise; None means the same,
            each counted in its own prompt. With it, or with negative positions, the clean and the
            corrupted prompt may differ in length.
    """

    over: str | None = None
    layers: int | Sequence[int] | None = None
    heads: int | Sequence[int] | None = None
    positions: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None
    source: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None

    def of_prompts(self, lengths: Sequence[tuple[int, int]]) -> list[tuple]:
        """The positions of each prompt: those that are patched, and those that the activations are
        taken from, both counted from the first; (None, None) for all of them.

        Args:
            lengths: of each prompt, in the run that is patched and in the other.

        Raises:
            ModelError: positions that are out of range, or not for each prompt; none, where the
                two sides of a prompt differ in length.
        """
        if self.positions is None and self.source is None:
            for i, (base, other) in enumerate(lengths):
                if base != other:
                    raise ModelError(
                        f"Prompt {i} has {base} tokens in the run that is patched and {other} in "
                        "the other one, so positions do not line up: choose words of equally many "
                        "tokens, or give the positions, as Sweep(positions=-1)."
                    )
            return [(None, None)] * len(lengths)
        if self.positions is None:
            raise ModelError("source says where activations are taken from: give positions, too.")
        to = for_each(self.positions, len(lengths), "positions")
        of = to if self.source is None else for_each(self.source, len(lengths), "source")
        found = []
        for p, q, (base, other) in zip(to, of, lengths, strict=True):
            at, taken = indices(p, base, "position"), indices(q, other, "source position")
            if len(at) != len(taken) or (at != taken and len(set(at)) < len(at)):
                raise ModelError(
                    f"positions are {at} and source {taken} in one prompt: expected as many of "
                    "each, and no position twice."
                )
            found.append((tuple(at), tuple(taken)))
        return found

    def places(self, model: LanguageModel, site: str, length: int):
        """The layers, the sets of heads (None where there are none) and the sets of positions that
        are patched, and the shape of the result."""
        over = axes_of(model, site, self.over)
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


def for_each(given, n: int, what: str) -> list:
    """Positions for each of n prompts: those of (n, k), or the same for all."""
    given = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if not isinstance(given, Sequence) or not any(
        isinstance(each, Sequence | Tensor | np.ndarray) and getattr(each, "ndim", 1)
        for each in given
    ):
        return [given] * n
    if len(given) != n:
        raise ModelError(f"{what} are for {len(given)} prompts, and there are {n}.")
    return list(given)


@dataclass(frozen=True)
class Group:
    """Prompts of a sweep that are alike in their lengths and positions, so that they run together.

    Args:
        prompts: their numbers.
        base, source: the run that is patched, and the other one, if there is one.
        at, taken: the positions that are patched, and those in the other run; None for all.
    """

    prompts: list[int]
    base: Run
    source: Run | None
    at: tuple[int, ...] | None
    taken: tuple[int, ...] | None

    def line_up(self, x: Tensor, site: str) -> Tensor:
        """The other run's activations (rows, pos, ...) at the positions of the run that is
        patched."""
        length = self.base.ids.shape[1]
        if self.at == self.taken and x.shape[-1 if site == "pattern" else 1] == length:
            return x
        if site == "pattern":
            raise ModelError(
                "A pattern says which positions are attended to, so the prompts have to line up: "
                "choose words of equally many tokens, and leave source out."
            )
        moved = x.new_zeros(len(x), length, *x.shape[2:])
        moved[:, list(self.at)] = x[:, list(self.taken)]
        return moved


def groups_of(base: Prompts, source: Prompts | None, sweep: Sweep, over: str) -> list[Group]:
    """The prompts of a sweep over the axes `over`, by length and positions."""
    other = base if source is None else source
    lengths = [(len(a), len(b)) for a, b in zip(base.rows, other.rows, strict=True)]
    places = sweep.of_prompts(lengths)
    if "positions" in over:
        if sweep.positions is None and len(set(lengths)) > 1:
            low, high = (f(base for base, _ in lengths) for f in (min, max))
            raise ModelError(
                f"The prompts have {low} to {high} tokens, so their positions do not line up: give "
                "a position for each, as Sweep(positions=[[3], [5]]), or sweep over heads or "
                "layers."
            )
        if len({len(at) for at, _ in places if at}) > 1:
            raise ModelError("positions has rows of several lengths: expected (batch, k).")
    found = []
    for chosen in by_length([*zip(lengths, places, strict=True)]):
        pair_of = base.some(chosen), None if source is None else source.some(chosen)
        found.append(Group(chosen, *pair_of, *places[chosen[0]]))
    return found
