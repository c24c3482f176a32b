"""A graph file as the plan sees it: its nodes, and the memory its tensors take at given sizes.

The file has passed the bundle's own bounded walk (edgert/onnxfile.py) before it is opened here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgert.build.operators import Node
from edgert.errors import MissingDependency

if TYPE_CHECKING:
    import onnx

ALIASES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output is their input under another shape."""


@dataclass(frozen=True)
class Drawn:
    """A graph that was read.

    tensors  what a node makes -> bytes of an element, and its shape: sizes, names of axes, and
             products of both, such as `batch*select`
    """

    nodes: tuple[Node, ...]
    reads: tuple[tuple[str, ...], ...]
    writes: tuple[tuple[str, ...], ...]
    ports: frozenset[str]  # inputs and outputs of the graph
    tensors: dict[str, tuple[int, tuple[int | str, ...]]]

    def activations(self, axes: Mapping[str, int]) -> int:
        """Bytes that are alive at once, at most, if nodes run in order and nothing is fused.

        What the file gives no shape for, or one of an unknown axis, is not counted. Inputs and
        outputs of the graph are not either: they lie in buffers of the runtime's.
        """
        alias: dict[str, str] = {}
        last: dict[str, int] = {}
        for at, (node, reads) in enumerate(zip(self.nodes, self.reads, strict=True)):
            if node.operator in ALIASES and reads:
                alias[self.writes[at][0]] = alias.get(reads[0], reads[0])
            for name in reads:
                last[alias.get(name, name)] = at
        alive: dict[str, int] = {}
        peak = 0
        for at, writes in enumerate(self.writes):
            for name in writes:
                if name not in alias and name not in self.ports:
                    alive[name] = self._bytes(name, axes)
            peak = max(peak, sum(alive.values()))
            alive = {name: size for name, size in alive.items() if last.get(name, -1) > at}
        return peak

    def _bytes(self, name: str, axes: Mapping[str, int]) -> int:
        width, shape = self.tensors.get(name, (0, ()))
        try:
            return width * math.prod(_size(axis, axes) for axis in shape)
        except KeyError:
            return 0


def _size(axis: int | str, axes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    parts = axis.replace(" ", "").split("*")
    return math.prod(int(part) if part.isdecimal() else axes[part] for part in parts)


def read_graph(path: Path) -> Drawn:
    """Raises MissingDependency without the onnx package."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency(
            "onnx", "tensorrt", why="building reads the graphs before TensorRT does"
        ) from error
    graph = onnx.load(str(path), load_external_data=False).graph
    nodes = list(_nodes(graph))
    return Drawn(
        nodes=tuple(node for node, _, _ in nodes),
        reads=tuple(reads for _, reads, _ in nodes),
        writes=tuple(writes for _, _, writes in nodes),
        ports=frozenset(port.name for port in (*graph.input, *graph.output)),
        tensors=dict(_tensors(graph)),
    )


def _nodes(
    graph: onnx.GraphProto,
) -> Iterator[tuple[Node, tuple[str, ...], tuple[str, ...]]]:
    """Every node, those of subgraphs before the node that they belong to."""
    import onnx

    for node in graph.node:
        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
            elif attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.STRING):
                attributes[attribute.name] = onnx.helper.get_attribute_value(attribute)
        known = Node(node.name, node.domain or "ai.onnx", node.op_type, attributes)
        yield known, tuple(filter(None, node.input)), tuple(filter(None, node.output))


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, tuple[int | str, ...]]]]:
    """What nodes make, inside subgraphs too."""
    import onnx

    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)
    for value in graph.value_info:
        kind = value.type.tensor_type
        try:
            width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        except KeyError:  # no type, or one without a counterpart in numpy
            continue
        if kind.HasField("shape"):
            dims = kind.shape.dim
            yield value.name, (width, tuple(d.dim_param or int(d.dim_value) for d in dims))
