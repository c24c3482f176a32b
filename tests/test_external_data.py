"""Tensors stored outside an ONNX file: found wherever they hide, refused where not sound."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
import pytest
from bundles import external
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper
from small_onnx import block, facts_of, is_repeated, refusal, small_model, tag

from edgert.errors import BadBundle
from edgert.onnxfile import ExternalRef

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


def locations(message) -> list[str]:
    """By onnx's own classes: the location of every external tensor at any depth."""
    found = []
    if message.DESCRIPTOR.name == "TensorProto" and message.data_location == TensorProto.EXTERNAL:
        found = [entry.value for entry in message.external_data if entry.key == "location"]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if is_repeated(field) else [value]:
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
