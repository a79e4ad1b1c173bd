"""Train a sparse coder on a harvest: `train` goes on from its last checkpoint when it was killed.

    coder = train(Activations.open("runs/demo/harvest"), "runs/demo", Recipe(latents=1_152, k=16))

A run's folder holds `recipe.json` (what is trained, and on what), `log.csv`, while it lasts
`checkpoint.safetensors`, and at the end `coder/`, in SAELens' layout.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.files import (
    PART,
    RunError,
    flush,
    load_tensors,
    need_space,
    read_json,
    save_tensors,
    sweep,
    why_not_written,
    write_json,
    write_text,
)
from mi_helpers.layouts import hook_name
from mi_helpers.saes import files as coder_files
from mi_helpers.saes.activations import GIB, Activations, Shuffled, site_name
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.products import Products, quickest
from mi_helpers.saes.progress import Progress
from mi_helpers.saes.step import SparseStep

RECIPE, LOG, CHECKPOINT, CODER, SECONDS = (
    "recipe.json",
    "log.csv",
    "checkpoint.safetensors",
    "coder",
    "seconds.json",
)
CHOSEN = "chosen_products"
PRODUCTS = {
    kind: Products(tuple(dict.fromkeys((kind, "float32"))), "highest")
    for kind in ("float32", "bfloat16", "int8")
}


@dataclass(frozen=True)
class Recipe:
    """What is trained.

    latents, k, activation, skip   the coder's: see `coders.SparseCoder`
    products               how to multiply: "measured", once, what is fastest here; or a choice
    sparsity               the penalty's coefficient, of relu and jumprelu: see `SparseStep`
    dead_after             tokens without firing after which a latent is dead, and AuxK revives it
    batch, steps           rows per step over all processes, and how many steps
    rate                   peak learning rate; 0 means `peak_rate(latents)`
    warm_up, decay         shares of the steps with a rising and with a falling rate
    held_out               rows at the end of the text that are not trained on, at most a tenth
    log_every, save_every  steps between rows of the log, and between checkpoints
    memory                 bytes of activations in memory, per process
    """

    latents: int
    k: int = 32
    activation: str = "topk"
    skip: bool = False
    products: str = "measured"
    sparsity: float = 0.0
    dead_after: int = 1_000_000
    batch: int = 4_096
    steps: int = 5_000
    rate: float = 0.0
    warm_up: float = 0.05
    decay: float = 0.8
    held_out: int = 8_192
    log_every: int = 50
    save_every: int = 250
    seed: int = 0
    memory: int = 2 * GIB


def peak_rate(latents: int) -> float:
    """The rule for the learning rate: 8e-3 up to 4,096 latents, then falling with 1/√latents."""
    return 8e-3 * min(1.0, math.sqrt(4_096 / latents))


def new_coder(held: Activations, recipe: Recipe, device=None) -> SparseCoder:
    """The recipe's coder, untrained; ValueError for what cannot be, such as k > latents."""
    return SparseCoder(
        held.d_in,
        recipe.latents,
        held.d_out if held.target else None,
        activation=recipe.activation,
        k=recipe.k,
        skip=recipe.skip,
        seed=recipe.seed,
        device=device,
    )


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step 0, 1, …: a linear warm-up, the peak, a linear decay to nearly 0."""
    peak = recipe.rate or peak_rate(recipe.latents)
    rise = max(1.0, recipe.warm_up * recipe.steps)
    fall = max(1.0, recipe.decay * recipe.steps)
    return peak * min(1.0, (step + 1) / rise, (recipe.steps - step) / fall)


def check_recipe(recipe: Recipe, processes: Processes = ALONE) -> None:
    """What can be said of a recipe before there is a harvest.

    Raises:
        RunError: numbers below 1, a negative rate, an unknown product, a batch that cannot be
            shared.
    """
    for name in ("latents", "batch", "steps", "held_out", "dead_after", "log_every", "save_every"):
        if getattr(recipe, name) < 1:
            raise RunError(f"{name} is {getattr(recipe, name)}: it has to be 1 or more.")
    for name in ("rate", "sparsity", "warm_up", "decay"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise RunError(f"{name} is {getattr(recipe, name)}: it has to be 0 or more.")
    if recipe.products not in ("measured", *PRODUCTS):
        listed = ", ".join(("measured", *PRODUCTS))
        raise RunError(f"products is {recipe.products!r}: choose one of {listed}.")
    if recipe.batch % processes.size:
        raise RunError(f"A batch of {recipe.batch} cannot be shared by {processes.size} processes.")


def split(held: Activations, recipe: Recipe, processes: Processes = ALONE) -> int:
    """How many rows are trained on: all but the held-out ones at the end of the text.

    Raises:
        RunError: fewer than a batch; what `check_recipe` raises.
    """
    check_recipe(recipe, processes)
    n = held.rows - min(recipe.held_out, held.rows // 10)
    if n < recipe.batch:
        raise RunError(
            f"The harvest has {n:,} rows to train on, fewer than one batch of {recipe.batch:,}: "
            "harvest more tokens, or choose a smaller batch."
        )
    return n


def dead_window(recipe: Recipe, n: int) -> int:
    """Tokens without firing after which the log counts a latent as dead: at most one epoch's n."""
    return min(recipe.dead_after, n)


# ------------------------------------------------------------------------------------ metrics


@torch.no_grad()
def quality(coder: SparseCoder, x: Tensor, target: Tensor | None = None, chunk: int = 2_048):
    """How well the coder predicts rows it has not seen.

    explained_variance  1 - E‖t - t̂‖² / E‖t - E t‖², over rows and numbers together
    nmse                E‖t - t̂‖² / E‖t - E t‖²
    relative_error      E‖t - t̂‖² / E‖t‖²
    l0                  mean number of latents that fire per row
    """
    target = x if target is None else target
    mean = target.double().mean(0).float()
    error = spread = power = active = 0.0
    for begin in range(0, len(x), chunk):
        t = target[begin : begin + chunk].to(coder.device)
        rows = x[begin : begin + chunk].to(coder.device)
        indices, values = coder.encode_sparse(rows)
        predicted = coder.decode_sparse(indices, values, rows)
        error += float((t - predicted).pow(2).sum())
        spread += float((t - mean.to(t.device)).pow(2).sum())
        power += float(t.pow(2).sum())
        active += float((values > 0).sum())
    return {
        "explained_variance": 1 - error / spread,
        "nmse": error / spread,
        "relative_error": error / power,
        "l0": active / len(x),
    }


# --------------------------------------------------------------------------------- the run's files


def keep_recipe(folder: Path, recipe: Recipe, held: Activations, processes: Processes) -> Products:
    """Write what this run is, or check that it is what the folder was begun with.

    How to multiply is measured once and kept, as another choice would change the last bits.
    """
    own = json.loads(json.dumps(asdict(recipe) | {"harvest": identity(held)}))
    path = folder / RECIPE
    if path.exists():
        before = read_json(path)
        differ = [key for key in own if own[key] != before.get(key)]
        if differ:
            key = differ[0]
            what = f"{key} {before.get(key)}, not {own[key]}"
            raise RunError(
                f"{folder} holds a run with {'another harvest' if key == 'harvest' else what}: "
                "choose a new folder, or the same settings to go on with it."
            )
    processes.wait()
    if processes.first:
        sweep(folder)
        if not path.exists():
            chosen = PRODUCTS.get(recipe.products)
            chosen = chosen or quickest(processes.device, held.d_in, recipe.latents)
            write_json(path, own | {CHOSEN: asdict(chosen)})
    processes.wait()
    kept = read_json(path)[CHOSEN]
    return Products(tuple(kept["kinds"]), kept["float32"])


def identity(held: Activations) -> list[str]:
    """The checksums of a harvest's shards."""
    return [shard["sha256"] for shard in held.manifest["shards"]]


def log_row(path: Path, row: dict) -> None:
    """Append a row to a CSV, with a header when it is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log as numbers; [] where there is none."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def keep_log_until(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint, a torn last line included."""
    if not path.exists():
        return
    head, *lines = path.read_text("utf-8").splitlines(keepends=True) or [""]
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
    if kept:
        write_text(path, "".join([head, *kept]))
    else:
        path.unlink()


def save_coder(coder: SparseCoder, folder: Path, about: dict) -> None:
    """The finished coder, whole or not at all; `about` goes into its cfg.json."""
    temporary = folder / (CODER + PART)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        coder_files.save(coder, temporary, **about)
        os.replace(temporary, folder / CODER)
        flush(folder)
    except OSError as error:
        raise RunError(why_not_written(folder / CODER, error)) from error


def origin(held: Activations) -> dict:
    """What a coder's file says of where it belongs, in SAELens' words where it has any."""
    manifest = held.manifest
    said = {
        "model_name": manifest["model"]["name"],
        "hook_name": hook_name(held.source),
        "site": site_name(held.source),
        "context_size": manifest.get("context"),
        "training_tokens": manifest["tokens"],
    }
    if held.target:
        said |= {"hook_name_out": hook_name(held.target), "target": site_name(held.target)}
    return {key: value for key, value in said.items() if value is not None}


# ------------------------------------------------------------------------------------- training


class Run:
    """A training run: the coder, its step, the order of the rows, and where it is."""

    def __init__(
        self,
        held: Activations,
        folder: Path,
        recipe: Recipe,
        products: Products,
        processes: Processes = ALONE,
    ):
        self.held, self.folder, self.recipe, self.processes = held, folder, recipe, processes
        self.n = split(held, recipe, processes)
        self.order = Shuffled(held, self.n, recipe.seed, recipe.memory)
        self.test = held.slice(self.n, held.rows)
        self.coder = new_coder(held, recipe, processes.device)
        self.step_number, self.seconds = 0, 0.0
        self.step = SparseStep(
            self.coder,
            dead_after_tokens=recipe.dead_after,
            sparsity_coefficient=recipe.sparsity,
            products=products,
            processes=processes,
        )

    def begin(self) -> None:
        """Initialise from the first rows, or load the last checkpoint."""
        path = self.folder / CHECKPOINT
        if path.exists():
            advice = "Delete it to train from the beginning."
            tensors, about = load_tensors(path, advice=advice)
            self.step.load_state_dict(tensors)
            self.step_number = about["step"]
            if (self.folder / SECONDS).exists():
                self.seconds = read_json(self.folder / SECONDS)["seconds"]
        else:
            x, target = self.order.rows(0, min(self.n, max(self.recipe.batch, 8_192)))
            self.coder.initialise(x, target)
        if self.processes.first:
            keep_log_until(self.folder / LOG, self.step_number)

    def advance(self) -> dict:
        """One step on this process's part of the next batch; the step's metrics."""
        begin = self.step_number * self.recipe.batch
        part = self.processes.share(self.recipe.batch)
        x, target = self.order.rows(begin + part.start, begin + part.stop)
        self.step.lr = learning_rate(self.step_number, self.recipe)
        device = self.processes.device
        metrics = self.step(x.to(device), None if target is None else target.to(device))
        self.step_number += 1
        return metrics

    def log(self, metrics: dict) -> dict:
        """A row of the log: the batch's loss, the latents that are dead, the rest on held-out rows.

        Here a latent is dead when it has not fired for as many tokens as there are to train on, or
        for `dead_after`, whichever is less.
        """
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise RunError(
                f"The loss became {loss} at step {self.step_number}: choose a lower rate than "
                f"{self.recipe.rate or peak_rate(self.recipe.latents):.2g}."
            )
        window = dead_window(self.recipe, self.n)
        row = {
            "step": self.step_number,
            "rate": learning_rate(self.step_number - 1, self.recipe),
            "loss": loss,
            "dead": float((self.step.tokens_since_fired >= window).float().mean()),
            **quality(self.coder, *self.test),
        }
        log_row(self.folder / LOG, row)
        return row

    def save(self, seconds: float) -> None:
        """A checkpoint; the log is flushed to the disk before it."""
        if (self.folder / LOG).exists():
            flush(self.folder / LOG)
        save_tensors(self.folder / CHECKPOINT, self.step.state_dict(), {"step": self.step_number})
        write_json(self.folder / SECONDS, {"seconds": round(seconds, 1)})


def train(
    held: Activations,
    folder: Path | str,
    recipe: Recipe,
    *,
    processes: Processes = ALONE,
    progress: bool = True,
) -> SparseCoder:
    """The coder of `recipe`, trained on a harvest; what is in `folder` already is not done again.

    Raises:
        RunError: too few rows, a folder with another run, a full disk, a damaged file, a loss that
            is not finite.
        ValueError: the coder's own, such as k larger than the dictionary.
    """
    folder = Path(folder)
    split(held, recipe, processes)
    new_coder(held, recipe, "meta")
    products = keep_recipe(folder, recipe, held, processes)
    if (folder / CODER).is_dir():
        return finished(folder, processes)
    parameters = recipe.latents * (held.d_in + held.d_out)
    need_space(folder, 4 * (2 * 3 + 1) * parameters, "Training, with two checkpoints,")
    run = Run(held, folder, recipe, products, processes)
    run.begin()
    bar = Progress("train", recipe.steps, "steps", run.step_number, progress and processes.first)
    start = time.monotonic() - run.seconds
    while run.step_number < recipe.steps:
        metrics = run.advance()
        note, last = "", run.step_number == recipe.steps
        if processes.first and (run.step_number % recipe.log_every == 0 or last):
            row = run.log(metrics)
            note = f"explained variance {row['explained_variance']:.3f}, dead {row['dead']:.1%}"
        if processes.first and (run.step_number % recipe.save_every == 0 or last):
            run.save(time.monotonic() - start)
        bar.to(run.step_number, note)
    if processes.first:
        save_coder(run.coder, folder, origin(held))
    processes.wait()
    return finished(folder, processes)


def finished(folder: Path, processes: Processes) -> SparseCoder:
    """The coder of a run that is complete, which needs its checkpoint no more."""
    if processes.first:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return SparseCoder.load(folder / CODER)
