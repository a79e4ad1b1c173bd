"""Random words, made-up words: what comes again is the only thing that can be known.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

import math
from functools import cache

from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD
from mi_helpers.tinyworld.source import Document, Draw, Page, finish


@cache
def vocabulary() -> tuple:
    """Every word that any part of the world can write, in a fixed order."""
    found = set()
    for topic in lexicon.topics():
        for kind in ("noun", "verb", "adj", "phrase", "name"):
            for forms in getattr(topic, kind):
                for form in forms:
                    found.update(form.split())
    for country in lexicon.countries().values():
        found.update(vars(country).values())
    for place in lexicon.landmarks():
        found.update([*place.name.split(), place.city])
    found.update(lexicon.people(), lexicon.occupations(), *lexicon.evaluation().values())
    for kind in ("object", "place", "food", "colour"):
        found.update(lexicon.words(kind))
    for forms in lexicon.words("group_noun"):
        found.update(forms)
    for kind, entries in lexicon.norwegian().items():
        for forms in entries:
            for form in forms if kind != "noun" else forms[:2]:
                found.update(form.split())
    return tuple(sorted(word for word in found if word.isalpha()))


LONGEST = 112  # words of a repeated sequence, all repetitions together
LENGTHS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56)
MOST_TIMES = 16


def write_again_and_again(page: Page, words: list, times: int) -> None:
    """The words, `times` times; from the second time on, all but the first word are answers."""
    for again in range(times):
        for i, word in enumerate(words):
            page.write(" ")
            if again:
                # before the first word of a repetition, nothing tells that it begins
                page.mark(word, "repeat", i, answer=i > 0)
            else:
                page.write(word)


def repetition(draw: Draw, held: frozenset = NO_HOLD, length=None, times=None) -> Document:
    """Different random words of the whole vocabulary, and the same words again and again."""
    length = length or draw.pick(LENGTHS)
    words = draw.sample(vocabulary(), length)
    times = times or draw.pick(range(2, min(MOST_TIMES, LONGEST // length) + 1))
    page = Page()
    write_again_and_again(page, words, times)
    return finish(page, draw, "repetition", length=length, times=times)


def made_up(draw: Draw, held: frozenset = NO_HOLD) -> Document:
    """The same with words that do not exist, of two or three syllables."""
    sounds = lexicon.words("sound")
    count, times = draw.pick(range(2, 9)), draw.pick((2, 3, 4))
    words, taken = [], 0.0
    while len(words) < count:
        before = draw.nats
        word = "".join(draw.pick(sounds) for _ in range(draw.pick((2, 3))))
        surprise = draw.nats - before
        if word in words:  # draw again: the others share what it would have had
            draw.nats = before
            continue
        draw.nats += math.log1p(-taken)
        taken += math.exp(-surprise)
        words.append(word)
    page = Page()
    write_again_and_again(page, words, times)
    return finish(page, draw, "made_up", length=count, times=times)
