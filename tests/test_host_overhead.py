"""benchmarks/host_overhead.py runs and reports; what it measures is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "host_overhead.py"


def test_it_prints_one_object_with_a_median_per_setting(tiny_bundle):
    """With a bundle and without."""
    for extra in ([], ["--bundle", str(tiny_bundle)]):
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--json", "--tokens", "2", "--vocab", "300", *extra],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["model"] == ("tiny" if extra else "idle")
        assert len(report["host_us_median"]) == 6
        assert all(value > 0 for value in report["host_us_median"].values())
