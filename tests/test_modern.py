"""The modern dialect: operators of sets 23 and 24, and the same numbers as the portable graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tiny_decoder import decoder, imported

from edgert.backends import open_backend
from edgert.build.operators import parsed
from edgert.build.plan import plan_build
from edgert.build.target import find
from edgert.bundle import Bundle, read_manifest
from edgert.errors import Incompatible, MissingDependency, UnsupportedModel, UsageError
from edgert.export.check import too_old
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.forms import refusals
from edgert.models.layers import Heads
from edgert.runner import Runner

pytestmark = pytest.mark.skipif(
    too_old("modern") is not None, reason=f"{too_old('modern')} runs modern graphs"
)

NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding"}
BUNDLES = ["half_bundle", "half_looped"]


def operators(root: Path, variant: str) -> Counter[str]:
    files = [graph.file for graph in read_manifest(root).variants[variant].graphs.values()]
    graphs = [onnx.load(root / file, load_external_data=False).graph for file in files]
    return Counter(node.op_type for graph in graphs for node in graph.node)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_attention_norms_and_rotation_are_one_operator_each(bundle, request):
    """In place of several; the operator set says so, and 10.16 parses all of it, 10.3 does not."""
    root = request.getfixturevalue(bundle)
    modern, portable = (operators(root, f"fp32-{form}") for form in ("modern", "portable"))
    assert modern.keys() >= NEWER
    assert not portable.keys() & NEWER
    assert modern["Attention"] == portable["Softmax"]
    assert not modern.keys() & {"Softmax", "Sin", "Cos"}
    assert modern.total() < portable.total() * 0.75
    assert read_manifest(root).variants["fp32-modern"].opsets == {"ai.onnx": 24}
    assert modern.keys() <= parsed(find("agx-orin-jp7"))
    assert modern.keys() - parsed(find("orin-nano-jp6")) == NEWER


def fed(runner: Runner) -> dict[str, NDArray[np.generic]]:
    """Two rows of different lengths, prefilled in chunks, then stepped together: all logits, and
    what the states hold."""
    rng = np.random.default_rng(8)
    vocab = runner.manifest.vocab_size
    execution = runner.open(batch=2, tokens=24)
    logits = []
    for row, length in enumerate((11, 6)):
        for io in execution.row(row).feed(rng.integers(vocab, size=length), chunk=4):
            logits.append(io.logits.copy().ravel())
    for _ in range(5):
        io = execution.io()
        io.ids[:], io.select[:] = rng.integers(vocab, size=(2, 1)), 0
        io.run()
        logits.append(io.logits.copy().ravel())
    states = execution.states.buffers.items()
    return {"logits": np.concatenate(logits)} | {
        name: buffer.read().astype(np.float32) for name, buffer in states if name != "lens"
    }


@pytest.mark.parametrize(("precision", "share"), [("fp32", 3e-5), ("fp16", 0.01)])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_numbers_are_those_of_the_portable_graphs(bundle, precision, share, request):
    """Logits and states, to a share of the largest value: the gate's tolerances."""
    opened = Bundle.open(request.getfixturevalue(bundle), verify=False)
    found = []
    for form in ("portable", "modern"):
        runner = Runner(opened, f"{precision}-{form}", open_backend("cpu", threads=1))
        found.append(fed(runner))
        runner.close()
    portable, modern = found
    for name, want in portable.items():
        worst = float(np.abs(modern[name] - want).max())
        assert worst <= share * max(1.0, float(np.abs(want).max())), name


def test_the_target_chooses(half_bundle):
    """JetPack 7 prefers modern graphs and takes portable ones; JetPack 6 takes those alone."""
    bundle = Bundle.open(half_bundle, verify=False)
    for name, variant in (
        ("orin-nano-jp6", "fp16-portable"),
        ("agx-orin-jp7", "fp16-modern"),
        ("thor-jp7", "fp16-modern"),
        ("rtx-check", "fp16-portable"),
    ):
        assert plan_build(bundle, find(name)).variant == variant
    jp7 = find("agx-orin-jp7")
    assert plan_build(bundle, jp7, lowering="portable").variant == "fp16-portable"
    assert plan_build(bundle, jp7, "fp32").variant == "fp32-modern"
    with pytest.raises(UsageError, match="does not build lowering 'modern'"):
        plan_build(bundle, find("orin-nano-jp6"), lowering="modern")
    with pytest.raises(UsageError, match="does not build lowering 'ort'"):
        plan_build(bundle, jp7, lowering="ort")


def test_a_bundle_without_modern_graphs_is_built_from_portable_ones(half_solver):
    bundle = Bundle.open(half_solver, verify=False)
    assert plan_build(bundle, find("thor-jp7")).variant == "fp16-portable"
    with pytest.raises(Incompatible, match="takes modern graphs in fp16 or fp32") as caught:
        plan_build(bundle, find("thor-jp7"), lowering="modern")
    assert caught.value.do == "export it with --lowering modern --precision fp16"


def test_a_head_that_no_kernel_takes_is_refused():
    assert "head size 10" in refusals(Heads(2, 2, 10))["modern"]
    assert refusals(Heads(2, 2, 64)) == {}


def test_what_has_no_modern_form_says_so(tmp_path):
    from small_solver import random_network

    from edgert.models.importers.common import Imported

    source = Imported(*(random_network(), "random", None, None, None, (), {}, {}, ()))
    with pytest.raises(UnsupportedModel, match="it keeps no keys and values"):
        export_bundle(source, tmp_path / "out", ExportOptions(lowerings=("modern",)))


def test_an_old_onnx_runtime_is_refused_before_anything_is_traced(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    options = ExportOptions(lowerings=("modern",))
    with pytest.raises(MissingDependency, match=r"onnxruntime 1\.27 or newer is not installed"):
        export_bundle(imported(decoder()), tmp_path / "out", options)
