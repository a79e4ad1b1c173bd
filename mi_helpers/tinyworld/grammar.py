"""Pronouns that follow an occupation, verbs that agree with the head noun.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, compiled, finish

PRONOUNS = compiled(
    "the {O} said that {P} was {Q}.",
    "the {O} went home because {P} was {Q}.",
    "when the {O} came in, {P} was {Q}.",
    "the {O} was {Q}, and {P} went to the {place}.",
    "the {O} thought that {P} had lost {H} {object}.",
    "the {O} at the {place} said that {P} would come later.",
    "after the {O} left the {place}, {P} found {H} {object}.",
    "although the {O} was {Q}, {P} gave {H} {object} away.",
    "the {O} said that {P} had seen {N}, and {P} was {Q}.",
    "in the evening the {O} knew that {P} was {Q}.",
    # held out
    "the {O} at the {place} said that {P} was {Q}.",
    "when the {O} left the {place}, {P} had lost {H} {object}.",
)
MOODS = ("tired", "happy", "late", "busy", "ready", "hungry", "right", "wrong", "alone", "early")
SHE = {True: ("she", "her"), False: ("he", "his")}


def pronoun(draw: Draw, held: frozenset = NO_HOLD, occupation=None) -> Document:
    """An occupation, then a pronoun: 'she' with the probability that data/world gives it."""
    job = occupation or draw.pick(tuple(lexicon.occupations()))
    she = draw.chance(lexicon.occupations()[job])
    subject, possessive = SHE[she]
    template = draw.pick(phrasings(PRONOUNS, held))
    slots = {part[0] for part in template if not isinstance(part, str)}
    values = {
        "O": (job, "entity", "occupation"),
        "P": (subject, "pronoun", job),
        "H": (possessive, "pronoun", job),
    }
    if "Q" in slots:
        values["Q"] = (draw.pick(MOODS), None, None)
    if "place" in slots:
        values["place"] = (draw.pick(lexicon.words("place")), None, None)
    if "object" in slots:
        values["object"] = (draw.pick(lexicon.words("object")), None, None)
    if "N" in slots:
        values["N"] = (draw.pick(tuple(lexicon.people())), "entity", "person")
    page = Page()
    page.capital = True
    page.fill(template, values)
    return finish(page, draw, "pronoun", occupation=job, she=she)


# Agreement -------------------------------------------------------------------------------------

AGREEMENT = compiled(
    "the {X} {near} the {Y} {BE!} {Q}.",
    "the {X} {near} the {Y} and the {Z} {BE!} {Q}.",
    "the {X} {near} the {Y} {near2} the {Z} {BE!} {Q}.",
    "the {X} that {N} found {near} the {Y} {BE!} {Q}.",
    "I think that the {X} {near} the {Y} {BE!} {Q}.",
    "yesterday the {X} {near} the {Y} {PAST!} {Q}.",
    "{N} said that the {X} {near} the {Y} {BE!} {Q}.",
    # held out
    "{N} thinks that the {X} {near} the {Y} {BE!} {Q}.",
    "I said that the {X} {near} the {Y} {near2} the {Z} {BE!} {Q}.",
)
NEAR = ("near", "behind", "under", "beside", "with", "above", "by")
STATES = ("old", "new", "red", "blue", "green", "heavy", "small", "large", "clean", "dry", "lost")
BE_FORMS = {"singular": ("is", "was"), "plural": ("are", "were")}


@cache
def attractors(noun: str, held: bool) -> tuple:
    """Nouns (as form pairs) that may follow `noun` in training, or only in the held-out part."""
    return tuple(
        forms
        for forms in lexicon.words("group_noun")
        if forms[0] != noun and is_held(noun, forms[0]) == held
    )


def agreement(draw: Draw, held: frozenset = NO_HOLD, mismatch=None) -> Document:
    """The verb agrees with the head noun, not with the nouns between them."""
    numbers = ("singular", "plural")
    head = draw.pick(lexicon.words("group_noun"))
    number = draw.pick(numbers)
    options = attractors(head[0], "entities" in held)
    template = draw.pick(phrasings(AGREEMENT, held))
    slots = {part[0] + str(part[1] or "") for part in template if not isinstance(part, str)}
    if mismatch is None:
        between = draw.pick(numbers)
    else:
        between = numbers[(number == "singular") == mismatch]
    first = draw.pick(options)
    values = {
        "X": (head[number == "plural"], "number", number),
        "Y": (first[between == "plural"], "number", between),
        "near": (draw.pick(NEAR), None, None),
        "Q": (draw.pick(STATES), None, None),
    }
    if "Z" in slots:
        other = draw.pick(options)
        third = between if mismatch else draw.pick(numbers)
        values["Z"] = (other[third == "plural"], "number", third)
    if "near2" in slots:
        values["near2"] = (draw.pick(NEAR), None, None)
    if "N" in slots:
        values["N"] = (draw.pick(tuple(lexicon.people())), "entity", "person")
    if "PAST" in slots:
        values["PAST"] = (BE_FORMS[number][1], "agreement", number)
    else:
        values["BE"] = (draw.pick(BE_FORMS[number]), "agreement", number)
    page = Page()
    page.capital = True
    page.fill(template, values)
    return finish(page, draw, "agreement", number=number, attractor=between)
