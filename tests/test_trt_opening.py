"""Asking for a GPU: used where it is asked for, or one clear error, exit code 4, and no crash."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeCuda

import edgert
from edgert.backends import lowerings, open_backend
from edgert.backends.ort import OrtBackend
from edgert.backends.tensorrt import opening
from edgert.backends.tensorrt.opening import check_device, check_driver, load_tensorrt
from edgert.errors import Incompatible, MissingDependency, UsageError


def has_driver() -> bool:
    try:
        check_driver()
    except Incompatible:
        return False
    return True


without_driver = pytest.mark.skipif(has_driver(), reason="a CUDA driver is here")


@without_driver
@pytest.mark.parametrize("verb", ["run", "bench"])
def test_without_a_driver_the_command_ends_with_one_clear_message(half_bundle, verb):
    """The real command in a process of its own: a crash would be a negative code."""
    more = {"run": ["-p", "the star"], "bench": []}[verb]
    words = [verb, str(half_bundle), *more, "--device", "tensorrt"]
    command = [sys.executable, "-m", "edgert", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()  # bench says before that what it does
    assert lines[-3] == "error: no CUDA driver is here, so that TensorRT cannot run"
    assert lines[-2].startswith("  where  libcuda.so.1: cannot open shared object file")
    assert "--device cpu runs without" in lines[-1]
    assert "Traceback" not in done.stderr


@without_driver
def test_no_library_of_tensorrt_is_loaded_before_a_driver_is_found():
    code = (
        "import sys\n"
        "from edgert.backends import open_backend\n"
        "try:\n    open_backend('tensorrt')\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "print(sorted({'tensorrt', 'cuda', 'onnxruntime', 'onnx', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Incompatible", "[]"]


def test_what_is_missing_is_asked_for_in_the_order_that_does_not_crash(monkeypatch):
    """Driver, device, TensorRT's module, and its runtime last of all."""
    asked: list[str] = []

    class Watched(FakeCuda):
        def devices(self) -> int:
            asked.append("device")
            return 1

    def runtime(log: Any) -> Any:
        asked.append("runtime")
        return object()

    class Trt:
        __version__, ILogger, Runtime = "10.3.0", Logger, staticmethod(runtime)

    monkeypatch.setattr(opening, "check_driver", lambda: asked.append("driver"))
    monkeypatch.setattr(opening, "CudaBindings", Watched)
    monkeypatch.setattr(opening, "load_tensorrt", lambda: asked.append("module") or Trt)
    backend = opening.open_tensorrt()
    assert asked == ["driver", "device", "module", "runtime"]
    assert backend.placement == "tensorrt 10.3.0 · GPU, SM 8.7"
    backend.close()


class Logger:
    def __init__(self) -> None:
        pass


class NoDevice(FakeCuda):
    def devices(self) -> int:
        return 0


def test_a_driver_without_a_device_is_said():
    with pytest.raises(Incompatible, match="finds no device") as caught:
        check_device(NoDevice())
    assert "CUDA_VISIBLE_DEVICES" in (caught.value.do or "")


def test_tensorrt_that_is_missing_broken_or_old_is_said(monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="TensorRT is not installed") as caught:
        load_tensorrt()
    assert "sudo apt install nvidia-jetpack" in (caught.value.do or "")

    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(opening, "find_spec", lambda name: object())
    monkeypatch.setattr(opening, "import_module", broken)
    with pytest.raises(Incompatible, match=r"cannot be loaded: libnvinfer\.so\.10"):
        load_tensorrt()
    for version in ("8.6.2", "10.2.0"):
        old = SimpleNamespace(__version__=version)
        monkeypatch.setattr(opening, "import_module", lambda name, old=old: old)
        with pytest.raises(Incompatible, match=rf"TensorRT {version} is too old"):
            load_tensorrt()
    new = SimpleNamespace(__version__="10.16.1")
    monkeypatch.setattr(opening, "import_module", lambda name: new)
    assert load_tensorrt() is new


def test_bindings_that_are_missing_are_named(monkeypatch):
    from edgert.backends.tensorrt import cuda

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(cuda, "import_module", missing)
    with pytest.raises(MissingDependency, match="cuda-bindings") as caught:
        cuda.CudaBindings()
    assert caught.value.do == "pip install 'edgert[tensorrt]'"


@pytest.mark.parametrize("options", [{"threads": 2}, {"prepack": False}])
def test_settings_of_the_cpu_are_refused(options):
    """Asked for means used: a number of threads would change nothing."""
    with pytest.raises(UsageError, match="settings of the CPU"):
        open_backend("tensorrt", **options)


def test_each_device_has_its_lowerings():
    assert lowerings("tensorrt") == ("portable", "modern")
    assert lowerings("cuda") == ("portable",)


# ---------------------------------------------------------------- providers of ONNX Runtime


def test_a_provider_that_is_not_compiled_in_is_an_error(half_bundle):
    """ONNX Runtime itself would warn, and run on the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(Incompatible, match="is installed without CUDAExecutionProvider") as caught:
        edgert.load(half_bundle, device="cuda")
    assert "edgert[gpu]" in (caught.value.do or "")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_listed_and_not_used_is_an_error(half_bundle, monkeypatch):
    """As without a driver, where it is compiled in: the session falls back without a word. What
    session.get_providers() says is what counts."""
    import onnxruntime

    real = onnxruntime.get_available_providers()
    listed = ["CUDAExecutionProvider", *real]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(Incompatible, match="by CUDAExecutionProvider") as caught:
        edgert.load(half_bundle, device="cuda", precision="fp32")
    assert caught.value.exit_code == 4
    assert "CPU" in (caught.value.where or "")


def test_nodes_left_to_the_cpu_are_an_error(monkeypatch):
    """The setting that makes ONNX Runtime refuse them is on for a GPU, and off for a CPU."""
    import onnxruntime

    real = onnxruntime.get_available_providers()
    listed = ["CUDAExecutionProvider", *real]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    key = "session.disable_cpu_ep_fallback"
    gpu, cpu = OrtBackend(device="cuda"), OrtBackend()
    assert gpu._options.get_session_config_entry(key) == "1"
    assert gpu.build["device"] == "cuda"
    assert " · CUDA · " in gpu.placement
    with pytest.raises(RuntimeError):
        cpu._options.get_session_config_entry(key)
    assert "device" not in cpu.build
