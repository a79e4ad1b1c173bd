"""The commands: settings, a whole run on a tiny model, dry runs, sentences for bad input."""

import errno
import json
import os
import re
import shlex
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from made_harvest import made_harvest, sparse_data
from pipeline_worker import command_of_many, context, holds
from tiny_models import sentences, tiny_model
from transformers import AutoConfig

from mi_helpers.__main__ import main
from mi_helpers.files import HOLDER, LOCK, InUse, RunError, alone_in, sweep
from mi_helpers.saes import estimate, pipeline
from mi_helpers.saes.estimate import Stage, blocks_needed, verdict
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.pipeline import Settings, read_settings
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, train
from mi_helpers.tiny_gemma import ship

ROOT = Path(__file__).resolve().parents[2]
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's folder and a text."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(sentences(120)))
    return folder


def options(place, folder, **more):
    numbers = {
        "tokens": 1_000,
        "context": 12,
        "shard-tokens": 200,
        "batch-tokens": 60,
        "latents": 48,
        "k": 4,
        "batch": 64,
        "steps": 30,
        "held-out": 64,
        "log-every": 10,
        "layer": 1,
        "loss-tokens": 200,
        "products": "float32",
    }
    given = {"model": place / "model", "text": place / "text.txt", "folder": folder}
    pairs = (given | numbers | more).items()
    return [part for name, value in pairs for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", *options(place, folder)]) == 0
    return folder


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_run_leaves_every_stages_files(run):
    names = {name for name in files(run) if "shard" not in name}
    assert names == {
        "harvest/plan.json",
        "harvest/manifest.json",
        "recipe.json",
        "log.csv",
        "seconds.json",
        "coder/SHA256SUMS",
        "coder/cfg.json",
        "coder/sae_weights.safetensors",
        "report.json",
        "report.md",
        "curves.png",
        "features.safetensors",
        "latents.jsonl",
    }
    config = json.loads((run / "coder/cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert len((run / "latents.jsonl").read_text().splitlines()) == 48


def test_a_second_run_changes_nothing_and_stages_agree_with_it(run, place, tmp_path, capsys):
    before = files(run)
    assert main(["run", *options(place, run)]) == 0
    assert files(run) == before
    for stage in ("harvest", "train", "report", "features"):
        assert main([stage, *options(place, tmp_path)]) == 0
    single = files(tmp_path)
    apart = {"seconds.json", "report.md"}  # the time is theirs
    assert {k: v for k, v in single.items() if k not in apart} == {
        k: v for k, v in before.items() if k not in apart
    }
    assert "1,000 tokens" in capsys.readouterr().out


def test_several_layers_are_each_the_run_that_it_is_alone(run, place, tmp_path, capsys):
    given = options(place, tmp_path, layer=-1, layers="1,0")
    assert main(["harvest", *given]) == 0
    assert main(["run", *given]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"layer-0", "layer-1"}
    apart = {"seconds.json", "report.md"}  # the time is theirs
    made, alone = files(tmp_path / "layer-1"), files(run)
    assert made.keys() == alone.keys()
    assert all(made[name] == alone[name] for name in alone.keys() - apart)
    assert "resid_post 0" in capsys.readouterr().out
    assert main(["run", *options(place, tmp_path / "layer-0", layer=0)]) == 0  # it goes on as one
    assert (
        main(["run", *options(place, tmp_path / "all", layer=-1, layers="all"), "--dry-run"]) == 0
    )
    said = capsys.readouterr().out
    assert all(f"resid_post {i}, measured" in said for i in range(3))
    assert "share one pass" in said and not (tmp_path / "all").exists()


def test_the_order_of_stages_is_said(place, tmp_path, capsys):
    assert main(["train", *options(place, tmp_path)]) == 2
    assert "run the harvest first" in capsys.readouterr().err
    assert main(["harvest", *options(place, tmp_path)]) == 0
    assert main(["features", *options(place, tmp_path)]) == 2
    assert "run the training first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        ({"k": 49}, "k is 49, and the dictionary has 48 latents"),
        ({"tokens": 63}, "63 tokens are fewer than one batch of 64"),
        ({"steps": 0}, "steps is 0: it has to be 1 or more"),
        ({"rate": -1}, "rate is -1.0: it has to be 0 or more"),
        ({"layer": 3}, "needs a layer from 0 to 2"),
        ({"site": "resid"}, "There is no site 'resid'"),
        ({"text": "nothing.txt"}, "There is no text at 'nothing.txt'"),
        ({"model": "./nowhere"}, "there is no such folder"),
        ({"dtype": "int8"}, "dtype is 'int8': choose one of bfloat16"),
        ({"config": "none.toml"}, "There is no configuration at none.toml"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(place, tmp_path, change, says, capsys):
    assert main(["run", *options(place, tmp_path / "run", **change)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("shard*"))


# -- one folder, several processes -----------------------------------------------------------


@pytest.fixture
def held_elsewhere(tmp_path):
    """(folder, process): a run's folder, and another process that holds it."""
    told = context().Queue()
    process = context().Process(target=holds, args=(tmp_path / "run", told))
    process.start()
    assert told.get(timeout=120) == "in"
    yield tmp_path / "run", process
    process.kill()
    process.join()


@needs_fork
def test_a_second_process_is_told_who_is_at_work(held_elsewhere, place, capsys):
    folder, process = held_elsewhere
    assert main(["harvest", *options(place, folder)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"{re.escape(str(folder))} is in use by process {process.pid} on \S+ since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d: wait until it has ended, or choose another folder\.\n",
        said,
    )
    assert ship.main_train(run=folder, ship=False) == 1
    assert capsys.readouterr().err == said
    assert main(["harvest", "--dry-run", *options(place, folder)]) == 0  # it writes nothing
    assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
    process.kill()
    process.join()
    assert main(["harvest", *options(place, folder)]) == 0  # the killed one's lock is nobody's
    assert {path.name for path in folder.iterdir()} == {"harvest"}


@needs_fork
def test_of_processes_that_start_at_once_one_gets_the_folder(tmp_path):
    told, made = context().Queue(), context()
    racing = [made.Process(target=holds, args=(tmp_path / "run", told)) for _ in range(4)]
    for process in racing:
        process.start()
    said = sorted(told.get(timeout=120) for _ in racing)
    for process in racing:
        process.kill()
        process.join()
    assert said[-1] == "in" and len(set(said[:-1])) == 1
    (winner,) = [each.pid for each in racing if f"process {each.pid} on" in said[0]]
    assert winner


@needs_fork
def test_ranks_are_one_run_and_all_of_them_stop_where_another_holds_the_folder(
    held_elsewhere, place, tmp_path
):
    def together(folder, name):
        argv = ["harvest", "--device", "cpu", *options(place, folder)]
        given = [(rank, 2, tmp_path / name, argv) for rank in (0, 1)]
        ranks = [context().Process(target=command_of_many, args=each) for each in given]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        return [process.exitcode for process in ranks]

    assert together(held_elsewhere[0], "meet-1") == [1, 1]
    assert together(tmp_path / "own", "meet-2") == [0, 0]
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"harvest"}


@needs_fork
def test_the_librarys_calls_take_the_lock_too(held_elsewhere, place, tmp_path):
    folder, process = held_elsewhere
    text, config = open_source(str(place / "text.txt")), HarvestConfig(("embed", None), tokens=300)
    config = replace(config, context=12)
    held = made_harvest(tmp_path / "held", sparse_data(300))
    with pytest.raises(InUse, match=f"in use by process {process.pid}"):
        harvest(tiny_model(), text, folder, config, progress=False)
    with pytest.raises(InUse, match=f"in use by process {process.pid}"):
        train(held, folder, TrainConfig(latents=24, k=3, batch=32, steps=2), progress=False)
    assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}


def test_who_holds_a_folder_has_it_again_but_not_in_another_thread(tmp_path):
    def other():
        try:
            with alone_in(tmp_path):
                said.append("in")
        except InUse as error:
            said.append(str(error))

    said, thread = [], threading.Thread(target=other)
    with alone_in(tmp_path), alone_in(tmp_path / ".." / tmp_path.name):
        thread.start()
        thread.join()
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, HOLDER}
    assert f"in use by process {os.getpid()}" in said[0]
    with alone_in(tmp_path):
        pass


def test_a_folder_is_left_as_it_was_where_nothing_is_written(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with alone_in(folder):
            assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER}
    assert not list(tmp_path.iterdir())


def test_where_the_disk_knows_no_locks_it_goes_on_without_one(tmp_path, monkeypatch):
    def none(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", none)
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    place, tmp_path, code, monkeypatch, capsys
):
    def fails(self):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", fails)
    assert main(["harvest", *options(place, tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and LOCK in said and "could not be written" in said


FOREIGN = ["model.part", "film.mp4.part", ".tmp123456", ".mi-helpers-notes.part", "a.safetensors"]


def test_what_others_have_in_a_runs_folder_stays(place, tmp_path):
    """Downloads in progress, folders, links: only what a killed write of ours left is removed."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    mine = [here / ".mi-helpers-abcd_123.part" for here in (folder, folder / "harvest")]
    for each in (folder, folder / "harvest", outside, *mine):
        each.mkdir(exist_ok=True)
        for name in FOREIGN:
            (each / name).write_text(name)
        (each / "folder.part").mkdir()
        (each / "folder.part" / "x").write_text("x")
    for each in (folder, folder / "harvest"):
        (each / ".mi-helpers-abcd_124.part").write_text("a file")
        (each / ".mi-helpers-abcd_125.part").symlink_to(outside, target_is_directory=True)
        (each / "link.part").symlink_to(outside / "model.part")
    before = files(tmp_path)
    assert main(["run", *options(place, folder)]) == 0
    gone = before.keys() - files(tmp_path).keys()
    assert gone and all(".mi-helpers-abcd_123.part/" in name for name in gone)
    assert not any(each.exists() for each in mine)
    mine[0].mkdir()
    assert main(["report", *options(place, folder)]) == 0
    assert not mine[0].exists()
    after = files(tmp_path)
    assert {name: after[name] for name in before.keys() - gone} == {
        name: before[name] for name in before.keys() - gone
    }


def test_nothing_is_swept_from_a_folder_that_is_no_runs(tmp_path):
    stale = tmp_path / ".mi-helpers-abcd_123.part"
    stale.mkdir()
    sweep(tmp_path, "plan.json")
    assert stale.exists()
    (tmp_path / "plan.json").write_text("{}")
    sweep(tmp_path, "plan.json")
    assert not stale.exists()


# -- settings --------------------------------------------------------------------------------


def toml(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = toml(tmp_path, 'k = 7\nsteps = 9\noutlier = 5\nsite = "z"\n')
    found = read_settings({"k": 3}, path)
    assert (found.k, found.steps, found.outlier, found.site, found.batch) == (3, 9, 5.0, "z", 4_096)


@pytest.mark.parametrize(
    "text, says",
    [
        ("latent = 5", "unknown key 'latent': did you mean 'latents'"),
        ("k = 'x'", "k is 'x' in .*: it has to be of type int"),
        ("k = true", "k is True in .*: it has to be of type int"),
        ("k 5", "is not TOML"),
        ('activation = "tanh"', "activation is 'tanh': choose one of topk, batchtopk, relu"),
    ],
)
def test_a_bad_file_is_said(tmp_path, text, says):
    with pytest.raises(RunError, match=says):
        read_settings({}, toml(tmp_path, text))


def test_sites_default_to_the_middle_layer():
    assert Settings().sites(26) == (("resid_post", 13), None)
    assert Settings(layer=12).sites(26) == (("resid_post", 12), None)
    both = Settings(site="mlp_in", target="mlp_out", layer=2).sites(6)
    assert both == (("mlp_in", 2), ("mlp_out", 2))
    assert Settings(site="embed").sites(6) == (("embed", None), None)
    assert Settings().training(144).latents == 1_152


def test_every_setting_of_training_can_be_set():
    assert {f for f in TrainConfig.__dataclass_fields__} <= {
        f for f in Settings.__dataclass_fields__
    }


def test_the_reference_runs_configuration_is_the_reference_run():
    found = read_settings({}, ROOT / "config" / "gemma_2_2b.toml")
    assert found.sites(26) == (("resid_post", 12), None)
    config = found.training(2_304)
    assert (found.tokens, config.latents, config.k) == (500_000, 18_432, 32)
    assert (config.batch, config.steps, config.latents // 2_304) == (4_096, 5_000, 8)


TINY = {  # of the page's words and numbers, what a test can run
    "tokens": 1_000,
    "context": 12,
    "latents": 48,
    "k": 4,
    "batch": 64,
    "steps": 30,
    "layer": 1,
}
PAGES = {"notebooks/06_sparse_autoencoder.ipynb": 3, "docs/pipeline.md": 3}  # and their commands


def commands_of(page):
    """The commands of ours that a page tells whoever has Gemma 2 2B's weights to type."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".ipynb"):
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        (text,) = [cell for cell in cells if cell.startswith("## On Gemma 2 2B")]
    lines = re.findall(r"^ *`?python -m mi_helpers ([^`\n]+)", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if "gemma" in line]


def tiny_config(place, folder):
    """The reference run's own file, each of its settings kept or made small."""
    settings = tomllib.loads((ROOT / "config" / "gemma_2_2b.toml").read_text("utf-8"))
    texts = {"folder": folder / "run", "model": place / "model", "text": place / "text.txt"}
    settings |= TINY | {key: str(path) for key, path in texts.items()}
    (folder / "own.toml").write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items())
    )
    return settings


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs_at_tiny_scale(page, place, tmp_path, capsys):
    commands, settings = commands_of(page), tiny_config(place, tmp_path)
    assert len(commands) == PAGES[page]
    here = {
        "config/gemma_2_2b.toml": tmp_path / "own.toml",
        "runs/gemma_2_2b": tmp_path / "run",
        "google/gemma-2-2b": place / "model",
        "my.txt": place / "text.txt",
        "runs/lens": tmp_path / "lens",
        "virus": "cat",
    }
    more = {"lens": ["--tokens", "400", "--steps", "2"]}
    for name, *given in commands:
        argv = [name, *(str(here.get(word, word)) for word in given), *more.get(name, [])]
        assert not re.search("gemma|hf:", " ".join(argv).replace(str(tmp_path), ""))
        assert main(argv) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        if "--dry-run" in argv:
            assert "30 steps of 64 rows" in said and not (tmp_path / "run").exists()
        elif name == "find":
            assert "fires at it in" in said  # some latent of the run does
        elif name == "run":
            assert (tmp_path / "run" / "latents.jsonl").is_file()
            assert json.loads((tmp_path / "run" / "recipe.json").read_text())["steps"] == 30
    assert settings["dtype"] == "bfloat16" and "site" in settings  # kept from the real file


# -- dry runs --------------------------------------------------------------------------------


def test_a_dry_run_says_hours_memory_and_disk_and_writes_nothing(place, tmp_path, capsys):
    assert main(["run", *options(place, tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["harvest", "train", "features", "together"]
    assert "1,000 tokens through 2 of 3 blocks" in said and "30 steps of 64 rows" in said
    assert "fits" in lines[-1] and "GB of disk free" in lines[-1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_reference_model_without_its_weights():
    config = estimate.shape_of("google/gemma-2-2b")
    assert estimate.parameters(config) == 2_614_341_888
    with pytest.raises(RunError.__bases__[0], match="no/such-model is not on this machine"):
        estimate.shape_of("no/such-model")


def test_the_estimate_scales_as_it_should(place, monkeypatch):
    """Whatever the time of a batch: here it is one second."""
    monkeypatch.setattr(estimate, "median_seconds", lambda work: work() is None or 1.0)
    config = AutoConfig.from_pretrained(place / "model")
    plan = HarvestConfig(("resid_post", 1), tokens=1_000, context=12, batch_tokens=60)
    small = estimate.harvest_stage(config, torch.float32, plan)
    large = estimate.harvest_stage(config, torch.float32, replace(plan, tokens=50_000))
    assert large.disk == 50 * small.disk and large.seconds == pytest.approx(50 * small.seconds)
    one = estimate.train_stage(TrainConfig(latents=64, k=4, batch=64, steps=10), 12, None, 1_000, 1)
    two = estimate.train_stage(
        TrainConfig(latents=128, k=4, batch=64, steps=10), 12, None, 1_000, 1
    )
    assert two.disk == 2 * one.disk and two.memory > one.memory


def test_blocks_that_a_site_needs():
    sites = {
        ("embed", None): 0,
        ("resid_pre", 3): 3,
        ("resid_post", 3): 4,
        ("resid_final", None): 6,
    }
    assert {site: blocks_needed(site, 6) for site in sites} == sites


def test_the_verdict():
    assert verdict(1e9, 1e9, 2e9, 2e9) == "it fits."
    assert "barely" in verdict(1.9e9, 1e9, 2e9, 2e9)
    assert "memory is too small" in verdict(3e9, 1e9, 2e9, 2e9)
    assert "disk is too small" in verdict(1e9, 3e9, 2e9, 2e9)
    lines = estimate.sentences([Stage("harvest", "how", 7_200, 3e9, 1e9)], ROOT)
    assert lines[0].startswith("harvest       2.0 h  memory   3.0 GB  disk   1.0 GB  how")


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in Settings.__dataclass_fields__)
    assert "(4096)" in shown and "--dry-run" in shown


def test_an_option_is_given_or_it_is_not(monkeypatch):
    given = []
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: given.append(args))
    assert main(["run", "--skip", "--warm-up", "0.1", "--layer", "-1", "--dry-run"]) == 0
    assert given == [("run", Settings(skip=True, warm_up=0.1), True)]
