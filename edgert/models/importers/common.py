"""What every importer shares: its result, and careful reading of untrusted configuration.

Importers gather all problems of a file and raise them once, sorted, so that a broken file needs one
look and not one look per problem.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import BadCheckpoint, EdgertError, UnsupportedModel, UsageError
from edgert.models.decoder import Decoder
from edgert.models.hagi.model import HAGI
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.model import HRM

Progress = Callable[[int, int], None]
"""Called with (blocks read, blocks in all) after each block."""

ACCEPTED = (
    "accepted are: a HAGI checkpoint (step-*.pt), an HRM checkpoint (step_<n> or *.pt), a GGUF "
    "file of the llama architecture, "
    "a folder with config.json and safetensors, a run of `edgert train`"
)
MAX_VOCAB = 1 << 22
MAX_WIDTH = 1 << 18  # hidden and intermediate size
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 10
MAX_HEAD_SIZE = 1 << 12
MAX_CONTEXT = 1 << 20
THETA = {"low": 1.0, "high": 1e12}  # rotary base
EPS = {"low": 1e-12, "high": 1.0}  # of the norms
MAX_ROTARY = 1 << 26  # positions * head size / 2: two float32 tables of at most 256 MiB

INTERLEAVED = "interleaved"
PERMUTED = "half-split, permuted at import"

_REQUIRED: Any = object()
_LISTED = 20


@dataclass(frozen=True)
class Imported:
    """A model read from somebody else's file, and what that file says about using it.

    model          in eval mode, float32, without gradients
    name           a short slug, fit for a folder name
    tokenizer_json content of a Hugging Face `tokenizer.json`, or None if the source has none
    byte_offset    without tokenizer_json: text is bytes, each id a byte + this number
    bos            the id the source declares; whether text starts with it is the tokenizer's affair
    sampling       temperature, top_k, top_p, repetition_penalty: those the source publishes
    provenance     JSON-serialisable, file names without folders
    notes          what the user should know but need not act upon
    task           what the puzzles of a model that solves are, such as 'sudoku-4x4'
    """

    model: Decoder | HAGI | HRM | Bidir
    name: str
    tokenizer_json: str | None
    chat_template: str | None
    bos: int | None
    eos: tuple[int, ...]
    sampling: dict[str, Any]
    provenance: dict[str, Any]
    notes: tuple[str, ...]
    byte_offset: int | None = None
    task: str | None = None


class Problems:
    """Everything wrong with one file, which becomes one `error`."""

    def __init__(self, where: str, error: type[EdgertError] = BadCheckpoint) -> None:
        self.where = where
        self.error = error
        self.found: set[str] = set()

    def add(self, problem: str) -> None:
        self.found.add(problem)

    def check(self, what: str, *, do: str | None = None) -> None:
        """Raise `error` with all problems so far, sorted; return if there are none."""
        if not self.found:
            return
        lines = sorted(self.found)
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"... and {len(lines) - _LISTED} more"]
        raise self.error("\n  - ".join([f"{what}:", *lines]), where=self.where, do=do)


class Fields:
    """Typed and bounded reads from an untrusted mapping.

    A bad value becomes a problem and a harmless stand-in; call `problems.check` before using any.
    """

    def __init__(self, data: Mapping[str, Any], problems: Problems, prefix: str = "") -> None:
        self.data, self.problems, self.prefix = data, problems, prefix
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Present and not null: published configs write null for "not set"."""
        return self.data.get(key) is not None

    def _take(self, key: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                self.problems.add(f"{self.prefix}{key} is missing")
                return None
            return default
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> None:
        self.problems.add(f"{self.prefix}{key} is {shown(value)}, not {wanted}")

    def integer(self, key: str, default: int = _REQUIRED, *, high: int, low: int = 1) -> int:
        value = self._take(key, default)
        if value is None:
            return low
        if type(value) is not int or not low <= value <= high:
            self._wrong(key, value, f"an integer from {low} to {high}")
            return low
        return value

    def number(self, key: str, default: float = _REQUIRED, *, low: float, high: float) -> float:
        value = self._take(key, default)
        if value is None:
            return low
        if type(value) not in (int, float) or not low <= value <= high:
            self._wrong(key, value, f"a number from {low:g} to {high:g}")
            return low
        return float(value)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        value = self._take(key, default)
        if value is None:
            return False
        if type(value) is not bool:
            self._wrong(key, value, "true or false")
            return False
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self._take(key, default)
        if value is None or isinstance(value, str):
            return value
        self._wrong(key, value, "text")
        return None

    def section(self, key: str, default: Mapping[str, Any] = _REQUIRED) -> Fields:
        value = self._take(key, default)
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            if value is not None:
                self._wrong(key, value, "a mapping with text keys")
            value = {}
        return Fields(value, self.problems, f"{self.prefix}{key}.")

    def refuse(self, key: str, neutral: tuple[Any, ...], why: str) -> None:
        """Raise UnsupportedModel if `key` is set to anything that changes the mathematics."""
        self.seen.add(key)
        value = self.data.get(key)
        if value is None or any(type(value) is type(n) and value == n for n in neutral):
            return
        raise UnsupportedModel(
            f"{self.prefix}{key} = {shown(value)}: {why}",
            where=self.problems.where,
            do="docs/sources.md lists what is implemented",
        )

    def unknown(self) -> list[str]:
        """The keys that nothing has read, with the section's name."""
        return sorted(f"{self.prefix}{key}" for key in self.data if key not in self.seen)


def shown(value: Any) -> str:
    """A value for a message: short, on one line, whatever it is."""
    if isinstance(value, (list, tuple, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(keys: list[str]) -> str:
    """Untrusted names for a note: a few of them, each short and printable."""
    extra = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return (
        ", ".join(k if k.isprintable() and len(k) <= 80 else shown(k) for k in keys[:_LISTED])
        + extra
    )


def choose_context(asked: int | None, published: int, head_size: int, where: str) -> int:
    """Rows of the rotary tables: the user's choice, else the published one; bounded."""
    if asked is not None and not 1 <= asked <= MAX_CONTEXT:
        raise UsageError(f"a context of {asked} positions is not from 1 to {MAX_CONTEXT}")
    context = published if asked is None else asked
    if context * (head_size // 2) > MAX_ROTARY:
        raise BadCheckpoint(
            f"{context} positions of head size {head_size} need rotary tables above "
            f"{MAX_ROTARY * 8 >> 20} MiB",
            where=where,
            do="give a smaller context",
        )
    return context


def slug(text: str | None, fallback: str) -> str:
    """Lower case letters, digits, dots and dashes, at most 64: fit for a folder name anywhere."""
    for candidate in (text or "", fallback):
        clean = re.sub(r"[^a-z0-9.]+", "-", candidate.lower()).strip("-.")[:64].rstrip("-.")
        if clean:
            return clean
    return "model"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
