"""`edgert export --precision int8,int4`: gated against eager torch with the same values, measured
against fp32, one file for each precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_decoder import decoder, imported, speaking

import edgert
from edgert.bundle import list_files, read_manifest, seal, write_manifest
from edgert.errors import GateFailed, SessionMismatch, UnsupportedModel, UsageError
from edgert.export import quantize, write
from edgert.export.nbits import Scheme
from edgert.export.pipeline import export_source
from edgert.export.quantize import Quantizer
from edgert.export.recipe import read_recipe
from edgert.export.write import Exported, ExportOptions, export_bundle
from edgert.models.families import program as program_of
from edgert.models.importers import Imported

ALL = ExportOptions(precision="fp32,int8,int4", lowerings=("ort",))

LOOPED = """
format_version = 1
name = "looped"

[source]
random_seed = 3

[model]
family = "hagi"
hidden_size = 64
perception_layers = 1
reasoning_layers = 1
expression_layers = 1
loop_count = 2
use_loop = true
use_gdr = true

[model.transformer]
hidden_size = 64
num_query_heads = 4
num_kv_heads = 2
intermediate_size = 96
max_seq_len = 64

[model.grades]
scalar = 8
vector = 16
bivector = 16
trivector = 8
residual = 16

[export]
precision = "int4"
lowerings = ["ort"]
unrolled = true
max_drift = 0.25
int4 = { block = 16, symmetric = false, method = "search" }
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Exported:
    """`tiny_decoder.speaking` in three precisions: a tied head, and text to measure with."""
    return export_bundle(speaking(), tmp_path_factory.mktemp("quant") / "spoken", ALL)


@pytest.fixture(scope="module")
def looped(tmp_path_factory) -> Exported:
    """A looped model in int4 alone, stepped and unrolled; it has no tokenizer."""
    folder = tmp_path_factory.mktemp("quant")
    (folder / "looped.toml").write_text(LOOPED)
    return export_source(folder / "looped.toml", folder / "looped")


def small() -> Imported:
    """Always the same weights."""
    return imported(decoder(hidden_size=48, head_size=16, intermediate_size=96, vocab_size=96))


def initializers(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Graph file -> initializer -> its place in the weights file."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            keys = {entry.key: entry.value for entry in tensor.external_data}
            if keys:
                place = int(keys["offset"]), int(keys["length"])
                found.setdefault(path.name, {})[tensor.name] = place
    return found


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def test_every_precision_is_a_variant_and_passes_the_tight_gate(spoken) -> None:
    """With activations in float32: as close to eager torch as fp32. As shipped: measured apart."""
    assert list(spoken.manifest.variants) == ["fp32-ort", "int8-ort", "int4-ort"]
    report = json.loads((spoken.path / "parity.json").read_text())
    assert report["tolerance"] == {
        "fp32": 3e-5,
        "int8": 3e-5,
        "int4": 3e-5,
        "activations in int8": 0.25,
    }
    for variant in spoken.manifest.variants:
        checks = [c for c in report["checks"] if c["variant"] == variant]
        exact = [c for c in checks if c["activations"] == "float32"]
        assert [c["name"] for c in exact] == ["prefill", "steps", "chunks", "batch"]
        assert all(c["logits_max_abs"] < 1e-3 for c in exact)
        rounded = [c for c in checks if c not in exact]
        assert len(rounded) == (0 if variant == "fp32-ort" else 4)
        assert all(c["logits_max_abs"] > 1e-3 for c in rounded)  # or it would round nothing


def test_a_variant_computes_with_the_values_of_its_codes(tmp_path, traced_once) -> None:
    """The runtime's logits are those of the model whose weights are the rounded ones."""
    source = small()
    exact = {"int4": {"accuracy_level": 0, "method": "plain", "tuned": False}}
    options = ExportOptions(precision="int4", lowerings=("ort",), schemes=exact)
    export_bundle(source, tmp_path / "bundle", options)
    ids = np.arange(20)[None] % 96
    before = source.model(torch.from_numpy(ids)).numpy()
    for name, parameter in source.model.named_parameters():
        if parameter.ndim == 2 and parameter.numel() >= quantize.LEAST:
            weight = parameter.numpy() if name == "embed" else parameter.numpy().T
            blocks = weight.reshape(len(weight), -1, 32 if weight.shape[1] % 32 == 0 else 16)
            low, high = blocks.min(-1), blocks.max(-1)
            scale = np.where(-low > high, low, high)[..., None] / -8
            values = (np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(weight.shape)
            parameter.copy_(torch.from_numpy(values if name == "embed" else values.T))
    want = source.model(torch.from_numpy(ids)).numpy()
    with edgert.load(tmp_path / "bundle") as model:
        got = model.logits(ids)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - before).max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tied_head_is_stored_once_and_the_file_is_no_larger_than_its_weights(
    spoken, precision
) -> None:
    """The embedding's rows and the head's blocks are the same bytes."""
    folder = spoken.path / "variants" / precision
    (places,) = initializers(folder).values()
    (rows,) = (place for name, place in places.items() if name.endswith("embed.rows"))
    (codes,) = (place for name, place in places.items() if name.endswith("embed.codes"))
    assert rows == codes
    assert rows[1] == 267 * 48 * int(precision[3:]) // 8
    unique = sum(length for _, length in set(places.values()))
    assert (folder / "weights.data").stat().st_size <= 1.05 * unique
    ops = operators(folder / "decode-ort.onnx")
    assert ops.count("GatherBlockQuantized") == 1
    assert ops.count("Gather") == 0
    assert ops.count("MatMulNBits") == 1 + 2 * 2  # head; qkv and gate-up of two blocks
    assert ops.count("MatMul") == 2 * 2  # too small to be worth it


def test_a_recipe_bounds_the_drift_of_sessions(looped, spoken) -> None:
    """In the version of the format that has it; other bundles stay readable by older versions."""
    assert (looped.manifest.max_drift, looped.manifest.format_version) == (0.25, 4)
    assert read_manifest(looped.path) == looped.manifest
    assert (spoken.manifest.max_drift, spoken.manifest.format_version) == (None, 1)


@pytest.mark.parametrize("bound", [-0.1, float("inf"), float("nan")])
def test_a_drift_that_bounds_nothing_is_refused(bound) -> None:
    with pytest.raises(UsageError, match="bounds nothing"):
        ExportOptions(max_drift=bound)


def test_stepped_graphs_share_one_file_with_the_unrolled_one(looped) -> None:
    """The loop's weights are there once, whatever graph of the variant reads them."""
    assert list(looped.manifest.variants) == ["int4-ort", "int4-ort-unrolled"]
    found = initializers(looped.path / "variants/int4")
    assert len(found) == 4  # prologue, body, epilogue; unrolled
    shared = found.pop(next(file for file in found if file.endswith("-unrolled.onnx")))
    for file, places in found.items():
        codes = {name: place for name, place in places.items() if name.endswith(".codes")}
        assert codes, file
        assert set(codes.values()) <= set(shared.values()), file
    assert len({v.data for g in looped.manifest.variants.values() for v in g.graphs.values()}) == 1
    assert all(check.worst_share < 1 for check in looped.verdict.checks)
    assert len(looped.verdict.checks) == 2 * 2 * 4  # variants, kinds of activation, checks


def test_what_it_cost_is_in_the_bundle_and_said(spoken, run) -> None:
    report = json.loads((spoken.path / "accuracy.json").read_text())
    assert "accuracy.json" in spoken.manifest.reports
    assert report == json.loads(json.dumps(spoken.accuracy))
    assert report["text"]["text"] == "pydoc topics"
    eight, four = (report["variants"][name] for name in ("int8-ort", "int4-ort"))
    assert eight["tokens"] == four["tokens"] > 4000
    assert 0 < eight["kl"] < four["kl"] < 2
    assert eight["top1"] > four["top1"] > 0.5
    assert eight["scheme"]["bits"] == 8
    assert four["scheme"]["method"] == "gptq"
    told = run("inspect", spoken.path)
    lines = [line for line in told.out.splitlines() if line.startswith("accuracy")]
    assert len(lines) == 2
    assert f"ratio {four['ratio']:.4f}" in lines[1]
    assert told.out.count("parity    pass") == 2
    assert json.loads(run("inspect", spoken.path, "--json").out)["accuracy"] == report


def test_a_forged_accuracy_report_is_refused(spoken, copied, run) -> None:
    bundle = copied(spoken.path)
    path = bundle / "accuracy.json"
    report = json.loads(path.read_text())
    report["variants"]["int4-ort"]["ratio"] = "1.0\x1b[31m"
    path.write_text(json.dumps(report))
    write_manifest(bundle, seal(replace(read_manifest(bundle), files=list_files(bundle))))
    told = run("inspect", bundle)
    assert told.code == 3
    assert "the accuracy report is not one that edgert writes" in told.err


def test_without_a_tokenizer_nothing_is_measured_and_that_is_said(looped, tmp_path) -> None:
    assert looped.accuracy is None
    assert looped.manifest.reports == ("parity.json",)


def test_the_precision_that_is_asked_for_runs_and_the_exact_one_is_the_default(spoken) -> None:
    said = {}
    for precision in (None, "fp32", "int8", "int4"):
        with edgert.load(spoken.path, precision=precision) as model:
            name = model.runner.variant_name
            said[precision] = (name, model.logits([[5, 6, 7, 8]]))
            assert len(model.generate("the star", max_tokens=8).tokens) == 8
    assert [name for name, _ in said.values()] == ["fp32-ort", "fp32-ort", "int8-ort", "int4-ort"]
    np.testing.assert_array_equal(said[None][1], said["fp32"][1])
    assert np.abs(said["int4"][1] - said["fp32"][1]).max() > 1e-3


def test_a_session_of_one_precision_is_refused_by_another(spoken, tmp_path) -> None:
    with edgert.load(spoken.path, precision="int4") as model, model.session() as session:
        session.generate("the star", max_tokens=4)
        session.save(tmp_path / "s")
    with (
        edgert.load(spoken.path, precision="int8") as other,
        pytest.raises(SessionMismatch, match="belongs to variant int4-ort of this bundle"),
    ):
        edgert.resume(tmp_path / "s", model=other)


BROKEN = ["halves swapped", "a scale off", "another weight's codes"]


@pytest.mark.parametrize("how", BROKEN)
def test_wrong_packing_fails_the_gate(how, tmp_path, monkeypatch, traced_once) -> None:
    """And nothing is published."""
    real = quantize._matmul

    def broken(graph, node, name, quantized, scheme):
        changed = quantized
        if how == "halves swapped":
            codes = quantized.codes.reshape(len(quantized.codes), -1, 2)[..., ::-1]
            changed = replace(quantized, codes=codes.reshape(quantized.codes.shape))
        elif how == "a scale off" and name.endswith("wqkv"):
            scales = quantized.scales.copy()
            scales[0, 0] *= 1.5
            changed = replace(quantized, scales=scales)
        elif how == "another weight's codes":
            changed = replace(quantized, codes=quantized.codes[::-1].copy())
        return real(graph, node, name, changed, scheme)

    monkeypatch.setattr(quantize, "_matmul", broken)
    monkeypatch.setattr(write, "check_weights", lambda *given: None)  # it would see foreign bytes
    options = ExportOptions(precision="int4", lowerings=("ort",))
    with pytest.raises(GateFailed, match="differs from eager torch"):
        export_bundle(small(), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_codes_that_are_not_the_models_never_reach_the_gate(tmp_path, monkeypatch) -> None:
    real = quantize.initializer

    def foreign(graph, name, make):
        return real(graph, name, lambda: make() ^ 1 if name.endswith("codes") else make())

    monkeypatch.setattr(quantize, "initializer", foreign)
    monkeypatch.setattr(write, "check_bundle", lambda *given: pytest.fail("it came so far"))
    source = imported(decoder(hidden_size=256, head_size=16, intermediate_size=512))
    options = ExportOptions(precision="int8", lowerings=("ort",))
    with pytest.raises(GateFailed, match="is not a weight of the model"):
        export_bundle(source, tmp_path / "bundle", options)


def test_the_module_is_itself_again_after_the_gate() -> None:
    module = decoder(hidden_size=48, head_size=16, vocab_size=96)
    before = {name: p.clone() for name, p in module.named_parameters()}
    quantizer = Quantizer(module, Scheme(4))
    assert quantizer._quantized("embed", transposed=False) is not None
    with quantizer.applied():
        assert not torch.equal(module.embed, before["embed"])
        assert torch.equal(module.final_norm, before["final_norm"])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_what_has_no_such_operators_is_refused(tmp_path) -> None:
    """Heads of 12 have no fused attention, so the only lowering is the portable one."""
    odd = imported(decoder(hidden_size=48, head_size=12))
    with pytest.raises(UnsupportedModel, match="int4 needs the lowering ort: head size 12"):
        export_bundle(odd, tmp_path / "odd", ExportOptions(precision="int4"))
    options = ExportOptions(precision="fp32,int8", lowerings=("portable",))
    with pytest.raises(UnsupportedModel, match="int8 needs the lowering ort: it was not asked"):
        export_bundle(speaking(), tmp_path / "portable", options)
    assert not any(tmp_path.iterdir())


def test_a_model_that_solves_is_refused(monkeypatch, tmp_path) -> None:
    program = replace(program_of(decoder()), reference=None)
    monkeypatch.setattr(write, "program_of", lambda model: program)
    with pytest.raises(UnsupportedModel, match="for models that decode tokens"):
        export_bundle(imported(decoder()), tmp_path / "b", ExportOptions(precision="int4"))


@pytest.mark.parametrize("precision", ["int5", "int4,", "", "int4;int8", "FP32", "int4,fp64"])
def test_precisions_that_there_are_not_are_refused(precision) -> None:
    with pytest.raises(UsageError, match=r"cannot be exported"):
        ExportOptions(precision=precision)


SETTINGS = [
    ("{ block = 17 }", "block = 17"),
    ("{ bits = 5 }", "'bits' is not a setting"),
    ("{ method = 'rtn' }", "method = 'rtn'"),
    ("{ accuracy_level = -4 }", "accuracy_level = -4"),
    ("'plain'", "export.int4: expected dict"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_of_a_recipe_that_cannot_be_are_refused(settings, message, tmp_path) -> None:
    path = tmp_path / "wrong.toml"
    old = next(line for line in LOOPED.splitlines() if line.startswith("int4"))
    path.write_text(LOOPED.replace(old, f"int4 = {settings}"))
    with pytest.raises(UsageError, match=message):
        read_recipe(path)
