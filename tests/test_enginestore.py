"""Engines in the cache: used only if they were built here, for exactly this, and are whole."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from edgert import enginestore
from edgert.enginestore import (
    Fingerprint,
    engine_path,
    own_key,
    read_engine,
    timings_path,
    write_engine,
)
from edgert.errors import BadFile, EdgertError, Incompatible

MADE_FOR = Fingerprint(
    "aa" * 32, "decode", ("bb" * 32,), "orin", "cc" * 32, "tensorrt 10.3.0", "8.7"
)
ENGINE = bytes(range(256)) * 20


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def kept() -> Path:
    path = engine_path(MADE_FOR)
    write_engine(path, asdict(MADE_FOR), {"layers": 7}, ENGINE)
    return path


def test_an_engine_comes_back_with_its_facts(kept):
    """And nobody else can read it: engine, key and folder are the user's alone."""
    assert read_engine(kept, asdict(MADE_FOR)) == ({"layers": 7}, ENGINE)
    for path in (kept, kept.parent.parent / "engine.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_what_is_not_there_is_nothing():
    assert read_engine(engine_path(MADE_FOR), asdict(MADE_FOR)) is None


@pytest.mark.parametrize("field", [field.name for field in fields(Fingerprint)])
def test_whatever_differs_is_another_engine(kept, field):
    """Another name in the cache; and under the same name it is refused."""
    other = replace(MADE_FOR, **{field: ("dd" * 32,) if field == "files" else "other"})
    assert engine_path(other) != kept
    assert read_engine(engine_path(other), asdict(other)) is None
    with pytest.raises(Incompatible, match="was built for something else"):
        read_engine(kept, asdict(other))


@pytest.mark.parametrize("at", [0, 15, 16, 47, 48, 55, 56, 90, -1])
def test_a_changed_byte_is_refused(kept, at):
    """In the magic, the code, the length, the header or the engine: nothing is handed on."""
    data = bytearray(kept.read_bytes())
    data[at] ^= 1
    kept.write_bytes(data)
    with pytest.raises((BadFile, Incompatible)):
        read_engine(kept, asdict(MADE_FOR))


@pytest.mark.parametrize("length", [0, 10, 48, 55, 200, -1])
def test_a_cut_file_is_refused(kept, length):
    kept.write_bytes(kept.read_bytes()[:length])
    with pytest.raises((BadFile, Incompatible)):
        read_engine(kept, asdict(MADE_FOR))


def test_an_engine_of_another_key_is_refused(kept):
    """As one that was copied from another machine is."""
    (kept.parent.parent / "engine.key").write_bytes(os.urandom(32))
    with pytest.raises(Incompatible, match="was not built here by this user") as caught:
        read_engine(kept, asdict(MADE_FOR))
    assert "edgert build" in (caught.value.do or "")


def test_what_others_can_write_is_refused(kept):
    kept.chmod(0o620)
    with pytest.raises(Incompatible, match="the engine is not this user's alone"):
        read_engine(kept, asdict(MADE_FOR))


def test_a_key_that_others_can_read_is_refused(kept):
    (kept.parent.parent / "engine.key").chmod(0o640)
    with pytest.raises(Incompatible, match="the key of the engine cache is not this user's alone"):
        read_engine(kept, asdict(MADE_FOR))


def test_a_key_of_another_length_is_refused(kept):
    key = kept.parent.parent / "engine.key"
    key.write_bytes(b"short")
    with pytest.raises(Incompatible, match="has 5 bytes instead of 32"):
        own_key()


def test_a_link_is_not_followed(kept, tmp_path):
    moved = kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(moved)
    with pytest.raises((BadFile, Incompatible)):
        read_engine(kept, asdict(MADE_FOR))


def test_first_users_at_once_agree_on_the_key():
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(own_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys) == 8


def test_an_interrupted_write_leaves_what_was_there(kept, monkeypatch):
    before = sorted(os.listdir(kept.parent))

    def stop(*parts: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(enginestore, "_mac", stop)
        with pytest.raises(KeyboardInterrupt):
            write_engine(kept, asdict(MADE_FOR), {}, b"new")
    assert sorted(os.listdir(kept.parent)) == before
    assert read_engine(kept, asdict(MADE_FOR)) == ({"layers": 7}, ENGINE)


def test_timings_are_of_a_compiler_and_a_device():
    paths = {timings_path(c, sm) for c in ("tensorrt 10.3.0", "x/../y") for sm in ("8.7", "11.0")}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {engine_path(MADE_FOR).parent}


def test_a_cache_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "engines").write_text("in the way")
    with pytest.raises(EdgertError, match="the engine cache cannot be created"):
        engine_path(MADE_FOR)
