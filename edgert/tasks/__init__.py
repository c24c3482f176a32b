"""Puzzles: how they are written, drawn, checked, made, and kept in data sets; nothing of models."""

from __future__ import annotations

import math
import re

from edgert.errors import UsageError
from edgert.tasks.puzzle import Row, Segment, Task, Verdict, plain

__all__ = ["Row", "Segment", "Task", "Verdict", "find", "of_size", "plain"]

_BOXES = ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))
_MAZE = re.compile(r"maze-(\d{1,4})x(\d{1,4})")
_ARC = re.compile(r"arc-(\d{1,4})x\1")


def of_size(cells: int, vocab_size: int) -> list[str]:
    """The names of the tasks with so many cells and tokens; of mazes, the square ones."""
    from edgert.tasks.arc import SIDE, Arc
    from edgert.tasks.maze import LARGEST, LEAST, Maze
    from edgert.tasks.sudoku import Sudoku

    side = math.isqrt(cells)
    tasks: list[Task] = [Sudoku(*boxes) for boxes in _BOXES]
    if side**2 == cells:
        tasks += [Maze(side, side)] if LEAST <= side <= LARGEST else []
        tasks += [Arc(side)] if 1 <= side <= SIDE else []
    return [task.name for task in tasks if (task.seq_len, task.vocab_size) == (cells, vocab_size)]


def find(name: str) -> Task:
    """The task of this name, as `Task.name` gives it. Raises UsageError if there is none."""
    # Imported here: whoever loads a bundle loads this module, and few bundles solve puzzles.
    if match := _MAZE.fullmatch(name):
        from edgert.tasks.maze import Maze

        return Maze(int(match[1]), int(match[2]))
    if match := _ARC.fullmatch(name):
        from edgert.tasks.arc import Arc

        return Arc(int(match[1]))
    from edgert.tasks.sudoku import Sudoku

    boards = {board.name: board for board in (Sudoku(*boxes) for boxes in _BOXES)}
    if name in boards:
        return boards[name]
    raise UsageError(
        f"there is no task {name!a:.80}",
        do=f"the tasks are {', '.join(boards)}, maze-<rows>x<columns> and arc-30x30",
    )
