"""Change single nodes of an ONNX graph file, without the onnx package.

Bytes are taken over as they are; only changed nodes, and the lengths of what holds them, are
written anew. It is for the step between a file that was checked and the library that loads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from edgert.onnxfile import Fields

_INT = 2  # AttributeProto.AttributeType
_GRAPH, _OPSETS, _NODE = (
    Fields.number("ModelProto", "graph"),
    Fields.number("ModelProto", "opset_import"),
    Fields.number("GraphProto", "node"),
)


@dataclass(frozen=True)
class Node:
    """A node of the main graph. `domain` is as the file has it: "" is the standard one.

    numbers  its attributes that are integers
    """

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]
    body: bytes = field(repr=False)

    def moved(self, domain: str) -> bytes:
        """This node, in another domain."""
        fields, kept = Fields(self.body, self.op), []
        for number, _, _, stop, at in fields.each_field(0, len(self.body)):
            if number != Fields.number("NodeProto", "domain"):
                kept.append(self.body[at:stop])
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
        body += _message(Fields.number("NodeProto", "attribute"), attribute)
    return body


class GraphFile:
    """The main graph of a model file's bytes. `name` is the file's, for errors.

    Raises BadBundle for bytes that are malformed on the way to its nodes.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._fields = Fields(data, name)
        self.nodes: list[Node] = []
        self.outputs: set[str] = set()
        self.domains: set[str] = set()
        for at in self._parts("ModelProto", "opset_import", 0, len(data)):
            self.domains |= set(self._texts("OperatorSetIdProto", "domain", *at))
        for start, stop in self._fields.parts("ModelProto", "graph", 0, len(data)):
            self.nodes += [self._node(*at) for at in self._parts("GraphProto", "node", start, stop)]
            for at in self._parts("GraphProto", "output", start, stop):
                self.outputs |= set(self._texts("ValueInfoProto", "name", *at))

    def _parts(self, kind: str, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return self._fields.parts(kind, name, start, stop)

    def _texts(self, kind: str, name: str, start: int, stop: int) -> tuple[str, ...]:
        found = self._parts(kind, name, start, stop)
        return tuple(self._fields.text(at, f"{kind}.{name}") for at in found)

    def _node(self, start: int, stop: int) -> Node:
        def texts(name: str) -> tuple[str, ...]:
            return self._texts("NodeProto", name, start, stop)

        numbers: dict[str, int] = {}
        for at in self._parts("NodeProto", "attribute", start, stop):
            fields = self._fields.each_field(*at)
            found = {number: value for number, wire, value, _, _ in fields if wire == 0}
            if (number := found.get(Fields.number("AttributeProto", "i"))) is not None:
                names = self._texts("AttributeProto", "name", *at)
                signed = number - (1 << 64) if number >= 1 << 63 else number
                numbers |= dict.fromkeys(names, signed)
        return Node(
            op="".join(texts("op_type")),
            domain="".join(texts("domain")),
            inputs=texts("input"),
            outputs=texts("output"),
            numbers=numbers,
            body=self._fields.data[start:stop],
        )

    def with_nodes(self, changed: Mapping[int, bytes | None], domain: str) -> bytes:
        """The file with some nodes, by their place in `nodes`, replaced or (None) left out, and
        with `domain` in version 1 among the operator sets that it imports."""
        data = self._fields.data
        parts: list[bytes] = []
        place = 0
        for number, _, start, stop, at in self._fields.each_field(0, len(data)):
            if number != _GRAPH:
                parts.append(data[at:stop])
                continue
            graph: list[bytes] = []
            for inner, _, _, end, begin in self._fields.each_field(start, stop):
                if inner != _NODE:
                    graph.append(data[begin:end])
                    continue
                body = changed.get(place, b"")
                if body:
                    graph.append(_message(_NODE, body))
                elif body is not None:
                    graph.append(data[begin:end])
                place += 1
            parts.append(_message(_GRAPH, b"".join(graph)))
        entry = _text("OperatorSetIdProto", "domain", domain)
        entry += _number("OperatorSetIdProto", "version", 1)
        parts.append(_message(_OPSETS, entry))
        return b"".join(parts)


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
