"""ONNX Runtime GenAI: a generator for each request."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai as og
from numpy.typing import NDArray

from runtimes.interface import Arrived


class GenAI:
    def __init__(self, orders: dict[str, Any]) -> None:
        config = og.Config(orders["model"])
        options = {"intra_op_num_threads": orders["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def _behind(self, ids: list[int], room: int) -> og.Generator:
        """A generator that has read `ids`, with the smallest KV buffers that hold `room` more."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(ids) + room, do_sample=False)
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.asarray(ids, np.int32))
        return generator

    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        generator = self._behind(ids, count)
        for _ in range(count):
            generator.generate_next_token()  # the first one only samples: the graph has run
            arrived(generator.get_next_tokens()[0])
            if generator.is_done():  # it ends at an end token, asked or not
                return

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._behind(ids, 1).get_output("logits")[0]
        return found


load = GenAI
