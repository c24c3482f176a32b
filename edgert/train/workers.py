"""One process or several: `torchrun` starts them, torch.distributed connects them.

CPUs are connected by gloo, GPUs by NCCL.

Every process draws the same batches and takes its own rows of each; gradients are averaged by
DistributedDataParallel, so weights stay equal without being sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgert.errors import UsageError
from edgert.train.device import CPU

PATIENCE = timedelta(days=1)
"""How long others wait for the first, which evaluates alone; torchrun ends them if it dies."""


class Workers:
    """This process and its fellows. `rank` 0 writes files and speaks.

    device  where this process computes
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device = CPU) -> None:
        self.rank, self.count, self.device = rank, count, device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """The rows of a batch that are this process's. Raises UsageError if they do not divide."""
        if batch % self.count:
            raise UsageError(
                f"a batch of {batch} rows does not divide among {self.count} processes",
                do="choose another batch_size, or number of processes",
            )
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, loss: nn.Module) -> nn.Module:
        """A module that returns a loss; its backward averages gradients over the processes."""
        if self.count == 1:
            return loss
        # A variant may leave weights unused; looped weights are used often, which DDP copes with.
        return nn.parallel.DistributedDataParallel(loss, find_unused_parameters=True)

    def accumulating(self, loss: nn.Module, last: bool) -> Any:
        """A context for one micro-batch: only the last one of a step exchanges gradients."""
        if self.count == 1 or last:
            return nullcontext()
        return cast(nn.parallel.DistributedDataParallel, loss).no_sync()

    def mean(self, values: list[float]) -> list[float]:
        """The mean over the processes of each number."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [value / self.count for value in tensor.tolist()]

    def gather(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch [B / count, ...] -> those of all in order [B, ...]."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def workers(device: torch.device = CPU) -> Iterator[Workers]:
    """The processes that torchrun has started, or this one alone. Each has a device of its own."""
    gpu = device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Workers(device=device)
        return
    dist.init_process_group("gloo" if gpu is None else "nccl", device_id=gpu, timeout=PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
