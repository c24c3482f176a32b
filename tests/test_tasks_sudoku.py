"""Sudoku: written, drawn, checked, solved, made, and told apart by symmetry."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EdgertError, UsageError
from edgert.tasks import Segment, find, plain
from edgert.tasks import sudoku_solve as solver
from edgert.tasks.sudoku import BLANK, FOUR, NINE, SIX, Sudoku
from edgert.tasks.sudoku_make import (
    PUT_BACK,
    Puzzle,
    Puzzles,
    every_class,
    make,
    make_set,
    random_solution,
    split,
)
from edgert.tasks.sudoku_solve import solve
from edgert.tasks.sudoku_symmetry import arrangements, canonical, draw_symmetry, row_by_row

BOARDS = [FOUR, SIX, Sudoku(3, 2), Sudoku(2, 4), Sudoku(4, 2), NINE]
boards = st.sampled_from(BOARDS)
seeds = st.integers(0, 2**32 - 1)
every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)

# 17 givens, the fewest that leave one solution (arXiv 1201.0749).
SEVENTEEN = "000801000000000043500000000000070800000000100020030000600000075003400000000200600"
HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."


def some_puzzle(board: Sudoku, seed: int) -> Puzzle:
    return make(board, np.random.default_rng(seed))


# ------------------------------------------------------------------ names and text


@every_board
def test_a_task_says_its_sizes_and_is_found_by_its_name(board: Sudoku) -> None:
    n = board.size
    assert (board.seq_len, board.vocab_size, board.shape) == (n * n, n + 2, (n, n))
    assert find(board.name) == board


def test_the_names_of_tasks() -> None:
    assert [board.name for board in BOARDS] == [
        "sudoku-4x4",
        "sudoku-6x6",
        "sudoku-6x6-boxes-3x2",
        "sudoku-8x8",
        "sudoku-8x8-boxes-4x2",
        "sudoku-9x9",
    ]
    assert find("maze-30x30").seq_len == find("arc-30x30").seq_len == 900


@pytest.mark.parametrize("name", ["", "sudoku", "sudoku-5x5", "maze-1x1", "maze-3", "arc-30x20"])
def test_an_unknown_task_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"there is no task|are not supported"):
        find(name)


def test_a_long_name_is_not_said_again() -> None:
    with pytest.raises(UsageError, match="there is no task") as caught:
        find("a" * 30_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (0, 3), (3, 4), (5, 2), (-2, -2)])
def test_other_shapes_of_boxes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"boxes of -?\d x -?\d cells are not supported"):
        Sudoku(*shape)


@given(boards, seeds)
@settings(max_examples=60, deadline=None)
def test_text_is_read_back(board: Sudoku, seed: int) -> None:
    """Puzzles and solutions, from one line and from a drawing."""
    puzzle = some_puzzle(board, seed)
    for tokens in (puzzle.question, puzzle.answer):
        assert tokens.dtype == np.int32
        for written in (board.text(tokens), "\n".join(plain(board.draw(tokens)))):
            back = board.parse(written)
            assert back.dtype == np.int32
            np.testing.assert_array_equal(back, tokens)


@pytest.mark.parametrize(
    "text",
    [
        "1.....3..4.....2",
        "1000003004000002",
        "1...|..3.|.4..|...2",
        "1.../..3./.4../...2",
        " 1 . . .\n . . 3 . \n\n . 4 . .\r\n . . . 2\n",
        "1 .|. .\n. .|3 .\n---+---\n. 4|. .\n. .|. 2",
        "┌─────┬─────┐\n│ 1 · │ · · │\n│ · · │ 3 · │\n├─────┼─────┤\n"
        "│ · 4 │ · · │\n│ · · │ · 2 │\n└─────┴─────┘",
    ],
)
def test_the_ways_to_write_a_board(text: str) -> None:
    assert FOUR.parse(text).tolist() == [2, 1, 1, 1, 1, 1, 4, 1, 1, 5, 1, 1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 cells, but a 4x4 board has 16"),
        ("1..", "3 cells, but a 4x4 board has 16"),
        ("1" + "." * 16, "17 cells, but a 4x4 board has 16"),
        ("1...|..3|.4..|...2", r"15 cells(.|\n)*row 2 has 3 cells instead of 4"),
        ("1...\n..3.\n.4...\n...2", r"17 cells(.|\n)*row 3 has 5 cells instead of 4"),
        ("1.../..3./.4../..2", r"15 cells(.|\n)*row 4 has 3 cells instead of 4"),
        ("1...|..x.|.4..|...2", r"'x' is not a cell of a 4x4 board\n  where  row 2, column 3"),
        ("1...|..5.|.4..|...2", r"'5' is not a cell of a 4x4 board\n  where  row 2, column 3"),
        ("1...|..\u0663.|.4..|...2", r"'\\u0663' is not a cell"),
        ("." * 16 + "x", r"'x' is not a cell(.|\n)*where  cell 17"),
        ("11..|....|....|....", r"row 1 has 1 twice\n  where  row 1, column 1 and row 1, column 2"),
        ("1...|....|1...|....", r"column 1 has 1 twice\n  where  row 1, column 1 and row 3, colum"),
        ("3...|.3..|....|....", r"box 1 has 3 twice\n  where  row 1, column 1 and row 2, column 2"),
        ("....|....|..2.|...2", r"box 4 has 2 twice\n  where  row 3, column 3 and row 4, column 4"),
        ("." * 70000, "70,000 characters are no puzzle of sudoku-4x4"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text: str, message: str) -> None:
    """What, where, and what to do."""
    with pytest.raises(UsageError, match=message) as caught:
        FOUR.parse(text)
    if len(text) < 1000:
        assert caught.value.do


@pytest.mark.parametrize("tokens", [np.ones(15, np.int32), np.ones((4, 4), int), np.ones(16)])
def test_arrays_that_are_no_board_are_refused(tokens: np.ndarray) -> None:
    for use in (FOUR.text, FOUR.draw, lambda x: FOUR.check(x, x), lambda x: solve(FOUR, x)):
        with pytest.raises(UsageError, match="is not a grid of sudoku-4x4"):
            use(tokens)


# ------------------------------------------------------------------ drawings

DRAWN_4 = """\
┌─────┬─────┐
│ 1 3 │ 2 4 │
│ 4 2 │ 3 1 │
├─────┼─────┤
│ 2 4 │ 1 3 │
│ 3 1 │ 4 2 │
└─────┴─────┘"""

DRAWN_6 = """\
┌───────┬───────┐
│ 1 2 3 │ 4 5 6 │
│ 4 5 6 │ 1 2 3 │
├───────┼───────┤
│ 2 3 1 │ 5 6 4 │
│ 5 6 4 │ 2 3 1 │
├───────┼───────┤
│ 3 1 2 │ 6 4 5 │
│ 6 4 5 │ 3 1 2 │
└───────┴───────┘"""

DRAWN_9 = """\
┌───────┬───────┬───────┐
│ 8 · · │ · · · │ · · · │
│ · · 3 │ 6 · · │ · · · │
│ · 7 · │ · 9 · │ 2 · · │
├───────┼───────┼───────┤
│ · 5 · │ · · 7 │ · · · │
│ · · · │ · 4 5 │ 7 · · │
│ · · · │ 1 · · │ · 3 · │
├───────┼───────┼───────┤
│ · · 1 │ · · · │ · 6 8 │
│ · · 8 │ 5 · · │ · 1 · │
│ · 9 · │ · · · │ 4 · · │
└───────┴───────┴───────┘"""


def test_the_drawing_of_a_4x4_board() -> None:
    question = FOUR.parse("1...|..3.|.4..|...2")
    answer = FOUR.parse("1324|4231|2413|3142")
    assert plain(FOUR.draw(question, answer)) == DRAWN_4.split("\n")


def test_the_drawing_of_a_6x6_board() -> None:
    answer = SIX.parse("123456 456123 231564 564231 312645 645312")
    assert plain(SIX.draw(answer)) == DRAWN_6.split("\n")


def test_the_drawing_of_a_9x9_board() -> None:
    assert plain(NINE.draw(NINE.parse(HARD))) == DRAWN_9.split("\n")


def test_a_board_of_tall_boxes_is_drawn_with_its_boxes() -> None:
    rows = plain(Sudoku(3, 2).draw(np.ones(36, np.int32)))
    assert rows[0] == "┌─────┬─────┬─────┐"
    assert [i for i, row in enumerate(rows) if "┼" in row] == [4]


def test_cells_of_a_drawing_say_what_they_are() -> None:
    """Given, filled in, empty, and wrong: against a rule, or instead of a given."""
    question = FOUR.parse("1...|..3.|.4..|...2")
    answer = FOUR.parse("13..|42..|24..|3...")
    answer[15] = BLANK + 9  # in place of the given 2
    answer[3] = BLANK + 3  # a second 3 in row 1
    rows = FOUR.draw(question, answer)
    assert rows[1] == (
        Segment("│ ", "frame"),
        Segment("1", "given"),
        Segment(" ", "frame"),
        Segment("3", "wrong"),
        Segment(" │ ", "frame"),
        Segment("·", "blank"),
        Segment(" ", "frame"),
        Segment("3", "wrong"),
        Segment(" │", "frame"),
    )
    assert Segment("?", "wrong") in rows[5]
    assert Segment("·", "wrong") in rows[2]  # the given 3 is gone


# ------------------------------------------------------------------ the checker


@pytest.mark.parametrize(
    ("answer", "complete", "valid", "kept", "reason"),
    [
        ("1324423124133142", True, True, True, "valid and complete"),
        ("132442312413314.", False, True, False, "1 cell without a digit; givens changed: row 4, "),
        ("1324423124.3.142", False, True, True, "2 cells without a digit"),
        ("1324423134123142", True, False, True, "row 3 has|column 1 has 3 twice"),
        ("2314413213243241", True, False, False, "givens changed: row 1, column 1 was 1 and is 2"),
    ],
)
def test_the_checker_says_what_is_wrong(
    answer: str, complete: bool, valid: bool, kept: bool, reason: str
) -> None:
    tokens = np.array([BLANK + int(c) if c != "." else BLANK for c in answer], np.int32)
    verdict = FOUR.check(FOUR.parse("1...|..3.|.4..|...2"), tokens)
    assert (verdict.complete, verdict.valid, verdict.kept) == (complete, valid, kept)
    assert verdict.ok is (complete and valid and kept)
    assert any(part in verdict.reason for part in reason.split("|"))


@pytest.mark.parametrize("token", [-7, 0, 1, 11, 200])
def test_a_token_that_is_no_digit_is_not_an_answer(token: int) -> None:
    """Padding, a blank, and what lies outside of the vocabulary."""
    puzzle = some_puzzle(NINE, 5)
    answer = puzzle.answer.copy()
    answer[int(np.argmax(puzzle.question == BLANK))] = token
    verdict = NINE.check(puzzle.question, answer)
    assert not verdict.complete
    assert not verdict.ok


@given(boards, seeds, st.data())
@settings(max_examples=60, deadline=None)
def test_one_changed_cell_is_always_noticed(board: Sudoku, seed: int, data: st.DataObject) -> None:
    """A full board with one digit exchanged breaks a rule: no answer but the true one passes."""
    puzzle = some_puzzle(board, seed)
    assert board.check(puzzle.question, puzzle.answer).ok
    cell = data.draw(st.integers(0, board.seq_len - 1))
    answer = puzzle.answer.copy()
    answer[cell] = data.draw(
        st.integers(0, board.vocab_size).filter(lambda token: token != puzzle.answer[cell])
    )
    assert not board.check(puzzle.question, answer).ok


# ------------------------------------------------------------------ the solver


def all_solutions_of_four() -> list[tuple[int, ...]]:
    """Row by row, with nothing of the solver: every 4x4 board that the rules allow."""
    found: list[tuple[int, ...]] = []

    def extend(cells: list[int]) -> None:
        if len(cells) == 16:
            found.append(tuple(cells))
            return
        row, column = divmod(len(cells), 4)
        seen = set(cells[row * 4 :]) | set(cells[column::4])
        seen |= {
            cells[4 * i + j]
            for i in range(row // 2 * 2, row)
            for j in (column // 2 * 2, column // 2 * 2 + 1)
        }
        for digit in range(1, 5):
            if digit not in seen:
                extend([*cells, digit])

    extend([])
    return found


SOLUTIONS_4 = np.array(all_solutions_of_four()) + BLANK


def test_all_4x4_boards_are_found() -> None:
    answers = solve(FOUR, np.full(16, BLANK), limit=1000).answers
    assert len(answers) == 288
    assert {tuple(a.tolist()) for a in answers} == {tuple(s) for s in SOLUTIONS_4.tolist()}


@given(seeds, st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_the_solver_counts_right(seed: int, givens: int) -> None:
    """Against the list of all boards, with random givens, among them contradictory ones."""
    rng = np.random.default_rng(seed)
    question = np.full(16, BLANK, np.int32)
    cells = rng.permutation(16)[:givens]
    if seed % 2:
        question[cells] = SOLUTIONS_4[rng.integers(288)][cells]
    else:
        question[cells] = BLANK + rng.integers(1, 5, givens)
    fitting = SOLUTIONS_4[((question == SOLUTIONS_4) | (question == BLANK)).all(axis=1)]
    solved = solve(FOUR, question, limit=1000)
    assert sorted(a.tolist() for a in solved.answers) == sorted(fitting.tolist())
    assert solve(FOUR, question).unique is (len(fitting) == 1)
    assert len(solve(FOUR, question).answers) == min(2, len(fitting))


@pytest.mark.parametrize("text", [SEVENTEEN, HARD])
def test_known_9x9_puzzles_have_one_solution(text: str) -> None:
    question = NINE.parse(text)
    solved = solve(NINE, question)
    assert solved.unique
    assert NINE.check(question, solved.answers[0]).ok


def test_difficulty_is_counted() -> None:
    """A board with one cell open needs no guess, the hard one many that come to nothing."""
    full = solve(NINE, NINE.parse(HARD)).answers[0]
    easy = full.copy()
    easy[40] = BLANK
    assert (solve(NINE, easy).guesses, solve(NINE, easy).backtracks) == (0, 0)
    hard = solve(NINE, NINE.parse(HARD))
    assert hard.guesses > hard.backtracks > 50


def test_tokens_that_are_no_givens_have_no_solution() -> None:
    assert solve(FOUR, np.full(16, 0)).answers == ()
    assert solve(FOUR, np.full(16, 9)).answers == ()


def test_a_search_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MOST_GUESSES", 10)
    with pytest.raises(EdgertError, match="gave up after 10 guesses"):
        solve(NINE, np.full(81, BLANK), limit=1000)


# ------------------------------------------------------------------ making puzzles


@every_board
def test_made_puzzles_have_one_solution(board: Sudoku) -> None:
    for seed in range(20):
        puzzle = some_puzzle(board, seed)
        solved = solve(board, puzzle.question)
        assert solved.unique
        assert solved.guesses == puzzle.guesses
        np.testing.assert_array_equal(solved.answers[0], puzzle.answer)
        assert board.check(puzzle.question, puzzle.answer).ok


@every_board
def test_no_given_of_a_hardest_puzzle_can_be_spared(board: Sudoku) -> None:
    puzzle = make(board, np.random.default_rng(3), put_back=0)
    for cell in np.flatnonzero(puzzle.question != BLANK):
        without = puzzle.question.copy()
        without[cell] = BLANK
        assert not solve(board, without).unique


def test_digits_are_put_back_evenly() -> None:
    """0 to K of them: the number of givens above a minimal puzzle of the same draws."""
    counts = set()
    for seed in range(200):
        hardest = make(FOUR, np.random.default_rng(seed), put_back=0)
        eased = make(FOUR, np.random.default_rng(seed))
        given = hardest.question != BLANK
        np.testing.assert_array_equal(eased.question[given], hardest.question[given])
        counts.add(int((eased.question != BLANK).sum() - given.sum()))
    assert counts == set(range(PUT_BACK[4] + 1))


def test_minimal_puzzles_have_as_many_givens_as_published() -> None:
    """Averages of the specification: 4.3, 10.0 and 24.6 givens; 5 standard errors apart at most."""
    for board, count, mean in ((FOUR, 300, 4.3), (SIX, 100, 10.0), (NINE, 40, 24.6)):
        rng = np.random.default_rng(1)
        givens = [int((make(board, rng, 0).question != BLANK).sum()) for _ in range(count)]
        assert abs(np.mean(givens) - mean) < 5 * np.std(givens) / np.sqrt(count) + 0.05


@pytest.mark.parametrize(("board", "budget_ms"), [(FOUR, 1.0), (SIX, 4.0), (NINE, 100.0)])
def test_a_puzzle_is_made_in_time(board: Sudoku, budget_ms: float) -> None:
    """CPU time a puzzle on one thread; the best of up to 20 rounds, since others use the CPU."""
    rng = np.random.default_rng(0)
    solve(board, np.full(board.seq_len, BLANK))  # builds the tables
    best = float("inf")
    for _ in range(20):
        start = time.process_time()
        for _ in range(8):
            make(board, rng)
        best = min(best, (time.process_time() - start) / 8 * 1e3)
        if best <= budget_ms:
            break
    assert best <= budget_ms, f"{best:.2f} ms"


@pytest.mark.parametrize("board", [FOUR, SIX, NINE], ids=lambda board: board.name)
def test_the_same_seed_makes_the_same_set(board: Sudoku) -> None:
    one, two, other = make_set(board, 6, 7), make_set(board, 6, 7), make_set(board, 6, 8)
    for name in ("questions", "answers", "guesses"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.questions, other.questions)


@pytest.mark.parametrize("board", [FOUR, SIX, NINE], ids=lambda board: board.name)
def test_a_set_has_as_many_classes_as_puzzles(board: Sudoku) -> None:
    made = make_set(board, 12, 3)
    assert len({canonical(board, question) for question in made.questions}) == len(made) == 12
    for question, answer in zip(made.questions, made.answers, strict=True):
        solved = solve(board, question)
        assert solved.unique
        np.testing.assert_array_equal(solved.answers[0], answer)


@pytest.mark.parametrize(
    ("board", "givens"), [(FOUR, (5, 6)), (SIX, (10, 12)), (NINE, (25, 25)), (NINE, (60, 70))]
)
def test_a_set_keeps_to_its_number_of_givens(board: Sudoku, givens: tuple[int, int]) -> None:
    counts = (make_set(board, 8, 1, givens=givens).questions != BLANK).sum(axis=1)
    assert givens[0] <= counts.min() <= counts.max() <= givens[1]


def test_a_set_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="4,709 classes wanted, the 4x4 board has 4,708"):
        make_set(FOUR, 4709, 0)
    with pytest.raises(UsageError, match="14 classes wanted, the 4x4 board has 13 with 0 to 4"):
        make_set(FOUR, 14, 0, givens=(0, 4))
    with pytest.raises(EdgertError, match="0 classes found in 50 tries, 1 wanted"):
        make_set(SIX, 1, 0, givens=(0, 5))
    with pytest.raises(UsageError, match="a set of 0 classes"):
        make_set(SIX, 0, 0)
    with pytest.raises(UsageError, match="givens from 9 to 8 are not possible"):
        make_set(SIX, 1, 0, givens=(9, 8))
    with pytest.raises(UsageError, match="put_back = -1 is negative"):
        make(SIX, np.random.default_rng(0), -1)


# ------------------------------------------------------------------ symmetry


@given(boards, seeds)
@settings(max_examples=60, deadline=None)
def test_a_symmetry_keeps_the_one_solution(board: Sudoku, seed: int) -> None:
    """Augmenting and solving commute."""
    puzzle = some_puzzle(board, seed)
    turn = draw_symmetry(board, np.random.default_rng(seed))
    solved = solve(board, turn.apply(puzzle.question))
    assert solved.unique
    np.testing.assert_array_equal(solved.answers[0], turn.apply(puzzle.answer))


@given(boards, seeds)
@settings(max_examples=80, deadline=None)
def test_the_class_of_a_board_stays_under_its_symmetries(board: Sudoku, seed: int) -> None:
    puzzle = some_puzzle(board, seed)
    turn = draw_symmetry(board, np.random.default_rng(seed))
    for tokens in (puzzle.question, puzzle.answer):
        name = canonical(board, tokens)
        assert canonical(board, turn.apply(tokens)) == name
        # The name is a board of the class itself.
        laid = np.frombuffer(name, np.uint8).astype(np.int32) + BLANK
        assert canonical(board, laid) == name
        assert len(solve(board, laid).answers) == 1


@given(boards, seeds, st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_nearly_empty_boards_have_a_class_too(board: Sudoku, seed: int, givens: int) -> None:
    """Empty rows, columns and bands change places without a trace."""
    rng = np.random.default_rng(seed)
    tokens = np.full(board.seq_len, BLANK, np.int32)
    cells = rng.permutation(board.seq_len)[:givens]
    tokens[cells] = random_solution(board, rng)[cells]
    assert canonical(board, draw_symmetry(board, rng).apply(tokens)) == canonical(board, tokens)


@every_board
def test_a_symmetry_is_what_its_formula_says(board: Sudoku) -> None:
    """new[i, j] = digits(x[rows[i], columns[j]]), cell by cell, with and without the transpose."""
    rng = np.random.default_rng(0)
    n, puzzle = board.size, some_puzzle(board, 1)
    x = (puzzle.question - BLANK).reshape(n, n)
    seen = set()
    for _ in range(8):
        turn = draw_symmetry(board, rng)
        seen.add(turn.transposed)
        got = turn.apply(puzzle.question).reshape(n, n) - BLANK
        for i in range(n):
            for j in range(n):
                at = (turn.rows[i], turn.columns[j])
                value = x[at[::-1]] if turn.transposed else x[at]
                assert got[i, j] == (turn.digits[value - 1] if value else 0)
    assert seen == ({False, True} if board.box_rows == board.box_columns else {False})


def test_a_symmetry_is_drawn_as_published() -> None:
    """All bands, rows and digits are moved; the transpose appears where boxes are square only."""
    for board in BOARDS:
        rng = np.random.default_rng(0)
        drawn = [draw_symmetry(board, rng) for _ in range(400)]
        n, r, c = board.size, board.box_rows, board.box_columns
        share = np.mean([turn.transposed for turn in drawn])
        assert 0.4 < share < 0.6 if r == c else share == 0
        for lines, size in (("rows", r), ("columns", c)):
            for turn in drawn:
                order = getattr(turn, lines)
                assert sorted(order.tolist()) == list(range(n))
                assert (order.reshape(-1, size) // size == order[::size, None] // size).all()
            assert {int(getattr(turn, lines)[0]) for turn in drawn} == set(range(n))
        assert {int(turn.digits[0]) for turn in drawn} == set(range(1, n + 1))


def test_padding_and_blanks_are_not_renamed() -> None:
    turn = draw_symmetry(NINE, np.random.default_rng(0))
    assert set(turn.apply(np.full(81, 0)).tolist()) == {0}
    assert set(turn.apply(np.full((3, 81), BLANK)).reshape(-1).tolist()) == {BLANK}


def geometry(board: Sudoku) -> np.ndarray:
    """Every rearrangement of cells, [count, n*n], built apart from `canonical`."""
    n, r, c = board.size, board.box_rows, board.box_columns
    cells = np.arange(n * n).reshape(n, n)
    return np.array(
        [
            x[np.ix_(rows, columns)].reshape(-1)
            for x in ((cells, cells.T) if r == c else (cells,))
            for rows in arrangements(n // r, r)
            for columns in arrangements(n // c, c)
        ]
    )


GEOMETRY_4 = geometry(FOUR)
DIGITS_4 = np.array(
    [[0, BLANK, *(p + 1 + BLANK)] for p in arrangements(1, 4)], np.uint8
)  # all 24 renamings


def by_force(tokens: np.ndarray) -> bytes:
    """The least of all 3072 images of a 4x4 board, one by one."""
    images = DIGITS_4[:, tokens[GEOMETRY_4]].reshape(-1, 16)
    return min(image.tobytes() for image in images)


def test_the_symmetries_of_4x4_boards_are_counted() -> None:
    assert len({tuple(cells) for cells in GEOMETRY_4.tolist()}) == 128
    assert len({tuple(digits) for digits in DIGITS_4.tolist()}) == 24


def test_classes_are_told_apart_exactly() -> None:
    """All 4x4 boards of up to two digits, and 300 others: one class, one name, both ways, in the
    manner of small boards and in that of large ones."""
    tested = [np.full(16, BLANK)]
    for i in range(16):
        for digit in (1, 3):
            one = np.full(16, BLANK)
            one[i] = BLANK + digit
            tested.append(one)
            for j in range(i):
                for other in (1, 4):
                    two = one.copy()
                    two[j] = BLANK + other
                    if FOUR.check(two, two).valid:
                        tested.append(two)
    rng = np.random.default_rng(0)
    for _ in range(300):
        shown = rng.random(16) < rng.random()
        tested.append(np.where(shown, SOLUTIONS_4[rng.integers(288)], BLANK))
    names: dict[bytes, bytes] = {}
    for tokens in tested:
        name, forced = canonical(FOUR, tokens), by_force(tokens)
        assert names.setdefault(name, forced) == forced
        assert row_by_row(FOUR, (tokens.reshape(4, 4) - BLANK).astype(np.int8)) == name
    assert len(set(names.values())) == len(names) > 100


def test_every_class_of_4x4_puzzles_is_listed_once() -> None:
    """4,710 of them, 2 of which are full; no two are alike, and all have one solution."""
    questions, answers = every_class()
    assert len(questions) == len({canonical(FOUR, q) for q in questions}) == 4710
    values = (questions.reshape(-1, 4, 4) - BLANK).astype(np.int8)
    assert len({row_by_row(FOUR, grid) for grid in values[::5]}) == 942
    assert int((questions != BLANK).all(axis=1).sum()) == 2
    for question, answer in zip(questions[::37], answers[::37], strict=True):
        np.testing.assert_array_equal(solve(FOUR, question).answers[0], answer)
        assert solve(FOUR, question).unique


def test_the_classes_of_4x4_puzzles_hold_all_puzzles() -> None:
    """Orbits add up: the symmetries over those that keep a puzzle, summed, are all the puzzles."""
    questions, _ = every_class()
    orbits = 0
    for question in questions:
        seen = len(set(question.tolist()))  # the blank among them
        images = question[GEOMETRY_4]
        same = ((images == BLANK) == (question == BLANK)).all(axis=1)
        pairs = np.sort(images[same] * 8 + question, axis=1)
        # As many pairs (digit, digit there) as digits: a renaming makes up for the rearrangement.
        # It is the only one: with two digits unseen there would be two solutions.
        kept = int(((np.diff(pairs, axis=1) != 0).sum(axis=1) == seen - 1).sum())
        assert seen >= 3 + (BLANK in question)
        orbits += len(GEOMETRY_4) * 24 // kept
    kinds: dict[bytes, list[np.ndarray]] = {}
    for solution in SOLUTIONS_4:
        kinds.setdefault(by_force(solution), []).append(solution)
    unique = 0
    for alike in kinds.values():  # as many puzzles have this solution as have one like it
        alone = np.ones(1 << 16, bool)
        for other in SOLUTIONS_4:
            if (differs := other != alike[0]).any():
                alone &= np.arange(1 << 16) & int(differs @ (1 << np.arange(16))) != 0
        unique += len(alike) * int(alone.sum())
    assert orbits == unique == 96 * 41401 + 192 * 50027


def test_the_made_puzzles_are_among_the_listed_classes() -> None:
    listed = {canonical(FOUR, question) for question in every_class()[0]}
    rng = np.random.default_rng(0)
    assert {canonical(FOUR, make(FOUR, rng).question) for _ in range(200)} <= listed


def test_solutions_of_6x6_boards_fall_into_49_classes() -> None:
    """Collected at random until there are 49, whose orbits are all 28,200,960 boards that exist: a
    class too many or too few would show in the sum."""
    turns = geometry(SIX)
    rng = np.random.default_rng(1)
    names: set[bytes] = set()
    for _ in range(20_000):
        names.add(canonical(SIX, random_solution(SIX, rng)))
        if len(names) >= 49:
            break
    boards = 0
    for name in names:
        grid = np.frombuffer(name, np.uint8)
        pairs = np.sort(grid * np.uint8(8) + grid[turns], axis=1)
        keeping = int(((np.diff(pairs, axis=1) != 0).sum(axis=1) == 5).sum())
        boards += len(turns) * 720 // keeping
    assert (len(names), boards) == (49, 28_200_960)


def test_what_has_no_class_is_refused() -> None:
    for tokens, message in (
        (np.full(16, 0), r"token 0 is neither a blank nor a digit\n  where  row 1, column 1"),
        (np.array([1] * 15 + [6]), r"token 6 is neither a blank nor a digit\n  where  row 4, colu"),
        (np.array([2, 2] + [1] * 14), "a digit twice in a row or column"),
    ):
        with pytest.raises(UsageError, match=message):
            canonical(FOUR, tokens)


def test_training_and_test_share_no_class() -> None:
    """All 4x4 classes with a blank: 3,708 to train on and 1,000 held out."""
    made = make_set(FOUR, 4708, 0)
    train, test = split(FOUR, made, 1000, 1)
    assert (len(train), len(test)) == (3708, 1000)
    names = [{canonical(FOUR, q) for q in part.questions} for part in (train, test)]
    assert (len(names[0]), len(names[1])) == (3708, 1000)
    assert not names[0] & names[1]
    rng = np.random.default_rng(2)
    for question in train.questions[::50]:  # nor does an augmented one come near
        assert canonical(FOUR, draw_symmetry(FOUR, rng).apply(question)) not in names[1]


def test_alike_puzzles_go_the_same_way() -> None:
    """Several puzzles of a class are either all held out or all trained on."""
    made = make_set(SIX, 6, 0)
    rng = np.random.default_rng(0)
    turns = [draw_symmetry(SIX, rng) for _ in range(3)]
    several = Puzzles(
        np.concatenate([turn.apply(made.questions) for turn in turns]),
        np.concatenate([turn.apply(made.answers) for turn in turns]),
        np.tile(made.guesses, 3),
    )
    train, test = split(SIX, several, 2, 0)
    assert (len(train), len(test)) == (12, 6)
    with pytest.raises(UsageError, match="6 of 6 classes cannot be held out"):
        split(SIX, several, 6, 0)
