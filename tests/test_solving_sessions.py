"""Puzzles that are left off, saved and resumed: bit for bit, and nothing but what was saved."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from cases import cases

import edgert
from edgert.errors import BadSession, NewerFormat, SessionMismatch, UsageError, WrongKey
from edgert.pausing import pause, restore
from edgert.sessionfile import read_session
from edgert.solvingfile import SavedSolving, read_solving, write_solving
from edgert.vault import Key

CASE = next(case for case in cases("hrm") if case.name == "orig_rope_puzzle")
KEY = Key(bytes(range(32)), 1)


def solving(model, times=4, **options):
    """The case's puzzles, `times` over: twelve in four rows, so that rows come and go."""
    given = {"batch": 4, "logits": True} | options
    ids = np.tile(CASE["inputs"], (times, 1))
    return model.solving(ids, number=np.tile(CASE["puzzle_identifiers"], times), **given)


@pytest.fixture(scope="module", params=["fp32-ort", "fp32-portable"])
def model(request, rope_bundle):
    with edgert.load(rope_bundle, variant=request.param) as loaded:
        yield loaded


@pytest.fixture
def saved(model) -> SavedSolving:
    """In the middle: some done, some in the loop, some waiting."""
    work = solving(model)
    for _ in range(4):
        work.step()
    found = pause(work)
    assert 0 < len(found.answers.index) < found.waiting < 12
    assert len(found.seats.index) == 4
    return found


def assert_same(got, want) -> None:
    assert [(s.steps, s.reason) for s in got] == [(s.steps, s.reason) for s in want]
    for one, other in zip(got, want, strict=True):
        assert one.values.tobytes() == other.values.tobytes()
        for name, array in other.results.items():
            assert one.results[name].tobytes() == array.tobytes()


def test_pausing_behind_every_iteration_changes_nothing(model, tmp_path):
    """Answers, steps and carries have the bits of the uninterrupted run, wherever it was cut."""
    whole = solving(model)
    want, path = whole.run(), tmp_path / "s.session"
    watched = solving(model)
    for cut in range(whole.iterations + 1):
        work = solving(model)
        for _ in range(cut):
            work.step()
        assert work.save(path) == path.stat().st_size
        again = edgert.resume_solving(path, model)
        ours, theirs = again.seats(), watched.seats()
        assert (ours.index.tolist(), ours.steps.tolist()) == (
            theirs.index.tolist(),
            theirs.steps.tolist(),
        )
        assert ours.carry.keys() == theirs.carry.keys()
        for name, array in theirs.carry.items():
            assert ours.carry[name].tobytes() == array.tobytes()
        assert (again.notes, again.iterations) == ((), cut)
        assert_same(again.run(), want)
        assert again.iterations == whole.iterations
        watched.step()


def test_a_chain_of_deadlines_and_files_is_one_run(model, tmp_path):
    """Each of them does one iteration."""
    want = solving(model, halt="full").run()
    path = tmp_path / "s.session"
    work = solving(model, halt="full")
    work.save(path)
    for _ in range(100):
        work = edgert.resume_solving(path, model, on_step=lambda look: False)
        if work.done:
            break
        work.run()
        assert work.done or work.stopped == "cancelled"
        work.save(path)
    assert_same(work.run(), want)


def test_the_bundle_is_found_and_closed_again(model, tmp_path):
    work = solving(model)
    work.step()
    work.save(tmp_path / "s.session", passphrase="door")
    with pytest.raises(WrongKey):
        edgert.resume_solving(tmp_path / "s.session")
    with edgert.resume_solving(tmp_path / "s.session", passphrase="door") as again:
        assert again.model.runner.variant_name == model.runner.variant_name
        inner = again.model
        assert_same(again.run(), solving(model).run())
    with pytest.raises(UsageError, match="the model is closed"):
        inner.solve(CASE["inputs"])
    with pytest.raises(UsageError, match="variant cannot be chosen"):
        edgert.resume_solving(tmp_path / "s.session", variant="fp32-ort", passphrase="door")


def test_what_belongs_to_another_variant_or_bundle_is_refused(
    model, saved, copier_bundle, tmp_path
):
    other = "fp32-ort" if model.runner.variant_name == "fp32-portable" else "fp32-portable"
    path = tmp_path / "s.session"
    write_solving(path, saved)
    with (
        edgert.load(model.bundle.root, variant=other) as another,
        pytest.raises(SessionMismatch, match="belongs to variant"),
    ):
        edgert.resume_solving(path, another)
    with edgert.load(copier_bundle) as another:
        with pytest.raises(SessionMismatch, match="belongs to another bundle"):
            edgert.resume_solving(path, another)
        # Even if the identity were forged, the carry is not one of that model.
        forged = replace(saved.bundle, variant_id=another.runner.variant.variant_id)
        with pytest.raises(BadSession, match="not this model's: puzzles must be integers"):
            restore(another, replace(saved, bundle=forged))
    with pytest.raises(SessionMismatch, match="belongs to another bundle"):
        edgert.resume_solving(path, bundle=copier_bundle)
    moved = replace(saved, bundle=replace(saved.bundle, path="/nowhere", relative=None))
    write_solving(path, moved)
    with pytest.raises(SessionMismatch, match="not where it was") as failure:
        edgert.resume_solving(path)
    assert "edgert solve BUNDLE --session" in str(failure.value)


def test_the_two_kinds_of_file_are_told_apart(saved, saved_session, tmp_path):
    write_solving(tmp_path / "s.session", saved)
    with pytest.raises(BadSession, match="puzzles that are being solved") as failure:
        read_session(tmp_path / "s.session")
    assert "edgert solve --session" in str(failure.value)
    with pytest.raises(BadSession, match="a sequence of tokens, no puzzles"):
        read_solving(saved_session)


def shifted(array, by=1):
    return array + np.asarray(by, array.dtype)


DAMAGE = {
    "ids outside": (lambda s: replace(s, ids=shifted(s.ids, 99)), "ids outside 0 to 6"),
    "ids below": (lambda s: replace(s, ids=shifted(s.ids, -9)), "ids outside 0 to 6"),
    "too few cells": (lambda s: replace(s, ids=s.ids[:, 1:]), r"integers of shape \[puzzles, 25\]"),
    "no such row": (lambda s: replace(s, rows=shifted(s.rows, 7)), "puzzle numbers must be"),
    "no policy": (lambda s: replace(s, policy="settle:1"), "is not a halting policy"),
    "another spelling": (lambda s: replace(s, policy="full"), "not spelled"),
    "rows beyond the batch": (lambda s: replace(s, batch=3), "4 rows of 3"),
    "too many steps": (
        lambda s: replace(s, seats=replace(s.seats, steps=shifted(s.seats.steps, 9))),
        "more iterations than it may",
    ),
    "no steps": (
        lambda s: replace(s, seats=replace(s.seats, steps=s.seats.steps * 0)),
        "more iterations than it may",
    ),
    "an answer of 9 steps": (
        lambda s: replace(s, answers=replace(s.answers, steps=shifted(s.answers.steps, 9))),
        "an answer took more",
    ),
    "a carry of another shape": (
        lambda s: replace(s, seats=replace(s.seats, carry=_cut(s.seats.carry))),
        "carry.e is float32 of shape",
    ),
    "a carry too few": (
        lambda s: replace(s, seats=replace(s.seats, carry={"e": s.seats.carry["e"]})),
        "not this model's: it has carry.e",
    ),
    "a result too few": (
        lambda s: replace(
            s, answers=replace(s.answers, results={"token": s.answers.results["token"]})
        ),
        "not this model's: it has carry",
    ),
}


def _cut(carry):
    return {name: array[..., 1:].copy() for name, array in sorted(carry.items())}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_this_models_is_refused(model, saved, tmp_path, name):
    change, message = DAMAGE[name]
    write_solving(tmp_path / "s.session", change(saved))
    with pytest.raises(BadSession, match=message):
        edgert.resume_solving(tmp_path / "s.session", model)


NONSENSE = {
    "two places": lambda s: replace(s, seats=replace(s.seats, index=s.seats.index * 0)),
    "begun without end": lambda s: replace(s, waiting=12),
    "more than there are": lambda s: replace(s, waiting=13),
    "steps below 0": lambda s: replace(s, answers=replace(s.answers, steps=-s.answers.steps)),
    "a row too many": lambda s: replace(s, rows=np.zeros(13, np.int64)),
    "floats for steps": lambda s: replace(
        s, seats=replace(s.seats, steps=s.seats.steps.astype(np.float32))
    ),
    "a batch of none": lambda s: replace(s, batch=0),
    "a place that is none": lambda s: replace(s, place={"a": "b" * 201}),
    "a stray tensor": lambda s: replace(
        s, seats=replace(s.seats, carry=s.seats.carry | {"a": np.zeros((1, 2), np.float32)})
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_makes_no_sense_in_itself_is_refused(saved, tmp_path, name):
    """Before any model is looked for."""
    write_solving(tmp_path / "s.session", NONSENSE[name](saved))
    with pytest.raises(BadSession, match="not a sound session file"):
        read_solving(tmp_path / "s.session")


def test_any_flipped_byte_and_any_cut_is_found(saved, tmp_path):
    path = tmp_path / "s.session"
    write_solving(path, saved)
    data = path.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 97)):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]):
            path.write_bytes(broken)
            with pytest.raises(BadSession):
                read_solving(path)


def test_a_file_comes_back_field_by_field(saved, tmp_path):
    for key in (None, KEY):
        write_solving(tmp_path / "s.session", saved, key)
        again = read_solving(tmp_path / "s.session", key)
        for name in ("bundle", "waiting", "policy", "batch", "logits", "place", "ns", "created"):
            assert getattr(again, name) == getattr(saved, name)
        np.testing.assert_array_equal(again.ids, saved.ids)
        for name, array in saved.answers.results.items():
            np.testing.assert_array_equal(again.answers.results[name], array)


def test_a_version_between_is_refused_as_newer_only_if_it_is(saved, saved_session, tmp_path):
    """The kinds keep their versions: neither is read under the other's number."""
    path = tmp_path / "s.session"
    write_solving(path, saved)
    for source, version, error in (
        (path, "1", BadSession),
        (path, "3", NewerFormat),
        (saved_session, "2", BadSession),
    ):
        data = source.read_bytes()
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        table["__metadata__"]["format_version"] = version
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        content = len(text).to_bytes(8, "little") + text + data[8 + size : -32]
        (tmp_path / "other.session").write_bytes(content + hashlib.sha256(content).digest())
        with pytest.raises(error):
            read_session(tmp_path / "other.session")
