"""Sudoku puzzles with one solution, made; and sets of them without two of one symmetry class.

A puzzle is made from a random solution: cells are emptied in random order as long as the solution
stays the only one, which leaves a minimal puzzle; some of its digits may then be put back, which
makes it easier. A 4x4 board has so few classes that all of them are listed instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, UsageError
from edgert.tasks.puzzle import Integers, Tokens
from edgert.tasks.sudoku import BLANK, FOUR, Sudoku
from edgert.tasks.sudoku_solve import Search, candidates, solve, tables, tokens
from edgert.tasks.sudoku_symmetry import arrangements_of_four, canonical, draw_symmetry

PUT_BACK = {4: 4, 6: 10, 8: 25, 9: 40}
"""By board size, the most digits that are put back into a minimal puzzle."""

TRIES = 50  # puzzles made for each one wanted, before a set is given up
MAX_SET = 1_000_000


@dataclass(frozen=True)
class Puzzle:
    """guesses: how often the solver had to guess, 0 where forced moves are enough."""

    question: Tokens
    answer: Tokens
    guesses: int


@dataclass(frozen=True)
class Puzzles:
    """Questions and answers int32 [count, S], guesses int32 [count]."""

    questions: Tokens
    answers: Tokens
    guesses: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, rows: NDArray[np.intp]) -> Puzzles:
        return Puzzles(self.questions[rows], self.answers[rows], self.guesses[rows])


def random_solution(board: Sudoku, rng: np.random.Generator) -> Tokens:
    """A full board: depth first, the cell with fewest candidates next, these in random order."""
    table = tables(board)
    search = Search(table, 1, rng)
    search.run(table.everything)
    return tokens(table, search.found[0])


def minimal(board: Sudoku, answer: Integers, rng: np.random.Generator) -> Tokens:
    """A question of which `answer` is the one solution, and no digit can be spared."""
    table = tables(board)
    values = (np.asarray(answer, np.int32) - BLANK).tolist()
    for cell in rng.permutation(board.seq_len).tolist():
        digit, values[cell] = values[cell], 0
        # Another solution differs in this cell, or the cell could have been emptied in any case.
        rivals = candidates(table, values) & ~(1 << (digit - 1) * board.seq_len + cell)
        if Search(table, 1).run(rivals):
            values[cell] = digit
    return np.array(values, np.int32) + np.int32(BLANK)


def make(board: Sudoku, rng: np.random.Generator, put_back: int | None = None) -> Puzzle:
    """One puzzle: minimal, then k random digits put back, k uniform from 0 to `put_back`.

    put_back  default PUT_BACK; 0 makes the hardest puzzles
    """
    most = PUT_BACK[board.size] if put_back is None else put_back
    if most < 0:
        raise UsageError(f"put_back = {most} is negative", do="give 0 for the hardest puzzles")
    answer = random_solution(board, rng)
    question = minimal(board, answer, rng)
    return _eased(board, question, answer, int(rng.integers(most + 1)), rng)


def _eased(
    board: Sudoku, question: Tokens, answer: Tokens, count: int, rng: np.random.Generator
) -> Puzzle:
    """Put `count` digits back, or all if there are not so many."""
    empty = np.flatnonzero(question == BLANK)
    back = rng.permutation(empty)[:count]
    question = question.copy()
    question[back] = answer[back]
    return Puzzle(question, answer, solve(board, question).guesses)


def make_set(
    board: Sudoku, classes: int, seed: int, *, givens: tuple[int, int] | None = None
) -> Puzzles:
    """`classes` puzzles of as many symmetry classes, the same for the same arguments.

    givens  fewest and most digits of a question. By default all that have a blank on a 4x4 board,
            and elsewhere what `make` makes.
    On a 4x4 board every class within `givens` is as likely. Raises UsageError if there are not so
    many classes, EdgertError if they cannot be found.
    """
    if not 1 <= classes <= MAX_SET:
        raise UsageError(f"a set of {classes:,} classes", do=f"ask for 1 to {MAX_SET:,}")
    if givens is not None and not 0 <= givens[0] <= givens[1] < board.seq_len:
        raise UsageError(
            f"givens from {givens[0]} to {givens[1]} are not possible",
            do=f"choose numbers from 0 to {board.seq_len - 1}, the smaller one first",
        )
    rng = np.random.default_rng(seed)
    if board == FOUR:
        return _listed(classes, rng, givens or (0, board.seq_len - 1))
    found: dict[bytes, Puzzle] = {}
    for _ in range(TRIES * classes):
        puzzle = _within(board, rng, givens) if givens else make(board, rng)
        if puzzle is not None:
            found.setdefault(canonical(board, puzzle.question), puzzle)
        if len(found) == classes:
            return _table(list(found.values()))
    raise EdgertError(
        f"{len(found):,} classes found in {TRIES * classes:,} tries, {classes:,} wanted",
        do="ask for fewer, or allow other numbers of givens",
    )


def _within(board: Sudoku, rng: np.random.Generator, givens: tuple[int, int]) -> Puzzle | None:
    """A puzzle with a random number of givens, or None if its minimal one has too many."""
    answer = random_solution(board, rng)
    question = minimal(board, answer, rng)
    least = int((question != BLANK).sum())
    if least > givens[1]:
        return None
    wanted = int(rng.integers(max(least, givens[0]), givens[1] + 1))
    return _eased(board, question, answer, wanted - least, rng)


def _table(puzzles: list[Puzzle]) -> Puzzles:
    return Puzzles(
        np.stack([puzzle.question for puzzle in puzzles]),
        np.stack([puzzle.answer for puzzle in puzzles]),
        np.array([puzzle.guesses for puzzle in puzzles], np.int32),
    )


def split(board: Sudoku, puzzles: Puzzles, held_out: int, seed: int) -> tuple[Puzzles, Puzzles]:
    """Training and test puzzles that share no symmetry class.

    held_out  classes for the test, chosen at random; all puzzles of a class go the same way
    Raises UsageError if that leaves no class to train on.
    """
    names = [canonical(board, question) for question in puzzles.questions]
    classes = sorted(set(names))
    if not 0 <= held_out < len(classes):
        raise UsageError(
            f"{held_out:,} of {len(classes):,} classes cannot be held out",
            do="leave at least one to train on",
        )
    rng = np.random.default_rng(seed)
    chosen = {classes[i] for i in rng.choice(len(classes), held_out, replace=False)}
    test = np.array([name in chosen for name in names])
    return puzzles.take(np.flatnonzero(~test)), puzzles.take(np.flatnonzero(test))


def _listed(classes: int, rng: np.random.Generator, givens: tuple[int, int]) -> Puzzles:
    """Classes of the 4x4 board drawn from the list of all, each turned by a random symmetry."""
    questions, answers = every_class()
    count = (questions != BLANK).sum(axis=1)
    suitable = np.flatnonzero((count >= givens[0]) & (count <= givens[1]))
    if len(suitable) < classes:
        raise UsageError(
            f"{classes:,} classes wanted, the 4x4 board has {len(suitable):,} with "
            f"{givens[0]} to {givens[1]} givens",
            do="ask for fewer, or allow other numbers of givens",
        )
    puzzles = []
    for row in rng.permutation(suitable)[:classes]:
        pair = draw_symmetry(FOUR, rng).apply(np.stack([questions[row], answers[row]]))
        puzzles.append(Puzzle(pair[0], pair[1], solve(FOUR, pair[0]).guesses))
    return _table(puzzles)


@cache
def every_class() -> tuple[Tokens, Tokens]:
    """One puzzle of every class of 4x4 puzzles with one solution: questions and answers [4710, 16].

    Solutions fall into classes, too. Puzzles with solutions of different classes differ; those with
    one and the same solution are alike exactly if a symmetry that keeps it turns one into the other
    (a question decides its solution). So it is enough to go through the sets of cells of one
    solution a class. The full boards are among them.
    """
    solutions = np.array(solve(FOUR, np.full(16, BLANK), limit=1000).answers)
    kinds: dict[bytes, Tokens] = {}
    for solution in solutions:
        kinds.setdefault(canonical(FOUR, solution), solution)
    questions, answers = [], []
    for _, answer in sorted(kinds.items()):
        masks = _representatives(answer, solutions)
        shown = (masks[:, None] >> np.arange(16) & 1).astype(bool)
        questions.append(np.where(shown, answer, np.int32(BLANK)))
        answers.append(np.broadcast_to(answer, shown.shape))
    out = np.concatenate(questions), np.concatenate(answers)
    for array in out:
        array.flags.writeable = False
    return out


def _representatives(answer: Tokens, solutions: Tokens) -> NDArray[np.int64]:
    """Sets of cells (bit i: cell i) whose digits leave only `answer`, the least one a class."""
    masks = np.arange(1 << 16)
    alone = np.ones(len(masks), bool)
    for different in solutions[(solutions != answer).any(axis=1)] != answer:
        alone &= masks & int(different @ (1 << np.arange(16))) != 0
    least = masks.copy()
    for cells in _keeping(answer):
        image = np.zeros_like(masks)
        for new, old in enumerate(cells):
            image |= (masks >> old & 1) << new
        np.minimum(least, image, out=least)
    chosen: NDArray[np.int64] = masks[alone & (least == masks)]
    return chosen


def _keeping(answer: Tokens) -> Iterator[list[int]]:
    """Symmetries that keep a 4x4 solution but for the names of its digits: where cell i is from."""
    for source in arrangements_of_four():
        # As many pairs (old digit, new digit) as digits: the renaming is one to one.
        if len(set(zip(answer.tolist(), answer[source].tolist(), strict=True))) == 4:
            yield source.tolist()
