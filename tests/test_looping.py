"""Loops: full depth, early exit, what is filled in, batches, pauses; against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from fake_loop import IDS, ITERATIONS, Graphs, looped_model, looped_runner, said
from hypothesis import given
from hypothesis import strategies as st

import edgert
from edgert.errors import UnsupportedModel, UsageError
from edgert.halting import Halt, parse_halt
from edgert.spec import LoopSpec, ProgramSpec, TensorSpec

POLICIES = ["fixed:1", "fixed:3", "settle:0.05", "settle:0.3:2", "settle:0.9:1:2"]


@pytest.mark.parametrize("chunks", [(24,), (1,) * 24, (5, 1, 7, 11)])
def test_all_iterations_whatever_the_chunks(chunks):
    """Prefill, chunks and steps give what each token gives at full depth."""
    want, _ = said(IDS)
    execution, done = looped_runner().open(tokens=len(IDS)), 0
    for size in chunks:
        io = execution.io(size, size)
        io.ids[0] = IDS[done : done + size]
        io.select[0] = np.arange(size)
        io.run()
        for i in range(size):
            assert np.array_equal(io.logits[0, i], want[done + i])
        assert io.iterations.tolist() == [ITERATIONS]
        done += size


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_end_their_loop_by_themselves(policy):
    """Depth, logits and every later token's view of the skipped iterations."""
    halt = parse_halt(policy)
    want, depths = said(IDS, halt)
    graphs = Graphs()
    execution = looped_runner(graphs).open(tokens=len(IDS))
    for i, token in enumerate(IDS):
        graphs.depths.clear()
        io = execution.step(token, halt)
        assert graphs.depths == list(range(depths[i])), "no more iterations run than are needed"
        assert io.iterations.tolist() == [depths[i]]
        assert np.array_equal(io.logits[0, 0], want[i])
    if policy.startswith("settle"):
        assert len(set(depths)) > 1, "the case has fast and slow tokens"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_gives_each_row_what_it_gets_alone(policy):
    """Rows that have ended are frozen while the others go on."""
    halt = parse_halt(policy)
    rows = [IDS, [i ^ 1 for i in IDS], IDS[::-1]]
    execution = looped_runner().open(batch=3, tokens=len(IDS))
    want = [said(row, halt) for row in rows]
    for i in range(len(IDS)):
        io = execution.io()
        io.ids[:, 0] = [row[i] for row in rows]
        io.select[:] = 0
        io.run(halt)
        for row, (logits, depths) in enumerate(want):
            assert io.iterations[row] == depths[i]
            assert np.array_equal(io.logits[row, 0], logits[i])
    if policy.startswith("settle"):
        assert any(len(set(step)) > 1 for step in zip(*(d for _, d in want), strict=True))


def test_a_prompt_runs_all_iterations_and_the_answer_ends_early():
    graphs = Graphs()
    model = looped_model(graphs)
    result = model.generate(IDS[:5], max_tokens=6, halt="fixed:2", ignore_eos=True)
    assert graphs.depths == [*range(ITERATIONS), *[0, 1] * 5]
    assert result.timings.iterations == [2] * 5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("setting", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_pause_at_every_token_goes_on_bitwise(policy, setting, tmp_path):
    """The policy is part of the saved request, and the token that is fed again ends as it did."""
    model = looped_model()
    options = {"max_tokens": 16, "halt": policy, "ignore_eos": True, "logprobs": 1, **setting}
    want = list(model.session().stream(IDS[:4], **options))
    assert len(want) == 16
    for position in range(1, 16):
        session = model.session()
        stream = session.stream(IDS[:4], **options)
        got = [next(stream) for _ in range(position)]
        session.save(tmp_path / "s")
        with edgert.resume(tmp_path / "s", model) as resumed:
            got += list(resumed.stream())
        assert got == want


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rewind_into_the_answer_repeats_it(policy):
    model = looped_model()
    session = model.session()
    options = {"max_tokens": 12, "halt": policy, "ignore_eos": True}
    whole = session.generate(IDS[:4], **options)
    for position in (5, 9, 15):
        session.rewind(position)
        again = session.generate()
        assert whole.tokens[position - 4 :] == again.tokens[: 16 - position]


def test_what_cannot_halt_is_refused_before_anything_happens():
    model = looped_model(fill="none")
    with pytest.raises(UsageError, match="cannot halt early"):
        model.generate(IDS[:3], halt="fixed:2")
    assert model.generate(IDS[:3], halt="full", max_tokens=2).tokens
    with pytest.raises(UsageError, match="the model has 4"):
        looped_model().generate(IDS[:3], halt="fixed:5")
    execution = looped_runner().open(tokens=8)
    io = execution.io(2)
    with pytest.raises(UsageError, match="one token"):
        io.run(Halt(most=1))
    assert execution.lens.tolist() == [0]


def test_values_and_signals_of_other_shapes_are_refused():
    """What the runtime cannot allocate or read by row."""
    value, signal = TensorSpec("float32", ("batch", "depth")), TensorSpec("int64", ("batch",))
    loop = LoopSpec(ITERATIONS, {"h": value}, {"change": signal}, "copy")
    with pytest.raises(UnsupportedModel) as caught:
        looped_runner(program=ProgramSpec("leave", "enter", "think", loop))
    assert "program.loop.values.h" in caught.value.what
    assert "program.loop.signals.change" in caught.value.what


@pytest.mark.parametrize("policy", ["full", *POLICIES, "settle:1e-05:2:3"])
def test_a_policy_is_written_as_it_is_read(policy):
    assert str(parse_halt(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        *("", "half", "full:1", "fixed", "fixed:0", "fixed:x", "fixed:1:2", "fixed:99999"),
        *("settle", "settle:nan", "settle:inf", "settle:-1", "settle:0.1:0", "settle:0.1:3:2"),
        *("settle:0.1:1:2:3", "settle:x", "fixed:\u0661", "settle:0.1:"),
    ],
)
def test_other_policies_are_refused(text):
    with pytest.raises(UsageError):
        parse_halt(text)


@given(
    st.floats(0, 1e6),
    st.integers(1, 1024),
    st.one_of(st.none(), st.integers(1, 1024)),
)
def test_every_policy_survives_its_text(threshold, least, most):
    if most is not None and most < least:
        least, most = most, least
    policy = Halt(threshold, least, most)
    again = parse_halt(str(policy))
    for done in (1, 2, least, most or 1024):
        for change in (0.0, threshold / 2, threshold, 2 * threshold + 1):
            value = np.array([change], np.float32)
            assert again.ended(done, value) == policy.ended(done, value)
