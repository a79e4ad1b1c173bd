"""A run's folder is of one text, one model and one recipe; what was changed in it is named."""

import json
from dataclasses import replace

import pytest
import torch
from made_harvest import made_harvest, sparse_data
from tiny_models import sentences, tiny_model

from mi_helpers import files as durable
from mi_helpers.files import (
    RunError,
    delete_replaced,
    load_tensors,
    read_sealed,
    save_tensors,
    write_sealed,
)
from mi_helpers.layouts import ModelError
from mi_helpers.saes import training
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.harvest import HarvestConfig, encoder, harvest
from mi_helpers.saes.plan import check_model, model_identity
from mi_helpers.saes.report import report
from mi_helpers.saes.run_files import trained_coder
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, train

SMALL = HarvestConfig(("resid_post", 1), tokens=300, context=12, shard_tokens=100, batch_tokens=60)
LEARN = TrainConfig(
    latents=24, k=3, products="float32", batch=32, steps=6, held_out=40, log_every=2, save_every=2
)


def jsonl(path, rows, seed=0):
    """Rows with two fields of other words."""
    pairs = zip(sentences(rows, seed), sentences(rows, seed + 100), strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": a, "body": b}) + "\n" for a, b in pairs))
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def place(tmp_path, model):
    """A folder of texts, and a harvest of them."""
    jsonl(tmp_path / "text" / "a" / "x.jsonl", 40)
    jsonl(tmp_path / "text" / "b" / "x.jsonl", 40, seed=1)
    again(tmp_path, model)
    return tmp_path


def again(place, model, config=SMALL, text="text", **options):
    source = open_source(str(place / text), **options)
    return harvest(model, source, place / "h", config, progress=False)


# -- another text, another model -------------------------------------------------------------


def test_another_column_is_another_text(place, model):
    with pytest.raises(
        RunError, match="holds a harvest with the setting text column = text, not b"
    ):
        again(place, model, column="body")


def test_a_file_of_the_same_name_in_another_folder_is_not_the_same(place, model):
    jsonl(place / "text" / "a" / "x.jsonl", 40, seed=2)
    with pytest.raises(RunError, match="with a text with another a/x.jsonl. Choose a new folder"):
        again(place, model)


@pytest.mark.parametrize("change", ["added", "gone"])
def test_a_file_more_or_less_is_named(place, model, change):
    if change == "added":
        jsonl(place / "text" / "c.jsonl", 3)
    else:
        (place / "text" / "b" / "x.jsonl").unlink()
    said = {"added": "a text without c.jsonl", "gone": "a text with b/x.jsonl"}
    with pytest.raises(RunError, match=said[change]):
        again(place, model)


def test_where_the_text_lies_does_not_matter(place, model):
    before = (place / "h" / "plan.json").read_bytes()
    (place / "text").rename(place / "moved")
    again(place, model, text="moved")
    assert (place / "h" / "plan.json").read_bytes() == before


def test_another_part_of_tinyworld_is_another_text(place, model):
    def of(spec, seed=0):
        return harvest(model, open_source(spec, seed), place / "t", SMALL, progress=False)

    of("tinyworld:prose")
    with pytest.raises(
        RunError, match="setting text name = tinyworld:prose, not tinyworld:facts|y"
    ):
        of("tinyworld:years")
    with pytest.raises(RunError, match="with the setting text seed = 0, not 1"):
        of("tinyworld:prose", 1)


def test_a_number_of_any_weight_is_another_model(place):
    """Not only the first ones of each matrix."""
    changed = tiny_model()
    with torch.no_grad():
        changed.hf.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    with pytest.raises(RunError, match="holds a harvest with other weights of the model"):
        again(place, changed)
    with pytest.raises(RunError, match="was made with other weights of the model, not with tiny"):
        check_model(Activations.open(place / "h"), changed)


def test_a_configuration_or_a_tokenizer_is_a_model_too(place):
    changed = tiny_model(attn_logit_softcapping=3.0)
    with pytest.raises(RunError, match="another configuration of the model"):
        again(place, changed)
    other = tiny_model()
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(RunError, match="another tokenizer"):
        again(place, other)


def test_a_name_is_no_model(place):
    same = tiny_model()
    same.name = "./moved"
    held = again(place, same)
    check_model(held, same)


def test_how_the_tokenizer_was_last_called_changes_nothing(model):
    other = tiny_model()
    other.tokenizer(["a cat", "a cat sat on"], padding=True, truncation=True, max_length=2)
    assert model_identity(other) == model_identity(model)
    assert encoder(other)(["the cat sat on the mat", "a"]) == encoder(model)(
        ["the cat sat on the mat", "a"]
    )


def test_a_plan_without_shards_binds_nobody(place, model):
    """As after a disk that was too small: fewer tokens are asked for in the same folder."""
    with pytest.raises(RunError, match="or ask for fewer tokens"):
        harvest(model, open_source("tinyworld"), place / "n", replace(SMALL, tokens=10**15))
    harvest(model, open_source("tinyworld"), place / "n", SMALL, progress=False)
    for shard in (place / "n").glob("shard-*"):
        shard.unlink()
    harvest(model, open_source("tinyworld"), place / "n", replace(SMALL, tokens=200))


# -- changed on the disk ---------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("plan.json", "tokens"), ("manifest.json", "rows")])
def test_a_changed_count_is_noticed(place, model, name, count):
    path = place / "h" / name
    assert f'"{count}": 300' in path.read_text()
    path.write_text(path.read_text().replace(f'"{count}": 300', f'"{count}": 299'))
    with pytest.raises(RunError, match=f"{name} is not what was written: .*Delete it and run"):
        again(place, model) if name == "plan.json" else Activations.open(place / "h")
    path.unlink()  # as it says
    assert again(place, model).rows == 300


def test_what_a_shard_says_about_itself_is_under_its_checksum(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(3)}, {"rows": 300, "next": [1, 2]})
    assert load_tensors(path)[1]["rows"] == 300
    path.write_bytes(path.read_bytes().replace(b'rows\\": 300', b'rows\\": 301'))
    for read in (load_tensors, durable.read_about):
        with pytest.raises(RunError, match="is not what was written: its checksum differs"):
            read(path)


def test_a_sealed_file_of_another_kind_is_said(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(RunError, match="x.json holds a list of 0"):
        read_sealed(tmp_path / "x.json")


@pytest.fixture
def run(tmp_path):
    held = made_harvest(tmp_path / "harvest", sparse_data(400), shard_rows=100)
    train(held, tmp_path, LEARN, progress=False)
    return held, tmp_path


@pytest.mark.parametrize("name", ["coder/cfg.json", "coder/sae_weights.safetensors", "log.csv"])
def test_a_changed_file_of_a_trained_run_is_named_and_the_advice_works(run, name):
    held, folder = run
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for use in (trained_coder, lambda f: train(held, f, LEARN), lambda f: report(held.folder, f)):
        with pytest.raises(RunError, match=f"{name} is not what was written.*Move the folder co"):
            use(folder)
    (folder / "coder").rename(folder / "away")
    train(held, folder, LEARN, progress=False)
    trained_coder(folder)


def test_a_changed_recipe_is_noticed(run):
    held, folder = run
    path = folder / "recipe.json"
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
    with pytest.raises(RunError, match="recipe.json is not what was written"):
        report(held.folder, folder)
    write_sealed(path, read_json_of(path))  # by somebody who seals it again
    with pytest.raises(RunError, match="recipe.json is not what was written: .*Move the folder"):
        trained_coder(folder)


def read_json_of(path):
    value = json.loads(path.read_text())
    return {key: value[key] for key in value if key != "sha256"}


def test_a_report_on_another_harvest_is_refused(run, tmp_path):
    other = made_harvest(tmp_path / "other", sparse_data(400, seed=1), shard_rows=100)
    with pytest.raises(RunError, match="holds a run with another harvest"):
        report(other.folder, run[1])


def test_a_checkpoint_belongs_to_its_recipe(run, monkeypatch):
    held, folder = run
    stopped = folder / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "finish_coder", interrupt)
        train(held, stopped, LEARN, progress=False)
    (stopped / "recipe.json").unlink()
    with pytest.raises(
        RunError, match="is of another run than recipe.json.*Delete checkpoint.safetensors to train"
    ):
        train(held, stopped, replace(LEARN, seed=1), progress=False)
    (stopped / "checkpoint.safetensors").unlink()
    train(held, stopped, replace(LEARN, seed=1), progress=False)


@pytest.mark.parametrize("change", ["gone", "a number", "a word"])
def test_the_log_of_a_killed_run_is_compared_and_the_advice_works(tmp_path, change, monkeypatch):
    held = made_harvest(tmp_path / "harvest", sparse_data(400), shard_rows=100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "finish_coder", interrupt)
        train(held, tmp_path, LEARN, progress=False)
    log = tmp_path / "log.csv"
    lines = log.read_text().splitlines(keepends=True)
    lines[1] = {"a number": lines[1].replace("0.", "0.1", 1), "a word": "what\n"}.get(change, "")
    log.write_text("".join(lines)) if change != "gone" else log.unlink()
    with pytest.raises(RunError, match="log.csv is not what was written.*Delete checkpoint.safe"):
        train(held, tmp_path, LEARN, progress=False)
    (tmp_path / "checkpoint.safetensors").unlink()
    train(held, tmp_path, LEARN, progress=False)
    assert len(log.read_text().splitlines()) == 4


def interrupt(*_):
    raise KeyboardInterrupt


# -- nothing is deleted before what replaces it was read -------------------------------------


def test_a_checkpoint_stays_where_its_successor_cannot_be_read(tmp_path, monkeypatch):
    """The disk says that all is well and has lost half of it."""
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(path, {"x": torch.ones(1_000)}, {"step": 1})
    real = durable.save_file

    def lossy(tensors, to, metadata):
        real(tensors, to, metadata)
        to.write_bytes(to.read_bytes()[:-2_000])

    monkeypatch.setattr(durable, "save_file", lossy)
    with pytest.raises(RunError, match="truncated or damaged"):
        save_tensors(path, {"x": torch.zeros(1_000)}, {"step": 2})
    assert load_tensors(path)[1] == {"step": 1}


def test_the_last_checkpoint_stays_until_the_coder_was_read(tmp_path, monkeypatch):
    held = made_harvest(tmp_path / "harvest", sparse_data(400), shard_rows=100)

    def unreadable(path):
        raise ModelError("no coder")

    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr(training, "load_coder", unreadable)
        train(held, tmp_path, LEARN, progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "coder").exists()
    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr(training, "trained_coder", unreadable)
        train(held, tmp_path, LEARN, progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists()
    train(held, tmp_path, LEARN, progress=False)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_files_go_after_what_replaces_them_was_read(tmp_path):
    old = [tmp_path / "a", tmp_path / "b"]
    old[0].touch()
    with pytest.raises(ZeroDivisionError):
        delete_replaced(old, lambda: 1 / 0)
    assert old[0].exists()
    assert delete_replaced(old, lambda: 5) == 5 and not old[0].exists()


# -- what a message advises works ------------------------------------------------------------


def test_a_lower_rate_works_in_the_same_folder(tmp_path, monkeypatch):
    held = made_harvest(tmp_path / "harvest", sparse_data(400), shard_rows=100)
    real, steps = training.SparseStep.__call__, iter(range(100))

    def diverges(step, *batch):
        if next(steps) == 4:  # after a checkpoint
            with torch.no_grad():
                step.weights["W_dec"] *= 1e30
        return real(step, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.SparseStep, "__call__", diverges)
        with pytest.raises(RunError, match="diverged at step 4: choose a lower --rate than 0.008"):
            train(held, tmp_path, LEARN, progress=False)
    train(held, tmp_path, replace(LEARN, rate=1e-3), progress=False)


def test_the_choice_of_products_is_kept_with_the_checkpoint(tmp_path, monkeypatch):
    """A kind that was given up stays given up after a kill."""
    held = made_harvest(tmp_path / "harvest", sparse_data(400), shard_rows=100)
    config = replace(LEARN, products="bfloat16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = training.Run.advance

        def doubts(run):
            run.step.top_k.go_on(["float32"], 2)
            return real(run)

        patch.setattr(training.Run, "advance", doubts)
        patch.setattr(training, "finish_coder", interrupt)
        train(held, tmp_path, config, progress=False)
    run = training.Run(held, tmp_path, config, read_sealed(tmp_path / "recipe.json"))
    run.begin()
    assert run.step.top_k.kinds == ["float32"] and run.step.top_k.doubtful == 2
