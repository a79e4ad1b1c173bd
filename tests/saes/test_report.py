"""The loss with a coder in the model, against hooks set by hand; the report's files."""

import copy
import json
import math

import pytest
import torch
from made_harvest import made_harvest, sparse_data
from tiny_models import sentences, tiny_model

from mi_helpers.files import RunError
from mi_helpers.layouts import NORMALIZED, ModelError
from mi_helpers.saes import report as module
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.report import (
    Losses,
    held_out_texts,
    predict,
    report,
    spliced,
    spliced_losses,
)
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, split, train

SMALL = HarvestConfig(("resid_post", 1), tokens=900, context=12, shard_tokens=150, batch_tokens=60)
TEXTS = [[5, 9, 11, 7], [6, 8], [9], [10, 4, 5, 6, 7, 8, 12]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("\n\n".join(sentences(100)))
    return open_source(str(path))


@pytest.fixture(scope="module")
def held(model, source, tmp_path_factory):
    return harvest(model, source, tmp_path_factory.mktemp("h"), SMALL, progress=False)


def identity(d):
    """x = relu(x) - relu(-x), as a coder."""
    coder = SparseCoder(d, 2 * d, activation="relu")
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        coder.W_enc.copy_(both.T), coder.W_dec.copy_(both)
    return coder


def loss_under(model, ids, hooks):
    """SAELens' loss: of all tokens but the one that is predicted from BOS."""
    with model.hooks(hooks):
        return model.loss(torch.tensor([[2, *ids]]))[:, 1:].sum().item()


def test_a_perfect_coder_recovers_the_whole_loss(model, held):
    losses = spliced_losses(model, held, identity(12), TEXTS)
    assert torch.allclose(losses.spliced, losses.clean, atol=1e-4)
    assert losses.tokens.tolist() == [3, 1, 0, 6]


def test_each_text_alone_gives_the_same_losses(model, held):
    """Batches and padding change nothing, and each replacement is the hook that it says it is."""
    coder = SparseCoder(12, 30, k=2, seed=1)
    losses = spliced_losses(model, held, coder, TEXTS)
    mean = held.slice(0, held.rows)[0].mean(0)
    ways = {
        "clean": lambda x: x,
        "spliced": lambda x: coder(x).detach(),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }

    def behind_bos(change):
        return lambda x: torch.cat([x[:, :1], change(x)[:, 1:]], 1)

    for name, change in ways.items():
        for i, ids in enumerate(TEXTS):
            change = behind_bos(change) if name == "spliced" else change
            expected = loss_under(model, ids, {("resid_post", 1): change})
            assert getattr(losses, name)[i] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("site", ["mlp_in", NORMALIZED, "resid_mid"])
def test_a_transcoder_predicts_from_its_source(model, site):
    """The MLP itself in the place of a transcoder changes nothing; zeros do."""
    parts = ("ln2", "mlp", "ln2_post")
    norm, mlp, after = (copy.deepcopy(model.part(name, 1)) for name in parts)  # without hooks

    def run(source, target):
        if site == NORMALIZED:
            source = source * (1 + norm.weight)
        if site == "resid_mid":
            source = norm(source)
        return after(mlp(source))

    ids = torch.tensor([[2, 5, 9, 11, 7]])
    clean = model.loss(ids)
    with spliced(model, (site, 1), ("mlp_out", 1), run, lead=0):
        assert torch.allclose(model.loss(ids), clean, atol=1e-5)
    with spliced(model, (site, 1), ("mlp_out", 1), lambda s, t: torch.zeros_like(t), lead=0):
        assert not torch.allclose(model.loss(ids), clean, atol=1e-3)


def test_a_coder_that_normalises_its_input_puts_back_the_size_of_the_stream(model):
    """The identity with layer_norm changes nothing, but for its epsilon."""
    coder = identity(model.d_model)
    coder.layer_norm = True
    ids, site = torch.tensor([[2, 5, 9, 11, 7]]), ("resid_post", 1)
    clean = model.loss(ids)
    with spliced(model, site, None, lambda source, _: predict(coder, source), lead=0):
        torch.testing.assert_close(model.loss(ids), clean, atol=1e-3, rtol=1e-3)


def test_heads_are_put_back_as_heads(model):
    ids = torch.tensor([[2, 5, 9, 11, 7]])
    with spliced(model, ("z", 1), None, lambda s, t: 0 * t, lead=0):
        got = model.loss(ids)
    with model.hooks({("z", 1): lambda z: z * 0}):
        assert torch.allclose(model.loss(ids), got)


def test_what_a_harvest_leaves_out_is_not_replaced(model):
    seen = []
    ids = torch.tensor([[2, 5, 9, 11, 7]])
    _, cache = model.run_with_cache(ids, ("resid_post", 1))
    norms = cache["resid_post", 1][0].norm(dim=-1)
    limit = float(norms[1:].sort().values[-2:].mean())  # the largest one is above it
    with (
        spliced(model, ("resid_post", 1), None, lambda s, t: 0 * t, lead=1, limit=limit),
        model.hooks({("resid_pre", 2): lambda x: seen.append(x)}),
    ):
        model.forward(ids)
    gone = seen[0][0].norm(dim=-1) == 0
    expected = norms <= limit
    expected[0] = False
    assert torch.equal(gone, expected) and gone.sum() == 3


def test_the_normalized_site_cannot_be_replaced_by_itself(model):
    with (
        pytest.raises(ModelError, match="splice a transcoder in"),
        spliced(model, (NORMALIZED, 1), None, lambda s, t: t),
    ):
        pass


def test_loss_recovered_by_hand():
    losses = Losses(*(torch.tensor([a, a]) for a in (2.0, 3.0, 6.0, 4.0)), torch.tensor([1, 1]))
    assert losses.per_token() == {"clean": 2, "spliced": 3, "zero": 6, "mean": 4}
    assert losses.recovered("zero") == 0.75 and losses.recovered("mean") == 0.5
    harmless = Losses(*(torch.tensor([a]) for a in (2.0, 3.0, 2.0, 1.0)), torch.tensor([1]))
    assert harmless.recovered("zero") is None and harmless.recovered("mean") is None


def test_held_out_texts_are_whole_and_unseen(held):
    n = 500
    texts = held_out_texts(held, n, 10**6)
    shard, local = held.locate(n - 1)
    seen = sum(len(held.shard(i).document) for i in range(shard))
    seen += int(held.shard(shard).piece[local]) + 1
    pieces = sum(len(held.shard(i).document) for i in range(len(held.sizes)))
    assert len(texts) == pieces - seen > 10
    assert 100 <= sum(map(len, held_out_texts(held, n, 100))) < 112


@pytest.fixture(scope="module")
def run(held, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(latents=48, k=4, batch=64, steps=40, held_out=80, log_every=10)
    train(held, folder, config, progress=False)
    return folder


def test_the_report_has_its_files_and_numbers(model, held, run):
    numbers = report(held.folder, run, model, tokens=300)
    assert json.loads((run / "report.json").read_text()) == numbers
    assert (
        numbers["rows_trained_on"]
        == 820
        == split(held, TrainConfig(latents=48, held_out=80, batch=64))
    )
    assert numbers["loss"]["clean"] > 0 and numbers["latents"] == 48
    page = (run / "report.md").read_text()
    for text in ("tiny gemma2 0", "resid_post 1", "| L0 | ", "time to train", "![Explained"):
        assert text in page
    assert f"{numbers['explained_variance']:.3f}" in page
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    first = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    report(held.folder, run, model, tokens=300)
    assert first == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_report_without_the_model_leaves_the_loss_out(held, run, tmp_path):
    numbers = report(held.folder, run)
    assert "loss" not in numbers and not math.isnan(numbers["explained_variance"])


def test_another_model_or_no_run_is_said(held, run, tmp_path):
    with pytest.raises(RunError, match="was made with the model tiny gemma2 0"):
        report(held.folder, run, tiny_model(seed=5))
    with pytest.raises(RunError, match="recipe.json is missing"):
        report(held.folder, tmp_path)
    with pytest.raises(RunError, match="is not there: run the harvest first"):
        report(tmp_path / "none", run)


def test_harmless_replacements_are_said():
    assert module.share(None) == "no harm to recover from" and module.share(0.956) == "95.6%"


def test_a_made_harvest_can_be_read(tmp_path):
    """The tests' own helper writes what the reader expects."""
    x = sparse_data(100)
    assert torch.equal(made_harvest(tmp_path, x).slice(5, 50)[0], x[5:50].bfloat16().float())
