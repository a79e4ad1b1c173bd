"""Lesson 08: questions, labels, stories and controls, by hand, on random coders and tiny-gemma."""

import numpy as np
import pytest
import torch

from mi_helpers import tracing_lab as lab
from mi_helpers.circuits import LocalReplacement, attribution_graph
from mi_helpers.coders import SparseCoder
from mi_helpers.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Node,
    group_by_label,
    make_graph,
    predicted_effect,
)
from mi_helpers.models import load_model
from mi_helpers.tinyworld import lexicon


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


@pytest.fixture(scope="module")
def coders(shipped):
    """Random ones: what is tested here holds for any."""
    d = shipped.d_model
    return [SparseCoder(d, 200, d, k=8, seed=i) for i in range(shipped.n_layers)]


@pytest.fixture(scope="module")
def labels(shipped, coders):
    return lab.latent_labels(shipped, coders, lab.read_sentences(shipped, 30))


# -- the toy -----------------------------------------------------------------------------------


def test_the_toy_by_hand():
    """Position 1 embeds as (1, 7), of root mean square 5: the MLP writes 0.2 · 1.4 = 0.28, the
    latent has 0.2 + 0.5 · 1.4 = 0.9 and writes 0.45, so that the error is -0.17."""
    model, coders = lab.toy()
    local = LocalReplacement(model, coders, [0, 1])
    assert torch.allclose(local.mlp_out[0], torch.tensor([[0, 1.0], [0, 0.28]]), atol=1e-5)
    assert torch.allclose(local.errors[0], torch.tensor([[0, 0.25], [0, -0.17]]), atol=1e-5)
    graph = attribution_graph(model, coders, [0, 1], targets=[0, 1])
    assert graph.value("0_0_1") == pytest.approx(0.9, abs=1e-5)
    assert graph.edge("E_1_1", "0_0_1") == pytest.approx(0.9, abs=1e-5)
    assert graph.edge_error.absolute < 1e-5
    # layer 1's latent at position 1 looks at both positions, through attention
    assert abs(graph.edge("0_0_0", "1_0_1")) > 0.01


# -- questions ---------------------------------------------------------------------------------


def test_questions_are_answered_rightly(shipped):
    asked = lab.questions(shipped, 14, seed=0)
    assert [q.kind for q in asked] == 2 * list(lab.KINDS)
    place = {mark.name: mark for mark in lexicon.landmarks()}
    for q in asked:
        assert q.answer != q.rival and q.country != q.rival_country
        assert shipped.tokens(q.prompt).shape == shipped.tokens(q.partner).shape
        for prompt, answer in ((q.prompt, q.answer), (q.partner, q.rival)):
            assert int(shipped(prompt)[0, -1].argmax()) == shipped.to_single_token(answer)
        if q.subject in place:
            assert place[q.subject].country == q.country
        if q.kind == "two-hop capital":
            assert place[q.subject].city != q.answer.strip()
        assert q.turned().turned() == q and q.turned().answer == q.rival
    assert asked == lab.questions(shipped, 14, seed=0) != lab.questions(shipped, 14, seed=1)
    with pytest.raises(ValueError, match="no kind"):
        lab.questions(shipped, 2, seed=0, kinds=["rivers"])


def test_the_model_knows_both_hops(shipped):
    share = lab.accuracy(shipped)
    assert set(share) == set(lab.KINDS)
    assert all(value > 0.85 for value in share.values()), share


def test_unseen_pairs_are_those_that_training_left_out():
    seen = [lab.unseen("two-hop language", mark.name) for mark in lexicon.landmarks()]
    assert 0.1 < np.mean(seen) < 0.4
    assert not any(lab.unseen("city", mark.name) for mark in lexicon.landmarks())


# -- labels ------------------------------------------------------------------------------------


def test_what_is_true_at_each_token(shipped):
    asked = next(s for s in lab._sentences("two-hop language") if s.subject == "Eiffel Tower")
    said = lab._truth(shipped, "two-hop language", asked)
    tokens = shipped.str_tokens(shipped._encode(asked.prompt))
    assert len(said) == len(tokens) and "asks for language" in said[-1]
    about = ["France" in here for here in said]
    assert about == [False] * about.index(True) + [True] * (len(said) - about.index(True))
    assert "".join(tokens[: about.index(True) + 1]).strip().endswith("Eiffel Tower")
    assert "'near'" in said[tokens.index(" near")]


def test_a_label_is_the_rarest_concept_that_accounts_for_enough(shipped):
    """Three latents, made to fire at: France and 'speak'; France's half of 'is'; everywhere."""
    d, n = shipped.d_model, shipped.n_layers
    x = torch.zeros(8, d)
    x[[0, 1, 4, 5], 0] = 1.0  # latent 0: rows 0, 1, 4, 5
    x[[2, 6], 1] = 1.0  # latent 1: rows 2 and 6
    x[:, 2] = 1.0  # latent 2: all rows
    rows = lambda *on: np.isin(np.arange(8), on)  # noqa: E731
    concepts = {"France": rows(0, 1, 4, 5), "'speak'": rows(1, 2, 3, 5, 6, 7), "'is'": rows(2, 6)}
    reading = lab.Reading({layer: x for layer in range(n)}, concepts, 4)
    coder = SparseCoder(d, 3, d, "relu")
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_enc[:3, :3] = torch.eye(3)
        coder.W_dec.copy_(shipped.W_U[:, [7, 8, 9]].T)
    labels = lab.latent_labels(shipped, {0: coder}, reading)
    assert labels[0, 0] == "France" and labels[0, 1] == "'is'"
    # latent 2 is shared by France and 'speak'; France is the rarer one
    assert labels[0, 2] == "France"
    nothing = lab.Reading(reading.mlp_in, {"'is'": rows(2, 6)}, 4)
    assert lab.latent_labels(shipped, {0: coder}, nothing)[0, 2].startswith("→ ")


# -- worth -------------------------------------------------------------------------------------


def small_graph():
    """Two features in a chain: E -2-> f (value 2) -3-> g (value 4) -> logits 5 and 1."""
    nodes = [
        Node(EMBEDDING, -1, 0, 4),
        Node(FEATURE, 0, 0, 1),
        Node(ERROR, 0, 0),
        Node(FEATURE, 1, 0, 2),
        Node(LOGIT, 2, 0, 9),
        Node(LOGIT, 2, 0, 8),
    ]
    A = torch.zeros(6, 6)
    A[1, 0], A[3, 1], A[3, 2] = 2.0, 3.0, 1.0
    A[4, 3], A[5, 3], A[4, 1] = 5.0, 1.0, 0.5
    values = torch.tensor([1.0, 2.0, 1.0, 4.0, 5.5, 1.0])
    p = torch.tensor([0.9, 0.1])
    graph = make_graph("a", ["a"], nodes, A, torch.zeros(6), values, p, 2, target_names=("x", "y"))
    return group_by_label(graph.label({"0_1_0": "first", "1_2_0": "second"}))


def test_worth_by_hand():
    graph = small_graph()
    own = lab.worth(graph)
    # g: 5 - 1 = 4; f: 0.5 + 4 · 3/4 = 3.5; E: all of f; the error: 4 · 1/4
    assert own.tolist() == pytest.approx([3.5, 3.5, 1.0, 4.0, 0.0, 0.0])
    assert lab.logit_gap(graph) == 4.5
    assert lab.by_label(graph) == pytest.approx({"second": 4.0, "first": 3.5})
    assert lab.worth_by_kind(graph)[ERROR] == pytest.approx(1 / 4.5)


def test_worth_is_the_predicted_effect_of_taking_one_node_away(shipped, coders, labels):
    q = lab.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q, labels)
    own = lab.worth(graph)
    for node in graph.features()[:3]:
        lost = lab.logit_gap(graph, predicted_effect(graph, {node: 0.0}))
        assert lost == pytest.approx(-float(own[graph.index(node)]), rel=1e-3, abs=1e-4)


def test_worth_and_biases_make_up_the_gap(shipped, coders):
    q = lab.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q)
    a, b = graph.mask(LOGIT).nonzero()[:, 0].tolist()
    gap = float(graph.adjacency[a].sum() - graph.adjacency[b].sum() + graph.bias[a] - graph.bias[b])
    assert gap == pytest.approx(lab.logit_gap(graph), abs=1e-3)


# -- stories -----------------------------------------------------------------------------------


def test_a_story_is_told_by_rule_and_tested(shipped, coders, labels):
    q = lab.questions(shipped, 1, seed=1, kinds=["capital"])[0]
    story = lab.tell(shipped, coders, q, labels)
    graph = lab.question_graph(shipped, coders, q, labels)
    sums = lab.by_label(graph)
    assert sums[story.label] == max(sums.values())
    assert set(story.nodes) == set(graph.supernodes[story.label])
    assert not set(story.null) & set(story.nodes) and len(story.null) <= len(story.nodes)
    assert not set(story.into) & set(story.nodes)
    outcomes = lab.try_story(shipped, coders, story)
    assert [o.what for o in outcomes] == list(lab.INTERVENTIONS)
    table = lab.outcome_table(outcomes)
    assert table.count("\n") == 4 and q.prompt in table
    assert sum(right for right, _ in lab.hits(outcomes).values()) == sum(o.hit for o in outcomes)


def test_verdicts_can_go_both_ways(shipped):
    q = lab.questions(shipped, 1, seed=1, kinds=["capital"])[0]
    story = lab.Story(q, "x", ("0_1_1",), {}, (), gap=10.0, suppress=-4.0, swap=-12.0)
    assert story.flips
    assert lab.verdict(story, "suppress", -3.0) and not lab.verdict(story, "suppress", -0.5)
    assert not lab.verdict(story, "suppress", 3.0)
    assert lab.verdict(story, "swap", -11.0) and not lab.verdict(story, "swap", -9.0)
    assert lab.verdict(story, "null", 0.9) and not lab.verdict(story, "null", -1.1)
    with pytest.raises(ValueError, match="An intervention is one of"):
        lab.changes(story, "shake")


def test_no_country_no_story(shipped, coders):
    q = lab.questions(shipped, 1, seed=1, kinds=["capital"])[0]
    with pytest.raises(ValueError, match="is called"):
        lab.tell(shipped, coders, q, {(0, 0): "nothing"}, country=True)


# -- controls ----------------------------------------------------------------------------------


def test_exchanged_decoders_keep_what_fires(coders):
    made = lab.shuffled(coders, 0)
    x = torch.randn(5, coders[0].d_in, generator=torch.Generator().manual_seed(0))
    for a, b in zip(coders, made, strict=True):
        assert torch.equal(a.encode(x), b.encode(x)) and not torch.equal(a.W_dec, b.W_dec)
        assert torch.allclose(a.W_dec.sum(0), b.W_dec.sum(0), atol=1e-4)


def test_scores_of_graphs_and_controls(shipped, coders):
    table = lab.score_table(shipped, coders, [lab.questions(shipped, 1, seed=1)[0].prompt])
    assert tuple(table) == lab.CONDITIONS
    assert all(((v >= 0) & (v <= 1)).all() and v.shape == (1, 2) for v in table.values())
    lab.score_figure(table)


def test_the_partners_attention_changes_the_answer_by_what_it_is_measured(shipped):
    q = lab.questions(shipped, 1, seed=1, kinds=["city"])[0]
    alike = lab.Question(**{**vars(q), "partner": q.prompt})
    assert lab.attention_alone(shipped, alike) == pytest.approx(0.0, abs=1e-4)
    assert lab.attention_alone(shipped, q) != pytest.approx(0.0, abs=1e-4)
