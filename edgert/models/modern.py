"""Operators of sets 23 and 24, which TensorRT has from 10.15 on, over the same state.

    RMSNormalization   the norm as one operator
    RotaryEmbedding    rotation at positions that are read from tables
    Attention          keys are not repeated for the queries that share them, scores are not stored

ONNX Runtime runs them from 1.27 on. TensorRT takes an Attention that has one output, and neither
`past` nor a precision of its softmax: so the state is written before it. A chunk of tokens behind a
state needs a mask, since `is_causal` counts from the first key; `nonpad_kv_seqlen` says beside it
where the keys end. New rows are written by ScatterND, as in portable graphs: TensorRT takes
TensorScatter only where the capacity is a constant of the graph, and here it grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgert.models.layers import Heads, Portable, split_heads

OPSET = 24
MULTIPLE = 4


class Modern(Portable):
    def prepare(self, lens: Tensor, tokens: int, past: Sequence[Tensor]) -> None:
        super().prepare(lens, tokens, past)
        self.filled = lens + tokens

    @staticmethod
    def refusal(heads: Heads) -> str | None:
        """Why this geometry does not compile, or None where it does."""
        if heads.size % MULTIPLE:
            return f"TensorRT's attention has no kernel for head size {heads.size}"
        return None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.onnx.ops.symbolic(
            "RMSNormalization",
            (x, weight),
            {"axis": -1, "epsilon": eps},
            dtype=x.dtype,
            shape=x.shape,
            version=23,
        )

    def rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(qkv, self.heads)
        return self._rotate(q), self._rotate(k), v

    def _rotate(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "RotaryEmbedding",
            (x, self.cos, self.sin, self.positions),
            {"interleaved": 1},
            dtype=x.dtype,
            shape=x.shape,
            version=23,
        )

    def attend(self, slot: int, qkv: Tensor) -> Tensor:
        q, k, v = self.rotated(qkv)
        k = self.k[slot] = self.write(self.past_k[slot], k)
        v = self.v[slot] = self.write(self.past_v[slot], v)
        out = torch.onnx.ops.symbolic(
            "Attention",
            (q, k, v, self.seen[:, None], None, None, self.filled),
            {"scale": self.heads.size**-0.5},
            dtype=q.dtype,
            shape=q.shape,
            version=OPSET,
        )
        return out.transpose(1, 2).flatten(-2)
