"""What the course shows: Markdown in a notebook, text elsewhere; buttons where there is a kernel.

`MI_STATIC=1` leaves buttons out, so that outputs do not depend on who runs a notebook: `make
notebooks` and the notebooks' tests set it, and `CI=true` means the same.
"""

import html
import os
import re
from collections.abc import Callable

from mi_helpers.course.session import shell


class Note:
    """Markdown in a notebook, the same text elsewhere."""

    def __init__(self, text: str):
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        bold_or_code = re.compile(r"(`+).*?\1|\*\*", re.DOTALL)
        return bold_or_code.sub(lambda found: found[0] if found[1] else "", self.text)


def display(text: str) -> None:
    """Show Markdown where there is a notebook, the text elsewhere."""
    from IPython.display import display as show

    show(Note(text))


def static() -> bool:
    """Whether nobody is at the keyboard: no kernel to answer, or one that runs for the record."""
    asked = os.environ.get("MI_STATIC", os.environ.get("CI", ""))
    return asked.lower() not in ("", "0", "false") or not hasattr(shell(), "kernel")


def plain(text: str) -> str:
    """HTML that shows a text as it is, mathematics included."""
    return f'<span class="mathjax_ignore tex2jax_ignore">{html.escape(text)}</span>'


class Live:
    """Widgets where there is a kernel, and Markdown for a reader without one."""

    def __init__(self, box, text: str):
        self.box, self.note = box, Note(text)

    def _repr_mimebundle_(self, **_kwargs) -> dict:
        still = {"text/markdown": self.note.text, "text/plain": repr(self.note)}
        return self.box._repr_mimebundle_() | still


def show_live(box, text: str) -> None:
    """Display widgets, with what stands in their place where there is no kernel."""
    from IPython.display import display as show

    show(Live(box, text))


class Place:
    """A place in a box of widgets where Markdown is shown, and replaced by the next."""

    def __init__(self):
        import ipywidgets

        self.widget = ipywidgets.Output()

    def show(self, *texts: str) -> None:
        """Show these texts, one below the other, in place of what was there."""
        self.widget.outputs = tuple(
            {
                "output_type": "display_data",
                "data": {"text/markdown": text, "text/plain": repr(Note(text))},
                "metadata": {},
            }
            for text in texts
        )


def button(label: str, tooltip: str, act: Callable[[], None], style: str = ""):
    """A button; its label is its name for a screen reader, its tooltip the call behind it."""
    import ipywidgets

    made = ipywidgets.Button(description=label, tooltip=tooltip, button_style=style)
    made.layout.width = "auto"
    made.on_click(lambda _button: act())
    return made


def calls(*texts: str):
    """A line of calls as code, to be read and copied."""
    import ipywidgets

    line = " · ".join(f"<code>{plain(text)}</code>" for text in texts)
    return ipywidgets.HTML(f'<span style="opacity: 0.8">{line}</span>')
