"""scripts/aarch64: what it needs and says, and in the long run all of it, emulated."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from wheels import ROOT

SCRIPT = ROOT / "scripts" / "aarch64"


def script(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_missing_tools_are_named(tmp_path):
    """Without any tool on the PATH it stops before it makes anything, with what to install."""
    result = script("--check", env={"PATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 3
    said = "is needed" if os.uname().machine != "x86_64" else "apt-get install debootstrap"
    assert said in result.stderr.replace("debian-archive-keyring ", "")
    assert not any(tmp_path.iterdir())


def verdicts(page: str) -> list[str]:
    """The last column of the page's table of results."""
    table = page.partition("## Result")[2].partition("\n## ")[0]
    return re.findall(r"\| (\S+) \|$", table, re.MULTILINE)[1:]


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_both_machines_say_the_same(tmp_path):
    """Skipped where the tools are not, or not root: what is missing is in the reason."""
    can = script("--check", timeout=60)
    if can.returncode == 3:
        pytest.skip(" ".join(can.stderr.split()))
    page = tmp_path / "page.md"
    result = script("--output", page, timeout=7000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = verdicts(page.read_text(encoding="utf-8"))
    assert set(found) == {"same"}
    assert len(found) >= 20
