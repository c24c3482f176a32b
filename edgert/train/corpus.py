"""Text to train on: the standard library's own, a text file, or a folder of text files."""

from __future__ import annotations

import hashlib
import importlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgert.errors import BadFile, EdgertError, UsageError

BUILTIN = "builtin"
BUILTIN_BYTES = 4_000_000  # the least that the built-in corpus has
MAX_FILE_BYTES = 1 << 30
MAX_FILES = 1 << 20

_LEFT_OUT = frozenset(  # tables, tests, copies, and what distributions move to other packages
    ("__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3")
    + ("pydoc_data", "site-packages", "sitecustomize", "test", "tests", "tkinter", "turtledemo")
    + ("venv",)
)


@dataclass(frozen=True)
class Document:
    """One text. `size` is its length in UTF-8; `read` gives it, checked."""

    name: str
    size: int
    read: Callable[[], str]


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. `origin` says where they are from, JSON-serialisable."""

    documents: tuple[Document, ...]
    origin: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return sum(document.size for document in self.documents)

    def sha256(self) -> str:
        """Hash of names, sizes and texts in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.name}\0{document.size}\0".encode())
            digest.update(document.read().encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """A corpus in two: documents to learn from, and the text at the end that is held out.

    The document at the border is cut behind a line.
    """

    train: tuple[Document, ...]
    heldout: str


def builtin() -> Corpus:
    """The standard library: its documentation topics, then its source text, in sorted order.

    The same for everyone with the same Python from the same source; distributions patch theirs, so
    the hash says more than the version. Raises EdgertError where the sources are not installed.
    """
    # Not an import statement: the module is data of half a megabyte without type information.
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    documents = [
        Document(f"topics/{name}", len(text.encode()), partial(str, text))
        for name, text in sorted(topics.items())
    ]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not _LEFT_OUT.intersection(parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a few modules are in other encodings, on purpose
            documents.append(
                Document("/".join(parts) + ".py", len(text.encode()), partial(str, text))
            )
    corpus = Corpus(
        tuple(document for document in documents if document.size),
        {"corpus": BUILTIN, "python": platform.python_version()},
    )
    if corpus.size < BUILTIN_BYTES:
        raise EdgertError(
            f"the standard library's source text has {corpus.size:,} bytes here, "
            f"{BUILTIN_BYTES:,} are needed",
            where=str(root),
            do="install it, or give a corpus of your own: [data] path = ...",
        )
    return corpus


def from_path(path: Path) -> Corpus:
    """A text file, or all files of a folder and its subfolders in sorted order.

    Hidden files and empty ones are left out. Files are checked when they are read: see `text_of`.
    Raises UsageError for a path that does not exist, BadFile if there is no text.
    """
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
        ]
        names = {file.relative_to(path).as_posix(): file for file in files}
    elif path.is_file():
        names = {path.name: path}
    else:
        raise UsageError(
            "there is no such file or folder of text",
            where=str(path),
            do="correct `path` in [data]; it is relative to the recipe",
        )
    if len(names) > MAX_FILES:
        raise BadFile(f"{len(names):,} files, {MAX_FILES:,} are read at most", where=str(path))
    documents = []
    for name, file in sorted(names.items()):
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadFile(
                f"the file has {size:,} bytes, {MAX_FILE_BYTES:,} are read at most",
                where=str(file),
                do="split it",
            )
        if size:
            documents.append(Document(name, size, partial(text_of, file)))
    corpus = Corpus(tuple(documents), {"corpus": path.name})
    if not any(document.read().strip() for document in corpus.documents):
        raise BadFile(
            "there is no text to train on", where=str(path), do="give files with text in UTF-8"
        )
    return corpus


def text_of(path: Path) -> str:
    """The text of a file as it is, line ends included. Raises BadFile naming the bad byte."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFile(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(
            f"the text is not UTF-8: {error.reason}, byte {data[error.start]:#04x} at "
            f"offset {error.start}",
            where=str(path),
            do="convert it, for example with iconv, or take the file out of the folder",
        ) from None


def split(corpus: Corpus, holdout: float) -> Split:
    """The last `holdout` of the corpus in bytes, held out; 0 holds out nothing."""
    keep = corpus.size - int(corpus.size * holdout)
    train: list[Document] = []
    rest: list[str] = []
    seen = 0
    for document in corpus.documents:
        start, seen = seen, seen + document.size
        if seen <= keep:
            train.append(document)
        elif start >= keep:
            rest.append(document.read())
        else:
            head, tail = _cut(document.read(), keep - start)
            if head:
                train.append(Document(document.name, len(head.encode()), partial(str, head)))
            rest.append(tail)
    return Split(tuple(train), "".join(_lines(rest)))


def _cut(text: str, size: int) -> tuple[str, str]:
    """Cut behind the line that byte `size` is in; in the last line, at that byte's character."""
    at = len(text.encode()[:size].decode("utf-8", "ignore"))
    line = text.find("\n", at) + 1
    at = line if 0 < line < len(text) else at
    return text[:at], text[at:]


def _lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield text if text.endswith("\n") or not text else text + "\n"
