"""The operations of HRM whose best graph form differs per target, each with one eager truth.

A forward pass is written once against a `Step`. Nothing is masked: padding and the puzzle prefix
attend and are attended to.

Shapes  B batch, N positions, d hidden, h heads, D = d / h head size, m gated width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def half_split(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [N, D/2] -> [N, D]: (c, c) and (-s, s), the sign of the rotation folded in."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j + D/2}) of the last axis: the half-split order.

    x [..., N, D] with D even; cos, sin [N, D] from `half_split` -> like x.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), -1) * sin


class Step:
    """Plain torch over whole grids.

    cos, sin  rotary tables [N, D/2] in float32, or None where positions are added, not rotated
    """

    def __init__(self, heads: int, cos: Tensor | None = None, sin: Tensor | None = None) -> None:
        self.heads = heads
        self.turns = None if cos is None or sin is None else half_split(cos, sin)

    def add_norm(self, x: Tensor, delta: Tensor, eps: float) -> Tensor:
        """rms(x + delta) without a weight: y / sqrt(mean(y^2) + eps) over the last axis."""
        y = x + delta
        return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[..., 2m] -> [..., m]: SiLU(first half) * second half. Source: arXiv 2002.05202."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(self, qkv: Tensor, dropout: float = 0.0) -> Tensor:
        """Attention of all positions to all: queries, keys, values [B, N, 3d] -> [B, N, d].

        dropout  of the attention weights
        """
        packed = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, h, N, D]
        qk, v = packed[:2], packed[2]
        if self.turns is not None:
            qk = rotate(qk, *self.turns)
        q, k = qk[0], qk[1]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = F.dropout(scores.softmax(-1), dropout, dropout > 0.0) @ v
        return out.transpose(1, 2).flatten(-2)
