"""Learning rates: warm-up and cosine, and what the gradient norm makes of them.

Sources  ShmidtS/HAGI @ 286a65d, prototype/training (warm-up, cosine)
         dancinlab/hexad, revision v4-py-hexad-tension-d768x12L-cycle1-2026-05-17,
         train_d768x12l_tension.py (tension)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(step: int, *, peak: float, floor: float, warmup: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: a line to `peak`, then a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + 0.5 * (1 + math.cos(math.pi * done)) * (peak - floor)


@dataclass
class Tension:
    """Multiplies the learning rate by how tense the gradient is beside its own moving average.

    `ema` is None before the first step. Infinite and NaN norms do what they do upstream: they stay
    in the average for ever; the training loop stops at the first one.
    """

    beta: float = 0.99
    low: float = 0.5
    high: float = 2.0
    ema: float | None = None

    def __call__(self, norm: float) -> float:
        """The multiplier of this step. `norm` is the global gradient norm before clipping."""
        before = norm if self.ema is None else self.ema
        ratio = norm / max(before, 1e-8)
        # In this order of arguments a NaN ratio gives `high`, as upstream.
        multiplier = max(self.low, min(self.high, ratio))
        self.ema = self.beta * before + (1 - self.beta) * norm
        return multiplier
