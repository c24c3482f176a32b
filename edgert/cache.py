"""The user's cache: what can be computed again, so losing it or ignoring it is never an error.

A verification stamp records which files of a bundle were hashed, and how they looked then. A
stamp is believed only if this user owns it and nobody else can write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from edgert.errors import EdgertError
from edgert.files import read_regular, write_atomic

MAX_STAMP_BYTES = 1 << 20


def cache_dir() -> Path:
    """The cache directory, created with mode 0700 if absent.

    $EDGERT_CACHE_DIR, else $XDG_CACHE_HOME/edgert, else ~/.cache/edgert.
    Raises EdgertError if it cannot be created.
    """
    own, xdg = os.environ.get("EDGERT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if own:
            path = Path(own).expanduser().absolute()
        elif os.path.isabs(xdg):  # the XDG specification ignores relative ones
            path = Path(xdg) / "edgert"
        else:
            path = Path.home() / ".cache" / "edgert"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise EdgertError(
            f"the cache directory cannot be created: {error}",
            do="set EDGERT_CACHE_DIR to a directory that you can write",
        ) from error
    return path


def stamp_path(root: Path) -> Path:
    """Where the stamp of the bundle at `root` is kept, by its real path. Raises EdgertError."""
    real = os.fsencode(os.path.realpath(root))
    return cache_dir() / "verified" / f"{hashlib.sha256(real).hexdigest()[:32]}.json"


def read_stamp(root: Path) -> dict[str, Any] | None:
    """The stamp of the bundle at `root`; None if absent, broken, too large or not this user's."""
    try:
        path = stamp_path(root)
        info = os.lstat(path)
        foreign = info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if foreign:
            return None
        stamp = json.loads(read_regular(path, MAX_STAMP_BYTES))
    except (EdgertError, OSError, ValueError, RecursionError):
        return None
    return stamp if isinstance(stamp, dict) else None


def write_stamp(root: Path, stamp: dict[str, Any]) -> bool:
    """Store a stamp for the bundle at `root`. False if the cache cannot be written."""
    data = json.dumps(stamp, separators=(",", ":")).encode()
    if len(data) > MAX_STAMP_BYTES:
        return False
    try:
        path = stamp_path(root)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, data, mode=0o600)
    except (EdgertError, OSError):
        return False
    return True
