"""Lesson 02's experiments: probes with their controls, the bound, and whether the model uses it.

scan(model, untrained(model), "number", train_texts, test_texts)   # a probe and three controls
posterior(world, document, "topic", end)                # what an ideal reader knows
train, test = number_tasks(model, seed=0)
removal(train, test, ("resid_post", 0), "head")         # read out, against used
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.layouts import Key
from mi_helpers.lessons.shared import (
    STREAM,
    Readings,
    collect,
    documents_for,
    mark_noun,
    on_one_core,
    token_at,
)
from mi_helpers.models import LanguageModel
from mi_helpers.probes import (
    control_task,
    find_direction,
    fit_probe,
    midpoint,
    project_out,
    token_features,
)
from mi_helpers.tinyworld.grammar import BE_FORMS
from mi_helpers.tinyworld.prose import REGISTERS, TENSES, VOICES, topic_posterior
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

# -- probes and their controls ---------------------------------------------------------------


def accuracies(train: Readings, test: Readings, y_train=None, y_test=None) -> dict[Key, float]:
    """{site: accuracy on `test` of a probe fitted on `train`}, for their labels or for others."""
    y_train = train.y if y_train is None else y_train
    y_test = test.y if y_test is None else y_test
    return {key: fit_probe(train[key], y_train).score(test[key], y_test) for key in train.x}


def majority(train: Readings, test: Readings) -> float:
    """The accuracy of always answering with the training set's commonest label."""
    return float(np.mean(test.y == Counter(train.y.tolist()).most_common(1)[0][0]))


def control_labels(train: Readings, test: Readings, seed: int = 0) -> tuple:
    """The labels of a control task for both sets, (n_train,) and (n_test,)."""
    table = control_task([*train.words, *test.words], train.y.tolist(), seed)
    return tuple(np.array([table[word] for word in each.words]) for each in (train, test))


def two_tokens(model: LanguageModel, train: Readings, test: Readings) -> float:
    """The accuracy of a probe on `token_features`: without any activations."""
    bags = [token_features(model, each.tokens) for each in (train, test)]
    return fit_probe(bags[0], train.y, C=1.0).score(bags[1], test.y)


def scan(
    model: LanguageModel,
    blank: LanguageModel,
    kind: str,
    train: list[Document],
    test: list[Document],
    sites: Iterable[str | Key] = STREAM,
    seed: int = 0,
) -> dict[str, dict[Key, float]]:
    """Accuracy on `test` by site, for one kind and its controls: {series: {site: accuracy}}.

    The series are
        probe            the model's activations
        control task     the same activations, a random label for each word type
        untrained model  the activations of `blank`, a model of the same shape with random weights
        two tokens       the token that is read and the one before it, without any model

    Args:
        kind, sites, seed: as in `collect`.
        train, test: documents.
    """
    one, two = (collect(model, each, kind, sites, seed) for each in (train, test))
    other = [collect(blank, each, kind, sites, seed) for each in (train, test)]
    return {
        "probe": accuracies(one, two),
        "control task": accuracies(one, two, *control_labels(one, two, seed)),
        "untrained model": accuracies(*other),
        "two tokens": dict.fromkeys(one.x, two_tokens(model, one, two)),
    }


# -- the bound -------------------------------------------------------------------------------

VALUES = {"voice": VOICES, "tense": TENSES, "register": REGISTERS}


def posterior(world: World, document: Document, latent: str, end: int) -> np.ndarray:
    """p(latent | the text up to character `end`), exact: what an ideal reader knows, (n_values,).

    Exact where no phrase of several words is cut in two, as at the ends of `document.events`.

    Args:
        latent: "topic", with values as in `world.topics`, or a key of `VALUES`.

    Raises:
        ValueError: an unknown latent.
    """
    if latent == "topic":
        ends, rows = topic_posterior(world.book, document)
        return rows[np.searchsorted(ends, end, side="right") - 1]
    if latent not in VALUES:
        raise ValueError(f"There is no latent {latent!r}: choose topic, {', '.join(VALUES)}.")
    tables = world.book.log_likelihood
    log_p = sum(
        (tables[name, key] for name, key, at in document.events if name == latent and at <= end),
        np.zeros(len(VALUES[latent])),
    )
    return np.exp(log_p - np.logaddexp.reduce(log_p))


def posteriors(world: World, readings: Readings, latent: str, classes: Sequence) -> np.ndarray:
    """The ideal reader's (n, classes) at each mark, with the columns in the order of `classes`.

    Raises:
        ValueError: a class of the world that is not in `classes`, or one that is not the world's.
    """
    values = world.topics if latent == "topic" else VALUES.get(latent, ())
    if set(values) != {str(each) for each in classes}:
        raise ValueError(f"The probe knows {len(classes)} classes, and {latent} has {len(values)}.")
    columns = [list(values).index(str(each)) for each in classes]
    rows = [
        posterior(world, document, latent, mark.end)
        for document, mark in zip(readings.documents, readings.marks, strict=True)
    ]
    return np.array(rows)[:, columns]


@torch.no_grad()
def mass_on(
    model: LanguageModel, readings: Readings, words: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """The model's probability of each group of words as the next one, (n, groups).

    Args:
        readings: with the site "resid_final".
        words: {group: words}; of a word of several tokens, the first one counts.
    """
    final = torch.tensor(readings["resid_final"]).to(model.device, model.dtype)
    p = model.unembed(final).float().softmax(-1)  # (n, d_vocab)
    first = {w: int(model.tokens(f" {w}", False)[0, 0]) for group in words.values() for w in group}
    columns = [p[:, sorted({first[word] for word in group})].sum(-1) for group in words.values()]
    return torch.stack(columns, -1).cpu().numpy()


# -- does the model use it? ------------------------------------------------------------------


class NumberTask:
    """Agreement sentences up to their verb, and how sure the model is of the verb's number.

    places  {"head": positions of the subject, "last": of the last noun before the verb}, each (n,)
    plural  {"head": (n,), "last": (n,)}: whether that noun is plural
    """

    def __init__(self, model: LanguageModel, documents: Sequence[Document]):
        rows: list[list[int]] = []
        places: dict[str, list[int]] = {"head": [], "last": []}
        plural: dict[str, list[bool]] = {"head": [], "last": []}
        for document in documents:
            if document.family != "agreement":
                raise ValueError(f"NumberTask needs agreement sentences, not {document.family!r}.")
            for place, index in (("head", 0), ("last", -1)):
                mark = mark_noun(document, index)
                ids, position = token_at(model, document.text, mark.end)
                places[place].append(position)
                plural[place].append(mark.label == "plural")
            rows.append(ids[: position + 1])
        if not rows:
            raise ValueError("There are no agreement sentences: give at least one.")
        self.model, self.documents, self.ids = model, list(documents), model.pad(rows)
        self.places = {place: torch.tensor(at) for place, at in places.items()}
        self.plural = {place: np.array(is_it) for place, is_it in plural.items()}
        self.forms = {
            number: [model.to_single_token(f" {form}") for form in BE_FORMS[number]]
            for number in ("singular", "plural")
        }

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def features(self, sites: Iterable[str | Key] = STREAM) -> dict[str, dict[Key, np.ndarray]]:
        """{place: {site: activations (n, d_model)}}; in one batch, as `edit`'s hooks need it."""
        n = self.model.n_layers
        _, cache = self.model.run_with_cache(self.ids, sites, stop_at_layer=n)
        rows = torch.arange(len(self))
        return {
            place: {key: cache[key][rows, at].float().cpu().numpy() for key in cache}
            for place, at in self.places.items()
        }

    @cached_property
    def stream(self) -> dict[str, dict[Key, np.ndarray]]:
        """`features` of the embedding and of every resid_post."""
        return self.features()

    @cached_property
    def clean(self) -> np.ndarray:
        """`margins` of the model as it is."""
        return self.margins()

    @torch.no_grad()
    def margins(self, hooks: Mapping | None = None) -> np.ndarray:
        """log p(is or was) - log p(are or were) before the verb, in nats, (n,), under `hooks`;
        the other way round where the subject is plural, so that positive is right."""
        with self.model.hooks(hooks or {}):
            _, cache = self.model.run_with_cache(
                self.ids, "resid_final", stop_at_layer=self.model.n_layers
            )
        last = cache["resid_final"][torch.arange(len(self)), self.places["last"]]
        log_p = F.log_softmax(self.model.unembed(last).float(), -1)
        singular, plural = (
            log_p[:, self.forms[number]].logsumexp(-1) for number in ("singular", "plural")
        )
        return (singular - plural).cpu().numpy() * np.where(self.plural["head"], -1.0, 1.0)

    def remove(self, key: Key, place: str, direction, centre) -> dict:
        """Hooks that project a direction out of the stream at one token of each sentence."""
        v, c = _float32(direction), _float32(centre)
        return self.edit(key, place, lambda x: project_out(x, v.to(x.device), c.to(x.device)))

    def add(self, key: Key, place: str, vector) -> dict:
        """Hooks that add a vector to the stream at one token of each sentence."""
        vector = _float32(vector)
        return self.edit(key, place, lambda x: x + vector.to(x.device))

    def edit(self, key: Key, place: str, change: Callable[[Tensor], Tensor]) -> dict:
        """Hooks that pass the stream at one token of each sentence through `change`, (n, d)."""
        if place not in self.places:
            raise ValueError(f"There is no place {place!r}: choose {' or '.join(self.places)}.")

        def hook(x: Tensor) -> Tensor:
            rows, at = torch.arange(len(x)), self.places[place]
            x[rows, at] = change(x[rows, at].float()).to(x.dtype)
            return x

        return {key[0] if key[1] is None else key: hook}


def _float32(vector) -> Tensor:
    return torch.as_tensor(np.asarray(vector), dtype=torch.float32)


def balanced(documents: Iterable[Document]) -> list[Document]:
    """As many agreement sentences of each of the four kinds: subject singular or plural, last noun
    singular or plural. So neither number predicts the other, not even by chance.

    Raises:
        ValueError: one of the four kinds is missing.
    """
    cells: dict[tuple, list[Document]] = {}
    for document in documents:
        spans = document.find("number")
        cells.setdefault((spans[0].value, spans[-1].value), []).append(document)
    if len(cells) < 4:
        raise ValueError(f"Only {len(cells)} of the four kinds of sentences are there: give more.")
    fewest = min(map(len, cells.values()))
    return [document for cell in cells.values() for document in cell[:fewest]]


def number_tasks(model: LanguageModel, seed: int, n: int = 300) -> tuple[NumberTask, NumberTask]:
    """Balanced agreement sentences to find directions in, and others, held out, to test them on."""
    train = balanced(documents_for("number", n, 1_000 + 2 * seed))
    test = balanced(documents_for("number", n // 2, 1_001 + 2 * seed, held=True))
    return NumberTask(model, train), NumberTask(model, test)


def removal(
    train: NumberTask,
    test: NumberTask,
    key: Key,
    place: str,
    method: str = "mean difference",
    noun: str | None = None,
    seed: int = 0,
) -> tuple[float, np.ndarray]:
    """How well a noun's number is read out at one token, and what its removal there costs.

    Args:
        train: sentences in which the direction is found; test: others, in which it is removed.
        key: the site; place: the token, "head" or "last".
        method, seed: as in `find_direction`.
        noun: whose number: by default that of the noun at `place`.

    Returns:
        the accuracy on `test` of a probe fitted on `train`; and for each sentence of `test` the
        part of the mean margin that is lost, (n,): 0 for no effect, 1 when nothing is left of it.
    """
    x, y = train.stream[place][key], train.plural[noun or place]
    accuracy = fit_probe(x, y).score(test.stream[place][key], test.plural[noun or place])
    direction = find_direction(x, y, method, seed)
    after = test.margins(test.remove(key, place, direction, midpoint(x, y)))
    return accuracy, (test.clean - after) / test.clean.mean()


# -- the toy: above the sine -----------------------------------------------------------------


class SineNets:
    """Several small MLPs at once, trained to tell whether y > sin x: inputs (x / 6, y).

    `hidden(points)` gives [input, hidden layer 1, …], each (nets, n, width), after the ReLU.
    """

    WIDTH, DEPTH, REACH = 8, 5, 6.0

    def __init__(self, nets: int = 5, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        sizes = [2, *[self.WIDTH] * self.DEPTH, 1]
        self.weights = [
            1.5 * torch.randn(nets, a, b, generator=rng) / a**0.5
            for a, b in itertools.pairwise(sizes)
        ]
        self.biases = [torch.zeros(nets, 1, b) for b in sizes[1:]]
        self.rng, self.nets = rng, nets

    def points(self, n: int) -> tuple[Tensor, Tensor]:
        """Fresh points (nets, n, 2) of the square (-1, 1)², and whether y > sin x, (nets, n)."""
        inputs = torch.rand(self.nets, n, 2, generator=self.rng) * 2 - 1
        return inputs, inputs[..., 1] > torch.sin(self.REACH * inputs[..., 0])

    def hidden(self, inputs: Tensor) -> list[Tensor]:
        """The inputs (nets, n, 2), then each hidden layer, (nets, n, WIDTH), after the ReLU."""
        layers = [inputs]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            layers.append(torch.relu(layers[-1] @ weight + bias))
        return layers

    def logits(self, inputs: Tensor) -> Tensor:
        """(nets, n): above 0 means y > sin x."""
        return (self.hidden(inputs)[-1] @ self.weights[-1] + self.biases[-1])[..., 0]

    @on_one_core
    def train(self, steps: int = 1_000, rate: float = 1e-2, batch: int = 256) -> SineNets:
        """These nets, trained: Adam on the logistic loss of fresh points, the rate falling to 0."""
        parameters = [p.requires_grad_() for p in (*self.weights, *self.biases)]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            inputs, above = self.points(batch)
            loss = F.binary_cross_entropy_with_logits(
                self.logits(inputs), above.float(), reduction="none"
            )
            optimizer.zero_grad()
            loss.mean(1).sum().backward()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        return self

    @torch.no_grad()
    def accuracies(self, n: int = 1_000) -> np.ndarray:
        """The accuracy of a linear probe on each layer, on fresh points, (nets, 1 + DEPTH)."""
        (inputs, above), (fresh, truth) = self.points(n), self.points(2 * n)
        layers = list(zip(self.hidden(inputs), self.hidden(fresh), strict=True))

        def accuracy(x: Tensor, z: Tensor, net: int) -> float:
            probe = fit_probe(x[net].numpy(), above[net].numpy(), C=100)
            return probe.score(z[net].numpy(), truth[net].numpy())

        return np.array([[accuracy(x, z, net) for x, z in layers] for net in range(self.nets)])
