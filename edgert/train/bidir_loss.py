"""Losses of a network that answers in every cycle: the published one, and one that teaches halting.

As published, nothing tells the halting head when an answer is right: the only gradient that it has
drives its probability to 0. `halting_loss` trains it as segments are trained, with the same
parameters.

Source  dp-web4/HRM @ 2e7d64f, training/train_arc_full_nova.py
Shapes  B batch, S cells, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edgert.train.act import IGNORED

PONDER_WEIGHT = 0.01  # of the mean probability of halting
HALT_WEIGHT = 0.5


class Cycle(Protocol):
    """What one cycle says: logits [B, S, V], and the logit of halting [B]."""

    @property
    def logits(self) -> Tensor: ...

    @property
    def halt(self) -> Tensor: ...


def published_loss(cycles: Sequence[Cycle], labels: Tensor) -> Tensor:
    """Cross-entropy of the last cycle over all cells, and 0.01 times the mean p of all cycles.

    Ignored cells cost 0, and count: the published mean is over all S of them.
    """
    p = torch.stack([cycle.halt for cycle in cycles]).sigmoid().mean()
    return _cross_entropy(cycles[-1].logits, labels).mean() + PONDER_WEIGHT * p


def halting_loss(cycles: Sequence[Cycle], labels: Tensor) -> Tensor:
    """Means over cycles: cross-entropy over labelled cells, and 0.5 times how badly the logit of
    halting foretells that all labelled cells of this cycle's answer are right."""
    known = labels != IGNORED
    total = torch.zeros((), device=labels.device)
    for cycle in cycles:
        cells = _cross_entropy(cycle.logits, labels).sum() / known.sum().clamp(min=1)
        solved = ((cycle.logits.argmax(-1) == labels) | ~known).all(-1).to(cycle.halt.dtype)
        total = total + cells
        total = total + HALT_WEIGHT * F.binary_cross_entropy_with_logits(cycle.halt, solved)
    return total / len(cycles)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, S, V], int [B, S] -> [B * S]."""
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, labels.long().flatten(), ignore_index=IGNORED, reduction="none")
