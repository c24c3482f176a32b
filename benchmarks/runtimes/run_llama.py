"""llama.cpp, by the C functions that llama-cpp-python binds, with llama.cpp's own defaults.

python -m runtimes.run_llama SOURCE TARGET TYPE     convert a GGUF file: llama.cpp's quantizer
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from runtimes.interface import Arrived


class Llama:
    def __init__(self, orders: dict[str, Any]) -> None:
        self.model = llama.llama_model_load_from_file(
            orders["model"].encode(), llama.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {orders['model']}")
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = orders["capacity"]  # no more of a KV cache than is needed
        params.n_threads = params.n_threads_batch = orders["threads"]
        self.context = llama.llama_init_from_model(self.model, params)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.greedy = llama.llama_sampler_init_greedy()

    def _forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def _decode(self, batch: Any) -> None:
        code = llama.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")

    def generate(self, ids: list[int], count: int, arrived: Arrived) -> None:
        self._forget()
        tokens = (llama.llama_token * len(ids))(*ids)
        for _ in range(count):
            self._decode(llama.llama_batch_get_one(tokens, len(tokens)))
            token = llama.llama_sampler_sample(self.greedy, self.context, -1)
            arrived(token)
            tokens = (llama.llama_token * 1)(token)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        self._forget()
        batch = llama.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(ids)
        self._decode(batch)
        rows = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(ids), self.vocab))
        found: NDArray[np.float32] = rows.copy()
        llama.llama_batch_free(batch)
        return found


def convert(source: str, target: str, kind: str) -> None:
    """A GGUF file of floats -> one of `kind`, such as q4_0, as llama-quantize does it."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = 1
    code = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize failed with code {code}")


load = Llama

if __name__ == "__main__":
    convert(*sys.argv[1:])
