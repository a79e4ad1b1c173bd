"""Exercises of lesson 04: the logit lens."""

import functools
import itertools

import torch

from mi_helpers.attribution import direct_logit_attribution
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
from mi_helpers.course.investigate import investigation, one_of, plain
from mi_helpers.course.predict import prediction
from mi_helpers.lens import TunedLens, read_out, settled_depth, train_tuned_lens
from mi_helpers.lessons.lesson_04 import causal
from mi_helpers.lessons.lesson_04 import experiments as lab
from mi_helpers.lessons.shared import shipped_model, token_pool, word_ids
from mi_helpers.tinyworld.world import World

SHORT = ("facts", "two_hop", "ioi", "agreement", "truth")  # families of short sentences
ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def sentence(draw, longest: int = 24) -> str:
    """A TinyWorld document of a few words, without its end, so that something is to come."""
    family, seed = draw.choice(SHORT), draw.integer(0, 10_000)
    words = next(iter(World().documents(seed, family))).text.split()
    return " ".join(words[: min(len(words) - 1, longest)])


def stream_at(draw, text: str) -> torch.Tensor:
    """The stream of a text as it enters a drawn block, (pos, d_model)."""
    model = shipped_model()
    layer = draw.integer(0, model.n_layers - 1)
    return model.run_with_cache(text, [("resid_pre", layer)])[1]["resid_pre", layer][0]


# -- 4.1 -------------------------------------------------------------------------------------

STUB_41 = '''\
def lens(model, h):
    """The logits of a model that would stop at the stream h: (..., d_model) to (..., d_vocab).

    model.ln_final  the final norm, a function of the stream
    model.W_U       (d_model, d_vocab), the unembedding
    model.softcap   30 in Gemma 2: a logit y becomes 30 · tanh(y / 30); None where there is no cap
    """
    ...
'''


def lens(model, h):
    """softcap(W_U norm(h))."""
    logits = model.ln_final(h) @ model.W_U
    cap = model.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def no_norm(model, h):
    return model.softcap * torch.tanh(h @ model.W_U / model.softcap)


def no_cap(model, h):
    return model.ln_final(h) @ model.W_U


def hard_cap(model, h):
    return (model.ln_final(h) @ model.W_U).clamp(-model.softcap, model.softcap)


def scaled_unembedding(model, h):
    return model.softcap * torch.tanh(no_cap(model, h) * model.d_model**0.5 / model.softcap)


def whole_norm(model, h):
    """The norm of the whole text at once."""
    flat = model.ln_final.weight + 1
    normed = h / h.pow(2).mean().sqrt() * flat
    return model.softcap * torch.tanh(normed @ model.W_U / model.softcap)


def as_probabilities(model, h):
    return lens(model, h).softmax(-1)


def lens_by_library(model, h):
    return model.unembed(h)


def lens_in_numpy(model, h):
    import numpy as np

    x, w = h.double().numpy(), model.ln_final.weight.detach().double().numpy()
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + w)
    return 30 * np.tanh(normed @ model.W_U.detach().double().numpy() / 30)


@exercise(
    "4.1",
    title="The lens",
    difficulty=1,
    importance=5,
    minutes=4,
    stub=STUB_41,
    reference=lens,
    right=[lens_by_library, lens_in_numpy],
    survivors=ONE_MODEL,
    hints=[
        "Three steps, in the order of the formula: norm, unembedding, soft-cap.",
        "`model.ln_final(h) @ model.W_U`, then `cap * torch.tanh(logits / cap)`.",
    ],
    wrong=[
        (no_norm, "not normalised"),
        (no_cap, "soft-cap is missing"),
        (hard_cap, "cuts hard"),
        (scaled_unembedding, "on its way in"),
        (whole_norm, "each token"),
        (as_probabilities, "probabilities"),
    ],
)
def check_41(answer) -> None:
    agree(
        answer,
        lens,
        lambda draw: (shipped_model(), stream_at(draw, sentence(draw))),
        mistakes=[
            (no_norm, "The stream is not normalised: `model.ln_final` comes first."),
            (no_cap, "The soft-cap is missing: the order is right, the probabilities are not."),
            (hard_cap, "This cuts hard at the cap: use tanh, which bends."),
            (
                scaled_unembedding,
                "Gemma multiplies by √d_model on its way in, not on its way out: W_U as it is.",
            ),
            (whole_norm, "All tokens share one norm: each token has its own, over the last axis."),
            (as_probabilities, "These are probabilities: return logits."),
        ],
        otherwise="Norm, then W_U, then cap · tanh(logits / cap).",
        tolerance=1e-4,
    )


# -- 4.2 -------------------------------------------------------------------------------------

STUB_42 = '''\
def rank_of(logits, target):
    """At each depth, the rank of each prompt's target, 1 for the highest logit: (depths, n).

    logits  (depths, n, d_vocab)
    target  (n,), the id of the token that is followed in each prompt
    """
    ...
'''


def rank_of(logits, target):
    """One more than the number of tokens above it."""
    own = logits.gather(-1, target.expand(logits.shape[:-1])[..., None])  # (depths, n, 1)
    return (logits > own).sum(-1) + 1


def from_zero(logits, target):
    return rank_of(logits, target) - 1


def from_below(logits, target):
    return rank_of(-logits, target)


def which_token(logits, target):
    order = logits.argsort(-1, descending=True)
    return order.gather(-1, target.expand(logits.shape[:-1])[..., None])[..., 0] + 1


def first_target(logits, target):
    return rank_of(logits, target[:1].expand(target.shape))


def last_depth(logits, target):
    return rank_of(logits[-1:], target).expand(logits.shape[:-1])


def rank_by_sorting(logits, target):
    place = logits.argsort(-1, descending=True).argsort(-1)
    return place[:, torch.arange(len(target)), target] + 1


def rank_in_python(logits, target):
    return [
        [1 + sum(x > row[t] for x in row) for row, t in zip(depth, target.tolist(), strict=True)]
        for depth in logits.tolist()
    ]


def ranked_case(draw) -> tuple:
    logits = draw.normal("depths", "n", "vocab")
    return logits, draw.integers(0, draw.size("vocab") - 1, "n")


@exercise(
    "4.2",
    title="The rank of a token",
    difficulty=2,
    importance=4,
    minutes=5,
    stub=STUB_42,
    reference=rank_of,
    right=[rank_by_sorting, rank_in_python],
    hints=[
        "A rank is a count: how many tokens have a higher logit?",
        "First the target's own logit, (depths, n, 1): `logits[:, torch.arange(n), target]` picks "
        "it, and `[..., None]` keeps an axis to compare along.",
    ],
    wrong=[
        (from_zero, "not 0"),
        (from_below, "turned round"),
        (which_token, "which token"),
        (first_target, "its own target"),
        (last_depth, "each depth"),
    ],
)
def check_42(answer) -> None:
    agree(
        answer,
        rank_of,
        ranked_case,
        mistakes=[
            (from_zero, "The best token has rank 1, not 0."),
            (from_below, "The order is turned round: the highest logit has rank 1."),
            (
                which_token,
                "`argsort` at the target's place says which token has that rank. You are asked "
                "for the rank of the token.",
            ),
            (first_target, "Each prompt has its own target."),
            (last_depth, "These are the ranks at the last depth: count at each depth."),
        ],
        otherwise="Count, at each depth and prompt, the tokens whose logit is higher.",
    )


# -- 4.3 -------------------------------------------------------------------------------------

STUB_43 = '''\
def settled(ranks):
    """The first depth from which a prompt's target keeps rank 1 up to the last depth: (n,).

    ranks  (depths, n). Where the target is not first at the last depth: the number of depths.
    """
    ...
'''


def settled(ranks):
    """The number of depths, less how many of the last ones have rank 1."""
    first = (ranks == 1).int()
    kept = first.flip(0).cumprod(0).sum(0)  # (n,)
    return len(ranks) - kept


def first_time(ranks):
    first = (ranks == 1).int()
    return torch.where(first.any(0), first.argmax(0), len(ranks))


def too_early(ranks):
    return (settled(ranks) - 1).clamp(0)


def how_many(ranks):
    return len(ranks) - settled(ranks)


def counts_all(ranks):
    return len(ranks) - (ranks == 1).sum(0)


def from_one(ranks):
    return settled(ranks) + 1


def last_if_never(ranks):
    return settled(ranks).clamp(max=len(ranks) - 1)


def settled_by_walking(ranks):
    found = []
    for column in zip(*ranks.tolist(), strict=True):
        depth = len(column)
        while depth and column[depth - 1] == 1:
            depth -= 1
        found.append(depth)
    return found


def settled_by_library(ranks):
    return settled_depth(ranks)


def run_of_ranks(draw) -> tuple:
    """Ranks (depths, n): some lead, lose the lead and get it back, some lead always or never."""
    first = draw.booleans("depths", "n", share=0.6)
    ranks = torch.where(first, 1, draw.integers(2, 40, "depths", "n"))
    ranks[:, 0], ranks[-1, 1] = 1, 7
    ranks[:3, 2] = torch.tensor([1, 5, 1])
    ranks[3:, 2] = 1
    return (ranks,)


@exercise(
    "4.3",
    title="Where an answer settles",
    difficulty=2,
    importance=3,
    minutes=5,
    stub=STUB_43,
    reference=settled,
    right=[settled_by_walking, settled_by_library],
    hints=[
        "Walk back from the last depth while the rank is 1.",
        "`(ranks == 1).int().flip(0).cumprod(0)` is 1 while the lead lasts, seen from the end.",
    ],
    wrong=[
        (first_time, "lost again"),
        (too_early, "One too early"),
        (how_many, "how many depths"),
        (counts_all, "not every depth"),
        (from_one, "Depths count from 0"),
        (last_if_never, "never settles"),
    ],
)
def check_43(answer) -> None:
    agree(
        answer,
        settled,
        run_of_ranks,
        mistakes=[
            (first_time, "This is the first time at rank 1: it may be lost again."),
            (too_early, "One too early: the depth before the last run has another rank."),
            (how_many, "This is for how many depths it stays: return where that begins."),
            (counts_all, "Only the last run counts, not every depth with rank 1."),
            (from_one, "Depths count from 0."),
            (last_if_never, "What is not first at the end never settles: the number of depths."),
        ],
        otherwise="Go back from the end while the rank is 1.",
    )


# -- 4.4 -------------------------------------------------------------------------------------

STUB_44 = '''\
def stopping_cost(final_logits, lens_logits):
    """What it costs to stop early: KL(final ‖ lens) of each token, in nats, (...).

    Both are logits (..., d_vocab). KL(p ‖ q) = Σ p (log p - log q), over the vocabulary.
    """
    ...
'''


def stopping_cost(final_logits, lens_logits):
    """Weighted by what the model really predicts."""
    p, q = final_logits.log_softmax(-1), lens_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def the_other_way(final, early):
    return stopping_cost(early, final)


def cross_entropy(final, early):
    return -(final.softmax(-1) * early.log_softmax(-1)).sum(-1)


def of_logits(final, early):
    return (final.softmax(-1) * (final - early)).sum(-1)


def in_bits(final, early):
    return stopping_cost(final, early) / torch.log(torch.tensor(2.0))


def over_tokens(final, early):
    return stopping_cost(final, early).mean()


def over_words(final, early):
    return stopping_cost(final, early) / final.shape[-1]


def cost_by_torch(final, early):
    p, q = final.log_softmax(-1), early.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def cost_in_numpy(final, early):
    import numpy as np

    p, q = (x.double().softmax(-1).numpy() for x in (final, early))
    return (p * np.log(p / q)).sum(-1)


@exercise(
    "4.4",
    title="What it costs to stop",
    difficulty=2,
    importance=5,
    minutes=5,
    stub=STUB_44,
    reference=stopping_cost,
    right=[cost_by_torch, cost_in_numpy],
    hints=[
        "`logits.log_softmax(-1)` gives log-probabilities; `.exp()` of them the probabilities.",
        "The weights are the final distribution's probabilities.",
    ],
    wrong=[
        (the_other_way, "swapped"),
        (cross_entropy, "cross-entropy"),
        (of_logits, "log_softmax"),
        (in_bits, "bits"),
        (over_tokens, "one number for each token"),
        (over_words, "Sum over the vocabulary"),
    ],
)
def check_44(answer) -> None:
    agree(
        answer,
        stopping_cost,
        lambda draw: (draw.normal("n", "pos", "vocab"), draw.normal("n", "pos", "vocab")),
        mistakes=[
            (the_other_way, "Lens and final are swapped: the weights are the final p."),
            (
                cross_entropy,
                "This is the cross-entropy, which is not 0 for a perfect lens: subtract the final "
                "distribution's own entropy.",
            ),
            (of_logits, "Logits differ from log-probabilities: use `log_softmax` first."),
            (in_bits, "These are bits: nats use the natural logarithm."),
            (over_tokens, "This is the mean: return one number for each token."),
            (over_words, "Sum over the vocabulary; there is nothing to average there."),
        ],
        otherwise="Σ p (log p - log q) over the last axis, p from the final logits.",
    )


# -- 4.5 -------------------------------------------------------------------------------------

STUB_45 = '''\
def tuning_step(model, A, b, h, final_logits, optimizer):
    """One step of training a tuned lens, by autograd. Returns the loss before the step.

    The lens reads h + A h + b in place of h. The loss is its mean stopping cost.
    A (d_model, d_model) and b (d_model,) require gradients, and `optimizer` moves them.
    h (n, d_model), the stream at one depth; final_logits (n, d_vocab), the model's own.
    """
    ...
'''


def tuning_step(model, A, b, h, final_logits, optimizer):
    """Translate, read, compare; old gradients away, backward, step."""
    loss = stopping_cost(final_logits, lens(model, h + h @ A.T + b)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def tuned_with(read, again=True, clear=True, move=True):
    """tuning_step with a mistake; read(model, A, b, h, final) gives the loss."""

    def step(model, A, b, h, final_logits, optimizer):
        loss = read(model, A, b, h, final_logits)
        if clear:
            optimizer.zero_grad()
        loss.backward()
        if move:
            optimizer.step()
        return loss.item() if again else read(model, A, b, h, final_logits).item()

    return step


def right_loss(model, A, b, h, final):
    return stopping_cost(final, lens(model, h + h @ A.T + b)).mean()


TRANSPOSED = tuned_with(
    lambda model, A, b, h, final: stopping_cost(final, lens(model, h + h @ A + b)).mean()
)
NO_SKIP = tuned_with(
    lambda model, A, b, h, final: stopping_cost(final, lens(model, h @ A.T + b)).mean()
)
NO_OFFSET = tuned_with(
    lambda model, A, b, h, final: stopping_cost(final, lens(model, h + h @ A.T + 0 * b)).mean()
)
BACKWARDS = tuned_with(
    lambda model, A, b, h, final: stopping_cost(lens(model, h + h @ A.T + b), final).mean()
)
SUMMED = tuned_with(
    lambda model, A, b, h, final: stopping_cost(final, lens(model, h + h @ A.T + b)).sum()
)
NOT_CLEARED, NOT_MOVED = tuned_with(right_loss, clear=False), tuned_with(right_loss, move=False)
AFTERWARDS = tuned_with(right_loss, again=False)


def own_optimizer(model, A, b, h, final_logits, optimizer):
    return tuning_step(model, A, b, h, final_logits, torch.optim.Adam([A, b], lr=1e-3))


def tuned_by_grad(model, A, b, h, final_logits, optimizer):
    """A right 4.5: torch's own KL, and gradients put where the optimizer looks."""
    read = model.unembed(h + torch.einsum("ij,nj->ni", A, h) + b).log_softmax(-1)
    p = final_logits.log_softmax(-1)
    loss = torch.nn.functional.kl_div(read, p, reduction="batchmean", log_target=True)
    A.grad, b.grad = torch.autograd.grad(loss, [A, b])
    optimizer.step()
    return loss


OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": functools.partial(torch.optim.Adam, eps=1e-4)}


def tuning_case(draw) -> tuple:
    """The model, A and b to begin with, batches (h, final logits), and how to make an optimizer."""
    model, batches = shipped_model(), []
    layer = draw.integer(0, model.n_layers - 1)
    for _ in range(3):
        sites = [("resid_pre", layer), "resid_final"]
        _, cache = model.run_with_cache(sentence(draw), sites)
        final = model.unembed(cache["resid_final"][0, 1:])
        batches.append((cache["resid_pre", layer][0, 1:], final))
    d = model.d_model
    A, b = draw.normal(d, d, scale=0.02), draw.normal(d, scale=0.5)
    kind, lr = OPTIMIZERS[draw.choice(OPTIMIZERS)], draw.number(0.002, 0.01)
    return model, A, b, batches, lambda parts: kind(parts, lr=lr)


def tuned_run(step, model, A, b, batches, made) -> tuple[list, torch.Tensor, torch.Tensor]:
    """What a step returns over some batches, and A and b after them, from a copy of both."""
    A, b = (each.clone().requires_grad_() for each in (A, b))
    optimizer = made([A, b])
    losses = [step(model, A, b, *batch, optimizer) for batch in batches]
    return losses, A.detach(), b.detach()


def equal_runs(one: tuple, other: tuple, losses: bool = True) -> bool:
    """Whether two runs moved A and b alike, and had the same losses if these count."""
    pairs = [(one[1], other[1], 2e-5), (one[2], other[2], 2e-5)]
    pairs += [(torch.tensor(one[0]), torch.tensor(other[0]), 1e-3)] if losses else []
    return all(torch.allclose(a, b, atol=atol, rtol=1e-3) for a, b, atol in pairs)


TUNING_MISTAKES = [
    (TRANSPOSED, "A is transposed: row i of h @ A.T is A h."),
    (NO_SKIP, "The stream itself is missing: h + A h + b, so that A = 0 is the logit lens."),
    (NO_OFFSET, "b is not used."),
    (BACKWARDS, "Lens and final are swapped in the loss: the weights are the final p."),
    (SUMMED, "This is the sum over the tokens: take the mean."),
    (NOT_CLEARED, "Gradients of all steps add up: call `optimizer.zero_grad()` before backward."),
    (AFTERWARDS, "Return the loss *before* the step."),
    (own_optimizer, "Use the optimizer that is given: a new one has no memory."),
]


@exercise(
    "4.5",
    title="Train the tuned lens",
    difficulty=3,
    importance=5,
    minutes=8,
    stub=STUB_45,
    reference=tuning_step,
    right=[tuned_by_grad],
    survivors=ONE_MODEL,
    copies=False,
    hints=[
        "Your `lens` and your `stopping_cost` give the loss; tokens are rows, so A h is h @ A.T.",
        "Autograd *adds* to what `A.grad` holds: `optimizer.zero_grad()` clears it.",
        "`loss.backward()` fills the gradients, `optimizer.step()` moves A and b.",
    ],
    wrong=[
        (TRANSPOSED, "transposed"),
        (NO_SKIP, "stream itself"),
        (NO_OFFSET, "b is not used"),
        (BACKWARDS, "swapped"),
        (SUMMED, "take the mean"),
        (NOT_CLEARED, "add up"),
        (NOT_MOVED, "did not move"),
        (AFTERWARDS, "*before* the step"),
        (own_optimizer, "optimizer that is given"),
        (lambda model, A, b, h, final_logits, optimizer: "done", "Return the loss"),
    ],
)
def check_45(answer) -> None:
    for draw in draws(3):
        case = tuning_case(draw)
        got, want = tuned_run(answer, *case), tuned_run(tuning_step, *case)
        try:
            got = as_numbers(got[0]).tolist(), *got[1:]
        except (TypeError, ValueError):
            raise Wrong(f"Return the loss, one number, not {describe(got[0][0])}.") from None
        expect_shape(got[0], (3,), "What three steps return, side by side,")
        expect(not torch.equal(got[1], case[1]), "A did not move: does the optimizer step?")
        if equal_runs(got, want):
            continue
        for mistake, message in TUNING_MISTAKES:
            expect(not equal_runs(got, tuned_run(mistake, *case)), message)
        raise Wrong("A, b or the loss come out otherwise: loss, zero_grad, backward, step.")


# -- 4.6 -------------------------------------------------------------------------------------

STUB_46 = '''\
def influence(read, h, v, mean):
    """How much a reader depends on one direction: the mean stopping cost of losing it, in nats.

    read  a function of the stream (batch, pos, d_model) that gives logits, such as a lens, or the
          rest of the model
    h     (batch, pos, d_model); v (d_model,), a direction of length 1
    mean  (d_model,), the mean stream: along v, each token gets the mean's part in place of its own

    The first token stays as it is, and does not count in the mean.
    """
    ...
'''


def influence(read, h, v, mean):
    """KL(read(h) ‖ read(h with its part along v replaced by the mean's))."""
    along = ((h - mean) @ v)[..., None] * v  # (batch, pos, d_model)
    along[:, 0] = 0
    return stopping_cost(read(h), read(h - along))[:, 1:].mean()


def lost(read, h, v, mean, part=None, count=1, cost=stopping_cost):
    """influence with another part taken out of the tokens from `count` on."""
    part = ((h - mean) @ v)[..., None] * v if part is None else part
    changed = torch.cat([h[:, :count], (h - part)[:, count:]], 1)
    return cost(read(h), read(changed))[:, 1:].mean()


def to_zero(read, h, v, mean):
    return lost(read, h, v, mean, (h @ v)[..., None] * v)


def first_too(read, h, v, mean):
    return lost(read, h, v, mean, count=0)


def counts_first(read, h, v, mean):
    changed = h - ((h - mean) @ v)[..., None] * v
    changed[:, 0] = h[:, 0]
    return stopping_cost(read(h), read(changed)).mean()


def all_but_v(read, h, v, mean):
    return lost(read, h, v, mean, (h - mean) - ((h - mean) @ v)[..., None] * v)


def everything(read, h, v, mean):
    return lost(read, h, v, mean, h - mean)


def swapped_readings(read, h, v, mean):
    return lost(read, h, v, mean, cost=lambda a, b: stopping_cost(b, a))


def own_mean(read, h, v, mean):
    return influence(read, h, v, h[:, 1:].mean((0, 1)))


def doubled(read, h, v, mean):
    return lost(read, h, v, mean, 2 * ((h - mean) @ v)[..., None] * v)


def influence_by_loops(read, h, v, mean):
    changed = h.clone()
    for row, token in itertools.product(range(h.shape[0]), range(1, h.shape[1])):
        changed[row, token] += (mean @ v - h[row, token] @ v) * v
    p, q = (read(x).double().softmax(-1) for x in (h, changed))
    return float((p * (p / q).log()).sum(-1)[:, 1:].mean())


def influence_case(draw) -> tuple:
    """A lens or the rest of the model, a stream at a drawn depth, and a direction that matters."""
    model = shipped_model()
    words, length = word_ids(model), draw.size("pos", 6)
    rows = words[draw.integers(0, len(words) - 1, draw.size("batch"), length)]
    ids = torch.cat([torch.full_like(rows[:, :1], model.tokenizer.bos_token_id), rows], 1)
    layer = draw.integer(1, model.n_layers - 1)
    h = model.run_with_cache(ids, [("resid_pre", layer)])[1]["resid_pre", layer]
    v, mean = h[0, 1] - h[0, 2], h[:, 1:].mean((0, 1)) + 0.5 * draw.normal(model.d_model)
    rest = functools.partial(model.run_from_layer, layer=layer)
    return draw.choice([rest, model.unembed]), h, v / v.norm(), mean


@exercise(
    "4.6",
    title="A direction taken away",
    difficulty=4,
    importance=4,
    minutes=8,
    stub=STUB_46,
    reference=influence,
    right=[influence_by_loops],
    hints=[
        "How far a token lies along v, measured from the mean: `(h - mean) @ v`, (batch, pos).",
        "Times v, that is what to take away: `[..., None] * v`. Set it to 0 at position 0.",
        "`stopping_cost(read(h), read(h - along))`, and the mean over positions 1 on.",
    ],
    wrong=[
        (to_zero, "mean's part"),
        (first_too, "first token changed"),
        (counts_first, "does not count"),
        (all_but_v, "but the part along v"),
        (everything, "whole stream"),
        (swapped_readings, "swapped"),
        (own_mean, "mean that is given"),
        (doubled, "twice as far"),
    ],
)
def check_46(answer) -> None:
    agree(
        answer,
        influence,
        influence_case,
        mistakes=[
            (to_zero, "This sets the part along v to zero: put the mean's part there."),
            (first_too, "The first token changed, too: leave it as it is."),
            (counts_first, "The first token does not count in the mean."),
            (all_but_v, "You took everything but the part along v."),
            (everything, "This replaces the whole stream: only its part along v should go."),
            (swapped_readings, "The two readings are swapped: the intact one has the weights."),
            (own_mean, "Use the mean that is given."),
            (doubled, "This goes twice as far: each token should end level with the mean."),
        ],
        otherwise="Take ((h - mean) · v) v away from every token but the first.",
        tolerance=1e-4,
    )


# -- 4.7 -------------------------------------------------------------------------------------

STUB_47 = '''\
def split_logit(model, text, token):
    """What each part wrote on a token's logit at the end of a text: (1 + 2 n_layers,).

    In this order: embedding, attention 0, MLP 0, attention 1, MLP 1, …
    The sites "embed", "attn_out", "mlp_out" and "resid_final" hold (batch, pos, d_model), the
    second and third with a layer axis before. The terms sum to the logit before the soft-cap.
    """
    ...
'''


def split_logit(model, text, token):
    """What the norm multiplies each number of the final stream by is frozen, for all parts."""
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"], pos=-1)
    blocks = torch.stack([cache["attn_out"], cache["mlp_out"]], 1)  # (n_layers, 2, 1, d_model)
    parts = torch.cat([cache["embed"], blocks.flatten(0, 2)])  # (1 + 2 n_layers, d_model)
    final = cache["resid_final"]
    frozen = model.ln_final(final) / final
    return parts * frozen @ model.W_U[:, token]


def with_parts(read):
    """A wrong answer: read(model, parts, final, column of W_U) gives the terms."""

    def split(model, text, token):
        sites = ["embed", "attn_out", "mlp_out", "resid_final"]
        _, cache = model.run_with_cache(text, sites, pos=-1)
        blocks = torch.stack([cache["attn_out"], cache["mlp_out"]], 1).flatten(0, 2)
        parts = torch.cat([cache["embed"], blocks])
        return read(model, parts, cache["resid_final"][0], model.W_U[:, token])

    return split


OWN_NORMS = with_parts(lambda m, parts, final, u: m.ln_final(parts) @ u)
NO_FROZEN = with_parts(lambda m, parts, final, u: parts @ u)
NO_GAIN = with_parts(lambda m, parts, final, u: parts @ u / final.pow(2).mean().sqrt())
EQUAL = with_parts(
    lambda m, parts, final, u: (m.ln_final(final) @ u / len(parts)).expand(len(parts))
)
RUNNING = with_parts(lambda m, parts, final, u: m.ln_final(parts.cumsum(0)) @ u)


def attention_first(model, text, token):
    terms = split_logit(model, text, token)
    return torch.cat([terms[:1], terms[1::2], terms[2::2]])


def whole_logit(model, text, token):
    return split_logit(model, text, token).sum()


def first_position(model, text, token):
    return split_logit(model, model.tokens(text)[:, :2], token)


def split_by_library(model, text, token):
    return direct_logit_attribution(model, text, token).terms[0]


def split_by_formula(model, text, token):
    sites = ["embed", "attn_out", "mlp_out", "resid_final"]
    _, cache = model.run_with_cache(text, sites)
    final = cache["resid_final"][0, -1].double()
    scale = 1 / (final.pow(2).mean() + 1e-6).sqrt()
    v = scale * (1 + model.ln_final.weight.double()) * model.W_U[:, token].double()
    terms = [cache["embed"][0, -1].double() @ v]
    for layer in range(model.n_layers):
        terms += [cache[s][layer, 0, -1].double() @ v for s in ("attn_out", "mlp_out")]
    return [float(term) for term in terms]


def text_and_token(draw) -> tuple:
    text = sentence(draw)
    return shipped_model(), text, draw.choice(word_ids(shipped_model()).tolist())


@exercise(
    "4.7",
    title="Splitting a logit",
    difficulty=3,
    importance=5,
    minutes=7,
    stub=STUB_47,
    reference=split_logit,
    right=[split_by_library, split_by_formula],
    survivors=ONE_MODEL,
    hints=[
        "`model.run_with_cache(text, sites, pos=-1)`; then stack what was written, in order.",
        "The final norm multiplies each number of the stream by something. What is it *here*? "
        "`model.ln_final(final) / final`. Hold it fixed for all parts.",
        "`parts * frozen @ model.W_U[:, token]`",
    ],
    wrong=[
        (OWN_NORMS, "by itself"),
        (NO_FROZEN, "final norm is missing"),
        (NO_GAIN, "gain"),
        (EQUAL, "equally"),
        (RUNNING, "depth"),
        (attention_first, "in another order"),
        (whole_logit, "whole logit"),
        (first_position, "end of the text"),
    ],
)
def check_47(answer) -> None:
    agree(
        answer,
        split_logit,
        text_and_token,
        mistakes=[
            (OWN_NORMS, "Each part is normed by itself: freeze what the norm does to the stream."),
            (NO_FROZEN, "The final norm is missing: freeze it, and multiply each part by it."),
            (NO_GAIN, "The norm's gain is missing, which differs from number to number."),
            (EQUAL, "The sum is right, but it is shared out equally."),
            (RUNNING, "These are logits of the stream at each depth: give each part's own term."),
            (attention_first, "The terms stand in another order: attention 0, MLP 0, attention 1…"),
            (whole_logit, "This is the whole logit: return one term for each part."),
            (first_position, "Read at the end of the text: `pos=-1`."),
        ],
        otherwise="The terms should be parts * (norm(final) / final) @ W_U[:, token].",
        tolerance=1e-4,
        cases=3,
    )


# -- 4.8 -------------------------------------------------------------------------------------

STUB_48 = '''\
def head_terms(z, W_O, w_post, v):
    """What each head of a Gemma 2 layer writes along v: (n_heads,).

    z       (n_heads, d_head), W_O (n_heads, d_head, d_model): head h gives z[h] @ W_O[h]
    w_post  (d_model,): the norm after attention divides the *sum* of the heads by its root mean
            square, √(mean of the squares), and multiplies by 1 + w_post
    v       (d_model,): a vector in the stream adds its product with v to the logit
    """
    ...
'''


def head_terms(z, W_O, w_post, v):
    """The post-norm, frozen at what it does to the sum."""
    heads = torch.einsum("hi,hid->hd", z, W_O)
    rms = heads.sum(0).pow(2).mean().sqrt()
    return heads / rms * (1 + w_post) @ v


def no_post_norm(z, W_O, w_post, v):
    return torch.einsum("hi,hid->hd", z, W_O) @ v


def each_head_normed(z, W_O, w_post, v):
    heads = torch.einsum("hi,hid->hd", z, W_O)
    return heads / heads.pow(2).mean(-1, keepdim=True).sqrt() * (1 + w_post) @ v


def post_scale_only(z, W_O, w_post, v):
    return head_terms(z, W_O, 0 * w_post, v)


def post_gain_only(z, W_O, w_post, v):
    return torch.einsum("hi,hid->hd", z, W_O) * (1 + w_post) @ v


def gain_is_w(z, W_O, w_post, v):
    return head_terms(z, W_O, w_post - 1, v)


def heads_summed(z, W_O, w_post, v):
    return head_terms(z, W_O, w_post, v).sum()


def heads_one_by_one(z, W_O, w_post, v):
    import numpy as np

    z, W_O, w_post, v = (x.double().numpy() for x in (z, W_O, w_post, v))
    heads = [z[h] @ W_O[h] for h in range(len(z))]
    total = sum(heads)
    return [float(head / np.sqrt((total**2).mean()) * (1 + w_post) @ v) for head in heads]


@exercise(
    "4.8",
    title="A head, through the norm after attention",
    difficulty=3,
    importance=4,
    minutes=6,
    stub=STUB_48,
    reference=head_terms,
    right=[heads_one_by_one],
    hints=[
        '`torch.einsum("hi,hid->hd", z, W_O)` gives each head\'s vector, (n_heads, d_model).',
        "There is one root mean square: that of the sum over the heads.",
    ],
    wrong=[
        (no_post_norm, "left out"),
        (each_head_normed, "one norm"),
        (post_scale_only, "gain 1 + w_post"),
        (post_gain_only, "division"),
        (gain_is_w, "not w_post"),
        (heads_summed, "one term for each head"),
    ],
)
def check_48(answer) -> None:
    agree(
        answer,
        head_terms,
        lambda draw: (
            draw.normal("heads", "d_head"),
            draw.normal("heads", "d_head", "d_model"),
            draw.normal("d_model"),
            draw.normal("d_model"),
        ),
        mistakes=[
            (
                no_post_norm,
                "The norm after attention is left out, as in common tools: the terms do not add up "
                "to what attention writes.",
            ),
            (
                each_head_normed,
                "Each head has its own norm here: there is one norm, on the sum.",
            ),
            (post_scale_only, "The norm's gain 1 + w_post is missing."),
            (post_gain_only, "The gain is there, the division by the root mean square is missing."),
            (gain_is_w, "The gain is 1 + w_post, not w_post."),
            (heads_summed, "This is the sum: return one term for each head."),
        ],
        otherwise="Freeze the scale that the norm has on the heads' sum.",
        tolerance=1e-4,
    )


# -- 4.9 -------------------------------------------------------------------------------------

STUB_49 = '''\
def apart(terms, answer, rival):
    """What each part writes for the answer, and what it writes for the rival: two of (parts,).

    terms          (n, parts, names), what a part writes on the logit of each name, in n prompts
    answer, rival  (n,), the place of each among the names

    Both are measured from the mean of all *other* names, and averaged over the prompts.
    """
    ...
'''


def apart(terms, answer, rival):
    """What a part writes on all names alike changes no probability, so it is taken away."""
    rows = torch.arange(len(terms))
    right, wrong = terms[rows, :, answer], terms[rows, :, rival]  # (n, parts)
    others = (terms.sum(-1) - right - wrong) / (terms.shape[-1] - 2)
    return (right - others).mean(0), (wrong - others).mean(0)


def logits_alone(terms, answer, rival):
    rows = torch.arange(len(terms))
    return terms[rows, :, answer].mean(0), terms[rows, :, rival].mean(0)


def from_all_names(terms, answer, rival):
    rows, mean = torch.arange(len(terms)), terms.mean(-1)
    return (terms[rows, :, answer] - mean).mean(0), (terms[rows, :, rival] - mean).mean(0)


def as_difference(terms, answer, rival):
    right, wrong = apart(terms, answer, rival)
    return right - wrong, wrong - right


def rival_first(terms, answer, rival):
    return apart(terms, answer, rival)[::-1]


def per_prompt(terms, answer, rival):
    rows = torch.arange(len(terms))
    right, wrong = terms[rows, :, answer], terms[rows, :, rival]
    others = (terms.sum(-1) - right - wrong) / (terms.shape[-1] - 2)
    return right - others, wrong - others


def same_for_all(terms, answer, rival):
    return apart(terms, answer[:1].expand(len(terms)), rival[:1].expand(len(terms)))


def apart_by_loops(terms, answer, rival):
    found = []
    for own in (answer, rival):
        each = []
        for i, (a, r) in enumerate(zip(answer.tolist(), rival.tolist(), strict=True)):
            rest = [k for k in range(terms.shape[2]) if k not in (a, r)]
            each.append(terms[i, :, int(own[i])] - terms[i][:, rest].mean(1))
        found.append(torch.stack(each).mean(0))
    return found


def terms_case(draw) -> tuple:
    terms = draw.normal("n", "parts", "names") + 3 * draw.normal("n", "parts", 1)
    names = draw.size("names")
    answer = draw.integers(0, names - 1, "n")
    return terms, answer, (answer + draw.integers(1, names - 1, "n")) % names


@exercise(
    "4.9",
    title="The answer and its rival, apart",
    difficulty=3,
    importance=4,
    minutes=6,
    stub=STUB_49,
    reference=apart,
    right=[apart_by_loops],
    hints=[
        "`terms[torch.arange(n), :, answer]` is (n, parts): each prompt's own answer.",
        "The others' mean: the sum over all names, less these two, over two names fewer.",
    ],
    wrong=[
        (logits_alone, "all names alike"),
        (from_all_names, "among the others"),
        (as_difference, "difference of the two"),
        (rival_first, "The answer comes first"),
        (per_prompt, "over the prompts"),
        (same_for_all, "its own answer"),
    ],
    after="That was the last exercise of the main path. The investigation is waiting.",
)
def check_49(answer) -> None:
    agree(
        answer,
        apart,
        terms_case,
        mistakes=[
            (
                logits_alone,
                "What a part writes on all names alike is still in there: subtract the mean of "
                "the other names.",
            ),
            (from_all_names, "Answer and rival themselves are among the others: leave them out."),
            (as_difference, "This is the difference of the two: keep them apart."),
            (rival_first, "The answer comes first, the rival second."),
            (per_prompt, "Average over the prompts."),
            (same_for_all, "Each prompt has its own answer and its own rival."),
        ],
        otherwise="(answer's terms - others' mean), and the same for the rival; then the mean.",
        tolerance=1e-4,
    )


# -- 4.10, going further ---------------------------------------------------------------------

STUB_410 = '''\
def split_logit_layernorm(parts, gain, bias, u):
    """A logit under GPT-2's LayerNorm: the terms of the parts (n_parts,), and the bias's term.

    LayerNorm(x) = (x - mean(x)) / std(x) * gain + bias, with the mean and the standard deviation
    over the d_model numbers (dividing by d_model).
    parts (n_parts, d_model); gain, bias and u (d_model,), u the token's column of W_U
    """
    ...
'''


def split_logit_layernorm(parts, gain, bias, u):
    """Each part is centred by itself, as the mean of a sum is the sum of the means."""
    centred = parts - parts.mean(-1, keepdim=True)
    rms = centred.sum(0).pow(2).mean().sqrt()
    return centred / rms @ (gain * u), bias @ u


def not_centred(parts, gain, bias, u):
    return parts / parts.sum(0).std(correction=0) @ (gain * u), bias @ u


def rms_scale(parts, gain, bias, u):
    scale = 1 / parts.sum(0).pow(2).mean().sqrt()
    return (parts - parts.mean(-1, keepdim=True)) @ (gain * u) * scale, bias @ u


def bias_shared(parts, gain, bias, u):
    terms, constant = split_logit_layernorm(parts, gain, bias, u)
    return terms + constant / len(terms), 0 * constant


def bias_each(parts, gain, bias, u):
    terms, constant = split_logit_layernorm(parts, gain, bias, u)
    return terms + constant, constant


def unbiased(parts, gain, bias, u):
    centred = parts - parts.mean(-1, keepdim=True)
    return centred / centred.sum(0).std(correction=1) @ (gain * u), bias @ u


def centred_over_parts(parts, gain, bias, u):
    scale = 1 / parts.sum(0).std(correction=0)
    return (parts - parts.mean(0)) @ (gain * u) * scale, bias @ u


def layernorm_by_torch(parts, gain, bias, u):
    """The difference that a part makes with the scale frozen: linear in the part."""
    scale = 1 / parts.sum(0).std(correction=0)
    return [float(((x - x.mean()) * gain * scale) @ u) for x in parts], float(bias @ u)


@exercise(
    "4.10",
    title="The same for GPT-2 (going further)",
    difficulty=4,
    importance=2,
    minutes=10,
    stub=STUB_410,
    reference=split_logit_layernorm,
    right=[layernorm_by_torch],
    hints=[
        "The mean of a sum is the sum of the means, so each part can be centred by itself.",
        "The standard deviation is that of the whole stream, and the bias is a term of its own.",
    ],
    wrong=[
        (not_centred, "not taken away"),
        (rms_scale, "standard deviation of the stream"),
        (bias_shared, "none of them wrote it"),
        (bias_each, "comes once"),
        (unbiased, "d_model - 1"),
        (centred_over_parts, "over the d_model numbers"),
        (lambda *given: split_logit_layernorm(*given)[0], "Return 2 things"),
    ],
)
def check_410(answer) -> None:
    agree(
        answer,
        split_logit_layernorm,
        lambda draw: (
            draw.normal("parts", "d_model"),
            draw.normal("d_model"),
            draw.normal("d_model"),
            draw.normal("d_model"),
        ),
        mistakes=[
            (not_centred, "The mean is not taken away: centre each part."),
            (
                rms_scale,
                "This is a root mean square: use the standard deviation of the stream.",
            ),
            (bias_shared, "The bias is shared out among the parts: none of them wrote it."),
            (bias_each, "The bias is added to every part: it comes once, as a term of its own."),
            (unbiased, "This divides by d_model - 1: LayerNorm divides by d_model."),
            (centred_over_parts, "Centre each part over the d_model numbers, not over the parts."),
        ],
        otherwise="Centre each part; parts @ (gain * u) / standard deviation; bias @ u.",
        tolerance=1e-4,
    )


# -- predictions -----------------------------------------------------------------------------

FIRST = ["brackets", "facts", "ioi", "repetition"]


@prediction("4.11", question="Whose answers settle first, on average?", options=FIRST)
def settles_first() -> str:
    depths = {family: lab.settling(shipped_model(), family) for family in FIRST}
    return min(depths, key=lambda family: float(depths[family].double().mean()))


COSTS = ["less than a uniform guess", "about as much", "more than a uniform guess"]


@prediction("4.12", question="Stopping at the embedding costs…", options=COSTS)
def cost_at_the_embedding() -> str:
    found = read_out(shipped_model(), lab.world_stream(shipped_model(), 500, 1, lab.HELD))
    ratio = float(found.kl[0].mean() / lab.uniform_cost(shipped_model(), found))
    return COSTS[0 if ratio < 0.8 else 1 if ratio < 1.25 else 2]


MOVED = ["more than the lens", "about as much", "less than half as much"]


@prediction("4.13", question="Without those directions, the model's answer moves…", options=MOVED)
def model_against_lens() -> str:
    ratio = causal.model_over_lens(shipped_model(), quick_lens(), k=4)
    return MOVED[0 if ratio > 1.25 else 1 if ratio > 0.5 else 2]


@functools.cache
def quick_lens() -> TunedLens:
    """A tuned lens of tiny-gemma, trained for a few seconds."""
    stream = lab.world_stream(shipped_model(), 2_000)
    return train_tuned_lens(shipped_model(), stream, steps=40, size=128)[0]


HOW = ["it raises the receiver", "it lowers the giver", "both"]


@prediction("4.14", question="The head that favours the receiver most: how?", options=HOW)
def how_the_best_head_favours() -> str:
    _, receiver, giver = lab.best_head_apart(shipped_model(), apart)
    share = receiver / (receiver - giver)
    return HOW[0 if share > 2 / 3 else 1 if share < 1 / 3 else 2]


# -- the investigation -----------------------------------------------------------------------

KINDS = ("fact", "copy")


@functools.cache
def judges() -> tuple:
    """Fresh prompts of both kinds, and the activations whose mean stands in for a part."""
    return lab.twins(shipped_model(), 24, 50_000), token_pool(shipped_model())


@functools.cache
def parts() -> list:
    """Every part of the model: heads, attention blocks and MLPs."""
    model = shipped_model()
    layers = range(model.n_layers)
    heads = list(itertools.product(layers, range(model.n_heads)))
    return heads + [("attn", i) for i in layers] + [("mlp", i) for i in layers]


@functools.cache
def share_lost(part: tuple, kind: str) -> float:
    """What a part's mean lesion costs one kind of prompt, as a share of three nats, 0 to 1."""
    both, reference = judges()
    nats = lab.harm(shipped_model(), getattr(both, kind), part, reference)
    return min(max(nats / 3, 0.0), 1.0)


def decides(part: tuple, kind: str) -> float:
    """Own answer lost, times the other's kept: 0 to 1."""
    other = KINDS[1 - KINDS.index(kind)]
    return share_lost(part, kind) * (1 - share_lost(part, other))


def best_parts() -> tuple:
    """For each kind the part that decides most, out of all."""
    return tuple(max(parts(), key=lambda part: decides(part, kind)) for kind in KINDS)


@investigation(
    "4",
    title="One answer, two routes",
    form='two parts, for the fact and for the copy, such as ((2, 1), ("mlp", 0))',
    chance=lambda rng: (rng.choice(parts()), rng.choice(parts())),
    best=best_parts,
    good=lambda: (best_parts()[1], best_parts()[1]),
    foolish=["L2H1", (2, 1), ((2, 1),), ((2, 1), (99, 0)), ((2, 1), ("neuron", 3)), [[1], [2]]],
)
def score_routes(answer) -> float:
    """The mean over both prompts of: its answer lost, times the other's answer kept."""
    given = plain(answer)
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], tuple):
        raise Wrong(f'Give two parts, ((2, 1), ("mlp", 0)), not {describe(answer)}.')
    chosen = [one_of(part, parts(), "parts") for part in given]
    return sum(decides(part, kind) for part, kind in zip(chosen, KINDS, strict=True)) / 2
