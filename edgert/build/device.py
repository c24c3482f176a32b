"""Which compiler is here, and whether it can build for a target: asked before it gets a graph."""

from __future__ import annotations

from typing import Any

from edgert.backends.tensorrt.opening import imported, missing
from edgert.build.target import Target
from edgert.doctor.jetson import LIBCUDA
from edgert.doctor.machine import Machine
from edgert.errors import EdgertError, Incompatible, MissingDependency


def load_compiler(target: Target, machine: Machine | None = None) -> Any:
    """The compiler's module, which is of the target's version and may be used on this machine.

    Raises MissingDependency, and Incompatible for another version, no driver or another device. A
    library of TensorRT is not loaded before a driver and the right device have been found.
    """
    machine = machine or Machine()
    if not machine.found(target.compiler):
        raise _missing(target)
    if target.compiler == "tensorrt":
        _check_device(target, machine)
    trt = imported(target.compiler)
    version = str(trt.__version__)
    if version.split(".")[:2] != target.version.split("."):
        raise Incompatible(
            f"target {target.name} is for {target.compiler} {target.version}, here is {version}",
            do="choose the target of this device's JetPack",
        )
    return trt


def _missing(target: Target) -> MissingDependency:
    if target.compiler == "tensorrt_rtx":
        return MissingDependency("TensorRT-RTX", "rtx-check", why="it parses and compiles graphs")
    return missing(
        f"it compiles for {target.summary}",
        ". Elsewhere: --dry-run shows the plan, --target rtx-check compiles the graphs with "
        "TensorRT-RTX",
    )


def _check_device(target: Target, machine: Machine) -> None:
    """Without a driver, or for another device, TensorRT ends in errors that say nothing of it."""
    library = next((machine.root / p for p in LIBCUDA if (machine.root / p).exists()), None)
    if library is None:
        raise Incompatible(
            "no CUDA driver is here: engines are built on the device that runs them",
            do="build on the Jetson; in a container, start it with --runtime nvidia",
        )
    try:
        said = machine.cuda(library)
    except EdgertError as error:
        raise Incompatible(error.what, where=str(library), do="edgert doctor says more") from error
    if said.get("code") != 0 or not said.get("devices"):
        raise Incompatible(
            f"the CUDA driver finds no device: cuInit says {said.get('code')}",
            where=str(library),
            do="edgert doctor says more",
        )
    sm = said.get("sm")
    found = ".".join(map(str, sm)) if isinstance(sm, list) else "unknown"
    if found != target.sm:
        raise Incompatible(
            f"target {target.name} is for SM {target.sm}, this device has SM {found}",
            do="choose the target of this device",
        )
