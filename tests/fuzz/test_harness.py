"""The harness sees what it is there to see; the runner tells it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import Count, attempt, bounded, run_batch
from hypothesis import strategies as st
from targets import TARGETS, Target

from edgert.errors import BadFile

ROOT = Path(__file__).resolve().parents[2]


def reading(read) -> Target:
    return Target([b""], st.binary(max_size=8), read)


def endless(data: bytes) -> None:
    while True:
        pass


def swallowing(data: bytes) -> None:
    """What turns every Exception into its own error must not hide that it hangs."""
    try:
        endless(data)
    except Exception as error:
        raise BadFile("broken") from error


def another_error(data: bytes) -> None:
    raise KeyError("x")


def hungry(data: bytes) -> None:
    bytearray(2 * harness.EXTRA_BYTES)


def talkative(data: bytes) -> None:
    raise BadFile("x" * harness.MAX_MESSAGE)


def silent(data: bytes) -> None:
    raise BadFile(" ")


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (endless, AssertionError),
        (swallowing, AssertionError),
        (another_error, KeyError),
        (hungry, MemoryError),
        (talkative, AssertionError),
        (silent, AssertionError),
    ],
    ids=lambda value: value.__name__,
)
def test_a_fault_is_found(read, kind, monkeypatch):
    """A hang, another exception, too much memory, a message without end or without words."""
    monkeypatch.setattr(harness, "CPU_SECONDS", 0.2)
    with bounded(), pytest.raises(kind):
        attempt(reading(read), b"", Count())


def test_bounds_end_with_the_batch():
    """The process is as free as before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    run_batch(reading(len), count := Count(), 20, None)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert (count.accepted, count.refused) == (20, 0)


def test_the_smallest_failure_is_the_last_example():
    """What is kept of a failure is what hypothesis found to be the least that fails."""

    def read(data: bytes) -> None:
        if len(data) > 2:
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - bare on purpose
        run_batch(reading(read), count := Count(), 200, 1)
    assert count.last == b"\0\0\0"


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/fuzz", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_runner_prints_a_table(tmp_path):
    """One line per target with what it did; nothing is left behind where nothing failed."""
    got = fuzz("parity", "sampling", "--seconds", 0.1, "--seed", 4, "--failures", tmp_path / "f")
    assert got.returncode == 0, got.stdout + got.stderr
    head, columns, *rows = [line.split() for line in got.stdout.splitlines()]
    assert columns[0] == "target"
    assert [row[0] for row in rows] == ["parity", "sampling"]
    for row in rows:
        numbers = dict(zip(columns[1:], map(int, row[1:]), strict=True))
        assert numbers["examples"] == numbers["refused"] + numbers["accepted"] >= harness.BATCH
        assert numbers["failures"] == 0
    assert list(tmp_path.iterdir()) == []


FAILING = """
import sys
sys.path[:0] = [{fuzz!r}, {tests!r}]
import harness, targets
from hypothesis import strategies as st
def read(data):
    if data: {fault}
harness.TARGETS["parity"] = lambda folder: targets.Target([b""], st.binary(max_size=3), read)
sys.exit(harness.main())
"""


@pytest.mark.parametrize(
    ("fault", "code"), [("raise KeyError('x')", 1), ("__import__('os')._exit(7)", 7)]
)
def test_a_failing_example_is_kept(fault, code, tmp_path):
    """The example and the traceback; of a process that died, the example it died of."""
    script = FAILING.format(fuzz=str(ROOT / "tests/fuzz"), tests=str(ROOT / "tests"), fault=fault)
    arguments = ["parity", "--seconds", "1", "--seed", "1", "--failures", str(tmp_path)]
    got = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert got.returncode == code, got.stderr
    if code == 1:
        kept = Path(json.loads(got.stdout)["failure"])
        assert kept.read_bytes() == b"\0"
        assert "KeyError" in kept.with_suffix(".txt").read_text()
    else:
        assert (tmp_path / "parity-last.example").read_bytes() != b""


def test_the_runner_refuses_unknown_targets():
    """A typing error is not a run without failures."""
    got = fuzz("manifset")
    assert got.returncode == 2
    assert "there is no target 'manifset'; choose of " in got.stderr


def test_the_runner_knows_all_targets():
    """It lists them without importing what they import."""
    got = fuzz("--help")
    assert set(TARGETS) <= set(re.findall(r"\w+", got.stdout))
