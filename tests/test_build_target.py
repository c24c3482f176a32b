"""Targets: the TOML files of engines/, and what is refused in one."""

from __future__ import annotations

import re

import pytest
from wheels import ROOT

from edgert.build.operators import Node, parsed, refusals
from edgert.build.target import Span, find, names, read_target
from edgert.errors import UsageError

ORIN = (ROOT / "engines" / "orin-nano-jp6.toml").read_text(encoding="utf-8")


def test_every_target_that_comes_along_is_sound():
    """By name; JetPack 6 has portable graphs of operator set 20 at most."""
    assert names() == sorted(path.stem for path in (ROOT / "engines").glob("*.toml"))
    for name in names():
        target = find(name)
        assert target.name == name
        assert "portable" in target.lowerings
        if name.endswith("-jp6"):
            assert (target.version, target.opset) == ("10.3", 20)
            assert target.lowerings == ("portable",)
        elif target.compiler == "tensorrt":
            assert target.release >= (10, 15)
            assert (target.lowerings[0], target.opset) == ("modern", 24)


def test_a_span_is_cut_to_what_the_model_holds():
    assert Span(1, 128, 512).up_to(64) == Span(1, 64, 64)


def test_an_unknown_target_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="there is no target 'orin'") as caught:
        find("orin")
    assert "orin-nano-jp6" in (caught.value.do or "")


def test_a_file_of_ones_own_is_a_target(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(ORIN)
    assert find(str(path)).name == "mine"


WRONG = {
    "unknown key": ("sm =", 'color = "red"\nsm =', "'color': unknown key"),
    "key left out": ("opset = 20\n", "", "opset: missing"),
    "profile left out": ("[solve]\nbatch = [1, 1, 16]\n", "", "solve: missing"),
    "axis left out": ("select = [1, 1, 64]\n", "", "prefill.select: missing"),
    "axis of another": ("select =", "batch = [1, 1, 2]\nselect =", "prefill.'batch': unknown key"),
    "version": ("format_version = 1", "format_version = 2", "format_version: must be 1"),
    "text for a number": ("memory_mb = 5000", 'memory_mb = "5 GB"', "memory_mb: '5 GB' is not a"),
    "true for a number": ("opset = 20", "opset = true", "opset: True is not a whole number"),
    "number for a version": ('version = "10.3"', "version = 10.3", "version: expected str, got"),
    "no version": ('version = "10.3"', 'version = "10"', "version: '10' is not major.minor"),
    "compiler": ('"tensorrt"', '"trtexec"', "compiler: 'trtexec' is not one of tensorrt,"),
    "lowering": ('"portable"', '"fast"', "lowerings.0: 'fast' is not one of"),
    "no lowering": ('["portable"]', "[]", "lowerings: names none"),
    "precision": ('["fp16", "fp32"]', '["int3"]', "precisions.0: 'int3' is not one of"),
    "no precision": ('["fp16", "fp32"]', "[]", "precisions: names none"),
    "falling span": ("[1, 128, 512]", "[128, 1, 512]", "prefill.tokens: [128, 1, 512] is not"),
    "short span": ("[1, 128, 512]", "[1, 2]", "prefill.tokens: [1, 2] is not"),
    "zero": ("[1, 128, 512]", "[0, 1, 2]", "prefill.tokens: [0, 1, 2] is not"),
    "huge": ("[1, 128, 512]", "[1, 2, 99999999]", "prefill.tokens: [1, 2, 99999999] is not"),
    "fractions": ("[1, 128, 512]", "[1, 1.5, 2]", "prefill.tokens: [1, 1.5, 2] is not"),
    "level": ("optimization_level = 3", "optimization_level = 9", "optimization_level: 9 is not"),
    "a table for a value": ("[prefill]", "[summary]\n[prefill]", "not TOML"),
    "a value for a table": ("[solve]\nbatch = [1, 1, 16]\n", "", "solve: missing"),
    "no TOML": ("opset = 20", "opset =", "not TOML"),
    "deep": ("[1, 128, 512]", "[" * 20000, "not TOML"),
    "long number": ("opset = 20", "opset = " + "9" * 9000, "not TOML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_by_file_and_key(tmp_path, name):
    """Every way to be wrong is named with the key; nothing is taken silently."""
    old, new, message = WRONG[name]
    assert old in ORIN
    path = tmp_path / "mine.toml"
    path.write_text(ORIN.replace(old, new, 1))
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_target(path)
    assert caught.value.where == str(path)


def test_all_problems_are_said_at_once(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    with pytest.raises(UsageError) as caught:
        read_target(path)
    assert caught.value.what.count("missing") == 14


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the target cannot be read"):
        find(str(tmp_path / "none.toml"))
    (tmp_path / "large.toml").write_text("#" * 70_000)
    with pytest.raises(UsageError, match="larger than"):
        find(str(tmp_path / "large.toml"))


def test_operators_grow_with_the_release():
    """The transformer operators of newer sets are no part of JetPack 6."""
    old, new = parsed(find("orin-nano-jp6")), parsed(find("agx-orin-jp7"))
    assert new - old >= {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert "Swish" not in new
    assert old < new


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (Node("a", "ai.onnx", "MatMul", {}), None),
        (Node("a", "ai.onnx", "ScatterND", {"reduction": b"none"}), None),
        (Node("a", "ai.onnx", "Attention", {}), "Attention is not parsed: node 'a'"),
        (Node("b", "com.microsoft", "MatMulNBits", {}), "com.microsoft::MatMulNBits is not a"),
        (Node("c", "ai.onnx", "ScatterND", {"reduction": b"add"}), "ScatterND with a reduction"),
        (Node("d", "ai.onnx", "TopK", {"sorted": 0}), "TopK unsorted is not parsed"),
    ],
)
def test_an_operator_that_is_not_parsed_is_named_with_its_node(node, why):
    found = list(refusals(find("orin-nano-jp6"), [node]))
    assert (found == []) if why is None else found[0].startswith(why)


def test_many_nodes_of_a_kind_are_one_line():
    nodes = [Node(f"n{i}", "ai.onnx", "NonSense", {}) for i in range(9)]
    assert list(refusals(find("thor-jp7"), nodes)) == [
        "NonSense is not parsed: node 'n0' and 8 more"
    ]
