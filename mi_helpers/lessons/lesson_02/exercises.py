"""Exercises of lesson 02, probing."""

import itertools
import random

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit

from mi_helpers.course.check import (
    Wrong,
    agree,
    as_numbers,
    describe,
    draws,
    edits,
    exercise,
    expect,
    expect_shape,
)
from mi_helpers.lessons.lesson_02.predictions import (  # noqa: F401, the course looks here
    forms_named,
    lost_without_the_other_noun,
    rank_of_the_week,
    right_when_negated,
    score_push,
    tasks,
    where_a_plane_shows_it,
    where_the_country_is,
)
from mi_helpers.lessons.lesson_02.tools import (
    control_task,
    excess,
    mean_difference_probe,
    principal_directions,
    project_out,
    push,
    read_at,
    share_lost,
    split_by_group,
    train_probe,
)
from mi_helpers.lessons.shared import documents, on_model, shipped_model

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def sentence(draw):
    """An agreement sentence."""
    return next(iter(documents("agreement", 1, draw.integer(0, 100_000))))


def a_site(draw) -> tuple[str, int]:
    """The stream after one of the model's layers, but the last."""
    return "resid_post", draw.integer(0, shipped_model().n_layers - 2)


# -- 2.1 -------------------------------------------------------------------------------------


def read_by_counting(model, text, end, site):
    at = model.tokens(text[:end]).shape[1] - 1
    _, cache = model.run_with_cache(text, [site])
    return cache[site][0, at].tolist()


def read_by_words(model, text, end, site):
    _, cache = model.run_with_cache(text, [site])
    return cache[site][0, len(text[:end].split())]


MISTAKES_21 = edits(
    read_at,
    """
    text[:end] → text
        This is read at the end, where the answer has been said.
    [0, -1] → [0, 0]
        This is the first token, `<bos>`, which has seen nothing.
    [0, -1] → [0, -2]
        This is one token too early.
    [0, -1] → [0].mean(0)
        This is the mean over all tokens: read at one.
    [0, -1] → [0]
        These are all tokens, (pos, d_model): give one of them.
    """,
)
MISTAKES_21 += [(read_by_words, "You count words, but a full stop is a token, too.")]


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
        before = f"{sentence(draw).text} {sentence(draw).text}"  # tokens that are no words
        document = sentence(draw)
        end = len(before) + document.find("answer")[0].start
        return shipped_model(), f"{before} {document.text}", end, a_site(draw)

    otherwise = "Run the model on text[:end], and take the last position."
    on_model(answer, read_at, make, MISTAKES_21, otherwise)


# -- 2.2 -------------------------------------------------------------------------------------


def by_covariance(x, k):
    values, vectors = np.linalg.eigh(np.cov(np.asarray(x).T))
    return [vectors[:, i].tolist() for i in np.argsort(-values)[:k]]


def by_torch(x, k):
    x = torch.as_tensor(x)
    return torch.linalg.svd(x - x.mean(0, keepdim=True)).Vh[:k]


MISTAKES_22 = edits(
    principal_directions,
    """
    - x.mean(0) →
        These go through 0: subtract the mean first.
    [:k] → [::-1][:k]
        These are the directions along which x varies least: turn the order round.
    x - x.mean(0) → (x - x.mean(0)) / x.std(0)
        You gave every column the same spread: only subtract the mean.
    np.linalg.svd(centred, full_matrices=False)[2] → centred
        These are points themselves, not directions of the cloud.
    """,
)
COLUMNS, POINTS, LENGTHS = SHAPES_22 = edits(
    principal_directions,
    """
    [:k] → [:k].T
        The directions are in columns: give rows, (k, d).
    return np.linalg.svd(centred, full_matrices=False)[2][:k] → return centred[:, :k]
        These are the coordinates of the points, (n, k): give the directions.
    return → return 2 *
        Each direction should have length 1.
    """,
)


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
        expect(np.shape(got) != (d, k), COLUMNS[1])
        expect(np.shape(got) != (n, k), POINTS[1])
        expect_shape(got, (k, d))
        if same_directions(got, want):
            continue
        for mistake, message in MISTAKES_22:
            expect(not same_directions(got, mistake(x, k)), message)
        lengths = np.linalg.norm(as_numbers(got), axis=1)
        expect(bool(np.allclose(lengths, 1, atol=1e-4)), LENGTHS[1])
        raise Wrong("Centre x, and take the first k right singular vectors.")


def same_directions(got, want) -> bool:
    """Whether two sets of directions agree but for their signs."""
    got, want = as_numbers(got), as_numbers(want)
    signs = np.sign((got * want).sum(1, keepdims=True))
    return bool(np.allclose(signs * got, want, atol=1e-4))


# -- 2.3 -------------------------------------------------------------------------------------


def by_distance(x, y, fresh):
    x, fresh, y = torch.as_tensor(x), torch.as_tensor(fresh), torch.as_tensor(y).bool()
    to_true = (fresh - x[y].mean(0)).square().sum(1)
    return to_true < (fresh - x[~y].mean(0)).square().sum(1)


CUT = "(fresh - (true + false) / 2) @ (true - false)"
MISTAKES_23 = edits(
    mean_difference_probe,
    """
    - (true + false) / 2 →
        The cut is at zero, and the data's centre is elsewhere: subtract the half-way point.
    (true + false) / 2 → x.mean(0)
        The cut is at the mean of all examples, which leans towards the larger class.
    (true + false) / 2 → fresh.mean(0)
        The cut depends on the fresh rows: find it in x and y alone.
    > 0 → < 0
        True and false are swapped: take the mean of the true minus that of the false.
    > 0 →
        Return one boolean for each fresh row: is this above zero?
    """,
)


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
    survivors={f"{CUT} > 0 → {CUT} >= 0": "no point drawn lies half way"},
    hints=[
        "`x[y].mean(0)` is the mean of the true class.",
        "Project `fresh` minus the half-way point onto the difference of the means: the sign says.",
    ],
)
def check_23(answer) -> None:
    otherwise = "The cut is elsewhere than half way between the two means."
    agree(answer, mean_difference_probe, clouds, MISTAKES_23, otherwise, numpy=True)


# -- 2.4 -------------------------------------------------------------------------------------


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


SIGMOID = "1 / (1 + np.exp(-(x @ w + b)))"
MISTAKES_24 = edits(
    train_probe,
    f"""
    - rate → + rate
        The steps go uphill: subtract the gradient.
    error = {SIGMOID} - y → error = len(x) * ({SIGMOID} - y)
        The loss is the mean over the examples, not the sum.
    b = b - rate → b = b - 0
        The bias has not moved: it has a gradient, too.
    + penalty * w →
        The penalty is missing: its gradient is penalty · w.
    + penalty * w → + 2 * penalty * w
        The gradient of penalty / 2 · |w|² is penalty · w, half of what you have.
    {SIGMOID} → x @ w + b
        This is least squares: put a sigmoid around x @ w + b.
    error.mean() → (error.mean() + penalty * b)
        You penalise the bias, too: the penalty is on w alone.
    error.mean() → ({SIGMOID} - y).mean()
        Weights and bias move in turn: take both gradients at one place.
    """,
)


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


def from_classes(words, labels, seed):
    return control_task(words, sorted(set(labels)), seed)


def partly_true(words, labels, seed):
    rng, true = random.Random(seed), dict(zip(words, labels, strict=True))
    return {w: true[w] if rng.random() < 0.35 else rng.choice(labels) for w in sorted(true)}


def with_numpy(words, labels, seed):
    types = np.unique(words)
    return dict(zip(types, np.random.default_rng(seed).choice(labels, len(types)), strict=True))


def one_by_one(words, labels, seed):  # slow, as each call makes an array of the list
    rng = np.random.default_rng(seed)
    return {word: rng.choice(labels) for word in dict.fromkeys(words)}


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
    right=[with_numpy, one_by_one, by_shuffling],
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
        (partly_true, "more than chance"),
    ],
)
def check_25(answer) -> None:
    for draw in draws(2):
        count, share = draw.size("types", 600, 800), draw.number(0.08, 0.14)
        rare, common = draw.choice([("rare", "common"), ("odd", "usual"), ("plural", "singular")])
        types = [f"w{i}" for i in draw.rng.permutation(count)]
        truth = {word: rare if draw.rng.random() < share else common for word in types}
        words = [types[i % count] for i in draw.rng.permutation(2 * count)]
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
        abs(alike - chance) < 0.05,
        f"The labels agree with the true ones in {alike:.0%} of the words, more than chance, "
        f"{chance:.0%}: draw without a look at the truth.",
    )
    again, other = (answer(list(words), list(labels), each) for each in (seed, seed + 1))
    expect(again == table, "The same seed gives another table: draw from what the seed sets.")
    expect(other != table, "Another seed gives the same table: use `seed`.")


# -- 2.6 -------------------------------------------------------------------------------------


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
    return [group in names[: int(share * len(names))] for group in groups]


def split_by_sklearn(groups, share, seed):  # rounds up
    split = GroupShuffleSplit(1, test_size=share, random_state=seed)
    return np.isin(np.arange(len(groups)), next(split.split(groups, groups=groups))[1])


@exercise(
    "2.6",
    title="A split that cannot leak",
    difficulty=2,
    importance=5,
    minutes=4,
    reference=split_by_group,
    right=[split_in_torch, split_in_a_list, split_by_sklearn],
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
    want = share * len(names)  # of whole groups, rounded either way
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
    upside_down = abs(len(train) - want) < 1
    expect(not upside_down, "The mask is upside down: True is for the test set.")
    expect(
        abs(len(test) - want) < 1,
        f"{len(test)} of {len(names)} groups are in the test set; the share asked for, "
        f"{share:.2f}, makes {want:.1f}.",
    )
    moved = any((mask != other).any() for other in others)
    expect(
        moved or sorted(test) not in (names[: len(test)], names[-len(test) :]),
        "The test set is the first or the last groups in order, whatever they are: draw at random.",
    )
    expect(bool((again == mask).all()), "The same seed gives another split: use `seed`.")
    expect(moved, "Another seed gives the same split: use `seed`.")


# -- 2.7 -------------------------------------------------------------------------------------


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


MISTAKES_27 = edits(
    excess,
    """
    .sum(1) → .sum(1) / np.log(2)
        This is in bits: use the natural logarithm.
    np.log(possible) - → -
        This is all that the probe pays: subtract the ideal reader's own entropy.
    return ( → return -(
        The sign is turned round: the probe pays more, never less.
    .sum(1) → .mean(1)
        Sum over the classes, do not average.
    .sum(1) → .sum(1).mean()
        Give one number for each example; the lesson takes the mean.
    """,
)
MISTAKES_27 += [
    (
        lambda q, p: excess(np.maximum(p, 1e-12), q),
        "Probe and ideal reader are swapped: the ideal reader's p are the weights.",
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


def push_by_adding_zeros(model, tokens, site, position, vector):
    more = torch.zeros(tokens.shape[1], len(vector))
    more[position] = torch.as_tensor(np.asarray(vector), dtype=torch.float32)
    with model.hooks({site: lambda x: x + more}):
        return model(tokens)[0, -1].tolist()


MISTAKES_28 = edits(
    push,
    """
    [:, position] → [:]
        The vector was added at every position: add it at one.
    [:, position] → [:, -1]
        It was added at the last position: use `position`.
    += vector → = vector
        The stream was replaced by the vector: add it.
    {site: hook} → {}
        These are the logits of the model as it is.
    += vector → -= vector
        The vector was taken away: add it.
    [0, -1] → [0, position]
        These are the logits of the pushed token: give the last token's.
    [0, -1] → [0]
        These are the logits of every token: give the last token's.
    """,
)


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


def project_in_numpy(x, v, centre):
    x, v, centre = (np.asarray(each, dtype=float) for each in (x, v, centre))
    return x - np.outer((x - centre) @ v, v) / (v @ v)


def project_in_place(x, v, centre):
    x -= torch.outer((x - centre) @ v / (v @ v), v)
    return x


MISTAKES_29 = edits(
    project_out,
    """
    v / v.norm() → v
        v's length is not 1: divide it by its length.
    x - centre → x
        Every row lands at 0 along v: it should be at the centre.
    x - (( → ((
        This is the part along v, and nothing else: take it away.
    x - ((x - centre) @ u)[:, None] * u → x - v
        v itself is taken away: take away each row's own part along v.
    [:, None] * u → [:, None] * v
        The part along v is measured with a unit vector, but not taken away so.
    [:, None] * u → [:, None] * u - centre
        The centre has been subtracted from the result: only the part along v moves.
    x - (( → x - 2 * ((
        Each row ends up on the other side of the centre: go half as far.
    x - ((x - centre) @ u)[:, None] * u → centre + 0 * x
        Everything is set to the centre: across v, x should stay.
    """,
)


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


def lost_by_hand(train, test, site, place, noun):
    x, y = (torch.tensor(a) for a in (train.stream[place][site], train.plural[noun]))
    v = x[y].mean(0) - x[~y].mean(0)
    c, v = (x[y].mean(0) + x[~y].mean(0)) / 2, v / v.norm()
    hooks = test.edit(site, place, lambda h: h - ((h - c) @ v)[:, None] * v)
    before = torch.tensor(test.margins())
    return (before - torch.tensor(test.margins(hooks))).sum() / before.sum()


SHARE = "1 - test.margins(hooks).mean() / test.margins().mean()"
MISTAKES_210 = edits(
    share_lost,
    f"""
    (true + false) / 2 → 0 * true
        Rows are moved to 0 along the direction: move them to the half-way point.
    train.plural[noun] → train.plural[place]
        This is the number of the noun at `place`: take that of `noun`.
    true, false = → x, y = test.stream[place][site], test.plural[noun]; true, false =
        The direction was found in `test`, where it is fitted to what it is removed from.
    remove(site, place → remove(site, "headlast".replace(place, "")
        The direction was removed at the other noun: remove it at `place`.
    1 - test → test
        This is what is left: give the share that is lost.
    {SHARE} → (test.margins() - test.margins(hooks)).mean()
        This is the loss in nats: divide it by the mean margin before.
    {SHARE} → (1 - test.margins(hooks) / test.margins()).mean()
        A mean of ratios is ruined by one tiny margin: take the ratio of the means.
    """,
)


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
