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

from mi_helpers.course.doctor import installed, pins

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["build-system"]["requires"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
TEST = [Requirement(line) for line in EXTRAS["test"]]
LISTS = ("requirements.txt", "requirements-extras.txt")
PINS, EXTRA_PINS = (
    {
        canonicalize_name(name): version
        for name, version in pins((ROOT / file).read_text("utf-8")).items()
    }
    for file in LISTS
)
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))


BUILDS = ("nvidia-", "cuda-", "triton", "pytorch-triton")  # what a build of torch brings


def needed(wanted: list[Requirement]) -> set[str]:
    """The names of these packages and, on this platform, of all that they need.

    What builds of torch with CUDA or ROCm bring along is theirs: other machines have no use for it.
    """
    names, waiting = set(), list(wanted)
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in names and not name.startswith(BUILDS):
            names.add(name)
            lines = importlib.metadata.requires(name) or []
            found = [Requirement(line) for line in lines]
            waiting += [r for r in found if not r.marker or r.marker.evaluate({"extra": ""})]
    return names


def test_every_dependency_is_pinned_within_its_bounds():
    for requirement in BASE + TEST + [Requirement(line) for line in BUILD]:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])
    for requirement in [Requirement(line) for lines in EXTRAS.values() for line in lines]:
        pin = (PINS | EXTRA_PINS)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin)
    assert not set(PINS) & set(EXTRA_PINS)


def test_what_is_installed_of_the_extras_needs_nothing_without_a_pin():
    optional = [Requirement(line) for lines in EXTRAS.values() for line in lines]
    here = [requirement for requirement in optional if installed(requirement.name)]
    assert needed(here) - set(PINS | EXTRA_PINS) == set()


def test_what_the_pins_allow_is_every_python_that_the_course_allows():
    """Asked of the packages that are installed here in their pinned version."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    wanted = {
        name: importlib.metadata.metadata(name)["Requires-Python"]
        for name in PINS
        if installed(name) == PINS[name]
    }
    assert len(wanted) > len(PINS) / 2
    for python in (oldest, "3.12.0", "3.13.0"):
        refuse = [
            n for n, bounds in wanted.items() if bounds and python not in SpecifierSet(bounds)
        ]
        assert refuse == [], python


def test_what_the_dependencies_need_is_pinned_too():
    assert needed(BASE + TEST) - set(PINS) == set()


def test_what_a_build_of_torch_brings_is_not_demanded(monkeypatch):
    asked, cuda = importlib.metadata.requires, ["nvidia-cublas==13", "triton==3", "cuda-bindings"]
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: (asked(name) or []) + (cuda if name == "torch" else []),
    )
    assert needed(BASE + TEST) - set(PINS) == set()


def test_conda_gets_the_pins_and_the_package_with_its_test_extra():
    python, pip, packages = CONDA["dependencies"]
    assert CONDA["channels"] == ["conda-forge"] and pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert packages == {"pip": ["-r requirements.txt", "-e .[test]"]}


def test_pins_are_plain_versions():
    for line in [line for file in LISTS for line in (ROOT / file).read_text("utf-8").splitlines()]:
        assert line.startswith("#") or line.count("==") == 1
        assert not any(mark in line for mark in ("+", "://", "@", "--"))


def test_the_extras_are_those_the_course_speaks_of():
    assert set(EXTRAS) == {"test", "browser", "gemma", "install", "naming"}


# -- what is imported, and what is declared ---------------------------------------------------

RUN_NOT_IMPORTED = {
    "jupyterlab": "make lab opens it; it brings ipykernel, which the notebooks run in",
    "basedpyright": "make lint",
    "import-linter": "make lint",
    "ruff": "make lint",
    "nbval": "make notebook-tests",
    "pytest-xdist": "pytest -n",
    "uv": "config/torch.sh",
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
    optional = names(EXTRAS["gemma"] + EXTRAS["naming"])
    assert outside("mi_helpers", "notebooks") - base - optional == set()
    assert outside("tests") - base - names(EXTRAS["test"] + EXTRAS["browser"]) == set()
    peers = [pins(path.read_text("utf-8")) for path in ROOT.glob("benchmarks/requirements*.txt")]
    assert outside("benchmarks") - base - names([name for each in peers for name in each]) == set()


def test_everything_declared_is_imported_or_run():
    """A package of the course is imported by the course itself, not only by its tests."""
    course = names(PROJECT["dependencies"] + EXTRAS["gemma"] + EXTRAS["naming"])
    assert course - set(RUN_NOT_IMPORTED) - outside("mi_helpers", "notebooks") == set()
    tests = names(EXTRAS["test"] + EXTRAS["browser"]) - set(RUN_NOT_IMPORTED)
    assert tests - outside("tests") == set()
    assert names(EXTRAS["install"]) <= set(RUN_NOT_IMPORTED)
    everything = names(PROJECT["dependencies"] + EXTRAS["test"] + EXTRAS["install"])
    assert set(RUN_NOT_IMPORTED) <= everything - outside("mi_helpers", "notebooks", "tests")


# -- when make installs -----------------------------------------------------------------------

PYTHON = """\
#!/bin/sh
mkdir -p .venv
echo "$OMP_WAIT_POLICY $MI_MODEL $*" >>log
case "$*" in
  *"pip config list"*) echo "$PIP_IS_SET";;
  *"pip show torch"*) echo "Version: $HAVE_TORCH";;
  *"uv pip"*) exit ${UV_FAILS:-0};;
  *"pip install"*) exit ${PIP_FAILS:-0};;
esac
"""


@pytest.fixture
def make(tmp_path):
    """`make lab` in a folder of its own, with a Python that only notes what it is told to do."""
    if not shutil.which("make"):
        pytest.skip("there is no make here")
    (tmp_path / "config").mkdir()
    for name in ("Makefile", *LISTS, "pyproject.toml", "config/torch.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    ours = {"OMP_WAIT_POLICY", "MAKEFLAGS", "MI_MODEL", "WORK", "TORCH"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}

    def run(*arguments, **environment) -> list[str]:
        (tmp_path / "log").write_text("")
        command = ["make", "--silent", *(arguments or ["lab"]), "PYTHON=./python", "BIN=."]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=kept | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        (tmp_path / "said").write_text(done.stdout)
        return (tmp_path / "log").read_text().splitlines()

    return run


def installs(lines: list[str]) -> int:
    return sum("pip install" in line for line in lines)


def test_make_installs_when_the_content_of_the_lists_changes_and_only_then(make, tmp_path):
    assert installs(make(TORCH="pip")) == 3
    for name in ("requirements.txt", "pyproject.toml"):
        before = (tmp_path / name).read_text("utf-8")
        (tmp_path / name).touch()
        assert installs(make(TORCH="pip")) == 0
        (tmp_path / name).write_text(before + "# another\n", "utf-8")
        assert installs(make(TORCH="pip")) == 3 and installs(make(TORCH="pip")) == 0


def test_make_installs_again_where_an_installation_broke_off(make, tmp_path):
    make(TORCH="pip")
    before = (tmp_path / "requirements.txt").read_text("utf-8")
    (tmp_path / "requirements.txt").write_text(before + "# another\n", "utf-8")
    lines = make(TORCH="pip", PIP_FAILS="1")
    assert installs(lines) == 1 and "jupyterlab" not in lines[-1]
    (tmp_path / "requirements.txt").write_text(before, "utf-8")
    assert installs(make(TORCH="pip")) == 3


def test_make_lab_lets_idle_threads_sleep_unless_told_otherwise(make):
    assert make()[-1].startswith("PASSIVE  -m jupyterlab")
    assert make(OMP_WAIT_POLICY="ACTIVE")[-1].startswith("ACTIVE  -m jupyterlab")


def test_make_lab_brings_the_learners_copies_and_opens_their_folder(make):
    *_, copies, lab = make()
    assert copies.endswith(" -m mi_helpers lessons --folder work")
    assert "--ServerApp.root_dir=work " in lab
    *_, copies, lab = make("lab", WORK="~/my lessons")
    assert f"--folder {Path.home()}/my lessons" in copies and f"={Path.home()}/my lessons " in lab
    assert make("fresh", "NAMES=03")[-1].endswith("lessons --folder work --fresh 03")


def test_a_model_is_named_from_where_make_is_called(make, tmp_path):
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "config.json").write_text("{}")
    assert f" {tmp_path / 'models' / 'a'} -m jupyterlab" in make(MI_MODEL="models/a")[-1]
    assert " google/gemma-2-2b -m jupyterlab" in make(MI_MODEL="google/gemma-2-2b")[-1]


# -- which torch ------------------------------------------------------------------------------

TORCH = f"torch=={PINS['torch']}"


def fetched(lines: list[str]) -> list[str]:
    """Who was asked for torch, in order."""
    return [line.split("-m ")[1].split()[0] for line in lines if line.endswith(TORCH)]


def test_uv_fetches_the_build_for_the_cpu_in_its_pinned_version(make, tmp_path):
    lines = make(TORCH="cpu")
    assert fetched(lines) == ["uv"]
    asked = next(line for line in lines if line.endswith(TORCH))
    assert "--torch-backend cpu" in asked and "--python ./python" in asked
    assert any(line.endswith(f"uv=={EXTRA_PINS['uv']}") for line in lines)
    assert "0.2 GB" in (tmp_path / "said").read_text()


def test_plain_pip_fetches_torch_where_uv_cannot(make, tmp_path):
    assert fetched(make(TORCH="cpu", UV_FAILS="1")) == ["uv", "pip"]
    assert "2.7 GB" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("build", ["cpu", "pip"])
@pytest.mark.parametrize(("local", "there"), [("", True), ("+cpu", True), (".1", False)])
def test_torch_is_not_fetched_where_it_is_there(make, build, local, there):
    lines = make(TORCH=build, HAVE_TORCH=PINS["torch"] + local)
    assert (fetched(lines) == []) == there


@pytest.mark.parametrize("setting", ["global.no-index='1'", ":env:.find" + "-links='/wheels'"])
def test_torch_comes_from_where_pip_is_told_to_look(make, setting):
    assert fetched(make(TORCH="cpu", PIP_IS_SET=setting)) == ["pip"]


def test_options_that_say_where_to_look_count_too(make):
    assert fetched(make("lab", "PIP_ARGS=--no-index -f wheels", TORCH="cpu")) == ["pip"]


@pytest.mark.parametrize(
    ("system", "card", "who"), [("Linux", 0, "pip"), ("Linux", 1, "uv"), ("Darwin", 1, "pip")]
)
def test_only_linux_without_a_graphics_card_needs_another_build(make, tmp_path, system, card, who):
    for name, does in (
        ("nvidia-smi", f"[ {card} = 0 ] && echo GPU 0"),
        ("uname", f"echo {system}"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    assert fetched(make(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")) == [who]


def test_no_pin_asks_for_what_a_build_of_torch_brings():
    assert [name for name in PINS | EXTRA_PINS if name.startswith(BUILDS)] == []
