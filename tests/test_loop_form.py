"""The loop inside one graph: it ends where the host ends it, with the same answers and carries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

import edgert
from edgert.build.plan import plan_build
from edgert.build.target import find
from edgert.bundle import Bundle
from edgert.errors import UnsupportedModel
from edgert.exits import Exit
from edgert.export.loop_form import LIMITS, STEPS, limits, loop_form
from edgert.halting import Halt, parse_halt
from edgert.puzzles import inputs_of
from edgert.runner import Execution, Runner
from edgert.slots import Entrance, Slots

Arrays = Mapping[str, NDArray[Any]]
ROWS = 8
PRECISIONS = ("fp32", "fp16")


class Form:
    """The loop form of a variant in ONNX Runtime."""

    def __init__(self, bundle: Bundle, variant: str, folder: Path) -> None:
        self.made = loop_form(bundle, variant)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(self.made.write(folder))
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        names = list(self.made.outputs)
        assert feeds.keys() == self.made.inputs.keys()
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


# ------------------------------------------------------------------------- puzzles


def on_host(runner: Runner, rows: list[Arrays], policy: Exit) -> dict[str, NDArray[Any]]:
    """All rows together, until the last has ended: what each has as it ends."""
    slots, entrance = Slots(runner, len(rows)), Entrance(runner)
    for at, row in enumerate(rows):
        entrance.run(row)
        slots.enter(at, entrance)
    totals = np.zeros(len(rows), np.float32)
    found: dict[str, NDArray[Any]] = {STEPS: np.zeros(len(rows), np.int64)}
    while not found[STEPS].all():
        slots.advance()
        signal = None
        if policy.signal is not None:
            totals = totals + slots.signals[policy.signal]
            signal = totals if policy.cumulative else slots.signals[policy.signal]
        ended = policy.done(slots.steps, signal) | (slots.steps >= policy.most)
        now = slots.results() | slots.export(range(len(rows)))
        for row in np.flatnonzero(ended & (found[STEPS] == 0)):
            found[STEPS][row] = slots.steps[row]
            for name, array in now.items():
                found.setdefault(name, np.zeros_like(array))[row] = array[row]
    return found


def policies(runner: Runner, rows: list[Arrays]) -> list[Exit]:
    """The model's own rule; those in between of what its signal says, so that rows differ; and
    numbers of iterations."""
    loop = runner.loop
    assert loop is not None
    assert loop.halt is not None
    slots, entrance = Slots(runner, len(rows)), Entrance(runner)
    for at, row in enumerate(rows):
        entrance.run(row)
        slots.enter(at, entrance)
    seen, total = [], np.zeros(len(rows), np.float32)
    for _ in range(loop.iterations):
        slots.advance()
        total = total + slots.signals[loop.halt.signal]
        seen.append(total if loop.halt.cumulative else slots.signals[loop.halt.signal].copy())
    values = np.sort(np.concatenate(seen))
    middles = [float((a + b) / 2) for a, b in zip(values, values[1:], strict=False) if b - a > 1e-4]
    rule = runner.exit(None)
    between = [replace(rule, threshold=at) for at in middles[:: max(1, len(middles) // 6)]]
    least = replace(between[0], least=2) if between else rule
    return [rule, *between, least, Exit(1), Exit(loop.iterations)]


@pytest.fixture(autouse=True)
def _onnx_runtimes_kernels(monkeypatch) -> None:
    """Bits are compared, and kernels of our own are not put into the body of an ONNX Loop."""
    monkeypatch.setenv("EDGERT_NATIVE", "0")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bundle", ["half_solver", "half_cycles"])
def test_puzzles_end_where_the_host_ends_them(bundle, precision, request, tmp_path):
    """Same iteration of each row, bit for bit the same answers, scores and carries: one rule reads
    a score, the other the sum of a probability in a model that counts its cycles."""
    root = request.getfixturevalue(bundle)
    rng = np.random.default_rng(11)
    with edgert.load(root, precision=precision, threads=1) as model:
        runner, manifest = model.runner, model.manifest
        form = Form(model.bundle, runner.variant_name, tmp_path)
        number = rng.integers(6 if manifest.tables else 1, size=ROWS)
        ids = rng.integers(manifest.vocab_size, size=(ROWS, manifest.context)).astype(np.int32)
        rows = [inputs_of(model, *each) for each in zip(ids, map(int, number), strict=True)]
        given = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        loop = runner.loop
        assert loop is not None
        taken: Counter[int] = Counter()
        mixed = 0
        for policy in policies(runner, rows):
            want = on_host(runner, rows, policy)
            got = form.run(given | limits(policy, loop.iterations))
            for name, array in got.items():
                assert np.array_equal(array, want[name]), f"{policy}: {name}"
            taken.update(got[STEPS].tolist())
            mixed += len(set(got[STEPS].tolist())) > 1
            solved = model.solving(ids, number=number, halt=str(policy), batch=ROWS).run()
            assert [answer.steps for answer in solved] == got[STEPS].tolist()
            assert np.array_equal([answer.values for answer in solved], got["token"])
        assert len(taken) > 2, "rows end behind different iterations"
        assert mixed > 1, "in one batch, too"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_does_not_depend_on_its_batch_mates(half_solver, rows, tmp_path):
    """A batch of any size, from the same file."""
    bundle = Bundle.open(half_solver, verify=False)
    form = Form(bundle, "fp32-portable", tmp_path)
    rng = np.random.default_rng(4)
    shapes = {n: (5, *map(int, s.shape[1:])) for n, s in bundle.manifest.inputs.items()}
    given = {
        "ids": rng.integers(bundle.manifest.vocab_size, size=shapes["ids"]).astype(np.int32),
        "puzzle": rng.normal(size=shapes["puzzle"]).astype(np.float32),
    }
    policy = limits(Exit(5, "halt", -0.1), 5)
    whole = form.run(given | policy)
    part = form.run({name: array[:rows] for name, array in given.items()} | policy)
    assert part[STEPS].tolist() == whole[STEPS][:rows].tolist()
    np.testing.assert_allclose(part["logits"], whole["logits"][:rows], atol=1e-5)


# -------------------------------------------------------------------------- tokens


SETTLING = ["full", "fixed:1", "fixed:2", "settle:0.3", "settle:0.5:1:2", "settle:0.4:2"]


def fed(execution: Execution, ids: NDArray[np.int64]) -> None:
    """Prompts of different lengths, row by row."""
    for row, prompt in enumerate(ids):
        for _ in execution.row(row).feed(prompt[: len(prompt) - row]):
            pass


def held(execution: Execution) -> dict[str, NDArray[Any]]:
    return {name: buffer.read() for name, buffer in execution.states.buffers.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_end_where_the_host_ends_them(half_looped, precision, tmp_path):
    """Depth of each row, bit for bit the same logits, and keys and values of all iterations, those
    that were skipped included; token after token, in ragged rows."""
    rng = np.random.default_rng(2)
    with edgert.load(half_looped, precision=precision, threads=1) as model:
        form = Form(model.bundle, model.runner.variant_name, tmp_path)
        changes = measured(model.runner, rng)
        depths: Counter[int] = Counter()
        mixed = 0
        for policy in (*map(parse_halt, SETTLING), *(Halt(at) for at in changes)):
            execution = model.runner.open(batch=3, tokens=24)
            fed(execution, rng.integers(model.manifest.vocab_size, size=(3, 9)))
            for _ in range(4):
                ids = rng.integers(model.manifest.vocab_size, size=(3, 1))
                given = {"ids": ids, "select": np.zeros((3, 1), np.int64), **held(execution)}
                got = form.run(given | limits(policy, 3))
                io = execution.io()
                io.ids[:], io.select[:] = ids, 0
                io.run(policy)
                states = held(execution)
                assert got.pop(STEPS).tolist() == io.iterations.tolist(), str(policy)
                assert np.array_equal(got.pop("logits"), io.logits), str(policy)
                assert np.array_equal(got.pop("token"), io.token), str(policy)
                assert np.isfinite(got.pop("h")).all()
                for name, array in got.items():
                    assert np.array_equal(array, states[name.removesuffix(".next")]), name
                depths.update(io.iterations.tolist())
                mixed += len(set(io.iterations.tolist())) > 1
            execution.close()
        assert set(depths) == {1, 2, 3}
        assert mixed > 2, "rows of one batch end at different depths"


def measured(runner: Runner, rng: np.random.Generator) -> list[float]:
    """Thresholds among the changes that tokens really have."""
    execution = runner.open(tokens=32)
    seen = []
    for token in rng.integers(runner.manifest.vocab_size, size=24).tolist():
        seen += execution.step(token, Halt(1e-9)).bound.changes[:-1]
    execution.close()
    return [float(np.quantile(seen, at)) for at in (0.2, 0.5, 0.8)]


def test_a_chunk_of_tokens_runs_all_iterations(half_looped, tmp_path):
    """The same file prefills: `full` is a threshold of 0."""
    with edgert.load(half_looped, precision="fp32", threads=1) as model:
        form = Form(model.bundle, model.runner.variant_name, tmp_path)
        execution = model.runner.open(tokens=24)
        ids = np.random.default_rng(5).integers(model.manifest.vocab_size, size=(1, 7))
        given = {"ids": ids, "select": np.array([[2, 6]]), **held(execution)}
        got = form.run(given | limits(Halt(), 3))
        io = execution.io(7, 2)
        io.ids[:], io.select[:] = ids, (2, 6)
        io.run()
        assert got[STEPS].tolist() == [3]
        assert np.array_equal(got["logits"], io.logits)
        for name, array in held(execution).items():
            if name != "lens":
                assert np.array_equal(got[f"{name}.next"], array), name


# --------------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("bundle", ["half_solver", "half_cycles", "half_looped"])
def test_one_loop_over_the_weights_of_the_stepped_graphs(bundle, request, tmp_path):
    """A Loop with a condition, trips that are a constant, nothing scanned; a weight is there once;
    the whole is as strictly typed as the parts."""
    opened = Bundle.open(request.getfixturevalue(bundle), verify=False)
    made = loop_form(opened, "fp16-portable")
    (loop,) = [node for node in made.model.graph.node if node.op_type == "Loop"]
    assert all(loop.input)
    constants = {tensor.name: tensor for tensor in made.model.graph.initializer}
    trips = onnx.numpy_helper.to_array(constants[loop.input[0]])
    assert trips == opened.manifest.program.loop.iterations
    (body,) = [attribute.g for attribute in loop.attribute]
    assert len(body.output) == len(body.input) - 1 == len(loop.output) + 1
    for given, kept in zip(body.input[2:], body.output[1:], strict=True):
        assert given.type == kept.type
    stored = [
        tuple(sorted((e.key, e.value) for e in tensor.external_data))
        for tensor in constants.values()
        if tensor.external_data
    ]
    assert len(set(stored)) == len(stored) > 5
    onnx.shape_inference.infer_shapes(made.model, check_type=True, strict_mode=True)


def test_a_model_without_a_loop_has_no_such_form(half_bundle):
    with pytest.raises(UnsupportedModel, match="has no loop that it could end by itself"):
        loop_form(Bundle.open(half_bundle, verify=False), "fp32-portable")


def test_the_plan_has_the_loop_instead_of_its_parts(half_looped, tmp_path):
    """With the shapes and the memory of one graph; for JetPack 6 as for others."""
    bundle = Bundle.open(half_looped, verify=False)
    plan = plan_build(bundle, find("orin-nano-jp6"), loop_form=tmp_path)
    (graph,) = plan.graphs
    assert graph.name == "loop"
    assert graph.inputs.keys() == {"ids", "select", *bundle.manifest.states, *LIMITS}
    parts = plan_build(bundle, find("orin-nano-jp6")).graphs
    assert graph.weights < sum(part.weights for part in parts)
    assert graph.weights >= max(part.weights for part in parts)
    assert {p.name for p in graph.profiles} == {"prefill", "step"}
    assert len(graph.sha256) == 2
    assert json.dumps(plan.to_json())


def test_modern_graphs_have_no_loop_form(half_looped, tmp_path):
    """TensorRT parses an attention layer inside a loop and then fails to compile it: refused before
    that, and a target that prefers modern graphs takes portable ones for this."""
    bundle, target = Bundle.open(half_looped, verify=False), find("thor-jp7")
    assert plan_build(bundle, target).variant.endswith("modern")
    plan = plan_build(bundle, target, loop_form=tmp_path)
    assert plan.variant.endswith("portable")
    with pytest.raises(UnsupportedModel, match="attention layers inside a loop"):
        plan_build(bundle, target, loop_form=tmp_path, lowering="modern")
