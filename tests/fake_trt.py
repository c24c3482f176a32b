"""TensorRT's runtime without TensorRT: engines that compute with Python functions, over addresses.

They read and write the memory of a `FakeCuda` at the addresses they were given, in its stream. An
output is overwritten before the inputs are read, as TensorRT may do: a state that is written where
it is read is lost. Only members that TensorRT 10.3 has are there; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_cuda import FakeCuda

from edgert.backends.tensorrt.backend import TensorRTBackend
from edgert.backends.tensorrt.engine import DTYPES
from edgert.build.plan import ShapeProfile, profiles_of, shape_profile
from edgert.build.target import find
from edgert.bundle import Bundle
from edgert.enginestore import Fingerprint, engine_path, write_engine
from edgert.model import Model
from edgert.runner import Runner
from edgert.spec import Manifest, TensorSpec

ORIN = find("orin-nano-jp6")
VERSION = "10.3.0"
SCRATCH = 1000
Function = Callable[..., Mapping[str, Any]]


@dataclass
class Compiled:
    """What an engine is of.

    aliases    output -> input that it is written over
    capturable whether its launches can be written down
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    profiles: Sequence[ShapeProfile]
    function: Function
    scratch: int = SCRATCH
    aliases: dict[str, str] = field(default_factory=dict)
    capturable: bool = True


class FakeTrt:
    """The module. `engines` are what data names; `cuda` is where they compute."""

    __version__ = VERSION
    DataType = SimpleNamespace(**{name: f"DataType.{name}" for name in DTYPES.values()})
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal", WARNING="warning")

        def __init__(self) -> None:
            pass

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.engines: dict[bytes, Compiled] = {}

    def Runtime(self, log: Any) -> FakeRuntime:
        return FakeRuntime(self, log)


class FakeRuntime:
    def __init__(self, trt: FakeTrt, log: Any) -> None:
        self._trt, self._log = trt, log
        self.logger = log

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
        made = self._trt.engines.get(bytes(data))
        if made is None:
            self._log.log("error", "plan->header.size == blobSize failed")
            return None
        return FakeEngine(self._trt, self._log, made)

    def __del__(self) -> None:
        self._trt.cuda.calls.append("~runtime")


class FakeEngine:
    def __init__(self, trt: FakeTrt, log: Any, made: Compiled) -> None:
        self._trt, self._log, self._made = trt, log, made
        self._ports = made.inputs | made.outputs
        self.device_memory_size_v2 = made.scratch
        self.num_io_tensors = len(self._ports)
        self.num_optimization_profiles = max(1, len(made.profiles))
        if made.aliases:  # from 10.15 on
            self.get_aliased_input_tensor = lambda name: made.aliases.get(name)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{DTYPES[self._ports[name].dtype]}"

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._made.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        assert name in self._made.inputs
        fixed = tuple(size if isinstance(size, int) else 1 for size in self._ports[name].shape)
        if not self._made.profiles:
            return [fixed] * 3
        return list(self._made.profiles[profile_index].shapes.get(name, (fixed,) * 3))

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user"
        return FakeContext(self._trt, self._log, self, self._made)

    def __del__(self) -> None:
        self._trt.cuda.calls.append("~engine")


class FakeContext:
    def __init__(self, trt: FakeTrt, log: Any, engine: FakeEngine, made: Compiled) -> None:
        self._trt, self._log, self.engine, self._made = trt, log, engine, made
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes: dict[str, int] = {}
        for port, spec in self._made.inputs.items():
            for axis, size in zip(spec.shape, self._shapes[port], strict=True):
                if isinstance(axis, str):
                    assert axes.setdefault(axis, size) == size, axis
        spec = (self._made.inputs | self._made.outputs)[name]
        return tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % 256 == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._trt.cuda
        if cuda.recording is not None and not self._made.capturable:
            self._log.log("error", "operation would make the legacy stream depend on a capture")
            cuda.put(_spoiled)
            return False
        places, scratch = dict(self._addresses), self._scratch
        shapes = {name: self.get_tensor_shape(name) for name in places}
        cuda.put(lambda: self._compute(places, shapes, scratch))
        return True

    def _compute(
        self, places: dict[str, int], shapes: dict[str, Any], scratch: tuple[int, int]
    ) -> None:
        cuda, made = self._trt.cuda, self._made

        def tensor(name: str) -> Any:
            spec = (made.inputs | made.outputs)[name]
            nbytes = int(np.prod(shapes[name])) * np.dtype(spec.dtype).itemsize
            return cuda.at(places[name], nbytes).view(spec.dtype).reshape(shapes[name])

        assert scratch[1] >= made.scratch
        if made.scratch:
            cuda.at(scratch[0], made.scratch)[:] = 0x5A
        for name in made.outputs:
            alias = made.aliases.get(name)
            assert alias is None or places[alias] == places[name]
            if alias is None:
                tensor(name).view(np.uint8).reshape(-1)[:] = 0xFF if shapes[name] else 0
        inputs = {name: tensor(name).copy() for name in made.inputs}
        arrays = {name.replace(".", "_"): array for name, array in inputs.items()}
        for name, values in made.function(**arrays).items():
            tensor(name)[...] = values

    def __del__(self) -> None:
        self._trt.cuda.calls.append("~context")


def _spoiled() -> None:
    raise AssertionError("an operation that was never captured")


_spoiled.spoils = True  # type: ignore[attr-defined]


def compiled(manifest: Manifest, variant: str, name: str, function: Function) -> Compiled:
    """An engine with the shape profiles that `edgert build` gives it for an Orin Nano."""
    spec = manifest.variants[variant].graphs[name]
    inputs = {port: manifest.tensor_of(wire) for port, wire in spec.inputs.items()}
    outputs = {port: manifest.tensor_of(wire) for port, wire in spec.outputs.items()}
    spans = profiles_of(manifest, ORIN)
    profiles = [shape_profile(profile, inputs, axes) for profile, axes in spans.items()]
    return Compiled(inputs, outputs, [p for p in profiles if p.shapes], function)


def published(manifest: Manifest, variant: str, graph: str, data: bytes, **other: Any) -> Path:
    """An engine in the cache, as `edgert build` leaves it there."""
    spec = manifest.variants[variant]
    made_for = Fingerprint(
        variant_id=spec.variant_id,
        graph=graph,
        files=manifest.hashes_of(spec.graphs[graph]),
        target=ORIN.name,
        recipe="cc" * 32,
        compiler=f"tensorrt {VERSION}",
        sm="8.7",
    )
    path = engine_path(made_for)
    write_engine(path, asdict(made_for) | other, {}, data)
    return path


def device_backend(
    manifest: Manifest,
    variant: str,
    functions: Mapping[str, Function],
    cuda: FakeCuda | None = None,
    **changes: Any,
) -> TensorRTBackend:
    """The real backend over the fakes; engines of the functions are in the cache. `changes` are
    those of every `Compiled`."""
    cuda = cuda or FakeCuda()
    trt = FakeTrt(cuda)
    for name, function in functions.items():
        data = f"engine of {name}".encode()
        made = compiled(manifest, variant, name, function)
        for key, value in changes.items():
            setattr(made, key, value)
        trt.engines[data] = made
        published(manifest, variant, name, data)
    return TensorRTBackend(trt, cuda)


def device_model(
    manifest: Manifest, variant: str, functions: Mapping[str, Function], **options: Any
) -> Model:
    bundle = Bundle(Path("fake"), manifest)
    backend = device_backend(manifest, variant, functions, **options)
    return Model(bundle, Runner(bundle, variant, backend))
