"""A picture that Python draws again and again, with its sentence and its alternative text."""

from __future__ import annotations

import anywidget
import traitlets

from mi_helpers.views.base import module, read


class FigureView(anywidget.AnyWidget):
    """The last picture that could be drawn, and above it why the present values have none.

    Inside a box of the class `mi-explorer` it also gives the controls their accessible names and
    keeps their keys from the notebook's shortcuts.
    """

    png = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int().tag(sync=True)  # CSS pixels, as shown
    tallest = traitlets.Int().tag(sync=True)  # CSS pixels

    def __init__(self, **traits):
        self._esm, self._css = module("figure"), read("views.css")  # anywidget sends both
        super().__init__(**traits)
