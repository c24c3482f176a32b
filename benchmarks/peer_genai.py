"""Worker: one process, ONNX Runtime GenAI's side. The same work as peer_edgert.py.

Runs in an environment of its own. Argument: JSON with model, threads, ids, tokens, repeats.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og
from peer_measure import Window, own_memory, report, task


def request(model: og.Model, ids: list[int], tokens: int) -> dict[str, Any]:
    """Prefill `ids`, choose a first token, then `tokens` more, greedily."""
    params = og.GeneratorParams(model)
    # The smallest KV buffers that hold the request: the peer's best case.
    params.set_search_options(max_length=len(ids) + tokens + 1, do_sample=False)
    generator = og.Generator(model, params)
    prompt = np.asarray(ids, np.int32)
    chosen: list[int] = []
    arrivals: list[float] = []
    last = time.perf_counter()
    generator.append_tokens(prompt)
    while len(chosen) <= tokens and not generator.is_done():
        generator.generate_next_token()  # the first one only samples: append has run the graph
        chosen.append(int(generator.get_next_tokens()[0]))
        arrivals.append(time.perf_counter() - last)
        last += arrivals[-1]
    return {"prefill_s": arrivals[0], "step_s": arrivals[1:], "tokens": chosen}


def main() -> None:
    orders = task()
    ids, tokens = orders["ids"], orders["tokens"]
    config = og.Config(orders["model"])
    options = {"intra_op_num_threads": orders["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    start = time.perf_counter()
    model = og.Model(config)
    load_s = time.perf_counter() - start
    request(model, ids, min(tokens, 16))  # warm-up
    window = Window()
    runs = [request(model, ids, tokens) for _ in range(orders["repeats"])]
    report({"load_s": load_s, "others": window.others(), "memory": own_memory(), "runs": runs})


if __name__ == "__main__":
    main()
