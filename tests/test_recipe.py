"""Recipes: what they may say, and that everything else is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from wheels import ROOT

from edgert.errors import MissingDependency, UsageError
from edgert.export.recipe import MAX_BYTES, RUNS, read_recipe
from edgert.export.write import DEFAULT_LOWERINGS
from edgert.train.recipe import read_recipe as read_training_recipe

SOURCE = '\n[source]\npath = "model.gguf"\n'


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_least_a_recipe_says(tmp_path) -> None:
    """Format version and source; the rest has defaults. The path is beside the recipe."""
    got = read_recipe(recipe(tmp_path, "format_version = 1" + SOURCE))
    assert got.source == tmp_path / "model.gguf"
    assert (got.context, got.tokenizer) == (None, None)
    assert (got.options.precision, got.options.lowerings) == ("fp32", DEFAULT_LOWERINGS)
    assert (got.options.name, got.options.sampling) == (None, {})


def test_everything_a_recipe_may_say(tmp_path) -> None:
    """Each key arrives where it belongs."""
    text = (
        'format_version = 1\nname = "mine"\n'
        '[source]\npath = "sub/model.gguf"\ncontext = 512\ntokenizer = "sub/tokenizer.json"\n'
        '[export]\nprecision = "fp32"\nlowerings = ["portable"]\n'
        '[sampling]\ntemperature = 0.5\nstop = ["\\n\\n"]\n'
    )
    got = read_recipe(recipe(tmp_path, text))
    assert got.source == tmp_path / "sub" / "model.gguf"
    assert got.tokenizer == tmp_path / "sub" / "tokenizer.json"
    assert (got.context, got.options.name) == (512, "mine")
    assert got.options.lowerings == ("portable",)
    assert got.options.sampling == {"temperature": 0.5, "stop": ["\n\n"]}


WRONG = {
    "colour: unknown key": 'format_version = 1\ncolour = "red"' + SOURCE,
    "source.sha: unknown key": "format_version = 1" + SOURCE + 'sha = "00"',
    "export.rolled: unknown key": "format_version = 1" + SOURCE + "[export]\nrolled = true",
    "export.unrolled: expected bool, got 1": "format_version = 1"
    + SOURCE
    + "[export]\nunrolled = 1",
    "name: missing, the run of this recipe": "format_version = 1\n[train]\nsteps = 1",
    "model: missing, source.random_seed": "format_version = 1\n[source]\nrandom_seed = 1",
    "source.path: not with random_seed": "format_version = 1"
    + SOURCE
    + "random_seed = 1\n[model]\nfamily = 'hagi'",
    "source.random_seed: -1 is not from 0": "format_version = 1\n[source]\nrandom_seed = -1\n"
    "[model]\nfamily = 'hagi'",
    "train: expected a table": "format_version = 1\ntrain = 3" + SOURCE,
    "format_version: must be 1": 'name = "x"' + SOURCE,
    "format_version: expected int, got True": "format_version = true" + SOURCE,
    "source: missing": "format_version = 1",
    "source: expected a table": 'format_version = 1\nsource = "model.gguf"',
    "export: expected a table": "format_version = 1\nexport = 3" + SOURCE,
    "sampling: expected a table": "format_version = 1\nsampling = 3" + SOURCE,
    "source.path: missing": "format_version = 1\n[source]\ncontext = 8",
    "source.path: expected str, got 3": "format_version = 1\n[source]\npath = 3",
    "source.path: '../model.gguf' leaves": 'format_version = 1\n[source]\npath = "../model.gguf"',
    "source.path: '/etc/passwd' leaves": 'format_version = 1\n[source]\npath = "/etc/passwd"',
    "source.tokenizer: '../t.json' leaves": "format_version = 1"
    + SOURCE
    + 'tokenizer = "../t.json"',
    "source.package: 'os.path' is not the name": "format_version = 1"
    + SOURCE
    + 'package = "os.path"',
    "source.package: '..' is not the name": "format_version = 1" + SOURCE + 'package = ".."',
    "source.context: expected int, got '8'": "format_version = 1" + SOURCE + 'context = "8"',
    "export.lowerings: expected list, got 'ort'": "format_version = 1"
    + SOURCE
    + '[export]\nlowerings = "ort"',
    "lowering 'fast' cannot be exported": "format_version = 1"
    + SOURCE
    + '[export]\nlowerings = ["fast"]',
    "lowering 3 cannot be exported": "format_version = 1" + SOURCE + "[export]\nlowerings = [3]",
    "no lowering was asked for": "format_version = 1" + SOURCE + "[export]\nlowerings = []",
    "precision 'fp7' cannot be exported": "format_version = 1"
    + SOURCE
    + '[export]\nprecision = "fp7"',
    "'a b' is not a name for a bundle": 'format_version = 1\nname = "a b"' + SOURCE,
    "there is no sampling setting 'heat'": "format_version = 1" + SOURCE + "[sampling]\nheat = 1",
    "the recipe is not TOML": "format_version = ",
    "is not TOML: ": "a = " + "[" * 100_000,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(message, tmp_path) -> None:
    """The message names the key and its value; `where` names the file."""
    path = recipe(tmp_path, WRONG[message])
    with pytest.raises(UsageError) as failure:
        read_recipe(path)
    assert message in failure.value.what
    assert failure.value.where is not None
    assert failure.value.where.startswith(str(path))


def test_all_wrong_keys_are_reported_at_once(tmp_path) -> None:
    """Sorted, one a line, so that a recipe is mended in one go."""
    path = recipe(tmp_path, 'zeal = 1\nbrio = "x"\n[source]\nelan = 2\n')
    with pytest.raises(UsageError) as failure:
        read_recipe(path)
    assert failure.value.what.splitlines()[1:] == [
        "  - brio: unknown key",
        "  - format_version: must be 1",
        "  - source.elan: unknown key",
        "  - source.path: missing",
        "  - zeal: unknown key",
    ]


def test_a_huge_recipe_is_not_read(tmp_path) -> None:
    """A file that is no recipe may be of any size."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than 1048576 bytes"):
        read_recipe(path)


def test_bytes_that_are_no_text_are_refused(tmp_path) -> None:
    """TOML is UTF-8."""
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"format_version = 1 # \xff")
    with pytest.raises(UsageError, match="the recipe is not TOML"):
        read_recipe(path)


def test_a_package_carries_the_source_without_being_imported(tmp_path, monkeypatch) -> None:
    """Its code does not run, even if it would fail."""
    package = tmp_path / "site" / "carrier_of_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    text = "format_version = 1" + SOURCE + 'package = "carrier_of_a_model"\n'
    got = read_recipe(recipe(tmp_path, text))
    assert got.source == package / "model.gguf"
    assert "carrier_of_a_model" not in sys.modules


def test_a_missing_package_is_named_with_its_installation(tmp_path) -> None:
    """The recipe itself says what to install."""
    text = (
        "format_version = 1"
        + SOURCE
        + 'package = "no_such_thing"\ninstall = "--no-deps thing==1"\n'
    )
    with pytest.raises(MissingDependency, match="no_such_thing is not installed") as failure:
        read_recipe(recipe(tmp_path, text))
    assert failure.value.do == "pip install --no-deps thing==1"


@pytest.mark.parametrize("path", sorted((ROOT / "export").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_of_the_project_is_sound(path) -> None:
    """It parses; a package that is not installed here is the only excuse."""
    try:
        got = read_recipe(path)
    except MissingDependency as error:
        pytest.skip(str(error))
    assert got.options.name == path.stem
    if got.trains:
        assert got.source == RUNS / path.stem
        assert got.model is not None
    else:
        assert got.source.is_file()
        assert (got.model is None) == (got.random_seed is None)


@pytest.mark.parametrize(
    "text",
    [
        '"' + "k" * 60_000 + '" = 1',
        'format_version = 1\nname = "' + "x" * 60_000 + '"\n' + SOURCE,
        'format_version = 1\n[source]\npath = "' + "../" * 20_000 + '"',
        'format_version = 1\n[export]\nprecision = "' + "9" * 60_000 + '"\n' + SOURCE,
        "format_version = 1\n" + "\n".join(f"k{i} = 1" for i in range(30_000)) + "\n" + SOURCE,
    ],
)
def test_a_message_stays_short_whatever_the_recipe_says(tmp_path, text):
    (tmp_path / "r.toml").write_text(text)
    for read in (read_recipe, read_training_recipe):
        with pytest.raises(UsageError) as caught:
            read(tmp_path / "r.toml")
        assert len(str(caught.value)) < 4_000
