"""The course's look, and a Figure as a notebook shows it: its size, its PNG, its alt text."""

from __future__ import annotations

import html
import io
import sys
from base64 import b64encode
from collections.abc import Iterable
from contextlib import contextmanager

import matplotlib
import matplotlib.image
import matplotlib.rcsetup
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogitFormatter, ScalarFormatter

AMOUNT, EFFECT = "cividis", "PuOr"
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
PER_INCH = 70  # CSS pixels: 13 points of text are 12.6 pixels, and prose in JupyterLab has 14
DPI = 2 * PER_INCH  # drawn twice as fine as shown, for screens that can show it
TALLEST = 600  # CSS pixels: of a screen of 1366 × 768 JupyterLab leaves a notebook 647
HIGHEST = TALLEST / PER_INCH  # inches
NUMBERS = (LogFormatter, LogitFormatter, ScalarFormatter)  # what matplotlib writes on an axis


@contextmanager
def style():
    """The course's rcParams, as a context or, `@style()`, as a decorator of a figure function."""
    look = {
        "axes.prop_cycle": matplotlib.rcsetup.cycler(
            color=OKABE_ITO, marker=MARKERS, linestyle=DASHES
        ),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
        "font.size": 13,
        "image.cmap": AMOUNT,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "svg.hashsalt": "mi-course",
        "text.hinting": "no_hinting",  # at twice the resolution it shows nothing and costs a third
    }
    with matplotlib.rc_context(look):
        yield


class Picture(Figure):
    """A Figure that no pyplot state knows, and that a notebook shows once, with its alt text.

    Every text is drawn as it is, `$` too: only an axis' numbers, such as 10³, are mathematics.
    """

    reading = ""  # what is to be seen in it, in a sentence

    def reads(self, sentence: str) -> Picture:
        """This figure, with the sentence that says what is to be seen in it for its alt text."""
        self.reading = sentence
        return self

    def draw(self, renderer) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        for axis in self.findobj(Axis):
            major = axis.get_major_formatter(), axis.get_major_ticks()
            minor = axis.get_minor_formatter(), axis.get_minor_ticks()
            for formatter, ticks in (major, minor):
                for tick in ticks if isinstance(formatter, NUMBERS) else ():
                    tick.label1.set_parse_math(True)
                    tick.label2.set_parse_math(True)
        super().draw(renderer)

    def _repr_mimebundle_(self, **_kwargs) -> dict:
        said = alt_text(self)
        return {"text/html": image_html(render(self), said), "text/plain": said}


def render(figure: Figure) -> bytes:
    """A figure's PNG bytes, the same for the same figure; a figure of pyplot's is closed."""
    stream = io.BytesIO()
    with style():
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once, where savefig would lay everything out twice
        matplotlib.image.imsave(
            stream,
            np.asarray(canvas.buffer_rgba()),
            format="png",
            dpi=DPI,
            metadata={"Software": None},
            pil_kwargs={"compress_level": 3},
        )
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)
    return stream.getvalue()


def shown_size(png: bytes) -> tuple[int, int]:
    """The width and height, in CSS pixels, at which a PNG is shown: at most TALLEST high."""
    width, height = (int.from_bytes(png[at : at + 4]) * PER_INCH / DPI for at in (16, 20))
    shrink = min(1.0, TALLEST / height)
    return round(width * shrink), round(height * shrink)


def alt_text(figure: Figure) -> str:
    """A figure in words: its titles, its axes' labels, its legend, and its reading sentence."""
    every = [axes for axes in figure.axes if axes.axison]
    titles = [figure.get_suptitle(), *(axes.get_title(axes_place(axes)) for axes in figure.axes)]
    axis = [axes.get_xlabel() and f"across: {axes.get_xlabel()}" for axes in every]
    axis += [axes.get_ylabel() and f"up: {axes.get_ylabel()}" for axes in every]
    legends = [*figure.legends, *(axes.get_legend() for axes in every)]
    named = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    parts = ["; ".join(distinct(titles)) or "Figure", "; ".join(distinct(axis))]
    parts += [named and f"shown: {', '.join(distinct(named))}", getattr(figure, "reading", "")]
    return " ".join(
        part if part.endswith((".", "?", "!")) else f"{part}." for part in parts if part
    )


def axes_place(axes: Axes) -> str:
    """Where an Axes has its title: left, as this course writes it, unless it is elsewhere."""
    return next((at for at in ("left", "center", "right") if axes.get_title(at)), "left")


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text that is not empty, once, in order, on one line."""
    return list(dict.fromkeys(" ".join(text.split()) for text in texts if text and text.strip()))


def image_html(png: bytes, alt: str) -> str:
    """A picture as HTML that needs no other file, at its size and with its alternative text."""
    width, height = shown_size(png)
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    said = html.escape(alt)
    return f'<img alt="{said}" width="{width}" height="{height}" src="{source}">'
