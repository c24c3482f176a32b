"""HRM, the original form: segments of L and H updates, and a learned score that says when to stop.

Sources  sapientinc/HRM @ 42410da, models/hrm/hrm_act_v1.py; arXiv 2506.21734
Shapes   B batch, S grid cells, P slots of the puzzle prefix, N = P + S, V vocabulary, d hidden,
         p puzzle embedding
State    z_h, z_l [B, N, d], from the learned vectors h_init, l_init [d]
Weights  linear maps are kept [in, out], so that every graph reads one orientation of one file
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.block import Pick, values
from edgert.models.hrm.config import HRMConfig
from edgert.models.hrm.step import Step
from edgert.models.layers import rope_tables

HALF = 0.707106781  # of the sum of token and position embedding, as published
Q_BIAS = -5.0  # before training nothing halts: both scores are equal

_CUT = 2.0  # truncated normals, in standard deviations of the whole one


class Segment(NamedTuple):
    """What one segment leaves. q [B, 2] in float32: the scores of halting and of continuing."""

    z_h: Tensor
    z_l: Tensor
    logits: Tensor  # [B, S, V]
    q: Tensor


class Answer(NamedTuple):
    """What `solve` found: logits [B, S, V] and q [B, 2] of segment `steps` int32 [B], from 1."""

    logits: Tensor
    q: Tensor
    steps: Tensor


class Block(nn.Module):
    """Post-norm: rms(x + attention(x)), then rms(that + swiglu(that)); no biases."""

    def __init__(self, hidden: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.wqkv = nn.Parameter(torch.empty(hidden, 3 * hidden))
        self.wo = nn.Parameter(torch.empty(hidden, hidden))
        self.w_gate_up = nn.Parameter(torch.empty(hidden, 2 * intermediate))
        self.w_down = nn.Parameter(torch.empty(intermediate, hidden))

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """[B, N, d] -> the same."""
        x = step.add_norm(x, step.attend(x @ self.wqkv) @ self.wo, self.eps)
        return step.add_norm(x, step.swiglu(x @ self.w_gate_up) @ self.w_down, self.eps)


class HRM(nn.Module):
    """The network without its loop over segments.

    puzzle_table  float32 [puzzles, p] or None. Neither parameter nor buffer, for it may have
                  millions of rows: the network is given the rows that it needs. Zeros unless
                  the constructor is given one, which is used as it is and not copied.
    """

    h_init: Tensor
    l_init: Tensor
    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, config: HRMConfig, puzzle_table: Tensor | None = None) -> None:
        super().__init__()
        self.config = c = config
        d = c.hidden_size
        self.embed_tokens = nn.Parameter(torch.empty(c.vocab_size, d))
        self.embed_pos: nn.Parameter | None = None
        cos = sin = None
        if c.pos_encodings == "rope":
            cos, sin = rope_tables(c.rope_theta, c.head_size, c.positions)
        else:
            self.embed_pos = nn.Parameter(torch.empty(c.positions, d))

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(d, c.intermediate_size, c.rms_norm_eps) for _ in range(count)
            )

        self.h_level, self.l_level = blocks(c.h_layers), blocks(c.l_layers)
        self.lm_head = nn.Parameter(torch.empty(d, c.vocab_size))
        self.q_head = nn.Parameter(torch.empty(d, 2))
        self.q_bias = nn.Parameter(torch.empty(2))
        self.register_buffer("h_init", torch.zeros(d))
        self.register_buffer("l_init", torch.zeros(d))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.puzzle_table = puzzle_table
        if c.puzzle_emb_ndim and puzzle_table is None:
            self.puzzle_table = torch.zeros(c.num_puzzle_identifiers, c.puzzle_emb_ndim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HRM:
        """What moves the module moves the table, too."""
        super()._apply(fn, recurse)
        if self.puzzle_table is not None:
            self.puzzle_table = fn(self.puzzle_table)
        return self

    def eager(self) -> Step:
        return Step(self.config.num_heads, self.cos, self.sin)

    def puzzle_rows(self, identifiers: Tensor) -> Tensor | None:
        """Puzzle identifiers int [B] -> their rows [B, p], None without a puzzle embedding."""
        if self.puzzle_table is None:
            return None
        return F.embedding(identifiers, self.puzzle_table)

    def embed(self, ids: Tensor, puzzle_vec: Tensor | None = None) -> Tensor:
        """ids int [B, S], puzzle_vec [B, p] -> e [B, N, d], the same in all segments.

        puzzle_vec  is filled up with zeros to P whole slots; None where p = 0
        """
        c = self.config
        t = F.embedding(ids, self.embed_tokens)
        if c.prefix:
            assert puzzle_vec is not None, "this model has a puzzle embedding"
            fill = c.prefix * c.hidden_size - c.puzzle_emb_ndim
            slots = F.pad(puzzle_vec, (0, fill)).unflatten(-1, (c.prefix, c.hidden_size))
            t = torch.cat((slots, t), dim=1)
        if self.embed_pos is not None:
            t = HALF * (t + self.embed_pos)
        return math.sqrt(c.hidden_size) * t

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        """The state before the first segment: z_h, z_l [B, N, d]."""
        shape = (batch, self.config.positions, self.config.hidden_size)
        return self.h_init.expand(shape), self.l_init.expand(shape)

    def reset(self, reset: Tensor, z_h: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor]:
        """The initial state in the rows that `reset` bool [B] names, the given one in the others.

        A selection: what the replaced rows held does not matter, NaN included.
        """
        rows = reset[:, None, None]
        return torch.where(rows, self.h_init, z_h), torch.where(rows, self.l_init, z_l)

    def refine(
        self, step: Step, z_h: Tensor, z_l: Tensor, e: Tensor, updates: str
    ) -> tuple[Tensor, Tensor]:
        """The named updates in order: L adds z_h + e to z_l, H adds z_l to z_h."""
        for level in updates:
            if level == "L":
                z_l = _level(self.l_level, step, z_l + (z_h + e))
            else:
                z_h = _level(self.h_level, step, z_h + z_l)
        return z_h, z_l

    def heads(self, z_h: Tensor) -> tuple[Tensor, Tensor]:
        """z_h [B, N, d] -> logits [B, S, V] of the grid and q [B, 2], read at position 0."""
        logits = z_h[:, self.config.prefix :] @ self.lm_head
        return logits, (z_h[:, 0] @ self.q_head + self.q_bias).float()

    def segment(
        self,
        z_h: Tensor,
        z_l: Tensor,
        e: Tensor,
        step: Step | None = None,
        one_step_gradient: bool = False,
    ) -> Segment:
        """One segment: z_h, z_l, e [B, N, d] -> the new state, logits and q.

        one_step_gradient  for training: only the last update of L and of H, the heads, and e
                           through that L are differentiated, and the state returned is detached
        """
        step = step or self.eager()
        updates = self.config.updates
        if not one_step_gradient:
            z_h, z_l = self.refine(step, z_h, z_l, e, updates)
            return Segment(z_h, z_l, *self.heads(z_h))
        with torch.no_grad():
            z_h, z_l = self.refine(step, z_h, z_l, e, updates[:-2])
        z_h, z_l = self.refine(step, z_h, z_l, e, updates[-2:])
        return Segment(z_h.detach(), z_l.detach(), *self.heads(z_h))

    @torch.no_grad()
    def solve(
        self,
        ids: Tensor,
        puzzle_vec: Tensor | None = None,
        *,
        max_steps: int | None = None,
        early_exit: bool = False,
        min_steps: int = 1,
        margin: float = 0.0,
    ) -> Answer:
        """Segments from the initial state: ids int [B, S] -> what each sample ends with.

        max_steps   T, instead of the config's; without `early_exit` every sample runs all of them
        early_exit  a sample ends behind `min_steps` segments or more, as soon as its score of
                    halting is above that of continuing by more than `margin`
        """
        most = self.config.halt_max_steps if max_steps is None else max_steps
        assert most >= 1, "at least one segment"
        e, step = self.embed(ids, puzzle_vec), self.eager()
        z_h, z_l = self.initial(len(ids))
        steps = torch.zeros(len(ids), dtype=torch.int32)
        active = torch.ones(len(ids), dtype=torch.bool)
        logits = q = torch.empty(0)
        for n in range(1, most + 1):
            z_h, z_l, new_logits, new_q = self.segment(z_h, z_l, e, step)
            # What an ended sample goes on to compute is thrown away.
            logits = torch.where(active[:, None, None], new_logits, logits) if n > 1 else new_logits
            q = torch.where(active[:, None], new_q, q) if n > 1 else new_q
            steps += active
            if early_exit and n >= min_steps:
                active = active & ~(q[:, 0] - q[:, 1] > margin)
            if not active.any():
                break
        return Answer(logits, q, steps)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> HRM:
        """Weights before training: truncated normals, the q head 0 and -5, the puzzle table 0.

        The initial states are drawn in float32, whatever `forward_dtype` says.
        """
        d = self.config.hidden_size
        for name, tensor in (
            self.published() | {"H_init": self.h_init, "L_init": self.l_init}
        ).items():
            if name.startswith("q_head."):
                tensor.fill_(Q_BIAS if name == "q_head.bias" else 0.0)
            elif name.startswith("embed_"):
                truncated_normal(tensor, 1 / math.sqrt(d), generator)
            elif tensor.ndim == 2:
                truncated_normal(tensor, 1 / math.sqrt(tensor.shape[1]), generator)
            else:
                truncated_normal(tensor, 1.0, generator)
        if self.puzzle_table is not None:
            self.puzzle_table.zero_()
        return self

    def published(self, pick: Pick = values) -> dict[str, Tensor]:
        """Published names -> views of the trained weights in published orientation.

        Writing to a view writes to the model. `fixed` has the rest of a published state dict.
        """
        out = {"embed_tokens.embedding_weight": pick(self.embed_tokens)}
        if self.embed_pos is not None:
            out["embed_pos.embedding_weight"] = pick(self.embed_pos)
        out["lm_head.weight"] = pick(self.lm_head).T
        out["q_head.weight"] = pick(self.q_head).T
        out["q_head.bias"] = pick(self.q_bias)
        for level, blocks in (("H_level", self.h_level), ("L_level", self.l_level)):
            for i, block in enumerate(blocks):
                assert isinstance(block, Block)
                name = f"{level}.layers.{i}"
                out[f"{name}.self_attn.qkv_proj.weight"] = pick(block.wqkv).T
                out[f"{name}.self_attn.o_proj.weight"] = pick(block.wo).T
                out[f"{name}.mlp.gate_up_proj.weight"] = pick(block.w_gate_up).T
                out[f"{name}.mlp.down_proj.weight"] = pick(block.w_down).T
        return out

    def fixed(self) -> dict[str, Tensor]:
        """Published names -> what a state dict holds beside the trained weights, themselves."""
        out = {"H_init": self.h_init, "L_init": self.l_init}
        if self.puzzle_table is not None:
            out["puzzle_emb.weights"] = self.puzzle_table
        return out


def _level(blocks: nn.ModuleList, step: Step, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(step, x)
    return x


def truncated_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, s^2) cut off at 2 s, where s is such that what is left has exactly `std`."""
    edge = math.erf(_CUT / math.sqrt(2))
    density = math.exp(-(_CUT**2) / 2) / math.sqrt(2 * math.pi)
    whole = std / math.sqrt(1 - 2 * _CUT * density / edge)
    tensor.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * whole)
    tensor.clamp_(-_CUT * whole, _CUT * whole)
