"""Lesson 08's prompts: pairs of sentences that name a landmark or a country and ask for something.

Each of a pair has as many tokens as the other, and another answer.

    asked = questions(model, 30, seed=0)
    asked[0].prompt, asked[0].answer, asked[0].rival
    unseen_hops(model, 10, seed=0)                    # two-hop questions that training never showed
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import repeated_tokens
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.facts import TWO_HOP_HELD
from mi_helpers.tinyworld.held import is_held

KINDS = {  # kind -> (what the sentence names, phrase, the country's property that answers)
    "city": ("landmark", "The {} is in the city of", "city"),
    "country": ("landmark", "The {} is in the country of", "name"),
    "capital": ("country", "The capital of {} is", "capital"),
    "language": ("country", "The language of {} is", "language"),
    "two-hop capital": ("landmark", "The capital of the country with the {} is", "capital"),
    "two-hop language": ("landmark", "The language of the country with the {} is", "language"),
    "two-hop currency": ("landmark", "People near the {} pay with the", "currency"),
}
TWO_HOP = tuple(kind for kind in KINDS if kind.startswith("two-hop"))
ALIKE = (("city", "country"), ("capital", "language"), ("two-hop capital", "two-hop language"))


@dataclass(frozen=True)
class Asked:
    """One sentence that asks for something.

    kind             one of `KINDS`
    subject          what the sentence names: a landmark or a country
    country          where that is
    prompt, answer   as texts
    """

    kind: str
    prompt: str
    subject: str
    country: str
    answer: str

    @property
    def asks(self) -> str:
        """What it asks for, such as "asks for capital"."""
        return f"asks for {self.kind.split()[-1]}"


@dataclass(frozen=True)
class Question:
    """A sentence and its partner, with as many tokens and another answer.

    Answers are one token each, with their space: " Paris".
    """

    one: Asked
    other: Asked

    @property
    def prompt(self) -> str:
        return self.one.prompt

    @property
    def answer(self) -> str:
        return f" {self.one.answer}"

    @property
    def rival(self) -> str:
        """The partner's answer."""
        return f" {self.other.answer}"

    def turned(self) -> Question:
        """The partner's question, whose partner is this one."""
        return Question(self.other, self.one)


def sentences(kind: str) -> Iterator[Asked]:
    """Every sentence of a kind; of "two-hop capital" only those where the second hop matters: the
    capital is not the landmark's own city."""
    named, phrase, wanted = KINDS[kind]
    if named == "country":
        for place in lexicon.countries().values():
            answer = getattr(place, wanted)
            yield Asked(kind, phrase.format(place.name), place.name, place.name, answer)
        return
    for mark in lexicon.landmarks():
        country = lexicon.countries()[mark.country]
        answer = mark.city if wanted == "city" else getattr(country, wanted)
        if kind != "two-hop capital" or answer != mark.city:
            yield Asked(kind, phrase.format(mark.name), mark.name, country.name, answer)


def unseen(asked: Asked) -> bool:
    """Whether this landmark and what is asked of it never stood together in training."""
    two_hop = asked.kind in TWO_HOP
    return two_hop and is_held(asked.subject, asked.kind.split()[-1], share=TWO_HOP_HELD)


@torch.no_grad()
def _right(model: LanguageModel, kind: str) -> tuple[list[Asked], list[Asked]]:
    """(right, all): the sentences of a kind whose answer is one token; right are those where it is
    the model's first choice."""
    asked = []
    for each in sentences(kind):
        try:
            model.to_single_token(f" {each.answer}")
        except ModelError:
            continue
        asked.append(each)
    by_length = defaultdict(list)
    for each in asked:
        by_length[length_of(model, each)].append(each)
    right = set()
    for group in by_length.values():
        said = model.forward(model.tokens([each.prompt for each in group]))[:, -1].argmax(-1)
        wanted = [model.to_single_token(f" {each.answer}") for each in group]
        right |= {e for e, a, b in zip(group, said.tolist(), wanted, strict=True) if a == b}
    return [each for each in asked if each in right], asked


def length_of(model: LanguageModel, asked: Asked) -> int:
    """The number of the sentence's tokens, with `<bos>`."""
    return model.tokens(asked.prompt).shape[1]


@lru_cache(maxsize=4)
def _known(model: LanguageModel) -> dict[str, tuple[list[Asked], list[Asked]]]:
    return {kind: _right(model, kind) for kind in KINDS}


def accuracy(model: LanguageModel, only_unseen: bool = False) -> dict[str, float]:
    """{kind: the share of its sentences that the model answers rightly}.

    Args:
        only_unseen: two-hop kinds alone, and of them the sentences that training never showed.
    """
    share = {}
    for kind in TWO_HOP if only_unseen else KINDS:
        right, asked = (
            [each for each in some if unseen(each) or not only_unseen]
            for some in _known(model)[kind]
        )
        share[kind] = len(right) / max(len(asked), 1)
    return share


def questions(
    model: LanguageModel, n: int, seed: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """n questions about two countries, of the kinds in turn, whose two sentences the model answers
    rightly.

    Raises:
        ValueError: an unknown kind; a kind of which the model rightly answers too few sentences
            with as many tokens.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"There is no kind {unknown}: choose from {', '.join(KINDS)}.")
    rng = random.Random(seed)
    pools = {kind: _partners(model, kind) for kind in kinds}
    return [Question(*rng.choice(pools[kinds[i % len(kinds)]])) for i in range(n)]


def _partners(model: LanguageModel, kind: str) -> list[tuple[Asked, Asked]]:
    """Ordered pairs of rightly answered sentences, with as many tokens and with different countries
    and answers."""
    right = _known(model)[kind][0]
    length = {each: length_of(model, each) for each in right}
    pairs = [
        (a, b)
        for a in right
        for b in right
        if length[a] == length[b] and a.country != b.country and a.answer != b.answer
    ]
    if not pairs:
        raise ValueError(
            f"{model.name} answers too few sentences of the kind {kind!r} to make a pair."
        )
    return pairs


def unseen_hops(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """n two-hop questions that training never showed (`unseen`), each once."""
    asked = [q for q in questions(model, 40 * n, seed, TWO_HOP) if unseen(q.one)]
    return list({q.prompt: q for q in asked}.values())[:n]


def opening(model: LanguageModel) -> Question:
    """Poland's capital, by a landmark of its, with a landmark of Spain as the partner; another
    two-hop question where the model does not answer both rightly."""
    for kind in TWO_HOP:
        for one, other in _partners(model, kind):
            if (one.country, other.country) == ("Poland", "Spain"):
                return Question(one, other)
    return unseen_hops(model, 1, seed=0)[0]


def untold(model: LanguageModel) -> Question:
    """A two-hop question that training never showed, and that the lesson tells no story of."""
    told = {q.prompt for q in (opening(model), *unseen_hops(model, 8, seed=0))}
    return next(q for q in unseen_hops(model, 20, seed=88) if q.prompt not in told)


def alike(model: LanguageModel, question: Question, n: int, seed: int) -> list[Question]:
    """At most n questions of the same kind and as many tokens, about other countries, each about
    another one."""
    length, taken = length_of(model, question.one), {question.one.country, question.other.country}
    pairs = [
        (one, other)
        for one, other in _partners(model, question.one.kind)
        if length_of(model, one) == length and not {one.country, other.country} & taken
    ]
    random.Random(seed).shuffle(pairs)
    return [
        Question(*pair) for pair in {one.country: (one, other) for one, other in pairs}.values()
    ][:n]


def name_ends(model: LanguageModel, asked: Asked) -> int:
    """The position of the last token of what a sentence names."""
    text = asked.prompt[: asked.prompt.index(asked.subject) + len(asked.subject)]
    return model.tokens(text).shape[1] - 1


def other_question(model: LanguageModel, asked: Asked) -> Asked | None:
    """The same landmark asked for its country's language in place of its capital, or the other way
    round, with as many tokens; None where the model answers it wrongly or there is none."""
    kinds = dict([ALIKE[-1], ALIKE[-1][::-1]])
    if asked.kind not in kinds:
        return None
    known = {each.subject: each for each in _known(model)[kinds[asked.kind]][0]}
    found = known.get(asked.subject)
    same = found is not None and length_of(model, found) == length_of(model, asked)
    return found if same else None


def paired(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """At most n unseen two-hop questions whose partner the model can also be asked something else
    about, rightly and in as many tokens."""
    asked = unseen_hops(model, 4 * n, seed)
    return [q for q in asked if other_question(model, q.other) is not None][:n]


def what_is_asked(model: LanguageModel, n: int, seed: int) -> list[Question]:
    """n questions whose partner names the same and asks for something else, of the pairs of kinds
    in `ALIKE` in turn; the model answers both sentences rightly.

    Raises:
        ValueError: it answers too few.
    """
    rng, pools, made = random.Random(seed), [], []
    for pair in ALIKE:
        one, other = ({each.subject: each for each in _known(model)[kind][0]} for kind in pair)
        both = [(one[name], other[name]) for name in one if name in other]
        pools.append(
            [
                (a, b)
                for a, b in both
                if a.answer != b.answer and length_of(model, a) == length_of(model, b)
            ]
        )
        rng.shuffle(pools[-1])
    for i in range(n):
        pool = pools[i % len(pools)]
        if not pool:
            raise ValueError(
                f"{model.name} answers too few of {ALIKE[i % len(ALIKE)]} about the same subject."
            )
        question = Question(*pool.pop())
        made.append(question if rng.random() < 0.5 else question.turned())
    return made


def repeated(model: LanguageModel, n: int, seed: int, length: int = 8) -> list[Question]:
    """n questions or fewer of another sort: random words, then one of them again, whose answer is
    the word that came after it. The partner has the same words and repeats another one. The model
    answers both rightly."""
    ids = repeated_tokens(model, 10 * n, length, seed)[:, -length:].tolist()
    made = []
    for i, row in enumerate(ids):
        one, other = random.Random(f"{seed} {i}").sample(range(length - 1), 2)
        pair = [_repeating(model, row, place) for place in (one, other)]
        if None not in pair and pair[0].answer != pair[1].answer and len(made) < n:
            made.append(Question(*pair))
    return made


def _repeating(model: LanguageModel, row: list[int], place: int) -> Asked | None:
    """The words, with the one at `place` again; None if the text has other tokens, or the model
    gives another answer."""
    prompt, answer = model.tokenizer.decode([*row, row[place]]), model.str_tokens([row[place + 1]])
    ids = model.tokens(prompt)[0]
    same = ids[-len(row) - 1 :].tolist() == [*row, row[place]]
    right = same and int(model.forward(ids[None])[0, -1].argmax()) == row[place + 1]
    return Asked("repeated", prompt, "", "", answer[0].strip()) if right else None
