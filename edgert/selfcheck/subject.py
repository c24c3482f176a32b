"""What a self-check feeds: the same tokens or puzzles on every machine, for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.backends import lowerings
from edgert.bench.plan import Plan, make_work
from edgert.bundle import Bundle
from edgert.model import Model, load
from edgert.tokenizer import load_tokenizer

TOKENS = 40
"""Read by a model that decodes; a quarter of its context at most."""
PUZZLES = 12
SEED = 20261126


@dataclass(frozen=True)
class Subject:
    """A bundle, where it runs, and what it is given.

    variant   the one that sessions and times are taken of
    inputs    token ids [T], or cells [n, S] of a model that solves
    """

    path: Path
    bundle: Bundle
    device: str
    threads: int
    prepack: bool
    variant: str
    inputs: NDArray[np.int64]

    @property
    def solves(self) -> bool:
        return self.bundle.manifest.solves

    @property
    def variants(self) -> list[str]:
        """All that this device runs, the chosen one first."""
        runs = lowerings(self.device)
        found = [n for n, v in self.bundle.manifest.variants.items() if v.lowering in runs]
        return sorted(found, key=lambda name: name != self.variant)

    def unrolled(self, variant: str) -> bool:
        """Whether its loop is unrolled, so that nothing can end early."""
        program = self.bundle.manifest.program
        return program.loop is not None and self.bundle.manifest.parts(variant)["body"] is None

    @contextmanager
    def model(self, variant: str | None = None) -> Iterator[Model]:
        """A variant, loaded; one at a time, since two may be more than a board holds."""
        chosen = variant or self.variant
        options: dict[str, Any] = {"threads": self.threads, "prepack": self.prepack}
        with load(self.path, self.device, variant=chosen, **options) as model:
            yield model


def inputs_of(bundle: Bundle) -> NDArray[np.int64]:
    """Of a decoder the bench's text, or drawn ids; of a solver puzzles that are made here, where
    its task is one that edgert can make, else drawn cells."""
    manifest = bundle.manifest
    if manifest.solves:
        return _puzzles(manifest.task, manifest.context, manifest.vocab_size)
    spec = manifest.tokenizer
    file = bundle.path(spec.file) if spec and spec.file else None
    tokens = max(2, min(TOKENS, manifest.context // 4))
    plan = Plan(n_prompt=tokens, n_gen=1)
    work = make_work(plan, manifest, load_tokenizer(spec, file) if spec else None)
    return np.asarray(work.ids, np.int64)


def _puzzles(name: str | None, cells: int, vocab: int) -> NDArray[np.int64]:
    from edgert.tasks import find
    from edgert.tasks.sudoku import Sudoku
    from edgert.tasks.sudoku_make import make

    rng = np.random.default_rng(SEED)
    task = find(name) if name else None
    if isinstance(task, Sudoku):
        return np.array([make(task, rng).question for _ in range(PUZZLES)], np.int64)
    return rng.integers(1, vocab, (PUZZLES, cells))
