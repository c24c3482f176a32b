"""Grids: puzzles with their answers, learnt in segments or in cycles.

Where randomness is needed it comes from a generator that the seed and the number of the micro-batch
decide, so that there is no state of it to keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgert.errors import BadCheckpoint
from edgert.models.importers.common import Problems, shown
from edgert.models.trainable import CycleModel, GridModel, Model, SegmentModel
from edgert.train import act
from edgert.train.act import Carry, Grids
from edgert.train.bidir_loss import halting_loss, published_loss
from edgert.train.deal import Dealer
from edgert.train.device import generators
from edgert.train.optim_act import learning_rate, sign_sgd
from edgert.train.puzzle_recipe import PuzzleTrain
from edgert.train.recipe import TrainRecipe
from edgert.train.workers import Workers

GRIDS = ("inputs", "labels")  # of a carry, kept as tensors
COUNTS = ("steps", "halted", "identifiers")  # kept as JSON


class _Grids:
    """What both kinds share: implements most of `objective.Objective`."""

    unit = "puzzles"

    def __init__(self, recipe: TrainRecipe, model: GridModel, dealer: Dealer, workers: Workers):
        assert isinstance(recipe.train, PuzzleTrain)
        c = self.config = recipe.train
        self.model, self.dealer, self.workers = model, dealer, workers
        self.rows, self.device = workers.rows(c.batch_size), workers.device

    @property
    def per_step(self) -> int:
        return self.config.batch_size * self.config.grad_accum_steps

    def rate(self, step: int, peak: float) -> float:
        c = self.config
        return learning_rate(
            step + 1, base=peak, warmup=c.warmup_steps, total=c.steps, floor=c.min_lr_ratio
        )

    def generator(self) -> torch.Generator:
        """Of this micro-batch, the same in all processes: the batch that it belongs to decides."""
        seed = np.random.SeedSequence((self.config.seed, self.dealer.dealt))
        return torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def state(self) -> dict[str, Any]:
        return {"sampler": self.dealer.state}

    def _restore_dealer(self, state: Mapping[str, Any], where: str) -> None:
        try:
            self.dealer.restore(state.get("sampler"))
        except BadCheckpoint as error:
            error.where = where
            raise


class _Segments(nn.Module):
    """One segment of a micro-batch as a module's forward; its carry and outcome stay here."""

    def __init__(self, model: SegmentModel, config: PuzzleTrain) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.carries: list[Carry] = []
        self.outcomes: list[act.Outcome] = []

    def forward(self, micro: int, offered: Grids, least: Tensor) -> Tensor:
        carry, outcome = act.advance(
            self.model,
            self.carries[micro],
            offered,
            least,
            one_step=self.config.gradient == "one-step",
            lookahead=self.config.lookahead,
        )
        self.carries[micro] = carry
        self.outcomes.append(outcome)
        found = act.losses(outcome, carry.grids.labels, self.model.config.loss_type)
        return found.total / len(carry.steps)


class SegmentObjective(_Grids):
    """A step is one segment of all slots; a slot takes a new puzzle when it has halted."""

    def __init__(self, recipe: TrainRecipe, model: Model, dealer: Dealer, workers: Workers) -> None:
        assert isinstance(model, SegmentModel)
        super().__init__(recipe, model, dealer, workers)
        self.network = model
        self._pin()
        self.segments = _Segments(model, self.config)
        c = self.config
        nothing = torch.zeros(c.batch_size, model.config.seq_len, dtype=torch.int32)[self.rows]
        empty = act.first_carry(model, Grids(nothing, nothing, nothing[:, 0]).to(self.device))
        self.segments.carries = [empty] * c.grad_accum_steps
        self.loss = workers.wrap(self.segments)

    def loss_of(self, step: int, micro: int) -> Tensor:
        if micro == 0:
            self.segments.outcomes.clear()
        generator = self.generator()
        least = act.explored(self.network.config, self.config.batch_size, generator)
        halted = self.segments.carries[micro].halted
        offered = self.dealer.deal(step, self.rows, halted).to(self.device)
        loss: Tensor = self.loss(micro, offered, least[self.rows].to(self.device))
        return loss

    @torch.no_grad()
    def _pin(self) -> None:
        """Without lookahead the score of continuing is a constant, whatever decay does to it, and
        wherever training began."""
        if not self.config.lookahead:
            share = self.config.halt_above
            self.network.q_head[:, 1] = 0.0
            self.network.q_bias[1] = math.log(share / (1 - share))

    def update(self, step: int) -> None:
        """The rows of the puzzle table that this step has used."""
        self._pin()
        table, c = self.network.puzzle_table, self.config
        if table is None:
            return
        rows, identifiers = [], []
        for carry, outcome in zip(self.segments.carries, self.segments.outcomes, strict=True):
            assert outcome.rows is not None
            assert outcome.rows.grad is not None
            rows.append(self.workers.gather(outcome.rows.grad))
            identifiers.append(self.workers.gather(carry.grids.identifiers))
        lr = self.rate(step, c.puzzle_emb_lr)
        sign_sgd(table, torch.cat(identifiers), torch.cat(rows), lr, c.puzzle_emb_weight_decay)

    def figures(self) -> dict[str, float | None]:
        """Of this process's slots that halted in the last step: how many, how right, how late."""
        sums: dict[str, float] = {}
        for carry, outcome in zip(self.segments.carries, self.segments.outcomes, strict=True):
            for key, value in act.metrics(outcome, carry).items():
                sums[key] = sums.get(key, 0.0) + value
        count = sums["count"]
        shares = {
            "train_cells": "accuracy",
            "train_exact": "exact_accuracy",
            "train_steps": "steps",
        }
        found = {name: sums[key] / count if count else None for name, key in shares.items()}
        return {"halted": count, **found}

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, carry in enumerate(self.segments.carries):
            for name in ("z_h", "z_l"):
                found[f"carry.{i}.{name}"] = self.workers.gather(getattr(carry, name))
            for name in GRIDS:
                found[f"carry.{i}.{name}"] = self.workers.gather(getattr(carry.grids, name)).float()
        return found

    def state(self) -> dict[str, Any]:
        """All processes call it: they tell each other of their slots."""
        counts = [
            {name: self.workers.gather(value.int()).tolist() for name, value in told.items()}
            for told in map(_counts, self.segments.carries)
        ]
        return super().state() | {"carry": counts}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], where: str) -> None:
        told = state.get("carry")
        problems = Problems(where)
        if not isinstance(told, list) or len(told) != len(self.segments.carries):
            problems.add(f"carry is {shown(told)}, the recipe has {len(self.segments.carries)}")
            told = []
        carries = [self._carry(i, counts, tensors, problems) for i, counts in enumerate(told)]
        problems.check("the batch that is carried on does not fit the recipe")
        self.segments.carries = [carry for carry in carries if carry is not None]
        self._restore_dealer(state, where)

    def _carry(
        self, number: int, counts: Any, tensors: Mapping[str, Tensor], problems: Problems
    ) -> Carry | None:
        """One carry, read back; None if it is not one, which is added to `problems`."""
        c, batch = self.network.config, self.config.batch_size
        state, cells = (batch, c.positions, c.hidden_size), (batch, c.seq_len)
        shapes = {"z_h": state, "z_l": state, **dict.fromkeys(GRIDS, cells)}
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            tensor = tensors.get(f"{number}.{name}")
            if tensor is None or tuple(tensor.shape) != shape:
                got = "missing" if tensor is None else str(list(tensor.shape))
                problems.add(f"carry.{number}.{name} is {got}, not {list(shape)}")
            else:
                found[name] = tensor[self.rows].to(self.device, copy=True)
        limits = {
            "steps": (0, c.halt_max_steps),
            "halted": (0, 1),
            "identifiers": (0, c.num_puzzle_identifiers - 1),
        }
        for name, (low, high) in limits.items():
            values = counts.get(name) if isinstance(counts, dict) else None
            sound = (
                isinstance(values, list)
                and len(values) == batch
                and all(type(value) is int and low <= value <= high for value in values)
            )
            if not sound:
                problems.add(
                    f"carry.{number}.{name} is {shown(values)}, not {batch} fitting numbers"
                )
                continue
            found[name] = torch.tensor(values, dtype=torch.int32, device=self.device)[self.rows]
        for name, low in (("inputs", 0), ("labels", act.IGNORED)):
            if name in found and not _tokens(found[name], low, c.vocab_size):
                problems.add(f"carry.{number}.{name} holds other values than tokens")
        if len(found) < len(shapes) + len(limits):
            return None
        grids = Grids(found["inputs"].int(), found["labels"].int(), found["identifiers"])
        return Carry(found["z_h"], found["z_l"], found["steps"], found["halted"].bool(), grids)


def _counts(carry: Carry) -> dict[str, Tensor]:
    return {
        "steps": carry.steps,
        "halted": carry.halted,
        "identifiers": carry.grids.identifiers,
    }


def _tokens(values: Tensor, low: int, vocab: int) -> bool:
    """Whether these are whole numbers below `vocab`, and not below `low`."""
    return bool(((values == values.round()) & (values >= low) & (values < vocab)).all())


class _Cycles(nn.Module):
    """All cycles of a micro-batch as a module's forward."""

    def __init__(self, model: CycleModel, loss: str) -> None:
        super().__init__()
        self.model, self.rule = model, loss

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.rule == "published":  # where the batch stops as one, in training, too
            return published_loss(self.model.until_mean(inputs), labels)
        return halting_loss(list(self.model.unroll(inputs)), labels)


class CycleObjective(_Grids):
    """A step is all cycles of a batch of puzzles."""

    def __init__(self, recipe: TrainRecipe, model: Model, dealer: Dealer, workers: Workers) -> None:
        assert isinstance(model, CycleModel)
        super().__init__(recipe, model, dealer, workers)
        self.dropout = model.config.dropout > 0
        self.loss = workers.wrap(_Cycles(model, self.config.cycle_loss))

    def loss_of(self, step: int, micro: int) -> Tensor:
        generator = self.generator()
        offered = self.dealer.deal(step, self.rows).to(self.device)
        if not self.dropout:
            loss: Tensor = self.loss(offered.inputs, offered.labels)
            return loss
        with torch.random.fork_rng(generators(self.device)):  # dropout has none of its own
            torch.manual_seed(generator.initial_seed() ^ self.workers.rank)
            loss = self.loss(offered.inputs, offered.labels)
        return loss

    def update(self, step: int) -> None:
        """Nothing: all weights are the optimizer's."""

    def figures(self) -> dict[str, float | None]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], where: str) -> None:
        if tensors:
            raise BadCheckpoint("a batch that is carried on belongs to segments", where=where)
        self._restore_dealer(state, where)
