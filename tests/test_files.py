"""Writing whole or not at all; reading only plain files inside the bundle."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgert import cache, files
from edgert.errors import BadBundle, BadFile, EdgertError, UsageError
from edgert.files import (
    list_tree,
    open_regular,
    publish_directory,
    read_regular,
    resolve_inside,
    safe_relative,
    sha256_file,
    write_atomic,
)

UNSAFE = {
    "": "is empty",
    "/etc/passwd": "is absolute",
    "../x": "the part '..'",
    "a/../../x": "the part '..'",
    "./a": "the part '.'",
    "a//b": "an empty part",
    "a/": "an empty part",
    "a\\b": "characters that are not allowed",
    "C:a": "characters that are not allowed",
    "a\0b": "characters that are not allowed",
    "a\n": "characters that are not allowed",
    " a": "characters that are not allowed",
    ".hidden": "characters that are not allowed",
    "a/.swp": "characters that are not allowed",
    "~root": "characters that are not allowed",
    "-rf": "characters that are not allowed",
    "weights\u200b.data": "characters that are not allowed",
    "wеights.data": "characters that are not allowed",  # the first e is Cyrillic
    "a\u2044b": "characters that are not allowed",
    "\uff0e\uff0e/x": "characters that are not allowed",
    "\udcff": "characters that are not allowed",
    "a" * 241: "241 characters",
    "/".join("abcdefghi"): "9 parts",
}


@pytest.mark.parametrize(("name", "reason"), UNSAFE.items(), ids=[ascii(n)[:24] for n in UNSAFE])
def test_unsafe_name_is_refused_with_its_reason(name, reason):
    """A name that could leave the bundle, or be mistaken for another, is refused."""
    with pytest.raises(BadBundle, match=reason) as caught:
        safe_relative(name)
    assert str(caught.value).isascii()
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "manifest.json", "variants/fp32/decode-ort.onnx", "a..b"])
def test_plain_name_is_accepted(name):
    """Names as an exporter writes them pass unchanged."""
    assert str(safe_relative(name)) == name


def _plain(root):
    (root / "d").mkdir()
    (root / "d/f").write_bytes(b"inside")


def _link_to_file(root):
    (root / "d").mkdir()
    (root / "d/f").symlink_to(root.parent / "secret")


def _link_to_sibling(root):
    (root / "d").mkdir()
    (root / "d/g").write_bytes(b"inside")
    (root / "d/f").symlink_to("g")


def _link_to_directory(root):
    (root / "e").mkdir()
    (root / "e/f").write_bytes(b"inside")
    (root / "d").symlink_to("e")


def _dangling(root):
    (root / "d").mkdir()
    (root / "d/f").symlink_to("nowhere")


def _fifo(root):
    (root / "d").mkdir()
    os.mkfifo(root / "d/f")


def _directory(root):
    (root / "d/f").mkdir(parents=True)


def _file_as_directory(root):
    (root / "d").write_bytes(b"")


def _missing(root):
    (root / "d").mkdir()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_link_to_file, "a symbolic link stands where a bundle has a regular file"),
        (_link_to_sibling, "a symbolic link stands where a bundle has a regular file"),
        (_link_to_directory, "a symbolic link stands where a bundle has a directory"),
        (_dangling, "a symbolic link stands where a bundle has a regular file"),
        (_fifo, "a special file .* stands where a bundle has a regular file"),
        (_directory, "a directory stands where a bundle has a regular file"),
        (_file_as_directory, "a regular file stands where a bundle has a directory"),
        (_missing, "cannot be opened: No such file"),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
@pytest.mark.parametrize("how", [open_regular, resolve_inside])
def test_only_regular_files_are_opened(tmp_path, make, reason, how):
    """No link is followed below the root, and a FIFO does not make the reader wait."""
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "bundle"
    root.mkdir()
    make(root)
    with pytest.raises(BadBundle, match=reason):
        how(root, "d/f")


def test_device_is_refused(tmp_path):
    """A device file is not opened even when a caller names its directory as root."""
    with pytest.raises(BadBundle, match="special file"):
        open_regular(Path("/dev"), "null")


def test_link_that_appears_after_the_check_is_not_followed(tmp_path, monkeypatch):
    """Exchanging a file for a link between look and open is noticed by the open itself."""
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "f").write_bytes(b"inside")
    look = os.stat

    def then_exchange(*args, **kwargs):
        info = look(*args, **kwargs)
        if args[0] == "f":
            (root / "f").unlink()
            (root / "f").symlink_to(tmp_path / "secret")
        return info

    monkeypatch.setattr(files.os, "stat", then_exchange)
    with pytest.raises(BadBundle, match="cannot be opened"):
        open_regular(root, "f")


def test_root_may_be_reached_through_a_link(tmp_path):
    """The user's own link to a bundle is the user's business."""
    real = tmp_path / "real"
    real.mkdir()
    _plain(real)
    (tmp_path / "link").symlink_to(real)
    with open_regular(tmp_path / "link", "d/f") as file:
        assert file.read() == b"inside"
    assert resolve_inside(tmp_path / "link", "d/f") == tmp_path / "link/d/f"


def test_failed_opens_leave_no_descriptor(tmp_path):
    """Refusals close what they opened."""
    _fifo(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("d/f", "d/none", "none/x"):
        with pytest.raises(BadBundle):
            open_regular(tmp_path, name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_read_is_bounded(tmp_path):
    """A file above the cap is refused before it is read, with both numbers."""
    (tmp_path / "f").write_bytes(b"12345")
    assert read_regular(tmp_path / "f", 5) == b"12345"
    with pytest.raises(BadBundle, match="5 bytes, 4 are allowed"):
        read_regular(tmp_path / "f", 4)


def test_file_that_shrinks_while_read_is_refused(tmp_path, monkeypatch):
    """A short read is an error, not a shorter file."""
    (tmp_path / "f").write_bytes(b"12345")
    real = os.fstat

    def longer(fd):
        info = list(real(fd))
        info[6] = 9
        return os.stat_result(info)

    monkeypatch.setattr(files.os, "fstat", longer)
    with pytest.raises(BadBundle, match="shrank while it was read: 5 of 9"):
        read_regular(tmp_path / "f", 100)


def test_tree_lists_files_and_complains_about_the_rest(tmp_path):
    """Everything that is not a plainly named regular file is named in a complaint."""
    _plain(tmp_path)
    (tmp_path / "link").symlink_to("d")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".f.swp").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    found, complaints = list_tree(tmp_path)
    assert list(found) == ["d/f"]
    assert found["d/f"].st_size == 6
    text = "\n".join(sorted(complaints))
    for part in (
        "'link' is a symbolic link",
        "'pipe' is a special",
        "'.f.swp' does",
        "'.git' does",
    ):
        assert part in text
    assert len(complaints) == 4


def test_tree_is_bounded(tmp_path, monkeypatch):
    """A directory with too many entries is refused, not walked."""
    monkeypatch.setattr(files, "MAX_ENTRIES", 2)
    for i in range(3):
        (tmp_path / f"f{i}").write_bytes(b"")
    with pytest.raises(BadBundle, match="more than 2 files"):
        list_tree(tmp_path)


def test_tree_of_nothing_is_refused(tmp_path):
    """A directory that is not there is a typed error."""
    with pytest.raises(BadBundle, match="directory cannot be read: No such file"):
        list_tree(tmp_path / "none")


def test_sha256_file_and_its_progress(tmp_path):
    """The hash is that of the content; progress adds up to the size."""
    data = os.urandom(100) * 30_000
    (tmp_path / "f").write_bytes(data)
    seen: list[int] = []
    assert sha256_file(tmp_path / "f", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)
    assert len(seen) > 1
    with pytest.raises(BadFile, match="cannot be read"):
        sha256_file(tmp_path / "none")


@pytest.mark.parametrize("data", [b"new", lambda file: file.write(b"new")], ids=["bytes", "writer"])
def test_atomic_write_replaces_content(tmp_path, data):
    """The new content is there, nothing else is left behind, the mode is as asked."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    write_atomic(path, data, mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["f"]


def test_atomic_write_replaces_a_link_instead_of_following_it(tmp_path):
    """A link planted at the target does not redirect the write."""
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / "f").symlink_to("victim")
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "victim").read_bytes() == b"old"
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit, MemoryError])
def test_interrupted_writer_leaves_the_old_file(tmp_path, error):
    """Whatever the writer raises passes through; the old file stays, the temporary goes."""
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def writer(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomic(path, writer)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_system_error_is_typed_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    """A full disk at any step is an EdgertError with the system's reason."""
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        with pytest.raises(EdgertError, match="No space left on device") as caught:
            write_atomic(path, b"new")
    assert caught.value.where == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


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
