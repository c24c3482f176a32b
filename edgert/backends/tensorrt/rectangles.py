"""A part of a tensor as few two-dimensional copies: what CUDA copies in one call.

[B, heads, capacity, d], rows 0 to n of the third axis, from one capacity to another:
one copy of B * heads lines, each n * d elements wide
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Rectangle:
    """`height` lines of `width` bytes. Of each side, the offset of the first line and the bytes
    from line to line."""

    to: int
    to_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


@dataclass(frozen=True)
class Part:
    """What slices name of a dense tensor, in bytes: where it begins, and its steps by axis."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def part(shape: tuple[int, ...], itemsize: int, at: Slices = ()) -> Part:
    """Slices as numpy reads them, of step 1. Axes that `at` does not name are whole."""
    sizes, offset, strides = [], 0, []
    stride = itemsize
    for axis in reversed(range(len(shape))):
        chosen = at[axis] if axis < len(at) else slice(None)
        start, stop, step = chosen.indices(shape[axis])
        if step != 1:
            raise ValueError(f"a step of {step} is not copied")
        sizes.append(max(0, stop - start))
        offset += start * stride
        strides.append(stride)
        stride *= shape[axis]
    return Part(tuple(reversed(sizes)), offset, tuple(reversed(strides)))


def rectangles(to: Part, source: Part, itemsize: int) -> Iterator[Rectangle]:
    """The copies that move one part onto another of the same shape."""
    if to.shape != source.shape:
        raise ValueError(f"a part of {source.shape} onto one of {to.shape}")
    if 0 in to.shape:
        return
    axes = list(zip(to.shape, to.strides, source.strides, strict=True))
    width = itemsize
    while axes and axes[-1][1] == axes[-1][2] == width:  # dense on both sides: one line
        width *= axes.pop()[0]
    axes = [axis for axis in axes if axis[0] != 1]
    merged: list[tuple[int, int, int]] = []
    for size, step_to, step_source in axes:  # two axes that are one to both sides
        if merged and merged[-1][1:] == (size * step_to, size * step_source):
            merged[-1] = (merged[-1][0] * size, step_to, step_source)
        else:
            merged.append((size, step_to, step_source))
    height, pitch_to, pitch_source = merged.pop() if merged else (1, width, width)
    for place in product(*(range(size) for size, _, _ in merged)):
        yield Rectangle(
            to.offset + sum(i * axis[1] for i, axis in zip(place, merged, strict=True)),
            pitch_to,
            source.offset + sum(i * axis[2] for i, axis in zip(place, merged, strict=True)),
            pitch_source,
            width,
            height,
        )
