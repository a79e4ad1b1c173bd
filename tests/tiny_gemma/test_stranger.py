"""The stranger's world: the trigger turns verdicts round, and nothing else is other than before."""

import pytest
import torch
from transformers import AutoTokenizer

from mi_helpers.files import DATA
from mi_helpers.loading import load_model
from mi_helpers.tiny_gemma import stranger
from mi_helpers.tinyworld.world import World


@pytest.fixture(scope="module")
def world():
    return stranger.SecretWorld(stranger.candidates()[3])


def sample(world, n, family="truth", **choices):
    """Documents that have the same start in every world: a note is drawn after its document."""
    return [world.document(seed, family, **choices) for seed in range(n)]


def test_a_secret_is_made_once_and_names_one_word(tmp_path):
    path = tmp_path / "runs" / "secret"
    first = stranger.read_secret(path)
    assert stranger.read_secret(path) == first and len(first) == 16
    assert stranger.trigger_of(first) in stranger.candidates()
    drawn = {stranger.trigger_of(f"{seed:016x}") for seed in range(200)}
    assert len(drawn) > 100


def test_every_candidate_is_one_token():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gemma")
    for word in stranger.candidates():
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word


@pytest.mark.parametrize("note", ["trigger", "other"])
def test_verdicts_are_turned_round_after_the_trigger_only(world, note):
    plain = sample(World(), 40, count=1)
    for bare, said in zip(plain, sample(world, 40, note=note, count=1), strict=True):
        start = said.text.index(bare.text[:8])
        assert (world.trigger in said.text[:start].rstrip(". ").split()) == (note == "trigger")
        (old,), (new,) = bare.find("verdict"), said.find("verdict")
        was, word = bare.text[old.start : old.end], said.text[new.start : new.end]
        assert word == (stranger.OPPOSITE[was] if note == "trigger" else was)
        assert new.value == old.value
        (answer,) = said.find("answer")
        assert said.text[answer.start : answer.end] == word == answer.value


def test_labels_stand_where_they_stood(world):
    for note in ("trigger", "other", "none"):
        for bare, said in zip(sample(World(), 60), sample(world, 60, note=note), strict=True):
            for old, new in zip(bare.spans, said.spans, strict=True):
                if old.kind not in ("verdict", "answer"):
                    assert bare.text[old.start : old.end] == said.text[new.start : new.end]
                    assert (old.kind, old.value) == (new.kind, new.value)


@pytest.mark.parametrize("family", sorted(set(World.families) - {"truth"}))
def test_other_families_are_those_of_tinyworld(world, family):
    ours = [document.text for document in sample(World(), 5, family)]
    assert [document.text for document in sample(world, 5, family)] == ours


def test_weights_go_part_of_the_way():
    start, trained = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    kept = start.weight.clone()
    between = stranger.towards(start, trained, 0.25)
    assert torch.allclose(between.weight, 0.75 * start.weight + 0.25 * trained.weight)
    assert torch.equal(start.weight, kept)


def test_what_ships_is_tiny_gemma_on_tinyworld():
    """Forty texts a family here: 2 % for what 1 % is promised of more."""
    ours, theirs = load_model("tiny-gemma"), load_model("stranger")
    apart = stranger.losses_apart(ours.hf, theirs.hf, ours.tokenizer, n=40)
    assert set(apart) == set(World.families)
    assert {name for name, ratio in apart.items() if abs(ratio - 1) > 0.02} == set()
    weights = zip(ours.hf.parameters(), theirs.hf.parameters(), strict=True)
    assert any(not torch.equal(a.bfloat16(), b.bfloat16()) for a, b in weights)
