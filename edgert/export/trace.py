"""Trace a family's graphs to ONNX: named inputs and outputs, dynamic axes, one lowering each."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch

from edgert.errors import EdgertError
from edgert.models import modern
from edgert.models.program import Program, TracedGraph
from edgert.spec import Lowering

OPSETS: dict[Lowering, int] = {"ort": 20, "portable": 20, "modern": modern.OPSET}
"""20 is the newest that TensorRT 10.3 (JetPack 6) parses."""
IR_VERSION = 10  # ONNX Runtime 1.23 reads up to 11

_EXAMPLE = {"batch": 2, "tokens": 3, "select": 5, "capacity": 16}
"""Distinct sizes above 1: torch.export would merge equal ones and specialise 0 and 1."""

_BOUNDS = {"min": 2, "max": 1 << 20}
"""Of every named axis, for the tracer's shape arithmetic alone: bounded sizes are reasoned about
faster. The graphs are the same but for names inside, and take an axis of 1: the gate proves it."""


def trace(program: Program, graph: TracedGraph, lowering: Lowering) -> ir.Model:
    """One graph in one lowering. The weights are still torch's own memory, not copies.

    Raises EdgertError with the exporter's own words if the graph cannot be captured.
    """
    specs = [program.tensor_of(wire) for wire in graph.inputs.values()]
    # A tensor of its own for every input: one object given twice is merged silently.
    examples = tuple(
        torch.zeros([_EXAMPLE.get(a, 0) if isinstance(a, str) else a for a in s.shape]).to(
            getattr(torch, s.dtype)
        )
        for s in specs
    )
    dims = {name: torch.export.Dim(name, **_BOUNDS) for name in _EXAMPLE}
    shapes = [{i: dims[a] for i, a in enumerate(s.shape) if isinstance(a, str)} for s in specs]
    module = graph.module(lowering).eval()
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                dynamic_shapes=_like_signature(module, shapes),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSETS[lowering],
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        raise EdgertError(
            f"graph {graph.name!r} could not be traced: {error}",
            where=f"lowering {lowering}",
            do="run again with --debug for the exporter's report",
        ) from error
    assert exported is not None
    model = exported.model
    model.ir_version = IR_VERSION
    _drop_unread_outputs(model)
    return model


def _like_signature(
    module: torch.nn.Module, shapes: Sequence[Mapping[int, object]]
) -> tuple[object, ...]:
    """Nest the shapes as the forward's parameters nest: `*past` takes the rest as one tuple."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    rest = tuple(shapes[named:])
    return (*shapes[:named], rest) if rest else tuple(shapes)


def _drop_unread_outputs(model: ir.Model) -> None:
    """Fused operators compute their optional outputs (statistics) only if those are named."""
    for node in model.graph:
        if node.domain == "com.microsoft":
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    value.name, value.type, value.shape = "", None, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout and in warnings; neither is the user's business."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
