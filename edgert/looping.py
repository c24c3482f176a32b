"""One step of a program over bound buffers: prologue, body until halt, epilogue.

Every iteration of the body has a binding of its own, with its own rows of keys and values and its
index in place; a value that goes round the loop alternates between two buffers. So a step is a
handful of calls, and nothing is copied or rebound between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Array, Backend, Binding, Buffer
from edgert.halting import SIGNAL, Halt
from edgert.spec import GraphSpec, TensorSpec, endpoint_at, resolve
from edgert.state import States

if TYPE_CHECKING:
    from edgert.runner import Runner

_clock = time.perf_counter_ns


def buffers(
    backend: Backend, specs: Mapping[str, TensorSpec], axes: Mapping[str, int]
) -> dict[str, Buffer]:
    """A buffer for each tensor that the host writes or reads, by its name."""
    return {
        name: backend.allocate(spec.dtype, resolve(spec.shape, axes), shared=True)
        for name, spec in specs.items()
    }


class Bound:
    """A buffer for every endpoint of a program, at one shape; graphs are bound to them.

    A value that the body reads and writes has two, which take turns.
    """

    def __init__(self, runner: Runner, ends: Mapping[str, Buffer], axes: Mapping[str, int]) -> None:
        self._runner = runner
        self._wait = runner.backend.wait
        self.ends = dict(ends)
        self.pairs: dict[str, tuple[Buffer, Buffer]] = {}
        loop = runner.loop
        if loop is None:
            return
        body = runner.parts["body"]
        read, written = set(body.inputs.values()), set(body.outputs.values())
        allocate = runner.backend.allocate
        for name, spec in loop.values.items():
            end, shape = f"value.{name}", resolve(spec.shape, axes)
            if end in read and end in written:
                self.pairs[end] = allocate(spec.dtype, shape), allocate(spec.dtype, shape)
            else:
                self.ends[end] = allocate(spec.dtype, shape)
        found = buffers(runner.backend, loop.signals, axes)
        self.ends |= {f"signal.{name}": buffer for name, buffer in found.items()}

    def at(self, end: str, done: int) -> Buffer:
        """Where an endpoint is when `done` iterations are over."""
        pair = self.pairs.get(end)
        return self.ends[end] if pair is None else pair[done % 2]

    def held(self, kind: str, done: int) -> dict[str, Array]:
        """Copies of all values, or of all signals, when `done` iterations are over."""
        names = [end for end in (*self.pairs, *self.ends) if end.startswith(f"{kind}.")]
        return {end.partition(".")[2]: self.at(end, done).read() for end in names}

    def bind(self, part: str, iteration: int, done: int) -> Binding:
        """The graph of a part when `done` iterations are over."""
        spec = self._runner.parts[part]
        after = done + (part == "body")
        return self._runner.graphs[part].bind(
            {n: self.at(endpoint_at(wire, iteration), done) for n, wire in spec.inputs.items()},
            {n: self.at(endpoint_at(wire, iteration), after) for n, wire in spec.outputs.items()},
        )


class BoundStep(Bound):
    """The graphs of one step shape of a decoder. Without a loop there is the epilogue alone."""

    def __init__(
        self, runner: Runner, states: States, ends: Mapping[str, Buffer], axes: Mapping[str, int]
    ) -> None:
        super().__init__(runner, ends, axes)
        self._states = states
        self._change: NDArray[np.float32] | None = None
        self._prologue: Binding | None = None
        self._bodies: list[Binding] = []
        self.changes: list[float] = []  # of each iteration, in the newest step that could halt
        parts, loop = runner.parts, runner.loop
        if loop is None:
            self._epilogues = [self.bind("epilogue", 0, 0)]
            return
        if SIGNAL in loop.signals:
            self._change = self.ends[f"signal.{SIGNAL}"].host  # type: ignore[assignment]
        if "prologue" in parts:
            self._prologue = self.bind("prologue", 0, 0)
        for i in range(loop.iterations):
            index = runner.backend.allocate("int64", (), shared=True)
            index.write(np.array(i))
            self.ends["loop.iteration"] = index
            self._bodies.append(self.bind("body", i, i))
        # By the number of iterations done, odd or even: where the value is that went round.
        self._epilogues = [self.bind("epilogue", 0, done) for done in (0, 1)]
        self._columns = _columns(parts["body"], states)

    def run(self, halt: Halt | None, filled: list[int], taken: NDArray[np.int64]) -> int:
        """Run the step, and note in `taken` [batch] the iterations of each row.

        filled  rows of the states before it. Returns nanoseconds inside the graphs.
        """
        spent, begun = 0, _clock()
        if self._prologue is not None:
            self._prologue.run()
        done = 0
        if halt is None or halt.is_full:
            for body in self._bodies:
                body.run()
            done = len(self._bodies)
            taken[:] = max(1, done)
        else:
            spent += _clock() - begun
            one = len(filled) == 1
            done, inside = (self._single if one else self._batched)(halt, filled, taken)
            spent, begun = spent + inside, _clock()
        self._epilogues[done % 2 if self._bodies else 0].run()
        self._wait()
        return spent + _clock() - begun

    def trace(self, steps: int) -> Iterator[int]:
        """Run the step iteration by iteration; behind each, the results are as if it were the last.

        Yields how many are done. Counters do not advance.
        """
        if self._prologue is not None:
            self._prologue.run()
        for done in range(1, steps + 1):
            if self._bodies:
                self._bodies[done - 1].run()
            self._epilogues[done % 2 if self._bodies else 0].run()
            self._wait()
            yield done

    def _single(self, halt: Halt, filled: list[int], taken: NDArray[np.int64]) -> tuple[int, int]:
        """The body until the only row has ended, -> iterations run, nanoseconds in the graphs.

        In plain numbers: an operation on an array takes as long as a small body's product.
        """
        assert self._change is not None
        change, threshold, least = self._change.item, halt.single, halt.least
        most = min(halt.most or len(self._bodies), len(self._bodies))
        self.changes = []
        spent = done = 0
        for body in self._bodies[:most]:
            begun = _clock()
            body.run()
            self._wait()
            spent += _clock() - begun
            done += 1
            self.changes.append(now := change())
            if done >= least and now < threshold:
                break
        taken[0] = done
        self._fill(0, filled[0], done)
        return done, spent

    def _batched(self, halt: Halt, filled: list[int], taken: NDArray[np.int64]) -> tuple[int, int]:
        """The body until every row has ended, -> iterations run, nanoseconds in the graphs.

        A row that ended is frozen: what the body still computes for it is put back, so that it
        does not depend on its batch mates.
        """
        assert self._change is not None
        frozen: list[tuple[int, str, NDArray[np.generic]]] = []
        running = np.ones(len(taken), np.bool_)
        spent, limit = 0, len(self._bodies)
        done = 0
        while done < limit and running.any():
            begun = _clock()
            self._bodies[done].run()
            self._wait()
            spent += _clock() - begun
            done += 1
            ended = running & halt.ended(done, self._change[:, 0])
            if done == limit:
                ended = running.copy()
            taken[ended] = done
            running &= ~ended
            if running.any() and ended.any():
                for row in np.flatnonzero(ended).tolist():
                    for end, pair in self.pairs.items():
                        frozen.append((row, end, pair[done % 2].read((slice(row, row + 1),))))
        for row, end, values in frozen:
            self.pairs[end][done % 2].write(values, (slice(row, row + 1),))
        for row, (position, depth) in enumerate(zip(filled, taken.tolist(), strict=True)):
            self._fill(row, position, depth)
        return done, spent

    def _fill(self, row: int, position: int, taken: int) -> None:
        """The rows that a token left at its last iteration stand in for those it skipped."""
        for buffers, axis in self._columns:
            at = (slice(row, row + 1), *[slice(None)] * (axis - 1), slice(position, position + 1))
            source = buffers[taken - 1]
            for buffer in buffers[taken:]:
                buffer.copy(source, at)


def _columns(body: GraphSpec, states: States) -> list[tuple[tuple[Buffer, ...], int]]:
    """Append states that differ from one iteration to the next: buffers, and the axis of rows."""
    found = []
    for wire in body.outputs.values():
        if isinstance(wire, str):
            continue
        names = [end.partition(".")[2] for end in wire]
        spec = states.specs[names[0]]
        if spec.kind == "append" and spec.axis is not None:
            buffers = tuple(states.buffers[name] for name in names)
            found.append((buffers, spec.shape.index(spec.axis)))
    return found
