"""The kernels' tests again as processors that lack what this one has: each is a code of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgert import kernels
from edgert.machine import instruction_set

OLDER = {"avx2": "avx2", "avx512": "avx512_vnni"}  # as EDGERT_NATIVE names them, and the processor


@pytest.mark.parametrize("file", ["test_kernels.py", "test_products.py"])
@pytest.mark.parametrize("kind", OLDER)
def test_kernels_as_an_older_processor(kind, file):
    if kernels.library() is None:
        pytest.skip("the kernels were not compiled, or are switched off")
    if OLDER[kind] not in instruction_set().split():
        pytest.skip(f"this processor has no {OLDER[kind]}")
    again = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*again, str(Path(__file__).with_name(file))],
        capture_output=True,
        text=True,
        env=os.environ | {"EDGERT_NATIVE": kind},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "not compiled" not in done.stdout
