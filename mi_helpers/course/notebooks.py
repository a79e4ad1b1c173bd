"""Notebooks: the course's, run and saved clean; the learner's own copies, of which none is lost.

What is committed was run from top to bottom and has nothing of this machine. A copy counts as
changed when its cells are: what running or moving a control puts into a notebook (outputs, counts,
widget states) comes again when it is run.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
WORK = FOLDER.parent / "work"
RECORD = ".course.json"  # lesson -> the sums of the course's notebook when it was last brought
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


def form_of(path: Path) -> int:
    """The form of a lesson that a notebook's metadata say; 1 where they say none."""
    said = json.loads(path.read_text("utf-8"))["metadata"].get("mi_helpers", {}).get("form", 1)
    return said if isinstance(said, int) else 1


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


# -- the learner's own copies -----------------------------------------------------------------


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sums(path: Path) -> list[str | None]:
    """Checksums of a notebook: of the file, and of what a person writes in it (None: damaged)."""
    content = path.read_bytes()
    try:
        cells = json.loads(content)["cells"]
        written = [
            [cell["cell_type"], "".join(cell["source"]), cell.get("attachments")] for cell in cells
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [digest(content), None]
    return [digest(content), digest(json.dumps(written, sort_keys=True).encode())]


def recorded(folder: Path) -> dict[str, list[str | None]]:
    """What each copy was made of; nothing where the record is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / RECORD).read_text("utf-8"))
        if isinstance(found, dict):
            return {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 2}
    return {}


def copy(source: Path, to: Path) -> None:
    """A file's content to another place, atomically."""
    from mi_helpers.files import write_atomically  # loads torch, which most starts do without

    write_atomically(to, lambda path: path.write_bytes(source.read_bytes()))


def beside(path: Path, whose: str) -> Path:
    """A free name next to a notebook's: `03_name (new 2026-01-31).ipynb`."""
    stem = f"{path.stem} ({whose} {datetime.now():%Y-%m-%d}"
    free, number = path.with_name(f"{stem}).ipynb"), 1
    while free.exists():
        number += 1
        free = path.with_name(f"{stem}, {number}).ipynb")
    return free


def update(course: Path, mine: Path, base: Sequence[str | None]) -> str:
    """Bring one copy up to date: a sentence, "" where the learner need not know.

    Args:
        course: the course's notebook
        mine: the learner's copy of it
        base: the sums of the notebook that the copy was made of; two None where that is unknown
    """
    new = sums(course)
    if new == list(base) or new[1] is None:
        return ""
    old = sums(mine)
    if old[1] is not None and old[1] == base[1]:
        if old[0] != new[0]:
            copy(course, mine)
        return f"{mine.name} is the course's new one: you had changed nothing in yours."
    if new[1] in (old[1], base[1]):
        return ""
    aside = beside(mine, "new")
    copy(course, aside)
    return f"{mine.name} is as you left it; the course has a newer one, put beside it: {aside.name}"


def begin_again(course: Path, mine: Path) -> str:
    """A clean copy of the course's notebook; the learner's own is kept under a dated name."""
    if mine.read_bytes() == course.read_bytes():
        return f"{mine.name} is clean already."
    aside = beside(mine, "mine")
    copy(mine, aside)
    copy(course, mine)
    return (
        f"{mine.name} is clean; yours is beside it: {aside.name}. If the lesson is open, choose "
        "File, Reload Notebook from Disk."
    )


def bring(lessons: Sequence[Path], folder: Path, fresh: bool = False) -> list[str]:
    """Make, update or (`fresh`) begin again the copies of these notebooks in `folder`.

    Returns:
        What happened, in sentences; one for all when the folder is new.

    Raises:
        RunError: the folder cannot be written.
    """
    before, is_new, said = recorded(folder), not folder.exists(), []
    for course in lessons:
        mine = folder / course.name
        if not mine.exists():
            copy(course, mine)
            said.append(f"{mine.name} is there now.")
        elif fresh:
            said.append(begin_again(course, mine))
        else:
            said.append(update(course, mine, before.get(course.name, (None, None))))
    after = before | {course.name: sums(course) for course in lessons}
    if after != before:
        from mi_helpers.files import write_json

        write_json(folder / RECORD, after)
    if is_new and len(lessons) > 1:
        return [
            f"Your own copies of the {len(lessons)} lessons are in {folder}: change what you like."
        ]
    return [sentence for sentence in said if sentence]


def main_lessons(
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")
    ] = (),
    fresh: bool = False,
    folder: Path = WORK,
    course: Path = FOLDER,
) -> int:
    """Make your own copies of the lessons, or bring them up to date; what you changed is kept.

    Args:
        names: how the lessons begin, such as 00 03; all lessons without
        fresh: give clean copies of these lessons; yours are kept beside them
        folder: where your copies are
        course: where the course's notebooks are
    """
    try:
        if fresh and not names:
            raise ValueError("Say which lesson you want to begin again: make fresh NAMES=03")
        said = bring(find(names, course), folder.expanduser(), fresh)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for sentence in said:
        print(sentence)
    return 0
