"""Every way edgert can fail, as one tree; each class carries the CLI's exit code.

    EdgertError                 1    something failed at run time
    ├── UsageError              2    an argument, option or recipe key is wrong
    ├── BadFile                 3    a file is broken, hostile or not what it claims
    │   ├── BadBundle                manifest, wiring, paths or hashes of a bundle
    │   ├── BadCheckpoint            a published checkpoint, GGUF file or model folder
    │   ├── BadTokenizer             tokenizer or chat template
    │   └── BadSession               a session file: damaged, cut off, or not one at all
    ├── UnsupportedModel        3    a sound file that asks for what this version lacks
    ├── Incompatible            4    device, backend, engine or session do not fit together
    │   ├── MissingDependency        an optional package; names the extra to install
    │   ├── NewerFormat              a file of a later edgert
    │   ├── SessionMismatch          a session that belongs to another bundle or variant
    │   ├── ExcessiveDrift           a session's state is too far from another variant's own
    │   └── WrongKey                 an encrypted session, and no key or not its key
    ├── OutOfMemory             5    an allocation failed or a preflight refused it
    ├── CapacityExceeded        5    the sequence is longer than the model or its state allows
    ├── GateFailed              6    a graph does not compute what the model computes
    ├── DeviceFailed            1    a call of CUDA or TensorRT failed while a model ran
    ├── Diverged                1    training came to a loss or gradient that is NaN or infinite
    └── Poisoned                1    the session failed in mid-step; its state is not trusted

Every message says what happened, where, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadFile",
    "BadSession",
    "BadTokenizer",
    "CapacityExceeded",
    "DeviceFailed",
    "Diverged",
    "EdgertError",
    "ExcessiveDrift",
    "GateFailed",
    "Incompatible",
    "MissingDependency",
    "NewerFormat",
    "OutOfMemory",
    "Poisoned",
    "SessionMismatch",
    "UnsupportedModel",
    "UsageError",
    "WrongKey",
]


class EdgertError(Exception):
    """What happened (`what`), in which file or field (`where`), and the way out (`do`).

    `str()` is the whole message, one line per part, ready to print.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.do = do

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where  {self.where}")
        if self.do:
            lines.append(f"  do     {self.do}")
        return "\n".join(lines)


class UsageError(EdgertError):
    exit_code = 2


class BadFile(EdgertError):
    exit_code = 3


class BadBundle(BadFile):
    pass


class BadCheckpoint(BadFile):
    pass


class BadTokenizer(BadFile):
    pass


class BadSession(BadFile):
    pass


class UnsupportedModel(EdgertError):
    exit_code = 3


class Incompatible(EdgertError):
    exit_code = 4


class MissingDependency(Incompatible):
    """An optional package is absent. `extra` is the extra of edgert that brings it."""

    def __init__(self, package: str, extra: str, *, why: str) -> None:
        super().__init__(
            f"{package} is not installed: {why}",
            do=f"pip install 'edgert[{extra}]'",
        )
        self.package = package
        self.extra = extra


class NewerFormat(Incompatible):
    pass


class SessionMismatch(Incompatible):
    pass


class ExcessiveDrift(Incompatible):
    pass


class WrongKey(Incompatible):
    pass


class OutOfMemory(EdgertError):
    exit_code = 5


class CapacityExceeded(EdgertError):
    exit_code = 5


class GateFailed(EdgertError):
    exit_code = 6


class DeviceFailed(EdgertError):
    pass


class Diverged(EdgertError):
    pass


class Poisoned(EdgertError):
    pass
