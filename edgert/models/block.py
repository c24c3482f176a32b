"""The pre-norm transformer block that several families share.

Source   Llama (arXiv 2302.13971), GQA (arXiv 2305.13245); ShmidtS/HAGI @ 38d26f2, prototype/model
Shapes   B batch, T tokens, H hidden, F intermediate
Weights  linear maps are kept [in, out] and fused (q|k|v, gate|up), so that every lowering reads one
         orientation of one file
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgert.models.layers import Heads, Step

Pick = Callable[[nn.Parameter], Tensor]
"""A parameter -> itself, its gradient, or anything else of its shape."""


def values(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


class Block(nn.Module):
    """x + attention(norm(x)), then + swiglu(norm(that)); no biases."""

    def __init__(self, hidden: int, heads: Heads, intermediate: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.attn_norm = nn.Parameter(torch.ones(hidden))
        self.wqkv = nn.Parameter(torch.empty(hidden, heads.packed))
        self.wo = nn.Parameter(torch.empty(heads.query * heads.size, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.w_gate_up = nn.Parameter(torch.empty(hidden, 2 * intermediate))
        self.w_down = nn.Parameter(torch.empty(intermediate, hidden))

    def forward(
        self, step: Step, slot: int, x: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Residual stream x [B, T, H] and what is still to be added to it -> the same."""
        if delta is None:
            h = step.norm(x, self.attn_norm, self.eps)
        else:
            x, h = step.add_norm(x, delta, self.attn_norm, self.eps)
        attended = step.attend(slot, h @ self.wqkv) @ self.wo
        x, h = step.add_norm(x, attended, self.mlp_norm, self.eps)
        return x, step.swiglu(h @ self.w_gate_up) @ self.w_down


def stack(step: Step, blocks: nn.ModuleList, first_slot: int, x: Tensor) -> Tensor:
    """Blocks in a row over KV slots from `first_slot`: residual stream [B, T, H] -> the same."""
    delta: Tensor | None = None  # what the last block left to be added
    for i, block in enumerate(blocks):
        x, delta = block(step, first_slot + i, x, delta)
    return x if delta is None else x + delta


def parts(block: Block, pick: Pick = values) -> dict[str, Tensor]:
    """The tensors of a block under the names and in the orientation [out, in] of published files,
    as views: writing to them writes to the block (or to what `pick` gives for its parameters).

    q and k are in interleaved rotary order (`interleave` converts from half-split order).
    """
    n, m, d = block.heads.query, block.heads.kv, block.heads.size
    q, k, v = pick(block.wqkv).T.split((n * d, m * d, m * d))
    gate, up = pick(block.w_gate_up).T.chunk(2)
    return {
        "attn_norm": pick(block.attn_norm),
        "q": q,
        "k": k,
        "v": v,
        "o": pick(block.wo).T,
        "mlp_norm": pick(block.mlp_norm),
        "gate": gate,
        "up": up,
        "down": pick(block.w_down).T,
    }


def interleave(weight: Tensor, head_size: int) -> Tensor:
    """Rows of a Q or K projection [heads * d, H]: half-split rotary order -> interleaved order.

    Half-split rotation pairs row j with row j + d/2 of a head; interleaved pairs 2j with 2j + 1.
    """
    halves = weight.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).reshape(weight.shape)
