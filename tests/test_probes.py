"""Probes and their controls, on hand-made data first, then on a tiny random model."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from mi_helpers import plots, probes
from mi_helpers.lessons.lesson_02 import figures
from mi_helpers.lessons.lesson_02.claims import number_tasks
from mi_helpers.models import LanguageModel
from mi_helpers.probes import KINDS, Mark
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.counting import DAYS
from mi_helpers.tinyworld.prose import topic_posterior
from mi_helpers.tinyworld.tokenizer import SPLIT
from mi_helpers.tinyworld.world import World
from mi_helpers.widgets import corners

WORLD = World()


def texts(family, n=40, seed=0, held=(), **choices):
    return probes.documents(family, n, seed, held, **choices)


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


def clouds(n=200, d=5, gap=4.0, seed=0):
    """Two clouds that differ along the first axis only; the second axis is the noisiest."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, d)) * [1, 3, 1, 1, 1][:d] + 2
    x[:, 0] += gap * y
    return x, y


# -- probes ----------------------------------------------------------------------------------


def test_a_probe_reads_what_is_linear_and_nothing_else():
    x, y = clouds()
    fresh, truth = clouds(seed=1)
    probe = probes.fit_probe(x, y)
    assert probe.score(fresh, truth) > 0.95
    assert probes.fit_probe(x[:, 1:], y).score(fresh[:, 1:], truth) < 0.65
    assert probe.predict_proba(fresh).shape == (200, 2)


def test_a_probe_of_names_and_of_sparse_counts():
    x, y = clouds()
    named = np.where(y, "plural", "singular")
    assert list(probes.fit_probe(x, named).classes_) == ["plural", "singular"]
    features = probes.OneHotEncoder().fit_transform(y[:, None])
    assert probes.fit_probe(features, y).score(features, y) == 1


def test_it_agrees_with_a_probe_written_out():
    """The gradient of mean loss + |W|² / 2Cn is zero where scikit-learn stops."""
    x, y = clouds(60)
    probe = probes.fit_probe(x, y, C=0.5, max_iter=1000)
    z = (x - x.mean(0)) / x.std(0)
    w, b = probe[-1].coef_[0], probe[-1].intercept_[0]
    p = 1 / (1 + np.exp(-(z @ w + b)))
    assert np.allclose(0.5 * z.T @ (p - y) + w, 0, atol=1e-2)
    assert np.allclose(probe.predict_proba(x)[:, 1], p)


def test_the_direction_of_a_probe_is_in_the_activations_units():
    x, y = clouds()
    probe = probes.fit_probe(x, y)
    direction = probes.probe_direction(probe)
    scores = x @ direction
    logits = probe.decision_function(x)
    assert np.allclose(scores - scores[0], logits - logits[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probes.fit_probe(np.zeros((0, 3)), []), "no examples"),
        (lambda: probes.fit_probe(np.zeros((3, 2)), ["a"] * 3), "All 3 labels are 'a'"),
        (lambda: probes.fit_probe(np.zeros((3, 2)), [0, 1]), "3 examples and 2 labels"),
        (lambda: probes.fit_probe(np.full((2, 2), np.nan), [0, 1]), "infinite or not numbers"),
        (lambda: probes.mean_difference(np.zeros((2, 2)), [1, 1]), "All 2 labels are equal"),
        (lambda: probes.mean_difference(np.zeros((2, 2)), [1, 0, 1]), "2 examples and 3 labels"),
        (lambda: probes.project_out(np.ones((1, 2)), np.zeros(2)), "direction is zero"),
        (lambda: probes.split_by_group(["a", "a"], 0.5), "leaves one side empty"),
        (lambda: probes.split_by_group(["a", "b"], 0.1), "leaves one side empty"),
        (lambda: probes.surprise(np.ones((1, 2)) / 2, ["c"], ["a", "b"]), "never seen .* 'c'"),
        (lambda: probes.surprise(np.ones((1, 2)) / 2, ["a", "b"], ["a", "b"]), "1 examples and 2"),
        (lambda: probes.class_means(np.zeros((2, 2)), [0, 1], 3), "No example has the label 2"),
        (lambda: probes.bootstrap([]), "no values"),
        (lambda: probes.posterior(WORLD, texts("prose", 1)[0], "mood", 9), "no latent 'mood'"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_direction_needs_a_probe_of_two_classes():
    three = probes.fit_probe(np.eye(3).repeat(4, 0), [0] * 4 + [1] * 4 + [2] * 4)
    with pytest.raises(ValueError, match="3 classes, not two"):
        probes.probe_direction(three)


# -- splits and controls ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_no_group_is_on_both_sides(n, share, seed):
    groups = [f"g{i % n}" for i in range(5 * n)]
    if not 0 < round(share * n) < n:
        return
    test = probes.split_by_group(groups, share, seed)
    inside = {g for g, t in zip(groups, test, strict=True) if t}
    assert len(inside) == round(share * n)
    assert inside.isdisjoint(g for g, t in zip(groups, test, strict=True) if not t)
    assert np.array_equal(test, probes.split_by_group(groups, share, seed))


def test_a_control_task_is_random_over_types_and_the_same_for_each():
    words = [f"w{i}" for i in range(1000)] * 2
    labels = ["a"] * 1800 + ["b"] * 200
    table = probes.control_task(words, labels)
    assert set(table) == set(words)
    assert 0.05 < np.mean([label == "b" for label in table.values()]) < 0.15
    assert table == probes.control_task(sorted(words), labels)
    assert table != probes.control_task(words, labels, seed=1)


def test_two_tokens_have_a_column_each(model):
    features = probes.token_features(model, np.array([[3, 5], [5, 3]])).toarray()
    v = model.d_vocab
    assert features.shape == (2, 2 * v) and features.sum() == 4
    assert features[0, 3] == features[0, v + 5] == features[1, 5] == features[1, v + 3] == 1


def test_a_memory_of_words_is_not_selective():
    """Features that name the word: the probe learns task and control task equally well."""
    words = np.array([f"w{i % 20:02d}" for i in range(400)])
    x = np.eye(20)[np.arange(400) % 20]
    task = np.array([int(word[1:]) % 3 for word in words])
    table = probes.control_task(words, task.tolist())
    control = np.array([table[word] for word in words])
    scores = [probes.fit_probe(x[:200], y[:200]).score(x[200:], y[200:]) for y in (task, control)]
    assert scores == [1, 1]


# -- the bound -------------------------------------------------------------------------------


def test_the_ideal_reader_of_a_voice_by_hand():
    document = next(d for d in texts("prose", 50) if len(d.find("evaluation")) > 2)
    spans = document.find("evaluation")
    assert np.allclose(probes.posterior(WORLD, document, "voice", spans[0].start), 1 / 3)
    first = probes.posterior(WORLD, document, "voice", spans[0].end)
    assert math.isclose(first[probes.VOICES.index(spans[0].value)], 0.8)
    product = np.ones(3)
    for span in spans[:2]:
        product *= [0.8 if voice == span.value else 0.1 for voice in probes.VOICES]
    second = probes.posterior(WORLD, document, "voice", spans[1].end)
    assert np.allclose(second, product / product.sum())


def test_the_ideal_reader_of_tense_and_topic():
    document = texts("prose", 1, seed=3)[0]
    end = len(document.text)
    sure = probes.posterior(WORLD, document, "tense", end)
    assert sure[probes.TENSES.index(document.latents["tense"])] == 1
    ends, rows = topic_posterior(WORLD.book, document)
    assert np.array_equal(probes.posterior(WORLD, document, "topic", end), rows[-1])
    assert np.array_equal(probes.posterior(WORLD, document, "topic", ends[2]), rows[2])
    assert np.allclose(probes.posterior(WORLD, document, "topic", 0), 1 / 28)


def test_entropy_and_surprise_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert np.allclose(probes.entropy(p), [1.5 * math.log(2), 0])
    assert np.allclose(probes.surprise(p, ["a", "a"], ["a", "b", "c"]), [math.log(2), 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_no_probabilities_beat_the_true_ones(seed):
    """The bound, pointwise: Σ p (-log q) >= H(p)."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet([0.5] * 4, size=2)
    assert -(p * np.log(q + 1e-300)).sum() >= probes.entropy(p) - 1e-9


def test_a_probe_on_the_posterior_itself_reaches_the_bound():
    """Features that hold all the text says: the probe is at the floor, and not below it."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.6] * 3, size=6000)
    y = np.array([rng.choice(3, p=row) for row in p])
    x = np.log(p + 1e-3)
    probe = probes.fit_probe(x[:4000], y[:4000], C=10)
    ours = probes.surprise(probe.predict_proba(x[4000:]), y[4000:], probe.classes_)
    ideal = probes.surprise(p[4000:], y[4000:], range(3))
    gap, low, high = probes.bootstrap(ours - ideal)
    assert high > 0 and -0.02 < gap < 0.05


# -- directions ------------------------------------------------------------------------------

VECTORS = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(VECTORS, VECTORS, VECTORS)
def test_what_is_projected_out_is_gone_and_the_rest_stays(x, v, centre):
    x, v, centre = (np.array([each]) for each in (x, v, centre))
    v, centre = v[0], centre[0]
    if np.linalg.norm(v) < 1e-2:
        return
    once = probes.project_out(x, v, centre)
    assert np.allclose((once - centre) @ v, 0, atol=1e-6)
    moved = (x - once)[0]
    assert np.allclose(moved @ v * v, (v @ v) * moved, atol=1e-5)  # along v only
    assert np.allclose(probes.project_out(once, v, centre), once, atol=1e-6)
    same = probes.project_out(torch.tensor(x), torch.tensor(v), torch.tensor(centre))
    assert np.allclose(same.numpy(), once)


def test_the_mean_difference_by_hand():
    x, y = np.array([[0.0, 0], [2, 0], [5, 1], [7, 3]]), np.array([False, False, True, True])
    assert np.array_equal(probes.mean_difference(x, y), [5, 2])
    assert np.array_equal(probes.midpoint(x, y), [3.5, 1])
    assert np.array_equal(probes.side(x, [1.0, 0], [3.5, 1]), y)


def test_without_the_mean_difference_nothing_linear_is_left():
    """Correlated noise: a probe's own direction leaves more to read than the mean difference."""
    rng = np.random.default_rng(0)
    y = np.arange(3000) % 2 == 0
    signal = np.where(y, 1.0, -1.0)
    shared = 3 * rng.normal(size=3000)
    x = np.stack([signal + shared, shared + 0.3 * rng.normal(size=3000), 0.5 * signal], 1)
    x[:, 2] += rng.normal(size=3000)
    train, test = slice(0, 2000), slice(2000, 3000)
    difference = probes.mean_difference(x[train], y[train])
    learned = probes.probe_direction(probes.fit_probe(x[train], y[train]))
    left = {}
    for name, direction in (("mean difference", difference), ("probe", learned)):
        erased = probes.project_out(x, direction)
        left[name] = probes.fit_probe(erased[train], y[train]).score(erased[test], y[test])
        if name == "mean difference":
            assert np.abs(probes.mean_difference(erased[train], y[train])).max() < 1e-9
    assert left["mean difference"] < 0.56 < 0.6 < left["probe"]


def test_the_bootstrap_covers_the_mean():
    mean, low, high = probes.bootstrap(np.arange(101))
    assert mean == 50 and 43 < low < 46 and 54 < high < 57


# -- circles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 12])
def test_a_circle_is_found_and_its_shuffles_are_not(n):
    rng = np.random.default_rng(0)
    means = probes.on_circle(range(n), n) @ rng.normal(size=(2, 30)) + rng.normal(size=30)
    means = probes.class_means(np.repeat(means, 3, 0), np.arange(n).repeat(3), n)
    weights = probes.held_out_weights(means)
    errors = np.array([probes.circle_error(weights, order) for order in probes.all_orders(n)])
    assert errors[0] == errors.min() < 10
    assert np.median(errors) > 80


def test_classes_at_equal_distances_are_put_opposite():
    """Without order in the features, the mean of the others is what is predicted: 180 degrees."""
    weights = probes.held_out_weights(probes.class_means(np.eye(7), np.arange(7), 7))
    assert np.allclose(weights, (1 - np.eye(7)) / 6, atol=1e-9)
    assert math.isclose(probes.circle_error(weights, range(7)), 180)


def test_held_out_weights_are_ridge_regression():
    rng = np.random.default_rng(0)
    means, targets = rng.normal(size=(7, 9)), rng.normal(size=(7, 2))
    ridge = probes.Ridge(alpha=probes.ALPHA).fit(means[1:], targets[1:])
    assert np.allclose(probes.held_out_weights(means)[0] @ targets, ridge.predict(means[:1])[0])


def test_all_orders():
    orders = probes.all_orders(7)
    assert len(orders) == len({tuple(order) for order in orders}) == 360
    assert orders[0].tolist() == list(range(7))
    assert len(probes.all_orders(12, most=20)) == 20
    assert probes.all_orders(12)[0].tolist() == list(range(12))


def test_angles_go_the_shorter_way_round():
    a, b = probes.on_circle([0, 11, 6], 12), probes.on_circle([11, 1, 0], 12)
    assert np.allclose(probes.angle_between(a, 3 * b), [30, 60, 180])


# -- marks -----------------------------------------------------------------------------------


def marked(kind, n=60):
    found = []
    for document in probes.documents_for(kind, n, 0):
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


# -- the model -------------------------------------------------------------------------------


def test_what_is_collected_is_what_the_model_holds_there(model):
    """Batches, sorting and padding change nothing: each text is run again, alone and cut."""
    read = probes.collect(model, texts("prose", 20), "topic", rows=4)
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
    read = probes.collect(model, everything, end_of_text, ["embed"])
    fits = [d for d in everything if len(model.tokenizer.encode(d.text)) < model.n_ctx]
    assert 0 < len(read) == len(fits) < 40
    some = read.where(np.arange(len(read)) < 3)
    assert len(some) == 3 and np.array_equal(some["embed"], read["embed"][:3])
    assert some.documents == read.documents[:3]


def test_readings_and_sites_that_are_not_there(model):
    with pytest.raises(ValueError, match="no kind 'mood'; there are: family, tense"):
        probes.collect(model, texts("prose", 1), "mood")
    with pytest.raises(ValueError, match="nothing|anything to read"):
        probes.collect(model, texts("facts", 2), "voice")
    with pytest.raises(ValueError, match="layer from 0 to 2, not 9"):
        probes.collect(model, texts("prose", 1), "topic", [("resid_post", 9)])
    read = probes.collect(model, texts("agreement", 8), "number", [("resid_post", 1)])
    with pytest.raises(ValueError, match="resid_post 9 was not collected; .* resid_post 1"):
        read["resid_post", 9]


def test_some_layers_begin_with_the_embedding_and_end_with_the_last(model):
    assert probes.some_layers(model) == [("embed", None), *(("resid_post", i) for i in range(3))]
    assert probes.some_layers(model, 2) == [("embed", None), ("resid_post", 0), ("resid_post", 2)]


def test_a_scan_has_a_bar_for_every_control(model, tokenizer):
    blank = random_model(tokenizer, 1)
    sites = probes.some_layers(model, 2)
    found = probes.scan(model, blank, "head", *[texts("agreement", 200, i) for i in (0, 1)], sites)
    assert tuple(found) == probes.SERIES
    assert all(list(series) == sites for series in found.values())
    assert all(0 <= value <= 1 for series in found.values() for value in series.values())
    assert len(set(found["two tokens"].values())) == 1
    assert found["two tokens"]["embed", None] > 0.95  # the noun's own form says its number


def test_the_majority_is_the_training_sets(model):
    train, test = (
        probes.collect(model, texts("agreement", 30, seed), "number", ["embed"]) for seed in (0, 1)
    )
    common = "plural" if (train.y == "plural").mean() > 0.5 else "singular"
    assert probes.majority(train, test) == np.mean(test.y == common)


def test_mass_on_words_is_the_models_own_softmax(model):
    read = probes.collect(model, texts("agreement", 4), "number", ["resid_final"])
    got = probes.mass_on(model, read, {"singular": ["is", "was"], "plural": ["are", "were"]})
    cut = read.documents[2].text[: read.marks[2].end]
    p = model.forward(cut)[0, -1].softmax(-1)
    want = sum(p[model.to_single_token(f" {word}")] for word in ("are", "were"))
    assert got.shape == (4, 2) and math.isclose(got[2, 1], want.item(), rel_tol=1e-4)


# -- does the model use it? ------------------------------------------------------------------


def test_margins_are_the_logits_of_the_four_verbs(model):
    task = probes.NumberTask(model, texts("agreement", 12))
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
    task = probes.NumberTask(model, texts("agreement", 12))
    for i, document in enumerate(task.documents):
        spans = document.find("number")
        for place, span in (("head", spans[0]), ("last", spans[-1])):
            token = int(task.ids[i, task.places[place][i]])
            assert model.tokenizer.decode([token]).strip() == document.text[span.start : span.end]
            assert task.plural[place][i] == (span.value == "plural")


def test_removing_a_direction_levels_that_token_and_no_other(model):
    task = probes.NumberTask(model, texts("agreement", 16))
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
    task = probes.NumberTask(model, texts("agreement", 5))
    hooks = task.add(("embed", None), "last", np.zeros(model.d_model))
    assert np.allclose(task.margins(hooks), task.margins())
    hooks = task.add(("embed", None), "last", np.ones(model.d_model))
    assert not np.allclose(task.margins(hooks), task.margins())


def test_number_tasks_that_cannot_be(model):
    with pytest.raises(ValueError, match="agreement sentences, not 'facts'"):
        probes.NumberTask(model, texts("facts", 2))
    with pytest.raises(ValueError, match="no agreement sentences"):
        probes.NumberTask(model, [])
    task = probes.NumberTask(model, texts("agreement", 3))
    with pytest.raises(ValueError, match="no place 'verb': choose head or last"):
        task.add(("embed", None), "verb", np.zeros(model.d_model))


# -- the toy ---------------------------------------------------------------------------------


def test_the_sine_is_learned_layer_by_layer():
    before = probes.SineNets(nets=2).accuracies(400).mean(0)
    after = probes.SineNets(nets=2).train(500).accuracies(400).mean(0)
    assert after.shape == (1 + probes.SineNets.DEPTH,)
    assert after[-1] > after[0] + 0.1 and after[-1] > before[-1] + 0.1
    assert abs(after[0] - before[0]) < 0.05


def test_the_toy_is_what_it_says():
    nets = probes.SineNets(nets=3)
    inputs, above = nets.points(50)
    assert inputs.shape == (3, 50, 2) and inputs.abs().max() <= 1
    assert torch.equal(above, inputs[..., 1] > torch.sin(6 * inputs[..., 0]))
    layers = nets.hidden(inputs)
    assert [x.shape[-1] for x in layers] == [2, 8, 8, 8, 8, 8]
    assert nets.logits(inputs).shape == (3, 50)


# -- figures ---------------------------------------------------------------------------------

NAMES = ["embed", "0", "1"]
SCANS = {kind: {s: [0.1, 0.5, 1.0] for s in probes.SERIES} for kind in ("number", "voice")}


def test_the_explorer_draws_in_every_corner():
    for values in corners(layer=(0, 2), kind=list(SCANS)):
        plots.render(
            figures.probe_explorer(NAMES, SCANS, **values, chance={"number": 0.5, "voice": 0})
        )


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


# -- rows of the ledger ----------------------------------------------------------------------


def test_documents_for_every_kind_can_be_read_in():
    for kind in KINDS:
        for held in (False, True):
            found = probes.documents_for(kind, 28, 0, held)
            assert len(found) == 28
            assert sum(KINDS[kind](d, random.Random(0)) is not None for d in found) >= 7
    assert len({d.family for d in probes.documents_for("family", 28, 0)}) == 14
    with pytest.raises(ValueError, match="no kind 'mood'"):
        probes.documents_for("mood", 3, 0)


def test_balanced_sentences_have_independent_numbers(model):
    task = probes.NumberTask(model, probes.balanced(texts("agreement", 60)))
    pairs = list(zip(task.plural["head"], task.plural["last"], strict=True))
    assert len({pairs.count(pair) for pair in set(pairs)}) == 1 and len(set(pairs)) == 4
    with pytest.raises(ValueError, match="Only 1 of the four kinds"):
        probes.balanced(texts("agreement", 1))


def test_a_removal_costs_nothing_where_nobody_reads(model):
    train, test = number_tasks(model, 0, n=60)
    accuracy, lost = probes.removal(train, test, ("resid_post", 2), "head")
    assert 0 <= accuracy <= 1 and np.allclose(lost, 0, atol=1e-4)
    accuracy, lost = probes.removal(train, test, ("resid_post", 2), "last", noun="head")
    assert lost.shape == (len(test),) and not np.allclose(lost, 0, atol=1e-4)
    random_ = probes.find_direction(np.zeros((4, 16)), [0, 1, 0, 1], "random", seed=3)
    assert random_.shape == (16,)
    with pytest.raises(ValueError, match="no method 'pca'"):
        probes.removal(train, test, ("resid_post", 2), "last", "pca")


def test_the_mean_difference_leaves_no_difference(model):
    train, _ = number_tasks(model, 0, n=100)
    x, y = train.stream["head"]["resid_post", 0], train.plural["head"]
    difference = probes.mean_difference(x, y)
    left = probes.mean_difference(probes.project_out(x.astype(float), difference), y)
    assert np.linalg.norm(left) < 1e-9 * np.linalg.norm(difference)
