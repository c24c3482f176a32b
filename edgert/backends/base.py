"""What a backend is: load a graph, allocate named tensors, bind them once, run.

A `Buffer` is memory that the backend owns and the runtime names. A `Binding` ties one graph to
one set of buffers; running it moves nothing that is already in place. An output may be bound to
the buffer an input reads: that is how KV state is updated without a copy.

Graphs and copies happen in the order in which they are asked for, and may go on behind the call
that asked: `Backend.wait` ends them. Before it, the host neither reads nor writes memory that it
shares with them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Incompatible, OutOfMemory, UsageError

Array = NDArray[np.generic]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class GraphSource:
    """A graph file whose hash and external data paths the bundle has already checked.

    bundle, variant, variant_id, sha256  where it is from, and the hashes of it and its data files:
                                         by them an engine is found that was compiled from it
    """

    name: str
    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bundle: str = ""
    variant: str = ""
    variant_id: str = ""
    sha256: tuple[str, ...] = ()


class Buffer(ABC):
    """A tensor in the backend's memory. Rows are its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    @abstractmethod
    def host(self) -> Array:
        """The same memory as numpy array, which keeps it.

        Every buffer that was allocated as shared has it, and all of a backend that computes in the
        host's memory.
        """

    @abstractmethod
    def read(self, at: Slices = ()) -> Array:
        """A copy, in host memory: of the whole, or of the part that the slices name."""

    @abstractmethod
    def write(self, values: Array, at: Slices = ()) -> None:
        """Replace the content, or a part of it; `values` must have its shape and dtype."""

    @abstractmethod
    def copy(self, source: Buffer, at: Slices) -> None:
        """Take over a part, which both have, of another buffer of the same backend and dtype."""

    @abstractmethod
    def row(self, index: int) -> Buffer:
        """Row `index` as a buffer of shape (1, ...) over the same memory."""


class Binding(ABC):
    @abstractmethod
    def run(self) -> None:
        """Execute the graph over the bound buffers, with the GIL released. See `Backend.wait`."""


class LoadedGraph(ABC):
    @abstractmethod
    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Binding:
        """Bind every input and output of the graph by name."""

    @abstractmethod
    def close(self) -> None: ...


class Backend(ABC):
    """`placement` says in words what runs where: runtime, version, device, threads.

    `build` says the same as pairs, of all that decides the bits of a result: equal builds give
    bitwise equal results for the same calls.
    """

    name: str
    placement: str
    build: dict[str, str]

    def expect(self, graphs: int, nbytes: int) -> None:  # noqa: B027 - most have nothing to do
        """What one model brings: how many graphs, that run one after the other, and the bytes of
        their files."""

    def check_states(self, dtypes: Collection[str]) -> None:  # noqa: B027 - most take all
        """Raise Incompatible if graphs that keep states in one of these dtypes cannot run here."""

    @abstractmethod
    def load(self, source: GraphSource) -> LoadedGraph: ...

    @abstractmethod
    def allocate(self, dtype: str, shape: tuple[int, ...], *, shared: bool = False) -> Buffer:
        """A buffer of zeros. Raises OutOfMemory with the size that was asked for.

        shared  the host reads or writes it in place, as `host`
        """

    @abstractmethod
    def borrow(self, value: object, *, writes: bool = False) -> Buffer:
        """An array of the caller's as a buffer, over the same memory; the buffer keeps it.

        writes  a graph will write it
        Raises UsageError for what is no dense array, or cannot be written; Incompatible for one in
        memory that this backend does not compute in.
        """

    def ready(self, variant_id: str) -> bool:
        """Whether all that a variant needs here is at hand, such as engines compiled for it."""
        return True

    def wait(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Until all graphs and copies asked for so far have ended."""

    @abstractmethod
    def close(self) -> None: ...


class HostBuffer(Buffer):
    """A buffer in ordinary memory: what CPU backends share."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    @property
    def host(self) -> Array:
        return self._array

    def read(self, at: Slices = ()) -> Array:
        return self._array[at].copy()

    def write(self, values: Array, at: Slices = ()) -> None:
        part = self._array[at]
        if values.shape != part.shape or values.dtype != self.dtype:
            raise ValueError(f"{values.dtype}{values.shape} into {self.dtype}{part.shape}")
        self._array[at] = values

    def copy(self, source: Buffer, at: Slices) -> None:
        self._array[at] = source.host[at]

    def row(self, index: int) -> HostBuffer:
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of a buffer of {self.shape[0]} rows")
        return type(self)(self._array[index : index + 1])


def host_array(value: object, writes: bool) -> Array:
    """An array of the caller's that a CPU computes on, as it is. Raises as `Backend.borrow`."""
    if not isinstance(value, np.ndarray):
        if hasattr(value, "__cuda_array_interface__"):
            raise Incompatible(
                f"an array of {type(value).__module__} is in the memory of a GPU, and this model "
                "runs on the CPU",
                do="copy it into a numpy array, or load the model with device='tensorrt'",
            )
        raise UsageError(f"{type(value).__name__} is no numpy array", do="make one of it")
    if not value.flags.c_contiguous or not value.flags.aligned or not value.dtype.isnative:
        raise UsageError("the array is not dense", do="give numpy.ascontiguousarray of it")
    if writes and not value.flags.writeable:
        raise UsageError("the array is for reading only", do="give another one for the result")
    return value


def nbytes_of(dtype: str | np.dtype[np.generic], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def no_memory(dtype: str, shape: tuple[int, ...], where: str | None = None) -> OutOfMemory:
    """The error for a tensor that cannot be allocated."""
    return OutOfMemory(
        f"cannot allocate {nbytes_of(dtype, shape) / 1e6:.0f} MB for a {dtype} tensor of shape "
        f"{shape}",
        where=where,
        do="open the session with a smaller capacity or batch",
    )


def host_zeros(dtype: str, shape: tuple[int, ...]) -> Array:
    """Zeroed host memory. Raises OutOfMemory with the size that was asked for."""
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:  # ValueError: beyond what numpy can address
        raise no_memory(dtype, shape) from error
