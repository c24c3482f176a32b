"""Puzzles in the loop of a model that solves: rows that come and go by themselves.

Every row is at an iteration of its own. A puzzle enters through the prologue, which is run for it
alone; the body is run for all rows; the epilogue reads the answers as they are. Carries stay in the
backend's buffers: a row is moved from buffer to buffer, never through Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Array, Binding
from edgert.errors import OutOfMemory
from edgert.looping import Bound, buffers
from edgert.machine import available_memory
from edgert.runner import Runner
from edgert.spec import resolve

STEPS = "loop.steps"


class Entrance(Bound):
    """The prologue, for one puzzle."""

    def __init__(self, runner: Runner) -> None:
        axes = {"batch": 1}
        self.inputs = buffers(runner.backend, runner.manifest.inputs, axes)
        super().__init__(runner, {f"input.{n}": b for n, b in self.inputs.items()}, axes)
        self._prologue = self.bind("prologue", 0, 0)

    def run(self, inputs: Mapping[str, Array]) -> None:
        """Inputs of one puzzle [...], as the manifest declares them behind the batch axis."""
        for name, buffer in self.inputs.items():
            buffer.write(inputs[name][None])
        self._prologue.run()


class Slots(Bound):
    """`batch` rows and the graphs over them.

    steps   int64 [batch]: iterations that each row has behind it
    """

    def __init__(self, runner: Runner, batch: int) -> None:
        """Raises OutOfMemory, before anything is allocated if it is plain that it does not fit."""
        _check_memory(runner, batch)
        axes = {"batch": batch}
        steps = runner.backend.allocate("int64", (batch,), shared=True)
        self.outcomes = buffers(runner.backend, runner.manifest.results, axes)
        ends = {STEPS: steps} | {f"result.{n}": b for n, b in self.outcomes.items()}
        super().__init__(runner, ends, axes)
        self.batch = batch
        self.steps: NDArray[np.int64] = steps.host  # type: ignore[assignment]
        self.signals: dict[str, NDArray[np.float32]] = {
            name: self.ends[f"signal.{name}"].host  # type: ignore[misc]
            for name in (runner.loop.signals if runner.loop else ())
        }
        self._bodies: list[Binding] = [self.bind("body", 0, turn) for turn in (0, 1)]
        self._epilogues: list[Binding] = [self.bind("epilogue", 0, turn) for turn in (0, 1)]
        self._turn = 0  # which buffer of each pair is the newest
        # Rows that leave behind a value which the body only reads, such as the input, included.
        self._values = [end for end in (*self.pairs, *self.ends) if end.startswith("value.")]

    def rest(self, rows: Iterable[int]) -> None:
        """Rows without a puzzle stay at iteration 0: further on, a body that counts has no more."""
        for row in rows:
            self.steps[row] = 0

    def advance(self) -> None:
        """One iteration of every row."""
        self._bodies[self._turn].run()
        self._wait()
        self._turn ^= 1
        self.steps += 1

    def results(self) -> dict[str, Array]:
        """The answers of all rows as they are now, by name [batch, ...]: until the next call."""
        self._epilogues[self._turn].run()
        self._wait()
        return {name: buffer.host for name, buffer in self.outcomes.items()}

    def enter(self, row: int, entrance: Entrance) -> None:
        """What the prologue has just made becomes a row."""
        self.take(row, entrance, 0, 0, 0)

    def move(self, row: int, source: Slots, index: int) -> None:
        """Row `index` of other slots becomes a row here."""
        self.take(row, source, index, source._turn, int(source.steps[index]))

    def take(self, row: int, source: Bound, index: int, turn: int, steps: int) -> None:
        for end in self._values:
            self.at(end, self._turn).row(row).copy(source.at(end, turn).row(index), ())
        self.steps[row] = steps

    def export(self, rows: Sequence[int]) -> dict[str, Array]:
        """The values of rows, by name [rows, ...], as `adopt` takes them."""
        index = np.asarray(rows, np.intp)
        return {
            end.removeprefix("value."): self.at(end, self._turn).read()[index]
            for end in self._values
        }

    def adopt(self, row: int, values: Mapping[str, Array], steps: int) -> None:
        """One row as `export` gave it, [...] behind the batch axis.

        Raises ValueError if it is of other names, shapes or types.
        """
        names = {end.removeprefix("value.") for end in self._values}
        if values.keys() != names:
            raise ValueError(f"it has the values {sorted(values)} instead of {sorted(names)}")
        for end in self._values:
            self.at(end, self._turn).row(row).write(values[end.removeprefix("value.")][None])
        self.steps[row] = steps


def _check_memory(runner: Runner, batch: int) -> None:
    """Refuse what is larger than all free memory: zeroed pages cost nothing until they are used,
    and then the system ends the process."""
    specs = [*runner.manifest.results.values()]
    specs += [*runner.loop.values.values()] * 2 if runner.loop else []
    sizes = [(np.dtype(spec.dtype).itemsize, resolve(spec.shape[1:], {})) for spec in specs]
    needed = batch * sum(size * math.prod(shape) for size, shape in sizes)
    free = available_memory()
    if free is not None and needed > free:
        raise OutOfMemory(
            f"{batch:,} puzzles in the loop at once take {needed / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free",
            do="put fewer into the loop: a smaller batch",
        )


class Whole(Bound):
    """The unrolled form: all iterations in one graph, for `batch` puzzles at once."""

    def __init__(self, runner: Runner, batch: int) -> None:
        axes, manifest = {"batch": batch}, runner.manifest
        self.inputs = buffers(runner.backend, manifest.inputs, axes)
        self.outcomes = buffers(runner.backend, manifest.results, axes)
        ends = {f"input.{n}": b for n, b in self.inputs.items()}
        super().__init__(runner, ends | {f"result.{n}": b for n, b in self.outcomes.items()}, axes)
        self._graph = self.bind("epilogue", 0, 0)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs [batch, ...] -> results by name [batch, ...]: until the next call."""
        for name, buffer in self.inputs.items():
            buffer.write(inputs[name])
        self._graph.run()
        self._wait()
        return {name: buffer.host for name, buffer in self.outcomes.items()}
