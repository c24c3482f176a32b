"""`edgert export --kv int8`: keys and values as codes, calibrated on a text, gated over the graph's
own codes, saved and resumed as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tiny_decoder import decoder, imported, speaking

import edgert
from edgert.backends import open_backend
from edgert.bundle import Bundle
from edgert.errors import GateFailed, Incompatible, SessionMismatch, UnsupportedModel, UsageError
from edgert.export import kv_int8, write
from edgert.export.accuracy import sample, tokenizer_of
from edgert.export.kv_int8 import Int8KV, ranges
from edgert.export.recipe import read_recipe
from edgert.export.write import Exported, ExportOptions, export_bundle
from edgert.models.families import program as program_of
from edgert.models.importers import Imported
from edgert.models.importers.fresh import fresh_source
from edgert.models.layers import Cache, paired, rotate
from edgert.runner import Execution, Runner
from edgert.sessionfile import read_session

ALL = ExportOptions(precision="fp32,int4", kv="fp32,int8", lowerings=("ort",))
INT8 = ExportOptions(kv="int8", lowerings=("ort",))

LOOPED: dict[str, Any] = {
    "family": "hagi",
    "vocab_size": 256,
    "hidden_size": 64,
    "perception_layers": 1,
    "reasoning_layers": 1,
    "expression_layers": 1,
    "loop_count": 3,
    "use_loop": True,
    "use_gdr": True,
    "transformer": {
        "hidden_size": 64,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 96,
        "max_seq_len": 512,
    },
    "grades": {"scalar": 8, "vector": 16, "bivector": 16, "trivector": 8, "residual": 16},
}

TIES = 1e-3
"""Codes of which one side rounds another way than the other, at most: numbers of about 1e-6 of the
range away from each other, in codes of 1 / 127 of it, straddle a tie with a chance of 1e-4."""

Codes = NDArray[np.int8]
Floats = NDArray[np.float32]


def looped_source() -> Imported:
    """A looped HAGI that reads bytes, wide enough that its keys fill their codes."""
    found = fresh_source(LOOPED, 3, Path("looped.toml"))
    for parameter in found.model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8)
    return replace(found, byte_offset=0)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Exported:
    """`tiny_decoder.speaking` in two precisions, each with keys and values in float32 and int8."""
    return export_bundle(speaking(), tmp_path_factory.mktemp("kv") / "spoken", ALL)


@pytest.fixture(scope="module")
def looped(tmp_path_factory) -> Exported:
    """A looped model with int8 keys and values alone, stepped and unrolled."""
    options = replace(INT8, unrolled=True)
    return export_bundle(looped_source(), tmp_path_factory.mktemp("kv") / "looped", options)


@pytest.fixture(scope="module")
def scales(spoken) -> dict[str, Floats]:
    return scales_in(spoken.path / "variants/fp32/decode-kv8-ort.onnx")


def scales_in(path: Path) -> dict[str, Floats]:
    """The scales [m, d] that a graph holds, by state."""
    found = onnx.load(path).graph.initializer
    return {
        tensor.name.removesuffix(".scale"): onnx.numpy_helper.to_array(tensor)[0, :, 0].copy()
        for tensor in found
        if tensor.name.endswith(".scale")
    }


def codes_of(scales: Mapping[str, Floats], name: str, values: torch.Tensor) -> Codes:
    """Values [1, m, T, d] -> their codes."""
    inverse = 1 / scales[name][:, None]
    return np.rint(values.numpy() * inverse).clip(-128, 127).astype(np.int8)


def fed(execution: Execution, ids: NDArray[np.int64], parts: list[int]) -> Floats:
    """Feed ids [T] in parts; the logits of all positions [T, V]."""
    found, start = [], 0
    for part in parts:
        execution.reserve(start + part)
        io = execution.io(part, part)
        io.ids[0], io.select[0] = ids[start : start + part], np.arange(part)
        io.run()
        found.append(io.logits[0].copy())
        start += part
    return np.concatenate(found)


def held(execution: Execution, tokens: int) -> dict[str, Codes]:
    """The codes that are in the state, [1, m, T, d]."""
    buffers = execution.states.buffers
    return {n: b.host[:, :, :tokens].copy() for n, b in buffers.items() if b.dtype == np.int8}


def assert_ties(got: Codes, want: Codes, where: str) -> None:
    """Equal, but for a few that are one apart."""
    apart = np.abs(got.astype(int) - want)
    assert apart.max() <= 1, where
    assert (apart > 0).mean() <= TIES, where


@pytest.fixture
def runner(spoken) -> Iterator[Runner]:
    made = Runner(Bundle.open(spoken.path), "fp32-kv8-ort", open_backend("cpu", threads=1))
    yield made
    made.close()


# What the operator means


def attention(heads: int, kv: int, size: int) -> onnxruntime.InferenceSession:
    """GroupQueryAttention over int8 keys and values, everything an input of the graph."""
    names = ["qkv", "", "", "k", "v", "last", "total", "", "", "", "", "", "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "k_next", "v_next"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    value, i8, f32 = helper.make_tensor_value_info, TensorProto.INT8, TensorProto.FLOAT
    state, scale = ["batch", kv, "capacity", size], [1, kv, 1, size]
    graph = helper.make_graph(
        [node],
        "attention",
        [
            value("qkv", f32, ["batch", "tokens", (heads + 2 * kv) * size]),
            *(value(name, i8, state) for name in ("k", "v")),
            value("last", TensorProto.INT32, ["batch"]),
            value("total", TensorProto.INT32, []),
            *(value(name, f32, scale) for name in ("k_scale", "v_scale")),
        ],
        [value("out", f32, ["batch", "tokens", heads * size])]
        + [value(name, i8, state) for name in ("k_next", "v_next")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("parts", [[12], [5, 1, 6], [4] + [1] * 8], ids=str)
def test_attention_reads_codes_times_scales_and_its_own_tokens_like_the_others(parts) -> None:
    """In plain numpy: channels head by head, codes rounded half to even and saturated at both ends,
    and no key or value read as it was before it became a code."""
    heads, kv, size, tokens = 4, 2, 8, 12
    rng = np.random.default_rng(5)
    qkv = rng.standard_normal((1, tokens, (heads + 2 * kv) * size)).astype(np.float32)
    scale = rng.uniform(0.5, 3.0, (2, kv, size)).astype(np.float32) / 127
    scale[0, 1, 0] = 0.5
    qkv[0, 0, (heads + 1) * size] = 1.25  # a tie: 2.5 codes
    q, k, v = np.split(qkv[0].reshape(tokens, -1, size).swapaxes(0, 1), [heads, heads + kv])
    codes = [np.rint(x / s[:, None]).clip(-128, 127) for x, s in zip((k, v), scale, strict=True)]
    assert codes[0].min() == -128
    assert codes[0].max() == 127
    assert codes[0][1, 0, 0] == 2
    k, v = (
        np.repeat(x * s[:, None], heads // kv, 0).astype(np.float64)
        for x, s in zip(codes, scale, strict=True)
    )
    scores = q @ k.swapaxes(-1, -2) / size**0.5
    scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(tokens, -1)

    session = attention(heads, kv, size)
    state = [np.zeros((1, kv, 16, size), np.int8) for _ in range(2)]
    given = {
        "k_scale": scale[:1].reshape(1, kv, 1, size),
        "v_scale": scale[1:].reshape(1, kv, 1, size),
    }
    found, start = [], 0
    for part in parts:
        end = start + part
        given |= {"qkv": qkv[:, start:end], "k": state[0], "v": state[1]}
        given |= {"last": np.array([end - 1], np.int32), "total": np.array(end, np.int32)}
        out, *state = session.run(None, given)
        found.append(out[0])
        start = end
    for got, exact in zip(state, codes, strict=True):
        np.testing.assert_array_equal(got[0, :, :tokens], exact)
    np.testing.assert_allclose(np.concatenate(found), want, atol=2e-6)


# The bundle


def test_each_precision_has_a_variant_that_keeps_codes(spoken) -> None:
    """The same weights file for both; the states of the other variants are as ever."""
    made = spoken.manifest
    assert list(made.variants) == ["fp32-ort", "fp32-kv8-ort", "int4-ort", "int4-kv8-ort"]
    assert made.format_version == 4
    assert {name: made.kv_of(name) for name in made.variants} == {
        "fp32-ort": "fp32",
        "fp32-kv8-ort": "int8",
        "int4-ort": "fp32",
        "int4-kv8-ort": "int8",
    }
    kept = made.variants["int4-kv8-ort"].state_dtypes
    assert kept == dict.fromkeys(["k.0", "v.0", "k.1", "v.1"], "int8")
    assert made.states_of("int4-ort") == made.states
    data = [graph.data for v in made.variants.values() for graph in v.graphs.values()]
    assert data[0] == data[1] != data[2] == data[3]


def test_a_bundle_without_int8_is_as_before(tmp_path) -> None:
    """Its format, and what is in it."""
    made = export_bundle(imported(decoder()), tmp_path / "b", ExportOptions(lowerings=("ort",)))
    text = (made.path / "manifest.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert "state_dtypes" not in text
    assert made.manifest.requires == {"onnxruntime": ">=1.23"}


def test_the_gate_is_as_tight_as_for_float32(spoken) -> None:
    """States: how far beyond the rounding of its code a number is. Logits: of the same codes."""
    report = json.loads((spoken.path / "parity.json").read_text())
    checks = [
        c for c in report["checks"] if "kv8" in c["variant"] and c["activations"] == "float32"
    ]
    assert [c["name"] for c in checks] == ["prefill", "steps", "chunks", "batch"] * 2
    assert all(c["logits_max_abs"] < 2e-4 and c["states_max_abs"] < 1e-5 for c in checks)


BROKEN = ["a scale 1 % off", "keys with the values' scales", "heads swapped", "per token"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_graph_that_rounds_otherwise_fails_the_gate(
    how, tmp_path, monkeypatch, traced_once
) -> None:
    """And nothing is published."""
    real = Int8KV.rewrite

    def broken(self: Int8KV, model: Any, inputs: Any) -> None:
        scales = {name: scale.copy() for name, scale in self.scales.items()}
        if how == "a scale 1 % off":
            scales["v.1"][0, 3] *= 1.01
        elif how == "keys with the values' scales":
            scales["k.0"] = scales["v.0"]
        elif how == "heads swapped":
            scales["k.1"] = scales["k.1"][::-1]
        real(Int8KV(scales), model, inputs)
        if how == "per token":
            for node in model.graph:
                if node.op_type == "GroupQueryAttention":
                    for place in (12, 13):
                        value = node.inputs[place].const_value
                        value.numpy()[:] = value.numpy().mean()

    monkeypatch.setattr(Int8KV, "rewrite", broken)
    with pytest.raises(GateFailed, match=r"state '[kv]\.\d' differs from eager torch"):
        export_bundle(speaking(), tmp_path / "bundle", INT8)
    assert not (tmp_path / "bundle").exists()


def test_what_it_costs_is_measured_and_said(spoken, run) -> None:
    """Like that of weights; of a variant with both, both together."""
    found = spoken.accuracy["variants"]
    assert list(found) == ["fp32-kv8-ort", "int4-ort", "int4-kv8-ort"]
    assert [one["kv"] for one in found.values()] == ["int8", "fp32", "int8"]
    assert [one["scheme"] is None for one in found.values()] == [True, False, False]
    assert [one["budget"] for one in found.values()] == [1.005, 1.03, 1.03515]
    assert 0 < found["fp32-kv8-ort"]["kl"] < found["int4-ort"]["kl"]
    told = run("inspect", spoken.path).out.splitlines()
    assert len([line for line in told if line.startswith("accuracy")]) == 3


def test_inspect_shows_what_each_variant_keeps(spoken, run) -> None:
    told = run("inspect", spoken.path).out
    rows = {"fp32-ort": "state 512 B a token, 524.3 kB", "fp32-kv8-ort": "state 128 B a token"}
    for name, row in rows.items():
        (line,) = (line for line in told.splitlines() if line.startswith(f"variant   {name} "))
        assert row in line
    value = json.loads(run("inspect", spoken.path, "--json").out)
    assert value["variant_state_bytes_per_token"]["int4-kv8-ort"] == 2 * 2 * 2 * 16
    assert "onnxruntime >=1.23, >=1.27 for keys and values in int8" in told


# The numbers


def test_it_computes_what_eager_torch_computes_with_rounded_keys_and_values(runner, scales) -> None:
    """Torch rounds by itself: codes are equal but for ties. One that falls the other way moves what
    attention gives by at most 1 / 127 of a channel's range, so logits stay within a per cent."""
    reference = program_of(speaking().model).reference
    assert reference is not None
    ids = np.random.default_rng(1).integers(0, 267, 400)
    exact = reference(torch.from_numpy(ids[None]))
    want = reference(torch.from_numpy(ids[None]), Int8KV(scales).rounding())
    execution = runner.open(tokens=len(ids))
    got = fed(execution, ids, [len(ids)])
    for name, codes in held(execution, len(ids)).items():
        assert_ties(codes, codes_of(scales, name, want.states[name]), name)
    size = np.abs(want.logits.numpy()).max()
    assert np.abs(got - want.logits[0].numpy()).max() < 0.01 * size
    assert np.abs(got - exact.logits[0].numpy()).max() > 1e-3 * size, "it rounds nothing"


def test_steps_and_chunks_equal_the_whole_sequence_also_where_the_state_grows(runner) -> None:
    """From a capacity of 256 into the next one, whose codes are copied."""
    ids = np.random.default_rng(2).integers(0, 267, 300)
    whole = runner.open(tokens=len(ids))
    want = fed(whole, ids, [len(ids)])
    for parts in ([250, *[1] * 50], [7, 1, 92, 150, 1, 49]):
        execution = runner.open()
        got = fed(execution, ids, parts)
        assert execution.states.capacity == 1024
        codes = held(execution, len(ids))
        for name, exact in held(whole, len(ids)).items():
            assert_ties(codes[name], exact, name)
        assert np.abs(got - want).max() < 0.01 * np.abs(want).max()


def test_the_largest_key_of_the_text_fills_its_codes_at_any_position(scales) -> None:
    """A pair of channels turns with its position: its scale is that of the radius, while the
    largest of the channel itself was too small elsewhere."""
    source = speaking()
    model, tokenizer = source.model, tokenizer_of(source)
    assert tokenizer is not None
    ids = sample(tokenizer, 16384, offset=0.0).windows[0]
    found: dict[str, Floats] = {}

    def turned(slot: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        most = np.zeros(k.shape[1::2], np.float32)
        for position in (0, 700, 3000, 9000, 15000):
            at = (table[position : position + 1] for table in (model.cos, model.sin))
            most = np.maximum(most, rotate(k, *paired(*at)).abs().amax((0, 2)).numpy())
        found[f"k.{slot}"] = most
        found[f"own {slot}"] = k.abs().amax((0, 2)).numpy()
        return k, v

    reference = program_of(model).reference
    assert reference is not None
    reference(torch.from_numpy(ids[None]), turned)
    for slot in range(2):
        assert (found[f"k.{slot}"] <= 127.5 * scales[f"k.{slot}"]).all()
        assert (found[f"k.{slot}"] > 1.1 * found[f"own {slot}"]).any()


def test_ranges_are_of_pairs_for_keys_and_of_channels_for_values() -> None:
    k = torch.tensor([[[[3.0, 4.0, 0.0, -1.0]], [[0.0, 0.0, 2.0, 0.0]]]])  # [1, 2, 1, 4]

    def reference(ids: torch.Tensor, cache: Cache | None = None) -> Any:
        assert cache is not None
        cache(0, k * int(ids[0, 0]), -k)

    found = ranges(reference, [np.array([1]), np.array([2])])
    assert found["k.0"].tolist() == [[10.0, 10.0, 2.0, 2.0], [0.0, 0.0, 4.0, 4.0]]
    assert found["v.0"].tolist() == [[3.0, 4.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0]]


# Loops


def test_iterations_share_their_scales_and_both_forms_say_the_same(looped) -> None:
    """So the codes that `fill` copies mean the same where they are read; bit for bit in both forms.
    The gate has passed for both."""
    names = ["fp32-kv8-ort", "fp32-kv8-ort-unrolled"]
    assert list(looped.manifest.variants) == names
    folder = looped.path / "variants/fp32"
    whole = scales_in(folder / "decode-kv8-ort-unrolled.onnx")
    assert len(whole) == 2 * 5  # perception, three iterations, expression
    for part in ("k", "v"):
        for slot in (2, 3):
            np.testing.assert_array_equal(whole[f"{part}.{slot}"], whole[f"{part}.1"])
    body = scales_in(folder / "reason-kv8-ort.onnx")
    np.testing.assert_array_equal(body["k.1"], whole["k.1"])
    ids = np.arange(60)[None] % 256
    said = []
    for name in names:
        with edgert.load(looped.path, variant=name, threads=1) as model:
            said.append(model.logits(ids))
    np.testing.assert_array_equal(said[0], said[1])


def test_an_early_exit_copies_codes(looped) -> None:
    """A token that ends behind its first iteration stands in the rows of the others, as codes."""
    with edgert.load(looped.path) as model, model.session() as session:
        session.generate("the star", max_tokens=6, halt="fixed:1", ignore_eos=True)
        states, prompt = session.execution.states.export(), len("the star")
        assert states["k.1"].dtype == np.int8
        for part in ("k", "v"):
            one, two, three = (states[f"{part}.{slot}"] for slot in (1, 2, 3))
            assert one[:, :, prompt:].any()
            np.testing.assert_array_equal(two[:, :, prompt:], one[:, :, prompt:])
            np.testing.assert_array_equal(three[:, :, prompt:], one[:, :, prompt:])
            assert (two[:, :, :prompt] != one[:, :, :prompt]).any()


def test_a_trace_shows_codes(looped) -> None:
    with edgert.load(looped.path) as model:
        steps = model.trace(np.arange(9)[None])
    assert steps[-1].states["v.4"].dtype == np.int8


# Sessions, and choosing


def test_float32_is_the_default_and_int8_is_asked_for(spoken, run) -> None:
    for kv, name in ((None, "fp32-ort"), ("int8", "fp32-kv8-ort")):
        with edgert.load(spoken.path, kv=kv) as model:
            assert model.runner.variant_name == name
    asked = ("run", spoken.path, "-p", "the star", "-n", "4", "--precision", "int4")
    told = run(*asked, "--kv", "int8")
    assert (told.code, "int4-kv8-ort" in told.err) == (0, True)
    assert "with fp16 keys and values" in run(*asked, "--kv", "fp16").err


def newest(session) -> np.ndarray:
    """The logits behind the newest token that was read."""
    io = session.execution.last
    assert io is not None
    return io.logits[0, io.place].copy()


@pytest.mark.parametrize("tokens", [20, 300], ids=["small", "grown"])
def test_a_session_goes_on_bit_for_bit(spoken, tmp_path, tokens) -> None:
    """Its codes are in the file as they are: a quarter of the bytes."""
    prompt = [int(i) for i in np.random.default_rng(4).integers(4, 260, tokens)]
    with edgert.load(spoken.path, kv="int8") as model:
        with model.session() as session:
            stream = session.stream(prompt, max_tokens=12, ignore_eos=True)
            for _ in range(5):
                next(stream)
            session.save(tmp_path / "s")
            want, logits = [*stream], newest(session)
            tokens_then, states = list(session.tokens), session.execution.states.export()
        saved = read_session(tmp_path / "s").states
        assert {str(a.dtype) for name, a in saved.items() if name != "lens"} == {"int8"}
        assert sum(a.nbytes for a in saved.values()) == 8 + saved["k.0"].shape[2] * 128
        with edgert.resume(tmp_path / "s", model) as again:
            assert [p.token for p in again.stream()] == [p.token for p in want]
            assert again.tokens == tokens_then
            np.testing.assert_array_equal(newest(again), logits)
            for name, array in again.execution.states.export().items():
                np.testing.assert_array_equal(array, states[name])


def test_rewind_trim_and_fork_work_on_codes(spoken) -> None:
    with edgert.load(spoken.path, kv="int8", threads=1) as model, model.session() as session:
        first = session.generate("the star", max_tokens=8, ignore_eos=True)
        start = len(session.tokens) - 8
        session.trim(start)
        with session.fork() as other:
            assert other.generate(max_tokens=8, ignore_eos=True).tokens == first.tokens
        assert session.generate(max_tokens=8, ignore_eos=True).tokens == first.tokens


def test_a_session_is_refused_by_the_variant_that_keeps_floats(spoken, tmp_path) -> None:
    with edgert.load(spoken.path, kv="int8") as model, model.session() as session:
        session.generate("the star", max_tokens=4)
        session.save(tmp_path / "s")
    with (
        edgert.load(spoken.path) as other,
        pytest.raises(SessionMismatch, match="belongs to variant fp32-kv8-ort of this bundle"),
    ):
        edgert.resume(tmp_path / "s", model=other)
    with edgert.resume(tmp_path / "s") as session:
        assert session.model.runner.variant_name == "fp32-kv8-ort"


def test_bench_verifies_codes_by_codes(spoken, run) -> None:
    """Not by a variant of the same precision that keeps floats."""
    told = run(
        "bench", spoken.path, "--kv", "int8", "-n", "8", "-r", "1", "--no-cold-start", "--json"
    )
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["variant"] == "fp32-kv8-ort"
    assert found["state_bytes"] == 256 * 128 + 8


def test_an_onnxruntime_that_is_too_old_is_said(spoken, monkeypatch) -> None:
    """1.25 and 1.26 would load the graph, and fail in a step."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(Incompatible, match=r"int8 need ONNX Runtime 1\.27, this is 1\.26\.0"):
        edgert.load(spoken.path, kv="int8")
    edgert.load(spoken.path).close()


# What else is there, and what is refused


def test_heads_whose_keys_are_rotated_before_the_operator(tmp_path) -> None:
    """Heads of 8: queries, keys and values come to it apart. The gate compares all of it."""
    source = replace(imported(decoder(vocab_size=256)), byte_offset=0)
    made = export_bundle(source, tmp_path / "b", INT8)
    assert [check.name for check in made.verdict.checks] == ["prefill", "steps", "chunks", "batch"]
    assert made.accuracy is not None
    assert made.accuracy["variants"]["fp32-kv8-ort"]["kl"] < 0.05


def test_a_model_that_reads_no_text_is_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedModel, match="the model has no tokenizer"):
        export_bundle(imported(decoder(head_size=16)), tmp_path / "b", INT8)
    assert not any(tmp_path.iterdir())


def test_a_model_without_the_operator_is_refused(tmp_path) -> None:
    options = ExportOptions(kv="int8", lowerings=("portable",))
    with pytest.raises(UnsupportedModel, match="need the lowering ort: it was not asked for"):
        export_bundle(speaking(), tmp_path / "b", options)
    odd = replace(speaking(), model=decoder(hidden_size=48, head_size=12))
    with pytest.raises(UnsupportedModel, match="need the lowering ort: head size 12"):
        export_bundle(odd, tmp_path / "b", ExportOptions(kv="fp32,int8"))


def test_a_model_that_solves_is_refused(tmp_path, monkeypatch) -> None:
    program = replace(program_of(decoder()), reference=None)
    monkeypatch.setattr(write, "program_of", lambda model: program)
    with pytest.raises(UnsupportedModel, match="for models that decode tokens"):
        export_bundle(imported(decoder()), tmp_path / "b", INT8)


def test_both_lowerings_have_what_they_can(tmp_path) -> None:
    """`portable` keeps floats, and is there for them alone."""
    made = export_bundle(speaking(), tmp_path / "b", ExportOptions(kv="int8,fp32"))
    assert list(made.manifest.variants) == ["fp32-kv8-ort", "fp32-ort", "fp32-portable"]


@pytest.mark.parametrize("kv", ["int4", "", "fp32,", "INT8", "fp32;int8"])
def test_kinds_that_there_are_not_are_refused(kv) -> None:
    with pytest.raises(UsageError, match="keys and values cannot be kept in"):
        ExportOptions(kv=kv)


def test_a_recipe_can_ask_for_it(tmp_path) -> None:
    recipe = 'format_version = 1\nname = "x"\n[source]\npath = "m.gguf"\n[export]\nkv = '
    (tmp_path / "r.toml").write_text(recipe + '"fp32,int8"\n')
    assert read_recipe(tmp_path / "r.toml").options.kvs == ("fp32", "int8")
    (tmp_path / "r.toml").write_text(recipe + "8\n")
    with pytest.raises(UsageError, match=r"export\.kv: expected str"):
        read_recipe(tmp_path / "r.toml")


def test_a_channel_that_is_always_zero_has_a_scale(tmp_path) -> None:
    """Not zero, which would make codes of whatever it holds later, and read them as nothing."""
    source = speaking()
    source.model.blocks[0].wqkv[:, -1] = 0
    made = export_bundle(source, tmp_path / "b", INT8)
    scales = scales_in(made.path / "variants/fp32/decode-kv8-ort.onnx")
    assert scales["v.0"][1, 15] == np.float32(1 / 127)
    assert kv_int8.HIGH == 127
