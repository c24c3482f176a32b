"""load_source: the content decides; and the careful reading that all importers share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from tiny_llama import gguf_keys, gguf_tensors, save, tiny, write_gguf

from edgert.errors import BadCheckpoint, UnsupportedModel, UsageError
from edgert.models.importers import load_source
from edgert.models.importers.common import Fields, Problems, choose_context, named, shown, slug

MODEL_A = next(case for case in cases("hagi") if case.name == "model_a").checkpoint


@pytest.mark.parametrize("source", ["hagi checkpoint", "gguf", "huggingface"])
def test_the_content_decides(source: str, tmp_path: Path) -> None:
    """Names that say something else mislead nobody; provenance is JSON without folders."""
    path = tmp_path / "model.safetensors"
    if source == "gguf":
        write_gguf(path, gguf_tensors(tiny()), gguf_keys(tiny()))
    elif source == "huggingface":
        save(tiny(), path)
    else:
        path.write_bytes(MODEL_A.read_bytes())
    imported = load_source(path)
    assert imported.provenance["source"] == source
    assert str(tmp_path) not in json.dumps(imported.provenance)
    assert not imported.model.training
    assert not any(p.requires_grad for p in imported.model.parameters())


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x02", b'{"a": 1}', bytes(1000)])
def test_any_other_file_is_refused(content: bytes, tmp_path: Path) -> None:
    """The message lists what is accepted."""
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match="not a model file") as failure:
        load_source(path)
    assert all(kind in str(failure.value) for kind in ("HAGI", "GGUF", "config.json"))


def test_loose_safetensors_ask_for_their_folder(tmp_path: Path) -> None:
    """The file alone does not say what it computes."""
    path = save(tiny(), tmp_path) / "model.safetensors"
    with pytest.raises(BadCheckpoint, match="give the folder that holds it"):
        load_source(path)


def test_a_folder_needs_a_config(tmp_path: Path) -> None:
    """Any other folder is refused with the list of what is accepted."""
    with pytest.raises(BadCheckpoint, match=r"no config.json[\s\S]*accepted are"):
        load_source(tmp_path)


def test_a_path_must_exist(tmp_path: Path) -> None:
    """A wrong path is the user's argument."""
    with pytest.raises(UsageError, match="there is no file or folder"):
        load_source(tmp_path / "absent")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadCheckpoint, match="neither a file nor a folder"):
        load_source(tmp_path / "pipe")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission problems are told as such."""
    path = tmp_path / "x"
    path.write_bytes(b"GGUF")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadCheckpoint, match="the file cannot be read: .*Permission denied"):
        load_source(path)


@pytest.mark.parametrize("context", [0, -1, (1 << 20) + 1])
def test_a_context_must_be_possible(context: int) -> None:
    """An absurd argument is refused before a table of that size is made."""
    with pytest.raises(UsageError, match=f"a context of {context} positions is not from 1 to"):
        load_source(MODEL_A, context=context)


@pytest.mark.parametrize(
    ("read", "value", "problem"),
    [
        ("integer", True, "c.k is True, not an integer from 1 to 9"),
        ("integer", 2.0, "c.k is 2.0, not an integer from 1 to 9"),
        ("integer", 10, "c.k is 10, not an integer from 1 to 9"),
        ("integer", None, "c.k is missing"),
        ("number", float("inf"), "c.k is inf, not a number from 1 to 9"),
        ("number", "1", "c.k is '1', not a number from 1 to 9"),
        ("number", False, "c.k is False, not a number from 1 to 9"),
        ("number", None, "c.k is missing"),
        ("flag", 1, "c.k is 1, not true or false"),
        ("flag", None, "c.k is missing"),
        ("text", 1, "c.k is 1, not text"),
        ("section", {1: 2}, "c.k is a dict of 1, not a mapping with text keys"),
        ("section", None, "c.k is missing"),
    ],
)
def test_a_wrong_value_is_a_problem_with_its_name(read: str, value: Any, problem: str) -> None:
    """Reading goes on, so that all problems of a file are told together."""
    problems = Problems("x.json")
    bounds = {"low": 1, "high": 9} if read in ("integer", "number") else {}
    getattr(Fields({"k": value}, problems, "c."), read)("k", **bounds)
    with pytest.raises(BadCheckpoint, match="^bad:\n  - " + problem.replace(".", r"\.")) as e:
        problems.check("bad", do="mend it")
    assert (e.value.where, e.value.do) == ("x.json", "mend it")


def test_sound_values_are_read_and_the_rest_is_unknown() -> None:
    """Defaults stand in for absent and null; what nobody reads is listed."""
    problems = Problems("x")
    fields = Fields({"a": 3, "b": None, "c": True, "z": 1, "s": {"q": 2, "r": 1}}, problems)
    assert fields.integer("a", high=9) == 3
    assert fields.number("b", 0.5, low=0.0, high=1.0) == 0.5
    assert fields.flag("c") is True
    section = fields.section("s")
    assert section.integer("q", high=9) == 2
    problems.check("nothing")
    assert (fields.unknown(), section.unknown()) == (["z"], ["s.r"])


@pytest.mark.parametrize(
    ("value", "refused"), [(None, False), (1.0, False), (1, True), (True, True), ("x", True)]
)
def test_only_neutral_values_pass_a_refusal(value: Any, refused: bool) -> None:
    """True is not 1.0: a flag where a factor should be is not neutral."""
    fields = Fields({"k": value}, Problems("x"), "c.")
    if not refused:
        fields.refuse("k", (1.0,), "no")
        return
    with pytest.raises(UnsupportedModel, match=r"c.k = .*: no"):
        fields.refuse("k", (1.0,), "no")


def test_long_values_are_cut_for_messages() -> None:
    """A hostile value cannot fill the terminal or take a minute to print."""
    assert shown([[1] * 10**6]) == "a list of 1"
    assert shown("x" * 1000) == "'" + "x" * 56 + "..."
    assert shown(1 << 10**6) == "an integer of 1000001 bits"
    assert named(["a\x1b[2J", "b"]) == "'a\\x1b[2J', b"
    assert named([str(i) for i in range(30)]).endswith("19 and 10 more")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SmolLM2 135M Instruct", "smollm2-135m-instruct"),
        ("../../etc", "etc"),
        ("日本", "fallback"),
        (None, "fallback"),
        ("v1.5-", "v1.5"),
        ("x" * 100, "x" * 64),
    ],
)
def test_names_are_fit_for_folders(text: str | None, expected: str) -> None:
    """Lower case, no separators, never empty."""
    assert slug(text, "Fallback!") == expected


def test_a_name_is_never_empty() -> None:
    """Even if nothing usable was given."""
    assert slug("..", "//") == "model"


def test_the_users_context_wins() -> None:
    """Over the published one; the tables' size is bounded for both."""
    assert choose_context(None, 64, 8, "x") == 64
    assert choose_context(128, 64, 8, "x") == 128
    with pytest.raises(BadCheckpoint, match="1048576 positions of head size 4096 need rotary"):
        choose_context(None, 1 << 20, 4096, "x")
