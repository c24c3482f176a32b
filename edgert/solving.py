"""Answers to whole puzzles: the body repeated until each row says that it is done.

Solving is continuous. A row that ends makes room for the next puzzle at once, so rows are at
different iterations, and answers come in the order in which they are found. None depends on its
neighbours. Once no puzzle waits, rows move together into a smaller batch.

What is left off, at a deadline or because the application says so, is not lost: it goes on from
where it was, in this process or, saved to a file, in another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Array
from edgert.errors import Poisoned, UsageError
from edgert.exits import Exit
from edgert.puzzles import BATCH, inputs_of
from edgert.slots import Entrance, Slots
from edgert.solvingfile import Seats, write_solving
from edgert.vault import key_from

if TYPE_CHECKING:
    from edgert.model import Model


@dataclass(frozen=True)
class Solution:
    """What the model makes of one puzzle.

    values   int32 [S]: the best token of each cell; None if no iteration was run
    steps    iterations taken
    reason   why it ended: `halted` (the model was done) or `limit`. Or why this is only the best so
             far: `deadline`, `cancelled` (by `on_step`), or what `Solving.stop` was told
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
    """A puzzle in the loop. total: the sum of the signal so far, float32 as models are trained."""

    index: int
    total: np.float32 = np.float32(0)  # noqa: RUF009 - a number, not a call that remembers


class Solving:
    """Puzzles on their way. Iterate over it for (index, Solution), in the order of being done.

    ids      int32 [n, S], checked
    rows     of each table, int64 [n]: which row belongs to which puzzle
    batch    rows in the loop at most
    deadline_ms  for all of it; what is not done by then gets its answer so far
    on_step  is shown every row behind every iteration; returning False cancels the work
    logits   keep those of each answer, float32 [S, V]

    `answers` are those so far, by the index of the puzzle. `stopped` says why the work was left
    off, if it was; `extend` takes it up again. `notes` say, after `edgert.resume_solving`, what is
    not as it was where the work was saved.

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
        self.answers: dict[int, Solution] = {}
        self.stopped: str | None = None
        self.notes: tuple[str, ...] = ()
        self.owns_model = False  # closing it closes the model, too
        self._cancelled = False
        self.waiting = 0  # the first puzzle that has not entered yet
        self.iterations = 0  # of the body so far, whatever the number of rows
        self.graph_ns = 0  # time inside the graph calls
        self._slots: Slots | None = None
        self._seats: list[Row | None] = []
        self._failed = self._closed = False
        self._begun = time.perf_counter_ns()
        self._ended: int | None = None
        self._ends: float | None = None
        self.extend(deadline_ms)
        self._entrance = Entrance(model.runner)

    @property
    def done(self) -> bool:
        """Whether every puzzle has ended, by itself or at its limit."""
        return self._finished()

    def _finished(self) -> bool:
        return self.waiting == len(self.ids) and not any(self._seats)

    @property
    def spent_ns(self) -> int:
        """Time since the beginning, until it was done or stopped; without that left off."""
        return (self._ended or time.perf_counter_ns()) - self._begun

    def extend(self, deadline_ms: float | None = None) -> None:
        """Go on where the work was left off, until a deadline from now on. Raises UsageError."""
        if deadline_ms is not None and not 0 <= deadline_ms < float("inf"):
            raise UsageError(f"a deadline of {deadline_ms} ms is not possible", do="use 0 or more")
        if self._ended is not None and not self.done:
            self._begun += time.perf_counter_ns() - self._ended
            self._ended = None
        self.stopped, self._cancelled = None, False
        self._ends = None if deadline_ms is None else time.perf_counter() + deadline_ms / 1e3

    def __iter__(self) -> Iterator[tuple[int, Solution]]:
        while not self.done and self.stopped is None:
            yield from self.step()

    def run(self) -> list[Solution]:
        """Go on to the end, or until it is stopped. All answers, in the order of the puzzles."""
        for _ in self:
            pass
        return [self.answers[i] for i in range(len(self.ids))]

    def step(self) -> list[tuple[int, Solution]]:
        """One iteration of every row in the loop; what is done with it. Raises UsageError (it or
        the model is closed), OutOfMemory, Poisoned behind a failure."""
        self.check()
        if self.done:
            return []
        if self._late():
            return self.stop("deadline")
        self._failed = True  # until the iteration has ended well
        self._seat()
        slots = self._slots
        assert slots is not None
        slots.rest(at for at, row in enumerate(self._seats) if row is None)
        begun = time.perf_counter_ns()
        slots.advance()
        self.graph_ns += time.perf_counter_ns() - begun
        self.iterations += 1
        found = self._collect(slots)
        self._failed = False
        enough = self.on_step is not None and self._show(slots)
        if self._finished():
            self._ended = time.perf_counter_ns()
        elif enough or self._cancelled:
            found += self.stop("cancelled")
        return found

    def cancel(self) -> None:
        """Stop behind the iteration that is running. May be called from any thread."""
        self._cancelled = True

    def check(self) -> None:
        """Raise UsageError if it or the model is closed, Poisoned if an iteration failed."""
        if self._closed:
            raise UsageError("the work is closed", do="solve the puzzles anew")
        self.model.runner.check_open()
        if self._failed:
            raise Poisoned("an earlier iteration failed", do="solve the puzzles anew")

    def stop(self, reason: str = "cancelled") -> list[tuple[int, Solution]]:
        """Leave off now: what is in the loop gets its answer so far, and what waits none.

        The rows stay as they are, for `extend` and `save`. Raises as `step` does.
        """
        self.check()
        if self.done:
            return []
        self.stopped = reason
        found = []
        if self._slots is not None:
            at = {i: reason for i, row in enumerate(self._seats) if row is not None}
            found = self._answer(self._slots, at)
        seconds = self.spent_ns / 1e9
        for index in range(self.waiting, len(self.ids)):
            answer = self.answers[index] = Solution(None, 0, reason, seconds)
            found.append((index, answer))
        self._ended = time.perf_counter_ns()
        return found

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        passphrase: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
    ) -> int:
        """Write all of it to one file, mode 0600, between two iterations; its size in bytes.

        `edgert.resume_solving` goes on with it, bit for bit. As `Session.save` in every other way.
        """
        from edgert.pausing import pause

        key = key_from(passphrase, key_file)
        return write_solving(Path(path), pause(self, Path(path)), key)

    def in_loop(self) -> set[int]:
        """The puzzles that are in the loop."""
        return {row.index for row in self._seats if row is not None}

    def seats(self) -> Seats:
        """A copy of the rows in the loop, for `adopt`."""
        taken = [at for at, row in enumerate(self._seats) if row is not None]
        slots = self._slots
        carry = {} if slots is None else slots.export(taken)
        steps = np.zeros(len(self._seats), np.int64)
        if slots is not None:
            steps[taken] = slots.steps[taken]
        return Seats(
            index=np.array([-1 if row is None else row.index for row in self._seats], np.int64),
            steps=steps,
            totals=np.array([0 if row is None else row.total for row in self._seats], np.float32),
            carry=carry,
        )

    def adopt(self, seats: Seats, waiting: int, iterations: int, ns: int, graph_ns: int) -> None:
        """Go on from what another one had, which fits: its rows, and how far it was.

        Rows stay in their places of a batch of the same size: so they get the same bits.
        Raises OutOfMemory.
        """
        if len(seats.index):
            self._slots = Slots(self.model.runner, len(seats.index))
            self._seats = [None] * len(seats.index)
        for rank, at in enumerate(np.flatnonzero(seats.index >= 0).tolist()):
            assert self._slots is not None
            values = {name: array[rank] for name, array in seats.carry.items()}
            self._slots.adopt(at, values, int(seats.steps[at]))
            self._seats[at] = Row(int(seats.index[at]), np.float32(seats.totals[at]))
        self.waiting, self.iterations, self.graph_ns = waiting, iterations, graph_ns
        now = time.perf_counter_ns()
        self._begun, self._ended = now - ns, now if self.done else None

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
                at_hand = self.ids[self.waiting], int(self.rows[self.waiting])
                self._entrance.run(inputs_of(self.model, *at_hand))
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

    def _collect(self, slots: Slots) -> list[tuple[int, Solution]]:
        """The rows that this iteration has ended."""
        policy = self.exit
        signal: NDArray[np.float32] | None = None
        if policy.signal is not None:
            signal = slots.signals[policy.signal]
            if policy.cumulative:
                for at, row in enumerate(self._seats):
                    if row is not None:
                        row.total = np.float32(row.total + signal[at])
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
        found = self._answer(slots, reasons)
        for at in reasons:
            self._seats[at] = None
        return found

    def _answer(self, slots: Slots, reasons: dict[int, str]) -> list[tuple[int, Solution]]:
        """Read the rows named."""
        if not reasons:
            return []
        begun = time.perf_counter_ns()
        results = slots.results()
        self.graph_ns += time.perf_counter_ns() - begun
        seconds = self.spent_ns / 1e9
        found = []
        for at, reason in reasons.items():
            row = self._seats[at]
            assert row is not None
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

    def close(self) -> None:
        """Let go of the rows; `answers` stay. Closing twice does nothing."""
        self._closed, self._slots = True, None
        if self.owns_model:
            self.model.close()

    def __enter__(self) -> Solving:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _bucket(rows: int) -> int:
    """The smallest batch that is worth a binding of its own: a power of two."""
    return 1 << max(0, rows - 1).bit_length()
