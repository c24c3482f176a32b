"""What trains grids in segments: AdamATan2 for the weights, sign-SGD for the puzzle table.

Sources  imoneoi/adam-atan2 @ 42a1aeb; sapientinc/HRM @ 42410da, models/sparse_embedding.py and
         pretrain.py (schedule); arXiv 2407.05872 (arctangent instead of epsilon)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from edgert.models.importers.common import Problems

MOMENTS = ("exp_avg", "exp_avg_sq")


class Named(Protocol):
    """A model whose weights have published names."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def published(self, pick: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]: ...


def learning_rate(step: int, *, base: float, warmup: int, total: int, floor: float) -> float:
    """Of update `step`, counted from 1: a line to `base`, then a cosine to `floor` times it.

    Behind `total` the cosine rises again, as published.
    """
    if step < warmup:
        return base * step / warmup
    done = (step - warmup) / max(1, total - warmup)
    return base * (floor + max(0.0, (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))))


def total_steps(epochs: int, groups: int, mean_examples: float, global_batch: int) -> int:
    """Updates in so many epochs of a dataset, as its dataset.json counts."""
    return int(epochs * groups * mean_examples / global_batch)


class AdamATan2:
    """w <- w (1 - lr wd) - lr / (1 - b1^t) atan2(m, sqrt(v) / sqrt(1 - b2^t)).

    No epsilon and no exceptions from decay. It works on the model's own parameters, fused and
    transposed as they are; moments are read and written by published names.

    grad_clip  what `clip` scales gradients to at most; 0: nothing, as published
    names      published name -> view of the weight, in published order
    """

    def __init__(
        self,
        model: Named,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        grad_clip: float = 0.0,
    ) -> None:
        self.model, self.betas, self.weight_decay = model, betas, weight_decay
        self.grad_clip = grad_clip
        self.names = model.published(lambda parameter: parameter.detach())
        self.parameters = list(model.parameters())
        self.updates = 0
        self.moments: dict[str, dict[nn.Parameter, Tensor]] = {
            slot: {p: torch.zeros_like(p) for p in self.parameters} for slot in MOMENTS
        }

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self) -> float:
        """Scale gradients to a global L2 norm of `grad_clip` at most; the norm before that."""
        return clip([p.grad for p in self.parameters if p.grad is not None], self.grad_clip)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate. Every weight has a gradient, if only of zeros."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        assert len(grads) == len(self.parameters), "each weight has a part in every loss"
        self.updates += 1
        first, second = self.betas
        m, v = (list(self.moments[slot].values()) for slot in MOMENTS)
        torch._foreach_lerp_(m, grads, 1 - first)
        torch._foreach_mul_(v, second)
        torch._foreach_addcmul_(v, grads, grads, 1 - second)
        weights: list[Tensor] = [*self.parameters]
        torch._foreach_mul_(weights, 1 - lr * self.weight_decay)
        spread = torch._foreach_sqrt(v)
        torch._foreach_div_(spread, math.sqrt(1 - second**self.updates))
        size = lr / (1 - first**self.updates)
        for weight, mean, deviation in zip(weights, m, spread, strict=True):
            weight.sub_(torch.atan2(mean, deviation, out=deviation), alpha=size)

    def state(self) -> dict[str, Tensor]:
        """Moments as '<slot>.<published name>', float32 in published orientation: views of what
        is in use."""
        found: dict[str, Tensor] = {}
        for slot in MOMENTS:
            views = self.model.published(partial(self._moment, slot))
            found |= {f"{slot}.{name}": view for name, view in views.items()}
        return found

    def _moment(self, slot: str, parameter: nn.Parameter) -> Tensor:
        return self.moments[slot][parameter]

    @torch.no_grad()
    def restore(self, updates: int, state: Mapping[str, Tensor], where: str) -> None:
        """Take back what `state` gave, behind so many updates.

        Raises BadCheckpoint listing every moment that is missing, unexpected or of another shape.
        """
        problems = Problems(where)
        views = self.state()
        for key in sorted(set(state) - set(views)):
            problems.add(f"{key} belongs to no weight of this model and optimizer")
        for key, view in views.items():
            if key not in state:
                problems.add(f"{key} is missing")
            elif state[key].shape != view.shape:
                problems.add(f"{key} is {list(state[key].shape)}, the weight is {list(view.shape)}")
        problems.check("the optimizer's state does not fit the model")
        self.updates = updates
        for key, view in views.items():
            view.copy_(state[key])


@torch.no_grad()
def clip(grads: list[Tensor], most: float) -> float:
    """Scale gradients in place to a global L2 norm of `most` at most (0: as they are); the norm
    before that."""
    norm = float(torch.nn.utils.get_total_norm(grads, foreach=True))
    if 0 < most < norm:
        torch._foreach_mul_(grads, most / (norm + 1e-6))
    return norm


@torch.no_grad()
def sign_sgd(
    table: Tensor, identifiers: Tensor, grads: Tensor, lr: float, weight_decay: float
) -> None:
    """Update the rows of a batch in place: w <- w (1 - lr wd) - lr sign(g), sign(0) = 0.

    table [puzzles, p]; identifiers int [B]; grads [B, p]. g is the sum over the slots that have the
    row; all other rows stay as they are. Slots of other workers belong into the same call.
    """
    rows, slots = identifiers.long().unique(return_inverse=True)
    total = torch.zeros(len(rows), table.shape[1], device=table.device).index_add_(0, slots, grads)
    table[rows] = table[rows] * (1 - lr * weight_decay) - lr * total.sign()
