"""Token shards on disk, and the sampler that draws training windows from them.

    shard_NNNNN.bin   token ids, little-endian uint16, no header; each document is followed by the
                      end token, and nothing is put before it
    sampler           numpy's default_rng(seed); for each row of a batch first the shard, then the
                      start, both uniform. Rows cross documents: attention is not masked there.

Source: ShmidtS/HAGI @ 38d26f2, prototype (data layout and sampler)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BadCheckpoint, BadFile, UsageError
from edgert.files import write_atomic

Tokens = NDArray[np.uint16]

SHARD_TOKENS = 100_000_000
LIMIT = 1 << 16  # ids are uint16
_NAME = re.compile(r"shard_\d{5}\.bin")


def write_shards(
    folder: Path, documents: Iterable[Tokens], end: int, shard_tokens: int = SHARD_TOKENS
) -> list[Path]:
    """Write documents, each with `end` behind it, to shards of about `shard_tokens` tokens.

    A document is not cut. Each shard is written whole or not at all. Raises EdgertError if the
    disk refuses.
    """
    paths: list[Path] = []
    pending: list[Tokens] = []
    size = 0

    def flush() -> None:
        nonlocal size
        path = folder / f"shard_{len(paths):05}.bin"
        chunks = [part.astype("<u2", copy=False) for part in pending]
        write_atomic(path, lambda file: [file.write(chunk.tobytes()) for chunk in chunks])
        paths.append(path)
        pending.clear()
        size = 0

    last = np.array([end], np.uint16)
    for tokens in documents:
        pending += [tokens, last]
        size += len(tokens) + 1
        if size >= shard_tokens:
            flush()
    if pending:
        flush()
    return paths


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder by number. Raises UsageError if there are none."""
    paths = sorted(p for p in folder.glob("shard_*.bin") if _NAME.fullmatch(p.name))
    if not paths:
        raise UsageError(
            "there is no shard_NNNNN.bin", where=str(folder), do="correct `shards` in [data]"
        )
    return paths


def open_shard(path: Path) -> Tokens:
    """A shard, mapped read-only. Raises BadFile if it cannot hold uint16 ids."""
    try:
        size = path.stat().st_size
        if size and size % 2 == 0:
            return np.memmap(path, "<u2", mode="r")
    except OSError as error:
        raise BadFile(f"the shard cannot be read: {error.strerror}", where=str(path)) from error
    raise BadFile(f"a shard of {size} bytes does not hold uint16 tokens", where=str(path))


class Sampler:
    """Draws batches from shards; where it stands is JSON (`state`) and can be put back."""

    def __init__(self, shards: list[Tokens], window: int, seed: int, where: str = "shards") -> None:
        short = [f"shard {i} has {len(s)}" for i, s in enumerate(shards) if len(s) < window + 2]
        if short or not shards:
            raise UsageError(
                f"a window of {window} tokens needs shards of {window + 2}: "
                + (", ".join(short[:5]) or "there are none"),
                where=where,
                do="give more text, or choose a smaller window in [train]",
            )
        self.shards, self.window = shards, window
        self.rng = np.random.default_rng(seed)

    def batch(self, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The next rows: inputs and targets, each int64 [rows, window]."""
        out = np.empty((rows, self.window + 1), np.int64)
        for row in out:
            shard = self.shards[self.rng.integers(len(self.shards))]
            start = self.rng.integers(len(shard) - self.window - 1)
            row[:] = shard[start : start + self.window + 1]
        return out[:, :-1], out[:, 1:]

    @property
    def state(self) -> dict[str, Any]:
        return rng_state(self.rng)

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken. Raises BadCheckpoint if it is not such a state."""
        set_rng_state(self.rng, state, "sampler")


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """Where a generator stands, as JSON: its integers have up to 128 bits."""
    return dict(rng.bit_generator.state)


def set_rng_state(rng: np.random.Generator, state: Any, what: str) -> None:
    """Raises BadCheckpoint, naming `what`, if numpy does not take the state back unchanged."""
    try:
        rng.bit_generator.state = state
        if rng_state(rng) == state:
            return
        reason = "it is not what numpy writes"
    except Exception as error:  # numpy checks types and sizes with whatever comes to hand
        reason = f"{type(error).__name__}"
    raise BadCheckpoint(f"the state of the {what}'s random numbers is unusable: {reason}")
