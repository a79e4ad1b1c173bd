"""The import rule, where it matters most to a user: the core loads nothing of what is above it."""

import subprocess
import sys

import pytest

CORE = ("attribution", "lens", "probes")
ABOVE = ("saes", "circuits", "tinyworld", "tiny_gemma", "course", "lessons")


@pytest.mark.parametrize("name", CORE)
def test_the_core_loads_nothing_above_it(name):
    code = f"import sys; import mi_helpers.{name}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {each for each in loaded.stdout.split() if each.startswith("mi_helpers.")}
    assert f"mi_helpers.{name}" in ours
    assert not {each for each in ours if each.split(".")[1] in ABOVE}
