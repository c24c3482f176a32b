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
    BadSession,
    BadTokenizer,
    CapacityExceeded,
    DeviceFailed,
    Diverged,
    EdgertError,
    ExcessiveDrift,
    GateFailed,
    Incompatible,
    MissingDependency,
    NewerFormat,
    OutOfMemory,
    Poisoned,
    SessionMismatch,
    UnsupportedModel,
    UsageError,
    WrongKey,
)

if TYPE_CHECKING:
    from edgert.conversation import Conversation
    from edgert.generate import Generation, Piece, Stream, Timings
    from edgert.migrating import Migration, migrate
    from edgert.model import Model, load
    from edgert.resuming import resume, resume_solving
    from edgert.sampler import SamplingParams
    from edgert.session import Session
    from edgert.solving import Look, Solution, Solving
    from edgert.tracing import TraceStep

_LAZY = {
    "Conversation": "edgert.conversation",
    "Generation": "edgert.generate",
    "Look": "edgert.solving",
    "Migration": "edgert.migrating",
    "Model": "edgert.model",
    "Piece": "edgert.generate",
    "SamplingParams": "edgert.sampler",
    "Session": "edgert.session",
    "Solution": "edgert.solving",
    "Solving": "edgert.solving",
    "Stream": "edgert.generate",
    "Timings": "edgert.generate",
    "TraceStep": "edgert.tracing",
    "load": "edgert.model",
    "migrate": "edgert.migrating",
    "resume": "edgert.resuming",
    "resume_solving": "edgert.resuming",
}

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadFile",
    "BadSession",
    "BadTokenizer",
    "CapacityExceeded",
    "DeviceFailed",
    "Diverged",
    "Conversation",
    "EdgertError",
    "ExcessiveDrift",
    "GateFailed",
    "Generation",
    "Incompatible",
    "Look",
    "Migration",
    "MissingDependency",
    "Model",
    "NewerFormat",
    "OutOfMemory",
    "Piece",
    "Poisoned",
    "SamplingParams",
    "Session",
    "SessionMismatch",
    "Solution",
    "Solving",
    "Stream",
    "Timings",
    "TraceStep",
    "UnsupportedModel",
    "UsageError",
    "WrongKey",
    "__version__",
    "load",
    "migrate",
    "resume",
    "resume_solving",
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
