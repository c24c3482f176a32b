"""The benchmark of a training step compares like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("loop", ["true", "false"])
def test_the_plain_loop_trains_the_same_model(tmp_path, loop):
    """Losses of both are equal, or the benchmark fails; it says how long each took."""
    path = tiny_recipe.write(tmp_path, ("use_loop = true", f"use_loop = {loop}"))
    got = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "train_step.py", "--json"),
            *("--recipe", path, "--rounds", "2", "--steps", "4"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert got.returncode == 0, got.stderr
    value = json.loads(got.stdout)
    assert value["steps"] == 8
    assert value["losses"] == "equal to rounding"
    ratio = value["ms_median"]["plain"] / value["ms_median"]["ours"]
    assert value["plain_over_ours"] == pytest.approx(ratio)


def test_what_the_plain_loop_lacks_is_refused(tmp_path):
    path = tiny_recipe.write(tmp_path, ("[train]\n", '[train]\ndepth = "random"\n'))
    got = subprocess.run(
        [sys.executable, BENCHMARKS / "train_step.py", "--recipe", path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert got.returncode == 2
    assert "the plain loop takes one batch a step, at full depth" in got.stderr
