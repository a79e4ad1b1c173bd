"""The activations of a model on text, to disk: `harvest` writes what `activations` reads.

    config = HarvestConfig(("resid_post", 3), tokens=200_000)
    held = harvest(load_model(), open_source("tinyworld"), "runs/demo/harvest", config)

The model is run only up to the last layer that is read. A text longer than the context is cut into
pieces; each piece starts with BOS, whose activation is left out, as are positions whose norm is an
outlier. A harvest that is killed at any moment continues when it is run again, and ends with the
same bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.files import (
    RunError,
    load_tensors,
    need_space,
    read_about,
    save_tensors,
    seal,
    write_sealed,
)
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel, checked_site, read_sites, site_width
from mi_helpers.saes.activations import FORMAT, MANIFEST, Activations, check_counts, site_name
from mi_helpers.saes.plan import HarvestConfig, compared, keep_plan, plan_of
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.progress import progress_bar
from mi_helpers.saes.sources import Source

FEWER = ", or ask for fewer tokens"
TEXTS, CHARACTERS = 256, 2**18  # that are encoded at once, at most
PART = 2**16  # characters of one text that are encoded at once, at most


# ---------------------------------------------------------------------------------- text in pieces


@dataclass(frozen=True)
class Piece:
    """Tokens offset, offset + 1, … of text number `document`: their `ids`, without BOS."""

    document: int
    offset: int
    ids: list[int]


def encoder(model: LanguageModel) -> Callable[[list[str]], list[list[int]]]:
    """Texts → token ids without special tokens, however the tokenizer was last called."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read text.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [tokenizer.encode(t, add_special_tokens=False) for t in texts]

    def encode(texts: list[str]) -> list[list[int]]:
        backend.no_padding()
        backend.no_truncation()
        return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

    return encode


def parts(texts: Iterator[str], document: int) -> Iterator[tuple[int, str]]:
    """(number, part) of each text: parts of at most `PART` characters, cut before a space."""
    for number, text in enumerate(texts, document):
        begin = 0
        while len(text) - begin > PART:
            end = text.rfind(" ", begin + 1, begin + PART)
            end = begin + PART if end < 0 else end
            yield number, text[begin:end]
            begin = end
        yield number, text[begin:]


def pieces(
    source: Source,
    encode: Callable[[list[str]], list[list[int]]],
    room: int,
    document: int = 0,
    offset: int = 0,
) -> Iterator[Piece]:
    """The source's texts in pieces of at most `room` tokens, of which few are in memory at once.

    Args:
        document, offset: the text and the token in it with which to begin.
    """
    stream, at, first = parts(source.texts(document), document), document, 0
    while batch := together(stream):
        for (number, _), ids in zip(batch, encode([text for _, text in batch]), strict=True):
            if number != at:
                at, first, offset = number, 0, 0
            for begin in range(max(0, offset - first), len(ids), room):
                yield Piece(number, first + begin, ids[begin : begin + room])
            first += len(ids)


def together(stream: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    """The next parts of texts, as many as are encoded at once."""
    batch, size = [], 0
    for number, text in itertools.islice(stream, TEXTS):
        batch.append((number, text))
        size += len(text)
        if size >= CHARACTERS:
            break
    return batch


def batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Indices of texts of similar length, in batches of at most `most` tokens with padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------- the harvest


class Harvester:
    """One harvest: which text goes into which shard, and how a shard is made."""

    def __init__(self, model: LanguageModel, source: Source, folder: Path, plan: dict):
        self.model, self.source, self.folder, self.plan = model, source, folder, plan
        self.sites = [tuple(plan["source"])] + ([tuple(plan["target"])] if plan["target"] else [])
        bos = model.tokenizer.bos_token_id if model.tokenizer else None
        self.bos = [] if bos is None else [bos]
        self.digest = seal(compared(plan))
        self.encode = encoder(model)
        self._stream: Iterator[Piece] = iter(())
        self._at: tuple[int, int] | None = None

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def about(self, shard: int, check: bool = True) -> dict | None:
        """What a shard on disk says about itself; None where it has to be made, or made again."""
        path = self.path(shard)
        if not path.exists():
            return None
        try:
            about = load_tensors(path)[1] if check else read_about(path)[1]
        except RunError as error:
            if check:
                print(f"{error} It is made again.", flush=True)
            return None
        if about.get("plan") != self.digest:
            raise RunError(
                f"{path} is of another harvest, with other settings: choose a new folder."
            )
        return about

    def take(self, cursor: tuple[int, int], left: int) -> list[Piece]:
        """The pieces of the shard that begins at a (document, token): at most `left` tokens."""
        if self._at != cursor:
            room = self.plan["context"] - len(self.bos)
            self._stream = pieces(self.source, self.encode, room, *cursor)
        taken, total, goal = [], 0, min(left, self.plan["shard_tokens"])
        while total < goal and (piece := next(self._stream, None)) is not None:
            if total + len(piece.ids) > left:
                piece = Piece(piece.document, piece.offset, piece.ids[: left - total])
            taken.append(piece)
            total += len(piece.ids)
        if taken:
            self._at = taken[-1].document, taken[-1].offset + len(taken[-1].ids)
        return taken

    def run(self, taken: list[Piece]) -> list[Tensor]:
        """Each site's activations at all tokens of the pieces in order, (tokens, width), bf16."""
        lengths = [len(piece.ids) for piece in taken]
        first = [0, *itertools.accumulate(lengths)]
        widths = [site_width(self.model, site) for site in self.sites]
        out = [torch.empty(first[-1], w, dtype=torch.bfloat16) for w in widths]
        lead = len(self.bos)
        for batch in batches([n + lead for n in lengths], self.plan["batch_tokens"]):
            ids = self.model.pad([self.bos + taken[i].ids for i in batch])
            found = read_sites(self.model, ids, self.sites)
            for held, values in zip(out, found, strict=True):
                values = values.to(torch.bfloat16).cpu()
                for row, i in enumerate(batch):
                    held[first[i] : first[i + 1]] = values[row, lead : lead + lengths[i]]
        return out

    def make(self, shard: int, taken: list[Piece]) -> None:
        """Run the model on one shard's pieces and write it."""
        values = self.run(taken)
        lengths = torch.tensor([len(piece.ids) for piece in taken])
        piece = torch.repeat_interleave(torch.arange(len(taken)), lengths)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        at = torch.arange(len(piece)) - start[piece]
        norms = values[0].float().norm(dim=-1)
        for site, held in zip(self.sites, values, strict=True):
            bad = (~held.isfinite().all(-1)).nonzero().flatten().tolist()
            if bad:
                where = taken[int(piece[bad[0]])]
                raise RunError(
                    f"The activations at {site_name(site)} are not finite at {len(bad)} tokens, "
                    f"first in text {where.document}: load the model in bfloat16 or float32, and "
                    "harvest into a new folder."
                )
        keep = norms <= self.plan["outlier"] * norms.median()
        tensors = {
            "source": values[0][keep],
            "piece": piece[keep].int(),
            "at": at[keep].int(),
            "ids": torch.tensor([i for p in taken for i in p.ids], dtype=torch.int32),
            "start": start.int(),
            "document": torch.tensor([p.document for p in taken]),
            "offset": torch.tensor([p.offset for p in taken], dtype=torch.int32),
        }
        if len(values) == 2:
            tensors["target"] = values[1][keep]
        about = {
            "plan": self.digest,
            "rows": int(keep.sum()),
            "tokens": len(piece),
            "bos": len(taken) * len(self.bos),
            "outliers": int((~keep).sum()),
            "median_norm": round(float(norms.median()), 6),
            "next": list(self._at),
        }
        save_tensors(self.path(shard), tensors, about)

    def shards(self, processes: Processes, progress: bool) -> int:
        """Make this process's shards where they are missing; the number of all shards.

        Every process reads the whole text, which costs little, so that all agree on what is in each
        shard.
        """
        cursor, done, shard = (0, 0), 0, 0
        shown = progress and processes.first
        with progress_bar("harvest", self.plan["tokens"], "tokens", shown=shown) as bar:
            while done < self.plan["tokens"]:
                own = shard % processes.size == processes.rank
                about = self.about(shard, check=own) if own or self._at != cursor else None
                if about is None:
                    taken = self.take(cursor, self.plan["tokens"] - done)
                    if not taken:
                        break
                    count, cursor = sum(len(piece.ids) for piece in taken), self._at
                    if own:
                        self.make(shard, taken)
                else:
                    count, cursor = about["tokens"], tuple(about["next"])
                done, shard = done + count, shard + 1
                bar.update(count)
        return shard


def harvest(
    model: LanguageModel,
    source: Source,
    folder: Path | str,
    config: HarvestConfig,
    *,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Activations:
    """The activations of a model on text, written to `folder` as shards in bfloat16.

    Args:
        folder: where the shards are, or will be; what is already there is not made again.
        config: which activations, and of how much text.
        processes: the processes that share the shards.
        progress: whether a progress bar is shown.

    Raises:
        RunError: the folder holds another harvest, the disk is full, or activations are not finite.
        ModelError, SourceError: the model or the text cannot be read.
    """
    folder = Path(folder)
    config = checked_config(model, config)
    encoder(model)  # says now that there is no tokenizer
    widths = [site_width(model, site) for site in config.sites]
    with processes.alone_in(folder):
        plan = plan_of(model, source, config)
        begun = (folder / MANIFEST).exists()
        if not begun and not any(t.strip() for t in itertools.islice(source.texts(), 1_000)):
            raise RunError(f"{source.name} has no text: its first texts are empty.")
        there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
        need_space(folder, disk_needed(config, widths) - there, "The harvest", FEWER)
        harvester = Harvester(model, source, folder, keep_plan(folder, plan, processes))
        count = harvester.shards(processes, progress)
        processes.wait()
        if processes.first:
            write_manifest(harvester, count, widths)
        processes.wait()
        return Activations.open(folder)


def disk_needed(config: HarvestConfig, widths: list[int]) -> float:
    """Bytes of a harvest on the disk, of sites of these widths."""
    return 1.02 * config.tokens * (2 * sum(widths) + 12)


def checked_config(model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The configuration with its layers counted from the first.

    Raises:
        RunError: a number below 1, an outlier below 1, or a context that the model cannot read.
        ModelError: there is no such site.
    """
    for site in config.sites:
        site_width(model, site)
    check_counts(config, ("tokens", "shard_tokens", "batch_tokens"))
    if not config.outlier >= 1 or math.isnan(config.outlier):
        raise RunError(
            f"outlier is {config.outlier}: it has to be 1 or more, as positions whose norm is "
            "above so many medians are left out."
        )
    if not 2 <= config.context <= model.n_ctx:
        raise RunError(
            f"The context is {config.context}: {model.name} reads 2 to {model.n_ctx} tokens."
        )
    target = config.target and checked_site(model, config.target)
    return replace(config, site=checked_site(model, config.site), target=target)


def write_manifest(harvester: Harvester, count: int, widths: list[int]) -> None:
    """Write the manifest, with which the harvest is complete."""
    plan, shards, norms = harvester.plan, [], []
    left_out = {"bos": 0, "outliers": 0}
    for index in range(count):
        digest, about = read_about(harvester.path(index))
        shards.append(
            {
                "file": harvester.path(index).name,
                "rows": about["rows"],
                "tokens": about["tokens"],
                "sha256": digest,
            }
        )
        norms.append(about["median_norm"])
        for name in left_out:
            left_out[name] += about[name]
    if not sum(shard["rows"] for shard in shards):
        raise RunError(f"{harvester.source.name} has no text that could be harvested.")
    write_sealed(
        harvester.folder / MANIFEST,
        plan
        | {
            "format": FORMAT,
            "dtype": "bfloat16",
            "d_in": widths[0],
            "d_out": widths[-1],
            "asked": plan["tokens"],
            "tokens": sum(shard["tokens"] for shard in shards),
            "rows": sum(shard["rows"] for shard in shards),
            "left_out": left_out,
            "median_norm": sorted(norms)[len(norms) // 2],
            "shards": shards,
        },
    )
