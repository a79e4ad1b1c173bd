"""Statements with a verdict, half of them true: "The Colosseum is in Paris. That is false."

A statement says that a relation gives a subject a value ("the Colosseum is in Paris") or, negated,
that it does not. It is true with chance 1/2. It names the subject's own value if it is true and
affirmed or false and negated; else the value of one of the subjects that have another, each equally
likely. Relation, subject, polarity and phrasings are drawn independently of the truth.

Nothing is hidden, so `draw.nats` is the exact -log p(text). Labels:

truth      True or False, on the last character of a statement: its '.' or '?'
statement  the relation, on the whole statement with that character
polarity   'affirmed' or 'negated', on the same characters
verdict    True or False, on the word that says it, which is also the `answer`

Held out: the last phrasings of each table ('templates'), one (subject, relation) pair in six
('entities'), and the relation country-continent ('relations').
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from mi_helpers.tinyworld import copying
from mi_helpers.tinyworld.facts import relation_values, subjects
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, Span, Weighted, compiled, finish

# Up to the value, none of these is a sentence of `facts.FACTS`, where every value is true.
AFFIRMED = {
    "landmark-city": compiled(
        "the {L} is in {C}",
        "the {L} stands in {C}",
        "the {L} is among the sights of {C}",
        "the {L} belongs to the city of {C}",
        "visitors find the {L} in {C}",
        "{C} is the home of the {L}",
        # held out
        "the home of the {L} is {C}",
        "{C} is the city with the {L}",
    ),
    "landmark-country": compiled(
        "the {L} is in {K}",
        "the {L} stands in {K}",
        "the {L} is among the sights of {K}",
        "visitors find the {L} in {K}",
        "{K} is the home of the {L}",
        "{K} is the country with the {L}",
        # held out
        "the home of the {L} is {K}",
        "the {L} is a part of {K}",
    ),
    "city-country": compiled(
        "{C} is in {K}",
        "{C} is a city in {K}",
        "the city of {C} is in {K}",
        "{C} is one of the cities of {K}",
        "{C} belongs to {K}",
        "{K} has a city called {C}",
        # held out
        "the city of {C} belongs to {K}",
        "{C} is among the cities of {K}",
    ),
    "country-capital": compiled(
        "{C} is the capital of {K}",
        "{C} is the capital city of {K}",
        "the capital city of {K} is {C}",
        "the government of {K} sits in {C}",
        "the president of {K} lives in {C}",
        "{K} is governed from {C}",
        # held out
        "the government of {K} is in {C}",
        "the city of {C} is the capital of {K}",
    ),
    "country-language": compiled(
        "{G} is the language of {K}",
        "{G} is spoken in {K}",
        "people speak {G} in {K}",
        "those who live in {K} speak {G}",
        "the schools of {K} teach {G}",
        "the laws of {K} are written in {G}",
        # held out
        "{G} is the language of the people of {K}",
        "those who live in {K} read {G}",
    ),
    "country-currency": compiled(
        "the {U} is the currency of {K}",
        "the {U} is used in {K}",
        "people pay with the {U} in {K}",
        "those who live in {K} pay with the {U}",
        "the shops of {K} take the {U}",
        "prices in {K} are given in the {U}",
        # held out
        "the {U} is the money of {K}",
        "the banks of {K} take the {U}",
    ),
    "country-continent": compiled(
        "{K} is in {O}",
        "{K} is a part of {O}",
        "{K} belongs to {O}",
        "{O} is the home of {K}",
        "{O} is the continent of {K}",
        "{O} has a country called {K}",
        # held out
        "the country of {K} belongs to {O}",
        "{O} is the continent with the country of {K}",
    ),
}
NEGATED = {
    "landmark-city": compiled(
        "the {L} is not in {C}",
        "the {L} does not stand in {C}",
        "the {L} is no part of {C}",
        "visitors do not find the {L} in {C}",
        "{C} is not the home of the {L}",
        # held out
        "the {L} does not belong to the city of {C}",
        "{C} is not the city with the {L}",
    ),
    "landmark-country": compiled(
        "the {L} is not in {K}",
        "the {L} is in no part of {K}",
        "the {L} does not stand in {K}",
        "visitors do not find the {L} in {K}",
        "{K} is not the home of the {L}",
        # held out
        "the {L} does not belong to {K}",
        "{K} is not the country with the {L}",
    ),
    "city-country": compiled(
        "{C} is not in {K}",
        "{C} is not a city in {K}",
        "{C} is in no part of {K}",
        "{C} does not belong to {K}",
        "{K} has no city called {C}",
        # held out
        "the city of {C} is not in {K}",
        "{C} is not one of the cities of {K}",
    ),
    "country-capital": compiled(
        "{C} is not the capital of {K}",
        "the capital of {K} is not {C}",
        "the government of {K} does not sit in {C}",
        "the president of {K} does not live in {C}",
        "{K} is not governed from {C}",
        # held out
        "{C} is not the capital city of {K}",
        "the government of {K} is not in {C}",
    ),
    "country-language": compiled(
        "{G} is not the language of {K}",
        "{G} is not spoken in {K}",
        "people in {K} do not speak {G}",
        "the schools of {K} do not teach {G}",
        "the laws of {K} are not written in {G}",
        # held out
        "the language of {K} is not {G}",
        "those who live in {K} do not speak {G}",
    ),
    "country-currency": compiled(
        "the {U} is not the currency of {K}",
        "the {U} is not used in {K}",
        "people in {K} do not pay with the {U}",
        "the shops of {K} do not take the {U}",
        "prices in {K} are not given in the {U}",
        # held out
        "the currency of {K} is not the {U}",
        "those who live in {K} do not pay with the {U}",
    ),
    "country-continent": compiled(
        "{K} is not in {O}",
        "{K} is no part of {O}",
        "{K} is in no part of {O}",
        "{K} does not belong to {O}",
        "{O} has no country called {K}",
        # held out
        "the country of {K} is not in {O}",
        "{O} is not the continent of {K}",
    ),
}
# Shares that a small model can learn from. Before it knows of negation, what is so is called true
# in all but the negated cases, and verdicts in one phrasing teach sooner than in thirteen: with
# 20 % negated, or all phrasings alike, nothing was learned from as much text as sufficed with 10 %
# and a usual phrasing.
NEGATIONS = 0.12  # share of statements that are negated
USUAL = 0.7  # share of verdicts that have the first phrasing

RELATIONS = Weighted(
    {
        "landmark-city": 4,
        "landmark-country": 2,
        "city-country": 2,
        "country-capital": 2,
        "country-language": 2,
        "country-currency": 2,
    }
)
HELD_RELATIONS = Weighted({"country-continent": 1})
HELD_PAIRS = 6  # one in six (subject, relation) pairs never stands in a statement of training
SLOTS = {  # the slots of a relation's subject and of its value
    "landmark-city": ("L", "C"),
    "landmark-country": ("L", "K"),
    "city-country": ("C", "K"),
    "country-capital": ("K", "C"),
    "country-language": ("K", "G"),
    "country-currency": ("K", "U"),
    "country-continent": ("K", "O"),
}

# {S} is the statement; the verdict is a word for (false, true).
WORDS = {
    "T": ("false", "true"),
    "R": ("wrong", "right"),
    "C": ("incorrect", "correct"),
    "Y": ("no", "yes"),
}
VERDICTS = compiled(
    "{S}. That is {T!}.",
    "{S}. This is {T!}.",
    "{S}. That is {R!}.",
    "{S}. This is {C!}.",
    "{S}. That statement is {T!}.",
    "{S}. This statement is {C!}.",
    "{S}. The claim is {T!}.",
    "{S}. This claim is {R!}.",
    "{S}. Every guide knows that this is {T!}.",
    "some people think that {S}. They are {R!}.",
    "people ask whether {S}. The answer is {Y!}.",
    "is it true that {S}? The answer is {Y!}.",
    "is it correct that {S}? The answer is {Y!}.",
    # held out
    "{S}. That is {C!}.",
    "{S}. This statement is {T!}.",
    "some people think that {S}. That is {R!}.",
    "some people ask whether {S}. The answer is {Y!}.",
)
HELD_VERDICTS = 4
BARE = 3 / 8  # chance that a document of two or three has one without verdict: 1/4 of all
(PLAIN,) = compiled("{S}.")

# In prose: what somebody claims, without a verdict.
REPORTS = compiled(
    "it is said that {S}.",
    "the old guide claims that {S}.",
    "some visitors believe that {S}.",
    "a letter from a friend says that {S}.",
    "in an old book we read that {S}.",
    "according to a newspaper, {S}.",
    # held out
    "the old book claims that {S}.",
    "according to a friend, {S}.",
)


@dataclass(frozen=True)
class Statement:
    """A drawn statement: what it says, and how.

    subject, value  as they stand in the text
    negated         whether it says that the relation does not give the subject this value
    truth           whether what it says is so
    parts, slots    its compiled phrasing, and what fills it
    """

    relation: str
    subject: str
    value: str
    negated: bool
    truth: bool
    parts: list
    slots: dict


@cache
def trained_or_held(relation: str, held: bool) -> tuple:
    """The subjects of a relation whose pair with it is held out, or those whose pair is not."""
    name = SLOTS[relation][0]
    return tuple(
        subject
        for subject in subjects(relation)
        if is_held(relation_values(relation, subject)[name][0], relation, share=HELD_PAIRS) == held
    )


@cache
def others(relation: str, own: str) -> Weighted:
    """The values of all subjects but those that have `own`, each as often as it occurs.

    So a value stands in false statements nearly as often as in true ones, and tells little alone.
    """
    slot = SLOTS[relation][1]
    values = [relation_values(relation, subject)[slot][0] for subject in subjects(relation)]
    return Weighted(Counter(value for value in values if value != own))


def draw_statement(
    draw: Draw, held: frozenset = NO_HOLD, relation=None, negated=None, truth=None, subject=None
) -> Statement:
    """A statement. A choice that is given (not None) is not drawn, and adds nothing to the nats."""
    relation = relation or draw.weighted(HELD_RELATIONS if "relations" in held else RELATIONS)
    subject = subject or draw.pick(trained_or_held(relation, "entities" in held))
    negated = draw.chance(NEGATIONS) if negated is None else negated
    parts = draw.pick(phrasings((NEGATED if negated else AFFIRMED)[relation], held))
    truth = draw.chance(0.5) if truth is None else truth
    slots = relation_values(relation, subject)
    name, target = SLOTS[relation]
    value, *label = slots[target]
    if truth == negated:
        value = draw.weighted(others(relation, value))
    slots = {name: slots[name], target: (value, *label)}
    return Statement(relation, slots[name][0], value, negated, truth, parts, slots)


def verdict_frame(draw: Draw, held: frozenset) -> list:
    """The usual phrasing of a verdict, or one of the others; or one of those held out."""
    usual, *rest = phrasings(VERDICTS, held, HELD_VERDICTS)
    if "templates" in held:
        return draw.pick((usual, *rest))
    return usual if draw.chance(USUAL) else draw.pick(rest)


def write_statement(page: Page, frame: list, said: Statement) -> None:
    """A statement in a frame, from its capital letter to the end of its verdict if there is one."""
    words = {slot: (pair[said.truth], "verdict", said.truth) for slot, pair in WORDS.items()}
    page.capital = True
    for part in frame:
        if isinstance(part, str) or part[0] != "S":
            page.fill([part], words)
            continue
        start = page.length
        page.fill(said.parts, said.slots)
        end = page.length + 1  # with the '.' or '?' that the frame goes on with
        polarity = "negated" if said.negated else "affirmed"
        page.spans.append(Span(start, end, "statement", said.relation))
        page.spans.append(Span(start, end, "polarity", polarity))
        page.spans.append(Span(end - 1, end, "truth", said.truth))


def judged(
    draw: Draw, held: frozenset = NO_HOLD, relation=None, count=None, negated=None, truth=None
) -> Document:
    """One to three statements with their verdicts; of two or three, one may stand without.

    relation, negated and truth are those of every statement. The latents of a document of one
    statement are its relation, subject, value, negated and truth.
    """
    page = Page()
    n = count or draw.pick((1, 2, 3))
    bare = draw.index(n) if n > 1 and draw.chance(BARE) else None
    for i in range(n):
        if i:
            page.write(" ")
        frame = PLAIN if i == bare else verdict_frame(draw, held)
        said = draw_statement(draw, held, relation, negated, truth)
        write_statement(page, frame, said)
    names = ("relation", "subject", "value", "negated", "truth") if n == 1 else ()
    return finish(page, draw, "truth", **{name: getattr(said, name) for name in names})


def told(
    draw: Draw, held: frozenset = NO_HOLD, relation=None, negated=None, truth=None
) -> Document:
    """What is so, and then a statement on it with its verdict: who compares the two can tell.

    "The Colosseum stands in Rome. The Colosseum is in Paris. That is false." It is in no mixture,
    is where a model learns to judge (`Recipe.judging`). A third are negated.
    """
    page = Page()
    relation = relation or draw.weighted(HELD_RELATIONS if "relations" in held else RELATIONS)
    subject = draw.pick(trained_or_held(relation, "entities" in held))
    negated = draw.chance(1 / 3) if negated is None else negated
    write_statement(page, PLAIN, draw_statement(draw, held, relation, False, True, subject))
    page.write(" ")
    frame = verdict_frame(draw, held)
    write_statement(page, frame, draw_statement(draw, held, relation, negated, truth, subject))
    return finish(page, draw, "truth")


def reported(draw: Draw, page: Page, held: frozenset = NO_HOLD) -> None:
    """A sentence of prose: somebody claims something, and nothing tells whether it is so."""
    frame = draw.pick(phrasings(REPORTS, held))
    write_statement(page, frame, draw_statement(draw, held))


def literal(parts: list) -> str:
    """The text of a compiled template, with '_' for each slot."""
    return "".join(part if isinstance(part, str) else "_" for part in parts)


def words() -> tuple:
    """Every alphabetic word that the phrasings write and that `copying.vocabulary` has not.

    As they are written: a frame begins with a capital, a statement with a capital or without.
    """
    frames = [literal(parts) for parts in (*VERDICTS, *REPORTS)]
    clauses = [
        literal(parts) for table in (AFFIRMED, NEGATED) for rows in table.values() for parts in rows
    ]
    texts = [text[0].upper() + text[1:] for text in frames + clauses] + clauses
    found = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    return tuple(sorted(found.union(*WORDS.values()) - set(copying.vocabulary())))
