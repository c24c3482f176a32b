"""Bytes encrypted with a passphrase or a key file, so that a wrong key and damage are told apart.

    16  "edgert-locked-1\\n"
     1  where the key comes from: 0 a passphrase (scrypt), 1 a key file (HKDF-SHA256)
    16  salt     12  nonce     16  check of the key
     n  AES-256-GCM ciphertext and its tag; all of the above is authenticated with it
    32  SHA-256 of all before: damage is found without the key

Salt and nonce are new each time. scrypt's cost is fixed by the format (RFC 7914: N 32768, r 8, p 1:
32 MiB), so that a file cannot ask for more. Needs the `crypto` extra.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.errors import MissingDependency, NewerFormat, UsageError, WrongKey
from edgert.files import without_waiting
from edgert.tensors import SEAL_BYTES, Unsound, check_seal

MAGIC = b"edgert-locked-"
_VERSION = b"1\n"
_HEAD = len(MAGIC + _VERSION) + 1 + 16 + 12 + 16
MAX_CONTENT = 2**31 - 1024  # what the library encrypts in one piece
MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 4096


@dataclass(frozen=True)
class Key:
    """A passphrase, or the content of a key file; `origin` is the byte that says which."""

    secret: bytes
    origin: int

    def __repr__(self) -> str:  # a traceback must not show the secret
        return f"Key(origin={self.origin})"


def key_from(passphrase: str | None, key_file: str | os.PathLike[str] | None) -> Key | None:
    """The key that a caller gave; None if none was given.

    Raises UsageError for both at once, a passphrase that is empty or no Unicode, or a key file
    that is unreadable, no regular file, or not of 16 to 4096 bytes.
    """
    if passphrase is not None and key_file is not None:
        raise UsageError("a passphrase and a key file are given", do="give one of them")
    if passphrase is not None:
        if not passphrase:
            raise UsageError("the passphrase is empty", do="give one, or leave encryption off")
        try:
            return Key(passphrase.encode("utf-8", "surrogateescape"), 0)
        except UnicodeEncodeError as error:
            raise UsageError("the passphrase is not valid Unicode") from error
    if key_file is None:
        return None
    path = Path(key_file)
    try:
        with open(path, "rb", opener=without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            secret = file.read(MAX_KEY_BYTES + 1) if regular else b""
    except OSError as error:
        raise UsageError(
            f"the key file cannot be read: {error.strerror}", where=str(path)
        ) from error
    if not MIN_KEY_BYTES <= len(secret) <= MAX_KEY_BYTES:
        what = f"has {len(secret)} bytes" if len(secret) <= MAX_KEY_BYTES else "is larger"
        raise UsageError(
            f"the key file {what}; {MIN_KEY_BYTES} to {MAX_KEY_BYTES} random bytes are wanted",
            where=str(path),
            do=f"make one:  head -c 32 /dev/urandom > {path.name}",
        )
    return Key(secret, 1)


def is_locked(data: bytes) -> bool:
    return data.startswith(MAGIC)


def lock(content: bytes, key: Key) -> bytes:
    """The content, encrypted. Raises MissingDependency, UsageError beyond 2 GiB."""
    if len(content) > MAX_CONTENT:
        raise UsageError(
            f"{len(content):,} bytes are more than can be encrypted ({MAX_CONTENT:,})",
            do="save it without encryption, on an encrypted disk",
        )
    salt, nonce = os.urandom(16), os.urandom(12)
    cipher, check = _cipher(key, salt)
    head = MAGIC + _VERSION + bytes([key.origin]) + salt + nonce + check
    body = head + cipher.encrypt(nonce, content, head)
    return bytes(body + hashlib.sha256(body).digest())


def unlock(data: bytes, key: Key | None, where: str) -> bytes:
    """The content of locked bytes.

    Raises Unsound (damaged), NewerFormat, WrongKey (none, of the other kind, or another one),
    MissingDependency.
    """
    check_seal(data)
    if data[len(MAGIC) : len(MAGIC + _VERSION)] != _VERSION:
        raise NewerFormat(
            "the file was encrypted by a newer edgert",
            where=where,
            do="pip install --upgrade edgert",
        )
    if len(data) < _HEAD + 16 + SEAL_BYTES:
        raise Unsound(f"it has only {len(data)} bytes")
    head, body = data[:_HEAD], data[_HEAD:-SEAL_BYTES]
    origin = head[len(MAGIC + _VERSION)]
    salt, nonce, check = head[-44:-28], head[-28:-16], head[-16:]
    wanted = {0: "its passphrase", 1: "its key file"}.get(origin)
    if wanted is None:
        raise Unsound(f"its key comes from {origin}, which is unknown")
    if key is None or key.origin != origin:
        raise WrongKey(f"the session is encrypted and needs {wanted}", where=where, do=_DO)
    cipher, found = _cipher(key, salt)
    if not hmac.compare_digest(found, check):
        raise WrongKey(f"this is not {wanted}", where=where, do=_DO)
    from cryptography.exceptions import InvalidTag

    try:
        return bytes(cipher.decrypt(nonce, body, head))
    except InvalidTag:
        raise Unsound("its ciphertext is not authentic") from None


_DO = "give the passphrase (EDGERT_PASSPHRASE) or the key file (--key-file) it was saved with"


def _cipher(key: Key, salt: bytes) -> tuple[Any, bytes]:
    """The cipher, and the value by which a wrong key is known."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise MissingDependency(
            "cryptography", "crypto", why="it encrypts and decrypts sessions"
        ) from error
    if key.origin == 0:
        derived = Scrypt(salt=salt, length=48, n=2**15, r=8, p=1).derive(key.secret)
    else:
        derived = HKDF(SHA256(), 48, salt, b"edgert session").derive(key.secret)
    return AESGCM(derived[:32]), derived[32:]
