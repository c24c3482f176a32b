"""Targets of the trainer: its checkpoints, as the importer and a resumed run read them, and its
recipes. Hashes are made to fit, or nothing behind them would ever be looked at."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutations import (
    bytes_like,
    change_bytes,
    change_value,
    json_like,
    scalars,
    toml_text,
    values_like,
)
from target import Target, refill, through_file

Files = dict[str, bytes]

MODEL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 16,
    "perception_layers": 1,
    "reasoning_layers": 1,
    "expression_layers": 0,
    "loop_count": 2,
    "use_loop": True,
    "use_gdr": True,
    "transformer": {
        "hidden_size": 16,
        "num_query_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 8,
        "max_seq_len": 16,
    },
    "grades": {"scalar": 2, "vector": 8, "bivector": 2, "trivector": 2, "residual": 2},
}


SOLVER: dict[str, Any] = {
    "hidden_size": 16,
    "num_heads": 2,
    "expansion": 1,
    "H_layers": 1,
    "L_layers": 1,
    "H_cycles": 1,
    "L_cycles": 1,
    "pos_encodings": "learned",
    "puzzle_emb_ndim": 16,
    "halt_max_steps": 3,
    "halt_exploration_prob": 0.5,
    "loss": {"loss_type": "softmax_cross_entropy"},
}


def training_recipe(folder: Path) -> Target:
    """A TOML recipe with all its tables."""
    from edgert.train.recipe import read_recipe

    small = {"steps": 10, "window": 8, "batch_size": 2}
    tables: list[dict[str, Any]] = [
        {
            "format_version": 1,
            "name": "tiny",
            "model": {"family": "hagi", **MODEL},
            "data": {"corpus": "builtin", "holdout": 0.1},
            "train": small,
            "export": {"precision": "fp32"},
        },
        {
            "format_version": 1,
            "name": "tiny",
            "model": {"family": "hagi", **MODEL, "vocab_size": 400},
            "data": {"path": "text", "bpe": 300},
            "train": small
            | {
                "optimizer": "muon",
                "muon_momentum": 0.9,
                "schedule": "tension",
                "tension_lo": 0.4,
                "betas": [0.9, 0.99],
                "depth": "random",
                "ema": 0.9,
                "learning_rate": 0.001,
                "warmup_steps": 2,
            },
        },
        {
            "format_version": 1,
            "name": "tiny",
            "model": {"family": "hrm", **SOLVER},
            "data": {
                "task": "sudoku-4x4",
                "puzzles": "builtin",
                "classes": 60,
                "held_out": 20,
                "givens": [4, 9],
                "augment": True,
                "curriculum": 0.5,
            },
            "train": {
                "steps": 10,
                "batch_size": 2,
                "warmup_steps": 2,
                "gradient": "segment",
                "lookahead": False,
                "puzzle_emb_lr": 0.01,
                "eval_puzzles": 8,
            },
        },
    ]

    seeds = [toml_text(table) for table in tables]

    def faster(rate: float) -> bytes:  # or next to nothing would be accepted
        return toml_text(tables[0] | {"train": small | {"learning_rate": rate}})

    examples = st.one_of(
        values_like(tables, scalars()).map(toml_text),
        values_like(tables, scalars()).map(toml_text),
        bytes_like(seeds),
        st.floats(-1, 2000).map(faster),
    )
    return Target(seeds, examples, through_file(folder / "recipe.toml", read_recipe))


def trained(folder: Path) -> Target:
    """A checkpoint folder: config.json, the safetensors headers, the training state."""
    from edgert.models.importers import load_source
    from edgert.models.importers import trained as importer
    from edgert.train import job
    from edgert.train.recipe import parse_recipe

    table = {
        "format_version": 1,
        "name": "tiny",
        "model": {"family": "hagi", **MODEL},
        "data": {"path": "text.txt"},
        "train": {"steps": 2, "window": 8, "batch_size": 1},
    }
    (folder / "text.txt").write_text("what it says is said again\n" * 20)
    recipe = parse_recipe(table, folder, "recipe")
    run = folder / "run"
    job.train(recipe, run, until=1)
    home = run / "step-00000001"
    seed = {path.name: path.read_bytes() for path in home.iterdir()}
    config, state = (json.loads(seed[name]) for name in ("config.json", "training.json"))
    headers = {
        name: (json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), data)
        for name, data in seed.items()
        if name.endswith(".safetensors")
    }

    def sealed(files: Files, told: Any) -> Files:
        """With hashes that fit."""
        if isinstance(told, dict) and isinstance(told.get("files"), dict):
            told = copy.deepcopy(told)
            for name in told["files"].keys() & files.keys():
                told["files"][name] = hashlib.sha256(files[name]).hexdigest()
            told["sha256"] = importer.digest(told)
        return files | {"config.json": json.dumps(told).encode()}

    @st.composite
    def examples(draw: Any) -> Files:
        files = dict(seed)
        part = draw(st.sampled_from(["config", "config", "text", "state", "header", "bytes"]))
        told: Any = config
        if part == "config":
            told = change_value(draw, config, scalars())
        elif part == "text":
            return files | {"config.json": draw(json_like([config]))}
        elif part == "state":
            files["training.json"] = draw(json_like([state]))
        else:
            name = draw(st.sampled_from(sorted(headers)))
            header, data = headers[name]
            if part == "header":
                text, body = (
                    draw(json_like([header])),
                    data[8 + int.from_bytes(data[:8], "little") :],
                )
                files[name] = len(text).to_bytes(8, "little") + text + body
            else:
                files[name] = change_bytes(draw, data, hot=400)
        return sealed(files, told)

    def read(files: Files) -> None:
        refill(home, files)
        load_source(home)
        found = importer.read_checkpoint(home)
        trainer = fresh()
        trainer.restore(
            found.tensors(importer.WEIGHTS),
            found.tensors(importer.TENSORS),
            found.training(),
            str(home),
        )

    def fresh() -> Any:
        from edgert.train.data import Sampler
        from edgert.train.loop import Trainer
        from edgert.train.prepare import open_data
        from edgert.train.workers import Workers

        shards = open_data(recipe, run).shards
        return Trainer(recipe, Sampler(shards, recipe.train.window, 0), Workers())

    return Target([seed], examples(), read)
