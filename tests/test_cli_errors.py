"""The command when it fails: exit codes, words, signals, tracebacks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import finished, python

import edgert
from edgert.errors import EdgertError


def test_success_is_0(run, tiny_bundle) -> None:
    assert run("inspect", tiny_bundle).code == 0


def test_a_run_time_failure_is_1(run, model_a_checkpoint, tmp_path) -> None:
    """The output's folder is a file: the system's own words, which file, and what to do."""
    (tmp_path / "file").write_text("")
    got = run("export", model_a_checkpoint, "-o", tmp_path / "file" / "model")
    assert got.code == 1
    words = "cannot write the bundle: (File exists|Not a directory)"
    form = rf"error: {words}\n  where  .*file\n  do     check free space and permissions.*\n$"
    assert re.match(form, last(got.err))


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
        (["--device", "cuda"], "CUDAExecutionProvider"),
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


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
from edgert.cli import main
sys.exit(main())
"""


def test_ctrl_c_is_130_and_keeps_the_answer_so_far(tiny_bundle) -> None:
    """The text so far stands on stdout, ends with a line end, and the summary says how it ended."""
    process = python("-c", INTERRUPTIBLE, "run", tiny_bundle, "-p", "the star", "-n", "16000")
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


def test_every_error_class_has_an_exit_code_of_the_contract() -> None:
    """0 to 6; 0 and 130 belong to no error."""

    def descendants(kind: type[EdgertError]) -> set[type[EdgertError]]:
        return {kind}.union(*map(descendants, kind.__subclasses__()))

    assert {kind.exit_code for kind in descendants(EdgertError)} == {1, 2, 3, 4, 5, 6}


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
