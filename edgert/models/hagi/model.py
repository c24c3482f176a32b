"""HAGI: perception blocks, a reasoning core run N times with shared weights, expression blocks.

Sources  ShmidtS/HAGI @ 38d26f2, prototype/model; initial values of the same branch @ 286a65d
Shapes   B batch, T tokens, V vocabulary, H hidden, N iterations
Slots    of keys and values, one per executed attention: perception, then iteration by iteration
         the reasoning blocks, then expression
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgert.models.block import Block, Pick, parts, stack, values
from edgert.models.hagi.config import HAGIConfig
from edgert.models.hagi.gdr import GDR, gdr_tensors
from edgert.models.layers import Eager, Step, rope_tables

STAGES = ("perception", "reasoning", "expression")
INIT_STD = 0.02

_BLOCK = {
    "attn_norm": "attn_norm.weight",
    "q": "attn.q_proj.weight",
    "k": "attn.k_proj.weight",
    "v": "attn.v_proj.weight",
    "o": "attn.o_proj.weight",
    "mlp_norm": "mlp_norm.weight",
    "gate": "mlp.gate.weight",
    "up": "mlp.up.weight",
    "down": "mlp.down.weight",
}


class HAGI(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: HAGIConfig) -> None:
        super().__init__()
        self.config = c = config
        self.iter_embed = nn.Parameter(torch.zeros(c.iterations, c.hidden_size))
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(c.hidden_size, c.heads, c.intermediate_size, c.norm_eps) for _ in range(count)
            )

        self.perception = blocks(c.perception_layers)
        self.reasoning = blocks(c.reasoning_layers)
        self.expression = blocks(c.expression_layers)
        self.gdr: nn.Module | None = GDR(c.grades) if c.use_gdr else None
        self.final_norm = nn.Parameter(torch.ones(c.hidden_size))
        cos, sin = rope_tables(c.rope_theta, c.heads.size, c.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def perceive(self, step: Step, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> the residual stream before the core [B, T, H]."""
        return stack(step, self.perception, 0, F.embedding(ids, self.embed))

    def reason(self, step: Step, h: Tensor, bias: Tensor, first_slot: int) -> Tensor:
        """One iteration of the core; `bias` is its row of `iter_embed`."""
        if self.gdr is not None:
            h = self.gdr(h)
        return stack(step, self.reasoning, first_slot, h) + bias

    def express(self, step: Step, h: Tensor, first_slot: int) -> Tensor:
        return stack(step, self.expression, first_slot, h)

    def hidden(
        self,
        step: Step,
        ids: Tensor,
        iterations: int | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """All stages: ids int64 [B, T] -> the residual stream [B, T, H].

        seen  is given the stream behind every iteration, also behind those beyond `iterations`
        """
        c = self.config
        read = c.iterations if iterations is None else iterations
        h = self.stage(self.perceive, step, ids)
        slot = c.perception_layers
        states = [h]
        for i in range(read if seen is None else c.iterations):
            states.append(self.stage(self.reason, step, states[-1], self.iter_embed[i], slot))
            slot += c.reasoning_layers
        if seen is not None:
            seen += states[1:]
        return self.stage(self.express, step, states[read], c.slots - c.expression_layers)

    def stage(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        """`run(*args)`; with `gradient_checkpointing`, backward computes its inside again."""
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return run(*args)
        # Nothing in a stage is random.
        return cast(Tensor, checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False))

    def logits(self, step: Step, x: Tensor) -> Tensor:
        """Residual stream [B, S, H] -> logits [B, S, V]."""
        h = step.norm(x, self.final_norm, self.config.norm_eps)
        # In two dimensions it becomes Gemm(transB=1), which reads the embedding as it is stored.
        return F.linear(h.flatten(0, 1), self.embed).unflatten(0, h.shape[:2])

    def forward(
        self, ids: Tensor, step: Step | None = None, iterations: int | None = None
    ) -> Tensor:
        """Score whole sequences from position 0: ids int64 [B, T] -> logits [B, T, V].

        iterations  of the core, 1 to N (default N)
        Pass an `Eager` step to keep what it leaves behind (`step.k`, `step.v`).
        """
        step = step or self.eager(ids.shape[1])
        return self.logits(step, self.hidden(step, ids, iterations))

    def eager(self, tokens: int, keep: bool = True) -> Eager:
        return Eager(self.config.heads, self.cos, self.sin, tokens, keep)

    def loss(
        self, ids: Tensor, targets: Tensor, iterations: int | None = None, settle: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy over targets [B, T] other than -100, in nats; and `settle` times the
        `drift` of the loop.

        With `ce_chunk_size` k, logits exist for k positions at a time, and a batch without any
        target costs 0 instead of NaN.
        """
        step = self.eager(ids.shape[1], keep=False)
        if settle == 0.0:
            return self._cross_entropy(step, self.hidden(step, ids, iterations), targets)
        seen: list[Tensor] = []
        h = self.hidden(step, ids, iterations, seen)
        return self._cross_entropy(step, h, targets) + settle * drift(seen)

    def _cross_entropy(self, step: Step, h: Tensor, targets: Tensor) -> Tensor:
        h = h.flatten(0, 1)
        wanted, chunk = targets.flatten(), self.config.ce_chunk_size
        if not 0 < chunk < len(h):
            return F.cross_entropy(self.logits(step, h[None])[0].float(), wanted)
        total = h.new_zeros((), dtype=torch.float32)
        for rows, want in zip(h.split(chunk), wanted.split(chunk), strict=True):
            logits = self.logits(step, rows[None])[0].float()
            total = total + F.cross_entropy(logits, want, reduction="sum")
        return total / (wanted != -100).sum().clamp(min=1)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> HAGI:
        """Weights before training: N(0, 0.02), norms one; biases, gates and `iter_embed` zero."""
        for name, tensor in self.published().items():
            if tensor.ndim < 2:
                tensor.fill_(1.0 if "norm" in name else 0.0)
            elif name != "iter_embed":
                tensor.normal_(0.0, INIT_STD, generator=generator)
            else:
                tensor.zero_()
        return self

    def published(self, pick: Pick = values) -> dict[str, Tensor]:
        """Published names -> views of the weights in published orientation and order.

        Writing to a view writes to the model. Left out is `lm_head.weight`, the tied embedding.
        """
        out = {"iter_embed": pick(self.iter_embed), "embed.weight": pick(self.embed)}
        for stage in STAGES:
            for i, block in enumerate(getattr(self, stage)):
                named = parts(block, pick)
                out |= {f"{stage}.{i}.{_BLOCK[part]}": named[part] for part in _BLOCK}
        if isinstance(self.gdr, GDR):
            out |= {f"gdr.{name}": tensor for name, tensor in gdr_tensors(self.gdr, pick).items()}
        out["final_norm.weight"] = pick(self.final_norm)
        return out


def drift(states: Sequence[Tensor]) -> Tensor:
    """How much a loop still changes its state [..., H] where it should be done: the mean of
    |h' - h| / |h| in each iteration but the first, the last one with weight 1, the one before it
    with 1/2, then 1/4 ..."""
    total = states[0].new_zeros(())
    for old, new in pairwise(states):
        change = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-6)
        total = total / 2 + change.mean()
    return total
