"""Saving is interrupted: by kill -9 at random moments, and by a full disk. The old file stays.

The killer runs in a process of its own, which forks its victims: a fork costs a millisecond where
a fresh interpreter would cost a third of a second.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_model import PROMPT, A, fake_model

from edgert.errors import EdgertError
from edgert.files import _YOUNG_S
from edgert.sessionfile import BundleHint, SavedSession, read_session, write_session
from edgert.vault import Key

KEY = Key(bytes(range(32)), 1)
ROWS = {"small": 16, "large": 500_000}  # of float32: 64 bytes, and 2 MB


def numbered(number: int, rows: int) -> SavedSession:
    """A session of which every part says its number, so that a mixture of two would show."""
    return SavedSession(
        bundle=BundleHint("fake", "ab" * 32, "fp32-ort", "cd" * 32, None, None),
        tokens=np.full(3 + number % 5, number % 200),
        states={"lens": np.array([number]), "kept": np.full((1, rows), number, np.float32)},
        capacity=256,
        data={"number": number},
    )


def number_of(path: Path, key: Key | None = None) -> int:
    """Which one it is; every part must agree."""
    saved = read_session(path, key)
    number = int(saved.data["number"])
    assert saved.tokens.tolist() == [number % 200] * (3 + number % 5)
    assert saved.states["lens"].tolist() == [number]
    assert (saved.states["kept"] == number).all()
    return number


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


# kill -9


def save_for_ever(path: Path, rows: int, first: int, done: int, key: Key | None) -> None:
    """The victim: session after session, each number to the pipe once it is on disk."""
    for number in range(first, sys.maxsize):
        write_session(path, numbered(number, rows), key)
        os.write(done, number.to_bytes(8, "little"))


def kill_one(path: Path, rows: int, first: int, wait: float, key: Key | None) -> int:
    """Fork a victim, kill it a moment after its first save: the last number that it told."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            save_for_ever(path, rows, first, tell, key)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        seen = pipe.read(8)  # it is under way
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        seen += pipe.read()
    assert os.WIFSIGNALED(status), "the victim ended by itself"
    return int.from_bytes(seen[-8:], "little")


def kill_many(folder: Path, kind: str, kills: int, seed: int) -> None:
    """What the subprocess does; prints what was seen as JSON."""
    rows, key = ROWS[kind.removeprefix("encrypted ")], KEY if "encrypted" in kind else None
    path, rng, newer, in_write = folder / "s", random.Random(seed), 0, 0
    write_session(path, numbered(0, rows), key)
    number = 0
    for _ in range(kills):
        before = set(litter(folder))
        told = kill_one(path, rows, number + 1, rng.uniform(0, 0.03), key)
        number = number_of(path, key)
        assert number in (told, told + 1), f"told {told}, found {number}"
        newer += number == told + 1
        in_write += bool(set(litter(folder)) - before)
    print(json.dumps({"kills": kills, "in_write": in_write, "not_yet_told": newer}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "kills"), [("small", 100), ("large", 140), ("encrypted large", 20)]
)
def test_260_kills_while_saving_leave_the_old_or_the_new_session(tmp_path, kind, kills):
    """After each: the newest that was reported saved, or the one after it; whole, in all its parts.

    Kills land within the write (a temporary file is left), not only between two; and the next
    save sweeps up what they left.
    """
    process = subprocess.run(
        [sys.executable, __file__, str(tmp_path), kind, str(kills), "7"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout)
    assert seen["kills"] == kills
    assert seen["in_write"] >= kills // 20
    for name in litter(tmp_path):
        old = time.time() - _YOUNG_S - 1
        os.utime(tmp_path / name, (old, old))
    key = KEY if "encrypted" in kind else None
    write_session(tmp_path / "s", numbered(1, 1), key)
    assert os.listdir(tmp_path) == ["s"]
    assert number_of(tmp_path / "s", key) == 1


def test_what_dead_writers_left_is_swept_and_what_living_ones_write_is_not(tmp_path):
    """Told apart by the lock, which the kernel takes back from the dead; names of others stay."""
    import fcntl

    dead, alive = tmp_path / f".s.{'0' * 12}.tmp", tmp_path / f".s.{'1' * 12}.tmp"
    others = [tmp_path / f".t.{'0' * 12}.tmp", tmp_path / ".s.tmp", tmp_path / "s.0.tmp"]
    for path in (dead, alive, *others):
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    with alive.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_session(tmp_path / "s", numbered(1, 1))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "s", alive, *others])


# A full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 kB of its own, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k,mode=700", "none", str(disk)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted; the limit on file size is tested")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_full_disk_leaves_the_old_session(small_disk, key):
    """The system's own ENOSPC: a typed error, the old file to the byte, and nothing beside it."""
    path = small_disk / "s"
    write_session(path, numbered(1, 100), key)
    old = path.read_bytes()
    for number in range(2, 5):
        with pytest.raises(EdgertError) as caught:
            write_session(path, numbered(number, 100_000), key)
        says_what_where_do(caught.value, path, "No space left on device")
        assert path.read_bytes() == old
        assert os.listdir(small_disk) == ["s"]
    assert number_of(path, key) == 1
    write_session(path, numbered(9, 200), key)  # and there is room for a small one again
    assert number_of(path, key) == 9


def test_a_session_goes_on_after_a_save_on_a_full_disk(small_disk):
    """Only the file is missing: the session itself is as it was."""
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=5)
    session.save(small_disk / "s")
    (small_disk / "filler").write_bytes(bytes(4096))
    try:
        with (small_disk / "filler").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    session.generate([A], max_tokens=5)
    with pytest.raises(EdgertError, match="No space left on device"):
        session.save(small_disk / "s")
    (small_disk / "filler").unlink()
    session.save(small_disk / "s")
    assert read_session(small_disk / "s").tokens.tolist() == session.tokens
    assert os.listdir(small_disk) == ["s"]


def says_what_where_do(error: EdgertError, path: Path, reason: str) -> None:
    assert error.what == f"cannot write: {reason}"
    assert error.where == str(path)
    assert error.do == "check free space and permissions, then run the command again"
    assert error.exit_code == 1


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("limit", [0, 1, 1000, 4096, 100_000, 399_999])
def test_a_write_that_fails_half_way_leaves_the_old_session(tmp_path, limit, key):
    """The kernel refuses to write beyond so many bytes, wherever mounting is not permitted too."""
    path = tmp_path / "s"
    write_session(path, numbered(1, 100), key)
    old = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(EdgertError) as caught:
            write_session(path, numbered(2, 100_000), key)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    says_what_where_do(caught.value, path, "File too large")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(
    ("where", "reason"),
    [("none/s", "No such file or directory"), ("file/s", "Not a directory"), ("x" * 250, "name")],
)
def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path, where, reason):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgertError, match=reason) as caught:
        write_session(tmp_path / where, numbered(1, 1))
    assert caught.value.where == str(tmp_path / where)
    assert os.listdir(tmp_path) == ["file"]


if __name__ == "__main__":
    kill_many(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
