"""Data sets of puzzles, written in the published folder format (see puzzleset.py), whole or not at
all: a folder beside the place is filled, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.files import fsync_path
from edgert.tasks.npyfile import ArrayWriter
from edgert.tasks.puzzle import PAD, Integers
from edgert.tasks.puzzleset import BLANK, IDENTIFIERS, META, SET, Meta, Split
from edgert.workshop import workshop

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PuzzleRows:
    """The examples of one puzzle: its identifier, inputs and labels [k, S]."""

    identifier: int
    inputs: Integers
    labels: Integers


Group = Sequence[PuzzleRows]
"""A puzzle and its augmentations."""


def write_puzzleset(
    out: Path,
    splits: Mapping[Split, Iterable[Group]],
    *,
    seq_len: int,
    vocab_size: int,
    identifiers: Sequence[str] = (BLANK,),
) -> None:
    """Write a data set to the new folder `out`. Groups are taken one at a time, not kept.

    Raises UsageError if `out` exists or a split has no groups, EdgertError if the disk refuses.
    """
    if os.path.lexists(out):
        raise UsageError(
            "the folder exists already", where=str(out), do="choose another, or remove it yourself"
        )
    with workshop(out, "data set") as work:
        (work / IDENTIFIERS).write_text(json.dumps(list(identifiers)))
        fsync_path(work / IDENTIFIERS)
        for split, groups in splits.items():
            _write_split(work / split, groups, seq_len, vocab_size, len(identifiers))
        fsync_path(work)
        os.rename(work, out)
        fsync_path(out.parent)


def _write_split(
    folder: Path, groups: Iterable[Group], seq_len: int, vocab_size: int, identifiers: int
) -> None:
    folder.mkdir()

    def path(name: str) -> Path:
        return folder / f"{SET}__{name}.npy"

    with ExitStack() as files:

        def writer(name: str, dtype: type[np.generic], row: tuple[int, ...] = ()) -> ArrayWriter:
            made = ArrayWriter(path(name), dtype, row)
            files.callback(made.close)
            return made

        cells = np.uint8 if vocab_size <= 256 else np.uint16
        inputs, labels = (writer(name, cells, (seq_len,)) for name in ("inputs", "labels"))
        ids = writer("puzzle_identifiers", np.int32)
        puzzles, starts = (writer(f"{name}_indices", np.int32) for name in ("puzzle", "group"))
        zero = np.zeros(1, np.int64)
        puzzles.append(zero)
        starts.append(zero)
        for group in groups:
            for puzzle in group:
                inputs.append(puzzle.inputs)
                labels.append(puzzle.labels)
                ids.append(np.array([puzzle.identifier]))
                puzzles.append(np.array([inputs.rows]))
            starts.append(np.array([ids.rows]))
    if not ids.rows:
        raise UsageError(f"the split {folder.name} has no puzzles", do="give at least one")
    meta = Meta(
        pad_id=PAD,
        ignore_label_id=PAD,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=identifiers,
        total_groups=starts.rows - 1,
        mean_puzzle_examples=inputs.rows / ids.rows,
    )
    (folder / META).write_text(json.dumps(asdict(meta)))
    fsync_path(folder / META)
    fsync_path(folder)
