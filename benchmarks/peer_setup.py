"""The peer's side, made once and cached: its environment, and its model of the same weights.

.cache/benchmarks/<versions>/venv        ONNX Runtime GenAI, over the ONNX Runtime edgert uses
.cache/benchmarks/<versions>/<weights>   what its own builder makes, fp32 for the CPU
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgert.errors import EdgertError, UsageError
from edgert.export.recipe import read_recipe
from edgert.export.write import weights_id
from edgert.models.decoder import Block, Decoder, DecoderConfig
from edgert.models.importers import Imported, load_source

GENAI = "0.18.0"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """Where the peer's interpreter and its model are."""

    python: Path
    model: Path


def peer_environment() -> dict[str, str]:
    """Our environment variables, without those that would leak packages into the peer's."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return env | {"ORT_DISABLE_TELEMETRY": "1"}


def set_up(cache: Path, source: Path, expected: str, ort: str, say: Say) -> Peer:
    """Environment and model of the peer, from the cache or made now.

    source    GGUF file, model folder or recipe (*.toml) that the bundle was exported from
    expected  the bundle's weights_id: both sides must hold the same numbers
    ort       version of ONNX Runtime for the peer
    Raises UsageError if `source` holds other weights, EdgertError with the log of what failed.
    """
    folder = cache / f"genai-{GENAI}-ort-{ort}-py{sys.version_info[0]}.{sys.version_info[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    python = _environment(folder, ort, say)
    model = folder / f"fp32-{expected[:16]}"
    if not (model / "genai_config.json").is_file():
        _build(folder, model, python, source, expected, say)
    return Peer(python, model)


def _environment(folder: Path, ort: str, say: Say) -> Path:
    venv, stamp = folder / "venv", folder / "venv.installed"
    python = venv / "bin" / "python"
    if not stamp.is_file():
        say(f"installing onnxruntime-genai {GENAI} over onnxruntime {ort} (about 40 MB)")
        log = folder / "install.log"
        _run([sys.executable, "-m", "venv", "--clear", str(venv)], log)
        packages = [f"onnxruntime-genai=={GENAI}", f"onnxruntime=={ort}", "numpy"]
        _run([str(python), "-m", "pip", "install", *packages], log)
        stamp.touch()
    return python


def _build(folder: Path, model: Path, python: Path, source: Path, expected: str, say: Say) -> None:
    """Its own builder makes the model; it appears under its name only when it is whole."""
    say(f"building the peer's model from {source.name} (a minute)")
    imported = load(source)
    found = weights_id(imported.model)
    if found != expected:
        raise UsageError(
            f"{source} holds other weights ({found[:16]}) than the bundle ({expected[:16]})",
            do="give the source that the bundle was exported from: --source FILE",
        )
    log = folder / "build.log"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        plain, built = Path(work) / "source", Path(work) / "built"
        write_model_folder(imported, plain)
        # The builder wants torch and transformers: ours, behind the peer's own packages.
        env = {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
        builder = [str(python), "-m", "onnxruntime_genai.models.builder"]
        places = ["-i", str(plain), "-o", str(built), "-c", str(Path(work) / "cache")]
        _run([*builder, *places, "-p", "fp32", "-e", "cpu"], log, env)
        shutil.rmtree(model, ignore_errors=True)
        built.rename(model)


def _run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run with all output in a file; what failed is quoted from its end."""
    with log.open("wb") as out:
        code = subprocess.run(
            command, stdout=out, stderr=out, env=peer_environment() | dict(env or {})
        ).returncode
    if code:
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        name = " ".join(command[:4])
        raise EdgertError(
            f"{name} ... failed with code {code}:\n  " + "\n  ".join(tail), where=str(log)
        )


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
            "the peer's builder takes Llama-shaped models with a tokenizer: this one "
            + ("has no tokenizer" if isinstance(model, Decoder) else "is of another architecture")
        )
    folder.mkdir(parents=True)
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
