"""The views in a real browser: in a bare page by keyboard, and in Lab with and without a kernel.

With MI_SHOTS set to a folder, each leaves a picture there.
"""

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_lab_opens import SECONDS, open_notebook, run_all, write
from tiny_models import tiny_model

from mi_helpers import views
from mi_helpers.course.notebooks import KERNEL
from mi_helpers.views.base import module, read

pytestmark = pytest.mark.browser

SCREEN = {"width": 1366, "height": 768}
SHOW = """async ([code, css, data]) => {
  document.head.append(Object.assign(document.createElement('style'), {textContent: css}));
  const address = URL.createObjectURL(new Blob([code], {type: 'text/javascript'}));
  const view = (await import(address)).default, el = document.createElement('div');
  document.body.append(el);
  window.chosen = [];
  const held = {data}, heard = {};
  const model = {get: name => held[name], on: (name, f) => { heard[name] = f; }, off() {},
    save_changes() {}, set: (name, value) => window.chosen.push(value)};
  window.tell = told => { held.told = told; heard['change:told'](); };
  view.render({model, el});
}"""
WORDS = [
    ["<bos>", "The", " cat", "\n", "<img src=x onerror=alert(1)>", "$x$"],
    ["a", "\u202eb", ""],
]
VALUES = [[float("nan"), 0.5, -1.0, 2.0, 0.25, 0.0], [1.0, -2.0, 0.1]]
PROMPT = "the cat sat on the mat and the dog ran far"


def shot(page, name: str) -> None:
    if folder := os.environ.get("MI_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def show(page, name: str, data: dict) -> None:
    page.set_viewport_size(SCREEN)
    page.goto("data:text/html,<!doctype html><body>")
    page.evaluate(SHOW, [module(name), read("views.css"), data])


def focused(page) -> str:
    return page.evaluate("() => document.activeElement.getAttribute('aria-label')")


def test_tokens_by_keyboard(page):
    data = views.tokens_json(
        WORDS, VALUES, label="loss change", unit="nats", names=["one", "two"], centre_zero=True
    )
    show(page, "tokens", data)
    assert page.locator("img").count() == 0  # a token that is HTML stays text
    assert page.get_by_role("option").count() == 9
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Show all numbers
    assert page.get_by_role("button", name="Show all numbers", pressed=True).count() == 1
    page.keyboard.press("Tab")
    assert focused(page) == "<bos>: loss change no number"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "cat: loss change -1 nats"
    assert "“ cat” loss change -1 nats" in page.locator(".mi-readout").inner_text()
    shot(page, "tokens")
    page.keyboard.press("ArrowDown")
    assert focused(page) == "∅: loss change 0.1 nats"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")  # there is none further left
    assert focused(page) == "<bos>: loss change no number"
    assert page.evaluate("() => window.chosen.at(-1)") == {"line": 0, "token": 0}
    page.keyboard.press("Tab")  # the whole view is one stop
    assert focused(page) is None


def test_the_number_is_read_on_hover(page):
    show(page, "tokens", views.tokens_json(["a", "b"], [1.0, 2.0], label="loss", unit="nats"))
    page.get_by_role("option", name="b: loss 2 nats").hover()
    assert page.locator(".mi-readout").inner_text() == "“b” loss 2 nats"


def test_attention_by_keyboard(page):
    model = tiny_model()
    data = views.attention_json(model, PROMPT)
    show(page, "attention", data)
    heads = page.get_by_role("listbox", name="Heads: a row per layer").get_by_role("option")
    assert heads.count() == model.n_layers * model.n_heads
    page.keyboard.press("Tab")
    assert focused(page) == "layer 0, head 0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "layer 1, head 1"
    assert page.get_by_role("group", name="Layer 1, head 1").count() == 1
    page.keyboard.press("Tab")  # the button
    page.keyboard.press("Tab")  # the tokens: the last is where it starts
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    row = np.array(data["heads"][3]["rows"][2])
    best = int(row.argmax())
    said = f"{data['tokens'][best]['spoken']} ({best}) {row[best]:.2f}"
    assert focused(page).startswith(f"{data['tokens'][2]['spoken']} (2) looks at {said}")
    shot(page, "attention")
    assert page.evaluate("() => window.chosen.at(-1)") == {"layer": 1, "head": 1, "token": 2}
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    column = [head[2] if len(head) > 2 else 0 for head in data["heads"][3]["rows"]]
    best = int(np.argmax(column))
    said = f"is looked at by {data['tokens'][best]['spoken']} ({best}) {column[best]:.2f}"
    assert said in page.locator(".mi-readout").inner_text()
    height = page.evaluate("() => document.querySelector('section').getBoundingClientRect().height")
    assert height <= 647


def test_the_lens_by_keyboard(page):
    data = views.lens_json(
        tiny_model(), PROMPT, lenses={"tuned lens": None, "logit lens": None}, follow="hat"
    )
    show(page, "lens", data)
    cells = page.get_by_role("listbox", name=data["label"]).get_by_role("option")
    assert cells.count() == len(data["tokens"]) * len(data["depths"])
    page.keyboard.press("Tab")
    assert focused(page) == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("<b>the dog</b>")
    page.keyboard.press("Enter")
    asked = page.evaluate("() => window.chosen.at(-1)")
    assert asked == {
        "prompt": "<b>the dog</b>",
        "follow": "hat",
        "lens": "tuned lens",
        "ranks": False,
    }
    page.keyboard.press("Tab")
    assert focused(page) == "follow"
    page.keyboard.press("Tab")
    assert focused(page) == "lens"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Show ranks
    assert page.get_by_role("button", name="Show ranks", pressed=True).count() == 1
    page.keyboard.press("Tab")  # the cells: the model's own answer after the first token
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    depth = len(data["depths"]) - 2
    cell = data["cells"][depth][1]
    said = focused(page)
    assert said.startswith(
        f"after block {data['depths'][depth]}, at {data['tokens'][1]['spoken']}:"
    )
    assert said.endswith(f"hat has rank {cell['rank']} of {data['vocabulary']}")
    assert page.locator(".mi-readout").inner_text() == said
    assert cells.nth(len(data["tokens"]) + 1).inner_text() == str(cell["rank"])
    shot(page, "lens")
    assert page.locator("b").count() == 0  # what is typed is no markup
    height = page.evaluate("() => document.querySelector('section').getBoundingClientRect().height")
    assert height <= 647


def by_hand() -> dict:
    """A graph's JSON: two words, three features in a row, an error, two answers, hostile names."""
    kinds = ["embedding"] * 2 + ["cross layer transcoder"] * 3
    kinds += ["mlp reconstruction error", "logit", "logit"]
    names = ["E_5_0", "E_6_1", "0_1_1", "1_2_1", "1_3_1", "0_-1_1", "3_9_1", "3_8_1"]
    words = ["", "", "<b>about $x$</b> 0.81", "weak? 0.10", "a third 0.60", ""]
    words += ['Output " Rome" (p=0.900)', 'Output "<img src=x>" (p=0.100)']
    layers, places = ["E", "E", "0", "1", "1", "0", "3", "3"], [0, 1, 1, 1, 1, 1, 1, 1]
    nodes = [
        {"node_id": n, "feature_type": k, "clerp": w, "layer": i, "ctx_idx": p, "influence": c,
         "own_influence": 1 - c, "value": 2.0, "activation": 2.0}
        for n, k, w, i, p, c in zip(names, kinds, words, layers, places,
                                    [0.1, 0.2, 0.3, 0.5, 0.95, 0.6, 1.0, 1.0], strict=True)
    ]  # fmt: skip
    edges = [(0, 2, 3.0), (1, 2, -1.0), (2, 3, 2.0), (2, 4, 0.5), (5, 3, 0.7), (3, 6, 4.0)]
    edges += [(3, 7, -2.0), (4, 6, 0.2), (1, 6, 0.1)]
    links = [{"source": names[a], "target": names[b], "weight": w} for a, b, w in edges]
    card = {
        "contexts": [[["The", 0.0], [" cat", 1.0]]],
        "raises": [["</script>", 2.0]],
        "lowers": [],
    }
    meta = {"prompt": "The cat", "prompt_tokens": ["The", " cat"], "n_layers": 2}
    return {"metadata": meta, "nodes": nodes, "links": links, "cards": {"1_2_1": card}}


def use_the_graph(page) -> None:
    """The answer, a node below it, a pin, a group, a threshold: all by keyboard."""
    for _ in range(3):  # two sliders, then the answer
        page.keyboard.press("Tab")
    assert focused(page) == "Rome 0.90 at cat, 2.00"
    page.keyboard.press("ArrowDown")
    assert focused(page) == "weak? 0.10 at cat, layer 1, 2.00"
    card = page.get_by_role("region", name="card of the node")
    assert "+4.00 Rome 0.90" in card.inner_text() and "</script> +2.00" in card.inner_text()
    assert card.locator("mark").inner_text() == " cat"
    page.keyboard.press("p")
    assert focused(page) == "weak? 0.10 at cat, layer 1, 2.00, pinned"
    page.get_by_role("textbox", name="name of the group").focus()
    page.keyboard.type("<i>step</i>")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    said = page.get_by_role("list", name="links between groups").inner_text()
    assert "<i>step</i> → Rome 0.90 +4.00" in said
    count = page.get_by_role("option").count()
    page.get_by_role("slider", name="nodes").focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.get_by_role("option").count() == count + 1  # the third feature comes
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    left = page.get_by_role("option")
    assert left.count() < count and left.first.get_attribute("aria-label").startswith("Rome")
    assert page.locator("b >> text=about").count() == page.locator("img, section i").count() == 0


def test_the_graph_by_keyboard(page):
    show(page, "graph", views.graph_view_json(by_hand()))
    use_the_graph(page)
    done = page.evaluate("() => window.chosen.at(-1)")
    assert done["pinned"] == ["1_2_1"] and done["groups"] == {"<i>step</i>": ["1_2_1"]}
    shot(page, "graph")
    height = page.evaluate("() => document.querySelector('section').getBoundingClientRect().height")
    assert height <= 647


def test_the_card_leads_on_by_mouse(page):
    show(page, "graph", views.graph_view_json(by_hand()))
    page.get_by_role("option", name="weak? 0.10").click()
    card = page.get_by_role("region", name="card of the node")
    card.get_by_role("button", name="<b>about").click()
    assert focused(page).startswith("<b>about $x$</b> 0.81")
    assert page.locator(".mi-near").count() == 2  # of the edges that are drawn


def act_on_the_graph(page, answer) -> None:
    """By keyboard: the middle feature is put into a group, then it and the group are multiplied.

    Args:
        answer: called after each button, so that the model may answer.
    """
    for _ in range(3):
        page.keyboard.press("Tab")
    card = page.get_by_role("region", name="card of the node")
    assert card.get_by_role("button", name="×").count() == 0  # an answer writes to nothing
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")  # Pin
    page.keyboard.press("Tab")
    assert focused(page) == "×0: weak? 0.10"
    page.keyboard.press("Enter")
    answer()
    outcome = card.get_by_role("status")
    assert outcome.get_by_role("row").all_inner_texts() == [
        "next word\tbefore\tafter", "<b>Rome\t0.900\t0.200", "Oslo\t0.100\t0.800",
    ]  # fmt: skip
    assert focused(page) == "×0: weak? 0.10"  # the answer takes no focus
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowDown")
    assert outcome.inner_text() == ""  # another node
    page.keyboard.press("ArrowUp")
    assert "×0: weak? 0.10" in outcome.inner_text()
    assert page.locator("b >> text=Rome").count() == 0


def test_a_node_is_multiplied_from_its_card(page):
    seen = []

    def act(prompt, factors):
        seen.append((prompt, factors))
        if -1.0 in factors.values():
            raise ValueError("No <i>node</i> there.")
        return [("<b>Rome", 0.9, 0.2), (" Oslo", 0.1, 0.8)]

    view = views.graph(by_hand(), act=act)
    show(page, "graph", view.data)

    def answer():
        assert "The model runs" in page.get_by_role("status").inner_text()
        view.chosen = page.evaluate("() => window.chosen.at(-1)")
        page.evaluate("told => window.tell(told)", view.told)

    act_on_the_graph(page, answer)
    shot(page, "graph_act")
    page.keyboard.press("p")
    page.get_by_role("textbox", name="name of the group").fill("step")
    page.get_by_role("button", name="Group the pinned").click()
    page.get_by_role("option", name="weak?").focus()
    page.get_by_role("button", name="×2: the group step").press("Enter")
    assert "×2: the group step" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="×−1: weak? 0.10").press("Enter")
    answer()
    assert "No <i>node</i> there." in page.get_by_role("status").inner_text()
    assert seen[0] == ("The cat", {"1_2_1": 0.0}) and seen[-1] == ("The cat", {"1_2_1": -1.0})
    height = page.evaluate("() => document.querySelector('section').getBoundingClientRect().height")
    assert height <= 647


def test_a_page_without_a_model_shows_what_was_worked_out_or_says_what_it_takes(browser, tmp_path):
    place = tmp_path / "graph.html"
    answers = [["<b>Rome", 0.9, 0.2], [" Oslo", 0.1, 0.8]]
    done = [{"nodes": ["1_2_1"], "factor": 0, "answers": answers}]
    place.write_text(views.graph_page(by_hand() | {"interventions": done}), "utf-8")
    page = browser.new_page(viewport=SCREEN)
    page.context.set_offline(True)
    page.goto(place.as_uri())
    act_on_the_graph(page, lambda: None)
    card = page.get_by_role("region", name="card of the node")
    assert card.get_by_role("button", name="×").all_inner_texts() == ["×0"]
    page.keyboard.press("ArrowDown")
    assert card.get_by_role("button", name="×").count() == 0
    assert "the model has to run: in a notebook" in card.inner_text()
    shot(page, "graph_page_act")
    page.close()


def test_a_graph_is_one_page_that_needs_no_network(browser, tmp_path):
    place = tmp_path / "graph.html"
    place.write_text(views.graph_page(by_hand()), "utf-8")
    page, asked = browser.new_page(viewport=SCREEN), []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    page.goto(place.as_uri())
    use_the_graph(page)
    shot(page, "graph_page")
    page.close()
    assert asked == [place.as_uri()]


def a_dictionary(n: int = 300) -> list[dict]:
    """Latents that fire at a word of their own, ever more rarely; the last one is dead."""
    words = ["virus", "the", "liver"]
    return [
        {
            "latent": i,
            "fires": n - 1 - i,
            "frequency": (n - 1 - i) / (10 * n),
            "mean": 1.0,
            "top": [[2.0, f"of a [[{words[i % 3]}]] <img src=x>"]] if i < n - 1 else [],
            "quantiles": ["a [[weak]] one"],
            "nearest": [[(i + 7) % n, 0.5]],
            "raises": [[f" up{i}", 1.5]],
            "lowers": [[" down", -1.5]],
        }
        for i in range(n)
    ]


def browse(page) -> None:
    """Search, sort and read a dictionary by keyboard."""
    assert page.locator("img").count() == 0  # a context that is HTML stays text
    box, card = page.get_by_role("listbox", name="latents found"), page.locator(".mi-card")
    assert box.get_by_role("option").count() == 200
    assert "300 latents, the first 200" in page.get_by_role("status").inner_text()
    assert "latent 4: chess" in card.inner_text() and "fires at 9.8 %" in card.inner_text()
    search = page.get_by_role("searchbox", name="search")
    search.focus()
    page.keyboard.type("liver")
    assert box.get_by_role("option").count() == 99  # the dead one would be the hundredth
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")  # search in: what is raised
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("UP17")
    assert box.get_by_role("option").count() == 1 and "latent 17" in card.inner_text()
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    for name, option in (("search in", "name or topic"), ("order", "rarest first")):
        page.get_by_role("combobox", name=name).select_option(option)
    assert "latent 298" in card.inner_text()  # the rarest that fires
    page.get_by_role("combobox", name="order").select_option("best score first")
    assert box.get_by_role("option").first.get_attribute("aria-label").startswith("latent 4, chess")
    page.get_by_role("combobox", name="density").select_option("dead")
    assert "It never fires" in card.inner_text() and box.get_by_role("option").count() == 1
    page.get_by_role("combobox", name="density").select_option("any density")
    box.get_by_role("option").first.focus()
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith("latent 5, tennis") and "latent 5" in card.inner_text()
    assert "[[liver]] <img src=x>" in card.inner_text() and "[[weak]]" in card.inner_text()
    page.get_by_role("button", name="latent 12, cosine 0.50").focus()
    page.keyboard.press("Enter")
    assert "latent 12" in card.inner_text() and focused(page) == "the latent"
    search.focus()
    page.keyboard.type("zzz")
    assert "No latent fits" in page.get_by_role("status").inner_text()


def test_a_dictionary_by_keyboard(page):
    names = {4: ("chess", 0.9), 5: ("tennis", 0.8)}
    show(page, "latents", views.latents_json(a_dictionary(), names=names, start=4, label="a run"))
    height = page.evaluate("() => document.querySelector('section').getBoundingClientRect().height")
    assert height <= 647
    shot(page, "latents")
    browse(page)
    assert page.evaluate("() => window.chosen.at(-1)") == {"latent": 12}


def test_a_whole_dictionary_is_one_page_from_disk(page, tmp_path):
    names = {4: ("chess", 0.9), 5: ("tennis", 0.8)}
    made = views.latents_page(tmp_path / "a.html", a_dictionary(), names=names, start=4)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda each: problems.append(each.text) if each.type == "error" else None)
    page.set_viewport_size(SCREEN)
    page.context.set_offline(True)
    page.goto(made.as_uri())
    browse(page)
    page.context.set_offline(False)
    assert problems == []


LIVE = """\
import ipywidgets
from mi_helpers import plots, views
from mi_helpers.widgets import explore

def slope(gain, shift, part, prompt):
    if prompt == "bad":
        raise ValueError("The prompt 'bad' cannot be drawn.")
    return plots.lines([0, 1], {"y": [0, gain + shift]}, f"gain {gain} {part}", height=9)

explore(slope, gain=(1, 5), shift=(0.0, 1.0), part=["a", "b"], prompt="The cat")
"""
TOKENS = """\
from mi_helpers import views
views.tokens(["The", " cat", " sat"], [0.5, 1.5, 3.0], label="surprise", unit="nats")
"""


def cells(page) -> int:
    return page.evaluate("() => window.jupyterapp.shell.currentWidget.content.widgets.length")


def test_an_explorer_in_lab_by_keyboard(lab, page):
    page.set_viewport_size(SCREEN)
    write(lab, "explorer.ipynb", new_code_cell(LIVE), new_code_cell("1 + 1"))
    open_notebook(page, lab, "explorer.ipynb")
    assert run_all(page) == []
    slider = page.get_by_role("slider", name="gain")
    slider.wait_for(timeout=60 * SECONDS)
    box = page.locator(".mi-explorer")
    image = box.locator("img")
    page.wait_for_function("() => document.querySelector('.mi-explorer img')?.naturalWidth > 0")
    assert box.bounding_box()["height"] <= 647
    slider.focus()
    for key in ("x", "a", "d", "d", "ArrowDown", "m"):
        page.keyboard.press(key)
    assert cells(page) == 2
    said = image.get_attribute("alt")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "said => document.querySelector('.mi-explorer img').alt !== said", arg=said
    )
    top = image.bounding_box()["y"]
    prompt = box.get_by_label("prompt").first
    assert prompt.bounding_box()["width"] > 600  # a prompt has a line of its own
    prompt.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("bad")
    page.keyboard.press("Enter")
    page.get_by_text("The prompt 'bad' cannot be drawn.").wait_for()
    assert image.is_visible() and image.bounding_box()["y"] == top
    shot(page, "explorer")


def test_a_view_in_lab_by_keyboard(lab, page):
    page.set_viewport_size(SCREEN)
    write(lab, "view.ipynb", new_code_cell(TOKENS), new_code_cell("1 + 1"))
    open_notebook(page, lab, "view.ipynb")
    assert run_all(page) == []
    first = page.get_by_role("option", name="The: surprise 0.5 nats")
    first.wait_for(timeout=60 * SECONDS)
    first.focus()
    for key in ("x", "ArrowRight", "d", "d"):
        page.keyboard.press(key)
    assert cells(page) == 2 and focused(page) == "cat: surprise 1.5 nats"
    shot(page, "tokens_in_lab")


LENS = """\
from mi_helpers import load_model, views
views.lens(load_model("tiny-gemma"), "The Eiffel Tower is in the city of")
"""


def test_a_prompt_is_typed_into_the_lens_in_lab(lab, page):
    page.set_viewport_size(SCREEN)
    write(lab, "lens.ipynb", new_code_cell(LENS), new_code_cell("1 + 1"))
    open_notebook(page, lab, "lens.ipynb")
    assert run_all(page) == []
    prompt = page.get_by_role("textbox", name="prompt")
    prompt.wait_for(timeout=60 * SECONDS)
    prompt.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("The dxd of France ddx")  # shortcuts of the notebook are letters here
    page.keyboard.press("Control+A")
    page.keyboard.type("The language of France is")
    page.keyboard.press("Enter")
    page.get_by_role("option", name="after block 5, at is: French").wait_for(timeout=30 * SECONDS)
    assert cells(page) == 2 and focused(page) == "prompt"  # it keeps the focus when drawn anew
    page.keyboard.press("Tab")
    page.keyboard.type("xylophonists")
    page.keyboard.press("Enter")
    page.get_by_text("choose a word that is one token").wait_for(timeout=30 * SECONDS)
    shot(page, "lens_in_lab")


GRAPH = """\
from mi_helpers import load_model, views
from mi_helpers.circuits.cards import act_on
from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.files import graph_json
from mi_helpers.circuits.graphs import prune
from mi_helpers.saes.transcoders import coders_for
model = load_model("tiny-gemma")
coders = coders_for(model, range(model.n_layers))
view = views.graph(
    lambda prompt: graph_json(prune(attribution_graph(model, coders, prompt))),
    prompt="The capital of Poland is",
    act=act_on(model, coders),
)
view
"""


def test_a_prompt_is_typed_into_the_graph_in_lab(lab, page):
    page.set_viewport_size(SCREEN)
    write(lab, "graph.ipynb", new_code_cell(GRAPH), new_code_cell("1 + 1"))
    open_notebook(page, lab, "graph.ipynb")
    assert run_all(page) == []
    page.get_by_role("option", name="Warsaw").wait_for(timeout=60 * SECONDS)
    page.get_by_role("option", name="the word Poland").focus()
    page.get_by_role("button", name="×0: the word Poland").press("Enter")
    page.get_by_role("row", name="Warsaw").wait_for(timeout=30 * SECONDS)
    prompt = page.get_by_role("textbox", name="prompt")
    prompt.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("The dxd of Spain ddx")  # shortcuts of the notebook are letters here
    page.keyboard.press("Control+A")
    page.keyboard.type("The capital of Spain is")
    page.keyboard.press("Enter")
    page.get_by_role("option", name="Madrid").wait_for(timeout=30 * SECONDS)
    assert cells(page) == 2 and focused(page) == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    page.keyboard.press("Enter")
    page.locator(".mi-message:not(:empty)").first.wait_for(timeout=30 * SECONDS)
    shot(page, "graph_in_lab")


def test_without_kernel_and_state_the_html_stands(lab, page):
    page.set_viewport_size(SCREEN)
    bundle, _ = views.attention(tiny_model(), PROMPT)._repr_mimebundle_()
    more, _ = views.tokens(WORDS, VALUES, label="loss", centre_zero=True)._repr_mimebundle_()
    made = [
        new_code_cell("x", outputs=[new_output("display_data", each)]) for each in (more, bundle)
    ]
    nbformat.write(
        new_notebook(cells=made, metadata={"kernelspec": KERNEL}), lab.folder / "no.ipynb"
    )
    page.goto(lab.page_of("no.ipynb"))
    page.get_by_text("a row per layer, a column per head").wait_for(timeout=60 * SECONDS)
    assert page.get_by_text("model not found").count() == 0
    assert page.locator(".jp-OutputArea img[alt^='Every head']").count() == 1
    assert page.get_by_text("<img src=x onerror=alert(1)>").count() >= 1
    shot(page, "without_kernel")
