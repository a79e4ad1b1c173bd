"""Heads: scores, ablation, composition and circuits by hand and by brute force, then the shipped
model."""

import numpy as np
import pytest
import torch
from families import CONFIGS, TEXT, build, make_tokenizer

from mi_helpers import heads, paths, plots
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_05 import claims
from mi_helpers.lessons.lesson_05 import experiments as lab
from mi_helpers.lessons.lesson_05 import figures as heads_figures
from mi_helpers.lessons.shared import repeated_tokens, word_ids
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(build(request.param), make_tokenizer(), request.param)


@pytest.fixture(scope="module")
def gemma():
    return LanguageModel(build("gemma2"), make_tokenizer(), "gemma2")


@pytest.fixture(scope="module")
def shipped():
    return load_model("tiny-gemma")


def pattern_of(places, length):
    """(1, 1, length, length): all attention of token i at places[i]."""
    pattern = torch.zeros(1, 1, length, length)
    for i, j in enumerate(places):
        pattern[0, 0, i, j] = 1
    return pattern


# -- tokens and targets ------------------------------------------------------------------------


def test_repeated_tokens_are_different_words_written_again(gemma):
    ids = repeated_tokens(gemma, n=5, length=4, seed=3)
    assert ids.shape == (5, 9) and (ids[:, 0] == gemma.tokenizer.bos_token_id).all()
    assert torch.equal(ids[:, 1:5], ids[:, 5:])
    assert all(len(set(row.tolist())) == 4 for row in ids[:, 1:5])
    assert set(ids[:, 1:].flatten().tolist()) <= set(word_ids(gemma).tolist())
    assert torch.equal(ids, repeated_tokens(gemma, 5, 4, seed=3))
    assert not torch.equal(ids, repeated_tokens(gemma, 5, 4, seed=4))
    once = repeated_tokens(gemma, 5, 4, times=1)
    assert once.shape == (5, 5)


def test_a_model_without_a_tokenizer_draws_from_its_ids():
    bare = LanguageModel(build("llama"))
    ids = repeated_tokens(bare, 2, 5)
    assert ids.shape == (2, 10) and ids.min() > 2  # 0, 1 and 2 are special


def test_targets_by_hand():
    ids = torch.tensor([[9, 5, 6, 5, 5]])
    found = {name: mask[0].nonzero().tolist() for name, mask in heads.targets(ids).items()}
    assert found["previous token"] == [[2, 1], [3, 2], [4, 3]]
    assert found["current token"] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert found["first token"] == [[1, 0], [2, 0], [3, 0], [4, 0]]
    assert found["duplicate token"] == [[3, 1], [4, 1], [4, 3]]
    assert found["induction"] == [[3, 2], [4, 2]]  # not [4, 4]: itself


def test_perfect_heads_score_one():
    ids = torch.tensor([[9, 5, 6, 7, 5, 6, 7]])
    cases = {
        "previous token": [0, 0, 1, 2, 3, 4, 5],
        "induction": [0, 0, 0, 0, 2, 3, 4],
        "duplicate token": [0, 0, 0, 0, 1, 2, 3],
        "current token": list(range(7)),
        "first token": [0] * 7,
    }
    for name, places in cases.items():
        scores = heads.pattern_scores(pattern_of(places, 7), ids)
        assert scores[name].tolist() == [1.0]
        wrong = [other for other in cases if other != name and scores[other] > 0.51]
        assert wrong == []


def test_scores_are_means_over_the_tokens_that_have_a_target():
    ids = torch.tensor([[9, 5, 6, 5], [9, 5, 6, 7]])
    pattern = torch.zeros(2, 2, 4, 4)
    pattern[0, 0, 3, 2] = 0.25  # the one induction target there is, of head 0
    pattern[1, 1, 3, 2] = 1.0  # the same place in a text without repetition
    assert heads.pattern_scores(pattern, ids)["induction"].tolist() == [0.25, 0.0]


def test_a_kind_without_targets_scores_nan():
    scores = heads.pattern_scores(pattern_of([0, 0, 1], 3), torch.tensor([[1, 2, 3]]))
    assert scores["induction"].isnan() and scores["duplicate token"].isnan()


def test_positional_is_one_for_a_pattern_that_ignores_the_tokens():
    fixed = pattern_of([0, 0, 1, 1], 4).repeat(6, 1, 1, 1)
    assert heads.pattern_scores(fixed, torch.zeros(6, 4, dtype=int))["positional"] == 1
    two = torch.cat([pattern_of([0, 0, 0, 0], 4), pattern_of([0, 1, 1, 1], 4)])
    ids = torch.zeros(2, 4, dtype=int)
    assert heads.pattern_scores(two, ids)["positional"].tolist() == [0.5]


def test_attention_by_distance_by_hand():
    found = heads.by_distance(pattern_of([0, 1, 1, 2], 4))  # (heads, distance)
    assert found.tolist() == [[pytest.approx(1 / 3), 1.0, 0.0, 0.0]]


def test_head_scores_agree_with_the_cached_patterns(model):
    ids = repeated_tokens(model, 3, 3)
    _, cache = model.run_with_cache(ids, "pattern")
    want = heads.pattern_scores(cache["pattern"], ids)
    got = heads.head_scores(model, ids)
    for name, values in want.items():
        assert got[name].shape == (model.n_layers, model.n_heads)
        assert torch.allclose(got[name], values, atol=1e-6)


def test_scores_can_be_taken_where_another_text_repeats(gemma):
    ids = repeated_tokens(gemma, 3, 3)
    plain = ids.flip(1)
    scores = heads.head_scores(gemma, plain, score_as=ids)
    _, cache = gemma.run_with_cache(plain, "pattern")
    assert torch.allclose(
        scores["induction"], heads.pattern_scores(cache["pattern"], ids)["induction"]
    )


def test_the_strongest_heads_come_in_order():
    scores = torch.tensor([[0.1, 0.9], [torch.nan, 0.5]])
    assert heads.strongest(scores, above=0.4) == [(0, 1), (1, 1)]
    assert heads.strongest(scores, above=0.0, most=1) == [(0, 1)]
    assert heads.head_names([(0, 1), (1, 1)]) == "L0H1, L1H1" and heads.head_names([]) == "none"


# -- sets of heads, and losses ------------------------------------------------------------------


def test_texts_begin_again_after_periods_of_their_own(shipped):
    ids = lab.mixed_repeats(shipped, 4, length=30)
    assert ids.shape == (4, 31)
    for row, period in zip(ids[:, 1:], lab.PERIODS, strict=False):
        assert (
            torch.equal(row[period:], row[:-period]) and len(set(row[:period].tolist())) == period
        )
    again = lab.again(ids)  # entry i is about token i + 1
    for row, period in zip(again, lab.PERIODS, strict=False):
        assert not row[: period + 1].any() and row[period + 1 :].all()


def test_random_sets_leave_out_what_they_should():
    every = [(i, h) for i in range(3) for h in range(4)]
    sets = heads.random_sets(every, 3, 50, seed=0, without=[(0, 0), (1, 1)])
    assert len(sets) == 50 and all(len(set(each)) == 3 for each in sets)
    assert not {(0, 0), (1, 1)} & {head for each in sets for head in each}
    assert len({tuple(each) for each in sets}) > 30
    assert sets == heads.random_sets(every, 3, 50, seed=0, without=[(0, 0), (1, 1)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: repeated_tokens(m, 2, 9), "do not fit: gemma2 has a context of 16"),
        (lambda m: repeated_tokens(m, 2, 1), "give 1, 2 and 1 at least"),
        (lambda m: heads.targets(torch.ones(3, dtype=int)), r"of shape \(batch, pos\)"),
        (lambda m: heads.pattern_scores(torch.ones(1, 1, 3, 3), torch.ones(1, 4)), "expected"),
        (lambda m: heads.random_sets([(0, 0)], 2, 1), "cannot be drawn from 1"),
        (lambda m: heads.composition(m, "O"), "kind has to be Q, K or V"),
        (lambda m: heads.qk_circuit(m, (0, 0), torch.tensor([5]), (1, 0)), "writes after"),
        (lambda m: lab.training_log("nowhere.csv"), "no nowhere.csv"),
        (lambda m: lab.steepest(np.arange(3), np.zeros(3), 1), "a curve that rises"),
    ],
)
def test_bad_input_gets_one_sentence(gemma, call, message):
    with pytest.raises(ModelError, match=message) as caught:
        call(gemma)
    assert "\n" not in str(caught.value)


# -- weights -----------------------------------------------------------------------------------


def brute_composition(model, kind, writer, reader):
    """From the whole d_model × d_model matrices."""
    (i, g), (j, h) = writer, reader
    W_Q, W_K, W_V = (heads.reading(model, name, j)[h] for name in ("W_Q", "W_K", "W_V"))
    moved = heads.reading(model, "W_V", i)[g] @ heads.writing(model, i)[g]
    far = {"Q": W_Q @ W_K.T, "K": W_K @ W_Q.T, "V": W_V @ heads.writing(model, j)[h]}[kind]
    return (moved @ far).norm() / (moved.norm() * far.norm())


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_against_whole_matrices(model, kind):
    found = heads.composition(model, kind)
    assert found.shape == (model.n_layers, model.n_heads) * 2
    for writer, reader in (((0, 1), (1, 2)), ((0, 3), (3, 0)), ((2, 0), (3, 3))):
        want = brute_composition(model, kind, writer, reader)
        assert found[(*writer, *reader)] == pytest.approx(float(want), rel=1e-4)
    assert found[2, :, 2].isnan().all() and found[3, :, 1].isnan().all()


def test_the_chance_of_composition_is_that_of_random_rotations(gemma):
    torch.manual_seed(0)
    A, B = torch.randn(20, 6) @ torch.randn(6, 20), torch.randn(20, 6) @ torch.randn(6, 20)
    turned = [torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(500)]
    squares = [(A @ R @ B).norm() ** 2 / (A.norm() * B.norm()) ** 2 for R in turned]
    assert np.mean(squares) ** 0.5 == pytest.approx(heads.chance_of_composition(gemma), rel=0.05)
    assert gemma.d_model == 20


@pytest.mark.parametrize("family", ["gemma2", "llama", "gpt2", "gpt_neox"])
def test_reading_and_writing_are_what_the_model_does_up_to_a_factor_per_token(family):
    model = LanguageModel(build(family), make_tokenizer())
    hf_biases = [p for name, p in model.hf.named_parameters() if name.endswith("bias")]
    for bias in hf_biases:
        bias.zero_()
    _, cache = model.run_with_cache(TEXT, ["resid_pre", "v", "z", "attn_out"])
    x, layer = cache["resid_pre", 1][0], 1
    got = torch.einsum("pd,hdk->phk", x, heads.reading(model, "W_V", layer))
    want = cache["v", layer][0].repeat_interleave(model.n_heads // model.n_kv_heads, 1)
    assert torch.cosine_similarity(got.flatten(1), want.flatten(1)).min() > 0.9999
    wrote = torch.einsum("phk,hkd->pd", cache["z", layer][0], heads.writing(model, layer))
    assert torch.cosine_similarity(wrote, cache["attn_out", layer][0]).min() > 0.9999


def test_copying_of_circuits_that_copy_and_that_suppress():
    eye = torch.eye(6) - 1 / 6
    copies, suppresses = heads.copying(eye), heads.copying(-eye)
    assert copies["first"] == suppresses["last"] == 1
    assert copies["last"] == suppresses["first"] == 0
    assert copies["trace"] == pytest.approx(1) and suppresses["trace"] == pytest.approx(-1)
    assert copies["own"] == pytest.approx(-suppresses["own"]) and copies["own"] > 1
    turn = torch.eye(6).roll(1, 1)
    assert heads.copying(turn)["first"] == 0 and abs(heads.copying(turn)["trace"]) < 1e-6


def test_the_ov_circuit_is_what_attending_to_a_token_adds_to_the_logits(gemma):
    """Force a head of layer 1 to attend to one place, and look at what it writes there."""
    ids, (layer, h) = word_ids(gemma), (1, 2)
    table = heads.ov_circuit(gemma, (layer, h), ids)
    for row, token in enumerate(ids.tolist()[:3]):
        _, cache = gemma.run_with_cache(torch.tensor([[2, token]]), ["resid_pre", "v"])
        value = cache["v", layer][0, 1, h // 2]
        written = value @ gemma.weight("W_O", layer)[h] * (1 + gemma.part("ln1_post", layer).weight)
        logits = (written * (1 + gemma.ln_final.weight)) @ gemma.W_U[:, ids]
        assert torch.allclose(table[row], logits - logits.mean(), atol=1e-4)


def test_a_chain_of_ov_circuits_reads_what_the_first_head_writes(gemma):
    """Put what a head of layer 1 writes into the stream by hand, and let one of layer 2 read it."""
    ids, first, (layer, h) = word_ids(gemma), (1, 3), (2, 0)
    table = heads.ov_circuit(gemma, (layer, h), ids, [first, (3, 1)])
    for row, token in enumerate(ids.tolist()[:3]):
        _, cache = gemma.run_with_cache(torch.tensor([[2, token]]), ["resid_pre", "v"])
        brought = cache["v", 1][0, 1, first[1] // 2] @ gemma.weight("W_O", 1)[first[1]]
        read = gemma.part("ln1", layer)(brought * (1 + gemma.part("ln1_post", 1).weight))
        written = read @ gemma.weight("W_V", layer)[h // 2] @ gemma.weight("W_O", layer)[h]
        written = written * (1 + gemma.part("ln1_post", layer).weight)
        logits = (written * (1 + gemma.ln_final.weight)) @ gemma.W_U[:, ids]
        assert torch.allclose(table[row], logits - logits.mean(), atol=1e-4)


def test_a_chain_needs_an_earlier_head(gemma):
    ids = word_ids(gemma)
    with pytest.raises(ModelError, match="L1H0 reads nothing of L1H3, L2H0: it is not after them"):
        heads.ov_circuit(gemma, (1, 0), ids, [(1, 3), (2, 0)])
    found = heads.copying_map(gemma, ids, [(1, 3)])["own"]
    assert torch.isnan(found[:2]).all() and torch.isfinite(found[2:]).all()


def test_the_qk_circuit_matches_where_queries_and_keys_are_one(gemma):
    ids = word_ids(gemma)
    plain = heads.qk_circuit(gemma, (1, 0), ids, None)
    assert plain.shape == (len(ids), len(ids)) and heads.matching(torch.eye(4)) == 1
    _, cache = gemma.run_with_cache(torch.tensor([[2, int(ids[0])]]), ["q", "k"])
    want = cache["q", 1][0, 1, 0] @ cache["k", 1][0, 1, 0]
    assert plain[0, 0] == pytest.approx(float(want), rel=1e-4)
    helped = heads.qk_circuit(gemma, (1, 0), ids, (0, 1))
    assert helped.shape == plain.shape and not torch.allclose(helped, plain)


def test_maps_of_every_head(model):
    found = heads.copying_map(model, word_ids(model))
    assert all(each.shape == (model.n_layers, model.n_heads) for each in found.values())
    assert all(torch.isfinite(each).all() for each in found.values())


def test_composition_by_effect_runs_on_every_family(model):
    prompts = lab.induction_pair(model, 2, length=3)
    for site in "kqv":
        found = paths.composition_effect(model, [(2, 0), (3, 1)], prompts, site)
        assert found.shape == (model.n_layers, model.n_heads)
        # nothing in the last layer reaches an earlier receiver: what is left is rounding
        assert found[3].abs().max() < 1e-4
    assert paths.receivers_of(model, [(2, 0), (2, 1), (1, 0)], "q") == [
        ("q", 1, 0),
        ("q", 2, 0),
        ("q", 2, 1),
    ]


def test_key_heads_are_shared(gemma):
    assert paths.receivers_of(gemma, [(2, 0), (2, 1), (2, 3)]) == [("k", 2, 0), ("k", 2, 1)]


# -- the training log ----------------------------------------------------------------------------


def test_curves_by_hand():
    steps, values = np.array([0.0, 10, 20, 40]), np.array([0.0, 0.0, 1.0, 0.9])
    low, high, share = lab.steepest(steps, values, 10)
    assert (low, high) == (10, 20) and share == 1
    assert lab.steepest(steps, values, 5)[2] == pytest.approx(0.5)
    log = {"step": steps, "previous_token_head": values / 2, "repetition": values + 0.1}
    said = lab.when_it_begins(log, (15, 20, 0.5))
    assert "5 of 40 steps, 50%" in said and "previous token head 0.25, repetition 0.60" in said


def test_the_shipped_log_has_a_phase_change():
    log = lab.training_log()
    assert (np.diff(log["step"]) > 0).all() and log["induction_head"][-1] > 0.7
    assert claims.phase_change(0) > 0.5


# -- the shipped model ---------------------------------------------------------------------------


def test_induction_heads_are_found_and_only_there(shipped):
    ids = repeated_tokens(shipped, 6, 20, seed=5)
    scores = heads.head_scores(shipped, ids)["induction"]
    assert scores.max() > 0.7 and len(heads.strongest(scores)) >= 1
    plain = repeated_tokens(shipped, 6, 40, seed=6, times=1)
    assert heads.head_scores(shipped, plain, score_as=ids)["induction"].max() < 0.3
    assert heads.head_scores(untrained(shipped), ids)["induction"].max() < 0.3


def test_their_removal_takes_the_gain_and_that_of_others_does_not(shipped):
    ids = repeated_tokens(shipped, 6, 20, seed=5)
    scores = heads.head_scores(shipped, ids)
    found = heads.strongest(scores["induction"])
    helper = heads.strongest(scores["previous token"], most=1)
    others = heads.random_sets(
        heads.all_heads(shipped), len(found), 4, 0, without=[*found, *helper]
    )
    lost = lab.share_lost(shipped, [found, [], *others], seed=5)
    assert lost[0] > 0.8 and lost[1] == 0 and np.median(lost[2:]) < 0.4


def test_the_previous_token_head_feeds_the_keys(shipped):
    assert claims.previous_token_through_keys(0) > 0.5


def test_how_far_back_a_head_looks(shipped):
    plain = repeated_tokens(shipped, 4, 40, times=1)
    previous = heads.strongest(heads.head_scores(shipped, plain)["previous token"], most=1)
    assert "looks 1 back" in lab.how_far_back(shipped, plain, previous)


# -- figures -------------------------------------------------------------------------------------


def drawn(figure):
    return plots.render(figure).startswith(b"\x89PNG")


def test_the_other_figures_draw():
    maps = {"a": torch.rand(3, 2), "b": torch.rand(3, 2), "c": torch.full((3, 2), torch.nan)}
    assert drawn(heads_figures.head_maps(maps, limit=1))
    assert drawn(heads_figures.head_maps({"large": np.random.rand(26, 8)}, centre_zero=True))
    assert drawn(heads_figures.spread({"one": [0.5], "many": [0.1, 0.2, 0.3]}, reference=1))
    steps = [0, 1, 2]
    panels = {"p": {"x": [0, 1, 2]}, "q": {"y": [1, 1, 0]}}
    assert drawn(heads_figures.formation(steps, panels, window=(0, 1), last=2))
