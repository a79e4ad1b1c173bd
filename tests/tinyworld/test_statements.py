"""Statements with a verdict: exact probabilities, half of them true, true labels, a held-out part.

As in test_tinyworld.py, probabilities are held against brute force on a small world: every outcome
is enumerated, and the chance of each text is summed up from the raw choices.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tinyworld import (
    COUNTRIES,
    LANDMARKS,
    TWO,
    Priced,
    Recorder,
    agree,
    by_text,
    looked_up,
    small_book,
)

from mi_helpers.tinyworld import copying, facts, lexicon, prose, source, statements
from mi_helpers.tinyworld.held import is_held
from mi_helpers.tinyworld.source import Draw, Page, compiled, every_outcome
from mi_helpers.tinyworld.world import World

WORLD = World()
RELATIONS = tuple(statements.AFFIRMED)
TRAINED = tuple(statements.RELATIONS.items)
HELDS = ((), ("templates",), ("entities",), ("relations",), ("templates", "entities", "relations"))
SEEDS = st.integers(0, 2**32)


def sample(n, family="truth", seed=0, held=(), **choices):
    """The first n documents of a stream."""
    return list(itertools.islice(WORLD.documents(seed, family, held, **choices), n))


def halves(counts):
    """Whether each (true, false) pair of counts is within 4.5 deviations of half and half."""
    far = {key: c for key, c in counts.items() if abs(c[True] - c[False]) > 4.5 * c.total() ** 0.5}
    return far == {}


# -- probabilities by brute force ---------------------------------------------------------------


@pytest.fixture
def outcomes(monkeypatch):
    """outcomes(write) → (p, document) for every outcome, p from the raw choices."""
    monkeypatch.setattr(source, "Script", Priced)
    return lambda write: [(math.exp(-draw.raw), found) for draw, found in every_outcome(write)]


def clear_caches():
    for module in (facts, statements):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture
def small_world(monkeypatch):
    """Two countries and four landmarks; each relation has held-out and other subjects."""

    def hold(*entities, share):
        return sum(map(ord, "".join(entities))) % 2 == 0

    monkeypatch.setattr(lexicon, "countries", lambda: COUNTRIES)
    monkeypatch.setattr(lexicon, "landmarks", lambda: LANDMARKS)
    monkeypatch.setattr(statements, "is_held", hold)
    clear_caches()
    yield
    clear_caches()


@pytest.fixture
def small_tables(small_world, monkeypatch):
    """One or two phrasings of each kind on either side of the line between training and held."""
    relations = {"country-language": 1, "landmark-city": 2}
    for name in ("AFFIRMED", "NEGATED"):
        table = {r: rows[:1] + rows[-2:] for r, rows in getattr(statements, name).items()}
        monkeypatch.setattr(statements, name, table)
    frames = "{S}. That is {T!}.", "is it true that {S}? The answer is {Y!}.", "{S}. They are {R!}."
    monkeypatch.setattr(statements, "VERDICTS", compiled(*frames))
    monkeypatch.setattr(statements, "HELD_VERDICTS", 1)
    monkeypatch.setattr(statements, "RELATIONS", source.Weighted(relations))


@pytest.mark.parametrize("held", HELDS, ids="-".join)
def test_nats_of_one_statement_are_exact_by_brute_force(small_world, outcomes, held):
    found = outcomes(lambda draw: statements.judged(draw, frozenset(held), count=1))
    assert len(found) > 20
    agree(found, lambda document: document.nats)
    assert len(by_text(found)) == len(found)  # one derivation each


@pytest.mark.parametrize("held", HELDS, ids="-".join)
def test_nats_of_what_is_so_and_a_statement_on_it_are_exact_by_brute_force(
    small_world, outcomes, held
):
    found = outcomes(lambda draw: statements.told(draw, frozenset(held)))
    assert len(found) > 20
    agree(found, lambda document: document.nats)
    assert len(by_text(found)) == len(found)
    for _, document in found:
        (fact, said), (verdict,) = document.find("truth"), document.find("verdict")
        assert fact.value is True and said.value == verdict.value
        assert len({span.value for span in document.find("statement")}) == 1


@pytest.mark.parametrize("held", HELDS, ids="-".join)
@pytest.mark.parametrize("count", [1, 2])
def test_nats_of_documents_are_exact_by_brute_force(small_tables, outcomes, count, held):
    found = outcomes(lambda draw: statements.judged(draw, frozenset(held), count=count))
    agree(found, lambda document: document.nats)
    assert len(by_text(found)) == len(found)
    assert all(document.hidden == 0 for _, document in found)


def test_nats_of_a_drawn_number_of_statements_are_exact(small_tables, outcomes, monkeypatch):
    monkeypatch.setattr(statements, "RELATIONS", source.Weighted({"country-language": 1}))
    monkeypatch.setattr(
        statements, "VERDICTS", compiled("{S}. That is {T!}.", "{S}. No {Y!}.", "{S}. {R!}.")
    )
    found = outcomes(lambda draw: statements.judged(draw))
    agree(found, lambda document: document.nats)
    assert len(by_text(found)) == len(found)
    p = Counter()
    for chance, document in found:
        n, judged = len(document.find("statement")), len(document.find("verdict"))
        assert judged >= 1 and n - judged in (0, 1)
        p[n] += chance
        p["bare"] += chance * (n - judged)
    assert p == {
        key: pytest.approx(share) for key, share in ((1, 1 / 3), (2, 1 / 3), (3, 1 / 3))
    } | {"bare": pytest.approx(1 / 4)}


def test_truth_is_one_half_whatever_else_is_drawn_by_brute_force(small_world, outcomes):
    """Given the relation, the subject, the phrasing and the frame, p(true) is 1/2."""
    p = defaultdict(Counter)
    for chance, document in outcomes(lambda draw: statements.judged(draw, count=1)):
        latents, text = document.latents, document.text
        (word,) = document.find("verdict")
        pair = next(
            pair for pair in statements.WORDS.values() if text[word.start : word.end] in pair
        )
        frame = text[: word.start].replace(latents["value"], "_") + str(pair) + text[word.end :]
        p[latents["relation"], latents["subject"], frame][latents["truth"]] += chance
    assert len(p) > 1_000
    for shares in p.values():
        assert shares[True] == pytest.approx(shares[False], abs=1e-12) and len(shares) == 2


@pytest.mark.parametrize("held", HELDS, ids="-".join)
def test_nats_of_reports_are_exact_by_brute_force(small_world, outcomes, held):
    def write(draw):
        page = Page()
        statements.reported(draw, page, frozenset(held))
        return source.finish(page, draw, "prose")

    found = outcomes(write)
    agree(found, lambda document: document.nats)
    assert len(by_text(found)) == len(found)


def test_marginal_nats_of_prose_with_reports_are_exact(small_tables, outcomes, monkeypatch):
    monkeypatch.setattr(statements, "RELATIONS", source.Weighted({"country-language": 1}))
    monkeypatch.setattr(statements, "REPORTS", statements.REPORTS[:2] + statements.REPORTS[-2:])
    monkeypatch.setattr(prose, "CONNECTIVES", {"formal": ("however,",), "plain": ("so",)})
    book = small_book(("who {VS}?",), TWO, (2,), turn=0.3, connective=0.5, fact=0.2, statement=0.4)

    def fact(draw, page):
        page.write(draw.pick(("Rome is in Italy.", "Oslo is in Norway.")))

    found = outcomes(
        lambda draw: prose.Prose(book, draw, fact=fact, statement=statements.reported).document()
    )
    agree(found, lambda document: prose.marginal_nats(book, document))
    share = sum(p * len(document.find("truth")) for p, document in found) / 2
    assert share == pytest.approx(0.8 * 0.4)


def price(document):
    """-log p of a training document of the real world, from its labels and the sizes of tables."""
    said, judged = document.find("statement"), document.find("verdict")
    n = len(said)
    nats = math.log(3)
    for span in judged:
        word = document.text[span.start : span.end]
        first = document.text[: span.start].endswith(". That is ") and word in ("true", "false")
        nats -= math.log(0.7 if first else 0.3 / 12)
    if n > 1:
        nats += math.log(n / (3 / 8)) if len(judged) < n else -math.log(5 / 8)
    polarities, truths = document.find("polarity"), document.find("truth")
    for span, polarity, truth in zip(said, polarities, truths, strict=True):
        negated = polarity.value == "negated"
        nats -= math.log(4 / 14 if span.value == "landmark-city" else 2 / 14)
        nats += math.log(len(statements.trained_or_held(span.value, False)) * 2)
        nats += math.log(5 / 0.12) if negated else math.log(6 / 0.88)
        if negated == truth.value:
            nats -= math.log(chance_of_the_false_value(document, span))
    return nats


def chance_of_the_false_value(document, span):
    """Of the subjects with another value than this one's, the share that have what is said."""
    kinds = {"L": "landmark", "C": "city", "K": "country", "G": "language", "U": "currency"}
    name, slot = statements.SLOTS[span.value]
    inside = [s for s in document.find("entity") if span.start <= s.start < span.end]
    told = {s.value: document.text[s.start : s.end] for s in inside}
    table = {
        values[name][0]: values[slot][0]
        for subject in facts.subjects(span.value)
        for values in [facts.relation_values(span.value, subject)]
    }
    own = table[told[kinds[name]]]
    rest = [value for value in table.values() if value != own]
    return rest.count(told[kinds[slot]]) / len(rest)


@settings(deadline=None)
@given(SEEDS)
def test_nats_of_the_real_world_are_what_its_tables_say(seed):
    document = WORLD.document(seed, "truth")
    assert WORLD.floor(document) == document.nats == pytest.approx(price(document), abs=1e-9)


def said(relation, parts, subject, value, truth=True, negated=False):
    """A statement that names `value`, true or not."""
    slots = facts.relation_values(relation, subject)
    slots[statements.SLOTS[relation][1]] = (value, None, None)
    return statements.Statement(relation, "", value, negated, truth, parts, slots)


def written(frame, statement):
    page = Page()
    statements.write_statement(page, frame, statement)
    return page.text()


def phrasings(relation):
    return statements.AFFIRMED[relation] + statements.NEGATED[relation]


def test_no_two_statements_have_the_same_text():
    """Over all relations, phrasings, subjects and values of the real world."""
    texts = Counter(
        written(statements.PLAIN, said(relation, parts, subject, value))
        for relation in RELATIONS
        for subject in facts.subjects(relation)
        for value in statements.others(relation, "").items
        for parts in phrasings(relation)
    )
    assert len(texts) > 200_000 and max(texts.values()) == 1


def test_no_two_frames_write_the_same_text():
    texts = Counter()
    frames = (*statements.VERDICTS, *statements.REPORTS, statements.PLAIN)
    for relation, frame in itertools.product(RELATIONS, frames):
        subject = facts.subjects(relation)[0]
        value = statements.others(relation, "").items[-1]
        for parts, truth in itertools.product(phrasings(relation), (True, False)):
            texts[written(frame, said(relation, parts, subject, value, truth))] += 1
    silent = len(statements.REPORTS) + 1  # the same whether true or not
    assert set(texts.values()) == {1, 2}
    assert sum(n == 2 for n in texts.values()) == silent * sum(len(phrasings(r)) for r in RELATIONS)


# -- half of them are true ----------------------------------------------------------------------


@pytest.mark.parametrize("held", HELDS, ids="-".join)
def test_half_are_true_in_each_relation_phrasing_polarity_and_subject(held):
    draw, counts = Draw(1), defaultdict(Counter)
    for _ in range(60_000):
        one = statements.draw_statement(draw, frozenset(held))
        keys = (one.relation, one.negated, str(one.parts), (one.relation, one.subject), "all")
        for key in (*keys, (one.relation, one.negated)):
            counts[key][one.truth] += 1
    assert counts["all"].total() == 60_000 and halves(counts)
    negated = sum(n for key, each in counts.items() for n in each.values() if key is True)
    assert 0.11 * 60_000 < negated < 0.13 * 60_000


@pytest.mark.parametrize("held", [(), ("templates",)], ids="-".join)
def test_half_are_true_after_each_verdict_frame(held, monkeypatch):
    counts, frames, frame = defaultdict(Counter), [], statements.verdict_frame
    monkeypatch.setattr(
        statements, "verdict_frame", lambda *given: frames.append(frame(*given)) or frames[-1]
    )
    for seed in range(10_000):
        document = WORLD.document(seed, "truth", held, count=1)
        counts[str(frames[-1])][document.latents["truth"]] += 1
    assert len(counts) == (4 if held else 13) and halves(counts)
    usual = counts[str(statements.VERDICTS[0])].total()
    assert usual == 0 if held else 0.68 < usual / 10_000 < 0.72


def test_false_values_are_those_of_other_subjects():
    draw, counts = Draw(2), Counter()
    for _ in range(20_000):
        one = statements.draw_statement(draw, relation="country-continent", truth=False)
        if not one.negated and COUNTRY_CONTINENT[one.subject] == "Europe":
            counts[one.value] += 1
    n = counts.total()
    assert set(counts) == {"Asia", "Africa", "America", "Oceania"} and n > 4_000
    others = Counter(c for c in COUNTRY_CONTINENT.values() if c != "Europe")
    for value, count in counts.items():
        p = others[value] / others.total()
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), value


COUNTRY_CONTINENT = {country.name: country.continent for country in lexicon.countries().values()}


# -- labels -------------------------------------------------------------------------------------

KIND = {
    "capital": "city"
}  # of the entity that a relation's value is; else the relation's last word


def readings(document):
    """(relation, text, value, negated, truth) of each statement, the value by its label."""
    entities, ends = document.find("entity"), document.find("truth")
    polarities = document.find("polarity")
    for span, polarity, end in zip(document.find("statement"), polarities, ends, strict=True):
        assert (span.start, span.end) == (polarity.start, polarity.end)
        assert (end.start, end.end) == (span.end - 1, span.end)
        target = span.value.split("-")[1]
        inside = [e for e in entities if span.start <= e.start < span.end]
        (value,) = [e for e in inside if e.value == KIND.get(target, target)]
        text = document.text[span.start : span.end]
        value = document.text[value.start : value.end]
        yield span.value, text, value, polarity.value == "negated", end.value


@pytest.mark.parametrize("family", ["truth", "prose"])
@pytest.mark.parametrize("held", HELDS, ids="-".join)
def test_labels_are_true_of_the_facts(family, held):
    seen = Counter()
    for document in sample(300, family, held=held):
        for relation, text, value, negated, truth in readings(document):
            assert (re.search(r"\b(not|no)\b", text) is not None) == negated
            assert truth == ((looked_up(relation, text) == value) != negated), text
            seen[relation, negated, truth] += 1
    assert {relation for relation, *_ in seen} == set(
        statements.HELD_RELATIONS.items if "relations" in held else TRAINED
    )
    assert len({key[1:] for key in seen}) == 4


@settings(deadline=None)
@given(SEEDS, st.sampled_from(HELDS))
def test_a_verdict_follows_its_statement_and_agrees_with_it(seed, held):
    document = WORLD.document(seed, "truth", held)
    text, ends, verdicts = document.text, document.find("truth"), document.find("verdict")
    word_of = {pair[truth]: truth for pair in statements.WORDS.values() for truth in (False, True)}
    for end in ends:
        assert re.fullmatch(r"[a-z][.?]( |$)", text[end.start - 1 : end.end + 1].lower())
    before = []
    for verdict in verdicts:
        last = [end for end in ends if end.end <= verdict.start][-1]
        assert last not in before and last.value == verdict.value
        assert word_of[text[verdict.start : verdict.end]] == verdict.value
        before.append(last)
    assert [(v.start, v.end) for v in verdicts] == [
        (answer.start, answer.end) for answer in document.find("answer")
    ]
    assert len(verdicts) >= 1 and len(ends) - len(verdicts) in (0, 1)


def test_no_verdict_stands_before_its_statement():
    known = {word for pair in statements.WORDS.values() for word in pair}
    for frame in (*statements.VERDICTS, *statements.REPORTS):
        names = [part[0] for part in frame if not isinstance(part, str)]
        assert names[0] == "S" and len(names) == 1 + (frame in statements.VERDICTS)
        literal = " ".join(part for part in frame if isinstance(part, str))
        assert set(re.findall(r"\w+", literal)) & known <= {"true", "correct"}  # "is it true that"


def test_latents_of_one_statement_are_its_own():
    for document in sample(200, count=1):
        ((relation, _, value, negated, truth),) = readings(document)
        latents = document.latents
        assert (relation, value, negated, truth) == tuple(
            latents[name] for name in ("relation", "value", "negated", "truth")
        )
        assert latents["subject"] in document.text
    assert all(document.latents == {} for document in sample(50, count=2))


@pytest.mark.parametrize("negated, truth", list(itertools.product((None, True, False), repeat=2)))
def test_choices_are_kept(negated, truth):
    documents = sample(60, relation="country-capital", count=2, negated=negated, truth=truth)
    found = [reading for document in documents for reading in readings(document)]
    assert len(found) == 120 and {relation for relation, *_ in found} == {"country-capital"}
    assert {reading[3] for reading in found} == ({True, False} if negated is None else {negated})
    assert {reading[4] for reading in found} == ({True, False} if truth is None else {truth})


def test_prose_reports_statements_as_often_as_the_book_says():
    sentences, reports, truths = 0, 0, Counter()
    for document in sample(3_000, "prose"):
        topics, facts_told = document.find("topic"), document.find("fact")
        sentences += len(topics) - len(facts_told)
        for end in document.find("truth"):
            truths[end.value] += 1
            assert sum(topic.end == end.end for topic in topics) == 1  # a sentence of its own
        reports += len(document.find("statement"))
        assert not document.find("verdict")
    p = WORLD.book.statement
    assert abs(reports - sentences * p) < 4.5 * math.sqrt(sentences * p * (1 - p))
    assert halves({"prose": truths})


# -- phrasings ----------------------------------------------------------------------------------


def shape(parts):
    """A template up to its last slot, with slots by name: what is read before the value."""
    names = [part if isinstance(part, str) else f"{{{part[0]}}}" for part in parts]
    last = max(i for i, part in enumerate(parts) if not isinstance(part, str))
    return "".join(names[:last])


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_has_enough_phrasings_with_its_two_slots(relation):
    affirmed, negated = statements.AFFIRMED[relation], statements.NEGATED[relation]
    assert len(affirmed) - 2 + len(negated) - 2 >= 8  # the last two of each are held out
    assert len(negated) >= len(affirmed + negated) / 3
    assert (len(negated) - 2) >= (len(affirmed + negated) - 4) / 3
    for parts in affirmed + negated:
        slots = [part[0] for part in parts if not isinstance(part, str)]
        assert sorted(slots) == sorted(statements.SLOTS[relation])
        literal = "".join(part for part in parts if isinstance(part, str))
        assert (re.search(r"\b(not|no)\b", literal) is not None) == (parts in negated)
    assert len(set(map(str, affirmed + negated))) == len(affirmed + negated)


def test_there_are_enough_verdicts_and_reports():
    assert len(statements.VERDICTS) - statements.HELD_VERDICTS >= 8
    assert statements.HELD_VERDICTS >= 3 and len(statements.REPORTS) - 2 >= 6


def test_no_statement_begins_as_a_fact_does():
    """So that in `facts` and `two_hop`, where every value is true, it stays certain."""
    tables = (*facts.FACTS.values(), *facts.TWO_HOP.values())
    told = {shape(parts) for table in tables for parts in table}
    for relation in RELATIONS:
        for parts in phrasings(relation):
            assert shape(parts) not in told


def literals(*tables):
    """Words that templates write, in lower case."""
    return {
        word
        for parts in itertools.chain(*tables)
        for part in parts
        if isinstance(part, str)
        for word in re.findall(r"[a-z]+", part.lower())
    }


def test_held_out_phrasings_are_new_orders_of_trained_words():
    tables = [statements.AFFIRMED, statements.NEGATED]
    trained = [table[relation][:-2] for table in tables for relation in TRAINED]
    held = [table[relation][-2:] for table in tables for relation in TRAINED]
    held += [table[relation] for table in tables for relation in statements.HELD_RELATIONS.items]
    trained += [statements.VERDICTS[: -statements.HELD_VERDICTS], statements.REPORTS[:-2]]
    held += [statements.VERDICTS[-statements.HELD_VERDICTS :], statements.REPORTS[-2:]]
    told = [table[:-2] for table in facts.FACTS.values()]
    assert literals(*held) - literals(*trained, *told) == set()


def test_words_are_those_that_training_writes_and_the_vocabulary_has_not():
    listed, known = statements.words(), set(copying.vocabulary())
    draw, page = Draw(0), Page()
    for _ in range(4_000):
        statements.reported(draw, page)
        page.write(" ")
    texts = [page.text(), *(document.text for document in sample(4_000))]
    told = set(re.findall(r"[A-Za-z]+", " ".join(texts))) - known
    facts_tell = {"continent", "money"}  # here in held-out statements only
    assert facts_tell <= literals(*(table[:-2] for table in facts.FACTS.values()))
    assert len(set(listed)) == len(listed) and told == set(listed) - facts_tell
    for held in HELDS:
        for document in sample(1_000, held=held) + sample(200, "truth", 1, held, count=3):
            assert set(re.findall(r"[A-Za-z]+", document.text)) <= known | set(listed)


# -- held out -----------------------------------------------------------------------------------


def pairs(documents):
    """(subject, relation) of every statement, the subject by the facts' own names."""
    for document in documents:
        for relation, text, *_ in readings(document):
            names = [facts.relation_values(relation, s) for s in facts.subjects(relation)]
            slot = statements.SLOTS[relation][0]
            options = {values[slot][0] for values in names}
            (name,) = [o for o in options if re.search(rf"\b{re.escape(o)}\b", text)]
            yield name, relation


def test_held_out_pairs_and_the_held_out_relation_are_never_in_training():
    trained = set(pairs(sample(2_500) + sample(2_500, None) + sample(1_500, "prose")))
    assert not any(is_held(*pair, share=6) for pair in trained)
    assert {relation for _, relation in trained} == set(TRAINED)
    held = set(pairs(sample(800, held="entities") + sample(600, "prose", held="entities")))
    assert all(is_held(*pair, share=6) for pair in held)
    every = sum(len(facts.subjects(relation)) for relation in TRAINED)
    assert len(held) > 0.1 * every and len(trained) > 0.75 * every


def test_held_out_pairs_are_still_told_as_facts():
    told = {
        (document.text[span.start : span.end], fact.value)
        for document in sample(4_000, "facts", count=1)
        for fact in document.find("fact")
        for span in document.find("entity")
    }
    held = [(s, r) for r in TRAINED for s in statements.trained_or_held(r, True)]
    names = {(getattr(s, "name", s), r) for s, r in held}
    assert len(names & told) > 0.9 * len(names)


@pytest.mark.parametrize("family, n", [("truth", 3_000), ("prose", 5_000), (None, 2_500)])
def test_held_out_phrasings_are_never_in_training(family, n):
    tables = [statements.VERDICTS[-statements.HELD_VERDICTS :], statements.REPORTS[-2:]]
    tables += [table[-2:] for table in statements.AFFIRMED.values()]
    tables += [table[-2:] for table in statements.NEGATED.values()]
    held = {str(parts) for table in tables for parts in table}
    draw = Recorder(4)
    for _ in range(n):
        WORLD.write(draw, family)
    used = set(map(str, draw.templates))
    assert not used & held
    if family:
        draw = Recorder(4)
        for _ in range(n):
            WORLD.write(draw, family, "templates")
        shown = set(map(str, draw.templates)) & held
        assert len(shown) == 4 * len(TRAINED) + {"truth": 4, "prose": 2}[family]


def test_reports_of_the_held_out_relation_can_be_written():
    page, draw = Page(), Draw(3)
    write = partial(statements.reported, held=frozenset({"relations"}))
    write(draw, page)
    assert [span.value for span in page.spans if span.kind == "statement"] == ["country-continent"]
