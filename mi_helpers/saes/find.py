"""`python -m mi_helpers find RUN "capsid"`: the latents of a finished run that fire at a text.

    for found in find("runs/demo", "capsid"):
        found.latent, found.at, found.contexts[0]       # 17, 20, "…the [[capsid]] of…"

It reads latents.jsonl, which `features` writes, and neither the model nor the coder: so it takes as
little for a run of Gemma 2 2B, whose weights may be elsewhere, as for one of tiny-gemma.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mi_helpers.arguments import whole
from mi_helpers.errors import checked, reading
from mi_helpers.files import RunError

LATENTS = "latents.jsonl"
AGAIN = "Run the features again: they write it anew."
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class Found:
    """A latent that has a text in its highest contexts.

    Args:
        latent: its number.
        at: contexts in which it fires at the text, or at a part of it.
        among: contexts that have the text anywhere.
        of: contexts that it has, at most 20; one per piece of text, the highest first.
        frequency: the share of all tokens at which it fires.
        contexts: those that have the text, firing tokens in [[brackets]]: where it fires at the
            text first.
        raises: tokens whose logits it raises most; () where it does not write to the stream.
    """

    latent: int
    at: int
    among: int
    of: int
    frequency: float
    contexts: list[str]
    raises: tuple[str, ...] = ()

    def __str__(self) -> str:
        raises = f"; raises {', '.join(map(repr, self.raises))}" if self.raises else ""
        return (
            f"latent {self.latent}: fires at it in {self.at} of its {self.of} contexts, has it in "
            f"{self.among}; fires at {self.frequency:.3%} of all tokens{raises}"
        )


def find(run: Path | str, text: str, n: int | None = None) -> list[Found]:
    """The latents of a finished run whose contexts have a token or a text, the best first.

    Best is who fires at it in most of its contexts, then who has it in most, then who fires least
    elsewhere. Capitals do not matter; spaces do: " cat" is no part of "concatenate".

    Args:
        run: the run's folder.
        text: what is looked for; where it is several tokens, a firing at any of them counts.
        n: how many latents, at most; None gives all.

    Raises:
        RunError: the text is empty, or the run's latents are missing or damaged.
    """
    if not isinstance(text, str) or not text.strip():
        raise RunError(f"The text is {text!r}: give a token or a text to look for.")
    n = n if n is None else whole("n", n, 1)
    with reading(Path(run) / LATENTS, RunError, AGAIN):
        found = [each for line in _lines(Path(run)) if (each := _found(line, text.casefold()))]
    return sorted(found, key=lambda f: (-f.at, -f.among, f.frequency, f.latent))[:n]


def _lines(run: Path) -> Iterator[dict]:
    """What latents.jsonl says of each latent."""
    path = run / LATENTS
    if not path.is_file():
        raise RunError(
            f"There is no {LATENTS} in {run}: give the folder of a run, and let `python -m "
            "mi_helpers features` finish there first."
        )
    kinds = {"latent": int, "frequency": float, "top": list, "raises": list}
    if not path.stat().st_size:
        raise RunError(f"{path} is empty. {AGAIN}")
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield checked(json.loads(line), path, RunError, **kinds)


def _found(said: dict, text: str) -> Found | None:
    """A latent's line with the contexts that have the text; None where none has it."""
    contexts = [str(context) for _, context in said["top"]]
    places = {context: _place(context, text) for context in contexts}
    with_it = [c for c in contexts if places[c] is not None]
    if not with_it:
        return None
    at = [c for c in with_it if places[c]]
    return Found(
        said["latent"],
        len(at),
        len(with_it),
        len(contexts),
        said["frequency"],
        sorted(with_it, key=lambda c: not places[c]),  # stable: the highest first in either
        tuple(str(token) for token, _ in said.get("raises", [])[:5]),
    )


def _place(context: str, text: str) -> bool | None:
    """Whether the firing token is in an occurrence of the text; None where there is none."""
    marked = MARKED.search(context)
    if not marked:
        return False if text in context.casefold() else None
    before, token, after = context[: marked.start()], marked[1], context[marked.end() :]
    plain = "".join((before, token, after)).casefold()
    begin, end = len(before.casefold()), len((before + token).casefold())
    starts = [m.start() for m in re.finditer(f"(?={re.escape(text)})", plain)]
    return any(s < end and s + len(text) > begin for s in starts) if starts else None


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")],
    n: int = 10,
    contexts: int = 5,
) -> int:
    """The latents of a finished run that fire at a text, best first, with their contexts.

    Args:
        run: the run's folder
        text: a token or a text to look for; capitals do not matter, spaces do
        n: latents that are shown, at most
        contexts: of each latent, at most
    """
    whole("contexts", contexts, 0)
    whole("n", n, 1)
    found = find(run, text)
    for each in found[:n]:
        print(each)
        for context in each.contexts[:contexts]:
            print("  " + "".join(c if c.isprintable() else " " for c in context))
    more = f", of which {n:,} are shown" if len(found) > n else ""
    print(f"{len(found):,} latents of {run} have {text!r} in their highest contexts{more}.")
    return 0
