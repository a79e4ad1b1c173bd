"""Lesson 02: marks and activations with labels, the ideal reader, the number task, the figures."""

import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mi_helpers import plots, probes
from mi_helpers.lessons import shared
from mi_helpers.lessons.lesson_02 import experiments, figures
from mi_helpers.lessons.shared import KINDS, Mark
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.counting import DAYS
from mi_helpers.tinyworld.prose import topic_posterior
from mi_helpers.tinyworld.tokenizer import SPLIT
from mi_helpers.tinyworld.world import World
from mi_helpers.widgets import corners

WORLD = World()
SERIES = ("probe", "control task", "untrained model", "two tokens")


def texts(family, n=40, seed=0, held=(), **choices):
    return shared.documents(family, n, seed, held, **choices)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word of what the tests read, split as TinyWorld's own tokenizer splits."""
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    families = ("prose", "agreement", "facts", "calendar")
    read = [d.text for family in families for d in texts(family, 300)] + [" is was are were"]
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
    assert len({d.family for d in shared.documents_for("family", 28, 0)}) == 14
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


def test_a_scan_has_a_bar_for_every_control(model, tokenizer):
    blank = random_model(tokenizer, 1)
    sites = probes.some_layers(model, 2)
    train, test = texts("agreement", 200, 0), texts("agreement", 200, 1)
    found = experiments.scan(model, blank, "head", train, test, sites)
    assert tuple(found) == SERIES
    assert all(list(series) == sites for series in found.values())
    assert all(0 <= value <= 1 for series in found.values() for value in series.values())
    assert len(set(found["two tokens"].values())) == 1
    assert found["two tokens"]["embed", None] > 0.95  # the noun's own form says its number


def test_the_majority_is_the_training_sets(model):
    train, test = (
        shared.collect(model, texts("agreement", 30, seed), "number", ["embed"]) for seed in (0, 1)
    )
    common = "plural" if (train.y == "plural").mean() > 0.5 else "singular"
    assert experiments.majority(train, test) == np.mean(test.y == common)


def test_mass_on_words_is_the_models_own_softmax(model):
    read = shared.collect(model, texts("agreement", 4), "number", ["resid_final"])
    got = experiments.mass_on(model, read, {"singular": ["is", "was"], "plural": ["are", "were"]})
    cut = read.documents[2].text[: read.marks[2].end]
    p = model.forward(cut)[0, -1].softmax(-1)
    want = sum(p[model.to_single_token(f" {word}")] for word in ("are", "were"))
    assert got.shape == (4, 2) and math.isclose(got[2, 1], want.item(), rel_tol=1e-4)


# -- the bound -------------------------------------------------------------------------------


def test_the_ideal_reader_of_a_voice_by_hand():
    document = next(d for d in texts("prose", 50) if len(d.find("evaluation")) > 2)
    spans = document.find("evaluation")
    assert np.allclose(experiments.posterior(WORLD, document, "voice", spans[0].start), 1 / 3)
    first = experiments.posterior(WORLD, document, "voice", spans[0].end)
    assert math.isclose(first[experiments.VOICES.index(spans[0].value)], 0.8)
    product = np.ones(3)
    for span in spans[:2]:
        product *= [0.8 if voice == span.value else 0.1 for voice in experiments.VOICES]
    second = experiments.posterior(WORLD, document, "voice", spans[1].end)
    assert np.allclose(second, product / product.sum())


def test_the_ideal_reader_of_tense_and_topic():
    document = texts("prose", 1, seed=3)[0]
    end = len(document.text)
    sure = experiments.posterior(WORLD, document, "tense", end)
    assert sure[experiments.TENSES.index(document.latents["tense"])] == 1
    ends, rows = topic_posterior(WORLD.book, document)
    assert np.array_equal(experiments.posterior(WORLD, document, "topic", end), rows[-1])
    assert np.array_equal(experiments.posterior(WORLD, document, "topic", ends[2]), rows[2])
    assert np.allclose(experiments.posterior(WORLD, document, "topic", 0), 1 / 28)


def test_a_latent_that_is_none():
    with pytest.raises(ValueError, match="no latent 'mood'"):
        experiments.posterior(WORLD, texts("prose", 1)[0], "mood", 9)


# -- does the model use it? ------------------------------------------------------------------


def test_margins_are_the_logits_of_the_four_verbs(model):
    task = experiments.NumberTask(model, texts("agreement", 12))
    got = task.margins()
    for i in (0, 5, 11):
        document = task.documents[i]
        cut = document.text[: document.find("answer")[0].start - 1]
        p = model.forward(cut)[0, -1].softmax(-1)
        mass = {n: sum(p[v] for v in ids).item() for n, ids in task.forms.items()}
        right = document.latents["number"]
        (wrong,) = set(mass) - {right}
        assert math.isclose(got[i], math.log(mass[right] / mass[wrong]), abs_tol=1e-4)


def test_places_are_the_nouns(model):
    task = experiments.NumberTask(model, texts("agreement", 12))
    for i, document in enumerate(task.documents):
        spans = document.find("number")
        for place, span in (("head", spans[0]), ("last", spans[-1])):
            token = int(task.ids[i, task.places[place][i]])
            assert model.tokenizer.decode([token]).strip() == document.text[span.start : span.end]
            assert task.plural[place][i] == (span.value == "plural")


def test_removing_a_direction_levels_that_token_and_no_other(model):
    task = experiments.NumberTask(model, texts("agreement", 16))
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
    task = experiments.NumberTask(model, texts("agreement", 5))
    hooks = task.add(("embed", None), "last", np.zeros(model.d_model))
    assert np.allclose(task.margins(hooks), task.margins())
    hooks = task.add(("embed", None), "last", np.ones(model.d_model))
    assert not np.allclose(task.margins(hooks), task.margins())


def test_number_tasks_that_cannot_be(model):
    with pytest.raises(ValueError, match="agreement sentences, not 'facts'"):
        experiments.NumberTask(model, texts("facts", 2))
    with pytest.raises(ValueError, match="no agreement sentences"):
        experiments.NumberTask(model, [])
    task = experiments.NumberTask(model, texts("agreement", 3))
    with pytest.raises(ValueError, match="no place 'verb': choose head or last"):
        task.add(("embed", None), "verb", np.zeros(model.d_model))


def test_balanced_sentences_have_independent_numbers(model):
    task = experiments.NumberTask(model, experiments.balanced(texts("agreement", 60)))
    pairs = list(zip(task.plural["head"], task.plural["last"], strict=True))
    assert len({pairs.count(pair) for pair in set(pairs)}) == 1 and len(set(pairs)) == 4
    with pytest.raises(ValueError, match="Only 1 of the four kinds"):
        experiments.balanced(texts("agreement", 1))


def test_a_removal_costs_nothing_where_nobody_reads(model):
    train, test = experiments.number_tasks(model, 0, n=60)
    accuracy, lost = experiments.removal(train, test, ("resid_post", 2), "head")
    assert 0 <= accuracy <= 1 and np.allclose(lost, 0, atol=1e-4)
    accuracy, lost = experiments.removal(train, test, ("resid_post", 2), "last", noun="head")
    assert lost.shape == (len(test),) and not np.allclose(lost, 0, atol=1e-4)
    random_ = probes.find_direction(np.zeros((4, 16)), [0, 1, 0, 1], "random", seed=3)
    assert random_.shape == (16,)
    with pytest.raises(ValueError, match="no method 'pca'"):
        experiments.removal(train, test, ("resid_post", 2), "last", "pca")


# -- the toy ---------------------------------------------------------------------------------


def test_the_sine_is_learned_layer_by_layer():
    before = experiments.SineNets(nets=2).accuracies(400).mean(0)
    after = experiments.SineNets(nets=2).train(500).accuracies(400).mean(0)
    assert after.shape == (1 + experiments.SineNets.DEPTH,)
    assert after[-1] > after[0] + 0.1 and after[-1] > before[-1] + 0.1
    assert abs(after[0] - before[0]) < 0.05


def test_the_toy_is_what_it_says():
    nets = experiments.SineNets(nets=3)
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
    for values in corners(layer=(0, 2), kind=list(SCANS)):
        plots.render(figures.probe_explorer(NAMES, SCANS, **values))


def test_the_explorer_refuses_in_one_sentence():
    with pytest.raises(ValueError, match="no layer 3: choose 0 to 2"):
        figures.probe_explorer(NAMES, SCANS, 3, "number")
    with pytest.raises(ValueError, match="no property 'mood'"):
        figures.probe_explorer(NAMES, SCANS, 0, "mood")


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
