"""Greedy decoding with the plain model and a KV cache: eager, or compiled.

Eager      the cache grows: attention reads what has been written
Compiled   torch.compile needs fixed shapes: attention reads the whole cache behind a mask, as
           gpt-fast does (pytorch-labs/gpt-fast, generate.py). The prompt is read eagerly.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from plain_model import Plain, Remember
from torch import Tensor, nn


class Decoder(nn.Module):
    """The model and its cache [slots, 1, m, C, d], keys and values."""

    keys: Tensor
    values: Tensor

    def __init__(self, model: Plain, capacity: int) -> None:
        super().__init__()
        c = model.c
        self.model = model
        shape = (model.slots, 1, c.num_kv_heads, capacity, c.hidden_size // c.num_query_heads)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def grown(self, slot: int, start: int, end: int) -> Remember:
        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
            self.keys[slot, :, :, start:end] = k
            self.values[slot, :, :, start:end] = v
            return self.keys[slot, :, :, :end], self.values[slot, :, :, :end], None

        return remember

    def masked(self, slot: int, position: Tensor, mask: Tensor) -> Remember:
        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = self.keys[slot], self.values[slot]
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            return keys, values, mask

        return remember

    def chosen(self, h: Tensor) -> Tensor:
        """Residual stream -> the best token behind it [1, 1]."""
        h = self.model.final_norm(h[:, -1:])
        return F.linear(h, self.model.embed.weight).argmax(-1)

    def eager(self, ids: Tensor, start: int) -> Tensor:
        """ids [1, T] behind `start` tokens -> the next token [1, 1]."""
        m, end = self.model, start + ids.shape[1]
        caches = [self.grown(slot, start, end) for slot in range(m.slots)]
        return self.chosen(m.stages(m.embed(ids), m.cos[start:end], m.sin[start:end], caches))

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """One token [1, 1] at `position` [1] -> the next one [1, 1], with shapes that stay."""
        m = self.model
        mask = (torch.arange(self.keys.shape[3]) <= position)[None, None, None]
        caches = [self.masked(slot, position, mask) for slot in range(m.slots)]
        h = m.stages(m.embed(token), m.cos[position], m.sin[position], caches)
        return self.chosen(h)


@torch.inference_mode()
def decode(decoder: Decoder, ids: list[int], tokens: int, compiled: Any = None) -> dict[str, Any]:
    """A first token behind `ids`, then `tokens` more. Seconds of each; the tokens."""
    begun = time.perf_counter()
    token = decoder.eager(torch.tensor([ids]), 0)
    out, spent = [int(token)], []
    prefill = time.perf_counter() - begun
    for position in range(len(ids), len(ids) + tokens):
        begun = time.perf_counter()
        if compiled is None:
            token = decoder.eager(token, position)
        else:
            token = compiled(token, torch.tensor([position]))
        out.append(int(token))
        spent.append(time.perf_counter() - begun)
    return {"prefill_s": prefill, "step_s": spent, "tokens": out}
