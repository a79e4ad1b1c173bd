"""Any text reaches a figure, a table, a file and a terminal as it is, and comes back the same."""

import html
import json
import re
import unicodedata

import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from mi_helpers import plots, views, widgets
from mi_helpers.circuits.files import load_graph, save_graph
from mi_helpers.circuits.graphs import EMBEDDING, FEATURE, LOGIT, Graph, Node
from mi_helpers.course import ledger
from mi_helpers.course.check import Note, code
from mi_helpers.files import literal
from mi_helpers.lessons.lesson_03.figures import PatchingExplorer, single_map
from mi_helpers.lessons.lesson_04.figures import two_written
from mi_helpers.lessons.lesson_05.figures import CircuitBuilder
from mi_helpers.lessons.lesson_05.ioi import Task, make_prompts
from mi_helpers.loading import load_model
from mi_helpers.saes.features import Context
from mi_helpers.saes.figures import centred, printable
from mi_helpers.saes.sources import SourceError, open_source

AWKWARD = [
    "$$", "$x$", r"$\frac$", r"\$", "\\", '"', "'", "[[", "]", "`", "``|`", "|", "**", "*_a_*",
    "_x", "<b>&amp;</b>", "a\nb", "\r\n", "\t", "\x00", "\x1b[31m", "\u202eab", "שלום", "👩‍👩‍👧",
    "\r", "\u2028", "{}%s", "", " ", 'Output "c" (p=0.1)', "#1", "~~a~~",
]  # fmt: skip
ANY = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=12))
any_texts = settings(max_examples=2, derandomize=True, deadline=None)
lacking_glyphs = pytest.mark.filterwarnings("ignore:.*Glyph", "ignore:Matplotlib currently")


def by_hand(a: str, b: str, **others) -> Graph:
    """An embedding, a feature named b and a logit named a, on the tokens a and b."""
    nodes = Node(EMBEDDING, -1, 0, 5), Node(FEATURE, 0, 1, 1), Node(LOGIT, 1, 1, 7)
    values = {"bias": torch.zeros(3), "values": torch.ones(3), "probabilities": torch.ones(1)}
    edges = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    words = {"target_names": (a,), "labels": {"0_1_1": b or "b"}}
    return Graph(a, (a, b), nodes, edges, n_layers=1, model=b, **values, **words | others)


FIGURES = {
    "heatmap": lambda a, b: plots.heatmap(np.eye(2), [a, b], [b, a], a, unit=b, xlabel=a, ylabel=b),
    "bars": lambda a, b: plots.bars({a: {a: 1.0, b: 2.0}, b + "2": {b: 1.0}}, b, xlabel=a),
    "lines": lambda a, b: plots.lines(
        [1, 10, 1000], {a: [1, 2, 3], b + "2": [1, 2, 9]}, b, xlabel=a, log_x=True
    ),
    "before and after": lambda a, b: plots.before_after({a: 1.0}, {a: 2.0}, b, labels=(a, b)),
    "panels": lambda a, b: plots.layer_panels([a, b], {a: {a: [1, 2], b + "2": [2, 1]}}, ylabel=b),
    "map": lambda a, b: single_map(np.eye(2), [a, b], [b, a], a, b, a, "denoise"),
    "maps": lambda a, b: plots.effect_maps(
        {a: np.eye(2), b + "2": np.eye(2)}, [a, b], [b, a], b, unit=a
    ),
    "written": lambda a, b: two_written([a, b], [1, 2], [3, 5], (a, b), b),
}


@lacking_glyphs
@pytest.mark.parametrize("name", FIGURES)
@any_texts
@given(ANY, ANY)
@example("$$", r"\$")
@example("$x$", "_x")
def test_any_text_is_drawn_as_it_is(name, a, b):
    picture = FIGURES[name](a, b)
    assert plots.render(picture).startswith(b"\x89PNG")
    drawn = [text for text in picture.findobj(Text) if text.get_text() in (a, b)]
    assert drawn and {text._preprocess_math(text.get_text())[1] for text in drawn} == {False}


def test_the_numbers_of_a_logarithmic_axis_are_still_powers():
    picture = plots.lines([1, 10, 1000], {"$$": [1, 2, 3]}, log_x=True)
    plots.render(picture)
    ticks = [label for label in picture.axes[0].get_xticklabels() if label.get_text()]
    assert ticks and all(label._preprocess_math(label.get_text())[1] for label in ticks)


@lacking_glyphs
def test_a_legend_names_every_series():
    for picture in (
        plots.lines([1, 2], {"_a": [1, 2], "": [2, 1], "b": [1, 1]}, reference=1),
        plots.bars({"_a": {"x": 1.0}, "": {"x": 3.0}, "b": {"x": 2.0}}),
    ):
        assert [text.get_text() for text in picture.axes[0].get_legend().texts] == ["_a", "b"]
    (legend,) = plots.layer_panels(["0", "1"], {"t": {"_a": [1, 2], "b": [2, 1]}}).legends
    assert [text.get_text() for text in legend.texts] == ["_a", "b"]


@pytest.fixture(scope="module")
def explorers():
    model = load_model("tiny-gemma")
    patching, task = PatchingExplorer(model), Task(model, make_prompts(model, 3))
    builder = CircuitBuilder(task, {"END": {(0, 0, "END")}})
    return {
        "lens": lambda text: views.lens(model, text),
        "circuit": lambda text: builder.figure(f"There was Roger. {text} left. A clerk gave it to"),
        "patching": lambda text: patching(
            "city", f"The keys {text}", f"The key {text}", "are / is", "resid_pre", "noise"
        ),
    }


@lacking_glyphs
@pytest.mark.parametrize("name", ["lens", "circuit", "patching"])
@any_texts
@given(ANY)
@example("The $$ of \\$ and $x_1$")
@example("\x00\n<b>")
def test_any_prompt_is_drawn_or_answered_in_a_sentence(explorers, name, prompt):
    try:
        drawn = explorers[name](prompt)
        assert isinstance(drawn, views.View) or plots.render(drawn)
    except ValueError as error:
        assert str(error)


def test_a_message_is_shown_as_it_is():
    def figure(text=""):
        if text:
            raise ValueError(f"{text} cannot be drawn.")
        return plots.lines([0, 1], {"": [0, 1]})

    made = widgets.Explorer(figure, text=ipywidgets.Text(""))
    made.controls["text"].value = "$x$ <b>"
    assert made.view.message == "$x$ <b> cannot be drawn."  # figure.js makes it a text node


def test_a_context_is_cut_around_the_token_that_fires():
    before = ["[[1, 2], "] * 40
    assert "[[$]]" in centred(Context([*before, "$", *before], 40, 1.0, 0))
    assert printable("$$") == "$$" and printable("\n") == "⏎"


# -- Markdown ----------------------------------------------------------------------------------


def in_html(text: str) -> bool:
    """Whether HTML has a way to write all of it: control characters it has none for."""
    return not any(unicodedata.category(c) == "Cc" and c not in "\n\r\t" for c in text)


def cells(table: str) -> list[str]:
    """The cells of a Markdown table's rows, as a notebook shows them."""
    page = markdown2html_mistune(table)
    found = re.findall(r"<td[^>]*>(.*?)</td>", page, flags=re.DOTALL)
    return [html.unescape(re.sub("</?code>", "", cell)) for cell in found]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(ANY.filter(in_html))
def test_a_table_shows_any_text_as_it_is(text):
    page = f"| a | b |\n|---|---|\n| {literal(text)} | x{literal(text)}x |\n"
    assert cells(page) == [text, f"x{text}x"]


def test_code_reaches_a_terminal_as_it_is():
    note = Note("🔑 **77.1 Squares:** `x**2`\n\n```python\nreturn x**2 + y**2\n```")
    assert repr(note) == "🔑 77.1 Squares: `x**2`\n\n```python\nreturn x**2 + y**2\n```"
    assert code("'a  b'") == "`'a  b'`" and code(" a\n   b") == "`a b`"


# -- files -------------------------------------------------------------------------------------


@settings(max_examples=50, derandomize=True, deadline=None)
@given(ANY, ANY, ANY)
@example("a", "a", 'Output "a" (p=1.000)')
def test_a_graph_comes_back_with_its_texts(tmp_path_factory, a, b, c):
    labels = {name: text for name, text in (("0_1_1", b), ("2_7_1", c)) if text}
    graph = by_hand(a, b, labels=labels, supernodes={c: ("0_1_1",)}, settings={"note": a})
    back = load_graph(save_graph(graph, tmp_path_factory.mktemp("graph") / "graph.json"))
    for field in ("prompt", "tokens", "model", "target_names", "labels", "supernodes", "settings"):
        assert getattr(back, field) == getattr(graph, field), field


@settings(max_examples=50, derandomize=True, deadline=None)
@given(ANY, ANY)
def test_a_csv_file_comes_back_with_its_texts(tmp_path_factory, a, b):
    path = tmp_path_factory.mktemp("ledger") / "claims.csv"
    row = dict.fromkeys(ledger.COLUMNS, a) | {ledger.COLUMNS[0]: b}
    ledger.write([row, row], path)
    assert ledger.read(path) == [row, row]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_of_json_come_back_as_they_are(tmp_path_factory, texts, escaped, end):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    path.write_bytes("".join(row + end for row in rows).encode())
    assert list(open_source(str(path)).texts()) == [text for text in texts if text.strip()]


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
def test_half_a_character_is_refused_by_its_line(tmp_path, half):
    rows = [json.dumps({"text": text}) + "\n" for text in ("a", half)]
    (tmp_path / "a.jsonl").write_text("".join(rows), "utf-8")
    with pytest.raises(SourceError, match="Line 2 of .*a.jsonl has half of a character"):
        list(open_source(str(tmp_path / "a.jsonl")).texts())


def test_line_ends_of_windows_end_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    assert list(open_source(str(tmp_path / "a.txt")).texts()) == ["a\nb", "c"]
