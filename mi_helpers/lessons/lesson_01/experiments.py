"""Toy models of superposition: more features than dimensions, trained many at a time.

A toy model squeezes n features into m hidden dimensions and reads them out again,

    h = W^T x                 x̂ = ReLU(W h + b)               W (n_features, n_hidden)

and is trained to give back the features that matter: loss = E Σ_i I_i (x_i - x̂_i)². A feature is 0
with probability S, its *sparsity*, and else uniform in [0, 1]; 1 - S is its *density*. Row W_i is
the direction in which feature i is written, and also the one in which it is read.

Source: Elhage et al. 2022, Toy Models of Superposition; the paper writes W for our W^T.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mi_helpers.lessons.shared import on_one_core

_AT_ONCE = 1 << 20  # numbers of training data that are drawn at a time


@dataclass
class Toys:
    """Trained toy models, one per instance.

    W            (instances, n_features, n_hidden)
    b            (instances, n_features)
    importance   (instances, n_features)
    sparsity     (instances,)
    correlation  (instances,)
    loss         (instances,), on inputs that were not trained on
    output       "relu" or "linear": what follows W h + b
    hidden       "linear" or "relu": what follows W^T x
    path         W and b along the way, (snapshots, instances, n_features, n_hidden + 1), or None
    """

    W: Tensor
    b: Tensor
    importance: Tensor
    sparsity: Tensor
    correlation: Tensor
    loss: Tensor
    output: str = "relu"
    hidden: str = "linear"
    path: Tensor | None = None

    def __len__(self) -> int:
        return len(self.W)

    def __call__(self, x: Tensor) -> Tensor:
        """x̂ for inputs x (instances or 1, batch, n_features)."""
        return reconstruct(x, self.W, self.b, self.output, self.hidden)

    def pick(self, rows: Tensor) -> "Toys":
        """The instances with these numbers."""
        names = ("W", "b", "importance", "sparsity", "correlation", "loss")
        path = None if self.path is None else self.path[:, rows]
        return replace(self, path=path, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True)
class Training:
    """How toy models are trained.

    restarts  trainings of each instance from different random weights; that of lowest loss is kept
    steps     of Adam; batch: inputs in each, none of them blank
    lr        Adam's learning rate at the start; it falls to zero along a quarter of a cosine
    samples   fresh inputs on which the loss is measured at the end
    seed      of the weights and the inputs
    every     steps between the snapshots that are kept in `Toys.path`; 0 keeps none
    """

    restarts: int = 1
    steps: int = 1500
    batch: int = 128
    lr: float = 0.02
    samples: int = 8192
    seed: int = 0
    every: int = 0

    def __post_init__(self):
        for name in ("restarts", "steps", "batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: take 1 or more.")


GROWTH = Training(restarts=16, steps=1200, batch=256, lr=0.03)  # of `grow`

# -- the data --------------------------------------------------------------------------------


def chance_of_both(density: Tensor, correlation: Tensor) -> Tensor:
    """P(both features of a pair are on), each being on with probability q = density.

    A correlation of 0 is independence, q²; 1 is q, always together; -1 is max(0, 2q - 1), never
    together, or as seldom as the density allows. Between these it is linear.
    """
    most, least = density, (2 * density - 1).clamp(min=0)
    end = torch.where(correlation >= 0, most, least)
    return density**2 + correlation.abs() * (end - density**2)


def chance_of_blank(sparsity: Tensor, correlation: Tensor, n_features: int) -> Tensor:
    """P(x = 0): no pair has a feature on, and neither has the last feature of an odd number."""
    density = 1 - sparsity
    neither = 1 - 2 * density + chance_of_both(density, correlation)
    return neither ** (n_features // 2) * sparsity ** (n_features % 2)


def sample(
    sparsity: Tensor,
    n_features: int,
    batch: int,
    correlation: Tensor | float = 0.0,
    generator: torch.Generator | None = None,
    blanks: bool = True,
) -> Tensor:
    """Inputs x for sparsities (instances,), (instances, batch, n_features).

    All instances share the random numbers, which saves time: they are not independent samples.

    Args:
        correlation: of the pairs (0, 1), (2, 3), …, in [-1, 1]: see `chance_of_both`.
        blanks: False gives the same distribution *given x ≠ 0*, exactly: at high sparsity nearly
            all inputs are blank and teach nothing.
    """
    density = (1 - sparsity)[:, None, None]  # (instances, 1, 1)
    both = chance_of_both(density, torch.as_tensor(correlation).reshape(-1, 1, 1))
    groups = (n_features + 1) // 2  # pairs, and perhaps one feature that has no mate
    busy = (2 * density - both).expand(-1, -1, groups).clone()  # P(anything on) per group
    if n_features % 2:
        busy[..., -1:] = density
    u = torch.rand(batch, groups, generator=generator)  # (batch, groups), one number decides all
    if not blanks:
        by_now = 1 - (1 - busy).cumprod(-1)  # P(the first busy group is this one or before)
        u_first = torch.rand(batch, 1, generator=generator) * by_now[..., -1:]
        first = (u_first >= by_now[..., :-1]).sum(-1, keepdim=True)
        place = torch.arange(groups)
        u = torch.where(place == first, u * busy, u).masked_fill(place < first, 1.0)
    left = u < density
    right = (u < both) | ((u >= density) & (u < busy))
    on = torch.stack([left, right], -1).flatten(-2)[..., :n_features]
    return on * torch.rand(batch, n_features, generator=generator)


# -- the model -------------------------------------------------------------------------------


def reconstruct(
    x: Tensor, W: Tensor, b: Tensor, output: str = "relu", hidden: str = "linear"
) -> Tensor:
    """x̂ = ReLU(W W^T x + b) for inputs x (instances or 1, batch, n_features), of their shape."""
    h = x.expand(len(W), -1, -1) @ W  # (instances, batch, n_hidden)
    if hidden == "relu":
        h = h.clamp(min=0)
    y = torch.baddbmm(b[:, None], h, W.mT)
    return y.clamp(min=0) if output == "relu" else y


def weighted_loss(x: Tensor, x_hat: Tensor, importance: Tensor) -> Tensor:
    """Σ_i I_i (x_i - x̂_i)², the mean over the batch, (instances,); importance (instances, n)."""
    return (importance[:, None] * (x - x_hat) ** 2).sum(-1).mean(-1)


def gradients(
    W: Tensor, b: Tensor, x: Tensor, weight: Tensor, output: str = "relu", hidden: str = "linear"
) -> tuple[Tensor, Tensor]:
    """Half the gradient of Σ weight (x - x̂)², summed over the batch, by W and by b, in closed form.

    W occurs twice, so its gradient is a sum: with δ = weight (x̂ - x), zero where the output's ReLU
    is off, it is δ^T h for the reading and x^T (δ W) for the writing.

    Args:
        x: (instances, batch, n_features); weight: (instances, 1, n_features).
    """
    h = x @ W
    awake = h > 0 if hidden == "relu" else None
    if awake is not None:
        h = h * awake
    y = torch.baddbmm(b[:, None], h, W.mT)
    delta = y.clamp(min=0).sub_(x).mul_(y > 0) if output == "relu" else y - x
    delta *= weight
    back = delta @ W
    if awake is not None:
        back *= awake
    return torch.baddbmm(delta.mT @ h, x.mT, back), delta.sum(1)


@on_one_core
def expected_loss(toys: Toys, samples: int = 8192, seed: int = 1_000_003) -> Tensor:
    """The loss of every instance on fresh inputs, (instances,); blank ones are counted exactly."""
    generator = torch.Generator().manual_seed(seed)
    n_features, rows = toys.W.shape[1], 1024
    blank = chance_of_blank(toys.sparsity, toys.correlation, n_features)
    chunks = max(1, samples // rows)
    data = distinct(toys.sparsity, toys.correlation)
    total = torch.zeros(len(toys))
    for _ in range(chunks):
        x = sample(data[0], n_features, rows, data[1], generator, blanks=False)
        total += weighted_loss(x, toys(x), toys.importance)
    nothing = torch.zeros(1, 1, n_features)
    on_blank = weighted_loss(nothing, toys(nothing), toys.importance)
    return (1 - blank) * total / chunks + blank * on_blank


def distinct(sparsity: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are, or with one entry each if all instances have the same."""
    same = bool((sparsity == sparsity[0]).all() and (correlation == correlation[0]).all())
    return (sparsity[:1], correlation[:1]) if same else (sparsity, correlation)


# -- training --------------------------------------------------------------------------------


@on_one_core
def train(
    n_features: int,
    n_hidden: int,
    sparsity: float | Sequence[float] | Tensor,
    *,
    importance: Sequence | Tensor | None = None,
    correlation: float | Sequence[float] | Tensor = 0.0,
    output: str = "relu",
    hidden: str = "linear",
    training: Training = Training(),
) -> Toys:
    """One trained toy model per sparsity, all from one batched run.

    Args:
        sparsity: one number in (0, 1), or one per instance.
        importance: (n_features,) or (instances, n_features); by default all 1.
        correlation: of the pairs (0, 1), (2, 3), …, in [-1, 1]; one number, or one per instance.
        output, hidden: see `Toys`.

    Raises:
        ValueError: settings that make no model.
    """
    check_shape(n_features, n_hidden, output, hidden)
    sparsity, importance, correlation = per_instance(n_features, sparsity, importance, correlation)
    generator = torch.Generator().manual_seed(training.seed)
    rows = torch.arange(len(sparsity)).repeat_interleave(training.restarts)  # model -> its instance
    parameters = torch.randn(len(rows), n_features, n_hidden + 1, generator=generator)
    parameters[..., :-1] /= math.sqrt(n_hidden)
    parameters[..., -1] = 0
    toys = Toys(
        parameters[..., :-1],  # views: W and b move with `parameters`
        parameters[..., -1],
        importance[rows],
        sparsity[rows],
        correlation[rows],
        torch.zeros(len(rows)),
        output,
        hidden,
    )
    source = distinct(sparsity, correlation)  # of the data: one for all, where all agree
    _descend(toys, parameters, _batches(source, rows, n_features, training, generator), training)
    toys.W, toys.b = toys.W.clone(), toys.b.clone()
    toys.loss = expected_loss(toys, training.samples)
    best = toys.loss.view(-1, training.restarts).argmin(1)
    return toys.pick(torch.arange(len(sparsity)) * training.restarts + best)


def _batches(
    source: tuple[Tensor, Tensor],
    rows: Tensor,
    n_features: int,
    training: Training,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The inputs of each step, without blanks, (models, batch, n_features)."""
    steps, batch = training.steps, training.batch
    ahead = max(1, min(steps, _AT_ONCE // (len(source[0]) * batch * n_features)))
    for start in range(0, steps, ahead):
        count = min(ahead, steps - start)
        data = sample(source[0], n_features, count * batch, source[1], generator, blanks=False)
        for x in data.split(batch, dim=1):
            yield x.expand(len(rows), -1, -1) if len(x) == 1 else x[rows]


def _descend(toys: Toys, parameters: Tensor, batches: Iterator[Tensor], training: Training) -> None:
    """Move `parameters`, W and b side by side, down the loss: Adam with β = (0.9, 0.99)."""
    n_features = toys.W.shape[1]
    blank = chance_of_blank(toys.sparsity, toys.correlation, n_features)[:, None]  # (models, 1)
    on_blank = blank * toys.importance  # (models, n_features)
    on_data = ((1 - blank) * toys.importance / training.batch)[:, None]  # (models, 1, n_features)
    gradient, mean, square = (torch.zeros_like(parameters) for _ in range(3))
    by_W, by_b = gradient[..., :-1], gradient[..., -1]
    path = [parameters.clone()]
    for step, x in enumerate(batches):
        given_W, given_b = gradients(toys.W, toys.b, x, on_data, toys.output, toys.hidden)
        by_W.copy_(given_W)
        # blank inputs were left out of the data; all that they teach is that b should not be > 0
        b = toys.b.clamp(min=0) if toys.output == "relu" else toys.b
        by_b.copy_(given_b.addcmul_(on_blank, b))
        mean.lerp_(gradient, 0.1)
        square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        rate = training.lr * math.cos(math.pi / 2 * (step + 1) / training.steps)
        rate *= math.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        parameters.addcdiv_(mean, square.sqrt().add_(1e-10), value=-rate)
        if training.every and (step + 1) % training.every == 0:
            path.append(parameters.clone())
    toys.path = torch.stack(path) if training.every else None


def check_shape(n_features: int, n_hidden: int, output: str, hidden: str) -> None:
    """Raise ValueError, in one sentence, for a shape or a form that no toy model has."""
    if n_hidden < 1 or n_features < 1:
        raise ValueError(
            f"{n_features} features and {n_hidden} hidden dimensions were given: "
            "a toy model needs at least one of each."
        )
    if n_hidden > n_features:
        raise ValueError(
            f"{n_hidden} hidden dimensions for {n_features} features leave nothing to squeeze: "
            f"take {n_features} hidden dimensions or fewer, or more features."
        )
    if output not in ("relu", "linear") or hidden not in ("relu", "linear"):
        raise ValueError(
            f"output={output!r} and hidden={hidden!r} were given: each is 'relu' or 'linear'."
        )


def per_instance(
    n_features: int, sparsity, importance, correlation
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparsity (instances,), importance (instances, n_features), correlation (instances,).

    Raises:
        ValueError: a number out of range, or numbers of instances that do not agree.
    """
    sparsity = torch.as_tensor(sparsity, dtype=torch.float32).reshape(-1)
    correlation = torch.as_tensor(correlation, dtype=torch.float32).reshape(-1)
    weights = torch.ones(n_features) if importance is None else torch.as_tensor(importance).float()
    if weights.ndim not in (1, 2) or weights.shape[-1] != n_features:
        raise ValueError(
            f"The importance has shape {tuple(weights.shape)}: "
            f"give {n_features} numbers, one per feature, or one such row per instance."
        )
    weights = weights.reshape(-1, n_features)
    sizes = {len(each) for each in (sparsity, correlation, weights)} - {1}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"{len(sparsity)} sparsities, {len(correlation)} correlations and {len(weights)} rows "
            "of importance were given: give one of each, or as many of one as of the other."
        )
    _check_range(sparsity, weights, correlation)
    count = max(len(sparsity), len(correlation), len(weights))
    return (
        sparsity.expand(count).clone(),
        weights.expand(count, -1).clone(),
        correlation.expand(count).clone(),
    )


def _check_range(sparsity: Tensor, weights: Tensor, correlation: Tensor) -> None:
    if not bool(((sparsity > 0) & (sparsity < 1)).all()):
        wrong = sparsity[~((sparsity > 0) & (sparsity < 1))][0].item()
        raise ValueError(
            f"A sparsity of {wrong:g} was given: it is the chance that a feature is absent, and "
            "lies between 0 and 1, both excluded; take 0.01 for dense and 0.99 for very sparse."
        )
    if not bool((correlation.abs() <= 1).all()):
        raise ValueError(
            f"A correlation of {correlation[~(correlation.abs() <= 1)][0].item():g} was given: "
            "take a number from -1 (never together) through 0 (independent) to 1 (always together)."
        )
    if not bool((weights >= 0).all() and weights.isfinite().all()):
        raise ValueError("An importance is negative or not a number: take 0 or more.")


# Where each geometry grows, with equal importance: (features, hidden dimensions, sparsity)
HABITATS = {
    "tetrahedron": (4, 3, 0.45),
    "triangle": (3, 2, 0.4),
    "antipodal pair": (6, 2, 0.55),
    "pentagon": (5, 2, 0.9),
    "square antiprism": (8, 3, 0.9),
}


def grow(name: str, seed: int = 0) -> Toys:
    """One toy model trained where a geometry grows (`HABITATS`), the best of 16 restarts."""
    return train(*HABITATS[name], training=replace(GROWTH, seed=seed))
