"""Puzzles: how they are written, drawn, checked, made, and kept in data sets; nothing of models."""

from __future__ import annotations

import re

from edgert.errors import UsageError
from edgert.tasks.arc import Arc
from edgert.tasks.maze import Maze
from edgert.tasks.puzzle import Row, Segment, Task, Verdict, plain
from edgert.tasks.sudoku import Sudoku

__all__ = ["Arc", "Maze", "Row", "Segment", "Sudoku", "Task", "Verdict", "find", "plain"]

_SUDOKUS = [Sudoku(*shape) for shape in ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))]
_MAZE = re.compile(r"maze-(\d{1,4})x(\d{1,4})")
_ARC = re.compile(r"arc-(\d{1,4})x\1")


def find(name: str) -> Task:
    """The task of this name, as `Task.name` gives it. Raises UsageError if there is none."""
    for sudoku in _SUDOKUS:
        if sudoku.name == name:
            return sudoku
    if match := _MAZE.fullmatch(name):
        return Maze(int(match[1]), int(match[2]))
    if match := _ARC.fullmatch(name):
        return Arc(int(match[1]))
    raise UsageError(
        f"there is no task {ascii(name)}",
        do="the tasks are "
        + ", ".join(sudoku.name for sudoku in _SUDOKUS)
        + ", maze-<rows>x<columns> and arc-30x30",
    )
