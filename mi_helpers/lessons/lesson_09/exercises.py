"""Exercises of lesson 09: naming features. The first four are in `describing`."""

import functools
import math
from collections import Counter

import numpy as np
import torch

from mi_helpers.course.check import agree, edits, exercise
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.coders import coder_of, middle
from mi_helpers.lessons.lesson_09 import experiments as lab
from mi_helpers.lessons.lesson_09.describing import check_91 as check_91
from mi_helpers.lessons.lesson_09.describing import check_92 as check_92
from mi_helpers.lessons.lesson_09.describing import check_93 as check_93
from mi_helpers.lessons.lesson_09.describing import check_94 as check_94
from mi_helpers.lessons.lesson_09.describing import describe
from mi_helpers.lessons.lesson_09.inquiry import lesson
from mi_helpers.lessons.lesson_09.inquiry import score_names as score_names
from mi_helpers.lessons.shared import on_model, repeated_tokens, shipped_model
from mi_helpers.saes.rules import f1

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}
ONE_CODER = {"coder → its first value, always": "the model has one that ships"}


# -- 9.5 -------------------------------------------------------------------------------------


def simulation_score(predicted, actual):
    """Pearson's correlation of what a name predicts with what its unit does, over all tokens of all
    contexts together: one number; 0 where either is the same everywhere.

    predicted, actual: lists of arrays, one for each context, of the context's length
    """
    x, y = np.concatenate(predicted), np.concatenate(actual)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return (x * y).sum() / size if size > 1e-9 else 0.0


def simulation_by_corrcoef(predicted, actual):
    x = np.array([v for row in predicted for v in np.asarray(row)])
    y = np.array([v for row in actual for v in np.asarray(row)])
    if len(set(x.tolist())) == 1 or len(set(y.tolist())) == 1:
        return 0
    return np.corrcoef(x, y)[0][1]


def pearson(x, y):
    """A correlation that is NaN where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    with np.errstate(invalid="ignore"):
        return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


MISTAKES_95 = edits(
    simulation_score,
    """
    x, y = x - x.mean(), y - y.mean() → pass
        The means are left in: this is a cosine, and a name that is true everywhere has a high one.
    np.sqrt((x**2).sum() * (y**2).sum()) → (x**2).sum() * (y**2).sum()
        Divide by the square root of the two sums of squares.
    (x * y).sum() / size → (x * y).mean()
        This is the covariance: divide by the two spreads.
    return (x * y).sum() → return abs(x * y).sum()
        A name that is wrong everywhere has a correlation below 0.
    """,
) + [
    (
        lambda predicted, actual: pearson(np.concatenate(predicted), np.concatenate(actual)),
        "Where either is the same everywhere the score is 0: yours divides by 0 there.",
    ),
    (
        lambda predicted, actual: simulation_score(predicted, actual) ** 2,
        "This is r², the share of variance explained: it loses the sign.",
    ),
    (
        lambda predicted, actual: np.mean(
            [simulation_score([p], [a]) for p, a in zip(predicted, actual, strict=True)]
        ),
        "You average a correlation of each context. It should be one over all tokens together: a "
        "random context, in which the unit is silent, counts only against others.",
    ),
    (
        lambda predicted, actual: simulation_score(
            [p - np.mean(p) for p in predicted], [a - np.mean(a) for a in actual]
        ),
        "You take each context's own mean away: take that of all tokens together.",
    ),
]


@exercise(
    "9.5",
    title="Simulation",
    difficulty=2,
    importance=5,
    minutes=6,
    reference=simulation_score,
    survivors={
        "1e-09 → 2e-09": "it is there for what is 0",
        "size > 1e-09 → size >= 1e-09": "it is there for what is 0",
    },
    right=[simulation_by_corrcoef],
    hints=[
        "`np.concatenate` first: one correlation over all tokens, not one for each context.",
        "`np.corrcoef(x, y)[0, 1]` does the rest, but for constant x or y, where it divides by 0.",
    ],
    wrong=MISTAKES_95,
)
def check_95(answer) -> None:
    cases = iter(range(10**6))

    def inputs(draw) -> tuple:
        lengths = [draw.integer(4, 12) for _ in range(draw.size("contexts", 4, 8))]
        case, actual, predicted = next(cases) % 4, [], []
        for length in lengths:
            strength = draw.choice([0.0, 1.0, 3.0])
            row = strength * draw.rng.gamma(0.5, size=length)
            noise = draw.rng.normal(size=length)
            actual.append(row)
            predicted.append((-1) ** case * row + draw.number(0.4, 1.5) * noise + 1)
        if case == 3:
            predicted = [np.ones(length) for length in lengths]
        if case == 2:
            predicted = [(row > 0.7).astype(float) for row in predicted]
        return predicted, actual

    agree(
        answer,
        simulation_score,
        inputs,
        mistakes=MISTAKES_95,
        otherwise="Compare with Pearson's r of all tokens, one context after another.",
        cases=8,
    )


# -- 9.6 -------------------------------------------------------------------------------------


def bootstrap_interval(score, predicted, actual, draws):
    """The 95 % interval of a score, by a bootstrap over contexts: (low, high).

    For each draw the score of the contexts that it chooses, some of them more than once; then the
    2.5 and 97.5 % quantiles of these scores.
    score, such as your simulation_score; predicted, actual: lists of arrays, one for each context;
    draws (times, contexts), whole numbers: each row is a choice of contexts
    """
    scores = [score([predicted[i] for i in row], [actual[i] for i in row]) for row in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    return low, high


def interval_by_percentile(score, predicted, actual, draws):
    chosen = lambda rows, draw: [rows[int(i)] for i in draw]  # noqa: E731
    found = sorted(float(score(chosen(predicted, d), chosen(actual, d))) for d in draws)
    return np.percentile(np.array(found), (2.5, 97.5))


def normal_interval(score, predicted, actual, draws, error):
    """A mean and 1.96 errors around it: a mistake, or two."""
    scores = [score([predicted[i] for i in row], [actual[i] for i in row]) for row in draws]
    return np.mean(scores) - 1.96 * error(scores), np.mean(scores) + 1.96 * error(scores)


MISTAKES_96 = edits(
    bootstrap_interval,
    """
    [0.025, 0.975] → [0.05, 0.95]
        This is the 90 % interval: 2.5 % are left out at each end.
    np.quantile → np.percentile
        `np.percentile` counts in per cent: yours are 0.025 and 0.975 of a hundred.
    [0.025, 0.975] → [0, 1]
        These are the lowest and the highest of all draws: take the quantiles.
    [actual[i] for i in row] → actual
        You draw what is predicted anew, and not what the unit does: keep them together.
    return low, high → return high, low
        Give the lower end first.
    """,
) + [
    (
        lambda *given: normal_interval(*given, lambda scores: np.std(scores)),
        "This takes the scores to be normal: give the quantiles of the draws themselves.",
    ),
    (
        lambda *given: normal_interval(*given, lambda scores: np.std(scores) / len(scores) ** 0.5),
        "You divide by the number of draws: that says how well you know the mean, not the score.",
    ),
]


@exercise(
    "9.6",
    title="How sure is a score?",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=bootstrap_interval,
    right=[interval_by_percentile],
    hints=[
        "For one draw: `score([predicted[i] for i in row], [actual[i] for i in row])`.",
        "`np.quantile(scores, [0.025, 0.975])`.",
    ],
    wrong=MISTAKES_96,
)
def check_96(answer) -> None:
    def inputs(draw) -> tuple:
        n, length = draw.size("contexts", 5, 9), draw.size("tokens", 4, 9)
        actual = [draw.rng.gamma(0.4, size=length) for _ in range(n)]
        predicted = [row + draw.number(0.3, 2) * draw.rng.normal(size=len(row)) for row in actual]
        score = draw.choice([simulation_score, mean_gap])
        return score, predicted, actual, draw.rng.integers(0, n, (draw.integer(40, 80), n))

    agree(
        answer,
        bootstrap_interval,
        inputs,
        mistakes=MISTAKES_96,
        otherwise="Compare with the quantiles of the scores, one of each row of `draws`.",
    )


def mean_gap(predicted, actual):
    """Another score: the mean of the absolute differences."""
    return float(np.abs(np.concatenate(predicted) - np.concatenate(actual)).mean())


# -- 9.7 -------------------------------------------------------------------------------------


def verdict(score, says, truths, fires):
    """What to think of a name: "reliable and right", "reliable and wrong" or "unreliable".

    Reliable: the score is 0.7 or more. Right: one of TinyWorld's descriptions agrees with where the
    unit fires, and the name agrees with that description. Two masks agree where their F1,
    2 · both / (one + other), is 0.5 or more.
    says (tokens,), where the name is true; fires (tokens,), where the unit fires strongly;
    truths, a list of masks (tokens,), where each description is so; all are booleans
    """

    def agree(one, other):
        return 2 * (one & other).sum() / max(one.sum() + other.sum(), 1) >= 0.5

    if score < 0.7:
        return "unreliable"
    right = any(agree(truth, fires) and agree(says, truth) for truth in truths)
    return "reliable and right" if right else "reliable and wrong"


def verdict_by_library(score, says, truths, fires):
    known = [t for t in truths if f1(np.asarray(t), np.asarray(fires)) >= 0.5]
    best = max([f1(np.asarray(says), np.asarray(t)) for t in known] or [0])
    if score >= 0.7:
        return "reliable and " + ("right" if best >= 0.5 else "wrong")
    return "unreliable"


MISTAKES_97 = edits(
    verdict,
    """
    agree(truth, fires) and agree(says, truth) → agree(says, truth)
        A description counts only if it tells the unit: a name may agree with one that has nothing
        to do with it.
    agree(truth, fires) and agree(says, truth) → agree(truth, fires)
        You ask whether the unit has a truth, not whether the *name* says the same.
    any(agree(truth, fires) and agree(says, truth) for truth in truths) → agree(says, fires)
        You hold the name against the unit itself: that is a second score, and TinyWorld is not
        asked.
    any(agree → all(agree
        One description that tells the unit, and that the name agrees with, is enough.
    >= 0.5 → > 0.5
        Masks whose F1 is exactly 0.5 agree.
    return "unreliable" → return "not reliable"
        Give one of the three texts, letter by letter.
    if score < 0.7 → if score <= 0.7
        A score of exactly 0.7 is reliable.
    if score < 0.7 → if score < 0.5
        A score counts as reliable from 0.7 on.
    2 * (one & other).sum() → (one & other).sum()
        The 2 of the F1 is missing.
    / max(one.sum() + other.sum(), 1) → / max((one | other).sum(), 1) / 2
        You divide by the union: F1 divides by the sum of the two.
    """,
)


@exercise(
    "9.7",
    title="Reliable, and right?",
    difficulty=2,
    importance=5,
    minutes=7,
    reference=verdict,
    survivors={"1 → 2": "where the two masks have one token together, their F1 is 0 in any case"},
    right=[verdict_by_library],
    hints=[
        "A small function for the F1 of two masks serves twice.",
        "Right: for any truth, `agree(truth, fires) and agree(says, truth)`.",
    ],
    wrong=MISTAKES_97,
)
def check_97(answer) -> None:
    """On masks made of each other, so that every F1 comes above and below a half."""
    cases = iter(range(10**6))

    def inputs(draw) -> tuple:
        n, case = draw.size("tokens", 40, 90), next(cases)
        fires = draw.booleans(n, share=0.3)
        keep = [0.95, 0.25, 0.6]

        def like(mask, share):
            other = draw.booleans(n, share=0.3)
            return np.where(draw.rng.random(n) < share, mask, other & ~mask)

        truths = [like(fires, keep[(case + i) % 3]) for i in range(draw.size("truths", 2, 4))]
        source = truths[case % len(truths)] if case % 4 else like(fires, 0.95)
        says = like(source, keep[(case // 3) % 3])
        if case % 5 == 4:  # F1 of exactly a half, twice
            fires = np.arange(n) < 4
            truths, says = [np.arange(n) < 12], np.arange(n) < 4
        score = [0.7, 0.65, 0.9, 0.55, 0.71][draw.integer(0, 4)]
        return (score if case % 2 else 0.7 + 0.1 * draw.integer(0, 2)), says, truths, fires

    agree(
        answer,
        verdict,
        inputs,
        mistakes=MISTAKES_97,
        otherwise="Ask two things of each description: does it agree with the unit, and the name "
        "with it? One for which both are so is enough.",
        cases=30,
        numpy=True,
    )


# -- 9.8 -------------------------------------------------------------------------------------


def after_swap(model, coder, site, latent, ids, place, back, others):
    """A latent's values at a place of a text in which one token is replaced: (others,), a value for
    each of the tokens that come in its place.

    The replaced token stands `back` places before the place where the latent is read.

    ids (1, pos), token ids; place, a position; back, 0 for the token there itself, 1 for the one
    before …; others (others,), token ids; site, such as ("resid_post", 3)
    `_, cache = model.run_with_cache(ids, [site], stop_at_layer=site[1] + 1)`;
    coder.encode(x) makes (…, latents) of cache[site], (batch, pos, d_model)
    """
    texts = ids.repeat(len(others), 1)
    texts[:, place - back] = others
    _, cache = model.run_with_cache(texts, [site], stop_at_layer=site[1] + 1)
    return coder.encode(cache[site])[:, place, latent]


def after_swap_by_loop(model, coder, site, latent, ids, place, back, others):
    found = []
    for token in torch.as_tensor(others).tolist():
        row = ids[0].tolist()
        row[place - back] = token
        _, cache = model.run_with_cache(torch.tensor([row]), [site])
        found.append(float(coder.encode(cache[site][0])[place, latent]))
    return found


MISTAKES_98 = edits(
    after_swap,
    """
    [:, place - back] → [:, place + back]
        You replace a token *after* the place: go back.
    [:, place - back] → [:, place]
        You always replace the token at the place itself: go back by `back`.
    [:, place, latent] → [:, place - back, latent]
        You read the latent where you replaced the token: read it at the place.
    [:, place, latent] → [:, place - 1, latent]
        You read the latent one position early.
    texts[:, place - back] = others → pass
        Nothing was replaced: these are the values in the text as it is.
    [:, place, latent] → [:, -1, latent]
        You read the latent at the last token: read it at the place.
    [:, place, latent] → [:, place, latent].mean()
        Give one value for each of the other tokens, not their mean.
    """,
)


@exercise(
    "9.8",
    title="Change the text",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=after_swap,
    survivors=ONE_MODEL
    | ONE_CODER
    | {"1 → 2": "a text written twice, or one block more, changes nothing before or below it"},
    right=[after_swap_by_loop],
    hints=[
        "`ids.repeat(n, 1)` makes n equal rows, so that one run reads all of them.",
        "Then `texts[:, place - back] = others`: a column of n tokens.",
        "`coder.encode(cache[site])` is (others, pos, latents).",
    ],
    wrong=MISTAKES_98,
)
def check_98(answer) -> None:
    def inputs(draw) -> tuple:
        model = shipped_model()
        coder, layer = coder_of(model), draw.integer(1, model.n_layers - 2)
        ids = repeated_tokens(model, 1, draw.size("pos", 9, 14), draw.integer(0, 999), times=1)
        others = repeated_tokens(model, 1, draw.size("others", 3, 6), draw.integer(0, 999), 1)[
            0, 1:
        ]
        place, back = draw.integer(4, ids.shape[1] - 4), draw.integer(0, 3)
        site = "resid_post", layer
        with torch.no_grad():
            _, cache = model.run_with_cache(ids, [site])
            f = coder.encode(cache[site])[0, place]
        return (
            model,
            coder,
            site,
            int(f.topk(draw.integer(1, 4)).indices[-1]),
            ids,
            place,
            back,
            others,
        )

    on_model(
        answer,
        after_swap,
        inputs,
        MISTAKES_98,
        "Replace one token, run the model, and read the latent at the place.",
        cases=3,
    )


# -- 9.9 -------------------------------------------------------------------------------------


def alike(names):
    """How alike names are: (n, n) cosines of their words, each word weighted by how rare it is.

    A word's weight is log(n / the number of names that have it). A name is the vector of the
    weights of its words, each counted once; names with no weight at all have a cosine of 0.
    names, a list of n lists of words
    """
    words = sorted(set().union(*names))
    has = np.array([[word in name for word in words] for name in names], dtype=float)
    weight = np.log(len(names) / has.sum(0))
    rows = has * weight
    length = np.sqrt((rows**2).sum(1))
    return rows @ rows.T / np.maximum(np.outer(length, length), 1e-12)


def alike_by_dictionaries(names):
    sets = [set(name) for name in names]
    counts = Counter(word for each in sets for word in each)
    weight = {word: math.log(len(names) / n) for word, n in counts.items()}
    dot = lambda a, b: sum(weight[w] ** 2 for w in a & b)  # noqa: E731
    return [[dot(a, b) / (math.sqrt(dot(a, a) * dot(b, b)) or 1) for b in sets] for a in sets]


MISTAKES_99 = edits(
    alike,
    """
    rows = has * weight → rows = has
        All words count the same: "at", which is in most names, would make all names alike.
    rows @ rows.T / np.maximum(np.outer(length, length), 1e-12) → rows @ rows.T
        These are dot products: a name with many words is like everything. Divide by the lengths.
    np.log(len(names) / has.sum(0)) → np.log(has.sum(0) / len(names)) + np.log(len(names)) + 1
        Common words count most: it should be rare ones.
    np.log(len(names) / has.sum(0)) → 1 / has.sum(0)
        The weight is the logarithm of n over the count.
    np.log(len(names) / has.sum(0)) → np.log((1 + len(names)) / (1 + has.sum(0))) + 1
        This is scikit-learn's smoothed weight. Here a word that is in all names weighs 0.
    rows @ rows.T / → (rows @ rows.T + np.diag((length == 0) * 1e-12)) /
        A name with no weight at all has a cosine of 0 with itself, too.
    np.sqrt((rows**2).sum(1)) → rows.sum(1)
        A vector's length is the root of its sum of squares.
    [[word in name for word in words] → [[list(name).count(word) for word in words]
        Count each word of a name once.
    """,
)


@exercise(
    "9.9",
    title="Names that are alike",
    difficulty=3,
    importance=3,
    minutes=6,
    reference=alike,
    survivors={
        "1e-12 → 2e-12": "it is there for what is 0",
        "sorted(set().union(*names)) → set().union(*names)": "the order of the words is one's own",
    },
    right=[alike_by_dictionaries],
    hints=[
        "A table `has`, (names, words), of 0 and 1; `has.sum(0)` counts the names with each word.",
        "Weight the columns, then divide `rows @ rows.T` by the two lengths.",
    ],
    wrong=MISTAKES_99,
)
def check_99(answer) -> None:
    def inputs(draw) -> tuple:
        pool = ["at", "after", "near", "the", "each", "chess", "of", "board", "euro", "krone"]
        names = []
        for _ in range(draw.size("names", 4, 8)):
            k = draw.integer(1, 4)
            names.append(["at", *draw.rng.choice(pool[1:], k).tolist()])
        names.append(["at"])  # no weight at all
        names[0] = [*names[0], names[0][1], names[0][1]]
        return (names,)

    agree(
        answer,
        alike,
        inputs,
        mistakes=MISTAKES_99,
        otherwise="Compare with the cosines of the weighted rows.",
    )


# -- predictions -----------------------------------------------------------------------------

COUNTS = ["fewer than 3", "3 to 20", "more than 20"]
PARTS = ["under a half", "50 to 80 %", "over 80 %"]
STAYS = ["under 20 %", "20 to 60 %", "over 60 %"]


@functools.cache
def named(kind: str) -> list[lab.Named]:
    """A hundred units of a kind, named from their contexts."""
    units = lesson().units(kind, 100)
    return [lab.judge(lesson(), unit, lab.from_contexts(describe, unit)) for unit in units]


@prediction(
    "9.10",
    question="Of 100 random directions, how many get a name that scores 0.7 or more?",
    options=COUNTS,
)
def random_names() -> str:
    count = lab.right_if_reliable(named("random direction"))[1]
    return COUNTS[0] if count < 3 else COUNTS[1] if count <= 20 else COUNTS[2]


@prediction(
    "9.11",
    question="Of the latents' names that score 0.7 or more, what share is right?",
    options=PARTS,
)
def right_names() -> str:
    right, reliable = lab.right_if_reliable(named("latent"))
    share = right / reliable
    return PARTS[0] if share < 0.5 else PARTS[1] if share <= 0.8 else PARTS[2]


@prediction(
    "9.12",
    question="A right name says 'after: …'. Swap the token itself: how much of the value stays?",
    options=STAYS,
)
def stays_after_swap() -> str:
    model = shipped_model()
    found = [each for each in named("latent") if each.verdict == lab.VERDICTS[0]]
    some = [each.unit for each in found if each.name.startswith("after")]
    share = lab.kept_after_swaps(
        model, coder_of(model), middle(model), some, after_swap, lab.random_words(model), [0]
    )[0]
    return STAYS[0] if share < 0.2 else STAYS[1] if share <= 0.6 else STAYS[2]
