"""Controls over a figure function. No science here: `figure(**values) -> Figure` holds it all."""

import itertools
from collections.abc import Callable, Iterator

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from mi_helpers.picture import alt_text, image_html, render, shown_size
from mi_helpers.views.base import escape, plain
from mi_helpers.views.figure import FigureView

VIEW = 647  # CSS pixels: what JupyterLab shows of a notebook on a screen of 1366 × 768


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
    widget.style.description_width = "10em"
    widget.layout.width = widget.layout.width or "auto"
    widget.layout.max_width = "100%" if is_wide(widget) else "32em"
    if is_wide(widget):
        widget.layout.grid_area = "auto / 1 / auto / -1"  # grid_column is lost to grid_area
    if isinstance(widget, (ipywidgets.Text, ipywidgets.Textarea)):
        widget.continuous_update = False
    return widget


def is_wide(widget: ipywidgets.Widget) -> bool:
    """Whether a control takes a line of its own: a prompt does."""
    return isinstance(widget, (ipywidgets.Text, ipywidgets.Textarea))


class Explorer:
    """Controls, the figure of their values, and a sentence where no figure can be drawn.

    For values that have no figure the last one stays in its place, paler, under the sentence.

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
        boxes = list(self.controls.values())
        rows = (len(boxes) + sum(map(is_wide, boxes)) + 1) // 2
        self.tallest = VIEW - 34 * rows - 40  # a control is 34 pixels high, the sentence 24
        self.view = FigureView(**self.drawn(), tallest=self.tallest)
        self.still = image_html(self.view.png, self.view.alt)
        grid = ipywidgets.GridBox(boxes)
        grid.layout.grid_template_columns = f"repeat({min(2, len(boxes)) or 1}, minmax(0, 1fr))"
        self.box = ipywidgets.VBox([grid, self.view])
        self.box.add_class("mi-explorer")
        for widget in boxes:
            widget.observe(self.draw, names="value")

    def values(self) -> dict:
        """{argument: the value of its control now}."""
        return {name: widget.value for name, widget in self.controls.items()}

    def drawn(self) -> dict:
        """The figure of the present values as its view takes it."""
        made = self.figure(**self.values())
        png = render(made)
        return {"png": png, "alt": alt_text(made), "width": shown_size(png)[0]}

    def draw(self, _change=None) -> None:
        """Show the figure of the present values, or the sentence of its ValueError."""
        try:
            changes = self.drawn() | {"message": ""}
        except ValueError as error:
            changes = {"message": str(error)}
        with self.view.hold_sync():
            for name, value in changes.items():
                setattr(self.view, name, value)

    def _repr_mimebundle_(self, **_kwargs) -> dict:
        """The live widget, and its default state for a reader without a kernel."""
        return self.box._repr_mimebundle_() | {"text/html": self.still, "text/plain": self.text}


def explore(figure: Callable[..., Figure], **controls) -> None:
    """Display `figure(**values)` with one control per argument: `explore(f, layer=(0, 5))`."""
    display(Explorer(figure, **controls))


class Folded:
    """What answers a 'Predict', folded until it is asked for; a reader without a kernel can too.

    Args:
        answer: a Figure, a text, a `View`, or any widget that is shown as itself when unfolded.
        label: what the line says that unfolds it.
    """

    def __init__(self, answer, label: str = "I have predicted: show what happens"):
        self.answer, self.label = answer, label

    def _repr_mimebundle_(self, **kwargs) -> dict:
        made = getattr(self.answer, "_repr_mimebundle_", lambda **_: None)(**kwargs)
        bundle = made[0] if isinstance(made, tuple) else made or {}
        if made is None:
            bundle = {"text/html": plain(escape(self.answer)), "text/plain": str(self.answer)}
        inside = bundle.get("text/html") or f"<pre>{escape(bundle.get('text/plain', ''))}</pre>"
        summary = f"<summary>{escape(self.label)}</summary>"
        still = {"text/html": f"<details>{summary}{inside}</details>", "text/plain": self.label}
        live = self.unfolding()
        return live._repr_mimebundle_() | still if live else still

    def unfolding(self) -> ipywidgets.Widget | None:
        """A button above the answer where that is a widget, else None: HTML folds by itself."""
        answer = getattr(self.answer, "box", self.answer)
        if not isinstance(answer, ipywidgets.Widget):
            return None
        button = ipywidgets.ToggleButton(description=self.label)
        button.layout.width, hidden = "auto", ipywidgets.VBox([answer])
        hidden.layout.display = "none"

        def unfold(change) -> None:
            hidden.layout.display = None if change["new"] else "none"

        button.observe(unfold, names="value")
        return ipywidgets.VBox([button, hidden])


def fold(answer, label: str = "I have predicted: show what happens") -> None:
    """Display an answer folded: `fold(plots.bars(…))`. Args are those of `Folded`."""
    display(Folded(answer, label))


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
