"""Where graphs run. A backend's library is imported when the backend is opened, not before."""

from __future__ import annotations

from edgert.backends.base import Backend
from edgert.errors import Incompatible
from edgert.spec import Lowering

DEVICES = ("auto", "cpu")

LOWERINGS: dict[str, tuple[Lowering, ...]] = {"cpu": ("ort", "portable")}
"""Per device, the lowerings it runs, best first."""


def open_backend(device: str, *, threads: int = 0, prepack: bool = True) -> Backend:
    """The backend of a device. Raises Incompatible for a device this machine or version lacks."""
    if device not in DEVICES:
        raise Incompatible(
            f"there is no device {device!r}", do=f"choose one of: {', '.join(DEVICES)}"
        )
    from edgert.backends.ort import OrtBackend

    return OrtBackend(threads=threads, prepack=prepack)
