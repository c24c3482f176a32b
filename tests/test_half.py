"""Typed fp16: what is in which type, what the gate proves of it, and that it runs and resumes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny_decoder import decoder, imported, speaking

import edgert
from edgert.bundle import Bundle, list_files, read_manifest, seal, write_manifest
from edgert.errors import GateFailed, UnsupportedModel, UsageError
from edgert.export.check import check_bundle
from edgert.export.half import FULL, HALF, PRODUCTS, Halver
from edgert.export.trace import trace
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.families import program as program_of
from edgert.models.program import Program, TracedGraph
from edgert.spec import ProgramSpec, StateSpec


def graphs_of(bundle: Path, variant: str = "fp16-portable") -> dict[str, ir.Graph]:
    specs = read_manifest(bundle).variants[variant].graphs
    return {name: ir.load(bundle / spec.file).graph for name, spec in specs.items()}


def floats(values) -> set[ir.DataType]:
    return {v.dtype for v in values if v is not None and v.dtype in (FULL, HALF)}


@pytest.mark.parametrize("bundle", ["half_bundle", "half_solver"])
def test_products_are_half_and_all_that_computes_is_not(bundle, request):
    """Every node has one type, and a strict check of the whole file agrees."""
    moving = {"Gather", "Reshape", "ScatterND", "Split", "Squeeze", "Transpose", "Unsqueeze"}
    computed = set()
    for name, graph in graphs_of(request.getfixturevalue(bundle)).items():
        for node in graph:
            types = floats((*node.inputs, *node.outputs))
            if node.op_type == "Cast" or not types:
                continue
            assert len(types) == 1, f"{name}, {node.name}: {types}"
            if node.op_type in PRODUCTS:
                narrow = any(
                    v is not None and v.is_initializer() and min(v.shape.numpy()) < 8
                    for v in node.inputs
                )
                assert types == {FULL if narrow else HALF}, node.name
            elif node.op_type not in moving | {"Concat", "Expand", "Shape", "Slice"}:
                assert types == {FULL}, f"{name}, {node.name} ({node.op_type})"
                computed.add(node.op_type)
    assert computed >= {"Add", "Mul", "ReduceMean", "Softmax", "Sqrt", "Sigmoid", "ArgMax"}
    root = request.getfixturevalue(bundle)
    for graph in read_manifest(root).variants["fp16-portable"].graphs.values():
        model = onnx.load(root / graph.file)
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_keys_and_values_are_half_and_what_is_read_is_not(half_bundle):
    """The manifest says so of one variant alone, and states the version that this takes."""
    manifest = read_manifest(half_bundle)
    assert manifest.format_version == 4
    assert manifest.variants["fp32-portable"].state_dtypes == {}
    assert set(manifest.variants["fp16-portable"].state_dtypes.values()) == {"float16"}
    (graph,) = graphs_of(half_bundle).values()
    types = {v.name: v.dtype for v in (*graph.inputs, *graph.outputs)}
    assert {d for n, d in types.items() if n.startswith(("k.", "v."))} == {HALF}
    assert types["logits"] == FULL
    assert types["lens"] == ir.DataType.INT64
    for name, spec in manifest.states_of("fp16-portable").items():
        assert spec.dtype == ("int64" if name == "lens" else "float16")
    assert {s.dtype for s in manifest.states_of("fp32-portable").values()} == {"float32", "int64"}


def test_what_goes_round_a_loop_and_scores_of_halting_are_float32(half_solver):
    """And a bundle without states is of no newer version for its fp16."""
    assert read_manifest(half_solver).format_version == 3
    graphs = graphs_of(half_solver)
    ports = {v.name: v.dtype for g in graphs.values() for v in (*g.inputs, *g.outputs)}
    assert {ports[n] for n in ("e", "z_h", "z_l", "z_h.next", "halt", "logits", "q")} == {FULL}
    narrow = {n: v.dtype for g in graphs.values() for n, v in g.initializers.items() if "q_" in n}
    assert narrow
    assert set(narrow.values()) == {FULL}
    wide = [v.dtype for g in graphs.values() for n, v in g.initializers.items() if "wqkv" in n]
    assert set(wide) == {HALF}


def test_the_verdict_has_the_twin_and_the_graph_itself(half_bundle):
    """Structure within the tolerance of fp32, the file as it is within the looser one."""
    import json

    verdict = json.loads((half_bundle / "parity.json").read_text())
    assert verdict["tolerance"] == {"fp32": 3e-5, "fp16": 3e-5, "activations in float16": 0.01}
    checks = [c for c in verdict["checks"] if c["variant"] == "fp16-portable"]
    assert [c["activations"] for c in checks] == ["float32"] * 4 + ["float16"] * 4 + ["cpu"] * 4
    assert all(c["top1_agree"] == c["top1_total"] > 0 for c in checks)
    twin, itself = (max(c["logits_max_abs"] for c in part) for part in (checks[:4], checks[4:8]))
    assert twin * 20 < itself
    accuracy = json.loads((half_bundle / "accuracy.json").read_text())
    assert accuracy["variants"]["fp16-portable"]["within_budget"]


class Squares(torch.nn.Module):
    """A norm of a wide stream, and a product behind it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.rsqrt((x * x).mean(-1, keepdim=True))) @ self.weight


def small(weight: torch.Tensor) -> tuple[Program, TracedGraph]:
    """A program of one graph, which is traced as a decoder's would be."""
    module = Squares(weight)
    program = replace(
        program_of(decoder()),
        weights=module,
        parts=ProgramSpec("decode"),
        states={"x": StateSpec("carry", "float32", ("batch", len(weight)))},
    )
    part = TracedGraph("decode", lambda _: module, {"x": "state.x"}, {"y": "state.x"})
    return program, part


def test_an_island_of_float32_does_not_overflow(tmp_path):
    """Squares of 300 exceed float16. Listed nodes of the usual converter are rounded in between."""
    import onnxruntime
    from onnxruntime.transformers.float16 import convert_float_to_float16

    program, part = small(torch.eye(16))
    model = trace(program, part, "portable")
    plain = ir.to_proto(model)
    usual = convert_float_to_float16(
        plain,
        keep_io_types=True,
        node_block_list=[node.name for node in plain.graph.node if node.op_type != "MatMul"],
    )
    Halver(program).rewrite(model, part)
    x = np.full((2, 16), 300, np.float32)
    answers = []
    for each in (ir.to_proto(model), usual):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(each.SerializeToString(), options)
        answers.append(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(answers[0], 1.0, rtol=1e-3)
    assert not np.allclose(answers[1], 1.0, rtol=1e-3)


def test_a_weight_beyond_float16_is_refused():
    weight = torch.eye(16)
    weight[3, 3] = 1e5
    program, part = small(weight)
    with pytest.raises(UnsupportedModel, match=r"reaches 1e\+05, float16 ends at 65,504"):
        Halver(program).rewrite(trace(program, part, "portable"), part)


def test_an_activation_beyond_float16_does_not_pass_the_gate(tmp_path):
    """Each weight fits, a product does not: the structure is right, and the graph is of no use."""
    model = decoder()
    for block in model.blocks:
        block.w_gate_up *= 2000.0
        block.w_down *= 1e-6
    options = ExportOptions(precision="fp32,fp16", lowerings=("portable",))
    with pytest.raises(GateFailed, match="differs from eager torch") as caught:
        export_bundle(imported(model), tmp_path / "out", options)
    assert "variant fp16-portable" in (caught.value.where or "")
    assert not (tmp_path / "out").exists()


def test_a_wrong_weight_shows_in_the_twin(half_bundle, tmp_path):
    """A matrix that is a thousandth off would pass the looser limit, and does not the tight one."""
    broken = Path(shutil.copytree(half_bundle, tmp_path / "broken"))
    manifest = read_manifest(broken)
    file = broken / manifest.variants["fp16-portable"].graphs["decode"].file
    model = ir.load(file)
    name, value = next((n, v) for n, v in model.graph.initializers.items() if "w_down" in n)
    tensor = value.const_value
    changed = (tensor.numpy().astype(np.float32) * 1.001).astype(np.float16)
    with (file.parent / "weights.data").open("r+b") as data:
        data.seek(tensor.offset)
        data.write(changed.tobytes())
    write_manifest(broken, seal(replace(manifest, files=list_files(broken))))
    program = program_of(speaking().model)
    halver = Halver(program)
    halver.made = {n for n, p in program.weights.named_parameters() if p.ndim == 2}
    with pytest.raises(GateFailed) as caught:
        check_bundle(broken, program, {"fp16": halver})
    assert "variant fp16-portable" in (caught.value.where or ""), name


def test_it_runs_pauses_and_resumes(half_bundle, tmp_path):
    """On the CPU, which nobody asks for fp16: the states are half as large and resume exactly."""
    with edgert.load(half_bundle) as model:
        wide = model.generate("the star", max_tokens=12).tokens
    with edgert.load(half_bundle, precision="fp16") as model:
        whole = model.generate("the star", max_tokens=12).tokens
        assert whole == wide
        with model.session() as session:
            session.generate("the star", max_tokens=5)
            session.save(tmp_path / "a.session")
        with edgert.resume(tmp_path / "a.session", model) as session:
            states = session.execution.states
            kept = {states.buffers[n].dtype.name for n in states.specs if n != "lens"}
            assert kept == {"float16"}
            assert session.generate(max_tokens=7).tokens == whole[5:]


def test_fp16_is_a_precision_of_portable_graphs(tmp_path):
    options = ExportOptions(precision="fp16", lowerings=("ort",))
    with pytest.raises(UsageError, match="fp16 is a precision of portable and modern graphs"):
        export_bundle(imported(decoder()), tmp_path / "out", options)


def test_an_identity_says_in_what_keys_are_kept(half_bundle):
    """Two variants that differ in nothing else are not the same for a session."""
    manifest = Bundle.open(half_bundle, verify=False).manifest
    variant = manifest.variants["fp16-portable"]
    other = replace(variant, state_dtypes={})
    changed = seal(replace(manifest, variants={**manifest.variants, "fp16-portable": other}))
    assert changed.variants["fp16-portable"].variant_id != variant.variant_id
