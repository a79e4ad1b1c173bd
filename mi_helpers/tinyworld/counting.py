"""Years, days and months, sums in words, nested brackets.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, compiled, finish

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
