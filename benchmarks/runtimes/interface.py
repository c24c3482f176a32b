"""What a worker asks of a runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Arrived = Callable[[int], object]


class Runtime(Protocol):
    """A loaded model. Each module run_<name> has a function `load(orders)` that gives one."""

    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        """Read a prompt and choose `count` tokens, the best one each time; tell each at once."""

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """ids, behind nothing -> [T, V]."""
