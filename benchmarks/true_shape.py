"""The pipeline at Gemma 2 2B's true size, with random weights: does it run, how fast, how large?

    python -m benchmarks.true_shape [--tokens 8192] [--steps 20] [--folder runs]

The model has every shape of google/gemma-2-2b, in bfloat16 (5.2 GB), and random weights, so that no
download is needed; text is TinyWorld's, in tiny-gemma's tokens. Harvest at layer 12, training steps
at full size (18,432 latents, k 32, batch 4,096), report, features. Beside each stage's time and
peak memory stands what `--dry-run` would have said.
"""

import argparse
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from mi_helpers.files import DATA
from mi_helpers.loading import empty_gemma2_2b, materialize
from mi_helpers.models import LanguageModel
from mi_helpers.saes import estimate
from mi_helpers.saes.features import collect
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.report import report
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, train
from mi_helpers.tinyworld.tokenizer import load_tokenizer

SITE = ("resid_post", 12)
GB = 1e9


def peak() -> float:
    """Peak resident memory since `forget_peak`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
        return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_peak() -> None:
    """Begin to count the peak anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return


@contextmanager
def stage(name: str):
    """Print the time and the peak memory of what is done inside."""
    forget_peak()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    print(f"{name:28} {seconds:8.1f} s   peak {peak() / GB:5.1f} GB", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--loss-tokens", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    options = parser.parse_args(argv)
    options.folder /= "true_shape"  # its own, made anew each time
    shutil.rmtree(options.folder, ignore_errors=True)
    config = TrainConfig(latents=18_432, k=32, batch=4_096, steps=options.steps, log_every=10)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    plan = HarvestConfig(SITE, tokens=options.tokens, context=options.context)
    planned = [
        estimate.harvest_stage(empty_gemma2_2b().config, torch.bfloat16, plan),
        estimate.train_stage(config, 2_304, None, options.tokens, 1),
        estimate.features_stage(config, 2_304, None, options.tokens),
    ]
    print("\n".join(["Estimated:", *estimate.sentences(planned, options.folder), "", "Measured:"]))
    with stage("model, random weights"):
        empty = materialize(empty_gemma2_2b(), torch.bfloat16)
        model = LanguageModel(empty.hf, load_tokenizer(DATA / "tiny_gemma"), "gemma-2-2b's shape")
    with stage(f"harvest, {options.tokens:,} tokens"):
        held = harvest(model, open_source("tinyworld"), options.folder / "harvest", plan)
    with stage(f"train, {options.steps} steps"):
        coder = train(held, options.folder, config)
    with stage("features, without contexts"):
        found = collect(held, coder, progress=True)
    with stage("report, with the model"):
        numbers = report(held.folder, options.folder, model, options.loss_tokens)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(
        f"explained variance {numbers['explained_variance']:.3f}, L0 {numbers['l0']:.1f}, "
        f"{found.dead:.1%} of the latents silent on {found.rows:,} rows, "
        f"loss {numbers['loss']['clean']:.2f}, spliced {numbers['loss']['spliced']:.2f}; "
        f"{size / GB:.2f} GB on disk"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
