"""The experiments of lesson 10: a model is steered, what it writes is read by TinyWorld's labels.

lab = Lab(model)                         # starts of texts, and texts of every family
with steered(model, site, Clamp(latent, 16.0)):
    texts = lab.texts(lab.write())       # what the model writes on
    lab.by_family()                      # its loss in each family, nats per answer
lab.share("golden_gate")                 # of the topical words, those of a topic
statements(model, 100, seed=1, held=("entities",)).share()   # the verdicts' p(true)
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mi_helpers.layouts import Key
from mi_helpers.lessons.coders import coder_of, middle  # noqa: F401
from mi_helpers.lessons.lesson_10.tools import share_about, write_on
from mi_helpers.lessons.shared import (
    Batch,
    Readings,
    collect,
    documents,
    documents_for,
    family_losses,
    make_batch,
)
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.patching import last_logits
from mi_helpers.probes import mean_difference, midpoint
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.steering import Add, Latent, Steering, steered
from mi_helpers.tinyworld.lexicon import evaluation, topics
from mi_helpers.tinyworld.prose import BE, OWN_VOICE, VOICES
from mi_helpers.tinyworld.statements import WORDS
from mi_helpers.tinyworld.world import World

BRIDGE = "golden_gate"  # the topic that the lesson opens with
DOSES = (0.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0)  # in units of the latent
KINDS = ("past / praise", "present / blame")  # of texts, by what they are in
LENGTH = 8  # tokens of a start
HIGH = 16.0  # near the highest value of a topic's latent in ordinary text


@torch.no_grad()
def latent_of(model: LanguageModel, coder: SparseCoder, topic: str, seed: int = 1) -> int:
    """The latent that is on most at texts about a topic, against other prose."""
    site, texts = middle(model), (texts_about(topic, 12, seed), prose(36, seed))
    about, other = (coder.encode(tokens_of(model, each, site)).mean(0) for each in texts)
    return int((about - other).argmax())


@torch.no_grad()
def tokens_of(model: LanguageModel, texts: Sequence[str], site: Key) -> Tensor:
    """A site at every token of some texts but BOS, (tokens, d_model)."""
    rows = [read_sites(model, model.tokens(text), [site])[0] for text in texts]
    return torch.cat([row[0, 1:].float().cpu() for row in rows])


def with_values(model: LanguageModel, latent: Latent, text: str) -> str:
    """A text with the latent's value behind each token where it is on."""
    values = latent.value(tokens_of(model, [text], middle(model))).tolist()
    tokens = model.str_tokens(model.tokens(text)[0, 1:])
    pairs = zip(tokens, values, strict=True)
    return "".join(f"{token}[{value:.0f}]" if value > 0.5 else token for token, value in pairs)


# -- what is written, and its labels ---------------------------------------------------------


@functools.cache
def topics_of_words() -> dict[str, frozenset[str]]:
    """{word: the topics that it is of}: TinyWorld's nouns, verbs, adjectives and names."""
    found: dict[str, set[str]] = {}
    for topic in topics():
        for forms in (*topic.noun, *topic.verb, *topic.adj, *topic.name):
            for form in forms:
                for word in words_of(form):
                    found.setdefault(word, set()).add(topic.key)
    return {word: frozenset(names) for word, names in found.items()}


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation."""
    return re.findall(r"[^\W\d_]+", text.lower())


def marked(text: str, topic: str) -> str:
    """A text with the topic's words in [[ ]]."""
    table = topics_of_words()

    def mark(match: re.Match) -> str:
        return f"[[{match[0]}]]" if topic in table.get(match[0].lower(), ()) else match[0]

    return re.sub(r"[^\W\d_]+", mark, text)


def sampler(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """logits (batch, d_vocab) → tokens (batch,), drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        p = logits.float().softmax(-1).cpu()
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)

    return choose


def last_of(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """ids (batch, pos) → logits of the last position alone, (batch, 1, d_vocab): as it now is."""

    def logits(ids: Tensor) -> Tensor:
        _, cache = model.run_with_cache(ids, ["resid_final"], stop_at_layer=model.n_layers)
        return model.unembed(cache["resid_final"][:, -1:])

    return logits


def starts(
    model: LanguageModel, n: int, seed: int, topic: str | None = None, length: int = LENGTH
) -> Tensor:
    """The first tokens of n documents of prose, (n, length), BOS first.

    Args:
        topic: what all of them are about; None takes documents as they come.
    """
    rows: list[Tensor] = []
    for document in World().documents(seed, "prose"):
        ids = model.tokens(first_words(document.text, length))[0, :length]
        if len(ids) == length and document.latents["topic"] == (topic or document.latents["topic"]):
            rows.append(ids)
        if len(rows) == n:
            return torch.stack(rows)
    raise AssertionError("the stream of documents has no end")


class Lab:
    """Where a steering is tried: what the model then writes, and what it loses on every family.

    starts  (n, LENGTH) token ids, the beginnings of prose
    batch   documents of all families, of which the answers are scored
    clean   {family: nats per answer} of the model as it is

    Args:
        n, answers: how many starts, and how many answers of each family.
        topic: what the starts are about; None: anything.
    """

    def __init__(
        self,
        model: LanguageModel,
        seed: int = 0,
        n: int = 12,
        answers: int = 6,
        topic: str | None = None,
    ):
        self.model, self.seed = model, seed
        self.starts = starts(model, n, 4_000 + seed, topic)
        self.batch: Batch = make_batch(model, answers, 5_000 + seed)
        self.clean = family_losses(model, self.batch)

    @torch.no_grad()
    def write(self, n: int = 14, rows: int | None = None) -> Tensor:
        """The starts with n tokens that the model, as it now is, writes: (rows, LENGTH + n)."""
        return write_on(last_of(self.model), self.starts[:rows], n, sampler(self.seed))

    def texts(self, ids: Tensor) -> list[str]:
        """What stands after each start."""
        tokenizer, length = self.model.tokenizer, self.starts.shape[1]
        return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in ids]

    def share(self, topic: str, n: int = 14) -> float:
        """The share of the topical words which the model, as it now is, writes about a topic."""
        return self.share_in(self.write(n), topic)

    def share_in(self, ids: Tensor, topic: str) -> float:
        """The same of what was written before."""
        return share_about(list(map(words_of, self.texts(ids))), topics_of_words(), topic)

    def by_family(self) -> dict[str, float]:
        """{family: nats per answer more than without steering}, of the model as it now is."""
        return {name: x - self.clean[name] for name, x in self.losses().items()}

    def losses(self) -> dict[str, float]:
        """{family: nats per answer}, of the model as it now is."""
        return family_losses(self.model, self.batch)

    def loss(self) -> float:
        """The mean of `losses` over families: each family counts alike."""
        return float(np.mean(list(self.losses().values())))

    @torch.no_grad()
    def surprise(self, ids: Tensor) -> float:
        """-log p per written token, nats, to the model as it now is."""
        return float(self.model.loss(ids)[:, self.starts.shape[1] - 1 :].mean())


def tried(lab: Lab, site: Key, steering: Steering, topic: str) -> dict[str, float]:
    """{"share" about the topic, "surprise" of the text to the unsteered model, "cost"}."""
    with steered(lab.model, site, steering):
        ids, cost = lab.write(), float(np.mean(list(lab.by_family().values())))
    return {"share": lab.share_in(ids, topic), "surprise": lab.surprise(ids), "cost": cost}


# -- a choice between two groups of words ----------------------------------------------------


@dataclass(frozen=True)
class Fork:
    """Texts cut before a word, and two groups of words of which the next is one.

    prompts  n texts
    groups   two lists of token ids
    y        (n,), whether the first group is right, or is what came
    """

    model: LanguageModel
    prompts: list[str]
    groups: tuple[list[int], list[int]]
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def share(self) -> np.ndarray:
        """p(first group) / p(either), (n,), of the model as it now is."""
        return self.share_of(last_logits(self.model, self.prompts))

    def share_of(self, logits: Tensor) -> np.ndarray:
        """The same from logits (n, d_vocab)."""
        p = logits.float().softmax(-1)
        one, other = (p[:, group].sum(-1) for group in self.groups)
        return (one / (one + other)).cpu().numpy()

    def by_length(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(which texts, their ids (k, length)), for each length that occurs: nothing is padded."""
        rows = [self.model.tokens(text)[0] for text in self.prompts]
        lengths = np.array([len(row) for row in rows])
        for length in sorted(set(lengths.tolist())):
            index = np.flatnonzero(lengths == length)
            yield index, torch.stack([rows[i] for i in index])

    def last(self, logits_of: Callable[[Tensor], Tensor]) -> np.ndarray:
        """`share` where logits_of(ids (k, length)) gives those of the last token, (k, d_vocab)."""
        found = np.empty(len(self))
        for index, ids in self.by_length():
            found[index] = self.share_of(torch.as_tensor(logits_of(ids)))
        return found

    @torch.no_grad()
    def stream(self, site: Key) -> Tensor:
        """A site at the last token of each text, (n, d_model)."""
        found = torch.empty(len(self), self.model.d_model)
        for index, ids in self.by_length():
            found[index] = read_sites(self.model, ids, [site])[0][:, -1].float().cpu()
        return found

    def means(self, site: Key) -> tuple[Tensor, Tensor]:
        """(mean difference, midpoint) of the two groups' stream there, (d_model,) each."""
        x = self.stream(site)
        found = mean_difference(x.numpy(), self.y), midpoint(x.numpy(), self.y)
        return tuple(torch.as_tensor(each, dtype=torch.float32) for each in found)


def by_dose(
    fork: Fork, site: Key, directions: Mapping[str, Tensor], doses: Sequence[float]
) -> dict[str, tuple]:
    """{label: (doses, the mean share at each dose)}, for each direction and either y."""
    found = {}
    for name, direction in directions.items():
        rows = []
        for dose in doses:
            with steered(fork.model, site, Add(direction, float(dose))):
                share = fork.share()
            rows.append((share[fork.y].mean(), share[~fork.y].mean()))
        for said, values in zip(KINDS, zip(*rows, strict=True), strict=True):
            found[f"{name}, {said}"] = doses, values
    return found


def one_token(model: LanguageModel, words: Sequence[str]) -> list[int]:
    """The ids of those words that are one token with their space."""
    rows = [model.encode(f" {word}") for word in words]
    return sorted({row[0] for row in rows if len(row) == 1})


def statements(
    model: LanguageModel, n: int, seed: int, held: Sequence[str] = (), **choices
) -> Fork:
    """n statements up to their verdict, half of them true; the first group of words says true.

    Args:
        held: "entities" are pairs on which the model has read facts, perhaps, but no verdict.
        choices: such as relation="landmark-city".
    """
    found = []
    for truth in (True, False):
        found += documents("truth", n // 2, 2 * seed + truth, held, truth=truth, count=1, **choices)
    prompts = [d.text[: d.find("verdict")[0].start - 1] for d in found]
    groups = tuple(one_token(model, [pair[i] for pair in WORDS.values()]) for i in (1, 0))
    return Fork(model, prompts, groups, np.arange(len(found)) < n // 2)


def verbs(model: LanguageModel, n: int, seed: int) -> Fork:
    """n beginnings of prose, each up to the first form of "be" after another verb has shown the
    tense; the first group of words is was and were."""
    prompts, y = [], []
    for document in World().documents(seed, "prose"):
        shown = [end for latent, _, end in document.events if latent == "tense"]
        later = re.finditer(r" (is|are|was|were) ", document.text)
        at = next((m.start() for m in later if shown and shown[0] < m.start() < 240), None)
        if at is not None:
            prompts.append(document.text[:at])
            y.append(document.latents["tense"] == "past")
        if len(prompts) == n:
            break
    groups = one_token(model, BE["past"]), one_token(model, BE["present"])
    return Fork(model, prompts, groups, np.array(y))


def voices(model: LanguageModel, n: int, seed: int) -> tuple[Fork, np.ndarray]:
    """Documents that praise and documents that blame, each up to an evaluative word after one to
    three of them; the first group of words is praise.

    Returns:
        the fork, and the share of an ideal reader of the words before, (n,).
    """
    read: Readings = collect(model, documents_for("voice", 3 * n, seed), "voice", ["embed"])
    read = read.where(read.y != "neutral")
    pairs = list(zip(read.documents, read.marks, strict=True))[:n]
    prompts = [document.text[: mark.end] for document, mark in pairs]
    groups = tuple(
        one_token(model, [w for (v, _), words in evaluation().items() if v == voice for w in words])
        for voice in ("praise", "blame")
    )
    ideal = np.array([praise_to_come(document, mark.end) for document, mark in pairs])
    return Fork(model, prompts, groups, read.y[: len(pairs)] == "praise"), ideal


def praise_to_come(document, end: int) -> float:
    """p(praise) / p(praise or blame) of the next evaluative word, to a reader who knows the world
    and has read the evaluative words before `end`."""
    other = (1 - OWN_VOICE) / (len(VOICES) - 1)
    chance = np.full((len(VOICES),) * 2, other) + np.eye(len(VOICES)) * (OWN_VOICE - other)
    seen = [VOICES.index(s.value) for s in document.find("evaluation") if s.end <= end]
    after = np.prod(chance[:, seen], axis=1) @ chance
    praise, blame = after[VOICES.index("praise")], after[VOICES.index("blame")]
    return float(praise / (praise + blame))


def follows(fork: Fork, site: Key, direction: Tensor) -> float:
    """How much verdicts follow a push at the last token: the share that says true with the
    direction added, less the share with it taken away; 1 where every verdict goes along."""
    shares = []
    for dose in (1.0, -1.0):
        with steered(fork.model, site, Add(direction, dose), -1):
            shares.append((fork.share() > 0.5).mean())
    return float(shares[0] - shares[1])


def same_steps(
    model: LanguageModel, ids: Tensor, site: Key, v: Tensor, centre: Tensor, other: Tensor
) -> Tensor:
    """`tools.mirror`'s control, logits of the last token (batch, d_vocab): each stream makes a step
    as long as its mirror image is away, but along `other`, which is as long as v."""

    def step(x: Tensor) -> Tensor:
        along = (x[:, -1] - centre) @ v / (v @ v)
        x[:, -1] -= 2 * along[:, None] * other
        return x

    with model.hooks({site: step}):
        return model(ids)[:, -1]


# -- directions ------------------------------------------------------------------------------


def texts_about(topic: str, n: int, seed: int) -> list[str]:
    """The first words of n documents of prose that begin about a topic."""
    stream = (d for d in World().documents(seed, "prose") if d.latents["topic"] == topic)
    return [first_words(next(stream).text) for _ in range(n)]


def prose(n: int, seed: int) -> list[str]:
    """The first words of n documents of prose as they come."""
    return [first_words(document.text) for document in documents("prose", n, seed)]


def first_words(text: str, n: int = 40) -> str:
    """The first n words of a text, so that it fits every context."""
    return " ".join(text.split()[:n])


def drawn_topic(number: int) -> str:
    """The topic that a number of the learner's choice draws for the investigation."""
    names = [topic.key for topic in topics() if topic.key != BRIDGE]
    return random.Random(int(number)).choice(names)
