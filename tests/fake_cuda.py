"""CUDA without a device: the backend's interface over ordinary memory, as unforgiving as the real.

Device addresses are no addresses of this process: who takes one for the other fails. What is put
into the stream is done when somebody waits for it, so that whoever reads too early reads what was
there before, and whoever writes too early changes what a graph reads. Memory begins as garbage, and
what was freed is gone.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import DeviceFailed, OutOfMemory

GARBAGE = 0xA5
Operation = Callable[[], None]


class FakeCuda:
    """`calls` has the names of all calls; `limit` is the memory there is, in bytes."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.limit = limit
        self.memory: dict[int, NDArray[np.uint8]] = {}  # by device address
        self.shared: dict[int, int] = {}  # address for the host -> for the device
        self.kept: list[Any] = []  # freed memory of the host: arrays of a test may look at it
        self.queue: list[Operation] = []
        self.recording: list[Operation] | None = None
        self.graphs: dict[int, list[Operation]] = {}
        self.followed: list[int] = []
        self._next = 0x7_0000_0000
        self._handles = 100

    def reserved(self, shared: bool = False) -> int:
        """Bytes that are allocated now: of the device's own, or of those the host sees."""
        both = set(self.shared.values())
        return sum(len(data) for at, data in self.memory.items() if (at in both) == shared)

    def at(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Device memory as bytes. AssertionError if it is none."""
        starts = sorted(self.memory)
        place = bisect_right(starts, address) - 1
        assert place >= 0, f"{address:#x} is no device address"
        data, offset = self.memory[starts[place]], address - starts[place]
        assert offset + nbytes <= len(data), f"{address:#x} + {nbytes} is no device memory"
        return data[offset : offset + nbytes]

    def put(self, operation: Operation) -> None:
        (self.queue if self.recording is None else self.recording).append(operation)

    def devices(self) -> int:
        return 1

    def capability(self) -> tuple[int, int]:
        return 8, 7

    def stream(self) -> int:
        self.calls.append("stream")
        return self._handle()

    def sync(self, stream: int) -> None:
        assert self.recording is None, "waiting while launches are written down"
        self.calls.append("sync")
        todo, self.queue = self.queue, []
        for operation in todo:
            operation()

    def end_stream(self, stream: int) -> None:
        assert not self.queue
        self.calls.append("end_stream")

    def malloc(self, nbytes: int) -> int:
        self.calls.append("malloc")
        if self.reserved() + nbytes > self.limit:
            raise OutOfMemory("the device has no memory left", where="cudaMalloc")
        return self._new(np.full(nbytes, GARBAGE, np.uint8))

    def free(self, address: int) -> None:
        assert self.recording is None, "freeing while launches are written down"
        assert not self.queue, "freeing what the stream may use"
        self.calls.append("free")
        del self.memory[address]

    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        self.calls.append("host_alloc")
        data = np.full(nbytes, GARBAGE, np.uint8)
        address = self._new(data)
        self.shared[data.ctypes.data] = address
        return data.ctypes.data, address

    def host_free(self, address: int) -> None:
        self.calls.append("host_free")
        self.kept.append(self.memory.pop(self.shared.pop(address)))

    def copy(
        self,
        to: tuple[int, int],
        source: tuple[int, int],
        width: int,
        height: int,
        direction: str,
        stream: int,
    ) -> None:
        assert to[1] >= width
        assert source[1] >= width
        self.calls.append(f"copy{direction}")
        from_host = direction == "HostToDevice"  # then it is read now, as CUDA does
        starts = [source[0] + i * source[1] for i in range(height)]
        lines = [ctypes.string_at(start, width) for start in starts] if from_host else []

        def move() -> None:
            for i in range(height):
                line = (
                    lines[i] if from_host else self.at(source[0] + i * source[1], width).tobytes()
                )
                if direction == "DeviceToHost":
                    ctypes.memmove(to[0] + i * to[1], line, width)
                else:
                    self.at(to[0] + i * to[1], width)[:] = np.frombuffer(line, np.uint8)

        self.put(move)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        def fill() -> None:
            self.at(address, nbytes)[:] = value

        self.put(fill)

    def begin_capture(self, stream: int) -> None:
        self.calls.append("begin_capture")
        self.recording = []

    def end_capture(self, stream: int) -> int:
        assert self.recording is not None
        self.calls.append("end_capture")
        recorded, self.recording = self.recording, None
        if any(getattr(operation, "spoils", False) for operation in recorded):
            raise DeviceFailed("the device failed", where="cudaStreamEndCapture says 901")
        self.graphs[self._handle()] = recorded
        return self._handles

    def launch(self, captured: int, stream: int) -> None:
        self.calls.append("launch")
        for operation in self.graphs[captured]:
            self.put(operation)

    def end_captured(self, captured: int) -> None:
        self.calls.append("end_captured")
        del self.graphs[captured]

    def follow(self, stream: int, other: int) -> None:
        self.calls.append("follow")
        self.followed.append(other)

    def _new(self, data: NDArray[np.uint8]) -> int:
        address = self._next
        self._next += (len(data) // 4096 + 2) * 4096
        self.memory[address] = data
        return address

    def _handle(self) -> int:
        self._handles += 1
        return self._handles
