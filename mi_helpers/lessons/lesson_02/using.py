"""What the model would say next, and what becomes of it when a direction in the stream is changed.

train, test = number_tasks(model, seed=0)       # agreement sentences, cut before their verb
train.stream["head"]["resid_post", 0]           # (n, d_model) at the subject
test.margins(test.remove(site, "head", v, c))   # how sure the model is of the right verb, without v
verdicts(model, "country-currency", 200, 1)     # statements, cut before "true" or "false"
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.layouts import Key
from mi_helpers.lessons.shared import STREAM, documents, documents_for, mark_noun, token_at
from mi_helpers.models import LanguageModel
from mi_helpers.probes import find_direction, fit_probe, mean_difference, midpoint, project_out
from mi_helpers.tinyworld.grammar import BE_FORMS
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.statements import WORDS

Groups = tuple[Sequence[str], Sequence[str]]  # two groups of words, each one token


class Choice:
    """Texts cut before a word, and how the model chooses there between two groups of words.

    ids     (n, length), padded on the right
    places  {name: positions (n,)}; "last" is the last token that is read

    Args:
        texts: (text, {place: character after it}) for each; the text is cut after "last".
        groups: the words of the one choice and of the other.
    """

    def __init__(self, model: LanguageModel, texts: Iterable[tuple[str, dict]], groups: Groups):
        rows: list[list[int]] = []
        places: dict[str, list[int]] = {}
        for text, ends in texts:
            for name, end in ends.items():
                ids, position = token_at(model, text, end)
                places.setdefault(name, []).append(position)
            rows.append(ids[: places["last"][-1] + 1])
        if not rows:
            raise ValueError("There is no text to choose in: give at least one.")
        self.model, self.ids = model, model.pad(rows)
        self.places = {name: torch.tensor(at) for name, at in places.items()}
        self.groups = tuple(
            [model.to_single_token(f" {word}") for word in group] for group in groups
        )

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

    @torch.no_grad()
    def odds(self, hooks: Mapping | None = None) -> np.ndarray:
        """log p(first group of words) - log p(second), nats, (n,), under `hooks`."""
        with self.model.hooks(hooks or {}):
            _, cache = self.model.run_with_cache(
                self.ids, "resid_final", stop_at_layer=self.model.n_layers
            )
        last = cache["resid_final"][torch.arange(len(self)), self.places["last"]]
        log_p = F.log_softmax(self.model.unembed(last).float(), -1)
        one, other = (log_p[:, group].logsumexp(-1) for group in self.groups)
        return (one - other).cpu().numpy()

    def remove(self, key: Key, place: str, direction, centre) -> dict:
        """Hooks that project a direction out of the stream at one token of each text."""
        v, c = as_float32(direction), as_float32(centre)
        return self.edit(key, place, lambda x: project_out(x, v.to(x.device), c.to(x.device)))

    def add(self, key: Key, place: str, vector) -> dict:
        """Hooks that add a vector to the stream at one token of each text."""
        vector = as_float32(vector)
        return self.edit(key, place, lambda x: x + vector.to(x.device))

    def edit(self, key: Key, place: str, change: Callable[[Tensor], Tensor]) -> dict:
        """Hooks that pass the stream at one token of each text through `change`, (n, d_model)."""
        if place not in self.places:
            raise ValueError(f"There is no place {place!r}: choose {' or '.join(self.places)}.")

        def hook(x: Tensor) -> Tensor:
            rows, at = torch.arange(len(x)), self.places[place]
            x[rows, at] = change(x[rows, at].float()).to(x.dtype)
            return x

        return {key[0] if key[1] is None else key: hook}

    def gradient(self, key: Key, place: str) -> np.ndarray:
        """The mean over texts of how `odds` grow with the stream at one token, (d_model,)."""
        start = torch.zeros(self.model.d_model, requires_grad=True)
        with torch.enable_grad(), self.model.hooks(self.edit(key, place, lambda x: x + start)):
            logits = self.model(self.ids)[torch.arange(len(self)), self.places["last"]]
            one, other = (logits[:, group].logsumexp(-1) for group in self.groups)
            (one - other).mean().backward()
        return start.grad.numpy()

    def follows(self, key: Key, place: str, vector) -> float:
        """How often the choice follows a push: the share of the first group's choices with the
        vector added, less that with the vector taken away; 1 where every choice goes along."""
        up, down = (self.odds(self.add(key, place, s * np.asarray(vector))) > 0 for s in (1, -1))
        return float(up.mean() - down.mean())


def as_float32(vector) -> Tensor:
    """A vector, of whatever make, as a tensor."""
    return torch.as_tensor(np.asarray(vector), dtype=torch.float32)


# -- the verb's number -----------------------------------------------------------------------


class NumberTask(Choice):
    """Agreement sentences up to their verb: a singular verb or a plural one?

    places  "head", the subject, and "last", the last noun before the verb
    plural  {"head": (n,), "last": (n,)}: whether that noun is plural
    """

    def __init__(self, model: LanguageModel, sentences: Sequence[Document]):
        if strange := {d.family for d in sentences} - {"agreement"}:
            raise ValueError(f"NumberTask needs agreement sentences, not {strange.pop()!r}.")
        marks = [{"head": mark_noun(d, 0), "last": mark_noun(d, -1)} for d in sentences]
        texts = [
            (d.text, {place: mark.end for place, mark in each.items()})
            for d, each in zip(sentences, marks, strict=True)
        ]
        super().__init__(model, texts, (BE_FORMS["singular"], BE_FORMS["plural"]))
        self.documents = list(sentences)
        self.plural = {
            place: np.array([each[place].label == "plural" for each in marks])
            for place in ("head", "last")
        }

    @cached_property
    def clean(self) -> np.ndarray:
        """`margins` of the model as it is."""
        return self.margins()

    def margins(self, hooks: Mapping | None = None) -> np.ndarray:
        """log p(is or was) - log p(are or were) before the verb, in nats, (n,), under `hooks`;
        the other way round where the subject is plural, so that positive is right."""
        return self.odds(hooks) * np.where(self.plural["head"], -1.0, 1.0)


def balanced(sentences: Iterable[Document]) -> list[Document]:
    """As many agreement sentences of each of the four kinds: subject singular or plural, last noun
    singular or plural. So neither number predicts the other, not even by chance.

    Raises:
        ValueError: one of the four kinds is missing.
    """
    cells: dict[tuple, list[Document]] = {}
    for document in sentences:
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
    noun: str | None = None,
    method: str = "mean difference",
    seed: int = 0,
) -> np.ndarray:
    """What it costs to remove a noun's number at one token: the part of the mean margin that each
    sentence of `test` loses, (n,): 0 for no effect, 1 when nothing is left of it.

    Args:
        train: sentences in which the direction is found; test: others, in which it is removed.
        key: the site; place: the token, "head" or "last".
        noun: whose number: by default that of the noun at `place`.
        method, seed: as in `find_direction`.
    """
    x, y = train.stream[place][key], train.plural[noun or place]
    direction = find_direction(x, y, method, seed)
    after = test.margins(test.remove(key, place, direction, midpoint(x, y)))
    return (test.clean - after) / test.clean.mean()


def left_after(
    pair: tuple[NumberTask, NumberTask], site: Key, project_out: Callable
) -> dict[str, tuple[float, float]]:
    """How well directions read the subject's number, at the subject, and how well a new probe does
    where they were taken out: {direction: (accuracy, accuracy)}, found in the first task, scored on
    the second.

    Args:
        project_out: (x, v, centre) -> x without v, of tensors.
    """
    x, y = pair[0].stream["head"][site], pair[0].plural["head"]
    fresh, truth = pair[1].stream["head"][site], pair[1].plural["head"]
    centre, found = midpoint(x, y), {}
    for name in ("mean difference", "probe", "random"):
        v = find_direction(x, y, name)
        v = v * np.sign(v @ mean_difference(x, y))  # a random one points either way
        reads = float((((fresh - centre) @ v > 0) == truth).mean())
        old, new = (project_out(*map(as_float32, (each, v, centre))) for each in (x, fresh))
        found[name] = reads, fit_probe(old, y).score(new, truth)
    return found


QUESTIONS = {  # whose number, and where: (place, noun)
    "subject's, at the subject": ("head", "head"),
    "subject's, at the last noun": ("last", "head"),
    "last noun's, at the last noun": ("last", "last"),
}


def read_and_used(
    pair: tuple[NumberTask, NumberTask], sites: Iterable[Key], share_lost: Callable
) -> dict[str, dict[str, list[float]]]:
    """For each of `QUESTIONS`, by site: how well a probe reads the number on new sentences, and the
    share of the margin that is lost without it.

    Args:
        share_lost: (train, test, site, place, noun) -> share.
    """
    read: dict[str, list[float]] = {label: [] for label in QUESTIONS}
    used: dict[str, list[float]] = {label: [] for label in QUESTIONS}
    for site, (label, (place, noun)) in itertools.product(sites, QUESTIONS.items()):
        (x, y), (new, truth) = ((t.stream[place][site], t.plural[noun]) for t in pair)
        read[label].append(fit_probe(x, y).score(new, truth))
        used[label].append(float(share_lost(*pair, site, place, noun)))
    return {"can it be read?": read, "is it used?": used}


# -- verdicts on statements ------------------------------------------------------------------


class VerdictTask(Choice):
    """Statements with the words after them up to the verdict: a word for true, or one for false?

    places  "statement", the statement's full stop, and "last", the token before the verdict
    truth   (n,), whether the statement is true
    """

    def __init__(self, model: LanguageModel, judged: Sequence[Document]):
        texts = [
            (d.text, {"statement": statement_of(d).end, "last": d.find("verdict")[0].start - 1})
            for d in judged
        ]
        true, false = ([pair[i] for pair in WORDS.values()] for i in (1, 0))
        super().__init__(model, texts, (true, false))
        self.documents = list(judged)
        self.truth = np.array([bool(d.latents["truth"]) for d in judged])

    def right(self, hooks: Mapping | None = None) -> float:
        """The share of verdicts that are right, under `hooks`."""
        return float(((self.odds(hooks) > 0) == self.truth).mean())

    def says(self) -> float:
        """The share of verdicts that are a word for true."""
        return float((self.odds() > 0).mean())


def statement_of(document: Document):
    """The span of a document's first statement."""
    return document.find("statement")[0]


def stands_first(document: Document) -> bool:
    """Whether a document begins with its statement, as a sentence of its own."""
    span = statement_of(document)
    return span.start == 0 and document.text[span.end - 1] == "."


def verdicts(
    model: LanguageModel, relation: str, n: int, seed: int, negated: bool = False, held=()
) -> VerdictTask:
    """n statements of one relation, true and false in turn, each with its verdict.

    Args:
        relation: such as "landmark-city".
        negated: statements that say "not".
        held: as for `documents`: "entities" are pairs on which the model saw no statement.
    """
    one = {"relation": relation, "count": 1, "negated": negated}
    many = [
        [d for d in documents("truth", 3 * n, 2 * seed + truth, held, truth=truth, **one)]
        for truth in (True, False)
    ]
    rows = zip(*([d for d in each if stands_first(d)] for each in many), strict=False)
    return VerdictTask(model, [document for row in rows for document in row][:n])


# Sets of statements: what a direction found on cities is tried on. The model has read verdicts on
# the pairs of the first three, in other phrasings; on those of the others it has read none.
NEW = {"held": ("entities",)}
SETS: dict[str, dict] = {
    "cities": {"relation": "landmark-city", "held": ("templates",)},
    "currencies": {"relation": "country-currency", "held": ("templates",)},
    "cities, negated": {"relation": "landmark-city", "negated": True, "held": ("templates",)},
    "new cities": {"relation": "landmark-city"} | NEW,
    "new currencies": {"relation": "country-currency"} | NEW,
    "continents": {"relation": "country-continent", "held": ("relations",)},
}


def truth_sets(model: LanguageModel, n: int, seed: int, names: Iterable = SETS) -> dict:
    """{name: VerdictTask} for some of `SETS`, n statements each."""
    places = {name: i for i, name in enumerate(SETS)}
    return {
        name: verdicts(model, n=n, seed=100 * seed + places[name], **SETS[name]) for name in names
    }


PUSHED = ("cities", "cities, negated", "continents")


def verdicts_moved(
    cities: VerdictTask,
    sets: Mapping[str, VerdictTask],
    sites: Iterable[Key],
    places: Mapping[str, str],
) -> dict[str, dict[str, list[float]]]:
    """How often verdicts follow a push of one mean difference, true less false, of the statements
    on cities: {place: {set: [share at each site]}}, for the sets of `PUSHED`; the last is the first
    set's with a random direction of the same length.

    Args:
        places: {name: the token, "statement" or "last"}.
    """
    moved = {name: {each: [] for each in (*PUSHED, "random direction")} for name in places}
    for site, (name, place) in itertools.product(sites, places.items()):
        v = mean_difference(cities.stream[place][site], cities.truth)
        noise = find_direction(v[None], [], "random")
        noise *= np.linalg.norm(v) / np.linalg.norm(noise)
        for each in PUSHED:
            moved[name][each].append(sets[each].follows(site, place, v))
        moved[name]["random direction"].append(sets[PUSHED[0]].follows(site, place, noise))
    return moved


# -- the country of a landmark ---------------------------------------------------------------

PAIR = ("Italy", "Britain")  # the two countries with the most landmarks


class CountryTask(Choice):
    """Facts on the country of landmarks in one of two countries, up to the country.

    places  "name", the end of the landmark's name, and "last", the token before the country
    first   (n,), whether it is the first country
    """

    def __init__(self, model: LanguageModel, n: int, seed: int, pair: tuple[str, str] = PAIR):
        wanted = documents("facts", n, seed, relation="landmark-country", count=1)
        kept = [d for d in wanted if d.text[d.find("answer")[0].start :].startswith(pair)]
        texts = [
            (d.text, {"name": landmark_of(d).end, "last": d.find("answer")[0].start - 1})
            for d in kept
        ]
        super().__init__(model, texts, ([pair[0]], [pair[1]]))
        self.documents = kept
        self.first = np.array([d.find("answer")[0].value == pair[0] for d in kept])


def landmark_of(document: Document):
    """The span of a document's landmark."""
    return next(span for span in document.find("entity") if span.value == "landmark")
