"""The log of a run: loss by family, skills and head scores, dense where induction rises."""

import copy
import csv
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mi_helpers.files import write_atomically
from mi_helpers.tiny_gemma.skills import Suite

RISEN = 0.3  # induction has risen when the highest score of any head is above this
DENSE, SPARSE, AROUND = 50, 400, 500  # steps between rows of the log; the dense ones' distance


def is_logged(step: int, steps: int, rise: int | None) -> bool:
    """Whether the log has a row: every SPARSE steps, and every DENSE ones around the rise.

    `rise` is the first multiple of DENSE at which the highest induction score is above RISEN.
    """
    near = rise is not None and abs(step - rise) <= AROUND
    return step in (0, steps) or step % (DENSE if near else SPARSE) == 0


def log_row(path: Path, row: dict) -> None:
    """Append a row to a CSV, with a header when it is new."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_log(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_log(path: Path, rows: list[dict]) -> None:
    """All rows at once, in the order of their steps."""

    def write(to: Path) -> None:
        to.touch()
        for row in sorted(rows, key=lambda row: int(row["step"])):
            log_row(to, row)

    write_atomically(path, write)


def keep_log_until(path: Path, step: int) -> None:
    """Drop rows that a killed run wrote after its last checkpoint."""
    if path.exists():
        write_log(path, [row for row in read_log(path) if int(row["step"]) <= step])


class Log:
    """A run's `log.csv`: dense where induction rises, which is known only afterwards.

    `batch` is the number of tokens of a step. Until induction has risen, every DENSE steps cost a
    measurement of the heads and a copy of the weights (`copy-STEP.safetensors`), from which the
    rows before the rise are written when it comes.
    """

    def __init__(self, folder: Path, suite: Suite, steps: int, batch: int, state: dict):
        self.folder, self.suite, self.steps, self.batch = folder, suite, steps, batch
        self.path, self.rise, self.start = folder / "log.csv", state.get("rise"), state.get("step")
        keep_log_until(self.path, -1 if self.start is None else self.start)

    def write(self, model, about: dict) -> None:
        """The row of the model as it is; `about` has its step."""
        row = {**about, **self.suite.brief(model)}
        log_row(self.path, row)
        print(f"\n{json.dumps(row)}", flush=True)

    def at(self, step: int, model, **about) -> None:
        """What the log needs at a step, before it is taken; `about` goes into its row."""
        done = step == self.start  # before the run was interrupted
        if done or step % DENSE and step != self.steps:
            return
        about = {"step": step, "tokens": step * self.batch, **about}
        model.eval()
        if self.rise is None:
            if self.suite.head_scores(model)[0] > RISEN:
                self.rise = step
                self.fill(model)
            else:
                tensors = {name: p.detach() for name, p in model.named_parameters()}
                said = {"about": json.dumps(about)}
                path = self.folder / f"copy-{step}.safetensors"
                write_atomically(path, lambda to: save_file(tensors, to, said))
        if is_logged(step, self.steps, self.rise):
            self.write(model, about)
        model.train()

    def copies(self) -> dict[int, Path]:
        """Step → copy of the weights."""
        found = {int(p.stem.split("-")[1]): p for p in self.folder.glob("copy-*.safetensors")}
        return dict(sorted(found.items()))

    def fill(self, model) -> None:
        """The rows before the rise that the log does not have, and all rows in order."""
        past = copy.deepcopy(model)
        parameters = dict(past.named_parameters())
        there = {int(row["step"]) for row in read_log(self.path)} if self.path.exists() else set()
        for step, path in self.copies().items():
            if self.rise - AROUND <= step < self.rise and step not in there:
                for name, value in load_file(path).items():
                    parameters[name].data.copy_(value)
                with safe_open(path, "pt") as file:
                    self.write(past, json.loads(file.metadata()["about"]))
        if self.path.exists():
            write_log(self.path, read_log(self.path))

    def prune(self, step: int) -> None:
        """With a checkpoint at `step`: drop the copies that no rise after it can need."""
        for at, path in self.copies().items():
            if self.rise is not None or at < step - AROUND:
                path.unlink()
