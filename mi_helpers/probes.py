"""Linear probes: what can be read from the stream, and the controls that say what that means.

    train = collect(model, documents, "number")             # the stream at one token of each
    probe = fit_probe(train["resid_post", 3], train.y)      # scikit-learn's logistic regression
    probe.score(test["resid_post", 3], test.y)

A `Mark` says which token of a document is read and what the probe has to answer there; `KINDS`
marks TinyWorld's documents. The controls: `control_task`, `token_features`, and an untrained model.
A probe shows that something *can* be read; `NumberTask` shows whether the model reads it.
"""

from __future__ import annotations

import itertools
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.parallel import ThreadpoolController
from torch import Tensor

from mi_helpers.layouts import Key
from mi_helpers.lessons.lesson_01.experiments import on_one_core
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.grammar import BE_FORMS
from mi_helpers.tinyworld.prose import REGISTERS, TENSES, VOICES, topic_posterior
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.tokenizer import offsets
from mi_helpers.tinyworld.world import World

STREAM = ("embed", "resid_post")  # where probes read, unless told otherwise
ALPHA = 0.1  # ridge penalty of the circular probe, for features of unit mean square length

# -------------------------------------------------------------------------- what is read, and where


@dataclass(frozen=True)
class Mark:
    """One question to a probe.

    end    the token that holds character end - 1 is read, and nothing after it
    label  the right answer
    word   the word type, to which a control task gives a random label
    group  what may stand in the training or in the test set, but not in both
    """

    end: int
    label: str | int
    word: str = ""
    group: str = ""


def mark_family(document: Document, rng: random.Random) -> Mark | None:
    """Which part of the world wrote it, at the end of the sixth word (or of the last)."""
    words = list(re.finditer(r"\S+", document.text))[:6]
    return Mark(words[-1].end(), document.family, words[-1][0])


def mark_tense(document: Document, rng: random.Random) -> Mark | None:
    """Present or past, at the end of the first sentence with a verb that shows it."""
    shown = [end for latent, _, end in document.events if latent == "tense"]
    ends = [span.end for span in document.find("topic") if shown and span.end >= shown[0]]
    if not ends:
        return None
    return Mark(ends[0], document.latents["tense"], document.text[: shown[0]].split()[-1])


def mark_voice(document: Document, rng: random.Random) -> Mark | None:
    """Praise, neutral or blame: just before an evaluative word, when one to three were read."""
    spans = [span for span in document.find("evaluation") if span.start < 240][:4]
    if len(spans) < 2:
        return None
    before, here = spans[-2:]
    word = document.text[before.start : before.end]
    return Mark(here.start - 1, document.latents["voice"], word)


def mark_topic(document: Document, rng: random.Random) -> Mark | None:
    """The topic, at the end of one of the first six words (or phrases) that it has chosen."""
    ends = [end for latent, _, end in document.events if latent == "topic"][:6]
    if not ends:
        return None
    end = rng.choice(ends)
    inside = [span.value for span in document.find("topic") if span.start < end <= span.end]
    return Mark(end, inside[0], document.text[:end].split()[-1])


def _noun(document: Document, which: int) -> Mark:
    span = document.find("number")[which]
    return Mark(span.end, span.value, document.text[span.start : span.end])


def mark_head(document: Document, rng: random.Random) -> Mark | None:
    """The number of an agreement sentence's subject, at the subject."""
    return _noun(document, 0)


def mark_attractor(document: Document, rng: random.Random) -> Mark | None:
    """The number of the last noun before the verb, at that noun: the last token that is read."""
    return _noun(document, -1)


def mark_number(document: Document, rng: random.Random) -> Mark | None:
    """The number of the subject, at the last token before the verb, which is another noun."""
    return replace(_noun(document, 0), end=document.find("answer")[0].start - 1)


def mark_country(document: Document, rng: random.Random) -> Mark | None:
    """The country of a landmark, at the end of its name; countries with three landmarks or more."""
    span = next((s for s in document.find("entity") if s.value == "landmark"), None)
    name = span and document.text[span.start : span.end].lower()
    country = next((p.country for p in lexicon.landmarks() if p.name.lower() == name), None)
    count = Counter(place.country for place in lexicon.landmarks())
    return Mark(span.end, country, name, name) if count[country] >= 3 else None


def mark_asked(document: Document, rng: random.Random) -> Mark | None:
    """The same country in a sentence that ends with it, at the token before it is said."""
    found = mark_country(document, rng)
    return found and replace(found, end=document.find("answer")[0].start - 1)


def _calendar(document: Document, unit: str) -> Mark | None:
    if document.latents["unit"] != unit:
        return None
    named = document.find(unit)
    answer = document.find("answer")[0]
    index = next(i for i, span in enumerate(named) if span.start == answer.start)
    word = document.text[named[index - 1].start : named[index - 1].end]
    return Mark(answer.start - 1, named[index].value, word)


def mark_day(document: Document, rng: random.Random) -> Mark | None:
    """The day of the week (0 to 6) that is to be said next, at the token before it."""
    return _calendar(document, "day")


def mark_month(document: Document, rng: random.Random) -> Mark | None:
    """The month (0 to 11) that is to be said next, at the token before it."""
    return _calendar(document, "month")


Marker = Callable[[Document, random.Random], Mark | None]
KINDS: dict[str, Marker] = {
    "family": mark_family,
    "tense": mark_tense,
    "topic": mark_topic,
    "voice": mark_voice,
    "head": mark_head,
    "attractor": mark_attractor,
    "number": mark_number,
    "country": mark_country,
    "asked": mark_asked,
    "day": mark_day,
    "month": mark_month,
}


@dataclass(frozen=True)
class Readings:
    """What the model holds at n marked tokens. `readings["resid_post", 3]` is (n, d_model).

    x          {(site, layer): (n, d_model)}, float32; the layer of "embed" is None
    y          labels (n,)
    words      word types (n,), groups (n,)
    tokens     (n, 2): the id of the token before the one that is read, and its own
    documents  n documents; marks: n marks
    """

    x: dict[Key, np.ndarray]
    y: np.ndarray
    words: np.ndarray
    groups: np.ndarray
    tokens: np.ndarray
    documents: list[Document]
    marks: list[Mark]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: str | Key) -> np.ndarray:
        key = (key, None) if isinstance(key, str) else key
        if key not in self.x:
            held = ", ".join(site_name(each) for each in self.x)
            raise ValueError(f"{site_name(key)} was not collected; there are: {held}.")
        return self.x[key]

    def where(self, chosen) -> Readings:
        """The readings that a mask (n,) of booleans, or a list of indices, chooses."""
        index = np.arange(len(self))[np.asarray(chosen)]
        return Readings(
            {key: x[index] for key, x in self.x.items()},
            self.y[index],
            self.words[index],
            self.groups[index],
            self.tokens[index],
            [self.documents[i] for i in index],
            [self.marks[i] for i in index],
        )


def site_name(key: Key) -> str:
    """("resid_post", 3) -> "resid_post 3", ("embed", None) -> "embed"."""
    return key[0] if key[1] is None else f"{key[0]} {key[1]}"


def some_layers(model: LanguageModel, count: int = 6) -> list[Key]:
    """The embedding and at most `count` layers' resid_post, evenly spaced, the last one included:
    all of tiny-gemma, a quarter of Gemma 2 2B."""
    chosen = np.unique(np.linspace(0, model.n_layers - 1, min(count, model.n_layers)).round())
    return [("embed", None), *(("resid_post", int(layer)) for layer in chosen)]


def token_at(model: LanguageModel, text: str, end: int) -> tuple[list[int], int]:
    """Token ids of a text (`<bos>` first, if there is one) and the position of the token that
    holds character end - 1."""
    ids, ranges = offsets(model.tokenizer, text)
    bos = model.tokenizer.bos_token_id
    first = [] if bos is None else [bos]
    return first + ids, len(first) + int(np.searchsorted(ranges[:, 1], end))


@torch.no_grad()
def collect(
    model: LanguageModel,
    documents: Iterable[Document],
    kind: str | Marker,
    sites: Iterable[str | Key] = STREAM,
    seed: int = 0,
    rows: int = 64,
) -> Readings:
    """Run the model on documents and keep its activations at the token that `kind` marks in each.

    Args:
        documents: those that `kind` cannot mark, and those longer than the context, are left out.
        kind: a name in `KINDS`, or a function (document, random.Random) -> Mark or None.
        sites: names and (name, layer) pairs, as in `run_with_cache`.
        rows: documents per batch, of about equal length.

    Raises:
        ValueError: an unknown kind; nothing to read; a site or a layer that the model has not.
    """
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are: {', '.join(KINDS)}.")
    mark = KINDS[kind] if isinstance(kind, str) else kind
    rng = random.Random(seed)
    kept: list[tuple[Document, Mark, list[int]]] = []
    for document in documents:
        found = mark(document, rng)
        if found is not None:
            ids, position = token_at(model, document.text, found.end)
            if 1 <= position < model.n_ctx:
                kept.append((document, found, ids[: position + 1]))
    if not kept:
        raise ValueError(f"No document has anything to read for {kind!r}: give other documents.")
    by_length = sorted(range(len(kept)), key=lambda i: len(kept[i][2]))
    x: dict[Key, np.ndarray] = {}
    for start in range(0, len(kept), rows):
        chosen = by_length[start : start + rows]
        batch = [kept[i][2] for i in chosen]
        _, cache = model.run_with_cache(model.pad(batch), sites, stop_at_layer=model.n_layers)
        last = [len(ids) - 1 for ids in batch]
        for key in cache:
            at = cache[key][range(len(batch)), last].float().cpu().numpy()  # (batch, d_model)
            x.setdefault(key, np.empty((len(kept), at.shape[1]), at.dtype))[chosen] = at
    return Readings(
        x,
        np.array([mark.label for _, mark, _ in kept]),
        np.array([mark.word for _, mark, _ in kept]),
        np.array([mark.group for _, mark, _ in kept]),
        np.array([ids[-2:] for _, _, ids in kept]),
        [document for document, _, _ in kept],
        [mark for _, mark, _ in kept],
    )


def documents(family: str, n: int, seed: int, held=(), **choices) -> list[Document]:
    """n documents of TinyWorld; `held` names what comes from its held-out part."""
    return list(itertools.islice(World().documents(seed, family, held, **choices), n))


SOURCE: dict[str, tuple[str, dict]] = {  # kind -> family and choices of the documents it is read in
    **dict.fromkeys(("tense", "topic", "voice"), ("prose", {})),
    **dict.fromkeys(("head", "attractor", "number"), ("agreement", {})),
    "country": ("facts", {"relation": "landmark-city", "count": 1}),
    "asked": ("facts", {"relation": "landmark-country", "count": 1}),
}


def documents_for(kind: str, n: int, seed: int, held: bool = False) -> list[Document]:
    """n documents that `kind` can be read in; with `held`, of phrasings (and, where there are such,
    pairs of words) that the model was never trained on.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r}; there are: {', '.join(KINDS)}.")
    apart = ("templates", "entities") if held else ()
    if kind == "family":
        each = [documents(family, n, seed, apart) for family in World.families]
        return [document for row in zip(*each, strict=True) for document in row][:n]
    if kind in ("day", "month"):
        stream = World().documents(seed, "calendar", apart)
        return list(itertools.islice((d for d in stream if d.latents["unit"] == kind), n))
    family, choices = SOURCE[kind]
    return documents(family, n, seed, apart, **choices)


def split_by_group(groups, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """A mask (n,), True for the test set: about `share` of the groups, each as a whole.

    Raises:
        ValueError: fewer than two groups, or a share that leaves one side empty.
    """
    names = sorted(set(groups))
    n = round(share * len(names))
    if not 0 < n < len(names):
        raise ValueError(f"A share of {share} of {len(names)} groups leaves one side empty.")
    chosen = set(random.Random(seed).sample(names, n))
    return np.array([group in chosen for group in groups])


# ------------------------------------------------------------------------------------------ probes


def fit_probe(x, y, C: float = 0.1, max_iter: int = 200) -> Pipeline:
    """A linear probe: p(y | x) = softmax(W z + b) with z = (x - mean) / sd, by lbfgs.

    Args:
        x: (n, d), an array or a sparse matrix of counts; y: labels (n,), of two classes or more.
        C: inverse strength of the penalty |W|² / 2C, which a probe of n ≈ d examples needs.

    Returns:
        the fitted pipeline: `score(x, y)` is its accuracy, `predict_proba(x)` gives (n, classes).

    Raises:
        ValueError: nothing to learn from, unequal lengths, one class only, numbers that are not.
    """
    n, y = x.shape[0] if hasattr(x, "shape") else len(x), np.asarray(y)
    _same_length(n, len(y))
    if n == 0:
        raise ValueError("The probe has no examples: give at least one of each class.")
    if len(set(y.tolist())) < 2:
        raise ValueError(f"All {n} labels are {y.tolist()[0]!r}: a probe needs two classes.")
    sparse = hasattr(x, "toarray")
    if not sparse and not np.isfinite(np.asarray(x, dtype=float)).all():
        raise ValueError("Some features are infinite or not numbers: look at the activations.")
    probe = make_pipeline(
        StandardScaler(with_mean=not sparse), LogisticRegression(C=C, max_iter=max_iter)
    )
    with warnings.catch_warnings(), _libraries().limit(limits=1):  # small: one core is faster
        warnings.simplefilter("ignore", ConvergenceWarning)  # to stop early is a penalty, too
        return probe.fit(x if sparse else np.asarray(x, dtype=np.float64), y)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _same_length(n: int, labels: int) -> None:
    if n != labels:
        raise ValueError(f"There are {n} examples and {labels} labels: give one label to each.")


def accuracies(train: Readings, test: Readings, y_train=None, y_test=None) -> dict[Key, float]:
    """{site: accuracy on `test` of a probe fitted on `train`}, for their labels or for others."""
    y_train = train.y if y_train is None else y_train
    y_test = test.y if y_test is None else y_test
    return {key: fit_probe(train[key], y_train).score(test[key], y_test) for key in train.x}


def majority(train: Readings, test: Readings) -> float:
    """The accuracy of always saying the training set's commonest label."""
    return float(np.mean(test.y == Counter(train.y.tolist()).most_common(1)[0][0]))


# ---------------------------------------------------------------------------------------- controls


def control_task(words, labels, seed: int = 0) -> dict[str, str | int]:
    """{word type: a label drawn at random from `labels`}: the same word always gets the same one.

    What a probe can answer here it has learned by itself, since nothing in the model knows it
    (Hewitt and Liang 2019). Selectivity is the probe's accuracy minus its accuracy on this.
    """
    rng, labels = random.Random(seed), list(labels)
    return {word: rng.choice(labels) for word in sorted(set(words))}


def control_labels(train: Readings, test: Readings, seed: int = 0) -> tuple:
    """The labels of a control task for both sets, (n_train,) and (n_test,)."""
    table = control_task([*train.words, *test.words], train.y.tolist(), seed)
    return tuple(np.array([table[word] for word in side.words]) for side in (train, test))


def token_features(model: LanguageModel, tokens: np.ndarray):
    """What a model without context could use: the previous token, and this one, each one-hot.

    tokens (n, 2), as in `Readings.tokens`; the result is sparse, (n, 2 · d_vocab).
    """
    return OneHotEncoder(categories=[range(model.d_vocab)] * 2).fit_transform(tokens)


SERIES = ("probe", "control task", "untrained model", "two tokens")


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

    probe            the model's activations
    control task     the same activations, a random label for each word type
    untrained model  the activations of `blank`, a model of the same shape with random weights
    two tokens       the token that is read and the one before it, without any model
    """
    one, two = (collect(model, each, kind, sites, seed) for each in (train, test))
    other = [collect(blank, each, kind, sites, seed) for each in (train, test)]
    return {
        "probe": accuracies(one, two),
        "control task": accuracies(one, two, *control_labels(one, two, seed)),
        "untrained model": accuracies(*other),
        "two tokens": dict.fromkeys(one.x, two_tokens(model, one, two)),
    }


def two_tokens(model: LanguageModel, train: Readings, test: Readings) -> float:
    """The accuracy of a probe on `token_features`: without any activations."""
    bags = [token_features(model, each.tokens) for each in (train, test)]
    return fit_probe(bags[0], train.y, C=1.0).score(bags[1], test.y)


# --------------------------------------------------------------------------------------- the bound

VALUES = {"voice": VOICES, "tense": TENSES, "register": REGISTERS}


def posterior(world: World, document: Document, latent: str, end: int) -> np.ndarray:
    """p(latent | the text up to character `end`), exact: what an ideal reader knows, (n_values,).

    latent  "topic", with values as in `world.topics`, or "voice", "tense" or "register"

    Exact where no phrase of several words is cut in two, as at the ends of `document.events`.
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


def surprise(p: np.ndarray, y, classes: Sequence) -> np.ndarray:
    """-log p(the right label), nats, (n,), for probabilities p (n, classes).

    Its mean over fresh examples estimates a cross-entropy; with the ideal reader's p, it is an
    estimate of H(Y | X).

    Raises:
        ValueError: unequal lengths, or a label that is not among the classes.
    """
    _same_length(len(p), len(y))
    if strange := set(np.asarray(y).tolist()) - set(np.asarray(classes).tolist()):
        raise ValueError(f"The probe has never seen the label {sorted(strange)[0]!r}: train on it.")
    column = {label: i for i, label in enumerate(np.asarray(classes).tolist())}
    index = [column[label] for label in np.asarray(y).tolist()]
    return -np.log(np.maximum(p[np.arange(len(p)), index], 1e-300))


@torch.no_grad()
def mass_on(model: LanguageModel, readings: Readings, words: Mapping[str, Sequence[str]]):
    """What the model itself goes on with: the probability of each group's words as the next one,
    (n, groups). Needs "resid_final"; of a word of several tokens, the first one counts."""
    final = torch.tensor(readings["resid_final"]).to(model.device, model.dtype)
    p = model.unembed(final).float().softmax(-1)  # (n, d_vocab)
    first = {w: int(model.tokens(f" {w}", False)[0, 0]) for group in words.values() for w in group}
    columns = [p[:, sorted({first[word] for word in group})].sum(-1) for group in words.values()]
    return torch.stack(columns, -1).cpu().numpy()


def entropy(p: np.ndarray) -> np.ndarray:
    """-Σ p log p over the last axis, in nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


# --------------------------------------------------------------------------------------- direction


def mean_difference(x, y) -> np.ndarray:
    """mean of x where y is true minus mean where it is false, (d,).

    Raises:
        ValueError: unequal lengths, or one class only.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=bool)
    _same_length(len(x), len(y))
    if y.all() or not y.any():
        raise ValueError(f"All {len(y)} labels are equal: a difference needs two classes.")
    return x[y].mean(0) - x[~y].mean(0)


def probe_direction(probe: Pipeline) -> np.ndarray:
    """The direction of a probe of two classes in the activations' own units, (d,): W / sd."""
    scaler, classifier = probe[0], probe[-1]
    if len(classifier.coef_) != 1:
        raise ValueError(f"The probe has {len(classifier.classes_)} classes, not two.")
    return classifier.coef_[0] / scaler.scale_


def midpoint(x, y) -> np.ndarray:
    """Half way between the two classes' means, (d,)."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=bool)
    return (x[y].mean(0) + x[~y].mean(0)) / 2


def side(x, direction, centre) -> np.ndarray:
    """True where x lies beyond the centre along the direction, (n,): a probe with one direction."""
    return (np.asarray(x, dtype=float) - centre) @ np.asarray(direction) > 0


def project_out(x, direction, centre=0.0):
    """x - ((x - centre) · v) v with v = direction / |direction|; x (..., d), arrays or tensors.

    Along v everything ends up where the centre is; across v nothing changes.
    """
    length = (direction * direction).sum() ** 0.5
    if not length > 0:
        raise ValueError("The direction is zero: there is nothing to project out.")
    v = direction / length
    return x - ((x - centre) @ v)[..., None] * v


# --------------------------------------------------------------------- does the model use it?


class NumberTask:
    """Agreement sentences up to their verb, and how sure the model is of the verb's number.

    places  {"head": positions of the subject, "last": of the last noun before the verb}, each (n,)
    plural  {"head": (n,), "last": (n,)}: whether that noun is plural
    """

    def __init__(self, model: LanguageModel, documents: Sequence[Document]):
        rows: list[list[int]] = []
        where: dict[str, list[int]] = {"head": [], "last": []}
        plural: dict[str, list[bool]] = {"head": [], "last": []}
        for document in documents:
            if document.family != "agreement":
                raise ValueError(f"NumberTask needs agreement sentences, not {document.family!r}.")
            for place, which in (("head", 0), ("last", -1)):
                mark = _noun(document, which)
                ids, position = token_at(model, document.text, mark.end)
                where[place].append(position)
                plural[place].append(mark.label == "plural")
            rows.append(ids[: position + 1])
        if not rows:
            raise ValueError("There are no agreement sentences: give at least one.")
        self.model, self.documents, self.ids = model, list(documents), model.pad(rows)
        self.places = {place: torch.tensor(at) for place, at in where.items()}
        self.plural = {place: np.array(is_it) for place, is_it in plural.items()}
        self.forms = {
            number: [model.to_single_token(f" {form}") for form in BE_FORMS[number]]
            for number in ("singular", "plural")
        }

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def features(self, sites: Iterable[str | Key] = STREAM) -> dict[str, dict[Key, np.ndarray]]:
        """{place: {site: activations (n, d_model)}}."""
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
    singular or plural. So neither number says anything of the other, not even by chance."""
    cells: dict[tuple, list[Document]] = {}
    for document in documents:
        spans = document.find("number")
        cells.setdefault((spans[0].value, spans[-1].value), []).append(document)
    if len(cells) < 4:
        raise ValueError(f"Only {len(cells)} of the four kinds of sentences are there: give more.")
    fewest = min(map(len, cells.values()))
    return [document for cell in cells.values() for document in cell[:fewest]]


def find_direction(x, y, method: str = "mean difference", seed: int = 0) -> np.ndarray:
    """A direction for y (n,) in x (n, d): "mean difference", "probe" or, as a control, "random"."""
    if method == "mean difference":
        return mean_difference(x, y)
    if method == "probe":
        return probe_direction(fit_probe(x, y))
    if method == "random":
        return np.random.default_rng(seed).normal(size=np.shape(x)[1])
    raise ValueError(f"There is no method {method!r}: mean difference, probe or random.")


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
        place: the token, "head" or "last".
        noun: whose number: that of the noun at `place`, unless told otherwise.
        method, seed: see `find_direction`.

    Returns:
        the accuracy on `test` of a probe fitted on `train`; and for each sentence of `test` the
        part of the mean margin that is lost, (n,): 0 for no effect, 1 when nothing is left of it.
    """
    x, y = train.stream[place][key], train.plural[noun or place]
    accuracy = fit_probe(x, y).score(test.stream[place][key], test.plural[noun or place])
    direction = find_direction(x, y, method, seed)
    after = test.margins(test.remove(key, place, direction, midpoint(x, y)))
    return accuracy, (test.clean - after) / test.clean.mean()


def bootstrap(values, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """Mean of values (n,) and the ends of its 95 % interval, from resampling them."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("There are no values to average.")
    index = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[index].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


# ----------------------------------------------------------------------------------------- circles


def class_means(x, y, n: int) -> np.ndarray:
    """The mean of x for each label 0 … n-1, (n, d), centred and of mean square length 1."""
    x, y = np.asarray(x, dtype=float), np.asarray(y)
    if missing := [i for i in range(n) if not (y == i).any()]:
        raise ValueError(f"No example has the label {missing[0]}: give more documents.")
    means = np.array([x[y == i].mean(0) for i in range(n)])
    means -= means.mean(0)
    length = np.sqrt((means**2).sum(1).mean())
    return means / length if length > 1e-6 else means


def held_out_weights(means: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Row i: how ridge regression, trained without class i, mixes the others' targets for it.

    So (weights @ targets)[i] is its prediction for class i, whatever the targets (n, k) are.
    """
    n = len(means)
    weights = np.zeros((n, n))
    for i in range(n):
        others = np.arange(n) != i
        ridge = Ridge(alpha=alpha).fit(means[others], np.eye(n)[others])
        weights[i] = ridge.predict(means[i : i + 1])[0]
    return weights


def on_circle(index, n: int) -> np.ndarray:
    """(cos, sin) of 2π index / n, (..., 2)."""
    angle = 2 * np.pi * np.asarray(index) / n
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def angle_between(a, b) -> np.ndarray:
    """The angle between vectors of two numbers, in degrees from 0 to 180, (...,)."""
    turn = np.arctan2(a[..., 1], a[..., 0]) - np.arctan2(b[..., 1], b[..., 0])
    return np.degrees(np.abs((turn + np.pi) % (2 * np.pi) - np.pi))


def circle_error(weights: np.ndarray, order) -> float:
    """Mean angle, in degrees, between where held-out classes are put and where `order` has them."""
    truth = on_circle(order, len(weights))
    return float(angle_between(weights @ truth, truth).mean())


def all_orders(n: int, most: int = 1_000, seed: int = 0) -> np.ndarray:
    """Every way to place n classes on a circle, up to turning and mirroring it: (n - 1)! / 2
    orders, or `most` random ones where there are more. The first is 0, 1, …, n - 1."""
    if n <= 7:
        rest = [p for p in itertools.permutations(range(1, n)) if p[0] < p[-1]]
        return np.array([(0, *p) for p in rest])
    rng = np.random.default_rng(seed)
    return np.array([np.arange(n), *(rng.permutation(n) for _ in range(most - 1))])


# ----------------------------------------------------------------------- the toy: above the sine


class SineNets:
    """Several small MLPs at once, trained to say whether y > sin x: inputs (x / 6, y).

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
        layers = [inputs]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            layers.append(torch.relu(layers[-1] @ weight + bias))
        return layers

    def logits(self, inputs: Tensor) -> Tensor:
        """(nets, n): above 0 means y > sin x."""
        return (self.hidden(inputs)[-1] @ self.weights[-1] + self.biases[-1])[..., 0]

    @on_one_core
    def train(self, steps: int = 1_000, rate: float = 1e-2, batch: int = 256) -> SineNets:
        """Adam on the logistic loss of fresh points, the rate falling to zero; returns itself."""
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
        """Accuracy of a linear probe on each layer, on fresh points, (nets, 1 + DEPTH)."""
        (inputs, above), (fresh, truth) = self.points(n), self.points(2 * n)
        pairs = list(zip(self.hidden(inputs), self.hidden(fresh), strict=True))
        return np.array(
            [
                [
                    fit_probe(x[i].numpy(), above[i].numpy(), C=100).score(
                        z[i].numpy(), truth[i].numpy()
                    )
                    for x, z in pairs
                ]
                for i in range(self.nets)
            ]
        )
