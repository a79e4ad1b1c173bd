"""Lesson 09's rows of the ledger: each function measures one claim, at one seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.coders import coder_of, middle
from mi_helpers.lessons.lesson_09 import experiments as lab
from mi_helpers.lessons.lesson_09.describing import describe
from mi_helpers.lessons.lesson_09.exercises import after_swap
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.saes.naming import RELIABLE

UNITS, TOKENS = 300, 30_000
OURS = "measured in the lesson"
BILLS = "Bills et al. 2023, Language models can explain neurons in language models; " + OURS
HUANG = "Huang et al. 2023, Rigorously Assessing Natural Language Explanations of Neurons; " + OURS


@functools.cache
def measured(seed: int) -> dict[str, float]:
    """What the lesson measures, once: {claim: value}, on one text, with 300 units of each kind."""
    model = shipped_model()
    given = model, coder_of(model), middle(model)
    here = lab.read(*given, 200 + seed, TOKENS)
    found: dict[str, list[lab.Named]] = {}
    for kind in lab.KINDS:
        units = here.units(kind, UNITS, seed)
        found[kind] = [lab.judge(here, u, lab.from_contexts(describe, u)) for u in units]
    latents = found["latent"]
    counted = [lab.judge(here, each.unit, lab.counted(each.unit)) for each in latents]
    good = [each for each in latents if each.score >= RELIABLE]
    others = np.roll([each.name for each in good], 1)
    theirs = [lab.judge(here, n.unit, name) for n, name in zip(good, others, strict=True)]
    known = {hides: [n.right for n in latents if is_hidden(n.unit) == hides] for hides in (0, 1)}
    topics = [lab.judge(here, u, lab.counted(u)).score for u in lab.topic_latents(here, 10)]
    right = [n.unit for n in good if n.right and n.name.startswith("after")]
    words = lab.random_words(model, seed=seed)
    means = {kind: np.mean([each.score for each in some]) for kind, some in found.items()}
    return {
        "ahead": means["latent"] - means["neuron"],
        "random": lab.right_if_reliable(found["random direction"])[1] / UNITS,
        **{kind: right_share(some) for kind, some in found.items()},
        "counted": right_share(counted),
        "natural": np.mean([each.right for each in latents if each.natural >= RELIABLE]),
        "others": np.mean([each.right for each in theirs]),
        "hidden": np.mean(known[0]) - np.mean(known[1]),
        "topics": np.mean(topics),
        "swapped": lab.kept_after_swaps(*given, right, after_swap, words, [0])[0],
    }


def is_hidden(unit: lab.Unit) -> bool | None:
    """Whether a unit goes by what no explainer sees; None where it is not known what it goes by."""
    return unit.truth.hidden if unit.truth else None


def right_share(names: Sequence[lab.Named]) -> float:
    """Of the names that score 0.7 or more, the share that is right."""
    right, reliable = lab.right_if_reliable(names)
    return right / max(reliable, 1)


@claim(
    "names-scores",
    "Names from the contexts shown: the mean score of latents, less that of neurons",
    source=BILLS + "; Cunningham et al. 2023 make the comparison",
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def latents_ahead(seed: int) -> float:
    """The mean score of latents' names, less that of neurons'."""
    return measured(seed)["ahead"]


@claim(
    "names-random",
    "Random directions, on as rarely as latents: share that gets a name of 0.7 or more",
    source="derived: such a direction is made of nothing; " + OURS,
    tolerance=">= 0.03",
    seeds=3,
    fast=False,
)
def random_reliable(seed: int) -> float:
    """The share of random directions with a name that scores 0.7 or more."""
    return measured(seed)["random"]


@claim(
    "names-right-latents",
    "Names from the contexts shown, those of 0.7 or more: share that is right, latents",
    source=HUANG,
    tolerance="<= 0.85",
    seeds=3,
    fast=False,
)
def right_latents(seed: int) -> float:
    """Of latents' names that score 0.7 or more, the share that is right."""
    return measured(seed)["latent"]


@claim(
    "names-right-neurons",
    "The same, neurons",
    source=HUANG,
    tolerance="<= 0.75",
    seeds=3,
    fast=False,
)
def right_neurons(seed: int) -> float:
    """The same of neurons."""
    return measured(seed)["neuron"]


@claim(
    "names-right-random",
    "The same, random directions",
    source=OURS,
    tolerance="<= 0.7",
    seeds=3,
    fast=False,
)
def right_random(seed: int) -> float:
    """The same of random directions."""
    return measured(seed)["random direction"]


@claim(
    "names-right-counted",
    "Names by counting all the text that is seen: the same, latents",
    source=OURS,
    tolerance=">= 0.7",
    seeds=3,
    fast=False,
)
def right_counted(seed: int) -> float:
    """Of latents' counted names that score 0.7 or more, the share that is right."""
    return measured(seed)["counted"]


@claim(
    "names-natural",
    "Latents' names from the contexts shown that score 0.7 over all tokens held out: share right",
    source=OURS + "; Bills et al. 2023 score random texts alone, too",
    tolerance=">= 0.85",
    seeds=3,
    fast=False,
)
def right_naturally(seed: int) -> float:
    """Of latents' names that score 0.7 over all tokens held out, the share that is right."""
    return measured(seed)["natural"]


@claim(
    "names-of-others",
    "Control: each latent with a name of 0.7 or more gets another such one's: share right",
    source="derived: near 0",
    tolerance="<= 0.1",
    seeds=3,
    fast=False,
)
def right_of_others(seed: int) -> float:
    """The share of latents of which another latent's name is right; both score 0.7 or more."""
    return measured(seed)["others"]


@claim(
    "names-hidden",
    "Latents that go by tokens that are seen, less those that go by topic, role or what comes: "
    "share with a right name from the contexts",
    source=OURS,
    tolerance=">= 0.1",
    seeds=3,
    fast=False,
)
def hidden_is_harder(seed: int) -> float:
    """The share of right names of latents whose truth is to be seen, less that of the others."""
    return measured(seed)["hidden"]


@claim(
    "names-topics",
    "The ten latents that tell a topic best: mean score of their counted names",
    source=OURS,
    tolerance="<= 0.6",
    seeds=3,
    fast=False,
)
def topics_unnamed(seed: int) -> float:
    """The mean score of the counted names of the ten latents that tell a topic best."""
    return measured(seed)["topics"]


@claim(
    "names-swapped",
    "Right names 'after: …' of 0.7 or more: share of the value that stays when the token itself is "
    "another",
    source=HUANG,
    tolerance="<= 0.3",
    seeds=3,
    fast=False,
)
def after_is_not_enough(seed: int) -> float:
    """The share of a latent's value that stays when the token at its firing is swapped, though its
    right name speaks of the one before."""
    return measured(seed)["swapped"]
