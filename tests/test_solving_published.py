"""Published checkpoints that solve, as a user exports and runs them: each halts where it must."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from cases import Case, cases

import edgert
from edgert.errors import UsageError
from edgert.export import pipeline
from edgert.export.pipeline import export_source
from edgert.progress import Reporter

CASES: dict[str, Case] = {case.name: case for case in cases("hrm")}
TOLERANCE = 1e-3


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, label: str, text: str) -> None:
        self.lines.append(text)


def exported(source, folder, **options):
    """The gate passes, or nothing is there."""
    notes = Notes()
    found = export_source(source, folder / "bundle", lowerings=("ort",), reporter=notes, **options)
    assert [check.name for check in found.verdict.checks] == ["segments", "free"]
    return found, notes.lines


def test_learned_positions(tmp_path):
    """The size comes from the shapes of the weights."""
    case = CASES["orig_learned_nopuzzle"]
    found, notes = exported(case.folder, tmp_path)
    assert any("taken from the shapes of the weights: num_puzzle_identifiers" in n for n in notes)
    assert any("its puzzles are not known (19 cells of 12)" in n for n in notes)
    assert (found.manifest.task, found.manifest.tables) == (None, {})
    with edgert.load(found.path) as model:
        got = model.solve(case["inputs"], logits=True)
        assert [s.steps for s in got] == case["early_exit_step"].tolist()
        for answer, want in zip(got, case["early_exit_logits"], strict=True):
            np.testing.assert_allclose(answer.results["logits"], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bidir_base", "bidir_cycle"])
def test_the_bidirectional_form(tmp_path, name):
    """Each sample alone in a batch: cycles, and logits of the published module run on it alone."""
    case = CASES[name]
    ids = case["input_ids"]
    found, _ = exported(case.checkpoint, tmp_path, settings={"seq_len": ids.shape[1]})
    with edgert.load(found.path) as model:
        got = model.solve(ids, logits=True)
        assert [s.steps for s in got] == case["per_sample_cycles"].tolist()
        for answer, want in zip(got, case["per_sample_logits"], strict=True):
            np.testing.assert_allclose(answer.results["logits"], want, rtol=0, atol=TOLERANCE)
        # Rows without a puzzle run along: a body that counts its cycles has no more than these.
        most = model.manifest.program.loop.iterations
        work = model.solving(np.tile(ids, (8, 1))[:5], batch=4, halt=f"trained:9:1:{most}")
        assert [s.steps for s in work.run()] == [most] * 5
        # Paused in the middle: the count of cycles, and the sum of their signals, are kept.
        staggered = model.solving(np.tile(ids, (8, 1))[:7], batch=4)
        while not staggered.done:
            staggered.step()
            staggered.save(tmp_path / "s.session")
            staggered = edgert.resume_solving(tmp_path / "s.session", model)
        steps = case["per_sample_cycles"].tolist() * 4
        assert [s.steps for s in staggered.run()] == steps[:7]


def test_a_bare_state_dict_needs_what_it_lacks(tmp_path):
    case = CASES["bidir_base"]
    content = torch.load(case.checkpoint, weights_only=True)
    torch.save(content["model_state_dict"], tmp_path / "bare.pt")
    with pytest.raises(edgert.BadCheckpoint, match="num_heads is missing") as failure:
        export_source(tmp_path / "bare.pt", tmp_path / "bundle")
    assert "--setting num_heads=N" in str(failure.value.do)
    assert not (tmp_path / "bundle").exists()


def test_a_recipe_says_what_a_checkpoint_lacks(tmp_path, monkeypatch):
    """dataset.json by its folder, settings in a table of their own, the task."""
    case = CASES["orig_rope_puzzle"]
    for name in ("step_1238", "all_config.yaml"):
        shutil.copy(case.folder / name, tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    stated = {"seq_len": 25, "vocab_size": 7, "num_puzzle_identifiers": 7}
    (tmp_path / "data" / "train" / "dataset.json").write_text(json.dumps(stated))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'format_version = 1\nname = "mine"\n[source]\npath = "step_1238"\ndataset = "data"\n'
        'task = "sudoku-4x4"\n'
        "[source.settings]\nhalt_max_steps = 2\n"
    )
    given = []
    monkeypatch.setattr(pipeline, "export_bundle", lambda *args: given.append(args))
    export_source(recipe, tmp_path / "bundle")
    ((source, _, options, _),) = given
    config = source.model.config
    assert (config.seq_len, config.num_puzzle_identifiers, config.halt_max_steps) == (25, 7, 2)
    assert (options.name, options.task) == ("mine", "sudoku-4x4")
    assert source.provenance["file"] == "step_1238"


def test_the_table_of_puzzles_is_a_file_of_its_own(rope_bundle):
    case = CASES["orig_rope_puzzle"]
    stored = torch.load(case.folder / "step_1234", weights_only=True)
    with edgert.load(rope_bundle) as model:
        assert isinstance(model.tables["puzzle"], np.memmap)
        want = stored["_orig_mod.model.inner.puzzle_emb.weights"].numpy()
        np.testing.assert_array_equal(model.tables["puzzle"], want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 9}, "a context was given, and this model solves puzzles"),
        ({"settings": {"colour": 1}}, "unknown settings: colour"),
        ({"task": "sudoku-9x9"}, "have 81 cells of 11 tokens, the model has 19 of 12"),
        ({"task": "chess"}, "there is no task 'chess'"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export_source(CASES["orig_learned_nopuzzle"].folder, tmp_path / "bundle", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"seq_len": 9}}, "settings was given, and only checkpoints of models"),
        ({"task": "sudoku-4x4"}, "a task 'sudoku-4x4' was given, and this model decodes text"),
    ],
)
def test_a_model_of_text_has_no_puzzles(tmp_path, model_a_checkpoint, options, message):
    with pytest.raises(UsageError, match=message):
        export_source(model_a_checkpoint, tmp_path / "bundle", **options)
