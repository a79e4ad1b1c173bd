"""Every kind of file that the project reads, spoiled by hand and by chance: it is read, or refused
in one sentence that names the file. Nothing else is raised, no code runs, nothing outside the
folder is touched, and memory stays within bounds.

Some of the ways are tried, the same each time; `MI_FUZZ=10000` tries all that are written down, and
so many by chance for each kind of file.
"""

import json
import os
import random
import resource
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import KINDS, WRONG, Kind, places, put, spoiled

from mi_helpers.errors import Refused

LONG = int(os.environ.get("MI_FUZZ", 0))
FEW = {"model": 5, "shards": 5, "shape": 5, "run": 8}  # which take longest
EVERY = [(name, file) for name, kind in KINDS.items() for file in kind.files]
GROWTH = 2**20  # KiB, of memory at its peak, that reading small files may take
CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


class Watch:
    """What the process did while strangers' files were read: code run, files touched elsewhere.

    An audit hook cannot be taken away, so there is one, which looks only while it is `on`.
    """

    def __init__(self):
        self.on, self.folder, self.seen = False, "", []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            place = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes) else ""
            if writes and place and not place.startswith((self.folder, "/dev/")):
                self.seen.append((event, place))
            if os.path.basename(place).startswith("outside"):
                self.seen.append((event, place))
        elif event in WRITES:
            place = os.path.abspath(os.fsdecode(arguments[0]))
            if not place.startswith(self.folder):
                self.seen.append((event, place))
        elif event in CODE:
            self.seen.append((event, str(arguments)[:80]))


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The folder of each kind, as it should be."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("pristine")
            KINDS[name].make(made[name])
        return made[name]

    return folder


def complaint(kind: Kind, file: str, folder, watch) -> str:
    """What is wrong with how a spoiled folder is read; "" when it is as it should be."""
    watch.seen, watch.folder, watch.on = [], str(folder.parent), True
    try:
        kind.read(folder)
    except Refused as error:
        said = str(error)
        if "\n" in said:
            return f"several lines: {said}"
        if file not in said and file.split(".")[0] not in said and str(folder) not in said:
            return f"without the file's name: {said}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        watch.on = False
    return f"touched {watch.seen[0]}" if watch.seen else ""


def tried(name: str, file: str, spoil, pristine, place, watch) -> str:
    """`complaint` about a copy of a kind's folder, spoiled in one way."""
    folder = place / "held"
    shutil.copytree(pristine(name), folder)
    try:
        spoil(folder / file)
        return complaint(KINDS[name], file, folder, watch)
    finally:
        shutil.rmtree(folder)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "file"), EVERY)
def test_a_file_that_is_spoiled_by_hand(name, file, pristine, tmp_path, watch):
    ways, before = list(spoiled(pristine(name) / file)), peak()
    few = FEW.get(name, 40)
    some = ways if LONG or len(ways) <= few else random.Random(file).sample(ways, few)
    found = [(way, tried(name, file, spoil, pristine, tmp_path, watch)) for way, spoil in some]
    assert [each for each in found if each[1]] == []
    assert peak() - before < GROWTH


def mutations(data: bytes, is_json: bool):
    """A strategy of functions that change a file's bytes."""
    at = st.integers(0, max(0, len(data) - 1))
    byte = st.binary(min_size=1, max_size=4)
    flipped = st.lists(st.tuples(at, byte), min_size=1, max_size=8).map(
        lambda changes: lambda path: path.write_bytes(overwritten(data, changes))
    )
    cut = at.map(lambda n: lambda path: path.write_bytes(data[:n]))
    doubled = st.tuples(at, at).map(
        lambda ends: lambda path: path.write_bytes(data[: max(ends)] + data[min(ends) :])
    )
    if not is_json:
        return st.one_of(flipped, cut, doubled)
    where = st.sampled_from(list(places(json.loads(data))))
    other = st.one_of(
        st.sampled_from(list(WRONG.values())),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
    replaced = st.tuples(where, other).map(lambda both: put(*both))
    return st.one_of(flipped, cut, doubled, replaced, replaced, replaced)


def overwritten(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    new = bytearray(data)
    for at, byte in changes:
        new[at : at + len(byte)] = byte
    return bytes(new)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "file"), EVERY)
def test_a_file_that_is_spoiled_by_chance(name, file, pristine, tmp_path, watch):
    data, before = (pristine(name) / file).read_bytes(), peak()

    @settings(
        max_examples=LONG or min(FEW.get(name, 12), 12),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(data, file.endswith(".json")))
    def read_or_refused(spoil):
        assert tried(name, file, spoil, pristine, tmp_path, watch) == ""

    read_or_refused()
    assert peak() - before < GROWTH
