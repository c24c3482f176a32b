"""Graphs put into another one: nodes under names of their own, every stored weight once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgert.spec import TensorSpec


def port(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    """What a graph says of one of its inputs or outputs."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(name, kind, list(spec.shape))


class Graft:
    """A graph in the making. Constants and weights are those of the outermost graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._stored: dict[object, str] = {}  # where a weight lies in its file -> its name here
        self._opsets: dict[str, int] = {}
        self._ir_version = 0
        self._prefix = "loop"

    def inside(self) -> Graft:
        """A subgraph of this one, over the same constants and weights."""
        found = Graft()
        found.tensors, found._stored, found._opsets = self.tensors, self._stored, self._opsets
        found._prefix = "turn"
        return found

    def node(
        self, kind: str, *inputs: str, out: str | Sequence[str] | None = None, **attributes: Any
    ) -> str:
        """Add a node; the name of its first output, which it gets unless it is given."""
        name = f"{self._prefix}/{kind}_{len(self.nodes)}"
        outputs = [name] if out is None else [out] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs[0]

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.tensors.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def number(self, name: str, value: int) -> str:
        return self.constant(name, np.array(value, np.int64))

    def numbers(self, name: str, values: list[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def inline(self, model: onnx.ModelProto, prefix: str, ports: dict[str, str]) -> None:
        """Add all nodes of a model. `ports` has the new names of its inputs and outputs."""
        graph = model.graph
        names = {"": ""} | ports
        for tensor in graph.initializer:
            names[tensor.name] = self._keep(tensor, f"{prefix}/{tensor.name}")
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{prefix}/{node.name}"
            assert not any(attribute.HasField("g") for attribute in node.attribute), node.name
            for side in (copy.input, copy.output):
                side[:] = [names.setdefault(name, f"{prefix}/{name}") for name in side]
            self.nodes.append(copy)
        for value in graph.value_info:
            if value.name in names:
                said = onnx.ValueInfoProto()
                said.CopyFrom(value)
                said.name = names[value.name]
                self.values.append(said)
        self._opsets |= {each.domain: each.version for each in model.opset_import}
        self._ir_version = max(self._ir_version, model.ir_version)

    def _keep(self, tensor: onnx.TensorProto, name: str) -> str:
        """A weight that another graph has from the same place of one file is not kept twice."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            key: object = name
        else:
            entries = sorted((entry.key, entry.value) for entry in tensor.external_data)
            key = tensor.data_type, tuple(tensor.dims), tuple(entries)
        if key not in self._stored:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = name
            self.tensors[name] = copy
            self._stored[key] = name
        return self._stored[key]

    def model(
        self, name: str, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            name,
            [port(n, spec) for n, spec in inputs.items()],
            [port(n, spec) for n, spec in outputs.items()],
            list(self.tensors.values()),
            value_info=self.values,
        )
        opsets = [helper.make_opsetid(domain, v) for domain, v in self._opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)
