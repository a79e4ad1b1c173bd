"""Exercises of lesson 08, circuit tracing."""

import numpy as np

from mi_helpers.course.check import exercise, expect, expect_close, expect_none_of

# -- 8.1 -------------------------------------------------------------------------------------

STUB_81 = '''\
def edge(write, x, gain, encoder):
    """What a source adds to a feature's pre-activation, with the norm's denominator frozen.

    write    (d_model,), what the source adds to the stream
    x        (d_model,), the whole stream that the norm divides: RMSNorm, epsilon 0
    gain     (d_model,), the norm's gain
    encoder  (d_model,), the feature's encoder column
    Returns a number.
    """
    ...
'''


def edge(write, x, gain, encoder):
    """(write / rms(x) · gain) · encoder: the denominator is that of the whole stream."""
    return float((write / np.sqrt((x**2).mean()) * gain) @ encoder)


@exercise(
    "8.1",
    title="One edge",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_81,
    reference=edge,
    hints=[
        "The norm divides by the root mean square of x, whatever the source is.",
        "`write / np.sqrt((x**2).mean()) * gain`, then the scalar product with the encoder.",
    ],
    wrong=[
        (lambda write, x, gain, encoder: edge(write, write, gain, encoder), "own size"),
        (lambda write, x, gain, encoder: edge(write, x, 1.0, encoder), "gain is missing"),
        (lambda write, x, gain, encoder: (write * gain) @ encoder, "Nothing is divided"),
        (
            lambda write, x, gain, encoder: write / np.linalg.norm(x) * gain @ encoder,
            "length of x",
        ),
        (
            lambda write, x, gain, encoder: edge(x + write, x, gain, encoder),
            "the source's part alone",
        ),
    ],
)
def check_81(answer) -> None:
    write, x = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, -4.0])
    gain, encoder = np.array([1.0, 2.0, 0.5]), np.array([2.0, -1.0, 4.0])
    got = answer(write.copy(), x.copy(), gain.copy(), encoder.copy())
    rms = np.sqrt((x**2).mean())
    expect_none_of(
        got,
        (
            (write / np.sqrt((write**2).mean()) * gain) @ encoder,
            "This divides by the source's own size: the denominator is frozen at that of the whole "
            "stream, or edges would not sum.",
        ),
        (write / rms @ encoder, "The norm's gain is missing."),
        ((write * gain) @ encoder, "Nothing is divided: the norm's denominator is missing."),
        (
            (write / np.linalg.norm(x) * gain) @ encoder,
            "This divides by the length of x: RMSNorm divides by the root of the *mean* square.",
        ),
        (
            ((x + write) / rms * gain) @ encoder,
            "This is what the feature reads in all: an edge is the source's part alone.",
        ),
    )
    expect_close(got, edge(write, x, gain, encoder), "Divide, multiply by the gain, read.")


# -- 8.2 -------------------------------------------------------------------------------------

STUB_82 = '''\
def error_node(mlp_out, activations, W_dec, b_dec):
    """What the error nodes write: all that the transcoder leaves unexplained, (pos, d_model).

    mlp_out      (pos, d_model), what the MLP writes in truth
    activations  (pos, d_latent), of the transcoder
    W_dec        (d_latent, d_model); b_dec (d_model,)
    """
    ...
'''


def error_node(mlp_out, activations, W_dec, b_dec):
    """mlp_out - (f W_dec + b_dec)."""
    return mlp_out - (activations @ W_dec + b_dec)


@exercise(
    "8.2",
    title="What is left over",
    difficulty=1,
    importance=5,
    minutes=5,
    stub=STUB_82,
    reference=error_node,
    hints=[
        "The transcoder writes `activations @ W_dec + b_dec`.",
        "Transcoder plus error has to be exactly what the MLP writes.",
    ],
    wrong=[
        (lambda out, f, W, b: out - f @ W, "b_dec is missing"),
        (lambda out, f, W, b: f @ W + b - out, "sign"),
        (lambda out, f, W, b: out - ((f > 0) @ W + b), "multiply by activations"),
        (lambda out, f, W, b: (error_node(out, f, W, b) ** 2).sum(1), "writes a vector"),
    ],
)
def check_82(answer) -> None:
    rng = np.random.default_rng(0)
    out, W, b = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=4)
    f = np.maximum(rng.normal(size=(3, 5)), 0) * 2
    got = answer(out.copy(), f.copy(), W.copy(), b.copy())
    want = error_node(out, f, W, b)
    expect_none_of(
        got,
        (out - f @ W, "b_dec is missing: the transcoder writes it at every position."),
        (-want, "The sign is turned round: transcoder plus error has to be what the MLP writes."),
        (
            out - ((f > 0) @ W + b),
            "Each decoder row counts as often as its feature is active: multiply by activations.",
        ),
        ((want**2).sum(1), "This is the size of the error: the node writes a vector."),
    )
    expect_close(got, want, "Transcoder plus error has to give mlp_out, at every position.")


# -- 8.3 -------------------------------------------------------------------------------------

STUB_83 = '''\
def normalise(edges):
    """The share of each node's input that comes through each edge, (n, n).

    edges: (n, n), edges[target, source], of both signs. The amounts into a node sum to 1; a node
    without incoming edges keeps zeros.
    """
    ...
'''


def normalise(edges):
    """|edges| over the sum of its row."""
    size = np.abs(edges)
    total = size.sum(1, keepdims=True)
    return size / np.where(total > 0, total, 1.0)


@exercise(
    "8.3",
    title="Shares of the input",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_83,
    reference=normalise,
    hints=[
        "First amounts, `np.abs`, then the sum of each row.",
        "`np.where(total > 0, total, 1)` keeps an empty row from dividing by zero.",
    ],
    wrong=[
        (
            lambda e: e / np.where(e.sum(1) == 0, 1, e.sum(1))[:, None],
            "cancel in the sum",
        ),
        (
            lambda e: e / np.where(np.abs(e).sum(1) == 0, 1, np.abs(e).sum(1))[:, None],
            "kept their signs",
        ),
        (
            lambda e: np.abs(e) / np.where(np.abs(e).sum(0) == 0, 1, np.abs(e).sum(0)),
            "Rows are targets",
        ),
        (lambda e: np.abs(e) / np.abs(e).sum(), "each row should"),
    ],
)
def check_83(answer) -> None:
    edges = np.array([[0.0, 0, 0, 0], [2, 0, 0, 0], [3, -1, 0, 0], [-2, 1, 5, 0]])
    before = edges.copy()
    got = answer(edges)
    expect(np.array_equal(edges, before), "Your function changes the edges it was given: copy.")
    size = np.abs(before)
    with np.errstate(divide="ignore", invalid="ignore"):
        mistakes = (
            (
                before / np.where(before.sum(1) == 0, 1, before.sum(1))[:, None],
                "Positive and negative edges cancel in the sum: take amounts first.",
            ),
            (
                before / np.where(size.sum(1) == 0, 1, size.sum(1))[:, None],
                "The sum is of amounts, and the edges have kept their signs: amounts there, too.",
            ),
            (
                size / np.where(size.sum(0) == 0, 1, size.sum(0)),
                "Columns sum to 1: that is each *source's* output. Rows are targets.",
            ),
            (
                size / size.sum(1, keepdims=True),
                "A node without inputs becomes NaN: leave its row at zero.",
            ),
            (size / size.sum(), "All edges together sum to 1: each row should."),
        )
    expect_none_of(got, *mistakes)
    expect_close(got, normalise(before), "Each row's amounts should sum to 1, or be all zero.")


# -- 8.4 -------------------------------------------------------------------------------------

STUB_84 = '''\
def influence(A, weights):
    """How much of the logits comes through each node, over paths of every length, (n,).

    A        (n, n), A[target, source]: normalised edges, with nothing on or above the diagonal
    weights  (n,): the logits' probabilities, 0 at all other nodes
    """
    ...
'''


def influence(A, weights):
    """weights (A + A² + A³ + ...), which ends, as no path is longer than the graph."""
    total, step = np.zeros(len(A)), weights @ A
    for _ in range(len(A)):
        total, step = total + step, step @ A
    return total


@exercise(
    "8.4",
    title="All paths at once",
    difficulty=3,
    importance=5,
    minutes=15,
    stub=STUB_84,
    reference=influence,
    hints=[
        "`weights @ A` is what comes by one edge, `weights @ A @ A` by two.",
        "Sum until no path is left, or use (I - A)⁻¹ - I.",
    ],
    wrong=[
        (lambda A, w: w @ A, "direct edges alone"),
        (lambda A, w: w @ np.linalg.inv(np.eye(len(A)) - A), "influences itself"),
        (
            lambda A, w: np.linalg.inv(np.eye(len(A)) - A) @ w - w,
            "weights stand on the left",
        ),
        (lambda A, w: w @ A + w @ A @ A, "length 3"),
    ],
)
def check_84(answer) -> None:
    A = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0.25, 0, 0.75, 0, 0],
                  [0, 0.2, 0.3, 0.5, 0]], dtype=float)  # fmt: skip
    w = np.array([0, 0, 0, 0, 1.0])
    got, want = answer(A.copy(), w.copy()), influence(A, w)
    eye = np.eye(5)
    expect_none_of(
        got,
        (w @ A, "These are direct edges alone: follow the paths further, A², A³ and so on."),
        (
            w @ np.linalg.inv(eye - A),
            "The path of length 0 is counted, so that the logit influences itself: subtract it.",
        ),
        (
            np.linalg.inv(eye - A) @ w - w,
            "This walks from sources to targets: A[target, source], so weights stand on the left.",
        ),
        (w @ A @ A, "These are the paths of length 2 alone: sum over all lengths."),
        (w @ A + w @ A @ A, "Paths of length 3 are missing: go on until nothing is left."),
    )
    expect_close(got, want, "Node 0 gets 0.25 · 0.5 + 0.3 + 0.75 · 0.5, one term per path.")


# -- 8.5 -------------------------------------------------------------------------------------

STUB_85 = '''\
def fewest(influence, threshold):
    """A mask (n,): the fewest nodes whose influence sums to at least `threshold` of all.

    influence: (n,), none negative and no two alike.
    """
    ...
'''


def fewest(influence, threshold):
    """From the largest down, until the sum is reached; the node that reaches it counts."""
    order = np.argsort(-influence)
    share = np.cumsum(influence[order]) / influence.sum()
    keep = np.zeros(len(influence), dtype=bool)
    keep[order[: int((share < threshold - 1e-12).sum()) + 1]] = True
    return keep


@exercise(
    "8.5",
    title="The fewest that are enough",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_85,
    reference=fewest,
    hints=[
        "Sort from the largest down, and sum as you go: `np.cumsum`.",
        "Count the sums that are still below the threshold; one node more is enough.",
    ],
    wrong=[
        (
            lambda x, t: np.isin(
                np.arange(len(x)),
                np.argsort(-x)[: int((np.cumsum(np.sort(x)[::-1]) / x.sum() < t).sum())],
            ),
            "too early",
        ),
        (lambda x, t: x / x.sum() >= t, "by itself"),
        (
            lambda x, t: np.isin(np.arange(len(x)), np.argsort(-x)[: round(t * len(x))]),
            "of the *nodes*",
        ),
        (lambda x, t: np.cumsum(x) / x.sum() <= t, "sort by influence"),
        (lambda x, t: np.flatnonzero(fewest(x, t)), "one boolean"),
    ],
)
def check_85(answer) -> None:
    values = np.array([1.0, 8, 2, 5, 4])  # of 20 in all: 8, 13, 17, 19, 20
    got = np.asarray(answer(values.copy(), 0.8))
    expect(
        got.shape == (5,) and got.dtype == bool,
        "Return one boolean per node: is it kept?",
    )
    order = np.argsort(-values)
    expect_none_of(
        got,
        (
            np.isin(np.arange(5), order[:2]),
            "You stop one node too early: 13 of 20 is less than 0.8, so the next one is needed.",
        ),
        (
            values / values.sum() >= 0.8,
            "This asks which node has 0.8 by itself: sum from the largest down.",
        ),
        (
            np.isin(np.arange(5), order[:4]),
            "This keeps 0.8 of the *nodes*: it is 0.8 of the influence, which few nodes carry.",
        ),
        (
            np.cumsum(values) / values.sum() <= 0.8,
            "The nodes are summed in the order in which they come: sort by influence first.",
        ),
    )
    expect(bool((got == fewest(values, 0.8)).all()), "8 + 5 + 4 is the first sum above 16.")
    full = np.asarray(answer(values.copy(), 1.0))
    expect(bool(full.all()), "With a threshold of 1 every node should stay.")
    exact = np.asarray(answer(np.array([6.0, 3, 1]), 0.6))
    expect(
        int(exact.sum()) == 1,
        "Influence 6, 3, 1 and a threshold of 0.6: the first node is exactly enough.",
    )


# -- 8.6 -------------------------------------------------------------------------------------

STUB_86 = '''\
def completeness(A, weights, is_error):
    """The share of the inputs of all nodes that does not come from error nodes.

    A         (n, n), A[target, source]: normalised, each row summing to 1, or to 0 without inputs
    weights   (n,): how much each node counts: its influence, or a logit's probability
    is_error  (n,), booleans
    Only nodes that have inputs count.
    """
    ...
'''


def completeness(A, weights, is_error):
    """Σ weight · (1 - share from errors) / Σ weight, over the nodes with inputs."""
    w = np.where(A.sum(1) > 0, weights, 0.0)
    return float((w * (1 - A[:, is_error].sum(1))).sum() / w.sum())


@exercise(
    "8.6",
    title="How complete is the graph?",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_86,
    reference=completeness,
    hints=[
        "`A[:, is_error].sum(1)` is the share of each node's inputs that errors provide.",
        "Set the weight of a node without inputs to 0, then take the weighted mean.",
    ],
    wrong=[
        (lambda A, w, e: 1 - completeness(A, w, e), "take it from 1"),
        (
            lambda A, w, e: (w * (1 - A[:, e].sum(1))).sum() / w.sum(),
            "Leave them out",
        ),
        (
            lambda A, w, e: (1 - A[A.sum(1) > 0][:, e].sum(1)).mean(),
            "weigh them",
        ),
        (lambda A, w, e: w[~e].sum() / w.sum(), "where the *inputs*"),
    ],
)
def check_86(answer) -> None:
    A = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.6, 0.2, 0]])
    w, error = np.array([0.4, 0.3, 0.5, 1.0]), np.array([False, True, False, False])
    got, want = answer(A.copy(), w.copy(), error.copy()), completeness(A, w, error)
    expect_none_of(
        got,
        (1 - want, "This is the share that errors *do* explain: take it from 1."),
        (
            (w * (1 - A[:, error].sum(1))).sum() / w.sum(),
            "Nodes without inputs count as explained: an embedding needs no explanation. Leave "
            "them out.",
        ),
        (
            (1 - A[2:, error].sum(1)).mean(),
            "All nodes count alike: weigh them, as little depends on most of them.",
        ),
        (
            w[~error].sum() / w.sum(),
            "This asks which nodes are errors: ask where the *inputs* of the others come from.",
        ),
    )
    expect_close(got, want, "Here: (0.5 · 0.9 + 1 · 0.4) / 1.5.")


# -- 8.7 -------------------------------------------------------------------------------------

STUB_87 = '''\
def predicted_change(edges, values, switched_off):
    """What the graph says of the last node's value when one feature is switched off.

    edges         (n, n), edges[target, source], nothing on or above the diagonal
    values        (n,): activations of the features; nodes without incoming edges never change
    switched_off  the number of the feature that is held at zero
    A feature whose value changes by a share of itself passes on the same share of its edges.
    """
    ...
'''


def predicted_change(edges, values, switched_off):
    """Walk through the nodes in order; each one's share is its change over its value."""
    share = np.zeros(len(values))
    for i in range(len(values)):
        change = edges[i] @ share
        share[i] = -1.0 if i == switched_off else change / values[i]
    return float(change)


@exercise(
    "8.7",
    title="Predict an intervention",
    difficulty=4,
    importance=5,
    minutes=15,
    stub=STUB_87,
    reference=predicted_change,
    hints=[
        "Go through the nodes in order, and keep for each the share by which it changes.",
        "A node's change is `edges[i] @ share`; its share is that over its value, but -1 for "
        "the one that is switched off.",
    ],
    wrong=[
        (lambda edges, values, j: -edges[-1, j], "direct edge alone"),
        (lambda edges, values, j: -predicted_change(edges, values, j), "*lost*"),
        (
            lambda edges, values, j: predicted_change(edges, np.ones(len(values)), j),
            "divide by the value",
        ),
        (
            lambda edges, values, j: values[-1] + predicted_change(edges, values, j),
            "value afterwards",
        ),
    ],
)
def check_87(answer) -> None:
    edges = np.zeros((5, 5))
    edges[1, 0], edges[2, 0], edges[2, 1], edges[3, 2], edges[3, 1] = 2, 1, 3, 2, -1
    edges[4, 1], edges[4, 2], edges[4, 3] = 1, 2, 3
    values = np.array([1.0, 2.0, 4.0, 2.0, 6.0])
    got, want = answer(edges.copy(), values.copy(), 1), predicted_change(edges, values, 1)
    unshared = np.zeros(5)
    unshared[1] = -1.0
    for i in (2, 3):
        unshared[i] = edges[i] @ unshared
    expect_none_of(
        got,
        (
            -edges[4, 1],
            "This is the direct edge alone: the features downstream change, too, and pass it on.",
        ),
        (-want, "The sign is turned round: what the feature adds is *lost*."),
        (
            edges[4] @ unshared,
            "A change of 3 in a value of 4 passes on three quarters of its edges, not three times: "
            "divide by the value.",
        ),
        (
            6 + want,
            "This is the value afterwards: return by how much it changes.",
        ),
    )
    expect_close(got, want, "Node 2 loses 3 of its 4; node 3 loses 2 · 3/4 and gains 1.")
