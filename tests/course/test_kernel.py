"""`check` in a real kernel: buttons, cells that did not run, names that are not there."""

import os
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from mi_helpers.course.exercise import lessons

IMPORTS = "from mi_helpers.course import check, hint, predict, progress"
STUB = 'def project_out(x, v, centre):\n    """Move."""\n    ...\n'
RIGHT = """
import numpy as np
def project_out(x, v, centre):
    u = v / np.linalg.norm(v)
    return x - ((x - centre) @ u)[:, None] * u
"""
UNREADABLE = "def project_out(x, v, centre):\n    return x - (\n"
STOPPED = "1 / 0\ndef project_out(x, v, centre):\n    return x\n"
USE = "print(mine.is_yours, mine(np.eye(2), np.ones(2), np.zeros(2)).sum())"
CARDS = lessons()[2]
AT = next(i for i, card in enumerate(CARDS) if card.name == "project_out")
ID, NEXT = CARDS[AT].id, CARDS[AT + 1].id
CHECK = f'mine = check("{ID}", project_out)'


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """{name: the outputs of that cell}, of one notebook that a learner runs, errors and all."""
    folder = tmp_path_factory.mktemp("kernel")
    sources = {
        "imports": IMPORTS,
        "early": CHECK,
        "stub": STUB,
        "neutral": CHECK,
        "right": RIGHT,
        "accepted": CHECK,
        "used": USE,
        "last": f'check("{ID}", project_out)',
        "unreadable": UNREADABLE,
        "stale": CHECK,
        "again": RIGHT,
        "fresh": CHECK,
        "stopped": STOPPED,
        "stale too": CHECK,
        "after": "print(mine.is_yours)",
        "button": textwrap.dedent(f"""
            from ipywidgets import Output, Widget
            made = list(Widget.widgets.values())
            hints = [w for w in made if getattr(w, "description", "") == "Hint for {ID}"]
            hints[-1].click()
            places = [str(w.outputs) for w in made if isinstance(w, Output)]
            print(sum("hint 1 of" in each for each in places), hints[-1].tooltip)
        """),
        "transport": "print(get_ipython().kernel.parent.transport)",
        "other": "nothing_here",
    }
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(each) for each in sources.values()]
    )
    ipc = {} if sys.platform == "win32" else {"KernelManager": {"transport": "ipc"}}
    client = NotebookClient(  # no ports, which a kernel that starts elsewhere might take
        notebook, timeout=120, kernel_name="python3", allow_errors=True, config=Config(ipc)
    )
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "MI_STATIC")}
    client.execute(env=env | {"MI_PROGRESS": str(folder / "p.json"), "MI_STATIC": "0"})
    return dict(zip(sources, [cell.outputs for cell in notebook.cells], strict=True))


def text(outputs) -> str:
    found = [o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs]
    return "\n".join(found)


def test_a_name_that_is_not_there_yet_is_a_sentence(cells):
    assert "project_out is not defined yet: run the cell" in text(cells["early"])
    assert "Traceback" not in str(cells["early"])
    assert text(cells["transport"]) == ("tcp\n" if sys.platform == "win32" else "ipc\n")
    assert cells["other"][0].ename == "NameError"  # of anything else, as always


def test_the_line_says_what_the_notebook_goes_on_with(cells):
    assert "not attempted yet.** The notebook goes on with the reference." in text(cells["neutral"])
    assert "right.** The notebook goes on with yours." in text(cells["accepted"])
    assert CARDS[AT].after or f"Next: {NEXT} " in text(cells["accepted"])
    assert text(cells["used"]).startswith("True ")
    assert "goes on" not in text(cells["last"])
    assert all(output.output_type == "display_data" for output in cells["last"])


def test_a_cell_that_could_not_be_read_or_stopped_is_said(cells):
    assert "Python could not read the latest cell" in text(cells["stale"])
    assert "right" in text(cells["fresh"])
    assert "stopped with an error before it came to it" in text(cells["stale too"])
    assert text(cells["after"]) == "False\n"


def test_buttons_stand_under_a_check_and_work(cells):
    bundle = cells["accepted"][1]["data"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert f'`hint("{ID}")`' in bundle["text/markdown"]
    assert text(cells["button"]).split()[0] == "1"
    assert f'hint("{ID}")' in text(cells["button"])
