"""Runner: steps over bound states give what the whole history gives, or refuse before they run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_model import CONTEXT, VOCAB, Graph, fake_runner, hashed, kept, manifest

from edgert.errors import (
    CapacityExceeded,
    EdgertError,
    Poisoned,
    UnsupportedModel,
    UsageError,
)
from edgert.runner import PREFILL_CHUNK, SCORE_CHUNK
from edgert.spec import ProgramSpec, StateSpec, TensorSpec

IDS = np.random.default_rng(5).integers(0, VOCAB, 1500)


def fed(execution, ids, **options):
    """The last step of a prefill."""
    *_, io = execution.feed(np.asarray(ids, np.int64), **options)
    return io


@pytest.mark.parametrize("chunk", [1, 7, 64, 5000])
def test_chunks_give_what_one_step_gives(chunk):
    """However a prompt is cut, the state and the last logits are those of the whole."""
    execution = fake_runner().open()
    io = fed(execution, IDS[:200], chunk=chunk)
    assert np.array_equal(io.logits[0, 0], hashed(IDS[:200]))
    assert io.token[0, 0] == hashed(IDS[:200]).argmax()
    assert kept(execution.states.buffers["kept"], 0, 200) == IDS[:200].tolist()
    assert execution.lens.tolist() == [200]


def test_a_long_prompt_is_cut_into_chunks():
    graph = Graph()
    fed(fake_runner(graph).open(), IDS[: PREFILL_CHUNK + 3])
    assert graph.calls == [(PREFILL_CHUNK, 1), (3, 1)]


def test_single_steps_give_what_one_step_gives():
    execution = fake_runner().open()
    for i, token in enumerate(IDS[:20]):
        io = execution.step(int(token))
        assert np.array_equal(io.logits[0, 0], hashed(IDS[: i + 1]))


@pytest.mark.parametrize("length", [1, SCORE_CHUNK, SCORE_CHUNK + 1, 200])
def test_scoring_gives_what_steps_give(length):
    """Every position has the logits of its own history."""
    out = np.empty((length, VOCAB), np.float32)
    fake_runner().open(tokens=length).score(IDS[:length], out)
    want = [hashed(IDS[: i + 1]) for i in range(length)]
    assert np.array_equal(out, np.stack(want))


def test_growing_keeps_the_history():
    """Beyond a bucket, steps go on with all they had, on new bindings."""
    execution = fake_runner().open()
    fed(execution, IDS[:256])
    before = execution.io()
    assert execution.states.capacity == 256
    io = execution.step(int(IDS[256]))
    assert execution.states.capacity == 1024
    assert io is not before
    assert np.array_equal(io.logits[0, 0], hashed(IDS[:257]))


def test_a_step_shape_is_bound_once():
    """The same shape gives the same buffers; a shape long unused is let go."""
    execution = fake_runner().open()
    first = execution.io()
    for tokens in (2, 3, 4):
        execution.io(tokens)
    assert execution.io() is first
    second = execution.io(2)
    for tokens in range(5, 11):
        execution.io(tokens)
    assert execution.io(2) is not second


def test_a_step_beyond_the_capacity_is_refused_before_it_runs():
    """The graph would write behind its buffer; the session is as it was."""
    graph = Graph()
    execution = fake_runner(graph, context=8).open()
    fed(execution, IDS[:8])
    io = execution.io()
    with pytest.raises(EdgertError, match=r"1 tokens behind \[8\] does not fit .* capacity of 8"):
        io.run()
    assert len(graph.calls) == 1
    execution.lens[:] = 7
    io.run()


def test_a_negative_counter_is_refused_before_it_runs():
    """It would write in front of the buffer."""
    execution = fake_runner().open()
    execution.lens[:] = -1
    with pytest.raises(EdgertError, match=r"behind \[-1\]"):
        execution.io().run()


@pytest.mark.parametrize("tokens", [65, 10**30])
def test_more_than_the_context_is_refused(tokens):
    runner = fake_runner(context=64)
    with pytest.raises(CapacityExceeded, match=f"{tokens} tokens .* context of 64"):
        runner.open(tokens=tokens)
    with pytest.raises(CapacityExceeded):
        runner.open().reserve(tokens)


def test_a_failed_step_poisons_the_execution():
    """The step's own error first, then Poisoned; the counter did not move, another one is fine."""
    graph = Graph()
    runner = fake_runner(graph)
    execution = runner.open()
    fed(execution, IDS[:5])

    def fail() -> None:
        raise RuntimeError("broken")

    graph.hook = fail
    with pytest.raises(RuntimeError, match="broken"):
        execution.step(1)
    graph.hook = lambda: None
    with pytest.raises(Poisoned, match="an earlier step .* failed") as caught:
        execution.step(1)
    assert "open a new session" in str(caught.value)
    assert execution.lens.tolist() == [5]
    assert np.array_equal(fed(runner.open(), IDS[:5]).logits[0, 0], hashed(IDS[:5]))


def test_ragged_rows_step_together():
    """Prefilled row by row, then one step of both: each row has its own history."""
    execution = fake_runner().open(batch=2, tokens=50)
    lengths = (40, 9)
    for row, length in enumerate(lengths):
        fed(execution.row(row), IDS[row : row + length])
    io = execution.io()
    for step in range(3):
        for row, length in enumerate(lengths):
            io.ids[row, 0] = IDS[row + length + step]
        io.run()
        for row, length in enumerate(lengths):
            want = hashed(IDS[row : row + length + step + 1])
            assert np.array_equal(io.logits[row, 0], want), (step, row)
    assert execution.lens.tolist() == [43, 12]


def test_a_row_cannot_outgrow_its_batch():
    execution = fake_runner().open(batch=2)
    with pytest.raises(EdgertError, match="a row of a batch cannot grow"):
        fed(execution.row(0), IDS[:257])


def test_lowering_the_counter_rewinds():
    """What is fed after it replaces what was there; nothing of the old end is seen."""
    execution = fake_runner().open()
    fed(execution, IDS[:30])
    execution.lens[:] = 10
    io = fed(execution, IDS[100:105])
    assert np.array_equal(io.logits[0, 0], hashed(np.r_[IDS[:10], IDS[100:105]]))


def test_the_newest_step_is_known_until_the_counter_moves():
    """Its results belong to the newest token only as long as that is the newest."""
    execution = fake_runner().open()
    assert execution.last is None
    io = fed(execution, IDS[:30])
    assert execution.last is io
    execution.lens[:] = 29
    assert execution.last is None
    execution.reset()
    assert execution.last is None
    assert np.array_equal(fed(execution, IDS[:3]).logits[0, 0], hashed(IDS[:3]))


def test_carried_state_starts_over_on_reset():
    """A state without a counter must not leak from one sequence into the next."""

    def decode(ids, select, lens, total):
        sums = total + ids.sum(1, keepdims=True)
        logits = np.repeat(sums.astype(np.float32)[:, None], VOCAB, 2)
        return {"total_next": sums, "logits": logits, "token": np.zeros_like(select)}

    made = manifest()
    graph = made.variants["fp32-ort"].graphs["decode"]
    wired = replace(
        graph,
        inputs={k: v for k, v in graph.inputs.items() if k != "kept"} | {"total": "state.total"},
        outputs={"logits": "result.logits", "token": "result.token", "total_next": "state.total"},
    )
    variant = replace(made.variants["fp32-ort"], graphs={"decode": wired})
    states = {
        "lens": made.states["lens"],
        "total": StateSpec("carry", "int64", ("batch", 1)),
    }
    runner = fake_runner(decode, states=states, variants={"fp32-ort": variant})
    execution = runner.open()
    assert fed(execution, [3, 4], chunk=1).logits[0, 0, 0] == 7
    execution.reset()
    assert fed(execution, [5]).logits[0, 0, 0] == 5


def test_time_inside_the_graph_is_counted():
    execution = fake_runner().open()
    fed(execution, IDS[:3])
    assert execution.graph_ns > 0


def test_a_closed_model_is_refused():
    """For executions that are open and those that are not."""
    runner = fake_runner()
    execution = runner.open()
    fed(execution, IDS[:3])
    runner.close()
    for use in (runner.open, lambda: execution.step(1)):
        with pytest.raises(UsageError, match="the model is closed"):
            use()
    execution.close()


LENS = StateSpec("counter", "int64", ("batch",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"ids": TensorSpec("int64", ("batch", "tokens"))}}, "inputs.select is not"),
        ({"inputs": {"ids": TensorSpec("int32", ("batch", "tokens"))}}, "inputs.ids is not int64"),
        ({"inputs": {"image": TensorSpec("uint8", (3,))}}, "inputs.image is unknown"),
        ({"results": {"values": TensorSpec("int64", ("batch",))}}, "results.values is unknown"),
        ({"vocab_size": 300}, r"results.logits is not float32 \['batch', 'select', 300\]"),
        ({"states": {}}, "0 counters instead of one"),
        ({"states": {"a": LENS, "b": LENS}}, "2 counters instead of one"),
        ({"states": {"c": StateSpec("carry", "int8", (4, 4))}}, "states.c: its first axis"),
        ({"states": {"c": StateSpec("carry", "int8", ("batch", "n"))}}, r"states.c: .*\['n'\]"),
        ({"states": {"r": StateSpec("ring", "int8", ("batch", "w"), "w")}}, "of kind ring"),
        (
            {
                "states": {
                    "k": StateSpec(
                        "append", "int8", ("batch", "capacity"), "capacity", "lens", "k.npy"
                    )
                }
            },
            "states.k grows and has an initial value",
        ),
        ({"context": 0}, "it has no tokens: .* context 0"),
    ],
)
def test_a_bundle_that_is_no_decoder_is_refused_when_it_is_opened(changes, message):
    """Each reason by name, instead of a missing key in mid-step."""
    with pytest.raises(UnsupportedModel, match=message) as caught:
        fake_runner(**changes)
    assert "install a newer edgert" in str(caught.value)


def test_a_body_without_a_loop_is_refused():
    with pytest.raises(UnsupportedModel, match="without a loop has only an epilogue"):
        fake_runner(program=ProgramSpec("decode", body="reason"))


def test_the_context_of_the_fakes_spans_all_buckets():
    """The growth tests above depend on it."""
    assert CONTEXT > 4096
