"""Training grids in segments: adaptive computation time with a carry that outlives a batch.

A slot of the batch keeps its puzzle until it is halted, and takes its row of the batch offered next
only then. Every segment has a loss; what the state was before is not differentiated.

Source  sapientinc/HRM @ 42410da, models/hrm/hrm_act_v1.py and models/losses.py; arXiv 2506.21734
Shapes  B slots, S cells, V vocabulary, N positions, d hidden, p puzzle embedding
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a cell that has no part in loss and accuracy."""

Q_WEIGHT = 0.5  # of the two halting losses beside the cells'


class Limits(Protocol):
    """What of a model's config decides about halting."""

    @property
    def halt_max_steps(self) -> int: ...

    @property
    def halt_exploration_prob(self) -> float: ...

    @property
    def loss_type(self) -> Any: ...


class Segment(Protocol):
    @property
    def z_h(self) -> Tensor: ...

    @property
    def z_l(self) -> Tensor: ...

    @property
    def logits(self) -> Tensor: ...

    @property
    def q(self) -> Tensor: ...


class Segmented(Protocol):
    """A model that works in segments. `puzzle_table` [puzzles, p] is trained by other rules than
    the parameters, and is no parameter."""

    puzzle_table: Tensor | None

    @property
    def config(self) -> Limits: ...

    def embed(self, ids: Tensor, puzzle_vec: Tensor | None) -> Tensor: ...

    def initial(self, batch: int) -> tuple[Tensor, Tensor]: ...

    def reset(self, reset: Tensor, z_h: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor]: ...

    def puzzle_rows(self, identifiers: Tensor) -> Tensor | None: ...

    def segment(
        self, z_h: Tensor, z_l: Tensor, e: Tensor, *, one_step_gradient: bool
    ) -> Segment: ...


@dataclass(frozen=True)
class Grids:
    """One batch: inputs and labels int [B, S], puzzle identifiers int [B]."""

    inputs: Tensor
    labels: Tensor
    identifiers: Tensor

    def to(self, device: torch.device) -> Grids:
        return Grids(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Carry:
    """What goes from segment to segment: state [B, N, d], segments done int32 [B], halted bool
    [B], and the puzzles of the slots."""

    z_h: Tensor
    z_l: Tensor
    steps: Tensor
    halted: Tensor
    grids: Grids


@dataclass(frozen=True)
class Outcome:
    """One segment of all slots: logits [B, S, V], scores of halting and of continuing [B].

    target  what q_continue should be, in 0 to 1 [B]; None where it is not trained
    rows    the rows of the puzzle table that were used [B, p], leaves whose gradient comes with
            that of the loss; None in evaluation, and without a table
    """

    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor
    target: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Sums over slots. `total` is what to differentiate, divided by the global batch size."""

    cells: Tensor  # each slot's mean over its cells
    q_halt: Tensor
    q_continue: Tensor | None

    @property
    def total(self) -> Tensor:
        q = self.q_halt if self.q_continue is None else self.q_halt + self.q_continue
        return self.cells + Q_WEIGHT * q


def first_carry(model: Segmented, grids: Grids) -> Carry:
    """A carry all of whose slots are halted: they take what is offered first."""
    batch = len(grids.inputs)
    z_h, z_l = model.initial(batch)
    steps = torch.zeros(batch, dtype=torch.int32, device=z_h.device)
    return Carry(z_h, z_l, steps, torch.ones_like(steps, dtype=torch.bool), grids)


def refill(model: Segmented, carry: Carry, offered: Grids) -> Carry:
    """Halted slots start anew with their row of the batch offered; the others go on."""
    z_h, z_l = model.reset(carry.halted, carry.z_h, carry.z_l)

    def chosen(name: str) -> Tensor:
        new, old = getattr(offered, name), getattr(carry.grids, name)
        rows = carry.halted.reshape([-1] + [1] * (new.ndim - 1))
        return torch.where(rows, new, old)

    grids = Grids(*(chosen(field.name) for field in fields(Grids)))
    return Carry(z_h, z_l, torch.where(carry.halted, 0, carry.steps), carry.halted, grids)


@torch.no_grad()
def evaluate(model: Segmented, carry: Carry, offered: Grids) -> tuple[Carry, Outcome]:
    """One segment as the published evaluation runs it: every slot halts behind T of them."""
    carry = refill(model, carry, offered)
    e = model.embed(carry.grids.inputs, model.puzzle_rows(carry.grids.identifiers))
    found = model.segment(carry.z_h, carry.z_l, e, one_step_gradient=False)
    steps = carry.steps + 1
    halted = steps >= model.config.halt_max_steps
    after = Carry(found.z_h, found.z_l, steps, halted, carry.grids)
    return after, Outcome(found.logits, found.q[:, 0], found.q[:, 1])


def train(
    model: Segmented, carry: Carry, offered: Grids, generator: torch.Generator
) -> tuple[Carry, Outcome]:
    """One segment with gradients, as published.

    generator  of the exploration: see `explored`
    """
    return advance(model, carry, offered, explored(model.config, len(carry.steps), generator))


def advance(
    model: Segmented,
    carry: Carry,
    offered: Grids,
    least: Tensor,
    *,
    one_step: bool = True,
    lookahead: bool = True,
) -> tuple[Carry, Outcome]:
    """One segment with gradients. A slot halts behind T segments, or as soon as its score of
    halting is the higher one, but not before `least` [B] segments.

    one_step   the last two updates are differentiated, not all of the segment
    lookahead  one further segment says what the score of continuing should be; without it there is
               no such target, and that score learns nothing
    """
    carry = refill(model, carry, offered)
    most = model.config.halt_max_steps
    rows = model.puzzle_rows(carry.grids.identifiers)
    if rows is not None:
        rows = rows.detach().clone().requires_grad_(True)
    e = model.embed(carry.grids.inputs, rows)
    found = model.segment(carry.z_h, carry.z_l, e, one_step_gradient=one_step)
    z_h, z_l = found.z_h.detach(), found.z_l.detach()
    steps = carry.steps + 1
    last = halted = steps >= most
    target = None
    if most > 1:
        with torch.no_grad():
            halted = last | (found.q[:, 0] > found.q[:, 1])
            halted = halted & (steps >= least)
            if lookahead:
                ahead = model.segment(z_h, z_l, e.detach(), one_step_gradient=False).q
                target = torch.where(last, ahead[:, 0], ahead.max(-1).values).sigmoid()
    after = Carry(z_h, z_l, steps, halted, carry.grids)
    return after, Outcome(found.logits, found.q[:, 0], found.q[:, 1], target, rows)


def explored(limits: Limits, batch: int, generator: torch.Generator) -> Tensor:
    """The segments [B] below which a slot does not halt; 0 where nothing is explored.

    With probability `halt_exploration_prob`, a slot goes on to a number of segments from 2 to T at
    least. It is drawn anew in each segment.
    """
    if limits.halt_max_steps == 1:
        return torch.zeros(batch, dtype=torch.int64)
    held = torch.rand(batch, generator=generator) < limits.halt_exploration_prob
    least = torch.randint(2, limits.halt_max_steps + 1, (batch,), generator=generator)
    return torch.where(held, least, 0)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(s(x_label) / sum of s) in float64: [..., V], int [...] -> [...]; ignored cells cost 0.

    s(x) = x + 1 from 0 on, 1 / (1 - x) below. Source: arXiv 2501.04697.
    """
    x = logits.double()
    # Clamped, or the branch that is not taken had an infinite gradient at x = 1.
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    known, index = _labelled(labels)
    log_p = (s / s.sum(-1, keepdim=True)).log().gather(-1, index[..., None]).squeeze(-1)
    return torch.where(known, -log_p, 0)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual one in float32: [..., V], int [...] -> [...]; ignored cells cost 0."""
    flat = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.long().flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.reshape(labels.shape)


CELL_LOSSES = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}


def losses(outcome: Outcome, labels: Tensor, loss_type: str) -> Losses:
    """The losses of one segment. `loss_type` is one of `CELL_LOSSES`."""
    per_cell = CELL_LOSSES[loss_type](outcome.logits, labels)
    cells = (per_cell / _cells(labels)[:, None]).sum()
    solved = _right(outcome, labels)[1].to(outcome.q_halt.dtype)

    def bce(score: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(score, target, reduction="sum")

    q_continue = None
    if outcome.target is not None:
        q_continue = bce(outcome.q_continue, outcome.target)
    return Losses(cells, bce(outcome.q_halt, solved), q_continue)


@torch.no_grad()
def metrics(outcome: Outcome, carry: Carry) -> dict[str, float]:
    """Sums over the slots that halted with a label: divide each by `count`, which may be 0.

    carry           as the segment left it
    accuracy        share of right cells
    exact_accuracy  all cells right: the published figure
    q_halt_accuracy whether the score of halting says so
    """
    labels = carry.grids.labels
    right, solved = _right(outcome, labels)
    counted = carry.halted & (labels != IGNORED).any(-1)
    share = (right.float() / _cells(labels)[:, None]).sum(-1)
    confident = (outcome.q_halt >= 0) == solved
    return {
        "count": float(counted.sum()),
        "accuracy": float(share[counted].sum()),
        "exact_accuracy": float((counted & solved).sum()),
        "q_halt_accuracy": float((counted & confident).sum()),
        "steps": float(carry.steps[counted].sum()),
    }


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells have a label, and an index for all of them, int64."""
    known = labels != IGNORED
    return known, torch.where(known, labels, 0).long()


def _cells(labels: Tensor) -> Tensor:
    """Labelled cells of each slot [B], at least 1."""
    return (labels != IGNORED).sum(-1).clamp(min=1)


def _right(outcome: Outcome, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells are right bool [B, S], and which slots in all their cells [B]: those without
    any label, too."""
    known = labels != IGNORED
    right = known & (outcome.logits.argmax(-1) == labels)
    return right, right.sum(-1) == known.sum(-1)
