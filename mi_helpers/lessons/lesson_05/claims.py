"""Lesson 05's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

from functools import cache

import numpy as np
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.heads import all_heads, head_scores, random_sets, strongest
from mi_helpers.lessons.lesson_05.circuit import find_circuit, minimality, random_circuits
from mi_helpers.lessons.lesson_05.experiments import (
    induction_paths,
    share_lost,
    steepest,
    training_log,
)
from mi_helpers.lessons.lesson_05.ioi import Node, Task, make_prompts, name_probabilities
from mi_helpers.lessons.shared import repeated_tokens, shipped_model

LENGTH = 24  # tokens that are repeated


@cache
def _scores(seed: int) -> dict[str, Tensor]:
    model = shipped_model()
    return head_scores(model, repeated_tokens(model, 8, LENGTH, seed))


@claim(
    "induction-ablation",
    "Repeated random words: share of the gain lost without the induction heads",
    source="Olsson et al. 2022, In-context Learning and Induction Heads, ablations",
    tolerance=">= 0.8",
)
def lost_without_induction(seed: int) -> float:
    """Share of the gain from repetition that is lost when the induction heads are ablated."""
    found = strongest(_scores(seed)["induction"])
    return float(share_lost(shipped_model(), [found], LENGTH, seed)[0])


@claim(
    "random-ablation",
    "Negative control: the same without as many other heads, median of 15 random sets",
    source="derived: 0 where the other heads have no part in it",
    published="0",
    tolerance="± 0.1",
    fast=False,
)
def lost_without_others(seed: int, count: int = 15) -> float:
    """The same for as many other heads drawn at random: the median of `count` sets."""
    model, induction = shipped_model(), strongest(_scores(seed)["induction"])
    sets = random_sets(all_heads(model), len(induction), count, seed, induction)
    return float(np.median(share_lost(model, sets, LENGTH, seed)))


@claim(
    "induction-control",
    "Negative control: highest induction score on random words without repetition",
    source="derived: near 1/n, as for any other place",
    published="0",
    tolerance="± 0.2",
)
def induction_without_repetition(seed: int) -> float:
    """Negative control: the highest induction score where nothing is repeated."""
    model = shipped_model()
    ids = repeated_tokens(model, 8, LENGTH, seed)
    plain = repeated_tokens(model, 8, 2 * LENGTH, seed, times=1)
    return float(head_scores(model, plain, score_as=ids)["induction"].max())


@cache
def _paths(seed: int, site: str) -> Tensor:
    return induction_paths(shipped_model(), strongest(_scores(seed)["induction"]), site, seed, n=8)


@claim(
    "k-composition",
    "Share of log p that hangs on the path previous-token head → induction heads' keys",
    source="Elhage et al. 2021, A Mathematical Framework, K-composition; measured by path patching",
    tolerance=">= 0.6",
)
def previous_token_through_keys(seed: int) -> float:
    """Share of the answer's log-probability on the path from the previous-token head to the
    induction heads' keys: the head with the highest score before the last induction head."""
    previous = _scores(seed)["previous token"].clone()
    last = max(layer for layer, _ in strongest(_scores(seed)["induction"]))
    previous[last:] = 0
    return float(_paths(seed, "k")[strongest(previous, above=0, most=1)[0]])


@claim(
    "q-v-composition",
    "Negative control: the largest share on any head's path into their queries or values",
    source="derived: the queries and values of these heads bring the word itself",
    published="0",
    tolerance="± 0.1",
    fast=False,
)
def through_queries_and_values(seed: int) -> float:
    """Negative control: the largest share of any head's path into their queries or their values."""
    return float(max(_paths(seed, site).abs().max() for site in "qv"))


@claim(
    "phase-change",
    "Share of the induction score's rise in the steepest tenth of training (shipped log)",
    source="Olsson et al. 2022, In-context Learning and Induction Heads, phase change",
    tolerance=">= 0.6",
    seeds=1,
)
def phase_change(seed: int) -> float:
    """Share of the induction score's rise that falls into the steepest tenth of training.

    The log's checkpoints are up to 7 % of the run apart, so no shorter part can be resolved.
    """
    log = training_log()
    return steepest(log["step"], log["induction_head"], 0.1 * log["step"][-1])[2]


@cache
def found_circuit() -> set[Node]:
    """The circuit found on the shipped model's first prompts."""
    return find_circuit(Task(shipped_model(), make_prompts(shipped_model(), 24, seed=0)))


def fresh_task(seed: int) -> Task:
    """Prompts on which the circuit was not searched for."""
    return Task(shipped_model(), make_prompts(shipped_model(), 24, seed=1 + seed))


@claim(
    "ioi-faithfulness",
    "F(circuit) / F(model), IO less other names, on prompts not searched on",
    source="Wang et al. 2022, section 4 (26 heads of GPT-2 small; IO less S)",
    published="0.87",
    tolerance=">= 0.8",
    seeds=3,
)
def circuit_faithfulness(seed: int) -> float:
    """F(circuit) / F(model) on fresh prompts."""
    return fresh_task(seed).faithfulness(found_circuit())


@claim(
    "ioi-first-choice",
    "Share of those prompts where the circuit alone names the receiver",
    source="measured in the lesson",
    tolerance=">= 0.9",
    seeds=3,
)
def circuit_first_choice(seed: int) -> float:
    """Share of fresh prompts where the circuit alone names the receiver."""
    return fresh_task(seed).first_choice(found_circuit())


@claim(
    "ioi-random",
    "Negative control: mean faithfulness of 10 random circuits of equal size",
    source="Wang et al. 2022, section 4",
    tolerance="<= 0.3",
    seeds=3,
    fast=False,
)
def random_faithfulness(seed: int, count: int = 10) -> float:
    """The mean faithfulness of random circuits of equal size."""
    task = fresh_task(seed)
    circuits = random_circuits(task, found_circuit(), count, seed)
    return sum(map(task.faithfulness, circuits)) / count


@claim(
    "ioi-minimality",
    "Change of F, as a share, when the least important node leaves the circuit",
    source="Wang et al. 2022, section 4",
    tolerance=">= 0.01",
    seeds=3,
)
def least_needed(seed: int) -> float:
    """Minimality: the change of F, as a share, when the least important node leaves."""
    return min(minimality(fresh_task(seed), found_circuit()).values())


@claim(
    "ioi-giver",
    "p(giver) after three different names: excluded for giving, not for being named twice",
    source="measured in the lesson",
    tolerance="<= 0.01",
    seeds=3,
)
def giver_named(seed: int) -> float:
    """Probability of the giver, in sentences with three names where nobody is named twice."""
    model = shipped_model()
    return name_probabilities(model, make_prompts(model, 24, seed=1 + seed))["S2"]
