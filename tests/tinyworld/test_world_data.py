"""Rules that the fact tables and word lists of TinyWorld keep."""

import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "data"

HEADERS = {
    "facts/countries.csv": "country,capital,language,currency,continent,people",
    "facts/landmarks.csv": "landmark,city,country",
    "world/names.csv": "name,gender",
    "world/occupations.csv": "occupation,plural,p_she",
    "world/evaluation.csv": "voice,class,word",
    "world/norwegian.csv": "class,forms",
    "world/words.csv": "class,word",
}


def listed(text):
    """The words of a text, as a list."""
    return text.split()


MONTHS = set(
    listed("January February March April May June July August September October November December")
)
NOT_NAMES = set(
    listed(
        "Rose Grace Will Mark Bill Jack Pat Frank Art Lily Daisy Ruby Amber Violet Ivy "
        "Hazel Holly Hope "
        "Faith Joy Robin Heather Iris Jasmine Olive Ginger Penny Melody Harmony Carol "
        "Dawn Eve Summer "
        "Grant Drew Rob Nick Miles Chase Dean Earl Duke Guy Rich Victor Basil Clay "
        "Cliff Dale Glen Heath "
        "Lance Max Ray Rod Sandy Wade Ward Stone Christian Martin Harry "
        # also towns or countries that are not in the tables
        "Nancy Sydney Florence Victoria Charlotte Austin Savannah Sofia Madison "
        "Adelaide Chelsea Brooklyn "
        "Lincoln Houston Odessa Georgia Virginia Regina Helena Gary Tyler Chad Israel "
        "Douglas Jordan "
        # either gender
        "Alex Sam Chris Kim Leslie Ashley Taylor Morgan Casey Jamie Kelly Tracy Terry "
        "Lee Cameron Ryan"
    )
)
TOPIC_WORDS = set(
    listed(
        "virus cell vaccine infection court judge trial law verdict case sentence "
        "recipe oven dish flavour "
        "rain storm cloud wind cold hot sunny melody song band concert note battle army "
        "soldier victory "
        "defeat weapon disaster current"
    )
)
# Which pronoun a careless reader expects: 1 she, -1 he, 0 neither.
STEREOTYPE = {
    **dict.fromkeys(
        listed(
            "nurse teacher librarian dancer secretary cashier singer hairdresser "
            "receptionist translator"
        ),
        1,
    ),
    **dict.fromkeys(
        listed(
            "mechanic doctor plumber engineer lawyer pilot farmer carpenter scientist "
            "soldier chef judge surgeon "
            "electrician janitor architect butcher programmer firefighter detective banker"
        ),
        -1,
    ),
    **dict.fromkeys(
        listed("baker tailor dentist artist writer accountant journalist gardener pharmacist"), 0
    ),
}


def read(name):
    with open(DATA / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_class(name, column):
    groups = {}
    for row in read(name):
        groups.setdefault(row["class"], []).append(row[column])
    return groups


def plain(word):
    """A lower-case word of the letters a to z."""
    return word.isascii() and word.isalpha() and word.islower()


def unique(items):
    items = list(items)
    return len(items) == len(set(items))


@pytest.mark.parametrize("name", HEADERS)
def test_file_is_plain_utf8_csv(name):
    raw = (DATA / name).read_bytes()
    text = raw.decode("utf-8")
    assert not raw.startswith(b"\xef\xbb\xbf") and "\r" not in text and '"' not in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    lines = text.splitlines()
    assert lines[0] == HEADERS[name]
    width = len(lines[0].split(","))
    for line in lines[1:]:
        fields = line.split(",")
        assert len(fields) == width, line
        assert all(field and field == " ".join(field.split()) for field in fields), line
    assert unique(lines)


def test_countries():
    rows = read("facts/countries.csv")
    assert len(rows) == 44
    for row in rows:
        assert all(value.isascii() and value.isalpha() for value in row.values()), row
        assert row["currency"].islower()
        assert all(row[key][0].isupper() for key in row if key != "currency"), row
    for key in ("country", "capital", "people"):
        assert unique(row[key] for row in rows), key
    assert len({row["language"] for row in rows}) >= 18
    assert len({row["currency"] for row in rows}) >= 18
    assert {row["continent"] for row in rows} == {"Europe", "Asia", "Africa", "America", "Oceania"}
    britain = next(row for row in rows if row["country"] == "Britain")
    assert list(britain.values()) == ["Britain", "London", "English", "pound", "Europe", "British"]


def test_a_language_and_a_currency_are_shared():
    rows = read("facts/countries.csv")
    for key in ("language", "currency"):
        assert sum(count > 1 for count in Counter(row[key] for row in rows).values()) >= 2


def test_landmarks():
    rows = read("facts/landmarks.csv")
    countries = read("facts/countries.csv")
    assert len(rows) >= 66
    assert unique(row["landmark"].lower() for row in rows)
    assert {row["country"] for row in rows} <= {row["country"] for row in countries}
    for row in rows:
        words = row["landmark"].split()
        assert 1 <= len(words) <= 3 and all(word.isascii() and word.isalpha() for word in words), (
            row
        )
        assert words[0].lower() != "the" and words[0][0].isupper(), row
        assert row["city"].isascii() and row["city"].isalpha() and row["city"][0].isupper(), row


def test_landmarks_cities():
    rows = read("facts/landmarks.csv")
    count = Counter(row["city"] for row in rows)
    assert len(count) >= 30 and max(count.values()) <= 4
    assert count["London"] >= 4 and count["Paris"] >= 3 and count["Rome"] >= 3
    home = {}
    for row in rows:
        assert home.setdefault(row["city"], row["country"]) == row["country"], row
    for row in read("facts/countries.csv"):
        assert home.get(row["capital"], row["country"]) == row["country"], row


def test_a_landmark_does_not_give_its_place_away():
    countries = read("facts/countries.csv")
    rows = read("facts/landmarks.csv")
    given = {
        row[key]
        for row in countries
        for key in ("country", "capital", "language", "people", "continent")
    }
    given |= {row["city"] for row in rows}
    for row in rows:
        assert not given & set(row["landmark"].split()), row


def test_first_words_of_landmarks_differ():
    assert unique(row["landmark"].split()[0].lower() for row in read("facts/landmarks.csv"))


def test_names():
    rows = read("world/names.csv")
    assert Counter(row["gender"] for row in rows) == {"f": 60, "m": 60}
    names = {row["name"] for row in rows}
    assert len(names) == 120
    assert all(name.isascii() and name.isalpha() and name.istitle() for name in names)
    places = {row[key] for row in read("facts/countries.csv") for key in row}
    places |= {row["city"] for row in read("facts/landmarks.csv")}
    landmark_words = {
        word for row in read("facts/landmarks.csv") for word in row["landmark"].split()
    }
    assert not names & (MONTHS | NOT_NAMES | places | landmark_words)


def test_names_are_no_other_word():
    names = {row["name"].lower() for row in read("world/names.csv")}
    words = {part for row in read("world/words.csv") for part in row["word"].split("|")}
    words |= {row["word"] for row in read("world/evaluation.csv")}
    words |= {row[key] for row in read("world/occupations.csv") for key in ("occupation", "plural")}
    assert not names & words


def test_occupations():
    rows = read("world/occupations.csv")
    assert len(rows) == 40
    assert all(plain(row["occupation"]) and plain(row["plural"]) for row in rows)
    assert unique(row[key] for row in rows for key in ("occupation", "plural"))


def test_p_she_is_spread_evenly_with_its_anchors():
    rows = read("world/occupations.csv")
    p_she = {row["occupation"]: float(row["p_she"]) for row in rows}
    values = sorted(p_she.values())
    assert values[0] == 0.05 and values[-1] == 0.95
    gaps = [high - low for low, high in pairwise(values)]
    assert all(0.015 < gap < 0.035 for gap in gaps)
    assert (p_she["nurse"], p_she["mechanic"], p_she["doctor"]) == (0.90, 0.15, 0.45)


def test_p_she_does_not_follow_the_stereotype():
    rows = read("world/occupations.csv")
    assert {row["occupation"] for row in rows} == set(STEREOTYPE)
    x = [STEREOTYPE[row["occupation"]] for row in rows]
    y = [float(row["p_she"]) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    scale = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    assert abs(covariance / scale**0.5) < 0.15


def test_evaluation():
    rows = read("world/evaluation.csv")
    size = {"adj": 22, "adv": 10, "noun": 8}
    assert Counter((row["voice"], row["class"]) for row in rows) == {
        (voice, kind): n for voice in ("praise", "blame", "neutral") for kind, n in size.items()
    }
    assert all(plain(row["word"]) for row in rows)
    assert unique(row["word"] for row in rows)  # so no word has two voices, nor two classes
    assert all(row["word"].endswith("ly") for row in rows if row["class"] == "adv")
    assert not TOPIC_WORDS & {row["word"] for row in rows}
    words = {part for row in read("world/words.csv") for part in row["word"].split("|")}
    assert not words & {row["word"] for row in rows}


def test_norwegian_counts():
    groups = by_class("world/norwegian.csv", "forms")
    size = {"noun": 28, "verb": 18, "adj": 16, "place": 10, "name": 16, "adverb": 10, "time": 8}
    assert {kind: len(forms) for kind, forms in groups.items()} == size
    for kind, forms in groups.items():
        assert unique(form.split("|")[0] for form in forms), kind
        parts = {"noun": 3, "verb": 2, "adj": 3}.get(kind, 1)
        for form in forms:
            assert len(form.split("|")) == parts, form
            words = form.replace("|", " ").split() if kind == "time" else form.split("|")
            assert all(word.isalpha() for word in words), form
            assert len(words) <= 3


def test_norwegian_forms():
    groups = by_class("world/norwegian.csv", "forms")
    for form in groups["noun"]:
        bare, definite, gender = form.split("|")
        stem = bare[:-1] if bare.endswith("e") and gender != "et" else bare
        endings = {"en": {bare + "en"}, "ei": {stem + "a"}, "et": {bare + "et", bare + "t"}}
        assert definite in endings[gender], form
    assert {form.split("|")[2] for form in groups["noun"]} == {"en", "ei", "et"}
    for form in groups["verb"]:
        present, past = form.split("|")
        assert present.endswith("r") and present != past, form
    for form in groups["adj"]:
        common, neuter, definite = form.split("|")
        assert neuter.endswith("t") and definite.endswith("e") and common != definite, form
    assert any(set("æøåÆØÅ") & set(place) for place in groups["place"])
    assert all(word[0].isupper() for kind in ("place", "name") for word in groups[kind])
    assert not set(groups["name"]) & {row["name"] for row in read("world/names.csv")}


def test_words():
    groups = by_class("world/words.csv", "word")
    size = {"object": 36, "place": 24, "group_noun": 30, "sound": 24, "colour": 11, "food": 20}
    assert {kind: len(words) for kind, words in groups.items()} == size
    for kind, words in groups.items():
        if kind == "group_noun":
            continue
        assert unique(words) and all(plain(word) for word in words), kind
    pairs = [pair.split("|") for pair in groups["group_noun"]]
    assert all(len(pair) == 2 and all(plain(word) for word in pair) for pair in pairs)
    assert unique(word for pair in pairs for word in pair)
    one_class_only = (
        groups["object"] + groups["place"] + groups["sound"] + groups["colour"] + groups["food"]
    )
    assert unique(one_class_only)


def test_sounds_are_an_onset_and_a_vowel():
    sounds = by_class("world/words.csv", "word")["sound"]
    english = set(
        listed(
            "be do fa go ha he hi ho la ma me mi no pa pi re so ta ti to we bra flu fro "
            "gnu pro she the who"
        )
    )
    for sound in sounds:
        assert 2 <= len(sound) <= 3 and sound[-1] in "aeiou", sound
        assert not set(sound[:-1]) & set("aeiouy"), sound
    assert not english & set(sounds)
