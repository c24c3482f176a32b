"""The table `train` of a recipe: what decides how weights are learnt, whatever from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from edgert.models.importers.common import Fields, shown

MAX_STEPS = 1 << 40
MAX_BATCH = 1 << 20


@dataclass(frozen=True)
class TrainConfig:
    """How weights are learnt. A step takes `grad_accum_steps` batches of `batch_size` windows.

    Defaults are the published ones (ShmidtS/HAGI @ 286a65d, prototype/training). Learning rates per
    step, `ema` per step (0: no average), intervals in steps (0: never).

    device  "auto": CUDA where there is some
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
    device: str = "cpu"
    precision: str = "fp32"
    ema: float = 0.0
    ckpt_interval: int = 0
    keep: int = 2
    eval_interval: int = 0
    eval_tokens: int = 1 << 15
    log_interval: int = 1

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "optimizer": ("adamw", "muon"),
        "schedule": ("cosine", "tension"),
        "depth": ("full", "random"),
        "device": ("auto", "cpu", "cuda"),
        "precision": ("fp32", "bf16"),
    }


_REQUIRED = ("steps", "window", "batch_size")
_COUNTS = {
    "steps": (1, MAX_STEPS),
    "window": (2, 1 << 20),
    "batch_size": (1, MAX_BATCH),
    "grad_accum_steps": (1, MAX_BATCH),
    "warmup_steps": (0, MAX_STEPS),
    "muon_ns_steps": (1, 100),
    "seed": (0, 1 << 62),
    "ckpt_interval": (0, MAX_STEPS),
    "keep": (0, 1 << 20),
    "eval_interval": (0, MAX_STEPS),
    "eval_tokens": (2, MAX_STEPS),
    "eval_puzzles": (1, MAX_STEPS),
    "log_interval": (1, MAX_STEPS),
}
_NUMBERS = {
    "learning_rate": (0.0, 1e3),
    "min_lr_ratio": (0.0, 1.0),
    "tension_beta": (0.0, 1.0),
    "tension_lo": (0.0, 1e3),
    "tension_hi": (0.0, 1e3),
    "weight_decay": (0.0, 1e3),
    "eps": (1e-30, 1.0),
    "grad_clip": (0.0, 1e9),
    "muon_momentum": (0.0, 1.0),
    "settle": (0.0, 1e3),
    "ema": (0.0, 0.999999),
    "halt_above": (1e-6, 1 - 1e-6),
    "puzzle_emb_lr": (0.0, 1e3),
    "puzzle_emb_weight_decay": (0.0, 1e3),
}
_FLAGS = ("lookahead",)

C = TypeVar("C", bound=TrainConfig)


def read_train(f: Fields, kind: type[C], skip: Collection[str] = ()) -> C:
    """The keys of `kind`, all but those of `skip`; what is wrong goes to the problems of `f`."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        name = field.name
        default: Any = field.default
        if name in skip:
            continue
        if name in _COUNTS:
            low, high = _COUNTS[name]
            wanted: dict[str, Any] = {} if name in _REQUIRED else {"default": default}
            found[name] = f.integer(name, low=low, high=high, **wanted)
        elif name in _NUMBERS:
            least, most = _NUMBERS[name]
            found[name] = f.number(name, default, low=least, high=most)
        elif name in _FLAGS:
            found[name] = f.flag(name, default)
        elif name == "betas":
            found[name] = _betas(f)
        else:
            found[name] = _choice(f, name, str(default), kind.CHOICES[name])
    train = kind(**found)
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


def _choice(f: Fields, key: str, default: str, known: tuple[str, ...]) -> str:
    value = f.text(key, default)
    if value is not None and value not in known:
        f.problems.add(f"train.{key} is {shown(value)}, not one of {', '.join(known)}")
    return value or default


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
