"""SparseCoder: hand-computed first, then its forms against each other."""

import copy
import math

import pytest
import torch

from mi_helpers.saes.coder import (
    ACTIVATIONS,
    SparseCoder,
    check_finite,
    explained_variance,
    geometric_median,
)
from mi_helpers.saes.step import SparseStep
from mi_helpers.saes.training import TrainConfig, fit


def random_coder(activation="topk", d_out=None, skip=False, seed=0, **options) -> SparseCoder:
    """A small coder whose every parameter and scale is random."""
    options = {"k": 3} | options if activation in ("topk", "batchtopk") else options
    coder = SparseCoder(6, 20, d_out, activation=activation, skip=skip, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in coder.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    if hasattr(coder, "threshold"):
        coder.threshold.data = coder.threshold.data.abs()
    return coder


def inputs(rows=50, d=6, seed=1) -> torch.Tensor:
    return 2 * torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) + 0.5


KINDS = [
    *[(activation, None, False) for activation in ACTIVATIONS],
    *[(activation, 4, skip) for activation in ACTIVATIONS for skip in (False, True)],
]


# ------------------------------------------------------------------------------- by hand


def by_hand(activation, **options) -> SparseCoder:
    """x = (3, 1) - b_dec (1, 0) = (2, 1); pre = (2 + 0, 1 - 0.5, -2 + 0, 3 + 0)."""
    coder = SparseCoder(2, 4, activation=activation, **options)
    coder.W_enc.data = torch.tensor([[1.0, 0, -1, 1], [0, 1, 0, 1]])
    coder.b_enc.data = torch.tensor([0.0, -0.5, 0, 0])
    coder.W_dec.data = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8]])
    coder.b_dec.data = torch.tensor([1.0, 0])
    return coder


X = torch.tensor([[3.0, 1.0]])


@pytest.mark.parametrize(
    ("activation", "options", "f", "x_hat"),
    [
        ("topk", {"k": 1}, [0, 0, 0, 3], [1 + 1.8, 2.4]),
        ("topk", {"k": 2}, [2, 0, 0, 3], [1 + 2 + 1.8, 2.4]),
        ("topk", {"k": 4}, [2, 0.5, 0, 3], [1 + 2 + 1.8, 0.5 + 2.4]),  # never a negative latent
        ("relu", {}, [2, 0.5, 0, 3], [1 + 2 + 1.8, 0.5 + 2.4]),
        ("jumprelu", {"threshold": 2.0}, [0, 0, 0, 3], [1 + 1.8, 2.4]),  # at the threshold: 0
        ("batchtopk", {"k": 1, "threshold": 1.0}, [2, 0, 0, 3], [1 + 2 + 1.8, 2.4]),
    ],
)
def test_every_activation_by_hand(activation, options, f, x_hat):
    threshold = options.pop("threshold", None)
    coder = by_hand(activation, **options)
    if threshold is not None:
        coder.threshold.data.fill_(threshold)
    assert torch.allclose(coder.encode_pre_act(X), torch.tensor([[2.0, 0.5, -2, 3]]))
    assert torch.allclose(coder.encode(X), torch.tensor([f], dtype=torch.float32))
    assert torch.allclose(coder(X), torch.tensor([x_hat]))


def test_the_sparse_form_by_hand_has_the_largest_first():
    indices, values = by_hand("topk", k=2).encode_sparse(X)
    assert indices.tolist() == [[3, 0]]
    assert values.tolist() == [[3.0, 2.0]]


def test_a_transcoder_does_not_subtract_b_dec_and_its_skip_path_is_added():
    coder = SparseCoder(2, 1, d_out=3, k=1, skip=True)
    coder.W_enc.data = torch.tensor([[1.0], [1.0]])
    coder.W_dec.data = torch.tensor([[0.0, 0.0, 1.0]])
    coder.b_dec.data = torch.tensor([10.0, 0, 0])
    coder.W_skip.data = torch.tensor([[0.0, 0], [0, 2], [0, 0]])
    assert coder(X).tolist() == [[10.0, 2.0, 4.0]]


# --------------------------------------------------------------------------- forms agree


@pytest.mark.parametrize(("activation", "d_out", "skip"), KINDS)
def test_the_sparse_form_is_the_dense_one(activation, d_out, skip):
    coder, x = random_coder(activation, d_out, skip), inputs()
    indices, values = coder.encode_sparse(x)
    f = coder.encode(x)
    spread = torch.zeros_like(f).scatter_add(1, indices, values)
    assert torch.allclose(spread, f, atol=1e-5)
    assert (values.diff(dim=1) <= 0).all()
    assert torch.allclose(coder.decode_sparse(indices, values, x), coder(x), atol=1e-4)
    assert torch.allclose(coder.decode(f, x), coder(x))
    if coder.k and activation == "topk":
        assert indices.shape == (50, 3)
        assert ((f > 0).sum(1) <= 3).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_axes_are_kept(activation):
    coder = random_coder(activation)
    x = inputs(12).view(3, 4, 6)
    indices, values = coder.encode_sparse(x)
    assert coder(x).shape == (3, 4, 6)
    assert indices.shape[:2] == values.shape[:2] == (3, 4)
    assert torch.allclose(coder.decode_sparse(indices, values, x), coder(x), atol=1e-4)
    assert torch.allclose(coder.encode_pre_act(x, [7, 2]), coder.encode_pre_act(x)[..., [7, 2]])


def test_many_rows_are_as_many_single_ones():
    """More rows than a chunk, so several chunks, of which the last is not full."""
    coder, x = random_coder("jumprelu"), inputs(1100)
    f = coder.encode(x)
    indices, values = coder.encode_sparse(x)
    assert torch.allclose(torch.zeros_like(f).scatter_add(1, indices, values), f, atol=1e-5)
    assert indices.shape[1] == (f > 0).sum(1).max()


def test_bfloat16_activations_are_read():
    coder, x = random_coder(), inputs().bfloat16()
    assert coder(x).dtype == torch.float32
    assert torch.equal(coder(x), coder(x.float()))


# -------------------------------------------------------------------- beginning, scales


def test_a_new_sae_is_tied_and_of_unit_norm():
    coder = SparseCoder(6, 20, k=3)
    assert torch.equal(coder.W_enc, coder.W_dec.T)
    assert torch.allclose(coder.W_dec.norm(dim=1), torch.ones(20))
    assert coder.W_enc.T.is_contiguous()  # a latent's numbers lie side by side
    assert torch.equal(coder.W_dec, SparseCoder(6, 20, k=3).W_dec)
    assert not torch.equal(coder.W_dec, SparseCoder(6, 20, k=3, seed=1).W_dec)


def test_a_new_transcoder_of_equal_sizes_is_not_tied():
    coder = SparseCoder(6, 20, d_out=6, k=3)
    assert coder.transcoder and not coder.apply_b_dec_to_input
    assert (coder.W_enc - coder.W_dec.T).abs().max() > 0.1
    assert torch.allclose(coder.W_enc.norm(dim=0), torch.ones(20))


def test_initialise_scales_to_unit_mean_squared_norm_and_finds_the_median():
    x, target = inputs(300), 40 * inputs(300, d=4, seed=2) + 7
    coder = SparseCoder(6, 20, d_out=4, k=3).initialise(x, target)
    assert (x * coder.scale_in).pow(2).sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert (target * coder.scale_out).pow(2).sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(coder.b_dec, geometric_median(target) * coder.scale_out, atol=1e-4)
    assert torch.allclose(coder.decode(torch.zeros(1, 20)), geometric_median(target), rtol=1e-3)


def test_the_scale_does_not_change_what_a_scaled_coder_says_of_scaled_inputs():
    x = inputs(300)
    small, large = (SparseCoder(6, 20, k=3).initialise(s * x) for s in (1.0, 1000.0))
    assert torch.allclose(1000 * small(x), large(1000 * x), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("activation", "d_out", "skip"), KINDS)
def test_folding_the_scales_changes_no_prediction(activation, d_out, skip):
    coder, x = random_coder(activation, d_out, skip), inputs(200)
    coder.scale_in.fill_(0.25)
    coder.scale_out.fill_(0.25 if d_out is None else 3.0)
    folded = coder.folded()
    assert torch.allclose(folded(x), coder(x), atol=1e-4)
    assert torch.allclose(folded.encode(x) * coder.scale_out, coder.encode(x), atol=1e-4)
    assert folded.scale_in == folded.scale_out == 1
    assert torch.equal(folded.W_dec, coder.W_dec)
    assert torch.allclose(folded.folded()(x), coder(x), atol=1e-4)


def test_folding_an_sae_with_two_scales():
    coder, x = random_coder(), inputs(200)
    coder.scale_in.fill_(0.5), coder.scale_out.fill_(2.0)
    assert torch.allclose(coder.folded()(x), coder(x), atol=1e-5)


# ---------------------------------------------------------------------------- measures


def test_the_geometric_median_of_points_on_a_line_is_their_median():
    x = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [1000, 0]])
    assert torch.allclose(geometric_median(x), torch.tensor([2.0, 0]), atol=1e-2)


def test_the_geometric_median_of_a_triangle_sees_every_side_at_120_degrees():
    x = torch.tensor([[0.0, 0], [4, 0], [1, 3]])
    toward = x - geometric_median(x, steps=1000, tolerance=1e-9)
    toward = toward / toward.norm(dim=1, keepdim=True)
    cosines = (toward @ toward.T)[[0, 0, 1], [1, 2, 2]]
    assert torch.allclose(cosines, torch.full((3,), -0.5), atol=1e-3)


def test_the_geometric_median_is_hardly_moved_by_an_outlier():
    x = inputs(200)
    far = torch.cat([x, torch.full((2, 6), 1e4)])
    moved = (geometric_median(far) - geometric_median(x)).norm()
    assert moved < 0.1 < 50 < (far.mean(0) - x.mean(0)).norm()


def test_explained_variance_by_hand():
    x = torch.tensor([[1.0, 10], [3, 10]])  # variance 2 in all, over two rows
    assert explained_variance(x, x) == 1
    assert explained_variance(x, x.mean(0).expand(2, 2)) == 0
    assert explained_variance(x, torch.tensor([[1.0, 10], [2, 10]])) == pytest.approx(0.5)
    assert explained_variance(x[None], x[None] * 0) < -50  # the mean is not for free


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 21}, "k is 21, and the dictionary has 20 latents"),
        ({"k": 0}, "choose 1 to 20"),
        ({}, "topk needs k"),
        ({"activation": "gelu"}, "no activation 'gelu'"),
        ({"k": 3, "skip": True}, "copy an SAE's input"),
        ({"k": 3, "d_out": 6, "apply_b_dec_to_input": True}, "leave the input as it is"),
        ({"k": 3, "d_out": 0}, "d_out is 0"),
    ],
)
def test_a_coder_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        SparseCoder(6, 20, **options)


def test_an_input_of_another_width():
    with pytest.raises(ValueError, match=r"shape \(3, 7\), expected \(..., 6\)"):
        random_coder()(torch.zeros(3, 7))


@pytest.mark.parametrize("latent", [20, -1])
def test_a_latent_that_is_not_there(latent):
    coder = random_coder()
    for call in (
        lambda: coder.check_latents([0, latent]),
        lambda: coder.encode_pre_act(inputs(), [latent]),
        lambda: coder.decode_sparse(torch.tensor([[latent]]), torch.ones(1, 1)),
    ):
        with pytest.raises(ValueError, match=f"no latent {latent}: this coder has latents 0 to 19"):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_activations_are_named(bad):
    x = inputs()
    x[7, 2] = x[30, 0] = bad
    with pytest.raises(ValueError, match="in 2 of 50 rows, first in row 7"):
        check_finite(x)
    with pytest.raises(ValueError, match="The inputs hold NaN"):
        SparseCoder(6, 20, k=3).initialise(x)


def test_large_activations_are_not_bad():
    check_finite(torch.full((4, 6), 3e38))


def test_a_coder_says_what_it_is():
    assert "6 → 20 → 4, topk, k=3, skip" in repr(random_coder("topk", 4, True))


@pytest.mark.parametrize("kind", [{}, {"d_out": 5, "skip": True}, {"activation": "jumprelu"}])
def test_unfolding_is_the_inverse_of_folding(kind):
    coder, other = (SparseCoder(7, 20, k=3, seed=seed, **kind) for seed in (0, 1))
    with torch.no_grad():
        for each, scale in ((coder, 0.4), (other, 2.5)):
            each.scale_in.fill_(scale), each.scale_out.fill_(3 * scale)
            for parameter in each.parameters():
                parameter += 0.1 * torch.rand_like(parameter)
    other.unfold_(coder.folded())
    x = torch.randn(30, 7)
    torch.testing.assert_close(other(x), coder(x))
    assert float(other.scale_in) == 2.5


# -- Matryoshka, and inputs with layer_norm ----------------------------------------------------


def test_the_first_latents_of_a_matryoshka_coder_predict_by_themselves():
    """A hierarchy: each row is a parent with one of its children; 4 parents, 16 children."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(20, 24, generator=rng), dim=1)
    child = torch.randint(16, (4_000,), generator=rng)
    size = 1 + torch.rand(4_000, 2, generator=rng)
    x = size[:, :1] * directions[child // 4] + size[:, 1:] * directions[4 + child]
    found = {}
    for prefixes in ((), (4,)):
        config = TrainConfig(latents=32, k=2, batch=256, steps=250, prefixes=prefixes)
        coder = fit(x, config)
        f = coder.encode(x)
        found[prefixes] = explained_variance(x, coder(x))
        f[:, 4:] = 0
        found["first 4", prefixes] = explained_variance(x, coder.decode(f))
    assert found["first 4", (4,)] > found["first 4", ()] + 0.1
    assert found[(4,)] > found[()] - 0.1
    assert coder.prefixes == (4, 32)


@pytest.mark.parametrize(
    ("widths", "says"),
    [
        ((8, 8), r"The prefixes are \[8, 8, 20\]: expected whole numbers that rise to 20"),
        ((0, 8), "rise to 20"),
        ((8, 21), "rise to 20"),
        (("8",), "expected whole numbers"),
        ((2.5,), "expected whole numbers"),
    ],
)
def test_prefixes_that_cannot_be(widths, says):
    with pytest.raises(ValueError, match=says):
        SparseCoder(6, 20, k=3).nested_(widths)
    with pytest.raises(ValueError, match="Prefixes are for topk and batchtopk, not for relu"):
        SparseCoder(6, 20, activation="relu").nested_((4,))


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_layer_norm_is_saelens(activation):
    """(x - mean) / (std + 1e-5) is read, and what is predicted goes back to x's size."""
    coder = SparseCoder(7, 20, k=3, activation=activation)
    for parameter in coder.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    plain = copy.deepcopy(coder)
    coder.layer_norm = True
    x = 5 * torch.randn(30, 7) + 3
    mean = x.sum(1, keepdim=True) / 7
    std = ((x - mean) ** 2).sum(1, keepdim=True).div(6).sqrt()
    normed = (x - mean) / (std + 1e-5)
    torch.testing.assert_close(coder.encode(x), plain.encode(normed))
    torch.testing.assert_close(coder(x), plain(normed) * std + mean)
    index, value = coder.encode_sparse(x)
    torch.testing.assert_close(coder.decode_sparse(index, value, x), coder(x))
    with pytest.raises(ValueError, match="normalises what it reads: give x"):
        coder.decode_sparse(index, value)
    with pytest.raises(ValueError, match="layer_norm is read and used, but not trained"):
        SparseStep(coder)
