"""pyproject.toml is the one list of dependencies: files, imports and make agree with it."""

import ast
import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mi_helpers.course.doctor import pins

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["build-system"]["requires"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
TEST = [Requirement(line) for line in EXTRAS["test"]]
PINS = {
    canonicalize_name(name): version
    for name, version in pins((ROOT / "requirements.txt").read_text("utf-8")).items()
}
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))


def needed(wanted: list[Requirement]) -> set[str]:
    """The names of these packages and, on this platform, of all that they need."""
    names, waiting = set(), list(wanted)
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in names:
            names.add(name)
            lines = importlib.metadata.requires(name) or []
            found = [Requirement(line) for line in lines]
            waiting += [r for r in found if not r.marker or r.marker.evaluate({"extra": ""})]
    return names


def test_every_dependency_is_pinned_within_its_bounds():
    for requirement in BASE + TEST + [Requirement(line) for line in BUILD]:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_what_the_dependencies_need_is_pinned_too():
    assert needed(BASE + TEST) - set(PINS) == set()


def test_conda_gets_the_pins_and_the_package_with_its_test_extra():
    python, pip, packages = CONDA["dependencies"]
    assert CONDA["channels"] == ["conda-forge"] and pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert packages == {"pip": ["-r requirements.txt", "-e .[test]"]}


def test_pins_are_plain_versions():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or line.count("==") == 1
        assert not any(mark in line for mark in ("+", "://", "@", "--"))


def test_the_extras_are_those_the_course_speaks_of():
    assert set(EXTRAS) == {"test", "browser", "gemma"}


# -- what is imported, and what is declared ---------------------------------------------------

RUN_NOT_IMPORTED = {
    "jupyterlab": "make lab opens it; it brings ipykernel, which the notebooks run in",
    "basedpyright": "make lint",
    "import-linter": "make lint",
    "ruff": "make lint",
    "nbval": "make notebook-tests",
    "pytest-xdist": "pytest -n",
}


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def code(path: Path) -> str:
    """The Python of a module, or of a notebook's cells."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    cells = nbformat.reads(text, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


@functools.cache
def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it, or asks `optional` for."""
    found = set()
    for node in ast.walk(ast.parse(code(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in found}


def outside(*folders: str) -> set[str]:
    """The packages that these folders import: neither Python's own nor modules of this project."""
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    files = [
        p for p in files if p.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in p.parts
    ]
    own = {"mi_helpers", "benchmarks"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    modules = set().union(*map(imported, files)) - set(sys.stdlib_module_names) - own
    providers = importlib.metadata.packages_distributions() | {"sparsify": ["eai-sparsify"]}
    return {canonicalize_name(name) for m in modules for name in providers.get(m, [m])[:1]}


def test_everything_imported_is_declared():
    base = names(PROJECT["dependencies"])
    assert outside("mi_helpers", "notebooks") - base - names(EXTRAS["gemma"]) == set()
    assert outside("tests") - base - names(EXTRAS["test"] + EXTRAS["browser"]) == set()
    peers = [pins(path.read_text("utf-8")) for path in ROOT.glob("benchmarks/requirements*.txt")]
    assert outside("benchmarks") - base - names([name for each in peers for name in each]) == set()


def test_everything_declared_is_imported_or_run():
    """A package of the course is imported by the course itself, not only by its tests."""
    course = names(PROJECT["dependencies"] + EXTRAS["gemma"]) - set(RUN_NOT_IMPORTED)
    assert course - outside("mi_helpers", "notebooks") == set()
    tests = names(EXTRAS["test"] + EXTRAS["browser"]) - set(RUN_NOT_IMPORTED)
    assert tests - outside("tests") == set()
    everything = names(PROJECT["dependencies"] + EXTRAS["test"])
    assert set(RUN_NOT_IMPORTED) <= everything - outside("mi_helpers", "notebooks", "tests")


# -- when make installs -----------------------------------------------------------------------

PYTHON = """\
#!/bin/sh
mkdir -p .venv
echo "$OMP_WAIT_POLICY $*" >>log
case "$*" in *"pip install"*) exit ${PIP_FAILS:-0};; esac
"""


@pytest.fixture
def make(tmp_path):
    """`make lab` in a folder of its own, with a Python that only notes what it is told to do."""
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    ours = {"OMP_WAIT_POLICY", "MAKEFLAGS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}

    def run(**environment) -> list[str]:
        (tmp_path / "log").write_text("")
        command = ["make", "--silent", "lab", "PYTHON=./python", "BIN=."]
        own = kept | environment
        subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, check=False)
        return (tmp_path / "log").read_text().splitlines()

    return run


def installs(lines: list[str]) -> int:
    return sum("pip install" in line for line in lines)


def test_make_installs_when_the_content_of_the_lists_changes_and_only_then(make, tmp_path):
    assert installs(make()) == 3
    for name in ("requirements.txt", "pyproject.toml"):
        before = (tmp_path / name).read_text("utf-8")
        (tmp_path / name).touch()
        assert installs(make()) == 0
        (tmp_path / name).write_text(before + "# another\n", "utf-8")
        assert installs(make()) == 3 and installs(make()) == 0


def test_make_installs_again_where_an_installation_broke_off(make, tmp_path):
    make()
    before = (tmp_path / "requirements.txt").read_text("utf-8")
    (tmp_path / "requirements.txt").write_text(before + "# another\n", "utf-8")
    lines = make(PIP_FAILS="1")
    assert installs(lines) == 1 and "jupyterlab" not in lines[-1]
    (tmp_path / "requirements.txt").write_text(before, "utf-8")
    assert installs(make()) == 3


def test_make_lab_lets_idle_threads_sleep_unless_told_otherwise(make):
    assert make()[-1].startswith("PASSIVE -m jupyterlab")
    assert make(OMP_WAIT_POLICY="ACTIVE")[-1].startswith("ACTIVE -m jupyterlab")
