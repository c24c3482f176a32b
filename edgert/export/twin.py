"""A bundle with one variant whose graphs were edited, for as long as somebody looks at it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edgert.bundle import Bundle


@contextlib.contextmanager
def twin(
    bundle: Bundle, variant: str, edit: Callable[[ir.Model], object], widened: Collection[str] = ()
) -> Iterator[Bundle]:
    """Meanwhile there is a bundle of this variant with edited graphs over the same weights file.

    Weights that an edit adds are stored in the graphs. It is good for a runner of `variant` alone.
    widened  states that the edit lets the graphs keep as the manifest declares them
    """
    with tempfile.TemporaryDirectory(dir=bundle.root) as folder:
        root = Path(folder)
        graphs = bundle.manifest.variants[variant].graphs.values()
        for file in dict.fromkeys(f for graph in graphs for f in (graph.file, *graph.data)):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".onnx"):
                model = ir.load(bundle.path(file))
                edit(model)
                ir.save(model, root / file)
            else:
                (root / file).hardlink_to(bundle.path(file))
        spec = bundle.manifest.variants[variant]
        kept = {name: dtype for name, dtype in spec.state_dtypes.items() if name not in widened}
        spec = replace(spec, state_dtypes=kept)
        variants = {**bundle.manifest.variants, variant: spec}
        yield Bundle(root, replace(bundle.manifest, variants=variants))


def in_float32(model: ir.Model) -> None:
    """Products with weights of few bits take their activations as they are, instead of rounding
    them to int8 first."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
