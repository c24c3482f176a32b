"""The loop that a careful person writes without a trainer, around the plain model."""

from __future__ import annotations

from typing import Any

import torch
from plain_model import Plain
from torch import Tensor, nn


class Loop:
    """Its training loop: two groups of AdamW, clipping, a learning rate that is handed in."""

    def __init__(self, model: Plain, t: Any) -> None:
        self.model, self.clip = model, t.grad_clip
        named = list(model.named_parameters())
        decayed = [p for n, p in named if p.ndim >= 2 and "norm" not in n]
        rest = [p for n, p in named if not (p.ndim >= 2 and "norm" not in n)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": t.weight_decay},
                {"params": rest, "weight_decay": 0},
            ],
            betas=t.betas,
            eps=t.eps,
        )

    def step(self, ids: Tensor, targets: Tensor, lr: float) -> float:
        self.optimizer.zero_grad()
        loss = self.model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item()
