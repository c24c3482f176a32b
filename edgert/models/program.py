"""What a family hands to the exporter: its program, states and graphs, before tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from edgert.models.layers import Cache, Eager, Heads
from edgert.spec import Lowering, ProgramSpec, StateSpec, TensorSpec, Wire, endpoint_spec


@dataclass(frozen=True)
class TracedGraph:
    """One graph to trace. `module(lowering)` takes the inputs in order and returns the outputs."""

    name: str
    module: Callable[[Lowering], nn.Module]
    inputs: dict[str, Wire]  # graph input -> endpoint
    outputs: dict[str, Wire]  # graph output -> endpoint


@dataclass(frozen=True)
class Reference:
    """What eager torch computes for whole sequences ids [B, T]: the truth of the parity gate."""

    states: dict[str, Tensor]  # append states at their full length T, in slot order
    logits: Tensor  # [B, T, V]


class Referee(Protocol):
    """Eager torch over whole sequences ids int64 [B, T]; attention reads what `cache` gives it."""

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Reference: ...


@dataclass(frozen=True)
class Turn:
    """What eager torch has behind the prologue (no signals, no results), or an iteration of the
    body: every value of the loop, the signals, and the results as the epilogue would give them."""

    values: dict[str, Tensor]
    signals: dict[str, Tensor]
    results: dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A model as graphs over named state. The order of `states` is the slot order.

    reference  of a decoder: eager torch over whole sequences
    turns      of a model that solves: eager torch, iteration by iteration from the inputs
    tables     input -> what its rows are taken from; they stay outside the graphs
    unrolled   a program with a loop in one graph, under the name of the epilogue
    weights    the module that all large initializers of the graphs come from
    """

    summary: str
    parts: ProgramSpec
    inputs: dict[str, TensorSpec]
    results: dict[str, TensorSpec]
    states: dict[str, StateSpec]
    graphs: tuple[TracedGraph, ...]
    vocab_size: int
    context: int
    parameters: int
    weights: nn.Module
    refusals: dict[Lowering, str]  # lowerings this geometry has no kernels for, and why
    reference: Referee | None = None
    turns: Callable[[Mapping[str, Tensor]], Iterator[Turn]] | None = None
    tables: dict[str, Tensor] = field(default_factory=dict)
    unrolled: TracedGraph | None = None

    def tensor_of(self, wire: Wire) -> TensorSpec:
        """dtype and shape of what an endpoint carries."""
        return endpoint_spec(wire, self.inputs, self.results, self.states, self.parts.loop)

    @property
    def slots(self) -> int:
        """Executed attentions of a decoder, each with keys and values of its own."""
        return sum(spec.kind == "append" for spec in self.states.values()) // 2


def kv_states(slots: int, heads: Heads) -> dict[str, StateSpec]:
    """The counter, then keys and values of each slot."""
    kv = StateSpec(
        kind="append",
        dtype="float32",
        shape=("batch", heads.kv, "capacity", heads.size),
        axis="capacity",
        counter="lens",
    )
    lens = StateSpec(kind="counter", dtype="int64", shape=("batch",))
    return {"lens": lens} | {name: kv for slot in range(slots) for name in kv_names(slot)}


def kv_names(slot: int) -> tuple[str, str]:
    """The states that hold the keys and the values of a slot."""
    return f"k.{slot}", f"v.{slot}"


class Scorer(Protocol):
    """A model that scores whole sequences."""

    def eager(self, tokens: int) -> Eager: ...

    def __call__(self, ids: Tensor, step: Eager) -> Tensor: ...


def references(model: Scorer, slots: int, ids: Tensor, cache: Cache | None = None) -> Reference:
    """What a `Referee` gives."""
    with torch.no_grad():
        step = model.eager(ids.shape[1])
        step.cache = cache
        logits = model(ids, step)
    states: dict[str, Tensor] = {}
    for slot in range(slots):
        states |= zip(kv_names(slot), (step.k[slot], step.v[slot]), strict=True)
    return Reference(states, logits)


def counted(number: int) -> str:
    """45728 -> '45.7k', 134515008 -> '134.5M'."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"
