"""Constants of a graph: made under a name, and found again by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def initializer(graph: ir.Graph, name: str, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """The initializer of this name, which `make` gives its content if it is not there yet."""
    if name not in graph.initializers:
        array = make()
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def digest(array: NDArray[np.generic]) -> bytes:
    """Equal for equal shapes and contents: by it a graph's constant is known as a parameter."""
    shape = repr(array.shape).encode()
    return hashlib.sha256(shape + np.ascontiguousarray(array).tobytes()).digest()
