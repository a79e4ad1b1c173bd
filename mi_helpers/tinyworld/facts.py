"""Facts about landmarks, cities and countries, and questions that take two of them.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD, is_held, phrasings
from mi_helpers.tinyworld.source import Document, Draw, Page, Span, Weighted, compiled, finish

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

# How a sentence may begin, in this family and in those of `counting`: drawn apart from the rest.
OPENINGS = Weighted(
    {
        "": 4,
        "people say that ": 1,
        "everyone knows that ": 1,
        "we know that ": 1,
        "we learn that ": 1,
        "it is well known that ": 1,
        "remember that ": 1,
        "as you know, ": 1,
        "of course, ": 1,
    }
)
UNSEEN = 6  # phrasings of a list that are held out: its last ones


def begin(draw: Draw, page: Page, openings: Weighted) -> None:
    """Begin a sentence: what is written next gets a capital, and may be an opening."""
    page.capital = True
    if opening := draw.weighted(openings):
        page.write(opening)


def several(page: Page, count: int, write) -> list:
    """Write `count` sentences with a space between them; what each call of `write` returns."""
    found = []
    for i in range(count):
        if i:
            page.write(" ")
        found.append(write())
    return found


# A question of two hops is a frame of `HOP_FRAMES` with a country said in one of these ways.
NATIONS = (
    "the country with {}",
    "the country where you find {}",
    "the country that has {}",
    "the country around {}",
    "the home country of {}",
)
HOP_FRAMES = {
    "capital": (
        "the capital of {} is {C!}.",
        "the government of {} meets in {C!}.",
        "{} has its capital in {C!}.",
        "the capital city of {} is called {C!}.",
        "{} is governed from {C!}.",
    ),
    "language": (
        "the language of {} is {G!}.",
        "people in {} speak {G!}.",
        "children in {} learn to read {G!}.",
        "the newspapers in {} are written in {G!}.",
        "visitors to {} hear people speak {G!}.",
    ),
    "currency": (
        "the currency of {} is the {U!}.",
        "people in {} pay with the {U!}.",
        "the money of {} is the {U!}.",
        "the banks in {} count in the {U!}.",
        "visitors to {} pay with the {U!}.",
    ),
    "country": (
        "{} is called {K!}.",
        "the name of {} is {K!}.",
        "people in {} live in {K!}.",
        "visitors to {} travel to {K!}.",
        "a trip to {} is a trip to {K!}.",
    ),
    "continent": (
        "{} is in {O!}.",
        "{} is a part of {O!}.",
        "the continent of {} is {O!}.",
        "visitors to {} travel through {O!}.",
        "people find {} on a map of {O!}.",
    ),
}


def crossed(frames: tuple, place: str) -> tuple:
    """Every frame with every way to say the country of `place`; the last `UNSEEN` are held out.

    Of 25 crossings the held-out six are spread out, so each part stands in three trained ones or
    more.
    """
    trained, held = [], []
    for i, nation in enumerate(NATIONS):
        for j, frame in enumerate(frames):
            text = frame.replace("{}", nation.replace("{}", place))
            (held if (i + j) % 4 == 3 else trained).append(text)
    return compiled(*trained, *held)


TWO_HOP = {hop: crossed(frames, "the {L}") for hop, frames in HOP_FRAMES.items()}
TWO_HOP["city-capital"] = crossed(HOP_FRAMES["capital"], "the city of {C2}")
HOPS = Weighted(
    {"capital": 3, "language": 2, "currency": 2, "country": 2, "continent": 1, "city-capital": 2}
)
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
        "landmark-country": 3,
        "city-country": 2,
        "country-capital": 4,
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
    """One to three facts, each a sentence or a question with its answer."""
    page = Page()
    several(page, count or draw.pick((1, 2, 3)), lambda: fact_sentence(draw, page, held, relation))
    return finish(page, draw, "facts")


@cache
def away() -> tuple[str, ...]:
    """Cities that are not the capital of their country."""
    countries = lexicon.countries()
    return tuple(city for city, home in city_country().items() if countries[home].capital != city)


@cache
def two_hop_pairs(relation: str, held: bool) -> Weighted:
    """Landmarks, or cities, that a relation is asked of in training, or only in the held-out part.

    A capital is asked for twice as often where it is not the landmark's own city, which would do
    as an answer without any hop; and of a city only where it is not that city.
    """
    if relation == "city-capital":
        weights = {city: (city, 1) for city in away()}
    else:
        far = 2 if relation == "capital" else 1
        weights = {
            place: (place.name, far if place.city in away() else 1) for place in lexicon.landmarks()
        }
    return Weighted(
        {
            subject: weight
            for subject, (name, weight) in weights.items()
            if is_held(name, relation, share=TWO_HOP_HELD) == held
        }
    )


def hop_values(relation: str, subject) -> dict:
    """Slot values: of a landmark and its country, or of a city, C2, and its country's capital."""
    if relation == "city-capital":
        country = lexicon.countries()[city_country()[subject]]
        return place_values(country=country) | {"C2": (subject, "entity", "city")}
    values = place_values(landmark=subject)
    if relation == "capital":
        values["C"] = place_values(country=lexicon.countries()[subject.country])["C"]
    return values


def hop_sentence(draw: Draw, page: Page, held: frozenset = NO_HOLD, relation=None) -> None:
    hop = relation or draw.weighted(HOPS)
    subject = draw.weighted(two_hop_pairs(hop, "entities" in held))
    start = page.length
    begin(draw, page, OPENINGS)
    page.fill(draw.pick(phrasings(TWO_HOP[hop], held, UNSEEN)), hop_values(hop, subject))
    path = "city-country-capital" if hop == "city-capital" else f"landmark-country-{hop}"
    page.spans.append(Span(start, page.length, "fact", path))


def two_hop(draw: Draw, held: frozenset = NO_HOLD, relation=None, count=None) -> Document:
    """What a landmark's country has, or a city's: its capital, language, currency, continent."""
    page = Page()
    several(page, count or draw.pick((1, 2)), lambda: hop_sentence(draw, page, held, relation))
    return finish(page, draw, "two_hop")
