"""Checkpoints: what comes back is what was written; what is damaged or foreign says why."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
import torch
from cases import cases

from edgert.errors import BadCheckpoint, EdgertError, NewerFormat, UsageError
from edgert.models.importers import load_source, trained
from edgert.train import checkpoint, job, published
from edgert.train.loop import Trainer
from edgert.train.metrics import read_metrics
from edgert.train.optim import Optimizer
from edgert.train.recipe import TrainConfig, read_recipe
from edgert.train.workers import Workers


def recipe_of(folder: Path, *changes: tuple[str, str]):
    return read_recipe(tiny_recipe.write(folder, *changes))


def settings(text: str) -> tuple[str, str]:
    return "[train]\n", f"[train]\n{text}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of twelve steps with checkpoints behind 6 and 12, also in the published format."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_of(folder, settings("ckpt_interval = 6"))
    job.train(recipe, folder / "run", write_published=True)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewrite(folder: Path, change) -> None:
    """Change config.json and give it its hash again, as a careful forger would."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config | {"sha256": trained.digest(config)}))


def test_the_importer_reads_the_newest(finished):
    """As the weights were, with the byte tokenizer, the end token and where it came from."""
    found = load_source(finished)
    assert (found.name, found.byte_offset, found.eos) == ("tiny", 1, (0,))
    assert (found.tokenizer_json, found.chat_template, found.notes) == (None, None, ())
    assert found.provenance["step"] == 12
    assert found.provenance["file"] == "step-00000012/model.safetensors"
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    older = load_source(finished / "step-00000006")
    assert older.provenance["step"] == 6
    assert not torch.equal(older.model.embed, found.model.embed)


def test_both_formats_hold_the_same_weights(finished):
    """Also for the published format's own readers: tied head, numbered moments, next step."""
    ours = load_source(finished / "step-00000012").model.published()
    theirs = load_source(finished / "step-00000012.pt").model.published()
    assert all(torch.equal(view, theirs[name]) for name, view in ours.items())
    content = torch.load(finished / "step-00000012.pt", weights_only=True)
    assert content["step"] == 12
    assert torch.equal(content["model"]["lm_head.weight"], content["model"]["embed.weight"])
    assert (finished / "step-00000012.pt").stat().st_size < 2 * 12 * 29_110  # no storage twice


def test_torchs_own_optimizer_takes_the_published_state(finished):
    """As the published trainer would resume: parameters in order, decayed ones first."""
    content = torch.load(finished / "step-00000012.pt", weights_only=True)
    weights = {k: v for k, v in content["model"].items() if k != "lm_head.weight"}
    decayed = [n for n, v in weights.items() if v.ndim >= 2 and "norm" not in n]
    rest = [n for n in weights if n not in decayed]
    parameters = {n: torch.nn.Parameter(v) for n, v in weights.items()}
    groups = [{"params": [parameters[n] for n in names]} for names in (decayed, rest)]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(content["optimizer"])
    for name, parameter in parameters.items():
        assert optimizer.state[parameter]["exp_avg"].shape == weights[name].shape
        assert float(optimizer.state[parameter]["step"]) == 12


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("form", ["ours", "published"])
def test_a_run_begins_where_a_checkpoint_ends(tmp_path, kind, form):
    """--from: the same weights, moments and step; the sampler is seeded anew in both formats."""
    recipe = recipe_of(tmp_path, settings(f'optimizer = "{kind}"'))
    job.train(recipe, tmp_path / "one", until=5, write_published=True)
    start = tmp_path / "one" / ("step-00000005" if form == "ours" else "step-00000005.pt")
    again = recipe_of(tmp_path, settings(f'optimizer = "{kind}"\nseed = 9'))
    outcome = job.train(again, tmp_path / "two", start=start, until=6)
    assert outcome.step == 6
    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [6]
    # The same by hand: weights and moments of the one, batches of a fresh sampler.
    found = trained.read_checkpoint(tmp_path / "one" / "step-00000005")
    trainer = trainer_of(again, tmp_path / "two")
    state = trainer.state() | {"step": 5, "updates": 5}
    trainer.restore(
        found.tensors("model.safetensors"), found.tensors("training.safetensors"), state, "here"
    )
    assert trainer.advance().loss == lines[0]["loss"]
    written = load_source(tmp_path / "two").model.published()
    assert all(torch.equal(v, written[n]) for n, v in trainer.model.published().items())


def trainer_of(recipe, run: Path) -> Trainer:
    from edgert.train.data import Sampler
    from edgert.train.prepare import open_data

    data = open_data(recipe, run)
    return Trainer(recipe, Sampler(data.shards, recipe.train.window, recipe.train.seed), Workers())


def test_a_published_checkpoint_of_others_is_a_start(tmp_path):
    """Case train_adamw: its model, its moments; trained on for a step."""
    (case,) = cases("hagi", lambda case: case.name == "train_adamw")
    model = load_source(case.folder / case.meta["final_checkpoint"]).model
    optimizer = Optimizer(model, TrainConfig(steps=9, window=17, batch_size=3))
    content = torch.load(case.folder / case.meta["final_checkpoint"], weights_only=True)
    updates, state = published.moments(content["optimizer"], optimizer, "there")
    optimizer.restore(updates, state, "there")
    assert updates == 6
    again = published.optimizer_state(optimizer)
    for index, slots in content["optimizer"]["state"].items():
        for slot, value in slots.items():
            assert torch.equal(again["state"][index][slot], value), (index, slot)


def no_state(content) -> None:
    content["optimizer"] = 3


def other_groups(content) -> None:
    content["optimizer"]["param_groups"].pop()


def other_shape(content) -> None:
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def other_type(content) -> None:
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 32, dtype=torch.float64)


def not_finite(content) -> None:
    content["optimizer"]["state"][0]["exp_avg"][0, 0] = float("nan")


def unequal(content) -> None:
    content["optimizer"]["state"][1]["step"] += 1


def no_number(content) -> None:
    content["optimizer"]["state"][1]["step"] = torch.tensor(float("inf"))


def too_many(content) -> None:
    content["optimizer"]["state"][999] = {}


def another_model(content) -> None:
    content["config"]["loop_count"] = 3
    content["model"]["iter_embed"] = torch.zeros(3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_state, "adamw: 3 is no optimizer state"),
        (other_groups, "adamw has groups of [33] weights, the model [33, 17]"),
        (other_shape, "exp_avg.iter_embed is [7], the weight is [2, 32]"),
        (other_type, "adamw.0.exp_avg is torch.float64, not torch.float32"),
        (not_finite, "NaN, infinite or other values than float32: exp_avg.iter_embed"),
        (unequal, "different numbers of updates, 12 and 13"),
        (no_number, "adamw.1.step is not a number of updates"),
        (too_many, "adamw.999 belongs to no weight"),
        (another_model, "the checkpoint is of another model than the recipe's:\n  - loop_count: 3"),
    ],
)
def test_a_published_start_that_does_not_fit_is_refused(run, tmp_path, change, message):
    content = torch.load(run / "step-00000012.pt", weights_only=True)
    content["step"] = 3
    change(content)
    torch.save(content, tmp_path / "start.pt")
    with pytest.raises((BadCheckpoint, UsageError)) as caught:
        job.train(recipe_of(tmp_path), tmp_path / "new", start=tmp_path / "start.pt")
    assert message in str(caught.value)


def test_a_start_without_optimizer_state_is_said(run, tmp_path):
    content = torch.load(run / "step-00000006.pt", weights_only=True)
    del content["optimizer"]
    torch.save(content, tmp_path / "start.pt")
    got = job.train(recipe_of(tmp_path), tmp_path / "new", start=tmp_path / "start.pt", until=7)
    assert got.notes[0] == "the file has no optimizer state: its moments start at zero"


@pytest.mark.parametrize("name", ["step-00000006", "step-00000006.pt"])
def test_a_start_with_an_average_and_tension_begins_both_anew(run, tmp_path, name):
    """The average at the weights, the tension at the first gradient, whose multiplier is 1."""
    recipe = recipe_of(tmp_path, settings('ema = 0.5\nschedule = "tension"'))
    job.train(recipe, tmp_path / "new", start=run / name, until=7)
    (line,) = read_metrics(tmp_path / "new" / "metrics.jsonl")
    plain = recipe_of(tmp_path)
    job.train(plain, tmp_path / "plain", start=run / name, until=7)
    (wanted,) = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    assert [line[key] for key in ("loss", "lr")] == [wanted[key] for key in ("loss", "lr")]
    found = trained.read_checkpoint(tmp_path / "new" / "step-00000007")
    used, tensors = found.tensors("model.safetensors"), found.tensors("training.safetensors")
    before = load_source(run / name).model.published()["embed.weight"]
    mean = (before + tensors["weights.embed.weight"]) / 2
    torch.testing.assert_close(used["embed.weight"], mean)


def test_a_start_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match="there is no such checkpoint"):
        job.train(recipe_of(tmp_path), tmp_path / "new", start=tmp_path / "nothing")


def test_a_start_behind_the_end_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="has made 12 steps, the recipe has 12"):
        job.train(recipe_of(tmp_path), tmp_path / "new", start=run)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, name):
    """One flipped bit anywhere: the older one is used, and it is said."""
    path = run / "step-00000012" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = load_source(run)
    assert found.provenance["step"] == 6
    assert found.notes[0].startswith(f"step-00000012 is passed over: {name} is not the file that")
    loaded = trained.read_checkpoint(run / "step-00000012")
    with pytest.raises(BadCheckpoint, match=f"{name} is not the file that was written"):
        loaded.verify(name)


def test_a_run_without_a_sound_checkpoint_says_what_is_wrong(run):
    for folder in trained.step_folders(run):
        (folder / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"config\.json is not JSON") as caught:
        trained.newest(run)
    assert "step-00000012" in (caught.value.where or "")


def test_a_run_without_any_checkpoint_is_no_model(tmp_path):
    with pytest.raises(BadCheckpoint, match="no checkpoint in this folder"):
        trained.newest(tmp_path)


def set_to(**values):
    return lambda config: config.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(format="other"), "format is 'other', not edgert-checkpoint"),
        (set_to(family="nosuch"), "family is 'nosuch', known are: hagi"),
        (set_to(step=-1), "step is -1, not an integer"),
        (set_to(context=0), "context is 0, not an integer"),
        (set_to(eos=300), "eos is 300, the vocabulary has ids 0 to 256"),
        (set_to(tokenizer={"kind": "bytes", "offset": 2}), "bytes from id 2 on do not fit 257"),
        (set_to(tokenizer={"kind": "file", "file": "../x"}), "neither bytes nor tokenizer.json"),
        (set_to(files={}), "files.model.safetensors is missing"),
        (set_to(files={"../../x": "0"}), "files.'../../x' does not belong"),
        (set_to(files={"model.safetensors": "0"}), "files.model.safetensors is '0', not a SHA-256"),
        (lambda c: c["config"].update(hidden_size=64), "config.hidden_size 64 and"),
        (lambda c: c["config"].update(colour=1), "config.colour is not known"),
    ],
)
def test_a_config_that_says_strange_things_is_refused(run, change, message):
    rewrite(run / "step-00000012", change)
    with pytest.raises(EdgertError) as caught:
        trained.read_checkpoint(run / "step-00000012")
    assert message in str(caught.value)


def test_a_config_that_was_changed_by_hand_is_refused(run):
    path = run / "step-00000012" / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    with pytest.raises(BadCheckpoint, match="does not have its own SHA-256"):
        trained.read_checkpoint(run / "step-00000012")


def test_a_later_format_is_named(run):
    rewrite(run / "step-00000012", set_to(format_version=2))
    with pytest.raises(NewerFormat, match="the checkpoint has format 2, this version reads up to"):
        trained.read_checkpoint(run / "step-00000012")


def test_a_config_that_disagrees_with_its_tensors_lists_them(run):
    """All of them at once, with both shapes."""

    def narrower(config) -> None:
        config["config"]["transformer"]["intermediate_size"] = 48
        config["config"]["loop_count"] = 3

    rewrite(run / "step-00000012", narrower)
    with pytest.raises(BadCheckpoint) as caught:
        load_source(run / "step-00000012")
    for line in (
        "iter_embed is [2, 32], the config wants [3, 32]",
        "perception.0.mlp.gate.weight is [32, 32], the config wants [48, 32]",
        "expression.0.mlp.down.weight is [32, 32], the config wants [32, 48]",
    ):
        assert line in str(caught.value)


def resealed(folder: Path, name: str, data: bytes) -> None:
    """Put other content into a file, with a hash that fits."""
    import hashlib

    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(folder, lambda config: config["files"].update({name: digest}))


def test_a_training_state_that_does_not_fit_is_refused(run, tmp_path):
    """Hashes prove that a file is what was written, not that it makes sense."""
    folder = run / "step-00000012"
    recipe = recipe_of(tmp_path, settings("ckpt_interval = 6"))
    good = json.loads((folder / "training.json").read_text())
    for change, message in (
        ({"step": "x"}, "step is 'x', not a number of steps"),
        ({"updates": -1}, "updates is -1, not a number of steps"),
        ({"tension": 1.0}, "tension is 1.0, the schedule is cosine"),
        ({"sampler": {}}, "the state of the sampler's random numbers is unusable"),
        ({"depth": None}, "the state of the depth's random numbers is unusable"),
    ):
        resealed(folder, "training.json", json.dumps(good | change).encode())
        with pytest.raises(BadCheckpoint) as caught:
            job.train(recipe, run, resume=True)
        assert message in str(caught.value)
        assert "step-00000012" in (caught.value.where or "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08\0\0\0\0\0\0\0{}      ", "is missing"),
        (b"\xff" * 64, "is not a sound safetensors file"),
        (b"", "is not a sound safetensors file"),
    ],
)
def test_weights_that_are_no_weights_are_refused(run, data, message):
    resealed(run / "step-00000012", "model.safetensors", data)
    with pytest.raises(BadCheckpoint, match=message):
        load_source(run / "step-00000012")


def test_weights_of_another_type_are_refused(run):
    from safetensors.torch import save

    resealed(
        run / "step-00000012", "model.safetensors", save({"a": torch.zeros(1, dtype=torch.float16)})
    )
    with pytest.raises(BadCheckpoint, match=r"'a' is torch\.float16, not torch\.float32"):
        load_source(run / "step-00000012")


def test_a_folder_of_transformers_is_not_taken_for_ours(tmp_path):
    """Its config.json has no such format; nor is a folder with a pipe for one waited for."""
    import os

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert not trained.recognised(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert not trained.recognised(tmp_path)


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    """Also transposed views, scalars of one element, and empty ones; the hash is the file's."""
    from safetensors.torch import load_file

    from edgert.files import sha256_file

    rng = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=rng).T,
        "a.é": torch.randn(1, generator=rng),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "x.safetensors"
    digest = checkpoint.write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert digest == sha256_file(path)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    """keep = 2, in both formats; 0 keeps all."""
    for keep, left in ((2, [8, 12]), (0, [2, 4, 6, 8, 10, 12])):
        step = 2 if keep == 0 else 4
        folder = tmp_path / str(keep)
        folder.mkdir()
        recipe = recipe_of(folder, settings(f"ckpt_interval = {step}\nkeep = {keep}"))
        job.train(recipe, folder / "run", write_published=True)
        assert sorted(int(p.name[5:]) for p in trained.step_folders(folder / "run")) == left
        assert sorted(int(p.stem[5:]) for p in (folder / "run").glob("step-*.pt")) == left


def test_leftovers_of_a_killed_writer_are_removed(run, tmp_path):
    left = run / ".step-00000012.0123456789ab.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    job.train(recipe_of(tmp_path, settings("ckpt_interval = 6")), run, resume=True)
    assert not left.exists()


def test_an_averaged_model_is_what_is_used_and_the_raw_one_what_goes_on(tmp_path):
    """model.safetensors has the average; a resumed run equals one that was not interrupted."""
    recipe = recipe_of(tmp_path, settings("ema = 0.9"))
    job.train(recipe, tmp_path / "whole")
    job.train(recipe, tmp_path / "parts", until=7)
    job.train(recipe, tmp_path / "parts", resume=True)
    one, two = (trained.newest(tmp_path / name)[0] for name in ("whole", "parts"))
    assert one.files["model.safetensors"] == two.files["model.safetensors"]
    assert one.files["training.safetensors"] == two.files["training.safetensors"]
    raw, used = one.tensors("training.safetensors"), one.tensors("model.safetensors")
    assert not torch.equal(raw["weights.embed.weight"], used["embed.weight"])


def test_state_of_numpy_survives_json(finished):
    """The sampler's state in training.json is what numpy takes back."""
    state = json.loads((finished / "step-00000012" / "training.json").read_text())
    rng = np.random.default_rng(0)
    rng.bit_generator.state = state["sampler"]
    assert rng.bit_generator.state == state["sampler"]
    settings = dataclasses.asdict(TrainConfig(1, 2, 3)).keys() - {"device"}
    assert state["recipe"]["train"].keys() == settings
