"""Where a session begins: behind a run's newest sound checkpoint, or at someone's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgert.errors import UsageError
from edgert.models.importers import published as importer
from edgert.models.importers import trained
from edgert.models.importers.common import Problems
from edgert.train import published
from edgert.train.loop import CARRY, RAW, Trainer
from edgert.train.optim import Optimizer
from edgert.train.recipe import differences


def resume(trainer: Trainer, run: Path) -> tuple[Path | None, list[str]]:
    """Go on where a run stands; the checkpoint that was read, and what the user should know.

    Raises BadCheckpoint if there are checkpoints and none is sound.
    """
    if not trained.step_folders(run):
        return None, ["no checkpoint yet: started from the beginning"]
    found, notes = trained.newest(run)
    state = found.training()
    threads = torch.get_num_threads()
    if state.get("threads") != threads:
        notes.append(
            f"{threads} threads instead of {state.get('threads')}: the loss will agree with "
            "an uninterrupted run's to rounding, not bit for bit"
        )
    device, before = trainer.workers.device.type, state.get("device", "cpu")
    if before != device:
        notes.append(
            f"on {device} instead of {before}: the loss will agree with an uninterrupted run's to "
            "rounding, not bit for bit"
        )
    trainer.restore(
        found.tensors(trained.WEIGHTS), found.tensors(trained.TENSORS), state, str(found.folder)
    )
    return found.folder, notes


@dataclass(frozen=True)
class _Start:
    """What a new run takes from a checkpoint: raw weights, moments, and how far they are."""

    weights: Mapping[str, Tensor]
    moments: dict[str, Tensor]
    step: int
    updates: Any


def start(trainer: Trainer, path: Path) -> list[str]:
    """Begin with the weights, moments and step of a checkpoint of either format; the sampler and
    all else are the recipe's. Returns what the user should know.

    Raises UsageError for another model's checkpoint or one behind the recipe's end, BadCheckpoint.
    """
    where, steps = str(path), trainer.config.steps
    if not path.exists():
        raise UsageError("there is no such checkpoint", where=where, do="correct --from")
    if not path.is_dir() and trainer.recipe.family.kind != "text":
        raise UsageError(
            "training begins with a published checkpoint only where text is learnt",
            where=where,
            do="give a run or checkpoint of `edgert train`",
        )
    taken, notes = (_ours if path.is_dir() else _published)(trainer, path)
    if taken.step >= steps:
        raise UsageError(
            f"the checkpoint has made {taken.step} steps, the recipe has {steps}",
            where=where,
            do="raise steps in [train]",
        )
    tensors = taken.moments | trainer.objective.tensors()
    if trainer.average is not None:  # it starts at the weights
        tensors |= {f"{RAW}.{name}": value for name, value in taken.weights.items()}
    state = trainer.state() | {"step": taken.step, "updates": taken.updates}
    if trainer.tension is not None:
        state["tension"] = 0.0
    trainer.restore(taken.weights, tensors, state, where)
    if trainer.tension is not None:
        trainer.tension.ema = None  # set by the first step here, as by the first step of a run
    return notes


def _ours(trainer: Trainer, path: Path) -> tuple[_Start, list[str]]:
    found, notes = trained.newest(path)
    _same_model(found.config.published(), trainer, path)
    tensors = found.tensors(trained.TENSORS)
    own = f"{RAW}."
    raw = {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
    moments = {name: t for name, t in tensors.items() if not name.startswith((own, f"{CARRY}."))}
    weights = found.tensors(trained.WEIGHTS) | raw
    return _Start(weights, moments, found.step, found.training().get("updates")), notes


def _published(trainer: Trainer, path: Path) -> tuple[_Start, list[str]]:
    found = importer.read(path)
    _same_model(found.config.published(), trainer, path)
    assert isinstance(trainer.optimizer, Optimizer), "of text"
    model = trainer.recipe.family.assemble(
        trainer.recipe.model, found.state, Problems(str(path)), path.stat().st_size
    )
    if found.optimizer is None:
        note = "the file has no optimizer state: its moments start at zero"
        return _Start(model.published(), {}, found.step, 0), [note]
    updates, moments = published.moments(found.optimizer, trainer.optimizer, str(path))
    return _Start(model.published(), moments, found.step, updates), []


def _same_model(config: dict[str, Any], trainer: Trainer, path: Path) -> None:
    changed = differences(config, trainer.recipe.model.published())
    if changed:
        raise UsageError(
            "the checkpoint is of another model than the recipe's:\n  - " + "\n  - ".join(changed),
            where=str(path),
            do="correct [model] in the recipe",
        )
