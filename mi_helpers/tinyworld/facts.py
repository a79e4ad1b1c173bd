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
