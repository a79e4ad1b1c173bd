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
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mi_helpers.errors import Refused
from mi_helpers.files import sha256
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.world import World

SUFFIXES = (".txt", ".jsonl", ".parquet")
LONGEST = 2**16  # characters of a paragraph; what is longer becomes several texts
ROWS = 64  # of a .parquet file, in memory
LINE = 2**28  # characters of a line of JSON
AGAIN = "run the same command again: it goes on from there"
EXTRA = "pip install -c requirements-extras.txt -e '.[gemma]'"


class SourceError(Refused):
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

    A text is a paragraph of a .txt file (a blank line ends it, and so do `LONGEST` characters), a
    line of a .jsonl file, or a row of a .parquet file. No file is in memory as a whole.

    Args:
        column: the field of a line or row that holds the text.
    """

    name: str
    files: tuple[Path, ...]
    column: str = "text"

    def texts(self, start: int = 0) -> Iterator[str]:
        return itertools.islice((text for text in self.all() if text.strip()), start, None)

    def all(self) -> Iterator[str]:
        """Every text, the empty ones too."""
        readers = {".txt": paragraphs, ".jsonl": json_lines, ".parquet": parquet_rows}
        for path in self.files:
            try:
                yield from readers[path.suffix](path, self.column)
            except UnicodeDecodeError:
                raise SourceError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
            except OSError as error:
                raise SourceError(f"{path} cannot be read: {first_line(error)}") from None

    def identity(self) -> dict:
        """What has to stay the same for a run to continue: the files' content and their order, and
        the field that is read; not where their folder lies."""
        top = Path(self.name).expanduser().absolute()
        top = top if top.is_dir() else os.path.commonpath([p.absolute().parent for p in self.files])
        names = [Path(os.path.relpath(path.absolute(), top)).as_posix() for path in self.files]
        try:
            found = {n: sha256(path) for n, path in zip(names, self.files, strict=True)}
        except OSError as error:
            raise SourceError(f"{self.name} cannot be read: {first_line(error)}") from None
        field = {"column": self.column} if any(p.suffix != ".txt" for p in self.files) else {}
        return {"name": self.name, "files": found} | field


def paragraphs(path: Path, column: str = "") -> Iterator[str]:
    """The paragraphs of a text file, `LONGEST` characters of it in memory; a longer paragraph comes
    in parts, cut before a space."""
    held, begins = "", True  # whether a line begins here
    with open(path, encoding="utf-8") as stream:
        while piece := stream.readline(LONGEST):
            ends = piece.endswith("\n")
            if not piece.strip() and begins and ends:
                yield held.strip()
                held = ""
            held += piece
            while len(held) > LONGEST:
                at = max(held.rfind(" ", 1, LONGEST), held.rfind("\n", 1, LONGEST))
                at = LONGEST if at < 0 else at
                yield held[:at].strip("\n")
                held = held[at:]
            begins = ends
    yield held.strip()


def json_lines(path: Path, column: str) -> Iterator[str]:
    """The field `column` of each line of a .jsonl file."""
    with open(path, encoding="utf-8") as stream:
        for number in itertools.count(1):
            if not (line := stream.readline(LINE)):
                return
            if len(line) == LINE:
                raise SourceError(
                    f"Line {number} of {path} is longer than {LINE:,} characters: put each text on "
                    "a line of its own."
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise SourceError(f"Line {number} of {path} is not JSON.") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise SourceError(
                    f"Line {number} of {path} has no text in {column!r}, only {has}: name the "
                    "field with --column."
                )
            try:
                row[column].encode()
            except UnicodeEncodeError:
                raise SourceError(f"Line {number} of {path} has half of a character.") from None
            yield row[column]


def parquet_rows(path: Path, column: str) -> Iterator[str]:
    """The column `column` of a .parquet file, a few rows at a time."""
    parquet = optional("pyarrow.parquet", "Reading .parquet files")
    try:
        table = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not a .parquet file: {first_line(error)}") from None
    if column not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise SourceError(f"{path} has no column {column!r}, only {names}: name one with --column.")
    for batch in table.iter_batches(batch_size=ROWS, columns=[column], use_threads=False):
        for value in batch.column(0):
            text = value.as_py()
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
        number = start
        try:
            rows = datasets.load_dataset(
                self.dataset, self.configuration, split=self.split, streaming=True
            )
            for number, row in enumerate(rows.skip(start), start):
                yield self.text(number, row)
        except SourceError:
            raise
        except Exception as error:  # the library raises its own, the hub's and the network's
            where = (
                f"after {number:,} texts: {first_line(error)} When it can be read again, {AGAIN}."
            )
            where = where if number else f"be read: {first_line(error)}"
            raise SourceError(f"{self.name} cannot {'go on ' if number else ''}{where}") from None

    def text(self, number: int, row: dict) -> str:
        """The text of a row; SourceError where it has none."""
        value = row.get(self.column)
        if value is None and self.column in row:
            return ""
        if not isinstance(value, str):
            raise SourceError(
                f"Row {number:,} of {self.name} has no text column {self.column!r}, only "
                f"{', '.join(row)}: name one with --column."
            )
        return value

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
