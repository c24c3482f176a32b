"""docs/cli.md is what the parser says, and shells complete what it knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from wheels import ROOT

from edgert.cli import cli
from edgert.cli.health import leaves
from edgert.errors import EdgertError

SCRIPT = ROOT / "scripts" / "cli_docs.py"
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def check(page: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The check, of the page or of another file in its place."""
    code = (
        "import sys, pathlib, runpy\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import cli_docs\n"
        f"cli_docs.PAGE = pathlib.Path({str(page)!r}) if {page is not None} else cli_docs.PAGE\n"
        "sys.exit(cli_docs.main(['--check']))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "37", "LANG": "C"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_page_is_what_the_parser_says():
    """Write it again with: python scripts/cli_docs.py. Also in a narrow terminal."""
    got = check()
    assert got.returncode == 0, got.stdout + got.stderr


def test_drift_is_shown_as_a_diff(tmp_path):
    """And a page that is absent, too."""
    drifted = tmp_path / "cli.md"
    drifted.write_text(PAGE.replace("`EDGERT_THREADS`", "`EDGERT_CORES`"), encoding="utf-8")
    got = check(drifted)
    assert got.returncode == 1
    assert re.search(r"^-.*EDGERT_CORES", got.stdout, re.MULTILINE)
    assert re.search(r"^\+.*EDGERT_THREADS", got.stdout, re.MULTILINE)
    assert "python scripts/cli_docs.py" in got.stdout
    assert check(tmp_path / "absent.md").returncode == 1


def test_the_script_refuses_other_arguments():
    got = subprocess.run(
        [sys.executable, str(SCRIPT), "--wrong"], capture_output=True, text=True, timeout=60
    )
    assert (got.returncode, got.stdout) == (2, "")
    assert "--check" in got.stderr


@pytest.mark.parametrize(("verb", "command"), list(leaves(cli)), ids=lambda value: str(value)[:20])
def test_each_verb_is_there_with_all_it_takes(verb, command):
    """Its section names every option and variable, its arguments and its example."""
    section = PAGE.split(f"\n## edgert {verb}\n")[1].split("\n## ")[0]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.envvar}`" in section
            assert all(f"`{name}`" in section for name in parameter.opts)
            required = re.search(
                rf"^\| .*`{parameter.envvar}`.* Required\. \|$", section, re.MULTILINE
            )
            assert bool(required) == parameter.required
        else:
            assert str(parameter.name).upper() in section.upper()
    if command.epilog:
        assert command.epilog.removeprefix("example: ") in section


def test_the_index_leads_to_the_sections():
    """Anchors as GitHub makes them from headings."""
    headings = {line[3:].replace(" ", "-") for line in PAGE.splitlines() if line[:3] == "## "}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert len(links) == len(list(leaves(cli)))
    assert set(links) <= headings


def test_exit_codes_are_those_of_the_errors():
    def codes(kind: type[EdgertError]) -> set[int]:
        return {kind.exit_code}.union(*map(codes, kind.__subclasses__()))

    listed = {int(code) for code in re.findall(r"^\| (\d+) \| \w", PAGE, re.MULTILINE)}
    assert listed == codes(EdgertError) | {0, 130}


# ------------------------------------------------------------- completion

BASH = shutil.which("bash")
INSTALLED = Path(sys.executable).parent / "edgert"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(run, shell):
    got = run("completion", shell)
    assert got.code == 0
    assert "edgert" in got.out
    assert f"_EDGERT_COMPLETE={shell}_complete" in got.out


def test_other_shells_are_refused(run):
    got = run("completion", "tcsh")
    assert (got.code, got.out) == (2, "")
    assert "'tcsh' is not one of" in got.err


@pytest.mark.skipif(BASH is None or not INSTALLED.exists(), reason="needs bash and the command")
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["edgert", "in"], ["inspect"]),
        (["edgert", "completion", "f"], ["fish"]),
        (["edgert", "eval", "x", "--str"], ["--stride"]),
        (["edgert", "session", "ver"], ["verify"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash_completes(typed, wanted):
    """The printed script, run by bash with the words of a half-typed line."""
    words = " ".join(f"'{word}'" for word in typed)
    script = (
        'eval "$(edgert completion bash)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}\n"
        "_edgert_completion edgert\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    assert BASH
    got = subprocess.run(
        [BASH, "--norc", "-c", script],
        env={**os.environ, "PATH": f"{INSTALLED.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert got.stdout.split() == wanted, got.stderr
