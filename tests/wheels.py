"""Builds of the project for tests: from a copy, so that no test writes into the work tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANYWHERE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
AT_THE_TOP = shutil.ignore_patterns("build", "dist", "bundles", "benchmarks", "docs")


def copy_source(to: Path) -> Path:
    """A copy of what a build reads, without what earlier builds left."""

    def not_source(folder: str, names: list[str]) -> set[str]:
        top = AT_THE_TOP(folder, names) if Path(folder) == ROOT else set()
        return top | ANYWHERE(folder, names)

    return Path(shutil.copytree(ROOT, to, ignore=not_source))


def build(kind: str, source: Path, out: Path) -> Path:
    """Build `kind` ('wheel' or 'sdist') of the tree `source` into `out`, without a network."""
    result = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", str(out), str(source)],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1577836800"},
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
