"""TinyWorld: exact probabilities, true labels, a held-out part, and the mixture.

Probabilities are held against brute force: every outcome of a small grammar is enumerated, and the
chance of each text is summed up from the raw choices, without the generator's own bookkeeping.
"""

import csv
import itertools
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prose_reader import Reader

from mi_helpers.__main__ import main
from mi_helpers.tinyworld import (
    copying,
    counting,
    dialects,
    facts,
    grammar,
    lexicon,
    names,
    prose,
    source,
    statements,
)
from mi_helpers.tinyworld.lexicon import Country, Landmark, Topic
from mi_helpers.tinyworld.source import Draw, Script, Weighted, every_outcome
from mi_helpers.tinyworld.world import World

DATA = Path(__file__).resolve().parents[2] / "data"
WORLD = World()
FAMILIES = sorted(World.families)
HELDS = ((), ("templates",), ("entities",))
SEEDS = st.integers(0, 2**32)


def sample(family, n, seed=0, held=(), **choices):
    """The first n documents of a stream."""
    return list(itertools.islice(WORLD.documents(seed, family, held, **choices), n))


# -- draws -----------------------------------------------------------------------------------


class Priced(Script):
    """A `Script` with its own account of -log p, which no family can touch."""

    def __init__(self, path):
        super().__init__(path)
        self.raw = 0.0

    def index(self, n):
        self.raw += math.log(n)
        return super().index(n)

    def weighted(self, options):
        item = super().weighted(options)
        self.raw -= math.log(options.probs[self.path[self.depth - 1]])
        return item

    def chance(self, p):
        yes = super().chance(p)
        self.raw -= math.log(p if yes else 1 - p)
        return yes


@pytest.fixture
def outcomes(monkeypatch):
    """outcomes(write) → (p, document) for every outcome, or those that begin with `n` choices 0."""
    monkeypatch.setattr(source, "Script", Priced)

    def enumerate_all(write, n=0):
        found = itertools.takewhile(
            lambda outcome: not any(outcome[0].path[:n]), every_outcome(write)
        )
        return [(math.exp(-draw.raw), document) for draw, document in found]

    return enumerate_all


def by_text(found):
    """Text → its probability, summed over all outcomes that write it."""
    p = Counter()
    for chance, document in found:
        p[document.text] += chance
    return p


def agree(found, floor, total=1.0):
    """Every outcome's floor is -log p of its text, over all outcomes that write it."""
    p = by_text(found)
    assert sum(p.values()) == pytest.approx(total, abs=1e-9)
    for _, document in found:
        assert floor(document) == pytest.approx(-math.log(p[document.text]), abs=1e-9), document


def test_every_outcome_visits_each_path_once(outcomes):
    def write(draw):
        first = draw.pick("ab")
        return source.Document(first + (draw.pick("xyz") if first == "a" else ""), "test")

    found = outcomes(write)
    assert [(d.text, round(p, 9)) for p, d in found] == [
        ("ax", round(1 / 6, 9)),
        ("ay", round(1 / 6, 9)),
        ("az", round(1 / 6, 9)),
        ("b", 0.5),
    ]


@given(SEEDS)
def test_a_draw_adds_up_what_it_was_surprised_by(seed):
    draw, coin = Draw(seed), Weighted({"a": 1, "b": 3})
    item = draw.weighted(coin)
    assert draw.nats == pytest.approx(-math.log({"a": 0.25, "b": 0.75}[item]))
    draw.pick("abcde")
    yes = draw.chance(0.1)
    chosen = draw.sample("abcd", 3)
    draw.latent(coin)
    seen = math.log(5) - math.log(0.1 if yes else 0.9) + math.log(4 * 3 * 2)
    assert draw.nats == pytest.approx(-math.log({"a": 0.25, "b": 0.75}[item]) + seen)
    assert draw.hidden in (pytest.approx(math.log(4)), pytest.approx(math.log(4 / 3)))
    assert len(set(chosen)) == 3


def test_draws_come_as_often_as_their_prices_say():
    draw, n, uneven = Draw(0), 20_000, Weighted({"a": 1, "b": 7, "c": 2})
    pairs = dict.fromkeys("ab ac ba bc ca cb".split(), 1 / 6)
    for make, shares in (
        (lambda: draw.pick("abc"), {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        (lambda: draw.weighted(uneven), {"a": 0.1, "b": 0.7, "c": 0.2}),
        (lambda: draw.chance(0.3), {True: 0.3, False: 0.7}),
        (lambda: "".join(draw.sample("abc", 2)), pairs),
    ):
        counts = Counter(make() for _ in range(n))
        for item, p in shares.items():
            assert abs(counts[item] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), item


# -- prose: exact by brute force ---------------------------------------------------------------

CAT, DOG, COW = ("cat", "cats"), ("dog", "dogs"), ("cow", "cows")
SEE, EAT = ("see", "sees", "saw"), ("eat", "eats", "ate")
RED, FAR, BO, CY = ("red",), ("at home",), ("Bo",), ("Cy",)
EVALUATION = {
    (voice, kind): (f"{voice}{kind}",) for voice in prose.VOICES for kind in ("adj", "adv", "noun")
}


def topic(key, noun, verb=(SEE,), adj=(RED,), phrase=(FAR,), name=(BO,)):
    return Topic(key, noun, verb, adj, phrase, name)


def small_book(frames, topics, sentences=(1,), noun_phrases=("{N}",), **more):
    """A book of few words: two people, two cities."""
    return prose.Book(
        topics=topics,
        frames=frames,
        noun_phrases={form: 1 + i for i, form in enumerate(noun_phrases)},
        evaluation=EVALUATION,
        people={"Ann": "f", "Tom": "m"},
        cities=("Rome", "Oslo"),
        sentences=sentences,
        **more,
    )


TWO = (topic("a", (CAT, DOG), (SEE, EAT)), topic("b", (CAT, COW), (SEE,)))
SAME = (topic("a", (CAT,)), topic("b", (CAT,)))
BOOKS = {
    # topics that turn, with a noun and a verb in common
    "turn": small_book(("who {VS} {NP1}?",), TWO, (1, 2), turn=0.3, connective=0),
    # a voice that is heard twice
    "voice": small_book(("{NP1} {BE1} {EV}.",), SAME, (2,), turn=0.2, connective=0),
    # a person who is named, then named again or a pronoun
    "person": small_book(("{P} {VS} {NP1}.",), SAME, (2,)),
    "city": small_book(("in {CITY} who {VP} {NP1}?",), SAME, (2,)),
    # determiners, names, adjectives, relative clauses
    "phrases": small_book(
        ("{NP1} {V1} {PH}.",),
        (topic("a", (CAT,), name=(BO, CY)), topic("b", (DOG,), name=(BO,))),
        noun_phrases=("{D} {N}", "{NAME}", "{D} {ADJ} {N}", "{D} {N} that {VH} {M}"),
    ),
    "questions": small_book(
        ("why {DO1} {NP1} {BASE} {NP2}?", "there {BE1} {NP1} {PH}.", "{P} {SAY} that {NP1} {V1}."),
        (TWO[0], TWO[1]),
        noun_phrases=("{N}", "{NAME}"),
    ),
    "facts": small_book(("who {VS}?",), TWO, (2,), turn=0.3, fact=0.4),
}
REGISTERS = {"formal": ("however,",), "plain": ("so",)}


@pytest.fixture
def documents_of(outcomes, monkeypatch):
    """Every outcome of a small book, its connectives cut down to one per register."""
    monkeypatch.setattr(prose, "CONNECTIVES", REGISTERS)

    def fact(draw, page):
        page.write(draw.pick(("Rome is in Italy.", "Oslo is in Norway.")))

    def enumerate_book(name):
        book, says = BOOKS[name], fact if name == "facts" else None
        return outcomes(lambda draw: prose.Prose(book, draw, fact=says).document())

    return enumerate_book


@pytest.mark.parametrize("name", BOOKS)
def test_marginal_nats_are_exact_by_brute_force(documents_of, name):
    agree(documents_of(name), lambda document: prose.marginal_nats(BOOKS[name], document))


@pytest.mark.parametrize("name", ["turn", "voice", "facts"])
def test_the_bounds_of_the_floor_hold(documents_of, name):
    mean = Counter()
    for p, document in documents_of(name):
        marginal = prose.marginal_nats(BOOKS[name], document)
        joint = document.nats + document.hidden
        assert joint == pytest.approx(-math.log(p), abs=1e-9)
        assert joint >= marginal - 1e-9
        for bound, nats in (("joint", joint), ("marginal", marginal), ("given", document.nats)):
            mean[bound] += p * nats
    assert mean["joint"] > mean["marginal"] + 0.01 > mean["given"] + 0.02


@pytest.mark.parametrize("name", ["turn", "phrases", "facts"])
def test_the_topic_posterior_is_exact_by_brute_force(documents_of, name):
    """After each word, over all texts that go on from there: also inside the text."""
    book, found = BOOKS[name], documents_of(name)
    keys = [topic.key for topic in book.topics]
    mass = defaultdict(lambda: np.zeros(len(keys)))
    for p, document in found:
        spans = document.find("topic")
        for end in range(len(document.text) + 1):
            now = [span for span in spans if span.start <= max(end - 1, 0)][-1]
            mass[document.text[:end]][keys.index(now.value)] += p
            if any(end == span.start > 0 for span in spans):  # at a turn: the sentence to come
                (later,) = [span for span in spans if span.start == end]
                mass[document.text[:end], "next"][keys.index(later.value)] += p
    for _, document in random.Random(0).sample(found, 200):
        starts = [span.start for span in document.find("topic")][1:]
        ends, rows = prose.topic_posterior(book, document)
        assert rows.shape == (len(ends), len(keys)) and ends[0] == 0
        np.testing.assert_allclose(rows[0], 1 / len(keys))
        for end, row in list(zip(ends, rows, strict=True))[1:]:
            # one character more says that the word has ended, and nothing of the topic
            key = document.text[: end + 1] if end not in starts else (document.text[:end], "next")
            np.testing.assert_allclose(row, mass[key] / mass[key].sum(), atol=1e-9)


def test_the_topic_posterior_knows_a_word_of_one_topic_only(documents_of):
    book = BOOKS["turn"]
    document = next(d for _, d in documents_of("turn") if "dog" in d.text and len(d.text) < 20)
    _, rows = prose.topic_posterior(book, document)
    np.testing.assert_allclose(rows[-1], [1, 0], atol=1e-12)


@pytest.fixture(scope="module")
def readings():
    """Documents of the real world without fact sentences, read by the parser."""
    reader = Reader(WORLD.book)
    frames = WORLD.book.frame_parts[: -prose.HELD_FRAMES]
    found = []
    for seed in itertools.count():
        document = prose.Prose(WORLD.book, Draw(seed), fact=None).document()
        if len(document.find("topic")) <= 4:
            found.append((document, *reader.read(document, frames)))
        if len(found) == 12:
            return found


def test_a_parser_of_real_prose_pays_what_the_generator_counts(readings):
    single = [r for r in readings if all(len(found) == 1 for found in r[2])]
    assert len(single) >= 8
    for document, exact, _ in single:
        assert WORLD.floor(document) == pytest.approx(exact, abs=1e-9)


def test_texts_with_two_derivations_only_lower_the_floor_a_little(readings):
    gaps = [WORLD.floor(document) - exact for document, exact, _ in readings]
    words = sum(len(document.text.split()) for document, *_ in readings)
    assert min(gaps) > -1e-9 and sum(gaps) / words < 0.01


def test_a_name_in_two_slots_has_two_derivations():
    reader = Reader(WORLD.book)
    frames = WORLD.book.frame_parts[: -prose.HELD_FRAMES]
    assert len(reader.derivations("Nadal chased the net in straight sets.", frames)) == 2
    assert len(reader.derivations("The court chased the net in straight sets.", frames)) == 1
    assert reader.derivations("The court chase the net in straight sets.", frames) == []


# -- determined families: exact by brute force -----------------------------------------------

WORDS = {
    "object": ("book", "apple"),
    "place": ("bank", "park"),
    "group_noun": (("key", "keys"), ("cup", "cups"), ("box", "boxes"), ("bag", "bags")),
    "sound": ("ba", "ku"),
    "colour": ("red",),
}
COUNTRIES = {
    "Italy": Country("Italy", "Rome", "Italian", "euro", "Europe", "Italian"),
    "Japan": Country("Japan", "Tokyo", "Japanese", "yen", "Asia", "Japanese"),
}
LANDMARKS = (
    Landmark("Pantheon", "Rome", "Italy"),
    Landmark("Rialto", "Venice", "Italy"),
    Landmark("Skytree", "Tokyo", "Japan"),
    Landmark("Castle", "Osaka", "Japan"),
)
NORWEGIAN = {
    "noun": (("bil", "bilen", "en"), ("hus", "huset", "et")),
    "verb": (("ser", "så"),),
    "adj": (("ny", "nytt", "nye"), ("stor", "stort", "store")),
    "name": (("Kari",),),
    "place": (("Bergen",),),
    "adverb": (("ofte",),),
    "time": (("i dag",),),
}
FAMILY_MODULES = (copying, counting, facts, grammar, names, statements)
CACHED = [f for m in FAMILY_MODULES for f in vars(m).values() if hasattr(f, "cache_clear")]


@pytest.fixture
def small_lexicon(monkeypatch):
    """A handful of words and facts, so that whole families can be enumerated."""

    def hold(*entities, share=10):
        return sum(map(ord, "".join(entities))) % 2 == 0  # so everyone has partners of both kinds

    for module, name, value in (
        (lexicon, "words", WORDS.__getitem__),
        (lexicon, "people", lambda: {"Ann": "f", "Tom": "m", "Eva": "f", "Bob": "m"}),
        (lexicon, "occupations", lambda: {"nurse": 0.9, "smith": 0.25}),
        (lexicon, "countries", lambda: COUNTRIES),
        (lexicon, "landmarks", lambda: LANDMARKS),
        (lexicon, "norwegian", lambda: NORWEGIAN),
        (names, "ACTS", names.ACTS[:1] + names.ACTS[11:12] + names.ACTS[-2:]),
        (names, "GIFTS", names.GIFTS[:1] + names.GIFTS[-2:]),
        (names, "OPENINGS", {n: parts[:1] + parts[-2:] for n, parts in names.OPENINGS.items()}),
        (names, "NAMELESS", ("guard", "clerk")),
        (copying, "vocabulary", lambda: ("red", "cat", "Oslo", "seen")),
        (copying, "ALPHABET", ("07", "70", "a", "\n", "é", "#")),
        (copying, "SIZES", (1, 2)),
        (copying, "PIECES", (2, 3)),
        (copying, "NAMES", (2, 3)),
        *((module, "is_held", hold) for module in FAMILY_MODULES if hasattr(module, "is_held")),
        (facts, "OPENINGS", Weighted({"": 2, "of course, ": 1})),
        (grammar, "TIMES", Weighted({"": 3, "one day, ": 1})),
        (grammar, "MOODS", ("tired", "happy")),
        (grammar, "NEAR", ("near", "by")),
        (grammar, "STATES", ("old", "red")),
        (counting, "EVENTS", ("reign", "strike")),
        (dialects, "CODE_NAMES", ("value", "total", "count", "index")),
        (dialects, "CODE_FUNCTIONS", ("load", "save")),
    ):
        monkeypatch.setattr(module, name, value)
    clear_caches()
    yield
    clear_caches()


def clear_caches():
    for function in CACHED:
        function.cache_clear()


FINITE = {  # family, choices, and the first draws where all outcomes are too many
    "facts-1": ("facts", {"count": 1}, ()),
    "facts-3": ("facts", {"relation": "country-continent"}, ()),
    "two_hop": ("two_hop", {"count": 1}, ()),
    "two_hop-2": ("two_hop", {"relation": "continent"}, ()),
    "two_hop-city": ("two_hop", {"relation": "city-capital"}, ()),
    "truth": ("truth", {"count": 1, "truth": False}, ()),
    "ioi": ("ioi", {"form": "pair"}, ()),
    "ioi-BAB": ("ioi", {"order": "BAB"}, ()),
    "ioi-two": ("ioi", {"form": "crowd", "people": 2}, (1 / 4,)),  # the first of four receivers
    "ioi-three": ("ioi", {"form": "crowd", "people": 3, "opening": 2}, (1 / 4,)),
    "pronoun": ("pronoun", {}, ()),
    "pronoun-nurse": ("pronoun", {"occupation": "nurse"}, ()),
    "agreement": ("agreement", {}, (1 / 4, 1 / 2)),  # the first of four nouns, singular
    "agreement-mismatch": ("agreement", {"mismatch": True}, (1 / 4,)),
    "years": ("years", {"count": 1}, (1 / 9, 1 / 95)),  # the first of nine centuries, 95 years
    "calendar": ("calendar", {"count": 1}, ()),
    "arithmetic": ("arithmetic", {"count": 1}, ()),
    "repetition": ("repetition", {"length": 3}, ()),
    "strings": ("strings", {}, ()),
    "python": ("python", {}, (1 / 3,)),  # one function
    "norwegian": ("norwegian", {}, (1 / 2, 1 / 4)),  # two sentences in the present tense
}
# "ioi-three" wants two partners of a kind for everyone, and four people have one that is held
NOTHING_HELD = ("ioi-three", "repetition", "python", "norwegian")


@pytest.mark.parametrize(
    "case, held",
    [(case, held) for held in HELDS for case in FINITE if case not in NOTHING_HELD or not held],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "training",
)
def test_nats_are_exact_by_brute_force(small_lexicon, outcomes, case, held):
    family, choices, first = FINITE[case]
    function = World.families[family]
    found = outcomes(lambda draw: function(draw, frozenset(held), **choices), len(first))
    assert len(found) > 3
    agree(found, lambda document: document.nats, math.prod(first))
    assert all(document.hidden == 0 for _, document in found)


SEVERAL = {  # family, choices → the numbers of sentences, and what is drawn once before them
    "two_hop": ({}, (1, 2), lambda held: 1.0),
    "years": ({}, (1, 2), lambda held: 1.0),
    "calendar": ({}, (1, 2), lambda held: 0.5 * (1 if held else 0.6)),  # the unit; not a list
    "arithmetic": ({}, (1, 2, 3), lambda held: 1.0),
}


@pytest.mark.parametrize("held", HELDS, ids=lambda held: "-".join(held) or "training")
@pytest.mark.parametrize("family", SEVERAL)
def test_several_sentences_cost_their_sum_by_brute_force(
    small_lexicon, monkeypatch, outcomes, family, held
):
    """Sentences, split by their full stops, cost what they cost alone: so none is two in one."""
    monkeypatch.setattr(counting, "range", lambda *ends: range(*ends)[:3], raising=False)
    choices, counts, shared = SEVERAL[family]
    function, held = World.families[family], frozenset(held)
    once = shared(held)
    p = by_text(outcomes(lambda draw: function(draw, held, count=1, **choices)))
    seen = Counter()
    for seed in range(60):
        document = function(Draw(seed), held, **choices)
        said = re.findall(r"[^.]+\.", document.text)
        if re.match(r"\w+, \w+, \w+", document.text):
            continue  # a list
        chance = once / len(counts) * math.prod(p[each.strip()] / once for each in said)
        assert document.nats == pytest.approx(-math.log(chance), abs=1e-9), document.text
        seen[len(said)] += 1
    assert set(seen) == set(counts)


def test_a_pronoun_is_she_with_its_probability_by_brute_force(small_lexicon, outcomes):
    found = outcomes(lambda draw: grammar.pronoun(draw))
    p = Counter()
    for chance, document in found:
        said = {s.value: document.text[s.start : s.end] for s in document.find("pronoun")[:1]}
        ((job, word),) = said.items()
        p[job, word] += 2 * chance
    assert p == {
        ("nurse", "she"): pytest.approx(0.9),
        ("nurse", "he"): pytest.approx(0.1),
        ("smith", "she"): pytest.approx(0.25),
        ("smith", "he"): pytest.approx(0.75),
    }


def spelled(text):
    """-log p of a text of made-up words, from the text alone: drawn without replacement."""
    words = list(dict.fromkeys(text.split()))
    syllables = lexicon.words("sound")
    nats, taken = math.log(7 * 3), 0.0  # 2 to 8 words, 2 to 4 times
    for word in words:
        n = len(re.findall("[aeiou]", word))  # each syllable has one vowel, at its end
        p = 0.5 * len(syllables) ** -n
        nats -= math.log(p / (1 - taken))
        taken += p
    return nats


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_made_up_words_are_exact(seed):
    document = WORLD.document(seed, "made_up")
    assert document.nats == pytest.approx(spelled(document.text), abs=1e-9)


def test_made_up_words_are_never_drawn_twice_and_pay_for_it(small_lexicon):
    """With two sounds there are 12 words, so that rejections are frequent."""
    for seed in range(300):
        document = WORLD.document(seed, "made_up")
        words = document.text.split()
        assert len(set(words)) == document.latents["length"]
        assert document.nats == pytest.approx(spelled(document.text), abs=1e-9)


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_brackets_are_exact(seed):
    """An automaton of the family, written from its description."""
    document = WORLD.document(seed, "brackets")
    pieces = document.text.split()
    left = sum(piece in "([{" for piece in pieces)
    p, depth = 1 / 6, 0
    for piece in pieces:
        may_open = left > 0 and depth < 4
        opening = (1.0 if depth == 0 else 0.5) if may_open else 0.0
        if piece in "([{":
            p, left, depth = p * opening / 3, left - 1, depth + 1
        elif piece in ")]}":
            p, depth = p * (1 - opening) * 0.6, depth - 1
        else:
            p *= (1 - opening) * 0.4 / 11
    assert depth == left == 0
    assert document.nats == pytest.approx(-math.log(p), abs=1e-9)


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_repetition_are_exact(seed):
    document = WORLD.document(seed, "repetition")
    words = document.text.split()
    n, size = len(set(words)), len(copying.vocabulary())
    most = min(copying.MOST_TIMES, copying.LONGEST // n)
    choices = [len(copying.LENGTHS), most - 1, *range(size, size - n, -1)]  # length, times, words
    assert document.nats == pytest.approx(sum(map(math.log, choices)), abs=1e-9)


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_strings_are_exact(seed):
    document = WORLD.document(seed, "strings")
    words = units(document)
    length, times = document.latents["length"], document.latents["times"]
    assert words == words[:length] * times and len(set(words)) == length
    if document.text[0] == " ":  # a pair of digits is one character
        n = sum(len(word) - len(re.findall("[0-9]", word)) // 2 for word in words[:length])
        p, size = (1 - copying.LIST_SHARE) / 5 / 4**length, len(copying.ALPHABET)
    else:
        p, size, n = copying.LIST_SHARE / 9, len(copying.starts()), length
    nats = math.log(2) - math.log(p) + sum(map(math.log, range(size, size - n, -1)))
    assert document.nats == pytest.approx(nats, abs=1e-9)


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_years_are_exact(seed):
    document = WORLD.document(seed, "years", count=1)
    # century, years, event, template; then the opening
    choices = [9, 95, 99 - document.latents["first"], 8, len(counting.YEARS) - facts.UNSEEN]
    nats = sum(map(math.log, choices)) - math.log(opening_share(document.text))
    assert document.nats == pytest.approx(nats, abs=1e-9)


def opening_share(text):
    """The probability of a text's opening: of the one that it begins with, or of none."""
    shares = dict(zip(facts.OPENINGS.items, facts.OPENINGS.probs, strict=True))
    begins = [item for item in shares if item and text.lower().startswith(item)]
    return shares[begins[0] if begins else ""]


def test_equal_texts_have_equal_nats_and_one_family():
    seen = {}
    repeated = 0
    for family in FAMILIES:
        choices = {"count": 1} if family in ("facts", *SEVERAL) else {}
        for document in sample(family, 1_000 if family != "prose" else 200, **choices):
            nats = WORLD.floor(document)
            repeated += document.text in seen
            known, before = seen.setdefault(document.text, (family, nats))
            assert known == family and before == pytest.approx(nats, abs=1e-9), document.text
    assert repeated > 400


def test_the_choice_of_family_is_not_in_the_nats(outcomes):
    world = World({"calendar": 1, "arithmetic": 3})
    share = {"calendar": 0.25, "arithmetic": 0.75}
    for p, document in outcomes(lambda draw: world.write(draw, count=1)):
        assert document.nats == pytest.approx(-math.log(p / share[document.family]), abs=1e-9)
        assert document.hidden == 0


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(FAMILIES))
def test_a_floor_is_between_nothing_and_the_joint(seed, family):
    document = WORLD.document(seed, family)
    assert 0 < WORLD.floor(document) <= document.nats + document.hidden + 1e-9


# -- seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_equal_seeds_give_equal_streams(family):
    assert sample(family, 20, seed=7) == sample(family, 20, seed=7)
    texts = {seed: [document.text for document in sample(family, 20, seed)] for seed in (7, 8)}
    assert texts[7] != texts[8]


@given(st.integers(0, 1_000))
@settings(deadline=None, max_examples=20)
def test_a_document_is_the_first_of_its_stream(seed):
    assert WORLD.document(seed) == next(WORLD.documents(seed))


def test_streaming_is_lazy(monkeypatch):
    written = []
    monkeypatch.setitem(World.families, "ioi", lambda *_: written.append(1))
    stream = WORLD.documents(0, "ioi")
    assert written == []
    next(stream)
    assert len(written) == 1


# -- labels ------------------------------------------------------------------------------------


def read(name):
    with open(DATA / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


COUNTRY_ROWS = {row["country"]: row for row in read("facts/countries.csv")}
LANDMARK_ROWS = {row["landmark"]: row for row in read("facts/landmarks.csv")}
GENDER = {row["name"]: row["gender"] for row in read("world/names.csv")}
P_SHE = {row["occupation"]: float(row["p_she"]) for row in read("world/occupations.csv")}
TOPIC_ROWS = read("world/topics.csv")
NORWEGIAN_WORDS = defaultdict(set)
for row in read("world/norwegian.csv"):
    NORWEGIAN_WORDS[row["class"]].add(row["forms"])
GROUP_NOUNS = [
    tuple(row["word"].split("|")) for row in read("world/words.csv") if row["class"] == "group_noun"
]
NOUNS = GROUP_NOUNS + [tuple(r["forms"].split("|")) for r in TOPIC_ROWS if r["class"] == "noun"]
VERBS = [tuple(r["forms"].split("|")) for r in TOPIC_ROWS if r["class"] == "verb"]
HOME = {row["city"]: row["country"] for row in LANDMARK_ROWS.values()}
HOME |= {row["capital"]: row["country"] for row in COUNTRY_ROWS.values()}
ENTITIES = {
    "person": set(GENDER) | NORWEGIAN_WORDS["name"],
    "city": set(HOME) | NORWEGIAN_WORDS["place"],
    "landmark": set(LANDMARK_ROWS),
    "country": set(COUNTRY_ROWS),
    "occupation": set(P_SHE),
    "name": {row["forms"] for row in TOPIC_ROWS if row["class"] == "name"},
    "function": set(dialects.CODE_FUNCTIONS),
    **{
        key: {row[key] for row in COUNTRY_ROWS.values()}
        for key in ("language", "currency", "continent")
    },
}
FORMS = {
    "number": {
        "singular": {forms[0] for forms in NOUNS},
        "plural": {forms[1] for forms in NOUNS},
    },
    "agreement": {
        "singular": {"is", "was"} | {forms[1] for forms in VERBS},
        "plural": {"are", "were"} | {forms[0] for forms in VERBS},
    },
    "evaluation": defaultdict(set),
    "register": {
        "formal": {"however,", "moreover,", "therefore,", "nevertheless,", "consequently,"},
        "plain": {"but", "and", "so", "then", "well,"},
    },
}
for row in read("world/evaluation.csv"):
    FORMS["evaluation"][row["voice"]].add(row["word"])
PRONOUNS = {"f": {"she", "her"}, "m": {"he", "his"}}
NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()


def units(document, end=None):
    """The words of a text of the copying families, or those before character `end`."""
    text = document.text[:end]
    if document.family != "strings":
        return text.split()
    return text[1:].split(" ") if document.text[0] == " " else text.splitlines()


def true_label(document, span):
    """Whether a span says the truth about its characters."""
    text = document.text[span.start : span.end]
    low, value, kind = text.lower(), span.value, span.kind
    if kind == "answer":
        return text == value
    if kind == "entity":
        return text in ENTITIES[value]
    if kind in FORMS:
        return low in FORMS[kind][value]
    if kind == "pronoun" and value in GENDER:
        return low in PRONOUNS[GENDER[value]]
    if kind == "pronoun":
        return text in PRONOUNS["f" if document.latents["she"] else "m"]
    if kind == "topic":
        return value in WORLD.topics and text == text.strip()
    if kind == "fact":
        return text.endswith(".") and document.text[: span.start].rstrip()[-1:] in ("", ".", "?")
    if kind in ("statement", "polarity", "truth"):
        (relation,) = [s.value for s in document.find("statement") if s.end == span.end]
        known = {"statement": facts.FACTS, "polarity": ("affirmed", "negated")}
        said = value in known.get(kind, (True, False)) and relation in facts.FACTS
        return said and text[-1] in ".?"
    if kind == "verdict":
        return text in [pair[value] for pair in statements.WORDS.values()]
    if kind == "ioi":
        return (
            text == document.latents["IO"] if value == "IO" else text in document.latents["others"]
        )
    if kind == "repeat":
        words = units(document)
        return text == words[value] and words.index(text) < len(units(document, span.start))
    if kind == "year":
        return text == f"{value:02d}"
    if kind in ("day", "month"):
        return text == {"day": DAYS, "month": MONTHS}[kind][value]
    if kind == "numeral":
        return low == NUMERALS[value]
    if kind == "depth":
        before = document.text[: span.end]
        return value == sum(map(before.count, "([{")) - sum(map(before.count, ")]}"))
    return kind == "variable" and text == value


@settings(deadline=None, max_examples=300)
@given(SEEDS, st.sampled_from(FAMILIES), st.sampled_from(HELDS))
def test_every_label_is_true_of_its_characters(seed, family, held):
    document = WORLD.document(seed, family, held)
    assert document.family == family
    for span in document.spans:
        assert 0 <= span.start < span.end <= len(document.text)
        assert true_label(document, span), (span, document.text[span.start : span.end])


def test_every_kind_of_label_occurs():
    kinds = {span.kind for family in FAMILIES for d in sample(family, 40) for span in d.spans}
    assert kinds == {
        *("answer", "entity", "number", "agreement", "evaluation", "register", "pronoun"),
        *("topic", "fact", "ioi", "repeat", "year", "day", "month", "numeral", "depth"),
        *("variable", "statement", "polarity", "truth", "verdict"),
    }
    entities = {s.value for f in FAMILIES for d in sample(f, 60) for s in d.find("entity")}
    assert entities == set(ENTITIES)


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_prose_is_one_sentence_after_another_each_of_its_topic(seed):
    document = WORLD.document(seed, "prose")
    spans = document.find("topic")
    assert " ".join(document.text[s.start : s.end] for s in spans) == document.text
    assert 3 <= len(spans) <= 8 and spans[0].value == document.latents["topic"]
    turns = [key for latent, key, _ in document.events if latent == "turn"]
    assert [WORLD.topics[i] for i in turns] == [span.value for span in spans[1:]]
    for latent, key, end in document.events:
        assert 0 <= end <= len(document.text)
        if latent == "topic":
            (now,) = [s.value for s in spans if s.start < end <= s.end]
            kind, word = key
            forms = next(
                r["forms"]
                for r in TOPIC_ROWS
                if (r["topic"], r["class"], r["forms"].split("|")[0]) == (now, *key)
            )
            before = document.text[:end].lower()
            assert any(before.endswith(form.lower()) for form in forms.split("|")), (kind, word)


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_latents_of_prose_are_what_its_words_say(seed):
    document = WORLD.document(seed, "prose")
    tense = {"present": {"is", "are", "says", "thinks"}, "past": {"was", "were", "said", "thought"}}
    other = tense["past" if document.latents["tense"] == "present" else "present"]
    said = document.find("statement")
    reports = [t for t in document.find("topic") if any(inside(s.start, [t]) for s in said)]
    facts = document.find("fact") + reports
    outside = re.sub(r"\w+", lambda m: "" if inside(m.start(), facts) else m[0], document.text)
    assert not other & set(re.findall(r"\w+", outside))
    assert {span.value for span in document.find("register")} <= {document.latents["register"]}
    people = [s.value for s in document.find("pronoun")]
    named = [document.text[s.start : s.end] for s in document.find("entity") if s.value == "person"]
    assert set(people + named) <= {document.latents.get("person")}


def inside(at, spans):
    return any(span.start <= at < span.end for span in spans)


def test_words_of_praise_come_mostly_from_praising_documents():
    counts = Counter()
    for document in sample("prose", 300):
        for span in document.find("evaluation"):
            counts[span.value == document.latents["voice"]] += 1
    n = counts.total()
    assert abs(counts[True] / n - 0.8) < 4.5 * math.sqrt(0.8 * 0.2 / n)


# -- the text determines the answer --------------------------------------------------------------


def answers(family, n=400, **more):
    """(document, text before the answer, answer)."""
    for held in HELDS:
        for document in sample(family, n, held=held, **more):
            for span in document.find("answer"):
                yield document, document.text[: span.start], document.text[span.start : span.end]


def mentioned(options, text):
    """The one option that occurs in a text as whole words; longer ones hide what they contain."""
    found = [o for o in options if re.search(rf"\b{re.escape(o)}\b", text)]
    (only,) = [o for o in found if not any(o != other and o in other for other in found)]
    return only


def looked_up(relation, sentence):
    """The answer of a fact sentence, by the CSV files."""
    subject, *_, target = relation.split("-")
    if subject == "landmark":
        row = LANDMARK_ROWS[mentioned(LANDMARK_ROWS, sentence)]
        return row[target] if target in row else COUNTRY_ROWS[row["country"]][target]
    if subject == "city":
        home = HOME[mentioned(HOME, sentence)]
        return home if target == "country" else COUNTRY_ROWS[home][target]
    return COUNTRY_ROWS[mentioned(COUNTRY_ROWS, sentence)][target]


@pytest.mark.parametrize("family", ["facts", "two_hop"])
def test_a_fact_is_what_the_csv_says(family):
    relations = set()
    for document, before, answer in answers(family):
        (fact,) = [s for s in document.find("fact") if s.start <= len(before) < s.end]
        assert answer == looked_up(fact.value, before[fact.start :]), document.text
        relations.add(fact.value)
    assert (
        relations
        == {
            "facts": set(facts.FACTS),
            "two_hop": {
                "city-country-capital",
                *(f"landmark-country-{hop}" for hop in facts.HOP_FRAMES),
            },
        }[family]
    )


def test_the_receiver_is_the_name_that_occurs_once():
    seen = Counter()
    for document, before, answer in answers("ioi"):
        latents = document.latents
        people = [word for word in re.findall(r"\w+", before) if word in GENDER]
        counts = Counter(people)
        assert counts.pop(answer) == 1 and set(counts.values()) == {2}
        assert set(counts) == set(latents["others"]) and latents["IO"] == answer
        if latents["form"] == "pair":
            assert latents["order"] == ("BAB" if people[2] == people[0] else "ABB")
        else:
            assert [name == answer for name in people] == [x == "I" for x in latents["order"]]
        assert latents["S"] == [name for name in people if name != answer][-1]
        assert latents["giver"] == (
            "named" if re.search(people[-1] + r" [^.]*$", before) else "nameless"
        )
        seen[latents["form"], latents["order"]] += 1
    assert {order for _, order in seen} == {"ABB", "BAB", *names.patterns(2), *names.patterns(3)}


def test_new_and_repeated_names_stand_in_the_same_sentences():
    """Only repetition tells: each sentence of one name has both kinds."""
    counts = Counter()
    for document in sample("ioi", 4_000, form="crowd", opening=1, giver="nameless"):
        people = [s for s in document.spans if s.value in ("person", "S2")]
        for span in people[1:]:  # the first is new in any case
            start = document.text.rfind(".", 0, span.start) + 1
            counts[document.text[start : span.start], span.value] += 1
    sentences = {sentence for sentence, _ in counts if "at the" not in sentence}
    assert len(sentences) > 8
    for sentence in sentences:
        new, repeated = (counts[sentence, value] for value in ("person", "S2"))
        assert new + repeated < 100 or 0.3 < new / (new + repeated) < 0.8, sentence


@pytest.mark.parametrize("order", ["ABB", "BAB"])
def test_the_order_of_names_can_be_chosen(order):
    assert {d.latents["order"] for d in sample("ioi", 50, order=order)} == {order}


@pytest.mark.parametrize("family, most", [("repetition", copying.MOST_TIMES), ("made_up", 4)])
def test_a_sequence_is_repeated_word_for_word(family, most):
    seen = Counter()
    for document in sample(family, 1_000):
        words = document.text.split()
        length = len(set(words))
        times = len(words) // length
        assert words == times * words[:length]
        assert [s.value for s in document.find("answer")] == (times - 1) * words[1:length]
        seen[times] += 1
    assert set(seen) == set(range(2, most + 1))
    assert all(word in copying.vocabulary() for word in words) == (family == "repetition")


def test_a_string_is_written_two_or_three_times():
    seen = Counter()
    for document in sample("strings", 300):
        words, length = units(document), document.latents["length"]
        seen[document.text[0] == " ", len(words) // length] += 1
        again = words[length:]
        assert [s.value for s in document.find("answer")] == [
            word for i, word in enumerate(again) if i % length
        ]
    assert min(seen[kind, times] for kind in (False, True) for times in (2, 3)) > 20
    assert seen.total() == 300


def test_strings_have_every_byte_and_no_digit_alone():
    assert len(set(copying.ALPHABET)) == len(copying.ALPHABET)
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert set("".join(copying.ALPHABET).encode()) == set(every.encode()) - {ord(" ")}
    assert not any(c.isnumeric() for c in copying.ALPHABET if c not in copying.PAIRS)


def test_the_verb_agrees_with_the_first_noun():
    forms = {n: i for pair in GROUP_NOUNS for i, n in enumerate(pair)}
    mixed = 0
    for _, before, answer in answers("agreement"):
        nouns = [forms[word] for word in re.findall(r"\w+", before) if word in forms]
        assert answer in (("is", "was"), ("are", "were"))[nouns[0]]
        mixed += nouns[-1] != nouns[0]
    assert mixed > 300


def test_attractors_of_the_other_number_can_be_asked_for():
    forms = {n: i for pair in GROUP_NOUNS for i, n in enumerate(pair)}
    for _, before, _ in answers("agreement", mismatch=True):
        head, *others = [forms[word] for word in re.findall(r"\w+", before) if word in forms]
        assert others and all(other != head for other in others)


def test_nothing_ends_before_it_began():
    for document, before, answer in answers("years", count=1):
        (start,) = re.findall(r"\d{4}", before)
        assert before.endswith(start[:2]) and int(answer) > int(start[2:])
        assert document.latents["last"] == int(answer)


AFTER = {"after": 1, "before": -1, "follows": 1}  # "the day after Monday"
FROM = {"after": -1, "before": 1, "follows": -1, "followed": 1, "next": 1, "last": -1}


def direction(words, names):
    """1 or -1: by the last cue after the day or month that is named, or else before it."""
    (at,) = [i for i, word in enumerate(words) if word in names]
    tail = [FROM[word] for word in words[at:] if word in FROM]
    return (tail or [AFTER[word.lower()] for word in words[:at] if word.lower() in AFTER])[-1]


def test_days_and_months_follow_each_other():
    steps = Counter()
    for document, before, answer in answers("calendar"):
        names = DAYS if document.latents["unit"] == "day" else MONTHS
        words = re.findall(r"\w+", before.rsplit(". ", 1)[-1])
        last = [word for word in words if word in names][-1]
        listed = all(word in names for word in words)
        step = 1 if listed else direction(words, names)
        assert answer == names[(names.index(last) + step) % len(names)], document.text
        steps["list" if listed else step] += 1
    assert min(steps.values()) > 100 and len(steps) == 3


def test_sums_are_right():
    signs = Counter()
    for _, before, answer in answers("arithmetic"):
        words = re.findall(r"\w+", before.rsplit(". ", 1)[-1].lower())
        first, second = [NUMERALS.index(word) for word in words if word in NUMERALS]
        lost = {"minus", "less", "without", "difference", "take", "taken", "taking", "lose", "give"}
        lost |= {"subtract", "subtracting"}
        (sign,) = {"minus"} if lost & set(words) else {"plus"}
        result = abs(first - second) if sign == "minus" else first + second
        assert answer == NUMERALS[result]
        signs[sign] += 1
    assert len(signs) == 2 and min(signs.values()) > 100


def test_of_every_sum_that_is_held_out_the_other_order_is_trained():
    held, trained = counting.sums(True), counting.sums(False)
    assert held and all((b, a) in trained for a, b in held)


def test_every_bracket_closes_its_own_kind():
    deepest = 0
    for document in sample("brackets", 300):
        stack, closed = [], []
        for piece in document.text.split():
            if piece in "([{":
                stack.append({"(": ")", "[": "]", "{": "}"}[piece])
            elif piece in ")]}":
                closed.append(stack.pop())
                assert piece == closed[-1]
            deepest = max(deepest, len(stack))
        assert not stack
        assert [s.value for s in document.find("answer")] == closed and 3 <= len(closed) <= 8
    assert deepest == 4


def test_python_code_compiles_and_uses_what_it_introduced():
    for document, before, answer in answers("python", n=150):
        compile(document.text, "text", "exec")
        function = before[before.rindex("def ") :]
        assert re.search(rf"\b{answer}\b", function)


def test_pronouns_are_as_skewed_as_the_occupation():
    counts = {job: Counter() for job in P_SHE}
    for document in sample("pronoun", 12_000):
        span = document.find("pronoun")[0]
        counts[span.value][document.text[span.start : span.end]] += 1
    z = []
    for job, p in P_SHE.items():
        n = counts[job].total()
        assert set(counts[job]) == {"she", "he"} and n > 200
        z.append((counts[job]["she"] - n * p) / math.sqrt(n * p * (1 - p)))
    assert max(map(abs, z)) < 4.5 and sum(x * x for x in z) < 80  # chi-squared, 40 occupations


# -- held out ------------------------------------------------------------------------------------


class Recorder(Draw):
    """A `Draw` that remembers every template that was picked."""

    def __init__(self, seed):
        super().__init__(seed)
        self.templates = []

    def pick(self, options):
        choice = super().pick(options)
        if isinstance(choice, list):
            self.templates.append(choice)
        return choice


def templates(family, n, held=()):
    """Templates that n documents of a family are written from, as text."""
    draw = Recorder(0)
    for _ in range(n):
        WORLD.write(draw, family, held)
    return {str(template) for template in draw.templates}


def known_templates(family):
    tables = {
        "prose": [WORLD.book.frame_parts],
        "facts": facts.FACTS.values(),
        "two_hop": facts.TWO_HOP.values(),
        "truth": [
            statements.VERDICTS[1:],  # the first is drawn by a chance of its own
            *(statements.AFFIRMED[relation] for relation in statements.RELATIONS.items),
            *(statements.NEGATED[relation] for relation in statements.RELATIONS.items),
        ],
        "ioi": [names.PAIR, *names.OPENINGS.values(), names.ACTS, names.GIFTS],
        "pronoun": [grammar.PRONOUNS],
        "agreement": [grammar.AGREEMENT],
        "years": [counting.YEARS],
        "calendar": [counting.CALENDAR, counting.BACKWARD],
        "arithmetic": [counting.ARITHMETIC, counting.SUBTRACT],
    }
    return [[str(template) for template in table] for table in tables[family]]


def spell(template):
    """A compiled template as text, its slots without marks: 'the {L} is in {C}.'"""
    return "".join(
        part if isinstance(part, str) else f"{{{part[0]}{part[1] or ''}}}" for part in template
    )


def until_answer(template):
    """A template as text, up to the slot that is determined."""
    slots = [isinstance(part, tuple) and (part[2] or part[0] == "P") for part in template]
    return spell(template[: slots.index(True)])


def pairs(text):
    """The neighbouring words of a text, the full stop left out."""
    return set(itertools.pairwise(text.replace(".", "").split()))


VARIED = {
    "pronoun": grammar.PRONOUNS,
    "years": counting.YEARS,
    "calendar": counting.CALENDAR,
    "backward": counting.BACKWARD,
    "sums": counting.ARITHMETIC,
    "differences": counting.SUBTRACT,
    **facts.TWO_HOP,
}


@pytest.mark.parametrize("name", VARIED)
def test_unseen_phrasings_are_trained_pieces_in_other_combinations(name):
    table = [spell(template) for template in VARIED[name]]
    trained, held = table[: -facts.UNSEEN], table[-facts.UNSEEN :]
    assert len(trained) >= 14 and len(held) >= 6 and len(set(table)) == len(table)
    pieces = {pair for text in trained for pair in pairs(text)}
    for text in held:
        assert pairs(text) <= pieces, text


@pytest.mark.parametrize(
    "names",
    [("years",), ("calendar", "backward"), ("sums",), ("differences",), tuple(facts.TWO_HOP)],
)
def test_where_an_answer_stands_no_other_phrasing_goes_on(names):
    table = [template for name in names for template in VARIED[name]]
    for template, other in itertools.permutations(table, 2):
        assert not spell(other).startswith(until_answer(template)) or until_answer(
            other
        ) == until_answer(template), spell(other)


def test_in_unseen_phrasings_every_wait_for_a_pronoun_is_a_trained_one():
    """The two words before the pronoun stand before it in two trained phrasings or more."""
    waits = [tuple(until_answer(t).split()[-2:]) for t in grammar.PRONOUNS]
    trained = Counter(waits[: -facts.UNSEEN])
    assert all(trained[wait] >= 2 for wait in waits[-facts.UNSEEN :])


@pytest.mark.parametrize(
    "family",
    "prose facts two_hop truth ioi pronoun agreement years calendar arithmetic".split(),
)
def test_a_template_is_either_trained_on_or_held_out(family):
    tables = known_templates(family)
    every = set(itertools.chain(*tables))
    trained = templates(family, 1_500) & every
    held = templates(family, 600, ("templates",)) & every
    assert not trained & held and trained | held == every
    for table in tables:  # every relation, every direction holds something out
        assert held & set(table) and trained & set(table)
    assert templates(family, 300, ("entities",)) & every <= trained


def test_the_mixture_never_writes_a_held_out_template():
    held = set()
    families = "prose facts two_hop truth ioi pronoun agreement years calendar arithmetic"
    for family in families.split():
        held |= templates(family, 300, ("templates",)) - templates(family, 1)
    held -= {template for table in facts.FACTS.values() for template in map(str, table[:-2])}
    assert len(held) > 20
    assert not held & templates(None, 4_000)


def combinations(document):
    """The combinations of entities in a document of a family that holds some of them out."""
    text = document.text
    if document.family == "ioi":
        return {tuple(sorted((s, document.latents["IO"]))) for s in document.latents["others"]}
    if document.family == "two_hop":
        first = {
            fact.start: next(e for e in document.find("entity") if inside(e.start, [fact]))
            for fact in document.find("fact")
        }
        return {
            (text[first[fact.start].start : first[fact.start].end], fact.value)
            for fact in document.find("fact")
        }
    if document.family == "agreement":
        lemma = {form: pair[0] for pair in GROUP_NOUNS for form in pair}
        head, *others = [lemma[text[s.start : s.end]] for s in document.find("number")]
        return {tuple(sorted((head, other))) for other in others}
    return {(document.latents["a"], document.latents["b"])} if document.latents else set()


@pytest.mark.parametrize(
    "family, every",
    [
        ("ioi", 120 * 119 // 2),
        ("two_hop", 91 * 5 + 30),
        ("agreement", 30 * 29 // 2),
        ("arithmetic", 100),
    ],
)
def test_a_combination_is_either_trained_on_or_held_out(family, every):
    seen = {
        held: set().union(*map(combinations, sample(family, 3_000, held=held)))
        for held in ((), ("templates",), ("entities",), ("templates", "entities"))
    }
    trained = seen[()] | seen["templates",]
    held = seen["entities",] | seen["templates", "entities"]
    assert not trained & held
    assert len(trained | held) > 0.4 * every and len(held) > 0.03 * every


# -- the mixture ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture():
    return sample(None, 6_000, seed=3)


def test_families_come_in_their_shares(mixture):
    counts, total = Counter(d.family for d in mixture), sum(World.weights.values())
    assert set(counts) == set(World.families) == set(World.weights)
    for family, weight in World.weights.items():
        p = weight / total
        n = len(mixture)
        assert abs(counts[family] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), family


def test_a_world_can_have_other_shares():
    world = World({"years": 1})
    assert {d.family for d in itertools.islice(world.documents(), 20)} == {"years"}


def test_there_are_two_thousand_words(mixture):
    words = {word for d in mixture if d.family != "made_up" for word in re.findall(r"\w+", d.text)}
    assert len({word.lower() for word in words}) >= 2_000
    assert len(copying.vocabulary()) >= 2_000


def test_there_are_two_dozen_topics_of_forty_entries():
    topics = lexicon.topics()
    assert len(topics) >= 24
    for topic in topics:
        assert sum(len(getattr(topic, kind)) for kind in prose.CLASSES) >= 40, topic.key


def test_topics_share_words():
    topics = lexicon.topics()
    owners = Counter((kind, e) for t in topics for kind in prose.CLASSES for e in getattr(t, kind))
    for topic in topics:
        entries = [(kind, entry) for kind in prose.CLASSES for entry in getattr(topic, kind)]
        assert sum(owners[entry] > 1 for entry in entries) >= 0.3 * len(entries), topic.key
    assert sum(count >= 3 for count in owners.values()) >= 20


def test_a_court_is_of_tennis_and_of_law_and_a_cook_has_a_name():
    topics = {topic.key: topic for topic in lexicon.topics()}
    assert ("court", "courts") in topics["tennis"].noun
    assert ("court", "courts") in topics["courts"].noun
    assert ("cell", "cells") in topics["virology"].noun
    assert ("cell", "cells") in topics["prison"].noun
    assert ("Cook",) in {name for topic in topics.values() for name in topic.name}
    assert "cook" in {verb[0] for topic in topics.values() for verb in topic.verb}


def test_there_are_thirty_frames_to_train_on_and_all_topics_use_them():
    assert len(prose.FRAMES) - prose.HELD_FRAMES >= 30
    assert len(set(prose.FRAMES)) == len(prose.FRAMES)


def test_topics_turn_as_often_as_they_should():
    turned = [
        a.value != b.value
        for document in sample("prose", 600)
        for a, b in itertools.pairwise(document.find("topic"))
    ]
    p = prose.TURN
    assert abs(np.mean(turned) - p) < 4.5 * math.sqrt(p * (1 - p) / len(turned))


def test_facts_are_told_inside_prose():
    assert any(document.find("fact") for document in sample("prose", 40))


# -- errors and the command line -------------------------------------------------------------------


def sentence(error):
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 250
    return message


def test_an_unknown_family_gets_one_sentence():
    with pytest.raises(ValueError) as error:
        WORLD.document(0, "poetry")
    assert "'poetry'" in sentence(error) and "prose, norwegian" in sentence(error)


@pytest.mark.parametrize("held", [("names",), "names", ("templates", "names")])
def test_an_unknown_held_value_gets_one_sentence(held):
    with pytest.raises(ValueError) as error:
        WORLD.document(0, "ioi", held)
    assert sentence(error) == "held takes 'templates', 'entities' and 'relations', not 'names'."


def test_a_held_value_may_stand_alone():
    assert WORLD.document(5, "ioi", "entities") == WORLD.document(5, "ioi", ("entities",))


def test_choices_for_prose_get_one_sentence():
    with pytest.raises(ValueError) as error:
        WORLD.document(0, "prose", count=1)
    assert sentence(error) == "prose takes no choices, so not count."


def test_a_missing_class_of_words_gets_one_sentence():
    with pytest.raises(ValueError) as error:
        lexicon.words("spice")
    assert "'spice'" in sentence(error)


def test_the_command_writes_documents(capsys):
    assert main(["tinyworld", "--seed", "4", "--n", "3", "--family", "ioi"]) == 0
    shown = capsys.readouterr().out.split("\n\n")
    assert shown[:-1] == [document.text for document in sample("ioi", 3, seed=4)]


def test_the_command_shows_labels(capsys):
    assert main(["tinyworld", "--n", "1", "--family", "ioi", "--labels"]) == 0
    text, head, *lines = capsys.readouterr().out.strip().split("\n")
    (document,) = sample("ioi", 1)
    assert text == document.text
    assert head.startswith("ioi, form ") and head.endswith(f"{document.nats:.2f} nats")
    assert len(lines) == len(document.spans)
    assert any("answer" in line and f"'{document.latents['IO']}'" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--family", "ioy"], "There is no family 'ioy': did you mean 'ioi'?\n"),
        (["--famly", "ioi"], "Unrecognized options: --famly, ioi.\n"),
        (["--n", "0"], "n is 0; it has to be 1 or more.\n"),
        (["--seed", "x"], "Error parsing --seed: invalid literal for int() with base 10: 'x'.\n"),
        (
            ["--speed", "--tokenizer", "no"],
            "There is no tokenizer in no: `make model` trains one.\n",
        ),
    ],
)
def test_a_mistake_at_the_command_line_gets_one_sentence(arguments, says, capsys):
    try:
        code = main(["tinyworld", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err == says
