"""The command as a user meets it: help, options and variables, terminals, and all verbs but run."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command import Result

from edgert import __version__
from edgert.bundle import read_manifest
from edgert.cli import cli
from edgert.cli.show import size


@pytest.mark.parametrize("verb", [[], *[[verb] for verb in cli.commands]], ids=str)
def test_help_is_an_answer(run, verb) -> None:
    """It goes to stdout with exit code 0, in lines that fit a terminal."""
    got = run(*verb, "--help")
    assert (got.code, got.err) == (0, "")
    assert "Usage: edgert" in got.out
    assert max(map(len, got.out.splitlines())) <= 100


def test_the_installed_script_is_the_same_command() -> None:
    script = shutil.which("edgert", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("edgert is not installed in this environment")
    got = subprocess.run([script, "version"], capture_output=True, text=True, timeout=60)
    assert got.stdout.startswith(f"edgert      {__version__}\n")


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
        "state     4 append slots, context 16384 tokens",
    ]
    text = "\n".join(lines[4:])
    for name, variant in manifest.variants.items():
        short, state = variant.variant_id[:12], "state 512 B a token, 524.3 kB at 1,024"
        assert re.search(rf"variant   {name} +{short} +[\d.]+ .B  {state}  opset \w", text)
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
    row = 5 * 2 * 2 * 8 * 4
    assert value["state_bytes_per_token"] == row
    assert value["variant_state_bytes_per_token"] == dict.fromkeys(stored["variants"], row)
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
