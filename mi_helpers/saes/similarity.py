"""How alike two dictionaries are: their decoder rows matched one to one, and the control of chance.

twins = one.W_dec.detach(), other.W_dec.detach()
share_found(*twins)                                   # share of latents found again
share_found(random_like(twins[0]), twins[1])          # the same of random directions
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SAME = 0.7  # cosine above which two latents count as the same


def matched_cosines(rows: Tensor, others: Tensor) -> np.ndarray:
    """Cosines of the best one-to-one matching of rows (n, d) with other rows (m, d), m ≥ n: (n,).

    The matching is the one with the largest sum of cosines (the Hungarian algorithm).

    Source: Paulo and Belrose 2025, "Sparse Autoencoders Trained on the Same Data Learn Different
    Features".
    """
    cosines = (F.normalize(rows, dim=1) @ F.normalize(others, dim=1).T).numpy()
    row, column = linear_sum_assignment(-cosines)
    return cosines[row, column]


def share_found(rows: Tensor, others: Tensor, same: float = SAME) -> float:
    """The share of rows (n, d) whose match among others (m, d) has a cosine above `same`."""
    return float((matched_cosines(rows, others) > same).mean())


def random_like(rows: Tensor, seed: int = 0) -> Tensor:
    """n random directions (n, d) with the mean and covariance of rows (n, d), of unit norm.

    The control of `share_found`: it has the directions that all rows prefer, and nothing else.
    """
    return F.normalize(gaussian_like(rows, seed), dim=1)


def gaussian_like(x: Tensor, seed: int = 0) -> Tensor:
    """Gaussian rows with the mean and covariance of x (n, d): a control with nothing sparse."""
    generator = torch.Generator().manual_seed(seed)
    centre = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    root = vectors * values.clamp(min=0).sqrt()  # root @ root.T is the covariance
    return centre + torch.randn(x.shape, generator=generator) @ root.T
