"""Puzzles on their way, on disk: the second kind of session file. docs/session.md is the format.

Reading proves that the file is whole and makes sense in itself; whether it fits a model is
`pausing.restore`'s question.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadSession
from edgert.sessionstore import (
    COMMON,
    SOLVING,
    BundleHint,
    Check,
    Stored,
    bundle_hint,
    count,
    line,
    read_stored,
    record,
    unsound,
    write_stored,
)
from edgert.tensors import Array, Unsound
from edgert.vault import Key

Integers = NDArray[np.int64]

MAX_PUZZLES = 1 << 24
MAX_SEATS = 1 << 16
_AGAIN = "take an older copy, or solve the puzzles anew"


@dataclass(frozen=True)
class Seats:
    """The rows of the loop, b of them, some empty.

    index   int64 [b]: which puzzle has the row; -1 none
    steps   int64 [b]: iterations it has behind it
    totals  float32 [b]: the sum of the signal over them
    carry   by value, [r, ...]: of the r rows that are not empty, in their order
    """

    index: Integers
    steps: Integers
    totals: NDArray[np.float32]
    carry: dict[str, Array]


@dataclass(frozen=True)
class Answers:
    """What is done, in any order.

    index    int64 [d]: which puzzle
    steps    int64 [d]
    halted   bool [d]: by itself, not at the limit
    ns       int64 [d]: when, since the beginning
    results  by name, [d, ...]; `token` int32 [d, S] among them
    """

    index: Integers
    steps: Integers
    halted: NDArray[np.bool_]
    ns: Integers
    results: dict[str, Array]


@dataclass(frozen=True)
class SavedSolving:
    """All that such a file holds.

    ids         int32 [n, S]: all puzzles
    rows        int64 [n]: which row of the model's tables belongs to each
    waiting     the first puzzle that has not entered the loop yet
    policy      when a row ends, as `Exit` writes it
    batch       rows in the loop at most
    logits      whether answers keep theirs
    iterations  of the body so far
    ns          time spent so far; graph_ns of it inside the graphs
    place       backend, version, machine, threads: where going on is bitwise
    """

    bundle: BundleHint
    ids: NDArray[np.int32]
    rows: Integers
    seats: Seats
    answers: Answers
    waiting: int
    policy: str
    batch: int
    logits: bool
    iterations: int
    ns: int
    graph_ns: int
    place: dict[str, str] = field(default_factory=dict)
    written_by: str = ""
    created: str = ""


def write_solving(path: Path, saved: SavedSolving, key: Key | None = None) -> int:
    """Write the file whole or not at all, mode 0600; its size in bytes. Raises as
    `write_session` does."""
    header = {name: getattr(saved, name) for name in _HEADER} | {"bundle": asdict(saved.bundle)}
    arrays: dict[str, Array] = {"ids": saved.ids, "rows": saved.rows}
    arrays |= {f"seat.{name}": getattr(saved.seats, name) for name in _SEATS}
    arrays |= {f"carry.{name}": array for name, array in saved.seats.carry.items()}
    arrays |= {f"answer.{name}": getattr(saved.answers, name) for name in _ANSWERS}
    arrays |= {f"result.{name}": array for name, array in saved.answers.results.items()}
    return write_stored(path, Stored(SOLVING, header, arrays), key, "solve fewer puzzles at once")


def read_solving(path: Path, key: Key | None = None) -> SavedSolving:
    """What is in a file, which is not changed. Raises as `read_session` does."""
    stored = read_stored(path, key, _AGAIN)
    if stored.kind != SOLVING:
        raise BadSession(
            "the file holds a sequence of tokens, no puzzles",
            where=str(path),
            do=f"go on with it:  edgert run --session {path}",
        )
    return saved_solving(stored, path)


def saved_solving(stored: Stored, path: Path) -> SavedSolving:
    """What a file of this kind holds. Raises BadSession."""
    try:
        return _saved(stored)
    except Unsound as error:
        raise unsound(str(error), path, _AGAIN) from None


def _saved(stored: Stored) -> SavedSolving:
    got = record("solving", stored.header, _HEADER)
    groups: dict[str, dict[str, Array]] = {
        kind: {} for kind in ("", "seat", "carry", "answer", "result")
    }
    for name, array in stored.arrays.items():
        kind, dot, rest = name.partition(".")
        if not dot:
            kind, rest = "", name
        if kind not in groups:
            raise Unsound(f"tensor {ascii(name)[:60]} is unknown")
        groups[kind][rest] = array
    plain = _checked("", groups[""], _PLAIN)
    ids, rows = plain["ids"], plain["rows"]
    if len(ids) > MAX_PUZZLES or len(rows) != len(ids):
        raise Unsound(f"it has {len(ids):,} puzzles and {len(rows):,} numbers of puzzles")
    seats = Seats(**_checked("seat.", groups["seat"], _SEATS), carry=groups["carry"])
    answers = Answers(**_checked("answer.", groups["answer"], _ANSWERS), results=groups["result"])
    _check_counts(seats, answers)
    _check_order(seats, answers, len(ids), got["waiting"])
    return SavedSolving(
        **got | {"bundle": bundle_hint(got["bundle"])},
        ids=ids,
        rows=rows,
        seats=seats,
        answers=answers,
    )


def _checked(
    prefix: str, arrays: dict[str, Array], wanted: dict[str, tuple[str, int]]
) -> dict[str, Any]:
    """These tensors and no others, each of its type and number of axes, in the writer's order."""
    if list(arrays) != list(wanted):
        raise Unsound(f"it has other tensors {prefix or 'of puzzles'} than edgert writes")
    for name, (dtype, axes) in wanted.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype) or array.ndim != axes:
            raise Unsound(f"tensor {prefix}{name} is {array.dtype} of shape {array.shape}")
    return arrays


def _check_counts(seats: Seats, answers: Answers) -> None:
    taken = int((seats.index >= 0).sum()) if len(seats.index) <= MAX_SEATS else -1
    for count_, group in (
        (len(seats.index), {name: getattr(seats, name) for name in _SEATS}),
        (taken, seats.carry),
        (len(answers.index), {name: getattr(answers, name) for name in _ANSWERS}),
        (len(answers.index), answers.results),
    ):
        for name, array in group.items():
            if array.ndim < 1 or len(array) != count_:
                raise Unsound(f"{name} has shape {array.shape}, not {count_} rows")


def _check_order(seats: Seats, answers: Answers, puzzles: int, waiting: int) -> None:
    """Each puzzle waits, is in the loop, or is done."""
    if waiting > puzzles or (seats.index < -1).any():
        raise Unsound(f"{waiting} of {puzzles} puzzles have begun")
    begun = np.concatenate([seats.index[seats.index >= 0], answers.index])
    if len(begun) != waiting or (np.sort(begun) != np.arange(waiting)).any():
        raise Unsound("a puzzle is in two places, or in none")
    for name, array in (("steps", answers.steps), ("steps", seats.steps), ("ns", answers.ns)):
        if (array < 0).any():
            raise Unsound(f"{name} are below 0")


_PLAIN = {"ids": ("int32", 2), "rows": ("int64", 1)}
_SEATS = {"index": ("int64", 1), "steps": ("int64", 1), "totals": ("float32", 1)}
_ANSWERS = {
    "index": ("int64", 1),
    "steps": ("int64", 1),
    "halted": ("bool", 1),
    "ns": ("int64", 1),
}
_HEADER: dict[str, Check] = COMMON | {
    "waiting": count(MAX_PUZZLES + 1),
    "policy": line(100),
    "batch": lambda value: type(value) is int and 1 <= value <= MAX_SEATS,
    "logits": lambda value: type(value) is bool,
    "iterations": count(2**53),
    "ns": count(2**62),
    "graph_ns": count(2**62),
}
