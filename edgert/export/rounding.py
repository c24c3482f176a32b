"""How far rounding alone takes a model that is run freely, and so how far a graph may be away.

Eager torch in float32 and in float64 compute the same; they differ by rounding. A graph rounds
elsewhere than torch does, not more. So behind n iterations it may be away from eager float32 by

    (1 + 4 n) times the tolerance   or   8 times what float32 is away from float64 there,

whichever is more, both as shares of the magnitude. Where eight times that is above 1 % of the
magnitude, no limit tells a sound graph from a broken one: from there on nothing is compared freely,
and the verdict says so. The first two iterations always are, with at most 1 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgert.models.program import Program, Turn

GROWTH = 4.0
"""Times the tolerance more for each iteration that was run freely, whatever the model is like."""

SPREAD = 8.0
"""Times eager torch's own rounding. Two ways to round end at distances of which one is by chance a
few times the other: up to 3.9 times was seen with sound graphs of random and of trained models."""

USEFUL = 0.01
"""Share of the magnitude up to which a limit is one: a wrong weight or carry moves whole per
cents."""

COARSER = {"float32": 1.0, "float16": 2.0**13, "cpu": 2.0**13}
"""Unit roundoff of a type, in that of float32. `cpu`: some of it, see half.py."""

COARSE_USEFUL = 0.1
"""As `USEFUL`, where activations are rounded to fewer bits: only what overflows or is plainly wrong
is looked for."""

LEAST = 2
"""Iterations that are always compared: the second is the first to read a carry of the graphs."""


@dataclass(frozen=True)
class Rounding:
    """For each iteration, by result: how far eager float32 has been from float64 so far, as a share
    of the magnitude.

    times  how much coarser the graphs round than float32
    """

    shares: tuple[dict[str, float], ...]
    times: float = 1.0

    @property
    def compared(self) -> int:
        """How many iterations a graph can be held against when it runs freely.

        Of one that rounds more coarsely perhaps none: its structure has been proved without that.
        """
        largest = (self.times * SPREAD * max(share.values()) for share in self.shares)
        lost = (n for n, share in enumerate(largest) if share > self.useful)
        least = 0 if self.is_coarse else min(LEAST, len(self.shares))
        return max(next(lost, len(self.shares)), least)

    @property
    def is_coarse(self) -> bool:
        return self.times > 1

    @property
    def useful(self) -> float:
        return COARSE_USEFUL if self.is_coarse else USEFUL

    def coarser(self, kind: str) -> Rounding:
        """The same of graphs that round activations to this type."""
        return replace(self, times=COARSER[kind])

    def slack(self, done: int, tolerance: float, growth: float = GROWTH) -> dict[str, float]:
        """By result, how many times the tolerance it may be away at iteration `done`, from 0."""
        least = 1 + growth * done
        return {
            name: max(least, min(self.times * SPREAD * share, self.useful) / tolerance)
            for name, share in self.shares[done].items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "limit": f"(1 + {GROWTH:g} n) x tolerance, or {SPREAD:g} x own_rounding if that is "
            "more, of the magnitude, at iteration n",
            "own_rounding": "eager float32 against eager float64, as a share of the magnitude",
            "by_iteration": [
                {name: float(f"{share:.3g}") for name, share in at.items()} for at in self.shares
            ],
            "iterations_compared": self.compared,
        } | ({"times": self.times} if self.is_coarse else {})


def own_rounding(program: Program, inputs: Mapping[str, Tensor], truth: list[Turn]) -> Rounding:
    """Eager float64 against `truth`, which is eager float32 on the same inputs."""
    assert program.turns is not None
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    shares: list[dict[str, float]] = []
    with _doubled(program.weights):
        turns = program.turns(wide)
        next(turns)  # before the first iteration: there are no results yet
        for exact, turn in zip(turns, truth[1:], strict=True):
            before = shares[-1] if shares else {}
            shares.append(
                {
                    name: max(before.get(name, 0.0), _share(result, exact.results[name]))
                    for name, result in turn.results.items()
                }
            )
    return Rounding(tuple(shares))


def _share(rounded: Tensor, exact: Tensor) -> float:
    away = float((rounded - exact).abs().max())
    # What is no number is for the comparison itself to find.
    return away / max(1.0, float(rounded.abs().max())) if away < float("inf") else 0.0


@contextmanager
def _doubled(module: nn.Module) -> Iterator[None]:
    """In float64 for a while. Every float32 value is one of float64: none is changed."""
    held = [*module.parameters(), *module.buffers()]
    assert all(t.dtype == torch.float32 for t in held if t.is_floating_point()), "as eager torch is"
    module.double()
    try:
        yield
    finally:
        module.float()
