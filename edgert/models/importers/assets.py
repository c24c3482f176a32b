"""What comes with a model beside its weights: tokenizer, chat template, special ids, sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import BadFile, BadTokenizer, MissingDependency, UsageError
from edgert.files import read_at_most
from edgert.models.importers.common import MAX_VOCAB, Fields, shown

MAX_TOKENIZER = 64 << 20


@dataclass(frozen=True)
class Assets:
    json: str | None  # tokenizer.json
    chat_template: str | None
    bos: int | None
    eos: tuple[int, ...]
    notes: tuple[str, ...] = ()


def checked_ids(ids: Iterable[Any], vocab_size: int, what: str, where: str) -> tuple[int, ...]:
    """The ids that are set, each once, in order. Raises BadTokenizer for one without a row."""
    found: list[int] = []
    for value in ids:
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise BadTokenizer(
                f"{what} is {shown(value)}, the vocabulary has ids 0 to {vocab_size - 1}",
                where=where,
            )
        if value not in found:
            found.append(value)
    return tuple(found)


def read_text(path: Path, limit: int, error: type[BadFile]) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises `error`."""
    try:
        with path.open("rb") as file:
            data = read_at_most(file, limit + 1)
        if len(data) <= limit:
            return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        reason = f"{path.name} cannot be read: {cause}"
    else:
        reason = f"{path.name} is larger than {limit} bytes"
    raise error(reason, where=str(path))


def read_tokenizer(path: Path, vocab_size: int) -> str:
    """The content of a `tokenizer.json` that the tokenizers library accepts.

    Raises UsageError without such a file, BadTokenizer if it is broken or knows ids that the model
    has no embedding for.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}", do="give the path of a tokenizer.json")
    text = read_text(path, MAX_TOKENIZER, BadTokenizer)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependency("tokenizers", "export", why="it reads tokenizer.json") from error
    try:
        vocab = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except BaseException as error:
        # The library's Rust panics derive from BaseException; they are no reason to die.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadTokenizer(
            f"{path.name} is not a tokenizer.json: {shown(str(error))}", where=str(path)
        ) from error
    highest = max(vocab.values(), default=-1)
    if highest >= vocab_size:
        raise BadTokenizer(
            f"{path.name} knows ids up to {highest}, the model has {vocab_size} embedding rows",
            where=str(path),
            do="give the tokenizer of this model",
        )
    return text


def sampling_defaults(fields: Fields) -> dict[str, Any]:
    """Those of the four settings that are published, checked; problems go to `fields.problems`."""
    found: dict[str, Any] = {}
    if "temperature" in fields:
        found["temperature"] = fields.number("temperature", low=0.0, high=100.0)
    if "top_k" in fields:
        found["top_k"] = fields.integer("top_k", low=0, high=MAX_VOCAB)
    if "top_p" in fields:
        found["top_p"] = fields.number("top_p", low=0.0, high=1.0)
    if "repetition_penalty" in fields:
        found["repetition_penalty"] = fields.number("repetition_penalty", low=1e-3, high=100.0)
    return found
