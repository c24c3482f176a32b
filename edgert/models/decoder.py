"""Dense decoder: token embedding, pre-norm blocks, tied or untied head.

Llama-shaped models (SmolLM2 among them): RMSNorm, grouped-query attention with interleaved rotary
embedding, SwiGLU, no biases.

Sources  Llama (arXiv 2302.13971), GQA (arXiv 2305.13245)
Shapes   B batch, T tokens, S selected positions, V vocabulary, H hidden, F intermediate
State    k.<block>, v.<block> [B, KV heads, capacity, head size], keys after rotation
Weights  linear maps are kept [in, out] and fused (q|k|v, gate|up), so that every lowering reads one
         orientation of one file; the embedding is [V, H] and serves as the tied head unchanged
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.block import Block, stack
from edgert.models.forms import FORMS, refusals
from edgert.models.layers import Eager, Heads, Stateful, Step, rope_tables
from edgert.models.program import Program, TracedGraph, counted, kv_states, references
from edgert.spec import DECODER_INPUTS, ProgramSpec, Wire, decoder_results


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    rope_theta: float
    norm_eps: float
    context: int  # positions the rotary tables cover
    tied_head: bool

    @property
    def heads(self) -> Heads:
        return Heads(self.num_heads, self.num_kv_heads, self.head_size)


class Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))
        self.blocks = nn.ModuleList(
            Block(c.hidden_size, c.heads, c.intermediate_size, c.norm_eps)
            for _ in range(c.num_layers)
        )
        self.final_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.head = None if c.tied_head else nn.Parameter(torch.empty_like(self.embed))
        cos, sin = rope_tables(c.rope_theta, c.head_size, c.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, step: Step, ids: Tensor) -> Tensor:
        """ids int64 [B, T] -> the residual stream after all blocks [B, T, H]."""
        return stack(step, self.blocks, 0, F.embedding(ids, self.embed))

    def logits(self, step: Step, x: Tensor) -> Tensor:
        """Residual stream [B, S, H] -> logits [B, S, V]."""
        h = step.norm(x, self.final_norm, self.config.norm_eps)
        # In two dimensions it becomes Gemm(transB=1), which reads the embedding as it is stored.
        rows = F.linear(h.flatten(0, 1), self.embed if self.head is None else self.head)
        return rows.unflatten(0, h.shape[:2])

    def forward(self, ids: Tensor, step: Step | None = None) -> Tensor:
        """Score whole sequences from position 0: ids int64 [B, T] -> logits [B, T, V].

        Pass an `Eager` step to keep what it leaves behind (`step.k`, `step.v`).
        """
        step = step or self.eager(ids.shape[1])
        return self.logits(step, self.hidden(step, ids))

    def eager(self, tokens: int) -> Eager:
        return Eager(self.config.heads, self.cos, self.sin, tokens)


class DecodeGraph(nn.Module):
    """T tokens behind `lens` old ones: the one graph for prefill, chunks and single steps."""

    def __init__(self, model: Decoder, form: type[Stateful]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(
        self, ids: Tensor, select: Tensor, lens: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """ids int64 [B, T], select int64 [B, S] (positions within this chunk), lens int64 [B],
        past: k, v per block -> logits [B, S, V], their argmax int64 [B, S], k, v per block."""
        model = self.model
        step = self.form(model.config.heads, model.cos, model.sin, lens, ids.shape[1], past)
        x = model.hidden(step, ids)
        x = x.gather(1, select[..., None].expand(-1, -1, x.shape[-1]))
        logits = model.logits(step, x)
        return logits, logits.argmax(-1), *step.present()


def graphs(model: Decoder) -> Program:
    """The program of a dense decoder: no loop, so all of it is the epilogue, `decode`."""
    c = model.config
    slots: dict[str, Wire] = {
        f"{part}.{slot}": f"state.{part}.{slot}"
        for slot in range(c.num_layers)
        for part in ("k", "v")
    }
    inputs: dict[str, Wire] = {"ids": "input.ids", "select": "input.select", "lens": "state.lens"}
    outputs: dict[str, Wire] = {"logits": "result.logits", "token": "result.token"}
    parameters = sum(p.numel() for p in model.parameters())
    return Program(
        summary=f"dense decoder, {c.num_layers} blocks, {counted(parameters)} parameters",
        parts=ProgramSpec(epilogue="decode"),
        inputs=DECODER_INPUTS,
        results=decoder_results(c.vocab_size),
        states=kv_states(c.num_layers, c.heads),
        graphs=(
            TracedGraph(
                "decode",
                lambda lowering: DecodeGraph(model, FORMS[lowering]),
                inputs | slots,
                outputs | {f"{name}.next": end for name, end in slots.items()},
            ),
        ),
        vocab_size=c.vocab_size,
        context=c.context,
        reference=partial(references, model, c.num_layers),
        parameters=parameters,
        weights=model,
        refusals=refusals(c.heads),
    )
