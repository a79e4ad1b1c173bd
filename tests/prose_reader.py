"""A second reader of TinyWorld's prose, written from the text's side: a parser.

It finds every derivation of each sentence and sums over all of them and over all latent variables,
so its -log p(text) is exact for documents without fact sentences. It shares the lexicon and the
frames with the generator, but none of its bookkeeping (`nats`, `events`, `log_likelihood`).
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import product

from mi_helpers.tinyworld import prose

WORD = re.compile(r"[^\s.,?\"]+")
PERSON = -1  # as a number: the document's person, who is always one


@dataclass(frozen=True)
class State:
    """How far one derivation has come in a sentence."""

    at: int = 0  # characters read
    p: float = 1.0  # of all choices that no latent variable makes
    heads: tuple = ()  # (noun phrase, number) pairs, in order
    head: int = 0
    person: str | None = None
    city: str | None = None
    tense: str | None = None
    register: str | None = None
    voices: tuple = ()  # whose words were read
    words: tuple = ()  # (class, entry) of each topical word


class Reader:
    """Every derivation of a sentence of a book, and with them the exact -log p of a document."""

    def __init__(self, book):
        self.book = book
        self.entry = {kind: defaultdict(set) for kind in prose.CLASSES}  # form → {(entry, form)}
        for topic in book.topics:
            for kind in prose.CLASSES:
                for entry in getattr(topic, kind):
                    for i, form in enumerate(entry):
                        self.entry[kind][form].add((entry, i))
        self.voice_of = {
            (kind, word): voice
            for (voice, kind), words in book.voice_words.items()
            for word in words
        }
        self.phrases = sorted(self.entry["phrase"], key=len, reverse=True)

    # Reading the text. Each method yields the states that follow from one state.

    def literal(self, state, text, word):
        start = word[:1].upper() + word[1:] if state.at == 0 else word
        if text.startswith(start, state.at):
            yield replace(state, at=state.at + len(start))

    def word(self, state, text):
        """The next word in lower case where a sentence's capital hides it: both spellings."""
        match = WORD.match(text, state.at)
        if match:
            after = replace(state, at=match.end())
            word = match.group()
            yield word, after
            if state.at == 0 and word[0].lower() != word[0]:
                yield word[0].lower() + word[1:], after

    def one_of(self, state, text, options):
        """`options`: word → probability."""
        for word, after in self.word(state, text):
            if word in options:
                yield replace(after, p=after.p * options[word])

    def parts(self, parts, state, text):
        states = [state]
        for part in parts:
            if isinstance(part, str):
                states = [new for old in states for new in self.literal(old, text, part)]
            else:
                slot = getattr(self, part[0])
                states = [new for old in states for new in slot(old, text, part[1])]
        return states

    def topical(self, state, text, kind, forms=(0,)):
        for word, after in self.word(state, text):
            for entry, form in self.entry[kind].get(word, ()):
                if form in forms:
                    yield form, replace(after, words=(*after.words, (kind, entry)))

    # Slots, as in prose.FRAMES.

    def number(self, state, i):
        for known, value in state.heads:
            if known == i:
                return value
        return None

    def NP(self, state, text, i):
        known = self.number(state, i)
        weights = self.book.noun_phrases
        total = sum(w for form, w in weights.items() if form != "{NAME}" or known is None)
        for form, weight in weights.items():
            if form == "{NAME}" and known is not None:
                continue
            for number in prose.NUMBERS if known is None else (known,):
                if form == "{NAME}" and number == "plural":
                    continue
                p = weight / total * (1 if known is not None or form == "{NAME}" else 0.5)
                heads = state.heads if known is not None else (*state.heads, (i, number))
                begun = replace(state, p=state.p * p, heads=heads, head=i)
                yield from self.parts(self.book.form_parts[form], begun, text)

    def determiner(self, state, text, number):
        shares = {
            "singular": {"the": 1 / 2, "this": 1 / 6, "each": 1 / 6, "one": 1 / 6},
            "plural": {"the": 1 / 2, "these": 1 / 6, "some": 1 / 6, "many": 1 / 6},
        }
        yield from self.one_of(state, text, shares[number])

    def D(self, state, text, _):
        yield from self.determiner(state, text, self.number(state, state.head))

    def noun(self, state, text, number):
        form = prose.NUMBERS.index(number)
        yield from (after for _, after in self.topical(state, text, "noun", (form,)))

    def N(self, state, text, _):
        yield from self.noun(state, text, self.number(state, state.head))

    def M(self, state, text, _):
        for number in prose.NUMBERS:
            begun = replace(state, p=state.p / 2)
            for after in self.determiner(begun, text, number):
                for spaced in self.literal(after, text, " "):
                    yield from self.noun(spaced, text, number)

    def in_tense(self, state, tense):
        if state.tense in (None, tense):
            yield replace(state, tense=tense)

    def finite(self, state, text, number):
        present = 1 if number == "singular" else 0
        for form, after in self.topical(state, text, "verb", (present, 2)):
            yield from self.in_tense(after, "past" if form == 2 else "present")

    def V(self, state, text, i):
        yield from self.finite(state, text, self.number(state, i))

    def VH(self, state, text, _):
        yield from self.finite(state, text, self.number(state, state.head))

    def VS(self, state, text, _):
        yield from self.finite(state, text, "singular")

    def VP(self, state, text, _):
        yield from self.finite(state, text, "plural")

    def ED(self, state, text, _):
        yield from (after for _, after in self.topical(state, text, "verb", (2,)))

    def BASE(self, state, text, _):
        yield from (after for _, after in self.topical(state, text, "verb", (0,)))

    def auxiliary(self, state, text, table, i):
        known = self.number(state, i)
        for number, tense in product(
            prose.NUMBERS if known is None else (known,), ("present", "past")
        ):
            form = table[tense][number == "plural"]
            begun = state
            if known is None:
                begun = replace(state, p=state.p / 2, heads=(*state.heads, (i, number)))
            for after in self.one_of(begun, text, {form: 1.0}):
                yield from self.in_tense(after, tense)

    def BE(self, state, text, i):
        yield from self.auxiliary(state, text, prose.BE, i)

    def DO(self, state, text, i):
        yield from self.auxiliary(state, text, prose.DO, i)

    def BES(self, state, text, _):
        begun = replace(state, heads=(*state.heads, (PERSON, "singular")))
        yield from self.auxiliary(begun, text, prose.BE, PERSON)

    def table(self, state, text, table):
        for tense, words in table.items():
            for after in self.one_of(state, text, dict.fromkeys(words, 1 / len(words))):
                yield from self.in_tense(after, tense)

    def SAY(self, state, text, _):
        yield from self.table(state, text, prose.SAY)

    def ASK(self, state, text, _):
        yield from self.table(state, text, prose.ASK)

    def GO(self, state, text, _):
        yield from self.table(state, text, prose.GO)

    def ADJ(self, state, text, _):
        yield from (after for _, after in self.topical(state, text, "adj"))

    def NAME(self, state, text, _):
        yield from (after for _, after in self.topical(state, text, "name"))

    def PH(self, state, text, _):
        for phrase in self.phrases:
            for after in self.literal(state, text, phrase):
                for entry, _ in self.entry["phrase"][phrase]:
                    yield replace(after, words=(*after.words, ("phrase", entry)))

    def voiced(self, state, text, kind):
        for word, after in self.word(state, text):
            voice = self.voice_of.get((kind, word))
            if voice:
                p = after.p / len(self.book.voice_words[voice, kind])
                yield replace(after, p=p, voices=(*after.voices, voice))

    def EV(self, state, text, _):
        yield from self.voiced(state, text, "adj")

    def EVADV(self, state, text, _):
        yield from self.voiced(state, text, "adv")

    def EVN(self, state, text, _):
        yield from self.voiced(state, text, "noun")

    def P(self, state, text, _):
        if state.person is None:
            for word, after in self.word(state, text):
                if word in self.book.people:
                    yield replace(after, p=after.p / len(self.book.people), person=word)
        else:
            pronoun = prose.PRONOUN[self.book.people[state.person]]
            yield from self.one_of(state, text, {pronoun: 0.6, state.person: 0.4})

    def CITY(self, state, text, _):
        for city in self.book.cities if state.city is None else (state.city,):
            p = state.p if state.city else state.p / len(self.book.cities)
            yield from self.literal(replace(state, p=p, city=city), text, city)

    # Sentences and documents.

    def derivations(self, sentence, frames, person=None, city=None):
        """Every way in which `sentence` comes out of one of `frames`."""
        start = State(person=person, city=city, p=1 - self.book.connective)
        begun = [start]
        for register, words in prose.CONNECTIVES.items():
            p = self.book.connective / len(words)
            for word in words:
                opened = replace(start, p=p, register=register)
                begun += self.literal(opened, sentence, word + " ")
        found = []
        for state in begun:
            for frame in frames:
                found += self.parts(frame, replace(state, p=state.p / len(frames)), sentence)
        return [state for state in found if state.at == len(sentence)]

    def likelihood(self, state, topic):
        """p(topical words of a derivation | topic)."""
        p = 1.0
        for kind, entry in state.words:
            entries = getattr(topic, kind)
            p *= entries.count(entry) / len(entries)
        return p

    def read(self, document, frames):
        """-log p(text) in nats and the derivations of each sentence.

        Sentences are cut where the document says that they are.
        """
        sentences, person, city = [], None, None
        for span in document.find("topic"):
            text = document.text[span.start : span.end]
            found = self.derivations(text, frames, person, city)
            ((person, city),) = {(state.person, state.city) for state in found}
            sentences.append(found)
        total = 0.0
        for voice, tense, register in product(prose.VOICES, prose.TENSES, prose.CONNECTIVES):
            total += self.forward(sentences, voice, tense, register) / 12
        return -math.log(total / len(self.book.sentences)), sentences

    def forward(self, sentences, voice, tense, register):
        """p(sentences | voice, tense, register), summed over all paths of topics."""
        topics, turn = self.book.topics, self.book.turn
        other = (1 - prose.OWN_VOICE) / (len(prose.VOICES) - 1)
        p = [1 / len(topics)] * len(topics)
        for n, found in enumerate(sentences):
            if n:
                total = sum(p)
                p = [q * (1 - turn) + (total - q) * turn / (len(topics) - 1) for q in p]
            seen = [0.0] * len(topics)
            for state in found:
                if state.tense in (None, tense) and state.register in (None, register):
                    free = state.p
                    for spoken in state.voices:
                        free *= prose.OWN_VOICE if spoken == voice else other
                    for i, topic in enumerate(topics):
                        seen[i] += free * self.likelihood(state, topic)
            p = [q * s for q, s in zip(p, seen, strict=True)]
        return sum(p)
