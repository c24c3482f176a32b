"""A session on disk: what its header says, checked field by field. docs/session.md is the format.

Reading proves that the file is whole and that its header makes sense in itself; whether it fits a
model is `Session.restore`'s question, and where the model is, `edgert.resume`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadBundle, BadSession, EdgertError, UsageError
from edgert.halting import AUTO
from edgert.sampler import MOST_GUESSES, SamplingParams
from edgert.sessionstore import (
    COMMON,
    MAX_DATA_DEPTH,
    SESSION,
    BundleHint,
    Check,
    Stored,
    bundle_hint,
    count,
    integers,
    is_id,
    is_object,
    line,
    nests,
    or_none,
    read_stored,
    record,
    unsound,
    write_stored,
)
from edgert.speculate import WINDOW, Record
from edgert.tensors import Array, Unsound
from edgert.vault import Key

MAX_DATA_BYTES = 1 << 20
MAX_TOKENS = 1 << 24
_AGAIN = "take an older copy, or start a new session"

_LATER = {"halt": None, "speculate": AUTO}
"""Settings that the first version of the format did not have, and what they are unless given."""

HOW = ("carried", "recomputed")
MAX_MOVES = 16
"""Those that are kept, the newest ones."""

FINISH_REASONS = ("stop", "length", "deadline", "cancelled")


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
class Move:
    """How a session came to its variant from another one of its model: `edgert migrate`.

    variant, variant_id  where it came from
    how      `carried`: the state is the one that was computed there; `recomputed`: it is not
    tokens   of the session at that time
    The drift says how far the old state was from what the new variant computes itself; its three
    values are None where the layouts of the states differ, or a value is not a number.
    max_abs  largest difference of a state's element
    kl       nats, of the distribution of the next token
    top1     whether the best next token was the same
    """

    variant: str
    variant_id: str
    how: str
    tokens: int
    max_abs: float | None
    kl: float | None
    top1: bool | None
    at: str


@dataclass(frozen=True)
class SavedSession:
    """All that a session file holds.

    tokens     int64 [N], by either side
    states     the filled part of every state of one row, by name
    pending    logits float32 [V] and their argmax, where the newest token is in the state already
    guess      what a step behind the state has read as guesses, where the newest tokens are the
               first of them: the step is repeated where one goes on
    record     outcomes of earlier guesses, see `speculate.Record`
    capacity   rows that the append states had room for
    stream     mixed into every draw; another one in each fork. `forks` counts those made
    place      backend, version, machine, threads: where continuing is bitwise
    data       the application's own
    moves      between variants, the newest last
    """

    bundle: BundleHint
    tokens: NDArray[np.int64]
    states: dict[str, Array]
    capacity: int
    pending: tuple[NDArray[np.float32], int] | None = None
    guess: tuple[int, ...] = ()
    record: tuple[int, ...] = Record.START
    request: Request | None = None
    stream: int = 0
    forks: int = 0
    place: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    written_by: str = ""
    created: str = ""


def write_session(path: Path, saved: SavedSession, key: Key | None = None) -> int:
    """Write the file whole or not at all, mode 0600; its size in bytes.

    Raises UsageError (data that is not JSON; data or settings too large), EdgertError (the
    system's reason: the old file stays), MissingDependency (a key without the `crypto` extra).
    """
    arrays: dict[str, Array] = {"tokens": saved.tokens}
    arrays |= {f"state.{name}": array for name, array in saved.states.items()}
    if saved.pending is not None:
        arrays["pending.logits"] = saved.pending[0]
    return write_stored(
        path,
        Stored(SESSION, _header(saved), arrays),
        key,
        "bias fewer tokens (logit_bias), or keep less in session.data",
    )


def read_session(path: Path, key: Key | None = None) -> SavedSession:
    """The session in a file, which is not changed.

    Raises BadSession (not a session, damaged, cut off, senseless), NewerFormat, WrongKey,
    MissingDependency (encrypted, and no `crypto` extra), OutOfMemory.
    """
    stored = read_stored(path, key, _AGAIN)
    if stored.kind != SESSION:
        raise BadSession(
            "the file holds puzzles that are being solved, no sequence of tokens",
            where=str(path),
            do=f"go on with it:  edgert solve --session {path}",
        )
    return saved_session(stored, path)


def saved_session(stored: Stored, path: Path) -> SavedSession:
    """What a file of this kind holds. Raises BadSession."""
    try:
        return _saved(stored)
    except Unsound as error:
        raise unsound(str(error), path, _AGAIN) from None


def checked_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data as JSON gives it back. Raises UsageError if it is not JSON, or too large."""
    try:
        text = json.dumps(data, allow_nan=False)
        back = json.loads(text)
        if not isinstance(data, dict) or len(text) > MAX_DATA_BYTES:
            raise ValueError(f"a dict of at most {MAX_DATA_BYTES:,} bytes of JSON is wanted")
        if nests(back, MAX_DATA_DEPTH):
            raise ValueError(f"it nests deeper than {MAX_DATA_DEPTH}")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the session's data cannot be saved: {error}",
            do="keep in session.data only what JSON can hold",
        ) from error
    return dict(back)


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
    } | _later(saved)


def _later(saved: SavedSession) -> dict[str, Any]:
    """Left out where there is nothing to tell, so that older versions read the file, too."""
    found: dict[str, Any] = {}
    if saved.guess or saved.record != Record.START:
        found["speculation"] = {"record": list(saved.record), "guess": list(saved.guess)}
    if saved.moves:
        found["moves"] = [asdict(move) for move in saved.moves[-MAX_MOVES:]]
    return found


def _params(params: SamplingParams) -> dict[str, Any]:
    """The settings; those that came later than the format are left out where they are what they
    would be anyway, so that older versions read the file, too."""
    return {k: v for k, v in asdict(params).items() if k not in _LATER or v != _LATER[k]}


def _saved(stored: Stored) -> SavedSession:
    later = _HEADER_LATER.items() if isinstance(stored.header, dict) else ()
    keys = _HEADER | {key: check for key, check in later if key in stored.header}
    got = record("session", stored.header, keys)
    speculation: dict[str, Any] = {}
    if "speculation" in got:
        speculation = record("speculation", got["speculation"], _SPECULATION)
    arrays = dict(stored.arrays)
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
        bundle=bundle_hint(got["bundle"]),
        tokens=tokens,
        states={name.removeprefix("state."): array for name, array in arrays.items()},
        capacity=got["capacity"],
        pending=None if logits is None else (logits, got["pending"]),
        guess=tuple(speculation.get("guess", ())),
        record=tuple(speculation.get("record", Record.START)),
        request=None if got["request"] is None else _request(got["request"], tokens.size),
        stream=got["stream"],
        forks=got["forks"],
        place=got["place"],
        data=got["data"],
        moves=tuple(Move(**record("moves", move, _MOVE)) for move in got.get("moves", ())),
        written_by=got["written_by"],
        created=got["created"],
    )


def _request(value: Any, tokens: int) -> Request:
    got = record("request", value, _REQUEST)
    names = {known.name for known in fields(SamplingParams)}
    first = names - _LATER.keys()
    if not first <= got["params"].keys() <= names or got["params"]["seed"] is None:
        raise Unsound("request.params are not the settings of this version")
    try:
        params = SamplingParams.from_mapping(got["params"])
    except (BadBundle, EdgertError) as error:
        raise Unsound(f"request.params: {error.what}") from None
    if got["start"] > tokens:
        raise Unsound(f"request.start is {got['start']} of {tokens} tokens")
    return Request(params, got["start"], got["end"], got["finish_reason"])


def _is_size(value: Any) -> bool:
    return type(value) is float and 0.0 <= value < math.inf


_HEADER: dict[str, Check] = COMMON | {
    "capacity": lambda value: type(value) is int and 1 <= value <= MAX_TOKENS,
    "stream": count(2**64),
    "forks": count(2**53),
    "pending": or_none(count(2**31)),
    "request": or_none(is_object),
    "data": is_object,
}
_HEADER_LATER: dict[str, Check] = {
    "speculation": is_object,
    "moves": lambda value: isinstance(value, list) and 1 <= len(value) <= MAX_MOVES,
}
"""Keys that are there only where they tell something, so that older versions read other files."""

_SPECULATION: dict[str, Check] = {
    "record": integers(len(Record.START), len(Record.START), 1 << WINDOW),
    "guess": integers(0, MOST_GUESSES, 2**31),
}
_MOVE: dict[str, Check] = {
    "variant": line(64),
    "variant_id": is_id,
    "how": lambda value: value in HOW,
    "tokens": count(MAX_TOKENS),
    "max_abs": or_none(_is_size),
    "kl": or_none(_is_size),
    "top1": or_none(lambda value: isinstance(value, bool)),
    "at": line(40),
}
_REQUEST: dict[str, Check] = {
    "params": is_object,
    "start": count(MAX_TOKENS),
    "end": count(2**33),
    "finish_reason": lambda value: value is None or value in FINISH_REASONS,
}
