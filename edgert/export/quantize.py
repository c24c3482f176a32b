"""Graphs with weights of few bits: each linear map and embedding of a traced graph, replaced.

    MatMul(x, W [K, N])              MatMulNBits
    Gemm(x, W [N, K], transB)        MatMulNBits
    Gather(W [N, K], ids)            GatherBlockQuantized over the same bytes

A weight is found again by its content: graphs that share it share its codes, and a tied head is
stored once. Small matrices, vectors, and what no rule matches stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgert.export.calibration import Ids, Watch
from edgert.export.initializers import digest, initializer
from edgert.export.methods import METHODS, Moments
from edgert.export.nbits import CALIBRATED, Floats, Quantized, Scheme
from edgert.export.twin import in_float32
from edgert.models.program import TracedGraph
from edgert.spec import Lowering

LEAST = 4096
"""Elements of the smallest matrix that is worth it."""

_DOMAIN = "com.microsoft"


class Quantizer:
    """The weights of a model in one scheme, made as the graphs ask for them.

    moments  by parameter, what methods that calibrate go by; a weight without any is `search`ed
    made     by parameter: whether the module keeps it [K, N], and its codes
    wide     parameters that have 8 bits, whatever the scheme says
    mixed    how those were chosen: see mixed.py
    """

    mixed: dict[str, Any] | None = None
    lowerings: tuple[Lowering, ...] = ("ort",)
    state_dtypes: Mapping[str, str] = MappingProxyType({})
    emulated = False

    def __init__(
        self, module: torch.nn.Module, scheme: Scheme, moments: Mapping[str, Moments] | None = None
    ) -> None:
        self.module, self.scheme, self.moments = module, scheme, moments or {}
        self.made: dict[str, tuple[bool, Quantized]] = {}
        self.wide: frozenset[str] = frozenset()
        self._codes: dict[tuple[str, int], Quantized] = {}
        self._names: dict[bytes, str] = {}
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and parameter.numel() >= LEAST:
                self._names.setdefault(digest(parameter.detach().numpy()), name)

    def prepare(self, maps: Iterable[str], heads: Iterable[str] = ()) -> None:
        """Round linear maps [K, N] and heads [N, K] before a graph asks for them."""
        for names, transposed in ((maps, True), (heads, False)):
            for name in names:
                if self.module.get_parameter(name).numel() >= LEAST:
                    self._quantized(name, transposed)

    def prepare_for(self, run: Callable[[Ids], object], ids: Ids) -> None:
        """The same for all that the module multiplies by as it runs."""
        with torch.no_grad(), Watch(self.module) as watch:
            run(ids)
        self.prepare(watch.maps, watch.heads)

    def widen(self, names: Iterable[str]) -> None:
        """Have 8 bits for these matrices, and for no others that the scheme gives fewer."""
        self.wide = frozenset(names)
        for name, (transposed, _) in list(self.made.items()):
            self._quantized(name, transposed)

    def rescale(self, name: str, scales: Floats) -> None:
        """Have other scales [N, K / block] for the codes of a matrix."""
        transposed, quantized = self.made[name]
        self._codes[name, quantized.bits] = moved = replace(quantized, scales=scales)
        self.made[name] = transposed, moved

    def change(self, name: str) -> Floats:
        """What rounding adds to a weight: [N, K]."""
        transposed, quantized = self.made[name]
        return quantized.values() - self._weight(name, transposed)

    @property
    def rounds(self) -> str | None:
        return "int8" if self.scheme.accuracy_level else None

    def exact(self, model: ir.Model) -> None:
        in_float32(model)

    def emulate(self, model: ir.Model) -> None:
        """The CPU's kernels round by themselves."""

    def rewrite(self, model: ir.Model, part: TracedGraph | None = None) -> None:
        """Replace what can be replaced in a traced graph."""
        graph = model.graph
        for node in list(graph):
            kind = _kind(node)
            name = kind and self._parameter(node.inputs[0 if kind == "gather" else 1])
            if not name:
                continue
            quantized = self._quantized(name, transposed=kind == "matmul")
            if quantized is None:
                continue
            build = _gather if kind == "gather" else _matmul
            new = build(graph, node, name, quantized, self.scheme)
            (old,), (value,) = node.outputs, new.outputs
            value.name, value.type, value.shape = old.name, old.type, old.shape
            ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], [value])
            model.opset_imports[_DOMAIN] = 1
        for key, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[key]

    def tensors(self) -> Iterator[NDArray[np.generic]]:
        """All that the graphs hold of the quantized weights."""
        for _, quantized in self.made.values():
            yield quantized.packed()
            yield quantized.scales
            if quantized.zeros is not None:
                yield quantized.packed_zeros()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the module computes with what the codes stand for."""
        kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        try:
            for parameter in self.module.parameters():
                name = self._names.get(digest(parameter.detach().numpy()))
                if name in self.made and parameter.ndim == 2:
                    transposed, quantized = self.made[name]
                    values = torch.from_numpy(quantized.values())
                    kept.append((parameter, parameter.data))
                    parameter.data = (values.T if transposed else values).contiguous()
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def _parameter(self, value: ir.Value | None) -> str | None:
        """The parameter that an initializer holds, if it is one that is quantized."""
        tensor = value.const_value if value is not None and value.is_initializer() else None
        if tensor is None or len(tensor.shape) != 2 or tensor.size < LEAST:
            return None
        return self._names.get(digest(tensor.numpy()))

    def _weight(self, name: str, transposed: bool) -> Floats:
        """A parameter as [N, K]."""
        weight = self.module.get_parameter(name).detach().numpy()
        return np.ascontiguousarray(weight.T if transposed else weight)

    def _quantized(self, name: str, transposed: bool) -> Quantized | None:
        """None if no block divides the inputs."""
        usual = self.scheme.bits if transposed else self.scheme.head
        bits = 8 if name in self.wide else usual
        if name not in self.made or self.made[name][1].bits != bits:
            if (name, bits) not in self._codes:
                weight = self._weight(name, transposed)
                scheme = self.scheme.at(bits)
                if not scheme.block_of(weight.shape[1]):
                    return None
                moments, method = self.moments.get(name), scheme.method
                if method in CALIBRATED and (moments is None or not transposed):
                    method = "search"  # rows that are looked up have no inputs to calibrate by
                self._codes[name, bits] = METHODS[method](weight, scheme, moments)
            self.made[name] = transposed, self._codes[name, bits]
        return self.made[name][1]


def _kind(node: ir.Node) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Gemm":
        plain = len([v for v in node.inputs if v is not None]) == 2
        want = {"transA": 0, "transB": 1, "alpha": 1.0}
        return "gemm" if plain and {k: attributes.get(k) for k in want} == want else None
    if node.op_type == "Gather":
        return "gather" if attributes.get("axis", 0) == 0 else None
    return "matmul" if node.op_type == "MatMul" else None


def _matmul(
    graph: ir.Graph, node: ir.Node, name: str, quantized: Quantized, scheme: Scheme
) -> ir.Node:
    outputs, inputs = quantized.codes.shape
    operands = [
        initializer(graph, f"{name}.codes", quantized.packed),
        initializer(graph, f"{name}.scales", lambda: quantized.scales),
    ]
    if quantized.zeros is not None:
        operands.append(initializer(graph, f"{name}.zeros", quantized.packed_zeros))
    return ir.node(
        "MatMulNBits",
        [node.inputs[0], *operands],
        {
            "K": inputs,
            "N": outputs,
            "bits": quantized.bits,
            "block_size": quantized.block,
            "accuracy_level": scheme.accuracy_level,
        },
        domain=_DOMAIN,
        name=node.name,
    )


def _gather(
    graph: ir.Graph, node: ir.Node, name: str, quantized: Quantized, scheme: Scheme
) -> ir.Node:
    rows = len(quantized.codes)
    operands = [
        # Other names than the head's for the same bytes: its shape is another.
        initializer(graph, f"{name}.rows", lambda: quantized.packed().reshape(rows, -1)),
        node.inputs[1],
        initializer(graph, f"{name}.scales", lambda: quantized.scales),
    ]
    if quantized.zeros is not None:
        operands.append(initializer(graph, f"{name}.zeros", quantized.packed_zeros))
    return ir.node(
        "GatherBlockQuantized",
        operands,
        {
            "gather_axis": 0,
            "quantize_axis": 1,
            "bits": quantized.bits,
            "block_size": quantized.block,
        },
        domain=_DOMAIN,
        name=node.name,
    )
