"""Model folders: the same numbers as transformers; what is not implemented is refused by key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close
from safetensors.torch import load_file, save_file
from tiny_llama import IDS, SIZES, logits_of, save, tiny
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM

from edgert.errors import BadCheckpoint, BadTokenizer, EdgertError, UnsupportedModel
from edgert.models.importers import load_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny untied model, free to change."""
    return save(tiny(), tmp_path / "Tiny_Model")


def edit(folder: Path, name: str = "config.json", /, **changes: Any) -> Path:
    """Set keys of a JSON file; a value of ... removes the key."""
    path = folder / name
    data = json.loads(path.read_text()) if path.exists() else {}
    data = {k: v for k, v in (data | changes).items() if v is not ...}
    path.write_text(json.dumps(data))
    return folder


def logits(folder: Path, **options: Any) -> np.ndarray:
    return load_source(folder, **options).model(IDS).numpy()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 8},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rope_theta": 1e6},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6},
    ],
    ids=str,
)
def test_same_logits_as_transformers(changes: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Head sizes, KV groups, rotary base and head, all from the folder alone."""
    model = tiny(tie_word_embeddings=tied, **changes)
    assert_close(logits(save(model, tmp_path)), logits_of(model), atol=1e-4, where="logits")


def test_same_logits_as_transformers_for_mistral(tmp_path: Path) -> None:
    """Without a sliding window the architecture is the same."""
    torch.manual_seed(5)
    sizes = {k: v for k, v in SIZES.items() if k != "rope_theta"}
    model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.mul_(8.0)
    assert_close(logits(save(model, tmp_path)), logits_of(model), atol=1e-4, where="logits")


def test_the_rotary_permutation_matters(folder: Path) -> None:
    """Weights that are taken to be interleaved already give clearly other logits."""
    want = logits(folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] = weights[name].unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert abs(logits(folder) - want).max() > 0.1


def old_spelling(folder: Path) -> Path:
    return edit(folder, rope_parameters=..., rope_theta=500.0, rope_scaling=None)


def both_spellings(folder: Path) -> Path:
    return edit(folder, rope_theta=500.0)


def old_default_scaling(folder: Path) -> Path:
    return edit(folder, rope_parameters=..., rope_theta=500, rope_scaling={"type": "default"})


@pytest.mark.parametrize("spelling", [old_spelling, both_spellings, old_default_scaling])
def test_both_rotary_spellings(spelling: Callable[[Path], Path], folder: Path) -> None:
    """transformers 5 moved the rotary settings; files of either time mean the same."""
    want = logits(folder)
    assert np.array_equal(logits(spelling(folder)), want)


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    """Rotary base 10000, eps 1e-6, KV heads = heads, untied, 2048 positions."""
    model = tiny(num_key_value_heads=4, head_dim=8, rope_theta=10000.0, rms_norm_eps=1e-6)
    folder = save(model, tmp_path)
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        edit(folder, **{key: ...})
    edit(folder, tie_word_embeddings=..., max_position_embeddings=...)
    imported = load_source(folder)
    assert imported.model.config.context == 2048
    assert_close(imported.model(IDS), logits_of(model), atol=1e-4, where="logits")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
def test_half_precision_weights_become_float32(
    dtype: torch.dtype, error: float, tmp_path: Path
) -> None:
    """The values are those of the file, exactly, computed with in float32."""
    model = tiny()
    want = logits_of(model)
    folder = save(model.to(dtype), tmp_path)
    imported = load_source(folder)
    assert {p.dtype for p in imported.model.parameters()} == {torch.float32}
    assert torch.equal(imported.model.embed, model.model.embed_tokens.weight.float())
    assert_close(imported.model(IDS), want, atol=error, where="logits")


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    """Several files with an index give the same weights; their listing is hashed."""
    sharded = save(tiny(), tmp_path / "sharded", max_shard_size="10KB")
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert np.array_equal(logits(sharded), logits(folder))
    listing = "".join(
        f"{hashlib.sha256((sharded / f).read_bytes()).hexdigest()}  {f}\n" for f in files
    )
    provenance = load_source(sharded).provenance
    assert provenance["file"] == "model.safetensors.index.json"
    assert provenance["sha256"] == hashlib.sha256(listing.encode()).hexdigest()


def test_what_the_folder_says_is_kept(folder: Path) -> None:
    """Name, ids, template, sampling, hash; unknown keys are noted, known ones are not."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 36}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", chat_template="{{ messages }}")
    edit(folder, new_idea=1, dtype="float32", _name_or_path="/srv/models/Tiny-Llama")
    edit(
        folder,
        "generation_config.json",
        eos_token_id=[7, 8, 7],
        bos_token_id=5,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.1,
    )
    imported = load_source(folder)
    assert json.loads(imported.tokenizer_json or "")["model"]["vocab"] == {"a": 0, "b": 36}
    assert imported.chat_template == "{{ messages }}"
    assert (imported.bos, imported.eos) == (5, (7, 8))
    assert imported.sampling == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "repetition_penalty": 1.1,
    }
    assert imported.name == "tiny-llama"
    assert imported.notes == ("unknown keys in config.json, ignored: new_idea",)
    weights = (folder / "model.safetensors").read_bytes()
    assert imported.provenance == {
        "source": "huggingface",
        "name": "Tiny-Llama",
        "file": "model.safetensors",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "rotary_order": "half-split, permuted at import",
    }


def test_without_the_optional_files(folder: Path) -> None:
    """No tokenizer is a note; ids come from the config; greedy models publish no sampling."""
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id=4, bos_token_id=None)
    imported = load_source(folder)
    assert imported.tokenizer_json is None
    assert imported.notes == ("the folder has no tokenizer.json: give one with --tokenizer FILE",)
    assert (imported.bos, imported.eos, imported.sampling) == (None, (4,), {})
    assert (imported.name, imported.chat_template) == ("tiny-model", None)


def test_sampling_settings_of_a_greedy_model_are_not_defaults(folder: Path) -> None:
    """temperature without do_sample is a leftover, as transformers treats it."""
    edit(folder, "generation_config.json", temperature=0.3)
    assert load_source(folder).sampling == {}


def test_a_template_file_wins(folder: Path) -> None:
    """chat_template.jinja replaces the field, as in transformers; lists have a default."""
    edit(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    )
    assert load_source(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert load_source(folder).chat_template == "file"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "x.py"}),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("sliding_window", 8),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("logits_scaling", 8.0),
        ("num_local_experts", 8),
    ],
)
def test_settings_that_change_the_mathematics_are_refused(
    key: str, value: Any, folder: Path
) -> None:
    """Not implemented means refused, by the key's name."""
    with pytest.raises(UnsupportedModel, match=f"{key} = "):
        load_source(edit(folder, **{key: value}))


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "yarn"}),
        ("rope_parameters", {"rope_theta": 500.0, "partial_rotary_factor": 0.25}),
    ],
)
def test_scaled_rotary_positions_are_refused(key: str, setting: Any, folder: Path) -> None:
    """In either spelling."""
    with pytest.raises(UnsupportedModel, match=rf"^{key}\.\w+ = "):
        load_source(edit(folder, **{key: setting}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", None),
        ("hidden_act", "swish"),
        ("sliding_window", None),
        ("sliding_window", 48),
        ("layer_types", ["full_attention", "full_attention"]),
        ("rope_interleaved", False),
        ("rope_scaling", None),
        ("torch_dtype", "bfloat16"),
    ],
)
def test_neutral_settings_are_accepted(key: str, value: Any, folder: Path) -> None:
    """A setting that changes nothing is no reason to refuse, nor one for a note."""
    assert len(load_source(edit(folder, **{key: value})).notes) == 1  # the missing tokenizer


def test_a_window_is_harmless_within_its_width(folder: Path) -> None:
    """A context no longer than the window makes it full attention."""
    want = logits(folder)
    edit(folder, sliding_window=8)
    assert np.array_equal(logits(folder, context=8), want)


def test_an_absent_window_of_mistral_is_4096(folder: Path) -> None:
    """The class default applies when the key is not there."""
    edit(folder, architectures=["MistralForCausalLM"], max_position_embeddings=8192)
    with pytest.raises(UnsupportedModel, match=r"sliding_window = 4096 \(what an absent key means"):
        load_source(folder)


@pytest.mark.parametrize(
    "architectures", [["Qwen2ForCausalLM"], ["LlamaModel"], [], None, "LlamaForCausalLM", [[]]]
)
def test_other_architectures_are_refused(architectures: Any, folder: Path) -> None:
    """The message says which are implemented."""
    with pytest.raises(UnsupportedModel, match="implemented are LlamaForCausalLM, Mistral"):
        load_source(edit(folder, architectures=architectures))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, not an integer from 1 to 4194304"),
        ({"hidden_size": "32"}, "hidden_size is '32', not an integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, not an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by 3 KV heads"),
        ({"head_dim": 7}, "the head size 7 is odd or zero"),
        ({"head_dim": ..., "num_attention_heads": 5}, "hidden_size 32 is not divisible by 5"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number from 1e-12 to 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"rope_theta": 9.0}, "two values for rope_theta: 500 and 9"),
        ({"rope_parameters": [1]}, "rope_parameters is a list of 1, not a mapping"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.up_proj.weight [64, 32] is missing"),
        ({"num_hidden_layers": 1}, "9 unexpected, they do not belong"),
        ({"intermediate_size": 65}, "down_proj.weight is [32, 64], the config wants [32, 65]"),
        ({"tie_word_embeddings": True}, "tied head: lm_head.weight differs from model.embed"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], problem: str, folder: Path
) -> None:
    """Missing, absurd, contradicting: told with the value and what it should be."""
    with pytest.raises(BadCheckpoint) as failure:
        load_source(edit(folder, **changes))
    assert problem in str(failure.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b"[1]", "config.json is a list of 1, not an object"),
        (b"\xff\xfe", "config.json cannot be read"),
        (b" " * ((16 << 20) + 1), "config.json is larger than 16777216 bytes"),
    ],
    ids=["cut", "deep", "list", "not UTF-8", "huge"],
)
def test_a_config_that_is_not_one(content: bytes, message: str, folder: Path) -> None:
    """Broken JSON ends as a BadCheckpoint."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        load_source(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eos_token_id": 37}, BadTokenizer, "eos_token_id is 37, the vocabulary has ids 0 to 36"),
        ({"bos_token_id": "x"}, BadTokenizer, "bos_token_id is 'x'"),
        ({"do_sample": True, "top_p": 1.5}, BadCheckpoint, "top_p is 1.5, not a number from 0 to"),
        ({"do_sample": True, "top_k": 0.5}, BadCheckpoint, "top_k is 0.5, not an integer"),
        ({"do_sample": True, "temperature": -1}, BadCheckpoint, "temperature is -1, not a number"),
        (
            {"do_sample": True, "repetition_penalty": 0},
            BadCheckpoint,
            "repetition_penalty is 0, not a number",
        ),
    ],
)
def test_generation_settings_are_checked(
    changes: dict[str, Any], error: type[EdgertError], message: str, folder: Path
) -> None:
    """Ids without an embedding and settings without a meaning are refused."""
    with pytest.raises(error, match=message):
        load_source(edit(folder, "generation_config.json", **changes))


@pytest.mark.parametrize("template", [7, "x" * ((1 << 20) + 1)], ids=["number", "huge"])
def test_a_template_that_is_not_text(template: Any, folder: Path) -> None:
    """Refused as a part of the tokenizer."""
    edit(folder, "tokenizer_config.json", chat_template=template)
    with pytest.raises(BadTokenizer, match="not text of at most 131072 characters"):
        load_source(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    """Only safetensors are read; the message tells how to convert."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"neither .*, only pytorch_model.bin") as failure:
        load_source(folder)
    assert "save_pretrained" in str(failure.value)


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop("lm_head.weight"), "lm_head.weight [37, 32] is missing"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.float64)}),
            "'model.norm.weight' is F64, read are F32, F16, BF16",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}),
            "1 unexpected, they do not belong to this architecture: "
            "model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda w: w["model.norm.weight"].fill_(np.nan), "model.norm.weight holds NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], problem: str, folder: Path
) -> None:
    """Told by name."""
    with pytest.raises(BadCheckpoint) as failure:
        load_source(reweighted(folder, change))
    assert problem in str(failure.value)


def test_stored_rotary_frequencies_are_passed_over(folder: Path) -> None:
    """Old files hold what the config implies."""
    want = logits(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    reweighted(folder, lambda w: w.update({name: torch.ones(8)}))
    assert np.array_equal(logits(folder), want)


def index(folder: Path, mapping: Any) -> Path:
    """Replace the weights by an index over a.safetensors, which holds them all."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return edit(folder, "model.safetensors.index.json", weight_map=mapping)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "x/a.safetensors", "a\\b.safetensors", "..", "a.bin", 3]
    + ["a\n.safetensors"],
)
def test_an_index_cannot_leave_the_folder(name: Any, folder: Path) -> None:
    """Shards have plain names with the right ending."""
    with pytest.raises(BadCheckpoint, match=r"not a plain \*.safetensors file name"):
        load_source(index(folder, {"model.norm.weight": name}))


def test_an_index_must_be_whole(folder: Path) -> None:
    """Missing shards, no mapping, tensors told twice."""
    index(folder, {"x": "a.safetensors", "y": "gone.safetensors"})
    with pytest.raises(BadCheckpoint, match=r"files of the index are missing: gone.safetensors"):
        load_source(folder)
    edit(folder, "model.safetensors.index.json", weight_map=[])
    with pytest.raises(BadCheckpoint, match="weight_map is a list of 0"):
        load_source(folder)
    names = {str(i): f"{i}.safetensors" for i in range(1025)}
    edit(folder, "model.safetensors.index.json", weight_map=names)
    with pytest.raises(BadCheckpoint, match=r"names 1025 files \(limit 1024\)"):
        load_source(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    both = {"x": "a.safetensors", "y": "b.safetensors"}
    edit(folder, "model.safetensors.index.json", weight_map=both)
    with pytest.raises(BadCheckpoint, match=r"'lm_head.weight' is in two files"):
        load_source(folder)


def test_links_must_stay_in_the_folder(folder: Path, tmp_path: Path) -> None:
    """A template that is a link to somebody's file would be copied into the bundle."""
    (tmp_path / "secret").write_text("secret")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(BadCheckpoint, match="chat_template.jinja is a link that leads out"):
        load_source(folder)


def test_a_hub_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    """The layout of huggingface_hub's cache; the name is that of the model, not the revision."""
    home = tmp_path / "models--Owner--Tiny-Model"
    blobs, snapshot = home / "blobs", home / "snapshots" / "0a1b2c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert load_source(snapshot).name == "tiny-model"


def test_damage_never_escapes_as_another_error(folder: Path) -> None:
    """Random bytes of the safetensors header overwritten, and cuts: loads or is refused."""
    path = folder / "model.safetensors"
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    random = np.random.default_rng(23)
    refused = 0
    for i in range(120):
        data = bytearray(original)
        data[int(random.integers(header))] = random.integers(256)
        path.write_bytes(data if i % 4 else data[: random.integers(len(data))])
        try:
            load_source(folder)
        except EdgertError:
            refused += 1
    assert refused > 60
