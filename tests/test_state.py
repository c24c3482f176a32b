"""State: what a session allocates, shares by row, grows and resets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgert.backends.base import HostBuffer
from edgert.backends.fake import FakeBackend
from edgert.errors import BadBundle, CapacityExceeded, EdgertError, OutOfMemory
from edgert.spec import StateSpec, resolve
from edgert.state import States, bucket, rows_in

SPECS = {
    "lens": StateSpec("counter", "int64", ("batch",)),
    "k": StateSpec("append", "float32", ("batch", 2, "capacity", 3), "capacity", "lens"),
    "carry": StateSpec("carry", "float32", ("batch", 4), init="carry.npy"),
}
CARRY = np.arange(4, dtype=np.float32)


@pytest.fixture
def root(tmp_path) -> Path:
    np.save(tmp_path / "carry.npy", CARRY)
    return tmp_path


def states(root: Path, batch: int = 2, capacity: int = 8) -> States:
    return States(SPECS, FakeBackend({}), batch=batch, capacity=capacity, root=root)


@pytest.mark.parametrize(
    ("tokens", "context", "capacity"),
    [
        (1, 9000, 256),
        (256, 9000, 256),
        (257, 9000, 1024),
        (1025, 9000, 4096),
        (4097, 9000, 8192),
        (8193, 9000, 9000),
        (9000, 9000, 9000),
        (1, 64, 64),
        (64, 64, 64),
    ],
)
def test_a_bucket_is_the_smallest_that_holds_the_tokens(tokens, context, capacity):
    """Capacities go up in steps, and never beyond the model's context."""
    assert bucket(tokens, context) == capacity


def test_more_than_the_context_is_refused():
    """The message names both numbers and the way out."""
    with pytest.raises(CapacityExceeded, match="65 tokens .* context of 64") as caught:
        bucket(65, 64)
    assert "--context" in str(caught.value)


def test_axes_are_replaced_by_their_sizes():
    assert resolve(("batch", 3, "capacity"), {"batch": 2, "capacity": 7}) == (2, 3, 7)


def test_states_start_at_their_initial_values(root):
    """Zeros, counters of the batch, and the initial tensor in every row."""
    made = states(root)
    assert made.counters["lens"].tolist() == [0, 0]
    assert made.buffers["k"].shape == (2, 2, 8, 3)
    assert not made.buffers["k"].host.any()
    assert np.array_equal(made.buffers["carry"].host, np.stack([CARRY, CARRY]))
    assert made.nbytes == 2 * 8 + 2 * 2 * 8 * 3 * 4 + 2 * 4 * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(3, np.float32), r"float32\(3,\), declared float32\(4,\)"),
        (np.zeros(4, np.float64), r"float64\(4,\), declared float32"),
        (None, "cannot be read"),
        (b"not numpy", "cannot be read"),
    ],
)
def test_a_wrong_initial_tensor_is_refused(root, content, message):
    """Also pickles, which numpy would execute, and files that are not there."""
    (root / "carry.npy").unlink()
    if isinstance(content, bytes):
        (root / "carry.npy").write_bytes(content)
    elif content is not None:
        np.save(root / "carry.npy", content)
    with pytest.raises(BadBundle, match=message) as caught:
        states(root)
    assert "carry.npy" in str(caught.value)


def test_growing_keeps_the_content_and_zeroes_the_rest(root):
    """Rows of every head move to the same place of the larger buffer; the others stay put."""
    made = states(root)
    before = np.random.default_rng(1).standard_normal((2, 2, 8, 3)).astype(np.float32)
    made.buffers["k"].write(before)
    carry, lens = made.buffers["carry"], made.counters["lens"]
    lens[:] = (8, 3)
    made.resize(20)
    assert made.capacity == 20
    assert np.array_equal(made.buffers["k"].host[:, :, :8], before)
    assert not made.buffers["k"].host[:, :, 8:].any()
    assert made.buffers["carry"] is carry
    assert made.counters["lens"] is lens
    assert lens.tolist() == [8, 3]


def test_a_failed_growth_changes_nothing():
    """The second of two states finds no memory: the first has not moved either."""

    class Scarce(FakeBackend):
        def allocate(
            self, dtype: str, shape: tuple[int, ...], *, shared: bool = False
        ) -> HostBuffer:
            if shape == (1, 20, 2):
                raise OutOfMemory("no more")
            return super().allocate(dtype, shape)

    specs = {
        "lens": SPECS["lens"],
        "a": StateSpec("append", "int8", ("batch", "capacity"), "capacity", "lens"),
        "b": StateSpec("append", "int8", ("batch", "capacity", 2), "capacity", "lens"),
    }
    made = States(specs, Scarce({}), batch=1, capacity=8)
    before = dict(made.buffers)
    with pytest.raises(OutOfMemory):
        made.resize(20)
    assert made.buffers == before
    assert made.capacity == 8


def test_a_row_shares_the_memory_of_its_batch(root):
    """What is written through the row is in the batch, and nowhere else."""
    made = states(root)
    row = made.row(1)
    row.buffers["k"].host[...] = 5
    row.counters["lens"][:] = 4
    assert row.batch == 1
    assert made.counters["lens"].tolist() == [0, 4]
    assert (made.buffers["k"].host[1] == 5).all()
    assert not made.buffers["k"].host[0].any()


def test_a_row_cannot_grow_by_itself(root):
    made = states(root).row(0)
    with pytest.raises(EdgertError, match="a row of a batch cannot grow") as caught:
        made.resize(20)
    assert "reserve room on the whole batch" in str(caught.value)


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_row_beyond_the_batch(root, index):
    """An empty view would be handed to a library that trusts shapes."""
    with pytest.raises(IndexError, match=f"row {index} of a buffer of 2"):
        states(root).row(index)


def test_reset_brings_back_the_initial_values(root):
    """Counters and carried states start over; append rows are stale and stay."""
    made = states(root)
    made.counters["lens"][:] = 3
    made.buffers["carry"].host[...] = 9
    made.reset()
    assert made.counters["lens"].tolist() == [0, 0]
    assert np.array_equal(made.buffers["carry"].host, np.stack([CARRY, CARRY]))


def test_what_was_exported_is_taken_up_whatever_looks_like_a_counter(root):
    specs = SPECS | {"steps": StateSpec("carry", "int64", ("batch",))}
    old, new = (States(specs, FakeBackend({}), batch=1, capacity=8, root=root) for _ in range(2))
    old.counters["lens"][0] = 3
    old.buffers["steps"].host[:] = 7
    old.buffers["k"].host[:] = np.arange(48, dtype=np.float32).reshape(1, 2, 8, 3)
    saved = old.export()
    assert saved["k"].shape == (1, 2, 3, 3)
    new.restore(saved)
    assert int(new.counters["lens"][0]) == 3
    for name, array in new.export().items():
        np.testing.assert_array_equal(array, saved[name])


@pytest.mark.parametrize(
    "count", [None, np.array([1, 2]), np.array([1], np.int32), np.array(1), np.array([1.0])]
)
def test_rows_are_what_the_counter_says_or_nothing(count):
    with pytest.raises(ValueError, match="lens"):
        rows_in(SPECS, {} if count is None else {"lens": count})


@pytest.mark.parametrize("shape", [(1 << 30, 1 << 30, 4), (1 << 40, 1 << 40)])
def test_memory_that_is_not_there_is_a_typed_error(shape):
    """Sizes come from a bundle: beyond memory, and beyond what numpy can count."""
    with pytest.raises(OutOfMemory, match="cannot allocate .* MB for a float32 tensor"):
        FakeBackend({}).allocate("float32", shape)


def test_a_buffer_takes_only_its_own_shape_and_dtype():
    buffer = FakeBackend({}).allocate("float32", (2, 3))
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int64)):
        with pytest.raises(ValueError, match="into float32"):
            buffer.write(wrong)
    copy = buffer.read()
    copy[...] = 1
    assert not buffer.host.any()
