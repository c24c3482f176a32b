"""Data sets of puzzles in the published folder format: read, checked, and dealt in batches.

    identifiers.json           names of puzzle identifiers; 0 is <blank>
    {train,test}/dataset.json  what `Meta` holds
    {train,test}/all__*.npy    inputs, labels        [examples, S]
                               puzzle_identifiers    [puzzles]
                               puzzle_indices        [puzzles + 1]: puzzle k has examples [k]..[k+1]
                               group_indices         [groups + 1]: group g has puzzles [g]..[g+1]

A group is one puzzle with its augmentations: an epoch shows one of them.

Source  sapientinc/HRM @ 42410da, puzzle_dataset.py and dataset/common.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.tasks.npyfile import Array, Unsound, open_array
from edgert.tasks.puzzle import PAD
from edgert.tasks.reading import read_json, refuse_all

Split = Literal["train", "test"]
Ids = NDArray[np.int32]

IGNORED = -100
"""The label of a cell that has no part in loss and accuracy."""

SET = "all"
BLANK = "<blank>"
IDENTIFIERS, META = "identifiers.json", "dataset.json"
FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")

MAX_META = 1 << 16
MAX_IDENTIFIERS = 1 << 28  # bytes of identifiers.json; ARC with 1000 augmentations takes 3e7
MAX_NUMBER = 1 << 31
MAX_CELLS, MAX_VOCAB = 1 << 16, 1 << 16
_CHUNK = 1 << 24  # numbers that are checked at a time


@dataclass(frozen=True)
class Meta:
    """dataset.json. ignore_label_id  a label that has no part in the loss, None if there is none"""

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    mean_puzzle_examples: float
    sets: tuple[str, ...] = (SET,)


@dataclass(frozen=True)
class Batch:
    """inputs, labels int32 [B, S], identifiers int32 [B]; rows from `count` on are padding."""

    inputs: Ids
    labels: Ids
    identifiers: Ids
    count: int


@dataclass(frozen=True)
class PuzzleSet:
    """One split of a data set. The arrays are mapped from disk, not in memory."""

    meta: Meta
    inputs: Array
    labels: Array
    puzzle_identifiers: Array
    puzzle_indices: Array
    group_indices: Array

    @property
    def examples(self) -> int:
        return len(self.inputs)

    @property
    def puzzles(self) -> int:
        return len(self.puzzle_identifiers)

    @property
    def groups(self) -> int:
        return len(self.group_indices) - 1

    def batch(self, rows: NDArray[np.integer[Any]], size: int | None = None) -> Batch:
        """These examples, padded to `size` rows."""
        count = len(rows)
        puzzles = np.searchsorted(self.puzzle_indices, rows, side="right") - 1
        inputs, labels = self.inputs[rows].astype(np.int32), self.labels[rows].astype(np.int32)
        if self.meta.ignore_label_id is not None:
            labels[labels == self.meta.ignore_label_id] = IGNORED
        identifiers = self.puzzle_identifiers[puzzles].astype(np.int32)
        spare = (size or count) - count
        return Batch(
            np.pad(inputs, ((0, spare), (0, 0)), constant_values=self.meta.pad_id),
            np.pad(labels, ((0, spare), (0, 0)), constant_values=IGNORED),
            np.pad(identifiers, (0, spare), constant_values=self.meta.blank_identifier_id),
            count,
        )

    def test_batches(self, size: int) -> Iterator[Batch]:
        """All examples in order; the last batch is padded."""
        _check_size(size)
        for start in range(0, self.examples, size):
            yield self.batch(np.arange(start, min(start + size, self.examples)), size)

    def epoch(self, size: int, seed: int, iteration: int, epochs: int = 1) -> Iterator[Batch]:
        """The training batches of one iteration over the data, the same for the same arguments.

        iteration  counted from 1
        epochs     that the iteration consists of; batches go across their borders
        Raises UsageError if there is not a single full batch.
        """
        for rows in self.epoch_rows(size, seed, iteration, epochs):
            yield self.batch(rows)

    def epoch_rows(
        self, size: int, seed: int, iteration: int, epochs: int = 1
    ) -> Iterator[NDArray[np.int64]]:
        """The examples of each batch of `epoch`: to go on in mid-epoch without reading the rest.

        From each group in random order one random puzzle, of which all examples are taken in random
        order as far as the batch has room. An incomplete last batch is left out.
        """
        _check_size(size)
        if seed < 0 or iteration < 0 or epochs < 1:
            raise UsageError(
                f"seed {seed}, iteration {iteration} and {epochs} epochs make no epoch",
                do="give seed and iteration from 0 on, and at least one epoch",
            )
        rng = np.random.Generator(np.random.Philox(seed + iteration))
        order = np.concatenate([rng.permutation(self.groups) for _ in range(epochs)])
        rows: list[NDArray[np.int64]] = []
        filled = batches = 0
        for group in order.tolist():
            puzzle = rng.integers(self.group_indices[group], self.group_indices[group + 1])
            first = int(self.puzzle_indices[puzzle])
            count = int(self.puzzle_indices[puzzle + 1]) - first
            taken = min(count, size - filled)
            rows.append(first + rng.choice(count, taken, replace=False))
            filled += taken
            if filled == size:
                yield np.concatenate(rows)
                rows, filled, batches = [], 0, batches + 1
        if not batches:
            raise UsageError(
                f"{self.groups:,} groups in {epochs} epochs do not fill a batch of {size:,}",
                do="choose a smaller batch, or more epochs an iteration",
            )


def _check_size(size: int) -> None:
    if size < 1:
        raise UsageError(f"a batch of {size} rows", do="give at least 1")


def read_identifiers(root: Path) -> list[str]:
    """Names by puzzle identifier. Raises BadFile."""
    path = root / IDENTIFIERS
    names = read_json(path, MAX_IDENTIFIERS)
    violations = []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        violations.append("it is not a list of names")
    elif not names or names[0] != BLANK:
        violations.append(f"its first name is not {BLANK}")
    elif len(set(names)) != len(names):
        violations.append(f"{len(names) - len(set(names)):,} names appear more than once")
    refuse_all("not the identifiers of a data set", violations, path)
    return list(names)


def open_puzzleset(root: Path, split: Split) -> PuzzleSet:
    """A split of a data set, every offset, token and identifier checked.

    Raises BadFile that lists all violations.
    """
    folder = root / split
    meta = read_meta(folder / META)
    violations: list[str] = []
    arrays: dict[str, Array] = {}
    for name in FIELDS:
        try:
            arrays[name] = open_array(folder / f"{SET}__{name}.npy")
        except Unsound as error:
            violations.append(f"{SET}__{name}.npy: {error}")
    names = read_identifiers(root)
    if len(names) != meta.num_puzzle_identifiers:
        violations.append(
            f"num_puzzle_identifiers is {meta.num_puzzle_identifiers:,}, {IDENTIFIERS} has "
            f"{len(names):,} names"
        )
    if len(arrays) == len(FIELDS):
        found = PuzzleSet(meta, **arrays)
        violations += _violations(found)
    refuse_all("not a sound data set", violations, folder)
    return found


def _violations(data: PuzzleSet) -> list[str]:
    """What is wrong between the arrays, and between them and dataset.json."""
    meta = data.meta
    out = []
    for name, array, axes in (
        ("inputs", data.inputs, 2),
        ("labels", data.labels, 2),
        ("puzzle_identifiers", data.puzzle_identifiers, 1),
        ("puzzle_indices", data.puzzle_indices, 1),
        ("group_indices", data.group_indices, 1),
    ):
        if array.ndim != axes:
            out.append(f"{name} has {array.ndim} axes instead of {axes}")
    if out:
        return out
    for name, cells in (("inputs", data.inputs), ("labels", data.labels)):
        if cells.shape != (data.examples, meta.seq_len):
            out.append(
                f"{name} is {list(cells.shape)} instead of {[data.examples, meta.seq_len]}"
                " (examples of inputs, seq_len)"
            )
        out += _out_of_range(name, cells, meta.vocab_size, "vocab_size")
    out += _out_of_range(
        "puzzle_identifiers",
        data.puzzle_identifiers,
        meta.num_puzzle_identifiers,
        "num_puzzle_identifiers",
    )
    out += _offsets("puzzle_indices", data.puzzle_indices, data.puzzles, data.examples, "examples")
    out += _offsets("group_indices", data.group_indices, meta.total_groups, data.puzzles, "puzzles")
    mean = data.examples / data.puzzles if data.puzzles else 0.0
    if not math.isclose(meta.mean_puzzle_examples, mean, rel_tol=1e-9):
        out.append(f"mean_puzzle_examples is {meta.mean_puzzle_examples}, the arrays have {mean}")
    return out


def _out_of_range(name: str, array: Array, limit: int, what: str) -> list[str]:
    """Checked piece by piece: the array may be larger than memory."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        bad = (piece < 0) | (piece >= limit)
        if bad.any():
            at = start + int(np.argmax(bad))
            where = [int(i) for i in np.unravel_index(at, array.shape)]
            return [f"{name}{where} is {flat[at]}, {what} is {limit}"]
    return []


def _offsets(name: str, array: Array, parts: int, total: int, what: str) -> list[str]:
    if len(array) != parts + 1:
        return [f"{name} has {len(array):,} offsets, {parts + 1:,} are needed"]
    out = []
    if array[0] != 0 or array[-1] != total:
        out.append(
            f"{name} goes from {array[0]} to {array[-1]} instead of from 0 to {total} ({what})"
        )
    falls = np.flatnonzero(array[1:] <= array[:-1])
    if len(falls):
        at = int(falls[0])
        out.append(
            f"{name} does not rise from [{at}] = {array[at]} to [{at + 1}] = {array[at + 1]}"
        )
    return out


def read_meta(path: Path) -> Meta:
    """dataset.json, complete and with no other key. Raises BadFile that lists every violation."""
    content = read_json(path, MAX_META)
    violations: list[str] = []
    if not isinstance(content, dict):
        refuse_all("not the description of a data set", ["it is not an object"], path)
    unknown = sorted(ascii(key) for key in content.keys() - Meta.__dataclass_fields__.keys())
    violations += [f"unknown key {key}" for key in unknown]

    def integer(key: str, low: int, high: int = MAX_NUMBER) -> int:
        value = content.get(key)
        if type(value) is int and low <= value < high:
            return value
        violations.append(f"{key} is {_shown(value)}, not a whole number from {low} to {high - 1}")
        return low

    mean, sets = content.get("mean_puzzle_examples"), content.get("sets")
    if type(mean) not in (int, float) or not 0 <= mean < math.inf:
        violations.append(f"mean_puzzle_examples is {_shown(mean)}, not a positive number")
        mean = 0.0
    if sets != [SET]:
        violations.append(f'sets is {_shown(sets)}; only ["{SET}"] can be read')
    vocab = integer("vocab_size", 1, MAX_VOCAB + 1)
    identifiers = integer("num_puzzle_identifiers", 1)
    ignored = content.get("ignore_label_id")
    meta = Meta(
        pad_id=integer("pad_id", PAD, vocab),
        ignore_label_id=None if ignored is None else integer("ignore_label_id", 0, vocab),
        blank_identifier_id=integer("blank_identifier_id", 0, identifiers),
        vocab_size=vocab,
        seq_len=integer("seq_len", 1, MAX_CELLS + 1),
        num_puzzle_identifiers=identifiers,
        total_groups=integer("total_groups", 1),
        mean_puzzle_examples=float(mean),
    )
    refuse_all("not the description of a data set", violations, path)
    return meta


def _shown(value: object) -> str:
    text = "missing" if value is None else ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
