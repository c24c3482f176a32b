"""One process that measures one runtime.

    python -m runtimes.worker ORDERS        (from the folder `benchmarks`; ORDERS is a JSON object)

    runtime    the module runtimes.run_<runtime>, whose `load(orders)` gives a `Runtime`
    score      windows of token ids: what each token costs. One line, {"costs": ...}
    cold       otherwise: a prompt. The first line says that its first token is there; who started
               the process knows how long that took
    requests   then, [prompt length, steps] of `ids`, each timed `repeats` times: a second line
    margins    also say by how much each token led the second best

Answers are lines of JSON on stdout. What libraries print there goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

from runtimes.interface import Runtime
from runtimes.measure import Window, own_memory

WARM_STEPS = 2


def request(model: Runtime, ids: list[int], steps: int) -> dict[str, Any]:
    """A first token behind `ids`, then `steps` more. Seconds of each; the tokens."""
    tokens: list[int] = []
    times = [time.perf_counter()]

    def arrived(token: int) -> None:
        times.append(time.perf_counter())
        tokens.append(token)

    model.generate(ids, steps + 1, arrived)
    spans = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "prompt": len(ids),
        "prefill_s": spans[0],
        "step_s": spans[1:],
        "tokens": [int(t) for t in tokens],
    }


def speed(model: Runtime, orders: dict[str, Any]) -> dict[str, Any]:
    ids, requests = orders["ids"], orders["requests"]
    for length, steps in requests:
        request(model, ids[:length], min(steps, WARM_STEPS))
    window = Window()
    runs = [
        request(model, ids[:length], steps)
        for _ in range(orders["repeats"])
        for length, steps in requests
    ]
    answer = {"others": window.others(), "memory": own_memory(), "runs": runs}
    if orders.get("margins"):  # needs every position's logits: behind the measured memory
        for run in runs:
            run["margins"] = margins(model, ids[: run["prompt"]], run["tokens"])
    return answer


def margins(model: Runtime, ids: list[int], tokens: list[int]) -> list[float]:
    """By how much the best logit leads the second, where each of `tokens` was chosen."""
    import numpy as np

    logits = model.logits(ids + tokens[:-1])[len(ids) - 1 :]
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return [float(x) for x in first - second]


def costs(model: Runtime, ids: list[int]) -> list[float]:
    """-ln p of each token behind the first, in float64."""
    import numpy as np

    rows = model.logits(ids)[:-1]
    found = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64].astype(np.float64)
        part -= part.max(-1, keepdims=True)
        following = ids[start + 1 : start + 1 + len(part)]
        chosen = part[np.arange(len(part)), following]
        found += (np.log(np.exp(part).sum(-1)) - chosen).tolist()
    return found


def private_stdout() -> TextIO:
    """Stdout for answers alone: whatever else is printed there goes to stderr from now on."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    start = Window()
    orders = json.loads(sys.argv[1])
    answers = private_stdout()

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    model: Runtime = importlib.import_module(f"runtimes.run_{orders['runtime']}").load(orders)
    if "score" in orders:
        say({"costs": [costs(model, ids) for ids in orders["score"]]})
        return
    first = request(model, orders["cold"], 0)
    say({"token": first["tokens"][0], "others": start.others()})
    say(speed(model, orders))


if __name__ == "__main__":
    main()
