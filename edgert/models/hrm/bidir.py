"""HRM, the bidirectional form: H and L feed each other through linear maps, cycle by cycle.

Sources  dp-web4/HRM @ 2e7d64f, training/train_arc_full_nova.py (B1), train_hrm_fresh.py (B2)
Shapes   B batch, S cells, d hidden, V vocabulary
State    high, low [B, S, d], both from the embedding x; B2 also the sum of p [B], the
         probabilities of halting
Weights  linear maps are kept [in, out], so that every graph reads one orientation of one file

The input enters only as the initial state, as published: many cycles forget it. `reinject_input`
of the config adds it to both states before each later cycle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.block import Pick, values
from edgert.models.hrm.config import BidirConfig
from edgert.models.hrm.step import Step

NORM_EPS = 1e-5
CYCLE_SCALE = 0.1  # of the cycle embedding
FRESH_STD = 0.02  # of B2's embeddings


class Cycle(NamedTuple):
    """What one cycle leaves. halt [B]: the halting logit, whose sigmoid is p."""

    high: Tensor
    low: Tensor
    halt: Tensor
    logits: Tensor  # [B, S, V]


class BidirAnswer(NamedTuple):
    """logits [B, S, V] behind `cycles` int32 [B]; p [executed cycles, B] of all that ran."""

    logits: Tensor
    p: Tensor
    cycles: Tensor


class Linear(nn.Module):
    """x @ weight + bias, weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Norm(nn.Module):
    """Layer norm with weight and bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, step: Step, x: Tensor) -> Tensor:
        return step.layer_norm(x, self.weight, self.bias, NORM_EPS)


class Layer(nn.Module):
    """PyTorch's encoder layer with its defaults: post-norm, ReLU, biases, no mask."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.qkv, self.out = Linear(hidden, 3 * hidden), Linear(hidden, hidden)
        self.up, self.down = Linear(hidden, 4 * hidden), Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)

    def forward(self, step: Step, x: Tensor) -> Tensor:
        """[B, S, d] -> the same."""
        rate = self.dropout if self.training else 0.0
        attended = self.out(step.attend(self.qkv(x), rate))
        x = self.norm1(step, x + self.drop(attended))
        inner = self.drop(self.up(x).relu())
        return self.norm2(step, x + self.drop(self.down(inner)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Bidir(nn.Module):
    pe: Tensor

    def __init__(self, config: BidirConfig) -> None:
        super().__init__()
        self.config = c = config
        d = c.hidden_size
        self.tokens = nn.Parameter(torch.empty(c.vocab_size, d))
        self.register_buffer("pe", sinusoids(c.positions, d))

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(Layer(d, c.dropout) for _ in range(count))

        self.h_layers, self.l_layers = layers(c.num_h_layers), layers(c.num_l_layers)
        self.h_to_l, self.l_to_h = Linear(d, d), Linear(d, d)
        self.h_norm, self.l_norm = Norm(d), Norm(d)
        self.halt = Linear(2 * d, 1)
        self.output = Linear(d, c.vocab_size)
        self.cycles: nn.Parameter | None = None
        if c.cycle_embedding:
            self.cycles = nn.Parameter(torch.empty(c.max_cycles, d))

    def eager(self) -> Step:
        return Step(self.config.num_heads)

    def embed(self, ids: Tensor) -> Tensor:
        """ids int [B, S] -> x [B, S, d], from which both states start. S at most `positions`."""
        x = F.embedding(ids, self.tokens) + self.pe[: ids.shape[1]]
        return F.dropout(x, self.config.dropout, self.training)

    def row(self, c: int) -> Tensor | None:
        """What cycle c, counted from 0, adds to `high` before it is scaled: [d]; None for B1."""
        return None if self.cycles is None else self.cycles[c]

    def cycle(
        self,
        high: Tensor,
        low: Tensor,
        c: int,
        x: Tensor | None = None,
        step: Step | None = None,
    ) -> Cycle:
        """Cycle c, counted from 0: high, low [B, S, d] -> the new state, halting logit and logits.

        x  the embedding; needed, and used, only with `reinject_input`
        """
        again = x if self.config.reinject_input and c else None
        assert again is not None or not (self.config.reinject_input and c), "x is added again"
        return self.turn(step or self.eager(), high, low, self.row(c), again)

    def turn(
        self,
        step: Step,
        high: Tensor,
        low: Tensor,
        row: Tensor | None,
        again: Tensor | None = None,
    ) -> Cycle:
        """A cycle that knows no number: `row` [d] of the cycle embedding, `again` [B, S, d]."""
        if again is not None:
            high, low = high + again, low + again
        if row is not None:
            high = high + CYCLE_SCALE * row
        for layer in self.h_layers:
            high = layer(step, high)
        high = self.h_norm(step, high)
        low = low + self.h_to_l(high)
        for layer in self.l_layers:
            low = layer(step, low)
        low = self.l_norm(step, low)
        high = high + self.l_to_h(low)  # stays as it is: not normalised before the next cycle
        pooled = torch.cat((high.mean(1), low.mean(1)), -1)
        return Cycle(high, low, self.halt(pooled).squeeze(-1), self.output(low))

    def unroll(self, ids: Tensor, max_cycles: int | None = None) -> Iterator[Cycle]:
        """Cycle by cycle from ids int [B, S]; it is the caller who stops. With gradients."""
        most = self.config.max_cycles if max_cycles is None else max_cycles
        assert self.cycles is None or most <= len(self.cycles), "each cycle has a row of its own"
        x, step = self.embed(ids), self.eager()
        high = low = x
        for c in range(most):
            found = self.cycle(high, low, c, x, step)
            yield found
            high, low = found.high, found.low

    def until_mean(self, ids: Tensor, max_cycles: int | None = None) -> list[Cycle]:
        """The cycles of the published forward pass: the batch stops as one, on its mean p."""
        done: list[Cycle] = []
        for found in self.unroll(ids, max_cycles):
            done.append(found)
            if len(done) >= self.config.least_cycles:
                signal = self.signal(torch.stack([cycle.halt for cycle in done]).sigmoid())
                if bool(signal.mean() > self.config.threshold):
                    break
        return done

    def signal(self, p: Tensor) -> Tensor:
        """p [cycles so far, B] -> what is compared with the threshold [B]."""
        return p.sum(0) if self.config.cycle_embedding else p[-1]

    @torch.no_grad()
    def solve(
        self, ids: Tensor, *, per_sample: bool = False, max_cycles: int | None = None
    ) -> BidirAnswer:
        """ids int [B, S] -> what each sample ends with.

        per_sample  the rule is applied to each sample's own p, as if it were alone; otherwise the
                    published rule, by which results depend on who else is in the batch
        """
        if not per_sample:
            done = self.until_mean(ids, max_cycles)
            p = torch.stack([cycle.halt for cycle in done]).sigmoid()
            counts = torch.full((len(ids),), len(done), dtype=torch.int32)
            return BidirAnswer(done[-1].logits, p, counts)
        cycles = torch.zeros(len(ids), dtype=torch.int32)
        active = torch.ones(len(ids), dtype=torch.bool)
        logits = torch.empty(0)
        seen: list[Tensor] = []
        for found in self.unroll(ids, max_cycles):
            rows = active[:, None, None]
            logits = torch.where(rows, found.logits, logits) if seen else found.logits
            seen.append(found.halt.sigmoid())
            cycles += active
            if len(seen) >= self.config.least_cycles:
                active = active & ~(self.signal(torch.stack(seen)) > self.config.threshold)
            if not active.any():
                break
        return BidirAnswer(logits, torch.stack(seen), cycles)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> Bidir:
        """Weights before training. B1: PyTorch's defaults. B2: all linear maps Xavier-uniform with
        biases zero, embeddings N(0, 0.02)."""
        fresh = self.config.cycle_embedding
        for name, tensor in self.published().items():
            if name.endswith("embedding.weight"):
                tensor.normal_(0.0, FRESH_STD if fresh else 1.0, generator=generator)
            elif "norm" in name:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            elif tensor.ndim == 2 and (fresh or name.endswith("in_proj_weight")):
                bound = math.sqrt(6 / sum(tensor.shape))
                tensor.uniform_(-bound, bound, generator=generator)
            elif fresh or "self_attn" in name and tensor.ndim == 1:
                tensor.zero_()
            else:
                bound = 1 / math.sqrt(self._inputs(name))
                tensor.uniform_(-bound, bound, generator=generator)
        return self

    def _inputs(self, name: str) -> int:
        """Inputs of the linear map that a published weight or bias belongs to."""
        return self.published()[name.rpartition(".")[0] + ".weight"].shape[1]

    def published(self, pick: Pick = values) -> dict[str, Tensor]:
        """Published names -> views of the trained weights in published orientation.

        Writing to a view writes to the model. `fixed` has the rest of a published state dict.
        """
        out = {"token_embedding.weight": pick(self.tokens)}
        if self.cycles is not None:
            out["cycle_embedding.weight"] = pick(self.cycles)
        for stage, layers in (("h_layers", self.h_layers), ("l_layers", self.l_layers)):
            for i, layer in enumerate(layers):
                assert isinstance(layer, Layer)
                name = f"{stage}.{i}"
                out[f"{name}.self_attn.in_proj_weight"] = pick(layer.qkv.weight).T
                out[f"{name}.self_attn.in_proj_bias"] = pick(layer.qkv.bias)
                out |= _linear(f"{name}.self_attn.out_proj", layer.out, pick)
                out |= _linear(f"{name}.linear1", layer.up, pick)
                out |= _linear(f"{name}.linear2", layer.down, pick)
                out |= _norm(f"{name}.norm1", layer.norm1, pick)
                out |= _norm(f"{name}.norm2", layer.norm2, pick)
        for name, linear in (
            ("h_to_l", self.h_to_l),
            ("l_to_h", self.l_to_h),
            ("halt_predictor", self.halt),
            ("output", self.output),
        ):
            out |= _linear(name, linear, pick)
        return out | _norm("h_norm", self.h_norm, pick) | _norm("l_norm", self.l_norm, pick)

    def fixed(self) -> dict[str, Tensor]:
        """Published names -> what a state dict holds beside the trained weights, themselves."""
        return {"pos_encoding.pe": self.pe}


def _linear(name: str, linear: Linear, pick: Pick) -> dict[str, Tensor]:
    return {f"{name}.weight": pick(linear.weight).T, f"{name}.bias": pick(linear.bias)}


def _norm(name: str, norm: Norm, pick: Pick) -> dict[str, Tensor]:
    return {f"{name}.weight": pick(norm.weight), f"{name}.bias": pick(norm.bias)}


def sinusoids(positions: int, size: int) -> Tensor:
    """[positions, size]: sines of t * 10000^(-2k/size) in even columns, cosines in odd ones.

    Source: arXiv 1706.03762, section 3.5. At high positions a published table differs by up to
    2e-5, for its angles were rounded otherwise: importers take the published one.
    """
    frequencies = torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
