"""Which exercises were passed: one small JSON file in the user's state folder."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

_this_session: set[str] = set()


def path() -> Path:
    """Where progress is kept: `$MI_PROGRESS`, or the platform's folder for a user's state."""
    if given := os.environ.get("MI_PROGRESS"):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mi-course" / "progress.json"


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
    _this_session.add(exercise_id)
    file = path()
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        ids = saved() | {exercise_id}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"passed": sorted(ids)}, indent=1) + "\n", "utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        return f"Your progress cannot be saved here ({reason}), so it lasts for this session only."
    return ""
