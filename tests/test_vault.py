"""Encrypted sessions: what a wrong key, damage and a forgery look like, and that nothing leaks."""

from __future__ import annotations

import hashlib
import hmac
import os
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from edgert import vault
from edgert.errors import MissingDependency, NewerFormat, UsageError, WrongKey
from edgert.tensors import Unsound
from edgert.vault import Key, is_locked, key_from, lock, unlock

CONTENT = b"what the robot said " * 3
KEY = Key(bytes(range(32)), 1)  # a key file: derived in no time
WORD = Key("pässword".encode(), 0)


def resealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


@pytest.mark.parametrize("key", [KEY, WORD], ids=["key file", "passphrase"])
def test_a_locked_text_comes_back(key):
    data = lock(CONTENT, key)
    assert is_locked(data)
    assert not is_locked(CONTENT)
    assert unlock(data, key, "f") == CONTENT
    assert CONTENT[:8] not in data


def test_nothing_repeats():
    """Salt, nonce and so the whole file are new each time, also for the same content and key."""
    a, b = lock(CONTENT, KEY), lock(CONTENT, KEY)
    head = len(b"edgert-locked-1\n") + 1
    assert a[:head] == b[:head]
    for start, size in ((head, 16), (head + 16, 12), (head + 28, 16), (head + 44, len(CONTENT))):
        assert a[start : start + size] != b[start : start + size]


@pytest.mark.parametrize("key", [KEY, WORD], ids=["key file", "passphrase"])
def test_the_format_is_what_its_description_says(key):
    """Opened here with the standard library's scrypt, or an HKDF written out, and AES-256-GCM."""
    data = lock(CONTENT, key)
    head, body, seal = data[:61], data[61:-32], data[-32:]
    assert head[:17] == b"edgert-locked-1\n" + bytes([key.origin])
    salt, nonce, check = head[17:33], head[33:45], head[45:61]
    if key.origin == 0:
        derived = hashlib.scrypt(
            key.secret, salt=salt, n=32768, r=8, p=1, dklen=48, maxmem=64 << 20
        )
    else:
        root = hmac.digest(salt, key.secret, "sha256")
        first = hmac.digest(root, b"edgert session\x01", "sha256")
        derived = (first + hmac.digest(root, first + b"edgert session\x02", "sha256"))[:48]
    assert derived[32:] == check
    assert AESGCM(derived[:32]).decrypt(nonce, body, head) == CONTENT
    assert hashlib.sha256(head + body).digest() == seal


WRONG = {
    "none": (KEY, None, "is encrypted and needs its key file"),
    "another key file": (KEY, Key(bytes(32), 1), "this is not its key file"),
    "a passphrase for a key file": (KEY, WORD, "is encrypted and needs its key file"),
    "no passphrase": (WORD, None, "is encrypted and needs its passphrase"),
    "another passphrase": (WORD, Key(b"password", 0), "this is not its passphrase"),
    "a key file for a passphrase": (WORD, KEY, "is encrypted and needs its passphrase"),
    "the same bytes, as a key file": (
        Key(KEY.secret, 0),
        KEY,
        "is encrypted and needs its passphrase",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_key_is_told_apart_from_damage(name):
    own, other, reason = WRONG[name]
    with pytest.raises(WrongKey, match=reason) as caught:
        unlock(lock(CONTENT, own), other, "the/file")
    assert caught.value.exit_code == 4
    assert caught.value.where == "the/file"
    assert "EDGERT_PASSPHRASE" in str(caught.value)
    assert "--key-file" in str(caught.value)


def test_every_flipped_bit_and_every_cut_is_damage_before_the_key_is_asked_for():
    """8 x N bits and N prefixes, without any key: the outer SHA-256 needs none."""
    data = lock(CONTENT, KEY)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Unsound):
            unlock(bytes(damaged), None, "f")
    for size in range(len(data)):
        with pytest.raises(Unsound):
            unlock(data[:size], None, "f")


def test_a_forger_who_mends_the_outer_hash_is_caught_by_the_cipher():
    """Every bit behind the magic words, with a hash that fits: never the content, never another."""
    data = lock(CONTENT, KEY)
    start = len(b"edgert-locked-")
    for bit in range(8 * start, 8 * (len(data) - 32)):
        forged = bytearray(data)
        forged[bit // 8] ^= 1 << bit % 8
        place = bit // 8
        if place < start + 2:
            want: type[Exception] | tuple[type[Exception], ...] = NewerFormat
        elif place == start + 2:
            want = (WrongKey, Unsound)  # another kind of key, or none that exists
        elif place < start + 3 + 16 or start + 31 <= place < start + 47:
            want = WrongKey  # the salt, and the check of the key
        else:
            want = Unsound  # the nonce, the ciphertext, its tag
        with pytest.raises(want):
            unlock(resealed(bytes(forged)), KEY, "f")


@pytest.mark.parametrize("keep", [14, 16, 17, 60, 61, 76])
def test_a_mended_stump_is_refused(keep):
    """Cut within or just behind the head, with a hash that fits."""
    with pytest.raises((Unsound, NewerFormat)):
        unlock(resealed(lock(b"", KEY)[:keep] + bytes(32)), KEY, "f")


def test_no_content_at_all_can_be_locked():
    assert unlock(lock(b"", KEY), KEY, "f") == b""


def test_a_newer_container_says_so():
    """Version 2 with a hash that fits; with one that does not, it is damage."""
    data = lock(CONTENT, KEY)
    newer = resealed(data.replace(b"edgert-locked-1\n", b"edgert-locked-2\n"))
    with pytest.raises(NewerFormat, match="encrypted by a newer edgert") as caught:
        unlock(newer, KEY, "the/file")
    assert caught.value.where == "the/file"
    assert "pip install --upgrade" in str(caught.value)
    with pytest.raises(Unsound, match="SHA-256"):
        unlock(newer[:-1] + b"?", KEY, "f")


def test_an_unknown_kind_of_key_is_refused():
    data = bytearray(lock(CONTENT, KEY))
    data[16] = 7
    with pytest.raises(Unsound, match="its key comes from 7, which is unknown"):
        unlock(resealed(bytes(data)), KEY, "f")


def test_more_than_the_cipher_takes_is_refused(monkeypatch):
    monkeypatch.setattr(vault, "MAX_CONTENT", 10)
    with pytest.raises(UsageError, match=r"60 bytes are more than can be encrypted \(10\)"):
        lock(CONTENT, KEY)


def test_without_the_package_the_extra_is_named(monkeypatch):
    """Locking and unlocking, as on a machine where `cryptography` is not installed."""
    data = lock(CONTENT, KEY)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: lock(CONTENT, KEY), lambda: unlock(data, KEY, "f")):
        with pytest.raises(MissingDependency, match="cryptography is not installed") as caught:
            use()
        assert caught.value.do == "pip install 'edgert[crypto]'"
        assert caught.value.exit_code == 4


# Where keys come from


def test_no_key_is_no_key():
    assert key_from(None, None) is None


def test_a_passphrase_is_its_bytes():
    """Also one of a terminal that is not UTF-8: the environment hands those bytes through."""
    assert key_from("pässword", None) == WORD
    assert key_from("p\udce4ss", None) == Key(b"p\xe4ss", 0)


def test_a_key_file_is_its_bytes(tmp_path):
    """16 to 4096 of them, whatever they are."""
    for size in (16, 32, 4096):
        (tmp_path / "key").write_bytes(bytes(size))
        assert key_from(None, tmp_path / "key") == Key(bytes(size), 1)


def test_a_key_does_not_show_its_secret():
    assert repr(WORD) == "Key(origin=0)"
    assert "ssword" not in f"{WORD!r} {WORD} {[WORD]}"


def _sized(size: int):
    def make(folder: Path) -> None:
        (folder / "key").write_bytes(bytes(size))

    return make


REFUSED = {
    "missing": (lambda folder: None, "cannot be read: No such file"),
    "a directory": (lambda folder: (folder / "key").mkdir(), "cannot be read: Is a directory"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "key"), "key file has 0 bytes"),
    "empty": (_sized(0), "key file has 0 bytes; 16 to 4096 random bytes are wanted"),
    "short": (_sized(15), "key file has 15 bytes; 16 to 4096"),
    "long": (_sized(4097), "key file is larger; 16 to 4096"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_key_file_is_refused(tmp_path, name):
    make, reason = REFUSED[name]
    make(tmp_path)
    with pytest.raises(UsageError, match=reason) as caught:
        key_from(None, tmp_path / "key")
    assert caught.value.where == str(tmp_path / "key")


def test_a_short_key_file_says_how_to_make_one(tmp_path):
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(UsageError) as caught:
        key_from(None, tmp_path / "key")
    assert "head -c 32 /dev/urandom > key" in str(caught.value)


@pytest.mark.parametrize(
    ("passphrase", "file", "reason"),
    [
        ("x", "key", "a passphrase and a key file are given"),
        ("", None, "the passphrase is empty"),
        ("\ud800", None, "not valid Unicode"),
    ],
    ids=["both", "empty", "half a character"],
)
def test_a_passphrase_that_cannot_be(passphrase, file, reason):
    with pytest.raises(UsageError, match=reason):
        key_from(passphrase, file)
