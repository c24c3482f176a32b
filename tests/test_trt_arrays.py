"""Arrays of the caller's on the device: what an object may say of its memory, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgert.backends.tensorrt.arrays import device_array
from edgert.errors import UsageError

GOOD = {
    "version": 3,
    "shape": (2, 3),
    "typestr": "<f4",
    "data": (0x7000_0000_0100, False),
    "strides": None,
    "stream": 7,
}


class Array:
    """What CuPy, pycuda and torch give."""

    def __init__(self, **changes: Any) -> None:
        said = GOOD | changes
        self.__cuda_array_interface__ = {k: v for k, v in said.items() if v is not ...}


def test_an_array_is_taken_as_it_is():
    value = Array()
    found = device_array(value)
    assert (found.address, found.shape, found.dtype) == (0x7000_0000_0100, (2, 3), np.float32)
    assert (found.stream, found.read_only) == (7, False)
    assert found.owner is value


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": (12, 4)},  # dense, and said so
        {"strides": ...},
        {"stream": None},
        {"stream": ..., "version": 2},
        {"stream": 1},
        {"stream": 2},
        {"shape": ()},
        {"mask": None},
        {"typestr": "|b1"},
        {"typestr": "<f2"},
        {"typestr": "<i8"},
        {"data": (0x100, True)},
        {"descr": [("", "<f4")]},
    ],
    ids=str,
)
def test_what_the_protocol_allows_is_taken(changes):
    device_array(Array(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "is of version 1"),
        ({"version": ...}, "is of version None"),
        ({"shape": [2, 3]}, "has the shape"),
        ({"shape": (2, -3)}, "has the shape"),
        ({"shape": (2, True)}, "has the shape"),
        ({"shape": (0, 3)}, "names no memory"),
        ({"data": (0, False)}, "names no memory"),
        ({"data": 4096}, "has the data 4096"),
        ({"data": (-256, False)}, "has the data"),
        ({"data": (0x7000_0000_0104, False)}, "no multiple of 256 bytes"),
        ({"typestr": ">f4"}, "has the type '>f4'"),
        ({"typestr": "<c8"}, "has the type"),
        ({"typestr": "<f8"}, "has the type"),
        ({"typestr": "nonsense"}, "has the type"),
        ({"typestr": ...}, "has the type None"),
        ({"strides": (4, 8)}, r"has strides \(4, 8\), dense are \(12, 4\)"),
        ({"mask": (1, 0)}, "has a mask"),
        ({"stream": 0}, "names the stream 0"),
        ({"stream": -1}, "names the stream -1"),
        ({"stream": "7"}, "names the stream '7'"),
    ],
    ids=str,
)
def test_what_it_forbids_is_refused(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        device_array(Array(**changes), "input ids")
    assert str(caught.value).startswith("input ids: its __cuda_array_interface__")
    assert caught.value.do


@pytest.mark.parametrize("value", [np.zeros(3), [1, 2], None])
def test_an_array_of_the_host_is_none(value):
    with pytest.raises(UsageError, match="not an array on the device"):
        device_array(value)
