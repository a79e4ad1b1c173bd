"""What a learner has done: one small JSON file in the user's state folder.

    {"passed": ["0.1"], "predictions": {"0.2": {"answer": "zero", "sure": 70, "right": true}},
     "investigations": {"0": 0.83}}

Every write happens under a lock and is merged into what is there; what a later version wrote is
kept. A file that cannot be understood is kept aside, one that cannot be read is never replaced.
"""

import hashlib
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_state_path

from mi_helpers.errors import Refused

PATIENCE = 5.0  # seconds to wait for another process's write
SURE = (50, 70, 90, 99)  # per cent, what a prediction may be made with

_this_session: dict = {}


def path() -> Path:
    """Where progress is kept: `$MI_PROGRESS`, or the platform's folder for a user's state.

    Raises:
        Refused: there is no home folder.
    """
    if given := os.environ.get("MI_PROGRESS"):
        return Path(given)
    try:
        before = Path.home() / ".local" / "state" / "mi-course" / "progress.json"
        if sys.platform == "darwin" and before.is_file():  # where earlier versions put it
            return before
        found = user_state_path("mi-course", appauthor=False) / "progress.json"
    except (RuntimeError, OSError, KeyError):
        found = Path("~")
    if not found.is_absolute():
        raise Refused("there is no home folder; set MI_PROGRESS to a file's path.")
    return found


def read(file: Path) -> dict:
    """What a file holds, understood or not; {} where there is none.

    Raises:
        Refused: it is there and cannot be read.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Refused(f"{file} cannot be read: {error.strerror or error}.") from error
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    kept = understood(found)
    if kept != found:
        aside = file.with_name(f"{file.name}.{hashlib.sha256(text).hexdigest()[:8]}.bak")
        with suppress(OSError):
            aside.write_bytes(text)
    return kept


def understood(found) -> dict:
    """What of a file's content is as it should be; what is unknown is kept as it is."""
    if not isinstance(found, dict):
        return {}
    kept = dict(found)
    if "passed" in found:
        passed = found["passed"] if isinstance(found["passed"], list) else []
        kept["passed"] = [id for id in passed if isinstance(id, str)]
    for part, good in (("predictions", is_prediction), ("investigations", is_score)):
        if part in found:
            table = found[part] if isinstance(found[part], dict) else {}
            kept[part] = {id: each for id, each in table.items() if good(each)}
    return kept


def is_prediction(value) -> bool:
    """Whether a prediction is whole."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("answer"), str)
        and value.get("sure") in SURE
        and value.get("right", True) in (True, False)
    )


def is_score(value) -> bool:
    """Whether a score is a number."""
    return type(value) in (int, float) and math.isfinite(value)


def merged(one: dict, other: dict) -> dict:
    """Two records in one: all that was passed, the first predictions, the best scores."""
    both = one | other | {"passed": sorted({*one.get("passed", ()), *other.get("passed", ())})}
    first, second = one.get("predictions", {}), other.get("predictions", {})
    both["predictions"] = {id: second.get(id, {}) | first.get(id, {}) for id in second | first}
    first, second = one.get("investigations", {}), other.get("investigations", {})
    both["investigations"] = first | {
        id: max(score, first.get(id, score)) for id, score in second.items()
    }
    return both


def everything() -> dict:
    """What was done, ever or in this session: "passed", "predictions", "investigations"."""
    try:
        saved = read(path())
    except Refused:
        saved = {}
    return merged(saved, _this_session)


def passed() -> set[str]:
    """The ids passed, ever or in this session."""
    return set(everything()["passed"])


def predictions() -> dict[str, dict]:
    """Prediction id -> {"answer", "sure", and "right" once it is known}."""
    return everything()["predictions"]


def add(exercise_id: str) -> str:
    """Record an exercise as passed; "" or, where that cannot be saved, a sentence that says so."""
    return save({"passed": [exercise_id]})


def save(new: dict) -> str:
    """Merge what is new into the file; "" or, where it cannot be saved, a sentence that says so."""
    from mi_helpers.files import write_json  # loads torch, which commands do without

    _this_session.update(merged(_this_session, new))
    try:
        file = path()
        file = file.resolve() if file.is_symlink() else file
        lock = FileLock(f"{file}.lock", timeout=PATIENCE)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise Refused(f"another process holds {file}.lock.") from None
        except (NotImplementedError, OSError):
            pass  # a disk without locks; where nothing can be written, the write below says so
        try:
            write_json(file, merged(read(file), _this_session))
        finally:
            lock.release()
    except Refused as error:
        return f"Your progress cannot be saved, so it lasts for this session only: {error}"
    return ""
