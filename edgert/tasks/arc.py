"""ARC: grids of colours on a canvas of tokens, and what may be done to them.

Source  sapientinc/HRM @ 42410da, dataset/build_arc_dataset.py
Grid    uint8 [rows, columns] of colours 0 to 9, at most 30 x 30
Tokens  0 padding, 1 end marker, 2 to 11 the colours. The grid lies on a canvas at an offset; end
        markers fill the row under it and the column beside it, where the canvas goes on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadFile, UsageError
from edgert.tasks.dihedral import COUNT, INVERSE, dihedral
from edgert.tasks.puzzle import (
    PAD,
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
)

SIDE = 30
COLOURS = 10
END, FIRST = 1, 2
"""The end marker, and the token of colour 0."""

WIDTH = 100  # characters that a question and its answer may take side by side

Grid = NDArray[np.uint8]
_NAME = re.compile(r"(.+)_t([0-7])_(0[1-9]{9})", re.DOTALL)
_LIKE_A_NAME = re.compile(r".*_t\d+_\d+", re.DOTALL)


@dataclass(frozen=True)
class Augmentation:
    """Rename colours, then lay the grid the given way. colours[c] is what c becomes; 0 stays."""

    way: int = 0
    colours: tuple[int, ...] = tuple(range(COLOURS))

    def apply(self, grid: Grid) -> Grid:
        return dihedral(np.array(self.colours, np.uint8)[grid], self.way)

    def undo(self, grid: Grid) -> Grid:
        """The grid before `apply`."""
        return np.argsort(self.colours).astype(np.uint8)[dihedral(grid, INVERSE[self.way])]

    def name(self, task: str) -> str:
        """What puzzles of this task are called: TASK itself, or TASK_t<way>_<10 digits>."""
        if self == IDENTITY:
            return task
        return f"{task}_t{self.way}_{''.join(map(str, self.colours))}"


IDENTITY = Augmentation()


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """A random way and a random permutation of the colours 1 to 9."""
    way = int(rng.integers(COUNT))
    return Augmentation(way, (0, *(int(c) for c in rng.permutation(COLOURS - 1) + 1)))


def split_name(name: str) -> tuple[str, Augmentation]:
    """The task that an augmented puzzle is of, and how it was made: the inverse of `name`.

    Raises BadFile for a name that looks like one of an augmentation and is none.
    """
    match = _NAME.fullmatch(name)
    if match and len(set(match[3])) == COLOURS:
        return match[1], Augmentation(int(match[2]), tuple(map(int, match[3])))
    if _LIKE_A_NAME.fullmatch(name):
        raise BadFile(
            f"{ascii(name)} names no augmentation: it takes a way from 0 to 7 and the digits 0 to "
            "9 in an order that begins with 0",
            do="check that the names are those of the data set the model was trained on",
        )
    return name, IDENTITY


@dataclass(frozen=True)
class Arc:
    """The task of grids on a canvas of `side` x `side` cells, 30 as published."""

    side: int = SIDE

    def __post_init__(self) -> None:
        if not 1 <= self.side <= SIDE:
            raise UsageError(
                f"a canvas of {self.side} x {self.side} cells is not supported",
                do=f"choose a side from 1 to {SIDE}",
            )

    @property
    def name(self) -> str:
        return f"arc-{self.side}x{self.side}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def seq_len(self) -> int:
        return self.side**2

    @property
    def vocab_size(self) -> int:
        return FIRST + COLOURS

    def lay(self, grid: Grid, offset: tuple[int, int] = (0, 0)) -> NDArray[np.uint8]:
        """The canvas uint8 [S] with the grid at row and column `offset`, where it must fit."""
        (top, left), (rows, columns) = offset, grid.shape
        bottom, right = top + rows, left + columns
        if min(rows, columns) < 1 or max(bottom, right) > self.side:
            raise UsageError(
                f"a grid of {rows} x {columns} cells at {top}, {left} does not fit on a canvas of "
                f"{self.side} x {self.side}"
            )
        canvas = np.full(self.shape, PAD, np.uint8)
        canvas[top:bottom, left:right] = grid + FIRST
        if bottom < self.side:
            canvas[bottom, left:right] = END
        if right < self.side:
            canvas[top:bottom, right] = END
        return canvas.reshape(-1)

    def crop(self, tokens: Integers) -> Grid:
        """The grid at the top left: the largest rectangle of nothing but colours.

        Of rectangles of one size the flattest counts; [0, 0] if there is none.
        """
        canvas = as_cells(tokens, self.shape, self.name)
        colours = (canvas >= FIRST) & (canvas < self.vocab_size)
        runs = colours.cumprod(axis=1).sum(axis=1)  # colours at the start of each row
        widths = np.minimum.accumulate(runs)
        areas = widths * np.arange(1, self.side + 1)
        rows = int(np.argmax(areas)) + 1
        if not areas[rows - 1]:
            return np.zeros((0, 0), np.uint8)
        return (canvas[:rows, : widths[rows - 1]] - FIRST).astype(np.uint8)

    def parse(self, text: str) -> Tokens:
        """A grid as rows of digits: lines, or one line with / or | between rows, or JSON.

        Raises UsageError for other characters, rows of different lengths, and too large a grid.
        """
        text = bounded(text, self.name)
        for separator in "/|]\r":
            text = text.replace(separator, "\n")
        rows: list[list[int]] = []
        for line in text.split("\n"):
            row: list[int] = []
            for char in line:
                if char in "0123456789":
                    row.append(int(char))
                elif char not in "[, \t":
                    raise UsageError(
                        f"{ascii(char)} is not a colour",
                        where=place(len(rows), len(row)),
                        do="use the digits 0 to 9",
                    )
            if row:
                rows.append(row)
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise UsageError(
                    f"row {i + 1} has {len(row)} cells, row 1 has {len(rows[0])}",
                    do="give rows of one length, with / or line breaks between them",
                )
        if not rows or max(len(rows), len(rows[0])) > self.side:
            size = f"{len(rows)} x {len(rows[0])}" if rows else "no"
            raise UsageError(
                f"a grid of {size} cells", do=f"give 1 to {self.side} rows and columns"
            )
        return self.lay(np.array(rows, np.uint8)).astype(np.int32)

    def encode(self, text: str) -> Tokens:
        """An answer is written as a question is."""
        return self.parse(text)

    def text(self, tokens: Integers) -> str:
        """The grid at the top left of the canvas, with / between rows; "?" if there is none."""
        return "/".join("".join(map(str, row)) for row in self.crop(tokens).tolist()) or "?"

    def draw(self, question: Integers, answer: Integers | None = None) -> list[Row]:
        """The grid in a frame, the answer beside it or, if wide, below; 0 is shown as ·."""
        left = _framed(self.crop(question), "given")
        if answer is None:
            return left
        right = _framed(self.crop(answer), "found")
        margin = sum(len(segment.text) for segment in left[0])
        if margin + 3 + sum(len(segment.text) for segment in right[0]) > WIDTH:
            return [*left, *right]
        rows: list[Row] = []
        for i in range(max(len(left), len(right))):
            before = left[i] if i < len(left) else (Segment(" " * margin),)
            between = Segment(" → " if i == 1 else "   ")
            rows.append(merged([*before, between, *(right[i] if i < len(right) else ())]))
        return rows

    def check(self, question: Integers, answer: Integers) -> Verdict:
        """Whether there is a grid at all: no rule tells a right one from a wrong one."""
        as_cells(question, self.shape, self.name)
        rows, columns = self.crop(answer).shape
        if not rows:
            return Verdict(False, False, True, "no grid at the top left of the canvas", False)
        reason = f"a grid of {rows} x {columns} cells; only the known answer tells if it is right"
        return Verdict(True, True, True, reason, decided=False)


def _framed(grid: Grid, kind: Kind) -> list[Row]:
    bar = "─" * (2 * grid.shape[1] + 1)
    rows: list[Row] = [(Segment(f"┌{bar}┐"),)]
    for values in grid.tolist():
        cells = [Segment("·" if value == 0 else str(value), kind) for value in values]
        spaced = [piece for cell in cells for piece in (Segment(" "), cell)]
        rows.append(merged([Segment("│"), *spaced, Segment(" │")]))
    return [*rows, (Segment(f"└{bar}┘"),)]
