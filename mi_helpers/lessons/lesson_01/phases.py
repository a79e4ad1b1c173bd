"""When sharing a dimension pays: closed forms, the phase diagram, the third feature, the control.

Source: Elhage et al. 2022, Toy Models of Superposition, "Superposition as a Phase Change".
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mi_helpers.lessons.lesson_01.experiments import Toys, Training, train

PHASE = Training(restarts=8, steps=500, batch=64, lr=0.04)  # of `phase_diagram`

# -- two features, one dimension -------------------------------------------------------------

SOLUTIONS = ("first feature only", "both, antipodal", "second feature only")


def closed_form_losses(density, importance) -> Tensor:
    """The losses of the three solutions for n = 2, m = 1, exactly (3, …), in SOLUTIONS' order.

    The first feature has importance 1, the second r = `importance`; both have density q. For one
    feature E x = q/2 and E x² = q/3.

    First only, W = (1, 0): feature 1 is read perfectly. For feature 2 the best that is left is a
    constant, the bias b_2 = E x_2 = q/2, whose loss is the variance:

        L = r (q/3 - q²/4)

    Second only, W = (0, 1): the same with the roles exchanged, L = q/3 - q²/4.

    Both, W = (1, -1), b = 0: x̂_1 = ReLU(x_1 - x_2) and x̂_2 = ReLU(x_2 - x_1). Where one feature is
    on, both are read perfectly: the other's read-out is negative, and the ReLU cuts it off. Where
    both are on, with probability q², each read-out misses by the smaller one: the larger feature
    is read as the difference, the smaller one as 0. For two uniform numbers E min² = ∫ 2 (1 - t) t²
    dt = 1/6. So

        L = q² (1 + r) / 6

    Superposition costs q² where ignoring costs q: it wins when q is small enough.
    """
    q, r = torch.broadcast_tensors(
        torch.as_tensor(density, dtype=torch.float64),
        torch.as_tensor(importance, dtype=torch.float64),
    )
    variance = q / 3 - q**2 / 4
    return torch.stack([r * variance, q**2 * (1 + r) / 6, variance])


def critical_density(importance) -> Tensor:
    """The density below which the antipodal pair wins: q = 4r / (2 + 5r) for r ≤ 1.

    It solves r (q/3 - q²/4) = q² (1 + r) / 6. For r > 1 the features exchange roles: 1/r for r.
    """
    r = torch.as_tensor(importance, dtype=torch.float64)
    r = torch.minimum(r, 1 / r)
    return 4 * r / (2 + 5 * r)


def solution_found(W: Tensor) -> Tensor:
    """The place in SOLUTIONS, 0, 1 or 2, of trained weights W (instances, 2, 1), (instances,).

    Both, if the shorter of the two is more than half as long as the longer.
    """
    first, second = W.norm(dim=-1).unbind(-1)  # (instances,)
    both = torch.minimum(first, second) > 0.5 * torch.maximum(first, second)
    return torch.where(both, 1, torch.where(first >= second, 0, 2))


def phase_diagram(
    densities: Sequence[float] | Tensor,
    importances: Sequence[float] | Tensor,
    training: Training = PHASE,
) -> Toys:
    """Models with n = 2, m = 1, trained at every density and importance, density by density."""
    q = torch.as_tensor(densities, dtype=torch.float32)
    r = torch.as_tensor(importances, dtype=torch.float32)
    weights = torch.stack([torch.ones_like(r), r], 1).repeat(len(q), 1)
    sparsity = 1 - q.repeat_interleave(len(r))
    return train(2, 1, sparsity, importance=weights, training=training)


# -- the negative control: no ReLU -----------------------------------------------------------


def variance(sparsity) -> Tensor:
    """Var x of one feature: q/3 - q²/4 with q = 1 - S."""
    q = 1 - torch.as_tensor(sparsity, dtype=torch.float64)
    return q / 3 - q**2 / 4


def linear_optimum(importance: Tensor, n_hidden: int, sparsity) -> Tensor:
    """The lowest loss of the model without ReLU: Var x · Σ I of the features left out, (…).

    Without the ReLU, x̂ = W W^T x + b can at best project onto m directions, and the bias takes the
    mean: the error is the variance that is left out, weighted by importance. For independent
    features of equal variance the best m directions are the m most important features. This is
    principal component analysis; sharing a dimension never pays, whatever the sparsity.
    """
    left_out = importance.double().sort(-1, descending=True).values[..., n_hidden:].sum(-1)
    return variance(sparsity) * left_out


# -- the investigation: when does a third feature enter? -------------------------------------

THIRD = (0.5, 0.25, 0.1)  # importances of the third feature; the other two have 1 and 0.8
GRID = tuple(round(0.02 * k, 2) for k in range(1, 50))  # sparsities at which models are trained


@functools.cache
def third_is_held() -> Tensor:
    """Whether the third feature is held (‖W_3‖ > 0.5), (importances, sparsities), as booleans.

    Three features in two dimensions, one model at each of THIRD and GRID, the best of 8 restarts.
    """
    weights = torch.tensor([[1.0, 0.8, r] for r in THIRD]).repeat_interleave(len(GRID), 0)
    training = Training(restarts=8, steps=400, batch=64, lr=0.04, seed=7)
    toys = train(3, 2, GRID * len(THIRD), importance=weights, training=training)
    return (toys.W[:, 2].norm(dim=-1) > 0.5).view(len(THIRD), len(GRID))


def told_rightly(thresholds: Sequence[float]) -> float:
    """The share of those models in which the third feature is held just where S > threshold."""
    said = torch.tensor(GRID) > torch.tensor(thresholds)[:, None]
    return (said == third_is_held()).double().mean().item()


def entries() -> list[float]:
    """The threshold for each of THIRD that tells most models rightly: half way between two."""
    held, places = third_is_held(), torch.tensor([0.0, *GRID]) + 0.01
    right = (torch.tensor(GRID) > places[:, None]) == held[:, None]  # (importances, places, grid)
    return places[right.sum(-1).argmax(-1)].tolist()


def entries_by_formula() -> list[float]:
    """The sparsity below which the closed form keeps the third feature out, for each of THIRD.

    The cheapest partner is the less important of the two, so the ratio that counts is r/0.8.
    """
    return [1 - critical_density(r / 0.8).item() for r in THIRD]
