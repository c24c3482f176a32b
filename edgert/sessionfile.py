"""A session on disk: what its header says, checked field by field. docs/session.md is the format.

Reading proves that the file is whole and that its header makes sense in itself; whether it fits a
model is `Session.restore`'s question, and where the model is, `edgert.resume`'s.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadBundle, BadSession, EdgertError, NewerFormat, OutOfMemory, UsageError
from edgert.files import without_waiting, write_atomic
from edgert.sampler import SamplingParams
from edgert.tensors import Array, Sealed, Unsound, check_seal, read_sealed, sealed_chunks
from edgert.vault import Key, is_locked, lock, unlock

FORMAT_VERSION = 1
MAX_FILE_BYTES = 8 << 30
MAX_DATA_BYTES = 1 << 20
MAX_DATA_DEPTH = 64
MAX_TEXT_BYTES = 4 << 20  # all of the header but the list of tensors
MAX_TOKENS = 1 << 24
_START = b'{"__metadata__":{"edgert":"session",'
_VERSION = re.compile(rb'"format_version":"([0-9]{1,6})"')
_AGAIN = "take an older copy, or start a new session"

_LATER = {"halt"}  # settings that the first version of the format did not have

FINISH_REASONS = ("stop", "length", "deadline", "cancelled")


@dataclass(frozen=True)
class BundleHint:
    """Which variant of which bundle the state belongs to, and where that bundle was last seen."""

    name: str
    model_id: str
    variant: str
    variant_id: str
    path: str | None
    relative: str | None  # seen from the session file's folder


@dataclass(frozen=True)
class Request:
    """The newest request: what going on without a new prompt goes on with.

    `params` has its seed filled in. The answer so far is `tokens[start:]`; it ends at `end` tokens
    at the latest, and `finish_reason` is None if it was left before its end.
    """

    params: SamplingParams
    start: int
    end: int
    finish_reason: str | None = None


@dataclass(frozen=True)
class SavedSession:
    """All that a session file holds.

    tokens     int64 [N], by either side
    states     the filled part of every state of one row, by name
    pending    logits float32 [V] and their argmax, where the newest token is in the state already
    capacity   rows that the append states had room for
    stream     mixed into every draw; another one in each fork. `forks` counts those made
    place      backend, version, machine, threads: where continuing is bitwise
    data       the application's own
    """

    bundle: BundleHint
    tokens: NDArray[np.int64]
    states: dict[str, Array]
    capacity: int
    pending: tuple[NDArray[np.float32], int] | None = None
    request: Request | None = None
    stream: int = 0
    forks: int = 0
    place: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    written_by: str = ""
    created: str = ""


def write_session(path: Path, saved: SavedSession, key: Key | None = None) -> int:
    """Write the file whole or not at all, mode 0600; its size in bytes.

    Raises UsageError (data that is not JSON; data or settings too large), EdgertError (the
    system's reason: the old file stays), MissingDependency (a key without the `crypto` extra).
    """
    texts = {
        "edgert": "session",
        "format_version": str(FORMAT_VERSION),
        "session": json.dumps(_header(saved), separators=(",", ":"), allow_nan=False),
    }
    if len(texts["session"]) > MAX_TEXT_BYTES:
        raise UsageError(
            f"the session's settings and data take {len(texts['session']):,} bytes, "
            f"{MAX_TEXT_BYTES:,} are allowed",
            do="bias fewer tokens (logit_bias), or keep less in session.data",
        )
    arrays: dict[str, Array] = {"tokens": saved.tokens}
    arrays |= {f"state.{name}": array for name, array in saved.states.items()}
    if saved.pending is not None:
        arrays["pending.logits"] = saved.pending[0]
    chunks = sealed_chunks(texts, arrays)
    size = 0

    def write(file: Any) -> None:
        nonlocal size
        for chunk in chunks:
            size += file.write(chunk)

    if key is None:
        write_atomic(path, write, mode=0o600)
        return size
    locked = lock(b"".join(chunks), key)
    write_atomic(path, locked, mode=0o600)
    return len(locked)


def read_session(path: Path, key: Key | None = None) -> SavedSession:
    """The session in a file, which is not changed.

    Raises BadSession (not a session, damaged, cut off, senseless), NewerFormat, WrongKey,
    MissingDependency (encrypted, and no `crypto` extra), OutOfMemory.
    """
    try:
        data = _read_whole(path)
        if is_locked(data):
            data = unlock(data, key, str(path))
        elif key is not None:
            raise UsageError(
                "the session is not encrypted, and a key is given",
                where=str(path),
                do="leave the key out",
            )
        if data[8 : 8 + len(_START)] != _START:
            raise Unsound("it does not begin as a session file does")
        version = _VERSION.match(data, 8 + len(_START))
        if version and int(version[1]) > FORMAT_VERSION:
            check_seal(data)  # the rest may be what only a newer edgert understands
            raise NewerFormat(
                f"the session was saved by a newer edgert: format version {int(version[1])}, this "
                f"one reads up to {FORMAT_VERSION}",
                where=str(path),
                do="pip install --upgrade edgert",
            )
        return _saved(read_sealed(data))
    except Unsound as error:
        raise BadSession(f"not a sound session file: {error}", where=str(path), do=_AGAIN) from None
    except MemoryError as error:
        raise OutOfMemory(
            "the session does not fit in memory", where=str(path), do="free memory, then try again"
        ) from error


def _read_whole(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadSession("a session is a regular file, and this is not", where=str(path))
            if found.st_size > MAX_FILE_BYTES:
                raise Unsound(f"it has {found.st_size:,} bytes, {MAX_FILE_BYTES:,} are allowed")
            start = file.read(8 + len(_START))
            if not (is_locked(start) or start[8:] == _START):  # before reading gigabytes of it
                raise Unsound("it does not begin as a session file does")
            file.seek(0)
            return file.read(found.st_size)
    except FileNotFoundError:
        raise BadSession(
            "there is no such session file", where=str(path), do="check the path"
        ) from None
    except OSError as error:
        raise BadSession(
            f"the session cannot be read: {error.strerror}", where=str(path)
        ) from error


def checked_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data as JSON gives it back. Raises UsageError if it is not JSON, or too large."""
    try:
        text = json.dumps(data, allow_nan=False)
        back = json.loads(text)
        if not isinstance(data, dict) or len(text) > MAX_DATA_BYTES:
            raise ValueError(f"a dict of at most {MAX_DATA_BYTES:,} bytes of JSON is wanted")
        if _nests(back, MAX_DATA_DEPTH):
            raise ValueError(f"it nests deeper than {MAX_DATA_DEPTH}")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the session's data cannot be saved: {error}",
            do="keep in session.data only what JSON can hold",
        ) from error
    return dict(back)


def _nests(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return most == 0 or any(_nests(part, most - 1) for part in value)


def _header(saved: SavedSession) -> dict[str, Any]:
    request = saved.request
    return {
        "written_by": saved.written_by,
        "created": saved.created,
        "bundle": asdict(saved.bundle),
        "place": saved.place,
        "capacity": saved.capacity,
        "stream": saved.stream,
        "forks": saved.forks,
        "pending": None if saved.pending is None else saved.pending[1],
        "request": request
        and {
            "params": _params(request.params),
            "start": request.start,
            "end": request.end,
            "finish_reason": request.finish_reason,
        },
        "data": checked_data(saved.data),
    }


def _params(params: SamplingParams) -> dict[str, Any]:
    """The settings; those that came later than the format are left out where they are unset, so
    that older versions read the file, too."""
    return {k: v for k, v in asdict(params).items() if k not in _LATER or v is not None}


def _saved(sealed: Sealed) -> SavedSession:
    if sealed.texts.keys() != {"edgert", "format_version", "session"}:
        raise Unsound("its header has other parts than edgert writes")
    if sealed.texts["format_version"] != str(FORMAT_VERSION):
        raise Unsound(f"format_version is {ascii(sealed.texts['format_version'])[:40]}")
    try:
        header = json.loads(sealed.texts["session"])
        if json.dumps(header, separators=(",", ":"), allow_nan=False) != sealed.texts["session"]:
            raise ValueError
    except (ValueError, RecursionError):
        raise Unsound("its header is not JSON as edgert writes it") from None
    if _nests(header, MAX_DATA_DEPTH + 1):
        raise Unsound(f"its header nests deeper than {MAX_DATA_DEPTH}")
    got = _record("session", header, _HEADER)
    arrays = dict(sealed.arrays)
    tokens: Any = arrays.pop("tokens", np.zeros(0))
    if tokens.dtype != np.int64 or tokens.ndim != 1 or tokens.size > MAX_TOKENS:
        raise Unsound(f"its tokens are {tokens.dtype} of shape {tokens.shape}")
    logits: Any = arrays.pop("pending.logits", None)
    if (logits is None) != (got["pending"] is None):
        raise Unsound("it has pending logits without their token, or the reverse")
    if logits is not None and (logits.dtype != np.float32 or logits.ndim != 1):
        raise Unsound(f"its pending logits are {logits.dtype} of shape {logits.shape}")
    strays = [name for name in arrays if not name.startswith("state.")]
    if strays:
        raise Unsound(f"tensor {ascii(strays[0])} is unknown")
    return SavedSession(
        bundle=BundleHint(**_record("bundle", got["bundle"], _BUNDLE)),
        tokens=tokens,
        states={name.removeprefix("state."): array for name, array in arrays.items()},
        capacity=got["capacity"],
        pending=None if logits is None else (logits, got["pending"]),
        request=None if got["request"] is None else _request(got["request"], tokens.size),
        stream=got["stream"],
        forks=got["forks"],
        place=got["place"],
        data=got["data"],
        written_by=got["written_by"],
        created=got["created"],
    )


def _request(value: Any, tokens: int) -> Request:
    got = _record("request", value, _REQUEST)
    names = {known.name for known in fields(SamplingParams)}
    first = names - _LATER
    if not first <= got["params"].keys() <= names or got["params"]["seed"] is None:
        raise Unsound("request.params are not the settings of this version")
    try:
        params = SamplingParams.from_mapping(got["params"])
    except (BadBundle, EdgertError) as error:
        raise Unsound(f"request.params: {error.what}") from None
    if got["start"] > tokens:
        raise Unsound(f"request.start is {got['start']} of {tokens} tokens")
    return Request(params, got["start"], got["end"], got["finish_reason"])


Check = Callable[[Any], bool]


def _record(where: str, value: Any, keys: Mapping[str, Check]) -> dict[str, Any]:
    """An object with exactly these keys, each passing its check; Unsound naming all that do not."""
    if not isinstance(value, dict):
        raise Unsound(f"{where} is not an object")
    wrong = [f"{where}.{ascii(key)[1:-1][:40]} is unknown" for key in value if key not in keys]
    for key, check in keys.items():
        if key not in value:
            wrong.append(f"{where}.{key} is missing")
        elif not check(value[key]):
            wrong.append(f"{where}.{key} cannot be {ascii(value[key])[:40]}")
    if wrong:
        raise Unsound("; ".join(wrong[:8]))
    return value


def _line(most: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= most and value.isprintable()


def _count(limit: int) -> Check:
    return lambda value: type(value) is int and 0 <= value < limit


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _is_place(value: Any) -> bool:
    short = _line(200)
    return (
        isinstance(value, dict)
        and len(value) <= 32
        and all(short(key) and short(text) for key, text in value.items())
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_HEADER: dict[str, Check] = {
    "written_by": _line(100),
    "created": _line(40),
    "bundle": _is_object,
    "place": _is_place,
    "capacity": lambda value: type(value) is int and 1 <= value <= MAX_TOKENS,
    "stream": _count(2**64),
    "forks": _count(2**53),
    "pending": _or_none(_count(2**31)),
    "request": _or_none(_is_object),
    "data": _is_object,
}
_BUNDLE: dict[str, Check] = {
    "name": _line(64),
    "model_id": _is_id,
    "variant": _line(64),
    "variant_id": _is_id,
    "path": _or_none(_line(4096)),
    "relative": _or_none(_line(4096)),
}
_REQUEST: dict[str, Check] = {
    "params": _is_object,
    "start": _count(MAX_TOKENS),
    "end": _count(2**33),
    "finish_reason": lambda value: value is None or value in FINISH_REASONS,
}
