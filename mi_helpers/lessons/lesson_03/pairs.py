"""Lesson 03's prompts: pairs that differ in one thing, each with the two answers.

pairs = fact_pairs(model, 16, seed=0)
effect = activation_patch(model, pairs.clean, pairs.corrupted, "resid_pre", pairs.metric(model))
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from torch import Tensor

from mi_helpers.ablation import Gaussian
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.patching import LogitDiff, normalised_logit_diff
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.copying import vocabulary
from mi_helpers.tinyworld.world import World

CITY = "The {} is in the city of"
COUNTRY = "The {} is in the country of"


@dataclass(frozen=True)
class Pairs:
    """n pairs of prompts, all with the same number of tokens, so that their positions line up.

    Attributes:
        clean, corrupted: token ids (n, pos).
        answer, wrong: the ids that complete them.
        texts: both prompts of each pair.
    """

    clean: Tensor
    corrupted: Tensor
    answer: list[int]
    wrong: list[int]
    texts: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Pairs:
        """The i-th pair alone."""
        return Pairs(
            self.clean[[i]], self.corrupted[[i]], [self.answer[i]], [self.wrong[i]], [self.texts[i]]
        )

    def reversed(self) -> Pairs:
        """The same pairs with clean and corrupted exchanged."""
        texts = [(b, a) for a, b in self.texts]
        return Pairs(self.corrupted, self.clean, self.wrong, self.answer, texts)

    @property
    def subject(self) -> list[int]:
        """The positions at which clean and corrupted differ, in any pair."""
        return (self.clean != self.corrupted).any(0).nonzero()[:, 0].tolist()

    def columns(self, model: LanguageModel, name: str = "name") -> list[str]:
        """A label for each position: its word in all prompts, or `name` where they differ."""
        words = model.str_tokens(self.clean[0])
        return [name if i in self.subject else word.strip() for i, word in enumerate(words)]

    def metric(self, model: LanguageModel, corrupted: Gaussian | None = None) -> LogitDiff:
        """The normalised logit difference, averaged over the pairs before it is normalised.

        Args:
            corrupted: noise in place of the corrupted prompts.
        """
        other = self.corrupted if corrupted is None else corrupted
        return normalised_logit_diff(model, self.clean, other, self.answer, self.wrong)

    def noise(self, seeds: int = 4) -> Gaussian:
        """Causal tracing's noise on the subject."""
        return Gaussian(self.subject, seeds=seeds)

    def words(self, model: LanguageModel) -> list[tuple[str, str]]:
        """The two answers of each pair, as words."""
        decode = model.tokenizer.decode
        both = zip(self.answer, self.wrong, strict=True)
        return [(decode([a]).strip(), decode([w]).strip()) for a, w in both]


def make_pairs(
    model: LanguageModel, texts: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]]
) -> Pairs:
    """Pairs of texts.

    Args:
        answers: the words that complete each pair (one token, mind the space).

    Raises:
        ModelError: the texts' token counts differ, or an answer is not one token.
    """
    answer, wrong = ([model.to_single_token(pair[i]) for pair in answers] for i in (0, 1))
    ids = model.tokens([text for pair in texts for text in pair])  # clean, corrupted, clean, …
    return Pairs(ids[::2], ids[1::2], answer, wrong, list(texts))


def is_token(model: LanguageModel, text: str) -> bool:
    """Whether a text is one token that the model knows."""
    try:
        model.to_single_token(text)
    except ModelError:
        return False
    return True


def length(model: LanguageModel, text: str) -> int:
    """How many tokens a text has, <bos> included."""
    return model.tokens(text).shape[1]


# ---------------------------------------------------------------------------------------- facts


@lru_cache(maxsize=8)
def answerable(model: LanguageModel, what: str = "city") -> tuple[lexicon.Landmark, ...]:
    """The landmarks whose city (or country) is one token."""
    return tuple(x for x in lexicon.landmarks() if is_token(model, f" {getattr(x, what)}"))


@lru_cache(maxsize=8)
def aligned(model: LanguageModel, what: str = "city") -> tuple[lexicon.Landmark, ...]:
    """Of those, the ones whose names have the commonest token count."""
    by_count: dict[int, list] = {}
    for place in answerable(model, what):
        by_count.setdefault(length(model, CITY.format(place.name)), []).append(place)
    return tuple(max(by_count.values(), key=len)) if by_count else ()


def sights(model: LanguageModel, first: str = "Eiffel Tower", count: int = 4) -> list:
    """`first` and landmarks in other cities whose names have as many tokens, one for each city.

    Raises:
        ValueError: no such landmark as `first`, or none that is as long.
    """
    known = {place.name: place for place in lexicon.landmarks()}
    if first not in known:
        raise ValueError(f"TinyWorld has no landmark {first!r}: see data/facts/landmarks.csv.")
    found, size = [known[first]], length(model, CITY.format(first))
    for place in sorted(answerable(model), key=lambda x: x.city != "Rome"):
        other = place.city not in {each.city for each in found}
        if other and length(model, CITY.format(place.name)) == size:
            found.append(place)
    if len(found) < 2:
        raise ValueError(f"No other landmark's name has as many tokens as {first!r}.")
    return found[:count]


def fact_pairs(
    model: LanguageModel, n: int, seed: int, what: str = "city", alike: bool = False
) -> Pairs:
    """n pairs of landmarks in different cities, with names of the same number of tokens.

    Args:
        what: "city" or "country", which the prompts ask for.
        alike: the control: two landmarks of one city (or country), and another one as the wrong
            answer.

    Raises:
        ValueError: the model's tokenizer leaves fewer than two landmarks to choose from.
    """
    places, rng = aligned(model, what), random.Random(seed)
    answers = sorted({getattr(place, what) for place in places})
    if len(answers) < 2:
        raise ValueError(f"{model.name} has too few landmarks of one token count for pairs.")
    chosen: list[tuple] = []
    while len(chosen) < n:
        a, b = rng.sample(places, 2)
        if (getattr(a, what) == getattr(b, what)) == alike:
            wrong = getattr(b, what)
            if alike:
                wrong = rng.choice([answer for answer in answers if answer != wrong])
            chosen.append((a, b, wrong))
    template = CITY if what == "city" else COUNTRY
    texts = [(template.format(a.name), template.format(b.name)) for a, b, _ in chosen]
    return make_pairs(model, texts, [(f" {getattr(a, what)}", f" {w}") for a, _, w in chosen])


def unequal_pairs(model: LanguageModel, n: int, seed: int) -> tuple[list, list, list, list]:
    """n pairs of landmarks in different cities, whose names have different numbers of tokens.

    Returns:
        The clean and the corrupted prompts, the answers and the wrong ones, as texts.
    """
    places, rng = answerable(model), random.Random(seed)
    if len({length(model, CITY.format(place.name)) for place in places}) < 2:
        raise ValueError(f"{model.name} has no landmarks of two token counts.")
    rows = []
    while len(rows) < n:
        a, b = rng.sample(places, 2)
        texts = CITY.format(a.name), CITY.format(b.name)
        if a.city != b.city and length(model, texts[0]) != length(model, texts[1]):
            rows.append((*texts, f" {a.city}", f" {b.city}"))
    return tuple(map(list, zip(*rows, strict=True)))  # pyright: ignore[reportReturnType]


# --------------------------------------------------------------------------------- other questions


def number_pairs(model: LanguageModel, n: int, seed: int) -> Pairs:
    """n pairs: a noun in the plural and in the singular, before another noun. Answers: are, is."""
    rng, texts = random.Random(seed), []
    forms = [nouns for nouns in lexicon.words("group_noun") if set(nouns) <= single(model, nouns)]
    for _ in range(n):
        (one, many), (other, _) = rng.sample(forms, 2)
        near = rng.choice(("near", "behind", "under", "beside"))
        texts.append((f"The {many} {near} the {other}", f"The {one} {near} the {other}"))
    return make_pairs(model, texts, [(" are", " is")] * n)


@lru_cache(maxsize=256)
def single(model: LanguageModel, words: tuple[str, ...]) -> frozenset[str]:
    """Those of some words that are one token after a space."""
    return frozenset(word for word in words if is_token(model, f" {word}"))


def giver_pairs(model: LanguageModel, n: int, seed: int) -> Pairs:
    """n pairs: two people, of whom one gives something, or the other. Answers: who receives."""
    rng = random.Random(seed)
    names = sorted(single(model, tuple(lexicon.people())))
    texts, answers = [], []
    for _ in range(n):
        (a, b), place = rng.sample(names, 2), rng.choice(("park", "school", "market"))
        text = f"Then {a} and {b} went to the {place}, and {{}} gave a book to"
        texts.append((text.format(b), text.format(a)))
        answers.append((f" {a}", f" {b}"))
    return make_pairs(model, texts, answers)


def swap_pairs(model: LanguageModel, n: int, seed: int, size: int = 8) -> Pairs:
    """n pairs of random words, written again up to word j. In the corrupted prompt, words j and k
    have changed places the first time, so another word follows the last one's first occurrence.

        clean:      a b c D e f G h | a b c D -> e        (j = 3, k = 6 of size 8)
        corrupted:  a b c G e f D h | a b c D -> h

    The possible answers keep their positions; only the words before them differ.
    """
    j, k = (size - 1) // 2, size - 2
    texts, answers = [], []
    for first in word_lists(model, n, seed, size):
        swapped = list(first)
        swapped[j], swapped[k] = first[k], first[j]
        again = first[: j + 1]
        texts.append(tuple(" " + " ".join(half + again) for half in (first, swapped)))
        answers.append((f" {first[j + 1]}", f" {first[k + 1]}"))
    return make_pairs(model, texts, answers)


def ending_pairs(model: LanguageModel, n: int, seed: int, size: int = 8) -> Pairs:
    """n pairs of random words, written again up to the same place, but with another last word.

    clean:      a b c D e f G h | a b c D -> e
    corrupted:  a b c D e f G h | a b c G -> h
    """
    j, k = (size - 1) // 2, size - 2
    texts, answers = [], []
    for first in word_lists(model, n, seed, size):
        again = first[:j]
        texts.append(tuple(" " + " ".join([*first, *again, first[i]]) for i in (j, k)))
        answers.append((f" {first[j + 1]}", f" {first[k + 1]}"))
    return make_pairs(model, texts, answers)


def word_lists(model: LanguageModel, n: int, seed: int, size: int) -> list[list[str]]:
    """n lists of random words, each of which is one token.

    Raises:
        ValueError: lists that are too short to swap two words in.
    """
    if size < 6:
        raise ValueError(f"Sequences of {size} words are too short to swap two: give 6 or more.")
    rng, words = random.Random(seed), sorted(single(model, tuple(vocabulary())))
    return [rng.sample(words, size) for _ in range(n)]


# ------------------------------------------------------------------------------------ occupations


@cache
def _world() -> World:
    return World()


JOBS = tuple(lexicon.occupations())


def pronoun_texts(seed: int, jobs: Sequence[str] = JOBS, held: bool = False) -> list[str]:
    """One sentence with each of the occupations, up to the first pronoun.

    Args:
        seed: of the phrasing.
        held: take a phrasing that the model was never trained on.
    """
    apart = ("templates",) if held else ()
    said = [_world().document(seed, "pronoun", apart, occupation=job) for job in jobs]
    return [each.text[: each.find("pronoun")[0].start].rstrip() for each in said]


def sides(jobs: Sequence[str] = JOBS, share: float = 1 / 3) -> tuple[list[str], list[str]]:
    """The occupations that are most often called 'she', and those most often called 'he'."""
    order = sorted(jobs, key=lexicon.occupations().get)
    count = max(1, round(share * len(order)))
    return order[-count:], order[:count]


def pronoun_pairs(model: LanguageModel, n: int, seed: int, jobs: Sequence[str] = JOBS) -> Pairs:
    """n pairs of one sentence: clean with a 'she' occupation, corrupted with a 'he' occupation.

    Occupations with an unusual number of tokens are left out.
    """
    texts = dict(zip(jobs, pronoun_texts(seed, jobs), strict=True))
    counts = {job: model.tokens(text).shape[1] for job, text in texts.items()}
    usual = max(set(counts.values()), key=list(counts.values()).count)
    she, he = sides([job for job in jobs if counts[job] == usual])
    rng = random.Random(seed)
    chosen = [(texts[rng.choice(she)], texts[rng.choice(he)]) for _ in range(n)]
    return make_pairs(model, chosen, [(" she", " he")] * n)
