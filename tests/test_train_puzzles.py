"""Models that solve, trained by the loop that trains text: resumed, spread, refused, evaluated."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tiny_puzzles
import torch
from cases import assert_close
from command import finished, python
from tiny_puzzles import CYCLES, SEGMENTS

from edgert.errors import BadCheckpoint, BadFile, UsageError
from edgert.models.importers import load_source, trained
from edgert.tasks import find
from edgert.tasks.puzzleset_write import PuzzleRows, write_puzzleset
from edgert.train import job
from edgert.train.loop import Trainer
from edgert.train.metrics import read_metrics
from edgert.train.puzzle_data import PuzzleMaterial, prepare_puzzles
from edgert.train.puzzle_recipe import PuzzleData, PuzzleTrain
from edgert.train.recipe import TrainConfig, completed, differences, read_recipe
from edgert.train.workers import Workers

ROOT = Path(__file__).resolve().parents[1]
FILES = ("model.safetensors", "training.safetensors")
TRAIN, DATA = "[train]\n", "classes = 60\n"

MORE = """\
[train]
ema = 0.9
grad_accum_steps = 2
grad_clip = 1
lookahead = false
halt_above = 0.6
"""
EVERYTHING = [
    (TRAIN, MORE),
    (DATA, f"{DATA}augment = true\ncurriculum = 0.8\n"),
    ("warmup_steps = 2\n", 'warmup_steps = 2\ngradient = "segment"\n'),
]
WAYS = {
    "segments": (SEGMENTS, []),
    "everything": (SEGMENTS, EVERYTHING),
    "bf16": (SEGMENTS, [(TRAIN, '[train]\nprecision = "bf16"\n')]),
    "adamw": (SEGMENTS, [(TRAIN, '[train]\noptimizer = "adamw"\n')]),
    "cycles": (CYCLES, [(TRAIN, '[train]\ncycle_loss = "halting"\nema = 0.9\n')]),
    "published cycles": (CYCLES, [(TRAIN, '[train]\noptimizer = "adamw"\ngrad_clip = 1\n')]),
    "cycle rows": (CYCLES + "cycle_embedding = true\nreinject_input = true\n", []),
}


def recipe_of(folder: Path, *changes: tuple[str, str], model: str = SEGMENTS):
    return read_recipe(tiny_puzzles.write(folder, *changes, model=model))


def losses(run: Path) -> list[tuple[object, ...]]:
    keys = ("step", "loss", "lr", "grad_norm", "halted", "train_cells", "train_exact")
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [tuple(line.get(key) for key in keys) for line in lines]


def hashes(run: Path) -> list[str]:
    found, damaged = trained.newest(run)
    assert not damaged
    return [found.files[name] for name in FILES]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_in_two_sessions_equals_one(tmp_path, way):
    """Losses, halting, weights, table, moments, averages and what slots hold: bit for bit."""
    model, changes = WAYS[way]
    recipe = recipe_of(tmp_path, *changes, model=model)
    whole = job.train(recipe, tmp_path / "whole")
    job.train(recipe, tmp_path / "parts", until=5)
    parts = job.train(recipe, tmp_path / "parts", resume=True)
    assert (whole.step, parts.step) == (12, 12)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    assert whole.heldout == parts.heldout
    assert whole.last < whole.first


@pytest.fixture
def one_thread():
    """Bit for bit holds for one number of threads: here as in the other process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield os.environ | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, one_thread):
    """kill -9 between checkpoints, in the middle of the curriculum."""
    path = tiny_puzzles.write(
        tmp_path, *EVERYTHING[:2], ("steps = 12", "steps = 60\nckpt_interval = 7")
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    line = ("-m", "edgert", "train", path, "-q", "-o", run)
    process = python(*line, cwd=ROOT, env=one_thread)
    try:
        while len(read_metrics(run / "metrics.jsonl")) < 30:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    job.train(read_recipe(path), run, resume=True)
    job.train(read_recipe(path), whole)
    assert losses(run) == losses(whole)
    assert hashes(run) == hashes(whole)


@pytest.mark.full
def test_two_processes_learn_what_one_does(tmp_path, one_thread):
    """torchrun with gloo: slots are shared out, the puzzle table gets the signs of all of them.

    Losses agree to a few roundings of float32; a resumed pair goes on with the slots of both.
    """
    path = tiny_puzzles.write(tmp_path, EVERYTHING[1], ("steps = 12", "steps = 8"))

    def torchrun(*arguments: object):
        line = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        train = ("-m", "edgert", "train", path, "-o", tmp_path / "two", "-q", *arguments)
        return finished(python(*line, *train, cwd=ROOT, env=one_thread))

    job.train(read_recipe(path), tmp_path / "one")
    for arguments in (("--steps", "3"), ("--resume",)):
        got = torchrun(*arguments)
        assert got.code == 0, got.err
    rows = [np.array([line[:4] for line in losses(tmp_path / name)]) for name in ("one", "two")]
    assert_close(rows[1], rows[0], rtol=2e-5, where="step, loss, rate, norm")
    ours, theirs = (trained.newest(tmp_path / name)[0].tensors(FILES[0]) for name in ("one", "two"))
    name = "puzzle_emb.weights"
    assert ours[name].abs().max() > 0.01
    assert_close(theirs[name], ours[name], atol=1e-7, where=name)


def test_a_step_learns_and_the_table_moves_by_its_own_rule(tmp_path):
    """The rate of the table is scheduled as the weights', from its own base; unused rows stay."""
    recipe = recipe_of(tmp_path)
    prepare_puzzles(recipe, tmp_path, job.Watcher())
    trainer = Trainer(recipe, PuzzleMaterial(recipe, tmp_path).source(), Workers())
    table = trainer.model.puzzle_table
    assert not table.any()
    steps = [trainer.advance() for _ in range(2)]
    assert [step.lr for step in steps] == [5e-3, 1e-2]
    sizes = {0.0, 0.005, 0.015, 0.010}
    found = (table.abs() / (1 - 0.1 * 0.01)).round(decimals=3).unique().tolist()
    assert all(min(abs(value - size) for size in sizes) < 2e-3 for value in found)
    assert table.abs().max() > 0.009


def test_without_lookahead_halting_is_by_its_own_score(tmp_path):
    """The score of continuing is log(p / (1 - p)) before and behind every step, decay or not."""
    changes = (
        (TRAIN, "[train]\nlookahead = false\nhalt_above = 0.9\nweight_decay = 0.5\n"),
        (*("warmup_steps = 2", "warmup_steps = 2\nema = 0.5"),),
    )
    job.train(recipe_of(tmp_path, *changes), tmp_path / "run")
    weights = trained.newest(tmp_path / "run")[0].tensors(FILES[0])
    assert float(weights["q_head.bias"][1]) == pytest.approx(math.log(9), abs=1e-6)
    assert not weights["q_head.weight"][1].any()
    assert weights["q_head.weight"][0].any()


def test_an_exported_run_says_what_it_solves(tmp_path):
    """The importer gives back the model that was evaluated, its task, and no tokenizer."""
    for name, model in (("a", SEGMENTS), ("b", CYCLES)):
        recipe = recipe_of(tmp_path, model=model)
        job.train(recipe, tmp_path / name)
        got = load_source(tmp_path / name)
        assert (got.task, got.tokenizer_json, got.byte_offset, got.eos) == (
            *("sudoku-4x4", None, None),
            (),
        )
        assert got.model.config == recipe.model
        weights = trained.newest(tmp_path / name)[0].tensors(FILES[0])
        views = got.model.published() | got.model.fixed()
        assert weights.keys() == views.keys()
        assert all(torch.equal(weights[key], view) for key, view in views.items())
        assert got.provenance["step"] == 12


def test_the_command_ends_with_a_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = ("steps = 12", "steps = 12\neval_interval = 5\neval_puzzles = 8")
    got = run("train", tiny_puzzles.write(tmp_path, change))
    assert got.code == 0, got.err
    words = [line.split()[0] for line in got.out.splitlines()]
    assert words == [
        *("trained", "loss", "held", "early", "constant", "responds", "saved", "picture", "next")
    ]
    assert "puzzles/s on" in got.out
    assert "of 20 puzzles solved" in got.out
    assert "held out  step 5: " in got.err
    lines = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    assert [line["step"] for line in lines if "heldout_exact" in line] == [5, 10]
    assert [line["puzzles"] for line in lines if "puzzles" in line] == [8 * n for n in range(1, 13)]
    value = json.loads((tmp_path / "runs/tiny/result.json").read_text())
    assert value["heldout"]["most"] == 3
    assert value["puzzles_per_s"] > 0
    assert (tmp_path / "runs/tiny/loss.png").stat().st_size > 10_000


WRONG = {
    "train.window belongs to text": (TRAIN, "[train]\nwindow = 8\n"),
    "train.schedule belongs to text": (TRAIN, '[train]\nschedule = "cosine"\n'),
    "train.cycle_loss belongs to models with cycles": (TRAIN, '[train]\ncycle_loss = "halting"\n'),
    "train.eps belongs to optimizer = 'adamw'": (TRAIN, "[train]\neps = 1e-8\n"),
    "train.optimizer is 'muon', not one of adam_atan2, adamw": (
        TRAIN,
        '[train]\noptimizer = "muon"\n',
    ),
    "train.gradient is 'all', not one of one-step, segment": (TRAIN, '[train]\ngradient = "all"\n'),
    "train.halt_above belongs to lookahead = false": (TRAIN, "[train]\nhalt_above = 0.9\n"),
    "train.lookahead is 1, not true or false": (TRAIN, "[train]\nlookahead = 1\n"),
    "train.epochs is not a key of a recipe": (TRAIN, "[train]\nepochs = 3\n"),
    "train.batch_size is missing": ("batch_size = 8\n", ""),
    "data.task: there is no task 'sudoku'": ('"sudoku-4x4"', '"sudoku"'),
    "data.task is missing": ('task = "sudoku-4x4"\n', ""),
    "exactly one of puzzles and path must be given, found none": ('puzzles = "builtin"\n', ""),
    "found both": (DATA, f'{DATA}path = "x"\n'),
    "data.classes belongs to puzzles that are made": ('puzzles = "builtin"', 'path = "x"'),
    "data.puzzles is 'mine', known is: builtin": ('"builtin"', '"mine"'),
    "data.puzzles: puzzles of maze-9x9 are not made here": ('"sudoku-4x4"', '"maze-9x9"'),
    "data.held_out 60 leaves none of data.classes 60": ("held_out = 20", "held_out = 60"),
    "data.givens is a list of 2, not two numbers": (DATA, f"{DATA}givens = [9, 4]\n"),
    "data.curriculum is 2, not a number from 0 to 1": (DATA, f"{DATA}curriculum = 2\n"),
    "data.corpus is not a key of a recipe": (DATA, f'{DATA}corpus = "builtin"\n'),
    "model.vocab_size is 7, sudoku-4x4 has 6": ("num_heads = 2", "num_heads = 2\nvocab_size = 7"),
    "model.H_layers is missing": ("H_layers = 1\n", ""),
    "model.max_cycles is not a key of a hrm model": (
        "num_heads = 2",
        "num_heads = 2\nmax_cycles = 2",
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(tmp_path, message):
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, WRONG[message])
    assert message in str(caught.value)
    assert "docs/training.md" in (caught.value.do or "")


def test_everything_wrong_is_said_at_once(tmp_path):
    changes = [WRONG[key] for key in ("train.batch_size is missing", "data.task is missing")]
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, *changes, ("H_layers = 1", "H_layers = 0"))
    for line in ("train.batch_size is missing", "data.task is missing", "model.H_layers is 0"):
        assert f"\n  - {line}" in str(caught.value)


def data_set(folder: Path, count: int = 24, *, task: str = "sudoku-4x4", identifiers: int = 1):
    """A data set of random grids whose answers have nothing to do with them."""
    told, rng = find(task), np.random.default_rng(1)

    def groups(rows: int):
        for i in range(rows):
            grid = rng.integers(1, told.vocab_size, (2, 1, told.seq_len)).astype(np.uint8)
            yield [PuzzleRows(i % identifiers, grid[0], grid[1])]

    write_puzzleset(
        folder,
        {"train": groups(count), "test": groups(64)},
        seq_len=told.seq_len,
        vocab_size=told.vocab_size,
        identifiers=("<blank>", *(f"p{i}" for i in range(1, identifiers))),
    )


FROM_PATH = (
    ("classes = 60\nheld_out = 20\n", ""),
    ('puzzles = "builtin"', 'path = "set"'),
)


def test_a_data_set_in_the_published_format_is_trained_on(tmp_path):
    """Each identifier has a row of its own, and only the rows that were shown have moved."""
    data_set(tmp_path / "set", 24, identifiers=3)
    many = ("num_heads = 2", "num_heads = 2\nnum_puzzle_identifiers = 3")
    job.train(recipe_of(tmp_path, *FROM_PATH, many), tmp_path / "run", until=3)
    table = load_source(tmp_path / "run").model.puzzle_table
    assert table.shape == (3, 16)
    assert len(table.unique(dim=0)) == 3
    assert not (tmp_path / "run" / "data").exists()


def test_a_data_set_for_another_model_is_refused(tmp_path):
    """Every difference at once, and no folder is left."""
    data_set(tmp_path / "set", task="sudoku-6x6", identifiers=2)
    with pytest.raises(UsageError) as caught:
        job.train(recipe_of(tmp_path, *FROM_PATH), tmp_path / "run")
    for line in (
        "num_puzzle_identifiers is 2, the recipe's model and task have 1",
        "seq_len is 36, the recipe's model and task have 16",
        "vocab_size is 8, the recipe's model and task have 6",
    ):
        assert f"\n  - {line}" in caught.value.what
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="there is no data set in the published folder format"):
        job.train(
            recipe_of(tmp_path, FROM_PATH[0], ('puzzles = "builtin"', 'path = "no"')),
            tmp_path / "run",
        )


def test_a_data_set_that_has_changed_is_refused(tmp_path):
    data_set(tmp_path / "set")
    recipe = recipe_of(tmp_path, *FROM_PATH)
    job.train(recipe, tmp_path / "run", until=1)
    path = tmp_path / "set" / "test" / "all__labels.npy"
    data = bytearray(path.read_bytes())
    data[-1] = 1 + data[-1] % 5
    path.write_bytes(data)
    with pytest.raises(BadFile, match="the data is not what this run was started with") as caught:
        job.train(recipe, tmp_path / "run", resume=True)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("model", [SEGMENTS, CYCLES], ids=["segments", "cycles"])
def test_a_collapsed_model_is_reported(tmp_path, model):
    """Labels that do not depend on the input teach a model to answer always the same."""
    data_set(tmp_path / "set", 512)
    recipe = recipe_of(tmp_path, *FROM_PATH, ("steps = 12", "steps = 60"), model=model)
    outcome = job.train(recipe, tmp_path / "run")
    felt = outcome.heldout.sensitivity
    assert outcome.heldout.collapsed
    assert abs(felt.shuffle_gap) < 0.02
    assert "shuffle_gap" in felt.failed
    assert any(note.startswith("collapsed: answers hardly depend") for note in outcome.notes)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["heldout"]["collapsed"]


def test_a_changed_state_is_refused(tmp_path):
    """What slots hold has the recipe's shape, and nothing but tokens and counts."""
    recipe = recipe_of(tmp_path)
    job.train(recipe, tmp_path / "run", until=3)
    found, _ = trained.newest(tmp_path / "run")
    weights, tensors, state = found.tensors(FILES[0]), found.tensors(FILES[1]), found.training()
    trainer = Trainer(recipe, PuzzleMaterial(recipe, tmp_path / "run").source(), Workers())
    (carry,) = state["carry"]
    for change, message in (
        ({"carry": []}, "carry is a list of 0, the recipe has 1"),
        ({"carry": [carry | {"steps": [9] * 8}]}, r"carry\.0\.steps is a list of 8, not 8 fitting"),
        ({"carry": [carry | {"halted": [0]}]}, r"carry\.0\.halted is a list of 1"),
        ({"carry": [carry | {"identifiers": [1] * 8}]}, r"carry\.0\.identifiers"),
        ({"sampler": {"iteration": 1}}, "sampler is a dict of 1, not a place in the puzzles"),
        ({"sampler": {"iteration": 1, "batch": 1 << 40, "dealt": 0}}, "not a place"),
    ):
        with pytest.raises(BadCheckpoint, match=message):
            trainer.restore(weights, tensors, state | change, "here")
    for name, value, message in (
        ("carry.0.inputs", torch.full((8, 16), 6.0), r"carry\.0\.inputs holds other values"),
        ("carry.0.labels", torch.full((8, 16), 1.5), r"carry\.0\.labels holds other values"),
        ("carry.0.z_h", torch.zeros(8, 16), r"carry\.0\.z_h is \[8, 16\], not \[8, 17, 16\]"),
    ):
        with pytest.raises(BadCheckpoint, match=message):
            trainer.restore(weights, tensors | {name: value}, state, "here")
    trainer.restore(weights, tensors, state, "here")
    assert trainer.advance().number == 4


def test_settings_of_puzzles_take_their_defaults_in_an_older_run(tmp_path):
    recipe = recipe_of(tmp_path)
    now = json.loads(json.dumps(recipe.to_json()))
    older = now | {"train": {k: v for k, v in now["train"].items() if k != "lookahead"}}
    assert differences(older, now) == ["train.lookahead: absent, now True"]
    assert differences(completed(older), recipe.to_json()) == []
    with_givens = replace(recipe, data=replace(recipe.data, givens=(4, 9)))
    assert differences(now, with_givens.to_json()) == ["data.givens: None, now a list of 2"]


def test_published_checkpoints_are_for_text(tmp_path):
    recipe = recipe_of(tmp_path)
    with pytest.raises(UsageError, match="not written in their published format"):
        job.train(recipe, tmp_path / "run", write_published=True)
    (tmp_path / "some.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="only where text is learnt"):
        job.train(recipe, tmp_path / "run", start=tmp_path / "some.pt")


def test_a_new_run_begins_with_a_checkpoint_of_ours(tmp_path):
    """Weights, table and moments are taken; the slots are empty and the puzzles start anew."""
    recipe = recipe_of(tmp_path, (TRAIN, "[train]\nema = 0.5\n"))
    job.train(recipe, tmp_path / "one", until=5)
    job.train(recipe, tmp_path / "two", start=tmp_path / "one", until=6)
    assert [line[0] for line in losses(tmp_path / "two")] == [6]
    state = trained.newest(tmp_path / "two")[0].training()
    assert state["updates"] == 6
    assert state["sampler"] == {"iteration": 1, "batch": 1, "dealt": 1}
    assert state["carry"][0]["steps"] == [1] * 8


def test_the_page_names_every_key_and_default():
    """docs/training.md is where an error sends the reader; what text has, its table says."""
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    table = page.split("## Puzzles")[1].split("\n## ")[0]
    defaults: dict[str, object] = {}
    for kind, base in ((PuzzleData, None), (PuzzleTrain, TrainConfig)):
        for field in fields(kind):
            if base is None or getattr(base, field.name, None) != field.default:
                assert f"`{field.name}`" in table, field.name
            defaults[f"{kind.__name__}.{field.name}"] = field.default
    owner, checked = "", 0
    for row in table.splitlines():
        cells = [cell.strip() for cell in row.split("|")] if row.startswith("|") else []
        if len(cells) != 6:
            continue
        owner = {"`[data]`": "PuzzleData", "`[train]`": "PuzzleTrain"}.get(cells[1], owner)
        names, stated = re.findall(r"`(\w+)`", cells[2]), cells[3].strip("`")
        for name, text in zip(names, re.findall(r"[^, ]+", stated), strict=False):
            default = defaults[f"{owner}.{name}"]
            wanted = str(default).lower() if isinstance(default, bool) else default
            assert text == wanted or float(text) == wanted, name
            checked += 1
    assert checked > 15
