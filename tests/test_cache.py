"""The cache directory and the stamps in it: private, bounded, never a reason to fail a load."""

from __future__ import annotations

import os

import pytest

from edgert import cache
from edgert.errors import EdgertError


@pytest.fixture
def no_cache_variables(monkeypatch, tmp_path):
    for name in ("EDGERT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_cache_place_follows_the_environment(no_cache_variables, monkeypatch, tmp_path):
    """$EDGERT_CACHE_DIR, else $XDG_CACHE_HOME/edgert unless relative, else ~/.cache/edgert."""
    assert cache.cache_dir() == tmp_path / "home/.cache/edgert"
    assert cache.cache_dir().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_dir() == tmp_path / "home/.cache/edgert"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg/edgert"
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "own"))
    assert cache.cache_dir() == tmp_path / "own"


def test_cache_that_cannot_be_made_is_typed_and_stamps_do_without(monkeypatch, tmp_path):
    """An unusable cache directory raises where it is asked for, and never in a stamp."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "file/cache"))
    with pytest.raises(EdgertError, match="cache directory cannot be created"):
        cache.cache_dir()
    assert cache.read_stamp(tmp_path) is None
    assert cache.write_stamp(tmp_path, {"a": 1}) is False


@pytest.fixture
def stamp(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))
    assert cache.write_stamp(tmp_path, {"a": 1})
    assert cache.read_stamp(tmp_path) == {"a": 1}
    return cache.stamp_path(tmp_path)


def test_stamp_is_private_and_by_real_path(stamp, tmp_path):
    """Mode 0600; a link to the bundle finds the same stamp."""
    assert stamp.stat().st_mode & 0o777 == 0o600
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    assert cache.read_stamp(tmp_path.parent / f"{tmp_path.name}-link") == {"a": 1}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000], ids=lambda c: repr(c[:4])
)
def test_broken_stamp_is_no_stamp(stamp, tmp_path, content):
    """Whatever stands in the stamp's place, reading it is not an error."""
    stamp.write_bytes(content)
    assert cache.read_stamp(tmp_path) is None


def test_stamp_of_others_is_no_stamp(stamp, tmp_path, monkeypatch):
    """A stamp that somebody else owns or may write, or that is a link, is not believed."""
    stamp.chmod(0o620)
    assert cache.read_stamp(tmp_path) is None
    stamp.chmod(0o600)
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
        assert cache.read_stamp(tmp_path) is None
    stamp.rename(stamp.with_name("other"))
    stamp.symlink_to("other")
    assert cache.read_stamp(tmp_path) is None


def test_stamp_is_bounded(stamp, tmp_path, monkeypatch):
    """Too large a stamp is neither written nor read."""
    monkeypatch.setattr(cache, "MAX_STAMP_BYTES", 5)
    assert cache.read_stamp(tmp_path) is None
    assert cache.write_stamp(tmp_path, {"a": 1}) is False
