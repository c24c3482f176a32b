"""What all tasks share: a fixed grid of tokens, written, drawn and checked.

A task is what a grid means. Whether an answer is right is decided by `Task.check` alone, from the
rules and the question: never by the model that gave it.

Tokens   int32 [S], the cells of the grid row by row; 0 is padding in every task
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError

Tokens = NDArray[np.int32]
Integers = NDArray[np.integer[Any]]
Kind = Literal["frame", "given", "found", "wrong", "blank"]

PAD = 0
MAX_TEXT = 1 << 16
"""Characters of a puzzle that is read, white space included."""


@dataclass(frozen=True)
class Segment:
    """A piece of a drawn row. `kind` says what it shows, so that a terminal can style it:

    frame   lines, walls, margins
    given   a cell of the question
    found   a cell that the answer fills in
    wrong   a cell of the answer that breaks a rule or changes the question
    blank   a cell that nothing fills
    """

    text: str
    kind: Kind = "frame"


Row = tuple[Segment, ...]


def plain(rows: Sequence[Row]) -> list[str]:
    """Drawn rows as text, without trailing spaces."""
    return ["".join(segment.text for segment in row).rstrip() for row in rows]


def merged(segments: Sequence[Segment]) -> Row:
    """Neighbours of one kind joined, so that a row is few pieces."""
    out: list[Segment] = []
    for segment in segments:
        if out and out[-1].kind == segment.kind:
            out[-1] = Segment(out[-1].text + segment.text, segment.kind)
        else:
            out.append(segment)
    return tuple(out)


@dataclass(frozen=True)
class Verdict:
    """What a checker found, and why in words.

    complete  every cell is filled
    valid     no rule is broken
    kept      the cells that the question gives are unchanged
    decided   the rules of the task tell right from wrong; if not, only its known answer does
    shortest  of a path: there is no shorter one. None where this means nothing
    """

    complete: bool
    valid: bool
    kept: bool
    reason: str
    decided: bool = True
    shortest: bool | None = None

    @property
    def ok(self) -> bool:
        return self.decided and self.complete and self.valid and self.kept


class Task(Protocol):
    """A frozen description of one kind of puzzle."""

    @property
    def name(self) -> str:
        """Such as "sudoku-4x4": `edgert.tasks.find` knows it by this."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid; S is their product."""
        ...

    @property
    def seq_len(self) -> int:
        """S."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def parse(self, text: str) -> Tokens:
        """A question as people write it. Raises UsageError saying what is wrong, and where."""
        ...

    def encode(self, text: str) -> Tokens:
        """The same of an answer, whose rules are unchecked."""
        ...

    def text(self, tokens: Integers) -> str:
        """One line, which `parse` reads back where it is a question."""
        ...

    def draw(self, question: Integers, answer: Integers | None = None) -> list[Row]: ...

    def check(self, question: Integers, answer: Integers) -> Verdict: ...


def as_cells(tokens: Integers, shape: tuple[int, int], name: str) -> NDArray[np.int64]:
    """Tokens [S] as the grid int64 [rows, columns]. Raises UsageError for anything else."""
    array = np.asarray(tokens)
    cells = shape[0] * shape[1]
    if array.shape != (cells,) or array.dtype.kind not in "iu":
        raise UsageError(
            f"{array.dtype} {list(array.shape)} is not a grid of {name}",
            do=f"give integers [{cells}], the cells row by row",
        )
    return array.astype(np.int64).reshape(shape)


def bounded(text: str, name: str) -> str:
    """The text itself, unless it is too long to be a puzzle."""
    if len(text) > MAX_TEXT:
        raise UsageError(
            f"{len(text):,} characters are no puzzle of {name}; at most {MAX_TEXT:,} are read"
        )
    return text


def place(row: int, column: int) -> str:
    """A cell in words, counted from 1."""
    return f"row {row + 1}, column {column + 1}"


def several(items: Sequence[str], most: int = 3) -> str:
    """The first few items, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
