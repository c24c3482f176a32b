"""Mazes on a grid: how they are written, drawn and checked.

Source  sapientinc/HRM @ 42410da, dataset/build_maze_dataset.py
Text    `#` wall, space free, `S` start, `G` goal, `o` the path between them; rows one after another
Tokens  0 padding, then 1 to 5 in that order
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.tasks.puzzle import (
    Integers,
    Kind,
    Row,
    Segment,
    Tokens,
    Verdict,
    as_cells,
    bounded,
    merged,
    place,
    several,
)

CHARACTERS = "# SGo"
WALL, FREE, START, GOAL, PATH = range(1, 6)
LEAST, LARGEST = 3, 200
_DRAWN = {WALL: "██", FREE: "  ", START: "S ", GOAL: "G ", PATH: "• "}

Grid = NDArray[np.int64]


@dataclass(frozen=True)
class Maze:
    """The task of mazes of this size. Raises UsageError for sides outside 3 to 200."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (min(self.shape) >= LEAST and max(self.shape) <= LARGEST):
            raise UsageError(
                f"mazes of {self.rows} x {self.columns} cells are not supported",
                do=f"choose sides from {LEAST} to {LARGEST}",
            )

    @property
    def name(self) -> str:
        return f"maze-{self.rows}x{self.columns}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def seq_len(self) -> int:
        return self.rows * self.columns

    @property
    def vocab_size(self) -> int:
        return 1 + len(CHARACTERS)

    def parse(self, text: str) -> Tokens:
        """A maze without a path: all cells in one line, or a line (or what is between /) a row.

        A free cell may also be written as a full stop. Raises UsageError for other characters,
        another size, and anything but one S and one G.
        """
        tokens = self.encode(text)
        for token, name in ((START, "S"), (GOAL, "G")):
            cells = np.flatnonzero(tokens == token).tolist()
            if len(cells) != 1:
                where = several([place(*divmod(cell, self.columns)) for cell in cells])
                raise UsageError(
                    f"the maze has {len(cells) or 'no'} cells {name}, one is needed",
                    where=where or None,
                    do="mark one start S and one goal G",
                )
        if (tokens == PATH).any():
            cell = int(np.argmax(tokens == PATH))
            raise UsageError(
                "the maze has a path drawn in already",
                where=place(*divmod(cell, self.columns)),
                do="leave the cells o free",
            )
        return tokens

    def encode(self, text: str) -> Tokens:
        """A maze with or without a path, its rules unchecked; errors as of `parse`."""
        lines = bounded(text, self.name).replace("\r\n", "\n").strip("\n").split("\n")
        if len(lines) == 1:
            lines = lines[0].split("/")
        if len(lines) == 1:
            whole = lines[0]
            if len(whole) != self.seq_len:
                raise self._wrong(f"{len(whole)} cells, but a maze of this size has {self.seq_len}")
            lines = [whole[i : i + self.columns] for i in range(0, len(whole), self.columns)]
        if len(lines) != self.rows:
            raise self._wrong(f"{len(lines)} rows, but a maze of this size has {self.rows}")
        values = []
        for i, line in enumerate(lines):
            if len(line) != self.columns:
                raise self._wrong(f"row {i + 1} has {len(line)} cells instead of {self.columns}")
            for j, char in enumerate(line.replace(".", " ")):
                if char not in CHARACTERS:
                    raise UsageError(
                        f"{ascii(char)} is not a cell of a maze",
                        where=place(i, j),
                        do="use # for walls, space or . for free cells, S, G, and o for a path",
                    )
                values.append(1 + CHARACTERS.index(char))
        return np.array(values, np.int32)

    def _wrong(self, what: str) -> UsageError:
        return UsageError(
            what,
            do=f"give {self.rows} lines of {self.columns} characters; where spaces at the end of a "
            "line get lost, write free cells as full stops",
        )

    def text(self, tokens: Integers) -> str:
        """All cells in one line; a token that is no cell is shown as ?."""
        return "".join(_char(value) for value in self._grid(tokens).reshape(-1).tolist())

    def draw(self, question: Integers, answer: Integers | None = None) -> list[Row]:
        """The maze in a frame, two characters a cell."""
        given = self._grid(question)
        shown = given if answer is None else self._grid(answer)
        changed = _changed(given, shown)
        bar = "─" * 2 * self.columns
        rows: list[Row] = [(Segment(f"┌{bar}┐"),)]
        for i in range(self.rows):
            cells = [
                Segment(_DRAWN.get(value := int(shown[i, j]), "? "), _kind(value, changed[i, j]))
                for j in range(self.columns)
            ]
            rows.append(merged([Segment("│"), *cells, Segment("│")]))
        return [*rows, (Segment(f"└{bar}┘"),)]

    def check(self, question: Integers, answer: Integers) -> Verdict:
        """The cells o are one way from S to G, and everything else is as it was.

        Any way is right; `shortest` says whether there is no shorter one.
        """
        given, filled = self._grid(question), self._grid(answer)
        unknown = int(((filled < WALL) | (filled > PATH)).sum())
        changed = np.argwhere(_changed(given, filled)).tolist()
        reasons = []
        if changed:
            cells = [
                f"{place(i, j)} was {_char(int(given[i, j]))!r} and is {_char(int(filled[i, j]))!r}"
                for i, j in changed
            ]
            reasons.append("the maze was changed: " + several(cells))
        marked = (filled == PATH) & (given != WALL)
        steps, fewest = distance(given, marked), distance(given, given != WALL)
        spare = 0 if steps is None else int(marked.sum()) - (steps - 1)
        if steps is None:
            reasons.append("the cells o do not lead from S to G")
        elif spare:
            reasons.append(
                f"the way from S to G takes {steps - 1} of the cells o, {spare} lie beside it"
            )
        valid = steps is not None and not spare
        sound = valid and not changed and not unknown
        shortest = steps == fewest if sound else None
        if unknown:
            reasons.append(f"{unknown} cell{'s' * (unknown != 1)} of no kind")
        if not reasons:
            reasons.append(
                f"a path of {steps} steps, "
                + ("none is shorter" if shortest else f"the shortest takes {fewest}")
            )
        return Verdict(
            complete=not unknown,
            valid=valid,
            kept=not changed,
            reason="; ".join(reasons),
            shortest=shortest,
        )

    def _grid(self, tokens: Integers) -> Grid:
        return as_cells(tokens, self.shape, self.name)


def distance(maze: Grid, allowed: NDArray[np.bool_]) -> int | None:
    """Steps from S to G where only `allowed` cells lie between them, or None."""
    return ways(maze, allowed)[0]


def ways(maze: Grid, allowed: NDArray[np.bool_]) -> tuple[int | None, int, list[int]]:
    """How S and G are joined: steps of the shortest way (None without one), how many such ways
    there are, and the steps from S to each cell, row by row (-1: not reached before G is)."""
    flat: list[int] = maze.reshape(-1).tolist()
    columns: int = maze.shape[1]
    wide = columns + 2  # a margin of closed cells spares the checks of borders
    closed: list[bool] = (
        np.pad(~allowed & (maze != GOAL), 1, constant_values=True).reshape(-1).tolist()
    )
    steps, counts = [-1] * len(closed), [0] * len(closed)

    def padded(token: int) -> int | None:
        if token not in flat:
            return None
        row, column = divmod(flat.index(token), columns)
        return (row + 1) * wide + column + 1

    start, goal = padded(START), padded(GOAL)
    if start is not None:
        steps[start], counts[start] = 0, 1
    queue = deque([] if start is None else [start])
    while queue:
        cell = queue.popleft()
        if cell == goal:
            break
        for neighbour in (cell - wide, cell - 1, cell + 1, cell + wide):
            if closed[neighbour]:
                continue
            if steps[neighbour] < 0:
                steps[neighbour] = steps[cell] + 1
                queue.append(neighbour)
            if steps[neighbour] == steps[cell] + 1:
                counts[neighbour] += counts[cell]
    inner: list[int] = np.array(steps).reshape(-1, wide)[1:-1, 1:-1].reshape(-1).tolist()
    if goal is None or steps[goal] < 0:
        return None, 0, inner
    return steps[goal], counts[goal], inner


def _changed(given: Grid, shown: Grid) -> NDArray[np.bool_]:
    """Cells that an answer may not have: it may only mark free cells."""
    free = (given == FREE) | (given == PATH)
    changed: NDArray[np.bool_] = np.where(free, (shown != FREE) & (shown != PATH), shown != given)
    return changed


def _char(token: int) -> str:
    return CHARACTERS[token - 1] if WALL <= token <= PATH else "?"


def _kind(token: int, changed: bool) -> Kind:
    if changed:
        return "wrong"
    if token in (START, GOAL):
        return "given"
    return {WALL: "frame", PATH: "found"}.get(token, "blank")  # type: ignore[return-value]
