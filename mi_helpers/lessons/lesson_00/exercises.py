"""Exercises of lesson 00: meet the model."""

import torch
import torch.nn.functional as F

from mi_helpers.course.check import (
    Wrong,
    describe,
    draw,
    exercise,
    expect,
    expect_close,
    expect_none_of,
    expect_shape,
)

# -- 0.1 -------------------------------------------------------------------------------------

STUB_01 = '''\
def head_shapes(batch, pos, n_heads, n_kv_heads, d_head):
    """The shapes of the sites "q" and "k" of one layer, as two tuples: return q_shape, k_shape."""
    ...
'''


def head_shapes(batch, pos, n_heads, n_kv_heads, d_head):
    """Grouped-query attention: several query heads share one key-value head."""
    return (batch, pos, n_heads, d_head), (batch, pos, n_kv_heads, d_head)


@exercise(
    "0.1",
    title="The shapes of queries and keys",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_01,
    reference=head_shapes,
    hints=[
        "Find `q` and `k` in the drawing of tiny-gemma and read off their shapes.",
        "Both are (batch, pos, heads, d_head); only the number of heads differs.",
    ],
    wrong=[
        (lambda b, p, n, k, d: ((b, n, p, d), (b, k, p, d)), "Positions come before heads"),
        (lambda b, p, n, k, d: ((b, p, n, d), (b, p, n, d)), "which is fewer"),
        (lambda b, p, n, k, d: ((b, p, n * d), (b, p, k * d)), "four axes"),
        (lambda b, p, n, k, d: ((b, p, n, d), (b, p, k, d * n // k)), "d_head is the same"),
    ],
)
def check_01(answer) -> None:
    got = answer(2, 7, 4, 2, 32)
    if not (isinstance(got, (tuple, list)) and len(got) == 2):
        raise Wrong(f"Return two tuples, the shape of q and the shape of k, not {describe(got)}.")
    q, k = (tuple(shape) for shape in got)
    expect(len(q) == len(k) == 4, f"Each shape has four axes; you gave {len(q)} and {len(k)}.")
    expect((2, 4, 7, 32) not in (q, k), "Positions come before heads: (batch, pos, heads, d_head).")
    expect(q == (2, 7, 4, 32), f"The shape of q is not {q}: think of 4 query heads of 32.")
    expect(k != q, "k has as many heads as q here: keys have `n_kv_heads`, which is fewer.")
    expect(k == (2, 7, 2, 32), f"The shape of k is not {k}: d_head is the same for q and k.")


# -- 0.2 -------------------------------------------------------------------------------------

STUB_02 = '''\
def soft_cap(x, cap):
    """Squeeze x smoothly into (-cap, cap); x may have any shape."""
    ...
'''


def soft_cap(x, cap):
    """cap · tanh(x / cap), as in Gemma 2 (arXiv:2408.00118, section 2)."""
    return cap * torch.tanh(x / cap)


@exercise(
    "0.2",
    title="The soft-cap",
    difficulty=1,
    importance=2,
    minutes=5,
    stub=STUB_02,
    reference=soft_cap,
    hints=[
        "`torch.tanh` squeezes any number into (-1, 1).",
        "Small numbers should pass almost unchanged, so divide by the cap, then scale back.",
    ],
    wrong=[
        (lambda x, cap: torch.tanh(x / cap), "scale it back"),
        (lambda x, cap: cap * torch.tanh(x), "divide by the cap first"),
        (lambda x, cap: x.clamp(-cap, cap), "cuts hard"),
    ],
)
def check_02(answer) -> None:
    x, cap = torch.tensor([-60.0, -1.0, 0.0, 2.0, 60.0]), 30.0
    got = answer(x, cap)
    expect_none_of(
        got,
        (torch.tanh(x / cap), "The result stays within (-1, 1): scale it back by the cap."),
        (cap * torch.tanh(x), "Values far below the cap are squeezed: divide by the cap first."),
        (x.clamp(-cap, cap), "This cuts hard at the cap: use tanh, which bends."),
    )
    expect_close(got, soft_cap(x, cap), "Compare with cap · tanh(x / cap) for x = 2 and cap = 30.")


# -- 0.3 -------------------------------------------------------------------------------------

STUB_03 = '''\
def stream_entering(layer, embed, attn_out, mlp_out):
    """The residual stream as it enters block `layer`, its "resid_pre", (batch, pos, d_model).

    embed              (batch, pos, d_model)
    attn_out, mlp_out  (n_layers, batch, pos, d_model), what each block adds
    """
    ...
'''


def stream_entering(layer, embed, attn_out, mlp_out):
    """The embedding and everything that the blocks before this one wrote."""
    return embed + attn_out[:layer].sum(0) + mlp_out[:layer].sum(0)


@exercise(
    "0.3",
    title="The stream as a running sum",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_03,
    reference=stream_entering,
    hints=[
        "Which blocks have already run when block `layer` begins?",
        "`attn_out[:layer]` is what they wrote; sum over the first axis.",
    ],
    wrong=[
        (lambda layer, e, a, m: e + a[: layer + 1].sum(0) + m[: layer + 1].sum(0), "not writt"),
        (lambda layer, e, a, m: a[:layer].sum(0) + m[:layer].sum(0), "begins with the embed"),
        (lambda layer, e, a, m: e + a[layer - 1] + m[layer - 1], "last block only"),
        (lambda layer, e, a, m: e + a[:layer].sum(0), "MLPs added is missing"),
        (lambda layer, e, a, m: e + a[:layer].mean(0) + m[:layer].mean(0), "sum, not mean"),
    ],
)
def check_03(answer) -> None:
    embed, attn, mlp = draw(2, 3, 5), draw(4, 2, 3, 5, seed=1), draw(4, 2, 3, 5, seed=2)
    want = stream_entering(2, embed, attn, mlp)
    got = answer(2, embed, attn, mlp)
    expect_shape(got, (2, 3, 5), "The stream")
    expect_none_of(
        got,
        (stream_entering(3, embed, attn, mlp), "Block `layer` has not written yet: leave it out."),
        (want - embed, "The stream begins with the embedding: add it."),
        (embed + attn[:2].sum(0), "What the MLPs added is missing."),
        (embed + attn[1] + mlp[1], "This adds the last block only: the stream keeps all writes."),
        (embed + attn[:2].mean(0) + mlp[:2].mean(0), "Blocks add to the stream: sum, not mean."),
    )
    expect_close(got, want, "Sum the embedding and what blocks 0 to layer - 1 added.", 1e-4)
    expect_close(
        answer(0, embed, attn, mlp), embed, "Block 0 should get the embedding, and nothing else."
    )


# -- 0.4 -------------------------------------------------------------------------------------

STUB_04 = '''\
def block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp):
    """How many parameters one Gemma 2 block has: attention, a gated MLP, four norms, no biases."""
    ...
'''


def block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp):
    """W_Q and W_O by query heads, W_K and W_V by key-value heads, three MLP matrices, four norms"""
    attention = 2 * d_model * n_heads * d_head + 2 * d_model * n_kv_heads * d_head
    return attention + 3 * d_model * d_mlp + 4 * d_model


@exercise(
    "0.4",
    title="Counting a block's parameters",
    difficulty=2,
    importance=3,
    minutes=10,
    stub=STUB_04,
    reference=block_parameters,
    hints=[
        "Go down the drawing and multiply out the shape of each weight.",
        "W_Q and W_O have n_heads · d_head on one side, W_K and W_V n_kv_heads · d_head.",
        "Three MLP matrices of d_model · d_mlp, and four norms of d_model.",
    ],
    wrong=[
        (
            lambda d_model, n_heads, n_kv_heads, d_head, d_mlp: (
                4 * d_model * n_heads * d_head + 3 * d_model * d_mlp + 4 * d_model
            ),
            "W_K and W_V are smaller",
        ),
        (
            lambda d_model, n_heads, n_kv_heads, d_head, d_mlp: (
                block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp) - d_model * d_mlp
            ),
            "three matrices",
        ),
        (
            lambda d_model, n_heads, n_kv_heads, d_head, d_mlp: (
                block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp) - 2 * d_model
            ),
            "four norms in a block",
        ),
        (
            lambda d_model, n_heads, n_kv_heads, d_head, d_mlp: (
                4 * d_model**2 + 3 * d_model * d_mlp + 4 * d_model
            ),
            "is not d_model here",
        ),
    ],
)
def check_04(answer) -> None:
    sizes = {"d_model": 6, "n_heads": 4, "n_kv_heads": 2, "d_head": 5, "d_mlp": 7}
    got = answer(**sizes)
    expect_none_of(
        got,
        (4 * 6 * 20 + 3 * 6 * 7 + 24, "W_K and W_V are smaller: they serve `n_kv_heads` heads."),
        (360 + 2 * 6 * 7 + 24, "A gated MLP has three matrices: W_gate, W_in and W_out."),
        (360 + 126 + 12, "There are four norms in a block, before and after attention and MLP."),
        (360 + 126, "Each of the four norms has d_model weights of its own."),
        (4 * 36 + 126 + 24, "n_heads · d_head is not d_model here: use both."),
        (240 + 126 + 24, "Attention has four matrices: W_Q, W_K, W_V and W_O."),
    )
    expect_close(got, block_parameters(**sizes), "List the matrices first, each with its shape.")
    sizes = {"d_model": 2304, "n_heads": 8, "n_kv_heads": 4, "d_head": 256, "d_mlp": 9216}
    expect_close(answer(**sizes), block_parameters(**sizes), "Wrong for Gemma 2 2B's sizes.")


# -- 0.5 -------------------------------------------------------------------------------------

STUB_05 = '''\
def answer_loss(logits, tokens, positions):
    """Mean -log p, in nats, of the tokens that stand at `positions`.

    logits     (pos, d_vocab), of one text
    tokens     (pos,), its ids
    positions  where the answers stand, a tensor of integers
    """
    ...
'''


def answer_loss(logits, tokens, positions):
    """The token at position p is predicted by the logits at position p - 1."""
    scores = F.log_softmax(logits[positions - 1], -1)  # (answers, d_vocab)
    return -scores.gather(-1, tokens[positions, None]).mean()


@exercise(
    "0.5",
    title="The loss on the answers",
    difficulty=3,
    importance=5,
    minutes=10,
    stub=STUB_05,
    reference=answer_loss,
    hints=[
        "At position p the model has read token p, and predicts token p + 1.",
        "Take `logits[positions - 1]`, then `log_softmax` over the vocabulary.",
        "`scores.gather(-1, tokens[positions, None])` picks the answers' entries.",
    ],
    wrong=[
        (lambda x, t, at: -F.log_softmax(x[at], -1)[range(len(at)), t[at]].mean(), "*at* the"),
        (lambda x, t, at: -x[at - 1, t[at]].mean(), "not log-probabilities"),
        (lambda x, t, at: F.cross_entropy(x[:-1], t[1:]), "the answers only"),
        (lambda x, t, at: F.log_softmax(x, -1)[at - 1, t[at]].mean(), "sign"),
        (lambda x, t, at: F.cross_entropy(x[at], t[at + 1]), "*after* the answers"),
    ],
)
def check_05(answer) -> None:
    logits, tokens, at = draw(8, 5), torch.tensor([2, 4, 0, 1, 3, 3, 1, 0]), torch.tensor([3, 6])
    scores = F.log_softmax(logits, -1)
    got = answer(logits, tokens, at)
    expect_none_of(
        got,
        (
            -scores[at, tokens[at]].mean(),
            "These are the logits *at* the answer, which has been read by then: take those one "
            "position earlier.",
        ),
        (-scores[at, tokens[at + 1]].mean(), "This scores the tokens *after* the answers."),
        (-logits[at - 1, tokens[at]].mean(), "Logits are not log-probabilities: use log_softmax."),
        (-scores[:-1].gather(-1, tokens[1:, None]).mean(), "Score the answers only, not all."),
        (scores[at - 1, tokens[at]].mean(), "A loss is -log p: the sign is the wrong way round."),
        (scores[at - 1, tokens[at]].exp().mean(), "This is the mean probability: take -log first."),
        (-scores[at - 1, tokens[at]].sum(), "This is the sum over the answers: take the mean."),
    )
    expect_close(got, answer_loss(logits, tokens, at), "Which logits predict the token at 3?")


# -- 0.6 -------------------------------------------------------------------------------------

STUB_06 = '''\
def silence_head(z, head):
    """z with one head zero at every position but the first; the given z stays as it is.

    z  (batch, pos, n_heads, d_head)
    """
    ...
'''


def silence_head(z, head):
    """What ablate(model, [(layer, head)], Zero()) hooks to the site z."""
    z = z.clone()
    z[:, 1:, head] = 0
    return z


def silence_in_place(z, head):
    """A wrong answer: right numbers, at the cost of the z that was given."""
    z[:, 1:, head] = 0
    return z


@exercise(
    "0.6",
    title="Silence one head",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_06,
    reference=silence_head,
    copies=False,
    hints=[
        "Make a copy first: `z = z.clone()`.",
        "One line of indexing: all documents, positions from 1 on, this head.",
    ],
    wrong=[
        (lambda z, head: z.index_fill(2, torch.tensor([head]), 0), "leave `<bos>`"),
        (lambda z, head: z.index_fill(1, torch.tensor([head]), 0), "*position* 1"),
        (lambda z, head: z.index_fill(3, torch.tensor([head]), 0), "third axis."),
        (silence_in_place, "clone first"),
    ],
)
def check_06(answer) -> None:
    z = draw(2, 5, 4, 3)
    given, want = z.clone(), silence_head(z, 1)
    got = answer(given, 1)
    expect_shape(got, (2, 5, 4, 3), "The result")
    whole, position, width, rest = z.clone(), z.clone(), z.clone(), z.clone()
    whole[:, :, 1], position[:, 1], width[..., 1] = 0, 0, 0
    rest[:, 1:, [0, 2, 3]] = 0
    expect_none_of(
        got,
        (whole, "The first position changed, too: leave `<bos>` as it is."),
        (position, "You silenced *position* 1: heads are the third axis, after batch and pos."),
        (width, "You silenced number 1 of every head's vector: heads are the third axis."),
        (rest, "You silenced all heads but this one."),
        (z, "Nothing changed."),
    )
    expect_close(got, want, "Only z[:, 1:, head] should be zero.")
    expect_close(given, z, "Right numbers, but you changed the z that you were given: clone first.")


# -- 0.7 -------------------------------------------------------------------------------------

STUB_07 = '''\
def mean_lesion(z, head, reference):
    """z with one head's vector replaced, at every position but the first, by its mean elsewhere.

    z          (batch, pos, n_heads, d_head)
    reference  (tokens, n_heads, d_head), z at the tokens of other documents
    """
    ...
'''


def mean_lesion(z, head, reference):
    """The mean is over the reference's tokens: one vector of d_head numbers."""
    z = z.clone()
    z[:, 1:, head] = reference[:, head].mean(0)
    return z


def mean_lesion_with(z, head, value):
    """z with `value` put where the mean should be."""
    z = z.clone()
    z[:, 1:, head] = value
    return z


@exercise(
    "0.7",
    title="The mean lesion",
    difficulty=4,
    importance=4,
    minutes=10,
    stub=STUB_07,
    reference=mean_lesion,
    hints=[
        "`reference[:, head]` is (tokens, d_head): average over the first axis.",
        "Put that vector where exercise 0.6 put zero; it broadcasts over batch and pos.",
    ],
    wrong=[
        (lambda z, head, r: mean_lesion_with(z, head, r[:, head].mean()), "one number"),
        (
            lambda z, head, r: mean_lesion_with(z, head, r.mean((0, 1))),
            "averages over the heads",
        ),
        (
            lambda z, head, r: mean_lesion_with(z, head, z[:, 1:, head].mean((0, 1))),
            "not this batch's",
        ),
        (
            lambda z, head, r: mean_lesion_with(z, head, z[:, 1:, head].mean(1, keepdim=True)),
            "own mean",
        ),
        (lambda z, head, r: mean_lesion_with(z, head, 0.0), "the zero lesion"),
    ],
)
def check_07(answer) -> None:
    z, reference = draw(2, 5, 3, 4), 2 + draw(9, 3, 4, seed=1)
    got = answer(z.clone(), 2, reference)
    expect_shape(got, (2, 5, 3, 4), "The result")

    everywhere = z.clone()
    everywhere[:, :, 2] = reference[:, 2].mean(0)
    expect_none_of(
        got,
        (
            mean_lesion_with(z, 2, reference[:, 2].mean()),
            "This is one number: keep d_head, average over tokens only.",
        ),
        (
            mean_lesion_with(z, 2, reference.mean((0, 1))),
            "This averages over the heads: take this head's own mean.",
        ),
        (
            mean_lesion_with(z, 2, z[:, 1:, 2].mean((0, 1))),
            "The mean should be the reference's, not this batch's.",
        ),
        (
            mean_lesion_with(z, 2, z[:, 1:, 2].mean(1, keepdim=True)),
            "This is each document's own mean: it keeps what the document is about.",
        ),
        (mean_lesion_with(z, 2, 0.0), "This is the zero lesion: put the mean there."),
        (everywhere, "The first position changed, too: leave `<bos>` as it is."),
    )
    expect_close(got, mean_lesion(z, 2, reference), "Only z[:, 1:, head] should change.")


# -- 0.8 -------------------------------------------------------------------------------------

STUB_08 = '''\
def double_dissociation(damage, a, b):
    """Two parts (i, j): the lesion of i spares skill b while it harms a, that of j the reverse.

    damage  (parts, skills), loss after the lesion less loss before
    Choose i so that damage to a exceeds damage to b by as much as possible, and j the other way.
    """
    ...
'''


def double_dissociation(damage, a, b):
    """A part that harms everything alike cancels in the difference."""
    gap = damage[:, a] - damage[:, b]  # (parts,)
    return int(gap.argmax()), int(gap.argmin())


@exercise(
    "0.8",
    title="A double dissociation",
    difficulty=5,
    importance=4,
    minutes=15,
    stub=STUB_08,
    reference=double_dissociation,
    hints=[
        "A part that harms both skills alike should score nothing.",
        "`damage[:, a] - damage[:, b]` is large for i; what is it for j?",
    ],
    wrong=[
        (lambda d, a, b: (d[:, a].argmax(), d[:, b].argmax()), "harms everything"),
        (lambda d, a, b: ((d[:, b] - d[:, a]).argmax(), (d[:, a] - d[:, b]).argmax()), "round"),
        (
            lambda d, a, b: ((d[:, a] / d[:, b]).argmax(), (d[:, b] / d[:, a]).argmax()),
            "not the ratio",
        ),
        (lambda d, a, b: ((d[:, a] - d[:, b]).abs().argmax(),) * 2, "should differ"),
        (lambda d, a, b: ((d[:, 0] - d[:, 1]).argmax(), (d[:, 1] - d[:, 0]).argmax()), "use a"),
    ],
)
def check_08(answer) -> None:
    damage = torch.tensor(
        [
            [0.1, 0.05, 0.2],
            [6.0, 6.5, 5.0],  # harms everything
            [2.5, 0.1, 0.1],  # skill 0 alone
            [0.1, 0.05, 3.0],
            [0.05, 2.0, 0.1],  # skill 1 alone
            [0.1, 0.05, -4.0],
            [0.01, 0.0001, 0.0],  # a large ratio of small numbers
        ]
    )
    got = answer(damage, 0, 1)
    if not (isinstance(got, (tuple, list)) and len(got) == 2):
        raise Wrong(f"Return two numbers, i and j, not {describe(got)}.")
    i, j = (int(x) for x in got)
    expect((i, j) != (1, 1), "Part 1 harms everything, which is no selective loss: subtract.")
    expect((i, j) != (4, 2), "The two are the wrong way round: i harms a, j harms b.")
    expect(i != j, "One part cannot dissociate in both directions: i and j should differ.")
    expect(6 not in (i, j), "Part 6 does next to nothing: use the difference, not the ratio.")
    expect(3 not in (i, j) and 5 not in (i, j), "Only skills a and b count, not the third.")
    expect((i, j) == (2, 4), f"For skills 0 and 1 the parts are not ({i}, {j}).")
    i, j = (int(x) for x in answer(damage, 2, 0))
    expect((i, j) == (3, 5), f"For skills 2 and 0 the parts are not ({i}, {j}): use a and b.")
