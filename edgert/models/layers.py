"""The operations whose best graph form differs per target, each with one eager truth.

A model's forward pass is written once against a `Step`, which answers the few questions that a
target answers in its own way: normalise, add and normalise, attend over the sequence, gate.

    Eager     plain torch over a whole sequence, no state: the truth, and what training uses
    Portable  primitive ONNX operators (opset 20 or lower) over fixed-capacity KV state
    Ort       fused com.microsoft operators over the same state, for ONNX Runtime's CPU kernels
    Modern    operators of sets 23 and 24, for TensorRT 10.15 and later (`modern`)

The graph forms are used only while a graph is traced. They agree with `Eager` by proof: the
parity gate of the export compares every state and output.

Shapes  B batch, T tokens of this step, H hidden, n query heads, m KV heads, d head size,
        C capacity of the KV state (0 <= lens + T <= C)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -30000.0
"""Added to the scores of forbidden keys: exp() of it is 0 in fp32, and it fits into fp16."""


@dataclass(frozen=True)
class Heads:
    """The attention geometry. n / m query heads share a KV head."""

    query: int
    kv: int
    size: int

    @property
    def packed(self) -> int:
        """Columns of the fused QKV projection: all queries, then all keys, then all values."""
        return (self.query + 2 * self.kv) * self.size


def rope_tables(theta: float, head_size: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2j/d): two float32 [positions, d/2].

    Source: RoFormer (arXiv 2104.09864), equation 15; angles in float32, as published models do.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    return angles.cos(), angles.sin()


def paired(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [.., d/2] -> [.., d]: (c0, c0, c1, c1, ...) and (-s0, s0, -s1, s1, ...)."""
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of the last axis: the interleaved order.

    x [B, heads, T, d] with d even; cos, sin from `paired`, broadcastable to x -> like x.
    Half-split order (x0 with x_{d/2}) gives other numbers; importers permute such weights first.
    """
    swap = torch.arange(x.shape[-1], device=x.device) ^ 1  # 1, 0, 3, 2, ...
    return x * cos + x.index_select(-1, swap) * sin


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. Source: arXiv 1910.07467."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Fused projection [B, T, (n + 2m) d] -> q [B, n, T, d], k and v [B, m, T, d]."""
    n, m, d = heads.query, heads.kv, heads.size
    q, k, v = qkv.split((n * d, m * d, m * d), dim=-1)
    return _heads_first(q, d), _heads_first(k, d), _heads_first(v, d)


def _heads_first(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


class Step(ABC):
    """One pass over T tokens. `k[slot]`, `v[slot]` hold what each attention leaves behind."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """-> (x + delta, rms_norm(x + delta)): the residual add belongs to the norm after it."""
        x = x + delta
        return x, self.norm(x, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]: SiLU(first half) * second half. Source: arXiv 2002.05202."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @abstractmethod
    def attend(self, slot: int, qkv: Tensor) -> Tensor:
        """Causal attention of KV slot `slot`: [B, T, (n + 2m) d] -> [B, T, n d]."""


Cache = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A slot, keys after rotation and values, both [B, m, T, d] -> what attention reads instead: what a
state makes of them that cannot hold them exactly."""


class Eager(Step):
    """The whole sequence at once from position 0. Keys are kept after rotation, like the state.

    keep   False leaves nothing behind, so that training may forget what it can compute again
    cache  None: attention reads keys and values as they are
    """

    def __init__(
        self, heads: Heads, cos: Tensor, sin: Tensor, tokens: int, keep: bool = True
    ) -> None:
        super().__init__(heads)
        self.turns = torch.complex(cos[:tokens], sin[:tokens])  # [T, d/2]
        self.keep = keep
        self.cache: Cache | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """As `rotate` of this module, in one pass: a pair is a complex number. Never traced."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2)

    def attend(self, slot: int, qkv: Tensor) -> Tensor:
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.rotate(q), self.rotate(k)
        if self.keep:
            self.k[slot], self.v[slot] = k, v
        if self.cache is not None:
            k, v = self.cache(slot, k, v)
        repeat = self.heads.query // self.heads.kv
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), is_causal=True
        )
        return out.transpose(1, 2).flatten(-2)


class Stateful(Step):
    """What the graph forms share: T new tokens behind `lens` old ones, over KV state."""

    def __init__(
        self,
        heads: Heads,
        cos: Tensor,
        sin: Tensor,
        lens: Tensor,
        tokens: int,
        past: Sequence[Tensor],
    ) -> None:
        super().__init__(heads)
        self.past_k, self.past_v = past[0::2], past[1::2]
        self.cos, self.sin = cos, sin
        self.turns: tuple[Tensor, Tensor] | None = None
        if past:  # a stage may be without attention
            self.positions = lens[:, None] + torch.arange(tokens, dtype=torch.int64)  # [B, T]
            self.prepare(lens, tokens, past)

    @abstractmethod
    def prepare(self, lens: Tensor, tokens: int, past: Sequence[Tensor]) -> None:
        """What all blocks of this step share."""

    def rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split and rotate at this step's positions: q [B, n, T, d], k and v [B, m, T, d]."""
        if self.turns is None:  # once a step, not once a block
            cos, sin = paired(
                F.embedding(self.positions, self.cos), F.embedding(self.positions, self.sin)
            )
            self.turns = cos[:, None], sin[:, None]
        q, k, v = split_heads(qkv, self.heads)
        return rotate(q, *self.turns), rotate(k, *self.turns), v

    def present(self) -> list[Tensor]:
        """k and v of every slot in slot order: the state outputs of a graph."""
        return [t for slot in sorted(self.k) for t in (self.k[slot], self.v[slot])]


class Portable(Stateful):
    """Primitive operators: ScatterND writes the new rows, a mask hides the unwritten ones.

    The scatter's output is bound onto its input's buffer, so the state is updated in place.
    """

    def prepare(self, lens: Tensor, tokens: int, past: Sequence[Tensor]) -> None:
        batch, kv, capacity, _ = past[0].shape
        shape = (batch, kv, tokens)
        self.rows = torch.stack(  # [B, m, T, 3]: where each new row goes
            (
                torch.arange(batch)[:, None, None].expand(shape),
                torch.arange(kv)[None, :, None].expand(shape),
                self.positions[:, None, :].expand(shape),
            ),
            dim=-1,
        )
        self.seen = torch.arange(capacity)[None, None, :] <= self.positions[:, :, None]  # [B, T, C]
        self.bias = torch.where(self.seen, 0.0, MASKED)[:, None, None]  # [B, 1, 1, T, C]

    def write(self, state: Tensor, rows: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "ScatterND", (state, self.rows, rows), dtype=state.dtype, shape=state.shape, version=18
        )

    def attend(self, slot: int, qkv: Tensor) -> Tensor:
        q, k, v = self.rotated(qkv)
        k = self.k[slot] = self.write(self.past_k[slot], k)
        v = self.v[slot] = self.write(self.past_v[slot], v)
        # [B, m, n/m, T, d]: the queries of one KV head side by side, so that keys are not repeated.
        q = q.unflatten(1, (self.heads.kv, -1)) * self.heads.size**-0.5
        scores = q @ k.transpose(-1, -2)[:, :, None] + self.bias
        out = scores.softmax(-1) @ v[:, :, None]
        return out.flatten(1, 2).transpose(1, 2).flatten(-2)


class Ort(Stateful):
    """ONNX Runtime's fused operators.

    GroupQueryAttention appends and attends in place when past and present are one buffer. It
    takes head sizes divisible by 8, and rotates by itself where they are divisible by 16.
    Source: onnxruntime docs/ContribOperators.md, com.microsoft.
    """

    def prepare(self, lens: Tensor, tokens: int, past: Sequence[Tensor]) -> None:
        self.last = (lens + (tokens - 1)).to(torch.int32)  # [B]: index of each row's newest token
        self.total = (lens.max() + tokens).to(torch.int32)
        self.rotates = self.heads.size % 16 == 0

    @staticmethod
    def refusal(heads: Heads) -> str | None:
        """Why this geometry has no fused kernel, or None where it has one."""
        if heads.size % 8:
            return f"head size {heads.size} is not divisible by 8"
        return None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",  # ONNX Runtime keeps this one in the standard domain
            (x, weight),
            {"axis": -1, "epsilon": eps, "stash_type": 1},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )

    def add_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        statistics = (*x.shape[:-1], 1)
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            (x, delta, weight),
            {"epsilon": eps},
            dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
            shapes=(x.shape, statistics, statistics, x.shape),
            version=1,
        )
        return total, normed

    def attend(self, slot: int, qkv: Tensor) -> Tensor:
        past_k, past_v = self.past_k[slot], self.past_v[slot]
        q: Tensor = qkv
        k = v = None
        if not self.rotates:
            q, k, v = (x.transpose(1, 2).flatten(-2) for x in self.rotated(qkv))
        out, self.k[slot], self.v[slot] = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (q, k, v, past_k, past_v, self.last, self.total)
            + ((self.cos, self.sin) if self.rotates else ()),
            {
                "num_heads": self.heads.query,
                "kv_num_heads": self.heads.kv,
                "do_rotary": int(self.rotates),
                "rotary_interleaved": int(self.rotates),
            },
            dtypes=(qkv.dtype, past_k.dtype, past_v.dtype),
            shapes=(
                (*qkv.shape[:2], self.heads.query * self.heads.size),
                past_k.shape,
                past_v.shape,
            ),
            version=1,
        )
        return out
