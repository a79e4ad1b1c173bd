"""Exercises of lesson 03, activation patching."""

import torch

from mi_helpers.course.check import (
    draw,
    exercise,
    expect,
    expect_close,
    expect_none_of,
    expect_shape,
    same,
)

# -- 3.1 -------------------------------------------------------------------------------------

STUB_31 = '''\
def normalised(value, clean, corrupted):
    """A logit difference on the scale where the corrupted run is 0 and the clean run is 1.

    value, clean, corrupted: logit differences, numbers or tensors.
    """
    ...
'''


def normalised(value, clean, corrupted):
    """(value - corrupted) / (clean - corrupted)."""
    return (value - corrupted) / (clean - corrupted)


@exercise(
    "3.1",
    title="From 0 to 1",
    difficulty=1,
    importance=5,
    minutes=5,
    stub=STUB_31,
    reference=normalised,
    hints=[
        "Two steps: shift so that the corrupted run is 0, scale so that the clean run is 1.",
        "After the shift the clean run stands at `clean - corrupted`: divide by that.",
    ],
    wrong=[
        (lambda value, clean, corrupted: (value - clean) / (corrupted - clean), "swapped"),
        (lambda value, clean, corrupted: value / clean, "clean run alone"),
        (lambda value, clean, corrupted: (value - corrupted) / clean, "the gap between"),
        (
            lambda value, clean, corrupted: normalised(value, clean, corrupted).clamp(0, 1),
            "Nothing is cut off",
        ),
    ],
)
def check_31(answer) -> None:
    clean, corrupted = 3.0, -1.0
    values = torch.tensor([-1.0, 3.0, 1.0, 5.0, -2.0])
    got = answer(values, clean, corrupted)
    expect_none_of(
        got,
        (
            (values - clean) / (corrupted - clean),
            "The ends are swapped: the corrupted run should be 0, the clean run 1.",
        ),
        (
            values / clean,
            "This divides by the clean run alone, as if the corrupted logit difference were zero: "
            "shift first, so that the corrupted run becomes 0.",
        ),
        (
            (values - corrupted) / clean,
            "The corrupted run is 0, but the clean run is not 1: divide by the gap between them.",
        ),
        (
            ((values - corrupted) / (clean - corrupted)).clamp(0, 1),
            "Nothing is cut off: a patch may take the answer beyond 1, or below 0, and hiding that "
            "hides a finding.",
        ),
    )
    expect_close(got, normalised(values, clean, corrupted), "With -1 as 0 and 3 as 1, 1 is 0.5.")


# -- 3.2 -------------------------------------------------------------------------------------

STUB_32 = '''\
def logit_difference(logits, answer, wrong):
    """How far the right answer is ahead at the end of the prompt: the mean over the prompts of
    logit(answer) - logit(wrong).

    logits  (batch, pos, d_vocab)
    answer, wrong  token ids, one per prompt, tensors (batch,)
    """
    ...
'''


def logit_difference(logits, answer, wrong):
    """Each prompt has answers of its own, so rows and ids are paired."""
    rows, last = torch.arange(len(logits)), logits[:, -1]
    return (last[rows, answer] - last[rows, wrong]).mean()


@exercise(
    "3.2",
    title="The logit difference",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_32,
    reference=logit_difference,
    hints=[
        "`logits[:, -1]` are the logits at the last position, (batch, d_vocab).",
        "`last[torch.arange(len(last)), answer]` takes one entry per row.",
    ],
    wrong=[
        (lambda logits, answer, wrong: logit_difference(logits, wrong, answer), "turned round"),
        (
            lambda logits, answer, wrong: (
                logits[torch.arange(len(logits)), :, answer]
                - logits[torch.arange(len(logits)), :, wrong]
            ).mean(),
            "over all positions",
        ),
        (
            lambda logits, answer, wrong: (
                logits[:, -1][:, answer] - logits[:, -1][:, wrong]
            ).mean(),
            "pair the rows",
        ),
        (
            lambda logits, answer, wrong: logit_difference(logits.softmax(-1), answer, wrong),
            "probabilities",
        ),
        (
            lambda logits, answer, wrong: (
                logits[:, -1].gather(1, answer[:, None]) - logits[:, -1].gather(1, wrong[:, None])
            )[:, 0],
            "One number",
        ),
    ],
)
def check_32(answer) -> None:
    logits, right, wrong = draw(3, 4, 7), torch.tensor([1, 5, 2]), torch.tensor([0, 3, 6])
    rows, last = torch.arange(3), logits[:, -1]
    got = answer(logits, right, wrong)
    log_p = logits.softmax(-1)[:, -1]
    expect_none_of(
        got,
        (
            -logit_difference(logits, right, wrong),
            "The sign is turned round: positive means that the right answer is ahead.",
        ),
        (
            (logits[rows, :, right] - logits[rows, :, wrong]).mean(),
            "This averages over all positions: the answer is said at the last one.",
        ),
        (
            (logits[:, 0][rows, right] - logits[:, 0][rows, wrong]).mean(),
            "This reads the first position: the answer is said at the last one.",
        ),
        (
            (last[:, right] - last[:, wrong]).mean(),
            "`last[:, answer]` takes every prompt's answer from every prompt, (batch, batch): pair "
            "the rows with the ids.",
        ),
        (
            (log_p[rows, right] - log_p[rows, wrong]).mean(),
            "These are probabilities: a difference of logits was asked for.",
        ),
        (last[rows, right] - last[rows, wrong], "One number is asked for: the mean over prompts."),
        (
            last[rows, right].mean(),
            "Subtract the wrong answer's logit: all logits may rise at once.",
        ),
    )
    expect_close(got, logit_difference(logits, right, wrong), "The mean difference is another one.")


# -- 3.3 -------------------------------------------------------------------------------------

STUB_33 = '''\
def patch_head(z, other, head, position):
    """z with one head's vector at one position taken from the other run; z itself stays as it is.

    z, other  (batch, pos, n_heads, d_head), of the run that is patched and of the other run
    """
    ...
'''


def patch_head(z, other, head, position):
    """Clone first: whoever still holds z should not be surprised."""
    patched = z.clone()
    patched[:, position, head] = other[:, position, head]
    return patched


def _patched_everywhere(z, other, head, position):
    z[:, position, head] = other[:, position, head]
    return z


@exercise(
    "3.3",
    title="Patch one head",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_33,
    reference=patch_head,
    copies=False,
    hints=[
        "`z.clone()` first, then assign to one slice of the clone.",
        "One position and one head, in all prompts: `[:, position, head]`.",
    ],
    wrong=[
        (_patched_everywhere, "work on a `clone()`"),
        (
            lambda z, other, head, position: torch.stack(
                [other[:, :, h] if h == head else z[:, :, h] for h in range(z.shape[2])], 2
            ),
            "every position",
        ),
        (
            lambda z, other, head, position: torch.stack(
                [other[:, p] if p == position else z[:, p] for p in range(z.shape[1])], 1
            ),
            "All heads",
        ),
        (
            lambda z, other, head, position: patch_head(z, other, position, head),
            "wrong way round",
        ),
        (lambda z, other, head, position: other.clone(), "other run as a whole"),
    ],
)
def check_33(answer) -> None:
    z, other = draw(2, 5, 4, 3), draw(2, 5, 4, 3, seed=1)
    kept, kept_other = z.clone(), other.clone()
    got = answer(z, other, 2, 3)
    expect(
        torch.equal(z, kept) and torch.equal(other, kept_other),
        "Your function changes the tensor that it was given: work on a `clone()`.",
    )
    expect_shape(got, (2, 5, 4, 3))

    def put(where):
        patched = z.clone()
        patched[where] = other[where]
        return patched

    expect_none_of(
        got,
        (put((slice(None), slice(None), 2)), "The head is replaced at every position, not at one."),
        (put((slice(None), 3)), "All heads of that position are replaced, not one."),
        (
            put((slice(None), 2, 3)),
            "Position and head are the wrong way round: z is (batch, pos, n_heads, d_head).",
        ),
        (put((0, 3, 2)), "Only the first prompt of the batch is patched."),
        (
            other,
            "This is the other run as a whole: only one head at one position is taken from it.",
        ),
        (z, "Nothing has changed: the patched tensor has to be returned."),
    )
    expect_close(got, patch_head(z, other, 2, 3), "Another entry than the one asked for differs.")


# -- 3.4 -------------------------------------------------------------------------------------

STUB_34 = '''\
def both_ways(run, clean, corrupted):
    """The effect of each wire, by denoising and by noising: two tensors (n,).

    run(wires) gives the network's output for wire values (n,): 1 for the clean wires and 0 for the
    corrupted ones. denoise[i]: the output when wire i alone is clean. noise[i]: how much of the
    output is lost when wire i alone is corrupted.
    """
    ...
'''


def both_ways(run, clean, corrupted):
    """One wire at a time, starting afresh for each."""
    denoise, noise = torch.zeros(len(clean)), torch.zeros(len(clean))
    for i in range(len(clean)):
        one, rest = corrupted.clone(), clean.clone()
        one[i], rest[i] = clean[i], corrupted[i]
        denoise[i], noise[i] = run(one), 1 - run(rest)
    return denoise, noise


def _both_ways_without_clones(run, clean, corrupted):
    denoise, noise = torch.zeros(len(clean)), torch.zeros(len(clean))
    clean, corrupted = clean.clone(), corrupted.clone()
    start, end = clean.clone(), corrupted.clone()
    for i in range(len(clean)):
        corrupted[i], clean[i] = start[i], end[i]
        denoise[i], noise[i] = run(corrupted), 1 - run(clean)
    return denoise, noise


def _both_ways_in_place(run, clean, corrupted):
    denoise, noise = torch.zeros(len(clean)), torch.zeros(len(clean))
    for i in range(len(clean)):
        clean[i], corrupted[i] = corrupted[i].item(), clean[i].item()
        denoise[i], noise[i] = run(corrupted), 1 - run(clean)
    return denoise, noise


@exercise(
    "3.4",
    title="Both ways",
    difficulty=3,
    importance=5,
    minutes=15,
    stub=STUB_34,
    reference=both_ways,
    copies=False,
    hints=[
        "For wire i: a copy of the corrupted wires with the clean value at i, and the reverse.",
        "Denoising reads the output; noising reads 1 - output, what is lost.",
    ],
    wrong=[
        (
            lambda run, clean, corrupted: (
                both_ways(run, clean, corrupted)[0],
                1 - both_ways(run, clean, corrupted)[1],
            ),
            "not what is lost",
        ),
        (
            lambda run, clean, corrupted: both_ways(run, clean, corrupted)[::-1],
            "other direction",
        ),
        (_both_ways_in_place, "starts from a run that"),
        (_both_ways_without_clones, "put back"),
        (
            lambda run, clean, corrupted: both_ways(run, clean, corrupted)[0],
            "Return two things",
        ),
    ],
)
def check_34(answer) -> None:
    clean, corrupted = torch.ones(3), torch.zeros(3)

    def run(wires):  # (wire 0 and wire 1) half, wire 1 or wire 2 half
        both = torch.relu(wires[0] + wires[1] - 1)
        either = torch.relu(wires[1] + wires[2]) - torch.relu(wires[1] + wires[2] - 1)
        return (both + either) / 2

    want = both_ways(run, clean, corrupted)
    got = answer(run, clean, corrupted)
    expect(
        isinstance(got, tuple | list) and len(got) == 2,
        "Return two things: the denoising effects and the noising effects.",
    )
    expect(
        bool((clean == 1).all() and (corrupted == 0).all()),
        "Your function changes `clean` or `corrupted`, so that the second wire starts from a run "
        "that is patched already: start each wire from a `clone()`.",
    )
    for name, mine, right, other in (
        ("denoising", got[0], want[0], want[1]),
        ("noising", got[1], want[1], want[0]),
    ):
        if name == "noising":
            expect(
                not same(mine, 1 - right),
                "The noising values are what is left of the output, not what is lost: 1 minus it.",
            )
        expect(
            not same(mine, other),
            f"The {name} effects are those of the other direction: denoising puts one clean wire "
            "into the corrupted run, noising one corrupted wire into the clean run.",
        )
        expect_close(
            mine,
            right,
            f"The {name} effects are another list; are the other wires put back before the next?",
        )


# -- 3.5 -------------------------------------------------------------------------------------

STUB_35 = '''\
def mean_ablation(x, reference, position):
    """x with one position's vector replaced, in every prompt, by its mean over reference prompts.

    x          (batch, pos, d_model)
    reference  (prompts, pos, d_model), the same site for prompts of the same form
    Returns a new tensor; x stays as it is.
    """
    ...
'''


def mean_ablation(x, reference, position):
    """The mean at *that* position: what stands there in any prompt of this form."""
    changed = x.clone()
    changed[:, position] = reference[:, position].mean(0)
    return changed


def _filled(x, value, position):
    changed = x.clone()
    changed[:, position] = value
    return changed


@exercise(
    "3.5",
    title="The mean ablation, position by position",
    difficulty=2,
    importance=4,
    minutes=10,
    stub=STUB_35,
    reference=mean_ablation,
    hints=[
        "`reference[:, position]` is (prompts, d_model): average over the prompts.",
        "Clone x, then assign the mean vector to one position of all prompts.",
    ],
    wrong=[
        (lambda x, reference, position: _filled(x, 0.0, position), "zero ablation"),
        (
            lambda x, reference, position: _filled(x, reference.mean((0, 1)), position),
            "over all positions",
        ),
        (
            lambda x, reference, position: _filled(x, reference[:, position].mean(), position),
            "one number instead of a vector",
        ),
        (
            lambda x, reference, position: _filled(x, x[:, position].mean(0), position),
            "the reference was asked for",
        ),
        (
            lambda x, reference, position: reference.mean(0).expand_as(x).clone(),
            "Every position",
        ),
    ],
)
def check_35(answer) -> None:
    x, reference, kept = draw(2, 4, 3), draw(5, 4, 3, seed=1) + 1, draw(2, 4, 3)
    got = answer(x, reference, 2)
    expect(torch.equal(x, kept), "Your function changes x itself: work on a `clone()`.")
    expect_shape(got, (2, 4, 3))

    def put(value, at=2):
        changed = x.clone()
        changed[:, at] = value
        return changed

    expect_none_of(
        got,
        (put(0.0), "This is a zero ablation: the mean vector of the reference belongs there."),
        (
            put(reference.mean((0, 1))),
            "The mean is taken over all positions: another position's vectors do not belong there.",
        ),
        (
            put(reference[:, 2].mean()),
            "The mean is over the model's dimensions as well: one number instead of a vector.",
        ),
        (put(x[:, 2].mean(0)), "The mean is over the prompts of x: the reference was asked for."),
        (
            put(reference.mean(0), slice(None)),
            "Every position is replaced, and only one should be.",
        ),
    )
    expect_close(got, mean_ablation(x, reference, 2), "Another vector was expected there.")


# -- 3.6 -------------------------------------------------------------------------------------

STUB_36 = '''\
def attribution(base, other, gradient):
    """What attribution patching says each position's patch will change, (pos,).

    base, other  (pos, d_model), an activation in the run that is patched and in the other run
    gradient     (pos, d_model), of the metric by that activation, in the run that is patched
    """
    ...
'''


def attribution(base, other, gradient):
    """First order: (other - base) · ∂ metric / ∂ activation, summed over the vector's entries."""
    return ((other - base) * gradient).sum(-1)


@exercise(
    "3.6",
    title="Attribution patching",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_36,
    reference=attribution,
    hints=[
        "To first order, f(x + dx) - f(x) is dx times the gradient, summed. What is dx?",
        "`(other - base) * gradient`, summed over the last axis.",
    ],
    wrong=[
        (lambda base, other, gradient: attribution(other, base, gradient), "turned round"),
        (lambda base, other, gradient: (other * gradient).sum(-1), "removes base as well"),
        (lambda base, other, gradient: ((other - base) * gradient).sum(), "One number per"),
        (lambda base, other, gradient: ((other - base) * gradient).mean(-1), "do not average"),
        (
            lambda base, other, gradient: (other - base).norm(dim=-1) * gradient.norm(dim=-1),
            "forget the angle",
        ),
    ],
)
def check_36(answer) -> None:
    base, other, gradient = (draw(4, 6, seed=seed) for seed in range(3))
    got = answer(base, other, gradient)
    want = attribution(base, other, gradient)
    expect_none_of(
        got,
        (-want, "The sign is turned round: the patch goes *from* base *to* other."),
        ((other * gradient).sum(-1), "The patch removes base as well: the change is other - base."),
        ((base * gradient).sum(-1), "This is base times gradient: the change is other - base."),
        (want.sum(), "One number per position, not their sum."),
        ((other - base) * gradient, "Sum over the entries of each position's vector."),
        (
            ((other - base) * gradient).mean(-1),
            "Sum over the vector's entries, do not average them.",
        ),
        (
            (other - base).norm(dim=-1) * gradient.norm(dim=-1),
            "The lengths alone forget the angle: a large change across the gradient does nothing.",
        ),
    )
    expect_close(got, want, "Per position: the dot product of the change and the gradient.")


# -- 3.7 -------------------------------------------------------------------------------------

STUB_37 = '''\
def rank_correlation(true, guess):
    """Spearman's rank correlation of two lists (n,) without ties: the correlation of their ranks.

    true, guess: tensors (n,), such as the effects of n patches and their estimates.
    """
    ...
'''


def ranks(values):
    """0 for the smallest, n - 1 for the largest."""
    return values.argsort().argsort().double()


def rank_correlation(true, guess):
    """Pearson's correlation of the ranks."""
    return torch.corrcoef(torch.stack([ranks(true), ranks(guess)]))[0, 1]


@exercise(
    "3.7",
    title="Is the order right?",
    difficulty=3,
    importance=3,
    minutes=10,
    stub=STUB_37,
    reference=rank_correlation,
    hints=[
        "First turn each list into ranks: 0 for the smallest, n - 1 for the largest.",
        "`argsort()` of `argsort()` gives ranks; `torch.corrcoef` then gives the correlation.",
    ],
    wrong=[
        (
            lambda true, guess: torch.corrcoef(torch.stack([true, guess]))[0, 1],
            "Pearson's correlation",
        ),
        (
            lambda true, guess: torch.corrcoef(
                torch.stack([true.argsort().double(), guess.argsort().double()])
            )[0, 1],
            "apply it twice",
        ),
        (lambda true, guess: rank_correlation(true, -guess), "upside down"),
        (
            lambda true, guess: (ranks(true) == ranks(guess)).double().mean(),
            "counts equal ranks",
        ),
    ],
)
def check_37(answer) -> None:
    true = torch.tensor([0.1, 0.9, 0.3, 0.2, 5.0, -0.4])
    guess = torch.tensor([0.6, 0.3, 0.0, 0.25, 0.4, -9.0])
    want = rank_correlation(true, guess)
    got = answer(true, guess)
    order = torch.corrcoef(torch.stack([true.argsort().double(), guess.argsort().double()]))[0, 1]
    expect_none_of(
        got,
        (
            torch.corrcoef(torch.stack([true, guess]))[0, 1],
            "This is Pearson's correlation of the values: outliers decide it. Take ranks first.",
        ),
        (
            order,
            "`argsort` says which entry comes first, not which rank an entry has: apply it twice.",
        ),
        (-want, "One of the two rankings is upside down."),
        ((ranks(true) == ranks(guess)).double().mean(), "This counts equal ranks: correlate them."),
    )
    expect_close(got, want, f"For the example {float(want):.3f} was expected.", 1e-4)


# -- 3.8 -------------------------------------------------------------------------------------

STUB_38 = '''\
def head_change(z, other, head, W_O, post_norm):
    """How what attention adds to the stream changes when one head is taken from the other run.

    z, other   (pos, n_heads, d_head), what the heads have gathered in the two runs
    W_O        (n_heads, d_head, d_model)
    post_norm  a function (pos, d_model) -> (pos, d_model), which the summed output of all heads
               passes before it is added
    Returns (pos, d_model).
    """
    ...
'''


def heads_out(z, W_O):
    """Σ over heads of z · W_O, (pos, d_model)."""
    return torch.einsum("phd,hdm->pm", z, W_O)


def head_change(z, other, head, W_O, post_norm):
    """Norm with the head from the other run, less norm without: the norm is not linear."""
    patched = z.clone()
    patched[:, head] = other[:, head]
    return post_norm(heads_out(patched, W_O)) - post_norm(heads_out(z, W_O))


@exercise(
    "3.8",
    title="A head behind a post-norm",
    difficulty=4,
    importance=4,
    minutes=15,
    stub=STUB_38,
    reference=head_change,
    hints=[
        '`torch.einsum("phd,hdm->pm", z, W_O)` is what all heads write, before the norm.',
        "Compute that twice, with and without the patch, and subtract *after* the norm.",
    ],
    wrong=[
        (
            lambda z, other, head, W_O, post_norm: (other - z)[:, head] @ W_O[head],
            "left out",
        ),
        (
            lambda z, other, head, W_O, post_norm: post_norm((other - z)[:, head] @ W_O[head]),
            "norm of the difference",
        ),
        (
            lambda z, other, head, W_O, post_norm: (
                post_norm(other[:, head] @ W_O[head]) - post_norm(z[:, head] @ W_O[head])
            ),
            "this head alone",
        ),
        (
            lambda z, other, head, W_O, post_norm: (
                post_norm(heads_out(other, W_O)) - post_norm(heads_out(z, W_O))
            ),
            "All heads are taken",
        ),
        (
            lambda z, other, head, W_O, post_norm: -head_change(z, other, head, W_O, post_norm),
            "turned round",
        ),
    ],
)
def check_38(answer) -> None:
    z, other, W_O = draw(3, 2, 4), 3 * draw(3, 2, 4, seed=1), draw(2, 4, 5, seed=2)
    kept = z.clone()

    def norm(x):
        return 2 * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()

    got = answer(z, other, 1, W_O, norm)
    expect(torch.equal(z, kept), "Your function changes z itself: work on a `clone()`.")
    want = head_change(z, other, 1, W_O, norm)
    one = (other - z)[:, 1] @ W_O[1]
    alone = norm(other[:, 1] @ W_O[1]) - norm(z[:, 1] @ W_O[1])
    expect_none_of(
        got,
        (one, "The post-norm is left out: its scale belongs to what reaches the stream."),
        (
            norm(one),
            "This is the norm of the difference: any change would come out equally long. Take the "
            "difference of two norms.",
        ),
        (
            alone,
            "The norm is applied to this head alone: the model applies it to the sum of all heads.",
        ),
        (-want, "The sign is turned round: the patched output less the old one."),
        (
            norm(heads_out(other, W_O)) - norm(heads_out(z, W_O)),
            "All heads are taken from the other run, not one.",
        ),
        (
            norm(heads_out(z, W_O) + one),
            "This is the patched output itself: subtract what attention added before.",
        ),
    )
    expect_close(got, want, "post_norm(all heads, one patched) - post_norm(all heads).", 1e-4)
