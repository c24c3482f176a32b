"""A small ONNX file, whole or put together from raw bytes, and what the bounded walk says of it."""

from __future__ import annotations

import onnx
import pytest
from bundles import external
from onnx import TensorProto, helper

from edgert import onnxfile
from edgert.errors import BadBundle
from edgert.onnxfile import read_onnx_facts


def facts_of(tmp_path, model: onnx.ModelProto | bytes) -> onnxfile.OnnxFacts:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    return read_onnx_facts(path)


def refusal(tmp_path, model: onnx.ModelProto | bytes) -> str:
    with pytest.raises(BadBundle) as caught:
        facts_of(tmp_path, model)
    assert caught.value.where is not None
    assert caught.value.where.startswith(f"{tmp_path}/m.onnx, byte ")
    return caught.value.what


def small_model() -> onnx.ModelProto:
    """One Add, one external tensor, one local function: every truncation of it is tried."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [2])],
        [value("y", TensorProto.FLOAT, [2])],
        initializer=[external("w", [2], location="w.data", offset="4", length="8")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.producer_name = "test"
    model.functions.append(
        helper.make_function(
            "own",
            "f",
            ["a"],
            ["b"],
            [helper.make_node("Neg", ["a"], ["b"])],
            [helper.make_opsetid("", 20)],
        )
    )
    return model


def is_repeated(field) -> bool:
    """Whether a field of a protobuf descriptor may stand more than once."""
    modern = getattr(field, "is_repeated", None)
    return bool(modern) if modern is not None else field.label == field.LABEL_REPEATED


def tag(number: int, wire: int) -> bytes:
    return varint(number << 3 | wire)


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def block(number: int, content: bytes) -> bytes:
    return tag(number, 2) + varint(len(content)) + content


def graph_with(extra: bytes) -> bytes:
    """The small model with raw bytes appended to its graph."""
    inner = small_model().graph.SerializeToString()
    head, tail = small_model().SerializeToString().split(block(7, inner))
    return head + block(7, inner + extra) + tail
