"""`config.json` of a Llama-shaped model -> `DecoderConfig`, refusing what it asks for in vain.

Keys that are known to change the mathematics are refused unless neutral, keys known to change
nothing at inference are passed over, and all others are reported to the user.

Source  huggingface/transformers, models/llama and models/mistral; both spellings of the rotary
        settings (`rope_theta` with `rope_scaling` before version 5, `rope_parameters` since)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgert.errors import UnsupportedModel
from edgert.models.decoder import DecoderConfig
from edgert.models.importers.common import (
    EPS,
    MAX_CONTEXT,
    MAX_HEAD_SIZE,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    THETA,
    Fields,
    Problems,
    choose_context,
    shown,
)

# architectures -> what transformers takes for an absent key
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"kv_heads": None, "context": 2048, "window": None},
    "MistralForCausalLM": {"kv_heads": 8, "context": 131072, "window": 4096},
}

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # key -> values that change nothing, what anything else would need
    "hidden_act": (("silu", "swish"), "only SiLU is implemented"),
    "attention_bias": ((False,), "biases are not implemented"),
    "mlp_bias": ((False,), "biases are not implemented"),
    "pretraining_tp": ((1,), "a sliced computation is not implemented"),
    "quantization_config": ((), "quantized weights are not read from safetensors"),
    "compression_config": ((), "compressed weights are not read"),
    "auto_map": ((), "the model brings its own code, which is not run"),
    "partial_rotary_factor": ((1.0, 1), "partial rotation is not implemented"),
    "rope_interleaved": ((False,), "another rotary order in the folder is not implemented"),
    "is_encoder_decoder": ((False,), "an encoder is not implemented"),
    "add_cross_attention": ((False,), "cross-attention is not implemented"),
    "attention_multiplier": ((), "another attention scale is not implemented"),
    "embedding_multiplier": ((1.0, 1), "scaled embeddings are not implemented"),
    "residual_multiplier": ((1.0, 1), "a scaled residual stream is not implemented"),
    "logits_scaling": ((1.0, 1), "scaled logits are not implemented"),
    "logit_scale": ((1.0, 1), "scaled logits are not implemented"),
    "attn_logit_softcapping": ((), "soft-capped scores are not implemented"),
    "final_logit_softcapping": ((), "soft-capped logits are not implemented"),
    "num_experts": ((0, 1), "mixtures of experts are not implemented"),
    "num_local_experts": ((0, 1), "mixtures of experts are not implemented"),
    "use_qk_norm": ((False,), "normalised queries and keys are not implemented"),
    "qk_norm": ((False,), "normalised queries and keys are not implemented"),
    "no_rope_layers": ((), "layers without rotation are not implemented"),
}
_HARMLESS = {
    # training, other runtimes, book-keeping: none of them changes the logits at inference
    *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "hidden_dropout", "resid_pdrop"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chunk_size_feed_forward"),
    *("dtype", "torch_dtype", "id2label", "label2id", "initializer_range", "is_decoder"),
    *("is_llama_config", "max_window_layers", "model_type", "output_attentions", "return_dict"),
    *("output_hidden_states", "problem_type", "transformers.js_config", "transformers_version"),
    "use_cache",
}
_SCALED = "scaled rotary positions are not implemented"


def read_config(
    raw: Mapping[str, Any], problems: Problems, context: int | None = None
) -> tuple[DecoderConfig, list[str]]:
    """`config.json` -> configuration, and the keys nobody knows.

    Raises UnsupportedModel for what is not implemented, BadCheckpoint with all problems at once.
    """
    fields = Fields(raw, problems)
    fields.seen |= _HARMLESS
    found = raw.get("architectures")
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architectures = {shown(name if isinstance(name, str) else found)}: "
            f"implemented are {', '.join(ARCHITECTURES)}",
            where=problems.where,
            do="docs/sources.md lists what is implemented",
        )
    absent = ARCHITECTURES[name]
    for key, (neutral, why) in _REFUSED.items():
        fields.refuse(key, neutral, why)
    theta, unknown = _rope(fields)
    hidden = fields.integer("hidden_size", high=MAX_WIDTH)
    heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    # mistral writes null for "as many as query heads", llama too; absent differs between them
    default = heads if "num_key_value_heads" in raw else absent["kv_heads"] or heads
    kv_heads = fields.integer("num_key_value_heads", default, high=MAX_HEADS)
    head_size = fields.integer("head_dim", hidden // heads, high=MAX_HEAD_SIZE, low=0)
    vocab = fields.integer("vocab_size", high=MAX_VOCAB)
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    intermediate = fields.integer("intermediate_size", high=MAX_WIDTH)
    published = fields.integer("max_position_embeddings", absent["context"], high=MAX_CONTEXT)
    eps = fields.number("rms_norm_eps", 1e-6, **EPS)
    tied = fields.flag("tie_word_embeddings", False)
    if "head_dim" not in fields and hidden % heads:
        problems.add(f"hidden_size {hidden} is not divisible by {heads} heads")
    if heads % kv_heads:
        problems.add(f"num_attention_heads {heads} is not divisible by {kv_heads} KV heads")
    if head_size % 2 or not head_size:
        problems.add(f"the head size {head_size} is odd or zero, rotation needs pairs")
    problems.check("config.json is wrong")
    positions = choose_context(context, published, head_size, problems.where)
    _refuse_window(fields, absent["window"], positions)
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=intermediate,
        rope_theta=theta,
        norm_eps=eps,
        context=positions,
        tied_head=tied,
    )
    return config, sorted(fields.unknown() + unknown)


def _rope(fields: Fields) -> tuple[float, list[str]]:
    """The rotary base from either spelling, and unknown keys. Refuses every kind of scaling."""
    unknown: list[str] = []
    bases = []
    for section in ("rope_parameters", "rope_scaling"):
        if section not in fields:
            fields.seen.add(section)
            continue
        rope = fields.section(section)
        for key in ("rope_type", "type"):
            rope.refuse(key, ("default",), _SCALED)
        rope.refuse("factor", (1.0, 1), _SCALED)
        rope.refuse("partial_rotary_factor", (1.0, 1), "partial rotation is not implemented")
        if "rope_theta" in rope:
            bases.append(rope.number("rope_theta", **THETA))
        rope.seen.add("rope_theta")
        unknown += rope.unknown()
    bases.append(fields.number("rope_theta", bases[0] if bases else 10000.0, **THETA))
    if len(set(bases)) > 1:
        fields.problems.add(f"two values for rope_theta: {bases[0]:g} and {bases[-1]:g}")
    return bases[0], unknown


def _refuse_window(fields: Fields, default: int | None, positions: int) -> None:
    """A window no narrower than the context is full attention; anything else is refused."""
    fields.seen |= {"layer_types", "sliding_window"}
    kinds = fields.data.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise UnsupportedModel(
            f"layer_types = {shown(kinds)}: layers without full attention are not implemented",
            where=fields.problems.where,
            do="docs/sources.md lists what is implemented",
        )
    window = fields.data.get("sliding_window", default)
    if window is None:
        return
    if type(window) is not int or window < positions:
        stated = "" if "sliding_window" in fields.data else " (what an absent key means)"
        raise UnsupportedModel(
            f"sliding_window = {shown(window)}{stated}: sliding-window attention is not "
            f"implemented, and the context of {positions} positions is longer",
            where=fields.problems.where,
            do="give a context no longer than the window",
        )
