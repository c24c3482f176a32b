"""Typed fp16: matrix products in float16, everything else in float32, said by the graph itself.

    MatMul, Gemm     take and give float16; so matrices of the model, and keys and values, are stored
                     in it
    what only moves  Reshape, Transpose, Gather, ScatterND ... keeps what it is given
    all else         float32: norms, softmax, rotation, residual stream, Clifford products, what goes
                     round a loop, halting scores, logits

It is the policy of torch.autocast. Products are what takes time and memory; sums of squares and
recurrences are what overflows and drifts. A strongly typed compiler has to follow it, and the same
file runs in ONNX Runtime.

Not done with onnxruntime.transformers.float16, whose blocked nodes are no islands: it rounds every
value between two of them to float16, so that x * x overflows above 255 however it is listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgert.bundle import Bundle
from edgert.errors import UnsupportedModel
from edgert.export.weights import WeightsFile

PRODUCTS = frozenset({"MatMul", "Gemm"})
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


class Halver:
    """Makes graphs typed fp16. `weights` is the module that their matrices come from."""

    def __init__(self, weights: torch.nn.Module) -> None:
        self.weights = weights
        self._matrices: dict[bytes, str] = {}
        for name, parameter in weights.named_parameters():
            if parameter.ndim < 2:
                continue
            most = float(parameter.detach().abs().max())
            if not most <= LARGEST:
                raise UnsupportedModel(
                    f"fp16: weight {name!r} reaches {most:.3g}, float16 ends at {LARGEST:,.0f}",
                    do="export with --precision fp32",
                )
            self._matrices.setdefault(_digest(parameter.detach().numpy()), name)

    def rewrite(self, model: ir.Model, halves: Collection[str]) -> None:
        """`halves` are the inputs and outputs of the graph that are float16."""
        _Rewriter(model.graph, self._is_matrix, halves).run()

    def _is_matrix(self, value: ir.Value) -> bool:
        tensor = value.const_value
        if tensor is None or tensor.dtype != FULL or len(tensor.shape) < 2:
            return False
        return _digest(tensor.numpy()) in self._matrices

    def tensors(self) -> Iterator[NDArray[np.generic]]:
        """The matrices as the graphs hold them."""
        for parameter in self.weights.parameters():
            if parameter.ndim >= 2:
                yield parameter.detach().half().numpy()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the module computes with its matrices as they are stored."""
        kept = []
        try:
            for parameter in self.weights.parameters():
                if parameter.ndim >= 2:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.half().float()
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data


class _Rewriter:
    """Gives every float value of a graph its type, and adds the casts that this takes."""

    def __init__(
        self, graph: ir.Graph, is_matrix: Callable[[ir.Value], bool], halves: Collection[str]
    ) -> None:
        self.graph, self.is_matrix, self.halves = graph, is_matrix, halves
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if value.name in self.halves:
                value.type = ir.TensorType(HALF)
        for value in list(self.graph.initializers.values()):
            if value.dtype == FULL and self._stored_half(value):
                _store(value, HALF)
        for node in list(self.graph):
            self._type(node)
        for at, value in enumerate(self.graph.outputs):
            want = HALF if value.name in self.halves else FULL
            if value.dtype in (FULL, HALF) and value.dtype != want:
                self._end(at, value, want)

    def _stored_half(self, value: ir.Value) -> bool:
        readers = {use.node.op_type for use in value.uses()}
        return self.is_matrix(value) or bool(readers) and readers <= PRODUCTS

    def _type(self, node: ir.Node) -> None:
        """The type that a node computes in, for its float inputs and outputs."""
        kind = node.op_type if node.domain in ("", "ai.onnx") else ""
        floats = [at for at, value in enumerate(node.inputs) if value and value.dtype in BOTH]
        if kind in BLIND or not floats:
            return
        want = FULL
        if kind in PRODUCTS:
            want = HALF
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


@contextlib.contextmanager
def float32_twin(bundle: Bundle, variant: str) -> Iterator[Bundle]:
    """Meanwhile there is a bundle of this variant that computes in float32 throughout: the same
    graphs over the values that are stored, every float16 in them widened."""
    manifest = bundle.manifest
    spec = manifest.variants[variant]
    with tempfile.TemporaryDirectory(dir=bundle.root) as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        files: dict[str, WeightsFile] = {}
        for graph in spec.graphs.values():
            (data,) = graph.data
            (root / graph.file).parent.mkdir(parents=True, exist_ok=True)
            if data not in files:
                files[data] = stack.enter_context(WeightsFile(root / data))
            model = ir.load(bundle.path(graph.file))
            _widen(model.graph)
            files[data].externalize(model)
            ir.save(model, root / graph.file)
        for file in files.values():
            file.flush()
        variants = {**manifest.variants, variant: replace(spec, append_dtype=None)}
        yield Bundle(root, replace(manifest, variants=variants))


def _widen(graph: ir.Graph) -> None:
    for value in graph.initializers.values():
        if value.dtype == HALF:
            _store(value, FULL)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].value == HALF.value:
            node.attributes["to"] = ir.AttrInt64("to", FULL.value)
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *made):
        if value.dtype == HALF:
            value.type = ir.TensorType(FULL)


def _digest(array: NDArray[np.generic]) -> bytes:
    shape = repr(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()
