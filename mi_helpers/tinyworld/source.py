"""Where TinyWorld's randomness comes from, and the page its text is written on.

Everything random in a document is one of three draws (`pick`, `weighted`, `chance`), and each adds
its own surprise, -log p in nats, to a running sum. When a document is finished, that sum is
-log p(document) for a generator that has nothing hidden: the entropy floor costs nothing extra.
"""

import math
import random
import re
from bisect import bisect
from dataclasses import dataclass, field

LOG = [0.0] + [math.log(n) for n in range(1, 20_000)]


class Weighted:
    """A finite distribution: items with weights, normalised. Drawn from by `Draw.weighted`."""

    def __init__(self, items: dict):
        total = sum(items.values())
        self.items = list(items)
        self.probs = [weight / total for weight in items.values()]
        self.nats = [-math.log(p) for p in self.probs]
        self.edges = [sum(self.probs[: i + 1]) for i in range(len(self.probs) - 1)]


class Draw:
    """A seeded source of choices that keeps count of how surprising they were.

    nats   sum of -log p over all visible choices so far
    hidden sum of -log p over the choices of latent variables (see `latent`)
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed).random
        self.nats = 0.0
        self.hidden = 0.0

    def index(self, n: int) -> int:
        """Uniform over 0 … n-1; adds log n."""
        self.nats += LOG[n]
        return int(self.random() * n)

    def pick(self, options):
        """Uniform over a sequence; adds log len(options)."""
        return options[self.index(len(options))]

    def weighted(self, options: Weighted):
        """One item of a `Weighted`; adds -log of its probability."""
        i = bisect(options.edges, self.random())
        self.nats += options.nats[i]
        return options.items[i]

    def chance(self, p: float) -> bool:
        """True with probability p; adds -log p or -log(1-p)."""
        yes = self.random() < p
        self.nats -= math.log(p if yes else 1 - p)
        return yes

    def latent(self, options):
        """A draw that the reader of the text does not see: counted in `hidden`, not in `nats`."""
        before = self.nats
        value = self.weighted(options) if isinstance(options, Weighted) else self.pick(options)
        self.hidden += self.nats - before
        self.nats = before
        return value

    def sample(self, options, k: int) -> list:
        """k different items in order; adds log n + log(n-1) + …"""
        chosen, seen = [], set()
        n = len(options)
        while len(chosen) < k:
            i = int(self.random() * n)
            if i not in seen:
                seen.add(i)
                self.nats += LOG[n - len(chosen)]
                chosen.append(options[i])
        return chosen


class Script(Draw):
    """A `Draw` that follows a list of choices instead of chance: used to enumerate a grammar.

    `every_outcome(write)` runs `write(draw)` once for every possible sequence of choices.
    """

    def __init__(self, path: list[int]):
        self.path, self.depth, self.width = path, 0, []
        self.nats = self.hidden = 0.0

    def _next(self, n: int) -> int:
        if self.depth == len(self.path):
            self.path.append(0)
        self.width.append(n)
        self.depth += 1
        return self.path[self.depth - 1]

    def index(self, n: int) -> int:
        self.nats += LOG[n]
        return self._next(n)

    def weighted(self, options: Weighted):
        i = self._next(len(options.items))
        self.nats += options.nats[i]
        return options.items[i]

    def chance(self, p: float) -> bool:
        yes = p == 1 or (p > 0 and self._next(2) == 0)  # what is certain is no choice
        self.nats -= math.log(p if yes else 1 - p)
        return yes

    def sample(self, options, k: int) -> list:
        left, chosen = list(options), []
        for _ in range(k):
            chosen.append(left.pop(self.index(len(left))))
        return chosen


def every_outcome(write):
    """Yield (draw, write(draw)) for every sequence of choices that `write` can make."""
    path: list[int] = []
    while True:
        draw = Script(path)
        yield draw, write(draw)
        while path and path[-1] + 1 == draw.width[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


@dataclass(slots=True)
class Span:
    """Characters start … end-1 of a document carry `value` of the variable `kind`."""

    start: int
    end: int
    kind: str
    value: object


@dataclass(slots=True)
class Document:
    """A text and everything that is true of it.

    text    what a model reads
    family  which part of the world wrote it (`prose`, `ioi`, `facts`, …)
    latents the hidden variables that hold for the whole document (tense, voice, …)
    spans   labels by character (`Span`): entity, number, answer, topic, …
    nats    -log p(text | latents); for a family with nothing hidden, -log p(text)
    hidden  -log p(latents)
    events  (latent, key, end): at character `end`, evidence `key` about `latent` has been read
    """

    text: str
    family: str
    latents: dict = field(default_factory=dict)
    spans: list = field(default_factory=list)
    nats: float = 0.0
    hidden: float = 0.0
    events: list = field(default_factory=list)

    def find(self, kind: str) -> list:
        """All spans of one kind, in order of the text."""
        return [span for span in self.spans if span.kind == kind]


SLOT = re.compile(r"\{(\w+?)(\d*)(!?)\}")


def compile_template(template: str) -> list:
    """'The {L} is in {C!}.' → ['The ', ('L', 0, False), ' is in ', ('C', 0, True), '.']

    A slot is a name, an optional number that tells two of a kind apart, and '!' on the answer.
    """
    parts, last = [], 0
    for match in SLOT.finditer(template):
        if match.start() > last:
            parts.append(template[last : match.start()])
        name, number, answer = match.groups()
        parts.append((name, int(number or 0), bool(answer)))
        last = match.end()
    if last < len(template):
        parts.append(template[last:])
    return parts


def compiled(*templates: str) -> tuple:
    return tuple(compile_template(t) for t in templates)


class Page:
    """Text under construction. `write` adds text; `mark` adds text with a label."""

    __slots__ = ("parts", "length", "spans", "capital")

    def __init__(self):
        self.parts, self.length, self.spans, self.capital = [], 0, [], False

    def write(self, text: str) -> None:
        if self.capital:
            text = text[0].upper() + text[1:]
            self.capital = False
        self.parts.append(text)
        self.length += len(text)

    def mark(self, text: str, kind: str, value, answer: bool = False) -> None:
        start = self.length
        self.write(text)
        self.spans.append(Span(start, self.length, kind, value))
        if answer:
            self.spans.append(Span(start, self.length, "answer", text))

    def fill(self, parts: list, values: dict) -> None:
        """Write a compiled template; `values[slot] = (text, kind, value)`, kind None: no label."""
        for part in parts:
            if isinstance(part, str):
                self.write(part)
                continue
            name, number, answer = part
            text, kind, value = values[name + str(number or "")]
            if kind is None and not answer:
                self.write(text)
            elif kind is None:
                self.mark(text, "answer", text)
            else:
                self.mark(text, kind, value, answer)

    def text(self) -> str:
        return "".join(self.parts)


def finish(page: Page, draw: Draw, family: str, **latents) -> Document:
    return Document(page.text(), family, latents, page.spans, draw.nats, draw.hidden)
