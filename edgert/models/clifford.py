"""Clifford algebra Cl(3,0,0): products of multivectors of eight components on the last axis.

Blade index = 3-bit mask, bit i for e_{i+1}: 1, e1, e2, e12, e3, e13, e23, e123. All three basis
vectors square to +1; nothing is normalised.

Source  ShmidtS/HAGI @ 38d26f2, prototype/model (general product, reverse, grade projection)
"""

from __future__ import annotations

import torch
from torch import Tensor

BLADES = 8
GRADES = tuple(blade.bit_count() for blade in range(BLADES))


def sign(a: int, b: int) -> int:
    """Sign of blade a times blade b, whose blade is a ^ b: the swaps that put it in order."""
    swaps = sum((a >> j & b).bit_count() for j in (1, 2))
    return -1 if swaps & 1 else 1


def product(x: Tensor, y: Tensor) -> Tensor:
    """Geometric product of x and y [..., 8] -> [..., 8]."""
    out = []
    for blade in range(BLADES):
        terms = [sign(a, a ^ blade) * x[..., a] * y[..., a ^ blade] for a in range(BLADES)]
        out.append(sum(terms[1:], terms[0]))
    return torch.stack(out, dim=-1)


def reverse(x: Tensor) -> Tensor:
    """The order of the vectors in each blade reversed: grades 2 and 3 change their sign."""
    signs = [-1.0 if grade * (grade - 1) // 2 & 1 else 1.0 for grade in GRADES]
    return x * x.new_tensor(signs)


def project(x: Tensor, grade: int) -> Tensor:
    """The part of one grade, the other components zero."""
    return x * x.new_tensor([float(g == grade) for g in GRADES])


# The product of a multivector with itself: mixed terms of blades that anticommute cancel, so that
# grade 0 is a signed sum of squares and each bivector the sum of two products.
SQUARE_SIGNS = tuple(sign(a, a) for a in range(BLADES))
PAIRS = {
    3: ((0, 3, 1), (4, 7, 1)),
    5: ((0, 5, 1), (2, 7, -1)),
    6: ((0, 6, 1), (1, 7, 1)),
}
"""Bivector blade -> (a, b, sign): the square's component is the sum of 2 * sign * x[a] * x[b]."""


def square(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., 8] times itself -> grade 0 [...] and grade 2 [..., 3] (e12, e13, e23)."""
    scalar = (x * x * x.new_tensor([float(s) for s in SQUARE_SIGNS])).sum(-1)
    bivector = []
    for one, other in PAIRS.values():
        first, second = (s * x[..., a] * x[..., b] for a, b, s in (one, other))
        bivector.append(2 * (first + second))
    return scalar, torch.stack(bivector, dim=-1)
