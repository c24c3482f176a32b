"""Tokenizers from GGUF metadata, and tokenizers given by the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from tokenizers import Tokenizer, models, pre_tokenizers

from edgert.errors import BadTokenizer, UsageError
from edgert.models.importers import gguf_tokenizer, load_source
from edgert.models.importers.assets import Assets

WHERE = "x.gguf"


def metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """All bytes, a few merges, a control token and a user-defined one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["Ġt", "he", "Ġthe", "12", "123", "1234"]
    tokens = ["<end>", *letters, *merged, "<tool>"]
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "123 4"],
        "token_type": [3] + [1] * (len(tokens) - 2) + [4],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    found = {k: v for k, v in (found | changes).items() if v is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def read(keys: dict[str, Any], vocab_size: int = 1000) -> Assets:
    return gguf_tokenizer.read(keys, vocab_size, WHERE)


def tokenizer(keys: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(read(keys).json or "")


def pieces(keys: dict[str, Any], text: str) -> list[str]:
    return tokenizer(keys).encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġthe", "Ġ", "1234", "5"]),
        ("smollm", ["Ġthe", "Ġ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["Ġthe", "Ġ", "123", "4", "5"]),
    ],
)
def test_digits_show_which_pre_tokenizer_is_at_work(pre: str, expected: list[str]) -> None:
    """Whole numbers, single digits, or groups of up to three."""
    assert pieces(metadata(pre), " the 12345") == expected


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
@pytest.mark.parametrize(
    "text", ["", " a  b\n\n", "don't I'M", "日本語 ÄÖ 😀", "\t\r\n x", "١٢٣", "<end>the<tool>"]
)
def test_text_survives(pre: str, text: str) -> None:
    """Byte-level: every text comes back, whatever the split."""
    made = tokenizer(metadata(pre))
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) in (text, f"<end>{text}")


def test_control_tokens_are_special_and_user_tokens_are_not() -> None:
    """Both are one id inside text; only the control token vanishes from what is shown."""
    made = tokenizer(metadata())
    ids = made.encode("he<end>he<tool>").ids
    assert [made.id_to_token(i) for i in ids] == ["he", "<end>", "he", "<tool>"]
    assert made.decode(ids) == "hehe<tool>"


@pytest.mark.parametrize(
    ("pre", "flag", "starts"),
    [
        ("gpt-2", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_text_starts_with_bos_where_the_file_says_so(
    pre: str, flag: bool | None, starts: bool
) -> None:
    """add_bos_token, with llama.cpp's default for each kind; never without special tokens."""
    made = tokenizer(metadata(pre, add_bos_token=flag))
    assert (made.encode("he").ids[0] == 0) is starts
    assert made.encode("he", add_special_tokens=False).tokens == ["he"]


def test_ids_that_end_a_text() -> None:
    """End of text, end of turn and end of message, each once."""
    keys = metadata(eos_token_id=5, eot_token_id=7, eom_token_id=5)
    found = read(keys | {"tokenizer.chat_template": "{{ x }}"})
    assert (found.bos, found.eos, found.chat_template) == (0, (5, 7), "{{ x }}")


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"model": None}, "the file has no tokenizer"),
        ({"model": "llama"}, "tokenizers of the kind 'llama' are not converted"),
        ({"pre": "tekken"}, "the pre-tokenizer 'tekken' is not known"),
        ({"pre": None}, "the pre-tokenizer None is not known"),
        ({"pre": 3}, "the pre-tokenizer 3 is not known"),
    ],
)
def test_other_tokenizers_are_left_to_the_user(changes: dict[str, Any], note: str) -> None:
    """No tokenizer, and a note that says what to give; the ids are still read."""
    found = read(metadata(**changes))
    assert (found.json, found.eos) == (None, (0,))
    assert found.notes == (f"{note}: give a tokenizer.json with --tokenizer FILE",)


def test_an_appended_eos_is_not_imitated() -> None:
    """A prompt that ends with the end of text could not be continued: a note says so."""
    found = read(metadata(add_eos_token=True))
    assert found.notes == ("tokenizer.ggml.add_eos_token is ignored: prompts are left open",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokens": ["a", 1]}, "tokenizer.ggml.tokens is not a list of str"),
        ({"tokens": ["a", "a"]}, "has 2 entries, 1 of them different, for 1000 embedding rows"),
        ({"tokens": [str(i) for i in range(1001)]}, "has 1001 entries, 1001 of them different"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for 264 tokens"),
        ({"token_type": [True]}, "tokenizer.ggml.token_type is not a list of int"),
        ({"merges": ["Ġ zz"]}, "has 'Ġ zz', which does not join two tokens into a third"),
        ({"merges": ["he"]}, "has 'he', which does not join two tokens into a third"),
        ({"merges": ["h t"]}, "has 'h t', which does not join two tokens into a third"),
        ({"eos_token_id": 1000}, "eos_token_id is 1000, the vocabulary has ids 0 to 999"),
        ({"bos_token_id": -1}, "bos_token_id is -1, the vocabulary has ids 0 to 999"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    """Told before the tokenizers library sees it."""
    if "tokens" in changes:
        changes = {"token_type": None, "merges": None} | changes
    with pytest.raises(BadTokenizer, match=message):
        read(metadata(**changes))


def test_a_template_must_be_text() -> None:
    """Any other value is refused."""
    with pytest.raises(BadTokenizer, match="chat_template is 7, not text"):
        read({"tokenizer.chat_template": 7})


CHECKPOINT = next(case for case in cases("hagi") if case.name == "model_a").checkpoint


def given(folder: Path, highest: int) -> Path:
    path = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": highest}, unk_token="a")).save(str(path))
    return path


def test_the_user_may_give_a_tokenizer(tmp_path: Path) -> None:
    """HAGI checkpoints have none: the given file is taken and named in the provenance."""
    path = given(tmp_path, 96)
    imported = load_source(CHECKPOINT, tokenizer=path)
    assert imported.tokenizer_json == path.read_text()
    assert imported.provenance["tokenizer"] == "tokenizer.json"


def test_a_given_tokenizer_must_fit_the_model(tmp_path: Path) -> None:
    """An id above the embedding would be looked up out of range."""
    with pytest.raises(BadTokenizer, match="knows ids up to 97, the model has 97 embedding rows"):
        load_source(CHECKPOINT, tokenizer=given(tmp_path, 97))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "\0"])
def test_a_given_file_must_be_a_tokenizer(content: str, tmp_path: Path) -> None:
    """Whatever the library makes of it, the answer is ours."""
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(BadTokenizer, match=r"t.json is not a tokenizer.json"):
        load_source(CHECKPOINT, tokenizer=path)


def test_a_given_tokenizer_must_exist(tmp_path: Path) -> None:
    """A wrong path is the user's argument, not a broken file."""
    with pytest.raises(UsageError, match="there is no file .*absent.json"):
        load_source(CHECKPOINT, tokenizer=tmp_path / "absent.json")


def test_merges_are_written_in_the_form_that_is_read_fastest() -> None:
    """And the library makes the same of it as of pairs."""
    text = read(metadata("gpt-2")).json or ""
    assert json.loads(text)["model"]["merges"][:2] == ["Ġ t", "h e"]
    assert json.loads(Tokenizer.from_str(text).to_str())["model"]["merges"][1] == ["h", "e"]
