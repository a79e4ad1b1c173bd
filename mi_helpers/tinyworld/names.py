"""Who receives: the indirect object is one of the people named before.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, compiled, finish

IOI = compiled(
    "when {A} and {B} went to the {place}, {S} gave {object} to {I!}.",
    "then {A} and {B} went to the {place}, and {S} gave {object} to {I!}.",
    "after {A} and {B} went to the {place}, {S} handed {object} to {I!}.",
    "{A} and {B} went to the {place}. {S} gave {object} to {I!}.",
    "while {A} and {B} were working at the {place}, {S} passed {object} to {I!}.",
    "yesterday {A} and {B} met at the {place}, and {S} offered {object} to {I!}.",
    "{A} met {B} at the {place}. After a long talk, {S} sold {object} to {I!}.",
    "{A} sat with {B} near the {place} for an hour. Then {S} sent {object} to {I!}.",
    "after {A} saw {B} at the {place}, {S} decided to give {object} to {I!}.",
    "friends since school, {A} and {B} found {object} at the {place}. {S} gave it to {I!}.",
    "when {A} and {B} had a fight at the {place}, {S} returned {object} to {I!}.",
    "in the morning {A} and {B} came to the {place}, where {S} showed {object} to {I!}.",
    "the {place} was quiet when {A} and {B} arrived. {S} lent {object} to {I!}.",
    "{A} and {B} had a long day at the {place}, so {S} brought {object} to {I!}.",
    # held out
    "when {A} and {B} came to the {place}, {S} decided to give {object} to {I!}.",
    "after a long talk at the {place}, {A} and {B} went home, and {S} gave {object} to {I!}.",
)


@cache
def partners(name: str, held: bool) -> tuple:
    """Names that may stand with `name`: an unordered pair is either trained on or held out."""
    return tuple(
        other
        for other in lexicon.people()
        if other != name and is_held(*sorted((name, other))) == held
    )


def ioi(draw: Draw, held: frozenset = NO_HOLD, order=None) -> Document:
    """Two people, one gives: the other receives. `order` 'ABB' or 'BAB': who is named first."""
    page = Page()
    page.capital = True
    first = draw.pick(tuple(lexicon.people()))
    second = draw.pick(partners(first, "entities" in held))
    order = order or draw.pick(("ABB", "BAB"))
    giver, receiver = (second, first) if order == "ABB" else (first, second)
    thing = draw.pick(lexicon.words("object"))
    values = {
        "A": (first, "entity", "person"),
        "B": (second, "entity", "person"),
        "S": (giver, "ioi", "S2"),
        "I": (receiver, "ioi", "IO"),
        "place": (draw.pick(lexicon.words("place")), None, None),
        "object": (f"{lexicon.article(thing)} {thing}", None, None),
    }
    page.fill(draw.pick(phrasings(IOI, held)), values)
    return finish(page, draw, "ioi", order=order, S=giver, IO=receiver)
