"""The program over its states: which graph runs when, with what bound to it.

Runner     a loaded variant: graphs and backend, shared by all sessions of a model
Execution  one set of states (one session, or a batch of them) and the program over it
StepIO     the buffers and the binding of one step shape, made once and reused
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.backends.base import Backend, GraphSource, LoadedGraph
from edgert.bundle import Bundle
from edgert.errors import EdgertError, Poisoned, UsageError
from edgert.exits import TRAINED, Exit, parse_exit
from edgert.halting import MOST, SIGNAL, Halt
from edgert.looping import BoundStep, buffers
from edgert.programs import check_program, solves_puzzles
from edgert.spec import endpoints
from edgert.state import States, bucket

PREFILL_CHUNK = 256
"""Tokens fed at once: bounds the attention scores, and how late a cancel is heard."""

SCORE_CHUNK = 64
"""Positions scored at once: their logits are the largest tensor there is."""

_KEPT_SHAPES = 6  # one token, the widths of `speculate`, and one for what a prompt leaves


@dataclass
class StepIO:
    """One step shape [batch, tokens] -> [batch, select]. The arrays are the bound memory itself.

    ids int64 [B, T] and select int64 [B, S] (positions within this step) are written before
    `run`; token int64 [B, S] (argmax) and logits float32 [B, S, V] are read after it, as is
    `iterations` int64 [B]: what the loop took (1 where there is none, or one that is unrolled).
    `place` is the selected position whose results are those of the newest token in the state.
    """

    execution: Execution
    bound: BoundStep
    ids: NDArray[np.int64]
    select: NDArray[np.int64]
    token: NDArray[np.int64]
    logits: NDArray[np.float32]
    iterations: NDArray[np.int64]
    place: int = 0

    def run(self, halt: Halt | None = None) -> None:
        """Feed `ids` behind what the states hold, and advance the counters.

        halt  ends the loop of each row early; for steps of one token
        Raises Poisoned if an earlier step failed, UsageError if the model is closed or cannot
        halt like that; then, and beyond the capacity, nothing has changed.
        """
        self.execution.run(self, halt)


class Runner:
    """One variant of a bundle, loaded. Raises UnsupportedModel if it is for no loop of ours."""

    def __init__(self, bundle: Bundle, variant: str, backend: Backend) -> None:
        manifest = bundle.manifest
        check_program(manifest, str(bundle.root))
        self.closed = False
        self.manifest = manifest
        self.root = bundle.root
        self.variant_name = variant
        self.variant = manifest.variants[variant]
        self.states = manifest.states_of(variant)
        self.backend = backend
        self.parts = {
            part: self.variant.graphs[name]
            for part, name in manifest.parts(variant).items()
            if name is not None
        }
        self.loop = manifest.program.loop if "body" in self.parts else None
        self.graphs: dict[str, LoadedGraph] = {}
        backend.expect(len(self.parts), manifest.bytes_of(variant))
        backend.check_states({state.dtype for state in self.states.values()})
        for part, spec in self.parts.items():
            self.graphs[part] = backend.load(
                GraphSource(
                    name=str(getattr(manifest.program, part)),
                    path=bundle.root / spec.file,
                    inputs=tuple(spec.inputs),
                    outputs=tuple(spec.outputs),
                    bundle=str(bundle.root),
                    variant=variant,
                    variant_id=self.variant.variant_id,
                    sha256=manifest.hashes_of(spec),
                )
            )

    @property
    def can_halt(self) -> bool:
        """Whether a token's loop may end early."""
        return self.loop is not None and self.loop.fill == "copy" and SIGNAL in self.loop.signals

    def exit(self, policy: str | None) -> Exit:
        """The halting policy of a model that solves; None: as it was trained, else all iterations.

        Raises UsageError.
        """
        loop = self.loop
        assert loop is not None, "of a model that solves, and not unrolled"
        wires = self.parts["body"].inputs.values()
        counted = any(end.startswith("loop.") for wire in wires for end in endpoints(wire))
        if policy is None:
            policy = TRAINED if loop.halt is not None else "full"
        return parse_exit(policy, loop, loop.iterations if counted else MOST)

    def check_halt(self, halt: Halt) -> None:
        """Raise UsageError if tokens cannot halt like that."""
        if halt.is_full:
            return
        if not self.can_halt or self.loop is None:
            raise UsageError(
                f"variant {self.variant_name} of this bundle cannot halt early: it has no loop to "
                "end",
                do="leave --halt out, or use the stepped variant of a looped model",
            )
        halt.check(self.loop.iterations)

    def can_speculate(self, halt: Halt | None = None) -> bool:
        """Whether a step may read guesses: each token's loop at full depth, and states that go
        back to where the guesses were right."""
        full = halt is None or halt.is_full
        return full and all(spec.keeps_history for spec in self.manifest.states.values())

    def check_speculation(self, halt: Halt | None) -> None:
        """Raise UsageError if no step may read guesses."""
        if self.can_speculate(halt):
            return
        why = (
            "a loop that ends early takes one token at a time"
            if self.can_speculate()
            else "a state of this model is replaced by each step, so it cannot go back"
        )
        raise UsageError(
            f"guesses cannot be checked: {why}", do="leave --speculate at auto, or off"
        )

    def open(self, *, batch: int = 1, tokens: int = 1) -> Execution:
        """Fresh states for `batch` sequences with room for `tokens` each.

        Raises CapacityExceeded beyond the model's context, OutOfMemory beyond the machine's,
        UsageError if the model is closed.
        """
        self.check_open()
        if self.manifest.solves:
            raise solves_puzzles(str(self.root))
        capacity = bucket(tokens, self.manifest.context)
        states = States(self.states, self.backend, batch=batch, capacity=capacity, root=self.root)
        return Execution(self, states)

    def check_open(self) -> None:
        if self.closed:
            raise UsageError("the model is closed", do="load it again, or close it later")

    def close(self) -> None:
        """Let go of the graphs; a step that is running in another thread still ends well."""
        self.closed = True
        for graph in self.graphs.values():
            graph.close()
        self.backend.close()


class Execution:
    """The program over one set of states. Used by one thread at a time."""

    def __init__(self, runner: Runner, states: States) -> None:
        self.runner = runner
        self.states = states
        self.graph_ns = 0  # time inside the graph calls so far
        self._shapes: OrderedDict[tuple[int, int], StepIO] = OrderedDict()
        self._failed = False
        self._last: tuple[StepIO, int] | None = None  # the newest step, and the length it led to

    @property
    def lens(self) -> NDArray[np.int64]:
        """Tokens in the state, per row: the counter itself, writable (lower it to rewind)."""
        return next(iter(self.states.counters.values()))

    @property
    def last(self) -> StepIO | None:
        """The newest step while its results are those of the newest token, else None."""
        if self._last is None or self._last[1] != int(self.lens.max()):
            return None
        return self._last[0]

    def check(self) -> None:
        """Raise what the next step would raise: UsageError (closed) or Poisoned."""
        self.runner.check_open()
        if self._failed:
            raise Poisoned(
                "an earlier step of this session failed, so its state cannot be trusted",
                do="open a new session",
            )

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row, growing into the next capacity where needed."""
        if tokens > self.states.capacity:
            self.resize(tokens)

    def resize(self, tokens: int) -> None:
        """Move into the smallest capacity for `tokens` per row: a larger or a smaller one."""
        capacity = bucket(tokens, self.runner.manifest.context)
        if capacity != self.states.capacity:
            self.states.resize(capacity)
            self._shapes.clear()

    def restore(
        self,
        states: Mapping[str, NDArray[np.generic]],
        pending: tuple[NDArray[np.float32], int] | None,
    ) -> None:
        """Take over what another execution of the same variant had: its states, and the results
        of the newest token (logits [V], argmax) where they were still unread.

        Raises ValueError if they are not for this program.
        """
        vocab = self.runner.manifest.vocab_size
        if pending is not None and (pending[0].shape != (vocab,) or pending[1] >= vocab):
            raise ValueError(f"pending logits of shape {pending[0].shape}, token {pending[1]}")
        self.states.restore(states)
        self._last = None
        if pending is not None:
            io = self.io()
            io.logits[0, 0], io.token[0, 0] = pending
            self._last = (io, int(self.lens[0]))

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
        manifest, runner = self.runner.manifest, self.runner
        axes = {"batch": self.states.batch, "tokens": tokens, "select": select}
        ends = {f"state.{name}": buffer for name, buffer in self.states.buffers.items()}
        for kind, tensors in (("input", manifest.inputs), ("result", manifest.results)):
            found = buffers(runner.backend, tensors, axes)
            ends |= {f"{kind}.{name}": buffer for name, buffer in found.items()}
        names = ("input.ids", "input.select", "result.token", "result.logits")
        ids, select_, token, logits = (ends[name].host for name in names)
        iterations = np.ones(self.states.batch, np.int64)
        bound = BoundStep(runner, self.states, ends, axes)
        return StepIO(self, bound, ids, select_, token, logits, iterations)  # type: ignore[arg-type]

    def run(self, io: StepIO, halt: Halt | None = None) -> None:
        self.check()
        lens, tokens = self.lens, io.ids.shape[1]
        filled = lens.tolist()  # a few rows: quicker than numpy's own min and max
        end = max(filled) + tokens
        if min(filled) < 0 or end > self.states.capacity:
            raise EdgertError(
                f"a step of {tokens} tokens behind {filled} does not fit the state's capacity of "
                f"{self.states.capacity}",
                do="call reserve() first",
            )
        if halt is not None:
            self.runner.check_halt(halt)
            if tokens != 1:
                raise UsageError("a loop ends early in steps of one token only")
        self._failed = True  # until the step has ended well
        self.graph_ns += io.bound.run(halt, filled, io.iterations)
        lens += tokens
        self._last = (io, end)
        self._failed = False

    def step(self, token: int, halt: Halt | None = None) -> StepIO:
        """Decode: one token behind the state of a single row, growing it where needed."""
        self.reserve(int(self.lens[0]) + 1)
        io = self.io()
        io.ids[0, 0] = token
        io.select[0, 0] = 0
        io.run(halt)
        return io

    def verify(self, ids: Sequence[int], place: int = 0) -> StepIO:
        """A token behind the state of a single row, and guesses at what follows it, in one step.

        ids    the token, then the guesses
        place  how many of the guesses are known to be right: the state holds as many tokens more
        The step has results behind every one of them. What the guesses left in states that keep
        history is behind their counter: `take` reaches it, and anything else overwrites it.
        """
        start = int(self.lens[0])
        self.reserve(start + len(ids))
        io = self.io(len(ids), len(ids))
        io.ids[0] = ids
        io.select[0] = np.arange(len(ids))
        io.run()
        self._go_to(io, place, start + place + 1)
        return io

    def take(self, token: int) -> StepIO | None:
        """`step` without a step, if the newest one has read this token already, as a guess."""
        io = self.guessed(token)
        if io is not None:
            self._go_to(io, io.place + 1, int(self.lens[0]) + 1)
        return io

    def guessed(self, token: int) -> StepIO | None:
        """The newest step, if it was a `verify` whose next guess is this token, else None."""
        if self._last is None or self._last[0].select.shape[1] == 1:
            return None
        io = self.last
        if io is None or io.place + 1 == io.ids.shape[1] or io.ids[0, io.place + 1] != token:
            return None
        end = int(self.lens[0]) - io.place - 1 + io.ids.shape[1]
        return io if end <= self.states.capacity else None  # its rows may have been trimmed away

    def _go_to(self, io: StepIO, place: int, length: int) -> None:
        """The state is as it was when it held `length` tokens, and the results are those then."""
        io.place = place
        self.lens[0] = length
        self._last = (io, length)

    def feed(self, ids: NDArray[np.int64], *, chunk: int = PREFILL_CHUNK) -> Iterator[StepIO]:
        """Prefill: ids [T] behind the state of a single row, a chunk at a time.

        Yields after every chunk; `token[0, 0]` and `logits[0, 0]` are of its last position.
        """
        assert self.states.batch == 1, "a batch is prefilled row by row"
        self.reserve(int(self.lens[0]) + len(ids))
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            io = self.io(len(part))
            io.ids[0] = part
            io.select[0, 0] = len(part) - 1
            io.run()
            yield io

    def score(self, ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """ids [T] behind the state of a single row -> the logits of every position, out [T, V]."""
        assert self.states.batch == 1, "a batch is scored row by row"
        self.reserve(int(self.lens[0]) + len(ids))
        for start in range(0, len(ids), SCORE_CHUNK):
            part = ids[start : start + SCORE_CHUNK]
            io = self.io(len(part), len(part))
            io.ids[0] = part
            io.select[0] = np.arange(len(part))
            io.run()
            out[start : start + len(part)] = io.logits[0]

    def row(self, index: int) -> Execution:
        """One row as an execution of its own over the same memory: how a batch is prefilled.

        Growing is refused on it, since the row would part from its batch: reserve before, and
        take the row after. Growing the batch leaves the row behind.
        """
        return Execution(self.runner, self.states.row(index))

    def reset(self) -> None:
        """Forget everything: the states start over."""
        self.states.reset()
        self._last = None

    def close(self) -> None:
        """Let go of the states and all that is bound to them."""
        self._shapes.clear()
        self._last = None
        self.states.close()
