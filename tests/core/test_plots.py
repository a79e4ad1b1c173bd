"""The shared figure functions: they draw, they print values, and they refuse what does not fit."""

import base64
import html
import io
import re

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from mi_helpers import picture as picture_module
from mi_helpers import plots


def texts(picture) -> list[str]:
    return [text.get_text() for axes in picture.axes for text in axes.texts]


def test_a_figure_renders_to_the_same_bytes_and_leaves_pyplot_alone():
    draw = lambda: plots.render(plots.bars({"a": 1.0, "b": 2.0}, "t", xlabel="nats"))  # noqa: E731
    assert draw() == draw()
    pixels = matplotlib.image.imread(io.BytesIO(draw()))
    assert pixels.shape[1] == 8 * plots.DPI


def test_a_notebook_shows_a_figure_by_itself_with_its_alternative_text():
    picture = plots.lines([0, 1], {"a": [0, 1]}, 'A "title"', xlabel="layer", ylabel="nats")
    shown, _ = DisplayFormatter().format(picture.reads("It rises."))
    assert list(shown) == ["text/html", "text/plain"]
    said = 'A "title". across: layer; up: nats. shown: a. It rises.'
    assert shown["text/plain"] == said
    alt, width, height, source = re.fullmatch(
        r'<img alt="(.*)" width="(\d+)" height="(\d+)" src="data:image/png;base64,(.*)">',
        shown["text/html"],
    ).groups()
    assert html.unescape(alt) == said and (width, height) == ("560", "315")
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(source)))
    assert pixels.shape[:2] == (630, 1120)  # twice as fine


def test_no_figure_is_shown_taller_than_the_notebooks_view():
    for picture in (
        plots.heatmap(np.zeros((60, 4))),
        plots.bars({f"{i}": i for i in range(60)}),
        plots.Picture(figsize=(5, 20)),
    ):
        width, height = picture_module.shown_size(plots.render(picture))
        assert height <= picture_module.TALLEST and width <= 900


def test_text_of_a_figure_is_no_larger_than_prose():
    with plots.style():
        assert matplotlib.rcParams["font.size"] / 72 * picture_module.PER_INCH <= 14


def test_heatmap_prints_values_and_centres_zero():
    values = torch.tensor([[-1.0, 0.5], [float("nan"), 0.25]], dtype=torch.bfloat16)
    picture = plots.heatmap(values, ["x", "y"], ["p", "q"], "t", centre_zero=True)
    assert texts(picture) == ["-1.00", "0.50", "0.25"]
    image = picture.axes[0].images[0]
    assert image.get_clim() == (-1.0, 1.0) and image.cmap.name == plots.EFFECT
    plots.render(picture)


def test_a_large_heatmap_prints_nothing_unless_told():
    assert texts(plots.heatmap(np.zeros((20, 20)))) == []
    assert len(texts(plots.heatmap(np.zeros((20, 20)), form=".0f"))) == 400


def test_a_heatmap_of_nothing_finite_still_draws():
    plots.render(plots.heatmap(np.full((2, 2), np.nan), centre_zero=True))


def test_bars_print_every_value_of_every_series():
    picture = plots.bars({"before": {"a": 1, "b": 2}, "after": {"a": 3}}, reference=1.5)
    assert sorted(text for text in texts(picture) if text) == ["1.00", "2.00", "3.00"]
    assert picture.axes[0].get_legend() is not None


def test_lines_differ_by_more_than_colour():
    picture = plots.lines([1, 2, 3], {"a": [1, 2, 3], "b": [3, 2, 1]}, log_y=True, reference=1)
    first, second = picture.axes[0].lines[:2]
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="3 labels were given for 2 cells"):
        plots.heatmap(np.zeros((2, 2)), ["a", "b", "c"])
    with pytest.raises(AttributeError, match="unexpected keyword argument 'colour'"):
        plots.heatmap(np.zeros((2, 2)), colour="red")
    with pytest.raises(ValueError, match="shape"):
        plots.heatmap(np.zeros(3))
    with pytest.raises(ValueError, match="'y' has 2 values for 3 places"):
        plots.lines([1, 2, 3], {"y": [1, 2]})


def test_the_style_leaves_no_trace():
    before = matplotlib.rcParams["font.size"]
    with plots.style():
        assert matplotlib.rcParams["font.size"] != before
    assert matplotlib.rcParams["font.size"] == before
