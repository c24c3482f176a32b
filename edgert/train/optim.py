"""AdamW over fused weights, and the Muon hybrid over views of them.

Elementwise arithmetic does not care how weights are stored, so AdamW runs over the model's own
parameters, fused and transposed as they are. Muon treats a matrix as a whole: it works on views in
published names and orientation [out, in]. Moments are read and written by published names.

Sources  ShmidtS/HAGI @ 286a65d, prototype/training/optim.py (groups, Muon hybrid); AdamW: arXiv
         1711.05101; Muon: https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgert.errors import BadCheckpoint
from edgert.models.importers.common import Problems
from edgert.models.trainable import Model
from edgert.train.device import CPU
from edgert.train.recipe import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"

_NOT_MUON = ("embed", "lm_head", "norm", "gate")
_NS = (3.4445, -4.7750, 2.0315)


def decays(name: str, tensor: Tensor) -> bool:
    """Whether AdamW decays a weight of this published name."""
    return tensor.ndim >= 2 and "norm" not in name


def takes_muon(name: str, tensor: Tensor) -> bool:
    """Whether the hybrid gives a weight to Muon. By substring, so SwiGLU's gate is AdamW's."""
    return tensor.ndim == 2 and not any(word in name.lower() for word in _NOT_MUON)


class Optimizer:
    """Everything that updates the weights of one model.

    names  published name -> view of the weight, in published order
    """

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.names = model.published()
        self.parameters = list(model.parameters())
        self.updates = 0
        homes = {p.untyped_storage().data_ptr(): p for p in self.parameters}
        self.home = {n: homes[v.untyped_storage().data_ptr()] for n, v in self.names.items()}
        self.muon: dict[str, Tensor] = {}
        self.halves: dict[str, Tensor] = {}  # views of which AdamW has only a part of the parameter
        hybrid = config.optimizer == "muon"
        if hybrid:
            self.muon = {n: v for n, v in self.names.items() if takes_muon(n, v)}
            shared = {self.home[name] for name in self.muon}
            self.halves = {
                n: v for n, v in self.names.items() if n not in self.muon and self.home[n] in shared
            }
        self.buffers: dict[str, Tensor] = {}
        whole = {p: n for n, p in self.home.items() if n not in self.muon and n not in self.halves}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter, name in whole.items():
            groups[decays(name, self.names[name])].append(parameter)
        for name, view in self.halves.items():
            groups[decays(name, view)].append(view)
        decay = 0.0 if hybrid else config.weight_decay
        self.adamw = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            # One kernel for all; views with gaps between their rows need the list form.
            **({"foreach": True} if hybrid else {"fused": True}),
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self) -> float:
        """Scale gradients to a global L2 norm of `grad_clip` at most; the norm before that."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self.config.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(
                [p for p in self.parameters if p.grad is not None],
                self.config.grad_clip,
                norm,
                foreach=True,
            )
        return float(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at this learning rate. Weights without a gradient stay as they are."""
        if self.muon:
            grads = self.model.published(_gradient)
            for name, view in self.halves.items():
                view.grad = grads[name] if self.home[name].grad is not None else None
            for name, view in self.muon.items():
                if self.home[name].grad is not None:
                    self._muon(name, view, grads[name], lr)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.updates += 1

    def _muon(self, name: str, weight: Tensor, grad: Tensor, lr: float) -> None:
        buffer = self.buffers.get(name)
        if buffer is None:
            buffer = self.buffers[name] = torch.zeros(weight.shape, device=weight.device)
        buffer.mul_(self.config.muon_momentum).add_(grad)
        update = orthogonal(grad + self.config.muon_momentum * buffer, self.config.muon_ns_steps)
        rows, columns = weight.shape
        weight.add_(update.to(weight.dtype), alpha=-lr * math.sqrt(max(1.0, rows / columns)))

    def state(self) -> dict[str, Tensor]:
        """Moments as '<slot>.<published name>', float32 in published orientation: views of what
        is in use. A weight that never had a gradient has none."""
        found: dict[str, Tensor] = {}
        for slot in MOMENTS:
            views = self.model.published(partial(self._moment, slot))
            for name in self.names:
                if name in self.halves:
                    if self.halves[name] in self.adamw.state:
                        found[f"{slot}.{name}"] = self.adamw.state[self.halves[name]][slot]
                elif self.home[name] in self.adamw.state:
                    found[f"{slot}.{name}"] = views[name]
        return found | {f"{MOMENTUM}.{name}": buffer for name, buffer in self.buffers.items()}

    def _moment(self, slot: str, parameter: nn.Parameter) -> Tensor:
        state = self.adamw.state.get(parameter)
        return parameter.detach() if state is None else state[slot]

    @torch.no_grad()
    def restore(self, updates: int, state: Mapping[str, Tensor], where: str) -> None:
        """Take back what `state` gave, behind so many updates.

        Raises BadCheckpoint listing every moment that is missing, unexpected or of another shape.
        """
        problems = Problems(where)
        for key, tensor in state.items():
            slot, _, name = key.partition(".")
            own = (MOMENTUM,) if name in self.muon else MOMENTS
            if name not in self.names or slot not in own:
                problems.add(f"{key} belongs to no weight of this model and optimizer")
            elif tensor.shape != self.names[name].shape:
                problems.add(
                    f"{key} is {list(tensor.shape)}, the weight is {list(self.names[name].shape)}"
                )
        for parameter in self.parameters:
            here = [n for n, p in self.home.items() if p is parameter and n not in self.muon]
            keys = [f"{slot}.{name}" for name in here for slot in MOMENTS]
            missing = [key for key in keys if key not in state]
            if 0 < len(missing) < len(keys):
                for key in missing:
                    problems.add(f"{key} is missing")
        problems.check("the optimizer's state does not fit the model")
        self.updates = updates
        self.buffers = {
            name: state[f"{MOMENTUM}.{name}"].to(view.device, copy=True)
            for name, view in self.muon.items()
            if f"{MOMENTUM}.{name}" in state
        }
        self._allocate({key.partition(".")[2] for key in state}, updates)
        for key, view in self.state().items():
            if not key.startswith(MOMENTUM):
                view.copy_(state[key])

    def _allocate(self, names: set[str], updates: int) -> None:
        """Moments, still zero, for the weights that have some."""
        self.adamw.state.clear()
        for name in names - set(self.muon):
            leaf: Tensor = self.halves.get(name, self.home[name])
            if leaf not in self.adamw.state:
                # The fused kernel wants the count beside the weights, the list form on the CPU.
                place = leaf.device if self.adamw.defaults["fused"] else CPU
                self.adamw.state[leaf] = {"step": torch.tensor(float(updates), device=place)} | {
                    slot: torch.zeros_like(leaf, memory_format=torch.preserve_format)
                    for slot in MOMENTS
                }

    def settings(self) -> list[dict[str, Any]]:
        """AdamW's groups as torch describes them, without their members: decayed, not decayed."""
        return [
            {k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups
        ]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter if parameter.grad is None else parameter.grad


def orthogonal(update: Tensor, steps: int) -> Tensor:
    """The nearest half-orthogonal matrix, roughly: Newton-Schulz in bf16, [out, in] -> bf16."""
    x = update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    a, b, c = _NS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Average:
    """A moving average of the weights: average = decay * average + (1 - decay) * weight."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: list[Tensor] = list(model.parameters())
        self.values = {p: p.detach().clone() for p in model.parameters()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.values.values()), self.weights, 1 - self.decay)

    def published(self) -> dict[str, Tensor]:
        """Views of the averages under published names."""
        return self.model.published(lambda p: self.values[p])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in place; call it again to exchange them back."""
        for parameter, value in self.values.items():
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def check_state(found: Mapping[str, Tensor], where: str) -> None:
    """Raises BadCheckpoint if a moment is not a finite float32 tensor."""
    bad = sorted(
        name
        for name, tensor in found.items()
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all()
    )
    if bad:
        raise BadCheckpoint(
            f"the optimizer's state holds NaN, infinite or other values than float32: {bad[0]}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            where=where,
        )
