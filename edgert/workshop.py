"""The directory in which a bundle or a data set is made: beside its place, gone afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgert.errors import EdgertError

SUFFIX = ".export"


@contextmanager
def workshop(out: Path, what: str = "bundle") -> Iterator[Path]:
    """An empty directory `.<name>.<random>.export` beside `out`, removed at the end.

    It is locked while it is in use: one that a killed export left behind is not, and goes too.
    What the system refuses meanwhile, such as more space, is raised as EdgertError.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        # Not tempfile.mkdtemp: its mode of 0700 would become the bundle's.
        work = out.parent / f".{out.name}.{os.urandom(6).hex()}{SUFFIX}"
        work.mkdir()
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise EdgertError(
            f"cannot write the {what}: {error.strerror or error}",
            where=str(error.filename or out),
            do="check free space and permissions there, or choose another output",
        ) from error


def _remove_abandoned(out: Path) -> None:
    prefix = f".{out.name}."
    for entry in out.parent.iterdir():
        key = entry.name.removeprefix(prefix).removesuffix(SUFFIX)
        if entry.name != prefix + key + SUFFIX or len(key) != 12 or entry.is_symlink():
            continue
        lock = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
        except BlockingIOError:  # another export is at work
            pass
        finally:
            os.close(lock)
