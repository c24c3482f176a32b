"""Graphs with weights of few bits: each linear map and embedding of a traced graph, replaced.

    MatMul(x, W [K, N])              MatMulNBits
    Gemm(x, W [N, K], transB)        MatMulNBits
    Gather(W [N, K], ids)            GatherBlockQuantized over the same bytes

A weight is found again by its content: graphs that share it share its codes, and a tied head is
stored once. Small matrices, vectors, and what no rule matches stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgert.bundle import Bundle
from edgert.export.methods import METHODS, Moments
from edgert.export.nbits import CALIBRATED, Quantized, Scheme

LEAST = 4096
"""Elements of the smallest matrix that is worth it."""

_DOMAIN = "com.microsoft"


class Quantizer:
    """The weights of a model in one scheme, made as the graphs ask for them.

    moments  by parameter, what methods that calibrate go by; a weight without any is `search`ed
    made     by parameter: whether the module keeps it [K, N], and its codes
    """

    def __init__(
        self, module: torch.nn.Module, scheme: Scheme, moments: Mapping[str, Moments] | None = None
    ) -> None:
        self.module, self.scheme, self.moments = module, scheme, moments or {}
        self.made: dict[str, tuple[bool, Quantized]] = {}
        self._names: dict[bytes, str] = {}
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and parameter.numel() >= LEAST:
                self._names.setdefault(_digest(parameter.detach().numpy()), name)

    def rewrite(self, model: ir.Model) -> None:
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
                name = self._names.get(_digest(parameter.detach().numpy()))
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
        return self._names.get(_digest(tensor.numpy()))

    def _quantized(self, name: str, transposed: bool) -> Quantized | None:
        """None if no block divides the inputs."""
        if name not in self.made:
            weight = self.module.get_parameter(name).detach().numpy()
            weight = np.ascontiguousarray(weight.T if transposed else weight)
            if not self.scheme.block_of(weight.shape[1]):
                return None
            moments, scheme = self.moments.get(name), self.scheme
            method = scheme.method
            if not transposed:
                scheme = replace(scheme, bits=scheme.head)
            if method in CALIBRATED and (moments is None or not transposed):
                method = "search"  # rows that are looked up have no inputs to calibrate by
            self.made[name] = transposed, METHODS[method](weight, scheme, moments)
        return self.made[name][1]


@contextlib.contextmanager
def exact_twin(bundle: Bundle, variant: str) -> Iterator[Bundle]:
    """Meanwhile there is a bundle of this variant that computes with activations in float32: the
    same graphs over the same weights, but for that attribute."""
    with tempfile.TemporaryDirectory(dir=bundle.root) as folder:
        root = Path(folder)
        graphs = bundle.manifest.variants[variant].graphs.values()
        for file in dict.fromkeys(f for graph in graphs for f in (graph.file, *graph.data)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".onnx"):
                model = ir.load(bundle.path(file))
                for node in model.graph:
                    if node.op_type == "MatMulNBits":
                        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
                ir.save(model, root / file)
            else:
                (root / file).hardlink_to(bundle.path(file))
        yield Bundle(root, bundle.manifest)


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


def initializer(graph: ir.Graph, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """The initializer of this name, which `make` gives its content if it is not there yet."""
    if name not in graph.initializers:
        array = make()
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def _digest(array: NDArray[np.generic]) -> bytes:
    shape = repr(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()
