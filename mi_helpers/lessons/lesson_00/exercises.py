"""Exercises of lesson 00: meet the model."""

import functools
import itertools
import math

import torch

from mi_helpers.ablation import Mean, Zero, ablate, checked_part
from mi_helpers.course.check import (
    Wrong,
    agree,
    as_numbers,
    describe,
    draws,
    exercise,
    expect,
    expect_close,
)
from mi_helpers.course.investigate import investigation, one_of, plain
from mi_helpers.course.predict import prediction
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_00.experiments import (
    FACT,
    MOST_ANSWERS,
    LesionLab,
    fresh_lab,
    left_of_fact,
    mean_and_error,
    shipped_pair,
    skills,
)
from mi_helpers.lessons.shared import make_batch, shipped_model
from mi_helpers.tinyworld.world import World

SHORT = ("facts", "ioi", "pronoun", "agreement", "two_hop")  # families of short sentences
ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def sentence(draw, longest: int = 40) -> str:
    """A TinyWorld document of a few words."""
    family, seed = draw.choice(SHORT), draw.integer(0, 10_000)
    stream = World().documents(seed, family)
    return next(d.text for d in stream if len(d.text.split()) <= longest)


def on_model(answer, reference, make, mistakes, otherwise: str, cases: int = 3) -> None:
    """`agree` where an answer changes the model: afterwards it has to be as it was."""
    before = shipped_model()(FACT)
    try:
        agree(answer, reference, make, (), otherwise, 1e-4, cases)
    except Wrong:  # only now are the mistakes run, each of which costs as much as an answer
        agree(answer, reference, make, mistakes, otherwise, 1e-4, cases)
        raise
    finally:
        left = not torch.equal(shipped_model()(FACT), before)
        for each in (shipped_model, shipped_pair, judge) if left else ():
            each.cache_clear()  # the next check gets a model that nobody has changed
    expect(
        not left,
        "The numbers are right, but the model stays changed afterwards: set the hook in a `with`.",
    )


# -- 0.1 -------------------------------------------------------------------------------------

STUB_01 = '''\
def token_losses(model, text):
    """-log p, in nats, of each token of the text but the first, given those before it: (pos - 1,).

    model(text) gives logits (1, pos, d_vocab), model.tokens(text) gives ids (1, pos).
    """
    ...
'''


def token_losses(model, text):
    """The logits at position i predict the token at position i + 1."""
    ids = model.tokens(text)  # (1, pos)
    scores = model(text).log_softmax(-1)  # (1, pos, d_vocab)
    return -scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


def with_scores(pick):
    """A wrong answer that picks from log-probabilities (pos, d_vocab) and ids (pos,)."""
    return lambda model, text: pick(model(text)[0].log_softmax(-1), model.tokens(text)[0])


def at_each(scores, ids):
    return scores.gather(-1, ids[:, None])[:, 0]


AT_ITSELF = with_scores(lambda s, ids: -at_each(s, ids)[1:])
IN_BITS = with_scores(lambda s, ids: -at_each(s[:-1], ids[1:]) / math.log(2))
PROBABILITY = with_scores(lambda s, ids: at_each(s[:-1], ids[1:]).exp())
NO_SIGN = with_scores(lambda s, ids: at_each(s[:-1], ids[1:]))
BEST = with_scores(lambda s, ids: -s[:-1].amax(-1))


def raw_logits(model, text):
    return -at_each(model(text)[0, :-1], model.tokens(text)[0, 1:])


def one_number(model, text):
    return token_losses(model, text).mean()


def losses_in_numpy(model, text):
    x = model(text)[0].double().numpy()
    p = torch.tensor(x).softmax(-1).numpy()
    return [-math.log(p[i, t]) for i, t in enumerate(model.tokens(text)[0, 1:].tolist())]


def losses_by_cross_entropy(model, text):
    return torch.nn.functional.cross_entropy(
        model(text)[0, :-1], model.tokens(text)[0, 1:], reduction="none"
    )


@exercise(
    "0.1",
    title="The loss at each token",
    difficulty=2,
    importance=5,
    minutes=6,
    stub=STUB_01,
    reference=token_losses,
    survivors=ONE_MODEL,
    right=[losses_in_numpy, losses_by_cross_entropy],
    hints=[
        "At position i the model has read token i, and its logits are about token i + 1.",
        "`model(text).log_softmax(-1)` gives log-probabilities; leave out the last position.",
        "`scores[0, :-1].gather(-1, ids[0, 1:, None])` picks the entries of the tokens that came.",
    ],
    wrong=[
        (AT_ITSELF, "already been read"),
        (raw_logits, "not log-probabilities"),
        (NO_SIGN, "minus sign"),
        (PROBABILITY, "take the logarithm"),
        (IN_BITS, "natural"),
        (BEST, "really came"),
        (one_number, "one number for each token"),
    ],
)
def check_01(answer) -> None:
    agree(
        answer,
        token_losses,
        lambda draw: (shipped_model(), sentence(draw)),
        mistakes=[
            (
                AT_ITSELF,
                "These are the scores of a token that has already been read: the logits at "
                "position i predict the token at i + 1.",
            ),
            (raw_logits, "Logits are not log-probabilities: use `log_softmax` first."),
            (NO_SIGN, "A loss is -log p, and so never below 0: the minus sign is missing."),
            (PROBABILITY, "These are probabilities: take the logarithm, and a minus sign."),
            (IN_BITS, "These are bits: nats use the natural logarithm."),
            (BEST, "This scores the likeliest token, not the one that really came."),
            (one_number, "This is the mean: give one number for each token but the first."),
        ],
        otherwise="Which logits predict the second token, and which entry of them is its own?",
        tolerance=1e-4,
    )


# -- 0.2 -------------------------------------------------------------------------------------

STUB_02 = '''\
def stream_entering(layer, embed, attn_out, mlp_out):
    """The residual stream as it enters block `layer`, (batch, pos, d_model).

    embed              (batch, pos, d_model)
    attn_out, mlp_out  (n_layers, batch, pos, d_model), what each block adds
    """
    ...
'''


def stream_entering(layer, embed, attn_out, mlp_out):
    """The embedding and everything that the blocks before this one wrote."""
    return embed + attn_out[:layer].sum(0) + mlp_out[:layer].sum(0)


def one_block_too_many(layer, e, a, m):
    return stream_entering(layer + 1, e, a, m)


def no_embedding(layer, e, a, m):
    return a[:layer].sum(0) + m[:layer].sum(0)


def last_block_only(layer, e, a, m):
    return e + a[layer - 1] + m[layer - 1]


def no_mlps(layer, e, a, m):
    return e + a[:layer].sum(0)


def mean_of_blocks(layer, e, a, m):
    return e + a[:layer].mean(0) + m[:layer].mean(0)


def whole_stream(layer, e, a, m):
    return e + a.sum(0) + m.sum(0)


def stream_in_place(layer, embed, attn_out, mlp_out):
    for i in range(layer):
        embed += attn_out[i]
        embed += mlp_out[i]
    return embed


@exercise(
    "0.2",
    title="The stream as a running sum",
    difficulty=1,
    importance=5,
    minutes=4,
    stub=STUB_02,
    reference=stream_entering,
    right=[stream_in_place],
    hints=[
        "Which blocks have already run when block `layer` begins?",
        "`attn_out[:layer]` is what their attention wrote; sum over the first axis.",
    ],
    wrong=[
        (one_block_too_many, "not written yet"),
        (no_embedding, "begins with the embed"),
        (last_block_only, "last block only"),
        (no_mlps, "MLPs added is missing"),
        (mean_of_blocks, "sum, not mean"),
        (whole_stream, "end of the model"),
    ],
)
def check_02(answer) -> None:
    agree(
        answer,
        stream_entering,
        lambda draw: (
            draw.integer(1, draw.size("layers", 4) - 2),
            draw.normal("batch", "pos", "d_model"),
            draw.normal("layers", "batch", "pos", "d_model"),
            draw.normal("layers", "batch", "pos", "d_model"),
        ),
        mistakes=[
            (one_block_too_many, "Block `layer` has not written yet: leave it out."),
            (no_embedding, "The stream begins with the embedding: add it."),
            (last_block_only, "This adds the last block only: the stream keeps all writes."),
            (no_mlps, "What the MLPs added is missing."),
            (mean_of_blocks, "Blocks add to the stream: sum, not mean."),
            (whole_stream, "This is the stream at the end of the model, not at this block."),
        ],
        otherwise="Sum the embedding and what blocks 0 to layer - 1 added.",
    )
    for draw in draws(1):
        embed, parts = draw.normal(2, 3, 5), draw.normal(4, 2, 3, 5)
        got = answer(0, embed.clone(), parts, parts)
        expect_close(got, embed, "Block 0 should get the embedding, and nothing else.")
        got = answer(4, embed.clone(), parts, parts)
        want = stream_entering(4, embed, parts, parts)
        expect_close(got, want, "After the last block everything has been written.", 1e-4)


# -- 0.3 -------------------------------------------------------------------------------------

STUB_03 = '''\
def attention_pattern(q, k, scale, cap):
    """One head's pattern (q_pos, k_pos): how much each token reads from each earlier one.

    q, k   (pos, d_head), the head's queries and keys
    scale  what each product of a query and a key is multiplied by
    cap    scores are bent to lie within ±cap: cap · tanh(score / cap)
    """
    ...
'''


def attention_pattern(q, k, scale, cap):
    """softmax(mask(cap · tanh(scale · q kᵀ / cap)))"""
    scores = scale * q @ k.T  # (q_pos, k_pos)
    scores = cap * torch.tanh(scores / cap)
    later = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def pattern_of(cap_first=True, mask="before", axis=-1, swap=False, scaled=True, fill=-torch.inf):
    """attention_pattern with a mistake."""

    def pattern(q, k, scale, cap):
        q, k = (k, q) if swap else (q, k)
        scores = (scale if scaled else 1) * q @ k.T
        scores = cap * torch.tanh(scores / cap) if cap_first else scores
        later = torch.ones_like(scores).triu(0 if mask == "self" else 1).bool()
        if mask == "after":
            weights = scores.softmax(axis)
            return weights.masked_fill(later, 0)
        if mask == "earlier":
            later = later.T
        if mask is None:
            return scores.softmax(axis)
        return scores.masked_fill(later, fill).softmax(axis)

    return pattern


NO_CAP, NO_MASK, NO_SCALE = (
    pattern_of(cap_first=False),
    pattern_of(mask=None),
    pattern_of(scaled=False),
)
OVER_QUERIES, ZERO_FILLED = pattern_of(axis=0), pattern_of(fill=0.0)
MASKED_AFTER, FUTURE, SWAPPED = (
    pattern_of(mask="after"),
    pattern_of(mask="earlier"),
    pattern_of(swap=True),
)


def hard_cap(q, k, scale, cap):
    scores = (scale * q @ k.T).clamp(-cap, cap)
    later = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def mask_bent(q, k, scale, cap):
    scores = scale * q @ k.T
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return (cap * torch.tanh(scores / cap)).softmax(-1)


def own_scale(q, k, scale, cap):
    return attention_pattern(q, k, q.shape[-1] ** -0.5, cap)


def pattern_by_rows(q, k, scale, cap):
    rows = []
    for i in range(len(q)):
        scores = [cap * math.tanh(float(scale * (q[i] @ k[j])) / cap) for j in range(i + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append([w / sum(weights) for w in weights] + [0.0] * (len(q) - i - 1))
    return rows


@exercise(
    "0.3",
    title="Where a head looks",
    difficulty=3,
    importance=5,
    minutes=8,
    stub=STUB_03,
    reference=attention_pattern,
    right=[pattern_by_rows],
    hints=[
        "`q @ k.T` has a row for each token that looks, a column for each that is looked at.",
        "Scale, then bend. Scores of later tokens become minus infinity before the softmax.",
        "`torch.ones_like(scores).triu(1).bool()` is True at later tokens; `masked_fill`.",
    ],
    wrong=[
        (NO_MASK, "tokens that come later"),
        (NO_SCALE, "multiply by `scale`"),
        (NO_CAP, "bend the scores"),
        (hard_cap, "cuts hard"),
        (OVER_QUERIES, "row should sum to 1"),
        (ZERO_FILLED, "e to the 0"),
        (MASKED_AFTER, "before the softmax"),
        (FUTURE, "wrong half"),
        (SWAPPED, "swapped"),
        (mask_bent, "after bending"),
        (own_scale, "need not be"),
    ],
)
def check_03(answer) -> None:
    agree(
        answer,
        attention_pattern,
        lambda draw: (
            draw.normal("pos", "d_head"),
            draw.normal("pos", "d_head"),
            draw.number(0.3, 0.9),
            draw.number(1.5, 4.0),
        ),
        mistakes=[
            (NO_MASK, "A token reads from tokens that come later: mask them."),
            (NO_SCALE, "The products are too large: multiply by `scale` before you bend them."),
            (NO_CAP, "After scaling, bend the scores: cap · tanh(score / cap)."),
            (hard_cap, "This cuts hard at the cap: use tanh, which bends."),
            (OVER_QUERIES, "Each row should sum to 1: softmax over the keys, the last axis."),
            (
                ZERO_FILLED,
                "A masked score of 0 still gets weight, as e to the 0 is 1: use minus infinity.",
            ),
            (MASKED_AFTER, "Mask before the softmax, so that each row still sums to 1."),
            (FUTURE, "You masked the wrong half: a token reads from itself and earlier ones."),
            (mask_bent, "Mask after bending: tanh makes of minus infinity a mere -cap."),
            (own_scale, "Use the `scale` that is given: it need not be 1/√d_head."),
            (SWAPPED, "Queries and keys are swapped: the row belongs to the query."),
        ],
        otherwise="Scale, bend, mask, softmax, in this order; each row sums to 1.",
        tolerance=1e-4,
    )


# -- 0.4 -------------------------------------------------------------------------------------

STUB_04 = '''\
def head_writes(pattern, v, W_O, head):
    """What one head gives for each token, in the stream's width: (pos, d_model).

    pattern  (n_heads, q_pos, k_pos)
    v        (pos, n_kv_heads, d_head); neighbouring heads share one
    W_O      (n_heads, d_head, d_model)
    """
    ...
'''


def head_writes(pattern, v, W_O, head):
    """z = pattern @ v, then W_O; heads 0 and 1 share the values of key-value head 0, and so on."""
    share = W_O.shape[0] // v.shape[1]
    z = pattern[head] @ v[:, head // share]  # (q_pos, d_head)
    return z @ W_O[head]


def first_values(pattern, v, W_O, head):
    return pattern[head] @ v[:, 0] @ W_O[head]


def modulo_values(pattern, v, W_O, head):
    return pattern[head] @ v[:, head % v.shape[1]] @ W_O[head]


def transposed_pattern(pattern, v, W_O, head):
    return head_writes(pattern.mT, v, W_O, head)


def z_alone(pattern, v, W_O, head):
    return pattern[head] @ v[:, head // (W_O.shape[0] // v.shape[1])]


def no_pattern(pattern, v, W_O, head):
    return v[:, head // (W_O.shape[0] // v.shape[1])] @ W_O[head]


def all_heads(pattern, v, W_O, head):
    return sum(head_writes(pattern, v, W_O, h) for h in range(len(W_O)))


def writes_by_einsum(pattern, v, W_O, head):
    values = v.repeat_interleave(W_O.shape[0] // v.shape[1], 1)
    return torch.einsum("qk,kd,dm->qm", pattern[head], values[:, head], W_O[head])


def writes_in_numpy(pattern, v, W_O, head):
    pattern, v, W_O = (x.double().numpy() for x in (pattern, v, W_O))
    return pattern[head] @ v[:, head * v.shape[1] // W_O.shape[0]] @ W_O[head]


def drawn_head(draw) -> tuple:
    """Arguments of `head_writes`: two to four heads for each of two or three key-value heads."""
    kv, share = draw.integer(2, 3), draw.integer(2, 4)
    pattern = draw.attention(kv * share, "pos")
    v, W_O = draw.normal("pos", kv, "d_head"), draw.normal(kv * share, "d_head", "d_model")
    return pattern, v, W_O, draw.integer(1, kv * share - 1)


@exercise(
    "0.4",
    title="What a head writes",
    difficulty=3,
    importance=4,
    minutes=7,
    stub=STUB_04,
    reference=head_writes,
    right=[writes_by_einsum, writes_in_numpy],
    hints=[
        "Each row of the pattern is a weighted average: multiply it with the values.",
        "With 4 heads and 2 key-value heads, heads 0 and 1 read values 0, heads 2 and 3 values 1.",
        "`pattern[head] @ v[:, ...]` is (pos, d_head); `W_O[head]` takes it to d_model.",
    ],
    wrong=[
        (first_values, "key-value head 0"),
        (modulo_values, "neighbours share"),
        (transposed_pattern, "rows of the pattern"),
        (z_alone, "W_O"),
        (no_pattern, "weights of the pattern"),
        (all_heads, "sum of all heads"),
    ],
)
def check_04(answer) -> None:
    agree(
        answer,
        head_writes,
        drawn_head,
        mistakes=[
            (first_values, "These are the values of key-value head 0: which one serves this head?"),
            (modulo_values, "Heads that are neighbours share values: heads 0 and 1, and so on."),
            (transposed_pattern, "The rows of the pattern belong to the token that reads."),
            (z_alone, "This is z, of d_head numbers: W_O takes it to the stream's width."),
            (no_pattern, "The values are not mixed: use the weights of the pattern."),
            (all_heads, "This is the sum of all heads: give this one's term."),
        ],
        otherwise="Average the values with the pattern's rows, then multiply with this head's W_O.",
    )


# -- 0.5 -------------------------------------------------------------------------------------

STUB_05 = '''\
def without_head(model, text, layer, head):
    """Logits (1, pos, d_vocab) with one head's z zero at every position but the first.

    The site ("z", layer) holds (batch, pos, n_heads, d_head). Afterwards the model is intact.
    """
    ...
'''


def without_head(model, text, layer, head):
    """What ablate(model, [(layer, head)], Zero()) does."""

    def silence(z):  # (batch, pos, n_heads, d_head)
        z[:, 1:, head] = 0
        return z

    with model.hooks({("z", layer): silence}):
        return model(text)


def with_z(change):
    """Logits under a changed z of one layer; change(z, head) works in place."""

    def run(model, text, layer, head):
        def hook(z):
            change(z, head)
            return z

        with model.hooks({("z", layer): hook}):
            return model(text)

    return run


def zero_everywhere(z, head):
    z[:, :, head] = 0


def zero_position(z, head):
    z[:, head] = 0


def zero_width(z, head):
    z[:, 1:, :, head] = 0


def zero_others(z, head):
    z[:, 1:, [h for h in range(z.shape[2]) if h != head]] = 0


def zero_all(z, head):
    z[:, 1:] = 0


ALSO_BOS, A_TOKEN, A_NUMBER, OTHERS, LAYER = map(
    with_z, (zero_everywhere, zero_position, zero_width, zero_others, zero_all)
)


def every_layer(model, text, layer, head):
    with model.hooks({"z": lambda z: torch.cat([z[:, :1], zeroed(z, head)[:, 1:]], 1)}):
        return model(text)


def zeroed(z, head):
    z = z.clone()
    z[:, :, head] = 0
    return z


def intact(model, text, layer, head):
    return model(text)


def without_head_by_library(model, text, layer, head):
    with model.hooks(ablate(model, [(layer, head)], Zero())):
        return model(text).double()


def without_head_by_product(model, text, layer, head):
    def silence(z):
        kept = torch.ones(1, z.shape[1], z.shape[2], 1)
        kept[:, 1:, head] = 0
        return z * kept

    with model.hooks({("z", layer): silence}):
        return model(text)


def place(draw) -> tuple:
    """(model, sentence, layer, head)"""
    model = shipped_model()
    text = sentence(draw)
    return model, text, draw.integer(0, model.n_layers - 1), draw.integer(1, model.n_heads - 1)


@exercise(
    "0.5",
    title="Silence one head",
    difficulty=3,
    importance=5,
    minutes=6,
    stub=STUB_05,
    reference=without_head,
    survivors=ONE_MODEL,
    right=[without_head_by_library, without_head_by_product],
    hints=[
        "Write a function of z that changes it and returns it, and give it to `model.hooks`.",
        '`with model.hooks({("z", layer): silence}):` and run the model inside the block.',
        "All texts, positions from 1 on, this head: `z[:, 1:, head]`.",
    ],
    wrong=[
        (ALSO_BOS, "leave `<bos>`"),
        (A_TOKEN, "heads are the third axis"),
        (A_NUMBER, "one number of every head"),
        (OTHERS, "all heads but this one"),
        (LAYER, "all heads of the layer"),
        (every_layer, "every layer"),
        (intact, "Nothing changed"),
    ],
)
def check_05(answer) -> None:
    on_model(
        answer,
        without_head,
        place,
        [
            (intact, "Nothing changed: does the hook return z, and the run stand in the block?"),
            (ALSO_BOS, "The first position changed, too: leave `<bos>` as it is."),
            (A_TOKEN, "You silenced a *token*: heads are the third axis, after batch and pos."),
            (A_NUMBER, "You silenced one number of every head: heads are the third axis."),
            (OTHERS, "You silenced all heads but this one."),
            (LAYER, "You silenced all heads of the layer."),
            (every_layer, "You silenced this head in every layer: name the layer in the site."),
        ],
        "Only z[:, 1:, head] of this layer should be zero.",
        cases=4,
    )


# -- 0.6 -------------------------------------------------------------------------------------

STUB_06 = '''\
def mean_lesion(model, text, layer, head, others):
    """As without_head, but z gets the head's mean over all tokens of other texts, <bos> left out.

    others  a list of texts, of different lengths; each token counts once
    """
    ...
'''


def mean_lesion(model, text, layer, head, others):
    """One vector of d_head numbers, the mean over the other texts' tokens, at every position."""
    seen = []
    for other in others:
        _, cache = model.run_with_cache(other, [("z", layer)])
        seen.append(cache["z", layer][0, 1:, head])  # (tokens, d_head)
    mean = torch.cat(seen).mean(0)

    def replace(z):
        z[:, 1:, head] = mean
        return z

    with model.hooks({("z", layer): replace}):
        return model(text)


def with_mean(value):
    """Logits with value(list of z (pos, n_heads, d_head), head, z of the text) put in."""

    def run(model, text, layer, head, others):
        kept = [
            model.run_with_cache(each, [("z", layer)])[1]["z", layer][0] for each in [*others, text]
        ]
        new = value(kept[:-1], head, kept[-1])

        def hook(z):
            z[:, 1:, head] = new
            return z

        with model.hooks({("z", layer): hook}):
            return model(text)

    return run


WITH_BOS = with_mean(lambda zs, h, own: torch.cat([z[:, h] for z in zs]).mean(0))
OF_MEANS = with_mean(lambda zs, h, own: torch.stack([z[1:, h].mean(0) for z in zs]).mean(0))
ONE_NUMBER = with_mean(lambda zs, h, own: torch.cat([z[1:, h] for z in zs]).mean())
OVER_HEADS = with_mean(lambda zs, h, own: torch.cat([z[1:] for z in zs]).mean((0, 1)))
OWN_MEAN = with_mean(lambda zs, h, own: own[1:, h].mean(0))
FIRST_TEXT = with_mean(lambda zs, h, own: zs[0][1:, h].mean(0))
AS_ZERO = with_mean(lambda zs, h, own: 0.0)


def bos_too(model, text, layer, head, others):
    zs = [model.run_with_cache(o, [("z", layer)])[1]["z", layer][0, 1:, head] for o in others]

    def hook(z):
        z[:, :, head] = torch.cat(zs).mean(0)
        return z

    with model.hooks({("z", layer): hook}):
        return model(text)


def mean_by_library(model, text, layer, head, others):
    rows = [model.run_with_cache(o, [("z", layer)])[1]["z", layer][0, 1:] for o in others]
    reference = {("z", layer): torch.cat(rows)}
    with model.hooks(ablate(model, [(layer, head)], Mean(reference))):
        return model(text)


@exercise(
    "0.6",
    title="The mean lesion",
    difficulty=4,
    importance=4,
    minutes=7,
    stub=STUB_06,
    reference=mean_lesion,
    survivors=ONE_MODEL,
    right=[mean_by_library],
    hints=[
        "Run the model on each other text, and keep ("
        '`"z", layer)`: `model.run_with_cache(other, [("z", layer)])`.',
        '`cache["z", layer][0, 1:, head]` is (tokens, d_head): put all texts\' rows together.',
        "`torch.cat(rows).mean(0)`, and then as in 0.5, with this vector in place of 0.",
    ],
    wrong=[
        (WITH_BOS, "`<bos>` is in the mean"),
        (OF_MEANS, "each text counts once"),
        (ONE_NUMBER, "one number"),
        (OVER_HEADS, "averages over the heads"),
        (OWN_MEAN, "this text's own mean"),
        (FIRST_TEXT, "first of the other texts"),
        (AS_ZERO, "the zero lesion"),
        (bos_too, "first position changed"),
    ],
)
def check_06(answer) -> None:
    on_model(
        answer,
        mean_lesion,
        lambda draw: (*place(draw), [sentence(draw), f"{sentence(draw)} {sentence(draw)}"]),
        [
            (WITH_BOS, "`<bos>` is in the mean: it is the same everywhere, leave it out."),
            (OF_MEANS, "Here each text counts once: let each token count once."),
            (ONE_NUMBER, "This is one number: keep d_head, average over tokens only."),
            (OVER_HEADS, "This averages over the heads: take this head's own mean."),
            (OWN_MEAN, "This is this text's own mean: it still knows what the text is about."),
            (FIRST_TEXT, "This is the mean of the first of the other texts: use all of them."),
            (AS_ZERO, "This is the zero lesion: put the mean there."),
            (bos_too, "The first position changed, too: leave `<bos>` as it is."),
        ],
        "Average z[0, 1:, head] over all tokens of the other texts, and put it at positions 1 on.",
        cases=2,
    )


# -- 0.7 -------------------------------------------------------------------------------------

STUB_07 = '''\
def mean_and_error(after, before, document):
    """What a lesion costs: (mean over documents, standard error of that mean).

    after, before  (answers,), the loss at each answer with and without the lesion
    document       (answers,), which document each answer stands in

    Answers of one document share its luck, so average within documents first.
    """
    ...
'''


def costs_of(summary, change=lambda after, before: after - before):
    """A wrong answer: summary(list of changes by document, all changes)."""

    def cost(after, before, document):
        each = change(after, before)
        return summary([each[document == d] for d in document.unique()], each)

    return cost


def mean_of(x):
    return x.mean(), x.std() / len(x) ** 0.5


def means(groups):
    return torch.stack([g.mean() for g in groups])


AS_TOKENS = costs_of(lambda groups, all_: mean_of(all_))
SPREAD = costs_of(lambda groups, all_: (means(groups).mean(), means(groups).std()))
BIASED = costs_of(
    lambda groups, all_: (
        means(groups).mean(),
        means(groups).std(correction=0) / len(groups) ** 0.5,
    )
)
WRONG_COUNT = costs_of(
    lambda groups, all_: (means(groups).mean(), means(groups).std() / len(all_) ** 0.5)
)
NO_ROOT = costs_of(lambda groups, all_: (means(groups).mean(), means(groups).std() / len(groups)))
REVERSED = costs_of(lambda groups, all_: mean_of(means(groups)), lambda a, b: b - a)
ABSOLUTE = costs_of(lambda groups, all_: mean_of(means(groups)), lambda a, b: (a - b).abs())
AFTER_ALONE = costs_of(lambda groups, all_: mean_of(means(groups)), lambda a, b: a)
SUMS = costs_of(lambda groups, all_: mean_of(torch.stack([g.sum() for g in groups])))


TWO_ERRORS = costs_of(
    lambda groups, all_: (means(groups).mean(), 2 * means(groups).std() / len(groups) ** 0.5)
)
BY_ANSWERS = costs_of(lambda groups, all_: (all_.mean(), means(groups).std() / len(groups) ** 0.5))


def unpaired(after, before, document):
    by = [means([x[document == d] for d in document.unique()]) for x in (after, before)]
    error = sum(x.var() / len(x) for x in by) ** 0.5
    return by[0].mean() - by[1].mean(), error


def costs_in_numpy(after, before, document):
    import numpy as np

    change, place = (after - before).numpy(), document.numpy()
    each = np.array([change[place == d].mean() for d in sorted(set(place.tolist()))])
    return [float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))]


def costs_in_python(after, before, document):
    import statistics

    groups = {}
    for a, b, d in zip(after.tolist(), before.tolist(), document.tolist(), strict=True):
        groups.setdefault(d, []).append(a - b)
    each = [statistics.mean(values) for values in groups.values()]
    return statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5


def answers_of_documents(draw) -> tuple:
    """after, before, document; unequal numbers of answers, documents neither sorted nor 0 to n."""
    n = draw.size("documents", 5)
    names = 7 + 3 * torch.arange(n)
    counts = draw.integers(1, 4, n).tolist()
    counts[0] = 5  # never all equal
    document = torch.cat([torch.full((c,), int(d)) for c, d in zip(counts, names, strict=True)])
    document = document[torch.from_numpy(draw.rng.permutation(len(document)))]
    shift = draw.normal(n)
    before = draw.positive(len(document))
    after = before + shift[(document - 7) // 3] + 0.3 * draw.normal(len(document))
    return after, before, document


@exercise(
    "0.7",
    title="What a lesion costs, and how sure that is",
    difficulty=3,
    importance=5,
    minutes=7,
    stub=STUB_07,
    reference=mean_and_error,
    right=[costs_in_numpy, costs_in_python],
    hints=[
        "Subtract first: each answer is compared with itself.",
        "`change[document == d].mean()` for each d in `document.unique()`: one number a document.",
        "The standard error of a mean of n numbers is their standard deviation over √n.",
    ],
    wrong=[
        (AS_TOKENS, "as if answers of one document"),
        (SPREAD, "spread of the documents"),
        (BIASED, "n - 1"),
        (WRONG_COUNT, "number of documents, not of answers"),
        (NO_ROOT, "square root"),
        (REVERSED, "wrong way round"),
        (ABSOLUTE, "may be negative"),
        (AFTER_ALONE, "subtract the loss before"),
        (SUMS, "average within a document"),
        (unpaired, "compared with itself"),
        (TWO_ERRORS, "two standard errors"),
        (BY_ANSWERS, "over answers"),
    ],
)
def check_07(answer) -> None:
    agree(
        answer,
        mean_and_error,
        answers_of_documents,
        mistakes=[
            (AS_TOKENS, "This counts as if answers of one document were independent: they aren't."),
            (SPREAD, "This is the spread of the documents; the mean's error is smaller by √n."),
            (BIASED, "This standard deviation divides by n: divide by n - 1 (`ddof=1` in NumPy)."),
            (WRONG_COUNT, "Divide by the root of the number of documents, not of answers."),
            (NO_ROOT, "Divide by the square root of the number of documents."),
            (REVERSED, "The sign is the wrong way round: damage is after less before."),
            (ABSOLUTE, "A change may be negative, too: no absolute value."),
            (AFTER_ALONE, "This is the loss after the lesion: subtract the loss before."),
            (TWO_ERRORS, "These are two standard errors: return one."),
            (BY_ANSWERS, "The mean is over answers: let each document count once."),
            (SUMS, "Take the average within a document, not the sum."),
            (
                unpaired,
                "The error is too large: each answer is compared with itself, so subtract before "
                "you take the standard deviation.",
            ),
        ],
        otherwise="One mean change for each document; then their mean, and their sd over √n.",
    )


# -- 0.8 -------------------------------------------------------------------------------------

STUB_08 = '''\
def documents_needed(changes, effect):
    """The smallest number of documents with which two standard errors are at most `effect`.

    changes  (documents,), the cost of a lesion in each document of a first, small sample
    """
    ...
'''


def documents_needed(changes, effect):
    """2 sd / √n <= effect, so n >= (2 sd / effect)²."""
    return math.ceil((2 * float(changes.std()) / effect) ** 2)


def needs(rule):
    """A wrong answer: rule(standard deviation, effect, number of documents so far)."""
    return lambda changes, effect: math.ceil(rule(float(changes.std()), effect, len(changes)))


ONE_ERROR = needs(lambda sd, effect, n: (sd / effect) ** 2)
NO_SQUARE = needs(lambda sd, effect, n: 2 * sd / effect)
TIMES = needs(lambda sd, effect, n: n * (2 * sd / effect) ** 2)
FROM_ERROR = needs(lambda sd, effect, n: (2 * sd / n**0.5 / effect) ** 2)


def rounded_down(changes, effect):
    return documents_needed(changes, effect) - 1


def needed_by_search(changes, effect):
    sd = float(as_numbers(changes).std(ddof=1))
    return next(n for n in itertools.count(1) if 2 * sd / n**0.5 <= effect)


def whole_case(draw) -> tuple:
    """Changes and an effect for which the number is 50 to 5,000, and far from a whole one."""
    changes = draw.normal("documents")
    wanted = draw.integer(50, 5_000) - draw.number(0.2, 0.8)
    return changes, 2 * float(changes.std()) / wanted**0.5


@exercise(
    "0.8",
    title="How many documents an effect needs",
    difficulty=2,
    importance=4,
    minutes=4,
    stub=STUB_08,
    reference=documents_needed,
    right=[needed_by_search],
    hints=[
        "The standard error with n documents is sd / √n. Write down the condition, solve for n.",
        "Round up: `math.ceil`.",
    ],
    wrong=[
        (ONE_ERROR, "two standard errors"),
        (NO_SQUARE, "square"),
        (TIMES, "does not depend on how many"),
        (FROM_ERROR, "standard deviation, not"),
        (rounded_down, "round up"),
    ],
    after="That was the last exercise. The investigation is waiting.",
)
def check_08(answer) -> None:
    agree(
        answer,
        documents_needed,
        whole_case,
        mistakes=[
            (
                ONE_ERROR,
                "With these, one standard error is that small; ask for two standard errors.",
            ),
            (
                NO_SQUARE,
                "Half the error takes four times the documents: there is a square missing.",
            ),
            (TIMES, "The number does not depend on how many documents the first sample had."),
            (
                FROM_ERROR,
                "You began with the standard error of the sample: take its standard "
                "deviation, not the error.",
            ),
            (rounded_down, "With one document fewer the error is still too large: round up."),
        ],
        otherwise="Solve 2 · sd / √n <= effect for n, and round up.",
        tolerance=1e-9,
    )


# -- 0.9, going further ----------------------------------------------------------------------

STUB_09 = '''\
def block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp):
    """How many parameters one Gemma 2 block has: attention, a gated MLP, four norms, no biases."""
    ...
'''


def block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp):
    """W_Q and W_O by query heads, W_K and W_V by key-value heads, three MLP matrices, four norms"""
    attention = 2 * d_model * n_heads * d_head + 2 * d_model * n_kv_heads * d_head
    return attention + 3 * d_model * d_mlp + 4 * d_model


def block_of(kv=None, heads=2, mlp=3, norms=4, square=False):
    """block_parameters with another number of matrices."""

    def count(d_model, n_heads, n_kv_heads, d_head, d_mlp):
        kv_heads = n_heads if kv == "full" else n_kv_heads
        attention = heads * d_model * n_heads * d_head + 2 * d_model * kv_heads * d_head
        attention = 4 * d_model**2 if square else attention
        return attention + mlp * d_model * d_mlp + norms * d_model

    return count


FULL_KV, TWO_MATRICES, TWO_NORMS = block_of(kv="full"), block_of(mlp=2), block_of(norms=2)
NO_NORMS, SQUARE, NO_OUTPUT = block_of(norms=0), block_of(square=True), block_of(heads=1)


@exercise(
    "0.9",
    title="Counting a block's parameters (going further)",
    difficulty=2,
    importance=2,
    minutes=8,
    stub=STUB_09,
    reference=block_parameters,
    hints=[
        "Go down the drawing and multiply out the shape of each weight.",
        "W_Q and W_O have n_heads · d_head on one side, W_K and W_V n_kv_heads · d_head.",
        "Three MLP matrices of d_model · d_mlp, and four norms of d_model.",
    ],
    wrong=[
        (FULL_KV, "W_K and W_V are smaller"),
        (TWO_MATRICES, "three matrices"),
        (TWO_NORMS, "four norms in a block"),
        (NO_NORMS, "weights of its own"),
        (SQUARE, "is not d_model here"),
        (NO_OUTPUT, "four matrices"),
    ],
)
def check_09(answer) -> None:
    agree(
        answer,
        block_parameters,
        lambda draw: tuple(draw.size(axis, 3, 40) for axis in ("a", "b", "c", "d", "e")),
        mistakes=[
            (FULL_KV, "W_K and W_V are smaller: they serve `n_kv_heads` heads."),
            (TWO_MATRICES, "A gated MLP has three matrices: W_gate, W_in and W_out."),
            (TWO_NORMS, "There are four norms in a block, before and after attention and MLP."),
            (NO_NORMS, "Each of the four norms has d_model weights of its own."),
            (SQUARE, "n_heads · d_head is not d_model here: use both."),
            (NO_OUTPUT, "Attention has four matrices: W_Q, W_K, W_V and W_O."),
        ],
        otherwise="List the matrices first, each with its shape.",
    )


# -- predictions -----------------------------------------------------------------------------


@prediction(
    "0.1",
    question="How many heads, silenced alone, take the fact away?",
    options=["none", "one", "more"],
)
def heads_that_take_the_fact() -> str:
    model = shipped_model()
    heads = itertools.product(range(model.n_layers), range(model.n_heads))
    left = left_of_fact(model, [("head", *each) for each in heads])
    return ["none", "one", "more"][min(int((left < 0.5).sum()), 2)]


@prediction(
    "0.2",
    question="Which costs a perfect reader most, per token?",
    options=["calendar", "facts", "repetition", "pronoun"],
)
def dearest_family() -> str:
    world, model, cost = World(), shipped_model(), {}
    for family in ("calendar", "facts", "repetition", "pronoun"):
        some = list(itertools.islice(world.documents(10_000, family), 40))
        tokens = sum(len(model.encode(each.text)) + 1 for each in some)
        cost[family] = sum(world.floor(each) for each in some) / tokens
    return max(cost, key=cost.get)


@prediction(
    "0.3",
    question="With one head silent, how long is attention's write?",
    options=["half of before", "three quarters", "about the same"],
)
def write_with_a_head_silent() -> str:
    ratio = write_ratio(shipped_model())
    names = ("half of before", "three quarters", "about the same")
    return min(zip((0.5, 0.75, 1.0), names, strict=True), key=lambda each: abs(each[0] - ratio))[1]


def write_ratio(model, text: str = FACT) -> float:
    """How long attention's write is with one head silent, the mean over all heads and tokens."""
    ratios = []
    _, before = model.run_with_cache(text, "attn_out")
    for layer, head in itertools.product(range(model.n_layers), range(model.n_heads)):
        with model.hooks(ablate(model, [(layer, head)], Zero())):
            _, after = model.run_with_cache(text, [("attn_out", layer)])
        lengths = [c["attn_out", layer][0, 1:].norm(dim=-1) for c in (after, before)]
        ratios.append(float((lengths[0] / lengths[1]).mean()))
    return sum(ratios) / len(ratios)


def answers_for(lab: LesionLab, pair) -> int:
    """How many answers the lesson takes: documents for the weaker effect, to a third of it."""
    part, skill = pair.weaker
    changes = lab.changes([part], skill)
    return min(4 * documents_needed(changes, float(changes.mean()) / 3), MOST_ANSWERS)


@prediction(
    "0.4",
    question="On fresh documents, the two effects are…",
    options=["both smaller", "one of each", "both larger"],
)
def fresh_against_table() -> str:
    lab, pair = shipped_pair()
    fresh = fresh_lab(lab, pair, answers_for(lab, pair))
    larger = 0
    for part, own in zip(pair.parts, pair.skills, strict=True):
        larger += fresh.damage([part])[own][0] > pair.table[part, own]
    return ["both smaller", "one of each", "both larger"][larger]


# -- the investigation -----------------------------------------------------------------------

MOST_PARTS = 6


@functools.cache
def judge() -> LesionLab:
    """Documents that the investigation is scored on; no other lab of the lesson has them."""
    return LesionLab(shipped_model(), make_batch(shipped_model(), 16, 70_000, skills()))


def selectivity(parts, skill: str) -> float:
    """kept · spared, each 0 to 1: the damage to a skill, and what is left of the others.

    kept    damage to the skill over 3 nats, at most 1
    spared  1 less the mean of the same over all other skills
    """
    harm = {name: min(max(mean / 3, 0), 1) for name, (mean, _) in judge().damage(parts).items()}
    kept = harm.pop(skill)
    return kept * (1 - sum(harm.values()) / len(harm))


@functools.cache
def best_for(skill: str) -> tuple:
    """The most selective lesion that a search finds: single parts, attention blocks and pairs of
    heads in a layer, then one more part of the ten best."""
    lab = judge()
    found: list[tuple] = [(part,) for part in lab.parts()]
    for layer in range(lab.model.n_layers):
        heads = [("head", layer, head) for head in range(lab.model.n_heads)]
        found += [(("attn", layer, None),), *itertools.combinations(heads, 2)]
    ranked = sorted(found, key=lambda parts: -selectivity(parts, skill))
    joined = [ranked[0] + more for more in ranked[1:11] if not set(more) & set(ranked[0])]
    return max([ranked[0], *joined], key=lambda parts: selectivity(parts, skill))


def random_lesion(rng) -> tuple:
    """A skill and one part, drawn without looking."""
    return rng.choice(skills()), [rng.choice(judge().parts())]


def best_single() -> tuple:
    """The most selective single part for the first skill."""
    skill = skills()[0]
    return skill, [max(judge().parts(), key=lambda part: selectivity([part], skill))]


@investigation(
    "0",
    title="Which parts hold this skill?",
    form='the skill drawn for you and a list of parts, such as ("ioi", [(3, 1), ("mlp", 0)])',
    chance=random_lesion,
    best=lambda: (skills()[0], list(best_for(skills()[0]))),
    good=best_single,
    foolish=[
        "ioi",
        ("ioi", []),
        ("ioi", [(99, 0)]),
        ("ioi", [("neuron", 1)]),
        ("poems", [(0, 0)]),
        ("ioi", "L2 head 1"),
        ("ioi", [(i, h) for i in range(6) for h in range(4)]),
    ],
)
def score_lesion(answer) -> float:
    """Selectivity of the lesion, over that of the best one known for the same skill."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise Wrong(
            f'Give the skill and a list of parts, ("ioi", [(3, 1)]), not {describe(answer)}.'
        )
    skill = one_of(answer[0], skills(), "skills")
    return selectivity(parts_in(answer[1]), skill) / selectivity(best_for(skill), skill)


def parts_in(given) -> tuple:
    """The parts of an answer, each once; `Wrong` says what is none."""
    given = plain(given)
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise Wrong(f'Give a list of parts, [(3, 1), ("mlp", 0)], not {describe(given)}.')
    given = [given] if is_part(given) else list(given)
    if not 1 <= len(given) <= MOST_PARTS:
        raise Wrong(f"Give one to {MOST_PARTS} parts, not {len(given)}.")
    try:
        return tuple(sorted({checked_part(shipped_model(), part) for part in given}))
    except ModelError as error:
        raise Wrong(str(error)) from None
    except Exception:
        raise Wrong(
            'A part is a head (layer, head) or an MLP ("mlp", layer); one of yours is neither.'
        ) from None


def is_part(given) -> bool:
    """Whether a tuple is one part and not a collection of parts."""
    return isinstance(given, tuple) and bool(given) and not isinstance(given[0], (tuple, list))
