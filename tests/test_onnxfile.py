"""The bounded walk over ONNX files: finds every external tensor, refuses what is not sound."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from edgert import onnxfile
from edgert.errors import BadBundle
from edgert.onnxfile import ExternalRef, read_onnx_facts

# Apart, since an output folder bundles/ beside it would change how the linter sorts this name.
# isort: split
from bundles import external, tiny_model


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


def messages_of(descriptor, seen=None):
    """Every message type reachable from a descriptor, by name."""
    seen = {} if seen is None else seen
    if descriptor.name not in seen:
        seen[descriptor.name] = descriptor
        for field in descriptor.fields:
            if field.message_type:
                messages_of(field.message_type, seen)
    return seen


def _many(field) -> bool:
    modern = getattr(field, "is_repeated", None)
    return bool(modern) if modern is not None else field.label == field.LABEL_REPEATED


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
            assert ours.many == _many(field)
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


EVIL = {"location": "../evil", "offset": "0", "length": "8"}


def evil() -> TensorProto:
    return external("hidden", [2], **EVIL)


def sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=evil(), indices=external("i", [2], **EVIL), dims=[4])


def holder(**attribute) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="a", **attribute)
    return node


def subgraph(**parts) -> onnx.GraphProto:
    return onnx.GraphProto(name="sub", **parts)


def function(**parts) -> onnx.FunctionProto:
    return onnx.FunctionProto(name="f", domain="own", **parts)


def nested(node: onnx.NodeProto, levels: int) -> onnx.NodeProto:
    for _ in range(levels):
        node = holder(type=AttributeProto.GRAPH, g=subgraph(node=[node]))
    return node


PLACES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "initializer": lambda m: m.graph.initializer.append(evil()),
    "sparse initializer": lambda m: m.graph.sparse_initializer.append(sparse()),
    "attribute t": lambda m: m.graph.node.append(holder(type=4, t=evil())),
    "attribute tensors": lambda m: m.graph.node.append(holder(type=9, tensors=[evil()])),
    "attribute of a lying type": lambda m: m.graph.node.append(holder(type=1, t=evil())),
    "attribute sparse": lambda m: m.graph.node.append(holder(sparse_tensor=sparse())),
    "attribute sparses": lambda m: m.graph.node.append(holder(sparse_tensors=[sparse()])),
    "subgraph": lambda m: m.graph.node.append(holder(g=subgraph(initializer=[evil()]))),
    "subgraph sparse": lambda m: m.graph.node.append(
        holder(g=subgraph(sparse_initializer=[sparse()]))
    ),
    "subgraphs": lambda m: m.graph.node.append(holder(graphs=[subgraph(initializer=[evil()])])),
    "deep subgraph": lambda m: m.graph.node.append(nested(holder(t=evil()), 20)),
    "function node": lambda m: m.functions.append(function(node=[holder(t=evil())])),
    "function subgraph": lambda m: m.functions.append(function(node=[nested(holder(t=evil()), 2)])),
    "function default": lambda m: m.functions.append(
        function(attribute_proto=[AttributeProto(name="a", t=evil())])
    ),
    "training start": lambda m: m.training_info.append(
        onnx.TrainingInfoProto(initialization=subgraph(initializer=[evil()]))
    ),
    "training step": lambda m: m.training_info.append(
        onnx.TrainingInfoProto(algorithm=subgraph(node=[holder(t=evil())]))
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_hidden_external_tensor_is_found(tmp_path, place):
    """A tensor stored outside is found wherever the format lets it stand."""
    model = small_model()
    PLACES[place](model)
    found = [ref for ref in facts_of(tmp_path, model).external if ref.location == "../evil"]
    assert ExternalRef("hidden", "../evil", 0, 8) in found
    assert len(found) == (2 if "sparse" in place else 1)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize(
    "number", ["", "-1", "+8", " 8", "8 ", "0x8", "8.0", "1e1", "٨", "９", "9" * 20, str(2**63)]
)
def test_place_in_the_file_must_be_decimal(tmp_path, key, number):
    """Offset and length that a library might read in its own way are refused."""
    model = small_model()
    model.graph.initializer.append(
        external("h", [2], **{"location": "w.data", "offset": "0", "length": "8", key: number})
    )
    assert f"tensor 'h' has the {key} {number!r}" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"offset": "0", "length": "8"}, "names no file"),
        ({"location": "", "length": "8"}, "names no file"),
        ({}, "names no file"),
        ({"location": "w"}, "has the length ''"),
        ({**EVIL, "basepath": "/"}, "external_data key 'basepath'"),
        ({**EVIL, "prepacked_0": "x|0;8;0"}, "external_data key 'prepacked_0'"),
        ({**EVIL, "length": "12"}, "stores 12 bytes, its shape takes 8"),
        ({**EVIL, "length": "0"}, "stores 0 bytes, its shape takes 8"),
        ({**EVIL, "location": "x" * 5000}, "a value has 5,000 bytes"),
    ],
)
def test_unsound_external_data_is_refused(tmp_path, keys, reason):
    """A tensor stored outside must say where, and how much, in the standard keys alone."""
    model = small_model()
    model.graph.initializer.append(external("h", [2], **keys))
    assert reason in refusal(tmp_path, model)


def test_offset_and_checksum_are_optional(tmp_path):
    """A missing offset is 0; a checksum is allowed (the bundle has its own)."""
    model = small_model()
    model.graph.initializer.append(external("h", [2], location="w", length="8", checksum="00"))
    assert ExternalRef("h", "w", 0, 8) in facts_of(tmp_path, model).external


def test_key_given_twice_is_refused(tmp_path):
    """Two locations: one for the check, one for the library. Not here."""
    model = small_model()
    tensor = evil()
    tensor.external_data.add(key="location", value="w.data")
    model.graph.initializer.append(tensor)
    assert "gives a key of external_data twice" in refusal(tmp_path, model)


def test_location_without_external_marker_is_refused(tmp_path):
    """Entries that some library may heed although the tensor says it is stored inside."""
    model = small_model()
    tensor = evil()
    tensor.data_location = TensorProto.DEFAULT
    model.graph.initializer.append(tensor)
    assert "names a file but is not stored outside" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("data_type", "dims", "reason"),
    [
        (TensorProto.STRING, [2], "data_type 8 cannot be stored outside"),
        (0, [2], "data_type 0 cannot"),
        (99, [2], "data_type 99 cannot"),
        (TensorProto.FLOAT, [-2], "negative dimension"),
        (TensorProto.FLOAT, [2**62, 2**62], "its shape takes 85,070"),
        (TensorProto.FLOAT, [1] * 65, "more than 64 dimensions"),
    ],
)
def test_shape_and_type_of_an_external_tensor_must_fit(tmp_path, data_type, dims, reason):
    """What a library would read is computed here first; nonsense is refused."""
    model = small_model()
    tensor = evil()
    tensor.data_type = data_type
    tensor.dims[:] = dims
    model.graph.initializer.append(tensor)
    assert reason in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("data_type", "dims", "length"),
    [
        (TensorProto.FLOAT, [], 4),
        (TensorProto.FLOAT, [0, 5], 0),
        (TensorProto.FLOAT16, [3, 5], 30),
        (TensorProto.INT4, [3], 2),
        (TensorProto.INT64, [2, 2], 32),
    ],
)
def test_bytes_of_a_tensor(tmp_path, data_type, dims, length):
    """Scalars, empty tensors and half bytes are counted as they are stored."""
    model = small_model()
    tensor = external("h", dims, location="w", length=str(length))
    tensor.data_type = data_type
    model.graph.initializer.append(tensor)
    assert ExternalRef("h", "w", 0, length) in facts_of(tmp_path, model).external


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


def test_packed_and_single_dims_are_the_same(tmp_path):
    """Both encodings of a repeated number are read, mixed ones too."""
    entries = b"".join(
        block(13, block(1, k.encode()) + block(2, v.encode()))
        for k, v in {"location": "w", "length": "24"}.items()
    )
    rest = tag(2, 0) + b"\x01" + block(8, b"h") + entries + tag(14, 0) + b"\x01"
    for dims in (block(1, b"\x02\x03"), b"\x08\x02\x08\x03", b"\x08\x02" + block(1, b"\x03")):
        data = small_model().SerializeToString()
        graph = small_model().graph.SerializeToString() + block(5, dims + rest)
        head, tail = data.split(block(7, small_model().graph.SerializeToString()))
        facts = facts_of(tmp_path, head + block(7, graph) + tail)
        assert ExternalRef("h", "w", 0, 24) in facts.external


def graph_with(extra: bytes) -> bytes:
    """The small model with raw bytes appended to its graph."""
    inner = small_model().graph.SerializeToString()
    head, tail = small_model().SerializeToString().split(block(7, inner))
    return head + block(7, inner + extra) + tail


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


def locations(message) -> list[str]:
    """By onnx's own classes: the location of every external tensor at any depth."""
    found = []
    if message.DESCRIPTOR.name == "TensorProto" and message.data_location == TensorProto.EXTERNAL:
        found = [entry.value for entry in message.external_data if entry.key == "location"]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if _many(field) else [value]:
                found += locations(item)
    return found


def test_damaged_file_never_hides_a_location(tmp_path):
    """Thousands of damaged files: refused with a typed error, or read as protobuf reads them."""
    model = small_model()
    PLACES["deep subgraph"](model)
    PLACES["function default"](model)
    good, rng, accepted = model.SerializeToString(), random.Random(1), 0
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0xFF])
        try:
            facts = facts_of(tmp_path, bytes(data))
        except BadBundle:
            continue
        accepted += 1
        try:
            read = onnx.ModelProto.FromString(bytes(data))
        except DecodeError:
            continue  # protobuf refuses more: no library opens it
        assert sorted(locations(read)) == sorted(ref.location for ref in facts.external)
    assert accepted > 400
