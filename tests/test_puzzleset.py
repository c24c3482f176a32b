"""Data sets of puzzles: the published folders read, built again exactly, dealt, and distrusted."""

from __future__ import annotations

import filecmp
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import BadFile, EdgertError, UsageError
from edgert.tasks.arc import Arc, split_name
from edgert.tasks.arc_files import ArcTask, Pair, read_tasks
from edgert.tasks.builders import (
    ArcPuzzle,
    arc_pairs,
    build_arc,
    build_maze,
    build_sudoku,
    plan_arc,
    read_maze_csv,
    read_sudoku_csv,
    sudoku_groups,
    write_arc,
    write_sudoku,
)
from edgert.tasks.maze import Maze
from edgert.tasks.npyfile import MAX_HEADER, ArrayWriter, Unsound, open_array
from edgert.tasks.puzzleset import IGNORED, PuzzleSet, Split, open_puzzleset, read_identifiers
from edgert.tasks.puzzleset_write import PuzzleRows, write_puzzleset
from edgert.tasks.sudoku import BLANK, FOUR, NINE, Sudoku
from edgert.tasks.sudoku_make import make_set
from edgert.tasks.sudoku_solve import solve
from edgert.tasks.sudoku_symmetry import Symmetry, arrangements

(CASE,) = cases("hrm", lambda case: case.name == "dataset_formats")
RAW, BUILT = CASE.folder / "raw", CASE.folder / "built"
MAZE = Maze(30, 30)
SPLITS: tuple[Split, ...] = ("train", "test")


def same_files(one: Path, two: Path) -> list[str]:
    """Files of both folders that are not equal byte by byte, or in one of them only."""
    names = {str(path.relative_to(root)) for root in (one, two) for path in root.rglob("*.*")}
    different = [
        name
        for name in sorted(names)
        if not ((one / name).is_file() and (two / name).is_file())
        or not filecmp.cmp(one / name, two / name, shallow=False)
    ]
    assert names
    return different


# ------------------------------------------------------------------ the published folders


@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("sudoku", "train", (24, 24, 6)),
        ("sudoku", "test", (4, 4, 4)),
        ("maze", "train", (24, 24, 3)),
        ("maze", "test", (2, 2, 2)),
        ("arc", "train", (48, 16, 4)),
        ("arc", "test", (8, 8, 2)),
    ],
)
def test_the_published_folders_are_sound(
    name: str, split: Split, counts: tuple[int, int, int]
) -> None:
    data = open_puzzleset(BUILT / name, split)
    assert (data.examples, data.puzzles, data.groups) == counts
    assert isinstance(data.inputs, np.memmap)
    assert not data.inputs.flags.writeable
    stored = np.load(BUILT / name / split / "all__labels.npy", allow_pickle=False)
    np.testing.assert_array_equal(data.labels, stored)


@pytest.mark.parametrize("name", ["sudoku", "maze", "arc"])
def test_padded_test_batches_are_the_published_ones(name: str) -> None:
    """Every array of every batch that the reference loader gives is exactly equal."""
    data = open_puzzleset(BUILT / name, "test")
    compared = 0
    for i, batch in enumerate(data.test_batches(3)):
        if f"{name}_test{i}_inputs" not in CASE.arrays:
            continue
        assert batch.count == int(CASE[f"{name}_test{i}_count"])
        for field, got in (
            ("inputs", batch.inputs),
            ("labels", batch.labels),
            ("puzzle_identifiers", batch.identifiers),
        ):
            want = CASE[f"{name}_test{i}_{field}"]
            assert got.dtype == want.dtype == np.int32
            np.testing.assert_array_equal(got, want)
        compared += 1
    assert compared == {"sudoku": 2, "maze": 1, "arc": 2}[name]


def test_mazes_are_built_as_published(tmp_path: Path) -> None:
    """All eight images of the training mazes: every file of the folder, byte by byte."""
    build_maze(RAW / "maze", tmp_path / "maze", MAZE, all_images=True)
    assert same_files(BUILT / "maze", tmp_path / "maze") == []


def recovered(question: np.ndarray, answer: np.ndarray, want: np.ndarray) -> Symmetry:
    """The symmetry that turns question and answer [81] into `want` [2, 81], by search.

    Every order of rows and source of the first column, which fixes the digits; then each other
    column has to be one of those that are left.
    """
    orders = arrangements(3, 3)
    target = want[1].reshape(9, 9) - BLANK
    for transposed in (False, True):
        grid = answer.reshape(9, 9) - BLANK
        grid = grid.T if transposed else grid
        laid = grid[orders]  # [1296, 9, 9]
        at = np.arange(len(orders))[:, None]
        for first in range(9):
            digits = np.zeros((len(orders), 10), np.int64)
            digits[at, laid[:, :, first]] = target[:, 0]
            named = digits[at[:, :, None], laid]
            fits = (named[:, :, None, :] == target[:, :, None]).all(axis=1)  # [1296, j, source]
            for k in np.flatnonzero(fits.any(axis=2).all(axis=1)):
                turn = Symmetry(transposed, orders[k], fits[k].argmax(axis=1), digits[k, 1:])
                valid = any((turn.columns == order).all() for order in orders)
                if valid and (turn.apply(np.stack([question, answer])) == want).all():
                    return turn
    raise AssertionError("no symmetry makes the published augmentation")


def test_sudokus_are_built_as_published(tmp_path: Path) -> None:
    """With the published symmetries, which are searched for. All files are equal byte by byte but
    the training inputs and labels: their numbers are equal, in uint8 instead of int64."""
    found = {split: read_sudoku_csv(RAW / "sudoku" / f"{split}.csv") for split in SPLITS}
    train = open_puzzleset(BUILT / "sudoku", "train")
    published = np.stack([train.inputs, train.labels], axis=1).reshape(6, 4, 2, 81)
    turns = [
        [recovered(question, answer, want) for want in group[1:]]
        for question, answer, group in zip(
            found["train"].questions.astype(np.int64),
            found["train"].answers,
            published,
            strict=True,
        )
    ]
    write_puzzleset(
        tmp_path / "sudoku",
        {
            "train": sudoku_groups(found["train"], turns),
            "test": sudoku_groups(found["test"], [[]] * 4),
        },
        seq_len=81,
        vocab_size=11,
    )
    assert same_files(BUILT / "sudoku", tmp_path / "sudoku") == [
        "train/all__inputs.npy",
        "train/all__labels.npy",
    ]
    ours = open_puzzleset(tmp_path / "sudoku", "train")
    assert (str(ours.inputs.dtype), str(train.inputs.dtype)) == ("uint8", "int64")
    np.testing.assert_array_equal(ours.inputs, train.inputs)
    np.testing.assert_array_equal(ours.labels, train.labels)


def test_sudokus_are_augmented_as_published(tmp_path: Path) -> None:
    """Our own draws: the same counts, the first of a group as it is, the others solved alike."""
    build_sudoku(RAW / "sudoku", tmp_path / "sudoku", augmentations=3, seed=5)
    for split in SPLITS:
        ours, theirs = (open_puzzleset(root / "sudoku", split) for root in (tmp_path, BUILT))
        np.testing.assert_array_equal(ours.puzzle_indices, theirs.puzzle_indices)
        np.testing.assert_array_equal(ours.group_indices, theirs.group_indices)
        first = ours.puzzle_indices[ours.group_indices[:-1]]
        np.testing.assert_array_equal(ours.inputs[first], theirs.inputs[first])
        for question, answer in zip(ours.inputs, ours.labels, strict=True):
            solved = solve(NINE, question)
            assert solved.unique
            np.testing.assert_array_equal(solved.answers[0], answer)
    assert len(np.unique(ours.inputs, axis=0)) == len(ours.inputs)


class Scripted:
    """Stands for a generator: gives the draws that the published builder must have made."""

    def __init__(self, draws: Iterator[int]) -> None:
        self.draws = draws

    def integers(self, high: int) -> int:
        value = next(self.draws)
        assert 0 <= value < high
        return value


def published_offsets(canvases: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of the first token that is no padding: where each grid was put."""
    grids = canvases.reshape(-1, 30, 30) != 0
    return [(int(g.any(axis=1).argmax()), int(g.any(axis=0).argmax())) for g in grids]


def test_arc_is_built_as_published(tmp_path: Path) -> None:
    """With the published augmentations, read from their names, and the published offsets, seen in
    the training inputs: every file of the folder, byte by byte."""
    tasks = {task.name: task for task in read_tasks(RAW / "arc")}
    plan: dict[str, list[ArcPuzzle]] = {}
    for identifier, name in enumerate(read_identifiers(BUILT / "arc")[1:], 1):
        task, augmentation = split_name(name)
        puzzle = ArcPuzzle(identifier, tasks[task], augmentation)
        assert puzzle.name == name
        plan.setdefault(task, []).append(puzzle)
    train = open_puzzleset(BUILT / "arc", "train")

    def draws() -> Iterator[int]:
        for start, end in zip(train.puzzle_indices, train.puzzle_indices[1:], strict=False):
            offsets = published_offsets(train.inputs[start:end])
            unmoved = offsets.index((0, 0))  # one example a puzzle is not moved
            yield unmoved
            for i, offset in enumerate(offsets):
                if i != unmoved:
                    yield from offset

    rng: Any = Scripted(draws())
    write_arc(tmp_path / "arc", Arc(), list(plan.values()), rng)
    assert same_files(BUILT / "arc", tmp_path / "arc") == []
    assert next(rng.draws, None) is None


def test_arc_is_augmented_as_published(tmp_path: Path) -> None:
    """Our own draws: identifiers are shared by both splits, augmentations of a task differ, and in
    training all but one example of a puzzle may be moved."""
    tasks = read_tasks(RAW / "arc")
    build_arc(tasks, tmp_path / "arc", augmentations=20, seed=2)
    names = read_identifiers(tmp_path / "arc")
    assert len(set(names)) == len(names) == 1 + 4 * 21
    moved = 0
    arc = Arc()
    for split in SPLITS:
        data = open_puzzleset(tmp_path / "arc", split)
        assert data.groups == (4 if split == "train" else 2)
        for puzzle in range(data.puzzles):
            start, end = (int(i) for i in data.puzzle_indices[puzzle : puzzle + 2])
            task_name, augmentation = split_name(names[data.puzzle_identifiers[puzzle]])
            task = next(task for task in tasks if task.name == task_name)
            offsets = published_offsets(data.inputs[start:end])
            assert (0, 0) in offsets
            moved += sum(offset != (0, 0) for offset in offsets)
            for row, offset, pair in zip(
                range(start, end), offsets, arc_pairs(task, split), strict=True
            ):
                for stored, grid in ((data.inputs, pair.input), (data.labels, pair.output)):
                    laid = arc.lay(augmentation.apply(grid), offset)
                    np.testing.assert_array_equal(stored[row], laid)
        assert (moved > 0) is (split == "train")
        moved = 0


def test_a_task_without_variety_gets_fewer_augmentations() -> None:
    """A cell that is black or of one colour has nine images; the draws end all the same."""
    pair = Pair(np.zeros((1, 1), np.uint8), np.full((1, 1), 3, np.uint8))
    task = ArcTask("plain", (pair,), (pair,), held_out=True)
    (plan,) = plan_arc([task], 100, np.random.default_rng(0))
    assert len(plan) == 9
    assert plan[0].name == "plain"


def test_without_tasks_held_out_there_is_no_test(tmp_path: Path) -> None:
    tasks = [task for task in read_tasks(RAW / "arc") if not task.held_out]
    with pytest.raises(UsageError, match="the split test has no puzzles"):
        build_arc(tasks, tmp_path / "arc", augmentations=0)
    with pytest.raises(UsageError, match="does not fit on a canvas of 6 x 6"):
        build_arc(tasks, tmp_path / "arc", Arc(6), augmentations=0)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ building


def test_made_puzzles_become_a_data_set(tmp_path: Path) -> None:
    train, test = make_set(FOUR, 12, 0), make_set(FOUR, 5, 1)
    write_sudoku(
        tmp_path / "four",
        FOUR,
        {"train": train, "test": test},
        augmentations=2,
        subsample=9,
        seed=3,
    )
    data = open_puzzleset(tmp_path / "four", "train")
    assert (data.examples, data.groups, data.meta.vocab_size, data.meta.seq_len) == (27, 9, 6, 16)
    rows = {tuple(row) for row in train.questions.tolist()}
    first = data.group_indices[:-1]
    assert {tuple(row) for row in data.inputs[first].tolist()} <= rows
    test_rows = open_puzzleset(tmp_path / "four", "test").inputs
    np.testing.assert_array_equal(test_rows, test.questions)


def test_the_same_seed_builds_the_same_folder(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        build_sudoku(RAW / "sudoku", tmp_path / name, augmentations=2, subsample=4, seed=seed)
    assert same_files(tmp_path / "one", tmp_path / "two") == []
    assert same_files(tmp_path / "one", tmp_path / "three") != []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails in mid-write leaves nothing behind, and nothing that exists is replaced."""

    def broken() -> Iterator[list[PuzzleRows]]:
        yield [PuzzleRows(0, np.ones((1, 4), int), np.ones((1, 4), int))]
        raise RuntimeError("in mid-write")

    with pytest.raises(RuntimeError, match="in mid-write"):
        write_puzzleset(tmp_path / "new", {"train": broken()}, seq_len=4, vocab_size=3)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").write_text("mine")
    with pytest.raises(UsageError, match="the folder exists already"):
        write_puzzleset(tmp_path / "new", {}, seq_len=4, vocab_size=3)
    with pytest.raises(EdgertError, match="cannot write"):
        write_puzzleset(tmp_path / "new" / "below", {}, seq_len=4, vocab_size=3)
    assert (tmp_path / "new").read_text() == "mine"


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="7 of 6 training puzzles cannot be chosen"):
        build_sudoku(RAW / "sudoku", out, subsample=7)
    with pytest.raises(UsageError, match="-1 augmentations"):
        build_sudoku(RAW / "sudoku", out, augmentations=-1)
    with pytest.raises(UsageError, match="changes its shape when it is turned"):
        build_maze(RAW / "maze", out, Maze(30, 31), all_images=True)


HEADER = "source,question,answer,rating\n"
ACCENTS = "\u00e9" * 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (HEADER, "the file has no puzzles"),
        ("a,b\n1,2\n", "the header is not source,question,answer,rating"),
        (HEADER + "a,b\n", "a row has 2 fields instead of 4(.|\n)*at line 2"),
        (HEADER + 'a,"b,c,d\n', "not sound CSV"),
        (HEADER + "a,\udcff,c,d\n", "not sound CSV: 'utf-8' codec"),
        (HEADER + "a," + "." * 140_000 + ",c,d\n", "a line has 131,072 characters or more"),
        (HEADER + "a,1..,2,0\n", "line 2: the question has 3 characters, not 16"),
        (HEADER + f"a,{'5' * 16},{'1' * 16},0\n", "line 2: the question has the character '5'"),
        (HEADER + f"a,{'.' * 16},{ACCENTS},0\n", r"line 2: the answer has the character '\\xe9'"),
        (HEADER + f"a,{'.' * 16},{'1' * 16},0\n", "line 2: no answer that solves its question"),
        (HEADER + "a,2...............,1324423124133142,0\n", "1 answers are wrong: line 2"),
    ],
)  # fmt: skip
def test_a_broken_csv_of_sudokus_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(BadFile, match=message):
        read_sudoku_csv(path, FOUR)


def test_every_wrong_line_is_named_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    good = "x,1...............,1324423124133142,0\n"
    path.write_text(HEADER + good + "x,1,2,0\n" * 50)
    with pytest.raises(BadFile) as caught:
        read_sudoku_csv(path, FOUR)
    assert "line 3: the question has 1 characters" in caught.value.what
    assert len(caught.value.what) < 2000


def test_a_maze_without_a_path_in_its_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(HEADER + "x,S G###   ,SoG###   ,0\nx,S G###   ,S G###   ,0\n")
    with pytest.raises(BadFile, match="1 answers are wrong: line 3: no answer that marks a path"):
        read_maze_csv(path, Maze(3, 3))


# ------------------------------------------------------------------ dealing


def a_set(groups: list[list[int]], cells: int = 3) -> PuzzleSet:
    """Groups of puzzles of so many examples; inputs name the example, labels the puzzle."""
    sizes = [size for group in groups for size in group]
    examples = np.arange(sum(sizes))
    puzzle = np.repeat(np.arange(len(sizes)), sizes)
    meta = open_puzzleset(BUILT / "arc", "train").meta
    return PuzzleSet(
        meta,
        np.repeat(examples[:, None], cells, axis=1),
        np.repeat(puzzle[:, None], cells, axis=1),
        np.arange(len(sizes)) * 10,
        np.cumsum([0, *sizes]),
        np.cumsum([0, *map(len, groups)]),
    )


shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=12)


@given(shapes, st.integers(1, 9), st.integers(0, 1000), st.integers(0, 50), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_dealt_as_published(
    groups: list[list[int]], size: int, seed: int, iteration: int, epochs: int
) -> None:
    """One puzzle of each group in turn, all of its examples as far as the batch has room."""
    data = a_set(groups)
    group_of_puzzle = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    fewest, most = (epochs * sum(pick(group) for group in groups) for pick in (min, max))
    if most < size:
        with pytest.raises(UsageError, match="do not fill a batch"):
            list(data.epoch(size, seed, iteration, epochs))
    if fewest < size:
        return
    batches = list(data.epoch(size, seed, iteration, epochs))
    turns: list[int] = []  # groups in the order in which they were dealt
    for batch in batches:
        assert batch.inputs.shape == (size, 3)
        assert batch.count == size
        examples = batch.inputs[:, 0]
        puzzles = np.searchsorted(data.puzzle_indices, examples, side="right") - 1
        np.testing.assert_array_equal(batch.identifiers, puzzles * 10)
        at = 0
        while at < size:  # a puzzle is dealt whole, or as far as the batch goes
            count = int(data.puzzle_indices[puzzles[at] + 1] - data.puzzle_indices[puzzles[at]])
            taken = examples[at : at + count]
            assert len(set(taken.tolist())) == len(taken) == min(count, size - at)
            assert set(puzzles[at : at + count].tolist()) == {puzzles[at]}
            turns.append(int(group_of_puzzle[puzzles[at]]))
            at += len(taken)
    for start in range(0, len(turns), len(groups)):  # a permutation of groups an epoch
        part = turns[start : start + len(groups)]
        assert len(set(part)) == len(part)
    assert len(turns) <= len(groups) * epochs


def test_an_epoch_draws_from_philox_of_seed_plus_iteration() -> None:
    """The order of groups of an epoch of single examples is numpy's permutation, exactly."""
    data = a_set([[1]] * 10)
    for seed, iteration in ((0, 1), (3, 4)):
        rng = np.random.Generator(np.random.Philox(seed + iteration))
        (batch,) = data.epoch(10, seed, iteration)
        np.testing.assert_array_equal(batch.inputs[:, 0], rng.permutation(10))
    rng = np.random.Generator(np.random.Philox(1))
    twice = np.concatenate([rng.permutation(10), rng.permutation(10)])
    dealt = np.concatenate([rows for rows in data.epoch_rows(5, 0, 1, epochs=2)])
    np.testing.assert_array_equal(dealt, twice)


def test_augmentations_and_orders_vary_between_iterations() -> None:
    data = a_set([[2, 2, 2, 2]])
    seen = {tuple(next(data.epoch_rows(2, 0, i)).tolist()) for i in range(100)}
    assert seen == {(k, k + 1) for k in range(0, 8, 2)} | {(k + 1, k) for k in range(0, 8, 2)}


def test_an_incomplete_last_batch_is_left_out() -> None:
    assert [len(rows) for rows in a_set([[1]] * 10).epoch_rows(4, 0, 1)] == [4, 4]
    assert [batch.count for batch in a_set([[1]] * 10).test_batches(4)] == [4, 4, 2]


def test_a_published_set_is_dealt_with_its_labels() -> None:
    """Padding of ARC canvases has no part in the loss; the label of a row is that of its input."""
    data = open_puzzleset(BUILT / "arc", "train")
    (rows,) = data.epoch_rows(10, 0, 1)
    (batch,) = data.epoch(10, 0, 1)
    labels = data.labels[rows].astype(np.int32)
    np.testing.assert_array_equal(batch.inputs, data.inputs[rows])
    np.testing.assert_array_equal(batch.labels, np.where(labels == 0, IGNORED, labels))
    assert (batch.labels == IGNORED).any()


def test_batches_that_cannot_be_are_refused() -> None:
    data = a_set([[1]] * 3)
    with pytest.raises(UsageError, match="3 groups in 1 epochs do not fill a batch of 4"):
        next(data.epoch(4, 0, 1))
    for batches in (data.epoch(0, 0, 1), data.test_batches(0)):
        with pytest.raises(UsageError, match="a batch of 0 rows"):
            next(batches)
    with pytest.raises(UsageError, match="seed -1, iteration 1 and 1 epochs"):
        next(data.epoch(1, -1, 1))


# ------------------------------------------------------------------ distrust


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the published ARC set, to be broken."""
    shutil.copytree(BUILT / "arc", tmp_path / "arc")
    return tmp_path / "arc"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path, allow_pickle=False)))


def put(index: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inputs", put((5, 17), 12), r"inputs\[5, 17\] is 12, vocab_size is 12"),
        ("labels", put((47, 899), 255), r"labels\[47, 899\] is 255, vocab_size is 12"),
        ("inputs", lambda a: a.astype(np.int64) - 1, r"inputs\[4, 0\] is -1, vocab_size is 12"),
        ("inputs", lambda a: a[:-1], r"labels is \[48, 900\] instead of \[47, 900\]"),
        ("labels", lambda a: a[:, :-1], r"labels is \[48, 899\] instead of \[48, 900\]"),
        ("labels", lambda a: a.reshape(-1), "labels has 1 axes instead of 2"),
        ("puzzle_identifiers", put(3, 17), r"puzzle_identifiers\[3\] is 17, num_puzzle_identifi"),
        ("puzzle_identifiers", put(3, -1), r"puzzle_identifiers\[3\] is -1, num_puzzle_identifi"),
        ("puzzle_indices", put(-1, 49), "puzzle_indices goes from 0 to 49 instead of from 0 to 48"),
        ("puzzle_indices", put(0, 1), r"puzzle_indices goes from 1 to 48(.|\n)*does not rise"),
        ("puzzle_indices", put(4, 2), r"puzzle_indices does not rise from \[3\] = 3 to \[4\] = 2"),
        ("puzzle_indices", put(4, 3), r"puzzle_indices does not rise from \[3\] = 3 to \[4\] = 3"),
        ("puzzle_indices", put(4, 1 << 30), r"does not rise from \[4\] = 1073741824 to \[5\] = 7"),
        ("puzzle_indices", lambda a: a[:-1], "puzzle_indices has 16 offsets, 17 are needed"),
        ("puzzle_indices", lambda a: a[:0], "puzzle_indices has 0 offsets, 17 are needed"),
        ("group_indices", put(-1, 17), "group_indices goes from 0 to 17 instead of from 0 to 16"),
        ("group_indices", lambda a: a[:-1], "group_indices has 4 offsets, 5 are needed"),
        ("group_indices", lambda a: a[:, None], "group_indices has 2 axes instead of 1"),
        ("inputs", lambda a: a.astype(np.float32), "its header is not one of an array of whole"),
        ("inputs", lambda a: a.astype(bool), "its header is not one of an array of whole numbers"),
        ("inputs", lambda a: np.asfortranarray(a), "all__inputs.npy: it is in Fortran order"),
    ],
)
def test_a_broken_array_is_refused(
    folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    rewrite(folder / "train" / f"all__{name}.npy", change)
    with pytest.raises(BadFile, match=message) as caught:
        open_puzzleset(folder, "train")
    assert caught.value.where == str(folder / "train")


def test_all_violations_are_listed(folder: Path) -> None:
    train = folder / "train"
    rewrite(train / "all__inputs.npy", put((0, 0), 99))
    rewrite(train / "all__puzzle_identifiers.npy", put(0, 99))
    rewrite(train / "all__group_indices.npy", put(0, 1))
    (train / "dataset.json").write_text((train / "dataset.json").read_text().replace("3.0", "2.5"))
    with pytest.raises(BadFile) as caught:
        open_puzzleset(folder, "train")
    for part in ("inputs[0, 0] is 99", "identifiers[0] is 99", "group_indices", "is 2.5"):
        assert part in caught.value.what
    (train / "all__inputs.npy").unlink()
    (train / "all__labels.npy").write_bytes(b"")
    with pytest.raises(BadFile) as caught:
        open_puzzleset(folder, "train")
    assert "all__inputs.npy: it cannot be read: No such file" in caught.value.what
    assert "all__labels.npy: it is not an .npy file" in caught.value.what


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0, not a whole number from 1 to 65536"),
        ("vocab_size", 1 << 40, "vocab_size is 1099511627776, not a whole number"),
        ("vocab_size", True, "vocab_size is True, not a whole number"),
        ("vocab_size", "12", "vocab_size is '12', not a whole number"),
        ("vocab_size", 12.0, "vocab_size is 12.0, not a whole number"),
        ("vocab_size", 11, "inputs.* is 11, vocab_size is 11"),
        ("seq_len", None, "seq_len is missing, not a whole number"),
        ("seq_len", 899, r"inputs is \[48, 900\] instead of \[48, 899\]"),
        ("pad_id", 12, "pad_id is 12, not a whole number from 0 to 11"),
        ("ignore_label_id", -1, "ignore_label_id is -1, not a whole number"),
        ("blank_identifier_id", 17, "blank_identifier_id is 17, not a whole number from 0 to 16"),
        ("num_puzzle_identifiers", 18, "num_puzzle_identifiers is 18, identifiers.json has 17"),
        ("total_groups", 5, "group_indices has 5 offsets, 6 are needed"),
        ("mean_puzzle_examples", "x", "mean_puzzle_examples is 'x', not a positive number"),
        ("mean_puzzle_examples", 1e999, "Infinity is not JSON"),
        ("sets", ["all", "more"], r"sets is \['all', 'more'\]; only \[\"all\"\] can be read"),
        ("sets", ["../x"], r"sets is \['\.\./x'\]"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_broken_description_is_refused(folder: Path, key: str, value: Any, message: str) -> None:
    path = folder / "train" / "dataset.json"
    content = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(content))
    with pytest.raises(BadFile, match=message):
        open_puzzleset(folder, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/dataset.json", "[]", "it is not an object"),
        ("train/dataset.json", " " * 70_000, "the file has more than 65,536 bytes"),
        ("train/dataset.json", "[" * 60_000, "nested too deep|not sound JSON"),
        ("identifiers.json", "{}", "it is not a list of names"),
        ("identifiers.json", "[0]", "it is not a list of names"),
        ("identifiers.json", "[]", "its first name is not <blank>"),
        ("identifiers.json", '["x"]', "its first name is not <blank>"),
        ("identifiers.json", '["<blank>", "a", "a", "a"]', "2 names appear more than once"),
    ],
)
def test_broken_json_is_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(BadFile, match=message):
        open_puzzleset(folder, "train")


def test_giant_identifiers_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte is refused by its first bytes too many."""
    monkeypatch.setattr("edgert.tasks.puzzleset.MAX_IDENTIFIERS", 1 << 20)
    with (folder / "identifiers.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadFile, match="the file has more than 1,048,576 bytes"):
        open_puzzleset(folder, "train")


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def pickled() -> bytes:
    """An object array, whose reading would run code."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.abort, ()

    head = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return npy(head, pickle.dumps([Bomb()]))


HEAD = "{'descr': '<i4', 'fortran_order': False, 'shape': (%s), }"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not an .npy file of version 1.0"),
        (b"\x93NUMPY", "it is not an .npy file of version 1.0"),
        (pickle.dumps([1]), "it is not an .npy file"),
        (pickled(), "its header is not one of an array of whole numbers"),
        (npy(HEAD % "2,", b"\0" * 8, b"\x02\x00"), "it is not an .npy file of version 1.0"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 60_000, "its header claims 65,535 bytes"),
        (b"\x93NUMPY\x01\x00\x80\x00{", "its header claims 128 bytes"),
        (npy(HEAD % "3,", b"\0" * 8), r"int32 \[3\] takes \d+ bytes, the file has \d+"),
        (npy(HEAD % "1,", b"\0" * 8), r"int32 \[1\] takes \d+ bytes, the file has \d+"),
        (npy(HEAD % "-1,", b""), "its header is not one of"),
        (npy(HEAD % f"{1 << 60},"), "its header is not one of"),
        (npy(HEAD % f"{10**14}, {10**14}"), "is absurd"),
        (npy(HEAD % f"0, {10**14}, {10**14}"), "is absurd"),
        (npy(HEAD % "1, 1, 1, 1, 1", b"\0" * 4), "it has 5 axes"),
        (npy(HEAD.replace("<i4", ">i4") % "1,", b"\0" * 4), "its header is not one of"),
        (npy(HEAD.replace("<i4", "<f4") % "1,", b"\0" * 4), "its header is not one of"),
        (npy(HEAD.replace("False", "True") % "1, 1", b"\0" * 4), "it is in Fortran order"),
        (npy("(" * 4000), "its header is not one of"),
        (npy("__import__('os').getcwd()"), "its header is not one of"),
    ],
)
def test_a_hostile_array_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(Unsound, match=message):
        open_array(path)


def test_what_is_no_file_is_no_array(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    with pytest.raises(Unsound, match="a special file"):
        open_array(tmp_path / "fifo.npy")
    with pytest.raises(Unsound, match="it cannot be read: Is a directory"):
        open_array(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_array_or_refused(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.npy"
    for data in (content, npy(HEAD % "2,", content), npy(content.decode("latin-1")[:80])):
        path.write_bytes(data)
        with suppress(Unsound):
            assert 0 <= open_array(path).nbytes < len(data)


@pytest.mark.parametrize("rows", [0, 1, 3, 1000])
@pytest.mark.parametrize(("dtype", "row"), [(np.uint8, (5,)), (np.int32, ()), (np.uint16, (2, 3))])
def test_arrays_are_written_as_numpy_does(
    tmp_path: Path, rows: int, dtype: type[np.generic], row: tuple[int, ...]
) -> None:
    """Part by part and byte by byte, and read back."""
    whole = (np.arange(rows * int(np.prod(row))) % 200).reshape(rows, *row).astype(dtype)
    writer = ArrayWriter(tmp_path / "x.npy", dtype, row)
    for part in np.array_split(whole, 3):
        writer.append(part)
    writer.close()
    expected = io.BytesIO()
    np.save(expected, whole)
    assert (tmp_path / "x.npy").read_bytes() == expected.getvalue()
    assert len(expected.getvalue()) < MAX_HEADER + whole.nbytes
    np.testing.assert_array_equal(open_array(tmp_path / "x.npy"), whole)


def test_numbers_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    writer = ArrayWriter(tmp_path / "x.npy", np.uint8)
    for number in (-1, 256):
        with pytest.raises(BadFile, match="do not fit uint8"):
            writer.append(np.array([number]))
    writer.close()


def test_large_vocabularies_are_written_wider(tmp_path: Path) -> None:
    rows = PuzzleRows(0, np.full((1, 2), 300), np.full((1, 2), 299))
    write_puzzleset(tmp_path / "wide", {"train": [[rows]]}, seq_len=2, vocab_size=301)
    data = open_puzzleset(tmp_path / "wide", "train")
    assert (str(data.inputs.dtype), data.inputs.tolist()) == ("uint16", [[300, 300]])


def test_an_array_is_checked_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of a violation is right wherever the pieces are cut."""
    monkeypatch.setattr("edgert.tasks.puzzleset._CHUNK", 1000)
    rewrite(folder / "train" / "all__labels.npy", put((40, 123), 77))
    with pytest.raises(BadFile, match=r"labels\[40, 123\] is 77"):
        open_puzzleset(folder, "train")


def test_every_shape_of_sudoku_can_be_a_data_set(tmp_path: Path) -> None:
    for board in (FOUR, Sudoku(2, 3), Sudoku(3, 2)):
        made = make_set(board, 2, 0)
        write_sudoku(tmp_path / board.name, board, {"train": made, "test": made}, augmentations=1)
        data = open_puzzleset(tmp_path / board.name, "train")
        for question, answer in zip(data.inputs, data.labels, strict=True):
            assert board.check(question, answer).ok
