"""The training step, and everything that decides the next one.

Nothing else is random: the sampler and the depth have generators of their own, and the model none.
So two trainers with equal `snapshot`s take equal steps, bit for bit on one machine with one number
of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgert.errors import BadCheckpoint, Diverged
from edgert.models.importers.common import Problems, shown
from edgert.models.trainable import Model
from edgert.train.data import Sampler, rng_state, set_rng_state
from edgert.train.optim import Average, Optimizer, check_state
from edgert.train.recipe import TrainRecipe
from edgert.train.schedule import Tension, cosine
from edgert.train.workers import Workers

SETTLE_FROM = 0.3  # of all steps
RAW = "weights"  # of an averaged model: what training goes on with


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
    """A model in training. `step` is the number of updates made, and the next one's index."""

    def __init__(self, recipe: TrainRecipe, sampler: Sampler, workers: Workers) -> None:
        c = self.config = recipe.train
        self.recipe, self.sampler, self.workers = recipe, sampler, workers
        self.model: Model = recipe.family.build(recipe.model)
        self.model.initialize(torch.Generator().manual_seed(c.seed))
        self.rows = workers.rows(c.batch_size)
        self.loss = workers.wrap(self.model)
        self.optimizer = Optimizer(self.model, c)
        self.average = Average(self.model, c.ema) if c.ema else None
        self.tension = (
            Tension(c.tension_beta, c.tension_lo, c.tension_hi) if c.schedule == "tension" else None
        )
        self.depth_rng = np.random.default_rng((c.seed, 1))
        self.step = 0

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.window * self.config.grad_accum_steps

    def advance(self) -> Step:
        """Make one update. Raises Diverged, the weights as they were, if loss or gradient is NaN
        or infinite."""
        c = self.config
        self.optimizer.clear()
        total = 0.0
        for i in range(c.grad_accum_steps):
            x, y = self.sampler.batch(c.batch_size)
            ids, targets = torch.from_numpy(x[self.rows]), torch.from_numpy(y[self.rows])
            depth, settle = self._depth(), self._settle()
            with self.workers.accumulating(self.loss, i + 1 == c.grad_accum_steps):
                with self._autocast():
                    loss = self.loss(ids, targets, depth, settle) / c.grad_accum_steps
                loss.backward()
            total += loss.item()
        (total,) = self.workers.mean([total])
        self._finite("loss", total)
        norm = self.optimizer.clip()
        self._finite("gradient norm", norm)
        lr = self.learning_rate(norm)
        self.optimizer.step(lr)
        if self.average is not None:
            self.average.update()
        self.step += 1
        return Step(self.step, total, lr, norm)

    def learning_rate(self, norm: float) -> float:
        """Of the next update, whose gradient has this norm. Moves the tension's average."""
        c = self.config
        base = cosine(
            self.step,
            peak=c.learning_rate,
            floor=c.min_lr_ratio * c.learning_rate,
            warmup=c.warmup_steps,
            steps=c.steps,
        )
        return base if self.tension is None else base * self.tension(norm)

    def _depth(self) -> int:
        most = self.recipe.model.iterations
        return int(self.depth_rng.integers(1, most + 1)) if self.config.depth == "random" else most

    def _settle(self) -> float:
        """Weight of the drift: it comes when the loop has learnt something that it may keep."""
        done = self.step / max(1, self.config.steps)
        return self.config.settle * max(0.0, (done - SETTLE_FROM) / (1 - SETTLE_FROM))

    def _autocast(self) -> Any:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def _finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value}",
                do="lower learning_rate or raise warmup_steps in the recipe, and train anew",
            )

    def weights(self) -> dict[str, Tensor]:
        """Published name -> view of the weight to use: its average, if there is one."""
        return self.optimizer.names if self.average is None else self.average.published()

    def tensors(self) -> dict[str, Tensor]:
        """What training needs beside `weights`, by '<kind>.<published name>'."""
        found = self.optimizer.state()
        if self.average is not None:
            found |= {f"{RAW}.{name}": view for name, view in self.optimizer.names.items()}
        return found

    def state(self) -> dict[str, Any]:
        """Where training stands, as JSON."""
        return {
            "step": self.step,
            "updates": self.optimizer.updates,
            "sampler": self.sampler.state,
            "depth": rng_state(self.depth_rng),
            "tension": None if self.tension is None else self.tension.ema,
        }

    @torch.no_grad()
    def restore(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        where: str,
    ) -> None:
        """Take back what `weights`, `tensors` and `state` gave. Raises BadCheckpoint."""
        raw = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{RAW}.")}
        rest = {k: v for k, v in tensors.items() if not k.startswith(f"{RAW}.")}
        problems = Problems(where)
        for key in ("step", "updates"):
            if type(state.get(key)) is not int or state[key] < 0:
                problems.add(f"{key} is {shown(state.get(key))}, not a number of steps")
        ema = state.get("tension")
        fits = type(ema) is float or (ema is None and state.get("step") == 0)
        if not (fits if self.tension is not None else ema is None):
            problems.add(f"tension is {shown(ema)}, the schedule is {self.config.schedule}")
        source = raw if self.average is not None else weights
        for kind, found in (("weights", source), ("average", weights)):
            for name, view in self.optimizer.names.items():
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
        if self.average is not None:
            for name, view in self.average.published().items():
                view.copy_(weights[name])
        self.optimizer.restore(state["updates"], rest, where)
        try:
            self.sampler.restore(state.get("sampler"))
            set_rng_state(self.depth_rng, state.get("depth"), "depth")
        except BadCheckpoint as error:
            error.where = where
            raise
        if self.tension is not None:
            self.tension.ema = ema
        self.step = state["step"]
