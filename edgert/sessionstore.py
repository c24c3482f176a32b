"""What all kinds of saved work share on disk: a sealed file, maybe encrypted, and a checked header.

docs/session.md is the format. Reading proves that the file is whole and of a kind and version that
is known; what its header says is the business of `sessionfile` and `solvingfile`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import BadSession, NewerFormat, OutOfMemory, UsageError
from edgert.files import without_waiting, write_atomic
from edgert.tensors import Array, Sealed, Unsound, check_seal, read_sealed, sealed_chunks
from edgert.vault import Key, is_locked, lock, unlock

MAX_FILE_BYTES = 8 << 30
MAX_TEXT_BYTES = 4 << 20  # all of the header but the list of tensors
MAX_DATA_DEPTH = 64
SESSION, SOLVING = "session", "solving"
VERSIONS = {SESSION: 1, SOLVING: 2}
"""Kind -> the first version of the format that has it: a kind is written as that version."""

_START = b'{"__metadata__":{"edgert":"session",'
_VERSION = re.compile(rb'"format_version":"([0-9]{1,6})"')


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
class Stored:
    """A kind, its header as JSON gives it back, and the tensors in the file's order."""

    kind: str
    header: dict[str, Any]
    arrays: dict[str, Array]


def write_stored(path: Path, stored: Stored, key: Key | None, too_large: str) -> int:
    """Write the file whole or not at all, mode 0600; its size in bytes.

    too_large  what to do about a header that is
    Raises UsageError (it is), EdgertError (the system's reason: the old file stays),
    MissingDependency (a key without the `crypto` extra).
    """
    kind = stored.kind
    text = json.dumps(stored.header, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_TEXT_BYTES:
        raise UsageError(
            f"the session's settings and data take {len(text):,} bytes, "
            f"{MAX_TEXT_BYTES:,} are allowed",
            do=too_large,
        )
    texts = {"edgert": "session", "format_version": str(VERSIONS[kind]), kind: text}
    chunks = sealed_chunks(texts, stored.arrays)
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


def read_stored(path: Path, key: Key | None, again: str) -> Stored:
    """What is in a file, which is not changed. `again` says what to do about one that is damaged.

    Raises BadSession (no such file, damaged, cut off), NewerFormat, WrongKey, MissingDependency
    (encrypted, and no `crypto` extra), OutOfMemory.
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
        version, newest = _VERSION.match(data, 8 + len(_START)), max(VERSIONS.values())
        if version and int(version[1]) > newest:
            check_seal(data)  # the rest may be what only a newer edgert understands
            raise NewerFormat(
                f"the session was saved by a newer edgert: format version {int(version[1])}, this "
                f"one reads up to {newest}",
                where=str(path),
                do="pip install --upgrade edgert",
            )
        return _stored(read_sealed(data))
    except Unsound as error:
        raise unsound(str(error), path, again) from None
    except MemoryError as error:
        raise OutOfMemory(
            "the session does not fit in memory", where=str(path), do="free memory, then try again"
        ) from error


def unsound(why: str, path: Path, again: str) -> BadSession:
    return BadSession(f"not a sound session file: {why}", where=str(path), do=again)


def _stored(sealed: Sealed) -> Stored:
    kinds = [kind for kind in VERSIONS if sealed.texts.keys() == {"edgert", "format_version", kind}]
    if not kinds:
        raise Unsound("its header has other parts than edgert writes")
    kind = kinds[0]
    if sealed.texts["format_version"] != str(VERSIONS[kind]):
        raise Unsound(f"format_version is {ascii(sealed.texts['format_version'])[:40]}")
    try:
        header = json.loads(sealed.texts[kind])
        if json.dumps(header, separators=(",", ":"), allow_nan=False) != sealed.texts[kind]:
            raise ValueError
    except (ValueError, RecursionError):
        raise Unsound("its header is not JSON as edgert writes it") from None
    if nests(header, MAX_DATA_DEPTH + 1):
        raise Unsound(f"its header nests deeper than {MAX_DATA_DEPTH}")
    return Stored(kind, header, dict(sealed.arrays))


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


def nests(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return most == 0 or any(nests(part, most - 1) for part in value)


Check = Callable[[Any], bool]


def record(where: str, value: Any, keys: Mapping[str, Check]) -> dict[str, Any]:
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


def line(most: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= most and value.isprintable()


def count(limit: int) -> Check:
    return lambda value: type(value) is int and 0 <= value < limit


def integers(least: int, most: int, limit: int) -> Check:
    """A list of `least` to `most` integers in [0, limit)."""
    one = count(limit)
    return lambda value: (
        isinstance(value, list) and least <= len(value) <= most and all(map(one, value))
    )


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _is_place(value: Any) -> bool:
    short = line(200)
    return (
        isinstance(value, dict)
        and len(value) <= 32
        and all(short(key) and short(text) for key, text in value.items())
    )


COMMON: dict[str, Check] = {
    "written_by": line(100),
    "created": line(40),
    "bundle": is_object,
    "place": _is_place,
}
"""The keys that the header of every kind has."""

_BUNDLE: dict[str, Check] = {
    "name": line(64),
    "model_id": is_id,
    "variant": line(64),
    "variant_id": is_id,
    "path": or_none(line(4096)),
    "relative": or_none(line(4096)),
}


def bundle_hint(value: Any) -> BundleHint:
    """The `bundle` of a header. Raises Unsound."""
    return BundleHint(**record("bundle", value, _BUNDLE))
