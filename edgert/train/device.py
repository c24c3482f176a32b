"""Where training computes: the device of each process, by recipe, environment and torch.

It is chosen here and nowhere else. The trainer asks `Workers.device`; what is given a model asks
`device_of`. Random numbers are drawn on the CPU, dropout alone on the device of the model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from edgert.errors import Incompatible
from edgert.models.trainable import Model
from edgert.train.train_recipe import TrainConfig

CPU = torch.device("cpu")
WHERE = "{} in [train]"


@dataclass(frozen=True)
class Gpus:
    """What torch reports of CUDA: how many GPUs, and whether they compute in bfloat16."""

    count: int = 0
    bf16: bool = False


def gpus() -> Gpus:
    """Of this machine, as far as this process may see them."""
    if not torch.cuda.is_available():
        return Gpus()
    return Gpus(torch.cuda.device_count(), torch.cuda.is_bf16_supported(including_emulation=False))


def local_rank() -> int:
    """This process's number on its machine, from 0: torchrun says it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose(config: TrainConfig, found: Gpus, rank: int = 0) -> torch.device:
    """The device of the process with this `local_rank`: the CPU, or a GPU of its own.

    Raises Incompatible if the recipe asks for what is not there.
    """
    if config.device == "cpu" or (config.device == "auto" and not found.count):
        return CPU
    if not found.count:
        raise Incompatible(
            "the recipe trains on CUDA, and torch finds no GPU",
            where=WHERE.format("device"),
            do="train on the CPU with --device cpu, or install torch with CUDA and its driver",
        )
    if rank >= found.count:
        raise Incompatible(
            f"process {rank} has no GPU of its own: torch finds {found.count} on this machine",
            where=WHERE.format("device"),
            do=f"torchrun --nproc-per-node {found.count}, or train on the CPU with --device cpu",
        )
    if config.precision == "bf16" and not found.bf16:
        raise Incompatible(
            "the recipe trains in bf16, which this GPU does not compute in",
            where=WHERE.format("precision"),
            do="set precision to 'fp32', or train on the CPU with --device cpu",
        )
    return torch.device("cuda", rank)


def generators(device: torch.device) -> list[torch.device]:
    """The devices beside the CPU whose random numbers a model there may draw."""
    return [device] if device.type == "cuda" else []


def device_of(model: Model) -> torch.device:
    """Where a model is: all of it is in one place. Without weights that is the CPU."""
    weight = next(model.parameters(), None)
    return CPU if weight is None else weight.device
