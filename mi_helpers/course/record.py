"""What a learner has done: one small JSON file in the user's state folder.

    {"passed": ["0.1"], "predictions": {"0.2": {"answer": "zero", "sure": 70, "right": true}},
     "investigations": {"0": 0.83}}

Every write happens under a lock and is merged into what is there; what a later version wrote is
kept. A file that cannot be understood is kept aside, one that cannot be read is never replaced.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from platformdirs import user_state_path

from mi_helpers.errors import Refused

PATIENCE = 5.0  # seconds to wait for another process's write
SURE = (50, 70, 90, 99)  # per cent, what a prediction may be made with

_this_session: dict = {}


class NotSaved(Refused):
    """Progress cannot be read or written; its text says why."""


def path() -> Path:
    """Where progress is kept: `$MI_PROGRESS`, or the platform's folder for a user's state.

    Raises:
        NotSaved: there is no home folder.
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
        raise NotSaved("there is no home folder; set MI_PROGRESS to a file's path.")
    return found


def read(file: Path) -> dict:
    """What a file holds, understood or not; {} where there is none.

    Raises:
        NotSaved: it is there and cannot be read.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise NotSaved(f"{file} cannot be read: {error.strerror or error}.") from error
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    kept = understood(found)
    if kept != found:
        set_aside(file, text)
    return kept


def understood(found) -> dict:
    """What of a file's content is as it should be; what is unknown is kept as it is."""
    if not isinstance(found, dict):
        return {}
    return found | {key: right(found[key]) for key, right in PARTS.items() if key in found}


def names(value) -> list[str]:
    """The strings of a list."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def predictions_in(value) -> dict[str, dict]:
    """The predictions of a table that are whole."""
    table = value if isinstance(value, dict) else {}
    return {
        id: each
        for id, each in table.items()
        if isinstance(each, dict)
        and isinstance(each.get("answer"), str)
        and each.get("sure") in SURE
        and each.get("right") in (None, True, False)
    }


def scores_in(value) -> dict[str, float]:
    """The scores of a table that are numbers."""
    table = value if isinstance(value, dict) else {}
    return {
        id: each
        for id, each in table.items()
        if isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each)
    }


PARTS: dict[str, Callable] = {
    "passed": names,
    "predictions": predictions_in,
    "investigations": scores_in,
}


def set_aside(file: Path, content: bytes) -> None:
    """Keep a copy of what cannot be understood, under a name that nothing has yet."""
    for number in range(1000):
        beside = file.with_name(f"{file.name}{f'.{number}' if number else ''}.bak")
        with suppress(OSError):
            if beside.is_file() and beside.read_bytes() == content:
                return
        try:
            with open(beside, "xb") as to:
                to.write(content)
            return
        except FileExistsError:
            continue
        except OSError:
            return


def merged(one: dict, other: dict) -> dict:
    """Two records in one: all that was passed, the first predictions, the best scores."""
    both = one | other
    passed = {*names(one.get("passed")), *names(other.get("passed"))}
    both["passed"] = sorted(passed)
    first, second = (predictions_in(each.get("predictions")) for each in (one, other))
    table = {id: {**second.get(id, {}), **first.get(id, {})} for id in {*first, *second}}
    scores = [scores_in(each.get("investigations")) for each in (one, other)]
    best = {id: max(each[id] for each in scores if id in each) for id in {*scores[0], *scores[1]}}
    for key, value in (("predictions", table), ("investigations", best)):
        both.pop(key, None)
        if value:
            both[key] = value
    return both


def saved() -> dict:
    """What is in the file; {} where it cannot be read."""
    try:
        return read(path())
    except NotSaved:
        return {}


def everything() -> dict:
    """What was done, ever or in this session."""
    return merged(saved(), _this_session)


def passed() -> set[str]:
    """The ids passed, ever or in this session."""
    return set(everything()["passed"])


def predictions() -> dict[str, dict]:
    """Prediction id -> {"answer", "sure", and "right" once it is known}."""
    return everything().get("predictions", {})


def add(exercise_id: str) -> str:
    """Record an exercise as passed; "" or, where that cannot be saved, a sentence that says so."""
    return save({"passed": [exercise_id]})


def save(new: dict) -> str:
    """Merge what is new into the file; "" or, where it cannot be saved, a sentence that says so."""
    from mi_helpers.files import RunError, write_json  # loads torch, which commands do without

    remembered = merged(_this_session, new)
    _this_session.clear()
    _this_session.update(remembered)
    try:
        file = path()
        file = file.resolve() if file.is_symlink() else file
        with locked(file):
            write_json(file, merged(read(file), remembered))
    except (NotSaved, RunError, OSError) as error:
        return f"Your progress cannot be saved, so it lasts for this session only: {error}"
    return ""


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file, where its disk has locks.

    Raises:
        NotSaved: another process has held it for some seconds.
    """
    from filelock import FileLock, Timeout

    from mi_helpers.files import NO_LOCKS

    lock = FileLock(f"{file}.lock", timeout=PATIENCE)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise NotSaved(f"another process holds {file}.lock.") from None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
