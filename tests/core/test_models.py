"""The model interface against Hugging Face's own outputs, hooks and modules: bit for bit.

Every model here is tiny, random and built on the spot; nothing touches the network.
"""

import json

import pytest
import torch
from families import CONFIGS, D_VOCAB, TEXT, build, build_empty, make_tokenizer
from huggingface_hub import errors as hub
from parity import parity_report
from rounding import near
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mi_helpers import hooks, loading
from mi_helpers.architecture import architecture
from mi_helpers.layouts import SITES, ModelError, norm_gain
from mi_helpers.loading import empty_gemma2_2b, load_model, materialize, untrained
from mi_helpers.models import LanguageModel, token_text


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to connect")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.delenv("MI_MODEL", raising=False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder per family, as save_pretrained writes it."""
    made = {}
    for family in CONFIGS:
        made[family] = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(made[family])
        make_tokenizer().save_pretrained(made[family])
    return made


@pytest.fixture(scope="session")
def loaded(folders):
    models = {family: load_model(folder) for family, folder in folders.items()}
    models["qwen2"].tokenizer = make_tokenizer()  # transformers gives every Qwen 2 its own kind
    return models


@pytest.fixture(params=CONFIGS)
def model(request, loaded):
    return loaded[request.param]


@pytest.fixture
def gemma(loaded):
    return loaded["gemma2"]


def same(a, b):
    return torch.equal(a, b)


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


# ---------------------------------------------------------------------------------- parity


def test_parity_with_hugging_face(model, record_property):
    report = parity_report(model)
    for site, gaps in report.items():
        record_property(site, gaps)
        print(f"{model.family:12} {site:15} {gaps}")
        assert all(gap == 0 for gap in gaps.values()), site
    absent = {"resid_mid"} if model.parallel else set()
    absent |= {"pos_embed"} if model.family != "gpt2" else set()
    assert set(report) == set(SITES) - absent | {"logits", "run_from_layer"}


def test_the_loaded_model_is_the_saved_one(model, folders):
    """An independent load and forward, through Hugging Face alone."""
    family = next(f for f, folder in folders.items() if str(folder) == model.name)
    hf = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager")
    ids = model.tokens(TEXT)
    assert same(model.forward(ids), hf(ids).logits)
    assert same(model(TEXT), model.forward(ids))


RAW = {  # where each family's sites are, written down a second time: (module, side, tuple index)
    "gemma2": {
        "attn_out": ("model.layers.2.post_attention_layernorm", "out"),
        "mlp_in": ("model.layers.2.mlp", "in"),
        "mlp_out": ("model.layers.2.post_feedforward_layernorm", "out"),
        "resid_mid": ("model.layers.2.pre_feedforward_layernorm", "in"),
        "post": ("model.layers.2.mlp.down_proj", "in"),
        "q": ("model.layers.2.self_attn.q_proj", "out"),
        "k": ("model.layers.2.self_attn.k_proj", "out"),
        "v": ("model.layers.2.self_attn.v_proj", "out"),
        "z": ("model.layers.2.self_attn.o_proj", "in"),
    },
    "llama": {
        "attn_out": ("model.layers.2.self_attn", "out"),
        "mlp_out": ("model.layers.2.mlp", "out"),
        "mlp_in": ("model.layers.2.post_attention_layernorm", "out"),
    },
    "gpt2": {
        "attn_out": ("transformer.h.2.attn", "out"),
        "mlp_out": ("transformer.h.2.mlp", "out"),
        "mlp_in": ("transformer.h.2.ln_2", "out"),
        "z": ("transformer.h.2.attn.c_proj", "in"),
    },
    "gpt_neox": {
        "attn_out": ("gpt_neox.layers.2.attention", "out"),
        "mlp_out": ("gpt_neox.layers.2.mlp", "out"),
        "mlp_in": ("gpt_neox.layers.2.post_attention_layernorm", "out"),
    },
}


@pytest.mark.parametrize("family", RAW)
def test_sites_are_where_they_should_be(family, loaded):
    model, seen = loaded[family], {}
    handles = []
    for site, (path, side) in RAW[family].items():
        module = model.hf.get_submodule(path)
        if side == "in":
            hook = module.register_forward_pre_hook(lambda _, a, s=site: seen.update({s: a[0]}))
        else:
            hook = module.register_forward_hook(
                lambda _, a, out, s=site: seen.update({s: out[0] if type(out) is tuple else out})
            )
        handles.append(hook)
    _, cache = model.run_with_cache(TEXT, RAW[family])
    for handle in handles:
        handle.remove()
    for site, x in seen.items():
        assert same(cache[site, 2].reshape(x.shape), x), site


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_heads_are_split_as_the_attention_splits_them(family, loaded, monkeypatch):
    """The q, k, v that reach a position-0 query are unrotated, so they can be compared directly."""
    model, seen = loaded[family], []
    source = __import__(type(model.part("attn", 0)).__module__, fromlist=["x"])
    eager = source.eager_attention_forward

    def spy(module, q, k, v, *args, **kwargs):
        seen.append([x[:, :, 0] for x in (q, k, v)])
        return eager(module, q, k, v, *args, **kwargs)

    monkeypatch.setattr(source, "eager_attention_forward", spy)
    _, cache = model.run_with_cache(TEXT, ["q", "k", "v"], pos=0)
    for layer, heads in enumerate(seen):
        for site, x in zip("qkv", heads, strict=True):
            assert same(cache[site, layer], x)


def test_shapes(model):
    dims = ["d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp"]
    sizes = {"batch": 2, "pos": 10, "q_pos": 10, "k_pos": 10, "1": 1}
    sizes |= {n: getattr(model, n) for n in dims}
    report_sites = [s for s in SITES if s not in ("pos_embed", "resid_mid")]
    _, cache = model.run_with_cache([TEXT, TEXT.replace("Paris", "Rome")], report_sites)
    for (site, layer), x in cache.items():
        assert x.shape == tuple(sizes[n] for n in SITES[site].shape.split()), site
        if layer is not None:
            assert cache[site].shape == (model.n_layers, *x.shape)


def test_the_stream_is_the_sum_of_what_was_written_to_it(model, record_property):
    _, cache = model.run_with_cache(TEXT, ["embed", "attn_out", "mlp_out", "resid_final"])
    total = cache["embed"].clone()
    if model.family == "gpt2":
        total += model.run_with_cache(TEXT, "pos_embed")[1]["pos_embed"]
    for layer in range(model.n_layers):
        total = total + cache["attn_out", layer] + cache["mlp_out", layer]
    gap = (total - cache["resid_final"]).abs().max().item()
    record_property("gap", gap)
    print(model.family, gap)
    assert gap == 0 if not model.parallel else near(total, cache["resid_final"])


def test_gemmas_configuration_catches_the_usual_mistakes(gemma):
    assert gemma.n_heads * gemma.d_head != gemma.d_model and gemma.n_kv_heads < gemma.n_heads
    _, cache = gemma.run_with_cache(TEXT, ["embed", "pattern"])
    ids = gemma.tokens(TEXT)
    assert torch.allclose(cache["embed"], gemma.W_E[ids] * 20**0.5)
    assert (cache["pattern", 0][..., 9, :7] == 0).all()  # a window of 3 counts the token itself
    assert (cache["pattern", 1][..., 9, :] > 0).all()
    raw = gemma.unembed(gemma.run_with_cache(ids, "resid_final")[1]["resid_final"], softcap=False)
    assert raw.abs().max() > 2 > gemma(ids).abs().max()
    assert torch.allclose(gemma(ids), 2 * torch.tanh(raw / 2))


def test_unembed_is_the_end_of_the_model(model):
    logits, cache = model.run_with_cache(TEXT, "resid_final")
    assert same(model.unembed(cache["resid_final"]), logits)
    raw = model.unembed(cache["resid_final"], softcap=False)
    assert torch.allclose(raw, model.ln_final(cache["resid_final"]) @ model.W_U, atol=1e-5)


def test_weights_do_what_the_modules_do(model):
    _, cache = model.run_with_cache(TEXT, ["resid_pre", "q", "k", "v", "z", "mlp_in", "post"])
    layer = 1
    x = model.part("ln1", layer)(cache["resid_pre", layer])
    for site, n in zip("qkv", (model.n_heads, model.n_kv_heads, model.n_kv_heads), strict=True):
        W = getattr(model, f"W_{site.upper()}")[layer]
        assert W.shape == (n, model.d_model, model.d_head)
        product = torch.einsum("bpd,hde->bphe", x, W)
        bias = (cache[site, layer] - product)[:, :1]
        assert near(product + bias, cache[site, layer]), site
    out = torch.einsum("bphe,hed->bpd", cache["z", layer], model.W_O[layer])
    whole = model.part("o", layer)(cache["z", layer].flatten(-2))
    assert near(out + (whole - out)[:, :1], whole)
    act = model.part("mlp", layer).act if not model.layout.w_gate else None
    pre = cache["mlp_in", layer] @ model.W_in[layer]
    if model.layout.w_gate:
        gate = model.part("mlp", layer).act_fn(cache["mlp_in", layer] @ model.W_gate[layer])
        assert torch.allclose(cache["post", layer], gate * pre, atol=1e-5)
    else:
        pre = pre + model.part("w_in", layer).bias
        assert torch.allclose(cache["post", layer], act(pre), atol=1e-5)
        with pytest.raises(ModelError, match="not gated"):
            _ = model.W_gate
    assert model.W_out.shape == (4, model.d_mlp, model.d_model)
    assert model.W_E.shape == (D_VOCAB, model.d_model) == model.W_U.T.shape


def test_norm_gain(model):
    ln = model.part("ln1", 0)
    x = torch.randn(3, model.d_model)
    unit = x - x.mean(-1, keepdim=True) if isinstance(ln, torch.nn.LayerNorm) else x
    unit = unit / (unit.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    bias = getattr(ln, "bias", None)
    want = unit * norm_gain(ln) + (0 if bias is None else bias)
    assert torch.allclose(ln(x), want, atol=1e-3)


# ----------------------------------------------------------------------------------- hooks


def test_every_site_can_be_changed(model):
    plain = model(TEXT)
    for site in parity_report(model):
        if site in SITES:
            key = site if site in ("embed", "pos_embed", "resid_final") else (site, 1)
            noise = torch.Generator().manual_seed(0)
            with model.hooks({key: lambda x, g=noise: x + torch.randn(x.shape, generator=g)}):
                assert (model(TEXT) - plain).abs().max() > 1e-3, site
    assert same(model(TEXT), plain)


def test_a_change_is_what_later_sites_see(model):
    """resid_mid feeds the norm and the residual branch; q changes q alone, and so on."""
    sites = ["q", "k", "v", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    ones = torch.ones(1, 10, model.d_model)
    if not model.parallel:
        _, plain = model.run_with_cache(TEXT, ["resid_mid"])
        mid = plain["resid_mid", 1] + ones
        with model.hooks({("resid_mid", 1): lambda x: x + ones}):
            _, cache = model.run_with_cache(TEXT, sites + ["resid_mid"])
        assert same(cache["resid_mid", 1], mid)
        assert same(cache["mlp_in", 1], model.part("ln2", 1)(mid))
        assert same(cache["resid_post", 1], mid + cache["mlp_out", 1])
    _, plain = model.run_with_cache(TEXT, sites)
    with model.hooks({("k", 1): lambda k: k * 2}):
        _, cache = model.run_with_cache(TEXT, sites)
    assert same(cache["k", 1], plain["k", 1] * 2)
    assert same(cache["q", 1], plain["q", 1]) and same(cache["v", 1], plain["v", 1])
    assert not same(cache["attn_out", 1], plain["attn_out", 1])


def test_a_pattern_hook_changes_what_is_mixed(model):
    """A uniform causal pattern makes z the running mean of the values."""

    def uniform(pattern):
        mask = torch.ones_like(pattern).tril()
        return mask / mask.sum(-1, keepdim=True)

    with model.hooks({("pattern", 1): uniform}):
        _, cache = model.run_with_cache(TEXT, ["pattern", "v", "z"])
    v, z = cache["v", 1], cache["z", 1]
    mean = v.cumsum(1) / torch.arange(1, 11)[:, None, None]
    for head in range(model.n_heads):
        group = model.n_heads // model.n_kv_heads
        assert torch.allclose(z[:, :, head], mean[:, :, head // group], atol=1e-5)
    assert model.config._attn_implementation == "eager" and not hooks._pattern_hooks


def test_hooks_nest_and_run_in_order(gemma):
    plain = gemma(TEXT)
    seen = []
    with gemma.hooks({("z", 0): lambda z: z + 1, "pattern": lambda p: p * 1}):
        with gemma.hooks({("z", 0): lambda z: seen.append(z), ("z", 1): lambda z: z * 0}):
            inner = gemma(TEXT)
        outer = gemma(TEXT)
        assert gemma.config._attn_implementation == "mi_eager"
        _, cache = gemma.run_with_cache(TEXT, [("z", 0)])
    assert same(seen[0], cache["z", 0])
    assert not same(inner, outer) and not same(outer, plain)
    assert same(gemma(TEXT), plain)


def test_hooks_get_copies(gemma):
    plain, cache = gemma.run_with_cache(TEXT, ["resid_post"])
    kept = cache["resid_post"].clone()

    def spoil(x):
        x.zero_()

    with gemma.hooks(dict.fromkeys(["resid_pre", "resid_mid", "q", "pattern"], spoil)):
        again, spoiled = gemma.run_with_cache(TEXT, ["resid_post"])
    assert same(again, plain) and same(spoiled["resid_post"], kept)


def test_hooks_are_always_taken_away(model):
    plain, before = model(TEXT), hook_count(model)
    sites = {("z", 0): lambda z: z * 0, ("pattern", 1): lambda p: p * 0, "embed": lambda x: x * 2}

    def boom(_):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), model.hooks(sites | {("z", 3): boom}):
        model(TEXT)
    with pytest.raises(ModelError), model.hooks(sites | {("zz", 3): boom}):
        pass
    with (
        pytest.raises(RuntimeError, match="boom"),
        model.hooks({("mlp_out", 1): boom}),
    ):
        model.run_with_cache(TEXT, ["pattern", "resid_post"], stop_at_layer=2)

    def steps():
        with model.hooks(sites):
            yield model(TEXT)

    generator = steps()
    assert not same(next(generator), plain)
    generator.close()
    assert hook_count(model) == before and not model.hooked
    assert len(list(model.blocks)) == 4 and not any(
        isinstance(b, hooks._Skip) for b in model.blocks
    )
    assert model.config._attn_implementation == "eager" and not hooks._pattern_hooks
    assert same(model(TEXT), plain)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2", "gpt_neox_sequential"])
def test_gradients_flow_through_hooks(family):
    """Attribution: the gradient at a site agrees with a finite difference, in float64."""
    double = LanguageModel(build(family).double(), make_tokenizer())
    ids = double.tokens(TEXT)
    for site in ("resid_mid", "z", "pattern", "mlp_out"):
        x = double.run_with_cache(ids, [(site, 1)])[1][site, 1].requires_grad_()
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

        def score(value, key=(site, 1)):
            with double.hooks({key: lambda _: value}):
                return double(ids)[0, -1, 5]

        (gradient,) = torch.autograd.grad(score(x), x)
        with torch.no_grad():
            slope = (score(x + 1e-3 * direction) - score(x - 1e-3 * direction)) / 2e-3
        assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-3), site
    assert not any(p.requires_grad for p in double.hf.parameters())


# ----------------------------------------------------------------------- partial runs, cache


def test_stopping_early_runs_no_later_block(model):
    logits, whole = model.run_with_cache(TEXT, ["resid_pre", "z", "resid_post"])
    ran = []
    handles = [
        b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)
    ]
    handles.append(model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head")))
    none, cache = model.run_with_cache(TEXT, ["resid_pre", "z", "resid_post"], stop_at_layer=2)
    _, embed = model.run_with_cache(TEXT, "embed", stop_at_layer=0)
    for handle in handles:
        handle.remove()
    assert none is None and logits is not None and ran == [0, 1]
    assert len(cache) == 6 and len(embed) == 1
    assert all(same(cache[key], whole[key]) for key in cache)


def test_a_stopped_first_run_leaves_hugging_face_intact():
    """Hugging Face sets its own recording hooks on the modules that it finds, once."""
    hf = build("gemma2")
    LanguageModel(hf).run_with_cache([3, 4, 5], stop_at_layer=1)
    out = hf(torch.tensor([[3, 4, 5]]), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4


def test_going_on_from_a_layer(model):
    logits, cache = model.run_with_cache(TEXT, ["resid_pre", "resid_post"])
    other = model.run_with_cache(TEXT.replace("Paris", "Rome"), ["resid_pre"])[1]
    for layer in range(model.n_layers):
        resid = cache["resid_pre", layer]
        assert same(model.run_from_layer(resid, layer), logits)
        if layer + 1 < model.n_layers:
            assert same(model.run_from_layer(resid, 0, 1), model.run_from_layer(resid, 0, 1))
            onward = model.run_from_layer(resid, layer, stop_at_layer=layer + 1)
            assert same(onward, cache["resid_post", layer])
    assert same(model.run_from_layer(cache["resid_post", -1], model.n_layers), logits)
    assert same(model.run_from_layer(cache["resid_pre", 2], 2, 2), cache["resid_pre", 2])
    batch = torch.cat([cache["resid_pre", 2], other["resid_pre", 2], cache["resid_pre", 2]])
    many = model.run_from_layer(batch, 2)
    assert near(many[:1], logits) and near(many[2], many[0])
    assert not torch.allclose(many[1], many[0], atol=1e-3)


def test_going_on_respects_hooks_from_there_on(gemma):
    logits, cache = gemma.run_with_cache(TEXT, ["resid_pre"])
    seen = []
    fns = {(s, i): lambda x, k=(s, i): seen.append(k) for s in ("resid_pre", "z") for i in range(4)}
    with gemma.hooks(fns):
        assert same(gemma.run_from_layer(cache["resid_pre", 2], 2), logits)
    assert seen == [("resid_pre", 2), ("z", 2), ("resid_pre", 3), ("z", 3)]
    with gemma.hooks({("resid_pre", 2): lambda x: cache["resid_pre", 2]}):
        assert same(gemma.run_from_layer(cache["resid_pre", 2] * 3, 2), logits)


def test_positions(gemma):
    _, whole = gemma.run_with_cache(TEXT, ["resid_post", "pattern"])
    for pos in (-1, 4, torch.tensor(4), slice(2, 5), [0, 3, -2], torch.tensor([2, 3])):
        _, cache = gemma.run_with_cache(TEXT, ["resid_post", "pattern"], pos=pos)
        assert same(cache["resid_post", 2], whole["resid_post", 2][:, pos])
        assert same(cache["pattern", 2], whole["pattern", 2][:, :, pos])
    assert gemma.run_with_cache(TEXT, ["resid_post"], pos=-1)[1]["resid_post"].shape == (4, 1, 20)


def test_the_cache(gemma):
    _, cache = gemma.run_with_cache(TEXT)
    assert {name for name, _ in cache} == {"embed", "attn_out", "mlp_out", "resid_post"}
    assert same(cache["resid_post", -1], cache["resid_post", 3])
    assert same(cache["resid_post"][1], cache["resid_post", 1])
    alone = [gemma.run_with_cache(TEXT, site)[1] for site in ("z", ("z", 1), ["z"])]
    assert [len(c) for c in alone] == [4, 1, 4]
    assert ("embed" in cache, ("z", 1) in cache, 3 in cache) == (True, False, False)
    with pytest.raises(ModelError, match=r"no \('z', 1\); it holds attn_out, embed"):
        cache["z", 1]


# --------------------------------------------------------------------------- text and tokens


def test_tokens(gemma):
    ids = gemma.tokens("The cat sat")
    assert ids.dtype == torch.int64 and ids.shape == (1, 4) and ids[0, 0] == 2
    assert gemma.str_tokens("The cat sat") == ["<bos>", "The", " cat", " sat"]
    assert gemma.str_tokens(ids) == gemma.str_tokens(ids[0].tolist())
    assert same(gemma.tokens("The cat sat", prepend_bos=False), ids[:, 1:])
    assert same(gemma.tokens("<bos>The cat sat"), ids)
    assert gemma.str_tokens([gemma.to_single_token(" Paris")]) == [" Paris"]
    padded = gemma.tokens(["The cat sat", "The cat"], pad=True)
    assert padded.tolist()[1][2:] == [ids[0, 2].item(), 0]
    assert near(gemma(padded)[1, :3], gemma("The cat")[0])


def test_rows_are_padded_with_a_token_that_the_model_has():
    model = LanguageModel(build("llama"), make_tokenizer())
    rows = [[4, 5, 6], torch.tensor([7])]
    assert (
        model.pad(rows).tolist() == [[4, 5, 6], [7, 0, 0]] and model.pad(rows).dtype == torch.int64
    )
    model.tokenizer.add_special_tokens({"pad_token": "<added>"})  # its id is behind the last row
    model.tokenizer.pad_token_id = D_VOCAB
    assert model.pad(rows).tolist() == [[4, 5, 6], [7, 1, 1]]
    assert LanguageModel(model.hf).pad(rows).tolist() == [[4, 5, 6], [7, 0, 0]]


def test_loss(gemma):
    ids = gemma.tokens([TEXT, TEXT.replace("Paris", "Rome")])
    p = gemma(ids).softmax(-1)
    assert gemma.loss(ids).shape == (2, 9)
    assert torch.isclose(gemma.loss(ids)[1, 8], -p[1, 8, ids[1, 9]].log())


def test_generate(model):
    text = model.generate("The cat", 5)
    ids = model.tokens("The cat")
    for _ in range(5):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == 1:
            break
    assert text == model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("The cat")
    with model.hooks({"embed": lambda x: None}):
        assert model.generate("The cat", 5) == text
    sampled = [model.generate("The cat", 6, temperature=3.0, seed=s) for s in (0, 0, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


def test_generate_shows_hooks_the_whole_text(gemma):
    lengths = []
    with gemma.hooks({"embed": lambda x: lengths.append(x.shape[1])}):
        gemma.generate("The cat", 3, temperature=1.0, seed=0)
    assert lengths == [3, 4, 5]


def test_generate_stops_at_the_end_token(gemma):
    with gemma.hooks({"resid_final": lambda x: gemma.W_E[1].expand_as(x) * 100}):
        assert gemma.generate("The cat", 5) == "The cat"


# -------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.run_with_cache(TEXT, ["resid_pots"]), "Did you mean 'resid_post'"),
        (lambda m: m.run_with_cache(TEXT, ["pos_embed"]), "positions are rotary"),
        (lambda m: m.run_with_cache(TEXT, [("z", 4)]), "layer from 0 to 3, not 4"),
        (lambda m: m.run_with_cache(TEXT, [("embed", 0)]), "belongs to no layer"),
        (lambda m: m.run_with_cache(TEXT, [("z", 2)], stop_at_layer=2), "not reached"),
        (lambda m: m.run_with_cache(TEXT, ["resid_final"], stop_at_layer=2), "not reached"),
        (lambda m: m.run_with_cache(TEXT, stop_at_layer=5), "out of range"),
        (lambda m: m.run_with_cache(TEXT, pos=10), "from 0 to 9"),
        (lambda m: m.run_with_cache(TEXT, pos=[0, -11]), "from 0 to 9"),
        (lambda m: m.hooks({("z", 1): 3}).__enter__(), "is a int, not a function"),
        (lambda m: m.tokens(""), "is empty"),
        (lambda m: m.tokens([]), "is empty"),
        (lambda m: m.tokens(["The cat", "The cat sat"]), "pass pad=True"),
        (lambda m: m("The" + " cat" * 16), "more than .* context of 16"),
        (lambda m: m.generate("The cat", 14), "exceed the context"),
        (lambda m: m([0, D_VOCAB]), "Token id 48 is out of range"),
        (lambda m: m(torch.tensor([-1])), "Token id -1 is out of range"),
        (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), "at least one token"),
        (lambda m: m(torch.zeros(1, 3)), "are integers"),
        (lambda m: m.loss([5]), "at least two tokens"),
        (lambda m: m.to_single_token(" Paris Rome"), "is 2 tokens"),
        (lambda m: m.to_single_token(" Oslo"), "not in .* vocabulary"),
        (lambda m: m.str_tokens([TEXT, TEXT]), "one text at a time"),
        (lambda m: m.run_from_layer(torch.zeros(1, 3, 7), 1), r"of shape \(batch, pos, 20\)"),
        (lambda m: m.run_from_layer(torch.zeros(1, 3, 20), 2, 1), "Cannot stop at layer 1"),
        (lambda m: m.part("mpl", 0), "Did you mean 'mlp'"),
        (lambda m: m.weight("W_X", 0), "no weight 'W_X'"),
    ],
)
def test_refusals(gemma, call, message):
    with pytest.raises(ModelError, match=message) as caught:
        call(gemma)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [lambda z: z[:, 1:], lambda z: z.flatten(-2), lambda z: 3])
def test_a_hook_of_the_wrong_shape(model, wrong):
    with model.hooks({("z", 1): wrong}), pytest.raises(ModelError, match=r"hook at \('z', 1\)"):
        model(TEXT)


def test_parallel_blocks_have_no_resid_mid(loaded):
    with pytest.raises(ModelError, match="in parallel"):
        loaded["gpt_neox"].run_with_cache(TEXT, ["resid_mid"])


def test_a_model_without_tokenizer():
    bare = LanguageModel(build("llama"))
    assert bare([3, 4]).shape == (1, 2, D_VOCAB) and bare.name == "llama"
    with pytest.raises(ModelError, match="no tokenizer"):
        bare("The cat")


# --------------------------------------------------------------------------------- loading


def test_default_is_the_environment_then_tiny_gemma(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("MI_MODEL", str(folders["gpt2"]))
    assert load_model().family == "gpt2"
    monkeypatch.delenv("MI_MODEL")
    monkeypatch.setitem(loading.SHIPPED, "tiny-gemma", tmp_path / "tiny_gemma")
    with pytest.raises(ModelError, match="tiny-gemma is not at .*tiny_gemma"):
        load_model()
    (tmp_path / "tiny_gemma").symlink_to(folders["gemma2"])
    model = load_model()
    assert (model.name, model.family, model.dtype) == ("tiny-gemma", "gemma2", torch.float32)


def test_dtype_and_modes(folders):
    model = load_model(folders["gemma2"], dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and model(TEXT).dtype == torch.bfloat16
    assert model.device.type == "cpu" and not model.hf.training
    assert model.config._attn_implementation == "eager"
    report = parity_report(model)
    assert all(gap == 0 for gaps in report.values() for gap in gaps.values())


def test_built_with_another_attention_it_is_made_eager():
    hf = build("llama")
    hf.set_attn_implementation("sdpa")
    assert LanguageModel(hf).run_with_cache([3, 4, 5], ["pattern"])[1]["pattern", 0] is not None


def change_folder(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_folders_that_cannot_be_loaded(folders, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(tmp_path / "none")
    with pytest.raises(ModelError, match="no config.json"):
        load_model(tmp_path)
    folder = change_folder(folders["gemma2"], tmp_path)
    weights = {n: w.clone() for n, w in load_file(folder / "model.safetensors").items()}
    (folder / "tokenizer.json").rename(folder / "kept.json")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(folder)
    (folder / "kept.json").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes(b"not a weight")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(folder)
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights: .*layers.1.mlp.up_proj"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(folder)
    torch.save({"w": gone}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="never unpickled"):
        load_model(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(ModelError, match="'bloom', which is not in the table; known families"):
        load_model(folder)


def response(status):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (lambda: hub.GatedRepoError("gated", response=response(403)), "accept its licence"),
        (lambda: hub.RepositoryNotFoundError("no", response=response(404)), "There is no model"),
        (lambda: hub.LocalEntryNotFoundError("no"), "cannot be reached"),
        (lambda: hub.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (lambda: ValueError("odd"), "could not be loaded: in its config.json: outer"),
    ],
)
def test_what_the_hub_says(monkeypatch, cause, message):
    def fail(*args, **kwargs):
        raise OSError("outer.\nmany\nlines") from cause()

    monkeypatch.setattr(loading, "check_download", lambda repo: None)
    monkeypatch.setattr(loading, "cached_file", fail)
    with pytest.raises(ModelError, match=message) as caught:
        load_model("google/gemma-2-2b")
    assert "google/gemma-2-2b" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_offline_for_real(monkeypatch, tmp_path):
    """Through transformers' and the hub's own code, with the hub switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be reached"):
        load_model("nobody/nothing-at-all")


# --------------------------------------------------------- meta models and the architecture map


def test_gemma2_2b_without_weights():
    model = empty_gemma2_2b()
    assert model.n_parameters == 2_614_341_888
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (26, 2304, 8, 4)
    assert (model.d_head, model.d_mlp, model.d_vocab, model.n_ctx) == (256, 9216, 256_000, 8192)
    rows = architecture(model)
    assert sum(row.parameters for row in rows) == 2_614_341_888
    assert rows[0].parameters == 589_824_000 and rows[0].weights == {"weight": (256_000, 2304)}
    with pytest.raises(ModelError, match=r"materialize\(model\)"):
        model([1, 2, 3])


def test_architecture_counts_every_parameter_once(model):
    rows = architecture(model)
    assert sum(row.parameters for row in rows) == model.n_parameters
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert names[0] == "embed" and names.index("ln_final") < names.index("unembed")
    for row in rows:
        assert row.activation[:2] == ("batch", "pos") and row.does and row.module


def test_architecture_of_a_gemma_block(gemma):
    rows = [row for row in architecture(gemma) if row.name.startswith("blocks.0.")]
    order = ["ln1", "q", "k", "v", "rotary", "attn", "o", "ln1_post"]
    order += ["ln2", "gate", "in", "out", "ln2_post"]
    assert [row.name.removeprefix("blocks.0.") for row in rows] == order
    by_name = {row.name.removeprefix("blocks.0."): row for row in rows}
    assert by_name["k"].weights == {"weight": (12, 20)}
    assert by_name["k"].activation == ("batch", "pos", 2, 6)
    assert "last 3 tokens" in by_name["attn"].does and by_name["attn"].parameters == 0
    assert architecture(gemma)[-1].name == "softcap"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama", "gpt2", "gpt_neox"])
def test_materialize(family):
    """A meta model, materialised, given a normal model's weights: the same logits."""
    normal = build(family)
    model, again = (materialize(build_empty(family), seed=3) for _ in range(2))
    ids = model.tokens(TEXT)
    random = model(ids)
    assert random.isfinite().all() and model.n_parameters == sum(
        p.numel() for p in normal.parameters()
    )
    assert same(again(ids), random)
    model.hf.load_state_dict(normal.state_dict())
    assert same(model(ids), normal.eval()(ids).logits)


def test_materialize_in_bf16_keeps_rotary_in_float32():
    model = materialize(build_empty("gemma2"), torch.bfloat16)
    with pytest.raises(ModelError, match="has weights already"):
        materialize(model)
    assert model.dtype == torch.bfloat16
    assert model.decoder.rotary_emb.inv_freq.dtype == torch.float32
    assert model.W_E.data_ptr() == model.lm_head.weight.data_ptr()


def test_an_untrained_model_has_the_shape_and_other_weights(gemma):
    blank, again, other = (untrained(gemma, seed) for seed in (0, 0, 1))
    shapes = [[tuple(p.shape) for p in m.hf.parameters()] for m in (blank, gemma)]
    assert shapes[0] == shapes[1] and blank.dtype == gemma.dtype
    assert blank.W_E.data_ptr() == blank.lm_head.weight.data_ptr()
    assert torch.equal(blank.W_E, again.W_E) and not torch.equal(blank.W_E, other.W_E)
    assert gemma.hf.config is not blank.hf.config
    assert blank(torch.tensor([[2, 5, 6]])).isfinite().all()


# ---------------------------------------------------------------------------- tokens of text


def test_every_token_but_padding_and_unknown_is_in_tinyworlds_text():
    tiny = load_model("tiny-gemma")
    special = [tiny.tokenizer.pad_token_id, tiny.tokenizer.unk_token_id]
    assert (~tiny.in_text).nonzero()[:, 0].tolist() == sorted(special)


def test_a_token_that_is_also_an_end_of_text_stays(gemma):
    never = {gemma.tokenizer.pad_token_id, gemma.tokenizer.unk_token_id}
    assert set((~gemma.in_text).nonzero()[:, 0].tolist()) == never
    fresh = LanguageModel(gemma.hf, make_tokenizer())
    fresh.tokenizer.pad_token = fresh.tokenizer.unk_token = fresh.tokenizer.eos_token
    assert fresh.in_text.all() and len(fresh.in_text) == fresh.d_vocab
    assert LanguageModel(gemma.hf, None).in_text.all()


# ------------------------------------------------------------ tokenizers that hide a token's space


def sentencepiece(scheme):
    """A small tokenizer as Llama 2 ("always", by its normalizer) and Mistral 0.1 ("first") have."""
    words = ["▁", "▁The", "▁cat", "cat", "▁▁", "The", "s", "▁sat", "\n", "."]
    vocab = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *words, *"Thecatsa"]
    scores = [(piece, -float(10 - len(piece))) for piece in dict.fromkeys(vocab)]
    made = Tokenizer(Unigram(scores, 0, byte_fallback=True))
    if scheme == "always":
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    made.decoder = decoders.Sequence(steps)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_token_keeps_its_space(scheme):
    """decode([id]) gives "cat" for "▁cat": the decoder drops a text's first space."""
    tokenizer = sentencepiece(scheme)
    of = tokenizer.convert_tokens_to_ids
    assert tokenizer.decode([of("▁cat")]) == tokenizer.decode([of("cat")]) == "cat"
    model = LanguageModel(build("llama", vocab_size=300), tokenizer)
    assert model.str_tokens("The cat sat") == ["<s>", " The", " cat", " sat"]
    assert model.str_tokens([of("▁▁"), of("cat"), of("<0x20>")]) == ["  ", "cat", " "]
    assert "".join(model.str_tokens("The cats")[1:]) == " The cats"
    assert model.to_single_token(" cat") == of("▁cat")
    assert model.to_single_token("cat") == of("cat")
    with pytest.raises(ModelError, match=r"is 2 tokens, \[' The', ' cat'\]"):
        model.to_single_token("The cat")


def test_other_tokenizers_texts_are_what_they_decode_to():
    for tokenizer in (make_tokenizer(), load_model().tokenizer):
        for i in range(len(tokenizer)):
            assert token_text(tokenizer, i) == tokenizer.decode([i]), i
