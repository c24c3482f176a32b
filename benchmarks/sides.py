"""Sides of a benchmark: processes that load once and take turns, a run each.

The benchmark makes a `Side` for each; the worker's script calls `serve`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
from runtimes.measure import Window, own_memory, report, task

HERE = Path(__file__).resolve().parent
Run = Callable[[], dict[str, Any]]
Make = Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]


class Side:
    """A worker that waits for its turns. facts: what it said when it was ready."""

    def __init__(self, name: str, worker: str, orders: dict[str, Any]) -> None:
        self.name = name
        self.runs: list[dict[str, Any]] = []
        command = [sys.executable, str(HERE / worker), json.dumps(orders)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"the worker of {self.name} ended: see above")
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        self.runs.append(self._answer())

    def step_ms(self) -> list[float]:
        """The median step of each round."""
        return [median(run["step_s"]) * 1e3 for run in self.runs]

    def close(self) -> None:
        """Let the worker end, and its memory go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def over(base: list[float], other: list[float]) -> float:
    """How many times longer: the median of the rounds' ratios."""
    return median(b / a for a, b in zip(base, other, strict=True))


def serve(sides: Mapping[str, Make]) -> None:
    """Make the side that the orders (the only argument) name, warm it up, run it at each line."""
    orders = task()
    run, facts = sides[orders["side"]](orders)
    run()  # warm-up; compiles
    report(facts)
    for _ in sys.stdin:
        window = Window()
        found = run()
        report(found | {"others": window.others(), "memory": own_memory()})
