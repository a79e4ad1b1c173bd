"""The exercises of lesson 01, toy superposition."""

import math

import torch

from mi_helpers.course.check import Wrong, exercise, expect, expect_close, expect_shape
from mi_helpers.lessons.lesson_01 import experiments as superposition
from mi_helpers.lessons.lesson_01 import packing
from mi_helpers.lessons.shared import on_one_core

# -- 1.1 -------------------------------------------------------------------------------------

STUB_11 = '''\
def reconstruct(x, W, b):
    """x̂ = ReLU(W h + b) with h = W^T x, for every row of a batch.

    x (batch, n_features), W (n_features, n_hidden), b (n_features,)
    """
    ...
'''


def reconstruct(x, W, b):
    """Rows are examples, so h = x W, and x̂ = ReLU(h W^T + b)."""
    return torch.relu(x @ W @ W.T + b)


@exercise(
    "1.1",
    title="The toy model",
    difficulty=1,
    importance=5,
    minutes=5,
    stub=STUB_11,
    reference=reconstruct,
    hints=[
        "Each row of `x` is one example, so `x @ W` has the hidden vectors, (batch, n_hidden).",
        "The same W reads out again: its transpose maps hidden vectors back to features.",
    ],
    wrong=[
        (lambda x, W, b: x @ W @ W.T + b, "Negative numbers"),
        (lambda x, W, b: torch.relu(x @ W @ W.T), "bias is missing"),
        (lambda x, W, b: torch.relu(x @ W @ W.T) + b, "before the ReLU"),
        (lambda x, W, b: torch.relu(torch.relu(x @ W) @ W.T + b), "one ReLU only"),
        (lambda x, W, b: torch.relu(x @ W), "shape (6, 2)"),
    ],
)
def check_11(answer) -> None:
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [0.0, 1.0], [0.3, -1.0]])
    b = torch.tensor([0.3, -0.2, 0.1, -0.4])
    got, want = answer(x, W, b), reconstruct(x, W, b)
    expect_shape(got, (6, 4))
    for mistake, message in (
        (x @ W @ W.T + b, "Negative numbers come out, but features are never negative: a ReLU?"),
        (torch.relu(x @ W @ W.T), "The bias is missing: without it a read-out cannot be shifted."),
        (torch.relu(x @ W @ W.T) + b, "Add the bias before the ReLU, so that it sets a threshold."),
        (torch.relu(torch.relu(x @ W) @ W.T + b), "The hidden layer h is linear: one ReLU only."),
    ):
        expect(not torch.allclose(got, mistake, atol=1e-5), message)
    expect_close(got, want, "Compare with ReLU(x W W^T + b) for one row of x.")


# -- 1.2 -------------------------------------------------------------------------------------

STUB_12 = '''\
def weighted_loss(x, x_hat, importance):
    """Σ_i I_i (x_i - x̂_i)² for each example, averaged over the batch: one number.

    x, x_hat (batch, n_features), importance (n_features,)
    """
    ...
'''


def weighted_loss(x, x_hat, importance):
    """Sum over the features, mean over the batch."""
    return (importance * (x - x_hat) ** 2).sum(-1).mean()


@exercise(
    "1.2",
    title="The weighted loss",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_12,
    reference=weighted_loss,
    hints=[
        "`importance` has one number per feature, and broadcasts over the batch.",
        "Square the error, weight it, sum over the last axis, then average over the first.",
    ],
    wrong=[
        (lambda x, x_hat, importance: ((x - x_hat) ** 2).sum(-1).mean(), "count the same"),
        (lambda x, x_hat, importance: (importance * (x - x_hat) ** 2).mean(), "*sums* over"),
        (lambda x, x_hat, importance: (importance * (x - x_hat) ** 2).sum(), "Average over"),
        (
            lambda x, x_hat, importance: ((importance * (x - x_hat)) ** 2).sum(-1).mean(),
            "importance is squared",
        ),
        (
            lambda x, x_hat, importance: (importance * (x - x_hat).abs()).sum(-1).mean(),
            "absolute errors",
        ),
    ],
)
def check_12(answer) -> None:
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.8, 0.0]])
    x_hat = torch.tensor([[0.6, 0.1, 0.5], [0.0, 0.2, 0.3]])
    importance = torch.tensor([1.0, 0.5, 0.25])
    got, error = torch.as_tensor(answer(x, x_hat, importance)), x - x_hat
    expect_shape(got, ())
    for mistake, message in (
        ((error**2).sum(-1).mean(), "All features count the same: where is the importance?"),
        ((importance * error**2).mean(), "The formula *sums* over features; the mean is for rows."),
        ((importance * error**2).sum(), "Average over the batch, or a larger batch costs more."),
        (((importance * error) ** 2).sum(-1).mean(), "The importance is squared: weight (x - x̂)²."),
        ((importance * error.abs()).sum(-1).mean(), "These are absolute errors: square them."),
    ):
        expect(not torch.allclose(got, mistake), message)
    expect_close(got, weighted_loss(x, x_hat, importance), "Work out the first row by hand.")


# -- 1.3 -------------------------------------------------------------------------------------

STUB_13 = '''\
def dimensionality(W):
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)², with Ŵ_i = W_i / ‖W_i‖; the sum includes j = i.

    W (n_features, n_hidden), no row zero; returns (n_features,)
    """
    ...
'''


def dimensionality(W):
    """Only the direction that reads, Ŵ_i, is normalised; what it reads keeps its length."""
    length = W.norm(dim=1, keepdim=True)
    return W.square().sum(1) / ((W / length) @ W.T).square().sum(1)


def hat(W):
    """The rows at length 1."""
    return W / W.norm(dim=1, keepdim=True)


@exercise(
    "1.3",
    title="The share of a dimension",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_13,
    reference=dimensionality,
    hints=[
        "`W.norm(dim=1, keepdim=True)` has the lengths of the rows, ready to divide by.",
        "`hat @ W.T` has Ŵ_i · W_j at row i, column j.",
        "Sum the squares along each row, and divide the squared length by it.",
    ],
    wrong=[
        (lambda W: 1 / (hat(W) @ hat(W).T).square().sum(1), "Normalise Ŵ_i only"),
        (lambda W: W.square().sum(1) / (W @ W.T).square().sum(1), "divided by its length"),
        (lambda W: W.square().sum(1) / (hat(W) @ W.T).sum(1), "signs must not cancel"),
        (lambda W: W.square().sum(1) / (hat(W) @ W.T).abs().sum(1), "not their sizes"),
        (lambda W: W.norm(dim=1) / (hat(W) @ W.T).square().sum(1), "*squared* length"),
        (
            lambda W: (
                W.square().sum(1)
                / ((hat(W) @ W.T).square().sum(1) - W.square().sum(1)).clamp(min=1e-9)
            ),
            "includes j = i",
        ),
    ],
)
def check_13(answer) -> None:
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    uneven = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.5]])
    got = answer(square)
    expect_shape(got, (4,))
    hat = uneven / uneven.norm(dim=1, keepdim=True)
    squares, cosines, dots = uneven.square().sum(1), hat @ hat.T, hat @ uneven.T
    others = (dots.square().sum(1) - squares).clamp(min=1e-9)
    result = answer(uneven)
    for mistake, message in (
        (1 / cosines.square().sum(1), "Normalise Ŵ_i only: a short W_j interferes less."),
        (squares / (uneven @ uneven.T).square().sum(1), "Ŵ_i is W_i divided by its length."),
        (squares / dots.sum(1), "Square the dot products before you sum: signs must not cancel."),
        (squares / dots.abs().sum(1), "Sum the squares of the dot products, not their sizes."),
        (squares / others, "The sum includes j = i: a feature alone has D = 1, not infinity."),
        (uneven.norm(dim=1) / dots.square().sum(1), "The numerator is the *squared* length."),
    ):
        close = torch.is_tensor(result) and result.shape == mistake.shape
        expect(not (close and torch.allclose(result.double(), mistake.double())), message)
    expect_close(got, [0.5] * 4, "Four features as two antipodal pairs should have 1/2 each.")
    expect_close(result, dimensionality(uneven), "Try W = [[2, 0], [-1, 1], [0, 0.5]] by hand.")


# -- 1.4 -------------------------------------------------------------------------------------

STUB_14 = '''\
def expected_interference(n, m, p):
    """The squared interference to expect on the read-out of one of n random unit vectors.

    They live in m dimensions, and each of the others is on (at 1) with probability p.
    """
    ...
'''


def expected_interference(n, m, p):
    """Each of n - 1 others is on with probability p and then adds 1/m."""
    return p * (n - 1) / m


@exercise(
    "1.4",
    title="Interference between random directions",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_14,
    reference=expected_interference,
    hints=[
        "The m squared components of a unit vector sum to 1. What is one of them on average?",
        "Turn the space until the vector that reads is the first axis: its dot product with "
        "another vector is that vector's first component.",
    ],
    wrong=[
        (lambda n, m, p: p * n / m, "n - 1 others"),
        (lambda n, m, p: (n - 1) / m, "use p"),
        (lambda n, m, p: p**2 * (n - 1) / m, "not p²"),
        (lambda n, m, p: p * (n - 1) / math.sqrt(m), "its square is 1/m"),
        (lambda n, m, p: p * (n - 1), "use m"),
    ],
)
def check_14(answer) -> None:
    n, m, p = 101, 25, 0.1
    got = float(answer(n, m, p))
    for mistake, message in (
        (p * n / m, "A feature does not interfere with itself: n - 1 others."),
        ((n - 1) / m, "Only those that are on interfere: use p."),
        (p**2 * (n - 1) / m, "A feature that is on is at 1, and so is its square: p, not p²."),
        (p * (n - 1) / math.sqrt(m), "1/√m is the typical dot product; its square is 1/m."),
        (p * (n - 1), "The more dimensions, the less two random directions overlap: use m."),
        (p * (n - 1) / m**2, "The *mean square* of a dot product is already 1/m, not 1/m²."),
    ):
        expect(not math.isclose(got, mistake, rel_tol=1e-6), message)
    expect_close(got, expected_interference(n, m, p), "For n = 101, m = 25, p = 0.1 expect 0.4.")
    expect_close(answer(2, 1, 1.0), 1.0, "Two directions of one dimension overlap fully.")


# -- 1.5 -------------------------------------------------------------------------------------

STUB_15 = '''\
def phase_transition(importance, densities):
    """At which densities 1 - S a trained model puts both features into its one dimension.

    importance  of the second feature; the first one has 1
    densities   numbers between 0 and 1, both excluded
    Train n = 2, m = 1 at every density; return a list of True and False, in the same order.
    """
    ...
'''


def phase_transition(importance, densities):
    """Train all densities at once; both features are in when the shorter row is not tiny."""
    sparsity = [1 - density for density in densities]
    toys = superposition.train(
        2,
        1,
        sparsity,
        importance=[1.0, importance],
        training=superposition.Training(restarts=8, steps=500, batch=64, lr=0.04),
    )
    length = toys.W.norm(dim=-1)  # (instances, 2)
    return (length.amin(1) > 0.5 * length.amax(1)).tolist()


def thresholded(importance, densities):
    """A wrong 1.5: any length above zero counts."""
    toys = superposition.train(
        2,
        1,
        [1 - d for d in densities],
        importance=[1, importance],
        training=superposition.Training(restarts=4, steps=200, lr=0.05),
    )
    return (toys.W.norm(dim=-1).amin(1) > 0).tolist()


def confused(importance, densities):
    """A wrong 1.5: the density is given for the sparsity."""
    return phase_transition(importance, [1 - density for density in densities])


@exercise(
    "1.5",
    title="An experiment: the phase transition",
    difficulty=3,
    importance=4,
    minutes=15,
    stub=STUB_15,
    reference=phase_transition,
    hints=[
        "`superposition.train(2, 1, [S, …], importance=[1, r], training=Training(restarts=8))` "
        "trains them all.",
        "`toys.W` has shape (instances, 2, 1). Which of the two lengths tells?",
        "A feature that was given up has a small length, not exactly zero: compare it with the "
        "other one.",
    ],
    wrong=[
        (thresholded, "a tiny length is noise"),
        (confused, "wrong way round"),
        (lambda importance, densities: [False for _ in densities], "No density"),
        (lambda importance, densities: 0.34, "one True or False per density"),
        (
            lambda importance, densities: phase_transition(importance, sorted(densities)),
            "keep the order",
        ),
    ],
)
def check_15(answer) -> None:
    densities = [0.9, 0.06, 0.7, 0.02, 0.1]
    got = answer(0.3, densities)
    if hasattr(got, "tolist"):
        got = got.tolist()
    expect(
        isinstance(got, (list, tuple)) and len(got) == len(densities),
        f"Return one True or False per density: a list of {len(densities)}.",
    )
    got = [bool(each) for each in got]
    critical = float(superposition.critical_density(0.3))
    want = [density < critical for density in densities]  # all are far from the boundary
    expect(not all(got), "Even dense data end in superposition: a tiny length is noise, not W_i.")
    expect(any(got), "No density ends in superposition: is one restart stuck, or S = 1 - density?")
    backwards = [not each for each in want]
    expect(got != backwards, "It is the wrong way round: `train` takes the sparsity 1 - density.")
    expect(
        got != sorted(want) and got != sorted(want, reverse=True),
        "The right number, in the wrong order: keep the order of `densities`.",
    )
    expect(got == want, f"For the densities {densities} expect {want}, and you found {got}.")
    expect(
        [bool(each) for each in answer(3.0, [0.9, 0.05])] == [False, True],
        "With importance 3 the second feature wins when dense: look at the *shorter* row of W.",
    )


# -- 1.6 -------------------------------------------------------------------------------------

STUB_16 = '''\
def at_least(m, epsilon, too_close):
    """How many directions fit into m dimensions for certain, with every |cos| ≤ epsilon.

    too_close  a function (m, epsilon) -> P(|cos| > epsilon) of a random direction with a given one
    Use the counting argument, and what an orthonormal basis gives; return the larger.
    """
    ...
'''


def at_least(m, epsilon, too_close):
    """While n P < 1 there is room for one more, so n reaches 1/P; a basis gives m."""
    return max(m, 1 / too_close(m, epsilon))


@exercise(
    "1.6",
    title="Packing: a lower bound",
    difficulty=3,
    importance=3,
    minutes=15,
    stub=STUB_16,
    reference=at_least,
    hints=[
        "Around each direction lies a forbidden region of share P. What share do n of them "
        "cover at most?",
        "As long as they cover less than everything, one more direction fits.",
        "In few dimensions P is large and the argument is weak: then the basis is better.",
    ],
    wrong=[
        (lambda m, epsilon, too_close: too_close(m, epsilon), "chance P itself"),
        (lambda m, epsilon, too_close: 1 / too_close(m, epsilon), "take the larger"),
        (lambda m, epsilon, too_close: m / too_close(m, epsilon), "do not multiply"),
        (
            lambda m, epsilon, too_close: max(m, math.sqrt(2 / too_close(m, epsilon))),
            "birthday bound",
        ),
        (lambda m, epsilon, too_close: m, "1/P is"),
    ],
)
def check_16(answer) -> None:
    too_close = packing.chance_too_close
    small, wide = (float(answer(m, 0.1, too_close)) for m in (50, 4000))
    P = too_close(4000, 0.1)
    for mistake, message in (
        (P, "That is the chance P itself: how many regions of share P cover the whole sphere?"),
        (4000 / P, "The basis and the argument do not multiply: each gives a number on its own."),
        (
            math.sqrt(2 / P),
            "That is the birthday bound, for all pairs drawn at once. One by one does better: "
            "only the new direction must avoid the others.",
        ),
        (1 / P**2, "Once is enough: n regions of share P cover at most n P."),
    ):
        expect(not math.isclose(wide, mistake, rel_tol=1e-3), message)
    expect(small >= 49.99, "In 50 dimensions an orthonormal basis has 50: take the larger.")
    expect(small < 50.01, "In 50 dimensions the counting gives less than the basis' 50.")
    expect(abs(wide * P - 1) < 1e-3, f"In 4000 dimensions 1/P is {1 / P:.3g}; you say {wide:.3g}.")


# -- 1.7 -------------------------------------------------------------------------------------

STUB_17 = '''\
def quadratic_phases(p):
    """p² unit vectors in 2p dimensions with every |cos| ≤ 1/√p, for an odd prime p: (p², 2p).

    Vector (a, b) has at place t = 0 … p - 1 the complex number exp(2πi (a t + b t²) / p) / √p.
    Put the p real parts first, then the p imaginary parts.
    """
    ...
'''


def quadratic_phases(p):
    """All pairs (a, b) at once."""
    t = torch.arange(p)
    a, b = torch.cartesian_prod(t, t).T[..., None]  # (p², 1) each
    angle = 2 * math.pi * ((a * t + b * t**2) % p) / p  # (p², p)
    return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(p)


def linear_phases(p):
    """A wrong 1.7: t stands where t² should."""
    t = torch.arange(p)
    a, b = torch.cartesian_prod(t, t).T[..., None]
    angle = 2 * math.pi * ((a + b) * t % p) / p
    return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(p)


def one_parameter(p):
    """A wrong 1.7: only b varies."""
    t = torch.arange(p)
    angle = 2 * math.pi * (t[:, None] * t**2 % p) / p
    return torch.cat([angle.cos(), angle.sin()], dim=1) / math.sqrt(p)


def random_rows(n, m):
    """n random unit vectors, the same every time."""
    V = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    return V / V.norm(dim=1, keepdim=True)


@exercise(
    "1.7",
    title="Packing: a construction",
    difficulty=4,
    importance=2,
    minutes=20,
    stub=STUB_17,
    reference=quadratic_phases,
    hints=[
        "`torch.cartesian_prod(t, t)` lists all pairs (a, b), with t = torch.arange(p).",
        "The angle of vector (a, b) at place t is 2π (a t + b t²) / p.",
        "The real part is the cosine of the angle, the imaginary part its sine.",
    ],
    wrong=[
        (one_parameter, "There are p vectors"),
        (linear_phases, "Two vectors are the same"),
        (lambda p: quadratic_phases(p) * math.sqrt(p), "Divide by √p"),
        (lambda p: quadratic_phases(p)[:, :p], "imaginary parts are missing"),
        (lambda p: random_rows(p * p, 2 * p), "more than 1/√11"),
    ],
)
def check_17(answer) -> None:
    p = 11
    V = answer(p)
    expect(hasattr(V, "shape"), "Return a tensor of shape (p², 2p).")
    if tuple(V.shape) == (p, 2 * p):
        raise Wrong("There are p vectors: let both a and b run through 0 … p - 1.")
    if tuple(V.shape) == (p * p, p):
        raise Wrong("Each vector has p numbers: the imaginary parts are missing.")
    expect_shape(V, (p * p, 2 * p))
    V = V.double()
    expect(
        bool(torch.allclose(V.norm(dim=1), torch.ones(p * p).double(), atol=1e-4)),
        f"The vectors should have length 1; the first has {V[0].norm():.2f}. Divide by √p.",
    )
    apart = packing.largest_cosine(V)
    expect(
        apart < 0.999,
        "Two vectors are the same: without the square of t, a and b give no more than p.",
    )
    expect(
        apart < 1 / math.sqrt(p) + 1e-3,
        f"Two vectors have |cos| = {apart:.2f}, more than 1/√{p}: is the angle 2π(a t + b t²)/p?",
    )


# -- 1.8 -------------------------------------------------------------------------------------

STUB_18 = '''\
def search(n, m, epsilon):
    """n unit vectors in m dimensions with every |cos| ≤ epsilon, found by gradient descent: (n, m).

    Start from random directions and push apart those that are too close.
    """
    ...
'''


def search(n, m, epsilon):
    """Adam on the squares of what is too much, with autograd; normalised inside the loss."""
    torch.manual_seed(0)
    V = torch.randn(n, m, requires_grad=True)
    optimizer = torch.optim.Adam([V], lr=0.02)
    for _ in range(2000):
        unit = V / V.norm(dim=1, keepdim=True)
        cosine = (unit @ unit.T - torch.eye(n)).abs()
        if cosine.max() <= epsilon:
            break
        loss = (cosine - 0.99 * epsilon).clamp(min=0).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unit.detach()


def softly(n, m, epsilon):
    """A wrong 1.8: pushes all pairs apart alike, and so never gets the worst ones below."""
    torch.manual_seed(0)
    V = torch.randn(n, m, requires_grad=True)
    for _ in range(200):
        unit = V / V.norm(dim=1, keepdim=True)
        (gradient,) = torch.autograd.grad((unit @ unit.T).square().sum(), V)
        V = (V - 0.1 * gradient).detach().requires_grad_()
    return V.detach() / V.detach().norm(dim=1, keepdim=True)


def repelled_by_sign(n, m, epsilon):
    """A wrong 1.8: half of the vectors are the others' opposites."""
    half = torch.randn(n // 2, m, generator=torch.Generator().manual_seed(0))
    V = torch.cat([half, -half])
    return V / V.norm(dim=1, keepdim=True)


@exercise(
    "1.8",
    title="Packing: a search",
    difficulty=4,
    importance=3,
    minutes=20,
    stub=STUB_18,
    reference=search,
    hints=[
        "Normalise the rows inside the loop, so that the optimizer is free to change lengths.",
        "A loss for pairs that are too close: the sum of (|cos| - ε)² where that is positive.",
        "Adam with a learning rate of 0.02 needs some hundred steps for 52 vectors in 40 "
        "dimensions; stop when the largest |cos| is small enough.",
    ],
    wrong=[
        (lambda n, m, epsilon: random_rows(n, m), "as in random directions"),
        (lambda n, m, epsilon: 0.1 * search(n, m, epsilon), "should have length 1"),
        (lambda n, m, epsilon: torch.eye(m)[torch.arange(n) % m], "the same vector"),
        (repelled_by_sign, "Two rows are opposite"),
        (softly, "take more steps"),
    ],
)
@on_one_core
def check_18(answer) -> None:
    n, m, epsilon = 52, 40, 0.1
    V = answer(n, m, epsilon)
    expect_shape(V, (n, m))
    V = V.detach().double()
    lengths = V.norm(dim=1)
    expect(
        bool(torch.allclose(lengths, torch.ones(n).double(), atol=1e-3)),
        "The vectors should have length 1: short ones have small dot products, not small cosines.",
    )
    dots = (V @ V.T).fill_diagonal_(0)
    expect(
        dots.max().item() < 0.99,
        "Two rows are the same vector. A basis has m directions only; the others must be new.",
    )
    expect(
        dots.min().item() > -0.99,
        "Two rows are opposite: |cos| is 1. Push by the size of the dot product, not its sign.",
    )
    apart = dots.abs().max().item()
    expect(
        apart < 0.4,
        f"The largest |cos| is {apart:.2f}, as in random directions: was anything pushed apart?",
    )
    expect(
        apart <= epsilon + 1e-4,
        f"The largest |cos| is {apart:.3f}, which is close: take more steps, and let the push grow "
        "with the excess over epsilon, so that the worst pairs move most.",
    )
