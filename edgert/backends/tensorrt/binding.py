"""An engine over its buffers: addresses set once, and launches that are captured.

A state that an engine reads and writes has two sides, so a binding has a context for either turn,
and the turn changes behind every run. Each context is run once as it is; the second time its
launches are captured in a CUDA graph, which is launched from then on. What is captured holds
addresses and shapes; these never change in a binding, but for the scratch memory's, and then it is
captured anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgert.backends.base import Binding
from edgert.backends.tensorrt.buffers import DeviceBuffer, Foreign
from edgert.backends.tensorrt.device import Device, Memory, Rank
from edgert.backends.tensorrt.engine import Engine, execute, give_scratch, new_context, within
from edgert.backends.tensorrt.rectangles import part
from edgert.errors import DeviceFailed, Incompatible, UsageError

Sides = tuple[int, ...]
Copy = Callable[[], None]


@dataclass
class Ready:
    """A context, with all it needs: what is copied in before it, and back behind it."""

    context: Any
    before: list[Copy]
    after: list[Copy]
    owned: int
    generation: int = 0
    runs: int = 0
    captured: int | None = None
    captured_owned: int = 0


@dataclass
class Launches:
    """What a binding has captured, and whether that works at all: some engines wait for the host in
    the middle, and cannot be captured."""

    possible: bool = True
    why: str = ""
    ready: dict[Sides, Ready] = field(default_factory=dict)


class EngineBinding(Binding):
    """Raises Incompatible if the engine does not take buffers like these, OutOfMemory."""

    def __init__(
        self,
        trt: Any,
        device: Device,
        holder: list[Engine],
        inputs: Mapping[str, DeviceBuffer],
        outputs: Mapping[str, DeviceBuffer],
        hint: str,
    ) -> None:
        """holder: of the engine, which its graph lets go of when it is closed"""
        self._trt, self._device, self._holder = trt, device, holder
        engine = holder[0]
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        _check_ports(engine, inputs, outputs)
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        profile = engine.profile_for(shapes)
        if profile is None:
            raise _no_profile(engine, shapes, hint)
        self._profile = profile
        self._shapes = shapes | {name: buffer.shape for name, buffer in outputs.items()}
        self._private: dict[str, Memory] = {}  # where rows lie that are not where an engine wants
        self._turning = self._double()
        storages = {id(b.storage): b.storage for b in (*inputs.values(), *outputs.values())}
        self._storages = tuple(storages.values())
        self._streams = {
            storage.stream
            for storage in self._storages
            if isinstance(storage, Foreign) and storage.stream is not None
        }
        self.launches = Launches()
        self.closed = False

    @property
    def _engine(self) -> Engine:
        return self._holder[0]

    def _double(self) -> list[Any]:
        """Storages that take turns: those of outputs that are, as a whole, inputs as well."""
        turning: dict[int, Any] = {}
        reads = {id(buffer.storage): buffer for buffer in self._inputs.values()}
        for name, buffer in self._outputs.items():
            read, alias = reads.get(id(buffer.storage)), self._engine.ports[name].alias
            if alias is not None:
                same = self._inputs[alias]
                if same.storage is not buffer.storage or same.offset != buffer.offset:
                    raise Incompatible(
                        f"the engine of graph {self._engine.name!r} writes {name} over {alias}, "
                        "and the manifest keeps them apart",
                        do="export the bundle again",
                    )
                if not buffer.is_aligned:
                    self._stand_in(alias, same)
                    self._private[name] = self._private[alias]
            elif read is not None and buffer.whole:
                buffer.storage.double()
                turning[id(buffer.storage)] = buffer.storage
            elif read is not None or not buffer.is_aligned:
                self._stand_in(name, buffer)
        for name, buffer in self._inputs.items():
            if not buffer.is_aligned and name not in self._private:
                self._stand_in(name, buffer)
        return list(turning.values())

    def _stand_in(self, name: str, buffer: DeviceBuffer) -> None:
        self._private[name] = Memory(self._device, buffer.nbytes)

    def run(self) -> None:
        with self._device.use():
            if self.closed:
                raise UsageError("the model is closed", do="load it again, or close it later")
            sides = tuple(storage.turn for storage in self._storages)
            ready = self.launches.ready.get(sides)
            if ready is None:
                ready = self.launches.ready[sides] = self._make()
            self._scratch(ready)
            for stream in self._streams:
                self._device.cuda.follow(self._device.stream, stream)
            if ready.captured is None and ready.runs and self.launches.possible:
                self._capture(ready)
            if ready.captured is not None:
                self._device.cuda.launch(ready.captured, self._device.stream)
            else:
                self._enqueue(ready)
            ready.runs += 1
            for storage in self._turning:
                storage.turn ^= 1

    def _make(self) -> Ready:
        """A context for the sides as they are now."""
        addresses, before, after = {}, [], []
        for name, buffer in self._inputs.items():
            memory = self._private.get(name)
            addresses[name] = buffer.address if memory is None else memory.address
            if memory is not None:
                before.append(self._copy(memory.address, buffer.address, buffer))
        for name, buffer in self._outputs.items():
            memory = self._private.get(name)
            turns = any(storage is buffer.storage for storage in self._turning)
            alias = self._engine.ports[name].alias
            if memory is not None:
                addresses[name] = memory.address
                after.append(self._copy(buffer.address, memory.address, buffer))
            elif turns and alias is None:
                addresses[name] = buffer.storage.other + buffer.offset
            else:
                addresses[name] = buffer.address
        where = self._profile, self._shapes, addresses, self._device.stream
        holder = [new_context(self._trt, self._engine, *where)]
        owned = self._device.own(Rank.CONTEXT, holder.clear)
        weakref.finalize(self, self._device.discard, owned).atexit = False
        return Ready(holder, before, after, owned)

    def _copy(self, to: int, source: int, buffer: DeviceBuffer) -> Copy:
        device, size = self._device, buffer.dtype.itemsize
        dense = part(buffer.shape, size)
        return lambda: device.copy(to, dense, source, dense, size)

    def _scratch(self, ready: Ready) -> None:
        """Hand out the memory to compute in; where it has moved, nothing captured holds."""
        scratch = self._device.scratch
        address = scratch.reserve()
        if ready.generation != scratch.generation:
            give_scratch(ready.context[0], address, scratch.nbytes)
            ready.generation = scratch.generation
            if ready.captured is not None:
                self._device.discard(ready.captured_owned)
                ready.captured, ready.runs = None, 0

    def _enqueue(self, ready: Ready) -> None:
        for copy in ready.before:
            copy()
        execute(self._trt, self._engine, ready.context[0], self._device.stream)
        for copy in ready.after:
            copy()

    def _capture(self, ready: Ready) -> None:
        cuda, stream = self._device.cuda, self._device.stream
        self._device.sweep()
        failure: DeviceFailed | None = None
        self._device.capturing = True
        try:
            cuda.begin_capture(stream)
            try:
                self._enqueue(ready)
            except DeviceFailed as error:
                failure = error
            # Also behind a failure: the stream must be as it was.
            captured = cuda.end_capture(stream)
        except DeviceFailed as error:
            self.launches.possible, self.launches.why = False, (failure or error).where or ""
            return
        finally:
            self._device.capturing = False
        owned = self._device.own(Rank.CAPTURED, lambda: cuda.end_captured(captured))
        if failure is not None:
            self._device.discard(owned)
            self.launches.possible, self.launches.why = False, failure.where or ""
            return
        ready.captured, ready.captured_owned = captured, owned
        weakref.finalize(self, self._device.discard, ready.captured_owned).atexit = False

    def close(self) -> None:
        """No further run; what it has is let go with the next sweep."""
        self.closed = True
        for ready in self.launches.ready.values():
            if ready.captured is not None:
                self._device.discard(ready.captured_owned)
            self._device.discard(ready.owned)
        self.launches.ready.clear()


def _check_ports(
    engine: Engine, inputs: Mapping[str, DeviceBuffer], outputs: Mapping[str, DeviceBuffer]
) -> None:
    given = {name: (b.dtype.name, True) for name, b in inputs.items()}
    given |= {name: (b.dtype.name, False) for name, b in outputs.items()}
    wanted = {name: (port.dtype, port.is_input) for name, port in engine.ports.items()}
    wrong = sorted(n for n in given.keys() | wanted.keys() if given.get(n) != wanted.get(n))
    if wrong:
        raise Incompatible(
            f"the engine of graph {engine.name!r} and its manifest differ: {', '.join(wrong)}",
            do="build it again:  edgert build --rebuild",
        )


def _no_profile(engine: Engine, shapes: Mapping[str, tuple[int, ...]], hint: str) -> Incompatible:
    """Name an input that no shape profile takes, or one that some profile does not."""
    lines = []
    for at, profile in enumerate(engine.profiles):
        for name, limits in profile.items():
            if not within(shapes[name], limits):
                sizes = ("x".join(map(str, s)) for s in (shapes[name], limits[0], limits[2]))
                lines.append("shape profile {}: {} is {}, of {} to {}".format(at, name, *sizes))
                break
    return Incompatible(
        f"no shape profile of the engine of graph {engine.name!r} takes this step",
        where="\n    ".join(lines),
        do=hint,
    )
