"""The puzzles that a model is shown: their order, how turned, how easy, and none held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_puzzles
import torch

from edgert.progress import Reporter
from edgert.tasks import find
from edgert.tasks.puzzleset import open_puzzleset
from edgert.tasks.sudoku_symmetry import canonical
from edgert.train.deal import Dealer, ease, name_of, turner
from edgert.train.puzzle_data import PuzzleMaterial, prepare_puzzles
from edgert.train.recipe import read_recipe

DATA = "classes = 60\n"


def dealer_of(folder: Path, *changes: tuple[str, str]) -> Dealer:
    recipe = read_recipe(tiny_puzzles.write(folder, *changes))
    if not (folder / "run.json").exists():
        prepare_puzzles(recipe, folder, Reporter())
    return PuzzleMaterial(recipe, folder).source()


def test_no_puzzle_that_is_dealt_is_of_a_class_that_is_held_out(tmp_path):
    """Turned or eased, it never is: an easier form of a puzzle may be another puzzle's class."""
    board = find("sudoku-4x4")
    changes = (
        (DATA, "classes = 3000\naugment = true\ncurriculum = 1.0\n"),
        (*("held_out = 20", "held_out = 2000"),),
    )
    dealer = dealer_of(tmp_path, *changes)
    test = open_puzzleset(tmp_path / "data", "test")
    held_out = {canonical(board, question) for question in np.asarray(test.inputs).astype(int)}
    assert held_out == dealer.forbidden
    assert len(held_out) == 2000
    blanks = []
    for step in range(12):
        grids = dealer.deal(step, slice(0, 8))
        for question, answer in zip(grids.inputs.numpy(), grids.labels.numpy(), strict=True):
            assert canonical(board, question) not in held_out
            assert board.check(question, answer).ok
            blanks.append(int((question == 1).sum()))
    assert np.mean(blanks[:24]) + 2 < np.mean(blanks[-24:])  # it has become harder


def test_a_dealer_goes_on_where_it_stood_and_shares_out_its_rows(tmp_path):
    """Across the border of an epoch; two processes together see what one does."""
    changes = (DATA, f"{DATA}augment = true\n"), ("held_out = 20", "held_out = 40")
    whole = dealer_of(tmp_path, *changes)
    batches = [whole.deal(step, slice(0, 8)) for step in range(9)]
    assert whole.iteration > 2  # 20 puzzles are two batches
    part = dealer_of(tmp_path, *changes)
    for step in range(4):
        part.deal(step, slice(0, 8))
    later = dealer_of(tmp_path, *changes)
    later.restore(part.state)
    halves = [dealer_of(tmp_path, *changes) for _ in range(2)]
    for step, batch in enumerate(batches):
        for half, rows in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
            assert torch.equal(half.deal(step, rows).inputs, batch.inputs[rows])
        if step >= 4:
            assert torch.equal(later.deal(step, slice(0, 8)).inputs, batch.inputs)
    turned = [dealer_of(tmp_path, *changes) for _ in range(2)]
    wanted = torch.arange(8) % 2 == 0
    one = turned[0].deal(0, slice(0, 8), wanted)
    assert torch.equal(one.inputs[wanted], batches[0].inputs[wanted])
    assert not torch.equal(one.inputs, batches[0].inputs)


def test_easing_gives_cells_of_the_answer_and_turning_keeps_the_puzzle():
    """All cells at share 0, none at 1; mazes keep their shape when they are turned."""
    rng = np.random.default_rng(0)
    question, answer = np.ones(400, np.int32), np.full(400, 3, np.int32)
    answer[:10] = -100
    assert (ease(question, answer, 0.0, rng)[10:] == 3).all()
    assert (ease(question, answer, 1.0, rng) == question).all()
    half = ease(question, answer, 0.5, rng)
    assert (half[:10] == 1).all()
    assert 0.4 < (half[10:] == 3).mean() < 0.6
    maze = find("maze-3x4")
    turn = turner(maze)
    pair = np.arange(24, dtype=np.int32).reshape(2, 12)
    seen = {turn(pair, rng).tobytes() for _ in range(60)}
    assert len(seen) == 4
    square = turner(find("maze-3x3"))
    grid = np.arange(18, dtype=np.int32).reshape(2, 9)
    assert len({square(grid, rng).tobytes() for _ in range(200)}) == 8


def test_cells_that_do_not_count_are_turned_with_the_others():
    """And a grid that breaks a rule, as a foreign data set may have it, is a puzzle of its own."""
    board, rng = find("sudoku-4x4"), np.random.default_rng(3)
    turn = turner(board)
    question = np.array([1, 2, 1, 1] * 4, np.int32)
    answer = np.array([2, 3, 4, 5, 4, 5, 2, 3, 3, 2, 5, 4, 5, 4, 3, 2], np.int32)
    answer[question == 2] = -100
    for _ in range(20):
        turned = turn(np.stack([question, answer]), rng)
        assert sorted(np.unique(turned[0]))[0] == 1
        assert ((turned[1] == -100) == (turned[0] != 1)).all()
        assert len(np.unique(turned[1][turned[1] != -100])) == 4
    assert name_of(board, question, True) == name_of(board, question, False)
    sound = np.ones(16, np.int32)
    sound[0] = 2
    other = np.ones(16, np.int32)
    other[5] = 4
    assert name_of(board, sound, True) == name_of(board, other, True)
    assert name_of(board, sound, False) != name_of(board, other, False)
