"""Lesson 03: pairs of prompts, gates, estimates and the pronoun skew, by hand, on tiny models."""

import ast
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from rounding import SHARE
from tiny_models import tiny_model, word_tokenizer

from mi_helpers import plots
from mi_helpers.ablation import Mean, ablate
from mi_helpers.course.exercise import declared
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_03 import claims, figures, pronouns, tools
from mi_helpers.lessons.lesson_03 import experiments as lab
from mi_helpers.lessons.lesson_03 import pairs as prompts
from mi_helpers.lessons.shared import make_batch, token_pool
from mi_helpers.loading import load_model
from mi_helpers.patching import activation_patch
from mi_helpers.sweeps import Sweep
from mi_helpers.tinyworld import lexicon
from mi_helpers.widgets import corners


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(tokenizer=word_tokenizer())


def small_pairs(model):
    texts = [("the cat sat on the", "the dog sat on the"), ("a hat was in the", "a mat was in the")]
    return prompts.make_pairs(model, texts, [(" mat", " hat"), (" cat", " dog")])


# -- gates -----------------------------------------------------------------------------------


def test_gates_are_logic_on_bits():
    for bits in ([0, 0], [0, 1], [1, 0], [1, 1]):
        wires = torch.tensor(bits, dtype=torch.float32)
        assert lab.gate_and(wires) == float(all(bits))
        assert lab.gate_or(wires) == float(any(bits))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_two_directions_contradict_each_other(n):
    for wire in range(n):
        assert lab.gate_effects(lab.gate_and, n, wire) == {"denoise": 0.0, "noise": 1.0}
        assert lab.gate_effects(lab.gate_or, n, wire) == {"denoise": 1.0, "noise": 0.0}


def test_a_gate_of_another_kind_is_measured_as_it_is():
    mean = lab.gate_effects(lambda wires: wires.mean(-1), 4, 1)
    assert mean == {"denoise": 0.25, "noise": 0.25}


@pytest.mark.parametrize(("n", "wire"), [(1, 0), (2, 2), (3, -1)])
def test_a_wire_that_is_not_there(n, wire):
    with pytest.raises(ValueError, match=f"Wire {wire} of {n} is no choice"):
        lab.gate_effects(lab.gate_or, n, wire)


# -- pairs -----------------------------------------------------------------------------------


def test_pairs_line_up(tiny):
    pairs = small_pairs(tiny)
    assert len(pairs) == 2 and pairs.clean.shape == pairs.corrupted.shape == (2, 6)
    assert pairs.subject == [2]
    assert tiny.str_tokens(pairs.clean[1])[2] == " hat"
    assert tiny.str_tokens(pairs.corrupted[1])[2] == " mat"
    assert pairs.answer == [tiny.to_single_token(" mat"), tiny.to_single_token(" cat")]
    one = pairs[1]
    assert len(one) == 1 and one.texts == [pairs.texts[1]] and one.wrong == pairs.wrong[1:]
    assert torch.equal(one.clean, pairs.clean[1:])
    assert pairs.columns(tiny) == ["<bos>", "the", "name", "sat", "on", "the"]


def test_pairs_that_do_not_line_up(tiny):
    with pytest.raises(ModelError, match="4 to 5 tokens"):
        prompts.make_pairs(tiny, [("the cat sat", "the old dog sat")], [(" mat", " hat")])
    with pytest.raises(ModelError, match="2 tokens"):
        prompts.make_pairs(tiny, [("the cat sat", "the dog sat")], [(" big hat", " hat")])


def test_landmarks_of_one_length_in_different_cities(shipped):
    pairs = prompts.fact_pairs(shipped, 8, seed=1)
    city = {place.name: place.city for place in lexicon.landmarks()}
    cut = slice(len("The "), -len(" is in the city of"))
    for (a, b), right, wrong in zip(pairs.texts, pairs.answer, pairs.wrong, strict=True):
        assert city[a[cut]] != city[b[cut]]
        assert shipped.tokenizer.decode([right]) == " " + city[a[cut]]
        assert shipped.tokenizer.decode([wrong]) == " " + city[b[cut]]
    assert pairs.texts == prompts.fact_pairs(shipped, 8, seed=1).texts
    assert pairs.texts != prompts.fact_pairs(shipped, 8, seed=2).texts
    alike = prompts.fact_pairs(shipped, 8, seed=1, alike=True)
    assert all(city[a[cut]] == city[b[cut]] for a, b in alike.texts)
    assert all(right != wrong for right, wrong in zip(alike.answer, alike.wrong, strict=True))


def test_a_model_without_the_words(tiny):
    with pytest.raises(ValueError, match="too few landmarks"):
        prompts.fact_pairs(tiny, 2, seed=0)


def test_swapped_words_leave_the_possible_answers_where_they_stand(shipped):
    pairs = prompts.swap_pairs(shipped, 4, seed=0)
    clean, corrupted = pairs.clean, pairs.corrupted
    assert pairs.subject == [4, 7]
    assert torch.equal(clean[:, 4], corrupted[:, 7]) and torch.equal(clean[:, 7], corrupted[:, 4])
    assert torch.equal(clean[:, -1], clean[:, 4]) and torch.equal(clean[:, -1], corrupted[:, -1])
    assert clean[:, 5].tolist() == pairs.answer and clean[:, 8].tolist() == pairs.wrong
    with pytest.raises(ValueError, match="too short"):
        prompts.swap_pairs(shipped, 1, 0, size=5)


# -- over many pairs -------------------------------------------------------------------------


def test_the_ruler_of_prompts_that_agree(tiny):
    pairs = small_pairs(tiny)
    ruler = lab.scaled_metric(tiny, pairs, 2.0, pairs.corrupted)
    raw = pairs.metric(tiny)
    logits = [tiny.forward(ids)[:, -1] for ids in (pairs.corrupted, pairs.clean)]
    assert float(ruler(logits[0])) == pytest.approx(0, abs=1e-5)
    assert float(ruler(logits[1])) == pytest.approx((raw.clean - raw.corrupted) / 2, abs=1e-4)


def test_the_way_from_one_run_to_the_other(tiny):
    one = small_pairs(tiny)[0]
    metric = one.metric(tiny)
    whole = activation_patch(tiny, one.clean, one.corrupted, "resid_pre", metric)
    way = lab.along_the_way(tiny, one, 1, 2, [0, 0.5, 1])
    assert way.shape == (3,)
    rounding = 10 * SHARE / abs(metric.clean - metric.corrupted)  # logits of 10, over their gap
    assert way[0] == pytest.approx(0, abs=rounding)
    assert way[2] == pytest.approx(float(whole[1, 2]), abs=rounding)


def test_true_effects_and_estimates_have_the_same_cells(tiny):
    pairs = small_pairs(tiny)
    for site, cells in (("mlp_out", 3 * 4), ("z", 3 * 2 * 4)):
        true, guess = lab.true_and_guess(tiny, pairs, site)
        assert true.shape == guess.shape == (2, cells)
    one, true = pairs[1], lab.true_and_guess(tiny, pairs, "mlp_out")[0]
    alone, whole = one.metric(tiny), pairs.metric(tiny)
    effect = activation_patch(tiny, one.clean, one.corrupted, "mlp_out", alone)[:, 2:].ravel()
    gaps = (alone.clean - alone.corrupted) / (whole.clean - whole.corrupted)  # its own, over theirs
    assert np.allclose(true[1], gaps * effect.numpy(), atol=1e-4)


def test_noising_is_denoising_the_reverse(tiny):
    pairs = small_pairs(tiny)
    assert pairs.reversed().texts == [(b, a) for a, b in pairs.texts]
    _, needed = lab.both_directions(tiny, pairs)
    enough, _ = lab.both_directions(tiny, pairs.reversed())
    assert torch.allclose(needed, enough, atol=1e-4) and needed.abs().max() > 1e-3


def test_all_heads_together_at_the_last_token(tiny):
    pairs = small_pairs(tiny)
    one = lab.both_directions(tiny, pairs)[0]
    assert lab.together(tiny, pairs, [], tools.patch_heads) == pytest.approx((0, 0), abs=1e-4)
    last = Sweep("heads", positions=-1)
    alone = activation_patch(tiny, pairs.clean, pairs.corrupted, "z", pairs.metric(tiny), over=last)
    assert alone.shape == one.shape
    found = lab.together(tiny, pairs, [(1, 1)], tools.patch_heads)[0]
    assert found == pytest.approx(float(alone[1, 1]), abs=1e-4)


def test_words_of_unequal_length_are_unequal(shipped):
    clean, corrupted, answers, wrong = prompts.unequal_pairs(shipped, 6, seed=0)
    for a, b in zip(clean, corrupted, strict=True):
        assert prompts.length(shipped, a) != prompts.length(shipped, b)
    assert all(right != other for right, other in zip(answers, wrong, strict=True))


def test_ranks_and_the_strongest():
    assert lab.rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert lab.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert lab.strongest([[0.1, 0.9], [0.5, -2.0]], 3) == [(0, 1), (1, 0), (0, 0)]


# -- the pronoun skew --------------------------------------------------------------------------


def test_the_slope_is_the_share_of_the_skew():
    truth = pronouns.true_log_odds()
    assert pronouns.skew(truth) == pytest.approx(1)
    assert pronouns.skew(0.3 * truth + 5) == pytest.approx(0.3)
    assert pronouns.skew(np.ones(len(truth))) == pytest.approx(0)
    jobs = ["nurse", "farmer"]
    assert np.allclose(pronouns.true_log_odds(jobs), [np.log(9), -np.log(9)])


def test_sentences_differ_in_the_occupation_only():
    texts = pronouns.pronoun_texts(3, ["nurse", "farmer", "judge"])
    frames = {
        text.replace(job, "X")
        for text, job in zip(texts, ["nurse", "farmer", "judge"], strict=True)
    }
    assert len(frames) == 1 and not {" she", " he"} & {texts[0][-4:], texts[0][-3:]}
    assert pronouns.pronoun_texts(3, ["nurse"]) == texts[:1]
    assert any(pronouns.pronoun_texts(s, ["nurse"]) != texts[:1] for s in range(6))


def test_sides_are_the_ends():
    she, he = pronouns.sides(["nurse", "farmer", "judge", "doctor"], share=0.25)
    assert (she, he) == (["judge"], ["farmer"])


def test_pronoun_pairs_go_from_he_to_she(shipped):
    pairs = pronouns.pronoun_pairs(shipped, 6, seed=0)
    p = lexicon.occupations()
    for clean, corrupted in pairs.texts:
        (a,) = set(clean.replace(",", "").split()) - set(corrupted.replace(",", "").split())
        (b,) = set(corrupted.replace(",", "").split()) - set(clean.replace(",", "").split())
        assert p[a] > 0.6 and p[b] < 0.4
    metric = pairs.metric(shipped)
    assert metric.clean > 0 > metric.corrupted


def test_the_models_log_odds_are_those_of_its_probabilities(shipped):
    texts = ["The nurse said that", "In the evening the farmer knew that"]  # unequal lengths
    found = pronouns.log_odds(shipped, texts)
    for text, value in zip(texts, found, strict=True):
        p = shipped(text)[0, -1].softmax(-1)
        she, he = (p[shipped.to_single_token(word)] for word in (" she", " he"))
        assert value == pytest.approx(float((she / he).log()), abs=1e-3)


def test_other_heads_are_as_many_in_the_same_layers(tiny):
    wide = tiny_model(num_attention_heads=4, num_key_value_heads=2, tokenizer=word_tokenizer())
    spared = [(0, 1), (2, 0), (2, 3)]
    for seed in range(5):
        other = pronouns.random_heads(wide, 3, seed, spared)
        assert len(set(other)) == 3 and not set(other) & set(spared)
        assert sorted(layer for layer, _ in other) == [0, 2, 2]
    assert pronouns.random_heads(wide, 3, 0, spared) == pronouns.random_heads(wide, 3, 0, spared)
    assert len(set(pronouns.random_heads(tiny, 3, 0, [(0, 0)]))) == 3


def test_a_direction_taken_out_is_level_with_the_centre(tiny):
    key, v, centre = ("resid_post", 1), np.arange(1.0, 13.0), np.linspace(-1, 1, 12)
    with tiny.hooks(pronouns.without_direction(key, v, centre)):
        _, after = tiny.run_with_cache("the cat sat on the mat", key)
    _, before = tiny.run_with_cache("the cat sat on the mat", key)
    unit = v / np.linalg.norm(v)
    level = (after[key][0, 1:].numpy() - centre) @ unit
    assert np.allclose(level, 0, atol=1e-4)
    change = (after[key] - before[key])[0].numpy()
    assert np.allclose(change[0], 0) and not np.allclose(change[1:], 0)
    assert np.allclose(change - np.outer(change @ unit, unit), 0, atol=1e-4)  # along v alone


def test_the_skew_has_a_direction_and_its_removal_spares_the_rest(shipped):
    key = ("resid_post", shipped.n_layers // 2)
    learn, test = claims.learn_and_test()
    assert not set(learn) & set(test) and len(learn) == len(test) == 20
    hooks = pronouns.without_direction(key, *pronouns.skew_direction(shipped, key, learn, range(3)))
    intact, after = (pronouns.mean_log_odds(shipped, test, h, range(3)) for h in (None, hooks))
    assert pronouns.skew(intact, test) > 0.8
    assert pronouns.skew(after, test) < 0.6 * pronouns.skew(intact, test)
    batch = make_batch(shipped, answers=4, families=("facts", "repetition", "agreement"))
    assert max(pronouns.damage(shipped, batch, hooks).values()) < 0.5
    assert pronouns.damage(shipped, batch, {}) == dict.fromkeys(batch.names, 0.0)


def test_heads_are_ablated_to_the_means_of_a_pool(shipped):
    batch = make_batch(shipped, answers=4, families=("facts",))
    pool = token_pool(shipped, batch)
    heads = [(0, 1), (0, 3), (2, 0)]
    with shipped.hooks(ablate(shipped, heads, Mean(pool))):
        _, cache = shipped.run_with_cache(batch.ids, ["z"])
    for layer, head in heads:
        mean = pool["z", layer].mean(0)[head]
        assert torch.allclose(cache["z", layer][:, 1:, head], mean, atol=1e-4)


# -- figures ---------------------------------------------------------------------------------


def test_positions_are_named_by_both_prompts(tiny):
    pairs = small_pairs(tiny)
    names = figures.token_names(tiny, pairs.clean[0], pairs.corrupted[0])
    assert names == ["0 <bos>", "1 the", "2 cat/dog", "3 sat", "4 on", "5 the"]


def test_the_explorer_draws_every_state(shipped):
    explorer = figures.PatchingExplorer(shipped)
    controls = {
        "pair": "city",
        "clean": "The Eiffel Tower is in the city of",
        "corrupted": "The Trevi Fountain is in the city of",
        "answers": "",
        "site": list(figures.SITES),
        "mode": ["denoise", "noise"],
    }
    for values in corners(**controls):
        assert plots.render(explorer(**values)).startswith(b"\x89PNG")


def test_the_explorer_patches_a_pair_once(shipped, monkeypatch):
    explorer = figures.PatchingExplorer(shipped)
    state = ("city", "The judge said that", "The butcher said that", "", "attn_out", "noise")
    explorer(*state)
    monkeypatch.setattr(figures, "activation_patch", None)
    explorer(*state)


def test_the_explorer_takes_answers_of_ones_own(shipped):
    explorer = figures.PatchingExplorer(shipped)
    texts = ("The keys near the cabinet", "The key near the cabinet")
    blanks = (f"{texts[0]} ", f" {texts[1]}")  # do not count
    drawn = explorer("city", *blanks, "are/is", "heads", "noise")
    assert "are over is" in drawn.axes[0].get_title("left")
    _, metric, _ = explorer.prompts(*texts, "are/is")
    assert metric.clean > 0 > metric.corrupted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": "The Colosseum is in the city of"}, "9 tokens and the corrupted one 8"),
        ({"corrupted": "The Moulin Rouge is in the city of"}, "completed with 'Paris'"),
        ({"clean": ""}, "is empty"),
        ({"corrupted": "The Eiffel Tower is in the city of"}, "are the same"),
        ({"site": "head"}, "no site 'head'"),
        ({"pair": "town"}, "no pair 'town'"),
        ({"answers": "Paris"}, "two words with a slash"),
        ({"answers": "Paris / Paris"}, "the same token"),
        ({"answers": "Paris / Lutetia Parisiorum"}, "tokens|vocabulary"),
    ],
)
def test_the_explorer_says_what_is_wrong(shipped, change, message):
    values = {
        "pair": "city",
        "clean": "The Eiffel Tower is in the city of",
        "corrupted": "The Trevi Fountain is in the city of",
        "answers": "",
        "site": "heads",
        "mode": "denoise",
    }
    with pytest.raises(ValueError, match=message) as raised:
        figures.PatchingExplorer(shipped)(**values | change)
    assert "\n" not in str(raised.value)


def test_maps_keep_their_numbers():
    picture = plots.effect_maps(
        {"a": [[0.0, 0.5], [-1.0, 0.001]], "b": np.zeros((2, 2))}, ["0 x", "1 yy"], ["0", "1"]
    )
    first = picture.axes[0]
    assert [text.get_text() for text in first.texts] == ["0.50", "-1.00"]  # no zeros
    assert np.array_equal(first.images[0].get_array(), [[0.0, 0.5], [-1.0, 0.001]])
    with pytest.raises(ValueError, match=r"'a' has shape \(2, 2\), expected \(1, 2\)"):
        plots.effect_maps({"a": np.zeros((2, 2))}, ["0", "1"], ["0"])


def test_curves_and_clouds():
    picture = figures.the_way([0, 0.5, 1], {"task": ([0, 0.9, 1.0], 0.3, 0.95)})
    true, line, closer = picture.axes[0].lines[:3]
    assert np.allclose(true.get_ydata(), [0, 0.9, 1])
    assert np.allclose(line.get_ydata(), [0, 0.15, 0.3]) and np.allclose(closer.get_ydata(), [0.95])
    with pytest.raises(ValueError, match="2 values for 3 shares"):
        figures.the_way([0, 0.5, 1], {"task": ([0, 1], 0.3, 1)})
    picture = figures.true_against_guess({"cities": ([[0, 1]], [[0.1, 0.4]])})
    assert np.allclose(picture.axes[0].lines[1].get_xydata(), [[0, 0.1], [1, 0.4]])


def test_enough_is_up_and_needed_across():
    picture = figures.enough_and_needed({"noise": {"city": ([[0.9]], [[0.1]])}})
    (diagonal, points) = picture.axes[0].lines
    assert np.allclose(points.get_xydata(), [[0.1, 0.9]]) and len(diagonal.get_xdata()) == 2


def test_the_opening_swaps_one_vector(shipped):
    swap = figures.SwapLab(shipped)
    for values in corners(**swap.controls()):
        assert plots.render(swap(**values)).startswith(b"\x89PNG")
    name = swap.words[2]
    first, other = (
        swap(next(iter(swap.others)), layer, name) for layer in (0, shipped.n_layers - 1)
    )
    cities = [picture.axes[0].get_yticklabels()[0].get_text() for picture in (first, other)]
    assert cities == ["1. Paris", "1. Rome"]


def test_the_investigations_example_does_not_answer_it():
    (found,) = declared(3, "investigation")
    path = Path(__file__).resolve().parents[2] / "notebooks" / "03_activation_patching.ipynb"
    (cell,) = [c.source for c in nbformat.read(path, 4).cells if 'investigate("' in c.source]
    for shown in (cell, found.form):
        assert found.score(ast.literal_eval(shown.split("such as ")[1])) < 0.2
