"""Where graphs run. A backend's library is imported when the backend is opened, not before."""

from __future__ import annotations

from edgert.backends.base import Backend
from edgert.errors import Incompatible
from edgert.spec import Lowering

DEVICES = ("auto", "cpu")

_LOWERINGS: dict[str, tuple[Lowering, ...]] = {"cpu": ("ort", "portable")}


def lowerings(device: str) -> tuple[Lowering, ...]:
    """The lowerings that a device runs, best first. Raises Incompatible for an unknown device."""
    if device not in DEVICES:
        raise Incompatible(
            f"there is no device {device!r}", do=f"choose one of: {', '.join(DEVICES)}"
        )
    return _LOWERINGS["cpu" if device == "auto" else device]


def open_backend(device: str, *, threads: int = 0, prepack: bool = True) -> Backend:
    """The backend of a device. Raises Incompatible for a device this machine or version lacks."""
    lowerings(device)
    from edgert.backends.ort import OrtBackend

    return OrtBackend(threads=threads, prepack=prepack)
