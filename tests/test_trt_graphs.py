"""Exported graphs through the TensorRT backend: its own plans, cache and wiring, with ONNX Runtime
in the engines' place. And one graph over the caller's arrays, on either device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cases import cases
from fake_cuda import FakeCuda
from fake_trt import ORIN, VERSION, Compiled, FakeTrt

import edgert
from edgert.backends.tensorrt import opening
from edgert.backends.tensorrt.backend import TensorRTBackend
from edgert.build.pipeline import fingerprint
from edgert.build.plan import GraphPlan, plan_build
from edgert.bundle import Bundle
from edgert.enginestore import engine_path, write_engine
from edgert.errors import Incompatible, UsageError
from edgert.model import Model

CASE = next(case for case in cases("hrm") if case.name == "orig_rope_puzzle")


def function(plan: GraphPlan) -> Any:
    """The graph of a plan as a Python function: what its engine computes."""
    session = onnxruntime.InferenceSession(str(plan.path), providers=["CPUExecutionProvider"])
    names = {name.replace(".", "_"): name for name in plan.inputs}

    def compute(**arrays: Any) -> Mapping[str, Any]:
        found = session.run(None, {names[name]: array for name, array in arrays.items()})
        return dict(zip((o.name for o in session.get_outputs()), found, strict=True))

    return compute


@contextmanager
def on_device(bundle: Path, precision: str, monkeypatch: Any) -> Iterator[Model]:
    """`edgert.load(..., device='tensorrt')` behind `edgert build --target orin-nano-jp6`."""
    cuda = FakeCuda()
    trt = FakeTrt(cuda)
    plan = plan_build(Bundle.open(bundle), ORIN, precision)
    for graph in plan.graphs:
        data = f"{plan.variant} {graph.name}".encode()
        trt.engines[data] = Compiled(
            graph.inputs, graph.outputs, graph.profiles, function(graph), scratch=graph.activations
        )
        made_for = fingerprint(plan, graph, f"tensorrt {VERSION}")
        write_engine(engine_path(made_for), asdict(made_for), {}, data)
    monkeypatch.setattr(opening, "open_tensorrt", lambda: TensorRTBackend(trt, cuda))
    with edgert.load(bundle, device="tensorrt") as model:
        yield model


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))
    # The device's stand-in runs graphs by ONNX Runtime's kernels: bits are compared to theirs.
    monkeypatch.setenv("EDGERT_NATIVE", "0")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_decoder_says_what_it_says_on_the_cpu(half_bundle, precision, monkeypatch, tmp_path):
    """The variant is the one that has engines; a session goes on where it was, on either device."""
    options = {"max_tokens": 24, "ignore_eos": True}
    with (
        on_device(half_bundle, precision, monkeypatch) as device,
        edgert.load(half_bundle, precision=precision) as host,
    ):
        assert device.runner.variant_name == f"{precision}-portable"
        want = host.generate("the star", **options)
        assert device.generate("the star", **options).tokens == want.tokens
        session = device.session()
        begun = session.generate("the star", max_tokens=9, ignore_eos=True).tokens
        session.save(tmp_path / "s")
        with edgert.resume(tmp_path / "s", device) as resumed:
            rest = resumed.generate(max_tokens=15, ignore_eos=True).tokens
        assert begun + rest == want.tokens
        ids = np.arange(2, 40).reshape(2, 19)
        assert np.array_equal(device.logits(ids), host.logits(ids))


def test_puzzles_end_where_they_end_on_the_cpu(half_solver, monkeypatch):
    """Three slots for many puzzles: rows move from buffer to buffer on the device."""
    ids = np.tile(CASE["inputs"], (4, 1))
    numbers = np.tile(CASE["puzzle_identifiers"], 4)
    found = []
    with (
        on_device(half_solver, "fp32", monkeypatch) as device,
        edgert.load(half_solver, precision="fp32") as host,
    ):
        for model in (device, host):
            found.append(model.solving(ids, number=numbers, batch=4, logits=True).run())
        traces = [model.trace(CASE["inputs"][:2], 3) for model in (device, host)]
    for got, want in zip(*found, strict=True):
        assert (got.steps, got.reason) == (want.steps, want.reason)
        assert np.array_equal(got.values, want.values)
        assert np.array_equal(got.results["logits"], want.results["logits"])
    assert [s.steps for s in found[0][: len(CASE["inputs"])]] == CASE["early_exit_step"].tolist()
    for got, want in zip(*traces, strict=True):
        for name, array in want.states.items():
            assert np.array_equal(got.states[name], array)


def test_an_unsolved_work_is_saved_and_goes_on(half_solver, monkeypatch, tmp_path):
    ids, numbers = CASE["inputs"], CASE["puzzle_identifiers"]
    with on_device(half_solver, "fp32", monkeypatch) as device:
        whole = device.solving(ids, number=numbers, batch=2).run()
        work = device.solving(ids, number=numbers, batch=2)
        work.step()
        work.save(tmp_path / "work")
        with edgert.resume_solving(tmp_path / "work", device) as again:
            rest = again.run()
    assert [(s.steps, s.values.tolist()) for s in rest] == [
        (s.steps, s.values.tolist()) for s in whole
    ]


# ------------------------------------------------------------------- arrays of the caller's


class Array:
    """A tensor on the device, as CuPy has them, in a stream of its own."""

    def __init__(self, cuda: FakeCuda, values: Any, stream: int | None = None, **said: Any) -> None:
        self.values = np.ascontiguousarray(values)
        self.address = cuda.malloc(max(256, self.values.nbytes))
        self.bytes = cuda.at(self.address, self.values.nbytes)
        self.bytes[:] = self.values.reshape(-1).view(np.uint8)
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": self.values.shape,
            "typestr": self.values.dtype.str,
            "data": (self.address, False),
            "stream": stream,
        } | said

    def get(self) -> Any:
        return self.bytes.view(self.values.dtype).reshape(self.values.shape).copy()


def prologue(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of two puzzles, and room for what the graph makes of them."""
    spec = model.runner.parts["prologue"]
    rng = np.random.default_rng(2)
    inputs, outputs = {}, {}
    for wires, into in ((spec.inputs, inputs), (spec.outputs, outputs)):
        for name, wire in wires.items():
            tensor = model.manifest.tensor_of(wire)
            shape = tuple(2 if axis == "batch" else axis for axis in tensor.shape)
            into[name] = (rng.random(shape) * 3).astype(tensor.dtype)
    return inputs, outputs


def test_one_graph_over_the_callers_arrays(half_solver, monkeypatch):
    """On the device where they are, behind the caller's stream; on the CPU numpy's own."""
    with (
        on_device(half_solver, "fp32", monkeypatch) as device,
        edgert.load(half_solver, precision="fp32") as host,
    ):
        inputs, outputs = prologue(host)
        host.bind("prologue", inputs, outputs).run()
        backend: Any = device.runner.backend
        cuda: FakeCuda = backend.device.cuda
        given = {name: Array(cuda, values, stream=77) for name, values in inputs.items()}
        made = {name: Array(cuda, np.zeros_like(values)) for name, values in outputs.items()}
        call = device.bind("prologue", given, made)
        copies = [name for name in cuda.calls if name.startswith("copy")]
        for _ in range(3):  # as it is, captured, launched
            for array in made.values():
                array.bytes[:] = 0
            call.run()
            for name, want in outputs.items():
                assert np.array_equal(made[name].get(), want)
        assert cuda.calls.count("launch") == 2
        assert set(cuda.followed) == {77}
        assert [name for name in cuda.calls if name.startswith("copy")] == copies


def test_arrays_of_the_other_memory_are_refused(half_solver, monkeypatch):
    with (
        on_device(half_solver, "fp32", monkeypatch) as device,
        edgert.load(half_solver, precision="fp32") as host,
    ):
        inputs, outputs = prologue(host)
        backend: Any = device.runner.backend
        there = {name: Array(backend.device.cuda, values) for name, values in inputs.items()}
        with pytest.raises(Incompatible, match="memory of a GPU, and this model runs on the CPU"):
            host.bind("prologue", there, outputs)
        with pytest.raises(Incompatible, match="memory of the host, and this model runs on the G"):
            device.bind("prologue", inputs, outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, o: i.pop("ids"), "has other inputs: see ids"),
        (lambda i, o: o.update(more=1), "has other outputs: see more"),
        (lambda i, o: i.update(ids=i["ids"].astype(np.int64)), "ids is int64"),
        (lambda i, o: i.update(ids=i["ids"][:1].copy()), r"float32 \[batch=1"),
        (lambda i, o: i.update(ids=i["ids"][:, :-1].copy()), r"int32 \[batch=2, 25"),
        (lambda i, o: i.update(ids=i["ids"][:, ::-1]), "is not dense"),
        (lambda i, o: i.update(ids=i["ids"].tolist()), "list is no numpy array"),
        (lambda i, o: [a.setflags(write=False) for a in o.values()], "for reading only"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(half_solver, change, message):
    with edgert.load(half_solver, precision="fp32") as model:
        inputs, outputs = prologue(model)
        change(inputs, outputs)
        with pytest.raises(UsageError, match=message):
            model.bind("prologue", inputs, outputs)
        with pytest.raises(UsageError, match="this model has no 'middle'"):
            model.bind("middle", {}, {})
