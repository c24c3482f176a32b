"""How long answers take on this device, and what power they need. Measured as `edgert bench` does,
in little: enough to see that a device works, and what order its figures are of."""

from __future__ import annotations

import time
from typing import Any

from edgert.bench import power
from edgert.bench.plan import Plan
from edgert.bench.run import Placement, bench
from edgert.bench.statistics import summary
from edgert.progress import Reporter
from edgert.selfcheck.report import Check
from edgert.selfcheck.subject import Subject

GENERATED, REPEATS = 16, 3


def latency(subject: Subject, reporter: Reporter | None = None) -> tuple[Check, Check]:
    """The checks `latency` and `power`. Raises GateFailed if what was timed is not the model's
    answer, and what loading raises."""
    figures = _puzzles(subject) if subject.solves else _tokens(subject, reporter)
    source = figures["power_source"]
    names = ("power_source", "rails", "rail", "energy_j", "nvpmodel", "throttled")
    if source is None:
        watts = Check("power", "skipped", "no rails on this machine: nothing was measured")
    else:
        rail = figures["rail"] or ", ".join(figures["rails"])
        milliwatts = [figures["rails"][name]["mean_mw"] for name in figures["rails"]]
        mean = figures["rails"][figures["rail"]]["mean_mw"] if figures["rail"] else sum(milliwatts)
        said = f"{rail} {mean:.0f} mW on average, from {source}"
        watts = Check("power", "ok", said, {name: figures.get(name) for name in names})
    return Check("latency", "ok", _said(subject, figures), figures), watts


def _said(subject: Subject, figures: dict[str, Any]) -> str:
    if subject.solves:
        return f"{figures['puzzle_ms']['p50']:.1f} ms a puzzle, {figures['steps_mean']:.1f} steps"
    between = figures["itl_ms"]["p50"] if figures["itl_ms"] else 0.0
    first, start = figures["ttft_ms"]["p50"], figures["cold_start_ms"]["total"]
    return (
        f"first token {first:.1f} ms, then {between:.1f} ms each, from a cold start {start:.0f} ms"
    )


def _tokens(subject: Subject, reporter: Reporter | None) -> dict[str, Any]:
    generated = max(2, min(GENERATED, subject.bundle.manifest.context // 4))
    plan = Plan(n_prompt=len(subject.inputs), n_gen=generated, repeats=REPEATS)
    chosen = Placement(
        subject.device,
        variant=subject.variant,
        threads=subject.threads,
        prepack=subject.prepack,
    )
    return bench(subject.path, plan, chosen, reporter=reporter)


def _puzzles(subject: Subject) -> dict[str, Any]:
    """Each puzzle on its own, by the model's own rule, behind one that warms up."""
    windows: list[tuple[int, int]] = []
    steps: list[int] = []
    meter = power.find_meter()
    with subject.model() as model:
        model.solve(subject.inputs[0])
        if meter:
            meter.start()
        try:
            for puzzle in subject.inputs:
                begin = time.perf_counter_ns()
                steps.append(model.solve(puzzle).steps)
                windows.append((begin, time.perf_counter_ns()))
        finally:
            if meter:
                meter.stop()
        placement = model.placement
    found = power.report(meter, windows, len(windows))
    found["puzzles_per_j"] = found.pop("tok_per_j")
    return {
        "placement": placement,
        "puzzles": len(windows),
        "puzzle_ms": summary([(end - begin) / 1e6 for begin, end in windows]),
        "steps_mean": sum(steps) / len(steps),
        "nvpmodel": power.power_mode(),
        **found,
    }
