"""What lesson 10 asks besides its exercises: predictions, each measured, and the investigation."""

import functools

import numpy as np
import torch

from mi_helpers.course.check import Wrong, describe
from mi_helpers.course.investigate import investigation, one_of
from mi_helpers.course.predict import prediction
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.lesson_10 import experiments as lab10
from mi_helpers.lessons.lesson_10.experiments import BRIDGE, HIGH, Lab
from mi_helpers.lessons.lesson_10.tools import contrast, mirror
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.steering import Add, Clamp, Erase, Latent, steered
from mi_helpers.tinyworld.lexicon import topics

THIRDS = ["under a third", "a third to two thirds", "over two thirds"]


@functools.cache
def bridge() -> tuple:
    """(site, the bridge's latent, a lab) that predictions are measured with."""
    model, coder = shipped_model(), lab10.coder_of(shipped_model())
    latent = Latent(coder, lab10.latent_of(model, coder, BRIDGE))
    return lab10.middle(model), latent, Lab(model, 7)


@functools.cache
def tried(how: type) -> dict:
    """What the bridge's latent does and costs at `HIGH`, clamped or added."""
    site, latent, lab = bridge()
    return lab10.tried(lab, site, how(latent, HIGH), BRIDGE)


@prediction(
    "10.10",
    question="Clamped at 16, what share of the topical words is about the bridge?",
    options=THIRDS,
)
def share_at_the_highest() -> str:
    share = tried(Clamp)["share"]
    return THIRDS[int(share > 1 / 3) + int(share > 2 / 3)]


@prediction(
    "10.11",
    question="Which answers does the bridge, clamped at 16, harm most?",
    options=["other prose", "arithmetic", "agreement", "indirect objects"],
)
def dearest_family() -> str:
    site, latent, lab = bridge()
    with steered(lab.model, site, Clamp(latent, HIGH)):
        cost = lab.by_family()
    names = {"prose": "other prose", "ioi": "indirect objects"}
    found = max(("prose", "arithmetic", "agreement", "ioi"), key=lambda name: cost[name])
    return names.get(found, found)


@prediction(
    "10.12",
    question="At a dose of 16, which way writes the stranger text?",
    options=["clamped", "added", "no difference"],
)
def stranger_text() -> str:
    more = tried(Add)["surprise"] - tried(Clamp)["surprise"]
    return "no difference" if abs(more) < 0.1 else "added" if more > 0 else "clamped"


@functools.cache
def truth() -> tuple:
    """(site, direction, centre, statements on unseen pairs)."""
    site = lab10.middle(shipped_model())
    v, centre = lab10.statements(shipped_model(), 200, 70).means(site)
    return site, v, centre, lab10.statements(shipped_model(), 100, 71, ("entities",))


@prediction(
    "10.13",
    question="Pushed towards true, how many verdicts on unseen pairs are right?",
    options=["nearly none", "about half", "nearly all"],
)
def right_when_pushed() -> str:
    site, v, _, fork = truth()
    with steered(fork.model, site, Add(v), -1):
        right = float(((fork.share() > 0.5) == fork.y).mean())
    return ["nearly none", "about half", "nearly all"][int(right > 0.25) + int(right > 0.75)]


@prediction(
    "10.14",
    question="Mirrored, how many of the model's verdicts on unseen pairs turn?",
    options=THIRDS,
)
def turned_when_mirrored() -> str:
    site, v, centre, fork = truth()
    after = fork.last(lambda ids: mirror(fork.model, ids, site, v, centre))
    turned = float(((after > 0.5) != (fork.share() > 0.5)).mean())
    return THIRDS[int(turned > 1 / 3) + int(turned > 2 / 3)]


# -- the investigation -----------------------------------------------------------------------

FORM = "a topic, a layer and a steering, such as ('chess', 3, Add(v, 0.5)), v with d_model numbers"


@functools.cache
def judge() -> Lab:
    """Starts and documents that an answer is scored on; the notebook has others."""
    return Lab(shipped_model(), 977, n=16)


def score_of(lab: Lab, topic: str, layer: int, steering) -> float:
    """The share of topical words about the topic, less the cost in nats per answer."""
    with steered(lab.model, ("resid_post", layer), steering):
        return lab.share(topic) - (lab.loss() - float(np.mean(list(lab.clean.values()))))


@functools.cache
def difference(topic: str, layer: int) -> torch.Tensor:
    """The difference of means between texts about a topic and prose, at a layer."""
    site, model = ("resid_post", layer), shipped_model()
    return contrast(model, site, lab10.texts_about(topic, 20, 31), lab10.prose(40, 32))


def random_steering(rng) -> tuple:
    """A topic, a layer and a direction, drawn without looking, as long as a difference of means."""
    topic, layer = rng.choice(topics()).key, rng.randrange(shipped_model().n_layers)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(size=shipped_model().d_model)
    length = float(difference("chess", layer).norm())
    return topic, layer, Add(noise / np.linalg.norm(noise) * length, 1.0)


@functools.cache
def best_steering(topic: str = "chess") -> tuple:
    """The best of some doses of the difference of means late in the model, to the judge itself:
    what is chosen in another lab is beaten too easily by luck."""
    found = [
        (topic, layer, Add(difference(topic, layer), dose))
        for layer, dose in ((4, 1.0), (5, 1.0), (5, 1.25), (5, 1.5))
    ]
    return max(found, key=lambda answer: score_of(judge(), *answer))


@investigation(
    "10",
    title="About your topic, at the smallest cost",
    form=FORM,
    chance=random_steering,
    best=best_steering,
    draws=4,
    good=lambda: ("chess", 3, Add(difference("chess", 3), 1.0)),
    foolish=[
        "chess",
        ("chess", 3),
        ("poems", 3, Add(np.ones(144))),
        ("chess", 99, Add(np.ones(144))),
        ("chess", 3, np.ones(144)),
        ("chess", 3, Add(np.ones(3))),
        ("chess", 3, Add(np.zeros(144))),
        ("chess", 3, Add(["a"] * 144)),
    ],
)
def score_steering(answer) -> float:
    """The share of the topical words that are the topic's, less the cost, nats per answer."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise Wrong(f"Give {FORM}, not {describe(answer)}.")
    topic = one_of(answer[0], [each.key for each in topics()], "topics")
    layer = one_of(answer[1], range(shipped_model().n_layers), "layers")
    if not isinstance(answer[2], Add | Clamp | Erase):
        raise Wrong(f"The steering is {describe(answer[2])}: give Add, Clamp or Erase.")
    try:
        return score_of(judge(), topic, layer, answer[2])
    except ModelError as error:
        raise Wrong(str(error)) from None
