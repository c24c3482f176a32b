"""What a bench asks, how it times it, and that a wrong answer has no figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_model import CONTEXT, EOS, OFFSET, PROMPT, VOCAB, Graph, fake_model, greedy, hashed

from edgert.bench import facts
from edgert.bench.card import card, megabytes, milliseconds
from edgert.bench.measure import PARTS, request, requests
from edgert.bench.plan import TEXT, Plan, Work, digest, make_work
from edgert.bench.result import MARK, dumps, read_result
from edgert.bench.run import Expected, put_together, time_requests, verify
from edgert.bench.statistics import rates, summary
from edgert.bench.verify import MARGIN, check_reference, check_repeats, margin_of
from edgert.errors import (
    BadFile,
    CapacityExceeded,
    EdgertError,
    GateFailed,
    NewerFormat,
    UsageError,
)

PLAN = Plan(n_prompt=24, n_gen=12, n_depth=0, repeats=3, warmup=1)


def work_for(model, plan: Plan = PLAN) -> Work:
    return make_work(plan, model.manifest, model.tokenizer)


def bench_fake(model, plan: Plan = PLAN, expected: Expected | None = None) -> dict:
    """A bench of a model without files: its own graph is the reference, and nothing starts cold."""
    work = work_for(model, plan)
    timed = time_requests(model, work)
    return put_together(timed, work, None, verify(model, work, timed, None, expected))


class Doctored(Graph):
    """Answers one-token steps (what is timed) with another token than whole sequences."""

    def __call__(self, ids, **rest):
        out = super().__call__(ids, **rest)
        if ids.shape[1] == 1:
            out["logits"] = np.roll(out["logits"], 1, axis=-1)
            out["token"] = out["logits"].argmax(-1)
        return out


# statistics


def test_summary_of_known_values():
    """Percentiles are interpolated; the deviation is that of the values themselves."""
    found = summary([1.0, 2.0, 3.0, 4.0])
    assert found == pytest.approx(
        {
            **{"avg": 2.5, "min": 1.0, "max": 4.0, "std": 1.25**0.5, "count": 4},
            **{"p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97},
        }
    )


def test_nothing_has_no_summary_and_no_rates():
    """No values is not a row of zeros."""
    assert summary([]) is None
    assert set(rates(0, [5]).values()) == {None}
    assert set(rates(3, []).values()) == {None}


def test_rates_are_tokens_a_second_by_repeat():
    """The mean of speeds, not the speed of the mean."""
    found = rates(10, [1_000_000_000, 500_000_000])
    assert found["samples_ts"] == [10.0, 20.0]
    assert found["avg_ts"] == 15.0
    assert found["stddev_ts"] == 5.0
    assert found["avg_ns"] == 750_000_000.0


# plan


@pytest.mark.parametrize("tokens", [1, 2, 17, 128, 1000])
def test_text_prompts_have_exactly_the_tokens_asked_for(tokens):
    """With a tokenizer the prompt is the built-in text, and tokenizing it is part of the work."""
    model = fake_model()
    work = work_for(model, Plan(n_prompt=tokens))
    assert isinstance(work.prompt, str)
    assert len(work.ids) == tokens
    assert model.encode(work.prompt) == list(work.ids)
    assert (TEXT * 3).startswith(work.prompt)
    assert work.source == f"built-in text cut to {tokens} tokens"


def test_without_a_tokenizer_ids_are_drawn_and_never_end_tokens():
    """The same ids in every run; an end token in a prompt would be another kind of text."""
    model = fake_model(tokenizer=None)
    work = work_for(model, Plan(n_prompt=600, n_depth=300))
    again = work_for(model, Plan(n_prompt=600, n_depth=300))
    assert work == again
    assert (len(work.depth), len(work.ids)) == (300, 600)
    assert work.prompt == work.ids
    assert EOS not in work.ids + work.depth
    assert len(set(work.ids)) > 100
    assert work.ids[:3] == (256, 105, 5)  # frozen: figures of two versions must be comparable
    assert work.source == "ids drawn with seed 0"


def test_a_tokenizer_that_no_cut_fits_falls_back_to_ids():
    """One that turns every text into pairs has no odd number of tokens; that is said."""

    class Pairs:
        def encode(self, text):
            return [OFFSET] * (2 * len(text))

    work = make_work(Plan(n_prompt=7), fake_model().manifest, Pairs())
    assert work.source == "ids drawn with seed 0"
    assert len(work.ids) == 7


def test_a_plan_beyond_the_context_is_refused_with_its_numbers():
    with pytest.raises(CapacityExceeded, match=f"depth 1 \\+ prompt 4990 .* {CONTEXT}"):
        work_for(fake_model(), Plan(n_prompt=4990, n_gen=10, n_depth=1))


@pytest.mark.parametrize(
    ("name", "value"), [("n_prompt", 0), ("n_gen", 0), ("repeats", 0), ("n_depth", -1)]
)
def test_impossible_plans_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} = {value} is not possible"):
        Plan(**{name: value})


def test_a_negative_warmup_is_refused():
    with pytest.raises(UsageError, match="warmup = -1 is not possible"):
        Plan(warmup=-1)


# measure


def test_a_request_gives_what_users_get():
    """The timed tokens are those of Model.generate, and all arrive after one another."""
    model = fake_model()
    work = work_for(model)
    one = request(model, work)
    assert list(one.tokens) == greedy(list(work.ids), 12)
    assert one.tokens == model.generate(work.prompt, work.params).tokens
    assert len(one.arrivals) == 12
    assert sorted(one.arrivals) == list(one.arrivals)
    assert len(one.between_ns) == 11
    assert one.first_ns + sum(one.between_ns) == one.wall_ns


def test_parts_are_positive_and_never_exceed_the_wall():
    """What the parts leave is `other`; the prefill lies within the time to the first token."""
    model = fake_model()
    for one in requests(model, work_for(model)):
        assert set(one.parts) == set(PARTS)
        assert all(value > 0 for value in one.parts.values())
        assert one.other_ns > 0
        assert 0 < one.prefill_ns < one.first_ns
        assert one.state_bytes > 0


def test_the_depth_is_in_the_state_and_not_in_the_prompt():
    """Depth changes the answer and the steps' length, and the prompt stays what it was."""
    graph = Graph()
    model = fake_model(graph)
    work = work_for(model, Plan(n_prompt=24, n_gen=4, n_depth=40))
    one = request(model, work)
    assert list(one.tokens) == greedy([*work.depth, *work.ids], 4)
    assert [call[0] for call in graph.calls] == [40, 24, 1, 1, 1]


def test_warm_up_is_not_among_the_timed():
    """Every request is new: nothing of an earlier one is reused."""
    graph, done = Graph(), []
    model = fake_model(graph)
    timed = requests(model, work_for(model), lambda: done.append(len(graph.calls)))
    assert len(timed) == 3
    assert done == [12, 24, 36, 48]


def test_one_token_has_no_time_between_tokens():
    """Then the figures between tokens are missing, not zero."""
    result = bench_fake(fake_model(), Plan(n_prompt=8, n_gen=1, repeats=2))
    assert result["itl_ms"] is None
    assert result["avg_ts"] is None
    assert result["ttft_ms"]["count"] == 2
    assert "only one token" in card(result)


# verify


def test_a_good_model_is_verified_at_every_token():
    model = fake_model()
    work = work_for(model)
    timed = time_requests(model, work)
    verified = verify(model, work, timed)
    assert (verified.compared, verified.unclear, verified.margin) == (12, 0, MARGIN)
    assert verified.sha256 == timed.sha256 == digest(greedy(list(work.ids), 12))
    assert verified.path == "fp32-ort, whole sequence at once"


def test_a_doctored_model_fails_and_has_no_figures():
    """A graph that answers wrongly only in the steps that are timed is found out."""
    with pytest.raises(GateFailed, match="of the timed answer is .*, the reference says") as error:
        bench_fake(fake_model(Doctored()))
    assert error.value.exit_code == 6
    assert "what was timed is not this model" in error.value.what


def test_an_answer_that_changes_from_run_to_run_fails():
    """Even if each answer alone might pass: a faster and a better one would be mixed."""
    graph = Graph()

    def moody(history):
        late = len(graph.calls) > 30 and len(history) > 30
        return np.roll(hashed(history), int(late))

    graph.answer = moody
    with pytest.raises(GateFailed, match="did not all give the same tokens") as error:
        bench_fake(fake_model(graph))
    assert "differs from the first at token" in error.value.where


def test_the_first_difference_of_repeats_is_named():
    with pytest.raises(GateFailed, match="same tokens") as error:
        check_repeats([[1, 2, 3], [1, 2, 3], [1, 9, 3]])
    assert error.value.where == "request 3 of 3 differs from the first at token 1"


def test_ties_are_not_compared_and_an_answer_of_ties_is_not_verified():
    """Where the reference itself cannot tell, agreeing means nothing."""

    def level(history):
        out = np.zeros(VOCAB, np.float32)
        out[[5, 6]] = 1.0, 1.0 + MARGIN / 2
        return out

    model = fake_model(Graph(level))
    work = work_for(model)
    with pytest.raises(GateFailed, match="none of the 12 tokens can be verified"):
        check_reference(model, work, [6] * 12)


def test_unclear_places_are_counted_beside_the_others():
    """Every second place has a lead; the others may hold either of two tokens."""

    def every_second(history):
        out = np.zeros(VOCAB, np.float32)
        out[[5, 6]] = 1.0, 1.0 + (0.5 if len(history) % 2 else 1e-5)
        return out

    model = fake_model(Graph(every_second))
    verified = check_reference(model, work_for(model), [5, 6] * 6)  # behind 24 tokens: even first
    assert (verified.compared, verified.unclear) == (6, 6)


def test_logits_that_are_not_numbers_verify_nothing():
    def broken(history):
        return np.full(VOCAB, np.nan, np.float32)

    model = fake_model(Graph(broken))
    with pytest.raises(GateFailed, match="can be verified"):
        check_reference(model, work_for(model), [1] * 12)


def test_long_answers_are_checked_in_chunks():
    """More tokens than are scored at once: each is compared with its own place."""
    plan = Plan(n_prompt=70, n_gen=150, repeats=1, warmup=0)
    result = bench_fake(fake_model(), plan)
    reference = result["reference"]
    assert reference["compared"] + reference["unclear"] == 150
    assert reference["compared"] > 140
    assert result["cache_state"] == "model loaded, nothing warmed up"


def test_the_expected_hash_decides():
    """A hash of the right answer passes, any other is a failure."""
    model = fake_model()
    right = digest(greedy(list(work_for(model).ids), 12))
    assert bench_fake(model, expected=Expected(right, "--reference"))["output_sha256"] == right
    with pytest.raises(GateFailed, match=f"is {right}, the reference's is {'0' * 64}") as error:
        bench_fake(model, expected=Expected("0" * 64, "old.json"))
    assert error.value.where == "old.json"


def test_a_cold_start_that_answers_otherwise_fails():
    model = fake_model()
    work = work_for(model)
    timed = time_requests(model, work)
    with pytest.raises(GateFailed, match="a fresh process answered with token"):
        verify(model, work, timed, {"token": timed.answer[0] + 1})
    assert verify(model, work, timed, {"token": timed.answer[0]}).compared == 12


def test_the_margin_grows_with_the_bundles_own_parity(tmp_path, tiny_bundle, copied):
    """Two graphs of one bundle may differ by more than one from the truth."""
    from edgert.model import load

    with load(copied(tiny_bundle)) as model:
        path = model.bundle.root / "parity.json"
        report = json.loads(path.read_text())
        assert margin_of(model) == MARGIN
        report["checks"][0]["logits_max_abs"] = 0.02
        path.write_text(json.dumps(report))
        assert margin_of(model) == pytest.approx(0.08)
        path.write_text("{")
        assert margin_of(model) == MARGIN
    assert margin_of(fake_model()) == MARGIN


# result and card


def test_the_object_has_the_documented_fields():
    """Names that people know from llama-bench and AIPerf, and ours; what is absent is null."""
    result = bench_fake(fake_model())
    assert result[MARK] == 1
    assert result["n_prompt"] == 24
    assert result["n_gen"] == 12
    assert len(result["samples_ns"]) == 3
    assert result["avg_ts"] == pytest.approx(np.mean([11e9 / ns for ns in result["samples_ns"]]))
    for name in ("ttft_ms", "itl_ms", "request_latency_ms"):
        assert set(result[name]) == {
            *("avg", "min", "max", "std", "count", "p50", "p90", "p95", "p99")
        }
    assert result["itl_ms"]["count"] == 33
    for name in ("energy_j", "tok_per_j", "rail", "rails", "steps_taken", "halt_rate"):
        assert result[name] is None, name
    assert result["verified"] is True
    where = result["where_ms"]
    assert sum(where[part] for part in (*PARTS, "other")) == pytest.approx(where["wall"])
    assert 0 < where["share"] < 1
    memory = result["memory"]
    assert memory["peak"] == memory["weights"] + memory["state"] + memory["rest"]
    json.loads(dumps(result))


def test_every_field_is_in_the_docs():
    """docs/bench.md names every field of the object."""
    from pathlib import Path

    page = (Path(__file__).resolve().parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")
    missing = [name for name in bench_fake(fake_model()) if f"`{name}`" not in page]
    assert not missing


def test_the_card_is_aligned_and_says_what_is_missing():
    """Percentiles stand under their names, and no rail is not zero watts."""
    lines = card(bench_fake(fake_model())).splitlines()
    head = next(line for line in lines if "p50" in line)
    row = next(line for line in lines if line.startswith("first token"))
    for name in ("p50", "p90", "p99", "max"):
        end = head.index(name) + len(name)
        assert row[end - 1].isdigit(), name
        assert row[end] == " "
    text = "\n".join(lines)
    assert "verified ✓" in text
    assert "power          not measured (no rails on this machine)" in text
    assert "start          not measured" in text
    assert "12 of 12 tokens by fp32-ort, whole sequence at once" in text


def test_a_card_with_power_names_rails_and_mode():
    result = bench_fake(fake_model()) | {
        "rails": {"VDD_IN": {"energy_j": 12.0, "mean_mw": 4947.0}},
        **{"rail": "VDD_IN", "energy_j": 12.0, "tok_per_j": 3.0, "nvpmodel": "15W"},
        "throttled": True,
    }
    assert "VDD_IN 4.95 W     12.0 J, 3.0 tok/J (VDD_IN) · mode 15W · over-current" in card(result)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12859.2, "12.9 s"), (128.4, "128 ms"), (16.04, "16.0 ms"), (0.84, "0.840 ms")]
    + [(0.0084, "8.4 µs")],
)
def test_times_have_the_unit_that_suits(value, text):
    assert milliseconds(value) == text


def test_megabytes_are_decimal():
    assert megabytes(540_355_455) == "540"
    assert megabytes(2_345_678) == "2.3"


# reading back


@pytest.fixture
def saved(tmp_path):
    """A function that writes a bench, changed, and returns the path."""
    result = bench_fake(fake_model())

    def write(**changes):
        path = tmp_path / "bench.json"
        path.write_text(json.dumps(result | changes))
        return path

    return write


def test_a_bench_is_read_back_as_it_was(saved):
    result = read_result(saved())
    assert result[MARK] == 1
    assert result["itl_ms"]["count"] == 33


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({MARK: None}, "it has no edgert_bench: 1"),
        ({MARK: True}, "it has no edgert_bench: 1"),
        ({"n_gen": -1}, "n_gen is not a count"),
        ({"n_gen": True}, "n_gen is not a count"),
        ({"model_id": 7}, "model_id is not text"),
        ({"ttft_ms": []}, "ttft_ms is not an object"),
        ({"sampling": {"a": []}}, "sampling is not a flat object"),
        ({"governor": {}}, "governor is not one value"),
        ({"verified": False}, "verified is not true"),
    ],
)
def test_what_is_not_a_bench_is_refused_by_field(saved, changes, message):
    with pytest.raises(BadFile, match=message) as error:
        read_result(saved(**changes))
    assert error.value.exit_code == 3


def test_a_later_format_is_not_guessed(saved):
    with pytest.raises(NewerFormat, match="the bench has format 2"):
        read_result(saved(**{MARK: 2}))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[]", "it has no edgert_bench")]
    + [(b'{"a": NaN}', "NaN is not a number"), (b"[" * 100_000, "not JSON")],
    ids=["cut", "binary", "list", "nan", "deep"],
)
def test_other_files_are_refused(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=message):
        read_result(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(BadFile, match="more than 16,777,216 bytes"):
        read_result(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadFile, match="cannot be read: No such file"):
        read_result(tmp_path / "none.json")


def test_a_figure_that_is_not_a_number_is_not_printed():
    with pytest.raises(EdgertError, match="a figure is not a number"):
        dumps({"avg_ts": float("nan")})


# facts

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: avx\n"


@pytest.fixture
def machine(tmp_path):
    """A function that writes files of /proc and /sys below a folder."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_facts_of_a_machine_that_has_them(machine):
    """Governor, clocks and zones are read from Linux's own files."""
    cpu = "sys__devices__system__cpu__cpu"
    root = machine(
        proc__cpuinfo=CPUINFO,
        **{
            f"{cpu}0__cpufreq__scaling_governor": "schedutil\n",
            f"{cpu}1__cpufreq__scaling_governor": "schedutil\n",
            f"{cpu}0__cpufreq__scaling_cur_freq": "1500000\n",
            f"{cpu}0__cpufreq__cpuinfo_max_freq": "1728000\n",
            "sys__class__thermal__thermal_zone0__type": "cpu-thermal\n",
            "sys__class__thermal__thermal_zone0__temp": "51187\n",
            "sys__class__thermal__thermal_zone1__type": "cv0-thermal\n",
            "sys__class__thermal__thermal_zone1__temp": "-256000\n",
        },
        proc__self__status="VmHWM:\t  1000 kB\nRssAnon:\t  400 kB\n",
    )
    assert facts.device_name(root) == "AMD EPYC"
    assert facts.governor(root) == "schedutil"
    assert facts.clocks(root) == {"cpu_mhz": 1500.0, "cpu_max_mhz": 1728.0}
    assert facts.temperatures(root) == {"cpu-thermal": 51.187}
    assert facts.memory(root) == {"peak": 1_024_000, "anonymous": 409_600}


def test_a_board_is_named_before_its_processor(machine):
    """A device tree's text ends with a zero byte."""
    root = machine(proc__cpuinfo=CPUINFO, **{"proc__device-tree__model": "NVIDIA Jetson\0"})
    assert facts.device_name(root) == "NVIDIA Jetson"


def test_what_is_not_there_is_none(tmp_path):
    assert facts.governor(tmp_path) is None
    assert facts.clocks(tmp_path) is None
    assert facts.temperatures(tmp_path) is None
    assert facts.memory(tmp_path) is None
    assert facts.Load.now(tmp_path) is None
    assert facts.device_name(tmp_path)


def test_load_counts_what_others_took():
    """Two of four busy CPU seconds in two seconds were ours: one CPU was someone else's."""
    before = facts.Load(at=10.0, busy_s=100.0, own_s=5.0)
    assert before.others(facts.Load(at=12.0, busy_s=104.0, own_s=7.0)) == 1.0
    assert before.others(facts.Load(at=12.0, busy_s=101.0, own_s=7.0)) == 0.0
    assert before.others(before) == 0.0


def test_load_leaves_out_idle_time(machine):
    root = machine(proc__stat="cpu  100 200 400 1000 2000 800 1600 3200 64 128\ncpu0 1\n")
    found = facts.Load.now(root)
    import os

    assert found is not None
    assert found.busy_s == pytest.approx(6300 / os.sysconf("SC_CLK_TCK"))


def test_prompt_of_the_fake_model_is_what_other_tests_use():
    """The fake model reads bytes; so one token of text is one character."""
    assert fake_model().encode("abc") == PROMPT
