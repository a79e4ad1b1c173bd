"""Exercises of lesson 04, the logit lens."""

import torch

from mi_helpers.course.check import as_numbers, exercise, expect, expect_close, expect_none_of, same

# -- 4.1 -------------------------------------------------------------------------------------

STUB_41 = '''\
def lens(h, w, W_U, cap, eps=1e-6):
    """Logits of a Gemma 2 that would stop here: norm, unembedding, soft-cap.

    h    (..., d_model), the stream; w (d_model,), the final RMSNorm's weight as it is stored
    W_U  (d_model, d_vocab); cap, the soft-cap
    RMSNorm divides by sqrt(mean(h ** 2) + eps), and Gemma then multiplies by 1 + w.
    """
    ...
'''


def lens(h, w, W_U, cap, eps=1e-6):
    """cap tanh(norm(h) W_U / cap)."""
    normed = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + w)
    return cap * torch.tanh(normed @ W_U / cap)


def no_norm(h, w, W_U, cap, eps=1e-6):
    return cap * torch.tanh(h * (1 + w) @ W_U / cap)


def gain_is_w(h, w, W_U, cap, eps=1e-6):
    return lens(h, w - 1, W_U, cap, eps)


def no_cap(h, w, W_U, cap, eps=1e-6):
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + w) @ W_U


def centred(h, w, W_U, cap, eps=1e-6):
    return lens(h - h.mean(-1, keepdim=True), w, W_U, cap, eps)


def whole_rms(h, w, W_U, cap, eps=1e-6):
    return cap * torch.tanh(h / (h.pow(2).mean() + eps).sqrt() * (1 + w) @ W_U / cap)


def random(*shape, seed=0, shift=0.0):
    """Normal numbers from a seed of their own, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + shift


@exercise(
    "4.1",
    title="The lens, for Gemma 2",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_41,
    reference=lens,
    hints=[
        "`h.pow(2).mean(-1, keepdim=True)` is the mean square of each token, with the axis "
        "kept, so that it divides h.",
        "The soft-cap comes last: `cap * torch.tanh(logits / cap)`.",
    ],
    wrong=[
        (no_norm, "not normalised"),
        (gain_is_w, "1 + w"),
        (no_cap, "soft-cap is missing"),
        (centred, "as LayerNorm does"),
        (whole_rms, "last axis"),
    ],
)
def check_41(answer) -> None:
    h, w, W_U = 3 * random(2, 5, 8, shift=0.3), random(8, seed=1), 2 * random(8, 11, seed=2)
    h[0, 0] *= 5
    given = (h, w, W_U, 6.0)
    got = answer(*(x.clone() if hasattr(x, "clone") else x for x in given))
    expect_none_of(
        got,
        (no_norm(*given), "The stream is not normalised: divide it by its root mean square first."),
        (gain_is_w(*given), "Gemma stores w and multiplies by 1 + w: with w = 0 nothing changes."),
        (
            no_cap(*given),
            "The soft-cap is missing: the order of the tokens is right, their probabilities are "
            "not.",
        ),
        (centred(*given), "This takes the mean away first, as LayerNorm does: RMSNorm does not."),
        (
            whole_rms(*given),
            "All tokens share one root mean square: take the mean over the last axis only.",
        ),
    )
    expect_close(got, lens(*given), "Three steps: norm with gain, times W_U, cap tanh(x / cap).")


# -- 4.2 -------------------------------------------------------------------------------------

STUB_42 = '''\
def rank_of(logits, target):
    """The rank of a token at each depth, 1 for the highest logit.

    logits  (depths, d_vocab); target, a token id. Returns integers (depths,).
    """
    ...
'''


def rank_of(logits, target):
    """One more than the number of tokens above it."""
    return (logits > logits[:, [target]]).sum(-1) + 1


@exercise(
    "4.2",
    title="The rank of a token",
    difficulty=1,
    importance=4,
    minutes=5,
    stub=STUB_42,
    reference=rank_of,
    hints=[
        "A rank is a count: how many tokens are above?",
        "`logits[:, [target]]` keeps the axis, so that it can be compared with all logits.",
    ],
    wrong=[
        (lambda logits, target: rank_of(logits, target) - 1, "not 0"),
        (lambda logits, target: rank_of(-logits, target), "turned round"),
        (
            lambda logits, target: logits.argsort(-1, descending=True)[:, target] + 1,
            "other way round",
        ),
    ],
)
def check_42(answer) -> None:
    logits, target = random(6, 40, seed=3), 7
    want = rank_of(logits, target)
    got = answer(logits.clone(), target)
    expect_none_of(
        got,
        (want - 1, "The best token has rank 1, not 0."),
        (41 - want, "The order is turned round: the highest logit has rank 1."),
        (
            logits.argsort(-1, descending=True)[:, target] + 1,
            "`argsort` at the target's place says *which token* is at that rank. The question is "
            "the other way round: at which rank is the token?",
        ),
        (logits.argsort(-1, descending=True)[:, target], "`argsort` says which token, not where."),
    )
    expect_close(got, want, "Count, at each depth, the tokens whose logit is higher.")


# -- 4.3 -------------------------------------------------------------------------------------

STUB_43 = '''\
def settled(ranks):
    """The first depth from which on the rank stays 1 to the end, or None if it is not 1 there.

    ranks: a list, one rank per depth, the last one for the model's output.
    """
    ...
'''


def settled(ranks):
    """Walk back from the end while the rank is 1."""
    depth = len(ranks)
    while depth and ranks[depth - 1] == 1:
        depth -= 1
    return depth if depth < len(ranks) else None


@exercise(
    "4.3",
    title="Where the answer settles",
    difficulty=2,
    importance=3,
    minutes=5,
    stub=STUB_43,
    reference=settled,
    hints=[
        "Go through the list from its end.",
        "Stop at the last depth whose rank is not 1: the answer is the depth after it.",
    ],
    wrong=[
        (lambda ranks: ranks.index(1), "lost again"),
        (lambda ranks: max(i for i, r in enumerate(ranks) if r == 1), "last run"),
        (lambda ranks: max(0, settled(ranks) - 1), "One too early"),
        (
            lambda ranks: 1 + max((i for i, r in enumerate(ranks) if r != 1), default=-1),
            "return None",
        ),
    ],
)
def check_43(answer) -> None:
    got = answer([50, 1, 9, 1, 1, 1])
    expect(
        got != 1,
        "At depth 1 the rank is 1 for the first time, but it is lost again: look for where it "
        "stays.",
    )
    expect(got != 2, "One too early: depth 2 has rank 9, and depth 3 is the first that stays.")
    expect(got != 5, "Depth 5 is the last one with rank 1: find the first of that last run.")
    expect(got == 3, "In [50, 1, 9, 1, 1, 1] the rank stays 1 from depth 3 on.")
    expect(
        answer([4, 1, 1, 2]) is None,
        "In [4, 1, 1, 2] the token is not first at the end: return None.",
    )
    expect(answer([1, 1, 1]) == 0, "In [1, 1, 1] it holds from depth 0 on.")
    expect(answer([3, 2, 1]) == 2, "In [3, 2, 1] only the last depth counts: return 2.")


# -- 4.4 -------------------------------------------------------------------------------------

STUB_44 = '''\
def lens_loss(final_logits, lens_logits):
    """Mean over the tokens of KL(final ‖ lens), in nats.

    Both are logits (n, d_vocab). KL(p ‖ q) = Σ p (log p - log q), with p the model's final
    distribution and q what the lens says.
    """
    ...
'''


def lens_loss(final_logits, lens_logits):
    """Weighted by what the model really predicts."""
    final, lens = final_logits.log_softmax(-1), lens_logits.log_softmax(-1)
    return (final.exp() * (final - lens)).sum(-1).mean()


@exercise(
    "4.4",
    title="What a lens is trained on",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_44,
    reference=lens_loss,
    hints=[
        "`logits.log_softmax(-1)` gives log-probabilities; `.exp()` of it the probabilities.",
        "The weights are the final distribution's probabilities.",
    ],
    wrong=[
        (lambda final_logits, lens_logits: lens_loss(lens_logits, final_logits), "swapped"),
        (lambda final_logits, lens_logits: 9 * lens_loss(final_logits, lens_logits), "the sum"),
        (
            lambda final_logits, lens_logits: lens_loss(final_logits, lens_logits) / 30,
            "Sum over the vocabulary",
        ),
        (
            lambda final_logits, lens_logits: (
                -(final_logits.softmax(-1) * lens_logits.log_softmax(-1)).sum(-1).mean()
            ),
            "cross-entropy",
        ),
        (
            lambda final_logits, lens_logits: (
                (final_logits.softmax(-1) * (final_logits - lens_logits)).sum(-1).mean()
            ),
            "log_softmax",
        ),
    ],
)
def check_44(answer) -> None:
    final, early = 2 * random(9, 30, seed=4), random(9, 30, seed=5)
    want = lens_loss(final, early)
    got = answer(final.clone(), early.clone())
    log_p, log_q = final.log_softmax(-1), early.log_softmax(-1)
    raw = (final.softmax(-1) * (final - early)).sum(-1).mean()
    expect_none_of(
        got,
        (
            lens_loss(early, final),
            "Lens and final are swapped: the final distribution's p are the weights.",
        ),
        (want / torch.log(torch.tensor(2.0)), "This is in bits: use the natural logarithm."),
        (9 * want, "This is the sum over the tokens: take the mean."),
        (want / 30, "Sum over the vocabulary, then take the mean over the tokens."),
        (
            -(log_p.exp() * log_q).sum(-1).mean(),
            "This is the cross-entropy: it is not zero when the lens is perfect. Take the final "
            "distribution's own entropy away.",
        ),
        (
            raw,
            "Logits are used where log-probabilities should be: they differ by the log of the "
            "normaliser. Use `log_softmax`.",
        ),
    )
    expect_close(got, want, "Σ p (log p - log q) over the vocabulary, then the mean.")


# -- 4.5 -------------------------------------------------------------------------------------

STUB_45 = '''\
def shortcut(early, final):
    """The affine map from an early depth to the last, by least squares: return W, b.

    early, final: the stream of the same n tokens at two depths, (n, d_model).
    W (d_model, d_model) and b (d_model,) make the sum of squares of early @ W.T + b - final as
    small as can be.
    """
    ...
'''


def shortcut(early, final):
    """A column of ones beside the inputs makes the offset one more row of the solution."""
    inputs = torch.cat([early, torch.ones_like(early[:, :1])], 1)
    solution = torch.linalg.lstsq(inputs, final).solution  # (d_model + 1, d_model)
    return solution[:-1].T, solution[-1]


def transposed(early, final):
    W, b = shortcut(early, final)
    return W.T, b


def no_offset(early, final):
    W = torch.linalg.lstsq(early, final).solution.T
    return W, torch.zeros(len(W), dtype=W.dtype)


def backwards(early, final):
    return shortcut(final, early)


def change_only(early, final):
    return shortcut(early, final - early)


def mean_only(early, final):
    return torch.eye(early.shape[1], dtype=early.dtype), (final - early).mean(0)


@exercise(
    "4.5",
    title="A short cut by least squares",
    difficulty=3,
    importance=3,
    minutes=15,
    stub=STUB_45,
    reference=shortcut,
    hints=[
        "`torch.linalg.lstsq(A, B).solution` is the X for which A @ X is closest to B.",
        "Put a column of ones beside `early`: the last row of the solution is then b.",
    ],
    wrong=[
        (transposed, "transposed"),
        (no_offset, "column of ones"),
        (backwards, "swap them"),
        (change_only, "the change"),
        (mean_only, "Only the mean"),
    ],
)
def check_45(answer) -> None:
    early = random(60, 5, seed=6, shift=1.0)
    final = early @ (2 * random(5, 5, seed=7)).T + 3 * random(5, seed=8) + random(60, 5, seed=9)
    result = answer(early.clone(), final.clone())
    expect(isinstance(result, tuple) and len(result) == 2, "Return two things: W and b.")
    got = torch.as_tensor(as_numbers(result[0])), torch.as_tensor(as_numbers(result[1]))
    expect(
        got[0].shape == (5, 5) and got[1].shape == (5,),
        f"W and b have shapes {tuple(got[0].shape)} and {tuple(got[1].shape)}, expected (5, 5) and "
        "(5,).",
    )
    for mistake, message in (
        (transposed, "W is transposed: it should be used as `early @ W.T + b`."),
        (no_offset, "There is no offset: add a column of ones to the inputs."),
        (backwards, "This maps the final stream back to the early one: swap them."),
        (
            change_only,
            "This predicts the change, final - early: here W should give the final stream itself.",
        ),
        (mean_only, "Only the mean is shifted: fit W, too."),
    ):
        W, b = mistake(early, final)
        expect(not (same(got[0], W) and same(got[1], b)), message)
    W, b = shortcut(early, final)
    expect_close(got[0], W, "W is not the least-squares solution.")
    expect_close(got[1], b, "W is right; the offset b is not.")


# -- 4.6 -------------------------------------------------------------------------------------

STUB_46 = '''\
def split_logit(parts, w, u, eps=1e-6):
    """What each part adds to a logit, under a frozen final RMSNorm: (n_parts,).

    parts  (n_parts, d_model), all that was written to the stream at one token; the stream is
           their sum
    w      (d_model,), Gemma's final norm multiplies by 1 + w; u (d_model,), the token's column
           of W_U
    The terms have to add up to norm(parts.sum(0)) @ u.
    """
    ...
'''


def split_logit(parts, w, u, eps=1e-6):
    """One scale for all: that of the whole stream."""
    scale = 1 / (parts.sum(0).pow(2).mean() + eps).sqrt()
    return parts @ ((1 + w) * u) * scale


def own_norms(parts, w, u, eps=1e-6):
    return parts / (parts.pow(2).mean(-1, keepdim=True) + eps).sqrt() @ ((1 + w) * u)


def no_scale(parts, w, u, eps=1e-6):
    return parts @ ((1 + w) * u)


def no_gain(parts, w, u, eps=1e-6):
    return split_logit(parts, 0 * w, u, eps)


def equal_shares(parts, w, u, eps=1e-6):
    terms = split_logit(parts, w, u, eps)
    return terms.sum() / len(terms) * torch.ones_like(terms)


@exercise(
    "4.6",
    title="Splitting a logit",
    difficulty=3,
    importance=5,
    minutes=10,
    stub=STUB_46,
    reference=split_logit,
    hints=[
        "With the scale frozen, the norm is a multiplication, and a dot product can be taken "
        "part by part.",
        "The root mean square is that of `parts.sum(0)`.",
    ],
    wrong=[
        (own_norms, "by itself"),
        (no_scale, "root mean square is missing"),
        (no_gain, "gain 1 + w is missing"),
        (lambda parts, w, u, eps=1e-6: split_logit(parts, w - 1, u, eps), "not w"),
        (equal_shares, "equally"),
    ],
)
def check_46(answer) -> None:
    parts, w, u = random(7, 12, seed=10), random(12, seed=11), random(12, seed=12)
    parts[2] *= 4
    given = (parts, w, u)
    got = answer(*(x.clone() for x in given))
    expect_none_of(
        got,
        (
            own_norms(*given),
            "Each part is normalised by itself, so a part ten times as long counts the same: "
            "freeze the scale of the whole stream.",
        ),
        (no_scale(*given), "The stream's root mean square is missing: divide by it."),
        (no_gain(*given), "The gain 1 + w is missing."),
        (
            split_logit(parts, w - 1, u),
            "The gain is 1 + w, not w.",
        ),
        (split_logit(*given).sum(), "This is the whole logit: return one term per part."),
        (equal_shares(*given), "The sum is right, but it is shared out equally."),
    )
    expect_close(got, split_logit(*given), "The terms should be parts @ (gain * u) / rms.")


# -- 4.7 -------------------------------------------------------------------------------------

STUB_47 = '''\
def head_terms(z, W_O, w_post, v, eps=1e-6):
    """What each head of a Gemma 2 layer adds to a logit: (n_heads,).

    z       (n_heads, d_head), W_O (n_heads, d_head, d_model): head h gives z[h] @ W_O[h]
    w_post  (d_model,): the norm after attention divides the *sum* of the heads by its root mean
            square and multiplies by 1 + w_post
    v       (d_model,): a vector in the stream adds its dot product with v to the logit
    """
    ...
'''


def head_terms(z, W_O, w_post, v, eps=1e-6):
    """The post-norm, frozen at what it does to the sum."""
    heads = torch.einsum("hi,hid->hd", z, W_O)
    scale = 1 / (heads.sum(0).pow(2).mean() + eps).sqrt()
    return heads * scale * (1 + w_post) @ v


def no_post_norm(z, W_O, w_post, v, eps=1e-6):
    return torch.einsum("hi,hid->hd", z, W_O) @ v


def each_head_normed(z, W_O, w_post, v, eps=1e-6):
    heads = torch.einsum("hi,hid->hd", z, W_O)
    return heads / (heads.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + w_post) @ v


def post_scale_only(z, W_O, w_post, v, eps=1e-6):
    return head_terms(z, W_O, 0 * w_post, v, eps)


def post_gain_only(z, W_O, w_post, v, eps=1e-6):
    return torch.einsum("hi,hid->hd", z, W_O) * (1 + w_post) @ v


@exercise(
    "4.7",
    title="A head, through the post-norm",
    difficulty=4,
    importance=4,
    minutes=15,
    stub=STUB_47,
    reference=head_terms,
    hints=[
        '`torch.einsum("hi,hid->hd", z, W_O)` gives each head\'s vector, (n_heads, d_model).',
        "There is one root mean square: that of the sum over the heads.",
    ],
    wrong=[
        (no_post_norm, "common tools"),
        (each_head_normed, "one norm"),
        (post_scale_only, "gain 1 + w_post"),
        (post_gain_only, "division"),
    ],
)
def check_47(answer) -> None:
    z, W_O, w_post, v = (
        random(4, 3, seed=13),
        random(4, 3, 10, seed=14),
        random(10, seed=15),
        random(10, seed=16),
    )
    given = (z, W_O, w_post, v)
    got = answer(*(x.clone() for x in given))
    for mistake, message in (
        (
            no_post_norm(*given),
            "The norm after attention is left out: this is the mistake of common tools, and the "
            "terms do not add up to what attention adds to the stream.",
        ),
        (
            each_head_normed(*given),
            "Each head has a norm of its own here: there is one norm, over the sum of the heads.",
        ),
        (post_scale_only(*given), "The norm's gain 1 + w_post is missing."),
        (post_gain_only(*given), "The gain is there, but the division by the root mean square is "
         "missing."),
        (head_terms(*given).sum(), "This is the sum: return one term per head."),
    ):  # fmt: skip
        expect(not same(got, mistake), message)
    expect_close(got, head_terms(*given), "Freeze the scale that the norm has on the heads' sum.")


# -- 4.8 -------------------------------------------------------------------------------------

STUB_48 = '''\
def split_logit_layernorm(parts, gain, bias, u, eps=1e-5):
    """The same for GPT-2's LayerNorm: the terms of the parts (n_parts,), and the bias's term.

    LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias, with the variance over the
    d_model numbers (divided by d_model). Return two things: terms, bias_term.
    """
    ...
'''


def split_logit_layernorm(parts, gain, bias, u, eps=1e-5):
    """Each part is centred by itself, as the mean of a sum is the sum of the means."""
    scale = 1 / (parts.sum(0).var(correction=0) + eps).sqrt()
    centred = parts - parts.mean(-1, keepdim=True)
    return centred @ (gain * u) * scale, bias @ u


def not_centred(parts, gain, bias, u, eps=1e-5):
    scale = 1 / (parts.sum(0).var(correction=0) + eps).sqrt()
    return parts @ (gain * u) * scale, bias @ u


def rms_scale(parts, gain, bias, u, eps=1e-5):
    scale = 1 / (parts.sum(0).pow(2).mean() + eps).sqrt()
    return (parts - parts.mean(-1, keepdim=True)) @ (gain * u) * scale, bias @ u


def bias_shared(parts, gain, bias, u, eps=1e-5):
    terms, constant = split_logit_layernorm(parts, gain, bias, u, eps)
    return terms + constant / len(terms), 0 * constant


def bias_each(parts, gain, bias, u, eps=1e-5):
    terms, constant = split_logit_layernorm(parts, gain, bias, u, eps)
    return terms + constant, constant


def unbiased(parts, gain, bias, u, eps=1e-5):
    scale = 1 / (parts.sum(0).var(correction=1) + eps).sqrt()
    return (parts - parts.mean(-1, keepdim=True)) @ (gain * u) * scale, bias @ u


@exercise(
    "4.8",
    title="The same for GPT-2",
    difficulty=4,
    importance=3,
    minutes=15,
    stub=STUB_48,
    reference=split_logit_layernorm,
    hints=[
        "The mean of a sum is the sum of the means, so each part can be centred by itself.",
        "`parts.sum(0).var(correction=0)` is the variance that LayerNorm uses.",
    ],
    wrong=[
        (not_centred, "not taken away"),
        (rms_scale, "standard deviation"),
        (bias_shared, "none of them wrote it"),
        (bias_each, "comes once"),
        (unbiased, "d_model - 1"),
        (lambda *given: split_logit_layernorm(*given)[0], "Return two things"),
    ],
)
def check_48(answer) -> None:
    parts, gain, bias, u = (
        random(6, 9, seed=17, shift=0.5),
        random(9, seed=18, shift=1.0),
        random(9, seed=19),
        random(9, seed=20),
    )
    given = (parts, gain, bias, u)
    result = answer(*(x.clone() for x in given))
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "Return two things: the terms of the parts, and the term of the bias.",
    )
    got = [as_numbers(x) for x in result]
    for mistake, message in (
        (not_centred, "The mean is not taken away: centre each part."),
        (rms_scale, "The scale is a root mean square: LayerNorm divides by the standard deviation "
         "of the stream."),
        (bias_shared, "The bias is shared out among the parts: none of them wrote it. Give it a "
         "term of its own."),
        (bias_each, "The bias is added to every part: it comes once, as a term of its own."),
        (unbiased, "The variance divides by d_model - 1: LayerNorm divides by d_model "
         "(`correction=0`)."),
    ):  # fmt: skip
        terms, constant = mistake(*given)
        expect(not (same(got[0], terms) and same(got[1], constant)), message)
    terms, constant = split_logit_layernorm(*given)
    expect_close(got[1], constant, "The term of the bias is bias @ u.")
    expect_close(got[0], terms, "Centre each part, then parts @ (gain * u) / standard deviation.")
