"""Lesson 02: marks and activations with labels, probes and controls, the ideal reader, what the
model would say and what pushes do to it, the figures."""

import math
import random
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mi_helpers import plots, probes
from mi_helpers.course.exercise import declared
from mi_helpers.lessons import shared
from mi_helpers.lessons.lesson_02 import experiments, figures, predictions, tools, using
from mi_helpers.lessons.lesson_02.sine import SineNets
from mi_helpers.lessons.shared import KINDS, Mark
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.counting import DAYS
from mi_helpers.tinyworld.prose import topic_posterior
from mi_helpers.tinyworld.tokenizer import SPLIT
from mi_helpers.tinyworld.world import World
from mi_helpers.widgets import corners

WORLD = World()
NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_probing.ipynb"
SERIES = ("probe", "control task", "untrained model", "two tokens")


def texts(family, n=40, seed=0, held=(), **choices):
    return shared.documents(family, n, seed, held, **choices)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word of what the tests read, split as TinyWorld's own tokenizer splits."""
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    families = ("prose", "agreement", "facts", "calendar", "truth")
    read = [d.text for family in families for d in texts(family, 300)]
    read += [" is was are were yes no right wrong correct incorrect true false Italy Britain"]
    words = sorted({piece for text in read for piece, _ in split.pre_tokenize_str(text)})
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names + words)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = split, decoders.Fuse()
    special = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def random_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LanguageModel(Gemma2ForCausalLM(config), tokenizer, f"random {seed}")


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer, 0)


# -- marks -----------------------------------------------------------------------------------


def marked(kind, n=60):
    found = []
    for document in shared.documents_for(kind, n, 0):
        if (mark := KINDS[kind](document, random.Random(0))) is not None:
            found.append((document, mark))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_marks_a_word_end(kind):
    found = marked(kind)
    assert len(found) > 10 and len({mark.label for _, mark in found}) > 1
    for document, mark in found:
        assert 0 < mark.end <= len(document.text) and not document.text[mark.end - 1].isspace()
        assert mark.end == len(document.text) or not document.text[mark.end].isalnum()


def test_what_is_to_be_said_is_never_read():
    for kind in ("number", "day", "month"):
        for document, mark in marked(kind):
            answers = [span.start for span in document.find("answer")]
            assert mark.end == answers[0] - 1


def test_labels_are_the_worlds():
    for document, mark in marked("number"):
        assert mark.label == document.latents["number"]
    for document, mark in marked("attractor"):
        assert mark.label == document.find("number")[-1].value
        assert document.text[: mark.end].endswith(mark.word)
    for document, mark in marked("voice"):
        assert mark.label == document.latents["voice"]
        assert 1 <= len([s for s in document.find("evaluation") if s.end <= mark.end]) <= 3
    for document, mark in marked("day"):
        assert document.text[mark.end + 1 :].startswith(DAYS[mark.label])
    countries = {place.name.lower(): place.country for place in lexicon.landmarks()}
    for document, mark in marked("country"):
        assert countries[mark.word] == mark.label
        assert document.text[: mark.end].lower().endswith(mark.word)


def test_the_topic_mark_is_where_the_ideal_reader_has_just_read():
    for document, mark in marked("topic"):
        assert mark.end in [end for latent, _, end in document.events if latent == "topic"]


def test_a_calendar_of_months_has_no_day_and_a_fact_without_landmark_no_country():
    months = next(d for d in texts("calendar") if d.latents["unit"] == "month")
    assert KINDS["day"](months, random.Random(0)) is None
    capital = texts("facts", 1, relation="country-capital", count=1)[0]
    assert KINDS["country"](capital, random.Random(0)) is None


def test_documents_for_every_kind_can_be_read_in():
    for kind in KINDS:
        for held in (False, True):
            found = shared.documents_for(kind, 28, 0, held)
            assert len(found) == 28
            assert sum(KINDS[kind](d, random.Random(0)) is not None for d in found) >= 7
    assert len({d.family for d in shared.documents_for("family", 28, 0)}) == len(World.families)
    with pytest.raises(ValueError, match="no kind 'mood'"):
        shared.documents_for("mood", 3, 0)


# -- activations with labels -----------------------------------------------------------------


def test_what_is_collected_is_what_the_model_holds_there(model):
    """Batches, sorting and padding change nothing: each text is run again, alone and cut."""
    read = shared.collect(model, texts("prose", 20), "topic", rows=4)
    assert set(read.x) == {("embed", None), *(("resid_post", i) for i in range(3))}
    for i in (0, 3, len(read) - 1):
        cut = model.tokens(read.documents[i].text[: read.marks[i].end])
        _, cache = model.run_with_cache(cut, ["embed", "resid_post"])
        for key in read.x:
            assert np.allclose(read[key][i], cache[key][0, -1], atol=1e-5)
        assert read.tokens[i].tolist() == cut[0, -2:].tolist()
        assert read.y[i] == read.marks[i].label


def test_a_kind_may_be_a_function_and_long_texts_are_left_out(model):
    def end_of_text(document, rng):
        return Mark(len(document.text), len(document.text) > 100, group=document.family)

    everything = texts("prose", 40)
    read = shared.collect(model, everything, end_of_text, ["embed"])
    fits = [d for d in everything if len(model.tokenizer.encode(d.text)) < model.n_ctx]
    assert 0 < len(read) == len(fits) < 40
    some = read.where(np.arange(len(read)) < 3)
    assert len(some) == 3 and np.array_equal(some["embed"], read["embed"][:3])
    assert some.documents == read.documents[:3]


def test_readings_and_sites_that_are_not_there(model):
    with pytest.raises(ValueError, match="no kind 'mood'; there are: family, tense"):
        shared.collect(model, texts("prose", 1), "mood")
    with pytest.raises(ValueError, match="nothing|anything to read"):
        shared.collect(model, texts("facts", 2), "voice")
    with pytest.raises(ValueError, match="layer from 0 to 2, not 9"):
        shared.collect(model, texts("prose", 1), "topic", [("resid_post", 9)])
    read = shared.collect(model, texts("agreement", 8), "number", [("resid_post", 1)])
    with pytest.raises(ValueError, match="resid_post 9 was not collected; .* resid_post 1"):
        read["resid_post", 9]


def test_two_way_questions_have_equal_chances(model):
    read = [experiments.read(model, "topic", n, n) for n in (200, 100)]
    pairs, rng = experiments.pairs_of(*read), np.random.default_rng(0)
    assert len(set(pairs)) == experiments.CELLS
    for pair in pairs:
        rows = experiments.evenly(read[0].y, pair, rng)
        labels = read[0].y[rows].tolist()
        assert set(labels) == set(pair) and labels.count(pair[0]) * 2 == len(labels)
        assert len(set(rows.tolist())) == len(rows) <= 2 * experiments.MOST


def test_a_scan_has_a_bar_for_every_control(model, tokenizer):
    blank = random_model(tokenizer, 1)
    found = experiments.two_way(model, blank, "number", probes.control_task, 0.5)
    assert tuple(found) == SERIES
    assert all(series.shape == (4,) for series in found.values())
    assert all((series >= 0).all() and (series <= 1).all() for series in found.values())
    assert len(set(found["two tokens"])) == 1


def test_a_control_task_is_handed_in(model, tokenizer):
    """A table of true labels is as easy as the task: the scan scores what it was given."""
    calls = []

    def cheat(words, labels, seed):
        calls.append(seed)
        return {word: "plural" if word.endswith("s") else "singular" for word in words}

    found = experiments.two_way(model, random_model(tokenizer, 1), "number", cheat, 0.5)
    assert len(calls) == experiments.CELLS
    assert np.allclose(found["control task"], found["probe"], atol=0.2)


def test_the_reader_reads_the_last_token(model):
    reader = experiments.VerbReader(model, 60)
    by_layer, verb = reader.read("The keys near the cabinet ")
    _, cache = model.run_with_cache("The keys near the cabinet", [("resid_post", 1)])
    want = reader.probes["1"].predict_proba(cache["resid_post", 1][0, -1:])[0, 1]
    assert list(by_layer) == ["embed", "0", "1", "2"] and math.isclose(by_layer["1"], want)
    p = model.forward("The keys near the cabinet")[0, -1].softmax(-1)
    singular, plural = (
        sum(p[model.to_single_token(f" {form}")] for form in forms).item()
        for forms in (("is", "was"), ("are", "were"))
    )
    assert math.isclose(verb, plural / (singular + plural), rel_tol=1e-4)


def test_landmarks_and_cities_are_held_out_whole(model):
    asked = []

    def split(groups, share, seed):
        asked.append(set(groups))
        return probes.split_by_group(groups, share, seed)

    found = experiments.where_and_when(model, split, "city", n=200, splits=2)
    assert set(found) == {
        f"{place}, {question} asked"
        for place in ("name", "last token")
        for question in ("city", "country")
    }
    assert all(rows.shape == (2, 4) for rows in found.values())
    assert all(each <= {place.city for place in lexicon.landmarks()} for each in asked)


def test_the_memory_curve_asks_four_questions(model):
    site = ("resid_post", 1)
    found = experiments.memory_curve(model, site, probes.control_task, [60, 200])
    assert [len(values) for values in found.values()] == [2] * 4
    assert max(found["which form"]) <= 1


def test_a_circle_is_found_where_there_is_one():
    angle = 2 * np.pi * np.arange(7) / 7
    y = np.repeat(np.arange(7), 3)
    circle = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)[y]
    noise = np.random.default_rng(0).normal(size=(21, 3))
    nothing = shared.Readings(
        {("embed", None): circle, ("resid_post", 0): noise}, y, y, y, y, [], []
    )
    errors = experiments.circle_errors(nothing, 7)
    assert errors.shape == (360, 2) and errors[0, 0] < 1 and errors[0, 0] == errors[:, 0].min()
    assert errors[0, 1] > 20


# -- the bound -------------------------------------------------------------------------------


def test_the_ideal_reader_is_the_worlds():
    document = texts("prose", 1, seed=3)[0]
    ends, rows = topic_posterior(WORLD.book, document)
    assert np.array_equal(experiments.posterior(WORLD, document, len(document.text)), rows[-1])
    assert np.array_equal(experiments.posterior(WORLD, document, ends[2]), rows[2])
    assert np.allclose(experiments.posterior(WORLD, document, 0), 1 / 28)


def test_the_ideal_readers_columns_are_the_probes(model):
    p, fresh, topics = experiments.topic_probes(model, 300, 40, 1)
    ideal = experiments.posteriors(WORLD, fresh, topics)
    assert all(each.shape == ideal.shape == (40, 28) for each in p.values())
    assert np.allclose(ideal.sum(1), 1)
    own = ideal[np.arange(40), [list(topics).index(label) for label in fresh.y]]
    assert own.mean() > 0.4 and (own > 0).all()
    with pytest.raises(ValueError, match="knows 2 topics, the world 28"):
        experiments.posteriors(WORLD, fresh, topics[:2])


# -- does the model use it? ------------------------------------------------------------------


def test_margins_are_the_logits_of_the_four_verbs(model):
    task = using.NumberTask(model, texts("agreement", 12))
    got = task.margins()
    for i in (0, 5, 11):
        document = task.documents[i]
        cut = document.text[: document.find("answer")[0].start - 1]
        p = model.forward(cut)[0, -1].softmax(-1)
        mass = {
            n: sum(p[v] for v in ids).item()
            for n, ids in zip(("singular", "plural"), task.groups, strict=True)
        }
        right = document.latents["number"]
        (wrong,) = set(mass) - {right}
        assert math.isclose(got[i], math.log(mass[right] / mass[wrong]), abs_tol=1e-4)


def test_places_are_the_nouns(model):
    task = using.NumberTask(model, texts("agreement", 12))
    for i, document in enumerate(task.documents):
        spans = document.find("number")
        for place, span in (("head", spans[0]), ("last", spans[-1])):
            token = int(task.ids[i, task.places[place][i]])
            assert model.tokenizer.decode([token]).strip() == document.text[span.start : span.end]
            assert task.plural[place][i] == (span.value == "plural")


def test_removing_a_direction_levels_that_token_and_no_other(model):
    task = using.NumberTask(model, texts("agreement", 16))
    key = ("resid_post", 1)
    x = task.features([key])["head"][key]
    v, centre = probes.mean_difference(x, task.plural["head"]), x.mean(0)
    with model.hooks(task.remove(key, "head", v, centre)):
        after = task.features([key])
    assert np.allclose((after["head"][key] - centre) @ v, 0, atol=1e-3)
    assert np.allclose(after["last"][key], task.features([key])["last"][key], atol=1e-6)
    assert not np.allclose(task.margins(task.remove(key, "head", v, centre)), task.margins())
    last = ("resid_post", 2)  # after the last attention nobody reads the subject's token any more
    assert np.allclose(task.margins(task.remove(last, "head", v, centre)), task.margins())


def test_adding_nothing_changes_nothing(model):
    task = using.NumberTask(model, texts("agreement", 5))
    hooks = task.add(("embed", None), "last", np.zeros(model.d_model))
    assert np.allclose(task.margins(hooks), task.margins())
    hooks = task.add(("embed", None), "last", np.ones(model.d_model))
    assert not np.allclose(task.margins(hooks), task.margins())


def test_number_tasks_that_cannot_be(model):
    with pytest.raises(ValueError, match="agreement sentences, not 'facts'"):
        using.NumberTask(model, texts("facts", 2))
    with pytest.raises(ValueError, match="no text to choose in"):
        using.NumberTask(model, [])
    task = using.NumberTask(model, texts("agreement", 3))
    with pytest.raises(ValueError, match="no place 'verb': choose head or last"):
        task.add(("embed", None), "verb", np.zeros(model.d_model))


def test_balanced_sentences_have_independent_numbers(model):
    task = using.NumberTask(model, using.balanced(texts("agreement", 60)))
    pairs = list(zip(task.plural["head"], task.plural["last"], strict=True))
    assert len({pairs.count(pair) for pair in set(pairs)}) == 1 and len(set(pairs)) == 4
    with pytest.raises(ValueError, match="Only 1 of the four kinds"):
        using.balanced(texts("agreement", 1))


def test_a_removal_costs_nothing_where_nobody_reads(model):
    train, test = using.number_tasks(model, 0, n=60)
    lost = using.removal(train, test, ("resid_post", 2), "head")
    assert np.allclose(lost, 0, atol=1e-4)
    lost = using.removal(train, test, ("resid_post", 2), "last", noun="head")
    assert lost.shape == (len(test),) and not np.allclose(lost, 0, atol=1e-4)
    own = tools.share_lost(train, test, ("resid_post", 2), "last", "head")
    assert math.isclose(own, lost.mean(), abs_tol=1e-3 * max(1, abs(own)))
    with pytest.raises(ValueError, match="no method 'pca'"):
        using.removal(train, test, ("resid_post", 2), "last", method="pca")


def test_what_is_read_and_used_has_every_question(model):
    pair = using.number_tasks(model, 0, n=60)
    found = using.read_and_used(pair, [("resid_post", 0)], lambda *args: 0.5)
    assert [list(each) for each in found.values()] == [list(using.QUESTIONS)] * 2
    assert set(found["is it used?"].values() and sum(found["is it used?"].values(), [])) == {0.5}


def test_a_direction_that_is_taken_out_cannot_be_read(model):
    """Number is planted along one axis, and read without a mistake until that axis is removed."""
    pair, site = using.number_tasks(model, 0, 200), ("resid_post", 0)
    rng = np.random.default_rng(0)
    for task in pair:
        x = rng.normal(size=(len(task), 16))
        x[:, 3] = np.where(task.plural["head"], 9, -9)
        task.stream["head"][site] = x
    found = using.left_after(pair, site, tools.project_out)
    assert found["mean difference"][0] == found["probe"][0] == 1
    assert (
        found["random"][0] >= 0.5
        and found["random"][1] > 0.95
        and found["mean difference"][1] < 0.7
    )


# -- verdicts and countries ------------------------------------------------------------------


def test_statements_are_half_true_and_stand_first(model):
    task = using.verdicts(model, "landmark-city", 20, 3, held=("templates",))
    assert task.truth.tolist() == [True, False] * 10
    for i, document in enumerate(task.documents):
        stop, last = (int(task.places[place][i]) for place in ("statement", "last"))
        end = document.find("statement")[0].end
        assert document.text[end - 1] == "." and document.find("statement")[0].start == 0
        said = document.text[document.find("verdict")[0].start :]
        ids = model.tokens(document.text)[0]
        assert model.tokenizer.decode(ids[stop : stop + 1]).endswith(".")
        assert len(ids[last + 1 :]) == len(model.encode(" " + said))
        assert said.strip(".") in [pair[int(task.truth[i])] for pair in using.WORDS.values()]
        assert torch.equal(task.ids[i, : last + 1], ids[: last + 1])


def test_the_odds_of_a_verdict_are_the_models(model):
    task = using.verdicts(model, "country-currency", 6, 3)
    i, last = 4, int(task.places["last"][4])
    p = model.forward(task.ids[i : i + 1, : last + 1])[0, -1].softmax(-1)
    true, false = (
        sum(p[model.to_single_token(f" {pair[k]}")] for pair in using.WORDS.values())
        for k in (1, 0)
    )
    assert math.isclose(task.odds()[i], math.log(true / false), abs_tol=1e-4)
    assert task.right() == np.mean((task.odds() > 0) == task.truth)
    assert task.says() == np.mean(task.odds() > 0)


def test_sets_of_statements_are_what_they_are_called(model):
    sets = using.truth_sets(model, 6, 2, ["cities, negated", "continents"])
    assert all(not d.latents["negated"] for d in sets["continents"].documents)
    assert all(d.latents["negated"] for d in sets["cities, negated"].documents)
    assert {d.latents["relation"] for d in sets["continents"].documents} == {"country-continent"}


def test_the_transfer_of_a_planted_direction(model):
    """Where truth is written along one axis, a direction from one set is right on another."""
    sets = using.truth_sets(model, 10, 2, ["cities", "currencies"])
    for task in sets.values():
        for place in task.stream.values():
            for x in place.values():
                x[:, 0] = np.where(task.truth, 50.0, -50.0) + 7
    found = experiments.transfer(sets["cities"], sets)
    assert found == {name: [1.0] * 4 for name in sets}


def test_a_push_and_its_gradient(model):
    task = using.CountryTask(model, 200, 1)
    site = ("resid_post", 1)
    slope = task.gradient(site, "last")
    small = 1e-2 * slope / np.linalg.norm(slope)
    up, down = (task.odds(task.add(site, "last", s * small)).mean() for s in (1, -1))
    assert math.isclose((up - down) / 2e-2, np.linalg.norm(slope), rel_tol=0.05)
    assert task.follows(site, "last", 0 * slope) == 0
    assert task.follows(("resid_post", 2), "name", slope) == 0  # nobody reads it any more
    assert 0 < task.first.mean() < 1


def test_verdicts_that_are_moved(model):
    cities = using.verdicts(model, "landmark-city", 8, 3)
    sets = using.truth_sets(model, 6, 2, using.PUSHED)
    found = using.verdicts_moved(cities, sets, [("resid_post", 2)], {"stop": "statement"})
    assert list(found["stop"]) == [*using.PUSHED, "random direction"]
    assert all(values == [0.0] for values in found["stop"].values())  # after the last attention


# -- the toy ---------------------------------------------------------------------------------


def test_the_sine_is_learned_layer_by_layer():
    before = SineNets(nets=2).accuracies(400).mean(0)
    after = SineNets(nets=2).train(500).accuracies(400).mean(0)
    assert after.shape == (1 + SineNets.DEPTH,)
    assert after[-1] > after[0] + 0.1 and after[-1] > before[-1] + 0.1
    assert abs(after[0] - before[0]) < 0.05


def test_the_toy_is_what_it_says():
    nets = SineNets(nets=3)
    inputs, above = nets.points(50)
    assert inputs.shape == (3, 50, 2) and inputs.abs().max() <= 1
    assert torch.equal(above, inputs[..., 1] > torch.sin(6 * inputs[..., 0]))
    layers = nets.hidden(inputs)
    assert [x.shape[-1] for x in layers] == [2, 8, 8, 8, 8, 8]
    assert nets.logits(inputs).shape == (3, 50)


# -- figures ---------------------------------------------------------------------------------


NAMES = ["embed", "0", "1"]
SCANS = {kind: {s: [0.1, 0.5, 1.0] for s in SERIES} for kind in ("number", "voice")}


def test_the_explorer_draws_in_every_corner():
    for values in corners(layer=NAMES, property=list(SCANS)):
        plots.render(figures.probe_explorer(NAMES, SCANS, **values))


def test_the_explorer_refuses_in_one_sentence():
    with pytest.raises(ValueError, match="no layer '3': choose one of embed, 0, 1"):
        figures.probe_explorer(NAMES, SCANS, "3", "number")
    with pytest.raises(ValueError, match="no property 'mood'"):
        figures.probe_explorer(NAMES, SCANS, "0", "mood")


@pytest.mark.parametrize("text", ["The keys near the cabinet", "x", "a $b$ <i>c</i> " * 4])
def test_any_text_is_read(model, text):
    plots.render(figures.verb_reading(experiments.VerbReader(model, 60), text))


def test_a_text_that_cannot_be_read_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        figures.verb_reading(experiments.VerbReader(model, 60), " ")


def test_a_plane_has_its_arrows():
    points = np.random.default_rng(0).normal(size=(20, 2))
    arrows = {"mean difference": [1.0, 0.0], "probe": [0.3, 0.4]}
    y = np.arange(20) < 8
    picture = figures.planes({"a": (points, arrows), "b": (points, arrows)}, y, ("yes", "no"))
    plots.render(picture)
    (legend,) = picture.legends
    assert [t.get_text() for t in legend.get_texts()] == ["yes", "no", *arrows]


def test_the_other_figures_draw():
    band = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    panels = {"a": {"x": [1, 2, 3], "y": band}, "b": {"x": [3, 2, 1], "y": band}}
    picture = plots.layer_panels(NAMES, panels, references=[None, 0.5], ylabels=["u", "v"], mark=1)
    assert [axes.get_title(loc="left") for axes in picture.axes] == ["a", "b"]
    plots.render(picture)
    plots.render(figures.on_a_circle({"a": probes.on_circle(range(7), 7)}, "ABCDEFG"))
    grid = np.linspace(-1, 1, 5), np.linspace(-1, 1, 4)
    sides = {str(i): np.zeros((4, 5), bool) for i in range(4)}
    plots.render(figures.sine_regions(grid, sides, np.sin(grid[0])))


def test_figures_say_what_does_not_fit():
    with pytest.raises(ValueError, match="'x' has 2 values for 3 layers"):
        plots.layer_panels(NAMES, {"a": {"x": [1, 2]}})
    with pytest.raises(ValueError, match="3 names need points"):
        figures.on_a_circle({"a": np.zeros((2, 2))}, NAMES)
    with pytest.raises(ValueError, match="expected"):
        figures.sine_regions(([0, 1], [0, 1]), {"a": np.zeros((3, 2), bool)}, [0, 0])


# -- the notebook ----------------------------------------------------------------------------


def test_the_notebook_has_what_the_room_declares():
    """Each stub, check and prediction stands in the notebook as the room declares it."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    source = "\n".join(cell.source for cell in cells)
    for each in declared(2, "exercise"):
        assert each.stub.strip() in source
        assert f'{each.name} = check("{each.id}", {each.name})' in source
    for each in declared(2, "prediction"):
        assert f'"{each.id}"' in source and f'"{each.question}"' in source
        assert all(f'"{option}"' in source for option in each.options)


def test_the_investigations_example_does_not_answer_it():
    """The country that can be read at the place and the layer that are shown is not used there."""
    (found,), task = declared(2, "investigation"), predictions.country_task(5)
    (cell,) = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if "investigate(" in c.source]
    for shown in (cell, found.form):
        place, layer = re.search(r'\("(\w+)", "(\w+)", v', shown).groups()
        site = experiments.sites_of(shared.shipped_model())[layer]
        v = probes.mean_difference(task.stream[place][site], task.first)
        assert found.score((place, layer, v)) < 0.4
