"""Makes what ships in data/sae: a coder of tiny-gemma's middle layer, and a table of smaller runs.

    python -m mi_helpers make-sae

The table, grid.csv, is over widths, sparsities, activations and seeds. The same model and the same
machine give the same files.
"""

from __future__ import annotations

import csv
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.lessons.lesson_06.experiments import CODER, GRID, SHIPPED, K, middle
from mi_helpers.lessons.lesson_06.rivals import CONCEPTS
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.coder import SparseCoder, shrinkage
from mi_helpers.saes.concepts import best_latents, count_latents, strong_firings
from mi_helpers.saes.features import firings
from mi_helpers.saes.files import save_coder
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.labels import LabelledTokens, labelled_tokens
from mi_helpers.saes.report import held_out_texts, losses_replaced, predict, predicted, zeros
from mi_helpers.saes.similarity import share_found
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, fit, quality

WIDTHS, KS = (1, 2, 4, 8, 16), (2, 4, 8, 16, 32)  # in units of d_model; latents per token
PENALTIES = (0.02, 0.04, 0.08, 0.14, 0.22)  # of ReLU with L1
COLUMNS = (
    "activation",
    "width",
    "k",
    "sparsity",
    "seed",
    "explained_variance",
    "nmse",
    "l0",
    "dead",
    "loss_recovered",
    "shrinkage",
    "f1",
    "latents_per_topic",
    "shared",
)


@dataclass(frozen=True)
class Bench:
    """What every run of the table is trained and measured on.

    Args:
        model, held: the model, and the harvest of its stream.
        x, test: rows to train on, and held-out rows.
        texts: held-out texts, as token ids without BOS.
        labelled: labelled tokens.
        clean, zero: the model's loss per token on the texts, and with zeros at the site.
    """

    model: LanguageModel
    held: Activations
    x: Tensor
    test: Tensor
    texts: list[list[int]]
    labelled: LabelledTokens
    clean: float
    zero: float

    @classmethod
    def make(cls, model: LanguageModel, held: Activations, tokens: int = 16_000) -> Bench:
        """From a harvest, whose last rows are held out, and so many labelled tokens."""
        n = held.rows - min(8_192, held.rows // 10)
        x, texts = held.slice(0, held.rows)[0], held_out_texts(held, n, 3_000)
        losses = losses_replaced(model, held, texts, {"clean": None})
        losses |= losses_replaced(model, held, texts, {"zero": zeros}, everywhere=True)
        clean, zero = (mean_loss(losses[name], texts) for name in ("clean", "zero"))
        labelled = labelled_tokens(model, middle(model), tokens, seed=1)
        return cls(model, held, x[:n], x[n:], texts, labelled, clean, zero)

    def row(self, coder: SparseCoder, **settings) -> dict:
        """A row of the table: the settings, and the coder's measures."""
        with torch.no_grad():
            predicted = coder.decode_sparse(*coder.encode_sparse(self.test), self.test)
        by_coder = {"spliced": lambda x, _: predict(coder, x)}
        losses = losses_replaced(self.model, self.held, self.texts, by_coder)
        spliced = mean_loss(losses["spliced"], self.texts)
        labelled, measured = self.labelled, quality(coder, self.test)
        best = best_latents(coder, labelled, labelled.scorable(CONCEPTS))
        strong = strong_firings(firings(coder, labelled.x))
        fired = np.unique(firings(coder, self.x[:50_000]).latent)
        return settings | {
            "explained_variance": measured["explained_variance"],
            "nmse": measured["nmse"],
            "l0": measured["l0"],
            "dead": 1 - len(fired) / coder.d_latent,
            "loss_recovered": (self.zero - spliced) / (self.zero - self.clean),
            "shrinkage": shrinkage(self.test, predicted),
            "f1": float(np.median([each.f1 for each in best])),
            "latents_per_topic": float(count_latents(strong, labelled.truth).mean()),
            "shared": "",
        }


def mean_loss(sums: Tensor, texts: Sequence[Sequence[int]]) -> float:
    """The loss per token of texts whose losses have these sums."""
    return float(sums.sum()) / sum(predicted(ids) for ids in texts)


def make_grid(
    bench: Bench,
    widths: Sequence[int] = WIDTHS,
    ks: Sequence[int] = KS,
    penalties: Sequence[float] = PENALTIES,
    steps: int = 400,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """The rows of the table.

    TopK over widths (in units of d_model) and ks; a second seed of each width at k = K (or the
    largest k), to see what the two share; ReLU with an L1 penalty at the third width.
    """
    d, rows, seen = bench.x.shape[1], [], {}
    again = K if K in ks else max(ks)
    plan = [("topk", w, k, 0.0, 0) for w in widths for k in ks]
    plan += [("topk", w, again, 0.0, 1) for w in widths]
    plan += [("relu", widths[min(2, len(widths) - 1)], 0, penalty, 0) for penalty in penalties]
    for activation, width, k, sparsity, seed in plan:
        settings = {"activation": activation, "k": k, "sparsity": sparsity, "seed": seed}
        coder = fit(bench.x, TrainConfig(width * d, steps=steps, batch=1_024, **settings))
        row = bench.row(coder, **settings, width=width * d)
        if (activation, k) == ("topk", again):
            first = seen.setdefault(width, coder)
            if first is not coder:
                row["shared"] = share_found(first.W_dec.detach(), coder.W_dec.detach())
        rows.append(row)
        say(
            f"{activation:5} {width * d:5} latents, k {k:2}: explained variance "
            f"{row['explained_variance']:.3f}, L0 {row['l0']:.1f}, F1 {row['f1']:.2f}"
        )
    return rows


def write_grid(rows: Sequence[Mapping], path: Path = GRID) -> Path:
    """Write the table as a CSV file, numbers to four digits, whole or not at all; its path."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            cells = (row[name] for name in COLUMNS)
            writer.writerow([f"{c:.4g}" if isinstance(c, float) else c for c in cells])
    os.replace(temporary, path)
    return path


def make_sae(
    model: LanguageModel,
    folder: Path = SHIPPED,
    *,
    tokens: int = 250_000,
    steps: int = 1_000,
    grid_steps: int = 400,
    grid: Mapping | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Make data/sae: `tiny_gemma/` (cfg.json, sae_weights.safetensors) and grid.csv; their paths.

    Args:
        tokens: of text to train on.
        steps, grid_steps: of the coder that ships, and of each run of the table.
        grid: arguments of `make_grid` that are not the default.
    """
    start, site = time.monotonic(), middle(model)
    with tempfile.TemporaryDirectory() as scratch:
        config, source = HarvestConfig(site, tokens=tokens), open_source("tinyworld", 0)
        held = harvest(model, source, scratch, config, progress=False)
        say(f"harvested {held.rows:,} rows in {time.monotonic() - start:.0f} s")
        bench = Bench.make(model, held, tokens=min(16_000, tokens))
        width = 8 * model.d_model
        coder = fit(bench.x, TrainConfig(width, K, steps=steps, batch=4_096))
        row = bench.row(coder, activation="topk", width=width, k=K, sparsity=0.0, seed=0)
        save_coder(
            coder,
            folder / CODER.name,
            model_name=model.name,
            hook_name=f"blocks.{site[1]}.hook_{site[0]}",
            dataset="tinyworld",
            training_tokens=steps * 4_096,
            prepend_bos=True,
        )
        say(
            f"{CODER.name}: {width} latents, k {K}, explained variance "
            f"{row['explained_variance']:.3f}, loss recovered {row['loss_recovered']:.3f}, "
            f"dead {row['dead']:.1%}, F1 of the six concepts {row['f1']:.2f}, "
            f"{time.monotonic() - start:.0f} s"
        )
        rows = make_grid(bench, steps=grid_steps, say=say, **(grid or {}))
    write_grid(rows, folder / GRID.name)
    say(f"done after {time.monotonic() - start:.0f} s")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(folder: Path = SHIPPED) -> int:
    """Make the sparse autoencoder that ships in data/, and the table of its rivals.

    Args:
        folder: where to put them
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in make_sae(shipped_model(), folder):
        print(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes")
    print("Now write the checksums of data/: python -m mi_helpers manifest --write")
    return 0
