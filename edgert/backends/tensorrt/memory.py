"""How much memory a variant takes while it runs: sizes, kinds, lifetimes, what lies on what.

Plain arithmetic over the manifest; the backend allocates exactly this, and a test adds it up. The
same numbers decide whether `edgert build` refuses a target.

    scratch       for as long as the model is open; one piece for all engines, the largest's
    states        for a session; one that a graph reads and writes has two sides, see below
    step buffers  for a step shape: what goes in and out, and what graphs hand to each other

TensorRT does not say that an engine may write the buffer it reads. So such a state has two sides,
which the steps take in turn: an output lies on the side that the step does not read. Only where the
engine itself says that an output is one of its inputs (`in_place`), both are the same memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from edgert.backends.base import nbytes_of
from edgert.spec import GraphSpec, Manifest, StateSpec, TensorSpec, endpoints, resolve

ALIGNMENT = 256
"""Bytes: every address that TensorRT is given is a multiple of it."""

Place = Literal["device", "shared"]
"""Memory of the device alone, or of the host, seen by both and read without a copy."""


def aligned(nbytes: int) -> int:
    """What is reserved for so many bytes: a multiple of the alignment, never nothing."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True)
class Item:
    """A tensor. `end` is what graphs are wired to; `sides` how often it is there."""

    end: str
    nbytes: int
    sides: int
    place: Place

    @property
    def reserved(self) -> int:
        return self.sides * aligned(self.nbytes)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a session takes, with one step shape. `scratch` serves all sessions of a model."""

    scratch: int
    states: tuple[Item, ...]
    step: tuple[Item, ...]

    def total(self, place: Place) -> int:
        """Of one kind of memory, scratch included."""
        items = [item for item in (*self.states, *self.step) if item.place == place]
        own = aligned(self.scratch) if self.scratch and place == "device" else 0
        return own + sum(item.reserved for item in items)


def plan_session(
    manifest: Manifest,
    variant: str,
    axes: Mapping[str, int],
    *,
    scratch: Iterable[int] = (),
    in_place: Collection[str] = (),
) -> MemoryPlan:
    """A session of a model that decodes.

    axes      batch and capacity, tokens and select of its steps
    scratch   of each engine: they run one after the other, in the same piece
    in_place  states whose engines say that they are written where they are read
    """
    return MemoryPlan(
        scratch=max(scratch, default=0),
        states=state_items(manifest, variant, axes, in_place),
        step=step_items(manifest, variant, axes),
    )


def plan_slots(
    manifest: Manifest, variant: str, batch: int, *, scratch: Iterable[int] = ()
) -> MemoryPlan:
    """`batch` puzzles in the loop of a model that solves, and the entrance for the next one."""
    axes, one = {"batch": batch}, {"batch": 1}
    return MemoryPlan(
        scratch=max(scratch, default=0),
        states=(),
        step=(
            Item("loop.steps", nbytes_of("int64", (batch,)), 1, "shared"),
            *_items("result", manifest.results, axes, "shared"),
            *loop_items(manifest, variant, axes),
            *_items("input", manifest.inputs, one, "shared"),
            *loop_items(manifest, variant, one),
        ),
    )


def state_items(
    manifest: Manifest, variant: str, axes: Mapping[str, int], in_place: Collection[str] = ()
) -> tuple[Item, ...]:
    graphs = manifest.variants[variant].graphs.values()
    found = []
    for name, spec in manifest.states_of(variant).items():
        shared = spec.kind == "counter"
        twice = name not in in_place and is_replaced(graphs, f"state.{name}")
        place: Place = "shared" if shared else "device"
        found.append(Item(f"state.{name}", _size(spec, axes), 1 + twice, place))
    return tuple(found)


def step_items(manifest: Manifest, variant: str, axes: Mapping[str, int]) -> tuple[Item, ...]:
    """What a step shape of a decoder has to itself."""
    loop = manifest.program.loop if manifest.parts(variant)["body"] else None
    indices = range(loop.iterations if loop else 0)
    return (
        *_items("input", manifest.inputs, axes, "shared"),
        *_items("result", manifest.results, axes, "shared"),
        *loop_items(manifest, variant, axes),
        *(Item(f"loop.iteration[{i}]", 8, 1, "shared") for i in indices),
    )


def loop_items(manifest: Manifest, variant: str, axes: Mapping[str, int]) -> tuple[Item, ...]:
    """What graphs hand to each other, and to the host between iterations. What goes round the loop
    has two buffers that take turns."""
    loop, body = manifest.program.loop, manifest.parts(variant)["body"]
    if loop is None or body is None:
        return ()
    graphs = [manifest.variants[variant].graphs[body]]
    values = [
        Item(f"value.{name}", _size(spec, axes), 1 + is_replaced(graphs, f"value.{name}"), "device")
        for name, spec in loop.values.items()
    ]
    return (*values, *_items("signal", loop.signals, axes, "shared"))


def is_replaced(graphs: Iterable[GraphSpec], end: str) -> bool:
    """Whether a graph writes what it reads."""
    return any(
        any(end in endpoints(wire) for wire in graph.inputs.values())
        and any(end in endpoints(wire) for wire in graph.outputs.values())
        for graph in graphs
    )


def _items(
    kind: str, specs: Mapping[str, TensorSpec], axes: Mapping[str, int], place: Place
) -> list[Item]:
    return [Item(f"{kind}.{name}", _size(spec, axes), 1, place) for name, spec in specs.items()]


def _size(spec: TensorSpec | StateSpec, axes: Mapping[str, int]) -> int:
    return nbytes_of(spec.dtype, resolve(spec.shape, axes))
