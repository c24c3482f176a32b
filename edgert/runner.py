"""The program over its states: which graph runs when, with what bound to it.

    Runner     a loaded variant: graphs and backend, shared by all sessions of a model
    Execution  one set of states (one session, or a batch of them) and the program over it
    StepIO     the buffers and the binding of one step shape, made once and reused
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Backend, Binding, Buffer, GraphSource, LoadedGraph
from edgert.bundle import Bundle
from edgert.errors import EdgertError, Incompatible, Poisoned
from edgert.spec import GraphSpec
from edgert.state import States, bucket, resolve

PREFILL_CHUNK = 512
"""Tokens fed at once: bounds the attention scores, and how late a cancel is heard."""

SCORE_CHUNK = 64
"""Positions scored at once: their logits are the largest tensor there is."""

_KEPT_SHAPES = 4


@dataclass
class StepIO:
    """One step shape [batch, tokens] -> [batch, select]. The arrays are the bound memory itself.

    ids int64 [B, T] and select int64 [B, S] (positions within this step) are written before
    `run`; token int64 [B, S] (argmax) and logits float32 [B, S, V] are read after it.
    """

    execution: Execution
    binding: Binding
    ids: NDArray[np.int64]
    select: NDArray[np.int64]
    token: NDArray[np.int64]
    logits: NDArray[np.float32]

    def run(self) -> None:
        """Feed `ids` behind what the states hold, and advance the counters."""
        self.execution.run(self.binding, self.ids.shape[1])


class Runner:
    """One variant of a bundle, loaded. Close it, or use it as a context manager."""

    def __init__(self, bundle: Bundle, variant: str, backend: Backend) -> None:
        manifest = bundle.manifest
        if manifest.program.body or manifest.program.prologue:
            raise Incompatible(
                "this bundle's program has a loop, which this version of edgert does not run",
                where=str(bundle.root),
                do="install a newer edgert",
            )
        self.manifest = manifest
        self.root = bundle.root
        self.variant_name = variant
        self.variant = manifest.variants[variant]
        self.backend = backend
        self.spec: GraphSpec = self.variant.graphs[manifest.program.epilogue]
        self.graph: LoadedGraph = backend.load(
            GraphSource(
                name=manifest.program.epilogue,
                path=bundle.root / self.spec.file,
                inputs=tuple(self.spec.inputs),
                outputs=tuple(self.spec.outputs),
            )
        )

    def open(self, *, batch: int = 1, tokens: int = 1) -> Execution:
        """Fresh states for `batch` sequences with room for `tokens` each.

        Raises CapacityExceeded beyond the model's context, OutOfMemory beyond the machine's.
        """
        capacity = bucket(tokens, self.manifest.context)
        states = States(
            self.manifest.states, self.backend, batch=batch, capacity=capacity, root=self.root
        )
        return Execution(self, states)

    def close(self) -> None:
        self.graph.close()
        self.backend.close()


class Execution:
    """The program over one set of states. Used by one thread at a time."""

    def __init__(self, runner: Runner, states: States) -> None:
        self.runner = runner
        self.states = states
        self.graph_ns = 0  # time inside the graph calls so far
        self._shapes: OrderedDict[tuple[int, int], StepIO] = OrderedDict()
        self._failed = False

    @property
    def lens(self) -> NDArray[np.int64]:
        """Tokens in the state, per row: the counter itself, writable (lower it to rewind)."""
        return next(iter(self.states.counters.values()))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row, growing into the next capacity where needed."""
        if tokens > self.states.capacity:
            self.states.grow(bucket(tokens, self.runner.manifest.context))
            self._shapes.clear()

    def io(self, tokens: int = 1, select: int = 1) -> StepIO:
        """The buffers of one step shape; kept for the next step of the same shape."""
        key = (tokens, select)
        io = self._shapes.get(key)
        if io is None:
            io = self._shapes[key] = self._bind(tokens, select)
            if len(self._shapes) > _KEPT_SHAPES:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        return io

    def _bind(self, tokens: int, select: int) -> StepIO:
        manifest, spec = self.runner.manifest, self.runner.spec
        axes = {"batch": self.states.batch, "tokens": tokens, "select": select}
        allocate = self.runner.backend.allocate
        ends: dict[str, Buffer] = {
            f"state.{name}": buffer for name, buffer in self.states.buffers.items()
        }
        for kind, tensors in (("input", manifest.inputs), ("result", manifest.results)):
            for name, tensor in tensors.items():
                ends[f"{kind}.{name}"] = allocate(tensor.dtype, resolve(tensor.shape, axes))
        binding = self.runner.graph.bind(
            {name: ends[end] for name, end in spec.inputs.items()},
            {name: ends[end] for name, end in spec.outputs.items()},
        )
        arrays = {
            name: ends[end].host
            for name, end in (
                ("ids", "input.ids"),
                ("select", "input.select"),
                ("token", "result.token"),
                ("logits", "result.logits"),
            )
        }
        return StepIO(self, binding, **arrays)  # type: ignore[arg-type]

    def run(self, binding: Binding, tokens: int) -> None:
        lens = self.lens
        if self._failed:
            raise Poisoned(
                "an earlier step of this session failed, so its state cannot be trusted",
                do="open a new session",
            )
        if int(lens.max()) + tokens > self.states.capacity:
            raise EdgertError(
                f"a step of {tokens} tokens behind {lens.max()} exceeds the state's capacity of "
                f"{self.states.capacity}",
                do="call reserve() first",
            )
        self._failed = True  # until the step has ended well
        start = time.perf_counter_ns()
        binding.run()
        self.graph_ns += time.perf_counter_ns() - start
        lens += tokens
        self._failed = False

    def feed(self, ids: NDArray[np.int64], *, chunk: int = PREFILL_CHUNK) -> Iterator[StepIO]:
        """Prefill: ids [T] behind the state of a single row, a chunk at a time.

        Yields after every chunk; `token[0, 0]` and `logits[0, 0]` are of its last position.
        """
        self.reserve(int(self.lens[0]) + len(ids))
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            io = self.io(len(part))
            io.ids[0] = part
            io.select[0, 0] = len(part) - 1
            io.run()
            yield io

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids [T] behind the state of a single row -> logits [T, V] of every position."""
        out = np.empty((len(ids), self.runner.manifest.vocab_size), np.float32)
        self.reserve(int(self.lens[0]) + len(ids))
        for start in range(0, len(ids), SCORE_CHUNK):
            part = ids[start : start + SCORE_CHUNK]
            io = self.io(len(part), len(part))
            io.ids[0] = part
            io.select[0] = np.arange(len(part))
            io.run()
            out[start : start + len(part)] = io.logits[0]
        return out

    def row(self, index: int) -> Execution:
        """One row as an execution of its own over the same memory: how a batch is prefilled.

        Growing is refused on it, since the row would part from its batch; reserve before.
        """
        return Execution(self.runner, self.states.row(index))

    def reset(self) -> None:
        """Forget everything: the counters return to zero, stale rows are never read."""
        self.lens[:] = 0
