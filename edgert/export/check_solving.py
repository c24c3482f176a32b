"""The parity gate of a model that solves: its graphs, run by the runtime, against eager torch.

    segments  every iteration from the eager model's own carry: values, signals, results
    free      all iterations from the inputs, each row alone and both in one batch
    whole     the unrolled graph, from the inputs

What starts from an exact carry meets the tolerance of a decoder. Free-running, each iteration
hands its rounding on to the next, and how fast that grows is the model's: a trained one settles, a
random one may double it every few blocks. So the limit there is set by what rounding does to eager
torch itself, float32 against float64 (rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgert.backends.base import Array
from edgert.errors import GateFailed
from edgert.export.comparison import Checks, Comparison
from edgert.export.rounding import GROWTH, SPREAD, USEFUL, Rounding, own_rounding
from edgert.models.program import Program, Turn
from edgert.runner import Runner
from edgert.slots import Entrance, Slots, Whole

ROWS = 2


def solving(program: Program, seed: int) -> tuple[Callable[[Runner, str], Checks], dict[str, int]]:
    """The gate of a model that solves: random puzzles, not real ones."""
    drawn = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for name, spec in program.inputs.items():
        if name in program.tables:
            table = program.tables[name]
            inputs[name] = table[torch.randint(len(table), (ROWS,), generator=drawn)].float()
        else:
            shape = (ROWS, *(int(size) for size in spec.shape[1:]))
            inputs[name] = torch.randint(program.vocab_size, shape, generator=drawn).int()
    assert program.turns is not None
    truth = list(program.turns(inputs))
    rounding = own_rounding(program, inputs, truth)
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    return (
        lambda runner, kind: _Gate(runner, given, truth, rounding.coarser(kind)).checks(),
        {"seed": seed, "batch": ROWS, "cells": program.context, "iterations": len(truth) - 1},
    )


class _Gate:
    """One variant against the turns of a few puzzles."""

    def __init__(
        self,
        runner: Runner,
        inputs: Mapping[str, NDArray[Any]],
        truth: list[Turn],
        rounding: Rounding,
    ) -> None:
        self.runner, self.inputs, self.truth, self.rounding = runner, inputs, truth, rounding

    def checks(self) -> Checks:
        if self.runner.loop is None:
            if not self.rounding.is_coarse or self.rounding.compared == len(self.truth) - 1:
                yield "whole", self._whole
            return
        yield "segments", self._segments
        yield "free", self._free

    def _segments(self, c: Comparison) -> None:
        slots = Slots(self.runner, ROWS)
        entrance = Entrance(self.runner)
        for row in range(ROWS):
            entrance.run({name: array[row] for name, array in self.inputs.items()})
            slots.enter(row, entrance)
        self._compare(c, slots, self.truth[0], "before the first iteration")
        for done, (before, after) in enumerate(zip(self.truth, self.truth[1:], strict=False)):
            for row in range(ROWS):
                slots.adopt(row, {n: v[row].numpy() for n, v in before.values.items()}, done)
            slots.advance()
            self._compare(c, slots, after, f"iteration {done}")

    def _free(self, c: Comparison) -> None:
        """In a batch, then each row alone: the same answers, whatever is beside them."""
        c.check.free_running = self.rounding.to_json()
        together = self._run(range(ROWS))
        for done in range(self.rounding.compared):
            slack = self._slack(c, done)
            self._results(c, together[done], self.truth[done + 1], f"iteration {done}", slack)
        for row in range(ROWS):
            alone = self._run([row])
            for done in range(self.rounding.compared):
                for name, array in alone[done].items():
                    want = together[done][name][row : row + 1]
                    at, slack = f"row {row} alone, iteration {done}", self._slack(c, done, 0.0)
                    c.compare("result", name, array, want, at, slack.get(name, 1.0))

    def _slack(self, c: Comparison, done: int, growth: float = GROWTH) -> dict[str, float]:
        return self.rounding.slack(done, c.tolerance, growth)

    def _run(self, rows: Any) -> list[dict[str, Array]]:
        slots, entrance = Slots(self.runner, len(rows)), Entrance(self.runner)
        for at, row in enumerate(rows):
            entrance.run({name: array[row] for name, array in self.inputs.items()})
            slots.enter(at, entrance)
        found = []
        for _ in self.truth[1:]:
            slots.advance()
            found.append({name: array.copy() for name, array in slots.results().items()})
        return found

    def _whole(self, c: Comparison) -> None:
        done = len(self.truth) - 2
        if self.rounding.compared <= done:
            raise GateFailed(
                f"nothing shows that {done + 1} iterations in one graph are right: behind "
                f"{self.rounding.compared} of them, rounding alone moves what eager torch computes "
                f"by more than {USEFUL / SPREAD:.2%}",
                where=f"variant {c.check.variant}, check 'whole'",
                do="export without the unrolled form; the stepped one is proven step by step",
            )
        c.check.free_running = self.rounding.to_json()
        results = Whole(self.runner, ROWS).run(self.inputs)
        self._results(c, results, self.truth[-1], f"iteration {done}", self._slack(c, done))

    def _compare(self, c: Comparison, slots: Slots, turn: Turn, at: str) -> None:
        for name, array in slots.export(range(ROWS)).items():
            c.compare("state", name, array, turn.values[name].numpy(), at)
        for name, signal in turn.signals.items():
            c.compare("signal", name, slots.signals[name], signal.numpy(), at)
        if turn.results:
            self._results(c, slots.results(), turn, at, {})

    def _results(
        self, c: Comparison, got: Mapping[str, Array], turn: Turn, at: str, slack: dict[str, float]
    ) -> None:
        for name, want in turn.results.items():
            if not np.isfinite(got[name]).all():
                raise GateFailed(f"result '{name}' is not finite", where=at)
            c.compare("result", name, got[name], want.numpy(), at, slack.get(name, 1.0))
        logits = turn.results["logits"].flatten(0, 1).numpy()
        c.best(got["token"].reshape(-1), logits, at, slack.get("logits", 1.0))
