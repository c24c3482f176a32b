"""What a fuzz target is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Target:
    """`read` is to return or to raise an EdgertError, whatever example the strategy makes."""

    seeds: Iterable[Any]
    examples: st.SearchStrategy[Any]
    read: Callable[[Any], object]


def through_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def call(data: bytes) -> object:
        # Written over, not truncated first: some tens of thousands of these.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return read(path)

    return call


def refill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Have a folder hold these files, and no others."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
