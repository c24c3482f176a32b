"""Whole runs: resumed after anything, refused when they must be, spread over processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
from cases import assert_close
from command import Result, finished, python

from edgert.errors import BadFile, Diverged, UsageError
from edgert.models.importers import trained
from edgert.train import job
from edgert.train.metrics import read_metrics
from edgert.train.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
FILES = ("model.safetensors", "training.safetensors")
EVERYTHING = """\
schedule = "tension"
depth = "random"
settle = 0.5
ema = 0.9
grad_accum_steps = 2
"""  # all there is to remember


def settings(text: str) -> tuple[str, str]:
    return "[train]\n", f"[train]\n{text}\n"


def recipe_of(folder: Path, *changes: tuple[str, str]):
    return read_recipe(tiny_recipe.write(folder, *changes))


def environment(threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


def command(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return python("-m", "edgert", "train", *arguments, cwd=ROOT, env=environment(), **options)


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


def hashes(run: Path) -> list[str]:
    """Of the weights and moments of the newest checkpoint."""
    found, damaged = trained.newest(run)
    assert not damaged
    return [found.files[name] for name in FILES]


@pytest.mark.parametrize("extra", ["", EVERYTHING, 'optimizer = "muon"', 'precision = "bf16"'])
def test_a_run_in_two_sessions_equals_one(tmp_path, extra):
    """Losses, norms, rates, weights, moments and averages: bit for bit, whatever is switched on."""
    recipe = recipe_of(tmp_path, settings(extra))
    whole = job.train(recipe, tmp_path / "whole")
    job.train(recipe, tmp_path / "parts", until=5)
    parts = job.train(recipe, tmp_path / "parts", resume=True)
    assert (whole.step, parts.step) == (12, 12)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 12
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    assert whole.heldout == parts.heldout
    assert whole.last < whole.first


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    recipe = recipe_of(tmp_path)
    one = job.train(recipe, tmp_path / "run")
    two = job.train(recipe, tmp_path / "run", resume=True)
    assert (one.heldout, one.first, one.last) == (two.heldout, two.first, two.last)
    assert two.per_s is None
    assert len(losses(tmp_path / "run")) == 12


LONG = [
    ("steps = 12", "steps = 300"),
    settings("ckpt_interval = 7\n" + EVERYTHING),
]


def killed_at(path: Path, run: Path, step: int, *options: str) -> None:
    """Train, and kill -9 the process when step `step` has been logged."""
    process = command(path, "-o", run, "-q", *options)
    try:
        deadline = time.monotonic() + 100
        while len(read_metrics(run / "metrics.jsonl")) < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "training does not get on"
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Path]:
    """The recipe of 300 steps, and its run in one process without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = tiny_recipe.write(folder, *LONG)
    got = finished(command(path, "-o", folder / "run", "-q"))
    assert got.code == 0, got.err
    return path, folder / "run"


def check_resumed(path: Path, run: Path, whole: Path) -> None:
    got = finished(command(path, "-o", run, "-q", "--resume"))
    assert got.code == 0, got.err
    assert losses(run) == losses(whole)
    assert hashes(run) == hashes(whole)
    assert not list(run.glob(".step-*"))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted, tmp_path):
    """kill -9 twice, between checkpoints; then the same losses and files, bit for bit."""
    path, whole = uninterrupted
    killed_at(path, tmp_path / "run", 11)
    killed_at(path, tmp_path / "run", 40, "--resume")
    check_resumed(path, tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.parametrize("step", [1, 6, 7, 8, 13, 14, 15, 63, 64, 150, 280, 299])
def test_a_run_may_be_killed_at_any_step(uninterrupted, tmp_path, step):
    """Before the first checkpoint, while one is written, behind it, near the end."""
    path, whole = uninterrupted
    killed_at(path, tmp_path / "run", step)
    check_resumed(path, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.full), signal.SIGTERM]
)
def test_a_signal_ends_with_a_checkpoint_and_130(uninterrupted, tmp_path, number):
    """Behind the current step; what was saved goes on to the same end."""
    path, whole = uninterrupted
    run = tmp_path / "run"
    process = command(path, "-o", run)
    while len(read_metrics(run / "metrics.jsonl")) < 9:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    got = finished(process)
    assert got.code == 130, got.err
    (newest, *_) = trained.step_folders(run)
    step = int(newest.name[5:])
    assert 9 <= step < 300
    assert losses(run)[-1][0] == step
    assert f"saved     {newest}; go on with --resume" in got.err
    check_resumed(path, run, whole)


def test_a_run_killed_before_its_data_was_there_starts_over(tmp_path):
    """Half of a preparation is thrown away, not trusted."""
    recipe = recipe_of(tmp_path)
    (tmp_path / "run" / ".data.tmp").mkdir(parents=True)
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "shard_00007.bin").write_bytes(b"xx")
    outcome = job.train(recipe, tmp_path / "run", resume=True, until=3)
    assert outcome.notes == ["no checkpoint yet: started from the beginning"]
    assert [p.name for p in (tmp_path / "run" / "data").iterdir()] == ["shard_00000.bin"]


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    """So that the same command works when what was wrong has been put right."""
    recipe = recipe_of(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"some text \xff")
    with pytest.raises(BadFile, match="byte 0xff at offset 10"):
        job.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(UsageError, match="a window of 16 tokens needs shards of 18"):
        job.train(replace(recipe, data=replace(recipe.data, holdout=0.0)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert job.train(recipe_of(tmp_path), tmp_path / "run", until=1).step == 1


def test_a_changed_recipe_is_refused_with_its_keys(tmp_path):
    job.train(recipe_of(tmp_path), tmp_path / "run", until=2)
    changed = recipe_of(tmp_path, ("rate = 1e-2", "rate = 2e-2"), settings("ema = 0.5"))
    with pytest.raises(UsageError) as caught:
        job.train(changed, tmp_path / "run", resume=True)
    assert caught.value.what == (
        "the recipe is not the one this run was started with:\n"
        "  - train.ema: 0.0, now 0.5\n"
        "  - train.learning_rate: 0.01, now 0.02"
    )


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="the run's folder exists"):
        job.train(recipe_of(tmp_path), tmp_path / "run")


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UsageError, match="there is no run to resume"):
        job.train(recipe_of(tmp_path), tmp_path / "run", resume=True)


def test_two_processes_do_not_share_a_folder(tmp_path):
    import fcntl

    recipe = recipe_of(tmp_path)
    job.train(recipe, tmp_path / "run", until=1)
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process trains in this folder"):
            job.train(recipe, tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """The last good checkpoint stays and is named; what it holds is finite."""
    recipe = recipe_of(
        tmp_path,
        ("rate = 1e-2", "rate = 1000"),
        ("steps = 12", "steps = 200"),
        settings("ckpt_interval = 1\ngrad_clip = 0"),
    )
    with pytest.raises(Diverged) as caught:
        job.train(recipe, tmp_path / "run")
    (newest, *_) = trained.step_folders(tmp_path / "run")
    step = int(newest.name[5:])
    assert f" of step {step + 1} is " in caught.value.what
    assert f"the last good checkpoint is {newest}; lower learning_rate" in caught.value.do
    tensors = trained.read_checkpoint(newest).tensors("model.safetensors")
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    assert losses(tmp_path / "run")[-1][0] == step


def limited(size: int):
    """What the child does first: files may not grow beyond `size` bytes, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """Weights still fit, moments do not: nothing of the new one stays, the old one is sound."""
    path = tiny_recipe.write(tmp_path, settings("ckpt_interval = 6"))
    run = tmp_path / "run"
    assert finished(command(path, "-o", run, "-q", "--steps", "3")).code == 0
    before = hashes(run)
    sizes = [(run / "step-00000003" / name).stat().st_size for name in FILES]
    got = finished(command(path, "-o", run, "-q", "--resume", preexec_fn=limited(sum(sizes) // 2)))
    assert got.code == 1
    assert "error: the checkpoint of step 6 cannot be written: File too large" in got.err
    assert "step-00000003 is kept" in got.err
    assert "Traceback" not in got.err
    assert hashes(run) == before
    assert not list(run.glob(".step-*"))
    whole = job.train(read_recipe(path), run, resume=True)
    assert whole.step == 12


def torchrun(*arguments: object) -> Result:
    return finished(
        python(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "edgert", "train", *arguments),
            cwd=ROOT,
            env=environment(),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("looped", [True, pytest.param(False, marks=pytest.mark.full)])
def test_two_processes_learn_what_one_does(tmp_path, looped):
    """torchrun with gloo: each takes its rows of the same batches; losses agree to rounding.

    The tolerance is a few roundings of float32 in a mean over 64 tokens, grown over 12 steps.
    """
    changes = [settings("grad_accum_steps = 2\nckpt_interval = 6")]
    if not looped:  # and weights that no gradient reaches
        changes += [
            ("use_loop = true", "use_loop = false"),
            ("residual = 12", "residual = 12\ngeo_interaction = false"),
        ]
    path = tiny_recipe.write(tmp_path, *changes)
    one = finished(command(path, "-o", tmp_path / "one", "-q"))
    two = torchrun(path, "-o", tmp_path / "two", "-q", "--json")
    assert one.code == 0, one.err
    assert two.code == 0, two.err
    assert json.loads(two.out.splitlines()[-1])["step"] == 12
    rows = [np.array(losses(tmp_path / name)) for name in ("one", "two")]
    assert_close(rows[1], rows[0], rtol=2e-5, where="step, loss, rate, norm")
    # Weights: Adam turns a rounding of a small gradient into one of the step, 1e-2 at most.
    weights = [
        trained.newest(tmp_path / name)[0].tensors("model.safetensors") for name in ("one", "two")
    ]
    for name, tensor in weights[0].items():
        assert_close(weights[1][name], tensor, atol=1e-3, where=name)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    path = tiny_recipe.write(tmp_path, ("batch_size = 4", "batch_size = 3"))
    got = torchrun(path, "-o", tmp_path / "run", "-q")
    assert got.code == 1  # torchrun's own
    assert "error: a batch of 3 rows does not divide among 2 processes" in got.err


def test_the_command_ends_with_a_card(run, tmp_path, monkeypatch):
    """Figures on stdout, progress on stderr, and what to do next."""
    monkeypatch.chdir(tmp_path)
    path = tiny_recipe.write(tmp_path, settings("eval_interval = 5\nckpt_interval = 5"))
    got = run("train", path)
    assert got.code == 0
    words = [line.split()[0] for line in got.out.splitlines()]
    assert words == ["trained", "loss", "held", "bigram", "responds", "saved", "picture", "next"]
    assert "tiny, 29,110 parameters, step 12 of 12, " in got.out
    assert "next      edgert export runs/tiny -o bundles/tiny" in got.out
    assert "held out  step 5: " in got.err
    lines = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    assert [line["step"] for line in lines if "heldout" in line] == [5, 10]
    again = run("train", path)
    assert (again.code, again.out) == (2, "")
    assert "error: the run's folder exists" in again.err


def test_the_command_speaks_json_and_stops_where_told(run, tmp_path):
    path = tiny_recipe.write(tmp_path)
    got = run("train", path, "-o", tmp_path / "run", "--steps", "5", "--json", "-q")
    assert (got.code, got.err) == (0, "")
    value = json.loads(got.out)
    assert (value["step"], value["steps"], value["interrupted"]) == (5, 12, False)
    assert value["checkpoint"].endswith("step-00000005")
    assert value["heldout"]["window"] == 16
    assert (value["heldout"]["stride"], value["heldout"]["bytes"]) == (
        8,
        value["heldout"]["tokens"],
    )
    assert value == json.loads((tmp_path / "run" / "result.json").read_text())


def test_resume_and_from_exclude_each_other(run, tmp_path):
    got = run("train", tiny_recipe.write(tmp_path), "--resume", "--from", tmp_path)
    assert got.code == 2
    assert "--resume goes on where the run stands, --from begins a new one" in got.err


@pytest.mark.parametrize("holdout", ["0", "0.001"])
def test_a_run_without_held_out_text(run, tmp_path, holdout):
    """0 holds out nothing, and the card leaves the figures out; too little is refused."""
    path = tiny_recipe.write(
        tmp_path, ("[train]", f"holdout = {holdout}\n[train]"), text=tiny_recipe.TEXT * 8
    )
    got = run("train", path, "-o", tmp_path / "run", "-q")
    if holdout == "0":
        assert got.code == 0
        assert "held out" not in got.out
    else:
        assert got.code == 2
        assert "which leaves nothing to predict" in got.err


def test_other_threads_are_announced(tmp_path):
    """Bit for bit holds for one number of threads; another one is told, not hidden."""
    import torch

    recipe = recipe_of(tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        job.train(recipe, tmp_path / "run", until=3)
        torch.set_num_threads(2)
        outcome = job.train(recipe, tmp_path / "run", resume=True, until=4)
    finally:
        torch.set_num_threads(before)
    assert outcome.notes[0].startswith("2 threads instead of 1: ")
