"""Controls, the bundle a notebook keeps, and the values that figure functions are tested with."""

import ipywidgets
import pytest

from mi_helpers import plots, widgets


def slope(gain=1, steep=False):
    """A small figure function; it refuses gain 4 and has a bug at gain 5."""
    if gain == 4:
        raise ValueError("Gain <4> cannot be drawn.")
    if gain == 5:
        raise KeyError("a bug")
    return plots.lines([0, 1], {"y": [0, gain * (10 if steep else 1)]}, limits=(0, 60))


def explorer(**controls):
    return widgets.Explorer(slope, **({"gain": (1, 5), "steep": False} | controls))


def test_a_slider_changes_the_picture():
    made = explorer()
    before = bytes(made.image.value)
    assert made.controls["gain"].value == 3 and before.startswith(b"\x89PNG")
    made.controls["gain"].value = 2
    assert made.image.value != before
    made.controls["gain"].value = 3
    assert made.image.value == before


def test_a_value_error_reads_as_a_sentence_and_goes_away():
    made = explorer()
    made.controls["gain"].value = 4
    assert "Gain &lt;4&gt; cannot be drawn." in made.message.value
    assert made.image.layout.display == "none"
    made.controls["gain"].value = 2
    assert made.message.value == "" and made.image.layout.display is None


def test_a_bug_is_not_swallowed():
    made = explorer()
    with pytest.raises(KeyError, match="a bug"):
        made.controls["gain"].value = 5


def test_a_default_that_cannot_be_drawn_is_an_error():
    with pytest.raises(ValueError, match="cannot be drawn"):
        explorer(gain=ipywidgets.IntSlider(4, 1, 5))


def test_the_bundle_holds_the_widget_and_its_default_picture():
    made = explorer()
    bundle = made._repr_mimebundle_()
    made.controls["gain"].value = 1
    assert bundle == made._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "Interactive figure, at gain = 3, steep = False"
    assert bundle["image/png"].startswith("iVBORw0KGgo")


def test_explore_displays_one_bundle_and_returns_nothing(capsys):
    assert widgets.explore(slope, gain=(1, 3)) is None
    assert capsys.readouterr().out.count("Explorer") == 1


def test_controls_are_named_and_text_waits_for_enter():
    made = widgets.Explorer(lambda your_prompt: slope(), your_prompt="The cat")
    assert made.controls["your_prompt"].description == "your prompt"
    assert made.controls["your_prompt"].continuous_update is False
    assert widgets.control("gain", (1, 5)).continuous_update is True


def test_an_impossible_control_says_which():
    with pytest.raises(ValueError, match="'gain'"):
        widgets.control("gain", object())


@pytest.mark.parametrize(
    ("controls", "count"),
    [
        ({"a": (0, 4)}, 3),
        ({"a": (0, 4), "b": (0.0, 1.0)}, 5),
        ({"a": (0, 4), "b": False}, 5),
        ({"a": ["x", "y", "z"]}, 3),
        ({"a": ["x", "y", "z"], "b": (0, 4)}, 7),
        ({"a": "a text"}, 1),
        ({"a": ipywidgets.FloatLogSlider(1, min=-2, max=2)}, 3),
        ({"a": ipywidgets.IntRangeSlider(value=(1, 2), min=0, max=9)}, 4),
    ],
)
def test_corners_are_the_default_each_corner_and_each_option(controls, count):
    swept = list(widgets.corners(**controls))
    assert len(swept) == count
    assert all(list(values) == list(controls) for values in swept)


def test_corners_reach_both_ends():
    swept = list(widgets.corners(a=(0, 4), b=ipywidgets.FloatLogSlider(1, min=-2, max=2)))
    assert {"a": 0, "b": 0.01} in swept and {"a": 4, "b": 100} in swept
