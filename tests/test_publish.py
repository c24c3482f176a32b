"""Publishing a bundle: the old or the new one is there in full, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgert import files
from edgert.errors import BadBundle, EdgertError, UsageError
from edgert.files import publish_directory


def _folder(path: Path, word: str) -> Path:
    (path / "deep/er").mkdir(parents=True)
    (path / "manifest.json").write_text(word)
    (path / "deep/er/file").write_text(word)
    return path


def _words(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("manifest.json", "deep/er/file")}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_publish_moves_the_bundle_into_place(tmp_path, monkeypatch, old, exchange):
    """The new bundle is at its place, alone, whether or not the system can exchange."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    if old:
        _folder(tmp_path / "final", "old")
    publish_directory(_folder(tmp_path / "temp", "new"), tmp_path / "final")
    assert _words(tmp_path / "final") == {"new"}
    assert os.listdir(tmp_path) == ["final"]


def _no_manifest(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def _empty(path):
    path.mkdir()


def _a_file(path):
    path.write_text("x")


def _a_link(path):
    _folder(path.parent / "elsewhere", "old")
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [_no_manifest, _empty, _a_file, _a_link])
def test_publish_refuses_to_replace_what_is_not_a_bundle(tmp_path, make):
    """A directory of the user's that is no bundle is never moved away."""
    make(tmp_path / "final")
    temp = _folder(tmp_path / "temp", "new")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="will not replace what is not a bundle"):
        publish_directory(temp, tmp_path / "final")
    assert sorted(tmp_path.rglob("*")) == before


def test_publish_refuses_an_unfinished_bundle(tmp_path):
    """What has no manifest is not published; links in it are not published either."""
    (tmp_path / "temp").mkdir()
    with pytest.raises(EdgertError, match="no manifest to publish"):
        publish_directory(tmp_path / "temp", tmp_path / "final")
    temp = _folder(tmp_path / "temp2", "new")
    (temp / "link").symlink_to("/etc/passwd")
    with pytest.raises(BadBundle, match="'link' is a symbolic link"):
        publish_directory(temp, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_publish_that_fails_halfway_puts_the_old_bundle_back(tmp_path, monkeypatch):
    """If the new one cannot be moved in, the old one is in its place again."""
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    _folder(tmp_path / "final", "old")
    temp = _folder(tmp_path / "temp", "new")
    rename = os.rename

    def refuse_new(a, b):
        if Path(a) == temp:
            raise OSError(18, "Invalid cross-device link")
        rename(a, b)

    monkeypatch.setattr(files.os, "rename", refuse_new)
    with pytest.raises(EdgertError, match="cross-device"):
        publish_directory(temp, tmp_path / "final")
    assert _words(tmp_path / "final") == {"old"}
    assert sorted(os.listdir(tmp_path)) == ["final", "temp"]


KILLED = """
import os, shutil, sys
from pathlib import Path
from edgert import files
left = int(sys.argv[1])
def dying(real):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os._exit(9)  # as a kill: no handler, no cleanup
        left -= 1
        return real(*args, **kwargs)
    return call
for name in ("rename", "fsync", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
files._exchange = dying(files._exchange) if sys.argv[2] == "exchange" else lambda a, b: False
files.publish_directory(Path("temp"), Path("final"))
"""


@pytest.mark.parametrize("way", ["exchange", "aside"])
def test_kill_during_publish_leaves_old_or_new(tmp_path, way):
    """Killed before any of its system calls, the old or the new bundle exists in full.

    With an exchange it is at its place; without, the old one may be beside it for a moment.
    """
    seen = set()
    for step in range(30):
        here = tmp_path / str(step)
        _folder(here / "final", "old")
        _folder(here / "temp", "new")
        root = str(Path(files.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(step), way],
            cwd=here,
            env={**os.environ, "PYTHONPATH": root},
            check=False,
        )
        final = here / "final"
        if not final.exists():
            assert way == "aside"
            (final,) = here.glob(".final.*.old")
        words = _words(final)
        assert words in ({"old"}, {"new"})
        seen |= words
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert done.returncode == 0
    assert step > 6
    assert seen == {"old", "new"}
