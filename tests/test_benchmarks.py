"""The comparison: verification, medians, goals, rounds, and the peers' copies of the weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Benchmarks are scripts beside each other, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


STATUS = """\
Name:\tpython
VmHWM:\t  200000 kB
VmRSS:\t  100000 kB
RssAnon:\t   60000 kB
RssFile:\t   40000 kB
"""


def test_memory_reads_kib_as_mb():
    """The kernel's kB are 1024 bytes; the table's MB are 10^6."""
    from runtimes.measure import memory

    assert memory(STATUS) == {"peak": 204.8, "resident": 102.4, "anonymous": 61.44, "file": 40.96}


def test_busy_ticks_leave_out_idle_and_waiting():
    """idle and iowait are not work; guest time is already part of user time."""
    from runtimes.measure import busy_ticks

    assert busy_ticks("cpu  1 2 4 1000 2000 8 16 32 64 128\ncpu0 9 9 9 9 9 9 9 9 9 9\n") == 63


def test_window_sees_that_nothing_can_be_negative():
    """Two clocks disagree by a tick at most; others never owe time."""
    from runtimes.measure import Window

    window = Window()
    assert window.others() >= 0
    assert window.elapsed() > 0


@pytest.mark.parametrize(
    ("limit", "patience", "expected"),
    [(1e9, 5, True), (-1, 0.05, False), (1e9, 0, False)],
    ids=["quiet at once", "never quiet", "no patience"],
)
def test_waiting_for_quiet_ends(limit, patience, expected):
    """It says whether the machine was quiet, and never waits much longer than its patience."""
    from runtimes.measure import await_quiet

    assert await_quiet(limit, patience, span=0.01) is expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([], [], None),
    ],
)
def test_first_difference(a, b, expected):
    """The index of the first token that differs, or that only one sequence has."""
    from peers_report import first_difference

    assert first_difference(a, b) == expected


def test_requests_are_as_few_as_the_work_allows():
    """A prompt that is both timed and decoded behind is read once; depth 0 has a short prompt."""
    from peers_report import Work

    work = Work(prefills=(8, 16), depths=(0, 16), steps=3, short=2)
    assert work.requests() == [(2, 3), (8, 0), (16, 3)]
    assert work.capacity() == 20
    assert (work.prompt(0), work.prompt(16)) == (2, 16)


def work_of_tests() -> Any:
    from peers_report import Work

    return Work(prefills=(8, 16), depths=(0, 16), steps=3, short=2, cold=8)


def answer(speed: float = 1.0, others: float = 0.0, tokens=(1, 2, 3, 4), peak=800.0) -> dict:
    """A worker's answer: steps of 10 ms at speed 1, 0.1 s of prefill; margins of 1."""
    steps = [0.01 / speed] * 3

    def run(prompt: int, count: int) -> dict:
        said = list(tokens[: count + 1])
        timed = {"prompt": prompt, "prefill_s": 0.1 / speed, "step_s": steps[:count]}
        return timed | {"tokens": said, "margins": [1.0] * len(said)}

    return {
        "cold_s": 1 / speed,
        "cold_others": 0.0,
        "others": others,
        "memory": {"peak": peak, "resident": 700.0, "anonymous": 600.0, "file": 100.0},
        "runs": [run(2, 3), run(8, 0), run(16, 3)],
    }


SIDES: dict[str, dict[str, Any]] = {
    name: {"bits": bits, "about": name, "weight_bytes": 10**8, "kv_bytes": 1000}
    for name, bits in {
        "edgert-fp32": 32,
        "edgert-int4": 4,
        "edgert-int8": 8,
        "genai-fp32": 32,
        "genai-int4": 4,
        "llama-q4_0": 4,
    }.items()
}


def round_of(others: float = 0.0, **speeds: float) -> dict:
    """A round of all SIDES at speed 1, but for those given with _ for -."""
    given = {name.replace("_", "-", 1): speed for name, speed in speeds.items()}
    return {name: answer(given.get(name, 1.0), others) for name in SIDES}


def test_a_clear_difference_makes_a_side_invalid():
    """Only a side that computes the same is compared, and only as far as the lead decides."""
    from peers_report import invalid

    work, answers = work_of_tests(), round_of()
    assert invalid(answers, work) == {}
    answers["genai-int4"] = answer(tokens=(1, 9, 9, 9))  # of few bits: other tokens are right
    assert invalid(answers, work) == {}
    answers["genai-fp32"] = answer(tokens=(1, 2, 9, 4))
    assert invalid(answers, work) == {
        "genai-fp32": "token 2 behind 2 is 9, not 3, which leads by 1"
    }
    for run in answers["edgert-fp32"]["runs"]:
        run["margins"] = [1.0, 1.0, 1e-5, 1.0][: len(run["tokens"])]
    assert invalid(answers, work) == {}


def test_tokens_that_part_too_early_prove_nothing():
    """A near-tie at the very start leaves nothing compared."""
    from peers_report import invalid

    answers = round_of()
    answers["genai-fp32"] = answer(tokens=(9, 2, 3, 4))
    for run in answers["edgert-fp32"]["runs"]:
        run["margins"] = [1e-5] * len(run["tokens"])
    assert "the tokens part after 0 of 9" in invalid(answers, work_of_tests())["genai-fp32"]


def test_less_work_than_asked_for_is_invalid():
    """A side that stops at an end token has not done the work, whatever its precision."""
    from peers_report import invalid

    answers = round_of()
    answers["llama-q4_0"]["runs"][2]["tokens"] = [1, 2]
    assert invalid(answers, work_of_tests()) == {"llama-q4_0": "it gave 2 tokens behind 16, not 4"}


def test_perplexity_is_beside_the_reference():
    """exp of the mean cost, the ratio of the means, and its standard error."""
    from peers_report import perplexity

    found = perplexity([1.0, 3.0, 2.0], [1.0, 2.0, 0.0])
    assert found.perplexity == pytest.approx(np.exp(2.0))
    assert found.ratio == pytest.approx(np.e)
    assert found.error == pytest.approx(np.e * np.std([0, 1, 2]) / np.sqrt(3))
    assert found.tokens == 3
    with pytest.raises(ValueError, match="2 costs beside 1"):
        perplexity([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("name", "ratio", "wrong"),
    [
        ("edgert-int4", 1.49, False),
        ("edgert-int4", 1.51, True),
        ("edgert-int8", 1.21, True),
        ("genai-fp32", 1.0005, False),
        ("genai-fp32", 1.01, True),
    ],
)
def test_a_side_that_does_not_compute_the_model_is_invalid(name, ratio, wrong):
    """Few bits cost something; float32 next to nothing."""
    from peers_report import judge

    scores = {"edgert-fp32": [[1.0, 1.0]], name: [[1.0 + np.log(ratio)] * 2]}
    found, invalid = judge(SIDES, scores, {}, work_of_tests())
    assert found[name].ratio == pytest.approx(ratio)
    assert ([f"{ratio:.4f} times" in reason for reason in invalid.values()] == [True]) is wrong


def test_a_reason_names_its_round():
    """Of several the first one."""
    from peers_report import judge

    bad = {"genai-fp32": answer(tokens=(9, 9, 9, 9)), "edgert-fp32": answer()}
    rounds = {"0/2": round_of(), "1/2": bad, "2/2": bad}
    _, invalid = judge(SIDES, {}, rounds, work_of_tests())
    assert list(invalid) == ["genai-fp32"]
    assert invalid["genai-fp32"].startswith("round 1/2: token 0 behind 2 is 9")


def test_quiet_rounds_are_preferred():
    """Disturbed rounds are left out if three quiet ones remain; otherwise all count, and it is
    said. What disturbed another side does not matter."""
    from peers_report import chosen

    alone, busy = round_of(), round_of(others=1.5)
    mixed = round_of() | {"genai-int4": answer(others=1.5)}
    assert chosen([alone, busy, mixed, alone], ["edgert-int4"]) == ([alone, mixed, alone], True)
    pair = ["edgert-int4", "genai-int4"]
    rounds = [alone, busy, mixed, alone]
    assert chosen(rounds, pair) == (rounds, False)
    assert chosen([{"edgert-int4": answer()}] * 3, pair) == ([], False)


def test_ratios_are_paired_within_a_round():
    """A slow moment of the machine hits both sides of a round, so the ratio is of one round; it
    is to edgert's side of as many bits."""
    from peers_report import summarise

    pairs = [(1.0, 2.0), (0.1, 0.2), (0.5, 1.0)]
    rounds = [round_of(genai_int4=a, edgert_int4=b, edgert_fp32=99.0) for a, b in pairs]
    peer = summarise(rounds, SIDES, "genai-int4", work_of_tests(), 20.0)
    assert set(peer.over) == {"prefill 8", "prefill 16", "decode 0", "decode 16", "cold"}
    assert all(ratio == pytest.approx(2.0) for ratio in peer.over.values())
    assert peer.step_ms == {0: pytest.approx(20.0), 16: pytest.approx(20.0)}  # the median round
    assert peer.tokens(16) == pytest.approx(50.0)
    assert peer.prefill == {8: pytest.approx(40.0), 16: pytest.approx(80.0)}
    assert peer.cold_s == pytest.approx(2.0)
    assert (peer.peak, peer.rounds, peer.quiet) == (800.0, 3, True)
    assert summarise(rounds, SIDES, "edgert-int4", work_of_tests(), 20.0).over == {}


def test_a_peer_is_compared_with_the_side_that_loses_no_more_than_it_does():
    """Of edgert's sides of as many bits whose perplexity is no higher, the one with the fewest
    bytes; the first one where the peer is truer than all of them, or nothing is known of it."""
    from peers_report import counterpart, perplexity

    lean = SIDES["edgert-int4"] | {"weight_bytes": 6 * 10**7}
    sides = SIDES | {"edgert-int4-lean": lean}
    costs = {"edgert-int4": 1.03, "edgert-int4-lean": 1.13, "genai-int4": 1.2, "llama-q4_0": 1.1}
    scores = {name: perplexity([cost], [1.0]) for name, cost in costs.items()}
    assert counterpart(sides, "genai-int4", scores) == "edgert-int4-lean"
    assert counterpart(sides, "llama-q4_0", scores) == "edgert-int4"
    assert counterpart(sides, "genai-int4") == "edgert-int4"
    scores["llama-q4_0"] = perplexity([1.0], [1.0])
    assert counterpart(sides, "llama-q4_0", scores) == "edgert-int4"
    assert counterpart({"genai-int4": lean}, "genai-int4", scores) is None


def test_a_side_no_round_holds_has_no_summary():
    """Nothing is made up for a side that failed."""
    from peers_report import summarise

    assert summarise([{}], SIDES, "genai-int4", work_of_tests(), 20.0) is None


def test_the_limit_is_the_time_of_reading():
    """10^8 bytes of weights, 17.5 positions of 1,000 bytes, at 20 GB/s, of a step of 10 ms."""
    from peers_report import summarise

    found = summarise([round_of()], SIDES, "edgert-int4", work_of_tests(), 20.0)
    assert found.limit[16] == pytest.approx((1e8 + 17.5e3) / 20e9 / 0.01)


def table_of(rounds: list, threads: int = 2) -> dict:
    from peers_report import summarise

    work = work_of_tests()
    return {threads: {n: summarise(rounds, SIDES, n, work, 20.0) for n in SIDES}}


def verdicts(table: dict, scores: dict | None = None) -> dict[str, str]:
    from peers_goals import goals

    found = goals(table, scores or {}, 2, ["int4"])
    assert len({goal.text for goal in found}) == len(found)
    return {" ".join(goal.text.split()[1:]): goal.verdict for goal in found}


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"edgert_int4": 2.0}, ("met", "met", "met")),
        ({"edgert_int4": 1.6}, ("met", "missed", "met")),
        ({"edgert_int4": 1.2}, ("accepted", "missed", "missed")),
        ({"edgert_int4": 1.1}, ("missed", "missed", "missed")),
        ({"edgert_int4": 2.0, "llama_q4_0": 1.9}, ("met", "missed", "met")),
    ],
)
def test_speed_goals(speeds, expected):
    """The fastest peer counts, and the worst of all depths; what is accepted is told apart."""
    said = verdicts(table_of([round_of(**speeds)] * 3))
    decode, llama = (
        "decode >= 1.30x genai-int4",
        "decode >= 1.70x the best of llama-q4_0, llama-q4_1",
    )
    assert (said[decode], said[llama], said["cold >= 1.50x genai-int4"]) == expected


def test_a_slow_depth_is_what_counts():
    """A ratio that holds behind nothing, and not behind a long prompt, does not hold."""
    from peers_goals import goals

    rounds = [round_of(edgert_int4=2.0) for _ in range(3)]
    for round_ in rounds:
        round_["edgert-int4"]["runs"][2]["step_s"] = [0.009] * 3
    (goal, *_) = goals(table_of(rounds), {}, 2, ["int4"])
    assert (goal.measured, goal.verdict) == ("1.11x (decode 16)", "missed")


def test_a_busy_machine_leaves_times_unsure_but_not_memory():
    """Disturbed sides are not comparable; what a process allocates does not depend on others."""
    rounds = [round_of(edgert_int4=2.0, others=1.0)] * 3
    said = verdicts(table_of(rounds))
    assert said["decode >= 1.30x genai-int4"] == "unsure"
    assert said["peak memory <= genai-int4"] == "met"


def test_memory_and_perplexity_are_bounded_by_the_peer():
    """No higher is met, as much as the peer is no higher; what was not measured is not met."""
    from peers_report import perplexity

    rounds = [round_of() | {"genai-int4": answer(peak=799.0)}] * 3
    scores = {
        "edgert-int4": perplexity([1.1], [1.0]),
        "genai-int4": perplexity([1.1], [1.0]),
        "llama-q4_0": perplexity([1.05], [1.0]),
    }
    said = verdicts(table_of(rounds), scores)
    assert said["peak memory <= genai-int4"] == "missed"
    assert said["perplexity <= genai-int4"] == "met"
    assert said["perplexity <= llama-q4_0"] == "missed"
    assert said["perplexity <= llama-q4_1"] == "not measured"


@pytest.mark.parametrize(
    ("others", "kept", "asked"),
    [
        pytest.param([0.1], 0.1, 1, id="quiet at once"),
        pytest.param([0.9, 0.1], 0.1, 2, id="the second is quiet"),
        pytest.param([0.9, 0.5, 0.7], 0.5, 3, id="never: the least disturbed"),
    ],
)
def test_disturbed_answers_are_asked_for_again(others, kept, asked):
    """A side is measured again while others disturb it, so many times at most."""
    from peers_rounds import undisturbed

    answers = iter(others)
    calls = []

    def attempt() -> dict:
        calls.append(next(answers))
        return {"others": calls[-1], "cold_others": 0.0}

    assert undisturbed(attempt, 3, 0)["others"] == kept
    assert len(calls) == asked


def plan_of(**changes: Any) -> Any:
    from peers_rounds import Plan

    known = {"ids": list(range(50)), "work": work_of_tests(), "window": 20, "threads": (1, 2)}
    counts = {"rounds": 3, "repeats": 1, "attempts": 1, "patience": 0.0}
    return Plan(**known | counts | changes)


class FakeRounds:
    """`Rounds` whose workers answer at once; `calls` are (side or 'read', threads)."""

    def __new__(
        cls,
        names: tuple[str, ...],
        fails: dict[str, str] | None = None,
        timed: tuple[str, ...] | None = None,
    ) -> Any:
        from peers_rounds import Rounds

        from edgert.errors import EdgertError

        class Fake(Rounds):
            calls: list[tuple[str, int]] = []

            def _ask(self, name: str, orders: dict, threads: int) -> list:
                self.calls.append((name, threads))
                if name in (fails or {}):
                    raise EdgertError(fails[name])
                if "score" in orders:
                    return [(0.1, {"costs": [[1.0] * (len(ids) - 1) for ids in orders["score"]]})]
                return [(0.5, {"token": 1, "others": 0.0}), (1.0, answer())]

            def _read_speed(self, threads: int) -> dict:
                self.calls.append(("read", threads))
                return {"100000000": 20.0}

        sides = {name: None for name in names}
        timed = names if timed is None else timed
        return Fake(plan_of(), sides, timed, Path("log"), lambda text: None)


def test_sides_take_turns_to_begin(tmp_path):
    """Every side is scored once, and each round starts with another one."""
    from peers_rounds import Results

    names = ("edgert-int4", "genai-int4", "llama-q4_0")
    run, results = FakeRounds(names), Results(tmp_path / "r.json", {}, False)
    run.run(results)
    assert [name for name, _ in run.calls[:3]] == list(names)
    rounds = [run.calls[3 + i * 4 : 7 + i * 4] for i in range(6)]
    assert [calls[0] for calls in rounds] == [("read", 1), ("read", 2)] * 3
    assert [calls[1][0] for calls in rounds] == [n for n in names for _ in range(2)]
    assert all(len(results.at(threads)) == 3 for threads in (1, 2))
    assert results.speeds(2) == {10**8: [20.0] * 3}
    assert len(results.scores["edgert-int4"]) == 2  # whole windows of 20 among 50 tokens


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    """What is in the file is not measured again, unless it is of another run."""
    from peers_rounds import Results

    path, names = tmp_path / "r.json", ("edgert-int4", "genai-int4")
    results = Results(path, {"a": (1,)}, False)
    run = FakeRounds(names)
    run.score(results)
    run.round(results, 0, 1)
    again = FakeRounds(names)
    again.run(Results(path, {"a": (1,)}, True))
    assert len(again.calls) == 5 * 3
    for about, resume in (({"a": 2}, True), ({"a": (1,)}, False)):
        fresh = FakeRounds(names)
        fresh.run(Results(path, about, resume))
        assert len(fresh.calls) == 2 + 6 * 3


def test_a_side_that_fails_is_left_out(tmp_path):
    """The others go on, and its reason is kept."""
    from peers_rounds import Results

    run = FakeRounds(("edgert-int4", "genai-int4"), {"genai-int4": "no such model"})
    results = Results(tmp_path / "r.json", {}, False)
    run.run(results)
    assert run.failed == {"genai-int4": "no such model"}
    assert run.calls.count(("genai-int4", 2)) == 1
    assert all(list(round_) == ["edgert-int4"] for round_ in results.rounds.values())


def test_a_side_may_be_scored_alone(tmp_path):
    """What others are compared with needs no time of its own."""
    from peers_rounds import Results

    run = FakeRounds(("edgert-int4", "edgert-fp32"), timed=("edgert-int4",))
    results = Results(tmp_path / "r.json", {}, False)
    run.run(results)
    assert list(results.scores) == ["edgert-int4", "edgert-fp32"]
    assert all(list(round_) == ["edgert-int4"] for round_ in results.rounds.values())


def report_of(**changes: Any) -> Any:
    from peers_goals import goals
    from peers_page import Report
    from peers_report import perplexity

    table = table_of([round_of()] * 3)
    scores = {name: perplexity([2.0, 3.0], [2.0, 3.0]) for name in SIDES}
    known: dict[str, Any] = {
        "about": {"machine": {"cpu": "a CPU", "cpus": 2}},
        "plan": plan_of(),
        "sides": SIDES,
        "scores": scores,
        "table": table,
        "limits": {2: {2**30: 10.0, 10**8: 20.0}},
        "goals": goals(table, scores, 2, ["int4"]),
        "missing": {"torch-eager": "no torch"},
        "wrong": {"openvino-int4": "perplexity"},
    }
    return Report(**known | changes)


def test_every_side_has_a_row_in_every_form(capsys):
    """On a terminal and on a page: the same cells, who is missing, and every goal."""
    from peers_page import columns, page, rows, show

    found = report_of()
    lines = rows(found.table, found.plan.work)
    assert [line[1] for line in lines] == list(SIDES)
    assert {len(line) for line in lines} == {len(columns(found.plan.work))}
    assert "10.00 (1.00x)" in lines[4]
    text = page(found)
    show(found)
    shown = capsys.readouterr().out
    for said in ("edgert-int4", "torch-eager is not there: no torch", "openvino-int4 is INVALID"):
        assert said in text
        assert said in shown
    assert "2 threads read memory at 10.7 GB/s" not in text
    assert "2 threads read memory at 10.0 GB/s; 20.0 of 100 MB again and again" in text
    assert "*" not in text
    for goal in found.goals:
        assert goal.text in text


def test_what_is_not_to_be_trusted_is_marked():
    """A side that was disturbed has a star, and a sentence says what it means."""
    from peers_page import page

    text = page(report_of(table=table_of([round_of(others=1.0)] * 3)))
    assert "| genai-int4 * |" in text
    assert "- * others kept the machine busy" in text


def test_the_picture_has_a_bar_for_every_side(tmp_path):
    """Fewest bits on top, the fastest of them first; the same file from the same figures."""
    from peers_picture import picture, places

    table = table_of([round_of(llama_q4_0=3.0)] * 3)[2]
    at = places(SIDES, table, 16)
    assert sorted(at, key=at.get)[0] == "llama-q4_0"
    assert max(at[n] for n in at if "4" in n) < at["edgert-int8"] < at["edgert-fp32"]
    for name in ("a.svg", "b.svg"):
        picture(SIDES, table, tmp_path / name, threads=2, prompt=16, depth=16)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,,2", "2,2", "-1"])
def test_thread_counts_refuse(text):
    """A list of different positive numbers, or an error that quotes it."""
    from peers import thread_counts

    from edgert.errors import UsageError

    assert thread_counts("1,2") == (1, 2)
    with pytest.raises(UsageError, match=f"--threads '{text}'"):
        thread_counts(text)


def test_sides_are_named_as_they_are_known():
    """All of them, edgert's first; or those asked for; or an error that lists them."""
    from peers import side_names

    from edgert.errors import UsageError

    names = side_names(None, ["int4"])
    assert names[0] == "edgert-int4"
    assert {"genai-int8", "llama-q4_1", "openvino-int4", "torch-compile"} < set(names)
    asked = side_names("genai-int4,edgert-int4-mapped", ["int4"])
    assert asked == ["edgert-int4-mapped", "genai-int4"]
    for wrong in ("genai-int2", "edgert-int8", "genai-int4,genai-int4", ""):
        with pytest.raises(UsageError, match="--sides"):
            side_names(wrong, ["int4"])


def test_a_failing_worker_is_quoted(tmp_path):
    """The last lines of a worker's stderr reach the user, with the log's place."""
    from peers_rounds import ask

    from edgert.errors import EdgertError

    command = [sys.executable, "-c", "import sys; sys.exit('no such model')", "{}"]
    with pytest.raises(EdgertError, match=r"failed with code 1:\n  no such model") as error:
        ask(command, tmp_path / "log", {})
    assert error.value.where == str(tmp_path / "log")


def test_a_worker_that_hangs_is_ended(tmp_path):
    """It is waited for so long, and not longer."""
    from peers_rounds import ask

    from edgert.errors import EdgertError

    with pytest.raises(EdgertError, match="did not finish within 0.5 s"):
        ask([sys.executable, "-c", "import time; time.sleep(60)", "{}"], tmp_path / "log", {}, 0.5)


def test_each_line_of_a_worker_has_its_time(tmp_path):
    """The first one may come long before the last: that is what a cold start is taken from."""
    from peers_rounds import ask

    code = "import time; print('{}', flush=True); time.sleep(0.5); print('[1]')"
    (early, first), (late, last) = ask([sys.executable, "-c", code, "{}"], tmp_path / "log", {})
    assert (first, last) == ({}, [1])
    assert 0 < early < late - 0.4


class Echo:
    """A runtime over a vocabulary of 10 that always says the successor of the last id."""

    def generate(self, ids: list[int], count: int, arrived: Any) -> None:
        for i in range(count):
            arrived((ids[-1] + 1 + i) % 10)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.eye(10, dtype=np.float32)[(np.array(ids) + 1) % 10] * 2


def test_the_worker_times_and_scores():
    """Requests of the lengths asked for, the lead of each token, and what a text costs."""
    from runtimes.worker import costs, request, speed

    found = request(Echo(), [3, 4], 2)
    assert found["tokens"] == [5, 6, 7]
    assert (found["prompt"], len(found["step_s"])) == (2, 2)
    orders = {"ids": [1, 2, 3, 4], "requests": [[2, 3], [4, 0]], "repeats": 2, "margins": True}
    answered = speed(Echo(), orders)
    assert [run["prompt"] for run in answered["runs"]] == [2, 4, 2, 4]
    assert answered["runs"][0]["margins"] == [2.0] * 4
    expected, unexpected = costs(Echo(), [1, 2, 4])
    assert expected == pytest.approx(np.log(np.exp(2) + 9) - 2)
    assert unexpected == pytest.approx(np.log(np.exp(2) + 9))


def test_what_libraries_print_is_no_answer(tmp_path):
    """The worker keeps stdout for itself, whatever writes to it: Python or C."""
    code = (
        "import os; from runtimes.worker import private_stdout; out = private_stdout(); "
        "print('python'); os.write(1, b'c'); print('{}', file=out, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True)
    assert done.stdout == b"{}\n"
    assert b"c" in done.stderr
    assert b"python" in done.stderr


def test_reading_takes_all_of_the_memory():
    """A size is split over the threads; the speed is of all of it."""
    from runtimes.read_speed import read_speed

    assert read_speed(10**6, 2) > 0


def test_half_split_undoes_interleave():
    """The peer's rotary order, from ours and back."""
    from runtimes.weights import half_split

    from edgert.models.block import interleave

    weight = torch.arange(2 * 8 * 3.0).reshape(16, 3)
    assert torch.equal(interleave(half_split(weight, 8), 8), weight)
    assert not torch.equal(half_split(weight, 8), weight)


def test_the_peers_weights_compute_the_same(tmp_path):
    """A folder written for the peer's builder gives transformers our logits."""
    from runtimes.weights import load, write_model_folder
    from tiny_llama import IDS, logits_of, quiet, save, tiny
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM

    from edgert.export.write import weights_id

    source = save(tiny(), tmp_path / "source")
    imported = load(source)
    words = Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str()
    imported = replace(imported, tokenizer_json=words)
    write_model_folder(imported, tmp_path / "copy")
    with quiet():
        copy = LlamaForCausalLM.from_pretrained(tmp_path / "copy").requires_grad_(False)
    assert abs(logits_of(copy) - logits_of(tiny())).max() < 1e-5
    assert abs(imported.model(IDS).detach().numpy() - logits_of(copy)).max() < 1e-5
    assert weights_id(load(tmp_path / "copy").model) == weights_id(imported.model)


def test_a_model_the_builder_cannot_hold_is_refused(tmp_path):
    """Without a tokenizer the peer's builder has nothing to do."""
    from runtimes.weights import load, write_model_folder
    from tiny_llama import save, tiny

    from edgert.errors import UsageError

    imported = load(save(tiny(), tmp_path / "source"))
    with pytest.raises(UsageError, match="this one has no tokenizer"):
        write_model_folder(imported, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_other_weights_are_refused(tmp_path):
    """A source with other numbers than the bundle's is no peer."""
    from runtimes.workshop import Workshop
    from tiny_llama import save, tiny

    from edgert.errors import UsageError

    source = save(tiny(), tmp_path / "source")
    shop = Workshop(tmp_path, source, "0" * 64, lambda text: None)
    with pytest.raises(UsageError, match=r"holds other weights \(.*than the bundle \(0000"):
        _ = shop.imported


def test_a_gguf_file_of_floats_has_the_same_weights(tmp_path):
    """What llama.cpp's quantizer starts from: every tensor in float32, every key as it was."""
    from gguf import GGUFReader
    from runtimes.weights import gguf_bytes, load, write_float_gguf
    from tiny_llama import gguf_keys, gguf_tensors, tiny, write_gguf

    from edgert.export.write import weights_id

    model = tiny()
    keys = gguf_keys(model) | {"general.file_type": 3}
    source = write_gguf(tmp_path / "a.gguf", gguf_tensors(model), keys, kind="Q4_1")
    write_float_gguf(source, tmp_path / "b.gguf")
    assert weights_id(load(tmp_path / "b.gguf").model) == weights_id(load(source).model)
    copy = GGUFReader(tmp_path / "b.gguf")
    assert {tensor.tensor_type.name for tensor in copy.tensors} == {"F32"}
    kept = {key: field.contents() for key, field in copy.fields.items()}
    assert kept["general.file_type"] == 0
    assert kept["llama.rope.freq_base"] == keys["llama.rope.freq_base"]
    whole = sum(tensor.n_bytes for tensor in copy.tensors)
    assert gguf_bytes(tmp_path / "b.gguf") == whole - 37 * 32 * 4  # the head is not tied


def test_another_kind_of_source_is_refused(tmp_path):
    """llama.cpp's tokenizer is copied from the source, so that must be a GGUF file."""
    from runtimes.weights import write_float_gguf

    from edgert.errors import UsageError

    (tmp_path / "model.safetensors").write_bytes(b"no such file" * 10)
    with pytest.raises(UsageError, match="llama.cpp's side needs a GGUF file"):
        write_float_gguf(tmp_path / "model.safetensors", tmp_path / "b.gguf")


def test_a_step_reads_what_it_multiplies_by(tmp_path):
    """Bytes of all tensors but those of which rows are looked up; a tied head counts once."""
    import onnx
    from onnx import TensorProto, helper
    from runtimes.weights import onnx_bytes

    tensors = [
        helper.make_tensor("table", TensorProto.FLOAT, (7, 3), [0.0] * 21),
        helper.make_tensor("tied", TensorProto.FLOAT, (5, 3), [0.0] * 15),
        helper.make_tensor("matrix", TensorProto.UINT8, (3, 5), [0] * 15),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("MatMul", ["a", "matrix"], ["c"]),
        helper.make_node("Gemm", ["c", "tied"], ["d"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert onnx_bytes(tmp_path / "g.onnx") == 5 * 3 * 4 + 3 * 5


def shop_of(tmp_path: Path) -> tuple[Any, list[str]]:
    from runtimes.workshop import Workshop

    said: list[str] = []
    return Workshop(tmp_path, tmp_path / "source", "0" * 64, said.append), said


def test_a_thing_is_made_once_and_whole(tmp_path):
    """It appears under its name when it is finished, and is not made again."""
    shop, said = shop_of(tmp_path)
    made = []

    def fails(folder: Path, log: Path) -> None:
        (folder / "half").touch()
        raise ValueError("no")

    def make(folder: Path, log: Path) -> None:
        made.append(folder)
        (folder / "whole").touch()

    with pytest.raises(ValueError, match="no"):
        shop.model("m", fails, "making m")
    assert not (tmp_path / "models" / ("0" * 16) / "m").exists()
    for _ in range(2):
        assert [path.name for path in shop.model("m", make, "making m").iterdir()] == ["whole"]
    assert len(made) == 1
    assert said == ["making m"] * 2


@pytest.fixture
def commands(monkeypatch):
    """What would have been run; of a virtual environment there is the folder."""
    from runtimes import setups, workshop

    ran: list[list[str]] = []

    def run(command: list[str], *rest: Any) -> None:
        ran.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)

    for module in (setups, workshop):
        monkeypatch.setattr(module, "run", run)
    return ran


def test_an_environment_is_installed_once(tmp_path, commands):
    """Again only when it is to hold something else, or was not finished."""
    shop, _ = shop_of(tmp_path)
    for packages in (["a==1"], ["a==1"], ["a==2"]):
        python = shop.environment("a", packages)
        assert python.parts[-2:] == ("bin", "python")
    installed = [command[4:] for command in commands if "install" in command]
    assert installed == [["a==1"], ["a==2"]]
    assert sum("venv" in command for command in commands) == 2


def test_a_bundle_is_exported_again_when_its_recipe_changes(tmp_path, commands):
    """And not as long as it is there: its name has a digest of the recipe and of edgert's code."""
    from runtimes.setups import export_bundle

    source = tmp_path / "model.toml"
    names = set()
    for text in ("a", "a", "b"):
        source.write_text(text)
        bundle = export_bundle(tmp_path, source, "fp32,int4", lambda text: None)
        names.add(bundle.name)
        bundle.mkdir(parents=True, exist_ok=True)
        (bundle / "manifest.json").touch()
    assert len(names) == len(commands) == 2
    assert all(name.startswith("model-fp32-int4-") for name in names)
    assert commands[0][commands[0].index("--precision") + 1] == "fp32,int4"


def test_a_side_that_cannot_be_set_up_says_why(tmp_path, monkeypatch):
    """The others are set up all the same."""
    import peers
    from runtimes import setups

    from edgert.errors import EdgertError

    def broken(shop: Any, variant: str) -> Any:
        raise EdgertError(f"no wheel of {variant}")

    monkeypatch.setitem(setups.VARIANTS, "genai", (broken, ("int4",)))
    monkeypatch.setitem(setups.VARIANTS, "llama", (lambda shop, variant: variant, ("q4_0",)))
    shop, _ = shop_of(tmp_path)
    sides, missing = peers.set_up_all(shop, ["genai-int4", "llama-q4_0"], tmp_path)
    assert sides == {"llama-q4_0": "q4_0"}
    assert missing == {"genai-int4": "no wheel of int4"}


def test_a_failing_command_is_quoted(tmp_path):
    """Set-up hides its output in a log, and shows the end of it when it fails."""
    from runtimes.workshop import run

    from edgert.errors import EdgertError

    with pytest.raises(EdgertError, match=r"failed with code 3:\n  first\n  second"):
        run([sys.executable, "-c", "print('first\\nsecond'); exit(3)"], tmp_path / "log")


def test_another_interpreter_borrows_our_packages_behind_its_own():
    """What the builder's environment lacks comes from ours, appended to its path."""
    from runtimes.setups import borrowing

    done = subprocess.run(
        [*borrowing(Path(sys.executable), "json.tool"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "json" in done.stdout


def test_help_needs_no_peer():
    """The options are readable before anything is installed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "peers.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--sides" in done.stdout
