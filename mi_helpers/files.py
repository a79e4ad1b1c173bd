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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"
MANIFEST = "MANIFEST"
META = "mi_helpers"
BEGIN, END = ".mi-helpers-", ".part"  # of the directories in which files are written
LOCK, HOLDER = ".mi-helpers.lock", ".mi-helpers.holder"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # on some network disks


class RunError(ValueError):
    """What stopped a run, and what to do about it: in one sentence."""


class InUse(RunError):
    """Another process is at work in a run's folder."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, a file or a folder; flush it to the disk, move it to `path`.

    Whatever else `write` leaves beside the temporary path goes with its directory.

    Raises:
        RunError: the disk is full, or the file cannot be written; what was there before is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(END, BEGIN, path.parent, ignore_cleanup_errors=True) as own:
            temporary = Path(own) / path.name
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(why_not_written(path, error)) from error


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

    Raises:
        InUse: another process holds it.
        RunError: the folder cannot be written.
    """
    lock, holder, new = FileLock(folder / LOCK, timeout=0.5), folder / HOLDER, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InUse(
            f"{folder} is in use by {read_holder(holder)}: wait until it has ended, or choose "
            "another folder."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(why_not_written(folder / LOCK, error)) from error
    try:
        with suppress(OSError):
            who = f"process {os.getpid()} on {socket.gethostname()}"
            holder.write_text(f"{who} since {time.strftime('%Y-%m-%d %H:%M:%S')}", "utf-8")
        yield
    finally:
        for path in (holder, folder / LOCK):  # while it is held: nobody takes a lock without a name
            with suppress(OSError):
                path.unlink()
        lock.release()
        if new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written


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


def read_json(path: Path) -> dict:
    """A JSON file; RunError names it when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing.") from None
    except ValueError:
        raise RunError(f"{path} is damaged: it is not JSON. Delete it and run again.") from None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping | None = None) -> str:
    """Tensors and a JSON-able `about`, atomically; returns the checksum that is saved with them."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = checksum(held)
    said = {"sha256": digest, "about": dict(about or {})}
    metadata = {META: json.dumps(said, sort_keys=True)}  # one entry: their order is not kept
    write_atomically(path, lambda to: save_file(held, to, metadata))
    return digest


def load_tensors(path: Path, check: bool = True, advice: str = "") -> tuple[dict, dict]:
    """(tensors, about) of a file that `save_tensors` wrote.

    Raises:
        RunError: it is missing, truncated, or not what was written; `advice` says what to do.
    """
    try:
        with safe_open(path, "pt") as file:
            said = read_metadata(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"{path} is missing. {advice}".strip()) from None
    except (SafetensorError, OSError) as error:
        reason = f"{path} is truncated or damaged ({error})."
        raise RunError(f"{reason} {advice}".strip()) from None
    if check and said["sha256"] != checksum(tensors):
        raise RunError(f"{path} is not what was written: its checksum differs. {advice}".strip())
    return tensors, said["about"]


def read_metadata(file) -> dict:
    """What `save_tensors` wrote into an open file's head."""
    try:
        return json.loads(file.metadata()[META])
    except (KeyError, TypeError, ValueError):
        return {"sha256": None, "about": {}}


def read_about(path: Path) -> tuple[str, dict]:
    """(checksum as written, about) from a file's head alone; RunError when it is truncated."""
    try:
        with safe_open(path, "pt") as file:
            said = read_metadata(file)
    except FileNotFoundError:
        raise RunError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is truncated or damaged ({error}).") from None
    return said["sha256"] or "", said["about"]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from a file's head alone; RunError when it is truncated.

    A head that declares more bytes than the file has counts as truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is truncated or damaged ({error}).") from None


def is_beside(name: object, suffix: str = ".safetensors") -> bool:
    """Whether a name that stands in a file is a plain one, of a file in the same folder."""
    return isinstance(name, str) and name.endswith(suffix) and not set(name) & set("/\\:\0")


def need_space(folder: Path, needed: float, what: str) -> None:
    """RunError, before any work, when the disk of `folder` has less than `needed` bytes free."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"{what} needs {needed / 1e9:.1f} GB of disk and {folder} has {free / 1e9:.1f} GB "
            "free: free some space, or ask for fewer tokens."
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
    for number, line in enumerate(manifest.read_text("utf-8").splitlines(), start=1):
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
