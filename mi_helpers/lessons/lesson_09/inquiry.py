"""Lesson 09's investigation: ten latents that counting names badly, to be named better.

`score_names` scores a learner's names on text that the notebook does not have; the best that is
known is made of TinyWorld's own words, and stands nowhere but in `known()`.
"""

from __future__ import annotations

import functools

from mi_helpers.course.answers import Wrong, describe
from mi_helpers.course.investigate import investigation
from mi_helpers.lessons.coders import coder_of, middle
from mi_helpers.lessons.lesson_09 import experiments as lab
from mi_helpers.lessons.lesson_09 import names
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.saes.rules import f1


@functools.cache
def lesson() -> lab.Ground:
    """The text that the notebook reads."""
    model = shipped_model()
    return lab.read(model, coder_of(model), middle(model))


@functools.cache
def scoring() -> lab.Ground:
    """The text on which names are scored; the notebook has none of it."""
    model = shipped_model()
    return lab.read(model, coder_of(model), middle(model), seed=77)


@functools.cache
def known() -> dict[int, tuple[str, str]]:
    """{latent: (its counted name, the best known)} of the ten latents."""
    units = lesson().units("latent", 150)
    return names.hard_to_count(lesson(), units, [lab.counted(unit) for unit in units], 10)


def ten() -> list[lab.Unit]:
    """The latents to be named."""
    return lesson().of("latent", list(known()))


def counted_names() -> dict[int, str]:
    """What counting calls them."""
    return {latent: counted for latent, (counted, _) in known().items()}


def best_names() -> dict[int, str]:
    """The best names known: TinyWorld's words, chosen on the text that is seen."""
    return {latent: best for latent, (_, best) in known().items()}


def some_names(rng) -> dict[int, str]:
    """Names drawn without looking: a subject, a role, or tokens of the text."""
    index = lesson().truths.index
    made = (
        lambda: f"about: {rng.choice(index['about'][0])}",
        lambda: f"role: {rng.choice(index['role'][0])}",
        lambda: f"coming: {rng.choice(index['coming'][0])}",
        lambda: f"after: {rng.choice(['of', 'the', 'in', 'and', 'to'])}",
    )
    return {latent: rng.choice(made)() for latent in known()}


@investigation(
    "9",
    title="Beat the counting",
    form='a dictionary of names by latent, such as {17: "about: chess & at: the, each"}',
    chance=some_names,
    best=best_names,
    good=counted_names,
    foolish=["chess", {10**6: "at: the"}, {-1: "at: the"}, [1, 2], {"a": 3}],
)
def score_names(answer) -> float:
    """The mean over the ten latents of the F1 of what their names say of strong firings, on text
    that the notebook does not have."""
    if not isinstance(answer, dict):
        raise Wrong(f"Give a dictionary {{latent: name}}, not {describe(answer)}.")
    strange = [latent for latent in answer if latent not in known()]
    if strange:
        listed = ", ".join(map(str, known()))
        raise Wrong(f"{describe(strange[0])} is none of the ten latents: {listed}.")
    levels, total = {unit.number: unit.level for unit in ten()}, 0.0
    for latent, name in answer.items():
        fires = scoring().values["latent"][:, latent] >= levels[latent]
        total += f1(names.says(name, scoring(), lesson()), fires)
    return total / len(known())


def counted_score() -> float:
    """How well the counted names do: what there is to beat."""
    return score_names(counted_names())
