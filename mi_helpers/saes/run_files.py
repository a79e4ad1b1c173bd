"""What a training run keeps in its folder, and reads again: recipe, log, and the coder's checksums.

log = read_log("runs/demo/log.csv")               # [{"step": 50.0, "loss": …}, …]
coder = trained_coder("runs/demo")                # compared with its SHA256SUMS
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from mi_helpers.errors import reading
from mi_helpers.files import RunError, read_about, read_sealed, sha256, why_not_written, write_text
from mi_helpers.layouts import hook_name
from mi_helpers.saes.activations import Activations, site_name
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.files import CONFIG, WEIGHTS, load_coder

RECIPE, LOG, CHECKPOINT, CODER, SECONDS = (
    "recipe.json",
    "log.csv",
    "checkpoint.safetensors",
    "coder",
    "seconds.json",
)
SUMS = "SHA256SUMS"  # in the coder's folder, as `sha256sum --check` reads it
EVERY = (CONFIG, WEIGHTS, f"../{RECIPE}", f"../{LOG}")  # what it has
MADE = (  # of it
    *("report.json", "report.md", "curves.png", "features.safetensors", "latents.jsonl"),
    *("latents.html", "names"),
)
AGAIN = "Move the folder coder away, and run the training again."


def is_begun(folder: Path) -> bool:
    """Whether a folder holds anything that was trained."""
    return (folder / CHECKPOINT).exists() or (folder / CODER).exists()


def check_recipe(folder: Path, own: dict, extends: bool = False) -> None:
    """Check that nothing was trained in a folder by another recipe, in the keys that `own` has.

    Args:
        extends: whether more steps than a finished run has are to extend it, and no other recipe.

    Raises:
        RunError: it was, and in what it differs.
    """
    if not (folder / RECIPE).exists() or not is_begun(folder):
        return
    before, own = read_sealed(folder / RECIPE), json.loads(json.dumps(own))
    for key in own:
        if extends and key == "steps" and own[key] > before["steps"]:
            if is_extended_by(folder, own[key]):
                continue
            raise RunError(
                f"{folder} holds a run of {before['steps']:,} steps that is not finished: finish "
                f"it with --steps {before['steps']} first, then extend it."
            )
        if own[key] != before.get(key, type(own[key])()):  # a setting of a later version was off
            what = f"{key} {before.get(key)}, not {own[key]}"
            raise RunError(
                f"{folder} holds a run with {'another harvest' if key == 'harvest' else what}: "
                "choose a new folder, or the same settings to go on with it."
            )


def is_extended_by(folder: Path, steps: int) -> bool:
    """Whether a folder holds a finished run of fewer steps."""
    return (folder / CODER).is_dir() and steps > read_sealed(folder / RECIPE)["steps"]


def put_aside_if_extended(folder: Path) -> None:
    """Move the coder of a run that is being extended, and what was made of it, to coder-STEPS.

    Such a coder is beside a checkpoint and a recipe that go further than it does; a kill may have
    come between writing those and moving it.
    """
    if not (folder / CODER).is_dir() or not (folder / CHECKPOINT).exists():
        return
    recipe, (_, about) = read_sealed(folder / RECIPE), read_about(folder / CHECKPOINT)
    if "begun" not in recipe or about.get("step") != recipe["begun"]:
        return
    try:
        for path in (folder / name for name in MADE if (folder / name).exists()):
            path.replace(folder / CODER / path.name)
        (folder / CODER).rename(folder / f"{CODER}-{recipe['begun']}")
    except OSError as error:
        raise RunError(f"{folder / CODER} could not be moved: {error}.") from error


def identity(held: Activations) -> list[str]:
    """The checksums of a harvest's shards: what tells it from others."""
    return [shard["sha256"] for shard in held.manifest["shards"]]


def origin(held: Activations) -> dict:
    """What a coder's file says about where it belongs, in SAELens' terms where it has any."""
    manifest = held.manifest
    about = {
        "model_name": manifest["model"]["name"],
        "hook_name": hook_name(held.source),
        "site": site_name(held.source),
        "context_size": manifest.get("context"),
        "training_tokens": manifest["tokens"],
    }
    if held.target:
        about |= {"hook_name_out": hook_name(held.target), "target": site_name(held.target)}
    return {key: value for key, value in about.items() if value is not None}


def log_row(path: Path, row: dict) -> None:
    """Append a row to a CSV file, with a header when the file is new.

    Raises:
        RunError: the disk is full, or the file cannot be written.
    """
    new = not path.exists()
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise RunError(why_not_written(path, error)) from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log as numbers; [] where there is no log."""
    if not path.exists():
        return []
    with reading(path, RunError), open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_seconds(path: Path) -> float:
    """How long a run has trained so far; 0 where no file says so."""
    with reading(path, RunError):
        return float(read_sealed(path)["seconds"]) if path.exists() else 0.0


def keep_log_until(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint, including a torn last line."""
    if not path.exists():
        return
    with reading(path, RunError, "Delete it and run again."):
        head, *lines = path.read_text("utf-8").splitlines(keepends=True) or [""]
    whole = (line for line in lines if line.endswith("\n") and line.split(",")[0].isdecimal())
    kept = [line for line in whole if int(line.split(",")[0]) <= step]
    if kept:
        write_text(path, "".join([head, *kept]))
    else:
        path.unlink()


def write_sums(coder: Path, folder: Path) -> None:
    """Write SHA256SUMS into a coder's folder, of its files and of its run's recipe and log."""
    files = [*sorted(coder.iterdir()), folder / RECIPE, folder / LOG]
    names = [path.name if path.parent == coder else f"../{path.name}" for path in files]
    lines = [f"{sha256(path)}  {name}\n" for path, name in zip(files, names, strict=True)]
    write_text(coder / SUMS, "".join(lines))


def trained_coder(folder: Path | str) -> SparseCoder:
    """The coder that `train` left in a run's folder, compared with its checksums.

    Raises:
        RunError: there is none; or it, its recipe or its log is not what was written.
        ModelError: it cannot be read.
    """
    coder = Path(folder) / CODER
    if not coder.is_dir():
        raise RunError(f"There is no coder in {folder}: run the training first.")
    try:
        lines = (coder / SUMS).read_text("utf-8").splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        wrong = [name for name in EVERY if sha256(coder / name) != sums.get(name)]
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing. {AGAIN}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{coder / SUMS} is damaged ({error}). {AGAIN}") from None
    if wrong:
        path = Path(os.path.normpath(coder / wrong[0]))
        raise RunError(f"{path} is not what was written: its checksum differs. {AGAIN}")
    return load_coder(coder)
