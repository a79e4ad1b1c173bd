"""Train a sparse coder on a harvest, or on rows in memory.

    config = TrainConfig(latents=1_152, k=16)
    coder = train(Activations.open("runs/demo/harvest"), "runs/demo", config)
    coder = fit(x, config)                      # rows x (n, d_in) in memory, no files

`train` continues from its last checkpoint when it was killed, and extends a finished run to more
steps (`extend`). A run's folder holds `recipe.json`
(what is trained, and on what), `log.csv`, `checkpoint.safetensors` until the run is complete, and
then `coder/`, in SAELens' layout, with the checksums of it, the recipe and the log in `SHA256SUMS`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mi_helpers.errors import checked, reading
from mi_helpers.files import (
    RunError,
    delete_replaced,
    flush,
    load_tensors,
    need_space,
    read_sealed,
    save_tensors,
    seal,
    sha256,
    sweep,
    why_not_written,
    write_atomically,
    write_sealed,
)
from mi_helpers.saes.activations import GIB, Activations, Shuffled, check_counts
from mi_helpers.saes.coder import SparseCoder, quality
from mi_helpers.saes.files import load_coder, save_coder
from mi_helpers.saes.gradients import Diverged
from mi_helpers.saes.processes import ALONE, Processes
from mi_helpers.saes.products import Products, checked_kinds, quickest
from mi_helpers.saes.progress import progress_bar
from mi_helpers.saes.run_files import (
    CHECKPOINT,
    CODER,
    LOG,
    RECIPE,
    SECONDS,
    check_recipe,
    identity,
    is_begun,
    is_extended_by,
    keep_log_until,
    log_row,
    origin,
    put_aside_if_extended,
    read_seconds,
    trained_coder,
    write_sums,
)
from mi_helpers.saes.run_files import (
    read_log as read_log,
)
from mi_helpers.saes.step import SparseStep, StepConfig

SEEDS = 10**8
CHOSEN = "chosen_products"
PRODUCTS = {
    kind: Products(tuple(dict.fromkeys((kind, "float32"))), "highest")
    for kind in ("float32", "bfloat16", "int8")
}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, and how.

    Args:
        latents, k, activation, skip: the coder's, see `coder.SparseCoder`.
        prefixes: widths of nested prefixes, which make a Matryoshka coder of it.
        products: how to multiply: "auto" chooses by the processor;
            "float32", "bfloat16" and "int8" are choices.
        sparsity: coefficient of the penalty, for relu and jumprelu; see `step.SparseStep`.
        dead_after: tokens without firing after which a latent is dead, and AuxK revives it.
        batch: rows per step, over all processes.
        steps: how many steps.
        rate: peak learning rate; 0 means `peak_rate(latents)`.
        warm_up, decay: shares of the steps in which the rate rises and falls.
        held_out: rows at the end of the text that are not trained on, at most a tenth of all.
        log_every, save_every: steps between rows of the log, and between checkpoints.
        seed: of the initial weights and of the order of the rows.
        memory: bytes of activations in memory, per process.
    """

    latents: int
    k: int = 32
    activation: str = "topk"
    skip: bool = False
    prefixes: tuple[int, ...] = ()
    products: str = "auto"
    sparsity: float = 0.0
    dead_after: int = 1_000_000
    batch: int = 4_096
    steps: int = 5_000
    rate: float = 0.0
    warm_up: float = 0.05
    decay: float = 0.8
    held_out: int = 8_192
    log_every: int = 50
    save_every: int = 250
    seed: int = 0
    memory: int = 2 * GIB

    def step(self, dead_after: int | None = None) -> StepConfig:
        """The settings of a training step."""
        dead_after = self.dead_after if dead_after is None else dead_after
        return StepConfig(dead_after=dead_after, sparsity=self.sparsity)


def peak_rate(latents: int) -> float:
    """The rule for the learning rate: 8e-3 up to 4,096 latents, then falling with 1/√latents."""
    return 8e-3 * min(1.0, math.sqrt(4_096 / latents))


def new_coder(config: TrainConfig, d_in: int, d_out: int | None = None) -> SparseCoder:
    """The coder of `config`, untrained: an SAE, or with `d_out` a transcoder.

    Raises:
        ValueError: what cannot be, such as k > latents.
    """
    coder = SparseCoder(
        d_in,
        config.latents,
        d_out,
        activation=config.activation,
        k=config.k,
        skip=config.skip,
        seed=config.seed,
    )
    return coder.nested_(config.prefixes) if config.prefixes else coder


def coder_for(held: Activations, config: TrainConfig) -> SparseCoder:
    """`new_coder` of the widths of a harvest."""
    return new_coder(config, held.d_in, held.d_out if held.target else None)


def learning_rate(step: int, config: TrainConfig, begun: int = 0) -> float:
    """The rate of step 0, 1, …: a linear rise, the peak, a linear fall to nearly 0.

    Args:
        begun: the steps of the finished run that this one extends; the rate rises anew after them.
    """
    peak, steps = config.rate or peak_rate(config.latents), config.steps - begun
    rise, fall = (max(1.0, share * steps) for share in (config.warm_up, config.decay))
    return peak * min(1.0, (step - begun + 1) / rise, (config.steps - step) / fall)


def check_config(config: TrainConfig, processes: Processes = ALONE) -> None:
    """Check what can be checked before there is a harvest.

    Raises:
        RunError: a number below 1, a negative rate or seed, an unknown product, or a batch that the
            processes cannot share equally.
    """
    counts = "latents", "k", "batch", "steps", "held_out", "dead_after", "log_every", "save_every"
    check_counts(config, (*counts, "memory"))
    if type(config.seed) is not int or not 0 <= config.seed < SEEDS:
        raise RunError(
            f"seed is {config.seed!r}: it has to be a whole number from 0 to {SEEDS - 1:,}."
        )
    for name in ("rate", "sparsity", "warm_up", "decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise RunError(f"{name} is {getattr(config, name)}: it has to be 0 or more.")
    if config.products not in ("auto", *PRODUCTS):
        listed = ", ".join(("auto", *PRODUCTS))
        raise RunError(f"products is {config.products!r}: choose one of {listed}.")
    if config.batch % processes.size:
        raise RunError(f"A batch of {config.batch} cannot be shared by {processes.size} processes.")


def split(held: Activations, config: TrainConfig, processes: Processes = ALONE) -> int:
    """The number of rows that are trained on: all but the held-out ones at the end of the text.

    Raises:
        RunError: there are fewer than a batch, or `check_config` raises.
    """
    check_config(config, processes)
    n = held.rows - min(config.held_out, held.rows // 10)
    if n < config.batch:
        raise RunError(
            f"The harvest has {n:,} rows to train on, fewer than one batch of {config.batch:,}: "
            "choose a smaller batch, or harvest more tokens into a new folder."
        )
    return n


def dead_window(config: TrainConfig, n: int) -> int:
    """Tokens without firing after which the log counts a latent as dead: at most one epoch, n."""
    return min(config.dead_after, n)


# --------------------------------------------------------------------------------- the run's files


def keep_config(folder: Path, config: TrainConfig, held: Activations, processes: Processes) -> dict:
    """Write what this run is, or check that the folder was begun with the same; what it keeps.

    How to multiply is chosen once and kept, because another choice would change the last bits. A
    recipe of which nothing was trained yet binds nobody.

    Raises:
        RunError: the folder holds a run with another setting or another harvest.
    """
    own = asdict(config) | {"harvest": identity(held)}
    check_recipe(folder, own, extends=True)
    processes.wait()
    if processes.first:
        if not (folder / RECIPE).exists() or not is_begun(folder):
            chosen = PRODUCTS.get(config.products) or quickest(processes.device)
            write_sealed(folder / RECIPE, own | {CHOSEN: asdict(chosen)})
        sweep(folder, RECIPE)
    processes.wait()
    return read_sealed(folder / RECIPE)


def finish_coder(coder: SparseCoder, folder: Path, about: dict) -> None:
    """Write the finished coder, whole or not at all; `about` goes into its cfg.json.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """

    def write(to: Path) -> None:
        save_coder(coder, to, **about)
        write_sums(to, folder)

    write_atomically(folder / CODER, write, load_coder)


# ------------------------------------------------------------------------------------- training


class Run:
    """A training run: the coder, its step, the order of the rows, and how far it is.

    Args:
        finished: the coder that it goes on from, where it extends a run.
    """

    def __init__(
        self,
        held: Activations,
        folder: Path,
        config: TrainConfig,
        recipe: dict,
        processes: Processes = ALONE,
        finished: SparseCoder | None = None,
    ):
        self.held, self.folder, self.config, self.processes = held, folder, config, processes
        self.n = split(held, config, processes)
        self.order = Shuffled(held, self.n, config.seed, config.memory)
        self.test = held.slice(self.n, held.rows)
        self.coder = coder_for(held, config).to(processes.device)
        self.begun: int = recipe.get("begun", 0)
        self.step_number, self.seconds, self.recipe = self.begun, 0.0, seal(recipe)
        if finished is not None:
            self.initialise().unfold_(finished.to(processes.device))
        with reading(folder / RECIPE, RunError, "Choose a new folder."):
            products = Products(checked_kinds(recipe[CHOSEN]["kinds"]), recipe[CHOSEN]["float32"])
        self.step = SparseStep(self.coder, config.step(), products=products, processes=processes)

    def begin(self) -> None:
        """Initialise from the first rows, or load the last checkpoint and the log until then.

        Raises:
            RunError: the checkpoint or the log is not what was written, or is of another recipe.
        """
        path, log, about = self.folder / CHECKPOINT, self.folder / LOG, {}
        advice = f"Delete {CHECKPOINT} to train from the beginning."
        if path.exists():
            tensors, about = load_tensors(path, advice=advice)
            if about.get("recipe") != self.recipe:
                raise RunError(f"{path} is of another run than {RECIPE} beside it. {advice}")
            with reading(path, RunError, advice):
                checked(about, path, RunError, step=int, log=(str, None))
                self.step.load_state_dict(tensors)
                self.step.top_k.go_on(about["kinds"], about["doubtful"])
                self.step_number = about["step"]
            self.seconds = read_seconds(self.folder / SECONDS)
        else:
            self.initialise()
        if self.processes.first:
            keep_log_until(log, self.step_number)
            if about and about["log"] != (sha256(log) if log.exists() else None):
                raise RunError(f"{log} is not what was written: its checksum differs. {advice}")

    def initialise(self) -> SparseCoder:
        """The coder, with the scales and b_dec of the first rows."""
        x, target = self.order.rows(0, min(self.n, max(self.config.batch, 8_192)))
        return self.coder.initialise(x, target)

    def advance(self) -> dict:
        """One step on this process's part of the next batch; the step's metrics."""
        begin = self.step_number * self.config.batch
        part = self.processes.share(self.config.batch)
        x, target = self.order.rows(begin + part.start, begin + part.stop)
        self.step.lr = learning_rate(self.step_number, self.config, self.begun)
        batch = [None if each is None else each.to(self.processes.device) for each in (x, target)]
        try:
            metrics = self.step(*batch)
        except Diverged:
            raise self.diverged("The weights diverged") from None
        self.step_number += 1
        return metrics

    def diverged(self, what: str) -> RunError:
        """What to do where the weights have diverged, so that nothing binds another rate."""
        if self.processes.first:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return RunError(
            f"{what} at step {self.step_number}: choose a lower --rate than "
            f"{self.config.rate or peak_rate(self.config.latents):.2g}, with which the training "
            "begins anew; the harvest is kept."
        )

    def log(self, metrics: dict) -> dict:
        """Append a row to the log: the batch's loss, dead latents, `quality` on held-out rows.

        A latent counts as dead here when it has not fired for `dead_window` tokens.

        Raises:
            RunError: the loss is not finite.
        """
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise self.diverged(f"The loss became {loss}")
        window = dead_window(self.config, self.n)
        row = {
            "step": self.step_number,
            "rate": learning_rate(self.step_number - 1, self.config, self.begun),
            "loss": loss,
            "dead": float((self.step.tokens_since_fired >= window).float().mean()),
            **quality(self.coder, *self.test),
        }
        log_row(self.folder / LOG, row)
        return row

    def save(self, seconds: float) -> None:
        """Write a checkpoint, after the log has been flushed to the disk.

        Raises:
            RunError: the disk is full, or the folder cannot be written.
        """
        log, top_k = self.folder / LOG, self.step.top_k
        about = {"step": self.step_number, "recipe": self.recipe, "log": None}
        if log.exists():
            try:
                flush(log)
                about["log"] = sha256(log)
            except OSError as error:
                raise RunError(why_not_written(log, error)) from error
        about |= {"kinds": top_k.kinds, "doubtful": top_k.doubtful}
        save_tensors(self.folder / CHECKPOINT, self.step.state_dict(), about)
        write_sealed(self.folder / SECONDS, {"seconds": round(seconds, 1)})


def train(
    held: Activations,
    folder: Path | str,
    config: TrainConfig,
    *,
    processes: Processes = ALONE,
    progress: bool = True,
) -> SparseCoder:
    """The coder of `config`, trained on a harvest; what is already in `folder` is not done again.

    A finished run is extended where config.steps is larger than its own: see `extend`.

    Args:
        folder: where the run's files are, or will be.
        processes: the processes that share each batch.
        progress: whether a progress bar is shown.

    Raises:
        RunError: too few rows, a folder with another run, a full disk, a damaged file, or a loss
            that is not finite.
        ValueError: what a coder cannot be, such as k larger than the dictionary.
    """
    folder = Path(folder)
    split(held, config, processes)
    with torch.device("meta"):
        coder_for(held, config)  # says now what would be wrong with it
    with processes.alone_in(folder):
        if processes.first:
            put_aside_if_extended(folder)
        processes.wait()
        done = (folder / CODER).is_dir() and not is_extended_by(folder, config.steps)
        needed = 0 if done else disk_needed(config, held.d_in, held.d_out)
        need_space(folder, needed, "The training")
        recipe = keep_config(folder, config, held, processes)
        if not done and (folder / CODER).is_dir():
            recipe = extend(held, folder, config, recipe, processes)
        if not done:
            learn(Run(held, folder, config, recipe, processes), progress)
        return finished(folder, processes)


def extend(
    held: Activations, folder: Path, config: TrainConfig, recipe: dict, processes: Processes
) -> dict:
    """Make a finished run one that is to go on to config.steps; its new recipe.

    It goes on from the coder, with the rows that come next. AdamW's moments are not kept with a
    coder, so the rate rises and falls anew over the added steps, and no latent counts as dead at
    first: the result is near that of a run of as many steps at once, and not the same. The coder
    until then, and what was made of it, moves to `coder-STEPS`.
    """
    recipe = recipe | {"steps": config.steps, "begun": recipe["steps"]}
    if (folder / f"{CODER}-{recipe['begun']}").exists():
        raise RunError(f"{folder / CODER}-{recipe['begun']} is there already: move it away.")
    run = Run(held, folder, config, recipe, processes, trained_coder(folder))
    processes.wait()
    if processes.first:
        run.save(read_seconds(folder / SECONDS))
        write_sealed(folder / RECIPE, recipe)
        put_aside_if_extended(folder)
    processes.wait()
    return recipe


def disk_needed(config: TrainConfig, d_in: int, d_out: int) -> int:
    """Bytes of a training on the disk: two checkpoints, and the coder."""
    return 4 * (2 * 3 + 1) * config.latents * (d_in + d_out)


def learn(run: Run, progress: bool) -> None:
    """Train a run to its end, from where it is, and write its coder."""
    config, processes = run.config, run.processes
    run.begin()
    shown = progress and processes.first
    start = time.monotonic() - run.seconds
    with progress_bar("train", config.steps, "steps", run.step_number, shown) as bar:
        while run.step_number < config.steps:
            metrics = run.advance()
            last = run.step_number == config.steps
            if processes.first and (run.step_number % config.log_every == 0 or last):
                row = run.log(metrics)
                ev, dead = row["explained_variance"], row["dead"]
                bar.set_postfix_str(f"explained variance {ev:.3f}, dead {dead:.1%}", refresh=False)
            if processes.first and (run.step_number % config.save_every == 0 or last):
                run.save(time.monotonic() - start)
            bar.update()
    if processes.first:
        finish_coder(run.coder, run.folder, origin(run.held))
    processes.wait()


def finished(folder: Path, processes: Processes) -> SparseCoder:
    """The coder of a complete run, whose checkpoint goes once the coder has been read back."""
    old = [folder / CHECKPOINT] if processes.first else []
    return delete_replaced(old, lambda: trained_coder(folder))


# ------------------------------------------------------------------------------ rows in memory


@torch.no_grad()
def fit(x: Tensor, config: TrainConfig, target: Tensor | None = None) -> SparseCoder:
    """The coder of `config`, trained on rows in memory: `train` without its files.

    The products are float32, so that the same machine gives the same numbers each time; and a
    latent is dead after at most a quarter of the run, or 100,000 tokens.

    Args:
        x: inputs (n, d_in); each step draws its rows anew, at random.
        target: what a transcoder predicts (n, d_out); None trains an SAE of x.

    Raises:
        ValueError: k larger than the dictionary, NaN in x, or a target of another length.
    """
    y = x if target is None else target
    if len(y) != len(x):
        raise ValueError(f"There are {len(x)} rows of input and {len(y)} of target.")
    coder = new_coder(config, x.shape[1], None if target is None else y.shape[1])
    coder.initialise(x[:8_192], y[:8_192])
    dead_after = min(config.dead_after, 100_000, config.steps * config.batch // 4)
    step = SparseStep(coder, config.step(dead_after), products=PRODUCTS["float32"])
    generator = torch.Generator().manual_seed(config.seed)
    for number in range(config.steps):
        step.lr = learning_rate(number, config)
        rows = torch.randint(len(x), (config.batch,), generator=generator)
        step(x[rows], None if target is None else y[rows])
    return coder.folded()
