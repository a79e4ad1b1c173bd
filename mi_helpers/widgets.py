"""Controls over a figure function. No science here: `figure(**values) -> Figure` holds it all."""

import html
import itertools
from base64 import b64encode
from collections.abc import Callable, Iterator

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from mi_helpers.plots import render

PLAIN = "mathjax_ignore tex2jax_ignore"  # classes of a text whose $…$ is no mathematics


def control(name: str, given) -> ipywidgets.Widget:
    """A labelled widget. A text box answers on Enter, a slider at once.

    Args:
        given: a widget, or what `interact` takes, such as (low, high, step).

    Raises:
        ValueError: no control can be made of it.
    """
    made = isinstance(given, ipywidgets.Widget)
    widget = given if made else ipywidgets.interactive.widget_from_abbrev(given)
    if widget is None:
        raise ValueError(f"No control can be made for '{name}' from {given!r}.")
    widget.description = widget.description or name.replace("_", " ")
    widget.style.description_width = "12em"
    widget.layout.width = widget.layout.width or "36em"
    if isinstance(widget, (ipywidgets.Text, ipywidgets.Textarea)):
        widget.continuous_update = False
    return widget


class Explorer:
    """Controls, the figure of their values, and a sentence where no figure can be drawn.

    Args:
        figure: `figure(**values) -> Figure`. For values that it cannot draw it raises ValueError
            with a sentence for the reader; any other exception is a bug and is not caught. It must
            draw the default state.
        controls: {argument: what `control` takes}.
    """

    def __init__(self, figure: Callable[..., Figure], **controls):
        self.figure = figure
        self.controls = {name: control(name, given) for name, given in controls.items()}
        state = ", ".join(f"{name} = {value!r}" for name, value in self.values().items())
        self.text = f"Interactive figure, at {state}"  # what stands for it in plain text
        self.png = render(figure(**self.values()))  # of the default state
        self.image = ipywidgets.Image(value=self.png, format="png")
        self.image.layout.max_width = "100%"
        self.message = ipywidgets.HTML()
        self.box = ipywidgets.VBox([*self.controls.values(), self.message, self.image])
        for widget in self.controls.values():
            widget.observe(self.draw, names="value")

    def values(self) -> dict:
        """{argument: the value of its control now}."""
        return {name: widget.value for name, widget in self.controls.items()}

    def draw(self, _change=None) -> None:
        """Show the figure of the present values, or the sentence of its ValueError."""
        try:
            self.image.value = render(self.figure(**self.values()))
        except ValueError as error:
            self.message.value = f'<p class="{PLAIN}">⚠️ {html.escape(str(error))}</p>'
            self.image.layout.display = "none"
            return
        self.message.value = ""
        self.image.layout.display = None

    def _repr_mimebundle_(self, **_kwargs) -> dict:
        """The live widget, and the PNG of its default state for a reader without a kernel."""
        still = {"image/png": b64encode(self.png).decode(), "text/plain": self.text}
        return self.box._repr_mimebundle_() | still


def explore(figure: Callable[..., Figure], **controls) -> None:
    """Display `figure(**values)` with one control per argument: `explore(f, layer=(0, 5))`."""
    display(Explorer(figure, **controls))


def corners(**controls) -> Iterator[dict]:
    """Values to test a figure function with: the default, every corner and every option, once."""
    widgets = {name: control(name, given) for name, given in controls.items()}
    default = {name: widget.value for name, widget in widgets.items()}
    ends = {name: extremes(widget) for name, widget in widgets.items()}
    corner = (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
    single = (default | {name: each} for name in widgets for each in options(widgets[name]))
    seen = []
    for values in itertools.chain([default], corner, single):
        if values not in seen:
            seen.append(values)
            yield values


def extremes(widget: ipywidgets.Widget) -> tuple:
    """A control's first and last value, both ends of a range, or its only value."""
    if isinstance(widget, ipywidgets.FloatLogSlider):
        return widget.base**widget.min, widget.base**widget.max
    if hasattr(widget, "min") and hasattr(widget, "max"):
        low, high = widget.min, widget.max
        if isinstance(widget.value, tuple):
            return (low, low), (low, high), (high, high)
        return low, high
    if choices := options(widget):
        return choices[0], choices[-1]
    return (False, True) if isinstance(widget.value, bool) else (widget.value,)


def options(widget: ipywidgets.Widget) -> list:
    """Every value that a drop-down, toggle or selection slider offers, else nothing."""
    if hasattr(widget, "_options_values") and hasattr(widget, "index"):
        values = list(widget._options_values)
        return [(value,) for value in values] if isinstance(widget.value, tuple) else values
    return []
