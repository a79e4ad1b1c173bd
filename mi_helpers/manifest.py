"""Checksums of what ships: a line `sha256  size  path` in `data/MANIFEST` per file of `data/`."""

import argparse
import hashlib
import os
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
NAME = "MANIFEST"


def files(folder: Path) -> list[Path]:
    """Every file under `folder` but the manifest itself and hidden files, sorted by path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    parts = ((path, path.relative_to(folder).parts) for path in found)
    kept = [path for path, names in parts if names != (NAME,) and not is_hidden(names)]
    return sorted(kept, key=lambda path: path.relative_to(folder).as_posix())


def is_hidden(names: tuple[str, ...]) -> bool:
    """Whether any part of a path is hidden or a cache."""
    return any(name.startswith(".") or name == "__pycache__" for name in names)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lines(folder: Path) -> list[str]:
    """The manifest's lines for what `folder` holds now."""
    return [
        f"{sha256(path)}  {path.stat().st_size}  {path.relative_to(folder).as_posix()}"
        for path in files(folder)
    ]


def write(folder: Path = DATA) -> Path:
    """Write the manifest of `folder`, atomically, and give its path."""
    target = folder / NAME
    temporary = folder / f".{NAME}.new"
    temporary.write_text("".join(f"{line}\n" for line in lines(folder)), "utf-8", newline="\n")
    os.replace(temporary, target)
    return target


def verify(folder: Path = DATA) -> list[str]:
    """What differs between `folder` and its manifest, one sentence each; empty when all agrees."""
    manifest = folder / NAME
    if not manifest.is_file():
        return [f"{folder.name}/{NAME} is missing: python -m mi_helpers manifest --write makes it."]
    listed, problems = {}, []
    for number, line in enumerate(manifest.read_text("utf-8").splitlines(), start=1):
        fields = line.split("  ", 2)
        if len(fields) == 3:
            listed[fields[2]] = line
        else:
            problems.append(f"Line {number} of {NAME} is not 'sha256  size  path'.")
    present = {line.split("  ", 2)[2]: line for line in lines(folder)}
    problems += [f"{path} is listed but missing." for path in sorted(listed.keys() - present)]
    problems += [f"{path} is not listed." for path in sorted(present.keys() - listed)]
    both = sorted(listed.keys() & present)
    return problems + [f"{path} differs." for path in both if listed[path] != present[path]]


def main(argv: list[str]) -> int:
    """`python -m mi_helpers manifest [--write] [--folder DATA]`."""
    parser = argparse.ArgumentParser(prog="python -m mi_helpers manifest", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it anew from what is there")
    parser.add_argument("--folder", type=Path, default=DATA)
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        print(f"There is no folder {options.folder.name}.")
        return 1
    if options.write:
        write(options.folder)
    problems = verify(options.folder)
    print("\n".join(problems) or f"{len(files(options.folder))} files, all as listed.")
    return 1 if problems else 0
