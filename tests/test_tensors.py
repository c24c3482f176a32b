"""Sealed files: what is written is read back bit for bit, and nothing else is read at all."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edgert.tensors import MAX_HEADER, SEAL_BYTES, Sealed, Unsound, read_sealed, sealed_chunks

TEXTS = {"edgert": "test", "umlaut": "ä\n\U0001f600", "quotes": '"\\'}


def written(texts: dict[str, str], arrays: dict[str, Any]) -> bytes:
    return b"".join(sealed_chunks(texts, arrays))


def sealed(header: bytes, body: bytes = b"") -> bytes:
    """A file with this header and these bytes of tensors, and the seal that belongs to them."""
    content = len(header).to_bytes(8, "little") + header + body
    return content + hashlib.sha256(content).digest()


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def spelled(table: dict[str, Any], body: bytes = b"", **options: Any) -> bytes:
    """A table in edgert's own spelling, if `options` of json.dumps do not say otherwise."""
    text = json.dumps(table, **{"separators": (",", ":")} | options).encode()
    return sealed(text + b" " * (-len(text) % 8), body)


def table(tensors: dict[str, Any], end: int) -> dict[str, Any]:
    seal = {"seal": entry("U8", [SEAL_BYTES], end, end + SEAL_BYTES)}
    return {"__metadata__": {"a": "b"}} | tensors | seal


def refused(data: bytes) -> str:
    with pytest.raises(Unsound) as caught:
        read_sealed(data)
    return str(caught.value)


def test_every_dtype_and_shape_comes_back_bit_for_bit():
    """Also NaN with a payload, -0.0, no elements, no axes, and odd offsets; read-only."""
    rng = np.random.default_rng(3)
    arrays = {
        "truth": np.array([True, False, True]),  # puts all that follows at odd offsets
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 1, 3)).astype(np.float16),
        "i64": np.array([-(2**63), 2**63 - 1]),
        "i32": np.array([[-(2**31)], [2**31 - 1]], np.int32),
        "i8": np.arange(-128, 128, dtype=np.int8),
        "u8": np.arange(256, dtype=np.uint8),
        "odd": np.array([0x7FC12345, 0x80000000, 0xFF800000], np.uint32).view(np.float32),
        "empty": np.zeros((0, 7), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    back = read_sealed(written(TEXTS, arrays))
    assert back.texts == TEXTS
    assert list(back.arrays) == list(arrays)
    for name, array in arrays.items():
        got = back.arrays[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert got.tobytes() == array.tobytes(), name
        assert not got.flags.writeable


def test_views_and_foreign_byte_orders_are_written_as_what_they_mean():
    """The file is little-endian and in C order, wherever the numbers came from."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"strided": base[::2, ::-3], "turned": base.T, "big": np.arange(5, dtype=">i8")}
    back = read_sealed(written({}, arrays)).arrays
    for name, array in arrays.items():
        assert np.array_equal(back[name], array), name
    assert back["big"].dtype == np.dtype("<i8")


def test_writing_makes_no_second_copy_of_an_array():
    array = np.zeros(1000, np.float32)
    chunks = list(sealed_chunks({}, {"a": array}))
    assert any(np.shares_memory(np.frombuffer(chunk, np.uint8), array) for chunk in chunks)


def test_any_safetensors_reader_opens_it():
    """The `safetensors` package gives the same tensors, and the seal as one of them."""
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ok": np.array([True])}
    data = written(TEXTS, arrays)
    got = safetensors.numpy.load(data)
    assert np.array_equal(got["x"], arrays["x"])
    assert np.array_equal(got["ok"], arrays["ok"])
    assert got["seal"].tobytes() == hashlib.sha256(data[:-SEAL_BYTES]).digest()


def test_the_same_content_is_the_same_bytes():
    arrays = {"x": np.arange(6)}
    assert written(TEXTS, arrays) == written(dict(TEXTS), {"x": np.arange(6)})
    back = read_sealed(written(TEXTS, arrays))
    assert written(back.texts, back.arrays) == written(TEXTS, arrays)


def test_every_flipped_bit_every_cut_and_every_addition_is_refused():
    """Each of the file's 8 x N bits, each of its N prefixes, and a byte more at either end."""
    data = written({"a": "b"}, {"x": np.arange(3, dtype=np.int8)})
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(bytes(damaged))
    for size in range(len(data)):
        refused(data[:size])
    for more in (data + b"\0", b"\0" + data, data + data, data[8:]):
        refused(more)
    assert read_sealed(data).arrays["x"].tolist() == [0, 1, 2]


X = {"x": entry("I8", [4], 0, 4)}
GOOD = table(X, 4)
MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "spaces": (lambda: spelled(GOOD, b"abcd", separators=(", ", ": ")), "spelled"),
    "other order": (lambda: spelled(dict(reversed(GOOD.items())), b"abcd"), "spelled"),
    "keys of a tensor in other order": (
        lambda: spelled(table({"x": dict(reversed(X["x"].items()))}, 4), b"abcd"),
        "spelled",
    ),
    "a key more": (lambda: spelled(table({"x": {**X["x"], "y": 1}}, 4), b"abcd"), "spelled"),
    "no padding": (lambda: sealed(json.dumps(GOOD, separators=(",", ":")).encode()), "spelled"),
    "a key twice": (
        lambda: sealed(
            json.dumps(GOOD, separators=(",", ":")).encode().replace(b'"x":', b'"x":1,"x":'),
            b"abcd",
        ),
        "spelled",
    ),
    "no seal": (lambda: spelled({"__metadata__": {}, **X}, b"abcd"), "KeyError"),
    "seal of another dtype": (
        lambda: spelled({**GOOD, "seal": entry("I8", [32], 4, 36)}, b"abcd"),
        "spelled",
    ),
    "seal not last": (lambda: spelled({"seal": GOOD["seal"], **GOOD}, b"abcd"), "spelled"),
    "no texts": (lambda: spelled({"x": X["x"], "seal": GOOD["seal"]}, b"abcd"), "KeyError"),
    "texts that are numbers": (lambda: spelled({**GOOD, "__metadata__": {"a": 1}}), "ValueError"),
    "texts that are a list": (lambda: spelled({**GOOD, "__metadata__": []}), "AttributeError"),
    "a list": (lambda: sealed(b"[]      "), "ValueError|TypeError|KeyError"),
    "a number": (lambda: sealed(b"17      "), "TypeError"),
    "not JSON": (lambda: sealed(b"{'a': 1}"), "JSONDecodeError"),
    "not UTF-8": (lambda: sealed(b'{"\xff": 1}'.ljust(16)), "UnicodeDecodeError"),
    "nested a million deep": (lambda: sealed(b"[" * 1_000_000), "RecursionError"),
    "a number of a million digits": (
        lambda: sealed(b'{"__metadata__":{},"x":' + b"9" * 1_000_000 + b"}"),
        "ValueError|TypeError",
    ),
    "tensor that is a number": (lambda: spelled(table({"x": 1}, 0)), "TypeError"),
    "unknown dtype": (lambda: spelled(table({"x": entry("BF16", [2], 0, 4)}, 4)), "KeyError"),
    "dtype that is a list": (lambda: spelled(table({"x": entry([], [2], 0, 4)}, 4)), "TypeError"),  # type: ignore[arg-type]
    "shape that is a number": (lambda: spelled(table({"x": entry("I8", 4, 0, 4)}, 4)), "TypeError"),  # type: ignore[arg-type]
    "negative axis": (lambda: spelled(table({"x": entry("I8", [-4], 0, 4)}, 4)), "ValueError"),
    "axis of half": (lambda: spelled(table({"x": entry("I8", [0.5], 0, 4)}, 4)), "ValueError"),
    "axis that is true": (
        lambda: spelled(table({"x": entry("I8", [True], 0, 1)}, 1)),
        "ValueError",
    ),
    "axis of 2^40": (
        lambda: spelled(table({"x": entry("I8", [2**40], 0, 2**40)}, 4)),
        "ValueError",
    ),
    "nine axes": (lambda: spelled(table({"x": entry("I8", [1] * 9, 0, 1)}, 1), b"a"), "ValueError"),
    "empty, and too large for NumPy": (
        lambda: spelled(table({"x": entry("I64", [0, 2**39, 2**39], 0, 0)}, 0)),
        "ValueError",
    ),
    "a tensor of 8 TB": (
        lambda: spelled(table({"x": entry("I64", [2**39, 2], 0, 2**43)}, 2**43), b"abcd"),
        "tensor 'x' ends behind the end of the file",
    ),
    "one byte short": (lambda: spelled(GOOD, b"abc"), "'x' ends behind the end"),
    "bytes of no tensor": (lambda: spelled(GOOD, b"abcdef"), "2 bytes belong to no tensor"),
    "a hole": (lambda: spelled(table({"x": entry("I8", [4], 1, 5)}, 5), b"-abcd"), "spelled"),
    "an overlap": (
        lambda: spelled(table({"x": X["x"], "y": entry("I8", [4], 2, 6)}, 6), b"abcdef"),
        "spelled",
    ),
    "truth of 2": (
        lambda: spelled(table({"x": entry("BOOL", [2], 0, 2)}, 2), b"\1\2"),
        "tensor 'x' has truth values other than 0 and 1",
    ),
    "8193 tensors": (
        lambda: spelled(table({f"t{i}": entry("I8", [0], 0, 0) for i in range(8193)}, 0)),
        "ValueError",
    ),
    "header of 2^63 bytes": (lambda: _with_length(2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "header over the limit": (
        lambda: sealed(b" " * (MAX_HEADER + 8)),
        f"claims {MAX_HEADER + 8:,} bytes",
    ),
    "header into the seal": (lambda: _with_length(80), "claims 80 bytes"),
    "header of 1 byte": (lambda: _with_length(1), "claims 1 bytes"),
    "nothing": (lambda: b"", "only 0 bytes"),
    "a seal alone": (lambda: hashlib.sha256(b"").digest(), "only 32 bytes"),
}


def _with_length(claimed: int) -> bytes:
    content = claimed.to_bytes(8, "little") + b'{"__metadata__":{}}'.ljust(64)
    return content + hashlib.sha256(content).digest()


@pytest.mark.parametrize("name", MALFORMED)
def test_a_right_seal_is_not_enough(name):
    """Each has a seal that fits; what edgert would not write is refused, in little memory."""
    make, reason = MALFORMED[name]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(Unsound, match=reason):
            read_sealed(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6 + 4 * len(data)


def test_what_these_are_made_from_is_accepted():
    """So that each of them is refused for its one fault."""
    assert isinstance(read_sealed(spelled(GOOD, b"abcd")), Sealed)
