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


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A profile's events -> per run of the graph, milliseconds by operator.

    Kernels of a run lie within its `model_run` event, which is written after them.
    """
    steps: list[dict[str, float]] = []
    current: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("name") == "model_run":
            steps.append(dict(current))
            current = defaultdict(float)
        elif str(event.get("name", "")).endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"] / 1e3
    return steps


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Median milliseconds by operator, largest first."""
    names = {name for step in steps for name in step}
    found = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def profile(root: Path, variant: str, threads: int, prompt: int, tokens: int) -> dict[str, float]:
    """Prefill `prompt` tokens, decode `tokens` more, and sum the decode steps by operator."""
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
    return medians(steps_of(events)[-tokens:])


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
    found = profile(given.bundle, given.variant, given.threads, given.prompt, given.tokens)
    total = sum(found.values())
    if given.json:
        print(json.dumps({"variant": given.variant, "threads": given.threads, "ms": found}))
        return
    print("| operator | ms a step | share |\n|---|---|---|")
    for name, ms in found.items():
        if ms / total >= 0.005:
            print(f"| {name} | {ms:.2f} | {ms / total:.1%} |")
    print(f"| all | {total:.2f} | |")


if __name__ == "__main__":
    main()
