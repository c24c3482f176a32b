"""docs/api.md and docs/session.md: the code runs, and the tables say what the code says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import edgert
from edgert import errors
from edgert.generate import Generation, Piece
from edgert.runner import PREFILL_CHUNK
from edgert.sampler import SamplingParams
from edgert.sessionfile import FINISH_REASONS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "least"), [("api.md", 9), ("session.md", 1)])
def test_the_blocks_run_one_after_the_other(page, least, tiny_bundle, tmp_path, monkeypatch):
    """As a reader would type them; they share their names."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= least
    names = {"BUNDLE": tiny_bundle, "edgert": edgert}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)


def test_every_sampling_setting_is_in_the_table_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? \| ", PAGE, re.MULTILINE)
    table = {name: default for name, default in rows}
    for field in dataclasses.fields(SamplingParams):
        assert table.get(field.name) == str(field.default), field.name


def test_the_error_tree_is_that_of_the_code():
    """Line by line, and with the exit codes that the classes carry."""
    tree = [line[4:] for line in errors.__doc__.splitlines() if re.match(r"    [├│└E]", line)]
    assert "\n".join(tree) in PAGE
    for name, code in re.findall(r"(\w+) +(\d)  ", "\n".join(tree)):
        assert getattr(edgert, name).exit_code == int(code)


def test_every_public_name_is_mentioned():
    missing = [name for name in edgert.__all__ if not re.search(rf"\b{name}\b", PAGE)]
    assert missing == ["__version__"]


def test_fields_and_reasons_are_mentioned():
    """And the number of tokens in a prefill chunk is the one in the code."""
    for kind in (Piece, Generation):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in PAGE, field.name
    for reason in FINISH_REASONS:
        assert f'`"{reason}"`' in PAGE
    assert f"chunk of {PREFILL_CHUNK} tokens" in PAGE.replace("\n", " ")
