"""What the processes of the pipeline's tests run: a harvest and a training on a tiny model.

They are forked from a server that has imported torch once, so each starts at once.
"""

import multiprocessing
import os
import signal
import sys
import time

import torch
from tiny_models import sentences, tiny_model

from mi_helpers import files as durable
from mi_helpers.__main__ import main
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.processes import RENDEZVOUS, finish, start
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, train

PRELOAD = ["mi_helpers.saes.training", "mi_helpers.saes.harvest", "transformers.models.gemma2"]
SMALL = HarvestConfig(("resid_post", 1), tokens=900, context=12, shard_tokens=150, batch_tokens=60)
CONFIG = TrainConfig(
    latents=48,
    k=4,
    products="bfloat16",
    batch=64,
    steps=24,
    held_out=64,
    log_every=4,
    save_every=6,
    dead_after=400,
)


def context():
    """Processes are forked from a server that has imported what takes long."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    return made


def write_text(folder):
    """The text that `work` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join(sentences(100)) + "\n")


def work(folder, text, processes=None, config=CONFIG):
    """Harvest and train; what is done already is not done again."""
    torch.set_num_threads(1)
    source = open_source(str(text / "text.txt"))
    more = {"processes": processes} if processes else {}
    held = harvest(tiny_model(), source, folder / "h", SMALL, progress=False, **more)
    train(held, folder, config, progress=False, **more)


def die_at(call, folder, text):
    """SIGKILL to itself at the `call`-th of: before a write, when safetensors has begun a file of
    its own, half-way through, at a flush, at a rename."""
    calls = iter(range(10**6))

    def count():
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(tensors, path, metadata):
        count()
        own = path.with_name(f".tmp{os.getpid() % 10**6:06d}")  # named as safetensors names it
        own.touch()
        count()
        own.unlink()
        save(tensors, path, metadata)
        with open(path, "r+b") as file:  # as if the kill came half-way through the file
            size = file.seek(0, 2)
            data = file.seek(size // 2) and file.read()
            file.truncate(size // 2)
        count()
        with open(path, "ab") as file:
            file.write(data)

    def before(function):
        def run(*args):
            count()
            return function(*args)

        return run

    save = durable.save_file
    durable.save_file = torn
    durable.flush = before(durable.flush)
    durable.os.replace = before(os.replace)
    work(folder, text)


def one_of_many(rank, size, folder, text, config=CONFIG):
    """Process `rank` of `size`, which meet in a file and speak over the loopback device alone."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ[RENDEZVOUS] = f"file://{folder}/meet"
    work(folder, text, start("cpu"), config)
    finish()


def holds(folder, told):
    """Hold a run's folder until it is killed; `told` gets "in", or why it could not."""
    try:
        with durable.alone_in(folder):
            told.put("in")
            time.sleep(600)
    except durable.RunError as error:
        told.put(str(error))


def command_of_many(rank, size, meet, argv):
    """Process `rank` of `size` runs a command, and ends with its exit code."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ[RENDEZVOUS] = f"file://{meet}"
    sys.exit(main(argv))


def killed_after(seconds, folder, text):
    """Run `work` in a process and SIGKILL it after some seconds; whether it was still running."""
    process = context().Process(target=work, args=(folder, text))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish_run(folder, text):
    """Run `work` in a process to its end; its exit code."""
    process = context().Process(target=work, args=(folder, text))
    process.start()
    process.join()
    return process.exitcode


def results(folder):
    """Bytes of every file of a finished run that has to be the same, by its path; folders too."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    apart = ("seconds.json", "meet")
    return {n: p.read_bytes() if p.is_file() else b"" for n, p in names.items() if n not in apart}


__all__ = ["Activations", "CONFIG", "context", "die_at", "finish_run", "killed_after", "results"]
