"""Lesson 10's rows of the ledger: what steering does, what it costs, and what its controls do."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.lesson_10 import experiments as lab10
from mi_helpers.lessons.lesson_10.experiments import BRIDGE, HIGH, Lab
from mi_helpers.lessons.lesson_10.tools import cost_of, fair_control, mirror
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.steering import (
    Add,
    Clamp,
    Erase,
    Latent,
    Steering,
    random_directions,
    steered,
)

SITE = lab10.middle(shipped_model())
SOURCE = "Templeton et al. 2024, Scaling Monosemanticity, steering with the Golden Gate feature"


@functools.cache
def bridge(topic: str = BRIDGE) -> Latent:
    """A topic's latent."""
    coder = lab10.coder_of(shipped_model())
    return Latent(coder, lab10.latent_of(shipped_model(), coder, topic))


@functools.cache
def tokens() -> Tensor:
    """The stream at tokens of prose, (rows, d_model)."""
    return lab10.tokens_of(shipped_model(), lab10.prose(20, 9), SITE)


@functools.cache
def lab(seed: int, topic: str | None = None) -> Lab:
    """A lab for each seed, with starts about a topic or about anything."""
    return Lab(shipped_model(), 100 + seed, n=24, topic=topic)


@functools.cache
def tried(seed: int, steering: Steering) -> dict[str, float]:
    """`experiments.tried` at the bridge."""
    return lab10.tried(lab(seed), SITE, steering, BRIDGE)


@functools.cache
def highest(how: type) -> Steering:
    """The bridge's latent, clamped or added, at the dose of `HIGH`."""
    return how(bridge(), HIGH)


def by_chance(seed: int, what: str, n: int = 3) -> float:
    """The mean of a measure over random directions like the activations, at the same dose."""
    drawn = random_directions(bridge().direction, n, seed, like=tokens())
    return float(np.mean([lab10.tried(lab(seed), SITE, Add(v, HIGH), BRIDGE)[what] for v in drawn]))


@claim(
    "steer-about",
    "Golden Gate latent of tiny-gemma clamped to 16: share of the topical words written that are "
    "the topic's",
    source=SOURCE,
    tolerance=">= 0.75",
    seeds=3,
)
def share_clamped(seed: int) -> float:
    """The share about the bridge, clamped."""
    return tried(seed, highest(Clamp))["share"]


@claim(
    "steer-topics",
    "The same of the latents of six other topics, median",
    source=SOURCE,
    tolerance=">= 0.6",
    seeds=3,
    fast=False,
)
def share_of_topics(seed: int) -> float:
    """The median share over six topics, each with its own latent."""
    found = []
    for topic in ("chess", "virology", "banking", "sailing", "war", "music"):
        with steered(shipped_model(), SITE, Clamp(bridge(topic), HIGH)):
            found.append(lab(seed).share(topic))
    return float(np.median(found))


@claim(
    "steer-random",
    "Control: three random directions like the activations, of equal norm and dose",
    source="measured in the lesson",
    tolerance="<= 0.2",
    seeds=3,
    fast=False,
)
def share_by_chance(seed: int) -> float:
    """The share about the bridge under random directions."""
    return by_chance(seed, "share")


@claim(
    "steer-cost",
    "Cost of that clamp, nats per answer, mean over all families",
    source="measured in the lesson",
    tolerance=">= 0.5",
    seeds=3,
    fast=False,
)
def cost_clamped(seed: int) -> float:
    """What the clamp costs on the families' answers."""
    return tried(seed, highest(Clamp))["cost"]


@claim(
    "steer-cost-random",
    "Control: the cost of the random directions, as a share of the latent's",
    source="measured in the lesson",
    tolerance="<= 0.7",
    seeds=3,
    fast=False,
)
def cost_by_chance(seed: int) -> float:
    """What random directions cost, over what the latent costs."""
    return by_chance(seed, "cost") / cost_clamped(seed)


@claim(
    "steer-clamp-gentler",
    "Nats per written token, to the unsteered model: the latent added less the latent clamped",
    source="derived: at the topic's own words the latent is on, and a clamp adds what is missing",
    tolerance=">= 0.2",
    seeds=3,
    fast=False,
)
def gentler(seed: int) -> float:
    """How much stranger the text is when the latent is added."""
    return tried(seed, highest(Add))["surprise"] - tried(seed, highest(Clamp))["surprise"]


@functools.cache
def added_less_clamped(seed: int) -> dict[str, float]:
    """The difference of both costs where four in five topical words are the topic's."""
    found = []
    for how in (Add, Clamp):
        rows = [lab10.tried(lab(seed), SITE, how(bridge(), d), BRIDGE) for d in (8, 12, 16, 24)]
        share = [row["share"] for row in rows]
        found.append({k: cost_of(0.8, share, [row[k] for row in rows]) for k in rows[0]})
    return {name: found[0][name] - found[1][name] for name in ("cost", "surprise")}


@claim(
    "steer-equal-text",
    "Nats per written token at an equal share of 0.8: added less clamped",
    source="Louapre 2025, The Eiffel Tower Llama: clamping keeps more of the fluency",
    tolerance=">= 0.2",
    seeds=3,
    fast=False,
)
def stranger(seed: int) -> float:
    """How much stranger the text is at equal effect."""
    return added_less_clamped(seed)["surprise"]


@claim(
    "steer-equal-cost",
    "Cost on other answers at an equal share of 0.8, nats: added less clamped",
    source="derived: the clamp needs the higher dose, and on other texts both are the same",
    tolerance="<= 0.1",
    seeds=3,
    fast=False,
)
def cheaper(seed: int) -> float:
    """How much more an addition costs other answers at equal effect: nothing."""
    return added_less_clamped(seed)["cost"]


def erased(seed: int, direction) -> float:
    """The share about the bridge in texts that begin about it, without a direction."""
    with steered(shipped_model(), SITE, Erase(direction, tokens().mean(0))):
        return lab(seed, BRIDGE).share(BRIDGE)


@claim(
    "steer-erased",
    "Texts that begin about the bridge, the latent's direction erased: share about it",
    source="measured in the lesson",
    tolerance="<= 0.15",
    seeds=3,
    fast=False,
)
def share_erased(seed: int) -> float:
    """The share without the latent's direction."""
    return erased(seed, bridge().direction)


@claim(
    "steer-erased-random",
    "Control: the same with a random direction like the activations erased",
    source="measured in the lesson",
    tolerance=">= 0.5",
    seeds=3,
    fast=False,
)
def share_erased_by_chance(seed: int) -> float:
    """The share without a random direction."""
    return erased(seed, random_directions(bridge().direction, 1, seed, like=tokens())[0])


# -- tense and voice -------------------------------------------------------------------------


@claim(
    "steer-tense",
    "Present texts, one difference of means added: p(was, were) of p(is, are, was, were)",
    source="Turner et al. 2023, Steering Language Models With Activation Engineering",
    tolerance=">= 0.7",
    seeds=3,
    fast=False,
)
def tense_turned(seed: int) -> float:
    """The share of the past in texts whose verbs were in the present."""
    v, _ = lab10.verbs(shipped_model(), 160, 10 + seed).means(SITE)
    fork = lab10.verbs(shipped_model(), 80, 50 + seed)
    with steered(shipped_model(), SITE, Add(v)):
        return float(fork.share()[~fork.y].mean())


def voice_gap(seed: int) -> tuple[float, float]:
    """Praise's share after praise less that after blame: of the model, of an ideal reader."""
    fork, ideal = lab10.voices(shipped_model(), 120, 30 + seed)
    return tuple(float(x[fork.y].mean() - x[~fork.y].mean()) for x in (fork.share(), ideal))


@claim(
    "steer-voice-known",
    "Praise's share of evaluative words: after praise less after blame, tiny-gemma",
    source="measured in the lesson: nothing to steer, as the model does not know it",
    tolerance="<= 0.15",
    seeds=3,
    fast=False,
)
def voice_known(seed: int) -> float:
    """How far the model tells praise from blame."""
    return voice_gap(seed)[0]


@claim(
    "steer-voice-ideal",
    "The same of an ideal reader of the same words",
    source="derived from the generator: four words in five are of the text's own voice",
    tolerance=">= 0.4",
    seeds=3,
    fast=False,
)
def voice_ideal(seed: int) -> float:
    """How far an ideal reader does."""
    return voice_gap(seed)[1]


@claim(
    "steer-voice-moved",
    "Praise's share with two differences of means added less that with two taken away",
    source="measured in the lesson",
    tolerance="<= 0.35",
    seeds=3,
    fast=False,
)
def voice_moved(seed: int) -> float:
    """How far praise and blame can be steered."""
    v, _ = lab10.voices(shipped_model(), 240, 40 + seed)[0].means(SITE)
    fork, _ = lab10.voices(shipped_model(), 60, 30 + seed)
    found = []
    for dose in (2, -2):
        with steered(shipped_model(), SITE, Add(v, dose)):
            found.append(float(fork.share().mean()))
    return found[0] - found[1]


# -- truth -----------------------------------------------------------------------------------


@functools.cache
def truth(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the direction to true, half way between the means, the stream at known verdicts)."""
    known = lab10.statements(shipped_model(), 200, 60 + seed)
    return *known.means(SITE), known.stream(SITE)


@functools.cache
def unseen(seed: int) -> lab10.Fork:
    """Statements on pairs on which the model has read no verdict."""
    return lab10.statements(shipped_model(), 200, 80 + seed, ("entities",))


@functools.cache
def fair(seed: int, n: int = 10) -> Tensor:
    """Random directions like the stream at verdicts, without the direction to true."""
    v, _, x = truth(seed)
    noise = torch.randn(n, len(x), generator=torch.Generator().manual_seed(seed))
    return fair_control(noise, x, v)


@claim(
    "steer-verdicts",
    "Verdicts on pairs without any in training: share right, unsteered",
    source="measured in the lesson; half would be right by chance",
    tolerance=">= 0.6",
    seeds=3,
    fast=False,
)
def verdicts_right(seed: int) -> float:
    """How often the model's own verdicts on unseen pairs are right."""
    return float(((unseen(seed).share() > 0.5) == unseen(seed).y).mean())


@claim(
    "steer-pushed",
    "The same with the mean difference added at every verdict: share right",
    source="derived: half of the statements are true, and all are called true",
    tolerance="± 0.05",
    published="0.5",
    seeds=3,
    fast=False,
)
def pushed_right(seed: int) -> float:
    """How often verdicts are right that were pushed towards true."""
    with steered(shipped_model(), SITE, Add(truth(seed)[0]), -1):
        return float(((unseen(seed).share() > 0.5) == unseen(seed).y).mean())


@claim(
    "steer-pushed-like",
    "Not a fair control: ten random directions like the activations there, of equal norm; how far "
    "verdicts follow, the direction itself having 1",
    source="derived: half of the variance at a verdict lies along the direction itself",
    tolerance=">= 0.25",
    seeds=3,
    fast=False,
)
def follows_like(seed: int) -> float:
    """How far verdicts follow directions drawn from the activations, either way."""
    v, _, x = truth(seed)
    drawn = random_directions(v, 10, seed, like=x)
    return float(np.mean([abs(lab10.follows(unseen(seed), SITE, each)) for each in drawn]))


@claim(
    "steer-pushed-fair",
    "Control: ten of them without their part along the direction, of equal norm",
    source="measured in the lesson",
    tolerance="<= 0.25",
    seeds=3,
    fast=False,
)
def follows_by_chance(seed: int) -> float:
    """How far verdicts follow directions without the concept."""
    return float(np.mean([abs(lab10.follows(unseen(seed), SITE, each)) for each in fair(seed)]))


@claim(
    "steer-mirrored",
    "The same pairs, the stream mirrored along the direction: share of verdicts turned",
    source="Marks and Tegmark 2023, The Geometry of Truth, whose pushes turn known statements",
    tolerance=">= 0.75",
    seeds=3,
)
def verdicts_turned(seed: int) -> float:
    """How many verdicts turn when what points to true points to false."""
    (v, centre, _), fork = truth(seed), unseen(seed)
    after = fork.last(lambda ids: mirror(fork.model, ids, SITE, v, centre))
    return float(((after > 0.5) != (fork.share() > 0.5)).mean())


@claim(
    "steer-mirrored-control",
    "Control: the mirror's steps, each as long, along ten fair directions",
    source="measured in the lesson",
    tolerance="<= 0.25",
    seeds=3,
    fast=False,
)
def turned_by_chance(seed: int) -> float:
    """How many verdicts turn by steps of the same lengths elsewhere."""
    (v, centre, _), fork, found = truth(seed), unseen(seed), []
    for other in fair(seed):
        after = fork.last(
            lambda ids, d=other: lab10.same_steps(fork.model, ids, SITE, v, centre, d)
        )
        found.append(float(((after > 0.5) != (fork.share() > 0.5)).mean()))
    return float(np.mean(found))
