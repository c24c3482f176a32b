"""Backends: ONNX Runtime bound in place on tiny hand-made graphs, and its failures as ours."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgert.backends import lowerings, open_backend
from edgert.backends.base import GraphSource, LoadedGraph
from edgert.backends.fake import FakeBackend
from edgert.backends.ort import SMALL, OrtBackend, default_threads
from edgert.errors import (
    BadBundle,
    EdgertError,
    Incompatible,
    MissingDependency,
    OutOfMemory,
    UsageError,
)

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def model(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> onnx.ModelProto:
    """`inputs` and `outputs` as name -> (type, shape)."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, *spec) for name, spec in inputs.items()],
        [value(name, *spec) for name, spec in outputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


ADD = model(
    [helper.make_node("Add", ["x", "y"], ["z"])],
    {"x": (F32, ["n"]), "y": (F32, ["n"])},
    {"z": (F32, ["n"])},
)
EXPAND = model(
    [
        helper.make_node("Expand", ["x", "shape"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["y"], keepdims=0),
    ],
    {"x": (F32, [1]), "shape": (I64, [2])},
    {"y": (F32, [])},
)
GATHER = model(
    [helper.make_node("Gather", ["x", "i"], ["y"])],
    {"x": (F32, [3]), "i": (I64, [1])},
    {"y": (F32, [1])},
)


@pytest.fixture(scope="module")
def ort() -> OrtBackend:
    return OrtBackend()


def loaded(backend: OrtBackend, proto: onnx.ModelProto, folder: Path) -> LoadedGraph:
    path = folder / "g.onnx"
    path.write_bytes(proto.SerializeToString())
    names = [tuple(v.name for v in side) for side in (proto.graph.input, proto.graph.output)]
    return backend.load(GraphSource("g", path, *names))


def test_an_output_is_bound_onto_an_input(ort, tmp_path):
    """x + y -> x: the buffer itself counts up, as KV state does."""
    graph = loaded(ort, ADD, tmp_path)
    x, y = ort.allocate("float32", (3,)), ort.allocate("float32", (3,))
    y.host[...] = (1, 2, 3)
    binding = graph.bind({"x": x, "y": y}, {"z": x})
    address = x.host.ctypes.data
    for _ in range(4):
        binding.run()
    assert x.host.tolist() == [4, 8, 12]
    assert x.host.ctypes.data == address


def test_a_row_is_bound_over_the_memory_of_its_batch(ort, tmp_path):
    graph = loaded(ort, model(ADD.graph.node, *two_dimensional()), tmp_path)
    batch = ort.allocate("float32", (3, 2))
    batch.host[...] = 1
    row = batch.row(1)
    graph.bind({"x": row, "y": row}, {"z": row}).run()
    assert batch.host.tolist() == [[1, 1], [2, 2], [1, 1]]


def two_dimensional() -> tuple[dict[str, Any], dict[str, Any]]:
    spec = (F32, ["b", "n"])
    return {"x": spec, "y": spec}, {"z": spec}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_every_dtype_of_a_bundle_is_bound(ort, tmp_path, dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model(
        [helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, ["n"])}, {"y": (kind, ["n"])}
    )
    x, y = ort.allocate(dtype, (4,)), ort.allocate(dtype, (4,))
    x.write(np.array([0, 1, 1, 0]).astype(dtype))
    loaded(ort, proto, tmp_path).bind({"x": x}, {"y": y}).run()
    assert np.array_equal(y.read(), x.read())


def test_buffers_live_as_long_as_their_binding(ort, tmp_path):
    """Losing one would let the library write into freed memory."""
    graph = loaded(ort, ADD, tmp_path)
    size = 1 << 20
    x, y, z = (ort.allocate("float32", (size,)) for _ in range(3))
    x.host[...], y.host[...] = 1, 2
    seen = z.host
    binding = graph.bind({"x": x, "y": y}, {"z": z})
    del x, y, z
    gc.collect()
    rubbish = [np.full(size, 7, np.float32) for _ in range(3)]
    binding.run()
    assert (seen == 3).all()
    assert len(rubbish) == 3


def test_closing_is_safe_while_bindings_live_and_twice(ort, tmp_path):
    """What is left of a binding fails with a typed error, and is freed without a crash."""
    graph = loaded(ort, ADD, tmp_path)
    x = ort.allocate("float32", (3,))
    binding = graph.bind({"x": x, "y": x}, {"z": x})
    binding.run()
    graph.close()
    graph.close()
    gc.collect()
    with pytest.raises(EdgertError, match="graph 'g' failed in a step"):
        binding.run()
    del binding
    gc.collect()
    assert x.host.tolist() == [0, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not a graph", ADD.SerializeToString()[:40]])
def test_a_broken_graph_is_a_bad_bundle(ort, tmp_path, content):
    """The message has the library's version and reason, and the file."""
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(BadBundle, match=r"ONNX Runtime [\d.]+ refuses graph 'g'") as caught:
        ort.load(GraphSource("g", path, ("x", "y"), ("z",)))
    assert caught.value.where == str(path)
    assert "export the bundle again" in str(caught.value)


def test_a_step_that_fails_says_which_graph_and_why(ort, tmp_path, capfd):
    """An index out of bounds: a typed error, and nothing from the library on stderr."""
    graph = loaded(ort, GATHER, tmp_path)
    x, i = ort.allocate("float32", (3,)), ort.allocate("int64", (1,))
    y = ort.allocate("float32", (1,))
    i.host[0] = 9
    with pytest.raises(EdgertError, match="graph 'g' failed in a step") as caught:
        graph.bind({"x": x, "i": i}, {"y": y}).run()
    assert type(caught.value) is EdgertError
    assert "out of data bounds" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_step_without_memory_is_out_of_memory(ort, tmp_path):
    graph = loaded(ort, EXPAND, tmp_path)
    x, shape, y = (
        ort.allocate("float32", (1,)),
        ort.allocate("int64", (2,)),
        ort.allocate("float32", ()),
    )
    shape.host[...] = (1 << 20, 1 << 22)
    with pytest.raises(OutOfMemory, match="graph 'g' ran out of memory") as caught:
        graph.bind({"x": x, "shape": shape}, {"y": y}).run()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["x", "z"])
def test_a_tensor_of_another_size_is_never_written_past(ort, tmp_path, name):
    """A manifest that disagrees with its graph fails in the step, or when it is bound."""
    graph = loaded(ort, ADD, tmp_path)
    ends = {end: ort.allocate("float32", (4,)) for end in "xyz"}
    ends[name] = ort.allocate("float32", (2,))
    with pytest.raises(EdgertError, match="graph 'g'"):
        graph.bind({"x": ends["x"], "y": ends["y"]}, {"z": ends["z"]}).run()


def test_a_tensor_of_another_name_is_a_bad_bundle(ort, tmp_path):
    graph = loaded(ort, ADD, tmp_path)
    x = ort.allocate("float32", (4,))
    with pytest.raises(BadBundle, match="does not take the tensors of its manifest") as caught:
        graph.bind({"x": x, "other": x}, {"z": x})
    assert caught.value.where == str(tmp_path / "g.onnx")


def test_the_gil_is_released_while_a_graph_runs(ort, tmp_path):
    """Another thread counts on while one step multiplies large matrices."""
    size = 1024
    spec = (F32, [size, size])
    chain = [helper.make_node("MatMul", [f"t{i}", "x"], [f"t{i + 1}"]) for i in range(12)]
    chain[0].input[0] = "x"
    graph = loaded(ort, model(chain, {"x": spec}, {"t12": spec}), tmp_path)
    x, out = ort.allocate("float32", (size, size)), ort.allocate("float32", (size, size))
    binding = graph.bind({"x": x}, {"t12": out})
    beats: list[float] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            beats.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.perf_counter()
    binding.run()
    end = time.perf_counter()
    done.set()
    counter.join()
    within = sum(start < beat < end for beat in beats)
    assert within >= 2, f"{within} beats in {end - start:.3f} s"


def test_models_of_a_process_may_differ_in_threads(tmp_path):
    for threads in (1, 3):
        backend = OrtBackend(threads=threads)
        x = backend.allocate("float32", (2,))
        x.host[...] = 1
        loaded(backend, ADD, tmp_path).bind({"x": x, "y": x}, {"z": x}).run()
        assert x.host.tolist() == [2, 2]
        assert backend.placement.endswith(f"· {threads} thread{'s' * (threads > 1)}")


def test_the_sessions_of_an_application_go_on_working(tmp_path):
    """Loading a model changes nothing for those who use ONNX Runtime beside it."""
    code = """
run(OrtBackend())
session = onnxruntime.InferenceSession("g.onnx")
print(len(session.get_inputs()))
"""
    assert in_a_new_process(code, tmp_path).endswith("\n2\n")


def in_a_new_process(code: str, tmp_path: Path) -> str:
    """stdout of `code`, in which `run(backend)` loads a graph and runs it."""
    (tmp_path / "g.onnx").write_bytes(ADD.SerializeToString())
    prelude = """
from pathlib import Path
import onnxruntime
from edgert.backends.base import GraphSource
from edgert.backends.ort import OrtBackend
from edgert.errors import Incompatible

def run(backend):
    graph = backend.load(GraphSource("g", Path("g.onnx"), ("x", "y"), ("z",)))
    x = backend.allocate("float32", (2,))
    x.host[...] = 1
    graph.bind({"x": x, "y": x}, {"z": x}).run()
    print(x.host.tolist(), backend.placement.rpartition(" · ")[2])
"""
    result = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("before", "threads"),
    [
        ("", "1 thread"),
        ("onnxruntime.InferenceSession('g.onnx')", "1 thread"),  # in use, no pool of the process
        ("onnxruntime.set_global_thread_pool_sizes(2, 1)", "the application's threads"),
    ],
)
def test_an_application_that_uses_onnxruntime_itself_is_no_obstacle(before, threads, tmp_path):
    """Whatever it did before, a model loads, runs, and says on which threads."""
    wanted = 0 if "global" in before else 1
    out = in_a_new_process(f"{before}\nrun(OrtBackend(threads={wanted}))", tmp_path)
    assert out == f"[2.0, 2.0] {threads}\n"


def test_threads_of_an_application_cannot_be_chosen(tmp_path):
    code = """
onnxruntime.set_global_thread_pool_sizes(2, 1)
try:
    run(OrtBackend(threads=2))
except Incompatible as error:
    print(error)
"""
    assert "on one pool of threads for all" in in_a_new_process(code, tmp_path)


def test_the_placement_says_what_runs_where(ort):
    import onnxruntime

    cores = default_threads()
    count = f"{cores} thread{'s' if cores > 1 else ''}"
    assert ort.placement == f"onnxruntime {onnxruntime.__version__} · CPU · {count}"


@pytest.mark.parametrize(
    ("asked", "nbytes", "used"),
    [(0, SMALL - 1, 1), (0, SMALL, default_threads()), (3, SMALL - 1, 3), (3, SMALL, 3)],
)
def test_a_small_model_runs_on_one_thread_unless_told(asked, nbytes, used):
    backend = OrtBackend(threads=asked)
    backend.expect(1, nbytes)
    assert backend.build["threads"] == str(used)
    assert backend.placement.endswith(f" {used} thread{'s' * (used > 1)}")


@pytest.mark.parametrize("threads", [-1, 1025])
def test_an_impossible_number_of_threads_is_refused(threads):
    with pytest.raises(UsageError, match=f"threads = {threads} is not possible") as caught:
        OrtBackend(threads=threads)
    assert "0 (edgert chooses) to 1024" in str(caught.value)


def test_without_prepacking_the_answers_are_the_same(tmp_path):
    backend = OrtBackend(prepack=False)
    x = backend.allocate("float32", (2,))
    x.host[...] = 3
    loaded(backend, ADD, tmp_path).bind({"x": x, "y": x}, {"z": x}).run()
    assert x.host.tolist() == [6, 6]
    backend.close()


def test_onnxruntime_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the import system's own "not there"
    with pytest.raises(MissingDependency, match="onnxruntime is not installed") as caught:
        open_backend("cpu")
    assert "pip install 'edgert[cpu]'" in str(caught.value)


@pytest.mark.parametrize("version", ["1.22.1", "1.9.0", "0.30", "unknown"])
def test_onnxruntime_that_is_too_old_is_refused(monkeypatch, version):
    old = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "onnxruntime", old)
    with pytest.raises(MissingDependency, match=f"{version} is too old") as caught:
        OrtBackend()
    assert "onnxruntime 1.23 or newer" in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "", "CPU"])
def test_an_unknown_device_names_those_there_are(device):
    for use in (open_backend, lowerings):
        with pytest.raises(Incompatible, match=f"no device {device!r}") as caught:
            use(device)
        assert "auto, cpu" in str(caught.value)


def test_the_fastest_lowering_comes_first():
    assert lowerings("auto") == lowerings("cpu") == ("ort", "portable")


def test_a_fake_graph_keeps_the_outputs_it_leaves_out():
    """Names with dots reach the function with underscores."""
    backend = FakeBackend({"g": lambda x, k_0: {"y": x + k_0}})
    graph = backend.load(GraphSource("g", Path("g"), ("x", "k.0"), ("y", "z")))
    x, y, z = (backend.allocate("int64", (2,)) for _ in range(3))
    x.host[...], z.host[...] = 4, 9
    graph.bind({"x": x, "k.0": x}, {"y": y, "z": z}).run()
    assert (y.host.tolist(), z.host.tolist()) == ([8, 8], [9, 9])
    graph.close()
    backend.close()
    assert backend.placement == "python functions"
