"""Who receives: the one of the people named before who has not come up again.

`ioi` has three forms. In 'pair' (Wang et al. 2022) one of two people gives, so the other receives.
In 'crowd' two or three people are named, every one but the receiver a second time, and whoever
gives has been named twice or has no name: so repetition is the only cue, and new and repeated names
stand in the same places. Nothing is hidden, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, Weighted, compiled, finish

PAIR = compiled(
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

# The other form is put together from parts: an opening that names two or three people, sentences
# with one name each, and a last one in which somebody gives. The last parts of each list are held.
OPENINGS = {
    2: compiled(
        "{A} and {B} came to the {place}.",
        "{A} and {B} met at the {place}.",
        "{A} met {B} at the {place}.",
        "in the morning {A} and {B} went to the {place}.",
        "{A} was at the {place} with {B}.",
        "near the {place}, {A} saw {B}.",
        "the {place} was quiet when {A} and {B} arrived.",
        "friends since school, {A} and {B} worked at the {place}.",
        # held out
        "in the morning {A} met {B} at the {place}.",
        "{A} and {B} arrived at the {place}.",
    ),
    3: compiled(
        "{A}, {B} and {C} met at the {place}.",
        "{A} and {B} came to the {place} with {C}.",
        "{A} saw {B} and {C} at the {place}.",
        "in the morning {A}, {B} and {C} went to the {place}.",
        "the {place} was quiet when {A}, {B} and {C} arrived.",
        "near the {place}, {A} met {B} and {C}.",
        # held out
        "in the morning {A} met {B} and {C} at the {place}.",
        "{A}, {B} and {C} came to the {place}.",
    ),
}
ACTS = compiled(
    "{X} laughed.",
    "{X} waited.",
    "{X} sat down.",
    "{X} left early.",
    "{X} was tired.",
    "{X} was late.",
    "{X} had lost {object}.",
    "{X} looked at the {place}.",
    "{X} was happy.",
    "then {X} came in.",
    "after a while {X} sat down.",
    "there was {X}.",
    "a dog looked at {X}.",
    "it was late when {X} came in.",
    "nobody knew {X}.",
    "then {X} laughed.",
    "everyone knew {X}.",
    "everyone waited for {X}.",
    "somebody had seen {X}.",
    "at the {place}, {X} was hungry.",
    "for an hour {X} had worked.",
    "near the door stood {X}.",
    "{X} went home and came back.",
    "the guide knew {X}.",
    # held out
    "after a while {X} was tired.",
    "a dog waited for {X}.",
)
GIFTS = compiled(
    "{S} gave {object} to {I!}.",
    "{S} handed {object} to {I!}.",
    "{S} sold {object} to {I!}.",
    "then {S} sent {object} to {I!}.",
    "{S} passed {object} to {I!}.",
    "in the end {S} offered {object} to {I!}.",
    "after a long talk, {S} showed {object} to {I!}.",
    "{S} found {object} and gave it to {I!}.",
    "{S} decided to give {object} to {I!}.",
    "so {S} lent {object} to {I!}.",
    "after a while {S} brought {object} to {I!}.",
    "at the {place}, {S} returned {object} to {I!}.",
    # held out
    "then {S} decided to sell {object} to {I!}.",
    "so {S} handed {object} to {I!}.",
)
NAMELESS = ("clerk", "guard", "driver", "guide", "stranger", "visitor", "neighbour", "keeper")
ORDERS = ("ABB", "BAB")
GIVERS = ("named", "nameless")
FORMS = Weighted({"pair": 2, "crowd": 5})
CROWD = Weighted({2: 2, 3: 3})  # how many people are named


@cache
def partners(name: str, held: bool) -> tuple:
    """Names that may stand with `name`: an unordered pair is either trained on or held out."""
    return tuple(
        other
        for other in lexicon.people()
        if other != name and is_held(*sorted((name, other))) == held
    )


@cache
def patterns(people: int) -> tuple[str, ...]:
    """Orders in which one person is named once and the others twice: 'I' is the one named once.

    The others are 'B', 'C', … in the order of their first mention, so each text has one pattern.
    """
    found = [""]
    for _ in range(2 * people - 1):
        found = [
            start + name
            for start in found
            for name in ("I", *"BCD"[: min(people - 1, len(set(start) - {"I"}) + 1)])
            if start.count(name) < (1 if name == "I" else 2)
        ]
    return tuple(found)


def thing(draw: Draw) -> tuple:
    """Slot value of an object: 'a book'."""
    word = draw.pick(lexicon.words("object"))
    return f"{lexicon.article(word)} {word}", None, None


def place(draw: Draw) -> tuple:
    return draw.pick(lexicon.words("place")), None, None


def receiver_and_others(draw: Draw, others: int, held: frozenset) -> tuple[str, list[str]]:
    """Whoever receives, and others each of whose pair with that name is trained on, or held out."""
    receiver = draw.pick(tuple(lexicon.people()))
    return receiver, draw.sample(partners(receiver, "entities" in held), others)


def pair(draw: Draw, page: Page, held: frozenset, order: str | None) -> dict:
    """Two people, one gives: the other receives. `order`: which of them is named first."""
    receiver, (giver,) = receiver_and_others(draw, 1, held)
    order = order or draw.pick(ORDERS)
    first, second = (receiver, giver) if order == "ABB" else (giver, receiver)
    values = {
        "A": (first, "entity", "person"),
        "B": (second, "entity", "person"),
        "S": (giver, "ioi", "S2"),
        "I": (receiver, "ioi", "IO"),
        "place": place(draw),
        "object": thing(draw),
    }
    page.capital = True
    page.fill(draw.pick(phrasings(PAIR, held)), values)
    return {"order": order, "giver": "named", "S": giver, "IO": receiver, "others": (giver,)}


def sentence(draw: Draw, page: Page, parts: tuple, values: dict) -> None:
    """One sentence from a list of phrasings, capitalised, after a space unless it is the first."""
    if page.length:
        page.write(" ")
    template = draw.pick(parts)
    slots = {part[0] for part in template if not isinstance(part, str)}
    for name, make in (("place", place), ("object", thing)):
        if name in slots:
            values = values | {name: make(draw)}
    page.capital = True
    page.fill(template, values)


def mentions(order: str, name: dict) -> list[tuple]:
    """Slot values of the names in their order, a person's second mention labelled as such."""
    return [
        (name[letter], *(("ioi", "S2") if letter in order[:i] else ("entity", "person")))
        for i, letter in enumerate(order)
    ]


def crowd(draw: Draw, page: Page, held: frozenset, count, order, opening, giver) -> dict:
    """Two or three people: all but the receiver are named twice, in any order.

    The first two or three mentions may stand in one opening, if they are different people; each of
    the others has a sentence of its own. The last may be the giver, if it is not the receiver's;
    otherwise somebody without a name gives.
    """
    count = count or ((len(order) + 1) // 2 if order else draw.weighted(CROWD))
    receiver, others = receiver_and_others(draw, count - 1, held)
    order = order or draw.pick(patterns(count))
    name = {"I": receiver, **dict(zip("BC", others, strict=False))}
    together = tuple(n for n in range(1, count + 1) if len(set(order[:n])) == n)
    opening = opening or draw.pick(together)
    giver = giver or (draw.pick(GIVERS) if order[-1] != "I" else "nameless")
    left = mentions(order, name)
    who = left.pop() if giver == "named" else (f"the {draw.pick(NAMELESS)}", None, None)
    if opening > 1:
        sentence(
            draw, page, phrasings(OPENINGS[opening], held), dict(zip("ABC", left, strict=False))
        )
        left = left[opening:]
    for mention in left:
        sentence(draw, page, phrasings(ACTS, held), {"X": mention})
    sentence(draw, page, phrasings(GIFTS, held), {"S": who, "I": (receiver, "ioi", "IO")})
    last = name[order.rstrip("I")[-1]]
    return {"order": order, "giver": giver, "S": last, "IO": receiver, "others": tuple(others)}


def ioi(
    draw: Draw,
    held: frozenset = NO_HOLD,
    form=None,
    order=None,
    people=None,
    opening=None,
    giver=None,
) -> Document:
    """Who receives? Latents: form, order, giver, IO, S (the last other named), others.

    form    'pair' or 'crowd'; None draws one, and `order` 'ABB' or 'BAB' means 'pair'
    order   'ABB', 'BAB' (who is named first), or for a crowd one of `patterns(2)`, `patterns(3)`
    people  2 or 3, of a crowd
    opening how many of a crowd's mentions stand in the first sentence, 1, 2 or 3
    giver   'named' or 'nameless', in a crowd
    """
    form = form or ("pair" if order in ORDERS else draw.weighted(FORMS))
    page = Page()
    if form == "pair":
        latents = pair(draw, page, held, order)
    else:
        latents = crowd(draw, page, held, people, order, opening, giver)
    return finish(page, draw, "ioi", form=form, **latents)
