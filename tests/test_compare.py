"""Two benches side by side, and runs that must not be put there."""

from __future__ import annotations

import json

import pytest
from fake_model import fake_model

from edgert.bench.compare import SAME, check_comparable, compare, rows, table
from edgert.bench.plan import Plan, make_work
from edgert.bench.run import put_together, time_requests, verify
from edgert.errors import Incompatible


@pytest.fixture(scope="module")
def a():
    """One bench of a model without files, with round figures."""
    model = fake_model()
    work = make_work(Plan(n_prompt=8, n_gen=4, repeats=2), model.manifest, model.tokenizer)
    timed = time_requests(model, work)
    result = put_together(timed, work, None, verify(model, work, timed))
    return json.loads(json.dumps(result)) | {"avg_ts": 40.0, "version": "0.1.0"}


@pytest.fixture
def b(a):
    return a | {
        "avg_ts": 60.0,
        "version": "0.2.0",
        "variant": "fp32-portable",
        "lowering": "portable",
        "cold_start_ms": {"total": 500.0, "load": 300.0},
    }


def test_ratios_are_b_over_a(a, b):
    """1.5 times the speed; what one side lacks has no ratio."""
    found = {row.name: row for row in rows(a, b)}
    assert found["decode"].ratio == 1.5
    assert found["decode"].better == "higher"
    assert found["between tokens p50"].ratio == 1.0
    assert (found["cold start"].a, found["cold start"].b) == (None, 500.0)
    assert found["cold start"].ratio is None


def test_the_table_shows_figures_and_what_differs(a, b):
    """A version and a variant may differ: that is what one compares."""
    text = table(a, b)
    lines = text.splitlines()
    assert lines[0].startswith("fake fp32 · 8 + 4 tokens · CPU, threads unknown")
    decode = next(line for line in lines if line.startswith("decode"))
    assert decode.split()[1:4] == ["40.00", "60.00", "1.50x"]
    assert decode.endswith("tok/s higher is better")
    assert "version             0.1.0 → 0.2.0" in lines
    assert "variant             fp32-ort → fp32-portable" in lines
    assert not any(line.startswith("python ") for line in lines)
    assert not any(line.startswith("energy") for line in lines)  # neither side has it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_id", "f" * 64),
        ("precision", "int8"),
        ("n_prompt", 9),
        ("n_gen", 5),
        ("n_depth", 1),
        ("n_batch", 2),
        ("n_threads", 7),
        ("sampling", {"temperature": 1.0}),
        ("prompt_sha256", "0" * 64),
        ("device", "trt"),
        ("cache_state", "model loaded, nothing warmed up"),
    ],
)
def test_unlike_runs_are_refused_by_name(a, key, value):
    """Every key that makes two runs unlike is enough, and is named with both values."""
    assert key in SAME
    with pytest.raises(Incompatible, match=f"- {key}: ") as error:
        check_comparable(a, a | {key: value}, "a.json and b.json")
    assert error.value.exit_code == 4
    assert error.value.where == "a.json and b.json"


def test_every_difference_is_listed_at_once(a):
    with pytest.raises(Incompatible) as error:
        check_comparable(a, a | {"n_gen": 5, "precision": "int8"}, "")
    assert "- precision: fp32 and int8" in error.value.what
    assert "- n_gen: 4 and 5" in error.value.what


def test_what_one_compares_is_comparable(a, b):
    check_comparable(a, b, "")


def test_the_object_has_rows_and_both_sides(a, b):
    found = compare(a, b)
    assert found["a"]["version"] == "0.1.0"
    assert found["b"]["variant"] == "fp32-portable"
    assert found["same"]["n_gen"] == 4
    row = next(row for row in found["rows"] if row["name"] == "decode")
    assert row == {
        **{"name": "decode", "unit": "tok/s", "a": 40.0, "b": 60.0},
        **{"better": "higher", "ratio": 1.5},
    }


def test_texts_of_a_file_cannot_move_the_cursor(a):
    """The files may come from anywhere."""
    text = table(a, a | {"version": "\x1b[2J\x07" + "x" * 500, "name": "\x1b[31m"})
    assert "\x1b" not in text
    assert "\x07" not in text
    assert max(map(len, text.splitlines())) < 200


def test_figures_that_are_none_are_passed_over(a):
    """Text, objects or absurd numbers where a figure should be."""
    odd = a | {"avg_ts": "fast", "ttft_ms": {"p50": []}, "state_bytes": 10**400}
    found = {row.name: row for row in rows(a, odd)}
    assert [found[name].b for name in ("decode", "first token p50", "state")] == [None] * 3
    assert table(a, odd)


@pytest.fixture
def files(a, b, tmp_path):
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, result in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(result))
    return paths


def test_the_command_prints_a_table_or_an_object(run, files):
    result = run("compare", *files)
    assert result.code == 0, result.err
    assert "1.50x" in result.out
    as_json = run("compare", *files, "--json")
    assert json.loads(as_json.out)["rows"]


def test_the_command_refuses_with_the_exit_codes_of_the_errors(run, files, a):
    """4 for unlike runs, 3 for what is not a bench."""
    files[1].write_text(json.dumps(a | {"n_gen": 5}))
    result = run("compare", *files)
    assert result.code == 4
    assert "the two benches did not measure the same thing" in result.err
    assert result.out == ""
    files[1].write_text("[]")
    result = run("compare", *files)
    assert result.code == 3
    assert "the file is not a bench of edgert" in result.err
