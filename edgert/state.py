"""The named states of an open session: allocated once, bound once, updated in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Backend, Buffer
from edgert.errors import BadBundle, CapacityExceeded, EdgertError
from edgert.spec import StateSpec, resolve

BUCKETS = (256, 1024, 4096)
"""Capacities that a session grows through; beyond the last one, in multiples of it."""


def bucket(tokens: int, context: int) -> int:
    """The smallest capacity that holds `tokens`, at most `context`.

    Raises CapacityExceeded if the model cannot hold that many.
    """
    if tokens > context:
        raise CapacityExceeded(
            f"{tokens} tokens are more than this model's context of {context}",
            do="shorten the prompt, or export the model again with a larger --context",
        )
    last = BUCKETS[-1]
    capacity = next((b for b in BUCKETS if tokens <= b), -(-tokens // last) * last)
    return min(capacity, context)


def rows_in(specs: Mapping[str, StateSpec], saved: Mapping[str, NDArray[np.generic]]) -> int:
    """Rows that exported states of one sequence hold, as their counters say.

    Raises ValueError if a counter is missing, is none, or two of them differ.
    """
    counts = set()
    for name in (name for name, spec in specs.items() if spec.kind == "counter"):
        count = saved.get(name)
        if count is None or (count.dtype, count.shape) != (np.dtype(np.int64), (1,)):
            raise ValueError(f"counter {name!r} is not there, or not one int64")
        counts.add(int(count[0]))
    if len(counts) != 1:
        raise ValueError(f"its counters say {sorted(counts)}")
    return counts.pop()


def check_layout(
    specs: Mapping[str, StateSpec], saved: Mapping[str, NDArray[np.generic]], capacity: int
) -> int:
    """Rows that exported states of one sequence hold. Raises ValueError if they are not for these
    specs: a name, dtype or shape that differs, or another number of rows."""
    if saved.keys() != specs.keys():
        odd = sorted(saved.keys() ^ specs.keys())
        raise ValueError(f"state {odd[0]!r} is on one side only")
    rows = rows_in(specs, saved)
    for name, spec in specs.items():
        held = min(rows, capacity) if spec.kind == "append" else capacity
        shape = resolve(spec.shape, {"batch": 1, "capacity": held})
        want, got = (np.dtype(spec.dtype), shape), (saved[name].dtype, saved[name].shape)
        if want != got:
            raise ValueError(f"state {name!r} is {got[0]}{got[1]}, not {want[0]}{want[1]}")
    return rows


class States:
    """Every state of one session as a buffer. `counters` are the rows filled so far, [batch]."""

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        backend: Backend,
        *,
        batch: int,
        capacity: int,
        root: Path | None = None,
    ) -> None:
        self.specs = specs
        self.batch = batch
        self.capacity = capacity
        self._backend = backend
        self._root = root
        self._shared = False
        self.buffers: dict[str, Buffer] = {name: self._allocate(name, capacity) for name in specs}
        self.counters: dict[str, NDArray[np.int64]] = {
            name: self.buffers[name].host  # type: ignore[misc]
            for name, spec in specs.items()
            if spec.kind == "counter"
        }

    def _allocate(self, name: str, capacity: int) -> Buffer:
        spec = self.specs[name]
        shape = resolve(spec.shape, {"batch": self.batch, "capacity": capacity})
        # A counter is advanced by the host, in place.
        buffer = self._backend.allocate(spec.dtype, shape, shared=spec.kind == "counter")
        if spec.init != "zeros":
            self._initialise(name, buffer)
        return buffer

    def _initialise(self, name: str, buffer: Buffer) -> None:
        spec = self.specs[name]
        if spec.init == "zeros":
            buffer.write(np.zeros(buffer.shape, buffer.dtype))
            return
        assert self._root is not None, "a state with an initial tensor needs its bundle"
        buffer.write(_initial(self._root / spec.init, spec, buffer.shape))

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def row(self, index: int) -> States:
        """Row `index` of the batch as states of their own, over the same memory."""
        view = copy.copy(self)
        view.batch = 1
        view.buffers = {name: buffer.row(index) for name, buffer in self.buffers.items()}
        view.counters = {name: view.buffers[name].host for name in self.counters}  # type: ignore[misc]
        view._shared = True
        return view

    def reset(self) -> None:
        """Back to the start: counters at zero, carried states at their initial values.

        Append states stay as they are: rows behind the counter are never read.
        """
        for name, spec in self.specs.items():
            if spec.kind != "append":
                self._initialise(name, self.buffers[name])

    def filled(self, rows: int) -> dict[str, tuple[slice, ...]]:
        """The part of each state that means something when `rows` are in: where to read or write.

        For a single sequence. Rows of an append state behind them are never read.
        """
        assert self.batch == 1, "a batch is saved row by row"
        return {
            name: tuple(slice(rows if axis == spec.axis else None) for axis in spec.shape)
            if spec.kind == "append"
            else ()
            for name, spec in self.specs.items()
        }

    def export(self, rows: int | None = None) -> dict[str, NDArray[np.generic]]:
        """Copies of the filled part of each state, by name: all that resuming needs.

        rows  as they were when they held so many, which only `rewindable` ones can tell
        """
        now = int(next(iter(self.counters.values()))[0])
        rows = now if rows is None else rows
        assert rows == now or self.rewindable
        saved = {name: self.buffers[name].read(at) for name, at in self.filled(rows).items()}
        return saved | {name: np.full(1, rows, np.int64) for name in self.counters}

    def restore(self, saved: Mapping[str, NDArray[np.generic]]) -> None:
        """Take over what `export` gave. Raises ValueError, with nothing changed, as `check_layout`
        does."""
        rows = check_layout(self.specs, saved, self.capacity)
        for name, at in self.filled(rows).items():
            self.buffers[name].write(saved[name], at)

    @property
    def rewindable(self) -> bool:
        """Whether an earlier position is still there: not in states that a step replaces."""
        return all(spec.keeps_history for spec in self.specs.values())

    def close(self) -> None:
        """Let go of the memory, which lives on while a binding that is running needs it."""
        self.buffers.clear()
        self.counters.clear()

    def resize(self, capacity: int) -> None:
        """Move into another capacity; what fits is copied, the rest is zero.

        Bindings to the old buffers and rows made before are void afterwards. Raises OutOfMemory
        with everything as it was.
        """
        if self._shared:
            raise EdgertError(
                "a row of a batch cannot grow by itself", do="reserve room on the whole batch first"
            )
        appended = [name for name, spec in self.specs.items() if spec.kind == "append"]
        moved = {name: self._allocate(name, capacity) for name in appended}  # all, or nothing moves
        for name, new in moved.items():
            old = self.buffers[name]
            both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            new.copy(old, both)
        self.buffers.update(moved)
        self.capacity = capacity


def _initial(path: Path, spec: StateSpec, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The initial tensor of a state, repeated over the batch."""
    values = stored_array(path, "initial state", spec.dtype, shape[1:])
    return np.broadcast_to(values, shape)


def stored_array(
    path: Path, what: str, dtype: str, shape: tuple[int, ...], *, rows: bool = False
) -> NDArray[np.generic]:
    """An array of a bundle, mapped from its .npy file; `rows`: any number of such arrays, one at
    least. Raises BadBundle if it is another than was declared."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")  # refuses objects, and zip archives
    except (OSError, ValueError) as error:
        raise BadBundle(
            f"{what} cannot be read: {error}", where=str(path), do="export the bundle again"
        ) from error
    some = values.ndim > 0 and len(values) > 0
    fits = some and values.shape[1:] == shape if rows else values.shape == shape
    if values.dtype != np.dtype(dtype) or not fits:
        raise BadBundle(
            f"{what} is {values.dtype}{values.shape}, declared {dtype}{shape}",
            where=str(path),
            do="export the bundle again",
        )
    return values
