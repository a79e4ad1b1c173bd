"""Exercises of lesson 10, steering."""

import functools

import numpy as np
import torch

from mi_helpers.course.check import Wrong, agree, draws, edits, exercise, expect
from mi_helpers.lessons.lesson_10 import experiments as lab10
from mi_helpers.lessons.lesson_10.predictions import (  # noqa: F401, the course looks here
    dearest_family,
    right_when_pushed,
    score_steering,
    share_at_the_highest,
    stranger_text,
    turned_when_mirrored,
)
from mi_helpers.lessons.lesson_10.tools import (
    clamp,
    contrast,
    cost_of,
    dose_response,
    fair_control,
    mirror,
    push_from,
    share_about,
    write_on,
)
from mi_helpers.lessons.shared import on_model, repeated_tokens, shipped_model
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.steering import Add, steered

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def token_ids(draw) -> torch.Tensor:
    """Random words, (batch, pos), BOS first."""
    n, length = draw.size("batch", 2, 4), draw.size("pos", 6, 11)
    return repeated_tokens(shipped_model(), n, length, draw.integer(0, 9999), times=1)


def a_site(draw) -> tuple[str, int]:
    """The stream after one of the blocks, the last left out."""
    return "resid_post", draw.integer(0, shipped_model().n_layers - 2)


# -- 10.1 ------------------------------------------------------------------------------------


def push_by_mask(model, ids, site, vector, start):
    mask = (torch.arange(ids.shape[1]) >= start).float()[None, :, None]
    with model.hooks({site: lambda x: x + mask * torch.as_tensor(vector)}):
        return model.forward(ids)


MISTAKES_101 = edits(
    push_from,
    """
    x[:, start:] → x[:, :start]
        This changes what stands before the position: change it and all that follow.
    x[:, start:] → x[:, start]
        One position alone is changed: all from `start` on should be.
    x[:, start:] → x[:, start + 1:]
        This begins one position too late.
    x[:, start:] → x
        Every position is changed, those before `start` too.
    += vector → = vector
        The stream is replaced by the vector: add it.
    += vector → -= vector
        The vector is subtracted: add it.
    += vector → += vector / vector.norm()
        The vector's length has been changed: add it as it is.
    return model(ids) → return model(ids)[:, -1]
        These are the logits of the last position: give those of all.
    return model(ids) → return model(ids).softmax(-1)
        These are probabilities: give the logits.
    """,
) + [
    (
        lambda model, ids, *_: model(ids),
        "Nothing has changed: does your hook return the stream, and the model run inside the "
        "`with`?",
    )
]


@exercise(
    "10.1",
    title="Push from a position on",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=push_from,
    survivors=ONE_MODEL,
    right=[push_by_mask],
    wrong=MISTAKES_101,
    hints=[
        "A hook is a function of the stream at the site; what it returns, the model goes on with.",
        "The stream is (batch, pos, d_model): `x[:, start:]` are the positions from `start` on.",
        "`with model.hooks({site: push}): return model(ids)`.",
    ],
)
def check_101(answer) -> None:
    def make(draw) -> tuple:
        ids = token_ids(draw)
        vector = draw.normal(shipped_model().d_model, scale=2)
        return shipped_model(), ids, a_site(draw), vector, draw.integer(2, ids.shape[1] - 3)

    otherwise = "x[:, start:] should go on as x + vector, and nothing else change."
    on_model(answer, push_from, make, MISTAKES_101, otherwise, cases=2)


# -- 10.2 ------------------------------------------------------------------------------------


def write_by_list(logits_of, ids, n, choose):
    columns = list(torch.as_tensor(ids).unbind(1))
    while len(columns) < ids.shape[1] + n:
        columns.append(choose(logits_of(torch.stack(columns, 1))[:, -1, :]))
    return torch.stack(columns, 1)


MISTAKES_102 = edits(
    write_on,
    """
    [:, -1] → [:, 0]
        You choose from the logits of the first position: the last one's are for the next token.
    [:, -1] → [:, ids.shape[1] // 2]
        You choose from a position in the middle: take the last.
    logits_of(ids)[:, -1] → logits_of(ids[:, -1:])[:, -1]
        The model reads the newest token alone: give it the whole text each time.
    range(n) → range(n - 1)
        One token is missing.
    return ids → return ids[:, -n:]
        The beginning is missing: return it with what was written.
    [ids, new[:, None]] → [new[:, None], ids]
        New tokens stand in front: they belong at the end.
    choose(logits_of(ids)[:, -1]) → logits_of(ids)[:, -1].argmax(-1)
        You take the likeliest token: let `choose` choose.
    choose(logits_of(ids)[:, -1]) → choose(logits_of(ids)[:, -1].softmax(-1))
        `choose` gets probabilities: hand it the logits.
    choose(logits_of(ids)[:, -1]) → choose(logits_of(ids)[:, -1] / 0.7)
        The logits are divided by something: hand them to `choose` as they are.
    """,
) + [
    (
        lambda logits_of, ids, n, choose: torch.cat(
            [ids, choose(logits_of(ids)[:, -1])[:, None].expand(-1, n)], 1
        ),
        "All new tokens are the same: run the text again with each new token.",
    )
]


@exercise(
    "10.2",
    title="Write on",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=write_on,
    right=[write_by_list],
    wrong=MISTAKES_102,
    hints=[
        "A loop: logits of the whole text so far, the last position's, choose, append.",
        "`torch.cat([ids, new[:, None]], 1)` puts a column of tokens behind the text.",
    ],
)
def check_102(answer) -> None:
    def make(draw) -> tuple:
        ids, rank = token_ids(draw), draw.integer(1, 4)
        v = draw.normal(shipped_model().d_model, scale=1)

        def logits_of(ids):
            with steered(shipped_model(), ("resid_post", 3), Add(v)):
                return shipped_model()(ids)

        def choose(logits):  # neither the likeliest token nor one by chance; of logits alone
            at = rank + (logits.amax(-1) - logits.mean(-1)).round().long() % 3
            return logits.topk(rank + 3, dim=-1).indices.gather(1, at[:, None])[:, 0]

        return logits_of, ids, draw.integer(3, 5), choose

    otherwise = "Each new token should be choose(logits_of(the text so far)[:, -1])."
    on_model(answer, write_on, make, MISTAKES_102, otherwise, cases=2)


# -- 10.3 ------------------------------------------------------------------------------------


def share_in_two_counts(texts, topics_of, topic):
    words = sum(map(list, texts), [])
    hits = sum(topic in topics_of.get(word, ()) for word in words)
    return hits / max(1, sum(word in topics_of for word in words))


MISTAKES_103 = edits(
    share_about,
    """
    topics_of[word] for text → topics_of.get(word, ()) for text
    & if word in topics_of] → ]
        Every word counts below the line: only the topical ones should.
    topic in topics for → topics == {topic} for
        A word that another topic has, too, is left out: it counts if the topic is among its topics.
    """,
) + [
    (
        lambda texts, topics_of, topic: float(
            np.mean([share_about([text], topics_of, topic) for text in texts])
        ),
        "This is the mean of the texts' shares: count the words of all texts together.",
    ),
    (
        lambda texts, topics_of, topic: share_about([set(t) for t in texts], topics_of, topic),
        "A word that comes twice counts once here: count it each time.",
    ),
    (
        lambda texts, topics_of, topic: sum(
            topic in topics_of.get(word, ()) for text in texts for word in text
        ),
        "This is a count: divide by the number of topical words.",
    ),
    (
        lambda texts, topics_of, topic: (
            sum(topic in topics_of.get(word, ()) for text in texts for word in text)
            / sum(len(topics_of.get(word, ())) for text in texts for word in text)
            if any(word in topics_of for text in texts for word in text)
            else 0.0
        ),
        "A word of two topics counts twice below the line: count words.",
    ),
]


@exercise(
    "10.3",
    title="What is it about?",
    difficulty=1,
    importance=4,
    minutes=4,
    reference=share_about,
    right=[share_in_two_counts],
    wrong=MISTAKES_103,
    hints=[
        "Collect the topics of every topical word in all the texts, in one list.",
        "`topic in topics_of[word]` says whether a word is the topic's.",
    ],
)
def check_103(answer) -> None:
    def make(draw) -> tuple:
        names = [f"topic {i}" for i in range(draw.size("topics", 4, 7))]
        topics_of = {}
        for i in range(draw.size("topical", 11, 16)):
            topics_of[f"word {i}"] = {draw.rng.choice(names) for _ in range(1 + i % 3)}
        pool = [*topics_of, "the", "of", "is"]
        lengths = [draw.rng.integers(2, 19) for _ in range(draw.size("texts", 3, 6))]
        texts = [[str(draw.rng.choice(pool)) for _ in range(n)] for n in lengths]
        return texts, topics_of, draw.choice(names)

    otherwise = "Over all texts: topical words with the topic among theirs, over topical words."
    agree(answer, share_about, make, MISTAKES_103, otherwise)
    oak = {"oak": {"trees"}}
    expect(answer([["the", "of"]], oak, "trees") == 0, "Without a topical word the share is 0.")
    expect(answer([["the", "oak"]], oak, "trees") == 1, "One topical word of one is a share of 1.")


# -- 10.4 ------------------------------------------------------------------------------------


def response_by_lists(model, site, steer, doses, concept, cost):
    found, paid = [], []
    before = cost(model)
    for dose in doses:
        with steered(model, site, steer(dose)):
            paid += [cost(model)]
            found += [concept(model)]
    return np.array([found, [each - before for each in paid]]).T


MISTAKES_104 = edits(
    dose_response,
    """
    cost(model) - clean → cost(model)
        The second column is the whole loss: subtract what it is without steering.
    cost(model) - clean → clean - cost(model)
        The cost has the wrong sign: it is how much the loss rises.
    concept(model), cost(model) - clean → cost(model) - clean, concept(model)
        The columns are swapped.
    concept(model), cost(model) → concept(model) - begun, cost(model)
    & clean = cost(model) → clean, begun = cost(model), concept(model)
        The first column is how the concept changes: give what it is.
    np.array(rows) → np.array(rows).T
        These are two rows: give one row for each dose.
    steer(dose) → steer(doses[0])
        Every dose is the first one: steer anew for each.
    cost(model) - clean → max(0.0, cost(model) - clean)
        A cost below zero is cut off: steering may lower it, too.
    cost(model) - clean → abs(cost(model) - clean)
        The sign of the cost is lost: steering may lower it, too.
    cost(model) - clean → cost(model) - cost(model)
        Nothing costs anything here: measure it once without steering, before the loop.
    with steered(model, site, steer(dose)): → if True:
        Nothing is steered: measure inside `with steered(…):`.
    """,
)


@exercise(
    "10.4",
    title="Dose and response",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=dose_response,
    survivors=ONE_MODEL,
    right=[response_by_lists],
    wrong=MISTAKES_104,
    hints=[
        "Measure the cost once before the loop, without steering.",
        "Inside `with steered(model, site, steer(dose)):` call both functions on the model.",
    ],
)
def check_104(answer) -> None:
    def make(draw) -> tuple:
        model, ids = shipped_model(), token_ids(draw)
        token, v = draw.integer(20, 3000), draw.normal(model.d_model, scale=1)
        other = draw.integer(20, 3000)
        n = draw.size("doses", 2, 4)
        doses = sorted(draw.number(-4, 4) for _ in range(n))

        def concept(model):
            return float(model(ids)[:, -1, token].mean())

        def cost(model):  # a number that steering raises or lowers; a loss it only raises
            return float(model(ids)[:, -2, other].mean())

        return model, a_site(draw), functools.partial(Add, v), doses, concept, cost

    otherwise = "Each row should be concept(model) and cost(model) - clean under steer(dose)."
    on_model(answer, dose_response, make, MISTAKES_104, otherwise, cases=2)


# -- 10.5 ------------------------------------------------------------------------------------


def clamp_by_decoding(x, coder, latent, value):
    f = coder.encode(x)
    left = x - coder.decode(f)
    f[:, latent] = value
    return left + coder.decode(f)


MISTAKES_105 = edits(
    clamp,
    """
    (value - now)[:, None] → value
        The value is added to what is there: a clamp adds what is missing.
    (value - now)[:, None] → (value - now.mean())
        What is missing is another amount at each row.
    coder.encode(x)[:, latent] → x @ coder.W_dec[latent]
        This is how far x goes along the latent's row: its value is what `coder.encode` gives.
    coder.encode(x)[:, latent] → x @ coder.W_dec[latent] / coder.W_dec[latent].square().sum()
        This is the projection of x on the latent's row: its value is what `coder.encode` gives.
    return x + → return coder(x) +
        You go on with the reconstruction: what the autoencoder leaves out of x is lost.
    (value - now) → (now - value)
        The sign is wrong: add value - f.
    (value - now)[:, None] → ((value - now) * (now > 0))[:, None]
        Only rows where the latent is on already are clamped.
    (value - now)[:, None] → ((value - now) * (now < value))[:, None]
        Rows in which the latent is higher stay as they are: they come down to the value, too.
    coder.W_dec[latent] → coder.W_enc[:, latent]
        This is what the latent reads with: it writes along its row of W_dec.
    coder.W_dec[latent] → coder.W_dec[latent] / coder.W_dec[latent].norm()
        The row's length has been changed: a latent writes its value times the row as it is.
    return x + → return
        x itself is missing.
    """,
)


@exercise(
    "10.5",
    title="Clamp a latent",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=clamp,
    right=[clamp_by_decoding],
    wrong=MISTAKES_105,
    hints=[
        "`coder.encode(x)[:, latent]` is what the latent has at each row now.",
        "Add what is missing, value - now, times the latent's row of W_dec.",
    ],
)
def check_105(answer) -> None:
    def make(draw) -> tuple:
        d, latents = draw.size("d", 6, 9), draw.size("latents", 12, 19)
        coder = SparseCoder(d, latents, k=draw.integer(3, 5), seed=draw.integer(0, 99))
        with torch.no_grad():
            coder.b_dec += draw.normal(d, scale=0.3)
            coder.W_dec *= draw.number(1.3, 1.8)  # a row need not be of length 1
            coder.W_enc += draw.normal(d, latents, scale=0.2)  # it begins as W_dec turned round
        coder.requires_grad_(False)
        x = 2 * draw.normal(draw.size("rows", 20, 30), d)
        latent = int((coder.encode(x) > 0).float().mean(0).sub(0.4).abs().argmin())
        return x, coder, latent, float(coder.encode(x)[:, latent].max()) * draw.number(0.3, 0.7)

    otherwise = "Each row should be x + (value - f) · W_dec[latent]."
    agree(answer, clamp, make, MISTAKES_105, otherwise, 1e-4)


# -- 10.6 ------------------------------------------------------------------------------------


def cost_by_search(wanted, concept, cost):
    concept, cost = np.asarray(concept, dtype=float), np.asarray(cost, dtype=float)
    there = np.flatnonzero(concept >= wanted)
    if not len(there):
        return np.inf
    i = slice(there[0] - 1, there[0] + 1)
    return np.interp(wanted, concept[i], cost[i])


MISTAKES_106 = edits(
    cost_of,
    """
    return cost[i - 1] + part * (cost[i] - cost[i - 1]) → return cost[i]
        This is the cost at the next dose: go in a straight line between the two.
    return cost[i - 1] + part * (cost[i] - cost[i - 1]) → return part * (cost[i] - cost[i - 1])
        The cost at the dose before is left out.
    cost[i - 1] + part * → cost[i] - part *
        You go backwards from the later dose: `part` is counted from the earlier one.
    return float("inf") → return cost[-1]
        Where the concept is never reached the cost is infinite.
    range(1, len(concept)) → range(len(concept) - 1, 0, -1)
        The concept may fall again: take the first time that it is reached.
    """,
) + [
    (
        lambda wanted, concept, cost: float(
            np.interp(wanted, np.sort(concept), np.asarray(cost)[np.argsort(concept)], right=np.inf)
        ),
        "You sort by the concept: keep the order of the doses, as it may fall again.",
    ),
    (
        lambda wanted, concept, cost: (
            float(np.interp(wanted, concept, cost)) if max(concept) >= wanted else np.inf
        ),
        "np.interp wants the concept to rise all along, and it may fall: find the first dose.",
    ),
    (
        lambda wanted, concept, cost: next(
            (a for a, there in zip(cost, concept[1:], strict=False) if there >= wanted), np.inf
        ),
        "This is the cost at the dose before: go in a straight line between the two.",
    ),
]


@exercise(
    "10.6",
    title="Compare at equal effect",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=cost_of,
    right=[cost_by_search],
    survivors={"concept[i] >= wanted → concept[i] > wanted": "at a dose itself both give its cost"},
    wrong=MISTAKES_106,
    hints=[
        "Find the first dose at which the concept is at least `wanted`.",
        "Which part of the way from the dose before has the concept gone? The cost goes as far.",
    ],
)
def check_106(answer) -> None:
    # Each case as a learner's curves are: rising, with a fall, or never there.
    for index, draw in enumerate(draws(6)):
        n = draw.size("doses", 5, 9)
        concept = np.cumsum(draw.positive(n).numpy())
        concept = concept / concept.max() * draw.number(0.7, 0.95)
        cost = np.cumsum(draw.positive(n, high=1.5).numpy()) - draw.number(0.0, 0.4)
        place = draw.number(0.3, 0.9)
        wanted = concept[0] + place * (concept[-2] - concept[0])
        if index % 3 == 1:
            concept[-1] = wanted * 0.9  # too much breaks it
        if index % 3 == 2:
            wanted = concept.max() + draw.number(0.01, 0.2)
        if index == 3:
            wanted = (concept[-2] + 3 * concept[-1]) / 4  # not before the last dose
        given = float(wanted), concept.tolist(), cost.tolist()
        got, want = answer(*given), cost_of(*given)
        expect(np.ndim(got) == 0, "This is a list or an array: give one number.")
        if is_close(got, want):
            continue
        for mistake, message in MISTAKES_106:
            expect(not is_close(got, mistake(*given)), message)
        said = f"For the concept {wanted:.3f} this is {got!r}: it should be {want:.3f}"
        raise Wrong(f"{said}, on the line between two doses, or infinite where it is not reached.")


def is_close(got, want) -> bool:
    """Whether two numbers, either of which may be infinite or None, agree."""
    if got is None or want is None:
        return got is want
    return bool(np.isclose(float(got), float(want), atol=1e-6))


# -- 10.7 ------------------------------------------------------------------------------------


def contrast_by_sums(model, site, texts, others):
    means = []
    for group in (texts, others):
        total, count = 0, 0
        for text in group:
            x = model.run_with_cache(text, [site])[1][site][:, 1:]
            total, count = total + x.sum((0, 1)), count + x.shape[1]
        means.append(total / count)
    return (means[0] - means[1]).tolist()


MISTAKES_107 = edits(
    contrast,
    """
    [site][0, 1:] → [site][0]
        BOS is counted, too: leave the first token out.
    [site][0, 1:] → [site][0, -1:]
        Only the last token of each text is read: take them all.
    torch.cat(rows).mean(0) → torch.stack([row.mean(0) for row in rows]).mean(0)
        Each text counts alike here: each token should.
    mean(texts) - mean(others) → mean(others) - mean(texts)
        The sign is turned round: texts less others.
    mean(texts) - mean(others) → mean(texts)
        The others are left out: their mean is to be subtracted.
    mean(texts) - mean(others) → mean(texts) - mean(list(texts) + list(others))
        You subtract the mean of all texts: subtract that of the others.
    return mean(texts) - mean(others) → v = mean(texts) - mean(others); return v / v.norm()
        The length is gone: a dose of 1 should go from one mean to the other.
    torch.cat(rows).mean(0) → torch.nn.utils.rnn.pad_sequence(rows).mean((0, 1))
        Padding is counted: let each text have its own length.
    """,
)


@exercise(
    "10.7",
    title="A direction from two piles of text",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=contrast,
    survivors=ONE_MODEL,
    right=[contrast_by_sums],
    wrong=MISTAKES_107,
    hints=[
        "Run each text alone: `model.run_with_cache(text, [site])[1][site][0, 1:]` is (tokens, d).",
        "`torch.cat` puts the tokens of all texts of a group below each other; then one mean.",
    ],
)
def check_107(answer) -> None:
    def make(draw) -> tuple:
        about, seed = draw.choice(["chess", "war", "birds", "music"]), draw.integer(0, 9999)
        n, m = draw.size("texts", 2, 3), draw.size("others", 2, 4)
        cut = [lab10.first_words(text, 4 + 5 * i) for i, text in enumerate(lab10.prose(m, seed))]
        texts = [
            lab10.first_words(text, 14 - 4 * i)
            for i, text in enumerate(lab10.texts_about(about, n, seed))
        ]
        return shipped_model(), a_site(draw), texts, cut

    otherwise = "The mean over all tokens but BOS of the texts, less that of the others."
    on_model(answer, contrast, make, MISTAKES_107, otherwise, cases=2)


# -- 10.8 ------------------------------------------------------------------------------------


def control_in_numpy(noise, x, v):
    noise, x, v = (np.asarray(each, dtype=float) for each in (noise, x, v))
    found = noise @ (x - x.mean(0, keepdims=True))
    found -= np.outer(found @ v, v) / np.dot(v, v)
    return found * (np.linalg.norm(v) / np.linalg.norm(found, axis=1, keepdims=True))


MISTAKES_108 = edits(
    fair_control,
    """
    (x - x.mean(0)) → x
        The mean of x is still in it: all directions then share a part.
    drawn = drawn - (drawn @ v / (v @ v))[:, None] * v → pass
        The part along v is still there, and the concept with it.
    / (v @ v) → / v.norm()
        You divide by the length of v: divide by its square.
    / (v @ v) →
        The part along v is (d · v / v · v) v: the division is left out.
    drawn / drawn.norm(dim=1, keepdim=True) * v.norm() → drawn
        The lengths are as they come: bring each to that of v.
    * v.norm() →
        The directions have length 1: bring each to the length of v.
    drawn.norm(dim=1, keepdim=True) → drawn.norm()
        All are divided by one length: each should be as long as v.
    noise @ (x - x.mean(0)) → noise @ (x - x.mean(0)); drawn /= drawn.norm(dim=1, keepdim=True)
    & return drawn / drawn.norm(dim=1, keepdim=True) → return drawn
        The length is set before v is taken out: do it last.
    """,
)


@exercise(
    "10.8",
    title="A fair control",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=fair_control,
    right=[control_in_numpy],
    wrong=MISTAKES_108,
    hints=[
        "`noise @ (x - x.mean(0))` has the covariance of x.",
        "The part of d along v is (d · v / v · v) v, for each row.",
        "Last, divide each row by its length, and multiply by that of v.",
    ],
)
def check_108(answer) -> None:
    def make(draw) -> tuple:
        d, rows = draw.size("d", 5, 8), draw.size("rows", 12, 19)
        v = draw.normal(d) * draw.number(1.5, 4)
        x = draw.normal(rows, d) + draw.normal(rows)[:, None] * v + draw.normal(d, scale=3)
        return draw.normal(draw.size("n", 3, 10), rows), x, v

    otherwise = "Weight the centred rows, take out v, and bring each to the length of v."
    agree(answer, fair_control, make, MISTAKES_108, otherwise, 1e-4)


# -- 10.9 ------------------------------------------------------------------------------------


def mirror_by_matrix(model, ids, site, v, centre):
    v, centre = torch.as_tensor(v), torch.as_tensor(centre)
    turn = torch.eye(len(v)) - 2 * torch.outer(v, v) / v.square().sum()

    def hook(x):
        return torch.cat([x[:, :-1], ((x[:, -1] - centre) @ turn + centre)[:, None]], 1)

    with model.hooks({site: hook}):
        return model(ids)[:, -1, :]


MISTAKES_109 = edits(
    mirror,
    """
    2 * along → along
        This takes the part along v out: to mirror it, take it away twice.
     - centre →
        You mirror at zero: what is along v is counted from the centre.
    / (v @ v) → / v.norm()
        You divide by the length of v: divide by its square.
    / (v @ v) →
        v is of any length: divide by its square.
    along[:, None] * v → along[:, None] * v + centre
        The centre is lost on the way back.
    -= 2 → += 2
        The sign is wrong: what points to one side is to point to the other.
    x[:, -1] -= 2 * along[:, None] * v → x[:, -1] -= 2 * (x[:, -1] - centre)
        All directions are mirrored: across v nothing should change.
    x[:, -1] -= 2 * along[:, None] * v → x[:, -1] = centre - along[:, None] * v
        What lies across v is lost.
    x[:, -1] -= 2 * along[:, None] * v → x -= 2 * along[:, None, None] * v
        Every position is changed: only the last one should be.
    x[:, -1] -= 2 * along[:, None] * v → x[:, -1] -= 2 * v
        Every text is pushed alike: how far depends on where its stream is.
    """,
)


@exercise(
    "10.9",
    title="Turn the verdict round",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=mirror,
    survivors=ONE_MODEL,
    right=[mirror_by_matrix],
    wrong=MISTAKES_109,
    hints=[
        "How far is the last position's stream from the centre, along v? (x - centre) · v / v · v.",
        "Take that much of v away twice: once to the centre, once to the other side.",
    ],
    after="That was the last exercise. The investigation is waiting.",
)
def check_109(answer) -> None:
    def make(draw) -> tuple:
        model = shipped_model()
        v = draw.normal(model.d_model) * draw.number(0.3, 2)
        centre = draw.normal(model.d_model, scale=1)
        return model, token_ids(draw), a_site(draw), v, centre

    otherwise = "The last x should go on as x - 2 ((x - centre) · v / v · v) v."
    on_model(answer, mirror, make, MISTAKES_109, otherwise, cases=2)
