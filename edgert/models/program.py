"""What a family hands to the exporter: its program, states and graphs, before tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from edgert.spec import Lowering, ProgramSpec, StateSpec, TensorSpec


@dataclass(frozen=True)
class TracedGraph:
    """One graph to trace. `module(lowering)` takes the inputs in order and returns the outputs."""

    name: str
    module: Callable[[Lowering], nn.Module]
    inputs: dict[str, str]  # graph input -> endpoint
    outputs: dict[str, str]  # graph output -> endpoint


@dataclass(frozen=True)
class Reference:
    """What eager torch computes for whole sequences ids [B, T]: the truth of the parity gate."""

    states: dict[str, Tensor]  # append states at their full length T, in slot order
    logits: Tensor  # [B, T, V]


@dataclass(frozen=True)
class Program:
    """A model as graphs over named state. The order of `states` is the slot order."""

    summary: str
    parts: ProgramSpec
    inputs: dict[str, TensorSpec]
    results: dict[str, TensorSpec]
    states: dict[str, StateSpec]
    graphs: tuple[TracedGraph, ...]
    vocab_size: int
    context: int
    reference: Callable[[Tensor], Reference]
    parameters: int
    refusals: dict[Lowering, str]  # lowerings this geometry has no kernels for, and why
