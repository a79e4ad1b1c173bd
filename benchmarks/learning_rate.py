"""The learning rate's rule, from a sweep: explained variance on held-out rows by rate and width.

    python -m benchmarks.learning_rate [--tokens 100000] [--steps 600]

tiny-gemma's stream after its middle block, TopK coders of several widths, equal steps; the last
column is the rate that `training.peak_rate` chooses.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from mi_helpers.loading import load_model
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, peak_rate, read_log, train

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
WIDTHS = (288, 1_152, 4_608)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2_048)
    parser.add_argument("--k", type=int, default=16)
    options = parser.parse_args(argv)
    model = load_model()
    with tempfile.TemporaryDirectory() as name:
        folder, site = Path(name), ("resid_post", model.n_layers // 2)
        plan = HarvestConfig(site, tokens=options.tokens)
        held = harvest(model, open_source("tinyworld"), folder / "h", plan)
        print("latents   " + "".join(f"{rate:12.4f}" for rate in RATES) + "        rule")
        for latents in WIDTHS:
            cells = []
            for rate in RATES:
                config = TrainConfig(
                    latents=latents,
                    k=options.k,
                    batch=options.batch,
                    steps=options.steps,
                    rate=rate,
                    log_every=options.steps,
                    save_every=options.steps,
                )
                run = folder / f"{latents}-{rate}"
                train(held, run, config, progress=False)
                last = read_log(run / "log.csv")[-1]
                cells.append(f"{last['explained_variance']:6.4f} {last['dead']:5.1%}")
            row = "".join(f"{cell:>12}" for cell in cells)
            print(f"{latents:8,}  {row}{peak_rate(latents):12.4f}", flush=True)
    print("Each cell: explained variance on held-out rows, share of dead latents.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
