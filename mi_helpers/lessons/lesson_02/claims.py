"""Lesson 02's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import numpy as np

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_02 import experiments as lab
from mi_helpers.lessons.lesson_02.sine import SineNets
from mi_helpers.lessons.lesson_02.using import (
    VerdictTask,
    number_tasks,
    removal,
    truth_sets,
    verdicts,
)
from mi_helpers.lessons.shared import documents_for, shipped_model
from mi_helpers.probes import control_task, fit_probe, mean_difference, split_by_group, surprise
from mi_helpers.tinyworld.world import World

AMNESIC = "Elazar et al. 2021, Amnesic probing; measured in the lesson"
CONTROL = "Hewitt and Liang 2019, control tasks; measured in the lesson"
TRUTH = "Marks and Tegmark 2023, The Geometry of Truth; measured in the lesson"


@claim(
    "sine-climb",
    "y > sin x: accuracy of a probe on the last hidden layer, less that on the input",
    source="Alain and Bengio 2016, linear classifier probes; trained in the lesson",
    tolerance=">= 0.15",
)
def sine_gain(seed: int) -> float:
    """Mean over three nets."""
    found = SineNets(nets=3, seed=seed).train().accuracies().mean(0)
    return float(found[-1] - found[0])


def number_scan(seed: int) -> tuple[lab.Readings, lab.Readings]:
    """The stream before the verb, to train on, and on new phrasings, to test on."""
    model = shipped_model()
    return lab.read(model, "number", 400, 2 * seed), lab.read(
        model, "number", 300, 2 * seed + 1, True
    )


@claim(
    "number-read",
    "The subject's number, read at another noun after the last layer: accuracy, new phrasings",
    source="Linzen et al. 2016, agreement with attractors; measured in the lesson",
    tolerance=">= 0.95",
)
def number_read(seed: int) -> float:
    return lab.by_layer(*number_scan(seed))[-1]


@claim(
    "number-control",
    "Its control task, at the same token and layer, with the same 400 sentences",
    source=CONTROL,
    tolerance="<= 0.75",
)
def number_control(seed: int) -> float:
    train, test = number_scan(seed)
    table = control_task([*train.words, *test.words], train.y.tolist(), seed)
    y = [[table[word] for word in each.words] for each in (train, test)]
    return lab.by_layer(train, test, *y)[-1]


@claim(
    "identity-read",
    "Yet the subject's form, one of sixty, is read there from 3,200 sentences: accuracy",
    source="measured in the lesson",
    tolerance=">= 0.5",
    fast=False,
)
def identity_read(seed: int) -> float:
    """On new sentences, after the last layer."""
    model = shipped_model()
    site = list(lab.sites_of(model).values())[-1]
    sets = ((3_200, 2 * seed), (600, 2 * seed + 1))
    train, new = (
        lab.collect(model, documents_for("number", n, 500 + s), "number", [site]) for n, s in sets
    )
    return fit_probe(train[site], train.words).score(new[site], new.words)


def country_cell(seed: int, cell: str) -> float:
    """A landmark's country on new landmarks, at the best layer, mean over four splits."""
    found = lab.where_and_when(shipped_model(), split_by_group, "landmark", seed=seed)
    return float(found[cell].mean(0).max())


@claim(
    "country-name",
    "Landmarks never seen: accuracy for their country at the end of their names, best layer",
    source="measured in the lesson",
    tolerance="<= 0.6",
    seeds=3,
    fast=False,
)
def country_at_the_name(seed: int) -> float:
    return country_cell(seed, "name, country asked")


@claim(
    "country-last",
    "The same at the last token of a text that asks for the city only, best layer",
    source="measured in the lesson",
    tolerance=">= 0.7",
    seeds=3,
    fast=False,
)
def country_at_the_end(seed: int) -> float:
    return country_cell(seed, "last token, city asked")


def circle(kind: str, n: int, seed: int) -> np.ndarray:
    """Degrees off for held-out classes, (orders, layers), the true order first."""
    return lab.circle_errors(lab.read(shipped_model(), kind, 400, seed), n)


@claim(
    "month-circle",
    "Months on a circle: degrees off for months that the probe never saw, best layer",
    source="Engels et al. 2024, Not all language model features are linear; measured in the lesson",
    tolerance="<= 30",
)
def month_error(seed: int) -> float:
    return float(circle("month", 12, seed)[0].min())


@claim(
    "month-control",
    "Control: the same for shuffled orders of the months, each at its best layer, median",
    source="measured in the lesson",
    tolerance=">= 60",
)
def shuffled_month_error(seed: int) -> float:
    return float(np.median(circle("month", 12, seed)[1:].min(1)))


@claim(
    "day-order",
    "Days on a circle, after the last layer: share of all 360 orders as good as the true one",
    source="Engels et al. 2024, Not all language model features are linear; measured in the lesson",
    tolerance="<= 0.05",
)
def day_order(seed: int) -> float:
    errors = circle("day", 7, seed)[:, -1]
    return float((errors <= errors[0] + 1e-9).mean())


@claim(
    "entropy-bound",
    "Topic probes: cross-entropy less H(topic | words so far), smallest over layers, nats",
    source="derived: cross-entropy >= H(Y | representation) >= H(Y | text)",
    tolerance=">= -0.03",
)
def distance_to_floor(seed: int) -> float:
    p, fresh, classes = lab.topic_probes(shipped_model(), 1_000, 400, 2 * seed)
    ideal = surprise(lab.posteriors(World(), fresh, classes), fresh.y, classes).mean()
    return float(min(surprise(each, fresh.y, classes).mean() for each in p.values()) - ideal)


@claim(
    "read-out-both",
    "Agreement: accuracy of the probes for the subject's and the other noun's number, lower",
    source=AMNESIC,
    tolerance=">= 0.95",
)
def both_numbers_read_out(seed: int) -> float:
    """Each at its own noun, after the first layer."""
    train, test = number_tasks(shipped_model(), seed)
    at = ("resid_post", 0)
    return min(
        fit_probe(train.stream[place][at], train.plural[place]).score(
            test.stream[place][at], test.plural[place]
        )
        for place in ("head", "last")
    )


@claim(
    "used",
    "Share of the verb's margin lost when the subject's number is removed at the subject",
    source=AMNESIC,
    tolerance=">= 0.6",
)
def lost_without_the_subjects_number(seed: int) -> float:
    return removal(*number_tasks(shipped_model(), seed), ("resid_post", 0), "head").mean()


@claim(
    "unused",
    "Share of the verb's margin lost when the other noun's number is removed at that noun",
    source=AMNESIC,
    published="0",
    tolerance="± 0.05",
)
def lost_without_the_other_nouns_number(seed: int) -> float:
    return removal(*number_tasks(shipped_model(), seed), ("resid_post", 0), "last").mean()


def truth(seed: int, name: str) -> tuple[VerdictTask, VerdictTask]:
    """Statements on cities to find the direction in, and one of `SETS` to try it on."""
    model = shipped_model()
    cities = verdicts(model, "landmark-city", 300, 50 + seed)
    return cities, truth_sets(model, 200, 60 + seed, [name])[name]


def truth_read(seed: int, name: str) -> float:
    """The accuracy of the cities' direction before the verdict, after the last layer."""
    cities, task = truth(seed, name)
    return lab.transfer(cities, {name: task}, "last")[name][-1]


@claim(
    "truth-currencies",
    "A direction found on true and false cities, tried on currencies: share of statements right",
    source=TRUTH,
    tolerance=">= 0.85",
)
def truth_on_currencies(seed: int) -> float:
    return truth_read(seed, "currencies")


@claim(
    "truth-negated",
    "The same on negated statements: share right",
    source=TRUTH,
    tolerance=">= 0.85",
)
def truth_on_negations(seed: int) -> float:
    return truth_read(seed, "cities, negated")


@claim(
    "truth-continents",
    "The same on continents, a relation that the model never saw judged: share right",
    source="measured in the lesson",
    published="1/2",
    tolerance="± 0.2",
)
def truth_on_continents(seed: int) -> float:
    return truth_read(seed, "continents")


def follow(seed: int, random: bool) -> float:
    """The share of verdicts on continents that follow a push before the verdict, last layer."""
    cities, task = truth(seed, "continents")
    site = list(lab.sites_of(shipped_model()).values())[-1]
    v = mean_difference(cities.stream["last"][site], cities.truth)
    if random:
        noise = np.random.default_rng(seed).normal(size=v.shape)
        v = noise * np.linalg.norm(v) / np.linalg.norm(noise)
    return task.follows(site, "last", v)


@claim(
    "truth-push",
    "Yet verdicts on continents that follow a push along that direction: share",
    source=TRUTH,
    tolerance=">= 0.9",
)
def verdicts_follow(seed: int) -> float:
    return follow(seed, random=False)


@claim(
    "truth-push-control",
    "Control: the same with a random direction of that length",
    source="derived: no effect",
    published="0",
    tolerance="± 0.3",
)
def verdicts_follow_noise(seed: int) -> float:
    return follow(seed, random=True)
