"""Names of units: what is collected, how a name is found, and what its scores say, all by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_helpers.errors import Refused
from mi_helpers.saes.examples import AFTER, BEFORE, Context, Texts, collect
from mi_helpers.saes.explainers import Explanation, Offline, best_values
from mi_helpers.saes.naming import correlation, moments, score
from mi_helpers.saes.rules import Facts, name_of, parse
from mi_helpers.saes.scores import Fired, Firings, f1

WORDS = "the a cat dog sat on mat in hat and saw red big old ran far to it was not".split()


def made(n=300, seed=0):
    """Texts of random words with their blanks, and a dictionary of masks of where what is so."""
    rng = np.random.default_rng(seed)
    rows = [[" " + w for w in rng.choice(WORDS, rng.integers(5, 60))] for _ in range(n)]
    texts = Texts.of(rows)
    flat = np.array([word.strip() for row in rows for word in row])
    return texts, flat


def unit(where, seed=0, size=(4, 6), weak=0.02):
    """Values of a unit that is high where it should be, and now and then a little on elsewhere."""
    rng = np.random.default_rng(seed)
    noise = (rng.random(len(where)) < 0.1) * weak
    return np.where(where, rng.uniform(*size, len(where)), noise).astype(np.float32)


def after(flat, texts, word):
    there = np.append(False, flat[:-1] == word)
    there[texts.start[:-1]] = False
    return there


# ---------------------------------------------------------------------- texts and their halves


def test_equal_texts_are_in_one_half_and_a_half_is_half():
    rows = [["a", "b"], ["c"], ["a", "b"], ["d"], ["c"], ["e"]]
    for seed in range(8):
        held = Texts.of(rows, seed).held
        assert held[0] == held[2] and held[1] == held[4]
        assert len({tuple(rows[i]) for i in np.flatnonzero(held)}) == 2  # of the four
    assert len({tuple(Texts.of(rows, seed).held) for seed in range(8)}) > 1
    texts = Texts.of(rows, begin=[0, 0, 5, 0, 0, 0])
    assert [texts.vocabulary[i] for i in texts.ids] == sum(rows, [])
    assert texts.position.tolist() == [0, 1, 0, 5, 6, 0, 0, 0]
    assert texts.where(0).tolist() == [0, 3]
    assert Texts.of(rows, same=[1, 1, 1, 2, 2, 2]).held.sum() == 3
    with pytest.raises(Refused, match="without tokens"):
        Texts.of([["a"], []])


def test_firings_and_a_table_are_the_same():
    table = torch.tensor([[0.0, 2.0], [1.0, -3.0], [0.5, 0.0]])
    for fired in (
        Fired.of(table),
        Fired.of(table.double().numpy()),
        Fired.of(
            Firings(np.array([2, 0, 1]), np.array([0, 1, 0]), np.array([0.5, 2.0, 1.0]), 3, 2)
        ),
    ):
        assert [part.tolist() for part in fired.at(0)] == [[1, 2], [1.0, 0.5]]
        assert fired.mask(1).tolist() == [True, False, False] and fired.n_units == 2
    for bad in (table * float("nan"), table[0]):
        with pytest.raises(Refused, match="finite numbers"):
            Fired.of(bad)


def test_contexts_are_what_they_are_called():
    texts, flat = made()
    where = after(flat, texts, "cat") & (flat != "dog")
    values = unit(where)
    (examples,) = collect(values[:, None], texts, n=12)
    assert examples.highest == values[texts.half[0]].max() and examples.enough
    in_half = {
        tuple(flat[a:b]): bool(h)
        for a, b, h in zip(texts.start, texts.start[1:], texts.held, strict=False)
    }
    for kinds, held in ((examples.seen, False), (examples.held, True)):
        for contexts in (kinds.top, kinds.spread, kinds.random, kinds.near):
            assert len(contexts) == 12
            for context in contexts:
                plain = tuple(word.strip() for word in context.words)
                mine = [t for t in in_half if plain == t[context.begin :][: len(plain)]]
                assert mine and in_half[mine[0]] == held
                assert len(plain) == min(len(mine[0]), BEFORE + AFTER + 1)
        tops = [context.values[context.at] for context in kinds.top]
        assert tops == sorted(tops, reverse=True) and max(tops) == max(values[texts.half[held]])
        spread = [context.values[context.at] for context in kinds.spread]
        assert spread == sorted(spread, reverse=True) and spread[-1] < tops[-1]
        for near in kinds.near:
            assert max(near.values) < examples.level and near.values[near.at] < 1
        # the token before is a cat, as at every firing, yet this one is a dog
        assert kinds.near[0].words[kinds.near[0].at - 1 :][:2] == (" cat", " dog")
        assert any(max(c.values) < examples.level for c in kinds.random)


def test_a_near_miss_does_not_fire_weakly_either():
    texts, flat = made(600)
    cats, rng = np.flatnonzero(flat == "cat"), np.random.default_rng(0)
    values = np.zeros(texts.n)
    strength = rng.choice([5.0, 0.6, 0.0], len(cats), p=[0.1, 0.45, 0.45])  # 0.6 is not strong
    values[cats] = strength
    (examples,) = collect(values[:, None], texts)
    assert len(examples.held.near) == len(examples.seen.near) == 10
    for near in examples.held.near + examples.seen.near:
        assert near.values[near.at] == 0 and max(near.values) <= 0.6


def test_what_is_drawn_for_a_unit_is_its_own():
    texts, flat = made(120)
    values = np.stack([unit(flat == w, i) for i, w in enumerate(("cat", "dog", "mat"))], 1)
    every, (two,) = collect(values, texts), collect(values, texts, [2])
    assert every[2].seen == two.seen and every[2].held == two.held
    assert collect(values, texts, [2], seed=1)[0].seen != two.seen
    assert collect(torch.from_numpy(values), texts, [-1])[0].held == two.held
    with pytest.raises(Refused, match="10 tokens, and the texts have"):
        collect(values[:10], texts)
    with pytest.raises(ValueError, match="from 0 to 2"):
        collect(values, texts, [3])


def test_a_context_shows_where_it_fires():
    context = Context((" the", " cat", "\n"), (0.0, 2.0, 3.0))
    assert context.marked(2.0) == " the [[cat]]\n[[]]" and str(context) == " the cat\n"
    assert context.marked(0.0) == " the cat\n" and context.with_values().values == ()


# ------------------------------------------------------------------------------ names as rules


@pytest.mark.parametrize(
    "clauses",
    [
        [("at", ("the", "each"))],
        [("near", ("chess",)), ("at", ("the",))],
        [("at", (",", "&", '"', " ", "\n", "a b", "x:y", "\\"))],
        [("place", ("1", "5-8", "65-"))],
        [("looks", ("CAPITALS",)), ("ends", ("ing",))],
        [("after", ("日本", "&&", 'a"b'))],
    ],
)
def test_names_are_read_as_they_are_written(clauses):
    assert parse(name_of(clauses)) == clauses


@pytest.mark.parametrize(
    "name",
    ["", "at", "at:", "at: &", "about: x", 'at: "x', "at: x & y", "place: 0", "looks: red", 3],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(Refused):
        parse(name)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("at: cat, dog", [1, 4, 9]),
        ("after: the", [1, 9]),
        ("before: cat", [0, 8]),
        ("near: sat", [3, 4, 5, 6, 7]),
        ("near: sat & at: dog", [4]),
        ("begins: CA, 4", [6, 5]),
        ("ends: t", [1, 2, 9]),
        ("looks: Capital", [3]),
        ("looks: CAPITALS, number, sign", [5, 6, 7]),
        ("place: 1, 5-8", [0, 4, 5, 6, 7, 8]),
        ("at: zebra", []),
    ],
)
def test_where_a_name_is_true(name, where):
    texts = Texts.of(
        [["the", " cat", " sat", " On", " dog", " 42", " CAT", "."], ["the", " cat", " a"]]
    )
    assert np.flatnonzero(Facts(texts).says(name)).tolist() == sorted(where)


def test_the_window_of_near_ends_and_stays_in_its_text():
    texts = Texts.of([["x", *"abcdefghijklmn"], ["y", "z"]])
    assert np.flatnonzero(Facts(texts).says("near: x")).tolist() == list(range(1, 13))


def test_f1_by_hand():
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert f1(a, b) == f1(b, a) == 2 / 5 and f1(a & ~a, b & ~b) == 0


def test_the_best_values_are_the_best_of_all_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        said = rng.integers(3, 40, 7)
        hits = rng.binomial(said, rng.random(7))
        total = int(hits.sum()) + int(rng.integers(0, 20))
        chosen, found = best_values(hits, said, total)
        sets = [np.array([i for i in range(7) if bits >> i & 1], int) for bits in range(1, 128)]
        every = [2 * hits[s].sum() / (said[s].sum() + total) for s in sets if min(hits[s]) >= 3]
        assert found == pytest.approx(max(every, default=0.0))
        assert found == pytest.approx(2 * hits[chosen].sum() / max(said[chosen].sum() + total, 1))


# ---------------------------------------------------------------------- the offline statistics

CASES = {
    "at: cat, dog": lambda flat, texts: np.isin(flat, ["cat", "dog"]),
    "after: the": lambda flat, texts: after(flat, texts, "the"),
    "before: mat": lambda flat, texts: np.append(after(flat, texts, "mat"), False)[1:] | False,
    "ends: at": lambda flat, texts: np.char.endswith(flat, "at"),
    "place: 1, 2": lambda flat, texts: texts.position < 2,
}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("before")])
def test_the_name_that_was_planted_is_found_and_scores_as_it_should(name):
    texts, flat = made()
    (examples,) = collect(unit(CASES[name](flat, texts))[:, None], texts)
    offline = Offline()
    explanation = offline.explain(examples)
    said, wanted = (Facts(texts).says(n) for n in (explanation.text, name))
    assert (said == wanted).all(), explanation
    scores = score(offline, explanation, examples)
    assert scores.detection.value == scores.fuzzing.value == 1 and scores.reliable
    assert scores.simulation.value > 0.95


def test_two_clauses_are_found_where_one_is_not_enough():
    texts, flat = made(600)
    where = (flat == "cat") & after(flat, texts, "the")
    (examples,) = collect(unit(where)[:, None], texts)
    assert parse(Offline().explain(examples).text) in (
        [("at", ("cat",)), ("after", ("the",))],
        [("after", ("the",)), ("at", ("cat",))],
    )


def test_what_stands_before_is_found():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        row = list(rng.choice(WORDS, 30))
        if rng.random() < 0.3:
            row[rng.integers(0, 12)] = "chess"
        rows.append(row)
    texts = Texts.of(rows)
    where = Facts(texts).says("near: chess")
    (examples,) = collect(unit(where)[:, None], texts)
    assert Offline().explain(examples).text == "near: chess"


def test_the_table_is_what_the_unit_does_and_it_is_what_is_simulated():
    texts, flat = made()
    values = np.where(flat == "cat", 9.0, np.where(flat == "dog", 3.0, 0.0))[:, None]
    (examples,) = collect(values, texts)
    explanation = Offline().explain(examples)
    assert dict(explanation.table) == {"cat": 9.0, "dog": 3.0, "": 0.0}
    contexts = [Context((" the", " dog", " cat"), ())]
    assert Offline().simulate(explanation, contexts) == [[0.0, 3.0, 9.0]]
    bare = Explanation(0, "at: dog")  # as somebody else wrote it
    assert Offline().simulate(bare, contexts) == [[0.0, 1.0, 0.0]]
    assert Offline().read("at: dog", examples).table == {
        "dog": 3.0,
        "": pytest.approx(0.5, abs=0.2),
    }


def test_nothing_of_the_half_held_out_is_read_by_the_explainer():
    texts, flat = made()
    values = unit(np.isin(flat, ["cat"]))
    changed = values.copy()
    changed[texts.half[1] & (flat == "dog")] = 5.0
    one, two = (Offline().explain(collect(v[:, None], texts)[0]) for v in (values, changed))
    assert one == two and one.text == "at: cat"


def test_a_unit_that_fires_at_nothing_twice_has_a_name_too():
    """Five firings in each half, each at another token, of another look, at another place."""
    odd = ["cat", "Cat", "CAT", "4", "."]
    rows = [[f"{'x' * at}{i}q" for at in range(9)] for i in range(200)]
    texts = Texts.of(rows)
    values = np.zeros(texts.n)
    for half in (0, 1):
        mine = np.flatnonzero(texts.held == half)[:5]
        for at, text in enumerate(mine):
            rows[text][at * 2 % 9] = odd[at]
            values[texts.start[text] + at * 2 % 9] = 1.0
    texts = replace(Texts.of(rows), held=texts.held)
    (examples,) = collect(values[:, None], texts)
    assert examples.enough
    explanation = Offline().explain(examples)
    assert explanation.text.startswith("looks: ")
    assert not score(Offline(), explanation, examples).reliable


def test_a_unit_that_fires_in_few_texts_is_refused():
    texts, flat = made(60)
    values = np.zeros(texts.n)
    values[texts.start[:3]] = 1.0
    (examples,) = collect(values[:, None], texts)
    assert not examples.enough
    with pytest.raises(Refused, match="too few"):
        Offline().explain(examples)


def test_a_thousand_units_would_take_less_than_two_minutes_of_one_core():
    """40 of them on 60,000 tokens, in the processor's own time."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2_000)]
    rank = 1 / np.arange(1, 2_001)
    rows = [list(rng.choice(words, 60, p=rank / rank.sum())) for _ in range(1_000)]
    texts = Texts.of(rows)
    values = rng.exponential(1, (texts.n, 40)) * (rng.random((texts.n, 40)) < 0.02)
    begun, offline = time.process_time(), Offline()
    for examples in collect(values, texts):
        score(offline, offline.explain(examples), examples)
    assert time.process_time() - begun < 40 * 0.12


# -------------------------------------------------------------------------------------- scores


def test_the_correlation_from_moments_is_pearsons():
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, (4, 9)), rng.normal(-5, 2, (4, 9))
    y += x
    sums = np.array([moments(a, b) for a, b in zip(x, y, strict=True)])
    wanted = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    assert correlation(sums) == pytest.approx(wanted)
    assert correlation(sums[:2], sums[2:]) == pytest.approx(wanted)
    flat = np.array([moments(np.full(9, 0.1), b) for b in y])
    assert correlation(flat) == 0


class Says:
    """A judge whose answers are given, and which keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __getattr__(self, kind):
        if kind.startswith("_"):
            raise AttributeError(kind)

        def judge(explanation, contexts):
            self.asked.append((kind, contexts))
            return [self.answer(kind, context) for context in contexts]

        return judge


def test_judges_see_no_values_and_no_order():
    texts, flat = made()
    (examples,) = collect(unit(flat == "cat")[:, None], texts)
    judge = Says(lambda kind, c: [0.0] * len(c.words) if kind == "simulate" else 1.0)
    scores = score(judge, Explanation(0, "?"), examples)
    assert scores.detection.value == scores.fuzzing.value == 0.5 and scores.simulation.value == 0
    asked = dict(judge.asked)
    assert all(context.values == () for context in asked["detect"] + asked["simulate"])
    assert {value for c in asked["fuzz"] for value in c.values} == {0.0, 1.0}
    cats = [" cat" in c.words for c in asked["detect"]]
    assert sum(cats) == 10 and cats != sorted(cats) and cats != sorted(cats, reverse=True)


def test_scores_tell_a_right_name_from_a_half_right_and_a_wrong_one():
    texts, flat = made()
    (examples,) = collect(unit(np.isin(flat, ["cat", "dog"]))[:, None], texts)
    offline, found = Offline(), []
    for name in ("at: cat, dog", "at: cat", "at: mat"):
        found.append(score(offline, offline.read(name, examples), examples))
    right, part, wrong = found
    for kind in ("detection", "fuzzing", "simulation"):
        values = [getattr(each, kind).value for each in (right, part, wrong)]
        assert values[0] > values[1] > values[2] - 1e-9, kind
        for each in (right, part, wrong):
            found = getattr(each, kind)
            assert found.low <= found.value <= found.high and found.n >= 19
    assert right.reliable and not wrong.reliable
    assert 0.05 < part.simulation.high - part.simulation.low < 0.8
    again = score(offline, offline.read("at: cat", examples), examples)
    assert again == part
