"""A session's file: every field comes back, every bit of damage is refused, and so is nonsense."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import PROMPT, VOCAB, A, fake_model

from edgert import files
from edgert.errors import (
    BadSession,
    EdgertError,
    MissingDependency,
    NewerFormat,
    UsageError,
    WrongKey,
)
from edgert.sampler import SamplingParams
from edgert.session import Session
from edgert.sessionfile import (
    MAX_DATA_BYTES,
    MAX_DATA_DEPTH,
    MAX_MOVES,
    BundleHint,
    Move,
    Request,
    SavedSession,
    read_session,
    write_session,
)
from edgert.speculate import Record
from edgert.vault import Key

KEY = Key(bytes(range(32)), 1)
DATA = {"name": "Zoë", "turns": [1, 2.5, None, True, {"deep": []}], "1": "text"}
SAVED = SavedSession(
    bundle=BundleHint("fake", "ab" * 32, "fp32-ort", "cd" * 32, "/a/b", "../b"),
    tokens=np.array([5, 3, 257, 9]),
    states={"lens": np.array([4]), "kept": np.array([[5, 3, 257, 9]])},
    capacity=256,
    pending=(np.linspace(-1, 1, VOCAB, dtype=np.float32), VOCAB - 1),
    guess=(3, 257, 9, 5),
    record=(0, 85, 255),
    request=Request(
        SamplingParams(
            max_tokens=7,
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.1,
            repetition_window=64,
            logit_bias={3: -1e9, 200: 0.5},
            logprobs=2,
            seed=2**64 - 1,
            stream=9,
            stop=("\n", "ende"),
            stop_tokens=(1,),
            ignore_eos=True,
            deadline_ms=1500.5,
        ),
        start=2,
        end=9,
        finish_reason="cancelled",
    ),
    stream=2**64 - 1,
    forks=3,
    place={"backend": "fake", "threads": "2"},
    data=DATA,
    moves=(
        Move("int4-ort", "ef" * 32, "carried", 3, 0.25, 0.0, True, "2026-01-01T00:00:00Z"),
        Move("int8-ort", "ab" * 32, "recomputed", 4, None, None, None, "2026-01-02T00:00:00Z"),
    ),
    written_by="edgert 0.0.1",
    created="2026-01-02T03:04:05Z",
)


def file_of(saved: SavedSession, path: Path, key: Key | None = None) -> bytes:
    write_session(path, saved, key)
    return path.read_bytes()


def resealed(content: bytes) -> bytes:
    """A file with these bytes, whose seal is right."""
    return content + hashlib.sha256(content).digest()


def edited(
    data: bytes,
    header: Callable[[dict[str, Any]], object] = lambda header: None,
    table: Callable[[dict[str, Any]], object] = lambda table: None,
    body: Callable[[bytes], bytes] = lambda body: body,
) -> bytes:
    """A session file with its header, its list of tensors or their bytes changed, sealed anew."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    inner = json.loads(entries["__metadata__"]["session"])
    inner = header(inner) or inner
    entries["__metadata__"]["session"] = (
        inner if isinstance(inner, str) else json.dumps(inner, separators=(",", ":"))
    )
    table(entries)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return resealed(len(text).to_bytes(8, "little") + text + body(data[8 + size : -32]))


def refusal(path: Path, data: bytes, kind: type[EdgertError] = BadSession) -> EdgertError:
    """What reading these bytes says. The file is opened as it is and stays so, to the byte."""
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        read_session(path)
    assert path.read_bytes() == data
    assert type(caught.value) is kind
    return caught.value


def small_session() -> Session:
    session = fake_model().session()
    session.generate(PROMPT, max_tokens=4)
    return session


# What is written comes back


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_every_field_comes_back(tmp_path, key):
    size = write_session(tmp_path / "s", SAVED, key)
    back = read_session(tmp_path / "s", key)
    assert size == (tmp_path / "s").stat().st_size
    assert back.pending is not None
    assert SAVED.pending is not None
    assert back.pending[0].tobytes() == SAVED.pending[0].tobytes()
    assert back.pending[1] == SAVED.pending[1]
    for name, array in SAVED.states.items():
        assert np.array_equal(back.states[name], array)
    assert np.array_equal(back.tokens, SAVED.tokens)
    rest = {"tokens": None, "states": {}, "pending": None}
    assert replace(back, **rest) == replace(SAVED, **rest)


def test_a_session_without_anything_comes_back(tmp_path):
    """No request, no results, no data, no paths."""
    bare = replace(
        SAVED,
        pending=None,
        request=None,
        data={},
        moves=(),
        place={},
        bundle=replace(SAVED.bundle, path=None, relative=None),
    )
    write_session(tmp_path / "s", bare)
    back = read_session(tmp_path / "s")
    assert (back.pending, back.request, back.data, back.moves) == (None, None, {}, ())
    assert back.bundle == bare.bundle


def test_what_came_later_is_written_only_where_it_says_something(tmp_path):
    """A session that has not speculated is a file that older versions read."""
    plain = replace(SAVED, guess=(), record=Record.START)
    data = file_of(plain, tmp_path / "s")
    assert b"specul" not in data
    assert b"halt" not in data
    assert read_session(tmp_path / "s").record == Record.START


def test_a_session_that_never_moved_says_nothing_of_it(tmp_path):
    """So that versions which know no moves read it."""
    assert b'\\"moves\\"' in file_of(SAVED, tmp_path / "s")
    assert b"moves" not in file_of(replace(SAVED, moves=()), tmp_path / "s")


def test_only_the_newest_moves_are_kept(tmp_path):
    moves = tuple(replace(SAVED.moves[0], tokens=i) for i in range(MAX_MOVES + 3))
    write_session(tmp_path / "s", replace(SAVED, moves=moves))
    assert read_session(tmp_path / "s").moves == moves[3:]


def test_the_same_session_is_the_same_file(tmp_path):
    assert file_of(SAVED, tmp_path / "a") == file_of(SAVED, tmp_path / "b")


# Damage


def flips_and_cuts(path: Path) -> Iterator[bytes]:
    """The file with each of its 8 x N bits flipped, then cut to each of its N prefixes.

    Yields the content, in place; changed byte by byte, because a file system may flush a file
    that is emptied and written again.
    """
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            byte = bit // 8
            flipped = bytes([data[byte] ^ 1 << bit % 8])
            os.pwrite(file.fileno(), flipped, byte)
            yield data[:byte] + flipped + data[byte + 1 :]
            os.pwrite(file.fileno(), data[byte : byte + 1], byte)
        for size in reversed(range(len(data))):
            os.truncate(file.fileno(), size)
            yield data[:size]
    path.write_bytes(data)


def test_every_flipped_bit_and_every_cut_of_a_session_is_refused(tmp_path):
    """A whole tiny session, 8 x N bits and N prefixes; the file is never changed by reading it."""
    path = tmp_path / "s"
    session = small_session()
    size = session.save(path)
    count = 0
    for damaged in flips_and_cuts(path):
        with pytest.raises(BadSession) as caught:
            read_session(path)
        assert path.read_bytes() == damaged
        count += 1
    assert count == 9 * size > 9000
    assert caught.value.where == str(path)
    assert "older copy, or start a new session" in str(caught.value)
    assert Session.restore(session.model, read_session(path)).tokens == session.tokens


def test_every_flipped_bit_and_every_cut_of_an_encrypted_session_is_refused(tmp_path):
    """With the right passphrase, and in no time: the outer hash is looked at before the key."""
    path, key = tmp_path / "s", Key(b"pass", 0)
    size = write_session(path, replace(SAVED, pending=None, request=None), key)
    count = 0
    for damaged in flips_and_cuts(path):
        with pytest.raises(BadSession):
            read_session(path, key)
        assert path.read_bytes() == damaged
        count += 1
    assert count == 9 * size > 9000
    assert read_session(path, key).data == DATA


@pytest.mark.parametrize("more", [b"\0", b"more", bytes(40)])
def test_a_file_with_more_at_its_end_is_refused(tmp_path, more):
    refusal(tmp_path / "s", file_of(SAVED, tmp_path / "s") + more)


def test_two_files_spliced_are_refused(tmp_path):
    """The state of another moment under this one's header."""
    other = replace(SAVED, states={"lens": np.array([4]), "kept": np.array([[5, 3, 257, 8]])})
    a, b = file_of(SAVED, tmp_path / "a"), file_of(other, tmp_path / "b")
    assert len(a) == len(b)
    for cut in range(8, len(a), 97):
        if a[:cut] + b[cut:] not in (a, b):
            refusal(tmp_path / "s", a[:cut] + b[cut:])


# Nonsense with a right seal


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = to

    return change


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return change


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _moved(**changes: Any) -> dict[str, Any]:
    return asdict(SAVED.moves[0]) | changes


PARAMS = ("request", "params")
SENSELESS = {
    "no such key": (_set("extra", to=1), "session.extra is unknown"),
    "key missing": (_without("capacity"), "session.capacity is missing"),
    "two faults at once": (
        lambda header: header.update(forks=-1, stream="x"),
        "session.stream cannot be 'x'; session.forks cannot be -1",
    ),
    "capacity 0": (_set("capacity", to=0), "session.capacity cannot be 0"),
    "capacity of 2^60": (_set("capacity", to=2**60), "session.capacity cannot be 115"),
    "capacity true": (_set("capacity", to=True), "session.capacity cannot be True"),
    "capacity 1.5": (_set("capacity", to=1.5), "session.capacity cannot be 1.5"),
    "stream of 65 bits": (_set("stream", to=2**64), "session.stream cannot be"),
    "negative stream": (_set("stream", to=-1), "session.stream cannot be -1"),
    "forks of 2^53": (_set("forks", to=2**53), "session.forks cannot be"),
    "pending of 2^31": (_set("pending", to=2**31), "session.pending cannot be"),
    "logits without a token": (_set("pending", to=None), "logits without their token"),
    "bundle that is a list": (_set("bundle", to=[]), "session.bundle cannot be"),
    "bundle key unknown": (_set("bundle", "x", to=1), "bundle.x is unknown"),
    "id too short": (_set("bundle", "variant_id", to="ab"), "bundle.variant_id cannot be 'ab'"),
    "id in capitals": (_set("bundle", "model_id", to="AB" * 32), "bundle.model_id cannot be"),
    "path with a line break": (_set("bundle", "path", to="a\nb"), "bundle.path cannot be"),
    "path with an escape": (_set("bundle", "relative", to="\x1b[2J"), "bundle.relative cannot"),
    "path of a million": (_set("bundle", "path", to="a" * 10**6), "bundle.path cannot be 'aaa"),
    "path with a zero": (_set("bundle", "path", to="a\0b"), "bundle.path cannot be"),
    "half a character": (_set("bundle", "name", to="\ud800"), "bundle.name cannot be"),
    "place of numbers": (_set("place", to={"threads": 2}), "session.place cannot be"),
    "place of 33": (_set("place", to={str(i): "" for i in range(33)}), "session.place cannot be"),
    "data that is a list": (_set("data", to=[1]), "session.data cannot be"),
    "data nested too deep": (_set("data", to={"a": _nested(64)}), "nests deeper than 64"),
    "capacity nested 300": (_set("capacity", to=_nested(300)), "nests deeper than 64"),
    "date of a book": (_set("created", to="x" * 41), "session.created cannot be"),
    "request that is text": (_set("request", to="x"), "session.request cannot be"),
    "request key unknown": (_set("request", "x", to=1), "request.x is unknown"),
    "request beyond the tokens": (_set("request", "start", to=5), "request.start is 5 of 4"),
    "end of 2^40": (_set("request", "end", to=2**40), "request.end cannot be"),
    "reason unknown": (_set("request", "finish_reason", to="tired"), "finish_reason cannot be 't"),
    "reason that is a list": (_set("request", "finish_reason", to=[]), "finish_reason cannot be"),
    "moves of text": (_set("moves", to="x"), "session.moves cannot be 'x'"),
    "no moves": (_set("moves", to=[]), "session.moves cannot be"),
    "17 moves": (_set("moves", to=[{}] * 17), "session.moves cannot be"),
    "a move of text": (_set("moves", to=["x"]), "moves is not an object"),
    "a move by magic": (_set("moves", to=[_moved(how="magic")]), "moves.how cannot be 'magic'"),
    "a move's KL below 0": (_set("moves", to=[_moved(kl=-0.5)]), "moves.kl cannot be -0.5"),
    "a KL of 400 digits": (_set("moves", to=[_moved(kl=10**400)]), "moves.kl cannot be 1000"),
    "a move's id": (_set("moves", to=[_moved(variant_id="x")]), "moves.variant_id cannot be 'x'"),
    "setting unknown": (_set(*PARAMS, "warmth", to=1), "not the settings of this version"),
    "setting missing": (_without(*PARAMS, "top_k"), "not the settings of this version"),
    "no seed": (_set(*PARAMS, "seed", to=None), "not the settings of this version"),
    "temperature 1e9": (_set(*PARAMS, "temperature", to=1e9), "temperature = 1000000000.0"),
    "temperature text": (_set(*PARAMS, "temperature", to="hot"), "temperature = 'hot'"),
    "seed of 400 digits": (_set(*PARAMS, "seed", to=10**400), "seed = 1000"),
    "bias of text": (_set(*PARAMS, "logit_bias", to={"a": 1}), "logit_bias"),
    "bias that is huge": (_set(*PARAMS, "logit_bias", to={"1": 1e300}), "logit_bias"),
    "65 stop strings": (_set(*PARAMS, "stop", to=["a"] * 65), "stop = "),
    "speculation that is text": (_set("speculation", to="x"), "session.speculation cannot be"),
    "speculation key unknown": (_set("speculation", "x", to=1), "speculation.x is unknown"),
    "record missing": (_without("speculation", "record"), "speculation.record is missing"),
    "record of two": (_set("speculation", "record", to=[1, 2]), "speculation.record cannot be"),
    "record of 9 bits": (_set("speculation", "record", to=[1, 2, 256]), "record cannot be"),
    "record of truths": (_set("speculation", "record", to=[True] * 3), "record cannot be"),
    "guess of 17": (_set("speculation", "guess", to=[1] * 17), "speculation.guess cannot be"),
    "guess below 0": (_set("speculation", "guess", to=[-1]), "speculation.guess cannot be"),
    "guess of 2^31": (_set("speculation", "guess", to=[2**31]), "speculation.guess cannot be"),
    "guess of a list": (_set("speculation", "guess", to=[[1]]), "speculation.guess cannot be"),
    "guesses without number": (_set(*PARAMS, "speculate", to=17), "speculate = 17"),
    "a list": (lambda header: [header], "session is not an object"),
    "text": (lambda header: "not json", "not JSON as edgert writes it"),
    "spaces": (lambda header: json.dumps(header), "not JSON as edgert writes it"),
    "a key twice": (
        lambda header: json.dumps(header, separators=(",", ":")).replace("{", '{"forks":0,', 1),
        "not JSON as edgert writes it",
    ),
    "NaN": (
        lambda header: json.dumps(header, separators=(",", ":")).replace(
            '"forks":3', '"forks":NaN'
        ),
        "not JSON as edgert writes it",
    ),
    "infinity": (
        lambda header: json.dumps(header, separators=(",", ":")).replace(
            '"forks":3', '"forks":1e999'
        ),
        "not JSON as edgert writes it",
    ),
    "nested 100,000 deep": (lambda header: "[" * 10**5, "not JSON as edgert writes it"),
    "nested 900 deep, and closed": (
        lambda header: '{"a":' + "[" * 900 + "]" * 900 + "}",
        "nests deeper|not JSON",
    ),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_header_that_makes_no_sense_is_refused_by_name(tmp_path, name):
    """Its seal is right: somebody wrote it so. What cannot be is named, in little memory."""
    change, reason = SENSELESS[name]
    data = edited(file_of(SAVED, tmp_path / "s"), header=change)
    tracemalloc.start()
    try:
        error = refusal(tmp_path / "s", data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert re.search(re.escape(reason) if "|" not in reason else reason, error.what), error.what
    assert len(error.what) < 400
    assert peak < 16e6 + 8 * len(data)


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _with(**changes: Any) -> SavedSession:
    return replace(SAVED, **changes)


TENSORS: dict[str, tuple[SavedSession, str]] = {
    "tokens that are floats": (_with(tokens=np.zeros(4, np.float32)), "tokens are float32"),
    "tokens in two rows": (_with(tokens=np.zeros((2, 2), np.int64)), r"of shape \(2, 2\)"),
    "tokens of 32 bits": (_with(tokens=np.zeros(4, np.int32)), "tokens are int32"),
    "logits of 16 bits": (_with(pending=(np.zeros(9, np.float16), 1)), "logits are float16"),
    "logits in two rows": (_with(pending=(np.zeros((1, 9), np.float32), 1)), "logits are float32"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_kind_are_refused(tmp_path, name):
    saved, reason = TENSORS[name]
    error = refusal(tmp_path / "s", file_of(saved, tmp_path / "s"))
    assert re.search(reason, error.what), error.what


def test_a_tensor_that_is_not_a_sessions_is_refused(tmp_path):
    """Also one of no bytes, and tokens that are not there."""

    def stray(table: dict[str, Any]) -> None:
        seal = table.pop("seal")
        table["weights"] = _entry("U8", [0], seal["data_offsets"][0], seal["data_offsets"][0])
        table["seal"] = seal

    data = edited(file_of(SAVED, tmp_path / "s"), table=stray)
    assert "tensor 'weights' is unknown" in refusal(tmp_path / "s", data).what

    def none(table: dict[str, Any]) -> None:
        for name in ("tokens", "state.lens", "state.kept", "pending.logits"):
            del table[name]
        table["seal"] = _entry("U8", [32], 0, 32)

    data = edited(data, table=lambda t: t.pop("weights") and none(t), body=lambda body: b"")
    assert "its tokens are float64 of shape (0,)" in refusal(tmp_path / "s", data).what


def test_other_parts_of_the_header_are_refused(tmp_path):
    data = edited(
        file_of(SAVED, tmp_path / "s"), table=lambda t: t["__metadata__"].update(more="x")
    )
    assert "other parts than edgert writes" in refusal(tmp_path / "s", data).what


@pytest.mark.parametrize("version", ["0", "01", "-1", "one", "", "1.0", "1" * 400, "\u0661"])
def test_a_version_that_is_none_is_refused(tmp_path, version):
    data = edited(
        file_of(SAVED, tmp_path / "s"),
        table=lambda t: t["__metadata__"].update(format_version=version),
    )
    assert "format_version is" in refusal(tmp_path / "s", data).what


@pytest.mark.parametrize("version", [3, 7, 999999])
def test_a_newer_version_says_so(tmp_path, version):
    """Whatever else is new in it: here a text, and a dtype that this version does not know."""

    def newer(table: dict[str, Any]) -> None:
        table["__metadata__"].update(format_version=str(version), more="x")
        table["tokens"]["dtype"] = "F8_E4M3"

    data = edited(file_of(SAVED, tmp_path / "s"), table=newer)
    error = refusal(tmp_path / "s", data, NewerFormat)
    assert f"format version {version}, this one reads up to 2" in error.what
    assert "pip install --upgrade edgert" in str(error)
    assert error.exit_code == 4
    refusal(tmp_path / "s", data[:-1])  # and a damaged one is damaged


def test_a_newer_encrypted_version_says_so(tmp_path):
    """Both of the container, and of the session inside."""
    data = file_of(SAVED, tmp_path / "s", KEY)
    newer = resealed(data[:-32].replace(b"edgert-locked-1\n", b"edgert-locked-2\n"))
    assert "encrypted by a newer edgert" in refusal(tmp_path / "s", newer, NewerFormat).what
    from edgert.vault import lock

    inside = edited(
        file_of(SAVED, tmp_path / "s"), table=lambda t: t["__metadata__"].update(format_version="3")
    )
    (tmp_path / "s").write_bytes(lock(inside, KEY))
    with pytest.raises(NewerFormat, match="format version 3"):
        read_session(tmp_path / "s", KEY)


# What is no session at all


def _sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


NOT_SESSIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "there is no such session file"),
    "a directory": (Path.mkdir, "cannot be read: Is a directory"),
    "a FIFO": (os.mkfifo, "a session is a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a session is a regular file"),
    "a link in a circle": (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
    "an empty file": (lambda path: path.write_bytes(b""), "does not begin as a session"),
    "text": (lambda path: path.write_text("hello " * 99), "does not begin as a session"),
    "4 GB of zeros": (lambda path: _sparse(path, 4 << 30), "does not begin as a session"),
    "more than 8 GB": (lambda path: _sparse(path, (8 << 30) + 1), "8,589,934,592 are allowed"),
}


@pytest.mark.parametrize("name", NOT_SESSIONS)
def test_what_is_no_session_is_refused_at_once(tmp_path, name):
    """Without waiting for a FIFO's writer, and without reading gigabytes."""
    make, reason = NOT_SESSIONS[name]
    make(tmp_path / "s")
    tracemalloc.start()
    try:
        with pytest.raises(BadSession, match=reason) as caught:
            read_session(tmp_path / "s")
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert caught.value.where == str(tmp_path / "s")
    assert caught.value.exit_code == 3


def test_refused_files_leave_no_descriptor_open(tmp_path):
    (tmp_path / "text").write_text("hello")
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, tmp_path / "text", tmp_path / "none"):
        with pytest.raises(BadSession):
            read_session(path)
    assert os.listdir("/proc/self/fd") == before


# Encryption


def test_keys_and_files_that_do_not_belong_together(tmp_path):
    """A key for a plain file, none or another one for an encrypted one: each its own error."""
    write_session(tmp_path / "plain", SAVED)
    write_session(tmp_path / "locked", SAVED, KEY)
    with pytest.raises(UsageError, match="not encrypted, and a key is given") as usage:
        read_session(tmp_path / "plain", KEY)
    assert "leave the key out" in str(usage.value)
    for key, reason in (
        (None, "encrypted and needs its key file"),
        (Key(b"x" * 32, 1), "this is not its key file"),
        (Key(b"x" * 32, 0), "encrypted and needs its key file"),
    ):
        with pytest.raises(WrongKey, match=reason) as caught:
            read_session(tmp_path / "locked", key)
        assert caught.value.where == str(tmp_path / "locked")


def test_no_plaintext_reaches_the_disk(tmp_path, monkeypatch):
    """Neither in the file nor in the temporary one it was: no token, no word, no number of state.

    The same words are found in the plain file, so the search can find them.
    """
    session = fake_model().session()
    session.data["note"] = "MARKER-7f3a"
    session.generate([A + i for i in range(20)], max_tokens=4)
    tokens = np.array(session.tokens)
    words = [b"MARKER-7f3a", b"__metadata__", b"format_version", b"fp32-ort", b"kept", b"seal"]
    words += [tokens[i : i + 2].tobytes() for i in range(len(tokens) - 1)]
    seen: dict[str, bytes] = {}
    real = os.replace

    def look_first(source: Any, target: Any) -> None:
        seen[os.path.basename(target)] = Path(source).read_bytes()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", look_first)
    (tmp_path / "key").write_bytes(KEY.secret)
    session.save(tmp_path / "plain")
    session.save(tmp_path / "locked", key_file=tmp_path / "key")
    session.save(tmp_path / "word", passphrase="correct horse")
    assert all(word in (tmp_path / "plain").read_bytes() for word in words)
    for name in ("locked", "word"):
        for data in (seen[name], (tmp_path / name).read_bytes()):
            assert not [word for word in words if word in data]
            assert b"correct horse" not in data
            assert KEY.secret not in data


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_failed_write_of_an_encrypted_session_writes_no_plaintext(tmp_path, monkeypatch, key):
    """Whatever was written before the disk was full was what the file would have held."""
    written: list[bytes] = []

    def full(handle: int) -> None:
        for name in os.listdir(tmp_path):
            written.append((tmp_path / name).read_bytes())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(EdgertError, match="No space left"):
        write_session(tmp_path / "s", SAVED, key)
    assert (b"__metadata__" in b"".join(written)) == (key is None)
    assert os.listdir(tmp_path) == []


def test_without_the_package_nothing_is_written(tmp_path, monkeypatch):
    """The old file stays, and nothing is saved in plain instead."""
    write_session(tmp_path / "s", SAVED)
    old = (tmp_path / "s").read_bytes()
    locked = file_of(SAVED, tmp_path / "locked", KEY)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (
        lambda: write_session(tmp_path / "s", SAVED, KEY),
        lambda: read_session(tmp_path / "locked", KEY),
    ):
        with pytest.raises(MissingDependency, match="cryptography is not installed") as caught:
            use()
        assert caught.value.extra == "crypto"
    assert (tmp_path / "s").read_bytes() == old
    assert (tmp_path / "locked").read_bytes() == locked
    assert sorted(os.listdir(tmp_path)) == ["locked", "s"]


# The file on disk


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_only_the_owner_may_read_it(tmp_path, umask, key):
    """Mode 0600 whatever the umask, also in place of a file that all could read."""
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o644)
    before = os.umask(umask)
    try:
        for name in ("new", "old"):
            write_session(tmp_path / name, SAVED, key)
    finally:
        os.umask(before)
    for name in ("new", "old"):
        assert (tmp_path / name).stat().st_mode & 0o7777 == 0o600


def test_the_temporary_file_is_private_too(tmp_path, monkeypatch):
    modes: list[int] = []
    real = os.replace
    before = os.umask(0)
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (modes.append(os.stat(a).st_mode & 0o7777), real(a, b))
    )
    try:
        write_session(tmp_path / "s", SAVED)
    finally:
        os.umask(before)
    assert modes == [0o600]


# The application's data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"a": {1, 2}}, "not JSON serializable"),
        ({"a": float("nan")}, "Out of range float|not JSON compliant"),
        ({"a": float("inf")}, "Out of range float|not JSON compliant"),
        ({("a", "b"): 1}, "keys must be str"),
        ({"a": b"bytes"}, "not JSON serializable"),
        ([1, 2], f"a dict of at most {MAX_DATA_BYTES:,} bytes"),
        ({"a": "x" * MAX_DATA_BYTES}, f"a dict of at most {MAX_DATA_BYTES:,} bytes"),
        ({"a": _nested(MAX_DATA_DEPTH)}, "nests deeper than 64"),
        ({"a": _nested(5000)}, "recursion|nests deeper"),
    ],
    ids=["set", "nan", "infinity", "tuple", "bytes", "list", "large", "deep", "deeper"],
)
def test_data_that_cannot_be_saved_is_refused_when_saving(tmp_path, data, reason):
    """Naming the reason; the old file stays as it is."""
    session = small_session()
    session.save(tmp_path / "s")
    old = (tmp_path / "s").read_bytes()
    session.data = data
    with pytest.raises(UsageError, match=reason) as caught:
        session.save(tmp_path / "s")
    assert "keep in session.data only what JSON can hold" in str(caught.value)
    assert (tmp_path / "s").read_bytes() == old
    assert os.listdir(tmp_path) == ["s"]


def test_data_up_to_the_limits_comes_back(tmp_path):
    """As deep and as large as is allowed, with every kind of character."""
    session = small_session()
    session.data = {"deep": _nested(MAX_DATA_DEPTH - 1), "text": '\0\ud800\U0001f600"\\' * 9}
    session.data["large"] = "x" * (MAX_DATA_BYTES - len(json.dumps(session.data)) - 14)
    session.save(tmp_path / "s")
    back = Session.restore(session.model, read_session(tmp_path / "s"))
    assert back.data == session.data
    assert back.data is not session.data


def test_settings_that_would_not_fit_into_a_header_are_refused_when_saving(tmp_path):
    """What is written can be read: a bias on 180,000 tokens is too much to be saved."""
    assert SAVED.request is not None
    bias = {token: 0.1234567890123456 for token in range(180_000)}
    params = SAVED.request.params.replace(logit_bias=bias)
    large = replace(SAVED, request=replace(SAVED.request, params=params))
    with pytest.raises(UsageError, match=r"settings and data take [45],.* 4,194,304 are allowed"):
        write_session(tmp_path / "s", large)
    assert os.listdir(tmp_path) == []
    params = params.replace(logit_bias={token: 0.125 for token in range(10_000)})
    write_session(tmp_path / "s", replace(SAVED, request=replace(SAVED.request, params=params)))
    back = read_session(tmp_path / "s").request
    assert back is not None
    assert back.params == params
