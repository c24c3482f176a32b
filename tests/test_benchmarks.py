"""The benchmark's own logic: verification, medians, goals, and the peer's copy of the weights."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    from peer_measure import memory

    assert memory(STATUS) == {"peak": 204.8, "resident": 102.4, "anonymous": 61.44, "file": 40.96}


def test_busy_ticks_leave_out_idle_and_waiting():
    """idle and iowait are not work; guest time is already part of user time."""
    from peer_measure import busy_ticks

    assert busy_ticks("cpu  1 2 4 1000 2000 8 16 32 64 128\ncpu0 9 9 9 9 9 9 9 9 9 9\n") == 63


def test_window_sees_that_nothing_can_be_negative():
    """Two clocks disagree by a tick at most; others never owe time."""
    from peer_measure import Window

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
    from peer_measure import await_quiet

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
    from peer_report import first_difference

    assert first_difference(a, b) == expected


CHECKS: dict[str, Any] = {
    # ours, peer's, margins, wanted -> compared, reason
    "equal": ([1, 2, 3, 4], [1, 2, 3, 4], [1, 1, 1, 1], 4, (4, None)),
    "clear": ([1, 2, 3, 4], [1, 2, 9, 4], [1, 1, 0.5, 1], 4, (2, "token 2 differs (3, peer 9)")),
    "near tie": ([1, 2, 3, 4], [1, 2, 9, 9], [1, 1, 1e-5, 1], 4, (2, None)),
    "early tie": ([1, 2, 3, 4], [9, 2, 3, 4], [1e-5, 1, 1, 1], 4, (0, "too early")),
    "peer stopped": ([1, 2, 3, 4], [1, 2], [1, 1, 1, 1], 4, (0, "the peer gave 2 tokens, not 4")),
    "we stopped": ([1, 2], [1, 2, 3, 4], [1, 1], 4, (0, "edgert gave 2 tokens, not 4")),
}


@pytest.mark.parametrize("name", CHECKS)
def test_compare(name):
    """Only a difference at a near-tie, late enough, is accepted."""
    from peer_report import compare

    ours, peers, margins, want, (compared, reason) = CHECKS[name]
    check = compare(ours, peers, margins, want)
    assert check.compared == compared
    assert (reason is None and check.reason is None) or reason in check.reason


def answer(speed: float = 1.0, others: float = 0.0, tokens=(1, 2, 3, 4, 5), **run) -> dict:
    """A worker's answer: 4 steps of 10 ms at speed 1, prefill 0.1 s."""
    steps = [0.01 / speed] * 4
    timed = {"prefill_s": 0.1 / speed, "step_s": steps, "tokens": list(tokens)} | run
    memory = {"peak": 800.0, "resident": 700.0, "anonymous": 600.0, "file": 100.0}
    return {"load_s": 1.0, "others": others, "memory": memory, "runs": [timed]}


def round_of(genai: float = 1.0, edgert: float = 2.0, others: float = 0.0) -> dict:
    ours = {"graph_s": 0.04 / edgert * 0.98, "state_mb": 50.0}
    extra = {"margins": [1.0] * 5, "weights_mb": 540.0}
    return {
        "genai": answer(genai, others),
        "edgert": answer(edgert, **ours) | extra,
        "edgert low_memory": answer(edgert, **ours) | extra,
    }


def test_verify_names_the_side_that_agrees_least():
    """One wrong run of any side makes the round invalid."""
    from peer_report import verify

    answers = round_of()
    assert verify(answers, 4).reason is None
    assert verify(answers, 4).compared == 5
    answers["genai"]["runs"].append(answer(tokens=(1, 2, 3, 9, 5))["runs"][0])
    assert "token 3 differs (4, peer 9)" in verify(answers, 4).reason


def test_quiet_rounds_are_preferred():
    """Busy rounds are left out if three quiet ones remain; otherwise all count, and it is said."""
    from peer_report import quiet

    alone, busy = round_of(), round_of(others=1.5)
    assert quiet([alone, busy, alone, alone]) == ([alone, alone, alone], True)
    assert quiet([alone, busy, alone]) == ([alone, busy, alone], False)


def test_ratios_are_paired_within_a_round():
    """A slow moment of the machine hits both sides of a round, so the ratio is of one round."""
    from peer_report import summarise

    rounds = [round_of(1.0, 2.0), round_of(0.1, 0.2), round_of(0.5, 1.0)]
    mine = summarise(rounds, "edgert", 256)
    assert mine.decode_ratio == pytest.approx(2.0)
    assert mine.prefill_ratio == pytest.approx(2.0)
    assert mine.step_ratio == pytest.approx(2.0)
    assert mine.decode == pytest.approx(100.0)  # the median round: 10 ms a step
    assert mine.step_ms == pytest.approx(10.0)
    assert mine.prefill == pytest.approx(2560.0)
    assert mine.host_share == pytest.approx(0.02)
    assert summarise(rounds, "genai", 256).host_share is None


def test_rare_slow_steps_count_in_tokens_per_second_only():
    """The median step is blind to one slow step; tokens per second are not."""
    from peer_report import summarise

    answers = round_of(1.0, 1.0)
    answers["edgert"]["runs"][0]["step_s"] = [0.01, 0.01, 0.01, 0.05]
    mine = summarise([answers], "edgert", 256)
    assert mine.step_ratio == pytest.approx(1.0)
    assert mine.decode_ratio == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("edgert", "peak", "graph", "missed"),
    [
        pytest.param(2.0, 800.0, 0.98, [], id="all met"),
        pytest.param(0.9, 800.0, 0.98, ["prefill", "decode"], id="slow"),
        pytest.param(2.0, 841.0, 0.98, ["edgert: peak"], id="memory"),
        pytest.param(2.0, 840.0, 0.98, [], id="memory just fits"),
        pytest.param(2.0, 800.0, 0.94, ["edgert: host"], id="host"),
    ],
)
def test_goals(edgert, peak, graph, missed):
    """Each goal is missed by its own cause alone; the limit is weights + state + 250 MB."""
    from peer_report import SIDES, goals, summarise

    answers = round_of(1.0, edgert)
    answers["edgert"]["memory"]["peak"] = peak
    answers["edgert"]["runs"][0]["graph_s"] = 0.04 / edgert * graph
    table = {2: {side: summarise([answers], side, 256) for side in SIDES}}
    found = [goal.text for goal in goals(table, 540.0, 50.0, {2}) if not goal.met]
    assert len(found) == len(missed)
    assert all(text.startswith(start) for text, start in zip(found, missed, strict=True))


def test_a_busy_machine_leaves_times_unsure_but_not_memory():
    """Disturbed sides are not comparable; what a process allocates does not depend on others."""
    from peer_report import SIDES, goals, summarise

    table = {2: {side: summarise([round_of()], side, 256) for side in SIDES}}
    unsure = {goal.text.split()[1] for goal in goals(table, 540.0, 50.0, ()) if not goal.reliable}
    sure = [goal.text for goal in goals(table, 540.0, 50.0, ()) if goal.reliable]
    assert unsure == {">=", "host", "low_memory:"}
    assert [("peak memory" in text) for text in sure] == [True, True]
    assert all(goal.reliable for goal in goals(table, 540.0, 50.0, {2}))


@pytest.mark.parametrize(
    ("others", "kept", "asked"),
    [
        pytest.param([0.1], 0.1, 1, id="quiet at once"),
        pytest.param([0.9, 0.1], 0.1, 2, id="the second is quiet"),
        pytest.param([0.9, 0.5, 0.7], 0.5, 3, id="never: the least disturbed"),
    ],
)
def test_disturbed_answers_are_asked_for_again(others, kept, asked):
    """A side is measured again while others disturb it, three times at most."""
    from peer import undisturbed

    answers = iter(others)
    calls = []

    def attempt() -> dict:
        calls.append(next(answers))
        return {"others": calls[-1]}

    assert undisturbed(attempt, 0)["others"] == kept
    assert len(calls) == asked


def test_tables_have_a_row_per_side():
    """Every form of the table has the same cells, in Markdown and on a terminal."""
    from peer_report import COLUMNS, SIDES, as_json, markdown, rich_table, rows, summarise
    from rich.console import Console

    table = {2: {side: summarise([round_of()], side, 256) for side in SIDES}}
    lines = markdown(table).splitlines()
    assert len(lines) == 2 + len(SIDES)
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    assert [row[1] for row in rows(table)] == list(SIDES)
    assert as_json(table)["2"]["edgert"]["decode_ratio"] == pytest.approx(2.0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(table, "title"))
    assert "edgert low_memory" in console.export_text()


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,,2", "2,2", "-1"])
def test_thread_counts_refuse(text):
    """A list of different positive numbers, or an error that quotes it."""
    from peer import thread_counts

    from edgert.errors import UsageError

    assert thread_counts("1,2") == (1, 2)
    with pytest.raises(UsageError, match=f"--threads '{text}'"):
        thread_counts(text)


def test_a_failing_worker_is_quoted(tmp_path):
    """The last lines of a worker's stderr reach the user, with the log's place."""
    from peer import ask

    from edgert.errors import EdgertError

    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.exit('no such model')")
    with pytest.raises(
        EdgertError, match=r"worker.py failed with code 1:\n  no such model"
    ) as error:
        ask([sys.executable, str(script)], {}, tmp_path / "log", {})
    assert error.value.where == str(tmp_path / "log")


def test_a_worker_answers_with_its_last_line(tmp_path):
    """Libraries may print on stdout before the answer."""
    from peer import ask

    script = tmp_path / "worker.py"
    script.write_text("import sys; print('hello'); print(sys.argv[1])")
    assert ask([sys.executable, str(script)], {"a": 1}, tmp_path / "log", {}) == {"a": 1}


def test_half_split_undoes_interleave():
    """The peer's rotary order, from ours and back."""
    from peer_setup import half_split

    from edgert.models.block import interleave

    weight = torch.arange(2 * 8 * 3.0).reshape(16, 3)
    assert torch.equal(interleave(half_split(weight, 8), 8), weight)
    assert not torch.equal(half_split(weight, 8), weight)


def test_the_peers_weights_compute_the_same(tmp_path):
    """A folder written for the peer's builder gives transformers our logits."""
    from peer_setup import load, write_model_folder
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
    from peer_setup import load, write_model_folder
    from tiny_llama import save, tiny

    from edgert.errors import UsageError

    imported = load(save(tiny(), tmp_path / "source"))
    with pytest.raises(UsageError, match="this one has no tokenizer"):
        write_model_folder(imported, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_other_weights_are_refused(tmp_path):
    """A source with other numbers than the bundle's is no peer."""
    from peer_setup import _build
    from tiny_llama import save, tiny

    from edgert.errors import UsageError

    source = save(tiny(), tmp_path / "source")
    with pytest.raises(UsageError, match=r"holds other weights \(.*than the bundle \(0000"):
        _build(tmp_path, tmp_path / "model", Path("python"), source, "0" * 64, lambda text: None)


def test_a_failing_command_is_quoted(tmp_path):
    """Set-up hides its output in a log, and shows the end of it when it fails."""
    from peer_setup import _run

    from edgert.errors import EdgertError

    with pytest.raises(EdgertError, match=r"failed with code 3:\n  first\n  second"):
        _run([sys.executable, "-c", "print('first\\nsecond'); exit(3)"], tmp_path / "log")


def test_help_needs_no_peer():
    """The options are readable before anything is installed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "peer.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--bundle" in done.stdout
