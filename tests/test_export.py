"""From a source to a bundle whose graphs, run by the runtime, compute what the model computes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_close
from tiny_decoder import decoder, imported

import edgert
from edgert.bundle import read_manifest
from edgert.errors import UnsupportedModel, UsageError
from edgert.export.pipeline import export_source
from edgert.export.write import Exported, ExportOptions, export_bundle, weights_id
from edgert.models.decoder import Decoder
from edgert.progress import Advance, Reporter
from edgert.runner import Execution
from edgert.workshop import workshop

LOWERINGS = ("ort", "portable")
lowerings = pytest.mark.parametrize("lowering", LOWERINGS)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


class Recorder(Reporter):
    """Keeps what an export says."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def line(self, label: str, text: str) -> None:
        self.lines.append((label, text))

    @contextmanager
    def stage(self, label: str, text: str, total: int | None = None) -> Iterator[Advance]:
        self.lines.append((label, text))
        yield lambda amount: None


def run_parts(execution: Execution, ids: np.ndarray, parts: list[int]) -> np.ndarray:
    """Feed ids [B, T] in parts, every position selected: logits [B, T, V].

    Rows of a batch take turns for parts of more than one token, as the runtime prefills them.
    """
    out, done = [], 0
    for part in parts:
        chunk = ids[:, done : done + part]
        if part == 1 or len(ids) == 1:
            out.append(step(execution, chunk))
        else:
            rows = [execution.row(i) for i in range(len(ids))]
            out.append(np.concatenate([step(row, chunk[i : i + 1]) for i, row in enumerate(rows)]))
        done += part
    assert done == ids.shape[1]
    return np.concatenate(out, axis=1)


def step(execution: Execution, chunk: np.ndarray) -> np.ndarray:
    io = execution.io(chunk.shape[1], chunk.shape[1])
    io.ids[:] = chunk
    io.select[:] = np.arange(chunk.shape[1])
    io.run()
    assert_close(io.token, io.logits.argmax(-1), where="token")
    return io.logits.copy()


# ------------------------------------------------- geometries


def exported(model: Decoder, folder: Path, **options: Any) -> tuple[Exported, Recorder]:
    recorder = Recorder()
    result = export_bundle(imported(model), folder / "bundle", ExportOptions(**options), recorder)
    return result, recorder


def assert_equals_eager(model: Decoder, bundle: Path, seed: int = 11) -> None:
    """Each variant: logits over the whole context, then single steps of a ragged batch."""
    context, vocabulary = model.config.context, model.config.vocab_size
    ids = torch.randint(
        vocabulary, (3, min(context, 40)), generator=torch.Generator().manual_seed(seed)
    )
    want = model(ids).numpy()
    for name, variant in read_manifest(bundle).variants.items():
        with edgert.load(bundle, lowering=variant.lowering) as loaded:
            assert_close(loaded.logits(ids), want, **TOLERANCE, where=name)
            execution = loaded.runner.open(batch=3, tokens=ids.shape[1])
            lengths = [1, ids.shape[1] // 2, ids.shape[1] - 1]
            for row, length in enumerate(lengths):
                if length:
                    step(execution.row(row), ids[row : row + 1, :length].numpy())
            got = step(
                execution,
                np.stack([ids[row, length] for row, length in enumerate(lengths)])[:, None],
            )
            for row, length in enumerate(lengths):
                assert_close(got[row, 0], want[row, length], **TOLERANCE, where=f"{name} row {row}")


GEOMETRIES = {
    "head 4, as many KV heads": {"head_size": 4, "num_kv_heads": 4, "context": 16},
    "head 10, one KV head, untied": {"head_size": 10, "num_kv_heads": 1, "tied_head": False},
    "head 8, one KV head, bias": {
        "head_size": 8,
        "num_kv_heads": 1,
        "context": 16,
    },
    "head 16, untied, two words": {
        "head_size": 16,
        "num_kv_heads": 4,
        "tied_head": False,
        "vocab_size": 2,
    },
    "head 64": {"head_size": 64, "num_heads": 2, "num_kv_heads": 1},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_a_geometry_exports_in_every_lowering_it_has(geometry, tmp_path) -> None:
    """Heads not divisible by 8 have no fused kernel: `portable` alone, and the export says so."""
    model = decoder(num_layers=1, **geometry)
    result, recorder = exported(model, tmp_path)
    size = geometry["head_size"]
    fused = size % 8 == 0
    assert set(result.manifest.variants) == ({"fp32-ort"} if fused else set()) | {"fp32-portable"}
    note = ("note", f"no ort lowering: head size {size} is not divisible by 8")
    assert (note in recorder.lines) is not fused
    assert_equals_eager(model, result.path)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.full)])
def test_random_geometries_equal_eager(seed, tmp_path) -> None:
    """Whatever the sizes: both lowerings compute what torch computes."""
    pick = random.Random(seed)
    kv = pick.choice([1, 2, 3])
    model = decoder(
        seed=seed,
        vocab_size=pick.randint(2, 90),
        hidden_size=pick.randint(3, 40),
        num_layers=2,
        num_heads=kv * pick.choice([1, 2, 3]),
        num_kv_heads=kv,
        head_size=pick.choice([8, 16, 24, 32]),
        intermediate_size=pick.randint(1, 50),
        rope_theta=pick.choice([10.0, 1e4, 1e6]),
        norm_eps=pick.choice([1e-6, 1e-5, 1e-2]),
        context=pick.randint(17, 300),
        tied_head=pick.random() < 0.5,
    )
    result, _ = exported(model, tmp_path)
    assert len(result.manifest.variants) == 2
    assert_equals_eager(model, result.path, seed)


@pytest.mark.parametrize("context", [1, 2, 7])
def test_a_context_shorter_than_the_gates_sequence(context, tmp_path) -> None:
    """The gate takes what there is room for."""
    model = decoder(num_layers=1, context=context)
    result, _ = exported(model, tmp_path, lowerings=("ort",))
    names = [check.name for check in result.verdict.checks]
    assert names == ["prefill", "steps", "chunks", "batch"][: 3 if context == 1 else 4]
    for check in result.verdict.checks:
        assert check.top1_total == (min(6, 2 * (context - 1)) if check.name == "batch" else context)
    with edgert.load(result.path) as loaded:
        assert loaded.generate([1], max_tokens=50).finish_reason == "length"


def test_no_lowering_left_is_an_error_that_says_why(tmp_path) -> None:
    """Asked for the fused kernels alone, a head of 10 cannot be exported; nothing is written."""
    with pytest.raises(UnsupportedModel, match="head size 10 is not divisible by 8") as failure:
        exported(decoder(num_layers=1, head_size=10), tmp_path, lowerings=("ort",))
    assert "--lowering portable" in str(failure.value)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------- what a bundle holds


def test_the_verdict_is_stored_and_binds_the_variants(tiny_bundle) -> None:
    """parity.json names what was compared, and belongs to exactly these variants."""
    manifest = read_manifest(tiny_bundle)
    assert manifest.reports == ("parity.json",)
    parity = json.loads((tiny_bundle / "parity.json").read_text())
    assert parity["verdict"] == "pass"
    assert parity["model_id"] == manifest.model_id
    assert parity["variants"] == {n: v.variant_id for n, v in manifest.variants.items()}
    assert [(c["variant"], c["name"]) for c in parity["checks"]] == [
        (f"fp32-{lowering}", name)
        for lowering in LOWERINGS
        for name in ("prefill", "steps", "chunks", "batch")
    ]
    for check in parity["checks"]:
        assert 0 < check["worst_share"] < 1
        assert 0 < check["states_max_abs"] < 1e-3
        assert 0 < check["logits_max_abs"] < 1e-3
        assert check["top1_agree"] == check["top1_total"] > 0


def test_weights_are_stored_once_for_both_lowerings(tiny_bundle) -> None:
    """The weights file is hardly larger than the parameters and the rotary tables."""
    manifest = read_manifest(tiny_bundle)
    tables = 2 * manifest.context * 8 * 4
    size = manifest.files["variants/fp32/weights.data"].bytes
    assert manifest.parameters * 4 < size < manifest.parameters * 4 + tables + 100_000
    data = {g.data for v in manifest.variants.values() for g in v.graphs.values()}
    assert data == {("variants/fp32/weights.data",)}


def test_a_bundle_names_no_place_of_the_machine(tiny_bundle, model_a_bundle) -> None:
    """Neither manifest, reports nor graphs hold a folder of the exporting machine."""
    here = str(Path(__file__).resolve().parent.parent).encode()
    for bundle in (tiny_bundle, model_a_bundle):
        for name in read_manifest(bundle).files.keys() | {"manifest.json"}:
            if not name.endswith(".data"):
                data = (bundle / name).read_bytes()
                assert here not in data, name
                assert b"site-packages" not in data, name


def test_exporting_again_gives_the_same_bundle(
    model_a_bundle, model_a_checkpoint, tmp_path
) -> None:
    """Byte for byte the same graphs and weights, hence the same identities."""
    export_source(model_a_checkpoint, tmp_path / "again", lowerings=("ort",))
    old, new = read_manifest(model_a_bundle), read_manifest(tmp_path / "again")
    assert new.model_id == old.model_id
    assert new.weights_id == old.weights_id
    graph = "variants/fp32/decode-ort.onnx"
    assert new.files[graph] == old.files[graph]


def test_the_identity_of_weights_is_that_of_their_values() -> None:
    """One changed element changes it; equal values give equal identities."""
    model = decoder(num_layers=1)
    before = weights_id(model)
    assert before == weights_id(decoder(num_layers=1))
    model.blocks[0].w_down[0, 0] += 1e-3
    assert weights_id(model) != before


def test_a_bundle_is_as_readable_as_the_umask_says(tiny_bundle, tmp_path) -> None:
    """Other users may read what this user's other new folders let them read."""
    (tmp_path / "plain").mkdir()
    assert tiny_bundle.stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision 'fp8' cannot be exported"),
        ({"lowerings": ("ort", "cuda")}, "lowering 'cuda' cannot be exported"),
        ({"lowerings": ()}, "no lowering was asked for"),
        ({"name": "a/b"}, "'a/b' is not a name for a bundle"),
        ({"name": ""}, "'' is not a name for a bundle"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options, message) -> None:
    """Each names the value, and what it might be instead."""
    with pytest.raises(UsageError, match=message) as failure:
        ExportOptions(**options)
    assert failure.value.do


@pytest.mark.parametrize("obstacle", ["folder", "file", "link", "dangling link"])
def test_what_is_not_a_bundle_is_not_replaced(
    obstacle, tmp_path, model_a_checkpoint, model_a_bundle
) -> None:
    """Refused before any work, and left as it was."""
    out = tmp_path / "out"
    if obstacle == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years")
    elif obstacle == "file":
        out.write_text("years")
    else:
        out.symlink_to(model_a_bundle if obstacle == "link" else tmp_path / "nowhere")
    before = sorted(os.walk(tmp_path)), out.lstat()
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        export_source(model_a_checkpoint, out)
    assert (sorted(os.walk(tmp_path)), out.lstat()) == before


def test_given_options_go_before_those_of_the_recipe(tmp_path, model_a_checkpoint) -> None:
    """Name, context and lowerings of the call win; the recipe's sampling stays."""
    (tmp_path / "model.pt").write_bytes(model_a_checkpoint.read_bytes())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'format_version = 1\nname = "from-recipe"\n'
        '[source]\npath = "model.pt"\ncontext = 32\n'
        '[export]\nlowerings = ["portable"]\n'
        "[sampling]\ntop_k = 7\n"
    )
    recorder = Recorder()
    result = export_source(
        recipe, tmp_path / "out", name="given", context=20, lowerings=("ort",), reporter=recorder
    )
    manifest = result.manifest
    assert (manifest.name, manifest.context) == ("given", 20)
    assert list(manifest.variants) == ["fp32-ort"]
    assert manifest.sampling == {"top_k": 7}
    assert [label for label, _ in recorder.lines if label != "note"] == [
        *("reading", "tracing", "weights", "parity")
    ]


# ------------------------------------------------- the directory in which a bundle is made


def test_a_workshop_left_by_a_killed_export_is_removed(tmp_path) -> None:
    """It is not locked, and bears the name of the same bundle; everything else stays."""
    stale = tmp_path / ".model.0123456789ab.export"
    others = [".model.backup", ".other.0123456789ab.export", ".model.012345.export", "model.export"]
    for name in [stale.name, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.data").write_bytes(b"x")
    with workshop(tmp_path / "model") as work:
        assert work.parent == tmp_path
        assert not stale.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_workshop_in_use_is_left_alone(tmp_path) -> None:
    """A second export to the same place does not remove the first one's work."""
    with workshop(tmp_path / "model") as first:
        (first / "weights.data").write_bytes(b"x")
        with workshop(tmp_path / "model") as second:
            assert first != second
            assert (first / "weights.data").exists()
    assert os.listdir(tmp_path) == []
