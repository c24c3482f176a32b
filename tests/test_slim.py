"""The runtime alone: an environment made from the built wheel and its `cpu` extra, with neither
torch nor onnx nor a network, runs a bundle and gives the tokens that the full environment gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from wheels import ROOT, build, copy_source

import edgert

pytestmark = pytest.mark.slow

BUDGET_MB = 250
PROMPT = [3, 1, 4, 1, 5]

# Found by every interpreter started with this folder on PYTHONPATH, before anything else runs.
NO_NETWORK = """
import socket


def refuse(*args, **kwargs):
    raise RuntimeError("the network is blocked")


for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
"""


@dataclass(frozen=True)
class Slim:
    """A virtual environment, and a folder to run in from which the work tree is not seen."""

    folder: Path
    empty: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if k in {"HOME", "LANG", "TMPDIR"}}
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            env={**kept, "PATH": path, "PYTHONPATH": str(self.empty / "no_network")},
            cwd=self.empty,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    def python(self, code: str, *args: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-c", code, *args)


@pytest.fixture(scope="module")
def slim(tmp_path_factory) -> Slim:
    folder = tmp_path_factory.mktemp("slim")
    wheel = build("wheel", copy_source(folder / "source" / "edgert"), folder / "wheel")
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet"]
    result = subprocess.run(
        [*pip, "--disable-pip-version-check", f"{wheel}[cpu]"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (folder / "no_network").mkdir()
    (folder / "no_network" / "sitecustomize.py").write_text(NO_NETWORK)
    return Slim(folder / "venv", folder)


def test_the_network_is_really_blocked(slim):
    """The block that the other tests rely on works in a child interpreter."""
    result = slim.python("import urllib.request as u; u.urlopen('http://127.0.0.1:9', timeout=5)")
    assert result.returncode == 1
    assert "the network is blocked" in result.stderr


def test_no_author_package_is_installed(slim):
    """Neither the runtime nor its cpu extra pulls in what only export and training need."""
    code = (
        "import importlib.util as u, sys\n"
        "print(*[name for name in sys.argv[1:] if u.find_spec(name)])"
    )
    absent = ["torch", "onnx", "onnxscript", "gguf", "transformers", "matplotlib", "pytest"]
    result = slim.python(code, *absent, "onnxruntime")
    assert result.stdout.split() == ["onnxruntime"], result.stderr


def test_installed_size_is_within_budget(slim):
    """All files of the environment except pip's own add up to at most 250 MB."""
    (packages,) = slim.folder.glob("lib/python*/site-packages")
    counted = [top for top in packages.iterdir() if not top.name.startswith(("pip", "setuptools"))]
    files = [file for top in counted for file in (top, *top.rglob("*")) if file.is_file()]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    assert 0 < megabytes <= BUDGET_MB, f"{megabytes:.0f} MB"


def test_recipes_are_installed(slim):
    """The recipe folder of the clone is readable as package data."""
    code = (
        "from importlib.resources import files\n"
        "print(*[p.name for p in files('edgert.recipes.export').iterdir()])"
    )
    result = slim.python(code)
    recipes = {path.name for path in (ROOT / "export").glob("*.toml")}
    assert recipes
    assert recipes <= set(result.stdout.split()), result.stderr


@pytest.fixture
def expected(tiny_exported_bundle) -> list[int]:
    """The greedy continuation of PROMPT in the environment that exported the bundle."""
    with edgert.load(tiny_exported_bundle) as model:
        tokens = model.generate(PROMPT, max_tokens=8, temperature=0.0).tokens
    assert len(tokens) == 8
    return list(tokens)


def test_python_generates_without_network(slim, tiny_exported_bundle, expected):
    """`edgert.load(...).generate(...)` gives the same tokens, and loads no author package."""
    code = (
        "import json, sys, edgert\n"
        "with edgert.load(sys.argv[1]) as model:\n"
        "    prompt = json.loads(sys.argv[2])\n"
        "    print(list(model.generate(prompt, max_tokens=8, temperature=0.0).tokens))\n"
        "print(edgert.__file__)"
    )
    result = slim.python(code, str(tiny_exported_bundle), json.dumps(PROMPT))
    assert result.returncode == 0, result.stderr
    tokens, where = result.stdout.splitlines()
    assert json.loads(tokens) == expected
    assert where.startswith(str(slim.folder))  # the installed package, not the work tree


def test_command_generates_without_network(slim, tiny_exported_bundle, expected):
    """`edgert run --ids` of the installed script gives the same tokens."""
    ids = ",".join(str(token) for token in PROMPT)
    bundle = str(tiny_exported_bundle)
    result = slim.run("edgert", "run", bundle, "--ids", ids, "-n", "8", "--temp", "0", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == expected
