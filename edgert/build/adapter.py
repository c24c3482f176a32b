"""One graph through TensorRT: the only module that calls it.

The `trt` module is handed in: `tensorrt` on a device, `tensorrt_rtx` to check on any machine. What
is used of it exists alike in 10.3, 10.16, 11.4 and TensorRT-RTX 1.7, and a test compares every
attribute here with the recorded members of each. So networks are strongly typed and quantization
is in the graph: builder flags for precision and calibrators are gone from 11. Nothing here makes a
`Runtime`: without a driver that can kill the process.

Names, for that test: a variable of this module that holds an object of the library is called as in
`edgert.build.adapter.HOLDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgert.backends.tensorrt.engine import DTYPES
from edgert.backends.tensorrt.log import MOST_LINES, heard, said
from edgert.build.plan import MB, GraphPlan, ShapeProfile
from edgert.build.target import Target
from edgert.errors import EdgertError, GateFailed, Incompatible, UnsupportedModel
from edgert.progress import Advance
from edgert.spec import TensorSpec

HOLDS = {
    "attention": "IAttention",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "error": "ParserError",
    "inlet": "IAttentionInputLayer",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "timing": "ITimingCache",
}
"""Name of a variable -> class of the library's object that it holds."""

STEPS = 100
"""Of a progress bar: per cent."""


@dataclass(frozen=True)
class Compiled:
    """An engine, what the compiler knows now of timings, and how many layers it was given."""

    engine: bytes
    timings: bytes
    layers: int


def compile_graph(
    trt: Any, plan: GraphPlan, target: Target, timings: bytes = b"", advance: Advance | None = None
) -> Compiled:
    """Parse one graph, compare it with the plan, compile it.

    timings  what an earlier build for the same device gave back
    advance  is called with per cents of the work
    Raises UnsupportedModel (not parsed), GateFailed (parsed as something else than the manifest
    says), Incompatible (the compiler lacks the target), EdgertError (not compiled), each with the
    compiler's own words; KeyboardInterrupt, once it has let go.
    """
    with heard(trt) as log:
        builder = trt.Builder(log)
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flag)
        _parse(trt, log, network, plan)
        _compare(trt, network, plan)
        if hasattr(trt, "IAttentionInputLayer"):  # from 10.14 on
            _allow_decomposing(trt, network)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace_mb * MB)
        config.builder_optimization_level = target.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        for shapes in plan.profiles:
            _add_profile(builder, network, config, shapes)
        _aim(trt, config, target)
        with _timed(config, target, timings) as remembered:
            progress = _progress(trt, advance or (lambda amount: None))
            config.progress_monitor = progress
            memory = builder.build_serialized_network(network, config)
            if progress.interrupted:
                raise KeyboardInterrupt
            if memory is None:
                raise EdgertError(
                    f"graph {plan.name!r} does not compile for {target.name}",
                    where=said(log, str(plan.path)),
                    do="the compiler's own words are above; another optimization_level, fewer "
                    "shape profiles or a larger workspace_mb of the target may help",
                )
            return Compiled(bytes(memory), remembered(), network.num_layers)


def _parse(trt: Any, log: Any, network: Any, plan: GraphPlan) -> None:
    parser = trt.OnnxParser(network, log)
    # From the file, not from bytes: it finds the weights beside it.
    done = parser.parse_from_file(str(plan.path))
    reasons = []
    for at in range(parser.num_errors):
        error = parser.get_error(at)
        operator, node = error.node_operator(), error.node_name()
        what = f"node {node!r} ({operator})" if operator else "the file"
        reasons.append(f"{what}: {error.code().name}, {error.desc()}")
    if not done or reasons or not network.num_layers:
        raise UnsupportedModel(
            "\n    ".join([f"graph {plan.name!r} is not parsed", *reasons[:MOST_LINES]]),
            where=said(log, str(plan.path)),
            do="export it with --lowering portable",
        )


def _compare(trt: Any, network: Any, plan: GraphPlan) -> None:
    """The parsed network has the manifest's ports, and the file's quantization."""
    ports = {
        "inputs": [network.get_input(at) for at in range(network.num_inputs)],
        "outputs": [network.get_output(at) for at in range(network.num_outputs)],
    }
    wrong = []
    for side, wanted in (("inputs", plan.inputs), ("outputs", plan.outputs)):
        found = {tensor.name: tensor for tensor in ports[side]}
        for name in found.keys() ^ wanted.keys():
            wrong.append(f"{side}.{name}: {'not in the manifest' if name in found else 'missing'}")
        for name in found.keys() & wanted.keys():
            wrong += [f"{side}.{name}: {why}" for why in _unlike(trt, found[name], wanted[name])]
    layers = [network.get_layer(at) for at in range(network.num_layers)]
    kinds = [layer.type for layer in layers]
    counts = (kinds.count(trt.LayerType.QUANTIZE), kinds.count(trt.LayerType.DEQUANTIZE))
    if counts != plan.rounding:
        wrong.append(f"{counts} layers that quantize and dequantize, {plan.rounding} in the file")
    if wrong:
        raise GateFailed(
            "\n    ".join([f"graph {plan.name!r} is parsed as something else", *sorted(wrong)]),
            where=str(plan.path),
            do="do not use it, and report how it was made",
        )


def _unlike(trt: Any, tensor: Any, spec: TensorSpec) -> Iterator[str]:
    if tensor.dtype != getattr(trt.DataType, DTYPES[spec.dtype]):
        yield f"{tensor.dtype} instead of {spec.dtype}"
    shape = tuple(tensor.shape)
    want = tuple(-1 if isinstance(axis, str) else axis for axis in spec.shape)
    if shape != want:
        yield f"shape {shape} instead of {want}"
    # An output's named axis may lose its name on the way; an input's does not.
    elif tensor.is_network_input:
        names = tuple(tensor.get_dimension_name(at) or None for at in range(len(shape)))
        named = tuple(axis if isinstance(axis, str) else None for axis in spec.shape)
        if names != named:
            yield f"axes {names} instead of {named}"
        if tensor.is_shape_tensor:
            yield "its values are a shape, which no shape profile gives"


def _allow_decomposing(trt: Any, network: Any) -> None:
    """Attention in a type or of a head size that has no kernel of its own becomes products and a
    softmax, instead of an error."""
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            inlet = layer
            inlet.__class__ = trt.IAttentionInputLayer  # the bindings give the general class
            attention = inlet.attention
            attention.decomposable = True


def _add_profile(builder: Any, network: Any, config: Any, shapes: ShapeProfile) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in shapes.shapes.items():
        profile.set_shape(name, low, best, high)
    # It says nothing of shapes that are out of order: what was set is read back.
    for name, wanted in shapes.shapes.items():
        got = tuple(tuple(size) for size in profile.get_shape(name))
        assert got == wanted, f"profile {shapes.name}: {name} is {got}, not {wanted}"
    index = config.add_optimization_profile(profile)
    assert index >= 0, f"profile {shapes.name} is refused"


def _aim(trt: Any, config: Any, target: Target) -> None:
    """TensorRT builds for the device it runs on; TensorRT-RTX is told which."""
    if target.compiler != "tensorrt_rtx":
        return
    wanted = f"SM{target.sm.replace('.', '')}"
    capability = getattr(trt.ComputeCapability, wanted, None)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    # What it does not support it says to the log alone, and forgets.
    if capability is None or config.get_compute_capability(0) != capability:
        raise Incompatible(
            f"{target.compiler} does not compile for SM {target.sm}",
            where=f"target {target.name}",
            do="choose a target with another sm",
        )


@contextmanager
def _timed(config: Any, target: Target, timings: bytes) -> Iterator[Callable[[], bytes]]:
    """With what earlier builds have timed; what is yielded gives that and what this one adds.

    TensorRT-RTX times nothing while it builds, and warns where it is asked to.
    """
    if target.compiler == "tensorrt_rtx":
        yield lambda: b""
        return
    timing = config.create_timing_cache(timings)
    used = timing is not None and config.set_timing_cache(timing, False)

    def remembered() -> bytes:
        timing = config.get_timing_cache()
        return bytes(timing.serialize())

    yield remembered if used else lambda: timings


def _progress(trt: Any, advance: Advance) -> Any:
    class Progress(trt.IProgressMonitor):  # type: ignore[misc]
        """Nested phases as one number. An interrupt stops the build, and nothing else does."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.phases: dict[str, tuple[float, float]] = {}  # where it starts, share of a step
            self.now: dict[str, float] = {}  # how far it is
            self.shown = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            parent = parent_phase or ""
            start = self.now.get(parent, 0.0)
            _, share = self.phases.get(parent, (0.0, 1.0))
            self.phases[phase_name] = start, share / max(1, num_steps)
            self.now[phase_name] = start

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                start, share = self.phases[phase_name]
                self.now[phase_name] = start + (step + 1) * share
                done = int(STEPS * min(1.0, self.now[phase_name]))
                if done > self.shown:
                    advance(done - self.shown)
                    self.shown = done
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Progress()
