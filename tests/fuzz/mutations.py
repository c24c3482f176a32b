"""Sound inputs made unsound: bytes and JSON values, changed where parsers look.

A wholly random file fails at its first byte. So most examples are a sound seed with a few changes:
bits, cuts, splices, numbers at the edges of their types, keys lost or given twice, deep nesting.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

EDGES = sorted(
    {0, 1, 2, 3, 7, 8, 31, 32, 255, 256, 4095, 65535}
    | {sign * (1 << bits) + near for bits in (31, 32, 53, 63, 64) for sign in (1, -1)
       for near in (-1, 0, 1)}
)  # fmt: skip
TEXTS = [
    *("", " ", "a", "0", "-1", "1e999", "\0", "\n", "\x1b[31m", "\ud800", "\u202e", "é", "🙂"),
    *("../x", "/etc/passwd", "a/../../b", "a//b", ".", "..", "C:\\x", "x" * 300, "x" * 5000),
    *("$A", "$B:1", "a:0", "<0x41>", "self", "__class__", "true", "NaN", "batch"),
]


class Raw(str):
    """JSON text that is written as it is."""


NESTED = [Raw(opening * n + closing * n) for opening, closing in ("[]",) for n in (20, 200, 20000)]
NESTED.append(Raw('{"a":' * 3000 + "1" + "}" * 3000))
NUMBERS = [Raw(text) for text in ("NaN", "-Infinity", "1e400", "-0", "1" * 5000, "1.5", "1e-400")]


def scalars() -> st.SearchStrategy[Any]:
    """Values for where something else stood."""
    return st.one_of(
        st.sampled_from(EDGES),
        st.sampled_from(TEXTS),
        st.sampled_from([None, True, False, 0.5, -1.0, 1e308, 5e-324, [], {}, [[]], [0], {"a": 1}]),
        st.integers(-5, 300),
        st.text(max_size=8),
        st.floats(),
    )


def written() -> st.SearchStrategy[Any]:
    """What can stand in JSON text, sound or not."""
    return st.one_of(scalars(), st.sampled_from([*NESTED, *NUMBERS]))


# ------------------------------------------------- bytes


def _span(draw: Draw, data: bytearray, hot: int) -> tuple[int, int]:
    """Where to change: mostly in the first `hot` bytes, which hold what describes the rest."""
    end = len(data) if draw(st.integers(0, 3)) == 0 else min(hot, len(data))
    start = draw(st.integers(0, max(end - 1, 0)))
    return start, min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 16, 64, 512])))


def _flip(draw: Draw, data: bytearray, hot: int) -> None:
    at, _ = _span(draw, data, hot)
    data[at : at + 1] = bytes(b ^ (1 << draw(st.integers(0, 7))) for b in data[at : at + 1])


def _number(draw: Draw, data: bytearray, hot: int) -> None:
    at, _ = _span(draw, data, hot)
    size = draw(st.sampled_from([1, 2, 4, 8]))
    value = draw(st.sampled_from(EDGES)) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, draw(st.sampled_from(["little", "big"])))


def _bytes(draw: Draw, data: bytearray, hot: int) -> None:
    start, end = _span(draw, data, hot)
    data[start : draw(st.sampled_from([start, end]))] = draw(st.binary(max_size=16))


def _cut(draw: Draw, data: bytearray, hot: int) -> None:
    start, end = _span(draw, data, hot)
    del data[start : draw(st.sampled_from([end, len(data)]))]


def _splice(draw: Draw, data: bytearray, hot: int) -> None:
    """A piece of the data moved, doubled or many times over."""
    start, end = _span(draw, data, hot)
    at, _ = _span(draw, data, hot)
    data[at:at] = data[start:end] * draw(st.sampled_from([1, 1, 2, 100]))


_CHANGES = [_flip, _number, _bytes, _cut, _splice]


def change_bytes(draw: Draw, seed: bytes, hot: int = 1 << 30) -> bytes:
    """`seed` with one to four changes, mostly with one."""
    data = bytearray(seed)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        draw(st.sampled_from(_CHANGES))(draw, data, hot)
    return bytes(data)


@st.composite
def bytes_like(draw: Draw, seeds: Sequence[bytes], hot: int = 1 << 30, magic: bytes = b"") -> bytes:
    """Changed seeds; one example in ten is arbitrary, half of those behind `magic`."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([b"", magic])) + draw(st.binary(max_size=256))
    return change_bytes(draw, draw(st.sampled_from(seeds)), hot)


# ------------------------------------------------- JSON


def dump(value: Any) -> str:
    """JSON text; `Raw` parts go in as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def change_value(draw: Draw, seed: Any, leaves: st.SearchStrategy[Any]) -> Any:
    """A copy of a JSON value with one to four changes; new values come from `leaves`."""
    root = [copy.deepcopy(seed)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        places = list(_places(root))
        container, key = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["set", "set", "drop", "rename", "copy", "repeat", "add"]))
        if what == "drop" and container is not root:
            del container[key]
        elif what == "rename" and isinstance(container, dict):
            container[draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=5)))] = container.pop(
                key
            )
        elif what == "copy":
            other, place = places[draw(st.integers(0, len(places) - 1))]
            container[key] = copy.deepcopy(other[place])
        elif what == "repeat" and isinstance(container[key], list):
            container[key] = container[key] * draw(st.sampled_from([2, 3, 50]))
        elif what == "add" and isinstance(container[key], dict):
            container[key][draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(leaves))
        else:
            container[key] = copy.deepcopy(draw(leaves))  # the strategy keeps the original
    return root[0]


@st.composite
def values_like(draw: Draw, seeds: Sequence[Any], leaves: st.SearchStrategy[Any]) -> Any:
    return change_value(draw, draw(st.sampled_from(seeds)), leaves)


@st.composite
def json_like(draw: Draw, seeds: Sequence[Any]) -> bytes:
    """JSON files: changed values, keys given twice, changed text, and arbitrary bytes."""
    way = draw(st.sampled_from(["value"] * 6 + ["twice", "text", "text", "bytes"]))
    if way == "bytes":
        return draw(st.binary(max_size=64))
    seed = draw(st.sampled_from(seeds))
    if way == "text":
        return change_bytes(draw, json.dumps(seed).encode())
    text = dump(change_value(draw, seed, written()))
    if way == "twice" and '":' in text:
        keys = [at for at in range(len(text)) if text[at] == "{"][:50]
        at = draw(st.sampled_from(keys)) + 1 if keys else 0
        key = json.dumps(draw(st.sampled_from(sorted(seed) if isinstance(seed, dict) else ["a"])))
        text = f"{text[:at]}{key}:{dump(draw(written()))},{text[at:]}"
    return text.encode("utf-8", "surrogatepass")


def toml_text(table: Any) -> bytes:
    """Any value as the text of a TOML file; what is no table stands for its first key."""
    items = table.items() if isinstance(table, dict) else [("format_version", table)]
    lines = [f"{json.dumps(key)} = {_toml(value)}\n" for key, value in items]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
