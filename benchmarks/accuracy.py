"""What few bits cost a model, by method: the table in docs/precision.md.

    python benchmarks/accuracy.py export/smollm2-135m-instruct.toml --bits 4
    python benchmarks/accuracy.py runs/hagi-a-tiny --bits 4 --bits 8 --data heldout.txt

Weights alone: eager torch computes in float32 with what the codes stand for, so that a row says
what the method does, and nothing of int8 activations (accuracy.json of a bundle has both). The
methods that calibrate read other windows of the same text. Prints a Markdown table, or with --json
one object a line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgert.export.accuracy import TOKENS, Logits, Tally, sample, tokenizer_of
from edgert.export.calibration import moments
from edgert.export.nbits import CALIBRATED, METHODS, UNEVEN, Scheme
from edgert.export.quantize import Quantizer
from edgert.export.recipe import read_recipe
from edgert.export.trace import trace
from edgert.models.families import program as program_of
from edgert.models.importers import Imported, load_source
from edgert.models.program import Program


def schemes(bits: int, blocks: list[int]) -> list[Scheme]:
    """Every method, symmetric and not, at every block size, the embedding and head alike and in 8
    bits; at 8 bits the simple methods alone."""
    return [
        Scheme(bits, block, symmetric, method=method, head=head)
        for head in sorted({bits, 8})
        for method in METHODS
        for symmetric in (True, False)
        for block in blocks
        if not (symmetric and method in UNEVEN) and (bits == 4 or method in ("plain", "gptq"))
    ]


def source(path: Path) -> Imported:
    if path.suffix != ".toml":
        return load_source(path)
    recipe = read_recipe(path)
    return load_source(recipe.source, context=recipe.context)


def scorer(program: Program) -> Callable[[NDArray[np.int64]], Logits]:
    reference = program.reference
    assert reference is not None, "a decoder"
    return lambda ids: reference(torch.from_numpy(ids[None])).logits[0].numpy()


def nbytes(quantizer: Quantizer) -> int:
    return sum(tensor.nbytes for tensor in quantizer.tensors())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--bits", type=int, action="append", choices=(4, 8), required=True)
    parser.add_argument("--data", type=Path, help="a text (default: the documentation topics)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--block", type=int, action="append", help="default: 32, 64, 128")
    parser.add_argument("--head", type=int, choices=(4, 8), help="default: both")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    imported = source(given.source)
    program = program_of(imported.model)
    tokenizer = tokenizer_of(imported)
    assert tokenizer is not None, "a model that reads text"
    text = given.data.read_text() if given.data else None
    score = scorer(program)
    windows = sample(tokenizer, program.context, text, given.tokens).windows
    truth = [score(ids) for ids in windows]
    calibration = sample(tokenizer, program.context, text, given.tokens, offset=0.0).windows
    seen = moments(program.weights, score, calibration)
    graphs = [trace(program, graph, "ort") for graph in program.graphs]
    if not given.json:
        names = ("bits", "head", "method", "zeros", "block", "MB", "KL", "top-1", "ratio", "s")
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    blocks = given.block or [32, 64, 128]
    for scheme in (scheme for bits in given.bits for scheme in schemes(bits, blocks)):
        if given.method and scheme.method not in given.method:
            continue
        if given.head and scheme.head != given.head:
            continue
        start = time.perf_counter()
        quantizer = Quantizer(program.weights, scheme, seen)
        for graph in graphs:
            quantizer.rewrite(graph.clone())
        seconds = time.perf_counter() - start
        with quantizer.applied():
            tally = Tally()
            for ids, want in zip(windows, truth, strict=True):
                tally.add(ids, want, score(ids))
            found = tally.result()
        row = [
            scheme.bits,
            scheme.head,
            scheme.method + "*" * (scheme.method in CALIBRATED),
            "no" if scheme.symmetric else "yes",
            scheme.block,
            f"{nbytes(quantizer) / 1e6:.2f}",
            f"{found.kl:.5f}",
            f"{found.top1:.2%}",
            f"{found.ratio:.4f} ± {found.ratio_error:.4f}",
            f"{seconds:.0f}",
        ]
        print(
            json.dumps(asdict(scheme) | asdict(found))
            if given.json
            else f"| {' | '.join(map(str, row))} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
