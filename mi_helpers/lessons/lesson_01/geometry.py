"""The geometry of feature directions: how they share dimensions, and the shapes that they form.

W (..., n_features, n_hidden) are the weights of a toy model: row W_i is feature i's direction, and
Ŵ_i that direction at length 1.

Source: Elhage et al. 2022, Toy Models of Superposition, "The Geometry of Superposition".
"""

import math

import torch
from torch import Tensor

from mi_helpers.lessons.shared import on_one_core

REPRESENTED = 0.5  # a feature counts as represented when ‖W_i‖ exceeds this

# -- measures --------------------------------------------------------------------------------


def unit(W: Tensor) -> Tensor:
    """The rows of W (…, n_features, n_hidden) at length 1; rows of zeros stay."""
    return W / W.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def overlaps(W: Tensor) -> Tensor:
    """Ŵ_i · W_j (…, n_features, n_features): what feature j leaves on the read-out of feature i."""
    return unit(W) @ W.mT


def dimensionality(W: Tensor) -> Tensor:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²  (…, n_features): the share of a dimension that i has.

    1 is a dimension of its own, 1/2 one shared with an opposite feature, 0 none.
    """
    return W.square().sum(-1) / overlaps(W).square().sum(-1).clamp(min=1e-12)


def represented(W: Tensor) -> Tensor:
    """Whether ‖W_i‖ > 0.5  (…, n_features)."""
    return W.norm(dim=-1) > REPRESENTED


def dimensions_per_feature(W: Tensor) -> Tensor:
    """D* = m / ‖W‖²_F  (…): hidden dimensions per represented feature (these have ‖W_i‖ ≈ 1)."""
    return W.shape[-1] / W.square().sum((-2, -1))


def favourite_share(W: Tensor, hidden: str = "relu") -> Tensor:
    """max_i r² / Σ_i r²: how much of each hidden neuron's response one feature has, (…, n_hidden).

    r is the neuron's response to feature i alone, at 1: ReLU(W_ik), or |W_ik| where the hidden
    layer is linear. A neuron at 1 is monosemantic, one that responds to several features is far
    below, one that responds to nothing is at 0.
    """
    response = W.clamp(min=0) if hidden == "relu" else W.abs()
    squares = response.square()
    return squares.amax(-2) / squares.sum(-2).clamp(min=1e-12)


# -- interference between random directions --------------------------------------------------


def random_directions(n: int, m: int, generator: torch.Generator | None = None) -> Tensor:
    """n unit vectors in m dimensions (n, m), uniform on the sphere."""
    return unit(torch.randn(n, m, generator=generator))


@on_one_core
def measured_interference(
    n: int, m: int, p: float, samples: int = 500, draws: int = 10, seed: int = 0
) -> float:
    """The squared interference among n random unit vectors, p (n - 1) / m in expectation: the mean
    over inputs and features of (Σ_{j≠i} x_j Ŵ_j · Ŵ_i)².

    A component of a random unit vector has mean square 1/m, since m of them sum to 1; so has the
    dot product of two. Of the n - 1 others, a share p is on (at 1) at a time. Averaged over several
    draws of the directions, since one draw is off by a few per cent.

    Args:
        samples: inputs per draw of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        W = random_directions(n, m, generator)
        x = (torch.rand(samples, n, generator=generator) < p).float()  # (samples, n), on is 1
        noise = x @ W @ W.T - x  # what is read, less what the feature itself wrote
        total += noise.square().mean().item()
    return total / draws


# -- shapes ----------------------------------------------------------------------------------


def polygon(n: int) -> Tensor:
    """The corners of a regular n-gon at distance 1, (n, 2)."""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.stack([angle.cos(), angle.sin()], 1)


def tetrahedron() -> Tensor:
    """The corners of a regular tetrahedron, (4, 3): every second corner of a cube."""
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    return unit(corners.double())


def square_antiprism() -> Tensor:
    """Two squares, one above the other and turned by 45°, with z² = 1/3, (8, 3).

    At this height the squares of the coordinates sum to 8/3 in every direction, so that all
    dimensionalities are 3/8.
    """
    turn = polygon(8)
    low, high = turn[0::2], turn[1::2]
    radius, z = math.sqrt(2 / 3), math.sqrt(1 / 3)
    heights = torch.tensor([[-z], [z]], dtype=torch.float64).repeat_interleave(4, 0)
    return torch.cat([radius * torch.cat([low, high]), heights], 1)


GEOMETRIES = {
    "tetrahedron": tetrahedron(),
    "triangle": polygon(3),
    "antipodal pair": torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
    "pentagon": polygon(5),
    "square antiprism": square_antiprism(),
}


def band(name: str) -> float:
    """The feature dimensionality of a geometry, computed from its corners."""
    return dimensionality(GEOMETRIES[name]).mean().item()
