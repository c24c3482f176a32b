"""Decode steps of an exported HAGI model against torch: eager with a KV cache, and torch.compile.

    python benchmarks/decode.py bundles/hagi-d-tiny --source runs/hagi-d-tiny [--threads 2]

Each side is a process of its own that loads once; they take turns, a request each, so that a
machine that slows down slows all. The greedy tokens of all sides must be equal. Reported are the
medians over all steps; ratios are medians of the rounds. The limit is what reading every weight
once a token (the core's once an iteration) costs at the measured reading speed of the memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click
from sides import Side, over

WORKER = "decode_worker.py"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--source", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True)
@click.option("--rounds", default=5, type=click.IntRange(1), show_default=True)
@click.option("--prompt", default=16, type=click.IntRange(1), show_default=True)
@click.option("--tokens", default=64, type=click.IntRange(1), show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(
    bundle: Path,
    source: Path,
    threads: int,
    rounds: int,
    prompt: int,
    tokens: int,
    compiled: bool,
    as_json: bool,
) -> None:
    """Milliseconds of a decode step: edgert, eager torch, torch.compile."""
    orders = {
        "bundle": str(bundle),
        "source": str(source),
        "threads": threads,
        "ids": list(range(1, prompt + 1)),
        "tokens": tokens,
    }
    names = ["edgert", "eager", *(["compiled"] if compiled else []), "memory"]
    sides = {name: Side(name, WORKER, orders | {"side": name}) for name in names}
    for _ in range(rounds):
        for side in sides.values():
            side.turn()
    report = summary(sides, threads, rounds, prompt, tokens) | {"bundle": bundle.name}
    click.echo(json.dumps(report) if as_json else table(report))


def summary(
    sides: dict[str, Side], threads: int, rounds: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Everything reported. Raises ClickException if the sides chose different tokens."""
    memory = sides.pop("memory")
    said = {name: side.runs[0]["tokens"] for name, side in sides.items()}
    for name, side in sides.items():
        if any(run["tokens"] != said["edgert"] for run in side.runs):
            raise click.ClickException(f"{name} chose other tokens than edgert: {said}")
    ours = sides["edgert"].step_ms()
    read = sides["eager"].facts["bytes_per_token"]
    speed = max(run["gb_per_s"] for run in memory.runs)
    return {
        "placement": sides["edgert"].facts["placement"],
        "parameters": sides["edgert"].facts["parameters"],
        "torch": sides["eager"].facts["torch"],
        "threads": threads,
        "rounds": rounds,
        "prompt": prompt,
        "tokens": tokens,
        "verified_tokens": len(said["edgert"]),
        "ms_per_step": {name: median(side.step_ms()) for name, side in sides.items()},
        "over_edgert": {name: over(ours, side.step_ms()) for name, side in sides.items()},
        "peak_mb": {name: side.runs[-1]["memory"]["peak"] for name, side in sides.items()},
        "bytes_per_token": read,
        "memory_gb_per_s": speed,
        "memory_limit_ms": read / speed / 1e6,
        "others_cpus": max(run["others"] for side in sides.values() for run in side.runs),
    }


def table(r: dict[str, Any]) -> str:
    rows = [
        f"{r['bundle']} · {r['parameters']:,} parameters · {r['placement']} · {r['threads']} "
        f"threads · {r['verified_tokens']} tokens equal on all sides",
        f"{'':10}{'ms a step':>11}{'tokens/s':>11}{'beside edgert':>15}{'peak MB':>10}",
    ]
    for name, ms in r["ms_per_step"].items():
        rows.append(
            f"{name:10}{ms:11.3f}{1e3 / ms:11.1f}{r['over_edgert'][name]:14.2f}x"
            f"{r['peak_mb'][name]:10.0f}"
        )
    rows.append(
        f"{'limit':10}{r['memory_limit_ms']:11.3f}   {r['bytes_per_token'] / 1e6:.1f} MB of weights"
        f" a token at {r['memory_gb_per_s']:.1f} GB/s"
    )
    rows.append(f"others kept at most {r['others_cpus']:.2f} CPUs busy")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
