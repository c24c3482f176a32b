"""The loop inside the graph: one ONNX file of all parts of a stepped program, for a device.

    prologue -> Loop(body, until every row has ended) -> epilogue

It is put together from the graphs of a stepped variant, node for node, over the same weights file;
nothing is traced anew. What the host does between two iterations is said in ONNX: the halting rule
row by row, rows that ended keeping their carry, keys and values standing in for iterations that a
token skipped. So both forms stop at the same iteration with the same numbers.

Inputs   those of the program and its states, and how it ends: threshold float32 [], least and most
         int64 [], as `limits` gives them
Outputs  results; `steps` int64 [batch], iterations of each row; what went round the loop, by name;
         `<state>.next` of each state

What TensorRT wants of a loop: the condition is given, what goes round keeps its shape (so keys and
values of all iterations are one tensor), the trip limit is a constant, results are carried out and
not scanned. What the host can still do and this form cannot: stop at a deadline, let rows come and
go, run more iterations than the model was trained with.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgert.bundle import Bundle
from edgert.errors import UnsupportedModel
from edgert.exits import Exit
from edgert.export.graft import Graft, port
from edgert.export.loop_rows import places
from edgert.halting import SIGNAL, Halt
from edgert.spec import (
    GraphSpec,
    LoopSpec,
    Manifest,
    StateSpec,
    TensorSpec,
    VariantSpec,
    Wire,
    endpoint_at,
)

FILE = "loop.onnx"
STEPS = "steps"
LIMITS = {
    "threshold": TensorSpec("float32", ()),
    "least": TensorSpec("int64", ()),
    "most": TensorSpec("int64", ()),
}
"""Inputs that say when a row ends: as in `Halt` and `Exit`."""


def limits(policy: Halt | Exit, iterations: int) -> dict[str, NDArray[np.generic]]:
    """A policy as the inputs of the graph, for a loop of so many iterations at most."""
    never = policy.threshold
    if isinstance(policy, Exit) and policy.signal is None:
        never = np.inf  # nothing is above it
    return {
        "threshold": np.array(never, np.float32),
        "least": np.array(policy.least, np.int64),
        "most": np.array(policy.most or iterations, np.int64),
    }


@dataclass(frozen=True)
class LoopForm:
    """The model, without its weights: `data` are the bundle's files that hold them."""

    model: onnx.ModelProto
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    data: tuple[str, ...]
    bundle: Bundle

    def write(self, folder: Path) -> Path:
        """The file with its weights beside it: copies, since onnx reads no file of two names."""
        for file in map(self.bundle.path, self.data):
            shutil.copyfile(file, folder / file.name)
        path = folder / FILE
        path.write_bytes(self.model.SerializeToString())
        return path


def loop_form(bundle: Bundle, variant: str) -> LoopForm:
    """Put the graphs of a stepped variant together.

    Raises UnsupportedModel for a program whose loop has nothing that could end it.
    """
    manifest = bundle.manifest
    spec = manifest.variants[variant]
    manifest = replace(manifest, states=manifest.states_of(variant))
    loop = manifest.program.loop
    if loop is None or not (loop.halt or SIGNAL in loop.signals):
        raise UnsupportedModel(
            f"{manifest.name} has no loop that it could end by itself",
            where=str(bundle.root),
            do="build its graphs as they are, without the loop form",
        )
    return _Composer(bundle, manifest, spec, loop).compose()


class _Composer:
    """Names in the file: ports as users see them, and `<graph>/<name>` for what is inside."""

    def __init__(
        self, bundle: Bundle, manifest: Manifest, variant: VariantSpec, loop: LoopSpec
    ) -> None:
        self.bundle, self.manifest, self.variant, self.loop = bundle, manifest, variant, loop
        self.graft = Graft()
        body = self._part("body")
        assert body is not None
        self.body = body
        read = {wire for wire in body.inputs.values() if isinstance(wire, str)}
        self.around = [
            wire.partition(".")[2]
            for wire in body.outputs.values()
            if isinstance(wire, str) and wire.startswith("value.") and wire in read
        ]
        self.stacked = [n for n, wire in body.outputs.items() if not isinstance(wire, str)]
        """Body outputs that are states, another one for each iteration."""
        for name, wire in body.outputs.items():
            if isinstance(wire, str) and wire.startswith("state."):
                raise UnsupportedModel(
                    f"all iterations write one state, {wire.partition('.')[2]!r}",
                    where=f"{bundle.root}, {manifest.program.body}.{name}",
                    do="build its graphs as they are, without the loop form",
                )

    def compose(self) -> LoopForm:
        inputs = dict(self.manifest.inputs)
        inputs |= {n: TensorSpec(s.dtype, s.shape) for n, s in self.manifest.states.items()}
        inputs |= LIMITS
        ends = {f"input.{name}": name for name in self.manifest.inputs}
        ends |= {f"state.{name}": name for name in self.manifest.states}
        outputs: dict[str, TensorSpec] = {}
        self._inline("prologue", ends, outputs)
        taken = self._repeat(ends, outputs)
        self._inline("epilogue", ends, outputs)
        self.graft.node("Identity", taken, out=STEPS)
        outputs[STEPS] = TensorSpec("int64", ("batch",))
        for name in self.around:
            self.graft.node("Identity", ends[f"value.{name}"], out=name)
            outputs[name] = self.loop.values[name]
        model = self.graft.model("loop", inputs, outputs)
        data = dict.fromkeys(f for graph in self.variant.graphs.values() for f in graph.data)
        return LoopForm(model, inputs, outputs, tuple(data), self.bundle)

    def _part(self, part: str) -> GraphSpec | None:
        name = self.manifest.program.parts[part]
        return None if name is None else self.variant.graphs[name]

    def _load(self, part: str) -> onnx.ModelProto:
        spec = self._part(part)
        assert spec is not None
        return onnx.load(self.bundle.path(spec.file), load_external_data=False)

    def _inline(self, part: str, ends: dict[str, str], outputs: dict[str, TensorSpec]) -> None:
        """Prologue or epilogue, all of whose wires are single endpoints; `ends` learns values."""
        spec = self._part(part)
        if spec is None:
            return
        ports = {name: ends[endpoint_at(wire, 0)] for name, wire in spec.inputs.items()}
        for name, wire in spec.outputs.items():
            kind, _, end = endpoint_at(wire, 0).partition(".")
            if kind == "value":
                ports[name] = ends[f"value.{end}"] = f"{part}/value.{end}"
            elif kind == "state":
                ports[name] = f"{end}.next"
                outputs[ports[name]] = _tensor(self.manifest.states[end])
            else:
                ports[name] = end
                outputs[end] = self.manifest.results[end]
        self.graft.inline(self._load(part), part, ports)

    # ------------------------------------------------------------------------------ the loop

    def _repeat(self, ends: dict[str, str], outputs: dict[str, TensorSpec]) -> str:
        """The Loop node, and what follows from it. The iterations that each row took."""
        g = self.graft
        first = next(iter(self.manifest.inputs))
        batch = g.node("Shape", first, end=1, out="loop/batch")
        most = g.node("Min", "most", g.number("loop/trips", self.loop.iterations))
        carried = {f"value.{name}": self.loop.values[name] for name in self.around}
        start = [ends[name] for name in carried]
        for name in self.stacked:
            spec = self._state(self.body.outputs[name])
            carried[f"stack.{name}"] = TensorSpec(spec.dtype, (self.loop.iterations, *spec.shape))
            start.append(self._stack(self.body.outputs[name], name))
        carried["taken"] = TensorSpec("int64", ("batch",))
        start.append(g.node("ConstantOfShape", batch, value=_of(TensorProto.INT64)))
        if self.loop.halt is not None and self.loop.halt.cumulative:
            carried["total"] = TensorSpec("float32", ("batch",))
            start.append(g.node("ConstantOfShape", batch, value=_of(TensorProto.FLOAT)))
        inside = g.inside()
        last = self._turn(inside, ends, carried, batch, most)
        body = helper.make_graph(
            inside.nodes,
            "turn",
            [
                port("turn/iteration", TensorSpec("int64", ())),
                port("turn/go", TensorSpec("bool", ())),
                *(port(f"turn/{name}", spec) for name, spec in carried.items()),
            ],
            [
                port(last["go"], TensorSpec("bool", ())),
                *(port(last[name], spec) for name, spec in carried.items()),
            ],
            value_info=inside.values,
        )
        go = g.constant("loop/go", np.array(True))
        g.node("Loop", "loop/trips", go, *start, out=[f"loop/{n}" for n in carried], body=body)
        ends |= {f"value.{name}": f"loop/value.{name}" for name in self.around}
        self._fill(outputs)
        return "loop/taken"

    def _turn(
        self,
        inside: Graft,
        ends: dict[str, str],
        carried: dict[str, TensorSpec],
        batch: str,
        most: str,
    ) -> dict[str, str]:
        """One iteration: nodes inside the Loop. What each carried tensor becomes, and `go`."""
        ports = {}
        for name, wire in self.body.inputs.items():
            if not isinstance(wire, str):
                stack = next(n for n in self.stacked if self.body.outputs[n] == wire)
                ports[name] = inside.node("Gather", f"turn/stack.{stack}", "turn/iteration", axis=0)
            elif wire == "loop.iteration":
                ports[name] = "turn/iteration"
            elif wire == "loop.steps":
                ports[name] = inside.node("Expand", "turn/iteration", batch)
            elif wire.partition(".")[2] in self.around and wire.startswith("value."):
                ports[name] = f"turn/{wire}"
            else:
                ports[name] = ends[wire]
        new = {}
        for name, wire in self.body.outputs.items():
            end = f"stack.{name}" if not isinstance(wire, str) else wire
            new[end] = ports[name] = f"turn/new.{end}"
        inside.inline(self._load("body"), "body", ports)
        zero, one = inside.number("loop/0", 0), inside.number("loop/1", 1)
        running = inside.node("Equal", "turn/taken", zero)
        done = inside.node("Add", "turn/iteration", one)
        found = {}
        if "total" in carried:
            assert self.loop.halt is not None
            signal = new[f"signal.{self.loop.halt.signal}"]
            found["total"] = inside.node("Add", "turn/total", signal, out="turn/next.total")
        enough = self._enough(inside, new, found)
        enough = inside.node("And", enough, inside.node("GreaterOrEqual", done, "least"))
        enough = inside.node("Or", enough, inside.node("GreaterOrEqual", done, most))
        ended = inside.node("And", running, enough)
        taken = inside.node("Where", ended, done, "turn/taken", out="turn/next.taken")
        waits = inside.node("Cast", inside.node("Equal", taken, zero), to=TensorProto.INT32)
        most_waits = inside.node("ReduceMax", waits, keepdims=0)
        found["taken"] = taken
        found["go"] = inside.node("Cast", most_waits, to=TensorProto.BOOL, out="turn/next.go")
        for name in self.around:
            wide = self._wide(inside, running, len(self.loop.values[name].shape))
            old, end = f"turn/value.{name}", f"value.{name}"
            found[end] = inside.node("Where", wide, new[end], old, out=f"turn/next.{end}")
        at = inside.node("Reshape", "turn/iteration", inside.numbers("loop/one_row", [1, 1]))
        for name in self.stacked:
            end = f"stack.{name}"
            row = inside.node("Unsqueeze", new[end], inside.numbers("loop/first", [0]))
            found[end] = inside.node("ScatterND", f"turn/{end}", at, row, out=f"turn/next.{end}")
        return found

    def _enough(self, inside: Graft, new: dict[str, str], found: dict[str, str]) -> str:
        """Whether the signal of each row [batch] would end it."""
        rule = self.loop.halt
        if rule is not None:
            signal = found["total"] if rule.cumulative else new[f"signal.{rule.signal}"]
            return inside.node("Greater", signal, "threshold")
        # [batch, tokens]: a loop ends early in steps of one token only.
        change = inside.node("Gather", new[f"signal.{SIGNAL}"], inside.number("loop/0", 0), axis=1)
        return inside.node("Less", change, "threshold")

    @staticmethod
    def _wide(inside: Graft, rows: str, rank: int) -> str:
        axes = inside.numbers(f"loop/behind_{rank}", list(range(1, rank)))
        return inside.node("Unsqueeze", rows, axes)

    # ---------------------------------------------------------------------- keys and values

    def _state(self, wire: Wire) -> StateSpec:
        return self.manifest.states[endpoint_at(wire, 0).partition(".")[2]]

    def _stack(self, wire: Wire, name: str) -> str:
        """The states of all iterations as one tensor [iterations, batch, heads, capacity, size]."""
        assert not isinstance(wire, str)
        first = self.graft.numbers("loop/first", [0])
        rows = [self.graft.node("Unsqueeze", end.partition(".")[2], first) for end in wire]
        return self.graft.node("Concat", *rows, axis=0, out=f"loop/before.{name}")

    def _fill(self, outputs: dict[str, TensorSpec]) -> None:
        """Rows that a token left at its last iteration stand in for those it skipped; then each
        iteration's states are outputs again."""
        if not self.stacked:
            return
        g = self.graft
        first = self._state(self.body.outputs[self.stacked[0]])
        ids = next(iter(self.manifest.inputs))
        own, last = places(g, first, self.loop.iterations, ids, "loop/batch", "loop/taken")
        for name in self.stacked:
            stack = f"loop/stack.{name}"
            if self.loop.fill == "copy":
                stack = g.node("ScatterND", stack, own, g.node("GatherND", stack, last))
            for i, end in enumerate(self.body.outputs[name]):
                written = end.partition(".")[2]
                at = g.number(f"loop/{i}", i)
                outputs[f"{written}.next"] = _tensor(self.manifest.states[written])
                g.node("Gather", stack, at, axis=0, out=f"{written}.next")


def _tensor(state: StateSpec) -> TensorSpec:
    return TensorSpec(state.dtype, state.shape)


def _of(kind: int) -> TensorProto:
    return helper.make_tensor("value", kind, [1], [0])
