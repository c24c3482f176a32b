"""What it costs to move sessions between the variants of a bundle: the table in docs/session.md.

    python benchmarks/drift.py bundles/smollm2-ladder

Prompts of different lengths from bench's built-in text, each continued greedily in one variant,
saved, and moved to each of the others with the state carried over. Nothing is refused here; that
is what the table is for. Prints a Markdown table, or with --json one object a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgert
from edgert.bench.plan import TEXT
from edgert.bundle import read_manifest
from edgert.migrating import migrate

LEAST, MOST, ANSWER = 16, 480, 24
"""Tokens of the shortest and the longest prompt, and of each answer."""


def prompts(model: edgert.Model, count: int) -> Iterator[list[int]]:
    """Token ids from different places of the text, of lengths evenly from LEAST to MOST."""
    ids = model.encode(TEXT)
    for i, length in enumerate(np.linspace(LEAST, MOST, count).astype(int)):
        start = i * len(ids) // count
        yield (ids[start:] + ids * (1 + MOST // len(ids)))[:length]


def save(bundle: Path, variant: str, count: int, folder: Path) -> list[Path]:
    """Sessions of a variant, each left in its answer."""
    files = [folder / f"{variant}-{i}" for i in range(count)]
    with edgert.load(bundle, variant=variant) as model:
        for file, prompt in zip(files, prompts(model, count), strict=True):
            with model.session() as session:
                session.generate(prompt, max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
                session.save(file)
    return files


def measure(bundle: Path, count: int) -> Iterator[dict[str, Any]]:
    """A row for each ordered pair of variants that keep states as the program does."""
    variants = [name for name, v in read_manifest(bundle).variants.items() if not v.state_dtypes]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: save(bundle, name, count, Path(folder)) for name in variants}
        for old, new in itertools.permutations(variants, 2):
            output = Path(folder) / "moved"
            moves = [
                migrate(file, bundle, output, variant=new, max_drift=np.inf).move
                for file in files[old]
            ]
            assert all(move.how == "carried" for move in moves), "states of one layout"
            nats = [move.kl for move in moves if move.kl is not None]
            yield {
                "from": old,
                "to": new,
                "sessions": count,
                "kl_median": float(np.median(nats)),
                "kl_max": max(nats),
                "state_max_abs": max(move.max_abs or 0.0 for move in moves),
                "same_best": sum(bool(move.top1) for move in moves),
            }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sessions", type=int, default=12, metavar="N", help="for each pair")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if not given.json:
        print("| from | to | KL median | KL max | state, max abs Δ | same best token |")
        print("|---|---|---|---|---|---|")
    for row in measure(given.bundle, given.sessions):
        print(
            json.dumps(row)
            if given.json
            else f"| {row['from']} | {row['to']} | {row['kl_median']:.1e} | {row['kl_max']:.1e} | "
            f"{row['state_max_abs']:.2g} | {row['same_best']} of {row['sessions']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
