"""pyproject.toml is the one list of dependencies; the other files agree with it."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mi_helpers.course.doctor import pins

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
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
    for requirement in BASE + TEST:
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


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_everything_imported_is_declared():
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in BASE}
    declared |= {canonicalize_name(Requirement(line).name) for line in EXTRAS["gemma"]}
    for path in (ROOT / "mi_helpers").rglob("*.py"):
        outside = imported(path) - set(sys.stdlib_module_names) - {"mi_helpers"}
        for module in outside:
            names = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert names & declared, f"{path.name} imports {module}, which pyproject.toml lacks"
