"""Products of which only few entries are wanted: what makes a step of a sparse coder fast.

    top_k           the k largest of x W + b in every row: found in bfloat16, exact in float32
    dots            x_b · table_i for chosen pairs (b, i)
    weighted_sums   Σ w table_i over the pairs of a group
    by_latent       pairs (row, latent) sorted by latent

A coder's code of one token names k of its many latents. The decoder's product and every gradient
touch those k alone, so they are sums over pairs, never products with a (batch, d_latent) matrix.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # rows of x at a time: (512, d_latent) scores are all that is held of the big product
EXTRA = 8  # candidates beyond k
_FLOAT32_ERROR = 1e-5  # a product further off than this, relatively, is no float32 product


@dataclass(frozen=True)
class Products:
    """How this machine multiplies large matrices fastest.

    bfloat16  the candidates of `top_k` come from a bfloat16 product
    float32   the precision setting for float32 products: "highest", or "medium" where that is
              faster and still true float32 (on AMD it means oneDNN's product instead of MKL's)
    """

    bfloat16: bool
    float32: str


@contextmanager
def float32_precision(setting: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision(setting) inside, and what it was before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quickest(device: torch.device, d_in: int, d_latent: int) -> Products:
    """The `Products` for x (512, d_in) times W (d_in, d_latent), measured once per process.

    The choice changes the time, never the result: `top_k` is exact either way.
    """
    return _measured(torch.device(device), d_in, min(d_latent, 8192), torch.get_num_threads())


@lru_cache
@torch.no_grad()
def _measured(device: torch.device, d_in: int, d_latent: int, threads: int) -> Products:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHUNK, d_in, generator=generator).to(device)
    W = torch.randn(d_latent, d_in, generator=generator).to(device)
    x_low, W_low = x.bfloat16(), W.bfloat16()

    def seconds(x: Tensor, W: Tensor) -> tuple[float, Tensor]:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            y = x @ W.T
            y[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        return min(times), y

    with float32_precision("highest"):
        plain, exact = seconds(x, W)
    setting, best = "highest", plain
    if device.type == "cpu":  # elsewhere "medium" is a less precise product
        with float32_precision("medium"):
            medium, y = seconds(x, W)
        error = (y - exact).abs().max() / exact.abs().max()
        if medium < plain and error < _FLOAT32_ERROR:
            setting, best = "medium", medium
    return Products(bfloat16=seconds(x_low, W_low)[0] < best, float32=setting)


# ------------------------------------------------------------------------------ sums over pairs

_FAST = {"cpu": {"embedding_bag", "dots", "radix"}, "cuda": {"embedding_bag"}}


def _has(kernel: str, device: torch.device) -> bool:
    """Whether a kernel is there and quick on this kind of device; else plain indexing is used."""
    return kernel in _FAST.get(device.type, ())


def weighted_sums(
    table: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Row g is the sum of weight · table[index] over the pairs of group g, (groups, d).

    Args:
        table: (n, d).
        indices, weights: (groups, k); or (pairs,), where `offsets` (groups + 1,) says that group g
            has the pairs from offsets[g] to offsets[g + 1].
    """
    if not _has("embedding_bag", table.device):
        return _weighted_sums_plain(table, indices, weights, offsets)
    last = offsets is not None
    return F.embedding_bag(
        indices, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=last
    )


def _weighted_sums_plain(table, indices, weights, offsets=None) -> Tensor:
    """`weighted_sums` of nothing but indexing and `index_add_`, a slice of the pairs at a time."""
    if offsets is None:
        groups = torch.arange(len(indices), device=table.device)
        groups = groups.repeat_interleave(indices.shape[1])
        n_groups = len(indices)
    else:
        n_groups = len(offsets) - 1
        groups = torch.arange(n_groups, device=table.device).repeat_interleave(offsets.diff())
    sums = table.new_zeros(n_groups, table.shape[1])
    slices = (t.split(CHUNK * 32) for t in (groups, indices.flatten(), weights.flatten()))
    for group, index, weight in zip(*slices, strict=True):
        sums.index_add_(0, group, table[index] * weight[:, None])
    return sums


def dots(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """x_b · table[indices_bj], float32, shaped like the indices (batch, k)."""
    if not _has("dots", table.device):
        return _dots_plain(x, table, indices)
    flat, k = indices.flatten(), indices.shape[1]
    row = torch.arange(len(indices))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, table, flat, row * k, row.repeat_interleave(k), 0
    ).view_as(indices)


def _dots_plain(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """`dots` of nothing but indexing and sums, `CHUNK` rows at a time."""
    parts = zip(x.split(CHUNK), indices.split(CHUNK), strict=True)
    return torch.cat([(table[index] * part[:, None]).sum(-1) for part, index in parts])


def by_latent(latents: Tensor, d_latent: int) -> tuple[Tensor, Tensor]:
    """The order that sorts the pairs of `latents` (batch, k) by latent, and where each one begins.

    Returns:
        order (batch · k,): positions in `latents.flatten()`, by latent and then by row.
        offsets (d_latent + 1,): latent f has order[offsets[f] : offsets[f + 1]].
    """
    flat = latents.flatten()
    counts = torch.bincount(flat, minlength=d_latent)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    if not _has("radix", flat.device):
        return torch.sort(flat, stable=True).indices, offsets
    number = flat.numpy()
    order = np.argsort(number.astype(np.uint16), kind="stable")  # 16 bits: NumPy sorts by radix
    if d_latent > 1 << 16:
        order = order[np.argsort((number >> 16).astype(np.uint16)[order], kind="stable")]
    return torch.from_numpy(order), offsets


# -------------------------------------------------------------------------------- the k largest


@torch.no_grad()
def top_k(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    k: int,
    products: Products | None = None,
    rows_low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of x @ rows.T + bias in every row, exact in float32, the largest first.

    k + 8 candidates are taken from a product that may be imprecise, and scored anew in float32. If
    s is the lowest imprecise score of a candidate, and v the k-th exact one, then a latent that is
    no candidate could belong to the top k only if its error were larger than v - s. A row where
    that is less than the largest error seen in the whole batch is done again with a float32 product.

    Args:
        x: (batch, d_in), float32.
        rows: (d_latent, d_in), float32: W_enc transposed.
        bias: (d_latent,).
        products: how to multiply; None means `quickest`.
        rows_low: `rows` in bfloat16, for one who has them already.

    Returns:
        indices (batch, k), int64; values (batch, k), float32.
    """
    products = products or quickest(x.device, rows.shape[1], rows.shape[0])
    n = min(k + EXTRA, len(rows))
    with float32_precision(products.float32):
        if products.bfloat16:
            rows_low = rows.bfloat16() if rows_low is None else rows_low
            low, candidates = _candidates(x, rows_low, bias, n)
        else:
            low, candidates = _candidates(x, rows, bias, n)
        exact = dots(x, rows, candidates) + bias[candidates]
        values, place = exact.topk(k)
        indices = candidates.gather(1, place)
        if products.bfloat16 and n < len(rows):
            error = (exact - low).abs().max()
            doubtful = values[:, -1] - low.min(1).values < error
            if doubtful.any():
                again = Products(bfloat16=False, float32=products.float32)
                indices[doubtful], values[doubtful] = top_k(x[doubtful], rows, bias, k, again)
    return indices, values


def _candidates(x: Tensor, rows: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of x @ rows.T + bias, in the precision of `rows`: scores and indices."""
    low = x.new_empty(len(x), n)
    indices = torch.empty(len(x), n, dtype=torch.int64, device=x.device)
    scores = x.new_empty(min(CHUNK, len(x)), len(rows), dtype=rows.dtype)
    bias = bias.to(rows.dtype)
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK].to(rows.dtype)
        out = torch.addmm(bias, part, rows.T, out=scores[: len(part)])
        top, index = out.topk(n, sorted=False)
        low[start : start + CHUNK] = top
        indices[start : start + CHUNK] = index
    return low, indices
