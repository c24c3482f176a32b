"""One weights file for all graphs of a precision: every tensor once, by content, page-aligned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgert.errors import GateFailed

INLINE_BYTES = 1024
"""Smaller tensors stay inside the graph file."""

LARGE_BYTES = 65536
"""Initializers from this size on must be weights of the model."""

_PAGE = 4096  # ONNX Runtime maps external tensors; a page-aligned one needs no copy
_DENSE = 64  # a cache line
_PADDED = 1 << 17  # a page more is nothing to tensors from this size on


class WeightsFile:
    """Write initializers of several graphs into one file. Equal tensors are stored once.

    dense  small tensors fill no page each: weights of few bits have many
    """

    def __init__(self, path: Path, dense: bool = False) -> None:
        self.path, self.dense = path, dense
        self._file = path.open("wb")
        self._offsets: dict[bytes, tuple[int, int]] = {}

    @property
    def nbytes(self) -> int:
        return self._file.tell()

    def externalize(self, model: ir.Model) -> None:
        """Move the large initializers of a graph into this file."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            assert value.name is not None
            if tensor.nbytes < INLINE_BYTES:
                continue
            offset, length = self._put(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name,
                base_dir=self.path.parent,
            )

    def _put(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            align = _DENSE if self.dense and len(data) < _PADDED else _PAGE
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._offsets[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._offsets[key]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def strip(model: ir.Model) -> None:
    """Remove what the exporter notes about its run: stack traces, file paths, module names."""
    graph = model.graph
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "edgert", None
    model.doc_string = graph.doc_string = None
    graph.metadata_props.clear()
    graph.name = "graph"
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def check_weights(
    model: ir.Model,
    module: torch.nn.Module,
    where: str,
    quantized: Iterable[NDArray[np.generic]] = (),
) -> None:
    """Every large initializer is a parameter or buffer of the module, or one of its `quantized`
    tensors, and none is there twice. (One that is there in two shapes is stored once.)

    Raises GateFailed for what constant folding can do behind one's back: a transposed copy of the
    tied embedding, or shared weights repeated.
    """
    known = {_digest(t) for t in (*module.parameters(), *module.buffers())}
    known |= {hashlib.sha256(np.ascontiguousarray(t).data).digest() for t in quantized}
    seen: dict[tuple[bytes, str], str] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < LARGE_BYTES:
            continue
        digest = hashlib.sha256(tensor.tobytes()).digest()
        key = digest, str(tensor.shape)
        if key in seen or digest not in known:
            what = f"repeats '{seen[key]}'" if key in seen else "is not a weight of the model"
            raise GateFailed(
                f"initializer '{name}' ({tensor.nbytes / 1e6:.1f} MB) {what}",
                where=where,
                do="weights must be stored once, as the model keeps them: report how this was made",
            )
        seen[key] = name


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().numpy().data).digest()
