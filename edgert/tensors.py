"""Named arrays and texts <-> one sealed file, which every safetensors reader can open.

The file is safetensors (huggingface/safetensors, README "Format") in one canonical spelling, and
its last tensor, `seal`, is the SHA-256 of all bytes before it: no bit can change unnoticed. So a
reader need not guess: what is not exactly what the writer would write is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

MAX_HEADER = 16 << 20
MAX_TENSORS = 8192
SEAL = "seal"
SEAL_BYTES = 32

_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}


class Unsound(ValueError):
    """Why some bytes are no sealed file; the caller says which file, and what to do."""


@dataclass(frozen=True)
class Sealed:
    """What a sealed file holds. `arrays` are read-only views of the bytes it was read from."""

    texts: dict[str, str]
    arrays: dict[str, Array]


def sealed_chunks(texts: Mapping[str, str], arrays: Mapping[str, Array]) -> Iterator[memoryview]:
    """The file, piece by piece, without a second copy of the arrays. No array is named `seal`."""
    flat = {name: _little_endian(array) for name, array in arrays.items()}
    header = _header(texts, {name: (array.dtype, array.shape) for name, array in flat.items()})
    chunks = [memoryview(header)]
    chunks += [array.reshape(-1).view(np.uint8).data for array in flat.values()]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    yield memoryview(digest.digest())


def read_sealed(data: bytes) -> Sealed:
    """The content of a sealed file, or Unsound saying what is wrong with it."""
    check_seal(data)
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(MAX_HEADER, len(data) - 8 - SEAL_BYTES):
        raise Unsound(f"its header claims {size:,} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
        texts, specs = _parsed(header)
        canonical = _header(texts, specs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unsound(f"its header is not one that edgert writes: {type(error).__name__}") from None
    if canonical != data[: 8 + size]:
        raise Unsound("its header is not spelled as edgert spells it")
    arrays, at = {}, 8 + size
    for name, (dtype, shape) in specs.items():
        count = math.prod(shape)
        end = at + count * dtype.itemsize
        if end > len(data) - SEAL_BYTES:
            raise Unsound(f"tensor {ascii(name)} ends behind the end of the file")
        arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        if dtype == np.bool_ and np.any(arrays[name].view(np.uint8) > 1):
            raise Unsound(f"tensor {ascii(name)} has truth values other than 0 and 1")
        at = end
    if at != len(data) - SEAL_BYTES:
        raise Unsound(f"{len(data) - SEAL_BYTES - at:,} bytes belong to no tensor")
    return Sealed(texts, arrays)


def check_seal(data: bytes) -> None:
    """Raise Unsound unless the last 32 bytes are the SHA-256 of all before: in every version."""
    if len(data) < 8 + SEAL_BYTES:
        raise Unsound(f"it has only {len(data)} bytes")
    body = memoryview(data)[:-SEAL_BYTES]
    if hashlib.sha256(body).digest() != data[-SEAL_BYTES:]:
        raise Unsound("its content does not have the SHA-256 at its end")


def _header(
    texts: Mapping[str, str], specs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(texts)}
    at = 0
    seal = (np.dtype(np.uint8), (SEAL_BYTES,))
    for name, (dtype, shape) in {**specs, SEAL: seal}.items():
        end = at + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": _NAMES[dtype.name],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parsed(
    header: dict[str, Any],
) -> tuple[dict[str, str], dict[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
    """Texts, and dtype and shape by name; offsets are left to the comparison of spellings."""
    table = dict(header)
    texts = table.pop("__metadata__")
    table.pop(SEAL)
    if len(table) > MAX_TENSORS or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError
    specs = {}
    for name, spec in table.items():
        shape = tuple(spec["shape"])
        if len(shape) > 8 or not all(type(axis) is int and 0 <= axis < 2**40 for axis in shape):
            raise ValueError
        if math.prod(max(axis, 1) for axis in shape) >= 2**56:  # NumPy refuses it, even if empty
            raise ValueError
        specs[name] = (_DTYPES[spec["dtype"]], shape)
    return texts, specs


def _little_endian(array: Array) -> Array:
    assert array.dtype.name in _NAMES, f"{array.dtype} is not a dtype of a sealed file"
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")  # keeps () a ()
