"""A looped HAGI model as a careful person writes it in torch: one module per idea.

It has the published names, so that weights can be copied and results compared; nothing of edgert is
used in it. plain_train.py trains it, plain_decode.py decodes with a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Remember: TypeAlias = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor, Tensor | None]"]
"""A KV cache at work: new keys and values -> all of them, and a mask (None: causal if several)."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, theta: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, hidden // heads
        self.theta = theta
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Remember | None = None) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v, mask = cache(k, v)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        causal = mask is None and t > 1  # a prompt, behind nothing
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attn = Attention(c.hidden_size, c.num_query_heads, c.num_kv_heads, c.rope_theta)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Remember | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


class GDR(nn.Module):
    """Ungated, with the self product of multivectors in closed form."""

    def __init__(self, g: Any) -> None:
        super().__init__()
        self.g = g
        self.gate_scalar = nn.Parameter(torch.zeros(1))
        self.gate_bivector = nn.Parameter(torch.zeros(1))

        def mlp(size: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(g.read, g.read), nn.SiLU(), nn.Linear(g.read, size))

        self.mlp_scalar, self.mlp_vector = mlp(g.scalar), mlp(g.vector)
        self.mlp_bivector, self.mlp_trivector = mlp(g.bivector), mlp(g.trivector)
        self.geo_to_scalar = nn.Linear(g.vector, g.scalar, bias=False)
        self.geo_to_bivector = nn.Linear(g.vector, g.bivector, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        g = self.g
        s, v, _, _, rest = x.split((g.scalar, g.vector, g.bivector, g.trivector, g.residual), -1)
        context = x[..., : g.read]
        s = g.scalar_momentum * s + (1 - g.scalar_momentum) * self.mlp_scalar(context)
        v = g.vector_momentum * v + (1 - g.vector_momentum) * self.mlp_vector(context)
        b, t = self.mlp_bivector(context), self.mlp_trivector(context)
        m = v.unflatten(-1, (-1, 8))
        m0, m1, m2, m3, m4, m5, m6, m7 = m.unbind(-1)
        zero = torch.zeros_like(m0)
        q0 = m0**2 + m1**2 + m2**2 + m4**2 - m3**2 - m5**2 - m6**2 - m7**2
        q3, q5, q6 = m0 * m3 + m4 * m7, m0 * m5 - m2 * m7, m0 * m6 + m1 * m7
        scalars = torch.stack((q0, *[zero] * 7), -1).flatten(-2)
        turns = torch.stack((zero, zero, zero, 2 * q3, zero, 2 * q5, 2 * q6, zero), -1).flatten(-2)
        s = s + self.gate_scalar.sigmoid() * self.geo_to_scalar(scalars)
        b = b + self.gate_bivector.sigmoid() * self.geo_to_bivector(turns)
        return torch.cat((s, v, b, t, rest), -1)


class Plain(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        self.iter_embed = nn.Parameter(torch.zeros(c.iterations, c.hidden_size))
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.perception = nn.ModuleList(Block(c) for _ in range(c.perception_layers))
        self.reasoning = nn.ModuleList(Block(c) for _ in range(c.reasoning_layers))
        self.expression = nn.ModuleList(Block(c) for _ in range(c.expression_layers))
        self.gdr = GDR(c.grades) if c.use_gdr else None
        self.final_norm = RMSNorm(c.hidden_size, c.norm_eps)
        size = c.hidden_size // c.num_query_heads
        inverse = c.rope_theta ** -(torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(c.context).float(), inverse)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        t = ids.shape[1]
        h = self.stages(self.embed(ids), self.cos[:t], self.sin[:t])
        logits = F.linear(self.final_norm(h), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def stages(
        self, h: Tensor, cos: Tensor, sin: Tensor, caches: list[Remember] | None = None
    ) -> Tensor:
        """All blocks, in the order they are run; `caches` has one for each run."""
        slots = iter(caches or [None] * self.slots)
        for block in self.perception:
            h = block(h, cos, sin, next(slots))
        for i in range(self.c.iterations):
            if self.gdr is not None:
                h = self.gdr(h)
            for block in self.reasoning:
                h = block(h, cos, sin, next(slots))
            h = h + self.iter_embed[i]
        for block in self.expression:
            h = block(h, cos, sin, next(slots))
        return h

    @property
    def slots(self) -> int:
        c = self.c
        return c.perception_layers + c.iterations * c.reasoning_layers + c.expression_layers

    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding a token reads: those of the core once an iteration."""
        core = [p for m in (self.reasoning, self.gdr) if m is not None for p in m.parameters()]
        rest = [p for p in self.parameters() if not any(p is q for q in core)]
        read = sum(p.numel() for p in rest) + self.c.iterations * sum(p.numel() for p in core)
        return 4 * read
