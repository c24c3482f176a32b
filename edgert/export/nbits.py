"""Weights of few bits in blocks: codes, scales and zero points, packed as operators read them.

    value   (code - zero) * scale, one float32 scale and one zero point for each block of inputs
    blocks  lie along the inputs of a linear map (K), separately for each of its outputs (N)
    packed  uint8 [N, K / block, block * bits / 8], of two 4-bit codes the first in the low half
    zeros   uint8 [N, ceil(K / block * bits / 8)], packed alike; absent where they are 2^(bits-1)

Source: onnxruntime docs/ContribOperators.md, com.microsoft.MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
LEVELS = (0, 4)

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and how they are multiplied.

    block           inputs that share a scale, where their number is divisible by it
    symmetric       the zero point is the middle of the codes, and not stored
    accuracy_level  of MatMulNBits: 0 computes in float32, 4 with activations rounded to int8
    method          one of `methods.METHODS`: how codes and scales are found
    """

    bits: int
    block: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    method: str = "plain"

    def __post_init__(self) -> None:
        for name, known in (("bits", BITS), ("block", BLOCKS), ("accuracy_level", LEVELS)):
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                raise UsageError(
                    f"{name} = {value!r:.40} is not possible",
                    do=f"choose one of: {', '.join(map(str, known))}",
                )

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

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

    def packed_zeros(self) -> Codes | None:
        return None if self.zeros is None else packed(self.zeros, self.bits)

    def values(self) -> Floats:
        """What the codes stand for: float32 [N, K]."""
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None]
        codes = self.codes.reshape(*self.scales.shape, -1).astype(np.float32)
        values: Floats = (codes - np.asarray(zeros, np.float32)) * self.scales[..., None]
        return values.reshape(self.codes.shape)


def packed(codes: Codes, bits: int) -> Codes:
    """Rows of codes uint8 [N, n] -> uint8 [N, ceil(n * bits / 8)]; a row fills whole bytes."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
