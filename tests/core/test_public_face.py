"""`from mi_helpers import …`: the names a notebook begins with, and what each of them loads."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mi_helpers

ROOT = Path(mi_helpers.__file__).parent
CORE = sorted({path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"})
ROOMS = sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - {"views"})  # above it
TOLD = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    module, _, attribute = name.partition(":")
    getattr(importlib.import_module(module), attribute or "__name__")
    new = set(sys.modules) - before
    found[name] = sorted(m[11:] for m in new if m.startswith("mi_helpers."))
print(json.dumps(found))
"""


def loaded(*names: str) -> dict[str, list[str]]:
    """The course's modules that a fresh Python loads for each name in turn, beyond the former."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD, *names], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_name_is_there_and_only_once():
    assert len(set(mi_helpers.__all__)) == len(mi_helpers.__all__) <= 16
    assert set(mi_helpers.__all__) <= set(dir(mi_helpers))
    for name in mi_helpers.__all__:
        assert getattr(getattr(mi_helpers, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="has no attribute 'logit_lense'"):
        _ = mi_helpers.logit_lense


def test_a_type_checker_sees_the_same_names():
    """The imports under TYPE_CHECKING are those that `__getattr__` makes."""
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(seen) == set(mi_helpers.__all__)
    for name, module in seen.items():
        assert getattr(mi_helpers, name) is getattr(sys.modules[module], name)


def test_the_package_itself_loads_nothing():
    assert loaded("mi_helpers") == {"mi_helpers": []}


@pytest.fixture(scope="module")
def core_loads():
    return loaded(*(f"mi_helpers.{name}" for name in CORE))


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_loads_core_modules_alone(module, core_loads):
    """No lesson, no world, no coder and no circuit stands behind a method of the core."""
    above = [name for name in core_loads[f"mi_helpers.{module}"] if name.split(".")[0] in ROOMS]
    assert not above


def test_the_public_face_loads_core_modules_alone():
    for name, modules in loaded(*(f"mi_helpers:{name}" for name in mi_helpers.__all__)).items():
        assert {module.split(".")[0] for module in modules} <= {*CORE, "views"}, name


def test_the_core_has_twenty_two_modules_at_most():
    assert len(CORE) <= 22
