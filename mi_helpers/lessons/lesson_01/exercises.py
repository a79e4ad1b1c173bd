"""The exercises of lesson 01, toy superposition, its predictions, and its investigation."""

import functools
from collections.abc import Callable

import torch

from mi_helpers.course.check import (
    Wrong,
    agree,
    as_numbers,
    describe,
    draws,
    exercise,
    expect,
    expect_shape,
)
from mi_helpers.course.investigate import investigation, plain
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_01 import experiments as superposition
from mi_helpers.lessons.lesson_01 import geometry, phases
from mi_helpers.lessons.lesson_01.experiments import Training

CUT = (
    "The numbers are right, but no gradient gets through, and this is to be trained: "
    "stay with torch's operations, without `.item()`, `.detach()` or NumPy."
)


def trains(answer, reference, given: tuple, parts: tuple[int, ...]) -> None:
    """Raise `Wrong` unless a result has the reference's gradients by some of its arguments."""
    slopes = []
    for function in (reference, answer):
        own = [each.clone().requires_grad_(i in parts) for i, each in enumerate(given)]
        try:
            result = function(*own)
        except Exception:
            raise Wrong(CUT) from None  # it is right without gradients: NumPy refuses them
        expect(getattr(result, "requires_grad", False), CUT)
        wanted = [own[i] for i in parts]
        slopes.append(torch.autograd.grad(result.sum(), wanted, allow_unused=True))
    for want, got in zip(*slopes, strict=True):
        expect(got is not None and torch.allclose(got, want, atol=1e-4, rtol=1e-3), CUT)


# -- 1.1 -------------------------------------------------------------------------------------

STUB_11 = '''\
def reconstruct(x, W, b):
    """x̂ for every row of a batch, in torch, so that it can be trained.

    x (batch, n_features), W (n_features, n_hidden), b (n_features,)
    """
    ...
'''


def reconstruct(x, W, b):
    """Rows are examples, so h = x W, and x̂ = ReLU(h W^T + b)."""
    return torch.relu(x @ W @ W.T + b)


def in_numpy(x, W, b):
    """A wrong 1.1: right numbers that cannot be trained."""
    x, W, b = x.numpy(), W.numpy(), b.numpy()
    return (x @ W @ W.T + b).clip(min=0)


@exercise(
    "1.1",
    title="The toy model",
    difficulty=1,
    importance=5,
    minutes=3,
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
        (lambda x, W, b: torch.relu(x @ W), "has shape"),
        (lambda x, W, b: torch.relu(x @ W @ W.T - b), "Add the bias"),
        (in_numpy, "no gradient"),
    ],
    right=[
        lambda x, W, b: (W @ (W.T @ x.T)).T.add(b[None]).clamp(min=0),
        lambda x, W, b: (
            torch.einsum("bi,ih,jh->bj", x.double(), W.double(), W.double()).add(b).relu()
        ),
        lambda x, W, b: torch.stack([torch.relu(W @ (W.T @ row) + b) for row in x]),
    ],
)
def check_11(answer) -> None:
    agree(
        answer,
        reconstruct,
        lambda draw: (draw.normal("batch", "n"), draw.normal("n", "m"), draw.normal("n")),
        mistakes=[
            (
                lambda x, W, b: x @ W @ W.T + b,
                "Negative numbers come out, but features are never negative: a ReLU?",
            ),
            (
                lambda x, W, b: torch.relu(x @ W @ W.T),
                "The bias is missing: without it a read-out cannot be shifted.",
            ),
            (
                lambda x, W, b: torch.relu(x @ W @ W.T) + b,
                "Add the bias before the ReLU, so that it sets a threshold.",
            ),
            (
                lambda x, W, b: torch.relu(torch.relu(x @ W) @ W.T + b),
                "The hidden layer h is linear: one ReLU only.",
            ),
            (lambda x, W, b: torch.relu(x @ W @ W.T - b), "Add the bias, do not subtract it."),
        ],
        otherwise="Compare with the formula for x̂ for one row of x, worked out by hand.",
    )
    for draw in draws(1):
        given = draw.normal("batch", "n"), draw.normal("n", "m"), draw.normal("n")
        trains(answer, reconstruct, given, (1, 2))


# -- 1.2 -------------------------------------------------------------------------------------

STUB_12 = '''\
def weighted_loss(x, x_hat, importance):
    """One number, in torch: each example's squared errors, weighted and summed; the batch's mean.

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
    minutes=3,
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
        (lambda x, x_hat, importance: (importance * (x - x_hat) ** 2).sum(-1), "has shape"),
        (lambda x, x_hat, i: weighted_loss(x, x_hat, i).item(), "no gradient"),
    ],
    right=[
        lambda x, x_hat, importance: ((x - x_hat) ** 2 @ importance).mean(),
        lambda x, x_hat, i: torch.einsum("bi,i->", (x - x_hat).double() ** 2, i.double()) / len(x),
        lambda x, x_hat, i: sum((i * (a - c) ** 2).sum() for a, c in zip(x, x_hat)) / len(x),  # noqa: B905
    ],
)
def check_12(answer) -> None:
    agree(
        answer,
        weighted_loss,
        lambda draw: (draw.normal("batch", "n"), draw.normal("batch", "n"), draw.positive("n")),
        mistakes=[
            (
                lambda x, x_hat, importance: ((x - x_hat) ** 2).sum(-1).mean(),
                "All features count the same: where is the importance?",
            ),
            (
                lambda x, x_hat, importance: (importance * (x - x_hat) ** 2).mean(),
                "The formula *sums* over features; the mean is for rows.",
            ),
            (
                lambda x, x_hat, importance: (importance * (x - x_hat) ** 2).sum(),
                "Average over the batch, or a larger batch costs more.",
            ),
            (
                lambda x, x_hat, importance: ((importance * (x - x_hat)) ** 2).sum(-1).mean(),
                "The importance is squared: weight (x - x̂)².",
            ),
            (
                lambda x, x_hat, importance: (importance * (x - x_hat).abs()).sum(-1).mean(),
                "These are absolute errors: square them.",
            ),
        ],
        otherwise="Work out a batch of one row by hand.",
    )
    for draw in draws(1):
        given = draw.normal("batch", "n"), draw.normal("batch", "n"), draw.positive("n")
        trains(answer, weighted_loss, given, (1,))


# -- 1.3 -------------------------------------------------------------------------------------

STUB_13 = '''\
def training_step(W, b, x, importance, optimizer):
    """One step of gradient descent on the toy model's loss, by autograd.

    W (n_features, n_hidden) and b (n_features,) require gradients, and `optimizer` moves them.
    x (batch, n_features), importance (n_features,). Returns the loss before the step.
    """
    ...
'''


def training_step(W, b, x, importance, optimizer):
    """Forward, old gradients away, backward, step."""
    loss = weighted_loss(x, reconstruct(x, W, b), importance)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def without_clearing(W, b, x, importance, optimizer):
    """A wrong 1.3: gradients of all steps add up."""
    loss = weighted_loss(x, reconstruct(x, W, b), importance)
    loss.backward()
    optimizer.step()
    return loss.item()


def without_step(W, b, x, importance, optimizer):
    """A wrong 1.3: nothing moves."""
    loss = weighted_loss(x, reconstruct(x, W, b), importance)
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


def loss_afterwards(W, b, x, importance, optimizer):
    """A wrong 1.3: the loss is that of the moved weights."""
    training_step(W, b, x, importance, optimizer)
    return weighted_loss(x, reconstruct(x, W, b), importance).item()


def unweighted(W, b, x, importance, optimizer):
    """A wrong 1.3: every feature counts the same."""
    return training_step(W, b, x, torch.ones_like(importance), optimizer)


def with_another_optimizer(W, b, x, importance, optimizer):
    """A wrong 1.3: it makes an optimizer of its own, anew at every step."""
    return training_step(W, b, x, importance, torch.optim.Adam([W, b], lr=0.01))


def cleared_at_the_end(W, b, x, importance, optimizer):
    """A right 1.3: the gradients are cleared for the next step; the loss is a tensor."""
    loss = weighted_loss(x, reconstruct(x, W, b), importance)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def by_grad(W, b, x, importance, optimizer):
    """A right 1.3: gradients by `torch.autograd.grad`, put where the optimizer looks."""
    error = torch.relu(x @ W @ W.T + b) - x
    loss = (error.square() * importance).sum() / len(x)
    W.grad, b.grad = torch.autograd.grad(loss, [W, b])
    optimizer.step()
    return loss.item()


def a_run(step, W, b, batches, importance, made) -> tuple[list, torch.Tensor, torch.Tensor]:
    """What a step returns over some batches, and W and b after them, from a copy of both."""
    W, b = (each.clone().requires_grad_() for each in (W, b))
    optimizer = made([W, b])
    losses = [step(W, b, x, importance, optimizer) for x in batches]
    return losses, W.detach(), b.detach()


OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


def case_13(draw) -> tuple:
    """A model with its batches, and how its optimizer is made."""
    W, b = draw.normal("n", "m", scale=0.5), draw.normal("n", scale=0.2)
    batches = [draw.positive("batch", "n", high=1.0) for _ in range(4)]
    kind, lr = OPTIMIZERS[draw.choice(OPTIMIZERS)], draw.number(0.003, 0.02)
    return W, b, batches, draw.positive("n"), lambda parts: kind(parts, lr=lr)


def equal_runs(one: tuple, other: tuple, losses: bool = True) -> bool:
    """Whether two runs have the same weights, and the same losses if these count."""
    pairs = [(one[1], other[1]), (one[2], other[2])]
    pairs += [(torch.tensor(one[0]), torch.tensor(other[0]))] if losses else []
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in pairs)


@exercise(
    "1.3",
    title="The training step",
    difficulty=2,
    importance=5,
    minutes=6,
    stub=STUB_13,
    reference=training_step,
    copies=False,
    hints=[
        "Two calls give the loss: your `reconstruct`, then your `weighted_loss`.",
        "Autograd *adds* to what `W.grad` holds: the optimizer has a method that clears it.",
        "`loss.backward()` fills the gradients, `optimizer.step()` moves W and b.",
    ],
    wrong=[
        (without_clearing, "add up"),
        (without_step, "did not move"),
        (loss_afterwards, "*before* the step"),
        (unweighted, "importance"),
        (with_another_optimizer, "optimizer that is given"),
        (lambda W, b, x, importance, optimizer: "done", "Return the loss"),
    ],
    right=[cleared_at_the_end, by_grad],
)
def check_13(answer) -> None:
    for draw in draws(3):
        case = case_13(draw)
        got, want = a_run(answer, *case), a_run(training_step, *case)
        try:
            got = as_numbers(got[0]).tolist(), *got[1:]
        except (TypeError, ValueError):
            raise Wrong(f"Return the loss, one number, not {describe(got[0][0])}.") from None
        expect_shape(got[0], (4,), "What four steps return, side by side,")
        expect(not torch.equal(got[1], case[0]), "W did not move: does the optimizer step?")
        for mistake, message in (
            (without_clearing, "The gradients of all steps add up: clear them before each one."),
            (unweighted, "Every feature counts the same: pass the importance to the loss."),
            (with_another_optimizer, "Use the optimizer that is given: it remembers past steps."),
        ):
            expect(not equal_runs(got, a_run(mistake, *case), losses=False), message)
        expect(equal_runs(got, want, losses=False), "W and b are elsewhere after four steps.")
        expect(equal_runs(got, want), "W and b are right: return the loss *before* the step.")


# -- 1.4 -------------------------------------------------------------------------------------

STUB_14 = '''\
def held_by_the_best(W, loss):
    """How many features the best restart holds at each sparsity: one whole number for each.

    W (sparsities, restarts, n_features, n_hidden), loss (sparsities, restarts)
    The best restart has the lowest loss; a feature is held when its direction is longer than 1/2.
    """
    ...
'''


def held_by_the_best(W, loss):
    """The lengths of the rows of the restart of lowest loss, counted above 1/2."""
    best = loss.argmin(dim=1)
    lengths = W[torch.arange(len(W)), best].norm(dim=-1)
    return (lengths > 0.5).sum(dim=-1)


@exercise(
    "1.4",
    title="The best of many runs",
    difficulty=2,
    importance=3,
    minutes=5,
    stub=STUB_14,
    reference=held_by_the_best,
    hints=[
        "`loss.argmin(dim=1)` numbers the best restart of each sparsity.",
        "`W[torch.arange(len(W)), best]` takes another restart from each row.",
        "`.norm(dim=-1)` of the rows of W, compared with 1/2, then counted.",
    ],
    wrong=[
        (lambda W, loss: (W[:, 0].norm(dim=-1) > 0.5).sum(-1), "first restart"),
        (lambda W, loss: held_by_the_best(W, -loss), "highest loss"),
        (lambda W, loss: (W.norm(dim=-1) > 0.5).sum(-1).amax(1), "most features"),
        (lambda W, loss: (W[:, loss.sum(0).argmin()].norm(dim=-1) > 0.5).sum(-1), "Each sparsity"),
        (lambda W, loss: held_by_the_best(W * 0.5, loss), "longer than 1/2"),
        (lambda W, loss: held_by_the_best(W, loss).sum(), "has shape"),
    ],
    right=[
        lambda W, loss: [
            sum(float((row**2).sum()) > 0.25 for row in runs[int(each.argmin())])
            for runs, each in zip(W, loss, strict=True)
        ],
        lambda W, loss: (
            (W.numpy() ** 2).sum(-1)[range(len(W)), loss.numpy().argmin(1)] > 0.25
        ).sum(1),
    ],
    survivors={
        "lengths > 0.5 → lengths >= 0.5": "no direction that is drawn or trained has length 1/2",
    },
)
def check_14(answer) -> None:
    agree(
        answer,
        held_by_the_best,
        lambda draw: (
            draw.normal("sparsities", "restarts", "n", "m", scale=0.25),
            draw.positive("sparsities", "restarts"),
        ),
        mistakes=[
            (
                lambda W, loss: (W[:, 0].norm(dim=-1) > 0.5).sum(-1),
                "That is the first restart, not the one of lowest loss.",
            ),
            (
                lambda W, loss: held_by_the_best(W, -loss),
                "That is the restart of the highest loss: the best one has the lowest.",
            ),
            (
                lambda W, loss: (W.norm(dim=-1) > 0.5).sum(-1).amax(1),
                "That is the restart which holds the most features: the best has the lowest loss.",
            ),
            (
                lambda W, loss: (W[:, loss.sum(0).argmin()].norm(dim=-1) > 0.5).sum(-1),
                "Each sparsity has a best restart of its own.",
            ),
        ],
        otherwise="Count the directions that are longer than 1/2, in the best restart alone.",
    )


# -- 1.5 -------------------------------------------------------------------------------------

STUB_15 = '''\
def dimensionality(W):
    """The share of a dimension that each feature has to itself, (n_features,).

    Its own squared length, divided by the sum of the squares of all that is read along its unit
    direction: every feature's vector, itself included. W (n_features, n_hidden), no row is zero.
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
    "1.5",
    title="The share of a dimension",
    difficulty=2,
    importance=4,
    minutes=6,
    stub=STUB_15,
    reference=dimensionality,
    hints=[
        "`W.norm(dim=1, keepdim=True)` has the lengths of the rows, ready to divide by.",
        "`unit @ W.T` has Ŵ_i · W_j at row i, column j.",
        "Sum the squares along each row, and divide the squared length by it.",
    ],
    wrong=[
        (lambda W: 1 / (hat(W) @ hat(W).T).square().sum(1), "reads, Ŵ_i, alone"),
        (lambda W: W.square().sum(1) / (W @ W.T).square().sum(1), "divided by its length"),
        (lambda W: W.square().sum(1) / (hat(W) @ W.T).sum(1), "signs must not cancel"),
        (lambda W: W.square().sum(1) / (hat(W) @ W.T).abs().sum(1), "not their sizes"),
        (lambda W: W.norm(dim=1) / (hat(W) @ W.T).square().sum(1), "*squared* length"),
        (
            lambda W: (
                W.square().sum(1) / ((hat(W) @ W.T).square().sum(1) - W.square().sum(1)).clamp(1e-9)
            ),
            "itself included",
        ),
    ],
    right=[
        lambda W: [
            float(w @ w) / sum(float(w @ v) ** 2 / float(w @ w) for v in W.double())
            for w in W.double()
        ],
        lambda W: W.norm(dim=1) ** 4 / (W @ W.T).square().sum(0),
        lambda W: W.numpy().__pow__(2).sum(1) ** 2 / ((W @ W.T).numpy() ** 2).sum(1),
    ],
)
def check_15(answer) -> None:
    agree(
        answer,
        dimensionality,
        lambda draw: (draw.normal("n", "m") * draw.positive("n", 1),),
        mistakes=[
            (
                lambda W: 1 / (hat(W) @ hat(W).T).square().sum(1),
                "Normalise the direction that reads, Ŵ_i, alone: a short W_j interferes less.",
            ),
            (
                lambda W: W.square().sum(1) / (W @ W.T).square().sum(1),
                "Ŵ_i is W_i divided by its length.",
            ),
            (
                lambda W: W.square().sum(1) / (hat(W) @ W.T).sum(1),
                "Square the dot products before you sum: signs must not cancel.",
            ),
            (
                lambda W: W.square().sum(1) / (hat(W) @ W.T).abs().sum(1),
                "Sum the squares of the dot products, not their sizes.",
            ),
            (
                lambda W: W.norm(dim=1) / (hat(W) @ W.T).square().sum(1),
                "The numerator is the *squared* length.",
            ),
            (
                lambda W: (
                    W.square().sum(1)
                    / ((hat(W) @ W.T).square().sum(1) - W.square().sum(1)).clamp(1e-9)
                ),
                "The sum has the feature itself included: one that is alone has D = 1.",
            ),
        ],
        otherwise="Try W = [[2, 0], [-1, 1], [0, 0.5]] by hand: the first has D = 4/5.",
    )


# -- 1.6 -------------------------------------------------------------------------------------

STUB_16 = '''\
def interference(W, x):
    """How much the other features disturb the read-out of each one, (n_features,).

    The read-out is that before the bias and the ReLU; take away what the feature itself wrote.
    Return the mean square over the batch. W (n_features, n_hidden), x (batch, n_features)
    """
    ...
'''


def interference(W, x):
    """(W h)_i less x_i ‖W_i‖², squared, averaged over the examples."""
    own = x * W.square().sum(1)
    return (x @ W @ W.T - own).square().mean(0)


@exercise(
    "1.6",
    title="Interference, measured",
    difficulty=3,
    importance=4,
    minutes=7,
    stub=STUB_16,
    reference=interference,
    hints=[
        "`x @ W @ W.T` has the read-outs, (batch, n_features).",
        "Feature i writes x_i W_i, and reads itself along W_i: how much of the read-out is that?",
        "Average over the batch, axis 0: one number per feature stays.",
    ],
    wrong=[
        (lambda W, x: (x @ W @ W.T).square().mean(0), "what the feature itself wrote"),
        (lambda W, x: (x @ W @ W.T - x).square().mean(0), "not x_i alone"),
        (lambda W, x: (x @ W @ W.T - x * W.norm(dim=1)).square().mean(0), "squared length"),
        (lambda W, x: (x @ W @ W.T - x * W.square().sum(1)).square().mean(1), "has shape"),
        (lambda W, x: (x @ W @ W.T - x * W.square().sum(1)).abs().mean(0), "not the mean size"),
        (lambda W, x: (x @ W @ W.T - x * W.square().sum(1)).mean(0) ** 2, "before you average"),
        (
            lambda W, x: (torch.relu(x @ W @ W.T) - x * W.square().sum(1)).square().mean(0),
            "before the ReLU",
        ),
    ],
    right=[
        lambda W, x: (x.double() @ (W @ W.T).fill_diagonal_(0).double()).pow(2).mean(0),
        lambda W, x: [
            sum(
                sum(float(row[j] * (W[i] @ W[j])) for j in range(len(W)) if j != i) ** 2
                for row in x
            )
            / len(x)
            for i in range(len(W))
        ],
        lambda W, x: ((x @ (W @ W.T - torch.diag((W * W).sum(1)))).numpy() ** 2).mean(axis=0),
    ],
)
def check_16(answer) -> None:
    agree(
        answer,
        interference,
        lambda draw: (
            draw.normal("n", "m"),
            draw.positive("batch", "n", high=1.0) * draw.booleans("batch", "n"),
        ),
        mistakes=[
            (
                lambda W, x: (x @ W @ W.T).square().mean(0),
                "Take away what the feature itself wrote: that is signal.",
            ),
            (
                lambda W, x: (x @ W @ W.T - x).square().mean(0),
                "A feature of length ‖W_i‖ reads itself as x_i ‖W_i‖², not x_i alone.",
            ),
            (
                lambda W, x: (x @ W @ W.T - x * W.norm(dim=1)).square().mean(0),
                "It is written with length ‖W_i‖ and read with it again: take the squared length.",
            ),
            (
                lambda W, x: (x @ W @ W.T - x * W.square().sum(1)).abs().mean(0),
                "Return the mean square, not the mean size.",
            ),
            (
                lambda W, x: (x @ W @ W.T - x * W.square().sum(1)).mean(0) ** 2,
                "Square before you average: interference of both signs must not cancel.",
            ),
            (
                lambda W, x: (torch.relu(x @ W @ W.T) - x * W.square().sum(1)).square().mean(0),
                "Take the read-out before the ReLU.",
            ),
        ],
        otherwise="Try one example with two features present: what lands on a third?",
    )


# -- 1.7 -------------------------------------------------------------------------------------

STUB_17 = '''\
def random_interference(n, m, p):
    """The squared interference to expect on the read-out of one of n random unit vectors.

    They live in m dimensions, and each feature is present (at 1) with probability p, else at 0.
    """
    ...
'''


def random_interference(n, m, p):
    """Each of n - 1 others is present with probability p and then adds 1/m."""
    return p * (n - 1) / m


@exercise(
    "1.7",
    title="Interference, foreseen",
    difficulty=2,
    importance=4,
    minutes=5,
    stub=STUB_17,
    reference=random_interference,
    hints=[
        "The m squared components of a unit vector sum to 1. What is one of them on average?",
        "Turn the space until the vector that reads is the first axis: its dot product with "
        "another vector is that vector's first component.",
        "Dot products are as often negative as positive, so the mixed terms cancel on average.",
    ],
    wrong=[
        (lambda n, m, p: p * n / m, "n - 1 others"),
        (lambda n, m, p: (n - 1) / m, "use p"),
        (lambda n, m, p: p**2 * (n - 1) / m, "not p²"),
        (lambda n, m, p: p * (n - 1) / m**0.5, "its square is 1/m"),
        (lambda n, m, p: p * (n - 1), "use m"),
        (lambda n, m, p: p * (n - 1) / m**2, "already 1/m"),
        (lambda n, m, p: p * (n - m) / m, "random, not arranged"),
    ],
    right=[
        lambda n, m, p: torch.tensor((n - 1) * p / m, dtype=torch.float64),
        lambda n, m, p: sum(p / m for _ in range(n - 1)),
    ],
)
def check_17(answer) -> None:
    agree(
        answer,
        random_interference,
        lambda draw: (draw.integer(20, 90), draw.integer(4, 15), draw.number(0.05, 0.9)),
        mistakes=[
            (
                lambda n, m, p: p * n / m,
                "A feature does not interfere with itself: n - 1 others.",
            ),
            (lambda n, m, p: (n - 1) / m, "Only those that are present interfere: use p."),
            (
                lambda n, m, p: p**2 * (n - 1) / m,
                "A feature that is present is at 1, and so is its square: p, not p².",
            ),
            (
                lambda n, m, p: p * (n - 1) / m**0.5,
                "1/√m is the typical dot product; its square is 1/m.",
            ),
            (
                lambda n, m, p: p * (n - 1),
                "The more dimensions, the less two random directions overlap: use m.",
            ),
            (
                lambda n, m, p: p * (n - 1) / m**2,
                "The *mean square* of a dot product is already 1/m, not 1/m².",
            ),
            (
                lambda n, m, p: p * (n - m) / m,
                "That holds for directions spread evenly: these are random, not arranged.",
            ),
        ],
        otherwise="Two directions in one dimension overlap fully: n = 2, m = 1 gives p.",
    )


# -- 1.8 -------------------------------------------------------------------------------------

STUB_18 = '''\
def loss_of_the_pair(q, r):
    """The expected loss of two opposite features, W = (1, -1) and b = 0, in one dimension.

    q  the density of both; a feature that is present is uniform in [0, 1]
    r  the importance of the second feature; the first has 1
    """
    ...
'''


def loss_of_the_pair(q, r):
    """Only where both are present is anything misread: each by the smaller of the two."""
    return q**2 * (1 + r) / 6


@exercise(
    "1.8",
    title="What an opposite pair costs",
    difficulty=3,
    importance=4,
    minutes=8,
    stub=STUB_18,
    reference=loss_of_the_pair,
    hints=[
        "Go through the four cases: none present, the first, the second, both. Which are misread?",
        "If both are present, the larger is read as the difference, the smaller as 0: each is off "
        "by the smaller of the two.",
        "The smaller of two uniform numbers exceeds t with probability (1 - t)², so the mean of "
        "its square is ∫ 2t (1 - t)² dt from 0 to 1.",
    ],
    wrong=[
        (lambda q, r: q**2 * (1 + r) / 3, "smaller of the two"),
        (lambda q, r: q * (1 + r) / 6, "both are present"),
        (lambda q, r: q**2 / 6, "weighted by r"),
        (lambda q, r: q**2 * r / 6, "The first feature"),
        (lambda q, r: q**2 * (1 + r) / 9, "square of its mean"),
        (lambda q, r: 2 * q * (1 - q) * (1 + r) / 6, "Where only one"),
        (lambda q, r: q**2 * (1 + r) / 2, "the larger of the two"),
    ],
    right=[
        lambda q, r: (1 - (1 - q)) ** 2 / 6 + r * q * q / 6,
        lambda q, r: torch.as_tensor(q, dtype=torch.float64) ** 2 * (1 + r) * 0.5 / 3,
    ],
)
def check_18(answer) -> None:
    agree(
        answer,
        loss_of_the_pair,
        lambda draw: (draw.number(0.3, 0.95), draw.number(0.3, 3.0)),
        mistakes=[
            (
                lambda q, r: q**2 * (1 + r) / 3,
                "1/3 is the mean square of *one* uniform number: each is off by the smaller of "
                "the two.",
            ),
            (
                lambda q, r: q * (1 + r) / 6,
                "Anything is misread only if both are present: how likely is that?",
            ),
            (lambda q, r: q**2 / 6, "The second feature's error counts too, weighted by r."),
            (lambda q, r: q**2 * r / 6, "The first feature's error counts too, with weight 1."),
            (
                lambda q, r: q**2 * (1 + r) / 9,
                "1/9 is the square of its mean: take the mean of its square.",
            ),
            (
                lambda q, r: 2 * q * (1 - q) * (1 + r) / 6,
                "Where only one is present, it is read perfectly and the ReLU clears the other.",
            ),
            (
                lambda q, r: q**2 * (1 + r) / 2,
                "1/2 is the mean square of the larger of the two: each is off by the smaller.",
            ),
        ],
        otherwise="Simulate it: draw the two features 100,000 times and average the loss.",
        tolerance=1e-4,
    )


# -- 1.9 -------------------------------------------------------------------------------------

STUB_19 = '''\
def second_feature(densities, importance):
    """|w₂| of a trained model with n = 2, m = 1, at each density: a list.

    densities   numbers q = 1 - S between 0 and 1
    importance  of the second feature; the first has 1
    Train with `superposition.train(2, 1, [S, …], importance=…, training=PHASE)`.
    """
    ...
'''

PHASE = phases.PHASE


def second_feature(densities, importance):
    """All densities in one run; W is (instances, 2, 1)."""
    sparsity = [1 - density for density in densities]
    toys = superposition.train(2, 1, sparsity, importance=[1, importance], training=PHASE)
    return toys.W[:, 1, 0].abs().tolist()


def signed(densities, importance):
    """A wrong 1.9: the sign stays, which is a matter of luck."""
    sparsity = [1 - density for density in densities]
    toys = superposition.train(2, 1, sparsity, importance=[1, importance], training=PHASE)
    return toys.W[:, 1, 0].tolist()


def one_by_one(densities, importance):
    """A right 1.9: a training for each density, as an array, with other settings."""
    W = [
        superposition.train(
            2,
            1,
            1 - q,
            importance=torch.tensor([1, importance]),
            training=Training(8, 400, lr=0.04),
        ).W[0]
        for q in densities
    ]
    return torch.stack(W)[:, 1].norm(dim=-1).numpy()


@exercise(
    "1.9",
    title="An experiment: the second feature",
    difficulty=3,
    importance=4,
    minutes=6,
    stub=STUB_19,
    reference=second_feature,
    seconds=40.0,
    hints=[
        "`train` takes sparsities: 1 - q for each density.",
        "`importance=[1, importance]`: one number per feature.",
        "`toys.W` has shape (instances, 2, 1): the second feature is `toys.W[:, 1, 0]`.",
    ],
    wrong=[
        (lambda qs, r: second_feature([1 - q for q in qs], r), "wrong way round"),
        (signed, "without its sign"),
        (lambda qs, r: second_feature(sorted(qs), r), "keep the order of"),
        (lambda qs, r: second_feature(qs, 1.0), "importance of both"),
        (lambda qs, r: 0.5, "one number per density"),
    ],
    right=[one_by_one],
)
def check_19(answer) -> None:
    for draw in draws(2):
        r = draw.choice([0.1, 0.2, 0.4])
        critical = float(phases.critical_density(r))
        tiny, low, high = 0.1 * critical, 0.75 * critical, 1.4 * critical
        densities = draw.choice([[tiny, high, low], [high, low, tiny], [low, high, tiny]])
        got = answer(list(densities), r)
        try:
            numbers = as_numbers(got)
        except (TypeError, ValueError):
            raise Wrong(f"Return a list of numbers, not {describe(got)}.") from None
        expect(numbers.shape == (3,), "Return one number per density, in a list.")
        judge_19(numbers, densities, r)


def judge_19(got, densities: list[float], r: float) -> None:
    """Raise `Wrong` with what is mistaken in |w₂| at three densities; trainings differ by 0.12."""

    def is_of(places: list[float]) -> bool:
        return abs(got - as_numbers(second_feature(places, r))).max() <= 0.12

    if is_of(densities):
        return
    expect((got >= 0).all(), "Return |w₂|, the length without its sign, which is a matter of luck.")
    for mistaken, message in (
        (
            [1 - q for q in densities],
            "It is the wrong way round: `train` takes the sparsity 1 - q.",
        ),
        (sorted(densities), "The right numbers: keep the order of densities."),
    ):
        expect(not is_of(mistaken), message)
    expect((got > 0.5).any(), "The second feature is nowhere: keep the best of several restarts.")
    expect(
        (got < 0.5).any(),
        "It is in even far above the line: does `train` know the importance of both features, and "
        "is this the second one?",
    )
    raise Wrong("At one of the densities |w₂| is another: keep the best of several restarts.")


# -- 1.10 ------------------------------------------------------------------------------------

STUB_110 = '''\
def opposites(W):
    """Which feature each one is most opposed to: the other end of the smallest cosine.

    W (n_features, n_hidden), no row is zero; returns (n_features,) whole numbers
    """
    ...
'''


def opposites(W):
    """The column of the smallest cosine in every row."""
    unit = W / W.norm(dim=1, keepdim=True)
    return (unit @ unit.T).argmin(1)


@exercise(
    "1.10",
    title="Who is whose opposite",
    difficulty=2,
    importance=3,
    minutes=3,
    stub=STUB_110,
    reference=opposites,
    hints=[
        "A cosine is the dot product of two vectors of length 1.",
        "Opposite directions have a cosine of -1: look for the smallest, not the largest.",
    ],
    wrong=[
        (lambda W: (W @ W.T).argmin(1), "long vector"),
        (lambda W: (hat(W) @ hat(W).T).argmax(1), "with itself"),
        (lambda W: (hat(W) @ hat(W).T).abs().argmin(1), "right angle"),
        (lambda W: (hat(W) @ hat(W).T).amin(1), "which one it is"),
        (lambda W: (hat(W) @ hat(W).T).abs().fill_diagonal_(0).argmax(1), "keep the sign"),
    ],
    right=[
        lambda W: [min(range(len(W)), key=lambda j, w=w: float(w @ W[j] / W[j].norm())) for w in W],
        lambda W: torch.cosine_similarity(W[:, None], W[None], dim=-1).min(dim=0).indices.numpy(),
        lambda W: torch.cdist(hat(W).double(), hat(W).double()).argmax(1),
    ],
    survivors={
        "(unit @ unit.T).argmin(1) → (unit @ unit.T).argmin(0)": "the cosines are symmetric",
    },
)
def check_110(answer) -> None:
    agree(
        answer,
        opposites,
        lambda draw: (draw.normal("n", "m") * draw.positive("n", 1, low=0.05, high=20),),
        mistakes=[
            (
                lambda W: (W @ W.T).argmin(1),
                "A long vector wins by its length: divide by the lengths.",
            ),
            (
                lambda W: (hat(W) @ hat(W).T).argmax(1),
                "The largest cosine is that of a feature with itself.",
            ),
            (
                lambda W: (hat(W) @ hat(W).T).abs().argmin(1),
                "A cosine near 0 is a right angle, not an opposite.",
            ),
            (lambda W: (hat(W) @ hat(W).T).amin(1), "That is the cosine: say which one it is."),
            (
                lambda W: (hat(W) @ hat(W).T).abs().fill_diagonal_(0).argmax(1),
                "Opposite means -1, not +1: keep the sign.",
            ),
        ],
        otherwise="Try W = [[1, 0], [0, 1], [-2, 1]]: the first is most opposed to number 2.",
    )


# -- predictions -----------------------------------------------------------------------------


def once(measure: Callable) -> Callable:
    """The function, run at its first call only."""
    kept = functools.cache(measure)

    @functools.wraps(measure)
    def call():
        return kept()

    return call


@prediction("1.11", "How many of the five features will the model hold?", [2, 3, 4, 5])
def held_when_sparse() -> int:
    return int(geometry.represented(superposition.grow("pentagon").W[0]).sum())


@prediction(
    "1.12",
    "Without the ReLU, at S = 0.97, how many of the five features are held?",
    [0, 2, 4, 5],
)
@once
def held_without_relu() -> int:
    options = {"importance": 0.9 ** torch.arange(5), "training": Training(restarts=8)}
    toys = superposition.train(5, 2, 0.97, output="linear", **options)
    return int(geometry.represented(toys.W[0]).sum())


PAUSES = {"nowhere": None, "at 3/4": 3 / 4, "at 2/3": 2 / 3, "at 1/2": 1 / 2, "at 2/5": 2 / 5}


@prediction("1.13", "Where will D* pause on its way down?", list(PAUSES))
@once
def where_it_pauses() -> str:
    sweep = [round(0.05 * k, 2) for k in range(1, 20)]
    toys = superposition.train(40, 8, sweep, training=Training(lr=0.015))
    values = geometry.dimensions_per_feature(toys.W)
    near = {
        name: int(((values - level).abs() < 0.02).sum()) for name, level in PAUSES.items() if level
    }
    best = max(near, key=near.__getitem__)
    return best if near[best] >= 3 else "nowhere"


SHARES = {"a hundredth": 0.01, "a tenth": 0.1, "a third": 1 / 3, "three quarters": 0.75}


@prediction(
    "1.14",
    "Before the ReLU, how much of the interference of random directions has the pentagon?",
    list(SHARES),
)
def pentagon_share() -> str:
    W = geometry.unit(superposition.grow("pentagon").W[0])
    x = superposition.sample(torch.tensor([0.9]), 5, 20_000, generator=torch.Generator())[0]
    share = interference(W, x).mean().item() / (0.1 / 3 * 4 / 2)
    return min(SHARES, key=lambda name: abs(SHARES[name] - share))


WAYS = ["it falls to 0 smoothly", "it jumps from 1 to 0", "it shrinks, then jumps to 0"]


@prediction("1.15", "What does |w₂| do as the density grows across the line?", WAYS)
@once
def how_it_leaves() -> str:
    critical = float(phases.critical_density(0.3))
    lengths = second_feature([critical * (0.2 + 0.1 * k) for k in range(14)], 0.3)
    drops = [a - b for a, b in zip(lengths, lengths[1:], strict=False)]
    place = drops.index(max(drops))
    return WAYS[0] if drops[place] < 0.3 else WAYS[1] if lengths[place] > 0.9 else WAYS[2]


@prediction(
    "1.16",
    "At S = 0.9, what is the angle between two features that are always present together?",
    ["0°", "90°", "180°"],
)
@once
def angle_of_friends() -> str:
    toys = superposition.train(4, 2, 0.9, correlation=1.0, training=Training(restarts=8))
    unit = geometry.unit(toys.W[0])
    return f"{round(float(torch.rad2deg((unit[0] @ unit[1]).clamp(-1, 1).acos())) / 90) * 90}°"


# -- the investigation -----------------------------------------------------------------------


@investigation(
    "1",
    title="When does a third feature enter?",
    form="three sparsities, one for each importance of the third feature: 0.5, 0.25 and 0.1",
    chance=lambda rng: [rng.uniform(0.01, 0.99) for _ in phases.THIRD],
    best=phases.entries,
    good=phases.entries_by_formula,
    foolish=[
        0.5,
        [0.4, 0.6],
        [0.4, 0.6, 1.2],
        "soon",
        [0.4, 0.6, "late"],
        [0.4, 0.6, float("nan")],
    ],
)
def score_entries(answer) -> float:
    """The share of models in which the answer says rightly whether the third feature is held."""
    found = plain(answer)
    found = [found[r] for r in phases.THIRD if r in found] if isinstance(found, dict) else found
    if not isinstance(found, (list, tuple)) or len(found) != len(phases.THIRD):
        raise Wrong(f"Give three sparsities in a list, not {describe(answer)}.")
    for each in found:
        if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 <= each <= 1:
            raise Wrong(f"A sparsity lies between 0 and 1: {describe(each)} does not.")
    return phases.told_rightly(found)
