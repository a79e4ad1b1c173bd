"""The pipeline on tiny-gemma, SIGKILLed again and again: does it end with the same bytes?

    python -m benchmarks.kill_test [--kills 60] [--seed 0]

One run is left alone. Others are killed after random times, from "while torch is imported" to
"while the last file is renamed", and given the same command again until they end; then every file
must have the uninterrupted run's bytes. The stage at which each kill fell is counted.
"""

import argparse
import collections
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "tokens": 30_000,
    "shard-tokens": 2_048,
    "latents": 1_152,
    "k": 16,
    "batch": 1_024,
    "steps": 120,
    "save-every": 10,
    "log-every": 10,
    "loss-tokens": 1_000,
}


def command(folder: Path) -> list[str]:
    options = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mi_helpers", "run", "--folder", str(folder), *options]


def stage(folder: Path) -> str:
    """How far a run has come, and whether it was in the midst of writing."""
    marks = {
        "features": "report.md",
        "report": "coder",
        "train": "checkpoint.safetensors",
        "train, before a checkpoint": "harvest/manifest.json",
        "harvest": "harvest/plan.json",
    }
    reached = next((name for name, mark in marks.items() if (folder / mark).exists()), "start")
    return reached + (", writing" if list(folder.rglob("*.part*")) else "")


def results(folder: Path) -> dict[str, bytes]:
    """Every file and folder that has to be the same; the time a run took is its own."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*")}
    times = ("seconds.json", "report.md")
    found = {name: path for name, path in paths.items() if name not in times}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    options = parser.parse_args(argv)
    options.folder /= "kill_test"  # its own, made anew each time
    shutil.rmtree(options.folder, ignore_errors=True)
    rng, counts, differ, runs = random.Random(options.seed), collections.Counter(), [], 0
    begin = time.monotonic()
    whole = options.folder / "whole"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    length, expected = time.monotonic() - begin, results(whole)
    print(f"one run left alone: {length:.0f} s, {len(expected)} files")
    while sum(counts.values()) < options.kills:
        runs += 1
        folder, ended = options.folder / f"run-{runs}", False
        while not ended:
            with subprocess.Popen(command(folder), stdout=subprocess.DEVNULL) as process:
                try:
                    process.wait(rng.uniform(0.2, 0.6) * length)
                    ended = True
                    if process.returncode:
                        print(f"run {runs} stopped by itself with {process.returncode}")
                        return 1
                except subprocess.TimeoutExpired:
                    counts[stage(folder)] += 1
                    process.kill()
        found = results(folder)
        differ += [f"run {runs}: {n}" for n in expected if found.get(n) != expected[n]]
        differ += [f"run {runs}: {n} is left over" for n in found if n not in expected]
    for name, count in sorted(counts.items()):
        print(f"  killed {count:3} times at: {name}")
    total = sum(counts.values())
    print(f"{total} kills over {runs} runs of {len(expected)} files: {len(differ)} differ")
    print("\n".join(differ))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
