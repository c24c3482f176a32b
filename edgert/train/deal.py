"""Deals training puzzles: in the published order, turned by symmetries, easy ones first.

The order of an epoch follows from the seed and the epoch's number, and what is done to a puzzle
from the seed and the number of its showing. So where a dealer stands is three numbers, and however
many processes there are, a row of a batch is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgert.errors import BadCheckpoint, UsageError
from edgert.models.importers.common import shown
from edgert.tasks import Task
from edgert.tasks.dihedral import COUNT, dihedral
from edgert.tasks.puzzle import PAD
from edgert.tasks.puzzleset import IGNORED, PuzzleSet
from edgert.tasks.sudoku import Sudoku
from edgert.tasks.sudoku_symmetry import canonical, draw_symmetry
from edgert.train.act import Grids
from edgert.train.puzzle_recipe import PuzzleData

Cells = NDArray[np.int32]
MAX_DEALT = 1 << 53
_PLACE = ("iteration", "batch", "dealt")
_HALF_TURN = (0, 2, 4, 5)  # of the ways to lay a grid, those that keep its shape


class Dealer:
    """Batches of one split of a data set; where it stands is JSON (`state`) and can be put back.

    dealt      batches so far
    forbidden  names of the puzzles that are held out: no easier form of another may be one of them
    """

    def __init__(
        self,
        puzzles: PuzzleSet,
        task: Task,
        data: PuzzleData,
        *,
        batch: int,
        seed: int,
        steps: int,
        forbidden: frozenset[bytes] = frozenset(),
    ) -> None:
        self.puzzles, self.task, self.size, self.seed = puzzles, task, batch, seed
        self.growing = data.curriculum * steps
        self.turn = turner(task) if data.augment else None
        self.forbidden, self.by_class = forbidden, data.path is None
        self.epochs = -(-batch // puzzles.groups)  # that an iteration needs to fill a batch
        self.iteration, self.batch, self.dealt = 1, 0, 0
        self._rows: Iterator[NDArray[np.int64]] | None = None

    def deal(self, step: int, mine: slice, wanted: Tensor | None = None) -> Grids:
        """The next batch, of which this process gets its rows.

        wanted  bool, which of these rows are looked at (None: all): the others are as they come
        """
        if self._rows is None:
            self._rows = self._epoch()
        rows = next(self._rows, None)
        if rows is None:
            self.iteration, self.batch = self.iteration + 1, 0
            self._rows = self._epoch()
            rows = next(self._rows)
        found = self.puzzles.batch(rows[mine])
        share = min(1.0, (step + 1) / self.growing) if self.growing else 1.0
        if self.turn is not None or share < 1.0:
            chosen = range(len(found.inputs))
            for row in chosen if wanted is None else wanted.nonzero().flatten().tolist():
                number = self.dealt * self.size + mine.start + row
                self._change(found.inputs[row], found.labels[row], share, number)
        self.batch += 1
        self.dealt += 1
        return Grids(*map(torch.from_numpy, (found.inputs, found.labels, found.identifiers)))

    def _epoch(self) -> Iterator[NDArray[np.int64]]:
        return self.puzzles.epoch_rows(self.size, self.seed, self.iteration, self.epochs)

    def _change(self, question: Cells, answer: Cells, share: float, number: int) -> None:
        """One puzzle in place: eased, then turned."""
        key = np.array([self.seed, number], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        if share < 1.0:
            eased = ease(question, answer, share, rng)
            if name_of(self.task, eased, self.by_class) not in self.forbidden:
                question[:] = eased
        if self.turn is not None:
            question[:], answer[:] = self.turn(np.stack([question, answer]), rng)

    @property
    def state(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in _PLACE}

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken. Raises BadCheckpoint if it is not such a state."""
        sound = (
            isinstance(state, dict)
            and set(state) == set(_PLACE)
            and all(type(value) is int and 0 <= value < MAX_DEALT for value in state.values())
            and state["batch"] <= self.puzzles.groups * self.epochs
        )
        if not sound:
            raise BadCheckpoint(f"sampler is {shown(state)}, not a place in the puzzles")
        self.iteration, self.batch, self.dealt = (state[key] for key in _PLACE)
        self._rows = self._epoch()
        for _ in range(self.batch):
            next(self._rows, None)


def ease(question: Cells, answer: Cells, share: float, rng: np.random.Generator) -> Cells:
    """The question with each cell that is to be found given with probability 1 - share."""
    given = (rng.random(len(question)) >= share) & (answer != IGNORED)
    return np.where(given, answer, question)


def name_of(task: Task, question: Cells, by_class: bool) -> bytes:
    """What two questions have in common that are one and the same puzzle.

    by_class  up to the symmetries of the task, as puzzles that are made are split
    """
    if by_class and isinstance(task, Sudoku):
        with suppress(UsageError):  # a grid that breaks a rule is of no class: it is only itself
            return canonical(task, question)
    return question.astype(np.uint16).tobytes()


def turner(task: Task) -> Callable[[Cells, np.random.Generator], Cells]:
    """What turns question and answer [2, S] alike, by a symmetry of the task drawn at random."""
    if isinstance(task, Sudoku):
        board = task

        def renamed(pair: Cells, rng: np.random.Generator) -> Cells:
            symmetry, ignored = draw_symmetry(board, rng), pair == IGNORED
            if not ignored.any():
                return symmetry.apply(pair)
            turned = symmetry.apply(np.where(ignored, PAD, pair))
            turned[1] = np.where(turned[1] == PAD, IGNORED, turned[1])
            return turned

        return renamed
    rows, columns = task.shape
    ways = range(COUNT) if rows == columns else _HALF_TURN

    def turned(pair: Cells, rng: np.random.Generator) -> Cells:
        way = ways[int(rng.integers(len(ways)))]
        return dihedral(pair.reshape(2, rows, columns), way).reshape(2, -1)

    return turned
