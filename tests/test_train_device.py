"""Where training computes: chosen in one place, refused if it is not there; and nothing strays."""

from __future__ import annotations

import ast
import json
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_puzzles
import tiny_recipe
import torch
from command import finished, python
from tiny_puzzles import CYCLES, SEGMENTS

from edgert.errors import Incompatible, UsageError
from edgert.models.importers import trained
from edgert.train import job, workers
from edgert.train.device import Gpus, choose, generators, local_rank
from edgert.train.recipe import read_recipe

TESTS = Path(__file__).resolve().parent
TRAINER = TESTS.parent / "edgert" / "train"
TRAIN = "[train]\n"
NONE, EIGHT, OLD = Gpus(), Gpus(8, bf16=True), Gpus(1)


def config(folder: Path, *lines: str):
    text = TRAIN + "".join(f"{line}\n" for line in lines)
    return read_recipe(tiny_recipe.write(folder, (TRAIN, text))).train


@pytest.mark.parametrize(
    ("wanted", "found", "rank", "device"),
    [
        ("cpu", NONE, 0, "cpu"),
        ("cpu", EIGHT, 3, "cpu"),
        ("auto", NONE, 0, "cpu"),
        ("auto", NONE, 5, "cpu"),
        ("auto", EIGHT, 0, "cuda:0"),
        ("auto", EIGHT, 7, "cuda:7"),
        ("cuda", EIGHT, 0, "cuda:0"),
        ("cuda", EIGHT, 3, "cuda:3"),
        ("cuda", OLD, 0, "cuda:0"),
    ],
)
def test_a_process_takes_the_device_of_its_rank(tmp_path, wanted, found, rank, device):
    assert choose(config(tmp_path, f'device = "{wanted}"'), found, rank) == torch.device(device)


@pytest.mark.parametrize(
    ("lines", "found", "rank", "message"),
    [
        (['device = "cuda"'], NONE, 0, "torch finds no GPU"),
        (['device = "cuda"'], EIGHT, 8, "process 8 has no GPU of its own: torch finds 8"),
        (['device = "auto"'], OLD, 1, "process 1 has no GPU of its own: torch finds 1"),
        (['device = "auto"', 'precision = "bf16"'], OLD, 0, "bf16, which this GPU does not"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, lines, found, rank, message):
    """Also by "auto": workers on GPUs and others on CPUs would wait for each other for ever."""
    with pytest.raises(Incompatible, match=message) as caught:
        choose(config(tmp_path, *lines), found, rank)
    assert "--device cpu" in caught.value.do
    assert caught.value.where.endswith("in [train]")


def test_a_recipe_says_cpu_unless_it_says_otherwise(tmp_path):
    assert config(tmp_path).device == "cpu"
    with pytest.raises(UsageError, match="train.device is 'tpu', not one of auto, cpu, cuda"):
        config(tmp_path, 'device = "tpu"')


def test_a_process_is_told_its_rank_by_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_rank() == 3


@pytest.mark.parametrize(
    ("device", "backend", "bound"), [("cpu", "gloo", None), ("cuda:1", "nccl", "cuda:1")]
)
def test_gpus_are_connected_by_nccl_and_cpus_by_gloo(monkeypatch, device, backend, bound):
    """What torch is asked for: with CUDA, the process is bound to its GPU before anything else."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: asked.append(("current", str(d))))

    def begin(name: str, device_id: torch.device | None, timeout: timedelta) -> None:
        asked.append((name, device_id))
        assert timeout > timedelta(hours=12)  # the first evaluates, and the others wait

    monkeypatch.setattr(workers.dist, "init_process_group", begin)
    monkeypatch.setattr(workers.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(workers.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(workers.dist, "destroy_process_group", lambda: asked.append("ended"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with workers.workers(torch.device(device)) as group:
        assert (group.rank, group.count, group.device) == (1, 2, torch.device(device))
    gpu = None if bound is None else torch.device(bound)
    assert asked == [*([("current", bound)] if bound else []), (backend, gpu), "ended"]


def test_dropout_on_a_gpu_leaves_its_random_numbers_as_they_were():
    assert generators(torch.device("cpu")) == []
    assert generators(torch.device("cuda", 2)) == [torch.device("cuda", 2)]


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read_or_written(
    tmp_path, monkeypatch
):
    """Not even its data, which is not there either, has been looked for."""
    monkeypatch.setattr(job, "gpus", Gpus)
    recipe = read_recipe(tiny_recipe.write(tmp_path, (TRAIN, f'{TRAIN}device = "cuda"\n')))
    (tmp_path / "text.txt").unlink()
    with pytest.raises(Incompatible, match="torch finds no GPU"):
        job.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_option_goes_before_the_recipe(tmp_path):
    path = tiny_recipe.write(tmp_path, (TRAIN, f'{TRAIN}device = "cuda"\n'))
    hidden = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = ("-m", "edgert", "train", path, "-q", "--steps", 1, "-o")
    refused = finished(python(*line, tmp_path / "one", env=hidden))
    assert refused.code == 4
    assert "error: the recipe trains on CUDA, and torch finds no GPU" in refused.err
    trained_there = finished(python(*line, tmp_path / "two", "--device", "cpu", env=hidden))
    assert trained_there.code == 0, trained_there.err
    assert "on 1 thread" in trained_there.out


def test_a_run_may_go_on_elsewhere(tmp_path):
    """The device is no part of what a run must not change."""
    recipe = read_recipe(tiny_recipe.write(tmp_path))
    job.train(recipe, tmp_path / "run", until=2)
    elsewhere = replace(recipe, train=replace(recipe.train, device="auto", precision="bf16"))
    with pytest.raises(UsageError, match="recipe is not the one") as caught:
        job.train(elsewhere, tmp_path / "run", until=4, resume=True)
    assert "train.precision: 'fp32', now 'bf16'" in str(caught.value)
    assert "device" not in str(caught.value)


BF16 = (TRAIN, f'{TRAIN}precision = "bf16"\n')


@pytest.mark.parametrize("kind", ["text", "segments", "whole segments", "cycles"])
def test_a_model_learns_in_bf16(tmp_path, kind):
    """Its loss falls nearly as far as in float32, but not to the same bits; what is kept is
    float32."""
    changes = [("steps = 12", "steps = 40")]
    if kind == "whole segments":
        changes.append(("warmup_steps = 2\n", 'warmup_steps = 2\ngradient = "segment"\n'))
    last: dict[str, float] = {}
    for name, more in (("fp32", []), ("bf16", [BF16])):
        folder = tmp_path / name
        folder.mkdir()
        if kind == "text":
            path = tiny_recipe.write(folder, *changes, *more)
        else:
            model = CYCLES if kind == "cycles" else SEGMENTS
            path = tiny_puzzles.write(folder, *changes, *more, model=model)
        outcome = job.train(read_recipe(path), folder / "run")
        assert outcome.last < 0.8 * outcome.first
        last[name] = outcome.last
    assert last["bf16"] != last["fp32"]
    assert last["bf16"] == pytest.approx(last["fp32"], rel=0.05)
    found = trained.newest(tmp_path / "bf16" / "run")[0]
    for file in (trained.WEIGHTS, trained.TENSORS):
        assert {tensor.dtype for tensor in found.tensors(file).values()} == {torch.float32}


EVERY_TEXT = 'schedule = "tension"\ndepth = "random"\nsettle = 0.5\nema = 0.9\n'
EVERY_GRID = "ema = 0.9\ngrad_accum_steps = 2\ngrad_clip = 1\n"
WAYS = {
    "text": lambda at: tiny_recipe.write(at, (TRAIN, TRAIN + EVERY_TEXT)),
    "muon": lambda at: tiny_recipe.write(at, (TRAIN, f'{TRAIN}optimizer = "muon"\n')),
    "segments": lambda at: tiny_puzzles.write(
        at, (TRAIN, TRAIN + EVERY_GRID), ("classes = 60\n", "classes = 60\naugment = true\n")
    ),
    "adamw": lambda at: tiny_puzzles.write(at, (TRAIN, f'{TRAIN}optimizer = "adamw"\n')),
    "cycles": lambda at: tiny_puzzles.write(
        at, (TRAIN, f'{TRAIN}cycle_loss = "halting"\nema = 0.9\n'), model=CYCLES
    ),
}


@pytest.fixture(scope="module")
def trained_elsewhere(tmp_path_factory) -> dict[str, dict[str, dict]]:
    """By way and place, what a run came to: on the CPU, the second device, half on either."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name, write in WAYS.items():
        (root / name).mkdir()
        write(root / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    got = finished(python(TESTS / "second_device.py", root, env=environment), seconds=500)
    assert got.code == 0, got.err
    return json.loads(got.out)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_training_on_another_device_agrees_to_rounding(trained_elsewhere, way):
    """No tensor was left on the CPU, or it had been refused; and the checkpoint of either device
    goes on on the CPU."""
    found = trained_elsewhere[way]
    cpu = found["cpu"]
    assert [each["device"] for each in found.values()] == ["cpu", "second:0", "cpu"]
    for other in (found["second"], found["then cpu"]):
        assert other["first"] == pytest.approx(cpu["first"], rel=1e-6)
        assert other["last"] == pytest.approx(cpu["last"], rel=1e-3)  # twelve steps amplify
    assert "on cpu instead of second: the loss will agree" in found["then cpu"]["notes"][0]


@pytest.mark.slow
def test_dropout_does_not_depend_on_where_the_seed_is_set(trained_elsewhere):
    """The cycles compute the same operations there: even the bits are those of the CPU."""
    found = trained_elsewhere["cycles"]
    assert found["cpu"]["files"] == found["second"]["files"] == found["then cpu"]["files"]


@pytest.mark.slow
def test_the_second_device_refuses_tensors_of_the_cpu(trained_elsewhere):
    """Or the tests above could not fail."""
    assert "mul.Tensor: tensors on the second device and on the CPU" in trained_elsewhere["refusal"]


MAKERS = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"),
    *("randn", "randperm", "tensor", "zeros"),
}
ON_THE_CPU = {
    ("act.py", "explored"): "drawn there, so that it is the same everywhere",
    ("grids.py", "__init__"): "and moved",
    ("published.py", "optimizer_state"): "into a file",
}


def test_every_new_tensor_of_the_trainer_is_told_where_to_be():
    """Or it is one of a few that belong on the CPU."""
    silent = set()
    for path in sorted(TRAINER.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and isinstance(call.func.value, ast.Name)
                    and (call.func.value.id, call.func.attr in MAKERS) == ("torch", True)
                    and all(keyword.arg != "device" for keyword in call.keywords)
                ):
                    silent.add((path.name, function.name))
    assert silent == set(ON_THE_CPU)
