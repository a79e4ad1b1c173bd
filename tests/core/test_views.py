"""The views' data, and what they leave for a reader without a kernel."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model

from mi_helpers import logit_lens, views
from mi_helpers.circuits.cards import FACTORS, act_on, answers, interventions
from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.files import graph_json
from mi_helpers.circuits.graphs import prune
from mi_helpers.circuits.interventions import intervene
from mi_helpers.lens import TunedLens
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.views.base import module, shown, spoken
from mi_helpers.views.tokens import ink, luminance

WORDS = ["The", " cat", "\n", "<b>$x$", "\u202e"]
VALUES = [0.5, -1.0, float("nan"), 2.0, 0.0]


def test_tokens_get_their_number_a_colour_and_a_name():
    data = views.tokens_json(WORDS, VALUES, label="loss", unit="nats", centre_zero=True)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    (line,) = data["lines"]
    first, second, third, *_ = line["tokens"]
    assert (first["said"], first["value"]) == ("loss 0.5 nats", 0.5)
    assert third["said"] == "loss no number" and third["value"] is None
    assert [token["shown"] for token in line["tokens"]] == ["The", " cat", "↵", "<b>$x$", "\\u202e"]
    assert data["scale"]["low"] == "-2 nats" and len({first["colour"], second["colour"]}) == 2


@pytest.mark.parametrize("centre_zero", [True, False])
def test_every_token_can_be_read_on_its_colour(centre_zero):
    values = np.linspace(-1, 1, 60)
    data = views.tokens_json(["a"] * 60, values, centre_zero=centre_zero)
    for token in data["lines"][0]["tokens"]:
        light, dark = sorted((luminance(token["colour"]), luminance(token["ink"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert ink("#ffffff") == "#000000" and ink("#000000") == "#ffffff"


def test_several_lines_have_names():
    data = views.tokens_json([["a"], ["b", "c"]], [[1], [2, 3]], names=["one", "two"])
    assert [line["name"] for line in data["lines"]] == ["one", "two"]


def test_equal_values_and_no_finite_ones_are_drawn():
    views.tokens(["a", "b"], [1, 1])
    views.tokens(["a"], [float("nan")])


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="no tokens"):
        views.tokens_json([], [])
    with pytest.raises(ValueError, match="Line 0 has 2 tokens"):
        views.tokens_json(["a", "b"], [1])
    with pytest.raises(ValueError, match="2 lines of tokens came with 1 lines"):
        views.tokens_json([["a"], ["b"]], [[1]])


def test_without_a_kernel_there_is_html_and_text_and_no_markup_of_a_user():
    bundle, _ = views.tokens(WORDS, VALUES, label="loss")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    state = views.tokens(WORDS, VALUES).get_state()
    assert state["_esm"] == module("tokens") and ".mi-token" in state["_css"]
    assert "<b>$x$" not in bundle["text/html"] and "&lt;b&gt;" in bundle["text/html"]
    assert not re.search(r"<script|https?://| on[a-z]+=", bundle["text/html"])
    assert "<b>$x$ [2]" in bundle["text/plain"]


def test_attention_is_the_models():
    model = tiny_model()
    data = views.attention_json(model, "the cat sat on the mat", head=(1, 1), token=2)
    assert json.loads(json.dumps(data)) == data
    assert len(data["heads"]) == model.n_layers * model.n_heads
    assert data["heads"][data["start"]["head"]]["name"] == "1.1" and data["start"]["token"] == 2
    _, cache = model.run_with_cache("the cat sat on the mat", [("pattern", 2)])
    rows = data["heads"][-1]["rows"]
    assert [len(row) for row in rows] == list(range(1, len(data["tokens"]) + 1))
    for i, row in enumerate(rows):
        assert row == pytest.approx(cache["pattern", 2][0, -1, i, : i + 1].tolist(), abs=6e-4)


def test_attention_without_a_kernel_says_where_each_head_looks():
    bundle, _ = views.attention(tiny_model(), "the cat sat")._repr_mimebundle_()
    assert bundle["text/html"].count("<td>") == 6 and "data:image/png" in bundle["text/html"]
    assert not re.search(r"<script|https?://| on[a-z]+=", bundle["text/html"])
    assert "2.1: " in bundle["text/plain"]


def test_what_attention_does_not_have_is_said():
    model = tiny_model(max_position_embeddings=128)
    for wrong, said in (
        ({"layers": [3]}, "Layers"),
        ({"layers": []}, "Layers"),
        ({"head": (0, 2)}, "no head .*heads 0 to 1 of each"),
        ({"token": 9}, "no token 9"),
    ):
        with pytest.raises(ValueError, match=said):
            views.attention_json(model, "the cat", **wrong)
    with pytest.raises(ValueError, match="at most 64"):
        views.attention_json(model, "the cat " * 60)


PROMPT = "the cat sat on the mat"


def test_the_lens_reads_as_the_lens_does():
    model = tiny_model()
    data = views.lens_json(model, PROMPT, follow="dog")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    ids = model.tokens(PROMPT)
    first = ids.shape[1] - len(data["tokens"])  # BOS has no column
    logits = logit_lens(model, ids)[:, 0, first:]  # (depths, columns, d_vocab)
    dog = model.to_single_token(" dog")
    assert len(data["cells"]) == model.n_layers + 1 == len(data["depths"])
    for depth, row in enumerate(data["cells"]):
        for column, cell in enumerate(row):
            here = logits[depth, column]
            assert cell["rank"] == 1 + int((here > here[dog]).sum())
            best = here.softmax(-1).max()
            assert cell["p"] == pytest.approx(float(best), abs=1e-4)
            assert [p for _, p in cell["likeliest"]] == sorted(
                (p for _, p in cell["likeliest"]), reverse=True
            )
            for colour, over in (cell["colours"], cell["by_rank"]):
                light, dark = sorted((luminance(colour), luminance(over)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5
    own = views.lens_json(model, PROMPT)
    assert {cell["rank"] for cell in own["cells"][-1]} == {1}  # the model's own answers


def test_the_lens_reads_through_the_lens_that_is_chosen():
    model = tiny_model()
    tuned = TunedLens(model.n_layers, model.d_model)
    tuned.bias.data[:] = 5 * model.W_U.T[7]
    tuned.requires_grad_(False)
    both = {"tuned lens": tuned, "logit lens": None}
    data = views.lens_json(model, PROMPT, lenses=both)
    assert data["lens"] == "tuned lens" and data["lenses"] == list(both)
    plain = views.lens_json(model, PROMPT, lenses=both, lens="logit lens")
    assert plain["cells"] == views.lens_json(model, PROMPT)["cells"] != data["cells"]
    assert data["cells"][-1] == plain["cells"][-1]  # nothing to translate at the last depth


def test_the_lens_answers_what_is_typed_into_it():
    view = views.lens(tiny_model(), "the cat")
    asked = {"prompt": PROMPT, "follow": "dog", "lens": "logit lens", "ranks": True}
    view.chosen = asked
    assert len(view.data["tokens"]) == len(views.lens_json(tiny_model(), PROMPT)["tokens"])
    assert set(view.data["followed"]) == {"dog"} and view.data["ranks"] is True
    before = view.data["cells"]
    for change, said in (
        ({"prompt": ""}, "empty"),
        ({"prompt": "the cat" + " sat" * 25}, "at most 24"),
    ):
        view.chosen = asked | change
        assert said in view.data["message"] and view.data["cells"] == before
        assert view.data["prompt"] == change["prompt"]  # nothing typed is lost
    view.chosen = asked
    assert view.data["message"] == ""


def test_the_lens_without_a_kernel_has_a_table():
    bundle, _ = views.lens(tiny_model(), PROMPT)._repr_mimebundle_()
    data = views.lens_json(tiny_model(), PROMPT)
    cells = len(data["cells"]) * len(data["tokens"])
    assert bundle["text/html"].count("<td ") == cells
    assert not re.search(r"<script|https?://| on[a-z]+=", bundle["text/html"])
    assert bundle["text/plain"].count("rank of") == len(data["depths"])


def test_what_the_lens_does_not_have_is_said():
    model = tiny_model()
    with pytest.raises(ValueError, match="There is no lens 'other' here; there are: logit lens"):
        views.lens_json(model, "the cat", lens="other")
    with pytest.raises(ValueError, match="one token|vocabulary"):
        views.lens_json(model, "the cat", follow="xylophone quartet")
    with pytest.raises(ValueError, match="follow is 17: expected a word"):
        views.lens_json(model, "the cat", follow=17)
    with pytest.raises(ValueError, match="empty"):
        views.lens_json(model, "")


def test_modules_ask_nothing_of_other_machines_and_make_no_markup():
    names = {path.stem for path in Path(views.__file__).parent.glob("*.js")} - {"common"}
    assert names >= {"tokens", "attention", "lens", "figure", "graph", "latents"}
    for name in names:
        code = module(name).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "import " not in re.sub(r"//.*", "", code)
        assert code.count("export ") == code.count("export default") + code.count("export function")
        assert not re.search(r"https?://|fetch\(|innerHTML|insertAdjacentHTML|eval\(", code)


def test_what_cannot_be_seen_is_shown_by_a_sign():
    assert shown("a\n\t") == "a↵⇥" and shown("") == "∅" and shown("\x00") == "\\u0000"
    assert shown("👩\u200d👧") == "👩\u200d👧" and spoken("  ") == "space"


# -- the graph -----------------------------------------------------------------------------------


def small_graph(model):
    """The pruned graph of a prompt on a tiny random model, as the field's JSON."""
    d = model.d_model
    coders = [SparseCoder(d, 20, d, k=4, seed=i) for i in range(model.n_layers)]
    return graph_json(prune(attribution_graph(model, coders, "the cat sat on the mat"), 0.9))


def test_the_graph_is_that_of_the_file():
    source = small_graph(tiny_model())
    data = views.graph_view_json(source)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [node["id"] for node in data["nodes"]] == [node["node_id"] for node in source["nodes"]]
    assert len(data["links"]) == len(source["links"])
    one, link = data["links"][0], source["links"][0]
    assert data["nodes"][one[0]]["id"] == link["source"] and one[2] == link["weight"]
    kinds = {node["kind"]: node["row"] for node in data["nodes"]}
    assert kinds["embedding"] == 0 and data["rows"][kinds["logit"]] == "answer"
    assert [each["shown"] for each in data["tokens"]] == source["metadata"]["prompt_tokens"]


def test_a_logit_has_its_token_and_probability_for_a_name():
    source = small_graph(tiny_model())
    for node in views.graph_view_json(source)["nodes"]:
        if node["kind"] == "logit":
            assert re.fullmatch(r".+ [01]\.\d\d", node["name"])


def test_a_group_keeps_the_nodes_that_the_file_still_has():
    source = small_graph(tiny_model())
    there = source["nodes"][0]["node_id"]
    source["qParams"] = {"supernodes": [["mine", there, "9_99_9"]]}
    assert views.graph_view_json(source)["groups"] == {"mine": [there]}


def test_what_is_no_graph_is_said():
    for bad in ({}, {"metadata": {}, "nodes": [], "links": []}, {"nodes": 3}):
        with pytest.raises(ValueError, match="no attribution graph"):
            views.graph_view_json(bad)
    source = small_graph(tiny_model())
    source["nodes"] = [n for n in source["nodes"] if n["feature_type"] != "logit"]
    source["links"] = []
    with pytest.raises(ValueError, match="no logit"):
        views.graph_view_json(source)
    twice = small_graph(tiny_model())
    twice["nodes"].append(twice["nodes"][-1])
    with pytest.raises(ValueError, match="have one name"):
        views.graph_view_json(twice)
    source["links"] = [{"source": "a", "target": "b", "weight": 1.0}]
    with pytest.raises(ValueError, match="no attribution graph"):
        views.graph_view_json(source)


def test_a_view_traces_what_is_typed_or_says_why_not():
    model = tiny_model()

    def trace(prompt):
        if not prompt:
            raise ValueError("Type a prompt.")
        return small_graph(model) | {
            "metadata": small_graph(model)["metadata"] | {"prompt": prompt}
        }

    view = views.graph(trace, prompt="the cat")
    assert view.data["live"] and view.data["prompt"] == "the cat"
    view.chosen = {"prompt": "the dog", "node": ""}
    assert view.data["prompt"] == "the dog" and not view.data["message"]
    view.chosen = {"prompt": "", "node": ""}
    assert view.data["message"] == "Type a prompt." and view.data["nodes"]
    bundle, _ = view._repr_mimebundle_()
    assert "Into the answers" in bundle["text/html"] and "Into the answers" in bundle["text/plain"]
    assert not re.search(r"<script|https?://| on[a-z]+=", bundle["text/html"])


def test_every_node_is_multiplied_as_the_model_answers():
    model = tiny_model()
    d = model.d_model
    coders = [SparseCoder(d, 20, d, k=4, seed=i) for i in range(model.n_layers)]
    prompt = "the cat sat on the mat"
    graph = prune(attribution_graph(model, coders, prompt), 0.9)
    features = [node.id for node in graph.features()]
    graph = replace(graph, supernodes={"two": tuple(features[:2])})
    view = views.graph(lambda text: graph_json(graph), prompt, act=act_on(model, coders), node=0.5)
    assert view.data["acts"] and view.data["start"]["node"] == 0.5
    targets = [[n["id"]] for n in view.data["nodes"] if n["kind"] != "logit"] + [features[:2]]
    texts = [spoken(model.token_text(i)) for i in range(model.d_vocab)]
    for nodes in targets:
        for factor in FACTORS:
            view.chosen = {"prompt": prompt, "act": {"nodes": nodes, "factor": factor}}
            assert view.told["nodes"] == nodes and "message" not in view.told, view.told
            before, after = intervene(
                model, coders, prompt, dict.fromkeys(nodes, factor)
            ).probabilities()
            for word, was, now in view.told["answers"]:
                token = [i for i, text in enumerate(texts) if text == word]
                pairs = [(before[i].item(), after[i].item()) for i in token]
                assert any(pair == pytest.approx((was, now), abs=1e-6) for pair in pairs)
            said = [now for _, _, now in view.told["answers"]]
            assert said[0] == pytest.approx(float(after.max()), abs=1e-6)
    assert json.loads(json.dumps(view.told, allow_nan=False)) == view.told
    view.chosen = {"prompt": prompt, "act": {"nodes": ["0_19_99"], "factor": 0}}
    assert "position 99" in view.told["message"] and "answers" not in view.told


def test_a_node_is_multiplied_on_the_prompt_that_is_drawn():
    asked, source = [], small_graph(tiny_model())

    def trace(prompt):
        if not prompt:
            raise ValueError("Type a prompt.")
        return source

    def act(prompt, factors):
        asked.append((prompt, factors))
        return [(" \n", 1.0, 0.0)]

    view = views.graph(trace, "the cat", act)
    view.chosen = {"prompt": ""}
    node = view.data["nodes"][0]["id"]
    view.chosen = {"prompt": "", "act": {"nodes": [node], "factor": 2}}
    assert asked == [("the cat", {node: 2.0})]
    assert view.told == {"nodes": [node], "factor": 2, "answers": [["↵", 1.0, 0.0]]}
    assert not views.graph(source).data["acts"]


def test_what_multiplying_does_is_kept_for_a_page():
    model = tiny_model()
    d = model.d_model
    coders = [SparseCoder(d, 20, d, k=4, seed=i) for i in range(model.n_layers)]
    graph = prune(attribution_graph(model, coders, "the cat sat on the mat"), 0.9)
    first, second, *_ = (node.id for node in graph.features())
    graph = replace(graph, supernodes={"both": (first, second), "one": (first,)})
    found = interventions(model, coders, graph, strongest=2)
    assert [each["nodes"] for each in found[::3]] == [[first, second], [first], [second]]
    assert [each["factor"] for each in found] == 3 * list(FACTORS)
    made = views.graph_view_json(graph_json(graph) | {"interventions": found})
    assert made["done"][0]["answers"][0][1:] == list(found[0]["answers"][0][1:])
    assert found[0]["answers"] == answers(model, coders, graph.prompt, {first: 0, second: 0})
    for bad in ([{"nodes": [first]}], [3], [{"nodes": [], "factor": "x", "answers": []}]):
        with pytest.raises(ValueError, match="no attribution graph"):
            views.graph_view_json(graph_json(graph) | {"interventions": bad})


def test_the_page_holds_data_that_cannot_leave_it():
    source = small_graph(tiny_model())
    source["metadata"]["prompt"] = "</script><b>$x$"
    page = views.graph_page(source)
    assert page.count("</script>") == 2 and "default-src 'none'" in page
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(inside[1])["prompt"] == "</script><b>$x$"
    assert not json.loads(inside[1])["live"]


LATENT = {
    "latent": 3,
    "fires": 40,
    "frequency": 0.004,
    "mean": 2.0,
    "top": [[8.0, "the [[virus]] of <b>$x$"], [4.0, "a\n[[ liver]] cell"]],
    "quantiles": ["the [[virus]]", "to the [[</script>]]"],
    "nearest": [[5, 0.61239]],
    "raises": [[" virus", 2.5], ["\n", 1.0]],
    "lowers": [[" the", -1.0]],
}
DEAD = {"latent": 5, "fires": 0, "frequency": 0.0, "mean": 0.0, "top": []}


def test_latents_are_read_from_rows_and_from_a_file(tmp_path):
    data = views.latents_json([LATENT, DEAD], names={3: ("virology", 0.912345)}, start=5)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    first, dead = data["latents"]
    assert (first["name"], first["score"], first["density"]) == ("virology", 0.912, 0.004)
    assert [each["token"] for each in first["top"]] == ["virus", " liver"]
    assert first["top"][1]["before"] == "a↵" and first["top"][0]["after"] == " of <b>$x$"
    assert first["nearest"] == [[5, 0.612]] and first["raises"][1] == ["↵", 1.0]
    assert dead["top"] == [] and dead["highest"] == 0 and data["start"] == 5
    path = tmp_path / "latents.jsonl"
    path.write_text("\n".join(map(json.dumps, [LATENT, DEAD])), "utf-8")
    assert views.latents_json(path, names={3: ("virology", 0.912345)}, start=5) == data


def test_a_firing_token_can_be_read_on_its_colour():
    rows = [LATENT | {"top": [[v, "a [[b]] c"] for v in np.linspace(8, 0.1, 8)]}]
    (one,) = views.latents_json(rows)["latents"]
    assert len({each["colour"] for each in one["top"]}) == 8
    for each in one["top"]:
        light, dark = sorted((luminance(each["colour"]), luminance(each["ink"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_what_is_no_dictionary_is_said(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"latent": 1', "utf-8")
    for rows, look, said in (
        ([], {}, "no latents"),
        ([{"latent": 1}], {}, "Line 1 is no latent: fires, frequency, mean, top"),
        ([LATENT, LATENT], {}, "stands there twice"),
        ([LATENT], {"start": 9}, "no latent 9"),
        ([LATENT], {"link": "https://example.org/7"}, "has no {latent}"),
        (tmp_path / "none.jsonl", {}, "is not there"),
        (broken, {}, "Line 1 of .* is no JSON"),
    ):
        with pytest.raises(ValueError, match=said):
            views.latents_json(rows, **look)


def test_latents_stand_without_a_kernel_and_as_one_page(tmp_path):
    bundle, _ = views.latents([LATENT, DEAD])._repr_mimebundle_()
    assert "<b>$x$" not in bundle["text/html"] and "[[virus]]" in bundle["text/html"]
    assert not re.search(r"<script|https?://| on[a-z]+=", bundle["text/html"])
    assert "3: fires at 0.40%" in bundle["text/plain"]
    page = views.latents_page(tmp_path / "all.html", [LATENT, DEAD], label="a & b").read_text(
        "utf-8"
    )
    assert page.count("</script>") == 2 and "<title>a &amp; b</title>" in page
    assert not re.search(r"https?://|src=|import ", page) and list(tmp_path.iterdir()) != []
