"""The plain solver of the benchmark is the exported one; its report checks before it speaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from cases import cases
from small_solver import DEPTH, MADE, random_network, small_bundle

from edgert.models.importers.hrm import read_hrm
from edgert.tasks.sudoku import FOUR

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CASE = next(case for case in cases("hrm") if case.name == "orig_rope_puzzle")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_plain_solver_says_what_the_published_model_says(batch):
    """At full depth, in whatever batches; with a puzzle embedding and rotary positions."""
    from plain_solve import Segment, solved

    settings = {"seq_len": int(CASE["inputs"].shape[1])}
    model = read_hrm(CASE.folder / "step_1234", settings=settings).model
    ids = torch.from_numpy(CASE["inputs"])
    puzzle = model.puzzle_rows(torch.from_numpy(CASE["puzzle_identifiers"]))
    found = solved(model, Segment(model), ids, puzzle, batch)
    assert found == CASE["logits"][-1].argmax(-1).tolist()


def test_the_operations_of_a_segment_are_counted():
    """The published size: every block's weights, once for each update and position."""
    from plain_solve import products, published

    config = published(512, 4, 81)
    shapes, operations = products(config)
    assert len(shapes) == 4 * 4 * 6
    assert sum(a * b for a, b in shapes[:4]) == 3_407_872
    assert operations == 2 * 82 * 24 * 3_407_872


def side(ms: float, facts=None, **run) -> SimpleNamespace:
    run = {"others": 0.0, "graph_s": ms / 2e3, "step_s": [ms / 1e3]} | run
    facts = {"placement": "x", "parameters": 1, "torch": "2", "puzzles": 2} | (facts or {})
    return SimpleNamespace(runs=[run, run], facts=facts, step_ms=lambda: [ms, ms])


def segment_sides(**state) -> dict[str, SimpleNamespace]:
    names = ("segment", "segment-eager", "segment-compiled")
    sides = {
        name: side(ms, state=state.get(name.replace("-", "_"), [1.0, 2.0]))
        for name, ms in zip(names, (2.0, 5.0, 3.0), strict=True)
    }
    speeds = {"torch": 10.0, "onnxruntime": 20.0}
    return sides | {"products": side(1.0, {"operations": 2e7}, gflops=speeds)}


def test_a_segment_is_held_against_its_products():
    from solve import segment_summary, table

    report = segment_summary(segment_sides())
    assert report["over_edgert"] == {"segment": 1.0, "segment-eager": 2.5, "segment-compiled": 1.5}
    assert report["limit_ms"] == pytest.approx(1.0)  # 0.02 GFLOP at the better of both speeds
    assert "2.50x" in table({"segment": report})


def test_another_state_is_no_result():
    from solve import segment_summary

    with pytest.raises(click.ClickException, match="segment-compiled computed another state"):
        segment_summary(segment_sides(segment_compiled=[1.0, 2.01]))


def set_sides(**answers) -> dict[str, SimpleNamespace]:
    found = {"early": [[1], [3]], "full": [[1], [2]], "eager": [[1], [2]]} | answers
    early = side(2.0, answers=found["early"], exact=0.5, segments=2.0)
    full = side(5.0, answers=found["full"], exact=1.0, segments=8.0)
    return {"early": early, "full": full, "eager": side(12.0, answers=found["eager"])}


def test_early_exit_is_held_against_the_segments_it_saves():
    from solve import set_summary, table

    report = set_summary(set_sides())
    assert (report["full_over_early"], report["allowed"]) == (2.5, 4.0)
    assert report["share_of_allowed"] == pytest.approx(0.625)
    assert (report["eager_over_early"], report["eager_over_full"]) == (6.0, 2.4)
    assert report["ms_a_puzzle"]["early"] == 1.0
    assert report["host_share"] == pytest.approx(0.5)
    printed = table({"set": report | {"bundle": "b", "batch": 1}})
    assert "62 % of the 4.00x that its segments allow" in printed


def test_other_answers_are_no_result():
    from solve import set_summary

    with pytest.raises(click.ClickException, match="other answers to 50.0 %"):
        set_summary(set_sides(eager=[[1], [4]]))


def test_a_set_runs_early_at_full_depth_and_eagerly(tmp_path, monkeypatch):
    """The three sides, in this process, on a bundle of random weights."""
    import solve_worker
    from solve import set_summary

    model = random_network()
    bundle = small_bundle(model, tmp_path / "bundle")
    monkeypatch.setattr(solve_worker, "weights", lambda path: model)
    (tmp_path / "boards").write_text("\n".join(FOUR.text(question) for question, _ in MADE))
    orders = {"bundle": str(bundle), "source": "", "data": str(tmp_path / "boards")}
    orders |= {"threads": torch.get_num_threads(), "puzzles": 5, "batch": 3, "halt": None}
    sides = {}
    for name in ("early", "full", "eager"):
        run, facts = solve_worker.SIDES[name](orders | {"side": name})
        found = run() | {"others": 0.0}
        ms = found["step_s"][0] * 1e3
        sides[name] = SimpleNamespace(runs=[found], facts=facts, step_ms=lambda ms=ms: [ms])
    report = set_summary(sides)
    assert report["puzzles"] == 5
    assert report["equal_answers"] == 1.0
    assert report["segments"]["full"] == DEPTH
    assert 1.0 < report["segments"]["early"] < DEPTH
    assert 0.0 < report["host_share"] < 1.0


def test_a_segment_runs_on_every_side(tmp_path):
    """Exported, in eager torch, and as products alone; in this process, tiny."""
    import solve_worker
    from solve import export, segment_summary

    size = (32, 1, 4)
    orders = {"size": size, "threads": torch.get_num_threads(), "segments": 2}
    orders["bundle"] = export(size, tmp_path / "bundle")
    sides = {}
    for name in ("segment", "segment-eager", "products"):
        run, facts = solve_worker.SIDES[name](orders | {"side": name})
        found = run() | {"others": 0.0}
        assert name == "products" or len(found["step_s"]) == 2
        ms = [s * 1e3 for s in found.get("step_s", [])]
        sides[name] = SimpleNamespace(runs=[found], facts=facts, step_ms=lambda ms=ms: ms)
    report = segment_summary(sides)
    assert report["ms"].keys() == {"segment", "segment-eager"}
    assert min(report["ms"].values()) > 0 < report["limit_ms"]


@pytest.mark.full
def test_a_segment_runs_as_a_user_starts_it():
    """Processes in turns, tiny, without a compiler."""
    command = [sys.executable, str(BENCHMARKS / "solve.py"), "--width", "32", "--layers", "1"]
    command += ["--cells", "4", "--rounds", "1", "--segments", "2", "--threads", "1"]
    done = subprocess.run(
        [*command, "--no-compile", "--json"],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["segment"]
    assert report["ms"].keys() == {"segment", "segment-eager"}
    assert min(report["ms"].values()) > 0
    assert report["gflop"] == pytest.approx(2 * 5 * 6 * (32 * 128 + 3 * 32 * 256) / 1e9)
