"""The kinds of training: what each family's `kind` stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.models.trainable import Kind
from edgert.progress import Reporter
from edgert.train import prepare
from edgert.train.grids import CycleObjective, SegmentObjective
from edgert.train.objective import Material, Objective
from edgert.train.optim import Optimizer
from edgert.train.optim_act import AdamATan2
from edgert.train.puzzle_data import PuzzleMaterial, prepare_puzzles
from edgert.train.recipe import TrainRecipe
from edgert.train.text import TextMaterial, TextObjective

OBJECTIVES: dict[Kind, Callable[..., Objective]] = {
    "text": TextObjective,
    "segments": SegmentObjective,
    "cycles": CycleObjective,
}

PREPARE: dict[Kind, Callable[[TrainRecipe, Path, Reporter], None]] = {
    "text": prepare.prepare,
    "segments": prepare_puzzles,
    "cycles": prepare_puzzles,
}
"""What writes everything of a new run but its checkpoints."""

MATERIALS: dict[Kind, Callable[[TrainRecipe, Path], Material]] = {
    "text": TextMaterial,
    "segments": PuzzleMaterial,
    "cycles": PuzzleMaterial,
}

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": Optimizer,
    "muon": Optimizer,
    "adam_atan2": lambda model, c: AdamATan2(model, c.betas, c.weight_decay, c.grad_clip),
}
