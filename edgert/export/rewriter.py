"""What makes the graphs of a precision out of those of fp32, and how they are then proved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgert.models.program import TracedGraph
from edgert.spec import Lowering


class Rewriter(Protocol):
    """One precision.

    scheme        a dataclass that says how; its text is shown, its fields are reported
    mixed         what was kept in more bits, and why, for the report
    lowerings     of the graphs that it rewrites
    state_dtypes  of the states that its graphs keep in another dtype than the program's
    rounds        what activations are rounded to as they are multiplied; None: they are not
    emulated      whether that shows only in a graph that was changed by `emulate`
    """

    scheme: Any
    mixed: dict[str, Any] | None

    @property
    def lowerings(self) -> tuple[Lowering, ...]: ...

    @property
    def state_dtypes(self) -> Mapping[str, str]: ...

    @property
    def rounds(self) -> str | None: ...

    def rewrite(self, model: ir.Model, part: TracedGraph) -> None:
        """Change a graph that was traced from this part of the program."""

    def exact(self, model: ir.Model) -> None:
        """Undo the rounding of activations in a rewritten graph: it then computes in float32 with
        the values that it stores."""

    @property
    def emulated(self) -> bool: ...

    def emulate(self, model: ir.Model) -> None:
        """Let ONNX Runtime's CPU kernels round where a device does that is made for it."""

    def tensors(self) -> Iterator[NDArray[np.generic]]:
        """What the rewritten graphs hold in place of the model's weights."""

    def applied(self) -> AbstractContextManager[None]:
        """Meanwhile the module computes with the values that the graphs store."""
