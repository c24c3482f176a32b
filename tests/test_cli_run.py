"""`edgert run`: what is on which stream, where a prompt comes from, when an answer ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from command import Result, finished, python

import edgert
from edgert.bundle import read_manifest


@pytest.fixture(scope="module")
def answer(tiny_bundle) -> str:
    """What the tiny model says first to 'the star'."""
    with edgert.load(tiny_bundle) as model:
        return model.generate("the star", max_tokens=24, temperature=0.0).text


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(run, tiny_bundle, answer) -> None:
    """The prompt, the answer and a line end; how fast, and what ran where, on stderr."""
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "-t", "0")
    assert (got.code, got.out) == (0, f"the star{answer}\n")
    speed, placement = got.err.splitlines()
    number = r"[\d.]+"
    guessed = r"( · \d+ % guessed)?"
    assert re.fullmatch(
        rf"── 24 tokens · first after {number} ms · then {number} tok/s{guessed} · length", speed
    )
    assert re.fullmatch(rf"── fp32-ort · onnxruntime {number} · CPU.*", placement)


def test_what_was_guessed_is_said_where_there_was_any(run, tiny_bundle) -> None:
    """In the closing line, and counted in the object; --speculate off says the same text."""
    command = ("run", tiny_bundle, "-p", "the star the star the", "-n", "64")
    on, off = (run(*command, "--json", "--speculate", how) for how in ("8", "off"))
    assert on.code == off.code == 0
    guessed, plain = json.loads(on.out), json.loads(off.out)
    assert guessed["tokens"] == plain["tokens"]
    assert plain["guesses"] == {"checked": 0, "accepted": 0}
    counts = guessed["guesses"]
    assert 0 < counts["accepted"] <= counts["checked"]
    share = f"{100 * counts['accepted'] / 64:.0f} % guessed"
    assert f"tok/s · {share} · length" in run(*command, "--speculate", "8").err
    assert "guessed" not in run(*command, "--speculate", "off").err
    wrong = run(*command, "--speculate", "many")
    assert (wrong.code, wrong.out) == (2, "")
    assert "use 'auto', 'off', or an integer from 1 to 16" in wrong.err


def test_quiet_says_nothing_but_the_answer(run, tiny_bundle, answer) -> None:
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "--quiet", "--no-echo")
    assert got == Result(0, f"{answer}\n", "")


def test_json_is_one_object_and_nothing_else(run, tiny_bundle, answer) -> None:
    """On stdout, with what was said, how it ended, what ran where and how fast."""
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "--json")
    assert got.code == 0
    value = json.loads(got.out)
    manifest = read_manifest(tiny_bundle)
    assert value["text"] == answer
    assert len(value["tokens"]) == value["n_gen"] == 24
    assert value["finish_reason"] == "length"
    assert (value["logprobs"], value["alternatives"]) == (None, [])
    assert value["model_id"] == manifest.model_id
    assert value["variant"] == "fp32-ort"
    assert value["variant_id"] == manifest.variants["fp32-ort"].variant_id
    assert value["n_prompt"] > 0
    assert 0 < value["prefill_ms"] <= value["ttft_ms"]
    assert value["decode_tokens_per_s"] > 0
    assert value["graph_ms"] > 0


def test_ids_go_in_and_come_out(run, model_a_bundle) -> None:
    """A bundle without a tokenizer runs on token ids alone."""
    got = run("run", model_a_bundle, "--ids", "1, 5 8", "-n", "4")
    ids = [int(word) for word in got.out.split()]
    with edgert.load(model_a_bundle) as model:
        assert ids == list(model.generate([1, 5, 8], max_tokens=4, temperature=0.0).tokens)
    refused = run("run", model_a_bundle, "-p", "text")
    assert refused.code == 2
    assert "--ids" in refused.err


def test_both_lowerings_say_the_same(run, tiny_bundle, answer) -> None:
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "--lowering", "portable")
    assert got.out == f"the star{answer}\n"
    assert "── fp32-portable · " in got.err


def test_low_memory_says_the_same(run, tiny_bundle, answer) -> None:
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "--low-memory")
    assert got.out == f"the star{answer}\n"


def test_chat_goes_through_the_template(run, tiny_bundle) -> None:
    """The model is given exactly the ids of the template's text, with the system message first."""
    got = run(
        *("run", tiny_bundle, "-p", "hi <|end|>", "--chat", "--system", "be brief"),
        *("-n", "8", "--json"),
    )
    with edgert.load(tiny_bundle) as model:
        assert model.tokenizer
        turns = [("<|system|>", "be brief"), ("<|user|>", "hi <|end|>")]
        ids = []
        for head, text in turns:  # the user's own <|end|> stays text
            ids += model.tokenizer.encode(head) + model.tokenizer.encode(text, special=False)
            ids += model.tokenizer.encode("<|end|>")
        ids += model.tokenizer.encode("<|answer|>")
        want = model.generate(ids, max_tokens=8, temperature=0.0)
    value = json.loads(got.out)
    assert value["n_prompt"] == len(ids)
    assert value["tokens"] == list(want.tokens)


def test_chat_prints_the_answer_alone(run, tiny_bundle) -> None:
    got = run("run", tiny_bundle, "-p", "hi", "--chat", "-n", "8")
    assert got.code == 0
    assert len(got.out) <= 9
    assert not got.out.startswith("hi")


def test_a_bundle_without_template_refuses_to_chat(run, model_a_bundle) -> None:
    got = run("run", model_a_bundle, "-p", "hi", "--chat")
    assert (got.code, got.out) == (2, "")
    assert "no chat template" in got.err


def test_a_prompt_from_a_file(run, tiny_bundle, answer, tmp_path) -> None:
    (tmp_path / "prompt.txt").write_text("the star")
    got = run("run", tiny_bundle, "-f", tmp_path / "prompt.txt", "-n", "24")
    assert got.out == f"the star{answer}\n"


def test_a_prompt_from_stdin(tiny_bundle, answer) -> None:
    process = python(
        "-m", "edgert", "run", tiny_bundle, "-f", "-", "-n", "24", stdin=subprocess.PIPE
    )
    out, _ = process.communicate("the star", timeout=120)
    assert out == f"the star{answer}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "the prompt file is not UTF-8"),
        (b"a" * ((16 << 20) + 1), "the prompt file is larger than 16.8 MB"),
        (b"", "there is nothing to continue: the prompt is empty"),
    ],
    ids=["not UTF-8", "too large", "empty"],
)
def test_a_file_that_is_no_prompt_is_refused(run, tiny_bundle, tmp_path, content, message) -> None:
    (tmp_path / "prompt.txt").write_bytes(content)
    got = run("run", tiny_bundle, "-f", tmp_path / "prompt.txt")
    assert (got.code, got.out) == (2, "")
    assert message in got.err


def test_stray_bytes_in_an_argument_are_refused(tiny_bundle) -> None:
    """What the shell passes on may be no text at all."""
    got = subprocess.run(
        [sys.executable, "-m", "edgert", "run", str(tiny_bundle), "-p", b"caf\xe9"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (got.returncode, got.stdout) == (2, "")
    assert "error: the prompt is not UTF-8" in got.stderr


def test_a_terminal_that_lacks_a_character(tiny_bundle) -> None:
    """It is shown as an escape, and JSON stays JSON."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ("-m", "edgert", "run", tiny_bundle, "-p", "caf\u00e9", "-n", "1")
    got = finished(python(*arguments, env=environment))
    assert got.code == 0
    assert got.out.startswith("caf\\xe9")
    got = finished(python(*arguments, "--json", "--logit-bias", "150=900", env=environment))
    assert json.loads(got.out)["tokens"] == [150]


def test_stop_strings_and_tokens_end_the_answer(run, tiny_bundle, answer) -> None:
    """The stop string is not part of the answer; the reason is 'stop'."""
    common = ("run", tiny_bundle, "-p", "the star", "-n", "24", "--json")
    stop = answer[10:13]
    value = json.loads(run(*common, "--stop", "never said", "--stop", stop).out)
    assert value["finish_reason"] == "stop"
    assert value["text"] == answer[: answer.index(stop)]
    token = json.loads(run(*common).out)["tokens"][0]
    value = json.loads(run(*common, "--stop-token", token).out)
    assert (value["finish_reason"], value["tokens"]) == ("stop", [])


def test_the_same_seed_says_the_same(run, tiny_bundle) -> None:
    """And the summary names the seed, so that an answer can be had again."""
    common = ("run", tiny_bundle, "-p", "the star", "-n", "20", "--temp", "2.5")
    first = run(*common)
    (seed,) = re.findall(r"seed (\d+)", first.err)
    assert run(*common, "--seed", seed).out == first.out
    assert run(*common, "--seed", int(seed) + 1).out != first.out


def test_logprobs_are_in_the_json(run, tiny_bundle) -> None:
    value = json.loads(
        run("run", tiny_bundle, "-p", "a", "-n", "3", "--logprobs", "2", "--json").out
    )
    assert len(value["logprobs"]) == 3
    for token, logprob, best in zip(
        value["tokens"], value["logprobs"], value["alternatives"], strict=True
    ):
        assert len(best) == 2
        assert best[0] == [token, logprob]
        assert best[1][1] <= logprob <= 0


def test_a_setting_out_of_range_is_2(run, tiny_bundle) -> None:
    got = run("run", tiny_bundle, "-p", "a", "--top-p", "3")
    assert (got.code, got.out) == (2, "")
    assert "top_p" in got.err
