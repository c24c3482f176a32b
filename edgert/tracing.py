"""What a loop holds behind each iteration: for tests, for tools, and to look at a model at work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgert.backends.base import Array
from edgert.errors import UsageError
from edgert.puzzles import checked_ids, checked_rows, inputs_of
from edgert.slots import Entrance, Slots

if TYPE_CHECKING:
    from edgert.model import Model


@dataclass(frozen=True)
class TraceStep:
    """Behind one iteration of the body, by name; all copies.

    outputs  the model's results, as they would be if the loop ended here: [rows, ...]
    signals  by which a loop may end: [rows], of a decoder [rows, T]
    states   what goes round the loop, [rows, ...]; of a decoder also its states, filled to T, as
             the variant keeps them
    """

    outputs: dict[str, Array]
    signals: dict[str, Array]
    states: dict[str, Array]


def trace_puzzles(
    model: Model, puzzles: ArrayLike, number: ArrayLike, steps: int | None
) -> list[TraceStep]:
    """`steps` iterations of a model that solves, for all rows, whatever their signals say."""
    model.check_solves()
    ids = checked_ids(model, puzzles)
    rows = checked_rows(model, number, len(ids))
    count = model.runner.exit("full" if steps is None else f"fixed:{steps}").most
    slots, entrance = Slots(model.runner, max(1, len(ids))), Entrance(model.runner)
    for row in range(len(ids)):
        entrance.run(inputs_of(model, ids[row], int(rows[row])))
        slots.enter(row, entrance)
    found = []
    for _ in range(count):
        slots.advance()
        found.append(
            TraceStep(
                {name: array.copy() for name, array in slots.results().items()},
                {name: array.copy() for name, array in slots.signals.items()},
                slots.export(range(len(ids))),
            )
        )
    return found


def trace_tokens(model: Model, ids: NDArray[np.int64], steps: int | None) -> list[TraceStep]:
    """`steps` iterations over whole sequences ids int64 [B, T], all positions at once; a model
    without a loop has one."""
    runner = model.runner
    most = runner.loop.iterations if runner.loop else 1
    count = most if steps is None else steps
    if not 1 <= count <= most:
        raise UsageError(f"{count} steps of a loop of {most}", do=f"use 1 to {most}")
    batch, tokens = ids.shape
    execution = runner.open(batch=batch, tokens=tokens)
    io = execution.io(tokens, tokens)
    io.ids[:] = ids
    io.select[:] = np.arange(tokens)
    found = []
    for done in io.bound.trace(count):
        states = {
            name: execution.states.buffers[name].read(
                tuple(slice(tokens if axis == spec.axis else None) for axis in spec.shape)
            )
            for name, spec in runner.states.items()
            if spec.kind == "append"
        }
        found.append(
            TraceStep(
                {"logits": io.logits.copy(), "token": io.token.copy()},
                io.bound.held("signal", done),
                io.bound.held("value", done) | states,
            )
        )
    execution.close()
    return found
