"""When a puzzle is done: by the rule its model was trained with, after a number, or never early."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.halting import MOST, count
from edgert.spec import LoopSpec

TRAINED = "trained"
_FORMS = "full, fixed:N, trained, trained:THRESHOLD or trained:THRESHOLD:MIN:MAX"


@dataclass(frozen=True)
class Exit:
    """A row ends behind iteration `most`; or behind `least` or a later one, in which the signal
    (cumulative: its sum over the row's iterations) is above `threshold`.

    signal  name of one of the loop's; None: none is looked at
    """

    most: int
    signal: str | None = None
    threshold: float = 0.0
    least: int = 1
    cumulative: bool = False

    def done(
        self, steps: NDArray[np.int64], signal: NDArray[np.float32] | None
    ) -> NDArray[np.bool_]:
        """Which rows the rule itself ends; steps [rows], signal [rows] as it is compared."""
        if signal is None:
            return np.zeros(len(steps), np.bool_)
        return (signal > np.float32(self.threshold)) & (steps >= self.least)

    def __str__(self) -> str:
        if self.signal is None:
            return f"fixed:{self.most}"
        return f"{TRAINED}:{self.threshold!r}:{self.least}:{self.most}"


@dataclass(frozen=True)
class Watch(Exit):
    """All `most` iterations; the signal [rows] of each goes to `seen`, in the order of running."""

    seen: list[NDArray[np.float32]] = field(default_factory=list)

    def done(
        self, steps: NDArray[np.int64], signal: NDArray[np.float32] | None
    ) -> NDArray[np.bool_]:
        assert signal is not None, "a rule with a signal"
        self.seen.append(signal.copy())
        return np.zeros(len(steps), np.bool_)


def parse_exit(text: str, loop: LoopSpec, limit: int = MOST) -> Exit:
    """The policy that a user names, for a model's loop: full (all its iterations), fixed:N,
    trained[:THRESHOLD[:MIN[:MAX]]].

    limit  iterations the loop can run at most
    Raises UsageError.
    """
    kind, *numbers = text.split(":")
    rule = loop.halt
    try:
        if kind == "full" and not numbers:
            return Exit(loop.iterations)
        if kind == "fixed" and len(numbers) == 1:
            return Exit(_count(numbers[0], limit))
        if kind == TRAINED and len(numbers) <= 3 and rule is not None:
            threshold = float(numbers[0]) if numbers else rule.threshold
            least = _count(numbers[1], limit) if numbers[1:] else rule.least
            most = _count(numbers[2], limit) if numbers[2:] else loop.iterations
            if math.isfinite(threshold) and least <= most:
                return Exit(most, rule.signal, threshold, least, rule.cumulative)
    except ValueError:
        pass
    if kind == TRAINED and rule is None:
        raise UsageError(
            "this model was not trained to say when it is done", do="use full or fixed:N"
        )
    raise UsageError(
        f"{ascii(text)[:60]} is not a halting policy for this model",
        do=f"give {_FORMS}, with numbers of iterations from 1 to {limit} and MIN <= MAX",
    )


def _count(digits: str, limit: int) -> int:
    number = count(digits)
    if not 1 <= number <= limit:
        raise ValueError(digits)
    return number
