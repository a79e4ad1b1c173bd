"""Lesson 00's rows of the ledger: each function measures one claim, at one seed."""

from mi_helpers.ablation import Zero, ablate
from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_00.experiments import (
    LesionLab,
    choose_pair,
    crossover,
    facts,
    fetched,
    fresh_lab,
    gaze,
    gaze_order,
    left_at_random,
    remembered,
)
from mi_helpers.lessons.shared import make_batch, shipped_model
from mi_helpers.loading import untrained
from mi_helpers.tinyworld.world import World


@claim(
    "stream-sum",
    "embed + Σ attn_out + Σ mlp_out against the final residual, relative to its largest entry",
    source="Elhage et al. 2021, A Mathematical Framework, "
    "Residual Stream as a Communication Channel",
    published="0",
    tolerance="<= 1e-5",
)
def stream_sum_error(seed: int) -> float:
    """max |embed + Σ attn_out + Σ mlp_out - resid_final| / max |resid_final|, on one document.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual
    Stream as a Communication Channel": the final stream is the sum of all that was written.
    """
    model = shipped_model()
    text = World().document(seed, "prose").text
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"])
    parts = cache["embed"] + cache["attn_out"].sum(0) + cache["mlp_out"].sum(0)
    final = cache["resid_final"]
    return float((parts - final).abs().max() / final.abs().max())


def gazing(seed: int) -> tuple[list, list, int]:
    """40 facts, all heads by how much they look at the landmark, how many give it over half."""
    model = shipped_model()
    known = facts(model, seed=40_000 + 1_000 * seed)
    return known, gaze_order(model, known), int((gaze(model, known).mean(0) > 0.5).sum())


@claim(
    "gaze-lesion",
    "p(city) with every head silenced that gives the landmark over half of its attention",
    source="measured in the lesson",
    published="",
    tolerance="<= 0.2",
)
def gaze_lesion(seed: int) -> float:
    """Mean over 40 facts; each of these heads alone costs little (see the lesson)."""
    known, order, count = gazing(seed)
    hooks = ablate(shipped_model(), order[:count], Zero())
    return float(remembered(shipped_model(), known, hooks).mean())


@claim(
    "gaze-control",
    "Control of the same: as many of the other heads silenced, drawn at random, mean of ten draws",
    source="measured in the lesson",
    published="",
    tolerance=">= 0.4",
)
def gaze_control(seed: int) -> float:
    known, order, count = gazing(seed)
    return left_at_random(shipped_model(), known, order[count:], count)[-1][0]


@claim(
    "fetched-city",
    "The head that looks most at the landmark writes its city: share of other cities beaten",
    source="measured in the lesson",
    published="",
    tolerance=">= 0.8",
)
def fetched_city(seed: int) -> float:
    known, order, _ = gazing(seed)
    return float(fetched(shipped_model(), known, *order[0]).mean())


@claim(
    "fetched-untrained",
    "Control of the same: that head of an untrained model",
    source="derived: chance",
    published="1/2",
    tolerance="± 0.2",
)
def fetched_untrained(seed: int) -> float:
    known, order, _ = gazing(seed)
    return float(fetched(untrained(shipped_model(), seed), known, *order[0]).mean())


@claim(
    "double-dissociation",
    "Two heads, chosen on other documents: how much more each costs its own skill, the smaller, "
    "nats per answer",
    source="Teuber 1955, Physiological Psychology: double dissociation; measured in the lesson",
    published="",
    tolerance=">= 1",
    seeds=3,
    fast=False,
)
def double_dissociation(seed: int) -> float:
    model = shipped_model()
    lab = LesionLab(model, make_batch(model, 32, 20_000 + 1_000 * seed))
    pair = choose_pair(lab)
    fresh = fresh_lab(lab, pair, 200, seed=50_000 + 1_000 * seed)
    return min(mean for mean, _ in crossover(fresh, pair))
