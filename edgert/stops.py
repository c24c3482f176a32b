"""Stop strings over a stream: nothing that may still become a stop string is shown."""

from __future__ import annotations

from collections.abc import Sequence

from edgert.errors import UsageError


class StopStrings:
    """Watches streamed text for stop strings, also when one arrives in several pieces.

    A stop string takes effect as soon as it is complete: of all matches the one that ends first
    wins, and of those that end together the longest. So nothing has to be generated beyond a
    match, and the result does not depend on how the text was cut into pieces. The stop string
    itself is not emitted.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty", do="leave it out, or give it some text")
        self._stops = tuple(stops)
        self._reach = max((len(stop) for stop in stops), default=0) - 1
        self._held = ""
        self._hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """More text -> (what is now safe to show, the stop string that was hit or None).

        After a hit nothing more is emitted, and the hit is repeated.
        """
        if self._hit is not None:
            return "", self._hit
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self._hit = min(found)
            self._held = ""
            return text[:start], self._hit
        keep = len(text) - self._unfinished(text)
        self._held = text[keep:]
        return text[:keep], None

    @property
    def held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def flush(self) -> str:
        """The text still held back: the stream has ended, it cannot become a stop string."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        for length in range(min(self._reach, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
