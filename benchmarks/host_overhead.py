"""Python's share of a decode step: all time between two tokens that is not spent in the graph call.

    python benchmarks/host_overhead.py [--bundle bundles/smollm2-135m-instruct] [--json]

Without a bundle, the graph is a Python function that does next to nothing, over --vocab logits.
Reported is the median, in microseconds: detokenizing, stop strings and the sampler are included.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from edgert.backends.fake import FakeBackend
from edgert.bundle import Bundle
from edgert.model import Model, load
from edgert.runner import Runner
from edgert.spec import (
    DECODER_INPUTS,
    GraphSpec,
    Manifest,
    ProgramSpec,
    StateSpec,
    TokenizerSpec,
    VariantSpec,
    decoder_results,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, looking for guesses": {"temperature": 0.0, "speculate": "auto"},
    "greedy, two stop strings": {"temperature": 0.0, "stop": ("\n\n\n\n", "<never said>")},
    "temperature 0.8": {"temperature": 0.8, "seed": 1},
    "temperature 0.8, top-k 40": {"temperature": 0.8, "top_k": 40, "seed": 1},
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
}
WARM_UP = 16
NEVER_THE_SAME_PAIR = [
    i
    for first in range(64)
    for word in [(first,), *((first, j) for j in range(first + 1, 64))]
    for i in word
]
"""A de Bruijn sequence, 4096 long: there is nothing to guess from."""


def idle_model(vocab_size: int) -> Model:
    """A model whose graph only names the next token; its logits stay what they are."""
    spec = GraphSpec(
        file="none",
        data=(),
        inputs={"ids": "input.ids", "select": "input.select", "lens": "state.lens"},
        outputs={"logits": "result.logits", "token": "result.token"},
    )
    manifest = Manifest(
        name="idle",
        summary="",
        model_id="",
        weights_id="",
        parameters=0,
        vocab_size=vocab_size,
        context=1 << 20,
        program=ProgramSpec(epilogue="decode"),
        inputs=DECODER_INPUTS,
        results=decoder_results(vocab_size),
        states={"lens": StateSpec("counter", "int64", ("batch",))},
        variants={"fp32-ort": VariantSpec("fp32", "ort", {"ai.onnx": 20}, {"decode": spec})},
        tokenizer=TokenizerSpec("bytes"),
    )
    saying = itertools.cycle(np.full((1, 1), ord("0") + i) for i in NEVER_THE_SAME_PAIR)
    logits = np.random.default_rng(0).standard_normal((1, 1, vocab_size), np.float32) * 3
    backend = FakeBackend({"decode": lambda **_: {"token": next(saying), "logits": logits}})
    bundle = Bundle(Path("idle"), manifest)
    return Model(bundle, Runner(bundle, "fp32-ort", backend))


def host_us(model: Model, tokens: int, options: dict[str, Any]) -> float:
    """Median microseconds between two pieces, without the graph call."""
    spent = []
    options = {"ignore_eos": True, "speculate": "off"} | options
    with model.session() as session:
        execution = session.execution
        stream = session.stream([1, 2, 3], max_tokens=tokens + WARM_UP, **options)
        last, last_graph = time.perf_counter_ns(), 0
        for _ in stream:
            now = time.perf_counter_ns()
            spent.append(now - last - (execution.graph_ns - last_graph))
            last_graph = execution.graph_ns
            last = time.perf_counter_ns()
    return median(spent[WARM_UP:]) / 1e3


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Measure this bundle instead.")
@click.option("--vocab", default=49152, type=click.IntRange(256), show_default=True)
@click.option("--tokens", default=400, type=click.IntRange(2), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(bundle: Path | None, vocab: int, tokens: int, as_json: bool) -> None:
    """Median Python time per decode step, outside the graph call."""
    with load(bundle) if bundle else idle_model(vocab) as model:
        found = {name: host_us(model, tokens, options) for name, options in SETTINGS.items()}
        report = {
            "model": model.manifest.name,
            "vocab_size": model.manifest.vocab_size,
            "placement": model.placement,
            "tokens": tokens,
            "host_us_median": found,
        }
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"{report['model']} · vocabulary {report['vocab_size']} · {report['placement']}")
    for name, value in found.items():
        click.echo(f"  {name:<28}{value:8.1f} µs a token")


if __name__ == "__main__":
    main()
