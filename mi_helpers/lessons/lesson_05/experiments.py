"""Induction: the gain from repeated words, the loss without some heads, the birth of heads.

    ids = repeated_tokens(model, n=16, length=24)    # random words, then the same again
    first, second = halves(model.loss(ids), 24)
    lost = share_lost(model, [induction_heads], 24)
    log = training_log()                             # {column: (checkpoints,)}

The task of indirect objects is in `ioi`, its circuit in `circuit`.
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
from mi_helpers.heads import Head
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import repeated_tokens
from mi_helpers.models import LanguageModel
from mi_helpers.paths import composition_effect

LOG = DATA / "tiny_gemma" / "training_log.csv"

# ------------------------------------------------------------------------- words written twice


def halves(losses: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The losses of `length` tokens written twice, as (first writing, second writing).

    Args:
        losses: (batch, pos - 1).

    Returns:
        (batch, length - 1) each: without the first token of either writing, which nothing predicts.

    Raises:
        ModelError: too few losses.
    """
    if losses.shape[1] < 2 * length - 1:
        raise ModelError(f"{losses.shape[1]} losses are too few for {length} tokens written twice.")
    second = losses[:, -(length - 1) :]
    first = losses[:, -(2 * length - 1) : -length]
    return first, second


@torch.no_grad()
def repetition_gain(
    model: LanguageModel, ids: Tensor, length: int, hooks: Mapping | None = None
) -> float:
    """Loss of the first writing less loss of the second, in nats per token, under `hooks`."""
    with model.hooks(hooks or {}):
        first, second = halves(model.loss(ids), length)
    return float(first.mean() - second.mean())


def share_lost(
    model: LanguageModel, sets: Sequence[Iterable[Head]], length: int, seed: int = 0
) -> np.ndarray:
    """The share of the gain from repetition that is lost without each set of heads, (sets,):

        1 - gain without the set / gain of the whole model

    The heads are mean-ablated, with other random repeated tokens as reference.
    """
    count = 8 if model.n_parameters < 1e9 else 4
    ids = repeated_tokens(model, count, length, seed)
    reference = Mean(record(model, repeated_tokens(model, 2 * count, length, seed + 10_000), "z"))
    whole = repetition_gain(model, ids, length)
    left = [repetition_gain(model, ids, length, ablate(model, s, reference)) for s in sets]
    return 1 - np.array(left) / whole


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


def step_reaching(steps: np.ndarray, values: np.ndarray, share: float = 0.5) -> float:
    """The step at which a curve has risen by `share` of the way from its first value to its
    highest, with straight lines between the checkpoints."""
    level = values[0] + share * (values.max() - values[0])
    i = int(np.argmax(values >= level))
    if i == 0:
        return float(steps[0])
    part = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


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


def plateau(
    steps: np.ndarray, values: np.ndarray, level: float, within: float
) -> tuple[float, float] | None:
    """The longest run of checkpoints with values `within` of a level: (from, to), or None."""
    best, start = None, None
    for i, near in enumerate([*(np.abs(values - level) <= within), False]):
        if near and start is None:
            start = i
        elif not near and start is not None:
            if best is None or steps[i - 1] - steps[start] > steps[best[1]] - steps[best[0]]:
                best = (start, i - 1)
            start = None
    return None if best is None else (float(steps[best[0]]), float(steps[best[1]]))
