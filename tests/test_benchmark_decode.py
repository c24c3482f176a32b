"""The plain decoder of the benchmark is the published model; its report checks before it speaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from cases import cases

from edgert.models.importers import load_source

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
UNGATED = [c for c in cases("hagi") if c.name in ("model_a", "model_b", "model_c", "model_d")]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("case", UNGATED, ids=lambda case: case.name)
def test_the_plain_decoder_says_what_the_model_says(case):
    """With the growing cache and with the masked one of fixed shape."""
    from plain_decode import Decoder, decode
    from plain_model import Plain

    ours = load_source(case.checkpoint).model
    plain = Plain(ours.config)
    plain.load_state_dict(ours.published())
    ids = torch.from_numpy(case["input_ids"])[:1, :5]
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), 1)
    said = ids[0, 5:].tolist()
    decoder = Decoder(plain, 5 + 8).eval()
    for step in (None, decoder):
        found = decode(decoder, ids[0, :5].tolist(), 8, step)
        assert found["tokens"] == said
        assert len(found["step_s"]) == 8


def test_bytes_of_a_token_count_the_core_once_an_iteration():
    from plain_model import Plain

    case = next(case for case in UNGATED if case.name == "model_d")
    plain = Plain(load_source(case.checkpoint).model.config)
    core = sum(p.numel() for m in (plain.reasoning, plain.gdr) for p in m.parameters())
    rest = sum(p.numel() for p in plain.parameters()) - core
    assert plain.bytes_per_token() == 4 * (rest + plain.c.iterations * core)


def side(tokens: list[int], ms: float) -> SimpleNamespace:
    run = {"tokens": tokens, "others": 0.0, "memory": {"peak": 1.0}, "gb_per_s": 10.0}
    facts = {"placement": "x", "parameters": 1, "torch": "2", "bytes_per_token": 20_000_000}
    return SimpleNamespace(runs=[run, run], facts=facts, step_ms=lambda: [ms, ms])


def test_the_report_has_ratios_and_the_memory_limit():
    from decode import summary, table

    sides = {"edgert": side([1, 2], 2.0), "eager": side([1, 2], 6.0), "memory": side([], 1.0)}
    report = summary(sides, threads=2, rounds=2, prompt=1, tokens=1)
    assert report["over_edgert"] == {"edgert": 1.0, "eager": 3.0}
    assert report["memory_limit_ms"] == pytest.approx(2.0)
    assert "3.00x" in table(report | {"bundle": "b"})


def test_other_tokens_are_no_result():
    from decode import summary

    sides = {"edgert": side([1, 2], 2.0), "eager": side([1, 3], 6.0), "memory": side([], 1.0)}
    with pytest.raises(click.ClickException, match="eager chose other tokens"):
        summary(sides, threads=2, rounds=2, prompt=1, tokens=1)
