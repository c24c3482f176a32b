"""Builds of the project for tests: from a copy, so that no test writes into the work tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AT_THE_TOP = {"build", "dist", "bundles", "benchmarks", "docs"}  # edgert/build is source
ANYWHERE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")


def not_source(folder: str, names: list[str]) -> set[str]:
    """What `shutil.copytree` leaves out."""
    return ANYWHERE(folder, names) | (AT_THE_TOP if Path(folder) == ROOT else set())


def copy_source(to: Path) -> Path:
    """A copy of what a build reads, without what earlier builds left."""
    return Path(shutil.copytree(ROOT, to, ignore=not_source))


def build(kind: str, source: Path, out: Path, env: Mapping[str, str] | None = None) -> Path:
    """Build `kind` ('wheel' or 'sdist') of the tree `source` into `out`, without a network."""
    result = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", str(out), str(source)],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1577836800", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (artefact,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return artefact


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
