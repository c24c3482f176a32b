"""A network of random weights for 4x4 boards, which halts behind this or that segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgert.export.write import ExportOptions, export_bundle
from edgert.models.hrm.config import HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.importers.common import Imported
from edgert.tasks.sudoku import FOUR
from edgert.tasks.sudoku_make import make

DEPTH = 5
CONFIG = HRMConfig(
    *(FOUR.seq_len, FOUR.vocab_size, 32, 4, 4.0, 2, 2, 1, 1),
    pos_encodings="rope",
    halt_max_steps=DEPTH,
    puzzle_emb_ndim=32,
    num_puzzle_identifiers=6,
)
_RNG = np.random.default_rng(5)
MADE = [(made.question, made.answer) for made in (make(FOUR, _RNG) for _ in range(6))]
"""Questions and answers; each has a row of its own in the network's table."""


def random_network() -> HRM:
    drawn = torch.Generator().manual_seed(16)  # puzzles of `MADE` end behind 5, 5, 1, 5, 2 and 4
    network = HRM(CONFIG).initialize(drawn).eval().requires_grad_(False)
    network.q_head.normal_(0.0, 0.5, generator=drawn)
    network.q_bias.copy_(torch.tensor([-1.0, 1.0]))
    network.puzzle_table.normal_(0.0, 1.0, generator=drawn)
    return network


def small_bundle(network: HRM, out: Path) -> Path:
    imported = Imported(*(network, "random", None, None, None, (), {}, {}, ()), task=FOUR.name)
    export_bundle(imported, out, ExportOptions(lowerings=("ort",)))
    return out
