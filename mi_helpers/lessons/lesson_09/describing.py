"""Exercises 9.1 to 9.4 of lesson 09: contexts, an explainer, detection and fuzzing."""

import functools
from collections import Counter

import numpy as np

from mi_helpers.course.answers import describe as in_words
from mi_helpers.course.check import Wrong, agree, draws, edits, exercise, expect
from mi_helpers.lessons.coders import coder_of, middle
from mi_helpers.lessons.lesson_09 import experiments as lab
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.saes.rules import f1


@functools.cache
def small_ground() -> lab.Ground:
    """A little text, read by the shipped model and its autoencoder."""
    model = shipped_model()
    return lab.read(model, coder_of(model), middle(model), seed=90, tokens=6_000)


@functools.cache
def some_units() -> list[lab.Unit]:
    """Latents and neurons that fire in enough texts of it."""
    return [unit for kind in lab.KINDS[:2] for unit in small_ground().units(kind, 8)]


# -- 9.1 -------------------------------------------------------------------------------------


def near_misses(words, values, text, top):
    """Places that look like those where a unit is highest, and are none: their indices, rising.

    The token there is one of those at the top places. No place is in a text in which the unit fires
    anywhere (value above 0), and each other text has one at most, its first.
    words (tokens,), a list of tokens; values (tokens,); text (tokens,), the number of each token's
    text; top, a list of indices
    """
    looks = {words[i] for i in top}
    fires = {text[i] for i in range(len(words)) if values[i] > 0}
    found = {}
    for i, word in enumerate(words):
        if word in looks and text[i] not in fires:
            found.setdefault(text[i], i)
    return list(found.values())


def near_in_numpy(words, values, text, top):
    words, values, text = np.array(words), np.asarray(values), np.asarray(text)
    loud = np.isin(text, text[values > 0])
    places = np.flatnonzero(np.isin(words, words[top]) & ~loud)
    return np.sort(places[np.unique(text[places], return_index=True)[1]])


MISTAKES_91 = edits(
    near_misses,
    """
    word in looks and text[i] not in fires → word in looks and values[i] <= 0
        Some of these texts have a firing elsewhere: a context of it would be no miss at all.
    word in looks and →
        These are places in silent texts, whatever stands there: ask for the top tokens.
    found.setdefault(text[i], i) → found[text[i]] = i
        This is the last such place of each text: take the first.
    found.setdefault(text[i], i) → found.setdefault(i, i)
        One text gives several: take its first place alone.
    word in looks and text[i] not in fires → word not in looks and text[i] not in fires
        These are the places with any *other* token.
    if values[i] > 0 → if values[i] != 0
        A value below 0 is no firing: a neuron has many of these.
    for i in range(len(words)) if values[i] > 0 → for i in top
        You leave out the texts of the top places alone: the unit fires in others, too.
    return list(found.values()) → return list(found.values())[::-1]
        Give the indices in the order of the text.
    text[i] not in fires → text[i] in fires
        These texts have firings in them: take those that have none.
    return list(found.values()) → return [words[i] for i in found.values()]
        These are the tokens: give their places.
    return list(found.values()) → return list(found)
        These are the numbers of texts: give places among the tokens.
    """,
)


@exercise(
    "9.1",
    title="Near misses",
    difficulty=2,
    importance=4,
    minutes=6,
    reference=near_misses,
    right=[near_in_numpy],
    hints=[
        "Two sets first: the tokens at the top places, and the numbers of the texts with a firing.",
        "A dictionary {text: place} keeps one place for each text: `setdefault` keeps the first.",
    ],
    wrong=MISTAKES_91,
)
def check_91(answer) -> None:
    """On the firings of the model's own units, thinned out, so that there are misses."""

    def inputs(draw) -> tuple:
        ground, unit = small_ground(), draw.choice(some_units())
        start = draw.integer(0, 4_000)
        part = slice(start, start + draw.integer(300, 900))
        words = [ground.words[i] for i in ground.facts.word[part]]
        values = ground.values[unit.kind][part, unit.number].copy()
        values[draw.rng.random(len(values)) < 0.5] *= -0.01
        values[(values <= 0) & (draw.rng.random(len(values)) < 0.02)] = -0.01
        values[:6], words[0] = 0, words[-1]  # a token that comes twice in silent places
        values[-1] = values.max() + 1
        text = ground.texts.text[part] - draw.integer(-5, 5)
        text[:3] = -99  # a text whose first token alone fires
        values[0], words[1] = 0.01, words[-1]
        text[3:6], words[3], words[5] = -98, words[-1], words[-1]  # and a silent one after it
        return words, values, text, np.argsort(-values)[: draw.integer(3, 9)].tolist()

    agree(
        answer,
        near_misses,
        inputs,
        mistakes=MISTAKES_91,
        otherwise="Give the first place with a top token of each text in which the unit is silent.",
        cases=6,
    )


# -- 9.2 -------------------------------------------------------------------------------------


def describe(contexts, fires, most):
    """The tokens that tell best where a unit fires in some contexts, and their F1: (list, number).

    Rank the tokens by the share of their places at which the unit fires, then by how often it fires
    at them, both falling, then by the alphabet; those at which it never fires are left out. Of the
    first one, two … `most` of the ranking take those with the highest
    F1 = 2 · firings at them / (places they stand at + all firings), and the fewest of equal ones.
    contexts, a list of lists of tokens; fires, of each of their tokens whether the unit fires
    """
    places, hits = Counter(), Counter()
    for row, on in zip(contexts, fires, strict=True):
        places.update(row)
        hits.update(word for word, fired in zip(row, on, strict=True) if fired)
    ranked = sorted(hits, key=lambda word: (-hits[word] / places[word], -hits[word], word))
    best, score = [], 0.0
    for n in range(1, min(most, len(ranked)) + 1):
        chosen = ranked[:n]
        at_them, stand = (sum(count[word] for word in chosen) for count in (hits, places))
        f1 = 2 * at_them / (stand + sum(hits.values()))
        if f1 > score:
            best, score = chosen, f1
    return best, score


def describe_by_sets(contexts, fires, most):
    rows = zip(contexts, fires, strict=True)
    flat = [(w, bool(y)) for row, on in rows for w, y in zip(row, on, strict=True)]
    tokens = {w for w, y in flat if y}
    rate = {w: [y for v, y in flat if v == w] for w in tokens}
    order = sorted(sorted(tokens), key=lambda w: (np.mean(rate[w]), sum(rate[w])), reverse=True)
    # reverse keeps equal ones in order
    said = [[w in order[: n + 1] for w, _ in flat] for n in range(min(most, len(order)))]
    scores = [round(f1(np.array(s), np.array([y for _, y in flat])), 9) for s in said]
    at = int(np.argmax(scores)) if scores else -1
    return order[: at + 1], scores[at] if scores else 0.0


def describe_until_it_falls(contexts, fires, most):
    """Right, because shares fall along the ranking: once the F1 falls it never rises again."""
    flat = [(w, bool(y)) for row, on in zip(contexts, fires) for w, y in zip(row, on)]  # noqa: B905
    stand, hits = Counter(w for w, _ in flat), Counter(w for w, y in flat if y)
    order = sorted(hits, key=lambda w: (-hits[w] / stand[w], -hits[w], w))
    both = at = best = 0
    for n, word in enumerate(order[:most]):
        both, at = both + hits[word], at + stand[word]
        if (score := 2 * both / (at + hits.total())) <= best:
            return np.array(order[:n]), best
        best = score
    return order[:most], best


MISTAKES_92 = edits(
    describe,
    """
    (-hits[word] / places[word], -hits[word], word) → (-hits[word], word)
        You rank by the number of firings: a token that stands everywhere, such as "the", comes
        first, though the unit mostly ignores it. Divide by how often the token stands there.
    -hits[word] / places[word], -hits[word], → -hits[word] / places[word],
        Equal shares are ranked by the alphabet: more firings come first.
    (-hits[word] / places[word] → (hits[word] / places[word]
        The ranking begins with the lowest share.
    2 * at_them → at_them
        The 2 of the F1 is missing: a perfect set has an F1 of 1.
    if f1 > score → if True
        You always take as many tokens as there may be: stop where the F1 is highest.
    2 * at_them / (stand + sum(hits.values())) → at_them / stand
        This is the precision: the first token alone would always win.
    2 * at_them / (stand + sum(hits.values())) → at_them / sum(hits.values())
        This is the recall: more tokens would always win.
    if f1 > score → if f1 >= score
        Of sets that score the same, take the one with fewer tokens.
    return best, score → return best, len(best)
        Return the tokens, and their F1.
    return best, score → return score, best
        Return the tokens first, then their F1.
    min(most, len(ranked)) → len(ranked)
        There are more tokens than `most`.
    """,
) + [
    (
        lambda contexts, fires, most: describe(
            contexts, [[i == int(np.argmax(on)) for i in range(len(on))] for on in fires], most
        ),
        "You count one firing in each context: a unit may fire at several tokens of it.",
    )
]


@exercise(
    "9.2",
    title="An explainer",
    difficulty=4,
    importance=5,
    minutes=10,
    reference=describe,
    survivors={"True → False": "contexts and firings are of one length here"},
    right=[describe_by_sets, describe_until_it_falls],
    hints=[
        "Count with two `Counter`s: how often each token stands there, how often the unit fires.",
        "`sorted(hits, key=lambda word: (-hits[word] / places[word], -hits[word], word))`.",
        "For n = 1, 2 … compute the F1 of `ranked[:n]`, and keep the best so far.",
    ],
    wrong=MISTAKES_92,
)
def check_92(answer) -> None:
    """On contexts of the model's own units, some tokens made alike so that ties occur."""

    cases = iter(range(10**6))

    def inputs(draw) -> tuple:
        unit = draw.choice(some_units())
        if (case := next(cases)) % 3 == 2:  # one token says it all, or a second adds nothing
            n = draw.integer(1, 3)
            rows = [["a", *["b"] * (3 + case % 2)] for _ in range(n)]
            return rows, [[True, True, *[False] * (2 + case % 2)] for _ in range(n)], 4
        seen, some = unit.examples.seen, draw.integer(2, 9)
        rows = lab.pairs([*seen.top[:some], *seen.random[:3], *seen.near[:some]], unit.level)
        contexts, fires = [row for row, _ in rows], [list(on) for _, on in rows]
        for tie in "zy", "ab":
            contexts.append([tie[0], tie[1], "of"])
            fires.append([True, True, draw.integer(0, 3) == 0])
        contexts += [["of", "b", "the", "of"], ["the", "zz", "zz", "the"]]
        fires += [[False, True, False, False], [False, True, False, False]]
        return contexts, fires, draw.integer(1, 6)

    agree(
        answer,
        describe,
        inputs,
        mistakes=MISTAKES_92,
        otherwise="Compare the ranking, and the F1 of its first one, two … tokens.",
        cases=9,
    )


# -- 9.3 -------------------------------------------------------------------------------------


def detection(said, fires):
    """How well a name detects the contexts in which a unit fires: (sensitivity + specificity) / 2.

    Sensitivity: of the contexts in which it fires, the share that the name says. Specificity: of
    the others, the share in which the name keeps silent.
    said (contexts,), whether the name is true anywhere in each; fires (contexts,), whether it fires
    """
    said, fires = np.asarray(said, dtype=bool), np.asarray(fires, dtype=bool)
    return (said[fires].mean() + (~said[~fires]).mean()) / 2


def detection_by_counting(said, fires):
    pairs = list(zip(map(bool, said), map(bool, fires), strict=True))
    n = sum(b for _, b in pairs)
    right = sum(a and b for a, b in pairs) / n
    return 0.5 * right + 0.5 * sum(not a and not b for a, b in pairs) / (len(pairs) - n)


MISTAKES_93 = edits(
    detection,
    """
    (said[fires].mean() + (~said[~fires]).mean()) / 2 → (said == fires).mean()
        This is the accuracy: where most contexts are silent, a name that is never true wins.
    (said[fires].mean() + (~said[~fires]).mean()) / 2 → said[fires].mean()
        This is the sensitivity alone: a name that is true everywhere would be perfect.
    (~said[~fires]).mean() → said[~fires].mean()
        Of the silent contexts, count those in which the name is *not* true.
    said[fires].mean() → fires[said].mean()
        You divide by the contexts that the name says: that is its precision.
    ) / 2 → )
        A perfect name has 2 here: take the mean of the two shares.
    """,
) + [
    (
        lambda said, fires: 2 * (said & fires).sum() / (said.sum() + fires.sum()),
        "This is the F1: it does not count the silent contexts that the name gets right.",
    )
]


@exercise(
    "9.3",
    title="Detection",
    difficulty=1,
    importance=4,
    minutes=3,
    reference=detection,
    right=[detection_by_counting],
    hints=["`said[fires].mean()` is the first share.", "The second: `(~said[~fires]).mean()`."],
    wrong=MISTAKES_93,
)
def check_93(answer) -> None:
    def inputs(draw) -> tuple:
        n = draw.size("contexts", 12, 40)
        fires = draw.booleans(n, share=draw.choice([0.2, 0.35, 0.7]))
        said = fires ^ draw.booleans(n, share=draw.number(0.2, 0.5))
        fires[:2], said[:2] = [True, False], True
        return said, fires

    agree(
        answer,
        detection,
        inputs,
        mistakes=MISTAKES_93,
        otherwise="Compare with the mean of the two shares.",
        numpy=True,
    )


# -- 9.4 -------------------------------------------------------------------------------------


def mismarked(fires, rng):
    """Wrong marks for a context: booleans, as many True as in `fires`, at tokens where it is False.

    The marked tokens are drawn at random among those where the unit does not fire, each once; all
    of them where there are too few.
    fires (tokens,), an array of booleans; rng, such as np.random.default_rng(0)
    """
    silent = np.flatnonzero(~fires)
    n = min(fires.sum(), len(silent))
    marks = np.zeros(len(fires), dtype=bool)
    marks[rng.choice(silent, n, replace=False)] = True
    return marks


def mismarked_by_order(fires, rng):
    order = np.where(fires, 2.0, rng.random(len(fires)))
    chosen = np.argsort(order)[: int(np.sum(fires))]
    return [i in chosen and not fires[i] for i in range(len(fires))]


def mismarked_in_a_run(fires, rng):
    """A mistake: neighbours among the silent tokens."""
    silent = np.flatnonzero(~fires)
    start = rng.integers(0, max(len(silent) - fires.sum(), 0) + 1)
    return np.isin(np.arange(len(fires)), silent[start : start + fires.sum()])


MISTAKES_94 = edits(
    mismarked,
    """
    np.flatnonzero(~fires) → np.arange(len(fires))
        Some marks are at tokens where the unit fires: those would be right marks.
    np.flatnonzero(~fires) → np.flatnonzero(fires)
        The marks are where the unit fires: they are to be wrong.
    replace=False → replace=True
        Sometimes there are fewer marks than firings: draw each token once.
    n = min(fires.sum(), len(silent)) → n = min(1, len(silent))
        There are other numbers of marks than of firings: the number would give it away.
    marks[rng.choice(silent, n, replace=False)] → marks[silent[:n]]
        The marks are the same every time: draw them at random, with the `rng` that is given.
    return marks → return ~fires
        Every silent token is marked: mark as many as there are firings.
    """,
) + [(mismarked_in_a_run, "Every silent token should have the same chance: draw each by itself.")]


@exercise(
    "9.4",
    title="Fuzzing: marks that are wrong",
    difficulty=2,
    importance=4,
    minutes=5,
    reference=mismarked,
    right=[mismarked_by_order],
    hints=[
        "`np.flatnonzero(~fires)` are the silent places.",
        "`rng.choice(silent, n, replace=False)` draws n of them, each once.",
    ],
    wrong=MISTAKES_94,
)
def check_94(answer) -> None:
    for draw in draws(4, numpy=True):
        n = draw.size("tokens", 7, 12)
        fires = draw.booleans(n, share=draw.choice([0.3, 0.45, 0.85]))
        fires[:2] = [True, False]
        seed = draw.integer(0, 10**6)
        one, same = (mark_array(answer(fires.copy(), np.random.default_rng(seed)), n) for _ in "ab")
        rng = np.random.default_rng(seed)
        made = [mark_array(answer(fires.copy(), rng), n) for _ in range(120)]
        marks = np.array(made)
        wanted = min(int(fires.sum()), int((~fires).sum()))
        expect(not marks[:, fires].all(), MISTAKES_94[1][1])
        expect(not marks[:, fires].any(), MISTAKES_94[0][1])
        counts = marks.sum(1)
        expect(not (counts == (~fires).sum()).all() or wanted == (~fires).sum(), MISTAKES_94[5][1])
        expect(not (counts == 1).all() or wanted == 1, MISTAKES_94[3][1])
        expect(bool((counts == wanted).all()), MISTAKES_94[2][1])
        expect(bool((one == same).all()), "Draw with the `rng` that is given, and no other.")
        rate = marks[:, ~fires].mean(0)
        fair = wanted / (~fires).sum()
        expect(fair == 1 or not (marks == marks[0]).all(), MISTAKES_94[4][1])
        expect(bool((abs(rate - fair) < 0.3).all()), MISTAKES_94[6][1])


def mark_array(value, n: int) -> np.ndarray:
    """Marks as an array of n booleans."""
    marks = np.asarray(value)
    if marks.shape != (n,) or marks.dtype != bool:
        raise Wrong(f"Return {n} booleans, one for each token, not {in_words(value)}.")
    return marks
