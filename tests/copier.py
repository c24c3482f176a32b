"""A network that gives back its question: it solves what is solved already, and nothing else.

Published files of the original form. All blocks are zero, so that the state stays the embedding;
each token has an axis of its own, which the head reads. The first cell decides when it halts: a
digit at once, a blank never.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from edgert.models.hrm.config import HRMConfig
from edgert.models.hrm.model import HRM
from edgert.tasks import find

SEGMENTS = 4


def copier(folder: Path, task: str = "sudoku-4x4") -> Path:
    """A folder with `step_7`, all_config.yaml and dataset.json, for `edgert export`."""
    cells, vocab = find(task).seq_len, find(task).vocab_size
    config = HRMConfig(
        seq_len=cells,
        vocab_size=vocab,
        hidden_size=16,
        num_heads=2,
        expansion=1.0,
        h_cycles=1,
        l_cycles=1,
        h_layers=1,
        l_layers=1,
        pos_encodings="rope",
        halt_max_steps=SEGMENTS,
    )
    model = HRM(config).requires_grad_(False)
    tensors = model.published() | model.fixed()
    for tensor in tensors.values():
        tensor.zero_()
    axes = torch.eye(vocab, config.hidden_size)
    tensors["embed_tokens.embedding_weight"].copy_(axes)
    tensors["lm_head.weight"].copy_(axes)
    tensors["q_head.weight"][0] = axes[2:].sum(0) - axes[:2].sum(0)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"_orig_mod.model.inner.{name}": t.clone() for name, t in tensors.items()}
    torch.save(state, folder / "step_7")
    sizes = {"seq_len": cells, "vocab_size": vocab, "num_puzzle_identifiers": 1}
    arch = {k: v for k, v in config.published().items() if k not in sizes}
    arch["name"] = "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"
    arch["loss"]["name"] = "losses@ACTLossHead"
    (folder / "all_config.yaml").write_text(yaml.dump({"arch": arch}))
    (folder / "dataset.json").write_text(json.dumps(sizes))
    return folder
