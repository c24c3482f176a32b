"""One graph over arrays of the caller's, without a copy: for those who bring their own loop.

    call = model.bind("prologue", {"ids": ids}, {"h": h})
    call.run()                          # h holds what the graph makes of ids

On a CPU the arrays are numpy's; on a device those of pycuda, CuPy, torch and others that say where
they are by `__cuda_array_interface__`, each in a stream of its own: a run begins when that is done.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgert.backends.base import Binding, Buffer
from edgert.errors import UsageError
from edgert.runner import Runner
from edgert.spec import TensorSpec


class Call:
    """A graph bound to arrays, which it keeps. Used by one thread at a time."""

    def __init__(
        self,
        runner: Runner,
        part: str,
        inputs: Mapping[str, object],
        outputs: Mapping[str, object],
    ) -> None:
        runner.check_open()
        if part not in runner.parts:
            raise UsageError(
                f"this model has no {part!r:.40}", do=f"choose one of: {', '.join(runner.parts)}"
            )
        spec, manifest = runner.parts[part], runner.manifest
        self._runner = runner
        axes: dict[str, int] = {}
        sides = ((inputs, spec.inputs, False), (outputs, spec.outputs, True))
        bound: list[dict[str, Buffer]] = []
        for given, wires, writes in sides:
            if given.keys() != wires.keys():
                odd = ", ".join(sorted(given.keys() ^ wires.keys()))
                raise UsageError(
                    f"{part} has other {'outputs' if writes else 'inputs'}: see {odd}",
                    do=f"give all of: {', '.join(wires)}",
                )
            found = {}
            for name, value in given.items():
                buffer = found[name] = runner.backend.borrow(value, writes=writes)
                tensor = manifest.tensor_of(wires[name], runner.variant_name)
                _check(name, buffer, tensor, axes)
            bound.append(found)
        self._binding: Binding = runner.graphs[part].bind(*bound)

    def run(self) -> None:
        """Compute; when it returns, the results are there. Values are not checked: an id beyond
        the vocabulary reads memory that is none of the model's."""
        self._runner.check_open()
        self._binding.run()
        self._runner.backend.wait()


def _check(name: str, buffer: Buffer, spec: TensorSpec, axes: dict[str, int]) -> None:
    """Raise UsageError unless it has the type and the shape that the manifest says; named axes
    have one size in all of them."""
    fits = buffer.dtype.name == spec.dtype and len(buffer.shape) == len(spec.shape)
    if fits:
        pairs = zip(spec.shape, buffer.shape, strict=True)
        fits = all(
            size == (axes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for axis, size in pairs
        )
    if not fits:
        sizes = [f"{a}={axes[a]}" if a in axes else str(a) for a in map(str, spec.shape)]
        raise UsageError(
            f"{name} is {buffer.dtype.name} {list(buffer.shape)}, the model takes {spec.dtype} "
            f"[{', '.join(sizes)}]"
        )
