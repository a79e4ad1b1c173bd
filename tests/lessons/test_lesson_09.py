"""Lesson 09: what units go by, which names are right, names to be scored, the figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_helpers.course.answers import Wrong
from mi_helpers.lessons import coders
from mi_helpers.lessons.lesson_09 import describing, figures, names
from mi_helpers.lessons.lesson_09 import experiments as lab
from mi_helpers.lessons.lesson_09.truth import Truth, Truths, about, agreement, hidden, role
from mi_helpers.lessons.shared import documents, shipped_model
from mi_helpers.plots import render
from mi_helpers.saes.examples import Context, Texts
from mi_helpers.saes.explainers import Explanation
from mi_helpers.saes.name_map import name_map
from mi_helpers.saes.rules import f1
from mi_helpers.saes.sources import TinyWorldText
from mi_helpers.tinyworld.source import Span
from mi_helpers.widgets import corners


@pytest.fixture(scope="module")
def ground():
    return describing.small_ground()


@pytest.fixture(scope="module")
def latents(ground):
    return ground.units("latent", 30)


# -- what TinyWorld knows of a token -----------------------------------------------------------


def test_the_most_special_role_is_told_and_some_whatever_their_value():
    spans = [Span(0, 5, "entity", "city"), Span(0, 5, "ioi", "IO"), Span(0, 30, "fact", "x")]
    assert role(spans, 0, 5) == "ioi IO"
    assert role(spans[:1], 3, 9) == "entity city"
    assert role(spans, 5, 9) == "nothing" == role([], 0, 3)
    assert role([Span(2, 4, "month", 7)], 0, 3) == "month"


def test_a_text_is_about_its_family_and_prose_about_its_topic_once_that_is_sure():
    tokenizer, source = shipped_model().tokenizer, TinyWorldText()
    (fact,) = documents("facts", 1, 3)
    assert set(about(tokenizer, source, fact, 5)) == {"facts"}
    prose = documents("prose", 4, 3)
    said = [row[0] for d in prose for row in hidden(tokenizer, source, d)]
    assert said[0] == "prose" and set(said) - {"prose"} <= set(source.world.topics)
    assert len(set(said)) > 1


def test_what_is_coming_is_the_role_of_the_next_token():
    tokenizer, source = shipped_model().tokenizer, TinyWorldText()
    for document in documents("ioi", 3, 5):
        rows = hidden(tokenizer, source, document)
        assert [after for _, _, after in rows] == [now for _, now, _ in rows[1:]] + ["the end"]
        assert "ioi IO" in [now for _, now, _ in rows]


# -- what a unit goes by -----------------------------------------------------------------------


def a_search(n: int = 400) -> tuple[Truths, dict[str, np.ndarray]]:
    """Two kinds of facts, independent of each other; the second half is late."""
    rng = np.random.default_rng(0)
    index = {"here": rng.integers(0, 6, n), "about": rng.integers(0, 3, n)}
    values = {"here": list("abcdef"), "about": ["chess", "tennis", "war"]}
    late = np.arange(n) >= n // 2
    return Truths({k: (values[k], index[k]) for k in index}, late), index


def test_the_truth_of_a_unit_is_found_whether_of_one_kind_or_of_two():
    search, index = a_search()
    one = search.of(np.isin(index["here"], [1, 4]))
    assert set(one[0].parts[0][1]) == {"b", "e"} and one[0].f1 == 1 and not one[0].hidden
    both = search.of((index["here"] < 3) & (index["about"] == 2))[0]
    assert {kind for kind, _ in both.parts} == {"here", "about"}
    assert both.f1 == 1 and both.hidden and both.known
    assert "about: war" in str(both) and " & " in str(both)


def test_a_truth_is_judged_on_the_late_texts():
    search, index = a_search()
    strong = np.where(search.late, index["here"] == 2, index["here"] == 1)
    first = search.of(strong)[0]
    assert first.parts[0] == ("here", ("b",)) and first.f1 == 0 and not first.known


def test_a_unit_that_fires_by_chance_has_no_truth_and_no_right_name():
    search, _ = a_search()
    strong = np.random.default_rng(1).random(400) < 0.1
    found = search.of(strong)
    assert not any(truth.known for truth in found)
    assert agreement(strong, found, search.late) == 0


def test_a_name_agrees_with_any_truth_that_is_known_and_with_no_other():
    late = np.array([False] * 4 + [True] * 4)
    mask = np.array([0, 0, 0, 0, 1, 1, 0, 0], dtype=bool)
    good, bad = Truth((), mask, 0.6), Truth((), ~mask, 0.4)
    assert agreement(mask, [bad, good], late) == 1
    assert agreement(~mask, [bad, good], late) == 0
    assert agreement(mask, [], late) == 0


# -- units and their names ---------------------------------------------------------------------


def test_units_have_the_text_s_contexts_and_strong_firings(ground, latents):
    assert len({unit.number for unit in latents}) == len(latents) == 30
    for unit in latents[:5]:
        column = ground.values["latent"][:, unit.number]
        assert np.array_equal(unit.strong, column >= unit.level)
        seen = column[~ground.held].max()
        assert unit.examples.highest == pytest.approx(seen) and unit.level == seen / 4
        assert unit.examples.held.top[0].values[unit.examples.held.top[0].at] == pytest.approx(
            column[ground.held].max()
        )
    again = ground.of("latent", [unit.number for unit in latents[:3]])
    assert [unit.number for unit in again] == [unit.number for unit in latents[:3]]


def test_random_directions_are_on_as_rarely_as_latents(ground):
    on = [(ground.values[kind] > 0).mean(0) for kind in ("random direction", "latent")]
    assert on[0].max() <= on[1].max() + 1e-3
    assert np.median(on[0]) == pytest.approx(np.median(on[1][on[1] > 1 / 2_000]), rel=0.5)


def test_a_threshold_makes_values_as_rare_as_others():
    rng = np.random.default_rng(0)
    values, others = rng.normal(size=(1_000, 5)), np.zeros((1_000, 2))
    others[:50, 0] = 1  # the other unit is never on, and no model for anybody
    found = lab.as_rare_as(values, others, rng)
    assert (found > 0).mean(0) == pytest.approx(0.05, abs=0.002)
    assert np.array_equal(found.argmax(0), values.argmax(0))


def test_a_name_is_made_of_the_tokens_or_of_those_before_whichever_tells_more(ground, latents):
    unit = latents[0]

    def by_token(contexts, fires, most):
        assert most == lab.MOST and all(map(len, contexts))
        before = contexts[0][0] == ""
        return ["of"] if before else ["the", ","], 0.9 if before else 0.4

    assert lab.from_contexts(by_token, unit) == "after: of"
    by_other = lambda c, f, m: (by_token(c, f, m)[0], 0.5 - by_token(c, f, m)[1])  # noqa: E731
    assert lab.from_contexts(by_other, unit) == 'at: the, ","'


def test_a_perfect_name_scores_one_and_the_verdict_follows_the_score_and_the_truth(ground, latents):
    unit = next(u for u in latents if u.truth and u.truth.f1 > 0.9 and not u.truth.hidden)
    found = lab.judge(ground, unit, names.as_name(unit.truth))
    assert found.right and found.agrees == pytest.approx(1) and found.score > 0.5
    assert found.natural > 0.5
    made = [
        lab.judge(ground, unit, names.as_name(unit.truth), lambda p, a, s=s: s) for s in (0.7, 0.6)
    ]
    assert [each.verdict for each in made] == ["reliable and right", "unreliable"]
    wrong = lab.judge(ground, unit, "at: nowhere", lambda predicted, actual: 0.9)
    assert wrong.verdict == "reliable and wrong" and wrong.natural == 0
    assert lab.right_if_reliable([*made, wrong]) == (1, 2)


def test_a_table_says_how_many_are_which_with_intervals():
    assert lab.interval(0, 0) == (0, 1)
    low, high = lab.interval(8, 10)
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson 1927, by hand
    assert lab.share(8, 10) == "80% (49% to 94%)" and lab.share(0, 0) == "–"
    unit = lab.Named(None, "at: a", 0.9, 0.9, 0.8)
    rows = lab.table({"latent": [unit, replace(unit, agrees=0.1), replace(unit, score=0.1)]})
    assert "| latent | 33% | 33% | 33% | **50% (" in rows


def test_correlation_is_over_all_tokens_and_0_where_one_side_is_constant():
    assert lab.correlation([[1, 0], [0]], [[2, 0], [0]]) == pytest.approx(1)
    assert lab.correlation([[1, 1]], [[0, 3]]) == 0 == lab.correlation([[1, 0]], [[2, 2]])


def test_contexts_are_shown_around_the_token_that_they_are_for():
    context = Context((" a", " b", " c", " d"), (0.0, 2.0, 5.0, 0.0), at=2)
    assert lab.shown(context, 1.0) == "a [[b]] [[c]] d"
    assert lab.shown(context, 3.0, before=1, after=0) == "b [[c]]"
    texts = Texts.of([["One", " two"], ["Three", " four", " five"]])
    assert lab.around(texts, 3) == "Three [[four]] five"
    assert lab.around(texts, 1, before=0) == "[[two]]"


def test_the_game_has_latents_of_different_sorts(latents):
    chosen = lab.for_the_game(latents)
    sorts = [frozenset(kind for kind, _ in unit.truth.parts) for unit in chosen.values()]
    assert 1 < len(chosen) <= 4 and len(set(sorts)) == len(sorts)
    assert list(chosen) == sorted(chosen)
    best = max((unit for unit in latents if unit.truth), key=lambda unit: unit.truth.f1)
    assert best.truth.f1 == max(unit.truth.f1 for unit in chosen.values())
    nameless = [unit for unit in latents if not unit.truth]
    assert len(lab.for_the_game(nameless)) == min(4, len(nameless))


@pytest.mark.filterwarnings("error")  # a topic that no text is about, 0 / 0
def test_topics_are_told_by_latents_that_fire_in_their_texts(ground):
    for unit in lab.topic_latents(ground, 3):
        assert unit.kind == "latent" and unit.examples.enough


# -- changing the text -------------------------------------------------------------------------


def test_the_share_that_stays_is_that_of_the_contexts_that_begin_their_text(ground):
    model, coder = shipped_model(), coders.coder_of(shipped_model())
    site, asked = coders.middle(model), []

    def swap(model, coder, site, latent, ids, place, back, others):
        asked.append((ids.shape[1], place, back))
        _, cache = model.run_with_cache(ids, [site])
        return coder.encode(cache[site])[0, place, latent].expand(len(others)) / 2

    units = ground.units("latent", 6)
    shares = lab.kept_after_swaps(model, coder, site, units, swap, torch.arange(3), [0, 2])
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)  # the harvest is kept in bfloat16
    assert all(place - back >= 1 and place < length for length, place, back in asked)
    none = lab.kept_after_swaps(model, coder, site, [], swap, torch.arange(3), [0])
    assert np.isnan(none[0])


# -- names of the investigation ----------------------------------------------------------------


def test_a_name_may_speak_of_what_tinyworld_knows(ground):
    texts, index = ground.truths.index["about"]
    here = index == texts.index("ioi")
    assert np.array_equal(names.says("about: ioi", ground), here)
    both = names.says("about: ioi , facts&at: the", ground)
    assert np.array_equal(
        both, (here | (index == texts.index("facts"))) & names.says("at: the", ground)
    )
    quoted = names.says('after: "&"', ground)
    assert np.array_equal(quoted, ground.facts.holds("after", ["&"]))


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        (7, "A name is a text"),
        ("  ", "A name is a text"),
        ("&", "no name"),
        ("about: cricket", "cannot be"),
        ("role:", "cannot be nothing"),
        ("beside: the", "Besides, there are"),
        ("at: the & about", "cannot be nothing"),
    ],
)
def test_what_is_no_name_is_said(ground, name, fragment):
    with pytest.raises(Wrong, match=fragment):
        names.says(name, ground)


def test_a_word_that_this_text_lacks_is_allowed_where_the_other_has_it(ground):
    other = replace(ground, truths=a_search(ground.texts.n)[0])
    assert names.says("about: tennis", other).any()
    with pytest.raises(Wrong):
        names.says("about: ioi", other)
    assert not names.says("about: ioi", other, among=ground).any()


def test_a_truth_as_a_name_is_true_where_the_truth_is(ground, latents):
    for unit in latents[:12]:
        for truth in unit.truths[:6]:
            mask = names.says(names.as_name(truth), ground)
            if not any("" in values for _, values in truth.parts):
                assert np.array_equal(mask, truth.where)
    start = ground.truths.judged((("after", ("",)),), latents[0].strong)
    assert np.array_equal(names.says(names.as_name(start), ground), start.where)


def test_units_that_are_hard_to_count_are_those_whose_truth_is_furthest_ahead(ground, latents):
    counted = [lab.counted(unit) for unit in latents]
    found = names.hard_to_count(ground, latents, counted, 3)
    gains = {
        u.number: names.best_name(ground, u, c)[1] for u, c in zip(latents, counted, strict=True)
    }
    assert sorted(found) == list(found) == sorted(sorted(gains, key=gains.get)[-3:])
    assert min(gains.values()) >= 0
    early = ~ground.held
    for unit in latents:
        if unit.number in found:
            first, best = (
                f1(names.says(n, ground)[early], unit.strong[early]) for n in found[unit.number]
            )
            assert best - first == pytest.approx(gains[unit.number], abs=0.02)


# -- figures -----------------------------------------------------------------------------------


def test_the_game_is_drawn_for_every_latent_and_says_what_is_no_name(latents):
    units = lab.for_the_game(latents)
    for values in corners(latent=list(units)):
        figure = figures.game(units, **values, name="near: the & looks: small")
        assert f"latent {values['latent']}" in figure.get_suptitle()
        assert len(render(figure)) > 10_000
    with pytest.raises(ValueError, match="no name"):
        figures.game(units, next(iter(units)), "the")


def test_a_long_name_hides_neither_the_score_nor_the_rest_of_the_game(latents):
    units = lab.for_the_game(latents)
    for name in ("at: " + ", ".join(f"word{i}" for i in range(300)), "at: " + "x" * 999, "at:\n a"):
        figure = figures.game(units, next(iter(units)), name)
        box = figure._suptitle.get_window_extent()
        assert box.x1 <= figure.bbox.x1 and "\n" not in figure.get_suptitle()
        assert "score on text held out" in figure.get_suptitle()


def test_a_name_that_is_too_long_for_its_place_says_so():
    assert figures.fit("at: the,\n  each", 20) == "at: the, each"
    assert figures.fit("at: the, each", 9) == "at: the,…" and len(figures.fit("ab " * 99, 40)) <= 40


def test_a_context_is_cut_to_a_line_around_its_token():
    words = tuple(f" word{i}" for i in range(40))
    tokens, places = figures.cut(Context(words, (0.0,) * 40, at=20), length=60)
    assert 20 in places and sum(map(len, tokens)) <= 60 and len(tokens) == len(places)
    assert figures.cut(Context((" a\n", "\tb"), (0.0, 0.0)))[0] == [" a ", " b"]


def test_shares_are_drawn_with_what_they_are_of():
    unit = lab.Named(None, "at: a", 0.9, 0.9, 0.8)
    some = [unit, replace(unit, agrees=0.0), replace(unit, score=0.2)]
    bars = figures.verdicts({"latent": some, "neuron": some[2:]})
    widths = [[round(bar.get_width(), 2) for bar in each] for each in bars.axes[0].containers]
    assert widths == [[0.33, 0.0], [0.33, 0.0], [0.33, 1.0]]
    by_score = figures.right_by_score({"latent": some}, [-1, 0.5, 1.01])
    assert by_score.axes[0].get_lines()[0].get_ydata().tolist() == [1.0, 0.5]


def test_every_group_of_a_map_is_drawn():
    texts = [f"at: {word}, {other}" for word in ("the", "each") for other in "abcdefgh"]
    chart = name_map([Explanation(i, text) for i, text in enumerate(texts)])
    for group in range(len(chart.titles)):
        figure = figures.name_map(chart, texts, group)
        assert f"{(chart.cluster == group).sum()} of 16 names" in figure.get_suptitle()
        assert len(render(figure)) > 5_000
    with pytest.raises(ValueError, match="no group"):
        figures.name_map(chart, texts, len(chart.titles))


def test_no_autoencoder_of_another_model_is_made_up():
    class Other:
        name, n_layers = "pythia", 6

    with pytest.raises(ValueError, match="No autoencoder of pythia"):
        coders.coder_of(Other())
    assert coders.middle(Other()) == ("resid_post", 3)
