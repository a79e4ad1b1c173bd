"""Training on a harvest: schedule, metrics, checkpoints, kills, several processes."""

import math
import random
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from made_harvest import made_harvest, sparse_data
from pipeline_worker import (
    CONFIG,
    context,
    die_at,
    finish_run,
    killed_after,
    one_of_many,
    results,
    work,
    write_text,
)

from mi_helpers.files import RunError
from mi_helpers.saes import training
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.files import load_coder
from mi_helpers.saes.pipeline import Settings
from mi_helpers.saes.training import TrainConfig, learning_rate, peak_rate, quality, read_log, train

LEARN = TrainConfig(
    latents=64,
    k=3,
    products="float32",
    batch=256,
    steps=300,
    held_out=500,
    log_every=50,
    save_every=100,
)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return made_harvest(tmp_path_factory.mktemp("h"), sparse_data(5_000), shard_rows=900)


@pytest.fixture(scope="module")
def trained(held, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(held, folder, LEARN, progress=False), folder


# -- the schedule and the metrics ------------------------------------------------------------


def test_the_rate_rises_stays_and_falls():
    config = TrainConfig(latents=64, steps=100, rate=1.0, warm_up=0.1, decay=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:50] == [1.0] * 40
    assert rates[50:] == pytest.approx([i / 50 for i in range(50, 0, -1)])
    assert learning_rate(50, replace(config, rate=0.0)) == peak_rate(64)


def test_the_rule_falls_with_the_width():
    assert peak_rate(16) == peak_rate(4_096)
    assert peak_rate(16_384) == pytest.approx(peak_rate(4_096) / 2)


def test_quality_by_hand():
    """One latent along each axis, k = 1: the smaller coordinate is lost."""
    coder = SparseCoder(2, 2, k=1)
    with torch.no_grad():
        coder.W_enc.copy_(torch.eye(2)), coder.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0], [5.0, 0.0], [-1.0, -2.0]])
    found = quality(coder, x, chunk=3)
    error = 1 + 1 + 0 + 5
    spread = 1 + 1 + 9 + 9 + 0.75**2 + 1.75**2 + 0.25**2 + 2.25**2  # around (2, 0.25)
    assert found["nmse"] == pytest.approx(error / spread)
    assert found["explained_variance"] == pytest.approx(1 - error / spread)
    assert found["relative_error"] == pytest.approx(error / (10 + 5 + 25 + 5))
    assert found["l0"] == 3 / 4


def test_it_learns_and_the_log_says_so(trained, held):
    coder, folder = trained
    log = read_log(folder / "log.csv")
    assert [row["step"] for row in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["explained_variance"] > max(0.86, log[0]["explained_variance"])
    assert all(row["l0"] <= 3 for row in log) and 0 <= log[-1]["dead"] <= 1
    n = training.split(held, LEARN)
    assert n == 4_500
    x, _ = held.slice(n, held.rows)
    again = quality(coder, x)
    assert again["explained_variance"] == pytest.approx(log[-1]["explained_variance"], abs=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "coder",
        "log.csv",
        "recipe.json",
        "seconds.json",
    ]


def test_a_latent_is_dead_after_an_epoch_of_silence(held, tmp_path):
    run = training.Run(
        held, tmp_path, LEARN, training.keep_config(tmp_path, LEARN, held, training.ALONE)
    )
    assert training.dead_window(LEARN, run.n) == 4_500
    assert training.dead_window(replace(LEARN, dead_after=99), run.n) == 99
    run.step.tokens_since_fired[:16] = 4_500
    run.step.tokens_since_fired[16:20] = 4_499
    assert run.log({"loss": 1.0})["dead"] == 16 / 64


def test_held_out_rows_are_never_trained_on(held, tmp_path, monkeypatch):
    asked = []
    real = training.Shuffled.rows
    monkeypatch.setattr(
        training.Shuffled, "rows", lambda s, a, b: asked.append(s.n) or real(s, a, b)
    )
    train(held, tmp_path, replace(LEARN, steps=3), progress=False)
    assert set(asked) == {4_500}


def test_a_transcoder_learns_its_target(tmp_path):
    x = sparse_data(4_000, d=12)
    target = torch.relu(x @ torch.randn(12, 9, generator=torch.Generator().manual_seed(1)))
    held = made_harvest(tmp_path / "h", x, target)
    coder = train(held, tmp_path, replace(LEARN, k=6), progress=False)
    assert (coder.d_in, coder.d_out) == (12, 9)
    log = read_log(tmp_path / "log.csv")
    assert log[-1]["explained_variance"] > 0.8 > log[0]["explained_variance"]


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"batch": 4_600}, "4,500 rows to train on, fewer than one batch of 4,600"),
        ({"steps": 0}, "steps is 0: it has to be 1 or more"),
        ({"k": 65}, "k is 65, and the dictionary has 64 latents"),
        (
            {"products": "fast"},
            "products is 'fast': choose one of auto, float32, bfloat16, int8",
        ),
        ({"activation": "softmax"}, "no activation 'softmax'"),
    ],
)
def test_bad_configurations_are_said_before_anything_is_written(held, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        train(held, tmp_path / "run", replace(LEARN, **change), progress=False)
    assert not (tmp_path / "run").exists()


def test_another_configuration_or_harvest_in_a_folder_is_said(trained, held, tmp_path):
    with pytest.raises(RunError, match="holds a run with k 3, not 5"):
        train(held, trained[1], replace(LEARN, k=5), progress=False)
    other = made_harvest(tmp_path, sparse_data(5_000, seed=1))
    with pytest.raises(RunError, match="holds a run with another harvest"):
        train(other, trained[1], LEARN, progress=False)


def test_a_loss_that_is_not_finite_is_said(held, tmp_path, monkeypatch):
    step = training.SparseStep.__call__
    monkeypatch.setattr(
        training.SparseStep, "__call__", lambda s, *a: step(s, *a) | {"loss": math.nan}
    )
    with pytest.raises(RunError, match="The loss became nan at step 50: choose a lower --rate"):
        train(held, tmp_path, LEARN, progress=False)


# -- killed ----------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 99, 100, 149, 150, 299])
def test_stopped_after_any_step_it_ends_the_same(trained, held, tmp_path, at, monkeypatch):
    real = training.Run.advance

    def stops(run):
        if run.step_number == at:
            raise Stopped
        return real(run)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training.Run, "advance", stops)
        train(held, tmp_path, LEARN, progress=False)
    with open(tmp_path / "log.csv", "a") as log:
        log.write("350,0.1")  # a torn line
    train(held, tmp_path, LEARN, progress=False)
    assert results(tmp_path) == results(trained[1])


def test_a_damaged_checkpoint_is_named(held, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "finish_coder", lambda *_: (_ for _ in ()).throw(Stopped))
        train(held, tmp_path, LEARN, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        RunError,
        match="checkpoint.safetensors is truncated.*Delete checkpoint.safetensors to train",
    ):
        train(held, tmp_path, LEARN, progress=False)


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder)
    work(folder / "run", folder)
    return folder, results(folder / "run")


@needs_fork
def test_killed_at_chosen_places_of_writing_it_ends_with_the_same_bytes(uninterrupted, tmp_path):
    """One run, SIGKILLed again and again at places of its writing, each time a few calls later."""
    text, expected = uninterrupted
    killed = 0
    for call in (0, 1, 2, 3, 5, 8, 4, 9, 13, 6, 11, 3):
        process = context().Process(target=die_at, args=(call, tmp_path / "run", text))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 8
    assert finish_run(tmp_path / "run", text) == 0
    assert results(tmp_path / "run") == expected


@needs_fork
def test_killed_at_random_times_it_ends_with_the_same_bytes(uninterrupted, tmp_path):
    text, expected = uninterrupted
    for name in ("first", "timed"):  # the first one waits for the server to start
        start = time.monotonic()
        assert finish_run(tmp_path / name, text) == 0
    length, rng, killed, runs = time.monotonic() - start, random.Random(0), 0, 0
    while killed < 8 and runs < 12:
        runs += 1
        folder, before = tmp_path / f"run-{runs}", killed
        while killed_after(length * rng.uniform(0.2, 0.8), folder, text):
            killed += 1
            if killed == before + 6:  # on a machine that has become slower it would never end
                assert finish_run(folder, text) == 0
                break
        length *= 1 if killed > before else 0.5  # the machine has become faster
        assert results(folder) == expected
    assert killed >= 5


# -- several processes -----------------------------------------------------------------------


def together(folder, text, config):
    """Two processes on one run; their exit codes have to be 0."""
    folder.mkdir()
    ranks = [
        context().Process(target=one_of_many, args=(rank, 2, folder, text, config))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]


@needs_fork
def test_two_processes_equal_one(uninterrupted, tmp_path):
    """The harvest is the same to the last bit; the training but for the order of its sums."""
    text, expected = uninterrupted
    folder = tmp_path / "run"
    together(folder, text, CONFIG)
    found = results(folder)
    assert found.keys() == expected.keys()
    same = [name for name in expected if name.startswith("h/") or name == "recipe.json"]
    assert len(same) > 6 and all(found[name] == expected[name] for name in same)
    one, two = (load_coder(each / "coder") for each in (text / "run", folder))
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, two.state_dict()[name], atol=2e-4), name
    logs = [read_log(each / "log.csv") for each in (text / "run", folder)]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@needs_fork
def test_two_processes_with_whole_chunks_of_rows_equal_one_to_the_last_bit(uninterrupted, tmp_path):
    """The encoder's product takes 256 rows at a time; each process has as many as that."""
    text, _ = uninterrupted
    config = replace(CONFIG, batch=512)
    alone = context().Process(target=work, args=(tmp_path / "one", text, None, config))
    alone.start()
    alone.join(120)
    together(tmp_path / "two", text, config)
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and "coder/sae_weights.safetensors" in one
    assert [name for name in one if one[name] != two[name]] in (
        [],
        ["log.csv", "coder/SHA256SUMS"],  # the loss's sum, and the log's checksum
    )


def test_a_batch_that_cannot_be_shared_is_said(held, tmp_path):
    three = training.Processes(0, 3)
    with pytest.raises(RunError, match="A batch of 256 cannot be shared by 3 processes"):
        train(held, tmp_path, LEARN, processes=three, progress=False)


def test_the_workers_train_for_more_than_an_epoch():
    assert CONFIG.batch * CONFIG.steps > 900  # more than one epoch of what the workers harvest


# -- extended --------------------------------------------------------------------------------


MORE = replace(LEARN, steps=450)


@pytest.fixture(scope="module")
def extended(held, tmp_path_factory):
    """A run of 300 steps, with a report beside it, extended to 450."""
    folder = tmp_path_factory.mktemp("extended")
    first = train(held, folder, LEARN, progress=False)
    (folder / "report.md").write_text("of 300 steps")
    before = results(folder)
    return first, before, train(held, folder, MORE, progress=False), folder


def test_a_finished_run_goes_on_to_more_steps(extended, held):
    first, before, coder, folder = extended
    log = read_log(folder / "log.csv")
    assert [row["step"] for row in log] == list(range(50, 451, 50))
    assert log[-1]["explained_variance"] > log[5]["explained_variance"] + 0.002
    x, _ = held.slice(4_500, held.rows)
    assert quality(coder, x)["explained_variance"] == pytest.approx(
        log[-1]["explained_variance"], abs=1e-4
    )
    assert training.read_sealed(folder / "recipe.json")["steps"] == 450
    kept = load_coder(folder / "coder-300")
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), kept.parameters(), strict=True)
    )
    assert (folder / "coder-300" / "report.md").read_bytes() == before["report.md"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "coder",
        "coder-300",
        "log.csv",
        "recipe.json",
        "seconds.json",
    ]
    again = train(held, folder, MORE, progress=False)  # it is done, and stays as it is
    assert torch.equal(again.W_dec, coder.W_dec)


def test_it_goes_on_from_the_coder_with_the_rows_that_come_next(held, tmp_path, monkeypatch):
    """At a rate of nearly nothing, the added steps leave the coder as it is."""
    first = train(held, tmp_path, replace(LEARN, steps=40), progress=False)
    asked = []
    real = training.Shuffled.rows
    monkeypatch.setattr(
        training.Shuffled, "rows", lambda s, a, b: asked.append((a, b)) or real(s, a, b)
    )
    monkeypatch.setattr(training, "learning_rate", lambda *_: 1e-12)
    second = train(held, tmp_path, replace(LEARN, steps=43), progress=False)
    assert [pair for pair in asked if pair[0]] == [(256 * i, 256 * i + 256) for i in (40, 41, 42)]
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_the_rate_rises_anew_over_the_added_steps():
    config = TrainConfig(latents=64, steps=300, rate=1.0, warm_up=0.1, decay=0.5)
    added = [learning_rate(step, config, 200) for step in range(200, 300)]
    assert added == [learning_rate(step, replace(config, steps=100)) for step in range(100)]


def test_only_a_finished_run_is_extended_and_only_by_more_steps(
    extended, held, tmp_path, monkeypatch
):
    with pytest.raises(RunError, match="holds a run with steps 450, not 300"):
        train(held, extended[3], LEARN, progress=False)
    with pytest.raises(RunError, match="holds a run with k 3, not 5"):
        train(held, extended[3], replace(MORE, steps=500, k=5), progress=False)
    (extended[3] / "coder-450").mkdir()
    with pytest.raises(RunError, match="coder-450 is there already: move it away"):
        train(held, extended[3], replace(MORE, steps=500), progress=False)
    (extended[3] / "coder-450").rmdir()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "finish_coder", lambda *_: (_ for _ in ()).throw(Stopped))
        train(held, tmp_path, LEARN, progress=False)
    with pytest.raises(
        RunError, match="300 steps that is not finished: finish it with --steps 300"
    ):
        train(held, tmp_path, MORE, progress=False)


@pytest.mark.parametrize("call", ["save_tensors", "write_sealed", "put_aside", "rename", "advance"])
def test_killed_while_it_is_extended_it_ends_the_same(extended, held, tmp_path, call, monkeypatch):
    """Stopped after the checkpoint, the recipe, a moved report, the moved coder, and a step."""
    train(held, tmp_path, LEARN, progress=False)
    (tmp_path / "report.md").write_text("of 300 steps")

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if call in ("save_tensors", "write_sealed"):
            real = getattr(training, call)
            patch.setattr(training, call, lambda *a: (real(*a), stop()))
        elif call == "put_aside":
            patch.setattr(type(tmp_path), "rename", stop)
        elif call == "rename":
            patch.setattr(training.Run, "begin", stop)
        else:
            patch.setattr(training.Run, "log", stop)
        train(held, tmp_path, MORE, progress=False)
    train(held, tmp_path, MORE, progress=False)
    assert results(tmp_path) == results(extended[3])


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_every_activation_is_extended(held, tmp_path, activation):
    config = replace(LEARN, steps=20, activation=activation)
    first = train(held, tmp_path, config, progress=False)
    recipe = training.read_sealed(tmp_path / "recipe.json") | {"steps": 30, "begun": 20}
    run = training.Run(held, tmp_path, replace(config, steps=30), recipe, finished=first)
    again = run.coder.folded()
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    train(held, tmp_path, replace(config, steps=30), progress=False)


# -- Matryoshka ------------------------------------------------------------------------------


def test_a_matryoshka_run_keeps_its_prefixes(held, tmp_path, monkeypatch):
    config = replace(LEARN, steps=60, save_every=20, prefixes=(8, 24))
    coder = train(held, tmp_path / "whole", config, progress=False)
    assert coder.prefixes == (8, 24, 64)
    real = training.Run.advance

    def stops(run):
        if run.step_number == 30:
            raise Stopped
        return real(run)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training.Run, "advance", stops)
        train(held, tmp_path / "run", config, progress=False)
    with pytest.raises(RunError, match=r"holds a run with prefixes \[8, 24\], not \[\]"):
        train(held, tmp_path / "run", replace(config, prefixes=()), progress=False)
    train(held, tmp_path / "run", config, progress=False)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_run_of_before_there_were_prefixes_goes_on(held, tmp_path):
    config = replace(LEARN, steps=10)
    train(held, tmp_path, config, progress=False)
    recipe = training.read_sealed(tmp_path / "recipe.json")
    del recipe["prefixes"]
    training.write_sealed(tmp_path / "recipe.json", recipe)
    training.check_recipe(tmp_path, training.asdict(config))
    with pytest.raises(RunError, match=r"holds a run with prefixes None, not \[8\]"):
        training.check_recipe(tmp_path, training.asdict(replace(config, prefixes=(8,))))


def test_prefixes_are_read_from_an_option():
    assert Settings(prefixes="8, 24").training(4).prefixes == (8, 24)
    assert Settings().training(4).prefixes == ()
    with pytest.raises(RunError, match="prefixes is '8,x': give widths, as 256,1024"):
        Settings(prefixes="8,x").training(4)
