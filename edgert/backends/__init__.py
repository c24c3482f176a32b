"""Where graphs run. A backend's library is imported when the backend is opened, not before."""

from __future__ import annotations

from edgert.backends.base import Backend
from edgert.errors import Incompatible, UsageError
from edgert.spec import Lowering

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
"""auto is cpu: a GPU is used where it is asked for."""

_LOWERINGS: dict[str, tuple[Lowering, ...]] = {
    "cpu": ("ort", "portable"),
    "cuda": ("portable",),
    "tensorrt": ("portable", "modern"),
}


def lowerings(device: str) -> tuple[Lowering, ...]:
    """The lowerings that a device runs, best first. Raises Incompatible for an unknown device."""
    if device not in DEVICES:
        raise Incompatible(
            f"there is no device {device!r}", do=f"choose one of: {', '.join(DEVICES)}"
        )
    return _LOWERINGS["cpu" if device == "auto" else device]


def check_device(device: str) -> None:
    """Raise Incompatible for a device that is unknown, or plainly not here, before any work."""
    lowerings(device)
    if device == "tensorrt":
        from edgert.backends.tensorrt.opening import check_driver

        check_driver()


def open_backend(device: str, *, threads: int = 0, prepack: bool = True) -> Backend:
    """The backend of a device. Raises Incompatible for a device this machine or version lacks,
    UsageError for a setting that the device has not."""
    lowerings(device)
    if device != "tensorrt":
        from edgert.backends.ort import OrtBackend

        provider = "cuda" if device == "cuda" else "cpu"
        return OrtBackend(threads=threads, prepack=prepack, device=provider)
    if threads or not prepack:
        raise UsageError(
            "threads and the layout of weights are settings of the CPU",
            do="leave --threads and --low-memory out, or use --device cpu",
        )
    from edgert.backends.tensorrt.opening import open_tensorrt

    return open_tensorrt()
