"""`edgert migrate`: a session in another precision, lowering or bundle of its model; what that
changes is measured against the new variant's own state, said, kept, and bounded."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_model import PROMPT, VOCAB, fake_model
from wheels import ROOT

import edgert
from edgert import migrating
from edgert.bundle import read_manifest, seal, write_manifest
from edgert.errors import BadSession, ExcessiveDrift, SessionMismatch, UsageError, WrongKey
from edgert.migrating import MAX_DRIFT, migrate
from edgert.sessionfile import MAX_MOVES, read_session, write_session
from edgert.spec import StateSpec, VariantSpec

SAMPLED = {"temperature": 3.0, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def story(ladder_bundle, tmp_path_factory) -> Path:
    """A sampled answer in fp32, left before its end; its newest token is not in the state yet."""
    out = tmp_path_factory.mktemp("stories") / "story.session"
    with edgert.load(ladder_bundle, precision="fp32") as model, model.session() as session:
        for _ in session.stream("the star", max_tokens=200, **SAMPLED):
            if len(session.tokens) == 60:
                break
        session.data["door"] = "open"
        session.save(out)
    return out


def edited(story: Path, out: Path, **changes: object) -> Path:
    write_session(out, replace(read_session(story), **changes))  # type: ignore[arg-type]
    return out


def own_logits(bundle: Path, precision: str, tokens: list[int]) -> np.ndarray:
    """Of the next token, read by another way than a session's."""
    with edgert.load(bundle, precision=precision) as model:
        return model.logits([tokens])[0, -1].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


# The state goes along


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_state_is_carried_over_and_its_drift_is_that_of_the_definition(
    story, ladder_bundle, tmp_path, precision
) -> None:
    """KL and the largest difference, against numbers that are found here by other means."""
    before = story.read_bytes()
    found = migrate(story, ladder_bundle, tmp_path / "new", precision=precision)
    assert story.read_bytes() == before
    old, new = read_session(story), read_session(tmp_path / "new")
    assert (found.variant, new.bundle.variant) == (f"{precision}-ort",) * 2
    assert new.tokens.tolist() == old.tokens.tolist()
    for name, array in old.states.items():
        np.testing.assert_array_equal(new.states[name], array)
    assert (new.data, new.request, new.stream) == (old.data, old.request, old.stream)

    with edgert.load(ladder_bundle, precision=precision) as model, model.session() as session:
        session.append([int(token) for token in old.tokens[:-1]])
        own = session.execution.states.export()
    apart = {n: np.abs(own[n].astype(float) - old.states[n]).max() for n in own if n != "lens"}
    assert found.state == max(apart, key=apart.__getitem__)
    assert found.move.max_abs == pytest.approx(apart[found.state], rel=1e-3)
    assert found.move.max_abs > 1e-3

    want = log_softmax(own_logits(ladder_bundle, precision, old.tokens.tolist()))
    with edgert.resume(tmp_path / "new") as session:
        session.append(())
        got = log_softmax(session.execution.last.logits[0, 0].astype(np.float64))
    assert found.move.kl == pytest.approx((np.exp(want) * (want - got)).sum(), rel=0.05, abs=1e-9)
    assert found.move.top1 == (want.argmax() == got.argmax())
    assert (found.move.how, found.bound) == ("carried", MAX_DRIFT)


def test_what_was_moved_goes_on_as_the_new_variants_own(story, ladder_bundle, tmp_path) -> None:
    """The same request with its seed; bit for bit the same after a second save, and announced as
    nothing else than a resume."""
    migrate(story, ladder_bundle, tmp_path / "new", precision="int4")
    answers = []
    for _ in range(2):
        with edgert.resume(tmp_path / "new") as session:
            assert session.notes == ()
            assert session.model.runner.variant_name == "int4-ort"
            assert session.data == {"door": "open"}
            answers.append(session.generate().tokens)
            session.save(tmp_path / "later")
    start = read_session(story).request.start
    assert len(answers[0]) == 200 - (60 - start)
    assert answers[0] == answers[1]
    assert read_session(tmp_path / "later").moves == read_session(tmp_path / "new").moves


def test_another_lowering_of_the_same_numbers_costs_nothing(tiny_bundle, tmp_path) -> None:
    with edgert.load(tiny_bundle, lowering="ort") as model, model.session() as session:
        session.generate("the star", max_tokens=20)
        session.save(tmp_path / "a")
        want = session.generate(max_tokens=20).tokens
    found = migrate(tmp_path / "a", tiny_bundle, tmp_path / "b", lowering="portable")
    assert found.move.kl is not None
    assert found.move.max_abs is not None
    assert found.move.kl < 1e-6
    assert found.move.max_abs < 1e-3
    assert found.move.top1
    with edgert.resume(tmp_path / "b") as session:
        assert session.generate(max_tokens=20).tokens == want


def test_a_bundle_elsewhere_that_holds_the_same_model(
    saved_session, ladder_bundle, tmp_path
) -> None:
    """`tiny_bundle` and the ladder were exported from the same weights at different times."""
    found = migrate(saved_session, ladder_bundle, tmp_path / "new", precision="int8")
    assert found.move.variant == "fp32-ort"
    assert read_session(tmp_path / "new").bundle.path == os.path.realpath(ladder_bundle)


def test_every_move_is_remembered_the_newest_ones(story, ladder_bundle, tmp_path) -> None:
    file = story
    for i, precision in enumerate(["int8", "fp32", "int8"]):
        migrate(file, ladder_bundle, tmp_path / str(i), precision=precision)
        file = tmp_path / str(i)
    moves = read_session(file).moves
    assert [move.variant for move in moves] == ["fp32-ort", "int8-ort", "fp32-ort"]
    with edgert.resume(file) as session, session.fork() as other:
        assert other.moves == session.moves == moves
    many = edited(file, tmp_path / "many", moves=moves[:1] * MAX_MOVES)
    migrate(many, ladder_bundle, tmp_path / "last", precision="fp32")
    kept = read_session(tmp_path / "last").moves
    assert len(kept) == MAX_MOVES
    assert kept[-1].variant == "int8-ort"


def test_results_that_were_not_used_yet_go_along_and_count(ladder_bundle, tmp_path) -> None:
    """They are the old variant's. The next token is chosen of them, so they are compared."""
    with edgert.load(ladder_bundle, precision="fp32") as model, model.session() as session:
        session.append("the star")
        session.save(tmp_path / "a")
        want = log_softmax(session.execution.last.logits[0, -1].astype(np.float64))
        tokens = list(session.tokens)
    found = migrate(tmp_path / "a", ladder_bundle, tmp_path / "b", precision="int8")
    old, new = read_session(tmp_path / "a"), read_session(tmp_path / "b")
    assert old.pending is not None
    assert new.pending is not None
    np.testing.assert_array_equal(new.pending[0], old.pending[0])
    own = log_softmax(own_logits(ladder_bundle, "int8", tokens))
    assert found.move.kl == pytest.approx((np.exp(own) * (own - want)).sum(), rel=0.05, abs=1e-9)


# The state is computed again


def test_replay_takes_what_the_new_variant_computes(story, ladder_bundle, tmp_path) -> None:
    """Bit for bit what it makes of the same tokens, and the drift of what was left behind."""
    found = migrate(story, ladder_bundle, tmp_path / "new", precision="int4", replay=True)
    assert found.move.how == "recomputed"
    assert found.move.max_abs is not None
    assert found.move.max_abs > 1e-3
    new = read_session(tmp_path / "new")
    with edgert.load(ladder_bundle, precision="int4") as model, model.session() as session:
        session.append([int(token) for token in new.tokens[:-1]])
        for name, array in session.execution.states.export().items():
            np.testing.assert_array_equal(new.states[name], array)
    assert new.capacity == read_session(story).capacity
    with edgert.resume(tmp_path / "new") as session:
        assert session.generate(max_tokens=5).tokens


def test_results_that_were_not_used_yet_are_replayed_too(ladder_bundle, tmp_path) -> None:
    with edgert.load(ladder_bundle, precision="fp32") as model, model.session() as session:
        session.append("the star")
        session.save(tmp_path / "a")
        tokens = list(session.tokens)
    migrate(tmp_path / "a", ladder_bundle, tmp_path / "b", precision="int8", replay=True)
    new = read_session(tmp_path / "b")
    assert new.pending is not None
    own = own_logits(ladder_bundle, "int8", tokens)
    np.testing.assert_allclose(new.pending[0], own, atol=1e-3)
    assert new.pending[1] == own.argmax()


def test_progress_is_told(story, ladder_bundle, tmp_path) -> None:
    told: list[tuple[int, int]] = []
    migrate(
        story,
        ladder_bundle,
        tmp_path / "b",
        precision="int8",
        advanced=lambda done, total: told.append((done, total)),
    )
    assert told == [(59, 60)]


@pytest.fixture
def fakes(monkeypatch):
    """A session of a fake model goes to another variant of it, whose states may differ."""

    def go(path: Path, output: Path, **options: object) -> migrating.Migration:
        changes = {"variants": {"fp32-ort": _variant("ef" * 32)}}
        states = options.pop("states", None)
        model = fake_model(**changes | ({"states": states} if states else {}))
        monkeypatch.setattr(migrating, "load", lambda to, **chosen: model)
        monkeypatch.setattr(migrating, "read_manifest", lambda to: model.manifest)
        return migrate(path, "a bundle", output, **options)

    return go


def _variant(variant_id: str) -> VariantSpec:
    variant = fake_model().manifest.variants["fp32-ort"]
    return replace(variant, variant_id=variant_id)


def fake_session(path: Path, tokens: int = 4) -> Path:
    with fake_model().session() as session:
        if tokens:
            session.generate(PROMPT, max_tokens=tokens)
        session.save(path)
    return path


WIDER = {
    "lens": StateSpec("counter", "int64", ("batch",)),
    "kept": StateSpec("append", "int32", ("batch", "capacity"), "capacity", "lens"),
}


def test_another_layout_is_recomputed_without_being_asked(fakes, tmp_path) -> None:
    """And nothing is said of a drift that cannot be measured."""
    path = fake_session(tmp_path / "a")
    found = fakes(path, tmp_path / "b", states=WIDER)
    move = found.move
    assert (move.how, move.max_abs, move.kl, move.top1) == ("recomputed", None, None, None)
    assert found.state is None
    new, old = read_session(tmp_path / "b"), read_session(path)
    assert new.states["kept"].dtype == np.int32
    assert new.states["kept"].tolist() == old.states["kept"].tolist()


def test_a_prompt_that_was_not_read_to_its_end_stays_so(fakes, tmp_path) -> None:
    """Its rest is read where the session goes on, as it would have been."""
    path = fake_session(tmp_path / "a")
    saved = read_session(path)
    longer = np.append(saved.tokens, [7, 8, 9])
    path = edited(path, tmp_path / "longer", tokens=longer)
    fakes(path, tmp_path / "b", replay=True)
    new = read_session(tmp_path / "b")
    assert new.states["lens"].tolist() == saved.states["lens"].tolist()
    assert new.tokens.tolist() == longer.tolist()


@pytest.mark.parametrize("replay", [False, True])
def test_an_empty_session_moves(fakes, tmp_path, replay) -> None:
    found = fakes(fake_session(tmp_path / "a", 0), tmp_path / "b", replay=replay)
    assert (found.move.tokens, found.move.kl) == (0, None)
    assert read_session(tmp_path / "b").tokens.size == 0


# What is refused, and leaves nothing


def bounded(bundle: Path, nats: float) -> Path:
    manifest = replace(read_manifest(bundle), max_drift=nats, format_version=4)
    write_manifest(bundle, seal(manifest))
    return bundle


def test_beyond_the_bound_of_the_bundle_nothing_is_written(
    story, ladder_bundle, copied, tmp_path, run
) -> None:
    """The message has both numbers; a state of the variant's own is always within it."""
    strict = bounded(copied(ladder_bundle), 1e-12)
    (tmp_path / "new").write_text("what was there")
    with pytest.raises(ExcessiveDrift) as caught:
        migrate(story, strict, tmp_path / "new", precision="int4")
    free = migrate(story, ladder_bundle, tmp_path / "free", precision="int4")
    assert f"by {free.move.kl:.3g} nats of KL, 1e-12 are allowed" in caught.value.what
    assert f"state {free.state} differs by {free.move.max_abs:.3g}" in str(caught.value.where)
    assert "--replay" in str(caught.value.do)
    assert (tmp_path / "new").read_text() == "what was there"
    got = run("migrate", story, "--to", strict, "--precision", "int4", "-o", tmp_path / "new")
    assert (got.code, got.out) == (4, "")
    found = migrate(story, strict, tmp_path / "new", precision="int4", replay=True)
    assert found.move.kl == free.move.kl


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_no_number_is_refused(story, ladder_bundle, tmp_path, value) -> None:
    states = {name: array.copy() for name, array in read_session(story).states.items()}
    states["v.1"][0, 0, 3, 2] = value
    broken = edited(story, tmp_path / "broken", states=states)
    with pytest.raises(ExcessiveDrift, match="it leads to no numbers"):
        migrate(broken, ladder_bundle, tmp_path / "new", precision="int8")
    found = migrate(broken, ladder_bundle, tmp_path / "new", precision="int8", replay=True)
    assert (found.move.max_abs, found.move.kl) == (None, None)
    assert read_session(tmp_path / "new").moves == (found.move,)


def test_another_models_session_is_refused(story, model_a_bundle, tmp_path) -> None:
    with pytest.raises(SessionMismatch, match="another model's"):
        migrate(story, model_a_bundle, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_its_own_variant_and_its_own_file_are_refused(story, ladder_bundle, tmp_path) -> None:
    with pytest.raises(UsageError, match="belongs to variant fp32-ort already"):
        migrate(story, ladder_bundle, tmp_path / "new")
    (tmp_path / "link").symlink_to(story)
    for output in (story, tmp_path / "link"):
        with pytest.raises(UsageError, match="overwritten by its own copy"):
            migrate(story, ladder_bundle, output, precision="int4")
    assert not (tmp_path / "new").exists()


FORGED = {
    "token beyond the vocabulary": {"tokens": np.array([1, 2, VOCAB + 99])},
    "more rows than tokens": {"tokens": np.array([1])},
    "rows without end": {"capacity": 2**24},
}


@pytest.mark.parametrize("what", FORGED)
def test_what_cannot_be_a_session_of_the_model_is_refused(fakes, tmp_path, what) -> None:
    saved = replace(read_session(fake_session(tmp_path / "a")), request=None)
    write_session(tmp_path / "forged", replace(saved, **FORGED[what]))  # type: ignore[arg-type]
    with pytest.raises(BadSession, match="not one of this model"):
        fakes(tmp_path / "forged", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_puzzles_are_refused(copier_bundle, tmp_path, run) -> None:
    with edgert.load(copier_bundle) as model:
        model.solving(["1324|4231|2413|3142"]).save(tmp_path / "a")
    got = run("migrate", tmp_path / "a", "--to", copier_bundle, "-o", tmp_path / "b")
    assert got.code == 3
    assert "puzzles" in got.err


def test_an_encrypted_session_stays_encrypted(ladder_bundle, tmp_path) -> None:
    pytest.importorskip("cryptography", reason="the crypto extra is not installed")
    with edgert.load(ladder_bundle, precision="fp32") as model, model.session() as session:
        session.generate("the star", max_tokens=4)
        session.save(tmp_path / "a", passphrase="open sesame")
    for wrong in ({}, {"passphrase": "another"}):
        with pytest.raises(WrongKey):
            migrate(tmp_path / "a", ladder_bundle, tmp_path / "b", precision="int8", **wrong)
    key = {"passphrase": "open sesame"}
    migrate(tmp_path / "a", ladder_bundle, tmp_path / "b", precision="int8", **key)
    with pytest.raises(WrongKey):
        read_session(tmp_path / "b")
    with edgert.resume(tmp_path / "b", **key) as session:
        assert session.moves[-1].variant == "fp32-ort"


# The command


def test_the_command_says_what_it_did(story, ladder_bundle, tmp_path, run) -> None:
    new = tmp_path / "new.session"
    to = ("--to", ladder_bundle, "--precision", "int4", "-o", new)
    got = run("migrate", story, *to)
    lines = got.out.splitlines()
    assert got.code == 0
    assert lines[0].startswith(f"session   {new}  ")
    assert lines[1:3] == ["variant   tiny fp32-ort → int4-ort", "state     carried over"]
    assert lines[3].startswith("drift     max |Δ| of the state ")
    assert lines[4] == f"          {MAX_DRIFT:g} nats of KL are allowed"
    facts = json.loads(run("migrate", story, *to, "--json").out)
    assert (facts["from"], facts["variant"], facts["how"]) == ("fp32-ort", "int4-ort", "carried")
    assert facts["n_session"] == 60
    assert facts["kl"] <= facts["bound"] == MAX_DRIFT
    assert run("session", "verify", new).code == 0
    told = run("session", "info", new).out
    assert "moved     at 60 tokens, from fp32-ort, state carried: max |Δ|" in told
    assert json.loads(run("session", "info", new, "--json").out)["moves"][0]["kl"] == facts["kl"]
    replayed = run("migrate", story, *to, "--replay").out
    assert "state     recomputed by int4-ort" in replayed
    assert "allowed" not in replayed


def test_the_help_and_the_page_name_the_bound(run) -> None:
    """It is a number in prose."""
    page = (ROOT / "docs/session.md").read_text(encoding="utf-8")
    assert f"{MAX_DRIFT:g} nats" in run("migrate", "--help").out
    assert f"{MAX_DRIFT:g} nats" in page
    assert f"`null`: {MAX_DRIFT:g}" in (ROOT / "docs/bundle.md").read_text(encoding="utf-8")


def test_the_benchmark_measures_every_pair(ladder_bundle, capsys, monkeypatch) -> None:
    """The table of docs/session.md, of a tiny bundle: int8 and int4 to fp32 and back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import drift

    monkeypatch.setattr(drift, "MOST", 24)
    drift.main([str(ladder_bundle), "--sessions", "2", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({(row["from"], row["to"]) for row in rows}) == 6
    assert all(0 <= row["kl_median"] <= row["kl_max"] for row in rows)
    assert all(row["state_max_abs"] > 1e-3 for row in rows)


def test_the_refusal_of_a_resume_names_the_way(story, ladder_bundle) -> None:
    with (
        edgert.load(ladder_bundle, precision="int4") as model,
        pytest.raises(SessionMismatch) as caught,
    ):
        edgert.resume(story, model)
    assert f"edgert migrate {story} --to {ladder_bundle}" in str(caught.value.do)
