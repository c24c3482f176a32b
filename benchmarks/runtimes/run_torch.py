"""torch: transformers' own model in float32, eager or through torch.compile.

Eager      a cache that grows
Compiled   torch.compile wants shapes that stay: a static cache, read whole behind a mask, as
           transformers and gpt-fast do. The prompt is read eagerly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from runtimes.interface import Arrived


class Torch:
    def __init__(self, orders: dict[str, Any]) -> None:
        torch.set_num_threads(orders["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(orders["model"], dtype=torch.float32)
        self.model.eval()
        self.step, self.static = self.model, None
        if orders["compiled"]:
            self.step = torch.compile(self.model, fullgraph=True, dynamic=False)
            self.static = StaticCache(self.model.config, max_cache_len=orders["capacity"])

    def _empty(self) -> Any:
        if self.static is None:
            return DynamicCache(config=self.model.config)
        self.static.reset()
        return self.static

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        cache, tokens = self._empty(), torch.tensor([ids])
        for i in range(count):
            run = self.step if i else self.model
            logits = run(tokens, cache=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            arrived(int(tokens))

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.model(torch.tensor([ids])).logits[0].numpy()
        return found


load = Torch
