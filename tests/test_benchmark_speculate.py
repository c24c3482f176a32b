"""benchmarks/speculate.py verifies before it speaks, and says what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import edgert

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def ran(*arguments: object) -> str:
    from speculate import main

    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def short(monkeypatch) -> None:
    import speculate

    sets = {kind: dict(list(prompts.items())[:2]) for kind, prompts in speculate.SETS.items()}
    monkeypatch.setattr(speculate, "SETS", sets)


@pytest.mark.usefixtures("short")
def test_every_prompt_is_answered_in_both_ways(tiny_bundle):
    """One object with the medians; the table has a line for each prompt, and a verdict a set."""
    command = (tiny_bundle, "--threads", 1, "--rounds", 2, "--tokens", 12)
    report = json.loads(ran(*command, "--json"))
    assert [row["set"] for row in report["prompts"]] == ["edit"] * 2 + ["open-ended"] * 2
    for row in report["prompts"]:
        assert row["n_gen"] == 12
        assert row["unclear"] is None
        assert len(row["ratios"]) == len(row["cpu_ratios"]) == 2
        assert row["accepted"] <= row["checked"]
        assert min(row["ms"].values()) > 0
    lines = ran(*command).splitlines()
    assert lines[0].startswith("tiny · fp32-ort")
    assert [line for line in lines if "goal median >= 1.5: " in line]
    assert [line for line in lines if "goal least >= 0.97: " in line]


def test_widths_are_measured_in_plain_steps(tiny_bundle):
    report = json.loads(ran(tiny_bundle, "--threads", 1, "--rounds", 1, "--widths", "--json"))
    assert [step["tokens"] for step in report["steps"]] == [1, 2, 3, 5, 9]
    assert report["steps"][0]["plain_steps"] == 1
    assert "a guess" in ran(tiny_bundle, "--threads", 1, "--rounds", 1, "--widths")


def test_other_tokens_are_an_error_unless_rounding_decides(tiny_bundle, monkeypatch):
    import speculate

    with edgert.load(tiny_bundle) as model:
        prompt = model.encode("the star")
        made: dict[str, list[Any]] = {
            way: [speculate.answer(model, prompt, 8, way)] for way in speculate.WAYS
        }
        assert speculate.check(model, prompt, made) is None
        right = made["auto"][0]
        wrong = (*right.tokens[:5], right.tokens[5] + 1, *right.tokens[6:])
        made["auto"].append(replace(right, tokens=wrong))
        with pytest.raises(click.ClickException, match="auto says other tokens .* token 5 on"):
            speculate.check(model, prompt, made)
        monkeypatch.setattr(speculate, "margin_of", lambda model: 1e9)
        assert speculate.check(model, prompt, made) == 5
