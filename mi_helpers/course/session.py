"""The notebook that a learner has: what is shown in it, and what its cells say.

`MI_STATIC=1` leaves buttons out, so that outputs do not depend on who runs a notebook: `make
notebooks` and the notebooks' tests set it, and `CI=true` means the same.
"""

import ast
import html
import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable

from mi_helpers.course.answers import code

# -- what is shown ---------------------------------------------------------------------------


def shell():
    """IPython's shell, or None outside of it."""
    loaded = sys.modules.get("IPython")  # commands do without it, and so without ipywidgets
    return loaded.get_ipython() if loaded else None


class Note:
    """Markdown in a notebook, the same text elsewhere."""

    def __init__(self, text: str):
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        bold_or_code = re.compile(r"(`+).*?\1|\*\*", re.DOTALL)
        return bold_or_code.sub(lambda found: found[0] if found[1] else "", self.text)


def display(text: str):
    """Show Markdown where there is a notebook, the text elsewhere; what can replace it."""
    from IPython.display import display as show

    return show(Note(text), display_id=True)


def static() -> bool:
    """Whether nobody is at the keyboard: no kernel to answer, or one that runs for the record."""
    asked = os.environ.get("MI_STATIC", os.environ.get("CI", ""))
    return asked.lower() not in ("", "0", "false") or not hasattr(shell(), "kernel")


def plain(text: str) -> str:
    """HTML that shows a text as it is, mathematics included."""
    return f'<span class="mathjax_ignore tex2jax_ignore">{html.escape(text)}</span>'


def bundle_of(box, text: str) -> dict:
    """Widgets where there is a kernel, and Markdown for a reader without one, for Jupyter."""
    still = {"text/markdown": text, "text/plain": repr(Note(text))}
    return box._repr_mimebundle_() | still


def show_live(box, text: str) -> None:
    """Display widgets, with what stands in their place where there is no kernel."""
    from IPython.display import display as show

    show(bundle_of(box, text), raw=True)


def put(place, text: str) -> None:
    """Show Markdown in a box of widgets, in the place of what was there."""
    data = {"text/markdown": text, "text/plain": repr(Note(text))}
    place.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)


def button(label: str, tooltip: str, act: Callable[[], None]):
    """A button; its label is its name for a screen reader, its tooltip the call behind it."""
    import ipywidgets

    made = ipywidgets.Button(description=label, tooltip=tooltip)
    made.layout.width = "auto"
    made.on_click(lambda _button: act())
    return made


def calls(*texts: str):
    """A line of calls as code, to be read and copied."""
    import ipywidgets

    line = " · ".join(f"<code>{plain(text)}</code>" for text in texts)
    return ipywidgets.HTML(f'<span style="opacity: 0.8">{line}</span>')


# -- the notebook's cells --------------------------------------------------------------------


def look_up(name: str) -> Callable | None:
    """What the notebook has under a name, or None."""
    here = shell()
    return here.user_ns.get(name) if here else vars(sys.modules["__main__"]).get(name)


def assigns(call: str, exercise_id: str) -> bool:
    """Whether the cell that runs now keeps the result of `call("exercise_id", …)`."""
    here = shell()
    cell = (here.user_ns.get("In") or [""])[-1] if here else ""
    quoted = rf"{call}\(\s*[\"']{re.escape(exercise_id)}[\"']"
    return re.search(rf"=\s*(?:\w+\.)?{quoted}", cell) is not None


def stale(answer: Callable) -> str:
    """Why an answer is not what the notebook's latest cell about it says; "" when it is.

    A cell that could not be read, or that stopped before its `def`, leaves the function of an
    earlier cell in place.
    """
    here, own = shell(), inspect.unwrap(answer)
    name = getattr(own, "__name__", "")
    if here is None or not name.isidentifier():
        return ""
    cell = latest_definition(here.user_ns.get("In", []), name)
    if cell is None:
        return ""
    try:
        tree = ast.parse(here.transform_cell(cell))
    except SyntaxError as error:
        line = f", in line {error.lineno}: {code(error.text)}" if error.text else ""
        return (
            f"Python could not read the latest cell that defines {code(name)} "
            f"({code(f'{type(error).__name__}: {error.msg}')}{line}), so {code(name)} is still the "
            "one from before: mend that cell, run it, then check again."
        )
    written = [node for node in tree.body if getattr(node, "name", None) == name]
    if not written or source_agrees(own, written[-1]):
        return ""
    return (
        f"The latest cell that defines {code(name)} stopped with an error before it came to it, so "
        f"{code(name)} is still the one from before: mend that cell, run it, then check again."
    )


def latest_definition(cells: list[str], name: str) -> str | None:
    """The last cell run that has a `def` of this name at its left edge."""
    pattern = re.compile(rf"^(?:async +)?def +{re.escape(name)}\b", re.MULTILINE)
    return next((cell for cell in reversed(cells) if pattern.search(cell)), None)


def source_agrees(function: Callable, written: ast.AST) -> bool:
    """Whether a function was made from this definition; True where its source cannot be had."""
    try:
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return True
    return ast.dump(made) == ast.dump(written)


def say_name_errors(calls: tuple[str, ...]) -> None:
    """Let IPython say in one sentence that a name given to one of our calls is not defined yet.

    Every other NameError is shown as always.
    """
    here = shell()
    if here is None:
        return
    pattern = re.compile(rf"\b(?:{'|'.join(calls)})\(")

    def say(self, kind, error, trace, tb_offset=None):
        name, cell = getattr(error, "name", None), self.user_ns.get("In", [""])[-1]
        *_, (frame, _) = traceback.walk_tb(trace)
        if name and frame.f_code.co_name == "<module>" and pattern.search(cell):
            print(
                f"⚠️ {name} is not defined yet: run the cell that defines it (an exercise's is just "
                "above its check), then this one again."
            )
        else:
            self.showtraceback((kind, error, trace), tb_offset=tb_offset)

    here.set_custom_exc((NameError,), say)
