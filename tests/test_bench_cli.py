"""`edgert bench`, from a bundle on disk to card, object and page."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgert.bench.page import page
from edgert.bench.run import Placement, bench, reference_variant
from edgert.bundle import Bundle
from edgert.errors import EdgertError, GateFailed

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("-p", "20", "-n", "6", "-r", "2", "--threads", "1")


@pytest.fixture(scope="module")
def measured(tiny_bundle):
    """One whole bench of the tiny bundle, cold starts included."""
    from edgert.bench.plan import Plan

    return bench(tiny_bundle, Plan(n_prompt=20, n_gen=6, repeats=2), Placement(threads=1))


def test_the_other_lowering_verifies(measured):
    """What ran fused is checked with primitive operators."""
    assert measured["variant"] == "fp32-ort"
    assert measured["reference"]["path"] == "fp32-portable, whole sequence at once"
    assert measured["reference"]["compared"] == 6
    assert measured["n_threads"] == 1
    assert measured["device"] == "cpu"
    assert measured["model_size"] > 0
    assert measured["prompt_source"] == "built-in text cut to 20 tokens"


def test_a_cold_start_is_split_into_its_stages(measured):
    """A fresh process: every stage takes time, together they are the total, files are cached."""
    cold = measured["cold_start_ms"]
    stages = [cold[name] for name in ("import", "verify", "graphs", "tokenizer", "first_token")]
    assert all(stage > 0 for stage in stages)
    assert sum(stages) == pytest.approx(cold["total"])
    assert cold["load"] == pytest.approx(cold["verify"] + cold["graphs"] + cold["tokenizer"])
    assert cold["cache_state"] == "cold process, files in page cache"
    assert sorted(cold["totals"])[len(cold["totals"]) // 2] == cold["total"]
    assert cold["hashed_bytes"] >= 0


def test_the_command_prints_a_card(run, tiny_bundle):
    result = run("bench", tiny_bundle, *SHORT, "--no-cold-start")
    assert result.code == 0, result.err
    assert "tiny fp32-ort · onnxruntime" in result.out
    assert "1 thread · warm · verified ✓" in result.out
    assert "start          not measured" in result.out
    assert "timing    2 requests of 20 + 6 tokens" in result.err


def test_json_is_one_object_that_compare_reads(run, tiny_bundle, tmp_path):
    """Another lowering of the same bundle is what one compares."""
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, lowering in zip(paths, ("ort", "portable"), strict=True):
        result = run(
            *("bench", tiny_bundle, *SHORT, "--no-cold-start", "--json", "-q"),
            *("--lowering", lowering),
        )
        assert result.code == 0, result.err
        assert result.err == ""
        assert result.out.count("\n") == 1
        path.write_text(result.out)
    hashes = {json.loads(path.read_text())["output_sha256"] for path in paths}
    assert len(hashes) == 1
    compared = run("compare", *paths)
    assert compared.code == 0, compared.err
    assert "fp32-ort → fp32-portable" in compared.out


def test_the_reference_may_be_a_hash_or_an_earlier_bench(run, tiny_bundle, measured, tmp_path):
    """The right one passes; a wrong one exits 6 and no figure is on stdout."""
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(measured))
    command = ("bench", tiny_bundle, *SHORT, "--no-cold-start")
    right = measured["output_sha256"]
    assert run(*command, "--reference", right).code == 0
    assert run(*command, "--reference", earlier).code == 0
    report = tmp_path / "r.html"
    wrong = run(*command, "--reference", "0" * 64, "--json", "--report", report)
    assert wrong.code == GateFailed.exit_code == 6
    assert wrong.out == ""
    assert f"the answer's SHA-256 is {right}, the reference's is {'0' * 64}" in wrong.err
    assert not report.exists()


def test_another_bundle_does_not_have_the_references_answer(run, measured, tmp_path):
    """A model with other weights answers otherwise, and fails the hash of the first."""
    from tiny_decoder import decoder, imported

    from edgert.export.write import ExportOptions, export_bundle

    other = tmp_path / "other"
    export_bundle(imported(decoder()), other, ExportOptions(lowerings=("ort",)))
    result = run(
        *("bench", other, *SHORT, "--no-cold-start", "--reference", measured["output_sha256"])
    )
    assert result.code == 6
    assert result.out == ""


def test_a_reference_of_other_lengths_is_no_reference(run, tiny_bundle, measured, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(measured))
    result = run("bench", tiny_bundle, "-p", "21", "-n", "6", "--reference", earlier)
    assert result.code == 4
    assert "- n_prompt: 20 there, 21 here" in result.err


def test_what_is_no_reference_is_a_usage_error(run, tiny_bundle):
    result = run("bench", tiny_bundle, "--reference", "abc")
    assert result.code == 2
    assert "--reference wants 64 hex digits or an earlier bench's JSON file, not 'abc'" in (
        result.err
    )


def test_a_bundle_without_a_tokenizer_is_measured_with_ids(run, model_a_bundle):
    result = run("bench", model_a_bundle, "-p", "8", "-n", "4", "-r", "1", "-d", "5", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["prompt_source"] == "ids drawn with seed 0"
    assert found["n_depth"] == 5
    assert found["cold_start_ms"]["total"] > 0


def test_speculation_is_off_unless_asked_for(run, tiny_bundle, tmp_path):
    """Then it is declared, on the card as well, and not set beside a bench without it."""
    files = {}
    for how in ("off", "auto", "4"):
        options = [] if how == "off" else ["--speculate", how]
        command = ("bench", tiny_bundle, "-p", "40", "-n", "40", "-r", "1", "--no-cold-start")
        result = run(*command, *options, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        files[how] = tmp_path / f"{how}.json"
        files[how].write_text(result.out)
        if how == "off":
            assert found["guesses"] is None
            assert "speculate" not in found["sampling"]
        else:
            assert found["sampling"]["speculate"] == (4 if how == "4" else "auto")
            assert 0 < found["guesses"]["accepted"] == 40 * found["guesses"]["share"]
    assert "% of the tokens · " in run(*command, *options).out
    assert run("compare", files["off"], files["auto"]).code == 4
    assert run("compare", files["auto"], files["auto"]).code == 0
    assert run("bench", tiny_bundle, "--speculate", "17").code == 2


def test_low_memory_is_declared(run, tiny_bundle):
    result = run("bench", tiny_bundle, *SHORT, "--no-cold-start", "--low-memory")
    assert "1 thread, low memory · warm" in result.out


def test_a_variant_alone_of_its_precision_verifies_itself(tiny_bundle):
    """Then by reading the sequence at once, which is another path of the same graph."""
    from dataclasses import replace

    bundle = Bundle.open(tiny_bundle)
    assert reference_variant(bundle, "fp32-ort", "cpu") == "fp32-portable"
    assert reference_variant(bundle, "fp32-portable", "auto") == "fp32-ort"
    alone = {"fp32-ort": bundle.manifest.variants["fp32-ort"]}
    single = replace(bundle, manifest=replace(bundle.manifest, variants=alone))
    assert reference_variant(single, "fp32-ort", "cpu") == "fp32-ort"


def test_a_fresh_process_that_fails_is_reported_with_what_it_said(tiny_bundle):
    from edgert.bench.cold import cold_start

    with pytest.raises(EdgertError, match="fresh process of the cold start failed") as error:
        cold_start(
            *(tiny_bundle, (1, 2)),
            **{"device": "cpu", "variant": "none", "threads": 1, "prepack": True, "starts": 1},
        )
    assert "KeyError: 'none'" in error.value.where


def test_a_fresh_process_that_hangs_is_ended(tiny_bundle, monkeypatch):
    from edgert.bench import cold

    monkeypatch.setattr(cold, "_TIMEOUT_S", 0.001)
    with pytest.raises(EdgertError, match=r"did not end within 0\.001 s"):
        cold.cold_start(
            *(tiny_bundle, (1, 2)),
            **{"device": "cpu", "variant": "fp32-ort", "threads": 1, "prepack": True},
        )


class Tags(HTMLParser):
    """Checks that elements close in order, and keeps what they were."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_needs_nothing_else(run, tiny_bundle, tmp_path):
    """Well-formed, four plots, no address to load from, and the object inside."""
    path = tmp_path / "r.html"
    result = run("bench", tiny_bundle, *SHORT, "--json", "--report", path)
    assert result.code == 0, result.err
    text = path.read_text(encoding="utf-8")
    tags = read_page(text)
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") == 4
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", text)
    drawn = re.findall(r' (?:points|x|y|x1|x2|y1|y2|width|height)="([^"]*)"', text)
    assert len(drawn) > 50
    assert all(re.fullmatch(r"[0-9., ]+", numbers) for numbers in drawn)
    whole = next(part for part in tags.text if part.lstrip().startswith("{"))
    assert json.loads(whole) == json.loads(result.out)


def test_names_on_the_page_are_text(measured):
    """A bundle's name cannot become part of the page's code."""
    evil = "<script>alert(1)</script>\"'&"
    text = page(measured | {"name": evil, "backend": evil, "governor": evil, "device_name": evil})
    assert "<script" not in text
    tags = read_page(text)
    assert "script" not in {tag for tag, _ in tags.seen}
    assert any(evil in part for part in tags.text)


@pytest.mark.parametrize(
    "changes",
    [
        {"itl_ms": None, "avg_ts": None, "itl_samples_ms": [[], []]},
        {"cold_start_ms": None},
        {"memory": None},
        {"rails": {"<A>": {"energy_j": 1.0, "mean_mw": 2.0}}, "rail": None},
        {"itl_samples_ms": [[0.5], [0.5]]},
        {"itl_samples_ms": [[float(i % 7 + 1) for i in range(5000)]]},
        {"where_ms": dict.fromkeys(("tokenize", "sample", "detokenize", "other"), 0.0)
         | {"graph": 1.0, "wall": 1.0, "share": 1.0}},
    ],
    ids=["one token", "no start", "no memory", "rails", "equal", "long", "zeros"],
)  # fmt: skip
def test_pages_of_unusual_results_are_whole(measured, changes):
    """What was not measured leaves its place empty and breaks nothing."""
    text = page(measured | changes)
    read_page(text)
    assert len(text) < 400_000


def test_help_names_every_option(run):
    result = run("bench", "--help")
    for name in ("-p, --prompt-tokens", "-n, --gen-tokens", "-d, --depth", "-r, --repeats"):
        assert name in result.out
    assert "--low-memory" in result.out


@pytest.mark.full
def test_the_named_parts_explain_a_real_request(run):
    """Tokenize, graph, sample and detokenize are at least 95 % of the wall time of a real model."""
    given = os.environ.get("EDGERT_TEST_SMOLLM2")
    bundle = Path(given) if given else ROOT / "bundles" / "smollm2-135m-instruct"
    if not (bundle / "manifest.json").is_file():
        pytest.skip("the real model's bundle is absent: make demo")
    result = run("bench", bundle, "-p", "64", "-n", "32", "-r", "2", "--no-cold-start", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert 0.95 <= found["where_ms"]["share"] <= 1
    assert found["reference"]["compared"] >= 28
    assert found["memory"]["peak"] > found["memory"]["weights"]
