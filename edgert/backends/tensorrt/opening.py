"""Driver, CUDA and TensorRT of this machine, asked for one by one, so that what is missing is said.

The order is what keeps a machine without a driver from crashing: its library, then a device, then
TensorRT's module, and only then its runtime.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from edgert.backends.tensorrt.backend import TensorRTBackend
from edgert.backends.tensorrt.cuda import Cuda, CudaBindings
from edgert.errors import Incompatible, MissingDependency

MINIMUM = (10, 3)
_OTHERWISE = "edgert doctor says what is there; --device cpu runs without"


def open_tensorrt() -> TensorRTBackend:
    """Raises Incompatible without a driver or a device, MissingDependency without cuda-bindings or
    TensorRT; then no library of TensorRT has been loaded."""
    check_driver()
    cuda = CudaBindings()
    check_device(cuda)
    return TensorRTBackend(load_tensorrt(), cuda)


def check_driver(library: str = "libcuda.so.1") -> None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise Incompatible(
            "no CUDA driver is here, so that TensorRT cannot run",
            where=str(error),
            do=f"in a container, start it with --runtime nvidia; {_OTHERWISE}",
        ) from error


def check_device(cuda: Cuda) -> None:
    if cuda.devices() < 1:
        raise Incompatible(
            "the CUDA driver finds no device", do=f"is CUDA_VISIBLE_DEVICES empty? {_OTHERWISE}"
        )


def load_tensorrt() -> Any:
    """The module, of a version that edgert knows."""
    if find_spec("tensorrt") is None:
        raise missing("it runs engines on the GPU")
    trt = imported("tensorrt")
    version = str(trt.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        raise Incompatible(
            f"TensorRT {version} is too old: engines are built with {'.'.join(map(str, MINIMUM))} "
            "or newer",
            do="update to JetPack 6.1 or newer",
        )
    return trt


def missing(why: str, otherwise: str = "") -> MissingDependency:
    """TensorRT comes with JetPack, not from pip. `otherwise`: what to do elsewhere."""
    error = MissingDependency("TensorRT", "tensorrt", why=why)
    error.do = (
        "on the Jetson: sudo apt install nvidia-jetpack, and make the environment with "
        f"--system-site-packages{otherwise}"
    )
    return error


def imported(name: str) -> Any:
    """A module that is installed. Raises Incompatible if its libraries are not there."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Incompatible(
            f"{name} is installed and cannot be loaded: {error}",
            do="install its libraries, of the same version as its Python module",
        ) from error
