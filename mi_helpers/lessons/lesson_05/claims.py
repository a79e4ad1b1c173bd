"""Lesson 05's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

from functools import cache

import numpy as np
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.heads import all_heads, copying_map, head_scores, random_sets, strongest
from mi_helpers.lessons.lesson_05.circuit import (
    attention_by_role,
    by_job,
    find_circuit,
    jobs,
    minimality,
    random_circuits,
)
from mi_helpers.lessons.lesson_05.experiments import (
    induction_paths,
    mixed_repeats,
    share_lost,
    steepest,
    training_log,
)
from mi_helpers.lessons.lesson_05.ioi import Node, Task, make_prompts
from mi_helpers.lessons.shared import repeated_tokens, shipped_model


@cache
def _scores(seed: int) -> dict[str, Tensor]:
    return head_scores(shipped_model(), mixed_repeats(shipped_model(), seed=seed))


@claim(
    "induction-ablation",
    "Repeated random words: share of the gain lost without the induction heads",
    source="Olsson et al. 2022, In-context Learning and Induction Heads, ablations",
    tolerance=">= 0.8",
)
def lost_without_induction(seed: int) -> float:
    """Share of the gain from repetition that is lost when the induction heads are ablated."""
    return float(share_lost(shipped_model(), [strongest(_scores(seed)["induction"])], seed)[0])


@claim(
    "random-ablation",
    "Negative control: the same without as many other heads, median of 15 random sets",
    source="derived: 0 where the other heads have no part in it",
    published="0",
    tolerance="<= 0.4",
    fast=False,
)
def lost_without_others(seed: int, count: int = 15) -> float:
    """The same for as many other heads drawn at random: the median of `count` sets."""
    model, induction = shipped_model(), strongest(_scores(seed)["induction"])
    sets = random_sets(all_heads(model), len(induction), count, seed, induction)
    return float(np.median(share_lost(model, sets, seed)))


@claim(
    "induction-control",
    "Negative control: highest induction score on random words without repetition",
    source="derived: near 1/n, as for any other place",
    published="0",
    tolerance="± 0.2",
)
def induction_without_repetition(seed: int) -> float:
    """Negative control: the highest induction score where nothing is repeated."""
    model, ids = shipped_model(), mixed_repeats(shipped_model(), seed=seed)
    plain = repeated_tokens(model, len(ids), 48, seed, times=1)
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
    tolerance="± 0.2",
    fast=False,
)
def through_queries_and_values(seed: int) -> float:
    """Negative control: the largest share of any head's path into their queries or their values."""
    return float(max(_paths(seed, site).abs().max() for site in "qv"))


@claim(
    "phase-change",
    "Share of the induction score's rise in its steepest fortieth of training (shipped log)",
    source="Olsson et al. 2022, In-context Learning and Induction Heads, phase change",
    tolerance=">= 0.5",
    seeds=1,
)
def phase_change(seed: int) -> float:
    """Share of the induction score's rise that falls into the steepest fortieth of training."""
    log = training_log()
    return steepest(log["step"], log["induction_head"], log["step"][-1] / 40)[2]


@cache
def found_circuit() -> set[Node]:
    """The circuit found on the shipped model's first texts."""
    return find_circuit(Task(shipped_model(), make_prompts(shipped_model(), 36, seed=0)))


@cache
def fresh_task(seed: int) -> Task:
    """Texts on which the circuit was not searched for."""
    return Task(shipped_model(), make_prompts(shipped_model(), 48, seed=1 + seed))


@cache
def job_groups() -> dict[str, set[Node]]:
    """The circuit's nodes by job."""
    task = fresh_task(0)
    own = copying_map(task.model, task.prompts.names)["own"]
    return by_job(jobs(found_circuit(), attention_by_role(task), own))


@claim(
    "ioi-faithfulness",
    "F(circuit) / F(model), IO less S, on texts not searched on",
    source="Wang et al. 2022, section 4 (26 heads of GPT-2 small)",
    published="0.87",
    tolerance="± 0.25",
    seeds=3,
)
def circuit_faithfulness(seed: int) -> float:
    """F(circuit) / F(model) on fresh texts, IO - S."""
    return float(fresh_task(seed).faithfulness(found_circuit())[0])


@claim(
    "ioi-closeness",
    "1 less the distance of F(circuit) / F(model) from 1, on the worse of IO - S and IO - others",
    source="measured in the lesson",
    tolerance=">= 0.9",
    seeds=3,
)
def circuit_closeness(seed: int) -> float:
    """How close the circuit is to the model on the metric that is farther off."""
    return fresh_task(seed).closeness(found_circuit())


@claim(
    "ioi-first-choice",
    "Share of those texts where the circuit alone names the receiver",
    source="measured in the lesson",
    tolerance=">= 0.9",
    seeds=3,
)
def circuit_first_choice(seed: int) -> float:
    """Share of fresh texts where the circuit alone names the receiver."""
    return fresh_task(seed).first_choice(found_circuit())


@claim(
    "ioi-random",
    "Negative control: the best closeness of 10 random circuits with as many nodes at each role",
    source="Wang et al. 2022, section 4",
    tolerance="<= 0.5",
    seeds=3,
    fast=False,
)
def random_closeness(seed: int, count: int = 10) -> float:
    """The best closeness of random circuits of equal size at the same roles."""
    task = fresh_task(seed)
    return max(map(task.closeness, random_circuits(task, found_circuit(), count, seed)))


@claim(
    "ioi-blind",
    "Closeness of the circuit without the heads that look at S2: it cannot tell who comes twice",
    source="derived: 0 where neither name is preferred",
    published="0",
    tolerance="<= 0.4",
    seeds=3,
)
def closeness_without_cue(seed: int) -> float:
    """Closeness of the circuit without S-inhibition."""
    return fresh_task(seed).closeness(found_circuit() - job_groups().get("S-inhibition", set()))


@claim(
    "ioi-duplicate",
    "Highest mean attention of any head from a second mention to the first",
    source="Wang et al. 2022, section 3, duplicate-token heads",
    tolerance=">= 0.5",
    seeds=3,
)
def looks_back(seed: int) -> float:
    """The highest mean attention of any head from S2 to S1."""
    return float(attention_by_role(fresh_task(seed))["S2", "S1"].max())


@claim(
    "ioi-minimality",
    "Change of the metric that changes more, when the least important node leaves the circuit",
    source="Wang et al. 2022, section 4",
    tolerance=">= 0.005",
    seeds=3,
)
def least_needed(seed: int) -> float:
    """Minimality: the larger change of the two metrics for the node that matters least."""
    return min(float(x.max()) for x in minimality(fresh_task(seed), found_circuit()).values())
