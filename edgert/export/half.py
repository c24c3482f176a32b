"""Typed fp16: matrix products in float16, everything else in float32, said by the graph itself.

    MatMul, Gemm,    take and give float16; so the matrices that they read, those of the vocabulary,
    Attention        and keys and values are stored in it. Not those of a few scores, such as when
                     to halt: narrow matrices stay as they are
    what only moves  Reshape, Transpose, Gather, ScatterND ... keeps what it is given
    all else         float32: norms, softmax, rotation, residual stream, Clifford products, what
                     goes round a loop, halting scores, logits

It is the policy of torch.autocast. Products are what takes time and memory; sums of squares and
recurrences are what overflows and drifts. A strongly typed compiler has to follow it. The same file
runs in ONNX Runtime, whose CPU kernels compute fp16 products in float32 and leave the casts between
out, even unoptimized: that would hide an overflow, so the gate looks at a graph that rounds.

Not done with onnxruntime.transformers.float16, whose blocked nodes are no islands: it rounds every
value between two of them to float16, so that x * x overflows above 255 however it is listed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgert.errors import UnsupportedModel
from edgert.export.initializers import digest, initializer
from edgert.models.program import Program, TracedGraph
from edgert.spec import Lowering, endpoint_at

PRODUCTS = frozenset({"Attention", "Gemm", "MatMul"})
MOVES = {
    **dict.fromkeys(("Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Split"), (0,)),
    **dict.fromkeys(("Squeeze", "Transpose", "Unsqueeze"), (0,)),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), (0,)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2)),
}
"""Operator -> inputs that are of its output's type, which is that of the first."""
BLIND = frozenset({"Cast", "Shape", "Size"})
"""Operators that take any type and give the same."""

FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
BOTH = (FULL, HALF)
LARGEST = float(np.finfo(np.float16).max)
NARROW = 8
"""A matrix with fewer rows or columns is read in float32: its product is a decision, not work."""


@dataclass(frozen=True)
class Typed:
    """What is computed in which type."""

    products: str = "float16"
    rest: str = "float32"

    def __str__(self) -> str:
        return f"products in {self.products}, all else in {self.rest}"


class Halver:
    """Makes the graphs of a program typed fp16. `made` are the parameters that they store so."""

    scheme = Typed()
    mixed: dict[str, Any] | None = None
    lowerings: tuple[Lowering, ...] = ("portable", "modern")
    rounds: str | None = "float16"
    emulated = True

    def __init__(self, program: Program) -> None:
        self.module = program.weights
        self._appended = {n for n, spec in program.states.items() if spec.kind == "append"}
        self._vocabulary = program.vocab_size
        self._names = {
            digest(p.detach().numpy()): name for name, p in self.module.named_parameters()
        }
        self.made: set[str] = set()

    @property
    def state_dtypes(self) -> dict[str, str]:
        return dict.fromkeys(sorted(self._appended), "float16")

    def rewrite(self, model: ir.Model, part: TracedGraph) -> None:
        """Append states become float16; all other inputs and outputs stay as they are.

        Raises UnsupportedModel for a matrix with values that float16 has not.
        """
        halves = {
            port
            for port, wire in (part.inputs | part.outputs).items()
            if endpoint_at(wire, 0).removeprefix("state.") in self._appended
        }
        _Rewriter(model.graph, self._stored, halves).run()

    def exact(self, model: ir.Model) -> None:
        widened(model)

    def emulate(self, model: ir.Model) -> None:
        rounding(model)

    def _stored(self, value: ir.Value) -> bool:
        """Whether an initializer is stored in float16: as other graphs of the program store it.

        What only some of them gather from, such as a row for each iteration, others have folded
        into constants, so it stays.
        """
        readers = {use.node.op_type for use in value.uses()}
        tensor = value.const_value
        assert tensor is not None
        vocabulary = "Gather" in readers and tensor.shape[0] == self._vocabulary
        narrow = len(tensor.shape) > 1 and min(tensor.shape.numpy()) < NARROW
        if narrow or not (readers & PRODUCTS or vocabulary):
            return False
        array = tensor.numpy()
        most = float(np.abs(array).max(initial=0.0))
        if not most <= LARGEST:
            raise UnsupportedModel(
                f"fp16: weight '{value.name}' reaches {most:.3g}, float16 ends at {LARGEST:,.0f}",
                do="export with --precision fp32",
            )
        name = self._names.get(digest(array))
        if name is not None:
            self.made.add(name)
        return True

    def tensors(self) -> Iterator[NDArray[np.generic]]:
        """The matrices as the graphs hold them."""
        for name in self.made:
            yield self.module.get_parameter(name).detach().half().numpy()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the module computes with its matrices as they are stored."""
        kept = {name: self.module.get_parameter(name).data for name in self.made}
        try:
            for name, data in kept.items():
                self.module.get_parameter(name).data = data.half().float()
            yield
        finally:
            for name, data in kept.items():
                self.module.get_parameter(name).data = data


class _Rewriter:
    """Gives every float value of a graph its type, and adds the casts that this takes."""

    def __init__(
        self, graph: ir.Graph, stored: Callable[[ir.Value], bool], halves: Collection[str]
    ) -> None:
        self.graph, self.stored, self.halves = graph, stored, halves
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if value.name in self.halves:
                value.type = ir.TensorType(HALF)
        for value in list(self.graph.initializers.values()):
            if value.dtype == FULL and self.stored(value):
                _store(value, HALF)
        for node in list(self.graph):
            self._type(node)
        for at, value in enumerate(self.graph.outputs):
            want = HALF if value.name in self.halves else FULL
            if value.dtype in (FULL, HALF) and value.dtype != want:
                self._end(at, value, want)

    def _type(self, node: ir.Node) -> None:
        """The type that a node computes in, for its float inputs and outputs."""
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        floats = [at for at, value in enumerate(node.inputs) if value and value.dtype in BOTH]
        if kind in BLIND or not floats:
            return
        want = FULL
        if kind in PRODUCTS:
            given = [node.inputs[at] for at in floats]
            narrow = any(v.is_initializer() and v.dtype == FULL for v in given if v)
            want = FULL if narrow else HALF
        elif kind == "Concat":
            want = HALF if all(node.inputs[at].dtype == HALF for at in floats) else FULL  # type: ignore[union-attr]
        elif kind in MOVES:
            floats = [at for at in floats if at in MOVES[kind]]
            want = node.inputs[0].dtype if floats[:1] == [0] else FULL  # type: ignore[union-attr, assignment]
        for at in floats:
            value = node.inputs[at]
            assert value is not None
            if value.dtype != want:
                node.replace_input_with(at, self._cast(value, want, node))
        for value in node.outputs:
            if value.dtype in BOTH:
                value.type = ir.TensorType(want)

    def _cast(self, value: ir.Value, want: ir.DataType, reader: ir.Node) -> ir.Value:
        """The value in another type; made once, before its first reader."""
        key = value, want
        if key not in self.casts:
            node = _cast_node(value, want, f"{value.name}.{'half' if want == HALF else 'full'}")
            self.graph.insert_before(reader, node)
            self.casts[key] = node.outputs[0]
        return self.casts[key]

    def _end(self, at: int, value: ir.Value, want: ir.DataType) -> None:
        """An output keeps its name, so what it was made as gets another."""
        name = value.name
        value.name = f"{name}.{'full' if want == HALF else 'half'}"
        node = _cast_node(value, want, str(name))
        self.graph.append(node)
        self.graph.outputs[at] = node.outputs[0]


def _cast_node(value: ir.Value, want: ir.DataType, name: str) -> ir.Node:
    made = ir.Value(name=name, type=ir.TensorType(want), shape=value.shape)
    return ir.node("Cast", [value], {"to": want.value}, outputs=[made], name=f"cast_{name}")


def _store(value: ir.Value, want: ir.DataType) -> None:
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy().astype(want.numpy())
    value.const_value = ir.Tensor(array, name=value.name)
    value.type = ir.TensorType(want)


def widened(model: ir.Model) -> None:
    """Everything in float32, over the same weights file: each float16 in it is read and widened."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype == HALF:
            readers = list(value.uses())
            node = _cast_node(value, FULL, f"{value.name}.widened")
            for use in readers:
                use.node.replace_input_with(use.idx, node.outputs[0])
            graph.insert_before(graph.node(0), node)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].value == HALF.value:
            node.attributes["to"] = ir.AttrInt64("to", FULL.value)
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.dtype == HALF:
            value.type = ir.TensorType(FULL)


def rounding(model: ir.Model) -> None:
    """Everything in float32, and each value that was float16 is rounded to it and back.

    Between the two casts is an operator that has a kernel for float16, or they would be removed.
    """
    graph = model.graph
    halves = [node.outputs[0] for node in graph if _makes_half(node)]
    widened(model)
    axis = initializer(graph, "rounding.axis", lambda: np.zeros(1, np.int64))
    for value in halves:
        maker = value.producer()
        assert maker is not None
        readers = list(value.uses())
        down = _cast_node(value, HALF, f"{value.name}.down")
        lifted = ir.node("Unsqueeze", [down.outputs[0], axis], name=f"{value.name}.lift")
        lifted.outputs[0].name = f"{value.name}.lifted"
        up = _cast_node(lifted.outputs[0], FULL, f"{value.name}.up")
        rounded = ir.node("Squeeze", [up.outputs[0], axis], name=f"{value.name}.round")
        rounded.outputs[0].name = f"{value.name}.rounded"
        for use in readers:
            use.node.replace_input_with(use.idx, rounded.outputs[0])
        graph.insert_after(maker, [down, lifted, up, rounded])


def _makes_half(node: ir.Node) -> bool:
    """A cast or product, whose values are rounded; what only moves has rounded ones already."""
    makes = node.op_type == "Cast" or node.op_type in PRODUCTS
    return makes and node.outputs[0].dtype == HALF
