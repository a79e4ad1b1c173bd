"""QK attribution: products that sum to the model's own score, and its gradient by autograd."""

import pytest
import torch
from test_circuits import CONFIGS, IDS, build

from mi_helpers.circuits.queries import qk_attribution, rotations, score_gradient
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.layouts import ModelError
from mi_helpers.saes.coder import SparseCoder

LINEAR = [family for family in CONFIGS if family != "gemma3_text"]


def local_of(family: str) -> LocalReplacement:
    model = build(family)
    d = model.d_model
    coders = [SparseCoder(d, 30, d, k=4, seed=i) for i in range(model.n_layers)]
    return LocalReplacement(model, coders, IDS)


@pytest.mark.parametrize("family", LINEAR)
def test_products_sum_to_the_score_and_to_its_gradient(family):
    local = local_of(family)
    for layer, head, query, key in ((0, 1, 5, 2), (1, 3, 7, 6), (2, 0, 8, 8)):
        found = qk_attribution(local, layer, head, query, key)
        size = float(found.products.abs().sum())
        assert float(found.products.sum()) == pytest.approx(found.score, abs=1e-5 * size)
        mine = dict(zip(found.nodes, found.gradient().tolist(), strict=True))
        gradient = score_gradient(local, layer, head, query, key)
        assert all(node.layer < layer for node in gradient)
        for node, value in gradient.items():
            assert value == pytest.approx(mine[node], abs=1e-5 * size)
        above = [value for node, value in mine.items() if node.layer >= layer]
        assert all(value == 0 for value in above)


def test_the_score_is_what_the_softmax_gets():
    """Without a soft-cap, the log of a pattern's ratio is the difference of two scores."""
    local = local_of("llama")
    for head in range(local.model.n_heads):
        found = qk_attribution(local, 1, head, 6, 2, against=[4])
        row = local.patterns[1][head, 6]
        assert found.score == pytest.approx(float(row[2].log() - row[4].log()), abs=1e-4)
        size = float(found.products.abs().sum())
        assert float(found.products.sum()) == pytest.approx(found.score, abs=1e-5 * size)


def test_against_subtracts_the_mean_of_the_others():
    local = local_of("gemma2")
    one, two, three = (qk_attribution(local, 1, 2, 7, key) for key in (3, 5, 6))
    apart = qk_attribution(local, 1, 2, 7, 3, against=[5, 6])
    want = one.products - (two.products + three.products) / 2
    assert torch.allclose(apart.products, want, atol=1e-5)
    assert apart.score == pytest.approx(one.score - (two.score + three.score) / 2, abs=1e-4)
    gradient = score_gradient(local, 1, 2, 7, 3, against=[5, 6])
    mine = dict(zip(apart.nodes, apart.gradient().tolist(), strict=True))
    assert all(value == pytest.approx(mine[node], abs=1e-4) for node, value in gradient.items())


def test_rotations_turn_and_keep_lengths():
    local = local_of("llama")
    turn = rotations(local, 1)
    eye = torch.eye(local.model.d_head)
    assert torch.allclose(turn[0], eye, atol=1e-6)
    for each in turn:
        assert torch.allclose(each @ each.T, eye, atol=1e-5)
    assert not torch.allclose(turn[3], eye, atol=1e-2)
    assert torch.allclose(rotations(local_of("gpt2"), 1)[3], eye[:5, :5], atol=1e-6)


def test_the_largest_products_come_first():
    found = qk_attribution(local_of("llama"), 2, 1, 8, 3)
    top = found.top(4)
    assert [abs(x) for *_, x in top] == sorted((abs(x) for *_, x in top), reverse=True)
    query, key, value = top[0]
    index = [*found.nodes, None]
    assert value == pytest.approx(float(found.products[index.index(query), index.index(key)]))


def test_what_cannot_be_attributed_is_said():
    local = local_of("llama")
    with pytest.raises(ModelError, match="head"):
        qk_attribution(local, 1, 9, 5, 2)
    with pytest.raises(ModelError, match="key"):
        qk_attribution(local, 1, 1, 2, 5)  # attention looks back
    with pytest.raises(ModelError, match="not linear"):
        qk_attribution(local_of("gemma3_text"), 1, 1, 5, 2)
