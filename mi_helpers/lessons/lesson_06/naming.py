"""Names of latents that can be tested: a name predicts where a latent fires in unread text.

    "about: chess"                      in texts about chess
    "at: the, each"                     at these tokens
    "after: of"                         at the token after one of these
    "about: chess & at: the"            where both are so

A name is right as far as it predicts strong firings on held-out text: F1 = 2 TP / (said + strong).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mi_helpers.course.answers import Wrong, describe
from mi_helpers.course.investigate import listed
from mi_helpers.layouts import Key
from mi_helpers.lessons.lesson_06.rivals import read_texts, texts
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.concepts import STRONG
from mi_helpers.saes.scores import f1
from mi_helpers.saes.sources import TinyWorldText

SIGNS = {"": "blank", ",": "comma", "&": "and sign"}  # tokens that a name could not hold
LEAST = 60  # strong firings that a latent has to have before it is given to be named
SEEN, MOST = 3, 8  # strong firings at a value, and values in a name, of a name found by counting


@dataclass(frozen=True)
class Sample:
    """Tokens of text of all families, and what a name may speak of.

    Args:
        facts: {"about", "at", "after": (n,) texts}: the document's subject, the token itself, and
            the one before it.
        values: (n, latents).
    """

    facts: dict[str, np.ndarray]
    values: np.ndarray


def spelt(token: str) -> str:
    """A token as a name has it: without blanks around it, and signs by their name."""
    return SIGNS.get(token.strip(), token.strip())


def sample(
    model: LanguageModel,
    coder: SparseCoder,
    site: Key,
    seed: int,
    each: int = 4,
    others: int = 200,
) -> Sample:
    """A sample of TinyWorld's text: of each topic some, and all families as they come."""
    documents = texts(each, others, seed, TinyWorldText().world.topics)
    facts: dict[str, list[str]] = {"about": [], "at": [], "after": []}
    values = []
    for number, ids, (x,) in read_texts(model, [d.text for d in documents], [site]):
        tokens = [spelt(model.token_text(i)) for i in ids]
        document = documents[number]
        topic = document.latents["topic"] if document.family == "prose" else document.family
        facts["about"] += [topic] * len(ids)
        facts["at"] += tokens
        facts["after"] += ["", *tokens][: len(ids)]
        values.append(coder.encode(x).detach().numpy())
    return Sample({k: np.array(v) for k, v in facts.items()}, np.concatenate(values))


def strong(found: Sample, latent: int, highest: float) -> np.ndarray:
    """Where a latent fires at a quarter or more of what it reaches, (n,)."""
    return found.values[:, latent] >= STRONG * max(highest, 1e-6)


def subjects() -> list[str]:
    """What a text can be about: the topics of prose, and the other families."""
    world = TinyWorldText().world
    return [*world.topics, *(name for name in world.families if name != "prose")]


# ------------------------------------------------------------------------------------- names


def parts_of(name: object) -> list[tuple[str, set[str]]]:
    """A name as [(kind, values)], all of which have to be so.

    Raises:
        Wrong: it is no name.
    """
    form = '"about: chess", "at: the, each", "after: of", or two of them with & between'
    if not isinstance(name, str):
        raise Wrong(f"A name is a text such as {form}, not {describe(name)}.")
    found = []
    for part in name.split("&"):
        match = re.fullmatch(r"\s*(about|at|after)\s*:(.+)", part)
        if not match:
            raise Wrong(f"{describe(name)} is no name: write {form}.")
        values = {spelt(value) for value in match[2].split(",")}
        unknown = sorted(values - set(subjects())) if match[1] == "about" else []
        if unknown:
            raise Wrong(f"No text is about {unknown[0]!r}: choose among {listed(subjects())}.")
        found.append((match[1], values))
    return found


def says(name: str, found: Sample) -> np.ndarray:
    """Where a name says that its latent fires, (n,), booleans."""
    masks = [np.isin(found.facts[kind], list(values)) for kind, values in parts_of(name)]
    return np.logical_and.reduce(masks)


def best_values(fact: np.ndarray, fires: np.ndarray, within: np.ndarray) -> tuple[list[str], float]:
    """The values of a fact that together predict best where a latent fires, and their F1.

    Values exclude one another, so those with the highest shares of firings are best: as many of
    them as give the highest F1, MOST at most.

    Args:
        within: (n,), the rows at which a name may say that it fires.
    """
    values, index = np.unique(fact[within], return_inverse=True)
    hits = np.bincount(index, fires[within], len(values))
    said = np.bincount(index, minlength=len(values))
    order = np.argsort(-(hits / np.maximum(said, 1)) * (hits >= SEEN), kind="stable")[:MOST]
    scores = 2 * hits[order].cumsum() / (said[order].cumsum() + fires.sum())
    most = int(scores.argmax()) + 1 if len(scores) else 0
    return values[order[:most]].tolist(), float(scores.max(initial=0.0))


def best_name(found: Sample, latent: int) -> tuple[str, float]:
    """The name that predicts a latent's strong firings best in a sample, and its F1 there."""
    fires = strong(found, latent, found.values[:, latent].max())
    everywhere, names = np.ones(len(fires), dtype=bool), []
    for kind, fact in found.facts.items():
        values, score = best_values(fact, fires, everywhere)
        first = f"{kind}: {', '.join(values)}"
        names.append((score, first))
        if kind == "about":
            inside = np.isin(fact, values)
            for other in ("at", "after"):
                values, score = best_values(found.facts[other], fires, inside)
                names.append((score - 0.02, f"{first} & {other}: {', '.join(values)}"))
    score, name = max(names)
    return name, score


def sort_of(name: str) -> str:
    """What a name speaks of: a topic of prose, another sort of text, a token, the one before it, or
    two of these."""
    parts = parts_of(name)
    if len(parts) > 1:
        return "two things"
    ((kind, values),) = parts
    topic = kind == "about" and values <= set(TinyWorldText().world.topics)
    return "topic" if topic else kind


def halves(found: Sample) -> tuple[Sample, Sample]:
    """The first and the second half of a sample's tokens."""
    half = len(found.values) // 2
    return tuple(
        Sample({k: v[part] for k, v in found.facts.items()}, found.values[part])
        for part in (slice(half), slice(half, None))
    )


def to_be_named(found: Sample, n: int = 5) -> list[int]:
    """Latents of several sorts that can be named: n of them, in the order of their numbers.

    In turns the best of those whose best name is of each sort, see `sort_of`; found on the first
    half of the sample, and judged on the second.
    """
    early, late = halves(found)
    highest = found.values.max(0)
    counts = (early.values >= STRONG * np.maximum(highest, 1e-6)).sum(0)
    by_kind: dict[str, list[tuple[float, int]]] = {}
    for latent in map(int, np.flatnonzero(counts >= LEAST)):
        name, _ = best_name(early, latent)
        score = f1(says(name, late), strong(late, latent, highest[latent]))
        by_kind.setdefault(sort_of(name), []).append((score, latent))
    queues = [sorted(row, reverse=True) for _, row in sorted(by_kind.items())]
    chosen: list[int] = []
    while len(chosen) < n and any(queues):
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0)[1])
    return sorted(chosen)
