"""What a recipe says about training: its tables `model`, `data` and `train`.

The same file may tell `edgert export` what to make of the trained model (`[export]`, `[sampling]`);
that is not read here.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgert.errors import BadCheckpoint, UsageError
from edgert.models.importers.common import Fields, Problems, named, shown
from edgert.models.trainable import TRAINABLE, Config, Family, TextConfig
from edgert.tasks import find
from edgert.tomlfile import read_toml
from edgert.train.puzzle_recipe import (
    PuzzleData,
    PuzzleTrain,
    fill_in,
    read_puzzle_data,
    read_puzzle_train,
)
from edgert.train.train_recipe import TrainConfig, read_train

__all__ = ["DataConfig", "TrainConfig", "TrainRecipe", "parse_recipe", "read_recipe"]

MAX_BYTES = 1 << 20
BYTES = "bytes"
BYTE_OFFSET = 1  # id 0 ends a document
BYTE_VOCAB = 256 + BYTE_OFFSET
WRONG = "the recipe is wrong"
DO = "see docs/training.md for the keys"
UNRECORDED = ("device",)  # another one may be chosen to go on with, as another number of threads


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: exactly one of `corpus`, `path` and `shards`.

    tokenizer  "bytes", or a tokenizer.json; None with `bpe`
    bpe        entries of a vocabulary that is learnt from the training text; 0: none
    eos        text of the token that ends a document; None: bytes have id 0, and a tokenizer.json
               one of the customary ones
    holdout    share of the text, at its end, that is not trained on
    """

    corpus: str | None = None
    path: str | None = None
    shards: str | None = None
    tokenizer: str | None = BYTES
    bpe: int = 0
    eos: str | None = None
    holdout: float = 0.05


@dataclass(frozen=True)
class TrainRecipe:
    """A recipe as parsed. `folder` is what its paths are relative to."""

    name: str
    family: Family
    model: Config
    data: DataConfig | PuzzleData
    train: TrainConfig
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """What decides the result of training, as plain values: checkpoints record it."""
        return {
            "name": self.name,
            "model": {"family": self.family.name, **self.model.published()},
            "data": _plain(asdict(self.data)),
            "train": _plain(asdict(self.train)),
        }


def read_recipe(path: Path) -> TrainRecipe:
    """Parse and check a recipe. Raises UsageError naming the file and every wrong key at once."""
    return parse_recipe(read_toml(path, "recipe", MAX_BYTES), path.parent, str(path))


def parse_recipe(table: dict[str, Any], folder: Path, where: str) -> TrainRecipe:
    """The same of a parsed table. Raises UsageError with everything that is wrong."""
    problems = Problems(where, UsageError)
    top = Fields(table, problems)
    if top.integer("format_version", high=1) != 1:
        problems.add("format_version must be 1")
    name = top.text("name")
    if not name or not name.isprintable() or "/" in name or name.startswith(".") or len(name) > 100:
        problems.add(f"name is {shown(name)}, not a name for a folder")
    model, data_table, train_table = (top.section(k) for k in ("model", "data", "train"))
    top.seen |= {"export", "sampling"}
    family_name = model.text("family")
    if family_name not in TRAINABLE:
        problems.add(f"model.family is {shown(family_name)}, known are: {', '.join(TRAINABLE)}")
    family = TRAINABLE.get(family_name or "") or next(iter(TRAINABLE.values()))
    data: DataConfig | PuzzleData
    train: TrainConfig
    if family.kind == "text":
        data, train = _data(data_table), read_train(train_table, TrainConfig)
    else:
        data = read_puzzle_data(data_table)
        train = read_puzzle_train(train_table, family.kind)
    for unknown in (*top.unknown(), *data_table.unknown(), *train_table.unknown()):
        problems.add(f"{named([unknown])} is not a key of a recipe")
    raw = {key: value for key, value in model.data.items() if key != "family"}
    if isinstance(data, PuzzleData):
        config = _grid_model(family, raw, data, problems)
    else:
        config = _text_model(family, raw, data, train, problems)
    return TrainRecipe(name or "", family, config, data, train, folder)


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A `to_json` of an older version: settings that it did not know are at their defaults."""
    model = recorded.get("model")
    family = TRAINABLE.get(str(model.get("family"))) if isinstance(model, dict) else None
    text = family is None or family.kind == "text"
    kinds = {
        "data": DataConfig if text else PuzzleData,
        "train": TrainConfig if text else PuzzleTrain,
    }
    out = dict(recorded)
    for name, kind in kinds.items():
        table = recorded.get(name)
        if isinstance(table, dict):
            defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            out[name] = _plain(defaults) | table
    return out


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    """What decides something, as JSON gives it back: lists, no tuples."""
    kept = {k: v for k, v in table.items() if k not in UNRECORDED}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two `to_json` differ, with both values: 'train.window: 96, now 128'."""
    a, b = dict(_flat(old)), dict(_flat(new))
    missing = object()
    return [
        f"{key}: {shown(a[key]) if key in a else 'absent'}, "
        f"now {shown(b[key]) if key in b else 'absent'}"
        for key in sorted({*a, *b})
        if a.get(key, missing) != b.get(key, missing)
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            found += _flat(inner, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", inner))
    return found


def _data(fields: Fields) -> DataConfig:
    problems = fields.problems
    sources = {key: fields.text(key) for key in ("corpus", "path", "shards")}
    given = [key for key in sources if key in fields]
    if len(given) != 1:
        problems.add(
            f"data: exactly one of corpus, path and shards must be given, "
            f"found {', '.join(given) or 'none'}"
        )
    if sources["corpus"] not in (None, "builtin"):
        problems.add(f"data.corpus is {shown(sources['corpus'])}, known is: builtin")
    bpe = fields.integer("bpe", 0, low=0, high=1 << 16)
    if 0 < bpe <= 256:
        problems.add(f"data.bpe is {bpe}: 256 bytes and an end token need at least 257")
    if "eos" in fields and (bpe or fields.data.get("tokenizer", BYTES) == BYTES):
        problems.add("data.eos belongs to a tokenizer.json")
    if bpe and "tokenizer" in fields:
        problems.add("data: give tokenizer or bpe, not both")
    if bpe and "shards" in fields:
        problems.add("data: bpe needs text, shards hold tokens: give their tokenizer")
    return DataConfig(
        **sources,
        bpe=bpe,
        tokenizer=fields.text("tokenizer", None if bpe else BYTES),
        eos=fields.text("eos"),
        holdout=fields.number("holdout", DataConfig.holdout, low=0.0, high=0.5),
    )


def _text_model(
    family: Family, raw: dict[str, Any], data: DataConfig, train: TrainConfig, problems: Problems
) -> Config:
    size = data.bpe or (BYTE_VOCAB if data.tokenizer == BYTES else None)
    if "vocab_size" not in raw:
        if size is None:
            problems.add("model.vocab_size is missing: the entries of the tokenizer")
        raw["vocab_size"] = size or 1
    config = _config(family, raw, problems)
    assert isinstance(config, TextConfig)
    if size is not None and config.vocab_size < size:
        problems.add(f"model.vocab_size {config.vocab_size}: the tokenizer has {size} entries")
    if config.vocab_size > 1 << 16:
        problems.add(
            f"model.vocab_size {config.vocab_size}: shards hold 16-bit tokens, 65,536 at most"
        )
    if train.window > config.context:
        problems.add(
            f"train.window {train.window} is longer than "
            f"model.transformer.max_seq_len {config.context}"
        )
    if train.depth == "random" and config.iterations == 1:
        problems.add("train.depth is 'random', but the model runs one iteration")
    if train.settle and config.iterations == 1:
        problems.add(f"train.settle is {train.settle:g}, but the model runs one iteration")
    problems.check(WRONG, do=DO)
    return config


def _grid_model(
    family: Family, raw: dict[str, Any], data: PuzzleData, problems: Problems
) -> Config:
    try:
        fill_in(raw, find(data.task), problems)
    except UsageError:  # which has been said
        raw.setdefault("seq_len", 1)
        raw.setdefault("vocab_size", 1)
    if family.kind == "segments":
        raw.setdefault("num_puzzle_identifiers", 1)
    config = _config(family, raw, problems)
    problems.check(WRONG, do=DO)
    return config


def _config(family: Family, raw: dict[str, Any], problems: Problems) -> Config:
    """The table `model`, read by its family; unknown keys are added to `problems`."""
    try:
        config, unknown = family.read_config(raw, problems, name="model", wrong=WRONG)
    except BadCheckpoint as error:  # tables that would not fit into memory
        raise UsageError(error.what, where=error.where, do=error.do) from error
    except UsageError as error:
        error.do = error.do or DO
        raise
    for key in unknown:
        problems.add(f"{named([key])} is not a key of a {family.name} model")
    return config
