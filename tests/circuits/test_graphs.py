"""Graphs worked out by hand: influence, scores, pruning, supernodes, JSON; and their figures."""

import json
from dataclasses import replace

import pytest
import torch

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.figures import intervention_figure
from mi_helpers.circuits.files import load_graph, pair_number, save_graph
from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    EdgeError,
    Graph,
    Node,
    edge_scores,
    graph_scores,
    node_influence,
    prune,
    random_graph,
)
from mi_helpers.circuits.interventions import intervene, predicted_effect
from mi_helpers.files import RunError
from mi_helpers.loading import load_model
from mi_helpers.plots import render
from mi_helpers.saes.coder import SparseCoder

PROMPT = "the capital of the country of the Colosseum is"
NODES = (
    Node(EMBEDDING, -1, 0, 5),  # E_5_0
    Node(EMBEDDING, -1, 1, 6),  # E_6_1
    Node(FEATURE, 0, 1, 1),  # 0_1_1
    Node(ERROR, 0, 1),  # 0_-1_1
    Node(FEATURE, 1, 1, 4),  # 1_4_1
    Node(LOGIT, 2, 1, 7),  # 3_7_1
    Node(LOGIT, 2, 1, 8),  # 3_8_1
)
EDGES = {  # target: {source: weight}
    2: {0: 3.0, 1: -1.0},
    4: {2: 2.0, 3: -1.0, 1: 1.0},
    5: {4: 4.0, 2: -4.0},
    6: {4: 1.0, 3: 3.0},
}


@pytest.fixture
def graph():
    """Two tokens, a feature in each of two layers, an error, and logits of weight 3/4 and 1/4.

    Normalised, the incoming edges are
        0_1_1  E_5_0 3/4, E_6_1 1/4          1_4_1  0_1_1 1/2, error 1/4, E_6_1 1/4
        3_7_1  1_4_1 1/2, 0_1_1 1/2          3_8_1  1_4_1 1/4, error 3/4
    """
    adjacency = torch.zeros(7, 7)
    for target, sources in EDGES.items():
        for source, weight in sources.items():
            adjacency[target, source] = weight
    return Graph(
        "a b",
        ("a", " b"),
        NODES,
        adjacency,
        bias=torch.tensor([0.0, 0, 0, 0, 6, 1, 0]),
        values=torch.tensor([1.0, 1, 2, 1, 8, 1, 4]),
        probabilities=torch.tensor([0.6, 0.2]),
        n_layers=2,
        model="by hand",
        target_names=(" c", " d"),
    )


# By hand, from the logits down, with weights 3/4 and 1/4:
#   1_4_1  3/4 · 1/2 + 1/4 · 1/4                  = 7/16
#   0_1_1  3/4 · 1/2 + 7/16 · 1/2                 = 19/32
#   error  1/4 · 3/4 + 7/16 · 1/4                 = 19/64
#   E_6_1  7/16 · 1/4 + 19/32 · 1/4               = 33/128
#   E_5_0  19/32 · 3/4                            = 57/128
INFLUENCE = [57 / 128, 33 / 128, 19 / 32, 19 / 64, 7 / 16, 0.0, 0.0]


def test_influence_by_hand(graph):
    assert graph.influence.tolist() == pytest.approx(INFLUENCE)
    # every path ends at an embedding or an error
    assert sum(INFLUENCE[i] for i in (0, 1, 3)) == pytest.approx(1.0)
    # cumulative, in the order 0_1_1, E_5_0, 1_4_1, error, E_6_1, of 65/32 in all
    cumulative = [133 / 128, 65 / 32, 19 / 32, 226 / 128 + 1 / 128, 189 / 128, 65 / 32, 65 / 32]
    assert graph.cumulative.tolist() == pytest.approx([c / (65 / 32) for c in cumulative])


def test_influence_is_the_sum_over_all_paths(graph):
    """(I - A)^-1 - I against A + A² + A³, written out."""
    A = graph.adjacency.abs()
    A = A / A.sum(1, keepdim=True).clamp(min=1e-9)
    w = torch.tensor([0, 0, 0, 0, 0, 0.75, 0.25])
    total = w @ A + w @ A @ A + w @ A @ A @ A
    assert (w @ A @ A @ A @ A).abs().max() == 0
    assert torch.allclose(node_influence(graph.adjacency, graph.probabilities), total)


def test_scores_by_hand(graph):
    """Replacement: 90/128 of the paths start at an embedding. Completeness: of nodes with inputs,
    weighted 19/32, 7/16, 3/4, 1/4 (together 65/32), the error's share is 7/16 · 1/4 + 1/4 · 3/4."""
    replacement, completeness = graph_scores(graph)
    lost = 7 / 64 + 3 / 16
    assert replacement == pytest.approx(90 / 128)
    assert completeness == pytest.approx(1 - lost / (65 / 32))
    # circuit-tracer counts embeddings and errors, of weight 1 together, as explained
    assert graph_scores(graph, count_sources=True)[1] == pytest.approx(1 - lost / (97 / 32))


def test_without_errors_both_scores_are_one(graph):
    adjacency = graph.adjacency.clone()
    adjacency[:, 3] = 0.0
    assert graph_scores(replace(graph, adjacency=adjacency)) == pytest.approx((1.0, 1.0))
    only_errors = torch.zeros(7, 7)
    only_errors[5:, 3] = 1.0
    assert graph_scores(replace(graph, adjacency=only_errors)) == pytest.approx((0.0, 0.0))


def test_pruning_by_hand(graph):
    """node_threshold 0.5 of 65/32 needs 0_1_1 and E_5_0; the error and 1_4_1 go. What is left is
    3_7_1 ← 0_1_1 (score 3/4), 0_1_1 ← E_5_0 (9/16) and ← E_6_1 (3/16): of 3/2 in all, 0.8 needs the
    first two."""
    small = prune(graph, 0.5, 0.8)
    assert [n.id for n in small.nodes] == "E_5_0 E_6_1 0_1_1 3_7_1 3_8_1".split()
    assert small.adjacency.nonzero().tolist() == [[2, 0], [3, 2]]
    assert small.edge("0_1_1", "3_7_1") == -4.0
    assert small.missing.tolist() == pytest.approx([0, 0, 1, 4, 4])
    assert small.influence.tolist() == pytest.approx([INFLUENCE[i] for i in (0, 1, 2, 5, 6)])
    assert small.settings == {"node_threshold": 0.5, "edge_threshold": 0.8}
    assert small.edge_error is None and small.target_names == (" c", " d")
    assert int((prune(graph, 0.5, 0.98).adjacency != 0).sum()) == 3
    # what is cut counts as error: 0_1_1 has influence 3/4 · 1/2 and keeps 3/4 of its inputs,
    # 3_7_1 a half, 3_8_1 none
    replacement, completeness = graph_scores(small)
    assert replacement == pytest.approx(3 / 8 * 3 / 4)
    lost = 3 / 8 * 1 / 4 + 3 / 4 * 1 / 2 + 1 / 4
    assert completeness == pytest.approx(1 - lost / (3 / 8 + 1))


def test_edge_scores_by_hand(graph):
    scores = edge_scores(graph.adjacency, graph.probabilities)
    assert float(scores[5, 4]) == pytest.approx(3 / 4 / 2)
    assert float(scores[2, 0]) == pytest.approx(19 / 32 * 3 / 4)
    assert float(scores.sum()) == pytest.approx(65 / 32)


def test_pruning_nothing_keeps_everything(graph):
    whole = prune(graph, 1.0, 1.0)
    assert whole.nodes == graph.nodes and torch.equal(whole.adjacency, graph.adjacency)
    assert graph_scores(whole) == pytest.approx(graph_scores(graph))


def test_loose_ends_are_pruned(graph):
    """An edge threshold that cuts 1_4_1 from the logits takes it, and then the error, away."""
    adjacency = graph.adjacency.clone()
    adjacency[5, 4], adjacency[6, 4], adjacency[6, 3] = 0.01, 0.01, 0.0
    adjacency[6, 2] = 4.0
    loose = Graph("a b", ("a", "b"), NODES, adjacency, graph.bias, graph.values,
                       graph.probabilities, 2, target_names=("c", "d"))  # fmt: skip
    small = prune(loose, 1.0, 0.9)
    assert [n.id for n in small.nodes] == "E_5_0 E_6_1 0_1_1 3_7_1 3_8_1".split()


def test_thresholds_that_leave_nothing(graph):
    with pytest.raises(ValueError, match="node_threshold=0 and edge_threshold=0.98 no feature"):
        prune(graph, 0.0)
    with pytest.raises(ValueError, match="node_threshold=0.8 and edge_threshold=0 no feature"):
        prune(graph, 0.8, 0.0)
    with pytest.raises(ValueError, match="edge_threshold is 1.5: choose a share from 0 to 1"):
        prune(graph, 0.8, 1.5)
    with pytest.raises(ValueError, match="no feature nodes, so there is nothing to prune"):
        prune(graph.subgraph(~graph.mask(FEATURE)))


def test_predicted_effects_by_hand(graph):
    """0_1_1 switched off: 1_4_1 loses 2 of its 8, a quarter; directly 3_7_1 gains 4, and by the
    quarter of 1_4_1 it loses 1, and 3_8_1 1/4."""
    direct = predicted_effect(graph, {"0_1_1": 0.0}, paths=False)
    assert direct.tolist() == pytest.approx([0, 0, 0, 0, -2, 4, 0])
    through = predicted_effect(graph, {"0_1_1": 0.0})
    assert through.tolist() == pytest.approx([0, 0, 0, 0, -2, 3, -0.25])
    both = predicted_effect(graph, {"0_1_1": 0.0, NODES[4]: 1.0})  # 1_4_1 held where it is
    assert both[5:].tolist() == pytest.approx([4, 0])
    with pytest.raises(ValueError, match="is a logit: it writes to no other node"):
        predicted_effect(graph, {" c": 0.0})


def test_edge_error_by_hand(graph):
    assert graph.edge_error == EdgeError(0.0, 0.0, 0.0)
    off = Graph("a b", ("a", "b"), NODES, graph.adjacency, graph.bias,
                     graph.values + torch.tensor([9.0, 9, 0, 9, 0.08, 0, 0]), graph.probabilities,
                     2)  # fmt: skip
    # 8 where 8.08 is said, the terms 2, 1, 1 and 6; embeddings and errors have no edges
    expected = (0.08, 0.08 / 8.08, 0.08 / 10)
    error = off.edge_error
    assert (error.absolute, error.relative, error.scaled) == pytest.approx(expected, rel=1e-4)


def test_order_is_checked(graph):
    with pytest.raises(ValueError, match="order the nodes so that sources come first"):
        Graph("a", ("a",), NODES, graph.adjacency.T, graph.bias, graph.values,
                   graph.probabilities, 2)  # fmt: skip


def test_nodes_and_their_names():
    for node in NODES:
        assert Node.parse(node.id, 2) == node
    assert [n.id for n in NODES[:4]] == ["E_5_0", "E_6_1", "0_1_1", "0_-1_1"]
    for name in ("Paris", "1_2", "1_2_x", 3):
        with pytest.raises(ValueError, match="is no node's name"):
            Node.parse(name, 2)
    for name in ("2_5_1", "-1_5_1", "0_5_-1"):
        with pytest.raises(ValueError, match="layers go from 0 to 1"):
            Node.parse(name, 2)


def test_looking_at_a_graph(graph):
    assert graph.incoming(" c") == [(NODES[2], -4.0), (NODES[4], 4.0)] or graph.incoming(" c") == [
        (NODES[4], 4.0),
        (NODES[2], -4.0),
    ]
    assert graph.edge(NODES[4], " d") == 1.0 and graph.value("1_4_1") == 8.0
    assert graph.features() == [NODES[2], NODES[4]]
    assert graph.describe(" c") == "output ' c'" and graph.describe(0) == "'a' at 0"
    assert graph.describe("0_-1_1") == "L0 error at 1"
    labelled = graph.label({(1, 4): "a name", "E_5_0": "start", (5, 5): "nobody"})
    assert labelled.describe("1_4_1") == "a name" and labelled.describe(0) == "start"
    assert "1 errors" in repr(graph) and len(graph) == 7
    with pytest.raises(ValueError, match="There is no node '1_5_1' in the graph of 'a b'"):
        graph.index("1_5_1")
    with pytest.raises(ValueError, match="There is no node 7: the graph has 7"):
        graph.index(7)


def test_a_random_graph_deals_the_edges_out_anew(graph):
    control = random_graph(graph, seed=1)
    assert control.nodes == graph.nodes
    assert torch.allclose(control.adjacency.abs().sum(1), graph.adjacency.abs().sum(1))
    assert control.adjacency[0].abs().sum() == 0 and bool(control.adjacency.triu().any()) is False
    assert control.adjacency[:, 5:].abs().sum() == 0  # nothing comes from a logit
    different = [random_graph(graph, seed=i).adjacency for i in range(5)]
    assert any(not torch.equal(a, graph.adjacency) for a in different)
    assert torch.equal(random_graph(graph, 3).adjacency, random_graph(graph, 3).adjacency)


# ------------------------------------------------------------------------------------------ JSON

# What graph-schema.json of Neuronpedia's web application asks for.
METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
NODE = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
        "jsNodeId": str, "clerp": str}  # fmt: skip
LINK = {"source": str, "target": str, "weight": float}


def test_the_file_has_what_the_viewers_ask_for(graph, tmp_path):
    named = replace(graph.label({(1, 4): "a name"}), supernodes={"a name": ("1_4_1",)})
    path = save_graph(prune(named, 1.0, 1.0), tmp_path / "small.json", scan="gemma-2-2b")
    data = json.loads(path.read_text())
    assert set(data) == {"metadata", "qParams", "nodes", "links"}
    for wanted, given in ((METADATA, [data["metadata"]]), (NODE, data["nodes"]),
                          (LINK, data["links"])):  # fmt: skip
        for entry in given:
            assert {k: type(entry[k]) for k in wanted} == wanted
    assert data["metadata"]["node_threshold"] == 1.0 and data["metadata"]["slug"] == "small"
    names = [n["node_id"] for n in data["nodes"]]
    assert {link[end] for link in data["links"] for end in ("source", "target")} <= set(names)
    assert len({n["jsNodeId"] for n in data["nodes"]}) == 7
    feature, error, logit = (data["nodes"][i] for i in (4, 3, 5))
    assert feature["feature_type"] == "cross layer transcoder" and feature["clerp"] == "a name"
    assert feature["feature"] == 19 and feature["activation"] == 8.0  # (1 + 4)(6) / 2 + 4
    assert feature["influence"] == pytest.approx(189 / 128 / (65 / 32))
    assert error["feature_type"] == "mlp reconstruction error" and error["feature"] == -1
    assert logit["layer"] == "3" and logit["is_target_logit"] and logit["influence"] is None
    assert logit["clerp"] == 'Output " c" (p=0.600)'
    assert logit["token_prob"] == pytest.approx(0.6)
    assert data["qParams"]["supernodes"] == [["a name", "1_4_1"]]
    assert pair_number(0, 6200) == 19229300  # as a published graph has it


def test_a_saved_graph_comes_back(graph, tmp_path):
    named = replace(graph.label({(1, 4): "a name"}), supernodes={"a name": ("1_4_1",)})
    for one in (named, prune(named, 0.7, 0.9)):
        back = load_graph(save_graph(one, tmp_path / "graph.json"))
        assert back.nodes == one.nodes and torch.allclose(back.adjacency, one.adjacency)
        for field in ("bias", "values", "influence", "cumulative", "missing", "probabilities"):
            assert torch.allclose(getattr(back, field), getattr(one, field)), field
        for field in ("prompt", "tokens", "n_layers", "model", "target_names", "labels"):
            assert getattr(back, field) == getattr(one, field), field
        assert back.supernodes == one.supernodes and back.settings == one.settings
        assert graph_scores(back) == pytest.approx(graph_scores(one))


def theirs(error: str = "0_-1_1") -> dict:
    """A file with circuit-tracer's keys alone, nodes in its order (features, errors, embeddings,
    logits), 26 layers; error: the name of the first layer's error node at position 1."""

    def node(name, kind, layer, position, **others):
        return {"node_id": name, "feature": 1, "layer": layer, "ctx_idx": position, "clerp": "",
                "feature_type": kind, "token_prob": 0.0, "jsNodeId": name, "influence": 0.5,
                "activation": None} | others  # fmt: skip

    return {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", "1"],
                     "prompt": "1"},
        "qParams": {"pinnedIds": [], "supernodes": [["first", error]], "linkType": "both"},
        "nodes": [
            node("24_2394_1", "cross layer transcoder", "24", 1, activation=83.0),
            node("0_6200_1", "cross layer transcoder", "0", 1, activation=21.5),
            node(error, "mlp reconstruction error", "0", 1),
            node("E_2_0", "embedding", "E", 0),
            node("27_235310_1", "logit", "27", 1, token_prob=0.25, influence=None,
                 clerp='Output "4" (p=0.250)'),
        ],
        "links": [
            {"source": "E_2_0", "target": "0_6200_1", "weight": 24.5},
            {"source": "0_6200_1", "target": "24_2394_1", "weight": 5.0},
            {"source": error, "target": "24_2394_1", "weight": 5.0},
            {"source": "24_2394_1", "target": "27_235310_1", "weight": -2.0},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("error", ["0_-1_1", "0_0_1"])  # of circuit-tracer now, and of its 0.5.0
def test_a_graph_of_circuit_tracer_loads(tmp_path, error):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(theirs(error)))
    graph = load_graph(path)
    names = "E_2_0 0_6200_1 0_-1_1 24_2394_1 27_235310_1".split()
    assert [n.id for n in graph.nodes] == names and graph.n_layers == 26
    assert graph.influence.tolist() == pytest.approx([0.5, 0.5, 0.5, 1.0, 0.0])
    assert graph_scores(graph)[0] == pytest.approx(0.5)
    assert graph.value("24_2394_1") == 83.0 and graph.target_names == ("4",)
    assert graph.edge("0_-1_1", "24_2394_1") == 5.0
    assert graph.supernodes == {"first": ("0_-1_1",)}


def test_an_error_of_circuit_tracer_0_5_0_is_where_its_fields_say(tmp_path):
    """Its name "0_24_1" would be a feature of layer 0."""
    data = theirs()
    data["nodes"][2] |= {"node_id": "0_24_1", "layer": "24"}
    data["links"][2] |= {"source": "0_24_1", "target": "27_235310_1"}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(data))
    assert load_graph(path).edge("24_-1_1", "27_235310_1") == 5.0
    data["nodes"][1]["node_id"] = "0_24_1"  # and here a feature has that name, too
    data["links"] = data["links"][2:]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="several nodes of the name '0_24_1', so its links cannot"):
        load_graph(path)


def test_tokens_with_quotes_come_back(graph, tmp_path):
    named = replace(graph, target_names=('"', ' say "c" (p=1)')).label({"3_8_1": "rival"})
    back = load_graph(save_graph(named, tmp_path / "graph.json"))
    assert back.target_names == named.target_names and back.labels == {"3_8_1": "rival"}


def test_files_that_are_no_graphs(tmp_path):
    with pytest.raises(RunError, match="is missing"):
        load_graph(tmp_path / "no.json")
    bad = tmp_path / "bad.json"
    bad.write_text('{"nodes": []}')
    with pytest.raises(ValueError, match="lacks 'metadata'. An attribution graph has"):
        load_graph(bad)
    data = theirs()
    data["links"].append({"source": "0_7_1", "target": "27_235310_1", "weight": 1.0})
    bad.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="links the node '0_7_1', which it does not have"):
        load_graph(bad)
    data = theirs()
    data["nodes"][0]["layer"] = "26"
    bad.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="There is no node '26_2394_1': layers go from 0 to 25"):
        load_graph(bad)


# --------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def real():
    """tiny-gemma with random transcoders: many features, many edges."""
    torch.manual_seed(0)
    model = load_model("tiny-gemma")
    coders = [SparseCoder(144, 512, 144, k=8, seed=i) for i in range(6)]
    return model, coders, attribution_graph(model, coders, PROMPT)


def test_intervention_figure(real):
    model, coders, graph = real
    result = intervene(model, coders, PROMPT, {graph.features()[0]: -4})
    picture = intervention_figure(result, "off")
    names = [tick.get_text() for tick in picture.axes[0].get_yticklabels()]
    assert repr(result.top(1)[0][0]) in names
    assert render(picture)[:4] == b"\x89PNG"
