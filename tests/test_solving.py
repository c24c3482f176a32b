"""Solving with exported graphs equals the published model: when each puzzle halts, with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import cases

import edgert
from edgert.errors import BadBundle, OutOfMemory, UsageError
from edgert.solving import Solving
from edgert.state import stored_array
from edgert.tasks import find, of_size

CASE = next(case for case in cases("hrm") if case.name == "orig_rope_puzzle")
TOLERANCE = 1e-3  # of the case itself, free-running


@pytest.fixture(scope="module")
def model(rope_bundle):
    with edgert.load(rope_bundle) as loaded:
        yield loaded


def solving(model, times=1, **options) -> Solving:
    """The case's puzzles, `times` over."""
    ids = np.tile(CASE["inputs"], (times, 1))
    return model.solving(ids, number=np.tile(CASE["puzzle_identifiers"], times), **options)


@pytest.mark.parametrize("batch", [1, 2, 3, 32])
def test_each_puzzle_halts_when_the_published_model_says(model, batch):
    found = solving(model, batch=batch, logits=True).run()
    assert [s.steps for s in found] == CASE["early_exit_step"].tolist()
    assert all(s.halted for s in found)
    for got, want in zip(found, CASE["early_exit_logits"], strict=True):
        np.testing.assert_allclose(got.results["logits"], want, rtol=0, atol=TOLERANCE)
        assert (got.values == want.argmax(-1)).all()


def test_at_full_depth_all_run_all_segments(model):
    found = solving(model, halt="full", logits=True).run()
    depth = len(CASE["logits"])
    assert [(s.steps, s.reason) for s in found] == [(depth, "limit")] * len(found)
    for got, want in zip(found, CASE["logits"][-1], strict=True):
        np.testing.assert_allclose(got.results["logits"], want, rtol=0, atol=TOLERANCE)


def test_puzzles_that_come_and_go_get_what_they_get_alone(model):
    """Twenty-one puzzles through four slots, in whatever order they are done."""
    alone = [s.steps for s in solving(model).run()]
    work = solving(model, 7, batch=4, logits=True)
    order = [index for index, _ in work]
    assert sorted(order) == list(range(21))
    assert order != sorted(order)
    single = solving(model, logits=True, batch=1).run()
    for index, answer in work.answers.items():
        assert answer.steps == alone[index % 3]
        want = single[index % 3].results["logits"]
        np.testing.assert_allclose(answer.results["logits"], want, rtol=0, atol=1e-4)


def test_a_deadline_gives_the_answer_so_far(model):
    late = solving(model, deadline_ms=0).run()
    assert [(s.steps, s.reason, s.values is None) for s in late] == [(0, "deadline", True)] * 3
    shown = []

    def enough(look) -> bool:
        shown.append((look.index, look.steps))
        return look.steps < 2

    found = solving(model, halt="full", on_step=enough).run()
    assert [(s.steps, s.reason) for s in found] == [(2, "cancelled")] * 3
    assert shown == [(i, n) for n in (1, 2) for i in range(3)]


def test_what_was_left_off_goes_on_as_if_it_had_not_been(model):
    """The answers so far are given, and then the final ones: those of the uninterrupted run."""
    whole = solving(model, logits=True).run()
    work = solving(model, logits=True, deadline_ms=0)
    assert [s.values is None for s in work.run()] == [True] * 3
    assert (work.stopped, work.done) == ("deadline", False)
    work.extend()
    work.step()
    halted = {index for index, answer in work.answers.items() if answer.halted}
    assert {index for index, _ in work.stop("paused")} == set(range(3)) - halted
    assert {s.reason for s in work.run()} == {"halted", "paused"}
    spent = work.spent_ns
    assert work.spent_ns == spent
    work.extend(deadline_ms=60_000)
    found = work.run()
    assert (work.stopped, work.done, work.stop()) == (None, True, [])
    for got, want in zip(found, whole, strict=True):
        assert (got.steps, got.reason) == (want.steps, want.reason)
        np.testing.assert_array_equal(got.results["logits"], want.results["logits"])
    with pytest.raises(UsageError, match="a deadline of -1 ms"):
        work.extend(-1)


def test_closed_work_is_not_gone_on_with(model, tmp_path):
    with solving(model) as work:
        work.step()
    work.close()
    for use in (work.run, work.stop, lambda: work.save(tmp_path / "s.session")):
        with pytest.raises(UsageError, match="the work is closed"):
            use()
    assert not list(tmp_path.iterdir())


def test_work_is_cancelled_from_elsewhere_behind_its_iteration(model):
    work = solving(model, halt="full")
    work.cancel()
    assert [(s.steps, s.reason) for s in work.run()] == [(1, "cancelled")] * 3


def test_a_batch_larger_than_memory_is_refused_before_it_is_allocated(model, monkeypatch):
    from edgert import slots

    monkeypatch.setattr(slots, "available_memory", lambda: 100_000)
    with pytest.raises(OutOfMemory, match="32 puzzles in the loop at once take"):
        solving(model, 11).run()
    assert len(solving(model, batch=1).run()) == 3


def test_a_trace_is_what_the_published_model_has_behind_each_segment(model):
    found = model.trace(CASE["inputs"], number=CASE["puzzle_identifiers"])
    assert len(found) == len(CASE["logits"])
    for i, step in enumerate(found):
        assert step.outputs.keys() == {"logits", "token", "q"}
        for got, want in (
            (step.outputs["logits"], CASE["logits"][i]),
            (step.outputs["q"][:, 0], CASE["q_halt_logits"][i]),
            (step.signals["halt"], CASE["q_halt_logits"][i] - CASE["q_continue_logits"][i]),
            (step.states["z_h"], CASE["z_H"][i]),
            (step.states["z_l"], CASE["z_L"][i]),
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    two = model.trace(CASE["inputs"], 2, number=CASE["puzzle_identifiers"])
    assert len(two) == 2
    np.testing.assert_array_equal(two[1].outputs["logits"], found[1].outputs["logits"])
    with pytest.raises(UsageError):
        model.trace(CASE["inputs"], 0)


@pytest.mark.parametrize(
    "policy", ["settle:0.1", "fixed:0", "fixed:x", "trained:nan", "trained:0:9:2"]
)
def test_a_policy_that_is_none_is_refused(model, policy):
    with pytest.raises(UsageError):
        solving(model, halt=policy)


def test_a_variant_that_is_unrolled_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.runner, "loop", None)
    with pytest.raises(UsageError, match="has its loop unrolled"):
        solving(model)


def test_a_table_that_is_none_is_refused(model, tmp_path):
    """Of other shape or type, without rows, an archive, or no array at all."""
    size = model.manifest.inputs["puzzle"].shape[1]
    wrong = {
        "shape": np.zeros((3, size + 1), np.float32),
        "type": np.zeros((3, size)),
        "empty": np.zeros((0, size), np.float32),
        "scalar": np.float32(0),
        "objects": np.array([{}], object),
    }
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    np.savez(tmp_path / "archive", a=np.zeros(2))
    (tmp_path / "text.npy").write_text("no array")
    files = [tmp_path / f"{name}.npy" for name in (*wrong, "text")]
    for path in (*files, tmp_path / "archive.npz"):
        with pytest.raises(BadBundle, match="table"):
            stored_array(path, "table", "float32", (size,), rows=True)


def test_puzzles_of_another_size_than_the_models_are_a_broken_bundle(model, monkeypatch):
    monkeypatch.setattr(model, "manifest", replace(model.manifest, task="sudoku-9x9"))
    with pytest.raises(BadBundle, match="of 81 cells of 11 tokens, and the model has 25 of 7"):
        model.solve("1" * 81)


@pytest.mark.parametrize(
    ("cells", "vocab", "names"),
    [
        (81, 11, ["sudoku-9x9"]),
        (900, 12, ["arc-30x30"]),
        (900, 6, ["maze-30x30"]),
        (36, 8, ["sudoku-6x6", "sudoku-6x6-boxes-3x2"]),
        (16, 6, ["sudoku-4x4", "maze-4x4"]),
        (25, 7, []),
    ],
)
def test_a_size_names_the_tasks_that_have_it(cells, vocab, names):
    assert of_size(cells, vocab) == names
    for name in names:
        assert (find(name).seq_len, find(name).vocab_size) == (cells, vocab)


def test_what_is_no_puzzle_is_refused(model):
    cells = model.manifest.context
    for wrong in ([1, 2], [[99] * cells], [[0.5] * cells], [[1], [1, 2]]):
        with pytest.raises(UsageError):
            model.solving(wrong)
    with pytest.raises(UsageError, match="puzzle numbers must be from 0 to"):
        model.solving([1] * cells, number=10**6)
    with pytest.raises(UsageError, match="solves puzzles"):
        model.generate([1, 2, 3])
