"""Activations of a model on text, to disk: `harvest` writes what `activations` reads.

    source = open_source("tinyworld")
    held = harvest(load_model(), source, "runs/demo/harvest", ("resid_post", 3), tokens=200_000)

The model is run up to the hooked layer only. A text longer than the context is cut into pieces;
each piece starts with BOS, whose activation is left out, as are positions whose norm is an outlier.
Killed at any moment and run again, the harvest goes on, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.files import (
    RunError,
    load_tensors,
    need_space,
    read_about,
    read_json,
    save_tensors,
    sweep,
    write_json,
)
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel, checked_site, read_sites, site_width
from mi_helpers.saes.activations import FORMAT, MANIFEST, Activations, site_name
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.progress import Progress
from mi_helpers.saes.sources import Source

PLAN = "plan.json"
OUTLIER = 10.0  # times the median norm

# ---------------------------------------------------------------------------------- text in pieces


@dataclass(frozen=True)
class Piece:
    """`ids` (without BOS) are tokens offset, offset + 1, … of text number `document`."""

    document: int
    offset: int
    ids: list[int]


def encoder(model: LanguageModel) -> Callable[[list[str]], list[list[int]]]:
    """Texts → token ids without special tokens."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, so it cannot read text.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    return lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]


def pieces(
    source: Source,
    encode: Callable[[list[str]], list[list[int]]],
    room: int,
    document: int = 0,
    offset: int = 0,
) -> Iterator[Piece]:
    """The source's texts in pieces of at most `room` tokens, from a token of a document on."""
    texts = source.texts(document)
    while batch := list(itertools.islice(texts, 256)):
        for ids in encode(batch):
            for begin in range(offset, len(ids), room):
                yield Piece(document, begin, ids[begin : begin + room])
            document, offset = document + 1, 0


def batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Indices of texts in batches of similar length, at most `most` tokens each with padding."""
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


def model_identity(model: LanguageModel) -> dict:
    """What tells one model from another: its name, its shape, and a checksum over the beginning of
    every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.hf.named_parameters():
        first = parameter.detach().reshape(-1)[:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + first.tobytes())
    return {
        "name": model.name,
        "family": model.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "sha256": digest.hexdigest(),
    }


def check_model(held: Activations, model: LanguageModel) -> None:
    """RunError when the harvest is not of this model."""
    of, here = held.manifest["model"], model_identity(model)
    if of["sha256"] != here["sha256"]:
        what = "other weights" if of["name"] == here["name"] else f"the model {of['name']}"
        raise RunError(
            f"The harvest in {held.folder} was made with {what}, not with {here['name']} as it is "
            "now: choose that model, or harvest into a new folder."
        )


class Harvester:
    """One harvest: which text goes into which shard, and how a shard is made."""

    def __init__(self, model: LanguageModel, source: Source, folder: Path, plan: dict):
        self.model, self.source, self.folder, self.plan = model, source, folder, plan
        self.sites = [tuple(plan["source"])] + ([tuple(plan["target"])] if plan["target"] else [])
        bos = model.tokenizer.bos_token_id if model.tokenizer else None
        self.bos = [] if bos is None else [bos]
        self.digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        self.encode = encoder(model)
        self._stream: Iterator[Piece] = iter(())
        self._at: tuple[int, int] | None = None

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05}.safetensors"

    def about(self, shard: int, check: bool = True) -> dict | None:
        """What a shard on disk says of itself; None where it has to be made (anew)."""
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
        """The pieces of one shard, from a (document, token) on: at most `left` tokens."""
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
        """Each site's activations of all tokens of the pieces in order, (tokens, width), bf16."""
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
                    f"first in text {where.document}: load the model in bfloat16 or float32."
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
        """Make the shards that are missing and that are this process's; how many there are.

        Every process reads the whole text, which costs little, so all agree on what each shard is.
        """
        cursor, done, shard = (0, 0), 0, 0
        bar = Progress("harvest", self.plan["tokens"], "tokens", 0, progress and processes.first)
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
            bar.to(done)
        return shard


def harvest(
    model: LanguageModel,
    source: Source,
    folder: Path | str,
    site: Key,
    target: Key | None = None,
    *,
    tokens: int = 200_000,
    context: int = 128,
    shard_tokens: int = 8_192,
    batch_tokens: int = 4_096,
    outlier: float = OUTLIER,
    processes: Processes = ALONE,
    progress: bool = True,
) -> Activations:
    """Activations at `site` (and `target`, for a transcoder) of `tokens` tokens, as bf16 shards.

    Args:
        site: (name, layer) of `models.SITES`, or ("ln2_normalized", layer): the MLP's input without
            the norm's gain, which Gemma Scope's transcoders read.
        context: longest piece of text that the model reads at once, BOS included.
        shard_tokens: tokens per shard, which is what a kill costs at most.
        batch_tokens: tokens per run of the model, padding included.
        outlier: positions whose norm is above this times their shard's median are left out.

    Raises:
        RunError: the folder holds another harvest; the disk is full; activations are not finite.
        ModelError, SourceError: what cannot be read.
    """
    folder = Path(folder)
    widths = [site_width(model, each) for each in (site, target) if each is not None]
    encoder(model)
    numbers = {"tokens": tokens, "shard_tokens": shard_tokens, "batch_tokens": batch_tokens}
    for name, value in numbers.items():
        if value < 1:
            raise RunError(f"{name} is {value}: it has to be 1 or more.")
    if not 2 <= context <= model.n_ctx:
        raise RunError(f"The context is {context}: {model.name} reads 2 to {model.n_ctx} tokens.")
    site, target = (each and checked_site(model, each) for each in (site, target))
    plan = {
        "model": model_identity(model),
        "source": list(site),
        "target": list(target) if target else None,
        "text": source.identity(),
        "tokens": tokens,
        "context": context,
        "shard_tokens": shard_tokens,
        "batch_tokens": batch_tokens,
        "outlier": outlier,
    }
    begun = (folder / MANIFEST).exists()
    if not begun and not any(t.strip() for t in itertools.islice(source.texts(), 1_000)):
        raise RunError(f"{source.name} has no text: its first texts are empty.")
    keep_plan(folder, plan, processes)
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    need_space(folder, 1.02 * tokens * (2 * sum(widths) + 12) - there, "The harvest")
    harvester = Harvester(model, source, folder, plan)
    count = harvester.shards(processes, progress)
    processes.wait()
    if processes.first:
        write_manifest(harvester, count, widths)
    processes.wait()
    return Activations.open(folder)


def keep_plan(folder: Path, plan: dict, processes: Processes) -> None:
    """Write what this folder is a harvest of, or check that it is the same as before."""
    if (folder / PLAN).exists():
        before = read_json(folder / PLAN)
        differ = [key for key in plan if json.loads(json.dumps(plan[key])) != before.get(key)]
        if differ:
            key = differ[0]
            raise RunError(
                f"{folder} holds a harvest with the setting {key} = {before.get(key)}, not "
                f"{plan[key]}. Choose a new folder, or the same settings to go on with it."
            )
    processes.wait()
    if processes.first:
        sweep(folder)
        if not (folder / PLAN).exists():
            write_json(folder / PLAN, plan)
    processes.wait()


def write_manifest(harvester: Harvester, count: int, widths: list[int]) -> None:
    """The manifest, last: from now on the harvest is complete."""
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
    write_json(
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
