"""The command as a user meets it: streams, exit codes, words, variables, signals."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import edgert
from edgert import __version__
from edgert.bundle import read_manifest
from edgert.cli import cli, main
from edgert.cli.show import size
from edgert.errors import EdgertError


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    """Run one command line in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


def python(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def finished(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


@pytest.fixture(scope="module")
def answer(tiny_bundle) -> str:
    """What the tiny model says first to 'the star'."""
    with edgert.load(tiny_bundle) as model:
        return model.generate("the star", max_tokens=24, temperature=0.0).text


# ------------------------------------------------- exit codes


def test_success_is_0(run, tiny_bundle) -> None:
    assert run("inspect", tiny_bundle).code == 0


def test_a_run_time_failure_is_1(run, model_a_checkpoint, tmp_path) -> None:
    """The output's folder is a file: the system's own words, and which file."""
    (tmp_path / "file").write_text("")
    got = run("export", model_a_checkpoint, "-o", tmp_path / "file" / "model")
    assert got.code == 1
    assert re.match(r"error: (File exists|Not a directory)\n  where  .*file\n$", last(got.err))


def last(text: str) -> str:
    """From the last 'error:' on."""
    return text[text.rindex("error: ") :]


USAGE = {
    "no such option": (["run", "x", "--temprature", "1"], r"--temprature.*--temperature"),
    "no such verb": (["rum"], r"No such command 'rum'"),
    "a missing argument": (["run"], r"Missing argument 'BUNDLE'"),
    "a missing option": (["export", "x"], r"Missing option .*--output"),
    "a word for a number": (["run", "x", "-n", "many"], r"'many' is not a valid integer"),
    "no prompt": (["run", "x"], r"give exactly one of --prompt, --prompt-file and --ids"),
    "two prompts": (["run", "x", "-p", "a", "--ids", "1"], r"give exactly one of"),
    "system without chat": (["run", "x", "-p", "a", "--system", "b"], r"--system goes with --chat"),
    "chat with ids": (["run", "x", "--ids", "1", "--chat"], r"--chat needs text, not --ids"),
    "ids that are none": (["run", "x", "--ids", "1,b"], r"--ids wants integers .* not '1,b'"),
    "a bias that is none": (["run", "x", "-p", "a", "--logit-bias", "5"], r"wants ID=NUMBER"),
    "no such file": (["run", "x", "-f", "/nowhere"], r"No such file or directory"),
    "a source that is not there": (
        ["export", "/nowhere", "-o", "y"],
        r"no file or folder /nowhere",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE.keys())
def test_wrong_use_is_2(run, arguments, message) -> None:
    """The message says what was wrong, and where to read on."""
    got = run(*arguments)
    assert (got.code, got.out) == (2, "")
    assert re.search(message, last(got.err))


def test_no_verb_shows_the_help_and_is_2(run) -> None:
    got = run()
    assert (got.code, got.out) == (2, "")
    for verb in ("export", "run", "inspect", "verify", "version"):
        assert f"\n  {verb} " in got.err


@pytest.mark.parametrize("verb", [[], *[[verb] for verb in cli.commands]], ids=str)
def test_help_is_an_answer(run, verb) -> None:
    """It goes to stdout with exit code 0, in lines that fit a terminal."""
    got = run(*verb, "--help")
    assert (got.code, got.err) == (0, "")
    assert "Usage: edgert" in got.out
    assert max(map(len, got.out.splitlines())) <= 100


def no_directory(folder: Path) -> Path:
    return folder / "nowhere"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("not a bundle")
    return folder / "file"


def an_empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def a_broken_manifest(folder: Path) -> Path:
    (folder / "manifest.json").write_text("{")
    return folder


@pytest.mark.parametrize("verb", ["run", "inspect", "verify"])
@pytest.mark.parametrize(
    "path", [no_directory, a_file, an_empty_folder, a_broken_manifest], ids=lambda f: f.__name__
)
def test_what_is_no_bundle_is_3(run, verb, path, tmp_path) -> None:
    """What, where and what to do; never a traceback."""
    got = run(verb, path(tmp_path), *(["--ids", "1"] if verb == "run" else []))
    assert (got.code, got.out) == (3, "")
    assert got.err.startswith("error: ")
    assert str(tmp_path) in got.err
    assert "  do     " in got.err


def test_a_broken_source_is_3(run, tmp_path) -> None:
    """A file that is no model; nothing appears at the output."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF" + bytes(20))
    got = run("export", source, "-o", tmp_path / "out")
    assert (got.code, got.out) == (3, "")
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_3(run, tiny_bundle, copied) -> None:
    """`verify` names the file; `run` refuses it as well."""
    bundle = copied(tiny_bundle)
    data = bundle / "variants/fp32/weights.data"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    for got in (run("verify", bundle), run("run", bundle, "--ids", "1")):
        assert (got.code, got.out) == (3, "")
        assert "variants/fp32/weights.data" in got.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "cuda"),
        (["--precision", "int4"], "int4"),
        (["--lowering", "modern"], "modern"),
    ],
)
def test_what_this_device_or_bundle_lacks_is_4(run, tiny_bundle, options, message) -> None:
    """The message names it and what there is instead."""
    got = run("run", tiny_bundle, "--ids", "1", *options)
    assert (got.code, got.out) == (4, "")
    assert message in got.err
    assert "  do     " in got.err


HIDDEN = """
import sys
sys.modules[sys.argv[1]] = None
from edgert.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("package", "extra", "verb"),
    [
        ("torch", "export", "export"),
        ("onnxscript", "export", "export"),
        ("onnxruntime", "cpu", "run"),
    ],
)
def test_a_missing_package_is_4(package, extra, verb, tiny_bundle, model_a_checkpoint) -> None:
    """The message names the package and the extra that brings it."""
    arguments = {
        "export": ["export", model_a_checkpoint, "-o", "/nowhere"],
        "run": ["run", tiny_bundle, "--ids", "1"],
    }[verb]
    got = finished(python("-c", HIDDEN, package, *arguments))
    assert (got.code, got.out) == (4, "")
    assert f"error: {package} is not installed" in got.err
    assert f"pip install 'edgert[{extra}]'" in got.err
    assert "Traceback" not in got.err


def test_what_does_not_fit_is_5(run, model_a_bundle) -> None:
    """More tokens than the context of 64."""
    got = run("run", model_a_bundle, "--ids", ",".join(["1"] * 65))
    assert (got.code, got.out) == (5, "")
    assert "65 tokens are more than this model's context of 64" in got.err


def test_memory_that_is_refused_is_5(run, tiny_bundle, monkeypatch) -> None:
    """Whoever raises it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(edgert.model, "load", refuse)
    got = run("run", tiny_bundle, "--ids", "1")
    assert (got.code, got.out) == (5, "")
    assert "error: out of memory: no more" in got.err


# 6, the parity gate, is in test_gate.py.


def test_ctrl_c_is_130_and_keeps_the_answer_so_far(tiny_bundle) -> None:
    """The text so far stands on stdout, ends with a line end, and the summary says how it ended."""
    process = python("-m", "edgert", "run", tiny_bundle, "-p", "the star", "-n", "16000")
    assert process.stdout
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    got = finished(process)
    assert got.code == 130
    assert begun.startswith("the star")
    assert got.out.endswith("\n")
    assert len(begun + got.out) < 16000
    assert re.search(r"── \d+ tokens · .* · interrupted\n", got.err)
    assert got.err.endswith("interrupted\n")
    assert "Traceback" not in got.err


def test_a_reader_that_leaves_is_no_error(tiny_bundle) -> None:
    """`edgert run ... | head -c 10`: silence on stderr."""
    command = f"{sys.executable} -m edgert run {tiny_bundle} -p 'the star' -n 5000 | head -c 10"
    got = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (got.stdout, got.stderr) == ("the star" + got.stdout[8:], "")
    assert len(got.stdout) == 10


# ------------------------------------------------- tracebacks


def test_a_traceback_is_shown_only_when_asked_for(tmp_path) -> None:
    """--debug, or its variable, shows where an error arose."""
    plain = finished(python("-m", "edgert", "inspect", tmp_path))
    assert "Traceback" not in plain.err
    flag = finished(python("-m", "edgert", "inspect", tmp_path, "--debug"))
    variable = finished(
        python("-m", "edgert", "inspect", tmp_path, env={**os.environ, "EDGERT_DEBUG": "1"})
    )
    for got in (flag, variable):
        assert "Traceback" in got.err
        assert "BadBundle: not a bundle" in got.err


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_a_variable_that_says_no_is_no(run, tmp_path, monkeypatch, value) -> None:
    monkeypatch.setenv("EDGERT_DEBUG", value)
    assert run("inspect", tmp_path).code == 3


def test_a_fault_of_edgert_itself_is_told_as_one(run, tiny_bundle, monkeypatch) -> None:
    """One line about what it was, and how to report it; --debug raises it."""

    def fault(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("one by nothing")

    monkeypatch.setattr(edgert.model, "load", fault)
    got = run("run", tiny_bundle, "--ids", "1")
    assert (got.code, got.out) == (1, "")
    assert got.err.startswith("error: ZeroDivisionError: one by nothing\n  where  inside edgert")
    with pytest.raises(ZeroDivisionError):
        run("run", tiny_bundle, "--ids", "1", "--debug")


# ------------------------------------------------- options and variables

OPTIONS = [
    (verb, parameter)
    for verb, command in cli.commands.items()
    for parameter in command.params
    if isinstance(parameter, click.Option)
]


@pytest.mark.parametrize(("verb", "option"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_every_option_has_its_variable_and_help(verb, option) -> None:
    """EDGERT_ and its first long name, in capitals."""
    long = next(name for name in option.opts if name.startswith("--"))
    assert option.envvar == "EDGERT_" + long[2:].upper().replace("-", "_")
    assert option.help


def test_variables_are_unique(monkeypatch) -> None:
    """Within a verb no two options share one; none is taken by something that is no option."""
    for verb in cli.commands:
        names = [option.envvar for v, option in OPTIONS if v == verb]
        assert len(names) == len(set(names))
        assert not {"EDGERT_CACHE_DIR", "EDGERT_EXTRA_CASES"} & set(names)


def test_variables_work_and_options_go_before_them(run, tiny_bundle, monkeypatch) -> None:
    """Numbers, flags and repeated options alike."""
    monkeypatch.setenv("EDGERT_MAX_TOKENS", "3")
    monkeypatch.setenv("EDGERT_JSON", "1")
    monkeypatch.setenv("EDGERT_LOGIT_BIAS", "70=500 71=-500")
    got = json.loads(run("run", tiny_bundle, "-p", "a").out)
    assert got["tokens"] == [70, 70, 70]
    assert len(json.loads(run("run", tiny_bundle, "-p", "a", "-n", "5").out)["tokens"]) == 5


# ------------------------------------------------- run


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(run, tiny_bundle, answer) -> None:
    """The prompt, the answer and a line end; how fast, and what ran where, on stderr."""
    got = run("run", tiny_bundle, "-p", "the star", "-n", "24", "-t", "0")
    assert (got.code, got.out) == (0, f"the star{answer}\n")
    speed, placement = got.err.splitlines()
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"── 24 tokens · first after {number} ms · then {number} tok/s · length", speed
    )
    assert re.fullmatch(rf"── fp32-ort · onnxruntime {number} · CPU.*", placement)


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


# ------------------------------------------------- inspect, verify, version


def test_inspect_shows_the_program(run, tiny_bundle) -> None:
    """Who it is, what it reads and keeps, what it needs, and what its gate proved."""
    got = run("inspect", tiny_bundle)
    manifest = read_manifest(tiny_bundle)
    lines = got.out.splitlines()
    assert lines[0] == f"tiny  {manifest.summary}, fp32, identity {manifest.model_id[:12]}"
    assert lines[1:4] == [
        "program   decode",
        "  decode  ids, select, lens, k.0‥1, v.0‥1  →  logits, token, k.0‥1, v.0‥1",
        "state     4 append slots, 512 B a token and sequence, context 16384 tokens",
    ]
    text = "\n".join(lines[4:])
    for name, variant in manifest.variants.items():
        assert re.search(rf"variant   {name} +{variant.variant_id[:12]} +[\d.]+ .B  opset \w", text)
    assert "requires  onnxruntime >=1.23" in text
    assert "source    tests/tiny_decoder.py, exporter edgert " in text
    assert "text      tokenizer file, with chat template, end tokens [0]" in text
    assert re.search(r"parity    pass: 8 checks against eager torch \S+, max \|Δlogit\| \S+$", text)
    assert all(len(line[:10].rstrip()) < 10 for line in lines[1:])


def test_inspect_json_is_the_manifest_and_more(run, model_a_bundle) -> None:
    got = run("inspect", model_a_bundle, "--json")
    value = json.loads(got.out)
    stored = json.loads((model_a_bundle / "manifest.json").read_text())
    assert {key: value[key] for key in stored} == stored
    assert value["state_bytes_per_token"] == 5 * 2 * 2 * 8 * 4
    assert value["bytes"] == sum(entry["bytes"] for entry in stored["files"].values())
    assert value["parity"]["verdict"] == "pass"
    assert got.err == ""


BAD_REPORTS = [
    *("{", "[]", "{}", '{"verdict": "pass", "truth": "x", "checks": []}', "[" * 90_000),
    '{"verdict": "pass\\u001b[2J", "truth": "x", "checks": [{"logits_max_abs": 0.5}]}',
    '{"verdict": "pass", "truth": "x", "checks": [{"logits_max_abs": "small"}]}',
    '{"verdict": "pass", "truth": "x", "checks": [{"logits_max_abs": 0.5}]}' + " " * (1 << 20),
]


@pytest.mark.parametrize("report", BAD_REPORTS, ids=range(len(BAD_REPORTS)))
def test_a_forged_report_is_3(run, model_a_bundle, copied, report) -> None:
    """The verdict is data from outside like all the rest: sealed, and still not believed."""
    from dataclasses import replace

    from edgert.bundle import list_files, seal, write_manifest

    bundle = copied(model_a_bundle)
    (bundle / "parity.json").write_text(report)
    write_manifest(bundle, seal(replace(read_manifest(bundle), files=list_files(bundle))))
    got = run("inspect", bundle)
    assert (got.code, got.out) == (3, "")
    assert "parity.json" in got.err


def test_a_bundle_without_a_report_says_so(run, model_a_bundle, copied) -> None:
    from dataclasses import replace

    from edgert.bundle import list_files, seal, write_manifest

    bundle = copied(model_a_bundle)
    (bundle / "parity.json").unlink()
    manifest = replace(read_manifest(bundle), files=list_files(bundle), reports=())
    write_manifest(bundle, seal(manifest))
    assert "parity    no verdict in this bundle" in run("inspect", bundle).out


def test_verify_hashes_everything(run, model_a_bundle) -> None:
    manifest = read_manifest(model_a_bundle)
    total = sum(entry.bytes for entry in manifest.files.values())
    got = run("verify", model_a_bundle)
    assert got == Result(
        0,
        f"ok  {manifest.name} · {len(manifest.files)} files · {size(total)} · "
        f"{manifest.model_id[:12]}\n",
        "",
    )
    assert json.loads(run("verify", model_a_bundle, "--json").out) == {
        "verified": True,
        "model_id": manifest.model_id,
        "files": len(manifest.files),
        "bytes": total,
    }


def test_version_names_what_matters_in_a_report(run) -> None:
    got = run("version", "--json")
    value = json.loads(got.out)
    assert value["edgert"] == __version__
    assert {"python", "onnxruntime", "numpy", "tokenizers"} <= value.keys()
    rows = dict(line.split(maxsplit=1) for line in run("version").out.splitlines())
    assert rows == value


# ------------------------------------------------- export


def test_export_shows_what_it_proved(run, model_a_checkpoint, tmp_path) -> None:
    """Stages, notes and the parity table on stderr, the bundle on stdout."""
    out = tmp_path / "model-a"
    got = run("export", model_a_checkpoint, "-o", out, "--lowering", "ort", "--name", "mine")
    assert got.code == 0
    manifest = read_manifest(out)
    assert manifest.name == "mine"
    total = sum(entry.bytes for entry in manifest.files.values())
    assert got.out == (
        f"bundle    {out}  {size(total)}  identity {manifest.model_id[:12]}  verdict pass\n"
    )
    labels = [line[:10].rstrip() for line in got.err.splitlines()]
    assert [label for label in labels if label != "note"] == [
        *("reading", "tracing", "weights", "parity", *["parity"] * 4)
    ]
    assert got.err.count("max |Δlogit|") == 4
    assert re.search(r"top-1 \d+/\d+\n$", got.err)


def test_export_json_is_one_object(run, model_a_checkpoint, tmp_path) -> None:
    """Progress stays on stderr; --quiet silences it."""
    out = tmp_path / "model-a"
    arguments = ("export", model_a_checkpoint, "-o", out, "--lowering", "ort", "--json", "--quiet")
    got = run(*arguments)
    value = json.loads(got.out)
    manifest = read_manifest(out)
    assert value["bundle"] == str(out)
    assert value["model_id"] == manifest.model_id
    assert value["verdict"] == "pass"
    assert value["variants"] == {"fp32-ort": manifest.variants["fp32-ort"].variant_id}
    assert len(value["checks"]) == 4
    assert got.err == ""


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a command shows on a stderr that is a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgert", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 65536):
            shown += data
    except OSError:  # the other end has closed
        pass
    os.close(leader)
    assert process.wait(60) == 0
    return shown.decode()


@pytest.mark.parametrize("no_color", [True, False])
def test_progress_bars_on_a_terminal(no_color, tiny_bundle) -> None:
    """`verify` draws a bar and erases it; NO_COLOR takes the colour away, not the bar."""
    shown = on_a_terminal(["verify", str(tiny_bundle)], **({"NO_COLOR": "1"} if no_color else {}))
    assert "verifying" in shown
    assert "━" in shown
    coloured = re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown)
    assert bool(coloured) is not no_color


def test_quiet_draws_nothing_on_a_terminal(tiny_bundle) -> None:
    assert on_a_terminal(["verify", str(tiny_bundle), "--quiet"]) == ""


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (2_500_000, "2.5 MB"), (5e9, "5.00 GB")],
)
def test_sizes_are_in_decimal_units(nbytes, text) -> None:
    assert size(nbytes) == text


def test_every_error_class_has_an_exit_code_of_the_contract() -> None:
    """0 to 6; 0 and 130 belong to no error."""

    def descendants(kind: type[EdgertError]) -> set[type[EdgertError]]:
        return {kind}.union(*map(descendants, kind.__subclasses__()))

    assert {kind.exit_code for kind in descendants(EdgertError)} == {1, 2, 3, 4, 5, 6}


def test_the_installed_script_is_the_same_command() -> None:
    script = shutil.which("edgert", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("edgert is not installed in this environment")
    got = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60)
    assert got.stdout.startswith(f"edgert      {__version__}\n")
