"""Exercises of lesson 06, sparse autoencoders."""

import numpy as np
import torch

from mi_helpers.course.check import draw, exercise, expect, expect_close, expect_none_of

# -- 6.1 -------------------------------------------------------------------------------------

STUB_61 = '''\
def topk_activation(pre, k):
    """f = relu(pre) at the k largest pre-activations of each row, and 0 elsewhere.

    pre: a tensor (rows, latents). Returns a tensor of the same shape.
    """
    ...
'''


def topk_activation(pre, k):
    """Gao and others 2024, section 2.3."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))


@exercise(
    "6.1",
    title="The k largest",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_61,
    reference=topk_activation,
    hints=[
        "`values, indices = pre.topk(k, dim=-1)` gives the k largest of each row.",
        "`torch.zeros_like(pre).scatter(-1, indices, ...)` puts values into their places.",
    ],
    wrong=[
        (
            lambda pre, k: torch.zeros_like(pre).scatter(
                -1, pre.topk(k).indices, pre.topk(k).values
            ),
            "passes the ReLU",
        ),
        (
            lambda pre, k: (
                torch.relu(pre) * torch.zeros_like(pre).scatter(-1, pre.abs().topk(k).indices, 1.0)
            ),
            "absolute",
        ),
        (
            lambda pre, k: torch.relu(pre) * (pre >= pre.flatten().topk(k * len(pre)).values[-1]),
            "BatchTopK",
        ),
        (lambda pre, k: torch.relu(pre.topk(k).values), "back in their places"),
        (lambda pre, k: torch.relu(pre), "ReLU alone"),
    ],
)
def check_61(answer) -> None:
    pre = draw(4, 9, seed=0)
    pre[3] = -pre[3].abs() - 0.1  # a row in which nothing is positive
    pre[3, 2] = 0.5
    want, k = topk_activation(pre, 3), 3
    got = answer(pre.clone(), k)
    values, indices = pre.topk(k)
    biggest = pre.abs().topk(k).indices
    least = pre.flatten().topk(k * len(pre)).values.min()
    expect_none_of(
        got,
        (
            torch.zeros_like(pre).scatter(-1, indices, values),
            "The last row has one positive pre-activation, and three latents fire, two of them "
            "with negative values: a latent that is kept still passes the ReLU.",
        ),
        (
            torch.zeros_like(pre).scatter(-1, biggest, torch.relu(pre.gather(-1, biggest))),
            "These are the k largest in *absolute* value: a strongly negative pre-activation "
            "takes the place of a positive one.",
        ),
        (
            torch.relu(pre) * (pre >= least),
            "The k · rows largest of the whole batch are kept. That is BatchTopK; TopK chooses "
            "k in each row.",
        ),
        (torch.relu(values), "The shape is (rows, k): put the values back in their places."),
        (torch.relu(pre), "This is a ReLU alone: keep only the k largest of each row."),
        (
            torch.zeros_like(pre).scatter(-1, pre.topk(k, largest=False).indices, torch.relu(pre)),
            "These are the k smallest.",
        ),
    )
    expect_close(got, want, "Each row should keep its k largest entries, where positive.")


# -- 6.2 -------------------------------------------------------------------------------------

STUB_62 = '''\
def explained_variance(x, x_hat):
    """1 - E|x - x_hat|^2 / E|x - mean(x)|^2, over all rows and numbers together: one number.

    x, x_hat: tensors (rows, d).
    """
    ...
'''


def explained_variance(x, x_hat):
    """One minus the normalised mean squared error."""
    return float(1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@exercise(
    "6.2",
    title="Explained variance",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_62,
    reference=explained_variance,
    hints=[
        "Two sums of squares and one division, in this order.",
        "The mean is over the rows: `x.mean(0)`, one for each of the d numbers.",
    ],
    wrong=[
        (
            lambda x, x_hat: 1 - (x - x_hat).pow(2).sum() / x.pow(2).sum(),
            "always gives the mean",
        ),
        (
            lambda x, x_hat: (1 - (x - x_hat).pow(2).sum(0) / (x - x.mean(0)).pow(2).sum(0)).mean(),
            "hardly varies",
        ),
        (
            lambda x, x_hat: 1 - (x - x_hat).var(0).sum() / x.var(0).sum(),
            "off by a constant",
        ),
        (lambda x, x_hat: 1 - explained_variance(x, x_hat), "normalised MSE"),
        (lambda x, x_hat: x_hat.var(0).sum() / x.var(0).sum(), "being right"),
    ],
)
def check_62(answer) -> None:
    x = draw(60, 5, seed=0) * torch.tensor([3.0, 1, 1, 0.5, 0.2]) + torch.tensor([9.0, 0, 2, 0, 0])
    x_hat = x + 0.6 * draw(60, 5, seed=1) + 0.3
    got, want = answer(x.clone(), x_hat.clone()), explained_variance(x, x_hat)
    error = (x - x_hat).pow(2)
    spread = (x - x.mean(0)).pow(2)
    expect_none_of(
        got,
        (
            1 - error.sum() / x.pow(2).sum(),
            "Below the line stands E|x|², not the variance: a coder that always gives the mean "
            "would score 0.9 here. Take the mean of each number away first.",
        ),
        (
            1 - error.sum() / (x - x.mean()).pow(2).sum(),
            "One mean is taken over all numbers: each of the d numbers has its own mean, "
            "`x.mean(0)`.",
        ),
        (
            (1 - error.sum(0) / spread.sum(0)).mean(),
            "This averages the explained variance of each number, so a number that hardly "
            "varies counts as much as one that varies most. Sum first, then divide.",
        ),
        (
            1 - (x - x_hat).var(0).sum() / x.var(0).sum(),
            "The variance of the error leaves out its mean: a reconstruction that is off by a "
            "constant would count as perfect. Use the squared error.",
        ),
        (
            error.sum() / spread.sum(),
            "This is the normalised MSE: explained variance is one minus it.",
        ),
        (
            x_hat.var(0).sum() / x.var(0).sum(),
            "The variance of the reconstruction says nothing of its being right.",
        ),
    )
    expect_close(got, want, "Compare with 1 - Σ (x - x̂)² / Σ (x - x̄)².", 1e-5)


# -- 6.3 -------------------------------------------------------------------------------------

STUB_63 = '''\
def tangent(gradient, W_dec):
    """The gradient of W_dec without its part along each row, so that norms do not want to change.

    gradient, W_dec: (latents, d); the rows of W_dec have norm 1. Returns (latents, d).
    """
    ...
'''


def tangent(gradient, W_dec):
    """g - (g · w) w, row by row."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


@exercise(
    "6.3",
    title="A gradient along the sphere",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_63,
    reference=tangent,
    hints=[
        "One dot product per row: `(gradient * W_dec).sum(1, keepdim=True)`.",
        "Times the row itself, this is the part along the row.",
    ],
    wrong=[
        (lambda gradient, W_dec: gradient - tangent(gradient, W_dec), "be taken away"),
        (lambda gradient, W_dec: gradient - W_dec, "whole row"),
        (
            lambda gradient, W_dec: gradient - (gradient * W_dec).sum(0) * W_dec,
            "over the latents",
        ),
        (
            lambda gradient, W_dec: torch.nn.functional.normalize(gradient, dim=1),
            "right angle",
        ),
    ],
)
def check_63(answer) -> None:
    gradient = draw(6, 6, seed=0)
    W = torch.nn.functional.normalize(draw(6, 6, seed=1), dim=1)
    before = gradient.clone()
    got, want = answer(gradient, W.clone()), tangent(before, W)
    expect(torch.equal(gradient, before), "Your function changes the gradient that it was given.")
    along = (before * W).sum(1, keepdim=True)
    expect_none_of(
        got,
        (along * W, "This is the part along the rows: it is what should be taken away."),
        (before + along * W, "The part along the rows is added: take it away."),
        (before - W, "The whole row is taken away, whatever the gradient's part along it is."),
        (
            before - (before * W).sum(0) * W,
            "The dot products are summed over the latents: each row has one of its own, so sum "
            "over the last axis.",
        ),
        (
            before - (before * W).sum() * W,
            "One dot product is taken of the whole matrices: each row has its own.",
        ),
        (
            torch.nn.functional.normalize(before, dim=1),
            "The gradient's rows are scaled to norm 1: what is wanted is a right angle between "
            "each of them and its row of W_dec.",
        ),
    )
    expect_close(got, want, "Afterwards each row of the result times its row of W_dec should be 0.")


# -- 6.4 -------------------------------------------------------------------------------------

STUB_64 = '''\
def dead_share(indices, values, n_latents):
    """The share of latents that fire at none of the tokens.

    indices, values: (tokens, k): which latents are the k largest at each token, and their
    activations, which are 0 or more. A latent fires where its activation is above 0.
    """
    ...
'''


def dead_share(indices, values, n_latents):
    """One minus the share of different latents among the firings."""
    return 1 - len(set(indices[values > 0].tolist())) / n_latents


@exercise(
    "6.4",
    title="Who is dead?",
    difficulty=2,
    importance=4,
    minutes=5,
    stub=STUB_64,
    reference=dead_share,
    hints=[
        "`indices[values > 0]` lists the latents that fire, with repetitions.",
        "How many different ones are there? `len(set(....tolist()))`, or `.unique()`.",
    ],
    wrong=[
        (
            lambda indices, values, n_latents: 1 - len(indices.unique()) / n_latents,
            "did not fire",
        ),
        (
            lambda indices, values, n_latents: 1 - dead_share(indices, values, n_latents),
            "alive",
        ),
        (
            lambda indices, values, n_latents: n_latents - len(indices[values > 0].unique()),
            "divide by the number of latents",
        ),
        (
            lambda indices, values, n_latents: 1 - float((values > 0).sum()) / n_latents,
            "count different latents",
        ),
    ],
)
def check_64(answer) -> None:
    indices = torch.tensor([[0, 1, 7], [0, 2, 7], [0, 3, 6], [1, 0, 5]])
    values = torch.tensor([[2.0, 1, 0], [3, 1, 0], [1, 0.2, 0], [1, 0.5, 0.1]])
    got, want = answer(indices.clone(), values.clone(), 16), dead_share(indices, values, 16)
    expect_none_of(
        got,
        (
            1 - 7 / 16,
            "Latents 6 and 7 were among the k largest, but with an activation of 0: they did "
            "not fire.",
        ),
        (
            1 - want,
            "This is the share of latents that are alive.",
        ),
        (11, "This is how many are dead: divide by the number of latents."),
        (
            1 - float((values > 0).sum()) / 16,
            "Every firing is counted, so latent 0 counts four times: count different latents.",
        ),
        (
            float((values == 0).float().mean()),
            "This is the share of empty places among the k of each token, which is another "
            "thing: a latent is dead if it fires at no token at all.",
        ),
    )
    expect_close(got, want, "Of the sixteen latents, 0, 1, 2, 3 and 5 fire somewhere.", 1e-6)


# -- 6.5 -------------------------------------------------------------------------------------

STUB_65 = '''\
def loss_recovered(clean, spliced, zero):
    """The share of the loss that comes back with the reconstruction: 1 if it does no harm, 0 if it
    is no better than zeros.

    clean, spliced, zero: losses of the model as it is, with the reconstruction, with zeros.
    """
    ...
'''


def loss_recovered(clean, spliced, zero):
    """(L_zero - L_spliced) / (L_zero - L_clean)."""
    return (zero - spliced) / (zero - clean)


@exercise(
    "6.5",
    title="Loss recovered",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_65,
    reference=loss_recovered,
    hints=[
        "How much worse than clean is `zero`? That is all that there is to recover.",
        "How much better than `zero` is the reconstruction?",
    ],
    wrong=[
        (
            lambda clean, spliced, zero: (spliced - clean) / (zero - clean),
            "that is *lost*",
        ),
        (lambda clean, spliced, zero: clean / spliced, "no zero"),
        (lambda clean, spliced, zero: (zero - spliced) / zero, "less the clean loss"),
        (
            lambda clean, spliced, zero: max(0, (zero - spliced) / (zero - clean)),
            "do not clip",
        ),
    ],
)
def check_65(answer) -> None:
    clean, spliced, zero = 2.0, 2.5, 7.0
    got = answer(clean, spliced, zero)
    expect_none_of(
        got,
        (0.1, "This is the share that is *lost*: one minus it comes back."),
        (clean / spliced, "A ratio of losses has no zero: at worst it would be 2 / 7 here."),
        (spliced / clean, "A ratio of losses is no share of what could be lost."),
        (
            (zero - spliced) / zero,
            "Below the line stands the loss with zeros: what could be won back is the loss "
            "with zeros *less the clean loss*.",
        ),
        (
            (spliced - zero) / (zero - clean),
            "The sign is turned round: a good reconstruction is near +1.",
        ),
        (4.5, "This is a difference in nats: divide by what could be won back."),
    )
    expect_close(got, 0.9, "Zeros cost 5 nats here, the reconstruction half a nat.", 1e-9)
    expect_close(answer(2.0, 2.0, 7.0), 1.0, "A perfect reconstruction recovers 1.", 1e-9)
    expect_close(answer(2.0, 8.0, 7.0), -0.2, "Worse than zeros is below 0: do not clip.", 1e-9)


# -- 6.6 -------------------------------------------------------------------------------------

STUB_66 = '''\
def honest_f1(fires, truth):
    """The F1 of the best unit, chosen on the first half of the rows, scored on the second half.

    fires: booleans (rows, units); truth: booleans (rows,); NumPy arrays. Returns one number.
    F1 = 2 TP / (fired + positives).
    """
    ...
'''


def honest_f1(fires, truth):
    """Choose and score on different rows, or chance is scored too."""
    half = len(truth) // 2

    def f1(rows):
        both = (fires[rows] & truth[rows, None]).sum(0)
        return 2 * both / (fires[rows].sum(0) + truth[rows].sum())

    return float(f1(slice(half, None))[f1(slice(half)).argmax()])


@exercise(
    "6.6",
    title="An honest best unit",
    difficulty=3,
    importance=5,
    minutes=15,
    stub=STUB_66,
    reference=honest_f1,
    hints=[
        "Write F1 of all units on some rows first: true positives are "
        "`(fires[rows] & truth[rows, None]).sum(0)`.",
        "`argmax` on the first half, then look up that unit's F1 on the second half.",
    ],
    wrong=[
        (
            lambda fires, truth: honest_f1(
                np.concatenate([fires[100:], fires[100:]]),
                np.concatenate([truth[100:], truth[100:]]),
            ),
            "luckiest",
        ),
        (
            lambda fires, truth: honest_f1(
                np.concatenate([fires[:100], fires[:100]]),
                np.concatenate([truth[:100], truth[:100]]),
            ),
            "score it on the second",
        ),
        (
            lambda fires, truth: (
                2 * (fires & truth[:, None]).sum(0) / (fires.sum(0) + truth.sum())
            ).max(),
            "keep the halves apart",
        ),
        (
            lambda fires, truth: (fires[100:] == truth[100:, None]).mean(0)[5],
            "Compare with F1",
        ),
    ],
)
def check_66(answer) -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    fires = rng.random((200, 40)) < 0.3
    fires[:, 5] = np.where(rng.random(200) < 0.25, ~truth, truth)
    fires[:100, 9] = np.where(rng.random(100) < 0.15, ~truth[:100], truth[:100])
    fires[100:, 11] = truth[100:]
    fires[:, 20] = True
    fires[:, 30] = truth & (rng.random(200) < 0.1)
    half, got, want = 100, answer(fires.copy(), truth.copy()), honest_f1(fires, truth)

    def scores(rows, of="f1"):
        both = (fires[rows] & truth[rows, None]).sum(0)
        fired, n = fires[rows].sum(0), truth[rows].sum()
        parts = {
            "f1": 2 * both / (fired + n),
            "precision": both / np.maximum(fired, 1),
            "recall": both / n,
            "accuracy": (fires[rows] == truth[rows, None]).mean(0),
        }
        return parts[of]

    first, second, whole = slice(half), slice(half, None), slice(None)
    best = scores(first).argmax()
    expect_none_of(
        got,
        (
            scores(second).max(),
            "The unit is chosen on the very rows that it is scored on: of forty units, the "
            "luckiest wins. Choose on the first half.",
        ),
        (
            scores(first).max(),
            "This is the score on the half on which the unit was chosen: score it on the second.",
        ),
        (scores(whole).max(), "Unit and score come from all rows: keep the halves apart."),
        (scores(second, "precision")[best], "This is precision: it ignores what was missed."),
        (scores(second, "recall")[best], "This is recall: a unit that always fires has 1."),
        (scores(second, "accuracy")[best], "This is accuracy, which pays for silence."),
        (
            scores(second)[scores(first, "recall").argmax()],
            "The unit is chosen by its recall, so the one that always fires wins: choose by F1.",
        ),
        (
            scores(second)[scores(first, "precision").argmax()],
            "The unit is chosen by its precision: choose by F1.",
        ),
        (best, "This is the number of the best unit: return its F1 on the second half."),
    )
    expect_close(got, want, "Compare with F1 = 2 TP / (fired + positives).", 1e-6)


# -- 6.7 -------------------------------------------------------------------------------------

STUB_67 = '''\
def share_found_again(rows, others, same):
    """The share of rows that have, among the other rows, one with a cosine above `same`.

    rows, others: decoders (latents, d) of two autoencoders, of any norms. Returns one number.
    """
    ...
'''


def share_found_again(rows, others, same):
    """The best cosine of each row, and how many of these are above the threshold."""
    unit, other = (torch.nn.functional.normalize(each, dim=1) for each in (rows, others))
    return float(((unit @ other.T).max(1).values > same).float().mean())


@exercise(
    "6.7",
    title="Found again",
    difficulty=2,
    importance=3,
    minutes=10,
    stub=STUB_67,
    reference=share_found_again,
    hints=[
        "`torch.nn.functional.normalize(rows, dim=1)` divides each row by its norm.",
        "The matrix of cosines has one row per latent of the first: take the maximum of each.",
    ],
    wrong=[
        (
            lambda rows, others, same: float(
                ((rows @ others.T).max(1).values > same).float().mean()
            ),
            "divide by the norms",
        ),
        (
            lambda rows, others, same: share_found_again(rows, torch.cat([others, -others]), same),
            "opposite way",
        ),
        (
            lambda rows, others, same: share_found_again(others, rows, same),
            "*other* autoencoder",
        ),
        (lambda rows, others, same: share_found_again(rows, rows, same), "itself included"),
    ],
)
def check_67(answer) -> None:
    rows = draw(12, 6, seed=0) * torch.linspace(0.05, 1, 12)[:, None]
    others = torch.cat([rows[:4] * 5 + 0.02 * draw(4, 6, seed=1), draw(11, 6, seed=2)])
    others[5] = -rows[8]
    others[6:9] = 5 * rows[0] + 0.02 * draw(3, 6, seed=3)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    others = others[order]
    same_cosine = 0.95
    got, want = answer(rows.clone(), others.clone(), same_cosine), 4 / 12
    unit, other = (torch.nn.functional.normalize(each, dim=1) for each in (rows, others))
    cosines = unit @ other.T
    expect_none_of(
        got,
        (
            ((rows @ others.T).max(1).values > same_cosine).float().mean(),
            "These are dot products, in which long rows win: divide by the norms.",
        ),
        (
            (cosines.abs().max(1).values > same_cosine).float().mean(),
            "A row that points the opposite way counts as the same: latents only add, so the "
            "sign matters.",
        ),
        (
            (cosines.max(0).values > same_cosine).float().mean(),
            "This asks of the *other* autoencoder's rows whether they are found in the first.",
        ),
        (
            (cosines > same_cosine).float().mean(),
            "This is the share of all *pairs* that are alike: take each row's best match.",
        ),
        (
            ((unit @ unit.T).max(1).values > same_cosine).float().mean(),
            "Every row is compared with its own autoencoder, itself included.",
        ),
        (
            cosines.max(1).values.mean(),
            "This is the mean of the best cosines: count those above the threshold.",
        ),
        (4, "This is how many are found again: divide by the number of rows."),
    )
    expect_close(got, want, "Of these twelve rows, the first four are found again.", 1e-6)


# -- 6.8 -------------------------------------------------------------------------------------

STUB_68 = '''\
def jumprelu_encode(x, W_enc, b_enc, threshold):
    """Gemma Scope's encoder: pre = x W_enc + b_enc, and f = pre where pre > threshold, else 0.

    x: (rows, d); W_enc: (d, latents); b_enc, threshold: (latents,), thresholds above 0.
    """
    ...
'''


def jumprelu_encode(x, W_enc, b_enc, threshold):
    """Rajamanoharan and others 2024, "Jumping Ahead", equation 3."""
    pre = x @ W_enc + b_enc
    return pre * (pre > threshold)


@exercise(
    "6.8",
    title="The jump of JumpReLU",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_68,
    reference=jumprelu_encode,
    hints=[
        "There is no b_dec in it: Gemma Scope does not take it away from the input.",
        "A comparison gives a mask; multiply.",
    ],
    wrong=[
        (
            lambda x, W_enc, b_enc, threshold: torch.relu(x @ W_enc + b_enc - threshold),
            "the jump",
        ),
        (
            lambda x, W_enc, b_enc, threshold: torch.relu(x @ W_enc + b_enc),
            "plain ReLU",
        ),
        (
            lambda x, W_enc, b_enc, threshold: (x @ W_enc + b_enc > threshold).float(),
            "not how strongly",
        ),
        (
            lambda x, W_enc, b_enc, threshold: jumprelu_encode(x, W_enc, 0 * b_enc, threshold),
            "b_enc is missing",
        ),
    ],
)
def check_68(answer) -> None:
    x, W_enc, b_enc = draw(8, 5, seed=0), draw(5, 7, seed=1), draw(7, seed=2)
    threshold = torch.linspace(0.2, 1.5, 7)
    pre = x @ W_enc + b_enc
    got = answer(x.clone(), W_enc.clone(), b_enc.clone(), threshold.clone())
    expect_none_of(
        got,
        (
            torch.relu(pre - threshold),
            "The threshold is taken away from what passes, so every activation is too small: "
            "above its threshold a latent has its full pre-activation. That is the jump.",
        ),
        (torch.relu(pre), "The threshold is not used: this is a plain ReLU."),
        ((pre > threshold).float(), "This says where latents fire, not how strongly."),
        (
            pre * (pre.abs() > threshold),
            "A strongly negative pre-activation fires too: compare pre itself.",
        ),
        (
            (x @ W_enc) * (x @ W_enc > threshold),
            "b_enc is missing.",
        ),
        (pre * (pre < threshold), "The comparison is turned round."),
        (pre.clamp(min=threshold), "Below the threshold the activation is 0."),
    )
    expect_close(got, jumprelu_encode(x, W_enc, b_enc, threshold), "Compare with pre · [pre > θ].")
