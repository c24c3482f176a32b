"""Puzzles to measure a model on: a file of them, as `edgert solve` reads it, or a data set.

Where a puzzle's solution is not given, the checker of the task decides.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.solving import Solution
from edgert.tasks import Task
from edgert.tasks.puzzle import PAD
from edgert.tasks.puzzlefile import read_questions
from edgert.tasks.puzzleset import IGNORED, open_puzzleset
from edgert.tasks.reading import read_bytes

if TYPE_CHECKING:
    from edgert.model import Model

MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Puzzles:
    """What is asked, and how answers are judged.

    ids     int32 [n, S]
    number  int64 [n], of each puzzle in the model's own table
    labels  int32 [n, S]: the solutions; cells that are `IGNORED` have no part
    known   bool [n]: whether there is a solution; where not, `task` checks the answer
    """

    ids: NDArray[np.int32]
    number: NDArray[np.int64]
    labels: NDArray[np.int32]
    known: NDArray[np.bool_]
    task: Task | None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, count: int) -> Puzzles:
        """Some of them, behind one another."""
        rows = slice(start, start + count)
        return Puzzles(
            self.ids[rows], self.number[rows], self.labels[rows], self.known[rows], self.task
        )

    @property
    def judged_by(self) -> str:
        if self.known.all():
            return "solutions"
        return "rules" if not self.known.any() else "solutions and rules"

    @property
    def sha256(self) -> str:
        """Of ids, numbers and labels."""
        digest = hashlib.sha256()
        for array in (self.ids, self.number, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def right(self, answers: list[Solution]) -> NDArray[np.bool_]:
        """Which puzzles are solved exactly: every cell that counts."""
        return np.array([self._exact(i, answer) for i, answer in enumerate(answers)], np.bool_)

    def _exact(self, i: int, answer: Solution) -> bool:
        if answer.values is None:
            return False
        if self.known[i]:
            counts = self.labels[i] != IGNORED
            return bool((answer.values == self.labels[i])[counts].all())
        assert self.task is not None
        return self.task.check(self.ids[i], answer.values).ok


def read_puzzles(model: Model, path: Path, most: int) -> Puzzles:
    """At most `most` puzzles of a file or a folder for this model.

    Of a folder, those of its `test` split if it has one, evenly spread over it.
    Raises BadFile, UsageError naming the line (no puzzle, a wrong solution, another size).
    """
    found = _folder(model, path, most) if path.is_dir() else _file(model, path, most)
    if not len(found):
        raise UsageError("there are no puzzles", where=str(path), do="give one a line")
    return found


def _folder(model: Model, path: Path, most: int) -> Puzzles:
    data = open_puzzleset(path, "test" if (path / "test").is_dir() else "train")
    context, vocab = model.manifest.context, model.manifest.vocab_size
    if data.meta.seq_len != context or data.meta.vocab_size > vocab:
        raise UsageError(
            f"the data set has {data.meta.seq_len} cells of {data.meta.vocab_size} values, the "
            f"model {context} of {vocab}",
            where=str(path),
            do="give a data set of the kind that the model is for",
        )
    rows = np.unique(np.linspace(0, data.examples - 1, min(most, data.examples)).astype(np.int64))
    batch = data.batch(rows)
    number = batch.identifiers.astype(np.int64) if model.tables else np.zeros(len(rows), np.int64)
    return Puzzles(batch.inputs, number, batch.labels, np.ones(len(rows), np.bool_), None)


def _file(model: Model, path: Path, most: int) -> Puzzles:
    task = model.task
    questions = read_questions(read_bytes(path, MAX_BYTES), task, str(path))
    found = list(islice(questions, most))
    for question in found:
        if question.known is None and not task.check(question.tokens, question.tokens).decided:
            raise UsageError(
                f"only a solution tells whether an answer to {task.name} is right",
                where=question.where,
                do="add it behind a comma",
            )
    known = np.array([question.known is not None for question in found], np.bool_)
    ids, labels = (np.full((len(found), task.seq_len), IGNORED, np.int32) for _ in range(2))
    for i, question in enumerate(found):
        ids[i] = question.tokens
        if question.known is not None:
            labels[i] = np.where(question.known == PAD, IGNORED, question.known)
    return Puzzles(ids, np.zeros(len(found), np.int64), labels, known, task)
