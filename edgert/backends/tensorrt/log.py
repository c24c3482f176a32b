"""What TensorRT says: it raises next to nothing, and gives its reasons to a log."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOST_LINES = 20
"""Of the log in one error."""


# The library keeps the first logger of a process and ignores later ones.
@functools.cache
def logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors; says nothing itself."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.lines.append(" ".join(str(message).split()))

    return Log()


@contextmanager
def heard(trt: Any) -> Iterator[Any]:
    """The logger, with nothing in it yet."""
    log = logger(trt)
    log.lines.clear()
    yield log


def said(log: Any, where: str) -> str:
    """A place, and what the library said there, each once."""
    lines = list(dict.fromkeys(log.lines))[:MOST_LINES]
    return "\n    ".join([where, *lines])
