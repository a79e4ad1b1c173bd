"""Lesson 01's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_01.experiments import Training, grow, sample, train
from mi_helpers.lessons.lesson_01.geometry import (
    band,
    dimensionality,
    dimensions_per_feature,
    measured_interference,
    represented,
    unit,
)
from mi_helpers.lessons.lesson_01.phases import (
    PHASE,
    closed_form_losses,
    critical_density,
    linear_optimum,
    phase_diagram,
    solution_found,
)

TOY = "Elhage et al. 2022, Toy Models of Superposition"
GEOMETRY = f"{TOY}, feature dimensionality; derived: tight frame, m/n"


def furthest(values: Tensor, target: float) -> float:
    """Of several numbers, the one furthest from the target: if it is close, all are."""
    return values[(values - target).abs().argmax()].item()


@claim(
    "pentagon",
    "Five features in two dimensions, S = 0.9: the feature dimensionality furthest from 2/5",
    source=GEOMETRY,
    published="2/5",
    tolerance="± 0.02",
)
def grown_pentagon(seed: int) -> float:
    """Worst D_i of five features in two dimensions; 0 for a feature that is not represented."""
    return furthest(dimensionality(grow("pentagon", seed).W[0]), 2 / 5)


@claim(
    "pentagon-sum",
    "The same five dimensionalities, summed",
    source=GEOMETRY,
    published="2",
    tolerance="± 0.01",
)
def grown_pentagon_sum(seed: int) -> float:
    """Σ_i D_i of five features in two dimensions."""
    return dimensionality(grow("pentagon", seed).W[0]).sum().item()


@claim(
    "sticky-one",
    "m/‖W‖² with equal importance, dense: n = 40, m = 8, S = 0.01",
    source=f"{TOY}, dimensions per feature; ARENA 1.3.1",
    published="1",
    tolerance="± 0.02",
)
def sticky_one(seed: int) -> float:
    """m/‖W‖²_F of 40 equally important features in 8 dimensions, dense: S = 0.01."""
    toys = train(40, 8, 0.01, training=Training(lr=0.015, seed=seed))
    return dimensions_per_feature(toys.W)[0].item()


@claim(
    "sticky-half",
    "m/‖W‖² with equal importance, S = 0.55 to 0.70: the value furthest from 1/2",
    source=f"{TOY}, dimensions per feature; ARENA 1.3.1",
    published="1/2",
    tolerance="± 0.03",
)
def sticky_half(seed: int) -> float:
    """The same at S = 0.55, 0.6, 0.65 and 0.7: the one furthest from 1/2."""
    toys = train(40, 8, [0.55, 0.6, 0.65, 0.7], training=Training(lr=0.015, seed=seed))
    return furthest(dimensions_per_feature(toys.W), 1 / 2)


def grown_band(name: str, seed: int) -> float:
    """The dimensionality furthest from the geometry's, of the represented features."""
    W = grow(name, seed).W[0]
    return furthest(dimensionality(W)[represented(W)], band(name))


@claim(
    "tetrahedron",
    "Four features in three dimensions, S = 0.45: the dimensionality furthest from 3/4",
    source=GEOMETRY,
    published="3/4",
    tolerance="± 0.05",
)
def grown_tetrahedron(seed: int) -> float:
    """Worst D_i of four features in three dimensions."""
    return grown_band("tetrahedron", seed)


@claim(
    "triangle",
    "Three features in two dimensions, S = 0.4: the dimensionality furthest from 2/3",
    source=GEOMETRY,
    published="2/3",
    tolerance="± 0.05",
)
def grown_triangle(seed: int) -> float:
    """Worst D_i of three features in two dimensions."""
    return grown_band("triangle", seed)


@claim(
    "antipodal-pair",
    "Six features in two dimensions, S = 0.55, those represented: furthest from 1/2",
    source=GEOMETRY,
    published="1/2",
    tolerance="± 0.02",
)
def grown_pair(seed: int) -> float:
    """Worst D_i of the four represented features among six in two dimensions."""
    return grown_band("antipodal pair", seed)


@claim(
    "square-antiprism",
    "Eight features in three dimensions, S = 0.9: the dimensionality furthest from 3/8",
    source=GEOMETRY,
    published="3/8",
    tolerance="± 0.02",
)
def grown_antiprism(seed: int) -> float:
    """Worst D_i of eight features in three dimensions."""
    return grown_band("square antiprism", seed)


@claim(
    "interference",
    "Squared interference of 400 random directions in 50 dimensions, each on with p = 0.05",
    source="derived: p (n - 1) / m",
    published="0.399",
    tolerance="± 0.01",
)
def random_interference(seed: int) -> float:
    """Measured squared interference: n = 400, m = 50, p = 0.05."""
    return measured_interference(400, 50, 0.05, seed=seed)


@claim(
    "phase-diagram",
    "n = 2, m = 1: share of 144 cells where training finds the closed form's best solution",
    source=f"{TOY}, phase diagram; derived: three closed-form losses",
    tolerance=">= 0.9",
)
def phase_agreement(seed: int) -> float:
    """The share of 12 × 12 phase diagram cells where training finds the closed form's winner."""
    q, r = torch.logspace(math.log10(0.99), -2, 12), torch.logspace(-1, 1, 12)
    found = solution_found(phase_diagram(q, r, replace(PHASE, seed=seed)).W).view(12, 12)
    return (found == closed_form_losses(q[:, None], r).argmin(0)).float().mean().item()


@claim(
    "linear-control",
    "Negative control, no ReLU: loss over that of principal components, n = 10, m = 3, S = 0.9",
    source="derived: Var x · Σ importance of the features left out",
    published="1",
    tolerance="± 0.02",
)
def linear_over_optimum(seed: int) -> float:
    """The linear model's loss after training over its closed-form optimum: n = 10, m = 3."""
    weights = 0.8 ** torch.arange(10)
    training = Training(samples=65536, seed=seed)
    toys = train(10, 3, 0.9, importance=weights, output="linear", training=training)
    return (toys.loss[0] / linear_optimum(weights, 3, 0.9)).item()


@claim(
    "sticky-levels",
    "The 40 features at S = 0.05 to 0.95: share of the represented within 0.015 of D = 1/2",
    source=f"{TOY}, feature dimensionality; derived: an even spread has 3 % there",
    tolerance=">= 0.25",
)
def at_one_half(seed: int) -> float:
    """The share of represented features with a dimensionality between 0.485 and 0.515."""
    return near(seed, 1 / 2)


@claim(
    "sticky-levels-control",
    "The same within 0.015 of 1, 3/4, 2/3, 2/5 or 3/8: the largest of these shares",
    source="derived: an even spread has 3 % at each",
    tolerance="<= 0.06",
)
def at_other_levels(seed: int) -> float:
    """The largest share near any other level that the paper draws."""
    return max(near(seed, level) for level in (1, 3 / 4, 2 / 3, 2 / 5, 3 / 8))


@functools.lru_cache(maxsize=2)
def swept(seed: int) -> Tensor:
    """The dimensionalities of the represented features of 19 models, 40 in 8 dimensions."""
    sweep = [round(0.05 * k, 2) for k in range(1, 20)]
    W = train(40, 8, sweep, training=Training(lr=0.015, seed=seed)).W
    return dimensionality(W)[represented(W)]


def near(seed: int, level: float) -> float:
    """The share of dimensionalities within 0.015 of a level."""
    return ((swept(seed) - level).abs() < 0.015).float().mean().item()


@claim(
    "pentagon-interference",
    "Squared interference of the trained pentagon's directions over that of random ones",
    source="derived: tight frame, (n - m)/(n - 1)",
    published="3/4",
    tolerance="± 0.03",
)
def arranged_over_random(seed: int) -> float:
    """Unit directions of five features in two dimensions, S = 0.9, over p (n - 1)/m."""
    V = unit(grow("pentagon", seed).W[0])
    gram = V @ V.T
    return (gram.square().sum(1) - 1).mean().item() / (4 / 2)


@claim(
    "relu-clears",
    "The pentagon's read-outs of absent features: mean square after bias and ReLU over that before",
    source="ours",
    tolerance="<= 0.05",
)
def left_by_the_relu(seed: int) -> float:
    """Five features in two dimensions, S = 0.9, over 40,000 inputs."""
    toys = grow("pentagon", seed)
    generator = torch.Generator().manual_seed(seed)
    x = sample(torch.tensor([0.9]), 5, 40_000, generator=generator)
    read = x[0] @ toys.W[0] @ toys.W[0].T
    absent = x[0] == 0
    return (toys(x)[0][absent].square().mean() / read[absent].square().mean()).item()


@functools.lru_cache(maxsize=2)
def leaving(seed: int) -> tuple[float, float]:
    """(density over the closed form's line, |w₂|) at the last density where |w₂| > 1/2, r = 0.3."""
    steps = torch.arange(0.9, 1.4, 0.02)
    training = replace(PHASE, restarts=16, batch=256, steps=800, seed=seed)
    toys = phase_diagram(steps * critical_density(0.3).float(), [0.3], training)
    length = toys.W[:, 1, 0].abs()
    last = int((length > 0.5).nonzero().max())
    return steps[last].item(), length[last].item()


@claim(
    "jump-place",
    "n = 2, m = 1, r = 0.3: the last density with the second feature in, over the closed form's",
    source="ours; the closed form has W = (1, -1) and b = 0",
    tolerance=">= 1.06",
)
def place_of_the_jump(seed: int) -> float:
    """How far above the line the second feature stays, as training may shorten it."""
    return leaving(seed)[0]


@claim(
    "jump-length",
    "|w₂| at that density: the second feature shrinks before it goes",
    source="ours",
    tolerance="<= 0.8",
)
def length_at_the_jump(seed: int) -> float:
    """The last |w₂| before it falls to 0."""
    return leaving(seed)[1]
