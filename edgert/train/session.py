"""One session of a run: alone in its folder, and told when to stop."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgert.errors import EdgertError, UsageError
from edgert.train.workers import Workers

LOCK = ".lock"


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come. The second SIGINT interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, old[signal.Signals(number)])

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns that one decides
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def locked(run: Path, resume: bool, group: Workers) -> Iterator[None]:
    """The run's folder, made or found as `resume` says, for this session alone."""
    if not group.first:
        group.wait()
        yield
        return
    taken = os.path.lexists(run)
    if resume and not run.is_dir():
        raise UsageError(
            "there is no run to resume", where=str(run), do="leave out --resume, or correct -o"
        )
    if taken and not resume:
        raise UsageError(
            "the run's folder exists",
            where=str(run),
            do="train on with --resume, or choose another folder with -o",
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    "another process trains in this folder",
                    where=str(run),
                    do="wait until it is done, or choose another folder with -o",
                ) from error
            group.wait()
            yield
    except OSError as error:
        raise EdgertError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or run),
            do="check free space and permissions, then train on with --resume",
        ) from error
