"""`make bench`: how long a step of each lesson's sliders takes on this machine.

Every notebook's cells are run in this process, its `explore` calls are caught, and each explorer
takes 50 random steps, the drawing of the PNG included. Times depend on the machine; tests time
nothing.
"""

import contextlib
import io
import random
import statistics
import sys
import time
from pathlib import Path

import ipywidgets
import nbformat

from mi_helpers import widgets

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
STEPS = 50


def explorers(path: Path) -> list[widgets.Explorer]:
    """Run a notebook's code cells and give the explorers that it shows."""
    shown = []

    def explore(figure, **controls):
        shown.append(widgets.Explorer(figure, **controls))

    original, widgets.explore = widgets.explore, explore
    names = {"__name__": "__main__", "display": lambda *_things: None}
    try:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(cell.source, str(path), "exec"), names)
    finally:
        widgets.explore = original
    return shown


def move(control: ipywidgets.Widget, rng: random.Random) -> bool:
    """Set a control to another of its values; False where it offers none to choose from."""
    before = control.value
    if choices := widgets.options(control):
        control.value = rng.choice(choices)
    elif isinstance(control, ipywidgets.FloatLogSlider):
        control.value = control.base ** rng.uniform(control.min, control.max)
    elif hasattr(control, "min") and hasattr(control, "max"):
        steps = round((control.max - control.min) / control.step)
        control.value = control.min + control.step * rng.randint(0, steps)
    elif isinstance(control.value, bool):
        control.value = not control.value
    return control.value != before


def step_times(explorer: widgets.Explorer, steps: int = STEPS, seed: int = 0) -> list[float]:
    """Seconds of `steps` moves of one control each, callback and PNG included."""
    rng, times = random.Random(seed), []
    controls = list(explorer.controls.values())
    for _ in range(20 * steps):
        control = rng.choice(controls)
        start = time.perf_counter()
        if move(control, rng):
            times.append(time.perf_counter() - start)
        if len(times) == steps:
            break
    return times


def main() -> int:
    print(f"{'notebook':28} {'controls':44} {'median':>8} {'95 %':>8}   milliseconds a step")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for explorer in explorers(path):
            times = [1_000 * t for t in step_times(explorer)]
            names = ", ".join(explorer.controls)
            p95 = statistics.quantiles(times, n=20)[-1]
            print(f"{path.stem:28} {names:44} {statistics.median(times):8.0f} {p95:8.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
