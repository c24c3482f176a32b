"""OpenVINO GenAI: its pipeline with its own defaults, without a prefix cache.

Defaults on a CPU: activations rounded to int8 where weights are of few bits, a KV cache of 8 bits,
bfloat16 where the processor has it.

    python -m runtimes.run_openvino GGUF     convert: an OpenVINO model beside the GGUF file
"""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from numpy.typing import NDArray

from runtimes.interface import Arrived


class Streamer(genai.StreamerBase):  # type: ignore[misc]
    def __init__(self, arrived: Arrived) -> None:
        super().__init__()
        self.arrived = arrived

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        for each in token if isinstance(token, list) else [token]:
            self.arrived(each)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVINO:
    def __init__(self, orders: dict[str, Any]) -> None:
        self.folder = Path(orders["model"])
        self.options = {"INFERENCE_NUM_THREADS": orders["threads"]}

    @cached_property
    def pipeline(self) -> genai.LLMPipeline:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        return genai.LLMPipeline(self.folder, "CPU", scheduler_config=scheduler, **self.options)

    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        config = genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        prompt = ov.Tensor(np.asarray([ids], np.int64))
        self.pipeline.generate(prompt, config, Streamer(arrived))

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """By the model that the pipeline loads, run by OpenVINO itself: the pipeline keeps its
        logits."""
        model = ov.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.options)
        row = np.asarray([ids], np.int64)
        inputs = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {name for port in model.inputs for name in port.names}
        found: NDArray[np.float32] = model({k: v for k, v in inputs.items() if k in wanted})[
            "logits"
        ][0]
        return found


def convert(gguf: str) -> None:
    genai.LLMPipeline(gguf, "CPU", enable_save_ov_model=True)


load = OpenVINO

if __name__ == "__main__":
    convert(*sys.argv[1:])
