"""The bounded GGUF header pass: every count, length and offset is checked against the file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from tiny_llama import gguf_keys, gguf_tensors, tiny, write_gguf

from edgert.errors import BadCheckpoint, EdgertError, UnsupportedModel
from edgert.models.importers import load_source
from edgert.models.importers.gguf_file import GGUFFile

F32 = {0: (1, 4)}
Q4_0 = {2: (32, 18)}
NAMES = {0: "F32", 2: "Q4_0"}
UINT32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], offset: int = 0, kind: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf(
    *parts: bytes,
    tensors: int = 0,
    keys: int = 0,
    version: int = 3,
    magic: bytes = b"GGUF",
    data: int = 0,
) -> bytes:
    body = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return body + bytes(-len(body) % 32) + bytes(data) if data else body


def opened(data: bytes, folder: Path, sizes: dict[int, tuple[int, int]] = F32) -> GGUFFile:
    path = folder / "x.gguf"
    path.write_bytes(data)
    return GGUFFile(path, sizes, NAMES)


def test_everything_is_read_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    """Keys, shapes and bytes equal those of the gguf package, for a file of every kind of value."""
    keys = gguf_keys(tiny()) | {"a.list": [1, 2, 3], "a.text": ["x", "ä"], "a.flag": True}
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(tiny()), keys)
    reference = GGUFReader(path)
    with GGUFFile(path, F32, NAMES) as file:
        assert file.keys["a.text"] == ["x", "ä"]
        for name, field in reference.fields.items():
            if not name.startswith("GGUF."):
                want = field.contents()
                got = file.keys[name]
                assert got == (pytest.approx(want) if isinstance(want, float) else want)
        assert list(file.tensors) == [t.name for t in reference.tensors]
        for want in reference.tensors:
            stored = file.tensors[want.name]
            assert stored.shape == tuple(int(n) for n in want.shape[::-1])
            assert bytes(file.bytes_of(stored)) == want.data.tobytes()


def test_a_float_is_the_decimal_it_was_written_as(tmp_path: Path) -> None:
    """A float32 of 1e-5 is read as 1e-5, not as its expansion in double precision."""
    value = struct.pack("<f", 1e-5)
    with opened(gguf(key("eps", 6, value), keys=1), tmp_path) as file:
        assert file.keys["eps"] == 1e-5


NUMBER = struct.pack("<I", 7)
TWICE = tensor("a", (2,)) + tensor("a", (2,), 32)
SHARED = tensor("a", (16,)) + tensor("b", (16,), 32)
ALIGN = "general.alignment"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "the magic number needs 4 bytes, the file has 2 left"),
        (gguf(magic=b"GGML"), "does not start with 'GGUF'"),
        (b"GGUF\3\0\0\0\0", "the number of tensors needs 8 bytes"),
        (gguf(tensors=1 << 63), "number of tensors is 9223372036854775808, above the limit"),
        (gguf(keys=1 << 40), "number of metadata keys is 1099511627776, above the limit"),
        (gguf(keys=1), "the length of a metadata key needs 8 bytes, the file has 0 left"),
        (gguf(struct.pack("<Q", 1 << 62), keys=1), "length of a metadata key is 46116860184273879"),
        (gguf(key(b"\xff", 4, NUMBER), keys=1), "a metadata key is not UTF-8"),
        (gguf(key("k", 4, NUMBER) * 2, keys=2), "the key 'k' appears twice"),
        (gguf(key("k", 99, b""), keys=1), "'k' has the unknown value type 99"),
        (gguf(key("k", 4, b"\1"), keys=1), "'k' needs 4 bytes, the file has 1 left"),
        (gguf(key("k", STRING, struct.pack("<Q", 1 << 50)), keys=1), "length of the value of 'k'"),
        (gguf(key("k", STRING, text(b"\xc3")), keys=1), "the value of 'k' is not UTF-8"),
        (
            gguf(key("k", ARRAY, struct.pack("<IQ", UINT32, 1 << 60)), keys=1),
            "the length of 'k' is 1152921504606846976, above the limit of 4194304",
        ),
        (
            gguf(key("k", ARRAY, struct.pack("<IQ", UINT32, 1 << 20)), keys=1),
            "'k' needs 4194304 bytes, the file has 0 left",
        ),
        (
            gguf(key("k", ARRAY, struct.pack("<IQ", ARRAY, 1)), keys=1),
            "'k' has the unknown value type 9",
        ),
        (
            gguf(key("k", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 40)), keys=1),
            "a string of 'k' claims 1099511627776 bytes",
        ),
        (
            gguf(key("k", ARRAY, struct.pack("<IQ", STRING, 1000)), keys=1),
            "a string of 'k' is cut off or not UTF-8",
        ),
        (
            gguf(key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff")), keys=1),
            "a string of 'k' is cut off or not UTF-8",
        ),
        (gguf(key(ALIGN, 4, struct.pack("<I", 0)), keys=1), "general.alignment is 0"),
        (gguf(key(ALIGN, STRING, text("32")), keys=1), "general.alignment is '32'"),
        (gguf(key(ALIGN, 4, struct.pack("<I", 48)), keys=1), "alignment 48 is not a power of two"),
        (gguf(text("a") + struct.pack("<I", 9), tensors=1), "number of dimensions of 'a' is 9"),
        (gguf(tensor("a", (1 << 41,)), tensors=1), "a dimension of 'a' is 2199023255552"),
        (gguf(tensor("a", ()), tensors=1, data=32), "the tensor 'a' has the shape []"),
        (gguf(tensor("a", (0, 3)), tensors=1, data=32), "the tensor 'a' has the shape [0, 3]"),
        (gguf(tensor("a", (1 << 39,) * 4), tensors=1, data=32), "stores rows in blocks of 1"),
        (gguf(tensor("a", (9,)), tensors=1, data=32), "'a' is said to lie at bytes 64 to 100 of"),
        (gguf(tensor("a", (1,), 4), tensors=1, data=32), "bytes 68 to 72 of 96, aligned to 32"),
        (gguf(tensor("a", (1,), 1 << 62), tensors=1, data=32), "'a' is said to lie at bytes"),
        (gguf(TWICE, tensors=2, data=64), "the tensor 'a' appears twice"),
        (gguf(SHARED, tensors=2, data=128), "the tensors 'a' and 'b' share bytes"),
    ],
)
def test_a_header_that_does_not_hold_together_is_refused(
    data: bytes, message: str, tmp_path: Path
) -> None:
    """One typed error, before anything of the claimed size is allocated."""
    with pytest.raises(BadCheckpoint) as failure:
        opened(data, tmp_path)
    assert message in str(failure.value)


def test_rows_must_be_whole_blocks(tmp_path: Path) -> None:
    """A quantized row is a number of blocks."""
    data = gguf(tensor("a", (2, 48), kind=2), tensors=1, data=64)
    with pytest.raises(BadCheckpoint, match="Q4_0 stores rows in blocks of 32"):
        opened(data, tmp_path, Q4_0)


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions_are_refused(version: int, tmp_path: Path) -> None:
    """Version 1 counts differently; a byte-swapped version is a big-endian file."""
    with pytest.raises(UnsupportedModel, match=f"GGUF version {version}: only versions 2 and 3"):
        opened(gguf(version=version), tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small model file."""
    model = tiny(num_hidden_layers=1, hidden_size=16, intermediate_size=8, head_dim=4)
    vocabulary = [f"<{i}>" for i in range(37)]
    keys = gguf_keys(model) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.eos_token_id": 2,
    }
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    return write_gguf(path, gguf_tensors(model), keys).read_bytes()


def test_every_cut_is_refused(sound: bytes, tmp_path: Path) -> None:
    """A file cut anywhere in its header or data is one BadCheckpoint."""
    path = tmp_path / "cut.gguf"
    for kept in [*range(4, 2600, 13), len(sound) // 2, len(sound) - 33]:
        path.write_bytes(sound[:kept])
        with pytest.raises(BadCheckpoint):
            load_source(path)


def test_damage_never_escapes_as_another_error(sound: bytes, tmp_path: Path) -> None:
    """Random bytes of the header overwritten: the file loads or is refused with our errors."""
    random = np.random.default_rng(17)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for i in range(400):
        data = bytearray(sound)
        for at in random.integers(4, 2600, size=1 + i % 3):
            data[at] = random.integers(256) if i % 2 else data[at] ^ (1 << random.integers(8))
        path.write_bytes(data)
        try:
            load_source(path)
        except EdgertError:
            refused += 1
    assert 100 < refused < 400
