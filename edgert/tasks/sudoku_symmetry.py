"""The symmetries of Sudoku: what may be done to a board without changing what it asks.

Digits may be renamed; bands, rows within a band, stacks and columns within a stack may change
places; where boxes are square, the board may be transposed. A 9x9 board has 2 * 6**8 * 9! of them,
a 4x4 board 2 * 8 * 8 * 24. Boards that some symmetry turns into each other are one class.

Source  sapientinc/HRM @ 42410da, dataset/build_sudoku_dataset.py (the augmentation)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.tasks.puzzle import Integers, as_cells, place
from edgert.tasks.sudoku import BLANK, FOUR, Sudoku

Lines = NDArray[np.intp]
T = TypeVar("T", bound=np.integer[Any])


@dataclass(frozen=True)
class Symmetry:
    """new[i, j] = digits(x[rows[i], columns[j]]), where x is the board or its transpose.

    digits  int [n]: digit d becomes digits[d - 1]; blanks and padding stay
    """

    transposed: bool
    rows: Lines
    columns: Lines
    digits: Lines

    def apply(self, tokens: NDArray[T]) -> NDArray[T]:
        """Boards of tokens [..., S] -> the same boards, changed alike."""
        n = len(self.rows)
        x = tokens.reshape(*tokens.shape[:-1], n, n)
        if self.transposed:
            x = x.swapaxes(-1, -2)
        x = x[..., self.rows[:, None], self.columns]
        table = np.concatenate([[0, BLANK], self.digits + BLANK]).astype(tokens.dtype)
        turned: NDArray[T] = table[x].reshape(tokens.shape)
        return turned


def draw_symmetry(board: Sudoku, rng: np.random.Generator) -> Symmetry:
    """One of all symmetries, each as likely: the published augmentation of a board."""
    r, c = board.box_rows, board.box_columns
    return Symmetry(
        digits=rng.permutation(board.size) + 1,
        transposed=bool(r == c and rng.random() < 0.5),
        rows=_shuffled(rng, board.size // r, r),
        columns=_shuffled(rng, board.size // c, c),
    )


def _shuffled(rng: np.random.Generator, parts: int, lines: int) -> Lines:
    """Parts (bands, stacks) in random order, and the lines of each."""
    return np.concatenate(
        [part * lines + rng.permutation(lines) for part in rng.permutation(parts)]
    )


@cache
def arrangements(parts: int, lines: int) -> Lines:
    """All orders of `parts * lines` lines that keep each part together: [orders, lines]."""
    return np.array(
        [
            [
                part * lines + line
                for part, inner in zip(outer, order, strict=True)
                for line in inner
            ]
            for outer in permutations(range(parts))
            for order in product(permutations(range(lines)), repeat=parts)
        ],
        np.intp,
    )


def canonical(board: Sudoku, question: Integers) -> bytes:
    """The name of a board's class: n*n bytes, 0 for a blank, the same for all boards of a class and
    for no other.

    It is the least board of the class, read row by row, where a blank comes after every digit.
    Raises UsageError for a grid that is not of this board or has a digit twice in a line.
    """
    grid = _values(board, question)
    return _of_all(grid) if board == FOUR else row_by_row(board, grid)


def _of_all(grid: NDArray[np.int8]) -> bytes:
    """The least of all 3072 images of a 4x4 board, each cell four bits of one number."""
    images = _names_of_four()[:, grid.reshape(-1)[arrangements_of_four()]]
    least = int((images @ _PLACES).min())
    return bytes((least >> shift & 15) % 5 for shift in range(60, -1, -4))


_PLACES = np.uint64(16) ** np.arange(15, -1, -1, dtype=np.uint64)


@cache
def _names_of_four() -> NDArray[np.uint64]:
    """What each renaming calls a blank (5: it comes behind the digits) and the digits [24, 5]."""
    return np.insert(arrangements(1, 4) + 1, 0, 5, axis=1).astype(np.uint64)


@cache
def arrangements_of_four() -> Lines:
    """All symmetries of a 4x4 board but for the digits: where each cell comes from [128, 16]."""
    grid = np.arange(16).reshape(4, 4)
    orders = arrangements(2, 2)
    sources = [
        x[np.ix_(rows, columns)].reshape(-1)
        for x in (grid, grid.T)
        for rows in orders
        for columns in orders
    ]
    return np.array(sources)


def row_by_row(board: Sudoku, grid: NDArray[np.int8]) -> bytes:
    """`canonical` of the values [n, n], 0 blank, where there are too many images to look at all.

    In the least board, digits are numbered as they appear. It is laid down row by row in all ways
    at once, and only the ways that are least so far go on: exact, and soon few.
    """
    n = board.size
    ways, empty = _orders_of_columns(board, grid)
    variant = np.arange(len(ways))
    used = np.zeros((len(ways), n), bool)  # rows of the way that are laid down
    names = np.zeros((len(ways), n + 1), np.int8)  # digit -> number; 0: not seen yet
    weights = (n + 2) ** np.arange(n - 1, -1, -1, dtype=np.int64)
    out = []
    for depth in range(n):
        parent, row = np.nonzero(_next_rows(board, used, depth, empty[variant]))
        values = ways[variant[parent], row]
        numbers = _numbered(names[parent], values)
        keys = np.where(numbers, numbers, n + 1) @ weights
        best = np.flatnonzero(keys == keys.min())
        parent, row, values, numbers = parent[best], row[best], values[best], numbers[best]
        variant, used, names = variant[parent], used[parent], names[parent]
        at = np.arange(len(best))
        used[at, row] = True
        names[at[:, None], values] = numbers
        out.append(numbers[0].astype(np.uint8).tobytes())
    return b"".join(out)


def _values(board: Sudoku, question: Integers) -> NDArray[np.int8]:
    """The grid [n, n], 0 blank: numbering assumes that no row repeats a digit, nor does a column,
    which becomes a row."""
    grid = as_cells(question, board.shape, board.name) - BLANK
    outside = np.argwhere((grid < 0) | (grid > board.size)).tolist()
    if outside:
        raise UsageError(
            f"token {grid[tuple(outside[0])] + BLANK} is neither a blank nor a digit",
            where=place(*outside[0]),
            do=f"give tokens 1 to {board.vocab_size - 1}",
        )
    for lines in (grid, grid.T):
        ordered = np.sort(lines, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any():
            raise UsageError("the board has a digit twice in a row or column, so it is of no class")
    return grid.astype(np.int8)


def _orders_of_columns(
    board: Sudoku, grid: NDArray[np.int8]
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """The board in every order of its columns, and transposed where it may be: [ways, n, n]; with
    it which rows of a way are empty, [ways, n]. Ways that look alike are one."""
    r, c = board.box_rows, board.box_columns
    orders = arrangements(board.size // c, c)
    ways = []
    for x in (grid, grid.T) if r == c else (grid,):
        laid = np.ascontiguousarray(x[:, orders].swapaxes(0, 1))
        if (x == 0).all(axis=0).sum() > 1:  # columns are alike only if they are empty
            laid = np.unique(laid, axis=0)
        ways.append(laid)
    boards = np.concatenate(ways)
    empty: NDArray[np.bool_] = np.logical_not(boards.any(axis=2))
    return boards, empty


def _next_rows(
    board: Sudoku, used: NDArray[np.bool_], depth: int, empty: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows that may follow, [ways, n]: of an untouched band, or of the band that is begun."""
    n, r = board.size, board.box_rows
    touched = used.reshape(-1, n // r, r).any(axis=2)
    if depth % r == 0:
        bands = ~touched
        # Of empty bands, and of empty rows below, the first stands for all: they are alike.
        idle = empty.reshape(-1, n // r, r).all(axis=2) & bands
        bands &= ~idle | (idle.cumsum(axis=1) == 1)
    else:
        bands = touched & ~used.reshape(-1, n // r, r).all(axis=2)
    rows = np.repeat(bands, r, axis=1) & ~used
    idle = (empty & ~used).reshape(-1, n // r, r)
    first = idle & (idle.cumsum(axis=2) == 1)
    allowed: NDArray[np.bool_] = rows & (~empty | first.reshape(-1, n))
    return allowed


def _numbered(names: NDArray[np.int8], values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Rows of digits -> of numbers; digits not seen before get the next ones, left to right."""
    numbers = np.take_along_axis(names, values.astype(np.intp), axis=1)
    fresh = (values > 0) & (numbers == 0)
    following = names.max(axis=1, keepdims=True) + np.cumsum(fresh, axis=1, dtype=np.int8)
    return np.where(fresh, following, numbers)
