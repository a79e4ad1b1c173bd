"""What every view is: data as JSON, one ES module that draws it, and HTML that stands without both.

A new view is a module `name.js` beside this file, whose default export is `widget(draw)`, and a
Python function that makes its data, its standing HTML and its text, and returns a `View`.
"""

from __future__ import annotations

import html
import unicodedata
from functools import cache
from importlib.resources import files

import anywidget
import traitlets

COMMON = 'from "./common.js";'  # how a view's import of the shared helpers ends


@cache
def read(name: str) -> str:
    """The text of a file of this folder."""
    return files(__package__).joinpath(name).read_text("utf-8")


@cache
def module(name: str) -> str:
    """A view's ES module with `common.js` inside: in a notebook a module can import no file."""
    own = [line for line in read(f"{name}.js").splitlines() if not line.endswith(COMMON)]
    return read("common.js").replace("\nexport ", "\n") + "\n" + "\n".join(own) + "\n"


class View(anywidget.AnyWidget):
    """A view in a notebook, and what stands for it where there is no kernel.

    Args:
        name: of its module in this folder, without `.js`.
        data: what the module draws, JSON.
        still: HTML that needs no script and no other file.
        said: the same in plain text.
    """

    data = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)  # what the learner pointed at last

    def __init__(self, name: str, data: dict, still: str, said: str):
        self._esm, self._css = module(name), read("views.css")  # anywidget sends both
        super().__init__(data=data)
        self.still, self.said = still, said

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        live, metadata = super()._repr_mimebundle_(**kwargs)
        return live | {"text/html": self.still, "text/plain": self.said}, metadata


MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def shown(token: str) -> str:
    """A token as it can be seen: line ends and tabs as signs, what is invisible as its code."""
    if not token:
        return "∅"
    return "".join(MARKS.get(c) or (escaped(c) if is_hidden(c) else c) for c in token)


def is_hidden(character: str) -> bool:
    """Whether a character cannot be seen, or changes how others are shown."""
    joins = character == "\u200d"  # within 👩‍👩‍👧
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and not joins


def escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def spoken(token: str) -> str:
    """A token as a screen reader should say it: a blank has a name."""
    return shown(token).strip() or "space"


def escape(text: object) -> str:
    """Text for HTML, also within an attribute."""
    return html.escape(str(text))


def plain(inside: str) -> str:
    """HTML in which no notebook takes `$` for mathematics."""
    return f'<div class="mathjax_ignore tex2jax_ignore">{inside}</div>'
