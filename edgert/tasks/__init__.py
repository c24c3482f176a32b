"""Puzzles: how they are written, drawn, checked, made, and kept in data sets; nothing of models."""

from __future__ import annotations

import re

from edgert.errors import UsageError
from edgert.tasks.puzzle import Row, Segment, Task, Verdict, plain

__all__ = ["Row", "Segment", "Task", "Verdict", "find", "plain"]

_BOXES = ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))
_MAZE = re.compile(r"maze-(\d{1,4})x(\d{1,4})")
_ARC = re.compile(r"arc-(\d{1,4})x\1")


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
        f"there is no task {ascii(name)}",
        do=f"the tasks are {', '.join(boards)}, maze-<rows>x<columns> and arc-30x30",
    )
