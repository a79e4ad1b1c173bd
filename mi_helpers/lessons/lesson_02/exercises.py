"""Exercises of lesson 02, probing."""

import functools
import itertools
import random

import numpy as np
import torch

from mi_helpers import probes
from mi_helpers.course.check import (
    Wrong,
    agree,
    as_numbers,
    describe,
    draws,
    edited,
    exercise,
    expect,
    expect_shape,
)
from mi_helpers.course.investigate import investigation, one_of
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_02 import experiments as lab
from mi_helpers.lessons.lesson_02.using import (
    CountryTask,
    number_tasks,
    removal,
    truth_sets,
    verdicts,
)
from mi_helpers.lessons.shared import documents, on_model, shipped_model
from mi_helpers.probes import mean_difference

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}
PROBE_TEXT = "The keys near the cabinet"


@functools.cache
def tasks(seed: int = 90):
    """Agreement sentences for checks and predictions, to find directions in and to test them on."""
    return number_tasks(shipped_model(), seed, 80)


def sentence(draw):
    """An agreement sentence."""
    return next(iter(documents("agreement", 1, draw.integer(0, 100_000))))


def a_site(draw) -> tuple[str, int]:
    """The stream after one of the model's layers, but the last."""
    return "resid_post", draw.integer(0, shipped_model().n_layers - 2)


# -- 2.1 -------------------------------------------------------------------------------------


def read_at(model, text, end, site):
    """The stream at the token that holds the character text[end - 1], (d_model,).

    `end` is the end of a word. What stands after it must not matter.
    model.run_with_cache(text, [site]) gives logits and a cache; cache[site] is (1, pos, d_model).
    """
    _, cache = model.run_with_cache(text[:end], [site])
    return cache[site][0, -1]


def read_by_counting(model, text, end, site):
    at = model.tokens(text[:end]).shape[1] - 1
    _, cache = model.run_with_cache(text, [site])
    return cache[site][0, at].tolist()


MISTAKES_21 = [
    (
        edited(read_at, "text[:end]", "text"),
        "This is read at the end, where the answer has been said.",
    ),
    (
        edited(read_at, "[0, -1]", "[0, 0]"),
        "This is the first token, `<bos>`, which has seen nothing.",
    ),
    (edited(read_at, "[0, -1]", "[0, -2]"), "This is one token too early."),
    (edited(read_at, "[0, -1]", "[0].mean(0)"), "This is the mean over all tokens: read at one."),
    (edited(read_at, "[0, -1]", "[0]"), "These are all tokens, (pos, d_model): give one of them."),
]


@exercise(
    "2.1",
    title="Read at one token",
    difficulty=1,
    importance=5,
    minutes=4,
    reference=read_at,
    survivors=ONE_MODEL,
    right=[read_by_counting],
    wrong=MISTAKES_21,
    hints=[
        "`text[:end]` is what the model may have read.",
        "Its last token is the one that holds the character `end - 1`.",
    ],
)
def check_21(answer) -> None:
    def make(draw):
        document = sentence(draw)
        end = document.find("answer")[0].start - 1
        return shipped_model(), document.text, end, a_site(draw)

    otherwise = "Run the model on text[:end], and take the last position."
    on_model(answer, read_at, make, MISTAKES_21, otherwise)


# -- 2.2 -------------------------------------------------------------------------------------


def principal_directions(x, k):
    """The k directions along which x varies most, (k, d), the first the most.

    x (n, d), an array. Each has length 1 and is at right angles to the others; signs are free.
    """
    centred = x - x.mean(0)
    return np.linalg.svd(centred, full_matrices=False)[2][:k]


def by_covariance(x, k):
    values, vectors = np.linalg.eigh(np.cov(np.asarray(x).T))
    return [vectors[:, i].tolist() for i in np.argsort(-values)[:k]]


def by_torch(x, k):
    x = torch.as_tensor(x)
    return torch.linalg.svd(x - x.mean(0, keepdim=True)).Vh[:k]


MISTAKES_22 = [
    (
        edited(principal_directions, " - x.mean(0)", ""),
        "These go through 0: subtract the mean first.",
    ),
    (
        edited(principal_directions, "[:k]", "[::-1][:k]"),
        "These are the directions along which x varies least: turn the order round.",
    ),
    (
        edited(principal_directions, "x - x.mean(0)", "(x - x.mean(0)) / x.std(0)"),
        "You gave every column the same spread: only subtract the mean.",
    ),
    (
        edited(principal_directions, "np.linalg.svd(centred, full_matrices=False)[2]", "centred"),
        "These are points themselves, not directions of the cloud.",
    ),
]
SHAPES_22 = [
    (
        edited(principal_directions, "[:k]", "[:k].T"),
        "The directions are in columns: give rows, (k, d).",
    ),
    (
        edited(principal_directions, "return ", "return centred @ ", "[:k]", "[:k].T"),
        "These are the coordinates of the points, (n, k): give the directions.",
    ),
    (
        edited(principal_directions, "return ", "return 2 * "),
        "Each direction should have length 1.",
    ),
]


@exercise(
    "2.2",
    title="Where the points spread",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=principal_directions,
    right=[by_covariance, by_torch],
    wrong=MISTAKES_22 + SHAPES_22,
    survivors={"False → True": "the first rows of the full matrix are the same"},
    hints=[
        "Subtract the mean of each column first.",
        "`np.linalg.svd(a, full_matrices=False)` gives U, S and V. The rows of V are directions of "
        "the columns' space, the first with the largest singular value.",
    ],
)
def check_22(answer) -> None:
    for draw in draws(numpy=True):
        n, d = draw.size("n", 12, 19), draw.size("d", 4, 9)
        k, turn = draw.choice([1, 2, 3]), np.linalg.qr(draw.normal(d, d))[0]
        x = 5 * (draw.normal(n, d) * 3.0 ** -np.arange(d)) @ turn + 8 * draw.unit(d)
        got, want = answer(x.copy(), k), principal_directions(x, k)
        expect(np.shape(got) != (d, k), SHAPES_22[0][1])
        expect(np.shape(got) != (n, k), SHAPES_22[1][1])
        expect_shape(got, (k, d))
        if same_directions(got, want):
            continue
        for mistake, message in MISTAKES_22:
            expect(not same_directions(got, mistake(x, k)), message)
        lengths = np.linalg.norm(as_numbers(got), axis=1)
        expect(bool(np.allclose(lengths, 1, atol=1e-4)), SHAPES_22[2][1])
        raise Wrong("Centre x, and take the first k right singular vectors.")


def same_directions(got, want) -> bool:
    """Whether two sets of directions agree but for their signs."""
    got, want = as_numbers(got), as_numbers(want)
    signs = np.sign((got * want).sum(1, keepdims=True))
    return bool(np.allclose(signs * got, want, atol=1e-4))


# -- 2.3 -------------------------------------------------------------------------------------


def mean_difference_probe(x, y, fresh):
    """Classify by the difference of the class means alone: booleans (m,), no training.

    x (n, d), y booleans (n,), fresh (m, d), all arrays. A fresh row is true if it lies beyond the
    point half way between the two means, in the direction of the true ones.
    """
    true, false = x[y].mean(0), x[~y].mean(0)
    return (fresh - (true + false) / 2) @ (true - false) > 0


def by_distance(x, y, fresh):
    x, fresh, y = torch.as_tensor(x), torch.as_tensor(fresh), torch.as_tensor(y).bool()
    to_true = (fresh - x[y].mean(0)).square().sum(1)
    return to_true < (fresh - x[~y].mean(0)).square().sum(1)


MISTAKES_23 = [
    (
        edited(mean_difference_probe, " - (true + false) / 2", ""),
        "The cut is at zero, and the data's centre is elsewhere: subtract the half-way point.",
    ),
    (
        edited(mean_difference_probe, "(true + false) / 2", "x.mean(0)"),
        "The cut is at the mean of all examples, which leans towards the larger class.",
    ),
    (
        edited(mean_difference_probe, "(true + false) / 2", "fresh.mean(0)"),
        "The cut depends on the fresh rows: find it in x and y alone.",
    ),
    (
        edited(mean_difference_probe, "> 0", "< 0"),
        "True and false are swapped: take the mean of the true minus that of the false.",
    ),
    (
        edited(mean_difference_probe, " > 0", ""),
        "Return one boolean for each fresh row: is this above zero?",
    ),
]


def clouds(draw) -> tuple:
    """Two clouds far from zero, one with many more points, and fresh points on both sides."""
    n, m, d = draw.size("n", 30, 60), draw.size("m", 30, 60), draw.size("d", 3, 6)
    y = draw.rng.permutation(np.arange(n) < n * draw.number(0.1, 0.25)) ^ draw.choice([True, False])
    x, fresh = draw.normal(n, d), 2 * draw.normal(m, d)
    apart, centre = 3 * draw.unit(d), 3 * draw.unit(d) + draw.normal(d)
    return x + centre + y[:, None] * apart, y, fresh + centre + apart * draw.number(0.4, 0.8)


@exercise(
    "2.3",
    title="A probe without training",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=mean_difference_probe,
    right=[by_distance],
    wrong=MISTAKES_23,
    survivors={
        "(fresh - (true + false) / 2) @ (true - false) > 0 → "
        "(fresh - (true + false) / 2) @ (true - false) >= 0": "no point drawn lies half way",
    },
    hints=[
        "`x[y].mean(0)` is the mean of the true class.",
        "Project `fresh` minus the half-way point onto the difference of the means: the sign says.",
    ],
)
def check_23(answer) -> None:
    otherwise = "The cut is elsewhere than half way between the two means."
    agree(answer, mean_difference_probe, clouds, MISTAKES_23, otherwise, numpy=True)


# -- 2.4 -------------------------------------------------------------------------------------


def train_probe(x, y, steps, rate, penalty):
    """A linear probe trained by gradient descent: its weights (d,) and its bias, a number.

    x (n, d), y (n,) of 0 and 1. p(y = 1) = sigmoid(x @ w + b). The loss is the mean over examples
    of -log p(y), plus penalty / 2 · |w|². Begin at zero, take `steps` steps, each of `rate` times
    the gradient over all examples.
    """
    w, b = np.zeros(x.shape[1]), 0.0
    for _ in range(steps):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y  # (n,)
        w = w - rate * (x.T @ error / len(x) + penalty * w)
        b = b - rate * error.mean()
    return w, b


def by_autograd(x, y, steps, rate, penalty):
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w, b], lr=rate)
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y)
        optimizer.zero_grad()
        (loss + penalty / 2 * w.square().sum()).backward()
        optimizer.step()
    return w.detach(), b.detach()


MISTAKES_24 = [
    (edited(train_probe, "- rate", "+ rate"), "The steps go uphill: subtract the gradient."),
    (
        edited(train_probe, " / len(x)", "", ".mean()", ".sum()"),
        "The loss is the mean over the examples, not the sum.",
    ),
    (
        edited(train_probe, "b = b - rate", "b = b - 0"),
        "The bias has not moved: it has a gradient, too.",
    ),
    (
        edited(train_probe, " + penalty * w", ""),
        "The penalty is missing: its gradient is penalty · w.",
    ),
    (
        edited(train_probe, "+ penalty * w", "+ 2 * penalty * w"),
        "The gradient of penalty / 2 · |w|² is penalty · w, half of what you have.",
    ),
    (
        edited(train_probe, "1 / (1 + np.exp(-(x @ w + b)))", "x @ w + b"),
        "This is least squares: put a sigmoid around x @ w + b.",
    ),
    (
        edited(train_probe, "error.mean()", "(error.mean() + penalty * b)"),
        "You penalise the bias, too: the penalty is on w alone.",
    ),
    (
        edited(train_probe, "error.mean()", "(1 / (1 + np.exp(-(x @ w + b))) - y).mean()"),
        "Weights and bias move in turn: take both gradients at one place.",
    ),
]


@exercise(
    "2.4",
    title="Train a probe",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=train_probe,
    right=[by_autograd],
    wrong=[*MISTAKES_24, (lambda *args: train_probe(*args)[0], "Return 2 things")],
    hints=[
        "By autograd: `binary_cross_entropy_with_logits` plus the penalty, and `torch.optim.SGD`.",
        "By hand: the gradient of -log p(y) by the logit is p - y. So the weights' gradient is "
        "x.T @ (p - y) / n + penalty · w, and the bias' the mean of p - y.",
    ],
)
def check_24(answer) -> None:
    def make(draw):
        steps, rate, penalty = draw.integer(3, 9), draw.number(0.2, 0.6), draw.number(0.2, 0.9)
        return draw.normal("n", "d"), draw.booleans("n").astype(int), steps, rate, penalty

    otherwise = "Begin at zero, and compare one step: w = -rate · x.T @ (1/2 - y) / n."
    agree(answer, train_probe, make, MISTAKES_24, otherwise, 1e-4, numpy=True)


# -- 2.5 -------------------------------------------------------------------------------------


def control_task(words, labels, seed):
    """A random label for each word type, always the same one: {word: label}.

    words   one word per example, many of them repeated
    labels  the examples' true labels; draw from this list, so that common labels stay common
    """
    rng = random.Random(seed)
    return {word: rng.choice(list(labels)) for word in sorted(set(words))}


def from_classes(words, labels, seed):
    return control_task(words, sorted(set(labels)), seed)


def half_true(words, labels, seed):
    rng, true = random.Random(seed), dict(zip(words, labels, strict=True))
    return {w: true[w] if rng.random() < 0.5 else rng.choice(labels) for w in sorted(true)}


def with_numpy(words, labels, seed):
    types = np.unique(words)
    return dict(zip(types, np.random.default_rng(seed).choice(labels, len(types)), strict=True))


def by_shuffling(words, labels, seed):
    shuffled = list(labels)
    random.Random(seed).shuffle(shuffled)
    return dict(zip(dict.fromkeys(words), shuffled, strict=False))


@exercise(
    "2.5",
    title="A control task",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=control_task,
    right=[with_numpy, by_shuffling],
    survivors={"sorted(set(words)) → set(words)": "a set keeps its order within one session"},
    hints=[
        "`set(words)` has each word type once; sort it, so that the seed alone decides.",
        "`random.Random(seed).choice(labels)` draws a label as often as it is in the list.",
    ],
    wrong=[
        (lambda words, labels, seed: dict(zip(words, labels, strict=True)), "the true labels"),
        (lambda words, labels, seed: dict.fromkeys(words, labels[seed % 9]), "the same label"),
        (from_classes, "not from the set of classes"),
        (lambda words, labels, seed: control_task(range(len(words)), labels, seed), "one per type"),
        (lambda words, labels, seed: control_task(words, labels, None), "what the seed sets"),
        (lambda words, labels, seed: control_task(words, labels, 3), "Another seed"),
        (half_true, "more than chance"),
    ],
)
def check_25(answer) -> None:
    for draw in draws(2):
        count, share = draw.size("types", 300, 500), draw.number(0.08, 0.14)
        rare, common = draw.choice([("rare", "common"), ("odd", "usual"), ("plural", "singular")])
        types = [f"w{i}" for i in draw.rng.permutation(count)]
        truth = {word: rare if draw.rng.random() < share else common for word in types}
        words = [types[i % count] for i in draw.rng.permutation(3 * count)]
        judge_control(answer, words, truth, rare, draw.integer(0, 1_000))


def judge_control(answer, words: list, truth: dict, rare: str, seed: int) -> None:
    """`Wrong` unless a table gives each word type a random label of the right frequency."""
    labels = [truth[word] for word in words]
    table = answer(list(words), list(labels), seed)
    expect(isinstance(table, dict), f"Return a dictionary, {{word: label}}, not {describe(table)}.")
    expect(
        set(table) == set(truth),
        f"There are {len(truth)} word types, and the table has {len(table)} entries: one per type, "
        "not one per example.",
    )
    expect(set(table.values()) <= set(labels), "Some words have a label that is not in the list.")
    expect(
        len(set(table.values())) > 1,
        "Every word has the same label: draw a new one for each word type.",
    )
    own, got = (np.mean([each[w] == rare for w in truth]) for each in (truth, table))
    chance = own * got + (1 - own) * (1 - got)
    alike = np.mean([table[w] == truth[w] for w in truth])
    expect(alike < 0.98, "These are the true labels: a control task has nothing to do with them.")
    expect(
        got < 0.3,
        f"The label '{rare}' is {got:.0%} of the control task and {own:.0%} of the data: draw from "
        "the list of labels, repetitions included, not from the set of classes.",
    )
    expect(got > 0.02, f"The label '{rare}' has vanished: draw from the labels as they are.")
    expect(
        abs(alike - chance) < 0.06,
        f"The labels agree with the true ones in {alike:.0%} of the words, more than chance, "
        f"{chance:.0%}: draw without a look at the truth.",
    )
    again, other = (answer(list(words), list(labels), each) for each in (seed, seed + 1))
    expect(again == table, "The same seed gives another table: draw from what the seed sets.")
    expect(other != table, "Another seed gives the same table: use `seed`.")


# -- 2.6 -------------------------------------------------------------------------------------


def split_by_group(groups, share, seed):
    """A mask (n,), True for the test set: a random `share` of the *groups*, each as a whole.

    groups  one name per example, such as the landmark that its sentence is about
    """
    names = sorted(set(groups))
    chosen = random.Random(seed).sample(names, round(share * len(names)))
    return np.array([group in chosen for group in groups])


def first_groups(groups, share, seed):
    names = sorted(set(groups))
    return np.isin(groups, names[: round(share * len(names))])


def split_in_torch(groups, share, seed):
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    chosen = {names[i] for i in order[: round(share * len(names))]}
    return torch.tensor([group in chosen for group in groups])


def split_in_a_list(groups, share, seed):
    names = list(dict.fromkeys(groups))
    random.Random(seed).shuffle(names)
    return [group in names[: round(share * len(names))] for group in groups]


@exercise(
    "2.6",
    title="A split that cannot leak",
    difficulty=2,
    importance=5,
    minutes=4,
    reference=split_by_group,
    right=[split_in_torch, split_in_a_list],
    hints=[
        "First list the groups, each once; then draw from that list.",
        "`random.Random(seed).sample(names, k)`, then ask of each example: is its group in it?",
    ],
    wrong=[
        (
            lambda groups, share, seed: np.random.default_rng(seed).random(len(groups)) < share,
            "on both sides",
        ),
        (first_groups, "draw at random"),
        (lambda groups, share, seed: ~split_by_group(groups, share, seed), "upside down"),
        (lambda groups, share, seed: split_by_group(groups, share, 3), "Another seed"),
        (lambda groups, share, seed: split_by_group(groups, share, None), "The same seed"),
        (
            lambda groups, share, seed: np.flatnonzero(split_by_group(groups, share, seed)),
            "one boolean per example",
        ),
        (lambda groups, share, seed: split_by_group(groups, 0.5, seed), "the share asked for"),
    ],
)
def check_26(answer) -> None:
    for draw in draws(3):
        count, share = draw.size("groups", 20, 40), draw.number(0.15, 0.4)
        names = [f"g{i:02d}" for i in range(count)]
        extra = [names[i] for i in draw.rng.integers(count, size=6 * count)]
        groups = draw.sample(names + extra, 7 * count)
        judge_split(answer, groups, share, draw.integer(0, 1_000))


def as_mask(got, groups: list) -> np.ndarray:
    """An answer as a mask of the test set."""
    try:
        mask = as_numbers(got)
    except (TypeError, ValueError):
        mask = np.zeros(0)
    boolean = mask.shape == (len(groups),) and bool(np.isin(mask, (0, 1)).all())
    expect(boolean, "Return one boolean per example: True for the test set.")
    return mask.astype(bool)


def judge_split(answer, groups: list, share: float, seed: int) -> None:
    """`Wrong` unless a mask puts a random share of the groups, as wholes, into the test set."""
    names = sorted(set(groups))
    want = round(share * len(names))
    mask, again, *others = (
        as_mask(answer(list(groups), share, each), groups)
        for each in (seed, seed, seed + 1, seed + 2)
    )
    test, train = ({g for g, m in zip(groups, mask, strict=True) if m == s} for s in (True, False))
    both = len(test & train)
    expect(
        not both,
        f"{both} of the {len(names)} groups are on both sides: the probe can know them by heart. "
        "Draw groups, not examples.",
    )
    expect(len(test) != len(names) - want, "The mask is upside down: True is for the test set.")
    expect(
        len(test) == want,
        f"{len(test)} of {len(names)} groups are in the test set; the share asked for, "
        f"{share:.2f}, makes {want}.",
    )
    moved = any((mask != other).any() for other in others)
    expect(
        moved or sorted(test) not in (names[:want], names[-want:]),
        "The test set is the first or the last groups in order, whatever they are: draw at random.",
    )
    expect(bool((again == mask).all()), "The same seed gives another split: use `seed`.")
    expect(moved, "Another seed gives the same split: use `seed`.")


# -- 2.7 -------------------------------------------------------------------------------------


def excess(probe_p, ideal_p):
    """How many nats a probe pays more than the ideal reader, in expectation: (n,), one per example.

    probe_p, ideal_p  probabilities (n, classes), arrays; the ideal reader's may be 0
    The label is drawn with the ideal reader's probabilities. Each pays -log of what it gave it.
    """
    possible = np.where(ideal_p > 0, ideal_p, 1)
    return (ideal_p * (np.log(possible) - np.log(probe_p))).sum(1)


def likeliest(q, p):
    rows, best = np.arange(len(p)), p.argmax(1)
    return np.log(p[rows, best]) - np.log(q[rows, best])


def with_nan(q, p):
    with np.errstate(divide="ignore", invalid="ignore"):
        return (p * (np.log(p) - np.log(q))).sum(1)


def excess_in_torch(q, p):
    q, p = torch.as_tensor(q).double(), torch.as_tensor(p).double()
    return torch.special.xlogy(p, p).sum(1) - (p * q.log()).sum(1)


def excess_by_rows(q, p):
    return [
        sum(a * float(np.log(a) - np.log(b)) for a, b in zip(x, y, strict=True) if a > 0)
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]


MISTAKES_27 = [
    (
        lambda q, p: excess(np.maximum(p, 1e-12), q),
        "Probe and ideal reader are swapped: the ideal reader's p are the weights.",
    ),
    (
        edited(excess, ".sum(1)", ".sum(1) / np.log(2)"),
        "This is in bits: use the natural logarithm.",
    ),
    (
        edited(excess, "np.log(possible) ", ""),
        "This is all that the probe pays: subtract the ideal reader's own entropy.",
    ),
    (
        edited(excess, "return (", "return -("),
        "The sign is turned round: the probe pays more, never less.",
    ),
    (edited(excess, ".sum(1)", ".mean(1)"), "Sum over the classes, do not average."),
    (
        edited(excess, ".sum(1)", ".sum(1).mean()"),
        "Give one number for each example; the lesson takes the mean.",
    ),
    (likeliest, "Only the likeliest class is counted: weigh every class with p."),
    (with_nan, "0 times minus infinity is NaN: where p is 0, the term is 0."),
]


def two_readers(draw) -> tuple:
    """The probabilities of a probe and of an ideal reader who rules some classes out."""
    n, classes = draw.size("n", 5, 12), draw.size("classes", 3, 8)
    probe = draw.positive(n, classes)
    ideal = draw.positive(n, classes) * (draw.rng.random((n, classes)) < 0.7)
    ideal[:, draw.rng.integers(classes)] += 0.3
    ideal[0, 0], ideal[0, 1] = 0.0, 0.4
    return probe / probe.sum(1, keepdims=True), ideal / ideal.sum(1, keepdims=True)


@exercise(
    "2.7",
    title="Above the floor",
    difficulty=3,
    importance=4,
    minutes=4,
    reference=excess,
    right=[excess_in_torch, excess_by_rows],
    wrong=MISTAKES_27,
    survivors={"1 → 2": "log 2 is multiplied by a probability of 0"},
    hints=[
        "For one example: Σ p · (log p - log q), p the ideal reader's and q the probe's.",
        "Where p is 0, p · log p counts as 0, and NumPy gives NaN: put a 1 into the logarithm.",
    ],
)
def check_27(answer) -> None:
    otherwise = "Compare with Σ p · (log p - log q) over the classes."
    agree(answer, excess, two_readers, MISTAKES_27, otherwise, numpy=True)


# -- 2.8 -------------------------------------------------------------------------------------


def push(model, tokens, site, position, vector):
    """The logits of the last token, (d_vocab,), with `vector` added to the stream at one position.

    tokens (1, pos), vector (d_model,), site such as ("resid_post", 3); there the stream is
    (1, pos, d_model). Afterwards the model is intact.
    """

    def hook(stream):
        stream = stream.clone()
        stream[:, position] += vector
        return stream

    with model.hooks({site: hook}):
        return model(tokens)[0, -1]


def push_by_adding_zeros(model, tokens, site, position, vector):
    more = torch.zeros(tokens.shape[1], len(vector))
    more[position] = torch.as_tensor(np.asarray(vector), dtype=torch.float32)
    with model.hooks({site: lambda x: x + more}):
        return model(tokens)[0, -1].tolist()


MISTAKES_28 = [
    (
        edited(push, "[:, position]", "[:]"),
        "The vector was added at every position: add it at one.",
    ),
    (
        edited(push, "[:, position]", "[:, -1]"),
        "It was added at the last position: use `position`.",
    ),
    (edited(push, "+= vector", "= vector"), "The stream was replaced by the vector: add it."),
    (edited(push, "{site: hook}", "{}"), "These are the logits of the model as it is."),
    (edited(push, "+= vector", "-= vector"), "The vector was taken away: add it."),
    (
        edited(push, "[0, -1]", "[0, position]"),
        "These are the logits of the pushed token: give the last token's.",
    ),
    (edited(push, "[0, -1]", "[0]"), "These are the logits of every token: give the last token's."),
]


def a_push(draw) -> tuple:
    """A sentence up to its verb, a layer, a noun's position, and a vector."""
    model, document = shipped_model(), sentence(draw)
    noun = document.find("number")[0]
    tokens = model.tokens(document.text[: document.find("answer")[0].start - 1])
    position = model.tokens(document.text[: noun.end]).shape[1] - 1
    return model, tokens, a_site(draw), position, draw.normal(model.d_model, scale=2.0)


@exercise(
    "2.8",
    title="Push the model along a direction",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=push,
    survivors=ONE_MODEL,
    right=[push_by_adding_zeros],
    wrong=MISTAKES_28,
    hints=[
        "A hook gets the stream, changes it, and returns it: `stream[:, position] += vector`.",
        "`with model.hooks({site: hook}):` and inside it `model(tokens)[0, -1]`.",
    ],
)
def check_28(answer) -> None:
    otherwise = "Add the vector at that site and position, run the model, take the last logits."
    on_model(answer, push, a_push, MISTAKES_28, otherwise)


# -- 2.9 -------------------------------------------------------------------------------------


def project_out(x, v, centre):
    """Each row of x moved along the direction v until it is level with the centre, (n, d).

    x (n, d), v (d,) of any length, centre (d,), all tensors. Across v nothing changes.
    """
    u = v / v.norm()
    return x - ((x - centre) @ u)[:, None] * u


def project_in_numpy(x, v, centre):
    x, v, centre = (np.asarray(each, dtype=float) for each in (x, v, centre))
    return x - np.outer((x - centre) @ v, v) / (v @ v)


def project_in_place(x, v, centre):
    x -= torch.outer((x - centre) @ v / (v @ v), v)
    return x


MISTAKES_29 = [
    (edited(project_out, "v / v.norm()", "v"), "v's length is not 1: divide it by its length."),
    (
        edited(project_out, "x - centre", "x"),
        "Every row lands at 0 along v: it should be at the centre.",
    ),
    (
        edited(project_out, "x - ((", "(("),
        "This is the part along v, and nothing else: take it away.",
    ),
    (lambda x, v, centre: x - v, "v itself is taken away: take away each row's own part along v."),
    (
        edited(project_out, "[:, None] * u", "[:, None] * v"),
        "The part along v is measured with a unit vector, but not taken away so.",
    ),
    (
        edited(project_out, "* u\n", "* u - centre\n"),
        "The centre has been subtracted from the result: only the part along v moves.",
    ),
    (
        edited(project_out, "x - ((", "x - 2 * (("),
        "Each row ends up on the other side of the centre: go half as far.",
    ),
    (
        lambda x, v, centre: centre + 0 * x,
        "Everything is set to the centre: across v, x should stay.",
    ),
]


@exercise(
    "2.9",
    title="Taking a direction out",
    difficulty=3,
    importance=5,
    minutes=4,
    reference=project_out,
    right=[project_in_numpy, project_in_place],
    wrong=MISTAKES_29,
    hints=[
        "Divide v by its length first.",
        "How far is each row from the centre along v? `(x - centre) @ u`, one number per row.",
    ],
)
def check_29(answer) -> None:
    otherwise = "Afterwards (x - centre) · v should be 0, and x unchanged across v."
    draw_all = lambda draw: (draw.normal("n", "d"), 2 * draw.normal("d"), draw.normal("d"))  # noqa: E731
    agree(answer, project_out, draw_all, MISTAKES_29, otherwise)


# -- 2.10 ------------------------------------------------------------------------------------


def share_lost(train, test, site, place, noun):
    """The share of the mean margin that is lost when the number of `noun` is removed at `place`.

    The mean difference is found in `train` and removed from `test`. place, noun: "head" or "last"
    train.stream[place][site], train.plural[noun]   arrays (n, d_model) and booleans (n,)
    test.margins(), test.margins(hooks)             nats (n,), of the model as it is, under hooks
    test.remove(site, place, direction, centre)     hooks that project a direction out
    """
    x, y = train.stream[place][site], train.plural[noun]
    true, false = x[y].mean(0), x[~y].mean(0)
    hooks = test.remove(site, place, true - false, (true + false) / 2)
    return 1 - test.margins(hooks).mean() / test.margins().mean()


def lost_by_hand(train, test, site, place, noun):
    x, y = (torch.tensor(a) for a in (train.stream[place][site], train.plural[noun]))
    v = x[y].mean(0) - x[~y].mean(0)
    c, v = (x[y].mean(0) + x[~y].mean(0)) / 2, v / v.norm()
    hooks = test.edit(site, place, lambda h: h - ((h - c) @ v)[:, None] * v)
    before = torch.tensor(test.margins())
    return (before - torch.tensor(test.margins(hooks))).sum() / before.sum()


MISTAKES_210 = [
    (
        edited(share_lost, "(true + false) / 2", "0 * true"),
        "Rows are moved to 0 along the direction: move them to the half-way point.",
    ),
    (
        edited(share_lost, "train.plural[noun]", "train.plural[place]"),
        "This is the number of the noun at `place`: take that of `noun`.",
    ),
    (
        edited(share_lost, "train.stream", "test.stream", "train.plural", "test.plural"),
        "The direction was found in `test`, where it is fitted to what it is removed from.",
    ),
    (
        edited(
            share_lost, "remove(site, place", "remove(site, {'head': 'last'}.get(place, 'head')"
        ),
        "The direction was removed at the other noun: remove it at `place`.",
    ),
    (edited(share_lost, "1 - test", "test"), "This is what is left: give the share that is lost."),
    (
        edited(
            share_lost,
            "1 - test.margins(hooks).mean() / test.margins().mean()",
            "(test.margins() - test.margins(hooks)).mean()",
        ),
        "This is the loss in nats: divide it by the mean margin before.",
    ),
    (
        edited(
            share_lost,
            "1 - test.margins(hooks).mean() / test.margins().mean()",
            "(1 - test.margins(hooks) / test.margins()).mean()",
        ),
        "A mean of ratios is ruined by one tiny margin: take the ratio of the means.",
    ),
]


@exercise(
    "2.10",
    title="An experiment: is it used?",
    difficulty=4,
    importance=5,
    minutes=8,
    reference=share_lost,
    right=[lost_by_hand],
    wrong=MISTAKES_210,
    hints=[
        "The direction is `x[y].mean(0) - x[~y].mean(0)`, the centre the point half way.",
        "`test.margins(test.remove(site, place, direction, centre)).mean()` is what is left.",
    ],
    after="That was the last exercise. The investigation is waiting.",
)
def check_210(answer) -> None:
    cells = itertools.cycle([("last", "head"), ("head", "head"), ("last", "last")])

    def make(draw):
        place, noun = next(cells)
        layer = 0 if place == "head" else shipped_model().n_layers - 2
        return *tasks(draw.choice([90, 91])), ("resid_post", layer), place, noun

    otherwise = "1 - mean margin after / mean margin before, with the direction from `train`."
    on_model(answer, share_lost, make, MISTAKES_210, otherwise)


# -- predictions -----------------------------------------------------------------------------


def planes_that_show(n: int = 400) -> list[bool]:
    """By layer: can the subject's number be read off the two directions of most variance?"""
    reader = lab.VerbReader(shipped_model(), n)
    shown, y = [], reader.train.y == "plural"
    for at in reader.sites.values():
        x = reader.train[at]
        plane = (x - x.mean(0)) @ principal_directions(x, 2).T
        shown.append(probes.fit_probe(plane, y).score(plane, y) > 0.9)
    return shown


@prediction(
    "2.12",
    question="Do the two directions of most variance show the subject's number?",
    options=["after every layer", "after some layers", "after none"],
)
def where_a_plane_shows_it() -> str:
    shown = planes_that_show()
    return f"after {'every layer' if all(shown) else 'some layers' if any(shown) else 'none'}"


@prediction(
    "2.13",
    question="After the last layer, which place does the true order take among 360?",
    options=["first", "2nd to 36th", "later"],
)
def rank_of_the_week() -> str:
    rank = week_rank()
    return "first" if rank == 1 else "2nd to 36th" if rank <= 36 else "later"


def week_rank() -> int:
    """The place of the true order of the days among all 360, after the last layer."""
    errors = lab.circle_errors(lab.read(shipped_model(), "day", 400, 6), 7)[:, -1]
    return int((errors <= errors[0] + 1e-9).sum())


@prediction(
    "2.14",
    question="With eight times as many sentences, how often is the probe right on the form?",
    options=["under 10 %", "10 to 50 %", "over 50 %"],
)
def forms_named() -> str:
    site = list(lab.sites_of(shipped_model()).values())[-1]
    curve = lab.memory_curve(shipped_model(), site, control_task, [3200])
    share = curve["which form"][0]
    return "under 10 %" if share < 0.1 else "over 50 %" if share > 0.5 else "10 to 50 %"


@prediction(
    "2.15",
    question="Where can a probe read the country of a landmark that it has never seen?",
    options=["at the name", "at the last token, if asked for it", "at the last token, always"],
)
def where_the_country_is() -> str:
    found = lab.where_and_when(shipped_model(), split_by_group, "landmark")
    best = {name: rows.mean(0).max() for name, rows in found.items()}
    if best["name, country asked"] > 0.7:
        return "at the name"
    always = best["last token, city asked"] > 0.7
    return "at the last token, always" if always else "at the last token, if asked for it"


@prediction(
    "2.16",
    question="How often is the cities' direction right on negated statements?",
    options=["as often as on cities", "about half of the time", "mostly wrong"],
)
def right_when_negated() -> str:
    cities = verdicts(shipped_model(), "landmark-city", 200, 4)
    sets = truth_sets(shipped_model(), 100, 3, ("cities", "cities, negated"))
    known, negated = lab.transfer(cities, sets, "last").values()
    found = negated[int(np.argmax(known))]
    names = ("mostly wrong", "about half of the time", "as often as on cities")
    return names[int(found > 0.35) + int(found > 0.7)]


@prediction(
    "2.17",
    question="The other noun's number is removed at that noun. How much of the margin is lost?",
    options=["none", "about half", "all"],
)
def lost_without_the_other_noun() -> str:
    lost = float(removal(*tasks(), ("resid_post", 0), "last").mean())
    return ["none", "about half", "all"][int(lost > 0.25) + int(lost > 0.75)]


# -- the investigation -----------------------------------------------------------------------

LENGTH = 0.25  # of a push, in lengths of the stream there
SEED = 977  # of the sentences that an answer is judged on


@functools.cache
def country_task(seed: int = SEED) -> CountryTask:
    """Sentences on landmarks of two countries; those of `SEED` are the judge's."""
    return CountryTask(shipped_model(), 500, seed)


def push_of(place: str, layer: str, vector) -> tuple:
    """(site, place, the vector at the length that counts)."""
    site = lab.sites_of(shipped_model())[layer]
    v = np.asarray(vector, dtype=float)
    size = np.linalg.norm(country_task().stream[place][site], axis=1).mean()
    return site, place, v / np.linalg.norm(v) * LENGTH * size


def random_push(rng) -> tuple:
    """A place, a layer and a direction, drawn without looking."""
    names = list(lab.sites_of(shipped_model()))
    vector = np.random.default_rng(rng.getrandbits(32)).normal(size=shipped_model().d_model)
    return rng.choice(("name", "last")), rng.choice(names), vector


def pushes(task: CountryTask):
    """(place, layer, direction) for each place and layer: the mean difference, and the gradient."""
    for place in ("name", "last"):
        for layer, site in lab.sites_of(shipped_model()).items():
            found = (
                mean_difference(task.stream[place][site], task.first),
                task.gradient(site, place),
            )
            yield from ((place, layer, v) for v in found if v.any())  # 0 where nobody reads it


@functools.cache
def best_push() -> tuple:
    """The best of `pushes`, found on other sentences than the judge's, tried on the judge's."""
    return max(pushes(country_task(5)), key=turned)


def turned(answer: tuple) -> float:
    """The share of the judge's sentences whose answer follows a push."""
    return country_task().follows(*push_of(*answer))


@investigation(
    "2",
    title="Where is the country used?",
    form='a place, a layer and a direction, such as ("name", "2", v), v with d_model numbers',
    chance=random_push,
    best=best_push,
    good=lambda: ("last", last_layer(), mean_difference(*last_stream())),
    foolish=[
        "last",
        ("last", "2"),
        ("verb", "2", np.ones(144)),
        ("last", "99", np.ones(144)),
        ("last", "2", np.ones(3)),
        ("last", "2", np.zeros(144)),
        ("last", "2", ["a"] * 144),
    ],
)
def score_push(answer) -> float:
    """The share of answers that are the first country with the push, less those without it turned:
    `follows`, with the push at a fixed length."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise Wrong(
            f'Give a place, a layer and a direction, ("last", "2", v), not {describe(answer)}.'
        )
    place = one_of(answer[0], ("name", "last"), "places")
    layer = one_of(str(answer[1]), lab.sites_of(shipped_model()), "layers")
    try:
        vector = as_numbers(answer[2])
    except (TypeError, ValueError):
        raise Wrong(f"The direction is {describe(answer[2])}: give numbers.") from None
    if vector.shape != (shipped_model().d_model,) or not np.isfinite(vector).all():
        raise Wrong(f"The direction has shape {vector.shape}: give ({shipped_model().d_model},).")
    if not vector.any():
        raise Wrong("The direction is zero: it points nowhere.")
    return turned((place, layer, vector))


def last_layer() -> str:
    """The name of the last layer but one."""
    return list(lab.sites_of(shipped_model()))[-2]


def last_stream() -> tuple:
    """What the learner would take: the stream at the last token there, and which country."""
    task = country_task(5)
    return task.stream["last"][lab.sites_of(shipped_model())[last_layer()]], task.first
