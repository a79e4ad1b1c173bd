"""Exercises of lesson 04: the logit lens."""

import functools
import itertools
from collections.abc import Callable

import torch

from mi_helpers.attribution import direct_logit_attribution
from mi_helpers.course.answers import is_numeric
from mi_helpers.course.check import Wrong, agree, as_numbers, describe, edited, edits, exercise
from mi_helpers.course.investigate import investigation, one_of, plain
from mi_helpers.course.predict import prediction
from mi_helpers.lens import TunedLens, read_out, settled_depth, train_tuned_lens
from mi_helpers.lessons.lesson_04 import causal
from mi_helpers.lessons.lesson_04 import experiments as lab
from mi_helpers.lessons.shared import on_model, shipped_model, token_pool, word_ids
from mi_helpers.tinyworld.world import World

SHORT = ("facts", "two_hop", "ioi", "agreement", "truth")  # families of short sentences
ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def sentence(draw, longest: int = 24) -> str:
    """The beginning of a TinyWorld document of a few words."""
    family, seed = draw.choice(SHORT), draw.integer(0, 10_000)
    words = next(iter(World().documents(seed, family))).text.split()
    return " ".join(words[: min(len(words) - 1, longest)])


# -- 4.1 -------------------------------------------------------------------------------------


def lens(model, h):
    """The logits of a model that would stop at the stream h: (..., d_model) to (..., d_vocab).

    model.ln_final  the final norm, a function of the stream
    model.W_U       (d_model, d_vocab), the unembedding
    model.softcap   30 in Gemma 2: a logit y becomes 30 · tanh(y / 30); None where there is no cap
    """
    logits = model.ln_final(h) @ model.W_U
    cap = model.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def whole_norm(model, h):
    normed = h / h.pow(2).mean().sqrt() * (1 + model.ln_final.weight)
    return model.softcap * torch.tanh(normed @ model.W_U / model.softcap)


def lens_in_numpy(model, h):
    import numpy as np

    x, w = h.double().numpy(), model.ln_final.weight.detach().double().numpy()
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + w)
    return 30 * np.tanh(normed @ model.W_U.detach().double().numpy() / 30)


MISTAKES_41 = [
    *edits(
        lens,
        """
        model.ln_final(h) → h
            The stream is not normalised: `model.ln_final` comes first.
        cap is None → True
            The soft-cap is missing: the order is right, the probabilities are not.
        cap * torch.tanh(logits / cap) → logits.clamp(-cap, cap)
            This cuts hard at the cap: use tanh, which bends.
        @ model.W_U → @ model.W_U * model.d_model**0.5
            Gemma multiplies by √d_model on its way in, not on its way out: W_U as it is.
        """,
    ),
    (lambda *given: lens(*given).softmax(-1), "These are probabilities: return logits."),
    (whole_norm, "All tokens share one norm: each token has its own, over the last axis."),
]


@exercise(
    "4.1",
    title="The lens",
    difficulty=1,
    importance=5,
    minutes=4,
    reference=lens,
    right=[lambda model, h: model.unembed(h), lens_in_numpy],
    survivors=ONE_MODEL,
    wrong=MISTAKES_41,
    hints=[
        "Three steps, in the order of the formula: norm, unembedding, soft-cap.",
        "`model.ln_final(h) @ model.W_U`, then `cap * torch.tanh(logits / cap)`.",
    ],
)
def check_41(answer) -> None:
    def stream(draw) -> tuple:
        """The embedding, whose logits go beyond the cap, and a later depth: (2, pos, d_model)."""
        model = shipped_model()
        keys = [("resid_pre", layer) for layer in (0, draw.integer(1, model.n_layers - 1))]
        _, cache = model.run_with_cache(sentence(draw), keys)
        return model, torch.cat([cache[key] for key in keys])

    otherwise = "Norm, then W_U, then cap · tanh(logits / cap)."
    on_model(answer, lens, stream, MISTAKES_41, otherwise)


# -- 4.2 -------------------------------------------------------------------------------------


def rank_of(logits, target):
    """At each depth, the rank of each prompt's target, 1 for the highest logit: (depths, n).

    logits  (depths, n, d_vocab)
    target  (n,), the id of the token that is followed in each prompt
    """
    own = logits.gather(-1, target.expand(logits.shape[:-1])[..., None])  # (depths, n, 1)
    return (logits > own).sum(-1) + 1


def which_token(logits, target):
    order = logits.argsort(-1, descending=True)
    return order.gather(-1, target.expand(logits.shape[:-1])[..., None])[..., 0] + 1


def rank_by_sorting(logits, target):
    place = logits.argsort(-1, descending=True).argsort(-1)
    return place[:, torch.arange(len(target)), target] + 1


def rank_in_python(logits, target):
    return [
        [1 + sum(x > row[t] for x in row) for row, t in zip(depth, target.tolist(), strict=True)]
        for depth in logits.tolist()
    ]


MISTAKES_42 = [
    *edits(
        rank_of,
        """
        .sum(-1) + 1 → .sum(-1)
            The best token has rank 1, not 0.
        > → <
            The order is turned round: the highest logit has rank 1.
        target.expand → target[:1].expand
            Each prompt has its own target.
        logits > own → logits[-1:] > own[-1:]
        & + 1 → + 1 + torch.zeros_like(own[..., 0])
            These are the ranks at the last depth: count at each depth.
        """,
    ),
    (
        which_token,
        "`argsort` at the target's place says which token has that rank. You are asked for the "
        "rank of the token.",
    ),
]


@exercise(
    "4.2",
    title="The rank of a token",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=rank_of,
    right=[rank_by_sorting, rank_in_python],
    wrong=MISTAKES_42,
    hints=[
        "A rank is a count: how many tokens have a higher logit?",
        "First the target's own logit, (depths, n, 1): `logits[:, torch.arange(n), target]` picks "
        "it, and `[..., None]` keeps an axis to compare along.",
    ],
)
def check_42(answer) -> None:
    def case(draw) -> tuple:
        logits = draw.normal("depths", "n", "vocab")
        return logits, draw.integers(0, draw.size("vocab") - 1, "n")

    otherwise = "Count, at each depth and prompt, the tokens whose logit is higher."
    agree(answer, rank_of, case, MISTAKES_42, otherwise)


# -- 4.3 -------------------------------------------------------------------------------------


def settled(ranks):
    """The first depth from which a prompt's target keeps rank 1 up to the last depth: (n,).

    ranks  (depths, n). Where the target is not first at the last depth: the number of depths.
    """
    first = (ranks == 1).int()
    kept = first.flip(0).cumprod(0).sum(0)  # (n,)
    return len(ranks) - kept


def first_time(ranks):
    first = (ranks == 1).int()
    return torch.where(first.any(0), first.argmax(0), len(ranks))


def settled_by_walking(ranks):
    found = []
    for column in zip(*ranks.tolist(), strict=True):
        depth = len(column)
        while depth and column[depth - 1] == 1:
            depth -= 1
        found.append(depth)
    return found


MISTAKES_43 = [
    (first_time, "This is the first time at rank 1: it may be lost again."),
    *edits(
        settled,
        """
        len(ranks) - kept → (len(ranks) - kept - 1).clamp(0)
            One too early: the depth before the last run has another rank.
        len(ranks) - kept → kept
            This is for how many depths it stays: return where that begins.
        .flip(0).cumprod(0) →
            Only the last run counts, not every depth with rank 1.
        - kept → - kept + 1
            Depths count from 0.
        len(ranks) - kept → (len(ranks) - kept).clamp(max=len(ranks) - 1)
            What is not first at the end never settles: return the number of depths.
        """,
    ),
]


@exercise(
    "4.3",
    title="Where an answer settles",
    difficulty=2,
    importance=3,
    minutes=5,
    reference=settled,
    right=[settled_by_walking, lambda ranks: settled_depth(ranks)],
    wrong=MISTAKES_43,
    hints=[
        "Walk back from the last depth while the rank is 1.",
        "`(ranks == 1).int().flip(0).cumprod(0)` is 1 while the lead lasts, seen from the end.",
    ],
)
def check_43(answer) -> None:
    def some_ranks(draw) -> tuple:
        """Some lead, lose the lead and get it back; the first leads always, the second never."""
        first = draw.booleans("depths", "n", share=0.6)
        ranks = torch.where(first, 1, draw.integers(2, 40, "depths", "n"))
        ranks[:, 0], ranks[-1, 1], ranks[:, 2] = 1, 7, 1
        ranks[1, 2] = 5
        return (ranks,)

    agree(answer, settled, some_ranks, MISTAKES_43, "Go back from the end while the rank is 1.")


# -- 4.4 -------------------------------------------------------------------------------------


def stopping_cost(final_logits, lens_logits):
    """What it costs to stop early: KL(final ‖ lens) of each token, in nats, (...).

    Both are logits (..., d_vocab). KL(p ‖ q) = Σ p (log p - log q), over the vocabulary.
    """
    p, q = final_logits.log_softmax(-1), lens_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def cost_by_torch(final, early):
    p, q = final.log_softmax(-1), early.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def cost_in_numpy(final, early):
    import numpy as np

    p, q = (x.double().softmax(-1).numpy() for x in (final, early))
    return (p * np.log(p / q)).sum(-1)


cross_entropy = edited(stopping_cost, "(p - q)", "-q")
MISTAKES_44 = edits(
    stopping_cost,
    """
    p, q = → q, p =
        Lens and final are swapped: the weights are the final p.
    (p - q) → -q
        This is the cross-entropy, which is not 0 for a perfect lens: subtract the final
        distribution's own entropy.
    (p - q) → (final_logits - lens_logits)
        Logits differ from log-probabilities: use `log_softmax` first.
    .sum(-1) → .sum(-1) / 0.6931472
        These are bits: nats use the natural logarithm.
    .sum(-1) → .sum(-1).mean()
        This is the mean: return one number for each token.
    .sum(-1) → .mean(-1)
        Sum over the vocabulary: there is nothing to average there.
    """,
)


@exercise(
    "4.4",
    title="What it costs to stop",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=stopping_cost,
    right=[cost_by_torch, cost_in_numpy],
    wrong=MISTAKES_44,
    hints=[
        "`logits.log_softmax(-1)` gives log-probabilities; `.exp()` of them the probabilities.",
        "The weights are the final distribution's probabilities.",
    ],
)
def check_44(answer) -> None:
    def two_logits(draw) -> tuple:
        return draw.normal("n", "pos", "vocab"), draw.normal("n", "pos", "vocab")

    otherwise = "Σ p (log p - log q) over the last axis, p from the final logits."
    agree(answer, stopping_cost, two_logits, MISTAKES_44, otherwise)


# -- 4.5 -------------------------------------------------------------------------------------


def tuning_step(model, A, b, h, final_logits, optimizer):
    """One step of training a tuned lens, by autograd. Returns the loss before the step.

    The lens reads h + A h + b in place of h. The loss is its mean stopping cost.
    A (d_model, d_model) and b (d_model,) require gradients, and `optimizer` moves them.
    h (n, d_model), the stream at one depth; final_logits (n, d_vocab), the model's own.
    """
    loss = stopping_cost(final_logits, lens(model, h + h @ A.T + b)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def tuned_by_grad(model, A, b, h, final_logits, optimizer):
    """Torch's own KL, and gradients put where the optimizer looks."""
    read = model.unembed(h + torch.einsum("ij,nj->ni", A, h) + b).log_softmax(-1)
    p = final_logits.log_softmax(-1)
    loss = torch.nn.functional.kl_div(read, p, reduction="batchmean", log_target=True)
    A.grad, b.grad = torch.autograd.grad(loss, [A, b])
    optimizer.step()
    return loss


MISTAKES_45 = edits(
    tuning_step,
    """
    A.T → A
        A is transposed: row i of h @ A.T is A h.
    h + h @ → h @
        The stream itself is missing: h + A h + b, so that A = 0 is the logit lens.
    A.T + b → A.T + 0 * b
        b is not used.
    (final_logits, lens(model, h + h @ A.T + b)) → (lens(model, h + h @ A.T + b), final_logits)
        Lens and final are swapped in the loss: the weights are the final p.
    stopping_cost → cross_entropy
        This is the cross-entropy: it moves A and b alike, but the loss is not the stopping
        cost.
    .mean() → .sum()
        This is the sum over the tokens: take the mean.
    optimizer.zero_grad() → pass
        Gradients of all steps add up: call `optimizer.zero_grad()` before backward.
    return → loss = stopping_cost(final_logits, lens(model, h + h @ A.T + b)).mean(); return
        Return the loss *before* the step.
    optimizer.step() → torch.optim.Adam([A, b], lr=1e-3).step()
        Use the optimizer that is given: a new one has no memory.
    optimizer.step() → pass
        A and b did not move: does the optimizer step?
    """,
)
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": functools.partial(torch.optim.Adam, eps=1e-4)}


def tuning_case(draw) -> tuple:
    """The model, A and b to begin with, batches (h, final logits), and how to make an optimizer."""
    model, batches = shipped_model(), []
    layer, d = draw.integer(0, model.n_layers - 1), model.d_model
    for _ in range(3):
        _, cache = model.run_with_cache(sentence(draw), [("resid_pre", layer), "resid_final"])
        final = model.unembed(cache["resid_final"][0, 1:])
        batches.append((cache["resid_pre", layer][0, 1:], final))
    A, b = draw.normal(d, d, scale=0.02), draw.normal(d, scale=0.5)
    kind, lr = OPTIMIZERS[draw.choice(OPTIMIZERS)], draw.number(0.002, 0.01)
    return model, A, b, batches, lambda parts: kind(parts, lr=lr)


def three_steps(step) -> Callable:
    """A function of a case: what a step returns over its batches, and how far A and b went."""

    def run(model, A, b, batches, made) -> tuple:
        own = [each.clone().requires_grad_() for each in (A, b)]
        optimizer, losses = made(own), []
        for batch in batches:
            losses.append(step(model, *own, *batch, optimizer))
            if not is_numeric(losses[-1]):
                raise Wrong(f"Return the loss, one number, not {describe(losses[-1])}.")
        moved = [5 * (each.detach() - before) for each, before in zip(own, (A, b), strict=True)]
        return as_numbers(losses), *moved  # five times: of A and b a smaller error counts

    return run


@exercise(
    "4.5",
    title="Train the tuned lens",
    difficulty=3,
    importance=5,
    minutes=8,
    reference=tuning_step,
    right=[tuned_by_grad],
    survivors=ONE_MODEL,
    copies=False,
    wrong=[*MISTAKES_45, (lambda *given: "done", "Return the loss")],
    hints=[
        "Your `lens` and your `stopping_cost` give the loss; tokens are rows, so A h is h @ A.T.",
        "Autograd *adds* to what `A.grad` holds: `optimizer.zero_grad()` clears it.",
        "`loss.backward()` fills the gradients, `optimizer.step()` moves A and b.",
    ],
)
def check_45(answer) -> None:
    mistakes = [(three_steps(step), message) for step, message in MISTAKES_45]
    otherwise = "A, b or the loss come out otherwise: loss, zero_grad, backward, step."
    on_model(three_steps(answer), three_steps(tuning_step), tuning_case, mistakes, otherwise)


# -- 4.6 -------------------------------------------------------------------------------------


def influence(read, h, v, mean):
    """How much a reader depends on one direction: the mean stopping cost of losing it, in nats.

    read  a function of the stream (batch, pos, d_model) that gives logits, such as a lens, or the
          rest of the model
    h     (batch, pos, d_model); v (d_model,), a direction of length 1
    mean  (d_model,), the mean stream: along v, each token gets the mean's part in place of its own

    The first token stays as it is, and does not count in the mean.
    """
    along = ((h - mean) @ v)[..., None] * v  # (batch, pos, d_model)
    along[:, 0] = 0
    return stopping_cost(read(h), read(h - along))[:, 1:].mean()


def influence_by_loops(read, h, v, mean):
    changed = h.clone()
    for row, token in itertools.product(range(h.shape[0]), range(1, h.shape[1])):
        changed[row, token] += (mean @ v - h[row, token] @ v) * v
    p, q = (read(x).double().softmax(-1) for x in (h, changed))
    return float((p * (p / q).log()).sum(-1)[:, 1:].mean())


MISTAKES_46 = edits(
    influence,
    """
    (h - mean) @ v → h @ v
        This sets the part along v to zero: put the mean's part there.
    along[:, 0] = 0 → pass
        The first token changed, too: leave it as it is.
    [:, 1:] →
        The first token does not count in the mean.
    along[:, 0] = → along = h - mean - along; along[:, 0] =
        You took everything but the part along v.
    ((h - mean) @ v)[..., None] * v → h - mean
        This replaces the whole stream: only its part along v should go.
    (read(h), read(h - along)) → (read(h - along), read(h))
        The two readings are swapped: the intact one has the weights.
    h - mean → h - h[:, 1:].mean((0, 1))
        Use the mean that is given.
    read(h - along) → read(h - 2 * along)
        This goes twice as far: each token should end level with the mean.
    read(h - along) → read(h)
        Nothing is lost: did you change h itself, before the intact stream was read?
    """,
)


def influence_case(draw) -> tuple:
    """A lens or the rest of the model, a stream at a drawn depth, and a direction that matters."""
    model = shipped_model()
    words, length = word_ids(model), draw.size("pos", 4, 7)
    rows = words[draw.integers(0, len(words) - 1, draw.size("batch", 2, 4), length)]
    ids = torch.cat([torch.full_like(rows[:, :1], model.tokenizer.bos_token_id), rows], 1)
    layer = draw.integer(1, model.n_layers - 1)
    h = model.run_with_cache(ids, [("resid_pre", layer)])[1]["resid_pre", layer]
    v = (h[0, 1] - h[0, 2]) / (h[0, 1] - h[0, 2]).norm()
    far = draw.number(0.5, 1.0) * h[0, 1].norm()  # a small change would look like none
    mean = h[:, 1:].mean((0, 1)) + far * v + 0.1 * draw.normal(model.d_model)
    rest = functools.partial(model.run_from_layer, layer=layer)
    return draw.choice([rest, model.unembed]), h, v, mean


@exercise(
    "4.6",
    title="A direction taken away",
    difficulty=4,
    importance=4,
    minutes=8,
    reference=influence,
    right=[influence_by_loops],
    wrong=MISTAKES_46,
    hints=[
        "How far a token lies along v, measured from the mean: `(h - mean) @ v`, (batch, pos).",
        "Times v, that is what to take away: `[..., None] * v`. Set it to 0 at position 0.",
        "`stopping_cost(read(h), read(h - along))`, and the mean over positions 1 on.",
    ],
)
def check_46(answer) -> None:
    otherwise = "Take ((h - mean) · v) v away from every token but the first."
    agree(answer, influence, influence_case, MISTAKES_46, otherwise, tolerance=2e-5)


# -- 4.7 -------------------------------------------------------------------------------------


def split_logit(model, text, token):
    """What each part wrote on a token's logit at the end of a text: (1 + 2 n_layers,).

    In this order: embedding, attention 0, MLP 0, attention 1, MLP 1, …
    The sites "embed", "attn_out", "mlp_out" and "resid_final" hold (batch, pos, d_model), the
    second and third with a layer axis before. The terms sum to the logit before the soft-cap.
    """
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"], pos=-1)
    blocks = torch.stack([cache["attn_out"], cache["mlp_out"]], 1)  # (n_layers, 2, 1, d_model)
    parts = torch.cat([cache["embed"], blocks.flatten(0, 2)])  # (1 + 2 n_layers, d_model)
    frozen = model.ln_final(cache["resid_final"]) / cache["resid_final"]
    return parts * frozen @ model.W_U[:, token]


def split_by_formula(model, text, token):
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"])
    final = cache["resid_final"][0, -1].double()
    scale = 1 / (final.pow(2).mean() + 1e-6).sqrt()
    v = scale * (1 + model.ln_final.weight.double()) * model.W_U[:, token].double()
    terms = [cache["embed"][0, -1].double() @ v]
    for layer in range(model.n_layers):
        terms += [cache[s][layer, 0, -1].double() @ v for s in ("attn_out", "mlp_out")]
    return [float(term) for term in terms]


def attention_first(model, text, token):
    terms = split_logit(model, text, token)
    return torch.cat([terms[:1], terms[1::2], terms[2::2]])


MISTAKES_47 = [
    *edits(
        split_logit,
        """
        parts * frozen → model.ln_final(parts)
            Each part is normed by itself: freeze what the norm does to the stream.
        parts * frozen → parts
            The final norm is missing: freeze it, and multiply each part by it.
        model.ln_final(cache → rms_normed(cache
            The norm's gain is missing, which differs from number to number.
        parts * frozen → model.ln_final(parts.cumsum(0))
            These are logits of the stream at each depth: give each part's own term.
        pos=-1 → pos=1
            Read at the end of the text: `pos=-1`.
        """,
    ),
    (
        lambda *given: split_logit(*given).sum(),
        "This is the whole logit: return one term for each part.",
    ),
    (attention_first, "The terms stand in another order: attention 0, MLP 0, attention 1…"),
]


def rms_normed(x: torch.Tensor) -> torch.Tensor:
    """The norm without its gain."""
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


@exercise(
    "4.7",
    title="Splitting a logit",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=split_logit,
    right=[lambda *given: direct_logit_attribution(*given).terms[0], split_by_formula],
    survivors=ONE_MODEL | {"1 → 2": "with one text, stacking before or after it is the same"},
    wrong=MISTAKES_47,
    hints=[
        "`model.run_with_cache(text, sites, pos=-1)`; then stack what was written, in order.",
        "The final norm multiplies each number of the stream by something. What is it *here*? "
        "`model.ln_final(final) / final`. Hold it fixed for all parts.",
        "`parts * frozen @ model.W_U[:, token]`",
    ],
)
def check_47(answer) -> None:
    def text_and_token(draw) -> tuple:
        return shipped_model(), sentence(draw), draw.choice(word_ids(shipped_model()).tolist())

    otherwise = "The terms should be parts * (norm(final) / final) @ W_U[:, token]."
    on_model(answer, split_logit, text_and_token, MISTAKES_47, otherwise)


# -- 4.8 -------------------------------------------------------------------------------------


def head_terms(z, W_O, w_post, v):
    """What each head of a Gemma 2 layer writes along v: (n_heads,).

    z       (n_heads, d_head), W_O (n_heads, d_head, d_model): head h gives z[h] @ W_O[h]
    w_post  (d_model,): the norm after attention divides the *sum* of the heads by its root mean
            square, √(mean of the squares), and multiplies by 1 + w_post
    v       (d_model,): a vector in the stream adds its product with v to the logit
    """
    heads = torch.einsum("hi,hid->hd", z, W_O)
    rms = heads.sum(0).pow(2).mean().sqrt()
    return heads / rms * (1 + w_post) @ v


def heads_one_by_one(z, W_O, w_post, v):
    import numpy as np

    z, W_O, w_post, v = (x.double().numpy() for x in (z, W_O, w_post, v))
    heads = [z[h] @ W_O[h] for h in range(len(z))]
    total = sum(heads)
    return [float(head / np.sqrt((total**2).mean()) * (1 + w_post) @ v) for head in heads]


MISTAKES_48 = edits(
    head_terms,
    """
    heads / rms * (1 + w_post) → heads
        The norm after attention is left out, as in common tools: the terms do not add up to what
        attention writes.
    heads.sum(0).pow(2).mean() → heads.pow(2).mean(-1, keepdim=True)
        Each head has its own norm here: there is one norm, on the sum.
    * (1 + w_post) →
        The norm's gain 1 + w_post is missing.
    / rms →
        The gain is there, the division by the root mean square is missing.
    .pow(2).mean().sqrt() → .norm()
        This divides by the length: the root *mean* square is smaller by √d_model.
    1 + w_post) @ → w_post) @
        The gain is 1 + w_post, not w_post.
    heads / rms → heads.sum(0) / rms
        This is the sum: return one term for each head.
    """,
)


@exercise(
    "4.8",
    title="A head, through the norm after attention",
    difficulty=3,
    importance=4,
    minutes=6,
    reference=head_terms,
    right=[heads_one_by_one],
    wrong=MISTAKES_48,
    hints=[
        '`torch.einsum("hi,hid->hd", z, W_O)` gives each head\'s vector, (n_heads, d_model).',
        "There is one root mean square: that of the sum over the heads.",
    ],
)
def check_48(answer) -> None:
    def one_layer(draw) -> tuple:
        z, W_O = draw.normal("heads", "d_head"), draw.normal("heads", "d_head", "d_model")
        return z, W_O, draw.normal("d_model"), draw.normal("d_model")

    otherwise = "Freeze the scale that the norm has on the heads' sum."
    agree(answer, head_terms, one_layer, MISTAKES_48, otherwise, tolerance=1e-4)


# -- 4.9 -------------------------------------------------------------------------------------


def apart(terms, answer, rival):
    """What each part writes for the answer, and what it writes for the rival: two of (parts,).

    terms          (n, parts, names), what a part writes on the logit of each name, in n prompts
    answer, rival  (n,), the place of each among the names

    Both are measured from the mean of all *other* names, and averaged over the prompts.
    """
    rows = torch.arange(len(terms))
    right, wrong = terms[rows, :, answer], terms[rows, :, rival]  # (n, parts)
    others = (terms.sum(-1) - right - wrong) / (terms.shape[-1] - 2)
    return (right - others).mean(0), (wrong - others).mean(0)


def as_difference(terms, answer, rival):
    right, wrong = apart(terms, answer, rival)
    return right - wrong, wrong - right


def apart_by_loops(terms, answer, rival):
    found = []
    for own in (answer, rival):
        each = []
        for i, (a, r) in enumerate(zip(answer.tolist(), rival.tolist(), strict=True)):
            rest = [k for k in range(terms.shape[2]) if k not in (a, r)]
            each.append(terms[i, :, int(own[i])] - terms[i][:, rest].mean(1))
        found.append(torch.stack(each).mean(0))
    return found


MISTAKES_49 = [
    *edits(
        apart,
        """
        - others →
            What a part writes on all names alike is still in there: subtract the mean of the other
            names.
        (terms.sum(-1) - right - wrong) / (terms.shape[-1] - 2) → terms.mean(-1)
            Answer and rival themselves are among the others: leave them out.
        .mean(0) →
            Average over the prompts.
        :, answer] → :, answer[0]]
        & :, rival] → :, rival[0]]
            Each prompt has its own answer and its own rival.
        """,
    ),
    (as_difference, "This is the difference of the two: keep them apart."),
    (lambda *given: apart(*given)[::-1], "The answer comes first, the rival second."),
]


@exercise(
    "4.9",
    title="The answer and its rival, apart",
    difficulty=3,
    importance=4,
    minutes=6,
    reference=apart,
    right=[apart_by_loops],
    wrong=MISTAKES_49,
    hints=[
        "`terms[torch.arange(n), :, answer]` is (n, parts): each prompt's own answer.",
        "The others' mean: the sum over all names, less these two, over two names fewer.",
    ],
    after="That was the last exercise of the main path. The investigation is waiting.",
)
def check_49(answer) -> None:
    def some_terms(draw) -> tuple:
        terms = draw.normal("n", "parts", "names") + 3 * draw.normal("n", "parts", 1)
        names = draw.size("names")
        own = draw.integers(0, names - 1, "n")
        return terms, own, (own + draw.integers(1, names - 1, "n")) % names

    otherwise = "(answer's terms - others' mean), and the same for the rival; then the mean."
    agree(answer, apart, some_terms, MISTAKES_49, otherwise, tolerance=1e-4)


# -- 4.10, going further ---------------------------------------------------------------------


def split_logit_layernorm(parts, gain, bias, u):
    """A logit under GPT-2's LayerNorm: the terms of the parts (n_parts,), and the bias's term.

    LayerNorm(x) = (x - mean(x)) / std(x) * gain + bias, with the mean and the standard deviation
    over the d_model numbers (dividing by d_model).
    parts (n_parts, d_model); gain, bias and u (d_model,), u the token's column of W_U
    """
    centred = parts - parts.mean(-1, keepdim=True)
    rms = centred.sum(0).pow(2).mean().sqrt()
    return centred / rms @ (gain * u), bias @ u


def bias_shared(parts, gain, bias, u):
    terms, constant = split_logit_layernorm(parts, gain, bias, u)
    return terms + constant / len(terms), 0 * constant


def layernorm_in_python(parts, gain, bias, u):
    scale = 1 / parts.sum(0).std(correction=0)
    return [float(((x - x.mean()) * gain * scale) @ u) for x in parts], float(bias @ u)


MISTAKES_410 = [
    *edits(
        split_logit_layernorm,
        """
        centred / rms → parts / rms
            The mean is not taken away: centre each part.
        centred.sum → parts.sum
            This is a root mean square: use the standard deviation of the stream.
        (gain * u), → (gain * u) + bias @ u,
            The bias is added to every part: it comes once, as a term of its own.
        .pow(2).mean().sqrt() → .std()
            This divides by d_model - 1: LayerNorm divides by d_model.
        parts.mean(-1, keepdim=True) → parts.mean(0)
            Centre each part over the d_model numbers, not over the parts.
        """,
    ),
    (bias_shared, "The bias is shared out among the parts: none of them wrote it."),
]


@exercise(
    "4.10",
    title="The same for GPT-2 (going further)",
    difficulty=4,
    importance=2,
    minutes=10,
    reference=split_logit_layernorm,
    right=[layernorm_in_python],
    wrong=[*MISTAKES_410, (lambda *given: split_logit_layernorm(*given)[0], "Return 2 things")],
    hints=[
        "The mean of a sum is the sum of the means, so each part can be centred by itself.",
        "The standard deviation is that of the whole stream, and the bias is a term of its own.",
    ],
)
def check_410(answer) -> None:
    def a_stream(draw) -> tuple:
        return draw.normal("parts", "d_model"), *(draw.normal("d_model") for _ in range(3))

    otherwise = "Centre each part; parts @ (gain * u) / standard deviation; bias @ u."
    agree(answer, split_logit_layernorm, a_stream, MISTAKES_410, otherwise, tolerance=1e-4)


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
