"""`python -m mi_helpers doctor`: what works on this machine, in sentences."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mi_helpers.files import shipped_files, verify_manifest

ROOT = Path(__file__).resolve().parents[2]
ESSENTIAL = ("torch", "numpy", "transformers", "matplotlib", "ipywidgets", "jupyterlab")
GEMMA_PARAMETERS = 2_614_341_888
GB = 1e9
PROMPT = "The Eiffel Tower is in the city of"

GOOD, NOTE, BAD = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report; BAD means that the course cannot run."""

    status: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.status:4}  {self.sentence}"


def pins(text: str) -> dict[str, str]:
    """Name -> version of the `name==version` lines of a requirements file."""
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def installed(name: str) -> str | None:
    """A package's version without its build's local suffix, or None."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    """Which Python this is; one that is too old cannot install the package."""
    system = f"{platform.system()} {platform.machine()}"
    return Finding(GOOD, f"Python {platform.python_version()} on {system}.")


def packages(wanted: dict[str, str]) -> Iterator[Finding]:
    """What is missing, what differs from the pins, and how many agree."""
    have = {name: installed(name) for name in wanted}
    for name in ESSENTIAL:
        if (have[name] if name in have else installed(name)) is None:
            yield Finding(BAD, f"{name} is not installed: make lab installs it.")
    agree = sum(have[name] == version for name, version in wanted.items())
    yield Finding(GOOD, f"{agree} of {len(wanted)} pinned packages have the pinned version.")
    for name, version in wanted.items():
        if have[name] is None and name not in ESSENTIAL:
            yield Finding(NOTE, f"{name} {version} is pinned but not installed.")
        elif have[name] not in (None, version):
            yield Finding(NOTE, f"{name} is {have[name]}, the course was made with {version}.")


def machine(total: float, available: float, disk: float) -> Finding:
    """Cores, and bytes of memory and disk."""
    words = (
        f"{os.cpu_count()} cores, memory {total / GB:.1f} GB ({available / GB:.1f} GB available), "
        f"{disk / GB:.1f} GB of disk free."
    )
    if available < 2 * GB:
        return Finding(NOTE, f"{words} The lessons want 2 GB.")
    return Finding(GOOD, words)


def data(folder: Path) -> Finding:
    """Whether the shipped files are what their manifest says."""
    problems = verify_manifest(folder)
    if not problems:
        count = len(shipped_files(folder))
        return Finding(GOOD, f"All {count} files of data/ are as they were shipped.")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(BAD, f"In data/: {problems[0]}{more}")


def generation() -> Finding:
    """Ten tokens from the shipped model."""
    try:
        from mi_helpers.loading import load_model

        text = load_model().generate(PROMPT, 10)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Finding(BAD, f"The model does not run: {type(error).__name__}: {reason}")
    return Finding(GOOD, f"tiny-gemma writes: {' '.join(str(text).split())}")


def gemma(total: float) -> Finding:
    """What Gemma 2 2B would need here."""
    half, full = 2 * GEMMA_PARAMETERS / GB, 4 * GEMMA_PARAMETERS / GB
    need = f"Gemma 2 2B (optional) needs {half:.1f} GB in bfloat16 or {full:.1f} GB in float32"
    how = (
        "; the first time also a network, its licence accepted on the hub, and a token from there. "
        "For real text to run it on: pip install -c requirements-extras.txt -e '.[gemma]'"
    )
    spare = total - 2 * GB
    fits = [name for name, size in (("bfloat16", half), ("float32", full)) if size * GB < spare]
    verdict = f"fits in {' and '.join(fits)}" if fits else "does not fit"
    return Finding(NOTE, f"{need}: with {total / GB:.1f} GB of memory it {verdict}{how}")


def findings() -> Iterator[Finding]:
    """The whole report, line by line."""
    memory = psutil.virtual_memory()
    yield python()
    requirements = ROOT / "requirements.txt"
    if requirements.is_file():
        yield from packages(pins(requirements.read_text("utf-8")))
    else:
        yield Finding(BAD, "requirements.txt is missing: run this in a copy of the repository.")
    yield machine(memory.total, memory.available, shutil.disk_usage(ROOT).free)
    yield data(ROOT / "data")
    yield generation()
    yield gemma(memory.total)


def main() -> int:
    """Say what works on this machine: packages, memory, data, the model; and Gemma 2 2B.

    The exit code is 1 when anything essential is wrong.
    """
    bad = 0
    for finding in findings():
        print(finding, flush=True)
        bad += finding.status == BAD
    if bad:
        print("\nSome lessons will not run until the lines marked FAIL are solved.")
    else:
        print("\nEvery lesson runs here, offline: nothing is downloaded and no account is needed.")
    return 1 if bad else 0
