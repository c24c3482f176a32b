"""HAGI as a program: perception, the core repeated, expression and head.

Two forms of it are traced. Stepped: a graph for each stage, the core's once, with the iteration as
an input and that iteration's keys and values bound to it. Unrolled: all of it in one graph, in
which the core's weights are stored once.

State    k.<slot>, v.<slot> [B, KV heads, capacity, head size], keys after rotation; slots as in
         `model`: perception, iteration-major the core, expression
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from edgert.models.forms import FORMS, refusals
from edgert.models.hagi.gdr import GDR, FoldedGDR
from edgert.models.hagi.model import HAGI
from edgert.models.layers import Stateful
from edgert.models.program import Program, TracedGraph, counted, kv_states, references
from edgert.spec import (
    DECODER_INPUTS,
    LoopSpec,
    Lowering,
    ProgramSpec,
    TensorSpec,
    Wire,
    decoder_results,
)


class Whole(nn.Module):
    """Every stage and iteration: T tokens behind `lens` old ones."""

    def __init__(self, model: HAGI, form: type[Stateful]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(
        self, ids: Tensor, select: Tensor, lens: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """ids int64 [B, T], select int64 [B, S] (positions within this chunk), lens int64 [B],
        past: k, v per slot -> logits [B, S, V], their argmax int64 [B, S], k, v per slot."""
        step = _step(self.model, self.form, lens, ids.shape[1], past)
        return *_results(self.model, step, self.model.hidden(step, ids), select), *step.present()


class Perception(nn.Module):
    """ids int64 [B, T], past of its slots -> residual stream [B, T, H], k, v per slot."""

    def __init__(self, model: HAGI, form: type[Stateful]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, ids: Tensor, lens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        step = _step(self.model, self.form, lens, ids.shape[1], past)
        return self.model.perceive(step, ids), *step.present()


class Core(nn.Module):
    """One iteration: residual stream h [B, T, H], its index int64 [], past of this iteration's
    slots -> the new residual stream, how much it changed float32 [B, T], k, v per slot."""

    def __init__(self, model: HAGI, form: type[Stateful]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(
        self, h: Tensor, iteration: Tensor, lens: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        model = self.model
        step = _step(model, self.form, lens, h.shape[1], past)
        new = model.reason(step, h, F.embedding(iteration, model.iter_embed), 0)
        change = (new - h).norm(dim=-1) / (h.norm(dim=-1) + 1e-12)
        return new, change, *step.present()


class Expression(nn.Module):
    """Residual stream h [B, T, H], select int64 [B, S], past of its slots -> logits [B, S, V],
    their argmax int64 [B, S], k, v per slot."""

    def __init__(self, model: HAGI, form: type[Stateful]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, h: Tensor, select: Tensor, lens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        step = _step(self.model, self.form, lens, h.shape[1], past)
        h = self.model.express(step, h, 0)
        return *_results(self.model, step, h, select), *step.present()


def _step(
    model: HAGI, form: type[Stateful], lens: Tensor, tokens: int, past: Sequence[Tensor]
) -> Stateful:
    return form(model.config.heads, model.cos, model.sin, lens, tokens, past)


def _results(model: HAGI, step: Stateful, h: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
    h = h.gather(1, select[..., None].expand(-1, -1, h.shape[-1]))
    logits = model.logits(step, h)
    return logits, logits.argmax(-1)


def graphs(model: HAGI) -> Program:
    """The program: stepped if it has a loop, else one graph, `decode`."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    folded = _folded(model)
    names = [f"{part}.{slot}" for slot in range(c.slots) for part in ("k", "v")]
    inputs: dict[str, Wire] = {"ids": "input.ids", "select": "input.select", "lens": "state.lens"}
    outputs: dict[str, Wire] = {"logits": "result.logits", "token": "result.token"}
    past = _state_wires(names)
    whole = TracedGraph(
        "decode",
        lambda lowering: Whole(folded, FORMS[lowering]),
        inputs | past,
        outputs | _next(past),
    )
    loop = None
    if c.iterations > 1:
        hidden = TensorSpec("float32", ("batch", "tokens", c.hidden_size))
        change = TensorSpec("float32", ("batch", "tokens"))
        loop = LoopSpec(c.iterations, {"h": hidden}, {"change": change}, fill="copy")
    depth = f", {c.iterations} iterations" if loop else ""
    return Program(
        summary=f"HAGI {c.letter}, {c.slots} executed blocks{depth}, {counted(parameters)} "
        "parameters",
        parts=ProgramSpec("decode", "perceive", "reason", loop) if loop else ProgramSpec("decode"),
        inputs=DECODER_INPUTS,
        results=decoder_results(c.vocab_size),
        states=kv_states(c.slots, c.heads),
        graphs=_stages(folded) if loop else (whole,),
        unrolled=whole if loop else None,
        vocab_size=c.vocab_size,
        context=c.context,
        reference=partial(references, model, c.slots),
        parameters=parameters,
        weights=folded,
        refusals=refusals(c.heads),
    )


def _folded(model: HAGI) -> HAGI:
    """The same model, with the form of GDR that a graph computes. Shares all other weights."""
    if not isinstance(model.gdr, GDR):
        return model
    folded = copy.copy(model)
    folded._modules = dict(model._modules)
    folded.gdr = FoldedGDR(model.gdr)
    return folded


def _stages(model: HAGI) -> tuple[TracedGraph, ...]:
    c = model.config
    first, behind = c.perception_layers, c.slots - c.expression_layers

    def wires(slots: range) -> dict[str, Wire]:
        return _state_wires([f"{part}.{slot}" for slot in slots for part in ("k", "v")])

    def stage(
        name: str,
        module: Callable[[Lowering], nn.Module],
        inputs: dict[str, Wire],
        outputs: dict[str, Wire],
        past: dict[str, Wire],
    ) -> TracedGraph:
        lens: dict[str, Wire] = {"lens": "state.lens"}
        return TracedGraph(name, module, inputs | lens | past, outputs | _next(past))

    core: dict[str, Wire] = {
        f"{part}.{block}": tuple(
            f"state.{part}.{first + i * c.reasoning_layers + block}" for i in range(c.iterations)
        )
        for block in range(c.reasoning_layers)
        for part in ("k", "v")
    }
    return (
        stage(
            "perceive",
            lambda lowering: Perception(model, FORMS[lowering]),
            {"ids": "input.ids"},
            {"h": "value.h"},
            wires(range(first)),
        ),
        stage(
            "reason",
            lambda lowering: Core(model, FORMS[lowering]),
            {"h": "value.h", "iteration": "loop.iteration"},
            {"h.next": "value.h", "change": "signal.change"},
            core,
        ),
        stage(
            "decode",
            lambda lowering: Expression(model, FORMS[lowering]),
            {"h": "value.h", "select": "input.select"},
            {"logits": "result.logits", "token": "result.token"},
            wires(range(behind, c.slots)),
        ),
    )


def _state_wires(names: list[str]) -> dict[str, Wire]:
    return {name: f"state.{name}" for name in names}


def _next(past: dict[str, Wire]) -> dict[str, Wire]:
    return {f"{name}.next": wire for name, wire in past.items()}
