"""rng: frozen draws, an independent Philox, and no state between calls."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.errors import UsageError
from edgert.rng import LIMIT, fresh_seed, uniform

FROZEN = {
    (0, 0, 0): 0.011546754286331562,
    (1, 0, 0): 0.3035680343067586,
    (0, 1, 0): 0.5023796042735054,
    (0, 0, 1): 0.8133540609793564,
    (1234, 56, 7): 0.11707398638721778,
    (LIMIT - 1, LIMIT - 1, LIMIT - 1): 0.005915559114363478,
}


def philox(counter: int, key: int) -> int:
    """The first word of Philox4x64-10, written from the paper's definition."""
    mask = LIMIT - 1
    words = [counter >> 64 * i & mask for i in range(4)]
    low, high = key & mask, key >> 64
    for _ in range(10):
        a, b = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(b >> 64) ^ words[1] ^ low, b & mask, (a >> 64) ^ words[3] ^ high, a & mask]
        low = (low + 0x9E3779B97F4A7C15) & mask
        high = (high + 0xBB67AE8584CAA73B) & mask
    return words[0]


def test_reference_has_the_published_answer():
    """The test's own Philox gives Random123's known answer for counter 0 and key 0."""
    assert philox(0, 0) == 0x16554D9ECA36314C


@pytest.mark.parametrize("arguments", FROZEN)
def test_draws_are_frozen(arguments):
    """A change of these numbers would break the resume of saved sessions."""
    assert uniform(*arguments) == FROZEN[arguments]


@pytest.mark.parametrize("arguments", [*FROZEN, (7, LIMIT - 1, 0), (2**63, 2**32, 2**40)])
def test_draw_is_philox_of_key_and_counter(arguments):
    """The draw is the first word of the block after the position, to 53 bits."""
    seed, position, stream = arguments
    assert uniform(*arguments) == (philox(position + 1, seed | stream << 64) >> 11) / 2**53


def test_draws_do_not_depend_on_order():
    """Asking backwards gives what asking forwards gave."""
    forwards = [uniform(3, position) for position in range(20)]
    assert [uniform(3, position) for position in reversed(range(20))] == forwards[::-1]


def test_numpy_integers_count_as_integers():
    """Positions come out of arrays as well."""
    assert uniform(np.int64(1234), np.int64(56), np.uint64(7)) == FROZEN[1234, 56, 7]


def test_draws_are_uniform():
    """4,096 draws fill 16 equal bins evenly (chi-square, 15 degrees, p = 0.001)."""
    bins = np.bincount([int(16 * uniform(11, position)) for position in range(4096)], minlength=16)
    assert bins.size == 16
    assert ((bins - 256) ** 2 / 256).sum() < 37.7


@pytest.mark.parametrize("name", ["seed", "position", "stream"])
@pytest.mark.parametrize("value", [-1, LIMIT])
def test_out_of_range_is_refused(name, value):
    """The message names the argument and its range."""
    with pytest.raises(UsageError, match=rf"{name} = {value} is out of range\n.*0 to {LIMIT - 1}"):
        uniform(**{"seed": 0, "position": 0, "stream": 0, name: value})


def test_fresh_seeds_are_valid_and_differ():
    """Fresh seeds are 64-bit numbers, not one and the same."""
    seeds = {fresh_seed() for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < LIMIT for seed in seeds)
