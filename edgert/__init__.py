"""edgert: run small, unusual language and reasoning models on Jetson and CPUs.

    with edgert.load("bundles/smollm2-135m-instruct") as model:
        for piece in model.stream("The sun is a star that", max_tokens=40):
            print(piece.text, end="")

Importing this package imports nothing else of weight: names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgert._version import __version__
from edgert.errors import (
    BadBundle,
    BadCheckpoint,
    BadFile,
    BadTokenizer,
    CapacityExceeded,
    EdgertError,
    GateFailed,
    Incompatible,
    MissingDependency,
    OutOfMemory,
    Poisoned,
    UnsupportedModel,
    UsageError,
)

if TYPE_CHECKING:
    from edgert.generate import Generation, Piece, Stream, Timings
    from edgert.model import Model, load
    from edgert.sampler import SamplingParams
    from edgert.session import Session

_LAZY = {
    "Generation": "edgert.generate",
    "Model": "edgert.model",
    "Piece": "edgert.generate",
    "SamplingParams": "edgert.sampler",
    "Session": "edgert.session",
    "Stream": "edgert.generate",
    "Timings": "edgert.generate",
    "load": "edgert.model",
}

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadFile",
    "BadTokenizer",
    "CapacityExceeded",
    "EdgertError",
    "GateFailed",
    "Generation",
    "Incompatible",
    "MissingDependency",
    "Model",
    "OutOfMemory",
    "Piece",
    "Poisoned",
    "SamplingParams",
    "Session",
    "Stream",
    "Timings",
    "UnsupportedModel",
    "UsageError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgert' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
