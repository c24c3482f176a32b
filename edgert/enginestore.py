"""Compiled engines in the user's cache, each signed with a key that only this user has.

Deserializing an engine is running native code, so one is used only if it was built here: its file
is authenticated with HMAC-SHA256 under a key of 32 random bytes, `engine.key`, mode 0600.

    16  "edgert-engine-1\\n"
    32  HMAC-SHA256 of all that follows
     8  length of the header, little-endian
     n  header: JSON; its "made_for" says exactly what the engine is of
     m  the engine

Losing any of it costs a build, nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgert.cache import cache_dir
from edgert.errors import BadFile, EdgertError, Incompatible
from edgert.files import read_regular, write_atomic

MAGIC = b"edgert-engine-1\n"
MAX_BYTES = 16 << 30
MAX_HEADER = 1 << 20
KEY_BYTES = 32
_START = len(MAGIC) + 32
_REBUILD = "build it again:  edgert build"


@dataclass(frozen=True)
class Fingerprint:
    """What an engine is of. Two that differ in anything here are two engines.

    files     SHA-256 of the graph file and its weight files
    recipe    SHA-256 of the shape profiles and limits it is built with
    compiler  module and exact version
    sm        compute capability it is compiled for
    """

    variant_id: str
    graph: str
    files: tuple[str, ...]
    target: str
    recipe: str
    compiler: str
    sm: str

    @property
    def name(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Stored:
    """A file that says of itself what it is of; `read_engine` finds out whether that is so.

    signature  its MAC, shortened: no two engines have the same
    modified   in nanoseconds
    """

    path: Path
    made_for: dict[str, Any]
    signature: str
    modified: int


def stored_engines(variant_id: str, compiler: str, sm: str) -> list[Stored]:
    """The engines of a variant for a compiler and a kind of device, as their headers say."""
    found = []
    for path in sorted(engines_folder().glob("*.engine")):
        try:
            header = _header(path)
            made_for = dict(header[1]["made_for"])
            wanted = (variant_id, compiler, sm)
            if tuple(made_for.get(key) for key in ("variant_id", "compiler", "sm")) != wanted:
                continue
            if {"graph", "files"} <= made_for.keys():
                modified = path.stat().st_mtime_ns
                found.append(Stored(path, made_for, header[0], modified))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not one of ours
            continue
    return found


def _header(path: Path) -> tuple[str, dict[str, Any]]:
    """Signature and header of a file, not authenticated. Raises ValueError and others."""
    with path.open("rb") as file:
        start = file.read(_START + 8)
        length = int.from_bytes(start[_START:], "little")
        if not start.startswith(MAGIC) or len(start) != _START + 8 or length > MAX_HEADER:
            raise ValueError("not an engine")
        return start[len(MAGIC) : len(MAGIC) + 8].hex(), json.loads(file.read(length))


def engine_path(made_for: Fingerprint) -> Path:
    return engines_folder() / f"{made_for.name}.engine"


def timings_path(compiler: str, sm: str) -> Path:
    """Where a compiler's timings for a kind of device are kept; signed like an engine."""
    return engines_folder() / f"timings-{_slug(compiler)}-sm{_slug(sm)}.engine"


def write_engine(path: Path, made_for: Mapping[str, Any], facts: Any, engine: bytes) -> None:
    """Publish in one piece: a build that is interrupted leaves what was there before.

    Raises EdgertError if the cache cannot be written.
    """
    header = json.dumps({"made_for": dict(made_for), "facts": facts}, sort_keys=True).encode()
    if len(header) > MAX_HEADER:
        raise EdgertError(f"the engine's header has {len(header):,} bytes", where=str(path))
    parts = [len(header).to_bytes(8, "little"), header, engine]

    def write(file: BinaryIO) -> None:
        file.write(MAGIC + _mac(own_key(), parts))
        for part in parts:
            file.write(part)

    write_atomic(path, write, mode=0o600)


def read_engine(path: Path, made_for: Mapping[str, Any]) -> tuple[Any, bytes] | None:
    """Facts and engine, if they were built here for exactly this; None if there are none.

    Raises Incompatible for an engine of somebody else, or for something else; BadFile for a damaged
    one; both before any library sees it.
    """
    if not os.path.lexists(path):
        return None
    _refuse_foreign(path)
    data = read_regular(path, MAX_BYTES)
    if not data.startswith(MAGIC) or len(data) < _START + 8:
        raise BadFile("it is not an engine of edgert", where=str(path), do=_REBUILD)
    body = memoryview(data)[_START:]
    if not hmac.compare_digest(data[len(MAGIC) : _START], _mac(own_key(), [body])):
        raise Incompatible(
            "the engine was not built here by this user, or is damaged",
            where=str(path),
            do=_REBUILD,
        )
    length = int.from_bytes(body[:8], "little")
    header = json.loads(bytes(body[8 : 8 + length]))  # ours: it is authentic
    if header["made_for"] != json.loads(json.dumps(dict(made_for))):
        raise Incompatible("the engine was built for something else", where=str(path), do=_REBUILD)
    return header["facts"], bytes(body[8 + length :])


def own_key() -> bytes:
    """The key of this user's cache, made when it is first needed.

    Raises EdgertError where it cannot be made, Incompatible where others can read it.
    """
    path = cache_dir() / "engine.key"
    if not os.path.lexists(path):
        _make_key(path)
    _refuse_foreign(path, private=True)
    key = read_regular(path, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise Incompatible(
            f"the key of the engine cache has {len(key)} bytes instead of {KEY_BYTES}",
            where=str(path),
            do="remove it and build the engines again",
        )
    return key


def _make_key(path: Path) -> None:
    """Two processes at once must end with the same key: the first one's."""
    temp = path.with_name(f"{path.name}.{os.urandom(6).hex()}")
    write_atomic(temp, os.urandom(KEY_BYTES), mode=0o600)
    try:
        os.link(temp, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise EdgertError(
            f"cannot make the key of the engine cache: {error.strerror}",
            where=str(path),
            do="set EDGERT_CACHE_DIR to a directory on a disk of this machine",
        ) from error
    finally:
        temp.unlink(missing_ok=True)


def _refuse_foreign(path: Path, private: bool = False) -> None:
    """Who can write it could sign or exchange it; of a key, who can read it as well."""
    what = "the key of the engine cache" if private else "the engine"
    info = os.lstat(path)
    others = stat.S_IRWXG | stat.S_IRWXO if private else stat.S_IWGRP | stat.S_IWOTH
    if info.st_uid != os.geteuid() or info.st_mode & others:
        raise Incompatible(
            f"{what} is not this user's alone",
            where=str(path),
            do="remove it and build the engines again",
        )


def _mac(key: bytes, parts: list[Any]) -> bytes:
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(part)
    return mac.digest()


def engines_folder() -> Path:
    folder = cache_dir() / "engines"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EdgertError(
            f"the engine cache cannot be created: {error.strerror}",
            where=str(folder),
            do="set EDGERT_CACHE_DIR to a directory that you can write",
        ) from error
    return folder


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in text)
