"""Probes and their controls, on hand-made data."""

import math

import numpy as np
import pytest
import torch
from families import build, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import OneHotEncoder

from mi_helpers import probes
from mi_helpers.models import LanguageModel


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
    features = OneHotEncoder().fit_transform(y[:, None])
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
        (lambda: probes.fit_probe(np.full((2, 2), np.nan), [0, 1]), "x holds NaN or infinity"),
        (lambda: probes.mean_difference(np.zeros((2, 2)), [1, 1]), "All 2 labels are equal"),
        (lambda: probes.mean_difference(np.zeros((2, 2)), [1, 0, 1]), "2 examples and 3 labels"),
        (lambda: probes.project_out(np.ones((1, 2)), np.zeros(2)), "direction is zero"),
        (lambda: probes.split_by_group(["a", "a"], 0.5), "leaves one side empty"),
        (lambda: probes.split_by_group(["a", "b"], 0.1), "leaves one side empty"),
        (lambda: probes.surprise(np.ones((1, 2)) / 2, ["c"], ["a", "b"]), "never seen .* 'c'"),
        (lambda: probes.surprise(np.ones((1, 2)) / 2, ["a", "b"], ["a", "b"]), "1 examples and 2"),
        (lambda: probes.class_means(np.zeros((2, 2)), [0, 1], 3), "No example has the label 2"),
        (lambda: probes.bootstrap([]), "values has shape"),
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


def test_some_layers_begin_with_the_embedding_and_end_with_the_last():
    model = LanguageModel(build("gemma2"), make_tokenizer())
    assert probes.some_layers(model) == [("embed", None), *(("resid_post", i) for i in range(4))]
    assert probes.some_layers(model, 2) == [("embed", None), ("resid_post", 0), ("resid_post", 3)]


# -- splits, controls, cross-entropy ---------------------------------------------------------


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


def test_a_memory_of_words_is_not_selective():
    """Features that name the word: the probe learns task and control task equally well."""
    words = np.array([f"w{i % 20:02d}" for i in range(400)])
    x = np.eye(20)[np.arange(400) % 20]
    task = np.array([int(word[1:]) % 3 for word in words])
    table = probes.control_task(words, task.tolist())
    control = np.array([table[word] for word in words])
    scores = [probes.fit_probe(x[:200], y[:200]).score(x[200:], y[200:]) for y in (task, control)]
    assert scores == [1, 1]


def test_two_tokens_have_a_column_each():
    model = LanguageModel(build("gemma2"), make_tokenizer())
    features = probes.token_features(model, np.array([[3, 5], [5, 3]])).toarray()
    v = model.d_vocab
    assert features.shape == (2, 2 * v) and features.sum() == 4
    assert features[0, 3] == features[0, v + 5] == features[1, 5] == features[1, v + 3] == 1


def test_surprise_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert np.allclose(probes.surprise(p, ["a", "a"], ["a", "b", "c"]), [math.log(2), 0])


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
    ridge = Ridge(alpha=probes.ALPHA).fit(means[1:], targets[1:])
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
