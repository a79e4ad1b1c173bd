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
    before = made.view.png
    assert made.controls["gain"].value == 3 and before.startswith(b"\x89PNG")
    made.controls["gain"].value = 2
    assert made.view.png != before
    made.controls["gain"].value = 3
    assert made.view.png == before


def test_what_cannot_be_drawn_keeps_the_last_picture_under_a_sentence():
    made = explorer()
    before = made.view.png
    made.controls["gain"].value = 4
    assert made.view.message == "Gain <4> cannot be drawn." and made.view.png == before
    made.controls["gain"].value = 2
    assert made.view.message == "" and made.view.png != before


def test_controls_stand_in_two_columns_and_leave_the_picture_room():
    made = widgets.Explorer(
        lambda **_: slope(), a=(1, 2), b=(1, 2), c=(1, 2), d=(1, 2), prompt="The cat"
    )
    grid, view = made.box.children
    assert grid.layout.grid_template_columns.startswith("repeat(2,")
    assert made.controls["prompt"].layout.grid_area == "auto / 1 / auto / -1"
    assert view.tallest == 647 - 3 * 34 - 40
    assert "mi-explorer" in made.box._dom_classes
    assert "nameControls" in view.get_state()["_esm"] and ".mi-figure" in view.get_state()["_css"]


def test_the_alternative_text_follows_the_figure():
    figure = lambda n: plots.lines([0, 1], {"": [0, n]}, f"n = {n}").reads(f"It ends at {n}.")  # noqa: E731
    made = widgets.Explorer(figure, n=(1, 3))
    assert made.view.alt == "n = 2. It ends at 2."
    made.controls["n"].value = 3
    assert made.view.alt == "n = 3. It ends at 3."


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
    assert 'src="data:image/png;base64,iVBORw0KGgo' in bundle["text/html"]


def test_an_answer_is_folded_until_asked_for():
    text = widgets.Folded("a < b")._repr_mimebundle_()
    assert text["text/html"].startswith("<details><summary>I have predicted")
    assert "a &lt; b" in text["text/html"] and "a < b" not in text["text/plain"]
    picture = widgets.Folded(slope(1))._repr_mimebundle_()
    assert "<img alt=" in picture["text/html"] and list(picture) == ["text/html", "text/plain"]


def test_a_folded_explorer_unfolds_with_a_button():
    folded = widgets.Folded(explorer(), "show it")
    assert "application/vnd.jupyter.widget-view+json" in folded._repr_mimebundle_()
    button, hidden = folded.unfolding().children
    assert hidden.layout.display == "none" and button.description == "show it"
    button.value = True
    assert hidden.layout.display is None


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
