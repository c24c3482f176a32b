"""Weights of few bits: packed as ONNX Runtime reads them, and found as their methods say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits
from tiny_decoder import decoder

from edgert.errors import UsageError
from edgert.evaluate import divergence
from edgert.export.accuracy import Tally
from edgert.export.calibration import moments
from edgert.export.methods import METHODS
from edgert.export.nbits import METHODS as NAMES
from edgert.export.nbits import UNEVEN, Quantized, Scheme, packed, scheme_of

N, K = 24, 192


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((N, K)).astype(np.float32)


@pytest.fixture(scope="module")
def seen() -> np.ndarray:
    """Second moments of inputs that go together, some of them far larger than others."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((600, K)) @ rng.standard_normal((K, K))
    x *= np.exp(rng.standard_normal(K))
    return x.T @ x / len(x)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_rounding_is_onnxruntimes_own_bit_for_bit(bits, block, symmetric, weight) -> None:
    """Codes, scales, zero points, and how they are packed; an odd number of blocks, too."""
    blocks = K // block
    codes = np.zeros((N, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(N * blocks, np.float32)
    zeros = np.zeros(N * -(-blocks * bits // 8), np.uint8)
    theirs = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    theirs(codes, np.ascontiguousarray(weight.T), scales, zeros, block, N, K, symmetric)

    got = METHODS["plain"](weight, Scheme(bits, block, symmetric), None)
    np.testing.assert_array_equal(got.packed(), codes)
    np.testing.assert_array_equal(got.scales.ravel(), scales)
    if symmetric:
        assert got.zeros is None
    else:
        used = np.full(zeros.reshape(N, -1).shape, 0xFF, np.uint8)
        if bits == 4 and blocks % 2:
            used[:, -1] = 0x0F  # they leave the middle in the half byte that nothing reads
        np.testing.assert_array_equal(got.packed_zeros() & used, zeros.reshape(N, -1) & used)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_see_the_values_that_the_gate_compares_with(bits, symmetric, weight) -> None:
    """GatherBlockQuantized gives them exactly, MatMulNBits times the unit matrix, too: of the same
    bytes."""
    found = METHODS["plain"](weight, Scheme(bits, 64, symmetric), None)
    rows, products = run_operators(found)
    np.testing.assert_array_equal(rows, found.values())
    np.testing.assert_array_equal(products.T, found.values())


def run_operators(found: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """(all rows gathered [N, K], unit matrix times the weight [K, N]), by ONNX Runtime."""
    tensors = {"codes": found.packed(), "scales": found.scales}
    tensors["rows"] = tensors["codes"].reshape(N, -1)
    zeros = []
    if found.zeros is not None:
        tensors["zeros"] = found.packed_zeros()
        zeros = ["zeros"]
    size = {"bits": found.bits, "block_size": found.block}
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            ["rows", "ids", "scales", *zeros],
            ["gathered"],
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            **size,
        ),
        helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales", *zeros],
            ["products"],
            domain="com.microsoft",
            K=K,
            N=N,
            accuracy_level=0,
            **size,
        ),
    ]
    ports = [helper.make_tensor_value_info("ids", TensorProto.INT64, [N])]
    ports += [helper.make_tensor_value_info("x", TensorProto.FLOAT, [K, K])]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("gathered", "products")
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "graph", ports, ends, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    got = session.run(None, {"ids": np.arange(N), "x": np.eye(K, dtype=np.float32)})
    return got[0], got[1]


def test_a_row_of_codes_fills_whole_bytes_low_half_first() -> None:
    codes = np.array([[1, 2, 3], [15, 0, 7]], np.uint8)
    assert packed(codes, 4).tolist() == [[0x21, 0x03], [0x0F, 0x07]]
    assert packed(codes, 8).tolist() == codes.tolist()


def test_blocks_divide_the_inputs() -> None:
    """Nothing is padded: a head of 576 inputs in blocks of 128 would grow by a ninth."""
    assert [Scheme(4, 128).block_of(n) for n in (576, 1536, 48, 40)] == [64, 128, 16, 0]


FORMS = [(name, form) for name in NAMES for form in (True, False) if not (form and name in UNEVEN)]


@pytest.mark.parametrize(("name", "symmetric"), FORMS)
def test_each_method_stays_within_the_codes_and_near_the_weight(
    name, symmetric, weight, seen
) -> None:
    found = METHODS[name](weight, Scheme(4, 32, symmetric, method=name), seen)
    assert (found.zeros is None) is symmetric
    assert found.codes.max() <= 15
    # Of a weight of unit variance. What gptq makes up for elsewhere moves weights on purpose.
    assert 0.03 < np.abs(found.values() - weight).mean() < (0.25 if name == "gptq" else 0.1)


def test_what_each_method_is_for(weight, seen) -> None:
    """Search lowers the error of the weights, the calibrated ones that of what comes out."""

    def losses(name: str) -> tuple[float, float]:
        error = METHODS[name](weight, Scheme(4, 32, method=name), seen).values() - weight
        return float((error**2).sum()), float(np.einsum("nk,kl,nl->", error, seen, error))

    plain, search, weighted, gptq = map(losses, ("plain", "search", "weighted", "gptq"))
    assert search[0] < 0.95 * plain[0]
    assert weighted[1] < 0.95 * plain[1]
    assert gptq[1] < 0.6 * weighted[1]


def test_constant_and_zero_blocks_are_exact(seen) -> None:
    """No division by a range of nothing, and no NaN."""
    weight = np.zeros((4, K), np.float32)
    weight[1] = 0.25
    weight[2, :32] = -3.0
    for name in NAMES:
        symmetric = name not in UNEVEN
        with np.errstate(all="ignore"):  # onnxruntime's k-quant divides by zero and repairs it
            found = METHODS[name](weight, Scheme(4, 32, symmetric, method=name), seen)
        assert np.isfinite(found.scales).all(), name
        np.testing.assert_allclose(found.values()[[0, 3]], 0, atol=1e-6, err_msg=name)


def test_moments_are_those_of_the_inputs_of_each_linear_map() -> None:
    """Seen in the eager model, whatever its family: fused maps, and the tied head."""
    model = decoder()
    windows = [np.arange(12) % 40, np.arange(7)]
    got = moments(model, lambda ids: model(torch.from_numpy(ids[None])), windows)
    assert {"embed", "blocks.0.wqkv", "blocks.2.w_down"} <= got.keys()
    assert "blocks.0.attn_norm" not in got
    embedded = model.embed[torch.from_numpy(np.concatenate(windows))]
    normed = embedded * torch.rsqrt((embedded**2).mean(-1, keepdim=True) + 1e-5)
    x = (normed * model.blocks[0].attn_norm).double().numpy()
    np.testing.assert_allclose(got["blocks.0.wqkv"], x.T @ x / 19, rtol=1e-4, atol=1e-6)


def test_tallies_are_the_definitions() -> None:
    rng = np.random.default_rng(0)
    want, got = rng.standard_normal((2, 5, 7)).astype(np.float32)
    ids = np.array([0, 3, 6, 2, 2])
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (want[:-1], got[:-1]))
    tally = Tally()
    tally.add(ids, want, got)
    found = tally.result()
    rows = np.arange(4)
    ratio = np.exp(np.log(p[rows, ids[1:]] / q[rows, ids[1:]]).mean())
    assert found.tokens == 4
    assert found.ratio == pytest.approx(ratio, rel=1e-5)
    assert found.perplexity / found.perplexity_fp32 == pytest.approx(ratio, rel=1e-5)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert found.top1 == (want[:-1].argmax(-1) == got[:-1].argmax(-1)).mean()
    np.testing.assert_allclose(divergence(want, want), 0, atol=1e-12)


WRONG = [
    ({"bits": 5}, "bits = 5"),
    ({"bits": True}, "bits = True"),
    ({"bits": 4, "block": 17}, "block = 17"),
    ({"bits": 4, "block": 0}, "block = 0"),
    ({"bits": 4, "block": "32"}, "block = '32'"),
    ({"bits": 4, "head": 2}, "head = 2"),
    ({"bits": 4, "accuracy_level": 1}, "accuracy_level = 1"),
    ({"bits": 4, "symmetric": 1}, "symmetric = 1"),
    ({"bits": 4, "method": "awq"}, "method = 'awq'"),
    ({"bits": 4, "method": []}, r"method = \[\]"),
    ({"bits": 4, "method": "hqq"}, "hqq has no symmetric form"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[m for _, m in WRONG])
def test_schemes_that_no_operator_takes_are_refused(given, message) -> None:
    with pytest.raises(UsageError, match=message):
        Scheme(**given)


def test_a_recipe_changes_a_scheme_by_its_own_names() -> None:
    assert scheme_of("int4", {"block": 64}) == replace(scheme_of("int4"), block=64)
    for given in ({"bits": 3}, {"blok": 32}):
        with pytest.raises(UsageError, match="is not a setting"):
            scheme_of("int4", given)
