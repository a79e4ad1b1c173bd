"""What lesson 03 asks besides its exercises: predictions, each measured, and the investigation."""

import functools

import numpy as np

from mi_helpers.ablation import Mean, ablate
from mi_helpers.course.check import Wrong, describe
from mi_helpers.course.investigate import investigation, plain, some_of
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_03 import pronouns
from mi_helpers.lessons.lesson_03.experiments import (
    both_directions,
    part_effects,
    strongest,
    together,
    true_and_guess,
    with_controls,
)
from mi_helpers.lessons.lesson_03.pairs import Pairs, ending_pairs, fact_pairs, pronoun_pairs
from mi_helpers.lessons.lesson_03.tools import patch_heads
from mi_helpers.lessons.shared import make_batch, shipped_model, token_pool
from mi_helpers.patching import activation_patch
from mi_helpers.sweeps import Sweep

# -- predictions -----------------------------------------------------------------------------


def nearest(value: float, options: dict[str, float]) -> str:
    """The option whose number is nearest."""
    return min(options, key=lambda name: abs(options[name] - value))


@prediction(
    "3.10",
    question="At the words between the name and the last token, a patch wins back…",
    options=["next to nothing", "about half", "nearly all"],
)
def between() -> str:
    model, pairs = shipped_model(), fact_pairs(shipped_model(), 16, 0)
    sides = (pairs.clean, pairs.corrupted)
    effect = activation_patch(model, *sides, "resid_pre", pairs.metric(model))
    most = float(effect[:, max(pairs.subject) + 1 : -1].max())
    return nearest(most, {"next to nothing": 0.0, "about half": 0.5, "nearly all": 1.0})


@prediction(
    "3.11",
    question="On the scale from 0 to 1, the untrained model's map will be…",
    options=["empty", "like the trained one's", "full of large numbers"],
)
def untrained_map() -> str:
    model = shipped_model()
    maps, _ = with_controls(model, fact_pairs(model, 16, 0), fact_pairs(model, 16, 0, alike=True))
    trained, blank = (maps[name] for name in ("different cities", "an untrained model"))
    if float((blank - trained).abs().max()) < 0.2:
        return "like the trained one's"
    return "empty" if float(blank.abs().max()) < 0.2 else "full of large numbers"


@prediction(
    "3.12",
    question="With noise on the name, the logit difference will be…",
    options=["as far on the other side", "between the two", "as large as before"],
)
def with_noise() -> str:
    model, pairs = shipped_model(), fact_pairs(shipped_model(), 16, 0)
    noised, ends = pairs.metric(model, pairs.noise()), pairs.metric(model)
    options = {"as far on the other side": 0.0, "between the two": 0.5, "as large as before": 1.0}
    return nearest((noised.corrupted - ends.corrupted) / (ends.clean - ends.corrupted), options)


@prediction(
    "3.13",
    question="How much of the city's difference does the strongest single head win back?",
    options=["under a third", "a third to two thirds", "over two thirds"],
)
def strongest_head() -> str:
    enough, _ = both_directions(shipped_model(), fact_pairs(shipped_model(), 16, 0))
    options = ["under a third", "a third to two thirds", "over two thirds"]
    return options[min(2, int(3 * float(enough.max())))]


@prediction(
    "3.14",
    question="With noise in place of another name, the city's heads will be…",
    options=["as enough as needed", "enough rather than needed", "needed rather than enough"],
)
def directions_under_noise() -> str:
    pairs = fact_pairs(shipped_model(), 8, 0)
    enough, needed = both_directions(shipped_model(), pairs, pairs.noise(2))
    gap = float((enough - needed).flatten()[(enough - needed).abs().argmax()])
    if abs(gap) < 0.15:
        return "as enough as needed"
    return "enough rather than needed" if gap > 0 else "needed rather than enough"


@prediction(
    "3.15",
    question="“last word”: which part of the heads will carry the difference?",
    options=["queries", "keys", "values"],
)
def part_of_the_last_word() -> str:
    effect = part_effects(shipped_model(), ending_pairs(shipped_model(), 16, 0))
    return ["queries", "keys", "values"][int(effect[:3].amax(1).argmax())]


@prediction(
    "3.16",
    question="For which task will the estimate be closer to the true patches?",
    options=["cities", "pronouns"],
)
def better_estimated() -> str:
    model, off = shipped_model(), {}
    for name, pairs in (
        ("cities", fact_pairs(model, 8, 1)),
        ("pronouns", pronoun_pairs(model, 8, 1)),
    ):
        true, guess = (x.mean(0) for x in true_and_guess(model, pairs, "resid_pre"))
        off[name] = abs(guess[true.argmax()] / true.max() - 1)
    return min(off, key=off.get)


@prediction(
    "3.17",
    question="Which costs the other families more?",
    options=["the heads", "the direction", "about the same"],
)
def costs_more() -> str:
    heads, direction = (max(each.values()) for each in side_effects())
    if max(heads, direction) < 1.5 * min(heads, direction):
        return "about the same"
    return "the heads" if heads > direction else "the direction"


def side_effects(seed: int = 0) -> tuple[dict, dict]:
    """{family: nats lost} of the families without pronouns, by removing the carriers of the bias,
    and by removing one direction; both found on every second occupation."""
    model, (learn, _) = shipped_model(), pronouns.learn_and_test()
    carriers = pronouns.carriers(pronouns.head_effects(model, range(3), 12, learn).mean(0))
    heads = ablate(model, carriers, Mean(token_pool(model, sites=["z"])))
    cut = pronouns.without_direction(*pronouns.best_direction(model, learn))
    batch = make_batch(model, answers=12, seed=40_000 + seed)
    found = [pronouns.damage(model, batch, hooks) for hooks in (heads, cut)]
    for each in found:
        each.pop("pronoun")
    return found[0], found[1]


# -- the investigation -----------------------------------------------------------------------

PRICE = 0.03  # of each head


@functools.cache
def judged(seed: int) -> Pairs:
    """Pairs that the investigation is scored on; the lesson has others."""
    return fact_pairs(shipped_model(), 12, 70_000 + seed, "country")


def deep(cell: tuple[int, int]) -> float:
    """What one vector carries, times how deep it is: metric · (layer + 1) / n_layers."""
    model, pairs = shipped_model(), judged(0)
    where = Sweep("positions", layers=cell[0], positions=cell[1])
    sides = (pairs.clean, pairs.corrupted)
    effect = activation_patch(model, *sides, "resid_pre", pairs.metric(model), over=where)
    return float(effect) * (cell[0] + 1) / model.n_layers


def few(heads) -> float:
    """What heads carry together, enough or needed, whichever is less, less a price for each."""
    both = together(shipped_model(), judged(1), heads, patch_heads)
    return min(both) - PRICE * len(heads)


def cells() -> list[tuple[int, int]]:
    """Every vector of the stream but the last token's, as (layer, position)."""
    last = judged(0).clean.shape[1] - 1
    return [(layer, at) for layer in range(shipped_model().n_layers) for at in range(1, last)]


def all_heads() -> list[tuple[int, int]]:
    """Every head, as (layer, head)."""
    model = shipped_model()
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


@functools.cache
def best_known() -> tuple:
    """The best cell of all, and heads added one at a time while that is worth its price."""
    heads: list = []
    while True:
        rest = [head for head in all_heads() if head not in heads]
        best = max(rest, key=lambda head: few([*heads, head]))
        if heads and few([*heads, best]) <= few(heads):
            return max(cells(), key=deep), tuple(heads)
        heads.append(best)


def one_guess() -> tuple:
    """The name's first token as it enters layer 0, and the strongest single head."""
    pairs = judged(0)
    enough, _ = both_directions(shipped_model(), pairs)
    return (0, pairs.subject[0]), strongest(np.asarray(enough), 1)


@investigation(
    "3",
    title="Where is the country, and which heads fetch it?",
    form="a vector, (layer, position), and a list of heads, such as ((0, 1), [(0, 3), (5, 2)])",
    chance=lambda rng: (rng.choice(cells()), rng.sample(all_heads(), 3)),
    best=best_known,
    good=one_guess,
    foolish=[
        (0, 2),
        ((0, 2), []),
        ((99, 2), [(3, 1)]),
        ((0, 2), [(3, 99)]),
        ("name", [(3, 1)]),
        ((0, 8), [(3, 1)]),
    ],
)
def score_country(answer) -> float:
    """Half for the vector, half for the heads."""
    answer = plain(answer)
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], tuple):
        raise Wrong(
            f"Give a vector and a list of heads, ((0, 1), [(0, 3)]), not {describe(answer)}."
        )
    length = judged(0).clean.shape[1]
    layer, position = (*answer[0], None, None)[:2]
    if isinstance(position, int) and -length <= position < 0:
        position += length
    (cell,) = some_of([(layer, position)], cells(), "vectors before the last token")
    return (deep(cell) + few(some_of(answer[1], all_heads(), "heads"))) / 2
