"""What a run will take on this machine, measured before it starts: time, memory, disk.

The model's weights are not needed: two of its blocks, with random weights, are timed on a batch of
the size that the harvest will use, and the training step is timed at its full size.
"""

import copy
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mi_helpers.layouts import Key, ModelError
from mi_helpers.loading import SHIPPED, empty_gemma2_2b, why_not_loaded
from mi_helpers.models import LanguageModel, read_sites, site_width
from mi_helpers.saes.harvest import HarvestConfig
from mi_helpers.saes.progress import duration
from mi_helpers.saes.step import SparseStep
from mi_helpers.saes.training import TrainConfig, new_coder

GB = 1e9
BASE = 0.6 * GB  # Python, torch and transformers themselves
KNOWN_SHAPES = {"google/gemma-2-2b": empty_gemma2_2b, "google/gemma-2-2b-it": empty_gemma2_2b}


@dataclass(frozen=True)
class Stage:
    """One stage's cost: seconds, bytes of memory at the peak, bytes of disk that it adds."""

    name: str
    how: str
    seconds: float
    memory: float
    disk: float


def configuration(name: str):
    """A model's configuration, from its folder, the hub, or what is known here.

    Raises:
        ModelError: it is nowhere to be had.
    """
    source = SHIPPED.get(name) or os.path.expanduser(name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(why_not_loaded(name, error)) from None
        if name in KNOWN_SHAPES:
            return KNOWN_SHAPES[name]().config
        raise ModelError(
            f"The configuration of {name} is neither here nor can it be downloaded, so nothing can "
            "be estimated: give a local folder, or connect to the network."
        ) from None


def parameters(config) -> int:
    """How many parameters a model of this shape has; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()


def two_blocks(config, dtype: torch.dtype) -> LanguageModel:
    """The model cut to two blocks and a small vocabulary, with random weights."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 512
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types[:2])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, 0)
    hf = AutoModelForCausalLM.from_config(small, dtype=dtype, trust_remote_code=False)
    return LanguageModel(hf, None, "two blocks")


def median_seconds(work: Callable[[], object], times: int = 3) -> float:
    """Median time of `work` after one run that does not count."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def blocks_needed(site: Key, n_layers: int) -> int:
    """The number of blocks that are run for a site."""
    name, layer = site
    if layer is None:
        return 0 if name == "embed" else n_layers
    return layer + (name != "resid_pre")


def harvest_stage(shape, dtype: torch.dtype, config: HarvestConfig) -> Stage:
    """The harvest: the time of two blocks on a batch, times the blocks up to the sites.

    Args:
        shape: the configuration of the model.
    """
    model = two_blocks(shape, dtype)
    rows = max(1, config.batch_tokens // config.context)
    ids = torch.ones(rows, config.context, dtype=torch.int64)
    probe = [(name, None if layer is None else 1) for name, layer in config.sites]
    per_token = median_seconds(lambda: read_sites(model, ids, [("resid_post", 1)])) / ids.numel()
    blocks = max(blocks_needed(site, shape.num_hidden_layers) for site in config.sites)
    widths = [site_width(model, site) for site in probe]
    size = torch.empty(0, dtype=dtype).element_size()
    inner = getattr(shape, "intermediate_size", None) or 4 * model.d_model
    scratch = rows * config.context * size * (3 * inner + 8 * model.d_model)
    scratch += 4 * rows * model.n_heads * config.context**2 * 3  # scores, soft-capped, softmax
    return Stage(
        "harvest",
        f"{config.tokens:,} tokens through {blocks} of {shape.num_hidden_layers} blocks at "
        f"{1 / (per_token * max(blocks, 1) / 2):,.0f} tokens/s",
        config.tokens * per_token * blocks / 2,
        BASE + parameters(shape) * size + scratch,
        1.02 * config.tokens * (2 * sum(widths) + 12),
    )


def train_stage(
    config: TrainConfig, d_in: int, d_out: int | None, tokens: int, processes: int
) -> Stage:
    """The training: the time of a step at full size on random rows; memory by counting tensors."""
    step = SparseStep(new_coder(config, d_in, d_out), config.step())
    rows = config.batch // processes
    x = torch.randn(rows, d_in) / d_in**0.5
    target = None if d_out is None else torch.randn(rows, d_out) / d_out**0.5
    seconds = median_seconds(lambda: step(x, target))
    weights = config.latents * (d_in + (d_out or d_in))
    held = min(config.memory, 2 * tokens * (d_in + (d_out or 0)))
    batch = 4 * config.batch * (3 * d_in + 2 * (d_out or d_in) + 4 * config.k)
    chunk = 512 * config.latents * (4 + 2)
    return Stage(
        "train",
        f"{config.steps:,} steps of {config.batch:,} rows, {config.latents:,} latents, at "
        f"{seconds:.3g} s",
        config.steps * seconds,
        BASE + 4 * 3 * weights + 2 * config.latents * d_in + batch + chunk + held,
        2 * 4 * 3 * weights + 4 * weights,
    )


def features_stage(config: TrainConfig, d_in: int, d_out: int | None, tokens: int) -> Stage:
    """The features: one pass over the shards, its encoder timed on a batch."""
    coder = new_coder(config, d_in, d_out)
    x = torch.randn(1_024, d_in) / d_in**0.5
    seconds = median_seconds(lambda: coder.encode_sparse(x)) / len(x)
    tables = config.latents * (20 * 20 + 100 * 20 + 128 * 8 + 40)
    return Stage(
        "features",
        f"{tokens:,} rows at {1 / seconds:,.0f} rows/s, and the contexts of each latent as text",
        tokens * seconds + 0.004 * config.latents,
        BASE + 4 * config.latents * (d_in + (d_out or d_in)) + 2 * tables,
        tables / 2 + 5_000 * config.latents,
    )


def sentences(stages: list[Stage], folder: Path) -> list[str]:
    """The estimate as lines: each stage, all together, and whether it fits on this machine."""
    lines = [
        f"{stage.name:9} {duration(stage.seconds):>9}  memory {stage.memory / GB:5.1f} GB  "
        f"disk {stage.disk / GB:5.1f} GB  {stage.how}"
        for stage in stages
    ]
    seconds, disk = sum(stage.seconds for stage in stages), sum(stage.disk for stage in stages)
    peak = max(stage.memory for stage in stages)
    lines.append(
        f"{'together':9} {duration(seconds):>9}  memory {peak / GB:5.1f} GB  "
        f"disk {disk / GB:5.1f} GB"
    )
    there = folder
    while not there.exists():
        there = there.parent
    free, memory = shutil.disk_usage(there).free, psutil.virtual_memory()
    lines.append(
        f"This machine has {memory.total / GB:.1f} GB of memory ({memory.available / GB:.1f} GB "
        f"available) and {free / GB:.1f} GB of disk free: "
        + verdict(peak, disk, memory.available, free)
    )
    return lines


def verdict(peak: float, disk: float, room: float, free: float) -> str:
    """Whether a run fits, and what to change where it does not.

    Args:
        peak, disk: bytes of memory and of disk that it needs.
        room, free: bytes of memory and of disk that are there.
    """
    if disk > free:
        return "the disk is too small; harvest fewer tokens, or use another --folder."
    if peak > room:
        return "the memory is too small; use bfloat16, fewer latents, or a smaller --batch-tokens."
    if peak > 0.8 * room:
        return "it fits, barely: close other programs."
    return "it fits."
