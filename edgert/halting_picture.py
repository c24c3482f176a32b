"""What a halting policy costs and what it gives, as a picture: accuracy against wall clock."""

from __future__ import annotations

from collections.abc import Iterable

from edgert.bench import svg
from edgert.exits import TRAINED
from edgert.halting_puzzles import PuzzlePoint, PuzzleReport


def best_of(points: Iterable[PuzzlePoint]) -> list[PuzzlePoint]:
    """Those that no other beats in accuracy without taking longer; the fastest first."""
    best: list[PuzzlePoint] = []
    for point in sorted(points, key=lambda p: (p.latency_ms_mean, -p.exact)):
        if not best or point.exact > best[-1].exact:
            best.append(point)
    return best


def picture(report: PuzzleReport) -> str:
    """An SVG file: a dot for each policy, and the line through those worth choosing."""
    dots = [
        svg.Dot(p.latency_ms_mean, p.exact * 100, _name(p), _kind(p, report)) for p in report.points
    ]
    line = [(p.latency_ms_mean, p.exact * 100) for p in best_of(report.points)]
    chosen = [(dot.kind, f"recommended, {dot.name}") for dot in dots if dot.kind == "chosen"]
    legend = [*chosen, ("own", "by the model's own rule"), ("dot", "at a fixed depth")]
    label = "accuracy over time a puzzle"
    return svg.alone(svg.choice(dots, line, legend, x="ms a puzzle", y="exact %", label=label))


def _name(point: PuzzlePoint) -> str:
    return f"{point.policy}: {point.exact * 100:.1f} %, {point.latency_ms_mean:.3g} ms"


def _kind(point: PuzzlePoint, report: PuzzleReport) -> str:
    if point.policy == report.recommended:
        return "chosen"
    return "own" if point.policy.startswith(TRAINED) else "dot"
