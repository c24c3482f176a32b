"""A TOML file that somebody wrote: read up to a bound, and refused in words of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from edgert.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, what: str, limit: int) -> dict[str, Any]:
    """The table of a file of at most `limit` bytes, called `what` ('recipe') in errors.

    Raises UsageError: unreadable, too large, or not TOML.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"the {what} cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > limit:
        raise UsageError(f"the {what} is larger than {limit} bytes", where=str(path))
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UsageError(f"the {what} is not TOML: {str(error)[:200]}", where=str(path)) from error
