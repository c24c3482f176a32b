"""jetson/: the set-up script's commands, linters where they are installed, and the resident."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from wheels import ROOT

JETSON = ROOT / "jetson"
SETUP = JETSON / "setup.sh"
SOLVER = ROOT / "examples" / "hrm-sudoku4"


def setup(*words: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    env = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run(
        [bash, str(SETUP), *map(str, words)], capture_output=True, text=True, env=env, timeout=60
    )


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder of programs by which nothing is installed and no user is known."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "dpkg-query", "exit 1")
    program(folder, "getent", '[ "$1" = group ]')
    return folder


def commands(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line[2:] for line in result.stderr.splitlines() if line.startswith("+ ")]


def test_a_dry_run_names_every_command_and_runs_none(bare, tmp_path):
    """For JetPack 6 with all options: packages, environment, swap, power, service, doctor."""
    venv = tmp_path / "venv"
    options = ("--swap", 8, "--power-mode", 2, "--service", SOLVER, "--venv", venv)
    found = commands(setup("--dry-run", "--jetpack", 6, *options, path=bare))
    packages = "libnvinfer10 libnvinfer-plugin10 libnvonnxparsers10 python3-libnvinfer"
    install = "apt-get install --yes --no-install-recommends"
    assert found[1].endswith(f"{install} python3-venv libgomp1 g++ {packages}")
    assert f"/usr/bin/python3 -m venv --clear --system-site-packages {venv}" in found
    (pip,) = (line for line in found if " -m pip install " in line)
    assert r"\[cpu\,crypto\,tensorrt\]" in pip
    assert r"cuda-bindings\>=12.6\,\<13" in pip  # the device's CUDA is 12.6
    assert "fallocate -l 8G /var/edgert.swap" in found
    assert "nvpmodel -m 2" in found
    assert [line for line in found if line.startswith("useradd --system")]
    assert f"ln -sfn {SOLVER} /opt/edgert/bundle" in found
    assert found[-1] == f"{venv}/bin/edgert doctor"
    assert not venv.exists()


def test_jetpack_7_takes_the_tensorrt_that_is_named(bare):
    """An exact version is that of all four packages, and the CUDA bindings are not held back."""
    version = "10.16.2.10-1+cuda13.2"
    found = commands(setup("--dry-run", "--jetpack", 7, "--tensorrt", version, path=bare))
    assert found[1].count(f"={version}") == 4
    assert "cuda-bindings" not in " ".join(found)


def test_another_machine_gets_no_tensorrt(bare):
    found = commands(setup("--dry-run", "--jetpack", "none", path=bare))
    assert "libnvinfer" not in " ".join(found)
    assert [line for line in found if r"\[cpu\,crypto\]" in line]


def test_what_is_there_is_left_alone(tmp_path):
    """Installed packages and an environment that sees the system's are not made again."""
    program(tmp_path, "dpkg-query", "printf installed")
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    found = commands(setup("--dry-run", "--jetpack", 6, "--venv", venv, path=tmp_path))
    assert not [line for line in found if "apt-get" in line or " -m venv " in line]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bogus"], "--bogus is not known"),
        (["--swap", "much"], "--swap wants whole GB from 1 to 99, not much"),
        (["--swap"], "--swap wants a value"),
        (["--power-mode", "MAXN"], "--power-mode wants a number, not MAXN"),
        (["--venv", "here"], "--venv wants an absolute path, not here"),
        (["--jetpack", "5"], "--jetpack wants 6, 7 or none, not 5"),
    ],
)
def test_wrong_options_are_refused(words, message):
    result = setup("--dry-run", *words)
    assert result.returncode == 2
    assert f"error: {message}\n" in result.stderr


def test_what_is_no_bundle_is_refused(tmp_path):
    result = setup("--dry-run", "--service", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path} is not a bundle" in result.stderr


def tool(name: str) -> str:
    """Where a linter is. Skips, saying so, where it is not installed."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def lint(*words: str) -> str:
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return f"{result.returncode or ''}{result.stdout}{result.stderr}"


def test_the_script_is_clean():
    assert lint(tool("shellcheck"), str(SETUP)) == ""


@pytest.mark.parametrize("name", ["jetpack6.Dockerfile", "jetpack7.Dockerfile"])
def test_container_files_are_clean(name):
    assert lint(tool("hadolint"), str(JETSON / name)) == ""


def test_the_unit_is_verified_by_systemd(tmp_path):
    """With a program that exists in the place of the installed one."""
    text = (JETSON / "edgert.service").read_text(encoding="utf-8")
    there = text.replace("/opt/edgert/venv/bin/python", sys.executable)
    assert there != text
    (tmp_path / "edgert.service").write_text(there)
    assert lint(tool("systemd-analyze"), "verify", str(tmp_path / "edgert.service")) == ""


def test_systemd_really_reads_the_unit(tmp_path):
    """What the test above would show: a key that does not exist is reported."""
    text = (JETSON / "edgert.service").read_text(encoding="utf-8").replace("WatchdogSec", "Watch")
    (tmp_path / "edgert.service").write_text(text)
    said = lint(tool("systemd-analyze"), "verify", str(tmp_path / "edgert.service"))
    assert re.search("Unknown key (name )?'Watch'", said)


class Notified:
    """systemd's side of the protocol: a datagram socket, and what was sent to it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)

    def next(self) -> str:
        return self.socket.recv(4096).decode()

    def after(self, text: str) -> str:
        """The next message that is another one."""
        while (said := self.next()) == text:
            pass
        return said


@contextmanager
def resident(bundle: Path, folder: Path, watchdog_s: float) -> Iterator[tuple[Any, Path, Notified]]:
    """The process, its socket, and what it tells systemd; terminated at the end."""
    systemd, where = Notified(folder / "notify"), folder / "edgert.sock"
    env = os.environ | {
        "NOTIFY_SOCKET": str(folder / "notify"),
        "WATCHDOG_USEC": str(round(watchdog_s * 1e6)),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(JETSON / "resident.py"), "--socket", str(where), str(bundle)]
    process = subprocess.Popen([*command, "--threads", "1"], env=env, stderr=subprocess.PIPE)
    try:
        yield process, where, systemd
    finally:
        process.kill()
        process.communicate()
        systemd.socket.close()


def ask(where: Path, *lines: object) -> list[dict[str, Any]]:
    """Answers to requests that are sent at once over one connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as out:
        out.settimeout(60)
        out.connect(str(where))
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        out.sendall("".join(text + "\n" for text in texts).encode())
        out.shutdown(socket.SHUT_WR)
        with out.makefile(encoding="utf-8") as answers:
            return [json.loads(line) for line in answers]


def test_the_resident_answers_and_tells_systemd(tiny_bundle, tmp_path):
    """Ready when loaded, alive while it waits, its answers those of the library; SIGTERM is a clean
    end that takes the socket away."""
    import edgert

    with edgert.load(tiny_bundle, threads=1) as model:
        want = model.generate([3, 1, 4], max_tokens=8, temperature=1.0, seed=7)
    with resident(tiny_bundle, tmp_path, watchdog_s=0.4) as (process, where, systemd):
        assert systemd.next() == "READY=1\nSTATUS=tiny is loaded"
        assert systemd.next() == systemd.next() == "WATCHDOG=1"
        request = {"ids": [3, 1, 4], "max_tokens": 8, "temperature": 1.0, "seed": 7}
        deep = "[" * 100_000
        first, second, wrong, broken, deepest, far = ask(
            where, request, request, {"max_tokens": 3}, "no JSON", deep, {"ids": [10**6]}
        )
        assert (
            first
            == second
            == {"text": want.text, "tokens": list(want.tokens), "finish_reason": "length"}
        )
        assert wrong == {"error": "a request has a prompt, ids or puzzles"}
        assert broken["error"].startswith("JSONDecodeError")
        assert deepest["error"].startswith("RecursionError")
        assert "error" in far
        process.send_signal(signal.SIGTERM)
        assert systemd.after("WATCHDOG=1") == "STOPPING=1"
        assert process.wait(60) == 0
        assert not where.exists()


def test_the_resident_solves(tmp_path):
    from edgert.tasks.sudoku import FOUR

    with resident(SOLVER, tmp_path, watchdog_s=60) as (_, where, systemd):
        assert systemd.next().startswith("READY=1")
        (answer,) = ask(where, {"puzzles": [FOUR.parse("1.....3..4.....2").tolist()]})
        assert FOUR.text(FOUR.parse("1324423124133142")) == "1324423124133142"
        assert answer["answers"] == [FOUR.parse("1324423124133142").tolist()]
        assert answer["reasons"] == ["halted"]


def test_a_silent_client_does_not_stop_the_watchdog(tiny_bundle, tmp_path):
    """While one that says nothing is connected, systemd hears that the process is alive."""
    with resident(tiny_bundle, tmp_path, watchdog_s=0.4) as (_, where, systemd):
        assert systemd.next().startswith("READY=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.connect(str(where))
            assert [systemd.next() for _ in range(6)] == ["WATCHDOG=1"] * 6


def test_a_process_that_hangs_is_not_alive(tiny_bundle, tmp_path):
    """Stopped, it tells systemd nothing; that is what the watchdog's restart follows from."""
    with resident(tiny_bundle, tmp_path, watchdog_s=0.4) as (process, _, systemd):
        assert systemd.next().startswith("READY=1")
        process.send_signal(signal.SIGSTOP)
        systemd.socket.settimeout(2)
        heard = 0
        with suppress(TimeoutError):
            while heard < 100:  # what was sent before it stopped
                heard += systemd.next() == "WATCHDOG=1"
        assert heard < 100


def test_power_modes_and_rails_have_a_page():
    """docs/jetson.md describes what edgert/bench/power.py and the doctor read."""
    text = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    for word in ("ina3221", "in1_input", "curr1_input", "tegrastats", "nvpmodel", "R36 (release)"):
        assert word in text, word
