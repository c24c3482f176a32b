"""Worker of solve.py: one process, one side. Loads, then answers each line on stdin with a run.

Argument: JSON with side, threads, and what the side needs. Answers: JSON lines.

    segment, segment-eager, segment-compiled    segments of one puzzle, one after another
    products                                    the matrix products of a segment alone
    early, full, eager                          a set of puzzles
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decode_worker import weights
from sides import Run, serve

SAMPLE = 64  # values of the state that are compared


def timed(function: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    spent = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        spent.append(time.perf_counter() - begun)
    return spent


def segments(advance: Callable[[], object], state: Callable[[], Any], times: int) -> dict[str, Any]:
    """Seconds of segments one after another, and some values of the state behind the first, evenly
    spread. Random weights make more of a rounding with each segment: later states are not compared.
    """
    spent = timed(advance, 1)
    flat = state().reshape(-1)
    sample = [float(value) for value in flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]]
    return {"step_s": spent + timed(advance, times - 1), "state": sample}


def segment(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Through an exported bundle."""
    from plain_solve import published, segment_inputs

    import edgert
    from edgert.slots import Entrance, Slots

    model = edgert.load(Path(orders["bundle"]), threads=orders["threads"])
    inputs = {n: t.numpy() for n, t in segment_inputs(published(*orders["size"])).items()}
    entrance, slots = Entrance(model.runner), Slots(model.runner, 1)

    def run() -> dict[str, Any]:
        entrance.run(inputs)
        slots.enter(0, entrance)
        return segments(slots.advance, lambda: slots.export([0])["z_h"], orders["segments"])

    return run, {"placement": model.placement, "parameters": model.manifest.parameters}


def segment_torch(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch
    from plain_solve import Segment, drawn, published, segment_inputs

    torch.set_num_threads(orders["threads"])
    model = drawn(published(*orders["size"]))
    turn: Any = Segment(model)
    if orders["side"] == "segment-compiled":
        turn = torch.compile(turn, fullgraph=True, dynamic=False)
    inputs = {name: tensor[None] for name, tensor in segment_inputs(model.config).items()}

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        e = model.embed(inputs["ids"], inputs["puzzle"])
        state = [tensor.contiguous() for tensor in model.initial(1)]

        def advance() -> None:
            state[:] = turn(*state, e)

        return segments(advance, lambda: state[0], orders["segments"])

    return run, {"torch": torch.__version__}


def products(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Alone in torch and alone in ONNX Runtime; the faster one is the limit."""
    import numpy as np
    import onnxruntime as ort
    import torch
    from onnx import TensorProto, helper, numpy_helper
    from plain_solve import products as shapes_of
    from plain_solve import published

    torch.set_num_threads(orders["threads"])
    config = published(*orders["size"])
    shapes, operations = shapes_of(config)
    block = config.h_layers + config.l_layers
    rng = np.random.default_rng(0)
    # As many different weights as the network has: they do not all stay in the caches.
    held = [rng.standard_normal(shape).astype(np.float32) for shape in shapes[: 4 * block]]
    repeats = len(shapes) // len(held)
    rows = {a: rng.standard_normal((config.positions, a)).astype(np.float32) for a, _ in shapes}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [f"x{w.shape[0]}", f"w{i}"], [f"y{i}"])
            for i, w in enumerate(held)
        ],
        "products",
        [value(f"x{a}", TensorProto.FLOAT, x.shape) for a, x in rows.items()],
        [
            value(f"y{i}", TensorProto.FLOAT, (config.positions, w.shape[1]))
            for i, w in enumerate(held)
        ],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(held)],
    )
    opset = [helper.make_opsetid("", 20)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = orders["threads"]
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    given = {f"x{a}": x for a, x in rows.items()}
    tensors = [torch.from_numpy(w) for w in held]
    left = {a: torch.from_numpy(x) for a, x in rows.items()}

    def in_torch() -> None:
        for w in tensors:
            left[w.shape[0]] @ w

    def run() -> dict[str, Any]:
        share = operations / repeats
        with torch.inference_mode():
            fastest = min(timed(in_torch, 2 * repeats))
        other = min(timed(lambda: session.run(None, given), 2 * repeats))
        return {"gflops": {"torch": share / fastest / 1e9, "onnxruntime": share / other / 1e9}}

    return run, {"operations": operations}


def puzzles(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Through the bundle: by its policy, or at full depth."""
    import edgert
    from edgert.halting_data import read_puzzles

    model = edgert.load(Path(orders["bundle"]), threads=orders["threads"])
    data = read_puzzles(model, Path(orders["data"]), orders["puzzles"])
    halt = "full" if orders["side"] == "full" else orders["halt"]
    model.solving(data.ids[:1], number=data.number[:1], halt=halt)  # refused at once

    def run() -> dict[str, Any]:
        begun = time.perf_counter()
        work = model.solving(data.ids, number=data.number, halt=halt, batch=orders["batch"])
        found = work.run()
        spent = time.perf_counter() - begun
        return {
            "step_s": [spent],
            "graph_s": work.graph_ns / 1e9,
            "segments": sum(s.steps for s in found) / len(found),
            "exact": float(data.right(found).mean()),
            "answers": [[] if s.values is None else s.values.tolist() for s in found],
        }

    facts = {"placement": model.placement, "parameters": model.manifest.parameters}
    return run, facts | {"puzzles": len(data)}


def puzzles_torch(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Eagerly at full depth, the same puzzles in the same batches."""
    import torch
    from plain_solve import Segment, solved

    import edgert
    from edgert.halting_data import read_puzzles

    torch.set_num_threads(orders["threads"])
    with edgert.load(Path(orders["bundle"]), threads=1) as bundled:
        data = read_puzzles(bundled, Path(orders["data"]), orders["puzzles"])
    model = weights(Path(orders["source"]))
    ids = torch.from_numpy(data.ids)
    puzzle = model.puzzle_rows(torch.from_numpy(data.number))
    turn = Segment(model)

    def run() -> dict[str, Any]:
        begun = time.perf_counter()
        answers = solved(model, turn, ids, puzzle, orders["batch"])
        return {"step_s": [time.perf_counter() - begun], "answers": answers}

    return run, {"torch": torch.__version__}


SIDES = {
    "segment": segment,
    "segment-eager": segment_torch,
    "segment-compiled": segment_torch,
    "products": products,
    "early": puzzles,
    "full": puzzles,
    "eager": puzzles_torch,
}

if __name__ == "__main__":
    serve(SIDES)
