"""Runs one target: every example ends as a value or an EdgertError, soon and in bounded memory.

Bounds of one example: CPU_SECONDS of this process's processor time (SIGPROF; a machine that is busy
with other things changes nothing), and EXTRA_BYTES of address space over the start (RLIMIT_AS).

As a program it fuzzes one target for a time and prints one JSON object; scripts/fuzz starts it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis.errors import HypothesisWarning  # noqa: E402
from targets import TARGETS, Target  # noqa: E402

from edgert.errors import EdgertError  # noqa: E402

CPU_SECONDS = 2.0
WALL_SECONDS = 600  # of one batch: ends a process that hangs where no signal handler runs
EXTRA_BYTES = 1 << 30
MAX_MESSAGE = 20_000  # characters, whatever the file holds
BATCH = 200  # examples between two looks at the clock


class TooSlow(BaseException):
    """No Exception: parsers that turn any failure into an error of theirs must not catch it."""


@dataclass
class Count:
    accepted: int = 0
    refused: int = 0
    last: Any = None
    trail: Path | None = None  # where each example is noted first, for what kills the process


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


@contextmanager
def bounded() -> Iterator[None]:
    """EXTRA_BYTES more address space than now, and a handler for the processor time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _kilobytes("VmSize") * 1024 + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(target: Target, example: Any, count: Count) -> None:
    """Read one example. Raises AssertionError for too long, and whatever is no EdgertError."""
    count.last = example
    if count.trail is not None:
        count.trail.write_bytes(_as_bytes(example))
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    refusal = None
    try:
        target.read(example)
        count.accepted += 1
    except EdgertError as error:
        count.refused += 1
        refusal = error
    except TooSlow:
        trace = traceback.format_exc(limit=-4)
        raise AssertionError(f"still at work after {CPU_SECONDS:g} s: {trace}") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    took = time.process_time() - start
    assert took < CPU_SECONDS, f"took {took:.1f} s"
    if refusal is not None:
        assert refusal.what.strip()
        assert len(str(refusal)) < MAX_MESSAGE, f"a message of {len(str(refusal))} characters"


def read_seeds(target: Target) -> None:
    """Every seed is sound. Also imports what a first call imports, outside the bounds."""
    for example in target.seeds:
        target.read(example)


def run_batch(target: Target, count: Count, examples: int, start: int | None) -> None:
    """Try so many examples, from a random start or (None) always the same ones."""

    @settings(
        max_examples=examples,
        derandomize=start is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(target.examples)
    def check(example: Any) -> None:
        attempt(target, example, count)

    with bounded():
        (check if start is None else seed(start)(check))()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--failures", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("error")
    # Hypothesis writes out the examples that it shrinks; this is about their length alone.
    warnings.filterwarnings("ignore", "Generating overly large repr", HypothesisWarning)
    failure = None
    with tempfile.TemporaryDirectory(prefix="edgert-fuzz-") as folder:
        given.failures.mkdir(parents=True, exist_ok=True)
        trail = given.failures / f"{given.target}-last.example"
        target, count = TARGETS[given.target](Path(folder)), Count(trail=trail)
        read_seeds(target)
        base, batch, begun = _kilobytes("VmRSS"), 0, time.monotonic()
        try:
            while time.monotonic() - begun < given.seconds:
                faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
                run_batch(target, count, BATCH, given.seed + batch)
                batch += 1
        except Exception:
            failure = _keep(given.failures, given.target, count.last)
        faulthandler.cancel_dump_traceback_later()
        trail.unlink(missing_ok=True)
        if not any(given.failures.iterdir()):
            with suppress(OSError):
                given.failures.rmdir()
    report = {
        "target": given.target,
        "seconds": time.monotonic() - begun,
        "examples": count.accepted + count.refused,
        "refused": count.refused,
        "accepted": count.accepted,
        "peak_mb": (_kilobytes("VmHWM") - base) / 1024,
        "failure": failure,
    }
    print(json.dumps(report))
    return 1 if failure else 0


def _as_bytes(example: Any) -> bytes:
    return example if isinstance(example, bytes) else ascii(example).encode()


def _keep(folder: Path, name: str, example: Any) -> str:
    """The smallest example that fails (hypothesis ends with it), and why."""
    path = folder / f"{name}-{os.getpid()}"
    path.with_suffix(".example").write_bytes(_as_bytes(example))
    path.with_suffix(".txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
    return str(path.with_suffix(".example"))


if __name__ == "__main__":
    sys.exit(main())
