"""The weights of a Llama-shaped decoder as others store them, and how many bytes a step reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edgert.errors import UsageError
from edgert.export.recipe import read_recipe
from edgert.models.decoder import Block, Decoder, DecoderConfig
from edgert.models.importers import Imported, load_source


def source_file(source: Path) -> Path:
    """What a recipe (*.toml) names as its source, or the source itself."""
    return read_recipe(source).source if source.suffix == ".toml" else source


def load(source: Path) -> Imported:
    if source.suffix == ".toml":
        recipe = read_recipe(source)
        return load_source(recipe.source, context=recipe.context, tokenizer=recipe.tokenizer)
    return load_source(source)


def write_model_folder(imported: Imported, folder: Path) -> None:
    """A decoder as transformers stores it: config.json, model.safetensors, tokenizer files."""
    from safetensors.torch import save_file

    model = imported.model
    if not isinstance(model, Decoder) or imported.tokenizer_json is None:
        raise UsageError(
            "the peers take Llama-shaped models with a tokenizer: this one "
            + ("has no tokenizer" if isinstance(model, Decoder) else "is of another architecture")
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(llama_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    eos = imported.eos[0] if imported.eos else None
    config = llama_config(model.config) | {"bos_token_id": imported.bos, "eos_token_id": eos}
    tokenizer: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text(imported.tokenizer_json)


def llama_config(c: DecoderConfig) -> dict[str, Any]:
    """The config.json of a Llama model with this decoder's geometry."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def llama_tensors(model: Decoder) -> dict[str, Tensor]:
    """The weights under their Hugging Face names, each [out, in], rotary order half-split."""
    c = model.config
    n, m = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed,
        "model.norm.weight": model.final_norm,
    }
    if model.head is not None:
        tensors["lm_head.weight"] = model.head
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = block.wqkv.T.split((n, m, m))
        gate, up = block.w_gate_up.T.chunk(2)
        parts: dict[str, Tensor] = {
            "input_layernorm": block.attn_norm,
            "self_attn.q_proj": half_split(q, c.head_size),
            "self_attn.k_proj": half_split(k, c.head_size),
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.wo.T,
            "post_attention_layernorm": block.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.w_down.T,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows of a Q or K projection [heads * d, H]: interleaved rotary order -> half-split order.

    The inverse of `edgert.models.block.interleave`.
    """
    pairs = weight.unflatten(0, (-1, head_size // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def write_float_gguf(source: Path, target: Path) -> None:
    """A GGUF file -> the same with every tensor in float32: llama.cpp's quantizer starts from it.

    Raises UsageError if `source` is another kind of file: its tokenizer is copied as it is.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize

    try:
        reader = GGUFReader(source)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"llama.cpp's side needs a GGUF file as the source ({error})", where=str(source)
        ) from error
    architecture = reader.fields["general.architecture"]
    writer = GGUFWriter(target, architecture.contents())
    for key, field in reader.fields.items():
        if key == architecture.name or key.startswith("GGUF."):
            continue
        kind = field.types[0]
        value = LlamaFileType.ALL_F32 if key == "general.file_type" else field.contents()
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, plain.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_bytes(path: Path) -> int:
    """Bytes of the tensors that a decode step reads: all, but the embedding of an untied head."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    untied = "output.weight" in sizes
    return sum(sizes.values()) - (sizes.get("token_embd.weight", 0) if untied else 0)


LOOKED_UP = {"Gather", "GatherBlockQuantized", "Reshape"}
"""Operators that read a few rows of a tensor, or none of it."""


def onnx_bytes(path: Path) -> int:
    """Bytes of the initializers of a graph that a decode step reads as a whole."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in LOOKED_UP for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in read:
            bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
            if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
                bits = 4
            total += int(np.prod(tensor.dims)) * bits // 8
    return total


def kv_values(config: DecoderConfig) -> int:
    """Numbers that a position has in the KV cache, of all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size
