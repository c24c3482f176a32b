"""Held-out figures: the convention of `edgert eval`, the baseline, and the check for collapse."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
import torch
import torch.nn.functional as F
from cases import cases

import edgert
from edgert.evaluate import perplexity
from edgert.export.write import ExportOptions, export_bundle
from edgert.models.importers import load_source
from edgert.train import heldout, job, metrics
from edgert.train.recipe import read_recipe

MODEL_D = next(case for case in cases("hagi") if case.name == "model_d")


@pytest.fixture(scope="module")
def model():
    return load_source(MODEL_D.checkpoint).model


@pytest.mark.parametrize(
    ("total", "window", "stride"), [(40, 8, 4), (41, 8, 3), (5, 8, 4), (16, 8, 8), (2, 8, 4)]
)
def test_each_token_is_scored_given_what_its_window_holds(model, total, window, stride):
    """Token by token, by hand: the context is the window's, what has none is left out."""
    vocab = model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, total)
    got = heldout.score(model, ids, window, stride)
    wanted = np.full(total, np.nan)
    known = 0
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        for place in range(max(known, begin + 1), end):
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[None, begin:place]))[0, -1].double()
            wanted[place] = F.cross_entropy(logits, torch.tensor(ids[place]))
        known = end
        if end == total:
            break
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-5)  # logits about 15, in float32


def test_many_rows_score_as_one_does(model, monkeypatch):
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 100)
    many = heldout.score(model, ids, 8, 4)
    monkeypatch.setattr(heldout, "MAX_LOGITS", 1)
    np.testing.assert_allclose(heldout.score(model, ids, 8, 4), many, atol=1e-4)


def test_the_exported_model_has_the_trainers_figures(tmp_path):
    """`edgert eval` on a bundle of the run equals its held-out loss to 1e-4, and bits per byte."""
    path = tiny_recipe.write(tmp_path, ("steps = 12", "steps = 30"))
    outcome = job.train(read_recipe(path), tmp_path / "run")
    export_bundle(
        load_source(tmp_path / "run"), tmp_path / "bundle", ExportOptions(lowerings=("ort",))
    )
    found = outcome.heldout
    text = (tmp_path / "run" / "heldout.txt").read_text()
    with edgert.load(tmp_path / "bundle") as bundle:
        got = perplexity(bundle, text, window=found.window, stride=found.stride)
    assert (got.tokens, got.bytes) == (found.tokens, found.bytes)
    assert got.nll / got.tokens == pytest.approx(found.loss, abs=1e-4)
    assert got.bits_per_byte == pytest.approx(found.bits_per_byte, abs=1e-4)


def test_bigram_costs_are_those_of_its_rule():
    """Counted by hand on a text of three tokens, also across chunks."""
    shard = np.array([0, 1, 0, 1, 0, 2, 0], np.uint16)
    bigram = heldout.Bigram([shard], 4)
    share = np.array([5, 3, 2, 1]) / 11
    behind_0 = (np.array([0, 2, 1, 0]) + 2 * share) / (3 + 2)  # followed by two kinds
    got = np.exp(-bigram.costs(np.array([0, 0])))
    assert got[0] == pytest.approx(behind_0[0])
    for token in range(4):
        cost = bigram.costs(np.array([0, token]))[0]
        assert cost == pytest.approx(-math.log(behind_0[token]))
    behind_3 = share  # never seen: one kind, no count
    assert bigram.costs(np.array([3, 1]))[0] == pytest.approx(-math.log(behind_3[1]))


def test_bigram_chances_add_up_and_chunks_do_not_matter(monkeypatch):
    shard = np.random.default_rng(0).integers(0, 5, 1000).astype(np.uint16)
    whole = heldout.Bigram([shard], 6)
    monkeypatch.setattr(heldout, "_CHUNK", 7)
    parts = heldout.Bigram([shard], 6)
    np.testing.assert_array_equal(whole.pairs, parts.pairs)
    np.testing.assert_array_equal(whole.share, parts.share)
    for before in range(6):
        chances = [math.exp(-whole.costs(np.array([before, b]))[0]) for b in range(6)]
        assert sum(chances) == pytest.approx(1)


class Deaf(torch.nn.Module):
    """Says the same whatever it reads; `Echo` says what it has read last."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config

    def forward(self, ids):
        return torch.linspace(-3, 3, self.config.vocab_size).expand(*ids.shape, -1)


class Echo(Deaf):
    def forward(self, ids):
        return 50.0 * F.one_hot(ids, self.config.vocab_size)


def test_a_model_that_does_not_listen_is_found_out(model):
    """0 for one constant answer, nearly 1 for an echo; a real model lies between."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 640)
    felt = {
        name: heldout.sensitivity(m, ids, 10)
        for name, m in (("deaf", Deaf(model.config)), ("echo", Echo(model.config)), ("d", model))
    }
    assert felt["deaf"] < 1e-6 < heldout.COLLAPSED
    assert heldout.COLLAPSED < felt["d"] <= 1
    assert felt["echo"] > 0.9


def test_a_collapsed_run_says_so(tmp_path):
    """Weights that decay to nothing give one answer to everything, and that is reported."""
    path = tiny_recipe.write(tmp_path, ("rate = 1e-2", "rate = 1e-3\nweight_decay = 1000"))
    outcome = job.train(read_recipe(path), tmp_path / "run")
    assert outcome.heldout.collapsed
    assert outcome.notes[-1].startswith("collapsed: predictions hardly depend on the input")


def test_metrics_are_cut_where_a_run_goes_on(tmp_path):
    """Lines behind the resumed step go, as does a line that a kill has torn."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": n, "loss": n / 10} for n in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    assert metrics.read_metrics(path) == lines
    metrics.cut(path, 3)
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:3])


def test_numbers_that_json_lacks_are_null(tmp_path):
    log = metrics.Metrics(tmp_path / "m.jsonl")
    log.write(step=1, loss=float("inf"), lr=0.5)
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "lr": 0.5}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_on_a_full_disk_are_an_error():
    log = metrics.Metrics(Path("/dev/full"))
    with pytest.raises(edgert.EdgertError, match="No space left on device"):
        log.write(step=1)
    log.close()


def test_the_picture_is_a_png_that_shows_the_points(tmp_path):
    """Of any number of steps; more of them draw a mean as well."""
    for count in (0, 1, 50):
        lines = [{"step": n, "loss": 5 / n} for n in range(1, count + 1)]
        path = tmp_path / f"{count}.png"
        metrics.plot([*lines, {"step": 1, "heldout": 3.0}], path, "title", 2.5)
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (
            960,
            576,
        )
    sizes = [(tmp_path / f"{count}.png").stat().st_size for count in (0, 50)]
    assert sizes[0] < sizes[1]


def test_a_moved_run_is_still_a_run(tmp_path):
    """Nothing in it names its place."""
    path = tiny_recipe.write(tmp_path)
    job.train(read_recipe(path), tmp_path / "run", until=4)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    outcome = job.train(read_recipe(path), tmp_path / "elsewhere", resume=True)
    assert outcome.step == 12
