"""Ablation by hand: what is put in, where, and for which parts; the noise of causal tracing."""

import pytest
import torch
from families import CONFIGS, TEXT, build, make_tokenizer

from mi_helpers.ablation import SITE, Gaussian, Mean, Resample, Zero, ablate, part_name, record
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel

IDS = torch.tensor([[2, 5, 7, 9, 11, 13, 15], [2, 6, 8, 9, 12, 13, 16]])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(build(request.param), make_tokenizer(), request.param)


@pytest.fixture(scope="module")
def gemma():
    return LanguageModel(build("gemma2"), make_tokenizer(), "gemma2")


# -- what is put in ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "attn", "mlp"])
@pytest.mark.parametrize("ablation", [Zero, Mean, Resample])
def test_an_ablation_replaces_one_part_after_the_first_position(gemma, kind, ablation):
    width = (gemma.n_heads, gemma.d_head) if kind == "head" else (gemma.d_model,)
    x, reference = torch.randn(2, 5, *width), torch.randn(9, *width)
    part = (kind, 1, 2) if kind == "head" else (kind, 1)
    key = (SITE[kind], 1)
    given = Zero() if ablation is Zero else ablation({key: reference})
    ((found, hook),) = ablate(gemma, [part], given).items()
    assert found == key
    got = hook(x.clone())
    changed, rest = (got[:, :, 2], got[:, :, [0, 1, 3]]) if kind == "head" else (got, got[:, :1])
    assert torch.equal(rest, x[:, :, [0, 1, 3]] if kind == "head" else x[:, :1])
    assert torch.equal(got[:, 0], x[:, 0])
    rows = reference[:, 2] if kind == "head" else reference
    for vector in changed[:, 1:].flatten(0, 1):
        if ablation is Zero:
            assert not vector.any()
        elif ablation is Mean:
            assert torch.allclose(vector, rows.mean(0))
        else:
            assert any(torch.equal(vector, row) for row in rows)


def test_a_resample_of_tokens_differs_between_positions_and_repeats_with_its_seed(gemma):
    reference = {("mlp_out", 0): torch.arange(50.0)[:, None].expand(50, gemma.d_model)}
    draw = [
        ablate(gemma, [("mlp", 0)], Resample(reference, seed))["mlp_out", 0](
            torch.zeros(3, 6, gemma.d_model)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert len(draw[0][:, 1:, 0].unique()) > 5


def test_a_resample_of_texts_takes_whole_texts_and_follows_the_seed(gemma):
    texts = torch.arange(3.0)[:, None, None, None].expand(3, 6, 4, 6).clone()
    given = Resample({("z", 1): texts}, seed=1)
    (hook,) = ablate(gemma, [(1, 0)], given).values()
    z = hook(torch.full((8, 6, 4, 6), 9.0))
    assert (z[:, 0] == 9).all() and (z[:, :, 1:] == 9).all()  # first token, other heads: kept
    rows = z[:, 1:, 0].flatten(1)
    assert (rows == rows[:, :1]).all() and set(rows[:, 0].tolist()) <= {0.0, 1.0, 2.0}
    assert len(set(rows[:, 0].tolist())) > 1
    (again,) = ablate(gemma, [(1, 0)], given).values()
    assert torch.equal(again(torch.full((8, 6, 4, 6), 9.0)), z)


def test_mean_ablation_of_several_heads_by_hand(model):
    ids, other = model.tokens(TEXT), IDS.repeat(1, 2)[:, :12]
    reference = record(model, other)

    def by_hand(layer, at):
        def hook(z):
            z[:, 1:, at] = reference["z", layer].mean(0)[1:10, at]
            return z

        return hook

    with model.hooks({("z", 0): by_hand(0, [3]), ("z", 2): by_hand(2, [1, 2])}):
        want = model(ids)
    for given in (Mean(reference), Mean(other)):  # recorded, or texts that are run
        with model.hooks(ablate(model, [(0, 3), (2, 1), ("head", 2, 2)], given)):
            got = model(ids)
        assert torch.allclose(got, want, atol=1e-6)
    assert not torch.allclose(got, model(ids), atol=1e-3)


def test_an_empty_set_changes_nothing(gemma):
    assert ablate(gemma, [], Zero()) == ablate(gemma, [], Mean()) == {}


def test_parts_have_names():
    parts = [("head", 3, 1), ("attn", 2, None), ("mlp", 3, None)]
    assert list(map(part_name, parts)) == ["L3 head 1", "L2 attention", "L3 MLP"]


# -- noise -------------------------------------------------------------------------------------


def test_gaussian_noise_has_the_size_of_the_embedding(gemma):
    ids = IDS.repeat(20, 1)
    noise = Gaussian([-2, 1], scale=3).noise(gemma, ids)
    assert noise.shape == (10, 40, 7, 20) and noise[:, :, [0, 2, 3, 4, 6]].abs().sum() == 0
    embed = gemma.part("embed")(torch.arange(gemma.d_vocab))  # scaled by sqrt(d_model)
    assert noise[:, :, [1, 5]].std() == pytest.approx(3 * embed.std().item(), rel=0.02)
    assert torch.equal(noise, Gaussian([5, 1], scale=3).noise(gemma, ids))
    assert not torch.equal(noise[0], noise[1])


def mlp(*shape):
    return {("mlp_out", 0): torch.zeros(*shape)}


@pytest.mark.parametrize(
    ("part", "ablation", "message"),
    [
        (("neuron", 0), Zero(), "no kind of part 'neuron'"),
        (("mlp", 4), Zero(), "gemma2 has layers 0 to 3, not 4"),
        (("mlp", -5), Zero(), "not -5"),
        (("head", 0), Zero(), "heads 0 to 3, not None"),
        ((0, 4), Zero(), "not 4"),
        (("mlp", 0, 1), Zero(), "takes no head"),
        (("mlp", 0), "blur", "'blur' is no ablation"),
        (("mlp", 0), Mean(), "needs a reference"),
        (("mlp", 0), Mean({("z", 0): torch.zeros(4, 4, 6)}), r"no \('mlp_out', 0\)"),
        (("mlp", 0), Mean(mlp(4, 7)), r"shape \(4, 7\), expected \(tokens, 20\)"),
        ((0, 1), Resample({("z", 0): torch.zeros(4, 24)}), r"expected \(tokens, 4, 6\)"),
        (("mlp", 0), Mean(mlp(0, 20)), "expected"),
    ],
)
def test_an_impossible_ablation_is_said_in_one_sentence(gemma, part, ablation, message):
    with pytest.raises(ModelError, match=message) as caught:
        ablate(gemma, [part], ablation)
    assert "\n" not in str(caught.value)


def test_reference_texts_that_are_too_short_say_so(gemma):
    short = Mean(IDS[:, :5])
    with gemma.hooks(ablate(gemma, [(0, 0)], short)), pytest.raises(ModelError) as caught:
        gemma(TEXT)
    assert "5 tokens and this one 10" in str(caught.value)
