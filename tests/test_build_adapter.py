"""The adapter: it uses what all versions of TensorRT share, and says in errors what they said."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api_gate import TRT as API
from api_gate import called, strange, tree_of, uses

from edgert.build import adapter
from edgert.build.adapter import HOLDS, compile_graph
from edgert.build.device import load_compiler
from edgert.build.operators import RTX, SINCE_10_3
from edgert.build.plan import GraphPlan, ShapeProfile
from edgert.build.target import find
from edgert.doctor.machine import Machine
from edgert.errors import EdgertError, Incompatible, MissingDependency
from edgert.spec import TensorSpec

RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
RTX_ONLY |= {"get_compute_capability"}
"""TensorRT builds for the device that it runs on; TensorRT-RTX is told which."""

ATTENTION = {"ATTENTION_INPUT", "IAttentionInputLayer", "attention", "decomposable"}
"""From 10.14 on; used where the module has the class."""

ORIN = find("orin-nano-jp6")
TREE = tree_of(adapter)


@pytest.mark.parametrize("version", API)
def test_every_member_that_is_used_is_in_every_version(version):
    """Names of enumerations and attributes of objects, against what the bindings really have."""
    members = API[version]
    wrong = [
        f"line {line}: {owner}.{name}"
        for owner, name, line in uses(TREE, HOLDS)
        if name not in members.get(owner, ())
        and not (name in RTX_ONLY and not version.startswith("rtx"))
        and not (name in ATTENTION and version == "10.3")
        and not (owner == "ILogger" and name == "__init__")
        and not (owner == "IAttentionInputLayer" and name == "__class__")
        and not (owner == "IProgressMonitor" and name == "__init__")
    ]
    assert not wrong
    assert {owner for owner, _, _ in uses(TREE, HOLDS)} >= {"module", *HOLDS.values()}


def test_every_object_of_the_library_is_known_by_its_name():
    """An attribute of anything else is ours or Python's: a new variable is put into HOLDS."""
    ours = """advance dict found graph kinds log now phases plan profiles progress reasons
    self shape shapes spec target timings wanted wrong"""
    assert not strange(TREE, HOLDS, ours)
    assert called(TREE) == {"error.code().name"}


def test_dtypes_are_those_of_the_manifest_and_of_every_version():
    from edgert.spec import DTYPES

    assert adapter.DTYPES.keys() == set(DTYPES)
    for version, members in API.items():
        assert set(adapter.DTYPES.values()) <= set(members["DataType"]), version


def test_calibrators_and_weak_typing_are_gone_where_they_are_gone():
    """Why the graph says its types and its quantization: the record shows it."""
    assert "IInt8EntropyCalibrator2" in API["10.3"]["module"]
    assert "IInt8EntropyCalibrator2" not in API["11.4"]["module"]
    assert "precision" in API["10.3"]["ILayer"]
    assert "precision" not in API["11.4"]["ILayer"]


def test_the_table_of_operators_is_that_of_the_real_parser():
    """TensorRT-RTX was asked; what it needs plugins for is left out of the table."""
    said = set(API["rtx-1.7"]["operators"])
    assert said - RTX == {
        *("CausalConvWithState", "LinearAttention", "NonMaxSuppression", "NonZero", "RoiAlign")
    }
    assert said >= RTX
    assert SINCE_10_3 - said == {"DeformConv"}


def test_the_compiler_is_here_wherever_there_are_wheels_of_it():
    """The developer set-up brings it, so that a run which compiles nothing does not look whole."""
    if (platform.machine(), sys.platform) != ("x86_64", "linux"):
        pytest.skip("NOTHING IS COMPILED HERE: TensorRT-RTX has wheels for x86-64 Linux alone")
    assert importlib.util.find_spec("tensorrt_rtx"), "pip install -e '.[dev]' brings it"


# --------------------------------------------- a stand-in for the library, for what RTX lacks


class Interface:
    def __init__(self) -> None:
        pass


class Config:
    """Remembers what it was given."""

    def __init__(self, trt: Library) -> None:
        self.trt = trt
        self.limits: dict[str, int] = {}
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: str, limit: int) -> None:
        self.limits[pool] = limit

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, timing: bytes, ignore_mismatch: bool) -> bool:
        self.trt.timings = timing
        return not timing.startswith(b"other")

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.trt.timings + b"+new")

    def add_optimization_profile(self, profile: Any) -> int:
        return 0


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes

    def get_shape(self, name: str) -> Any:
        return self.shapes[name]


class Port:
    dtype, shape, is_shape_tensor, is_network_input = "FLOAT", (-1, 4), False, True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_dimension_name(self, at: int) -> str:
        return ("batch", "")[at]


class Library:
    """What the adapter calls of `tensorrt` 10.3, with a build that goes as a test wants it."""

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    ProfilingVerbosity = SimpleNamespace(LAYER_NAMES_ONLY="names")
    LayerType = SimpleNamespace(QUANTIZE="q", DEQUANTIZE="dq")
    DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF")
    IProgressMonitor = Interface

    def __init__(self, build: Any) -> None:
        self.build = build
        self.timings = b""
        self.config = Config(self)
        self.ILogger = type("ILogger", (Interface,), {})
        self.ILogger.Severity = SimpleNamespace(  # type: ignore[attr-defined]
            ERROR="error", INTERNAL_ERROR="internal", WARNING="warning"
        )

    def Builder(self, log: Any) -> Any:
        self.log = log
        network = SimpleNamespace(
            num_inputs=1,
            num_outputs=1,
            num_layers=1,
            get_input=lambda at: Port("x"),
            get_output=lambda at: Port("y"),
            get_layer=lambda at: SimpleNamespace(type="relu"),
        )
        return SimpleNamespace(
            create_network=lambda flags: network if flags == 2 else None,
            create_builder_config=lambda: self.config,
            create_optimization_profile=Profile,
            build_serialized_network=lambda network, config: self.build(self),
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return SimpleNamespace(parse_from_file=lambda path: True, num_errors=0)


SPEC = TensorSpec("float32", ("batch", 4))
PLAN = GraphPlan(
    *("step", Path("step.onnx"), ("aa",), {"x": SPEC}, {"y": SPEC}),
    (ShapeProfile("solve", {"x": ((1, 4), (1, 4), (8, 4))}),),
    *(1, (0, 0), 0, 0),
)


def test_a_build_has_its_limit_and_gives_back_timings():
    """What earlier builds have timed goes in, and what this one added comes out."""
    trt = Library(lambda trt: b"engine")
    made = compile_graph(trt, PLAN, ORIN, b"old")
    assert (made.engine, made.timings, made.layers) == (b"engine", b"old+new", 1)
    assert trt.config.limits == {"workspace": 1024 * 1_000_000}


def test_timings_of_another_device_are_not_used():
    trt = Library(lambda trt: b"engine")
    assert compile_graph(trt, PLAN, ORIN, b"other").timings == b"other"


def test_a_failed_build_says_what_the_compiler_said():
    """It returns nothing and raises nothing: the reason is in the log, and warnings are not it."""

    def fail(trt: Library) -> None:
        trt.log.log("warning", "never mind")
        trt.log.log("error", "Could not find any\nimplementation for node {Relu}")
        trt.log.log("internal", "Assertion failed")
        trt.log.log("error", "Could not find any implementation for node {Relu}")

    with pytest.raises(EdgertError, match="graph 'step' does not compile for orin-nano") as caught:
        compile_graph(Library(fail), PLAN, ORIN)
    assert (caught.value.where or "").split("\n    ") == [
        *("step.onnx", "Could not find any implementation for node {Relu}", "Assertion failed")
    ]


def test_progress_rises_to_the_whole():
    """Phases are nested; each step counts for its share of the phase around it."""
    seen: list[int] = []

    def work(trt: Library) -> bytes:
        monitor = trt.config.progress_monitor
        monitor.phase_start("build", None, 2)
        assert monitor.step_complete("build", 0)
        monitor.phase_start("tactics", "build", 5)
        for step in range(5):
            assert monitor.step_complete("tactics", step)
        monitor.phase_finish("tactics")
        assert monitor.step_complete("build", 1)
        monitor.phase_finish("build")
        return b"engine"

    compile_graph(Library(work), PLAN, ORIN, advance=seen.append)
    assert seen == [50, 10, 10, 10, 10, 10]


def test_an_interrupt_ends_the_build():
    """It is raised once the compiler has let go, not through its own frames."""

    def interrupted(amount: int) -> None:
        raise KeyboardInterrupt

    def work(trt: Library) -> None:
        monitor = trt.config.progress_monitor
        monitor.phase_start("build", None, 1)
        assert monitor.step_complete("build", 0) is False

    with pytest.raises(KeyboardInterrupt):
        compile_graph(Library(work), PLAN, ORIN, advance=interrupted)


# ---------------------------------------------------------------- which compiler, which device


def machine(root: Path, *, modules: tuple[str, ...] = ("tensorrt",), **said: Any) -> Machine:
    """A Jetson on paper: its driver answers `said`."""
    library = root / "usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()
    return Machine(root=root, found=lambda name: name in modules, cuda=lambda path: said)


@pytest.fixture
def tensorrt(monkeypatch) -> list[str]:
    """A module `tensorrt` 10.3; the list has who asked for it."""
    asked = []

    def load(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(__version__="10.3.0")

    monkeypatch.setattr("edgert.backends.tensorrt.opening.import_module", load)
    return asked


def test_the_right_device_gets_its_compiler(tmp_path, tensorrt):
    found = load_compiler(ORIN, machine(tmp_path, code=0, devices=1, sm=[8, 7]))
    assert found.__version__ == "10.3.0"
    assert tensorrt == ["tensorrt"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"code": 100, "devices": None}, "finds no device: cuInit says 100"),
        ({"code": 0, "devices": 0}, "finds no device: cuInit says 0"),
        ({"code": 0, "devices": 1, "sm": [11, 0]}, "is for SM 8.7, this device has SM 11.0"),
        ({"code": 0, "devices": 1}, "this device has SM unknown"),
    ],
)
def test_another_device_is_refused_before_the_library_is_loaded(tmp_path, tensorrt, said, message):
    with pytest.raises(Incompatible, match=message):
        load_compiler(ORIN, machine(tmp_path, **said))
    assert tensorrt == []


def test_a_driver_that_crashes_is_refused(tmp_path, tensorrt):
    def crash(library: Path) -> dict[str, object]:
        raise EdgertError("cuInit kills its process with signal 11")

    one = machine(tmp_path)
    with pytest.raises(Incompatible, match="kills its process"):
        load_compiler(ORIN, Machine(root=one.root, found=one.found, cuda=crash))
    assert tensorrt == []


def test_without_a_driver_tensorrt_is_not_loaded(tmp_path, tensorrt):
    nothing = Machine(root=tmp_path, found=lambda name: True)
    with pytest.raises(Incompatible, match="no CUDA driver is here"):
        load_compiler(ORIN, nothing)
    assert tensorrt == []


def test_another_version_is_refused(tmp_path, tensorrt):
    newer = find("agx-orin-jp7")
    with pytest.raises(Incompatible, match=r"is for tensorrt 10\.16, here is 10\.3\.0"):
        load_compiler(newer, machine(tmp_path, code=0, devices=1, sm=[8, 7]))


@pytest.mark.parametrize(
    ("target", "do"),
    [("orin-nano-jp6", "sudo apt install nvidia-jetpack"), ("rtx-check", "edgert[rtx-check]")],
)
def test_what_is_missing_is_named_with_the_way_to_it(tmp_path, target, do):
    with pytest.raises(MissingDependency) as caught:
        load_compiler(find(target), machine(tmp_path, modules=()))
    assert do in (caught.value.do or "")
    assert caught.value.exit_code == 4


def test_a_module_without_its_libraries_is_said(tmp_path, monkeypatch):
    def load(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("edgert.backends.tensorrt.opening.import_module", load)
    with pytest.raises(Incompatible, match=r"cannot be loaded: libnvinfer\.so\.10"):
        load_compiler(ORIN, machine(tmp_path, code=0, devices=1, sm=[8, 7]))
