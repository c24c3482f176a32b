"""A graph that computes something else does not become a bundle: broken on purpose, and seen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny_llama
import torch

from edgert.bundle import list_files, read_manifest, seal, write_manifest
from edgert.cli import main
from edgert.errors import GateFailed
from edgert.export import write
from edgert.export.check import check_bundle
from edgert.models import layers
from edgert.models.decoder import Decoder
from edgert.models.hagi.graphs import graphs
from edgert.models.hagi.model import HAGI
from edgert.models.importers import load_source
from edgert.models.program import Program

# ------------------------------------------------- broken inside the export, through the command


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder: two blocks, heads of 16, a tied embedding of 70 kB."""
    model = tiny_llama.tiny(vocab_size=550, tie_word_embeddings=True)
    return tiny_llama.save(model, tmp_path_factory.mktemp("source"))


@pytest.fixture
def place(tmp_path, tiny_bundle) -> Path:
    """Where an older bundle stands."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "place" / "model"))


def wrong_rotary_order(patch: pytest.MonkeyPatch) -> None:
    """The fused kernel rotates the halves of a head instead of neighbours."""
    change_attention(patch, lambda inputs, attributes: attributes.update(rotary_interleaved=0))


def forgotten_past(patch: pytest.MonkeyPatch) -> None:
    """The fused kernel is given zeros for what it has seen."""

    def change(inputs: list[torch.Tensor], attributes: dict[str, object]) -> None:
        inputs[3:5] = [past * 0.0 for past in inputs[3:5]]

    change_attention(patch, change)


def change_attention(patch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    symbolic = torch.onnx.ops.symbolic_multi_out

    def changed(op, inputs, attributes, **rest):
        inputs, attributes = list(inputs), dict(attributes)
        if op.endswith("GroupQueryAttention"):
            change(inputs, attributes)
        return symbolic(op, inputs, attributes, **rest)

    patch.setattr(torch.onnx.ops, "symbolic_multi_out", changed)


def hidden_past(patch: pytest.MonkeyPatch) -> None:
    """Keys and values are kept as they should be, but attention looks at this step's alone."""
    original = layers.Portable.__init__

    def changed(self, heads, cos, sin, lens, tokens, past):
        original(self, heads, cos, sin, lens, tokens, past)
        place = torch.arange(past[0].shape[2])
        old = (place[None] < lens[:, None])[:, None, None, None]
        self.bias = torch.where(old, layers.MASKED, self.bias)

    patch.setattr(layers.Portable, "__init__", changed)


def late_position(patch: pytest.MonkeyPatch) -> None:
    """Every token is taken to stand one place further on."""
    original = layers.Stateful.__init__

    def changed(self, heads, cos, sin, lens, tokens, past):
        original(self, heads, cos, sin, lens + 1, tokens, past)

    patch.setattr(layers.Stateful, "__init__", changed)


def wrong_weight(patch: pytest.MonkeyPatch) -> None:
    """One element of the first block's w_down is off by one."""
    original = write.trace

    def changed(program, graph, lowering):
        model = original(program, graph, lowering)
        name = next(name for name in model.graph.initializers if name.endswith("blocks.0.w_down"))
        values = model.graph.initializers[name].const_value.numpy().copy()
        values[3, 5] += 1.0
        model.graph.initializers[name].const_value = ir.Tensor(values, name=name)
        return model

    patch.setattr(write, "trace", changed)


def wrong_token(patch: pytest.MonkeyPatch) -> None:
    """Logits are right, but the graph's own choice is the one nearest to zero."""
    original = torch.Tensor.argmax
    patch.setattr(torch.Tensor, "argmax", lambda self, dim: original(-self.abs(), dim))


def copied_embedding(patch: pytest.MonkeyPatch) -> None:
    """The tied head multiplies with a transposed copy of the embedding, made before the trace."""
    original = write.program_of

    def changed(model):
        object.__setattr__(model, "copy", model.embed.detach().T.contiguous())
        return original(model)

    patch.setattr(write, "program_of", changed)
    patch.setattr(
        Decoder,
        "logits",
        lambda self, step, x: step.norm(x, self.final_norm, self.config.norm_eps) @ self.copy,
    )


BREAKAGES = [
    (wrong_rotary_order, "ort", "state 'k.0' differs", "variant fp32-ort, check 'prefill'"),
    (forgotten_past, "ort", "state 'k.0' differs", "variant fp32-ort, check 'steps'"),
    (hidden_past, "portable", "state 'k.1' differs", "variant fp32-portable, check 'steps'"),
    (late_position, "portable", "state 'k.0' differs", "variant fp32-portable, check 'prefill'"),
    (wrong_weight, "ort", "state 'k.1' differs", "variant fp32-ort, check 'prefill'"),
    (wrong_token, "ort", "result 'token' differs", "variant fp32-ort, check 'prefill', step 0"),
    (copied_embedding, "ort", "is not a weight of the model", "decode (ort)"),
]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("breakage", "lowering", "what", "where"), BREAKAGES, ids=[b[0].__name__ for b in BREAKAGES]
)
def test_a_broken_graph_is_found_and_named(
    breakage, lowering, what, where, source, place, monkeypatch, capsys
) -> None:
    """Exit code 6, the first difference by name, and an older bundle that is still whole."""
    before = content(place)
    breakage(monkeypatch)
    code = main(["export", str(source), "-o", str(place), "--lowering", lowering])
    out, err = capsys.readouterr()
    assert (code, out) == (6, "")
    assert what in err
    assert f"  where  {where}" in err
    assert "Traceback" not in err
    assert "verdict pass" not in err
    assert content(place) == before
    assert os.listdir(place.parent) == [place.name]


def test_nothing_appears_where_nothing_was(source, tmp_path, monkeypatch, capsys) -> None:
    """A failed export leaves its folder empty; the failure is the same with --json."""
    wrong_weight(monkeypatch)
    out = tmp_path / "new" / "model"
    code = main(["export", str(source), "-o", str(out), "--lowering", "ort", "--json"])
    assert (code, capsys.readouterr().out) == (6, "")
    assert os.listdir(out.parent) == []


# ------------------------------------------------- broken afterwards, against the gate itself


@pytest.fixture(scope="module")
def model_a(model_a_checkpoint) -> HAGI:
    return load_source(model_a_checkpoint).model


@pytest.fixture
def program(model_a) -> Program:
    return graphs(model_a)


def change_weight(bundle: Path, old: torch.Tensor, change: Callable[[np.ndarray], None]) -> None:
    """Change one tensor wherever a bundle keeps it, and seal the bundle as if it were sound."""
    new = old.numpy().copy()
    change(new)
    files = {path: path.read_bytes() for path in (bundle / "variants").rglob("*.*")}
    holders = [path for path, data in files.items() if data.count(old.numpy().tobytes()) == 1]
    assert holders
    for path in holders:
        path.write_bytes(files[path].replace(old.numpy().tobytes(), new.tobytes()))
    write_manifest(bundle, seal(replace(read_manifest(bundle), files=list_files(bundle))))


def test_a_sound_bundle_passes_every_check(model_a_bundle, program) -> None:
    """So that the failures below are the change's and not the gate's."""
    verdict = check_bundle(model_a_bundle, program)
    assert len(verdict.checks) == 8
    assert all(check.worst_share < 0.5 for check in verdict.checks)


WEIGHTS = [
    ("embed", "k.0"),
    ("perception.0.attn_norm", "k.0"),
    ("perception.0.wo", "k.1"),
    ("perception.1.w_down", "k.2"),
    ("reasoning.1.w_gate_up", "k.4"),
    ("iter_embed", "k.4"),
    ("expression.0.w_down", "logits"),
    ("final_norm", "logits"),
]


@pytest.mark.parametrize(("weight", "first"), WEIGHTS, ids=[w[0] for w in WEIGHTS])
def test_one_wrong_weight_is_found_where_it_shows_first(
    weight, first, model_a_bundle, model_a, program, copied
) -> None:
    """What a block computes shows in the next block's keys, before any logit."""
    bundle = copied(model_a_bundle)

    def change(values: np.ndarray) -> None:
        if weight == "embed":
            values += 0.1  # whichever tokens the gate draws
        else:
            values.flat[values.size // 2] += 0.5

    change_weight(bundle, dict(model_a.named_parameters())[weight].detach(), change)
    kind = "result" if first == "logits" else "state"
    with pytest.raises(GateFailed, match=f"^{kind} '{first}' differs from eager torch") as failure:
        check_bundle(bundle, program)
    assert failure.value.where.startswith("variant fp32-ort, check 'prefill', ")


def test_values_that_are_no_numbers_never_pass(model_a_bundle, model_a, program, copied) -> None:
    """NaN is no small difference."""
    bundle = copied(model_a_bundle)
    weight = model_a.reasoning[0].w_down.detach()
    change_weight(bundle, weight, lambda values: values.fill(np.nan))
    with pytest.raises(GateFailed, match=r"state 'k\.3' differs .*: nan instead of "):
        check_bundle(bundle, program)


def test_a_model_that_computes_no_numbers_never_passes(model_a_bundle, model_a_checkpoint) -> None:
    """Where eager torch itself says NaN, equality proves nothing."""
    model = load_source(model_a_checkpoint).model
    model.perception[1].w_down[:] = torch.nan
    with pytest.raises(GateFailed, match="instead of nan"):
        check_bundle(model_a_bundle, graphs(model))


def test_the_place_of_the_difference_is_exact(model_a_bundle, program) -> None:
    """Variant, check, step, position, index and both values, for one wrong logit of the truth."""
    truth = program.reference

    def one_wrong(ids):
        reference = truth(ids)
        reference.logits[0, 17, 42] += 10.0
        return reference

    with pytest.raises(GateFailed) as failure:
        check_bundle(model_a_bundle, replace(program, reference=one_wrong))
    assert failure.value.where == (
        "variant fp32-ort, check 'prefill', step 0, position 0, index (17, 42)"
    )
    assert "difference 10, limit" in failure.value.what


def test_both_lowerings_are_checked(model_a_bundle, program, model_a, copied) -> None:
    """A fault in the second variant alone is found too."""
    bundle = copied(model_a_bundle)
    graph = bundle / "variants/fp32/decode-portable.onnx"
    model = ir.load(graph)
    norm = next(v for v in model.graph.initializers.values() if v.name.endswith("final_norm"))
    norm.const_value = ir.Tensor(norm.const_value.numpy() * 1.01, name=norm.name)
    ir.save(model, graph)
    write_manifest(bundle, seal(replace(read_manifest(bundle), files=list_files(bundle))))
    with pytest.raises(GateFailed, match="result 'logits' differs") as failure:
        check_bundle(bundle, program)
    assert failure.value.where.startswith("variant fp32-portable, check 'prefill'")


# ------------------------------------------------- interrupted


def test_an_interrupted_export_leaves_nothing(source, place, monkeypatch, capsys) -> None:
    """Ctrl-C in the middle of the gate: exit code 130, the older bundle whole, no litter."""

    def interrupt(*args: object) -> None:
        assert [p.suffix for p in place.parent.iterdir() if p != place] == [".export"]
        raise KeyboardInterrupt

    before = content(place)
    monkeypatch.setattr(write, "check_bundle", interrupt)
    assert main(["export", str(source), "-o", str(place), "--lowering", "ort"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert content(place) == before
    assert os.listdir(place.parent) == [place.name]


KILLED = """
import sys, time
from edgert.cli import main
from edgert.export import write

def wait(*args):
    print("ready", flush=True)
    time.sleep(60)

write.check_bundle = wait
main(["export", sys.argv[1], "-o", sys.argv[2], "--lowering", "ort", "--quiet"])
"""


def test_a_killed_export_leaves_no_half_bundle(model_a_checkpoint, tmp_path) -> None:
    """After kill -9 only the hidden folder is left, and the next export removes it."""
    out = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model_a_checkpoint), str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".model.")
    assert left.endswith(".export")
    with write.workshop(out):
        assert not (tmp_path / left).exists()
    assert os.listdir(tmp_path) == []
