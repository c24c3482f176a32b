"""The build plan: which variant, which shapes, how much memory, and what is refused beforehand."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import tiny_bundle, tiny_model, with_variant
from fake_loop import looped_manifest
from onnx import TensorProto, helper

from edgert.build.plan import MB, choose, plan_build
from edgert.build.shapes import read_graph
from edgert.build.target import Span, Target, find, names
from edgert.bundle import Bundle
from edgert.errors import (
    Incompatible,
    MissingDependency,
    OutOfMemory,
    UnsupportedModel,
    UsageError,
)
from edgert.spec import Manifest

ORIN = find("orin-nano-jp6")


def portable(manifest: Manifest) -> Manifest:
    return with_variant(manifest, lowering="portable")


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """One graph that counts: k.0 [B, 1, C, 1] and its counter, a context of 64."""
    return Bundle.open(tiny_bundle(tmp_path, edit=portable))


def small(**changes) -> Target:
    return replace(ORIN, workspace_mb=0, **changes)


def test_shapes_cover_prefill_and_steps(bundle):
    """Tokens of one sequence, then a token of each; no capacity or chunk beyond the context."""
    (graph,) = plan_build(bundle, ORIN).graphs
    prefill, step = graph.profiles
    assert (prefill.name, step.name) == ("prefill", "step")
    assert prefill.shapes == {
        "ids": ((1, 1), (1, 64), (1, 64)),
        "select": ((1, 1), (1, 1), (1, 64)),
        "k.0": ((1, 1, 1, 1), (1, 1, 64, 1), (1, 1, 64, 1)),
        "lens": ((1,), (1,), (1,)),
    }
    assert step.shapes["ids"] == ((1, 1), (1, 1), (4, 1))
    assert step.shapes["k.0"] == ((1, 1, 1, 1), (1, 1, 64, 1), (4, 1, 64, 1))


@pytest.mark.parametrize("name", names())
def test_every_named_axis_is_bounded_in_order(bundle, name):
    """On each target that comes along: smallest <= best <= largest, in every profile."""
    target = replace(find(name), precisions=("fp32",))
    for graph in plan_build(bundle, target).graphs:
        inputs = graph.inputs.items()
        dynamic = {n for n, spec in inputs if any(isinstance(axis, str) for axis in spec.shape)}
        for profile in graph.profiles:
            assert profile.shapes.keys() == dynamic
            for low, best, high in profile.shapes.values():
                assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))


def test_models_that_solve_have_one_profile(half_solver):
    """Rows of a batch; which iteration it is takes no part in shapes."""
    bundle = Bundle.open(half_solver, verify=False)
    plan = plan_build(bundle, ORIN)
    assert plan.variant == "fp16-portable"
    assert {p.name for graph in plan.graphs for p in graph.profiles} == {"solve"}
    segment = next(graph for graph in plan.graphs if graph.name == "segment")
    assert segment.profiles[0].shapes["z_h"] == tuple((b, 27, 32) for b in (1, 1, 16))
    assert plan.memory.states == {}


def test_the_best_precision_of_the_target_is_built(half_bundle):
    bundle = Bundle.open(half_bundle, verify=False)
    assert plan_build(bundle, ORIN).variant == "fp16-portable"
    assert plan_build(bundle, ORIN, "fp32").variant == "fp32-portable"
    wide = replace(ORIN, precisions=("fp32", "fp16"))
    assert plan_build(bundle, wide).precision == "fp32"


def test_half_states_take_half(half_bundle):
    """What the manifest says of the variant is what is counted."""
    bundle = Bundle.open(half_bundle, verify=False)
    half, full = (plan_build(bundle, ORIN, p).memory.states for p in ("fp16", "fp32"))
    assert half["k.0"] * 2 == full["k.0"] == 2 * 4 * 2 * 4096 * 16 * 4  # twice, 4 rows of float32


@pytest.mark.parametrize(
    ("precision", "error", "message"),
    [
        ("int8", UsageError, "does not build precision 'int8'"),
        ("fp16", Incompatible, "takes portable graphs in fp16; the bundle has fp32-ort"),
    ],
)
def test_a_precision_that_is_not_there_is_refused(bundle, precision, error, message):
    with pytest.raises(error, match=re.escape(message)):
        plan_build(bundle, ORIN, precision)


def test_fused_graphs_are_not_built(tmp_path):
    with pytest.raises(Incompatible, match="takes portable graphs") as caught:
        plan_build(Bundle.open(tiny_bundle(tmp_path)), ORIN)
    assert caught.value.do == "export it with --lowering portable --precision fp16"


def test_a_loop_that_is_unrolled_is_not_built():
    """The runtime steps; an unrolled variant of the same precision is passed over."""
    manifest = looped_manifest()
    stepped = replace(manifest.variants["fp32-ort"], lowering="portable")
    unrolled = replace(stepped, graphs={"leave": stepped.graphs["leave"]})
    both = replace(manifest, variants={"unrolled": unrolled, "stepped": stepped})
    assert choose(both, ORIN, None) == "stepped"
    with pytest.raises(Incompatible, match="the bundle has unrolled"):
        choose(replace(manifest, variants={"unrolled": unrolled}), ORIN, None)


def test_a_newer_operator_set_is_refused(tmp_path):
    model = tiny_model()
    model.opset_import[0].version = 21

    def newer(manifest: Manifest) -> Manifest:
        return with_variant(portable(manifest), opsets={"ai.onnx": 21})

    bundle = Bundle.open(tiny_bundle(tmp_path, edit=newer, model=model))
    with pytest.raises(UnsupportedModel, match=r"imports ai\.onnx 21, orin-nano-jp6 parses"):
        plan_build(bundle, ORIN)
    assert plan_build(bundle, replace(find("agx-orin-jp7"), precisions=("fp32",))).graphs


def test_an_operator_that_the_target_lacks_is_named_with_its_node(tmp_path):
    """Also inside a subgraph, and before anything is built."""
    model = tiny_model()
    branches = []
    for op in ("Identity", "Bernoulli"):
        value = helper.make_tensor_value_info(f"{op}.y", TensorProto.FLOAT, None)
        node = helper.make_node(op, ["scores"], [f"{op}.y"], name=f"draw.{op}")
        branches.append(helper.make_graph([node], op, [], [value]))
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(yes)
    at = next(i for i, n in enumerate(model.graph.node) if n.output[0] == "all")
    choice = helper.make_node(
        "If", ["yes"], ["chosen"], then_branch=branches[0], else_branch=branches[1]
    )
    model.graph.node.insert(at, choice)
    bundle = Bundle.open(tiny_bundle(tmp_path, edit=portable, model=model))
    with pytest.raises(UnsupportedModel) as caught:
        plan_build(bundle, ORIN)
    assert "graph 'decode': Bernoulli is not parsed: node 'draw.Bernoulli'" in caught.value.what


def test_memory_is_added_up(bundle):
    """Weights once, what is written where it is read twice, inputs and results at their largest,
    each a multiple of 256 bytes: all known by hand here."""
    memory = plan_build(bundle, ORIN).memory
    assert memory.weights == 300 * 300 * 4
    assert memory.states == {"k.0": 2 * 4 * 64 * 4, "lens": 256}
    logits, token, ids, select = 64 * 300 * 4, 64 * 8, 64 * 8, 64 * 8
    assert memory.buffers == logits + token + ids + select
    assert memory.total == memory.weights + sum(memory.states.values()) + memory.buffers


def test_running_out_of_memory_is_foreseen(bundle):
    """The error has the sum, the limit, and the states that take most."""
    huge = {**ORIN.profiles, "step": {"batch": Span(1, 1, 9000), "capacity": Span(1, 64, 64)}}
    with pytest.raises(OutOfMemory) as caught:
        plan_build(bundle, small(memory_mb=4, profiles=huge))
    assert "running needs 16 MB, orin-nano-jp6 has 4 MB" in caught.value.what
    assert "state k.0, float32 [batch, 1, capacity, 1]: 5 MB" in caught.value.what
    assert caught.value.exit_code == 5


def test_states_alike_are_one_line(half_bundle):
    bundle = Bundle.open(half_bundle, verify=False)
    with pytest.raises(OutOfMemory) as caught:
        plan_build(bundle, small(memory_mb=8))
    assert (
        "state k.0 to v.1 (4 states), float16 [batch, 2, capacity, 16]: 8 MB" in caught.value.what
    )


def test_a_build_that_cannot_fit_is_foreseen(bundle):
    """Compilers hold the weights several times."""
    with pytest.raises(OutOfMemory, match="building graph 'decode' takes about 1 MB: 4 times"):
        plan_build(bundle, small(memory_mb=1))
    with pytest.raises(OutOfMemory, match="a workspace of 1,024 MB; orin-nano-jp6 has 100 MB"):
        plan_build(bundle, replace(ORIN, memory_mb=100))


def test_a_plan_is_one_json_object(bundle):
    plan = json.loads(json.dumps(plan_build(bundle, ORIN).to_json()))
    assert plan["memory"]["limit_bytes"] == 5000 * MB
    assert plan["graphs"][0]["profiles"]["step"]["ids"] == {
        "min": [1, 1],
        "opt": [1, 1],
        "max": [4, 1],
    }
    assert plan["graphs"][0]["inputs"]["lens"] == {"dtype": "int64", "shape": ["batch"]}


def drawn(tmp_path: Path, *nodes, **shapes):
    """Read a graph x [batch, 4] -> y with these nodes, and value_info of these shapes."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph([*nodes], "g", [ports[0]], [ports[1]], value_info=info)
    path = tmp_path / "g.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return read_graph(path)


def test_activations_are_what_is_alive_at_once(tmp_path):
    """a and b are there together, then b and c; what is only seen in another shape is no copy."""
    graph = drawn(
        tmp_path,
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "s"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["c"]),
        helper.make_node("Add", ["c", "c"], ["y"]),
        a=["batch", 4],
        b=["batch", 4],
        flat=["batch*4"],
        c=["batch*4", 2],
    )
    assert graph.activations({"batch": 3}) == 4 * (12 + 24)
    assert graph.activations({"batch": 1}) == 4 * (4 + 8)


def test_a_shape_that_is_not_said_is_not_counted(tmp_path):
    graph = drawn(
        tmp_path,
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
        a=["batch", "other"],
    )
    assert graph.activations({"batch": 3}) == 0


def test_without_onnx_it_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency) as caught:
        plan_build(bundle, ORIN)
    assert caught.value.do == "pip install 'edgert[tensorrt]'"
