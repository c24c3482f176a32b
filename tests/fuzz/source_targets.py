"""Targets of the export side: what importers and recipes read."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import (
    bytes_like,
    change_bytes,
    change_value,
    json_like,
    scalars,
    toml_text,
    values_like,
)
from target import Target, refill, through_file

Files = dict[str, bytes]


def gguf(folder: Path) -> Target:
    """A whole GGUF file: header, directory, metadata, tokenizer, weights."""
    from edgert.models.importers import load_source

    shapes = {
        "token_embd.weight": [8, 12],  # the contiguous dimension first
        "output_norm.weight": [8],
        "blk.0.attn_norm.weight": [8],
        "blk.0.attn_q.weight": [8, 8],
        "blk.0.attn_k.weight": [8, 4],
        "blk.0.attn_v.weight": [8, 4],
        "blk.0.attn_output.weight": [8, 8],
        "blk.0.ffn_norm.weight": [8],
        "blk.0.ffn_gate.weight": [8, 8],
        "blk.0.ffn_up.weight": [8, 8],
        "blk.0.ffn_down.weight": [8, 8],
    }
    keys = {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "general.alignment": 32,
        "llama.block_count": 1,
        "llama.context_length": 16,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "general.sampling.temp": 0.5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", *"abcdefg", "ab", "cd", "abcd", "<t>"],
        "tokenizer.ggml.token_type": [3] + [1] * 10 + [4],
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    table, at = [], 0
    for name, shape in shapes.items():
        table.append([name, shape, 0, at])
        at += -(-4 * int(np.prod(shape)) // 32) * 32
    body = np.random.default_rng(5).standard_normal(at // 4).astype("<f4").tobytes()

    def file(content: Any) -> bytes:
        """GGUF from [metadata, directory], whatever those have become."""
        metadata, directory = content
        head = b"GGUF" + struct.pack("<IQQ", 3, len(directory), len(metadata))
        for key, value in metadata.items():
            head += gguf_text(key) + gguf_value(value)
        for name, shape, kind, offset in directory:
            sizes = b"".join(map(unsigned, shape))
            head += gguf_text(name) + unsigned(len(shape), 4) + sizes
            head += unsigned(kind, 4) + unsigned(offset)
        return head + bytes(-len(head) % 32) + body

    def written(content: Any) -> bytes:
        try:
            return file(content)
        except (TypeError, ValueError, AttributeError, ArithmeticError):  # no header any more
            return repr(content).encode("utf-8", "replace")

    seed = file([keys, table])
    contents = values_like([[keys, table]], scalars()).map(written)
    spoiled = bytes_like([seed], hot=seed.index(body), magic=b"GGUF\3\0\0\0")
    read = through_file(folder / "model.gguf", load_source)
    return Target([seed], st.one_of(contents, spoiled), read)


def unsigned(value: Any, size: int = 8) -> bytes:
    return int(value % (1 << 8 * size)).to_bytes(size, "little")


def gguf_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return unsigned(len(data)) + data


def gguf_value(value: Any) -> bytes:
    """The type number of a metadata value, and the value."""
    if isinstance(value, bool) or value is None:
        return unsigned(7, 4) + bytes([bool(value)])
    if isinstance(value, int):
        wide = not 0 <= value < 1 << 32
        return unsigned(10 if wide else 4, 4) + unsigned(value, 8 if wide else 4)
    if isinstance(value, float):
        return unsigned(12, 4) + struct.pack("<d", value)
    if isinstance(value, str):
        return unsigned(8, 4) + gguf_text(value)
    parts = [gguf_value(item) for item in value]
    kind = parts[0][:4] if parts else unsigned(8, 4)
    return unsigned(9, 4) + kind + unsigned(len(parts)) + b"".join(part[4:] for part in parts)


def gguf_tokenizer(folder: Path) -> Target:
    """The metadata about text, as values of any type; what comes out must load at run time."""
    from edgert.models.importers import gguf_tokenizer
    from edgert.tokenizer import HFTokenizer

    alphabet = "!abcdefg\u0120\u010a"
    tokens = ["<s>", *alphabet, "ab", "cd", "abcd", "\u0120a", "<t>"]
    seeds = [
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b", "c d", "ab cd", "\u0120 a"],
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 2) + [4],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": "x",
        }
        for pre in ("gpt-2", "smollm", "llama-bpe")
    ]

    def read(keys: Any) -> None:
        found = gguf_tokenizer.read(keys, 40, "x.gguf")
        if found.json is not None:
            HFTokenizer(found.json.encode()).encode("abc def")

    # GGUF strings are UTF-8, and its top level is always a mapping.
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    leaves = st.one_of(scalars().filter(lambda v: v != "\ud800"), text)
    examples = values_like(seeds, leaves).filter(lambda value: isinstance(value, dict))
    return Target(seeds, examples, read)


def checkpoint(folder: Path) -> Target:
    """A torch.save archive: its zip, its pickle with sound checksums, and its content."""
    import torch

    from edgert.models.hagi.model import HAGI
    from edgert.models.importers import load_source
    from edgert.models.importers.common import Problems
    from edgert.models.importers.published import read_config

    config = {
        "vocab_size": 11,
        "hidden_size": 16,
        "perception_layers": 1,
        "reasoning_layers": 1,
        "expression_layers": 0,
        "use_loop": True,
        "loop_count": 2,
        "use_gdr": True,
        "transformer": {
            "hidden_size": 16,
            "num_query_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 8,
            "max_seq_len": 16,
            "rope_theta": 100.0,
            "norm_eps": 1e-5,
        },
        "grades": {"scalar": 2, "vector": 8, "bivector": 2, "trivector": 2, "residual": 2},
    }
    known, _ = read_config(config, Problems("seed"))
    generator = torch.Generator().manual_seed(9)
    state = {
        name: torch.randn(view.shape, generator=generator)
        for name, view in HAGI(known).published().items()
    }

    def saved(config: Any, state: Any, step: Any = 7) -> bytes:
        out = io.BytesIO()
        torch.save({"config": config, "model": state, "step": step}, out)
        return out.getvalue()

    seed = saved(config, state)
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))

    def archived(pickle: bytes) -> bytes:
        """An archive whose checksums fit, so that the pickle itself is read."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, pickle if name == pickled else data)
        return out.getvalue()

    @st.composite
    def content(draw: Any) -> bytes:
        other = change_value(draw, config, scalars())
        tensors: dict[Any, Any] = dict(state)
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(sorted(state)))
            change = draw(st.integers(0, 7))
            if change == 0:
                del tensors[name]
                break
            tensors[name] = [
                state[name].half(),
                state[name][..., :-1].clone(),
                torch.zeros(()).expand(draw(st.sampled_from([(8, 8), (1 << 40, 8), (1 << 62,)]))),
                state[name].to_sparse(),
                torch.full_like(state[name], float("nan")),
                draw(scalars()),
                torch.empty(4, device="meta"),
            ][change - 1]
        try:
            return saved(other, tensors, draw(scalars()))
        except UnicodeEncodeError:  # torch does not write lone surrogates as storage names
            return seed

    examples = st.one_of(
        content(),
        st.builds(archived, bytes_like([members[pickled]])),
        bytes_like([seed], magic=b"PK\3\4"),
    )
    return Target([seed], examples, through_file(folder / "step-7.pt", load_source))


def huggingface(folder: Path) -> Target:
    """A model folder: config.json, the safetensors header and what stands beside them."""
    import torch
    from safetensors.torch import save

    from edgert.models.importers import load_source

    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "default", "factor": 1.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": [0, 1],
        "_name_or_path": "someone/tiny",
    }
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.norm.weight": (8,),
        f"{block}input_layernorm.weight": (8,),
        f"{block}self_attn.q_proj.weight": (8, 8),
        f"{block}self_attn.k_proj.weight": (4, 8),
        f"{block}self_attn.v_proj.weight": (4, 8),
        f"{block}self_attn.o_proj.weight": (8, 8),
        f"{block}post_attention_layernorm.weight": (8,),
        f"{block}mlp.gate_proj.weight": (8, 8),
        f"{block}mlp.up_proj.weight": (8, 8),
        f"{block}mlp.down_proj.weight": (8, 8),
    }
    generator = torch.Generator().manual_seed(3)
    weights = save({name: torch.randn(s, generator=generator) for name, s in shapes.items()})
    size = 8 + int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8:size]), weights[size:]
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    parts: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"do_sample": True, "temperature": 0.6, "top_k": 5},
        "tokenizer_config.json": {"chat_template": templates},
        "model.safetensors.index.json": {
            "weight_map": dict.fromkeys(shapes, "model-1-of-1.safetensors")
        },
    }
    seed = {name: json.dumps(value).encode() for name, value in parts.items()}
    del seed["model.safetensors.index.json"]
    seed["model.safetensors"] = weights

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + body

    @st.composite
    def examples(draw: Any) -> Files:
        files = dict(seed)
        part = draw(st.sampled_from([*parts, "header", "weights", "template"]))
        if part == "header":
            files["model.safetensors"] = with_header(draw(json_like([header])))
        elif part == "weights":
            files["model.safetensors"] = change_bytes(draw, weights, hot=size)
        elif part == "template":
            files["chat_template.jinja"] = draw(st.binary(max_size=20))
        else:
            files[part] = draw(json_like([parts[part]]))
            if part == "model.safetensors.index.json":
                files["model-1-of-1.safetensors"] = files.pop("model.safetensors")
        return files

    def read(files: Files) -> None:
        home = folder / "folder"
        refill(home, files)
        found = load_source(home)
        (found.chat_template or "").encode()  # export writes it as UTF-8

    return Target([seed], examples(), read)


def engine_target(folder: Path) -> Target:
    """A TOML file that says what a device's compiler takes."""
    from edgert.build.target import find, names, read_target

    span = [1, 2, 3]
    tables: list[dict[str, Any]] = [
        {
            "format_version": 1,
            **{name: getattr(find(known), name) for name in _SETTINGS},
            "lowerings": list(find(known).lowerings),
            "precisions": ["fp16", "fp32"],
            "prefill": {"tokens": span, "select": span, "capacity": span},
            "step": {"batch": span, "capacity": span},
            "solve": {"batch": span},
        }
        for known in names()
    ]
    seeds = [toml_text(table) for table in tables]
    examples = st.one_of(values_like(tables, scalars()).map(toml_text), bytes_like(seeds))
    return Target(seeds, examples, through_file(folder / "target.toml", read_target))


_SETTINGS = (
    *("summary", "compiler", "version", "sm", "opset"),
    *("memory_mb", "workspace_mb", "optimization_level"),
)


def recipe(folder: Path) -> Target:
    """A TOML recipe."""
    from edgert.export.recipe import read_recipe

    tables: list[dict[str, Any]] = [
        {"format_version": 1, "source": {"path": "model.gguf"}},
        {
            "format_version": 1,
            "name": "tiny",
            "source": {
                "package": "edgert",
                "install": "edgert",
                "path": "a/model",
                "context": 512,
                "tokenizer": "tokenizer.json",
            },
            "export": {"precision": "fp32", "lowerings": ["ort", "portable"]},
            "sampling": {"temperature": 0.5, "stop": ["a"]},
        },
    ]

    seeds = [toml_text(table) for table in tables]
    digits = st.integers(1, 6000).map(lambda n: b"format_version = " + b"1" * n)
    nested = st.integers(1, 3000).map(lambda n: b"a = " + b"[" * n + b"]" * n)
    examples = st.one_of(
        values_like(tables, scalars()).map(toml_text),
        values_like(tables, scalars()).map(toml_text),
        bytes_like(seeds),
        st.sampled_from(["edgert", "os", "__main__", "None", "numpy"]).map(
            lambda name: seeds[1].replace(
                b'"package": "edgert"', b'"package": "%b"' % name.encode()
            )
        ),
        digits,
        nested,
    )
    return Target(seeds, examples, through_file(folder / "recipe.toml", read_recipe))
