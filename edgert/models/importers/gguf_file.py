"""The header of a GGUF file, read by our own bounded pass; tensor data stays in the file.

The `gguf` package's reader trusts every count and offset. This one checks each of them against the
file before it allocates or slices, so that a broken or hostile file ends as one BadCheckpoint.

Source: ggml-org/ggml, docs/gguf.md (versions 2 and 3, little endian)
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import BadCheckpoint, UnsupportedModel
from edgert.models.importers.common import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # metadata keys, and tensors
MAX_NAME = 1 << 10
MAX_ARRAY = 1 << 22  # elements of all arrays: each becomes a Python object
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 40

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """One tensor: ggml type number, shape in torch's order, where its bytes are."""

    kind: int
    shape: tuple[int, ...]
    start: int
    end: int


class GGUFFile:
    """Metadata and tensor directory of an open GGUF file. Close it, or use it in a `with`.

    `block_sizes` maps a ggml type number to (elements, bytes) of one block.
    Raises BadCheckpoint for anything that does not hold together, UnsupportedModel for a sound
    file with a tensor type that is not in `block_sizes`.
    """

    def __init__(
        self, path: Path, block_sizes: dict[int, tuple[int, int]], type_names: dict[int, str]
    ) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # an empty file cannot be mapped
                raise BadCheckpoint("the file is empty", where=str(path)) from error
        try:
            self._at, self._elements = 0, MAX_ARRAY
            self._read(block_sizes, type_names)
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._map.close()

    def bytes_of(self, tensor: Stored) -> npt.NDArray[np.uint8]:
        """A private copy of a tensor's bytes, flat."""
        return np.frombuffer(self._map[tensor.start : tensor.end], np.uint8)

    def _bad(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"broken GGUF file: {what}",
            where=f"{self.path}, byte {self._at}",
            do="download or convert the file again",
        )

    def _take(self, count: int, what: str) -> int:
        """Advance over `count` bytes and return where they start."""
        at = self._at
        if count > len(self._map) - at:
            raise self._bad(f"{what} needs {count} bytes, the file has {len(self._map) - at} left")
        self._at = at + count
        return at

    def _unsigned(self, size: int, what: str, high: int) -> int:
        at = self._take(size, what)
        value = int.from_bytes(self._map[at : at + size], "little")
        if value > high:
            raise self._bad(f"{what} is {value}, above the limit of {high}")
        return value

    def _string(self, what: str, high: int) -> str:
        size = self._unsigned(8, f"the length of {what}", high)
        at = self._take(size, what)
        try:
            return str(self._map[at : at + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"{what} is not UTF-8") from error

    def _strings(self, count: int, what: str) -> list[str]:
        """The hot path, about 100,000 strings per file: `_string` without its bookkeeping."""
        data, at, total, unpack = (
            self._map,
            self._at,
            len(self._map),
            struct.Struct("<Q").unpack_from,
        )
        out = []
        try:
            for _ in range(count):
                (size,) = unpack(data, at)
                at += 8
                if size > total - at:
                    raise self._bad(f"a string of {what} claims {size} bytes")
                out.append(str(data[at : at + size], "utf-8"))
                at += size
        except (struct.error, UnicodeDecodeError) as error:
            raise self._bad(f"a string of {what} is cut off or not UTF-8") from error
        self._at = at
        return out

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key}", len(self._map))
        if kind == _ARRAY:
            kind = self._unsigned(4, f"the element type of {key}", 1 << 32)
            count = self._unsigned(8, f"the length of {key}", self._elements)
            self._elements -= count
            if kind == _STRING:
                return self._strings(count, key)
            dtype = self._dtype(kind, key)
            at = self._take(count * dtype.itemsize, key)
            return np.frombuffer(self._map[at : self._at], dtype).tolist()
        dtype = self._dtype(kind, key)
        at = self._take(dtype.itemsize, key)
        value = np.frombuffer(self._map[at : self._at], dtype)[0]
        # The shortest decimal that means this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(value)) if dtype == np.float32 else value.item()

    def _dtype(self, kind: int, key: str) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise self._bad(f"{key} has the unknown value type {kind}")
        return np.dtype(_SCALARS[kind])

    def _read(self, block_sizes: dict[int, tuple[int, int]], type_names: dict[int, str]) -> None:
        if self._map[self._take(4, "the magic number") : 4] != MAGIC:
            raise self._bad("it does not start with 'GGUF'")
        self.version = self._unsigned(4, "the version", 1 << 32)
        if self.version not in VERSIONS:
            raise UnsupportedModel(
                f"GGUF version {self.version}: only versions 2 and 3, little endian, are read",
                where=str(self.path),
                do="convert the model again with a current llama.cpp",
            )
        tensors = self._unsigned(8, "the number of tensors", MAX_ENTRIES)
        keys = self._unsigned(8, "the number of metadata keys", MAX_ENTRIES)
        self.keys: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a metadata key", MAX_NAME)
            kind = self._unsigned(4, f"the type of {shown(key)}", 1 << 32)
            if key in self.keys:
                raise self._bad(f"the key {shown(key)} appears twice")
            self.keys[key] = self._value(kind, shown(key))
        directory = [self._directory_entry() for _ in range(tensors)]
        alignment = self.keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT:
            raise self._bad(f"general.alignment is {shown(alignment)}")
        if alignment & (alignment - 1):
            raise self._bad(f"general.alignment {alignment} is not a power of two")
        base = -(-self._at // alignment) * alignment
        self.tensors = self._place(directory, base, alignment, block_sizes, type_names)

    def _directory_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name", MAX_NAME)
        count = self._unsigned(4, f"the number of dimensions of {shown(name)}", MAX_DIMS)
        # GGUF writes the contiguous dimension first, torch last.
        shape = tuple(
            self._unsigned(8, f"a dimension of {shown(name)}", MAX_ELEMENTS) for _ in range(count)
        )[::-1]
        kind = self._unsigned(4, f"the type of {shown(name)}", 1 << 32)
        return name, shape, kind, self._unsigned(8, f"the offset of {shown(name)}", 1 << 62)

    def _place(
        self,
        directory: list[tuple[str, tuple[int, ...], int, int]],
        base: int,
        alignment: int,
        block_sizes: dict[int, tuple[int, int]],
        type_names: dict[int, str],
    ) -> dict[str, Stored]:
        """Where each tensor's bytes are: inside the file, aligned, none shared by two tensors."""
        tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in directory:
            if kind not in block_sizes:
                known = ", ".join(type_names[k] for k in sorted(block_sizes))
                raise UnsupportedModel(
                    f"tensor {shown(name)} has the type {type_names.get(kind, kind)}; "
                    f"these are read: {known}",
                    where=str(self.path),
                    do="use another quantization of this model",
                )
            if name in tensors:
                raise self._bad(f"the tensor {shown(name)} appears twice")
            if not shape or 0 in shape:
                raise self._bad(f"the tensor {shown(name)} has the shape {list(shape)}")
            elements = 1
            for size in shape:
                elements *= size
            per_block, block_bytes = block_sizes[kind]
            if elements > MAX_ELEMENTS or shape[-1] % per_block:
                raise self._bad(
                    f"the tensor {shown(name)} has the shape {list(shape)}; "
                    f"{type_names[kind]} stores rows in blocks of {per_block}"
                )
            start, size = base + offset, elements // per_block * block_bytes
            if offset % alignment or start + size > len(self._map):
                raise self._bad(
                    f"the tensor {shown(name)} is said to lie at bytes {start} to {start + size} "
                    f"of {len(self._map)}, aligned to {alignment}"
                )
            tensors[name] = Stored(kind, shape, start, start + size)
        in_order = sorted(tensors.items(), key=lambda item: item[1].start)
        for (name, a), (other, b) in zip(in_order, in_order[1:], strict=False):
            if b.start < a.end:
                raise self._bad(f"the tensors {shown(name)} and {shown(other)} share bytes")
        return tensors
