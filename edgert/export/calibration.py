"""What goes into each linear map on a calibration text: the second moments of its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from edgert.export.methods import Moments

Ids = NDArray[np.int64]
Run = Callable[[Ids], torch.Tensor]
"""Ids [T] -> logits [T, V], in eager torch."""


class Watch(TorchFunctionMode):
    """Sees every product of an activation with a parameter, whoever computes it.

    maps   names of parameters [K, N] that inputs [.., K] were multiplied with
    heads  the same of parameters [N, K]
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.maps: dict[str, None] = {}  # sets in the order of the calls
        self.heads: dict[str, None] = {}
        self._names = {id(p): name for name, p in module.named_parameters() if p.ndim == 2}

    def called(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """One product: inputs [.., K], outputs [.., N]."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) >= 2:
            name = self._names.get(id(args[1]))
            if name is not None:
                kind = self.heads if func is torch.nn.functional.linear else self.maps
                kind[name] = None
                self.called(name, args[0], found)
        return found


_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.nn.functional.linear)


@contextlib.contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile parameters take no gradients, but those that are asked to."""
    taking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


class _Moments(Watch):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def called(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2)
        moments = (rows.T @ rows).double()
        self.sums[name] = self.sums[name] + moments if name in self.sums else moments
        self.counts[name] = self.counts.get(name, 0) + len(rows)


def moments(
    module: torch.nn.Module,
    run: Callable[[Ids], object],
    windows: Iterable[Ids],
) -> dict[str, Moments]:
    """By parameter, the mean of x x^T over the inputs x of its linear map on windows of ids [T].

    Parameters that are only looked up in, such as an embedding without a tied head, have none.
    """
    watch = _Moments(module)
    for ids in windows:
        with torch.no_grad(), watch:
            run(ids)
    return {name: (total / watch.counts[name]).numpy() for name, total in watch.sums.items()}
