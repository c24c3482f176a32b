"""Clifford algebra Cl(3,0,0) equals the published utilities."""

from __future__ import annotations

import torch
from cases import assert_close, cases

from edgert.models import clifford

(CASE,) = cases("hagi", lambda case: case.name == "clifford")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def test_signs_and_blades_are_the_published_table() -> None:
    for a in range(8):
        for b in range(8):
            assert clifford.sign(a, b) == CASE["sign"][a, b]
            assert a ^ b == CASE["index"][a, b]


def test_products_reverse_and_projections() -> None:
    x, y = torch.from_numpy(CASE["x"]), torch.from_numpy(CASE["y"])
    assert_close(clifford.product(x, y), CASE["xy"], **TOLERANCE)
    assert_close(clifford.reverse(x), CASE["rev_x"], **TOLERANCE)
    for grade in range(4):
        assert_close(clifford.project(x, grade), CASE["proj_x"][grade], **TOLERANCE)


def test_the_square_in_closed_form_is_the_general_product() -> None:
    """Grades 0 and 2, against the published product and ours; the rest is not computed."""
    vector = torch.from_numpy(CASE["vector"]).unflatten(-1, (-1, 8))
    scalar, bivector = clifford.square(vector)
    want = torch.from_numpy(CASE["self_product"])
    assert_close(scalar, want[..., 0], **TOLERANCE)
    assert_close(bivector, want[..., [3, 5, 6]], **TOLERANCE)
    assert_close(clifford.product(vector, vector), want, **TOLERANCE)
    assert_close(clifford.project(want, 0).flatten(-2), CASE["g0"], **TOLERANCE)
    assert_close(clifford.project(want, 2).flatten(-2), CASE["g2"], **TOLERANCE)


def test_the_product_is_associative_and_the_reverse_turns_it_around() -> None:
    x, y, z = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    product, reverse = clifford.product, clifford.reverse
    assert_close(product(product(x, y), z), product(x, product(y, z)), atol=1e-12)
    assert_close(reverse(product(x, y)), product(reverse(y), reverse(x)), atol=1e-12)
