"""Arrays in .npy files: mapped without trust, and written row by row.

The format is numpy's own (numpy.lib.format, version 1.0), of which only what numpy writes for whole
numbers in C order is read: no objects, so no pickle.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edgert.errors import BadFile
from edgert.files import kind_of, without_waiting

Array = NDArray[np.integer[Any]]

MAX_HEADER = 4096
MAX_AXES = 4
_PREFIX = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|][iu][1248])', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}, )*\d{1,15},?|)\), ?\} *\n"
)


class Unsound(ValueError):
    """Why a file is no array that can be read; the caller says which file."""


def open_array(path: Path) -> Array:
    """The array of whole numbers in a file, mapped read-only. Raises Unsound."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise Unsound(f"it is {kind_of(info.st_mode)}")
            dtype, shape, start = _header(file.read(len(_PREFIX) + 2 + MAX_HEADER))
            wanted = start + math.prod(shape) * dtype.itemsize
            if info.st_size != wanted:
                raise Unsound(
                    f"{dtype} {list(shape)} takes {wanted:,} bytes, the file has {info.st_size:,}"
                )
            if wanted == start:
                return np.zeros(shape, dtype)  # nothing cannot be mapped
            return np.memmap(file, dtype, "r", start, shape)
    except OSError as error:
        raise Unsound(f"it cannot be read: {error.strerror}") from error


def _header(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Type and shape, and where the numbers begin."""
    if not data.startswith(_PREFIX) or len(data) < len(_PREFIX) + 2:
        raise Unsound("it is not an .npy file of version 1.0")
    begin = len(_PREFIX) + 2
    size = int.from_bytes(data[len(_PREFIX) : begin], "little")
    if size > min(MAX_HEADER, len(data) - begin):
        raise Unsound(f"its header claims {size:,} bytes")
    match = _HEADER.fullmatch(data[begin : begin + size])
    if not match:
        raise Unsound("its header is not one of an array of whole numbers")
    if match[2] == b"True":
        raise Unsound("it is in Fortran order")
    shape = tuple(int(axis) for axis in match[3].split(b",") if axis.strip())
    if len(shape) > MAX_AXES:
        raise Unsound(f"it has {len(shape)} axes")
    if math.prod(max(axis, 1) for axis in shape) >= 1 << 48:
        raise Unsound(f"its shape {list(shape)} is absurd")
    return np.dtype(match[1].decode()), shape, begin + size


class ArrayWriter:
    """Writes an .npy file part by part; `close` puts the number of rows into its header.

    The file is the same as numpy.save makes of all parts joined, and is not complete before
    `close`. row  shape of one row, () for a column of numbers.
    """

    def __init__(self, path: Path, dtype: type[np.generic], row: tuple[int, ...] = ()) -> None:
        self.dtype, self.row, self.rows = np.dtype(dtype).newbyteorder("<"), row, 0
        self._file = path.open("xb")
        self._write_header()
        self._begin = self._file.tell()

    def append(self, part: NDArray[Any]) -> None:
        """Add rows [k, *row]. Raises BadFile for numbers that the type of the file cannot hold."""
        rows = np.asarray(part)
        assert rows.shape[1:] == self.row, f"rows {rows.shape[1:]} in a file of rows {self.row}"
        limits = np.iinfo(self.dtype)
        if rows.size and not (limits.min <= rows.min() and rows.max() <= limits.max):
            raise BadFile(
                f"numbers from {rows.min()} to {rows.max()} do not fit {self.dtype}",
                where=self._file.name,
            )
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._begin, "numpy leaves room for the number of rows"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        npy.write_array_header_1_0(
            self._file,
            {
                "descr": npy.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.rows, *self.row),
            },
        )
