"""Attribution graphs and interventions: by hand on two layers of two units, against autograd on
random models of each family, and on tiny-gemma with random transcoders."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mi_helpers.circuits import edges
from mi_helpers.circuits.edges import attribution_graph, pick_logits
from mi_helpers.circuits.graphs import EMBEDDING, ERROR, FEATURE, LOGIT, Node
from mi_helpers.circuits.interventions import intervene, predicted_effect
from mi_helpers.circuits.replacement import FrozenNorm, LocalReplacement, Transcoders
from mi_helpers.layouts import ModelError
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder

TEXT = "the capital of the country of the Colosseum is the city that people visit"
IDS = [2, 9, 4, 9, 7, 11, 4, 20, 3]
COMMON = {
    "vocab_size": 48,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA = COMMON | {"query_pre_attn_scalar": 6, "sliding_window": 3}
SQUARE = {k: v for k, v in COMMON.items() if k not in ("head_dim", "num_key_value_heads")}
CONFIGS = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama": COMMON,
    "qwen2": {k: v for k, v in COMMON.items() if k != "head_dim"} | {"hidden_size": 32},
    "gpt2": {k: v for k, v in SQUARE.items() if k != "intermediate_size"} | {"n_inner": 24},
    "gpt_neox": SQUARE | {"rotary_pct": 0.5, "use_parallel_residual": True},
    "gpt_neox sequential": SQUARE | {"rotary_pct": 0.5, "use_parallel_residual": False},
}
CONFIGS["gemma3_text"]["layer_types"] = CONFIGS["gemma3_text"]["layer_types"][:3]


class Bos:
    """All that a graph of ids asks of a tokenizer."""

    bos_token_id = 2

    def decode(self, ids, **_kwargs):
        return f"<{ids[0]}>"

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


def build(family: str) -> LanguageModel:
    """A tiny random model; norms and biases are random too, so that errors show."""
    config = AutoConfig.for_model(family.split()[0], **CONFIGS[family])
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return LanguageModel(hf, Bos(), family)


def random_coder(d, n=40, seed=0, activation="relu", k=None, skip=False):
    coder = SparseCoder(d, n, d, activation, k, skip)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in coder.named_parameters():
            size = 0.3 if name in ("b_enc", "b_dec", "W_skip") else 1.0
            p.copy_(size * torch.randn(p.shape, generator=rng) / d**0.5)
        if hasattr(coder, "threshold"):
            coder.threshold.abs_()
    return coder


def random_coders(model, **kwargs):
    """One of each kind, layer by layer: ReLU, TopK, JumpReLU; two with a skip path."""
    kinds = (
        {"skip": True},
        {"activation": "topk", "k": 5},
        {"activation": "jumprelu", "skip": True},
    )
    return [
        random_coder(model.d_model, seed=i, **(kinds[i % 3] | kwargs))
        for i in range(model.n_layers)
    ]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def gemma():
    return build("gemma2")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-gemma")


# ------------------------------------------------------------------------------------- by hand


def two_layers():
    """Llama, 2 layers, d_model 2, one head; MLPs write nothing, layer 0's attention neither.

    Tokens 0 and 1 embed as (1, 1), with a root mean square of 1, and (1, 7), with one of 5.
    Layer 1 attends evenly and writes diag(10, -5) · the mean of the normed stream:
    position 1 gets (10, -5) · ½((1, 1) + (0.2, 1.4)) = (6, -6), so its stream becomes (7, 1).
    """
    config = AutoConfig.for_model(
        "llama",
        vocab_size=3,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        rms_norm_eps=0.0,
        max_position_embeddings=8,
        tie_word_embeddings=False,
    )
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        hf.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1], [1, 7], [0, 0]]))
        hf.model.layers[1].self_attn.v_proj.weight.copy_(torch.eye(2))
        hf.model.layers[1].self_attn.o_proj.weight.copy_(torch.diag(torch.tensor([10.0, -5])))
        hf.lm_head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 2]]))
    return LanguageModel(hf, None, "by hand")


def hand_coder(encoder, b_enc, decoder, b_dec):
    """Two latents: the one given, and one that never fires."""
    coder = SparseCoder(2, 2, 2, "relu")
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([encoder, [0.0, 0.0]]).T)
        coder.b_enc.copy_(torch.tensor([b_enc, -1.0]))
        coder.W_dec.copy_(torch.tensor([decoder, [9.0, 9.0]]))
        coder.b_dec.copy_(torch.tensor(b_dec))
    return coder


def test_a_graph_worked_out_by_hand():
    """Layer 0's latent reads x + y - 0.6: 1.4 at position 0, 1.0 at position 1, and writes (2, 1)
    times that; with b_dec = (0, 1) the errors are (-2.8, -2.4) and (-2, -2).

    Layer 1's latent reads 5y of (7, 1) / 5, + 0.5: 1.5 at position 1. In terms of the stream
    (x_p, y_p) after layer 0: y_1 - ½·5·(y_0 + y_1 / 5) = 0.5 y_1 - 2.5 y_0.
    It writes (0, 2) · 1.5 = (0, 3); with b_dec = (1, 0) the error is (-1, -3).

    Token 0's logit less the mean is (1, -1) · stream / 5 at position 1, in terms of the stream
    after layer 0: x_0 + 0.4 x_1 + 0.5 y_0 - 0.1 y_1.
    """
    model = two_layers()
    coders = [
        hand_coder([1.0, 1.0], -0.6, [2.0, 1.0], [0.0, 1.0]),
        hand_coder([0.0, 5.0], 0.5, [0.0, 2.0], [1.0, 0.0]),
    ]
    graph = attribution_graph(model, coders, [0, 1], targets=[0])
    assert [n.id for n in graph.nodes] == (
        "E_0_0 E_1_1 0_0_0 0_0_1 0_-1_0 0_-1_1 1_0_1 1_-1_0 1_-1_1 3_0_1".split()
    )
    edges = {
        "0_0_0": {"E_0_0": 2.0},
        "0_0_1": {"E_1_1": 1.6},
        "1_0_1": {"E_0_0": -2.5, "E_1_1": 3.5, "0_0_0": -3.5, "0_0_1": 0.5, "0_-1_0": 6.0,
                  "0_-1_1": -1.0},
        "3_0_1": {"E_0_0": 1.5, "E_1_1": -0.3, "0_0_0": 3.5, "0_0_1": 0.7, "0_-1_0": -4.0,
                  "0_-1_1": -0.6, "1_0_1": -0.6, "1_-1_1": 0.4},
    }  # fmt: skip
    expected = torch.zeros(10, 10)
    for target, sources in edges.items():
        for source, weight in sources.items():
            expected[graph.index(target), graph.index(source)] = weight
    assert torch.allclose(graph.adjacency, expected, atol=1e-5)
    bias = {"0_0_0": -0.6, "0_0_1": -0.6, "1_0_1": -1.5, "3_0_1": 0.6}
    value = {"0_0_0": 1.4, "0_0_1": 1.0, "1_0_1": 1.5, "3_0_1": 1.2}
    for name in value:
        assert float(graph.bias[graph.index(name)]) == pytest.approx(bias[name], abs=1e-5)
        assert graph.value(name) == pytest.approx(value[name], abs=1e-5)
    # logits 1.4, 0.2, -1.0
    p = torch.softmax(torch.tensor([1.4, 0.2, -1.0]), 0)
    assert graph.probabilities.tolist() == pytest.approx([float(p[0])])
    assert graph.edge_error.absolute < 1e-5


def test_an_intervention_worked_out_by_hand():
    """Switching off layer 0's latent at position 1 takes (2, 1) from the stream there: (-1, 6).

    Directly, the logits less their mean lose 0.7 and the latent of layer 1 loses 0.5.
    """
    model = two_layers()
    coders = [
        hand_coder([1.0, 1.0], -0.6, [2.0, 1.0], [0.0, 1.0]),
        hand_coder([0.0, 5.0], 0.5, [0.0, 2.0], [1.0, 0.0]),
    ]
    result = intervene(model, coders, [0, 1], {"0_0_1": 0}, effects="direct")
    change = result.uncapped_after - result.uncapped_before
    assert float((change - change.mean())[0]) == pytest.approx(-0.7, abs=1e-5)
    assert result.feature("1_0_1") == pytest.approx((1.5, 1.0), abs=1e-5)
    assert result.feature("0_0_1") == pytest.approx((1.0, 0.0), abs=1e-5)


# ----------------------------------------------------------------------- the frozen model is right


def test_frozen_norms_are_the_norms(model):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, model.d_model, generator=rng)
    g = torch.randn(7, model.d_model, generator=rng)
    for part in ("ln1", "ln1_post", "ln2"):
        module = model.part(part, 1)
        if module is not None:
            norm = FrozenNorm.of(module, x)
            assert torch.allclose(norm(x), module(x), atol=1e-5)
            y = x.clone().requires_grad_()
            (wanted,) = torch.autograd.grad((g * norm(y)).sum(), y)
            assert torch.allclose(norm.backward(g), wanted, atol=1e-5)
            assert torch.allclose(norm.backward(g[2:4], torch.tensor([2, 3])), wanted[2:4])


def test_frozen_attention_writes_what_attention_writes(model):
    local = LocalReplacement(model, random_coders(model), IDS)
    _, cache = model.run_with_cache([IDS], ["attn_out", "resid_pre"])
    for layer in range(model.n_layers):
        out = local.attend(layer, cache["resid_pre", layer][0])
        assert torch.allclose(out, cache["attn_out", layer][0], atol=1e-4)


def test_nodes_are_what_they_should_be(gemma):
    graph = attribution_graph(gemma, random_coders(gemma), IDS, targets=[5, 30])
    kinds = {kind: int(graph.mask(kind).sum()) for kind in (EMBEDDING, ERROR, LOGIT)}
    assert kinds == {EMBEDDING: 9, ERROR: 3 * 8, LOGIT: 2}  # no errors at <bos>
    assert all(n.position > 0 for n in graph.nodes if n.kind in (FEATURE, ERROR))
    with_bos = attribution_graph(gemma, random_coders(gemma), IDS, targets=[5], bos_is_bias=False)
    assert int(with_bos.mask(ERROR).sum()) == 3 * 9
    assert any(n.position == 0 for n in with_bos.nodes if n.kind == FEATURE)
    # <bos> as bias: what its features and errors gave is in the bias, other edges are the same
    for node in graph.features()[:5]:
        i, j = graph.index(node), with_bos.index(node)
        early = [n for n in with_bos.nodes if n.position == 0 and n.kind != EMBEDDING]
        moved = sum(with_bos.edge(n, node) for n in early)
        assert float(graph.bias[i]) == pytest.approx(float(with_bos.bias[j]) + moved, abs=1e-4)
        assert graph.edge("E_2_0", node) == pytest.approx(with_bos.edge("E_2_0", node), abs=1e-5)
    values, latents = (
        random_coders(gemma)[0]
        .encode(LocalReplacement(gemma, random_coders(gemma), IDS).inputs[0])
        .max(-1)
    )
    assert graph.value(f"0_{latents[3]}_3") == pytest.approx(values[3].item(), abs=1e-5)


@pytest.mark.parametrize("bos_is_bias", [True, False])
def test_edges_sum_exactly_and_both_methods_agree(model, bos_is_bias, record_property):
    """The claim of the whole module: value = Σ edges + bias, to 1e-4, relative and absolute."""
    options = {"bos_is_bias": bos_is_bias, "targets": [5, 30, 8]}
    graph = attribution_graph(model, random_coders(model), IDS, **options)
    record_property("edge error", str(graph.edge_error))
    assert graph.edge_error.absolute < 1e-4
    assert graph.edge_error.scaled < 1e-5
    assert (graph.mask(FEATURE).sum() > 100) and (graph.adjacency != 0).sum() > 5_000
    other = attribution_graph(model, random_coders(model), IDS, method="backward", **options)
    assert torch.allclose(graph.adjacency, other.adjacency, atol=1e-4, rtol=1e-4)
    assert torch.allclose(graph.bias, other.bias, atol=1e-4, rtol=1e-4)


def test_a_logit_sums_to_the_models_own_less_the_mean(model):
    graph = attribution_graph(model, random_coders(model), IDS, targets=[5, 30])
    logits = model([IDS])[0, -1]
    if model.softcap:
        logits = torch.atanh(logits / model.softcap) * model.softcap
    wanted = (logits - logits.mean())[[5, 30]]
    sums = (graph.adjacency.sum(1) + graph.bias)[graph.mask(LOGIT)]
    assert torch.allclose(sums, wanted, atol=2e-4)


def test_a_transcoder_of_the_normalised_stream(gemma):
    """Gemma Scope's: the norm without its gain. The same function, with the gain in W_enc."""
    gain = [1.0 + gemma.part("ln2", i).weight for i in range(3)]
    inner = [random_coder(20, seed=i, activation="topk", k=6, skip=True) for i in range(3)]
    outer = [random_coder(20, seed=i, activation="topk", k=6, skip=True) for i in range(3)]
    with torch.no_grad():
        for coder, g in zip(outer, gain, strict=True):
            coder.W_enc.mul_(g[:, None])
            coder.W_skip.mul_(g)
            coder.metadata["hook_name"] = "blocks.0.ln2.hook_normalized"
    one = attribution_graph(gemma, inner, IDS, targets=[5])
    two = attribution_graph(gemma, outer, IDS, targets=[5])
    three = attribution_graph(gemma, Transcoders(outer, "normalised"), IDS, targets=[5])
    assert one.nodes == two.nodes == three.nodes
    assert torch.allclose(one.adjacency, two.adjacency, atol=1e-5)
    assert torch.equal(two.adjacency, three.adjacency)
    other = attribution_graph(gemma, Transcoders(outer, "mlp_in"), IDS, targets=[5])
    assert one.nodes != other.nodes


def test_scales_of_training_are_folded_in(gemma):
    coders = random_coders(gemma, activation="relu")
    scaled = random_coders(gemma, activation="relu")
    for coder in scaled:
        coder.scale_in.fill_(0.5)
        coder.scale_out.fill_(2.0)
    plain = attribution_graph(gemma, [c.folded() for c in scaled], IDS, targets=[5])
    graph = attribution_graph(gemma, scaled, IDS, targets=[5])
    assert torch.equal(graph.adjacency, plain.adjacency) and graph.edge_error.absolute < 1e-4
    assert graph.nodes != attribution_graph(gemma, coders, IDS, targets=[5]).nodes


def test_layers_without_a_transcoder_are_all_error(gemma):
    coders = {1: random_coder(20, seed=1)}
    with pytest.raises(ModelError, match="no transcoder for layer 0, 2 of gemma2: give one for"):
        attribution_graph(gemma, coders, IDS)
    some = Transcoders(coders, allow_missing=True)
    graph = attribution_graph(gemma, some, IDS, targets=[5])
    assert graph.edge_error.absolute < 1e-4
    assert {n.layer for n in graph.nodes if n.kind == FEATURE} == {1}
    _, cache = gemma.run_with_cache([IDS], ["mlp_out"])
    assert graph.value("2_-1_4") == pytest.approx(float(cache["mlp_out", 2][0, 4].norm()), rel=1e-5)
    listed = Transcoders([None, coders[1], None], allow_missing=True)
    with_none = attribution_graph(gemma, listed, IDS, [5])
    assert torch.equal(with_none.adjacency, graph.adjacency)


def test_fewer_features_are_folded_into_the_errors(model):
    whole = attribution_graph(model, random_coders(model), IDS, targets=[5, 30])
    few = attribution_graph(model, random_coders(model), IDS, targets=[5, 30], max_features=40)
    assert int(few.mask(FEATURE).sum()) == 40
    assert few.edge_error.absolute < 1e-4
    for node in few.features()[:10]:  # edges between the features that stay are the same
        for other in few.features()[:10]:
            assert few.edge(node, other) == pytest.approx(whole.edge(node, other), abs=1e-5)
    more = attribution_graph(model, random_coders(model), IDS, targets=[5], max_features=10**6)
    assert int(more.mask(FEATURE).sum()) == int(whole.mask(FEATURE).sum())


def test_total_effects_are_the_gradient_of_the_gated_model(model):
    """The rank of a feature in `fold`: through all paths, checked with the graph's own edges."""
    coders = random_coders(model)
    graph = attribution_graph(model, coders, IDS, targets=[5])
    local = LocalReplacement(model, coders, IDS)
    vectors, _ = edges.logit_vectors(model, torch.tensor([5]))
    scores = local._total_effects(vectors, torch.ones(1))
    for layer, active in local.features.items():
        for i in (0, len(active) // 2, len(active) - 1):
            node = Node(FEATURE, layer, int(active.positions[i]), int(active.latents[i]))
            effect = predicted_effect(graph, {node: 2.0})[-1]  # one more of it, all gates open
            assert float(scores[layer][i]) == pytest.approx(abs(float(effect)), abs=1e-4, rel=1e-3)


def test_chunks_do_not_change_the_graph(gemma, monkeypatch):
    whole = attribution_graph(gemma, random_coders(gemma), IDS)
    monkeypatch.setattr(edges, "MOST_NUMBERS", 24 * 9 * 7)
    chunked = attribution_graph(gemma, random_coders(gemma), IDS)
    assert torch.allclose(chunked.adjacency, whole.adjacency, atol=1e-5)


def test_default_targets_reach_the_mass(gemma):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]))
    assert pick_logits(gemma, logits).tolist() == [0, 1, 2, 3]
    assert pick_logits(gemma, torch.zeros(48)).numel() == 10
    assert pick_logits(gemma, torch.tensor([0.0, 20.0, 0.0])).tolist() == [1]


# ---------------------------------------------------------------------------------- interventions


def test_direct_effects_are_the_edges(model):
    """With everything frozen, multiplying a feature changes what reads it by (factor - 1) edge."""
    coders = random_coders(model, activation="relu")  # features do not compete
    graph = attribution_graph(model, coders, IDS, targets=[5, 30])
    early = [n for n in graph.features() if n.layer == 0 and n.position < 5][:2]
    factors = {early[0]: -1.0, early[1].id: 2.5}
    result = intervene(model, coders, IDS, factors, effects="direct")
    expected = predicted_effect(graph, factors, paths=False)
    change = result.uncapped_after - result.uncapped_before
    change = (change - change.mean())[[5, 30]]
    assert torch.allclose(change, expected[graph.mask(LOGIT)], atol=1e-3, rtol=1e-3)
    compared = 0
    for i, node in enumerate(graph.nodes):
        if node.kind == FEATURE and node.layer > 0:
            before, after = result.feature(node)
            if after > 0:
                assert after - before == pytest.approx(float(expected[i]), abs=1e-3)
                compared += abs(float(expected[i])) > 1e-2
    assert compared > 20


def test_errors_and_embeddings_can_be_multiplied(gemma):
    coders = random_coders(gemma)
    graph = attribution_graph(gemma, coders, IDS, targets=[5])
    for name in ("1_-1_6", f"E_{IDS[4]}_4"):
        result = intervene(gemma, coders, IDS, {name: 0.5}, effects="direct")
        change = result.uncapped_after - result.uncapped_before
        change = float((change - change.mean())[5])
        assert change == pytest.approx(-0.5 * graph.edge(name, len(graph) - 1), abs=1e-4)


def test_iterative_effects_are_those_of_a_hook_on_the_model(model):
    """Attention recomputed, one feature: the same as adding the difference to mlp_out."""
    coders = random_coders(model)
    node = next(n for n in attribution_graph(model, coders, IDS).features() if n.layer == 1)
    result = intervene(model, coders, IDS, {node: -2}, attention="recomputed")
    value = result.feature(node)[0]

    def add(mlp_out):
        mlp_out[0, node.position] -= 3 * value * coders[1].W_dec[node.index].detach()
        return mlp_out

    with model.hooks({("mlp_out", 1): add}):
        wanted = model([IDS])[0, -1]
    assert torch.allclose(result.logits_after, wanted, atol=1e-5)
    assert not torch.allclose(result.logits_after, result.logits_before, atol=1e-3)
    frozen = intervene(model, coders, IDS, {node: -2})
    assert not torch.allclose(frozen.logits_after, wanted, atol=1e-5)
    _, cache = model.run_with_cache([IDS], ["pattern"])
    patterns = {("pattern", i): (lambda x, i=i: cache["pattern", i]) for i in range(3)}
    with model.hooks(patterns | {("mlp_out", 1): add}):
        assert torch.allclose(frozen.logits_after, model([IDS])[0, -1], atol=1e-5)


@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
def test_a_factor_of_one_changes_nothing(gemma, attention):
    coders = random_coders(gemma)
    node = attribution_graph(gemma, coders, IDS).features()[0]
    for factors in ({node: 1.0}, {}, {"2_-1_3": 1.0}):
        result = intervene(gemma, coders, IDS, factors, attention=attention)
        assert torch.allclose(result.logits_after, result.logits_before, atol=1e-5)
        assert result.kl() == pytest.approx(0.0, abs=1e-6)


def test_constrained_effects_begin_after_the_last_changed_layer(gemma):
    coders = random_coders(gemma)
    features = attribution_graph(gemma, coders, IDS).features()
    first = next(n for n in features if n.layer == 0)
    last = next(n for n in features if n.layer == 2)
    one = intervene(gemma, coders, IDS, {last: -2})
    same = intervene(gemma, coders, IDS, {last: -2}, effects="constrained")
    assert torch.allclose(one.logits_after, same.logits_after, atol=1e-5)
    # with layer 2 changed as well, layer 1 is held: its MLP does not see that layer 0 changed
    both = intervene(gemma, coders, IDS, {first: -2, last: -2}, effects="constrained")
    mlp_out = gemma.run_with_cache([IDS], ["mlp_out", "pattern"])[1]
    steps = {}
    for node in (first, last):
        push = -3 * both.feature(node)[0] * coders[node.layer].W_dec[node.index].detach()
        steps.setdefault(node.layer, torch.zeros(1, 9, 20))[0, node.position] += push
    inputs = LocalReplacement(gemma, coders, IDS).inputs
    hooks = {("pattern", i): (lambda x, i=i: mlp_out["pattern", i]) for i in range(3)}
    seen = {}
    for i in range(3):
        skip = coders[i].W_skip.detach().T if coders[i].skip else torch.zeros(20, 20)

        def keep(x, i=i):
            seen[i] = x

        def write(x, i=i, skip=skip):
            held = mlp_out["mlp_out", i] + (seen[i] - inputs[i]) @ skip
            return held + steps.get(i, 0.0)

        hooks |= {("mlp_in", i): keep, ("mlp_out", i): write}
    with gemma.hooks(hooks):
        assert torch.allclose(both.logits_after, gemma([IDS])[0, -1], atol=1e-5)


def test_a_value_puts_a_feature_in(gemma):
    coders = random_coders(gemma, activation="relu")
    f = intervene(gemma, coders, IDS, {}).features_before[1]
    latent = int((f[-1] == 0).nonzero()[3])
    name = f"1_{latent}_8"
    with pytest.raises(ModelError, match=f"{name} is not active on this prompt"):
        intervene(gemma, coders, IDS, {name: 2})
    result = intervene(gemma, coders, IDS, values={name: 3.0}, effects="direct")
    assert result.feature(name) == (0.0, 3.0)
    assert not torch.allclose(result.logits_after, result.logits_before)


def test_results_can_be_read(tiny):
    coders = [random_coder(144, 256, seed=i, activation="topk", k=8) for i in range(6)]
    node = attribution_graph(tiny, coders, TEXT).features()[0]
    result = intervene(tiny, coders, TEXT, {node: -3})
    top = result.top(3)
    assert top[0][2] == pytest.approx(float(torch.softmax(result.logits_after, -1).max()))
    assert top[0][1] == pytest.approx(
        float(result.probabilities()[0][tiny.to_single_token(top[0][0])])
    )
    assert result.kl() >= 0


# --------------------------------------------------------------------------------------- tiny-gemma


def test_the_edges_of_tiny_gemma_sum(tiny, record_property):
    """1,152 latents, 16 of them at each token, in every layer: random ones, the hardest case."""
    coders = [random_coder(144, 1152, seed=i, activation="topk", k=16) for i in range(6)]
    graph = attribution_graph(tiny, coders, TEXT)
    record_property("edge error", str(graph.edge_error))
    assert int(graph.mask(FEATURE).sum()) == 6 * 16 * (len(graph.tokens) - 1)
    assert graph.edge_error.absolute < 1e-4 and graph.edge_error.relative < 1e-4
    logits = tiny(TEXT)[0, -1]
    logits = 30 * torch.atanh(logits / 30)
    ids = [n.index for n in graph.nodes if n.kind == LOGIT]
    sums = (graph.adjacency.sum(1) + graph.bias)[-len(ids) :]
    assert torch.allclose(sums, (logits - logits.mean())[ids], atol=2e-4)


# ---------------------------------------------------------------------------------------- mistakes


def test_mistakes_get_one_clear_sentence(gemma, tiny):
    coders = random_coders(gemma)
    with pytest.raises(ModelError, match="belongs to another model"):
        attribution_graph(gemma, [random_coder(12), *coders[1:]], IDS)
    with pytest.raises(ModelError, match="The coder of layer 1 is an SAE: a circuit needs"):
        attribution_graph(gemma, [coders[0], SparseCoder(20, 40, k=3), coders[2]], IDS)
    with pytest.raises(ModelError, match="layer 1 is on meta and gemma2 on cpu: move one"):
        attribution_graph(gemma, [coders[0], random_coder(20).to("meta"), coders[2]], IDS)
    with pytest.raises(ModelError, match="transcoder for layer 3, but gemma2 has layers 0 to 2"):
        attribution_graph(gemma, [*coders, coders[0]], IDS)
    with pytest.raises(ModelError, match="The text has 17 tokens, more than gemma2's"):
        attribution_graph(gemma, coders, [3] * 17)
    with pytest.raises(ModelError, match="A graph is of one prompt, not of 2"):
        attribution_graph(gemma, coders, [IDS, IDS])
    with pytest.raises(ModelError, match="each once, from 0 to 47"):
        attribution_graph(gemma, coders, IDS, targets=[48])
    with pytest.raises(ModelError, match="each once"):
        attribution_graph(gemma, coders, IDS, targets=[4, 4])
    with pytest.raises(ModelError, match="The method is one of closed form, backward"):
        attribution_graph(gemma, coders, IDS, method="forward")
    with pytest.raises(ModelError, match="reads mlp_in or normalised, not 'resid'"):
        attribution_graph(gemma, Transcoders(coders, "resid"), IDS)
    with pytest.raises(ModelError, match="max_features is 0"):
        attribution_graph(gemma, coders, IDS, max_features=0)
    with pytest.raises(ModelError, match=r"' Paris Rome' is \d tokens"):
        attribution_graph(tiny, Transcoders({}, allow_missing=True), TEXT, " Paris Rome")
    hooks = gemma.hooks({"mlp_out": lambda x: None})
    with hooks, pytest.raises(ModelError, match="leave the"):
        attribution_graph(gemma, coders, IDS)


def test_a_graph_that_is_too_large_says_so(gemma, monkeypatch):
    monkeypatch.setattr(edges, "MOST_NODES", 100)
    with pytest.raises(ModelError, match="nodes and 0 GB of edges: shorten the prompt, or pass"):
        attribution_graph(gemma, random_coders(gemma), IDS)


def test_mistakes_in_interventions_get_one_clear_sentence(gemma):
    coders = random_coders(gemma)
    node = attribution_graph(gemma, coders, IDS).features()[0].id
    for factors, message in (
        ({"nonsense": 0}, "'nonsense' is no node's name"),
        ({"1_3_99": 0}, "position 99, and the prompt has 9 tokens"),
        ({"1_999_3": 0}, "latent 999, and the transcoder has 40"),
        ({"9_1_1": 0}, "There is no node '9_1_1': layers go from 0 to 2"),
        ({"4_3_8": 0}, "is a logit: change what leads to it"),
        ({"E_5_1": 0}, "is not the token at position 1: that is 9"),
        ({node: float("nan")}, "is nan: expected a finite number"),
        ({node: 1e300}, "expected a finite number"),
        ({node: 10**400}, "expected a finite number"),
        ({node: "2"}, "expected a finite number"),
        ({node: None}, "expected a finite number"),
        ([node], "expected {node or its name: number}"),
        ({3: 0}, "3 is no node"),
    ):
        with pytest.raises(ModelError, match=message):
            intervene(gemma, coders, IDS, factors)
    found = intervene(gemma, coders, IDS, {node: 0})
    for other in ("4_3_8", "1_-1_3", "1_3_99", "1_999_3", None):
        with pytest.raises(ModelError, match="is no feature|is not among"):
            found.feature(other)
    token = Node.parse("E_9_1", gemma.n_layers)
    with pytest.raises(ModelError, match="E_9_1 is given twice"):
        intervene(gemma, coders, IDS, {"E_9_1": 0, token: 2})
    for k in (0, -1, 1.5, 10**9):
        with pytest.raises(ModelError, match="k is"):
            intervene(gemma, coders, IDS, {node: 0}).top(k)
    for factors in ({node: float("inf")}, {node: "2"}, [node]):
        with pytest.raises(ModelError, match="expected"):
            predicted_effect(attribution_graph(gemma, coders, IDS), factors)
    with pytest.raises(ModelError, match="has a factor and a value"):
        intervene(gemma, coders, IDS, {node: 0}, values={node: 1})
    with pytest.raises(ModelError, match="is no feature: it takes a factor"):
        intervene(gemma, coders, IDS, values={"1_-1_3": 1})
    with pytest.raises(ModelError, match="Attention is frozen or recomputed"):
        intervene(gemma, coders, IDS, {}, attention="thawed")
    with pytest.raises(ModelError, match="Direct effects are those of frozen attention"):
        intervene(gemma, coders, IDS, {}, attention="recomputed", effects="direct")
