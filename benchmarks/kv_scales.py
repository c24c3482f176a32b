"""What int8 keys and values cost a model at several depths, by how their scales are found.

    python benchmarks/kv_scales.py export/smollm2-135m-instruct.toml --window 512 --window 2048

Both ways read the same calibration text, in windows of 512 tokens, and divide by 127:
    channel  the largest magnitude of each channel of the keys
    pair     the largest radius of each pair of channels that rotary embedding turns: what an export
             uses
Eager torch computes in float32 and rounds keys and values as the graphs do, so a row says what that
costs, and nothing else. Prints a Markdown table, or with --json one object a line.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from accuracy import source

from edgert.export.accuracy import TOKENS, Tally, sample, tokenizer_of
from edgert.export.kv_int8 import Int8KV, radius, ranges, scales_of
from edgert.models.families import program as program_of

WAYS = {"channel": torch.abs, "pair": radius}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--window", type=int, action="append", required=True)
    parser.add_argument("--data", type=Path, help="a text (default: the documentation topics)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    imported = source(given.source)
    program = program_of(imported.model)
    tokenizer, reference = tokenizer_of(imported), program.reference
    assert tokenizer is not None, "a model that reads text"
    assert reference is not None, "a decoder"
    text = given.data.read_text() if given.data else None
    calibration = sample(tokenizer, program.context, text, offset=0.0).windows
    caches = {
        name: Int8KV(scales_of(program, ranges(reference, calibration, size))).rounding()
        for name, size in WAYS.items()
    }
    if not given.json:
        print(f"| window | scales by | KL | top-1 | perplexity ratio |\n|{'---|' * 5}")
    for window in given.window:
        tallies = {name: Tally() for name in caches}
        for ids in sample(tokenizer, program.context, text, given.tokens, window=window).windows:
            rows = torch.from_numpy(ids[None])
            want = reference(rows).logits[0].numpy()
            for name, cache in caches.items():
                tallies[name].add(ids, want, reference(rows, cache).logits[0].numpy())
        for name, tally in tallies.items():
            found = tally.result()
            told = (
                f"{found.kl:.5f} | {found.top1:.2%} | {found.ratio:.4f} ± {found.ratio_error:.4f}"
            )
            print(
                json.dumps({"window": window, "scales": name} | asdict(found))
                if given.json
                else f"| {window} | {name} | {told} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
