"""What each optimisation of a decode step gains: the same bundle with one of them undone at a time.

    python benchmarks/ablation.py bundles/smollm2-ladder --variant int4-ort [--threads 2]

Every case is a runner of its own over the same weights file; they take turns in one process. How
many tokens are equal to those of the bundle as it is shipped is in the table: all of them wherever
a case computes the same numbers. Medians of the rounds; ratios are medians of the rounds'.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgert import kernels
from edgert.backends.ort import OrtBackend
from edgert.bundle import Bundle
from edgert.export.initializers import initializer
from edgert.export.twin import twin
from edgert.model import choose_variant
from edgert.onnxedit import GraphFile
from edgert.runner import Execution, Runner

Edit = Callable[[ir.Model], object]
NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


def add_and_norm_apart(model: ir.Model) -> None:
    """Two operators and an extra pass over the hidden state."""
    node: Any
    for node in list(model.graph):
        if node.op_type != SKIP_NORM:
            continue
        a, b, weight = node.inputs
        normed, *_, total = node.outputs
        add = ir.node("Add", [a, b])
        norm = ir.node(
            NORM,
            [add.outputs[0], weight],
            {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1},
        )
        _replace(model, node, [add, norm], [total, normed], [add.outputs[0], norm.outputs[0]])


def qkv_apart(model: ir.Model) -> None:
    """Three products instead of one in front of each attention."""
    node: Any
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is not None:
            continue
        product = node.inputs[0].producer()
        heads, kv = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads"))
        columns = _columns(product)
        size = columns // (heads + 2 * kv)
        parts = _split(model, product, [heads * size, kv * size, kv * size])
        for index, part in enumerate(parts):
            node.replace_input_with(index, part)
        model.graph.remove(product, safe=True)


def gate_and_up_apart(model: ir.Model) -> None:
    """Two products instead of one and a split in front of each gate."""
    node: Any
    for node in list(model.graph):
        if node.op_type != "Split" or _columns(node.inputs[0].producer()) == 0:
            continue
        product = node.inputs[0].producer()
        half = _columns(product) // 2
        parts = _split(model, product, [half, half])
        for old, new in zip(node.outputs, parts, strict=True):
            ir.convenience.replace_all_uses_with(old, new)
        model.graph.remove([node, product], safe=True)


def _columns(product: Any) -> int:
    """Outputs of a product (a node) with a weight; 0 of anything else."""
    if product is None or product.op_type not in ("MatMul", "MatMulNBits"):
        return 0
    if product.op_type == "MatMulNBits":
        return int(product.attributes["N"].as_int())
    return int(product.inputs[1].const_value.shape[1])


def _array(value: Any) -> NDArray[Any]:
    """A weight from the bundle's file. (onnx_ir reads none that has a second name, as a twin's.)"""
    tensor: ir.ExternalTensor = value.const_value
    assert tensor.offset is not None
    return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset, tensor.shape.numpy())


def _split(model: ir.Model, product: Any, sizes: list[int]) -> list[ir.Value]:
    """One product for each group of a product's outputs."""
    found, start = [], 0
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        operands = []
        for operand in product.inputs[1:]:
            array = _array(operand)
            if product.op_type == "MatMul":
                part = array[:, rows]
            elif array.shape[0] == _columns(product):
                part = array[rows]
            else:  # flat scales or zero points
                part = array.reshape(_columns(product), -1)[rows].reshape(-1)
            operands.append(initializer(model.graph, f"{operand.name}.{number}", part.copy))
        attributes = {key: attribute for key, attribute in product.attributes.items()}
        if "N" in attributes:
            attributes["N"] = ir.AttrInt64("N", size)
        new = ir.Node(
            product.domain, product.op_type, [product.inputs[0], *operands], attributes.values()
        )
        model.graph.insert_before(product, new)
        found.append(new.outputs[0])
        start += size
    return found


def _replace(
    model: ir.Model, old: ir.Node, new: list[ir.Node], was: list[ir.Value], now: list[ir.Value]
) -> None:
    for value, other in zip(was, now, strict=True):
        other.name, other.type, other.shape = value.name, value.type, value.shape
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], new, was, now)


Step = Callable[[Execution, int], int]


def shipped(execution: Execution, token: int) -> int:
    """As `generate` does it, greedily."""
    return int(execution.step(token).token[0, 0])


def argmax_in_numpy(execution: Execution, token: int) -> int:
    """The logits as an application would take them: copied out, and searched there."""
    return int(execution.step(token).logits[0, 0].copy().argmax())


def nothing_bound(execution: Execution, token: int) -> int:
    """`InferenceSession.run`: inputs handed over and outputs made anew, the state among them."""
    execution.reserve(int(execution.lens[0]) + 1)
    graph: Any = execution.runner.graphs["epilogue"]
    spec = execution.runner.parts["epilogue"]
    io = execution.io()
    io.ids[0, 0], io.select[0, 0] = token, 0
    arrays: dict[str, NDArray[Any]] = {"input.ids": io.ids, "input.select": io.select}
    arrays |= {f"state.{name}": b.host for name, b in execution.states.buffers.items()}
    feeds = {name: arrays[str(wire)] for name, wire in spec.inputs.items()}
    found = dict(zip(spec.outputs, graph.session.run(list(spec.outputs), feeds), strict=True))
    for name, wire in spec.outputs.items():
        kind, _, state = str(wire).partition(".")
        if kind == "state":
            execution.states.buffers[state].host[...] = found[name]
    execution.lens[0] += 1
    return int(found["token"][0, 0])


@dataclass(frozen=True)
class Case:
    """One optimisation undone. expected: what arithmetic says before anything is measured."""

    name: str
    expected: str = ""
    edit: Edit | None = None
    step: Step = shipped
    prepack: bool = True
    own_kernels: bool = True
    own_products: bool = True
    options: dict[str, str] = field(default_factory=dict)


PINNED = "one core each"

CASES = (
    Case("as shipped"),
    Case(
        "own kernels",
        "ONNX Runtime's: 90 more operators, and a row at a time over the cache",
        own_kernels=False,
    ),
    Case(
        "own products",
        "ONNX Runtime's, of activations rounded to 8 bits: as fast in a step, slower in prefill",
        own_products=False,
    ),
    Case("QKV apart", "60 more operators to start, of 1 to 3 µs each", edit=qkv_apart),
    Case("gate and up apart", "as many operators, no copy of 12 KB", edit=gate_and_up_apart),
    Case("add and norm apart", "59 more operators, 2 KB each", edit=add_and_norm_apart),
    Case("argmax in NumPy", "196 KB copied and read again: 20 to 60 µs", step=argmax_in_numpy),
    Case(
        "nothing bound", "the whole state made anew: its size by memory speed", step=nothing_bound
    ),
    Case("weights as they lie", "kernels without their own layout", prepack=False),
    Case(
        "threads pinned",
        "nothing, unless the kernel moves them",
        options={"session.intra_op_thread_affinities": PINNED},
    ),
    Case(
        "threads that sleep",
        "waking a thread, 5 to 50 µs, for each product",
        options={"session.intra_op.allow_spinning": "0"},
    ),
)


@contextlib.contextmanager
def opened(bundle: Bundle, variant: str, case: Case, threads: int) -> Iterator[Runner]:
    backend = OrtBackend(threads=threads, prepack=case.prepack)
    if not case.own_kernels:
        backend._native = None
    backend._products &= case.own_products
    # they share a process: one that does not run must not keep a core busy
    options = {"session.force_spinning_stop": "1"} | case.options
    pinned = ";".join(str(core + 1) for core in sorted(os.sched_getaffinity(0))[1:threads])
    for key, value in options.items():
        value = pinned if value == PINNED else value
        if value:  # a single thread has no others to pin
            backend._options.add_session_config_entry(key, value)
    with contextlib.ExitStack() as stack:
        if case.edit is not None:
            bundle = stack.enter_context(twin(bundle, variant, case.edit))
        runner = Runner(bundle, variant, backend)
        stack.callback(runner.close)
        yield runner


def operators(bundle: Bundle, variant: str, case: Case) -> int:
    """Nodes of the step's graphs, as they are loaded."""
    total = 0
    for graph in bundle.manifest.variants[variant].graphs.values():
        model = ir.load(bundle.path(graph.file))
        if case.edit is not None:
            case.edit(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            ir.save(model, path)
            data = kernels.substituted(path) if case.own_kernels and kernels.library() else None
            total += len(GraphFile(data or path.read_bytes(), path.name).nodes)
    return total


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--variant", help="Default: the one that `edgert run` takes.")
@click.option("--depth", default=256, show_default=True, help="Tokens in front of the steps.")
@click.option("--steps", default=32, show_default=True, help="In a round.")
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True)
@click.option("--rounds", default=9, type=click.IntRange(1), show_default=True)
@click.option("--only", multiple=True, metavar="CASE", help="Of the cases; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(
    bundle: Path,
    variant: str | None,
    depth: int,
    steps: int,
    threads: int,
    rounds: int,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Milliseconds of a decode step, and of a prefill of --depth tokens, by case."""
    unknown = set(only) - {case.name for case in CASES}
    if unknown:
        raise click.UsageError(f"there is no case {', '.join(sorted(unknown))}")
    cases = [CASES[0], *(case for case in CASES[1:] if not only or case.name in only)]
    opened_bundle = Bundle.open(bundle, "stamp")
    name = variant or choose_variant(opened_bundle.manifest, "cpu")
    ids = np.random.default_rng(0).integers(0, opened_bundle.manifest.vocab_size, depth)
    step_ms: dict[str, list[float]] = {case.name: [] for case in cases}
    prefill_ms: dict[str, list[float]] = {case.name: [] for case in cases}
    said: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(opened(opened_bundle, name, c, threads)) for c in cases]
        executions = [runner.open(tokens=depth + steps + 1) for runner in runners]
        for number in range(rounds + 1):
            for case, execution in zip(cases, executions, strict=True):
                execution.reset()
                begun = time.perf_counter()
                for io in execution.feed(ids):
                    token = int(io.token[0, 0])
                prefill = time.perf_counter() - begun
                spent, tokens = [], [token]
                for _ in range(steps):
                    begun = time.perf_counter()
                    token = case.step(execution, token)
                    spent.append(time.perf_counter() - begun)
                    tokens.append(token)
                said[case.name] = tokens
                if number:  # the first round warms up
                    step_ms[case.name].append(median(spent) * 1e3)
                    prefill_ms[case.name].append(prefill * 1e3)
    base = CASES[0].name
    rows = [
        {
            "case": case.name,
            "expected": case.expected,
            "operators": operators(opened_bundle, name, case),
            "step_ms": median(step_ms[case.name]),
            "ratio": _over(step_ms[base], step_ms[case.name]),
            "prefill_ratio": _over(prefill_ms[base], prefill_ms[case.name]),
            "equal_tokens": _equal(said[base], said[case.name]),
        }
        for case in cases
    ]
    report = {"variant": name, "depth": depth, "threads": threads, "rounds": rounds, "cases": rows}
    click.echo(json.dumps(report) if as_json else table(rows))


def _over(base: list[float], other: list[float]) -> float:
    return median(b / a for a, b in zip(base, other, strict=True))


def _equal(base: list[int], other: list[int]) -> int:
    """Tokens up to the first that differs."""
    pairs = enumerate(zip(base, other, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(base))


def table(rows: list[dict[str, Any]]) -> str:
    head = "| undone | expected | operators | ms a step | ratio | prefill | equal tokens |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['expected']} | {row['operators']} | {row['step_ms']:.2f} | "
            f"{row['ratio']:.2f}x | {row['prefill_ratio']:.2f}x | {row['equal_tokens']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
