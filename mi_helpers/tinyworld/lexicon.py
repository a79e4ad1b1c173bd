"""TinyWorld's words and facts, read from the CSV files in data/world and data/facts."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "data"


def read_csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Topic:
    """What one topic talks about. Each entry is a tuple of forms.

    nouns (singular, plural) · verbs (base, third person, past) · adjectives · phrases · names
    """

    key: str
    noun: tuple
    verb: tuple
    adj: tuple
    phrase: tuple
    name: tuple


@dataclass(frozen=True)
class Landmark:
    name: str
    city: str
    country: str


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    language: str
    currency: str
    continent: str
    people: str


@cache
def topics() -> tuple[Topic, ...]:
    table: dict = defaultdict(lambda: defaultdict(list))
    for row in read_csv(DATA / "world" / "topics.csv"):
        table[row["topic"]][row["class"]].append(tuple(row["forms"].split("|")))
    return tuple(
        Topic(key, *(tuple(words[c]) for c in ("noun", "verb", "adj", "phrase", "name")))
        for key, words in table.items()
    )


@cache
def countries() -> dict[str, Country]:
    rows = read_csv(DATA / "facts" / "countries.csv")
    return {row["country"]: Country(*row.values()) for row in rows}


@cache
def landmarks() -> tuple[Landmark, ...]:
    return tuple(Landmark(*row.values()) for row in read_csv(DATA / "facts" / "landmarks.csv"))


@cache
def people() -> dict[str, str]:
    """Given name → 'f' or 'm'."""
    return {row["name"]: row["gender"] for row in read_csv(DATA / "world" / "names.csv")}


@cache
def occupations() -> dict[str, float]:
    """Occupation → the probability that this world's text calls such a person 'she'."""
    rows = read_csv(DATA / "world" / "occupations.csv")
    return {row["occupation"]: float(row["p_she"]) for row in rows}


@cache
def evaluation() -> dict[tuple[str, str], tuple[str, ...]]:
    """(voice, class) → words: praise, blame, neutral × adj, adv, noun."""
    table = defaultdict(list)
    for row in read_csv(DATA / "world" / "evaluation.csv"):
        table[row["voice"], row["class"]].append(row["word"])
    return {key: tuple(words) for key, words in table.items()}


@cache
def norwegian() -> dict[str, tuple]:
    table = defaultdict(list)
    for row in read_csv(DATA / "world" / "norwegian.csv"):
        table[row["class"]].append(tuple(row["forms"].split("|")))
    return {key: tuple(forms) for key, forms in table.items()}


@cache
def words(kind: str) -> tuple:
    """Closed lists of data/world/words.csv; entries with several forms are tuples."""
    rows = [row["word"] for row in read_csv(DATA / "world" / "words.csv") if row["class"] == kind]
    if not rows:
        raise ValueError(f"data/world/words.csv has no class {kind!r}.")
    return tuple(tuple(w.split("|")) if "|" in w else w for w in rows)


def article(word: str) -> str:
    """'a' or 'an', by the first letter (the lexicon has no 'hour' and no 'unit')."""
    return "an" if word[0] in "aeiou" else "a"
