"""Python functions as graphs: the backend of tests and documentation.

    FakeBackend({"decode": lambda ids, lens, **state: {"token": ids + 1}})

A function takes the graph's inputs by name as numpy arrays (dots become underscores) and returns
its outputs by name; outputs it leaves out keep their buffer's content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgert.backends.base import (
    Array,
    Backend,
    Binding,
    Buffer,
    GraphSource,
    HostBuffer,
    LoadedGraph,
    host_array,
    host_zeros,
)

GraphFunction = Callable[..., Mapping[str, Array]]


class FakeBinding(Binding):
    def __init__(
        self, function: GraphFunction, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        self._function, self._inputs, self._outputs = function, inputs, outputs

    def run(self) -> None:
        arrays = {name.replace(".", "_"): b.host for name, b in self._inputs.items()}
        for name, values in self._function(**arrays).items():
            self._outputs[name].write(values)


class FakeGraph(LoadedGraph):
    def __init__(self, function: GraphFunction) -> None:
        self._function = function

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> FakeBinding:
        return FakeBinding(self._function, inputs, outputs)

    def close(self) -> None:
        pass


class FakeBackend(Backend):
    name = "fake"
    placement = "python functions"

    def __init__(self, graphs: Mapping[str, GraphFunction]) -> None:
        self.build = {"backend": self.name}
        self._graphs = graphs

    def load(self, source: GraphSource) -> FakeGraph:
        return FakeGraph(self._graphs[source.name])

    def allocate(self, dtype: str, shape: tuple[int, ...], *, shared: bool = False) -> HostBuffer:
        return HostBuffer(host_zeros(dtype, shape))

    def borrow(self, value: object, *, writes: bool = False) -> HostBuffer:
        return HostBuffer(host_array(value, writes))

    def close(self) -> None:
        pass
