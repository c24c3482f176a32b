"""Answers to whole puzzles: the body repeated until each row says that it is done.

Solving is continuous. A row that ends makes room for the next puzzle at once, so rows are at
different iterations, and answers come in the order in which they are found. None depends on its
neighbours. Once no puzzle waits, rows move together into a smaller batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.errors import Poisoned, UsageError
from edgert.exits import Exit
from edgert.slots import Entrance, Slots
from edgert.state import resolve, stored_array

if TYPE_CHECKING:
    from edgert.model import Model

BATCH = 32
"""Rows in the loop at most, unless told otherwise."""


@dataclass(frozen=True)
class Solution:
    """What the model makes of one puzzle.

    values   int32 [S]: the best token of each cell; None if no iteration was run
    steps    iterations taken
    reason   why it ended: `halted` (the model was done), `limit`, `deadline`, `cancelled`
    seconds  from the beginning of the whole work to this answer
    results  the model's other results, such as its scores, and the logits if they were asked for
    """

    values: NDArray[np.int32] | None
    steps: int
    reason: str
    seconds: float
    results: dict[str, Array] = field(default_factory=dict)

    @property
    def halted(self) -> bool:
        """Whether it ended by itself, not at a limit or a deadline."""
        return self.reason == "halted"


@dataclass(frozen=True)
class Look:
    """A row between two iterations, as `on_step` sees it."""

    index: int
    steps: int
    values: NDArray[np.int32]
    results: dict[str, Array]


@dataclass
class Row:
    """A puzzle in the loop. total: the sum of the signal so far."""

    index: int
    total: float = 0.0


class Solving:
    """Puzzles on their way. Iterate over it for (index, Solution), in the order of being done.

    ids      int32 [n, S], checked
    rows     of each table, int64 [n]: which row belongs to which puzzle
    batch    rows in the loop at most
    deadline_ms  for all of it; what is not done by then gets its answer so far
    on_step  is shown every row behind every iteration; returning False ends the work, reason
             `cancelled`
    logits   keep those of each answer, float32 [S, V]

    Used by one thread at a time.
    """

    def __init__(
        self,
        model: Model,
        ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        exit: Exit,
        *,
        batch: int = BATCH,
        deadline_ms: float | None = None,
        on_step: Callable[[Look], object] | None = None,
        logits: bool = False,
    ) -> None:
        if batch < 1:
            raise UsageError(f"batch = {batch} is not possible", do="use 1 or more")
        self.model, self.ids, self.rows, self.exit = model, ids, rows, exit
        self.batch, self.on_step, self.logits = batch, on_step, logits
        self.answers: dict[int, Solution] = {}  # those that are done
        self.waiting = 0  # the first puzzle that has not entered yet
        self.iterations = 0  # of the body so far, whatever the number of rows
        self.graph_ns = 0  # time inside the graph calls
        self._begun = time.perf_counter()
        self._ends = None if deadline_ms is None else self._begun + deadline_ms / 1e3
        self._entrance = Entrance(model.runner)
        self._slots: Slots | None = None
        self._seats: list[Row | None] = []
        self._failed = False

    def __iter__(self) -> Iterator[tuple[int, Solution]]:
        while len(self.answers) < len(self.ids):
            yield from self.step()

    def run(self) -> list[Solution]:
        """Go on to the end. All answers, in the order of the puzzles."""
        for _ in self:
            pass
        return [self.answers[i] for i in range(len(self.ids))]

    def step(self) -> list[tuple[int, Solution]]:
        """One iteration of every row in the loop; what is done with it.

        Raises UsageError (the model is closed), OutOfMemory, Poisoned behind a failure.
        """
        self.model.runner.check_open()
        if self._failed:
            raise Poisoned("an earlier iteration failed", do="solve the puzzles anew")
        if self._late():
            return self._abandon("deadline")
        self._failed = True  # until the iteration has ended well
        self._seat()
        slots = self._slots
        assert slots is not None
        begun = time.perf_counter_ns()
        slots.advance()
        self.graph_ns += time.perf_counter_ns() - begun
        self.iterations += 1
        found = self._collect(slots)
        self._failed = False
        if self.on_step is not None and self._show(slots):
            found += self._abandon("cancelled")
        return found

    def _late(self) -> bool:
        return self._ends is not None and time.perf_counter() >= self._ends

    def _seat(self) -> None:
        """Fill free slots with what waits; without anything that waits, move together."""
        count = len(self.ids) - self.waiting
        seated = sum(row is not None for row in self._seats)
        wanted = min(self.batch, _bucket(seated + count))
        if self._slots is None or wanted < len(self._seats):
            self._move(wanted)
        slots = self._slots
        assert slots is not None
        if not count:
            return
        for at, row in enumerate(self._seats):
            if row is None and self.waiting < len(self.ids):
                begun = time.perf_counter_ns()
                self._entrance.run(self._inputs(self.waiting))
                slots.enter(at, self._entrance)
                self.graph_ns += time.perf_counter_ns() - begun
                self._seats[at] = Row(self.waiting)
                self.waiting += 1

    def _move(self, batch: int) -> None:
        """All rows into slots for `batch` of them."""
        slots = Slots(self.model.runner, batch)
        taken: list[Row | None] = [None] * batch
        here = 0
        for at, row in enumerate(self._seats):
            if row is not None:
                assert self._slots is not None
                slots.move(here, self._slots, at)
                taken[here] = row
                here += 1
        self._slots, self._seats = slots, taken

    def _inputs(self, index: int) -> dict[str, Array]:
        inputs: dict[str, Array] = {"ids": self.ids[index]}
        for name, table in self.model.tables.items():
            inputs[name] = np.asarray(table[self.rows[index]])
        return inputs

    def _collect(self, slots: Slots) -> list[tuple[int, Solution]]:
        """The rows that this iteration has ended."""
        policy = self.exit
        signal: NDArray[np.float32] | None = None
        if policy.signal is not None:
            signal = slots.signals[policy.signal]
            if policy.cumulative:
                for at, row in enumerate(self._seats):
                    if row is not None:
                        row.total += float(signal[at])
                totals = [0.0 if row is None else row.total for row in self._seats]
                signal = np.array(totals, np.float32)
        halted = policy.done(slots.steps, signal)
        ended = halted | (slots.steps >= policy.most)
        if not ended.any():
            return []
        reasons = {
            int(i): "halted" if halted[i] else "limit"
            for i in np.flatnonzero(ended)
            if self._seats[i] is not None
        }
        return self._answer(slots, reasons)

    def _answer(self, slots: Slots, reasons: dict[int, str]) -> list[tuple[int, Solution]]:
        """Read the rows named, and free their slots."""
        if not reasons:
            return []
        begun = time.perf_counter_ns()
        results = slots.results()
        self.graph_ns += time.perf_counter_ns() - begun
        seconds = time.perf_counter() - self._begun
        found = []
        for at, reason in reasons.items():
            row = self._seats[at]
            assert row is not None
            self._seats[at] = None
            values, others = self._read(results, at)
            answer = Solution(values, int(slots.steps[at]), reason, seconds, others)
            self.answers[row.index] = answer
            found.append((row.index, answer))
        return found

    def _read(
        self, results: dict[str, Array], at: int
    ) -> tuple[NDArray[np.int32], dict[str, Array]]:
        others = {
            name: array[at].copy()
            for name, array in results.items()
            if name != "token" and (name != "logits" or self.logits)
        }
        return results["token"][at].astype(np.int32), others  # a copy

    def _show(self, slots: Slots) -> bool:
        """Show every row to `on_step`; whether it said that it is enough."""
        assert self.on_step is not None
        seated = [(at, row) for at, row in enumerate(self._seats) if row is not None]
        if not seated:
            return False
        results = slots.results()
        looks = [
            Look(row.index, int(slots.steps[at]), *self._read(results, at)) for at, row in seated
        ]
        return any([self.on_step(look) is False for look in looks])

    def _abandon(self, reason: str) -> list[tuple[int, Solution]]:
        """End everything now: rows in the loop with their answer so far, the rest without one."""
        found = []
        if self._slots is not None:
            at = {i: reason for i, row in enumerate(self._seats) if row is not None}
            found = self._answer(self._slots, at)
        seconds = time.perf_counter() - self._begun
        for index in range(self.waiting, len(self.ids)):
            answer = self.answers[index] = Solution(None, 0, reason, seconds)
            found.append((index, answer))
        self.waiting = len(self.ids)
        return found


def _bucket(rows: int) -> int:
    """The smallest batch that is worth a binding of its own: a power of two."""
    return 1 << max(0, rows - 1).bit_length()


def checked_ids(model: Model, puzzles: ArrayLike) -> NDArray[np.int32]:
    """Cells int [n, S] or [S] of puzzles -> int32 [n, S]. Raises UsageError."""
    cells, vocab = model.manifest.context, model.manifest.vocab_size
    try:
        array = np.asarray(puzzles)
    except Exception as error:  # ragged, or whatever a caller's own type can raise
        raise UsageError(f"puzzles must be [puzzles, cells]: {error}") from error
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != cells or array.dtype.kind not in "iu":
        raise UsageError(
            f"puzzles must be integers of shape [puzzles, {cells}], not {array.dtype} of "
            f"{list(array.shape)}"
        )
    if array.size and not 0 <= array.min() <= array.max() < vocab:
        raise UsageError(f"puzzles hold ids outside 0 to {vocab - 1}, the model's vocabulary")
    return array.astype(np.int32)


def checked_rows(model: Model, rows: ArrayLike, count: int) -> NDArray[np.int64]:
    """Which row of the tables belongs to each puzzle: one for all, or [n]. Raises UsageError."""
    array = np.asarray(rows)
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        raise UsageError(f"puzzle numbers must be one integer, or {count} of them")
    array = np.broadcast_to(array, (count,)).astype(np.int64)
    most = min((len(table) for table in model.tables.values()), default=1)
    if count and not 0 <= array.min() <= array.max() < most:
        raise UsageError(
            f"puzzle numbers must be from 0 to {most - 1}: the model has no others",
            do="use 0 for puzzles that the model was not trained on by number",
        )
    return array


def open_tables(bundle: Bundle) -> dict[str, Array]:
    """Input -> its table [rows, ...], mapped from the file: only rows that are used are read.

    Raises BadBundle if a file is no such table.
    """
    inputs = bundle.manifest.inputs
    return {
        name: stored_array(
            bundle.path(file),
            "table",
            inputs[name].dtype,
            resolve(inputs[name].shape[1:], {}),
            rows=True,
        )
        for name, file in bundle.manifest.tables.items()
    }
