"""What goes into each linear map on a calibration text: the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from edgert.export.methods import Moments


class _Watch(TorchFunctionMode):
    """Sees every product of an activation with a parameter, whoever computes it."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in module.named_parameters() if p.ndim == 2}
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2:
            name = self.names.get(id(args[1]))
            if name is not None:
                rows = args[0].detach().flatten(0, -2)
                moments = (rows.T @ rows).double()
                self.sums[name] = self.sums[name] + moments if name in self.sums else moments
                self.counts[name] = self.counts.get(name, 0) + len(rows)
        return func(*args, **(kwargs or {}))


_PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.nn.functional.linear)


def moments(
    module: torch.nn.Module,
    run: Callable[[NDArray[np.int64]], object],
    windows: Iterable[NDArray[np.int64]],
) -> dict[str, Moments]:
    """By parameter, the mean of x x^T over the inputs x of its linear map on windows of ids [T].

    Parameters that are only looked up in, such as an embedding without a tied head, have none.
    """
    watch = _Watch(module)
    for ids in windows:
        with torch.no_grad(), watch:
            run(ids)
    return {name: (total / watch.counts[name]).numpy() for name, total in watch.sums.items()}
