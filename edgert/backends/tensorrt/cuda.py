"""The CUDA runtime, as far as it is used: one small interface, and cuda-bindings behind it.

Addresses and handles are plain integers. Every call that fails raises an error that names the call
and what CUDA says: OutOfMemory, Incompatible where there is no usable device, else DeviceFailed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, Protocol

from edgert.errors import DeviceFailed, EdgertError, Incompatible, MissingDependency, OutOfMemory

Direction = Literal["HostToDevice", "DeviceToHost", "DeviceToDevice"]

NO_DEVICE = {
    34: "the library is a stub of the toolkit, not a driver",
    35: "there is no driver, or it is too old for its library",
    46: "every device is used by somebody else alone",
    100: "there is no device",
    101: "there is no such device",
    803: "library and kernel module have different versions",
    804: "the compatibility library does not fit this device",
}
"""CUDA's codes for a machine that has nothing to compute on."""
_NO_MEMORY = 2


class Cuda(Protocol):
    """What the backend asks of CUDA. Everything that takes a stream is done in its order."""

    def devices(self) -> int:
        """How many there are. The first call, and the one that finds out about the driver."""

    def capability(self) -> tuple[int, int]:
        """Compute capability of the first device."""

    def stream(self) -> int:
        """A new stream, which waits for no other."""

    def sync(self, stream: int) -> None:
        """Until all that is in the stream has ended. Other threads run meanwhile."""

    def end_stream(self, stream: int) -> None: ...

    def malloc(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes at least."""

    def free(self, address: int) -> None: ...

    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        """Memory of the host that the device sees, too: its address for the host, and for it."""

    def host_free(self, address: int) -> None: ...

    def copy(
        self,
        to: tuple[int, int],
        source: tuple[int, int],
        width: int,
        height: int,
        direction: Direction,
        stream: int,
    ) -> None:
        """`height` lines of `width` bytes. Each side: an address, the bytes from line to line."""

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None: ...

    def begin_capture(self, stream: int) -> None:
        """From now on what this thread puts into the stream is written down, not done."""

    def end_capture(self, stream: int) -> int:
        """What was written down, ready to be launched."""

    def launch(self, captured: int, stream: int) -> None: ...

    def end_captured(self, captured: int) -> None: ...

    def follow(self, stream: int, other: int) -> None:
        """What comes into the stream waits for what is in another one now."""


class CudaBindings:
    """The interface over `cuda.bindings.runtime`. Raises MissingDependency without the package."""

    def __init__(self) -> None:
        self._cuda: Any = _bindings()

    def devices(self) -> int:
        return int(self._ask("cudaGetDeviceCount"))

    def capability(self) -> tuple[int, int]:
        which = self._cuda.cudaDeviceAttr
        major = self._ask("cudaDeviceGetAttribute", which.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._ask("cudaDeviceGetAttribute", which.cudaDevAttrComputeCapabilityMinor, 0)
        return int(major), int(minor)

    def stream(self) -> int:
        flags = self._cuda.cudaStreamNonBlocking
        return int(self._ask("cudaStreamCreateWithFlags", flags))

    def sync(self, stream: int) -> None:
        self._ask("cudaStreamSynchronize", stream)

    def end_stream(self, stream: int) -> None:
        self._ask("cudaStreamDestroy", stream)

    def malloc(self, nbytes: int) -> int:
        return int(self._ask("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        self._ask("cudaFree", address)

    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        host = int(self._ask("cudaHostAlloc", nbytes, self._cuda.cudaHostAllocMapped))
        try:
            return host, int(self._ask("cudaHostGetDevicePointer", host, 0))
        except EdgertError:
            self.host_free(host)
            raise

    def host_free(self, address: int) -> None:
        self._ask("cudaFreeHost", address)

    def copy(
        self,
        to: tuple[int, int],
        source: tuple[int, int],
        width: int,
        height: int,
        direction: Direction,
        stream: int,
    ) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{direction}")
        self._ask("cudaMemcpy2DAsync", *to, *source, width, height, kind, stream)

    def fill(self, address: int, value: int, nbytes: int, stream: int) -> None:
        self._ask("cudaMemsetAsync", address, value, nbytes, stream)

    def begin_capture(self, stream: int) -> None:
        # Of this thread alone: others allocate meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._ask("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = self._ask("cudaStreamEndCapture", stream)
        try:
            return int(self._ask("cudaGraphInstantiate", graph, 0))
        finally:
            self._ask("cudaGraphDestroy", graph)

    def launch(self, captured: int, stream: int) -> None:
        self._ask("cudaGraphLaunch", captured, stream)

    def end_captured(self, captured: int) -> None:
        self._ask("cudaGraphExecDestroy", captured)

    def follow(self, stream: int, other: int) -> None:
        event = self._ask("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        try:
            self._ask("cudaEventRecord", event, other)
            self._ask("cudaStreamWaitEvent", stream, event, 0)
        finally:
            self._ask("cudaEventDestroy", event)

    def _ask(self, name: str, *given: Any) -> Any:
        """One call: what it gives back behind its code. Raises what the code says."""
        code, *found = getattr(self._cuda, name)(*given)
        if int(code):
            said = [self._cuda.cudaGetErrorName(code)[1], self._cuda.cudaGetErrorString(code)[1]]
            raise failed(name, int(code), *(text.decode("ascii", "replace") for text in said))
        return found[0] if found else None


def failed(call: str, code: int, name: str, text: str) -> EdgertError:
    """The error for what a call of CUDA gave back."""
    what = f"{call} says {name} ({code}): {text}"
    if code in NO_DEVICE:
        return Incompatible(
            f"there is no CUDA device to run on: {NO_DEVICE[code]}",
            where=what,
            do="edgert doctor says what is there; --device cpu runs without",
        )
    if code == _NO_MEMORY:
        return OutOfMemory(
            "the device has no memory left",
            where=what,
            do="use a smaller batch, chunk or capacity, or stop what else uses it",
        )
    return DeviceFailed(
        "the device failed", where=what, do="open the model again; if it comes back, report it"
    )


def _bindings() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependency(
            "cuda-bindings", "tensorrt", why="it reaches the memory of the device"
        ) from error
