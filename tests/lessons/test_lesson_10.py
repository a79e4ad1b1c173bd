"""Lesson 10: what is written and its labels, forks and their ideal reader, controls, figures."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

from mi_helpers.course.answers import Wrong
from mi_helpers.course.exercise import declared
from mi_helpers.lessons.lesson_10 import exercises, figures, predictions, tools
from mi_helpers.lessons.lesson_10 import experiments as lab10
from mi_helpers.lessons.shared import documents_for, family_losses, shipped_model
from mi_helpers.plots import render
from mi_helpers.steering import Add, Clamp, Latent, steered
from mi_helpers.tinyworld.lexicon import topics
from mi_helpers.widgets import corners

SITE = ("resid_post", 3)


@pytest.fixture(scope="module")
def model():
    return shipped_model()


@pytest.fixture(scope="module")
def lab(model):
    return lab10.Lab(model, seed=3, n=5, answers=2)


@pytest.fixture(scope="module")
def bridge(model):
    coder = lab10.coder_of(model)
    return Latent(coder, lab10.latent_of(model, coder, lab10.BRIDGE))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- what is written, and its labels --------------------------------------------------------------


def test_words_have_the_topics_of_tinyworld():
    table = lab10.topics_of_words()
    assert lab10.BRIDGE in table["girders"] and lab10.BRIDGE in table["alcatraz"]
    assert {"birds", lab10.BRIDGE} <= table["crane"] and "the" not in table
    for topic in topics():
        for forms in (*topic.noun, *topic.verb):
            assert topic.key in table[lab10.words_of(forms[0])[0]]
    assert lab10.words_of('"The girder," says Åse, 3rd.') == ["the", "girder", "says", "åse", "rd"]


def test_a_topics_words_are_marked():
    said = lab10.marked("The girders, and the Girder of Rome.", lab10.BRIDGE)
    assert said == "The [[girders]], and the [[Girder]] of Rome."


def test_the_share_is_of_topical_words():
    table = {"crane": {"a", "b"}, "oak": {"b"}, "pier": {"a"}}
    texts = [["the", "crane", "oak"], ["pier", "pier", "of"], []]
    assert tools.share_about(texts, table, "a") == 3 / 4
    assert tools.share_about(texts, table, "b") == 2 / 4
    assert tools.share_about([["the"]], table, "a") == 0


def test_starts_are_beginnings_of_prose(model):
    found = lab10.starts(model, 6, 11, lab10.BRIDGE)
    assert found.shape == (6, lab10.LENGTH) and (found[:, 0] == found[0, 0]).all()
    whole = lab10.texts_about(lab10.BRIDGE, 40, 11)
    for row in found:
        text = model.tokenizer.decode(row[1:])
        assert any(each.startswith(text.strip()) for each in whole)
    assert not torch.equal(found, lab10.starts(model, 6, 12, lab10.BRIDGE))


def test_what_is_written_is_that_of_the_steered_model(model, lab):
    v = draw(model.d_model)
    plain = lab.write(6)
    assert torch.equal(plain, lab.write(6)) and torch.equal(plain[:, : lab10.LENGTH], lab.starts)
    assert torch.equal(lab.write(6, 2)[:, : lab10.LENGTH], lab.starts[:2])
    with steered(model, SITE, Add(v, 30.0)):
        pushed = lab.write(6)
        losses = family_losses(model, lab.batch)
        assert lab.by_family() == {k: losses[k] - lab.clean[k] for k in losses}
        assert lab.loss() == pytest.approx(np.mean(list(losses.values())))
    assert not torch.equal(pushed, plain) and lab.surprise(pushed) > lab.surprise(plain) + 1
    assert set(lab.by_family().values()) == {0.0}
    by_hand = [model.loss(row[None])[0, lab10.LENGTH - 1 :] for row in pushed]
    assert lab.surprise(pushed) == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-4)


def test_the_sampler_draws_from_the_logits():
    logits = torch.tensor([[0.0, 2.0, -1.0]]).expand(4_000, 3)
    drawn = lab10.sampler(5)(logits)
    assert torch.equal(drawn, lab10.sampler(5)(logits))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.03, rtol=0)


def test_the_bridges_latent_makes_the_model_write_about_it(model, lab, bridge):
    found = lab10.tried(lab, SITE, Clamp(bridge, lab10.HIGH), lab10.BRIDGE)
    plain = lab10.tried(lab, SITE, Add(bridge, 0.0), lab10.BRIDGE)
    assert found["share"] > 0.6 > 0.3 > plain["share"]
    assert found["cost"] > 0.2 and plain["cost"] == pytest.approx(0, abs=1e-4)
    shown = lab10.with_values(model, bridge, lab10.texts_about(lab10.BRIDGE, 1, 3)[0])
    assert shown.count("[") > 5 and "[" not in lab10.with_values(model, bridge, "Rome is in Italy.")


# -- forks ----------------------------------------------------------------------------------------


def test_a_forks_share_is_of_the_next_words_probabilities(model):
    fork = lab10.Fork(
        model, ["Rome is in", "The", "Rome is in"], ([7, 9], [11]), np.array([1, 0, 1])
    )
    for i, text in enumerate(fork.prompts):
        p = model(text)[0, -1].softmax(-1)
        want = float(p[[7, 9]].sum() / p[[7, 9, 11]].sum())
        assert fork.share()[i] == pytest.approx(want, rel=1e-4)
        assert fork.last(lambda ids: model(ids)[:, -1])[i] == pytest.approx(want, rel=1e-4)
        _, cache = model.run_with_cache(text, [SITE])
        torch.testing.assert_close(fork.stream(SITE)[i], cache[SITE][0, -1], atol=1e-4, rtol=1e-4)
    v, middle = fork.means(SITE)
    x = fork.stream(SITE)
    torch.testing.assert_close(v, x[[0, 2]].mean(0) - x[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(middle, (x[[0, 2]].mean(0) + x[1]) / 2, atol=1e-4, rtol=1e-4)


def test_statements_are_cut_before_their_verdict(model):
    fork = lab10.statements(model, 20, 3, ("entities",))
    assert fork.y.tolist() == [True] * 10 + [False] * 10
    words = {model.token_text(token).strip() for group in fork.groups for token in group}
    assert {"true", "false", "right", "wrong"} <= words
    assert not any(text.endswith((" true", " false")) for text in fork.prompts)


def test_verbs_are_cut_after_another_verb_has_shown_the_tense(model):
    fork = lab10.verbs(model, 30, 4)
    assert len(fork) == len(fork.y) == 30 and 0.2 < fork.y.mean() < 0.8
    share = fork.share()
    assert share[fork.y].mean() > 0.7 and share[~fork.y].mean() < 0.1


def test_the_ideal_reader_of_voices_follows_from_the_generator(model):
    """By Bayes over every document of many, not by its formula."""
    seen = documents_for("voice", 400, 8)
    after = {}
    for document in seen:
        spans = document.find("evaluation")
        for i in (1, 2):
            if len(spans) > i and spans[i].value != "neutral":
                said = tuple(sorted(s.value for s in spans[:i]))
                after.setdefault(said, []).append(spans[i].value == "praise")
    for said, values in after.items():
        if len(values) > 40:
            document = next(
                d
                for d in seen
                if len(d.find("evaluation")) > len(said)
                and tuple(sorted(s.value for s in d.find("evaluation")[: len(said)])) == said
            )
            end = document.find("evaluation")[len(said)].start - 1
            spread = 3 * np.sqrt(0.25 / len(values))
            assert lab10.praise_to_come(document, end) == pytest.approx(np.mean(values), abs=spread)
    fork, ideal = lab10.voices(model, 30, 3)
    assert len(fork) == len(ideal) == 30
    assert ideal[fork.y].mean() > 0.6 > 0.4 > ideal[~fork.y].mean()
    words = [{model.token_text(token).strip() for token in group} for group in fork.groups]
    assert "superb" in words[0] and not words[0] & words[1] and min(map(len, words)) > 30


def test_by_dose_steers_each_kind_of_text(model):
    fork = lab10.verbs(model, 12, 4)
    v = fork.means(SITE)[0]
    found = lab10.by_dose(fork, SITE, {"v": v}, (-1, 0))
    assert list(found) == [f"v, {kind}" for kind in lab10.KINDS]
    clean = fork.share()
    for name, mask in zip(found, (fork.y, ~fork.y), strict=True):
        assert found[name][1][1] == pytest.approx(clean[mask].mean(), abs=1e-5)
    with steered(model, SITE, Add(v, -1.0)):
        assert found[f"v, {lab10.KINDS[0]}"][1][0] == pytest.approx(
            fork.share()[fork.y].mean(), abs=1e-5
        )


def test_verdicts_follow_and_steps_are_as_long_as_the_mirrors(model):
    fork = lab10.statements(model, 40, 5)
    v, middle = fork.means(SITE)
    assert lab10.follows(fork, SITE, v) > 0.8 and abs(lab10.follows(fork, SITE, 1e-3 * v)) < 0.1
    ids = next(fork.by_length())[1]
    x = model.run_with_cache(ids, [SITE])[1][SITE][:, -1]
    for run in (tools.mirror, partial(lab10.same_steps, other=draw(model.d_model))):
        out = run(model, ids, SITE, v, middle)
        assert out.shape == (len(ids), model.d_vocab) and not model.hooked
    torch.testing.assert_close(
        lab10.same_steps(model, ids, SITE, v, middle, v), tools.mirror(model, ids, SITE, v, middle)
    )
    twice = x - 2 * ((x - middle) @ v / (v @ v))[:, None] * v
    torch.testing.assert_close((twice - middle) @ v, -(x - middle) @ v, atol=1e-2, rtol=1e-3)


# -- tools ----------------------------------------------------------------------------------------


def test_a_fair_control_is_free_of_the_direction_and_as_long():
    x, v = draw(60, 9) + 4, 3 * draw(9, seed=1)
    x += draw(60, 1, seed=2) * v
    found = tools.fair_control(draw(7, 60, seed=3), x, v)
    torch.testing.assert_close(found.norm(dim=1), v.norm().expand(7))
    assert (found @ v).abs().max() < 1e-3


def test_the_cost_at_an_effect_lies_between_two_doses():
    assert tools.cost_of(0.5, [0.1, 0.3, 0.7], [0.0, 1.0, 5.0]) == pytest.approx(3.0)
    assert tools.cost_of(0.9, [0.1, 0.3, 0.7], [0.0, 1.0, 5.0]) == float("inf")
    assert tools.cost_of(0.5, [0.1, 0.9, 0.2, 0.6], [0, 4, 5, 6]) == pytest.approx(2.0)


# -- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [lambda x: [x], lambda x: np.array([x])])
def test_a_cost_in_a_list_is_told_to_be_a_number(wrapped):
    with pytest.raises(Wrong, match="give one number"):
        exercises.check_106(lambda *given: wrapped(tools.cost_of(*given)))


def test_the_slider_draws_at_every_corner(lab, bridge):
    ways = {"clamped": partial(Clamp, bridge), "added": partial(Add, bridge)}
    response = np.array([[0.0, 0.0], [0.9, 1.0]])
    curves = {"clamped": ((0, 16), response), "random": ((0, 16), np.stack([response] * 2))}
    for drawn in (None, curves):
        slider = figures.Slider(lab, SITE, lab10.BRIDGE, ways, drawn, most=24.0, rows=2)
        for values in corners(dose=(0.0, 24.0), how=list(ways)):
            made = slider.figure(**values)
            assert render(made)[:4] == b"\x89PNG"
            assert made.get_size_inches()[1] * 70 < 600 and "The model writes:" in made.reading
    assert slider.figure(16.0, "clamped").reading.count("[[") > slider.figure(
        0.0, "added"
    ).reading.count("[[")
    for wrong in ({"dose": 99.0, "how": "added"}, {"dose": 1.0, "how": "sung"}):
        with pytest.raises(ValueError, match=r"out of range|There is no"):
            slider.figure(**wrong)


def test_families_are_drawn_dearest_first():
    costs = {"one": {"a": 0.1, "b": 2.0}, "two": {"a": 1.0, "b": 0.0}}
    made = figures.family_figure(costs)
    assert [each.get_text() for each in made.axes[0].get_xticklabels()] == ["b", "a"]


def test_a_fork_panel_has_the_ideal_reader():
    series = {"d, past": ((-1, 0, 1), (0.1, 0.5, 0.9)), "ideal reader": (0.8, 0.2)}
    made = figures.fork_panels({"voice": series}, "dose", "p")
    assert len(made.axes[0].get_lines()) == 4  # the line, two marks, the line at 0
    assert [t.get_text() for t in made.legends[0].get_texts()] == ["d, past"]


# -- the investigation ----------------------------------------------------------------------------


def test_the_drawn_topic_follows_its_number():
    drawn = {lab10.drawn_topic(number) for number in range(200)}
    assert drawn == {topic.key for topic in topics()} - {lab10.BRIDGE}
    assert lab10.drawn_topic(7) == lab10.drawn_topic(7)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("chess", "Give a topic, a layer and a steering"),
        (("alchemy", 3, Add(np.ones(144))), "none of the topics"),
        (("chess", 6, Add(np.ones(144))), "none of the layers"),
        (("chess", 3, np.ones(144)), "give Add, Clamp or Erase"),
        (("chess", 3, Add(np.ones(5))), "144"),
    ],
)
def test_what_is_no_answer_is_said(answer, said):
    with pytest.raises(Wrong, match=said):
        predictions.score_steering(answer)


def test_the_score_is_the_share_less_the_cost(lab, bridge):
    got = predictions.score_of(lab, lab10.BRIDGE, 3, Clamp(bridge, lab10.HIGH))
    found = lab10.tried(lab, SITE, Clamp(bridge, lab10.HIGH), lab10.BRIDGE)
    assert got == pytest.approx(found["share"] - found["cost"], abs=1e-5)


def test_the_lesson_declares_nine_exercises_within_an_hour():
    cards = declared(10, "exercise")
    assert len(cards) == 9 and sum(card.minutes for card in cards) <= 48
    assert sum("on_model" in inspect.getsource(card.check) for card in cards) >= 5
