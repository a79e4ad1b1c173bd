"""`python -m mi_helpers tinyworld`: documents with their labels; the generator's speed."""

import difflib
import itertools
import os
import sys
import time
from pathlib import Path

from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World, batches

DATA = Path(__file__).resolve().parents[2] / "data"


def unknown(family: str) -> str:
    """One sentence for a family that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(family, World.families, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(World.families)}."
    return f"There is no family '{family}': {advice}"


def describe(world: World, document: Document) -> str:
    """The labels of a document, one line each: its latents, its cost, its spans."""
    latents = [f"{key} {value}" for key, value in document.latents.items()]
    lines = [", ".join([document.family, *latents, f"{world.floor(document):.2f} nats"])]
    for span in sorted(document.spans, key=lambda span: (span.start, span.end)):
        piece = document.text[span.start : span.end]
        lines.append(f"  {span.start:4}–{span.end:<4} {span.kind:10} {span.value!s:12} {piece!r}")
    return "\n".join(lines)


def rates(world: World, tokenizer, name: str | None, seconds: float = 3.0) -> str:
    """Characters and tokens per second of one core: the time of all threads counts."""
    stream, letters, start = world.documents(1, name), 0, time.process_time()
    while (written := time.process_time() - start) < seconds:
        letters += sum(len(next(stream).text) for _ in range(100))
    only = World({name: 1}) if name else world
    rows, tokens, start = batches(only, tokenizer, seed=1), 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        tokens += next(rows).size
    return (
        f"generated: {letters / written:,.0f} characters per second of one core\n"
        f"generated and tokenized: {tokens / spent:,.0f} tokens per second of one core"
    )


def main(
    family: str = "",
    seed: int = 0,
    n: int = 5,
    labels: bool = False,
    speed: bool = False,
    tokenizer: Path = DATA / "tiny_gemma",
) -> int:
    """Print documents, or with --speed how fast they are made; 2 for what cannot be done.

    Args:
        family: of the documents; default: the mixture
        seed: equal seeds give equal documents
        n: how many documents
        labels: print what is true of each document, by character
        speed: measure instead: characters and tokens per second of one core
        tokenizer: a folder, for --speed
    """
    refused = ""
    if family and family not in World.families:
        refused = unknown(family)
    elif n < 1:
        refused = f"n is {n}; it has to be 1 or more."
    elif speed and not (tokenizer / "tokenizer.json").is_file():
        refused = f"There is no tokenizer in {tokenizer}: `make model` trains one."
    if refused:
        print(refused, file=sys.stderr)
        return 2
    world = World()
    if speed:
        os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        from mi_helpers.tinyworld.tokenizer import load_tokenizer  # after the line above

        print(rates(world, load_tokenizer(tokenizer), family or None))
        return 0
    for document in itertools.islice(world.documents(seed, family or None), n):
        print(document.text.strip("\n"))
        print(describe(world, document) + "\n" if labels else "")
    return 0
