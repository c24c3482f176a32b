"""Change single nodes of an ONNX graph file, without the onnx package.

Bytes are taken over as they are; only changed nodes, and the lengths of what holds them, are
written anew. It is for the step between a file that was checked and the library that loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from edgert.onnxfile import Fields

_VARINT, _BYTES = 0, 2  # wire types: of integers, of what has a length

_INT = 2  # AttributeProto.AttributeType
_GRAPH, _OPSETS = (Fields.number("ModelProto", name) for name in ("graph", "opset_import"))
_NODE, _OUTPUT = (Fields.number("GraphProto", name) for name in ("node", "output"))
_NAME, _I = (Fields.number("AttributeProto", name) for name in ("name", "i"))
_IN, _OUT, _OP, _DOMAIN, _ATTRIBUTE = (
    Fields.number("NodeProto", name)
    for name in ("input", "output", "op_type", "domain", "attribute")
)


class Node(NamedTuple):
    """A node of the main graph. `domain` is as the file has it: "" is the standard one."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: bytes

    def numbers(self) -> dict[str, int]:
        """Its attributes that are integers, by name."""
        fields, found = Fields(self.body, self.op), {}
        for start, stop in fields.parts("NodeProto", "attribute", 0, len(self.body)):
            name, number = "", None
            for field, wire, value, end, at in fields.each_field(start, stop):
                if field == _NAME:
                    if wire != _BYTES:
                        fields.refuse("a name is stored as a number", at)
                    name = fields.text((value, end), "a name")
                elif (field, wire) == (_I, _VARINT):
                    number = value - (1 << 64) if value >= 1 << 63 else value
            if number is not None:
                found[name] = number
        return found

    def moved(self, domain: str) -> bytes:
        """This node, in another domain."""
        fields = Fields(self.body, self.op).each_field(0, len(self.body))
        kept = [self.body[at:stop] for number, _, _, stop, at in fields if number != _DOMAIN]
        return b"".join(kept) + _text("NodeProto", "domain", domain)


def new_node(
    op: str, domain: str, inputs: Iterable[str], outputs: Iterable[str], **numbers: int
) -> bytes:
    """A node; `numbers` are its attributes."""
    ports = [("input", name) for name in inputs] + [("output", name) for name in outputs]
    named = [*ports, ("op_type", op), ("domain", domain)]
    body = b"".join(_text("NodeProto", name, text) for name, text in named)
    for name, number in numbers.items():
        attribute = (
            _text("AttributeProto", "name", name)
            + _number("AttributeProto", "i", number)
            + _number("AttributeProto", "type", _INT)
        )
        body += _message(_ATTRIBUTE, attribute)
    return body


class GraphFile:
    """The main graph of a model file's bytes. `name` is the file's, for errors.

    Raises BadBundle for bytes that are malformed on the way to its nodes.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._fields = fields = Fields(data, name)
        self.nodes: list[Node] = []
        self.outputs: set[str] = set()
        self.domains: set[str] = set()
        self._graph = (0, 0, 0)  # where its field begins, its bytes begin, and they end
        self._spans: list[tuple[int, int]] = []  # of each node's field
        for number, wire, start, stop, at in fields.each_field(0, len(data)):
            if number in (_GRAPH, _OPSETS) and wire != _BYTES:
                fields.refuse("a message is stored as a number", at)
            if number == _OPSETS:
                names = fields.parts("OperatorSetIdProto", "domain", start, stop)
                self.domains |= {fields.text(span, "a domain") for span in names}
            elif number == _GRAPH:
                if self.nodes:
                    fields.refuse("there are two graphs", at)
                self._graph = (at, start, stop)
                self._read(start, stop)

    def _read(self, start: int, stop: int) -> None:
        fields = self._fields
        for number, wire, value, end, at in fields.each_field(start, stop):
            if number in (_NODE, _OUTPUT) and wire != _BYTES:
                fields.refuse("a message is stored as a number", at)
            if number == _NODE:
                self.nodes.append(self._node(value, end))
                self._spans.append((at, end))
            elif number == _OUTPUT:
                names = fields.parts("ValueInfoProto", "name", value, end)
                self.outputs |= {fields.text(span, "a name") for span in names}

    def _node(self, start: int, stop: int) -> Node:
        texts: dict[int, list[str]] = {_IN: [], _OUT: [], _OP: [], _DOMAIN: []}
        for number, wire, value, end, at in self._fields.each_field(start, stop):
            found = texts.get(number)
            if found is not None:
                if wire != _BYTES:
                    self._fields.refuse("a name is stored as a number", at)
                found.append(self._fields.text((value, end), "a name"))
        return Node(
            "".join(texts[_OP]),
            "".join(texts[_DOMAIN]),
            tuple(texts[_IN]),
            tuple(texts[_OUT]),
            self._fields.data[start:stop],
        )

    def with_nodes(self, changed: Mapping[int, bytes | None], domain: str) -> bytes:
        """The file with some nodes, by their place in `nodes`, replaced or (None) left out, and
        with `domain` in version 1 among the operator sets that it imports."""
        data = self._fields.data
        begin, place, stop = self._graph
        graph: list[bytes] = []
        for number in sorted(changed):
            at, end = self._spans[number]
            graph.append(data[place:at])
            body = changed[number]
            if body is not None:
                graph.append(_message(_NODE, body))
            place = end
        graph.append(data[place:stop])
        entry = _text("OperatorSetIdProto", "domain", domain)
        entry += _number("OperatorSetIdProto", "version", 1)
        parts = (data[:begin], _message(_GRAPH, b"".join(graph)), data[stop:])
        return b"".join(parts) + _message(_OPSETS, entry)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _number(kind: str, name: str, value: int) -> bytes:
    return _varint(Fields.number(kind, name) << 3) + _varint(value % (1 << 64))


def _text(kind: str, name: str, text: str) -> bytes:
    return _message(Fields.number(kind, name), text.encode())
