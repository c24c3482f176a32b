"""What is published: the wheel carries the whole package and the recipes, and nothing else."""

from __future__ import annotations

import re
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest
from wheels import ROOT, build, contents, copy_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return copy_source(tmp_path_factory.mktemp("source") / "edgert")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> dict[str, bytes]:
    return contents(build("wheel", source, tmp_path_factory.mktemp("wheel")))


def metadata(wheel: dict[str, bytes]):
    (name,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel[name])


def test_wheel_carries_every_recipe(wheel):
    """Recipes of the top-level folder are readable from an installed package."""
    for folder in ("export", "engines"):
        recipes = {path.name: path.read_bytes() for path in (ROOT / folder).glob("*.toml")}
        assert recipes
        prefix = f"edgert/recipes/{folder}/"
        packed = {n.removeprefix(prefix): wheel[n] for n in wheel if n.startswith(prefix)}
        assert {name: data for name, data in packed.items() if name.endswith(".toml")} == recipes


def test_wheel_carries_the_package_and_nothing_else(wheel):
    """Every module and the typing marker are inside; tests, scripts and caches are not."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "edgert").rglob("*.py")}
    outside = {name for name in wheel if not name.startswith(("edgert/", "edgert-"))}
    assert outside == set()
    assert {name for name in wheel if name.endswith(".py")} == modules
    assert "edgert/py.typed" in wheel
    assert [name for name in wheel if name.endswith(("/LICENSE", "/NOTICE"))] != []


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    """A wheel made from the source archive equals the one made from the clone, byte for byte."""
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        archive.extractall(tmp_path, **safely)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == wheel


def test_plain_install_asks_for_the_runtime_only(wheel):
    """Without an extra, nothing is required but the runtime's own list."""
    required = [text for text in metadata(wheel).get_all("Requires-Dist") if "extra ==" not in text]
    names = {re.split(r"[<>=!~; ]", text)[0] for text in required}
    runtime = {"click", "jinja2", "numpy", "rich", "safetensors", "tokenizers", "tomli"}
    assert names == runtime
