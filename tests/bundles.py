"""A tiny sealed bundle for tests: a one-graph decoder whose state a reader can compute by hand.

The graph counts: k.0 keeps every id as a float, logits are a fixed table's rows plus the sum of
the ids kept so far, so a wrong state shows in the logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgert.bundle import Bundle, list_files, seal, write_manifest
from edgert.errors import BadBundle
from edgert.spec import (
    GraphSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TensorSpec,
    TokenizerSpec,
    VariantSpec,
)

VOCAB = 300
GRAPH = "variants/fp32/decode-ort.onnx"
DATA = "variants/fp32/weights.data"
DECODE = "variants.fp32-ort.graphs.decode"  # where the manifest describes the graph
OFFSET = 64  # where the table starts in the weights file
TABLE = np.random.default_rng(7).standard_normal((VOCAB, VOCAB)).astype(np.float32)


def external(name: str, shape: list[int], **keys: str) -> TensorProto:
    """A float32 tensor that is stored outside, with exactly these external_data keys."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in keys.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def tiny_model() -> onnx.ModelProto:
    """ids [B, T], select [B, S], k [B, 1, C, 1], lens [B] -> logits, token, k."""
    value, i64, f32 = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
    state = ["batch", 1, "capacity", 1]
    nodes = [
        # rows of k.0 to write: lens[b] + t
        helper.make_node("Shape", ["ids"], ["t"], start=1, end=2),
        helper.make_node("Squeeze", ["t"], ["t0"]),
        helper.make_node("Range", ["zero", "t0", "one"], ["steps"]),
        helper.make_node("Unsqueeze", ["lens", "minus1"], ["lens_col"]),
        helper.make_node("Add", ["lens_col", "steps"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "axes13"], ["index"]),
        helper.make_node("Cast", ["ids"], ["ids_f"], to=f32),
        helper.make_node("Unsqueeze", ["ids_f", "axes13"], ["update"]),
        helper.make_node("ScatterElements", ["k.0", "index", "update"], ["k.0_next"], axis=2),
        # rows that are stale lie past lens + t and must not count
        helper.make_node("Shape", ["k.0"], ["c"], start=2, end=3),
        helper.make_node("Squeeze", ["c"], ["c0"]),
        helper.make_node("Range", ["zero", "c0", "one"], ["places"]),
        helper.make_node("Unsqueeze", ["rows", "minus1"], ["rows_col"]),
        helper.make_node("LessOrEqual", ["places", "rows_col"], ["seen"]),
        helper.make_node("Cast", ["seen"], ["seen_f"], to=f32),
        helper.make_node("Squeeze", ["k.0_next", "axes1"], ["kept"]),
        helper.make_node("MatMul", ["seen_f", "kept"], ["sums"]),
        helper.make_node("Gather", ["table", "ids"], ["scores"]),
        helper.make_node("Add", ["scores", "sums"], ["all"]),
        helper.make_node("Unsqueeze", ["select", "minus1"], ["select_col"]),
        helper.make_node("GatherND", ["all", "select_col"], ["logits"], batch_dims=1),
        helper.make_node("ArgMax", ["logits"], ["token"], axis=-1, keepdims=0),
    ]
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "minus1": np.array([-1]),
        "axes1": np.array([1]),
        "axes13": np.array([1, 3]),
    }
    table = external(
        "table",
        [VOCAB, VOCAB],
        location="weights.data",
        offset=str(OFFSET),
        length=str(TABLE.nbytes),
    )
    graph = helper.make_graph(
        nodes,
        "decode",
        inputs=[
            value("ids", i64, ["batch", "tokens"]),
            value("select", i64, ["batch", "select"]),
            value("k.0", f32, state),
            value("lens", i64, ["batch"]),
        ],
        outputs=[
            value("logits", f32, ["batch", "select", VOCAB]),
            value("token", i64, ["batch", "select"]),
            value("k.0_next", f32, state),
        ],
        initializer=[table, *(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tiny_manifest() -> Manifest:
    """The manifest of the tiny bundle without `files` and identities."""
    decode = GraphSpec(
        file=GRAPH,
        data=(DATA,),
        inputs={
            "ids": "input.ids",
            "select": "input.select",
            "k.0": "state.k.0",
            "lens": "state.lens",
        },
        outputs={"logits": "result.logits", "token": "result.token", "k.0_next": "state.k.0"},
    )
    return Manifest(
        name="tiny",
        summary="counts what it has read",
        model_id="",
        weights_id="ab" * 32,
        parameters=VOCAB * VOCAB,
        vocab_size=VOCAB,
        context=64,
        program=ProgramSpec(epilogue="decode"),
        inputs={
            "ids": TensorSpec("int64", ("batch", "tokens")),
            "select": TensorSpec("int64", ("batch", "select")),
        },
        results={
            "logits": TensorSpec("float32", ("batch", "select", VOCAB)),
            "token": TensorSpec("int64", ("batch", "select")),
        },
        states={
            "k.0": StateSpec("append", "float32", ("batch", 1, "capacity", 1), "capacity", "lens"),
            "lens": StateSpec("counter", "int64", ("batch",)),
        },
        variants={"fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, {"decode": decode})},
        eos=(256,),
        bos=257,
        tokenizer=TokenizerSpec("bytes"),
        chat_template="chat_template.jinja",
        sampling={"temperature": 0.5},
        provenance={"source": "tests/bundles.py", "nested": {"list": [1, "two"]}},
        requires={"onnxruntime": ">=1.23"},
        reports=("reports/parity.json",),
    )


def tiny_bundle(
    tmp_path: Path,
    *,
    name: str = "tiny",
    edit: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    model: onnx.ModelProto | None = None,
) -> Path:
    """Write a sealed bundle to `tmp_path / name` and return that path.

    `edit` changes the manifest before it is sealed; `model` replaces the decode graph.
    """
    root = tmp_path / name
    shutil.rmtree(root, ignore_errors=True)
    (root / "variants/fp32").mkdir(parents=True)
    (root / "reports").mkdir()
    (root / GRAPH).write_bytes((model or tiny_model()).SerializeToString())
    (root / DATA).write_bytes(bytes(OFFSET) + TABLE.tobytes())
    (root / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    (root / "reports/parity.json").write_text('{"verdict": "pass"}\n')
    write_manifest(root, seal(edit(replace(tiny_manifest(), files=list_files(root)))))
    return root


def with_variant(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with these fields of its variant changed."""
    variant = replace(manifest.variants["fp32-ort"], **changes)
    return replace(manifest, variants={"fp32-ort": variant})


def wired(manifest: Manifest, graph: str, side: str, port: str, end: str | None) -> Manifest:
    """The manifest with one connection changed, or removed."""
    variant = manifest.variants["fp32-ort"]
    spec = variant.graphs[graph]
    ports = {**getattr(spec, side), port: end}
    ports = {name: to for name, to in ports.items() if to is not None}
    graphs = {**variant.graphs, graph: replace(spec, **{side: ports})}
    return replace(manifest, variants={"fp32-ort": replace(variant, graphs=graphs)})


def open_refusal(root: Path, verify: Any = "stamp") -> str:
    """What `Bundle.open` says against the bundle at `root`."""
    with pytest.raises(BadBundle) as caught:
        Bundle.open(root, verify=verify)
    assert str(root) in (caught.value.where or "")
    return caught.value.what
