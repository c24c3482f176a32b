"""A solver in plain torch: segments of the same network through torch's own fused operations.

The network's arithmetic is edgert/models/hrm/model.py; attention and norms are torch's kernels
here, which take as long as the written-out ones in eager mode and less when they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.hrm.config import HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.hrm.step import Step, rotate

Segments = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Kernels(Step):
    """Scaled dot product attention and rms_norm as torch has them."""

    def add_norm(self, x: Tensor, delta: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x + delta, (x.shape[-1],), eps=eps)

    def attend(self, qkv: Tensor, dropout: float = 0.0) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.turns is not None:
            q, k = rotate(q, *self.turns), rotate(k, *self.turns)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Segment(nn.Module):
    """One segment: z_h, z_l, e [B, N, d] -> the new z_h, z_l; `torch.compile` takes it whole."""

    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model
        self.step = Kernels(model.config.num_heads, model.cos, model.sin)

    def forward(self, z_h: Tensor, z_l: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.refine(self.step, z_h, z_l, e, self.model.config.updates)


@torch.inference_mode()
def solved(
    model: HRM, segment: Segments, ids: Tensor, puzzle: Tensor | None, batch: int
) -> list[list[int]]:
    """ids int32 [n, S] -> the answers at full depth, `batch` puzzles at a time."""
    found: list[list[int]] = []
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        e = model.embed(ids[part], None if puzzle is None else puzzle[part])
        z_h, z_l = model.initial(len(e))
        for _ in range(model.config.halt_max_steps):
            z_h, z_l = segment(z_h, z_l, e)
        found += model.heads(z_h)[0].argmax(-1).tolist()
    return found


def published(width: int, layers: int, cells: int) -> HRMConfig:
    """The published configuration of 27 million parameters at 512, 4, 81; or a smaller one."""
    return HRMConfig(
        seq_len=cells,
        vocab_size=11,
        hidden_size=width,
        num_heads=max(1, width // 64),
        expansion=4.0,
        h_cycles=2,
        l_cycles=2,
        h_layers=layers,
        l_layers=layers,
        pos_encodings="rope",
        halt_max_steps=2,  # all that the gate runs: a segment is the same for any number
        puzzle_emb_ndim=width,
    )


def drawn(config: HRMConfig) -> HRM:
    """Random weights, the same for the same configuration."""
    model = HRM(config).initialize(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def products(config: HRMConfig) -> tuple[list[tuple[int, int]], float]:
    """The weights [in, out] that a segment multiplies by in its order, and its operations: two
    for each weight and position. Attention and all that is no product are left out."""
    d, m = config.hidden_size, config.intermediate_size
    block = [(d, 3 * d), (d, d), (d, 2 * m), (m, d)]
    layers = {"L": config.l_layers, "H": config.h_layers}
    shapes = [shape for level in config.updates for shape in block * layers[level]]
    return shapes, 2.0 * config.positions * sum(a * b for a, b in shapes)


def segment_inputs(config: HRMConfig) -> dict[str, Any]:
    """One puzzle of random digits: ids int32 [S], and an empty row of the puzzle table."""
    drawn_ids = torch.randint(
        1, config.vocab_size, (config.seq_len,), generator=torch.Generator().manual_seed(1)
    )
    return {"ids": drawn_ids.int(), "puzzle": torch.zeros(config.puzzle_emb_ndim)}
