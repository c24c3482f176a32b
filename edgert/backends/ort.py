"""ONNX Runtime: weights mapped from the bundle, buffers bound once.

On the CPU, or by its provider for CUDA. ONNX Runtime falls back to the CPU without a word: here
what was asked for is used, or an error says that it is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edgert import kernels
from edgert.backends.base import (
    Backend,
    Binding,
    Buffer,
    GraphSource,
    HostBuffer,
    LoadedGraph,
    host_array,
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
from edgert.machine import instruction_set, physical_cores

MINIMUM = (1, 23)
INT8_STATES = (1, 27)
"""The first version whose attention reads keys and values in int8 on a CPU; 1.25 and 1.26 load such
a graph, and fail in a step."""
MAX_THREADS = 1024
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_SILENT = 4  # errors reach the user as exceptions, not as the library's log lines


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "onnxruntime", "cpu", why="it runs the graphs of a bundle on the CPU"
        ) from error
    if _version(onnxruntime) < MINIMUM:
        raise MissingDependency(
            f"onnxruntime {MINIMUM[0]}.{MINIMUM[1]} or newer",
            "cpu",
            why=f"{onnxruntime.__version__} is too old for the graphs of a bundle",
        )
    onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


def _version(ort: Any) -> tuple[int, ...]:
    """Its first two numbers; empty where it has none."""
    found = re.match(r"(\d+)\.(\d+)", ort.__version__)
    return tuple(map(int, found.groups())) if found else ()


SMALL = 8 << 20
"""Bytes of a model that one core runs as fast as several: below, what a step computes takes no
longer than waking and joining threads, and a neighbour that takes their core away costs more."""


def default_threads(nbytes: int = SMALL) -> int:
    """Physical cores this process may use; for a model of fewer than `SMALL` bytes, one."""
    return 1 if nbytes < SMALL else physical_cores()


class OrtBuffer(HostBuffer):
    """Host memory and ONNX Runtime's handle on it; the array lives as long as the handle."""

    @cached_property
    def value(self) -> Any:
        """Made when a graph is bound: a row that is only copied needs none, and it takes as long
        as a small graph."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(self._array)


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
    def __init__(
        self,
        ort: Any,
        source: GraphSource,
        options: Any,
        provider: str = PROVIDERS["cpu"],
        model: bytes | None = None,
    ) -> None:
        """model  the bytes to load in place of the file, beside which their data files are"""
        self.name = source.name
        self.where = str(source.path)
        try:
            self.session = ort.InferenceSession(
                str(source.path) if model is None else model,
                options,
                providers=[provider],
                enable_fallback=0,  # it would try again, and print about it on stdout
            )
        except Exception as error:
            if provider != PROVIDERS["cpu"]:
                raise _not_used(ort, provider, source, str(error)) from error
            raise BadBundle(
                f"ONNX Runtime {ort.__version__} refuses graph {source.name!r}: {error}",
                where=str(source.path),
                do="export the bundle again, or use a newer ONNX Runtime",
            ) from error
        # What it really uses; what it lists as available is only compiled in.
        if self.session.get_providers()[:1] != [provider]:
            found = ", ".join(self.session.get_providers())
            raise _not_used(ort, provider, source, f"the session has {found}")
        self.raw = self.session._sess
        self.options = ort.RunOptions()
        self.options.log_severity_level = _SILENT

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtBinding:
        return OrtBinding(self, inputs, outputs)  # type: ignore[arg-type]

    def close(self) -> None:
        self.session = self.raw = None


def _not_used(ort: Any, provider: str, source: GraphSource, why: str) -> Incompatible:
    return Incompatible(
        f"ONNX Runtime {ort.__version__} does not run graph {source.name!r} by {provider}",
        where=why,
        do="edgert doctor says what is there; --device cpu runs without a GPU",
    )


class OrtBackend(Backend):
    """`threads` 0 means one per physical core (one in all for a model below `SMALL`), or the pool
    that the application has made for all its ONNX Runtime sessions. edgert makes no such pool
    itself: from then on ONNX Runtime would refuse every session of the application that does not
    ask for it.

    `prepack` trades memory for speed: ONNX Runtime copies matrices into its own layout (faster),
    or reads them mapped from the file (smaller, loads at once). Raises UsageError for a number of
    threads that cannot be.
    """

    name = "onnxruntime"

    def __init__(self, *, threads: int = 0, prepack: bool = True, device: str = "cpu") -> None:
        if not 0 <= threads <= MAX_THREADS:
            raise UsageError(
                f"threads = {threads} is not possible",
                do=f"use 0 (edgert chooses) to {MAX_THREADS}",
            )
        self._ort = ort = _onnxruntime()
        self._device, self._provider = device, PROVIDERS[device]
        if self._provider not in ort.get_available_providers():
            raise Incompatible(
                f"ONNX Runtime {ort.__version__} is installed without {self._provider}",
                do="install one with it: pip install 'edgert[gpu]' in an environment of its own; "
                "on a Jetson there is none, use --device tensorrt",
            )
        self._threads = threads
        self._options = options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.inter_op_num_threads = 1
        self.build = {
            "backend": f"{self.name} {ort.__version__}",
            "machine": instruction_set(),
            "prepack": str(prepack).lower(),
            "kernels": "onnxruntime",
        }
        if device != "cpu":
            self.build["device"] = device
            # A node that the provider leaves to the CPU is an error, not a slow surprise.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Its operators are of the CPU.
        self._native = kernels.library() if device == "cpu" else None
        self._products = self._native is not None and kernels.multiplies(self._native)
        self._registered = False
        self._use(threads or default_threads())
        # Plans of activation memory per input shape: they save no time here, and cost 12 MB.
        options.enable_mem_pattern = False
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")

    def expect(self, graphs: int, nbytes: int) -> None:
        """Each graph has a pool of threads. Those of the graphs that do not run must not spin on
        the cores of the one that does."""
        if not self._threads:
            self._use(default_threads(nbytes))
        if graphs > 1:
            self._options.add_session_config_entry("session.force_spinning_stop", "1")

    def check_states(self, dtypes: Collection[str]) -> None:
        if "int8" in dtypes and _version(self._ort) < INT8_STATES:
            raise Incompatible(
                f"keys and values in int8 need ONNX Runtime {'.'.join(map(str, INT8_STATES))}, "
                f"this is {self._ort.__version__}",
                do="pip install --upgrade onnxruntime, or choose a variant with --kv fp32",
            )

    def load(self, source: GraphSource) -> OrtGraph:
        """Raises BadBundle if ONNX Runtime refuses the graph, Incompatible if a number of threads
        was asked for and the application has one pool for all."""
        try:
            return self._graph(source)
        except BadBundle as error:
            if "using a global thread pool" not in error.what:
                raise
        if self._threads:
            raise Incompatible(
                f"{self._threads} threads are asked for, and this process runs ONNX Runtime on one "
                "pool of threads for all",
                do="leave threads at 0 to share that pool, or use another process",
            )
        self._options.use_per_session_threads = False
        self._say("the application's", "the application's threads")
        return self._graph(source)

    def _graph(self, source: GraphSource) -> OrtGraph:
        if self._native is not None:
            graph = self._with_native(source, self._native)
            if graph is not None:
                return graph
        return OrtGraph(self._ort, source, self._options, self._provider)

    def _with_native(self, source: GraphSource, library: Path) -> OrtGraph | None:
        """The graph with edgert's own kernels; None if it has no place for them, or is of a kind
        that they are not for (such as float16), or the library does not load here."""
        try:
            model = kernels.substituted(source.path, products=self._products)
        except BadBundle:
            return None  # ONNX Runtime says what it makes of it
        if model is None:
            return None
        if not self._registered:
            try:
                self._options.register_custom_ops_library(str(library))
            except Exception:  # compiled for another processor or system
                self._native = None
                return None
            self._registered = True
        self._options.add_session_config_entry(DATA_FOLDER, str(source.path.parent))
        try:
            graph = OrtGraph(self._ort, source, self._options, self._provider, model)
        except BadBundle as error:
            if "using a global thread pool" in error.what:
                raise
            return None
        ours = f"edgert {kernels.REVISION}"
        if self.build["kernels"] != ours:
            self.build["kernels"] = ours
            self.placement += " · native kernels"
        return graph

    def _use(self, threads: int) -> None:
        self._options.intra_op_num_threads = threads
        self._say(str(threads), f"{threads} thread{'s' * (threads > 1)}")

    def _say(self, threads: str, words: str) -> None:
        self.build["threads"] = threads
        self.placement = f"onnxruntime {self._ort.__version__} · {self._device.upper()} · {words}"

    def allocate(self, dtype: str, shape: tuple[int, ...], *, shared: bool = False) -> OrtBuffer:
        return OrtBuffer(host_zeros(dtype, shape))

    def borrow(self, value: object, *, writes: bool = False) -> OrtBuffer:
        return OrtBuffer(host_array(value, writes))

    def close(self) -> None:
        """Nothing is held: graphs and buffers stay with their users."""
