"""How early a decoder's loop may end: every policy measured on a text.

The text is read in windows. In each, tokens are decoded one at a time, given the text itself and
not the model's own choices, so that all policies answer the same questions:

    agreement    share of positions at which the best token is that of full depth
    perplexity   of the text
    iterations   of the loop a token, mean and 95th percentile
    latency      of one decode step, measured in turns

What an earlier token skipped is filled in for later ones as it is at run time, so the figures hold
the cost of that, too. Thresholds are quantiles of the change that the loop shows at full depth on
this text.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.evaluate import cross_entropy, encoded
from edgert.halting import Halt
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

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.runner import Execution

TOKENS, WINDOW = 2000, 256
AGREEMENT = 0.999

_clock = time.perf_counter


@dataclass(frozen=True)
class TextPoint(Point):
    """One policy on the text. nll in nats a token."""

    agreement: float
    perplexity: float
    nll: float


@dataclass(frozen=True)
class TextReport(Report):
    points: tuple[TextPoint, ...]
    fill: str
    tokens: int
    window: int
    text_sha256: str
    target_agreement: float


WATCHING = Halt(threshold=sys.float_info.min)
"""Full depth, which nothing ends, but with a look at every change."""


def sweep(
    model: Model,
    text_or_ids: str | Sequence[int],
    *,
    thresholds: Sequence[float] | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    agreement: float = AGREEMENT,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> TextReport:
    """Measure fixed depths and thresholds on a text.

    thresholds  of `settle`; None takes quantiles of the change seen
    tokens      of the text that are read at most; `window` of them behind each other
    agreement   share of best tokens that must be those of full depth, for a recommendation
    rounds      over the whole text, in which all policies take turns window by window
    progress    called behind each pass over a window with how many are done, of how many

    Raises UsageError (a model that cannot halt; a text of fewer than two tokens; a window that is
    not from 2 to the context; an agreement that is not from 0 to 1; no round), OutOfMemory.
    """
    runner = model.runner
    if not runner.can_halt or runner.loop is None:
        raise UsageError(
            f"variant {runner.variant_name} of this bundle has no loop that could end early",
            where=str(model.bundle.root),
            do="give a bundle whose program has a loop, and not its unrolled variant",
        )
    if not 2 <= window <= model.manifest.context or not 0.0 <= agreement <= 1.0 or tokens < 2:
        raise UsageError(
            f"window = {window}, tokens = {tokens}, agreement = {agreement:g} is not possible",
            do=f"use a window of 2 to {model.manifest.context}, 2 tokens or more, and an agreement "
            "from 0 to 1",
        )
    ids = encoded(model, text_or_ids, tokens)
    if len(ids) < 2:
        raise UsageError("the text has fewer than two tokens", do="give a longer one")
    depth = runner.loop.iterations
    parts = [ids[i : i + window] for i in range(0, len(ids), window)]
    parts = [part for part in parts if len(part) > 1]
    execution = runner.open(tokens=min(window, len(ids)))
    try:
        _pass(execution, parts[0][:8], Halt())  # a first run is slower
        if thresholds is None:
            early = np.concatenate([_pass(execution, part, WATCHING)[2] for part in parts])
            thresholds = thresholds_of(early[:, : depth - 1])
        fixed = {n: Halt() if n == depth else Halt(least=n, most=n) for n in depths(depth)}
        policies = [*fixed.values(), *map(Halt, thresholds)]
        measured = in_turns(
            policies, parts, lambda halt, part: _pass(execution, part, halt)[:2], rounds, progress
        )
    finally:
        execution.close()
    line = fitted({n: run.seconds for n, run in zip(fixed, measured, strict=False)})
    full = _joined(measured[0].found)
    points = []
    for policy, run in zip(policies, measured, strict=True):
        said = _joined(run.found)
        cost = costs(str(policy), said.taken, run.seconds, measured[0].seconds, line)
        nll = float(said.costs.mean())
        points.append(
            TextPoint(
                **asdict(cost),
                agreement=float((said.best == full.best).mean()),
                perplexity=float(np.exp(min(nll, 700.0))),
                nll=nll,
            )
        )
    good = [p for p in points if p.agreement >= agreement]
    best = min(good, key=lambda p: (p.iterations_mean, -p.agreement))
    return TextReport(
        iterations=depth,
        rounds=rounds,
        placement=model.placement,
        points=tuple(points),
        line=line,
        recommended=best.policy,
        fill=runner.loop.fill,
        tokens=sum(len(part) - 1 for part in parts),
        window=window,
        text_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        target_agreement=agreement,
    )


@dataclass(frozen=True)
class _Said:
    """One pass over a window, a value for each predicted token."""

    best: NDArray[np.int64]
    costs: NDArray[np.float64]
    taken: NDArray[np.int64]


def _joined(parts: Sequence[_Said]) -> _Said:
    names = ("best", "costs", "taken")
    return _Said(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _pass(
    execution: Execution, ids: NDArray[np.int64], halt: Halt
) -> tuple[_Said, Seconds, NDArray[np.float64]]:
    """Decode one window token by token behind an empty state; its changes if it is `WATCHING`."""
    execution.reset()
    count = len(ids) - 1
    said = _Said(np.empty(count, np.int64), np.empty(count), np.empty(count, np.int64))
    seconds = np.empty(count)
    changes: list[list[float]] = []
    for i, token in enumerate(ids[:-1].tolist()):
        begun = _clock()
        io = execution.step(token, halt)
        seconds[i] = _clock() - begun
        said.best[i], said.taken[i] = io.token[0, 0], io.iterations[0]
        said.costs[i] = cross_entropy(io.logits[0], ids[i + 1 : i + 2])[0]
        if halt is WATCHING:
            changes.append(io.bound.changes)
    return said, seconds, np.array(changes)
