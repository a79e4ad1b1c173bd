"""Activation, attribution and path patching, against one forward per patch and against hand.

The brute force here uses `model.hooks` and whole forwards alone, and every family of test_models.
"""

import itertools

import pytest
import torch
from families import CONFIGS, TEXT, build, make_tokenizer

from mi_helpers import prefix
from mi_helpers.ablation import Gaussian, Mean, Resample, Zero, record
from mi_helpers.gradients import attribution_patch
from mi_helpers.hooks import replaced_attention
from mi_helpers.layouts import ModelError
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.patching import (
    LogitDiff,
    activation_patch,
    answer_ids,
    logit_diff,
    normalised_logit_diff,
)
from mi_helpers.paths import path_patch, path_patch_map
from mi_helpers.sweeps import HEAD_SITES, STREAM_SITES, Sweep, pair

SITES = STREAM_SITES + HEAD_SITES
CLEAN = torch.tensor([[2, 5, 7, 9, 11, 13, 15], [2, 6, 8, 9, 12, 13, 16]])
CORRUPTED = torch.tensor([[2, 5, 21, 9, 23, 13, 15], [2, 6, 4, 9, 12, 18, 22]])


@pytest.fixture(scope="session")
def loaded():
    return {family: LanguageModel(build(family), make_tokenizer(), family) for family in CONFIGS}


@pytest.fixture(params=CONFIGS)
def model(request, loaded):
    return loaded[request.param]


@pytest.fixture
def gemma(loaded):
    return loaded["gemma2"]


@pytest.fixture(scope="module")
def tiny():
    return load_model()


@torch.no_grad()
def the_metric(model):
    """The answers that the two prompts differ in most, so that effects are of the order of 1."""
    change = model(CLEAN)[:, -1] - model(CORRUPTED)[:, -1]  # (batch, d_vocab)
    answer, wrong = change.argmax(-1).tolist(), change.argmin(-1).tolist()
    return normalised_logit_diff(model, CLEAN, CORRUPTED, answer, wrong)


def sites_of(model):
    return [s for s in SITES if s != "resid_mid" or not model.parallel]


def heads_of(model, site):
    return model.n_kv_heads if site in ("k", "v") else model.n_heads


@torch.no_grad()
def brute(model, base, values, site, metric, over, hooks=None):
    """One whole forward for each patch: `values` {layer: activation to put in}."""
    heads = range(heads_of(model, site)) if "heads" in over else [slice(None)]
    positions = range(base.shape[1]) if "positions" in over else [slice(None)]
    found = []
    for layer, head, pos in itertools.product(range(model.n_layers), heads, positions):

        def put(x, layer=layer, head=head, pos=pos):
            where = (slice(None), pos, head) if site in HEAD_SITES else (slice(None), pos)
            where = (slice(None), head, pos) if site == "pattern" else where
            x[where] = values[layer][where]
            return x

        with model.hooks(hooks or {}), model.hooks({(site, layer): put}):
            found.append(metric(model.forward(base)[:, -1]))
    return torch.stack(found).reshape(
        model.n_layers,
        *([len(heads)] if "heads" in over else []),
        *([len(positions)] if "positions" in over else []),
    )


def activations(model, ids, site):
    _, cache = model.run_with_cache(ids, site)
    return {i: cache[site, i] for i in range(model.n_layers)}


# ------------------------------------------------------------------------------------- metrics


def test_the_logit_difference_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
    assert logit_diff(logits, [1, 0], [0, 2]) == pytest.approx((4 + 1) / 2)
    assert logit_diff(logits, 1, 2) == pytest.approx((3 - 3) / 2)
    many = torch.stack([logits, 2 * logits])
    assert torch.equal(logit_diff(many, [1, 0], [0, 2]), torch.tensor([2.5, 5.0]))
    scaled = LogitDiff(torch.tensor([1, 0]), torch.tensor([0, 2]), clean=4.5, corrupted=0.5)
    assert scaled(logits) == pytest.approx(0.5) and scaled.raw(logits) == pytest.approx(2.5)


def test_the_normalised_difference_is_1_on_clean_and_0_on_corrupted(model):
    metric = the_metric(model)
    assert metric(model(CLEAN)[:, -1]) == pytest.approx(1, abs=1e-5)
    assert metric(model(CORRUPTED)[:, -1]) == pytest.approx(0, abs=1e-5)


# -------------------------------------------------------------------------- activation patching


def gap_of(model, site, metric, mode, over):
    """Largest difference between a sweep and one forward per patch."""
    base, source = (CORRUPTED, CLEAN) if mode == "denoise" else (CLEAN, CORRUPTED)
    expected = brute(model, base, activations(model, source, site), site, metric, over)
    found = activation_patch(model, CLEAN, CORRUPTED, site, metric, mode, over=over)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert expected.max() - expected.min() > 1e-3, site  # there is something to get wrong
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_every_sweep_equals_one_forward_per_patch(model, mode, record_property):
    metric, gaps = the_metric(model), {}
    for site in sites_of(model):
        over = "heads" if site in HEAD_SITES else "positions"
        gaps[site] = gap_of(model, site, metric, mode, over)
    record_property("gaps", gaps)
    print(model.name, mode, gaps)
    assert max(gaps.values()) < 1e-5


@pytest.mark.parametrize("site", ["v", "pattern"])
def test_sweeps_over_heads_and_positions(model, site):
    assert gap_of(model, site, the_metric(model), "denoise", "heads x positions") < 1e-5


def test_sweeps_over_other_axes(model):
    metric = the_metric(model)
    for site in sites_of(model):
        if not site.startswith("resid"):  # the whole stream: test_the_ends_of_a_sweep_are_known
            assert gap_of(model, site, metric, "noise", "layers") < 1e-5, site
    assert gap_of(model, "q", metric, "noise", "positions") < 1e-5


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("most", [1, 20, 10**9])
def test_how_the_rows_are_packed_changes_nothing(gemma, most, reuse_prefix, monkeypatch):
    metric = the_metric(gemma)
    expected = activation_patch(gemma, CLEAN, CORRUPTED, "v", metric, over="heads x positions")
    monkeypatch.setattr(prefix, "MOST_TOKENS", most)
    monkeypatch.setattr("mi_helpers.patching.MOST_LOGITS", most)
    monkeypatch.setattr(prefix, "MOST_SCORES", most)
    run = prefix.run_edits
    monkeypatch.setattr(
        "mi_helpers.patching.run_edits", lambda *args: run(*args, reuse_prefix=reuse_prefix)
    )
    found = activation_patch(gemma, CLEAN, CORRUPTED, "v", metric, over="heads x positions")
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_ends_of_a_sweep_are_known(model):
    """The whole stream patched is the other run; the last stream matters at the last position."""
    metric = the_metric(model)
    whole = activation_patch(model, CLEAN, CORRUPTED, "resid_pre", metric, over="layers")
    assert torch.allclose(whole, torch.ones(model.n_layers), atol=1e-4)
    last = activation_patch(model, CLEAN, CORRUPTED, "resid_post", metric)[-1]
    assert torch.allclose(last, torch.tensor([0.0] * 6 + [1.0]), atol=1e-4)
    noised = activation_patch(model, CLEAN, CORRUPTED, "resid_post", metric, "noise", over="layers")
    assert torch.allclose(noised, torch.zeros(model.n_layers), atol=1e-4)


def test_nothing_before_the_first_changed_token_matters(gemma):
    found = activation_patch(gemma, CLEAN, CORRUPTED, "attn_out", the_metric(gemma))
    assert torch.equal(found[:, :2], found[:, :1].expand(-1, 2)) and found[0, 2] != found[0, 1]


def test_restrictions_choose_rows_of_the_sweep(gemma):
    metric = the_metric(gemma)
    args = (gemma, CLEAN, CORRUPTED, "z", metric)
    full = activation_patch(*args, over="heads x positions")
    some = activation_patch(
        *args, over=Sweep("heads x positions", layers=[3, 1], heads=[2], positions=[-1, 4])
    )
    assert torch.allclose(some, full[[3, 1]][:, [2]][:, :, [6, 4]], atol=1e-5)
    both = activation_patch(*args, over=Sweep(None, 2, 1, [4, 6]))  # 4 and 6 at once
    alone = full[2, 1, [4, 6]]
    assert both.shape == (1, 1) and not torch.isclose(alone, both[0, 0], atol=1e-4).any()


@pytest.mark.parametrize("ablation", [Zero, Mean])
@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_zero_and_mean_ablation(loaded, family, ablation):
    model = loaded[family]
    metric = the_metric(model)
    reference = torch.cat([CLEAN.flip(0), CORRUPTED, CLEAN.roll(1, 1)])
    for site in sites_of(model):
        values = activations(model, reference, site)
        values = {i: x.mean(0, keepdim=True).expand(2, *x.shape[1:]) for i, x in values.items()}
        if ablation is Zero:
            values = {i: torch.zeros_like(x) for i, x in values.items()}
        axes = "heads" if site in HEAD_SITES else "positions"
        expected = brute(model, CLEAN, values, site, metric, axes)
        given = Zero() if ablation is Zero else Mean(reference)
        found = activation_patch(model, CLEAN, None, site, metric, "noise", given)
        assert (found - expected).abs().max() < 1e-5, site
        assert (found - 1).abs().max() > 1e-3, site


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox"])
def test_gaussian_noise_is_averaged_over_its_seeds(loaded, family, mode):
    model = loaded[family]
    corrupted = Gaussian([2, 3], seeds=3)
    metric = normalised_logit_diff(model, CLEAN, corrupted, [30, 31], [32, 33])
    site, total = "mlp_out" if model.parallel else "resid_mid", 0
    found = activation_patch(model, CLEAN, corrupted, site, metric, mode)
    for noise in corrupted.noise(model, CLEAN):
        hook = {"embed": lambda x, noise=noise: x + noise}
        with model.hooks(hook):
            noised = activations(model, CLEAN, site)
        if mode == "denoise":
            clean = activations(model, CLEAN, site)
            total = total + brute(model, CLEAN, clean, site, metric, "positions", hook)
        else:
            total = total + brute(model, CLEAN, noised, site, metric, "positions")
    assert (found - total / 3).abs().max() < 1e-5 * (1 + found.abs().max())


def test_means_can_be_recorded_once(gemma):
    metric, reference = the_metric(gemma), CLEAN.flip(0)
    kept = record(gemma, reference, ["mlp_out", "pattern"])
    for site in ("mlp_out", "pattern"):
        args = (gemma, CLEAN, None, site, metric, "noise")
        found = [activation_patch(*args, Mean(given)) for given in (reference, kept)]
        assert torch.equal(*found)


def test_any_metric_can_be_used(gemma):
    def probability(logits):
        return logits.softmax(-1)[..., 30].mean(-1)

    found = activation_patch(gemma, CLEAN, CORRUPTED, "mlp_out", probability)
    values = activations(gemma, CLEAN, "mlp_out")
    expected = brute(gemma, CORRUPTED, values, "mlp_out", probability, "positions")
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_model_is_left_as_it_was(gemma):
    before = gemma(CLEAN)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gemma.hf.modules())
    activation_patch(gemma, CLEAN, CORRUPTED, "pattern", the_metric(gemma))
    path_patch_map(gemma, CLEAN, CORRUPTED, [("v", 2, 1)], the_metric(gemma))
    attribution_patch(gemma, CLEAN, CORRUPTED, "q", the_metric(gemma))
    assert torch.equal(gemma(CLEAN), before) and gemma.config._attn_implementation == "eager"
    assert not replaced_attention
    assert hooks == sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in gemma.hf.modules()
    )


# ------------------------------------------------------------------------- attribution patching


def slopes(model, site, metric, over, step=3e-3):
    """The metric's slope as a patch moves from the base run towards the other, by differences."""
    here, there = (activations(model, x, site) for x in (CORRUPTED, CLEAN))
    ahead, back = (
        brute(
            model,
            CORRUPTED,
            {i: here[i] + way * (there[i] - here[i]) for i in here},
            site,
            metric,
            over,
        )
        for way in (step, -step)
    )
    return (ahead - back) / (2 * step)


def test_attribution_is_the_gradient_times_the_difference(model):
    """Against a small step of a whole layer, at every site."""
    metric = the_metric(model)
    for site in sites_of(model):
        expected = slopes(model, site, metric, "layers")  # the base run is at 0
        found = attribution_patch(model, CLEAN, CORRUPTED, site, metric, over="layers")
        assert (found - expected).abs().max() < 0.01 * (1 + expected.abs().max()), site


@pytest.mark.parametrize("site", ["mlp_out", "z", "k", "pattern"])
def test_attribution_is_the_slope_of_each_patch(gemma, site):
    over = "heads x positions" if site in HEAD_SITES else "positions"
    expected = slopes(gemma, site, the_metric(gemma), over)
    found = attribution_patch(gemma, CLEAN, CORRUPTED, site, the_metric(gemma), over=over)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.01 * (1 + expected.abs().max())
    assert (found - expected).abs().median() < 1e-3


def test_attribution_has_the_axes_of_patching(model):
    metric = the_metric(model)
    for site in sites_of(model):
        finest = "heads x positions" if site in HEAD_SITES else "positions"
        full = attribution_patch(model, CLEAN, CORRUPTED, site, metric, over=finest)
        assert full.shape == (4, *((heads_of(model, site),) if site in HEAD_SITES else ()), 7)
        sums = {"layers": tuple(range(1, full.ndim))}
        sums |= {"heads": (2,), "positions": (1,)} if site in HEAD_SITES else {}
        for over, dims in sums.items():
            found = attribution_patch(model, CLEAN, CORRUPTED, site, metric, over=over)
            assert torch.allclose(found, full.sum(dims), atol=1e-4), (site, over)


def test_attribution_of_several_sites_takes_one_pass(gemma):
    metric = the_metric(gemma)
    both = attribution_patch(gemma, CLEAN, CORRUPTED, ["z", "mlp_out"], metric, "noise")
    assert list(both) == ["z", "mlp_out"]
    for site, found in both.items():
        alone = attribution_patch(gemma, CLEAN, CORRUPTED, site, metric, "noise")
        assert torch.allclose(found, alone, atol=1e-5)
    assert both["z"].shape == (4, 4) and both["mlp_out"].shape == (4, 7)


def test_attribution_is_exact_where_all_is_linear(loaded):
    """The metric that reads the last MLP's output straight off the stream."""
    model = loaded["llama"]
    with torch.no_grad():
        model.ln_final.forward, kept = (lambda x: x), model.ln_final.forward
        try:
            metric = LogitDiff(torch.tensor([30, 31]), torch.tensor([32, 33]))
            args = (model, CLEAN, CORRUPTED, "mlp_out", metric)
            true, guess = activation_patch(*args)[-1], attribution_patch(*args)[-1]
        finally:
            model.ln_final.forward = kept
    assert torch.allclose(true, guess, atol=1e-4) and true[6] != true[5]


# -------------------------------------------------------------------------------- path patching


@torch.no_grad()
def brute_path(model, base, other, senders, receivers, metric, through_mlps=False):
    """Wang et al. 2022, appendix B, with hooks alone and three whole forwards."""
    sites = ["z", "mlp_out", "embed", "attn_out"]
    (_, here), (_, there) = model.run_with_cache(base, sites), model.run_with_cache(other, sites)
    frozen, kept = {}, {}
    for layer in range(model.n_layers):
        z, mlp = here["z", layer].clone(), here["mlp_out", layer]
        heads = [head for where, head in senders if where == layer]
        z[:, :, heads] = there["z", layer][:, :, heads]
        frozen["z", layer] = lambda _, z=z: z
        if ("attn_out", layer) in senders:
            frozen["attn_out", layer] = lambda _, i=layer: there["attn_out", i]
        if ("mlp", layer) in senders:
            frozen["mlp_out", layer] = lambda _, i=layer: there["mlp_out", i]
        elif not through_mlps:
            frozen["mlp_out", layer] = lambda _, mlp=mlp: mlp
    if ("embed", 0) in senders:
        frozen["embed"] = lambda _: there["embed"]
    for receiver in receivers:
        if receiver != "logits":
            site = "mlp_in" if receiver[0] == "mlp" else receiver[0]
            kept[site, receiver[1]] = None

    def keep(key):
        return lambda x: kept.__setitem__(key, x.clone())

    with model.hooks(frozen), model.hooks({key: keep(key) for key in kept}):
        _, last = model.run_with_cache(base, "resid_final")
    gained = last["resid_final"] - model.run_with_cache(base, "resid_final")[1]["resid_final"]
    put = {}
    for receiver in receivers:
        if receiver == "logits":
            put["resid_final"] = lambda x: x + gained
        elif receiver[0] == "mlp":
            put["mlp_in", receiver[1]] = lambda _, key=("mlp_in", receiver[1]): kept[key]
        else:
            key = tuple(receiver[:2])
            heads = [r[2] for r in receivers if r != "logits" and tuple(r[:2]) == key]

            def change(x, key=key, heads=heads):
                x[:, :, heads] = kept[key][:, :, heads]
                return x

            put[key] = change
    with model.hooks(put):
        return metric(model.forward(base)[:, -1])


PATHS = [
    ([(0, 1)], [("q", 2, 3)]),
    ([(0, 1), (0, 2), (1, 3)], [("k", 3, 0), ("v", 3, 0), ("v", 2, 1)]),
    ([("mlp", 0)], [("q", 1, 0), ("q", 1, 2)]),
    ([(1, 0)], [("mlp", 1), ("mlp", 3)]),
    ([("attn_out", 2)], ["logits"]),
    ([(2, 1), ("mlp", 1)], ["logits", ("v", 3, 1), ("mlp", 2)]),
    ([(3, 3)], ["logits"]),
    ([(3, 3)], [("q", 2, 1)]),  # no path
]


@pytest.mark.parametrize("through_mlps", [False, True])
def test_path_patching_equals_the_hooks(model, through_mlps):
    metric = the_metric(model)
    for senders, receivers in PATHS:
        receivers = [
            (*r[:2], r[2] % model.n_kv_heads) if r[0] in ("k", "v") else r for r in receivers
        ]
        for mode, base, other in (("noise", CLEAN, CORRUPTED), ("denoise", CORRUPTED, CLEAN)):
            expected = brute_path(model, base, other, senders, receivers, metric, through_mlps)
            found = path_patch(
                model, CLEAN, CORRUPTED, senders, receivers, metric, mode, through_mlps
            )
            assert found.shape == ()
            assert abs(found - expected) < 1e-5, (senders, receivers)
        no_path = senders == [(3, 3)] and receivers != ["logits"]
        assert (abs(found) < 1e-6) == no_path, (senders, receivers)


def test_the_embedding_is_a_sender(model):
    metric = the_metric(model)
    expected = brute_path(model, CLEAN, CORRUPTED, [("embed", 0)], ["logits"], metric)
    found = path_patch(model, CLEAN, CORRUPTED, ["embed"], "logits", metric)
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_a_map_is_one_path_patch_per_sender(gemma):
    metric = the_metric(gemma)
    for receivers, through in ((["logits"], False), ([("q", 3, 0), ("v", 2, 1)], True)):
        args = (gemma, CLEAN, CORRUPTED)
        found = path_patch_map(*args, receivers, metric, through_mlps=through)
        for layer, head in itertools.product(range(4), range(4)):
            alone = path_patch(*args, [(layer, head)], receivers, metric, "noise", through)
            assert found[layer, head] == pytest.approx(float(alone), abs=1e-5)
        mlps = path_patch_map(*args, receivers, metric, "denoise", through, senders="mlp")
        assert mlps.shape == (4,)
        alone = path_patch(*args, [("mlp", 1)], receivers, metric, "denoise", through)
        assert mlps[1] == pytest.approx(float(alone), abs=1e-5)


def test_all_paths_to_the_logits_make_the_other_run(model):
    """The embedding and all that is written, sent to the logits: the other run's last stream."""
    senders = ["embed", *((s, i) for s in ("attn_out", "mlp") for i in range(model.n_layers))]
    found = path_patch(model, CLEAN, CORRUPTED, senders, "logits", the_metric(model))
    assert found == pytest.approx(0, abs=1e-4)


def test_a_path_by_hand_through_the_post_norm(gemma):
    """Head (1, 2) to the logits: the stream gains the normed difference of attention's output."""
    sites = ["z", "attn_out", "resid_final"]
    _, clean = gemma.run_with_cache(CLEAN, sites)
    _, corrupted = gemma.run_with_cache(CORRUPTED, sites)
    z = clean["z", 1].clone()
    z[:, :, 2] = corrupted["z", 1][:, :, 2]
    mixed = torch.einsum("bphe,hed->bpd", z, gemma.W_O[1])
    rms = (mixed.pow(2).mean(-1, keepdim=True) + gemma.config.rms_norm_eps).sqrt()
    written = mixed / rms * (1 + gemma.part("ln1_post", 1).weight)
    final = clean["resid_final"] + written - clean["attn_out", 1]
    metric = the_metric(gemma)
    expected = metric(gemma.unembed(final)[:, -1])
    found = path_patch(gemma, CLEAN, CORRUPTED, [(1, 2)], "logits", metric)
    assert found == pytest.approx(float(expected), abs=1e-5)
    naive = clean["resid_final"] + torch.einsum(
        "bpe,ed->bpd", (corrupted["z", 1] - clean["z", 1])[:, :, 2], gemma.W_O[1, 2]
    )
    assert abs(metric(gemma.unembed(naive)[:, -1]) - expected) > 1e-3  # without the post-norm


# ------------------------------------------------------------------------- prompts kept apart


def test_a_metric_may_keep_the_prompts_apart(gemma):
    """A last axis for the prompts, whose mean is the result for the batch."""
    metric, args = the_metric(gemma), (gemma, CLEAN, CORRUPTED)
    logits = gemma(CLEAN)[:, -1]
    assert metric.each(logits).shape == (2,) and metric.each(logits).std() > 1e-3
    sweeps = {
        (4, 4, 2): lambda m: activation_patch(*args, "z", m),
        (4, 7, 2): lambda m: activation_patch(*args, "mlp_out", m),
        (4, 2, 7, 2): lambda m: attribution_patch(*args, "k", m, over="heads x positions"),
        (4, 2, 2): lambda m: attribution_patch(*args, "v", m),
        (4, 1, 2): lambda m: attribution_patch(*args, "z", m, over="layers")[:, None],
        (4, 4, 1, 2): lambda m: path_patch_map(*args, "logits", m)[:, :, None],
        (2,): lambda m: path_patch(*args, [(0, 1)], [("q", 2, 3)], m),
    }
    for shape, run in sweeps.items():
        each, mean = run(metric.each), run(metric)
        assert each.shape == shape and torch.allclose(each.mean(-1), mean, atol=1e-5), shape
    alone = activation_patch(
        gemma,
        CLEAN[1:],
        CORRUPTED[1:],
        "z",
        LogitDiff(metric.answer[1:], metric.wrong[1:], metric.clean, metric.corrupted),
    )
    assert torch.allclose(sweeps[4, 4, 2](metric.each)[..., 1], alone, atol=1e-5)
    noised = Gaussian(2, seeds=3)
    each, mean = (activation_patch(gemma, CLEAN, noised, "z", m) for m in (metric.each, metric))
    assert each.shape == (4, 4, 2) and torch.allclose(each.mean(-1), mean, atol=1e-5)


# --------------------------------------------------------------------------------- on tiny-gemma


def test_a_fact_is_found_at_its_subject_and_then_at_the_end(tiny):
    """The landmark's last token early, the last token late; and every sweep on real text."""
    clean, corrupted = (f"The {x} is in the city of" for x in ("Eiffel Tower", "Tower Bridge"))
    metric = normalised_logit_diff(tiny, clean, corrupted, " Paris", " London")
    stream = activation_patch(tiny, clean, corrupted, "resid_pre", metric)
    assert stream.shape == (tiny.n_layers, 9)
    assert stream[0, 2:4].max() > 0.5 and stream[-1, -1] > 0.8 and stream[-1, :-1].abs().max() < 0.2
    values = activations(tiny, tiny.tokens(clean), "z")
    for over in ("heads", "heads x positions"):
        ids = tiny.tokens(corrupted)
        expected = brute(tiny, ids, values, "z", metric, over)
        found = activation_patch(tiny, clean, corrupted, "z", metric, over=over)
        assert (found - expected).abs().max() < 1e-5


# ----------------------------------------------------------------------------- one clear sentence


@pytest.mark.parametrize(
    ("clean", "corrupted", "message"),
    [
        (TEXT, TEXT, "are the same: change a word"),
        ("", "The cat", "is empty"),
        ("cat " * 17, "sat " * 17, "more than .* context"),
        ([TEXT, TEXT], [TEXT], "2 clean prompts and 1 corrupted"),
    ],
)
def test_prompts_that_do_not_fit(gemma, clean, corrupted, message):
    with pytest.raises(ModelError, match=message):
        pair(gemma, clean, corrupted)
    with pytest.raises(ModelError, match=message):
        activation_patch(gemma, clean, corrupted, "z", lambda x: x)
    with pytest.raises(ModelError, match=message):
        path_patch(gemma, clean, corrupted, [(0, 0)], "logits", lambda x: x)
    with pytest.raises(ModelError, match=message):
        attribution_patch(gemma, clean, corrupted, "z", lambda x: x)
    with pytest.raises(ModelError, match=message):
        normalised_logit_diff(gemma, clean, corrupted, " Paris", " Rome")


def test_a_pair_of_unequal_prompts_says_what_to_do(gemma):
    prompts = gemma, "The Eiffel Tower is", "The Tower is"
    with pytest.raises(ModelError, match="5 tokens and the corrupted one 4"):
        pair(*prompts)
    for method in (activation_patch, attribution_patch):
        with pytest.raises(ModelError, match="or give the positions"):
            method(*prompts, "z", lambda x: x)
    with pytest.raises(ModelError, match="equally many tokens"):
        path_patch(*prompts, [(0, 0)], "logits", lambda x: x)


@pytest.mark.parametrize(
    ("answer", "wrong", "message"),
    [
        (" Eiffel Tower", " Rome", "is 2 tokens"),
        (" Rome", " Rome", "same token"),
        (" London", " Rome", "not in .* vocabulary"),
        ([" Rome", " Paris"], " cat", "2 answers for 1 prompts"),
        (999, " Rome", "from 0 to 47"),
        ([], " Rome", "at least one"),
    ],
)
def test_answers_that_do_not_fit(gemma, answer, wrong, message):
    with pytest.raises(ModelError, match=message):
        normalised_logit_diff(gemma, TEXT, TEXT.replace("Eiffel", "cat"), answer, wrong)


def test_a_pair_that_the_model_does_not_tell_apart(gemma):
    hf = build("gemma2")
    with torch.no_grad():
        hf.model.norm.weight.fill_(-1.0)  # a gain of 0
    flat = LanguageModel(hf, make_tokenizer())
    with pytest.raises(ModelError, match="on both prompts, so there is nothing to normalise"):
        normalised_logit_diff(flat, TEXT, TEXT.replace("Eiffel", "cat"), " Rome", " Paris")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "resid"}, "expected one of .* Did you mean"),
        ({"site": "post"}, "expected one of"),
        ({"mode": "noising"}, "mode is 'noising'.* Did you mean 'noise'"),
        ({"ablation": "knockout"}, "ablation is 'knockout'"),
        ({"over": "head"}, "over is 'head'"),
        ({"site": "mlp_out", "over": "heads"}, "'mlp_out' has no heads"),
        ({"site": "mlp_out", "over": Sweep(heads=[1])}, "leave `heads` out"),
        ({"over": Sweep(layers=[4])}, "layers are .4.: expected"),
        ({"over": Sweep(heads=[])}, "heads are ..: expected"),
        ({"site": "k", "over": Sweep(heads=[2])}, "from 0 to 1"),
        ({"over": Sweep(positions=7)}, "from 0 to 6"),
        ({"ablation": Mean()}, "needs `reference`"),
        ({"ablation": Mean([[2, 3]])}, "have 2 tokens"),
        ({"ablation": Mean({("z", i): torch.ones(3, 4, 6) for i in range(4)})}, "as many tokens"),
        ({"ablation": Resample([[2, 3]])}, "leave the reference out"),
        ({"corrupted": Gaussian([9])}, "positions are .9.: expected"),
        ({"corrupted": Gaussian([2], seeds=0)}, "at least 1"),
        ({"corrupted": None}, "no corrupted prompt"),
    ],
)
def test_wishes_that_do_not_fit(gemma, changes, message):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "site": "z", "metric": the_metric(gemma)}
    with pytest.raises(ModelError, match=message):
        activation_patch(gemma, **(given | changes))


@pytest.mark.parametrize("sender", ["mlp", (1, 9), ("mlp", 4), (1, 2, 3), ("q", 1)])
def test_no_sender(gemma, sender):
    with pytest.raises(ModelError):
        path_patch(gemma, CLEAN, CORRUPTED, [sender], "logits", the_metric(gemma))


@pytest.mark.parametrize("receiver", [(1, 2), ("z", 1, 2), ("k", 1, 2), ("q", 9, 0), ("mlp", 1, 2)])
def test_no_receiver(gemma, receiver):
    with pytest.raises(ModelError):
        path_patch(gemma, CLEAN, CORRUPTED, [(0, 0)], [receiver], the_metric(gemma))


def test_nothing_to_send_or_to_receive(gemma):
    for senders, receivers in (([], "logits"), ([(0, 0)], [])):
        with pytest.raises(ModelError, match="at least one sender and one receiver"):
            path_patch(gemma, CLEAN, CORRUPTED, senders, receivers, the_metric(gemma))


def test_hooks_from_outside_are_refused(gemma):
    with gemma.hooks({"embed": lambda x: x}), pytest.raises(ModelError, match="leave the `with"):
        activation_patch(gemma, CLEAN, CORRUPTED, "z", lambda x: x)


def test_a_family_without_resid_mid_says_so(loaded):
    model = loaded["gpt_neox"]
    with pytest.raises(ModelError, match="no resid_mid"):
        activation_patch(model, CLEAN, CORRUPTED, "resid_mid", the_metric(model))
    with pytest.raises(ModelError, match="no resid_mid"):
        attribution_patch(model, CLEAN, CORRUPTED, "resid_mid", the_metric(model))


def test_answers_as_ids(gemma):
    assert answer_ids(gemma, 7).tolist() == [7]
    assert answer_ids(gemma, torch.tensor([3, 4])).tolist() == [3, 4]
    assert answer_ids(gemma, [" Rome"]).tolist() == [gemma.to_single_token(" Rome")]
