"""Topical prose: independent latent variables speak through shared sentence frames.

A document draws a voice, a tense, a register, a person and a city, and a topic that may turn to
another at each new sentence. Each variable chooses words for its own kind of slot, in frames that
all topics share, so no frame and no position tells the topic: a reader has to represent it.

Because every slot depends on one variable only, p(text) factorises over the variables, and the
chance of each value given the words so far is exact: see `evidence` and `topic_posterior`.
"""

from dataclasses import dataclass

import numpy as np

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.source import (
    Document,
    Draw,
    Page,
    Span,
    Weighted,
    compile_template,
)

TURN = 0.1  # chance that a sentence after the first leaves the topic
FIRST_SENTENCES = (3, 4, 5, 6, 7, 8)
VOICES = ("praise", "neutral", "blame")
OWN_VOICE = 0.8  # share of evaluative words that come from the document's own voice
TENSES = ("present", "past")
REGISTERS = ("formal", "plain")
NUMBERS = ("singular", "plural")

NOUN_PHRASES = {
    "{D} {N}": 40,
    "{D} {ADJ} {N}": 24,
    "{D} {EV} {N}": 12,
    "{D} {N} of {M}": 6,
    "{D} {N} near {M}": 5,
    "{D} {N} that {VH} {M}": 8,
    "{NAME}": 5,
}

FRAMES = (
    "{NP1} {V1} {NP2}.",
    "{NP1} {V1} {NP2} {PH}.",
    "{NP1} {V1} {NP2} {PH}, and {NP3} {BE3} {EV}.",
    "{NP1} {BE1} {EV}.",
    "{NP1} {BE1} {EV} and {EV}.",
    "{NP1} {BE1} {ED} by {NP2}.",
    "{NP1} {BE1} {ED} {PH}.",
    "{NP1} {BE1} never {ED} by {NP2}.",
    "{NP1} {EVADV} {V1} {NP2}.",
    "{NP1} {V1} {NP2} more {EVADV} than {NP3}.",
    "there, {PH}, {NP1} {V1} {NP2}.",
    "there {BE1} {NP1} {PH}.",
    "{P} {SAY} that {NP1} {V1} {NP2}.",
    "{P} {SAY} that {NP1} {BE1} {EV}.",
    "{P} {ASK} whether {NP1} {V1} {NP2}.",
    '"{NP1} {V1} {NP2}," {P} {SAY}.',
    '"{NP1} {BE1} {EV}," {P} {SAY} {PH}.',
    "why {DO1} {NP1} {BASE} {NP2}?",
    "{DO1} {NP1} {BASE} {NP2} {PH}?",
    "who {VS} {NP1}?",
    "{NP1} {V1} {NP2}, and {NP3} {V3} {NP4}.",
    "{NP1} {V1} {NP2}, but {NP3} {BE3} {EV}.",
    "{NP1} {V1} {NP2} because {NP3} {BE3} {EV}.",
    "when {NP1} {V1} {NP2}, {NP3} {V3} {NP4}.",
    "although {NP1} {BE1} {EV}, {NP2} {V2} {NP3}.",
    "before {NP1} {V1} {NP2}, {P} {VS} {NP3}.",
    "if {NP1} {V1} {NP2}, {P} {VS} {NP3} {PH}.",
    "it {BES} {EV} that {NP1} {V1} {NP2}.",
    "{NAME} {VS} {NP1} {PH}.",
    "{NAME} and {NAME} {VP} {NP1}.",
    "in {CITY}, {NP1} {V1} {NP2}.",
    "{P} {GO} to {CITY} and {VS} {NP1}.",
    "{NP1} with {NP2} {V1} {NP3}.",
    "{NP1}, {EV} and {EV}, {V1} {NP2}.",
    "{NP1} {BE1} the {EVN} of {CITY}.",
    "{P} {VS} {NP1} and {NP2}.",
    "the {EVN} of {NP1} {BES} that {NP2} {V2} {NP3}.",
    "even {NAME} {VS} {NP1} {EVADV}.",
    # held out: never written in training
    "{NP1} and {NP2} {VP} {NP3} {PH}.",
    "{P} {SAY} that {NP1} {BE1} {ED} by {NP2}.",
    "while {NP1} {V1} {NP2}, {NP3} {BE3} {EV}.",
    "{NP1} often {V1} {NP2} and {NP3}.",
)
HELD_FRAMES = 4

DETERMINERS = {
    "singular": Weighted({"the": 3, "this": 1, "each": 1, "one": 1}),
    "plural": Weighted({"the": 3, "these": 1, "some": 1, "many": 1}),
}
BE = {"present": ("is", "are"), "past": ("was", "were")}
DO = {"present": ("does", "do"), "past": ("did", "did")}
SAY = {"present": ("says", "thinks", "knows"), "past": ("said", "thought", "knew")}
ASK = {"present": ("asks", "wonders"), "past": ("asked", "wondered")}
GO = {"present": ("goes", "returns"), "past": ("went", "returned")}
CONNECTIVES = {
    "formal": ("however,", "moreover,", "therefore,", "nevertheless,", "consequently,"),
    "plain": ("but", "and", "so", "then", "well,"),
}
PRONOUN = {"f": "she", "m": "he"}
CLASSES = ("noun", "verb", "adj", "phrase", "name")


@dataclass
class Book:
    """The lexicon and the frames that prose is written from; a test can pass its own small one."""

    topics: tuple
    frames: tuple
    noun_phrases: dict
    evaluation: dict
    people: dict
    cities: tuple
    sentences: tuple = FIRST_SENTENCES
    turn: float = TURN
    connective: float = 0.25
    fact: float = 0.05  # chance that a sentence states a fact
    statement: float = 0.04  # chance that one which states none reports a statement

    def __post_init__(self):
        self.frame_parts = tuple(compile_template(frame) for frame in self.frames)
        self.forms = Weighted(self.noun_phrases)
        self.common = Weighted({f: w for f, w in self.noun_phrases.items() if f != "{NAME}"})
        n = len(self.topics)
        self.turns = [
            Weighted({j: 1 - self.turn if j == i else self.turn / (n - 1) for j in range(n)})
            for i in range(n)
        ]
        self.form_parts = {form: compile_template(form) for form in self.noun_phrases}
        self.names = tuple(self.people)
        self.voice_words = {
            (voice, kind): self.evaluation[voice, kind]
            for voice in VOICES
            for kind in ("adj", "adv", "noun")
        }
        other = (1 - OWN_VOICE) / (len(VOICES) - 1)
        self.speaks = {
            voice: Weighted({v: OWN_VOICE if v == voice else other for v in VOICES})
            for voice in VOICES
        }
        self.log_likelihood = self._tables()

    def _tables(self) -> dict:
        """(latent, key) → log p(that evidence | value), one entry per value of the latent."""
        tables = {}
        with np.errstate(divide="ignore"):
            for kind in CLASSES:
                for word in {w for topic in self.topics for w in getattr(topic, kind)}:
                    tables["topic", (kind, word[0])] = np.log(
                        [
                            (word in getattr(topic, kind)) / len(getattr(topic, kind))
                            for topic in self.topics
                        ]
                    )
            for voice in VOICES:
                tables["voice", voice] = np.log(
                    [self.speaks[v].probs[self.speaks[v].items.index(voice)] for v in VOICES]
                )
            tables["tense", "present"], tables["tense", "past"] = np.log(np.eye(2))
            tables["register", "formal"], tables["register", "plain"] = np.log(np.eye(2))
        return tables


def standard_book() -> Book:
    """The book of the shipped world."""
    return Book(
        topics=lexicon.topics(),
        frames=FRAMES,
        noun_phrases=NOUN_PHRASES,
        evaluation=lexicon.evaluation(),
        people=lexicon.people(),
        cities=tuple(sorted({place.city for place in lexicon.landmarks()})),
    )


class Prose:
    """One document of topical prose, written sentence by sentence."""

    def __init__(
        self, book: Book, draw: Draw, held: frozenset = frozenset(), fact=None, statement=None
    ):
        """`fact(draw, page)` writes a sentence that states a fact, `statement(draw, page)` one that
        reports a statement, true or false; None for no such sentences."""
        self.book, self.draw, self.fact, self.statement = book, draw, fact, statement
        self.page, self.events = Page(), []
        self.latents = {
            "voice": draw.latent(VOICES),
            "tense": draw.latent(TENSES),
            "register": draw.latent(REGISTERS),
        }
        self.tense = self.latents["tense"]
        self.here = draw.latent(range(len(book.topics)))
        self.topic = book.topics[self.here]
        self.latents["topic"] = self.topic.key
        self.person = self.city = None
        self.number: dict[int, str] = {}
        frames = book.frame_parts
        if "templates" in held:
            self.frames = frames[-HELD_FRAMES:]
        else:
            self.frames = frames[:-HELD_FRAMES] if len(frames) > HELD_FRAMES else frames

    def document(self) -> Document:
        draw, page, book = self.draw, self.page, self.book
        for i in range(draw.pick(book.sentences)):
            if i:
                page.write(" ")
                self.turn()
            start = page.length
            self.sentence()
            page.spans.append(Span(start, page.length, "topic", self.topic.key))
        return Document(
            page.text(), "prose", self.latents, page.spans, draw.nats, draw.hidden, self.events
        )

    def turn(self) -> None:
        """A new sentence: with probability `turn`, one of the other topics."""
        here = self.draw.latent(self.book.turns[self.here])
        self.here, self.topic = here, self.book.topics[here]
        self.events.append(("turn", here, self.page.length))

    def sentence(self) -> None:
        draw, page = self.draw, self.page
        if self.fact is not None and draw.chance(self.book.fact):
            self.fact(draw, page)
            return
        if self.statement is not None and draw.chance(self.book.statement):
            self.statement(draw, page)
            return
        self.number.clear()
        page.capital = True
        if draw.chance(self.book.connective):
            register = self.latents["register"]
            page.mark(draw.pick(CONNECTIVES[register]), "register", register)
            page.write(" ")
            self.events.append(("register", register, page.length))
        self.write(draw.pick(self.frames))

    def write(self, parts: list) -> None:
        for part in parts:
            if isinstance(part, str):
                self.page.write(part)
            else:
                getattr(self, part[0])(part[1])

    # Slots. `i` is the number of the noun phrase that the slot agrees with.

    def NP(self, i):
        if i in self.number:  # fixed by a verb before it, and a name is never plural
            form = self.draw.weighted(self.book.common)
        else:
            form = self.draw.weighted(self.book.forms)
            self.number[i] = "singular" if form == "{NAME}" else self.draw.pick(NUMBERS)
        self.head = i
        self.write(self.book.form_parts[form])

    def D(self, _):
        self.page.write(self.draw.weighted(DETERMINERS[self.number[self.head]]))

    def N(self, _):
        self.noun(self.number[self.head])

    def M(self, _):
        """A bare noun phrase inside another: its own number, no further nesting."""
        number = self.draw.pick(NUMBERS)
        self.page.write(self.draw.weighted(DETERMINERS[number]) + " ")
        self.noun(number)

    def noun(self, number):
        forms = self.draw.pick(self.topic.noun)
        self.page.mark(forms[number == "plural"], "number", number)
        self.events.append(("topic", ("noun", forms[0]), self.page.length))

    def verb(self, form):
        """form: 0 base, 1 third person, 2 past."""
        forms = self.draw.pick(self.topic.verb)
        self.page.write(forms[form])
        self.events.append(("topic", ("verb", forms[0]), self.page.length))

    def finite(self, number):
        if self.tense == "past":
            self.verb(2)
        else:
            self.verb(number == "singular")
        self.events.append(("tense", self.tense, self.page.length))

    def V(self, i):
        start = self.page.length
        self.finite(self.number[i])
        if self.tense == "present":
            self.page.spans.append(Span(start, self.page.length, "agreement", self.number[i]))

    def VH(self, _):
        self.finite(self.number[self.head])

    def VS(self, _):
        self.finite("singular")

    def VP(self, _):
        self.finite("plural")

    def ED(self, _):
        self.verb(2)

    def BASE(self, _):
        self.verb(0)

    def closed(self, forms, number):
        self.page.write(forms[self.tense][number == "plural"])
        self.events.append(("tense", self.tense, self.page.length))

    def BE(self, i):
        # "there are some keys": the verb comes before its noun phrase and fixes the number
        if i not in self.number:
            self.number[i] = self.draw.pick(NUMBERS)
        start = self.page.length
        self.closed(BE, self.number[i])
        self.page.spans.append(Span(start, self.page.length, "agreement", self.number[i]))

    def BES(self, _):
        self.closed(BE, "singular")

    def DO(self, i):
        if i not in self.number:
            self.number[i] = self.draw.pick(NUMBERS)
        self.closed(DO, self.number[i])

    def choose(self, table):
        self.page.write(self.draw.pick(table[self.tense]))
        self.events.append(("tense", self.tense, self.page.length))

    def SAY(self, _):
        self.choose(SAY)

    def ASK(self, _):
        self.choose(ASK)

    def GO(self, _):
        self.choose(GO)

    def topical(self, kind, label):
        (word,) = self.draw.pick(getattr(self.topic, kind))
        if label:
            self.page.mark(word, "entity", label)
        else:
            self.page.write(word)
        self.events.append(("topic", (kind, word), self.page.length))

    def ADJ(self, _):
        self.topical("adj", None)

    def PH(self, _):
        self.topical("phrase", None)

    def NAME(self, _):
        self.topical("name", "name")

    def voiced(self, kind):
        voice = self.draw.weighted(self.book.speaks[self.latents["voice"]])
        self.page.mark(self.draw.pick(self.book.voice_words[voice, kind]), "evaluation", voice)
        self.events.append(("voice", voice, self.page.length))

    def EV(self, _):
        self.voiced("adj")

    def EVADV(self, _):
        self.voiced("adv")

    def EVN(self, _):
        self.voiced("noun")

    def P(self, _):
        """The document's person: by name at first, then by name or pronoun."""
        if self.person is None:
            self.person = self.draw.pick(self.book.names)
            self.latents["person"] = self.person
            self.page.mark(self.person, "entity", "person")
        elif self.draw.chance(0.6):
            self.page.mark(PRONOUN[self.book.people[self.person]], "pronoun", self.person)
        else:
            self.page.mark(self.person, "entity", "person")

    def CITY(self, _):
        if self.city is None:
            self.city = self.draw.pick(self.book.cities)
            self.latents["city"] = self.city
        self.page.mark(self.city, "entity", "city")


# What a perfect reader knows. Its evidence is the list of events that a document carries.


def turned(log_p: np.ndarray, turn: float) -> np.ndarray:
    """log p(topic of the next sentence) from log p(topic of this one), both (n_topics,)."""
    p = np.exp(log_p)
    return np.log((1 - turn) * p + turn / (len(p) - 1) * (p.sum() - p))


def marginal_nats(book: Book, document: Document) -> float:
    """-log p(text) in nats, with every latent variable summed out.

    Each slot depends on one variable z, so the sum over all of them is a product of small ones:
    -log p(text) = -log p(text | z) - Σ_z [log Σ_z' p(z') p(evidence | z') - log p(evidence | z)].
    For the topic, the sum runs over all paths of topics (the forward algorithm).

    Exact for a text with one derivation. One sentence in forty has two, nearly always because a
    name can be a frame's slot or a noun phrase ("Nadal chased the net in straight sets."). For such
    a text this is a little too much: by 0.05 nats per document, 0.0008 per word, on average over
    600 documents that a parser (tests/prose_reader.py) summed over all derivations.
    """
    topics = [topic.key for topic in book.topics]
    here = topics.index(document.latents["topic"])
    log_topic, given_topic = np.full(len(topics), -np.log(len(topics))), 0.0
    log_other = {
        "voice": np.full(len(VOICES), -np.log(len(VOICES))),
        "tense": np.full(2, -np.log(2)),
        "register": np.full(2, -np.log(2)),
    }
    given_other = 0.0
    own = {
        "voice": VOICES.index(document.latents["voice"]),
        "tense": TENSES.index(document.latents["tense"]),
        "register": REGISTERS.index(document.latents["register"]),
    }
    for latent, key, _ in document.events:
        if latent == "turn":
            here, log_topic = key, turned(log_topic, book.turn)
            continue
        table = book.log_likelihood[latent, key]
        if latent == "topic":
            log_topic = log_topic + table
            given_topic += table[here]
        else:
            log_other[latent] = log_other[latent] + table
            given_other += table[own[latent]]
    evidence = sum(np.logaddexp.reduce(log_p) for log_p in [log_topic, *log_other.values()])
    return document.nats - float(evidence - given_topic - given_other)


def topic_posterior(book: Book, document: Document) -> tuple[np.ndarray, np.ndarray]:
    """What a perfect reader knows of the topic after each word.

    Returns ends (n,) and p(topic | words up to there) (n, n_topics); row 0 is the prior, at 0.
    """
    log_p = np.full(len(book.topics), -np.log(len(book.topics)))
    ends, rows = [0], [log_p]
    for latent, key, end in document.events:
        if latent == "turn":
            log_p = turned(log_p, book.turn)
        elif latent == "topic":
            log_p = log_p + book.log_likelihood["topic", key]
        else:
            continue
        log_p = log_p - np.logaddexp.reduce(log_p)
        ends.append(end)
        rows.append(log_p)
    return np.array(ends), np.exp(np.array(rows))
