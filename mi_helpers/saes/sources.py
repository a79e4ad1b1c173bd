"""Where text comes from: TinyWorld with its labels, files, or a Hugging Face dataset as a stream.

    open_source("tinyworld")                        the mixture; "tinyworld:prose,norwegian" a part
    open_source("book.txt")                         .txt, .jsonl, .parquet, a folder, or a pattern
    open_source("hf:HuggingFaceFW/fineweb:sample-10BT:train")       hf:NAME[:CONFIGURATION[:SPLIT]]

A source gives the same texts in the same order each time, and can start at any of them, so that a
killed run continues where it was.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mi_helpers.files import sha256
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

SUFFIXES = (".txt", ".jsonl", ".parquet")
EXTRA = "pip install -c requirements-extras.txt -e '.[gemma]'"


class SourceError(ValueError):
    """What is wrong with a text source, and what to do about it."""


@dataclass(frozen=True)
class TinyWorldText:
    """Documents of TinyWorld: number i is a function of the seed and of i alone."""

    families: tuple[str, ...] = ()
    seed: int = 0
    world: World = field(default_factory=World, compare=False, repr=False)

    @property
    def name(self) -> str:
        return "tinyworld" + (":" + ",".join(self.families) if self.families else "")

    def document(self, index: int) -> Document:
        """Document `index` with its labels."""
        return self.world.document((self.seed << 40) + index)

    def texts(self, start: int = 0) -> Iterator[str]:
        return (self.document(i).text for i in itertools.count(start))

    def identity(self) -> dict:
        """What has to stay the same for a run to continue."""
        first = "".join(itertools.islice(self.texts(), 50)).encode()
        return {"name": self.name, "seed": self.seed, "sha256": hashlib.sha256(first).hexdigest()}


@dataclass(frozen=True)
class FileText:
    """Texts of local files in the order of their names; empty texts are left out.

    A text is a paragraph of a .txt file (a blank line ends it), a line of a .jsonl file, or a row
    of a .parquet file.

    Args:
        column: the field of a line or row that holds the text.
    """

    name: str
    files: tuple[Path, ...]
    column: str = "text"

    def texts(self, start: int = 0) -> Iterator[str]:
        readers = {".txt": paragraphs, ".jsonl": json_lines, ".parquet": parquet_rows}
        every = (t for path in self.files for t in readers[path.suffix](path, self.column))
        return itertools.islice((text for text in every if text.strip()), start, None)

    def identity(self) -> dict:
        return {"name": self.name, "sha256": {path.name: sha256(path) for path in self.files}}


def paragraphs(path: Path, column: str = "") -> Iterator[str]:
    """The paragraphs of a text file, read line by line."""
    lines: list[str] = []
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).strip()
                    lines = []
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    if lines:
        yield "".join(lines).strip()


def json_lines(path: Path, column: str) -> Iterator[str]:
    """The field `column` of each line of a .jsonl file."""
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise SourceError(f"Line {number} of {path} is not JSON.") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise SourceError(
                    f"Line {number} of {path} has no text in {column!r}, only {has}: name the "
                    "field with --column."
                )
            yield row[column]


def parquet_rows(path: Path, column: str) -> Iterator[str]:
    """The column `column` of a .parquet file, a few thousand rows at a time."""
    parquet = optional("pyarrow.parquet", "Reading .parquet files")
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not a .parquet file: {first_line(error)}") from None
    if column not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise SourceError(f"{path} has no column {column!r}, only {names}: name one with --column.")
    for batch in table.iter_batches(batch_size=2_048, columns=[column]):
        for text in batch.column(0).to_pylist():
            if text is not None and not isinstance(text, str):
                raise SourceError(f"The column {column!r} of {path} holds no text.")
            yield text or ""


@dataclass(frozen=True)
class HubText:
    """A dataset of the Hugging Face hub, streamed: only what is read is downloaded.

    Args:
        column: the field of a row that holds the text.
    """

    dataset: str
    configuration: str | None = None
    split: str = "train"
    column: str = "text"

    @property
    def name(self) -> str:
        return "hf:" + ":".join([self.dataset, self.configuration or "", self.split])

    def texts(self, start: int = 0) -> Iterator[str]:
        datasets = optional("datasets", "Streaming a Hugging Face dataset")
        try:
            rows = datasets.load_dataset(
                self.dataset, self.configuration, split=self.split, streaming=True
            )
            rows = iter(rows.skip(start))
            first = next(rows, None)
        except Exception as error:  # the library raises its own, the hub's and the network's
            raise SourceError(f"{self.name} cannot be read: {first_line(error)}") from None
        if first is not None and not isinstance(first.get(self.column), str):
            names = ", ".join(first)
            raise SourceError(
                f"{self.name} has no text column {self.column!r}, only {names}: name one with "
                "--column."
            )
        for row in itertools.chain([] if first is None else [first], rows):
            yield row[self.column] or ""

    def identity(self) -> dict:
        return {"name": self.name, "column": self.column}


Source = TinyWorldText | FileText | HubText


def open_source(spec: str, seed: int = 0, column: str = "text") -> Source:
    """The source that `spec` names, as at the head of this module.

    Args:
        seed: of TinyWorld's documents.
        column: the field that holds the text, in a .jsonl, .parquet or dataset.

    Raises:
        SourceError: there is no such family, file or kind of file, or an extra is not installed.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tinyworld":
        return tinyworld(rest, seed)
    if kind == "hf":
        optional("datasets", "Streaming a Hugging Face dataset")
        parts = rest.split(":")
        if not parts[0] or len(parts) > 3:
            raise SourceError(f"{spec!r} is not hf:NAME[:CONFIGURATION[:SPLIT]].")
        split = parts[2] if len(parts) == 3 and parts[2] else "train"
        return HubText(parts[0], (parts[1:2] or [None])[0] or None, split, column)
    return local_files(spec, column)


def tinyworld(families: str, seed: int) -> TinyWorldText:
    """TinyWorld's mixture, or the named families in the proportions that they have in it."""
    names = tuple(name.strip() for name in families.split(",") if name.strip())
    for name in names:
        if name not in World.families:
            near = difflib.get_close_matches(name, World.families, n=1, cutoff=0.4)
            advice = (
                f"did you mean '{near[0]}'?" if near else f"it has {', '.join(World.families)}."
            )
            raise SourceError(f"TinyWorld has no family '{name}': {advice}")
    weights = {name: World.weights[name] for name in names} if names else None
    return TinyWorldText(names, seed, World(weights))


def local_files(spec: str, column: str) -> FileText:
    """A file, every text file below a folder, or the files that a pattern matches."""
    path = Path(spec).expanduser()
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(each) for each in glob.glob(str(path), recursive=True)]
    if not found:
        raise SourceError(
            f"There is no text at {spec!r}: give 'tinyworld', a {', '.join(SUFFIXES)} file, a "
            "folder of such files, or hf:NAME."
        )
    wrong = [each for each in found if each.suffix not in SUFFIXES]
    if wrong:
        raise SourceError(f"{wrong[0]} is none of {', '.join(SUFFIXES)}.")
    if any(each.suffix == ".parquet" for each in found):
        optional("pyarrow.parquet", "Reading .parquet files")
    return FileText(spec, tuple(sorted(found)), column)


def optional(module: str, what: str):
    """A module of the extra [gemma], or one sentence that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise SourceError(f"{what} needs the package {package}: {EXTRA} installs it.") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."
