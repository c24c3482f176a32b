"""Published tensors -> `Decoder`: expected names and shapes, then one block at a time.

A source only has to name its tensors (`Names`) and answer for their shapes and values (`Weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgert.models.block import Block, interleave, parts
from edgert.models.decoder import Decoder, DecoderConfig
from edgert.models.importers.common import Problems, Progress, named

PARTS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
"""The tensors of a block, by the names of `edgert.models.block.parts`."""

_EXTRA = "do not belong to this architecture"


class Weights(Protocol):
    """The tensors of one source."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape as torch writes it, linear maps [out, in]. Reads no values."""

    def read(self, name: str) -> Tensor:
        """One tensor, float32 on the CPU. May alias the file: callers copy."""


@dataclass(frozen=True)
class Names:
    """What a source calls the tensors of a decoder. `head` is absent where it may be tied."""

    embed: str
    final_norm: str
    head: str
    blocks: tuple[dict[str, str], ...]  # PARTS -> name, one mapping per block
    half_split: bool = False  # rotary order of q and k


def numbered(prefixes: Iterable[str], parts: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """Block names: every prefix in order, each with the same names behind it."""
    return tuple({part: prefix + name for part, name in parts.items()} for prefix in prefixes)


def expected_shapes(c: DecoderConfig, names: Names) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the configuration asks for."""
    h, f = c.hidden_size, c.intermediate_size
    queries, keys = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    block = {
        "attn_norm": (h,),
        "q": (queries, h),
        "k": (keys, h),
        "v": (keys, h),
        "o": (h, queries),
        "mlp_norm": (h,),
        "gate": (f, h),
        "up": (f, h),
        "down": (h, f),
    }
    shapes: dict[str, tuple[int, ...]] = {names.embed: (c.vocab_size, h), names.final_norm: (h,)}
    if not c.tied_head:
        shapes[names.head] = (c.vocab_size, h)
    for block_names in names.blocks:
        shapes |= {block_names[part]: block[part] for part in PARTS}
    return shapes


def compare_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    embed: str,
    head: str,
    problems: Problems,
) -> None:
    """Add every missing, unexpected and wrongly shaped tensor to `problems`.

    A `head` that is not wanted is tied: it may be there, like the embedding.
    """
    for name, shape in wanted.items():
        if name not in found:
            problems.add(f"{name} {list(shape)} is missing")
        elif tuple(found[name]) != shape:
            problems.add(f"{name} is {list(found[name])}, the config wants {list(shape)}")
    extra = sorted(set(found) - set(wanted) - {head})
    if extra:
        problems.add(f"{len(extra)} unexpected, they {_EXTRA}: {named(extra)}")
    if head not in wanted and head in found and tuple(found[head]) != wanted[embed]:
        problems.add(f"tied head: {head} is {list(found[head])}, the embedding is not")


def build(
    c: DecoderConfig, names: Names, weights: Weights, problems: Problems, progress: Progress | None
) -> Decoder:
    """The decoder with all weights in place; shapes must have been compared.

    Adds non-finite tensors and a tied head that differs from the embedding to `problems`; the
    caller checks them before using the result. Holds one block beside the model.
    """

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        if not torch.isfinite(tensor).all():
            problems.add(f"{name} holds NaN or infinite values")
        return tensor

    model = Decoder(c).eval().requires_grad_(False)
    model.embed.copy_(read(names.embed))
    model.final_norm.copy_(read(names.final_norm))
    if model.head is not None:
        model.head.copy_(read(names.head))
    elif names.head in weights.shapes() and not torch.equal(read(names.head), model.embed):
        problems.add(f"tied head: {names.head} differs from {names.embed}")
    for i, (block, block_names) in enumerate(zip(model.blocks, names.blocks, strict=True)):
        assert isinstance(block, Block)
        for part, view in parts(block).items():
            value = read(block_names[part])
            if names.half_split and part in ("q", "k"):
                value = interleave(value, c.head_size)
            view.copy_(value)
        if progress is not None:
            progress(i + 1, c.num_layers)
    return model
