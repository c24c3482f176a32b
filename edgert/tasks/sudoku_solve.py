"""An exact Sudoku solver on one integer.

A board is n*n*n candidates "digit d in this cell", one bit each (bit d*n*n + cell). Four kinds of
groups of n candidates hold exactly one that is true: the digits of a cell, and the places of a
digit in a row, a column, a box. A group of one candidate forces it, an empty group is a dead end.
All groups of one kind are counted at once: shifted copies of the integer are added bit by bit into
"at least one" and "at least two".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from operator import and_
from typing import NamedTuple

import numpy as np

from edgert.errors import EdgertError
from edgert.tasks.puzzle import Integers, Tokens, as_cells
from edgert.tasks.sudoku import BLANK, Sudoku

MOST_GUESSES = 100_000
"""Of one search; the hardest 9x9 puzzles with one solution take some hundred."""


class Groups(NamedTuple):
    """All groups of one kind: candidate `origin << offset` for every bit of `origins` and every
    offset. `spread` is the sum of 1 << offset: a set of origins times it is those groups."""

    origins: int
    offsets: tuple[int, ...]
    spread: int


class Tables(NamedTuple):
    """What a board's shape decides. `keep[x]` are the candidates that x leaves possible."""

    size: int
    everything: int
    groups: tuple[Groups, ...]
    keep: tuple[int, ...]


@cache
def tables(board: Sudoku) -> Tables:
    n, cells = board.size, board.seq_len
    everything = (1 << n * cells) - 1

    def kind(first: list[int], offsets: list[int]) -> Groups:
        return Groups(_bits(first), tuple(offsets), _bits(offsets))

    def of_digits(first: list[int], offsets: list[int]) -> Groups:
        return kind([d * cells + cell for d in range(n) for cell in first], offsets)

    units = [cells for _, cells in board.units]
    rows, columns, boxes = units[:n], units[n : 2 * n], units[2 * n :]
    groups = (
        kind(list(range(cells)), [d * cells for d in range(n)]),
        *(
            of_digits([unit[0] for unit in kinds], [cell - kinds[0][0] for cell in kinds[0]])
            for kinds in (rows, columns, boxes)
        ),
    )
    keep = []
    for d in range(n):
        for cell in range(cells):
            rivals = {e * cells + cell for e in range(n)}
            rivals |= {d * cells + peer for unit in units if cell in unit for peer in unit}
            keep.append(everything ^ _bits(list(rivals - {d * cells + cell})))
    return Tables(n, everything, groups, tuple(keep))


def _bits(positions: list[int]) -> int:
    return sum(1 << position for position in positions)


@dataclass
class Search:
    """One search and what it met on its way.

    guesses     candidates tried where nothing forced one
    backtracks  of those, the ones that led to a dead end at once or in the end
    """

    table: Tables
    limit: int
    rng: np.random.Generator | None = None
    guesses: int = 0
    backtracks: int = 0

    def __post_init__(self) -> None:
        self.found: list[int] = []

    def run(self, state: int, settled: int = 0) -> bool:
        """Collect up to `limit` solutions within the candidates `state`; whether there was one.

        settled  candidates whose rivals are gone already
        """
        state, settled = propagate(self.table, state, settled)
        if not state:
            return False
        if state == settled:
            self.found.append(state)
            return True
        any_found = False
        for bit in self._choices(state):
            if self.guesses >= MOST_GUESSES:
                raise EdgertError(
                    f"the solver gave up after {MOST_GUESSES:,} guesses",
                    do="give the puzzle more digits",
                )
            self.guesses += 1
            if self.run(state & self.table.keep[bit.bit_length() - 1], settled | bit):
                any_found = True
            else:
                self.backtracks += 1
            if len(self.found) >= self.limit:
                break
        return any_found

    def _choices(self, state: int) -> list[int]:
        """The candidates of a cell that has the fewest above one, in random order if asked."""
        cells = self.table.groups[0]
        at_least = [0] * (self.table.size + 1)  # [k]: cells with more than k candidates
        for offset in cells.offsets:
            carry = state >> offset & cells.origins
            for k in range(self.table.size):
                at_least[k], carry = at_least[k] | carry, at_least[k] & carry
                if not carry:
                    break
        fewest = next(
            exactly
            for more, even_more in zip(at_least[1:], at_least[2:], strict=False)
            if (exactly := more & ~even_more)
        )
        cell = fewest & -fewest
        choices = [cell << offset for offset in cells.offsets if state & cell << offset]
        if self.rng is not None:
            self.rng.shuffle(choices)
        return choices


def propagate(table: Tables, state: int, settled: int) -> tuple[int, int]:
    """Settle what is forced until nothing is; candidates 0 if that is a dead end."""
    keep = table.keep
    while True:
        forced = 0
        for origins, offsets, spread in table.groups:
            once = twice = 0
            for offset in offsets:
                part = state >> offset & origins
                twice |= once & part
                once |= part
            if once != origins:
                return 0, 0
            forced |= state & (once ^ twice) * spread
        new = forced & ~settled
        if not new:
            return state, settled
        settled |= new
        while new:
            bit = new & -new
            # If this removes another forced candidate, its group is empty in the next round.
            state &= keep[bit.bit_length() - 1]
            new ^= bit


@dataclass(frozen=True)
class Solved:
    """Up to `limit` solutions of a question, as tokens, and how hard it was."""

    answers: tuple[Tokens, ...]
    guesses: int
    backtracks: int

    @property
    def unique(self) -> bool:
        return len(self.answers) == 1


def solve(board: Sudoku, question: Integers, limit: int = 2) -> Solved:
    """Solutions of a question, at most `limit` of them: with 2, `unique` says all that matters.

    A question without guesses is solved by forced moves alone (a cell with one digit left, a digit
    with one place left). Raises UsageError if `question` is no grid of this board, EdgertError
    after MOST_GUESSES guesses.
    """
    values = (as_cells(question, board.shape, board.name).reshape(-1) - BLANK).tolist()
    table = tables(board)
    search = Search(table, limit)
    if all(0 <= value <= board.size for value in values):
        search.run(candidates(table, values))
    answers = tuple(tokens(table, state) for state in search.found)
    return Solved(answers, search.guesses, search.backtracks)


def candidates(table: Tables, values: list[int]) -> int:
    """What the givens (0 blank, 1..n) leave possible."""
    cells = len(values)
    chosen = [(value - 1) * cells + cell for cell, value in enumerate(values) if value]
    return reduce(and_, (table.keep[x] for x in chosen), table.everything)


def tokens(table: Tables, state: int) -> Tokens:
    """The board of a solution: exactly one candidate in each cell."""
    cells = table.size**2
    out = np.zeros(cells, np.int32)
    while state:
        bit = state & -state
        digit, cell = divmod(bit.bit_length() - 1, cells)
        out[cell] = digit + 1 + BLANK
        state ^= bit
    return out
