"""What it costs to grow a session's state, beside a decode step there: each variant in turns.

    python benchmarks/growth.py bundles/smollm2-135m-instruct --variant fp32-ort --threads 1

A round opens a session in each capacity, fills it, and grows it into the next one, which copies
what it holds; then it times a step behind the tokens that were there. Medians over rounds, as a
Markdown table, or with --json one object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import edgert
from edgert.state import BUCKETS

STEPS = 3  # timed behind the growth; their median counts


def grown(model: edgert.Model, room: int, wider: int) -> tuple[float, float]:
    """Milliseconds to grow a full state of `room` tokens to `wider`, and of a step behind it."""
    with model.session(room=room) as session:
        execution = session.execution
        for buffer in execution.states.buffers.values():
            buffer.host[...] = 0  # pages that were never written would be copied from nowhere
        execution.lens[:] = room
        start = time.perf_counter()
        execution.reserve(wider)
        spent = time.perf_counter() - start
        execution.step(0)  # binds the new buffers
        steps = []
        for _ in range(STEPS):
            start = time.perf_counter()
            execution.step(0)
            steps.append(time.perf_counter() - start)
    return spent * 1e3, statistics.median(steps) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", action="append", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    models = {
        name: edgert.load(given.bundle, variant=name, threads=given.threads)
        for name in given.variant
    }
    context = next(iter(models.values())).manifest.context
    sizes = [size for size in (*BUCKETS, 2 * BUCKETS[-1]) if size <= context]
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        for room, wider in pairwise(sizes):
            for name, model in models.items():
                found.setdefault((name, room, wider), []).append(grown(model, room, wider))
    if not given.json:
        print(f"| variant | from | to | growth ms | a step there ms | ratio |\n|{'---|' * 6}")
    for (name, room, wider), times in found.items():
        growth, step = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(spent / step for spent, step in times)
        print(
            json.dumps({"variant": name, "from": room, "to": wider, "ms": growth, "step_ms": step})
            if given.json
            else f"| {name} | {room:,} | {wider:,} | {growth:.1f} | {step:.1f} | {ratio:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
