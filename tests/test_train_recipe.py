"""What a training recipe may say; all that is wrong is said at once."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tiny_recipe

from edgert.errors import UsageError
from edgert.train.recipe import (
    MAX_BYTES,
    DataConfig,
    TrainConfig,
    completed,
    differences,
    read_recipe,
)


def test_the_least_a_recipe_says(tmp_path):
    """Everything else has the published defaults; bytes give the vocabulary its size."""
    got = read_recipe(tiny_recipe.write(tmp_path))
    assert (got.name, got.family.name, got.folder) == ("tiny", "hagi", tmp_path)
    assert got.model.vocab_size == 257
    assert (got.model.letter, got.model.iterations, got.model.context) == ("D", 2, 64)
    assert got.data == DataConfig(path="text.txt")
    assert got.train == TrainConfig(
        steps=12, window=16, batch_size=4, learning_rate=1e-2, warmup_steps=2
    )


def test_what_export_reads_is_not_read_here(tmp_path):
    """One file for both; each has its own tables."""
    more = '\n[export]\nprecision = "fp32"\n\n[sampling]\ntemperature = 0.8\n\n[train]'
    plain = read_recipe(tiny_recipe.write(tmp_path))
    assert read_recipe(tiny_recipe.write(tmp_path, ("\n[train]", more))) == plain


EVERYTHING = """\
grad_accum_steps = 3
optimizer = "muon"
muon_momentum = 0.9
muon_ns_steps = 4
schedule = "tension"
tension_beta = 0.98
tension_lo = 0.6
tension_hi = 1.8
min_lr_ratio = 0.2
weight_decay = 0.05
betas = [0.8, 0.9]
eps = 1e-7
grad_clip = 2
seed = 7
depth = "random"
settle = 0.5
precision = "bf16"
ema = 0.99
ckpt_interval = 5
keep = 0
eval_interval = 6
eval_tokens = 512
log_interval = 2
"""


def test_everything_a_recipe_may_say_about_training(tmp_path):
    """Each key arrives where it belongs."""
    got = read_recipe(tiny_recipe.write(tmp_path, ("[train]\n", "[train]\n" + EVERYTHING))).train
    assert got == TrainConfig(
        steps=12,
        window=16,
        batch_size=4,
        grad_accum_steps=3,
        optimizer="muon",
        learning_rate=1e-2,
        min_lr_ratio=0.2,
        warmup_steps=2,
        schedule="tension",
        tension_beta=0.98,
        tension_lo=0.6,
        tension_hi=1.8,
        weight_decay=0.05,
        betas=(0.8, 0.9),
        eps=1e-7,
        grad_clip=2.0,
        muon_momentum=0.9,
        muon_ns_steps=4,
        seed=7,
        depth="random",
        settle=0.5,
        precision="bf16",
        ema=0.99,
        ckpt_interval=5,
        keep=0,
        eval_interval=6,
        eval_tokens=512,
        log_interval=2,
    )


TRAIN, MODEL, GDR = "[train]\n", "[model]\n", "use_gdr = true"
WRONG = {
    "format_version is 2, not an integer": [("format_version = 1", "format_version = 2")],
    "format_version is missing": [("format_version = 1\n", "")],
    "name is 'a/b', not a name for a folder": [('name = "tiny"', 'name = "a/b"')],
    "colour is not a key of a recipe": [('name = "tiny"', 'name = "tiny"\ncolour = 1')],
    "model.family is 'nosuch', known are: hagi": [('"hagi"', '"nosuch"')],
    "model.layers is not a key of a hagi model": [(GDR, "use_gdr = true\nlayers = 3")],
    "model.transformer.heads is not a key": [("max_seq_len = 64", "max_seq_len = 64\nheads = 2")],
    "model.grades sum to 32, model.hidden_size is 64": [
        ("hidden_size = 32\nper", "hidden_size = 64\nper"),
        ("hidden_size = 32\nnum", "hidden_size = 64\nnum"),
    ],
    "model.grades.vector 12 is not a multiple of 8": [
        ("vector = 8", "vector = 12"),
        ("residual = 12", "residual = 8"),
    ],
    "model.hidden_size 64 and model.transformer.hidden_size 32 differ": [
        ("hidden_size = 32\nper", "hidden_size = 64\nper")
    ],
    "model.vocab_size 200: the tokenizer has 257": [(GDR, "use_gdr = true\nvocab_size = 200")],
    "model.vocab_size 70000: shards hold 16-bit": [(GDR, "use_gdr = true\nvocab_size = 70000")],
    "model.vocab_size is missing": [(TRAIN, 'tokenizer = "t.json"\n[train]\n')],
    "exactly one of corpus, path and shards must be given, found none": [('path = "text.txt"', "")],
    "found corpus, path": [('path = "text.txt"', 'path = "a"\ncorpus = "builtin"')],
    "data.corpus is 'wiki', known is: builtin": [('path = "text.txt"', 'corpus = "wiki"')],
    "data: give tokenizer or bpe, not both": [(TRAIN, 'bpe = 300\ntokenizer = "x"\n[train]\n')],
    "data.bpe is 200: 256 bytes and an end token need": [(TRAIN, "bpe = 200\n[train]\n")],
    "data: bpe needs text": [('path = "text.txt"', 'shards = "s"\nbpe = 300')],
    "data.eos belongs to a tokenizer.json": [(TRAIN, 'eos = "x"\n[train]\n')],
    "data.holdout is 0.9, not a number from 0 to 0.5": [(TRAIN, "holdout = 0.9\n[train]\n")],
    "data.text is not a key of a recipe": [(TRAIN, "text = 1\n[train]\n")],
    "train.steps is missing": [("steps = 12\n", "")],
    "train.steps is 'x', not an integer": [("steps = 12", 'steps = "x"')],
    "train.steps is 1.5, not an integer": [("steps = 12", "steps = 1.5")],
    "train.lr is not a key of a recipe": [(TRAIN, "[train]\nlr = 1\n")],
    "train.learning_rate is nan, not a number": [("rate = 1e-2", "rate = nan")],
    "train.optimizer is 'sgd', not one of adamw, muon": [(TRAIN, '[train]\noptimizer = "sgd"\n')],
    "train.schedule is 3, not text": [(TRAIN, "[train]\nschedule = 3\n")],
    "train.betas is a list of 3, not two numbers": [(TRAIN, "[train]\nbetas = [0, 0, 0]\n")],
    "train.betas is 0.9, not two numbers": [(TRAIN, "[train]\nbetas = 0.9\n")],
    "train.warmup_steps 12 is not below train.steps 12": [
        ("warmup_steps = 2", "warmup_steps = 12")
    ],
    "train.window 65 is longer than model.transformer.max_seq_len 64": [
        ("window = 16", "window = 65")
    ],
    "train.depth is 'random', but the model runs one iteration": [
        ("use_loop = true", "use_loop = false"),
        (TRAIN, '[train]\ndepth = "random"\n'),
    ],
    "train.settle is 0.5, but the model runs one iteration": [
        ("use_loop = true", "use_loop = false"),
        (TRAIN, "[train]\nsettle = 0.5\n"),
    ],
    "train.tension_lo 3 is above tension_hi 2": [
        (TRAIN, '[train]\nschedule = "tension"\ntension_lo = 3\n')
    ],
    "train.tension_lo belongs to schedule = 'tension'": [(TRAIN, "[train]\ntension_lo = 1\n")],
    "train.muon_ns_steps belongs to optimizer = 'muon'": [(TRAIN, "[train]\nmuon_ns_steps = 1\n")],
    "train.ema is 1.0, not a number": [(TRAIN, "[train]\nema = 1.0\n")],
    "model is 3, not a mapping": [],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(tmp_path, message):
    path = tiny_recipe.write(tmp_path, *WRONG[message])
    if not WRONG[message]:
        path.write_text('format_version = 1\nname = "x"\nmodel = 3\ndata = 4\n')
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert caught.value.where == str(path)
    assert "docs/training.md" in (caught.value.do or "")


def test_everything_wrong_is_said_at_once(tmp_path):
    """One look at the recipe is enough to repair it."""
    path = tiny_recipe.write(
        tmp_path,
        ("steps = 12", "stepz = 12"),
        ("scalar = 4", "scalar = 5"),
        ('path = "text.txt"', 'path = "text.txt"\nholdout = 2'),
    )
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    for line in (
        "train.steps is missing",
        "train.stepz is not a key",
        "model.grades sum to 33",
        "data.holdout is 2",
    ):
        assert f"\n  - {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[model", "the recipe is not TOML"),
        (b"\xff", "the recipe is not TOML"),
        (b"#" * (MAX_BYTES + 1), f"larger than {MAX_BYTES} bytes"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, data, message):
    path = tmp_path / "r.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_recipe(path)


def test_a_missing_recipe_is_said(tmp_path):
    with pytest.raises(UsageError, match="the recipe cannot be read: No such file"):
        read_recipe(tmp_path / "nothing.toml")


def test_rotary_tables_that_fit_no_memory_are_refused(tmp_path):
    path = tiny_recipe.write(
        tmp_path,
        ("max_seq_len = 64", "max_seq_len = 1048576"),
        ("hidden_size = 32\nper", "hidden_size = 4096\nper"),
        ("hidden_size = 32\nnum", "hidden_size = 4096\nnum"),
        ("residual = 12", "residual = 4076"),
    )
    with pytest.raises(UsageError, match="rotary tables"):
        read_recipe(path)


def test_differences_name_the_keys(tmp_path):
    """With the old value and the new one, nested keys with dots."""
    one = read_recipe(tiny_recipe.write(tmp_path)).to_json()
    two = read_recipe(
        tiny_recipe.write(
            tmp_path,
            ("window = 16", "window = 8"),
            ("vector = 8", "vector = 16"),
            ("residual = 12", "residual = 4"),
        )
    ).to_json()
    assert differences(one, one) == []
    assert differences(one, two) == [
        "model.grades.residual: 12, now 4",
        "model.grades.vector: 8, now 16",
        "train.window: 16, now 8",
    ]
    assert differences({"a": 1}, {"b": 2}) == ["a: 1, now absent", "b: absent, now 2"]


def test_a_run_that_is_older_than_a_setting_has_its_default(tmp_path):
    """And one that had another value still differs."""
    now = read_recipe(tiny_recipe.write(tmp_path)).to_json()
    older = now | {"train": {k: v for k, v in now["train"].items() if k != "settle"}}
    assert differences(older, now) == ["train.settle: absent, now 0.0"]
    assert differences(completed(older), now) == []
    assert differences(completed(now), now) == []
    settled = now | {"train": now["train"] | {"settle": 0.5}}
    assert differences(completed(older), settled) == ["train.settle: 0.0, now 0.5"]


def test_the_page_names_every_key_and_default():
    """docs/training.md is where an error sends the reader."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text("utf-8")
    table = page.split("## The recipe")[1].split("\n## ")[0]
    for kind in (DataConfig, TrainConfig):
        for field in fields(kind):
            assert f"`{field.name}`" in table, field.name
    for row in table.splitlines():
        names = re.findall(r"`(\w+)`", row.split("|")[2]) if row.startswith("|") else []
        stated = row.split("|")[3].strip() if names else ""
        for name, text in zip(names, re.findall(r"\[.*?\]|[^, ]+", stated), strict=False):
            default = getattr(TrainConfig, name, getattr(DataConfig, name, None))
            if not isinstance(default, str | None):
                assert ast.literal_eval(text) in (default, list(flat(default))), name


def flat(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)
