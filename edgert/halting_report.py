"""How early a loop may end: every policy measured on a text, and the one that is recommended.

The text is read in windows. In each, tokens are decoded one at a time, given the text itself and
not the model's own choices, so that all policies answer the same questions:

    agreement    share of positions at which the best token is that of full depth
    perplexity   of the text
    iterations   of the loop a token, mean and 95th percentile
    latency      of one decode step, measured

What an earlier token skipped is filled in for later ones as it is at run time, so the figures hold
the cost of that, too. Thresholds are quantiles of the change that the loop shows at full depth on
this text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgert.bundle import Bundle, seal, write_manifest
from edgert.errors import UsageError
from edgert.evaluate import cross_entropy, encoded
from edgert.files import publish_directory
from edgert.halting import REPORT, Halt
from edgert.spec import FileEntry
from edgert.workshop import workshop

if TYPE_CHECKING:
    from edgert.model import Model
    from edgert.runner import Execution

TOKENS, WINDOW = 2000, 256
AGREEMENT = 0.999
QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Point:
    """One policy on the text. Times in milliseconds a decode step."""

    policy: str
    iterations_mean: float
    iterations_p95: float
    agreement: float
    perplexity: float
    nll: float
    latency_ms_mean: float
    latency_ms_p50: float


@dataclass(frozen=True)
class Line:
    """Median latency of a decode step against iterations: a straight line through the points."""

    points: tuple[tuple[int, float], ...]
    intercept_ms: float
    slope_ms: float
    r2: float


@dataclass(frozen=True)
class Report:
    """What `halting.json` holds, with the bundle's identities beside it."""

    iterations: int
    fill: str
    tokens: int
    window: int
    text_sha256: str
    placement: str
    target_agreement: float
    points: tuple[Point, ...]
    line: Line
    recommended: str


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
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure fixed depths and thresholds on a text.

    thresholds  of `settle`; None takes quantiles of the change seen
    tokens      of the text that are read at most; `window` of them behind each other
    agreement   share of best tokens that must be those of full depth, for a recommendation
    progress    called behind each policy with how many are done, of how many

    Raises UsageError (a model that cannot halt; a text of fewer than two tokens; a window that is
    not from 2 to the context; an agreement that is not from 0 to 1), OutOfMemory.
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
        full, seen = _text(execution, parts, WATCHING)
        if thresholds is None:
            early = seen[:, : depth - 1]
            thresholds = sorted({float(f"{q:.3g}") for q in np.quantile(early, QUANTILES)})
        policies = [Halt()]
        policies += [Halt(least=n, most=n) for n in range(depth - 1, 0, -1)]
        policies += [Halt(threshold) for threshold in thresholds]
        points = []
        for done, policy in enumerate(policies):
            points.append(_point(policy, _text(execution, parts, policy)[0], full))
            if progress is not None:
                progress(done + 1, len(policies) + 1)
        line = _line(execution, parts[0], depth)
        if progress is not None:
            progress(len(policies) + 1, len(policies) + 1)
    finally:
        execution.close()
    good = [p for p in points if p.agreement >= agreement]
    best = min(good, key=lambda p: (p.iterations_mean, -p.agreement))
    return Report(
        iterations=depth,
        fill=runner.loop.fill,
        tokens=sum(len(part) - 1 for part in parts),
        window=window,
        text_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        placement=model.placement,
        target_agreement=agreement,
        points=tuple(points),
        line=line,
        recommended=best.policy,
    )


@dataclass(frozen=True)
class _Run:
    """One pass over the text, a value for each predicted token."""

    best: NDArray[np.int64]
    costs: NDArray[np.float64]
    taken: NDArray[np.int64]
    seconds: NDArray[np.float64]


def _text(
    execution: Execution, parts: Sequence[NDArray[np.int64]], halt: Halt
) -> tuple[_Run, NDArray[np.float64]]:
    """The whole text, and the changes [tokens, iterations] if it is `WATCHING`."""
    runs, changes = zip(*(_pass(execution, part, halt) for part in parts), strict=True)
    names = ("best", "costs", "taken", "seconds")
    joined = _Run(*(np.concatenate([getattr(run, name) for run in runs]) for name in names))
    return joined, np.concatenate(changes)


def _pass(
    execution: Execution, ids: NDArray[np.int64], halt: Halt
) -> tuple[_Run, NDArray[np.float64]]:
    """Decode one window token by token behind an empty state."""
    execution.reset()
    count = len(ids) - 1
    run = _Run(
        np.empty(count, np.int64), np.empty(count), np.empty(count, np.int64), np.empty(count)
    )
    changes: list[list[float]] = []
    for i, token in enumerate(ids[:-1].tolist()):
        begun = time.perf_counter()
        io = execution.step(token, halt)
        run.seconds[i] = time.perf_counter() - begun
        run.best[i], run.taken[i] = io.token[0, 0], io.iterations[0]
        run.costs[i] = cross_entropy(io.logits[0], ids[i + 1 : i + 2])[0]
        if halt is WATCHING:
            changes.append(io.bound.changes)
    return run, np.array(changes)


def _point(policy: Halt, run: _Run, full: _Run) -> Point:
    nll = float(run.costs.mean())
    return Point(
        policy=str(policy),
        iterations_mean=float(run.taken.mean()),
        iterations_p95=float(np.percentile(run.taken, 95)),
        agreement=float((run.best == full.best).mean()),
        perplexity=float(np.exp(min(nll, 700.0))),
        nll=nll,
        latency_ms_mean=float(run.seconds.mean() * 1e3),
        latency_ms_p50=float(np.median(run.seconds) * 1e3),
    )


def _line(execution: Execution, ids: NDArray[np.int64], depth: int, rounds: int = 5) -> Line:
    """Depths in turns, several times over, so that a drift of the machine meets all alike."""
    times: dict[int, list[float]] = {n: [] for n in range(1, depth + 1)}
    for _ in range(rounds):
        for n in times:
            times[n] += _pass(execution, ids, Halt(least=n, most=n))[0].seconds.tolist()
    x = np.array(list(times), np.float64)
    y = np.array([np.median(times[n]) * 1e3 for n in times])
    slope, intercept = (float(v) for v in np.polyfit(x, y, 1)) if depth > 1 else (0.0, float(y[0]))
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - intercept) ** 2).sum())
    points = tuple((int(n), float(ms)) for n, ms in zip(x, y, strict=True))
    return Line(points, intercept, slope, 1.0 - rest / spread if spread else 1.0)


def to_json(report: Report, model: Model) -> dict[str, Any]:
    """The content of a bundle's halting.json."""
    return {
        "format_version": 1,
        "model_id": model.manifest.model_id,
        "variant": model.runner.variant_name,
        "variant_id": model.runner.variant.variant_id,
        **asdict(report),
    }


def store(bundle: Bundle, content: dict[str, Any]) -> None:
    """Put the report into a bundle: a new directory with the same files takes its place at once.

    The identities stay, so sessions do too. Raises EdgertError if it cannot be written.
    """
    root = bundle.root
    with workshop(root) as work:
        for name in bundle.manifest.files:
            if name == REPORT:
                continue
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            _same(root / name, work / name)
        data = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
        (work / REPORT).write_bytes(data)
        reports = tuple(name for name in bundle.manifest.reports if name != REPORT)
        files = dict(bundle.manifest.files)
        files[REPORT] = FileEntry(hashlib.sha256(data).hexdigest(), len(data))
        manifest = replace(
            bundle.manifest, reports=(*reports, REPORT), files=dict(sorted(files.items()))
        )
        write_manifest(work, seal(manifest))
        publish_directory(work, root)


def _same(source: Path, target: Path) -> None:
    """A second name for the file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
