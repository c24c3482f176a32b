"""The eight ways to lay a grid on itself, by the ids that data sets name them with.

    0 as it is   1, 2, 3 turned counter-clockwise by 90, 180, 270 degrees
    4 mirrored left to right   5 flipped upside down   6 transposed
    7 turned by 90 degrees, then mirrored left to right

Source  sapientinc/HRM @ 42410da, dataset/common.py
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)

COUNT = 8
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(grid: NDArray[T], way: int) -> NDArray[T]:
    """A view of the grid [..., rows, columns], laid the given way (0 to 7)."""
    if way in (1, 2, 3):
        return np.rot90(grid, way, axes=(-2, -1))
    if way == 4:
        return grid[..., :, ::-1]
    if way == 5:
        return grid[..., ::-1, :]
    if way == 6:
        return grid.swapaxes(-1, -2)
    if way == 7:
        return np.rot90(grid, 1, axes=(-2, -1))[..., :, ::-1]
    assert way == 0, f"{way} is no way to lay a grid"
    return grid
