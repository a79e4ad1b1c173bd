"""Which exercises were passed: one small JSON file in the user's state folder."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from platformdirs import user_state_path

_this_session: set[str] = set()


def path() -> Path:
    """Where progress is kept: `$MI_PROGRESS`, or the platform's folder for a user's state."""
    if given := os.environ.get("MI_PROGRESS"):
        return Path(given)
    before = Path.home() / ".local" / "state" / "mi-course" / "progress.json"
    if sys.platform == "darwin" and before.is_file():  # where earlier versions put it
        return before
    return user_state_path("mi-course", appauthor=False) / "progress.json"


def saved() -> set[str]:
    """The ids in the file. A file that cannot be understood is kept aside as `.bak`."""
    file = path()
    try:
        ids = json.loads(file.read_text("utf-8"))["passed"]
        if not (isinstance(ids, list) and all(isinstance(each, str) for each in ids)):
            raise ValueError("not a list of ids")
        return set(ids)
    except OSError:
        return set()
    except (ValueError, KeyError, TypeError):
        with suppress(OSError):
            os.replace(file, file.with_name(file.name + ".bak"))
        return set()


def passed() -> set[str]:
    """The ids passed, ever or in this session."""
    return saved() | _this_session


def add(exercise_id: str) -> str:
    """Record one id; "" or, where the file cannot be written, a sentence that says so."""
    from mi_helpers.files import RunError, write_json  # loads torch, which commands do without

    _this_session.add(exercise_id)
    try:
        write_json(path(), {"passed": sorted(saved() | {exercise_id})})
    except RunError as error:
        return f"Your progress cannot be saved, so it lasts for this session only: {error}"
    return ""
