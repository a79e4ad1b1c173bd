"""Toy models: small cases by hand, closed forms against simulation, training against a loop."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_helpers.lessons.lesson_01 import experiments as superposition
from mi_helpers.lessons.lesson_01 import figures, geometry, moving, packing, phases
from mi_helpers.lessons.lesson_01.experiments import Training
from mi_helpers.lessons.shared import on_one_core
from mi_helpers.plots import render
from mi_helpers.widgets import Explorer, corners

PAIR = torch.tensor([[1.0], [-1.0]])
CHANCES = st.floats(0.01, 0.99)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "correlation", "both"),
    [(0.4, 0.0, 0.16), (0.4, 1.0, 0.4), (0.4, -1.0, 0.0), (0.8, -1.0, 0.6), (0.4, 0.5, 0.28)],
)
def test_the_chance_of_both_by_hand(density, correlation, both):
    got = superposition.chance_of_both(torch.tensor(density), torch.tensor(correlation))
    assert got.item() == pytest.approx(both, abs=1e-6)


def pattern_chances(q: float, correlation: float, n: int) -> dict[tuple, float]:
    """P(which features are on), by enumeration."""
    both = superposition.chance_of_both(torch.tensor(q), torch.tensor(correlation)).item()
    pair = {(1, 1): both, (1, 0): q - both, (0, 1): q - both, (0, 0): 1 - 2 * q + both}
    lone = {(1,): q, (0,): 1 - q}
    groups = [pair] * (n // 2) + [lone] * (n % 2)
    chances = {}
    for parts in itertools.product(*(group.items() for group in groups)):
        pattern = tuple(bit for bits, _ in parts for bit in bits)
        chances[pattern] = math.prod(chance for _, chance in parts)
    return chances


@pytest.mark.parametrize("blanks", [True, False])
@pytest.mark.parametrize(("n", "correlation"), [(3, 0.0), (3, 0.6), (4, -0.7), (5, 1.0), (1, 0.0)])
def test_samples_have_the_enumerated_distribution(n, correlation, blanks):
    q, rows = 0.2, 60_000
    S = torch.tensor([1 - q, 0.5])
    c = torch.tensor([correlation, 0.0])
    x = superposition.sample(S, n, rows, c, generator(), blanks)[0]
    chances = pattern_chances(q, correlation, n)
    blank = chances[(0,) * n]
    assert blank == pytest.approx(superposition.chance_of_blank(S, c, n)[0].item(), abs=1e-6)
    for pattern, chance in chances.items():
        share = ((x > 0).long() == torch.tensor(pattern)).all(1).float().mean().item()
        if not blanks:
            chance = 0.0 if not any(pattern) else chance / (1 - blank)
        assert share == pytest.approx(chance, abs=0.009)
    values = x[x > 0]
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert values.square().mean() == pytest.approx(1 / 3, abs=0.01)


# -- the model -------------------------------------------------------------------------------


def test_the_model_by_hand():
    x, b = torch.tensor([[[0.5, 0.0], [0.2, 0.9]]]), torch.tensor([[0.0, 0.1]])
    x_hat = superposition.reconstruct(x, PAIR[None], b)
    # h = 0.5 and -0.7; W h + b = (0.5, -0.4) and (-0.7, 0.8)
    assert torch.allclose(x_hat, torch.tensor([[[0.5, 0.0], [0.0, 0.8]]]))
    linear = superposition.reconstruct(x, PAIR[None], b, output="linear")
    assert torch.allclose(linear, torch.tensor([[[0.5, -0.4], [-0.7, 0.8]]]))
    neuron = superposition.reconstruct(x, PAIR[None], b, hidden="relu")
    assert torch.allclose(neuron, torch.tensor([[[0.5, 0.0], [0.0, 0.1]]]))


def test_the_loss_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    loss = superposition.weighted_loss(x, torch.zeros_like(x), torch.tensor([[2.0, 4.0]]))
    assert loss.tolist() == [(2 * 1 + 4 * 0.25) / 2]


@pytest.mark.parametrize("output", ["relu", "linear"])
@pytest.mark.parametrize("hidden", ["relu", "linear"])
def test_gradients_by_hand_are_autograds(output, hidden):
    W = torch.randn(3, 5, 2, generator=generator()).requires_grad_()
    b = torch.randn(3, 5, generator=generator(1)).requires_grad_()
    x, importance = torch.rand(3, 16, 5), torch.rand(3, 5)
    x_hat = superposition.reconstruct(x, W, b, output, hidden)
    wanted = torch.autograd.grad(superposition.weighted_loss(x, x_hat, importance).sum(), [W, b])
    weight = importance[:, None] / x.shape[1]
    with torch.no_grad():
        got = superposition.gradients(W, b, x, weight, output, hidden)
    for half, want in zip(got, wanted, strict=True):
        assert torch.allclose(2 * half, want, atol=1e-5)


def plain_training(n, m, S, importance, steps, batch, lr, seed):
    """`train` for one model as an ordinary loop: autograd, torch's Adam, blanks in the loss."""
    source = generator(seed)
    start = torch.randn(1, n, m + 1, generator=source)
    W = (start[0, :, :m] / math.sqrt(m)).requires_grad_()
    b = torch.zeros(n, requires_grad=True)
    optimizer = torch.optim.Adam([W, b], lr=lr, betas=(0.9, 0.99), eps=1e-10)
    data = superposition.sample(torch.tensor([S]), n, steps * batch, 0.0, source, blanks=False)[0]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * math.cos(math.pi / 2 * (step + 1) / steps)
        x = data[step * batch : (step + 1) * batch]
        on_data = (importance * (x - torch.relu(x @ W @ W.T + b)) ** 2).sum(-1).mean()
        on_blank = (importance * torch.relu(b) ** 2).sum()
        loss = (1 - S**n) * on_data + S**n * on_blank
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W.detach(), b.detach()


def test_training_is_what_a_plain_loop_does():
    importance = torch.tensor([1.0, 0.8, 0.6])
    settings = {"steps": 60, "batch": 32, "lr": 0.03, "seed": 4}
    toys = superposition.train(3, 2, 0.8, importance=importance, training=Training(**settings))
    W, b = plain_training(3, 2, 0.8, importance, **settings)
    assert torch.allclose(toys.W[0], W, atol=1e-3) and torch.allclose(toys.b[0], b, atol=1e-3)


def test_training_is_repeatable_and_keeps_the_best_restart():
    one = superposition.train(3, 1, [0.5, 0.9], training=Training(restarts=4, steps=60))
    two = superposition.train(3, 1, [0.5, 0.9], training=Training(restarts=4, steps=60))
    assert torch.equal(one.W, two.W) and one.W.shape == (2, 3, 1)
    alone = superposition.train(3, 1, [0.5, 0.9], training=Training(steps=60))
    assert (one.loss <= alone.loss * 1.05).all()
    assert one.sparsity.tolist() == pytest.approx([0.5, 0.9])


def test_training_uses_one_core_and_gives_the_others_back():
    before = torch.get_num_threads()
    assert on_one_core(torch.get_num_threads)() == 1
    with pytest.raises(ValueError):
        superposition.train(5, 2, 0.0)
    assert torch.get_num_threads() == before


def test_snapshots_lead_from_the_first_weights_to_the_last_and_change_nothing():
    settings = {"restarts": 3, "steps": 40}
    plain = superposition.train(3, 2, 0.8, training=Training(**settings))
    kept = superposition.train(3, 2, 0.8, training=Training(**settings, every=20))
    assert plain.path is None and kept.path.shape == (3, 1, 3, 3)
    assert torch.equal(kept.W, plain.W) and torch.equal(kept.path[-1, ..., :2], kept.W)
    assert torch.equal(kept.path[-1, ..., 2], kept.b) and (kept.path[0, ..., 2] == 0).all()
    assert not torch.allclose(kept.path[0], kept.path[1])


def test_the_expected_loss_counts_blanks_exactly():
    toys = superposition.train(2, 1, 0.7, training=Training(restarts=2, steps=50))
    x = superposition.sample(toys.sparsity, 2, 400_000, 0.0, generator())
    plain = superposition.weighted_loss(x, toys(x), toys.importance)
    assert superposition.expected_loss(toys, 65536).item() == pytest.approx(plain.item(), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "options", "fragment"),
    [
        ((5, 2, 0.0), {}, "A sparsity of 0 was given"),
        ((5, 2, 1.0), {}, "A sparsity of 1 was given"),
        ((5, 2, [0.5, math.nan]), {}, "A sparsity of nan"),
        ((2, 5, 0.5), {}, "5 hidden dimensions for 2 features leave nothing to squeeze"),
        ((0, 0, 0.5), {}, "at least one of each"),
        ((5, 2, 0.5), {"correlation": 1.5}, "A correlation of 1.5"),
        ((5, 2, 0.5), {"importance": [1.0, 2.0]}, "give 5 numbers"),
        ((2, 1, 0.5), {"importance": [1.0, -2.0]}, "An importance is negative"),
        ((5, 2, [0.5, 0.6]), {"correlation": [0, 0, 0]}, "give one of each"),
        ((5, 2, []), {}, "0 sparsities"),
        ((5, 2, 0.5), {"output": "gelu"}, "'relu' or 'linear'"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, options, fragment):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        superposition.train(*arguments, **options)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("name", ["restarts", "steps", "batch"])
def test_training_takes_something(name):
    with pytest.raises(ValueError, match=f"^{name} is 0: take 1 or more.$"):
        Training(**{name: 0})


# -- measures --------------------------------------------------------------------------------


def test_dimensionality_by_hand():
    W = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    # read along (1, 0): 2, -1, 0; along (-1, 1)/√2: -√2, √2, 0
    assert geometry.dimensionality(W).tolist() == pytest.approx([4 / 5, 2 / 4, 0])
    assert geometry.represented(W).tolist() == [True, True, False]
    assert geometry.dimensions_per_feature(W).item() == pytest.approx(2 / 6)


def test_dimensionality_is_a_plain_double_loop():
    W = torch.randn(2, 6, 3, generator=generator())
    got = geometry.dimensionality(W)
    for k, i in itertools.product(range(2), range(6)):
        hat = W[k, i] / W[k, i].norm()
        total = sum((hat @ W[k, j]).item() ** 2 for j in range(6))
        assert got[k, i].item() == pytest.approx((W[k, i] @ W[k, i]).item() / total, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 99), st.floats(0.1, 10))
def test_dimensionalities_are_shares_of_the_dimensions_there_are(n, m, seed, scale):
    W = torch.randn(n, m, generator=generator(seed), dtype=torch.float64)
    D = geometry.dimensionality(W)
    assert (D > 0).all() and (D <= 1 + 1e-9).all() and D.sum() <= m + 1e-6
    assert torch.allclose(D, geometry.dimensionality(scale * W))
    turn, _ = torch.linalg.qr(torch.randn(m, m, generator=generator(seed), dtype=torch.float64))
    assert torch.allclose(D, geometry.dimensionality(W @ turn))


@pytest.mark.parametrize(
    ("name", "n", "m", "cosines"),
    [
        ("tetrahedron", 4, 3, {-1 / 3}),
        ("triangle", 3, 2, {-1 / 2}),
        ("antipodal pair", 2, 1, {-1.0}),
        ("pentagon", 5, 2, {math.cos(2 * math.pi / 5), math.cos(4 * math.pi / 5)}),
        ("square antiprism", 8, 3, None),
    ],
)
def test_each_band_is_m_over_n_at_every_corner(name, n, m, cosines):
    corners_of = geometry.GEOMETRIES[name]
    assert corners_of.shape == (n, m)
    assert geometry.dimensionality(corners_of).tolist() == pytest.approx([m / n] * n)
    assert geometry.band(name) == pytest.approx(m / n)
    assert corners_of.norm(dim=1).tolist() == pytest.approx([1] * n)
    gram = corners_of @ corners_of.T
    off = gram[~torch.eye(n, dtype=torch.bool)]
    if cosines:
        assert {round(c, 6) for c in off.tolist()} == {round(c, 6) for c in cosines}
    assert off.max() < 0.99


def test_a_neurons_favourite_share_by_hand():
    W = torch.tensor([[2.0, 1.0, -1.0], [0.0, -1.0, -1.0]])
    assert geometry.favourite_share(W).tolist() == pytest.approx([1, 1, 0])
    assert geometry.favourite_share(W, "linear").tolist() == pytest.approx([1, 0.5, 0.5])


# -- interference between random directions --------------------------------------------------


def test_two_directions_in_one_dimension_overlap_fully():
    assert geometry.measured_interference(2, 1, 1.0) == pytest.approx(1)


@pytest.mark.parametrize(("n", "m", "p"), [(50, 10, 0.2), (200, 40, 0.05), (300, 100, 0.02)])
def test_interference_is_the_formulas(n, m, p):
    measured = geometry.measured_interference(n, m, p)
    assert measured == pytest.approx(p * (n - 1) / m, rel=0.08)


# -- two features, one dimension -------------------------------------------------------------


def by_quadrature(W, b, q, r, points=400):
    """E of the weighted loss for n = 2, m = 1, over the four cases of presence."""
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    zero = torch.zeros(1, dtype=torch.float64)
    total = 0.0
    for first, second, chance in (
        (zero, zero, (1 - q) ** 2),
        (t, zero, q * (1 - q)),
        (zero, t, q * (1 - q)),
        (t, t, q * q),
    ):
        x = torch.cartesian_prod(first, second)
        x_hat = torch.relu(x @ W @ W.T + b)
        weights = torch.tensor([1.0, r], dtype=torch.float64)
        total += chance * (weights * (x - x_hat) ** 2).sum(-1).mean().item()
    return total


@settings(max_examples=15, deadline=None)
@given(CHANCES, st.floats(0.1, 10))
def test_closed_form_losses_are_the_integrals(q, r):
    plans = [([1, 0], [0, q / 2]), ([1, -1], [0, 0]), ([0, 1], [q / 2, 0])]
    for (w, bias), want in zip(plans, phases.closed_form_losses(q, r), strict=True):
        W = torch.tensor([w], dtype=torch.float64).T
        b = torch.tensor(bias, dtype=torch.float64)
        assert by_quadrature(W, b, q, r) == pytest.approx(want.item(), abs=1e-4 * (1 + r))


def test_the_mean_is_the_best_stand_in():
    W, best = torch.tensor([[1.0], [0.0]]).double(), phases.closed_form_losses(0.4, 1.0)[0]
    for bias in (0.19, 0.21):
        worse = by_quadrature(W, torch.tensor([0.0, bias]).double(), 0.4, 1.0)
        assert worse > best.item()


@given(st.floats(0.05, 20))
def test_the_losses_cross_at_the_critical_density(r):
    q = phases.critical_density(r)
    first, both, second = phases.closed_form_losses(q, r)
    assert both.item() == pytest.approx(min(first.item(), second.item()))
    below = phases.closed_form_losses(0.9 * q, r)
    assert below.argmin() == 1


def test_which_solution_weights_are():
    W = torch.tensor([[[1.0], [0.1]], [[0.9], [-0.8]], [[0.0], [-1.0]]])
    assert phases.solution_found(W).tolist() == [0, 1, 2]


def test_the_second_feature_shrinks_and_then_jumps_above_the_line():
    steps = [0.8, 1.0, 1.35]
    q = [step * phases.critical_density(0.3).item() for step in steps]
    near, at, gone = phases.phase_diagram(q, [0.3]).W[:, 1, 0].abs().tolist()
    assert 0.95 > near > at > 0.7 and gone < 0.1


def test_the_third_feature_enters_where_the_formula_says_or_before():
    held = phases.third_is_held()
    assert held.shape == (len(phases.THIRD), len(phases.GRID)) and not held[:, 0].any()
    assert held[:, -1].all() and phases.told_rightly([1, 1, 1]) == 1 - held.double().mean().item()
    for found, formula in zip(phases.entries(), phases.entries_by_formula(), strict=True):
        assert formula - 0.12 < found < formula
    assert phases.told_rightly(phases.entries()) > phases.told_rightly(phases.entries_by_formula())


def test_a_threshold_between_two_models_is_told_by_hand(monkeypatch):
    monkeypatch.setattr(phases, "GRID", (0.2, 0.4, 0.6))
    held = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    monkeypatch.setattr(phases, "third_is_held", lambda: held)
    assert phases.told_rightly([0.3, 0.5, 0.9]) == 1
    assert phases.told_rightly([0.5, 0.5, 0.0]) == pytest.approx(5 / 9)
    assert phases.told_rightly(phases.entries()) == 1


def test_training_finds_each_of_the_three_solutions():
    training = replace(phases.PHASE, steps=300)
    toys = phases.phase_diagram([0.9, 0.1], [0.2, 5.0], training)
    assert phases.solution_found(toys.W).tolist() == [0, 2, 1, 1]
    closed = phases.closed_form_losses(
        torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([0.2, 5.0, 0.2, 5.0])
    )
    assert (toys.loss <= 1.03 * closed.amin(0)).all()


# -- the negative control --------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 99))
def test_no_projection_beats_the_linear_optimum(n, m, seed):
    m = min(m, n)
    importance = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    best = phases.linear_optimum(importance, m, 0.8).item()
    spread = phases.variance(0.8).item()
    subsets = itertools.combinations(range(n), n - m)
    assert best == pytest.approx(
        spread * min(sum(importance[i].item() for i in s) for s in subsets)
    )
    W, _ = torch.linalg.qr(torch.randn(n, m, generator=generator(seed), dtype=torch.float64))
    left = torch.eye(n, dtype=torch.float64) - W @ W.T  # what the projection W W^T leaves out
    assert spread * (importance[:, None] * left**2).sum().item() >= best - 1e-9


def test_the_linear_model_never_superposes():
    importance = 0.5 ** torch.arange(6)
    training = Training(steps=600, lr=0.04, samples=65536)
    options = {"importance": importance, "output": "linear", "training": training}
    toys = superposition.train(6, 2, [0.05, 0.5, 0.95], **options)
    for W in toys.W:
        assert geometry.represented(W).tolist() == [True, True] + [False] * 4
        assert torch.allclose(W @ W.T, torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])), atol=0.05)
    best = phases.linear_optimum(importance, 2, toys.sparsity)
    assert torch.allclose(toys.loss.double(), best, rtol=0.02)


def test_with_equal_importance_the_linear_model_keeps_some_plane():
    training = Training(steps=600, samples=65536)
    toys = superposition.train(5, 2, 0.5, output="linear", training=training)
    overlap = toys.W[0] @ toys.W[0].T
    assert torch.allclose(overlap @ overlap, overlap, atol=0.05)  # a projection
    assert toys.loss.item() == pytest.approx(3 * phases.variance(0.5).item(), rel=0.02)


# -- what training finds ---------------------------------------------------------------------


def test_sparsity_decides_how_many_features_are_held():
    importance = 0.9 ** torch.arange(5)
    training = Training(restarts=8)
    toys = superposition.train(5, 2, [0.01, 0.5, 0.97], importance=importance, training=training)
    assert geometry.represented(toys.W).sum(1).tolist() == [2, 4, 5]
    assert geometry.represented(toys.W[0]).tolist() == [True, True, False, False, False]


def test_partners_become_opposites_or_avoid_each_other():
    training = Training(restarts=8, steps=800)
    toys = superposition.train(4, 2, 0.9, correlation=[-1.0, 1.0], training=training)
    cosine = geometry.unit(toys.W) @ geometry.unit(toys.W).mT
    assert cosine[0, 0, 1] < -0.95 and cosine[0, 2, 3] < -0.95
    assert cosine[1, 0, 1].abs() < 0.2 and cosine[1, 2, 3].abs() < 0.2
    training = Training(restarts=4, steps=800)
    dense = superposition.train(4, 2, 0.6, correlation=1.0, training=training)
    assert geometry.unit(dense.W)[0, 0] @ geometry.unit(dense.W)[0, 1] > 0.95


# -- packing ---------------------------------------------------------------------------------


def test_three_lines_at_sixty_degrees_meet_the_welch_bound():
    assert packing.welch_bound(2, 0.5) == pytest.approx(3)
    assert packing.cosines(geometry.polygon(3)).max().item() == pytest.approx(0.5)
    assert packing.welch_bound(100, 0.1) == math.inf


@given(st.floats(0.01, 0.99))
def test_the_share_of_a_cap_by_hand(epsilon):
    # on the ordinary sphere height is uniform (Archimedes); on the circle the angle is
    assert packing.chance_too_close(3, epsilon) == pytest.approx(1 - epsilon)
    assert packing.chance_too_close(2, epsilon) == pytest.approx(2 / math.pi * math.acos(epsilon))
    assert packing.chance_too_close(1, epsilon) == 1


def test_the_bounds_are_in_order():
    for m in (5, 20, 60, 90):
        bounds = (packing.greedy_bound(m, 0.1), packing.constructed(m, 0.1))
        assert m <= max(bounds) <= packing.welch_bound(m, 0.1)
    assert packing.greedy_bound(50, 0.1) == 50
    assert packing.greedy_bound(2304, 0.1) > 500_000


@pytest.mark.parametrize(("p", "degree"), [(5, 2), (11, 2), (7, 3)])
def test_polynomial_phases_keep_weils_bound(p, degree):
    V = packing.polynomial_phases(p, degree)
    assert V.shape == (2 * p**degree, 2 * p)
    assert torch.allclose(V.norm(dim=1), torch.ones(len(V)), atol=1e-5)
    assert packing.cosines(V).max() <= (degree - 1) / math.sqrt(p) + 1e-4


def test_the_construction_of_the_lesson_holds_for_every_pair():
    V = packing.polynomial_phases(101)
    # the dot product depends on the difference of two polynomials: one row stands for all
    assert (V[1:] @ V[0]).abs().max() <= 0.1
    assert packing.constructed(202, 0.1) == len(V) == 20402
    assert packing.constructed(50, 0.1) == 50


@pytest.mark.parametrize("p", [1, 2, 9, 100])
def test_a_number_that_is_not_a_prime_is_refused(p):
    with pytest.raises(ValueError, match="take a prime"):
        packing.polynomial_phases(p)


# -- the figures and the explorer ------------------------------------------------------------


def test_every_figure_draws():
    W = torch.randn(2, 5, 2, generator=generator())
    render(figures.directions(W, ["a", "b"], "t"))
    shapes = {name: (c, "D") for name, c in geometry.GEOMETRIES.items()}
    render(figures.geometries(shapes, "t"))
    D = geometry.dimensionality(W)
    render(figures.sticky([0.5, 0.1], geometry.dimensions_per_feature(W), D, {"1/2": 0.5}))
    kinds = np.array([[0, 1], [1, 2]])
    render(figures.phase_maps({"a": kinds, "b": kinds}, [0.5, 0.1], [0.1, 10], ([1, 2], [0.1, 1])))
    render(figures.neurons(torch.randn(2, 6, 3), ["a", "b"], "t"))
    render(figures.packing({"a": ([1, 2], [1, math.inf])}, "t", (2, "here")))


def test_directions_refuses_what_is_not_a_plane():
    with pytest.raises(ValueError, match=r"\(instances, n, 2\)"):
        figures.directions(torch.zeros(1, 5, 3), ["a"])


def test_features_of_one_direction_share_a_label():
    tips = np.array([[1.0, 0.0], [1.0, 0.05], [0.0, 0.02], [0.0, -1.0]])
    assert [name for name, _ in figures.tip_names(tips)] == ["0, 1", "3"]


def test_turning_the_plane_keeps_all_overlaps():
    W = np.random.default_rng(0).normal(size=(5, 2))
    turned = figures.turned(W)
    assert np.allclose(turned @ turned.T, W @ W.T)
    assert turned[0, 0] > 0 and abs(turned[0, 1]) < 1e-9 and turned[1, 1] >= 0
    solid = geometry.square_antiprism().numpy()
    assert np.allclose(figures.upright(solid) @ figures.upright(solid).T, solid @ solid.T)
    assert np.allclose(np.abs(figures.upright(solid)[:, 2]), math.sqrt(1 / 3))


def test_the_explorer_draws_at_every_corner():
    for values in corners(**moving.sliders()):
        if values["hidden"] > values["features"]:
            with pytest.raises(ValueError, match="leave nothing to squeeze"):
                moving.explorer(**values)
        else:
            moving.explorer(**values)


def test_the_explorer_says_what_is_impossible_and_goes_on():
    made = Explorer(moving.explorer, **moving.sliders())
    made.controls["hidden"].value = 5
    made.controls["features"].value = 2
    assert "leave nothing to squeeze" in made.view.message
    made.controls["hidden"].value = 2
    assert made.view.message == ""


@pytest.mark.parametrize(
    "values", [(5, 2, 0.9, 1.0, 0.0), (8, 3, 0.95, 0.9, 0.5), (4, 2, 0.9, 1.0, -1.0)]
)
def test_the_explorers_quick_training_is_close_to_a_long_one(values):
    n, m, S, decay, correlation = values
    importance = decay ** torch.arange(n)
    training = Training(restarts=12, samples=16384)
    options = {"importance": importance, "correlation": correlation, "training": training}
    long = superposition.train(n, m, S, **options)
    quick = superposition.expected_loss(moving.answer(*values), 16384)
    assert quick.item() <= 1.15 * long.loss.item() + 1e-4


def test_the_explorer_refuses_a_decay_that_is_none():
    with pytest.raises(ValueError, match="importance decay of 0"):
        moving.answer(5, 2, 0.9, 0.0, 0.0)


def test_the_film_draws_at_every_corner_and_has_a_frame_for_every_step():
    made = moving.training_film()
    play, *_ = made.box.children
    assert (play.min, play.max, play.step) == (0, moving.FILM.steps, moving.FILM.every)
    for values in corners(**{name: each for name, each in made.controls.items()}):
        assert "Held by the eight runs" in moving.film(**values).reading
    with pytest.raises(ValueError, match="^Step 7 was not kept: take a multiple of 20"):
        moving.film(7)


def test_in_the_film_the_best_run_comes_first_and_the_relu_matters():
    (with_relu, losses), (without, linear) = moving.reel(True), moving.reel(False)
    for each in (losses, linear):
        assert (np.diff(each[-1]) >= 0).all() and (each[-1] < each[0]).all()
    held = [(np.linalg.norm(W[-1], axis=-1) > 0.5).sum(-1) for W in (with_relu, without)]
    assert held[0][0] == 5 and held[0].min() < 5 and held[1][0] == 2
    x, first = with_relu[-1, :, 0, 1], with_relu[-1, :, 0, 0]
    assert np.allclose(x, 0, atol=1e-5) and (first > 0).any()  # feature 0 points to the right
