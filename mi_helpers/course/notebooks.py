"""Notebooks as they are committed: run from top to bottom, clean, with nothing of this machine."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT = ("mi_helpers",)  # of a notebook: the form of the lesson
KEPT_OF_A_CELL = {"tags", "jupyter"}
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|var/folders)/\w|[A-Z]:\\+Users\b")


def find(names: Sequence[str], folder: Path = FOLDER) -> list[Path]:
    """The notebooks whose names begin with any of `names`, or all; ValueError where none does."""
    found = sorted(folder.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"No notebook's name begins with '{name}'.")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def execute(notebook, folder: Path) -> None:
    """Run every cell in place, in `folder`; CellExecutionError at the first that fails.

    Exercises are recorded in a throw-away file, so that outputs do not depend on who runs this.
    """
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
        )
        progress = os.path.join(scratch, "progress.json")
        client.execute(env=os.environ | {"MI_PROGRESS": progress, "MI_STATIC": "1"})


def clean(notebook) -> None:
    """Drop in place what is not the author's: widget state, timings, versions, view settings."""
    ours = {key: notebook.metadata[key] for key in KEPT if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}} | ours
    )
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key in KEPT_OF_A_CELL}
        cell.metadata = nbformat.from_dict(kept)


def problems(notebook) -> list[str]:
    """Why a notebook is not fit to commit, one sentence each; empty when it is."""
    found = []
    if "widgets" in notebook.metadata:
        found.append("metadata.widgets is there: GitHub may refuse the notebook.")
    for number, cell in enumerate(notebook.cells):
        found += [f"cell {number} {problem}" for problem in cell_problems(cell)]
    return found


def cell_problems(cell) -> list[str]:
    """The problems of one cell, each without its subject."""
    found = []
    if "execution" in cell.metadata:
        found.append("has execution timestamps.")
    if "id" not in cell:
        found.append("has no id.")
    if path := MACHINE_PATH.search(json.dumps(cell, ensure_ascii=False)):
        found.append(f"holds a path of one machine ({path[0]}…).")
    if cell.cell_type != "code":
        return found
    if "NBVAL_" + "SKIP" in cell.source:
        found.append("is skipped by nbval.")
    if cell.source.strip() and cell.execution_count is None:
        found.append("has no execution count.")
    if any(output.output_type == "error" for output in cell.outputs):
        found.append("ends in an error.")
    return found


def save(notebook, path: Path) -> None:
    """Write a notebook atomically, with Unix line ends."""
    from mi_helpers.files import write_text  # loads torch, which `make lab` does without

    write_text(path, nbformat.writes(notebook) + "\n")


def refresh(path: Path, run: bool = True) -> list[str]:
    """Run (unless told not to), clean and save one notebook; the file stays as it was on failure.

    Returns the problems that cleaning could not solve.
    """
    notebook = nbformat.read(path, as_version=4)
    if run:
        execute(notebook, path.parent)
    clean(notebook)
    found = problems(notebook)
    if not found:
        save(notebook, path)
    return found


def main(
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")
    ] = (),
    clean_only: bool = False,
    folder: Path = FOLDER,
) -> int:
    """Run the notebooks from top to bottom and save them clean; one that fails stays as it was.

    Args:
        names: how the names begin, such as 00 03; all notebooks without
        clean_only: do not run them
        folder: where they are
    """
    try:
        paths = find(names, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        try:
            found = refresh(path, run=not clean_only)
        except CellExecutionError as error:
            found = [str(error)]
        print(f"{path.name}: " + ("saved" if not found else "left as it was"), flush=True)
        for problem in found:
            print(f"  {problem}")
        failed = failed or bool(found)
    return 1 if failed else 0
