"""What building a bundle for a target will do, worked out before any compiler is asked.

From the manifest and the target: which variant, every graph's shape profiles with the smallest,
best and largest shape of each input, the memory it all takes at the largest, and every reason to
refuse that can be known now: operators, operator sets, memory. Plain Python; `shapes` reads the
graphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from edgert.backends.tensorrt.memory import Item, plan_slots, state_items, step_items
from edgert.build.operators import refusals
from edgert.build.shapes import Drawn, read_graph
from edgert.build.target import ONE, Span, Target
from edgert.bundle import Bundle
from edgert.errors import Incompatible, OutOfMemory, UnsupportedModel, UsageError
from edgert.onnxfile import read_onnx_facts
from edgert.spec import (
    GraphSpec,
    Manifest,
    TensorSpec,
    VariantSpec,
    resolve,
)

MB = 1_000_000
BUILD_FACTOR = 4
"""While it builds, a compiler holds about so many times a graph's weights (users of NVIDIA's own
tool saw three to four: NVIDIA/TensorRT-Edge-LLM#30)."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeProfile:
    """Smallest, best and largest shape of every input that a named axis is in."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class GraphPlan:
    """One graph to compile.

    inputs, outputs  what the manifest says of each port; named axes are dynamic
    activations      bytes alive at once, estimated: see `Drawn.activations`
    rounding         operators that quantize and dequantize in the graph
    """

    name: str
    path: Path
    sha256: tuple[str, ...]  # of the graph file and its data files
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    profiles: tuple[ShapeProfile, ...]
    nodes: int
    rounding: tuple[int, int]
    weights: int
    activations: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the largest shapes, while the model runs.

    activations  of the graph that needs most: they run one after the other
    states       twice where a graph writes what it reads: an engine must not
    buffers      inputs, results, and what graphs hand to each other
    """

    weights: int
    activations: int
    states: dict[str, int]
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + sum(self.states.values()) + self.buffers


@dataclass(frozen=True)
class BuildPlan:
    target: Target
    bundle: str
    variant: str
    variant_id: str
    precision: str
    graphs: tuple[GraphPlan, ...]
    memory: Memory
    building: int  # bytes that the compiler needs for the largest graph, estimated

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "target": self.target.name,
            "compiler": f"{self.target.compiler} {self.target.version}",
            "sm": self.target.sm,
            "variant": self.variant,
            "variant_id": self.variant_id,
            "precision": self.precision,
            "workspace_bytes": self.target.workspace_mb * MB,
            "graphs": [
                {
                    "graph": graph.name,
                    "nodes": graph.nodes,
                    "quantize": graph.rounding[0],
                    "dequantize": graph.rounding[1],
                    "weight_bytes": graph.weights,
                    "activation_bytes": graph.activations,
                    "inputs": {n: _port(spec) for n, spec in graph.inputs.items()},
                    "outputs": {n: _port(spec) for n, spec in graph.outputs.items()},
                    "profiles": {
                        profile.name: {
                            name: dict(zip(("min", "opt", "max"), shapes, strict=True))
                            for name, shapes in profile.shapes.items()
                        }
                        for profile in graph.profiles
                    },
                }
                for graph in self.graphs
            ],
            "memory": {
                "limit_bytes": self.target.memory_mb * MB,
                "total_bytes": self.memory.total,
                "weight_bytes": self.memory.weights,
                "activation_bytes": self.memory.activations,
                "state_bytes": sum(self.memory.states.values()),
                "buffer_bytes": self.memory.buffers,
                "building_bytes": self.building,
            },
        }


def _port(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": list(spec.shape)}


@dataclass(frozen=True)
class _Source:
    """A graph file, what it is called, and its ports."""

    name: str
    path: Path
    sha256: tuple[str, ...]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


def plan_build(
    bundle: Bundle,
    target: Target,
    precision: str | None = None,
    loop_form: Path | None = None,
    lowering: str | None = None,
) -> BuildPlan:
    """What to build: the stepped graphs; or, with `loop_form`, a folder to write it to, the one
    graph that has the loop inside (edgert/export/loop_form.py).

    Raises UsageError (no such precision or lowering), Incompatible (no variant that the target
    takes), UnsupportedModel (operators, naming nodes; no loop), OutOfMemory (naming the largest
    states).
    """
    if loop_form is not None:
        lowering = _loop_lowering(lowering)
    name = choose(bundle.manifest, target, precision, lowering)
    variant = bundle.manifest.variants[name]
    manifest = replace(bundle.manifest, states=bundle.manifest.states_of(name))
    check_opsets(name, variant, target)
    profiles = profiles_of(manifest, target)
    graphs, problems = [], []
    if loop_form is None:
        sources = [_stepped(bundle, manifest, n, spec) for n, spec in variant.graphs.items()]
    else:
        sources = [_looped(bundle, name, loop_form)]
    for source in sources:
        drawn = read_graph(source.path)
        problems += [f"graph {source.name!r}: {why}" for why in refusals(target, drawn.nodes)]
        graphs.append(_graph(source, drawn, profiles))
    if problems:
        raise UnsupportedModel(
            "\n    ".join([f"{target.name} cannot parse variant {name}", *problems]),
            where=str(bundle.root),
            do=f"export it with --lowering {target.lowerings[-1]}, or choose another target",
        )
    plan = BuildPlan(
        target=target,
        bundle=manifest.name,
        variant=name,
        variant_id=variant.variant_id,
        precision=variant.precision,
        graphs=tuple(graphs),
        memory=_memory(manifest, name, graphs, profiles),
        building=BUILD_FACTOR * max(g.weights for g in graphs) + target.workspace_mb * MB,
    )
    check_memory(plan, manifest)
    return plan


def _loop_lowering(given: str | None) -> str:
    """TensorRT parses its attention layer inside a loop, and does not compile it there."""
    if given not in (None, "portable"):
        raise UnsupportedModel(
            f"the loop form of {given} graphs has attention layers inside a loop, which TensorRT "
            "does not compile",
            do="leave --lowering away: the loop form is made of portable graphs",
        )
    return "portable"


def choose(
    manifest: Manifest, target: Target, precision: str | None, lowering: str | None = None
) -> str:
    """The variant to build: stepped, in the target's best precision, and its best lowering."""
    precisions = _wanted(target, "precision", precision, target.precisions)
    lowerings = _wanted(target, "lowering", lowering, target.lowerings)
    for pair in product(precisions, lowerings):
        for name, variant in manifest.variants.items():
            stepped = manifest.parts(name) == manifest.program.parts
            if (variant.precision, variant.lowering) == pair and stepped:
                return name
    raise Incompatible(
        f"{target.name} takes {' or '.join(lowerings)} graphs in {' or '.join(precisions)}; the "
        f"bundle has {', '.join(manifest.variants)}",
        do=f"export it with --lowering {lowerings[0]} --precision {precisions[0]}",
    )


def _wanted(
    target: Target, what: str, given: str | None, known: tuple[str, ...]
) -> tuple[str, ...]:
    if given is None:
        return known
    if given not in known:
        raise UsageError(
            f"{target.name} does not build {what} {given!r:.40}",
            do=f"choose from: {', '.join(known)}",
        )
    return (given,)


def check_opsets(name: str, variant: VariantSpec, target: Target) -> None:
    for domain, version in variant.opsets.items():
        if domain != "ai.onnx" or version > target.opset:
            raise UnsupportedModel(
                f"variant {name} imports {domain} {version}, {target.name} parses ai.onnx up to "
                f"{target.opset}",
                do=f"export it with --lowering {target.lowerings[-1]}",
            )


def profiles_of(manifest: Manifest, target: Target) -> dict[str, dict[str, Span]]:
    """Shape profile -> spans of all axes: those of a model that solves, or of one that decodes.

    No capacity is above the model's context.
    """
    names = ("solve",) if manifest.solves else ("prefill", "step")
    every = dict.fromkeys(("batch", "tokens", "select", "capacity"), ONE)
    limits = {} if manifest.solves else dict.fromkeys(every.keys() - {"batch"}, manifest.context)
    return {
        name: {
            axis: span.up_to(limits.get(axis, span.most))
            for axis, span in (every | target.profiles[name]).items()
        }
        for name in names
    }


def _stepped(bundle: Bundle, manifest: Manifest, name: str, spec: GraphSpec) -> _Source:
    return _Source(
        name=name,
        path=bundle.path(spec.file),
        sha256=manifest.hashes_of(spec),
        inputs={port: manifest.tensor_of(wire) for port, wire in spec.inputs.items()},
        outputs={port: manifest.tensor_of(wire) for port, wire in spec.outputs.items()},
    )


def _looped(bundle: Bundle, variant: str, folder: Path) -> _Source:
    from edgert.export.loop_form import loop_form

    made = loop_form(bundle, variant)
    path = made.write(folder)
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = (bundle.manifest.files[file].sha256 for file in made.data)
    return _Source("loop", path, (own, *weights), made.inputs, made.outputs)


def _graph(source: _Source, drawn: Drawn, profiles: Mapping[str, Mapping[str, Span]]) -> GraphPlan:
    operators = [node.operator for node in drawn.nodes]
    external = read_onnx_facts(source.path).external
    tensors = {(r.location, r.offset): r.length for r in external}
    return GraphPlan(
        name=source.name,
        path=source.path,
        sha256=source.sha256,
        inputs=source.inputs,
        outputs=source.outputs,
        profiles=tuple(
            found
            for found in (shape_profile(p, source.inputs, s) for p, s in profiles.items())
            if found.shapes
        ),
        nodes=len(operators),
        rounding=(operators.count("QuantizeLinear"), operators.count("DequantizeLinear")),
        weights=sum(tensors.values()),
        activations=max(drawn.activations(largest(spans)) for spans in profiles.values()),
    )


def shape_profile(
    name: str, inputs: Mapping[str, TensorSpec], spans: Mapping[str, Span]
) -> ShapeProfile:
    shapes = {}
    for port, spec in inputs.items():
        if any(isinstance(axis, str) for axis in spec.shape):
            low, best, high = (
                resolve(spec.shape, {axis: getattr(span, size) for axis, span in spans.items()})
                for size in ("least", "best", "most")
            )
            shapes[port] = (low, best, high)
    return ShapeProfile(name, shapes)


def largest(spans: Mapping[str, Span]) -> dict[str, int]:
    return {axis: span.most for axis, span in spans.items()}


def _memory(
    manifest: Manifest,
    variant: str,
    graphs: list[GraphPlan],
    profiles: Mapping[str, Mapping[str, Span]],
) -> Memory:
    """As the backend allocates it."""
    axes = [largest(spans) for spans in profiles.values()]
    if manifest.solves:
        buffers = sum(
            item.reserved for item in plan_slots(manifest, variant, axes[0]["batch"]).step
        )
    else:
        buffers = sum(_most(step_items(manifest, variant, at) for at in axes).values())
    states = _most(state_items(manifest, variant, at) for at in axes)
    return Memory(
        weights=sum(graph.weights for graph in graphs),
        activations=max(graph.activations for graph in graphs),
        states={end.removeprefix("state."): size for end, size in states.items()},
        buffers=buffers,
    )


def _most(sizes: Iterable[tuple[Item, ...]]) -> dict[str, int]:
    """Bytes of each tensor where it is largest."""
    found: dict[str, int] = {}
    for items in sizes:
        for item in items:
            found[item.end] = max(found.get(item.end, 0), item.reserved)
    return found


def check_memory(plan: BuildPlan, manifest: Manifest) -> None:
    """Raise OutOfMemory, with the numbers, for what the target's memory will not hold."""
    memory, target = plan.memory, plan.target
    limit = target.memory_mb * MB
    if plan.building > limit:
        heaviest = max(plan.graphs, key=lambda graph: graph.weights)
        raise OutOfMemory(
            f"building graph {heaviest.name!r} takes about {plan.building / MB:,.0f} MB: "
            f"{BUILD_FACTOR} times its weights of {heaviest.weights / MB:,.0f} MB, and a workspace "
            f"of {target.workspace_mb:,} MB; {target.name} has {target.memory_mb:,} MB",
            do="lower workspace_mb in the target, or export with fewer bits",
        )
    if memory.total <= limit:
        return
    lines = [
        f"running needs {memory.total / MB:,.0f} MB, {target.name} has {target.memory_mb:,} MB",
        f"weights {memory.weights / MB:,.0f} MB, activations {memory.activations / MB:,.0f} MB, "
        f"inputs and results {memory.buffers / MB:,.0f} MB",
        *_states(memory, manifest),
    ]
    raise OutOfMemory(
        "\n    ".join(lines),
        do="lower batch or capacity in the target's shape profiles, or export with a smaller "
        "--context or fewer bits",
    )


def _states(memory: Memory, manifest: Manifest) -> Iterator[str]:
    """The largest states, alike ones together."""
    alike: dict[tuple[str, tuple[int | str, ...]], list[str]] = {}
    for name, spec in manifest.states.items():
        alike.setdefault((spec.dtype, spec.shape), []).append(name)
    sizes = {key: sum(memory.states[n] for n in names) for key, names in alike.items()}
    for key in sorted(sizes, key=lambda key: -sizes[key])[:3]:
        (dtype, shape), names = key, alike[key]
        listed = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} states)"
        axes = ", ".join(map(str, shape))
        yield f"state {listed}, {dtype} [{axes}]: {sizes[key] / MB:,.0f} MB"
