"""The learner's own copies of the lessons: made, brought up to date, begun again; nothing is lost.

A copy counts as changed when its cells are. What running or moving a control puts into a notebook
(outputs, counts, widget states) comes again when it is run.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from mi_helpers.course.notebooks import FOLDER, find

WORK = FOLDER.parent / "work"
RECORD = ".course.json"  # lesson -> the sums of the course's notebook when it was last brought


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
        mine: the learner's copy of it, which need not be there
        base: the sums of the notebook that the copy was made of; two None where that is unknown
    """
    new = sums(course)
    if mine.exists() and (new == list(base) or new[1] is None):
        return ""
    if not mine.exists():
        copy(course, mine)
        return f"{mine.name} is there now."
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
    if not mine.exists():
        copy(course, mine)
        return f"{mine.name} is there now."
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
    before, is_new = recorded(folder), not folder.exists()
    said = [
        begin_again(course, folder / course.name)
        if fresh
        else update(course, folder / course.name, before.get(course.name, (None, None)))
        for course in lessons
    ]
    after = before | {course.name: sums(course) for course in lessons}
    if after != before:
        from mi_helpers.files import write_json

        write_json(folder / RECORD, after)
    if is_new and len(lessons) > 1:
        return [
            f"Your own copies of the {len(lessons)} lessons are in {folder}: change what you like."
        ]
    return [sentence for sentence in said if sentence]


def main(
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
