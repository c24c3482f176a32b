"""Worker of decode.py: one process, one side. Loads, then answers each line on stdin with a run.

Argument: JSON with side, bundle, source, threads, ids, tokens. Answers: JSON lines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sides import Run, serve

STREAM_BYTES = 1 << 29  # of each thread: far beyond any cache


def with_edgert(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    from runtimes.run_edgert import Edgert
    from runtimes.worker import request

    side = Edgert({"model": orders["bundle"], "threads": orders["threads"]})
    facts = {"placement": side.model.placement, "parameters": side.model.manifest.parameters}
    return lambda: request(side, orders["ids"], orders["tokens"]), facts


def weights(source: Path) -> Any:
    """The model of a checkpoint, or of an export recipe with random weights."""
    from edgert.export.recipe import read_recipe
    from edgert.models.importers import load_source
    from edgert.models.importers.fresh import fresh_source

    if source.suffix != ".toml":
        return load_source(source).model
    recipe = read_recipe(source)
    if recipe.model is None or recipe.random_seed is None:
        raise ValueError(f"{source} has no random weights: give the run or checkpoint itself")
    return fresh_source(recipe.model, recipe.random_seed, source).model


def with_torch(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch
    from plain_decode import Decoder, decode
    from plain_model import Plain

    torch.set_num_threads(orders["threads"])
    source = weights(Path(orders["source"]))
    model = Plain(source.config)
    model.load_state_dict(source.published(), strict=False)
    missing = set(model.state_dict()) - set(source.published())
    if missing:
        raise ValueError(f"the plain model has other weights: {', '.join(sorted(missing))}")
    ids, tokens = orders["ids"], orders["tokens"]
    decoder = Decoder(model, len(ids) + tokens).eval()
    compiled = None
    if orders["side"] == "compiled":
        compiled = torch.compile(decoder, fullgraph=True, dynamic=False)
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bytes_per_token": model.bytes_per_token(),
    }
    return lambda: decode(decoder, ids, tokens, compiled), facts


def with_memory(orders: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """How fast this machine reads memory: `threads` dot products side by side."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from runtimes.read_speed import read_speed

    threads = orders["threads"]
    return lambda: {"gb_per_s": read_speed(threads * STREAM_BYTES, threads)}, {}


SIDES = {
    "edgert": with_edgert,
    "eager": with_torch,
    "compiled": with_torch,
    "memory": with_memory,
}


if __name__ == "__main__":
    serve(SIDES)
