"""Text that a model says itself: what its weights are rounded by.

Sampled at temperature 1, it has the model's own distribution, which no text at hand has: moments
and scales that are found on one kind of text alone serve that kind better than others. It needs no
tokenizer. (As in LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgert.backends.ort import OrtBackend
from edgert.bundle import Bundle
from edgert.export.calibration import Ids
from edgert.runner import Runner

WINDOW = 256
ROWS = 24
"""Sequences side by side: a step over them reads the weights once."""
ROUNDS = 3


def spoken(
    work: Path, variant: str, advance: Callable[[int], None] = lambda done: None
) -> list[Ids]:
    """`ROUNDS * ROWS` windows of ids [min(WINDOW, context)], always the same for a bundle and a
    machine, each behind a first token drawn evenly from the vocabulary."""
    bundle = Bundle.open(work, verify=False)
    vocabulary, length = bundle.manifest.vocab_size, min(WINDOW, bundle.manifest.context)
    generator = np.random.default_rng(0)
    found = []
    backend = OrtBackend()
    try:
        runner = Runner(bundle, variant, backend)
        execution = runner.open(batch=ROWS, tokens=length)
        io = execution.io()
        io.select[:] = 0
        for _ in range(ROUNDS):
            execution.reset()
            ids = np.empty((ROWS, length), np.int64)
            ids[:, 0] = generator.integers(vocabulary, size=ROWS)
            for place in range(length - 1):
                io.ids[:, 0] = ids[:, place]
                io.run()
                # the largest logit plus Gumbel noise is a draw from their softmax
                noise = generator.gumbel(size=(ROWS, vocabulary))
                ids[:, place + 1] = (io.logits[:, 0] + noise).argmax(-1)
            found += list(ids)
            advance(1)
        runner.close()
    finally:
        backend.close()
    return found
