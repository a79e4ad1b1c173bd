"""`python -m mi_helpers tinyworld`: documents with their labels; the generator's speed."""

import argparse
import difflib
import itertools
import os
import sys
import time
from pathlib import Path

from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World, batches

DATA = Path(__file__).resolve().parents[2] / "data"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str):
        self.exit(2, f"{message[0].upper()}{message[1:]}{'' if message.endswith('?') else '.'}\n")


def unknown(family: str) -> str:
    """One sentence for a family that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(family, World.families, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(World.families)}"
    return f"there is no family '{family}': {advice}"


def describe(world: World, document: Document) -> str:
    """The labels of a document, one line each: its latents, its cost, its spans."""
    latents = [f"{key} {value}" for key, value in document.latents.items()]
    lines = [", ".join([document.family, *latents, f"{world.floor(document):.2f} nats"])]
    for span in sorted(document.spans, key=lambda span: (span.start, span.end)):
        piece = document.text[span.start : span.end]
        lines.append(f"  {span.start:4}–{span.end:<4} {span.kind:10} {span.value!s:12} {piece!r}")
    return "\n".join(lines)


def speed(world: World, tokenizer, name: str | None, seconds: float = 3.0) -> str:
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


def main(argv: list[str]) -> int:
    """Print documents, or with --speed how fast they are made; 2 for what cannot be done."""
    parser = Parser(prog="python -m mi_helpers tinyworld", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--family", help=f"one of {', '.join(World.families)}; default: the mixture")
    add("--seed", type=int, default=0, help="equal seeds give equal documents")
    add("-n", type=int, default=5, help="how many documents")
    add("--labels", action="store_true", help="what is true of each document, by character")
    add("--speed", action="store_true", help="measure instead: tokens per second on one thread")
    add("--tokenizer", type=Path, default=DATA / "tiny_gemma", help="folder, for --speed")
    options = parser.parse_args(argv)
    if options.family not in (None, *World.families):
        parser.error(unknown(options.family))
    if options.n < 1:
        parser.error(f"-n is {options.n}; it has to be 1 or more")
    world = World()
    if options.speed:
        if not (options.tokenizer / "tokenizer.json").is_file():
            parser.error(f"there is no tokenizer in {options.tokenizer}: `make model` trains one")
        os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        from mi_helpers.tinyworld.tokenizer import load_tokenizer  # after the line above

        print(speed(world, load_tokenizer(options.tokenizer), options.family))
        return 0
    for document in itertools.islice(world.documents(options.seed, options.family), options.n):
        print(document.text.strip("\n"))
        print(describe(world, document) + "\n" if options.labels else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
