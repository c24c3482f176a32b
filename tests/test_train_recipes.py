"""The recipes that come with edgert and train: they can be read, and do what they promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgert.models.importers import load_source
from edgert.train import job
from edgert.train.optim_act import total_steps
from edgert.train.recipe import read_recipe

FOLDER = Path(__file__).resolve().parents[1] / "export"
RECIPES = sorted(p for p in FOLDER.glob("hagi-*.toml") if "\n[train]\n" in p.read_text("utf-8"))
SOLVERS = {
    "hrm-sudoku4": ("A2", 133_058),
    "hrm-sudoku9-extreme": ("A1", 27_275_266),
    "hrm-sudoku9-width128": ("A1", 2_100_226),
}
LETTERS = {f"hagi-{letter}-tiny": letter.upper() for letter in "abcd"} | {"hagi-deep-tiny": "B"}


def test_all_variants_are_there():
    assert [path.stem for path in RECIPES] == sorted(LETTERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_describes_a_small_model_with_fused_heads(path):
    """Named as its file; heads of 16 or 32, which the fused kernel needs; 0.1 to 0.5 M weights."""
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe.model.letter == LETTERS[path.stem]
    assert recipe.model.heads.size in (16, 32)
    with torch.device("meta"):
        model = recipe.family.build(recipe.model)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 500_000


def test_the_four_differ_in_nothing_but_the_variant():
    """Side by side they are a comparison: same sizes, data, steps and rates."""
    four = [read_recipe(FOLDER / f"hagi-{letter}-tiny.toml") for letter in "abcd"]
    assert len({(r.data, r.train) for r in four}) == 1
    assert len({replace(r.model, use_loop=True, use_gdr=True) for r in four}) == 1


def test_the_deep_one_draws_its_depth():
    recipe = read_recipe(FOLDER / "hagi-deep-tiny.toml")
    assert (recipe.model.iterations, recipe.train.depth) == (8, "random")


@pytest.mark.parametrize("name", SOLVERS)
def test_a_recipe_describes_a_model_that_solves(name):
    recipe = read_recipe(FOLDER / f"{name}.toml")
    with torch.device("meta"):
        model = recipe.family.build(recipe.model)
    assert recipe.name == name
    assert (recipe.model.letter, sum(p.numel() for p in model.parameters())) == SOLVERS[name]


def test_the_published_settings_of_sudoku_extreme():
    """Updates of 20,000 epochs of 1,000 groups; all that the published run overrides."""
    recipe = read_recipe(FOLDER / "hrm-sudoku9-extreme.toml")
    train, model = recipe.train, recipe.model
    assert (train.steps, train.batch_size) == (total_steps(20_000, 1_000, 1.0, 768), 768)
    rates = (train.learning_rate, train.puzzle_emb_lr, train.min_lr_ratio, train.warmup_steps)
    assert rates == (1e-4, 1e-4, 1.0, 2000)
    assert (train.weight_decay, train.puzzle_emb_weight_decay) == (1.0, 1.0)
    assert (train.betas, train.grad_clip, train.ema, train.optimizer) == (
        *((0.9, 0.95), 0.0, 0.0, "adam_atan2"),
    )
    assert (train.gradient, train.lookahead) == ("one-step", True)
    assert (model.halt_max_steps, model.updates, model.loss_type) == (
        *(16, "LLHLLH", "stablemax_cross_entropy"),
    )


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_model_that_solves_learns_small_boards(tmp_path):
    """Of classes that were held out; halting early costs nothing and saves most of the work."""
    found = job.train(read_recipe(FOLDER / "hrm-sudoku4.toml"), tmp_path / "run").heldout
    assert found.puzzles == 1000
    assert found.exact >= 0.95
    assert found.exact_early >= found.exact - 0.002
    assert found.steps <= 0.4 * found.most
    assert not found.collapsed


@pytest.mark.slow
def test_a_twin_of_a_model_that_solves_learns_in_a_moment(tmp_path):
    """A few seconds of it: far above the constant answer in cells, and read back as a model."""
    recipe = read_recipe(FOLDER / "hrm-sudoku4.toml")
    train = replace(recipe.train, steps=60, warmup_steps=10, batch_size=32, ema=0.9)
    twin = replace(recipe, train=train, data=replace(recipe.data, classes=400, held_out=100))
    outcome = job.train(twin, tmp_path / "run")
    assert outcome.first == pytest.approx(1.79, abs=0.1)  # ln 6: nothing is known yet
    assert outcome.last < 0.9
    found = outcome.heldout
    assert found.cells > found.constant_cells + 0.3
    assert not found.collapsed
    assert load_source(tmp_path / "run").model.config == recipe.model


@pytest.mark.slow
def test_a_twin_of_a_recipe_learns_in_a_moment(tmp_path):
    """Model D on the built-in corpus, some seconds of it: far below what it starts from, and read
    back as a model."""
    recipe = read_recipe(FOLDER / "hagi-d-tiny.toml")
    train = replace(recipe.train, steps=60, window=64, batch_size=8, warmup_steps=6)
    data = replace(recipe.data, holdout=0.002)
    twin = replace(recipe, train=train, data=data)
    outcome = job.train(twin, tmp_path / "run")
    assert outcome.first == pytest.approx(5.55, abs=0.05)  # ln 257: nothing is known yet
    assert outcome.heldout.loss < 3.4
    assert outcome.heldout.tokens > 10_000
    assert not outcome.heldout.collapsed
    assert load_source(tmp_path / "run").model.config == recipe.model


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_beats_the_bigram_baseline(path, tmp_path):
    """On text that was held out, in bits per byte, by a tenth at least."""
    found = job.train(read_recipe(path), tmp_path / "run").heldout
    assert found.bits_per_byte < 0.9 * found.bigram
    assert found.sensitivity > 0.1
