"""Activations on disk: shards, their manifest, and reading them in order or shuffled.

    held = Activations.open("runs/demo/harvest")      # what `harvest.harvest` leaves
    held.shard(0).source                              # (rows, d_in), bfloat16
    x, target = Shuffled(held, held.rows, seed=0).rows(0, 4096)       # (4096, d_in), float32

A row is one token at one place of one text; `Shard` knows which. Nothing here holds the whole set.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.errors import checked, reading
from mi_helpers.files import (
    RunError,
    is_beside,
    load_tensors,
    read_about,
    read_json,
    read_sealed,
    read_shapes,
)

MANIFEST = "manifest.json"
FORMAT = 2
GIB = 2**30
ENTRIES = {
    **dict.fromkeys(("format", "d_in", "d_out", "rows", "tokens"), int),
    **{"model": dict, "text": dict, "shards": list, "source": list, "target": (list, None)},
}
AGAIN = "Run the harvest again: it makes that shard anew and keeps the others."


@dataclass(frozen=True)
class Shard:
    """Rows of activations, and the texts that they come from.

    Args:
        source, target: (rows, d_in) and (rows, d_out) or None, bfloat16.
        piece, at: (rows,); row r is token `at[r]` of piece `piece[r]`.
        ids: (tokens,), the token ids of all pieces one after another, without BOS.
        start: (pieces + 1,); piece p is ids[start[p] : start[p + 1]].
        document, offset: (pieces,), the number of a piece's text in the source, and the number of
            its first token in that text.
    """

    source: Tensor
    target: Tensor | None
    piece: Tensor
    at: Tensor
    ids: Tensor
    start: Tensor
    document: Tensor
    offset: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token id of each row, (rows,)."""
        return self.ids[self.start[self.piece] + self.at]

    @property
    def place(self) -> Tensor:
        """The document of each row, and its token's number in that document: (rows, 2)."""
        return torch.stack([self.document[self.piece], self.offset[self.piece] + self.at], 1)

    def text(self, piece: int) -> Tensor:
        """The token ids of a piece, without BOS."""
        return self.ids[self.start[piece] : self.start[piece + 1]]


class Activations:
    """A finished harvest.

    Args:
        folder: where its shards are.
        manifest: what it is of.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.sizes: list[int] = [shard["rows"] for shard in manifest["shards"]]
        self.rows: int = sum(self.sizes)
        self.first = [0, *itertools.accumulate(self.sizes)]  # the first row of each shard
        self.d_in: int = manifest["d_in"]
        self.d_out: int = manifest["d_out"]
        self._checked: set[int] = set()

    def __repr__(self) -> str:
        sites = " → ".join(site_name(site) for site in (self.source, self.target) if site)
        return (
            f"Activations({self.manifest['model']['name']}, {sites}: {self.rows:,} rows of "
            f"{self.d_in} in {len(self.sizes)} shards)"
        )

    @classmethod
    def open(cls, folder: Path | str) -> Activations:
        """The finished harvest in a folder.

        Raises:
            RunError: there is none, or its manifest and shards disagree.
        """
        with reading(Path(folder) / MANIFEST, RunError, "Delete it and run the harvest again."):
            return cls._open(Path(folder))

    @classmethod
    def _open(cls, folder: Path) -> Activations:
        if not (folder / MANIFEST).is_file():
            begun = any(folder.glob("shard-*")) if folder.is_dir() else False
            state = "is not finished" if begun else "is not there"
            raise RunError(f"The harvest in {folder} {state}: run the harvest first.")
        manifest = read_json(folder / MANIFEST, **ENTRIES)
        if manifest.get("format") != FORMAT:
            raise RunError(
                f"{folder / MANIFEST} has a format that this version does not read: harvest into a "
                "new folder."
            )
        manifest = read_sealed(folder / MANIFEST, "Delete it and run the harvest again.")
        checked(manifest["model"], folder / MANIFEST, RunError, name=str, sha256=str)["name"]
        if not manifest["shards"]:
            raise RunError(f"{folder / MANIFEST} lists no shards. Delete it and run again.")
        for key in ("source", "target"):
            if not is_site(manifest[key]) and (manifest[key] is not None or key == "source"):
                raise RunError(
                    f"{folder / MANIFEST} has the {key} {manifest[key]}, which is no site."
                )
        for shard in manifest["shards"]:
            checked(shard, folder / MANIFEST, RunError, rows=int, tokens=int, sha256=str)
            if not is_beside(shard["file"]):
                raise RunError(
                    f"{folder / MANIFEST} names the shard {shard['file']!r}, and a shard is a "
                    ".safetensors file beside it: delete it and run the harvest again."
                )
            try:
                digest, _ = read_about(folder / shard["file"])
                shapes = read_shapes(folder / shard["file"])
            except RunError as error:
                raise RunError(f"{error} {AGAIN}") from None
            ours = shapes.get("source") == (shard["rows"], manifest["d_in"])
            if manifest["target"]:
                ours &= shapes.get("target") == (shard["rows"], manifest["d_out"])
            if digest != shard["sha256"] or not ours:
                raise RunError(f"{folder / shard['file']} is not the manifest's. {AGAIN}")
        return cls(folder, manifest)

    @property
    def source(self) -> tuple[str, int | None]:
        """The site and layer that a coder reads."""
        return tuple(self.manifest["source"])

    @property
    def target(self) -> tuple[str, int | None] | None:
        """The site and layer that a coder predicts; None where it predicts what it reads."""
        return tuple(self.manifest["target"]) if self.manifest["target"] else None

    def shard(self, index: int) -> Shard:
        """Shard `index`, compared with its checksum when it is first read.

        Raises:
            RunError: it is missing, or damaged.
        """
        path = self.folder / self.manifest["shards"][index]["file"]
        tensors, _ = load_tensors(path, check=index not in self._checked, advice=AGAIN)
        self._checked.add(index)
        with reading(path, RunError, AGAIN):
            return Shard(**({"target": None} | tensors))

    @property
    def tokens(self) -> Tensor:
        """The token id of each row, (rows,)."""
        return torch.cat([self.shard(index).tokens for index in range(len(self.sizes))])

    def locate(self, row: int) -> tuple[int, int]:
        """(shard, row in it) of a row.

        Raises:
            RunError: there is no such row.
        """
        if not 0 <= row < self.rows:
            raise RunError(f"Row {row} is out of range: the harvest has {self.rows:,} rows.")
        shard = next(i for i, first in enumerate(self.first[1:]) if row < first)
        return shard, row - self.first[shard]

    def slice(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Rows begin … end - 1 in the order of the text: source and target (or None), float32."""
        parts: list[tuple[Tensor, Tensor | None]] = []
        for index, first in enumerate(self.first[:-1]):
            low, high = max(begin - first, 0), min(end - first, self.sizes[index])
            if low < high:
                shard = self.shard(index)
                target = shard.target
                parts.append(
                    (shard.source[low:high], target if target is None else target[low:high])
                )
        source = torch.cat([part[0] for part in parts]).float()
        return source, torch.cat([p[1] for p in parts]).float() if self.target else None


def check_counts(config, names: tuple[str, ...]) -> None:
    """Check that fields of a configuration are whole numbers of 1 or more.

    Raises:
        RunError: which one is not.
    """
    for name in names:
        value = getattr(config, name)
        if type(value) is not int:
            raise RunError(f"{name} is {value!r}: it has to be a whole number.")
        if value < 1:
            raise RunError(f"{name} is {value}: it has to be 1 or more.")


def is_site(value: object) -> bool:
    """Whether a value of JSON is [name, layer or null]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and (value[1] is None or type(value[1]) is int)


def site_name(site: tuple[str, int | None]) -> str:
    """("resid_post", 3) → "resid_post 3"."""
    return site[0] if site[1] is None else f"{site[0]} {site[1]}"


class Shuffled:
    """An endless shuffled order of a harvest's first rows, a bounded part of which is in memory.

    In each epoch the shards are shuffled and divided into groups of at most `memory` bytes, and the
    rows of each group are shuffled. The order depends on the arguments alone, so that any part of
    it can be asked for at any time: a killed run continues where it was, and each of several
    processes takes a part of a batch.

    Args:
        n: how many rows, from the first; an epoch has each of them once.
        memory: bytes of activations in memory.
    """

    def __init__(self, held: Activations, n: int, seed: int = 0, memory: int = 2 * GIB):
        self.held, self.n, self.seed = held, n, seed
        bytes_per_row = 2 * (held.d_in + (held.d_out if held.target else 0))
        self.most = max(1, memory // bytes_per_row)  # rows in memory
        self.sizes = [min(s, max(0, n - f)) for s, f in zip(held.sizes, held.first, strict=False)]
        self._order: tuple[int, list[list[int]]] | None = None
        self._loaded: tuple[list[int], Tensor, Tensor | None] | None = None
        self._permuted: tuple[tuple[int, int], Tensor] | None = None

    def groups(self, epoch: int) -> list[list[int]]:
        """The shards of each group of an epoch, sorted within the group."""
        if self._order is None or self._order[0] != epoch:
            used = [i for i, size in enumerate(self.sizes) if size]
            shuffled = torch.randperm(len(used), generator=self.generator(epoch, -1)).tolist()
            groups: list[list[int]] = [[]]
            for shard in (used[i] for i in shuffled):
                if groups[-1] and self.count(groups[-1]) + self.sizes[shard] > self.most:
                    groups.append([])
                groups[-1].append(shard)
            self._order = epoch, [sorted(group) for group in groups]
        return self._order[1]

    def count(self, group: list[int]) -> int:
        """The number of rows in a group."""
        return sum(self.sizes[shard] for shard in group)

    def generator(self, epoch: int, group: int) -> torch.Generator:
        """The generator of an epoch's order of shards (group -1), or of a group's order of rows."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 65_537 + group + 1)

    def rows(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Rows begin … end - 1 of the order: source (rows, d_in) and target (or None), float32."""
        parts = []
        while begin < end:
            epoch, at = divmod(begin, self.n)
            number, group, at = self.find(epoch, at)
            take = min(end - begin, self.count(group) - at)
            parts.append(self.take(epoch, number, group, at, at + take))
            begin += take
        source = torch.cat([part[0] for part in parts])
        return source, None if parts[0][1] is None else torch.cat([part[1] for part in parts])

    def find(self, epoch: int, at: int) -> tuple[int, list[int], int]:
        """(number of the group, its shards, place in it) of row `at` of an epoch."""
        for number, group in enumerate(self.groups(epoch)):
            if at < self.count(group):
                return number, group, at
            at -= self.count(group)
        raise IndexError(at)

    def take(self, epoch: int, number: int, group: list[int], low: int, high: int):
        """Rows low … high - 1 of a group's shuffled order."""
        if self._permuted is None or self._permuted[0] != (epoch, number):
            order = torch.randperm(self.count(group), generator=self.generator(epoch, number))
            self._permuted = (epoch, number), order
        _, source, target = self.load(group)
        chosen = self._permuted[1][low:high]
        return source[chosen].float(), None if target is None else target[chosen].float()

    def load(self, group: list[int]) -> tuple[list[int], Tensor, Tensor | None]:
        """A group's rows, in memory; those of the group before it are dropped first."""
        if self._loaded is None or self._loaded[0] != group:
            self._loaded = None
            n, held = self.count(group), self.held
            source = torch.empty(n, held.d_in, dtype=torch.bfloat16)
            target = torch.empty(n, held.d_out, dtype=torch.bfloat16) if held.target else None
            at = 0
            for index in group:
                shard, size = held.shard(index), self.sizes[index]
                source[at : at + size] = shard.source[:size]
                if target is not None:
                    target[at : at + size] = shard.target[:size]
                at += size
            self._loaded = group, source, target
        return self._loaded
