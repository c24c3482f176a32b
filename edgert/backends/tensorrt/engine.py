"""The calls of TensorRT's runtime: an engine, what it takes, and contexts over addresses.

The `trt` module is handed in, by somebody who has found a driver: without one, constructing a
`Runtime` can kill the process. What is used of it is in 10.3, 10.16, 11.4 alike, and a test
compares every attribute here with the recorded members of each. A variable that holds an object of
the library is called as in `HOLDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgert.backends.tensorrt.log import heard, said
from edgert.errors import DeviceFailed, Incompatible

HOLDS = {"runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext"}
"""Name of a variable -> class of the library's object that it holds."""

DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}

Shape = tuple[int, ...]
_REBUILD = "build it again:  edgert build"


@dataclass(frozen=True)
class Port:
    """A tensor that goes in or out. `alias`: the input that an output is written over, if the
    engine says so: both must then have one address. dtype: None if no model has such tensors."""

    dtype: str | None
    is_input: bool
    alias: str | None = None


@dataclass(frozen=True)
class Engine:
    """profiles: of each, the smallest, best and largest shape of every input."""

    name: str
    engine: Any
    ports: dict[str, Port]
    scratch: int
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...] = field(default_factory=tuple)

    def profile_for(self, shapes: Mapping[str, Shape]) -> int | None:
        """The shape profile that takes these inputs; of several, the one that is best nearest."""
        fitting = [
            (self._distance(profile, shapes), at)
            for at, profile in enumerate(self.profiles)
            if all(within(shapes[name], limits) for name, limits in profile.items())
        ]
        return min(fitting)[1] if fitting else None

    @staticmethod
    def _distance(
        profile: Mapping[str, tuple[Shape, Shape, Shape]], shapes: Mapping[str, Shape]
    ) -> float:
        pairs = [(name, best) for name, (_, best, _) in profile.items()]
        return sum(
            abs(math.log(max(1, size) / max(1, wanted)))
            for name, best in pairs
            for size, wanted in zip(shapes[name], best, strict=True)
        )


def within(shape: Shape, limits: tuple[Shape, Shape, Shape]) -> bool:
    """Whether a shape profile's smallest and largest shape leave room for this one."""
    low, _, high = limits
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def open_runtime(trt: Any) -> Any:
    """Only where a driver and a device have been found."""
    with heard(trt) as log:
        return trt.Runtime(log)


def load_engine(trt: Any, runtime: Any, name: str, data: bytes, where: str) -> Engine:
    """Raises Incompatible, with TensorRT's own words, for an engine that it does not take."""
    with heard(trt) as log:
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise Incompatible(
                f"TensorRT does not take the engine of graph {name!r}",
                where=said(log, where),
                do=_REBUILD,
            )
    names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
    ports = {port: _port(trt, engine, port) for port in names}
    on_host = [n for n in names if engine.get_tensor_location(n) == trt.TensorLocation.HOST]
    if on_host or None in {port.dtype for port in ports.values()}:
        raise Incompatible(
            f"the engine of graph {name!r} has tensors that edgert does not feed: "
            f"{', '.join(on_host or names)}",
            where=where,
            do=_REBUILD,
        )
    inputs = [port for port in names if ports[port].is_input]
    return Engine(
        name=name,
        engine=engine,
        ports=ports,
        scratch=int(engine.device_memory_size_v2),
        profiles=tuple(
            {port: _limits(engine.get_tensor_profile_shape(port, at)) for port in inputs}
            for at in range(engine.num_optimization_profiles)
        ),
    )


def _port(trt: Any, engine: Any, name: str) -> Port:
    dtypes = {getattr(trt.DataType, theirs): ours for ours, theirs in DTYPES.items()}
    dtype = dtypes.get(engine.get_tensor_dtype(name))
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    # From 10.15 on, with the layer that updates keys and values in place.
    aliased = None if is_input else getattr(engine, "get_aliased_input_tensor", None)
    return Port(dtype, is_input, (aliased(name) or None) if aliased else None)


def _limits(shapes: Any) -> tuple[Shape, Shape, Shape]:
    low, best, high = (tuple(int(size) for size in shape) for shape in shapes)
    return low, best, high


def new_context(
    trt: Any,
    found: Engine,
    profile: int,
    shapes: Mapping[str, Shape],
    addresses: Mapping[str, int],
    stream: int,
) -> Any:
    """A context of an engine at fixed shapes and addresses. What it computes in is given to it with
    `give_scratch`, before it is executed.

    shapes  of all ports; those of outputs are compared with what the engine makes of the inputs
    Raises Incompatible, DeviceFailed.
    """
    with heard(trt) as log:
        engine = found.engine
        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        where = f"engine of graph {found.name!r}"
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise DeviceFailed("TensorRT makes no context", where=said(log, where))
        for name, port in found.ports.items():
            if port.is_input and not context.set_input_shape(name, shapes[name]):
                raise Incompatible(
                    f"TensorRT refuses shape {shapes[name]} of {name}", where=said(log, where)
                )
        for name in found.ports:
            made = tuple(context.get_tensor_shape(name))
            if made != shapes[name]:
                raise Incompatible(
                    f"{name} is of shape {made} and its buffer of {shapes[name]}",
                    where=said(log, where),
                    do=_REBUILD,
                )
            if not context.set_tensor_address(name, addresses[name]):
                raise DeviceFailed(
                    f"TensorRT refuses the address of {name}", where=said(log, where)
                )
        return context


def give_scratch(context: Any, address: int, nbytes: int) -> None:
    context.set_device_memory(address, nbytes)


def execute(trt: Any, found: Engine, context: Any, stream: int) -> None:
    """Put one execution into the stream. Raises DeviceFailed."""
    with heard(trt) as log:
        if not context.execute_async_v3(stream):
            raise DeviceFailed(
                f"graph {found.name!r} failed in a step",
                where=said(log, f"engine of graph {found.name!r}"),
            )
