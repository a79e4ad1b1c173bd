"""What tiny-gemma can do: a threshold counts what was held out of training, and nothing else."""

import pytest
import torch
from test_tiny_gemma import SMALL
from transformers import AutoTokenizer, Gemma2ForCausalLM

from mi_helpers.files import DATA
from mi_helpers.tiny_gemma import skills
from mi_helpers.tinyworld.world import World


@pytest.fixture(scope="module")
def asked():
    """{skill measured: [(family, held)] of the texts that it was measured on}, and the rows."""
    suite = skills.Suite(World(), AutoTokenizer.from_pretrained(DATA / "tiny_gemma"), small=True)
    suite.n, texts, seen = 12, skills.Suite.texts, []

    def recorded(family, held=(), n=None, **choices):
        seen.append((family, frozenset(held)))
        return texts(suite, family, held, min(n or 2, 2), **choices)

    suite.texts = recorded
    torch.manual_seed(0)
    rows = skills.measure(Gemma2ForCausalLM(SMALL).eval(), suite)
    return rows, seen


def test_rows_with_a_threshold_are_measured_on_held_out_texts(asked):
    rows, seen = asked
    held = {family: {h for f, h in seen if f == family} for family in ("facts", "years", "pronoun")}
    assert all(frozenset({"templates"}) in each for each in held.values())
    for family in ("ioi", "agreement", "two_hop"):
        assert any("entities" in h for f, h in seen if f == family)
    skew = {row.skill: row.threshold for row in rows if row.skill.startswith("pronoun")}
    assert [limit for name, limit in skew.items() if "unseen" in name] == [0.05]
    assert [limit for name, limit in skew.items() if "trained" in name] == [None]


def test_a_model_that_knows_nothing_meets_no_threshold_but_by_a_toss(asked):
    rows, _ = asked
    toss = ("above the", "agreement", "verdicts")  # one of two, on a handful of texts
    limits = [r for r in rows if r.threshold is not None and not any(t in r.skill for t in toss)]
    assert len(limits) > 18 and [row.skill for row in limits if row.met] == []


@pytest.mark.parametrize("value, better, met", [(0.5, "above", True), (0.4, "above", False)])
def test_a_row_is_met_on_the_right_side(value, better, met):
    assert skills.Row("x", value, 0.5, better).met == met
    assert skills.Row("x", 1 - value, 0.5, "below").met == met
