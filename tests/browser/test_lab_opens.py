"""Each notebook in JupyterLab in a real browser: it runs to its end, and its first widget works."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mi_helpers.course.notebooks import KERNEL

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 1000  # of playwright's milliseconds
CONTROLS_WITH_PICTURE = "application/vnd.jupyter.widget-view+json"

# What the open notebook holds, asked of JupyterLab itself: cells out of sight are not in the page.
STATE = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  const cells = panel.content.widgets.map(cell => cell.model).filter(
    cell => cell.type === 'code' && cell.sharedModel.getSource().trim());
  const outputs = cells.flatMap(cell => cell.sharedModel.outputs.map(each => each));
  return {
    kernel: panel.sessionContext.session?.kernel?.status,
    waiting: cells.filter(cell => cell.executionCount === null).length,
    errors: outputs.filter(output => output.output_type === 'error')
      .map(output => output.ename + ': ' + output.evalue),
  };
}"""
FINISHED = f"() => {{ const s = ({STATE})(); return s.errors.length || "
FINISHED += "(s.kernel === 'idle' && s.waiting === 0); }"
FORGET_OUTPUTS = """() => {
  for (const cell of window.jupyterapp.shell.currentWidget.content.widgets)
    if (cell.model.type === 'code') { cell.model.clearExecution(); }
}"""
GO_TO_FIRST_WIDGET = f"""async () => {{
  const notebook = window.jupyterapp.shell.currentWidget.content;
  const index = notebook.widgets.findIndex(cell => cell.model.type === 'code' &&
    cell.model.sharedModel.outputs.some(each => '{CONTROLS_WITH_PICTURE}' in (each.data ?? {{}})));
  if (index < 0) return false;
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, 'start');
  return true;
}}"""
WIDGETS = f"""() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap((cell, index) =>
  cell.model.type === 'code' && cell.model.sharedModel.outputs.some(
    each => '{CONTROLS_WITH_PICTURE}' in (each.data ?? {{}})) ? [index] : [])"""
GO_TO = """async ([index]) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = index;
  await notebook.scrollToItem(index, 'start');
}"""
SAVE_AND_STOP = """async () => {
  await window.jupyterapp.commands.execute('docmanager:save');
  await window.jupyterapp.shell.currentWidget.sessionContext.shutdown();
}"""
SHOWN = ".jp-mod-active .mi-view, .jp-mod-active .jupyter-widgets"
FIGURE = ".mi-figure"  # with controls; other views have tests of their own
TEXT = ".widget-text input"
PICTURE_IS_DRAWN = """() => [
  ...document.querySelectorAll('.jp-mod-active .jp-OutputArea img')
].some(image => image.naturalWidth > 0)"""
PICTURE_CHANGED = """([before]) => [
  ...document.querySelectorAll('.jp-mod-active .jp-OutputArea img')
].some(image => image.src && image.src !== before)"""

SMALL = """\
from mi_helpers import plots
from mi_helpers.widgets import explore

def slope(gain):
    return plots.lines([0, 1], {"y": [0, gain]}, f"gain {gain}", limits=(0, 5))

explore(slope, gain=(1, 5))
"""


def write(lab, name: str, *cells) -> None:
    """A notebook of these cells; without a kernel's name JupyterLab would ask for one."""
    notebook = new_notebook(cells=list(cells), metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, lab.folder / name)


def open_notebook(page, lab, name: str) -> None:
    """Open a notebook and wait until its kernel is idle: before that a run would be dropped."""
    page.goto(lab.page_of(name))
    page.wait_for_selector(".jp-Notebook", timeout=60 * SECONDS)
    page.get_by_text("| Idle").wait_for(timeout=60 * SECONDS)


def run_all(page, minutes: float = 5) -> list[str]:
    """Run All Cells from the menu, wait for the end or the first error, and give the errors."""
    page.evaluate(FORGET_OUTPUTS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=minutes * 60 * SECONDS)
    return page.evaluate(STATE)["errors"]


def go_to_first(page, wanted: str) -> bool:
    """Go to the first cell with a widget that has such an element; whether there is one."""
    for index in page.evaluate(WIDGETS):
        page.evaluate(GO_TO, [index])
        page.locator(SHOWN).first.wait_for(timeout=30 * SECONDS)
        page.wait_for_timeout(SECONDS / 2)  # what stands inside is drawn a little later
        if page.locator(f".jp-mod-active {wanted}").count():
            return True
    return False


def move_first_control(page, seconds: float = 60) -> None:
    """Move the first figure's slider, or choose from its last menu, or write another word, and wait
    until the picture is another."""
    assert go_to_first(page, FIGURE), "no cell shows a figure with controls"
    cell = page.locator(".jp-mod-active")
    image = cell.locator(f"{FIGURE} img").first
    image.wait_for(timeout=30 * SECONDS)
    before = image.get_attribute("src")
    slider, menu, text = (cell.locator(each) for each in ("[role=slider]", "select", TEXT))
    slider.or_(menu).or_(text).first.wait_for(timeout=30 * SECONDS)
    if slider.count():
        slider = slider.first
        at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        slider.focus()
        slider.press("ArrowLeft" if at_end else "ArrowRight")
    elif menu.count():
        menu = menu.last
        menu.select_option(index=0 if menu.evaluate("menu => menu.selectedIndex") else 1)
    else:
        said = text.first.input_value()
        text.first.fill(f"{said} {said.split()[-1]}")
        text.first.press("Enter")
    page.wait_for_function(PICTURE_CHANGED, arg=[before], timeout=seconds * SECONDS)


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_its_first_widget_works(lab, page, name):
    open_notebook(page, lab, name)
    assert run_all(page) == []
    if go_to_first(page, FIGURE):
        move_first_control(page)
    else:
        assert go_to_first(page, ".mi-view"), "no cell shows a view"


def test_a_small_notebook_runs_and_its_slider_works(lab, page):
    cells = new_markdown_cell("# Small"), new_code_cell(SMALL), new_code_cell("1 + 1")
    write(lab, "small.ipynb", *cells)
    open_notebook(page, lab, "small.ipynb")
    assert run_all(page) == []
    move_first_control(page)


def test_the_day_after_a_saved_notebook_still_shows_its_figure(lab, page):
    write(lab, "saved.ipynb", new_code_cell(SMALL))
    open_notebook(page, lab, "saved.ipynb")
    assert run_all(page) == []
    move_first_control(page)
    page.evaluate(SAVE_AND_STOP)
    open_notebook(page, lab, "saved.ipynb")
    assert page.evaluate(GO_TO_FIRST_WIDGET), "no cell shows a widget"
    page.get_by_text("model not found").or_(page.locator(".jp-mod-active img")).first.wait_for()
    assert page.get_by_text("model not found").count() == 0
    page.wait_for_function(PICTURE_IS_DRAWN, timeout=30 * SECONDS)
    assert page.locator(".jp-mod-active").get_by_role("slider").count() == 1
    assert run_all(page) == []
    move_first_control(page)


def test_an_error_in_a_notebook_is_noticed(lab, page):
    write(lab, "broken.ipynb", new_code_cell("1 / 0"))
    open_notebook(page, lab, "broken.ipynb")
    assert run_all(page) == ["ZeroDivisionError: division by zero"]


def test_a_slider_that_moves_no_picture_is_noticed(lab, page):
    from playwright.sync_api import TimeoutError as TooLate

    source = SMALL.replace('f"gain {gain}"', '"t"').replace("[0, gain]", "[0, 1]")
    write(lab, "still.ipynb", new_code_cell(source))
    open_notebook(page, lab, "still.ipynb")
    assert run_all(page) == []
    with pytest.raises(TooLate, match="wait_for_function"):
        move_first_control(page, seconds=5)
