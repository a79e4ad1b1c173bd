"""Lenses: by hand, and on random models of every family."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, TEXT, build, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import near

from mi_helpers import lens as lenses
from mi_helpers.files import RunError
from mi_helpers.layouts import ModelError
from mi_helpers.lens import TunedLens, logit_lens, read_out, read_stream
from mi_helpers.lessons.lesson_04 import exercises as lesson_04
from mi_helpers.models import LanguageModel, activations_at


@pytest.fixture(scope="module")
def models():
    return {family: LanguageModel(build(family), make_tokenizer(), family) for family in CONFIGS}


@pytest.fixture(params=CONFIGS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def gemma(models):
    return models["gemma2"]


def some_ids(model, n=6, length=9, seed=0):
    return torch.randint(
        4, model.d_vocab, (n, length), generator=torch.Generator().manual_seed(seed)
    )


def some_stream(model, n=60, seed=0):
    ids = some_ids(model, n=20, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    at = torch.randint(20, (n,), generator=rng), torch.randint(1, 9, (n,), generator=rng)
    return read_stream(model, ids, at)


# -- the stream ------------------------------------------------------------------------------


def test_reading_tokens_is_reading_the_cache(model):
    ids = some_ids(model)
    rows, positions = torch.tensor([4, 0, 2, 4, 5]), torch.tensor([8, 3, 0, 1, 6])
    sites = ["z", "mlp_out", "resid_final"]
    found = activations_at(model, ids, (rows, positions), sites, size=2)
    _, cache = model.run_with_cache(ids, sites)
    assert set(found) == set(cache)
    for key, values in found.items():
        assert near(values, cache[key][rows, positions])


def test_reading_no_token(gemma):
    with pytest.raises(ModelError, match="expected as many of each"):
        activations_at(gemma, some_ids(gemma), (torch.arange(2), torch.arange(3)), ["z"])
    with pytest.raises(ModelError, match="`at` rows are .*expected at least one"):
        lenses.read_stream(gemma, some_ids(gemma), (torch.arange(0), torch.arange(0)))


# -- the logit lens --------------------------------------------------------------------------


def test_the_last_depth_is_the_model(model):
    logits = logit_lens(model, TEXT)
    assert logits.shape == (model.n_layers + 1, 1, 10, model.d_vocab)
    torch.testing.assert_close(logits[-1], model(TEXT))
    _, cache = model.run_with_cache(TEXT, [("resid_pre", 0), ("resid_post", 1)])
    torch.testing.assert_close(logits[0], model.unembed(cache["resid_pre", 0]))
    torch.testing.assert_close(logits[2], model.unembed(cache["resid_post", 1]))


def test_the_lens_of_gemma_by_hand(gemma):
    """Written out from the configuration, and as the exercise has it."""
    _, cache = gemma.run_with_cache(TEXT, "resid_post")
    h, w = cache["resid_post", 1].double(), gemma.ln_final.weight.double()
    normed = h / torch.sqrt((h**2).mean(-1, keepdim=True) + gemma.config.rms_norm_eps) * (1 + w)
    raw = normed @ gemma.W_E.double().T
    by_hand = 2.0 * torch.tanh(raw / 2.0)
    got = logit_lens(gemma, TEXT)[2].double()
    torch.testing.assert_close(got, by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logit_lens(gemma, TEXT, softcap=False)[2].double(), raw, atol=1e-4, rtol=1e-5
    )
    answer = lesson_04.lens(gemma, cache["resid_post", 1]).double()
    torch.testing.assert_close(answer, by_hand, atol=1e-5, rtol=1e-5)


def test_the_lens_reads_other_sites(gemma):
    _, cache = gemma.run_with_cache(TEXT, ["resid_mid", "mlp_out"], pos=-1)
    for site in ("resid_mid", "mlp_out"):
        logits = logit_lens(gemma, TEXT, site, pos=-1)
        torch.testing.assert_close(logits, gemma.unembed(cache[site]))
        assert logits.shape == (gemma.n_layers, 1, gemma.d_vocab)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: logit_lens(m, TEXT, "q"), "The lens reads the site resid_post, .* not 'q'"),
        (lambda m: logit_lens(m, TEXT, "resid_mid", lens=TunedLens(4, 20)), "what leaves a block"),
        (lambda m: logit_lens(m, ""), "empty"),
        (lambda m: logit_lens(m, TEXT, pos=99), "positions are .99.: .* from 0 to 9"),
        (lambda m: lenses.top_tokens(m, some_stream(m), 0), "whole number from 1 to 48"),
    ],
)
def test_what_the_lens_refuses(gemma, call, message):
    with pytest.raises(ModelError, match=message):
        call(gemma)


def test_too_many_logits_are_refused_before_they_are_made(gemma, monkeypatch):
    monkeypatch.setattr(lenses, "MOST_LOGITS", 5 * 10 * 48 - 1)
    monkeypatch.setattr(gemma.lm_head, "forward", lambda x: pytest.fail("unembedded"))
    with pytest.raises(ModelError, match="choose positions with `pos`"):
        logit_lens(gemma, TEXT)


def test_parallel_blocks_have_no_middle(models):
    with pytest.raises(ModelError, match="no resid_mid"):
        logit_lens(models["gpt_neox"], TEXT, "resid_mid")


# -- the summary -----------------------------------------------------------------------------


def test_a_readout_is_what_its_logits_say(model):
    stream = some_stream(model, 7)
    target = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    got = read_out(model, stream, target)
    p = model.unembed(stream).softmax(-1).double()  # (depths, n, d_vocab)
    for depth in range(len(stream)):
        for i in range(7):
            q = p[depth, i]
            own = q[target[i]]
            assert got.top[depth, i] == q.argmax()
            assert got.rank[depth, i] == 1 + sum(x > own for x in q)
            assert got.p[depth, i] == pytest.approx(float(own), rel=1e-4)
            entropy = -sum(x * math.log(x) for x in q.tolist())
            assert got.entropy[depth, i] == pytest.approx(entropy, abs=1e-4)
            kl = sum(
                a * math.log(a / b) for a, b in zip(p[-1, i].tolist(), q.tolist(), strict=True)
            )
            assert got.kl[depth, i] == pytest.approx(kl, abs=1e-4)
    assert got.kl[-1].abs().max() == 0


def test_without_a_target_it_is_the_final_answer(model):
    got = read_out(model, some_stream(model))
    assert (got.rank[-1] == 1).all()
    assert torch.equal(got.rank == 1, got.top == got.top[-1])


def test_pieces_make_no_difference(model, monkeypatch):
    stream, target = some_stream(model, 11), torch.arange(11) + 4
    whole = read_out(model, stream, target), lenses.top_tokens(model, stream, 3)
    ranks = lenses.ranks(model, stream, target)
    monkeypatch.setattr(lenses, "AT_ONCE", 3 * model.d_vocab)
    pieces = read_out(model, stream, target), lenses.top_tokens(model, stream, 3)
    for name in ("top", "rank", "p", "entropy", "kl"):
        torch.testing.assert_close(getattr(whole[0], name), getattr(pieces[0], name))
    assert torch.equal(whole[1][1], pieces[1][1])
    assert torch.equal(ranks, lenses.ranks(model, stream, target))
    assert torch.equal(ranks, whole[0].rank)


def test_ranks_among_some_tokens(gemma):
    stream, some = some_stream(gemma), torch.tensor([9, 4, 30])
    got = lenses.ranks(gemma, stream, torch.full((60,), 4), among=some)
    order = gemma.unembed(stream)[..., some].argsort(-1, descending=True)
    assert torch.equal(got, (order == 1).int().argmax(-1) + 1)
    assert set(got.unique().tolist()) == {1, 2, 3}


def test_the_softcap_leaves_the_order_alone(gemma):
    stream, target = some_stream(gemma), torch.full((60,), 9)
    capped, plain = (read_out(gemma, stream, target, softcap=cap) for cap in (True, False))
    assert torch.equal(capped.rank, plain.rank)
    assert (capped.p - plain.p).abs().max() > 0.1
    assert (plain.entropy < capped.entropy).all()


def test_top_tokens(gemma):
    stream = some_stream(gemma)
    p, ids = lenses.top_tokens(gemma, stream, 3)
    full = gemma.unembed(stream).softmax(-1)
    assert ids.shape == p.shape == (5, 60, 3)
    assert torch.equal(ids[..., 0], full.argmax(-1))
    torch.testing.assert_close(p, full.gather(-1, ids))
    assert (p[..., 0] >= p[..., 1]).all() and (p[..., 1] >= p[..., 2]).all()


def test_first_and_settled_depth():
    rank = torch.tensor([[50, 1, 9, 1, 1], [4, 1, 1, 1, 2], [1, 1, 1, 1, 1], [7, 6, 5, 4, 3]]).T
    assert lenses.first_depth(rank).tolist() == [1, 1, 0, 5]
    assert lenses.settled_depth(rank).tolist() == [3, 5, 0, 5]
    assert lenses.shares(lenses.first_depth(rank), 5).tolist() == [0.25, 0.5, 0, 0, 0, 0.25]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_depths_agree_with_a_plain_loop(ranks):
    column = torch.tensor(ranks)[:, None]
    first = ranks.index(1) if 1 in ranks else len(ranks)
    assert lenses.first_depth(column).item() == first
    assert lenses.settled_depth(column).item() == lesson_04.settled(column).item()


# -- the tuned lens --------------------------------------------------------------------------


def test_untrained_it_is_the_logit_lens(model):
    lens = TunedLens(model.n_layers, model.d_model)
    torch.testing.assert_close(logit_lens(model, TEXT, lens=lens), logit_lens(model, TEXT))


def test_its_formula(gemma):
    lens = TunedLens(gemma.n_layers, gemma.d_model)
    torch.manual_seed(0)
    for p in lens.parameters():
        torch.nn.init.normal_(p)
    h = torch.randn(3, gemma.d_model)
    want = torch.stack([row + lens.weight[2] @ row + lens.bias[2] for row in h])
    torch.testing.assert_close(lens(h, 2), want)
    assert torch.equal(lens(h, gemma.n_layers), h)
    assert lens(h.bfloat16(), 1).dtype == torch.bfloat16
    stream = some_stream(gemma)
    by_hand = torch.stack([gemma.unembed(lens(x, d)) for d, x in enumerate(stream)])
    assert torch.equal(read_out(gemma, stream, lens=lens).top, by_hand.argmax(-1))


def test_training_brings_every_depth_closer_to_the_end(model):
    train, test = some_stream(model, 400, 0), some_stream(model, 100, 1)
    lens, losses = lenses.train_tuned_lens(model, train, steps=60, size=64, lr=0.02)
    plain, tuned = (read_out(model, test, lens=each).kl.mean(1) for each in (None, lens))
    assert (tuned[:-1] < plain[:-1]).all() and tuned[-1] == 0
    start = read_out(model, train).kl.mean(1)[:-1].mean().item()
    assert losses[0] == pytest.approx(start, rel=0.3) and losses[-1] < 0.8 * losses[0]
    assert not any(p.requires_grad for p in lens.parameters())
    assert not any(p.requires_grad for p in model.hf.parameters())


def test_training_is_repeatable(gemma):
    stream = some_stream(gemma)
    one, two, other = (
        lenses.train_tuned_lens(gemma, stream, steps=3, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, other.weight)


def test_training_in_bfloat16():
    model = LanguageModel(build("gemma2").bfloat16(), make_tokenizer())
    lens, losses = lenses.train_tuned_lens(model, some_stream(model), steps=30, size=64, lr=0.02)
    assert lens.weight.dtype == torch.float32 and losses[-1] < losses[0]


def test_training_wants_the_whole_stream(gemma):
    with pytest.raises(ModelError, match=r"of shape \(5, tokens, 20\)"):
        lenses.train_tuned_lens(gemma, some_stream(gemma)[:-1])


@pytest.fixture
def saved(gemma, tmp_path):
    lens, _ = lenses.train_tuned_lens(gemma, some_stream(gemma), steps=2)
    lens.save(tmp_path / "lens")
    return lens, tmp_path / "lens"


def test_save_and_load(gemma, saved):
    lens, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "lens.safetensors"]
    again = TunedLens.load(folder, gemma)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias)
    assert again.name == gemma.name
    assert not any(p.requires_grad for p in again.parameters())


def test_a_failed_save_leaves_the_old_lens(saved, monkeypatch):
    lens, folder = saved

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mi_helpers.files.save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        TunedLens(4, 20).save(folder)
    assert torch.equal(TunedLens.load(folder).weight, lens.weight)


def damage(folder, how):
    file, cfg = folder / "lens.safetensors", folder / "cfg.json"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "gone":
        file.unlink()
    elif how == "other kind":
        cfg.write_text('{"kind": "sae"}')
    elif how == "no config":
        cfg.unlink()
    elif how == "half a config":
        cfg.write_text('{"kind": "tuned lens"}')
    else:
        cfg.write_text(json.dumps(json.loads(cfg.read_text()) | {"d_model": 7}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated or damaged.*Train the lens again"),
        ("gone", "is missing.*Train the lens again"),
        ("other kind", "holds no tuned lens"),
        ("half a config", "holds no tuned lens"),
        ("no config", "is missing"),
        ("other width", "but cfg.json says"),
    ],
)
def test_lenses_that_cannot_be_loaded(saved, how, message):
    damage(saved[1], how)
    with pytest.raises(ValueError, match=message) as error:
        TunedLens.load(saved[1])
    assert "\n" not in str(error.value)


def test_the_lens_of_another_model(gemma, models, saved):
    with pytest.raises(ModelError, match="has 4 of width 32: train one for it"):
        TunedLens.load(saved[1], models["gpt2"])
    with pytest.raises(ModelError, match="20 wide, and was given one of 32: it belongs to gemma2"):
        saved[0](torch.zeros(32), 0)
    with pytest.raises(ModelError, match="There is no depth 9"):
        saved[0](torch.zeros(20), 9)


def test_the_loss_of_training_is_the_exercises_loss(gemma):
    stream = some_stream(gemma)
    final, early = (gemma.unembed(stream[depth]) for depth in (-1, 1))
    kl = lesson_04.stopping_cost(final, early).mean()
    torch.testing.assert_close(read_out(gemma, stream).kl[1].mean(), kl, atol=1e-5, rtol=1e-4)
    log_p = F.log_softmax(early, -1)
    torch.testing.assert_close(
        kl, F.kl_div(log_p, F.log_softmax(final, -1), reduction="batchmean", log_target=True)
    )


def test_a_stream_of_texts(gemma):
    stream = lenses.sample_stream(gemma, [TEXT] * 9, 20)
    assert stream.shape == (5, 20, 20)
    _, cache = gemma.run_with_cache(TEXT, "resid_pre")
    own = cache["resid_pre", 0][0, 1:]  # never the first token
    assert all((own - x).norm(dim=-1).min() < 1e-5 for x in stream[0])
    with pytest.raises(ModelError, match="9 tokens after their first: give at least 20"):
        lenses.sample_stream(gemma, [TEXT], 20)


def test_a_text_longer_than_the_context_is_read_as_far_as_it_fits(model):
    long = " ".join([TEXT] * 30)
    assert len(model.encode(long)) > model.n_ctx
    stream = lenses.sample_stream(model, [long] * 2, model.n_ctx)
    assert stream.shape[1] == model.n_ctx
    row = lenses.beginning(model, long, 5)
    assert row.tolist() == model.tokens(TEXT)[0, :5].tolist()
