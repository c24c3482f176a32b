"""Arrays of the caller's that are on the device already: pycuda, CuPy, torch and others.

They say where they are by `__cuda_array_interface__` (version 2 or 3). Memory that they name is
used as it is, or refused: nothing is copied behind the caller's back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgert.backends.tensorrt.memory import ALIGNMENT
from edgert.errors import UsageError
from edgert.spec import DTYPES

INTERFACE = "__cuda_array_interface__"


@dataclass(frozen=True)
class DeviceArray:
    """A dense tensor in device memory.

    stream  handle of the stream in which the caller works on it: 1 and 2 are the two default ones.
            None if there is nothing to wait for
    owner   whoever keeps the memory
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    stream: int | None
    read_only: bool = False
    owner: object = field(default=None, repr=False)


def device_array(value: object, name: str = "the array") -> DeviceArray:
    """What an object says of its memory, checked. Raises UsageError, naming what is wrong."""
    said: Any = getattr(value, INTERFACE, None)
    if not isinstance(said, Mapping):
        raise UsageError(
            f"{name} is {type(value).__name__}, not an array on the device",
            do=f"give one with {INTERFACE}: of pycuda, CuPy or torch",
        )

    def wrong(what: str, do: str) -> UsageError:
        return UsageError(f"{name}: its {INTERFACE} {what}", do=do)

    report = "report it to the library that the array is of"
    version: Any = said.get("version")
    shape, data = said.get("shape"), said.get("data")
    if not _whole(version) or version < 2:
        raise wrong(f"is of version {version!r}", "use a newer version of its library")
    if not isinstance(shape, tuple) or not all(_whole(size) and size >= 0 for size in shape):
        raise wrong(f"has the shape {shape!r}", report)
    if not isinstance(data, tuple) or len(data) != 2 or not _whole(data[0]) or data[0] < 0:
        raise wrong(f"has the data {data!r}", report)
    dtype = _dtype(said.get("typestr"))
    if dtype is None:
        raise wrong(f"has the type {said.get('typestr')!r}", f"give one of: {', '.join(DTYPES)}")
    if said.get("mask") is not None:
        raise wrong("has a mask", "give an array without one")
    address, read_only = data
    dense = tuple(
        dtype.itemsize * int(np.prod(shape[axis + 1 :], dtype=np.int64))
        for axis in range(len(shape))
    )
    strides = said.get("strides")
    if strides is not None and tuple(strides) != dense:
        raise wrong(f"has strides {tuple(strides)}, dense are {dense}", "make it contiguous first")
    if 0 in shape or not address:
        raise wrong("names no memory", "give an array that is not empty")
    if address % ALIGNMENT:
        raise wrong(
            f"begins at {address:#x}, no multiple of {ALIGNMENT} bytes, which TensorRT needs",
            "give a whole array, not a part of one",
        )
    stream = said.get("stream")
    if stream is not None and (not _whole(stream) or stream <= 0):
        # 0 could be either default stream; the protocol forbids it for that reason.
        raise wrong(f"names the stream {stream!r}", report)
    return DeviceArray(address, shape, dtype, stream, bool(read_only), value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dtype(typestr: object) -> np.dtype[np.generic] | None:
    """'<f4' -> float32; None for what no model takes, and for another byte order."""
    try:
        dtype: np.dtype[np.generic] = np.dtype(str(typestr))
    except TypeError:
        return None
    return dtype if dtype.isnative and dtype.name in DTYPES else None
