"""How early puzzles may end: every policy measured on a set of them.

    exact       share of puzzles that are solved in every cell
    iterations  of the loop a puzzle, mean and 95th percentile
    latency     of a puzzle in wall clock, measured in turns: how much later its answer comes than
                the one before. With a batch, that of many is close to 0, and the mean counts.

Thresholds are quantiles of the signal that the model was trained to give, seen at full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.exits import TRAINED, Watch
from edgert.halting_data import Puzzles
from edgert.halting_report import (
    ROUNDS,
    Point,
    Progress,
    Report,
    Seconds,
    costs,
    depths,
    fitted,
    in_turns,
    thresholds_of,
)
from edgert.solving import Solution

if TYPE_CHECKING:
    from edgert.model import Model

PUZZLES = 1000
LOSS = 0.2
"""Points of exact accuracy that a recommended policy may lose."""

PART = 64  # puzzles that a policy solves in a turn, for each one in the loop at once
WATCHED = 200  # puzzles whose signals suggest thresholds


@dataclass(frozen=True)
class PuzzlePoint(Point):
    """One policy on the puzzles. halted: the share that ended by themselves."""

    exact: float
    halted: float


@dataclass(frozen=True)
class PuzzleReport(Report):
    """host_share: of the wall clock at full depth, what is spent outside the graph calls."""

    points: tuple[PuzzlePoint, ...]
    puzzles: int
    batch: int
    judged_by: str
    data_sha256: str
    loss: float
    host_share: float


@dataclass(frozen=True)
class _Solved:
    right: NDArray[np.bool_]
    taken: NDArray[np.int64]
    halted: NDArray[np.bool_]


def sweep(
    model: Model,
    puzzles: Puzzles,
    *,
    thresholds: Sequence[float] | None = None,
    batch: int = 1,
    loss: float = LOSS,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> PuzzleReport:
    """Measure fixed depths, the model's own rule, and thresholds on puzzles.

    thresholds  of the model's rule; None takes quantiles of the signal seen
    batch       puzzles in the loop at once
    loss        points of exact accuracy that the recommended policy may have less than full depth
    rounds, progress  as of a sweep on a text

    Raises UsageError (a model that solves no puzzles, or whose loop is unrolled; thresholds for
    one without a rule; a batch, a loss or rounds that cannot be), OutOfMemory.
    """
    if not 0.0 <= loss <= 100.0:
        raise UsageError(f"a loss of {loss:g} points is not possible", do="use 0 to 100")

    def run(policy: str, part: Puzzles) -> tuple[_Solved, Seconds]:
        work = model.solving(part.ids, number=part.number, halt=policy, batch=batch)
        order = [answer for _, answer in work]
        if policy == "full":
            outside.append(1.0 - work.graph_ns / 1e9 / order[-1].seconds)
        answers = [work.answers[i] for i in range(len(part))]
        return _solved(part, answers), np.diff([a.seconds for a in order], prepend=0.0)

    outside: list[float] = []
    model.solving(puzzles.ids[:batch], number=puzzles.number[:batch], batch=batch).run()  # warm
    loop = model.runner.loop
    assert loop is not None, "a model that solves, and not unrolled"
    if thresholds is None:
        thresholds = _seen(model, puzzles) if loop.halt is not None else []
    fixed = {n: "full" if n == loop.iterations else f"fixed:{n}" for n in depths(loop.iterations)}
    policies = [*fixed.values(), *([TRAINED] if loop.halt is not None else [])]
    policies += [f"{TRAINED}:{threshold!r}" for threshold in thresholds]
    for policy in policies:
        model.runner.exit(policy)  # refused before anything is measured
    parts = [puzzles.part(i, PART * batch) for i in range(0, len(puzzles), PART * batch)]
    measured = in_turns(policies, parts, run, rounds, progress)
    line = fitted({n: one.seconds for n, one in zip(fixed, measured, strict=False)})
    points = []
    for policy, one in zip(policies, measured, strict=True):
        taken, right, halted = (
            np.concatenate([getattr(part, name) for part in one.found])
            for name in ("taken", "right", "halted")
        )
        cost = costs(policy, taken, one.seconds, measured[0].seconds, line)
        exact, by_itself = float(right.mean()), float(halted.mean())
        points.append(PuzzlePoint(**asdict(cost), exact=exact, halted=by_itself))
    least = points[0].exact - loss / 100 - 1e-12
    good = [p for p in points if p.exact >= least]
    best = min(good, key=lambda p: (p.iterations_mean, -p.exact))
    return PuzzleReport(
        iterations=loop.iterations,
        rounds=rounds,
        placement=model.placement,
        points=tuple(points),
        line=line,
        recommended=best.policy,
        puzzles=len(puzzles),
        batch=batch,
        judged_by=puzzles.judged_by,
        data_sha256=puzzles.sha256,
        loss=loss,
        host_share=float(np.median(outside)),
    )


def _solved(puzzles: Puzzles, answers: list[Solution]) -> _Solved:
    return _Solved(
        puzzles.right(answers),
        np.array([answer.steps for answer in answers], np.int64),
        np.array([answer.halted for answer in answers], np.bool_),
    )


def _seen(model: Model, puzzles: Puzzles) -> list[float]:
    """Thresholds from the signals of some puzzles, solved at full depth one behind another."""
    work = model.solving(puzzles.ids[:WATCHED], number=puzzles.number[:WATCHED], batch=1)
    rule = work.exit
    full = model.runner.exit("full").most
    watch = Watch(full, rule.signal, rule.threshold, rule.least, rule.cumulative)
    work.exit = watch
    work.run()
    signals = np.concatenate(watch.seen).reshape(-1, full)  # alone in the loop: each `full` long
    return thresholds_of(signals[:, rule.least - 1 : full - 1])
