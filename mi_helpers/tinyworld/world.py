"""The mixture of families, and the streams of documents and of token rows drawn from it."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from mi_helpers.tinyworld import copying, counting, dialects, facts, grammar, names, statements
from mi_helpers.tinyworld.held import HELD, NO_HOLD
from mi_helpers.tinyworld.prose import Prose, marginal_nats, standard_book, topic_posterior
from mi_helpers.tinyworld.source import Document, Draw, Weighted


class World:
    """TinyWorld: a seeded generator of labelled documents.

    document(seed, family=None, held=())   one document
    documents(seed, family=None)           an endless stream
    floor(document)                        -log p(text) in nats, latent variables summed out

    `held` may name 'templates', 'entities' and 'relations': what is then drawn from the held-out
    part of the world, which the training stream never touches.
    """

    families = {
        "prose": None,  # written by Prose, with this world's book
        "norwegian": dialects.norwegian,
        "python": dialects.python_code,
        "facts": facts.facts,
        "two_hop": facts.two_hop,
        "truth": statements.judged,
        "ioi": names.ioi,
        "repetition": copying.repetition,
        "made_up": copying.made_up,
        "strings": copying.strings,
        "pronoun": grammar.pronoun,
        "agreement": grammar.agreement,
        "years": counting.years,
        "calendar": counting.calendar,
        "arithmetic": counting.arithmetic,
        "brackets": counting.brackets,
    }
    # Documents, relative. Prose is about a third of all tokens, random repetition a sixth,
    # verdicts an eighth, indirect objects a tenth.
    weights = {
        "prose": 220,
        "norwegian": 25,
        "python": 25,
        "facts": 120,
        "two_hop": 110,
        "truth": 220,
        "ioi": 190,
        "repetition": 95,
        "made_up": 30,
        "strings": 34,
        "pronoun": 110,
        "agreement": 55,
        "years": 60,
        "calendar": 50,
        "arithmetic": 55,
        "brackets": 20,
    }

    def __init__(self, weights: dict | None = None):
        self.mixture = Weighted(weights or self.weights)
        self.book = standard_book()

    @property
    def topics(self) -> list[str]:
        """Names of the English topics, in the order of `posterior`'s columns."""
        return [topic.key for topic in self.book.topics]

    def write(self, draw: Draw, family: str | None = None, held=NO_HOLD, **choices) -> Document:
        """One document with a given source of choices; `choices` go to the family's function."""
        if family is None:
            before = draw.nats
            family = draw.weighted(self.mixture)
            draw.nats = before  # a document's nats are those of its text, given the family
        held = frozenset({held} if isinstance(held, str) else held)
        if family not in self.families:
            known = ", ".join(self.families)
            raise ValueError(f"TinyWorld has no family {family!r}; it has {known}.")
        if held - HELD:
            wrong = ", ".join(repr(value) for value in sorted(held - HELD, key=str))
            raise ValueError(f"held takes 'templates', 'entities' and 'relations', not {wrong}.")
        if family == "prose":
            if choices:
                raise ValueError(f"prose takes no choices, so not {', '.join(choices)}.")
            report = partial(statements.reported, held=held)
            return Prose(self.book, draw, held, facts.fact_sentence, report).document()
        return self.families[family](draw, held, **choices)

    def document(self, seed: int, family: str | None = None, held=NO_HOLD, **choices) -> Document:
        return self.write(Draw(seed), family, held, **choices)

    def documents(self, seed: int = 0, family: str | None = None, held=NO_HOLD, **choices):
        """An endless stream of documents; equal seeds give equal streams."""
        draw = Draw(seed)
        while True:
            draw.nats = draw.hidden = 0.0
            yield self.write(draw, family, held, **choices)

    def floor(self, document: Document) -> float:
        """-log p(text), in nats: what the best possible reader pays for the whole text.

        That the text ends where it does is part of it; the choice of family is not, which costs
        -log of the family's share, `mixture.nats`, on top. Exact up to the few texts of prose
        that two derivations share (see `marginal_nats`).
        """
        if document.family == "prose":
            return marginal_nats(self.book, document)
        return document.nats

    def posterior(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """p(topic | text so far) of a prose document: ends (n,), probabilities (n, n_topics)."""
        return topic_posterior(self.book, document)


def batches(
    world: World, tokenizer, seed: int, length: int = 128, rows: int = 32
) -> Iterator[np.ndarray]:
    """Endless batches of token ids (rows, length), uint16, for training.

    A row is `<bos>` text `<eos>` `<bos>` text `<eos>` …, documents in the order of the stream; the
    last is cut where the row ends. So what stands at a row's start, or after any document, has the
    mixture's own probabilities: choosing documents that fit would keep short ones from the start.
    """
    documents = token_stream(world, tokenizer, seed)
    while True:
        batch = np.empty((rows, length), dtype=np.uint16)
        for i in range(rows):
            row: list[int] = []
            while len(row) < length:
                row += next(documents)
            batch[i] = row[:length]
        yield batch


def token_stream(world: World, tokenizer, seed: int) -> Iterator[list[int]]:
    """Endless documents as `<bos>` ids `<eos>`; encoded many at a time, which is faster."""
    stream = world.documents(seed)
    backend = tokenizer.backend_tokenizer
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    while True:
        backend.no_padding()  # what another call may have left on
        backend.no_truncation()
        texts = [next(stream).text for _ in range(128)]
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            yield bos + encoding.ids + eos
