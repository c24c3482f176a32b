"""Text to token ids and back, whole or one token at a time.

Two kinds of tokenizer: a Hugging Face `tokenizer.json` (through the `tokenizers` library), and
plain bytes. Neither adds BOS or EOS by itself; that is the chat template's or the caller's choice.
"""

from __future__ import annotations

import codecs
import json
import operator
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgert.errors import BadTokenizer, MissingDependency, UnsupportedModel, UsageError
from edgert.files import read_at_most
from edgert.spec import TokenizerSpec

MAX_FILE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 16 * 2**20
_ID_LIMIT = 2**32
_T = TypeVar("_T")


class Detokenizer(Protocol):
    """Turns a stream of ids into a stream of text; the pieces and the rest add up to `decode`."""

    def push(self, token: int) -> str:
        """The text that has become certain; an unfinished character is held back."""

    def flush(self) -> str:
        """The rest, with U+FFFD for invalid bytes. The detokenizer then starts over."""


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """One more than the greatest id; there may be gaps below."""

    @property
    def specials(self) -> tuple[str, ...]:
        """Texts that `encode` turns into one special token unless told not to."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of the text, at most MAX_TEXT_BYTES of UTF-8; UsageError beyond.

        special=False is for text from users: special-token text in it is encoded as plain text.
        """

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of the ids; ids without text count for nothing, invalid UTF-8 is U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """What one token adds in mid-text, in UTF-8; b"" for special and unknown ids."""

    def detokenizer(self, context: Iterable[int] = (), *, skip_special: bool = True) -> Detokenizer:
        """A stream decoder that goes on after `context`, whose text is not given again."""


def load_tokenizer(spec: TokenizerSpec, path: Path | None) -> Tokenizer:
    """The tokenizer a bundle declares; `path` is its tokenizer.json, None for bytes.

    Raises BadTokenizer for a file that is missing, too large or broken, UnsupportedModel for a
    decoder that rewrites text across tokens, MissingDependency without the tokenizers library.
    """
    if spec.kind == "bytes":
        return ByteTokenizer(spec.offset)
    if spec.kind != "file":
        raise BadTokenizer(f"tokenizer kind '{spec.kind}' is unknown", do="use one of: file, bytes")
    if path is None:
        raise BadTokenizer("the bundle declares a tokenizer file and names none")
    return HFTokenizer(_read_capped(path), where=str(path))


class ByteTokenizer:
    """id = byte + offset. Ids below the offset are specials, which have no text."""

    specials: tuple[str, ...] = ()

    def __init__(self, offset: int = 0) -> None:
        if not 0 <= offset < 2**31:
            raise BadTokenizer(f"byte tokenizer offset {offset} is not from 0 to {2**31 - 1}")
        self._offset = offset

    @property
    def vocab_size(self) -> int:
        return self._offset + 256

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [byte + self._offset for byte in _utf8(text)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        byte = _checked_id(token) - self._offset
        return bytes((byte,)) if 0 <= byte < 256 else b""

    def detokenizer(self, context: Iterable[int] = (), *, skip_special: bool = True) -> Detokenizer:
        return _primed(_ByteStream(self.token_bytes), context)


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, given as its bytes.

    Truncation, padding and BPE dropout that the file may ask for are switched off: they would
    change prompts silently. May be shared by threads.
    """

    def __init__(self, content: bytes, *, where: str = "tokenizer.json") -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise MissingDependency(
                "tokenizers", "cpu", why="this bundle's tokenizer is a tokenizer.json"
            ) from error
        self._where = where
        text = self._guard(lambda: content.decode("utf-8"), "is not UTF-8")
        self._library: Any = self._guard(lambda: Library.from_str(text), "cannot be loaded")
        self._library.no_truncation()
        self._library.no_padding()
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None
        self._special_ids = {
            token: added.content
            for token, added in self._library.get_added_tokens_decoder().items()
            if added.special
        }
        self._unknown = _unknown_id(self._library)
        self._kind = _decoder_kind(self._library.decoder, where)
        self._bytes: dict[int, bytes] = {}
        self._vocab_size: int | None = None
        self._encoding = threading.Lock()  # the switch for special tokens is the library's state

    @property
    def vocab_size(self) -> int:
        if self._vocab_size is None:
            self._vocab_size = max(self._library.get_vocab().values(), default=-1) + 1
        return self._vocab_size

    @property
    def specials(self) -> tuple[str, ...]:
        return tuple(self._special_ids.values())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """As in `Tokenizer`. With special=False, added tokens that the file does not mark as
        special (such as `<think>`) are still parsed; text that can only be encoded as a special
        token, as in some word-piece vocabularies, is refused with UsageError.
        """
        _utf8(text)
        with self._encoding:
            self._library.encode_special_tokens = not special
            ids: list[int] = self._guard(
                lambda: self._library.encode(text, add_special_tokens=False).ids,
                "cannot encode this text",
            )
        if not special:
            forged = (self._special_ids.keys() & set(ids)) - {self._unknown}
            if forged:
                raise UsageError(
                    f"this tokenizer has no plain-text form for {self._special_ids[min(forged)]!r}",
                    do="remove it from the text",
                )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        checked = [_checked_id(token) for token in ids]
        text: str = self._guard(
            lambda: self._library.decode(checked, skip_special_tokens=skip_special),
            "cannot decode these ids",
        )
        return text

    def token_bytes(self, token: int) -> bytes:
        if not self.visible(token):
            return b""
        if self._kind == "bytes":
            return self._level_bytes(token)
        piece = self._library.id_to_token(token)
        if self.is_byte(token):
            return bytes((int(piece[3:5], 16),))
        # twice less once: alone it might lose a leading space
        return self.decode((token, token))[len(self.decode((token,))) :].encode()

    def detokenizer(self, context: Iterable[int] = (), *, skip_special: bool = True) -> Detokenizer:
        if self._kind == "bytes":
            stream: Detokenizer = _ByteStream(
                self._level_bytes
                if not skip_special
                else lambda token: self._level_bytes(token) if self.visible(token) else b""
            )
        else:
            stream = _WindowStream(self, skip_special)
        return _primed(stream, context)

    def visible(self, token: int, skip_special: bool = True) -> bool:
        """Whether the library's decoder gets to see this id."""
        if skip_special and token in self._special_ids:
            return False
        return self._library.id_to_token(_checked_id(token)) is not None

    def is_byte(self, token: int) -> bool:
        """Whether the token is one of SentencePiece's byte tokens, such as <0x0A>."""
        if self._kind != "fallback":
            return False
        piece = self._library.id_to_token(token)
        if len(piece) != 6 or not (piece.startswith("<0x") and piece.endswith(">")):
            return False
        return all(digit in "0123456789abcdefABCDEF" for digit in piece[3:5])

    def _level_bytes(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            piece = self._library.id_to_token(_checked_id(token)) or ""
            try:
                known = bytes(_BYTE_OF[character] for character in piece)
            except KeyError:  # an added token, spelled as itself; the library decides alike
                known = piece.encode()
            self._bytes[token] = known
        return known

    def _guard(self, call: Callable[[], _T], what: str) -> _T:
        """The library's failures as BadTokenizer; its panics derive from BaseException."""
        try:
            return call()
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BadTokenizer(
                f"the tokenizer {what}: {str(error)[:200]}",
                where=self._where,
                do="export the bundle again from a sound tokenizer.json",
            ) from error


class _ByteStream:
    """For tokenizers whose tokens are bytes: an incremental UTF-8 decoder is exact."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


class _WindowStream:
    """For decoders that look at a token's neighbours: text is the difference of two decodes.

    What a token adds depends only on whether it is the first with text, and on the token before
    it; so the window that is decoded again is `anchor` (tokens that have text) plus the last one.
    A run of byte tokens is held until it ends: the library decodes a run as a whole, and an
    invalid byte at its end changes all of it. Compare DecodeStream in huggingface/tokenizers,
    which re-decodes the same way but ends with an error where prefixes differ.
    """

    def __init__(self, tokenizer: HFTokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._start()

    def _start(self) -> None:
        self._anchor: list[int] = []
        self._window: list[int] = []
        self._shown = 0  # characters of the decoded window that have been emitted

    def push(self, token: int) -> str:
        token = _checked_id(token)
        if not self._tokenizer.visible(token, self._skip_special):
            return ""
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode(self._window)
        new = text[self._shown :]
        if self._decode([token]):
            self._anchor = self._window = [token]
        elif self._anchor or text:
            self._anchor = self._anchor or self._window
            self._window = [*self._anchor, token]
        else:
            return new
        self._window = list(self._window)
        self._shown = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        rest = self._decode(self._window)[self._shown :]
        self._start()
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def _primed(stream: Detokenizer, context: Iterable[int]) -> Detokenizer:
    for token in context:
        stream.push(token)
    return stream


def _decoder_kind(decoder: Any, where: str) -> str:
    """'bytes' (byte-level), 'fallback' (with SentencePiece's byte tokens) or 'pieces'.

    Raises UnsupportedModel for what cannot be streamed exactly: steps that work on the joined
    text (other than stripping its start), and decoders for other things than text. Stripping an
    end is refused as well: the library panics on texts shorter than what it strips.
    """
    if decoder is None:
        return "pieces"
    steps = _flattened(json.loads(decoder.__getstate__()))
    names = [step["type"] for step in steps]
    if (
        "ByteLevel" in names
        and set(names) <= {"ByteLevel", "Fuse"}
        and names.count("ByteLevel") < 2
    ):
        return "bytes"
    joined = names.index("Fuse") if "Fuse" in names else len(names)
    per_token = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Strip"}
    exact = set(names[:joined]) <= per_token and set(names[joined:]) <= {"Fuse", "Strip"}
    if not exact or any(step.get("stop") for step in steps):
        more = f" and {len(names) - 12} more steps" if len(names) > 12 else ""
        raise UnsupportedModel(
            f"the tokenizer's decoder {' + '.join(names[:12])}{more} cannot be streamed exactly",
            where=where,
        )
    return "fallback" if "ByteFallback" in names else "pieces"


def _flattened(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flattened(part)]


def _unknown_id(library: Any) -> int | None:
    """The id for text outside the vocabulary; often marked special, yet plain text may yield it."""
    if hasattr(library.model, "unk_token"):
        unknown = library.model.unk_token
        return None if unknown is None else library.token_to_id(unknown)
    found: int | None = json.loads(library.model.__getstate__()).get("unk_id")
    return found


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update((chr(256 + place), byte) for place, byte in enumerate(others))
    return table


_BYTE_OF = _byte_of_character()


def _checked_id(token: int) -> int:
    try:
        number = operator.index(token)
    except TypeError:
        number = -1
    if not 0 <= number < _ID_LIMIT:
        raise UsageError(f"{token!r} is not a token id", do="use integers of 0 or more")
    return number


def _utf8(text: str) -> bytes:
    """The text in UTF-8, or UsageError if it is too long or not valid Unicode."""
    if not isinstance(text, str):
        raise UsageError(f"text is wanted, not {type(text).__name__}")
    limit = UsageError(
        f"the text is longer than {MAX_TEXT_BYTES} bytes", do="split it, or send less of it"
    )
    if len(text) > MAX_TEXT_BYTES:
        raise limit
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at {error.start}",
            do="decode the text with errors='replace'",
        ) from error
    if len(content) > MAX_TEXT_BYTES:
        raise limit
    return content


def _read_capped(path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadTokenizer("the tokenizer is not a regular file", where=str(path))
        with path.open("rb") as file:
            content = read_at_most(file, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadTokenizer(
            f"the tokenizer cannot be read: {error.strerror}", where=str(path)
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise BadTokenizer(
            f"the tokenizer has {max(found.st_size, len(content))} bytes,"
            f" more than {MAX_FILE_BYTES}",
            where=str(path),
        )
    return content
