"""HAGI checkpoints: what must be accepted is, what must be rejected says why."""

from __future__ import annotations

import copy
import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, cases

from edgert.errors import BadCheckpoint, EdgertError, UnsupportedModel
from edgert.models.importers import load_source

MODEL_A: Case = next(case for case in cases("hagi") if case.name == "model_a")
Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    """Model A as published, free to change."""
    return torch.load(MODEL_A.checkpoint, weights_only=True)


def save(content: object, folder: Path) -> Path:
    path = folder / "step-00000007.pt"
    torch.save(content, path)
    return path


def logits(path: Path) -> np.ndarray:
    return load_source(path).model(torch.from_numpy(MODEL_A["input_ids"])).numpy()


def test_what_the_file_says_is_kept() -> None:
    """Provenance names the file without its folder, its hash, step and rotary order."""
    imported = load_source(MODEL_A.checkpoint)
    assert imported.provenance["source"] == "hagi checkpoint"
    assert imported.provenance["file"] == "step-00001234.pt"
    assert imported.provenance["step"] == 1234
    assert imported.provenance["rotary_order"] == "interleaved"
    assert len(imported.provenance["sha256"]) == 64
    assert (imported.tokenizer_json, imported.eos, imported.notes) == (None, (), ())
    assert sum(p.numel() for p in imported.model.parameters()) == MODEL_A.meta["params"]
    assert not imported.model.training
    assert not any(p.requires_grad for p in imported.model.parameters())


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    """A checkpoint called .gguf is still a checkpoint."""
    path = tmp_path / "weights.gguf"
    path.write_bytes(MODEL_A.checkpoint.read_bytes())
    assert load_source(path).provenance["source"] == "hagi checkpoint"


def wrapped(content: Content) -> None:
    model = content["model"]
    content["model"] = OrderedDict((f"module._orig_mod.{k}", v) for k, v in model.items())


def part_wrapped(content: Content) -> None:
    model = content["model"]
    content["model"] = {
        (f"_orig_mod.module.{k}" if i % 2 else k): v for i, (k, v) in enumerate(model.items())
    }


def early_format(content: Content) -> None:
    del content["optimizer"]
    for key in ("gradient_checkpointing", "ce_chunk_size"):
        del content["config"][key]
    for key in ("geo_interaction", "gated"):
        del content["config"]["grades"][key]


def one_loop(content: Content) -> None:
    content["config"] |= {"use_loop": True, "loop_count": 1}


def ignored_loops(content: Content) -> None:
    content["config"] |= {"use_loop": False, "loop_count": 3}


def no_optional_parts(content: Content) -> None:
    del content["step"], content["model"]["lm_head.weight"], content["config"]["grades"]


def default_numbers(content: Content) -> None:
    for key in ("rope_theta", "norm_eps"):
        del content["config"]["transformer"][key]


@pytest.mark.parametrize(
    "change",
    [
        wrapped,
        part_wrapped,
        early_format,
        one_loop,
        ignored_loops,
        no_optional_parts,
        default_numbers,
    ],
)
def test_every_published_spelling_gives_the_same_logits(
    change: Callable[[Content], None], content: Content, tmp_path: Path
) -> None:
    """Optional parts and key prefixes do not change what the model computes."""
    change(content)
    assert np.array_equal(logits(save(content, tmp_path)), logits(MODEL_A.checkpoint))


def test_a_missing_step_is_zero(content: Content, tmp_path: Path) -> None:
    """Provenance still has a step."""
    del content["step"]
    assert load_source(save(content, tmp_path)).provenance["step"] == 0


def test_unknown_config_fields_are_noted(content: Content, tmp_path: Path) -> None:
    """They are named, section included, and change nothing."""
    content["config"]["lambda_iso_target"] = 0.1
    content["config"]["transformer"]["new"] = [1]
    content["config"]["grades"]["colour"] = "red"
    (note,) = load_source(save(content, tmp_path)).notes
    assert note == (
        "unknown config fields, ignored: "
        "config.grades.colour, config.lambda_iso_target, config.transformer.new"
    )


@pytest.mark.parametrize(
    ("perception", "reasoning", "expression"), [(1, 0, 2), (0, 2, 0), (3, 1, 0)]
)
def test_stages_may_be_empty(
    perception: int, reasoning: int, expression: int, content: Content, tmp_path: Path
) -> None:
    """Blocks run in stage order, and the learned bias follows perception and reasoning."""
    model = content["model"]
    block = {
        k.removeprefix("perception.0."): v
        for k, v in model.items()
        if k.startswith("perception.0.")
    }
    for key in [key for key in model if key.split(".")[0] in MODEL_STAGES]:
        del model[key]
    for stage, count in zip(MODEL_STAGES, (perception, reasoning, expression), strict=True):
        content["config"][f"{stage}_layers"] = count
        model |= {f"{stage}.{i}.{k}": v for i in range(count) for k, v in block.items()}
    config = load_source(save(content, tmp_path)).model.config
    assert config.slots == perception + reasoning + expression
    assert (config.perception_layers, config.expression_layers) == (perception, expression)


MODEL_STAGES = ("perception", "reasoning", "expression")


def test_the_context_is_a_hint_that_the_user_may_override(content: Content, tmp_path: Path) -> None:
    """The published max_seq_len sizes the rotary tables unless told otherwise."""
    path = save(content, tmp_path)
    assert load_source(path).model.cos.shape == (64, 4)
    assert load_source(path, context=200).model.cos.shape == (200, 4)


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ({"residual": 5}, "config.grades sum to"),
        ({"vector": 12, "residual": 8}, "config.grades.vector 12 is not a multiple of 8"),
        ({"scalar": 0}, "config.grades.scalar is 0, not an integer from 1"),
        ({"gated": "yes"}, "config.grades.gated is 'yes', not true or false"),
        ({"scalar_momentum": float("nan")}, "config.grades.scalar_momentum is nan"),
    ],
)
def test_contradictory_grades_are_refused(
    grades: dict[str, Any], message: str, content: Content, tmp_path: Path
) -> None:
    """Only where they are used: without GDR a stored config has grades of any sum."""
    sound = {"scalar": 4, "vector": 16, "bivector": 6, "trivector": 2, "residual": 4}
    content["config"]["grades"] = sound | grades
    if not set(grades) & {"gated", "scalar", "scalar_momentum"}:
        load_source(save(content, tmp_path))
    content["config"]["use_gdr"] = True
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        load_source(save(content, tmp_path))


@pytest.mark.parametrize(
    "key", ["gdr.grade_trunk.0.weight", "gdr.grade_head.scalar.weight", "gdr.scalar_mom_logit"]
)
def test_the_later_redesign_is_refused(key: str, content: Content, tmp_path: Path) -> None:
    """Another layout under the same names is told apart from a damaged file."""
    content["model"][key] = torch.zeros(2)
    with pytest.raises(UnsupportedModel, match="unrelated redesign"):
        load_source(save(content, tmp_path))


@dataclass
class HAGIConfig:
    """Stands for the class that very early checkpoints pickled."""

    vocab_size: int = 97


def test_a_pickled_config_class_is_refused(content: Content, tmp_path: Path) -> None:
    """Very early files need unsafe unpickling: refused, the class named, nothing executed."""
    content["config"] = HAGIConfig()
    with pytest.raises(BadCheckpoint, match=r"Python objects \(.*HAGIConfig\)") as failure:
        load_source(save(content, tmp_path))
    assert "make it a dict" in str(failure.value)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_code_in_a_checkpoint_does_not_run(content: Content, tmp_path: Path) -> None:
    """The restricted unpickler refuses it before it is called."""
    content["step"] = Bomb(str(tmp_path / "ran"))
    with pytest.raises(BadCheckpoint, match="Python objects"):
        load_source(save(content, tmp_path))
    assert not (tmp_path / "ran").exists()


def broken_weights(content: Content) -> list[str]:
    model = content["model"]
    del model["perception.0.attn.q_proj.weight"]
    model["reasoning.1.mlp.up.weight"] = torch.zeros(3, 3)
    model["extra.weight"] = torch.zeros(1)
    return [
        "perception.0.attn.q_proj.weight [32, 32] is missing",
        "reasoning.1.mlp.up.weight is [3, 3], the config wants [56, 32]",
        "1 unexpected, they do not belong to this architecture: extra.weight",
    ]


def broken_tensors(content: Content) -> list[str]:
    model = content["model"]
    model["final_norm.weight"] = model["final_norm.weight"].half()
    model["iter_embed"] = "nothing"
    model["embed.weight"] = torch.empty(97, 32, device="meta")
    model["perception.0.mlp_norm.weight"] = torch.ones(32).to_sparse()
    model["module.reasoning.0.mlp_norm.weight"] = torch.ones(32)
    model[5] = torch.ones(1)
    return [
        "model.final_norm.weight is torch.float16, not torch.float32",
        "model.iter_embed is 'nothing', not a tensor",
        "model.embed.weight is not a dense tensor with data",
        "model.perception.0.mlp_norm.weight is not a dense tensor with data",
        "model.reasoning.0.mlp_norm.weight appears twice, with different prefixes",
        "model has the key 5, not text",
    ]


def not_finite(content: Content) -> list[str]:
    model = content["model"]
    model["iter_embed"][0, 3] = float("nan")
    model["expression.0.mlp.down.weight"][0, 0] = float("inf")
    return [
        "expression.0.mlp.down.weight holds NaN or infinite values",
        "iter_embed holds NaN or infinite values",
    ]


def different_heads(content: Content) -> list[str]:
    model = content["model"]
    model["lm_head.weight"] = model["lm_head.weight"] + 1e-3
    return ["tied head: lm_head.weight differs from embed.weight"]


def misshapen_head(content: Content) -> list[str]:
    content["model"]["lm_head.weight"] = torch.zeros(5, 32)
    return ["tied head: lm_head.weight is [5, 32], the embedding is not"]


def wrong_geometry(content: Content) -> list[str]:
    content["config"]["hidden_size"] = 64
    content["config"]["transformer"] |= {"num_query_heads": 32, "num_kv_heads": 5}
    return [
        "config.hidden_size 64 and config.transformer.hidden_size 32 differ",
        "config.transformer.hidden_size 32 does not divide into 32 heads of an even size",
        "config.transformer.num_query_heads 32 is not divisible by num_kv_heads 5",
    ]


def wrong_values(content: Content) -> list[str]:
    content["config"] |= {"vocab_size": 10**12, "use_loop": 1, "perception_layers": -1}
    content["config"]["transformer"] |= {"norm_eps": float("nan"), "rope_theta": 10**400}
    content["config"]["transformer"]["intermediate_size"] = True
    content["step"] = -3
    return [
        "config.perception_layers is -1, not an integer from 0 to 1024",
        "config.transformer.intermediate_size is True, not an integer from 1 to 262144",
        "config.transformer.norm_eps is nan, not a number from 1e-12 to 1",
        "config.transformer.rope_theta is an integer of 1329 bits, not a number from 1 to 1e+12",
        "config.use_loop is 1, not true or false",
        "config.vocab_size is 1000000000000, not an integer from 1 to 4194304",
        "step is -3, not an integer from 0 to 4611686018427387904",
    ]


def cyclic_config(content: Content) -> list[str]:
    content["config"]["transformer"] = content["config"]
    content["config"]["grades"] = [content["config"]]
    return ["config.grades is a list of 1, not a mapping with text keys"]


def no_blocks(content: Content) -> list[str]:
    none = dict.fromkeys(("perception_layers", "reasoning_layers", "expression_layers"), 0)
    content["config"] |= none
    return ["config.perception_layers, reasoning_layers and expression_layers are all 0"]


def listed_config(content: Content) -> list[str]:
    content["config"] = [1, 2]
    return ["config is a list of 2, not a dict with text keys"]


def listed_model(content: Content) -> list[str]:
    content["model"] = [torch.zeros(1)]
    return ["model is a list of 1, not a state dict"]


@pytest.mark.parametrize(
    "breaking",
    [
        broken_weights,
        broken_tensors,
        not_finite,
        different_heads,
        misshapen_head,
        wrong_geometry,
        wrong_values,
        cyclic_config,
        no_blocks,
        listed_config,
        listed_model,
    ],
)
def test_all_problems_are_told_at_once(
    breaking: Callable[[Content], list[str]], content: Content, tmp_path: Path
) -> None:
    """One error lists every problem, sorted, and where the file is."""
    content = copy.deepcopy(content)  # the tied head shares its memory with the embedding
    expected = breaking(content)
    path = save(content, tmp_path)
    with pytest.raises(BadCheckpoint) as failure:
        load_source(path)
    told = [line[4:] for line in str(failure.value).splitlines() if line.startswith("  - ")]
    assert told == sorted(told)
    assert set(expected) <= set(told)
    assert failure.value.where == str(path)


def test_a_long_list_of_problems_is_cut(content: Content, tmp_path: Path) -> None:
    """An empty state dict names twenty tensors and counts the others."""
    content["model"] = {}
    with pytest.raises(BadCheckpoint, match="and 28 more"):
        load_source(save(content, tmp_path))


def test_tensors_that_outgrow_their_file_are_refused(content: Content, tmp_path: Path) -> None:
    """A huge tensor costs nothing in a file when it repeats one row: refused before allocating."""
    content["config"]["vocab_size"] = 4_000_000
    model = content["model"]
    del model["lm_head.weight"], content["optimizer"]
    model["embed.weight"] = torch.zeros(1, 32).expand(4_000_000, 32)
    with pytest.raises(BadCheckpoint, match="tensors claim 512170496 bytes in a file"):
        load_source(save(content, tmp_path))


@pytest.mark.parametrize("stored", [{"weights": 1}, [1, 2], 7, {"model": {}}, {}])
def test_another_torch_file_is_told_apart(stored: object, tmp_path: Path) -> None:
    """A torch.save file without model and config is not one of HAGI's."""
    with pytest.raises(BadCheckpoint, match="not a HAGI checkpoint: it must hold"):
        load_source(save(stored, tmp_path))


def rezipped(target: Path, *, compress: bool = False, drop: str = "", twice: str = "") -> Path:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(MODEL_A.checkpoint) as source, zipfile.ZipFile(target, "w", method) as out:
        for name in source.namelist():
            if not drop or not name.endswith(drop):
                out.writestr(name, source.read(name))
            if twice and name.endswith(twice):
                out.writestr(f"other/{twice}", source.read(name))
    return target


@pytest.mark.parametrize(
    "change", [{"compress": True}, {"drop": "data.pkl"}, {"twice": "data.pkl"}], ids=str
)
def test_a_zip_that_torch_did_not_write_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Compressed entries could hide any size; the pickle must be there once."""
    with pytest.raises(BadCheckpoint, match="not written by torch.save"):
        load_source(rezipped(tmp_path / "a.pt", **change))


def test_sizes_above_the_file_are_refused(tmp_path: Path) -> None:
    """A zip directory that claims more bytes than the file has is not followed."""
    data = bytearray(MODEL_A.checkpoint.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        directory = archive.start_dir
    for offset in (20, 24):  # compressed and plain size of the first entry
        data[directory + offset : directory + offset + 4] = (1 << 30).to_bytes(4, "little")
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="not written by torch.save"):
        load_source(path)


@pytest.mark.parametrize("kept", [4, 100, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_off_file_is_refused(kept: float, tmp_path: Path) -> None:
    """The zip directory is at the end, so every cut is found."""
    data = MODEL_A.checkpoint.read_bytes()
    path = tmp_path / "a.pt"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(BadCheckpoint, match="broken zip archive"):
        load_source(path)


def test_damage_never_escapes_as_another_error(content: Content, tmp_path: Path) -> None:
    """Random bytes overwritten: the file loads or is refused with one of our errors."""
    del content["optimizer"]
    original = save(content, tmp_path).read_bytes()
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        info = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        pickle_start, tail = info.header_offset, archive.start_dir
    random = np.random.default_rng(11)
    path = tmp_path / "damaged.pt"
    refused = 0
    for i in range(150):
        data = bytearray(original)
        low, high = (pickle_start, pickle_start + info.file_size) if i % 2 else (tail, len(data))
        for at in random.integers(low, high, size=1 + i % 4):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            load_source(path)
        except EdgertError:
            refused += 1
    assert refused > 50
