"""A start from nothing: a fresh process, until the first token is there.

Cold is the process. The files are not: they were read moments before, so they come from the page
cache, and a first start after a boot takes as much longer as the disk needs for them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE_STATE = "cold process, files in page cache"
STAGES = ("import", "load", "first_token")
STARTS = 3
"""Fresh processes; the one with the median total is reported."""

_TIMEOUT_S = 600


def cold_start(
    bundle: Path,
    prompt: str | tuple[int, ...],
    *,
    device: str,
    variant: str,
    threads: int,
    prepack: bool,
    starts: int = STARTS,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Milliseconds of each stage, and the first token itself.

    import       Python's own start, edgert, numpy, and the library that runs the graphs
    load         verify (bundle checks; hashes by stamp if there is one) + graphs + tokenizer,
                 which is read beside the graphs: what it takes longer than they do
    first_token  from the prompt handed over, nothing warmed up
    Raises EdgertError with what the process said if it failed.
    """
    job = {
        "bundle": str(bundle),
        "prompt": prompt,
        "device": device,
        "variant": variant,
        "threads": threads,
        "prepack": prepack,
    }
    runs = []
    for _ in range(starts):
        runs.append(_start(json.dumps(job)))
        done()
    chosen = sorted(runs, key=lambda run: float(run["total"]))[len(runs) // 2]
    totals = [float(run["total"]) for run in runs]
    return chosen | {"cache_state": CACHE_STATE, "starts": starts, "totals": totals}


def _start(job: str) -> dict[str, Any]:
    from edgert.child import ask

    begun = time.monotonic_ns()
    stamps = ask(
        "edgert.bench.cold",
        job,
        "the fresh process of the cold start",
        _TIMEOUT_S,
        failed="run edgert run on this bundle to see what is wrong",
        late="measure without it: --no-cold-start",
    )
    parts = ("import", "verify", "graphs", "tokenizer", "first_token")
    ends = [begun, *(int(stamps[part]) for part in parts)]
    found: dict[str, Any] = {
        part: (end - start) / 1e6 for part, start, end in zip(parts, ends, ends[1:], strict=False)
    }
    return found | {
        "load": found["verify"] + found["graphs"] + found["tokenizer"],
        "total": (ends[-1] - begun) / 1e6,
        "hashed_bytes": stamps["hashed_bytes"],
        "token": stamps["token"],
    }


def child() -> None:
    """What runs in the fresh process: a job on stdin, the times on stdout."""
    job = json.load(sys.stdin)
    from edgert.backends import open_backend
    from edgert.bundle import Bundle
    from edgert.model import Model, tokenizer_beside
    from edgert.runner import Runner
    from edgert.sampler import SamplingParams

    backend = open_backend(job["device"], threads=job["threads"], prepack=job["prepack"])
    stamps: dict[str, Any] = {"import": time.monotonic_ns(), "hashed_bytes": 0}

    def hashed(nbytes: int) -> None:
        stamps["hashed_bytes"] += nbytes

    bundle = Bundle.open(job["bundle"], "stamp", hashed)
    stamps["verify"] = time.monotonic_ns()
    tokenizer = tokenizer_beside(bundle)
    runner = Runner(bundle, job["variant"], backend)
    stamps["graphs"] = time.monotonic_ns()
    model = Model(bundle, runner, tokenizer)
    stamps["tokenizer"] = time.monotonic_ns()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    piece = next(model.session().stream(job["prompt"], params))
    stamps["first_token"] = time.monotonic_ns()
    print(json.dumps(stamps | {"token": piece.token}))


if __name__ == "__main__":
    child()
