"""examples/robot_loop.py: control beside generation, shut down by a signal, resumed."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from command import Result, finished, python
from fake_model import Graph, fake_model, says

import edgert

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "robot_loop.py"
REAL = Path(os.environ.get("EDGERT_TEST_SMOLLM2", ROOT / "bundles" / "smollm2-135m-instruct"))


@pytest.fixture
def robot_loop(monkeypatch) -> ModuleType:
    """The example as a module: it is a script beside the package, not a part of it."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import robot_loop

    return robot_loop


def call(*arguments: object) -> Result:
    return finished(python(EXAMPLE, *arguments))


def report_of(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def test_it_controls_and_talks_and_saves(tiny_bundle, tmp_path):
    """Every tick of three seconds is in the report, and the session in a file of its owner's."""
    file, drawing = tmp_path / "robot.session", tmp_path / "late.svg"
    result = call(
        tiny_bundle, "--seconds=3", "--session", file, "--json", "--plot", drawing, "--baseline"
    )
    report = report_of(result)
    assert report["ended_by"] == "time"
    for loop in (report, report["baseline"]):
        assert loop["ticks"] + loop["missed_ticks"] >= 300
        assert sum(loop["histogram"]["ticks"]) == loop["ticks"]
        late = loop["lateness_ms"]
        assert 0 < late["p50"] <= late["p99"] <= late["max"]
        assert loop["late_5_ms"] <= loop["late_1_ms"] <= loop["ticks"]
    said = report["generation"]
    assert said["met"] + said["dropped"] == said["answers"] > 0
    assert said["met"] <= said["tokens"]
    assert report["baseline"]["generation"] is None
    assert report["session"]["file"] == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = drawing.read_text(encoding="utf-8")
    assert text.startswith("<svg ")
    assert f"{report['ticks']} ticks at 100 Hz" in text


def test_sigterm_saves_and_the_next_start_goes_on(tiny_bundle, tmp_path):
    """A signal in mid-run is a clean end, exit code 0; the next start has all that was said."""
    file = tmp_path / "robot.session"
    first = python(EXAMPLE, tiny_bundle, "--seconds=0", "--session", file, "--json")
    assert first.stderr is not None
    assert first.stderr.readline().startswith("the control loop runs")
    for _ in range(3):
        assert first.stderr.readline(), "it ended without an answer"
    first.send_signal(signal.SIGTERM)
    one = report_of(finished(first))
    assert one["ended_by"] == "SIGTERM"
    assert not one["session"]["resumed"]
    with edgert.resume(file) as session:
        tokens, data = list(session.tokens), dict(session.data)
        assert len(tokens) == one["session"]["tokens"] >= data["instruction"] > 0
        assert session.generate(max_tokens=3).tokens
    two = report_of(call(tiny_bundle, "--seconds=0.5", "--session", file, "--json"))
    assert two["session"]["resumed"]
    assert two["session"]["tokens_at_start"] == len(tokens)
    assert one["generation"]["met"] == data["answers"] > 0
    assert two["session"]["answers_in_all"] == data["answers"] + two["generation"]["met"]
    assert two["generation"]["met"] > 0
    with edgert.resume(file) as session:
        known = session.data["instruction"]
        assert known == data["instruction"]
        assert session.tokens[:known] == tokens[:known]


def test_another_bundles_session_is_refused(tiny_bundle, tmp_path):
    """Before the arm moves, with the exit code of what does not fit together."""
    file = tmp_path / "other.session"
    with fake_model().session() as session:
        session.append("abc")
        session.save(file)
    result = call(tiny_bundle, "--seconds=1", "--session", file)
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a bundle, or --no-generate"),
        (["--no-generate", "--baseline"], "--baseline goes with a bundle"),
        (["bundle", "--hz=0"], "0 is not a number from 1"),
        (["bundle", "--seconds=inf"], "inf is not a number from 0"),
    ],
)
def test_wrong_options_are_named(robot_loop, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        robot_loop.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_loop_alone_needs_no_model(robot_loop, capsys):
    """And its report for people has a line per subject and a histogram."""
    interval = sys.getswitchinterval()
    assert robot_loop.main(["--no-generate", "--seconds=0.3", "--hz=200", "--no-realtime"]) == 0
    out = capsys.readouterr().out
    assert "ticks at 200 Hz" in out
    assert "ordinary priority" in out
    assert "late by" in out
    assert "generation" not in out
    assert sys.getswitchinterval() == interval


def test_a_late_answer_is_dropped_with_its_question(robot_loop):
    """What comes after the deadline is forgotten, and the session goes on as if not asked."""
    graph = Graph(says("done", after=3), hook=lambda: time.sleep(0.03))
    with fake_model(graph).session() as session:
        session.append("a")
        talk = robot_loop.Talk(session, deadline_ms=10, max_tokens=8)
        assert talk.answer("bc") is None
        assert (talk.answers, talk.met, session.tokens) == (1, 0, [99])
        patient = robot_loop.Talk(session, deadline_ms=60_000, max_tokens=8)
        patient.priority = "SCHED_RR 1"  # as if it had been given: rests between tokens
        assert patient.answer("bc") == "done"
        assert (patient.answers, patient.met) == (1, 1)
        assert len(session.tokens) == len("abcdone")
        assert session.data == {"answers": 1}


def test_an_answer_that_is_cut_off_is_not_kept(robot_loop):
    """`stop` ends it after the step that runs; the next start begins with a fresh question."""
    graph = Graph()
    with fake_model(graph).session() as session:
        session.append("a")
        talk = robot_loop.Talk(session, deadline_ms=60_000, max_tokens=100)
        graph.hook = lambda: talk.stop() if len(graph.calls) == 6 else None
        talk.run(lambda: "bc", None)
        assert len(graph.calls) == 6
        assert (talk.answers, talk.tokens > 0, session.tokens) == (0, True, [99])


def test_goes_on_where_the_saved_session_ended(robot_loop, tmp_path):
    """After a resume the answers are those of a session that was never interrupted."""
    model = fake_model()

    def said(session: edgert.Session, count: int) -> list[int]:
        talk = robot_loop.Talk(session, deadline_ms=60_000, max_tokens=5)
        for _ in range(count):
            assert talk.answer("where") is not None
        return list(session.tokens)

    with model.session() as whole:
        whole.append("you are")
        expected = said(whole, 4)
    with model.session() as session:
        session.append("you are")
        first = said(session, 2)
        session.save(tmp_path / "robot.session")
    with edgert.resume(tmp_path / "robot.session", model=model) as again:
        assert again.tokens == first
        assert said(again, 2) == expected


def test_a_full_context_is_rewound_to_the_instruction(robot_loop):
    """The session never outgrows the model's context, and what it was told first stays."""
    with fake_model(context=40).session() as session:
        session.append("you are")
        session.data["instruction"] = known = len(session.tokens)
        told = list(session.tokens)
        talk = robot_loop.Talk(session, deadline_ms=60_000, max_tokens=10)
        for _ in range(8):
            assert talk.answer("a robot") is not None
            assert len(session.tokens) <= 40
            assert session.tokens[:known] == told
        assert talk.rewinds >= 3
        assert talk.met == 8


def test_control_goes_on_when_the_model_fails(robot_loop, tmp_path, capsys):
    """A failed step ends the answers and sets the exit code; the arm is held to the end."""

    def fail() -> None:
        raise RuntimeError("the graph broke")

    given = robot_loop.options(["bundle", "--seconds=0.3", "--no-realtime"])
    with fake_model(Graph(hook=fail)).session() as session:
        talk = robot_loop.Talk(session, deadline_ms=1000, max_tokens=4)
        report = robot_loop.move(given, talk, [])
    assert report["exit_code"] == 1
    assert report["ticks"] + report["missed_ticks"] >= 30
    assert "the graph broke" in capsys.readouterr().err


def test_lateness_is_counted_in_bins(robot_loop):
    """Counts at the marks, percentiles to 10 µs, the largest exactly."""
    lateness = robot_loop.Lateness()
    for ms in [0.005] * 97 + [1.5, 7.0, 250.0]:
        lateness.add(ms / 1e3)
    assert (lateness.between(1), lateness.between(5), lateness.ticks) == (3, 2, 100)
    assert (lateness.quantile_ms(0.5), lateness.quantile_ms(0.99)) == (0.01, 7.01)
    assert lateness.worst_ms == 250.0
    assert sum(lateness.histogram()) == 100
    assert lateness.histogram()[-1] == 1


def test_priority_is_asked_for_and_reported(robot_loop, monkeypatch):
    """A user who may not have it is told so, and the loop runs all the same."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with robot_loop.steady(True) as priority:
        assert priority == "ordinary (SCHED_FIFO is not permitted)"
    assert robot_loop.keep_running() == "ordinary"


def test_late_ticks_are_compared_with_the_baseline(robot_loop):
    """A tick over 5 ms counts as the machine's if the baseline was late at it or beside it."""
    late = {10: 6.0, 20: 7.0, 30: 2.0, 40: 9.0}
    assert robot_loop.like(late, [(11, 1.2), (30, 8.0), (40, 9.1)]) == 2


def ticks_during(work) -> tuple[int, float]:
    """How often another Python thread, asleep for 1 ms each time, got the interpreter meanwhile."""
    ticks, over = 0, threading.Event()

    def ticker() -> None:
        nonlocal ticks
        while not over.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=ticker)
    thread.start()
    try:
        time.sleep(0.02)
        before, start = ticks, time.perf_counter()
        work()
        return ticks - before, time.perf_counter() - start
    finally:
        over.set()
        thread.join()


def test_other_threads_run_during_a_graph_call(tiny_bundle):
    """One prefill call of thousands of tokens lets Python go on; a call that does not is told."""
    length = 8192
    with edgert.load(tiny_bundle, threads=1) as model:
        execution = model.runner.open(tokens=length)
        ids = np.full(length, 70, np.int64)
        io = execution.io(length)
        io.ids[0], io.select[0, 0] = ids, length - 1
        shares = []
        for _ in range(5):  # others use the machine: the best of five tells what is possible
            execution.reset()
            ticks, seconds = ticks_during(io.run)
            assert seconds > 0.05, "too short a call to tell"
            shares.append(ticks * sys.getswitchinterval() / seconds)  # ticks a quantum of the GIL
    assert max(shares) > 0.25  # a tick takes at least 1 ms, a quantum is 5
    # holds the interpreter in one C call
    assert min(ticks_during(lambda: sum(range(10**7)))[0] for _ in range(5)) <= 2


@pytest.mark.full
@pytest.mark.skipif(not REAL.is_dir(), reason="the demo's bundle has not been made")
def test_no_tick_is_5_ms_late_in_a_minute_with_the_real_model():
    """The promise of examples/README.md. Up to three minutes, since others use the machine.

    It cannot be judged where the loop without a model, at the same time, is that late as well:
    then the machine itself stood still.
    """
    seen = []
    for _ in range(3):
        report = report_of(finished(python(EXAMPLE, REAL, "--json", "--baseline")))
        assert report["generation"]["met"] > 0
        worst, alone = (r["lateness_ms"]["max"] for r in (report, report["baseline"]))
        seen.append(f"{worst} ms late, {alone} ms without a model")
        print(seen[-1], f"· host took {report['stolen_ms']} ms · {report['priority']} priority")
        if worst <= 5.0:
            return
        if alone <= 5.0:
            break
    else:
        pytest.skip(f"the machine stands still for longer: {'; '.join(seen)}")
    pytest.fail(f"a tick was more than 5 ms late: {'; '.join(seen)}")
