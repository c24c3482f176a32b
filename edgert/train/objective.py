"""The seam between the loop and what is learnt: a family's kind decides the rest.

    Source     draws batches; where it stands is JSON
    Objective  makes the loss of a micro-batch, and keeps what goes from one step to the next
    Material   what a run trains on, on disk, and how well a model does on what was held out
    Figures    the outcome of that, for the log, the card and result.json

Text is in text.py, puzzles are in grids.py; kinds.py is the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """What a Trainer asks. One object belongs to one model in training."""

    loss: nn.Module
    """What `Workers.accumulating` takes: the module that the losses come from."""

    unit: str
    """What is counted in, such as "tokens"."""

    @property
    def per_step(self) -> int:
        """Units a step, of all processes together."""
        ...

    def loss_of(self, step: int, micro: int) -> Tensor:
        """The loss of micro-batch `micro` of this step, a mean over this process's rows."""
        ...

    def rate(self, step: int, peak: float) -> float:
        """The scheduled learning rate of a step, counted from 0, whose highest is `peak`."""
        ...

    def update(self, step: int) -> None:
        """Move what the optimizer does not: once a step, behind it."""
        ...

    def figures(self) -> dict[str, float | None]:
        """What the last step shows beside its loss, for a line of the log."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What goes from step to step, float32, by 'carry.<name>'. All processes call it."""
        ...

    def state(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], where: str) -> None:
        """Take back what `tensors` and `state` gave. Raises BadCheckpoint."""
        ...


class Figures(Protocol):
    """How well a model does on what was held out."""

    def to_json(self) -> dict[str, Any]: ...

    def logged(self) -> dict[str, Any]:
        """For a line of metrics.jsonl."""
        ...

    def said(self) -> str:
        """For a line on the terminal."""
        ...

    def card(self) -> list[tuple[str, str]]:
        """Labelled rows for the end of a run."""
        ...

    def warnings(self) -> list[str]:
        """What the user must know: a collapsed model."""
        ...


class Material(Protocol):
    """What a run trains on, opened and checked."""

    record: dict[str, Any]
    """What checkpoints say of the data."""

    per: str
    """What a loss is of, such as "nats a token"."""

    evaluation: dict[str, int]
    """How it evaluates, for checkpoints."""

    @property
    def held_out(self) -> str:
        """In words, how much is held out."""
        ...

    def source(self) -> Any:
        """What an Objective draws batches from, at its beginning."""
        ...

    def identity(self) -> dict[str, Any]:
        """The fields of a Snapshot that say what the model's tokens mean."""
        ...

    def evaluate(self, model: Any, whole: bool) -> Figures | None:
        """Of the model, in eval mode: on some of what was held out, or on the whole of it with all
        baselines. None if nothing was."""
        ...

    def baseline(self, found: Any) -> float | None:
        """The loss of the baseline of `evaluate`, if it has one."""
        ...
