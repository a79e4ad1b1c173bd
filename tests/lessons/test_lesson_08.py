"""Lesson 08: questions, labels, stories and controls, by hand, on random coders and tiny-gemma."""

import numpy as np
import pytest
import torch

from mi_helpers.circuits.edges import attribution_graph
from mi_helpers.circuits.figures import GraphExplorer
from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    Node,
    group_by_label,
)
from mi_helpers.circuits.interventions import predicted_effect
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.lessons.lesson_08 import experiments as lab
from mi_helpers.lessons.lesson_08 import figures as tracing_figures
from mi_helpers.lessons.lesson_08 import prompts, stories
from mi_helpers.loading import load_model
from mi_helpers.plots import render
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.transcoders import coders_for
from mi_helpers.tinyworld import lexicon
from mi_helpers.widgets import corners


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


@pytest.fixture(scope="module")
def coders(shipped):
    """Random ones: what is tested here holds for any."""
    d = shipped.d_model
    return [SparseCoder(d, 200, d, k=8, seed=i) for i in range(shipped.n_layers)]


@pytest.fixture(scope="module")
def reading(shipped):
    return lab.read_sentences(shipped, 30)


@pytest.fixture(scope="module")
def labels(shipped, coders, reading):
    return lab.latent_labels(shipped, coders, reading)


@pytest.fixture(scope="module")
def steps(shipped, coders, reading):
    return stories.Steps(shipped, coders, reading)


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
    asked = prompts.questions(shipped, 14, seed=0)
    assert [q.one.kind for q in asked] == 2 * list(prompts.KINDS)
    place = {mark.name: mark for mark in lexicon.landmarks()}
    for q in asked + prompts.what_is_asked(shipped, 6, seed=0):
        assert q.answer != q.rival and q.answer.startswith(" ")
        assert shipped.tokens(q.prompt).shape == shipped.tokens(q.other.prompt).shape
        for each in (q.one, q.other):
            said = int(shipped(each.prompt)[0, -1].argmax())
            assert said == shipped.to_single_token(f" {each.answer}")
        if q.one.subject in place:
            assert place[q.one.subject].country == q.one.country
        if q.one.kind == "two-hop capital":
            assert place[q.one.subject].city != q.one.answer
        assert q.turned().turned() == q and q.turned().answer == q.rival
    assert all(q.one.country != q.other.country for q in asked)
    assert asked == prompts.questions(shipped, 14, seed=0) != prompts.questions(shipped, 14, seed=1)
    with pytest.raises(ValueError, match="no kind"):
        prompts.questions(shipped, 2, seed=0, kinds=["rivers"])


def test_the_partner_may_ask_for_something_else(shipped):
    for q in prompts.what_is_asked(shipped, 6, seed=0):
        assert q.one.subject == q.other.subject and q.one.asks != q.other.asks


def test_the_model_knows_both_hops(shipped):
    share = prompts.accuracy(shipped)
    assert set(share) == set(prompts.KINDS)
    assert all(value > 0.85 for value in share.values()), share


def test_unseen_pairs_are_those_that_training_left_out(shipped):
    seen = [prompts.unseen(asked) for asked in prompts.sentences("two-hop language")]
    assert 0.1 < np.mean(seen) < 0.4
    assert not any(prompts.unseen(asked) for asked in prompts.sentences("city"))
    assert all(prompts.unseen(q.one) for q in prompts.unseen_hops(shipped, 3, seed=0))


# -- labels ------------------------------------------------------------------------------------


def test_what_is_true_at_each_token(shipped):
    asked = next(s for s in prompts.sentences("two-hop currency") if s.subject == "Eiffel Tower")
    said = lab._truth(shipped, asked)
    tokens = shipped.str_tokens(shipped.tokens(asked.prompt)[0, 1:])
    assert len(said) == len(tokens) and "asks for currency" in said[-1]
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
    asked = [next(prompts.sentences("city"))] * 8
    reading = lab.Reading({layer: x for layer in range(n)}, concepts, 4, asked)
    coder = SparseCoder(d, 3, d, "relu")
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_enc[:3, :3] = torch.eye(3)
        ids = [7, 8, shipped.to_single_token(" Paris")]
        coder.W_dec.copy_(shipped.W_U[:, ids].T)
    labels = lab.latent_labels(shipped, {0: coder}, reading)
    assert labels[0, 0] == "France" and labels[0, 1] == "'is'"
    # latent 2 is shared by France and 'speak'; France is the rarer one
    assert labels[0, 2] == "France"
    nothing = lab.Reading(reading.mlp_in, {"'is'": rows(2, 6)}, 4, asked)
    assert lab.latent_labels(shipped, {0: coder}, nothing)[0, 2] == "→ Paris"


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
    graph = Graph(
        "a", ("a",), tuple(nodes), A, torch.zeros(6), values, p, 2, target_names=("x", "y")
    )
    return group_by_label(graph.label({"0_1_0": "first", "1_2_0": "second"}))


def test_worth_by_hand():
    graph = small_graph()
    own = lab.contributions(graph)
    # g: 5 - 1 = 4; f: 0.5 + 4 · 3/4 = 3.5; E: all of f; the error: 4 · 1/4
    assert own.tolist() == pytest.approx([3.5, 3.5, 1.0, 4.0, 0.0, 0.0])
    assert lab.logit_gap(graph) == 4.5
    assert lab.by_label(graph) == pytest.approx({"second": 4.0, "first": 3.5})
    assert lab.shares_by_kind(graph)[ERROR] == pytest.approx(1 / 4.5)


def test_worth_is_the_predicted_effect_of_taking_one_node_away(shipped, coders, labels):
    q = prompts.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q, labels)
    own = lab.contributions(graph)
    for node in graph.features()[:3]:
        lost = lab.logit_gap(graph, predicted_effect(graph, {node: 0.0}))
        assert lost == pytest.approx(-float(own[graph.index(node)]), rel=1e-3, abs=1e-4)


def test_worth_and_biases_make_up_the_gap(shipped, coders):
    q = prompts.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q)
    a, b = graph.mask(LOGIT).nonzero()[:, 0].tolist()
    gap = float(graph.adjacency[a].sum() - graph.adjacency[b].sum() + graph.bias[a] - graph.bias[b])
    assert gap == pytest.approx(lab.logit_gap(graph), abs=1e-3)


# -- steps -------------------------------------------------------------------------------------


def test_a_step_is_judged_by_sentences_that_share_nothing_else(shipped):
    """Rows are six sentences' tokens; latents fire where their name says."""
    asked = {
        "mine": prompts.Asked("capital", "", "Eiffel Tower", "France", ""),
        "same": prompts.Asked("capital", "", "Louvre", "France", ""),
        "other": prompts.Asked("language", "", "Louvre", "France", ""),
        "rome": prompts.Asked("capital", "", "Colosseum", "Italy", ""),
        "speak": prompts.Asked("language", "", "Colosseum", "Italy", ""),
    }
    rows = [asked[name] for name in ("mine", "same", "other", *["rome"] * 4, *["speak"] * 20)]
    fires = {  # latent -> the sentences at which it fires
        0: ("mine",),
        1: ("mine", "same"),
        2: ("other",),
        3: ("rome",),
        4: ("mine", "same", "other", "rome", "speak"),
    }
    x = torch.zeros(len(rows), shipped.d_model)
    for j, names in fires.items():
        for i, row in enumerate(rows):
            x[i, j] = float(any(row is asked[name] for name in names))
    coder = SparseCoder(shipped.d_model, 5, shipped.d_model, "relu")
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.W_enc[:5, :5] = torch.eye(5)
    concepts = {
        "France": np.array([row.country == "France" for row in rows]),
        "asks for capital": np.array([row.kind == "capital" for row in rows]),
    }
    reading = lab.Reading({0: x}, concepts, 8, rows)
    steps = stories.Steps(shipped, {0: coder}, reading)
    q = prompts.Question(asked["mine"], asked["rome"])
    assert steps.latents(q, "country") == {(0, 2)}
    assert steps.latents(q, "pair") == {(0, 1)}
    assert steps.latents(q, "country or pair") == {(0, 1), (0, 2)}
    # of the 24 rows about other countries, 4 ask for a capital: a lift of 6 for latent 3
    assert steps.latents(q, "asked") == {(0, 3)}
    with pytest.raises(ValueError, match="A step is one of"):
        steps.latents(q, "city")
    with pytest.raises(ValueError, match="No sentence"):
        steps.latents(q.turned(), "country")


def test_supernodes_of_steps_share_no_node_and_places_sum_up(shipped, coders, steps):
    q = prompts.questions(shipped, 1, seed=1, kinds=["two-hop capital"])[0]
    graph = steps.supernodes(lab.question_graph(shipped, coders, q), q)
    names = [name for ids in graph.supernodes.values() for name in ids]
    assert names and len(set(names)) == len(names)
    where, own = steps.share_map(graph, q, "asked"), lab.contributions(graph)
    mine = sum(float(own[graph.index(n)]) for n in steps.nodes(graph, q, "asked"))
    assert where.shape == (shipped.n_layers, len(graph.tokens))
    assert where.sum() == pytest.approx(mine / lab.logit_gap(graph), rel=1e-3, abs=1e-4)


# -- stories -----------------------------------------------------------------------------------


def test_a_story_is_told_by_rule_and_tested(shipped, coders, labels):
    q = prompts.questions(shipped, 1, seed=1, kinds=["capital"])[0]
    story = stories.label_story(shipped, coders, q, labels)
    graph = lab.question_graph(shipped, coders, q, labels)
    sums = lab.by_label(graph)
    label = story.step.removeprefix("label ")
    assert sums[label] == max(sums.values())
    assert set(story.nodes) == set(graph.supernodes[label])
    assert not set(story.null) & set(story.nodes) and len(story.null) <= len(story.nodes)
    outcomes = stories.try_story(shipped, coders, story)
    assert [o.what for o in outcomes] == list(stories.INTERVENTIONS)
    table = stories.outcome_table(outcomes)
    assert table.count("\n") == 2 and q.prompt in table
    assert q.prompt in stories.story_table([story])
    assert sum(right for right, _ in stories.hits(outcomes).values()) == sum(
        o.hit for o in outcomes
    )
    with pytest.raises(ValueError, match="No feature"):
        stories.label_story(shipped, coders, q, {(0, -1): "nothing"})
    assert stories.hit_table({"a": outcomes}).count("\n") == 2
    assert len(tracing_figures.prediction_figure({"a": outcomes, "b": outcomes}).axes) == 2
    seen = stories.share_of_gap(shipped, coders, [story], "suppress")
    assert seen == pytest.approx(outcomes[0].observed / story.gap)
    assert abs(stories.random_share(shipped, coders, [story])) < 10


def test_a_control_stands_where_the_features_stand(shipped, coders, steps):
    """At another position a feature may be one that nothing at the last token reads."""
    q = prompts.unseen_hops(shipped, 1, seed=0)[0]
    graph = steps.graph(q)
    nodes = steps.nodes(graph, q, "country")
    chosen = stories.matched_features(graph, nodes)
    assert len(set(chosen)) == len(nodes) and not set(chosen) & set(nodes)
    where = lambda ids: [graph.nodes[graph.index(i)] for i in ids]  # noqa: E731
    own, other = where(nodes), where(chosen)
    left = {node.id for node in graph.features()} - set(nodes)
    assert any(node.position == len(graph.tokens) - 1 for node in own)
    for node, control in zip(own, other, strict=True):
        here = [n for n in where(left) if (n.layer, n.position) == (node.layer, node.position)]
        assert control.layer == node.layer and (control.position == node.position or not here)
        left.discard(control.id)


def test_a_swap_gives_shared_features_the_partners_activation(shipped, coders, steps):
    q = prompts.what_is_asked(shipped, 1, seed=0)[0]
    story = steps.story(q, "asked")
    factors, values = stories.changes(story, "swap")
    assert values == story.into and not set(factors) & set(values)
    assert set(factors) == set(story.nodes) - set(values)
    assert set(stories.changes(story, "suppress")[0]) == set(story.nodes)


def test_verdicts_can_go_both_ways(shipped):
    q = prompts.questions(shipped, 1, seed=1, kinds=["capital"])[0]
    story = stories.Story(q, "x", ("0_1_1",), {}, (), gap=10.0, suppress=-4.0, swap=-12.0)
    assert story.flips
    right = lambda what, seen: stories.is_hit(story, what, seen, -3.0)  # noqa: E731
    assert right("suppress", -3.0) and not right("suppress", -0.5)
    assert not right("suppress", 3.0)
    assert right("swap", -11.0) and not right("swap", -9.0)
    assert not stories.is_hit(story, "swap", -11.0, -10.5)  # the partner's features did nothing
    assert right("null", 0.9) and not right("null", -1.1)
    with pytest.raises(ValueError, match="An intervention is one of"):
        stories.changes(story, "shake")


def test_single_features_obey_their_edges_where_all_else_is_held(shipped, coders):
    asked = prompts.questions(shipped, 1, seed=2)
    data = stories.singles(shipped, coders, asked, most=3, others=2)
    assert data.direct.shape == (5,)
    assert np.allclose(data.direct, data.held, atol=1e-3)
    assert -1 <= data.correlation() <= 1 and 0 <= data.right_sign(0.0) <= 1
    assert len(tracing_figures.singles_figure(data).axes) == 3


def test_the_explorer_draws_every_corner(shipped, coders, steps):
    q = prompts.what_is_asked(shipped, 1, seed=0)[0]
    told = {"a": steps.story(q, "asked"), "b": steps.story(q.turned(), "asked")}
    explorer = tracing_figures.InterventionExplorer(shipped, coders, told)
    controls = {
        "story": list(told),
        "factor": (-2.0, 2.0, 0.5),
        "swap": False,
        "attention": ["frozen", "recomputed"],
    }
    for values in corners(**controls):
        assert render(explorer(**values))[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="There is no story"):
        explorer("c")
    with pytest.raises(ValueError, match="at least one"):
        tracing_figures.InterventionExplorer(shipped, coders, {})


def test_the_viewer_of_the_lesson_draws_or_says_why_not(shipped):
    coders = coders_for(shipped, range(shipped.n_layers))
    q = prompts.unseen_hops(shipped, 1, seed=0)[0]
    viewer = GraphExplorer({"a": lab.question_graph(shipped, coders, q)}, most_edges=150)
    thresholds = {"node_threshold": (0.1, 0.95, 0.05), "edge_threshold": (0.5, 0.99, 0.01)}
    drawn = 0
    for values in corners(prompt=["a"], **thresholds):
        try:
            drawn += render(viewer(**values))[:4] == b"\x89PNG"
        except ValueError as error:
            assert "no feature is left" in str(error)
    assert drawn >= 3 and viewer("a", 0.65, 0.9)


# -- controls ----------------------------------------------------------------------------------


def test_exchanged_decoders_keep_what_fires(coders):
    made = lab.shuffled(coders, 0)
    x = torch.randn(5, coders[0].d_in, generator=torch.Generator().manual_seed(0))
    for layer, a in enumerate(coders):
        b = made[layer]
        assert torch.equal(a.encode(x), b.encode(x)) and not torch.equal(a.W_dec, b.W_dec)
        assert torch.allclose(a.W_dec.sum(0), b.W_dec.sum(0), atol=1e-4)


def test_scores_of_graphs_and_controls(shipped, coders):
    graph = lab.question_graph(shipped, coders, prompts.questions(shipped, 1, seed=1)[0])
    table = lab.score_table(shipped, coders, [graph])
    assert tuple(table) == lab.CONDITIONS
    assert all(((v >= 0) & (v <= 1)).all() and v.shape == (1, 2) for v in table.values())
    assert len(tracing_figures.score_figure(table).axes) == 2


def test_repeated_words_are_questions_too(shipped):
    made = prompts.repeated(shipped, 2, seed=0)
    assert len(made) == 2
    for q in made:
        words = q.prompt.split()
        assert words.index(q.one.answer) == words.index(words[-1]) + 1
        assert shipped.tokens(q.prompt).shape == shipped.tokens(q.other.prompt).shape


def test_the_partners_attention_changes_the_answer_by_what_it_is_measured(shipped):
    q = prompts.questions(shipped, 1, seed=1, kinds=["city"])[0]
    alike = prompts.Question(q.one, prompts.Asked("city", q.prompt, "", "", q.other.answer))
    assert stories.attention_alone(shipped, alike) == pytest.approx(0.0, abs=1e-4)
    assert stories.attention_alone(shipped, q) != pytest.approx(0.0, abs=1e-4)
