"""Products of which only a few entries are needed: what makes a step of a sparse coder fast.

    TopK            the k largest of x W + b in every row: found in 8 or 16 bits, then in float32
    dots            x_b · table_i for chosen pairs (b, i)
    weighted_sums   Σ w table_i over the pairs of a group
    by_latent       pairs (row, latent) sorted by latent

A coder's code of one token names k of its many latents. The decoder's product and every gradient
involve only those k, so they are sums over pairs, never products with a (batch, d_latent) matrix.
All of x W is needed only to find the k, and for that a rough product is enough: what it finds is
scored again in float32.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # rows of x at a time: (256, d_latent) scores are all that is held of the big product
EXTRA = {"int8": 16, "bfloat16": 8, "float32": 8}  # candidates beyond k
DOUBTFUL = 0.1  # share of rows to do again, above which a kind of product is given up
_FLOAT32_ERROR = 1e-5  # a product further off than this, relatively, is no float32 product
_CACHE = 1 << 25  # bytes: a table below this stays in the processor's cache
_TINY = 1e-30


@dataclass(frozen=True)
class Products:
    """How this machine multiplies large matrices fastest.

    Args:
        kinds: what `TopK` selects with, the quickest first, of "int8", "bfloat16" and "float32".
        float32: the precision setting for float32 products: "highest", or "medium" where that is
            faster and still true float32 (on AMD it means oneDNN's product instead of MKL's).
    """

    kinds: tuple[str, ...]
    float32: str


@contextmanager
def float32_precision(setting: str) -> Iterator[None]:
    """Inside, torch.set_float32_matmul_precision(setting); afterwards, what it was before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """These kinds of products.

    Raises:
        ValueError: there is none, or one that is not known.
    """
    if not isinstance(kinds, list | tuple) or not kinds or any(k not in [*EXTRA] for k in kinds):
        raise ValueError(f"the products are {kinds!r}, and some of {', '.join(EXTRA)} are expected")
    return tuple(kinds)


@lru_cache
@torch.no_grad()
def quickest(device: torch.device) -> Products:
    """The `Products` that are fastest on a device by its processor's flags: the same each time.

    The choice changes the last bits of float32 products, so it does not depend on a stopwatch. A
    product that is not exact on whole numbers, as some processors' are, is left out.
    """
    if device.type == "cuda":
        return Products(("bfloat16", "float32"), "highest")
    if device.type != "cpu":
        return Products(("float32",), "highest")
    has = _capabilities()
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randint(-127, 128, (2, CHUNK, 64), generator=generator)
    kinds, setting = [], "highest"
    if has.get("avx512_vnni") and hasattr(torch, "_int_mm"):
        found = torch._int_mm(x.to(torch.int8), rows.to(torch.int8).T)
        kinds += ["int8"] * bool((found == x @ rows.T).all())
    if has.get("avx512_bf16") or has.get("amx_bf16"):
        kinds.append("bfloat16")
    if "AMD" in has.get("cpu_name", ""):  # oneDNN's float32 product is faster there than MKL's
        x, rows = torch.rand(2, CHUNK, 64, generator=generator)
        with float32_precision("medium"):
            found = x @ rows.T
        setting = (
            "medium" if _off(found, x.double() @ rows.double().T) < _FLOAT32_ERROR else setting
        )
    return Products((*kinds, "float32"), setting)


def _off(found: Tensor, exact: Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((found - exact).abs().max() / exact.abs().max())


# ------------------------------------------------------------------------------ sums over pairs

_FAST = {"cpu": {"embedding_bag", "sampled product", "radix"}, "cuda": {"embedding_bag"}}


def _has(kernel: str, device: torch.device) -> bool:
    """Whether a kernel exists and is fast on this kind of device; if not, indexing is used."""
    return kernel in _FAST.get(device.type, ())


def weighted_sums(
    table: Tensor, indices: Tensor, weights: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """The sum of weight · table[index] over the pairs of each group, (groups, d).

    Args:
        table: (n, d).
        indices, weights: (groups, k); or (pairs,), with `offsets`.
        offsets: (groups + 1,); group g has the pairs from offsets[g] to offsets[g + 1].
    """
    if not _has("embedding_bag", table.device):
        return _weighted_sums_plain(table, indices, weights, offsets)
    last = offsets is not None
    return F.embedding_bag(
        indices, table, offsets, per_sample_weights=weights, mode="sum", include_last_offset=last
    )


def _weighted_sums_plain(table, indices, weights, offsets=None) -> Tensor:
    """`weighted_sums` by indexing and `index_add_` alone, a slice of the pairs at a time."""
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
    if not _has("sampled product", table.device):
        return _dots_plain(x, table, indices)
    batch, k = indices.shape
    if table.nbytes < _CACHE or len(table) < batch:
        begin = torch.arange(0, batch * k + 1, k)
        return _sampled(x, table, begin, indices.flatten()).view(batch, k)
    order, offsets = by_latent(indices, len(table))  # read the larger one of the two in order
    values = torch.empty(batch * k)
    values[order] = _sampled(table, x, offsets, order // k)
    return values.view(batch, k)


def _sampled(left: Tensor, right: Tensor, begin: Tensor, columns: Tensor) -> Tensor:
    """left_i · right_j for the pairs (i, j): row i has columns[begin[i] : begin[i + 1]]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        zeros, shape = left.new_zeros(len(columns)), (len(left), len(right))
        where = torch.sparse_csr_tensor(begin, columns, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(where, left, right.T, beta=0.0).values()


def _dots_plain(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """`dots` by indexing and sums alone, `CHUNK` rows at a time."""
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


class TopK:
    """The k largest of x @ rows.T + bias in every row of x, in float32, the largest first.

    A rough product scores every latent. Its k + 8 (or 16) best are the candidates, which are scored
    again in float32. The values are always those of float32; the set is exactly that of float32 if
    every latent left out has a rough error of at most the largest that any candidate of the batch
    has. No row of real activations that was measured broke that; rows can be contrived that do,
    with large errors at latents whose rough scores are low. `Products(("float32",), …)` selects
    with float32 alone, and is exact for any input.

    In detail: let s be the lowest rough score of a candidate and v the k-th exact score: a
    latent that is no candidate belongs to the top k only if its rough error is larger than v - s. A
    row where v - s is less than the largest error of any candidate in the batch (errors in units of
    ‖x_b‖) is done again with a float32 product.

    Rough means bfloat16, or 8-bit integers times a scale for each row of x and of `rows`. A kind
    that leaves many rows doubtful in three batches running is replaced by the next fastest.

    Args:
        rows: (d_latent, d_in), float32: W_enc transposed. A rough copy is kept, and made again
            where they have changed; calling `refresh` after changing some is faster.
        products: how to multiply; None means `quickest`.
    """

    def __init__(self, rows: Tensor, products: Products | None = None):
        self.rows = rows
        self.products = products or quickest(rows.device)
        self.kinds = list(self.products.kinds)
        self.doubtful = 0
        self._copy()

    def _copy(self) -> None:
        """Make the rough copy."""
        self.rough = self.scale = None
        if self.kinds[0] == "bfloat16":
            self.rough = torch.empty_like(self.rows, dtype=torch.bfloat16)
        elif self.kinds[0] == "int8":
            self.rough = torch.empty_like(self.rows, dtype=torch.int8)
            self.scale = self.rows.new_empty(len(self.rows))
        for first in range(0, len(self.rows), 512):
            self.refresh(slice(first, first + 512))

    def go_on(self, kinds: list[str], doubtful: int) -> None:
        """Go on as another was: the kinds that it had left, its doubtful batches running."""
        self.kinds, self.doubtful = list(checked_kinds(kinds)), doubtful
        self._copy()

    @torch.no_grad()
    def refresh(self, part: slice) -> None:
        """Copy these rows again, after they have changed."""
        if self.scale is not None:
            self.rough[part], self.scale[part] = _in_8_bits(self.rows[part])
        elif self.rough is not None:
            self.rough[part] = self.rows[part]
        self._version = self.rows._version

    @torch.no_grad()
    def __call__(self, x: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Indices and values, both (batch, k), for x (batch, d_in) and bias (d_latent,)."""
        if self._version != self.rows._version:
            self._copy()
        n = min(k + EXTRA[self.kinds[0]], len(self.rows))
        with float32_precision(self.products.float32):
            rough, candidates = self._candidates(x, bias, n)
            exact = dots(x, self.rows, candidates) + bias[candidates]
            place = _largest_first(exact, k)
            values, indices = exact.gather(1, place), candidates.gather(1, place)
            if self.rough is None or n == len(self.rows):
                return indices, values
            norm = x.norm(dim=1).clamp(min=_TINY)
            error = ((exact - rough).abs().amax(1) / norm).max()
            doubtful = values[:, -1] - rough.amin(1) < error * norm
            if doubtful.any():
                plain = TopK(self.rows, Products(("float32",), self.products.float32))
                indices[doubtful], values[doubtful] = plain(x[doubtful], bias, k)
            self._judge(doubtful.float().mean().item())
        return indices, values

    def _judge(self, share: float) -> None:
        """Replace a kind that left many rows doubtful three times running."""
        self.doubtful = self.doubtful + 1 if share > DOUBTFUL else 0
        if self.doubtful == 3:
            self.kinds = self.kinds[1:] or ["float32"]
            self.doubtful = 0
            self._copy()

    def _candidates(self, x: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The scores and the indices of the n best by the rough product, both (batch, n)."""
        chunk = min(CHUNK, len(x))
        dtype = torch.bfloat16 if self.kinds[0] == "bfloat16" else torch.float32
        scores = x.new_empty(chunk, len(self.rows), dtype=dtype)
        whole = torch.empty_like(scores, dtype=torch.int32) if self.kinds[0] == "int8" else None
        found = []
        for part in x.split(chunk):
            out = scores[: len(part)]
            if whole is not None:
                in_8_bits, scale = _in_8_bits(part)
                torch._int_mm(in_8_bits, self.rough.T, out=whole[: len(part)])
                out.copy_(whole[: len(part)]).mul_(scale[:, None])
                torch.addcmul(bias, out, self.scale, out=out)
            else:
                rows = self.rows if self.rough is None else self.rough
                torch.addmm(bias.to(dtype), part.to(dtype), rows.T, out=out)
            found.append(largest(out, n))
        best, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return best.float(), indices


def top_k(
    x: Tensor, rows: Tensor, bias: Tensor, k: int, products: Products | None = None
) -> tuple[Tensor, Tensor]:
    """`TopK(rows, products)(x, bias, k)`: indices and values (batch, k)."""
    return TopK(rows, products)(x, bias, k)


def _in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127, and a scale for each row: x ≈ integers · scale[:, None]."""
    scale = x.abs().amax(1).clamp(min=_TINY) / 127
    return (x * scale.reciprocal()[:, None]).round_().to(torch.int8), scale


def largest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row, in no order: values and indices, both (batch, n).

    In the row folded to (blocks, columns), they lie in the n columns with the largest maxima: the
    search is first among the maxima, then among the numbers in those columns.
    """
    batch, length = scores.shape
    blocks = 16 if length >= 8192 else 8 if length >= 2048 else 4
    columns = length // blocks
    if length % blocks or columns < 2 * n:
        return scores.topk(n, dim=1, sorted=False)
    folded = scores.view(batch, blocks, columns)
    column = _places(folded.amax(1), n)  # (batch, n)
    place = column[:, None] + columns * torch.arange(blocks, device=scores.device)[:, None]
    place = place.flatten(1)  # (batch, blocks · n)
    values = scores.gather(1, place)
    index = _places(values, n)
    return values.gather(1, index), place.gather(1, index)


def _places(scores: Tensor, n: int) -> Tensor:
    """Where the n largest of each row (batch, m) are, in no order, (batch, n); NaN is largest."""
    if not _numpy_selects(scores):
        return scores.topk(n, dim=1, sorted=False).indices
    last = scores.shape[1] - n
    return torch.from_numpy(np.argpartition(scores.numpy(), last, axis=1)[:, last:])


def _largest_first(scores: Tensor, k: int) -> Tensor:
    """The same in order, the largest first, (batch, k)."""
    if not _numpy_selects(scores):
        return scores.topk(k).indices
    return torch.from_numpy(np.argsort(scores.numpy(), axis=1)[:, -k:]).flip(1)


def _numpy_selects(scores: Tensor) -> bool:
    """Whether NumPy selects faster than torch: with AVX-512 its one thread is as fast as three or
    four of torch's. Both select the same numbers, but for which of several equal ones."""
    return (
        scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and torch.get_num_threads() <= 4
        and _has_avx512()
    )


def _capabilities() -> dict:
    """What the processor can do, by name; {} where torch does not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


@lru_cache
def _has_avx512() -> bool:
    return bool(_capabilities().get("avx512_bw"))
