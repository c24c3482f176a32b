"""Sudoku on boards of 4x4 to 9x9 cells: how it is written, drawn and checked.

A board has n = r*c digits in boxes of r rows and c columns: 4x4 (2, 2), 6x6 (2, 3), 8x8 (2, 4),
9x9 (3, 3). r rows of cells are a band, c columns are a stack.

Source  sapientinc/HRM @ 42410da, dataset/build_sudoku_dataset.py
Tokens  0 padding, 1 blank, 2..n+1 the digits 1..n
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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

BLANK = 1
LARGEST = 9  # digits are single characters
_STANDARD = {4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3)}
_BLANKS = ".0·"
_LINES = frozenset("|/+-─│┌┐└┘├┤┬┴┼━┃┏┓┗┛┣┫┳┻╋═║╔╗╚╝╠╣╦╩╬")

Grid = NDArray[np.int64]
Unit = tuple[str, tuple[int, ...]]  # "row 1", and its cells


@dataclass(frozen=True)
class Sudoku:
    """The task of boards with boxes of `box_rows` x `box_columns` cells.

    Raises UsageError for a shape other than 2x2, 2x3, 3x2, 2x4, 4x2 and 3x3.
    """

    box_rows: int
    box_columns: int

    def __post_init__(self) -> None:
        if min(self.box_rows, self.box_columns) < 2 or self.size > LARGEST:
            raise UsageError(
                f"boxes of {self.box_rows} x {self.box_columns} cells are not supported",
                do="choose a shape from 2x2, 2x3, 3x2, 2x4, 4x2 and 3x3",
            )

    @property
    def size(self) -> int:
        """n: cells of a row, a column and a box."""
        return self.box_rows * self.box_columns

    @property
    def name(self) -> str:
        shape = (self.box_rows, self.box_columns)
        suffix = "" if _STANDARD[self.size] == shape else f"-boxes-{shape[0]}x{shape[1]}"
        return f"sudoku-{self.size}x{self.size}{suffix}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def seq_len(self) -> int:
        return self.size**2

    @property
    def vocab_size(self) -> int:
        return self.size + 2

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Rows, columns and boxes: n cells each that hold every digit once."""
        n, r, c = self.size, self.box_rows, self.box_columns
        cells = np.arange(n * n).reshape(n, n)
        boxes = cells.reshape(c, r, r, c).swapaxes(1, 2).reshape(n, n)
        return tuple(
            (f"{what} {i + 1}", tuple(int(cell) for cell in unit))
            for what, units in (("row", cells), ("column", cells.T), ("box", boxes))
            for i, unit in enumerate(units)
        )

    def parse(self, text: str) -> Tokens:
        """n*n characters, row by row: digits, and . or 0 for a blank.

        Spaces, line breaks, row separators (| /) and drawn lines between them are skipped, so that
        a drawn board can be read back. Raises UsageError for other characters, another number of
        cells, and givens that break a rule.
        """
        bounded(text, self.name)
        values: list[int] = []
        for char in text:
            if char.isspace() or char in _LINES:
                continue
            values.append(self._value(char, len(values)))
        if len(values) != self.seq_len:
            raise self._wrong_length(text, len(values))
        grid = np.array(values, np.int64).reshape(self.shape)
        for unit, digit, cells in self._repeated(grid):
            raise UsageError(
                f"the givens contradict each other: {unit} has {digit} twice",
                where=" and ".join(place(*divmod(cell, self.size)) for cell in cells[:2]),
                do="correct one of the two; . or 0 is a blank",
            )
        return (grid.reshape(-1) + BLANK).astype(np.int32)

    def encode(self, text: str) -> Tokens:
        """An answer is written as a question is."""
        return self.parse(text)

    def _value(self, char: str, cell: int) -> int:
        if char in _BLANKS:
            return 0
        if char in "123456789" and int(char) <= self.size:
            return int(char)
        row, column = divmod(cell, self.size)
        where = place(row, column) if cell < self.seq_len else f"cell {cell + 1}"
        raise UsageError(
            f"{ascii(char)} is not a cell of a {self.size}x{self.size} board",
            where=where,
            do=f"use the digits 1 to {self.size}, and . or 0 for a blank",
        )

    def _wrong_length(self, text: str, found: int) -> UsageError:
        """Point to the row that is too short or too long, where rows can be told apart."""
        n, where = self.size, None
        for separators in ("\n", "/", "|", "\n/|"):
            parts = text
            for separator in separators:
                parts = parts.replace(separator, "\0")
            counts = [sum(c in "123456789" + _BLANKS for c in part) for part in parts.split("\0")]
            counts = [count for count in counts if count]
            wrong = [i for i, count in enumerate(counts) if count != n]
            if len(counts) == n and wrong:
                where = f"row {wrong[0] + 1} has {counts[wrong[0]]} cells instead of {n}"
                break
        return UsageError(
            f"{found} cells, but a {n}x{n} board has {self.seq_len}",
            where=where,
            do=f"give {n} rows of {n} characters: digits, and . or 0 for a blank",
        )

    def text(self, tokens: Integers) -> str:
        """n*n characters; a token that is neither a blank nor a digit is shown as ?."""
        return "".join(self._char(v) for v in self._grid(tokens).reshape(-1).tolist())

    def _char(self, value: int) -> str:
        if value == 0:
            return "."
        return str(value) if 0 < value <= self.size else "?"

    def draw(self, question: Integers, answer: Integers | None = None) -> list[Row]:
        """The board with its boxes; the question alone, or the answer with the question's cells
        told apart. Blanks are shown as ·."""
        given = self._grid(question)
        shown = given if answer is None else self._grid(answer)
        wrong = (given > 0) & (shown != given)
        for _, _, cells in self._repeated(shown):
            wrong.flat[list(cells)] = True
        stacks, bands = self.box_rows, self.box_columns
        bar = "─" * (2 * self.box_columns + 1)
        lines = ["┌" + "┬".join([bar] * stacks) + "┐", "├" + "┼".join([bar] * stacks) + "┤"]
        rows: list[Row] = []
        for i in range(self.size):
            if i % self.box_rows == 0:
                rows.append((Segment(lines[i > 0]),))
            segments: list[Segment] = []
            for j in range(self.size):
                segments.append(Segment("│ " if j % self.box_columns == 0 else " "))
                value, kind = int(shown[i, j]), _kind(given[i, j], shown[i, j], wrong[i, j])
                segments.append(Segment("·" if value == 0 else self._char(value), kind))
                if (j + 1) % self.box_columns == 0:
                    segments.append(Segment(" "))
            rows.append(merged([*segments, Segment("│")]))
        assert len(rows) == self.size + bands
        return [*rows, (Segment("└" + "┴".join([bar] * stacks) + "┘"),)]

    def check(self, question: Integers, answer: Integers) -> Verdict:
        """Each row, column and box holds every digit once, and the givens stand unchanged."""
        given, filled = self._grid(question), self._grid(answer)
        inside = (filled >= 1) & (filled <= self.size)
        changed = np.argwhere((given > 0) & (given != filled)).tolist()
        repeated = [f"{unit} has {digit} twice" for unit, digit, _ in self._repeated(filled)]
        reasons = []
        if repeated:
            reasons.append(several(repeated))
        if not inside.all():
            empty = int((~inside).sum())
            reasons.append(f"{empty} cell{'s' * (empty != 1)} without a digit")
        if changed:
            cells = [
                f"{place(i, j)} was {given[i, j]} and is {self._char(int(filled[i, j]))}"
                for i, j in changed
            ]
            reasons.append("givens changed: " + several(cells))
        return Verdict(
            complete=bool(inside.all()),
            valid=not repeated,
            kept=not changed,
            reason="; ".join(reasons) or "valid and complete",
        )

    def _grid(self, tokens: Integers) -> Grid:
        """Values [n, n]: 0 blank, 1..n digits, anything else no digit (padding is -1)."""
        return as_cells(tokens, self.shape, self.name) - BLANK

    def _repeated(self, grid: Grid) -> Iterator[tuple[str, int, list[int]]]:
        """Units that hold a digit more than once: the unit, the digit, its cells."""
        flat = grid.reshape(-1).tolist()
        for unit, cells in self.units:
            values = [flat[cell] for cell in cells]
            for digit in sorted(set(values)):
                if 1 <= digit <= self.size and values.count(digit) > 1:
                    yield unit, digit, [cell for cell in cells if flat[cell] == digit]


def _kind(given: int, shown: int, wrong: bool) -> Kind:
    if wrong:
        return "wrong"
    if given > 0:
        return "given"
    return "blank" if shown == 0 else "found"


FOUR, SIX, NINE = Sudoku(2, 2), Sudoku(2, 3), Sudoku(3, 3)
