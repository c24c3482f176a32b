"""The TensorRT backend, all of it but the libraries: engines and CUDA are stand-ins."""

from __future__ import annotations

from typing import Any

import fake_loop
import fake_model
import pytest
from fake_cuda import FakeCuda
from fake_loop import IDS, looped_manifest, looped_model
from fake_model import PROMPT
from fake_model import fake_model as on_cpu
from fake_trt import device_model

from edgert.model import Model

VARIANT = "fp32-ort"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))


def decoder(cuda: FakeCuda | None = None, **changes: Any) -> Model:
    graph = fake_model.Graph()
    return device_model(fake_model.manifest(), VARIANT, {"decode": graph}, cuda=cuda, **changes)


def looped(cuda: FakeCuda | None = None, **changes: Any) -> Model:
    graphs = fake_loop.Graphs()
    functions = {"enter": graphs.enter, "think": graphs.think, "leave": graphs.leave}
    return device_model(looped_manifest(), VARIANT, functions, cuda=cuda, **changes)


def test_it_says_what_the_cpu_says():
    """Prefill, steps, and the growth of the states into the next capacity."""
    ids = PROMPT * 90  # 270 tokens: beyond the first capacity
    with decoder() as device, on_cpu() as host:
        assert (
            device.generate(ids, max_tokens=30).tokens == host.generate(ids, max_tokens=30).tokens
        )
        assert "tensorrt 10.3.0 · GPU, SM 8.7" in device.placement


@pytest.mark.parametrize("halt", ["full", "fixed:2", "settle:0.1", "settle:0.3:2:3"])
def test_a_loop_halts_where_it_does_on_the_cpu(halt):
    ids = IDS[:6]
    with looped() as device, looped_model() as host:
        steps = [list(m.stream(ids, max_tokens=20, halt=halt)) for m in (device, host)]
    got, want = ([(p.token, p.iterations) for p in pieces] for pieces in steps)
    assert got == want
