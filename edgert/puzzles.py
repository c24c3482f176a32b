"""What a model that solves is given: cells, and which row of its tables belongs to each puzzle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgert.backends.base import Array
from edgert.bundle import Bundle
from edgert.errors import UsageError
from edgert.spec import resolve
from edgert.state import stored_array

if TYPE_CHECKING:
    from edgert.model import Model

BATCH = 32
"""Rows in the loop at most, unless told otherwise."""


def checked_ids(model: Model, puzzles: ArrayLike) -> NDArray[np.int32]:
    """Cells int [n, S] or [S] of puzzles -> int32 [n, S]. Raises UsageError."""
    cells, vocab = model.manifest.context, model.manifest.vocab_size
    try:
        array = np.asarray(puzzles)
    except Exception as error:  # ragged, or whatever a caller's own type can raise
        raise UsageError(f"puzzles must be [puzzles, cells]: {error}") from error
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != cells or array.dtype.kind not in "iu":
        raise UsageError(
            f"puzzles must be integers of shape [puzzles, {cells}], not {array.dtype} of "
            f"{list(array.shape)}"
        )
    if array.size and not 0 <= array.min() <= array.max() < vocab:
        raise UsageError(f"puzzles hold ids outside 0 to {vocab - 1}, the model's vocabulary")
    return array.astype(np.int32)


def checked_rows(model: Model, rows: ArrayLike, count: int) -> NDArray[np.int64]:
    """Which row of the tables belongs to each puzzle: one for all, or [n]. Raises UsageError."""
    array = np.asarray(rows)
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        raise UsageError(f"puzzle numbers must be one integer, or {count} of them")
    array = np.broadcast_to(array, (count,)).astype(np.int64)
    most = min((len(table) for table in model.tables.values()), default=1)
    if count and not 0 <= array.min() <= array.max() < most:
        raise UsageError(
            f"puzzle numbers must be from 0 to {most - 1}: the model has no others",
            do="use 0 for puzzles that the model was not trained on by number",
        )
    return array


def inputs_of(model: Model, ids: NDArray[np.int32], row: int) -> dict[str, Array]:
    """What the prologue is given for one puzzle: its cells, and its row of each table."""
    rows = {name: np.asarray(table[row]) for name, table in model.tables.items()}
    return {"ids": ids, **rows}


def open_tables(bundle: Bundle) -> dict[str, Array]:
    """Input -> its table [rows, ...], mapped from the file: only rows that are used are read.

    Raises BadBundle if a file is no such table.
    """
    inputs = bundle.manifest.inputs
    return {
        name: stored_array(
            bundle.path(file),
            "table",
            inputs[name].dtype,
            resolve(inputs[name].shape[1:], {}),
            rows=True,
        )
        for name, file in bundle.manifest.tables.items()
    }
