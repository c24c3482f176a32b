"""GGUF files of the llama architecture -> `Decoder`, tokenizer and chat template.

llama.cpp's converter stores Q and K rows in interleaved rotary order, which is ours: they are used
as they are. Quantized tensors are dequantized to float32 by the `gguf` package.

Sources  ggml-org/ggml, docs/gguf.md; ggml-org/llama.cpp, gguf-py/gguf/{constants,quants}.py and
         LlamaModel.permute in convert_hf_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, MissingDependency, UnsupportedModel
from edgert.models.decoder import DecoderConfig
from edgert.models.importers import gguf_tokenizer
from edgert.models.importers.assemble import (
    Names,
    build,
    compare_shapes,
    expected_shapes,
    numbered,
)
from edgert.models.importers.assets import sampling_defaults
from edgert.models.importers.common import (
    EPS,
    INTERLEAVED,
    MAX_CONTEXT,
    MAX_HEAD_SIZE,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    THETA,
    Fields,
    Imported,
    Problems,
    Progress,
    choose_context,
    named,
    sha256,
    shown,
    slug,
)
from edgert.models.importers.gguf_file import GGUFFile, Stored

# Each of them has a test that compares its values.
TYPES = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
}

_PARTS = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # key -> values that change nothing, what anything else would need
    "rope.scaling.type": (("none",), "scaled rotary positions are not implemented"),
    "rope.scaling.factor": ((1.0,), "scaled rotary positions are not implemented"),
    "rope.scaling.attn_factor": ((1.0,), "scaled rotary positions are not implemented"),
    "rope.scaling.yarn_log_multiplier": ((0.0,), "scaled rotary positions are not implemented"),
    "rope.scale_linear": ((1.0,), "scaled rotary positions are not implemented"),
    "attention.sliding_window": ((0,), "sliding-window attention is not implemented"),
    "attention.causal": ((True,), "attention that sees later tokens is not implemented"),
    "attention.clamp_kqv": ((0.0,), "clamped projections are not implemented"),
    "attention.max_alibi_bias": ((0.0,), "ALiBi is not implemented"),
    "attention.scale": ((), "another attention scale is not implemented"),
    "attention.temperature_scale": ((0.0,), "another attention scale is not implemented"),
    "attn_logit_softcapping": ((0.0,), "soft-capped scores are not implemented"),
    "final_logit_softcapping": ((0.0,), "soft-capped logits are not implemented"),
    "logit_scale": ((0.0, 1.0), "scaled logits are not implemented"),
    "residual_scale": ((0.0, 1.0), "a scaled residual stream is not implemented"),
    "embedding_scale": ((0.0, 1.0), "scaled embeddings are not implemented"),
    "use_parallel_residual": ((False,), "parallel residuals are not implemented"),
    "expert_count": ((0,), "mixtures of experts are not implemented"),
    "expert_used_count": ((0,), "mixtures of experts are not implemented"),
}
_HARMLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def load(path: Path, *, context: int | None, progress: Progress | None) -> Imported:
    """Read one GGUF file. Raises BadCheckpoint, UnsupportedModel, MissingDependency."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingDependency(
            "gguf", "export", why="it reads the tensors of GGUF files"
        ) from error

    type_names = {int(kind): kind.name for kind in GGMLQuantizationType}
    sizes = {int(k): size for k, size in GGML_QUANT_SIZES.items() if type_names[int(k)] in TYPES}
    with GGUFFile(path, sizes, type_names) as file:
        return _import(file, context, progress)


def _import(file: GGUFFile, context: int | None, progress: Progress | None) -> Imported:
    where = str(file.path)
    problems = Problems(where)
    architecture = file.keys.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"general.architecture is {shown(architecture)}; "
            "of GGUF files only 'llama' is implemented",
            where=where,
            do="docs/sources.md lists what is implemented",
        )
    config, unknown = _config(file, problems, context)
    names = Names(
        embed="token_embd.weight",
        final_norm="output_norm.weight",
        head="output.weight",
        blocks=numbered((f"blk.{i}." for i in range(config.num_layers)), _PARTS),
    )
    _refuse_tensors(file)
    weights = _Dequantized(file)
    compare_shapes(
        expected_shapes(config, names), weights.shapes(), names.embed, names.head, problems
    )
    problems.check("the tensors do not fit the metadata")
    tokens = gguf_tokenizer.read(file.keys, config.vocab_size, where)
    sampling = _sampling(file.keys, problems)
    problems.check("the metadata is wrong")
    model = build(config, names, weights, problems, progress)
    problems.check("the weights are unusable")

    general = Fields(file.keys, Problems(where))  # descriptions: a wrong type is no reason to fail
    title = general.text("general.name")
    base, size = general.text("general.basename"), general.text("general.size_label")
    provenance = {
        "source": "gguf",
        "file": file.path.name,
        "sha256": sha256(file.path),
        "rotary_order": INTERLEAVED,
        "tensor_types": weights.types(),
        "name": title,
        "license": general.text("general.license"),
    }
    notes = list(tokens.notes)
    if unknown:
        notes.append(f"unknown metadata, ignored: {named(unknown)}")
    return Imported(
        model=model,
        name=slug(f"{base}-{size}" if base and size else title, file.path.stem),
        tokenizer_json=tokens.json,
        chat_template=tokens.chat_template,
        bos=tokens.bos,
        eos=tokens.eos,
        sampling=sampling,
        provenance={key: value for key, value in provenance.items() if value is not None},
        notes=tuple(notes),
    )


def _config(
    file: GGUFFile, problems: Problems, context: int | None
) -> tuple[DecoderConfig, list[str]]:
    """The `llama.*` keys -> configuration, and the keys nobody knows."""
    keys = {k[len("llama.") :]: v for k, v in file.keys.items() if k.startswith("llama.")}
    fields = Fields(keys, problems, "llama.")
    for key, (neutral, why) in _REFUSED.items():
        fields.refuse(key, neutral, why)
    fields.seen |= _HARMLESS
    for key in keys:
        if key.startswith("rope.scaling.") and key not in fields.seen:
            fields.refuse(key, (), "scaled rotary positions are not implemented")
    hidden = fields.integer("embedding_length", high=MAX_WIDTH)
    heads = fields.integer("attention.head_count", high=MAX_HEADS)
    kv_heads = fields.integer("attention.head_count_kv", heads, high=MAX_HEADS)
    layers = fields.integer("block_count", high=MAX_LAYERS)
    intermediate = fields.integer("feed_forward_length", high=MAX_WIDTH)
    published = fields.integer("context_length", high=MAX_CONTEXT)
    theta = fields.number("rope.freq_base", 10000.0, **THETA)
    eps = fields.number("attention.layer_norm_rms_epsilon", **EPS)
    divided = hidden // heads
    key_size = fields.integer("attention.key_length", divided, high=MAX_HEAD_SIZE, low=0)
    value_size = fields.integer("attention.value_length", divided, high=MAX_HEAD_SIZE, low=0)
    rotated = fields.integer("rope.dimension_count", key_size, high=MAX_HEAD_SIZE, low=0)
    if "attention.key_length" not in fields and hidden % heads:
        problems.add(f"llama.embedding_length {hidden} is not divisible by {heads} heads")
    if heads % kv_heads:
        problems.add(f"{heads} query heads are not divisible by {kv_heads} KV heads")
    if key_size % 2 or not key_size:
        problems.add(f"the head size {key_size} is odd or zero, rotation needs pairs")
    embedding = file.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding else 1
    stated = fields.integer("vocab_size", vocab, high=MAX_VOCAB)
    if stated != vocab:
        problems.add(f"llama.vocab_size is {stated}, token_embd.weight has {vocab} rows")
    problems.check("the metadata is wrong")
    if not key_size == value_size == rotated:
        raise UnsupportedModel(
            f"llama.attention.key_length {key_size}, llama.attention.value_length {value_size} and "
            f"llama.rope.dimension_count {rotated} differ: one head size for all is implemented",
            where=str(file.path),
            do="docs/sources.md lists what is implemented",
        )
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=key_size,
        intermediate_size=intermediate,
        rope_theta=theta,
        norm_eps=eps,
        context=choose_context(context, published, key_size, str(file.path)),
        tied_head="output.weight" not in file.tensors,
    )
    return config, fields.unknown()


def _refuse_tensors(file: GGUFFile) -> None:
    """Tensors that stand for an operation this decoder does not have."""
    for name in sorted(file.tensors):
        reason = None
        if name == "rope_freqs.weight":
            reason = "rotary frequencies of its own (scaled rotary positions)"
        elif name.endswith(".bias"):
            reason = "a bias"
        elif "_exps." in name or ".ffn_gate_inp." in name:
            reason = "a mixture of experts"
        elif name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
            reason = "normalised queries and keys"
        if reason:
            raise UnsupportedModel(
                f"the tensor {name} brings {reason}, which is not implemented",
                where=str(file.path),
                do="docs/sources.md lists what is implemented",
            )


def _sampling(keys: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    published = {name: keys[key] for key, name in _SAMPLING.items() if key in keys}
    return sampling_defaults(Fields(published, problems, "general.sampling: "))


class _Dequantized:
    """The tensors of a GGUF file as float32."""

    def __init__(self, file: GGUFFile) -> None:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        self.file, self.kinds, self.dequantize = file, GGMLQuantizationType, dequantize

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.file.tensors.items()}

    def types(self) -> list[str]:
        """Names of the tensor types present, the most frequent first."""
        kinds = [tensor.kind for tensor in self.file.tensors.values()]
        return [self.kinds(k).name for k in sorted(set(kinds), key=lambda k: (-kinds.count(k), k))]

    def read(self, name: str) -> Tensor:
        tensor: Stored = self.file.tensors[name]
        data = self.file.bytes_of(tensor).reshape(*tensor.shape[:-1], -1)
        # A broken scale overflows here; the check for finite values reports it by name.
        with np.errstate(all="ignore"):
            values = self.dequantize(data, self.kinds(tensor.kind))
        if values.shape != tensor.shape:
            raise BadCheckpoint(
                f"tensor {name} dequantizes to {list(values.shape)}, not {list(tensor.shape)}",
                where=str(self.file.path),
            )
        return torch.from_numpy(np.array(values, dtype=np.float32))
