"""Exercises of lesson 02, probing."""

import random

import numpy as np

from mi_helpers.course.check import Wrong, exercise, expect, expect_close, expect_none_of, same

# -- 2.1 -------------------------------------------------------------------------------------

STUB_21 = '''\
def two_token_features(previous, current, n_vocab):
    """A row of 2 * n_vocab zeros, with a 1 for the previous token and a 1 for the current one.

    previous, current: token ids (n,), arrays of integers. Returns an array (n, 2 * n_vocab).
    """
    ...
'''


def two_token_features(previous, current, n_vocab):
    """[one-hot(previous), one-hot(current)]: all that a model without context could use."""
    rows = np.eye(n_vocab)
    return np.concatenate([rows[previous], rows[current]], axis=1)


@exercise(
    "2.1",
    title="What two tokens can say",
    difficulty=2,
    importance=3,
    minutes=5,
    stub=STUB_21,
    reference=two_token_features,
    hints=[
        "`np.eye(n_vocab)[ids]` turns ids (n,) into one-hot rows (n, n_vocab).",
        "Put two such blocks side by side with `np.concatenate(..., axis=1)`.",
    ],
    wrong=[
        (lambda previous, current, n_vocab: np.eye(n_vocab)[current], "current token alone"),
        (
            lambda previous, current, n_vocab: np.eye(n_vocab)[previous] + np.eye(n_vocab)[current],
            "own half",
        ),
        (
            lambda previous, current, n_vocab: two_token_features(current, previous, n_vocab),
            "swapped",
        ),
        (lambda previous, current, n_vocab: np.stack([previous, current], 1), "ids themselves"),
    ],
)
def check_21(answer) -> None:
    previous, current, n = np.array([0, 2, 1]), np.array([1, 2, 0]), 4
    want, one = two_token_features(previous, current, n), np.eye(n)
    got = answer(previous, current, n)
    expect_none_of(
        got,
        (one[current], "This is the current token alone: put the previous one beside it."),
        (
            one[previous] + one[current],
            "The two tokens share their columns, so that nobody can tell 'a b' from 'b a': give "
            "each its own half.",
        ),
        (
            np.concatenate([one[current], one[previous]], axis=1),
            "The halves are swapped: the previous token comes first.",
        ),
        (
            np.stack([previous, current], 1),
            "These are the ids themselves, as if token 7 were more than token 6: a linear probe "
            "needs one column per token.",
        ),
    )
    expect_close(got, want, "Row 0 should have its ones in columns 0 and 4 + 1.")


# -- 2.2 -------------------------------------------------------------------------------------

STUB_22 = '''\
def control_task(words, labels, seed):
    """A random label for each word type: {word: label}.

    words: one word per example, many of them repeated; labels: the examples' true labels.
    Each word type's label is drawn from `labels`, so that common labels stay common.
    """
    ...
'''


def control_task(words, labels, seed):
    """Hewitt and Liang (2019): random over word types, the same for all tokens of one type."""
    rng = random.Random(seed)
    return {word: rng.choice(list(labels)) for word in sorted(set(words))}


@exercise(
    "2.2",
    title="A control task",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_22,
    reference=control_task,
    hints=[
        "`set(words)` has each word type once; sort it, so that the seed decides alone.",
        "`random.Random(seed).choice(labels)` draws a label as often as it is in the list.",
    ],
    wrong=[
        (
            lambda words, labels, seed: dict(zip(words, labels, strict=True)),
            "These are the true labels",
        ),
        (
            lambda words, labels, seed: {
                w: random.Random(seed).choice(labels) for w in sorted(set(words))
            },
            "same label",
        ),
        (
            lambda words, labels, seed: {
                w: random.Random(f"{seed} {w}").choice(sorted(set(labels))) for w in set(words)
            },
            "not from the set of classes",
        ),
        (
            lambda words, labels, seed: {
                i: random.Random(seed + i).choice(labels) for i in range(len(words))
            },
            "one per type",
        ),
        (
            lambda words, labels, seed: {w: random.choice(labels) for w in set(words)},
            "that the seed sets",
        ),
    ],
)
def check_22(answer) -> None:
    types = [f"w{i}" for i in range(400)]
    words = [word for word in types for _ in range(3)]
    labels = ["common" if i % 10 else "rare" for i in range(len(words))]
    truth = dict(zip(words, labels, strict=True))
    table = answer(list(words), list(labels), 0)
    expect(isinstance(table, dict), "Return a dictionary {word: label}.")
    expect(
        set(table) == set(types),
        f"There are {len(types)} word types and the table has {len(table)} entries: one per type, "
        "not one per example.",
    )
    strange = set(table.values()) - {"common", "rare"}
    expect(not strange, "Some words have a label that is not among the labels.")
    expect(
        len(set(table.values())) > 1,
        "Every word has the same label: draw a new one for each word type.",
    )
    agree = np.mean([table[word] == truth[word] for word in types])
    expect(
        agree < 0.98,
        "These are the true labels: a control task has to have nothing to do with them.",
    )
    share = np.mean([label == "rare" for label in table.values()])
    expect(
        share < 0.3,
        f"The label 'rare' is {share:.0%} of the control task and 10% of the data: draw from the "
        "list of labels, repetitions included, not from the set of classes.",
    )
    expect(share > 0.04, "The label 'rare' has nearly vanished: draw from the labels as they are.")
    expect(
        answer(list(words), list(labels), 0) == table,
        "The same seed gives another table: draw from a generator that the seed sets.",
    )
    expect(
        answer(list(words), list(labels), 1) != table,
        "Another seed gives the same table: use `seed`.",
    )


# -- 2.3 -------------------------------------------------------------------------------------

STUB_23 = '''\
def most_selective(probe, control):
    """The index of the layer whose probe is most selective, and its selectivity.

    probe, control: accuracies by layer, on the task and on its control task.
    """
    ...
'''


def most_selective(probe, control):
    """Selectivity is accuracy on the task minus accuracy on the control task."""
    selectivity = np.asarray(probe) - np.asarray(control)
    return int(selectivity.argmax()), float(selectivity.max())


@exercise(
    "2.3",
    title="The most selective layer",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_23,
    reference=most_selective,
    hints=[
        "Turn both lists into arrays and subtract.",
        "`argmax` gives the index of the largest entry, `max` the entry itself.",
    ],
    wrong=[
        (
            lambda probe, control: (
                int(np.argmax(probe)),
                max(probe) - control[np.argmax(probe)],
            ),
            "Subtract before",
        ),
        (
            lambda probe, control: (
                int(np.argmax(np.array(control) - probe)),
                float(np.max(np.array(control) - probe)),
            ),
            "task minus control",
        ),
        (
            lambda probe, control: (
                int(np.argmax(np.divide(probe, control))),
                float(np.max(np.divide(probe, control))),
            ),
            "ratio",
        ),
        (lambda probe, control: most_selective(probe, control)[0], "Return two things"),
    ],
)
def check_23(answer) -> None:
    probe, control = [0.50, 0.98, 0.97, 0.70], [0.50, 0.95, 0.60, 0.36]
    got = answer(list(probe), list(control))
    expect(
        isinstance(got, tuple) and len(got) == 2,
        "Return two things: the layer's index and its selectivity.",
    )
    layer, value = got
    expect(
        layer != 1,
        "Layer 1 has the highest accuracy, and its control task is almost as high: there the probe "
        "learns words. Subtract before you look for the best.",
    )
    expect(
        layer != 0,
        "Layer 0 has the lowest selectivity: is the sign turned round? It is task minus control.",
    )
    expect(
        layer != 3,
        "Layer 3 has the highest *ratio*. Selectivity is a difference.",
    )
    expect(layer == 2, "The best layer of this example is number 2, counted from 0.")
    expect_close(value, 0.37, "The layer is right; its selectivity is 0.97 - 0.60.", 1e-6)


# -- 2.4 -------------------------------------------------------------------------------------

STUB_24 = '''\
def split_by_group(groups, share, seed):
    """A mask (n,), True for the test set: a random `share` of the *groups*, each as a whole.

    groups: one name per example, such as the landmark that its sentence is about.
    """
    ...
'''


def split_by_group(groups, share, seed):
    """Draw groups, not examples."""
    names = sorted(set(groups))
    chosen = set(random.Random(seed).sample(names, round(share * len(names))))
    return np.array([group in chosen for group in groups])


@exercise(
    "2.4",
    title="A split that cannot leak",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_24,
    reference=split_by_group,
    hints=[
        "First list the groups, each once; then draw from that list.",
        "`random.Random(seed).sample(names, k)`, then ask of each example: is its group in it?",
    ],
    wrong=[
        (
            lambda groups, share, seed: np.random.default_rng(seed).random(len(groups)) < share,
            "on both sides",
        ),
        (
            lambda groups, share, seed: np.isin(
                groups, sorted(set(groups))[: round(share * len(set(groups)))]
            ),
            "draw at random",
        ),
        (lambda groups, share, seed: ~split_by_group(groups, share, seed), "upside down"),
        (lambda groups, share, seed: split_by_group(groups, share, 3), "Another seed"),
        (
            lambda groups, share, seed: np.flatnonzero(split_by_group(groups, share, seed)),
            "one boolean per example",
        ),
    ],
)
def check_24(answer) -> None:
    groups = [f"g{i % 20:02d}" for i in range(400)]
    mask = np.asarray(answer(list(groups), 0.3, 0))
    expect(
        mask.shape == (400,) and mask.dtype == bool,
        "Return one boolean per example, as an array: True for the test set.",
    )
    test, train = (
        {g for g, m in zip(groups, mask, strict=True) if m == side} for side in (True, False)
    )
    shared = len(test & train)
    expect(
        shared == 0,
        f"{shared} of the 20 groups are on both sides: the probe can know them by heart. Draw "
        "groups, not examples.",
    )
    expect(bool(test) and bool(train), "One side is empty.")
    expect(
        len(test) != 14,
        "70% of the groups are in the test set: the mask is upside down.",
    )
    expect(len(test) == 6, f"{len(test)} of 20 groups are in the test set; a share of 0.3 is 6.")
    expect(
        sorted(test) not in (sorted(set(groups))[:6], sorted(set(groups))[-6:]),
        "The test set is the first or the last groups in order, whatever they are: draw at random.",
    )
    again, other = (np.asarray(answer(list(groups), 0.3, seed)) for seed in (0, 1))
    expect(bool((again == mask).all()), "The same seed gives another split: use `seed`.")
    expect(bool((other != mask).any()), "Another seed gives the same split: use `seed`.")


# -- 2.5 -------------------------------------------------------------------------------------

STUB_25 = '''\
def mean_difference_probe(x, y, fresh):
    """Classify with the difference of the class means alone, no training.

    x: features (n, d); y: booleans (n,); fresh: features (m, d) to classify.
    Returns booleans (m,): which side of the point half way between the two class means.
    """
    ...
'''


def mean_difference_probe(x, y, fresh):
    """(fresh - midpoint) · (mean of the true - mean of the false) > 0."""
    one, other = x[y].mean(0), x[~y].mean(0)
    return (fresh - (one + other) / 2) @ (one - other) > 0


@exercise(
    "2.5",
    title="A probe without training",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_25,
    reference=mean_difference_probe,
    hints=[
        "`x[y].mean(0)` is the mean of the true class.",
        "Project `fresh` minus the midpoint onto the difference of the means: the sign says.",
    ],
    wrong=[
        (
            lambda x, y, fresh: fresh @ (x[y].mean(0) - x[~y].mean(0)) > 0,
            "cut is at zero",
        ),
        (
            lambda x, y, fresh: (fresh - x.mean(0)) @ (x[y].mean(0) - x[~y].mean(0)) > 0,
            "larger class",
        ),
        (lambda x, y, fresh: ~mean_difference_probe(x, y, fresh), "swapped"),
        (lambda x, y, fresh: fresh @ (x[y].mean(0) - x[~y].mean(0)), "one boolean"),
    ],
)
def check_25(answer) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(200) < 160  # four in five are true
    x = rng.normal(size=(200, 3)) * 0.1 + np.where(y[:, None], [6.0, 4, 1], [2.0, 4, 1])
    fresh = np.stack([np.linspace(-1.0, 9.0, 101), np.full(101, 4.0), np.full(101, 1.0)], 1)
    one, other = x[y].mean(0), x[~y].mean(0)
    got, v = np.asarray(answer(x.copy(), y.copy(), fresh.copy())), one - other
    want = (fresh - (one + other) / 2) @ v > 0
    expect(
        got.shape == (101,) and got.dtype == bool,
        "Return one boolean per fresh row: is it beyond the midpoint?",
    )
    expect_none_of(
        got,
        (
            fresh @ v > 0,
            "The cut is at zero: the data's own centre is elsewhere. Subtract the midpoint.",
        ),
        (
            (fresh - x.mean(0)) @ v > 0,
            "The cut is at the mean of all examples, which leans towards the larger class: take "
            "the point half way between the two class means.",
        ),
        (
            ~want,
            "True and false are swapped: take the mean of the true minus the mean of the false.",
        ),
    )
    expect(bool((got == want).all()), "The cut is elsewhere than half way between the means.")


# -- 2.6 -------------------------------------------------------------------------------------

STUB_26 = '''\
def project_out(x, v, centre):
    """Move each row of x along the direction v until it is level with the centre.

    x: (n, d); v: a direction (d,), of any length; centre: (d,).
    """
    ...
'''


def project_out(x, v, centre):
    """x - ((x - centre) · u) u, with u = v / |v|."""
    u = v / np.linalg.norm(v)
    return x - ((x - centre) @ u)[:, None] * u


@exercise(
    "2.6",
    title="Taking a direction out",
    difficulty=3,
    importance=5,
    minutes=10,
    stub=STUB_26,
    reference=project_out,
    hints=[
        "Divide v by its length first: `np.linalg.norm(v)`.",
        "How far is each row from the centre along v? `(x - centre) @ u`, one number per row.",
    ],
    wrong=[
        (lambda x, v, centre: x - ((x - centre) @ v)[:, None] * v, "25 times too much"),
        (lambda x, v, centre: project_out(x, v, 0 * centre), "where the centre is"),
        (lambda x, v, centre: x - project_out(x, v, centre), "nothing else"),
        (lambda x, v, centre: x - v, "own part along v"),
        (
            lambda x, v, centre: x - ((x - centre) @ v / np.linalg.norm(v))[:, None] * v,
            "measured with",
        ),
    ],
)
def check_26(answer) -> None:
    rng = np.random.default_rng(0)
    x, v, centre = rng.normal(size=(5, 4)) + 3, np.array([0.0, 3.0, 0.0, 4.0]), np.full(4, 2.0)
    want, u, before = project_out(x, v, centre), v / 5, x.copy()
    got = answer(x, v.copy(), centre.copy())
    expect(
        np.array_equal(x, before), "Your function changes the x that it was given: work on a copy."
    )
    along = ((x - centre) @ u)[:, None]
    expect_none_of(
        got,
        (
            x - ((x - centre) @ v)[:, None] * v,
            "v is used as it comes: its length is 5, so 25 times too much is taken away. Divide it "
            "by its length first.",
        ),
        (
            x - (x @ u)[:, None] * u,
            "Every row lands at 0 along v: it should land where the centre is.",
        ),
        (along * u, "This is the part along v, and nothing else: it is what should be taken away."),
        (
            x - v,
            "v itself is taken away from each row: take away only each row's own part along v.",
        ),
        (x - along * v, "The part along v is measured with |v| = 1 and taken away with |v| = 5."),
        (
            np.broadcast_to(centre, x.shape),
            "Everything is set to the centre: across v, x should stay.",
        ),
    )
    expect_close(got, want, "Afterwards (x - centre) · v should be 0, and x unchanged across v.")


# -- 2.7 -------------------------------------------------------------------------------------

STUB_27 = '''\
def excess(probe_p, ideal_p):
    """By how many nats a probe is worse than the ideal reader: the mean over the examples of
    cross-entropy(ideal, probe) - entropy(ideal).

    probe_p, ideal_p: probabilities (n, classes), all above zero.
    """
    ...
'''


def excess(probe_p, ideal_p):
    """mean Σ p (log p - log q): KL(ideal ‖ probe), which is never negative."""
    return float((ideal_p * (np.log(ideal_p) - np.log(probe_p))).sum(1).mean())


@exercise(
    "2.7",
    title="Above the floor",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_27,
    reference=excess,
    hints=[
        "For one example: Σ p log p - Σ p log q, with p the ideal reader's and q the probe's.",
        "Sum over the classes (`axis=1`), then take the mean over the examples.",
    ],
    wrong=[
        (lambda probe_p, ideal_p: excess(ideal_p, probe_p), "swapped"),
        (lambda probe_p, ideal_p: excess(probe_p, ideal_p) / np.log(2), "in bits"),
        (
            lambda probe_p, ideal_p: -(ideal_p * np.log(probe_p)).sum(1).mean(),
            "cross-entropy alone",
        ),
        (
            lambda probe_p, ideal_p: (ideal_p * np.log(ideal_p / probe_p)).mean(),
            "Sum over the classes",
        ),
    ],
)
def check_27(answer) -> None:
    rng = np.random.default_rng(0)
    probe_p, ideal_p = rng.dirichlet([2.0] * 3, 40), rng.dirichlet([2.0] * 3, 40)
    want, log = excess(probe_p, ideal_p), np.log
    got = answer(probe_p.copy(), ideal_p.copy())
    right = ideal_p.argmax(1)
    rows = (ideal_p * (log(ideal_p) - log(probe_p))).sum(1)
    expect_none_of(
        got,
        (
            excess(ideal_p, probe_p),
            "Probe and ideal reader are swapped: the ideal reader's p are the weights.",
        ),
        (want / log(2), "This is in bits: use the natural logarithm."),
        (-want, "The sign is turned round: a probe cannot be better than the ideal reader."),
        (
            -(ideal_p * log(probe_p)).sum(1).mean(),
            "This is the cross-entropy alone: take the ideal reader's own entropy away.",
        ),
        (rows.sum(), "This is the sum over the examples: take the mean."),
        (
            (-log(probe_p[np.arange(40), right]) + log(ideal_p[np.arange(40), right])).mean(),
            "Only the likeliest class is counted: weigh every class with the ideal reader's p.",
        ),
        (
            (ideal_p * (log(ideal_p) - log(probe_p))).mean(),
            "Sum over the classes, then take the mean.",
        ),
    )
    expect_close(got, want, "Compare with Σ p (log p - log q), averaged over the examples.")


# -- 2.8 -------------------------------------------------------------------------------------

STUB_28 = '''\
def angle_error(predicted, true_index, n):
    """The angle in degrees, 0 to 180, between predictions and true places on a circle of n.

    predicted: (m, 2), a cosine and a sine, of any length; true_index: (m,), integers 0 to n - 1;
    the true place of index i is at the angle 2 * pi * i / n.
    """
    ...
'''


def angle_error(predicted, true_index, n):
    """The turn between the two, wrapped into -180 to 180 degrees, without its sign."""
    turn = np.arctan2(predicted[:, 1], predicted[:, 0]) - 2 * np.pi * true_index / n
    return np.degrees(np.abs((turn + np.pi) % (2 * np.pi) - np.pi))


@exercise(
    "2.8",
    title="How far off, on a circle",
    difficulty=3,
    importance=3,
    minutes=10,
    stub=STUB_28,
    reference=angle_error,
    hints=[
        "`np.arctan2(sine, cosine)` is the angle of a prediction, whatever its length.",
        "Wrap the difference: `(turn + pi) % (2 * pi) - pi` lies between -pi and pi.",
    ],
    wrong=[
        (
            lambda predicted, true_index, n: np.degrees(
                np.abs(np.arctan2(predicted[:, 1], predicted[:, 0]) - 2 * np.pi * true_index / n)
            ),
            "shorter way",
        ),
        (
            lambda predicted, true_index, n: np.radians(angle_error(predicted, true_index, n)),
            "in radians",
        ),
        (
            lambda predicted, true_index, n: angle_error(predicted[:, ::-1], true_index, n),
            "sine first",
        ),
        (
            lambda predicted, true_index, n: angle_error(predicted, true_index, n).mean(),
            "not their mean",
        ),
    ],
)
def check_28(answer) -> None:
    n, true_index = 12, np.array([0, 1, 6, 11, 0, 3])
    given = np.radians([350.0, 40.0, 170.0, 15.0, 180.0, 90.0])
    predicted = np.stack([np.cos(given), np.sin(given)], 1) * np.array([[1, 2, 0.5, 3, 1, 1]]).T
    want = np.array([10.0, 10.0, 10.0, 45.0, 180.0, 0.0])
    got = answer(predicted.copy(), true_index.copy(), n)
    angle = np.arctan2(predicted[:, 1], predicted[:, 0])
    truth = 2 * np.pi * true_index / n
    swapped = np.arctan2(predicted[:, 0], predicted[:, 1]) - truth

    def wrapped(turn):
        return np.degrees(np.abs((turn + np.pi) % (2 * np.pi) - np.pi))

    expect_none_of(
        got,
        (
            np.degrees(np.abs(angle - truth)),
            "An error above 180 degrees: from December to January is one step, not eleven. Go "
            "round the shorter way.",
        ),
        (
            np.degrees(np.abs(angle % (2 * np.pi) - truth)),
            "Both angles are from 0 to 360, but their difference is not wrapped: 350 and 0 are 10 "
            "degrees apart.",
        ),
        (np.radians(want), "This is in radians: turn it into degrees."),
        (wrapped(swapped), "`arctan2` takes the sine first, then the cosine."),
        (
            np.degrees((angle - truth + np.pi) % (2 * np.pi) - np.pi),
            "An error has no sign: from 0 to 180.",
        ),
    )
    if same(np.mean(want), got):
        raise Wrong("Return one angle per prediction, not their mean.")
    expect_close(got, want, "The errors of the example are 10, 10, 10, 45, 180 and 0.", 1e-4)
