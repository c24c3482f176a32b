"""Text: windows of tokens, and the next-token loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgert.errors import BadCheckpoint
from edgert.models.trainable import Model, TextConfig, TextModel
from edgert.train import heldout, prepare
from edgert.train.data import Sampler, rng_state, set_rng_state
from edgert.train.heldout import Bigram, HeldOut
from edgert.train.recipe import TrainRecipe
from edgert.train.schedule import cosine
from edgert.train.workers import Workers

SETTLE_FROM = 0.3  # of all steps


class _Loss(nn.Module):
    """The loss as a module's forward: what DistributedDataParallel wraps."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, iterations: int, settle: float) -> Tensor:
        return self.model.loss(ids, targets, iterations, settle)


class TextObjective:
    """Implements `objective.Objective`. The sampler and the depth have generators of their own."""

    unit = "tokens"

    def __init__(
        self, recipe: TrainRecipe, model: Model, sampler: Sampler, workers: Workers
    ) -> None:
        assert isinstance(model, TextModel)
        assert isinstance(recipe.model, TextConfig)
        c = self.config = recipe.train
        self.iterations = recipe.model.iterations
        self.sampler = sampler
        self.rows, self.device = workers.rows(c.batch_size), workers.device
        self.loss = workers.wrap(_Loss(model))
        self.depth_rng = np.random.default_rng((c.seed, 1))

    @property
    def per_step(self) -> int:
        return self.config.batch_size * self.config.window * self.config.grad_accum_steps

    def loss_of(self, step: int, micro: int) -> Tensor:
        x, y = self.sampler.batch(self.config.batch_size)
        ids, targets = (torch.from_numpy(a[self.rows]).to(self.device) for a in (x, y))
        loss: Tensor = self.loss(ids, targets, self._depth(), self._settle(step))
        return loss

    def rate(self, step: int, peak: float) -> float:
        c = self.config
        return cosine(
            step, peak=peak, floor=c.min_lr_ratio * peak, warmup=c.warmup_steps, steps=c.steps
        )

    def update(self, step: int) -> None:
        """Nothing: all weights are the optimizer's."""

    def figures(self) -> dict[str, float | None]:
        return {}

    def _depth(self) -> int:
        most = self.iterations
        return int(self.depth_rng.integers(1, most + 1)) if self.config.depth == "random" else most

    def _settle(self, step: int) -> float:
        """Weight of the drift: it comes when the loop has learnt something that it may keep."""
        done = step / max(1, self.config.steps)
        return self.config.settle * max(0.0, (done - SETTLE_FROM) / (1 - SETTLE_FROM))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state, "depth": rng_state(self.depth_rng)}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], where: str) -> None:
        if tensors:
            raise BadCheckpoint("a batch that is carried on belongs to puzzles", where=where)
        try:
            self.sampler.restore(state.get("sampler"))
            set_rng_state(self.depth_rng, state.get("depth"), "depth")
        except BadCheckpoint as error:
            error.where = where
            raise


class TextMaterial:
    """Implements `objective.Material`: shards, tokenizer, held-out text."""

    per = "nats a token"

    def __init__(self, recipe: TrainRecipe, run: Path) -> None:
        self.recipe, self.run = recipe, run
        self.data = prepare.open_data(recipe, run)
        window = recipe.train.window
        self.evaluation = {"window": window, "stride": max(1, window // 2)}
        self.record = {key: self.data.record[key] for key in ("corpus", "shards", "heldout")}

    def source(self) -> Sampler:
        c = self.recipe.train
        return Sampler(self.data.shards, c.window, c.seed, str(self.run))

    def identity(self) -> dict[str, Any]:
        d = self.data
        return {"byte_offset": d.byte_offset, "tokenizer_json": d.tokenizer_json, "eos": d.eos}

    @property
    def held_out(self) -> str:
        return f"{len(self.data.heldout):,} tokens"

    def evaluate(self, model: TextModel, whole: bool) -> HeldOut | None:
        ids, vocab = self.data.heldout, self.recipe.model.vocab_size
        if len(ids) < 2:
            return None
        bigram = None
        if not whole:
            ids = ids[: self.recipe.train.eval_tokens]
        elif vocab <= heldout.MAX_BIGRAM_VOCAB:
            bigram = Bigram(self.data.shards, vocab)
        window, stride = self.evaluation.values()
        costs = heldout.score(model, ids, window, stride)
        felt = heldout.sensitivity(model, ids, window)
        return heldout.summary(costs, ids, self.data.lengths, bigram, felt, (window, stride))

    def baseline(self, found: HeldOut) -> float | None:
        """The bigram's bits per byte as nats a token."""
        if found.bigram is None or found.bits_per_byte is None:
            return None
        return found.bigram / found.bits_per_byte * found.loss
