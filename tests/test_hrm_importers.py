"""HRM checkpoints: what must be accepted is, what must be rejected says why."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, cases
from torch import Tensor

from edgert.errors import BadCheckpoint, EdgertError, UnsupportedModel, UsageError
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.config import HRMConfig
from edgert.models.hrm.model import HRM
from edgert.models.importers.common import Problems
from edgert.models.importers.hrm import ImportedHRM, is_hrm, read_hrm
from edgert.models.importers.hrm_config import read_bidir_config, read_config
from edgert.models.importers.hrm_file import unpickle

CASES: dict[str, Case] = {case.name: case for case in cases("hrm")}
ROPE, LEARNED = CASES["orig_rope_puzzle"], CASES["orig_learned_nopuzzle"]
B1, B2 = CASES["bidir_base"], CASES["bidir_cycle"]
HAGI = next(case for case in cases("hagi") if case.name == "model_a")
PREFIX = "_orig_mod.model.inner."
SEQ_LEN = ROPE.meta["config"]["seq_len"]
Content = dict[str, Any]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A1's checkpoint in a folder of its own, with its config and a dataset.json beside it."""
    shutil.copy(ROPE.folder / "all_config.yaml", tmp_path)
    shutil.copy(ROPE.checkpoint, tmp_path)
    stated = {k: ROPE.meta["config"][k] for k in ("seq_len", "vocab_size")}
    stated |= {"num_puzzle_identifiers": 7, "pad_id": 0, "sets": ["all"]}
    (tmp_path / "dataset.json").write_text(json.dumps(stated))
    return tmp_path / ROPE.checkpoint.name


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    shutil.copy(LEARNED.folder / "all_config.yaml", tmp_path)
    shutil.copy(LEARNED.checkpoint, tmp_path)
    return tmp_path / LEARNED.checkpoint.name


def load(path: Path) -> Content:
    content: Content = torch.load(path, weights_only=True)
    return content


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def change(path: Path, change: Callable[[Content], object]) -> Path:
    """The file again, with its content changed; memory is its own, for the file may be mapped."""
    content = {key: value.clone() for key, value in load(path).items()}
    change(content)
    path.unlink()
    return save(content, path)


def edit(path: Path, old: str, new: str) -> Path:
    """all_config.yaml beside a checkpoint, with one text replaced."""
    config = path.parent / "all_config.yaml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    return path


def weights(source: ImportedHRM | HRM | Bidir) -> dict[str, Tensor]:
    model = source.model if isinstance(source, ImportedHRM) else source
    return model.published() | model.fixed()


def same(a: ImportedHRM, b: ImportedHRM) -> bool:
    mine, theirs = weights(a), weights(b)
    equal = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return set(mine) == set(theirs) and equal and a.model.config == b.model.config


def problems(error: EdgertError) -> list[str]:
    told = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
    assert told == sorted(told)
    return told


@pytest.mark.parametrize(
    ("case", "kind", "variant", "step"),
    [
        (ROPE, HRM, "A1", 1234),
        (LEARNED, HRM, "A2", 1234),
        (B1, Bidir, "B1", 500),
        (B2, Bidir, "B2", 10000),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_file_says_is_kept(case: Case, kind: type, variant: str, step: int) -> None:
    """Provenance names the file without its folder, its hash, variant and step."""
    found = read_hrm(case.checkpoint, settings={"seq_len": 19}, variant=variant)
    assert found.name == f"hrm-{variant.lower()}"
    assert isinstance(found.model, kind)
    assert found.provenance["file"] == case.checkpoint.name
    assert (found.provenance["variant"], found.provenance["step"]) == (variant, step)
    assert len(found.provenance["sha256"]) == 64
    assert found.provenance.get("rotary_order") == ("half-split" if variant == "A1" else None)
    assert json.loads(json.dumps(found.provenance)) == found.provenance
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    for name, stored in load_any(case).items():
        assert torch.equal(weights(found)[name], stored), name


def load_any(case: Case) -> dict[str, Tensor]:
    content = unpickle(case.checkpoint)
    state = content.get("model_state_dict", content)
    return {name.rpartition("inner.")[2]: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["", "inner.", "model.inner.", "module.model.inner.", "_orig_mod.module.model.inner."]
)
def test_every_prefix_gives_the_same_network(prefix: str, original: Path) -> None:
    """Compiled, wrapped or plain: names mean what is behind their prefix."""
    before = read_hrm(original)

    def renamed(content: Content) -> None:
        stripped = {name.removeprefix(PREFIX): value for name, value in content.items()}
        content.clear()
        content |= {prefix + name: value for name, value in stripped.items()}

    assert same(read_hrm(change(original, renamed)), before)


def test_prefixes_may_not_make_one_name_twice(original: Path) -> None:
    def twice(content: Content) -> None:
        content["model.inner.q_head.bias"] = torch.zeros(2)

    with pytest.raises(BadCheckpoint, match="q_head.bias appears twice, with different prefixes"):
        read_hrm(change(original, twice))


def test_bf16_initial_states_become_float32(original: Path) -> None:
    """Published files have them in what the trainer computed in; all else must be float32."""

    def half(content: Content) -> None:
        content[f"{PREFIX}H_init"] = content[f"{PREFIX}H_init"].bfloat16()
        content[f"{PREFIX}L_init"] = content[f"{PREFIX}L_init"].bfloat16()

    before = weights(read_hrm(original))
    after = weights(read_hrm(change(original, half)))
    for name in ("H_init", "L_init"):
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name].bfloat16().float())


def test_the_dataset_tells_what_the_config_does_not(original: Path, tmp_path: Path) -> None:
    """Beside the checkpoint, as a file, or in a dataset's folder."""
    found = read_hrm(original)
    assert isinstance(found.model, HRM)
    assert found.model.config.seq_len == SEQ_LEN
    assert found.notes == ()
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (original.parent / "dataset.json").rename(folder / "train" / "dataset.json")
    assert same(read_hrm(original, dataset=folder), found)
    assert same(read_hrm(original, dataset=folder / "train" / "dataset.json"), found)
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        read_hrm(original, dataset=tmp_path / "other")


def test_without_a_dataset_the_shapes_tell_the_rest(original: Path) -> None:
    """But for S with rotary positions: it is asked for."""
    before = read_hrm(original)
    (original.parent / "dataset.json").unlink()
    with pytest.raises(BadCheckpoint) as failure:
        read_hrm(original)
    assert problems(failure.value) == ["config.seq_len is missing"]
    assert "dataset.json" in (failure.value.do or "")
    after = read_hrm(original, settings={"seq_len": SEQ_LEN})
    assert same(after, before)
    (note,) = after.notes
    assert note == "taken from the shapes of the weights: num_puzzle_identifiers, vocab_size"


def test_learned_positions_tell_the_length(learned: Path) -> None:
    found = read_hrm(learned)
    assert isinstance(found.model, HRM)
    assert found.model.config.seq_len == LEARNED.meta["config"]["seq_len"]


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("width", [0, 3, 8, 20])
@pytest.mark.parametrize("expansion", [1.0, 70.0])
def test_other_sizes_are_read_from_their_shapes(
    positions: Any, width: int, expansion: float, tmp_path: Path
) -> None:
    """Without a dataset, from a config that tells only what shapes do not."""
    config = HRMConfig(
        seq_len=5,
        vocab_size=4,
        hidden_size=8,
        num_heads=2,
        expansion=expansion,
        h_cycles=1,
        l_cycles=3,
        h_layers=2,
        l_layers=3,
        pos_encodings=positions,
        halt_max_steps=1,
        puzzle_emb_ndim=width,
        num_puzzle_identifiers=3 if width else 1,
        forward_dtype="float32",
    )
    model = HRM(config).initialize(torch.Generator().manual_seed(0))
    path = save({f"model.inner.{k}": v for k, v in weights(model).items()}, tmp_path / "step_7")
    (tmp_path / "all_config.yaml").write_text(
        "arch: {num_heads: 2, H_cycles: 1, L_cycles: 3, halt_max_steps: 1, "
        "halt_exploration_prob: 0.1, loss: {loss_type: stablemax_cross_entropy}, "
        "forward_dtype: float32}"
    )
    found = read_hrm(path, settings={} if positions == "learned" else {"seq_len": 5})
    assert isinstance(found.model, HRM)
    mine = found.model.config
    assert mine.intermediate_size == config.intermediate_size
    assert replace(mine, expansion=expansion) == config
    assert all(torch.equal(weights(found.model)[k], v) for k, v in weights(model).items())


@pytest.mark.parametrize(
    "line",
    [
        *("hidden_size: 32", "H_layers: 2", "L_layers: 1", "puzzle_emb_ndim: 40"),
        *("expansion: 4.0", "pos_encodings: rope"),
        *("rms_norm_eps: 1.0e-05", "rope_theta: 10000.0"),
    ],
)
def test_what_shapes_and_defaults_tell_may_be_missing(line: str, original: Path) -> None:
    """The network is the same; an expansion has any value of the same width."""
    before = read_hrm(original)
    after = read_hrm(edit(original, f"  {line}\n", ""))
    assert isinstance(before.model, HRM)
    assert isinstance(after.model, HRM)
    mine, theirs = after.model.config, before.model.config
    assert mine.intermediate_size == theirs.intermediate_size
    if "expansion" not in line:
        assert mine == theirs
    kept, wanted = weights(after), weights(before)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "field",
    [
        *("num_heads: 4", "H_cycles: 2", "L_cycles: 2", "halt_max_steps: 5"),
        *("halt_exploration_prob: 0.0", "loss_type: stablemax_cross_entropy"),
    ],
)
def test_what_nothing_else_tells_may_not_be_missing(field: str, original: Path) -> None:
    name = field.partition(":")[0]
    edit(original, f"{field}\n", "\n" if name != "loss_type" else "other: 1\n")
    with pytest.raises(BadCheckpoint, match=rf"config\.(loss\.)?{name} is missing"):
        read_hrm(original)


def test_settings_stand_in_for_the_files(original: Path) -> None:
    """Without any file beside it, a checkpoint is read with what the user says."""
    before = read_hrm(original)
    (original.parent / "all_config.yaml").unlink()
    (original.parent / "dataset.json").unlink()
    with pytest.raises(BadCheckpoint) as failure:
        read_hrm(original)
    missing = ("H_cycles", "L_cycles", "halt_exploration_prob", "halt_max_steps", "loss")
    assert set(problems(failure.value)) >= {f"config.{name} is missing" for name in missing}
    given = {k: v for k, v in before.model.config.published().items() if k != "loss"}
    with pytest.raises(BadCheckpoint, match="config.loss is missing"):
        read_hrm(original, settings=given)
    (original.parent / "all_config.yaml").write_text(
        "arch: {loss: {loss_type: stablemax_cross_entropy}}"
    )
    assert same(read_hrm(original, settings=given), before)
    raised = read_hrm(original, settings=given | {"halt_max_steps": 9})
    assert raised.model.config.published()["halt_max_steps"] == 9
    with pytest.raises(UsageError, match="unknown settings: seqlen"):
        read_hrm(original, settings={"seqlen": 3})


@pytest.mark.parametrize("case", [ROPE, LEARNED, B1, B2], ids=lambda case: case.name)
def test_a_config_comes_back_from_its_published_form(case: Case) -> None:
    """Nothing is lost, and nothing is unknown."""
    config = read_hrm(case.checkpoint, settings={"seq_len": 19}).model.config
    back = read_config if case in (ROPE, LEARNED) else read_bidir_config
    again, unknown = back(config.published(), Problems("here"))
    assert again == config
    assert unknown == []


def test_unknown_config_fields_are_noted(original: Path) -> None:
    """Section included; they change nothing, as in the published code."""
    edit(original, "  hidden_size: 32\n", "  hidden_size: 32\n  causal: false\n")
    edit(original, "beta1: 0.9\n", "beta1: 0.9\nbeta3: 0.9\n")
    (note,) = read_hrm(original).notes
    assert note == "unknown config fields, ignored: config.causal, beta3"


def test_another_activation_type_is_noted(original: Path) -> None:
    (note,) = read_hrm(edit(original, "float32", "bfloat16")).notes
    assert note == "the published network computes in bfloat16, this in float32"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rope\n", "alibi\n", "config.pos_encodings is 'alibi', known are: rope, learned"),
        ("stablemax_cross", "hinge", "config.loss.loss_type is 'hinge_entropy', known are"),
        ("num_heads: 4", "num_heads: 5", "hidden_size 32 does not divide into 5 heads"),
        ("num_heads: 4", "num_heads: 32", "does not divide into 32 heads of an even size"),
        ("num_heads: 4", "num_heads: true", "config.num_heads is True, not an integer"),
        ("H_cycles: 2", "H_cycles: 0", "config.H_cycles is 0, not an integer from 1 to 1024"),
        ("H_cycles: 2", "H_cycles: 1024", "blocks in a segment, at most 2048"),
        ("1.0e-05", ".nan", "config.rms_norm_eps is nan, not a number"),
        ("expansion: 4.0", "expansion: 1e-3", "config.expansion is '1e-3', not a number"),
        ("expansion: 4.0", "expansion: 0.001", "leaves a gated layer without a column"),
        ("float32", "int8", "config.forward_dtype is 'int8'"),
        ("hidden_size: 32", "hidden_size: 99999999", "config.hidden_size is 99999999, not"),
        ("halt_max_steps: 5", "halt_max_steps: [1]", "config.halt_max_steps is a list of 1"),
    ],
)
def test_contradictory_configs_are_refused(
    old: str, new: str, message: str, original: Path
) -> None:
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        read_hrm(edit(original, old, new))


def test_another_network_is_refused_by_its_name(original: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config.name = 'hrm.trm@Tiny'"):
        read_hrm(edit(original, "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", "hrm.trm@Tiny"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch: [1, 2]", "arch is a list of 2, not a mapping"),
        ("lr: 1", "arch is None, not a mapping"),
        ("[1, 2]", "all_config.yaml is a list of 2"),
        ("1: 2", "not a mapping with text keys"),
        ("a: &a [1]\nb: *a", "it has aliases"),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}", "it has aliases"),
        ("arch: !!python/object/apply:os.system ['true']", "not a plain YAML file"),
        ("a: [", "not a plain YAML file"),
        ("[" * 50_000, "more than 8 levels"),
        ("- " * 30_000, "more than 8 levels"),
        ("? " * 30_000, "more than 8 levels"),
        ("a: 2001-99-99", "not a plain YAML file"),
        ("a" * (1 << 19), "is larger than"),
        ("a: \x00", "not a plain YAML file"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_yaml_file_is_refused(text: str, message: str, original: Path) -> None:
    """Plain values alone, and no more of them than the file has bytes."""
    (original.parent / "all_config.yaml").write_text(text)
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        read_hrm(original)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "dataset.json is a list of 0, not an object"),
        ("{", "dataset.json is not JSON"),
        ("[" * 60_000, "dataset.json is not JSON"),
        (" " * (1 << 19), "is larger than"),
        ('{"seq_len": 1e9}', "config.seq_len is 1000000000.0, not an integer"),
        ('{"seq_len": 25, "vocab_size": 12}', "[7, 32], the config wants [12, 32]"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_dataset_is_refused(text: str, message: str, original: Path) -> None:
    (original.parent / "dataset.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        read_hrm(original)


def broken_weights(content: Content) -> list[str]:
    del content[f"{PREFIX}lm_head.weight"]
    content[f"{PREFIX}H_level.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    content[f"{PREFIX}puzzle_emb.weights"] = torch.zeros(7)
    content[f"{PREFIX}L_level.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(96)
    return [
        "1 unexpected, they do not belong to this architecture: "
        "L_level.layers.0.self_attn.qkv_proj.bias",
        "H_level.layers.1.mlp.down_proj.weight is [3, 3], the config wants [32, 256]",
        "lm_head.weight [7, 32] is missing",
        "puzzle_emb.weights is [7], the config wants [7, 40]",
    ]


def broken_tensors(content: Content) -> list[str]:
    content[f"{PREFIX}q_head.bias"] = torch.zeros(2, dtype=torch.float64)
    content[f"{PREFIX}H_init"] = "nothing"
    content[f"{PREFIX}q_head.weight"] = torch.empty(2, 32, device="meta")
    content[f"{PREFIX}L_init"] = torch.ones(32).to_sparse()
    content[5] = torch.ones(1)  # type: ignore[index]
    return [
        "H_init is 'nothing', not a tensor",
        "L_init is not a dense tensor with data",
        "q_head.bias is torch.float64, not torch.float32",
        "q_head.weight is not a dense tensor with data",
        "the state dict has the key 5, not text",
    ]


def not_finite(content: Content) -> list[str]:
    content[f"{PREFIX}L_init"][3] = float("nan")
    content[f"{PREFIX}puzzle_emb.weights"][1, 1] = float("-inf")
    content[f"{PREFIX}lm_head.weight"][0, 0] = float("inf")
    return [
        f"{name} holds NaN or infinite values"
        for name in ("L_init", "lm_head.weight", "puzzle_emb.weights")
    ]


@pytest.mark.parametrize("breaking", [broken_weights, broken_tensors, not_finite])
def test_all_problems_are_told_at_once(
    breaking: Callable[[Content], list[str]], original: Path
) -> None:
    """One error lists every problem, sorted, and where the file is."""
    expected: list[str] = []
    change(original, lambda content: expected.extend(breaking(content)))
    with pytest.raises(BadCheckpoint) as failure:
        read_hrm(original)
    assert problems(failure.value) == expected
    assert failure.value.where == str(original)


@pytest.mark.parametrize("name", ["embed_tokens.embedding_weight", "puzzle_emb.weights"])
def test_tensors_that_outgrow_their_file_are_refused(name: str, original: Path) -> None:
    """A huge tensor costs nothing in a file when it repeats one row: refused before allocating."""

    def grown(content: Content) -> None:
        width = content[PREFIX + name].shape[1]
        content[PREFIX + name] = torch.zeros(1, width).expand(4_000_000, width)
        if name.startswith("embed"):
            content[f"{PREFIX}lm_head.weight"] = content[PREFIX + name]

    (original.parent / "dataset.json").write_text(json.dumps({"seq_len": SEQ_LEN}))
    with pytest.raises(BadCheckpoint, match=r"tensors claim \d+ bytes in a file of \d+"):
        read_hrm(change(original, grown))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("case", [ROPE, B1, B2], ids=lambda case: case.name)
def test_code_in_a_checkpoint_does_not_run(case: Case, tmp_path: Path) -> None:
    """The restricted unpickler refuses it before it is called, beside NumPy scalars too."""
    content = dict(unpickle(case.checkpoint)) | {"metrics": {"a": np.float64(1.0)}}
    content["bomb"] = Bomb(tmp_path / "ran")
    with pytest.raises(BadCheckpoint, match=r"Python objects \(.*open\)"):
        read_hrm(save(content, tmp_path / "a.pt"))
    assert not (tmp_path / "ran").exists()


def test_numpy_scalars_are_read_as_plain_floats() -> None:
    """And only while this file is read: nothing stays allowed behind it."""
    metrics = unpickle(B2.checkpoint)["metrics"]
    before = torch.serialization.get_safe_globals()  # torch adds some of its own at the first load
    unpickle(B2.checkpoint)
    assert metrics
    assert {type(value) for value in metrics.values()} <= {float, int, bool}
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(B2.checkpoint, weights_only=True)


def test_the_value_of_a_numpy_scalar_is_kept(tmp_path: Path) -> None:
    values = [0.1, -0.0, 1e-310, float("inf")]
    path = save({"a": [np.float64(v) for v in values]}, tmp_path / "a.pt")
    found = unpickle(path)["a"]
    assert [repr(v) for v in found] == [repr(v) for v in values]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.float32(1.0), "a NumPy dtype"),
        (np.int64(1), "a NumPy dtype"),
        (np.dtype("V1000000000"), "a NumPy dtype"),
        (np.dtype(">f8"), "not a little-endian float64"),
        (np.dtype("O"), "a NumPy dtype"),
        (np.zeros(2), "_reconstruct"),
    ],
    ids=repr,
)
def test_no_other_numpy_object_is_read(stored: Any, message: str, tmp_path: Path) -> None:
    """An array, or a dtype of any size, is more than a metric needs."""
    content = dict(unpickle(B2.checkpoint)) | {"metrics": {"a": stored}}
    with pytest.raises(BadCheckpoint, match=f"Python objects.*{message}"):
        read_hrm(save(content, tmp_path / "a.pt"))


class Crooked:
    """NumPy's scalar with arguments of the file's choice."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return type(np.float64(0)).__reduce__(np.float64(0))[0], self.args


@pytest.mark.parametrize(
    "args",
    [(), (np.dtype("f8"),), (np.dtype("f8"), "text"), (None, b"12345678"), (1, 2, 3)],
    ids=repr,
)
def test_a_crooked_scalar_is_refused(args: tuple[Any, ...], tmp_path: Path) -> None:
    path = save({"metrics": Crooked(*args)}, tmp_path / "a.pt")
    with pytest.raises(BadCheckpoint, match="a NumPy scalar that is not a float64"):
        read_hrm(path)


@pytest.fixture(params=[B1, B2], ids=lambda case: case.name)
def bidirectional(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    return case


def test_a_bare_state_dict_needs_its_heads(bidirectional: Case, tmp_path: Path) -> None:
    """All else is in the shapes, or as published."""
    before = read_hrm(bidirectional.checkpoint, settings={"seq_len": 900})
    state = dict(unpickle(bidirectional.checkpoint)["model_state_dict"])
    path = save(OrderedDict((f"_orig_mod.{k}", v) for k, v in state.items()), tmp_path / "a.pt")
    with pytest.raises(BadCheckpoint) as failure:
        read_hrm(path)
    assert problems(failure.value) == ["config.num_heads is missing"]
    config = before.model.config
    given = {"num_heads": config.num_heads}
    if bidirectional is B1:
        given["max_cycles"] = config.published()["max_cycles"]
    after = read_hrm(path, settings=given)
    assert same(after, before)
    assert after.provenance["step"] == 0


def test_the_cycles_of_a_bare_b1_are_noted(tmp_path: Path) -> None:
    path = save(dict(unpickle(B1.checkpoint)["model_state_dict"]), tmp_path / "a.pt")
    found = read_hrm(path, settings={"num_heads": 4, "seq_len": 9})
    assert found.model.config.published()["max_cycles"] == 8
    assert found.notes == ("max_cycles is not in the file: 8, as published",)


@pytest.mark.parametrize("key", ["global_step", "scheduler_state_dict", "metrics", "best_val_loss"])
def test_older_writers_omit_things(key: str, tmp_path: Path) -> None:
    content = dict(unpickle(B1.checkpoint))
    del content[key]
    found = read_hrm(save(content, tmp_path / "a.pt"))
    assert same(found, read_hrm(B1.checkpoint))
    assert found.provenance["step"] == (0 if key == "global_step" else 500)


def gated(state: Content) -> str:
    state["halt_gate"] = torch.tensor(0.1)
    return "halt_gate: the halting logit is scaled"


def sequential(state: Content) -> str:
    d = state["h_to_l.weight"].shape[0]
    del state["halt_predictor.weight"], state["halt_predictor.bias"]
    state |= {
        "halt_predictor.0.weight": torch.zeros(d, 2 * d),
        "halt_predictor.0.bias": torch.zeros(d),
    }
    state |= {"halt_predictor.3.weight": torch.zeros(1, d), "halt_predictor.3.bias": torch.zeros(1)}
    return "halt_predictor.0.bias, halt_predictor.0.weight, halt_predictor.3.bias"


def reads_the_cycle(state: Content) -> str:
    d = state["h_to_l.weight"].shape[0]
    state["halt_predictor.weight"] = torch.zeros(1, 2 * d + 1)
    return "a halting head that reads the cycle"


@pytest.mark.parametrize("change", [gated, sequential, reads_the_cycle])
@pytest.mark.parametrize("bare", [False, True])
def test_other_meanings_of_the_same_names_are_refused(
    change: Callable[[Content], str], bare: bool, bidirectional: Case, tmp_path: Path
) -> None:
    """Told apart from a damaged file, by names and shapes alone."""
    content = dict(unpickle(bidirectional.checkpoint))
    state = dict(content["model_state_dict"])
    message = change(state)
    stored = state if bare else content | {"model_state_dict": state}
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        read_hrm(save(stored, tmp_path / "a.pt"))


def test_weights_of_b1_are_not_read_as_b2(tmp_path: Path) -> None:
    """A random cycle embedding would make another network of them."""
    with pytest.raises(BadCheckpoint, match="weights of B1: they have no cycle_embedding.weight"):
        read_hrm(B1.checkpoint, variant="B2")
    content = dict(unpickle(B2.checkpoint))
    assert "run_id" in content  # only the trainer of B2 writes it
    state = dict(content["model_state_dict"])
    del state["cycle_embedding.weight"]
    with pytest.raises(BadCheckpoint, match="B2 with a random one is another network"):
        read_hrm(save(content | {"model_state_dict": state}, tmp_path / "a.pt"))


def test_another_variant_than_wanted_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="the file holds B2, not B1"):
        read_hrm(B2.checkpoint, variant="B1")
    with pytest.raises(BadCheckpoint, match="the file holds A2, not A1"):
        read_hrm(LEARNED.checkpoint, variant="A1")
    with pytest.raises(UsageError, match="variant 'C' is not one of A1, A2, B1, B2"):
        read_hrm(B2.checkpoint, variant="C")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 7}, "config.hidden_size 24 does not divide into 7 heads"),
        ({"max_cycles": 0}, "config.max_cycles is 0, not an integer from 1 to 1024"),
        ({"dropout": 1.0}, "config.dropout is 1.0, not a number"),
        ({"seq_len": 5001}, "config.seq_len 5001 is above 5000 positions"),
        ({"num_l_layers": 2}, "l_layers.1.linear1.weight [96, 24] is missing"),
        ({"cycle_embedding": "yes"}, "config.cycle_embedding is 'yes', not true or false"),
        ({"num_h_layers": 1023}, "layers in all cycles, at most 2048"),
        ({3: 1}, "config is a dict of 12, not a dict with text keys"),
    ],
)
def test_wrong_bidirectional_configs_are_refused(
    changes: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    content = dict(unpickle(B1.checkpoint))
    content["config"] = dict(content["config"]) | changes
    with pytest.raises(BadCheckpoint, match=re.escape(message)):
        read_hrm(save(content, tmp_path / "a.pt"))


def test_an_option_of_ours_is_kept_in_the_config(tmp_path: Path) -> None:
    """Off for published files."""
    content = dict(unpickle(B1.checkpoint))
    assert read_hrm(B1.checkpoint).model.config.published()["reinject_input"] is False
    content["config"] = dict(content["config"]) | {"reinject_input": True}
    found = read_hrm(save(content, tmp_path / "a.pt")).model.config
    assert found.published()["reinject_input"] is True


@pytest.mark.parametrize("stored", [[1, 2], 7, {}, {"model": {}}, {"weight": torch.zeros(2)}])
def test_another_torch_file_is_told_apart(stored: object, tmp_path: Path) -> None:
    path = save(stored, tmp_path / "a.pt")
    assert not is_hrm(path)
    with pytest.raises(BadCheckpoint, match="not an HRM checkpoint"):
        read_hrm(path)


@pytest.mark.parametrize("case", [ROPE, LEARNED, B1, B2], ids=lambda case: case.name)
def test_the_content_decides_and_not_the_name(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(case.checkpoint.read_bytes())
    assert is_hrm(path)
    if case in (B1, B2):
        assert same(read_hrm(path), read_hrm(case.checkpoint))


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_whose_entry_is_not_all_there_is_not_claimed(
    packed: bool, tmp_path: Path
) -> None:
    """The directory says more bytes than the file has; or bytes that are not what they unpack to,
    which torch never writes. Found by fuzzing."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"H_level.layers.")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    if packed:
        data[entry + 10] = zipfile.ZIP_DEFLATED
    else:
        data[entry + 20 : entry + 28] = (5_000).to_bytes(4, "little") * 2
    path.write_bytes(data)
    assert not is_hrm(path)


def test_what_is_not_hrm_is_not_claimed(tmp_path: Path) -> None:
    assert not is_hrm(HAGI.checkpoint)
    assert not is_hrm(tmp_path)
    assert not is_hrm(tmp_path / "missing")
    (tmp_path / "text").write_text("H_level.layers.")
    assert not is_hrm(tmp_path / "text")
    with pytest.raises(UsageError, match="there is no file"):
        read_hrm(tmp_path / "missing")
    with pytest.raises(BadCheckpoint, match="no file step_<n> in this folder"):
        read_hrm(tmp_path)


def test_the_newest_checkpoint_of_a_folder_is_read(original: Path) -> None:
    """Dumps of predictions have the same beginning, and are not checkpoints."""
    folder = original.parent
    shutil.copy(ROPE.folder / "step_1238", folder)
    (folder / "step_9999_all_preds.0").write_bytes(b"")
    assert is_hrm(folder)
    assert read_hrm(folder).provenance["step"] == 1238
    (folder / "all_config.yaml").unlink()
    assert not is_hrm(folder)


def test_a_puzzle_table_may_be_written_without_changing_the_file(original: Path) -> None:
    """It stays in the file until then."""
    before = original.read_bytes()
    model = read_hrm(original).model
    assert isinstance(model, HRM)
    assert model.puzzle_table is not None
    model.puzzle_table.fill_(1.0)
    assert original.read_bytes() == before


@pytest.mark.parametrize("kept", [4, 100, 0.5, 0.999])
def test_a_cut_off_file_is_refused(kept: float, original: Path) -> None:
    data = original.read_bytes()
    original.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    assert not is_hrm(original)
    with pytest.raises(BadCheckpoint, match="broken zip archive"):
        read_hrm(original)


@pytest.mark.parametrize("case", [ROPE, B2], ids=lambda case: case.name)
def test_damage_never_escapes_as_another_error(case: Case, tmp_path: Path) -> None:
    """Random bytes overwritten, in the pickle or the config: one of our errors, or it loads."""
    path, config = tmp_path / "a.pt", tmp_path / "all_config.yaml"
    content = dict(unpickle(case.checkpoint))
    content.pop("optimizer_state_dict", None)
    original = save(content, path).read_bytes()
    yaml = (ROPE.folder / "all_config.yaml").read_bytes()
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        info = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl")))
        low, high = info.header_offset, info.header_offset + info.file_size
    random = np.random.default_rng(5)
    refused = 0
    for i in range(150):
        data, text = bytearray(original), bytearray(yaml)
        if i % 3 and case is ROPE:
            for at in random.integers(0, len(text), size=1 + i % 4):
                text[at] = random.integers(256)
        else:
            for at in random.integers(low, high, size=1 + i % 4):
                data[at] = random.integers(256)
        path.write_bytes(data)
        config.write_bytes(text)
        is_hrm(path)
        try:
            read_hrm(path, settings={"seq_len": SEQ_LEN})
        except EdgertError:
            refused += 1
    assert refused > 30
