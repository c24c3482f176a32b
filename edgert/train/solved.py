"""How well a model solves puzzles that it was not trained on: at full depth and halting by itself.

All turns (segments or cycles) are run once for every puzzle; where its own rule would have stopped
is where its answer of early exit is taken. A puzzle's answer does not depend on its neighbours.

Shapes  B puzzles, S cells, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgert.models.trainable import GridModel, SegmentModel
from edgert.tasks.puzzleset import IGNORED, Batch
from edgert.train.device import device_of
from edgert.train.invariance import Sensitivity, constant_answer, sensitivity

ROWS = 256  # puzzles at a time
PROBED = 32  # puzzles that the input-sensitivity check takes

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Solved:
    """Shares of `puzzles` held-out ones, from 0 to 1.

    cells           right cells at full depth; exact: whole puzzles
    exact_early     whole puzzles where each stops by the model's own rule
    steps, most     mean turns it takes then, and turns of full depth
    constant_cells  right cells of the best constant answer: each cell's most frequent label here
    """

    puzzles: int
    cells: float
    exact: float
    exact_early: float
    cells_early: float
    steps: float
    most: int
    constant_cells: float
    sensitivity: Sensitivity

    @property
    def collapsed(self) -> bool:
        return bool(self.sensitivity.failed)

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["sensitivity"]["failed"] = list(self.sensitivity.failed)
        return value | {"collapsed": self.collapsed}

    def logged(self) -> dict[str, Any]:
        names = ("cells", "exact", "exact_early", "steps", "constant_cells")
        return {f"heldout_{name}": getattr(self, name) for name in names} | {
            "collapsed": self.collapsed
        }

    def said(self) -> str:
        return (
            f"{self.exact:.1%} solved, {self.cells:.1%} of cells; stopping by itself "
            f"{self.exact_early:.1%} at {self.steps:.1f} of {self.most}"
        )

    def card(self) -> list[tuple[str, str]]:
        full = f"{self.exact:.1%} of {self.puzzles:,} puzzles solved, {self.cells:.1%} of cells"
        early = (
            f"{self.exact_early:.1%} solved where it stops by itself, "
            f"{self.steps:.2f} of {self.most} turns on average"
        )
        return [
            ("held out", full),
            ("early", early),
            ("constant", f"{self.constant_cells:.1%} of cells by the best constant answer"),
            ("responds", self.sensitivity.said()),
        ]

    def warnings(self) -> list[str]:
        if not self.collapsed:
            return []
        return [f"collapsed: answers hardly depend on the input ({self.sensitivity.why()})"]


@torch.no_grad()
def solve(model: GridModel, batch: Batch) -> Solved:
    """The figures of a model in eval mode."""
    full, early, steps = [], [], []
    most = 0
    for start in range(0, len(batch.inputs), ROWS):
        part = slice(start, start + ROWS)
        grids = _asked(model, batch.inputs[part], batch.identifiers[part])
        logits, stopped, taken, most = _answers(model, *grids)
        if start == 0:
            known = logits[:PROBED].float().cpu().numpy()
        full.append(logits.argmax(-1).cpu().numpy())
        early.append(stopped)
        steps.append(taken)
    labels = batch.labels.astype(np.int64)
    at_full, at_exit = np.concatenate(full), np.concatenate(early)
    cells, exact = accuracy(at_full, labels)
    cells_early, exact_early = accuracy(at_exit, labels)
    probe = slice(0, PROBED)

    def ask(inputs: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        *_, (found, _) = turns(model, *_asked(model, inputs, ids))
        return found.float().cpu().numpy()

    constant = constant_answer(labels, model.config.vocab_size)
    return Solved(
        puzzles=len(labels),
        cells=cells,
        exact=exact,
        exact_early=exact_early,
        cells_early=cells_early,
        steps=float(np.concatenate(steps).mean()),
        most=most,
        constant_cells=accuracy(np.broadcast_to(constant, labels.shape), labels)[0],
        sensitivity=sensitivity(
            ask,
            known,
            batch.inputs[probe],
            labels[probe],
            batch.identifiers[probe],
            model.config.vocab_size,
        ),
    )


def _asked(
    model: GridModel, inputs: NDArray[np.int32], ids: NDArray[np.int32]
) -> tuple[Tensor, Tensor]:
    """Questions and their identifiers, where the model is."""
    device = device_of(model)
    return torch.from_numpy(inputs).to(device), torch.from_numpy(ids).to(device)


def turns(model: GridModel, inputs: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Turn by turn up to full depth: logits [B, S, V], and whether the rule would stop bool [B]."""
    if isinstance(model, SegmentModel):
        e = model.embed(inputs, model.puzzle_rows(ids))
        z_h, z_l = model.initial(len(inputs))
        for _ in range(model.config.halt_max_steps):
            z_h, z_l, logits, q = model.segment(z_h, z_l, e)
            yield logits, q[:, 0] > q[:, 1]
        return
    p: list[Tensor] = []
    for found in model.unroll(inputs):
        p.append(found.halt.sigmoid())
        ready = len(p) >= model.config.least_cycles
        over = model.signal(torch.stack(p)) > model.config.threshold
        yield found.logits, over if ready else torch.zeros_like(over)


def _answers(model: GridModel, inputs: Tensor, ids: Tensor) -> tuple[Tensor, Ids, Ids, int]:
    """Logits at full depth [B, S, V], answers at early exit int [B, S], turns taken then [B], and
    turns in all."""
    early = torch.zeros_like(inputs, dtype=torch.int64)
    active = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    steps = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
    most = 0
    for logits, stops in turns(model, inputs, ids):
        most += 1
        early = torch.where(active[:, None], logits.argmax(-1), early)
        steps += active
        active = active & ~stops
    return logits, early.cpu().numpy(), steps.cpu().numpy(), most


def accuracy(answers: NDArray[Any], labels: NDArray[Any]) -> tuple[float, float]:
    """Shares of labelled cells that are right, a mean over puzzles, and of puzzles all of whose
    cells are: int [B, S] each."""
    known = labels != IGNORED
    right = (answers == labels) & known
    share = right.sum(-1) / np.maximum(known.sum(-1), 1)
    return float(share.mean()), float((right.sum(-1) == known.sum(-1)).mean())
