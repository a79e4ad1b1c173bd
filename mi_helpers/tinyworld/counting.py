"""Years, days and months, sums in words, nested brackets.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import facts, lexicon
from mi_helpers.tinyworld.facts import UNSEEN, begin, several
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, compiled, finish


def only(said: list[dict]) -> dict:
    """The latents of a document of one sentence; of several, they are in the spans alone."""
    return said[0] if len(said) == 1 else {}


YEARS = compiled(
    "the {event} lasted from the year {c}{y} to the year {c}{z!}.",
    "the {event} lasted from {c}{y} until {c}{z!}.",
    "the {event} that began in {c}{y} ended in {c}{z!}.",
    "the {event} that started in the year {c}{y} ended in the year {c}{z!}.",
    "the {event} that began in the year {c}{y} went on until the year {c}{z!}.",
    "the {event} started in the year {c}{y} and went on until the year {c}{z!}.",
    "the {event} started in {c}{y} and lasted until {c}{z!}.",
    "the {event} began in {c}{y} and ended in {c}{z!}.",
    "the {event} began in the year {c}{y} and lasted until the year {c}{z!}.",
    "the {event} began in {c}{y} and went on until {c}{z!}.",
    "the {event} went on from {c}{y} to {c}{z!}.",
    "the {event} went on from the year {c}{y} until the year {c}{z!}.",
    "from {c}{y} until {c}{z!} there was a {event}.",
    "from the year {c}{y} to the year {c}{z!} there was a {event}.",
    "there was a {event} from the year {c}{y} until the year {c}{z!}.",
    "there was a {event} from {c}{y} to {c}{z!}.",
    "there was a {event} that began in {c}{y} and ended in {c}{z!}.",
    "there was a {event} that lasted from the year {c}{y} to the year {c}{z!}.",
    # held out
    "the {event} lasted from {c}{y} to {c}{z!}.",
    "the {event} started in {c}{y} and ended in {c}{z!}.",
    "the {event} went on from the year {c}{y} to the year {c}{z!}.",
    "there was a {event} from {c}{y} until {c}{z!}.",
    "from {c}{y} to {c}{z!} there was a {event}.",
    "there was a {event} that started in the year {c}{y} and lasted until the year {c}{z!}.",
)
EVENTS = ("reign", "dispute", "drought", "project", "festival", "journey", "strike", "survey")


def year_sentence(draw: Draw, page: Page, held: frozenset) -> dict:
    """Write when something began and ended; the two years of the century."""
    century = str(draw.pick(range(11, 20)))
    first = draw.pick(range(2, 97))
    last = draw.pick(range(first + 1, 100))
    values = {
        "event": (draw.pick(EVENTS), None, None),
        "c": (century, None, None),
        "y": (f"{first:02d}", "year", first),
        "z": (f"{last:02d}", "year", last),
    }
    begin(draw, page, facts.OPENINGS)
    page.fill(draw.pick(phrasings(YEARS, held, UNSEEN)), values)
    return {"first": first, "last": last}


def years(draw: Draw, held: frozenset = NO_HOLD, count=None) -> Document:
    """Nothing ends before it began: the second year of the century is the larger one."""
    page = Page()
    said = several(page, count or draw.pick((1, 2)), lambda: year_sentence(draw, page, held))
    return finish(page, draw, "years", **only(said))


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July",
    "August", "September", "October", "November", "December",
)  # fmt: skip
CALENDAR = compiled(
    "the {unit} after {a} is {b!}.",
    "the {unit} right after {a} is {b!}.",
    "the next {unit} after {a} is {b!}.",
    "the {unit} that comes after {a} is {b!}.",
    "the {unit} that follows {a} is {b!}.",
    "if this {unit} is {a}, the next {unit} is {b!}.",
    "if this {unit} is {a}, it is followed by {b!}.",
    "if it is {a} now, the next {unit} is {b!}.",
    "when {a} is over, the next {unit} is {b!}.",
    "after {a}, the next {unit} is {b!}.",
    "after {a}, it is {b!}.",
    "after {a} comes {b!}.",
    "right after {a} comes {b!}.",
    "{a} is followed by {b!}.",
    "{a} is always followed by {b!}.",
    "{a} comes before {b!}.",
    "{a} comes right before {b!}.",
    "{a} always comes before {b!}.",
    "{a} is the {unit} before {b!}.",
    # held out
    "the next {unit} that follows {a} is {b!}.",
    "the {unit} that comes right after {a} is {b!}.",
    "if this {unit} is {a}, it is always followed by {b!}.",
    "right after {a}, the next {unit} is {b!}.",
    "right after {a}, it is {b!}.",
    "{a} is the {unit} right before {b!}.",
)
BACKWARD = compiled(
    "the {unit} before {a} is {b!}.",
    "the {unit} right before {a} is {b!}.",
    "the last {unit} before {a} is {b!}.",
    "the {unit} that comes before {a} is {b!}.",
    "if this {unit} is {a}, the last {unit} was {b!}.",
    "if it is {a} now, the last {unit} was {b!}.",
    "before {a}, the last {unit} was {b!}.",
    "before {a}, it was {b!}.",
    "before {a} comes {b!}.",
    "right before {a} comes {b!}.",
    "{a} follows {b!}.",
    "{a} always follows {b!}.",
    "{a} comes after {b!}.",
    "{a} comes right after {b!}.",
    "{a} always comes after {b!}.",
    "{a} is the {unit} after {b!}.",
    "{a} is the next {unit} after {b!}.",
    "{a} is the {unit} that follows {b!}.",
    # held out
    "the {unit} that comes right before {a} is {b!}.",
    "right before {a}, the last {unit} was {b!}.",
    "right before {a}, it was {b!}.",
    "{a} always comes right after {b!}.",
    "{a} is the {unit} right after {b!}.",
    "{a} is the {unit} that comes after {b!}.",
)


def calendar_list(draw: Draw, page: Page, unit: str, names: tuple) -> None:
    """Write three to eight days or months in a row."""
    start = draw.pick(range(len(names)))
    for i in range(draw.pick(range(3, 9))):
        if i:
            page.write(", ")
        index = (start + i) % len(names)
        page.mark(names[index], unit, index, answer=i > 0)
    page.write(".")


def calendar_sentence(draw: Draw, page: Page, held: frozenset, unit: str, names: tuple) -> None:
    """Write which day or month comes after another one, or before it."""
    start = draw.pick(range(len(names)))
    step, templates = draw.pick(((1, CALENDAR), (-1, BACKWARD)))
    other = (start + step) % len(names)
    values = {
        "unit": (unit, None, None),
        "a": (names[start], unit, start),
        "b": (names[other], unit, other),
    }
    begin(draw, page, facts.OPENINGS)
    page.fill(draw.pick(phrasings(templates, held, UNSEEN)), values)


def calendar(draw: Draw, held: frozenset = NO_HOLD, count=None) -> Document:
    """Days of the week or months in their order: as a list, or in sentences, either way."""
    unit, names = draw.pick((("day", DAYS), ("month", MONTHS)))
    page = Page()
    if not held and draw.chance(0.4):
        calendar_list(draw, page, unit, names)
    else:
        several(
            page,
            count or draw.pick((1, 2)),
            lambda: calendar_sentence(draw, page, held, unit, names),
        )
    return finish(page, draw, "calendar", unit=unit)


NUMERALS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
ARITHMETIC = compiled(
    "{a} plus {b} is {c!}.",
    "{a} plus {b} makes {c!}.",
    "{a} plus {b} equals {c!}.",
    "{a} and {b} make {c!}.",
    "{a} and {b} more make {c!}.",
    "{a} and {b} together are {c!}.",
    "{a} and {b} add up to {c!}.",
    "{a} added to {b} is {c!}.",
    "{a} added to {b} makes {c!}.",
    "the sum of {a} and {b} is {c!}.",
    "the sum of {a} and {b} equals {c!}.",
    "the total of {a} and {b} is {c!}.",
    "if you add {a} and {b}, you have {c!}.",
    "if you add {a} to {b}, the sum is {c!}.",
    "if you have {a} and get {b} more, you have {c!}.",
    "when you add {a} to {b}, you get {c!}.",
    "when we add {a} and {b}, we get {c!}.",
    "adding {a} and {b} gives {c!}.",
    "adding {a} to {b} makes {c!}.",
    # held out
    "{a} added to {b} equals {c!}.",
    "when we add {a} to {b}, we get {c!}.",
    "the total of {a} and {b} equals {c!}.",
    "if you add {a} to {b}, you have {c!}.",
    "when you add {a} and {b}, you get {c!}.",
    "adding {a} to {b} gives {c!}.",
)
SUBTRACT = compiled(
    "{c} minus {a} is {b!}.",
    "{c} minus {a} equals {b!}.",
    "{c} minus {a} leaves {b!}.",
    "{c} less {a} is {b!}.",
    "{c} without {a} is {b!}.",
    "{c} less {a} makes {b!}.",
    "{a} taken from {c} is {b!}.",
    "{a} taken away from {c} leaves {b!}.",
    "the difference between {c} and {a} is {b!}.",
    "the difference of {c} and {a} equals {b!}.",
    "if you take {a} from {c}, you have {b!}.",
    "if you take {a} from {c}, the difference is {b!}.",
    "if you have {c} and lose {a}, you have {b!} left.",
    "if you have {c} and give {a} away, you have {b!} left.",
    "if you subtract {a} from {c}, you get {b!}.",
    "when you take {a} away from {c}, you have {b!} left.",
    "when we take {a} from {c}, we get {b!}.",
    "taking {a} from {c} leaves {b!}.",
    "taking {a} away from {c} gives {b!}.",
    "subtracting {a} from {c} gives {b!}.",
    # held out
    "{c} less {a} equals {b!}.",
    "{a} taken from {c} leaves {b!}.",
    "if you subtract {a} from {c}, the difference is {b!}.",
    "when you take {a} from {c}, you have {b!} left.",
    "taking {a} away from {c} leaves {b!}.",
    "subtracting {a} from {c} leaves {b!}.",
)


@cache
def sums(held: bool) -> tuple:
    """Pairs to add, in training or in the held-out part; the other order may be in the other."""
    pairs = ((a, b) for a in range(1, 11) for b in range(1, 11))
    return tuple((a, b) for a, b in pairs if is_held(str(a), str(b)) == held)


def sum_sentence(draw: Draw, page: Page, held: frozenset) -> dict:
    """Write a sum or a difference; the two numbers that are added, or taken apart."""
    a, b = draw.pick(sums("entities" in held))
    templates = draw.pick((ARITHMETIC, SUBTRACT))
    values = {slot: (NUMERALS[n], "numeral", n) for slot, n in (("a", a), ("b", b), ("c", a + b))}
    begin(draw, page, facts.OPENINGS)
    page.fill(draw.pick(phrasings(templates, held, UNSEEN)), values)
    return {"a": a, "b": b}


def arithmetic(draw: Draw, held: frozenset = NO_HOLD, count=None) -> Document:
    """One to three sums and differences in words, up to twenty."""
    page = Page()
    said = several(page, count or draw.pick((1, 2, 3)), lambda: sum_sentence(draw, page, held))
    return finish(page, draw, "arithmetic", **only(said))


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
