"""Pronouns that follow an occupation, verbs that agree with the head noun.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.facts import UNSEEN, begin
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, Weighted, compiled, finish

PRONOUNS = compiled(
    "the {O} said that {P} was {Q}.",
    "the {O} said that {P} would come later.",
    "the {O} said that {P} had seen {N}, and {P} was {Q}.",
    "the {O} thought that {P} had lost {H} {object}.",
    "the {O} knew that {P} was {Q}.",
    "the {O} at the {place} said that {P} would come later.",
    "the {O} at the {place} knew that {P} had lost {H} {object}.",
    "the {O} from the {place} thought that {P} was {Q}.",
    "the {O} from the {place} said that {P} was {Q}.",
    "the {O} went home because {P} was {Q}.",
    "the {O} went home because {P} had lost {H} {object}.",
    "the {O} left the {place} because {P} was {Q}.",
    "the {O} at the {place} went home because {P} was {Q}.",
    "the {O} from the {place} came in because {P} was {Q}.",
    "when the {O} came in, {P} was {Q}.",
    "when the {O} left the {place}, {P} had lost {H} {object}.",
    "when the {O} from the {place} came in, {P} had lost {H} {object}.",
    "after the {O} left the {place}, {P} found {H} {object}.",
    "after the {O} went home, {P} was {Q}.",
    "after the {O} from the {place} went home, {P} found {H} {object}.",
    "although the {O} was {Q}, {P} gave {H} {object} away.",
    "although the {O} at the {place} was {Q}, {P} found {H} {object}.",
    "the {O} was {Q}, and {P} went to the {place}.",
    "the {O} came in, and {P} was {Q}.",
    "the {O} from the {place} was {Q}, and {P} went home.",
    "the {O} left the {place}, and {P} found {H} {object}.",
    "the {O} at the {place} came in, and {P} was {Q}.",
    # held out
    "the {O} at the {place} thought that {P} was {Q}.",
    "the {O} from the {place} went home because {P} had lost {H} {object}.",
    "when the {O} went home, {P} was {Q}.",
    "after the {O} came in, {P} found {H} {object}.",
    "although the {O} from the {place} was {Q}, {P} gave {H} {object} away.",
    "the {O} at the {place} was {Q}, and {P} went home.",
)
# When it happened: drawn apart from the rest of a sentence with a pronoun.
TIMES = Weighted(
    {
        "": 3,
        "yesterday, ": 1,
        "last week, ": 1,
        "one day, ": 1,
        "in the evening, ": 1,
        "that morning, ": 1,
    }
)
MOODS = ("tired", "happy", "late", "busy", "ready", "hungry", "right", "wrong", "alone", "early")
SHE = {True: ("she", "her"), False: ("he", "his")}


def pronoun(draw: Draw, held: frozenset = NO_HOLD, occupation=None) -> Document:
    """An occupation, then a pronoun: 'she' with the probability that data/world gives it."""
    job = occupation or draw.pick(tuple(lexicon.occupations()))
    she = draw.chance(lexicon.occupations()[job])
    subject, possessive = SHE[she]
    template = draw.pick(phrasings(PRONOUNS, held, UNSEEN))
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
    begin(draw, page, TIMES)
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
    """Nouns (as form pairs) that may follow `noun`, in training or in the held-out part.

    An unordered pair of nouns is either trained on or held out.
    """
    return tuple(
        forms
        for forms in lexicon.words("group_noun")
        if forms[0] != noun and is_held(*sorted((noun, forms[0]))) == held
    )


@cache
def heads(held: bool) -> tuple:
    """Nouns (as form pairs) that some noun may follow."""
    return tuple(forms for forms in lexicon.words("group_noun") if attractors(forms[0], held))


def agreement(draw: Draw, held: frozenset = NO_HOLD, mismatch=None) -> Document:
    """The verb agrees with the head noun, not with the nouns between them."""
    numbers = ("singular", "plural")
    head = draw.pick(heads("entities" in held))
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
