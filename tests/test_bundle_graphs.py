"""What the graphs of a bundle say: external data, names and operator sets, held to the manifest."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import (
    DATA,
    DECODE,
    GRAPH,
    OFFSET,
    TABLE,
    external,
    open_refusal,
    tiny_bundle,
    tiny_model,
    with_variant,
)
from onnx import helper

from edgert.bundle import Bundle, list_files, read_manifest, seal, write_manifest
from edgert.errors import EdgertError


def graph_refusal(tmp_path: Path, model: onnx.ModelProto, **kwargs: Any) -> str:
    """The refusal of a sealed bundle, consistent in itself, whose graph is `model`."""
    root = tiny_bundle(tmp_path, model=model, **kwargs)
    texts = {open_refusal(root, verify) for verify in (True, False, "stamp")}
    assert len(texts) == 1
    return texts.pop()


LOCATIONS = [
    "/etc/passwd",
    "../fp32/weights.data",
    "../../manifest.json",
    "./weights.data",
    "weights.data/",
    "weights.data\0",
    "weights.data ",
    "weights\u200b.data",
    "wеights.data",
    "WEIGHTS.DATA",
    "unlisted.data",
    "decode-ort.onnx",
    "*/_ORT_MEM_ADDR_/*",
    "file:///etc/passwd",
    "C:\\x",
    ".",
    "..",
]


@pytest.mark.parametrize("location", LOCATIONS, ids=ascii)
def test_external_data_must_be_a_listed_file_beside_the_graph(tmp_path, location):
    """Absolute, upward, look-alike, memory-address and unlisted places are refused."""
    model = tiny_model()
    model.graph.initializer.append(external("w", [1], location=location, offset="0", length="4"))
    text = graph_refusal(tmp_path, model)
    assert f"{DECODE}.data: tensor 'w' is stored in {ascii(location)}" in text
    assert text.isascii()


def _in_subgraph(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["o"])],
        "inner",
        [],
        [helper.make_tensor_value_info("o", 1, [1])],
        initializer=[tensor],
    )
    model.graph.node.append(
        helper.make_node("If", ["c"], ["r"], then_branch=inner, else_branch=copy.deepcopy(inner))
    )


def _in_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = helper.make_node("Constant", [], ["b"], value=tensor)
    model.functions.append(
        helper.make_function("own", "f", [], ["b"], [node], [helper.make_opsetid("", 20)])
    )


def _in_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_sparse(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    indices = helper.make_tensor("i", 7, [1], [0])
    model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])
    )


@pytest.mark.parametrize("hide", [_in_subgraph, _in_function, _in_attribute, _in_sparse])
def test_hidden_external_data_is_refused(tmp_path, hide):
    """No corner of the file lets a path through."""
    model = tiny_model()
    hide(model, external("w", [1], location="../../../x", length="4"))
    assert "tensor 'w' is stored in '../../../x'" in graph_refusal(tmp_path, model)


def test_external_data_in_a_folder_below_is_refused(tmp_path):
    """Libraries differ on paths in a location, so even a listed file below is refused."""
    root = tiny_bundle(tmp_path)
    model = tiny_model()
    model.graph.initializer.append(external("w", [1], location="sub/w.data", length="4"))
    (root / GRAPH).write_bytes(model.SerializeToString())
    (root / "variants/fp32/sub").mkdir()
    (root / "variants/fp32/sub/w.data").write_bytes(bytes(4))
    manifest = replace(read_manifest(root), files=list_files(root))
    decode = manifest.variants["fp32-ort"].graphs["decode"]
    decode = replace(decode, data=(DATA, "variants/fp32/sub/w.data"))
    write_manifest(root, seal(with_variant(manifest, graphs={"decode": decode})))
    assert "tensor 'w' is stored in 'sub/w.data'" in open_refusal(root)


@pytest.mark.parametrize("offset", [OFFSET + TABLE.nbytes - 3, 2**62])
def test_external_data_must_lie_inside_its_file(tmp_path, offset):
    """A tensor may not reach past the end of the weights."""
    model = tiny_model()
    model.graph.initializer.append(
        external("w", [1], location="weights.data", offset=str(offset), length="4")
    )
    assert f"tensor 'w' ends at byte {offset + 4:,}" in graph_refusal(tmp_path, model)


def test_external_data_may_be_shared(tmp_path):
    """Two tensors over the same bytes are wanted: lowerings share one weights file."""
    model = tiny_model()
    model.graph.initializer.append(
        external("w", [4], location="weights.data", offset=str(OFFSET), length="16")
    )
    Bundle.open(tiny_bundle(tmp_path, model=model))


def _renamed(side: str) -> onnx.ModelProto:
    model = tiny_model()
    getattr(model.graph, side)[0].name = "other"
    return model


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (
            _renamed("input"),
            ["inputs.ids: the graph file has no such name", "inputs: 'other' of the graph file"],
        ),
        (
            _renamed("output"),
            ["outputs.logits: the graph file has no such", "outputs: 'other' of the graph file"],
        ),
    ],
    ids=["input", "output"],
)
def test_graph_names_must_be_the_wired_ones(tmp_path, model, messages):
    """Inputs and outputs of the file are exactly those of the wiring."""
    text = graph_refusal(tmp_path, model)
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"ai.onnx": 21}, f"{DECODE}: imports 'ai.onnx' 20, declared as 21 in opsets"),
        ({"com.microsoft": 1}, f"{DECODE}: imports 'ai.onnx' 20, not declared in opsets"),
        (
            {"ai.onnx": 20, "com.microsoft": 1},
            "variants.fp32-ort.opsets.com.microsoft: no graph imports it",
        ),
    ],
)
def test_opsets_are_those_of_the_graphs(tmp_path, declared, message):
    """What the manifest promises to a backend is what its graphs need."""
    text = graph_refusal(tmp_path, tiny_model(), edit=lambda m: with_variant(m, opsets=declared))
    assert message in text


def test_compiled_engine_inside_a_graph_is_refused(tmp_path):
    """EPContext nodes carry native code, or the path of some."""
    model = tiny_model()
    model.graph.node.append(
        helper.make_node("EPContext", [], ["e"], domain="com.microsoft", ep_cache_context="/x")
    )
    assert "'com.microsoft::EPContext' holds a compiled engine" in graph_refusal(tmp_path, model)


def test_broken_graph_is_refused_naming_the_byte(tmp_path):
    """A sealed bundle around a broken graph: the walker's own message comes through."""
    root = tiny_bundle(tmp_path)
    (root / GRAPH).write_bytes((root / GRAPH).read_bytes()[:-1])
    manifest = replace(read_manifest(root), files=list_files(root))
    write_manifest(root, seal(manifest))
    with pytest.raises(EdgertError, match="not a sound ONNX file") as caught:
        Bundle.open(root)
    assert f"{root / GRAPH}, byte " in (caught.value.where or "")
