"""Files that are written whole or not at all, and read only where they claim to be.

Everything edgert puts on disk goes through `write_atomic` or `publish_directory`; every file of a
bundle is opened through `open_regular`, which follows no symbolic link below the bundle's root.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from edgert.errors import BadBundle, BadFile, EdgertError, UsageError

MANIFEST = "manifest.json"  # what makes a directory a bundle
MAX_NAME = 240  # characters of a relative path
MAX_DEPTH = 8  # parts of a relative path
MAX_ENTRIES = 4096  # files and directories of one bundle

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_CHUNK = 1 << 20
_YOUNG_S = 2.0  # a temporary file younger than this is left alone
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def safe_relative(name: str) -> PurePosixPath:
    """The name of a file inside a bundle, as a path that can only point downward.

    Names are ASCII (so that two that look alike are alike) without hidden files: parts of
    `A-Z a-z 0-9 _ . + -` that start with a letter, digit or underscore, joined by '/'.
    Raises BadBundle for anything else, naming the reason.
    """
    reason = _unsafe(name)
    if reason:
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise BadBundle(
            f"{ascii(shown)} is not a file name inside a bundle: {reason}",
            do="use a plain relative name such as 'variants/fp32/decode-ort.onnx'",
        )
    return PurePosixPath(name)


def _unsafe(name: str) -> str | None:
    if not name:
        return "it is empty"
    if len(name) > MAX_NAME:
        return f"it has {len(name)} characters, {MAX_NAME} are allowed"
    if name.startswith("/"):
        return "it is absolute"
    parts = name.split("/")
    if len(parts) > MAX_DEPTH:
        return f"it has {len(parts)} parts, {MAX_DEPTH} are allowed"
    for part in parts:
        if not part:
            return "it has an empty part"
        if part in (".", ".."):
            return f"it has the part '{part}'"
        if not _PART.fullmatch(part):
            return f"the part {ascii(part)} has characters that are not allowed"
    return None


def open_regular(root: Path, relative: str) -> BinaryIO:
    """Open a regular file below `root` for reading; no link is followed on the way from `root`.

    Each directory is opened relative to the one above it, so a directory that is exchanged
    for a link meanwhile is noticed, not followed. `root` itself may be reached through links.
    Raises BadBundle if the file is missing, is a link, a directory, a FIFO or a device, or
    cannot be read.
    """
    return _open_below(root, safe_relative(relative).parts)


def resolve_inside(root: Path, relative: str) -> Path:
    """The path of a regular file below `root`, checked as by `open_regular`."""
    with open_regular(root, relative):
        return root / relative


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file that is not a link and has at most `max_bytes` bytes.

    Raises BadBundle as `open_regular` does, and for a file that is too large or shrinks.
    """
    with _open_below(path.parent, (path.name,)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise BadBundle(
                f"the file has {size:,} bytes, {max_bytes:,} are allowed",
                where=str(path),
                do="export the bundle again, or copy it again from its source",
            )
        data = file.read(size)
    if len(data) != size:
        raise BadBundle(
            f"the file shrank while it was read: {len(data):,} of {size:,} bytes",
            where=str(path),
            do="let the copy finish, then try again",
        )
    return data


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """The rest of a file, cut off behind `limit` bytes; `file.read(limit)` would ask for memory of
    that size before it looks at the file."""
    data = bytearray()
    while piece := file.read(min(_CHUNK, limit - len(data))):
        data += piece
    return bytes(data)


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open`: what turns out to be a FIFO does not make us wait for its writer."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def _open_below(root: Path, parts: tuple[str, ...]) -> BinaryIO:
    path = root.joinpath(*parts)
    folder = -1
    try:
        folder = os.open(root, _DIRECTORY)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            here = os.stat(part, dir_fd=folder, follow_symlinks=False)
            _refuse_kind(here.st_mode, root.joinpath(*parts[: i + 1]), want_file=last)
            # O_NONBLOCK: a file exchanged for a FIFO meanwhile must not make us wait.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            opened = os.open(part, flags if last else flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = opened
        _refuse_kind(os.fstat(folder).st_mode, path, want_file=True)
        file = os.fdopen(folder, "rb")
        folder = -1
        return file
    except OSError as error:
        raise BadBundle(
            f"the file cannot be opened: {error.strerror}",
            where=str(path),
            do="check that the copy is complete and readable",
        ) from error
    finally:
        if folder >= 0:
            os.close(folder)


def _refuse_kind(mode: int, path: Path, *, want_file: bool) -> None:
    fits = stat.S_ISREG(mode) if want_file else stat.S_ISDIR(mode)
    if not fits:
        want = "a regular file" if want_file else "a directory"
        raise BadBundle(
            f"{kind_of(mode)} stands where a bundle has {want}",
            where=str(path),
            do="copy the bundle with links resolved (cp -rL) or get it again",
        )


def kind_of(mode: int) -> str:
    """What a file mode is, in words."""
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a regular file" if stat.S_ISREG(mode) else "a special file (FIFO, socket or device)"


def list_tree(root: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """Every regular file below `root` by relative name, and a complaint per anything else.

    Complaints are about links, special files, and names that `safe_relative` refuses.
    Raises BadBundle if there are more than MAX_ENTRIES entries or a directory is unreadable.
    """
    files: dict[str, os.stat_result] = {}
    complaints: list[str] = []
    pending, seen = [""], 0
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as found:
                entries = [(e.name, e.stat(follow_symlinks=False)) for e in found]
        except OSError as error:
            raise BadBundle(
                f"the directory cannot be read: {error.strerror}", where=str(root / prefix)
            ) from error
        seen += len(entries)
        if seen > MAX_ENTRIES:
            raise BadBundle(
                f"the bundle has more than {MAX_ENTRIES} files and directories", where=str(root)
            )
        for entry, info in entries:
            name = prefix + entry
            is_dir, is_file = stat.S_ISDIR(info.st_mode), stat.S_ISREG(info.st_mode)
            reason = _unsafe(name)
            if not (is_dir or is_file):
                complaints.append(f"{ascii(name)} is {kind_of(info.st_mode)}")
            elif reason:
                complaints.append(f"{ascii(name)} does not belong in a bundle: {reason}")
            elif is_dir:
                pending.append(name + "/")
            else:
                files[name] = info
    return files, complaints


def sha256_stream(stream: BinaryIO, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the rest of a binary stream, as 64 hex digits.

    `progress` is called with the number of bytes of each chunk.
    """
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of any file of the user's, links followed, as 64 hex digits.

    `progress` is called with the number of bytes of each chunk. Raises BadFile if unreadable.
    """
    try:
        with path.open("rb") as file:
            return sha256_stream(file, progress)
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def write_atomic(path: Path, data: bytes | Callable[[BinaryIO], object], mode: int = 0o644) -> None:
    """Write a file so that `path` holds the old or the new content in full, even after a crash.

    `data` is the content, or a function that writes it to a binary file. The user's umask
    applies to `mode`. A symbolic link at `path` is replaced, not followed.
    Raises EdgertError with the system's reason; whatever `data` raises passes through. In
    every case of failure the temporary file is removed and `path` is untouched. A process that was
    killed in mid-write leaves its temporary file, which the next write to `path` removes.
    """
    temp = path.parent / f".{path.name}.{os.urandom(6).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        _sweep(path)
        try:
            with os.fdopen(os.open(temp, flags, mode), "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
                if callable(data):
                    data(file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` whose writers are dead: whom the kernel took their lock."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.tmp")
    for name in os.listdir(path.parent):
        if not pattern.fullmatch(name):
            continue
        temp = path.parent / name
        try:
            handle = os.open(temp, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone in the meantime, or not ours to remove
        try:
            # A writer takes its lock just after the file appears: leave it a moment for that.
            if time.time() - os.fstat(handle).st_mtime > _YOUNG_S:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temp.unlink(missing_ok=True)
        except OSError:
            pass  # its writer lives
        finally:
            os.close(handle)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(handle)


def publish_directory(temp_dir: Path, final_dir: Path) -> None:
    """Move a finished bundle into place, on disk for good; `temp_dir` is gone afterwards.

    An old bundle at `final_dir` is exchanged for the new one in one step where the system can
    (Linux renameat2); elsewhere it is first renamed to `.<name>.<random>.old` beside it, so
    that at every moment the old or the new one exists in full.
    Raises UsageError if `final_dir` is something else than a bundle; EdgertError if the system
    refuses, with the old bundle in place; BadBundle if `temp_dir` holds links or special files.
    """
    if not (temp_dir / MANIFEST).is_file():
        raise EdgertError("there is no manifest to publish", where=str(temp_dir / MANIFEST))
    replaces = os.path.lexists(final_dir)
    if replaces and (final_dir.is_symlink() or not (final_dir / MANIFEST).is_file()):
        raise UsageError(
            f"will not replace what is not a bundle (it has no {MANIFEST})",
            where=str(final_dir),
            do="choose another output directory, or remove this one yourself",
        )
    files, complaints = list_tree(temp_dir)
    if complaints:
        raise BadBundle("; ".join(complaints), where=str(temp_dir))
    old = temp_dir
    try:
        folders = {parent for name in files for parent in (temp_dir / name).parents}
        for path in [*(temp_dir / name for name in files), *folders - set(temp_dir.parents)]:
            fsync_path(path)
        if not replaces:
            os.rename(temp_dir, final_dir)
        elif not _exchange(temp_dir, final_dir):
            old = final_dir.parent / f".{final_dir.name}.{os.urandom(6).hex()}.old"
            try:
                os.rename(final_dir, old)
                os.rename(temp_dir, final_dir)
            except BaseException:
                if old.exists() and not final_dir.exists():
                    os.rename(old, final_dir)
                raise
        for parent in {final_dir.parent, temp_dir.parent}:
            fsync_path(parent)
    except OSError as error:
        raise _cannot_write(final_dir, error) from error
    if replaces:
        import shutil

        shutil.rmtree(old, ignore_errors=True)  # the new bundle is in place: litter is no failure


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step. False where kernel, libc or file system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, rename_exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    done = renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange)
    return bool(done == 0)


def _cannot_write(path: Path, error: OSError) -> EdgertError:
    return EdgertError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        do="check free space and permissions, then run the command again",
    )
