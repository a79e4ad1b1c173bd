"""What lesson 02 asks besides its exercises: predictions, each measured, and the investigation."""

import functools

import numpy as np

from mi_helpers import probes
from mi_helpers.course.check import Wrong, as_numbers, describe
from mi_helpers.course.investigate import investigation, one_of
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_02 import experiments as lab
from mi_helpers.lessons.lesson_02.tools import control_task, principal_directions, split_by_group
from mi_helpers.lessons.lesson_02.using import (
    CountryTask,
    number_tasks,
    removal,
    truth_sets,
    verdicts,
)
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.probes import mean_difference

# -- predictions -----------------------------------------------------------------------------


@functools.cache
def tasks(seed: int = 90):
    """Agreement sentences for checks and predictions, to find directions in and to test them on."""
    return number_tasks(shipped_model(), seed, 80)


def planes_that_show(n: int = 400) -> list[bool]:
    """By layer: can the subject's number be read off the two directions of most variance?"""
    reader = lab.VerbReader(shipped_model(), n)
    shown, y = [], reader.train.y == "plural"
    for at in reader.sites.values():
        x = reader.train[at]
        plane = (x - x.mean(0)) @ principal_directions(x, 2).T
        shown.append(probes.fit_probe(plane, y).score(plane, y) > 0.9)
    return shown


@prediction(
    "2.11",
    question="Do the two directions of most variance show the subject's number?",
    options=["after every layer", "after some layers", "after none"],
)
def where_a_plane_shows_it() -> str:
    shown = planes_that_show()
    return f"after {'every layer' if all(shown) else 'some layers' if any(shown) else 'none'}"


@prediction(
    "2.12",
    question="After the last layer, which place does the true order take among 360?",
    options=["first", "2nd to 36th", "later"],
)
def rank_of_the_week() -> str:
    rank = week_rank()
    return "first" if rank == 1 else "2nd to 36th" if rank <= 36 else "later"


def week_rank() -> int:
    """The place of the true order of the days among all 360, after the last layer."""
    errors = lab.circle_errors(lab.read(shipped_model(), "day", 400, 6), 7)[:, -1]
    return int((errors <= errors[0] + 1e-9).sum())


@prediction(
    "2.13",
    question="With eight times as many sentences, how often is the probe right on the form?",
    options=["under 10 %", "10 to 50 %", "over 50 %"],
)
def forms_named() -> str:
    site = list(lab.sites_of(shipped_model()).values())[-1]
    curve = lab.memory_curve(shipped_model(), site, control_task, [3200])
    share = curve["which form"][0]
    return "under 10 %" if share < 0.1 else "over 50 %" if share > 0.5 else "10 to 50 %"


@prediction(
    "2.14",
    question="Where can a probe read the country of a landmark that it has never seen?",
    options=["at the name", "at the last token, if asked for it", "at the last token, always"],
)
def where_the_country_is() -> str:
    found = lab.where_and_when(shipped_model(), split_by_group, "landmark")
    best = {name: rows.mean(0).max() for name, rows in found.items()}
    if best["name, country asked"] > 0.7:
        return "at the name"
    always = best["last token, city asked"] > 0.7
    return "at the last token, always" if always else "at the last token, if asked for it"


@prediction(
    "2.15",
    question="How often is the cities' direction right on negated statements?",
    options=["as often as on cities", "about half of the time", "mostly wrong"],
)
def right_when_negated() -> str:
    cities = verdicts(shipped_model(), "landmark-city", 200, 4)
    sets = truth_sets(shipped_model(), 100, 3, ("cities", "cities, negated"))
    known, negated = lab.transfer(cities, sets, "last").values()
    found = negated[int(np.argmax(known))]
    names = ("mostly wrong", "about half of the time", "as often as on cities")
    return names[int(found > 0.35) + int(found > 0.7)]


@prediction(
    "2.16",
    question="The other noun's number is removed at that noun. How much of the margin is lost?",
    options=["none", "about half", "all"],
)
def lost_without_the_other_noun() -> str:
    lost = float(removal(*tasks(), ("resid_post", 0), "last").mean())
    return ["none", "about half", "all"][int(lost > 0.25) + int(lost > 0.75)]


# -- the investigation -----------------------------------------------------------------------

LENGTH = 0.25  # of a push, in lengths of the stream there
SEED = 977  # of the sentences that an answer is judged on


@functools.cache
def country_task(seed: int = SEED) -> CountryTask:
    """Sentences on landmarks of two countries; those of `SEED` are the judge's."""
    return CountryTask(shipped_model(), 500, seed)


def push_of(place: str, layer: str, vector) -> tuple:
    """(site, place, the vector at the length that counts)."""
    site = lab.sites_of(shipped_model())[layer]
    v = np.asarray(vector, dtype=float)
    size = np.linalg.norm(country_task().stream[place][site], axis=1).mean()
    return site, place, v / np.linalg.norm(v) * LENGTH * size


def random_push(rng) -> tuple:
    """A place, a layer and a direction, drawn without looking."""
    names = list(lab.sites_of(shipped_model()))
    vector = np.random.default_rng(rng.getrandbits(32)).normal(size=shipped_model().d_model)
    return rng.choice(("name", "last")), rng.choice(names), vector


def pushes(task: CountryTask):
    """(place, layer, direction) for each place and layer: the mean difference, and the gradient."""
    for place in ("name", "last"):
        for layer, site in lab.sites_of(shipped_model()).items():
            found = (
                mean_difference(task.stream[place][site], task.first),
                task.gradient(site, place),
            )
            yield from ((place, layer, v) for v in found if v.any())  # 0 where nobody reads it


@functools.cache
def best_push() -> tuple:
    """The best of `pushes`, found on other sentences than the judge's, tried on the judge's."""
    return max(pushes(country_task(5)), key=turned)


def turned(answer: tuple) -> float:
    """The share of the judge's sentences whose answer follows a push."""
    return country_task().follows(*push_of(*answer))


@investigation(
    "2",
    title="Where is the country used?",
    form='a place, a layer and a direction, such as ("name", "0", v), v with d_model numbers',
    chance=random_push,
    best=best_push,
    good=lambda: ("last", last_layer(), mean_difference(*last_stream())),
    foolish=[
        "last",
        ("last", "2"),
        ("verb", "2", np.ones(144)),
        ("last", "99", np.ones(144)),
        ("last", "2", np.ones(3)),
        ("last", "2", np.zeros(144)),
        ("last", "2", ["a"] * 144),
    ],
)
def score_push(answer) -> float:
    """The share of answers that follow a push of a fixed length, as `Choice.follows` counts."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise Wrong(
            f'Give a place, a layer and a direction, ("last", "2", v), not {describe(answer)}.'
        )
    place = one_of(answer[0], ("name", "last"), "places")
    layer = one_of(str(answer[1]), lab.sites_of(shipped_model()), "layers")
    try:
        vector = as_numbers(answer[2])
    except (TypeError, ValueError):
        raise Wrong(f"The direction is {describe(answer[2])}: give numbers.") from None
    if vector.shape != (shipped_model().d_model,) or not np.isfinite(vector).all():
        raise Wrong(f"The direction has shape {vector.shape}: give ({shipped_model().d_model},).")
    if not vector.any():
        raise Wrong("The direction is zero: it points nowhere.")
    return turned((place, layer, vector))


def last_layer() -> str:
    """The name of the last layer but one."""
    return list(lab.sites_of(shipped_model()))[-2]


def last_stream() -> tuple:
    """What the learner would take: the stream at the last token there, and which country."""
    task = country_task(5)
    return task.stream["last"][lab.sites_of(shipped_model())[last_layer()]], task.first
