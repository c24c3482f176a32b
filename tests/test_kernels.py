"""The kernels of our own: against the same computation in float64, beside ONNX Runtime's, and how
they come into a graph and stay out of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_backends import loaded, model
from tiny_decoder import decoder, imported

import edgert
from edgert import kernels
from edgert.backends.ort import OrtBackend
from edgert.errors import BadBundle, EdgertError
from edgert.export.write import ExportOptions, export_bundle
from edgert.onnxedit import GraphFile

F32, I8, I32 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT32
RNG = np.random.default_rng(5)

built = pytest.mark.skipif(
    kernels.library() is None, reason="the kernels were not compiled as edgert was installed"
)


# ---- attention ----


def attention(n: int, m: int, d: int, **attributes: Any) -> onnx.ModelProto:
    """GroupQueryAttention with all inputs that our exporter gives it; int8 if it has scales."""
    codes = attributes.pop("codes", False)
    packed = attributes.pop("packed", True)
    cell = I8 if codes else F32
    ports: dict[str, Any] = {"q": (F32, ["B", "T", (n + 2 * m if packed else n) * d])}
    if not packed:
        ports |= dict.fromkeys("kv", (F32, ["B", "T", m * d]))
    ports |= {name: (cell, ["B", m, "C", d]) for name in ("past_k", "past_v")}
    ports |= {"last": (I32, ["B"]), "total": (I32, [])}
    names = ["q", *(("k", "v") if not packed else ("", "")), "past_k", "past_v", "last", "total"]
    if attributes.get("do_rotary"):
        ports |= {name: (F32, ["positions", "half"]) for name in ("cos", "sin")}
        names += ["cos", "sin"]
    if codes:
        ports |= {name: (F32, [1, m, 1, d]) for name in ("k_scale", "v_scale")}
        names += [""] * (12 - len(names)) + ["k_scale", "v_scale"]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attributes["kv_cache_bit_width"] = 8
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "k_next", "v_next"],
        domain="com.microsoft",
        num_heads=n,
        kv_num_heads=m,
        **attributes,
    )
    return model(
        [node],
        ports,
        {
            "out": (F32, ["B", "T", n * d]),
            "k_next": (cell, ["B", m, "C", d]),
            "v_next": (cell, ["B", m, "C", d]),
        },
    )


def inputs(
    n: int, m: int, d: int, C: int, T: int, past: list[int], proto: onnx.ModelProto
) -> dict[str, np.ndarray]:
    B = len(past)
    named = {port.name for port in proto.graph.input}
    wide = n if "k" in named else n + 2 * m
    values: dict[str, np.ndarray] = {"q": RNG.standard_normal((B, T, wide * d)) * 2}
    if "k" in named:
        values |= {name: RNG.standard_normal((B, T, m * d)) for name in "kv"}
    for name in ("past_k", "past_v"):
        values[name] = RNG.standard_normal((B, m, C, d))
    values = {name: value.astype(np.float32) for name, value in values.items()}
    if "k_scale" in named:
        for name in ("past_k", "past_v"):
            values[name] = RNG.integers(-128, 128, (B, m, C, d), np.int8)
        for name in ("k_scale", "v_scale"):
            values[name] = RNG.uniform(0.01, 0.03, (1, m, 1, d)).astype(np.float32)
    values["last"] = np.array([p + T - 1 for p in past], np.int32)
    values["total"] = np.array(max(past) + T, np.int32)
    if "cos" in named:
        angles = np.arange(C)[:, None] * 100.0 ** (-np.arange(d // 2) / (d // 2))
        values["cos"], values["sin"] = np.cos(angles, dtype="f4"), np.sin(angles, dtype="f4")
    return values


def expected(
    values: dict[str, np.ndarray], n: int, m: int, interleaved: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The operator's text, in float64: out [B, T, n d], and the caches as numbers."""
    B, T, _ = values["q"].shape
    d = values["past_k"].shape[-1]
    packed = values["q"].astype(np.float64)
    if "k" in values:
        packed = np.concatenate([packed, values["k"], values["v"]], -1)
    heads = packed.reshape(B, T, n + 2 * m, d)
    q, k, v = heads[:, :, :n], heads[:, :, n : n + m], heads[:, :, n + m :]

    def turned(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        if "cos" not in values:
            return x
        cos, sin = (values[name].astype(np.float64)[at][:, None] for name in ("cos", "sin"))
        halves = slice(0, None, 2), slice(1, None, 2)
        a, b = halves if interleaved else (slice(0, d // 2), slice(d // 2, None))
        y = np.empty_like(x)
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., b] * cos + x[..., a] * sin
        return y

    def read(cache: np.ndarray, name: str) -> np.ndarray:
        scale = values.get(f"{name}_scale")
        return cache.astype(np.float64) * (1 if scale is None else scale[0])

    keys, values_ = values["past_k"].copy(), values["past_v"].copy()
    out = np.zeros((B, T, n, d))
    for b in range(B):
        past = int(values["last"][b]) + 1 - T
        at = np.arange(past, past + T)
        for cache, new, name in ((keys, turned(k[b], at), "k"), (values_, v[b], "v")):
            rows = new.transpose(1, 0, 2)
            if f"{name}_scale" in values:
                over = 1 / values[f"{name}_scale"][0]
                rows = np.clip(np.rint(rows.astype(np.float32) * over), -128, 127)
            cache[b, :, past : past + T] = rows
        turned_q = turned(q[b], at)
        for h in range(n):
            key, value = (
                read(cache[b], name)[h // (n // m)] for cache, name in ((keys, "k"), (values_, "v"))
            )
            for t in range(T):
                seen = past + t + 1
                score = key[:seen] @ turned_q[t, h] * d**-0.5
                weight = np.exp(score - score.max())
                out[b, t, h] = weight @ value[:seen] / weight.sum()
    return out.reshape(B, T, n * d), keys, values_


def run(
    backend: OrtBackend, proto: onnx.ModelProto, values: dict[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    """Run in place: the cache that is read is the one that is written."""
    graph = loaded(backend, proto, folder)
    ins = {name: backend.borrow(value.copy(), writes=True) for name, value in values.items()}
    B, T = values["q"].shape[:2]
    heads = next(a.i for a in proto.graph.node[0].attribute if a.name == "num_heads")
    out = backend.allocate("float32", (B, T, heads * values["past_k"].shape[-1]))
    outs = {"out": out, "k_next": ins["past_k"], "v_next": ins["past_v"]}
    graph.bind(ins, outs).run()
    return {name: buffer.read() for name, buffer in outs.items()}


# heads, KV heads, head size, capacity, new tokens, past of each row, attributes
CASES = {
    "step": (9, 3, 64, 80, 1, [7], {"interleaved": 1}),
    "first token": (4, 2, 16, 8, 1, [0], {"interleaved": 1}),
    "step over several parts": (6, 2, 64, 1100, 1, [1000], {"interleaved": 1}),
    "rows of different lengths": (4, 2, 32, 700, 1, [3, 600], {"interleaved": 0}),
    "prefill": (9, 3, 64, 300, 130, [0], {"interleaved": 1}),
    "chunk": (4, 4, 24, 300, 37, [200], {"rotary": 0}),
    "chunks of a batch": (4, 1, 16, 120, 5, [3, 90], {"interleaved": 1}),
    "separate keys": (4, 2, 40, 90, 3, [70], {"rotary": 0, "packed": False}),
    "many heads of one": (64, 1, 8, 200, 3, [150], {"interleaved": 1}),
    "one head each": (5, 5, 48, 100, 9, [64], {"interleaved": 0}),
    "chunks of wide heads": (8, 2, 128, 420, 50, [3, 300], {"interleaved": 0}),
    "as few as tiles take": (4, 4, 64, 90, 18, [0, 70], {"rotary": 0, "packed": False}),
    "wider than tiles take": (2, 1, 320, 60, 20, [7], {"interleaved": 1}),
}


@built
@pytest.mark.parametrize("codes", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_what_its_text_says(case, codes, tmp_path):
    n, m, d, C, T, past, how = CASES[case]
    rotary, interleaved = how.get("rotary", int(d % 16 == 0)), how.get("interleaved", 0)
    proto = attention(
        n,
        m,
        d,
        do_rotary=rotary,
        rotary_interleaved=interleaved,
        packed=how.get("packed", True),
        codes=codes,
    )
    values = inputs(n, m, d, C, T, past, proto)
    got = run(native_backend(), proto, values, tmp_path)
    out, keys, kept = expected(values, n, m, bool(interleaved))
    # Float32 sums of up to 1,000 weighted values of size 4, over softmax of scores up to 30: an
    # error in a score of 1e-6 of its size changes a weight by 3e-5 of it at the very most.
    np.testing.assert_allclose(got["out"], out, rtol=0, atol=3e-5)
    if codes:  # a number on the border between two codes may take either
        wrong = got["k_next"].astype(int) - keys
        assert np.abs(wrong).max() <= 1
        assert (wrong != 0).mean() < 1e-3
        np.testing.assert_array_equal(got["v_next"], kept)
    else:
        np.testing.assert_allclose(got["k_next"], keys, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(got["v_next"], kept)


def native_backend(threads: int = 1) -> OrtBackend:
    backend = OrtBackend(threads=threads)
    assert "native" not in backend.placement  # until a graph uses them
    return backend


@built
@pytest.mark.parametrize("codes", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_threads_do_not_change_a_bit(codes, tokens, tmp_path):
    proto = attention(9, 3, 64, do_rotary=1, rotary_interleaved=1, codes=codes)
    values = inputs(9, 3, 64, 1300, tokens, [1200], proto)
    alone, two = (run(native_backend(n), proto, values, tmp_path) for n in (1, 2))
    for name, value in alone.items():
        assert value.tobytes() == two[name].tobytes()


@built
@pytest.mark.parametrize("codes", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("tokens", [2, 9, 17])
def test_tokens_of_a_guess_have_the_bits_of_single_steps(tokens, codes, tmp_path):
    proto = attention(9, 3, 64, do_rotary=1, rotary_interleaved=1, codes=codes)
    values = inputs(9, 3, 64, 200, tokens, [100], proto)
    together = run(native_backend(), proto, values, tmp_path)
    step = dict(values)
    for t in range(tokens):
        step |= {"q": values["q"][:, t : t + 1], "last": np.array([100 + t], np.int32)}
        done = run(native_backend(), proto, step, tmp_path)
        step |= {"past_k": done["k_next"].copy(), "past_v": done["v_next"].copy()}
        assert done["out"].tobytes() == together["out"][:, t : t + 1].tobytes()
    assert step["past_k"].tobytes() == together["k_next"].tobytes()


@built
def test_attention_beside_onnx_runtimes(tmp_path, monkeypatch):
    proto = attention(9, 3, 64, do_rotary=1, rotary_interleaved=1)
    values = inputs(9, 3, 64, 200, 1, [150], proto)
    ours = run(native_backend(), proto, values, tmp_path)
    monkeypatch.setenv("EDGERT_NATIVE", "0")
    theirs = run(OrtBackend(threads=1), proto, values, tmp_path)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5)


@built
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("keys", [slice(40, 41), slice(0, 64), slice(256, 512)])
def test_numbers_that_are_none_come_through(keys, tokens, tmp_path):
    """A spoilt state must not look like a sound one: a key, all of a tile, all of a part."""
    proto = attention(4, 2, 64, do_rotary=0)
    values = inputs(4, 2, 64, 640, tokens, [590], proto)
    values["past_k"][0, 1, keys, 3] = np.nan
    out = run(native_backend(), proto, values, tmp_path)["out"].reshape(tokens, 4, 64)
    assert np.isfinite(out[:, :2]).all()
    assert np.isnan(out[:, 2:]).all()


@built
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("last", np.array([90], np.int32)),  # beyond the capacity
        ("last", np.array([4, 4], np.int32)),  # another batch
        ("cos", np.zeros((4, 8), np.float32)),  # tables that end before
        ("sin", np.zeros((4, 8), np.float32)),
    ],
)
def test_what_does_not_fit_is_an_error(change, value, tmp_path):
    proto = attention(4, 2, 16, do_rotary=1, rotary_interleaved=1)
    values = inputs(4, 2, 16, 90, 1, [50], proto) | {change: value}
    with pytest.raises(EdgertError, match="does not take"):
        run(native_backend(), proto, values, tmp_path)


@built
@pytest.mark.parametrize("attributes", [{"local_window_size": 8}, {"softcap": 5.0}])
def test_other_kinds_of_attention_are_left_to_onnx_runtime(attributes, tmp_path):
    proto = attention(4, 2, 16, do_rotary=1, rotary_interleaved=1, **attributes)
    backend = native_backend()
    run(backend, proto, inputs(4, 2, 16, 90, 1, [50], proto), tmp_path)
    assert "native" not in backend.placement


# ---- rows ----


def node(op: str, ins: list[str], outs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ins, outs, **attributes)


def rowwise(nodes: list[onnx.NodeProto], ins: dict[str, int], outs: dict[str, int]):
    return model(
        nodes,
        {name: (F32, ["a"] * rank if rank == 1 else ["b", "t", "w"]) for name, rank in ins.items()},
        {name: (F32, ["b", "t", "v"]) for name in outs},
    )


GATE = [
    node("Split", ["x"], ["a", "b"], axis=2, num_outputs=2),
    node("Sigmoid", ["a"], ["s"]),
    node("Mul", ["a", "s"], ["silu"]),
    node("Mul", ["silu", "b"], ["y"]),
]


def outcome(
    backend: OrtBackend, proto: onnx.ModelProto, values: dict[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    graph = loaded(backend, proto, folder)
    x = values["x"]
    narrow = (*x.shape[:-1], x.shape[-1] // (2 if proto.graph.node[0].op_type == "Split" else 1))
    outs = {port.name: backend.allocate("float32", narrow) for port in proto.graph.output}
    graph.bind({name: backend.borrow(v) for name, v in values.items()}, outs).run()
    return {name: buffer.read() for name, buffer in outs.items()}


@built
@pytest.mark.parametrize("shape", [(1, 1, 3072), (2, 40, 1024), (1, 3, 10), (1, 1, 2)])
def test_the_gate_of_swiglu(shape, tmp_path):
    proto = rowwise(GATE, {"x": 3}, {"y": 3})
    x = (RNG.standard_normal(shape) * 8).astype(np.float32)
    x[0, 0, 0] = -200.0  # e^200 is beyond float32
    backend = native_backend()
    got = outcome(backend, proto, {"x": x}, tmp_path)["y"]
    assert "native" in backend.placement
    a, b = np.split(x.astype(np.float64), 2, -1)
    np.testing.assert_allclose(got, a / (1 + np.exp(-a)) * b, rtol=2e-6, atol=1e-30)


@built
@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 70, 512), (2, 2, 13)])
def test_norms(shape, tmp_path):
    width = shape[-1]
    values = {name: RNG.standard_normal(shape).astype(np.float32) for name in ("x", "skip")}
    values["w"] = RNG.standard_normal(width).astype(np.float32)
    total = values["x"].astype(np.float64) + values["skip"]

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * values["w"]

    plain = rowwise(
        [node("SimplifiedLayerNormalization", ["x", "w"], ["y"], axis=-1, epsilon=1e-5)],
        {"x": 3, "w": 1},
        {"y": 3},
    )
    got = outcome(native_backend(), plain, {n: values[n] for n in ("x", "w")}, tmp_path)
    np.testing.assert_allclose(got["y"], normed(values["x"].astype(np.float64)), atol=3e-6)
    for outs in (["y", "", "", "total"], ["y"]):
        skip = node(
            "SkipSimplifiedLayerNormalization",
            ["x", "skip", "w"],
            outs,
            domain="com.microsoft",
            epsilon=1e-5,
        )
        proto = rowwise([skip], {"x": 3, "skip": 3, "w": 1}, {o: 3 for o in outs if o})
        got = outcome(native_backend(), proto, values, tmp_path)
        np.testing.assert_allclose(got["y"], normed(total), atol=3e-6)
        if "total" in outs:
            np.testing.assert_array_equal(got["total"], values["x"] + values["skip"])


# ---- in and out of a graph ----


def replaced(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto | None:
    path = folder / "g.onnx"
    path.write_bytes(proto.SerializeToString())
    data = kernels.substituted(path)
    if data is None:
        return None
    found = onnx.ModelProto()
    found.ParseFromString(data)
    return found


def test_all_else_in_the_file_is_as_it_was(tmp_path):
    weights = numpy_helper.from_array(np.ones(4, np.float32), "w")
    proto = rowwise(
        [
            node("Neg", ["x"], ["n"], name="first"),
            node("SimplifiedLayerNormalization", ["n", "w"], ["y"], axis=-1, epsilon=0.5),
        ],
        {"x": 3},
        {"y": 3},
    )
    proto.graph.initializer.append(weights)
    proto.metadata_props.add(key="k", value="v")
    found = replaced(proto, tmp_path)
    assert found is not None
    assert found.graph.node[1].domain == kernels.DOMAIN
    assert (found.opset_import[-1].domain, found.opset_import[-1].version) == (kernels.DOMAIN, 1)
    found.graph.node[1].domain = ""
    del found.opset_import[-1]
    proto.graph.node[1].domain = ""  # given, and the same as not given
    assert found == proto


def test_a_gate_becomes_one_node(tmp_path):
    found = replaced(rowwise([*GATE, node("Neg", ["y"], ["z"])], {"x": 3}, {"z": 3}), tmp_path)
    assert found is not None
    assert [n.op_type for n in found.graph.node] == ["GatedSilu", "Neg"]
    gate = found.graph.node[0]
    assert (list(gate.input), list(gate.output)) == (["x"], ["y"])
    assert helper.get_attribute_value(gate.attribute[0]) == 2
    onnx.checker.check_model(found)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (GATE, {"y": 3, "silu": 3}),  # an inner value is a result
        ([*GATE, node("Neg", ["b"], ["z"])], {"y": 3, "z": 3}),  # or read by another node
        ([*GATE[:2], node("Mul", ["b", "s"], ["silu"]), GATE[3]], {"y": 3}),  # another function
        ([node("Split", ["x", "n"], ["a", "b"], axis=2), *GATE[1:]], {"y": 3}),  # sizes unknown
        (GATE[:2], {"s": 3}),
    ],
)
def test_what_only_resembles_a_gate_is_left(nodes, outputs, tmp_path):
    assert replaced(rowwise(nodes, {"x": 3}, outputs), tmp_path) is None


def test_a_file_with_such_a_domain_of_its_own_is_left(tmp_path):
    proto = rowwise(GATE, {"x": 3}, {"y": 3})
    proto.opset_import.add(domain=kernels.DOMAIN, version=1)
    assert replaced(proto, tmp_path) is None


def test_a_file_that_is_none_is_refused(tmp_path):
    for data in (b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x04\x0a\x02\x0a\x7f"):
        with pytest.raises(BadBundle, match="not a sound ONNX file"):
            GraphFile(data, "g.onnx")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    options = ExportOptions(lowerings=("ort",))
    return export_bundle(imported(decoder()), tmp_path_factory.mktemp("native") / "b", options).path


def answered(model: edgert.Model) -> tuple[int, ...]:
    with model:
        params = edgert.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        return model.generate([3, 1, 4, 1, 5], params).tokens


@built
def test_a_model_says_the_same_with_them_and_without(tiny, monkeypatch):
    model = edgert.load(tiny)
    assert "native kernels" in model.runner.backend.placement
    assert model.runner.backend.build["kernels"] == f"edgert {kernels.REVISION}"
    ours = answered(model)
    monkeypatch.setenv("EDGERT_NATIVE", "0")
    plain = edgert.load(tiny)
    assert "native" not in plain.runner.backend.placement
    assert plain.runner.backend.build["kernels"] == "onnxruntime"
    assert answered(plain) == ours


def test_a_library_of_another_machine_is_not_used(tiny, monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(kernels, "library", lambda: broken)
    model = edgert.load(tiny)
    assert "native" not in model.runner.backend.placement
    assert len(answered(model)) == 20


@built
def test_a_resumed_session_says_that_the_kernels_are_others(tiny, tmp_path, monkeypatch):
    with edgert.load(tiny) as model, model.session() as session:
        session.append([3, 1, 4])
        session.save(tmp_path / "s.session")
    monkeypatch.setenv("EDGERT_NATIVE", "0")
    with edgert.load(tiny) as model, edgert.resume(tmp_path / "s.session", model) as session:
        assert session.notes == (f"kernels edgert {kernels.REVISION} → onnxruntime",)
