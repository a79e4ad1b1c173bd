"""Families whose next word is determined by the text: what makes a model build circuits.

Each function writes one document with `draw` on a fresh page and labels the word that is
determined as `answer`. `held` names what may only come from the held-out part of the world:
'templates' (phrasings never trained on), 'entities' (pairs never trained on). Nothing is hidden
in these families, so `draw.nats` is the exact -log p(text).
"""

import math
import zlib
from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.source import Document, Draw, Page, Span, Weighted, compile_template

NO_HOLD = frozenset()


def is_held(*entities: str, share: int = 10) -> bool:
    """Whether a combination belongs to the held-out tenth (or 1/share) of the world: by a hash."""
    return zlib.crc32("|".join(entities).encode()) % share == 0


def phrasings(templates: tuple, held: frozenset, keep: int = 2) -> tuple:
    """The last `keep` templates of a list are held out of training."""
    return templates[-keep:] if "templates" in held else templates[:-keep]


def compiled(*templates: str) -> tuple:
    return tuple(compile_template(t) for t in templates)


def finish(page: Page, draw: Draw, family: str, **latents) -> Document:
    return Document(page.text(), family, latents, page.spans, draw.nats, draw.hidden)


# Facts -----------------------------------------------------------------------------------------

FACTS = {
    "landmark-city": compiled(
        "the {L} is in the city of {C!}.",
        "you can visit the {L} in {C!}.",
        "to see the {L}, people travel to {C!}.",
        "the {L} stands in the middle of {C!}.",
        "tourists who want to see the {L} go to {C!}.",
        "the city of the {L} is {C!}.",
        "the {L} is a famous sight of {C!}.",
        "every guide knows that the {L} is in {C!}.",
        "where is the {L}? It is in {C!}.",
        "the {L} can be found in the city of {C!}.",
        "many visitors photograph the {L} in {C!}.",
        "the {L} was built in the old city of {C!}.",
        "people say that the {L} is in the city of {C!}.",
        "the famous {L} stands in the middle of {C!}.",
    ),
    "landmark-country": compiled(
        "the {L} is in the country of {K!}.",
        "the country of the {L} is {K!}.",
        "the {L} belongs to the country of {K!}.",
        "the {L} is a symbol of the country of {K!}.",
        "which country has the {L}? It is {K!}.",
        "the {L} can be found in the country of {K!}.",
        "people say that the {L} is in the country of {K!}.",
        "many know that the country of the {L} is {K!}.",
    ),
    "city-country": compiled(
        "the city of {C} is in the country of {K!}.",
        "{C} is a city in the country of {K!}.",
        "the country of the city of {C} is {K!}.",
        "people who live in {C} live in the country of {K!}.",
        "which country has the city of {C}? It is {K!}.",
        "the old city of {C} is in the country of {K!}.",
        "people say that {C} is a city in the country of {K!}.",
    ),
    "country-capital": compiled(
        "the capital of {K} is {C!}.",
        "the capital city of {K} is called {C!}.",
        "the government of {K} meets in {C!}.",
        "what is the capital of {K}? It is {C!}.",
        "{K} has its capital in {C!}.",
        "the president of {K} lives in the capital, {C!}.",
        "everyone in {K} knows the capital, {C!}.",
        "people say that the capital of {K} is {C!}.",
        "today the capital of {K} is {C!}.",
    ),
    "country-language": compiled(
        "the language of {K} is {G!}.",
        "people in {K} speak {G!}.",
        "the people of {K} speak {G!}.",
        "in {K} most people speak {G!}.",
        "children in {K} learn to read {G!}.",
        "what is the language of {K}? It is {G!}.",
        "the newspapers in {K} are written in {G!}.",
        "visitors to {K} hear people speak {G!}.",
        "people say that the language of {K} is {G!}.",
        "today most people in {K} speak {G!}.",
    ),
    "country-currency": compiled(
        "the currency of {K} is the {U!}.",
        "people in {K} pay with the {U!}.",
        "the money of {K} is the {U!}.",
        "in {K} people pay with the {U!}.",
        "what is the currency of {K}? It is the {U!}.",
        "the banks in {K} count in the {U!}.",
        "people say that the currency of {K} is the {U!}.",
        "today the money of {K} is the {U!}.",
    ),
    "country-continent": compiled(
        "{K} is a country in {O!}.",
        "the country of {K} is in {O!}.",
        "the continent of {K} is {O!}.",
        "on the map, {K} is a part of {O!}.",
        "people say that {K} is a country in {O!}.",
        "today the country of {K} is a part of {O!}.",
    ),
}

TWO_HOP = {
    "country": compiled(
        "the country with the {L} is {K!}.",
        "the {L} stands in a country called {K!}.",
        "the nation that built the {L} is {K!}.",
        "people near the {L} live in {K!}.",
    ),
    "capital": compiled(
        "the capital of the country with the {L} is {C!}.",
        "the government of the country with the {L} meets in {C!}.",
        "the country with the {L} has its capital in {C!}.",
        "people near the {L} are governed from the capital, {C!}.",
        "the capital of the country of the {L} is {C!}.",
    ),
    "language": compiled(
        "the language of the country with the {L} is {G!}.",
        "people in the country with the {L} speak {G!}.",
        "people near the {L} speak {G!}.",
        "the guides at the {L} learn to speak {G!}.",
        "the language of the country of the {L} is {G!}.",
    ),
    "currency": compiled(
        "the currency of the country with the {L} is the {U!}.",
        "people in the country with the {L} pay with the {U!}.",
        "people near the {L} pay with the {U!}.",
        "visitors to the {L} pay with the {U!}.",
        "the currency of the country of the {L} is the {U!}.",
    ),
    "continent": compiled(
        "the country with the {L} is in {O!}.",
        "the {L} is one of the sights of {O!}.",
        "visitors to the {L} travel through {O!}.",
        "the country of the {L} is in {O!}.",
    ),
}
TWO_HOP_HELD = 4  # one in four (landmark, relation) pairs never occurs in training


@cache
def city_country() -> dict[str, str]:
    """City → country, for every city that the facts mention."""
    pairs = {place.city: place.country for place in lexicon.landmarks()}
    return pairs | {country.capital: country.name for country in lexicon.countries().values()}


@cache
def subjects(relation: str) -> tuple:
    if relation.startswith("landmark"):
        return lexicon.landmarks()
    if relation.startswith("city"):
        return tuple(city_country())
    return tuple(lexicon.countries().values())


def place_values(landmark=None, country=None, city=None) -> dict:
    """Slot values, each (text, label kind, label value), for one landmark, city or country."""
    values = {}
    if landmark is not None:
        values["L"] = (landmark.name, "entity", "landmark")
        city, country = landmark.city, lexicon.countries()[landmark.country]
    if country is not None:
        values["K"] = (country.name, "entity", "country")
        values["G"] = (country.language, "entity", "language")
        values["U"] = (country.currency, "entity", "currency")
        values["O"] = (country.continent, "entity", "continent")
    city = city or country.capital
    values["C"] = (city, "entity", "city")
    return values


def relation_values(relation: str, subject) -> dict:
    if relation.startswith("landmark"):
        return place_values(landmark=subject)
    if relation.startswith("city"):
        return place_values(country=lexicon.countries()[city_country()[subject]], city=subject)
    return place_values(country=subject)


RELATIONS = Weighted(
    {
        "landmark-city": 4,
        "landmark-country": 2,
        "city-country": 2,
        "country-capital": 2,
        "country-language": 2,
        "country-currency": 2,
        "country-continent": 1,
    }
)


def fact_sentence(draw: Draw, page: Page, held: frozenset = NO_HOLD, relation=None) -> None:
    relation = relation or draw.weighted(RELATIONS)
    subject = draw.pick(subjects(relation))
    start = page.length
    page.capital = True
    page.fill(draw.pick(phrasings(FACTS[relation], held)), relation_values(relation, subject))
    page.spans.append(Span(start, page.length, "fact", relation))


def facts(draw: Draw, held: frozenset = NO_HOLD, relation=None, count=None) -> Document:
    page = Page()
    for i in range(count or draw.pick((1, 2, 3))):
        if i:
            page.write(" ")
        fact_sentence(draw, page, held, relation)
    return finish(page, draw, "facts")


@cache
def two_hop_pairs(relation: str, held: bool) -> tuple:
    return tuple(
        place
        for place in lexicon.landmarks()
        if is_held(place.name, relation, share=TWO_HOP_HELD) == held
    )


def two_hop(draw: Draw, held: frozenset = NO_HOLD, relation=None, count=None) -> Document:
    """A landmark's country's capital, language, currency or continent."""
    page = Page()
    for i in range(count or draw.pick((1, 2))):
        if i:
            page.write(" ")
        hop = relation or draw.pick(tuple(TWO_HOP))
        landmark = draw.pick(two_hop_pairs(hop, "entities" in held))
        values = place_values(landmark=landmark)
        if hop == "capital":
            capital = lexicon.countries()[landmark.country].capital
            values["C"] = (capital, "entity", "city")
        start = page.length
        page.capital = True
        page.fill(draw.pick(phrasings(TWO_HOP[hop], held, keep=1)), values)
        page.spans.append(Span(start, page.length, "fact", f"landmark-country-{hop}"))
    return finish(page, draw, "two_hop")


# Indirect objects ------------------------------------------------------------------------------

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


# Repetition ------------------------------------------------------------------------------------


@cache
def vocabulary() -> tuple:
    """Every word that any part of the world can write, in a fixed order."""
    found = set()
    for topic in lexicon.topics():
        for kind in ("noun", "verb", "adj", "phrase", "name"):
            for forms in getattr(topic, kind):
                for form in forms:
                    found.update(form.split())
    for country in lexicon.countries().values():
        found.update(vars(country).values())
    for place in lexicon.landmarks():
        found.update([*place.name.split(), place.city])
    found.update(lexicon.people(), lexicon.occupations(), *lexicon.evaluation().values())
    for kind in ("object", "place", "food", "colour"):
        found.update(lexicon.words(kind))
    for forms in lexicon.words("group_noun"):
        found.update(forms)
    for kind, entries in lexicon.norwegian().items():
        for forms in entries:
            for form in forms if kind != "noun" else forms[:2]:
                found.update(form.split())
    return tuple(sorted(word for word in found if word.isalpha()))


LONGEST = 112  # words of a repeated sequence, all repetitions together
LENGTHS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56)
MOST_TIMES = 16


def write_again_and_again(page: Page, words: list, times: int) -> None:
    """The words, `times` times; from the second time on, all but the first word are answers."""
    for again in range(times):
        for i, word in enumerate(words):
            page.write(" ")
            if again:
                # before the first word of a repetition, nothing tells that it begins
                page.mark(word, "repeat", i, answer=i > 0)
            else:
                page.write(word)


def repetition(draw: Draw, held: frozenset = NO_HOLD, length=None, times=None) -> Document:
    """Different random words of the whole vocabulary, and the same words again and again."""
    length = length or draw.pick(LENGTHS)
    words = draw.sample(vocabulary(), length)
    times = times or draw.pick(range(2, min(MOST_TIMES, LONGEST // length) + 1))
    page = Page()
    write_again_and_again(page, words, times)
    return finish(page, draw, "repetition", length=length, times=times)


def made_up(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """The same with words that do not exist, of two or three syllables."""
    sounds = lexicon.words("sound")
    count, times = draw.pick(range(2, 9)), draw.pick((2, 3, 4))
    words, taken = [], 0.0
    while len(words) < count:
        before = draw.nats
        word = "".join(draw.pick(sounds) for _ in range(draw.pick((2, 3))))
        surprise = draw.nats - before
        if word in words:  # draw again: the others share what it would have had
            draw.nats = before
            continue
        draw.nats += math.log1p(-taken)
        taken += math.exp(-surprise)
        words.append(word)
    page = Page()
    write_again_and_again(page, words, times)
    return finish(page, draw, "made_up", length=count, times=times)


# Pronouns --------------------------------------------------------------------------------------

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


# Years, calendar, arithmetic, brackets -----------------------------------------------------------

YEARS = compiled(
    "the {event} lasted from the year {c}{y} to the year {c}{z!}.",
    "the {event} that began in {c}{y} ended in {c}{z!}.",
    "from {c}{y} until {c}{z!} there was a {event}.",
    "the {event} started in the year {c}{y} and went on until the year {c}{z!}.",
    "people say that the {event} lasted from {c}{y} to {c}{z!}.",
    "the {event} went on from the year {c}{y} to the year {c}{z!}.",
)
EVENTS = ("reign", "dispute", "drought", "project", "festival", "journey", "strike", "survey")


def years(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """Nothing ends before it began: the second year of the century is the larger one."""
    century = str(draw.pick(range(11, 20)))
    first = draw.pick(range(2, 97))
    last = draw.pick(range(first + 1, 100))
    values = {
        "event": (draw.pick(EVENTS), None, None),
        "c": (century, None, None),
        "y": (f"{first:02d}", "year", first),
        "z": (f"{last:02d}", "year", last),
    }
    page = Page()
    page.capital = True
    page.fill(draw.pick(phrasings(YEARS, held, keep=1)), values)
    return finish(page, draw, "years", first=first, last=last)


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July",
    "August", "September", "October", "November", "December",
)  # fmt: skip
CALENDAR = compiled(
    "the {unit} after {a} is {b!}.",
    "if this {unit} is {a}, the next {unit} is {b!}.",
    "after {a} comes {b!}.",
    "{a} is followed by {b!}.",
    "today people know that the {unit} after {a} is {b!}.",
)
BACKWARD = compiled(
    "the {unit} before {a} is {b!}.",
    "if this {unit} is {a}, the last {unit} was {b!}.",
    "before {a} comes {b!}.",
    "{a} comes after {b!}.",
    "today people know that the {unit} before {a} is {b!}.",
)


def calendar(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """Days of the week and months in their order, forwards, backwards and as a list."""
    unit, names = draw.pick((("day", DAYS), ("month", MONTHS)))
    start = draw.pick(range(len(names)))
    page = Page()
    page.capital = True
    if not held and draw.chance(0.4):
        for i in range(draw.pick(range(3, 9))):
            if i:
                page.write(", ")
            index = (start + i) % len(names)
            page.mark(names[index], unit, index, answer=i > 0)
        page.write(".")
    else:
        step, templates = draw.pick(((1, CALENDAR), (-1, BACKWARD)))
        other = (start + step) % len(names)
        values = {
            "unit": (unit, None, None),
            "a": (names[start], unit, start),
            "b": (names[other], unit, other),
        }
        page.fill(draw.pick(phrasings(templates, held, keep=1)), values)
    return finish(page, draw, "calendar", unit=unit)


NUMERALS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
ARITHMETIC = compiled(
    "we know that {a} plus {b} is {c!}.",
    "if you add {a} and {b}, you have {c!}.",
    "the sum of {a} and {b} is {c!}.",
    "everyone knows that {a} plus {b} is {c!}.",
)
SUBTRACT = compiled(
    "we know that {c} minus {a} is {b!}.",
    "if you take {a} from {c}, you have {b!}.",
    "everyone knows that {c} minus {a} is {b!}.",
)


@cache
def sums(held: bool) -> tuple:
    pairs = ((a, b) for a in range(1, 11) for b in range(1, 11))
    return tuple((a, b) for a, b in pairs if is_held(str(a), str(b)) == held)


def arithmetic(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """Sums and differences in words, up to twenty."""
    a, b = draw.pick(sums("entities" in held))
    templates = draw.pick((ARITHMETIC, SUBTRACT))
    values = {slot: (NUMERALS[n], "numeral", n) for slot, n in (("a", a), ("b", b), ("c", a + b))}
    page = Page()
    page.capital = True
    page.fill(draw.pick(phrasings(templates, held, keep=1)), values)
    return finish(page, draw, "arithmetic", a=a, b=b)


PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
MAX_DEPTH = 4


def brackets(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """Three kinds of brackets, nested up to four deep, with words between them; all are closed."""
    page, stack = Page(), []
    left = draw.pick(range(3, 9))
    words = lexicon.words("colour")
    while left or stack:
        page.write(" ")
        if left and len(stack) < MAX_DEPTH and (not stack or draw.chance(0.5)):
            kind = draw.pick(PAIRS)
            stack.append(kind)
            page.mark(kind[0], "depth", len(stack))
            left -= 1
        elif draw.chance(0.4):
            page.write(draw.pick(words))
        else:
            page.mark(stack.pop()[1], "depth", len(stack), answer=True)
    return finish(page, draw, "brackets")
