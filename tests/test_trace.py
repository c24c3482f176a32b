"""One graph from torch to ONNX: names, axes, operators, and weights that are stored once."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny_decoder import decoder

from edgert.errors import EdgertError, GateFailed
from edgert.export.trace import IR_VERSION, OPSETS, trace
from edgert.export.weights import LARGE_BYTES, WeightsFile, check_weights, strip
from edgert.models.decoder import Decoder, graphs
from edgert.models.program import Program, TracedGraph
from edgert.spec import Lowering

LOWERINGS: tuple[Lowering, ...] = ("ort", "portable")
lowerings = pytest.mark.parametrize("lowering", LOWERINGS)


@pytest.fixture(scope="module")
def model() -> Decoder:
    """One block; an embedding that is large enough for `check_weights` to look at."""
    return decoder(num_layers=1, vocab_size=700, head_size=16)


@pytest.fixture(scope="module")
def program(model) -> Program:
    return graphs(model)


@pytest.fixture(scope="module")
def protos(program) -> dict[Lowering, onnx.ModelProto]:
    """Each lowering as the exporter gives it; a test that changes one copies it."""
    return {
        lowering: ir.to_proto(trace(program, program.graphs[0], lowering)) for lowering in LOWERINGS
    }


def copy_of(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))


@lowerings
def test_the_graph_has_the_names_types_and_axes_of_the_program(program, protos, lowering) -> None:
    """Every input and output is the tensor that its endpoint declares, axis by axis."""
    graph, proto = program.graphs[0], protos[lowering].graph
    for values, wiring in ((proto.input, graph.inputs), (proto.output, graph.outputs)):
        assert [value.name for value in values] == list(wiring)
        for value in values:
            spec = program.tensor_of(wiring[value.name])
            tensor = value.type.tensor_type
            axes = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            assert (value.name, dtype, axes) == (value.name, np.dtype(spec.dtype), spec.shape)


@lowerings
def test_versions_stay_what_old_runtimes_read(protos, lowering) -> None:
    """The default operator set is the newest that TensorRT 10.3 parses; so is the IR version."""
    versions = {entry.domain: entry.version for entry in protos[lowering].opset_import}
    assert versions[""] == OPSETS[lowering] <= 20
    assert protos[lowering].ir_version == IR_VERSION <= 11


def test_portable_uses_standard_operators_alone(protos) -> None:
    """No other domain is imported or used, and the ONNX checker has no complaint."""
    proto = protos["portable"]
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert {node.domain for node in proto.graph.node} == {""}
    onnx.checker.check_model(proto, full_check=True)


def test_ort_uses_the_fused_operators(protos) -> None:
    """One attention per block, and every residual add fused with the norm behind it."""
    fused = [node.op_type for node in protos["ort"].graph.node if node.domain == "com.microsoft"]
    assert fused.count("GroupQueryAttention") == 1
    assert fused.count("SkipSimplifiedLayerNormalization") == 1


@lowerings
def test_every_weight_is_stored_as_the_model_keeps_it(model, protos, lowering) -> None:
    """Each parameter's bytes occur exactly once: no transposed, fused or repeated copy."""
    stored = [
        onnx.numpy_helper.to_array(tensor).tobytes()
        for tensor in protos[lowering].graph.initializer
    ]
    for name, parameter in model.named_parameters():
        assert stored.count(parameter.numpy().tobytes()) == 1, name
    check_weights(copy_of(protos[lowering]), model, "decode")


@lowerings
def test_stripped_graphs_tell_nothing_of_this_machine(protos, lowering) -> None:
    """The exporter's stack traces and module paths are gone."""
    model = copy_of(protos[lowering])
    assert any(node.metadata_props for node in model.graph)
    strip(model)
    data = ir.to_proto(model).SerializeToString()
    for word in (b"site-packages", b".py", b"pytorch", b"stack_trace", str(Path.home()).encode()):
        assert word not in data
    assert model.producer_name == "edgert"


class Unforeseeable(torch.nn.Module):
    """Its control flow depends on data, which a graph cannot."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids + 1 if int(ids.sum()) else ids


def test_a_graph_that_cannot_be_traced_says_so(program, capfd) -> None:
    """The error names graph and lowering; the exporter's own report stays off the terminal."""
    broken = TracedGraph(
        "guess", lambda lowering: Unforeseeable(), {"ids": "input.ids"}, {"out": "result.token"}
    )
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(EdgertError, match="graph 'guess' could not be traced") as failure:
        trace(replace(program, graphs=(broken,)), broken, "portable")
    assert failure.value.where == "lowering portable"
    assert "--debug" in str(failure.value)
    assert failure.value.__cause__ is not None
    assert capfd.readouterr().out == ""
    assert logging.getLogger("torch.onnx").level == level


def test_a_repeated_weight_is_refused(model, protos) -> None:
    """A second copy of the embedding under another name."""
    graph = copy_of(protos["ort"])
    name, tensor = next(
        (name, value.const_value)
        for name, value in graph.graph.initializers.items()
        if value.const_value.nbytes >= LARGE_BYTES
    )
    graph.graph.register_initializer(
        ir.Value(name="again", const_value=ir.Tensor(tensor.numpy().copy(), name="again"))
    )
    with pytest.raises(GateFailed, match=f"'again' .* repeats '{name}'") as failure:
        check_weights(graph, model, "decode (ort)")
    assert failure.value.where == "decode (ort)"


def test_a_folded_weight_is_refused(model, protos) -> None:
    """A transposed embedding is no weight of the model."""
    graph = copy_of(protos["ort"])
    folded = np.ascontiguousarray(model.embed.numpy().T)
    graph.graph.register_initializer(
        ir.Value(name="folded", const_value=ir.Tensor(folded, name="folded"))
    )
    with pytest.raises(GateFailed, match=r"'folded' \(0.1 MB\) is not a weight of the model"):
        check_weights(graph, model, "decode (ort)")


def test_one_file_holds_every_weight_once(protos, tmp_path) -> None:
    """Two lowerings share page-aligned tensors; small ones stay in the graph."""
    saved = {}
    with WeightsFile(tmp_path / "weights.data") as weights:
        sizes = []
        for lowering in LOWERINGS:
            saved[lowering] = copy_of(protos[lowering])
            weights.externalize(saved[lowering])
            sizes.append(weights.nbytes)
    assert sizes[0] == sizes[1] == (tmp_path / "weights.data").stat().st_size
    places = []
    for lowering, model in saved.items():
        path = tmp_path / f"{lowering}.onnx"
        ir.save(model, path)
        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            small = int(np.prod(tensor.dims)) * 4 < 1024
            assert small or entries, tensor.name
            if entries:
                assert entries["location"] == "weights.data"
                assert int(entries["offset"]) % 4096 == 0
                places.append((lowering, entries["offset"]))
        onnx.load(path)  # and the values are found again
    shared = [{o for name, o in places if name == lowering} for lowering in LOWERINGS]
    assert len(shared[0] & shared[1]) >= 5
