"""ggml's tensor types decoded one value at a time, to check fast decoders against.

Follows dequantize_row_* of ggml-org/ggml, src/ggml-quants.c, without any of its speed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt


def half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def f32(b: bytes) -> Iterator[float]:
    yield struct.unpack("<f", b)[0]


def f16(b: bytes) -> Iterator[float]:
    yield half(b, 0)


def bf16(b: bytes) -> Iterator[float]:
    yield struct.unpack("<f", b"\0\0" + b)[0]


def q4_0(b: bytes) -> Iterator[float]:
    d = half(b, 0)
    yield from (d * ((q & 15) - 8) for q in b[2:])
    yield from (d * ((q >> 4) - 8) for q in b[2:])


def q4_1(b: bytes) -> Iterator[float]:
    d, m = half(b, 0), half(b, 2)
    yield from (d * (q & 15) + m for q in b[4:])
    yield from (d * (q >> 4) + m for q in b[4:])


def fifth(high: bytes, i: int) -> int:
    return int.from_bytes(high, "little") >> i & 1


def q5_0(b: bytes) -> Iterator[float]:
    d, high = half(b, 0), b[2:6]
    yield from (d * ((q & 15 | fifth(high, i) << 4) - 16) for i, q in enumerate(b[6:]))
    yield from (d * ((q >> 4 | fifth(high, i + 16) << 4) - 16) for i, q in enumerate(b[6:]))


def q5_1(b: bytes) -> Iterator[float]:
    d, m, high = half(b, 0), half(b, 2), b[4:8]
    yield from (d * (q & 15 | fifth(high, i) << 4) + m for i, q in enumerate(b[8:]))
    yield from (d * (q >> 4 | fifth(high, i + 16) << 4) + m for i, q in enumerate(b[8:]))


def q8_0(b: bytes) -> Iterator[float]:
    yield from (half(b, 0) * signed(q) for q in b[2:])


def q2_k(b: bytes) -> Iterator[float]:
    scales, quants, d, m = b[:16], b[16:80], half(b, 80), half(b, 82)
    for i in range(256):
        part, inside = divmod(i, 128)
        shift, column = divmod(inside, 32)
        scale = scales[i // 16]
        yield d * (scale & 15) * (quants[32 * part + column] >> 2 * shift & 3) - m * (scale >> 4)


def q3_k(b: bytes) -> Iterator[float]:
    high, quants, packed, d = b[:32], b[32:96], b[96:108], half(b, 108)
    scales = [
        (packed[j % 8] >> 4 * (j // 8) & 15) | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4
        for j in range(16)
    ]
    for i in range(256):
        part, inside = divmod(i, 128)
        shift, column = divmod(inside, 32)
        low = quants[32 * part + column] >> 2 * shift & 3
        bit = high[column] >> (4 * part + shift) & 1
        yield d * (scales[i // 16] - 32) * (low - (0 if bit else 4))


def scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
    return scale, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def q4_k(b: bytes) -> Iterator[float]:
    d, m, packed, quants = half(b, 0), half(b, 2), b[4:16], b[16:]
    for j in range(8):
        scale, minimum = scale_and_minimum(packed, j)
        for q in quants[32 * (j // 2) :][:32]:
            yield d * scale * (q >> 4 * (j % 2) & 15) - m * minimum


def q5_k(b: bytes) -> Iterator[float]:
    d, m, packed, high, quants = half(b, 0), half(b, 2), b[4:16], b[16:48], b[48:]
    for j in range(8):
        scale, minimum = scale_and_minimum(packed, j)
        for q, h in zip(quants[32 * (j // 2) :][:32], high, strict=True):
            yield d * scale * (q >> 4 * (j % 2) & 15 | (h >> j & 1) << 4) - m * minimum


def q6_k(b: bytes) -> Iterator[float]:
    low, high, scales, d = b[:128], b[128:192], b[192:208], half(b, 208)
    for i in range(256):
        part, inside = divmod(i, 128)
        quarter, column = divmod(inside, 32)
        nibble = low[64 * part + column + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        bits = high[32 * part + column] >> 2 * quarter & 3
        yield d * signed(scales[i // 16]) * ((nibble | bits << 4) - 32)


DECODERS: dict[str, Callable[[bytes], Iterator[float]]] = {
    "F32": f32,
    "F16": f16,
    "BF16": bf16,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
HALVES = {  # type -> where its float16 fields are
    **{"F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}


def decode(kind: str, block: bytes) -> list[float]:
    return list(DECODERS[kind](block))


def random_blocks(
    kind: str, count: int, size: int, random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """[count, size] random bytes whose floating-point fields are ordinary numbers."""
    if kind in ("F32", "BF16"):
        values = random.standard_normal(count).astype("<f4").view(np.uint8).reshape(count, 4)
        return values[:, 4 - size :].copy()
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = random.uniform(-0.1, 0.1, count).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks
