"""Files: reading only plain ones inside the bundle; writing whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from edgert import files
from edgert.errors import BadBundle, BadFile, EdgertError
from edgert.files import (
    list_tree,
    open_regular,
    read_at_most,
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


def test_a_limit_costs_no_memory_of_its_size(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"abc" * 1000)
    tracemalloc.start()
    with path.open("rb") as file:
        assert read_at_most(file, 1 << 30) == b"abc" * 1000
        file.seek(0)
        assert read_at_most(file, 7) == b"abcabca"
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
