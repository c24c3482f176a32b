"""ONNX Runtime on CPU: one thread pool, weights mapped from the bundle, buffers bound once."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from edgert.backends.base import (
    Array,
    Backend,
    Binding,
    Buffer,
    GraphSource,
    HostBuffer,
    LoadedGraph,
    host_zeros,
)
from edgert.errors import BadBundle, EdgertError, MissingDependency, OutOfMemory

MINIMUM = (1, 23)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "onnxruntime", "cpu", why="it runs the graphs of a bundle on the CPU"
        ) from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MINIMUM:
        raise MissingDependency(
            f"onnxruntime {MINIMUM[0]}.{MINIMUM[1]} or newer",
            "cpu",
            why=f"{onnxruntime.__version__} is too old for the graphs of a bundle",
        )
    onnxruntime.set_default_logger_severity(3)  # errors reach the user as exceptions
    return onnxruntime


class _Pool:
    """The process-wide thread pool. Pools of their own per session spin against each other.

    ONNX Runtime fixes the pool's size with its first session, so the first model decides; a later
    one that asks for another number of threads gets a pool of its own.
    """

    lock = threading.Lock()
    threads: int | None = None

    @classmethod
    def shared(cls, ort: Any, threads: int) -> bool:
        with cls.lock:
            if cls.threads is None:
                try:
                    ort.set_global_thread_pool_sizes(threads, 1)
                except (AttributeError, RuntimeError):
                    return False  # too old, or the application has used ONNX Runtime before us
                cls.threads = threads
            return cls.threads == threads


def default_threads() -> int:
    """Physical cores this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class OrtBuffer(HostBuffer):
    """Host memory and ONNX Runtime's handle on it; the array lives as long as the handle."""

    def __init__(self, array: Array) -> None:
        super().__init__(array)
        self.value = _onnxruntime().OrtValue.ortvalue_from_numpy(array)


class OrtBinding(Binding):
    def __init__(
        self,
        graph: OrtGraph,
        inputs: Mapping[str, OrtBuffer],
        outputs: Mapping[str, OrtBuffer],
    ) -> None:
        self._graph = graph
        # ONNX Runtime does not own the memory it is bound to: losing a buffer kills the process.
        self._alive = (dict(inputs), dict(outputs))
        self._io = graph.session.io_binding()
        for name, buffer in inputs.items():
            self._io.bind_ortvalue_input(name, buffer.value)
        for name, buffer in outputs.items():
            self._io.bind_ortvalue_output(name, buffer.value)
        # The Python wrapper around this call re-reads the run options each time; skip it.
        self._raw = self._io._iobinding

    def run(self) -> None:
        graph = self._graph
        try:
            graph.raw.run_with_iobinding(self._raw, graph.options)
        except Exception as error:
            text = str(error)
            if "Failed to allocate memory" in text or "bad_alloc" in text:
                raise OutOfMemory(
                    f"graph {graph.name!r} ran out of memory",
                    where=text,
                    do="use a smaller batch, chunk or capacity",
                ) from error
            raise EdgertError(f"graph {graph.name!r} failed in a step", where=text) from error


class OrtGraph(LoadedGraph):
    def __init__(self, ort: Any, source: GraphSource, options: Any) -> None:
        self.name = source.name
        try:
            self.session = ort.InferenceSession(
                str(source.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadBundle(
                f"ONNX Runtime {ort.__version__} refuses graph {source.name!r}: {error}",
                where=str(source.path),
                do="export the bundle again, or use a newer ONNX Runtime",
            ) from error
        self.raw = self.session._sess
        self.options = ort.RunOptions()

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBinding:
        return OrtBinding(self, inputs, outputs)  # type: ignore[arg-type]

    def close(self) -> None:
        del self.session, self.raw


class OrtBackend(Backend):
    """`threads` 0 means one per physical core. `prepack` trades memory for speed: ONNX Runtime
    copies matrices into its own layout (faster), or reads them mapped from the file (smaller,
    loads at once)."""

    name = "onnxruntime"

    def __init__(self, *, threads: int = 0, prepack: bool = True) -> None:
        self._ort = ort = _onnxruntime()
        self.threads = threads or default_threads()
        shared = _Pool.shared(ort, self.threads)
        self._options = options = ort.SessionOptions()
        options.use_per_session_threads = not shared
        if not shared:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.placement = f"onnxruntime {ort.__version__} · CPU · {self.threads} threads"

    def load(self, source: GraphSource) -> OrtGraph:
        return OrtGraph(self._ort, source, self._options)

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> OrtBuffer:
        return OrtBuffer(host_zeros(dtype, shape))

    def close(self) -> None:
        del self._options
