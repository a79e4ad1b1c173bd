"""One process or several: those that `torchrun` starts, and what they exchange.

processes = start()          # reads RANK and WORLD_SIZE; alone where torchrun was not used
processes.sum_(tensor)       # the sum over all processes, in place
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mi_helpers.arguments import resolve_device
from mi_helpers.files import InUse, RunError, alone_in

RENDEZVOUS = "MI_RENDEZVOUS"  # such as file:///path, in place of torchrun's address and port


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `size`; number 0 writes what all of them share."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """`files.alone_in` of process 0, which all of them wait for: where it raises, all do."""
        with ExitStack() as held:
            refused = None
            if self.first:
                try:
                    held.enter_context(alone_in(folder))
                except RunError as error:
                    refused = error
            if self.sum_(torch.tensor([refused is not None], device=self.device).int()):
                raise refused or InUse(f"Process 0 could not lock {folder}.")
            yield

    def share(self, n: int) -> slice:
        """This process's part of n rows, contiguous; the parts differ by at most one row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


ALONE = Processes()


def start(device: str | None = None) -> Processes:
    """Join the processes that torchrun started: by nccl on CUDA devices, by gloo elsewhere.

    Args:
        device: as `resolve_device` takes it; None means the environment variable MI_DEVICE, else
            "auto".

    Raises:
        ModelError: there is no such device.
    """
    size, rank = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", 1), ("RANK", 0)))
    local = int(os.environ.get("LOCAL_RANK", rank))
    where = resolve_device(device or os.environ.get("MI_DEVICE") or "auto")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", local % torch.cuda.device_count())
    if size == 1:
        return Processes(device=where)
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group(
            backend, os.environ.get(RENDEZVOUS, "env://"), rank=rank, world_size=size
        )
    return Processes(rank, size, where)


def finish() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
