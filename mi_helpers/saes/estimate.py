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

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mi_helpers.course.doctor import memory
from mi_helpers.files import DATA
from mi_helpers.layouts import Key, ModelError
from mi_helpers.loading import empty_gemma2_2b
from mi_helpers.models import LanguageModel, read_sites, site_width
from mi_helpers.saes.progress import duration
from mi_helpers.saes.step import SparseStep
from mi_helpers.saes.training import Recipe, new_coder

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
    """A model's configuration from its folder, the hub, or what is known of it here."""
    source = DATA / "tiny_gemma" if name == "tiny-gemma" else os.path.expanduser(name)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        if name in KNOWN_SHAPES:
            return KNOWN_SHAPES[name]().config
        raise ModelError(
            f"The configuration of {name} is neither here nor can it be downloaded, so nothing can "
            "be estimated: give a local folder, or connect to the network."
        ) from None


def parameters(config) -> int:
    """How many parameters a model of this shape has; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def two_blocks(config, dtype: torch.dtype) -> LanguageModel:
    """The model cut to two blocks and a small vocabulary, with random weights."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 512
    if getattr(small, "layer_types", None):
        small.layer_types = list(small.layer_types[:2])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, 0)
    hf = AutoModelForCausalLM.from_config(small, dtype=dtype)
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
    """How many blocks are run for a site."""
    name, layer = site
    if layer is None:
        return 0 if name == "embed" else n_layers
    return layer + (name != "resid_pre")


def harvest_stage(
    config, dtype: torch.dtype, sites: list[Key], tokens: int, context: int, batch_tokens: int
) -> Stage:
    """Time of two blocks on a batch, times the blocks up to the site; shards in bf16."""
    model = two_blocks(config, dtype)
    rows = max(1, batch_tokens // context)
    ids = torch.ones(rows, context, dtype=torch.int64)
    probe = [(name, None if layer is None else 1) for name, layer in sites]
    per_token = median_seconds(lambda: read_sites(model, ids, [("resid_post", 1)])) / ids.numel()
    blocks = max(blocks_needed(site, config.num_hidden_layers) for site in sites)
    widths = [site_width(model, site) for site in probe]
    size = torch.empty(0, dtype=dtype).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * model.d_model
    scratch = rows * context * size * (3 * inner + 8 * model.d_model)
    scratch += 4 * rows * model.n_heads * context**2 * 3  # scores, soft-capped, softmax
    return Stage(
        "harvest",
        f"{tokens:,} tokens through {blocks} of {config.num_hidden_layers} blocks at "
        f"{1 / (per_token * max(blocks, 1) / 2):,.0f} tokens/s",
        tokens * per_token * blocks / 2,
        BASE + parameters(config) * size + scratch,
        1.02 * tokens * (2 * sum(widths) + 12),
    )


class Shape:
    """What `new_coder` asks of a harvest."""

    def __init__(self, d_in: int, d_out: int | None):
        self.d_in, self.d_out, self.target = d_in, d_out or d_in, d_out


def train_stage(recipe: Recipe, d_in: int, d_out: int | None, tokens: int, processes: int) -> Stage:
    """Time of steps at full size on random rows; memory by the count of what is held."""
    shape = Shape(d_in, d_out)
    step = SparseStep(new_coder(shape, recipe), dead_after_tokens=recipe.dead_after)
    rows = recipe.batch // processes
    x = torch.randn(rows, d_in) / d_in**0.5
    target = None if d_out is None else torch.randn(rows, d_out) / d_out**0.5
    seconds = median_seconds(lambda: step(x, target))
    weights = recipe.latents * (d_in + shape.d_out)
    held = min(recipe.memory, 2 * tokens * (d_in + (d_out or 0)))
    batch = 4 * recipe.batch * (3 * d_in + 2 * shape.d_out + 4 * recipe.k)
    chunk = 512 * recipe.latents * (4 + 2)
    return Stage(
        "train",
        f"{recipe.steps:,} steps of {recipe.batch:,} rows, {recipe.latents:,} latents, at "
        f"{seconds:.3g} s",
        recipe.steps * seconds,
        BASE + 4 * 3 * weights + 2 * recipe.latents * d_in + batch + chunk + held,
        2 * 4 * 3 * weights + 4 * weights,
    )


def features_stage(recipe: Recipe, d_in: int, d_out: int | None, tokens: int) -> Stage:
    """One pass over the shards: the encoder's product, timed on a batch."""
    coder = new_coder(Shape(d_in, d_out), recipe)
    x = torch.randn(1_024, d_in) / d_in**0.5
    seconds = median_seconds(lambda: coder.encode_sparse(x)) / len(x)
    tables = recipe.latents * (20 * 20 + 100 * 20 + 128 * 8 + 40)
    return Stage(
        "features",
        f"{tokens:,} rows at {1 / seconds:,.0f} rows/s, and the contexts of each latent as text",
        tokens * seconds + 0.004 * recipe.latents,
        BASE + 4 * recipe.latents * (d_in + (d_out or d_in)) + 2 * tables,
        tables / 2 + 5_000 * recipe.latents,
    )


def sentences(stages: list[Stage], folder: Path) -> list[str]:
    """The estimate as lines: each stage, the sum, and whether it fits on this machine."""
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
    free, (total, available) = shutil.disk_usage(there).free, memory()
    own = f"{total / GB:.1f} GB of memory" if total else "an unknown amount of memory"
    own += f" ({available / GB:.1f} GB available)" if available else ""
    lines.append(
        f"This machine has {own} and {free / GB:.1f} GB of disk free: "
        + verdict(peak, disk, available or total, free)
    )
    return lines


def verdict(peak: float, disk: float, room: float | None, free: float) -> str:
    """Whether it fits, and where not, what to change."""
    if disk > free:
        return "the disk is too small; harvest fewer tokens, or use another --folder."
    if room is not None and peak > room:
        return "the memory is too small; use bfloat16, fewer latents, or a smaller --batch-tokens."
    if room is not None and peak > 0.8 * room:
        return "it fits, barely: close other programs."
    return "it fits."
