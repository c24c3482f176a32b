"""Products with weights of few bits by a kernel of our own: against the same numbers in float64,
the same bits for any number of rows and threads, and what is left to ONNX Runtime.

There are several ways, for older processors and newer ones: test_older_processors.py runs this file
for each that this one can stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_backends import loaded, model
from test_kernels import replaced

from edgert import kernels
from edgert.backends.ort import OrtBackend
from edgert.errors import EdgertError
from edgert.export.nbits import Quantized

RNG = np.random.default_rng(11)


def used() -> bool:
    library = kernels.library()
    return library is not None and kernels.multiplies(library)


ours = pytest.mark.skipif(
    not used(), reason="not compiled, or a processor for which ONNX Runtime's products are faster"
)


FEW_ROWS = 17  # so many at most are multiplied as a single one is


def by_tiles() -> bool:
    """Whether more rows are multiplied by AMX, in bfloat16."""
    library = kernels.library()
    return library is not None and "AMX" in kernels.instructions(library)


class Case(NamedTuple):
    rows: int
    outputs: int
    inputs: int
    bits: int = 4
    block: int = 32
    zeros: bool = False


def weight(case: Case) -> Quantized:
    blocks = -(-case.inputs // case.block)
    codes = RNG.integers(0, 1 << case.bits, (case.outputs, blocks * case.block), np.uint8)
    scales = RNG.uniform(0.01, 0.02, (case.outputs, blocks)).astype(np.float32)
    zeros = RNG.integers(0, 1 << case.bits, scales.shape, np.uint8) if case.zeros else None
    return Quantized(case.bits, codes, scales, zeros)


def product(
    case: Case, w: Quantized, extra: tuple[str, ...] = (), **changed: Any
) -> onnx.ModelProto:
    stored = {"codes": w.packed(), "scales": w.scales}
    if w.zeros is not None:
        stored["zeros"] = w.packed_zeros()
    elif extra:
        stored[""] = np.zeros(0, np.float32)
    attributes = {
        "K": case.inputs,
        "N": case.outputs,
        "bits": case.bits,
        "block_size": case.block,
        "accuracy_level": 4,
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *stored, *extra],
        ["y"],
        domain="com.microsoft",
        **attributes | changed,
    )
    proto = model(
        [node],
        {"x": (TensorProto.FLOAT, ["b", "t", case.inputs])},
        {"y": (TensorProto.FLOAT, ["b", "t", case.outputs])},
    )
    for name, array in stored.items():
        if name:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def multiplied(proto: onnx.ModelProto, x: np.ndarray, folder: Path, threads: int = 1) -> np.ndarray:
    backend = OrtBackend(threads=threads)
    graph = loaded(backend, proto, folder)
    assert "native" in backend.placement
    outputs = proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    y = backend.allocate("float32", (*x.shape[:-1], outputs))
    graph.bind({"x": backend.borrow(x)}, {"y": y}).run()
    return y.read().copy()


def activations(case: Case) -> np.ndarray:
    """Rows of different sizes, one number in each far above the others, as models have them."""
    sizes = 10.0 ** RNG.integers(-3, 4, (case.rows, 1))
    x = RNG.standard_normal((1, case.rows, case.inputs)) * sizes
    x[..., RNG.integers(case.inputs)] *= 50
    return x.astype(np.float32)


CASES = [
    Case(rows, *sizes, *kind)
    for rows, *sizes in (
        (1, 576, 576),
        (1, 5, 32),
        (2, 7, 96),
        (7, 37, 160),
        (16, 9, 1536),
        (17, 33, 32),
        (18, 33, 32),
        (75, 70, 192),
        (129, 50, 608),
    )
    for kind in ((4, 32), (4, 32, True), (4, 96, True), (8, 32), (8, 64, True), (8, 256))
]


@ours
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_what_their_text_says(case, tmp_path):
    w, x = weight(case), activations(case)
    got = multiplied(product(case, w), x, tmp_path)
    values = w.values().astype(np.float64)[:, : case.inputs]
    exact = x.astype(np.float64) @ values.T
    # An activation is off by half a step at most, a step being 1/32,639 of the row's largest (127
    # times 256 and 127; by AVX2 1/32,767); and float32 sums of as many numbers as there are groups,
    # and of eight parts.
    size = np.abs(x).max(-1, keepdims=True) * np.abs(values).sum(-1)
    limit = size / 32639 / 2 + size * 1e-6
    if by_tiles() and case.rows > FEW_ROWS:  # both factors of each product are off by 2^-8
        limit = np.abs(x).astype(np.float64) @ np.abs(values).T * (2**-7 + 2**-16 + 1e-6)
    assert (np.abs(got - exact) <= limit).all()
    assert np.abs(got - exact).max() > 0  # it did round


@ours
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_alone_and_among_others_and_for_any_threads(bits, zeros, tmp_path):
    case = Case(141, 77, 352, bits, zeros=zeros)
    w, x = weight(case), activations(case)
    together = multiplied(product(case, w), x, tmp_path)
    assert multiplied(product(case, w), x, tmp_path, threads=2).tobytes() == together.tobytes()
    few = multiplied(product(case, w), x[:, 4 : 4 + FEW_ROWS], tmp_path)
    many = together[:, 4:]
    if by_tiles():
        assert few.tobytes() != many[:, :FEW_ROWS].tobytes()
    else:
        assert few.tobytes() == many[:, :FEW_ROWS].tobytes()
    for rows in (1, 2, 3, 5, 8, 15, 17, 40, 100):
        some = multiplied(product(case, w), x[:, 4 : 4 + rows], tmp_path)
        assert some.tobytes() == (few if rows <= FEW_ROWS else many)[:, :rows].tobytes()


@ours
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [9, 33])
def test_numbers_that_are_none_come_through_in_their_row_alone(rows, bad, tmp_path):
    case = Case(rows, 40, 100)
    x = activations(case)
    x[0, 3, 98] = bad
    y = multiplied(product(case, weight(case)), x, tmp_path)[0]
    assert not np.isfinite(y[3]).any()
    assert np.isfinite(np.delete(y, 3, 0)).all()


@ours
def test_rows_of_nothing_and_of_next_to_nothing(tmp_path):
    case = Case(3, 8, 64)
    x = np.zeros((1, 3, 64), np.float32)
    x[0, 1] = 1e-38
    x[0, 2] = 3e38
    w = weight(case)
    y = multiplied(product(case, w), x, tmp_path)[0]
    np.testing.assert_array_equal(y[0], 0)
    assert np.abs(y[1]).max() < 1e-35
    exact = x[0, 2].astype(np.float64) @ w.values().astype(np.float64).T
    within = np.abs(exact) < 3e38
    np.testing.assert_allclose(y[2][within], exact[within], rtol=1e-3)


@ours
def test_no_rows(tmp_path):
    case = Case(1, 8, 64)
    empty = np.zeros((1, 0, 64), np.float32)
    assert multiplied(product(case, weight(case)), empty, tmp_path).shape == (1, 0, 8)


@ours
@pytest.mark.parametrize("change", [{"K": 96}, {"N": 16}, {"block_size": 64}, {"bits": 8}])
def test_sizes_that_do_not_fit_are_an_error(change, tmp_path):
    case = Case(1, 8, 64)
    with pytest.raises(EdgertError):
        multiplied(product(case, weight(case), **change), activations(case), tmp_path)


def test_what_may_not_be_rounded_or_has_more_inputs_is_left(tmp_path):
    case = Case(1, 8, 64)
    w = weight(case)

    def taken(proto: onnx.ModelProto) -> bool:
        path = tmp_path / "g.onnx"
        path.write_bytes(proto.SerializeToString())
        return kernels.substituted(path, products=True) is not None

    assert taken(product(case, w))
    assert replaced(product(case, w), tmp_path) is None  # where they are not faster
    assert not taken(product(case, w, accuracy_level=0))
    assert not taken(product(case, w, extra=("", "bias")))
    assert not taken(product(case, w, extra=("order",)))
    small = Case(1, 8, 64, block=16)
    assert not taken(product(small, weight(small)))
