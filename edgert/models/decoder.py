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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.block import Block, stack
from edgert.models.layers import Eager, Heads, Ort, Portable, Stateful, Step, rope_tables
from edgert.models.program import Program, Reference, TracedGraph
from edgert.spec import DECODER_INPUTS, Lowering, ProgramSpec, StateSpec, decoder_results


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


FORMS: dict[Lowering, type[Stateful]] = {"ort": Ort, "portable": Portable}


def graphs(model: Decoder) -> Program:
    """The program of a dense decoder: no loop, so all of it is the epilogue, `decode`."""
    c = model.config
    kv = StateSpec(
        kind="append",
        dtype="float32",
        shape=("batch", c.num_kv_heads, "capacity", c.head_size),
        axis="capacity",
        counter="lens",
    )
    slots = [f"{part}.{slot}" for slot in range(c.num_layers) for part in ("k", "v")]
    states = {"lens": StateSpec(kind="counter", dtype="int64", shape=("batch",))}
    states |= {name: kv for name in slots}
    inputs = {"ids": "input.ids", "select": "input.select", "lens": "state.lens"}
    outputs = {"logits": "result.logits", "token": "result.token"}
    parameters = sum(p.numel() for p in model.parameters())
    refusal = Ort.refusal(c.heads)
    return Program(
        summary=f"dense decoder, {c.num_layers} blocks, {_count(parameters)} parameters",
        parts=ProgramSpec(epilogue="decode"),
        inputs=DECODER_INPUTS,
        results=decoder_results(c.vocab_size),
        states=states,
        graphs=(
            TracedGraph(
                "decode",
                lambda lowering: DecodeGraph(model, FORMS[lowering]),
                inputs | {name: f"state.{name}" for name in slots},
                outputs | {f"{name}.next": f"state.{name}" for name in slots},
            ),
        ),
        vocab_size=c.vocab_size,
        context=c.context,
        reference=lambda ids: reference(model, ids),
        parameters=parameters,
        refusals={"ort": refusal} if refusal else {},
    )


def _count(number: int) -> str:
    """45728 -> '45.7k', 134515008 -> '134.5M'."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"


def reference(model: Decoder, ids: Tensor) -> Reference:
    """Eager torch over whole sequences ids int64 [B, T]."""
    with torch.no_grad():
        step = model.eager(ids.shape[1])
        logits = model(ids, step)
    states = {
        f"{part}.{slot}": kept[slot]
        for slot in range(model.config.num_layers)
        for part, kept in (("k", step.k), ("v", step.v))
    }
    return Reference(states, logits)
