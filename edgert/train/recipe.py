"""What a recipe says about training: its tables `model`, `data` and `train`.

The same file may tell `edgert export` what to make of the trained model (`[export]`, `[sampling]`);
that is not read here.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgert.errors import BadCheckpoint, UsageError
from edgert.models.importers.common import Fields, Problems, named, shown
from edgert.models.trainable import TRAINABLE, Config, Family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20
BYTES = "bytes"
BYTE_OFFSET = 1  # id 0 ends a document
BYTE_VOCAB = 256 + BYTE_OFFSET
MAX_STEPS = 1 << 40
MAX_BATCH = 1 << 20
WRONG = "the recipe is wrong"
DO = "see docs/training.md for the keys"


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
class TrainConfig:
    """How weights are learnt. A step takes `grad_accum_steps` batches of `batch_size` windows.

    Defaults are the published ones (ShmidtS/HAGI @ 286a65d, prototype/training). Learning rates per
    step, `ema` per step (0: no average), intervals in steps (0: never).
    """

    steps: int
    window: int
    batch_size: int
    grad_accum_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    schedule: str = "cosine"
    tension_beta: float = 0.99
    tension_lo: float = 0.5
    tension_hi: float = 2.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    muon_momentum: float = 0.95
    muon_ns_steps: int = 5
    seed: int = 42
    depth: str = "full"
    settle: float = 0.0
    precision: str = "fp32"
    ema: float = 0.0
    ckpt_interval: int = 0
    keep: int = 2
    eval_interval: int = 0
    eval_tokens: int = 1 << 15
    log_interval: int = 1


CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "tension"),
    "depth": ("full", "random"),
    "precision": ("fp32", "bf16"),
}


@dataclass(frozen=True)
class TrainRecipe:
    """A recipe as parsed. `folder` is what its paths are relative to."""

    name: str
    family: Family
    model: Config
    data: DataConfig
    train: TrainConfig
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """What decides the result of training, as plain values: checkpoints record it."""
        return {
            "name": self.name,
            "model": {"family": self.family.name, **self.model.published()},
            "data": asdict(self.data),
            "train": asdict(self.train) | {"betas": list(self.train.betas)},
        }


def read_recipe(path: Path) -> TrainRecipe:
    """Parse and check a recipe. Raises UsageError naming the file and every wrong key at once."""
    return parse_recipe(_table(path), path.parent, str(path))


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
    data = _data(data_table)
    train = _train(train_table)
    family_name = model.text("family")
    if family_name not in TRAINABLE:
        problems.add(f"model.family is {shown(family_name)}, known are: {', '.join(TRAINABLE)}")
    for unknown in (*top.unknown(), *data_table.unknown(), *train_table.unknown()):
        problems.add(f"{named([unknown])} is not a key of a recipe")
    family = TRAINABLE.get(family_name or "") or next(iter(TRAINABLE.values()))
    config = _model(family, dict(model.data), data, train, problems)
    return TrainRecipe(name or "", family, config, data, train, folder)


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A `to_json` of an older version: settings that it did not know are at their defaults."""
    train = recorded.get("train")
    if not isinstance(train, dict):
        return recorded
    defaults = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
    return recorded | {"train": defaults | {"betas": list(TrainConfig.betas)} | train}


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


def _table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"the recipe is larger than {MAX_BYTES} bytes", where=str(path))
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise UsageError(f"the recipe is not TOML: {str(error)[:200]}", where=str(path)) from error


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


def _train(f: Fields) -> TrainConfig:
    def choice(key: str) -> str:
        value = f.text(key, CHOICES[key][0])
        if value is not None and value not in CHOICES[key]:
            f.problems.add(f"train.{key} is {shown(value)}, not one of {', '.join(CHOICES[key])}")
        return value or CHOICES[key][0]

    def count(key: str, high: int, low: int = 1) -> int:
        default = getattr(TrainConfig, key, None)
        if default is None:
            return f.integer(key, high=high, low=low)
        return f.integer(key, default, high=high, low=low)

    def number(key: str, low: float, high: float) -> float:
        return f.number(key, getattr(TrainConfig, key), low=low, high=high)

    train = TrainConfig(
        steps=count("steps", MAX_STEPS),
        window=count("window", 1 << 20, low=2),
        batch_size=count("batch_size", MAX_BATCH),
        grad_accum_steps=count("grad_accum_steps", MAX_BATCH),
        optimizer=choice("optimizer"),
        learning_rate=number("learning_rate", 0.0, 1e3),
        min_lr_ratio=number("min_lr_ratio", 0.0, 1.0),
        warmup_steps=count("warmup_steps", MAX_STEPS, low=0),
        schedule=choice("schedule"),
        tension_beta=number("tension_beta", 0.0, 1.0),
        tension_lo=number("tension_lo", 0.0, 1e3),
        tension_hi=number("tension_hi", 0.0, 1e3),
        weight_decay=number("weight_decay", 0.0, 1e3),
        betas=_betas(f),
        eps=number("eps", 1e-30, 1.0),
        grad_clip=number("grad_clip", 0.0, 1e9),
        muon_momentum=number("muon_momentum", 0.0, 1.0),
        muon_ns_steps=count("muon_ns_steps", 100),
        seed=count("seed", 1 << 62, low=0),
        depth=choice("depth"),
        settle=number("settle", 0.0, 1e3),
        precision=choice("precision"),
        ema=number("ema", 0.0, 0.999999),
        ckpt_interval=count("ckpt_interval", MAX_STEPS, low=0),
        keep=count("keep", 1 << 20, low=0),
        eval_interval=count("eval_interval", MAX_STEPS, low=0),
        eval_tokens=count("eval_tokens", MAX_STEPS, low=2),
        log_interval=count("log_interval", MAX_STEPS),
    )
    if train.warmup_steps >= train.steps and "steps" in f:
        f.problems.add(
            f"train.warmup_steps {train.warmup_steps} is not below train.steps {train.steps}"
        )
    if train.tension_lo > train.tension_hi:
        f.problems.add(
            f"train.tension_lo {train.tension_lo:g} is above tension_hi {train.tension_hi:g}"
        )
    for key in ("tension_beta", "tension_lo", "tension_hi"):
        if key in f and train.schedule != "tension":
            f.problems.add(f"train.{key} belongs to schedule = 'tension'")
    for key in ("muon_momentum", "muon_ns_steps"):
        if key in f and train.optimizer != "muon":
            f.problems.add(f"train.{key} belongs to optimizer = 'muon'")
    return train


def _betas(f: Fields) -> tuple[float, float]:
    f.seen.add("betas")
    value = f.data.get("betas", list(TrainConfig.betas))
    sound = (
        isinstance(value, list)
        and len(value) == 2
        and all(type(b) in (int, float) and 0 <= b < 1 for b in value)
    )
    if not sound:
        f.problems.add(f"train.betas is {shown(value)}, not two numbers from 0 to below 1")
        return TrainConfig.betas
    return float(value[0]), float(value[1])


def _model(
    family: Family, raw: dict[str, Any], data: DataConfig, train: TrainConfig, problems: Problems
) -> Config:
    raw.pop("family", None)
    size = data.bpe or (BYTE_VOCAB if data.tokenizer == BYTES else None)
    if "vocab_size" not in raw:
        if size is None:
            problems.add("model.vocab_size is missing: the entries of the tokenizer")
        raw["vocab_size"] = size or 1
    try:
        config, unknown = family.read_config(raw, problems, name="model", wrong=WRONG)
    except BadCheckpoint as error:  # a context whose tables would not fit into memory
        raise UsageError(error.what, where=error.where, do=error.do) from error
    except UsageError as error:
        error.do = error.do or DO
        raise
    for key in unknown:
        problems.add(f"{named([key])} is not a key of a {family.name} model")
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
