"""Induction: words that come again, the loss without some heads, the birth of heads.

    ids = mixed_repeats(model, n=16)                 # random words, again after 10 to 24
    lost = share_lost(model, [induction_heads])
    log = training_log()                             # {column: (checkpoints,)}

The task of who receives is in `ioi`, its circuit in `circuit`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.ablation import Mean, ablate, record
from mi_helpers.files import DATA
from mi_helpers.heads import Head, by_distance, head_name, targets
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import repeated_tokens
from mi_helpers.models import LanguageModel
from mi_helpers.paths import composition_effect

LOG = DATA / "tiny_gemma" / "training_log.csv"
PERIODS = range(10, 25)  # after how many words a text begins again

# ------------------------------------------------------------------------- words that come again


def mixed_repeats(model: LanguageModel, n: int = 15, length: int = 48, seed: int = 0) -> Tensor:
    """n rows of random words, each repeated after a number of words of its own.

    A head that always looks the same distance back finds its target in one row, not in all.

    Returns:
        ids (n, 1 + length), after BOS; the periods go through `PERIODS`.
    """
    rows = []
    for i in range(n):
        period = PERIODS[i % len(PERIODS)]
        times = -(-length // period)
        row = repeated_tokens(model, 1, period, seed * n + i, times)
        rows.append(row[:, : row.shape[1] - period * times + length])
    return torch.cat(rows)


def again(ids: Tensor) -> Tensor:
    """Which tokens an induction head can foretell, (n, pos - 1): that it has an earlier target, and
    that what stands there is what comes next."""
    found = targets(ids)["induction"][:, :-1]  # (n, pos - 1, pos)
    comes = ids[:, 1:, None] == ids[:, None, :]
    return (found & comes).any(-1)


@torch.no_grad()
def gain(model: LanguageModel, ids: Tensor, hooks: dict | None = None) -> float:
    """Loss of the tokens that are new less loss of those that come again, under `hooks`."""
    with model.hooks(hooks or {}):
        losses, old = model.loss(ids), again(ids)
    return float(losses[~old].mean() - losses[old].mean())


def share_lost(
    model: LanguageModel, sets: Sequence[Iterable[Head]], seed: int = 0, n: int = 8
) -> np.ndarray:
    """The share of the gain from repetition that is lost without each set of heads, (sets,):

        1 - gain without the set / gain of the whole model

    The heads are mean-ablated, position by position, over texts of other words.
    """
    ids = mixed_repeats(model, n, seed=seed)
    reference = Mean(record(model, mixed_repeats(model, 2 * n, seed=seed + 1_000), "z"))
    whole = gain(model, ids)
    return np.array([1 - gain(model, ids, ablate(model, s, reference)) / whole for s in sets])


def induction_pair(
    model: LanguageModel, n: int = 16, length: int = 12, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts whose next token only an induction head predicts, and prompts where none can.

    Returns:
        clean (n, pos): tokens, then the same without the last; corrupted (n, pos): the same, with
        other tokens in the first writing; answer (n,): the token that follows in clean.
    """
    ids = repeated_tokens(model, n, length, seed)
    other = ids.clone()
    other[:, -2 * length : -length] = repeated_tokens(model, n, length, seed + 1)[:, -length:]
    return ids[:, :-1], other[:, :-1], ids[:, -1]


def induction_paths(
    model: LanguageModel, readers: Sequence[Head], site: str = "k", seed: int = 0, n: int = 16
) -> Tensor:
    """`paths.composition_effect` on `induction_pair`, (n_layers, n_heads)."""
    return composition_effect(model, readers, induction_pair(model, n, seed=seed), site)


@torch.no_grad()
def how_far_back(model: LanguageModel, ids: Tensor, some: Sequence[Head]) -> str:
    """A line for each head: the distance back at which it looks most, on average over a text."""
    _, cache = model.run_with_cache(ids, "pattern", model.n_layers)
    distance, lines = by_distance(cache["pattern"]), []  # (n_layers, n_heads, distance)
    for head in some:
        far, share = int(distance[head].argmax()), float(distance[head].max())
        lines.append(f"{head_name(head)} looks {far} back, with {share:.2f} of its attention")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- when heads form


def training_log(path: str | Path = LOG) -> dict[str, np.ndarray]:
    """{column: (checkpoints,)} of the log that training wrote, with "step" among the columns.

    Raises:
        ModelError: the file is not there, or is not such a log.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no {path.name} in {path.parent.name}: `make model` writes one.")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if len(rows) < 3 or "step" not in rows[0]:
        raise ModelError(f"{path.name} needs a column 'step' and three checkpoints or more.")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def steepest(steps: np.ndarray, values: np.ndarray, width: float) -> tuple[float, float, float]:
    """The window of `width` steps in which a curve rises most.

    Returns:
        (from, to, the window's share of the whole rise from the first value to the highest).

    Raises:
        ModelError: the curve does not rise, or the window is wider than the curve.
    """
    rise = values.max() - values[0]
    if rise <= 0 or not 0 < width <= steps[-1] - steps[0]:
        raise ModelError("A window needs a curve that rises, and a width within its steps.")
    # a best window begins or ends at a checkpoint, as the curve is straight between them
    starts = np.unique(np.clip([*steps, *(steps - width)], steps[0], steps[-1] - width))
    gains = np.interp(starts + width, steps, values) - np.interp(starts, steps, values)
    best = int(gains.argmax())
    return float(starts[best]), float(starts[best] + width), float(gains[best] / rise)


def when_it_begins(log: Mapping[str, np.ndarray], window: tuple[float, float, float]) -> str:
    """Two lines on `steepest`'s window: its share of the rise, and what was there as it began."""
    begin, end, share = window
    there = [
        f"{name.replace('_', ' ')} {np.interp(begin, log['step'], log[name]):.2f}"
        for name in ("previous_token_head", "repetition")
    ]
    steps = f"{end - begin:.0f} of {log['step'][-1]:.0f} steps"
    return f"shaded: {steps}, {share:.0%} of the rise\nwhen it begins: {', '.join(there)}"
