"""What an ONNX graph file says about itself, read without the onnx package.

A bounded walk over the protobuf bytes. Its purpose is safety: it finds every tensor that lives
in another file (also inside subgraphs, local functions, attributes and sparse tensors) before
any library opens that file. So it refuses what a library might read in another way: fields that
it does not know, singular fields given twice, wrong wire types, and lengths that do not add up.

Field numbers are those of onnx/onnx.proto, IR version 14 (github.com/onnx/onnx, release 1.23);
the wire format is that of protobuf's encoding document.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgert.errors import BadBundle
from edgert.files import read_regular

MAX_FILE_BYTES = 256 << 20
MAX_NODES = 200_000
MAX_FIELDS = 4_000_000  # bounds the time: about a microsecond each
MAX_DEPTH = 100  # nested messages; protobuf's own default limit
MAX_DIMS = 64

ONNX_DOMAIN = "ai.onnx"
"""How the standard operator set is spelled here; files usually spell it as the empty string."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_NAMES = {_VARINT: "varint", _FIXED64: "64-bit", _BYTES: "bytes", _FIXED32: "32-bit"}


class _Field(NamedTuple):
    name: str
    wires: tuple[int, ...]
    many: bool = False
    message: str = ""  # the message type to walk into; "" if no tensor can be below


def _int(name: str) -> _Field:
    return _Field(name, (_VARINT,))


def _data(name: str) -> _Field:
    return _Field(name, (_BYTES,))


def _list(name: str) -> _Field:
    return _Field(name, (_BYTES,), many=True)


def _packed(name: str, wire: int) -> _Field:
    return _Field(name, (_BYTES, wire), many=True)


def _one(name: str, message: str) -> _Field:
    return _Field(name, (_BYTES,), message=message)


def _many(name: str, message: str) -> _Field:
    return _Field(name, (_BYTES,), many=True, message=message)


_SCHEMA: dict[str, dict[int, _Field]] = {
    "ModelProto": {
        1: _int("ir_version"),
        2: _data("producer_name"),
        3: _data("producer_version"),
        4: _data("domain"),
        5: _int("model_version"),
        6: _data("doc_string"),
        7: _one("graph", "GraphProto"),
        8: _many("opset_import", "OperatorSetIdProto"),
        14: _list("metadata_props"),
        20: _many("training_info", "TrainingInfoProto"),
        25: _many("functions", "FunctionProto"),
        26: _list("configuration"),
    },
    "GraphProto": {
        1: _many("node", "NodeProto"),
        2: _data("name"),
        5: _many("initializer", "TensorProto"),
        10: _data("doc_string"),
        11: _many("input", "ValueInfoProto"),
        12: _many("output", "ValueInfoProto"),
        13: _list("value_info"),
        14: _list("quantization_annotation"),
        15: _many("sparse_initializer", "SparseTensorProto"),
        16: _list("metadata_props"),
    },
    "NodeProto": {
        1: _list("input"),
        2: _list("output"),
        3: _data("name"),
        4: _data("op_type"),
        5: _many("attribute", "AttributeProto"),
        6: _data("doc_string"),
        7: _data("domain"),
        8: _data("overload"),
        9: _list("metadata_props"),
        10: _list("device_configurations"),
    },
    "AttributeProto": {
        1: _data("name"),
        2: _Field("f", (_FIXED32,)),
        3: _int("i"),
        4: _data("s"),
        5: _one("t", "TensorProto"),
        6: _one("g", "GraphProto"),
        7: _packed("floats", _FIXED32),
        8: _packed("ints", _VARINT),
        9: _list("strings"),
        10: _many("tensors", "TensorProto"),
        11: _many("graphs", "GraphProto"),
        13: _data("doc_string"),
        14: _data("tp"),
        15: _list("type_protos"),
        20: _int("type"),
        21: _data("ref_attr_name"),
        22: _one("sparse_tensor", "SparseTensorProto"),
        23: _many("sparse_tensors", "SparseTensorProto"),
    },
    "TensorProto": {
        1: _packed("dims", _VARINT),
        2: _int("data_type"),
        3: _data("segment"),
        4: _packed("float_data", _FIXED32),
        5: _packed("int32_data", _VARINT),
        6: _list("string_data"),
        7: _packed("int64_data", _VARINT),
        8: _data("name"),
        9: _data("raw_data"),
        10: _packed("double_data", _FIXED64),
        11: _packed("uint64_data", _VARINT),
        12: _data("doc_string"),
        13: _many("external_data", "StringStringEntryProto"),
        14: _int("data_location"),
        16: _list("metadata_props"),
    },
    "SparseTensorProto": {
        1: _one("values", "TensorProto"),
        2: _one("indices", "TensorProto"),
        3: _packed("dims", _VARINT),
    },
    "TrainingInfoProto": {
        1: _one("initialization", "GraphProto"),
        2: _one("algorithm", "GraphProto"),
        3: _list("initialization_binding"),
        4: _list("update_binding"),
    },
    "FunctionProto": {
        1: _data("name"),
        4: _list("input"),
        5: _list("output"),
        6: _list("attribute"),
        7: _many("node", "NodeProto"),
        8: _data("doc_string"),
        9: _many("opset_import", "OperatorSetIdProto"),
        10: _data("domain"),
        11: _many("attribute_proto", "AttributeProto"),
        12: _list("value_info"),
        13: _data("overload"),
        14: _list("metadata_props"),
    },
    "ValueInfoProto": {
        1: _data("name"),
        2: _data("type"),
        3: _data("doc_string"),
        4: _list("metadata_props"),
    },
    "OperatorSetIdProto": {1: _data("domain"), 2: _int("version")},
    "StringStringEntryProto": {1: _data("key"), 2: _data("value")},
}

_BITS = dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8)  # uint8 int8 bool float8*
_BITS |= dict.fromkeys((4, 5, 10, 16), 16)  # uint16 int16 float16 bfloat16
_BITS |= dict.fromkeys((1, 6, 12), 32)  # float int32 uint32
_BITS |= dict.fromkeys((7, 11, 13, 14), 64)  # int64 double uint64 complex64
_BITS |= {15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2}  # complex128 (u)int4 float4 (u)int2

# Other keys change where or what a library reads: basepath, and ONNX Runtime's prepacked_*.
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")
_DECIMAL = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True)
class ExternalRef:
    """A tensor whose `length` bytes are stored at `offset` of the file `location`."""

    tensor_name: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxFacts:
    """What one graph file declares. Domains are spelled out: "ai.onnx", never ""."""

    ir_version: int
    opsets: dict[str, int]  # of the model and of its local functions
    inputs: tuple[str, ...]  # of the main graph, in order
    outputs: tuple[str, ...]
    external: tuple[ExternalRef, ...]  # wherever in the file, in file order
    op_types: dict[str, int]  # "domain::op" -> nodes, subgraphs and functions included
    node_count: int
    has_functions: bool
    has_training: bool


def read_onnx_facts(path: Path, max_bytes: int = MAX_FILE_BYTES) -> OnnxFacts:
    """Walk the whole of an ONNX model file and report what it declares and refers to.

    External tensors must carry a location, and an offset and length in decimal; the length must
    be that of the tensor's shape and type. Locations are reported as they are: the caller
    decides which ones it accepts. Subgraph and function contents count in `op_types`.
    Raises BadBundle, naming the file and the byte, for anything malformed or out of bounds.
    """
    return _Walk(read_regular(path, max_bytes), str(path)).model()


class Fields:
    """The fields of protobuf messages in a file's bytes. `name` is the file's, for errors."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        self.fields = 0

    @staticmethod
    @cache
    def number(kind: str, field: str) -> int:
        """The number that a field has in a message of this kind."""
        return next(number for number, found in _SCHEMA[kind].items() if found.name == field)

    def refuse(self, what: str, at: int) -> NoReturn:
        raise BadBundle(
            f"not a sound ONNX file: {what}",
            where=f"{self.name}, byte {at}",
            do="export the model again, or copy the file again from its source",
        )

    def each_field(self, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (number, wire, value, stop, at): a varint's value, else where the bytes are."""
        data, at = self.data, start
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                self.refuse(f"it has more than {MAX_FIELDS:,} fields", at)
            # Most varints are one byte; a call for each would double the time.
            if data[at] < 0x80:
                tag, pos = data[at], at + 1
            else:
                tag, pos = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if not 1 <= number < 1 << 29:
                self.refuse(f"a field has the number {number}", at)
            if wire == _VARINT:
                if pos < end and data[pos] < 0x80:
                    value, stop = data[pos], pos + 1
                else:
                    value, stop = self.varint(pos, end)
            elif wire == _BYTES:
                if pos < end and data[pos] < 0x80:
                    length, value = data[pos], pos + 1
                else:
                    length, value = self.varint(pos, end)
                stop = value + length
            elif wire in (_FIXED64, _FIXED32):
                value, stop = pos, pos + (8 if wire == _FIXED64 else 4)
            else:
                self.refuse(f"field {number} has the wire type {wire}", at)
            if stop > end:
                self.refuse(f"field {number} ends {stop - end:,} bytes after its message", at)
            yield number, wire, value, stop, at
            at = stop

    def parts(self, kind: str, field: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the bytes of each `field` are in the message of this kind from start to end."""
        number = self.number(kind, field)
        for found, wire, value, stop, at in self.each_field(start, end):
            if found == number:
                if wire != _BYTES:
                    self.refuse(f"{kind}.{field} is stored as {_WIRE_NAMES[wire]}", at)
                yield value, stop

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for pos in range(at, min(at + 10, end)):
            byte = self.data[pos]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    self.refuse("a varint exceeds 64 bits", at)
                return value, pos + 1
            shift += 7
        self.refuse("a varint has more than 10 bytes" if at + 10 <= end else "it is cut off", at)

    def text(self, span: tuple[int, int] | None, what: str) -> str:
        start, stop = span or (0, 0)
        if stop - start > 4096:
            self.refuse(f"{what} has {stop - start:,} bytes", start)
        try:
            return self.data[start:stop].decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8", start)


class _Walk(Fields):
    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data, name)
        self.nodes = 0
        self.external: list[ExternalRef] = []
        self.ops: Counter[str] = Counter()

    def model(self) -> OnnxFacts:
        model = self.message("ModelProto", 0, len(self.data), 0)
        end = len(self.data)
        for needed in ("ir_version", "graph", "opset_import"):
            if needed not in model:
                self.refuse(f"ModelProto has no {needed}", end)
        if not 1 <= model["ir_version"] < 1 << 31:
            self.refuse(f"ir_version is {model['ir_version']}", 0)
        opsets: dict[str, int] = {}
        imports = list(model["opset_import"])
        for domain, version in imports:
            if domain in opsets:
                self.refuse(f"the operator set {domain!r} is imported twice", end)
            opsets[domain] = version
        for function in model.get("functions", []):
            for domain, version in function:
                if opsets.setdefault(domain, version) != version:
                    self.refuse(
                        f"a local function imports {domain!r} {version}, "
                        f"the model {opsets[domain]}",
                        end,
                    )
        graph = model["graph"]
        return OnnxFacts(
            ir_version=model["ir_version"],
            opsets=opsets,
            inputs=graph["input"],
            outputs=graph["output"],
            external=tuple(self.external),
            op_types=dict(self.ops),
            node_count=self.nodes,
            has_functions="functions" in model,
            has_training="training_info" in model,
        )

    def message(self, kind: str, start: int, end: int, depth: int) -> Any:
        """Walk one message and return what its reader makes of it (its fields if it has none)."""
        if depth > MAX_DEPTH:
            self.refuse(f"messages are nested more than {MAX_DEPTH} deep", start)
        schema = _SCHEMA[kind]
        found: dict[str, Any] = {}
        for number, wire, value, stop, at in self.each_field(start, end):
            field = schema.get(number)
            if field is None:
                self.refuse(f"{kind} has the unknown field {number}", at)
            if wire not in field.wires:
                self.refuse(f"{kind}.{field.name} is stored as {_WIRE_NAMES[wire]}", at)
            if field.message:
                item = self.message(field.message, value, stop, depth + 1)
            else:
                item = value if wire == _VARINT else (value, stop)
            if field.many:
                if item is not None and (field.message or field.name == "dims"):
                    found.setdefault(field.name, []).append(item)
            elif field.name in found:
                self.refuse(f"{kind}.{field.name} is given twice", at)
            else:
                found[field.name] = item
        read = getattr(self, "read_" + kind, None)
        return found if read is None else read(found, start)

    def read_StringStringEntryProto(self, found: dict[str, Any], start: int) -> tuple[str, str]:
        return self.text(found.get("key"), "a key"), self.text(found.get("value"), "a value")

    def read_OperatorSetIdProto(self, found: dict[str, Any], start: int) -> tuple[str, int]:
        version = found.get("version", 0)
        if not 1 <= version < 1 << 31:
            self.refuse(f"an operator set has the version {version}", start)
        return self.text(found.get("domain"), "a domain") or ONNX_DOMAIN, version

    def read_ValueInfoProto(self, found: dict[str, Any], start: int) -> str:
        name = self.text(found.get("name"), "the name of an input or output")
        if not name:
            self.refuse("an input or output has no name", start)
        return name

    def read_GraphProto(self, found: dict[str, Any], start: int) -> dict[str, tuple[str, ...]]:
        ports = {}
        for port in ("input", "output"):
            names = tuple(found.get(port, ()))
            if len(set(names)) != len(names):
                self.refuse(f"a graph has two {port}s of the same name", start)
            ports[port] = names
        return ports

    def read_FunctionProto(self, found: dict[str, Any], start: int) -> list[tuple[str, int]]:
        return list(found.get("opset_import", ()))

    def read_NodeProto(self, found: dict[str, Any], start: int) -> None:
        op = self.text(found.get("op_type"), "an operator's name")
        if not op:
            self.refuse("a node has no op_type", start)
        self.ops[f"{self.text(found.get('domain'), 'a domain') or ONNX_DOMAIN}::{op}"] += 1
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.refuse(f"it has more than {MAX_NODES:,} nodes", start)

    def read_TensorProto(self, found: dict[str, Any], start: int) -> None:
        name = self.text(found.get("name"), "a tensor's name")
        place, entries = found.get("data_location", 0), found.get("external_data", [])
        if place not in (0, 1):
            self.refuse(f"tensor {name!r} has the data_location {place}", start)
        if place == 0:
            if entries:
                self.refuse(f"tensor {name!r} names a file but is not stored outside", start)
            return
        keys = dict(entries)
        if len(keys) != len(entries):
            self.refuse(f"tensor {name!r} gives a key of external_data twice", start)
        for key in keys:
            if key not in _EXTERNAL_KEYS:
                self.refuse(f"tensor {name!r} has the external_data key {key[:40]!r}", start)
        if not keys.get("location"):
            self.refuse(f"tensor {name!r} is stored outside but names no file", start)
        for key in ("offset", "length"):
            number = keys.get(key, "0" if key == "offset" else "")
            if not _DECIMAL.fullmatch(number) or int(number) >= 1 << 63:
                self.refuse(f"tensor {name!r} has the {key} {number[:40]!r}", start)
        length, needs = int(keys["length"]), self.tensor_bytes(found, name, start)
        if length != needs:
            self.refuse(
                f"tensor {name!r} stores {length:,} bytes, its shape takes {needs:,}", start
            )
        self.external.append(
            ExternalRef(name, keys["location"], int(keys.get("offset", "0")), length)
        )

    def tensor_bytes(self, found: dict[str, Any], name: str, start: int) -> int:
        data_type = found.get("data_type", 0)
        bits = _BITS.get(data_type)
        if bits is None:
            self.refuse(f"tensor {name!r} of data_type {data_type} cannot be stored outside", start)
        dims: list[int] = []
        for item in found.get("dims", []):
            at, stop = item if isinstance(item, tuple) else (0, 0)
            if not isinstance(item, tuple):
                dims.append(item)
            while at < stop and len(dims) <= MAX_DIMS:
                dim, at = self.varint(at, stop)
                dims.append(dim)
        if len(dims) > MAX_DIMS:
            self.refuse(f"tensor {name!r} has more than {MAX_DIMS} dimensions", start)
        count = 1
        for dim in dims:
            if dim >= 1 << 63:
                self.refuse(f"tensor {name!r} has a negative dimension", start)
            count *= dim
        return (count * bits + 7) // 8
