"""A tiny random Llama in the formats that importers read, written by the formats' own libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def tiny(**changes: Any) -> LlamaForCausalLM:
    """Random weights wide enough that no part of the model is silent."""
    sizes = SIZES | changes
    theta = sizes.pop("rope_theta")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **rope)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(21)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


def save(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    with quiet():
        model.save_pretrained(folder, **options)
    return folder


def logits_of(model: LlamaForCausalLM) -> npt.NDArray[np.float32]:
    return model(IDS).logits.numpy()


def permuted(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """What llama.cpp's converter does to Q and K (LlamaModel.permute, convert_hf_to_gguf.py)."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_tensors(model: LlamaForCausalLM, *, permute: bool = True) -> dict[str, npt.NDArray[Any]]:
    """The weights as llama.cpp's converter names and orders them."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    out = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        array = tensor.numpy().copy()
        for part, count in heads.items():
            if part in name and permute:
                array = permuted(array, count)
        out[f"blk.{layer}.{GGUF_NAMES[rest]}" if layer.isdigit() else GGUF_NAMES[name]] = array
    return out


def gguf_keys(model: LlamaForCausalLM) -> dict[str, Any]:
    c = model.config
    return {
        "general.name": "Tiny Llama",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "llama.vocab_size": c.vocab_size,
    }


def write_gguf(
    path: Path,
    tensors: dict[str, npt.NDArray[Any]],
    keys: dict[str, Any],
    *,
    kind: str = "F32",
    architecture: str = "llama",
) -> Path:
    """Matrices in the given type, vectors in F32; keys of value None are left out."""
    writer = GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    for name, array in tensors.items():
        stored = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(name, array.astype(np.float32 if stored == 0 else np.float16))
        else:
            writer.add_tensor(name, quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
