"""What a latent is: where it fires, how strongly, what it writes, which latents are like it.

    features = collect(held, coder)            # one pass over the harvest, all latents at once
    for context in contexts(held, features, 17, model.tokenizer):
        print(context)                         # …in the [[virus]] of the…

Everything is exact and does not depend on how the rows are cut into chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.errors import checked, reading
from mi_helpers.files import RunError, load_tensors, save_tensors, write_atomically
from mi_helpers.layouts import norm_gain
from mi_helpers.models import LanguageModel, token_text
from mi_helpers.saes.activations import AGAIN, Activations, Shard
from mi_helpers.saes.progress import progress_bar
from mi_helpers.saes.scores import Firings

TOP, SAMPLE, BINS = 20, 100, 128
PER_OCTAVE = 4  # bins of a histogram per factor of 2
FILE = "features.safetensors"

# --------------------------------------------------------------------------------- firings


def fires(coder, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, latent, value) of every positive activation of x (rows, d_in), by row."""
    with torch.no_grad():
        index, value = coder.encode_sparse(x.to(coder.device))  # (rows, k) each
    row = torch.arange(len(x)).repeat_interleave(index.shape[1])
    on = value.flatten() > 0
    found = (row[on.cpu()], index.flatten()[on], value.flatten()[on].float())
    return tuple(part.cpu().numpy() for part in found)


def chunks(held: Activations, size: int = 4_096) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """(first row, source (rows, d_in), piece of each row) in order, about `size` rows at a time.

    No piece of text is cut in two. Pieces are numbered through all shards.
    """
    piece_base = 0
    for index, first in enumerate(held.first[:-1]):
        shard = held.shard(index)
        piece = shard.piece.numpy().astype(np.int64)
        n, begin = len(piece), 0
        while begin < n:
            end = min(begin + size, n)
            if end < n:  # on to the end of the piece that row end - 1 belongs to
                end = int(np.searchsorted(piece, piece[end - 1], side="right"))
            yield first + begin, shard.source[begin:end].float(), piece_base + piece[begin:end]
            begin = end
        piece_base += len(shard.document)


def firings(coder, x: Tensor) -> Firings:
    """Every firing of a coder on rows x (n, d_in): 12 bytes for each."""
    row, latent, value = fires(coder, x)
    return Firings(row, latent, value, len(x), coder.d_latent)


def check_coder(held: Activations, coder) -> None:
    """Check that a coder reads what was harvested.

    Raises:
        RunError: it reads another width.
    """
    if coder.d_in != held.d_in:
        raise RunError(
            f"The coder reads {coder.d_in} numbers, the harvest in {held.folder} has {held.d_in} "
            "per token: it is of another site or model."
        )


# -------------------------------------------------------------------------------- one pass


class Highest:
    """The n highest keys of each latent, with their rows and values.

    `key` (latents, n) goes from high to low, -inf where there are fewer; `row` (latents, n) is -1
    there. Entries are added in rising order of rows, and of equal keys the first row is kept.
    """

    def __init__(self, n_latents: int, n: int):
        self.n = n
        self.key = np.full((n_latents, n), -np.inf)
        self.row = np.full((n_latents, n), -1, np.int64)
        self.value = np.zeros((n_latents, n), np.float32)

    def add(self, latent, key, row, value, group=None) -> None:
        """Add entries (m,); of those with the same latent and `group`, only the highest counts."""
        may = key > self.key[latent, -1]
        latent, key, row, value = (each[may] for each in (latent, key, row, value))
        order = np.lexsort((row, -key, latent))
        if group is not None and len(order):
            group = group[may]
            order = np.lexsort((row, -key, group, latent))
            pair = np.stack([latent[order], group[order]])
            fresh = np.append(True, (pair[:, 1:] != pair[:, :-1]).any(0))
            order = order[fresh]
            order = order[np.lexsort((row[order], -key[order], latent[order]))]
        if not len(order):
            return
        latent, key, row, value = (each[order] for each in (latent, key, row, value))
        touched, begin, count = np.unique(latent, return_index=True, return_counts=True)
        rank = np.arange(len(latent)) - np.repeat(begin, count)
        keep = rank < self.n
        at = np.repeat(np.arange(len(touched)), count)[keep], self.n + rank[keep]
        both = {"key": -np.inf, "row": -1, "value": 0}
        for name, new in (("key", key), ("row", row), ("value", value)):
            old = getattr(self, name)
            table = np.full((len(touched), 2 * self.n), both[name], old.dtype)
            table[:, : self.n] = old[touched]
            table[at] = new[keep]
            both[name] = table
        best = np.argsort(-both["key"], axis=1, kind="stable")[:, : self.n]
        for name, table in both.items():
            getattr(self, name)[touched] = np.take_along_axis(table, best, 1)


def scramble(latent: np.ndarray, row: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each (latent, row) that looks random (splitmix64).

    The rows with the highest are a fair sample, whatever the order and the chunks they come in.
    """
    with np.errstate(over="ignore"):
        z = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += (latent.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def bin_of(value: np.ndarray) -> np.ndarray:
    """The histogram bin of positive values: four per octave from 2⁻¹⁶ to 2¹⁶, open at the ends."""
    return np.clip(np.floor(PER_OCTAVE * np.log2(value)) + BINS // 2, 0, BINS - 1).astype(np.int64)


def bin_edges() -> np.ndarray:
    """The BINS + 1 edges of the histograms."""
    return 2.0 ** ((np.arange(BINS + 1) - BINS // 2) / PER_OCTAVE)


@dataclass(frozen=True)
class Features:
    """Where and how strongly each of F latents fires, over `rows` tokens.

    Args:
        count, total: (F,), the number of tokens at which it fires, and the sum of its values.
        histogram: (F, 128), firings per bin of `bin_edges`.
        top_row, top_value: (F, 20), its highest firings, one per piece of text; row -1: no more.
        sample_row, sample_value: (F, 100), a fair sample of its firings, from high to low.
    """

    rows: int
    count: np.ndarray
    total: np.ndarray
    histogram: np.ndarray
    top_row: np.ndarray
    top_value: np.ndarray
    sample_row: np.ndarray
    sample_value: np.ndarray

    @property
    def n_latents(self) -> int:
        """The number of latents, F."""
        return len(self.count)

    @property
    def frequency(self) -> np.ndarray:
        """The share of tokens at which each latent fires, (F,)."""
        return self.count / self.rows

    @property
    def mean(self) -> np.ndarray:
        """The mean value of each latent where it fires, (F,); 0 where it never does."""
        return self.total / np.maximum(self.count, 1)

    @property
    def dead(self) -> float:
        """The share of latents that never fire."""
        return float((self.count == 0).mean())

    def check(self, latent: int) -> int:
        """The latent's number.

        Raises:
            ValueError: there is no such latent.
        """
        if not 0 <= latent < self.n_latents:
            raise ValueError(
                f"There is no latent {latent}: this coder has latents 0 to {self.n_latents - 1}."
            )
        return int(latent)

    def quantiles(self, latent: int, n: int = 10) -> list[int]:
        """Rows at n evenly spaced ranks of the latent's sampled firings, from high to low."""
        rows = self.sample_row[self.check(latent)]
        rows = rows[rows >= 0]
        if not len(rows):
            return []
        return [
            int(r) for r in rows[np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]
        ]

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        arrays = {name: torch.from_numpy(v) for name, v in vars(self).items() if name != "rows"}
        save_tensors(Path(path), arrays, {"rows": self.rows})

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing or damaged.
        """
        advice = "Run the features again."
        tensors, about = load_tensors(Path(path), advice=advice)
        checked(about, path, RunError, rows=int)
        with reading(path, RunError, advice):
            found = cls(about["rows"], **{name: t.numpy() for name, t in tensors.items()})
            (n,) = found.count.shape
            shapes = {"total": (n,), "histogram": (n, BINS), "top_row": (n, TOP)}
            shapes |= {
                "top_value": (n, TOP),
                "sample_row": (n, SAMPLE),
                "sample_value": (n, SAMPLE),
            }
            if wrong := [name for name in shapes if tensors[name].shape != shapes[name]]:
                raise ValueError(f"{wrong[0]} has the shape {tuple(tensors[wrong[0]].shape)}")
        return found


def collect(held: Activations, coder, progress: bool = False) -> Features:
    """The `Features` of a coder, in one pass over the harvest.

    Args:
        progress: whether a progress bar is shown.

    Raises:
        RunError: the coder does not fit, or a shard is damaged.
    """
    check_coder(held, coder)
    n = coder.d_latent
    count, total = np.zeros(n, np.int64), np.zeros(n)
    histogram = np.zeros((n, BINS), np.int64)
    top, sample = Highest(n, TOP), Highest(n, SAMPLE)
    with progress_bar("features", held.rows, "rows", shown=progress) as bar:
        for first, x, piece in chunks(held):
            row, latent, value = fires(coder, x)
            count += np.bincount(latent, minlength=n)
            total += np.bincount(latent, value, minlength=n)
            cell = latent.astype(np.int64) * BINS + bin_of(value)
            histogram += np.bincount(cell, minlength=n * BINS).reshape(n, BINS)
            top.add(latent, value, row + first, value, piece[row])
            sample.add(latent, scramble(latent, row + first), row + first, value)
            bar.update(len(x))
    by_value = np.argsort(np.where(sample.row < 0, np.inf, -sample.value), axis=1, kind="stable")
    return Features(
        held.rows,
        count,
        total,
        histogram.astype(np.int32),
        top.row,
        top.value,
        np.take_along_axis(sample.row, by_value, 1),
        np.take_along_axis(sample.value, by_value, 1),
    )


def token_purity(features: Features, tokens: np.ndarray, least: int = 10) -> np.ndarray:
    """The share of each latent's highest firings that are at their commonest token.

    Args:
        tokens: (rows,), the token of each row of the harvest.
        least: latents with fewer of these firings are left out.
    """
    rows = [top[top >= 0] for top in features.top_row]
    counts = [np.unique(tokens[top], return_counts=True)[1] for top in rows if len(top) >= least]
    return np.array([count.max() / count.sum() for count in counts])


# -------------------------------------------------------------------------------- contexts


@dataclass(frozen=True)
class Context:
    """A token in its text: at tokens[at], which is `row` of the harvest, the latent has `value`."""

    tokens: list[str]
    at: int
    value: float
    row: int

    def __str__(self) -> str:
        """The text with the firing token in [[double brackets]], its space outside them."""
        token = self.tokens[self.at]
        bare = token.lstrip(" ")
        marked = f"{token[: len(token) - len(bare)]}[[{bare}]]"
        return "".join([*self.tokens[: self.at], marked, *self.tokens[self.at + 1 :]])


@cache
def _words(path: Path, digest: str) -> Shard:
    """A shard's texts without its activations."""
    tensors, _ = load_tensors(path, advice=AGAIN)
    return Shard(**tensors | {"source": None, "target": None})


def words(held: Activations, index: int) -> Shard:
    """Shard `index` without its activations (source and target are None): its texts alone."""
    shard = held.manifest["shards"][index]
    return _words(held.folder / shard["file"], shard["sha256"])


def context(
    held: Activations,
    row: int,
    name: Callable[[int], str],
    value: float = float("nan"),
    around: int = 20,
) -> Context:
    """The text of a row, within its piece.

    Args:
        name: spells a token id.
        value: of the latent there.
        around: tokens on each side, at most.
    """
    index, local = held.locate(row)
    shard = words(held, index)
    ids, at = shard.text(int(shard.piece[local])).tolist(), int(shard.at[local])
    begin = max(0, at - around)
    tokens = [name(i) for i in ids[begin : at + around + 1]]
    return Context(tokens, at - begin, value, row)


def contexts(
    held: Activations,
    features: Features,
    latent: int,
    tokenizer,
    n: int = TOP,
    around: int = 20,
) -> list[Context]:
    """The latent's highest firings, one per piece of text, the highest first.

    Args:
        n: how many, at most.
        around: tokens on each side, at most.

    Raises:
        ValueError: there is no such latent.
    """
    latent = features.check(latent)
    pairs = zip(features.top_row[latent, :n], features.top_value[latent, :n], strict=True)
    return [
        context(held, int(row), partial(token_text, tokenizer), float(value), around)
        for row, value in pairs
        if row >= 0
    ]


# ------------------------------------------------------------------------- what a latent writes


def logit_effects(model: LanguageModel, directions: Tensor, gain: bool = True) -> Tensor:
    """direction · gain @ W_U, less its mean over the tokens in use: (n, d_vocab).

    What adding each direction (n, d_model) does to the logits by the direct path, but for the final
    norm's scale and the soft-cap: only differences within a row mean something.

    Args:
        gain: whether the final norm's gain is applied.

    Raises:
        ValueError: the directions are not of the stream's width.
    """
    directions = directions.to(model.device, torch.float32)
    if directions.shape[-1] != model.d_model:
        raise ValueError(
            f"The directions have {directions.shape[-1]} numbers, the stream has {model.d_model}: "
            "logit effects are those of latents that write to the stream."
        )
    if gain:
        directions = directions * norm_gain(model.ln_final).float()
    effects = (directions.to(model.dtype) @ model.W_U).float()
    return effects - effects[:, model.in_text].mean(-1, keepdim=True)


def extremes(model: LanguageModel, effects: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """[(values, token ids) of the n highest, (…) of the n lowest] of effects (…, d_vocab).

    Among the tokens that can stand in a text: <pad> would be at the end of every list.
    """
    ids = model.in_text.nonzero()[:, 0]
    within, n = effects[..., ids], min(n, len(ids))
    found = within.topk(n), within.topk(n, largest=False)
    return [(values, ids[at]) for values, at in found]


def extreme_logits(
    model: LanguageModel, coder, n: int = 10, gain: bool = True
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((ids, effects) of the n tokens that each latent raises most, … of those it lowers most).

    Each is (latents, n); see `logit_effects`.
    """
    parts = []
    with torch.no_grad():
        for rows in coder.W_dec.split(128):
            high, low = extremes(model, logit_effects(model, rows, gain), n)
            parts.append((*high, *low))
    up, up_id, down, down_id = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return (up_id, up), (down_id, down)


def nearest_latents(coder, n: int = 10) -> tuple[Tensor, Tensor]:
    """(latents, cosines) of the n latents whose decoder rows are nearest each one's, (F, n)."""
    with torch.no_grad():
        rows = torch.nn.functional.normalize(coder.W_dec.float(), dim=-1)
        parts, n = [], min(n, len(rows) - 1)
        for begin in range(0, len(rows), 1_024):
            cosines = rows[begin : begin + 1_024] @ rows.T
            own = torch.arange(len(cosines))
            cosines[own, begin + own] = -torch.inf
            parts.append(cosines.topk(n))
    return torch.cat([p.indices for p in parts]).cpu(), torch.cat([p.values for p in parts]).cpu()


def write_latents(
    path: Path,
    held: Activations,
    coder,
    features: Features,
    model: LanguageModel,
    progress: bool = False,
) -> None:
    """Write a line of JSON per latent.

    Its numbers, its contexts with the firing token in [[brackets]], firings at evenly spaced ranks,
    its nearest latents, and the tokens whose logits it raises and lowers, where it writes to the
    stream.

    Args:
        progress: whether a progress bar is shown.
    """
    near = nearest_latents(coder)
    effects = extreme_logits(model, coder) if coder.d_out == model.d_model else ()
    name = cache(model.token_text)

    def line(latent: int) -> dict:
        said = _firing_facts(features, latent, lambda row: str(context(held, row, name)))
        said["nearest"] = _rounded_pairs(near, latent)
        for key, end in zip(("raises", "lowers"), effects, strict=False):
            said[key] = [[name(i), v] for i, v in _rounded_pairs(end, latent)]
        return said

    def write(to: Path) -> None:
        what = ("contexts", features.n_latents, "latents")
        with open(to, "w", encoding="utf-8") as file, progress_bar(*what, shown=progress) as bar:
            for latent in range(features.n_latents):
                file.write(json.dumps(line(latent), ensure_ascii=False) + "\n")
                bar.update()

    write_atomically(path, write)


def _firing_facts(features: Features, latent: int, text: Callable[[int], str]) -> dict:
    """How often a latent fires, and where; `text` writes the context of a row."""
    top = zip(features.top_row[latent], features.top_value[latent], strict=True)
    return {
        "latent": latent,
        "fires": int(features.count[latent]),
        "frequency": float(features.frequency[latent]),
        "mean": round(float(features.mean[latent]), 4),
        "top": [[round(float(v), 4), text(int(r))] for r, v in top if r >= 0],
        "quantiles": [text(row) for row in features.quantiles(latent)],
    }


def _rounded_pairs(tables: tuple[Tensor, Tensor], latent: int) -> list[list]:
    """[number, value to four digits] for a latent's row of (numbers, values)."""
    numbers, values = (table[latent].tolist() for table in tables)
    return [[i, round(v, 4)] for i, v in zip(numbers, values, strict=True)]
