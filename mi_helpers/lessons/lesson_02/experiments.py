"""Lesson 02's experiments with probes: layers, controls, identity, place and question, the bound.

reader = VerbReader(model)                              # one probe per layer
reader.read("The keys near the cabinet")                # {layer: p(plural)}
two_way(model, untrained(model), "topic", control_task) # a probe and three controls, chance 1/2
where_and_when(model, split_by_group, "landmark")       # the country, by place and by question
posteriors(world, readings, classes)                    # what an ideal reader knows
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from sklearn.pipeline import Pipeline

from mi_helpers.layouts import Key
from mi_helpers.lessons.shared import Readings, collect, documents, documents_for
from mi_helpers.models import LanguageModel
from mi_helpers.probes import (
    all_orders,
    bootstrap,
    circle_error,
    class_means,
    fit_probe,
    held_out_weights,
    mean_difference,
    some_layers,
    token_features,
)
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.grammar import BE_FORMS
from mi_helpers.tinyworld.prose import topic_posterior
from mi_helpers.tinyworld.world import World

# -- sites and what is read there ------------------------------------------------------------


def sites_of(model: LanguageModel) -> dict[str, Key]:
    """{name on an axis: site}: the embedding, and the stream after at most six layers."""
    return {
        "embed" if layer is None else str(layer): (site, layer)
        for site, layer in some_layers(model)
    }


def read(model: LanguageModel, kind: str, n: int, seed: int, held: bool = False) -> Readings:
    """The stream at the token that `kind` marks, in n documents, at the sites of `sites_of`.

    Args:
        held: phrasings and pairs of words that the model was never trained on.
    """
    return collect(model, documents_for(kind, n, seed, held), kind, sites_of(model).values())


def agreement(n: int, seed: int, held: bool = False) -> list:
    """n agreement sentences, in which the subject's number can be read before the verb."""
    return documents_for("number", n, seed, held)


class VerbReader:
    """A probe on each layer for the number of the subject, read at the last token before the verb.

    probes  {name of the layer: probe}
    train   what they were fitted on
    """

    def __init__(self, model: LanguageModel, n: int = 400, seed: int = 1):
        self.model, self.sites = model, sites_of(model)
        self.train = read(model, "number", n, seed)
        plural = self.train.y == "plural"
        self.probes = {name: fit_probe(self.train[at], plural) for name, at in self.sites.items()}
        self.forms = [
            [model.to_single_token(f" {form}") for form in BE_FORMS[number]]
            for number in ("singular", "plural")
        ]

    @torch.no_grad()
    def read(self, text: str) -> tuple[dict[str, float], float]:
        """({layer: p(plural) read at the last token}, the share of are and were in the model's
        probability of is, was, are and were)."""
        sites = [*self.sites.values(), "resid_final"]
        logits, cache = self.model.run_with_cache(text.rstrip(), sites)
        found = {
            name: float(self.probes[name].predict_proba(cache[at][0, -1:].float().cpu())[0, 1])
            for name, at in self.sites.items()
        }
        p = logits[0, -1].float().softmax(-1)
        singular, plural = (float(p[ids].sum()) for ids in self.forms)
        return found, plural / (singular + plural)


# -- controls, at equal layer and equal chance -----------------------------------------------

PROPERTIES = {  # documents to train on, and to test on
    "family": (280, 200),
    "tense": (240, 160),
    "topic": (450, 250),
    "voice": (240, 160),
    "number": (240, 160),
    "country": (400, 250),
    "day": (240, 160),
}
CELLS, MOST, LEAST = 6, 60, 5  # two-way questions a property; examples of a label, most and least


def pairs_of(train: Readings, test: Readings, seed: int = 0) -> list[tuple]:
    """Up to `CELLS` pairs of labels, each with at least `LEAST` examples on both sides."""
    counts = [
        {label: (each.y == label).sum() for label in np.unique(each.y)} for each in (train, test)
    ]
    labels = [label for label in counts[0] if min(c.get(label, 0) for c in counts) >= LEAST]
    pairs = list(itertools.combinations(labels, 2))
    return random.Random(seed).sample(pairs, min(CELLS, len(pairs)))


def evenly(y: np.ndarray, pair: tuple, rng: np.random.Generator) -> np.ndarray:
    """Rows of two labels, equally many of each, at most `MOST`."""
    rows = [rng.permutation(np.flatnonzero(y == label)) for label in pair]
    count = min(MOST, *map(len, rows))
    return np.concatenate([each[:count] for each in rows])


def two_way(
    model: LanguageModel,
    blank: LanguageModel,
    kind: str,
    control_task: Callable,
    share: float = 1.0,
) -> dict[str, np.ndarray]:
    """Accuracy between two labels on new phrasings, with controls: {series: (layers,)}, chance 1/2.

    Means over `CELLS` two-way questions, such as "courts or prison?", with as many examples of one
    label as of the other. The series are
        probe            the model's activations
        control task     the same activations, a random one of the two labels for each word type
        untrained model  the activations of `blank`, a model of the same shape with random weights
        two tokens       the token that is read and the one before it, without any model

    Args:
        kind: a key of `PROPERTIES`.
        control_task: (words, labels, seed) -> {word: label}.
        share: of the documents that `PROPERTIES` asks for.
    """
    sites = sites_of(model).values()
    sets = [
        documents_for(kind, round(share * n), 1 + held, bool(held))
        for held, n in enumerate(PROPERTIES[kind])
    ]
    trained, empty = ([collect(m, each, kind, sites) for each in sets] for m in (model, blank))
    pairs, rng = pairs_of(*trained), np.random.default_rng(0)
    found = []
    for cell in range(CELLS):
        rows = [evenly(each.y, pairs[cell % len(pairs)], rng) for each in trained]
        one, two = (each.where(at) for each, at in zip(trained, rows, strict=True))
        other = [each.where(at) for each, at in zip(empty, rows, strict=True)]
        table = control_task([*one.words, *two.words], one.y.tolist(), cell)
        random_y = [[table[word] for word in each.words] for each in (one, two)]
        bags = [token_features(model, each.tokens) for each in (one, two)]
        said = fit_probe(bags[0], one.y, C=1.0).score(bags[1], two.y)
        found.append(
            [
                by_layer(one, two),
                by_layer(one, two, *random_y) if len(set(random_y[0])) > 1 else [0.5] * len(one.x),
                by_layer(*other),
                [said] * len(one.x),
            ]
        )
    names = ("probe", "control task", "untrained model", "two tokens")
    return dict(zip(names, np.mean(found, 0), strict=True))


def by_layer(train: Readings, test: Readings, y_train=None, y_test=None) -> list[float]:
    """The accuracy on `test` of a probe fitted on `train`, at each site, for their labels or for
    others."""
    y_train = train.y if y_train is None else y_train
    y_test = test.y if y_test is None else y_test
    return [fit_probe(train[key], y_train).score(test[key], y_test) for key in train.x]


def memory_curve(
    model: LanguageModel, site: Key, control_task: Callable, sizes: Sequence[int]
) -> dict[str, list[float]]:
    """What probes at one token read of the subject after so many sentences: {series: accuracies}.

    "number" is its number, "control task" a random label for each form, "which form" the form
    itself, one of about sixty: all on new sentences, and "which form, new phrasings" on held-out
    ones.
    """
    sets = ((max(sizes), 11, False), (600, 12, False), (600, 13, True))
    train, new, held = (
        collect(model, documents_for("number", n, seed, apart), "number", [site])
        for n, seed, apart in sets
    )
    table = control_task([*train.words, *new.words], train.y.tolist(), 0)
    labels = {
        "number": (train.y, new, new.y),
        "control task": ([table[w] for w in train.words], new, [table[w] for w in new.words]),
        "which form": (train.words, new, new.words),
        "which form, new phrasings": (train.words, held, held.words),
    }
    return {
        name: [fit_probe(train[site][:n], y[:n]).score(test[site], truth) for n in sizes]
        for name, (y, test, truth) in labels.items()
    }


# -- where, and when asked -------------------------------------------------------------------

QUESTIONS = {"city": "landmark-city", "country": "landmark-country"}
PLACES = {"name": "country", "last token": "asked"}


def where_and_when(
    model: LanguageModel, split: Callable, by: str, n: int = 600, splits: int = 4, seed: int = 3
) -> dict[str, np.ndarray]:
    """The accuracy of probes for a landmark's country, by place and by what is asked for:
    {"name, city asked": (splits, layers), …}.

    Args:
        split: (groups, share, seed) -> mask of the test set.
        by: "landmark", so that probes are tested on landmarks that they never saw, or "city", so
            that these are in cities that they never saw, either.
    """
    city = {place.name.lower(): place.city for place in lexicon.landmarks()}
    found = {}
    for (place, kind), (asked, relation) in itertools.product(PLACES.items(), QUESTIONS.items()):
        texts = documents("facts", n, seed, relation=relation, count=1)
        each = collect(model, texts, kind, sites_of(model).values())
        groups = each.groups if by == "landmark" else [city[name] for name in each.groups]
        rows = []
        for number in range(splits):
            apart = split(groups, 0.3, seed + number)
            train, test = each.where(~apart), each.where(apart)
            rows.append(by_layer(train, test.where(np.isin(test.y, train.y))))
        found[f"{place}, {asked} asked"] = np.array(rows)
    return found


# -- a circle --------------------------------------------------------------------------------


def circle_errors(each: Readings, n: int, most: int = 400) -> np.ndarray:
    """How far off held-out classes land on a circle, degrees, (orders, layers); the true order is
    row 0, the others are shuffled."""
    orders = all_orders(n, most)
    weights = [held_out_weights(class_means(x, each.y, n)) for x in each.x.values()]
    return np.array([[circle_error(w, order) for w in weights] for order in orders])


# -- the bound -------------------------------------------------------------------------------


def posterior(world: World, document, end: int) -> np.ndarray:
    """p(topic | the text up to character `end`), exact: what an ideal reader knows, (n_topics,).

    Exact where no phrase of several words is cut in two, as at the ends of `document.events`.
    """
    ends, rows = topic_posterior(world.book, document)
    return rows[np.searchsorted(ends, end, side="right") - 1]


def posteriors(world: World, readings: Readings, classes: Sequence) -> np.ndarray:
    """The ideal reader's p(topic) at each mark, (n, classes), columns in the order of `classes`.

    Raises:
        ValueError: classes that are not the world's topics.
    """
    if set(world.topics) != {str(each) for each in classes}:
        raise ValueError(f"The probe knows {len(classes)} topics, the world {len(world.topics)}.")
    columns = [list(world.topics).index(str(each)) for each in classes]
    pairs = zip(readings.documents, readings.marks, strict=True)
    return np.array([posterior(world, document, mark.end) for document, mark in pairs])[:, columns]


def interval(values) -> str:
    """A mean with its 95 % interval, in words."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*bootstrap(values))


def topic_probes(
    model: LanguageModel, n: int = 1200, n_test: int = 500, seed: int = 7
) -> tuple[dict[str, np.ndarray], Readings, np.ndarray]:
    """({layer: a topic probe's probabilities (n, topics)}, the fresh texts, the topics' names)."""
    train = read(model, "topic", n, seed)
    fresh = read(model, "topic", n_test, seed + 1, held=True)
    fitted: dict[str, Pipeline] = {
        name: fit_probe(train[at], train.y) for name, at in sites_of(model).items()
    }
    p = {name: probe.predict_proba(fresh[sites_of(model)[name]]) for name, probe in fitted.items()}
    return p, fresh, np.unique(train.y)


# -- truth -----------------------------------------------------------------------------------


def transfer(train, sets: Mapping, place: str = "statement") -> dict[str, list[float]]:
    """How often the direction of truth in one set of statements is right on others, by layer.

    The direction is the difference of the means of true and false statements in `train`. Each set
    is cut at its own mean, which needs no labels where half are true.

    Args:
        train: a `VerdictTask`; sets: {name: VerdictTask}.
        place: the token that is read, "statement" or "last".

    Source: Marks and Tegmark 2023, The Geometry of Truth: mass-mean probes and their transfer.
    """
    found: dict[str, list[float]] = {name: [] for name in sets}
    for site in sites_of(train.model).values():
        v = mean_difference(train.stream[place][site], train.truth)
        for name, each in sets.items():
            x = each.stream[place][site]
            found[name].append(float((((x - x.mean(0)) @ v > 0) == each.truth).mean()))
    return found
