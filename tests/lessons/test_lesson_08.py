"""Lesson 08: questions, labels, stories and controls, by hand, on random coders and tiny-gemma."""

import numpy as np
import pytest
import torch

from mi_helpers.circuits.graphs import (
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    Graph,
    Node,
)
from mi_helpers.circuits.interventions import predicted_effect
from mi_helpers.circuits.queries import qk_attribution
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.lessons.lesson_08 import controls, inquiry, looking, naming, prompts, stories
from mi_helpers.lessons.lesson_08 import experiments as lab
from mi_helpers.lessons.lesson_08 import figures as tracing_figures
from mi_helpers.loading import load_model
from mi_helpers.plots import render
from mi_helpers.saes.coder import SparseCoder
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
def steps(shipped, coders, reading):
    return stories.Steps(shipped, coders, reading)


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
    return graph


def test_worth_by_hand():
    graph = small_graph()
    own = lab.contributions(graph)
    # g: 5 - 1 = 4; f: 0.5 + 4 · 3/4 = 3.5; E: all of f; the error: 4 · 1/4
    assert own.tolist() == pytest.approx([3.5, 3.5, 1.0, 4.0, 0.0, 0.0])
    assert lab.logit_gap(graph) == 4.5


def test_worth_is_the_predicted_effect_of_taking_one_node_away(shipped, coders):
    q = prompts.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q)
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


def test_a_story_is_told_by_rule_and_tested(shipped, coders, steps):
    q = prompts.what_is_asked(shipped, 1, seed=0)[0]
    story = steps.story(q, "asked")
    assert set(story.nodes) == set(steps.nodes(steps.graph(q), q, "asked"))
    assert not set(story.null) & set(story.nodes) and len(story.null) <= len(story.nodes)
    outcomes = stories.try_story(shipped, coders, story)
    assert [o.what for o in outcomes] == list(stories.INTERVENTIONS)
    table = stories.outcome_table(outcomes)
    assert table.count("\n") == 2 and q.prompt in table
    assert q.prompt in stories.story_table([story])
    assert len(tracing_figures.prediction_figure({"a": outcomes, "b": outcomes}).axes) == 2
    seen = stories.share_of_gap(shipped, coders, [story], "suppress")
    assert seen == pytest.approx(outcomes[0].observed / story.gap)
    assert abs(controls.random_share(shipped, coders, [story])) < 10


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
    data = controls.singles(shipped, coders, asked, most=3, others=2)
    assert data.direct.shape == (5,)
    assert np.allclose(data.direct, data.held, atol=1e-3)
    assert -1 <= data.correlation() <= 1 and 0 <= data.right_sign(0.0) <= 1
    assert len(tracing_figures.singles_figure(data).axes) == 3


def test_the_explorer_draws_every_corner(shipped, coders, steps):
    q = prompts.what_is_asked(shipped, 1, seed=0)[0]
    told = {"a": steps.story(q, "asked"), "b": steps.story(q.turned(), "asked")}
    explorer = tracing_figures.InterventionExplorer(shipped, coders, told)
    sliders = {
        "story": list(told),
        "factor": (-2.0, 2.0, 0.5),
        "swap": False,
        "attention": ["frozen", "recomputed"],
    }
    for values in corners(**sliders):
        assert render(explorer(**values))[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="There is no story"):
        explorer("c")
    with pytest.raises(ValueError, match="at least one"):
        tracing_figures.InterventionExplorer(shipped, coders, {})


# -- controls ----------------------------------------------------------------------------------


def test_exchanged_decoders_keep_what_fires(coders):
    made = lab.shuffled(coders, 0)
    x = torch.randn(5, coders[0].d_in, generator=torch.Generator().manual_seed(0))
    for layer, a in enumerate(coders):
        b = made[layer]
        assert torch.equal(a.encode(x), b.encode(x)) and not torch.equal(a.W_dec, b.W_dec)
        assert torch.allclose(a.W_dec.sum(0), b.W_dec.sum(0), atol=1e-4)


def test_scores_of_graphs_and_controls(shipped, coders):
    table = lab.score_table(shipped, coders, prompts.questions(shipped, 1, seed=1))
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
    assert controls.attention_alone(shipped, alike) == pytest.approx(0.0, abs=1e-4)
    assert controls.attention_alone(shipped, q) != pytest.approx(0.0, abs=1e-4)


def test_the_opening_is_poland_for_spain(shipped):
    q = prompts.opening(shipped)
    assert (q.one.country, q.other.country) == ("Poland", "Spain")
    assert (q.answer, q.rival) == (" Warsaw", " Madrid")
    ids = shipped.tokens(q.prompt)[0]
    named = shipped.str_tokens(ids[: prompts.name_ends(shipped, q.one) + 1])
    assert "".join(named).endswith(q.one.subject)


def test_a_donor_may_ask_something_else_in_as_many_tokens(shipped):
    for q in prompts.paired(shipped, 4, seed=0):
        donor = prompts.other_question(shipped, q.other)
        assert donor.subject == q.other.subject and donor.kind != q.other.kind
        assert prompts.length_of(shipped, donor) == prompts.length_of(shipped, q.one)
    city = next(prompts.sentences("city"))
    assert prompts.other_question(shipped, city) is None


def test_donors_are_compared_on_the_same_questions(shipped, coders, steps):
    found = controls.donors(shipped, coders, steps, 2, seed=0)
    assert found.wins.shape == found.change.shape == (2, 2)
    assert all(0 <= share <= 1 for share in found.first())


def test_the_target_is_the_gap(shipped, coders):
    """The walk of exercise 8.7 over one target gives the library's prediction."""
    q = prompts.questions(shipped, 1, seed=3)[0]
    graph = lab.question_graph(shipped, coders, q)
    edges, values = lab.to_one_target(graph)
    assert edges.shape == (len(graph) - 1,) * 2 and values[-1] == pytest.approx(
        lab.logit_gap(graph)
    )
    off = [graph.index(node) for node in graph.features()[:3]]
    share = torch.zeros(len(values))
    for i in range(len(values)):
        change = edges[i] @ share
        share[i] = -1.0 if i in off else change / values[i]
    factors = {graph.nodes[i].id: 0.0 for i in off}
    assert float(change) == pytest.approx(
        lab.logit_gap(graph, predicted_effect(graph, factors)), rel=1e-2, abs=1e-3
    )


def test_the_strongest_hop_goes_to_the_next_layer_and_another_token(shipped, coders):
    graph = lab.question_graph(shipped, coders, prompts.opening(shipped))
    source, target = lab.strongest_hop(graph)
    assert target.layer == source.layer + 1 and target.position > source.position
    assert source.kind == target.kind == FEATURE
    assert abs(graph.edge(source, target)) > 0


# -- names ---------------------------------------------------------------------------------------


def test_what_tinyworld_says_of_a_token(shipped):
    (rows,) = naming.said_of(shipped, ["The capital of Poland is Warsaw."])
    poland, is_ = rows[3], rows[4]
    assert {"'Poland'", "after 'of'", "before 'is'", "a country"} <= poland
    assert {"before a capital", "after a country", "before 'Warsaw'"} <= is_


def test_names_are_of_the_text_and_every_feature_of_a_graph_gets_one(shipped, coders, reading):
    namer = naming.make_namer(shipped, coders, reading, each=3)
    assert namer.labels.n == len(namer.words) == len(namer.text)
    read = naming.read_texts(shipped, ["The cat sat.", "A dog"])
    alone = naming.read_texts(shipped, ["The cat sat."])
    assert torch.allclose(read[2][: len(alone[2])], alone[2], atol=1e-4)  # padding changes nothing
    graph = lab.question_graph(shipped, coders, prompts.opening(shipped))
    shares = naming.named_share(namer, graph)
    assert 0.5 < shares[0] <= 1 and 0 <= shares[1] <= shares[0]
    own, other = (naming.scores(namer, [graph], control) for control in (False, True))
    assert all(0 <= score <= 1 for score in own + other)
    node = graph.features()[0]
    for piece in namer.contexts(node.layer, node.index, 2):
        assert max(value for _, value in piece) > 0


# -- where a head looks ------------------------------------------------------------------------


def test_a_head_that_looks_after_the_earlier_copy(shipped):
    q = prompts.repeated(shipped, 1, seed=0)[0]
    layer, head, here, there = looking.where_it_looks(shipped, q.prompt)
    ids = shipped.tokens(q.prompt)[0]
    assert layer > 0 and ids[there - 1] == ids[here] and here == len(ids) - 1
    with pytest.raises(ValueError, match="does not come earlier"):
        looking.where_it_looks(shipped, "The cat")


def test_the_head_that_looks_at_what_is_named(shipped, coders, reading):
    q = prompts.opening(shipped)
    layer, head, here, there = looking.who_looks_at(shipped, q)
    token = shipped.str_tokens(shipped.tokens(q.prompt)[0])[there].strip()
    assert token in q.one.subject
    namer = naming.make_namer(shipped, coders, reading, each=1)
    said = looking.top_products(shipped, coders, namer, q.prompt, (layer, head, here, there))
    assert said.startswith(f"L{layer}H{head}") and "<bos>" not in said and said.count("\n") == 5


def test_the_map_of_products_leaves_out_biases_alone(shipped, coders):
    local = LocalReplacement(shipped, coders, prompts.opening(shipped).prompt)
    found = qk_attribution(local, 2, 1, 5, 3)
    picture = tracing_figures.qk_map(found, shipped.str_tokens(local.ids))
    table = picture.axes[0].images[0].get_array()
    inside = float(found.products[:-1, :-1].sum())
    assert float(table.sum()) == pytest.approx(inside, rel=1e-3, abs=1e-3)


# -- the investigation -------------------------------------------------------------------------


def test_a_story_is_scored_on_three_interventions(shipped, coders):
    found = inquiry.Inquiry(shipped, coders, prompts.untold(shipped))
    lost, turned, kept = found.shares([])
    assert (lost, turned, kept) == (0.0, 0.0, 1.0)
    every = found.shares(found.every)
    assert all(0 <= share <= 1 for share in every)
    some = found.every[:5]
    assert found.score(some) == pytest.approx(min(found.shares(some)) - 5 * inquiry.PRICE)
    taken = {found.question.one.country, found.question.other.country}
    assert len(found.elsewhere) == inquiry.ELSEWHERE
    assert not any({q.one.country, q.other.country} & taken for q, _ in found.elsewhere)
    assert prompts.unseen(found.question.one)
