"""Sparse coding of natural images, after Olshausen and Field 1996.

    x = patches([whiten(each) for each in photographs()], n=20_000)     # (n, pixels)
    filters = learn(x, n_filters=144)                                   # (144, pixels)
    codes = sparse_codes(x[:100], filters)                              # (100, 144), mostly 0

A patch is written as a sum of few filters: x = a Φ + rest. `spread` measures how much of the patch
a filter covers, and `orientation` how strongly it prefers one orientation. The controls are
`principal_components`, and Gaussian patches (`saes.similarity.gaussian_like`), which have the
photographs' pairwise statistics and nothing else.

Source: Olshausen and Field, "Emergence of simple-cell receptive field properties by learning a
sparse code for natural images", Nature 381 (1996).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from mi_helpers.lessons.shared import on_one_core

SIZE = 12  # a patch has SIZE × SIZE pixels: as many numbers as tiny-gemma's stream has
CUTOFF = 0.4  # cycles per pixel: 200 per picture of 512 pixels, as in 1996
PENALTY = 0.5  # λ, for patches whose pixels have a variance of 1
LOCAL, ORIENTED = 0.7, 0.5  # what counts as localised (spread below) and as oriented (above)

# ------------------------------------------------------------------------------- the patches


def photographs() -> list[np.ndarray]:
    """scikit-learn's two sample photographs in grey: (427, 640) each, 0 to 255."""
    return [image.astype(float).mean(-1) for image in load_sample_images().images]


def whiten(image: np.ndarray, cutoff: float = CUTOFF) -> np.ndarray:
    """The image through the filter R(f) = f exp(-(f / f_0)⁴), scaled to variance 1.

    The amplitude of natural images falls with 1/f: the factor f makes the spectrum flat, and the
    other factor removes the highest frequencies, which are mostly noise.

    Args:
        cutoff: f_0, in cycles per pixel.
    """
    vertical, horizontal = (np.fft.fftfreq(n) for n in image.shape)
    f = np.hypot(vertical[:, None], horizontal[None])
    white = np.fft.ifft2(np.fft.fft2(image) * f * np.exp(-((f / cutoff) ** 4))).real
    return white / white.std()


def patches(images: Sequence[np.ndarray], n: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """n square patches (n, size²) from random places, equally many of each image, in random order.

    Raises:
        ValueError: an image is smaller than a patch.
    """
    rng, found = np.random.default_rng(seed), []
    for index, image in enumerate(images):
        if min(image.shape) < size:
            raise ValueError(
                f"Image {index} has {image.shape[0]} × {image.shape[1]} pixels, a patch {size} × "
                f"{size}: choose smaller patches."
            )
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size))
        share = n // len(images) + (index < n % len(images))
        at = [rng.integers(0, extent, share) for extent in windows.shape[:2]]
        found.append(windows[*at].reshape(share, -1))
    x = np.concatenate(found)[rng.permutation(n)]
    return torch.tensor(x, dtype=torch.float32)


# ---------------------------------------------------------------------------- the sparse code


def sparse_codes(x: Tensor, filters: Tensor, penalty: float = PENALTY, steps: int = 30) -> Tensor:
    """The codes a (n, filters) that minimise ½ ‖x - a Φ‖² + λ Σ |a|, for patches x (n, pixels).

    Steps of gradient descent on the first term, each followed by a shrinkage towards zero by
    λ / L, with momentum. L is the largest eigenvalue of Φ Φᵀ.

    Args:
        penalty: λ.

    Source: Beck and Teboulle 2009 (FISTA).
    """
    gram, target = filters @ filters.T, x @ filters.T
    lipschitz = torch.linalg.eigvalsh(gram)[-1]
    a = ahead = torch.zeros_like(target)
    t = 1.0
    for _ in range(steps):
        moved = ahead - (ahead @ gram - target) / lipschitz
        new = torch.nn.functional.softshrink(moved, float(penalty / lipschitz))
        t, before = (1 + (1 + 4 * t * t) ** 0.5) / 2, t
        ahead = new + (before - 1) / t * (new - a)
        a = new
    return a


@on_one_core
def learn(
    x: Tensor,
    n_filters: int = SIZE * SIZE,
    penalty: float = PENALTY,
    steps: int = 200,
    batch: int = 500,
    seed: int = 0,
) -> Tensor:
    """Filters Φ (n_filters, pixels), rows of unit norm, by which the patches x have sparse codes.

    Each step finds the codes of a batch for the present filters, moves the filters towards what the
    codes leave unexplained, and sets their norms to 1 again. A filter's step is divided by how much
    it is used (the running mean of its squared code), so that all learn equally fast.

    Args:
        penalty: λ of `sparse_codes`.
        batch: patches per step.
    """
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(n_filters, x.shape[1], generator=generator)
    filters /= filters.norm(dim=1, keepdim=True)
    use = torch.ones(n_filters)
    for step in range(steps):
        rows = x[torch.randint(len(x), (batch,), generator=generator)]
        a = sparse_codes(rows, filters, penalty)
        use.lerp_(a.pow(2).mean(0), 1.0 if step == 0 else 0.1)
        change = a.T @ (rows - a @ filters) / batch
        rate = 1.0 if step < steps // 2 else 2 * (1 - step / steps)
        filters = filters + rate * change / (use[:, None] + 1e-3)
        filters /= filters.norm(dim=1, keepdim=True)
    return filters


def principal_components(x: Tensor, n: int | None = None) -> Tensor:
    """The n directions of largest variance of x (rows, pixels), of unit norm, the largest first."""
    _, vectors = torch.linalg.eigh(torch.cov(x.T))
    return vectors.flip(1).T[:n]


# -------------------------------------------------------------------------- what filters are like


def as_squares(filters: Tensor) -> np.ndarray:
    """Filters (n, size²) as (n, size, size).

    Raises:
        ValueError: their pixels are no square.
    """
    filters = np.asarray(filters.detach() if hasattr(filters, "detach") else filters, dtype=float)
    size = round(filters.shape[-1] ** 0.5)
    if size * size != filters.shape[-1]:
        raise ValueError(f"A filter of {filters.shape[-1]} numbers is no square patch.")
    return filters.reshape(-1, size, size)


def spread(filters: Tensor) -> np.ndarray:
    """How much of the patch each filter covers, (n,): 0 for one pixel, 1 for all of them alike.

    The root mean square distance of its squared weights from their centre, divided by that of equal
    weights.
    """
    squares = as_squares(filters)
    size = squares.shape[-1]
    weight = squares**2 / (squares**2).sum((1, 2), keepdims=True)
    place = np.arange(size)
    variance = 0.0
    for axis in (1, 2):
        along = weight.sum(axis)  # (n, size)
        mean = along @ place
        variance = variance + along @ place**2 - mean**2
    return np.sqrt(np.maximum(variance, 0) / ((size**2 - 1) / 6))


def orientation(filters: Tensor) -> np.ndarray:
    """|Σ P(f, θ) e^{2iθ}| / Σ P(f, θ) of each filter, (n,): 0 for no orientation, 1 for one alone.

    P is the power at the frequency f in the direction θ. It is the resultant length of circular
    statistics, for directions that are the same after half a turn.
    """
    squares = as_squares(filters)
    size = 4 * squares.shape[-1]  # a finer grid of frequencies
    power = np.abs(np.fft.fft2(squares, (size, size))) ** 2
    f = np.fft.fftfreq(size)
    vertical, horizontal = np.meshgrid(f, f, indexing="ij")
    angle = np.arctan2(vertical, horizontal)
    inside = (np.hypot(vertical, horizontal) > 0) & (np.hypot(vertical, horizontal) < 0.5)
    power = power * inside  # the corners of the square would favour the diagonals
    return np.abs((power * np.exp(2j * angle)).sum((1, 2))) / power.sum((1, 2))


def localised_and_oriented(filters: Tensor) -> float:
    """The share of filters whose spread is below LOCAL and whose orientation is above ORIENTED."""
    return float(((spread(filters) < LOCAL) & (orientation(filters) > ORIENTED)).mean())
