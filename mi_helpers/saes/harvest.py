"""The activations of a model on text, to disk: `harvest` writes what `activations` reads.

    config = HarvestConfig(("resid_post", 3), tokens=200_000)
    held = harvest(load_model(), open_source("tinyworld"), "runs/demo/harvest", config)

The model is run only up to the last layer that is read. A text longer than the context is cut into
pieces; each piece starts with BOS, whose activation is left out, as are positions whose norm is an
outlier. A harvest that is killed at any moment continues when it is run again, and ends with the
same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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
    read_json,
    save_tensors,
    sweep,
    write_json,
)
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel, checked_site, read_sites, site_width
from mi_helpers.saes.activations import FORMAT, MANIFEST, Activations, site_name
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.progress import progress_bar
from mi_helpers.saes.sources import Source

PLAN = "plan.json"


@dataclass(frozen=True)
class HarvestConfig:
    """Which activations are harvested, and of how much text.

    Args:
        site: (name, layer) of `models.SITES`, or ("ln2_normalized", layer): the MLP's input without
            the norm's gain, which Gemma Scope's transcoders read.
        target: the site that a transcoder predicts; None for an SAE.
        tokens: of text, BOS not counted.
        context: longest piece of text that the model reads at once, BOS included.
        shard_tokens: tokens per shard, which is the most that a kill costs.
        batch_tokens: tokens per run of the model, padding included.
        outlier: positions whose norm is above this times their shard's median are left out.
    """

    site: Key
    target: Key | None = None
    tokens: int = 200_000
    context: int = 128
    shard_tokens: int = 8_192
    batch_tokens: int = 4_096
    outlier: float = 10.0

    @property
    def sites(self) -> list[Key]:
        """The site, and the target where there is one."""
        return [self.site] if self.target is None else [self.site, self.target]


# ---------------------------------------------------------------------------------- text in pieces


@dataclass(frozen=True)
class Piece:
    """Tokens offset, offset + 1, … of text number `document`: their `ids`, without BOS."""

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
    """The source's texts in pieces of at most `room` tokens.

    Args:
        document, offset: the text and the token in it with which to begin.
    """
    texts = source.texts(document)
    while batch := list(itertools.islice(texts, 256)):
        for ids in encode(batch):
            for begin in range(offset, len(ids), room):
                yield Piece(document, begin, ids[begin : begin + room])
            document, offset = document + 1, 0


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


def model_identity(model: LanguageModel) -> dict:
    """What tells models apart: name, shape, and a checksum over 64 numbers of each parameter."""
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
    """Check that a harvest is of this model.

    Raises:
        RunError: it is of another one, or of other weights.
    """
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
    plan = plan_of(model, source, config)
    widths = [site_width(model, site) for site in config.sites]
    begun = (folder / MANIFEST).exists()
    if not begun and not any(t.strip() for t in itertools.islice(source.texts(), 1_000)):
        raise RunError(f"{source.name} has no text: its first texts are empty.")
    keep_plan(folder, plan, processes)
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    need_space(folder, 1.02 * config.tokens * (2 * sum(widths) + 12) - there, "The harvest")
    harvester = Harvester(model, source, folder, plan)
    count = harvester.shards(processes, progress)
    processes.wait()
    if processes.first:
        write_manifest(harvester, count, widths)
    processes.wait()
    return Activations.open(folder)


def checked_config(model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The configuration with its layers counted from the first.

    Raises:
        RunError: a number below 1, or a context that the model cannot read.
        ModelError: there is no such site, or the model has no tokenizer.
    """
    for site in config.sites:
        site_width(model, site)
    encoder(model)
    for name in ("tokens", "shard_tokens", "batch_tokens"):
        if getattr(config, name) < 1:
            raise RunError(f"{name} is {getattr(config, name)}: it has to be 1 or more.")
    if not 2 <= config.context <= model.n_ctx:
        raise RunError(
            f"The context is {config.context}: {model.name} reads 2 to {model.n_ctx} tokens."
        )
    target = config.target and checked_site(model, config.target)
    return replace(config, site=checked_site(model, config.site), target=target)


def plan_of(model: LanguageModel, source: Source, config: HarvestConfig) -> dict:
    """All that a harvest's numbers depend on, as in its plan.json."""
    return {
        "model": model_identity(model),
        "source": list(config.site),
        "target": list(config.target) if config.target else None,
        "text": source.identity(),
        "tokens": config.tokens,
        "context": config.context,
        "shard_tokens": config.shard_tokens,
        "batch_tokens": config.batch_tokens,
        "outlier": config.outlier,
    }


def keep_plan(folder: Path, plan: dict, processes: Processes) -> None:
    """Write what this folder is a harvest of, or check that it is the same as before.

    Raises:
        RunError: the folder holds a harvest with another setting.
    """
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
        if not (folder / PLAN).exists():
            write_json(folder / PLAN, plan)
        sweep(folder, PLAN)
    processes.wait()


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
