"""Kernels of edgert's own for a CPU, where they were compiled.

They are operators for ONNX Runtime: attention over a KV cache (attention.cpp), norms and the gate
of SwiGLU (rowwise.cpp), and, on processors for which they are the faster ones, products with
weights of few bits (products.cpp). A graph file names the standard ones; as it is loaded, those
nodes are replaced in its bytes, so that one bundle runs with them and without. Compiling is part of
installing, and optional: without a compiler, ONNX Runtime's kernels are used.

EDGERT_NATIVE=0 leaves them unused; `avx2` and `avx512` leave instructions unused that are newer.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from functools import cache
from pathlib import Path

from edgert.files import read_regular
from edgert.onnxedit import GraphFile, Node, new_node
from edgert.onnxfile import MAX_FILE_BYTES

DOMAIN = "edgert.kernel"
REVISION = 3
"""Rises with every change to the bits of a result: a resumed session says that they may differ."""

_SAME = {  # inputs, outputs and attributes are those of ONNX Runtime's
    ("com.microsoft", "GroupQueryAttention"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
    ("", "SimplifiedLayerNormalization"),
}


def switched_off() -> bool:
    return os.environ.get("EDGERT_NATIVE", "1") in ("0", "false", "no", "off")


def library() -> Path | None:
    """The compiled kernels, or None: they were not compiled, or are switched off."""
    if switched_off():
        return None
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


@cache
def _loaded(library: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # compiled for another processor or system
        return None


def multiplies(library: Path) -> bool:
    """Whether this processor is one for which our products are faster than ONNX Runtime's."""
    loaded = _loaded(library)
    return loaded is not None and bool(loaded.edgert_products())


def instructions(library: Path) -> str:
    """The newest instructions of this processor that the kernels use, "" for those of every one."""
    loaded = _loaded(library)
    if loaded is None:
        return ""
    name = loaded.edgert_instructions
    name.restype = ctypes.c_char_p
    return str(name().decode())


def substituted(path: Path, *, products: bool = False) -> bytes | None:
    """A graph file's bytes with our operators; None for a graph in which they have no place.

    products  those with weights of few bits as well
    Raises BadBundle for a file that is no ONNX graph.
    """
    graph = GraphFile(read_regular(path, MAX_FILE_BYTES), str(path))
    changed: dict[int, bytes | None] = {
        place: node.moved(DOMAIN)
        for place, node in enumerate(graph.nodes)
        if (node.domain, node.op) in _SAME or (products and _is_product(node))
    }
    changed |= _gates(graph)
    if not changed or DOMAIN in graph.domains:  # the latter is none of our exporter's
        return None
    return graph.with_nodes(changed, DOMAIN)


def _is_product(node: Node) -> bool:
    """A product that may round its activations, with zero points, if any, beside its scales; not
    one with an order of its inputs, or a bias."""
    if (node.domain, node.op) != ("com.microsoft", "MatMulNBits") or any(node.inputs[4:]):
        return False
    numbers = node.numbers()
    block = numbers.get("block_size", 0)
    return numbers.get("accuracy_level") == 4 and block >= 32 and block % 32 == 0


def _gates(graph: GraphFile) -> dict[int, bytes | None]:
    """SwiGLU as it is exported: Split, Sigmoid, Mul, Mul, whose inner values nobody else reads."""
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    readers.update(graph.outputs)
    by_input: dict[str, list[int]] = {}
    for place, node in enumerate(graph.nodes):
        for name in node.inputs:
            by_input.setdefault(name, []).append(place)

    def only(reader_of: str, op: str, inputs: set[str]) -> int | None:
        found = [
            place
            for place in by_input.get(reader_of, [])
            if _is(graph.nodes[place], op)
            and set(graph.nodes[place].inputs) == inputs
            and len(graph.nodes[place].outputs) == 1
        ]
        return found[0] if len(found) == 1 else None

    changed: dict[int, bytes | None] = {}
    for place, split in enumerate(graph.nodes):
        if not _is(split, "Split") or len(split.inputs) != 1 or len(split.outputs) != 2:
            continue
        gate, through = split.outputs
        sigmoid = only(gate, "Sigmoid", {gate})
        if sigmoid is None or (readers[gate], readers[through]) != (2, 1):
            continue
        (weight,) = graph.nodes[sigmoid].outputs
        inner = only(weight, "Mul", {gate, weight})
        if inner is None or readers[weight] != 1:
            continue
        (silu,) = graph.nodes[inner].outputs
        last = only(silu, "Mul", {silu, through})
        if last is None or readers[silu] != 1:
            continue
        changed |= dict.fromkeys((place, sigmoid, inner))
        outputs, axis = graph.nodes[last].outputs, split.numbers().get("axis", 0)
        changed[last] = new_node("GatedSilu", DOMAIN, split.inputs, outputs, axis=axis)
    return changed


def _is(node: Node, op: str) -> bool:
    return node.domain in ("", "ai.onnx") and node.op == op
