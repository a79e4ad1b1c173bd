"""A training step of a sparse coder: this course's against other libraries', and what bounds it.

    python -m benchmarks.coders                 both sizes, then gradients, quality and files
    python -m benchmarks.coders --size small    d 256 and 4,096 latents only: half a minute
    python -m benchmarks.coders --only speed    one part: speed, gradients, quality or files
    python -m benchmarks.coders --quick         few steps; nothing is written

It runs in the environment of `benchmarks/requirements-coders.txt`; a peer that is not installed is
left out. Each contender is timed in a process of its own, one after the other, so that its peak of
memory is its own too. The tables go to `results` and README.md here.
"""

import argparse
import csv
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.files import put_between
from mi_helpers.loading import load_model
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.files import load_coder, save_coder
from mi_helpers.saes.products import (
    Products,
    float32_precision,
    quickest,
    weighted_sums,
)
from mi_helpers.saes.step import SparseStep
from mi_helpers.tinyworld.world import World

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- bench coders -->", "<!-- /bench coders -->"
OURS = "this course"


@dataclass(frozen=True)
class Size:
    d_in: int
    d_latent: int
    k: int
    batch: int


SIZES = {"reference": Size(2304, 18_432, 32, 4096), "small": Size(256, 4096, 32, 4096)}
BATCHES = {"reference": 4, "small": 16}  # in turn: who sees one batch 75 times learns it by heart
BOUND = 2.1  # of our step over the encoder's bfloat16 product, at the reference size
# How many times faster: first where all have the same float32 product, then as the peers come.
WANTED = {
    "reference": {
        "SAELens": (12, 15),
        "dictionary_learning": (9, 13),
        "plain dense": (8, 12),
        "sparsify": (3, 5),
    },
    "small": {
        "SAELens": (0, 10),
        "dictionary_learning": (0, 8),
        "plain dense": (0, 8),
        "sparsify": (0, 3.5),
    },
}
PACKAGES = {
    "SAELens": "sae_lens",
    "SAELens, sparse": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
}


# ------------------------------------------------------------------------------- contenders

# Each is made from a size and a number of steps, and has step(x, share), where share is how much of
# its peak learning rate to use, and predict(x). Inputs have unit mean squared norm.


class Ours:
    """`SparseStep`, with the products that are quickest on this machine."""

    rate, scale, products, dense = 8e-3, 1.0, None, False

    def __init__(self, size: Size, x: Tensor, steps: int, rate: float | None = None):
        self.coder = SparseCoder(size.d_in, size.d_latent, k=size.k).initialise(x)
        self.peak = rate or self.rate
        self.trainer = SparseStep(self.coder, products=self.products, dense=self.dense)

    def step(self, x: Tensor, share: float) -> None:
        self.trainer.lr = share * self.peak
        self.trainer(x)

    def predict(self, x: Tensor) -> Tensor:
        return self.coder(x)


class OursFloat32(Ours):
    """The same without bfloat16, as on a processor that is slow at it."""

    products = Products(("float32",), "medium")


class OursDense(Ours):
    """The same model, loss and optimiser, its gradients from autograd."""

    dense = True


class PlainDense:
    """A TopK autoencoder as one writes it down: dense matrices, autograd, torch's AdamW."""

    rate, scale = 8e-3, 1.0

    def __init__(self, size: Size, x: Tensor, steps: int, rate: float | None = None):
        torch.manual_seed(0)
        W_dec = F.normalize(torch.randn(size.d_latent, size.d_in), dim=1)
        self.W_enc, self.W_dec = nn.Parameter(W_dec.T.clone()), nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(torch.zeros(size.d_latent))
        self.b_dec = nn.Parameter(x.mean(0))
        self.k, self.peak = size.k, rate or self.rate
        parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    def predict(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=1)
        f = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return f @ self.W_dec + self.b_dec

    def step(self, x: Tensor, share: float) -> None:
        (x - self.predict(x)).pow(2).sum(1).mean().backward()
        with torch.no_grad():
            row, gradient = self.W_dec, self.W_dec.grad
            gradient -= (gradient * row).sum(1, keepdim=True) * row
        self.optimizer.param_groups[0]["lr"] = share * self.peak
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


class SAELens:
    """SAELens' own SAETrainer and TopKTrainingSAE, on inputs of mean norm √d, as it advises."""

    rate, settings = 1e-3, {}

    def __init__(self, size: Size, x: Tensor, steps: int, rate: float | None = None):
        from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        torch.manual_seed(0)
        config = TopKTrainingSAEConfig(
            d_in=size.d_in, d_sae=size.d_latent, k=size.k, **self.settings
        )
        self.scale, self.peak = math.sqrt(size.d_in), rate or self.rate
        self.sae = TopKTrainingSAE(config)
        self.sae.b_dec.data = self.scale * x.mean(0)
        samples = {"total_training_samples": steps * size.batch}
        training = SAETrainerConfig(
            train_batch_size_samples=size.batch, lr=self.peak, lr_end=self.peak, **samples
        )
        self.trainer = SAETrainer(training, self.sae, data_provider=iter(()))

    def step(self, x: Tensor, share: float) -> None:
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = share * self.peak
        self.trainer.lr_scheduler.step = lambda: None
        self.trainer.step(self.scale * x)

    def predict(self, x: Tensor) -> Tensor:
        return self.sae(self.scale * x) / self.scale


class SAELensSparse(SAELens):
    """With use_sparse_activations; on the CPU that needs rescaling by decoder norms to be off."""

    settings = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}


class DictionaryLearning:
    """dictionary_learning's own TopKTrainer, on inputs of unit mean squared norm, as it says."""

    rate, scale = 1e-3, 1.0

    def __init__(self, size: Size, x: Tensor, steps: int, rate: float | None = None):
        if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
            # imported for its harvest, which is not used here
            sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=object)
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.peak, self.steps = rate or self.rate, 0
        self.trainer = TopKTrainer(
            steps=max(steps, 4),
            activation_dim=size.d_in,
            dict_size=size.d_latent,
            k=size.k,
            layer=0,
            lm_name="none",
            lr=self.peak,
            warmup_steps=1,
            seed=0,
            device="cpu",
        )
        self.trainer.scheduler.step = lambda: None

    def step(self, x: Tensor, share: float) -> None:
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = share * self.peak
        self.trainer.update(self.steps, x)
        self.steps += 1

    def predict(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


class Sparsify:
    """sparsify's SparseCoder, stepped as its Trainer does it within a model's hooks."""

    rate, scale, optimizer = 5e-3, 1.0, "signum"

    def __init__(self, size: Size, x: Tensor, steps: int, rate: float | None = None):
        from sparsify import SparseCoder as Coder
        from sparsify import SparseCoderConfig

        torch.manual_seed(0)
        self.coder = Coder(size.d_in, SparseCoderConfig(num_latents=size.d_latent, k=size.k))
        self.coder.b_dec.data = x.mean(0)
        self.peak = rate or self.rate / math.sqrt(size.d_latent / 2**14)
        self.fired = torch.zeros(size.d_latent, dtype=torch.int64)
        parameters = self.coder.parameters()
        if self.optimizer == "adam":
            self.updates = torch.optim.Adam(parameters)
            return
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        self.updates = ScheduleFreeWrapper(SignSGD(parameters, lr=self.peak), momentum=0.95)
        self.updates.train()

    def step(self, x: Tensor, share: float) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        dead = self.fired > 10_000_000
        out = self.coder(x, x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        (out.fvu + out.auxk_loss / 32).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        if self.optimizer == "adam":  # the other one needs no schedule
            self.updates.param_groups[0]["lr"] = share * self.peak
        self.updates.step()
        self.updates.zero_grad()
        self.fired += len(x)
        self.fired[out.latent_indices.flatten()] = 0

    def predict(self, x: Tensor) -> Tensor:
        if self.optimizer == "signum":
            self.updates.eval()
        self.coder.set_decoder_norm_to_unit_norm()
        return self.coder(x).sae_out


class SparsifyAdam(Sparsify):
    """With its other optimiser."""

    rate, optimizer = 1e-3, "adam"


class Product:
    """The encoder's product alone, of the whole batch: what no step can go below."""

    dtype = torch.float32

    def __init__(self, size: Size, x: Tensor, steps: int):
        self.W = torch.randn(size.d_latent, size.d_in).to(self.dtype)
        self.x = x.to(self.dtype)

    def step(self, x: Tensor, share: float) -> None:
        self.x @ self.W.T


class LowProduct(Product):
    """The same in bfloat16."""

    dtype = torch.bfloat16


CONTENDERS = {
    OURS: Ours,
    f"{OURS}, float32 product": OursFloat32,
    "plain dense": PlainDense,
    "SAELens": SAELens,
    "SAELens, sparse": SAELensSparse,
    "dictionary_learning": DictionaryLearning,
    "sparsify": Sparsify,
    "encoder's product": Product,
    "encoder's product, bfloat16": LowProduct,
}


def installed(name: str) -> bool:
    package = PACKAGES.get(name)
    return package is None or importlib.util.find_spec(package) is not None


# ------------------------------------------------------------------------------------ speed


def sparse_rows(size: Size, rows: int, seed: int) -> Tensor:
    """Sums of 64 of d_latent random directions, and some noise; unit mean squared norm."""
    generator = torch.Generator().manual_seed(0)
    table = F.normalize(torch.randn(size.d_latent, size.d_in, generator=generator), dim=1)
    generator.manual_seed(seed + 1)
    chosen = torch.randint(0, size.d_latent, (rows, 64), generator=generator)
    amounts = torch.rand(rows, 64, generator=generator)
    x = weighted_sums(table, chosen, amounts)
    x += 0.5 * torch.randn(rows, size.d_in, generator=generator) / math.sqrt(size.d_in)
    return x / x.pow(2).sum(1).mean().sqrt()


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def worker(name: str, size_name: str, precision: str, steps: int) -> None:
    """Time one contender in this process; print milliseconds of each step and peak memory."""
    size = SIZES[size_name]
    batches = [sparse_rows(size, size.batch, seed) for seed in range(BATCHES[size_name])]
    torch.set_float32_matmul_precision(precision)
    contender = CONTENDERS[name]
    small = Size(32, 64, 4, 64)  # import and warm up everything, then forget its memory
    contender(small, sparse_rows(small, 64, 0), 4).step(sparse_rows(small, 64, 0), 1.0)
    before = memory("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    made, times = contender(size, batches[0], steps + 1), []
    for number in range(steps + 1):
        start = time.perf_counter()
        made.step(batches[number % len(batches)], 0.1)
        times.append(1000 * (time.perf_counter() - start))
    print(json.dumps({"times": times[1:], "memory": memory("VmHWM") - before}))


def timed(name: str, size: str, precision: str, steps: int) -> dict | None:
    """`worker` in a new process: its median and its memory; None where it failed."""
    arguments = ["--worker", name, size, precision, str(steps)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.coders", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"ms": statistics.median(found["times"]), "memory": found["memory"]}


def speed(size: str, quick: bool) -> list[dict]:
    """Milliseconds a step and peak memory of every contender, with both float32 products.

    "highest" is how they come; "medium" lets PyTorch take oneDNN's float32 product, which is about
    twice as fast as MKL's on AMD.
    """
    rows = []
    for name in CONTENDERS:
        if not installed(name):
            continue
        fast = name == OURS or "product" in name
        steps = (7 if fast else 2) if quick else (15 if fast else 4)
        steps *= 5 if size == "small" else 1
        row = {"size": size, "contender": name}
        for setting in ("medium", "highest"):
            if name.endswith("bfloat16") and setting == "medium":
                continue
            found = timed(name, size, setting, steps)
            if found:
                row[f"ms, {setting}"] = round(found["ms"], 1)
                row["memory, MB"] = max(row.get("memory, MB", 0), round(found["memory"] / 1e6))
        rows.append(row)
        print(f"  {name}: {row.get('ms, medium', '-')} and {row.get('ms, highest', '-')} ms")
    return rows


def speed_table(size: str, rows: list[dict]) -> list[dict]:
    """The claims: how many times faster, the stricter comparison first."""
    held = {row["contender"]: row for row in rows}
    ours = held[OURS]
    table = []
    for name, row in held.items():
        if name.startswith(OURS) or "product" in name or "ms, highest" not in row:
            continue
        wanted = WANTED[size].get(name, ("", ""))
        entry = {"size": size, "against": name}
        entry["ms, ours"], entry["ms, theirs"] = ours["ms, highest"], row.get("ms, highest")
        for setting, least in zip(("medium", "highest"), wanted, strict=True):
            if f"ms, {setting}" in row:
                ratio = row[f"ms, {setting}"] / ours[f"ms, {setting}"]
                told = "same float32 product" if setting == "medium" else "as it comes"
                entry[f"times faster, {told}"] = round(ratio, 1)
                entry[f"wanted, {told}"] = least or ""
        entry["its memory, MB"], entry["ours, MB"] = row.get("memory, MB"), ours.get("memory, MB")
        table.append(entry)
    return table


def bounds(size: str, rows: list[dict]) -> str:
    """Our step in units of the encoder's bfloat16 product, and what it is without bfloat16."""
    held = {row["contender"]: row for row in rows}

    def ms(name: str, setting: str = "highest") -> float:
        return float(held[name][f"ms, {setting}"])

    told = f", wanted at most {BOUND}" if size == "reference" else ""
    full, fast = ms(f"{OURS}, float32 product"), ms("encoder's product", "medium")
    ratio = ms(OURS) / ms("encoder's product, bfloat16")
    return (
        f"At the {size} size a step takes {ms(OURS):.0f} ms: {ratio:.2f} times the encoder's "
        f"bfloat16 product alone{told}. Without bfloat16 it takes {full:.0f} ms, {full / fast:.2f} "
        "times the float32 product."
    )


# --------------------------------------------------------------------------------- gradients


def gradients() -> list[dict]:
    """The largest difference from dense autograd, over the largest entry of each gradient."""
    size = SIZES["small"]
    x = sparse_rows(size, size.batch, seed=0)
    coder = SparseCoder(size.d_in, size.d_latent, k=size.k).initialise(x)
    rows = []
    for steps in (0, 20):
        step = SparseStep(coder, lr=1e-3)
        for _ in range(steps):
            step(x)
        step.tokens_since_fired[::9] = step.config.dead_after
        by_pairs = step.gradients(x)
        with float32_precision("highest"):
            dense = SparseStep(coder, dense=True, products=Products(("float32",), "highest"))
            dense.tokens_since_fired.copy_(step.tokens_since_fired)
            by_autograd = dense.gradients(x)
        for name, gradient in by_pairs.items():
            off = (gradient - by_autograd[name]).abs().max() / by_autograd[name].abs().max()
            rows.append({"after steps": steps, "gradient of": name, "difference": f"{off:.1e}"})
    return rows


# ----------------------------------------------------------------------------------- quality

RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def activations(rows: int, held_out: int) -> tuple[Tensor, Tensor]:
    """tiny-gemma's stream after its middle layer, without BOS; to train on, and held out."""
    model = load_model()
    layer = model.n_layers // 2 - 1
    found, n = [], 0
    with torch.no_grad():
        for document in islice(World().documents(seed=11), 100_000):
            ids = model.tokenizer.encode(document.text, add_special_tokens=False)
            ids = torch.tensor([[model.tokenizer.bos_token_id, *ids[: model.n_ctx - 1]]])
            _, cache = model.run_with_cache(ids, ("resid_post", layer), stop_at_layer=layer + 1)
            found.append(cache["resid_post", layer][0, 1:].float())
            n += len(found[-1])
            if n >= rows + held_out:
                break
    x = torch.cat(found)[: rows + held_out]
    x = x / x.pow(2).sum(1).mean().sqrt()
    return x[:rows], x[rows:]


def trained(contender: Callable, size: Size, x: Tensor, test: Tensor, steps: int, rate: float):
    """Explained variance on held-out rows after so many steps, warmed up and then falling."""
    made = contender(size, x[:8192], steps, rate)
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        batch = x[torch.randint(len(x), (size.batch,), generator=generator)]
        made.step(batch, min(1.0, (i + 1) / (0.05 * steps), (steps - i) / (0.8 * steps)))
    with torch.no_grad():
        return explained_variance(test, made.predict(test))


def quality(quick: bool) -> list[dict]:
    """Explained variance at equal steps on tiny-gemma's stream, each at its own best rate."""
    steps = 60 if quick else 600
    x, test = activations(20_000 if quick else 100_000, 4_000)
    size = Size(x.shape[1], 8 * x.shape[1], 16, 1024)
    contenders = {
        OURS: Ours,
        f"{OURS}, gradients from autograd": OursDense,
        "plain dense": PlainDense,
        "SAELens": SAELens,
        "dictionary_learning": DictionaryLearning,
        "sparsify": Sparsify,
        "sparsify, adam": SparsifyAdam,
    }
    rows = []
    for name, contender in contenders.items():
        if not installed(name.split(",")[0]):
            continue
        row = {"contender": name, "steps": steps}
        for rate in RATES:
            row[f"rate {rate:g}"] = round(trained(contender, size, x, test, steps, rate), 4)
        row["best"] = max(row[f"rate {rate:g}"] for rate in RATES)
        rows.append(row)
        print(f"  {name}: {row['best']}")
    return rows


# ------------------------------------------------------------------------------------- files


SCOPE = {  # release of SAELens → the file's folder in it; widths and L0 as published
    "gemma-scope-2b-pt-res": "layer_12/width_16k/average_l0_82",
    "gemma-scope-2b-pt-transcoders": "layer_12/width_16k/average_l0_6",
}


def write_scope(path: Path, d_in: int = 2304, d_latent: int = 16_384) -> None:
    """A params.npz with the names, shapes and dtypes of Gemma Scope's, and random numbers."""
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((d_latent, d_in), np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    biases = {"b_enc": d_latent, "b_dec": d_in}
    arrays = {name: 0.1 * rng.standard_normal(n, np.float32) for name, n in biases.items()}
    threshold = 2.5 + 0.2 * rng.random(d_latent, np.float32)
    path.parent.mkdir(parents=True)
    np.savez(path, W_enc=W_dec.T, W_dec=W_dec, threshold=threshold, **arrays)


def scope_files() -> list[dict]:
    """Gemma Scope's format at its true size, read here and by SAELens' own loader, offline."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    rows, x = [], torch.randn(200, 2304, generator=torch.Generator().manual_seed(0))
    for release, name in SCOPE.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / release / name / "params.npz"
            write_scope(path)
            with mock.patch.object(loaders, "hf_hub_download", lambda *_, path=path, **__: path):
                theirs = SAE.from_pretrained(release, name)
            coder = load_coder(Path(folder) / release, name)
            f, f_theirs = coder.encode(x), theirs.encode(x)
            off = max((f - f_theirs).abs().max(), (coder(x) - theirs(x)).abs().max())
            l0 = (f > 0).sum(1).float().mean()
        kind = f"Gemma Scope: {type(theirs).__name__}, {release}, L0 {l0:.0f}"
        rows.append({"file": kind, "read there": "", "read here": f"{off:.1e}"})
    return rows


def files() -> list[dict]:
    """Coders written here and read by SAELens, and back; Gemma Scope's and sparsify's files; the
    largest differences between what the two predict."""
    rows, x = [], torch.randn(500, 24, generator=torch.Generator().manual_seed(0))
    kinds = [(a, None, False) for a in ("relu", "topk", "jumprelu", "batchtopk")]
    kinds += [(a, 16, skip) for a in ("relu", "jumprelu") for skip in (False, True)]
    for activation, d_out, skip in kinds if installed("SAELens") else []:
        from sae_lens import SAE

        k = 8 if "topk" in activation else None
        coder = SparseCoder(24, 96, d_out, activation=activation, k=k, skip=skip)
        for number, parameter in enumerate(coder.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = (parameter.data + 0.3 * noise).abs() - 0.2
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save_coder(coder, folder)
            theirs = SAE.load_from_disk(folder)
            there = (theirs(x) - coder(x)).abs().max()
            theirs.save_model(Path(folder) / "again")
            back = (load_coder(Path(folder) / "again")(x) - theirs(x)).abs().max()
        kind = f"{type(theirs).__name__} ({activation})"
        rows.append(
            {"file": f"SAELens: {kind}", "read there": f"{there:.1e}", "read here": f"{back:.1e}"}
        )
    rows += scope_files() if installed("SAELens") else []
    for transcode in (False, True) if installed("sparsify") else []:
        from sparsify import SparseCoder as Coder
        from sparsify import SparseCoderConfig

        config = SparseCoderConfig(
            num_latents=96, k=8, transcode=transcode, skip_connection=transcode
        )
        theirs = Coder(24, config)
        for parameter in theirs.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            theirs.save_to_disk(folder)
            back = (load_coder(folder)(x) - theirs(x).sae_out).abs().max()
        kind = "skip transcoder" if transcode else "SAE"
        rows.append({"file": f"sparsify: {kind}", "read there": "", "read here": f"{back:.1e}"})
    return rows


# -------------------------------------------------------------------------------------- main


def show(rows: list[dict], title: str) -> None:
    """Print a table, columns aligned."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    print("\n".join(["", title, *(line.rstrip() for line in lines), ""]))


def keep(name: str, rows: list[dict]) -> None:
    """The rows as benchmarks/results/name.csv."""
    RESULTS.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(RESULTS / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def kept(name: str, folder: Path = RESULTS) -> list[dict]:
    """The rows of benchmarks/results/name.csv; [] where it was not measured."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(folder: Path = RESULTS) -> str:
    """All that was measured, between the markers."""
    parts = [BEGIN]
    speeds = {size: kept(f"coders_speed_{size}", folder) for size in SIZES}
    if ratios := [row for size in SIZES for row in kept(f"coders_ratios_{size}", folder)]:
        parts.append(table(ratios))
        parts += [bounds(size, rows) for size, rows in speeds.items() if rows]
    if rows := kept("coders_gradients", folder):
        worst = max(rows, key=lambda row: float(row["difference"]))["difference"]
        parts.append(f"Largest difference of a gradient from dense autograd's, relative: {worst}.")
    if rows := kept("coders_quality", folder):
        steps = rows[0]["steps"]
        parts.append(
            f"Explained variance on held-out text after {steps} steps on tiny-gemma's stream, each "
            f"at the best of {len(RATES)} learning rates:"
        )
        parts.append(table([{name: row[name] for name in ("contender", "best")} for row in rows]))
    if rows := kept("coders_files", folder):
        parts.append("Largest differences between predictions from the same file:")
        parts.append(table(rows))
    return "\n\n".join([*parts, END])


def update_page(path: Path = PAGE, folder: Path = RESULTS) -> bool:
    """Put the tables between the markers; False where there are none."""
    return put_between(path, BEGIN, END, markdown(folder))


def machine() -> str:
    """What the numbers depend on."""
    model = "processor unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((li.split(": ")[1] for li in lines if li.startswith("model name")), model)
    names = ("torch", "sae-lens", "dictionary_learning", "eai-sparsify")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    found = quickest(torch.device("cpu"))
    return (
        f"{model}, {torch.get_num_threads()} threads, {', '.join(versions)}; products from the "
        f"quickest: {', '.join(found.kinds)}; setting for float32: {found.float32}"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coders", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=list(SIZES), help="one of the two sizes")
    parser.add_argument("--only", choices=["speed", "gradients", "quality", "files"])
    parser.add_argument("--quick", action="store_true", help="few steps; nothing is written")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        name, size, precision, steps = options.worker
        worker(name, size, precision, int(steps))
        return 0
    parts = [options.only] if options.only else ["speed", "gradients", "quality", "files"]
    print(machine())
    if "speed" in parts:
        tables, everything = [], []
        for size in [options.size] if options.size else list(SIZES):
            print(f"{size}: {SIZES[size]}")
            rows = speed(size, options.quick)
            print(bounds(size, rows))
            everything += rows
            tables += speed_table(size, rows)
            if not options.quick:
                keep(f"coders_speed_{size}", rows)
                keep(f"coders_ratios_{size}", speed_table(size, rows))
        show(tables, "How many times faster this course's step is")
        show(everything, "Milliseconds a step, and peak memory above the imports")
    for part, run, title in (
        ("gradients", gradients, "Gradients by pairs against dense autograd"),
        ("quality", lambda: quality(options.quick), "Explained variance at equal steps, held out"),
        ("files", files, "Largest difference between predictions from the same file"),
    ):
        if part in parts:
            rows = run()
            show(rows, title)
            if not options.quick:
                keep(f"coders_{part}", rows)
    if not options.quick and not update_page():
        print(f"{PAGE.name} has no markers {BEGIN} … {END}: put them where the tables should be.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
