"""HAGI's graphs, stepped and unrolled, run by the runtime, equal the published model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import Case, assert_close, cases
from test_export import run_parts
from test_hagi import has_forward

import edgert
from edgert.backends import open_backend
from edgert.bundle import Bundle, read_manifest
from edgert.errors import GateFailed
from edgert.export import check, write
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.families import program as program_of
from edgert.models.importers import load_source
from edgert.models.program import Program
from edgert.runner import Runner

UNROLLED = ("model_d",)
"""Cases whose bundles have the unrolled form, too; with the long tests all of them have."""

FUSED_ONLY = ("model_c", "model_d_gated", "model_d_nogeo", "model_d_snapshot")
"""Cases that are exported in one lowering, which is quick; with the long tests in both."""

CASES = cases("hagi", has_forward)
BOTH_FORMS = [pytest.param((case, case.name in UNROLLED), id=case.name) for case in CASES] + [
    pytest.param((case, True), id=f"{case.name}-unrolled", marks=pytest.mark.full)
    for case in CASES
    if case.name not in UNROLLED
]


@pytest.fixture(scope="module", params=BOTH_FORMS)
def published(request, tmp_path_factory, model_a_bundle, looped_bundle) -> tuple[Case, Path]:
    """A case and its bundle."""
    case, unrolled = request.param
    if case.name == "model_a":
        return case, model_a_bundle
    if case.name == "model_d":
        return case, looped_bundle
    out = tmp_path_factory.mktemp("published") / case.name
    lowerings = ("ort",) if case.name in FUSED_ONLY and not unrolled else ("ort", "portable")
    export_bundle(
        load_source(case.checkpoint), out, ExportOptions(lowerings=lowerings, unrolled=unrolled)
    )
    return case, out


@contextmanager
def runner_of(bundle: Path, variant: str) -> Iterator[Runner]:
    runner = Runner(Bundle.open(bundle), variant, open_backend("cpu"))
    yield runner
    runner.close()


@pytest.mark.parametrize("how", ["prefill", "steps", "chunks"])
def test_graphs_equal_the_published_model(published, how) -> None:
    """Every slot's keys and values, then every logit, of a batch, however it is fed; of every
    variant of the bundle. Slots are iteration-major, as the published cache is."""
    case, bundle = published
    ids = case["input_ids"]
    batch, tokens = ids.shape
    parts = {
        "prefill": [tokens],
        "steps": [tokens // 2] + [1] * (tokens - tokens // 2),
        "chunks": [3, 1, 5, tokens - 9],
    }[how]
    for variant in read_manifest(bundle).variants:
        with runner_of(bundle, variant) as runner:
            execution = runner.open(batch=batch, tokens=tokens)
            logits = run_parts(execution, ids, parts)
            for name in ("k", "v"):
                for slot, want in enumerate(case[f"{name}_cache"]):
                    got = execution.states.buffers[f"{name}.{slot}"].host[:, :, :tokens]
                    where = f"{variant} {name}.{slot}"
                    assert_close(got, want, **case.tolerance, where=where)
            assert_close(logits, case["logits"], **case.tolerance, where=variant)
            assert execution.lens.tolist() == [tokens] * batch


def test_loaded_bundles_score_and_continue_like_the_published_model(published) -> None:
    """`edgert.load`: all logits, those of one token alone, and the greedy ids exactly."""
    case, bundle = published
    for variant in read_manifest(bundle).variants:
        with edgert.load(bundle, variant=variant) as model:
            assert_close(model.logits(case["input_ids"]), case["logits"], **case.tolerance)
            first = model.logits(case["input_ids"][:, :1])
            assert_close(first, case["logits_t1"], **case.tolerance, where="logits_t1")
            for prompt, want in zip(case["gen_prompt"], case["gen_ids"], strict=True):
                got = model.generate(prompt.tolist(), max_tokens=len(want), temperature=0.0)
                assert list(got.tokens) == want.tolist(), variant
                assert got.finish_reason == "length"


def test_a_trace_ends_with_the_logits_bit_for_bit(published) -> None:
    """Of a looped model: what it would say behind each iteration, and behind the last what it does
    say."""
    case, bundle = published
    manifest = read_manifest(bundle)
    if manifest.program.loop is None:
        pytest.skip("a model without a loop")
    for variant in (name for name in manifest.variants if not name.endswith("-unrolled")):
        with edgert.load(bundle, variant=variant) as model:
            for row in case["input_ids"]:
                *before, last = model.trace(row[None])
                assert len(before) + 1 == manifest.program.loop.iterations
                want = model.logits(row[None])
                np.testing.assert_array_equal(last.outputs["logits"], want)
                assert not any((step.outputs["logits"] == want).all() for step in before)


def test_stepped_equals_unrolled_bit_for_bit(published, tmp_path) -> None:
    """Prefill and decode, and a session that is saved in between."""
    case, bundle = published
    variants = read_manifest(bundle).variants
    unrolled = [name for name in variants if name.endswith("-unrolled")]
    if not unrolled:
        pytest.skip("this bundle has no unrolled form: no loop, or left to the long tests")
    prompt = case["input_ids"][0].tolist()
    for name in unrolled:
        said = []
        for variant in (name, name.removesuffix("-unrolled")):
            with edgert.load(bundle, variant=variant) as model:
                session = model.session()
                stream = session.stream(prompt, max_tokens=12, logprobs=3)
                got = [next(stream) for _ in range(5)]
                session.save(tmp_path / "s")
                with edgert.resume(tmp_path / "s") as resumed:
                    assert resumed.model.runner.variant_name == variant
                    got += list(resumed.stream())
            said.append([(p.token, p.logprob, p.alternatives) for p in got])
        assert said[0] == said[1]
        assert len(said[0]) == 12


def test_a_graph_is_small_and_has_each_weight_once(published) -> None:
    """Under 1,000 operators, also unrolled. The one file of all variants holds the model's own
    tensors, each once, however many executions share it."""
    case, bundle = published
    weights = program_of(load_source(case.checkpoint).model).weights
    own = {t.detach().numpy().tobytes() for t in (*weights.parameters(), *weights.buffers())}
    places: dict[tuple[int, int], bytes] = {}
    for path in sorted(bundle.rglob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        assert len(model.graph.node) < 1000, path.name
        data = (path.parent / "weights.data").read_bytes()
        for tensor in model.graph.initializer:
            keys = {entry.key: entry.value for entry in tensor.external_data}
            if keys:
                start, length = int(keys["offset"]), int(keys["length"])
                places[start, length] = data[start : start + length]
    assert len(places) == len(set(places.values()))
    assert len(places) > len(own) / 3
    assert set(places.values()) <= own


def broken(program: Program) -> Program:
    """All iterations share the rows of the first one."""
    perceive, reason, decode = program.graphs

    def first(wires: dict) -> dict:
        return {
            name: wire if isinstance(wire, str) else (wire[0],) * len(wire)
            for name, wire in wires.items()
        }

    shared = replace(reason, inputs=first(reason.inputs), outputs=first(reason.outputs))
    states = {end for wire in shared.inputs.values() for end in np.atleast_1d(wire).tolist()}
    states |= {end for graph in (perceive, decode) for end in graph.inputs.values()}
    kept = {name: spec for name, spec in program.states.items() if f"state.{name}" in states}
    reference = program.reference

    def truth(ids):
        found = reference(ids)
        return replace(found, states={n: t for n, t in found.states.items() if n in kept})

    return replace(
        program, graphs=(perceive, shared, decode), states=kept, reference=truth, unrolled=None
    )


def test_iterations_that_share_their_rows_fail_the_gate(tmp_path, monkeypatch) -> None:
    """A mistake that is easily made is caught before anything is written."""
    (case,) = [case for case in CASES if case.name == "model_b"]
    monkeypatch.setattr(write, "program_of", lambda model: broken(program_of(model)))
    with pytest.raises(GateFailed) as caught:
        export_bundle(
            load_source(case.checkpoint), tmp_path / "b", ExportOptions(lowerings=("portable",))
        )
    assert "differs from eager torch" in caught.value.what
    assert not (tmp_path / "b").exists()
    assert check.TOLERANCE["fp32"] < 1e-4
