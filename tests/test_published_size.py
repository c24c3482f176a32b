"""Model A at its published size, with random weights: exact counts, and the path to an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edgert
from edgert.cli import main
from edgert.models.importers import load_source

VOCAB, HIDDEN, LAYERS, INTERMEDIATE, KV = 49152, 768, 12, 2048, 256


def checkpoint(folder: Path) -> Path:
    """A file as the published training run writes it, without the optimizer."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) * 0.02

    state: dict[str, Any] = {
        "iter_embed": matrix(1, HIDDEN),
        "embed.weight": matrix(VOCAB, HIDDEN),
        "final_norm.weight": torch.ones(HIDDEN),
    }
    state["lm_head.weight"] = state["embed.weight"]
    for stage in ("perception", "reasoning", "expression"):
        for layer in range(LAYERS // 3):
            block = f"{stage}.{layer}"
            state |= {
                f"{block}.attn_norm.weight": torch.ones(HIDDEN),
                f"{block}.attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
                f"{block}.attn.k_proj.weight": matrix(KV, HIDDEN),
                f"{block}.attn.v_proj.weight": matrix(KV, HIDDEN),
                f"{block}.attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
                f"{block}.mlp_norm.weight": torch.ones(HIDDEN),
                f"{block}.mlp.gate.weight": matrix(INTERMEDIATE, HIDDEN),
                f"{block}.mlp.up.weight": matrix(INTERMEDIATE, HIDDEN),
                f"{block}.mlp.down.weight": matrix(HIDDEN, INTERMEDIATE),
            }
    transformer = {
        "hidden_size": HIDDEN,
        "num_query_heads": 12,
        "num_kv_heads": 4,
        "intermediate_size": INTERMEDIATE,
        "rope_theta": 10000.0,
        "norm_eps": 1e-6,
        "max_seq_len": 4096,
    }
    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "loop_count": 1,
        "use_loop": False,
        "use_gdr": False,
        "transformer": transformer,
        "grades": {},
    }
    path = folder / "step-00003815.pt"
    torch.save({"model": state, "step": 3815, "config": config}, path)
    return path


@pytest.mark.full
def test_model_a_of_published_size_exports_and_answers(tmp_path):
    """113,266,176 parameters, stored once; both lowerings pass the gate; greedy equals eager."""
    source = checkpoint(tmp_path)
    bundle = tmp_path / "model-a"
    assert main(["export", str(source), "-o", str(bundle), "--quiet"]) == 0
    with edgert.load(bundle) as model:
        assert model.manifest.parameters == 113_266_176
        weights = model.manifest.files["variants/fp32/weights.data"].bytes
        assert weights < 1.01 * 4 * 113_266_176
        result = model.generate([504, 3575, 282], max_tokens=4)
    eager = load_source(source).model
    ids = [504, 3575, 282]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(eager(torch.tensor([ids]))[0, -1].argmax()))
    assert list(result.tokens) == ids[3:]
