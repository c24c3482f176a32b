"""How early a loop may end: what is measured, what is recommended, where it is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_loop import IDS, ITERATIONS, Graphs, looped_model, said
from fake_model import fake_model

import edgert
import edgert.halting_text as timed
from edgert.bundle import Bundle
from edgert.errors import BadBundle, UsageError
from edgert.evaluate import cross_entropy
from edgert.halting import REPORT, Halt, parse_halt
from edgert.halting_report import fitted, in_turns, store, to_json
from edgert.halting_text import sweep

WINDOW = 9


def by_hand(policy: str) -> tuple[list[int], list[int], list[float]]:
    """Best tokens, iterations and costs of the text in windows, from plain arithmetic."""
    best, taken, costs = [], [], []
    for start in range(0, len(IDS), WINDOW):
        part = IDS[start : start + WINDOW]
        logits, depths = said(part, parse_halt(policy))
        for i, wanted in enumerate(part[1:]):
            best.append(int(logits[i].argmax()))
            taken.append(depths[i])
            costs.append(float(cross_entropy(logits[i][None], np.array([wanted]))[0]))
    return best, taken, costs


def test_every_policy_is_measured_on_the_same_text():
    """Agreement, iterations and perplexity are those of plain arithmetic; full depth is first."""
    report = sweep(looped_model(), IDS, thresholds=[0.05, 0.3], window=WINDOW)
    assert [p.policy for p in report.points] == [
        *("full", "fixed:3", "fixed:2", "fixed:1", "settle:0.05", "settle:0.3")
    ]
    truth, _, _ = by_hand("full")
    for point in report.points:
        best, taken, costs = by_hand(point.policy)
        assert point.agreement == np.mean(np.equal(best, truth))
        assert point.iterations_mean == np.mean(taken)
        assert point.iterations_p95 == np.percentile(taken, 95)
        assert point.nll == pytest.approx(np.mean(costs), rel=1e-12)
        assert point.perplexity == pytest.approx(np.exp(np.mean(costs)), rel=1e-12)
        assert point.latency_ms_mean > 0
    assert report.points[0].agreement == 1.0
    assert report.iterations == ITERATIONS
    assert [n for n, _ in report.line.points] == [1, 2, 3, 4]


def test_thresholds_come_from_the_changes_that_were_seen():
    """Sorted, different, and such that they make a difference."""
    report = sweep(looped_model(), IDS, window=WINDOW)
    settle = [p for p in report.points if p.policy.startswith("settle")]
    assert len(settle) > 4
    thresholds = [parse_halt(p.policy).threshold for p in settle]
    assert thresholds == sorted(set(thresholds))
    means = [p.iterations_mean for p in settle]
    assert means == sorted(means, reverse=True)
    assert means[-1] < means[0]


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_the_cheapest_policy_that_agrees_is_recommended(agreement):
    report = sweep(looped_model(), IDS, agreement=agreement, window=WINDOW)
    good = [p for p in report.points if p.agreement >= agreement]
    (chosen,) = [p for p in report.points if p.policy == report.recommended]
    assert chosen.agreement >= agreement
    assert chosen.iterations_mean == min(p.iterations_mean for p in good)
    if agreement == 0.0:
        assert chosen.iterations_mean < ITERATIONS


class Machine(Graphs):
    """Graphs that take a time of their own on a clock of their own: the prologue 2 ms and each
    iteration 3, times `load`, which may change from call to call."""

    def __init__(self, load=lambda calls: 1.0) -> None:
        super().__init__()
        self.now, self.calls, self.load = 0.0, 0, load

    def spend(self, ms: float) -> None:
        self.calls += 1
        self.now += ms / 1e3 * self.load(self.calls)

    def enter(self, ids):
        self.spend(2.0)
        return super().enter(ids)

    def think(self, h, iteration, lens, kept):
        self.spend(3.0)
        return super().think(h, iteration, lens, kept)


def measured_on(machine: Machine, monkeypatch, **options):
    monkeypatch.setattr(timed, "_clock", lambda: machine.now)
    options = {"thresholds": [0.05, 0.3], "window": WINDOW} | options
    return sweep(looped_model(machine), IDS, **options)


def test_speed_and_ceiling_are_those_of_the_iterations_taken(monkeypatch):
    """A loop that costs nothing but its graphs reaches what its line allows."""
    report = measured_on(Machine(), monkeypatch)
    assert report.line.intercept_ms == pytest.approx(2.0)
    assert report.line.slope_ms == pytest.approx(3.0)
    assert report.line.r2 == pytest.approx(1.0)
    for p in report.points:
        assert p.latency_ms_mean == pytest.approx(2.0 + 3.0 * p.iterations_mean)
        assert p.speedup == pytest.approx((2.0 + 3.0 * ITERATIONS) / p.latency_ms_mean)
        assert p.ceiling == pytest.approx(p.speedup)
        assert p.ceiling_share == pytest.approx(1.0)
    assert report.points[3].speedup == pytest.approx(14 / 5)
    assert 1.0 < report.points[-1].speedup < 14 / 5


def test_what_halting_itself_costs_is_missing_from_the_ceilings_share(monkeypatch):
    """Each decision by a threshold takes 1 ms here: the share says so."""
    machine = Machine()
    plain = Halt.single.fget

    def slow(halt: Halt) -> float:
        machine.now += 1e-3 if halt.threshold else 0.0
        return plain(halt)

    monkeypatch.setattr(Halt, "single", property(slow))
    report = measured_on(machine, monkeypatch)
    for p in report.points:
        ideal = 2.0 + 3.0 * p.iterations_mean
        late = 1.0 if p.policy.startswith("settle") else 0.0
        assert p.ceiling_share == pytest.approx(ideal / (ideal + late))


def test_a_machine_that_slows_down_slows_all_policies_alike(monkeypatch):
    """By half from the first call to the last, and ten times over for one call of fifty."""
    count = Machine()
    measured_on(count, monkeypatch, rounds=7)

    def load(calls: int) -> float:
        return (1.0 + 0.5 * calls / count.calls) * (10.0 if calls % 47 == 0 else 1.0)

    report = measured_on(Machine(load), monkeypatch, rounds=7)
    assert report.line.r2 > 0.98
    for p in report.points:
        assert p.ceiling_share == pytest.approx(1.0, abs=0.05)
        assert p.speedup == pytest.approx(14 / (2 + 3 * p.iterations_mean), rel=0.08)


def test_policies_take_turns():
    order: list[str] = []

    def run(policy: str, part: int):
        order.append(f"{policy}{part}")
        return f"{policy}{len(order)}", np.array([len(order)] * part)

    found = in_turns("abc", [1, 2], run, rounds=3)
    assert order == ["a1", "b1", "c1", "a2", "b2", "c2"] * 3
    assert [m.found for m in found] == [["a1", "a4"], ["b2", "b5"], ["c3", "c6"]]
    medians = [[7.0, 10.0, 10.0], [8.0, 11.0, 11.0], [9.0, 12.0, 12.0]]
    assert [m.seconds.tolist() for m in found] == medians


def test_a_line_through_one_depth_is_flat():
    line = fitted({1: np.array([0.002, 0.004])})
    assert (line.intercept_ms, line.slope_ms, line.r2) == (pytest.approx(3.0), 0.0, 1.0)


def test_progress_ends_where_it_says():
    seen: list[tuple[int, int]] = []
    options = {"thresholds": [0.1], "rounds": 2, "window": 12}
    sweep(looped_model(), IDS, progress=lambda *done: seen.append(done), **options)
    assert seen == [(i, 20) for i in range(1, 21)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window = 1"),
        ({"window": 9999}, "window = 9999"),
        ({"tokens": 1}, "tokens = 1"),
        ({"agreement": 1.5}, "agreement = 1.5"),
        ({"rounds": 0}, "rounds = 0"),
        ({"thresholds": [-1.0]}, "threshold"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        sweep(looped_model(), IDS, **options)


def test_models_and_texts_that_cannot_be_swept_are_refused():
    with pytest.raises(UsageError, match="no loop that could end early"):
        sweep(fake_model(), IDS)
    with pytest.raises(UsageError, match="no loop that could end early"):
        sweep(looped_model(fill="none"), IDS)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        sweep(looped_model(), IDS[:1])


@pytest.fixture
def bundle(tmp_path, model_a_bundle) -> Path:
    """A real bundle to put a report into; what it says is the test's own."""
    return Path(shutil.copytree(model_a_bundle, tmp_path / "bundle"))


def content(recommended: object = "fixed:1") -> dict[str, object]:
    model = looped_model()
    return to_json(sweep(model, IDS, thresholds=[0.1]), model) | {"recommended": recommended}


def test_a_report_is_stored_without_touching_the_identity(bundle):
    """Twice: the second replaces the first. Sessions and stamps go by the identity."""
    before = Bundle.open(bundle).manifest
    for policy in ("fixed:1", "full"):
        store(Bundle.open(bundle), content(policy))
        after = Bundle.open(bundle, verify=True).manifest
        assert after.model_id == before.model_id
        assert {n: v.variant_id for n, v in after.variants.items()} == {
            n: v.variant_id for n, v in before.variants.items()
        }
        assert after.reports == (*before.reports, REPORT)
        assert json.loads((bundle / REPORT).read_text())["recommended"] == policy
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]
    for path in bundle.rglob("*"):
        assert path.is_dir() or path.stat().st_nlink == 1


def test_a_report_that_cannot_be_written_leaves_the_bundle(bundle, monkeypatch):
    import edgert.halting_report as module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "publish_directory", full)
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(edgert.EdgertError, match="No space left"):
        store(Bundle.open(bundle), content())
    assert (bundle / "manifest.json").read_bytes() == before
    Bundle.open(bundle, verify=True)
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_auto_is_what_the_report_recommends(bundle):
    """Model A has no loop: `full` is all that its report could say."""
    with edgert.load(bundle) as model, pytest.raises(UsageError, match="no halting report"):
        model.generate([1, 2], halt="auto")
    store(Bundle.open(bundle), content("full"))
    with edgert.load(bundle) as model:
        assert model.sampling(None, {"halt": "auto"}).halt == "full"
        assert model.generate([1, 2], halt="auto", max_tokens=2).tokens
    store(Bundle.open(bundle), content("fixed:1"))
    with edgert.load(bundle) as model, pytest.raises(UsageError, match="cannot halt early"):
        model.generate([1, 2], halt="auto")


@pytest.mark.parametrize("wrong", [None, 3, [], {"a": 1}, "fixed:0", "auto", "x" * 500])
def test_a_report_that_recommends_nonsense_is_refused(bundle, wrong):
    store(Bundle.open(bundle), content(wrong))
    with edgert.load(bundle) as model, pytest.raises(BadBundle, match="recommends no policy"):
        model.generate([1, 2], halt="auto")


def test_the_verb_prints_a_table_and_stores_nothing_on_request(run, bundle, tmp_path):
    """On a model without a loop it says so, and what to give instead."""
    (tmp_path / "text").write_text("some text")
    got = run("halt", bundle, "--data", tmp_path / "text")
    assert got.code == UsageError.exit_code
    assert "no loop that could end early" in got.err or "no tokenizer" in got.err


def test_a_policy_of_full_depth_is_full_however_it_is_said():
    assert Halt().is_full
    assert not Halt(most=ITERATIONS).is_full
