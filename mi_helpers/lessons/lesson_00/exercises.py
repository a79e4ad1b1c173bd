"""Exercises of lesson 00, meet the model, its predictions, and its investigation."""

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
    edited,
    edits,
    exercise,
    expect_close,
)
from mi_helpers.course.investigate import investigation, one_of, plain
from mi_helpers.course.predict import prediction
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_00.experiments import (
    MOST_ANSWERS,
    LesionLab,
    fresh_lab,
    left_of_fact,
    mean_and_error,
    shipped_pair,
    skills,
    write_ratio,
)
from mi_helpers.lessons.shared import make_batch, on_model, shipped_model
from mi_helpers.tinyworld.world import World

SHORT = ("facts", "ioi", "pronoun", "agreement", "two_hop")  # families of short sentences
ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def sentence(draw, longest: int = 40) -> str:
    """A TinyWorld document of a few words."""
    family, seed = draw.choice(SHORT), draw.integer(0, 10_000)
    stream = World().documents(seed, family)
    return next(d.text for d in stream if len(d.text.split()) <= longest)


# -- 0.1 -------------------------------------------------------------------------------------


def token_losses(model, text):
    """-log p, in nats, of each token of the text but the first, given those before it: (pos - 1,).

    model(text) gives logits (1, pos, d_vocab), model.tokens(text) gives ids (1, pos).
    """
    ids = model.tokens(text)[0]  # (pos,)
    scores = model(text)[0].log_softmax(-1)  # (pos, d_vocab): position i predicts token i + 1
    return -scores[:-1].gather(-1, ids[1:, None])[:, 0]


def losses_in_numpy(model, text):
    x = model(text)[0].double().numpy()
    p = torch.tensor(x).softmax(-1).numpy()
    return [-math.log(p[i, t]) for i, t in enumerate(model.tokens(text)[0, 1:].tolist())]


def losses_by_cross_entropy(model, text):
    return torch.nn.functional.cross_entropy(
        model(text)[0, :-1], model.tokens(text)[0, 1:], reduction="none"
    )


WRONG_01 = edits(
    token_losses,
    """
    scores[:-1] → scores[1:]
        These are the scores of a token that has already been read: the logits at position i
        predict the token at i + 1.
    ids[1:, None] → ids[:-1, None]
        You pick the token that stands at each position: its logits are about the next one.
    .log_softmax(-1) →
        Logits are not log-probabilities: use `log_softmax` first.
    .log_softmax(-1) → .log_softmax(0)
        The softmax runs over the positions: the probabilities of all tokens, the last axis, sum
        to 1.
    -scores → scores
        A loss is -log p, and so never below 0: the minus sign is missing.
    -scores[:-1] → scores[:-1].exp()
        These are probabilities: take the logarithm, and a minus sign.
    [:, 0] → [:, 0] / math.log(2)
        These are bits: nats use the natural logarithm.
    .gather(-1, ids[1:, None])[:, 0] → .amax(-1)
        This scores the likeliest token, not the one that really came.
    [:, 0] → [:, 0].mean()
        This is the mean: give one number for each token but the first.
    """,
)


@exercise(
    "0.1",
    title="The loss at each token",
    difficulty=2,
    importance=5,
    minutes=6,
    reference=token_losses,
    wrong=WRONG_01,
    right=[losses_in_numpy, losses_by_cross_entropy],
    survivors=ONE_MODEL,
    hints=[
        "At position i the model has read token i, and its logits are about token i + 1.",
        "`model(text).log_softmax(-1)` gives log-probabilities; leave out the last position.",
        "`scores[0, :-1].gather(-1, ids[0, 1:, None])` picks the entries of the tokens that came.",
    ],
)
def check_01(answer) -> None:
    on_model(
        answer,
        token_losses,
        lambda draw: (shipped_model(), sentence(draw)),
        WRONG_01,
        "Which logits predict the second token, and which entry of them is its own?",
    )


# -- 0.2 -------------------------------------------------------------------------------------


def stream_entering(layer, embed, attn_out, mlp_out):
    """The residual stream as it enters block `layer`, (batch, pos, d_model).

    layer              0 to n_layers; n_layers gives the stream that leaves the last block
    embed              (batch, pos, d_model)
    attn_out, mlp_out  (n_layers, batch, pos, d_model), what each block adds
    """
    return embed + attn_out[:layer].sum(0) + mlp_out[:layer].sum(0)


def stream_in_place(layer, embed, attn_out, mlp_out):
    for i in range(layer):
        embed += attn_out[i]
        embed += mlp_out[i]
    return embed


WRONG_02 = edits(
    stream_entering,
    """
    [:layer] → [: layer + 1]
        Block `layer` has not written yet: leave it out.
    embed + attn → attn
        The stream begins with the embedding: add it.
    [:layer].sum(0) → [layer - 1]
        This adds the last block only: the stream keeps all writes.
    [:layer] → [1:layer]
        Block 0 writes, too: begin with it.
    + mlp_out[:layer].sum(0) →
        What the MLPs added is missing.
    .sum(0) → .mean(0)
        Blocks add to the stream: sum, not mean.
    [:layer] →
        This is the stream at the end of the model, not at this block.
    """,
)


@exercise(
    "0.2",
    title="The stream as a running sum",
    difficulty=1,
    importance=5,
    minutes=4,
    reference=stream_entering,
    wrong=WRONG_02,
    right=[
        stream_in_place,
        lambda layer, e, a, m: torch.cat([e[None], a[:layer], m[:layer]]).double().sum(0).numpy(),
    ],
    hints=[
        "Which blocks have already run when block `layer` begins?",
        "`attn_out[:layer]` is what their attention wrote; sum over the first axis.",
    ],
)
def check_02(answer) -> None:
    def given(draw, layer: int | None = None) -> tuple:
        layer = draw.integer(1, draw.size("layers", 4) - 2) if layer is None else layer
        parts = [draw.normal("layers", "batch", "pos", "d_model") for _ in range(2)]
        return layer, draw.normal("batch", "pos", "d_model"), *parts

    agree(
        answer,
        stream_entering,
        given,
        WRONG_02,
        "Sum the embedding and what blocks 0 to layer - 1 added.",
    )
    for draw in draws(1):
        first, last = given(draw, 0), given(draw, draw.size("layers", 4))
        message = "Block 0 should get the embedding, and nothing else."
        expect_close(answer(*first), stream_entering(*first), message)
        message = "After the last block everything has been written."
        expect_close(answer(*last), stream_entering(*last), message, 1e-4)


# -- 0.3 -------------------------------------------------------------------------------------


def attention_pattern(q, k, scale, cap):
    """One head's pattern (q_pos, k_pos): how much each token reads from itself and earlier ones.

    q, k   (pos, d_head), the head's queries and keys
    scale  what each product of a query and a key is multiplied by
    cap    scores are bent to lie within ±cap: cap · tanh(score / cap)
    """
    scores = cap * torch.tanh(scale * q @ k.T / cap)  # (q_pos, k_pos)
    later = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def pattern_by_rows(q, k, scale, cap):
    rows = []
    for i in range(len(q)):
        scores = [cap * math.tanh(float(scale * (q[i] @ k[j])) / cap) for j in range(i + 1)]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append([w / sum(weights) for w in weights] + [0.0] * (len(q) - i - 1))
    return rows


def pattern_where(q, k, scale, cap):
    q *= scale
    scores = torch.where(torch.ones(len(q), len(q)).tril() > 0, q @ k.T, torch.nan).double()
    return (scores.div(cap).tanh() * cap).nan_to_num(-1e9).softmax(1).numpy()


WRONG_03 = edits(
    attention_pattern,
    """
    .masked_fill(later, -torch.inf) →
        A token reads from tokens that come later: mask them.
    scale * q → q
        The products are too large: multiply by `scale` before you bend them.
    cap * torch.tanh(scale * q @ k.T / cap) → scale * q @ k.T
        After scaling, bend the scores: cap · tanh(score / cap).
    cap * torch.tanh(scale * q @ k.T / cap) → (scale * q @ k.T).clamp(-cap, cap)
        This cuts hard at the cap: use tanh, which bends.
    cap * torch → torch
        A tanh lies within ±1: multiply it by the cap.
    cap * torch.tanh(scale * q @ k.T / cap) → scale * cap * torch.tanh(q @ k.T / cap)
        You bend first and scale then: scale before you bend.
    .softmax(-1) → .softmax(0)
        Each row should sum to 1: softmax over the keys, the last axis.
    -torch.inf → 0.0
        A masked score of 0 still gets weight, as e to the 0 is 1: use minus infinity.
    -torch.inf → -cap
        Later tokens have a score of -cap and get some weight: use minus infinity, after
        bending, as tanh makes a mere -cap of it.
    masked_fill(later, -torch.inf).softmax(-1) → softmax(-1).masked_fill(later, 0)
        Mask before the softmax, so that each row still sums to 1.
    triu(1) → tril(-1)
        You masked the wrong half: a token reads from itself and earlier ones.
    triu(1) → triu(0)
        You masked the token itself, too: the first one then has nothing to read.
    scale * q → q.shape[-1] ** -0.5 * q
        Use the `scale` that is given: it need not be 1/√d_head.
    q @ k.T → k @ q.T
        Queries and keys are swapped: the row belongs to the query.
    """,
)


@exercise(
    "0.3",
    title="Where a head looks",
    difficulty=3,
    importance=5,
    minutes=8,
    reference=attention_pattern,
    wrong=WRONG_03,
    right=[pattern_by_rows, pattern_where],
    hints=[
        "`q @ k.T` has a row for each token that looks, a column for each that is looked at.",
        "Scale, then bend. Scores of later tokens become minus infinity before the softmax.",
        "`torch.ones_like(scores).triu(1).bool()` is True at later tokens; `masked_fill`.",
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
        WRONG_03,
        "Scale, bend, mask, softmax, in this order; each row sums to 1.",
        tolerance=1e-4,
    )


# -- 0.4 -------------------------------------------------------------------------------------


def head_writes(pattern, v, W_O, head):
    """What one head gives for each token, in the stream's width: (pos, d_model).

    pattern  (n_heads, q_pos, k_pos)
    v        (pos, n_kv_heads, d_head); neighbouring heads share one
    W_O      (n_heads, d_head, d_model)
    """
    share = len(W_O) // v.shape[1]  # so many heads have the same values
    z = pattern[head] @ v[:, head // share]  # (q_pos, d_head)
    return z @ W_O[head]


def writes_by_einsum(pattern, v, W_O, head):
    values = v.repeat_interleave(W_O.shape[0] // v.shape[1], 1)
    return torch.einsum("qk,kd,dm->qm", pattern[head], values[:, head], W_O[head])


def writes_in_numpy(pattern, v, W_O, head):
    pattern, v, W_O = (x.double().numpy() for x in (pattern, v, W_O))
    return pattern[head] @ v[:, head * v.shape[1] // W_O.shape[0]] @ W_O[head]


def drawn_head(draw) -> tuple:
    """Arguments of `head_writes`: two or three key-value heads, and another number of heads for
    each of them."""
    kv = draw.integer(2, 3)
    share = draw.choice([3, 4] if kv == 2 else [2, 4])
    pattern = draw.attention(kv * share, "pos")
    v, W_O = draw.normal("pos", kv, "d_head"), draw.normal(kv * share, "d_head", "d_model")
    return pattern, v, W_O, draw.integer(share, kv * share - 1)


WRONG_04 = [
    *edits(
        head_writes,
        """
    head // share → 0
        These are the values of key-value head 0: which one serves this head?
    head // share → head % v.shape[1]
        Heads that are neighbours share values: with two heads to each, 0 and 1, then 2 and 3.
    // share → // v.shape[1] % v.shape[1]
        Divide by how many heads share one, not by how many key-value heads there are.
    pattern[head] → pattern[head].T
        The rows of the pattern belong to the token that reads.
    @ W_O[head] →
        This is z, of d_head numbers: W_O takes it to the stream's width.
    pattern[head] @ →
        The values are not mixed: use the weights of the pattern.
    W_O[head] → W_O[head // share]
        Each head has a W_O of its own: only values are shared.
    """,
    ),
    (
        lambda pattern, v, W_O, head: sum(
            head_writes(pattern, v, W_O, each) for each in range(len(W_O))
        ),
        "This is the sum of all heads: give this one's term.",
    ),
]


@exercise(
    "0.4",
    title="What a head writes",
    difficulty=3,
    importance=4,
    minutes=7,
    reference=head_writes,
    wrong=WRONG_04,
    right=[writes_by_einsum, writes_in_numpy],
    hints=[
        "Each row of the pattern is a weighted average: multiply it with the values.",
        "With 4 heads and 2 key-value heads, heads 0 and 1 read values 0, heads 2 and 3 values 1.",
        "`pattern[head] @ v[:, ...]` is (pos, d_head); `W_O[head]` takes it to d_model.",
    ],
)
def check_04(answer) -> None:
    agree(
        answer,
        head_writes,
        drawn_head,
        WRONG_04,
        "Average the values with the pattern's rows, then multiply with this head's W_O.",
    )


# -- 0.5 -------------------------------------------------------------------------------------


def without_head(model, text, layer, head):
    """Logits (1, pos, d_vocab) with one head's z zero at every position but the first.

    The site ("z", layer) holds (batch, pos, n_heads, d_head). Afterwards the model is intact.
    """

    def silence(z):
        z[:, 1:, head] = 0
        return z

    with model.hooks({("z", layer): silence}):
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
        return model(text).numpy()


def for_good(model, text, layer, head):
    with torch.no_grad():
        model.part("o", layer).weight[:, head * model.d_head : (head + 1) * model.d_head] = 0
    return model(text)


def place(draw) -> tuple:
    """(model, sentence, layer, head)"""
    model = shipped_model()
    text = sentence(draw)
    return model, text, draw.integer(0, model.n_layers - 1), draw.integer(1, model.n_heads - 1)


WRONG_05 = edits(
    without_head,
    """
    return z → return None
        Nothing changed: does the hook return z, and the run stand in the block?
    z[:, 1:, head] → z[:, :, head]
        The first position changed, too: leave `<bos>` as it is.
    z[:, 1:, head] → z[:, -1:, head]
        Only the last position changed: silence the head at every one but the first.
    z[:, 1:, head] → z[:, head]
        You silenced a *token*: heads are the third axis, after batch and pos.
    z[:, 1:, head] → z[:, 1:, :, head]
        You silenced one number of every head: heads are the third axis.
    z[:, 1:, head] → z[:, 1:, torch.arange(z.shape[2]) != head]
        You silenced all heads but this one.
    z[:, 1:, head] → z[:, 1:]
        You silenced all heads of the layer.
    ("z", layer): silence → "z": silence
        You silenced this head in every layer: name the layer in the site.
    """,
)


@exercise(
    "0.5",
    title="Silence one head",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=without_head,
    wrong=[*WRONG_05, (for_good, "stays changed")],
    right=[without_head_by_library, without_head_by_product],
    survivors=ONE_MODEL,
    hints=[
        "Write a function of z that changes it and returns it, and give it to `model.hooks`.",
        '`with model.hooks({("z", layer): silence}):` and run the model inside the block.',
        "All texts, positions from 1 on, this head: `z[:, 1:, head]`.",
    ],
)
def check_05(answer) -> None:
    otherwise = "Only z[:, 1:, head] of this layer should be zero."
    on_model(answer, without_head, place, WRONG_05, otherwise, cases=4)


# -- 0.6 -------------------------------------------------------------------------------------


def mean_lesion(model, text, layer, head, others):
    """As without_head, but z gets the head's mean over all tokens of other texts, <bos> left out.

    others  a list of texts, of different lengths; each token counts once
    """
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


def mean_by_library(model, text, layer, head, others):
    rows = [model.run_with_cache(o, [("z", layer)])[1]["z", layer][0, 1:] for o in others]
    reference = {("z", layer): torch.cat(rows)}
    with model.hooks(ablate(model, [(layer, head)], Mean(reference))):
        return model(text)


def mean_as_it_goes(model, text, layer, head, others):
    total, count = 0, 0
    for other in others:
        z = model.run_with_cache(other, [("z", layer)])[1]["z", layer][0, 1:, head].double()
        total, count = total + z.sum(0), count + len(z)

    def replace(z):
        z = z.clone()
        z[:, 1:, head] = (total / count).float()
        return z

    with model.hooks({("z", layer): replace}):
        return model(text).numpy()


WRONG_06 = edits(
    mean_lesion,
    """
    ["z", layer][0, 1:, head] → ["z", layer][0, :, head]
        `<bos>` is in the mean: it is the same everywhere, leave it out.
    ["z", layer][0, 1:, head] → ["z", layer][0, 1:, head].mean(0, keepdim=True)
        Here each text counts once: let each token count once.
    torch.cat(seen).mean(0) → torch.cat(seen).mean()
        This is one number: keep d_head, average over tokens only.
    ["z", layer][0, 1:, head] → ["z", layer][0, 1:].mean(1)
        This averages over the heads: take this head's own mean.
    in others: → in [text]:
        This is this text's own mean: it still knows what the text is about.
    in others: → in [*others, text]:
        This text is in its own mean: take the other texts alone.
    in others: → in others[:1]:
        This is the mean of the first of the other texts: use all of them.
    in others: → in [" ".join(others)]:
        You run the texts as one: a token's z depends on what stands before it.
    ] = mean → ] = 0
        This is the zero lesion: put the mean there.
    z[:, 1:, head] = mean → z[:, :, head] = mean
        The first position changed, too: leave `<bos>` as it is.
    """,
)


@exercise(
    "0.6",
    title="The mean lesion",
    difficulty=4,
    importance=4,
    minutes=7,
    reference=mean_lesion,
    wrong=WRONG_06,
    right=[mean_by_library, mean_as_it_goes],
    survivors=ONE_MODEL,
    hints=[
        "Run the model on each other text, and keep its z: "
        '`_, cache = model.run_with_cache(other, [("z", layer)])`.',
        '`cache["z", layer][0, 1:, head]` is (tokens, d_head): put all texts\' rows together.',
        "`torch.cat(rows).mean(0)`, and then as in 0.5, with this vector in place of 0.",
    ],
)
def check_06(answer) -> None:
    on_model(
        answer,
        mean_lesion,
        lambda draw: (*place(draw), [sentence(draw), f"{sentence(draw)} {sentence(draw)}"]),
        WRONG_06,
        "Average z[0, 1:, head] over all tokens of the other texts, and put it at positions 1 on.",
        cases=2,
    )


# -- 0.7 -------------------------------------------------------------------------------------


def costs_in_numpy(after, before, document):
    import numpy as np

    change, place = (after - before).numpy(), document.numpy()
    each = np.array([change[place == d].mean() for d in sorted(set(place.tolist()))])
    error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.inf
    return [float(each.mean()), float(error)]


def costs_in_python(after, before, document):
    import statistics

    groups = {}
    for a, b, d in zip(after.tolist(), before.tolist(), document.tolist(), strict=True):
        groups.setdefault(d, []).append(a - b)
    each = [statistics.mean(values) for values in groups.values()]
    spread = statistics.stdev(each) if len(each) > 1 else math.inf
    return statistics.mean(each), spread / len(each) ** 0.5


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


ALONE = "One document does not say how much documents differ: its error is `math.inf`."
WRONG_07 = edits(
    mean_and_error,
    """
    torch.stack([change[document == each].mean() → torch.cat([change[document == each]
        This counts as if answers of one document were independent: they aren't.
    means.std() / len(means) ** 0.5 → means.std()
        This is the spread of the documents; the mean's error is smaller by √n.
    means.std() / len(means) ** 0.5 → means.std(correction=0) / len(means) ** 0.5
        This standard deviation divides by n: divide by n - 1 (`ddof=1` in NumPy).
    means.std() / len(means) ** 0.5 → means.std() / len(change) ** 0.5
        Divide by the root of the number of documents, not of answers.
    means.std() / len(means) ** 0.5 → means.std() / len(means)
        Divide by the square root of the number of documents.
    after - before → before - after
        The sign is the wrong way round: damage is after less before.
    after - before → (after - before).abs()
        A change may be negative, too: no absolute value.
    after - before → after
        This is the loss after the lesion: subtract the loss before.
    means.std() / len(means) ** 0.5 → 2 * means.std() / len(means) ** 0.5
        These are two standard errors: return one.
    return means.mean() → return change.mean()
        The mean is over answers: let each document count once.
    == each].mean() → == each].sum()
        Take the average within a document, not the sum.
    means.std() / len(means) ** 0.5 → change.std() / len(change) ** 0.5
        The error is that of the mean over answers: take the documents' means for it, too.
    """,
)


@exercise(
    "0.7",
    title="What a lesion costs, and how sure that is",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=mean_and_error,
    wrong=[*WRONG_07, (edited(mean_and_error, "len(means) > 1", "True"), ALONE)],
    right=[costs_in_numpy, costs_in_python],
    hints=[
        "Subtract first: each answer is compared with itself.",
        "`change[document == d].mean()` for each d in `document.unique()`: one number a document.",
        "The standard error of a mean of n numbers is their standard deviation over √n.",
    ],
)
def check_07(answer) -> None:
    otherwise = "One mean change for each document; then their mean, and their sd over √n."
    agree(answer, mean_and_error, answers_of_documents, WRONG_07, otherwise)
    for draw in draws(1):
        after, before, document = answers_of_documents(draw)
        expect_close(
            answer(after, before, document * 0), ((after - before).mean(), math.inf), ALONE
        )


# -- 0.8 -------------------------------------------------------------------------------------


def documents_needed(changes, effect):
    """The smallest number of documents with which two standard errors are at most `effect`.

    changes  (documents,), the cost of a lesion in each document of a first, small sample
    """
    return math.ceil((2 * float(changes.std()) / effect) ** 2)


def needed_by_search(changes, effect):
    sd = float(as_numbers(changes).std(ddof=1))
    return next(n for n in itertools.count(1) if 2 * sd / n**0.5 <= effect)


def whole_case(draw) -> tuple:
    """Changes and an effect for which the number is 50 to 5,000, and far from a whole one."""
    changes = draw.normal("documents")
    wanted = draw.integer(50, 5_000) - draw.number(0.2, 0.8)
    return changes, 2 * float(changes.std()) / wanted**0.5


WRONG_08 = edits(
    documents_needed,
    """
    (2 * float → (float
        With these, one standard error is that small; ask for two standard errors.
    ** 2 →
        Half the error takes four times the documents: there is a square missing.
    ((2 → (len(changes) * (2
        The number does not depend on how many documents the first sample had.
    changes.std() → changes.std() / len(changes) ** 0.5
        You began with the standard error of the sample: take its standard deviation, not the
        error.
    std() → std(correction=0)
        This standard deviation divides by n: a sample's divides by n - 1.
    math.ceil → math.floor
        With one document fewer the error is still too large: round up.
    """,
)


@exercise(
    "0.8",
    title="How many documents an effect needs",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=documents_needed,
    wrong=WRONG_08,
    right=[
        needed_by_search,
        lambda changes, effect: torch.ceil(4 * changes.double().var() / effect**2),
    ],
    hints=[
        "The standard error with n documents is sd / √n. Write down the condition, solve for n.",
        "Round up: `math.ceil`.",
    ],
    after="That was the last exercise. The investigation is waiting.",
)
def check_08(answer) -> None:
    otherwise = "Solve 2 · sd / √n <= effect for n, and round up."
    agree(answer, documents_needed, whole_case, WRONG_08, otherwise, tolerance=1e-9)


# -- 0.9, going further ----------------------------------------------------------------------


def block_parameters(d_model, n_heads, n_kv_heads, d_head, d_mlp):
    """How many parameters one Gemma 2 block has: attention, a gated MLP, four norms, no biases."""
    attention = 2 * d_model * n_heads * d_head + 2 * d_model * n_kv_heads * d_head
    return attention + 3 * d_model * d_mlp + 4 * d_model


WRONG_09 = edits(
    block_parameters,
    """
    n_kv_heads * d → n_heads * d
        W_K and W_V are smaller: they serve `n_kv_heads` heads.
    2 * d_model * n_heads * d_head + → 2 * d_model**2 +
        n_heads · d_head is not d_model here: use both.
    = 2 * d_model → = d_model
        Attention has four matrices: W_Q, W_K, W_V and W_O.
    3 * d_model → 2 * d_model
        A gated MLP has three matrices: W_gate, W_in and W_out.
    4 * d_model → 2 * d_model
        There are four norms in a block, before and after attention and MLP.
    + 4 * d_model →
        Each of the four norms has d_model weights of its own.
    """,
)


@exercise(
    "0.9",
    title="Counting a block's parameters (going further)",
    difficulty=2,
    importance=2,
    minutes=8,
    reference=block_parameters,
    wrong=WRONG_09,
    hints=[
        "Go down the drawing and multiply out the shape of each weight.",
        "W_Q and W_O have n_heads · d_head on one side, W_K and W_V n_kv_heads · d_head.",
        "Three MLP matrices of d_model · d_mlp, and four norms of d_model.",
    ],
)
def check_09(answer) -> None:
    agree(
        answer,
        block_parameters,
        lambda draw: tuple(draw.size(axis, 3, 40) for axis in ("a", "b", "c", "d", "e")),
        WRONG_09,
        "List the matrices first, each with its shape.",
    )


# -- predictions -----------------------------------------------------------------------------


@prediction(
    "0.1",
    question="How many heads, silenced alone, take the fact away?",
    options=["none", "one", "more"],
)
@functools.cache
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
@functools.cache
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
@functools.cache
def write_with_a_head_silent() -> str:
    ratio = write_ratio(shipped_model())
    names = ("half of before", "three quarters", "about the same")
    return min(zip((0.5, 0.75, 1.0), names, strict=True), key=lambda each: abs(each[0] - ratio))[1]


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
@functools.cache
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
    """The most selective lesion that a search finds: the best of single parts, attention blocks
    and pairs of heads in a layer, and then one or two more of the ten best, while that helps."""
    lab = judge()
    found: list[tuple] = [(part,) for part in lab.parts()]
    for layer in range(lab.model.n_layers):
        heads = [("head", layer, head) for head in range(lab.model.n_heads)]
        found += [(("attn", layer, None),), *itertools.combinations(heads, 2)]
    best, *others = sorted(found, key=lambda parts: -selectivity(parts, skill))[:11]
    while joined := [
        best + more
        for more in others
        if not set(more) & set(best) and len(best + more) <= MOST_PARTS
    ]:
        better = max(joined, key=lambda parts: selectivity(parts, skill))
        if selectivity(better, skill) <= selectivity(best, skill):
            break
        best = better
    return best


def random_lesion(rng) -> tuple:
    """A skill and one part, drawn without looking."""
    return rng.choice(skills()), [rng.choice(judge().parts())]


def best_single() -> tuple:
    """The most selective single part for a skill that several hold."""
    skill = "ioi"
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
