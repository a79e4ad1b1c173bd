"""Whole runs, killed at random moments or two at a time in one folder, end with the same bytes.

A few of each here; by hand as many as wanted:

    MI_KILLS=100 MI_RACES=50 python -m pytest -s tests/saes/test_races_and_kills.py
"""

import collections
import contextlib
import os
import random
import signal
import sys
import time

import pytest
import torch
from pipeline_worker import context
from test_pipeline import options
from tiny_models import sentences, tiny_model

from mi_helpers.__main__ import main
from mi_helpers.files import RunError
from mi_helpers.loading import load_model
from mi_helpers.saes.harvest import harvest
from mi_helpers.saes.pipeline import HARVEST, Settings
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import train

KILLS, RACES = (int(os.environ.get(name, 4)) for name in ("MI_KILLS", "MI_RACES"))
OWN = ("seconds.json", "report.md")  # the time is theirs
LIBRARY = "library"  # harvest() and train() are called, not the command
STAGES = ("run", "run", "harvest", "train", "report", LIBRARY)
SMALL = {
    "tokens": 300,
    "shard-tokens": 60,
    "latents": 24,
    "batch": 32,
    "held-out": 30,
    "steps": 8,
    "save-every": 2,
    "log-every": 2,
    "loss-tokens": 60,
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def work(stage, place, folder, k):
    """A command, or the library's calls, in a process of its own; it ends with the exit code."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if stage != LIBRARY:
        os._exit(main([stage, *options(place, folder, k=k, **SMALL)]))
    given = dict(zip(*[iter(options(place, folder, k=k, **SMALL))] * 2, strict=True))
    kinds = {name: type(value) for name, value in vars(Settings()).items()}
    named = {key[2:].replace("-", "_"): value for key, value in given.items()}
    s = Settings(**{name: kinds[name](value) for name, value in named.items()})
    model = load_model(s.model)
    with contextlib.suppress(RunError):
        held = harvest(model, open_source(s.text), folder / HARVEST, s.harvest(3), progress=False)
        train(held, folder, s.training(held.d_in), progress=False)
        os._exit(0)
    os._exit(1)


def started(*args):
    process = context().Process(target=work, args=args)
    process.start()
    return process


def ended(*args):
    """The exit code of a process that is left alone."""
    process = started(*args)
    process.join(600)
    return process.exitcode


def results(folder):
    """Every file's bytes, and every folder, but for what holds a time."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {n: p.read_bytes() if p.is_file() else b"" for n, p in names.items() if n not in OWN}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, and for two k what a run leaves that is left alone; how long it takes."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(sentences(60)))
    assert ended("run", folder, folder / "first", 4) == 0  # the server starts
    expected = {}
    for k in (4, 5):
        begin = time.monotonic()
        assert ended("run", folder, folder / f"k{k}", k) == 0
        length = time.monotonic() - begin
        expected[k] = results(folder / f"k{k}")
    assert results(folder / "first") == expected[4] != expected[5]
    return folder, expected, length


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(place, tmp_path):
    folder, expected, length = place
    rng, killed, runs, at = random.Random(KILLS), 0, 0, collections.Counter()
    while killed < KILLS:
        runs, code = runs + 1, None
        own = tmp_path / f"run-{runs}"
        while code != 0:
            process = started("run", folder, own, 4)
            process.join(600 if killed >= KILLS else rng.uniform(0, 1.3) * length)
            process.kill()
            process.join()
            code = process.exitcode
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            at[reached(own)] += code != 0
        assert results(own) == expected[4]
    print(
        f"\n{killed} kills over {runs} runs of {len(expected[4])} files: none differs; {dict(at)}"
    )


def reached(folder):
    """How far a run has come."""
    marks = ("latents.jsonl", "report.json", "coder", "checkpoint.safetensors", "recipe.json")
    marks += ("harvest/manifest.json", "harvest/shard-00000.safetensors", "harvest/plan.json")
    return next((mark for mark in marks if (folder / mark).exists()), "nothing")


def test_two_processes_at_once_leave_what_one_of_them_would(place, tmp_path):
    folder, expected, length = place
    rng, codes, seen = random.Random(RACES), collections.Counter(), collections.Counter()
    for race in range(RACES):
        own = tmp_path / f"race-{race}"
        if rng.random() < 0.3:
            assert ended(rng.choice(["harvest", "run"]), folder, own, 4) == 0
        both = [started(rng.choice(STAGES), folder, own, rng.choice((4, 4, 5)))]
        time.sleep(rng.choice((0, rng.uniform(0, length))))
        both.append(started(rng.choice(STAGES), folder, own, rng.choice((4, 4, 5))))
        for process in both:
            process.join(600)
        found = tuple(process.exitcode for process in both)
        assert set(found) <= {0, 1, 2}  # 2: its harvest is not there yet, or another k's run is
        codes[found] += 1
        done = [k for k in (4, 5) if ended("run", folder, own, k) == 0]
        assert len(done) == 1 or not any(found)
        assert results(own) == expected[done[0]]
        seen[done[0]] += 1
    print(f"\n{RACES} races: none spoils the folder; exit codes {dict(codes)}, k {dict(seen)}")
