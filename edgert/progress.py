"""How long work says what it is doing: the work talks to a `Reporter`, the CLI draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


class Reporter:
    """Says nothing: the library's default. The CLI's draws lines and progress bars on stderr."""

    def line(self, label: str, text: str) -> None:
        """A finished fact, such as ('weights', 'fp32, 540 MB')."""

    @contextmanager
    def stage(self, label: str, text: str, total: int | None = None) -> Iterator[Advance]:
        """Work in progress: the yielded function advances it. `total` None: of unknown length."""
        yield lambda amount: None
