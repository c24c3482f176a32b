"""Where a decode step goes: ONNX Runtime's own profile of a bundle, summed by operator.

    python benchmarks/operators.py --bundle bundles/smollm2-135m-instruct --threads 2

The profiler slows a step a little: read shares, not absolute times. Prints a Markdown table, or
with --json one object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from edgert.backends.ort import OrtBackend
from edgert.bundle import Bundle
from edgert.runner import Runner

Step = dict[str, list[float]]
"""Milliseconds of each kernel that one run of the graph started, by operator."""


def steps_of(events: list[dict[str, Any]]) -> list[Step]:
    """A profile's events, run by run of the graph.

    Kernels of a run lie within its `model_run` event, which is written after them.
    """
    steps: list[Step] = []
    current: Step = defaultdict(list)
    for event in events:
        if event.get("name") == "model_run":
            steps.append(dict(current))
            current = defaultdict(list)
        elif str(event.get("name", "")).endswith("_kernel_time"):
            current[event["args"]["op_name"]].append(event["dur"] / 1e3)
    return steps


def medians(steps: list[Step]) -> dict[str, float]:
    """Median milliseconds by operator, largest first."""
    names = {name for step in steps for name in step}
    found = {n: statistics.median(sum(step.get(n, ())) for step in steps) for n in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def profile(root: Path, variant: str, threads: int, prompt: int, tokens: int) -> list[Step]:
    """The decode steps of `tokens` tokens behind a prompt of `prompt`."""
    bundle = Bundle.open(root)
    backend = OrtBackend(threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        backend._options.enable_profiling = True
        backend._options.profile_file_prefix = str(Path(folder) / "profile")
        runner = Runner(bundle, variant, backend)
        execution = runner.open(tokens=prompt + tokens)
        ids = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt)
        for io in execution.feed(ids):
            token = int(io.token[0, 0])
        for _ in range(tokens):
            token = int(execution.step(token).token[0, 0])
        file = runner.graphs["epilogue"].session.end_profiling()  # type: ignore[attr-defined]
        events = json.loads(Path(file).read_text())
    return steps_of(events)[-tokens:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--variant", default="fp32-ort")
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--prompt", type=int, default=256, help="tokens before the decode steps")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    steps = profile(given.bundle, given.variant, given.threads, given.prompt, given.tokens)
    found = medians(steps)
    nodes = {name: len(steps[-1].get(name, ())) for name in found}
    total = sum(found.values())
    if given.json:
        facts = {"variant": given.variant, "threads": given.threads, "prompt": given.prompt}
        print(json.dumps(facts | {"ms": found, "nodes": nodes}))
        return
    print("| operator | nodes | ms a step | share |\n|---|---|---|---|")
    for name, ms in found.items():
        if ms / total >= 0.005:
            print(f"| {name} | {nodes[name]} | {ms:.2f} | {ms / total:.1%} |")
    print(f"| all | {sum(nodes.values())} | {total:.2f} | |")


if __name__ == "__main__":
    main()
