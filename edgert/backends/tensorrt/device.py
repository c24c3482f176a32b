"""One stream of the device, all that lives on it, and the order in which it is let go.

    launches captured in graphs, execution contexts, engines, the runtime, memory, the stream

A user that goes away (a session, a step shape) may do so in any thread and at any moment, also
while launches are being written down, when nothing may be freed. So it only puts what it had on a
list, which `sweep` works off between two calls.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import count

import numpy as np
from numpy.typing import NDArray

from edgert.backends.tensorrt.cuda import Cuda, Direction
from edgert.backends.tensorrt.memory import aligned
from edgert.backends.tensorrt.rectangles import Part, rectangles
from edgert.errors import UsageError


class Rank(IntEnum):
    """What is let go first stands first: nobody is left without what it uses."""

    CAPTURED = 0
    CONTEXT = 1
    ENGINE = 2
    RUNTIME = 3
    MEMORY = 4
    SHARED = 5  # memory that arrays of the host's may still look at: it goes with the last of them
    STREAM = 6


class Device:
    """The stream that everything runs in, one after the other, whichever thread asks for it."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = threading.RLock()
        self.closed = False
        self.capturing = False  # then nothing may be freed, and nothing waited for
        self.scratch = Scratch(self)
        self._numbers = count()
        self._live: dict[int, tuple[Rank, Callable[[], None]]] = {}
        self._gone: deque[int] = deque()
        self.stream = cuda.stream()
        self.own(Rank.STREAM, lambda: cuda.end_stream(self.stream))

    @contextmanager
    def use(self) -> Iterator[Cuda]:
        """The stream for one caller. Raises UsageError once it is closed."""
        with self.lock:
            if self.closed:
                raise UsageError("the model is closed", do="load it again, or close it later")
            self.sweep()
            yield self.cuda

    def wait(self) -> None:
        """Until all that was asked for has ended."""
        with self.use() as cuda:
            cuda.sync(self.stream)

    def own(self, rank: Rank, release: Callable[[], None]) -> int:
        """Something new that lives here, and how it is let go: its number for `discard`."""
        number = next(self._numbers)
        self._live[number] = rank, release
        return number

    def discard(self, number: int) -> None:
        """Nobody uses it any more. Callable from anywhere."""
        self._gone.append(number)
        if self.closed:
            self._release(self._taken())

    def sweep(self) -> None:
        """Let go of what was discarded, once the stream no longer uses it."""
        if self._gone and not self.capturing:
            self.cuda.sync(self.stream)
            self._release(self._taken())

    def close(self) -> None:
        """Let go of everything, in order, behind the step that is running. Twice does nothing."""
        with self.lock:
            if self.closed:
                return
            self.cuda.sync(self.stream)
            self.closed = True
            kept = [n for n, (rank, _) in self._live.items() if rank is not Rank.SHARED]
            self._release({*kept, *self._taken()})

    def _taken(self) -> set[int]:
        found = set()
        while self._gone:
            found.add(self._gone.popleft())
        return found

    def _release(self, numbers: set[int]) -> None:
        # The newest first, within a rank.
        order = sorted(numbers & self._live.keys(), key=lambda n: (self._live[n][0], -n))
        for number in order:
            self._live.pop(number)[1]()

    def copy(self, to: int, to_part: Part, source: int, source_part: Part, itemsize: int) -> None:
        """From device to device, in the stream."""
        with self.use():
            self._move(to, to_part, source, source_part, itemsize, "DeviceToDevice")

    def to_host(self, out: NDArray[np.generic], dense: Part, source: int, part: Part) -> None:
        """Into a dense array; it is there when this returns."""
        with self.use() as cuda:
            self._move(out.ctypes.data, dense, source, part, out.dtype.itemsize, "DeviceToHost")
            cuda.sync(self.stream)

    def from_host(self, to: int, part: Part, values: NDArray[np.generic], dense: Part) -> None:
        """From a dense array, which may be changed when this returns."""
        with self.use() as cuda:
            size = values.dtype.itemsize
            self._move(to, part, values.ctypes.data, dense, size, "HostToDevice")
            cuda.sync(self.stream)

    def _move(
        self,
        to: int,
        to_part: Part,
        source: int,
        source_part: Part,
        itemsize: int,
        direction: Direction,
    ) -> None:
        for r in rectangles(to_part, source_part, itemsize):
            sides = (to + r.to, r.to_pitch), (source + r.source, r.source_pitch)
            self.cuda.copy(*sides, r.width, r.height, direction, self.stream)


class Memory:
    """Device memory, zeroed. It is let go with the last that refers to it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        with device.use() as cuda:
            self.address = cuda.malloc(aligned(nbytes))
            address = self.address
            number = device.own(Rank.MEMORY, lambda: device.cuda.free(address))
            cuda.fill(address, 0, aligned(nbytes), device.stream)
        weakref.finalize(self, device.discard, number).atexit = False


class SharedMemory:
    """Memory of the host that the device reads and writes in place, zeroed.

    Arrays made of it keep it, also when the device is closed.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        with device.use() as cuda:
            host, self.address = cuda.host_alloc(aligned(nbytes))
            number = device.own(Rank.SHARED, lambda: device.cuda.host_free(host))
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (aligned(nbytes),),
            "data": (host, False),
        }
        weakref.finalize(self, device.discard, number).atexit = False
        np.asarray(self)[:] = 0


class Scratch:
    """What engines compute in. They run one after the other, so one piece serves them all.

    generation  changes whenever the address does
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self._most = 0
        self.nbytes = 0
        self.generation = 0

    def expect(self, nbytes: int) -> None:
        """An engine of this device needs so many bytes."""
        self._most = max(self._most, nbytes)

    def reserve(self) -> int:
        """Its address, with as many bytes as any engine needs; 0 if none needs any."""
        if self._most > self.nbytes:
            self._memory = None  # not both at once
            self._device.sweep()
            self._memory = Memory(self._device, self._most)
            self.nbytes = self._most
            self.generation += 1
        return 0 if self._memory is None else self._memory.address
