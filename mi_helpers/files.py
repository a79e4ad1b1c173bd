"""Files that survive: written whole or not at all, checked when read, and listed when they ship.

A file is written in a directory of its own, flushed to the disk, and then moved to its place, so
whoever opens it finds the old content or the new one, also after a SIGKILL or a power cut. Tensors
are safetensors files that carry the checksum of their own content. A run's folder belongs to one
process at a time. What ships in `data/` stands in its manifest.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mi_helpers.errors import Kind, Refused, checked, reading

DATA = Path(__file__).resolve().parents[1] / "data"
MANIFEST = "MANIFEST"
META = "mi_helpers"
MOST_JSON = 2**28  # bytes of a JSON file that is read
BEGIN, END = ".mi-helpers-", ".part"  # of the directories in which files are written
LOCK, HOLDER = ".mi-helpers.lock", ".mi-helpers.holder"
HELD: ContextVar[frozenset[Path]] = ContextVar("folders that are held here", default=frozenset())
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # on some network disks


T = TypeVar("T")


class RunError(Refused):
    """What stopped a run, and what to do about it: in one sentence."""


class InUse(RunError):
    """Another process is at work in a run's folder."""

    exit_code = 1


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    read_back: Callable[[Path], object] = lambda _: None,
) -> None:
    """`write(temporary path)`, a file or a folder; flush it to the disk, move it to `path`.

    Whatever else `write` leaves beside the temporary path goes with its directory.

    Args:
        read_back: reads the temporary path, and raises where it is not what it should be: then
            what was there before stays.

    Raises:
        RunError: the disk is full, or the file cannot be written; what was there before is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(END, BEGIN, path.parent, ignore_cleanup_errors=True) as own:
            temporary = Path(own) / path.name
            write(temporary)
            flush(temporary)
            read_back(temporary)
            os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(why_not_written(path, error)) from error


def delete_replaced(old: Iterable[Path], read_back: Callable[[], T]) -> T:
    """Delete files only after `read_back()` has read what replaces them; what it returned.

    Raises:
        RunError: a file cannot be deleted; whatever `read_back` raises, and then all files stay.
    """
    found = read_back()
    for path in old:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{path} could not be deleted: {error}.") from error
    return found


def sweep(folder: Path, mark: str) -> None:
    """Delete what killed writes have left in a run's folder; nobody may be writing there.

    It deletes only the directories that `write_atomically` made, and only where the file `mark`
    shows that the folder is a run's: whatever else is there is not ours.
    """
    if (folder / mark).is_file():
        for stale in folder.glob(f"{BEGIN}????????{END}"):
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the system frees it however the process ends.

    Inside, who asks for the same folder again, in the same thread, has it already.

    Raises:
        InUse: another process, or another thread of this one, holds it.
        RunError: the folder cannot be written.
    """
    place = folder.resolve()
    if place in HELD.get():
        yield
        return
    holder, new = folder / HOLDER, not folder.exists()
    lock = take_lock(folder)
    inside = HELD.set(HELD.get() | {place})
    try:
        with suppress(OSError):
            who = f"process {os.getpid()} on {socket.gethostname()}"
            holder.write_text(f"{who} since {time.strftime('%Y-%m-%d %H:%M:%S')}", "utf-8")
        yield
    finally:
        HELD.reset(inside)
        for path in (holder, folder / LOCK):  # while it is held: nobody takes a lock without a name
            with suppress(OSError):
                path.unlink()
        lock.release()
        if new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


def take_lock(folder: Path) -> FileLock:
    """The lock of a folder, which is made where it is not there; held, where the disk has locks."""
    lock = FileLock(folder / LOCK, timeout=0.5)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InUse(
            f"{folder} is in use by {read_holder(folder / HOLDER)}: wait until it has ended, or "
            "choose another folder."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(
                why_no_folder(folder) or why_not_written(folder / LOCK, error)
            ) from error
    return lock


def why_no_folder(folder: Path) -> str:
    """One sentence where a path cannot be a folder, as a file stands in its way; else ""."""
    for each in (folder, *folder.parents):
        if each.exists():
            return "" if each.is_dir() else f"{each} is a file: choose another folder for the run."
    return ""


def read_holder(path: Path) -> str:
    """Who holds a folder's lock, as `alone_in` wrote it."""
    with suppress(OSError):
        return path.read_text("utf-8") or "another process"
    return "another process"


def flush(path: Path) -> None:
    """fsync of a file, or of a folder (which makes a rename in it durable; not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why_not_written(path: Path, error: BaseException) -> str:
    """One sentence for a failed write: a full disk is named as one."""
    message = str(error)
    full = getattr(error, "errno", None) in FULL
    if full or any(f"(os error {code})" in message for code in FULL):
        return (
            f"The disk is full: {path.name} could not be written to {path.parent}. Free some "
            "space and run the same command again: nothing that was written before is lost."
        )
    return f"{path} could not be written: {message}."


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8", newline="\n"))


BLANK = r"[^\S\0-\x1f\x85]"
MARKS = re.compile(r"[\\`*\[\]<>&|~$#\t\n\r]|(?<![^\W_])_|_(?![^\W_])" rf"|^{BLANK}|{BLANK}$")


def literal(text: str) -> str:
    """A text as Markdown that shows it as it is, in a table too."""
    return MARKS.sub(lambda mark: f"&#{ord(mark[0])};", text)


def between(text: str, begin: str, end: str) -> str | None:
    """The part of a text from one marker to the other, markers included; None without them."""
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), text, flags=re.DOTALL)
    return found[0] if found else None


def put_between(path: Path, begin: str, end: str, new: str) -> bool:
    """Put `new`, markers included, in the place of what stands between them; False without them."""
    text = path.read_text("utf-8") if path.is_file() else ""
    old = between(text, begin, end)
    if old is None:
        return False
    write_text(path, text.replace(old, new))
    return True


def write_json(path: Path, value) -> None:
    """A JSON file, atomically, with sorted keys."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path, **wanted: Kind) -> dict:
    """The object in a JSON file.

    Args:
        wanted: {key: the kinds that this entry may have}, as in `errors.checked`.

    Raises:
        RunError: it is missing, damaged, too large or no object, or has an entry of another kind.
    """
    with reading(path, RunError, "Delete it and run again." * Path(path).is_file()):
        size = path.stat().st_size
        if size > MOST_JSON:
            raise RunError(f"{path} has {size:,} bytes, and at most {MOST_JSON:,} are read.")
        found = json.loads(path.read_text("utf-8"))
    return checked(found, path, RunError, **wanted)


def seal(value: Mapping) -> str:
    """sha256 over a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, value: Mapping) -> None:
    """A JSON object with its own checksum under "sha256", atomically."""
    write_json(path, {**value, "sha256": seal(value)})


def read_sealed(path: Path, advice: str = "Delete it and run again.") -> dict:
    """What `write_sealed` wrote, without the checksum.

    Raises:
        RunError: it is missing, damaged, or not what was written; `advice` says what to do.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("sha256", None) != seal(value):
        raise RunError(not_written(path, advice))
    return value


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping | None = None) -> str:
    """Tensors and a JSON-able `about`, atomically; returns the checksum of both.

    What is written is read back before it takes the place of what was there.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = {"tensors": checksum(held), "about": dict(about or {})}
    digest = seal(said)
    metadata = {META: json.dumps(said | {"sha256": digest}, sort_keys=True)}  # one: order is lost
    write_atomically(path, lambda to: save_file(held, to, metadata), load_tensors)
    return digest


def load_tensors(path: Path, check: bool = True, advice: str = "") -> tuple[dict, dict]:
    """(tensors, about) of a file that `save_tensors` wrote.

    Raises:
        RunError: it is missing, truncated, or not what was written; `advice` says what to do.
    """
    with opened(path, advice) as file:
        said = read_metadata(file, path, advice)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if check and said["tensors"] != checksum(tensors):
        raise RunError(not_written(path, advice))
    return tensors, said["about"]


@contextmanager
def opened(path: Path, advice: str = "") -> Iterator:
    """A safetensors file, open; RunError when it is missing or truncated."""
    with reading(path, RunError, advice), safe_open(path, "pt") as file:
        yield file


def not_written(path: Path, advice: str) -> str:
    """One sentence for a file that is not as it was written."""
    return f"{path} is not what was written: its checksum differs. {advice}".strip()


def read_metadata(file, path: Path, advice: str = "") -> dict:
    """What `save_tensors` wrote into an open file's head; RunError where it was changed."""
    try:
        said = json.loads(file.metadata()[META])
        digest = said.pop("sha256")
        if digest == seal({name: said[name] for name in ("tensors", "about")}):
            return said | {"sha256": digest}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise RunError(not_written(path, advice))


def read_about(path: Path) -> tuple[str, dict]:
    """(checksum as written, about) from a file's head alone; RunError when it is truncated."""
    with opened(path) as file:
        said = read_metadata(file, path)
    return said["sha256"], said["about"]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from a file's head alone; RunError when it is truncated.

    A head that declares more bytes than the file has counts as truncated.
    """
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def is_beside(name: object, suffix: str = ".safetensors") -> bool:
    """Whether a name that stands in a file is a plain one, of a file in the same folder."""
    return isinstance(name, str) and name.endswith(suffix) and not set(name) & set("/\\:\0")


def need_space(folder: Path, needed: float, what: str, advice: str = "") -> None:
    """RunError, before any work, when the disk of `folder` has less than `needed` bytes free."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"{what} needs {needed / 1e9:.1f} GB of disk and {folder} has {free / 1e9:.1f} GB "
            f"free: free some space{advice}."
        )


# ---------------------------------------------------------------------------------- the manifest

CHECKSUMS = "Checksums of what ships: a line `sha256  size  path` in MANIFEST per file of data/."


def shipped_files(folder: Path) -> list[Path]:
    """Every file under `folder` but the manifest itself and hidden files, sorted by path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    parts = ((path, path.relative_to(folder).parts) for path in found)
    kept = [path for path, names in parts if names != (MANIFEST,) and not is_hidden(names)]
    return sorted(kept, key=lambda path: path.relative_to(folder).as_posix())


def is_hidden(names: tuple[str, ...]) -> bool:
    """Whether any part of a path is hidden, as what a killed write left is, or a cache."""
    return any(n.startswith(".") or n == "__pycache__" for n in names)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_lines(folder: Path) -> list[str]:
    """The manifest's lines for what `folder` holds now."""
    return [
        f"{sha256(path)}  {path.stat().st_size}  {path.relative_to(folder).as_posix()}"
        for path in shipped_files(folder)
    ]


def write_manifest(folder: Path = DATA) -> Path:
    """Write the manifest of `folder`, atomically; returns its path."""
    write_text(folder / MANIFEST, "".join(f"{line}\n" for line in manifest_lines(folder)))
    return folder / MANIFEST


def verify_manifest(folder: Path = DATA) -> list[str]:
    """What differs between `folder` and its manifest, one sentence each; empty when all agrees."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [
            f"{folder.name}/{MANIFEST} is missing: python -m mi_helpers manifest --write makes it."
        ]
    listed, problems = {}, []
    with reading(manifest, RunError, "python -m mi_helpers manifest --write makes it."):
        lines = manifest.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fields = line.split("  ", 2)
        if len(fields) == 3:
            listed[fields[2]] = line
        else:
            problems.append(f"Line {number} of {MANIFEST} is not 'sha256  size  path'.")
    present = {line.split("  ", 2)[2]: line for line in manifest_lines(folder)}
    problems += [f"{path} is listed but missing." for path in sorted(listed.keys() - present)]
    problems += [f"{path} is not listed." for path in sorted(present.keys() - listed)]
    both = sorted(listed.keys() & present)
    return problems + [f"{path} differs." for path in both if listed[path] != present[path]]


def main_manifest(write: bool = False, folder: Path = DATA) -> int:
    """Check the files of data/ against their checksums; the exit code is 1 when they differ.

    Args:
        write: write the checksums anew from what is there
        folder: of the files
    """
    if not folder.is_dir():
        print(f"There is no folder {folder.name}.")
        return 1
    if write:
        write_manifest(folder)
    problems = verify_manifest(folder)
    print("\n".join(problems) or f"{len(shipped_files(folder))} files, all as listed.")
    return 1 if problems else 0
