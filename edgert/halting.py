"""When a loop ends for a token: after all its iterations, after some, or once nothing changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError

SIGNAL = "change"
"""The signal that `settle` reads: |h' - h| / |h| of the hidden state in one iteration."""

AUTO = "auto"
"""Stands for what the bundle's halting report recommends."""

REPORT = "halting.json"

MOST = 1024
"""Iterations of any loop."""
_FORMS = "full, fixed:N, settle:THRESHOLD or settle:THRESHOLD:MIN:MAX"


@dataclass(frozen=True)
class Halt:
    """A token's loop ends behind iteration `most`, or behind `least` or a later one in which the
    hidden state changed by less than `threshold`. `most` None: the model's own number."""

    threshold: float = 0.0
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        most = MOST if self.most is None else self.most
        if not (1 <= self.least <= most <= MOST and 0.0 <= self.threshold < math.inf):
            raise UsageError(
                f"a loop cannot run {self.least} to {most} iterations with a threshold of "
                f"{self.threshold:g}",
                do=f"give {_FORMS}, with 1 <= MIN <= MAX <= {MOST}",
            )

    @property
    def is_full(self) -> bool:
        return self.most is None and self.threshold == 0.0

    def check(self, iterations: int) -> None:
        """Raise UsageError for more iterations than a model has."""
        if max(self.most or 0, self.least) > iterations:
            raise UsageError(
                f"halting at {max(self.most or 0, self.least)} iterations is not possible: the "
                f"model has {iterations}",
                do=f"use at most {iterations}",
            )

    def ended(self, done: int, change: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which rows end behind `done` iterations; change float32 [batch], of the newest one."""
        if self.most is not None and done >= self.most:
            return np.ones(len(change), np.bool_)
        return (change < self.single) & (done >= self.least)

    @property
    def single(self) -> float:
        """The threshold in float32, as the signal is: rows of a batch and single ones agree."""
        return float(np.float32(self.threshold))

    def __str__(self) -> str:
        if self.is_full:
            return "full"
        if self.threshold == 0.0 and self.least == self.most:
            return f"fixed:{self.most}"
        limits = f":{self.least}:{self.most}" if self.most else ""
        if self.most is None and self.least > 1:
            limits = f":{self.least}"
        return f"settle:{self.threshold!r}{limits}"


def parse_halt(text: str) -> Halt:
    """The policy that a user names: full, fixed:N, settle:THRESHOLD, settle:THRESHOLD:MIN[:MAX].

    Raises UsageError.
    """
    kind, *numbers = text.split(":")
    try:
        if kind == "full" and not numbers:
            return Halt()
        if kind == "fixed" and len(numbers) == 1:
            return Halt(least=count(numbers[0]), most=count(numbers[0]))
        if kind == "settle" and 1 <= len(numbers) <= 3:
            return Halt(float(numbers[0]), *map(count, numbers[1:]))
    except ValueError:
        pass
    raise UsageError(f"{ascii(text)[:60]} is not a halting policy", do=f"give {_FORMS}")


def count(digits: str) -> int:
    """A short whole number. Raises ValueError."""
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 4):
        raise ValueError(digits)
    return int(digits)
