"""Tensors on the device. Those that the host reads or writes in place lie in memory of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Array, Buffer, Slices, nbytes_of
from edgert.backends.tensorrt.arrays import DeviceArray
from edgert.backends.tensorrt.device import Device, Memory, SharedMemory
from edgert.backends.tensorrt.memory import ALIGNMENT
from edgert.backends.tensorrt.rectangles import part
from edgert.errors import EdgertError, Incompatible


class Storage:
    """Where a tensor is: one side, or two that take turns, since no engine may write what it reads.

    turn  the side that holds the values now
    """

    def __init__(self, device: Device, nbytes: int, *, shared: bool) -> None:
        self.device = device
        self.nbytes = nbytes
        self.shared = SharedMemory(device, nbytes) if shared else None
        self._sides: list[SharedMemory | Memory] = [self.shared or Memory(device, nbytes)]
        self.turn = 0

    @property
    def address(self) -> int:
        return self._sides[self.turn].address

    @property
    def other(self) -> int:
        """The side that is written next."""
        return self._sides[1 - self.turn].address

    def double(self) -> None:
        """Have two sides. Raises EdgertError for what the host looks at: it sees one."""
        if self.shared is not None:
            raise EdgertError("a graph writes a tensor that it reads and the host shares")
        if len(self._sides) == 1:
            self._sides.append(Memory(self.device, self.nbytes))


class Foreign:
    """A tensor in memory of the caller's, which is kept as long as this is.

    stream  the caller's, which fills it and reads it; None: there is nothing to wait for
    """

    turn = 0
    shared = None

    def __init__(self, array: DeviceArray) -> None:
        self.address = array.address
        self.stream = array.stream
        self.owner = array.owner

    def double(self) -> None:
        raise Incompatible(
            "a graph writes a tensor that it reads, and that is in the caller's memory",
            do="give it two arrays",
        )

    @property
    def other(self) -> int:
        raise AssertionError("it has one side")


class DeviceBuffer(Buffer):
    """A tensor in a storage, or a row of one. `offset` is where it begins, in bytes."""

    def __init__(
        self,
        device: Device,
        storage: Storage | Foreign,
        dtype: np.dtype[np.generic],
        shape: tuple[int, ...],
        offset: int = 0,
        whole: bool = True,
    ) -> None:
        self._device = device
        self.storage = storage
        self.dtype = dtype
        self.shape = shape
        self.offset = offset
        self.whole = whole

    @property
    def address(self) -> int:
        """Where the values are now."""
        return self.storage.address + self.offset

    @property
    def is_aligned(self) -> bool:
        """Whether an engine takes it as it is: rows need not be."""
        return self.address % ALIGNMENT == 0

    @property
    def host(self) -> Array:
        """Of shared tensors. Raises EdgertError for others."""
        shared = self.storage.shared
        if shared is None:
            raise EdgertError("this tensor is in the memory of the device alone")
        flat = np.asarray(shared)[self.offset : self.offset + self.nbytes]
        return flat.view(self.dtype).reshape(self.shape)

    def read(self, at: Slices = ()) -> Array:
        if self.storage.shared is not None:
            self._device.wait()
            return self.host[at].copy()
        chosen = part(self.shape, self.dtype.itemsize, at)
        out: NDArray[np.generic] = np.empty(chosen.shape, self.dtype)
        dense = part(chosen.shape, self.dtype.itemsize)
        self._device.to_host(out, dense, self.address, chosen)
        return out

    def write(self, values: Array, at: Slices = ()) -> None:
        chosen = part(self.shape, self.dtype.itemsize, at)
        if values.shape != chosen.shape or values.dtype != self.dtype:
            raise ValueError(f"{values.dtype}{values.shape} into {self.dtype}{chosen.shape}")
        if self.storage.shared is not None:
            self._device.wait()
            self.host[at] = values
            return
        dense = np.ascontiguousarray(values).reshape(values.shape)
        self._device.from_host(self.address, chosen, dense, part(values.shape, self.dtype.itemsize))

    def copy(self, source: Buffer, at: Slices) -> None:
        assert isinstance(source, DeviceBuffer), "of the same backend"
        size = self.dtype.itemsize
        here, there = part(self.shape, size, at), part(source.shape, size, at)
        self._device.copy(self.address, here, source.address, there, size)

    def row(self, index: int) -> DeviceBuffer:
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of a buffer of {self.shape[0]} rows")
        shape = (1, *self.shape[1:])
        offset = self.offset + index * nbytes_of(self.dtype, shape)
        whole = self.whole and self.shape[0] == 1
        return DeviceBuffer(self._device, self.storage, self.dtype, shape, offset, whole)
