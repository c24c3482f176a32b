"""How ARC is scored: answers to all augmentations of a task vote, and the first guesses count.

Source  sapientinc/HRM @ 42410da, arc_eval.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edgert.errors import UsageError
from edgert.tasks.arc import Arc, Grid, split_name
from edgert.tasks.arc_files import ArcTask
from edgert.tasks.puzzle import Integers

GUESSES = 2


@dataclass(frozen=True)
class Prediction:
    """What a model made of one test example.

    name     of the augmented puzzle
    inputs   int [S]: the example
    outputs  int [S]: the best token of each cell
    q_halt   the logit by which the model says that it is right
    """

    name: str
    inputs: Integers
    outputs: Integers
    q_halt: float


@dataclass(frozen=True)
class Guess:
    """votes: how many augmentations ended in this grid; confidence: their mean sigmoid(q_halt)."""

    grid: Grid
    votes: int
    confidence: float


@dataclass(frozen=True)
class Score:
    """Names of the tasks of which each test input has the right grid among its first guesses."""

    solved: tuple[str, ...]
    total: int
    guesses: int

    @property
    def share(self) -> float:
        return len(self.solved) / self.total if self.total else 0.0


@dataclass
class _Votes:
    grid: Grid
    confidences: list[float] = field(default_factory=list)


def vote(answers: Iterable[tuple[Grid, float]]) -> list[Guess]:
    """Grids, each with its q_halt, to distinct grids: most votes first, then most confident.

    What is equal in both keeps the order in which it came. Raises UsageError if a q_halt is NaN.
    """
    votes: dict[tuple[tuple[int, ...], bytes], _Votes] = {}
    for grid, q_halt in answers:
        if math.isnan(q_halt):
            raise UsageError("q_halt is NaN", do="check the model's outputs")
        box = votes.setdefault((grid.shape, grid.tobytes()), _Votes(grid))
        box.confidences.append(_sigmoid(q_halt))
    guesses = [
        Guess(box.grid, len(box.confidences), sum(box.confidences) / len(box.confidences))
        for box in votes.values()
    ]
    return sorted(guesses, key=lambda guess: (-guess.votes, -guess.confidence))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def guesses_for(
    tasks: Sequence[ArcTask], predictions: Iterable[Prediction], arc: Arc | None = None
) -> dict[str, list[list[Guess]]]:
    """By task, and for each of its test inputs, the guesses in order.

    A prediction is of the test input that its own, with the augmentation undone, is equal to.
    Raises UsageError for a prediction of no such input, BadFile for a name of no augmentation.
    """
    arc = arc or Arc()
    held_out = {task.name: task for task in tasks if task.held_out}
    answers: dict[str, list[list[tuple[Grid, float]]]] = {
        name: [[] for _ in task.test] for name, task in held_out.items()
    }
    for prediction in predictions:
        name, augmentation = split_name(prediction.name)
        asked = augmentation.undo(arc.crop(prediction.inputs))
        matching = [
            i
            for i, pair in enumerate(held_out[name].test if name in held_out else ())
            if pair.input.shape == asked.shape and (pair.input == asked).all()
        ]
        if not matching:
            raise UsageError(
                f"the prediction {ascii(prediction.name)} is of no test input of these tasks",
                do="score with the tasks that the data set was built from",
            )
        answer = augmentation.undo(arc.crop(prediction.outputs))
        for i in matching:
            answers[name][i].append((answer, prediction.q_halt))
    return {name: [vote(given) for given in inputs] for name, inputs in answers.items()}


def score(
    tasks: Sequence[ArcTask],
    predictions: Iterable[Prediction],
    guesses: int = GUESSES,
    arc: Arc | None = None,
) -> Score:
    """Score predictions on the held-out tasks; an input without predictions is not solved."""
    ranked = guesses_for(tasks, predictions, arc)
    solved = tuple(
        task.name
        for task in tasks
        if task.held_out
        and all(
            any(_equal(guess.grid, pair.output) for guess in given[:guesses])
            for pair, given in zip(task.test, ranked[task.name], strict=True)
        )
    )
    return Score(solved, len(ranked), guesses)


def _equal(a: Grid, b: Grid) -> bool:
    return a.shape == b.shape and bool((a == b).all())
