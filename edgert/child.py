"""A fresh process of this edgert that does one job: what starts anew, and what must go on anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgert.errors import EdgertError


def ask(
    module: str,
    job: str,
    what: str,
    timeout_s: float,
    *,
    failed: str | None = None,
    late: str | None = None,
) -> Any:
    """The JSON value that `python -m module` prints when it is given `job` on stdin.

    what          it is called in errors
    failed, late  what to do about it where it failed, or took too long
    Raises EdgertError, with the last thing that it said.
    """
    home = str(Path(__file__).resolve().parents[1])  # where this edgert is, installed or not
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.run(
            [sys.executable, "-m", module],
            input=job,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired as error:
        raise EdgertError(f"{what} did not end within {timeout_s} s", do=late) from error
    if process.returncode:
        said = process.stderr.strip().splitlines()
        raise EdgertError(
            f"{what} failed with exit code {process.returncode}",
            where=said[-1] if said else sys.executable,
            do=failed,
        )
    return json.loads(process.stdout)
