"""Lenses and direct logit attribution: by hand, on random models of every family, on tiny-gemma."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import SHARE, near
from test_models import CONFIGS, TEXT, build, make_tokenizer

from mi_helpers import lens as lenses
from mi_helpers.durable import RunError
from mi_helpers.exercises import lesson_04
from mi_helpers.lens import (
    Attribution,
    TunedLens,
    direct_logit_attribution,
    logit_lens,
    make_prompts,
    read_out,
    read_stream,
)
from mi_helpers.lens_figures import LENSES, LensViewer, lens_grid, lens_table, shown
from mi_helpers.lesions import untrained
from mi_helpers.models import LanguageModel, ModelError, load_model, norm_gain
from mi_helpers.plots import render
from mi_helpers.widgets import corners

POST_NORMED = ("gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def models():
    return {family: LanguageModel(build(family), make_tokenizer(), family) for family in CONFIGS}


@pytest.fixture(params=CONFIGS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def gemma(models):
    return models["gemma2"]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-gemma")


def some_ids(model, n=6, length=9, seed=0):
    return torch.randint(
        4, model.d_vocab, (n, length), generator=torch.Generator().manual_seed(seed)
    )


def some_stream(model, n=60, seed=0):
    ids = some_ids(model, n=20, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    at = torch.randint(20, (n,), generator=rng), torch.randint(1, 9, (n,), generator=rng)
    return read_stream(model, ids, at)


# ---------------------------------------------------------------------------------- the stream


def test_reading_tokens_is_reading_the_cache(model):
    ids = some_ids(model)
    rows, positions = torch.tensor([4, 0, 2, 4, 5]), torch.tensor([8, 3, 0, 1, 6])
    sites = ["z", "mlp_out", "resid_final"]
    found = lenses.read_sites(model, ids, (rows, positions), sites, size=2)
    _, cache = model.run_with_cache(ids, sites)
    assert set(found) == set(cache)
    for key, values in found.items():
        assert near(values, cache[key][rows, positions])


def test_reading_no_token(gemma):
    with pytest.raises(ModelError, match="two equal lists of at least one"):
        lenses.read_sites(gemma, some_ids(gemma), (torch.arange(2), torch.arange(3)), ["z"])
    with pytest.raises(ModelError, match="at least one number"):
        lenses.read_stream(gemma, some_ids(gemma), (torch.arange(0), torch.arange(0)))


# ------------------------------------------------------------------------------- the logit lens


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
    answer = lesson_04.lens(h, w, gemma.W_U.double(), 2.0, gemma.config.rms_norm_eps)
    torch.testing.assert_close(answer, by_hand)


def test_the_lens_reads_other_sites(gemma):
    _, cache = gemma.run_with_cache(TEXT, ["resid_mid", "mlp_out"], pos=-1)
    for site in ("resid_mid", "mlp_out"):
        logits = logit_lens(gemma, TEXT, site, pos=-1)
        torch.testing.assert_close(logits, gemma.unembed(cache[site]))
        assert logits.shape == (gemma.n_layers, 1, gemma.d_vocab)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: logit_lens(m, TEXT, "q"), "The lens reads resid_post, .* not 'q'"),
        (lambda m: logit_lens(m, TEXT, "resid_mid", lens=TunedLens(4, 20)), "what leaves a block"),
        (lambda m: logit_lens(m, ""), "empty"),
        (lambda m: logit_lens(m, TEXT, pos=99), "Position 99 is out of range"),
        (lambda m: lenses.top_tokens(m, some_stream(m), 0), "choose 1 to 48"),
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


# ------------------------------------------------------------------------------- the summary


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


def test_favourites(gemma):
    stream = some_stream(gemma)
    got = lenses.favourites(gemma, stream)
    for depth, (token, share, sure) in enumerate(got):
        p = gemma.unembed(stream[depth]).softmax(-1)
        counts = [int((p.argmax(-1) == t).sum()) for t in range(gemma.d_vocab)]
        assert counts[token] == max(counts) and share == pytest.approx(max(counts) / 60)
        assert sure == pytest.approx(p[p.argmax(-1) == token, token].mean().item(), abs=1e-5)


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
    settled = lesson_04.settled(ranks)
    assert lenses.settled_depth(column).item() == (len(ranks) if settled is None else settled)


# ------------------------------------------------------------------------------- the tuned lens


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
    with pytest.raises(ModelError, match=r"expected \(5, tokens, 20\)"):
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

    monkeypatch.setattr("mi_helpers.durable.save_file", full)
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


def test_sampled_stream(tiny):
    stream = lenses.sample_stream(tiny, 50, seed=3)
    assert stream.shape == (7, 50, 144)
    assert torch.equal(stream, lenses.sample_stream(tiny, 50, seed=3))
    bos = tiny.run_with_cache(torch.tensor([[2]]), "resid_pre")[1]["resid_pre", 0][0, 0]
    assert not (stream[0] == bos).all(-1).any()  # never the first token
    words = read_out(tiny, stream).top[0]  # tied: the embedding reads the token itself
    assert len(words.unique()) > 15


# ------------------------------------------------------------------- direct logit attribution


@pytest.mark.parametrize("unit", ["component", "head"])
@pytest.mark.parametrize("wrong", [None, torch.tensor([9, 8, 7, 6, 5, 4])])
def test_the_terms_are_complete(model, unit, wrong, record_property):
    ids, answer = some_ids(model), torch.tensor([4, 5, 6, 7, 8, 9])
    pos = torch.tensor([8, 3, 1, 5, 8, 2])
    split = direct_logit_attribution(model, ids, answer, wrong, unit, pos)
    rows = torch.arange(6)
    logits = model.hf(ids).logits[rows, pos].double()
    if model.softcap:  # undo the cap: an independent way to the same number
        logits = model.softcap * torch.atanh(logits / model.softcap)
    want = logits[rows, answer] - (0 if wrong is None else logits[rows, wrong])
    torch.testing.assert_close(split.logit, want, atol=2e-4, rtol=1e-4)
    record_property("error", split.error)
    print(f"{model.family:12} {unit:10} {split.error:.1e}")
    assert split.error < SHARE * max(1, float(split.logit.abs().max()))
    assert len(set(split.names)) == len(split.names) == split.terms.shape[1]


def test_the_names_of_the_terms(models):
    def names(family, unit):
        return direct_logit_attribution(models[family], TEXT, 5, None, unit).names

    gemma = names("gemma2", "component")
    assert gemma[:3] == ("embed", "L0 attention", "L0 MLP") and len(gemma) == 1 + 2 * 4
    assert len(names("gemma2", "head")) == 1 + 4 * (4 + 1)
    gpt2 = names("gpt2", "head")
    assert gpt2[:2] == ("embed", "position") and gpt2[-1] == "final norm bias"
    assert "L2 head 3" in gpt2 and "L2 attention bias" in gpt2
    assert "L0 attention bias" in names("gpt_neox", "head")
    assert "L0 attention bias" not in names("qwen2", "head")  # its value bias is in z


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_make_up_attention(family, models):
    model = models[family]
    _, cache = model.run_with_cache(some_ids(model), ["z", "attn_out"])
    for layer in range(model.n_layers):
        heads, bias = lenses.head_writes(model, cache["z", layer], layer)
        whole = heads.sum(-2) + (0 if bias is None else bias)
        out = cache["attn_out", layer].double()
        assert near(whole, out)
        naive, bias = lenses.head_writes(model, cache["z", layer], layer, post_norm=False)
        whole = naive.sum(-2) + (0 if bias is None else bias)
        gap = (whole - out).norm() / out.norm()
        assert (gap > 0.1) == (family in POST_NORMED), gap


def test_terms_of_layernorm_by_hand(models):
    model = models["gpt2"]
    split = direct_logit_attribution(model, TEXT, 7, 9)
    _, cache = model.run_with_cache(TEXT, ["mlp_out", "resid_final"], pos=-1)
    final, part = cache["resid_final"][0].double(), cache["mlp_out", 1][0].double()
    norm, u = model.ln_final, (model.lm_head.weight[7] - model.lm_head.weight[9]).double()
    scale = (final.var(correction=0) + norm.eps).sqrt()
    by_hand = ((part - part.mean()) / scale * norm.weight.double()) @ u
    term = split.terms[0, split.names.index("L1 MLP")]
    torch.testing.assert_close(term, by_hand)
    assert split.mean()["final norm bias"] == pytest.approx((norm.bias.double() @ u).item())


def test_terms_of_a_head_by_hand(gemma):
    """One head of Gemma 2, written out; and the exercise agrees."""
    split = direct_logit_attribution(gemma, TEXT, 7, 9, "head")
    _, cache = gemma.run_with_cache(TEXT, ["z", "resid_final"], pos=-1)
    z, final = cache["z", 1][0].double(), cache["resid_final"][0].double()
    W_O = gemma.part("o", 1).weight.double()  # (d_model, n_heads * d_head)
    whole, eps = W_O @ z.flatten(), gemma.config.rms_norm_eps
    own = W_O[:, 12:18] @ z[2]  # head 2, of 6 numbers
    post = gemma.part("ln1_post", 1).weight.double()
    written = own / (whole.pow(2).mean() + eps).sqrt() * (1 + post)
    u = (gemma.W_E[7] - gemma.W_E[9]).double() * (1 + gemma.ln_final.weight.double())
    v = u / (final.pow(2).mean() + eps).sqrt()
    term = split.heads()[0, 1, 2]
    torch.testing.assert_close(term, written @ v)
    terms = lesson_04.head_terms(z, gemma.weight("W_O", 1).double(), post, v, eps)
    torch.testing.assert_close(terms, split.heads()[0, 1])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama", "gpt2"])
def test_leaving_out_the_post_norm(family, models):
    model = models[family]
    right, wrong = (
        direct_logit_attribution(model, TEXT, 5, 6, "head", post_norm=norm)
        for norm in (True, False)
    )
    if family in POST_NORMED:
        assert wrong.error > 100 * right.error and lenses.heads_off(right, wrong) > 0.1
    else:
        assert torch.equal(right.terms, wrong.terms)


def test_padding_and_batching_change_nothing(model):
    ids = some_ids(model)
    pos = torch.tensor([8, 3, 1, 5, 8, 2])
    split = direct_logit_attribution(model, ids, 5, 6, "head", pos)
    for i in range(6):
        alone = direct_logit_attribution(model, ids[i, : pos[i] + 1], 5, 6, "head")
        torch.testing.assert_close(alone.terms[0], split.terms[i], atol=1e-5, rtol=1e-4)


def test_answers_may_be_words(gemma):
    one = direct_logit_attribution(gemma, TEXT, " Paris", " Rome")
    ids = [gemma.to_single_token(word) for word in (" Paris", " Rome")]
    assert torch.equal(one.terms, direct_logit_attribution(gemma, TEXT, *ids).terms)
    two = direct_logit_attribution(gemma, [TEXT, TEXT], [" Paris", " cat"], " Rome")
    torch.testing.assert_close(two.terms[:1], one.terms, atol=1e-5, rtol=1e-5)


def test_bfloat16_says_how_far_off_it_is():
    model = LanguageModel(build("gemma2").bfloat16(), make_tokenizer())
    split = direct_logit_attribution(model, TEXT, 5, 6, "head")
    assert 1e-4 < split.error < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: direct_logit_attribution(m, TEXT, 5, unit="neuron"), '"component" or "head"'),
        (lambda m: direct_logit_attribution(m, TEXT, " Paris Rome"), "is 2 tokens"),
        (lambda m: direct_logit_attribution(m, TEXT, [5, 6]), "2 entries for 1 prompts"),
        (lambda m: direct_logit_attribution(m, TEXT, 5, 5), "the same token"),
        (lambda m: direct_logit_attribution(m, TEXT, 99), "ids outside 0 to 47"),
        (lambda m: direct_logit_attribution(m, TEXT, 5, pos=torch.tensor([1, 2])), "2 entries for"),
        (lambda m: direct_logit_attribution(m, TEXT, 5, pos=10), "Position 10 is out of range"),
        (lambda m: direct_logit_attribution(m, TEXT, 5).heads(), 'unit="head"'),
    ],
)
def test_what_attribution_refuses(gemma, call, message):
    with pytest.raises(ModelError, match=message):
        call(gemma)


def test_an_attribution_that_does_not_add_up_says_so():
    split = Attribution(
        ("a", "b"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([3.0, 8.0])
    )
    assert split.error == 1 and split.relative_error == 1 / 8
    assert split.mean() == {"a": 2.0, "b": 3.0}


def test_the_exercise_splits_as_the_module_does(gemma):
    _, cache = gemma.run_with_cache(TEXT, ["embed", "attn_out", "mlp_out"], pos=-1)
    parts = [cache["embed"][0]]
    for layer in range(gemma.n_layers):
        parts += [cache["attn_out", layer][0], cache["mlp_out", layer][0]]
    w, u = gemma.ln_final.weight.double(), gemma.W_U[:, 7].double()
    terms = lesson_04.split_logit(torch.stack(parts).double(), w, u, gemma.config.rms_norm_eps)
    split = direct_logit_attribution(gemma, TEXT, 7)
    torch.testing.assert_close(terms, split.terms[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(1 + gemma.ln_final.weight, norm_gain(gemma.ln_final))


# ------------------------------------------------------------------- prompts, and tiny-gemma


@pytest.mark.parametrize("family", ["facts", "ioi", "two_hop", "agreement", "calendar"])
def test_prompts_end_before_their_answer(tiny, family):
    p = make_prompts(tiny, family, 30)
    for i, document in enumerate(p.documents):
        span = document.find("answer")[-1]
        answer = document.text[span.start : span.end]
        read = tiny.tokenizer.decode(p.ids[i, 1 : p.last[i] + 1])
        assert document.text.startswith(p.text(i)) and read.rstrip() == p.text(i)
        assert answer.startswith(tiny.tokenizer.decode([p.answer[i]]).strip())
    assert (p.answer != p.wrong).all()
    if family == "ioi":
        giver = [tiny.tokenizer.decode([token]).strip() for token in p.wrong]
        assert giver == [document.latents["S"] for document in p.documents]


def test_wrong_facts_are_of_the_same_kind(tiny):
    p = make_prompts(tiny, "facts", 60, count=1)
    kinds = {}
    for document, token in zip(p.documents, p.answer.tolist(), strict=True):
        kinds.setdefault(lenses._asked(document), set()).add(token)
    for document, token in zip(p.documents, p.wrong.tolist(), strict=True):
        assert token in kinds[lenses._asked(document)]
    assert len(kinds) > 3


def test_prompts_that_cannot_be_made(tiny):
    with pytest.raises(ValueError, match="0 of 3 prompts of 'norwegian'"):
        make_prompts(tiny, "norwegian", 3)
    with pytest.raises(ValueError, match="no family 'fact'"):
        make_prompts(tiny, "fact", 3)


def test_the_country_of_a_document(tiny):
    document = make_prompts(tiny, "two_hop", 1, relation="country", count=1).documents[0]
    assert f" {lenses.country_of(document)}." in document.text
    with pytest.raises(ValueError, match="No landmark"):
        lenses.country_of(make_prompts(tiny, "ioi", 1).documents[0])
    assert lenses.word_tokens(tiny, ["Paris"]).tolist() == [tiny.to_single_token(" Paris")]


def test_bridges(tiny):
    found = lenses.bridge_scan(tiny, "language", 30)
    assert all(share.shape == (7,) and share.max() <= 1 for share in found.values())
    assert (found["answer (of its kind)"] >= found["answer (of all)"]).all()
    assert (found["country (of countries)"] >= found["country (of all)"]).all()
    assert found["answer (of all)"][-1] > 0.7  # pairs that were never trained
    with pytest.raises(ValueError, match="no 'climate' here; there are: language"):
        lenses.bridge_scan(tiny, "climate")


def test_answers_are_there_at_the_end_and_not_at_the_start(tiny):
    blank = untrained(tiny)
    for family, choices in (("facts", {"count": 1}), ("ioi", {})):
        p = make_prompts(tiny, family, 60, 5, **choices)
        hits = (lenses.ranks(tiny, read_stream(tiny, p.ids, p.at), p.answer) == 1).float().mean(1)
        assert hits[0] < 0.1 and hits[-1] > 0.9
        none = lenses.ranks(blank, read_stream(blank, p.ids, p.at), p.answer) == 1
        assert none.float().mean() < 0.05


@pytest.mark.parametrize("unit", ["component", "head"])
def test_complete_on_tiny_gemma(tiny, unit):
    p = make_prompts(tiny, "ioi", 40, 3)
    split = direct_logit_attribution(tiny, p.ids, p.answer, p.wrong, unit, p.last)
    assert split.relative_error < SHARE
    assert (split.logit > 0).float().mean() > 0.9


def test_total_effects(tiny):
    """The last MLP's effect is direct: nothing reads it. The first one's is not."""
    p = make_prompts(tiny, "facts", 20, 2, count=1)
    total = lenses.total_effects(tiny, p)
    direct = direct_logit_attribution(tiny, p.ids, p.answer, p.wrong, pos=p.last).mean()
    assert list(total) == [name for name in direct if name != "embed"]
    by_hand = []
    _, cache = tiny.run_with_cache(p.ids, "mlp_out")
    rows = [cache["mlp_out", 2][i, 1 : last + 1] for i, last in enumerate(p.last)]
    mean = torch.cat(rows).mean(0)
    for hooks in (
        {},
        {("mlp_out", 2): lambda x: torch.cat([x[:, :1], mean.expand_as(x[:, 1:])], 1)},
    ):
        with tiny.hooks(hooks):
            _, run = tiny.run_with_cache(p.ids, "resid_final")
        logits = tiny.unembed(run["resid_final"], softcap=False)[p.at]
        rows = torch.arange(len(logits))
        by_hand.append((logits[rows, p.answer] - logits[rows, p.wrong]).mean().item())
    assert total["L2 MLP"] == pytest.approx(by_hand[0] - by_hand[1], abs=1e-3)
    assert total["L0 MLP"] > 3 * abs(direct["L0 MLP"])


# ---------------------------------------------------------------------------------- figures


CONTROLS = {
    "prompt": "The Eiffel Tower is in the city of",
    "layer": (-1, 5),
    "back": (0, 8),
    "lens": list(LENSES),
    "follow": "France",
}


@pytest.fixture(scope="module")
def viewer(tiny):
    return LensViewer(tiny, TunedLens(6, 144))


def test_the_viewer_at_every_corner(viewer):
    for values in corners(**CONTROLS):
        assert render(viewer.figure(**values)).startswith(b"\x89PNG")


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts + axes.get_yticklabels()]


def test_the_viewer_shows_what_the_lens_reads(viewer, tiny):
    prompt = "The Eiffel Tower is in the city of"
    figure = viewer.figure(prompt, layer=5)
    p = tiny(prompt)[0, -1].softmax(-1)
    best = p.topk(5)
    for value, token in zip(best.values, best.indices, strict=True):
        assert f"{value:.3f}" in texts(figure)
        assert repr(tiny.tokenizer.decode([token])) in texts(figure)
    followed = viewer.figure(prompt, layer=5, follow="France")
    france = tiny.to_single_token(" France")
    assert str(int((p > p[france]).sum()) + 1) in texts(followed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "word " * 300}, "more than tiny-gemma's context"),
        ({"back": 9}, "go back 0 to 8"),
        ({"layer": 6}, "choose -1 to 5"),
        ({"lens": "other"}, "There is no 'other' here"),
        ({"follow": "Flurbzork"}, "choose a word that is one token"),
    ],
)
def test_what_the_viewer_cannot_draw_is_said(viewer, change, message):
    values = {"prompt": "The Eiffel Tower is in the city of"} | change
    with pytest.raises(ValueError, match=message):
        viewer.figure(**values)


def test_any_typed_text_is_drawn_or_answered(viewer, gemma):
    for prompt in ("x", "Flurbzork 漢字 $x_1$ \n <eos> {}", "a" * 60):
        assert render(viewer.figure(prompt, layer=0))
    with pytest.raises(ValueError, match="is not in gemma2's vocabulary: use other words"):
        LensViewer(gemma).figure("The Flurbzork")
    with pytest.raises(ValueError, match="choose one of logit lens"):
        LensViewer(gemma).figure(TEXT, lens="tuned lens")


def test_the_grid(gemma):
    p = torch.full((2, 3), 0.5)
    tops = [["a", " b", "$c"], ["d", "e", "f\n"]]
    figure = lens_grid([" x", "y", "z"], ["embed", "0"], tops, p)
    assert render(figure)
    assert r"\$c" in texts(figure) and "f↵" in texts(figure)
    with pytest.raises(ValueError, match="expected"):
        lens_grid([" x", "y"], ["embed", "0"], tops, p)
    assert shown("abcdefghijklmnop") == "abcdefghij…"


def test_the_table():
    text = lens_table(
        ["embed", "0"], [[" a", "|"], ["<bos>", "\n"]], torch.tensor([[0.5, 0.25]] * 2)
    )
    lines = text.splitlines()
    assert lines[0] == "| after block | 1 | 2 |" and lines[1] == "|---|---|---|"
    assert lines[2] == "| embed | `␣a` 0.500 | `∣` 0.250 |"
    assert [line.count("|") for line in lines] == [4] * 4


# ---------------------------------------------------------------------------------- the ledger


def test_the_loss_of_training_is_the_exercises_loss(gemma):
    stream = some_stream(gemma)
    final, early = (gemma.unembed(stream[depth]) for depth in (-1, 1))
    kl = lesson_04.lens_loss(final, early)
    torch.testing.assert_close(read_out(gemma, stream).kl[1].mean(), kl, atol=1e-5, rtol=1e-4)
    log_p = F.log_softmax(early, -1)
    torch.testing.assert_close(
        kl, F.kl_div(log_p, F.log_softmax(final, -1), reduction="batchmean", log_target=True)
    )


def test_a_random_token_is_in_the_middle():
    assert lenses.random_token_rank(0) == pytest.approx(0.5, abs=0.06)
