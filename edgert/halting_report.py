"""How early a loop may end: what the reports on texts and on puzzles share.

Policies are measured in turns, on one part of the data after another, and all of it several times
over: a machine that slows down slows all of them. A place in the text, or a puzzle, counts with the
median of its rounds: what disturbs one round is not in it.

Latency is a straight line in iterations, a + b x n, through the fixed depths. It says what ending
early can give: with m iterations in the mean, full depth over a + b x m, the `ceiling`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgert.bundle import Bundle, seal, write_manifest
from edgert.errors import UsageError
from edgert.files import publish_directory
from edgert.halting import REPORT
from edgert.spec import FileEntry
from edgert.workshop import workshop

if TYPE_CHECKING:
    from edgert.model import Model

ROUNDS = 3
MOST_DEPTHS = 16
"""Fixed depths that are measured; of a longer loop some, evenly spread."""

QUANTILES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Of the signals seen at full depth: the thresholds that are tried."""

P = TypeVar("P")
D = TypeVar("D")
F = TypeVar("F")
Seconds = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Line:
    """Mean latency of an item against iterations: a straight line through the points."""

    points: tuple[tuple[int, float], ...]
    intercept_ms: float
    slope_ms: float
    r2: float

    def at(self, iterations: float) -> float:
        """Milliseconds; noise may put a line below zero, where there is no time to gain."""
        return max(self.intercept_ms + self.slope_ms * iterations, 1e-6)


@dataclass(frozen=True)
class Point:
    """One policy. Times in milliseconds an item: a decode step, or a puzzle.

    speedup        full depth's mean latency over this one
    ceiling        the same, of the line at the same mean of iterations
    ceiling_share  speedup / ceiling
    """

    policy: str
    iterations_mean: float
    iterations_p95: float
    latency_ms_mean: float
    latency_ms_p50: float
    speedup: float
    ceiling: float
    ceiling_share: float


@dataclass(frozen=True)
class Report:
    """What `halting.json` holds, with the bundle's identities beside it. Full depth comes first."""

    iterations: int
    rounds: int
    placement: str
    points: Sequence[Point]
    line: Line
    recommended: str

    @property
    def full(self) -> Point:
        return self.points[0]


@dataclass(frozen=True)
class Measured(Generic[F]):
    """What a policy found in each part, and what it took: seconds [items] of all parts, each the
    median of all rounds."""

    found: list[F]
    seconds: Seconds


def in_turns(
    policies: Sequence[P],
    parts: Sequence[D],
    run: Callable[[P, D], tuple[F, Seconds]],
    rounds: int,
    progress: Progress | None = None,
) -> list[Measured[F]]:
    """Every policy on the first part, then every policy on the next; all of it again each round.

    run       gives what a policy finds in a part, of which the first round's is kept, and seconds
    progress  called behind each run with how many are done, of how many
    Raises UsageError for less than one round.
    """
    if rounds < 1:
        raise UsageError(f"rounds = {rounds} is not possible", do="use 1 or more")
    found: list[list[F]] = [[] for _ in policies]
    spent: list[list[list[Seconds]]] = [[] for _ in policies]  # of each round and part
    done, total = 0, rounds * len(parts) * len(policies)
    for number in range(rounds):
        for times in spent:
            times.append([])
        for part in parts:
            for at, policy in enumerate(policies):
                facts, seconds = run(policy, part)
                if number == 0:
                    found[at].append(facts)
                spent[at][number].append(seconds)
                done += 1
                if progress is not None:
                    progress(done, total)
    return [
        Measured(facts, np.median([np.concatenate(times) for times in each], axis=0))
        for facts, each in zip(found, spent, strict=True)
    ]


def depths(iterations: int) -> list[int]:
    """The fixed depths to measure, full depth first."""
    spread = np.linspace(1, iterations, min(iterations, MOST_DEPTHS))
    return sorted({round(n) for n in spread.tolist()}, reverse=True)


def thresholds_of(signals: NDArray[Any]) -> list[float]:
    """Thresholds that make a difference, from what the signal was; sorted, three digits."""
    if not signals.size:
        return []
    return sorted({float(f"{q:.3g}") for q in np.quantile(signals, QUANTILES)})


def fitted(measured: Mapping[int, Seconds]) -> Line:
    """The line through fixed depths, each with its seconds [items]."""
    x = np.array(sorted(measured), np.float64)
    y = np.array([measured[int(n)].mean() * 1e3 for n in x])
    slope, intercept = (float(v) for v in np.polyfit(x, y, 1)) if len(x) > 1 else (0.0, float(y[0]))
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - intercept) ** 2).sum())
    points = tuple((int(n), float(ms)) for n, ms in zip(x, y, strict=True))
    return Line(points, intercept, slope, 1.0 - rest / spread if spread else 1.0)


def costs(policy: str, taken: NDArray[Any], seconds: Seconds, full: Seconds, line: Line) -> Point:
    """What a policy took: iterations and seconds [items], beside the seconds of full depth."""
    mean, whole = float(seconds.mean()), float(full.mean())
    ceiling = whole * 1e3 / line.at(float(taken.mean()))
    return Point(
        policy=policy,
        iterations_mean=float(taken.mean()),
        iterations_p95=float(np.percentile(taken, 95)),
        latency_ms_mean=mean * 1e3,
        latency_ms_p50=float(np.median(seconds)) * 1e3,
        speedup=whole / mean,
        ceiling=ceiling,
        ceiling_share=whole / mean / ceiling,
    )


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
