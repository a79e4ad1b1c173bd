"""Lesson 07: transcoders, what they are worth in the model, rules, virtual weights, and files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from tiny_models import sentences, tiny_model

from mi_helpers.circuits import rules
from mi_helpers.circuits.replacement import (
    LocalReplacement,
    by_coder,
    replaced,
    without_latents,
    zeros,
)
from mi_helpers.course.exercise import declared
from mi_helpers.layouts import norm_gain
from mi_helpers.lessons.lesson_07 import currencies
from mi_helpers.lessons.lesson_07 import experiments as lab
from mi_helpers.lessons.lesson_07 import figures as transcoder_figures
from mi_helpers.lessons.shared import make_batch
from mi_helpers.loading import load_model
from mi_helpers.plots import render
from mi_helpers.saes import transcoders
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import collect, logit_effects
from mi_helpers.saes.figures import Page
from mi_helpers.saes.files import CONFIG, load_coder
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, fit
from mi_helpers.tinyworld import lexicon
from mi_helpers.widgets import corners

MODEL = "tiny-gemma"
NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "07_transcoders.ipynb"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model, answers=4, families=("facts", "agreement", "prose"))


def random_coder(d=12, latents=30, k=4, skip=False, seed=0):
    """A transcoder with every parameter random."""
    coder = SparseCoder(d, latents, d, k=k, skip=skip, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return coder


def test_a_target_makes_a_transcoder_of_the_same_fit():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, 8, generator=generator)
    y = torch.relu(x @ torch.randn(8, 6, generator=generator))
    config = TrainConfig(32, 4, steps=200, batch=256)
    coder = fit(x, config, y)
    assert coder.transcoder and (coder.d_in, coder.d_out) == (8, 6)
    assert lab.explained(coder, x, y) > 0.8
    linear = lab.linear_explained(x, y, x, y)
    assert linear < 1 and fit(x, replace(config, steps=1)).transcoder is False
    with_skip = fit(x, replace(config, skip=True), y)
    assert lab.explained(with_skip, x, y) > linear
    with pytest.raises(ValueError, match="2000 rows of input and 10 of target"):
        fit(x, config, y[:10])


def test_a_linear_map_is_explained_by_a_linear_map():
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    y = x @ torch.arange(20.0).reshape(5, 4) + 3
    assert lab.linear_explained(x[:400], y[:400], x[400:], y[400:]) == pytest.approx(1)


def test_rows_are_what_the_mlps_read_and_write(monkeypatch):
    model = tiny_model()
    texts = sentences(6)

    class Source:
        def texts(self):
            yield from texts

    monkeypatch.setattr(transcoders, "open_source", lambda text, seed: Source())
    held = transcoders.read_mlps(model, 10_000, seed=0)
    want = {i: [[], []] for i in range(3)}
    for text in texts:
        _, cache = model.run_with_cache(text, ["mlp_in", "mlp_out"])
        for i in range(3):
            want[i][0].append(cache["mlp_in", i][0, 1:])
            want[i][1].append(cache["mlp_out", i][0, 1:])
    for i, (x, y) in held.items():
        true_x, true_y = (torch.cat(each) for each in want[i])
        assert x.shape == true_x.shape == y.shape
        distance = torch.cdist(torch.cat([x, y], 1).float(), torch.cat([true_x, true_y], 1))
        assert distance.min(1).values.max() < 0.1  # bfloat16; input and output of the same token
    bare = transcoders.read_mlps(model, 10_000, 0, [1], source="ln2_normalized")[1][0].float()
    gained = bare * norm_gain(model.part("ln2", 1))
    assert torch.allclose(gained, held[1][0].float(), atol=0.05)


def test_replacing_mlps_by_what_they_write_changes_nothing_and_by_zeros_a_lot(model, batch):
    clean = lab.losses(model, batch, {})
    same = lab.losses(model, batch, {i: lambda x, y: y for i in range(model.n_layers)})
    assert same == pytest.approx(clean, abs=1e-5)
    zero = lab.losses(model, batch, {0: zeros})
    assert lab.mean_loss(zero) > lab.mean_loss(clean) + 1
    assert lab.losses(model, batch, {}) == clean  # the hooks are gone


def test_a_replacement_reads_what_the_mlp_reads_but_not_at_bos():
    model, coder = tiny_model(), random_coder()
    ids = model.tokens("the cat sat on the mat")
    _, clean = model.run_with_cache(ids, ["mlp_in", "mlp_out"])
    with replaced(model, {1: by_coder(coder)}):
        _, cache = model.run_with_cache(ids, ["mlp_out", "resid_post"])
    with torch.no_grad():
        want = coder(clean["mlp_in", 1])
    assert torch.allclose(cache["mlp_out", 1][:, 1:], want[:, 1:], atol=1e-4)
    assert torch.equal(cache["mlp_out", 1][:, 0], clean["mlp_out", 1][:, 0])


def test_no_latent_leaves_the_bias_and_the_skip_path():
    coder, x = random_coder(skip=True), torch.randn(2, 3, 12)
    left = without_latents(coder)(x, x)
    assert torch.allclose(left, coder.b_dec + x @ coder.W_skip.T, atol=1e-5)


def test_loss_recovered_by_hand():
    run = lab.Faithful({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.5}, {"a": 5.0, "b": 2.01})
    assert run.recovered == pytest.approx((3.505 - 2.25) / (3.505 - 1.5))
    assert run.added == pytest.approx(0.75)
    by_family = run.by_family()
    assert by_family["a"] == 0.75 and math.isnan(by_family["b"])


def test_virtual_weights_are_the_effect_of_one_latent_on_another_through_the_norm():
    model, below, above = tiny_model(), random_coder(seed=1), random_coder(seed=2)
    V = rules.virtual_weights(model, below, above, 2)
    norm, stream = model.part("ln2", 2), torch.randn(12, generator=torch.Generator().manual_seed(3))
    scale = (stream.pow(2).mean() + norm.eps).rsqrt()
    one = scale * norm_gain(norm) * (stream + below.W_dec[7])
    other = scale * norm_gain(norm) * stream
    effect = above.encode_pre_act(one) - above.encode_pre_act(other)
    assert torch.allclose(effect, scale * V[7], atol=1e-4)


def test_the_edge_of_a_pair_at_one_position_without_attention_is_the_virtual_weight():
    """With attention's output switched off, what arrives is what was promised, over the rms."""
    model, coders = tiny_model(), [random_coder(seed=i) for i in range(3)]
    with torch.no_grad():
        for i in range(3):
            model.part("o", i).weight.zero_()
    prompt = "the cat sat on"
    pairs = rules.active_pairs(model, coders, [prompt])
    assert np.abs(pairs.edge[pairs.gap > 0]).max() < 1e-5
    assert np.abs(pairs.virtual[pairs.gap > 0]).max() > 0.1
    same = pairs.gap == 0
    assert np.sign(pairs.edge[same]) == pytest.approx(np.sign(pairs.virtual[same]))
    local = LocalReplacement(model, coders, prompt)
    scales = torch.cat([local.norms["ln2", i].scale.flatten() for i in (1, 2)]).numpy()
    ratio = pairs.edge[same] / pairs.virtual[same]
    nearest = np.abs(ratio[:, None] - scales).min(1)
    assert np.median(nearest / ratio) < 1e-3
    assert pairs.share_across() < 1e-4 and pairs.correlation() > 0.3


def test_pairs_that_fire_together_are_counted():
    one, other = SparseCoder(2, 2, 2, k=1), SparseCoder(2, 2, 2, k=1)
    with torch.no_grad():
        for coder in (one, other):
            coder.W_enc.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([[4.0, -3.0], [2.0, 1.0]])  # (0, 0) fires at row 0; (0, 1) never
    assert rules.share_firing_at_once(one, other, x, x, weights, n=1) == 1
    assert rules.share_firing_at_once(one, other, x, x, weights, n=2) == 0.5


def test_reading_and_own_tokens(model, tmp_path, monkeypatch):
    coder = transcoders.load_transcoders()[0]
    table = (model.part("ln2", 0)(model.W_E) @ coder.W_enc + coder.b_enc).detach()
    first = rules.top_input_tokens(model, coder, 0, 3)
    monkeypatch.setattr(rules, "MOST_NUMBERS", 100 * model.d_vocab)
    assert torch.equal(rules.top_input_tokens(model, coder, 0, 3), first)
    used = table.masked_fill(~model.in_text[:, None], -torch.inf)
    assert torch.equal(first[:, 0], (used - coder.b_enc).argmax(0))
    one = rules.token_inputs(model, coder, 0, 5)
    assert torch.allclose(table[:, 5], one, atol=1e-4)
    top = rules.top_tokens(model, one, 3)
    assert top[0][1] == pytest.approx(float(used[:, 5].max()), abs=1e-4) and len(top) == 3
    with pytest.raises(ValueError, match="no latent"):
        rules.token_inputs(model, coder, 0, coder.d_latent)
    source = open_source("tinyworld", 8)
    config = HarvestConfig(("mlp_in", 0), ("mlp_out", 0), 3_000)
    held = harvest(model, source, tmp_path, config, progress=False)
    page = Page(held, coder, collect(held, coder), model)
    share, exchanged = lab.predicted_tokens(page, 0)
    assert share > 0.3 > exchanged
    own = lab.own_tokens(page)
    latent = lab.plainest(page, 0)
    assert latent in own and own[latent][0] in table[:, latent].topk(10).indices.tolist()
    after = lab.next_tokens(page, latent)
    effects = logit_effects(model, coder.W_dec).masked_fill(~model.in_text, -torch.inf)
    raised = [np.isin(after, each).mean() for each in effects.topk(10).indices]
    assert raised[latent] > 5 * np.mean(raised)
    shard = held.shard(0)
    ends, begin = shard.start[shard.piece + 1], shard.start[shard.piece] + shard.at
    rows = [int(row) for row in page.features.top_row[latent] if row >= 0]
    assert after == [int(shard.ids[begin[r] + 1]) for r in rows if begin[r] + 1 < ends[r]]
    controls = {"layer": [0], "latent": (0, coder.d_latent - 1)}
    for values in corners(**controls):
        assert render(transcoder_figures.rule(page, **values))[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no latent"):
        transcoder_figures.rule(page, 0, coder.d_latent)


def test_what_latents_write_is_compared_with_the_unembedding(model):
    """The last layer's latents have only the final norm before them; the first layer's do not."""
    ids = [ids for ids in transcoders.text_ids(model, 200, 5)[:8] if len(ids) > 3]
    coders, last = transcoders.load_transcoders(), model.n_layers - 1
    late = rules.write_effects(model, coders[last], last, ids)
    assert len(late.own) == len(ids) == len(late.other)
    assert np.median(late.own) > 0.7 > np.median(late.other)
    early = rules.write_effects(model, coders[0], 0, ids)
    assert np.median(early.own) < np.median(late.own)


def test_a_text_longer_than_the_context_is_cut(model):
    ids = transcoders.text_ids(model, 600, 5)
    assert sum(len(row) - 1 for row in ids) >= 600
    assert ids[0] == model.tokens(model.tokenizer.decode(ids[0][1:]))[0].tolist()
    short = transcoders.text_ids(model, 200, 5, context=6)
    assert max(len(row) for row in short) == 6 and short[0] == ids[0][:6]
    model_of_few = SimpleNamespace(tokenizer=model.tokenizer, n_ctx=4)
    assert max(len(row) for row in transcoders.text_ids(model_of_few, 200, 5)) == 4


def test_random_features_and_affine_maps(model):
    x, y = transcoders.read_mlps(model, 1_500, 1, [1])[1]
    chance = lab.random_features(x[:1_000], y[:1_000], 200, 8)
    assert chance.transcoder and 0 < lab.explained(chance, x[:1_000], y[:1_000]) < 0.95
    W, b = lab.affine_map(x, y)
    mapped = lab.by_map(W, b)(x[None].float(), y[None].float())[0]
    assert torch.allclose(mapped, x.float() @ W + b, atol=1e-3)


def test_all_neurons_are_the_mlp_and_few_are_less(model):
    x, y = transcoders.read_mlps(model, 600, 1, [1])[1]
    post, rows, after = lab.neurons(model, 1, x)
    target = model.part("ln2_post", 1)(model.part("mlp", 1)(x.to(model.dtype))).float()
    assert torch.allclose(after(post @ rows), target, atol=1e-3)
    found = [lab.explained_by(lab.by_neurons(model, 1, n, x), x, y) for n in (1, 32, len(rows))]
    assert found[0] < found[1] < found[2] and found[2] > 0.999  # bfloat16 rows


def test_all_latents_are_the_transcoder_and_few_are_less(model):
    x, y = transcoders.read_mlps(model, 600, 1, [1])[1]
    coder = transcoders.load_transcoders()[1]
    found = [lab.explained_by(lab.by_latents(coder, n, x, y), x, y) for n in (1, 4, coder.k)]
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(lab.explained(coder, x, y), abs=0.01)


def test_the_strongest_write_most_at_each_token():
    units = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, 0.0]])
    rows = torch.tensor([[4.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert lab.strongest(units, rows, 1).tolist() == [[4.0, 0.0], [2.0, 0.0]]
    assert torch.allclose(lab.strongest(units, rows, 3), units @ rows)


def test_rivals_are_measured_side_by_side(model, batch):
    rows = transcoders.read_mlps(model, 500, 0, [1, 2])
    coders = dict(enumerate(transcoders.load_transcoders()))
    few, many = (lab.rivals(model, coders, rows, batch, n) for n in (1, 16))
    assert set(few) == {"latents", "neurons"}
    for kind, added in few.items():
        assert set(added) == set(batch.names)
        assert lab.mean_loss(added) > max(0.02, lab.mean_loss(many[kind]))
    explained = lab.both_explained(model, coders, rows, rows, 16)
    assert all(len(each) == 2 and min(each) > 0.9 for each in explained.values())
    assert render(transcoder_figures.rivals(explained, many))


def test_random_features_have_the_best_decoder():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 6, generator=generator) for _ in range(2))
    coder = lab.random_features(x, y, 40, 5, ridge=1e-6)
    left = y - coder(x)
    assert left.mean(0).abs().max() < 1e-4  # the bias is right
    assert (coder.encode(x).T @ left).abs().max() < 1e-2  # and what is left, no latent explains


def test_ways_are_compared_layer_by_layer_and_together(model, batch):
    coders = dict(enumerate(transcoders.load_transcoders()[:2]))
    ways = {
        "a": lab.by_coders(coders),
        "nothing": {i: without_latents(c) for i, c in coders.items()},
    }
    runs = lab.compare(model, batch, ways)
    places = ("layer 0", "layer 1", lab.ALL_LAYERS)
    assert set(runs) == {(where, way) for where in places for way in ways}
    alone = lab.losses(model, batch, {1: ways["a"][1]})
    assert runs["layer 1", "a"].spliced == pytest.approx(alone, abs=1e-5)
    alone = lab.losses(model, batch, {1: zeros})
    assert runs["layer 1", "a"].zero == pytest.approx(alone, abs=1e-5)
    assert runs[lab.ALL_LAYERS, "a"].recovered > runs[lab.ALL_LAYERS, "nothing"].recovered


def test_coders_for_a_model_without_published_ones():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    rows = {1: tuple(torch.randn(300, 12, generator=generator) for _ in range(2))}
    coders = transcoders.coders_for(model, [1], rows)
    assert list(coders) == [1] and coders[1].transcoder and coders[1].k == transcoders.K


def test_even_attention_is_even_and_causal():
    even = rules.even_attention(torch.rand(2, 4, 4))
    assert torch.allclose(even[1, 2], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_figures_draw_and_say_what_is_missing():
    run = lab.Faithful({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.5}, {"a": 5.0, "b": 2.01})
    runs = {("layer 0", "plain"): run, ("all layers", "plain"): run}
    for values in corners(part=["layer 0", "all layers"], kind=["plain"]):
        assert render(transcoder_figures.replacement(runs, **values))
    with pytest.raises(ValueError, match="Nothing was measured for 'layer 9'"):
        transcoder_figures.replacement(runs, "layer 9", "plain")
    rng = np.random.default_rng(0)
    pairs = rules.ActivePairs(*rng.normal(size=(3, 60)), np.arange(60) % 2)
    assert render(transcoder_figures.virtual(pairs))
    table = transcoder_figures.kinds_table({(lab.ALL_LAYERS, "a kind"): run, ("layer 0", "b"): run})
    assert "| a kind |" in table and "| b |" not in table


def test_the_figure_of_silenced_rules_at_every_corner(model):
    coders = dict(enumerate(transcoders.load_transcoders()))
    for values in corners(prompt="The currency of Poland is the", silenced=(0, 8)):
        figure = transcoder_figures.silenced(model, coders, **values)
        assert render(figure)[:4] == b"\x89PNG"
    for prompt, silenced, match in (("", 1, "at least one word"), ("We", -1, "cannot be silenced")):
        with pytest.raises(ValueError, match=match):
            transcoder_figures.silenced(model, coders, prompt, silenced)


def test_published_form_reads_without_the_gain_and_computes_the_same(tmp_path):
    model, coder = tiny_model(), random_coder(k=30)  # all latents, so TopK is a ReLU
    stream = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    bare = stream * (stream.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()
    x = bare * norm_gain(model.part("ln2", 1)).detach()
    place = lab.as_published(model, coder, 1, x, tmp_path / "transcoders")
    assert place.relative_to(tmp_path).as_posix() == "transcoders/layer_1/width_30/average_l0_30"
    loaded = load_coder(place)
    assert loaded.transcoder and loaded.activation == "jumprelu"
    assert loaded.metadata["reads"] == "normalised"
    assert torch.allclose(loaded(bare), coder(x), atol=1e-3)
    assert not torch.allclose(loaded(x), coder(x), atol=0.1)
    again = transcoders.of_mlp_in(model, loaded, 1)
    assert torch.allclose(again(x), coder(x), atol=1e-3)
    assert transcoders.of_mlp_in(model, again, 1) is again
    place = lab.as_published(model, again, 1, x, tmp_path / "transcoders" / "twice")
    assert torch.allclose(load_coder(place)(bare), coder(x), atol=1e-3)
    with pytest.raises(ValueError, match="no skip path"):
        lab.as_published(model, random_coder(skip=True), 1, x, tmp_path)


def test_the_command_makes_a_set_that_loads_again(tmp_path):
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    rows = {
        i: tuple(torch.randn(300, 12, generator=generator).bfloat16() for _ in range(2))
        for i in range(3)
    }
    made = transcoders.make_transcoders(
        model, tmp_path, rows=rows, steps=3, batch=64, say=lambda _: None
    )
    assert len(made) == 2 * 2 * 3
    for skip in (False, True):
        coders = transcoders.load_transcoders(skip, tmp_path)
        assert [coder.metadata["layer"] for coder in coders] == [0, 1, 2]
        assert all(coder.skip == skip and coder.k == transcoders.K for coder in coders)
    again = transcoders.make_transcoders(
        model, tmp_path / "b", rows=rows, steps=3, batch=64, say=lambda _: None
    )
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in paths}
        for root, paths in ((tmp_path, made), (tmp_path / "b", again))
    )
    assert first == second
    with pytest.raises(ValueError, match="make-transcoders makes them"):
        transcoders.load_transcoders(folder=tmp_path / "nothing")


def test_what_ships(model):
    files = [path for path in transcoders.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    for kind, skip in transcoders.KINDS.items():
        coders = transcoders.load_transcoders(skip)
        assert len(coders) == model.n_layers
        for layer, coder in enumerate(coders):
            said = coder.metadata
            assert (said["layer"], said["reads"], said["target"]) == (layer, "mlp_in", "mlp_out")
            assert (coder.skip, coder.d_in, coder.d_out) == (skip, 144, 144)
            config = json.loads(
                (transcoders.SHIPPED / kind / f"layer_{layer}" / CONFIG).read_text()
            )
            assert config["architecture"].startswith("topk_") and config["k"] == transcoders.K


def test_the_shipped_set_works_in_the_model_and_its_biases_do_not(model, batch):
    coders = transcoders.load_transcoders()
    ways = {
        "transcoders": lab.by_coders(coders),
        "biases": {i: without_latents(coder) for i, coder in enumerate(coders)},
    }
    runs = lab.compare(model, batch, ways)
    assert runs[lab.ALL_LAYERS, "transcoders"].recovered > 0.8
    assert runs[lab.ALL_LAYERS, "biases"].recovered < 0.5


# -- currencies ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coders():
    return dict(enumerate(transcoders.load_transcoders()))


def test_the_model_knows_the_answers(model):
    for kind in currencies.FRAMES:
        asked = currencies.ask(model, kind, ["Japan", "Poland"])
        assert len(asked) == 6 and (currencies.leads(model, asked) > 4).all()
    sights = currencies.ask(model, "currency", ["Japan"], [currencies.NATION])
    assert len(sights) == 4 and (currencies.leads(model, sights) > 4).all()
    text = model.tokenizer.decode(sights.ids[0, 1 : sights.last[0] + 1])
    assert text.startswith("The money of the country with the ") and text.endswith(" is the")


def test_a_lead_is_the_answers_logit_above_the_mean_of_the_others(model):
    asked = currencies.ask(model, "currency", ["Japan"], ["The currency of {} is the"])
    logits = model("The currency of Japan is the")[0, -1]
    pool = {model.encode(f" {each.currency}")[0] for each in lexicon.countries().values()}
    pool -= {model.encode(" currency")[0]}
    yen = model.encode(" yen")[0]
    others = torch.stack([logits[i] for i in pool - {yen}]).mean()
    assert currencies.leads(model, asked).item() == pytest.approx(
        float(logits[yen] - others), abs=0.01
    )


def test_without_a_rule_the_mlp_writes_all_but_the_rule(model, coders):
    ids = model.tokens("The currency of Japan is the")
    _, clean = model.run_with_cache(ids, ["mlp_in", "mlp_out"])
    f = coders[3].encode(clean["mlp_in", 3][0])
    latents = f[-1].topk(2).indices.tolist()
    with replaced(model, currencies.without(coders, [(3, latents[0]), (3, latents[1])])):
        _, cache = model.run_with_cache(ids, [("mlp_out", 3)])
    want = clean["mlp_out", 3][0] - f[:, latents] @ coders[3].W_dec[latents]
    assert torch.allclose(cache["mlp_out", 3][0, 1:], want[1:], atol=1e-4)
    assert torch.equal(cache["mlp_out", 3][0, 0], clean["mlp_out", 3][0, 0])


def test_direct_writes_sum_to_what_the_transcoders_write(model, coders):
    """Of latents, and of neurons, all of which together are the MLP, along the lead."""
    asked = currencies.ask(model, "currency", ["Japan"], ["The money of {} is the"])
    along, inputs = currencies._along_the_lead(model, asked)  # noqa: SLF001
    for layer in (0, 4):
        _, rows, after = lab.neurons(model, layer, inputs[layer])
        post = lab.neurons(model, layer, inputs[layer])[0]
        whole = (after(post @ rows) * along).sum()
        found = [w.writes for w in currencies.neuron_writes(model, asked) if w.layer == layer]
        assert sum(found) == pytest.approx(float(whole), abs=1e-3)
        only = {layer: coders[layer]}
        found = [w.writes for w in currencies.direct_writes(model, only, asked)]
        predicted = coders[layer](inputs[layer]) - coders[layer].b_dec
        assert sum(found) == pytest.approx(float((predicted * along).sum()), abs=1e-3)


def test_the_rule_that_writes_most_matters_to_its_currency_alone(model, coders):
    (found,) = currencies.strongest_writers(model, coders, ["Japan"])
    assert found.own > 0.1 and abs(found.others) < 0.03 and found.capital > 0.05
    assert render(transcoder_figures.by_country([found]))
    assert "| the currency |" in transcoder_figures.countries_table([found])


def test_a_greedy_search_stops_where_nothing_helps():
    worth = {(0, 1): 0.5, (0, 2): 0.3, (0, 3): 0.0, (1, 0): -0.2}

    def score(rules):
        return sum(worth[each] for each in rules) - 0.1 * len(rules)

    assert currencies.greedy(list(worth), score) == {(0, 1), (0, 2)}


def test_jumbled_texts_have_the_same_words(model, coders):
    ids = [each for each in transcoders.text_ids(model, 300, 5) if len(each) > 4]
    same, mixed = lab.jumbled(ids)
    assert same == ids and mixed != ids
    assert all(sorted(a) == sorted(b) and a[0] == b[0] for a, b in zip(ids, mixed, strict=True))
    assert lab.out_of_place(model, {0: coders[0]}, ids).startswith("layer 0: explained 0.9")


def test_latents_that_others_cut_off_are_counted():
    coder = SparseCoder(2, 3, 2, k=1)
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]))
    assert lab.cut_off(coder, torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1 / 3)


# -- the notebook ----------------------------------------------------------------------------


def test_the_notebook_asks_what_is_registered():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    source = "\n".join(c.source for c in cells if c.cell_type == "code")
    for each in declared(7, "exercise"):
        assert each.stub.strip() in source and f'check("{each.id}", {each.name})' in source
    flat = " ".join(source.split())
    for each in declared(7, "prediction"):
        assert f'"{each.id}"' in flat and f'"{each.question}"' in flat
        assert all(f'"{option}"' in source for option in each.options)
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    main = [each for each in declared(7, "exercise") if "going further" not in each.title]
    assert all(f"### {each.id} {each.title}" in text for each in declared(7, "exercise"))
    assert sum(each.minutes for each in main) <= 50 and len(main) == 9
