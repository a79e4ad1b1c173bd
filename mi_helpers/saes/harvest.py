"""The activations of a model on text, to disk: `harvest` writes what `activations` reads.

    config = HarvestConfig(("resid_post", 3), tokens=200_000)
    held = harvest(load_model(), open_source("tinyworld"), "runs/demo/harvest", config)
    both = {"runs/2/harvest": replace(config, site=("resid_post", 2)), "runs/3/harvest": config}
    harvest_together(load_model(), open_source("tinyworld"), both)      # one pass of the model

The model is run only up to the last layer that is read. A text longer than the context is cut into
pieces; each piece starts with BOS, whose activation is left out, as are positions whose norm is an
outlier. A harvest that is killed at any moment continues when it is run again, and ends with the
same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.arguments import shown
from mi_helpers.files import (
    RunError,
    load_tensors,
    need_space,
    read_about,
    save_tensors,
    seal,
    write_sealed,
)
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel, checked_site, read_sites, site_width
from mi_helpers.saes.activations import FORMAT, MANIFEST, Activations, check_counts, site_name
from mi_helpers.saes.plan import HarvestConfig, compared, keep_plan, origin_of, settings_of
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
    """One harvest's folder: which of its shards are there, and how one is written."""

    def __init__(self, folder: Path, plan: dict):
        self.folder, self.plan = folder, plan
        self.sites = [tuple(plan["source"])] + ([tuple(plan["target"])] if plan["target"] else [])
        self.digest = seal(compared(plan))

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

    def write(self, shard: int, taken: list[Piece], found: dict[Key, Tensor], lead: int) -> None:
        """Write the shard of these pieces.

        Args:
            found: {site: activations at all tokens of the pieces, (tokens, width)}.
            lead: how many special tokens stand before each piece.
        """
        values = [found[site] for site in self.sites]
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
            "bos": len(taken) * lead,
            "outliers": int((~keep).sum()),
            "median_norm": round(float(norms.median()), 6),
            "next": list(after(taken)),
        }
        save_tensors(self.path(shard), tensors, about)


def after(taken: list[Piece]) -> tuple[int, int]:
    """The (document, token) that follows these pieces."""
    return taken[-1].document, taken[-1].offset + len(taken[-1].ids)


class Reader:
    """One pass over a text: which of it goes into which shard, and what the model makes of it.

    Args:
        plan: of any of the harvests that are made in this pass.
    """

    def __init__(self, model: LanguageModel, source: Source, plan: dict):
        self.model, self.source, self.plan = model, source, plan
        bos = model.tokenizer.bos_token_id if model.tokenizer else None
        self.bos = [] if bos is None else [bos]
        self.encode = encoder(model)
        self._stream: Iterator[Piece] = iter(())
        self.at: tuple[int, int] | None = None

    def take(self, cursor: tuple[int, int], left: int) -> list[Piece]:
        """The pieces of the shard that begins at a (document, token): at most `left` tokens."""
        if self.at != cursor:
            room = self.plan["context"] - len(self.bos)
            self._stream = pieces(self.source, self.encode, room, *cursor)
        taken, total, goal = [], 0, min(left, self.plan["shard_tokens"])
        while total < goal and (piece := next(self._stream, None)) is not None:
            if total + len(piece.ids) > left:
                piece = Piece(piece.document, piece.offset, piece.ids[: left - total])
            taken.append(piece)
            total += len(piece.ids)
        if taken:
            self.at = after(taken)
        return taken

    def run(self, taken: list[Piece], sites: list[Key]) -> dict[Key, Tensor]:
        """{site: activations at all tokens of the pieces in order, (tokens, width), bf16}."""
        lengths = [len(piece.ids) for piece in taken]
        first = [0, *itertools.accumulate(lengths)]
        widths = [site_width(self.model, site) for site in sites]
        out = [torch.empty(first[-1], w, dtype=torch.bfloat16) for w in widths]
        lead = len(self.bos)
        for batch in batches([n + lead for n in lengths], self.plan["batch_tokens"]):
            ids = self.model.pad([self.bos + taken[i].ids for i in batch])
            found = read_sites(self.model, ids, sites)
            for held, values in zip(out, found, strict=True):
                values = values.to(torch.bfloat16).cpu()
                for row, i in enumerate(batch):
                    held[first[i] : first[i + 1]] = values[row, lead : lead + lengths[i]]
        return dict(zip(sites, out, strict=True))

    def shards(self, harvests: list[Harvester], processes: Processes, progress: bool) -> int:
        """Make this process's shards where a harvest lacks them; the number of all shards.

        Every process reads the whole text, which costs little, so that all agree on what is in each
        shard. The model is run once for all harvests that lack a shard.
        """
        cursor, done, shard, wanted = (0, 0), 0, 0, self.plan["tokens"]
        shown = progress and processes.first
        with progress_bar("harvest", wanted, "tokens", shown=shown) as bar:
            while done < wanted:
                own, known = shard % processes.size == processes.rank, None
                lacking = harvests
                if own or self.at != cursor:
                    there = [each.about(shard, check=own) for each in harvests]
                    pairs = zip(harvests, there, strict=True)
                    lacking = [each for each, about in pairs if about is None]
                    known = next((about for about in there if about is not None), None)
                if lacking and (own or known is None):
                    taken = self.take(cursor, wanted - done)
                    if not taken:
                        break
                    count, cursor = sum(len(piece.ids) for piece in taken), self.at
                    if own:
                        sites = list(dict.fromkeys(key for each in lacking for key in each.sites))
                        found = self.run(taken, sites)
                        for each in lacking:
                            each.write(shard, taken, found, len(self.bos))
                else:
                    count, cursor = known["tokens"], tuple(known["next"])
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
    together = harvest_together(
        model, source, {folder: config}, processes=processes, progress=progress
    )
    return together[0]


def harvest_together(
    model: LanguageModel,
    source: Source,
    configs: Mapping[Path | str, HarvestConfig],
    *,
    processes: Processes = ALONE,
    progress: bool = True,
) -> list[Activations]:
    """Several harvests of one text in one pass of the model, each as `harvest` alone leaves it, to
    the last byte.

    Args:
        configs: {folder: what is harvested into it}; they may differ in their sites and outliers.

    Raises:
        RunError: as `harvest`; or they differ in more, or name one folder twice.
    """
    if not isinstance(configs, Mapping):
        raise RunError(f"configs is {shown(configs)}: expected {{folder: HarvestConfig}}.")
    wanted = {Path(folder): checked_config(model, each) for folder, each in configs.items()}
    check_together(wanted, len(configs))
    encoder(model)  # says now that there is no tokenizer
    with ExitStack() as held:
        for folder in wanted:
            held.enter_context(processes.alone_in(folder))
        begun = all((folder / MANIFEST).exists() for folder in wanted)
        if not begun and not any(t.strip() for t in itertools.islice(source.texts(), 1_000)):
            raise RunError(f"{source.name} has no text: its first texts are empty.")
        needed = 0.0
        for folder, config in wanted.items():
            there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
            needed += max(0.0, disk_needed(config, widths_of(model, config)) - there)
            need_space(folder, needed, "The harvest", FEWER)
        of = origin_of(model, source)
        harvests = [
            Harvester(folder, keep_plan(folder, of | settings_of(config), processes))
            for folder, config in wanted.items()
        ]
        reader = Reader(model, source, harvests[0].plan)
        count = reader.shards(harvests, processes, progress)
        processes.wait()
        if processes.first:
            for each, config in zip(harvests, wanted.values(), strict=True):
                write_manifest(each, count, widths_of(model, config), source.name)
        processes.wait()
        return [Activations.open(folder) for folder in wanted]


def check_together(wanted: Mapping[Path, HarvestConfig], given: int) -> None:
    """Refuse harvests that cannot be made in one pass: they read the same text in the same pieces.

    Raises:
        RunError: in which setting two differ, or that a folder is named twice, or none.
    """
    if len({folder.resolve() for folder in wanted}) != given or not given:
        raise RunError("Each harvest needs a folder of its own: name at least one, each once.")
    first, *others = wanted.values()
    for other in others:
        for name in ("tokens", "context", "shard_tokens", "batch_tokens"):
            if getattr(first, name) != getattr(other, name):
                raise RunError(
                    f"Harvests in one pass read the same pieces of text, and {name} is "
                    f"{getattr(first, name)} and {getattr(other, name)}: give them one value."
                )


def widths_of(model: LanguageModel, config: HarvestConfig) -> list[int]:
    """The width of each site of a harvest."""
    return [site_width(model, site) for site in config.sites]


def disk_needed(config: HarvestConfig, widths: list[int]) -> float:
    """Bytes of a harvest on the disk, of sites of these widths."""
    return 1.02 * config.tokens * (2 * sum(widths) + 12)


def checked_config(model: LanguageModel, config: HarvestConfig) -> HarvestConfig:
    """The configuration with its layers counted from the first.

    Raises:
        RunError: a number below 1, an outlier below 1, or a context that the model cannot read.
        ModelError: there is no such site.
    """
    if not isinstance(config, HarvestConfig):
        raise RunError(f"A harvest is told by {shown(config)}: expected a HarvestConfig.")
    for site in config.sites:
        if not isinstance(site, tuple) or len(site) != 2:
            raise RunError(f"site is {shown(site)}: expected (name, layer).")
        site_width(model, site)
    check_counts(config, ("tokens", "shard_tokens", "batch_tokens"))
    if not isinstance(config.outlier, int | float) or not config.outlier >= 1:
        raise RunError(
            f"outlier is {config.outlier}: it has to be 1 or more, as positions whose norm is "
            "above so many medians are left out."
        )
    if not isinstance(config.context, int) or not 2 <= config.context <= model.n_ctx:
        raise RunError(
            f"The context is {config.context}: {model.name} reads 2 to {model.n_ctx} tokens."
        )
    target = config.target and checked_site(model, config.target)
    return replace(config, site=checked_site(model, config.site), target=target)


def write_manifest(harvester: Harvester, count: int, widths: list[int], text: str) -> None:
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
        raise RunError(f"{text} has no text that could be harvested.")
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
