"""Direct logit attribution: by hand, and on random models of every family."""

import pytest
import torch
from families import CONFIGS, TEXT, build, make_tokenizer
from rounding import SHARE, near

from mi_helpers.attribution import Attribution, direct_logit_attribution, head_writes
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.lessons.lesson_04 import exercises as lesson_04
from mi_helpers.lessons.lesson_04.experiments import heads_off
from mi_helpers.models import LanguageModel

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


def some_ids(model, n=6, length=9, seed=0):
    return torch.randint(
        4, model.d_vocab, (n, length), generator=torch.Generator().manual_seed(seed)
    )


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
        heads, bias = head_writes(model, cache["z", layer], layer)
        whole = heads.sum(-2) + (0 if bias is None else bias)
        out = cache["attn_out", layer].double()
        assert near(whole, out)
        naive, bias = head_writes(model, cache["z", layer], layer, post_norm=False)
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
    terms = lesson_04.head_terms(z, gemma.weight("W_O", 1).double(), post, v)  # without eps
    torch.testing.assert_close(terms, split.heads()[0, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama", "gpt2"])
def test_leaving_out_the_post_norm(family, models):
    model = models[family]
    right, wrong = (
        direct_logit_attribution(model, TEXT, 5, 6, "head", post_norm=norm)
        for norm in (True, False)
    )
    if family in POST_NORMED:
        assert wrong.error > 100 * right.error and heads_off(right, wrong) > 0.1
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
        (
            lambda m: direct_logit_attribution(m, TEXT, 5, unit="neuron"),
            "expected one of component, head",
        ),
        (lambda m: direct_logit_attribution(m, TEXT, " Paris Rome"), "is 2 tokens"),
        (lambda m: direct_logit_attribution(m, TEXT, [5, 6]), "2 entries for 1 prompts"),
        (lambda m: direct_logit_attribution(m, TEXT, 5, 5), "the same token"),
        (lambda m: direct_logit_attribution(m, TEXT, 99), "from 0 to 47"),
        (lambda m: direct_logit_attribution(m, TEXT, 5, pos=torch.tensor([1, 2])), "2 entries for"),
        (
            lambda m: direct_logit_attribution(m, TEXT, 5, pos=10),
            "positions are .10.: .* from 0 to 9",
        ),
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
    terms = lesson_04.split_logit(gemma, TEXT, 7)
    split = direct_logit_attribution(gemma, TEXT, 7)
    torch.testing.assert_close(terms.double(), split.terms[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(1 + gemma.ln_final.weight, norm_gain(gemma.ln_final))
