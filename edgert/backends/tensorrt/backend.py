"""TensorRT as a backend: engines from this user's cache, states on the device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgert.backends.base import (
    Backend,
    Buffer,
    GraphSource,
    LoadedGraph,
    nbytes_of,
    no_memory,
)
from edgert.backends.tensorrt.arrays import device_array
from edgert.backends.tensorrt.binding import EngineBinding
from edgert.backends.tensorrt.buffers import DeviceBuffer, Foreign, Storage
from edgert.backends.tensorrt.cuda import Cuda
from edgert.backends.tensorrt.device import Device, Rank
from edgert.backends.tensorrt.engine import Engine, load_engine, open_runtime
from edgert.enginestore import Stored, engines_folder, read_engine, stored_engines
from edgert.errors import Incompatible, OutOfMemory, UsageError


class EngineGraph(LoadedGraph):
    def __init__(self, trt: Any, device: Device, engine: Engine, hint: str) -> None:
        self._trt, self._device, self._hint = trt, device, hint
        self._holder = [engine]
        self._owned = device.own(Rank.ENGINE, self._holder.clear)
        self.bindings: weakref.WeakSet[EngineBinding] = weakref.WeakSet()

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> EngineBinding:
        with self._device.use():
            binding = EngineBinding(
                self._trt,
                self._device,
                self._holder,
                inputs,  # type: ignore[arg-type]
                outputs,  # type: ignore[arg-type]
                self._hint,
            )
        self.bindings.add(binding)
        return binding

    def close(self) -> None:
        with self._device.lock:
            for binding in list(self.bindings):
                binding.close()
            self._device.discard(self._owned)


class TensorRTBackend(Backend):
    """Engines run in one stream, whichever session asks; the host waits for it between a step and
    reading what came out. `trt` and `cuda` have been found to work: see `opening`."""

    name = "tensorrt"

    def __init__(self, trt: Any, cuda: Cuda) -> None:
        self._trt = trt
        self._sm = ".".join(map(str, cuda.capability()))
        self._compiler = f"tensorrt {trt.__version__}"
        self.device = Device(cuda)
        self._runtime = [open_runtime(trt)]
        self.device.own(Rank.RUNTIME, self._runtime.clear)
        self._graphs: list[EngineGraph] = []
        self.build = {"backend": self._compiler, "machine": f"SM {self._sm}"}
        self._stored: dict[str, list[Stored]] = {}

    @property
    def placement(self) -> str:  # type: ignore[override]
        """Also how many launches could not be captured in CUDA graphs."""
        where = f"{self._compiler} · GPU, SM {self._sm}"
        bound = [binding.launches for graph in self._graphs for binding in graph.bindings]
        failed = [launches.why for launches in bound if not launches.possible]
        return where + (f" · without CUDA graphs: {failed[0]}" if failed else "")

    def ready(self, variant_id: str) -> bool:
        return bool(self._engines(variant_id))

    def _engines(self, variant_id: str) -> list[Stored]:
        if variant_id not in self._stored:
            self._stored[variant_id] = stored_engines(variant_id, self._compiler, self._sm)
        return self._stored[variant_id]

    def load(self, source: GraphSource) -> EngineGraph:
        """Raises Incompatible if there is no engine of the graph for this device and this version,
        or it is another user's; BadFile if it is damaged."""
        hint = f"build engines for it:  edgert build {source.bundle} --target NAME"
        fitting = [
            stored
            for stored in self._engines(source.variant_id)
            if stored.made_for["graph"] == source.name
            and tuple(stored.made_for["files"]) == source.sha256
        ]
        kept = None
        if fitting:
            newest = max(fitting, key=lambda stored: stored.modified)
            kept = read_engine(newest.path, newest.made_for)
        if kept is None:
            raise Incompatible(
                f"there is no engine of graph {source.name!r} of variant {source.variant} for "
                f"{self._compiler} and SM {self._sm}",
                where=str(engines_folder()),
                do=f"{hint} (edgert build --help lists them)",
            )
        _, data = kept
        with self.device.use():
            engine = load_engine(self._trt, self._runtime[0], source.name, data, str(newest.path))
        self.device.scratch.expect(engine.scratch)
        # By its signature: another build may compute other bits.
        self.build[f"engine.{source.name}"] = newest.signature
        more = "with larger shape profiles in the target, or ask for less at once"
        graph = EngineGraph(self._trt, self.device, engine, f"{hint}, {more}")
        self._graphs.append(graph)
        return graph

    def allocate(self, dtype: str, shape: tuple[int, ...], *, shared: bool = False) -> DeviceBuffer:
        kind: np.dtype[np.generic] = np.dtype(dtype)
        try:
            storage = Storage(self.device, nbytes_of(kind, shape), shared=shared)
        except OutOfMemory as error:
            raise no_memory(dtype, shape, error.where) from error
        return DeviceBuffer(self.device, storage, kind, shape)

    def borrow(self, value: object, *, writes: bool = False) -> DeviceBuffer:
        """An array of the caller's on the device, used where it is."""
        if isinstance(value, np.ndarray):
            raise Incompatible(
                "a numpy array is in the memory of the host, and this model runs on the GPU",
                do="give one on the device: of pycuda, CuPy or torch",
            )
        array = device_array(value)
        if writes and array.read_only:
            raise UsageError("the array is for reading only", do="give another one for the result")
        return DeviceBuffer(self.device, Foreign(array), array.dtype, array.shape)

    def wait(self) -> None:
        self.device.wait()

    def close(self) -> None:
        """Let go of all that is on the device. What sessions read on the host stays theirs."""
        for graph in self._graphs:
            graph.close()
        self.device.close()
