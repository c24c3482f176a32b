"""ONNX Runtime on CPU: one thread pool, weights mapped from the bundle, buffers bound once."""

from __future__ import annotations

import os
import re
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
from edgert.errors import (
    BadBundle,
    EdgertError,
    Incompatible,
    MissingDependency,
    OutOfMemory,
    UsageError,
)

MINIMUM = (1, 23)
MAX_THREADS = 1024
_SILENT = 4  # errors reach the user as exceptions, not as the library's log lines


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "onnxruntime", "cpu", why="it runs the graphs of a bundle on the CPU"
        ) from error
    version = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    if not version or tuple(map(int, version.groups())) < MINIMUM:
        raise MissingDependency(
            f"onnxruntime {MINIMUM[0]}.{MINIMUM[1]} or newer",
            "cpu",
            why=f"{onnxruntime.__version__} is too old for the graphs of a bundle",
        )
    onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


class _Pool:
    """The process-wide thread pool: pools of their own per session spin against each other.

    ONNX Runtime takes its size once, and from then on lets no session have threads of its own. So
    the first model decides for the process.
    """

    lock = threading.Lock()
    threads: int | None = None  # not made yet; 0: made by the application, of unknown size

    @classmethod
    def join(cls, ort: Any, threads: int) -> int | None:
        """Its size, if possible the one asked for (0: any). None if there can be no such pool.

        Raises Incompatible if it has another size.
        """
        with cls.lock:
            if cls.threads is None:
                wanted = threads or default_threads()
                try:
                    ort.set_global_thread_pool_sizes(wanted, 1)
                    cls.threads = wanted
                except Exception as error:
                    if "already" not in str(error):
                        return None
                    cls.threads = 0
            if threads and cls.threads != threads:
                found = cls.threads or "the application's number of"
                raise Incompatible(
                    f"{threads} threads are asked for, and this process already runs ONNX Runtime "
                    f"on {found} threads",
                    do="leave threads at 0 to share them, or use another process",
                )
            return cls.threads


def default_threads() -> int:
    """Physical cores this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class OrtBuffer(HostBuffer):
    """Host memory and ONNX Runtime's handle on it; the array lives as long as the handle."""

    def __init__(self, array: Array) -> None:
        from onnxruntime import OrtValue

        super().__init__(array)
        self.value = OrtValue.ortvalue_from_numpy(array)


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
        try:
            for name, buffer in inputs.items():
                self._io.bind_ortvalue_input(name, buffer.value)
            for name, buffer in outputs.items():
                self._io.bind_ortvalue_output(name, buffer.value)
        except Exception as error:
            raise BadBundle(
                f"graph {graph.name!r} does not take the tensors of its manifest: {error}",
                where=graph.where,
                do="export the bundle again",
            ) from error
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
        self.where = str(source.path)
        try:
            self.session = ort.InferenceSession(
                str(source.path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would try again, and print about it on stdout
            )
        except Exception as error:
            raise BadBundle(
                f"ONNX Runtime {ort.__version__} refuses graph {source.name!r}: {error}",
                where=str(source.path),
                do="export the bundle again, or use a newer ONNX Runtime",
            ) from error
        self.raw = self.session._sess
        self.options = ort.RunOptions()
        self.options.log_severity_level = _SILENT

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBinding:
        return OrtBinding(self, inputs, outputs)  # type: ignore[arg-type]

    def close(self) -> None:
        self.session = self.raw = None


class OrtBackend(Backend):
    """`threads` 0 means those that this process has, else one per physical core.

    `prepack` trades memory for speed: ONNX Runtime copies matrices into its own layout (faster),
    or reads them mapped from the file (smaller, loads at once). Raises UsageError for a number of
    threads that cannot be, Incompatible for one that this process cannot have any more.
    """

    name = "onnxruntime"

    def __init__(self, *, threads: int = 0, prepack: bool = True) -> None:
        if not 0 <= threads <= MAX_THREADS:
            raise UsageError(
                f"threads = {threads} is not possible",
                do=f"use 0 (one per physical core) to {MAX_THREADS}",
            )
        self._ort = ort = _onnxruntime()
        pool = _Pool.join(ort, threads)
        self._options = options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.use_per_session_threads = pool is None
        # Plans of activation memory per input shape: they save no time here, and cost 12 MB.
        options.enable_mem_pattern = False
        if pool is None:
            pool = options.intra_op_num_threads = threads or default_threads()
            options.inter_op_num_threads = 1
        self.threads = pool
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        counted = f"{pool} thread{'s' * (pool > 1)}" if pool else "the application's threads"
        self.placement = f"onnxruntime {ort.__version__} · CPU · {counted}"

    def load(self, source: GraphSource) -> OrtGraph:
        return OrtGraph(self._ort, source, self._options)

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> OrtBuffer:
        return OrtBuffer(host_zeros(dtype, shape))

    def close(self) -> None:
        """Nothing is held: the pool stays with the process, graphs and buffers with their users."""
