"""Names of latents: chosen on one half of some tokens, scored on the other, by hand."""

import numpy as np
import pytest

from mi_helpers.circuits.graphs import FEATURE, Node
from mi_helpers.circuits.names import Labels, Name, Namer
from mi_helpers.saes.scores import Fired, f1


def made(*firing: tuple[int, ...], words: str = "ababcbab" * 10):
    """A namer of one layer over tokens, each labelled with its letter; latent j fires at the
    tokens of firing[j]."""
    f = np.zeros((len(words), len(firing)), dtype=np.float32)
    for j, some in enumerate(firing):
        f[list(some), j] = np.arange(1, len(some) + 1)
    text = [i // 8 for i in range(len(words))]
    return Namer({0: Fired.of(f)}, Labels.of([{each} for each in words]), list(words), text)


def at(letter: str) -> tuple[int, ...]:
    return tuple(i for i, each in enumerate("ababcbab" * 10) if each == letter)


def test_f1_is_of_firings_and_labels():
    fires, truth = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert f1(fires, truth) == pytest.approx(2 * 1 / (2 + 3))
    assert f1(np.zeros(3, bool), np.zeros(3, bool)) == 0.0


def test_firings_are_those_of_the_dense_table():
    f = np.maximum(np.random.default_rng(0).normal(size=(7, 5)) - 0.5, 0)
    fired = Fired.of(f)
    for j in range(5):
        tokens, values = fired.at(j)
        assert tokens.tolist() == np.flatnonzero(f[:, j]).tolist()
        assert values.tolist() == f[tokens, j].tolist()
        assert fired.mask(j).tolist() == (f[:, j] > 0).tolist()


def test_a_name_is_one_label_or_several_and_perfect_where_it_fits():
    namer = made(at("a"), at("a") + at("c"))
    one, two = namer.name(0, 0), namer.name(0, 1)
    assert (one.text, one.f1, one.precision, one.recall) == ("a", 1.0, 1.0, 1.0)
    assert two.text == "a or c" and two.f1 == 1.0
    rate = 4 / 8
    assert two.chance == pytest.approx(2 * rate / (1 + rate))
    assert str(one) == "a 1.00" and one.good


def test_the_score_is_of_the_half_that_the_name_was_not_chosen_on():
    first, second = at("a")[:15], at("b")[20:]  # at a in the first half, at b in the second
    name = made(first + second).name(0, 0)
    assert name.text == "a" and name.f1 == 0.0 and str(name) == "a? 0.00"


def test_what_fires_too_rarely_has_no_name():
    assert made((0, 2, 60)).name(0, 0) is None
    assert made(at("a")[:15]).name(0, 0) is None  # never in the second half


def test_another_latents_name_scores_as_it_predicts():
    namer = made(at("a"), at("b"))
    assert namer.score(0, 0, namer.name(0, 1)) == 0.0
    assert namer.score(0, 0, namer.name(0, 0)) == namer.name(0, 0).f1


def test_contexts_begin_with_the_strongest_and_stay_within_their_text():
    namer = made(at("c"))
    strongest, second = namer.contexts(0, 0, k=2, around=3)
    assert [word for word, _ in strongest] == list("babcb")
    assert [value for _, value in strongest] == [0, 0, 0, 10, 0]
    assert max(value for _, value in second) == 9.0
    assert namer.contexts(0, 0, k=1, around=30)[0][0][0] == "a"  # not the text before


def test_labels_and_tokens_have_to_be_of_the_same_text():
    with pytest.raises(ValueError, match="give the same text to both"):
        Namer({0: Fired.of(np.zeros((3, 2)))}, Labels.of([{"a"}]))


def test_a_graph_gets_names_with_scores():
    class Small:
        nodes = (Node(FEATURE, 0, 3, 0),)

        def label(self, labels):
            return labels

    assert made(at("a")).name_graph(Small()) == {"0_0_3": "a 1.00"}
    name = made(at("a")).of(Small())["0_0_3"]
    assert isinstance(name, Name) and name.labels == (0,)
