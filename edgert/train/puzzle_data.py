"""A recipe's puzzles -> what a run trains on: a data set in the published folder format; run.json.

run.json  recipe as parsed, hashes of all data; written last: without it nothing is there
data/     the data set, unless the recipe names one
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgert.errors import BadFile, UsageError
from edgert.files import sha256_file, write_atomic
from edgert.models.trainable import GridConfig, GridModel
from edgert.progress import Reporter
from edgert.tasks import Task, find
from edgert.tasks.builders import write_sudoku
from edgert.tasks.puzzleset import FIELDS, IDENTIFIERS, META, SET, PuzzleSet, Split, open_puzzleset
from edgert.tasks.sudoku import Sudoku
from edgert.tasks.sudoku_make import make_set, split
from edgert.train.deal import Dealer, name_of
from edgert.train.prepare import DATA, FORMAT, RUN, VERSION, check_file, read_run
from edgert.train.puzzle_recipe import PuzzleData, PuzzleTrain
from edgert.train.recipe import TrainRecipe
from edgert.train.solved import Solved, solve

_SPLITS: tuple[Split, ...] = ("train", "test")


def prepare_puzzles(recipe: TrainRecipe, run: Path, reporter: Reporter) -> None:
    """Write everything of a new run but its checkpoints.

    Raises UsageError, BadFile naming the file and all that is wrong, EdgertError if the disk
    refuses.
    """
    data = _told(recipe)
    if data.path is None:
        shutil.rmtree(run / DATA, ignore_errors=True)
        board = find(data.task)
        assert isinstance(board, Sudoku), "the recipe was checked"
        with reporter.stage("puzzles", f"{data.classes:,} classes of {data.task}"):
            made = make_set(board, data.classes, data.seed, givens=data.givens)
            train, test = split(board, made, data.held_out, data.seed)
            parts = {"train": train, "test": test} if len(test) else {"train": train}
            write_sudoku(run / DATA, board, parts)  # type: ignore[arg-type]
    root = _root(recipe, run)
    for each in _parts(root):
        _check(recipe, open_puzzleset(root, each), root / each)
    value = {
        "format": FORMAT,
        "format_version": VERSION,
        "recipe": recipe.to_json(),
        "files": {name: sha256_file(root / name) for name in _files(root)},
    }
    write_atomic(run / RUN, (json.dumps(value, indent=1) + "\n").encode())


def _told(recipe: TrainRecipe) -> PuzzleData:
    assert isinstance(recipe.data, PuzzleData)
    return recipe.data


def _root(recipe: TrainRecipe, run: Path) -> Path:
    data = _told(recipe)
    root = run / DATA if data.path is None else recipe.folder / data.path
    if not (root / "train").is_dir():
        raise UsageError(
            "there is no data set in the published folder format",
            where=str(root),
            do="correct `path` in [data]; the folder has train/dataset.json",
        )
    return root


def _parts(root: Path) -> list[Split]:
    return [each for each in _SPLITS if (root / each).is_dir()]


def _files(root: Path) -> list[str]:
    """All files of the data set, relative to it."""
    names = [META, *(f"{SET}__{field}.npy" for field in FIELDS)]
    return [IDENTIFIERS, *(f"{each}/{name}" for each in _parts(root) for name in names)]


def _check(recipe: TrainRecipe, found: PuzzleSet, where: Path) -> None:
    """Raises UsageError naming all in which data set, task and model differ."""
    config = recipe.model
    assert isinstance(config, GridConfig)
    wanted = {"seq_len": config.seq_len, "vocab_size": config.vocab_size}
    table = getattr(config, "num_puzzle_identifiers", None)
    if table is not None:
        wanted["num_puzzle_identifiers"] = table
    wrong = [
        f"{key} is {getattr(found.meta, key)}, the recipe's model and task have {value}"
        for key, value in wanted.items()
        if getattr(found.meta, key) != value
    ]
    if wrong:
        raise UsageError(
            "the data set is for another model:\n  - " + "\n  - ".join(wrong),
            where=str(where / META),
            do="correct task in [data] and the sizes in [model], or give another path",
        )


class PuzzleMaterial:
    """Implements `objective.Material`: both splits, every file compared with its hash."""

    per = "cells and halting, a puzzle"

    def __init__(self, recipe: TrainRecipe, run: Path) -> None:
        self.recipe, self.run = recipe, run
        record, root = read_run(run), _root(recipe, run)
        files = record.get("files")
        if not isinstance(files, dict) or set(files) != set(_files(root)):
            raise BadFile("files of the data set are missing, or new", where=str(run / RUN))
        for name, digest in files.items():
            check_file(root / name, digest)
        self.record: dict[str, Any] = {"files": files}
        self.evaluation: dict[str, int] = {}
        self.task: Task = find(_told(recipe).task)
        sets = {each: open_puzzleset(root, each) for each in _parts(root)}
        self.train, self.test = sets["train"], sets.get("test")

    @property
    def held_out(self) -> str:
        return f"{0 if self.test is None else self.test.examples:,} puzzles"

    def source(self) -> Dealer:
        c, data = self.recipe.train, _told(self.recipe)
        forbidden: frozenset[bytes] = frozenset()
        if data.curriculum and self.test is not None:
            questions = self.test.batch(np.arange(self.test.examples)).inputs
            by_class = data.path is None
            forbidden = frozenset(name_of(self.task, each, by_class) for each in questions)
        return Dealer(
            self.train,
            self.task,
            data,
            batch=c.batch_size,
            seed=c.seed,
            steps=c.steps,
            forbidden=forbidden,
        )

    def identity(self) -> dict[str, Any]:
        return {"task": self.task.name}

    def evaluate(self, model: GridModel, whole: bool) -> Solved | None:
        if self.test is None:
            return None
        train = self.recipe.train
        assert isinstance(train, PuzzleTrain)
        count = self.test.examples if whole else min(train.eval_puzzles, self.test.examples)
        return solve(model, self.test.batch(np.arange(count)))

    def baseline(self, found: Solved) -> float | None:
        """None: the constant answer has an accuracy, not a loss."""
        return None
