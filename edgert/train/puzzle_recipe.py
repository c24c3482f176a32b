"""What a recipe says where puzzles are trained on: its tables `data` and `train`.

Everything that text and puzzles share is in recipe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgert.errors import UsageError
from edgert.models.importers.common import Fields, Problems, shown
from edgert.tasks import Task, find
from edgert.tasks.sudoku import Sudoku
from edgert.tasks.sudoku_make import MAX_SET
from edgert.train.train_recipe import TrainConfig, read_train

BUILTIN = "builtin"
MODEL_OF_TASK = ("seq_len", "vocab_size")
"""Keys of a grid model's config that its task decides."""


@dataclass(frozen=True)
class PuzzleData:
    """Where puzzles come from: exactly one of `puzzles` and `path`.

    task        what they are, by the name that `edgert.tasks.find` knows
    puzzles     "builtin": made, and split so that no symmetry class is in both parts
    path        a data set in the published folder format: it is split already
    classes     made in all, of which `held_out` are not trained on
    givens      fewest and most digits of a question that is made; None: any number
    seed        of what is made, and of how it is split
    augment     a training puzzle is turned by a random symmetry each time it is shown
    curriculum  share of all steps in which puzzles grow to their full difficulty: at first the
                cells to be found are given, then fewer and fewer of them
    """

    task: str
    puzzles: str | None = None
    path: str | None = None
    classes: int = 4700
    held_out: int = 1000
    givens: tuple[int, int] | None = None
    seed: int = 0
    augment: bool = False
    curriculum: float = 0.0


@dataclass(frozen=True)
class PuzzleTrain(TrainConfig):
    """How weights are learnt from grids. A step takes `grad_accum_steps` batches of `batch_size`
    puzzles; of a model with segments it is one segment of each.

    Defaults are the published ones (sapientinc/HRM @ 42410da). There, nothing is clipped.

    gradient    "one-step": only the last two updates of a segment are differentiated, as published;
                "segment": all of them
    lookahead   the score of continuing learns from one further segment, as published; without it
                that score is a constant, and halting is decided by its own score alone
    halt_above  without lookahead: the probability of being right above which a puzzle halts
    cycle_loss  "published": the last cycle's answer; "halting": that of every cycle, and whether
                it was right
    """

    window: int = 0
    batch_size: int = 0
    optimizer: str = "adam_atan2"
    learning_rate: float = 1e-4
    min_lr_ratio: float = 1.0
    warmup_steps: int = 2000
    grad_clip: float = 0.0
    seed: int = 0
    puzzle_emb_lr: float = 1e-2
    puzzle_emb_weight_decay: float = 0.1
    gradient: str = "one-step"
    lookahead: bool = True
    halt_above: float = 0.5
    cycle_loss: str = "published"
    eval_puzzles: int = 256

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **TrainConfig.CHOICES,
        "optimizer": ("adam_atan2", "adamw"),
        "gradient": ("one-step", "segment"),
        "cycle_loss": ("published", "halting"),
    }


TEXT_ONLY = (
    *("window", "schedule", "tension_beta", "tension_lo", "tension_hi", "muon_momentum"),
    *("muon_ns_steps", "depth", "settle", "eval_tokens"),
)
SEGMENTS_ONLY = (
    *("puzzle_emb_lr", "puzzle_emb_weight_decay", "gradient", "lookahead", "halt_above"),
)
CYCLES_ONLY = ("cycle_loss",)


def read_puzzle_data(f: Fields) -> PuzzleData:
    problems = f.problems
    name = f.text("task")
    task = known_task(name, problems)
    puzzles, path = f.text("puzzles"), f.text("path")
    if ("puzzles" in f) == ("path" in f):
        given = "both" if "path" in f else "none"
        problems.add(f"data: exactly one of puzzles and path must be given, found {given}")
    if puzzles not in (None, BUILTIN):
        problems.add(f"data.puzzles is {shown(puzzles)}, known is: {BUILTIN}")
    if puzzles == BUILTIN and task is not None and not isinstance(task, Sudoku):
        problems.add(f"data.puzzles: puzzles of {task.name} are not made here: give a path")
    for key in ("classes", "held_out", "givens", "seed"):
        if key in f and "path" in f:
            problems.add(f"data.{key} belongs to puzzles that are made, path has its own")
    data = PuzzleData(
        task=name or "",
        puzzles=puzzles,
        path=path,
        classes=f.integer("classes", PuzzleData.classes, high=MAX_SET),
        held_out=f.integer("held_out", PuzzleData.held_out, low=0, high=MAX_SET),
        givens=_givens(f, task),
        seed=f.integer("seed", PuzzleData.seed, low=0, high=1 << 62),
        augment=f.flag("augment", PuzzleData.augment),
        curriculum=f.number("curriculum", PuzzleData.curriculum, low=0.0, high=1.0),
    )
    if data.held_out >= data.classes:
        problems.add(
            f"data.held_out {data.held_out} leaves none of data.classes {data.classes} to train on"
        )
    if data.augment and task is not None and task.name.startswith("arc"):
        problems.add("data.augment: a puzzle of this task is known by its colours: augment the set")
    return data


def known_task(name: str | None, problems: Problems) -> Task | None:
    if name is None:
        problems.add("data.task is missing: the name of what the puzzles are, such as sudoku-4x4")
        return None
    try:
        return find(name)
    except UsageError as error:
        problems.add(f"data.task: {error.what}; {error.do}")
        return None


def _givens(f: Fields, task: Task | None) -> tuple[int, int] | None:
    f.seen.add("givens")
    value = f.data.get("givens")
    if value is None:
        return None
    most = task.seq_len if task is not None else 1 << 16
    sound = (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is int for n in value)
        and 0 <= value[0] <= value[1] < most
    )
    if not sound:
        f.problems.add(f"data.givens is {shown(value)}, not two numbers of cells, the lower first")
        return None
    return value[0], value[1]


def read_puzzle_train(f: Fields, kind: str) -> PuzzleTrain:
    """kind  "segments" or "cycles": each has keys that the other knows nothing of."""
    foreign = dict.fromkeys(TEXT_ONLY, "text")
    if kind == "segments":
        foreign |= dict.fromkeys(CYCLES_ONLY, "models with cycles")
    else:
        foreign |= dict.fromkeys(SEGMENTS_ONLY, "models with segments")
    train = read_train(f, PuzzleTrain, skip=foreign)
    for key, whose in foreign.items():
        if key in f and key not in f.seen:
            f.problems.add(f"train.{key} belongs to {whose}")
    f.seen |= set(foreign)
    if "halt_above" in f and train.lookahead and kind == "segments":
        f.problems.add("train.halt_above belongs to lookahead = false")
    if "eps" in f and train.optimizer != "adamw":
        f.problems.add("train.eps belongs to optimizer = 'adamw'")
    return train


def fill_in(raw: dict[str, Any], task: Task, problems: Problems) -> None:
    """What a grid model's table leaves to its task; adds what contradicts it to `problems`."""
    for key in MODEL_OF_TASK:
        wanted = getattr(task, key)
        if raw.setdefault(key, wanted) != wanted:
            problems.add(f"model.{key} is {shown(raw[key])}, {task.name} has {wanted}")
