"""Weights of few bits in blocks: codes, scales and zero points, packed as operators read them.

    value   (code - zero) * scale, one float32 scale and one zero point for each block of inputs
    blocks  lie along the inputs of a linear map (K), separately for each of its outputs (N)
    packed  uint8 [N, K / block, block * bits / 8], of two 4-bit codes the first in the low half
    zeros   uint8 [N, ceil(K / block * bits / 8)], packed alike; absent where they are 2^(bits-1)

Source: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
COARSE = 128
"""Inputs that share a scale where a scheme of 4 bits keeps 8: its loss is elsewhere."""

LEVELS = (0, 4)
METHODS = ("plain", "search", "weighted", "kquant", "hqq", "gptq")
CALIBRATED = ("weighted", "gptq")
"""Methods that read a calibration text."""
UNEVEN = ("kquant", "hqq")
"""Methods that have no symmetric form."""

_KNOWN: dict[str, tuple[Any, ...]] = {
    "bits": BITS,
    "head": BITS,
    "block": BLOCKS,
    "symmetric": (True, False),
    "accuracy_level": LEVELS,
    "method": METHODS,
    "mixed": (True, False),
    "tuned": (True, False),
}

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and how they are multiplied.

    head            bits of the embedding and the head, tied or not
    block           inputs that share a scale, where their number is divisible by it; `COARSE` of
                    what has 8 bits in a scheme of 4
    symmetric       the zero point is the middle of the codes, and not stored
    accuracy_level  of MatMulNBits: 0 computes in float32, 4 with activations rounded to int8
    method          how codes and scales are found: see methods.py
    mixed           matrices that cost too much in 4 bits have 8: see mixed.py
    tuned           scales are moved, all together, until the model says what it did: see tuning.py

    Raises UsageError for what no operator or method takes.
    """

    bits: int
    block: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    method: str = "plain"
    head: int = 4
    mixed: bool = False
    tuned: bool = False

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known or type(value) is not type(known[0]):
                raise UsageError(
                    f"{name} = {value!r:.40} is not possible",
                    do=f"choose one of: {', '.join(map(str, known))}",
                )
        if self.symmetric and self.method in UNEVEN:
            raise UsageError(
                f"method {self.method} has no symmetric form", do="set symmetric = false"
            )

    def __str__(self) -> str:
        head = f", embedding and head {self.head}" if self.head != self.bits else ""
        kind = "symmetric" if self.symmetric else "with zero points"
        tuned = ", tuned" if self.tuned else ""
        return f"{self.bits} bits{head}, blocks of {self.block}, {kind}, {self.method}{tuned}"

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def at(self, bits: int) -> Scheme:
        """The scheme for a matrix of so many bits."""
        coarse = bits == 8 and self.bits != 8
        return replace(self, bits=bits, block=max(self.block, COARSE) if coarse else self.block)

    def block_of(self, inputs: int) -> int:
        """The block for so many inputs: the scheme's, or the largest smaller one that divides
        them, so that nothing is padded; 0 where none does."""
        return next((b for b in reversed(BLOCKS) if b <= self.block and inputs % b == 0), 0)


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K]: codes uint8 [N, K], scales float32 [N, K / block], zeros uint8 alike."""

    bits: int
    codes: Codes
    scales: Floats
    zeros: Codes | None = None

    @property
    def block(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def packed(self) -> Codes:
        """The codes as MatMulNBits reads them: uint8 [N, K / block, block * bits / 8]."""
        outputs, blocks = self.scales.shape
        return packed(self.codes, self.bits).reshape(outputs, blocks, -1)

    def packed_zeros(self) -> Codes:
        """The zero points, where there are some."""
        assert self.zeros is not None
        return packed(self.zeros, self.bits)

    def signed(self) -> NDArray[np.int16]:
        """The codes less their zero points: int16 [N, K / block, block]."""
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None]
        codes = self.codes.reshape(*self.scales.shape, -1).astype(np.int16)
        return codes - np.asarray(zeros, np.int16)

    def values(self) -> Floats:
        """What the codes stand for: float32 [N, K]."""
        values: Floats = self.signed() * self.scales[..., None]
        return values.reshape(self.codes.shape)


def packed(codes: Codes, bits: int) -> Codes:
    """Rows of codes uint8 [N, n] -> uint8 [N, ceil(n * bits / 8)]; a row fills whole bytes."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    halves: Codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return halves


SCHEMES = {
    "int8": Scheme(8, block=32, method="gptq", head=8),
    "int4": Scheme(4, block=32, method="gptq", head=4, mixed=True, tuned=True),
}
"""What a precision stands for, unless a recipe says otherwise. Figures: docs/precision.md."""


def scheme_of(precision: str, given: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme of a weight-only precision, with what a recipe changes in it.

    Raises UsageError for a key or value that it does not have.
    """
    names = [field.name for field in fields(Scheme) if field.name != "bits"]
    unknown = [key for key in given or () if key not in names]
    if unknown:
        raise UsageError(
            f"{precision}: {unknown[0]!r:.60} is not a setting", do=f"known are: {', '.join(names)}"
        )
    return replace(SCHEMES[precision], **(given or {}))
