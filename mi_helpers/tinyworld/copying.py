"""Random words, made-up words, random characters: only what comes again can be known.

Each family's function writes one document with `draw` and labels the word that is determined as
`answer`. `held` names what may only come from the held-out part of the world. Nothing is hidden in
these families, so `draw.nats` is the exact -log p(text).
"""

import math
from functools import cache
from itertools import islice

from mi_helpers.tinyworld import facts, lexicon
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


# Strings ---------------------------------------------------------------------------------------

PAIRS = tuple(f"{n:02d}" for n in range(100))
ASCII = tuple(chr(code) for code in range(128) if chr(code) not in " 0123456789")
LATIN = tuple("áàâäãåæçéèêëíìîïñóòôöøõßúùûüýÿÅÆØÉÖÜÇ")
CYRILLIC = tuple(chr(code) for code in range(0x400, 0x440))  # bytes 0x80 to 0xBF after 0xD0
# One character for every other byte that a character of 2, 3 or 4 bytes can begin with.
LEADS_2 = tuple(
    "\u00a7\u0107\u0142\u0192\u01c0\u0201\u0250\u0292\u02d0\u0301\u037d\u03b1\u03d5\u0449"
    "\u04bb\u04d5\u0531\u0561\u0580\u05d0\u0628\u0641\u0685\u06cc\u0710\u0753\u0780\u07d0"
)
LEADS_3 = tuple(
    "\u0905\u10d0\u20ac\u3042\u4e2d\u5927\u6587\u7530\u8a9e\u9ad8\ua4d0\ub098\uc548\ud55c\ue000\ufb01"
)
LEADS_4 = ("\U0001f600", "\U00040000", "\U00080000", "\U000f0000", "\U00100000")
ALPHABET = (*PAIRS, *ASCII, *LATIN, *CYRILLIC, *LEADS_2, *LEADS_3, *LEADS_4)
SIZES = (1, 2, 3, 4)  # characters of a piece; a pair of digits counts as one
PIECES = (2, 3, 4, 5, 6)
NAMES = (4, 5, 6, 7, 8, 10, 12, 14, 16)
LIST_SHARE = 0.25


@cache
def starts() -> tuple:
    """Names that may begin a text, and so stand without a space: people, cities, countries."""
    return (*lexicon.people(), *facts.city_country(), *lexicon.countries())


def strings(draw: Draw, held: frozenset = NO_HOLD, length=None, times=None) -> Document:
    """What no other part of the world writes, twice or three times.

    Either pieces of different characters of `ALPHABET`, or a list of different `starts`, a name a
    line. A text has one derivation: the first piece begins with a space and its first character
    comes once in each repetition; no character is a digit, so that digits stand in pairs only.
    """
    page = Page()
    listed = draw.chance(LIST_SHARE)
    length = length or draw.pick(NAMES if listed else PIECES)
    times = times or draw.pick((2, 3))
    if listed:
        write_list(page, draw.sample(starts(), length), times)
    else:
        sizes = [draw.pick(SIZES) for _ in range(length)]
        characters = iter(draw.sample(ALPHABET, sum(sizes)))
        pieces = ["".join(islice(characters, size)) for size in sizes]
        write_again_and_again(page, pieces, times)
    return finish(page, draw, "strings", length=length, times=times)


def write_list(page: Page, names: list, times: int) -> None:
    """The names, `times` times, a line each; labels as in `write_again_and_again`."""
    for i, name in enumerate(names * times):
        if i < len(names):
            page.write(name)
        else:
            page.mark(name, "repeat", i % len(names), answer=i % len(names) > 0)
        page.write("\n")
