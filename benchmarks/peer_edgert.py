"""Worker: one process, edgert's side. Loads, warms up, times, and says what it measured.

Argument: JSON with bundle, threads, low_memory, ids, tokens, repeats. Answer: one JSON line.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from peer_measure import Window, own_memory, report, task

import edgert
from edgert.model import Model
from edgert.sampler import SamplingParams


def request(model: Model, ids: list[int], tokens: int) -> dict[str, Any]:
    """Prefill `ids`, choose a first token, then `tokens` more, greedily.

    The clock is the caller's: a step is the time between two pieces, detokenizing included.
    """
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens + 1, ignore_eos=True, speculate="off"
    )
    with model.session() as session:
        stream = session.stream(ids, params)
        last = time.perf_counter()
        arrivals = []
        in_prefill = 0.0
        for _ in stream:
            arrivals.append(time.perf_counter() - last)
            last += arrivals[-1]
            in_prefill = in_prefill or stream.timings.graph_s
        return {
            "prefill_s": arrivals[0],
            "step_s": arrivals[1:],
            "graph_s": stream.timings.graph_s - in_prefill,  # in graph calls, of all steps
            "tokens": stream.tokens,
            "state_mb": session.execution.states.nbytes / 1e6,
        }


def margins(model: Model, ids: list[int], tokens: list[int]) -> list[float]:
    """By how much the best logit leads the second, where each of `tokens` was chosen."""
    logits = model.logits([ids + tokens[:-1]])[0, len(ids) - 1 :]
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return [float(x) for x in first - second]


def main() -> None:
    orders = task()
    ids, tokens = orders["ids"], orders["tokens"]
    start = time.perf_counter()
    model = edgert.load(
        Path(orders["bundle"]), threads=orders["threads"], prepack=not orders["low_memory"]
    )
    load_s = time.perf_counter() - start
    with model:
        request(model, ids, min(tokens, 16))  # warm-up
        window = Window()
        runs = [request(model, ids, tokens) for _ in range(orders["repeats"])]
        result = {
            "load_s": load_s,
            "others": window.others(),
            "memory": own_memory(),  # before the margins, which need every position's logits
            "runs": runs,
            "placement": model.placement,
            "weights_mb": model.manifest.parameters * 4 / 1e6,
        }
        result["margins"] = margins(model, ids, runs[0]["tokens"])
    report(result)


if __name__ == "__main__":
    main()
