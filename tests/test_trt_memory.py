"""How much memory a session takes on the device: by hand, and as the backend allocates it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import fake_loop
import fake_model
import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_loop import looped_manifest
from fake_trt import SCRATCH, device_model
from hypothesis import given
from hypothesis import strategies as st

from edgert.backends.tensorrt.memory import (
    Item,
    aligned,
    is_replaced,
    loop_items,
    nbytes_of,
    plan_session,
    plan_slots,
)
from edgert.backends.tensorrt.rectangles import part, rectangles
from edgert.model import Model
from edgert.spec import GraphSpec, LoopSpec, ProgramSpec, TensorSpec, VariantSpec

VARIANT = "fp32-ort"
ONE = {"batch": 1, "capacity": 256, "tokens": 1, "select": 1}
LOGITS = fake_model.VOCAB * 4


@pytest.mark.parametrize(("nbytes", "reserved"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_every_tensor_begins_at_a_multiple_of_256_bytes(nbytes, reserved):
    assert aligned(nbytes) == reserved


def test_a_decoder_by_hand():
    """The state that the graph writes where it reads it has two sides, its counter has one."""
    plan = plan_session(fake_model.manifest(), VARIANT, ONE, scratch=[700, 1000])
    assert plan.states == (
        Item("state.lens", 8, 1, "shared"),
        Item("state.kept", 256 * 8, 2, "device"),
    )
    assert plan.step == (
        Item("input.ids", 8, 1, "shared"),
        Item("input.select", 8, 1, "shared"),
        Item("result.logits", LOGITS, 1, "shared"),
        Item("result.token", 8, 1, "shared"),
    )
    assert plan.scratch == 1000  # of the largest engine: they share it
    assert plan.total("device") == 1024 + 2 * 2048
    assert plan.total("shared") == 256 + 2 * 256 + aligned(LOGITS) + 256


def test_a_loop_by_hand():
    """A row of keys for each iteration, both buffers of what goes round, a number each."""
    axes = ONE | {"batch": 2, "capacity": 1024}
    plan = plan_session(looped_manifest(), VARIANT, axes, in_place=["kept.0"])
    assert [(i.end, i.nbytes, i.sides) for i in plan.states] == [
        ("state.lens", 16, 1),
        ("state.kept.0", 8192, 1),
        ("state.kept.1", 8192, 2),
        ("state.kept.2", 8192, 2),
        ("state.kept.3", 8192, 2),
    ]
    assert plan.step[4:] == (
        Item("value.h", 16, 2, "device"),
        Item("signal.change", 8, 1, "shared"),
        *(Item(f"loop.iteration[{i}]", 8, 1, "shared") for i in range(4)),
    )
    assert plan.total("device") == 7 * 8192 + 2 * 256


def solver() -> tuple:
    """A model that solves: h goes round the loop, x is only read."""
    body = GraphSpec(
        *("body", ()),
        {"h": "value.h", "x": "value.x", "steps": "loop.steps"},
        {"h.next": "value.h", "q": "signal.q"},
    )
    first = GraphSpec("first", (), {"ids": "input.ids"}, {"h": "value.h", "x": "value.x"})
    last = GraphSpec("last", (), {"h": "value.h"}, {"token": "result.token"})
    graphs = {"first": first, "body": body, "last": last}
    values = {"h": TensorSpec("float32", ("batch", 100)), "x": TensorSpec("float16", ("batch", 3))}
    loop = LoopSpec(9, values, {"q": TensorSpec("float32", ("batch",))}, "none")
    return graphs, ProgramSpec("last", "first", "body", loop)


def test_puzzles_by_hand():
    graphs, program = solver()
    manifest = replace(
        fake_model.manifest(),
        program=program,
        inputs={"ids": TensorSpec("int32", ("batch", 16))},
        results={"token": TensorSpec("int32", ("batch", 16))},
        states={},
        variants={VARIANT: VariantSpec("fp32", "portable", {"ai.onnx": 20}, graphs)},
    )
    plan = plan_slots(manifest, VARIANT, 8)
    assert plan.step == (
        Item("loop.steps", 64, 1, "shared"),
        Item("result.token", 8 * 64, 1, "shared"),
        Item("value.h", 8 * 400, 2, "device"),
        Item("value.x", 8 * 6, 1, "device"),
        Item("signal.q", 32, 1, "shared"),
        Item("input.ids", 64, 1, "shared"),
        Item("value.h", 400, 2, "device"),
        Item("value.x", 6, 1, "device"),
        Item("signal.q", 4, 1, "shared"),
    )
    assert plan.total("device") == 2 * 3328 + 256 + 2 * 512 + 256
    assert is_replaced(graphs.values(), "value.h")
    assert not is_replaced(graphs.values(), "value.x")
    unrolled = replace(manifest.variants[VARIANT], graphs={"last": graphs["last"]})
    assert loop_items(replace(manifest, variants={VARIANT: unrolled}), VARIANT, {"batch": 8}) == ()


# ------------------------------------------------------------ what the backend really allocates


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGERT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(params=["decoder", "loop"])
def model(request) -> Iterator[Model]:
    if request.param == "decoder":
        made = device_model(fake_model.manifest(), VARIANT, {"decode": fake_model.Graph()})
    else:
        graphs = fake_loop.Graphs()
        functions = {"enter": graphs.enter, "think": graphs.think, "leave": graphs.leave}
        made = device_model(looped_manifest(), VARIANT, functions)
    with made:
        yield made


@pytest.mark.parametrize("axes", [ONE, {"batch": 2, "capacity": 1024, "tokens": 1, "select": 1}])
def test_the_backend_allocates_what_the_plan_says(model, axes):
    cuda: FakeCuda = model.runner.backend.device.cuda
    execution = model.runner.open(batch=axes["batch"], tokens=axes["capacity"])
    io = execution.io()
    io.ids[:], io.select[:] = 5, 0
    io.run()
    plan = plan_session(model.manifest, VARIANT, axes, scratch=[SCRATCH])
    assert cuda.reserved() == plan.total("device")
    assert cuda.reserved(shared=True) == plan.total("shared")
    execution.close()
    del execution, io
    model.runner.backend.wait()  # between two calls is when memory is let go
    assert cuda.reserved() == 1024  # what engines compute in
    assert cuda.reserved(shared=True) == 0


# ------------------------------------------------------------------------------- parts of tensors


def move(to: np.ndarray, source: np.ndarray, at: tuple[slice, ...]) -> int:
    """Copy a part by rectangles over flat bytes -> how many it took."""
    size = to.dtype.itemsize
    flat_to, flat_source = to.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
    count = 0
    for r in rectangles(part(to.shape, size, at), part(source.shape, size, at), size):
        count += 1
        for line in range(r.height):
            here, there = r.to + line * r.to_pitch, r.source + line * r.source_pitch
            flat_to[here : here + r.width] = flat_source[there : there + r.width]
    return count


@st.composite
def moves(draw) -> tuple:
    """Two shapes, and slices that name the same part of both."""
    one, other, at = [], [], []
    for _ in range(draw(st.integers(0, 4))):
        a, b = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        b = draw(st.sampled_from([a, b]))
        stop = draw(st.integers(0, min(a, b)))
        start = draw(st.integers(0, stop))
        at.append(slice(None) if a == b and draw(st.booleans()) else slice(start, stop))
        one.append(a)
        other.append(b)
    return tuple(one), tuple(other), tuple(at)


@given(moves())
def test_rectangles_copy_what_numpy_copies(case):
    to_shape, source_shape, at = case
    source = np.arange(1, 1 + int(np.prod(source_shape)), dtype=np.int16).reshape(source_shape)
    want, got = np.zeros(to_shape, np.int16), np.zeros(to_shape, np.int16)
    want[at] = source[at]
    move(got, source, at)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    ("to", "source", "at", "count"),
    [
        ((2, 4, 8, 3), (2, 4, 8, 3), (), 1),
        ((2, 4, 16, 3), (2, 4, 8, 3), (slice(2), slice(4), slice(8), slice(3)), 1),
        ((2, 4, 8, 3), (2, 4, 8, 3), (slice(1, 2), slice(None), slice(5, 6)), 1),
        ((2, 4, 8, 3), (2, 4, 8, 3), (slice(2), slice(3), slice(5, 6)), 2),
        ((2, 4), (2, 4), (slice(0),), 0),
    ],
    ids=["whole", "another capacity", "a row of keys", "of every sequence, some heads", "nothing"],
)
def test_a_part_of_a_state_is_few_copies(to, source, at, count):
    assert move(np.zeros(to, np.float32), np.ones(source, np.float32), at) == count


def test_parts_that_are_no_parts_are_refused():
    with pytest.raises(ValueError, match="a step of 2"):
        part((4,), 4, (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="onto one of"):
        list(rectangles(part((4,), 4), part((5,), 4), 4))
    assert nbytes_of("float16", (3, 2)) == 12
