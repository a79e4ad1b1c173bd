"""`python -m mi_helpers doctor`: what works on this machine, in sentences."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


def memory() -> tuple[float | None, float | None]:
    """Total and available memory in bytes; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            fields = dict(line.split(":") for line in stream)
        return tuple(float(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), None
    except (AttributeError, OSError, ValueError):
        return None, None


def machine(total: float | None, available: float | None, disk: float) -> Finding:
    """Cores, memory and disk."""
    size = "unknown" if total is None else f"{total / GB:.1f} GB"
    free = "" if available is None else f" ({available / GB:.1f} GB available)"
    words = f"{os.cpu_count()} cores, memory {size}{free}, {disk / GB:.1f} GB of disk free."
    small = (available or total or 4 * GB) < 2 * GB
    return Finding(NOTE, f"{words} The lessons want 2 GB.") if small else Finding(GOOD, words)


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


def gemma(total: float | None) -> Finding:
    """What Gemma 2 2B would need here."""
    half, full = 2 * GEMMA_PARAMETERS / GB, 4 * GEMMA_PARAMETERS / GB
    need = f"Gemma 2 2B (optional) needs {half:.1f} GB in bfloat16 or {full:.1f} GB in float32"
    how = (
        "; the first time also a network, its licence accepted on the hub, and a token from there. "
        "For real text to run it on: pip install -e .[gemma]"
    )
    if total is None:
        return Finding(NOTE, f"{need}, and the memory of this machine is unknown{how}")
    spare = total - 2 * GB
    fits = [name for name, size in (("bfloat16", half), ("float32", full)) if size * GB < spare]
    verdict = f"fits in {' and '.join(fits)}" if fits else "does not fit"
    return Finding(NOTE, f"{need}: with {total / GB:.1f} GB of memory it {verdict}{how}")


def findings() -> Iterator[Finding]:
    """The whole report, line by line."""
    total, available = memory()
    yield python()
    requirements = ROOT / "requirements.txt"
    if requirements.is_file():
        yield from packages(pins(requirements.read_text("utf-8")))
    else:
        yield Finding(BAD, "requirements.txt is missing: run this in a copy of the repository.")
    yield machine(total, available, shutil.disk_usage(ROOT).free)
    yield data(ROOT / "data")
    yield generation()
    yield gemma(total)


def main(argv: list[str]) -> int:
    """Print the report; 1 when anything essential is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mi_helpers doctor", description=__doc__)
    parser.parse_args(argv)
    bad = 0
    for finding in findings():
        print(finding, flush=True)
        bad += finding.status == BAD
    if bad:
        print("\nSome lessons will not run until the lines marked FAIL are solved.")
    else:
        print("\nEvery lesson runs here, offline: nothing is downloaded and no account is needed.")
    return 1 if bad else 0
