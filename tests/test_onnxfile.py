"""The bounded walk over ONNX files: reads what onnx reads, refuses what is not sound."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from bundles import tiny_model
from onnx import TensorProto, helper, numpy_helper
from small_onnx import block, facts_of, graph_with, is_repeated, refusal, small_model, tag, varint

from edgert import onnxfile
from edgert.errors import BadBundle
from edgert.onnxfile import ExternalRef, read_onnx_facts


def messages_of(descriptor, seen=None):
    """Every message type reachable from a descriptor, by name."""
    seen = {} if seen is None else seen
    if descriptor.name not in seen:
        seen[descriptor.name] = descriptor
        for field in descriptor.fields:
            if field.message_type:
                messages_of(field.message_type, seen)
    return seen


WIRE = {1: 1, 2: 5, 3: 0, 4: 0, 5: 0, 9: 2, 11: 2, 12: 2, 14: 0}  # FieldDescriptor.type -> wire


def test_the_field_table_is_that_of_onnx():
    """Number, name, wire type and repetition of every field, against onnx's own descriptors."""
    real = messages_of(onnx.ModelProto.DESCRIPTOR)
    for kind, table in onnxfile._SCHEMA.items():
        fields = {field.number: field for field in real[kind].fields}
        assert table.keys() == fields.keys(), kind
        for number, field in fields.items():
            ours = table[number]
            assert ours.name == field.name
            assert ours.many == is_repeated(field)
            assert WIRE[field.type] in ours.wires
            assert ours.message in ("", field.message_type.name if field.message_type else "")


def test_no_way_to_a_tensor_is_left_out():
    """Every field through which a TensorProto can be reached is walked into."""
    real = messages_of(onnx.ModelProto.DESCRIPTOR)
    reaching = {
        name for name, descriptor in real.items() if "TensorProto" in messages_of(descriptor)
    }
    assert "TrainingInfoProto" in reaching
    for name in reaching:
        for field in real[name].fields:
            if field.message_type and field.message_type.name in reaching:
                assert onnxfile._SCHEMA[name][field.number].message == field.message_type.name


def test_sizes_of_types_are_those_of_onnx():
    """Bits per element, against what onnx itself packs for each type."""
    unsized = {"UNDEFINED", "STRING", "FLOAT6E2M3", "FLOAT6E3M2"}
    for name, number in TensorProto.DataType.items():
        if name in unsized:
            assert number not in onnxfile._BITS
            continue
        array = np.zeros(8, helper.tensor_dtype_to_np_dtype(number))
        raw = numpy_helper.from_array(array).raw_data
        assert len(raw) == onnxfile._BITS[number], name


def test_facts_of_the_tiny_graph(tmp_path):
    """Names in order, operator sets, external tensors and operator counts."""
    facts = facts_of(tmp_path, tiny_model())
    assert facts.ir_version == 10
    assert facts.opsets == {"ai.onnx": 20}
    assert facts.inputs == ("ids", "select", "k.0", "lens")
    assert facts.outputs == ("logits", "token", "k.0_next")
    assert facts.external == (ExternalRef("table", "weights.data", 64, 300 * 300 * 4),)
    assert facts.node_count == len(tiny_model().graph.node)
    assert facts.op_types["ai.onnx::Unsqueeze"] == 5
    assert sum(facts.op_types.values()) == facts.node_count
    assert not facts.has_functions
    assert not facts.has_training


HUGE = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"  # 2**64 - 1, also -1
MALFORMED = {
    "length past the end": (lambda: graph_with(tag(2, 2) + b"\x7f"), "after its message"),
    "huge length": (lambda: graph_with(tag(2, 2) + HUGE), "after its message"),
    "length of 2**63": (lambda: graph_with(tag(2, 2) + varint(2**63)), "after its message"),
    "varint cut off": (lambda: graph_with(tag(2, 2) + b"\xff"), "it is cut off"),
    "varint of 11 bytes": (
        lambda: graph_with(tag(2, 2) + b"\xff" * 10 + b"\x01"),
        "more than 10 bytes",
    ),
    "varint above 64 bits": (
        lambda: graph_with(tag(2, 2) + b"\xff" * 9 + b"\x7f"),
        "exceeds 64 bits",
    ),
    "field number 0": (lambda: graph_with(b"\x02\x00"), "a field has the number 0"),
    "field number 2**29": (lambda: graph_with(tag(2**29, 2) + b"\x00"), "number 536870912"),
    "unknown field": (lambda: graph_with(block(77, b"")), "GraphProto has the unknown field 77"),
    "reserved field": (lambda: graph_with(block(3, b"")), "GraphProto has the unknown field 3"),
    "group": (lambda: graph_with(tag(2, 3) + tag(2, 4)), "has the wire type 3"),
    "wire type 7": (lambda: graph_with(tag(2, 7)), "has the wire type 7"),
    "name as number": (
        lambda: graph_with(tag(10, 0) + b"\x01"),
        "GraphProto.doc_string is stored as varint",
    ),
    "tensor as 32-bit": (lambda: graph_with(tag(5, 5) + bytes(4)), "initializer is stored as 32-"),
    "cut 64-bit": (lambda: graph_with(block(5, tag(10, 1) + bytes(7))), "after its message"),
    "second name": (lambda: graph_with(block(2, b"again")), "GraphProto.name is given twice"),
    "second graph": (
        lambda: small_model().SerializeToString() + block(7, b""),
        "ModelProto.graph is given twice",
    ),
    "location 2": (lambda: graph_with(block(5, tag(14, 0) + b"\x02")), "the data_location 2"),
    "location 1 in disguise": (
        lambda: graph_with(block(5, tag(14, 0) + varint(2**32 + 1))),
        "the data_location 4294967297",
    ),
    "name not UTF-8": (lambda: graph_with(block(5, block(8, b"\xff"))), "is not UTF-8"),
    "node without op_type": (lambda: graph_with(block(1, b"")), "a node has no op_type"),
    "input without name": (lambda: graph_with(block(11, b"")), "input or output has no name"),
    "two inputs of one name": (
        lambda: graph_with(block(11, block(1, b"x"))),
        "two inputs of the same name",
    ),
    "operator set twice": (
        lambda: small_model().SerializeToString() + block(8, block(1, b"ai.onnx") + b"\x10\x14"),
        "the operator set 'ai.onnx' is imported twice",
    ),
    "operator set 0": (
        lambda: small_model().SerializeToString() + block(8, block(1, b"x")),
        "an operator set has the version 0",
    ),
    "empty file": (lambda: b"", "ModelProto has no ir_version"),
    "no graph": (lambda: b"\x08\x0a", "ModelProto has no graph"),
    "ir_version 0": (
        lambda: b"\x08\x00" + small_model().SerializeToString()[2:],
        "ir_version is 0",
    ),
    "not ONNX": (lambda: b"PK\x03\x04" + bytes(60), ""),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", ""),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_bytes_are_refused(tmp_path, case):
    """Each way to be wrong on the wire has its own words, with file and byte."""
    make, reason = MALFORMED[case]
    assert reason in refusal(tmp_path, make())


def test_function_with_another_operator_set_is_refused(tmp_path):
    """A local function cannot bring a version of its own."""
    model = small_model()
    model.functions[0].opset_import[0].version = 19
    assert "a local function imports 'ai.onnx' 19, the model 20" in refusal(tmp_path, model)


def test_function_adds_its_operator_sets(tmp_path):
    """What only a function imports is needed all the same."""
    model = small_model()
    model.functions[0].opset_import.append(helper.make_opsetid("com.microsoft", 1))
    facts = facts_of(tmp_path, model)
    assert facts.opsets == {"ai.onnx": 20, "com.microsoft": 1}
    assert facts.has_functions
    assert facts.op_types == {"ai.onnx::Add": 1, "ai.onnx::Neg": 1}


def test_nesting_is_bounded(tmp_path):
    """Subgraphs in subgraphs end with a refusal, not with the interpreter's stack."""
    data = block(1, b"c")
    for _ in range(2000):
        data = block(6, block(1, block(4, b"If") + block(5, data)))
    assert "nested more than 100 deep" in refusal(tmp_path, graph_with(block(1, block(5, data))))


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("MAX_NODES", 21, "more than 21 nodes"), ("MAX_FIELDS", 50, "more than 50 fields")],
)
def test_work_is_bounded(tmp_path, monkeypatch, limit, value, reason):
    """Node and field counts have caps, so that a file cannot ask for hours."""
    monkeypatch.setattr(onnxfile, limit, value)
    assert reason in refusal(tmp_path, tiny_model())


def test_file_size_is_bounded(tmp_path):
    """A file above the cap is refused before it is read (here: a sparse gigabyte)."""
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadBundle, match="1,073,741,824 bytes, 268,435,456 are allowed"):
        read_onnx_facts(path)
    with pytest.raises(BadBundle, match="10 are allowed"):
        read_onnx_facts(path, max_bytes=10)


@pytest.mark.timeout(20)
def test_special_files_are_refused(tmp_path):
    """Links and FIFOs in a graph's place are not opened."""
    (tmp_path / "m.onnx").write_bytes(small_model().SerializeToString())
    (tmp_path / "link.onnx").symlink_to("m.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("link.onnx", "pipe.onnx", "none.onnx"):
        with pytest.raises(BadBundle):
            read_onnx_facts(tmp_path / name)


def test_every_truncation_is_refused_or_a_smaller_whole(tmp_path):
    """Cut anywhere: refused, or cut between top-level fields, and then read as onnx reads it."""
    data = small_model().SerializeToString()
    accepted = []
    for size in range(len(data)):
        try:
            facts = facts_of(tmp_path, data[:size])
        except BadBundle:
            continue
        accepted.append(size)
        model = onnx.ModelProto.FromString(data[:size])
        assert facts.inputs == tuple(i.name for i in model.graph.input)
        assert len(facts.external) == len(model.graph.initializer) == 1
    # Only after the operator set, before the function.
    assert accepted == [len(data) - len(block(25, small_model().functions[0].SerializeToString()))]
