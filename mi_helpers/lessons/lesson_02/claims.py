"""Lesson 02's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import numpy as np

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_02.experiments import (
    SineNets,
    number_tasks,
    posteriors,
    removal,
)
from mi_helpers.lessons.shared import collect, documents_for, shipped_model
from mi_helpers.probes import (
    all_orders,
    circle_error,
    class_means,
    fit_probe,
    held_out_weights,
    surprise,
)
from mi_helpers.tinyworld.world import World


@claim(
    "sine-climb",
    "y > sin x: accuracy of a probe on the last hidden layer, less that on the input",
    source="Alain and Bengio 2016, linear classifier probes; trained in the lesson",
    tolerance=">= 0.15",
)
def sine_gain(seed: int) -> float:
    """Accuracy of a probe on the last hidden layer less that on the input, mean of three nets."""
    found = SineNets(nets=3, seed=seed).train().accuracies().mean(0)
    return float(found[-1] - found[0])


@claim(
    "entropy-bound",
    "Topic probes: cross-entropy less H(topic | words so far), smallest over layers, nats",
    source="derived: cross-entropy >= H(Y | representation) >= H(Y | text)",
    tolerance=">= -0.03",
)
def distance_to_floor(seed: int) -> float:
    """The smallest, over the layers, of a topic probe's cross-entropy less H(topic | words)."""
    world, model = World(), shipped_model()
    train = collect(model, documents_for("topic", 1_000, 2 * seed), "topic")
    test = collect(model, documents_for("topic", 400, 2 * seed + 1, held=True), "topic")
    classes = np.unique(train.y)
    ideal = surprise(posteriors(world, test, "topic", classes), test.y, classes).mean()
    return min(
        surprise(fit_probe(train[key], train.y).predict_proba(test[key]), test.y, classes).mean()
        - ideal
        for key in train.x
    )


@claim(
    "read-out-both",
    "Agreement: accuracy of the probes for the subject's and the other noun's number, lower",
    source="Elazar et al. 2021, Amnesic probing; measured in the lesson",
    tolerance=">= 0.95",
)
def both_numbers_read_out(seed: int) -> float:
    """The lower accuracy of the two probes, each at its own noun."""
    tasks = number_tasks(shipped_model(), seed)
    return min(removal(*tasks, ("resid_post", 0), place)[0] for place in ("head", "last"))


@claim(
    "used",
    "Share of the verb's margin lost when the subject's number is removed at the subject",
    source="Elazar et al. 2021, Amnesic probing; measured in the lesson",
    tolerance=">= 0.7",
)
def lost_without_the_subjects_number(seed: int) -> float:
    """The share of the verb's margin that is lost when the subject's number is removed."""
    return removal(*number_tasks(shipped_model(), seed), ("resid_post", 0), "head")[1].mean()


@claim(
    "unused",
    "Share of the verb's margin lost when the other noun's number is removed at that noun",
    source="Elazar et al. 2021, Amnesic probing; measured in the lesson",
    published="0",
    tolerance="± 0.05",
)
def lost_without_the_other_nouns_number(seed: int) -> float:
    """The same for the number of the last noun before the verb, at that noun."""
    return removal(*number_tasks(shipped_model(), seed), ("resid_post", 0), "last")[1].mean()


@claim(
    "month-circle",
    "Months on a circle: degrees off for months that the probe never saw, middle layer",
    source="measured in the lesson",
    tolerance="<= 25",
)
def month_error(seed: int, shuffled: bool = False) -> float:
    """Degrees between where months are put by a probe that never saw them, and where they are, in
    the middle layer; with `shuffled`, the median over random orders of the months."""
    model = shipped_model()
    key = ("resid_post", model.n_layers // 2)
    read = collect(model, documents_for("month", 400, seed), "month", [key])
    weights = held_out_weights(class_means(read[key], read.y, 12))
    orders = all_orders(12, most=300, seed=seed)
    errors = [circle_error(weights, order) for order in (orders[1:] if shuffled else orders[:1])]
    return float(np.median(errors))


@claim(
    "month-control",
    "Negative control: the same for shuffled orders of the months, median",
    source="derived: 90 degrees for random places on a circle",
    published="90",
    tolerance="± 15",
)
def shuffled_month_error(seed: int) -> float:
    """The control of `month_error`."""
    return month_error(seed, shuffled=True)
