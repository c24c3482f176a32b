"""benchmarks/operators.py sums ONNX Runtime's profile by operator and step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "operators.py"


def test_kernels_belong_to_the_run_that_ends_after_them(monkeypatch):
    """Times in the profile are microseconds; fences and session events do not count."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from operators import medians, steps_of

    def kernel(op: str, us: int) -> dict[str, object]:
        return {"name": f"node_{op}_kernel_time", "dur": us, "args": {"op_name": op}}

    run = {"name": "model_run", "dur": 9999}
    events = [
        {"name": "session_initialization", "dur": 7},
        kernel("MatMul", 1000),
        {"name": "node_MatMul_fence_before", "dur": 5, "args": {"op_name": "MatMul"}},
        kernel("MatMul", 500),
        run,
        kernel("Add", 250),
        run,
    ]
    steps = steps_of(events)
    assert steps == [{"MatMul": [1.0, 0.5]}, {"Add": [0.25]}]
    assert list(medians([*steps, {"MatMul": [2.0]}]).items()) == [("MatMul", 1.5), ("Add", 0.0)]


def test_it_profiles_a_bundle(tiny_bundle):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--bundle", str(tiny_bundle), "--json"]
        + ["--prompt", "5", "--tokens", "3", "--threads", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    found = answer["ms"]
    assert answer["nodes"].keys() == found.keys()
    assert answer["nodes"]["GroupQueryAttention"] == 2  # of two layers
    assert {"GroupQueryAttention", "Gemm", "MatMul"} <= found.keys()
    assert list(found.values()) == sorted(found.values(), reverse=True)
