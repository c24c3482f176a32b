"""The measurements of keys and values: what they print, on models of no time at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_decoder import speaking

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Benchmarks are scripts beside each other, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def lines(capsys) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_growth_goes_through_the_capacities_of_each_variant(tiny_bundle, monkeypatch, capsys):
    import growth

    variants = ["fp32-ort", "fp32-portable"]
    chosen = [word for name in variants for word in ("--variant", name)]
    monkeypatch.setattr(
        sys, "argv", ["growth", str(tiny_bundle), *chosen, "--rounds", "1", "--json"]
    )
    growth.main()
    found = lines(capsys)
    steps = [(256, 1024), (1024, 4096), (4096, 8192)]
    assert [(one["from"], one["to"]) for one in found] == [s for s in steps for _ in variants]
    assert [one["variant"] for one in found] == variants * 3
    assert all(one["ms"] > 0 and one["step_ms"] > 0 for one in found)


def test_scales_by_the_radius_hold_where_those_of_the_channel_do_not(monkeypatch, capsys):
    """Behind the windows of the calibration, too."""
    import kv_scales

    monkeypatch.setattr(kv_scales, "source", lambda path: speaking())
    given = ["--window", "64", "--window", "1024", "--tokens", "1024", "--json"]
    monkeypatch.setattr(sys, "argv", ["kv_scales", "unused", *given])
    kv_scales.main()
    found = lines(capsys)
    kl = {(one["window"], one["scales"]): one["kl"] for one in found}
    assert list(kl) == [(64, "channel"), (64, "pair"), (1024, "channel"), (1024, "pair")]
    assert kl[1024, "pair"] < kl[1024, "channel"]
