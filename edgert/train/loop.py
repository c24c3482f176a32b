"""The training step, and everything that decides the next one.

Nothing is random but what the objective draws, from generators of its own or from counters. So two
trainers with equal `weights`, `tensors` and `state` take equal steps, bit for bit on one machine
with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgert.errors import Diverged
from edgert.models.importers.common import Problems, shown
from edgert.models.trainable import Model, fixed
from edgert.train.kinds import OBJECTIVES, OPTIMIZERS
from edgert.train.objective import Objective
from edgert.train.optim import Average, Optimizer, check_state
from edgert.train.optim_act import AdamATan2
from edgert.train.recipe import TrainRecipe
from edgert.train.schedule import Tension
from edgert.train.workers import Workers

RAW = "weights"  # of an averaged model: what training goes on with
CARRY = "carry"  # of an objective: what goes from step to step


@dataclass(frozen=True)
class Step:
    """What one update was made of. `loss` is the mean over micro-batches, before the update; with
    `settle`, the weighted drift included.

    number  counted from 1
    norm    global gradient norm before clipping
    """

    number: int
    loss: float
    lr: float
    norm: float


class Trainer:
    """A model in training. `step` is the number of updates made, and the next one's index.

    source  what the family's objective draws its batches from
    """

    def __init__(self, recipe: TrainRecipe, source: Any, workers: Workers) -> None:
        c = self.config = recipe.train
        self.recipe, self.workers = recipe, workers
        self.model: Model = recipe.family.build(recipe.model)
        self.model.initialize(torch.Generator().manual_seed(c.seed))  # the same on any device
        self.model.to(workers.device)
        make = OBJECTIVES[recipe.family.kind]
        self.objective: Objective = make(recipe, self.model, source, workers)
        self.optimizer: Optimizer | AdamATan2 = OPTIMIZERS[c.optimizer](self.model, c)
        self.fixed = fixed(self.model)
        self.average = Average(self.model, c.ema) if c.ema else None
        self.tension = (
            Tension(c.tension_beta, c.tension_lo, c.tension_hi) if c.schedule == "tension" else None
        )
        self.step = 0

    def advance(self) -> Step:
        """Make one update. Raises Diverged, the weights as they were, if loss or gradient is NaN
        or infinite."""
        c = self.config
        self.optimizer.clear()
        total = 0.0
        for i in range(c.grad_accum_steps):
            with self.workers.accumulating(self.objective.loss, i + 1 == c.grad_accum_steps):
                with self._autocast():
                    loss = self.objective.loss_of(self.step, i) / c.grad_accum_steps
                loss.backward()
            total += loss.item()
        (total,) = self.workers.mean([total])
        self._finite("loss", total)
        norm = self.optimizer.clip()
        self._finite("gradient norm", norm)
        lr = self.learning_rate(norm)
        self.optimizer.step(lr)
        self.objective.update(self.step)
        if self.average is not None:
            self.average.update()
        self.step += 1
        return Step(self.step, total, lr, norm)

    def learning_rate(self, norm: float) -> float:
        """Of the next update, whose gradient has this norm. Moves the tension's average."""
        base = self.objective.rate(self.step, self.config.learning_rate)
        return base if self.tension is None else base * self.tension(norm)

    def _autocast(self) -> Any:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.workers.device.type, torch.bfloat16)

    def _finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value}",
                do="lower learning_rate or raise warmup_steps in the recipe, and train anew",
            )

    def weights(self) -> dict[str, Tensor]:
        """Published name -> view of the weight to use: its average, if there is one."""
        names = self.optimizer.names if self.average is None else self.average.published()
        return {**names, **self.fixed}

    def tensors(self) -> dict[str, Tensor]:
        """What training needs beside `weights`, by '<kind>.<name>'. All processes call it."""
        found = self.optimizer.state() | self.objective.tensors()
        if self.average is not None:
            found |= {f"{RAW}.{name}": view for name, view in self.optimizer.names.items()}
        return found

    def state(self) -> dict[str, Any]:
        """Where training stands, as JSON."""
        return {
            "step": self.step,
            "updates": self.optimizer.updates,
            "tension": None if self.tension is None else self.tension.ema,
        } | self.objective.state()

    @torch.no_grad()
    def restore(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        where: str,
    ) -> None:
        """Take back what `weights`, `tensors` and `state` gave. Raises BadCheckpoint."""
        kinds: dict[str, dict[str, Tensor]] = {RAW: {}, CARRY: {}, "": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in kinds:
                kinds[kind][name] = tensor
            else:
                kinds[""][key] = tensor
        raw = kinds[RAW]
        problems = Problems(where)
        for key in ("step", "updates"):
            if type(state.get(key)) is not int or state[key] < 0:
                problems.add(f"{key} is {shown(state.get(key))}, not a number of steps")
        ema = state.get("tension")
        fits = type(ema) is float or (ema is None and state.get("step") == 0)
        if not (fits if self.tension is not None else ema is None):
            problems.add(f"tension is {shown(ema)}, the schedule is {self.config.schedule}")
        source = raw if self.average is not None else weights
        for kind, found, views in (
            ("weights", source, self.optimizer.names),
            ("average", weights, self.optimizer.names),
            ("weights", weights, self.fixed),
        ):
            for name, view in views.items():
                if name not in found:
                    problems.add(f"{kind}: {name} is missing")
                elif found[name].shape != view.shape:
                    problems.add(f"{kind}: {name} is {list(found[name].shape)}")
        if self.average is None and raw:
            problems.add("raw weights of an average, but the recipe has no ema")
        problems.check("the training state does not fit the recipe")
        check_state(tensors, where)
        for name, view in self.optimizer.names.items():
            view.copy_(source[name])
        for name, view in self.fixed.items():
            view.copy_(weights[name])
        if self.average is not None:
            for name, view in self.average.published().items():
                view.copy_(weights[name])
        self.optimizer.restore(state["updates"], kinds[""], where)
        self.objective.restore(kinds[CARRY], state, where)
        if self.tension is not None:
            self.tension.ema = ema
        self.step = state["step"]
