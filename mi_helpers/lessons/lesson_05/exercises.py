"""Exercises of lesson 05, attention heads."""

import numpy as np
import torch

from mi_helpers.course.check import (
    describe,
    draw,
    exercise,
    expect,
    expect_close,
    expect_none_of,
    expect_shape,
    same,
)


def random_pattern(*shape: int, seed: int = 0) -> torch.Tensor:
    """Causal attention, each row summing to 1, (..., pos, pos)."""
    size = shape[-1]
    scores = 2 * draw(*shape, seed=seed)
    return scores.masked_fill(~torch.ones(size, size).tril().bool(), -torch.inf).softmax(-1)


# -- 5.1 -------------------------------------------------------------------------------------

STUB_51 = '''\
def induction_targets(tokens):
    """Where an induction head looks: a square of booleans, a row for each position that looks.

    tokens: a list of token ids. Entry [i][j] is True if j comes before i and the token just before
    j is the same as the token at i.
    """
    ...
'''


def induction_targets(tokens):
    """[i, j]: 0 < j < i and tokens[j - 1] == tokens[i]."""
    n = len(tokens)
    return [[0 < j < i and tokens[j - 1] == tokens[i] for j in range(n)] for i in range(n)]


@exercise(
    "5.1",
    title="Where an induction head looks",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_51,
    reference=induction_targets,
    hints=[
        "For `[7, 3, 7]`: the last 7 looks at the 3, at position 1: a 7 stands before it.",
        "`tokens[j - 1] == tokens[i]`, for j from 1 to i - 1.",
    ],
    wrong=[
        (
            lambda t: [[j < i and t[j] == t[i] for j in range(len(t))] for i in range(len(t))],
            "duplicate-token",
        ),
        (
            lambda t: [[j > 0 and t[j - 1] == t[i] for j in range(len(t))] for i in range(len(t))],
            "looks ahead",
        ),
        (
            lambda t: [
                [0 < j <= i and t[j - 1] == t[i] for j in range(len(t))] for i in range(len(t))
            ],
            "look at itself",
        ),
        (lambda t: np.array(induction_targets(t)).T, "swapped"),
        (
            lambda t: [
                [j < i and j + 1 < len(t) and t[j + 1] == t[i] for j in range(len(t))]
                for i in range(len(t))
            ],
            "one place too early",
        ),
    ],
)
def check_51(answer) -> None:
    tokens = [7, 3, 9, 3, 7, 7, 3, 9]
    n, want = len(tokens), np.array(induction_targets(tokens))
    got = answer(list(tokens))
    expect(np.shape(got) == (n, n), f"Return {n} rows of {n} booleans, not {describe(got)}.")
    got = np.asarray(got)
    expect(
        set(np.unique(got).tolist()) <= {True, False},
        "The entries should be booleans, not numbers.",
    )
    equal = np.equal.outer(tokens, tokens)
    i, j = np.indices((n, n))
    shifted = np.zeros((n, n), dtype=bool)
    shifted[:, 1:] = equal[:, :-1]
    before = np.zeros((n, n), dtype=bool)
    before[:, :-1] = equal[:, 1:]
    newest = np.zeros((n, n), dtype=bool)
    for row in range(n):
        if want[row].any():
            newest[row, np.flatnonzero(want[row])[-1]] = True
    for mistake, message in (
        (
            equal & (j < i),
            "This is where a *duplicate-token* head looks, at the earlier copy itself: "
            "an induction head looks at the token after it.",
        ),
        (before & (j < i), "This looks one place too early: the token *before* the earlier copy."),
        (shifted, "This looks ahead: attention is causal, j has to come before i."),
        (
            shifted & (j <= i),
            "A token that repeats the one before it would look at itself: j comes "
            "before i, and is not i.",
        ),
        (want.T, "Rows and columns are swapped: a row is the token that looks."),
        (newest, "Only the latest copy is marked: every earlier copy counts."),
    ):
        expect(not np.array_equal(got, mistake), message)
    expect(np.array_equal(got, want), "Compare with tokens[j - 1] == tokens[i] for 0 < j < i.")


# -- 5.2 -------------------------------------------------------------------------------------

STUB_52 = '''\
def previous_token_score(pattern):
    """The mean attention from a token to the one just before it, of one head on one text.

    pattern: (pos, pos), row i is where token i looks. Position 1 is left out: the one before it is
    position 0, which attracts all attention that has nowhere else to go.
    """
    ...
'''


def previous_token_score(pattern):
    """mean of pattern[i, i - 1] for i >= 2."""
    return pattern.diagonal(-1)[1:].mean()


@exercise(
    "5.2",
    title="A score for a head",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_52,
    reference=previous_token_score,
    hints=[
        "`pattern.diagonal(-1)` holds pattern[1, 0], pattern[2, 1], pattern[3, 2], …",
    ],
    wrong=[
        (lambda pattern: pattern.diagonal(-1).mean(), "Position 1 is in the mean"),
        (lambda pattern: pattern.diagonal(1).mean(), "above the main one"),
        (lambda pattern: pattern.diagonal()[2:].mean(), "to itself"),
        (lambda pattern: pattern.diagonal(-1)[1:].sum(), "the sum"),
    ],
)
def check_52(answer) -> None:
    pattern = random_pattern(9, 9)
    below = pattern.diagonal(-1)
    got = answer(pattern.clone())
    expect_none_of(
        got,
        (below.mean(), "Position 1 is in the mean: its attention to position 0 should not count."),
        (
            pattern.diagonal(1).mean(),
            "This diagonal lies above the main one, in the future, where "
            "attention is 0: take the other one.",
        ),
        (
            pattern.diagonal(1)[1:].mean(),
            "This diagonal lies above the main one, in the future, "
            "where attention is 0: take the other one.",
        ),
        (pattern.diagonal()[2:].mean(), "This is the attention of each token to itself."),
        (below[1:].sum(), "This is the sum: take the mean."),
        (below[:-1].mean(), "The last token is left out, and position 1 is still in."),
        (below[1:].sum() / len(pattern), "Divide by the number of tokens that count, not by all."),
    )
    expect_close(got, previous_token_score(pattern), "Take pattern[i, i - 1] for i = 2, 3, …")


# -- 5.3 -------------------------------------------------------------------------------------

STUB_53 = '''\
def mean_ablate(z, reference, heads):
    """z with some heads' outputs replaced by their mean over reference texts, position by position.

    z          (batch, pos, n_heads, d_head); it stays as it is
    reference  (texts, pos, n_heads, d_head)
    heads      a list of head numbers
    """
    ...
'''


def mean_ablate(z, reference, heads):
    """The mean over texts keeps the axes pos, n_heads and d_head."""
    new = z.clone()
    new[:, :, heads] = reference.mean(0)[:, heads]
    return new


def mean_ablate_with(z, heads, mean):
    """The same with another mean, to foresee mistakes."""
    new = z.clone()
    new[:, :, heads] = mean.expand_as(z)[:, :, heads]
    return new


def ablate_in_place(z, reference, heads):
    z[:, :, heads] = reference.mean(0)[:, heads]
    return z


@exercise(
    "5.3",
    title="Silence a set of heads",
    difficulty=3,
    importance=5,
    minutes=10,
    stub=STUB_53,
    reference=mean_ablate,
    copies=False,
    hints=[
        "`reference.mean(0)` has shape (pos, n_heads, d_head).",
        "Clone z, then assign to `z[:, :, heads]`; the mean broadcasts over the batch.",
    ],
    wrong=[
        (ablate_in_place, "clone it first"),
        (lambda z, r, heads: mean_ablate_with(z, heads, r.mean((0, 1))), "over the positions"),
        (lambda z, r, heads: mean_ablate_with(z, heads, torch.zeros(1)), "zero ablation"),
        (lambda z, r, heads: mean_ablate_with(z, range(4), r.mean(0)), "All heads"),
        (lambda z, r, heads: mean_ablate_with(z, heads, z.mean(0)), "of z itself"),
    ],
)
def check_53(answer) -> None:
    z, reference, heads = draw(2, 5, 4, 3), draw(6, 5, 4, 3, seed=1) + 1, [0, 2]
    want, given = mean_ablate(z, reference, heads), z.clone()
    got = answer(given, reference.clone(), list(heads))
    expect(torch.equal(given, z), "The z that was given has changed: clone it first.")
    expect_shape(got, (2, 5, 4, 3), "The new z")
    expect_none_of(
        got,
        (
            mean_ablate_with(z, heads, reference.mean((0, 1))),
            "The mean runs over the positions, too: keep one mean for each position.",
        ),
        (mean_ablate_with(z, heads, torch.zeros(1)), "This is zero ablation: use the reference."),
        (mean_ablate_with(z, heads, z.mean(0)), "This is the mean of z itself: use the reference."),
        (
            mean_ablate_with(z, range(4), reference.mean(0)),
            "All heads are replaced: only some should be.",
        ),
        (mean_ablate_with(z, [1, 3], reference.mean(0)), "The other heads are replaced."),
        (mean_ablate_with(z, heads, reference[0]), "This is one reference text, not their mean."),
    )
    expect_close(
        got, want, "Put `reference.mean(0)` in at these heads, for every text and position."
    )


# -- 5.4 -------------------------------------------------------------------------------------

STUB_54 = '''\
def copying_share(E, W_V, W_O, W_U):
    """Share of tokens whose own logit a head raises the most when it attends to them.

    E (tokens, d_model) what the head reads at each token, W_V (d_model, d_head),
    W_O (d_head, d_model), W_U (d_model, tokens) the unembedding of the same tokens, in that order
    """
    ...
'''


def copying_share(E, W_V, W_O, W_U):
    """Row a, column b of E W_V W_O W_U: what attending to a adds to the logit of b."""
    logits = E @ W_V @ W_O @ W_U
    return (logits.argmax(1) == torch.arange(len(E))).float().mean()


@exercise(
    "5.4",
    title="Does the OV circuit copy?",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_54,
    reference=copying_share,
    hints=[
        "`E @ W_V @ W_O @ W_U` is square: rows are the token attended to, columns the logits.",
        "Compare `logits.argmax(1)` with `torch.arange(len(E))`.",
    ],
    wrong=[
        (
            lambda E, V, W, U: ((E @ V @ W @ U).argmax(0) == torch.arange(len(E))).float().mean(),
            "wrong axis",
        ),
        (
            lambda E, V, W, U: ((E @ V @ W @ U).diagonal() > 0).float().mean(),
            "not yet the most",
        ),
        (
            lambda E, V, W, U: ((E @ U).argmax(1) == torch.arange(len(E))).float().mean(),
            "head is missing",
        ),
        (lambda E, V, W, U: len(E) * copying_share(E, V, W, U), "give the share"),
    ],
)
def check_54(answer) -> None:
    n = 40
    E, W_U = draw(n, 16), draw(16, n, seed=1)
    W_U[:, :25] += 1.2 * E[:25].T  # some tokens are copied
    W_U[:, 0] *= 3  # and one is favoured by all
    W_V = draw(16, 5, seed=2)
    W_O = torch.linalg.pinv(W_V)
    logits = E @ W_V @ W_O @ W_U
    rows = torch.arange(n)
    got = answer(*(x.clone() for x in (E, W_V, W_O, W_U)))
    expect_none_of(
        got,
        (
            (logits.argmax(0) == rows).float().mean(),
            "The best is looked for over the wrong axis: for each token *attended to*, ask which "
            "logit rises most.",
        ),
        ((logits.argmax(1) == rows).float().sum(), "This is a number of tokens: give the share."),
        ((logits.diagonal() > 0).float().mean(), "A raised logit is not yet the most raised one."),
        (
            logits.diagonal().mean(),
            "This is the mean rise of the own logit, not a share of tokens.",
        ),
        (
            ((E @ W_U).argmax(1) == rows).float().mean(),
            "The head is missing: go through W_V and W_O.",
        ),
        (
            (logits.argmin(1) == rows).float().mean(),
            "This counts tokens that the head *suppresses*.",
        ),
    )
    expect_close(got, copying_share(E, W_V, W_O, W_U), "Row a of E W_V W_O W_U should peak at a.")


# -- 5.5 -------------------------------------------------------------------------------------

STUB_55 = '''\
def k_composition(W_V, W_O, W_Q, W_K):
    """How much of what one head writes is read by the keys of a later one, between 0 and 1:
    the Frobenius norm of the product over the product of the two norms.

    W_V (d_model, d_head), W_O (d_head, d_model) of the writer; W_Q, W_K (d_model, d_head) of the
    reader. A row vector x is read as x @ W, so the writer does x @ W_V @ W_O.
    """
    ...
'''


def k_composition(W_V, W_O, W_Q, W_K):
    """‖W_OV W_K W_Qᵀ‖ / (‖W_OV‖ ‖W_K W_Qᵀ‖), Frobenius norms (Elhage et al. 2021)."""
    moved, matched = W_V @ W_O, W_K @ W_Q.T
    return (moved @ matched).norm() / (moved.norm() * matched.norm())


@exercise(
    "5.5",
    title="K-composition",
    difficulty=4,
    importance=3,
    minutes=10,
    stub=STUB_55,
    reference=k_composition,
    hints=[
        "What the writer moves: `W_V @ W_O`. What the reader matches: `W_K @ W_Q.T`.",
        "`.norm()` of a matrix is its Frobenius norm.",
    ],
    wrong=[
        (lambda V, W, Q, K: k_composition(V, W, K, Q), "Q-composition"),
        (lambda V, W, Q, K: (V @ W @ K @ Q.T).norm(), "large weights win"),
        (lambda V, W, Q, K: k_composition(V, W, Q, K) ** 2, "squared norms"),
        (lambda V, W, Q, K: (W @ K).norm() / (W.norm() * K.norm()), "W_V and W_Q are missing"),
        (
            lambda V, W, Q, K: (K @ Q.T @ V @ W).norm() / ((V @ W).norm() * (K @ Q.T).norm()),
            "order is turned round",
        ),
    ],
)
def check_55(answer) -> None:
    W_V, W_O, W_Q, W_K = (
        draw(*shape, seed=i) for i, shape in enumerate(((10, 4), (4, 10), (10, 4), (10, 4)))
    )
    W_K = W_K + W_O.T  # the keys read what is written
    want, moved, matched = k_composition(W_V, W_O, W_Q, W_K), W_V @ W_O, W_K @ W_Q.T
    got = answer(*(x.clone() for x in (W_V, W_O, W_Q, W_K)))
    norm = torch.linalg.matrix_norm
    expect_none_of(
        got,
        (
            k_composition(W_V, W_O, W_K, W_Q),
            "This is Q-composition: what is written goes into the keys, so W_K comes first.",
        ),
        ((moved @ matched).norm(), "Divide by the two norms: otherwise large weights win."),
        (
            norm(moved @ matched, 2) / (norm(moved, 2) * norm(matched, 2)),
            "These are spectral norms: use the Frobenius norm, the root of the sum of squares.",
        ),
        (
            (matched @ moved).norm() / (moved.norm() * matched.norm()),
            "The order is turned round: the writer comes first.",
        ),
        (
            (W_O @ W_K).norm() / (W_O.norm() * W_K.norm()),
            "W_V and W_Q are missing: compose the whole matrices W_V W_O and W_K W_Qᵀ.",
        ),
        (want**2, "These are squared norms."),
    )
    expect_close(got, want, "Compare with ‖W_V W_O W_K W_Qᵀ‖ / (‖W_V W_O‖ ‖W_K W_Qᵀ‖).")


# -- 5.6 -------------------------------------------------------------------------------------

STUB_56 = '''\
def half_way(steps, values):
    """The training step at which a curve is half way between its first value and its highest one,
    with straight lines between the checkpoints.

    steps, values: arrays (checkpoints,); the curve rises, perhaps with small dents.
    """
    ...
'''


def half_way(steps, values):
    """The first crossing of the middle, interpolated between the checkpoints around it."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    middle = (values[0] + values.max()) / 2
    i = int(np.argmax(values >= middle))
    part = (middle - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


@exercise(
    "5.6",
    title="When did it form?",
    difficulty=3,
    importance=3,
    minutes=10,
    stub=STUB_56,
    reference=half_way,
    hints=[
        "The middle is `(values[0] + values.max()) / 2`.",
        "`np.argmax(values >= middle)` is the first checkpoint above it; the crossing lies "
        "between that one and the one before.",
    ],
    wrong=[
        (lambda s, v: s[np.argmax(v >= (v[0] + v.max()) / 2)], "first checkpoint above"),
        (lambda s, v: s[np.argmax(v >= (v[0] + v.max()) / 2) - 1], "last checkpoint below"),
        (lambda s, v: half_way(s, np.append(0.0, v[1:])), "which is not 0"),
        (lambda s, v: s[-1] / 2, "middle of the *steps*"),
        (
            lambda s, v: np.interp((v[0] + v[-1]) / 2, np.maximum.accumulate(v)[:5], s[:5]),
            "take the highest",
        ),
    ],
)
def check_56(answer) -> None:
    steps = np.array([0.0, 100, 200, 400, 500, 1000])
    values = np.array([0.2, 0.22, 0.4, 0.9, 1.0, 0.95])
    got = answer(steps.copy(), values.copy())
    crossing = half_way(steps, values)
    expect_none_of(
        got,
        (
            400.0,
            "This is the first checkpoint above the middle: interpolate between it and the one "
            "before.",
        ),
        (200.0, "This is the last checkpoint below the middle: interpolate to the next one."),
        (
            500.0,
            "This is the middle of the *steps*, or the step of the maximum: look for the middle "
            "of the values.",
        ),
        (
            half_way(steps, np.append(0.0, values[1:])),
            "The middle lies between 0 and the highest "
            "value: begin at the first value, which is not 0.",
        ),
        (300.0, "This is half way between two checkpoints: interpolate by the values."),
        (
            float(np.interp((0.2 + 0.95) / 2, values[:5], steps[:5])),
            "The curve's last value is not its highest: take the highest.",
        ),
    )
    expect_close(got, crossing, "The middle is 0.6: it lies between the steps 200 and 400.")
    plain = answer(np.array([0.0, 10]), np.array([0.0, 1.0]))
    expect_close(plain, 5.0, "On a straight line from 0 to 1 the middle is at half the steps.")


# -- 5.7 -------------------------------------------------------------------------------------

STUB_57 = '''\
def minimality(F, circuit):
    """{node: how much F changes when this node alone is taken out of the circuit}, never negative.

    F        a function of a set of nodes, such as a mean logit difference
    circuit  a set of nodes
    """
    ...
'''


def minimality(F, circuit):
    """|F(circuit) - F(circuit without the node)|, for each node (Wang et al. 2022)."""
    whole = F(circuit)
    return {node: abs(whole - F(circuit - {node})) for node in circuit}


@exercise(
    "5.7",
    title="Is every node needed?",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_57,
    reference=minimality,
    hints=[
        "`circuit - {node}` is the circuit without one node.",
        "`abs` of the difference to F(circuit), for each node.",
    ],
    wrong=[
        (lambda F, C: {v: abs(F({v})) for v in C}, "by itself"),
        (lambda F, C: {v: F(C) - F(C - {v}) for v in C}, "works against"),
        (lambda F, C: {v: abs(F({"a", "b", "c", "d"}) - F(C - {v})) for v in C}, "all nodes"),
        (lambda F, C: {v: F(C - {v}) for v in C}, "what is left"),
    ],
)
def check_57(answer) -> None:
    worth = {"a": 3.0, "b": 2.0, "c": -1.0, "d": 0.5}

    def F(nodes) -> float:
        both = 1.5 if {"a", "b"} <= set(nodes) else 0.0  # two nodes that need each other
        return sum(worth[node] for node in nodes) + both

    circuit = {"a", "b", "c"}
    want, got = minimality(F, circuit), answer(F, set(circuit))
    expect(isinstance(got, dict), "Return a dictionary {node: change}.")
    expect(
        set(got) == circuit,
        f"There should be one entry for each node of the circuit, not for {sorted(map(str, got))}.",
    )
    alone = {node: abs(F({node})) for node in circuit}
    signed = {node: F(circuit) - F(circuit - {node}) for node in circuit}
    model = {node: abs(F(set(worth)) - F(circuit - {node})) for node in circuit}
    left = {node: F(circuit - {node}) for node in circuit}

    def equal(a, b) -> bool:
        return all(abs(float(a[node]) - float(b[node])) < 1e-9 for node in circuit)

    for mistake, message in (
        (
            alone,
            "This is what each node does by itself: take it out of the circuit, and keep the "
            "others.",
        ),
        (model, "The comparison is with all nodes: compare with the circuit."),
        (left, "This is what is left of F: give the change."),
    ):
        expect(not equal(got, mistake), message)
    negative = any(float(got[node]) < 0 for node in circuit)
    expect(
        not (equal(got, signed) or negative),
        "A node that works against the others matters as well: take the size of the change.",
    )
    expect(equal(got, want), "Compare with |F(circuit) - F(circuit - {node})|.")


# -- 5.8 -------------------------------------------------------------------------------------

STUB_58 = '''\
def repaired_share(before, after, direct):
    """The share of a removed head's direct effect that the rest of the model makes up for.

    before, after: the logit difference with and without the head; direct: what the head itself had
    added to it directly. 0: nothing is made up for; 1: all; negative: the rest loses as well.
    """
    ...
'''


def repaired_share(before, after, direct):
    """Without repair, before - direct would be left; the share is (after - that) / direct."""
    return (after - (before - direct)) / direct


@exercise(
    "5.8",
    title="Self-repair",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_58,
    reference=repaired_share,
    hints=[
        "If nothing else changed, `before - direct` would be left.",
        "What is left beyond that was made up for; divide it by `direct`.",
    ],
    wrong=[
        (lambda before, after, direct: (before - after) / direct, "that is *lost*"),
        (lambda before, after, direct: after - (before - direct), "in logits"),
        (lambda before, after, direct: after / before, "what is left of"),
        (lambda before, after, direct: (after - before + direct) / before, "not of the whole"),
        (
            lambda before, after, direct: max(0, repaired_share(before, after, direct)),
            "be negative",
        ),
    ],
)
def check_58(answer) -> None:
    before, direct = 3.0, 2.0
    for after, want in ((1.0, 0.0), (3.0, 1.0), (2.2, 0.6), (0.5, -0.25)):
        got = answer(before, after, direct)
        for mistake, message in (
            ((before - after) / direct, "This is the share that is *lost*: repair is the rest."),
            (after - (before - direct), "This is in logits: divide by the head's direct effect."),
            (
                after / before,
                "This is what is left of the logit difference: compare with what would "
                "be left without repair, before - direct.",
            ),
            (
                (after - (before - direct)) / before,
                "The share is of the head's direct effect, not of the whole logit difference.",
            ),
            (max(want, 0.0), "The rest may lose as well: let the share be negative."),
        ):
            if not same(want, mistake):
                expect(not same(got, mistake), message)
        expect_close(
            got,
            want,
            f"With {before}, {after} and {direct}, without repair {before - direct} would be left.",
        )
